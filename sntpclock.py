#!/usr/bin/env python3
"""sntpclock - ask NTP servers how far the system clock is off

SYNOPSIS
    sntpclock [options] host... | clockview
    sntpclock [options] host... > /usr/local/clockspeed/adjust

DESCRIPTION
    Asks each host (an IPv4 or IPv6 address or a name; `0` is 127.0.0.1) by NTP and writes
    one adjustment to standard output: real time minus system clock, 16 bytes of TAI64NA.
    Sets nothing, needs no privilege.

    Each exchange of two packets proves a range in which the offset lies.  The result is the
    middle of the intersection of all ranges.  Linux stamps the packets in the kernel, and a
    slew or step of the clock during the measurement is allowed for.

    A name counts as up to 4 servers, one for each of its addresses.  With several servers,
    each range is widened by the server's root distance, and a majority of those that
    answered must agree.  The others are named on stderr.

    A server that answers with a kiss-o'-death is not asked again in this run.  What it said
    before counts after RATE, and does not after DENY and RSTR.

OPTIONS
    -r n     exchanges with each server: else 10 when its address is a loopback, private or
             link-local one, 4 when it is public
    -h ms    pause between them: else none, 2000 when the address is public
    -t ms    longest wait for each answer (1000)
    -T ms    longest wait for everything, names included (10000)
    -e ms    largest spread accepted (any)
    -l days  largest offset accepted (2; 0 is any)
    -f       output even if -e or -l is exceeded
    -p port  (123)
    -4, -6   use IPv4 only, IPv6 only
    -k file  chrony's key file, which others must not be able to read
    -K id    accept only answers authenticated with that key of it: MD5, SHA1, SHA256,
             SHA384 or SHA512, of 16 bytes or more
    -s dir   write to dir/sources what each server said
    -v n     0 fatal errors only; 1 warnings too (the default); 2 results too

OUTPUT
    The last four bytes are a number that tells how good the measurement is, ESSSSDDCC in
    decimal digits, or 0.  The spread, half the width of the proven range, is S.SSS * 10^E
    nanoseconds.  The root distance is 10^(DD/14) microseconds, or nothing for 00.  CC makes
    the number 1 modulo 97.  Real time is within spread plus root distance, if the servers
    tell the truth.

FILES
    dir/sources  of -s, a line for each server: the Unix second, `ntp`, its name, offset,
                 spread, delay and root distance in nanoseconds, stratum, reference id in
                 hexadecimal, and `agreed`, `falseticker` or `failed:` and the reason; `-`
                 for what is not known

ENVIRONMENT
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones);
                 without it the time zone tells

EXIT STATUS
    0 measured; 100 wrong usage; 111 no usable answer, refused, or a system error

SEE ALSO
    taiclock, ntsclock, clockview, clockadd, clockspeed, clockctl
"""
try:  # Ctrl-C ends this program as it ends one in C: without a traceback, even while it loads
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
except KeyboardInterrupt:
    raise SystemExit(130)
import array
import collections
import contextlib
import getopt
import os
import select
import socket
import struct
import sys
import threading
import time

PROGRAM = "sntpclock"
USAGE = "sntpclock [-46f] [-r exchanges] [-h ms] [-t ms] [-T ms] [-e ms] [-l days] [-p port] [-v n] " \
        "[-k file -K id] [-s dir] host... | clockview"
KIND = "ntp"  # in dir/sources


# ==== shared by all: messages and TAI64NA ====
RELEASE, RELEASE_SEC = "2026.11", 1793491200  # 2026-11-01 00:00:00 UTC: real time is never before it
# Signed seconds, nanoseconds counted upwards, and a last number under 10^9: attoseconds in a label and in
# etc/atto; in an adjustment, which is real time minus system clock, what the mark tells of itself.
TAI64NA = struct.Struct(">qII")


def complain(kind, text):
    """One line on stderr, `PROGRAM: kind: text`; a stderr that can't take it is no reason to stop."""
    try:
        os.write(2, ("%s: %s: %s\n" % (PROGRAM, kind, text)).encode(errors="replace"))
    except OSError:
        pass


def emit(data):
    """Write all of the bytes to stdout; OSError."""
    while data:
        data = data[os.write(1, data):]


def reason(err):
    """What an exception says, without its number and path."""
    return getattr(err, "strerror", None) or str(err)


def begin(argv):
    """Open closed descriptors 0 to 2; answer --help and --version -> whether argv asks for them; OSError."""
    fd = 0
    while fd < 3:  # lest a file be taken for stdout; writing a result there still fails
        fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    if argv[1:] in (["-h"], ["--help"]):
        emit((__doc__ or USAGE + "\n").encode())  # python3 -OO has no docstrings
    elif argv[1:] == ["--version"]:
        emit(("%s %s\n" % (PROGRAM, RELEASE)).encode())
    else:
        return False
    return True


def pack(ns, last=0):
    """Signed nanoseconds and the last number -> 16 bytes of TAI64NA."""
    return TAI64NA.pack(*divmod(ns, 10**9), last)


def unpack(packet):
    """16 bytes of TAI64NA, or 12 of TAI64N -> (signed nanoseconds, last number); ValueError."""
    if len(packet) not in (12, 16):
        raise ValueError("%d bytes, not 16" % len(packet))
    sec, nano, last = TAI64NA.unpack(packet.ljust(16, b"\0"))
    if max(nano, last) >= 10**9:
        raise ValueError("not a TAI64NA packet")
    return sec * 10**9 + nano, last
# ==== end shared ====


# ==== shared by some: clock scale ====
TAI_MINUS_UTC_SEC = 37  # since 2017; there are no leap seconds any more


def scale_offset_sec():
    """TAI minus system clock: 37 s on the utc scale, 10 s on the tai scale; ValueError.

    CLOCK_SCALE tells which it is, else the time zone: a right/ one shows the 23:59:60 of June 1972.
    """
    scale = os.environ.get("CLOCK_SCALE") or ("tai" if time.localtime(78796800).tm_sec == 60 else "utc")
    if scale not in ("utc", "tai"):
        raise ValueError("CLOCK_SCALE is neither utc nor tai")
    return TAI_MINUS_UTC_SEC if scale == "utc" else 10
# ==== end shared ====


# ==== shared by some: the exchange ====
# A query leaves at t0 and its answer comes at t1 by the system clock; between them the server's clock showed
# T2 <= T3.  That proves T3 - t1 <= offset <= T2 - t0, and the offset is real time minus system clock.
#
# A script sets KIND, and ECHO to where an answer repeats its query: the place in the answer, the place in the
# query, and how many bytes.  It gives measure() two functions: make_query(server) -> bytes, and
# decode(server, query, packet) -> Answer, or None when that does not answer the query; ValueError, Dismissed.
LETTERS = "46fe:h:l:p:r:s:t:T:v:"
LINUX = sys.platform.startswith("linux")  # elsewhere our own readings do without the kernel's stamps
COUNTER = getattr(time, "CLOCK_MONOTONIC_RAW", time.CLOCK_MONOTONIC)  # the former is never slewed nor set
COUNTER_PPM = 500  # no counter is further off, since no kernel's clock could make up for it
STEERED_PPM = 250  # a clock that runs away from the counter faster is slewed, which kernels do by 500 or more
READING_NS = 1000  # clock and counter are read this close to each other, unless the scheduler comes between
MOST_ADDRESSES = 4  # of one name: the least with which three outvote one
DAY_NS = 86400 * 10**9
# What Python's socket module lacks of <asm-generic/socket.h>, <linux/net_tstamp.h> and <linux/filter.h>.
SO_ATTACH_FILTER, SO_TIMESTAMPING = 26, 37
SOFTWARE_STAMPS = 2 | 8 | 16  # of what leaves, of what arrives, and report them
TIMESPEC = struct.Struct("@ll")
FILTER_STEP = struct.Struct("=HBBI")  # code, steps to skip if so and if not, number
LOAD_WORD, JUMP_IF_EQUAL, PASS_BYTES = 0x20, 0x15, 0x06
UDP_HEADER_BYTES = 8

# T2 rounded up and T3 rounded down, as a right clock on our scale shows them, and what else the server said.
Answer = collections.namedtuple("Answer", "received_ns sent_ns distance_ns stratum reference")
Reading = collections.namedtuple("Reading", "clock_ns tick_ns")  # system clock and counter at one moment
Sample = collections.namedtuple("Sample", "answer own kernel")  # own and kernel: Readings at t0 and t1
Range = collections.namedtuple("Range", "least_ns most_ns")  # of the offset


class Dismissed(Exception):
    """(words, may its earlier answers be used): the server does not want to be asked."""


class Settings:
    """The command line; getopt.GetoptError when it is wrong."""

    def __init__(self, words, port, more_letters=""):
        options, self.hosts = getopt.getopt(words, LETTERS + more_letters)
        self.letters = letters = dict(options)

        def number(letter, default, unit=1, least=0):
            value = round(float(letters[letter]) * unit) if letter in letters else default
            if value is not None and value < least:
                raise ValueError
            return value
        try:  # without -r and -h the address decides
            self.exchanges, self.pause_ns = number("-r", None, least=1), number("-h", None, 10**6)
            self.wait_ns, self.total_ns = number("-t", 10**9, 10**6), number("-T", 10 * 10**9, 10**6)
            self.most_spread_ns, self.limit_ns = number("-e", None, 10**6), number("-l", 2 * DAY_NS, DAY_NS)
            self.port, self.verbosity = number("-p", port, least=1), number("-v", 1)
        except (OverflowError, ValueError):
            raise getopt.GetoptError("") from None
        if self.port > 65535 or not self.hosts:
            raise getopt.GetoptError("")
        self.family = {(True, False): socket.AF_INET, (False, True): socket.AF_INET6}.get(
            ("-4" in letters, "-6" in letters), socket.AF_UNSPEC)
        self.force, self.folder = "-f" in letters, letters.get("-s")
        self.end_ns = time.monotonic_ns() + self.total_ns

    def warn(self, text):
        if self.verbosity >= 1:
            complain("warning", text)


class Server:
    """One address, the exchanges with it and what became of them."""

    def __init__(self, name, family=None, address=None):
        self.name, self.family, self.address = name, family, address
        self.samples, self.failures, self.kiss = [], {}, None
        self.range = None  # which the samples prove
        self.certain = None  # that, widened by how far the server may be off true time
        self.verdict = None  # "agreed" or "falseticker"

    def failed(self, why):
        self.failures[why] = self.failures.get(why, 0) + 1

    def delay_ns(self):
        """The least round trip, without the time that the server took."""
        return min(t1.clock_ns - t0.clock_ns - (answer.sent_ns - answer.received_ns)
                   for answer, _, (t0, t1) in self.samples)


def in_parallel(function, arguments, end_ns):
    """Call it with each argument in a thread of its own -> what each returned or raised.  TimeoutError stands
    for a call that has not ended by then: nothing else bounds getaddrinfo()."""
    results = [TimeoutError("timed out") for _ in arguments]

    def call(place):
        try:
            results[place] = function(arguments[place])
        except Exception as err:  # whatever it is, the main thread is to tell it
            results[place] = err
    threads = [threading.Thread(target=call, args=(place,), daemon=True) for place in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(end_ns - time.monotonic_ns(), 0) / 1e9)
    return list(results)


def look_up(host, port, family, kind=socket.SOCK_DGRAM):
    """-> [(family, address)]; OSError.  `0` is this host, as in the original."""
    # In bytes, since for a str Python loads its megabyte of international names.
    name = b"127.0.0.1" if host == "0" else os.fsencode(host)
    return [(found[0], found[4]) for found in socket.getaddrinfo(name, port, family, kind)[:MOST_ADDRESSES]]


def numeric_name(address):
    return socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def find_servers(hosts, port, settings):
    """Names and addresses -> Servers, without an address for what was not found; OSError when that is all."""
    servers, known = [], set()
    for_others_ns = min(settings.wait_ns, settings.total_ns // 2)  # when the name of one is never found
    for host, found in zip(hosts, in_parallel(
            lambda host: look_up(host, port, settings.family), hosts, settings.end_ns - for_others_ns)):
        if isinstance(found, Exception):
            servers.append(Server(host))
            servers[-1].failed(reason(found))
            continue
        for family, address in found:
            if (family, address) not in known:
                known.add((family, address))
                numeric = numeric_name(address)
                name = numeric if host in (numeric, "0") else "%s/%s" % (host, numeric)
                servers.append(Server(name, family, address))
    if not known:
        raise OSError(next(iter(servers[0].failures)))
    return servers


def is_near(address):
    """Is that a loopback, private or link-local address?  Its owner is then the one who asks it."""
    import ipaddress  # here, so that its megabyte is not loaded for a wrong command line
    ip = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(ip, "ipv4_mapped", None) or ip).is_private


def read_clocks():
    """-> Reading; again when the scheduler came between clock and counter."""
    readings = []
    for _ in range(3):
        before_ns, clock_ns = time.clock_gettime_ns(COUNTER), time.time_ns()
        took_ns = time.clock_gettime_ns(COUNTER) - before_ns
        readings.append((took_ns, Reading(clock_ns, before_ns + took_ns // 2)))
        if took_ns <= READING_NS:
            break
    return min(readings)[1]


def enable_kernel_stamps(sock):
    with contextlib.suppress(OSError):
        if LINUX:
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, SOFTWARE_STAMPS)


def kernel_stamp(ancillary):
    """What recvmsg() got beside a packet -> the kernel's stamp of it, in ns of the system clock, or None."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPING):
            sec, nano = TIMESPEC.unpack_from(data)
            return sec * 10**9 + nano or None  # zero: this packet has none
    return None


def sent_stamp(sock, query):
    """The kernel's stamp of the query, or None.  Linux puts a copy of what leaves into the error queue."""
    stamp_ns = None
    with contextlib.suppress(BlockingIOError):  # the queue is empty
        while LINUX:
            packet, ancillary, _, _ = sock.recvmsg(2048, 512, socket.MSG_ERRQUEUE)
            if packet.endswith(query):
                stamp_ns = kernel_stamp(ancillary)
    return stamp_ns


def kernel_readings(own, sent_ns, received_ns):
    """Our Readings at t0 and t1, and the kernel's stamps -> better Readings.  The stamps are nearer to the
    wire, but count only when they lie between ours; the counter that belongs to them is interpolated."""
    t0, t1 = own

    def better(kernel_ns, reading):
        if kernel_ns is None or not t0.clock_ns <= kernel_ns <= t1.clock_ns:
            return reading
        passed_ns = (kernel_ns - t0.clock_ns) * (t1.tick_ns - t0.tick_ns) // max(t1.clock_ns - t0.clock_ns, 1)
        return Reading(kernel_ns, t0.tick_ns + passed_ns)
    return better(sent_ns, t0), better(received_ns, t1)


def admit_only_answers(sock, query):
    """Have Linux drop what does not repeat the query's cookie.  An attacker who knows only our port could
    otherwise fill the socket's queue, so that the true answer finds no room in it."""
    at, query_at, size = ECHO
    steps = []
    for i in range(0, size, 4):
        word, = struct.unpack_from(">I", query, query_at + i)
        steps += [(LOAD_WORD, 0, 0, UDP_HEADER_BYTES + at + i), (JUMP_IF_EQUAL, 1, 0, word),
                  (PASS_BYTES, 0, 0, 0)]
    steps.append((PASS_BYTES, 0, 0, 0xffff))
    program = array.array("B", b"".join(FILTER_STEP.pack(*step) for step in steps))
    with contextlib.suppress(OSError):  # decode() tells them apart too, only later
        if LINUX:
            sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER,
                            struct.pack("@HP", len(steps), program.buffer_info()[0]))


def exchange(sock, server, query, decode, end_ns, clocks):
    """Send the query and wait for its answer -> Sample; OSError, ValueError, Dismissed."""
    poller, sent_ns = select.poll(), None
    poller.register(sock, select.POLLIN)
    admit_only_answers(sock, query)
    sent = clocks()
    sock.send(query)
    while time.monotonic_ns() < end_ns:
        poller.poll(max((end_ns - time.monotonic_ns()) // 10**6 + 1, 0))
        try:
            packet, ancillary, _, _ = sock.recvmsg(2048, 512)
        except BlockingIOError:  # there was only a stamp, or a wrong checksum
            sent_ns = sent_stamp(sock, query) or sent_ns
            continue
        own = sent, clocks()
        answer = decode(server, query, packet)
        if answer:  # else it is late, doubled or forged, and the right one may yet come
            sent_ns = sent_ns or sent_stamp(sock, query)
            return Sample(answer, own, kernel_readings(own, sent_ns, kernel_stamp(ancillary)))
    raise TimeoutError("timed out")


def ask(servers, settings, make_query, decode, clocks=read_clocks):
    """All exchanges with all servers at once -> Reading at the end."""
    def ask_server(server):
        near = is_near(server.address[0])
        pause_ns = (0 if near else 2 * 10**9) if settings.pause_ns is None else settings.pause_ns
        with socket.socket(server.family, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            enable_kernel_stamps(sock)
            sock.connect(server.address)  # from now on the kernel drops what other addresses send
            for left in reversed(range(settings.exchanges or (10 if near else 4))):
                end_ns = min(time.monotonic_ns() + settings.wait_ns, settings.end_ns)
                try:
                    server.samples.append(exchange(sock, server, make_query(server), decode, end_ns, clocks))
                except (OSError, ValueError) as err:
                    server.failed(reason(err))
                if not left or time.monotonic_ns() + pause_ns >= settings.end_ns:
                    break
                time.sleep(pause_ns / 1e9)
    found = [server for server in servers if server.address]
    for server, err in zip(found, in_parallel(ask_server, found, settings.end_ns + DAY_NS)):  # ends by itself
        if isinstance(err, Dismissed):
            server.kiss, usable = err.args
            server.samples = server.samples if usable else []
        if err:
            server.failed(server.kiss or reason(err))
    return clocks()


def gained(then, now):
    """-> (least, most) that real time can have gained on the clock between two Readings.

    It went at the clock's pace, at the counter's, or at one between.  When those are too far apart, the clock
    was slewed or set meanwhile, and only the counter tells.
    """
    elapsed_ns = now.tick_ns - then.tick_ns
    gain_ns = elapsed_ns - (now.clock_ns - then.clock_ns)
    if abs(gain_ns) <= elapsed_ns * STEERED_PPM // 10**6 + READING_NS:
        return min(0, gain_ns), max(0, gain_ns)
    doubt_ns = elapsed_ns * COUNTER_PPM // 10**6 + READING_NS
    return gain_ns - doubt_ns, gain_ns + doubt_ns


def sample_range(answer, stamps, end):
    """-> the Range that an exchange proves for the Reading `end`."""
    t0, t1 = stamps
    return Range(answer.sent_ns - t1.clock_ns + gained(t1, end)[0],
                 answer.received_ns - t0.clock_ns + gained(t0, end)[1])


def vote(ranges):
    """Ranges -> (Range from the first to the last point that is in the most of them, in how many); the
    algorithm is Marzullo's.  0: each contradicts itself."""
    def votes(point):
        return sum(lo <= point <= hi for lo, hi in ranges)
    most_votes = max(votes(lo) for lo, _ in ranges)
    return Range(min(lo for lo, _ in ranges if votes(lo) == most_votes),
                 max(hi for _, hi in ranges if votes(hi) == most_votes)), most_votes


def half_ns(range_ns):
    """Half the width of a Range, rounded up."""
    return (range_ns.most_ns - range_ns.least_ns + 1) // 2


def describe(range_ns):
    return "offset %+.9f s, spread %.9f s" % (sum(range_ns) / 2e9, half_ns(range_ns) / 1e9)


def weigh(server, settings, end):
    """Set the Ranges that this server's samples prove, if they do."""
    answer = server.samples[-1].answer
    # Where its exchanges contradict each other, the most of them count.
    found, votes = vote([sample_range(sample.answer, sample.kernel, end) for sample in server.samples])
    if not votes:
        return server.failed("it says that its answers took longer than we waited for them")
    server.range = found
    server.certain = Range(server.range[0] - answer.distance_ns, server.range[1] + answer.distance_ns)
    if settings.verbosity >= 2:
        complain("info", "%s: %s, delay %.9f s, root distance %.9f s, stratum %s, reference %s"
                 % (server.name, describe(server.range), server.delay_ns() / 1e9,
                    answer.distance_ns / 1e9, answer.stratum, answer.reference))


def middle_ns(proven, agreed, end):
    return sum(proven) // 2


def conclude(servers, settings, end, choose=middle_ns):
    """What the servers prove together -> the 16 bytes of an adjustment; ValueError when that is not enough.
    Sets their verdicts.  choose() gives the best offset of the proven Range."""
    for server in servers:
        if server.samples:
            weigh(server, settings, end)
    voters = [server for server in servers if server.range]
    if not voters:
        raise ValueError(next((server.kiss for server in servers if server.kiss), "no usable answer"))
    proven, votes = vote([server.certain for server in voters])
    if 2 * votes <= len(voters):
        raise ValueError("no majority of the servers agrees")
    for server in voters:
        agrees = server.certain.least_ns <= proven.most_ns and proven.least_ns <= server.certain.most_ns
        server.verdict = "agreed" if agrees else "falseticker"
        if not agrees:
            settings.warn("%s is a falseticker: %s" % (server.name, describe(server.range)))
    agreed = [server for server in voters if server.verdict == "agreed"]
    distance_ns = min(server.samples[-1].answer.distance_ns for server in agreed)
    value_ns = choose(proven, agreed, end)
    spread_ns = max(proven.most_ns - value_ns - distance_ns, value_ns - proven.least_ns - distance_ns, 1)
    if settings.verbosity >= 2:
        complain("info", "result: offset %+.9f s, spread %.9f s, root distance %.9f s"
                 % (value_ns / 1e9, spread_ns / 1e9, distance_ns / 1e9))
    if settings.limit_ns and abs(value_ns) > settings.limit_ns and not settings.force:
        days = abs(value_ns) / DAY_NS
        away = "%.1f days" % days if days < 1000 else "%.1f years" % (days / 365.25)
        raise ValueError("this clock is %s %s; `clockctl set` sets it"
                         % (away, "behind" if value_ns > 0 else "ahead"))
    if settings.most_spread_ns is not None and spread_ns > settings.most_spread_ns and not settings.force:
        raise ValueError("time uncertainty too large, %.6f s" % (spread_ns / 1e9))
    return pack(value_ns, pack_quality(spread_ns, distance_ns))


def pack_quality(spread_ns, distance_ns):
    """What clockview's unpack_quality() reads, both rounded up; 0 for what it has no digits for."""
    exponent = len(str(spread_ns)) - 1
    digits = -(-spread_ns * 1000 // 10**exponent)
    if digits == 10**4:
        exponent, digits = exponent + 1, 1000
    steps = [step for step in range(100) if (round(10 ** (3 + step / 14)) if step else 0) >= distance_ns]
    if spread_ns < 1 or exponent > 9 or not steps:
        return 0
    last = exponent * 10**8 + digits * 10**4 + steps[0] * 100
    return last + (1 - last) % 97


def replace_file(path, data, mode=0o644):
    """Write a file whole; the temporary one is always new, so that no planted link is followed; OSError."""
    temporary = path + ".tmp"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def source_line(server, now_sec):
    words = [now_sec, KIND, "".join(server.name.split())] + 6 * ["-"]
    if server.range:
        answer = server.samples[-1].answer
        words[3:] = (sum(server.range) // 2, half_ns(server.range), server.delay_ns(),
                     answer.distance_ns, answer.stratum, answer.reference)
    failures = list(server.failures) or ["no majority of the servers agrees"]
    return " ".join(map(str, words + [server.verdict or "failed: " + failures[-1]])) + "\n"


def measure(servers, settings, make_query, decode, choose=middle_ns):
    """Ask, conclude, tell what failed and keep what each server said -> 16 bytes; ValueError."""
    end = ask(servers, settings, make_query, decode)
    try:
        return conclude(servers, settings, end, choose)
    finally:
        for server in servers:
            for why, times in server.failures.items():
                count = " (%d times)" % times if times > 1 else ""
                settings.warn("unable to ask %s: %s%s" % (server.name, why, count))
        if settings.folder is not None:
            path = os.path.join(settings.folder, "sources")
            try:
                text = "".join(source_line(server, end.clock_ns // 10**9) for server in servers)
                replace_file(path, text.encode(errors="replace"))
            except OSError as err:
                settings.warn("unable to write %s: %s" % (path, reason(err)))
# ==== end shared ====


# ==== shared by some: NTP packets ====
# flags (leap indicator, version, mode), stratum, poll, precision, root delay, root dispersion,
# reference id, and the stamps reference, originate, receive, transmit; fixed point, 16.16 and 32.32
NTP = struct.Struct(">BBbbII4sQQQQ")
ECHO = 24, 40, 8  # the answer's originate stamp is the query's transmit stamp
NTP_UNIX_SEC = (70 * 365 + 17) * 86400  # from 1900 to 1970
MOST_DISTANCE_NS = 1500 * 10**6  # NTP's own limit (MAXDIST): a server further off does not know the time
KISSES = {"RATE": True, "DENY": False, "RSTR": False}  # may what came before be used?


def make_query():
    """Client mode, version 4; the random transmit stamp says nothing of our clock and can't be guessed."""
    return NTP.pack(4 << 3 | 3, 0, 0, 0, 0, 0, bytes(4), 0, 0, 0, int.from_bytes(os.urandom(8), "big"))


def stamp_ns(stamp):
    """An NTP stamp -> its Unix time in ns, rounded down.  Its seconds wrap every 136 years; no answer is from
    before this program's release, whatever this clock says."""
    sec = RELEASE_SEC + ((stamp >> 32) - NTP_UNIX_SEC - RELEASE_SEC) % 2**32
    return sec * 10**9 + ((stamp & 0xffffffff) * 10**9 >> 32)


def answers(query, packet):
    """Does it repeat the cookie of that query?"""
    return len(packet) >= NTP.size and NTP.unpack_from(packet)[8] == NTP.unpack_from(query)[-1]


def decode_answer(packet, ahead_ns=0):
    """-> Answer; ValueError, Dismissed.  A right clock on our scale is ahead_ns ahead of Unix time."""
    flags, stratum, _, precision, delay, dispersion, reference, _, _, received, sent = NTP.unpack_from(packet)
    leap, version, mode = flags >> 6, flags >> 3 & 7, flags & 7
    if mode not in (2, 4) or version == 0:
        raise ValueError("answer of mode %d, version %d" % (mode, version))
    word = "".join(chr(byte) if 32 < byte < 127 else "?" for byte in reference.rstrip(b"\0"))
    if stratum == 0 and word in KISSES:
        raise Dismissed("kiss-o'-death " + word, KISSES[word])
    if stratum == 0 and word:
        raise ValueError("stratum 0, %s" % word)
    if leap == 3 or not 1 <= stratum <= 15:
        raise ValueError("the server is not synchronised")
    if not received or not sent:
        raise ValueError("answer without time")
    distance_ns = (delay // 2 + dispersion) * 10**9 >> 16
    if distance_ns > MOST_DISTANCE_NS:
        raise ValueError("the server is up to %.1f s off" % (distance_ns / 1e9))
    if precision > 0:
        raise ValueError("the server's clock is precise to %d s only" % 2**precision)
    # A server randomises the bits below its precision, so that each stamp is off by up to that.
    coarse_ns = (10**9 >> -precision) + 1
    received_ns, sent_ns = stamp_ns(received), stamp_ns(sent)
    if sent_ns < received_ns - coarse_ns:
        raise ValueError("answer sent before the query came")
    return Answer(received_ns + ahead_ns + coarse_ns, sent_ns + ahead_ns - coarse_ns, distance_ns, stratum,
                  reference.hex())
# ==== end shared ====


MAC_BYTES = 20  # of a digest: NTPv4 cuts longer ones, which could be taken for extension fields
KEY_TYPES = ("MD5", "SHA1", "SHA256", "SHA384", "SHA512")
LEAST_KEY_BYTES = 16

Key = collections.namedtuple("Key", "ident kind secret")


def parse_key(text, ident):
    """-> the Key of that number in the text of chrony's key file; ValueError."""
    words = next((line.split() for line in text.splitlines() if line.split()[:1] == [str(ident)]), None)
    if words is None:
        raise ValueError("it is not there")
    if len(words) != 3 or words[1] not in KEY_TYPES:
        raise ValueError("its line is not the number, %s, and the key" % " or ".join(KEY_TYPES))
    form, colon, digits = words[2].partition(":")
    if colon and form == "HEX":
        secret = bytes.fromhex(digits)
    else:
        secret = (digits if colon and form == "ASCII" else words[2]).encode("latin-1")
    if len(secret) < LEAST_KEY_BYTES:
        raise ValueError("it has %d bytes, and %d are the least" % (len(secret), LEAST_KEY_BYTES))
    return Key(ident, words[1], secret)


def read_key(path, ident):
    """-> the Key of that number in chrony's key file; OSError, ValueError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if os.fstat(file.fileno()).st_mode & 0o007:
            raise ValueError("others can read or write it")
        return parse_key(file.read(10**6).decode("latin-1"), ident)


def mac(key, message):
    """NTP's: the number of the key and the hash of key and message; ValueError where policy forbids MD5."""
    import hashlib  # here, since few need it
    return struct.pack(">I", key.ident) + hashlib.new(key.kind, key.secret + message).digest()[:MAC_BYTES]


def is_authentic(packet, key):
    import hmac
    return hmac.compare_digest(packet[NTP.size:], mac(key, packet[:NTP.size]))


def main(argv):
    try:
        doing = "write output"
        if begin(argv):
            return 0
        settings = Settings(argv[1:], 123, "k:K:")
        ident = settings.letters.get("-K", "")
        if ("-k" in settings.letters) is not (ident.isdecimal() and 0 < int(ident) < 2**32):
            raise getopt.GetoptError("")
        if os.isatty(1):
            complain("usage", "the result is 16 raw bytes: " + USAGE)
            return 100
        doing = "tell this clock's scale"
        ahead_ns = (TAI_MINUS_UTC_SEC - scale_offset_sec()) * 10**9
        key = None
        if ident:
            doing = "take key %s from %s" % (ident, settings.letters["-k"])
            key = read_key(settings.letters["-k"], int(ident))
            mac(key, b"")

        def signed_query(server):
            query = make_query()
            return query + mac(key, query) if key else query

        def decode(server, query, packet):
            if not answers(query, packet):
                return None
            if key and not is_authentic(packet, key):
                raise ValueError("answer not authenticated with the key")
            return decode_answer(packet, ahead_ns)
        doing = "find " + ", ".join(settings.hosts)
        servers = find_servers(settings.hosts, settings.port, settings)
        doing = "get the time from " + ", ".join(settings.hosts)
        packet = measure(servers, settings, signed_query, decode)
        doing = "write output"
        emit(packet)
    except getopt.GetoptError:
        complain("usage", USAGE)
        return 100
    except (OSError, OverflowError, RuntimeError, ValueError, struct.error) as err:
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
