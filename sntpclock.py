#!/bin/sh
"""exec" python3 -IS -c 'import sys; del sys.argv[0]; __file__ = sys.argv[0]; exec(compile(open(__file__, "rb").read(), __file__, "exec"))' "$0" "$@"
sntpclock - ask NTP servers how far the system clock is off

SYNOPSIS
    sntpclock [options] host... | clockview
    sntpclock [options] host... > /usr/local/clockspeed/adjust

DESCRIPTION
    Asks each host (an IPv4 or IPv6 address or a name; `0` is 127.0.0.1) by NTP and writes
    one adjustment, real time minus system clock, to standard output: 16 bytes of TAI64NA.
    Sets nothing, needs no privilege.

    Each exchange of two packets proves a range in which the offset lies; the result is the
    middle of the intersection of all the ranges.  Linux stamps the packets in the kernel,
    so that the result doesn't depend on when this program gets to run.  A slew of the clock
    during the measurement is seen by the system's unsteered counter, and allowed for.

    With several servers (a name with several addresses counts as up to 4) each range is
    widened by how far that server may be off true time, its root distance.  A majority of
    those that answered must then agree, the others are named on stderr.

    Leap seconds cancel between NTP and a clock on the utc scale; on the tai scale they come
    from the leap second table.

OPTIONS
    -r n        exchanges with each server: else 10 when its address is a loopback, private or
                link-local one, 4 when it is public
    -h ms       pause between them: else none, 2000 when it is public
    -t ms       longest wait for each answer (1000)
    -T ms       longest wait for all of them (10000)
    -e ms       largest uncertainty accepted (any)
    -l days     largest offset accepted (2; 0 is any)
    -f          output even if -e or -l are exceeded
    -p port     (123)
    -4, -6      use IPv4 only, IPv6 only
    -k file     chrony's key file, which others must not be able to read
    -K id       accept only answers authenticated with that key of it: MD5, SHA1, SHA256,
                SHA384 or SHA512
    -s dir      keep in dir/kisses which servers asked not to be asked (the kiss-o'-death of
                NTP) and until when, and obey it: RATE is 1024 s, DENY and RSTR are a day,
                twice as long each next time up to 30 days.  On the last UTC day of June and of
                December keep in dir/leap which leap second a majority of the agreeing servers
                announces; clockspeed heeds it when dir is its etc
    -c url      https://host/...; may be given several times.  At least one of these servers
                must confirm the result by the Date in its answer, which is to come within 2 s,
                and none contradict it, else it is refused, -f or not.  TLS is verified, but for
                the time: whether the certificates are valid is judged by the time measured, not
                by this clock (Python before 3.10 does not show those of the authorities, only
                the host's)
    -v n        0 fatal errors only; 1 warnings too; 2 a line for each server too, with offset,
                bound, delay, stratum and reference id, and one for the result (1)

ENVIRONMENT
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones);
                 without it the time zone tells
    LEAPSECS     a leap second table to use before the system's own
    SSL_CERT_FILE, SSL_CERT_DIR  the authorities to trust for -c, instead of the system's

FILES
    dir/kisses   of -s: a line for each server, with its address, until which Unix second it
                 is not to be asked, the seconds of that rest, and the word
    dir/leap     of -s, on such a day only: the Unix second after the leap second, and +1 or -1

EXIT STATUS
    0 measured; 100 wrong usage; 111 no usable answer, refused, or a system error

SEE ALSO
    taiclock, clockview, clockadd, clockspeed, clockctl
"""
import collections
import os
import select
import socket
import struct
import sys
import time

PROGRAM = "sntpclock"
USAGE = "sntpclock [-46f] [-r exchanges] [-t ms] [-T ms] [-h ms] [-e ms] [-l days] [-p port] [-v n] " \
        "[-k file -K id] [-s dir] [-c url]... host..."

# ==== shared: messages, TAI64NA, clock scale, leap seconds (the same bytes in every script) ====
# The file's second line is sh.  It starts Python isolated, so that neither PYTHONPATH nor the current
# directory can inject code, and has it compile the file as a string, since of a program that is a file
# it would keep the syntax tree, some 3 MB, to the end.
#
# An adjustment is real time minus system clock.  A label is an absolute TAI time.  Both are
# seconds in two's complement, nanoseconds and attoseconds, the fraction always counted upwards.
TAI64NA = struct.Struct(">qII")
LABEL_ZERO_SEC = 2**62  # the seconds of the label of 1970-01-01 00:00:00 TAI
LEAP_FILES = ("/usr/local/etc/leapsecs.dat", "/etc/leapsecs.dat", "/usr/share/zoneinfo/leap-seconds.list")
# The days since 1970-01-01 that began right after a leap second; none is announced after the last.
LEAP_DAYS = (912, 1096, 1461, 1826, 2191, 2557, 2922, 3287, 3652, 4199, 4564, 4929, 5660, 6574, 7305,
             7670, 8217, 8582, 8947, 9496, 10043, 10592, 13149, 14245, 15522, 16617, 17167)
BEFORE_LEAPS = (-2**63, 10)  # TAI - UTC was 10 s in 1972, and by djb's convention ever before


def complain(kind, text):
    """One line on stderr, `PROGRAM: kind: text`; a stderr that can't take it is no reason to stop."""
    try:
        os.write(2, ("%s: %s: %s\n" % (PROGRAM, kind, text)).encode(errors="replace"))
    except OSError:
        pass


def emit(data):
    """All of the bytes to stdout."""
    while data:
        data = data[os.write(1, data):]


def emit_manual():
    """The docstring but for its first line, which starts Python."""
    emit(__doc__.partition("\n")[2].encode())


def reason(err):
    """What an exception says, without its number and path."""
    return getattr(err, "strerror", None) or str(err)


def pack(atto):
    """Signed attoseconds -> 16 bytes of TAI64NA."""
    nano, atto = divmod(atto, 10**9)
    return TAI64NA.pack(*divmod(nano, 10**9), atto)


def unpack(packet):
    """16 bytes of TAI64NA, or 12 of TAI64N -> signed attoseconds, exact; ValueError when they are neither."""
    if len(packet) not in (12, 16):
        raise ValueError("%d bytes, not 16" % len(packet))
    sec, nano, atto = TAI64NA.unpack(packet.ljust(16, b"\0"))
    if max(nano, atto) >= 10**9:
        raise ValueError("not a TAI64NA packet")
    return (sec * 10**9 + nano) * 10**9 + atto


def parse_leap_table(data):
    """A leapsecs.dat or leap-seconds.list -> (rows, expiry in Unix seconds or None); ValueError if damaged.

    A row is (first UTC second as Unix counts, TAI - UTC from then on), oldest first.
    """
    rows, expiry = [BEFORE_LEAPS], None
    if data and len(data) % 8 == 0 and data[0] == 0x40:  # djb's: the TAI64 label of each 23:59:60
        for count, (label,) in enumerate(struct.iter_unpack(">Q", data)):
            rows.append((label - LABEL_ZERO_SEC - 10 - count, 11 + count))
    else:  # NTP's: seconds since 1900 and TAI - UTC, the first row being 1972-01-01 and 10
        for line in data.decode("ascii").splitlines():
            words = line.partition("#")[0].split()
            if line.startswith("#@"):
                expiry = int(line[2:]) - 2208988800
            elif words:
                rows.append((int(words[0]) - 2208988800, int(words[1])))
        if rows.pop(1)[1] != 10:
            raise ValueError
    for (start, offset), (next_start, next_offset) in zip(rows, rows[1:]):
        if next_start <= start or next_start % 86400 or abs(next_offset - offset) != 1:
            raise ValueError
    return rows, expiry


def read_leap_table():
    """-> (rows, expiry or None, the file's name) of the first table that can be read, else of the one
    built in; ValueError when the first one is damaged: a wrong table is worse than none."""
    for path in (os.environ.get("LEAPSECS", ""),) + LEAP_FILES:
        try:
            with open(path, "rb") as file:
                data = file.read(65536)  # the real ones have 216 and 5000 bytes
        except OSError:
            continue
        try:
            return parse_leap_table(data) + (path,)
        except (ValueError, IndexError):
            raise ValueError("leap second table %s is damaged" % path) from None
    return [BEFORE_LEAPS] + [(day * 86400, 11 + n) for n, day in enumerate(LEAP_DAYS)], None, "built in"


def clock_table(leap_rows):
    """The rows of the system clock itself: on the utc scale it is off TAI by the leap seconds so far, on
    the tai scale always by 10 s.  CLOCK_SCALE tells, else the time zone: a right/ one has 23:59:60."""
    scale = os.environ.get("CLOCK_SCALE") or ("tai" if time.localtime(78796800).tm_sec == 60 else "utc")
    if scale not in ("tai", "utc"):
        raise ValueError("CLOCK_SCALE is neither utc nor tai")
    return leap_rows if scale == "utc" else [BEFORE_LEAPS]


def to_tai(clock_ns, rows):
    """Nanoseconds of the clock with that table -> nanoseconds of TAI since 1970-01-01 00:00:00 TAI."""
    return clock_ns + next(offset for start, offset in reversed(rows) if clock_ns >= start * 10**9) * 10**9


def from_tai(tai_ns, rows):
    """The inverse; within a leap second the clock shows 23:59:59 again, as kernels do."""
    for (start, offset), (_, offset_before) in zip(rows[:0:-1], rows[-2::-1]):
        if tai_ns >= (start + min(offset, offset_before)) * 10**9:
            return tai_ns - offset * 10**9
    return tai_ns - 10 * 10**9
# ==== end shared ====


# ==== shared with some: measurement (the same bytes in each script that has it) ====
# An exchange: a query leaves at t0 and its answer comes at t1 by the system clock, and between
# them the server's clock showed T2 <= T3.  It proves T3 - t1 <= offset <= T2 - t0.
# All times are integer nanoseconds; the servers' are TAI, and ours become TAI when they meet.
LETTERS = "46fe:h:l:p:r:t:v:T:"
COUNTER = getattr(time, "CLOCK_MONOTONIC_RAW", time.CLOCK_MONOTONIC)  # the former is never slewed nor set
COUNTER_PPM = 500  # a counter is not further off than this, for no kernel's clock could make up for it
READING_NS = 1000  # the clock and the counter are read this close to each other
QUEUED = 2  # an exchange of this times the least delay waited in some queue: its range says nothing more
MOST_ADDRESSES = 4  # of one name: the least with which three still outvote one
# What Python's socket module lacks of Linux's <linux/net_tstamp.h> and <asm-generic/socket.h>.
SO_ATTACH_FILTER, SO_TIMESTAMPNS, SO_TIMESTAMPING = 26, 35, 37
TX_SOFTWARE, RX_SOFTWARE, REPORT_SOFTWARE = 2, 8, 16
TIMESPEC = struct.Struct("@ll")
FILTER_STEP = struct.Struct("=HBBI")  # <linux/filter.h>: code, steps to skip if so and if not, number
LOAD_WORD, JUMP_IF_EQUAL, PASS_BYTES = 0x20, 0x15, 0x06
UDP_HEADER_BYTES = 8

# T2 and T3 in TAI, each rounded so that the range holds; how far the server may be off; more to show of it;
# whether it says that the UTC day or month ends with a second more (1), less (-1) or neither.
Answer = collections.namedtuple("Answer", "received_ns sent_ns distance_ns about leap", defaults=(0,))


class Dismissed(Exception):
    """(text, may its earlier answers be used): the server does not want to be asked."""


def read_clocks():
    """-> (system clock, counter), read together; again when the scheduler came between."""
    best_ns = None
    for _ in range(5):
        before_ns = time.clock_gettime_ns(COUNTER)
        clock_ns = time.time_ns()
        after_ns = time.clock_gettime_ns(COUNTER)
        if best_ns is None or after_ns - before_ns < best_ns:
            best_ns, best = after_ns - before_ns, (clock_ns, (before_ns + after_ns) // 2)
        if best_ns <= READING_NS:
            break
    return best


def enable_kernel_stamps(sock):
    """Have the kernel stamp what arrives, and what leaves where it can; user-space stamps do elsewhere."""
    if sys.platform.startswith("linux"):
        for option, value in ((SO_TIMESTAMPING, TX_SOFTWARE | RX_SOFTWARE | REPORT_SOFTWARE),
                              (SO_TIMESTAMPNS, 1)):
            try:
                return sock.setsockopt(socket.SOL_SOCKET, option, value)
            except OSError:
                continue


def kernel_stamp(ancillary):
    """What recvmsg() got beside a packet -> the kernel's stamp of it, in ns of the system clock, or None."""
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind in (SO_TIMESTAMPNS, SO_TIMESTAMPING):
            sec, nano = TIMESPEC.unpack_from(data)
            return sec * 10**9 + nano or None  # zero: this packet has none
    return None


def admit_only_answers(sock, query):
    """Have the kernel drop what does not repeat the query's cookie.  Who knows our port, and no more, could
    else fill the socket's queue with forgeries, for which the kernel then drops the true answer."""
    if not sys.platform.startswith("linux"):
        return
    at, query_at, size = ECHO
    steps = []
    for i in range(0, size, 4):
        word, = struct.unpack_from(">I", query, query_at + i)
        steps += [(LOAD_WORD, 0, 0, UDP_HEADER_BYTES + at + i), (JUMP_IF_EQUAL, 1, 0, word),
                  (PASS_BYTES, 0, 0, 0)]
    steps.append((PASS_BYTES, 0, 0, 0xffff))
    try:
        import array  # which tells its place in memory
        program = array.array("B", b"".join(FILTER_STEP.pack(*step) for step in steps))
        where = struct.pack("@HP", len(steps), program.buffer_info()[0])
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, where)
    except (ImportError, OSError):  # decode() tells them apart too, only later
        pass


def is_near(family, address):
    """Is that a loopback, private or link-local address?  Its owner is then the one who asks it."""
    packed = socket.inet_pton(family, address.partition("%")[0])
    if packed.startswith(bytes(10) + b"\xff\xff"):  # IPv4 in IPv6
        family, packed = socket.AF_INET, packed[12:]
    high = packed[0] << 8 | packed[1]
    if family == socket.AF_INET:
        return packed[0] in (10, 127) or high in (0xa9fe, 0xc0a8) or high >> 4 == 0xac1
    return packed == bytes(15) + b"\1" or high >> 9 == 0xfc >> 1 or high >> 6 == 0xfe80 >> 6


class Exchange:
    """A query and its answer, and when each passed: by us, with the counter, and by the kernel if it told."""

    def __init__(self, query, sent):
        self.query, self.sent, self.kernel_sent = query, sent, None
        self.answer = self.received = self.kernel_received = None

    def stamps(self):
        """-> (clock, counter) at t0 and at t1.  A kernel's stamp is the truer one, but counts only when it
        lies between ours; the counter that belongs to it is interpolated."""
        (sent_ns, sent_ticks), (received_ns, received_ticks) = self.sent, self.received

        def better(kernel_ns, own):
            if kernel_ns is None or not sent_ns <= kernel_ns <= received_ns:
                return own
            share_ns = (kernel_ns - sent_ns) * (received_ticks - sent_ticks)
            return kernel_ns, sent_ticks + share_ns // max(received_ns - sent_ns, 1)
        return better(self.kernel_sent, self.sent), better(self.kernel_received, self.received)


class Server:
    """One address and the exchanges with it; `due_ns`, by time.monotonic_ns(), is when to act again."""

    def __init__(self, name, settings, family, address):
        self.name, self.settings, self.family, self.address = name, settings, family, address
        self.exchanges, self.current, self.due_ns, self.dismissed = [], None, 0, None
        self.agrees = False  # with the majority
        near = is_near(family, address[0])
        self.left = (10 if near else 4) if settings.exchanges is None else settings.exchanges
        self.pause_ns = (0 if near else 2 * 10**9) if settings.pause_ns is None else settings.pause_ns

    def connect(self):
        self.socket = socket.socket(self.family, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        enable_kernel_stamps(self.socket)
        self.socket.connect(self.address)  # from now on the kernel drops what other addresses send

    def failed(self, why):
        self.settings.warn("unable to ask %s: %s" % (self.name, why))

    def ended(self):
        self.current, self.due_ns = None, time.monotonic_ns() + self.pause_ns

    def act(self, make_query, clocks, end_ns):
        """What is due: to give up the exchange, to begin the next."""
        now_ns = time.monotonic_ns()
        if now_ns < self.due_ns:
            return
        if self.current:
            self.failed("timed out")
            self.ended()
        if now_ns >= end_ns:
            self.left = 0
        elif self.left and now_ns >= self.due_ns:
            self.left -= 1
            self.due_ns = min(now_ns + self.settings.wait_ns, end_ns)
            query = make_query()
            admit_only_answers(self.socket, query)
            self.current = Exchange(query, clocks())
            try:
                self.socket.send(query)
            except OSError as err:
                self.failed(reason(err))
                self.ended()

    def collect_sent_stamps(self):
        """From the socket's error queue, where the kernel puts each packet that left, with its stamp.  It
        does so before the packet is on its way, but a stamp that comes later still finds its exchange."""
        while True:
            try:
                packet, ancillary, _, _ = self.socket.recvmsg(2048, 512, socket.MSG_ERRQUEUE)
            except (AttributeError, OSError):  # not on this system; the queue is empty
                return
            for exchange in self.exchanges + [self.current]:
                if exchange and packet.endswith(exchange.query):
                    exchange.kernel_sent = exchange.kernel_sent or kernel_stamp(ancillary)

    def receive(self, events, received, decode):
        """One datagram at most: `received` tells only of the first that it can't have come later."""
        self.collect_sent_stamps()
        try:
            if not events & select.POLLIN:  # an ICMP error, or nothing but a stamp
                error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error))
                return
            packet, ancillary, _, _ = self.socket.recvmsg(2048, 512)
            answer = self.current and decode(self.current.query, packet)
        except BlockingIOError:  # its checksum was wrong
            return
        except (OSError, ValueError) as err:
            if self.current:
                self.failed(reason(err))
                self.ended()
        except Dismissed as err:
            self.dismissed, usable = err.args
            self.left, self.exchanges = 0, self.exchanges if usable else []
            self.failed(self.dismissed)
            self.ended()
        else:
            if answer:  # else it is none to this query: late, doubled or forged; the right one may yet come
                self.current.answer, self.current.received = answer, received
                self.current.kernel_received = kernel_stamp(ancillary)
                self.exchanges.append(self.current)
                self.ended()


def find_servers(hosts, settings):
    """Names and addresses -> Servers; `0` is this host, as in the original.  OSError when there is none."""
    servers, troubles = [], []
    for host in hosts:
        try:
            # In bytes, since for a str Python loads its megabyte of international names.
            found = socket.getaddrinfo(b"127.0.0.1" if host == "0" else os.fsencode(host), settings.port,
                                       settings.family, socket.SOCK_DGRAM)
        except (OSError, ValueError) as err:  # not found; a zero byte
            troubles.append((host, err))
            continue
        for family, _, _, _, address in found[:MOST_ADDRESSES]:
            name = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
            if host not in (name, "0"):
                name = "%s (%s)" % (host, name)
            if (family, address) not in [(server.family, server.address) for server in servers]:
                servers.append(Server(name, settings, family, address))
    if not servers:
        raise troubles[0][1]
    for host, err in troubles:
        settings.warn("unable to find %s: %s" % (host, reason(err)))
    return servers


def ask(servers, settings, make_query, decode, clocks=read_clocks):
    """All exchanges with all of the servers at once -> (clock, counter) at the end.

    make_query() -> bytes that no other query has; decode(query, packet) -> Answer, or None when the packet
    is no answer to that query, ValueError when it is one that can't be used, Dismissed.
    """
    poller, asked = select.poll(), {}
    for server in servers:
        try:
            server.connect()
        except OSError as err:  # no route, as to IPv6 from where there is none
            server.failed(reason(err))
            continue
        poller.register(server.socket, select.POLLIN)
        asked[server.socket.fileno()] = server
    end_ns = time.monotonic_ns() + settings.total_ns
    while True:
        satisfied = any(server.exchanges and not (server.current or server.left)
                        for server in asked.values())
        for server in asked.values():
            if satisfied and not server.exchanges and not server.current:
                server.left = 0  # it has been silent, and another has told all: one timeout is enough
            server.act(make_query, clocks, end_ns)
        due_ns = [server.due_ns for server in asked.values() if server.current or server.left]
        if not due_ns:
            break
        wait_ns = min(min(due_ns), end_ns) - time.monotonic_ns()
        found = poller.poll(max(-(-wait_ns // 10**6), 0))
        received = clocks()
        for descriptor, events in found:
            asked[descriptor].receive(events, received, decode)
    for server in asked.values():
        server.collect_sent_stamps()
        server.socket.close()
    return clocks()


def gained(then, now):
    """-> (least, most) that real time can have gained on the clock between two (clock, counter).

    It went at the clock's pace, at the counter's, or at one between.  When those are further apart than a
    counter can be off, the clock was slewed or set meanwhile, and only the counter tells.
    """
    elapsed_ns = now[1] - then[1]
    gain_ns = elapsed_ns - (now[0] - then[0])
    spread_ns = elapsed_ns * COUNTER_PPM // 10**6 + READING_NS
    if abs(gain_ns) <= spread_ns:
        return min(0, gain_ns), max(0, gain_ns)
    return gain_ns - spread_ns, gain_ns + spread_ns


def offset_range(exchange, end, local):
    """-> (least, most) that the offset can be at `end`, by that exchange; local() makes TAI of our clock."""
    (t0, t0_ticks), (t1, t1_ticks) = [(local(clock_ns), ticks) for clock_ns, ticks in exchange.stamps()]
    end = local(end[0]), end[1]
    return (exchange.answer.sent_ns - t1 + gained((t1, t1_ticks), end)[0],
            exchange.answer.received_ns - t0 + gained((t0, t0_ticks), end)[1])


def combine(ranges):
    """One server's ranges -> (least, most, do they all agree).

    Their intersection.  Where it is empty the clock was set, or one of them is wrong and it can't be seen
    which: then all that those of the least delay allow.
    """
    least, most = max(lo for lo, _ in ranges), min(hi for _, hi in ranges)
    if least <= most:
        return least, most, True
    shortest_ns = min(hi - lo for lo, hi in ranges if lo <= hi)  # ValueError: each contradicts itself
    ranges = [(lo, hi) for lo, hi in ranges if 0 <= hi - lo <= QUEUED * shortest_ns]
    return min(lo for lo, _ in ranges), max(hi for _, hi in ranges), False


def agreement(ranges):
    """The servers' ranges -> (least, most, how many agree): Marzullo's, from the first to the last point
    that is in the most of them."""
    def votes(point):
        return sum(lo <= point <= hi for lo, hi in ranges)
    most_votes = max(votes(lo) for lo, _ in ranges)
    return (min(lo for lo, _ in ranges if votes(lo) == most_votes),
            max(hi for _, hi in ranges if votes(hi) == most_votes), most_votes)


def describe(range_ns):
    return "offset %+.9f s, bound %.9f s" % (sum(range_ns) / 2e9, (range_ns[1] - range_ns[0]) / 2e9)


def weigh(server, settings, end, local):
    """One server's exchanges -> (least, most) of the offset, or None when they are not to be used."""
    if not server.exchanges:
        return None
    try:
        least, most, agree = combine([offset_range(exchange, end, local) for exchange in server.exchanges])
    except ValueError:
        server.failed("it says that its answers took longer than we waited for them")
        return None
    if not agree:
        settings.warn("%s: the exchanges contradict each other, taking those of least delay; was a clock set?"
                      % server.name)
    if settings.verbosity >= 2:
        delays_ns = [t1 - t0 - (exchange.answer.sent_ns - exchange.answer.received_ns)
                     for exchange in server.exchanges for (t0, _), (t1, _) in [exchange.stamps()]]
        about = server.exchanges[-1].answer.about
        complain("info", "%s: %s, delay %.9f s%s"
                 % (server.name, describe((least, most)), min(delays_ns) / 1e9, about))
    if settings.limit_ns and abs(least + most) > 2 * settings.limit_ns and not settings.force:
        server.failed("its time is %.1f days away" % (abs(least + most) / 2 / 86400e9))
        return None
    return least, most


def conclude(servers, settings, end, local):
    """-> (least, most) of the offset; ValueError when that can't be told well enough."""
    found = [(server, weigh(server, settings, end, local)) for server in servers]
    found = [(server, range_ns) for server, range_ns in found if range_ns]
    if not found:
        dismissed = [server.dismissed for server in servers if server.dismissed]
        raise ValueError(dismissed[0] if dismissed else "time uncertainty too large")
    if len(found) > 1:  # good servers still differ, by as much as each may be off true time
        distances_ns = [server.exchanges[-1].answer.distance_ns for server, _ in found]
        found = [(server, (lo - distance_ns, hi + distance_ns))
                 for (server, (lo, hi)), distance_ns in zip(found, distances_ns)]
    least, most, votes = agreement([range_ns for _, range_ns in found])
    if 2 * votes <= len(found):
        raise ValueError("no majority of the servers agrees")
    for server, (lo, hi) in found:
        server.agrees = lo <= most and least <= hi
        if not server.agrees:
            settings.warn("%s is a falseticker: %s" % (server.name, describe((lo, hi))))
    if settings.verbosity >= 2:
        complain("info", "result: " + describe((least, most)))
    bound_ns = (most - least) / 2
    if settings.most_error_ns is not None and bound_ns > settings.most_error_ns and not settings.force:
        raise ValueError("time uncertainty too large, %.6f s" % (bound_ns / 1e9))
    return least, most


def split_options(words, letters):
    """getopt.getopt(words, letters, ["help"]), which would load half a megabyte to translate its errors."""
    options, words = [], list(words)
    while words and words[0].startswith("-") and words[0] != "-":
        word = words.pop(0)
        letter, rest = word[1], word[2:]
        if word == "--":
            break
        if word == "--help":
            options.append((word, ""))
        elif letter + ":" in letters and (rest or words):
            options.append(("-" + letter, rest or words.pop(0)))
        elif letter in letters.replace(":", "") and letter + ":" not in letters:
            options.append(("-" + letter, ""))
            words[:0] = ["-" + rest] * bool(rest)
        else:
            raise ValueError
    return options, words


class Settings:
    """The command line; ValueError or OverflowError when it is wrong."""

    def __init__(self, words, port, letters=""):
        self.options, self.hosts = split_options(words, LETTERS + letters)
        options = dict(self.options)

        def number(letter, default, unit=1, least=0):
            if letter not in options:
                return default
            value = round(float(options[letter]) * unit)
            if value < least:
                raise ValueError
            return value
        self.help, self.force = "--help" in options, "-f" in options
        self.exchanges = number("-r", None, least=1)
        self.wait_ns, self.total_ns = number("-t", 10**9, 10**6), number("-T", 10 * 10**9, 10**6)
        self.pause_ns, self.most_error_ns = number("-h", None, 10**6), number("-e", None, 10**6)
        self.limit_ns = number("-l", 2 * 86400 * 10**9, 86400 * 10**9)
        self.port, self.verbosity = number("-p", port, least=1), number("-v", 1)
        self.family = {(True, False): socket.AF_INET, (False, True): socket.AF_INET6}.get(
            ("-4" in options, "-6" in options), socket.AF_UNSPEC)
        if self.port > 65535 or not self.hosts and not self.help:
            raise ValueError

    def warn(self, text):
        if self.verbosity >= 1:
            complain("warning", text)
# ==== end shared with some ====


# flags (leap indicator, version, mode), stratum, poll, precision, root delay, root dispersion,
# reference id, and the stamps reference, originate, receive, transmit; fixed point, 16.16 and 32.32
NTP = struct.Struct(">BBbbII4sQQQQ")
ECHO = 24, 40, 8  # an answer has there (originate) the bytes that the query has there (transmit), so many
MAC_BYTES = 20  # of a digest: NTPv4 cuts longer ones, which could be taken for extension fields
KEY_TYPES = ("MD5", "SHA1", "SHA256", "SHA384", "SHA512")
NTP_UNIX_SEC = (70 * 365 + 17) * 86400  # from 1900 to 1970
RELEASE_SEC = 1793491200  # 2026-11-01: no answer can be from long before this program
REST_SEC = {"RATE": 1024, "DENY": 86400, "RSTR": 86400}  # after a kiss-o'-death, twice as long after the next
MOST_REST_SEC = 30 * 86400
NO_CHECK_TIME = 0x200000  # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which ssl has no name
HTTP_DATE = "%a, %d %b %Y %H:%M:%S GMT"  # no program calls setlocale(), so that the names are English
MOST_HTTPS_SEC = 2  # who holds up the answer weakens what its Date, true for a second, tells by as much
MOST_DISTANCE_NS = 1500 * 10**6  # NTP's own limit (MAXDIST): a server further off does not know the time


def make_query():
    """Client mode, version 4; the random transmit stamp says nothing of our clock and can't be guessed."""
    return NTP.pack(4 << 3 | 3, 0, 0, 0, 0, 0, bytes(4), 0, 0, 0, int.from_bytes(os.urandom(8), "big"))


def stamp_ns(stamp, pivot_sec):
    """An NTP stamp -> its Unix time in ns, rounded down, in the era that brings it nearest to pivot_sec."""
    sec = (stamp >> 32) - NTP_UNIX_SEC
    sec += (pivot_sec - sec + 2**31) >> 32 << 32
    return sec * 10**9 + ((stamp & 0xffffffff) * 10**9 >> 32)


def decode_answer(query, packet, pivot_sec, authentic=None):
    """-> Answer in UTC as Unix counts it, None when that is no answer to this query; ValueError, Dismissed.
    authentic(packet) tells whether its MAC is right."""
    if len(packet) < NTP.size:
        return None
    flags, stratum, _, _, delay, dispersion, reference, _, originate, received, sent = NTP.unpack_from(packet)
    if originate != NTP.unpack_from(query)[-1]:
        return None
    if authentic and not authentic(packet):
        raise ValueError("answer not authenticated with the key")
    leap, version, mode = flags >> 6, flags >> 3 & 7, flags & 7
    if mode not in (2, 4) or version == 0:
        raise ValueError("answer of mode %d, version %d" % (mode, version))
    word = "".join(chr(byte) if 32 < byte < 127 else "?" for byte in reference.rstrip(b"\0"))
    if stratum == 0 and word in REST_SEC:
        raise Dismissed("kiss-o'-death " + word, word == "RATE")
    if stratum == 0 and word:
        raise ValueError("stratum 0, %s" % word)
    if leap == 3 or not 1 <= stratum <= 15:
        raise ValueError("the server is not synchronised")
    if not received or not sent:
        raise ValueError("answer without time")
    distance_ns = (delay // 2 + dispersion) * 10**9 >> 16
    if distance_ns > MOST_DISTANCE_NS:
        raise ValueError("the server is up to %.1f s off" % (distance_ns / 1e9))
    received_ns, sent_ns = stamp_ns(received, pivot_sec), stamp_ns(sent, pivot_sec)
    if sent_ns < received_ns:
        raise ValueError("answer sent before the query came")
    about = ", stratum %d, reference %s" % (stratum, reference.hex())
    # both times rounded to the safe side
    return Answer(received_ns + 1, sent_ns, distance_ns, about, (0, 1, -1)[leap])


def read_key(path, ident):
    """-> (name of the hash, key) of chrony's key file; OSError, ValueError."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o007:
            raise ValueError("others can read or write it")
        lines = file.read(10**6).decode("latin-1").splitlines()
    for line in lines:
        words = line.split()
        if len(words) not in (2, 3) or words[0] != str(ident):  # a comment, another key
            continue
        kind, key = words[1:] if len(words) == 3 else ("MD5", words[1])
        if kind not in KEY_TYPES:
            raise ValueError("it is of type %s, and only %s will do" % (kind, ", ".join(KEY_TYPES)))
        if key.startswith("HEX:"):
            return kind, bytes.fromhex(key[4:])
        return kind, key[6 if key.startswith("ASCII:") else 0:].encode("latin-1")
    raise ValueError("it is not there")


class Signer:
    """NTP's MAC: the number of the key and the hash of key and message."""

    def __init__(self, ident, kind, secret):
        import hashlib  # here, since few need it
        self.ident, self.hash = struct.pack(">I", ident), hashlib.new(kind, secret)  # ValueError: FIPS mode

    def mac(self, message):
        digest = self.hash.copy()
        digest.update(message)
        return self.ident + digest.digest()[:MAC_BYTES]

    def authentic(self, packet):
        import hmac
        return hmac.compare_digest(packet[NTP.size:], self.mac(packet[:NTP.size]))


def replace_file(path, text):
    """Write a file whole; the temporary one is always new, so that no planted link is followed."""
    temporary = path + ".tmp"
    try:
        os.unlink(temporary)
    except FileNotFoundError:
        pass
    with open(temporary, "x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def announced_leap(servers, now_sec):
    """What dir/leap is to hold by the true time now; empty unless a leap second is announced for today."""
    midnight_sec = (now_sec // 86400 + 1) * 86400
    leaps = [server.exchanges[-1].answer.leap for server in servers if server.agrees]
    if time.gmtime(midnight_sec)[1:3] in ((1, 1), (7, 1)):
        for sign in (1, -1):
            if 2 * leaps.count(sign) > len(leaps):
                return "%d %+d\n" % (midnight_sec, sign)
    return ""


def keep_leap(folder, text, settings):
    path = os.path.join(folder, "leap")
    try:
        if text:
            replace_file(path, text)
        elif os.path.lexists(path):
            os.unlink(path)
    except OSError as err:
        settings.warn("unable to write %s: %s" % (path, reason(err)))


class Kisses:
    """The file of the servers that are not to be asked; it survives us, for a supervisor starts the next.
    `known` is {address: (until Unix second, seconds of rest, word)}."""

    def __init__(self, folder):
        self.path, self.known = os.path.join(folder, "kisses"), {}
        try:
            with open(self.path, opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)) as file:
                for line in file:
                    address, until_sec, rest_sec, word = line.split()
                    self.known[address] = int(until_sec), int(rest_sec), word
        except (FileNotFoundError, ValueError):  # a damaged line ends it
            pass

    def awake(self, servers, now_sec):
        """Those that may be asked; ValueError when none may."""
        awake = []
        for server in servers:
            until_sec, rest_sec, word = self.known.get(server.address[0], (0, 0, ""))
            if now_sec < until_sec <= now_sec + rest_sec:  # else it is over, or the clock was set back
                why = "kiss-o'-death %s, not to be asked for another %d s" % (word, until_sec - now_sec)
                server.failed(why)
            else:
                awake.append(server)
        if not awake:
            raise ValueError(why)
        return awake

    def remember(self, servers, settings, now_sec):
        """Those that were asked; the file is replaced whole."""
        before = dict(self.known)
        for server in servers:
            address = server.address[0]
            if server.dismissed:
                word = server.dismissed.split()[-1]
                _, rest_sec, _ = self.known.get(address, (0, REST_SEC[word] // 2, word))
                rest_sec = min(2 * rest_sec, MOST_REST_SEC)
                self.known[address] = now_sec + rest_sec, rest_sec, word
            elif server.exchanges:
                self.known.pop(address, None)
        if self.known == before:
            return
        try:
            replace_file(self.path, "".join("%s %d %d %s\n" % (address, *kiss)
                                            for address, kiss in self.known.items()))
        except OSError as err:
            settings.warn("unable to write %s: %s" % (self.path, reason(err)))


def http_date(answer):
    """The bytes of an HTTP answer -> Unix second of its Date; ValueError."""
    import calendar
    head, end, _ = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    if not end or not status.startswith("HTTP/1."):
        raise ValueError("no HTTP answer, or not the whole head of one")
    dates = [line[5:].strip(" \t") for line in lines if line[:5].lower() == "date:"]
    if len(dates) != 1:
        raise ValueError("answer with %d Dates" % len(dates))
    try:
        date_sec = calendar.timegm(time.strptime(dates[0], HTTP_DATE))
    except ValueError:  # its text has all that came
        date_sec = 0
    # and back, since strptime() knows no 30 February and takes other spaces and a second 61
    if time.strftime(HTTP_DATE, time.gmtime(date_sec)) != dates[0]:
        raise ValueError("answer with a Date that is none")
    return date_sec


def validity(certificate):
    """What ssl tells of a certificate -> the Unix seconds from and to which it is valid; ValueError."""
    import ssl
    return tuple(ssl.cert_time_to_seconds(certificate[name]) for name in ("notBefore", "notAfter"))


def ask_https(url, timeout_sec, now_ns=time.time_ns):
    """-> (Unix second of its Date, our clock before and after in ns, [(from, to) of each certificate]).

    The certificates are verified but for their time, which the result has to judge.  OSError, ValueError.
    """
    import re
    import ssl
    parts = re.fullmatch(r"https://(?:\[([0-9A-Fa-f:.]+)\]|([0-9A-Za-z.-]+))(?::([0-9]{1,5}))?(/[!-~]*|)",
                         url)
    if not parts or int(parts.group(3) or 443) > 65535:
        raise ValueError("not a https:// address")
    host = parts.group(1) or parts.group(2)
    context = ssl.create_default_context()
    context.verify_flags |= NO_CHECK_TIME
    end_sec = time.monotonic() + timeout_sec

    def left_sec():
        if time.monotonic() >= end_sec:
            raise TimeoutError("timed out")
        return end_sec - time.monotonic() + 1e-6  # zero would be no limit
    plain = socket.create_connection((host, int(parts.group(3) or 443)), timeout_sec)
    with plain:
        plain.settimeout(left_sec())
        with context.wrap_socket(plain, server_hostname=host) as tls:
            end_sec = min(end_sec, time.monotonic() + MOST_HTTPS_SEC)
            before_ns = now_ns()
            tls.sendall(("HEAD %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n"
                         % (parts.group(4) or "/", url.split("/")[2])).encode())
            answer = b""
            while b"\r\n\r\n" not in answer and len(answer) < 65536:
                tls.settimeout(left_sec())
                more = tls.recv(65536)
                if not more:
                    break
                answer += more
            after_ns = now_ns()
            try:  # the authorities' too; no public name for it before Python 3.13
                certificates = [certificate.get_info() for certificate in tls._sslobj.get_verified_chain()]
            except AttributeError:  # before Python 3.10
                certificates = [tls.getpeercert()]
    return http_date(answer), before_ns, after_ns, list(map(validity, certificates))


def disagreement(offset_range_ns, answer, utc):
    """What is wrong with the offset, by an ask_https() answer, or None; utc() makes Unix time of our clock
    and an offset."""
    date_sec, before_ns, after_ns, validities = answer
    least_ns, most_ns = utc(before_ns, offset_range_ns[0]), utc(after_ns, offset_range_ns[1])
    if most_ns < date_sec * 10**9 or (date_sec + 1) * 10**9 <= least_ns:  # a Date is true for a second
        return "it is %+.0f s from what was measured" % (date_sec + 0.5 - (least_ns + most_ns) / 2e9)
    if any(most_ns < since * 10**9 or until * 10**9 < least_ns for since, until in validities):
        return "its certificate is not valid at the time measured"
    return None


def confirm(urls, offset_range_ns, settings, utc):
    """ValueError unless one of the HTTPS servers confirms the offset and none of them contradicts it."""
    confirmed = False
    for url in urls:
        try:
            answer = ask_https(url, settings.total_ns / 1e9)
        except (OSError, ValueError) as err:
            settings.warn("unable to ask %s: %s" % (url, reason(err)))
            continue
        contradiction = disagreement(offset_range_ns, answer, utc)
        if contradiction:
            raise ValueError("%s contradicts: %s" % (url, contradiction))
        confirmed = True
    if urls and not confirmed:
        raise ValueError("no HTTPS server confirms it")


def main(argv):
    try:
        settings = Settings(argv[1:], 123, "c:k:K:s:")
        options = dict(settings.options)
        ident = int(options.get("-K", 0))
        if ("-k" in options) is not (ident > 0) or not 0 <= ident < 2**32:
            raise ValueError
    except (OverflowError, ValueError):
        complain("usage", USAGE)
        return 100
    try:
        doing = "write output"
        if settings.help:
            emit_manual()
            return 0
        doing = "read leap seconds"
        leap_rows, expiry, source = read_leap_table()
        clock_rows = clock_table(leap_rows)
        # on the utc scale they cancel; of the system's own table the daemons tell, once
        if clock_rows is not leap_rows and source != LEAP_FILES[-1] and expiry and expiry < time.time():
            settings.warn("the leap second table has expired")
        signer = kisses = None
        if ident:
            doing = "take key %d from %s" % (ident, options["-k"])
            signer = Signer(ident, *read_key(options["-k"], ident))
        if "-s" in options:
            doing = "read %s/kisses" % options["-s"]
            kisses = Kisses(options["-s"])

        def query():
            message = make_query()
            return message + signer.mac(message) if signer else message

        def decode(query, packet):
            pivot_sec = max(int(time.time()), RELEASE_SEC)
            answer = decode_answer(query, packet, pivot_sec, signer and signer.authentic)
            return answer and answer._replace(received_ns=to_tai(answer.received_ns, leap_rows),
                                              sent_ns=to_tai(answer.sent_ns, leap_rows))

        def local(clock_ns):
            return to_tai(clock_ns, clock_rows)
        doing = "find " + ", ".join(settings.hosts)
        servers = find_servers(settings.hosts, settings)
        doing = "get the time from " + ", ".join(settings.hosts)
        if kisses:
            servers = kisses.awake(servers, int(time.time()))
        end = ask(servers, settings, query, decode)
        if kisses:
            kisses.remember(servers, settings, int(time.time()))
        offset_range_ns = conclude(servers, settings, end, local)

        def utc(clock_ns, offset_ns):
            return from_tai(local(clock_ns) + offset_ns, leap_rows)
        urls = [value for letter, value in settings.options if letter == "-c"]
        confirm(urls, offset_range_ns, settings, utc)
        if kisses:
            true_sec = utc(end[0], sum(offset_range_ns) // 2) // 10**9
            keep_leap(options["-s"], announced_leap(servers, true_sec), settings)
        packet = pack(sum(offset_range_ns) * 10**9 // 2)
        doing = "write output"
        emit(packet)
    except (OSError, OverflowError, ValueError, struct.error) as err:
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except KeyboardInterrupt:
        sys.exit(111)
