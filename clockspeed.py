#!/usr/bin/env python3
"""clockspeed - keep the system clock right between rare marks from a time server

SYNOPSIS
    clockspeed [-n] [-S] [-u user] [-w user] [home]

DESCRIPTION
    A daemon, to be run in the foreground by daemontools, runit or s6.  From the marks written
    into the FIFO `adjust` it learns how fast the machine's counter really ticks, and keeps the
    system clock at that rate for as long as nobody asks a time server.

    A mark is what is to be added to the system clock's reading: 16 bytes of TAI64NA in one
    write, as sntpclock and taiclock make them; positive when the clock is behind.  A rate is
    (real seconds per counter second - 1) * 10^6 ppm; positive when the counter ticks too slowly.
    The counter is CLOCK_MONOTONIC_RAW, which nobody steers, else CLOCK_MONOTONIC.

    Linux is given the rate by adjtimex, so that the clock runs right between wake-ups and after
    clockspeed is killed.  The kernel slews away what the clock is off by, at 500 ppm: 1.8 s take
    an hour.  Faster slews need a wrong rate, which would stay if clockspeed were killed.  On
    other systems adjtime() nudges the clock every 3 seconds.

    A clock that is over 0.5 s off is stepped in three cases, and never with -S:
    - by one of the first 3 marks used in a boot, so that a wrong first mark does not last;
    - back, when somebody else has set it: once, then at most once an hour, doubling up to a day;
    - at the start, forward to the last time known, on a host without a hardware clock.

    The kernel is told the standard deviation as esterror, and as maxerror the bound with what
    is still to be slewed.  While the clock is known to be over 0.5 s off, or may be 16 s off, it
    is told that its clock is unsynchronised, and does not copy it to the hardware clock.

    Who can write marks can make the clock wrong: by any amount in the first 3 marks of a boot,
    later at 1500 ppm (130 s a day) at most.  No rate over 1000 ppm is ever believed, and no
    real time before this release.

OPTIONS
    -n       observe only: learn and tell, never touch the clock; needs no privilege
    -S       never step
    -u user  after the start as root give etc to that user, become it, and keep only the
             right to set the clock (Linux: CAP_SYS_TIME)
    -w user  give adjust to that user, who writes the marks and can do no more; without it,
             to that of -u
    home     the directory below, instead of $CLOCKSPEED_HOME or /usr/local/clockspeed

FILES (in home)
    adjust      the FIFO, made 0600 if missing; who may read it can keep clockspeed from starting
    etc/atto    seconds of real time per tick (nanosecond), as the C clockspeed keeps it, whose
                rate is taken when it wrote last, within 500 ppm of 1 ns
    etc/state   what is known, for the next start: written at each mark and each hour
    etc/status  the same for people and programs: at each mark and every 10 minutes
    etc/lock    so that no second clockspeed runs on this home

    etc/status is JSON.  When the counter read tick_ns, the system clock read written_ns, and
    real time was offset_ns more.  When the counter reads TICK, t = (TICK - tick_ns) / 10^9 seconds
    have passed, and real time is written_ns + offset_ns + t (10^9 + 1000 rate_ppm), with a
    variance of c0 + c1 t + c2 t^2 + c3 t^3 ns^2, the factors in `variance`.

    `bound` tells where real time certainly is, if the servers tell the truth.  With t counted
    from the tick_ns in `bound`, and with C = change_ppm sqrt(max(1, t / 86400)), real time is
        from  earliest_ns + t (10^9 + 1000 max(slow_ppm - C, -1000))
        to    latest_ns   + t (10^9 + 1000 min(fast_ppm + C, 1000))

OUTPUT
    A line for each event; multilog adds the time.  Warnings on stderr tell what does not work,
    once for as long as it fails for that reason.

    start:    how the clock is steered, by which counter, and which rate is known from where
    mark:     counter, real time, the mark's spread and the server's root distance (- if it
              doesn't tell); what is believed now: real time minus the clock, standard deviation,
              bound, rate; and whether the mark was used, doubted (until others agree) or refused
    refused:  what came was no mark, or of an impossible time; one line for all at once
    step:     the clock was stepped, and why
    slew:     what is slewed away takes over a minute; clockctl set steps at once
    moved:    somebody else set the clock
    foreign:  another program sets the clock or its frequency again and again; one must go
    suspend:  the machine slept; the rate is known, the time is not before the next mark
    counter:  it went back, as in a machine restored from a snapshot; the same
    lost:     so many lines could not be written before this one
    stop:     TERM or INT came

ENVIRONMENT
    CLOCK_SCALE  what the system clock counts: utc, or tai (the right/ time zones); without it
                 the time zone tells
    CLOCK_ERROR  the error to be kept (0.010, 10ms): etc/status then tells when the next mark is
                 wanted, and of how many exchanges

EXIT STATUS
    0 after TERM or INT; 100 wrong usage; 111 unable to start, or to go on: when adjust was
    deleted under -u, only a start as root can make it again

SEE ALSO
    clockctl
"""
import _signal as signal  # which is there at once: Ctrl-C ends this program as it ends one in C,
signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback, even while the rest is imported
import atexit
import collections
import errno
import fcntl
import math
import os
import pwd
import select
import stat
import struct
import sys
import time

PROGRAM = "clockspeed"
USAGE = "clockspeed [-n] [-S] [-u user] [-w user] [home]"
ATTO_LIMIT_PPM = 500  # an etc/atto further off than that was made with a counter of other ticks
UNKNOWN_PPM = 500.0  # what a rate may be off by before any mark: a crystal 50, a virtual machine some 100
REBOOT_PPM = 1.0  # what temperature and a new calibration of the counter may make of a kept rate
ATTO_PPM = 10.0  # and of one from etc/atto, which tells nothing of its quality
STEP_NS = 5 * 10**8  # over 0.5 s a clock is wrong and not just inexact; slewing that takes 17 minutes
EARLY_MARKS = 3  # used ones of a boot: until then one may be wrong unnoticed, and the clock settles
SLEW_PPM = 500  # what Linux and the BSDs slew at
HOURLY_SEC = 3600  # how often etc/state is written without a mark, and a line that stays true is repeated
STATUS_SEC = 600  # etc/status is never older
SETTLED_NS = 5000  # below this the clock is looked at once a minute, above it every 3 seconds
BUSY_SEC, SETTLED_SEC = 3, 60
MOVED_NS, MOVED_PPM = 10**7, 2000  # a clock that moves by more, beyond any slew and rate, was set by others
SUSPENDED_NS = 10**8  # CLOCK_BOOTTIME gains as much on CLOCK_MONOTONIC only in a suspend
BATCH = 4  # marks taken at once, of up to 10 ms each; after so many or a bad one the FIFO rests for a second
ADJ_FREQUENCY, ADJ_MAXERROR, ADJ_ESTERROR, ADJ_STATUS, ADJ_TAI, ADJ_TICK = 0x2, 0x4, 0x8, 0x10, 0x80, 0x4000
ADJ_OFFSET_SINGLESHOT, STA_UNSYNC = 0x8001, 0x40
MAXERROR_NS = 16 * 10**9  # where the kernel itself takes a clock for unsynchronised
BIAS_LIMIT_PPM = 50.0  # no kernel is off the rate that it was given by more: somebody else was at work
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, CAP_SYS_TIME, CAPABILITY_VERSION = 8, 38, 25, 0x20080522


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


# ==== shared by some: packing TAI64NA ====
def pack(ns, last=0):
    """Signed nanoseconds, and attoseconds or what a mark tells of itself -> 16 bytes of TAI64NA."""
    return struct.pack(">qII", *divmod(ns, 10**9), last)
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


# ==== shared by some: clock scale ====
TAI_MINUS_CLOCK_SEC = {"utc": 37, "tai": 10}  # since 2017; there are no leap seconds any more


def clock_scale():
    """utc or tai, by CLOCK_SCALE, or by the zone: a right/ one has 23:59:60 in June 1972; ValueError."""
    scale = os.environ.get("CLOCK_SCALE") or ("tai" if time.localtime(78796800).tm_sec == 60 else "utc")
    if scale not in TAI_MINUS_CLOCK_SEC:
        raise ValueError("CLOCK_SCALE is neither utc nor tai")
    return scale
# ==== end shared ====


# ==== the estimator ====
#
# MODEL   A counter's rate wanders as a random walk.  A mark is real time plus noise.  With wander and noise
#         known a Kalman filter is the best there is.  They are not known, so one filter runs for each pair of
#         a grid, weighted by how likely it found each mark (D. T. Magill, 1965); the answer is the mixture.
#         A model that became unlikely follows the mixture, ready when its time comes.
# PATH    A mark's spread is half the width of what its exchanges prove.  By what it is over the path's floor,
#         the excess, real time may be off the mark, as queueing on one way or the other made it.  Queueing on
#         both alike gives a variance of excess^2 / 3, on one only plus or minus the excess: the lean, which
#         the filters estimate with phase and rate.
# WAVE    Temperature makes the rate rise and fall by the day.  Some of the grid's models have two more
#         unknowns, the amplitudes of cosine and sine of real time's day.
# DOUBT   A mark that a wild one explains better than all models is held.  Later marks decide what explains
#         those held best: they are wild, or real time stepped, or the rate jumped, or noise or wander grew.
# LIMITS  A floor that is longer one way shifts the clock, unseen.  A wave's harmonics are followed as wander.
#
# Units are ns, s and ns/s (0.001 ppm); phase and rate are real time minus counter.  NOTES.md has the sources.
PHASE, RATE, LEAN, COS, SIN = range(5)   # the unknowns
PLAIN, WAVE = 3, 5    # the kinds of models: without a wave, of the first three unknowns, and with one
LIMIT_PPM = 1000.0    # no crystal and no virtual machine's counter is off by more: never believed
LIMIT_NS = 1 << 64    # no counter or real time is beyond (year 2554)
DAY_NS, DAY_SEC = 86400 * 10**9, 86400
OMEGA = 2 * math.pi / DAY_SEC
# Grid.  Wander from an oven to a draught on bare quartz, all alike likely.  Noise from a local wire to a poor
# radio link, log-normal by a decade around a server some networks away.
WANDERS = [1e-12 * 10 ** (k / 2) for k in range(10)]  # up to 3.2e-8 per sqrt(s)
NOISES = [1e-6 * 2**k for k in range(17)]       # up to 66 ms, in s
USUAL_NOISE = 1e-3
# A wave: the chance that there is one (low, as one that isn't there costs some accuracy, and one that is
# shows in some days), its usual amplitudes (some degrees at 0.1 ppm each), how they change with the weather
# in a day, and the wanders that show it: 0.3 ppm in a day at most, decades are enough.
WAVE_CHANCE, WAVE_PPM, WEATHER_PPM, WAVE_WANDERS = 0.15, 0.6, 0.08, (1e-11, 1e-10, 1e-9)
USUAL_LEAN, LEAN_DRIFT = 0.25, 0.01   # (1: queueing is one way only), and its change from mark to mark
SWITCH = 1e-3         # chance that wander or noise change between two marks: some times a year, marked hourly
SILENT = 1e-2         # a model so much less likely than the best has no say: a hundred of them would shout
DORMANT = 1e-3        # one so much less likely follows the mixture; with more of these the dark is misjudged
FEW = 8               # models of each kind are kept while explanations are tried, so that a mark costs little
NEVER = -200.0        # logarithm of the least likelihood beside the best, that nothing underflows
DIGITS = 1e-12        # the least share of a variance that a float's 16 digits can subtract well
# What a contradicting mark may be, as chances per mark.  Sizes are unknown: a density of 1/(SIZES |e|) is the
# same in each decade; 1 us to 10 s and both signs make 2 ln(10^7) = 32, and its logarithm hardly matters.
WILD, JUMP, SIZES = 0.03, 1e-3, 32.0
# What may explain contradicting marks: real time stepped before them, or the rate jumped too, or noise or
# wander grew.  `need` is how many such marks it takes: one for each unknown, and one to confirm.  Fewer can't
# be believed, but make a rival explanation wait.
Explanation = collections.namedtuple("Explanation", "need stepped rate_jumped")
STEP, RATE_JUMP, NOISY = Explanation(2, True, False), Explanation(3, True, True), Explanation(3, False, False)
UNKNOWN_NS = 1e9      # a phase of which nothing is known: far over any noise, and not too far for DIGITS
HELD_MAX = 8          # so many contradictions in a row by wild marks: once in 10^12; the old belief has to go
FAR_SEC = 1e8         # next_mark's longest answer
LEAST_WAIT_SEC = 64   # what time servers ask for
EXCHANGES, LOOKAHEAD = (1, 2, 4, 8), 12  # next_mark_plan compares these, over so many marks

Model = collections.namedtuple("Model", "wander_var noise_var share unknowns weather_var")
Mark = collections.namedtuple("Mark", "tick_ns real_ns spread_ns")
Plan = collections.namedtuple("Plan", "wait_sec exchanges")


def grid(wanders, noises, chance, unknowns, weather_ppm):
    pairs = [(w, n, math.exp(-0.5 * math.log10(n / USUAL_NOISE) ** 2)) for w in wanders for n in noises]
    total = sum(share for _, _, share in pairs)
    return [Model((w * 1e9) ** 2, (n * 1e9) ** 2, chance * share / total, unknowns,
                  (weather_ppm * 1e3) ** 2 / DAY_SEC) for w, n, share in pairs]


MODELS = (grid(WANDERS, NOISES, 1 - WAVE_CHANCE, PLAIN, 0.0)
          + grid(WAVE_WANDERS, NOISES[::2], WAVE_CHANCE, WAVE, WEATHER_PPM))


def dot(a, b):
    """The scalar product, of the unknowns that both have."""
    return sum([x * y for x, y in zip(a, b)])


def reach(real_ns, sec):
    """What each unknown, if it is 1, adds to the phase in sec from real_ns on: row 1 of the transition."""
    start = real_ns % DAY_NS * 1e-9 * OMEGA
    end = start + OMEGA * sec
    cos, sin = (math.sin(end) - math.sin(start)) / OMEGA, (math.cos(start) - math.cos(end)) / OMEGA
    return [1.0, sec, 0.0, cos, sin]


def foreseen(mean, cov, row):
    """-> (mean, variance) of the sum of the unknowns, each times its number in row; never a negative one."""
    return dot(mean, row), max(dot([dot(each, row) for each in cov], row), 0.0)


def carried(mean, cov, moves, wander_var, weather_var):
    """Kalman's prediction: the phase moves by reach(), the others stay; wander's covariance is Allan's."""
    sec = moves[RATE]
    phase_row = [dot(row, moves) for row in cov]
    cov = [[p] + row[1:] for p, row in zip(phase_row, cov)]
    cov[PHASE] = [dot(phase_row, moves) + wander_var * sec**3 / 3] + phase_row[1:]
    cov[PHASE][RATE] += wander_var * sec**2 / 2
    cov[RATE][PHASE] = cov[PHASE][RATE]
    cov[RATE][RATE] += wander_var * sec
    cov[LEAN][LEAN] += LEAN_DRIFT**2
    for i in range(COS, len(mean)):
        cov[i][i] += weather_var * sec
    return [dot(mean, moves)] + mean[1:], cov


def updated(mean, cov, ahead_ns, excess_ns, noise_var):
    """Kalman's update by a mark: phase + excess * lean + noise."""
    off = ahead_ns - mean[PHASE] - excess_ns * mean[LEAN]
    with_mark = [row[PHASE] + excess_ns * row[LEAN] for row in cov]
    var = max(with_mark[PHASE] + excess_ns * with_mark[LEAN], 0.0)
    noise_var = max(noise_var, DIGITS * var)
    var += noise_var
    gain = [p / var for p in with_mark]
    after = [[p - k * m for p, m in zip(row, with_mark)] for row, k in zip(cov, gain)]
    for i, row in enumerate(after):   # Cauchy and Schwarz know a least variance, rounding does not
        row[i] = max(row[i], cov[i][i] * noise_var / var)
    return [x + k * off for x, k in zip(mean, gain)], after


def mixture(parts):
    """[(weight, mean, cov)] -> (mean, cov) of those that have a say, what they differ by included."""
    most, size = max([weight for weight, _, _ in parts]), range(len(parts[0][1]))
    parts = [part for part in parts if part[0] >= SILENT * most]
    total = sum([weight for weight, _, _ in parts])
    mean = [sum([weight * its[i] for weight, its, _ in parts]) / total for i in size]
    offs = [(weight / total, [x - x0 for x, x0 in zip(its, mean)], cov) for weight, its, cov in parts]
    return mean, [[sum([share * (cov[i][j] + off[i] * off[j]) for share, off, cov in offs]) for j in size]
                  for i in size]


def gained(before, mark):
    """(s on the counter, ns that real time gained on it) from one mark to another."""
    ticks = mark.tick_ns - before.tick_ns
    return ticks * 1e-9, float(mark.real_ns - before.real_ns - ticks)


class Bank:
    """The filters: the weights of MODELS, and {number: (mean, cov)} of those that are awake.  The others are
    as the mixture of their kind: what has learned a wave, and what knows of none.

    Phases are relative to the last mark.
    """

    def __init__(self, weights, awake):
        self.weights, self.awake = weights, awake
        self.kinds, both = {}, []
        for kind in (PLAIN, WAVE):
            mean, cov = mixture([(weights[number], mean, cov) for number, (mean, cov) in awake.items()
                                 if len(mean) == kind])
            self.kinds[kind] = mean, cov
            more = [0.0] * (WAVE - kind)   # no wave is amplitudes of 0
            both.append((sum([weight for weight, model in zip(weights, MODELS) if model.unknowns == kind]),
                         mean + more, [row + more for row in cov] + [[0.0] * WAVE for _ in more]))
        self.mean, self.cov = mixture(both)
        self.wander_var, self.noise_var = self.typical("wander_var"), self.typical("noise_var")

    def typical(self, what):
        """The geometric mean of a model's variance, as the grid is one of factors."""
        total = sum([self.weights[number] for number in self.awake])
        return math.exp(sum([self.weights[number] * math.log(getattr(MODELS[number], what))
                             for number in self.awake]) / total)

    def feared_wander_var(self):
        """The arithmetic mean, to which a large wander adds even where it is nearly ruled out: the first
        marks may have agreed by luck, and in a long wait it would do much harm."""
        return sum([weight * model.wander_var for weight, model in zip(self.weights, MODELS)])

    def learn(self, before, mark, excess_ns, excess_var, most):
        """Each filter's step from the mark before to this one -> (log evidence, Bank with at most so many of
        each kind awake)."""
        sec, ahead_ns = gained(before, mark)
        moves = reach(before.real_ns, sec)
        row = moves[:LEAN] + [excess_ns] + moves[COS:]
        dormant = {kind: foreseen(*known, row) for kind, known in self.kinds.items()}
        logs = []
        for number, model in enumerate(MODELS):
            expected, var = (foreseen(*self.awake[number], row) if number in self.awake
                             else dormant[model.unknowns])
            var += model.wander_var * sec**3 / 3 + model.noise_var + excess_var
            logs.append(math.log((1 - SWITCH) * self.weights[number] + SWITCH * model.share)
                        - 0.5 * (math.log(2 * math.pi * var) + (ahead_ns - expected)**2 / var))
        top = max(logs)
        weights = [math.exp(max(log - top, NEVER)) for log in logs]
        total = sum(weights)
        weights = [weight / total for weight in weights]
        awake = {}
        for number in likeliest(weights, most):
            model = MODELS[number]
            mean, cov = carried(*self.awake.get(number, self.kinds[model.unknowns]), moves,
                                model.wander_var, model.weather_var)
            mean, cov = updated(mean, cov, ahead_ns, excess_ns, model.noise_var + excess_var)
            awake[number] = [mean[PHASE] - ahead_ns] + mean[1:], cov
        return top + math.log(total), Bank(weights, awake)

    def renewed(self, which, value, var, rate_var=0.0):
        """With one of the unknowns known anew, whatever it was, and the rate less certain by rate_var."""
        def renew(mean, cov):
            cov = [[0.0 if which in (i, j) else p for j, p in enumerate(row)] for i, row in enumerate(cov)]
            cov[which][which] = var
            cov[RATE][RATE] += rate_var
            return mean[:which] + [value] + mean[which + 1:], cov
        return Bank(self.weights, {number: renew(*known) for number, known in self.awake.items()})


def likeliest(weights, most):
    """The numbers of the models that are to be kept, at most so many of each kind."""
    for kind in (PLAIN, WAVE):
        numbers = [number for number, model in enumerate(MODELS) if model.unknowns == kind]
        best = sorted(numbers, key=lambda number: -weights[number])[:most]
        yield from [number for number in best if weights[number] >= DORMANT * weights[best[0]]]


# So many spreads are remembered: with more the floor is known better, slow changes are noticed later.  The
# floor has moved if a mark is under it by FAR typical excesses, or if the last three are as much over it, and
# by more than twice what they differ among themselves.
PATH_MARKS, FAR = 200, 4.0
FIRST_EXCESS, FIRST_MARKS = 1 / 8, 8  # typical of a new path, as a share of its first spread, for some marks


def least_of(count):
    """The least of so many excesses beside the typical one, of exponential queueing alike both ways."""
    return 0.75 / math.sqrt(count) + 0.4 / count


def scale_of(lean):
    """The variance of a mark's error given an excess of 1, if queueing leans so."""
    return max(1 - lean**2, 1e-3) / 3


class Path(collections.namedtuple("Path", "spreads counts first_ns")):
    """The way to the server, as marks show it: their spreads since its floor moved, of how many exchanges,
    and the excess that was typical before."""

    def typical(self):
        """The median excess."""
        count = len(self.spreads)
        if not count:
            return self.first_ns
        seen = (sorted(self.spreads)[count // 2] - min(self.spreads)) / (1 - least_of(count + 1))
        return self.first_ns + (seen - self.first_ns) * count**2 / (count**2 + FIRST_MARKS**2)

    def gap(self, lean):
        """By how much the least spread is likely to be over the floor."""
        one_way, count = min(lean**2, 1.0), max(len(self.spreads), 1)
        return self.typical() * ((1 - one_way) * least_of(count) + one_way / count)

    def after(self, spread_ns, exchanges, may_rise):
        """The path with one more mark; where its floor has moved, without those before."""
        spreads, keep, first_ns = self.spreads + [spread_ns], PATH_MARKS, self.first_ns
        if not self.spreads:
            first_ns = spread_ns * FIRST_EXCESS
        elif min(self.spreads) - spread_ns > FAR * self.typical():
            keep, first_ns = 1, self.typical()
        elif len(spreads) > 3 and may_rise:
            before = self._replace(spreads=spreads[:-3])
            over, among = min(spreads[-3:]) - min(spreads[:-3]), max(spreads[-3:]) - min(spreads[-3:])
            if over > max(FAR * before.typical(), 2 * among):
                keep, first_ns = 3, before.typical()
        counts = self.counts + [exchanges]
        return Path(spreads[-keep:], counts[-keep:], first_ns)

    def excess(self, spread_ns, lean, may_rise=True):
        """-> (ns, the variance that it adds to a mark's noise); typical for a mark that doesn't tell."""
        excess_ns = self.typical()
        if spread_ns is not None:
            path = self.after(spread_ns, 1, may_rise)
            excess_ns = spread_ns - min(path.spreads) + path.gap(lean)
        return excess_ns, scale_of(lean) * excess_ns**2

    def noise_var(self, rest_var, exchanges, lean):
        """What a mark of so many exchanges is worth: of k, the least queue each way is about one k-th."""
        if not self.spreads:
            return rest_var / exchanges
        floor_ns, scale = min(self.spreads) - self.gap(lean), scale_of(lean)
        worths = [1 / (rest_var + scale * ((spread_ns - floor_ns) * count / exchanges) ** 2)
                  for spread_ns, count in zip(self.spreads, self.counts)]
        return len(worths) / sum(worths)


# Shapes of plain data: {key: shape} with just these keys, [shape] for any number of it, [shape, shape ...]
# for just these, or (least, most), of integers if these are; what comes after them may stand there instead.
TIME, SPREAD, NUMBER = (-LIMIT_NS, LIMIT_NS), (0, LIMIT_NS), (-1e40, 1e40)
MARK = [TIME, TIME, (*SPREAD, None)]


def fits(value, shape):
    """Whether a value from outside has that shape; NaN has none."""
    if isinstance(shape, dict):
        return (isinstance(value, dict) and value.keys() == shape.keys()
                and all(fits(value[key], shape[key]) for key in shape))
    if isinstance(shape, list):
        each = shape * len(value) if isinstance(value, list) and len(shape) == 1 else shape
        return isinstance(value, list) and len(value) == len(each) and all(map(fits, value, each))
    least, most, *others = shape
    return value in others or (type(value) in ((int,) if type(least) is int else (int, float))
                               and least <= value <= most)


def is_known(mean, cov, unknowns):
    """Whether mean and cov are of so many unknowns, and cov can be a covariance."""
    every = range(unknowns)
    return ([len(row) for row in [mean] + cov] == [unknowns] * (unknowns + 1)
            and all(cov[i][i] >= 0 and cov[i][j] ** 2 <= cov[i][i] * cov[j][j] * 1.000001
                    and abs(cov[i][j] - cov[j][i]) <= 1e-6 * math.sqrt(cov[i][i] * cov[j][j])
                    for i in every for j in every))


def is_possible(mean):
    """Whether a counter can have such a rate, at any time of the day."""
    return abs(mean[RATE]) + math.hypot(mean[COS], mean[SIN]) <= LIMIT_PPM * 1e3


def wait_for(error_after, target_ns):
    """Seconds until error_after(sec) reaches target_ns: 0 if it has, at most FAR_SEC."""
    near, far = 0.0, FAR_SEC
    if not error_after(near) < target_ns:
        return near
    while far - near > 1.0:   # a second more or less is nothing to who asks each minute
        middle = (near + far) / 2
        near, far = (middle, far) if error_after(middle) < target_ns else (near, middle)
    return near


class Estimator:
    """Real time as a function of a counter, learned from marks.

    rate_ppm is what is known of the rate before, (real seconds per counter second - 1) * 10^6, give or take
    rate_error_ppm (one standard deviation); a worse one is found after some marks.
    """

    def __init__(self, rate_ppm=0.0, rate_error_ppm=UNKNOWN_PPM):
        if not abs(rate_ppm) <= LIMIT_PPM:
            raise ValueError("a rate of %s ppm" % rate_ppm)
        mean = [0.0, rate_ppm * 1e3, 0.0, 0.0, 0.0]
        deviations = [UNKNOWN_NS, rate_error_ppm * 1e3, USUAL_LEAN, WAVE_PPM * 1e3, WAVE_PPM * 1e3]
        cov = [[sd**2 if i == j else 0.0 for j in range(WAVE)] for i, sd in enumerate(deviations)]
        known = {kind: (mean[:kind], [row[:kind] for row in cov[:kind]]) for kind in (PLAIN, WAVE)}
        self.last = None        # the last mark used: phases are relative to it
        self.held = []          # marks doubted since
        self.path, self.exchanges = Path([], [], 0.0), 1
        self.bank = Bank([model.share for model in MODELS],
                         {number: known[model.unknowns] for number, model in enumerate(MODELS)})

    def mark(self, tick_ns, real_ns, spread_ns=None):
        """At counter value tick_ns real time was real_ns -> "used", "doubted" (held), "refused" (none)."""
        mark = Mark(tick_ns, real_ns, spread_ns)
        if not fits(list(mark), MARK):
            return "refused"
        if self.last is None:
            self._use(self._restarted(mark, most=len(MODELS)), [mark])
            return "used"
        if tick_ns <= (self.held or [self.last])[-1].tick_ns:
            return "refused"
        for may_rise in (True, False):   # no floor is to rise only to find a mark of a burst wild
            evidence, bank = self._learn(self.bank, self.last, mark, len(MODELS), may_rise)
            if evidence > self._wild(mark) and is_possible(bank.mean):
                self._use(bank, [mark], may_rise)
                return "used"
        self.held.append(mark)
        found = [(explanation, *self._explain(explanation)) for explanation in (STEP, RATE_JUMP, NOISY)]
        explanation, odds, bank = max(found, key=lambda each: each[1])
        if odds > 0 and len(self.held) >= explanation.need and is_possible(bank.mean):
            self._use(bank, self.held[-explanation.need:])
        elif len(self.held) >= HELD_MAX:
            self._use(self._restarted(mark), [mark])
        return "doubted" if self.held else "used"

    def _learn(self, bank, before, mark, most=FEW, may_rise=True):
        excess = self.path.excess(mark.spread_ns, self.bank.mean[LEAN], may_rise)
        return bank.learn(before, mark, *excess, most)

    def _restarted(self, mark, rate_jumped=False, most=FEW):
        """The bank if real time is what that mark says, whatever it was before."""
        rate_var = 0.0
        if self.last:
            sec, ahead_ns = gained(self.last, mark)
            rate_var = self.bank.wander_var * sec
            if rate_jumped:   # by about as much as the mark is off
                rate_var += min(2 * abs(ahead_ns - self._gain(sec)) / sec, UNKNOWN_PPM * 1e3) ** 2
        bank = self.bank.renewed(PHASE, 0.0, UNKNOWN_NS**2, rate_var)
        return self._learn(bank, mark, mark, most)[1]

    def _use(self, bank, marks, may_rise=True):
        for mark in marks:
            if mark.spread_ns is not None:
                self.path = self.path.after(mark.spread_ns, self.exchanges, may_rise)
        self.bank, self.last, self.held = bank, marks[-1], []

    def _gain(self, sec):
        """ns that real time is expected to gain on the counter, sec after (or before) the last mark used."""
        return dot(self.bank.mean, reach(self.last.real_ns, sec))

    def _wild(self, mark):
        """Log density of a wild mark.  It is off by any size from the predicted error up."""
        sec, ahead_ns = gained(self.last, mark)
        size = abs(ahead_ns - self._gain(sec)) + self._error(sec) + 1.0  # ns: no clock is better
        return math.log(WILD / (SIZES * size))

    def _explain(self, explanation):
        """-> (log odds against wild, Bank) if that explains the last marks held."""
        odds, bank, before, marks = 0.0, self.bank, self.last, self.held[-explanation.need:]
        if explanation.stepped:
            before = marks.pop(0)
            odds, bank = math.log(JUMP / WILD), self._restarted(before, explanation.rate_jumped)
        for mark in marks:
            evidence, bank = self._learn(bank, before, mark)
            odds, before = odds + evidence - self._wild(mark), mark
        return odds, bank

    def _var(self, sec, wander_var):
        """Square of the expected error of real time in ns^2, sec after (or before) the last mark used."""
        _, known_var = foreseen(self.bank.mean, self.bank.cov, reach(self.last.real_ns, sec))
        lean = self.bank.mean[LEAN]
        floor_var = (lean * self.path.gap(lean))**2 / 2   # if queueing leans, a wrong floor shifts
        return known_var + wander_var * abs(sec)**3 / 3 + floor_var

    def _error(self, sec):
        return math.sqrt(self._var(sec, self.bank.wander_var))

    def _sec(self, tick_ns):
        return (tick_ns - self.last.tick_ns) * 1e-9

    def has_phase(self):
        """Whether a mark has told the time."""
        return self.last is not None

    def doubts(self):
        """Whether a mark is held, and an early new one wanted."""
        return bool(self.held)

    def real(self, tick_ns):
        """-> (real time in ns, its standard deviation in ns).  ValueError before the first mark."""
        if self.last is None:
            raise ValueError("no mark yet")
        sec = self._sec(tick_ns)
        return self.last.real_ns + tick_ns - self.last.tick_ns + round(self._gain(sec)), self._error(sec)

    def variance(self, tick_ns):
        """real()'s error squared t seconds from tick_ns on: the factors of 1, t, t^2 and t^3, in ns^2.

        Exact without a wave, whose error counts as one of the rate here: too much after a day.
        """
        sec = self._sec(tick_ns)
        wander_var = self.bank.wander_var
        _, cov = carried(self.bank.mean, self.bank.cov, reach(self.last.real_ns, sec), wander_var, 0.0)
        return [self._var(sec, wander_var), 2 * cov[PHASE][RATE],
                cov[RATE][RATE] + cov[COS][COS] + cov[SIN][SIN], wander_var / 3]

    def rate(self):
        """-> (ppm, standard deviation in ppm) over whole days, as of the last mark used."""
        return self.bank.mean[RATE] * 1e-3, math.sqrt(self.bank.cov[RATE][RATE]) * 1e-3

    def rate_at(self, tick_ns):
        """-> ppm at one moment of the day."""
        angle = 0.0 if self.last is None else self.real(tick_ns)[0] % DAY_NS * 1e-9 * OMEGA
        return dot(self.bank.mean, [0.0, 1.0, 0.0, math.cos(angle), math.sin(angle)]) * 1e-3

    def learned(self):
        """-> (wander per sqrt(s), noise of a usual mark in ns, queueing included)."""
        _, excess_var = self.path.excess(None, self.bank.mean[LEAN])
        return math.sqrt(self.bank.wander_var) * 1e-9, math.sqrt(self.bank.noise_var + excess_var)

    def next_mark(self, tick_ns, target_ns):
        """Seconds from tick_ns until the predicted error reaches target_ns; 0 if it has, or in doubt."""
        return self._wait(tick_ns, target_ns, self.bank.wander_var)

    def _wait(self, tick_ns, target_ns, wander_var):
        if self.last is None or self.held:
            return 0.0
        start = self._sec(tick_ns)
        return wait_for(lambda sec: math.sqrt(self._var(start + sec, wander_var)), target_ns)

    def next_mark_plan(self, tick_ns, target_ns, most=EXCHANGES[-1]):
        """-> Plan(wait_sec, exchanges): when to take the next mark, and of how many exchanges up to most, for
        the fewest packets.  The path takes marks for made so."""
        counts = [count for count in EXCHANGES if count <= max(most, 1)]
        if self.last is not None:
            self.exchanges = max(counts, key=lambda count: self._worth(count, target_ns))
        wait_sec = self._wait(tick_ns, target_ns, self.bank.feared_wander_var())
        return Plan(max(LEAST_WAIT_SEC, wait_sec), self.exchanges)

    def _worth(self, exchanges, target_ns):
        """Seconds that a packet buys in the marks to come: a Kalman filter of (phase, rate) looks ahead."""
        noise_var = self.path.noise_var(self.bank.noise_var, exchanges, self.bank.mean[LEAN])
        mean, cov, total_sec = self.bank.mean[:PLAIN], [row[:PLAIN] for row in self.bank.cov[:PLAIN]], 0.0
        for _ in range(LOOKAHEAD):
            def error_after(sec):
                _, known_var = foreseen(mean, cov, [1.0, sec])
                return math.sqrt(known_var + self.bank.wander_var * sec**3 / 3)
            sec = max(LEAST_WAIT_SEC, wait_for(error_after, target_ns))
            mean, cov = carried(mean, cov, [1.0, sec, 0.0], self.bank.wander_var, 0.0)
            mean, cov = updated(mean, cov, 0.0, 0.0, noise_var)
            total_sec += sec
        return total_sec / exchanges

    def forget_phase(self, rate_error_ppm):
        """The counter started anew (a boot) or stood still: keep the rate, less certain by this much."""
        self.last, self.held = None, []
        self.bank = self.bank.renewed(PHASE, 0.0, UNKNOWN_NS**2, (rate_error_ppm * 1e3) ** 2)

    def assume_rate(self, rate_ppm, rate_error_ppm):
        """Another program has measured the rate: what is known of wander, noise and path stays."""
        self.last, self.held = None, []
        self.bank = self.bank.renewed(RATE, rate_ppm * 1e3, (rate_error_ppm * 1e3) ** 2)

    def state(self):
        """Plain data for JSON.  from_state(state()) goes on to the last bit."""
        return {"marks": [list(mark) for mark in ([self.last] if self.last else []) + self.held],
                "path": list(self.path), "exchanges": self.exchanges, "weights": self.bank.weights,
                "awake": [[number, *known] for number, known in self.bank.awake.items()]}

    SHAPE = {"marks": [MARK], "path": [[SPREAD], [(1, EXCHANGES[-1])], (0.0, 1e20)],
             "exchanges": (1, EXCHANGES[-1]), "weights": [(1e-99, 1.0)] * len(MODELS),
             "awake": [[(0, len(MODELS) - 1), [NUMBER], [[NUMBER]]]]}

    @classmethod
    def from_state(cls, state):
        """ValueError for what state() can't have given."""
        self = cls()
        if not fits(state, self.SHAPE):
            raise ValueError("damaged state, or of another release")
        marks = [Mark(*mark) for mark in state["marks"]]
        if not (len(marks) <= HELD_MAX and all(a.tick_ns < b.tick_ns for a, b in zip(marks, marks[1:]))
                and len(state["path"][0]) == len(state["path"][1]) <= PATH_MARKS
                and all(is_known(mean, cov, MODELS[number].unknowns) for number, mean, cov in state["awake"])
                and {len(mean) for _, mean, _ in state["awake"]} == {PLAIN, WAVE}):
            raise ValueError("damaged state, or of another release")
        self.last, self.held = (marks + [None])[0], marks[1:]
        self.path, self.exchanges = Path(*state["path"]), state["exchanges"]
        self.bank = Bank(state["weights"], {number: (mean, cov) for number, mean, cov in state["awake"]})
        if not is_possible(self.bank.mean):
            raise ValueError("a state with a rate of %s ppm" % self.rate()[0])
        return self


# ---- the bound ----
#
# A mark proves that real time is within its spread and the server's root distance of it, however the path is.
# Two proven ranges bound the counter's mean rate between them.
# ASSUMPTION  The mean rate over the time to come differs from that over a stretch of two days before by at
#             most 1.1 ppm for a day, then by that times the square root of the days.  A stretch x times as
#             long or as short tells less: the square root of x times as much is allowed.
# A mark that contradicts the bound shows that a server did not tell the truth, or that the counter is less
# steady: what is proven begins anew with it, and twice the change is allowed from then on.

CHANGE_PPM = 1.1
STRETCH_NS, PARTS = 2 * DAY_NS, 8   # and how many proven ranges are kept within it to measure rates from
Range = collections.namedtuple("Range", "tick_ns earliest_ns latest_ns")


def limited(value, most):
    """The value, but none over most or under -most."""
    return max(-most, min(most, value))


class Bound:
    """Where real time certainly is, if all servers told the truth within their root distance."""

    def __init__(self):
        self.forget()

    def forget(self, allowed_ppm=CHANGE_PPM):
        """The counter stood still or went back: nothing is known."""
        self.ranges, self.allowed_ppm = [], allowed_ppm   # of the stretch up to the latest mark

    def mark(self, tick_ns, real_ns, spread_ns, distance_ns):
        """Real time was within spread and distance of real_ns -> "used", "refused" (it proves nothing), or
        "restarted": it contradicts the bound."""
        if (not fits([tick_ns, real_ns, spread_ns, distance_ns], [TIME, TIME, SPREAD, SPREAD])
                or self.ranges and tick_ns <= self.ranges[-1].tick_ns):
            return "refused"
        most_ns = spread_ns + distance_ns
        proven = Range(tick_ns, real_ns - most_ns, real_ns + most_ns)
        earliest_ns, latest_ns = self.at(tick_ns) or proven[1:]
        both = Range(tick_ns, max(earliest_ns, proven.earliest_ns), min(latest_ns, proven.latest_ns))
        if both.earliest_ns > both.latest_ns:
            self.forget(min(2 * self.allowed_ppm, LIMIT_PPM))
            self.ranges.append(proven)
            return "restarted"
        if len(self.ranges) > 1 and self.ranges[-1].tick_ns - self.ranges[-2].tick_ns < STRETCH_NS / PARTS:
            del self.ranges[-1]
        self.ranges.append(both)
        while len(self.ranges) > 2 and tick_ns - self.ranges[1].tick_ns >= STRETCH_NS:
            del self.ranges[0]
        return "used"

    def coefficients(self):
        """What carries the bound on to any later counter value, by the formula in the manual, or None."""
        if not self.ranges:
            return None
        first, last = self.ranges[0], self.ranges[-1]
        ticks = max(1, last.tick_ns - first.tick_ns)  # after one mark 1: it bounds no rate under LIMIT_PPM
        return dict(last._asdict(),
                    slow_ppm=(last.earliest_ns - first.latest_ns - ticks) / ticks * 1e6,
                    fast_ppm=(last.latest_ns - first.earliest_ns - ticks) / ticks * 1e6,
                    change_ppm=self.allowed_ppm * math.sqrt(max(ticks / STRETCH_NS, STRETCH_NS / ticks)))

    def at(self, tick_ns):
        """-> (earliest_ns, latest_ns) of real time at a counter value from the last mark on, or None."""
        known = self.coefficients()
        if known is None:
            return None
        ticks = tick_ns - known["tick_ns"]
        change_ppm = known["change_ppm"] * math.sqrt(max(1, ticks / DAY_NS))
        slow_ppm = limited(known["slow_ppm"] - change_ppm, LIMIT_PPM)
        fast_ppm = limited(known["fast_ppm"] + change_ppm, LIMIT_PPM)
        return (known["earliest_ns"] + ticks + math.floor(ticks * 1e-6 * slow_ppm),
                known["latest_ns"] + ticks + math.ceil(ticks * 1e-6 * fast_ppm))

    def state(self):
        """Plain data for JSON; from_state(state()) goes on to the last bit."""
        return {"ranges": [list(each) for each in self.ranges], "ppm": [self.allowed_ppm]}

    @classmethod
    def from_state(cls, state):
        """ValueError for what state() can't have given."""
        if not (fits(state, {"ranges": [[TIME] * 3], "ppm": [NUMBER]}) and len(state["ranges"]) <= PARTS + 3
                and state["ranges"] == sorted(state["ranges"])
                and all(earliest_ns <= latest_ns for _, earliest_ns, latest_ns in state["ranges"])):
            raise ValueError("damaged bound")
        self = cls()
        self.allowed_ppm = limited(max([CHANGE_PPM] + state["ppm"][-1:]), LIMIT_PPM)
        self.ranges = [Range(*each) for each in state["ranges"]]
        return self


# ==== the counter and the clock ====

class Clock:
    """The counter and the system clock, observed only.  What steers a system clock derives from this."""
    doing, steers = "observing", False
    counter = "CLOCK_MONOTONIC_RAW" if hasattr(time, "CLOCK_MONOTONIC_RAW") else "CLOCK_MONOTONIC"
    bias_ppm = 0.0  # of the kernel's clock, see KernelClock.steer
    foreign = False  # somebody else has set the frequency since

    def read(self):
        """-> (tick_ns, clock_ns) at one moment: of 5 readings the one with the least time around it."""
        counter = getattr(time, self.counter)
        tries = [(time.clock_gettime_ns(counter), time.time_ns(), time.clock_gettime_ns(counter))
                 for _ in range(5)]
        before_ns, clock_ns, after_ns = min(tries, key=lambda each: each[2] - each[0])
        return (before_ns + after_ns) // 2, clock_ns

    def suspended_ns(self):
        """The time that this boot slept, during which the counter stood still."""
        clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return time.clock_gettime_ns(clock) - time.monotonic_ns()

    def boot_id(self):
        """What tells this boot from every other; empty where the system doesn't say."""
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                return file.read(64).strip()
        except OSError:
            return ""

    def steer(self, rate_ppm, offset_ns, tick_ns, news):
        """Told at each wake-up how the clock should run -> seconds to the next one, or None; OSError."""

    def announce(self, sigma_ns, most_ns, offset_ns, ahead_ns, tai_minus_clock_sec):
        """Told how wrong the clock may be, see KernelClock; OSError."""

    def report(self):
        """The kernel's view for etc/status, if any."""


class AdjtimeClock(Clock):
    """adjtime(), as every Unix has it: no rate, so the clock is nudged every 3 seconds."""
    doing, steers = "nudging the system clock with adjtime", True

    def __init__(self):
        self.steer(0, 0, 0, False)  # fails here and now without the privilege

    def steer(self, rate_ppm, offset_ns, tick_ns, news):
        import ctypes
        timeval = (ctypes.c_long * 2)(*divmod(offset_ns // 1000, 10**6))  # two longs on every such system
        libc_call("adjtime", timeval, None)  # replaces the slew before
        return BUSY_SEC

    def step(self, delta_ns):
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + delta_ns)


class KernelClock(Clock):
    """Linux: the rate by ADJ_FREQUENCY and ADJ_TICK, the phase by ADJ_OFFSET_SINGLESHOT.

    The kernel applies a single shot second by second, 500 us in each; until it is through, and the
    second it is in is over, what the clock is off by can't be told from what is on its way.
    """
    doing, steers = "steering the system clock with adjtimex", True
    SECOND_NS = 1100000000  # from a request to the end of the second it came in, and some
    MOST_US = SLEW_PPM * 58  # of a single shot: what a mark tells waits for its end, a minute at most

    def __init__(self, adjtimex=adjtimex, nominal_tick=10**6 // os.sysconf("SC_CLK_TCK")):
        self.adjtimex, self.nominal_tick = adjtimex, nominal_tick
        adjtimex(modes=ADJ_FREQUENCY, freq=adjtimex()["freq"])  # fails here and now without the privilege
        self.set_to = None  # the (freq, tick) that we gave the kernel
        self.busy_until_ns = 0  # until which tick a slew is on its way
        self.disturbed = True  # what the clock is off by at the end of that is not the bias alone

    def steer(self, rate_ppm, offset_ns, tick_ns, news):
        """The bias: the kernel's clock is some ppm off the rate that it was given (its own rounding, and the
        counter's calibration that went on after the boot), so that it is off again after each slew.  By half
        of what it is off by in SETTLED_SEC the bias is mended, by less when it is sampled more often."""
        self.busy_until_ns = min(self.busy_until_ns, tick_ns + SETTLED_SEC * 10**9)  # the counter went back
        self.disturbed = self.disturbed or news
        if tick_ns >= self.busy_until_ns:
            if not self.disturbed:
                self.bias_ppm = limited(self.bias_ppm - offset_ns / (2000 * SETTLED_SEC), BIAS_LIMIT_PPM)
            slew_us = round(limited(offset_ns / 1000, self.MOST_US))
            # a kernel that sleeps through its ticks makes of 3000 us 2832 to 3199: no bias is read off that
            self.disturbed = abs(slew_us) > SLEW_PPM
            if slew_us:
                self.adjtimex(modes=ADJ_OFFSET_SINGLESHOT, offset=slew_us)
                self.busy_until_ns = tick_ns + -(-abs(slew_us) // SLEW_PPM) * 10**9 + self.SECOND_NS
        ppm = limited(rate_ppm, LIMIT_PPM) - self.bias_ppm
        ppm_per_tick = 1e6 / self.nominal_tick
        ticks = round(ppm / ppm_per_tick) if abs(ppm) > SLEW_PPM else 0  # there ADJ_FREQUENCY ends
        wanted = round((ppm - ticks * ppm_per_tick) * 65536), self.nominal_tick + ticks
        now = self.adjtimex()
        found = now["freq"], now["tick"]
        self.foreign = self.set_to not in (None, found)
        if found != wanted:
            self.adjtimex(modes=ADJ_FREQUENCY | ADJ_TICK, freq=wanted[0], tick=wanted[1])
        self.set_to = wanted
        return None if abs(offset_ns) <= SETTLED_NS else max(BUSY_SEC, (self.busy_until_ns - tick_ns) / 10**9)

    def step(self, delta_ns):
        step_kernel(self.adjtimex, delta_ns)
        self.busy_until_ns, self.disturbed = 0, True  # the kernel drops its slews at a step

    def announce(self, sigma_ns, most_ns, offset_ns, ahead_ns, tai_minus_clock_sec):
        """Tell the kernel the standard deviation, and how far off the clock can be.

        The kernel copies a clock to the hardware clock unless STA_UNSYNC is set, which it does itself for
        whoever sets the clock.  So the flag is written only to change it, and is not cleared where somebody
        has set the clock since the sample, when it was ahead_ns ahead of the counter.
        """
        def has_moved():
            tick_ns, clock_ns = self.read()
            return abs(clock_ns - tick_ns - ahead_ns) > MOVED_NS

        most_ns += abs(offset_ns)
        now = self.adjtimex()
        if has_moved():
            return
        unsynchronised = most_ns >= MAXERROR_NS or abs(offset_ns) > STEP_NS
        changes = unsynchronised != bool(now["status"] & STA_UNSYNC)
        self.adjtimex(modes=ADJ_MAXERROR | ADJ_ESTERROR | (ADJ_STATUS if changes else 0),
                      status=now["status"] ^ STA_UNSYNC,
                      esterror=int(min(MAXERROR_NS, sigma_ns + 999) // 1000),
                      maxerror=int(min(MAXERROR_NS, most_ns + 999) // 1000))
        if changes and has_moved():  # in between, which takes some 20 us
            self.adjtimex(modes=ADJ_STATUS, status=now["status"] | STA_UNSYNC)
        if now["tai"] != tai_minus_clock_sec:
            self.adjtimex(modes=ADJ_TAI, constant=tai_minus_clock_sec)

    def report(self):
        now = self.adjtimex()
        return {"freq_ppm": now["freq"] / 65536, "tick": now["tick"], "maxerror_us": now["maxerror"],
                "esterror_us": now["esterror"], "synchronised": not now["status"] & STA_UNSYNC}


def libc_call(name, *args):
    """Call a function of libc that returns 0; OSError, AttributeError (no such function), ImportError."""
    import ctypes
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# ==== files ====

class Home:
    """The home directory: `etc`, and the FIFO `adjust`, which is looked for again when it was deleted or
    replaced.  Both are made when missing."""
    OURS = {"atto", "state", "status", "lock", "leap", "kisses"}  # in etc; the last two: an earlier version's

    def __init__(self, path):
        """OSError, also where something else is called etc."""
        self.adjust, etc = (os.path.join(os.path.abspath(path), name) for name in ("adjust", "etc"))
        self.etc_fd = None
        if not os.path.lexists(etc):
            os.mkdir(etc, 0o755)
        self.etc_fd = self.open(etc, os.O_RDONLY | os.O_DIRECTORY)
        self.fifo_fd, self.writer_fd = os.pipe()  # until it can be opened: one that nobody writes to

    def open(self, name, flags):
        """A descriptor of a file of etc or a whole path, without following a link or waiting; OSError."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags, 0o600, dir_fd=self.etc_fd)

    def lock(self):
        """No two clockspeeds; only its user and root can open what is locked.  RuntimeError, OSError."""
        self.lock_fd = self.open("lock", os.O_RDONLY | os.O_CREAT)
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError("another clockspeed is running there") from None

    def give_etc(self, uid):
        """Let the user have it, unless it holds what is not ours; RuntimeError, OSError."""
        if os.fstat(self.etc_fd).st_uid == uid:
            return
        others = {name.replace(".tmp", "") for name in os.listdir(self.etc_fd)} - self.OURS
        if others:
            raise RuntimeError("it holds %s, so it is not clockspeed's own" % ascii(min(others)))
        os.fchown(self.etc_fd, uid, -1)

    def give_adjust(self, uid):
        """Let the user have it, unless somebody has it already; OSError."""
        if os.fstat(self.fifo_fd).st_uid == 0:
            os.fchown(self.fifo_fd, uid, -1)

    def read(self, name, parse=bytes):
        """What parse makes of a file of etc, None when it is missing; OSError and parse's errors."""
        try:
            with open(name, "rb", buffering=0, opener=self.open) as file:
                return parse(file.read(1 << 18) or b"")
        except FileNotFoundError:
            return None

    def replace(self, name, content, indent=None):
        """Write a file of etc whole, bytes or JSON; OSError, ImportError."""
        if not isinstance(content, bytes):
            import json  # python3-minimal has none
            content = json.dumps(content, indent=indent).encode() + b"\n"
        temporary = name + ".tmp"
        try:  # it is always a new one
            os.unlink(temporary, dir_fd=self.etc_fd)
        except FileNotFoundError:
            pass
        with open(temporary, "xb", opener=self.open) as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=self.etc_fd, dst_dir_fd=self.etc_fd)
        os.fsync(self.etc_fd)

    def open_adjust(self):
        """Make and open it where that isn't done yet; OSError, RuntimeError for what no later try mends."""
        try:
            if not os.path.lexists(self.adjust):
                os.mkfifo(self.adjust, 0o600)
                os.lchown(self.adjust, os.fstat(self.fifo_fd).st_uid, -1)  # whose the one before it was
            there = os.lstat(self.adjust)
            if not stat.S_ISFIFO(there.st_mode):
                raise OSError(errno.EEXIST, "it is not a FIFO; remove it: rm -r " + self.adjust)
            if os.path.samestat(there, os.fstat(self.fifo_fd)):
                return
            try:
                os.close(self.open(self.adjust, os.O_WRONLY))
                raise RuntimeError("another program reads adjust; stop the other clockspeed first")
            except OSError:
                pass  # no other does, not even a C clockspeed
            fd = self.open(self.adjust, os.O_RDWR)  # or the end of each writer would be one to read
            os.dup2(fd, self.fifo_fd, inheritable=False)
            os.close(fd)
        except PermissionError:
            raise RuntimeError("adjust is another user's, or gone where only root can make it") from None

    def packets(self):
        """What was written: a list of packets; where one has another size, all that came at once as one."""
        try:
            data = os.read(self.fifo_fd, 65536)
        except BlockingIOError:
            return []
        if len(data) % TAI64NA.size:
            return [data]  # where one packet ends and the next begins can't be told any more
        return [data[i:i + TAI64NA.size] for i in range(0, len(data), TAI64NA.size)]


class Log:
    """Lines for a descriptor.  One that can't be written at once is lost, and counted in the next."""

    def __init__(self, fd):
        self.fd, self.lost = fd, 0

    def __call__(self, text):
        if self.lost:
            text = "lost: %d lines\n%s" % (self.lost, text)
        data = text.encode(errors="replace")[:select.PIPE_BUF - 1] + b"\n"  # a ready pipe takes so much
        try:
            if not select.select([], [self.fd], [], 0)[1]:
                raise BlockingIOError
            os.write(self.fd, data)
            self.lost = 0
        except OSError:
            self.lost += 1


class Attempts:
    """Calls that may fail: why is said, once as long as it is for that reason.  RuntimeErrors go through."""

    def __init__(self, warn=Log(2)):
        self.warn, self.whys = warn, {}

    def __call__(self, doing, function, *args):
        """-> what the function returns, None when it fails"""
        why = None
        try:
            return function(*args)
        except (AttributeError, ImportError, OSError, OverflowError, RecursionError, ValueError,
                struct.error) as err:
            why = reason(err)
            if self.whys.get(doing) != why:
                self.warn("%s: warning: unable to %s: %s" % (PROGRAM, doing, why))
        finally:
            self.whys[doing] = why


# ==== what the files say ====

OUTCOMES = "used", "doubted", "refused"
REAL_NS = RELEASE_SEC * 10**9, (RELEASE_SEC + 2**32) * 10**9  # real time can be in NTP's 136 years from then
# Shapes of etc/state; what is only compared has none, Estimator and Bound look at their own.
LAST_MARK = {"tick_ns": TIME, "offset_ns": TIME, "spread_ns": (*SPREAD, None), "distance_ns": (*SPREAD, None),
             "outcome": (1, 0, *OUTCOMES)}  # these words, as no number is from 1 to 0
STATE = {"version": (2, 2), "suspended_ns": TIME, "tick_ns": TIME, "clock_ns": TIME, "known_ns": REAL_NS,
         "bias_ppm": (-BIAS_LIMIT_PPM, BIAS_LIMIT_PPM), "marks": dict.fromkeys(OUTCOMES, SPREAD)}


def parse_state(data):
    """The bytes of etc/state -> what save() made them of; ValueError, RecursionError."""
    import json  # here, as getopt is in main
    state = json.loads(data)
    known = isinstance(state, dict) and {key: state.get(key) for key in STATE}
    if not (fits(known, STATE) and (state.get("last_mark") is None or fits(state["last_mark"], LAST_MARK))):
        raise ValueError("damaged, or of another release")
    return dict(state, estimator=Estimator.from_state(state.get("estimator")),
                bound=Bound.from_state(state.get("bound")))


def parse_atto(packet):
    """The bytes of etc/atto -> rate in ppm; ValueError."""
    ns, last = unpack(packet)
    rate_ppm = (ns - 1 + last / 10**9) * 1e6
    if not abs(rate_ppm) <= ATTO_LIMIT_PPM:
        raise ValueError("%.9g ns per tick, so it was made with another counter" % (ns + last / 1e9))
    return rate_ppm


def duration(sec):
    """Seconds as people say them: 45 s, 12 min, 5.6 h, 3.2 d."""
    for limit, unit_sec, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if sec < limit:
            return "%.3g %s" % (sec / unit_sec, unit)
    return "%.3g d" % (sec / 86400)


# ==== the daemon ====

class Clockspeed:
    """What happens at a start, a mark and a wake-up.  Real time is in ns of the system clock's own scale; an
    offset is real time minus system clock; target_ns is the error that is to be kept, or None."""

    def __init__(self, clock, home, scale="utc", target_ns=None, may_step=True, say=Log(1), attempt=None):
        self.clock, self.home, self.say, self.attempt = clock, home, say, attempt or Attempts()
        self.scale, self.target_ns, self.may_step = scale, target_ns, may_step and clock.steers
        self.marks, self.last_mark = dict.fromkeys(OUTCOMES, 0), None  # of this boot
        kernel, self.boot_id = clock.report(), clock.boot_id()
        self.early_marks = 0 if kernel and kernel["synchronised"] else EARLY_MARKS  # set in this boot already
        self.done_ns = {}  # what is done now and then -> tick when it was last done
        self.news = True  # there is what neither the kernel nor the files have been told
        self.set_back_wait_sec = 0
        self.tick_ns, self.clock_ns = clock.read()
        self.suspended_ns, self.set_by_others = clock.suspended_ns(), False
        self.phase_lost = False  # by a suspend or a counter that went back, until a mark
        source = self.load()
        self.say("start: %s, %s, scale %s, rate %+.4f ppm, rate error %.4f ppm, %s"
                 % (clock.doing, clock.counter, scale, *self.estimator.rate(), source))
        if not self.estimator.has_phase() and self.clock_ns < self.known_ns - STEP_NS:
            self.attempt("step the clock", self.step, self.known_ns - self.clock_ns,
                         "which showed a time before the last one known")

    def due(self, name, sec=HOURLY_SEC):
        """Whether it is so many seconds ago that this said yes, or it never did."""
        if name in self.done_ns and self.tick_ns - self.done_ns[name] < sec * 10**9:
            return False
        self.done_ns[name] = self.tick_ns
        return True

    def real_ns(self):
        """Real time at the last sample."""
        return self.estimator.real(self.tick_ns)[0] if self.estimator.has_phase() else self.clock_ns

    def offset_ns(self):
        return self.real_ns() - self.clock_ns

    def most_ns(self):
        """How far what is believed at the last sample can be off real time, or None."""
        bound = self.bound.at(self.tick_ns)
        return bound and max(abs(ns - self.real_ns()) for ns in bound)

    def sample(self):
        """Read counter and clock, and see what happened to them since the last time."""
        before_tick_ns, before_offset_ns = self.tick_ns, self.offset_ns()
        self.tick_ns, self.clock_ns = self.clock.read()
        ticks_ns = self.tick_ns - before_tick_ns
        slept_ns = self.clock.suspended_ns() - self.suspended_ns
        if ticks_ns < 0:
            text = "counter: it went back by %s, as in a machine that is restored from a snapshot"
            return self.lose_phase(REBOOT_PPM, text % duration(-ticks_ns / 1e9))
        if abs(slept_ns) > SUSPENDED_NS:
            return self.lose_phase(0, "suspend: the counter stood still for " + duration(slept_ns / 1e9))
        moved_ns = before_offset_ns - self.offset_ns()
        if abs(moved_ns) > MOVED_NS + ticks_ns * MOVED_PPM // 10**6:
            self.say("moved: somebody set the system clock by %+.3f s" % (moved_ns / 1e9))
            self.news = True  # a slew that was on its way is lost in a step
            self.done_ns.pop("slew", None)  # there is another one to tell of
            self.set_by_others = self.set_by_others or abs(moved_ns) > STEP_NS

    def lose_phase(self, rate_error_ppm, text):
        """The counter does not tell the time any more: the system clock is taken as it is."""
        self.say(text + "; a mark is wanted")
        self.estimator.forget_phase(rate_error_ppm)
        self.bound.forget()
        self.done_ns.clear()
        self.suspended_ns, self.set_by_others = self.clock.suspended_ns(), False
        self.phase_lost = self.news = True

    def take(self, packets):
        """Adjustments that came out of the FIFO at once -> how many seconds it shall rest, so that a flood
        keeps the daemon from nothing; wake() is to follow."""
        whys = ["more than %d marks at once" % BATCH] * (len(packets) - BATCH)
        for packet in packets[-BATCH:]:  # the latest ones
            try:
                self.mark(packet)
            except ValueError as err:
                whys.append(str(err))
        if whys:
            self.marks["refused"] += len(whys)
            self.say("refused: " + whys[0] + (", and %d more" % (len(whys) - 1) if len(whys) > 1 else ""))
        return 1 if whys or len(packets) >= BATCH else 0

    def mark(self, packet):
        """ValueError for what is no mark."""
        if len(packet) != TAI64NA.size:
            raise ValueError("%d bytes at once, not 16" % len(packet))
        offset_ns, last = unpack(packet)
        self.sample()
        real_ns = self.clock_ns + offset_ns
        if not REAL_NS[0] <= real_ns < REAL_NS[1]:
            raise ValueError("no real time is %s from the system clock" % duration(abs(offset_ns) / 1e9))
        spread_ns, distance_ns = unpack_quality(last) or (None, None)
        outcome = self.estimator.mark(self.tick_ns, real_ns, spread_ns)
        if outcome == "used":
            self.bound.mark(self.tick_ns, real_ns, spread_ns, distance_ns)
        self.marks[outcome] += 1
        self.last_mark = {"tick_ns": self.tick_ns, "offset_ns": offset_ns, "spread_ns": spread_ns,
                          "distance_ns": distance_ns, "outcome": outcome}
        self.news = True
        most_ns = self.most_ns()
        told = [spread_ns, distance_ns, most_ns and "%.9f" % (most_ns / 1e9)]
        spread, distance, bound = ("-" if each is None else each for each in told)
        self.say("mark: tick %d ns, real %d ns, spread %s ns, distance %s ns, offset %+.9f s, error %.9f s, "
                 "bound %s s, rate %+.4f ppm, rate error %.4f ppm, %s"
                 % (self.tick_ns, real_ns, spread, distance, offset_ns / 1e9,
                    self.estimator.real(self.tick_ns)[1] / 1e9, bound, *self.estimator.rate(), outcome))
        if outcome == "used" and self.marks["used"] <= self.early_marks and abs(self.offset_ns()) > STEP_NS:
            self.attempt("step the clock", self.step, self.offset_ns(),
                         "by one of the first %d marks of this boot" % EARLY_MARKS)

    def step(self, delta_ns, why):
        """OSError, struct.error"""
        if self.may_step:
            self.clock.step(delta_ns)
            self.say("step: the system clock by %+.9f s, %s" % (delta_ns / 1e9, why))
            self.tick_ns, self.clock_ns = self.clock.read()

    def set_back(self):
        """Undo what others did to the clock, now and then; not while a mark in doubt may prove them right."""
        if abs(self.offset_ns()) <= STEP_NS:
            self.set_by_others = False
        elif self.set_by_others and self.may_step and not self.estimator.doubts():
            if not self.due("set back", self.set_back_wait_sec):
                return self.say_foreign("system clock")
            self.set_back_wait_sec = min(max(HOURLY_SEC, 2 * self.set_back_wait_sec), 86400)
            self.set_by_others = False
            self.attempt("step the clock", self.step, self.offset_ns(),
                         "back to the time of the marks; if it was meant, stop clockspeed (svc -d) first")

    def say_foreign(self, what):
        if self.due("foreign"):
            self.say("foreign: another program sets the %s; one of the two must go" % what)

    def steer(self):
        """-> seconds until the next time; OSError"""
        rate_ppm = self.estimator.rate_at(self.tick_ns)
        wait_sec = self.clock.steer(rate_ppm, self.offset_ns(), self.tick_ns, self.news)
        if self.clock.foreign:
            self.say_foreign("clock's frequency")
        sigma_ns = most_ns = MAXERROR_NS  # where nobody knows any more
        if self.estimator.has_phase():
            sigma_ns = self.estimator.real(self.tick_ns)[1]
            most_ns = self.most_ns() or 4 * sigma_ns  # no mark tells of itself, as the C clients' don't
        if self.phase_lost or self.estimator.has_phase():  # else the kernel may know better
            self.clock.announce(sigma_ns, most_ns, self.offset_ns(), self.clock_ns - self.tick_ns,
                                TAI_MINUS_CLOCK_SEC[self.scale])
        return wait_sec

    def wake(self):
        """Sample the clock and steer it -> seconds until the next time."""
        self.sample()
        self.set_back()
        slew_sec = abs(self.offset_ns()) / (SLEW_PPM * 1000)
        if self.news and slew_sec > 60 and self.clock.steers and self.due("slew"):
            self.say("slew: %+.3f s will take %s; clockctl set steps at once"
                     % (self.offset_ns() / 1e9, duration(slew_sec)))
        wait_sec = self.attempt("steer the clock", self.steer) or SETTLED_SEC
        self.save()
        return wait_sec

    def load(self):
        """Take up what an earlier run knew -> where it came from, for the start line."""
        self.estimator, self.bound = Estimator(), Bound()
        atto_ppm = self.attempt("use etc/atto", self.home.read, "atto", parse_atto)
        state = self.attempt("use etc/state", self.home.read, "state", parse_state) or {}
        self.known_ns = state.get("known_ns", REAL_NS[0])  # no clock is right that shows less
        if state.get("counter") != self.clock.counter:
            if atto_ppm is None:
                return "no rate known"
            self.estimator = Estimator(atto_ppm, ATTO_PPM)
            return "rate of etc/atto"
        self.estimator = state["estimator"]
        same_boot = (state.get("boot_id"), state.get("scale")) == (self.boot_id or None, self.scale)
        ours = state.get("atto"), state.get("next_atto")
        c_was_here = atto_ppm is not None and self.kept_atto() not in ours
        if c_was_here:
            self.estimator.assume_rate(atto_ppm, ATTO_PPM)
        elif not same_boot:
            self.estimator.forget_phase(REBOOT_PPM)
        if same_boot:
            self.marks, self.last_mark, self.early_marks = state["marks"], state.get("last_mark"), EARLY_MARKS
            self.clock.bias_ppm = state["bias_ppm"]
        if self.estimator.has_phase():  # what happened since, the next sample finds
            self.bound = state["bound"]
            self.tick_ns, self.clock_ns, self.suspended_ns = (
                state["tick_ns"], state["clock_ns"], state["suspended_ns"])
        if c_was_here:
            return "rate of etc/atto, the rest of etc/state"
        return "phase and rate of etc/state" if self.estimator.has_phase() else "rate of etc/state"

    def kept_atto(self):
        return self.attempt("use etc/atto", self.home.read, "atto", bytes.hex)

    def save(self):
        """etc/atto, etc/state and etc/status, when they are due."""
        known, (rate_ppm, rate_error_ppm) = self.estimator.has_phase(), self.estimator.rate()
        both = {"version": 2, "boot_id": self.boot_id, "counter": self.clock.counter, "scale": self.scale,
                "tick_ns": self.tick_ns, "suspended_ns": self.suspended_ns,
                "marks": self.marks, "last_mark": self.last_mark}
        if self.due("state", 0 if self.news else HOURLY_SEC):
            if known:
                self.known_ns = max(REAL_NS[0], self.real_ns())
            # etc/state names the atto before it and the one after it: a kill may come between the two files
            atto, kept = pack(*divmod(round(10**9 * (1 + rate_ppm / 1e6)), 10**9)), self.kept_atto()
            self.attempt("write etc/state", self.home.replace, "state", dict(
                both, atto=kept, next_atto=atto.hex(), known_ns=self.known_ns, bias_ppm=self.clock.bias_ppm,
                clock_ns=self.clock_ns, estimator=self.estimator.state(), bound=self.bound.state()))
            # one mark would tell no rate
            if self.marks["used"] > 1 and abs(rate_ppm) <= ATTO_LIMIT_PPM and atto.hex() != kept:
                self.attempt("write etc/atto", self.home.replace, "atto", atto)
        if self.due("status", 0 if self.news else STATUS_SEC):
            wander, noise_ns = self.estimator.learned()
            plan = Plan(None, None)
            if self.target_ns:
                plan = self.estimator.next_mark_plan(self.tick_ns, self.target_ns)
            self.attempt("write etc/status", self.home.replace, "status", dict(
                both, pid=os.getpid(), doing=self.clock.doing, observe_only=not self.clock.steers,
                written_ns=self.clock_ns, offset_ns=self.offset_ns() if known else None,
                variance=self.estimator.variance(self.tick_ns) if known else None,
                bound=self.bound.coefficients(), rate_ppm=rate_ppm, rate_error_ppm=rate_error_ppm,
                noise_ns=noise_ns, wander=wander, kernel=self.clock.report(),
                next=dict(plan._asdict(), settling=self.marks["used"] < EARLY_MARKS)), 1)
        self.news = False


# ==== main ====

def clock_error_ns():
    """The error that is to be kept, or None; ValueError."""
    text = os.environ.get("CLOCK_ERROR")
    if not text:
        return None
    unit = next(unit for unit in ("ms", "us", "s", "") if text.endswith(unit))
    try:
        error_ns = float(text[:len(text) - len(unit)]) * {"ms": 1e6, "us": 1e3}.get(unit, 1e9)
    except ValueError:
        error_ns = 0
    if not 1 <= error_ns <= 3600e9:
        raise ValueError("CLOCK_ERROR is not a time like 0.010 or 10ms")
    return round(error_ns)


def find_user(name):
    """Its line of the passwd file, None for no name; ValueError when there is none."""
    try:
        return None if name is None else pwd.getpwnam(name)
    except LookupError:
        raise ValueError("there is no such user") from None


def become(user, capabilities):
    """Become that user and keep those capabilities alone; OSError."""
    def drop():
        os.setgroups([])
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)

    if os.getuid() == user.pw_uid != 0:
        return
    try:
        import ctypes
        import json  # now, as that user may not be able to read Python's files
    except ImportError:  # it only observes then, and no capability is to be kept
        return drop()
    on = tuple(map(ctypes.c_ulong, (1, 0, 0, 0)))
    libc_call("prctl", PR_SET_KEEPCAPS, *on)
    drop()
    libc_call("capset", struct.pack("=Ii", CAPABILITY_VERSION, 0),
              struct.pack("=6I", capabilities, capabilities, 0, 0, 0, 0))
    libc_call("prctl", PR_SET_NO_NEW_PRIVS, *on)


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


def serve(daemon, home, signal_fd):
    """Marks as they come, the clock when it is time, until TERM or INT; RuntimeError."""
    rest_sec = 0
    while not select.select([signal_fd], [], [], rest_sec)[0]:
        daemon.attempt("read adjust", home.open_adjust)
        wait_sec, rest_sec = daemon.wake(), 0
        if home.fifo_fd in select.select([signal_fd, home.fifo_fd], [], [], wait_sec)[0]:
            rest_sec = daemon.take(home.packets())


def main(argv):
    import getopt  # here, where the memory that compiling this file took can be had for it
    try:
        doing = "write output"
        if begin(argv):
            return 0
        signal_fd, wakeup_fd = os.pipe()  # one byte for TERM or INT
        os.set_blocking(wakeup_fd, False)
        signal.set_wakeup_fd(wakeup_fd)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        options, operands = getopt.getopt(argv[1:], "nSu:w:")
        options = dict(options)
        if len(operands) > 1:
            raise getopt.GetoptError("")
        path = operands[0] if operands else os.environ.get("CLOCKSPEED_HOME") or "/usr/local/clockspeed"
        user_name, writer_name = options.get("-u"), options.get("-w", options.get("-u"))
        doing, attempt = "start", Attempts()
        scale, target_ns = clock_scale(), clock_error_ns()
        doing = "become %s" % user_name
        user = find_user(user_name)
        doing = "give adjust to %s" % writer_name
        writer = find_user(writer_name)
        doing = "use %s/etc (a directory, not a link; svc/install or mkdir -p makes it)" % path
        os.umask(0o022)
        home = Home(path)
        doing = "lock %s/etc" % path
        attempt(doing, home.lock)
        doing = "read adjust"
        attempt(doing, home.open_adjust)
        kind = Clock if "-n" in options else KernelClock if sys.platform == "linux" else AdjtimeClock
        clock = attempt("steer the clock", kind) or Clock()
        settle()
        if writer:
            attempt("give adjust to " + writer_name, home.give_adjust, writer.pw_uid)
        if user:
            doing = "give %s/etc to %s" % (path, user_name)
            attempt(doing, home.give_etc, user.pw_uid)
            doing = "become " + user_name
            become(user, 1 << CAP_SYS_TIME if clock.steers else 0)
        doing = "run"
        daemon = Clockspeed(clock, home, scale, target_ns, "-S" not in options, attempt=attempt)
        try:
            serve(daemon, home, signal_fd)
        finally:
            daemon.news = True
            daemon.save()
        daemon.say("stop: the clock runs on at the rate it has")
        return 0
    except getopt.GetoptError:
        complain("usage", USAGE)
        return 100
    except (AttributeError, ImportError, OSError, RuntimeError, ValueError) as err:
        Log(2)("%s: fatal: unable to %s: %s" % (PROGRAM, doing, reason(err)))  # it never waits
        return 111


if __name__ == "__main__":
    # At exit, since Python keeps the syntax tree of a script, 4 MB here, until the script is through.
    atexit.register(lambda: os._exit(main(sys.argv)))
