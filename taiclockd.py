#!/bin/sh
"""exec" python3 -IS -c 'import sys; del sys.argv[0]; __file__ = sys.argv[0]; exec(compile(open(__file__, "rb").read(), __file__, "exec"))' "$0" "$@"
taiclockd - answer TAICLOCK queries with the time

SYNOPSIS
    taiclockd [-i address] [-p port] [-j workers]

DESCRIPTION
    Answers over UDP, on all IPv4 and IPv6 addresses.  A query is `ctai` and 16 to 252 bytes
    more (clients send 28); the reply is the query with `stai` and the TAI64NA label of now in
    its first 20 bytes.  What is longer is answered as its first 256 bytes, what is shorter or
    begins otherwise not at all: no reply is longer than its query, and no reply is answered.

    No client, datagram or network error stops it.  It prints a line when it begins, and while
    it is asked, once an hour at most, one of what it did since the last such line: the queries
    answered, the datagrams that were none, and the queries that it could or would not answer:

        start: serving on 0.0.0.0 port 4014, :: port 4014
        count: 86400 answered, 2 odd, 0 refused

    On Linux it takes and answers up to 64 datagrams with one system call each way, and the
    replies to all of them carry the label of the moment when they had been taken.

    On a host with several addresses a reply leaves from the one that its route prefers, as the
    original's does.  Clients drop what comes from another than they asked: name those by -i.

    It keeps silent, and says so once, while its clock is not to be trusted: while it shows a
    time before this program's release, and with CLOCK_SERVE=synced while the kernel takes it
    for unsynchronized.

    The label is TAI, whichever scale the clock has.  Across a leap second that the kernel
    inserts or leaves out, the labels run on without jump or repeat, by what adjtimex(2) tells;
    without it (no ctypes, not Linux), they repeat the second that the clock repeats.
    The leap second table is read again every hour, and on HUP.  What comes after its end is
    heard from the kernel, which clockspeed keeps informed.

OPTIONS
    -i address  serve on this address alone; given several times, on each
    -p port     serve on this port instead of 4014; 0 takes a free one
    -j workers  share the load among so many processes; 0 starts one for each core.  TERM ends
                them all; if one dies so do the others, for supervise to start them all again

ENVIRONMENT
    CLOCK_SERVE  synced: answer only while the kernel takes its clock for synchronized
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones);
                 without it the time zone tells
    LEAPSECS     a leap second table to use before the system's own
    LISTEN_FDS, LISTEN_PID
                 serve on inherited sockets (descriptor 3 and up, as systemd passes them)
                 instead of those of -i and -p

EXIT STATUS
    100 wrong usage; 111 unable to begin; it serves until a signal ends it

SEE ALSO
    taiclock, clockspeed, clockctl
"""
import errno
import getopt
import os
import select
import signal
import socket
import struct
import sys
import time

PROGRAM = "taiclockd"
USAGE = "taiclockd [-i address] [-p port] [-j workers]"

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


# ==== shared with some: adjtimex (the same bytes in each script that has it) ====
# struct timex with 64-bit fields, as 64-bit libcs and clock_adjtime64 have it, and with 32-bit ones.
TIMEX = struct.Struct("=I4x4qi4x8qi4x5qi44x")
TIMEX32 = struct.Struct("=I4ii8ii5ii44x")
TIMEX_FIELDS = ("modes offset freq maxerror esterror status constant precision tolerance sec frac tick "
                "ppsfreq jitter shift stabil jitcnt calcnt errcnt stbcnt tai").split()


def adjtimex(**fields):
    """adjtimex(2): sets the fields named, returns all of them and `state`; OSError, ImportError (no ctypes).

    `frac` is the kernel's time.tv_usec.  Without fields it reads, for which no privilege is needed.
    """
    import ctypes  # here, since python3-minimal has none
    libc = ctypes.CDLL(None, use_errno=True)

    def call(layout, function, *before):
        buffer = ctypes.create_string_buffer(layout.pack(*(fields.get(name, 0) for name in TIMEX_FIELDS)))
        state = function(*before, buffer)
        if state < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return dict(zip(TIMEX_FIELDS, layout.unpack_from(buffer)), state=state)

    if ctypes.sizeof(ctypes.c_long) == 8:
        return call(TIMEX, libc.adjtimex)
    try:  # the libcs disagree on the name of their 64-bit call: clock_adjtime64 of CLOCK_REALTIME itself
        return call(TIMEX, libc.syscall, 4405 if os.uname().machine.startswith("mips") else 405, 0)
    except OSError as err:
        if err.errno != errno.ENOSYS:  # Linux before 5.1
            raise
    return call(TIMEX32, libc.adjtimex)
# ==== end shared with some ====


PORT = 4014
QUERY_MIN, QUERY_MAX = 20, 256  # the original reads 256 bytes of a longer one, and answers those
RELEASE_SEC = 1793491200  # 2026-11-01; a clock that shows an earlier time was never set
# Of adjtimex(2): today ends with a second more, with one less; it is that one; not synchronized; frac counts
# nanoseconds.
STA_INS, STA_DEL, TIME_OOP, STA_UNSYNC, STA_NANO = 0x10, 0x20, 3, 0x40, 0x2000
LEAP_NEAR_NS = 2 * 10**9  # so near to a leap second the kernel is asked; it leaps a tick late at most
DAY_NS, HOUR_NS, LOOK_NS = 86400 * 10**9, 3600 * 10**9, 600 * 10**9
NEVER_NS = -2**63
PLAIN_SIZE = 32  # of a query, as clients send it
PUT_NANO = struct.Struct(">I").pack_into  # nanoseconds, at 12 of a reply

# C's struct iovec: where, how many bytes.
IOVEC = struct.Struct("@PN")
# And struct mmsghdr: name, its size; iovecs, their number; control data, its size; flags; the size received.
MMSGHDR = struct.Struct("@PIPNPNi0PI0P")
NAME_SIZES = {socket.AF_INET: 16, socket.AF_INET6: 28}  # of struct sockaddr_in and sockaddr_in6
MMSGHDR_SIZE_AT = struct.calcsize("@PIPNPNi0P")
MSG_WAITFORONE, MSG_DONTWAIT = 0x10000, 0x40  # wait for the first datagram only, for none
WORKERS_MAX = 1024
SLOTS = 64  # datagrams per batch: Python takes 1% of a full one; of a larger one the label would be older
ALONE, LONE = 8, 64  # after so many batches of one, so many queries are expected to come one by one
QUEUE_MAX = 4 << 20  # bytes that a burst may take in the kernel; its own limit is lower, as a rule
PAUSE_SEC = 0.01  # after an error that may come again at once, such as a lack of memory


def say(word, text):
    """One line for the log; a log that can't take it is no reason to stop."""
    try:
        emit(("%s: %s\n" % (word, text)).encode())
    except OSError:
        pass


def answer(query, label):
    """The reply to a datagram; None if it is not a query."""
    if len(query) < QUERY_MIN or query[:4] != b"ctai":
        return None
    return b"stai" + label + query[20:QUERY_MAX]


def shared_bytes(size):
    """Memory that workers share; without mmap, as in python3-minimal, each has and tells its own."""
    try:
        import mmap
        return mmap.mmap(-1, size)
    except ImportError:
        return bytearray(size)


class Tally:
    """What the workers did, in memory that they share, so that one line tells it of all."""

    def __init__(self, workers=1, monotonic_ns=time.monotonic_ns):
        self.monotonic_ns = monotonic_ns
        shared = memoryview(shared_bytes(8 * (4 + 3 * workers))).cast("Q")
        self.due_ns, self.told, self.counts = shared[:1], shared[1:4], shared[4:]
        self.due_ns[0] = monotonic_ns() + HOUR_NS
        self.take(0)

    def take(self, worker):
        """Count in this worker's place from now on."""
        self.mine = self.counts[3 * worker:3 * worker + 3]

    def add(self, received, queries, sent):
        self.mine[0] += sent
        if sent < received:
            self.mine[1] += received - queries
            self.mine[2] += queries - sent

    def tell(self):
        """Log the sums, if the last time is an hour ago."""
        if self.monotonic_ns() >= self.due_ns[0]:
            self.due_ns[0] = self.monotonic_ns() + HOUR_NS
            now = [sum(self.counts[kind::3]) for kind in range(3)]
            new = tuple(count - told for count, told in zip(now, self.told))
            self.told[0], self.told[1], self.told[2] = now
            if any(new):
                say("count", "%d answered, %d odd, %d refused" % new)


class Clock:
    """The label of now, from the system clock, cheaply.

    What costs more than an addition is looked up by `look`, and holds while the clock is between since_ns
    and until_ns: for some minutes, or for a second while it depends on the kernel's opinion.
    """

    def __init__(self, synced_only=False, on_look=lambda: None, now_ns=time.time_ns, kernel=adjtimex):
        self.synced_only, self.on_look, self.now_ns, self.kernel = synced_only, on_look, now_ns, kernel
        self.silent, self.said = False, shared_bytes(1)  # workers share `said`, so that one speaks for all
        self.since_ns = self.until_ns = 0
        self.second_ns = NEVER_NS
        self.heard = []  # rows for leap seconds that only the kernel knows of
        self.table_ns = now_ns()
        expiry, source = self.read_table()
        if self.utc and expiry is not None and expiry * 10**9 < self.table_ns:
            complain("warning", "leap second table %s has expired" % source)

    def label(self):
        """16 bytes; None while the clock is not to be trusted.

        It says by second_ns how long the next label differs in its nanoseconds only: while the clock is
        less than a second past that.
        """
        clock_ns = self.now_ns()
        if not self.since_ns <= clock_ns < self.until_ns:
            clock_ns = self.look(clock_ns)
        sec, nano = divmod(clock_ns, 10**9)
        lasts = (sec + 1) * 10**9 <= self.until_ns and not self.silent
        self.second_ns = sec * 10**9 if lasts else NEVER_NS
        if self.silent:
            return None
        return TAI64NA.pack(sec + self.offset_sec, nano, 0)

    def look(self, clock_ns):
        """Look up what `label` needs -> clock_ns, or a truer one where the kernel was asked."""
        self.on_look()
        if not 0 <= clock_ns - self.table_ns < HOUR_NS:
            self.reread(clock_ns)
        if self.utc and clock_ns // 10**9 >= self.covered_sec:
            self.hear(clock_ns // 10**9)
        self.since_ns, self.until_ns = clock_ns, clock_ns + LOOK_NS
        midnight_ns = (clock_ns // DAY_NS + 1) * DAY_NS  # the kernel may be armed late on the day
        if clock_ns < midnight_ns - LEAP_NEAR_NS:
            self.until_ns = min(self.until_ns, midnight_ns - LEAP_NEAR_NS)
        repeated_ns = 0
        rows = self.rows + self.heard
        for leap_ns in (start * 10**9 for start, _ in rows[1:]):
            if clock_ns < leap_ns - LEAP_NEAR_NS:
                self.until_ns = min(self.until_ns, leap_ns - LEAP_NEAR_NS)
            elif clock_ns < leap_ns + LEAP_NEAR_NS:
                self.until_ns = clock_ns  # holds for this label only
                kernel = self.ask_kernel()
                if kernel:  # its clock and state, read as one; in the repeated second the new row counts
                    nano = kernel["frac"] * (1 if kernel["status"] & STA_NANO else 1000)
                    clock_ns = kernel["sec"] * 10**9 + nano
                    repeated_ns = 10**9 if kernel["state"] == TIME_OOP else 0
        shifted_ns = clock_ns + repeated_ns
        self.offset_sec = LABEL_ZERO_SEC + (to_tai(shifted_ns, rows) - shifted_ns) // 10**9
        self.judge(clock_ns)
        if self.table_ns == NEVER_NS:  # a HUP came meanwhile
            self.until_ns = NEVER_NS
        return clock_ns

    def judge(self, clock_ns):
        """Decide whether the clock is to be trusted, and say what has changed."""
        silence = ""
        if clock_ns < RELEASE_SEC * 10**9:
            silence = "the clock was never set, it shows a time before this program's release"
            self.until_ns = min(self.until_ns, RELEASE_SEC * 10**9)
        elif self.synced_only:
            kernel = self.ask_kernel()
            if not kernel or kernel["status"] & STA_UNSYNC:
                silence = "the kernel does not take its clock for synchronized"
            self.until_ns = min(self.until_ns, clock_ns + 10**9)
        self.silent = bool(silence)
        if self.silent != self.said[0]:
            self.said[0] = self.silent
            say(*("silent", silence) if silence else ("answering", "the clock is to be trusted now"))

    def ask_kernel(self):
        """What adjtimex(2) tells; None where it does not exist, or is forbidden, or there is no ctypes."""
        try:
            return self.kernel()
        except (AttributeError, ImportError, OSError):
            return None

    def read_table(self):
        """Read the leap second table -> when it expires or None, its name; ValueError."""
        leap_rows, expiry, source = read_leap_table()
        self.rows = clock_table(leap_rows)
        self.utc = self.rows is leap_rows
        self.covered_sec = max(leap_rows[-1][0], expiry or 0)  # up to there it has them all
        self.heard = [row for row in self.heard if row[0] > self.covered_sec]
        return expiry, source

    def reread(self, clock_ns):
        """Read the leap second table again; a damaged one changes nothing."""
        self.table_ns = clock_ns
        try:
            self.read_table()
        except ValueError as err:
            complain("warning", "unable to read leap seconds: %s" % err)

    def hear(self, now_sec):
        """Learn from the kernel what the table does not reach: a leap second for which it is armed, as
        clockspeed does when the time servers announce one, and one that it went through before this program
        was there.  Of the latter only the usual kind is believed: a kernel that is told a second less than
        the table has it from an old table."""
        kernel = self.ask_kernel()
        if not kernel:
            return
        self.heard = [row for row in self.heard if row[0] <= now_sec]  # what is to come may be taken back
        offset_sec = (self.rows + self.heard)[-1][1]
        midnight_sec = (now_sec // 86400 + 1) * 86400
        sign = {STA_INS: 1, STA_DEL: -1}.get(kernel["status"] & (STA_INS | STA_DEL))
        if sign and time.gmtime(midnight_sec)[1:3] in ((1, 1), (7, 1)):
            self.heard.append((midnight_sec, offset_sec + sign))
        elif kernel["tai"] == offset_sec + 1 and not self.heard and not kernel["status"] & STA_UNSYNC:
            self.heard.append((midnight_sec - 86400, kernel["tai"]))  # some day before

    def expire(self, *_):
        """Have all looked up anew for the next label; a signal handler."""
        self.table_ns = self.until_ns = self.second_ns = NEVER_NS


def open_socket(address, port, shared, both=False):
    """A UDP socket bound there, with `both` that of :: takes IPv4 too; OSError has the place as filename."""
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE_MAX)
            sock.bind((address, port))
        except OSError:
            sock.close()
            raise
    except OSError as err:
        raise OSError(err.errno, err.strerror, "%s port %d" % (address, port)) from None
    return sock


def open_sockets(addresses, port, shared=False):
    """One for each address; without any, as few as take all of IPv4 and of IPv6 where the system has it."""
    if not addresses:
        try:
            return [open_socket("::", port, shared, both=True)]
        except OSError as err:
            if err.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
    sockets = []
    for address in addresses or ("0.0.0.0", "::"):
        try:
            sockets.append(open_socket(address, port, shared))
        except OSError:
            if addresses or not sockets:
                raise
        port = port or sockets[0].getsockname()[1]
    return sockets


def open_socket_sets(addresses, port, workers):
    """The sockets of each worker; with several the kernel shares out the datagrams by SO_REUSEPORT."""
    sets = [open_sockets(addresses, port)]  # not yet with SO_REUSEPORT: fails if another server has the port
    if workers > 1:
        for sock in sets[0]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = sets[0][0].getsockname()[1]
        sets += [open_sockets(addresses, port, shared=True) for _ in range(workers - 1)]
    return sets


def inherited_sockets():
    """Those passed as systemd does, none if none were; ValueError, OSError if they are of no use here."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=fd) for fd in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))]
    for sock in sockets:
        if sock.type != socket.SOCK_DGRAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise ValueError("descriptor %d is not a UDP socket" % sock.fileno())
        sock.setblocking(True)
    return sockets


def places(sock):
    """What a socket serves, as `ADDRESS port N`; two for an IPv6 socket that takes IPv4 too."""
    address, port = sock.getsockname()[:2]
    if address == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return ["0.0.0.0 port %d" % port, ":: port %d" % port]
    return ["%s port %d" % (address, port)]


def readable(descriptors):
    """Each as there is something to read, for ever; a lone one at once, as reading it waits."""
    while len(descriptors) == 1:
        yield descriptors[0]
    poll = select.poll()
    for fd in descriptors:
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            yield fd


def serve_plainly(sockets, clock, tally):
    """Answer one datagram after the other, for ever."""
    of_fd = {sock.fileno(): sock for sock in sockets}
    wait = 0 if len(sockets) == 1 else socket.MSG_DONTWAIT
    for fd in readable(list(of_fd)):
        try:
            query, client = of_fd[fd].recvfrom(QUERY_MAX, wait)
        except BlockingIOError:
            continue
        except OSError:
            time.sleep(PAUSE_SEC)
            continue
        label, sent = clock.label(), 0
        reply = answer(query, label or bytes(16))
        if label and reply:
            try:
                of_fd[fd].sendto(reply, socket.MSG_DONTWAIT, client)
                sent = 1
            except OSError:  # a client that can't be reached, a firewall, a full buffer
                pass
        tally.add(1, 1 if reply else 0, sent)


class Batch:
    """Room for a batch of datagrams and their replies, laid out for recvmmsg(2) and sendmmsg(2).

    Each datagram is received into a slot of its own.  Each reply is sent from the one `head` of 20 bytes
    that all share, and from the rest of the slot as it lies.  So nothing is copied, and if all are what
    clients send, to see that at once is all that is left to Python.
    """

    def __init__(self, name_size, head):
        from ctypes import PyDLL, addressof, byref, c_char
        libc = PyDLL(None)  # keeps Python's lock, as one thread can, and no errno: half of a call's cost
        self.recvmmsg, self.sendmmsg = libc["recvmmsg"], libc["sendmmsg"]
        self.recvmsg, self.sendmsg = libc["recvmsg"], libc["sendmsg"]
        self.buffers = []  # what the kernel knows by address has to stay

        def place(data):
            self.buffers.append(data)
            return addressof(c_char.from_buffer(data))

        def headers(vectors, each):
            """Those of all slots, with so many vectors each, and pointers to them."""
            at, step = place(vectors), each * IOVEC.size
            data = bytearray(b"".join(
                MMSGHDR.pack(names_at + slot * name_size, name_size, at + slot * step, each, 0, 0, 0, 0)
                for slot in range(SLOTS)))
            at = place(data)
            return data, [byref(c_char.from_address(at + slot * MMSGHDR.size)) for slot in range(SLOTS)]

        slots, names = bytearray(SLOTS * QUERY_MAX), bytearray(SLOTS * name_size)
        head_at, slots_at, names_at = place(head), place(slots), place(names)
        starts = range(slots_at, slots_at + len(slots), QUERY_MAX)
        room = bytearray(b"".join(IOVEC.pack(at, QUERY_MAX) for at in starts))
        pieces = bytearray(b"".join(
            IOVEC.pack(head_at, QUERY_MIN) + IOVEC.pack(at + QUERY_MIN, PLAIN_SIZE - QUERY_MIN)
            for at in starts))
        queries, (self.queries, *_) = headers(room, 1)
        _, self.replies = headers(pieces, 2)

        # The sizes and the first words of what was received, for each number of it, and what they are if all
        # of it is plain.
        self.sizes = memoryview(queries).cast("I")[MMSGHDR_SIZE_AT // 4::MMSGHDR.size // 4]
        self.words = memoryview(slots).cast("I")[::QUERY_MAX // 4]
        plain_sizes = memoryview(SLOTS * struct.pack("@I", PLAIN_SIZE)).cast("I")
        plain_words = memoryview(SLOTS * b"ctai").cast("I")
        self.looks = [(self.sizes[:number], plain_sizes[:number], self.words[:number], plain_words[:number])
                      for number in range(SLOTS + 1)]
        self.tail_sizes = memoryview(pieces).cast("N")[3::4]  # of the replies
        self.plain_tail_sizes = memoryview(bytes(self.tail_sizes)).cast("N")
        self.altered = False  # whether tail_sizes are others

    def answer_alone(self, fd, head, clock):
        """Answer plain queries as they come, by the calls for one message, which cost less for one ->
        the size of what came last and is not answered, in the first slot, since it is something else or needs
        a label of another second; -1 for an error, and after some queries for a look at the queue; and the
        number answered."""
        recvmsg, query, sendmsg, reply = self.recvmsg, self.queries, self.sendmsg, self.replies[0]
        words, ctai, now_ns, answered = self.words, self.looks[1][3][0], clock.now_ns, 0
        while answered < LONE:
            size = recvmsg(fd, query, 0)
            nano = now_ns() - clock.second_ns
            if size != PLAIN_SIZE or words[0] != ctai or not 0 <= nano < 1000000000 or self.altered:
                return size, answered
            PUT_NANO(head, 12, nano)
            if sendmsg(fd, reply, MSG_DONTWAIT) < 0:
                return size, answered
            answered += 1
        return -1, answered

    def answer_each(self, fd, first, received, silent=False):
        """Answer the slots from `first` on one by one -> the numbers of queries and of replies sent."""
        sizes, _, words, plain_words = self.looks[received]
        self.tail_sizes[:] = self.plain_tail_sizes
        runs = []  # of slots that hold queries: first, end
        for slot in range(first, received):
            if sizes[slot] >= QUERY_MIN and words[slot] == plain_words[0]:
                self.tail_sizes[slot] = sizes[slot] - QUERY_MIN
                if runs and runs[-1][1] == slot:
                    runs[-1][1] += 1
                else:
                    runs.append([slot, slot + 1])
        self.altered = self.tail_sizes != self.plain_tail_sizes
        queries, sent = sum(end - first for first, end in runs), 0
        for first, end in () if silent else runs:
            while first < end:
                done = self.sendmmsg(fd, self.replies[first], end - first, MSG_DONTWAIT)
                sent += max(done, 0)
                first += max(done, 1)  # it fails when the first can't be sent: pass that over
        return queries, sent


def serve_in_batches(sockets, clock, tally):
    """Answer all that is there at once, for ever; returns where the system can't do that."""
    if not sys.platform.startswith("linux"):  # elsewhere the structures differ
        return
    try:
        import ctypes  # here, since python3-minimal has none
        libc = ctypes.CDLL(None, use_errno=True)
        head = bytearray(b"stai" + (clock.label() or bytes(16)))
        batches = {sock.fileno(): Batch(NAME_SIZES[sock.family], head) for sock in sockets}
    except (AttributeError, ImportError):
        return
    wait = MSG_WAITFORONE if len(sockets) == 1 else MSG_DONTWAIT
    now_ns, alone = clock.now_ns, 0
    for fd in readable(list(batches)):
        batch = batches[fd]
        if alone == ALONE and wait == MSG_WAITFORONE:
            size, answered = batch.answer_alone(fd, head, clock)
            tally.mine[0] += answered
            batch.sizes[0], received = max(size, 0), 1 if size >= 0 else 0
            alone = ALONE - 1
        else:
            received = batch.recvmmsg(fd, batch.queries, SLOTS, wait, None)
        if received <= 0:
            received = libc.recvmmsg(fd, batch.queries, SLOTS, MSG_DONTWAIT, None)  # this one tells why
        if received <= 0:
            if ctypes.get_errno() == errno.ENOSYS:
                return
            if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
                time.sleep(PAUSE_SEC)
            continue
        alone = min(alone + 1, ALONE) if received == 1 else 0

        # Written out, as each call of a function more shows when a lone query wakes a cold cache.
        nano = now_ns() - clock.second_ns
        if 0 <= nano < 1000000000:
            PUT_NANO(head, 12, nano)
        else:
            label = clock.label()
            if not label:
                tally.add(received, batch.answer_each(fd, 0, received, silent=True)[0], 0)
                continue
            head[4:] = label
        sent = 0
        sizes, plain_sizes, words, plain_words = batch.looks[received]
        if sizes == plain_sizes and words == plain_words and not batch.altered:
            sent = batch.sendmmsg(fd, batch.replies[0], received, MSG_DONTWAIT)
            if sent == received:
                tally.mine[0] += sent
                continue
            sent = max(sent, 0)  # it stopped at one that can't be sent
        queries, more = batch.answer_each(fd, sent, received)
        tally.add(received, sent + queries, sent + more)


def serve(sockets, clock, tally):
    serve_in_batches(sockets, clock, tally)
    serve_plainly(sockets, clock, tally)


def supervise(socket_sets, clock, tally):
    """Run a worker for each set of sockets until one dies or a signal ends them all -> exit status."""
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # so that none is missed, they are waited for
    signal.signal(signal.SIGCHLD, lambda *_: None)  # BSDs discard what is ignored, even if waited for
    workers = []
    for worker, sockets in enumerate(socket_sets):
        workers.append(os.fork())
        if not workers[-1]:
            die_with_parent()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            tally.take(worker)
            serve(sockets, clock, tally)
    ended, number = 0, signal.SIGCHLD
    while not ended and number in (signal.SIGCHLD, signal.SIGHUP):
        number = signal.sigwait(signals)
        if number == signal.SIGHUP:
            for pid in workers:
                os.kill(pid, number)
        elif number == signal.SIGCHLD:  # also of a worker that was stopped
            ended = os.waitpid(-1, os.WNOHANG)[0]
    if ended:
        workers.remove(ended)
        complain("fatal", "a worker died")
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    return 111 if ended else 0


def die_with_parent():
    """Have the kernel end this worker when the parent is killed, else it would keep the port."""
    try:
        import ctypes
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (AttributeError, ImportError):
        pass


# ==== shared with some: daemons (the same bytes in each script that has it) ====
def settle():
    """Be PROGRAM and not python3 in ps and top, and give back what compiling this file took."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(PROGRAM)
        import ctypes
        ctypes.CDLL(None).malloc_trim(0)  # only glibc has to be told
    except (ImportError, AttributeError, OSError):
        pass
# ==== end shared with some ====


def whole_number(options, letter, default, most):
    """The option's value; ValueError, with what it may be, unless it is one from 0 to most."""
    value = options.get(letter, str(default))
    if not value.isdecimal() or int(value) > most:
        raise ValueError("%s takes a number from 0 to %d" % (letter, most))
    return int(value)


def main(argv):
    try:
        options, operands = getopt.getopt(argv[1:], "i:p:j:", ["help"])
        addresses = [value for option, value in options if option == "-i"]
        options = dict(options)
        port = whole_number(options, "-p", PORT, 65535)
        workers = whole_number(options, "-j", 1, WORKERS_MAX)
        if operands:
            raise getopt.GetoptError("no operands")
    except getopt.GetoptError:
        complain("usage", USAGE)
        return 100
    except ValueError as err:
        complain("usage", "%s; %s" % (USAGE, err))
        return 100
    try:
        doing = "write output"
        if "--help" in options:
            emit_manual()
            return 0
        doing = "take the sockets of LISTEN_FDS"
        sockets = inherited_sockets()
        workers = workers or os.cpu_count() or 1
        doing = "bind"
        if sockets:
            socket_sets = [sockets] * workers
        else:
            socket_sets = open_socket_sets(addresses, port, workers)
        doing = "obey CLOCK_SERVE"
        if os.environ.get("CLOCK_SERVE", "") not in ("", "synced"):
            raise ValueError("it is neither synced nor empty")
        doing = "read leap seconds"
        tally = Tally(workers)
        clock = Clock(os.environ.get("CLOCK_SERVE") == "synced", tally.tell)
        signal.signal(signal.SIGHUP, clock.expire)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as TERM's, to end it even within a system call
        doing = "write output"
        where = [place for sock in socket_sets[0] for place in places(sock)]
        emit(("start: serving on %s\n" % ", ".join(where)).encode())
        clock.label()  # says if there is none
        settle()
        doing = "start workers"
        if workers > 1:
            return supervise(socket_sets, clock, tally)
    except (OSError, ValueError) as err:
        where = " " + err.filename if getattr(err, "filename", None) else ""
        complain("fatal", "unable to %s%s: %s" % (doing, where, reason(err)))
        return 111
    return serve(socket_sets[0], clock, tally)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except KeyboardInterrupt:
        sys.exit(111)
