#!/usr/bin/env python3
"""clockadd - step the system clock by an adjustment

SYNOPSIS
    sntpclock 192.0.2.1 | clockadd [-e ms] [-f]

DESCRIPTION
    Reads one adjustment, 16 bytes of TAI64NA or the 12 of TAI64N that s6's clients write, from standard
    input, and adds it to the system clock.  Needs root (on Linux: CAP_SYS_TIME).  Prints nothing when it
    worked.  On Linux no time is lost by it; elsewhere, or without ctypes, a microsecond is.

OPTIONS
    -e ms   refuse a step of more than that many milliseconds, either way
    -f      step even so

EXIT STATUS
    0 stepped; 100 wrong usage; 111 refused, bad input, no permission or a system error

SEE ALSO
    clockview, sntpclock, taiclock, clockctl
"""
import _signal as signal  # which is there at once: Ctrl-C ends this program as it ends one in C,
signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback, even while the rest is imported
import getopt
import os
import struct
import sys
import time

PROGRAM = "clockadd"
USAGE = "clockadd [-e ms] [-f] < adjustment"


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


# ==== shared by some: adjtimex and stepping ====
# struct timex with fields of 64 bits, as clock_adjtime64 has it too, and of 32; `sec` and `frac` are its time
TIMEX, TIMEX32 = struct.Struct("=I4x4qi4x8qi4x5qi44x"), struct.Struct("=I4ii8ii5ii44x")
TIMEX_MUSL = struct.Struct("@I4li3l2q3li5li44x")  # on 32 bits since 1.2: only its time has 64
TIMEX_FIELDS = ("modes offset freq maxerror esterror status constant precision tolerance sec frac tick "
                "ppsfreq jitter shift stabil jitcnt calcnt errcnt stbcnt tai").split()
ADJ_SETOFFSET, ADJ_MICRO, ADJ_NANO, STA_NANO = 0x100, 0x1000, 0x2000, 0x2000


def adjtimex(**fields):
    """adjtimex(2), setting the fields named -> all of them, and `state`; OSError, ImportError (no ctypes)."""
    import ctypes  # here, since python3-minimal has none
    libc = ctypes.CDLL(None, use_errno=True)
    calls = [(TIMEX, libc.adjtimex)]
    if ctypes.sizeof(ctypes.c_long) == 4:  # clock_adjtime64, which each libc names otherwise; since Linux 5.1
        number = 4405 if os.uname().machine.startswith("mips") else 405
        calls = [(TIMEX, lambda buffer: libc.syscall(number, 0, buffer)),
                 (TIMEX_MUSL if hasattr(libc, "__adjtimex_time64") else TIMEX32, libc.adjtimex)]
    for layout, call in calls:
        buffer = ctypes.create_string_buffer(layout.pack(*(fields.get(name, 0) for name in TIMEX_FIELDS)))
        state = call(buffer)
        if state >= 0:
            return dict(zip(TIMEX_FIELDS, layout.unpack_from(buffer)), state=state)
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def step_kernel(adjtimex, delta_ns):
    """Let the kernel add delta_ns to the system clock: no time is lost between reading and setting."""
    nano = adjtimex()["status"] & STA_NANO
    sec, frac = divmod(delta_ns, 10**9)
    adjtimex(modes=ADJ_SETOFFSET | ADJ_NANO, sec=sec, frac=frac)
    if not nano:
        adjtimex(modes=ADJ_MICRO)  # ADJ_NANO stays set, and would mislead a daemon that counts microseconds
# ==== end shared ====


def main(argv):
    try:
        doing = "write output"
        if begin(argv):
            return 0
        options, operands = getopt.getopt(argv[1:], "e:f")
        options = dict(options)
        limit_ms = options.get("-e", "0")
        if operands or not limit_ms.isdecimal():
            raise getopt.GetoptError("")
        doing = "read the adjustment"
        stdin = open(0, "rb", TAI64NA.size, closefd=False)  # it takes no byte of a packet after this one
        packet = stdin.read(TAI64NA.size) or b""
        if len(packet) not in (12, 16):  # in the original's words
            complain("fatal", "data split across packets" if packet else "nothing came on standard input")
            return 111
        delta_ns, _ = unpack(packet)
        doing = "set the clock"
        if "-e" in options and "-f" not in options and abs(delta_ns) > int(limit_ms) * 10**6:
            raise ValueError("a step of %.3f s is over the limit of -e" % (delta_ns / 1e9))
        try:
            step_kernel(adjtimex, delta_ns)
        except (ImportError, AttributeError):  # no ctypes; no adjtimex
            time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + delta_ns)
    except getopt.GetoptError:
        complain("usage", USAGE)
        return 100
    except (OSError, OverflowError, ValueError, struct.error) as err:  # OverflowError: no clock holds the sum
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
