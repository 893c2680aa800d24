#!/usr/bin/env python3
"""taiclock - ask TAICLOCK servers how far the system clock is off

SYNOPSIS
    taiclock [options] host... | clockview
    taiclock [options] host... > /usr/local/clockspeed/adjust

DESCRIPTION
    Asks each host, where taiclockd runs, and writes one adjustment to standard output: real
    time minus system clock, 16 bytes of TAI64NA.  Sets nothing, needs no privilege.

    Hosts, exchanges, ranges and votes are as of sntpclock.  TAICLOCK tells no root distance
    and has no authentication: ask servers on networks that you trust.

    The result is the middle by this program's own readings of the clock: they are late by
    about as much as those of the server.

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
KERNEL_STAMPS = False  # a server reads its clock once it has woken up; reading ours as late balances that


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
    while (fd := os.open(os.devnull, os.O_RDONLY)) < 3:
        pass  # lest a file be taken for stdout; writing there still fails
    os.close(fd)
    manual, version = __doc__ or USAGE + "\n", "%s %s\n" % (PROGRAM, RELEASE)  # python3 -OO has no docstrings
    answer = {"-h": manual, "--help": manual, "--version": version}.get(" ".join(argv[1:]), "")
    emit(answer.encode())
    return bool(answer)
# ==== end shared ====


# ==== shared by some: TAI64NA ====
# Signed seconds; nanoseconds counted upwards; attoseconds, or in an adjustment what the mark says of itself.
TAI64NA = struct.Struct(">qII")


def unpack(packet):
    """16 bytes of TAI64NA, or 12 of TAI64N -> (signed nanoseconds, last number); ValueError."""
    if len(packet) not in (12, 16):
        raise ValueError("%d bytes, not 16" % len(packet))
    sec, nano, last = TAI64NA.unpack(packet.ljust(16, b"\0"))
    if max(nano, last) >= 10**9:
        raise ValueError("not a TAI64NA packet")
    return sec * 10**9 + nano, last
# ==== end shared ====


# ==== shared by some: packing TAI64NA ====
def pack(ns, last=0):
    """Signed nanoseconds, and attoseconds or what a mark tells of itself -> 16 bytes of TAI64NA."""
    return struct.pack(">qII", *divmod(ns, 10**9), last)
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
# A script has KIND, KERNEL_STAMPS, ECHO (where an answer repeats 4 bytes of its query's cookie, and where the
# query has them), find_servers(host) -> [Server], make_query(server) -> bytes, and decode(server, query,
# packet) -> Answer, or None for what does not answer the query.  All three may raise OSError and ValueError.
COUNTER = getattr(time, "CLOCK_MONOTONIC_RAW", time.CLOCK_MONOTONIC)  # the former is never slewed nor set
COUNTER_PPM = 500  # no counter is further off, since no kernel's clock could make up for it
STEERED_PPM = 250  # a clock that runs away from the counter faster is slewed, which kernels do by 500 or more
READING_NS = 1000  # clock and counter are read this close to each other, unless the scheduler comes between
DAY_NS, ANY = 86400 * 10**9, float("inf")
NO_MAJORITY = "no majority of the servers agrees"
SO_TIMESTAMPNS, SO_ATTACH_FILTER = 35, 26  # Linux's, for which Python's socket module has no names

# T2 rounded up and T3 rounded down, as TAI since 1970, and what else the server said.
Answer = collections.namedtuple("Answer", "received_ns sent_ns distance_ns stratum reference")
Reading = collections.namedtuple("Reading", "clock_ns tick_ns")  # system clock and counter at one moment
Sample = collections.namedtuple("Sample", "answer sent came")  # with Readings of query and answer
# What all samples of a server prove together, as in dir/sources.
Result = collections.namedtuple("Result", "offset_ns spread_ns delay_ns distance_ns stratum reference")


class Settings:
    """The command line, getopt.GetoptError when it is wrong; and the clock's scale, ValueError."""

    def __init__(self, words, port, more_letters=""):
        options, self.hosts = getopt.getopt(words, "fe:h:l:p:r:s:t:T:v:" + more_letters)
        self.letters = letters = dict(options)

        def number(letter, default, unit=1):
            text = letters.get(letter, "0")
            if not text.replace(".", "", 1).isdecimal() or float(text) >= 10**12:
                raise getopt.GetoptError("")
            return round(float(text) * unit) if letter in letters else default
        self.exchanges, self.pause_ns = number("-r", None), number("-h", None, 10**6)  # or by address
        self.wait_ns, self.total_ns = number("-t", 10**9, 10**6), number("-T", 10 * 10**9, 10**6)
        self.most_spread_ns, self.most_ns = number("-e", ANY, 10**6), number("-l", 2 * DAY_NS, DAY_NS) or ANY
        self.port, self.verbosity, self.folder = number("-p", port), number("-v", 1), letters.get("-s")
        if not self.hosts or self.exchanges == 0 or not 0 < self.port < 65536:
            raise getopt.GetoptError("")
        if "-f" in letters:
            self.most_spread_ns = self.most_ns = ANY
        self.end_ns = time.monotonic_ns() + self.total_ns
        self.tai_minus_clock_ns = TAI_MINUS_CLOCK_SEC[clock_scale()] * 10**9

    def tell(self, verbosity, text):
        if self.verbosity >= verbosity:
            complain("info" if verbosity == 2 else "warning", text)


class Server:
    """A host, or one of its addresses; the exchanges with it and what became of them."""

    def __init__(self, settings, host, address=None):
        numeric = numeric_name(address) if address else host
        self.name = host if numeric == host else host + "/" + numeric
        self.settings, self.address, self.servers = settings, address, [self]  # a host has others
        self.samples, self.failures = [], collections.Counter()
        self.over = False  # is it not to be asked any more?
        self.result = self.verdict = None  # a Result; "agreed" or "falseticker"


def in_parallel(function, servers):
    """Call it with each server in a thread of its own, and wait for them until -T is over, since nothing else
    bounds getaddrinfo().  What a call raises is a failure of its server."""
    def call(server):
        try:
            function(server)
        except Exception as err:
            server.failures[reason(err)] += 1
    threads = [threading.Thread(target=call, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    for thread, server in zip(threads, servers):  # what waits for an answer has ended 0.1 s after -T
        thread.join(max(server.settings.end_ns + 10**8 - time.monotonic_ns(), 0) / 1e9)


def look_up(settings, host, port):
    """-> up to 4 socket addresses of that name, the least with which three outvote one; OSError."""
    family = (socket.AF_INET if "-4" in settings.letters else socket.AF_INET6 if "-6" in settings.letters
              else socket.AF_UNSPEC)
    # In bytes, since for a str Python loads its megabyte of international names.
    found = socket.getaddrinfo(os.fsencode(host), port, family, socket.SOCK_DGRAM)
    return [address for _, _, _, _, address in found[:4]]


def numeric_name(address):
    return socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def is_near(address):
    """Is that a loopback, private or link-local address?  Its owner is then the one who asks it."""
    import ipaddress  # here, so that its megabyte is not loaded for a wrong command line
    ip = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(ip, "ipv4_mapped", None) or ip).is_private


def read_clocks():
    """-> Reading, the quickest of three when the scheduler comes between clock and counter."""
    quickest_ns = ANY
    for _ in range(3):
        before_ns, clock_ns = time.clock_gettime_ns(COUNTER), time.time_ns()
        took_ns = time.clock_gettime_ns(COUNTER) - before_ns
        if took_ns < quickest_ns:
            quickest_ns, quickest = took_ns, Reading(clock_ns, before_ns + took_ns // 2)
        if took_ns <= READING_NS:
            break
    return quickest


def arrival(ancillary, sent, woke):
    """-> Reading when the kernel got a packet, by what recvmsg() told beside it.  A stamp that is not between
    our Readings, as after a step of the clock, tells nothing; then it is `woke`."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS):
            sec, nano = struct.unpack_from("@ll", data)
            late_ns = woke.clock_ns - sec * 10**9 - nano
            if 0 <= late_ns <= min(woke.clock_ns - sent.clock_ns, woke.tick_ns - sent.tick_ns):
                return Reading(woke.clock_ns - late_ns, woke.tick_ns - late_ns)
    return woke


def prepare(sock, query):
    """Have Linux stamp what arrives, and drop what lacks 4 bytes of the query's cookie, lest a flood of
    forged answers fill the socket's queue.  decode() looks at the whole cookie."""
    answer_at, query_at = ECHO
    wanted, = struct.unpack_from(">I", query, query_at)
    steps = [(0x20, 0, 0, 8 + answer_at),  # load the word, after the 8 bytes of UDP's header
             (0x15, 1, 0, wanted),  # skip a step if it is that
             (0x06, 0, 0, 0), (0x06, 0, 0, 0xffff)]  # drop the packet; admit it
    program = array.array("B", b"".join(struct.pack("=HBBI", *step) for step in steps))
    with contextlib.suppress(OSError):  # not Linux: our own readings do
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 4, program.buffer_info()[0]))
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, KERNEL_STAMPS)


def exchange(sock, server):
    """Send a query and wait for its answer -> Sample; OSError, ValueError."""
    query = make_query(server)
    prepare(sock, query)
    end_ns = min(time.monotonic_ns() + server.settings.wait_ns, server.settings.end_ns)
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
            return Sample(answer, sent, came)


def ask(server):
    """All exchanges with a server; OSError where it can't be reached."""
    settings, near = server.settings, is_near(server.address[0])
    pause_ns = (0 if near else 2 * 10**9) if settings.pause_ns is None else settings.pause_ns
    family = socket.AF_INET6 if ":" in server.address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(server.address)  # from now on the kernel drops what other addresses send
        for left in reversed(range(settings.exchanges or (10 if near else 4))):
            try:
                server.samples.append(exchange(sock, server))
            except (OSError, ValueError) as err:
                server.failures[reason(err)] += 1
            if server.over or not left or time.monotonic_ns() + pause_ns >= settings.end_ns:
                break
            time.sleep(pause_ns / 1e9)


def gained(then, now):
    """-> (least, most) that real time can have gained on the clock between two Readings.  It went at the pace
    of clock, counter, or between; when these are far apart, the clock was slewed or set, and is no guide."""
    elapsed_ns = now.tick_ns - then.tick_ns
    gain_ns = elapsed_ns - (now.clock_ns - then.clock_ns)
    if abs(gain_ns) <= elapsed_ns * STEERED_PPM // 10**6 + READING_NS:
        return min(0, gain_ns), max(0, gain_ns)
    doubt_ns = elapsed_ns * COUNTER_PPM // 10**6 + READING_NS
    return gain_ns - doubt_ns, gain_ns + doubt_ns


def agreed_range(ranges):
    """-> (first and last point that is in the most of the ranges, in how many), by Marzullo's algorithm."""
    votes = {point: sum(lo <= point <= hi for lo, hi in ranges) for pair in ranges for point in pair}
    most = max(votes.values())
    winners = [point for point in votes if votes[point] == most]
    return min(winners), max(winners), most


def server_range(samples, end, tai_minus_clock_ns):
    """-> the Result of a server's samples.  Where they contradict each other, the most of them count."""
    least_ns, most_ns, _ = agreed_range([
        (answer.sent_ns - came.clock_ns + gained(came, end)[0],
         answer.received_ns - sent.clock_ns + gained(sent, end)[1]) for answer, sent, came in samples])
    delay_ns = min(came.clock_ns - sent.clock_ns - (answer.sent_ns - answer.received_ns)
                   for answer, sent, came in samples)
    return Result((least_ns + most_ns) // 2 - tai_minus_clock_ns, (most_ns - least_ns + 1) // 2, delay_ns,
                  *samples[-1].answer[2:])


def vote(servers, settings):
    """What the servers prove together -> 16 bytes of an adjustment; ValueError.  Sets their verdicts."""
    voters = {}  # with their ranges, widened by how far each may be off true time
    for server in servers:
        if server.result:
            offset_ns, spread_ns, _, distance_ns, _, _ = server.result
            voters[server] = offset_ns - spread_ns - distance_ns, offset_ns + spread_ns + distance_ns
    if not voters:
        raise ValueError("no usable answer; " + "; ".join(map(troubles, servers)))
    least_ns, most_ns, votes = agreed_range(voters.values())
    if 2 * votes <= len(voters):
        raise ValueError(NO_MAJORITY)
    for server, (lo, hi) in voters.items():
        server.verdict = "agreed" if lo <= most_ns and least_ns <= hi else "falseticker"
    value_ns = (least_ns + most_ns) // 2
    distance_ns = min(server.result.distance_ns for server in voters if server.verdict == "agreed")
    spread_ns = max(most_ns - value_ns - distance_ns, 1)
    if abs(value_ns) > settings.most_ns:
        days = abs(value_ns) / DAY_NS
        away = "%.1f days" % days if days < 1000 else "%.1f years" % (days / 365.25)
        raise ValueError("this clock is %s %s; `clockctl set` sets it"
                         % (away, "behind" if value_ns > 0 else "ahead"))
    if spread_ns > settings.most_spread_ns:
        raise ValueError("time uncertainty too large, %.6f s" % (spread_ns / 1e9))
    return pack(value_ns, pack_quality(spread_ns, distance_ns))


def pack_quality(spread_ns, distance_ns):
    """What clockview's unpack_quality() reads, both rounded up; 0 for a spread over 9.999 s."""
    steps = next(step for step in range(100) if (10 ** (3 + step / 14) if step else 0) >= distance_ns)
    for exponent in range(10):
        digits = -(-spread_ns * 1000 // 10**exponent)
        if digits < 10**4:
            last = exponent * 10**8 + digits * 10**4 + steps * 100
            return last + (1 - last) % 97
    return 0


def keep(settings, name, text, mode=0o644):
    """Write dir/name whole.  The temporary file is always new, so that no planted link is followed."""
    path = os.path.join(settings.folder, name)
    temporary = path + ".tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(text.encode(errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError as err:
        settings.tell(1, "unable to write %s: %s" % (path, reason(err)))


def troubles(server):
    """What failed with it, and how often."""
    return server.name + ": " + ", ".join(why + (" (%d times)" % times if times > 1 else "")
                                          for why, times in server.failures.items())


def report(servers, settings, now_sec):
    """Tell what failed or does not agree, and write what each server said to dir/sources."""
    lines, answered = "", any(server.result for server in servers)
    for server in servers:
        verdict = server.verdict or "failed: " + (list(server.failures) or [NO_MAJORITY])[-1]
        if server.result:
            said = "offset %+d ns, spread %d ns, delay %d ns, root distance %d ns, stratum %s, reference %s"
            settings.tell(1 if verdict == "falseticker" else 2,
                          "%s, %s: %s" % (server.name, verdict, said % server.result))
        if server.failures and answered:  # else the fatal error tells it
            settings.tell(1, "unable to ask " + troubles(server))
        words = [now_sec, KIND, "".join(server.name.split()), *(server.result or 6 * "-"), verdict]
        lines += " ".join(map(str, words)) + "\n"
    if settings.folder is not None:
        keep(settings, "sources", lines)


def measure(settings):
    """Ask all servers at once, have them vote, and report -> 16 bytes of an adjustment; ValueError."""
    by_address = {}  # a server with several names is asked once, and has one vote

    def ask_host(host):
        found = find_servers(host)
        host.servers = [by_address.setdefault(server.address, server) for server in found]
        in_parallel(ask, [server for server in found if server in host.servers])
    hosts = [Server(settings, host) for host in dict.fromkeys(settings.hosts)]
    in_parallel(ask_host, hosts)
    end = read_clocks()
    servers = list(dict.fromkeys(server for host in hosts for server in host.servers))
    for server in servers:
        if server.samples:
            server.result = server_range(server.samples, end, settings.tai_minus_clock_ns)
        elif not server.failures:
            server.failures["timed out"] = 1
    try:
        return vote(servers, settings)
    finally:
        report(servers, settings, end.clock_ns // 10**9)
# ==== end shared ====


# ==== shared by some: servers by name ====
def find_servers(host):
    """-> a Server for each address of that name; OSError."""
    addresses = look_up(host.settings, host.name, host.settings.port)
    return [Server(host.settings, host.name, address) for address in addresses]
# ==== end shared ====


LABEL_ZERO_NS = 2**62 * 10**9  # the label of 1970-01-01 00:00:00 TAI


def make_query(server):
    """32 bytes: `ctai`, zeros where the label will be, of which s6-taiclockd writes but 12, and a cookie that
    can't be guessed."""
    return b"ctai" + bytes(16) + os.urandom(12)


def decode(server, query, packet):
    """-> Answer, None when that does not answer the query; ValueError when its label is not one."""
    if len(packet) != len(query) or packet[:4] != b"stai" or packet[20:] != query[20:]:
        return None
    label_ns, atto = unpack(packet[4:20])
    if label_ns < 0:
        raise ValueError("not a TAI64NA label")
    return Answer(label_ns - LABEL_ZERO_NS + (atto > 0), label_ns - LABEL_ZERO_NS, 0, "-", "-")


def main(argv):
    try:
        doing = "write output"
        if begin(argv):
            return 0
        doing = "tell this clock's scale"
        settings = Settings(argv[1:], 4014, "46")
        if os.isatty(1):
            complain("usage", "the result is 16 raw bytes: " + USAGE)
            return 100
        doing = "get the time from " + ", ".join(settings.hosts)
        packet = measure(settings)
        doing = "write output"
        emit(packet)
    except getopt.GetoptError:
        complain("usage", USAGE)
        return 100
    except (OSError, OverflowError, RuntimeError, ValueError) as err:
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
