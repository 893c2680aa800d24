#!/usr/bin/env python3
"""clockview - show what an adjustment would do to the system clock

SYNOPSIS
    sntpclock 192.0.2.1 | clockview
    clockview < /usr/local/clockspeed/etc/atto

DESCRIPTION
    Reads one adjustment, 16 bytes of TAI64NA or the 12 of TAI64N that s6's clients write, from standard
    input.  Prints the system clock, and the system clock plus the adjustment, in local time:

        before: 2026-11-22 15:41:44.000000000
        after:  2026-11-22 15:41:44.250000000
        mark:   give or take 0.000412 s by its exchanges, 0.000210 s by its server

    Only our clients' marks tell that much of themselves.  For etc/atto the third line is the seconds of
    real time per tick, `atto:   0.000000001000050000 s per tick`.  Sets nothing, needs no privilege.

EXIT STATUS
    0 printed; 100 wrong usage; 111 bad input or a system error

SEE ALSO
    clockadd, sntpclock, taiclock, clockctl
"""
import _signal as signal  # which is there at once: Ctrl-C ends this program as it ends one in C,
signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback, even while the rest is imported
import os
import struct
import sys
import time

PROGRAM = "clockview"
USAGE = "clockview < adjustment"


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


# ==== shared by some: what a mark tells of itself ====
# The last number of an adjustment is ESSSSDDCC in decimal digits.  The spread, half the width of the range
# that the exchanges prove, is S.SSS * 10^E ns.  The root distance, how far the server may be off, is
# 10^(DD/14) us, or nothing for 00.  CC makes the number 1 modulo 97.  Other clients' numbers tell nothing.
def unpack_quality(last):
    """The last number of an adjustment -> (spread, root distance) in ns, or None if it tells neither."""
    exponent, digits, distance = last // 10**8, last // 10**4 % 10**4, last // 100 % 100
    if last % 97 != 1 or digits < 1000:
        return None
    return -(-digits * 10**exponent // 1000), round(10 ** (3 + distance / 14)) if distance else 0
# ==== end shared ====


def format_local(clock_ns):
    """'YYYY-MM-DD hh:mm:ss.' and 9 digits; OSError, OverflowError, ValueError for what no calendar has."""
    sec, nano = divmod(clock_ns, 10**9)
    return time.strftime("%Y-%m-%d %H:%M:%S.", time.localtime(sec)) + "%09d" % nano


def main(argv):
    try:
        doing = "write output"
        if begin(argv):
            return 0
        if len(argv) != 1:
            complain("usage", USAGE)
            return 100
        doing = "read the adjustment"
        stdin = open(0, "rb", TAI64NA.size, closefd=False)  # it takes no byte of a packet after this one
        packet = stdin.read(TAI64NA.size) or b""
        if len(packet) not in (12, 16):  # in the original's words
            complain("fatal", "data split across packets" if packet else "nothing came on standard input")
            return 111
        adjustment_ns, last = unpack(packet)
        doing = "show that time"
        clock_ns = time.time_ns()
        text = "before: %s\nafter:  %s\n" % (format_local(clock_ns), format_local(clock_ns + adjustment_ns))
        if unpack_quality(last):
            text += "mark:   give or take %.6f s by its exchanges, %.6f s by its server\n" % tuple(
                ns / 1e9 for ns in unpack_quality(last))
        elif 0 <= adjustment_ns < 10 and (adjustment_ns or last):  # no clock is that near: it is an etc/atto
            text += "atto:   0.%018d s per tick\n" % (adjustment_ns * 10**9 + last)
        doing = "write output"
        emit(text.encode())
    except (OSError, OverflowError, ValueError) as err:
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
