#!/bin/sh
"""exec" python3 -IS -c 'import sys; del sys.argv[0]; __file__ = sys.argv[0]; exec(compile(open(__file__, "rb").read(), __file__, "exec"))' "$0" "$@"
clockview - show what an adjustment would do to the system clock

SYNOPSIS
    sntpclock 192.0.2.1 | clockview
    clockview < /usr/local/clockspeed/etc/atto

DESCRIPTION
    Reads one adjustment from standard input: 16 bytes of TAI64NA, or the 12 bytes of
    TAI64N that s6's clients write.  Prints two lines in local time, with 18 decimals:

        before: 2026-11-22 15:41:44.000000000000000000
        after:  2026-11-22 15:41:44.250000000000000000

    `before` is the system clock, `after` is the system clock plus the adjustment.
    Sets nothing, needs no privilege.  Fed with etc/atto, the digits by which `after`
    exceeds `before` are the seconds of real time per tick.

ENVIRONMENT
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones);
                 without it the time zone tells
    LEAPSECS     a leap second table to use before the system's own

EXIT STATUS
    0 printed; 100 wrong usage; 111 bad input or a system error

SEE ALSO
    clockadd, sntpclock, taiclock, clockctl
"""
import os
import struct
import sys
import time

PROGRAM = "clockview"
USAGE = "clockview [--help] < adjustment"

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


def format_local(clock_atto):
    """Attoseconds of the system clock -> 'YYYY-MM-DD hh:mm:ss.' and 18 digits, in the local time zone."""
    sec, atto = divmod(clock_atto, 10**18)
    return "%d-%02d-%02d %02d:%02d:%02d." % time.localtime(sec)[:6] + "%018d" % atto


def report(clock_ns, adjustment_atto, rows):
    """The two lines; the sum is made in TAI, so that it is right across leap seconds too."""
    after_ns, after_atto = divmod(to_tai(clock_ns, rows) * 10**9 + adjustment_atto, 10**9)
    after = from_tai(after_ns, rows) * 10**9 + after_atto
    return "before: %s\nafter:  %s\n" % (format_local(clock_ns * 10**9), format_local(after))


# ==== shared with some: a packet from stdin (the same bytes in each script that has it) ====
def read_packet():
    """12 or 16 bytes from stdin, however many reads they take; b"" or less than that at its end."""
    packet = b""
    while len(packet) < 16:
        more = os.read(0, 16 - len(packet))
        if not more:
            break
        packet += more
    return packet
# ==== end shared with some ====


def main(argv, now_ns=time.time_ns):
    try:
        doing = "write output"
        if argv[1:] == ["--help"]:
            emit_manual()
            return 0
        if len(argv) != 1:
            complain("usage", USAGE)
            return 100
        doing = "read leap seconds"
        rows = clock_table(read_leap_table()[0])
        doing = "read the adjustment"
        packet = read_packet()
        if len(packet) not in (12, 16):
            complain("fatal", "data split across packets")  # the original's words
            return 111
        adjustment_atto = unpack(packet)
        doing = "show that time"
        text = report(now_ns(), adjustment_atto, rows)
        doing = "write output"
        emit(text.encode())
    except (OSError, OverflowError, ValueError) as err:
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except KeyboardInterrupt:
        sys.exit(111)
