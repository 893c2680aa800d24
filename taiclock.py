#!/usr/bin/env python3
"""taiclock - ask TAICLOCK servers how far the system clock is off

SYNOPSIS
    taiclock [options] host... | clockview
    taiclock [options] host... > /usr/local/clockspeed/adjust

DESCRIPTION
    Asks each host, where taiclockd runs, and writes one adjustment to standard output: real
    time minus system clock, 16 bytes of TAI64NA.  Sets nothing, needs no privilege.

    Hosts, exchanges, ranges and votes are as of sntpclock, but TAICLOCK tells no root
    distance.  The result is the middle by this program's own readings of the clock: they are
    late by about as much as those of the server.

    TAICLOCK has no authentication: ask servers on networks that you trust.

OPTIONS
    As of sntpclock:
    -r n     exchanges with each server       -e ms    largest spread accepted
    -h ms    pause between them               -l days  largest offset accepted
    -t ms    longest wait for each answer     -f       output even if that is exceeded
    -T ms    longest wait for everything      -v n     0 to 2: say less or more
    -s dir   write to dir/sources             -p port  (4014)
    -4, -6   use IPv4 only, IPv6 only

OUTPUT
    As of sntpclock, with the root distance 00.  The spread is how far real time can be from
    the result.

FILES
    dir/sources  of -s: see sntpclock; the kind is `tai`

ENVIRONMENT
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones);
                 without it the time zone tells

EXIT STATUS
    0 measured; 100 wrong usage; 111 no usable answer, refused, or a system error

SEE ALSO
    taiclockd, sntpclock, clockview, clockadd, clockspeed, clockctl
"""
import _signal as signal  # which is there at once: Ctrl-C ends this program as it ends one in C,
signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback, even while the rest is imported
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

PROGRAM = "taiclock"
USAGE = "taiclock [-46f] [-r exchanges] [-h ms] [-t ms] [-T ms] [-e ms] [-l days] [-p port] [-v n] " \
        "[-s dir] host... | clockview"
KIND = "tai"  # in dir/sources
ECHO = 20, 20  # the cookie, most of it
SERVER_WAKES = True  # a server stamps its answer some microseconds after the query came, when it got to run


# ==== shared by all: messages ====
RELEASE, RELEASE_SEC = "2026.11", 1793491200  # 2026-11-01 00:00:00 UTC: real time is never before it


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
    while os.open(os.devnull, os.O_RDONLY) < 3:  # lest a file be taken for stdout; writing there still fails
        pass
    manual = __doc__ or USAGE + "\n"  # python3 -OO has no docstrings
    answers = {"-h": manual, "--help": manual, "--version": "%s %s\n" % (PROGRAM, RELEASE)}
    answer = answers.get(" ".join(argv[1:]), "")
    emit(answer.encode())
    return bool(answer)
# ==== end shared ====


# ==== shared by some: TAI64NA ====
# Signed seconds; nanoseconds counted upwards; attoseconds, or in an adjustment what the mark says of itself.
TAI64NA = struct.Struct(">qII")


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
TAI_MINUS_CLOCK_SEC = {"utc": 37, "tai": 10}  # since 2017; there are no leap seconds any more


def clock_scale():
    """utc or tai, by CLOCK_SCALE, or by the zone: a right/ one has 23:59:60 in June 1972; ValueError."""
    scale = os.environ.get("CLOCK_SCALE") or ("tai" if time.localtime(78796800).tm_sec == 60 else "utc")
    if scale not in TAI_MINUS_CLOCK_SEC:
        raise ValueError("CLOCK_SCALE is neither utc nor tai")
    return scale
# ==== end shared ====


# ==== shared by some: the exchange ====
# A query leaves at t0 and its answer comes at t1 by the system clock; between them the server's clock showed
# T2 <= T3.  That proves T3 - t1 <= offset <= T2 - t0, and the offset is real time minus system clock.
#
# A script sets KIND, SERVER_WAKES, and ECHO: where an answer has 8 bytes that it repeats, and where the query
# has them.  It gives measure() two functions: make_query(server) -> bytes, and
# decode(server, query, packet) -> Answer, or None when that does not answer the query; ValueError, Dismissed.
COUNTER = getattr(time, "CLOCK_MONOTONIC_RAW", time.CLOCK_MONOTONIC)  # the former is never slewed nor set
COUNTER_PPM = 500  # no counter is further off, since no kernel's clock could make up for it
STEERED_PPM = 250  # a clock that runs away from the counter faster is slewed, which kernels do by 500 or more
READING_NS = 1000  # clock and counter are read this close to each other, unless the scheduler comes between
MOST_ADDRESSES = 4  # of one name: the least with which three outvote one
DAY_NS = 86400 * 10**9
NO_MAJORITY = "no majority of the servers agrees"
# Linux's, for which Python's socket module has no names:
SO_TIMESTAMPNS = 35  # stamp what arrives
SO_ATTACH_FILTER = 26
TIMESPEC = struct.Struct("@ll")
FILTER_STEP = struct.Struct("=HBBI")  # code, steps to skip if so and if not, number
LOAD_WORD, JUMP_IF_EQUAL, PASS_BYTES = 0x20, 0x15, 0x06
UDP_HEADER_BYTES = 8

# T2 rounded up and T3 rounded down, as a right clock on our scale shows them, and what else the server said.
Answer = collections.namedtuple("Answer", "received_ns sent_ns distance_ns stratum reference")
Reading = collections.namedtuple("Reading", "clock_ns tick_ns")  # system clock and counter at one moment
# Readings before the query was sent, when the answer came, and when this program was told of it.
Sample = collections.namedtuple("Sample", "answer sent came woke")
Range = collections.namedtuple("Range", "least_ns most_ns")  # of the offset
# What all samples of a server prove together, as in dir/sources.
Result = collections.namedtuple("Result", "offset_ns spread_ns delay_ns distance_ns stratum reference")


class Dismissed(Exception):
    """(words, may its earlier answers be used): the server does not want to be asked."""


class Settings:
    """The command line; getopt.GetoptError when it is wrong."""

    def __init__(self, words, port, more_letters=""):
        options, self.hosts = getopt.getopt(words, "fe:h:l:p:r:s:t:T:v:" + more_letters)
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
        self.force, self.folder = "-f" in letters, letters.get("-s")
        self.end_ns = time.monotonic_ns() + self.total_ns

    def tell(self, verbosity, text):
        if self.verbosity >= verbosity:
            complain("info" if verbosity == 2 else "warning", text)


class Server:
    """One address, or None when its name was not found; the exchanges with it and what became of them."""

    def __init__(self, name, address=None):
        self.name, self.address = name, address
        self.samples, self.failures = [], collections.Counter()
        self.result = self.verdict = None  # a Result; "agreed" or "falseticker"


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


def look_up(host, port, family=socket.AF_UNSPEC):
    """-> the socket addresses of that name; OSError."""
    # In bytes, since for a str Python loads its megabyte of international names.
    found = socket.getaddrinfo(os.fsencode(host), port, family, socket.SOCK_DGRAM)
    return [address for _, _, _, _, address in found[:MOST_ADDRESSES]]


def numeric_name(address):
    return socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


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


def arrival(ancillary, sent, woke):
    """-> Reading when the kernel got a packet, by what recvmsg() told beside it.  A stamp that is not between
    our Readings, as after a step of the clock, tells nothing; then it is `woke`."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            sec, nano = TIMESPEC.unpack_from(data)
            late_ns = woke.clock_ns - sec * 10**9 - nano
            if 0 <= late_ns <= min(woke.clock_ns - sent.clock_ns, woke.tick_ns - sent.tick_ns):
                return Reading(woke.clock_ns - late_ns, woke.tick_ns - late_ns)
    return woke


def admit_only_answers(sock, query):
    """Have Linux drop what does not repeat 8 bytes of the query's cookie, so that a flood of forged answers
    can't fill the socket's queue."""
    answer_at, query_at = ECHO
    steps = []
    for at in (0, 4):  # go on if the word is right, else drop the packet
        word, = struct.unpack_from(">I", query, query_at + at)
        steps += [(LOAD_WORD, 0, 0, UDP_HEADER_BYTES + answer_at + at), (JUMP_IF_EQUAL, 1, 0, word),
                  (PASS_BYTES, 0, 0, 0)]
    steps.append((PASS_BYTES, 0, 0, 0xffff))
    program = array.array("B", b"".join(FILTER_STEP.pack(*step) for step in steps))
    with contextlib.suppress(OSError):  # not Linux: decode() tells them apart
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER,
                        struct.pack("@HP", len(steps), program.buffer_info()[0]))


def exchange(sock, server, query, decode, end_ns):
    """Send the query and wait for its answer -> Sample; OSError, ValueError, Dismissed."""
    admit_only_answers(sock, query)
    sent = read_clocks()
    sock.send(query)
    while True:
        left_ns = end_ns - time.monotonic_ns()
        if left_ns <= 0 or not select.select([sock], [], [], left_ns / 1e9)[0]:
            raise TimeoutError("timed out")
        woke = read_clocks()
        packet, ancillary, _, _ = sock.recvmsg(2048, 512)
        answer = decode(server, query, packet)
        if answer:  # else it is late, doubled or forged, and the right one may yet come
            came = arrival(ancillary, sent, woke)
            if answer.sent_ns - answer.received_ns > came.tick_ns - sent.tick_ns:
                raise ValueError("it says that its answer took longer than we waited for it")
            return Sample(answer, sent, came, woke)


def ask(server, settings, make_query, decode):
    """All exchanges with a server; OSError where it can't be reached."""
    near = is_near(server.address[0])
    pause_ns = (0 if near else 2 * 10**9) if settings.pause_ns is None else settings.pause_ns
    family = socket.AF_INET6 if ":" in server.address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # not Linux: our own readings do
            sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        sock.connect(server.address)  # from now on the kernel drops what other addresses send
        for left in reversed(range(settings.exchanges or (10 if near else 4))):
            end_ns = min(time.monotonic_ns() + settings.wait_ns, settings.end_ns)
            try:
                server.samples.append(exchange(sock, server, make_query(server), decode, end_ns))
            except Dismissed as err:
                words, usable = err.args
                server.failures[words] += 1
                server.samples = server.samples if usable else []
                break
            except (OSError, ValueError) as err:
                server.failures[reason(err)] += 1
            if not left or time.monotonic_ns() + pause_ns >= settings.end_ns:
                break
            time.sleep(pause_ns / 1e9)


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


def sample_range(sample, end):
    """-> the Range that an exchange proves for the Reading `end`."""
    return Range(sample.answer.sent_ns - sample.came.clock_ns + gained(sample.came, end)[0],
                 sample.answer.received_ns - sample.sent.clock_ns + gained(sample.sent, end)[1])


def vote(ranges):
    """Ranges -> (Range from the first to the last point that is in the most of them, in how many); the
    algorithm is Marzullo's."""
    def votes(point):
        return sum(lo <= point <= hi for lo, hi in ranges)
    most_votes = max(votes(lo) for lo, _ in ranges)
    return Range(min(lo for lo, _ in ranges if votes(lo) == most_votes),
                 max(hi for _, hi in ranges if votes(hi) == most_votes)), most_votes


def weigh(samples, end):
    """-> the Result of a server's samples.  Where they contradict each other, the most of them count."""
    (least_ns, most_ns), _ = vote([sample_range(sample, end) for sample in samples])
    if SERVER_WAKES:  # it stamps a query late, when it has woken up; counting our waking up too balances that
        least_ns -= min(sample.woke.clock_ns - sample.came.clock_ns for sample in samples)
    delay_ns = min(sample.came.clock_ns - sample.sent.clock_ns
                   - (sample.answer.sent_ns - sample.answer.received_ns) for sample in samples)
    answer = samples[-1].answer
    return Result((least_ns + most_ns) // 2, (most_ns - least_ns + 1) // 2, delay_ns,
                  answer.distance_ns, answer.stratum, answer.reference)


def troubles(servers):
    """What failed with each of them, and how often."""
    return ["%s: %s%s" % (server.name, why, " (%d times)" % times if times > 1 else "")
            for server in servers for why, times in server.failures.items()]


def conclude(servers, settings):
    """What the servers prove together -> the 16 bytes of an adjustment; ValueError when that is not enough.
    Sets their verdicts."""
    voters = [server for server in servers if server.result]
    if not voters:
        raise ValueError("no usable answer; " + "; ".join(troubles(servers)))
    # Each range is widened by how far the server may be off true time.
    ranges = [Range(server.result.offset_ns - server.result.spread_ns - server.result.distance_ns,
                    server.result.offset_ns + server.result.spread_ns + server.result.distance_ns)
              for server in voters]
    proven, votes = vote(ranges)
    if 2 * votes <= len(voters):
        raise ValueError(NO_MAJORITY)
    for server, (least_ns, most_ns) in zip(voters, ranges):
        agrees = least_ns <= proven.most_ns and proven.least_ns <= most_ns
        server.verdict = "agreed" if agrees else "falseticker"
    value_ns = sum(proven) // 2
    distance_ns = min(server.result.distance_ns for server in voters if server.verdict == "agreed")
    spread_ns = max(proven.most_ns - value_ns - distance_ns, 1)
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


def report(servers, settings, now_sec):
    """Tell what failed or does not agree, and write what each server said to dir/sources."""
    lines = []
    for server in servers:
        verdict = server.verdict or "failed: " + (list(server.failures) or [NO_MAJORITY])[-1]
        if server.result:
            said = "offset %+d ns, spread %d ns, delay %d ns, root distance %d ns, stratum %s, reference %s"
            settings.tell(1 if verdict == "falseticker" else 2,
                          "%s, %s: %s" % (server.name, verdict, said % server.result))
        words = [now_sec, KIND, "".join(server.name.split()), *(server.result or 6 * "-"), verdict]
        lines.append(" ".join(map(str, words)) + "\n")
    if any(server.result for server in servers):  # else the fatal error tells it
        for trouble in troubles(servers):
            settings.tell(1, "unable to ask " + trouble)
    if settings.folder is not None:
        path = os.path.join(settings.folder, "sources")
        try:
            replace_file(path, "".join(lines).encode(errors="replace"))
        except OSError as err:
            settings.tell(1, "unable to write %s: %s" % (path, reason(err)))


def measure(servers, settings, make_query, decode):
    """Ask all servers at once, conclude, and report -> 16 bytes of an adjustment; ValueError."""
    found = [server for server in servers if server.address]
    asked = in_parallel(lambda server: ask(server, settings, make_query, decode), found,
                        settings.end_ns + DAY_NS)  # it ends by itself
    end = read_clocks()
    for server, err in zip(found, asked):
        if err:
            server.failures[reason(err)] += 1
        if server.samples:
            server.result = weigh(server.samples, end)
    try:
        return conclude(servers, settings)
    finally:
        report(servers, settings, end.clock_ns // 10**9)
# ==== end shared ====


# ==== shared by some: servers by name ====
def find_servers(settings):
    """The Servers that the command line names."""
    servers, letters = [], settings.letters
    family = (socket.AF_INET if "-4" in letters else socket.AF_INET6 if "-6" in letters
              else socket.AF_UNSPEC)

    def find(host):
        return look_up(host, settings.port, family)
    for_others_ns = min(settings.wait_ns, settings.total_ns // 2)  # when the name of one is never found
    for host, found in zip(settings.hosts,
                           in_parallel(find, settings.hosts, settings.end_ns - for_others_ns)):
        if isinstance(found, Exception):
            servers.append(Server(host))
            servers[-1].failures[reason(found)] = 1
            continue
        for address in found:
            if address not in [server.address for server in servers]:
                numeric = numeric_name(address)
                servers.append(Server(numeric if host == numeric else host + "/" + numeric, address))
    return servers
# ==== end shared ====


LABEL_ZERO_NS = 2**62 * 10**9  # the label of 1970-01-01 00:00:00 TAI


def make_query(server):
    """32 bytes: `ctai`, zeros where the label will be, of which s6-taiclockd writes but 12, and a cookie that
    can't be guessed."""
    return b"ctai" + bytes(16) + os.urandom(12)


def decode_answer(query, packet, tai_minus_clock_ns):
    """-> Answer, None when that is no answer to the query, ValueError when its label is none."""
    if len(packet) != len(query) or packet[:4] != b"stai" or packet[20:] != query[20:]:
        return None
    label_ns, atto = unpack(packet[4:20])
    if label_ns < 0:
        raise ValueError("not a TAI64NA label")
    server_ns = label_ns - LABEL_ZERO_NS - tai_minus_clock_ns
    return Answer(server_ns + (atto > 0), server_ns, 0, "-", "-")


def main(argv):
    try:
        doing = "write output"
        if begin(argv):
            return 0
        settings = Settings(argv[1:], 4014, "46")
        if os.isatty(1):
            complain("usage", "the result is 16 raw bytes: " + USAGE)
            return 100
        doing = "tell this clock's scale"
        tai_minus_clock_ns = TAI_MINUS_CLOCK_SEC[clock_scale()] * 10**9

        def decode(server, query, packet):
            return decode_answer(query, packet, tai_minus_clock_ns)
        doing = "get the time from " + ", ".join(settings.hosts)
        packet = measure(find_servers(settings), settings, make_query, decode)
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
