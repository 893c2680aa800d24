#!/usr/bin/env python3
"""taiclockd - answer TAICLOCK queries with the time

SYNOPSIS
    taiclockd [-r] [-i address] [-p port]

DESCRIPTION
    Answers over UDP, on all IPv4 and IPv6 addresses.  A query is `ctai` and 16 or more bytes after it;
    the reply is the query, or its first 256 bytes, with `stai` and the TAI64NA label of now in the
    first 20.  No reply is longer than its query, and no reply is answered.  On Linux up to 64 queries
    are answered at once, with the same label, read after the last of them came.

    No client, datagram or network error stops it.  It does not answer, and says why, while its clock
    shows a time before this program's release.

    On a host with several addresses a reply leaves from the one that its route prefers.  Clients ignore
    a reply from another address than they asked: name those addresses with -i.

OPTIONS
    -i address  serve on this address only; may be given several times
    -p port     serve on this port instead of 4014; 0 takes a free one
    -r          share the port with other taiclockds of the same user that have -r too.  The kernel
                spreads the clients over them: link the service once for each core

OUTPUT
    start: serving on :: port 4014
        `::` takes IPv4 too.  Where others have that port as well, as with -r, the line says who.
    taiclockd: info: silent: REASON
    taiclockd: info: answering: the clock can be trusted now
    taiclockd: info: count: 86400 answered, 2 ignored, 0 refused
        At most once an hour: replies sent; datagrams that were no queries; queries that were not
        answered because of silence, or because the reply could not be sent.

ENVIRONMENT
    CLOCK_SERVE  synced: answer only while the kernel says that its clock is synchronised
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones); without it the time
                 zone tells.  A label is the clock and 37 s, or 10 s for tai
    LISTEN_FDS, LISTEN_PID
                 serve on inherited UDP sockets (descriptor 3 and up, as systemd passes them) instead

EXIT STATUS
    100 wrong usage; 111 unable to start; it serves until a signal ends it

SEE ALSO
    taiclock, clockspeed, clockctl
"""
import _signal as signal  # which is there at once: Ctrl-C ends this program as it ends one in C,
signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback, even while the rest is imported
import contextlib
import errno
import getopt
import glob
import os
import select
import socket
import struct
import sys
import time

PROGRAM = "taiclockd"
USAGE = "taiclockd [-r] [-i address] [-p port]"


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


# ==== shared by some: clock scale ====
TAI_MINUS_CLOCK_SEC = {"utc": 37, "tai": 10}  # since 2017; there are no leap seconds any more


def clock_scale():
    """utc or tai, by CLOCK_SCALE, or by the zone: a right/ one has 23:59:60 in June 1972; ValueError."""
    scale = os.environ.get("CLOCK_SCALE") or ("tai" if time.localtime(78796800).tm_sec == 60 else "utc")
    if scale not in TAI_MINUS_CLOCK_SEC:
        raise ValueError("CLOCK_SCALE is neither utc nor tai")
    return scale
# ==== end shared ====


QUERY_MIN, QUERY_MAX = 20, 256  # the original reads 256 bytes of a longer one, and answers those
HEAD = struct.Struct(">4sQII")  # of a reply: `stai` and the label
SLOTS = 64  # datagrams in a batch; with more of them the label would be older and the system calls no cheaper
QUEUE_MAX = 4 << 20  # bytes that a burst may take in the kernel, whose own limit is usually lower
PAUSE_SEC = 0.01  # after an error that may come again at once, such as a lack of memory
COUNT_SEC = 3600  # between two lines of counts

IOVEC = struct.Struct("@PN")  # C's struct iovec: address, size
# C's struct mmsghdr: name, its size; iovecs, their number; control data, its size; flags; the size received.
MMSGHDR = struct.Struct("@PIPNPNi0PI0P")
NAME_SIZE_AT, RECEIVED_AT = struct.calcsize("@P"), struct.calcsize("@PIPNPNi0P")
SLOT_BYTES = QUERY_MAX + 28  # the datagram, and its sender as a struct sockaddr_in6
MSG_WAITFORONE, MSG_DONTWAIT = 0x10000, 0x40  # wait for the first datagram only; for none
TRUSTED = "answering: the clock can be trusted now"


def kernel_state():
    """What adjtimex(2) says of the clock; -1 where that is not Linux, or forbidden, or there is no ctypes."""
    try:
        import ctypes
        return ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(256))  # zeros: it sets nothing
    except (AttributeError, ImportError, OSError):
        return -1


class Clock:
    """The heads of replies, while the system clock can be trusted."""

    def __init__(self, synced_only, offset_sec):
        self.synced_only, self.zero_sec = synced_only, 2**62 + offset_sec  # 2^62 is 1970-01-01 00:00:00 TAI
        self.judged_sec, self.verdict = None, TRUSTED

    def head(self):
        """The first bytes of a reply made now; None while the clock can't be trusted."""
        sec, nano = divmod(time.time_ns(), 10**9)
        if sec != self.judged_sec:
            before, self.judged_sec, self.verdict = self.verdict, sec, self.judge(sec)
            if self.verdict != before:
                complain("info", self.verdict)
        return HEAD.pack(b"stai", self.zero_sec + sec, nano, 0) if self.verdict == TRUSTED else None

    def judge(self, sec):
        """What is to be said of the clock now."""
        if sec < RELEASE_SEC:
            return "silent: the clock shows a time before this program's release; it was never set"
        state = kernel_state() if self.synced_only else 0
        if state == 5:  # TIME_ERROR
            return "silent: the kernel says that its clock is not synchronised"
        return TRUSTED if state >= 0 else "silent: the kernel does not say whether its clock is synchronised"


def answer_one(sock, clock):
    """Take a datagram, answer it -> the numbers of datagrams, of queries among them, and of replies sent."""
    received = query = sent = False
    with contextlib.suppress(OSError):  # nothing came; a client out of reach, a firewall, a full buffer
        packet, client = sock.recvfrom(QUERY_MAX)
        received, head = True, clock.head()
        query = len(packet) >= QUERY_MIN and packet.startswith(b"ctai")
        if head and query:
            sent = sock.sendto(head + packet[QUERY_MIN:], MSG_DONTWAIT, client) > 0
    return received, query, sent


def in_batches(sock):
    """-> an answer_one() for up to SLOTS datagrams at once; OSError, ImportError, AttributeError."""
    import ctypes  # here, since python3-minimal has none
    libc = ctypes.PyDLL(None)  # keeps Python's lock, as there is one thread: half of a call's cost
    recvmmsg, sendmmsg = libc.recvmmsg, libc.sendmmsg
    # elsewhere than on Linux the structures differ; a kernel without the call fails at no datagrams too
    if not sys.platform.startswith("linux") or recvmmsg(sock.fileno(), None, 0, MSG_DONTWAIT, None) != 0:
        raise OSError("no recvmmsg")
    memory = [bytearray(SLOTS * size) for size in (SLOT_BYTES, IOVEC.size, MMSGHDR.size)]
    datagrams, iovecs, headers = memory
    datagrams_at, iovecs_at, headers_at = (
        ctypes.addressof(ctypes.c_char.from_buffer(data)) for data in memory)
    for slot in range(SLOTS):
        at = datagrams_at + slot * SLOT_BYTES
        IOVEC.pack_into(iovecs, slot * IOVEC.size, at, QUERY_MAX)
        MMSGHDR.pack_into(headers, slot * MMSGHDR.size, at + QUERY_MAX, SLOT_BYTES - QUERY_MAX,
                          iovecs_at + slot * IOVEC.size, 1, 0, 0, 0, 0)
    fresh = bytes(iovecs), bytes(headers)
    from_slot = [ctypes.c_void_p(headers_at + slot * MMSGHDR.size) for slot in range(SLOTS)]
    words = memoryview(headers).cast("I")  # one field of all slots:
    received_sizes = words[RECEIVED_AT // 4::MMSGHDR.size // 4]
    name_sizes = words[NAME_SIZE_AT // 4::MMSGHDR.size // 4]
    sizes = memoryview(iovecs).cast("N")[1::2]

    def answer(sock, clock):
        iovecs[:], headers[:] = fresh
        fd = sock.fileno()
        received = max(recvmmsg(fd, from_slot[0], SLOTS, MSG_WAITFORONE, None), 0)
        head, queries = clock.head(), 0
        for slot, size in enumerate(received_sizes[:received]):
            at = slot * SLOT_BYTES
            query = size >= QUERY_MIN and datagrams.startswith(b"ctai", at)
            queries += query
            if head and query:
                datagrams[at:at + QUERY_MIN] = head
                sizes[slot] = size
            else:
                name_sizes[slot] = 0  # what has no address is not sent
        slot = sent = 0
        while slot < received:  # a call ends before what can't be sent, and fails if that comes first
            done = sendmmsg(fd, from_slot[slot], received - slot, MSG_DONTWAIT)
            slot, sent = slot + max(done, 1), sent + max(done, 0)
        return received, queries, sent
    return answer


def serve(sockets, clock):
    """Answer for ever, and tell once an hour what became of the datagrams."""
    try:
        answer = in_batches(sockets[0])
    except (AttributeError, ImportError, OSError):
        answer = answer_one
    alone = len(sockets) == 1  # reading it waits
    poll, by_fd = select.poll(), {sock.fileno(): sock for sock in sockets}
    for sock in sockets:
        sock.setblocking(alone)
        poll.register(sock, select.POLLIN)
    while True:
        answered = ignored = refused = 0
        due_sec = time.monotonic() + COUNT_SEC
        while time.monotonic() < due_sec:
            for sock in sockets if alone else [by_fd[fd] for fd, _ in poll.poll()]:
                received, queries, sent = answer(sock, clock)
                answered += sent
                ignored += received - queries
                refused += queries - sent
                if not received:
                    time.sleep(PAUSE_SEC)
        complain("info", "count: %d answered, %d ignored, %d refused" % (answered, ignored, refused))


def holders(port):
    """`, which process ... has`, as far as /proc tells it of that UDP port."""
    found = {}
    for table in "/proc/net/udp", "/proc/net/udp6":
        with contextlib.suppress(OSError), open(table) as file:  # no /proc, no IPv6
            for row in map(str.split, file):
                if row[1].endswith(":%04X" % port):
                    found["socket:[%s]" % row[9]] = "a process of user " + row[7]
    for fd in glob.glob("/proc/[0-9]*/fd/*") if found else ():
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            link = os.readlink(fd)
            if link in found:
                found[link] = "process " + fd.split("/")[2]
    return ", which %s has" % " and ".join(sorted(set(found.values()))) if found else ""


def open_socket(address, port, shared):
    """A UDP socket bound there; that of :: takes IPv4 too; OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, False)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, QUEUE_MAX)
    sock.bind((address, port))
    return sock


def inherited_sockets():
    """Those passed as systemd does, none if none were; OSError, ValueError."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = [socket.socket(fileno=fd) for fd in range(3, 3 + int(os.environ.get("LISTEN_FDS", "0")))]
    internet = socket.AF_INET, socket.AF_INET6
    if not all(sock.type == socket.SOCK_DGRAM and sock.family in internet for sock in sockets):
        raise ValueError("not all of them are UDP sockets")
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
        port = options.get("-p", "4014")
        if operands or not port.isdecimal() or int(port) > 65535:
            raise getopt.GetoptError("")
        doing, port, wanted = "obey CLOCK_SERVE", int(port), os.environ.get("CLOCK_SERVE", "")
        if wanted not in ("", "synced"):
            raise ValueError("it is neither synced nor empty")
        doing = "tell the clock's scale"
        clock = Clock(wanted == "synced", TAI_MINUS_CLOCK_SEC[clock_scale()])
        doing = "take the sockets of LISTEN_FDS"
        sockets = inherited_sockets()
        others = "" if sockets else holders(port)
        everywhere = ["::" if socket.has_dualstack_ipv6() else "0.0.0.0"]
        for address in () if sockets else addresses or everywhere:
            doing = "bind %s port %d" % (address, port)
            sockets.append(open_socket(address, port, "-r" in options))
            port = sockets[0].getsockname()[1]  # that of -p 0, for the others too
        doing = "write output"
        where = ", ".join("%s port %d" % sock.getsockname()[:2] for sock in sockets)
        emit(("start: serving on %s%s\n" % (where, others)).encode())
    except getopt.GetoptError:
        complain("usage", USAGE)
        return 100
    except (OSError, ValueError) as err:
        if getattr(err, "errno", None) == errno.EADDRINUSE:
            doing += others
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    clock.head()  # says so if there will be no answers
    settle()
    return serve(sockets, clock)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
