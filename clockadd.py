#!/bin/sh
"""exec" python3 -IS -c 'import sys; del sys.argv[0]; __file__ = sys.argv[0]; exec(compile(open(__file__, "rb").read(), __file__, "exec"))' "$0" "$@"
clockadd - step the system clock by an adjustment

SYNOPSIS
    sntpclock 192.0.2.1 | clockadd [-e ms] [-f]

DESCRIPTION
    Reads one adjustment (real time minus system clock) from standard input, 16 bytes of
    TAI64NA or the 12 bytes of TAI64N that s6's clients write, and steps the system clock
    by it.  Needs root (on Linux: CAP_SYS_TIME).  Nothing is printed when it worked.

    On Linux the kernel adds the adjustment itself, to the nanosecond, so that no time is
    lost between reading the clock and setting it.  Elsewhere, or without ctypes, the clock
    is read and set in two calls, and is late by the microsecond between them.

OPTIONS
    -e ms   refuse a step of more than that many milliseconds, either way
    -f      step even so

ENVIRONMENT
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones);
                 without it the time zone tells
    LEAPSECS     a leap second table to use before the system's own

EXIT STATUS
    0 stepped; 100 wrong usage; 111 refused, bad input, no permission or a system error

SEE ALSO
    clockview, sntpclock, taiclock, clockctl
"""
import errno
import getopt
import os
import struct
import sys
import time

PROGRAM = "clockadd"
USAGE = "clockadd [-e ms] [-f] < adjustment"

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


# ==== shared with some: stepping (the same bytes in each script that has it) ====
ADJ_SETOFFSET, ADJ_MICRO, ADJ_NANO, STA_NANO = 0x100, 0x1000, 0x2000, 0x2000


def step_kernel(adjtimex, delta_ns):
    """Let the kernel add delta_ns to the system clock: no time is lost between reading and setting."""
    nano = adjtimex()["status"] & STA_NANO
    sec, frac = divmod(delta_ns, 10**9)
    adjtimex(modes=ADJ_SETOFFSET | ADJ_NANO, sec=sec, frac=frac)
    if not nano:
        adjtimex(modes=ADJ_MICRO)  # ADJ_NANO stays set, and would mislead a daemon that counts microseconds
# ==== end shared with some ====


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


def step_ns(now_ns, adjustment_atto, rows):
    """The step, in nanoseconds of the system clock, that the adjustment asks for; made in TAI, so that it
    is right across leap seconds too."""
    return from_tai(to_tai(now_ns, rows) + (adjustment_atto + 5 * 10**8) // 10**9, rows) - now_ns


def step_clock(delta_ns):
    """Add delta_ns to the system clock."""
    try:
        step_kernel(adjtimex, delta_ns)
    except (ImportError, AttributeError):  # no ctypes; no adjtimex
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + delta_ns)


def main(argv, now_ns=time.time_ns, step=step_clock):
    try:
        options, operands = getopt.getopt(argv[1:], "e:f", ["help"])
        options = dict(options)
        limit_ns = int(options["-e"]) * 10**6 if "-e" in options and "-f" not in options else None
        if operands or limit_ns is not None and limit_ns < 0:
            raise ValueError
    except (getopt.GetoptError, ValueError):
        complain("usage", USAGE)
        return 100
    try:
        doing = "write output"
        if "--help" in options:
            emit_manual()
            return 0
        doing = "read leap seconds"
        rows = clock_table(read_leap_table()[0])
        doing = "read the adjustment"
        packet = read_packet()
        if len(packet) not in (12, 16):
            complain("fatal", "data split across packets")  # the original's words
            return 111
        adjustment_atto = unpack(packet)
        doing = "set the clock"
        delta_ns = step_ns(now_ns(), adjustment_atto, rows)
        if limit_ns is not None and abs(delta_ns) > limit_ns:
            raise ValueError("a step of %.3f s is over the limit of -e; -f steps even so"
                             % (delta_ns / 10**9))
        step(delta_ns)
    except (OSError, OverflowError, ValueError, struct.error) as err:  # struct: 32-bit seconds
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except KeyboardInterrupt:
        sys.exit(111)
