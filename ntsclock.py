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

    AES is computed in plain Python, by a table.  Who runs programs on this machine could
    find out the keys by timing its cache, and then forge the time as if there were no NTS.
    No other secret is encrypted with them.

OPTIONS
    As of sntpclock:
    -r n     exchanges with each server       -e ms    largest spread accepted
    -h ms    pause between them               -l days  largest offset accepted
    -t ms    longest wait for each answer     -f       output even if that is exceeded
    -v n     0 to 2: say less or more
    Otherwise:
    -s dir   write to dir/sources, and keep keys and cookies in dir/nts for the next run
    -T ms    longest wait for everything, names and keys included (10000); once connected, a
             host has half of that to give keys, and 5000 at most
    -p port  of key establishment (4460)
    -c file  certificates of the authorities to trust instead of the system's

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
KERNEL_STAMPS = True  # of what arrives, as servers have


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


# ==== shared by some: NTP packets ====
# flags (leap indicator, version, mode), stratum, poll, precision, root delay, root dispersion,
# reference id, and the stamps reference, originate, receive, transmit; fixed point, 16.16 and 32.32
NTP = struct.Struct(">BBbbII4sQQQQ")
NTP_UNIX_SEC = (70 * 365 + 17) * 86400  # from 1900 to 1970
MOST_DISTANCE_NS = 1500 * 10**6  # NTP's own limit (MAXDIST): a server further off does not know the time
ECHO = 24, 40  # the answer's originate stamp is the query's transmit stamp


def ntp_query():
    """Client mode, version 4; the random transmit stamp says nothing of our clock and can't be guessed."""
    return NTP.pack(4 << 3 | 3, 0, 0, 0, 0, 0, bytes(4), 0, 0, 0, int.from_bytes(os.urandom(8), "big"))


def stamp_ns(stamp):
    """An NTP stamp -> TAI since 1970, rounded down.  Its seconds wrap every 136 years; no answer is from
    before this program's release, whatever this clock says."""
    sec = RELEASE_SEC + ((stamp >> 32) - NTP_UNIX_SEC - RELEASE_SEC) % 2**32 + TAI_MINUS_CLOCK_SEC["utc"]
    return sec * 10**9 + ((stamp & 0xffffffff) * 10**9 >> 32)


def answers(query, packet):
    """Does it repeat the cookie of that query?"""
    return len(packet) >= NTP.size and NTP.unpack_from(packet)[8] == NTP.unpack_from(query)[-1]


def decode_answer(server, packet):
    """-> Answer; ValueError."""
    flags, stratum, _, precision, delay, dispersion, reference, _, _, received, sent = NTP.unpack_from(packet)
    leap, version, mode = flags >> 6, flags >> 3 & 7, flags & 7
    if mode not in (2, 4) or version == 0:
        raise ValueError("answer of mode %d, version %d" % (mode, version))
    if stratum == 0:
        word = "".join(chr(byte) if 32 < byte < 127 else "?" for byte in reference.rstrip(b"\0"))
        if word in ("RATE", "DENY", "RSTR"):
            server.over = True
            if word != "RATE":
                server.samples.clear()
            raise ValueError("kiss-o'-death " + word)
        raise ValueError("the server is not synchronised: stratum 0, " + (word or "no reason"))
    if leap == 3 or stratum > 15:
        raise ValueError("the server is not synchronised")
    if not received or not sent:
        raise ValueError("answer without time")
    # A server randomises the bits below its precision, so that each stamp is off by up to that.
    coarse_ns = int(10**9 * 2.0**precision) + 1
    distance_ns = (delay // 2 + dispersion) * 10**9 >> 16
    if distance_ns + coarse_ns > MOST_DISTANCE_NS:
        raise ValueError("the server is up to %.1f s off" % ((distance_ns + coarse_ns) / 1e9))
    received_ns, sent_ns = stamp_ns(received), stamp_ns(sent)
    if sent_ns < received_ns - coarse_ns:
        raise ValueError("answer sent before the query came")
    return Answer(received_ns + coarse_ns, sent_ns - coarse_ns, distance_ns, stratum, reference.hex())
# ==== end shared ====


# Key establishment, RFC 8915 section 4: records of a type, a length and a body.
KE_PORT, NTP_PORT = 4460, b"\0\x7b"
PROTOCOL = "ntske/1"
KE_NS, KE_BYTES = 5 * 10**9, 65536  # for each host; a true answer has 1000 bytes
HEAD, CRITICAL = struct.Struct(">HH"), 0x8000
END, NEXT_PROTOCOL, ERROR, WARNING, ALGORITHM, NEW_COOKIE, SERVER, PORT = range(8)
NTPV4, AES_SIV_CMAC_256 = 0, 15
KE_QUERY = struct.pack(">8H", CRITICAL | NEXT_PROTOCOL, 2, NTPV4, CRITICAL | ALGORITHM, 2, AES_SIV_CMAC_256,
                       CRITICAL | END, 0)
KE_ERRORS = {0: "it does not know a critical record", 1: "bad request", 2: "internal error"}
NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which ssl has no name
KEY_BYTES, IDENTIFIER_BYTES, NONCE_BYTES, TAG_BYTES = 32, 32, 16, 16
RENEW_SEC = 28 * 86400  # so that a host whose certificate was revoked is not trusted much longer

# Extension fields of NTP packets, RFC 8915 section 5: a type, a length that counts these too, and a body.
IDENTIFIER, COOKIE, PLACEHOLDER, AUTHENTICATOR = 0x0104, 0x0204, 0x0304, 0x0404
COOKIES = 8  # as the RFC proposes: a server is not left without one until eight packets in a row are lost
COOKIE_BYTES = 1024  # real ones have about a hundred
QUERY_BYTES = 1232  # fits the least packet that IPv6 carries without fragments
STORE_BYTES = 65536

# AES-128 of FIPS 197, and on it CMAC of RFC 4493 and SIV of RFC 5297.  A block of 16 bytes is an integer.
ONES = 2**128 - 1
BYTES, WORDS = ONES // 0xff, ONES // 0xffffffff  # with 1 in each byte, in each word of 4 bytes
LOW_BITS, LOW_BYTES, LOW_HALVES = 0x7f * BYTES, 0xff * WORDS, 0xffff * WORDS
CARRIES = ONES - 2**63 - 2**31  # RFC 5297 clears these two bits of the counter
BOX = bytes.fromhex(  # what each byte is substituted by
    "637c777bf26b6fc53001672bfed7ab76ca82c97dfa5947f0add4a2af9ca472c0b7fd9326363ff7cc34a5e5f171d8311504c723c3"
    "1896059a071280e2eb27b27509832c1a1b6e5aa0523bd6b329e32f8453d100ed20fcb15b6acbbe394a4c58cfd0efaafb434d3385"
    "45f9027f503c9fa851a3408f929d38f5bcb6da2110fff3d2cd0c13ec5f974417c4a77e3d645d197360814fdc222a908846eeb814"
    "de5e0bdbe0323a0a4906245cc2d3ac629195e479e7c8376d8dd54ea96c56f4ea657aae08ba78252e1ca6b4c6e8dd741f4bbd8b8a"
    "703eb5664803f60e613557b986c11d9ee1f8981169d98e949b1e87e9ce5528df8ca1890dbfe6426841992d0fb054bb16")


def substitute(block):
    """Each byte by the box; and shift the rows, by taking every fifth byte, going round."""
    return int.from_bytes((block.to_bytes(16, "big") * 5)[::5].translate(BOX), "big")


def mix_columns(block):
    below = block << 8 & ONES - LOW_BYTES | block >> 24 & LOW_BYTES  # each word is a column
    pairs = block ^ below
    twice = (pairs & LOW_BITS) << 1 ^ (pairs >> 7 & BYTES) * 0x1b  # each byte, in the field of 2^8
    return twice ^ below ^ (pairs << 16 & ONES - LOW_HALVES | pairs >> 16 & LOW_HALVES)


class Aes:
    """AES-128, to encrypt only."""

    def __init__(self, key):
        self.keys = [int.from_bytes(key, "big")]
        for constant in bytes.fromhex("01020408102040801b36"):
            last = self.keys[-1] & 0xffffffff
            turned = (last << 8 & 0xffffffff | last >> 24).to_bytes(4, "big").translate(BOX)
            block = self.keys[-1] ^ (int.from_bytes(turned, "big") ^ constant << 24) << 96
            block ^= block >> 32  # each word with those before it
            self.keys.append(block ^ block >> 64)

    def encrypt(self, block):
        block ^= self.keys[0]
        for key in self.keys[1:-1]:
            block = mix_columns(substitute(block)) ^ key
        return substitute(block) ^ self.keys[-1]


def doubled(block):
    """Twice a block in the field of 2^128."""
    return block << 1 & ONES ^ (0x87 if block >> 127 else 0)


def padded(part):
    """A block that is not whole, with a bit of 1 and zeros after it."""
    return (part + b"\x80").ljust(16, b"\0")


def cmac(aes, message):
    subkey, state = doubled(aes.encrypt(0)), 0
    *blocks, last = [message[at:at + 16] for at in range(0, len(message) or 1, 16)]
    if len(last) < 16:
        last, subkey = padded(last), doubled(subkey)
    for block in blocks:
        state = aes.encrypt(state ^ int.from_bytes(block, "big"))
    return aes.encrypt(state ^ int.from_bytes(last, "big") ^ subkey)


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
        stream = b"".join(self.cipher.encrypt((tag & CARRIES) + i & ONES).to_bytes(16, "big")
                          for i in range(-(-len(data) // 16)))
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


Grant = collections.namedtuple("Grant", "server port cookies")  # server "": the host that was asked


def read_grant(data):
    """What a host says in key establishment -> Grant, or None when that is not all yet; ValueError."""
    said, at = {kind: [] for kind in range(8)}, 0
    while not said[END]:
        body_at = at + HEAD.size
        head, size = HEAD.unpack(data[at:body_at].ljust(HEAD.size, b"\0"))
        kind, body, at = head & ~CRITICAL, data[body_at:body_at + size], body_at + size
        if at > len(data):
            return None
        number = int.from_bytes(body[:2], "big")
        if kind == ERROR:
            raise ValueError("it says: %s" % KE_ERRORS.get(number, "error %d" % number))
        if kind == WARNING:  # none is defined so far, and one that is not known is an error
            raise ValueError("it says: warning %d" % number)
        if kind in said:
            said[kind].append(body)
        elif head & CRITICAL:
            raise ValueError("it sent an unknown critical record, %d" % kind)
    if said[NEXT_PROTOCOL] != [struct.pack(">H", NTPV4)]:
        raise ValueError("it does not offer NTPv4")
    if said[ALGORITHM] != [struct.pack(">H", AES_SIV_CMAC_256)]:
        raise ValueError("it does not offer AEAD_AES_SIV_CMAC_256")
    server, port = b" ".join(said[SERVER]).decode("ascii", "replace"), b"".join(said[PORT]) or NTP_PORT
    if len(port) != 2 or port == b"\0\0" or not all(char.isalnum() or char in "-.:_" for char in server):
        raise ValueError("it sent the name or port of no server")
    cookies = list(filter(is_cookie, said[NEW_COOKIE]))[:COOKIES]
    if not cookies:
        raise ValueError("it sent no cookie")
    return Grant(server, int.from_bytes(port, "big"), cookies)


def is_cookie(cookie):
    """Can it be sent?  The length of a field is a multiple of four."""
    return 0 < len(cookie) <= COOKIE_BYTES and len(cookie) % 4 == 0


def field(kind, body):
    return HEAD.pack(kind, HEAD.size + len(body)) + body


def split_fields(data, start=0):
    """-> [(kind, start, body)] of extension fields; ValueError."""
    found = []
    while start < len(data):
        kind, size = HEAD.unpack(data[start:start + HEAD.size].ljust(HEAD.size, b"\0"))
        if size < HEAD.size or size % 4 or start + size > len(data):
            raise ValueError("damaged extension fields")
        found.append((kind, start, data[start + HEAD.size:start + size]))
        start += size
    return found


def identifier_of(packet):
    """-> the unique identifier of a query or answer; ValueError when it has none, or several."""
    identifier, = [body for kind, _, body in split_fields(packet, NTP.size) if kind == IDENTIFIER]
    return identifier


def open_answer(siv, packet):
    """-> the cookies in an authentic answer; ValueError for what is not authentic to its end."""
    fields = split_fields(packet, NTP.size)
    kind, start, body = fields[-1] if fields else (None, 0, b"")
    if kind != AUTHENTICATOR or len(body) < HEAD.size:
        raise ValueError("no authenticator at its end")
    nonce_size, sealed_size = HEAD.unpack_from(body)
    sealed_at = HEAD.size + -(-nonce_size // 4) * 4
    if sealed_at + sealed_size > len(body):
        raise ValueError("damaged authenticator")
    nonce, sealed = body[HEAD.size:HEAD.size + nonce_size], body[sealed_at:sealed_at + sealed_size]
    plain = siv.open([packet[:start], nonce], sealed)
    return [cookie for kind, _, cookie in split_fields(plain) if kind == COOKIE and is_cookie(cookie)]


# What a host granted.  Its keys are for queries and for answers; they may be used when the host's time is
# between since and until; address and ntp_port are where they are known.
Keys = collections.namedtuple("Keys", "host port address ntp_port since_sec until_sec query_key answer_key "
                              "cookies")


def format_keys(keys):
    """Keys -> a line of dir/nts."""
    secrets = [secret.hex() for secret in (keys.query_key, keys.answer_key, *keys.cookies)]
    return " ".join([str(word) for word in keys[:6]] + secrets) + "\n"


def parse_keys(line):
    """A line of dir/nts -> Keys; ValueError."""
    host, port, address, ntp_port, since_sec, until_sec, *secrets = line.split()
    query_key, answer_key, *cookies = [bytes.fromhex(word) for word in secrets]
    if {len(query_key), len(answer_key)} != {KEY_BYTES} or not all(map(is_cookie, cookies)):
        raise ValueError("damaged keys")
    return Keys(host, int(port), address, int(ntp_port), int(since_sec), int(until_sec), query_key,
                answer_key, cookies)


def is_anothers(folder):
    return os.path.exists(folder) and os.stat(folder).st_uid != os.geteuid()


def take_keys(folder):
    """What dir/nts has -> {(host, port): Keys}.  It is gone then, so that no cookie is ever sent twice, not
    even after kill -9.  Of several runs, one can rename it."""
    if is_anothers(folder):
        return {}
    taken = os.path.join(folder, "nts.%d" % os.getpid())
    try:
        os.rename(os.path.join(folder, "nts"), taken)
        try:
            with open(os.open(taken, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
                    return {}
                found = map(parse_keys, file.read(STORE_BYTES).decode("ascii").splitlines())
                return {keys[:2]: keys for keys in found}
        finally:
            os.unlink(taken)
    except (OSError, ValueError):  # there is none, or a damaged one: new keys are one connection away
        return {}


def put_keys(settings):
    if is_anothers(settings.folder):
        return settings.tell(1, "no keys are kept, since %s is another user's" % settings.folder)
    in_use = {server.keys[:2]: server.keys for server in settings.servers if not server.spent}
    keep(settings, "nts", "".join(map(format_keys, {**settings.stored, **in_use}.values())), 0o600)


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
    """What an exception says, those of ssl without the line of Python's source."""
    said = getattr(err, "verify_message", None) or getattr(err, "reason", None)
    if said:
        return "TLS: " + said.replace("_", " ").lower()
    return "timed out" if isinstance(err, socket.timeout) else reason(err).partition(" (_ssl")[0]


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


def ask_for_keys(tls, end_ns):
    """-> Grant; OSError, ValueError."""
    if tls.selected_alpn_protocol() != PROTOCOL:
        raise ValueError("it does not speak " + PROTOCOL)
    tls.sendall(KE_QUERY)
    said, grant = b"", None
    while not grant:
        tls.settimeout(max(end_ns - time.monotonic_ns(), 1) / 1e9)
        part = tls.recv(KE_BYTES)
        said += part
        if not part or len(said) > KE_BYTES:
            raise ValueError("its answer never ends" if part else "its answer is cut short")
        grant = read_grant(said)
    return grant


def establish(host, settings):
    """Key establishment with a host -> Keys; OSError, ValueError."""
    try:
        import ssl  # here, since most runs have stored keys, and it takes 4 MB
    except ImportError:
        raise ValueError("this Python has no ssl; if it is a python3-minimal, install python3") from None
    limit_ns = min(KE_NS, settings.total_ns // 2)
    end_ns = time.monotonic_ns() + limit_ns
    keylog, keylog_path = open_keylog()
    name = os.fsencode(host)  # in bytes, as in look_up()
    try:
        context = make_context(ssl, keylog_path, settings.letters.get("-c"))
        with socket.create_connection((name, settings.port), limit_ns / 2e9) as plain, \
                context.wrap_socket(plain, server_hostname=name) as tls:  # of two addresses, one may be dead
            grant, address = ask_for_keys(tls, end_ns), tls.getpeername()
            since_sec, until_sec = validity(tls, ssl)
        query_key, answer_key = export_keys(secret_of(os.pread(keylog, KE_BYTES, 0)))
        if grant.server:
            address = look_up(settings, grant.server, grant.port)[0]
    except (OSError, ValueError) as err:
        raise ValueError("key establishment: " + tls_reason(err)) from None
    finally:
        os.close(keylog)
    numeric = numeric_name(address)
    settings.tell(2, "%s: new keys, %d cookies, NTP at %s port %d"
                  % (host, len(grant.cookies), numeric, grant.port))
    return Keys(host, settings.port, numeric, grant.port, since_sec, until_sec, query_key, answer_key,
                grant.cookies)


def find_servers(host):
    """-> the Server whose keys are stored, or that gives new ones; OSError, ValueError."""
    settings = host.settings
    keys = settings.stored.pop((host.name, settings.port), None)
    fresh = not keys  # established in this run
    if fresh:
        keys = establish(host.name, settings)
    server = Server(settings, host.name, look_up(settings, keys.address, keys.ntp_port)[0])
    server.keys, server.fresh, server.spent = keys, fresh, None  # spent: why others are needed
    settings.servers.append(server)
    return [server]


def make_query(server):
    """The next query, with a cookie that is used up by it.  New keys are asked for once in a run."""
    if not server.keys.cookies:
        server.spent = "no cookie is left"
    if server.spent:
        if server.fresh:
            server.over = True
            raise ValueError(server.spent)
        server.fresh = True
        server.keys, server.spent = establish(server.keys.host, server.settings), None
    cookies = server.keys.cookies
    cookie, nonce = cookies.pop(0), os.urandom(NONCE_BYTES)
    query = ntp_query() + field(IDENTIFIER, os.urandom(IDENTIFIER_BYTES)) + field(COOKIE, cookie)
    placeholder = field(PLACEHOLDER, bytes(len(cookie)))
    room = QUERY_BYTES - len(query) - HEAD.size - HEAD.size - NONCE_BYTES - TAG_BYTES
    query += placeholder * min(COOKIES - 1 - len(cookies), room // len(placeholder))
    sealed = Siv(server.keys.query_key).seal([query, nonce], b"")
    return query + field(AUTHENTICATOR, HEAD.pack(len(nonce), len(sealed)) + nonce + sealed)


def decode(server, query, packet):
    """-> Answer, None when that does not answer this query or is not authentic; ValueError."""
    try:
        if not answers(query, packet) or identifier_of(packet) != identifier_of(query):
            return None
        cookies = open_answer(Siv(server.keys.answer_key), packet)
    except ValueError:
        # A NAK may be forged too.  So the right answer is waited for, whatever else comes.
        if packet[1] == 0 and packet[12:16] == b"NTSN":
            server.spent = "it does not know our keys any more (NTS NAK)"
        else:
            server.failures["an answer was not authentic"] += 1
        return None
    server.spent = None
    server.keys.cookies[:] = (server.keys.cookies + cookies)[:COOKIES]
    answer = decode_answer(server, packet)
    judge(server, answer.sent_ns // 10**9 - TAI_MINUS_CLOCK_SEC["utc"])
    return answer


def judge(server, real_sec):
    """Is the host's certificate valid at the time that was measured?  ValueError."""
    keys = server.keys
    if keys.since_sec <= real_sec <= keys.until_sec:
        server.keys = keys._replace(until_sec=min(keys.until_sec, real_sec + RENEW_SEC))
    elif server.fresh:
        since, until, real = [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(sec))
                              for sec in (keys.since_sec, keys.until_sec, real_sec)]
        server.over = True
        server.samples.clear()
        raise ValueError("its certificate is valid from %s to %s, and its time is %s" % (since, until, real))
    else:
        server.spent = "its keys are out of date"
        raise ValueError(server.spent)


def main(argv):
    try:
        doing = "write output"
        if begin(argv):
            return 0
        doing = "tell this clock's scale"
        settings = Settings(argv[1:], KE_PORT, "c:")
        if os.isatty(1):
            complain("usage", "the result is 16 raw bytes: " + USAGE)
            return 100
        doing = "get the time from " + ", ".join(settings.hosts)
        settings.servers, settings.stored = [], take_keys(settings.folder) if settings.folder else {}
        try:
            packet = measure(settings)
        finally:
            if settings.folder:
                put_keys(settings)
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
