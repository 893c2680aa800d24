#!/usr/bin/env python3
"""ntsclock - ask NTS servers how far the system clock is off

SYNOPSIS
    ntsclock [options] host... | clockview
    ntsclock -s /usr/local/clockspeed/mark host... > /usr/local/clockspeed/adjust

DESCRIPTION
    Asks each host by NTP with Network Time Security, RFC 8915, and writes one adjustment to
    standard output: real time minus system clock, 16 bytes of TAI64NA.  Sets nothing, needs
    no privilege.  Hosts, exchanges, ranges and votes are as of sntpclock.

    The host proves by its certificate who it is, over TLS 1.3, and gives keys and eight
    cookies for its NTP server.  Each NTP query takes one of the cookies, the answer brings
    a new one.  Only authentic answers count: on the way they can be delayed or lost, but not
    forged.  The keys are used up to 28 days; a server that does not know them any more gives
    new ones, once in a run.

    The certificate has to be valid at the time that was measured, not by the system clock.
    Python before 3.10 shows only the host's certificate for that, not the authorities'.

    AES is computed in plain Python, by tables.  Who runs programs on this machine could find
    out the keys by timing its cache, and then forge the time as if there were no NTS.  No
    other secret is encrypted with them.

OPTIONS
    As of sntpclock:
    -r n     exchanges with each server       -e ms    largest spread accepted
    -h ms    pause between them               -l days  largest offset accepted
    -t ms    longest wait for each answer     -f       output even if that is exceeded
    -v n     0 to 2: say less or more
    Otherwise:
    -T ms    longest wait for everything, names and keys included (10000); for keys it is
             half of that, and 5000 at most
    -p port  of key establishment (4460)
    -c file  certificates of the authorities to trust instead of the system's
    -s dir   keep keys and cookies in dir/nts, so that the next run need not ask for new
             ones, and write to dir/sources what each server said

OUTPUT
    As of sntpclock: the last four bytes tell spread and root distance.

FILES
    dir/nts      of -s, mode 0600: a line for each host and port, with the address and port
                 of its NTP server, from and to which Unix second its keys are to be used,
                 two keys and the cookies.  A run takes it away and writes it again at its
                 end, so that no cookie is sent twice.  Who does not own dir leaves it alone.
                 Remove it to have new keys, as when authorities are no longer trusted
    dir/sources  of -s: see sntpclock; the kind is `nts`

ENVIRONMENT
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones);
                 without it the time zone tells
    SSL_CERT_FILE, SSL_CERT_DIR
                 the authorities, instead of the system's

EXIT STATUS
    0 measured; 100 wrong usage; 111 no usable answer, refused, or a system error

SEE ALSO
    sntpclock, taiclock, clockview, clockadd, clockspeed, clockctl
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
import stat
import struct
import sys
import threading
import time

PROGRAM = "ntsclock"
USAGE = "ntsclock [-f] [-r exchanges] [-h ms] [-t ms] [-T ms] [-e ms] [-l days] [-p port] [-v n] " \
        "[-c file] [-s dir] host... | clockview"
KIND = "nts"  # in dir/sources
SERVER_WAKES = False  # servers have the kernel's stamps of queries too


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


# ==== shared by some: NTP packets ====
# flags (leap indicator, version, mode), stratum, poll, precision, root delay, root dispersion,
# reference id, and the stamps reference, originate, receive, transmit; fixed point, 16.16 and 32.32
NTP = struct.Struct(">BBbbII4sQQQQ")
NTP_UNIX_SEC = (70 * 365 + 17) * 86400  # from 1900 to 1970
MOST_DISTANCE_NS = 1500 * 10**6  # NTP's own limit (MAXDIST): a server further off does not know the time
ECHO = 24, 40  # the answer's originate stamp is the query's transmit stamp
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


def decode_answer(packet, ahead_ns):
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


# Key establishment, RFC 8915 section 4: records of a type, a length and a body.
KE_PORT, NTP_PORT = 4460, 123
PROTOCOL = "ntske/1"
KE_NS, KE_BYTES = 5 * 10**9, 65536  # for each host, with names and connections; a true answer has 1000 bytes
RECORD, CRITICAL = struct.Struct(">HH"), 0x8000
END, NEXT_PROTOCOL, ERROR, WARNING, ALGORITHM, NEW_COOKIE, SERVER, PORT = range(8)
NTPV4, AES_SIV_CMAC_256 = 0, 15
KE_ERRORS = {0: "it does not know a critical record", 1: "bad request", 2: "internal error"}
NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which ssl has no name
KEY_BYTES, IDENTIFIER_BYTES, NONCE_BYTES = 32, 32, 16
RENEW_SEC = 28 * 86400  # so that a host whose certificate was revoked is not trusted much longer

# Extension fields of NTP packets, RFC 8915 section 5: a type, a length that counts these too, and a body.
FIELD = struct.Struct(">HH")
IDENTIFIER, COOKIE, PLACEHOLDER, AUTHENTICATOR = 0x0104, 0x0204, 0x0304, 0x0404
COOKIES = 8  # as the RFC proposes: a server is not left without one until eight packets in a row are lost
COOKIE_BYTES = 1024  # real ones have about a hundred
QUERY_BYTES = 1232  # fits the least packet that IPv6 carries without fragments
STORE_BYTES = 65536


# AES-128 of FIPS 197, and on it CMAC of RFC 4493 and SIV of RFC 5297.  A block of 16 bytes is an integer.
WORDS = struct.Struct(">4I")
BLOCK_ONES = 2**128 - 1
CARRIES = 2**128 - 1 - 2**63 - 2**31  # RFC 5297 clears these two bits of the counter


class Aes:
    """AES-128, to encrypt only, by tables that join the substitution and the mixing of columns."""
    box = tables = None

    def __init__(self, key):
        if Aes.tables is None:
            self.make_tables()
        words, constant = list(WORDS.unpack(key)), 1
        for i in range(4, 44):
            word = words[-1]
            if i % 4 == 0:
                rotated = (word << 8 | word >> 24) & 0xffffffff
                word = int.from_bytes(rotated.to_bytes(4, "big").translate(Aes.box), "big") ^ constant << 24
                constant = self.double(constant)
            words.append(words[-4] ^ word)
        self.words = words

    @staticmethod
    def double(x):
        """Twice a byte in the field of 2^8."""
        return x << 1 ^ 0x11b if x & 0x80 else x << 1

    @classmethod
    def make_tables(cls):
        powers = [1]  # of 3, which generates the field
        for _ in range(254):
            powers.append(powers[-1] ^ cls.double(powers[-1]))
        inverse = dict(zip(powers, [1] + powers[:0:-1]))
        twice = [inverse.get(x, 0) * 0x101 for x in range(256)]  # so that a shift rotates the byte
        cls.box = bytes((y >> 8 ^ y >> 7 ^ y >> 6 ^ y >> 5 ^ y >> 4) & 255 ^ 0x63 for y in twice)
        cls.tables = [], [], [], []
        for s in cls.box:
            word = cls.double(s) << 24 | s << 16 | s << 8 | cls.double(s) ^ s
            for table in cls.tables:
                table.append(word)
                word = word >> 8 | word << 24 & 0xffffffff

    def encrypt(self, block):
        k, (t0, t1, t2, t3) = self.words, self.tables
        a, b = block >> 96 ^ k[0], block >> 64 & 0xffffffff ^ k[1]
        c, d = block >> 32 & 0xffffffff ^ k[2], block & 0xffffffff ^ k[3]
        for i in range(4, 40, 4):
            a, b, c, d = (t0[a >> 24] ^ t1[b >> 16 & 255] ^ t2[c >> 8 & 255] ^ t3[d & 255] ^ k[i],
                          t0[b >> 24] ^ t1[c >> 16 & 255] ^ t2[d >> 8 & 255] ^ t3[a & 255] ^ k[i + 1],
                          t0[c >> 24] ^ t1[d >> 16 & 255] ^ t2[a >> 8 & 255] ^ t3[b & 255] ^ k[i + 2],
                          t0[d >> 24] ^ t1[a >> 16 & 255] ^ t2[b >> 8 & 255] ^ t3[c & 255] ^ k[i + 3])
        rows = (a << 96 | b << 64 | c << 32 | d).to_bytes(16, "big")
        last = (rows * 5)[::5].translate(self.box)  # every fifth byte, going round: the shift of the rows
        return int.from_bytes(last, "big") ^ (k[40] << 96 | k[41] << 64 | k[42] << 32 | k[43])


def doubled(block):
    """Twice a block in the field of 2^128."""
    return block << 1 & BLOCK_ONES ^ (0x87 if block >> 127 else 0)


def cmac(aes, message):
    subkey = doubled(aes.encrypt(0))
    rest = len(message) % 16 or min(len(message), 16)
    state = 0
    for at in range(0, len(message) - rest, 16):
        state = aes.encrypt(state ^ int.from_bytes(message[at:at + 16], "big"))
    last = message[len(message) - rest:]
    if rest < 16:
        last, subkey = padded(last), doubled(subkey)
    return aes.encrypt(state ^ int.from_bytes(last, "big") ^ subkey)


def padded(part):
    """A block that is not whole, with a bit of 1 and zeros after it."""
    return (part + b"\x80").ljust(16, b"\0")


class Siv:
    """AEAD_AES_SIV_CMAC_256: one key authenticates and another one encrypts, each of 128 bits."""

    def __init__(self, key):
        self.mac, self.cipher = Aes(key[:16]), Aes(key[16:])

    def tag(self, associated, plain):
        """RFC 5297's S2V -> block."""
        state = cmac(self.mac, bytes(16))
        for part in associated:
            state = doubled(state) ^ cmac(self.mac, part)
        if len(plain) < 16:
            plain, state = padded(plain), doubled(state)
        end = int.from_bytes(plain[-16:], "big") ^ state
        return cmac(self.mac, plain[:-16] + end.to_bytes(16, "big"))

    def cover(self, tag, data):
        """Encrypt or decrypt: add the key stream that the tag begins."""
        count = -(-len(data) // 16)
        stream = b"".join(self.cipher.encrypt((tag & CARRIES) + i & BLOCK_ONES).to_bytes(16, "big")
                          for i in range(count))
        return bytes(x ^ y for x, y in zip(data, stream))

    def seal(self, associated, plain):
        tag = self.tag(associated, plain)
        return tag.to_bytes(16, "big") + self.cover(tag, plain)

    def open(self, associated, sealed):
        """-> what was sealed; ValueError when it is not authentic.  A forger learns nothing from the time
        that the comparison takes, as nobody is told how it ended."""
        tag = int.from_bytes(sealed[:16], "big")
        plain = self.cover(tag, sealed[16:])
        if len(sealed) < 16 or self.tag(associated, plain) != tag:
            raise ValueError("not authentic")
        return plain


def export_keys(secret):
    """The exporter secret of a TLS session -> keys for queries and for answers (RFC 8446, 7.5)."""
    import hashlib
    import hmac
    kind = {32: "sha256", 48: "sha384"}[len(secret)]  # it is as long as a digest of the session's hash

    def expand(secret, label, content, size):
        label, digest = b"tls13 " + label, hashlib.new(kind, content).digest()
        info = struct.pack(">HB", size, len(label)) + label + bytes([len(digest)]) + digest
        return hmac.new(secret, info + b"\1", kind).digest()[:size]
    master = expand(secret, b"EXPORTER-network-time-security", b"", len(secret))
    return [expand(master, b"exporter", struct.pack(">HHB", NTPV4, AES_SIV_CMAC_256, direction), KEY_BYTES)
            for direction in (0, 1)]


Grant = collections.namedtuple("Grant", "server port cookies")  # server None: the host that was asked


def record(kind, number):
    return RECORD.pack(CRITICAL | kind, 2) + struct.pack(">H", number)


KE_QUERY = record(NEXT_PROTOCOL, NTPV4) + record(ALGORITHM, AES_SIV_CMAC_256) + RECORD.pack(CRITICAL | END, 0)


def read_whole(file, size):
    data = file.read(size)
    if len(data) < size:
        raise ValueError("its answer is cut short")
    return data


def read_grant(file):
    """What a host says in key establishment -> Grant; OSError, ValueError."""
    found, cookies, left = {}, [], KE_BYTES
    while True:
        head, size = RECORD.unpack(read_whole(file, RECORD.size))
        kind, body, left = head & ~CRITICAL, read_whole(file, size), left - RECORD.size - size
        if left < 0:
            raise ValueError("its answer never ends")
        number = int.from_bytes(body[:2], "big")
        if kind == END:
            break
        if kind == ERROR:
            raise ValueError("it says: %s" % KE_ERRORS.get(number, "error %d" % number))
        if kind == WARNING:  # none is defined so far, and one that is not known is an error
            raise ValueError("it says: warning %d" % number)
        if kind == NEW_COOKIE:
            cookies.append(body)
        elif kind in found:
            raise ValueError("it sent record %d twice" % kind)
        elif kind in (NEXT_PROTOCOL, ALGORITHM, SERVER, PORT):
            found[kind] = body
        elif head & CRITICAL:
            raise ValueError("it sent an unknown critical record, %d" % kind)
    if found.get(NEXT_PROTOCOL) != struct.pack(">H", NTPV4):
        raise ValueError("it does not offer NTPv4")
    if found.get(ALGORITHM) != struct.pack(">H", AES_SIV_CMAC_256):
        raise ValueError("it does not offer AEAD_AES_SIV_CMAC_256")
    port = found.get(PORT, struct.pack(">H", NTP_PORT))
    server = found.get(SERVER, b"").decode("ascii")
    if len(port) != 2 or port == b"\0\0" or not all(char.isalnum() or char in "-.:_" for char in server):
        raise ValueError("it sent the name or port of no server")
    cookies = [cookie for cookie in cookies if is_cookie(cookie)]
    if not cookies:
        raise ValueError("it sent no cookie")
    return Grant(server or None, int.from_bytes(port, "big"), cookies[:COOKIES])


def is_cookie(cookie):
    """Can it be sent?  The length of a field is a multiple of four."""
    return 0 < len(cookie) <= COOKIE_BYTES and len(cookie) % 4 == 0


def field(kind, body):
    return FIELD.pack(kind, FIELD.size + len(body)) + body


def split_fields(data, start=0):
    """-> [(kind, start, body)] of extension fields; ValueError."""
    found = []
    while start < len(data):
        kind, size = FIELD.unpack(data[start:start + FIELD.size].ljust(FIELD.size, b"\0"))
        if size < FIELD.size or size % 4 or start + size > len(data):
            raise ValueError("damaged extension fields")
        found.append((kind, start, data[start + FIELD.size:start + size]))
        start += size
    return found


def seal_query(siv, header, identifier, cookie, wanted, nonce):
    """An NTP query that proves who sent it, and asks for so many cookies beside the one for its own."""
    query = header + field(IDENTIFIER, identifier) + field(COOKIE, cookie)
    placeholder = field(PLACEHOLDER, bytes(len(cookie)))
    room = QUERY_BYTES - len(query) - len(field(AUTHENTICATOR, bytes(4 + NONCE_BYTES + 16)))
    query += placeholder * max(min(wanted, room // len(placeholder)), 0)
    sealed = siv.seal([query, nonce], b"")
    return query + field(AUTHENTICATOR, struct.pack(">HH", len(nonce), len(sealed)) + nonce + sealed)


def identifier_of(packet):
    """-> the unique identifier of a query or answer; ValueError when it has none, or several."""
    identifier, = [body for kind, _, body in split_fields(packet, NTP.size) if kind == IDENTIFIER]
    return identifier


def open_answer(siv, packet):
    """-> the cookies in an authentic answer; ValueError for what is not authentic to its end."""
    fields = split_fields(packet, NTP.size)
    kind, start, body = fields[-1] if fields else (None, 0, b"")
    if kind != AUTHENTICATOR or len(body) < 4:
        raise ValueError("no authenticator at its end")
    nonce_size, sealed_size = struct.unpack_from(">HH", body)
    sealed_at = 4 + -(-nonce_size // 4) * 4
    if sealed_at + sealed_size > len(body):
        raise ValueError("damaged authenticator")
    plain = siv.open([packet[:start], body[4:4 + nonce_size]], body[sealed_at:sealed_at + sealed_size])
    return [cookie for kind, _, cookie in split_fields(plain) if kind == COOKIE and is_cookie(cookie)]


def is_nak(packet):
    """Does it say that the server does not know our keys?  Nobody proves that it does."""
    return packet[1] == 0 and packet[12:16] == b"NTSN"


# What a host granted.  Its keys are for queries and for answers; they may be used when the host's time is
# between since and until; address and ntp_port are where they are known.
Keys = collections.namedtuple("Keys", "host port address ntp_port since_sec until_sec query_key answer_key "
                              "cookies")


def format_keys(keys):
    """Keys -> a line of dir/nts."""
    words = [str(word) for word in keys[:6]] + [key.hex() for key in keys[6:8]]
    return " ".join(words + [cookie.hex() for cookie in keys.cookies]) + "\n"


def parse_keys(line):
    """A line of dir/nts -> Keys; ValueError."""
    host, port, address, ntp_port, since_sec, until_sec, *secrets = line.split()
    query_key, answer_key, *cookies = [bytes.fromhex(word) for word in secrets]
    if {len(query_key), len(answer_key)} != {KEY_BYTES} or not all(map(is_cookie, cookies)):
        raise ValueError("damaged keys")
    return Keys(host, int(port), address, int(ntp_port), int(since_sec), int(until_sec), query_key,
                answer_key, cookies)


class Store:
    """dir/nts.  It is taken away while its cookies are in use, so that none is ever sent twice, not even
    after kill -9.  It belongs to the owner of dir; others leave it alone."""

    def __init__(self, folder, settings):
        self.path, self.settings, self.keys, self.ours = os.path.join(folder, "nts"), settings, {}, True
        try:
            self.ours = os.stat(folder).st_uid == os.geteuid()
            if not self.ours:
                raise OSError("%s is another user's" % folder)
            self.keys = {keys[:2]: keys for keys in map(parse_keys, self.take().splitlines())}
        except (FileNotFoundError, ValueError):  # none so far; damaged: new keys are one connection away
            pass
        except OSError as err:
            self.warn("use", err)

    def warn(self, doing, err):
        self.settings.tell(1, "unable to %s %s: %s" % (doing, self.path, reason(err)))

    def take(self):
        """-> the text of the file, which is gone then; OSError.  Of several runs, one can rename it."""
        taken = "%s.%d" % (self.path, os.getpid())
        os.rename(self.path, taken)
        try:
            with open(os.open(taken, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
                    raise OSError("it is no file that its owner alone can read")
                return file.read(STORE_BYTES).decode("ascii")
        finally:
            os.unlink(taken)

    def put(self, servers):
        self.keys.update((server.keys[:2], server.keys) for server in servers if server.address)
        try:
            if self.ours:
                text = "".join(format_keys(keys) for keys in self.keys.values() if keys.cookies)
                replace_file(self.path, text.encode(), 0o600)
        except OSError as err:
            self.warn("write", err)


def open_keylog():
    """-> (descriptor, path) of a file for the secrets of a session, in memory where that is possible, else
    one that nobody else can open and that is removed once OpenSSL has opened it; OSError."""
    with contextlib.suppress(AttributeError, OSError):  # not on this system
        keylog = os.memfd_create(PROGRAM)
        return keylog, "/proc/self/fd/%d" % keylog
    path = "/tmp/%s.%s" % (PROGRAM, os.urandom(16).hex())
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), path


def secret_of(keylog):
    """What OpenSSL wrote of its session -> the exporter secret; ValueError."""
    for line in keylog.decode("ascii").splitlines():
        if line.startswith("EXPORTER_SECRET "):
            _, _, secret = line.split()
            return bytes.fromhex(secret)
    raise ValueError("this Python's ssl does not tell a session's secret")


def tls_reason(err):
    """What an ssl.SSLError or an OSError says, without the line of Python's source."""
    return (getattr(err, "reason", None) or reason(err)).partition(" (_ssl")[0].replace("_", " ").lower()


def make_context(ssl, keylog_path, authorities):
    """TLS 1.3 that verifies all of a certificate but its time."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.keylog_filename = keylog_path
    with contextlib.suppress(OSError):  # nothing is to be removed where it is in memory
        os.unlink(keylog_path)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([PROTOCOL])
    context.verify_flags |= NO_CHECK_TIME
    try:
        context.load_verify_locations(authorities) if authorities else context.load_default_certs()
    except OSError as err:
        raise ValueError("no authorities in %s: %s" % (authorities, tls_reason(err))) from None
    return context


def validity(tls, ssl):
    """-> the Unix seconds from and to which all certificates of the chain are valid."""
    try:  # Python 3.13 has a public name for it, but that gives no times
        chain = [certificate.get_info() for certificate in tls._sslobj.get_verified_chain()]
    except AttributeError:  # before Python 3.10
        chain = [tls.getpeercert()]
    since_sec, until_sec = [[ssl.cert_time_to_seconds(certificate[name]) for certificate in chain]
                            for name in ("notBefore", "notAfter")]
    return max(since_sec), min(until_sec)


def establish(host, settings):
    """Key establishment with a host -> Keys; OSError, ValueError."""
    try:
        import ssl  # here, since most runs have stored keys, and it takes 4 MB
    except ImportError:
        raise ValueError("this Python has no ssl; if it is a python3-minimal, install python3") from None
    keylog, keylog_path = open_keylog()
    name = os.fsencode(host)  # in bytes, as in look_up()
    try:
        context = make_context(ssl, keylog_path, settings.letters.get("-c"))
        with socket.create_connection((name, settings.port), KE_NS / 2e9) as plain, \
                context.wrap_socket(plain, server_hostname=name) as tls:  # of two addresses, one may be dead
            if tls.selected_alpn_protocol() != PROTOCOL:
                raise ValueError("it does not speak " + PROTOCOL)
            tls.sendall(KE_QUERY)
            grant, address = read_grant(tls.makefile("rb")), tls.getpeername()
            since_sec, until_sec = validity(tls, ssl)
        query_key, answer_key = export_keys(secret_of(os.pread(keylog, KE_BYTES, 0)))
    except ssl.SSLError as err:
        raise ValueError("TLS: " + (getattr(err, "verify_message", None) or tls_reason(err))) from None
    finally:
        os.close(keylog)
    if grant.server:
        address = look_up(grant.server, grant.port)[0]
    numeric = numeric_name(address)
    settings.tell(2, "%s: new keys, %d cookies, NTP at %s port %d"
                  % (host, len(grant.cookies), numeric, grant.port))
    return Keys(host, settings.port, numeric, grant.port, since_sec, until_sec, query_key, answer_key,
                grant.cookies)


def establish_in_time(host, settings):
    """The same, but bounded in time, whatever it waits for."""
    end_ns = time.monotonic_ns() + min(KE_NS, settings.total_ns // 2)
    found, = in_parallel(lambda host: establish(host, settings), [host], min(end_ns, settings.end_ns))
    if isinstance(found, Exception):
        raise ValueError("key establishment: " + reason(found))
    return found


class NtsServer(Server):
    """A Server with keys.  `fresh`: they were established in this run; `spent`: why others are needed."""

    def __init__(self, keys, fresh):
        name = keys.address if keys.host == keys.address else "%s/%s" % (keys.host, keys.address)
        super().__init__(name, look_up(keys.address, keys.ntp_port)[0])
        self.fresh, self.spent = fresh, None
        self.take(keys)

    def take(self, keys):
        self.keys, self.query_siv, self.answer_siv = keys, Siv(keys.query_key), Siv(keys.answer_key)


def find_nts_servers(settings, stored):
    """Hosts -> Servers, those whose keys are stored and those that give new ones; the others without an
    address."""
    def prepare(host):
        keys = stored.pop((host, settings.port), None)
        if keys and keys.cookies:
            return NtsServer(keys, False)
        return NtsServer(establish_in_time(host, settings), True)
    servers, hosts = [], list(dict.fromkeys(settings.hosts))
    for host, found in zip(hosts, in_parallel(prepare, hosts, settings.end_ns)):
        if isinstance(found, Exception):
            servers.append(Server(host))
            servers[-1].failures[reason(found)] = 1
        elif found.address in [server.address for server in servers]:
            stored[found.keys[:2]] = found.keys  # one server of two names has one vote
        else:
            servers.append(found)
    return servers


def query_of(server, settings):
    """The next query for that server, with a cookie that is used up by it.  New keys are asked for once in a
    run; OSError, ValueError, Dismissed."""
    if not server.keys.cookies:
        server.spent = "no cookie is left"
    if server.spent:
        if server.fresh:
            raise Dismissed(server.spent, True)
        server.fresh = True
        server.take(establish_in_time(server.keys.host, settings))
        server.spent = None
    cookie = server.keys.cookies.pop(0)
    wanted = COOKIES - 1 - len(server.keys.cookies)
    return seal_query(server.query_siv, make_query(), os.urandom(IDENTIFIER_BYTES), cookie, wanted,
                      os.urandom(NONCE_BYTES))


def decode(server, query, packet, ahead_ns):
    """-> Answer, None for what is none to this query or not authentic; ValueError, Dismissed."""
    try:
        if not answers(query, packet) or identifier_of(packet) != identifier_of(query):
            return None
        cookies = open_answer(server.answer_siv, packet)
    except ValueError:
        # A NAK may be forged too.  So the right answer is waited for, whatever else comes.
        if is_nak(packet):
            server.spent = "it does not know our keys any more (NTS NAK)"
        else:
            server.failures["an answer was not authentic"] += 1
        return None
    server.spent = None
    server.keys.cookies[:] = (server.keys.cookies + cookies)[:COOKIES]
    answer = decode_answer(packet, ahead_ns)
    judge(server, (answer.sent_ns - ahead_ns) // 10**9)
    return answer


def judge(server, real_sec):
    """Is the host's certificate valid at the time that was measured?  ValueError, Dismissed."""
    keys = server.keys
    if keys.since_sec <= real_sec <= keys.until_sec:
        server.keys = keys._replace(until_sec=min(keys.until_sec, real_sec + RENEW_SEC))
    elif server.fresh:
        since, until, real = [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(sec))
                              for sec in (keys.since_sec, keys.until_sec, real_sec)]
        raise Dismissed("its certificate is valid from %s to %s, and its time is %s"
                        % (since, until, real), False)
    else:
        server.spent = "its keys are out of date"
        raise ValueError(server.spent)


def main(argv):
    try:
        doing = "write output"
        if begin(argv):
            return 0
        settings = Settings(argv[1:], KE_PORT, "c:")
        if os.isatty(1):
            complain("usage", "the result is 16 raw bytes: " + USAGE)
            return 100
        doing = "tell this clock's scale"
        ahead_ns = (TAI_MINUS_CLOCK_SEC["utc"] - TAI_MINUS_CLOCK_SEC[clock_scale()]) * 10**9
        doing = "get the time from " + ", ".join(settings.hosts)
        store = Store(settings.folder, settings) if settings.folder else None
        servers = []
        try:
            servers = find_nts_servers(settings, store.keys if store else {})
            packet = measure(servers, settings, lambda server: query_of(server, settings),
                             lambda server, query, packet: decode(server, query, packet, ahead_ns))
        finally:
            if store:
                store.put(servers)
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
