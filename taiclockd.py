#!/usr/bin/env python3
"""taiclockd - answer TAICLOCK queries with the time

SYNOPSIS
    taiclockd [-r] [-i address] [-p port]

DESCRIPTION
    Answers over UDP, on all IPv4 and IPv6 addresses.  A query is `ctai` and 16 or more bytes
    after it; the reply is the query with `stai` and the TAI64NA label of now in its first 20
    bytes.  What is longer than 256 bytes is answered as its first 256 bytes.  No reply is
    longer than its query, and no reply is answered.

    No client, datagram or network error stops it.  It does not answer, and says why, while its
    clock shows a time before this program's release.

    On Linux it takes up to 64 queries with one system call and answers them with another.
    Their replies carry the same label, read after the last of them came.

    On a host with several addresses a reply leaves from the one that its route prefers.
    Clients ignore a reply from another address than they asked: name those addresses with -i.

OPTIONS
    -i address  serve on this address only; may be given several times
    -p port     serve on this port instead of 4014; 0 takes a free one
    -r          share the port with other taiclockds of the same user that have -r too.  The
                kernel spreads the clients over them: link the service once for each core

OUTPUT
    start: serving on :: port 4014
        `::` takes IPv4 too.  With -r the line ends with `shared with` and who has the port.
    silent: REASON
    answering: the clock can be trusted now
    count: 86400 answered, 2 ignored, 0 refused
        At most once an hour: replies sent; datagrams that were no queries; queries that were
        not answered because of silence, or because the reply could not be sent.

ENVIRONMENT
    CLOCK_SERVE  synced: answer only while the kernel says that its clock is synchronised
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones); without it
                 the time zone tells.  A label is the clock and 37 s, or 10 s for tai
    LISTEN_FDS, LISTEN_PID
                 serve on inherited sockets (descriptor 3 and up, as systemd passes them)
                 instead of those of -i and -p

EXIT STATUS
    100 wrong usage; 111 unable to start; it serves until a signal ends it

SEE ALSO
    taiclock, clockspeed, clockctl
"""
try:  # Ctrl-C ends this program as it ends one in C: without a traceback, even while it loads
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
except KeyboardInterrupt:
    raise SystemExit(130)
import errno
import getopt
import os
import select
import socket
import struct
import sys
import time

PROGRAM = "taiclockd"
USAGE = "taiclockd [-r] [-i address] [-p port]"


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


# ==== shared by some: adjtimex ====
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
    calls = [(TIMEX, libc.adjtimex)]
    if ctypes.sizeof(ctypes.c_long) == 4:
        # clock_adjtime64 by its number, as the libcs disagree on its name; Linux has it from 5.1 on
        number = 4405 if os.uname().machine.startswith("mips") else 405
        calls = [(TIMEX, lambda buffer: libc.syscall(number, 0, buffer)), (TIMEX32, libc.adjtimex)]
    for layout, call in calls:
        buffer = ctypes.create_string_buffer(layout.pack(*(fields.get(name, 0) for name in TIMEX_FIELDS)))
        state = call(buffer)
        if state >= 0:
            return dict(zip(TIMEX_FIELDS, layout.unpack_from(buffer)), state=state)
        if ctypes.get_errno() != errno.ENOSYS:
            break
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
# ==== end shared ====


PORT = 4014
QUERY_MIN, QUERY_MAX = 20, 256  # the original reads 256 bytes of a longer one, and answers those
HEAD = struct.Struct(">4sQII")  # of a reply: `stai` and the label
LABEL_ZERO_SEC = 2**62  # the seconds of the label of 1970-01-01 00:00:00 TAI
STA_UNSYNC = 0x40  # in the status of adjtimex(2): not synchronised
SLOTS = 64  # datagrams in a batch; with more of them the label would be older and the system calls no cheaper
QUEUE_MAX = 4 << 20  # bytes that a burst may take in the kernel, whose own limit is usually lower
PAUSE_SEC = 0.01  # after an error that may come again at once, such as a lack of memory
COUNT_SEC = 3600  # between two lines of counts

# A slot: a datagram, its sender's address, and two of C's struct iovec (address, size): to receive it and
# to send the reply from the same place.
SLOT = struct.Struct("@256s32sPNPN")
NAME_AT, QUERY_IOVEC_AT, REPLY_IOVEC_AT = 256, 288, struct.calcsize("@256s32sPN")
NAME_SIZES = {socket.AF_INET: 16, socket.AF_INET6: 28}  # of struct sockaddr_in and sockaddr_in6
REPLY_SIZE_AT = SLOT.size - (struct.calcsize("@N") if sys.byteorder == "little" else 4)  # its low 32 bits
# C's struct mmsghdr: name, its size; iovecs, their number; control data, its size; flags; the size received.
MMSGHDR = struct.Struct("@PIPNPNi0PI0P")
RECEIVED_AT = struct.calcsize("@PIPNPNi0P")
MSG_WAITFORONE, MSG_DONTWAIT = 0x10000, 0x40  # wait for the first datagram only; for none


def say(word, text):
    """One line for the log; a log that can't take it is no reason to stop."""
    try:
        emit(("%s: %s\n" % (word, text)).encode())
    except OSError:
        pass


def is_query(packets, at, size):
    """Whether the datagram of that size, which lies there, is a query."""
    return size >= QUERY_MIN and packets.startswith(b"ctai", at)


class Clock:
    """The heads of replies, while the system clock can be trusted."""

    def __init__(self, synced_only, offset_sec, now_ns=time.time_ns, kernel=adjtimex):
        self.synced_only, self.now_ns, self.kernel = synced_only, now_ns, kernel
        self.zero_sec = LABEL_ZERO_SEC + offset_sec
        self.judged_sec, self.silence = None, ""

    def head(self):
        """The first bytes of a reply made now; None while the clock can't be trusted."""
        sec, nano = divmod(self.now_ns(), 10**9)
        if sec != self.judged_sec:
            self.judged_sec = sec
            self.judge(sec)
        return None if self.silence else HEAD.pack(b"stai", self.zero_sec + sec, nano, 0)

    def judge(self, sec):
        """Decide whether the clock can be trusted, and say what has changed."""
        before, self.silence = self.silence, self.doubt(sec)
        if self.silence != before:
            say(*("silent", self.silence) if self.silence else ("answering", "the clock can be trusted now"))

    def doubt(self, sec):
        """Why the clock can't be trusted, or nothing."""
        if sec < RELEASE_SEC:
            return "the clock shows a time before this program's release; it was never set"
        try:
            if self.synced_only and self.kernel()["status"] & STA_UNSYNC:
                return "the kernel says that its clock is not synchronised"
        except (AttributeError, ImportError, OSError):  # not Linux; no ctypes; forbidden
            return "the kernel does not say whether its clock is synchronised"
        return ""


class Counts:
    """What became of the datagrams since the last line that told it."""

    def __init__(self, now_sec=time.monotonic):
        self.now_sec, self.due_sec = now_sec, now_sec() + COUNT_SEC
        self.answered = self.ignored = self.refused = 0

    def add(self, received, queries, sent):
        self.answered += sent
        self.ignored += received - queries
        self.refused += queries - sent
        if self.now_sec() >= self.due_sec:
            say("count", "%d answered, %d ignored, %d refused" % (self.answered, self.ignored, self.refused))
            self.answered = self.ignored = self.refused = 0
            self.due_sec = self.now_sec() + COUNT_SEC


class Single:
    """A socket whose datagrams are answered one by one."""

    def __init__(self, sock, wait):
        self.sock, self.fd, self.flags = sock, sock.fileno(), 0 if wait else socket.MSG_DONTWAIT
        self.packet = bytearray(QUERY_MAX)

    def serve(self, clock):
        """Answer what is there -> the numbers of datagrams, of queries among them, and of replies sent."""
        try:
            size, client = self.sock.recvfrom_into(self.packet, QUERY_MAX, self.flags)
        except OSError:
            time.sleep(PAUSE_SEC)
            return 0, 0, 0
        head = clock.head()
        if not is_query(self.packet, 0, size):
            return 1, 0, 0
        if not head:
            return 1, 1, 0
        self.packet[:QUERY_MIN] = head
        try:
            self.sock.sendto(self.packet[:size], socket.MSG_DONTWAIT, client)
        except OSError:  # a client that can't be reached, a firewall, a full buffer
            return 1, 1, 0
        return 1, 1, 1


class Batches:
    """A socket whose datagrams are answered up to SLOTS at a time, by recvmmsg(2) and sendmmsg(2).

    Each datagram is received into a slot of its own and becomes the reply there.  Only the head has to be
    written for each; what else there is to do is done for all of them at once, if all are queries.

    OSError, ImportError, AttributeError where the system can't do that.
    """

    def __init__(self, sock, wait):
        if not sys.platform.startswith("linux"):  # elsewhere the structures differ
            raise OSError(errno.ENOSYS, "not Linux")
        import ctypes  # here, since python3-minimal has none
        libc = ctypes.PyDLL(None)  # keeps Python's lock, as there is one thread: half of a call's cost
        self.recvmmsg, self.sendmmsg = libc.recvmmsg, libc.sendmmsg
        self.fd, self.flags = sock.fileno(), MSG_WAITFORONE if wait else MSG_DONTWAIT
        if self.recvmmsg(self.fd, None, 0, MSG_DONTWAIT, None) != 0:  # of no datagrams: does it exist?
            raise OSError(errno.ENOSYS, "no recvmmsg")
        self.slots = bytearray(SLOTS * SLOT.size)
        self.headers = queries, replies = bytearray(SLOTS * MMSGHDR.size), bytearray(SLOTS * MMSGHDR.size)
        slots_at, queries_at, replies_at = (ctypes.addressof(ctypes.c_char.from_buffer(data))
                                            for data in (self.slots, queries, replies))
        for slot in range(SLOTS):
            at, header = slots_at + slot * SLOT.size, slot * MMSGHDR.size
            name = at + NAME_AT, NAME_SIZES[sock.family]
            SLOT.pack_into(self.slots, slot * SLOT.size, b"", b"", at, QUERY_MAX, at, 0)
            MMSGHDR.pack_into(queries, header, *name, at + QUERY_IOVEC_AT, 1, 0, 0, 0, 0)
            MMSGHDR.pack_into(replies, header, *name, at + REPLY_IOVEC_AT, 1, 0, 0, 0, 0)
        self.queries = ctypes.c_void_p(queries_at)
        self.replies = [ctypes.c_void_p(replies_at + slot * MMSGHDR.size) for slot in range(SLOTS)]
        words = memoryview(self.slots).cast("I")
        self.marks, self.reply_sizes = words[::SLOT.size // 4], words[REPLY_SIZE_AT // 4::SLOT.size // 4]
        self.sizes = memoryview(queries).cast("I")[RECEIVED_AT // 4::MMSGHDR.size // 4]
        self.query_marks = memoryview(b"ctai" * SLOTS).cast("I")
        self.heads = [memoryview(self.slots)[at:at + QUERY_MIN]
                      for at in range(0, len(self.slots), SLOT.size)]

    def serve(self, clock):
        """Answer what is there -> the numbers of datagrams, of queries among them, and of replies sent."""
        received = self.recvmmsg(self.fd, self.queries, SLOTS, self.flags, None)
        if received <= 0:
            time.sleep(PAUSE_SEC)
            return 0, 0, 0
        head = clock.head()
        self.reply_sizes[:] = self.sizes
        usual = (self.marks[:received] == self.query_marks[:received]
                 and min(self.sizes[:received]) >= QUERY_MIN)
        runs = [(0, received)] if usual else self.runs(received)
        for place in self.heads[:received] if head else ():
            place[:] = head
        queries = sent = 0
        for first, end in runs:
            queries += end - first
            sent += self.send(first, end) if head else 0
        return received, queries, sent

    def runs(self, received):
        """(first slot, end) of each run of queries among the datagrams."""
        runs, first = [], 0
        for slot in range(received):
            if not is_query(self.slots, slot * SLOT.size, self.sizes[slot]):
                runs.append((first, slot))
                first = slot + 1
        return runs + [(first, received)]

    def send(self, first, end):
        """Send the replies in these slots -> the number sent."""
        sent = 0
        while first < end:
            done = self.sendmmsg(self.fd, self.replies[first], end - first, MSG_DONTWAIT)
            sent += max(done, 0)
            first += max(done, 1)  # it fails when the first one can't be sent: leave that out
        return sent


def readable(servers):
    """Each as there is something to read, for ever; a lone one at once, as its reading waits."""
    while len(servers) == 1:
        yield servers[0]
    of_fd, poll = {}, select.poll()
    for server in servers:
        of_fd[server.fd] = server
        poll.register(server.fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            yield of_fd[fd]


def serve(sockets, clock, counts):
    """Answer for ever."""
    wait = len(sockets) == 1
    try:
        servers = [Batches(sock, wait) for sock in sockets]
    except (AttributeError, ImportError, OSError):
        servers = [Single(sock, wait) for sock in sockets]
    for server in readable(servers):
        counts.add(*server.serve(clock))


def holders(port):
    """What other processes have that UDP port, in words, as far as /proc tells."""
    found = {}
    for table in ("/proc/net/udp", "/proc/net/udp6"):
        try:
            with open(table) as file:
                for row in map(str.split, file.readlines()[1:]):
                    if int(row[1].rpartition(":")[2], 16) == port:
                        found["socket:[%s]" % row[9]] = "a process of user %s" % row[7]
        except OSError:  # no /proc, no IPv6
            pass
    for pid in filter(str.isdecimal, os.listdir("/proc") if found else []):
        try:
            with open("/proc/%s/comm" % pid) as file:
                holder = "%s (process %s)" % (file.read().strip(), pid)
            for fd in os.listdir("/proc/%s/fd" % pid):
                link = os.readlink("/proc/%s/fd/%s" % (pid, fd))
                if link in found:
                    found[link] = holder if int(pid) != os.getpid() else ""
        except OSError:  # it has ended, or is another user's
            pass
    return sorted(set(found.values()) - {""})


def open_socket(address, port, both, shared):
    """A UDP socket bound there, with `both` that of :: takes IPv4 too; OSError has the place as filename."""
    place = "%s port %d" % (address, port)
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE_MAX)
        sock.bind((address, port))
    except OSError as err:
        by = " and ".join(holders(port)) if err.errno == errno.EADDRINUSE else ""
        raise OSError(err.errno, err.strerror + (by and " by " + by), place) from None
    return sock


def open_sockets(addresses, port, shared):
    """One for each address; without any, one that takes all of IPv6 and of IPv4, or where there is no IPv6,
    all of IPv4."""
    if not addresses:
        try:
            return [open_socket("::", port, True, shared)]
        except OSError as err:
            if err.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
    sockets = []
    for address in addresses or ["0.0.0.0"]:
        sockets.append(open_socket(address, port, False, shared))
        port = port or sockets[0].getsockname()[1]
    return sockets


def inherited_sockets():
    """Those passed as systemd does, none if none were; ValueError, OSError if they are of no use here."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=fd) for fd in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))]
    for sock in sockets:
        if sock.type != socket.SOCK_DGRAM or sock.family not in NAME_SIZES:
            raise ValueError("descriptor %d is not a UDP socket" % sock.fileno())
        sock.setblocking(True)
    return sockets


# ==== shared by some: daemons ====
def settle():
    """Be PROGRAM and not python3 in ps and top, and give back what compiling this file took."""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(PROGRAM)
        import ctypes
        ctypes.CDLL(None).malloc_trim(0)  # only glibc has to be told
    except (ImportError, AttributeError, OSError):
        pass
# ==== end shared ====


def main(argv):
    try:
        doing = "write output"
        if begin(argv):
            return 0
        options, operands = getopt.getopt(argv[1:], "i:p:r")
        addresses = [value for option, value in options if option == "-i"]
        options = dict(options)
        port = options.get("-p", str(PORT))
        if operands or not port.isdecimal() or int(port) > 65535:
            raise getopt.GetoptError("")
        doing = "obey CLOCK_SERVE"
        if os.environ.get("CLOCK_SERVE", "") not in ("", "synced"):
            raise ValueError("it is neither synced nor empty")
        doing = "tell the clock's scale"
        clock = Clock(os.environ.get("CLOCK_SERVE") == "synced", scale_offset_sec())
        doing = "take the sockets of LISTEN_FDS"
        sockets = inherited_sockets()
        doing = "bind"
        sockets = sockets or open_sockets(addresses, int(port), "-r" in options)
        where = ", ".join("%s port %d" % sock.getsockname()[:2] for sock in sockets)
        others = " and ".join(holders(sockets[0].getsockname()[1]) if "-r" in options else [])
        doing = "write output"
        emit(("start: serving on %s%s\n" % (where, others and ", shared with " + others)).encode())
    except getopt.GetoptError:
        complain("usage", USAGE)
        return 100
    except (OSError, ValueError) as err:
        where = " " + err.filename if getattr(err, "filename", None) else ""
        complain("fatal", "unable to %s%s: %s" % (doing, where, reason(err)))
        return 111
    clock.head()  # says so if there will be no answers
    settle()
    return serve(sockets, clock, Counts())


if __name__ == "__main__":
    sys.exit(main(sys.argv))
