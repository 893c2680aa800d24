#!/usr/bin/env python3
"""clockview - show what an adjustment would do to the system clock

SYNOPSIS
    sntpclock 192.0.2.1 | clockview
    clockview < /usr/local/clockspeed/etc/atto

DESCRIPTION
    Reads one adjustment from standard input: 16 bytes of TAI64NA, or the 12 bytes of TAI64N that s6's
    clients write.  Prints the system clock, and the system clock plus the adjustment, in local time:

        before: 2026-11-22 15:41:44.000000000
        after:  2026-11-22 15:41:44.250000000

    A third line follows for a mark that tells how good it is, as those of our clients do, and for
    etc/atto, the seconds of real time per tick:

        mark:   give or take 0.000412 s by its exchanges, 0.000210 s by its server
        atto:   0.000000001000050000 s per tick

    Sets nothing, needs no privilege.

EXIT STATUS
    0 printed; 100 wrong usage; 111 bad input or a system error

SEE ALSO
    clockadd, sntpclock, taiclock, clockctl
"""
try:  # Ctrl-C ends this program as it ends one in C: without a traceback, even while it loads
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
except KeyboardInterrupt:
    raise SystemExit(130)
import os
import struct
import sys
import time

PROGRAM = "clockview"
USAGE = "clockview < adjustment"
MOST_PER_TICK_NS = 10  # an adjustment of less, with digits after the nanoseconds, is a clockspeed's etc/atto


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


# ==== shared by some: what a mark tells of itself ====
# The last number of an adjustment is ESSSSDDCC in decimal digits.  The spread, half the width of the range
# that the exchanges prove, is S.SSS * 10^E ns.  The root distance, how far the server may be off true time,
# is 10^(DD/14) us, or nothing for 00.  CC makes the number 1 modulo 97.  Any other number tells nothing: 0 as
# most clients have it, and the true attoseconds of the C sntpclock, but for one in a hundred.
def unpack_quality(last):
    """The last number of an adjustment -> (spread, root distance) in ns, or None if it tells neither."""
    exponent, digits, distance = last // 10**8, last // 10**4 % 10**4, last // 100 % 100
    if last % 97 != 1 or digits < 1000:
        return None
    return -(-digits * 10**exponent // 1000), round(10 ** (3 + distance / 14)) if distance else 0
# ==== end shared ====


def format_local(clock_ns):
    """Nanoseconds of the system clock -> 'YYYY-MM-DD hh:mm:ss.' and 9 digits, in the local time zone."""
    sec, nano = divmod(clock_ns, 10**9)
    return "%d-%02d-%02d %02d:%02d:%02d." % time.localtime(sec)[:6] + "%09d" % nano


def report(clock_ns, adjustment_ns, last):
    """The lines that are printed; OverflowError, ValueError, OSError for a time that no calendar has."""
    yield "before: " + format_local(clock_ns)
    yield "after:  " + format_local(clock_ns + adjustment_ns)
    quality = unpack_quality(last)
    if quality:
        yield "mark:   give or take %.6f s by its exchanges, %.6f s by its server" % tuple(
            ns / 1e9 for ns in quality)
    elif 0 <= adjustment_ns < MOST_PER_TICK_NS and (adjustment_ns or last):
        yield "atto:   0.%018d s per tick" % (adjustment_ns * 10**9 + last)


# ==== shared by some: a packet from stdin ====
def read_packet():
    """The 12 or 16 bytes on stdin, however many reads they take; fewer at its end; OSError, ValueError."""
    with open(0, "rb", TAI64NA.size, closefd=False) as stdin:
        packet = stdin.read(TAI64NA.size)
    if not packet:
        raise ValueError("nothing came on standard input")
    return packet
# ==== end shared ====


def main(argv, now_ns=time.time_ns):
    try:
        doing = "write output"
        if begin(argv):
            return 0
        if len(argv) != 1:
            complain("usage", USAGE)
            return 100
        doing = "read the adjustment"
        packet = read_packet()
        if len(packet) not in (12, 16):
            complain("fatal", "data split across packets")  # the original's words
            return 111
        adjustment_ns, last = unpack(packet)
        doing = "show that time"
        text = "\n".join(report(now_ns(), adjustment_ns, last)) + "\n"
        doing = "write output"
        emit(text.encode())
    except (OSError, OverflowError, ValueError) as err:
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
