#!/bin/sh
"""exec" python3 -IS -c 'import sys; del sys.argv[0]; __file__ = sys.argv[0]; exec(compile(open(__file__, "rb").read(), __file__, "exec"))' "$0" "$@"
clockspeed - keep the system clock right between rare looks at a time server

SYNOPSIS
    clockspeed [-n] [-S] [-u user] [home]
    sntpclock 192.0.2.1 > /usr/local/clockspeed/adjust      (better: clockctl mark)

DESCRIPTION
    A daemon, to be run in the foreground by daemontools, runit or s6.  It learns from the
    adjustments written into the FIFO `adjust` how fast the machine's counter really ticks,
    and keeps the system clock at that rate, for as long as nobody asks a time server.

    An adjustment is real time minus system clock, 16 bytes of TAI64NA in one write, as
    sntpclock and taiclock make it.  A positive offset below means a system clock that is
    behind; a positive rate, a counter that ticks too slowly: rate is (real seconds per
    counter second - 1) x 10^6 ppm.

    The counter is CLOCK_MONOTONIC_RAW, which nobody steers.  Where there is none it is
    CLOCK_MONOTONIC, the start line says so, and what is learned is less exact.

    On Linux the rate goes into the kernel (adjtimex), so that the clock runs right between
    wake-ups and when clockspeed is killed; what the clock is off by is slewed away by the
    kernel at 500 ppm.  Elsewhere adjtime() nudges the clock every 3 seconds.

    The first mark of a boot may step the clock, when it is over 0.5 s off.  After that
    clockspeed never steps: `clockctl set` does.

OPTIONS
    -n       observe only: learn and tell, never touch the clock; needs no privilege
    -S       never step, not even at the first mark of a boot
    -u user  after the start as root become that user, when there is one, and keep CAP_SYS_TIME
             alone (Linux)
    home     the directory below, instead of $CLOCKSPEED_HOME or /usr/local/clockspeed

FILES (in home)
    adjust      the FIFO; made with mode 0600 when missing, kept with its owner when there
    etc/atto    seconds of real time per tick (nanosecond), as the C clockspeed keeps it
    etc/state   what the estimator knows, for the next start
    etc/status  the same for people and programs (JSON): clockctl status reads it
    etc/leap    the leap second that the time servers announce for the end of this day, kept by
                sntpclock -s: counts on the last UTC day of June and December, when no table tells
                (a leap-seconds.list that has not expired does, what it has and what it has not);
                etc/state keeps it from then on, until a table has it

OUTPUT
    One line for each event on stdout; multilog adds the time.

ENVIRONMENT
    CLOCKSPEED_HOME, CLOCK_SCALE (utc or tai: what the system clock counts; without it the
    time zone tells), LEAPSECS (a leap second table to use before the system's own)

EXIT STATUS
    0 after TERM or INT; 100 wrong usage; 111 no home, no permission, a system error

SEE ALSO
    clockctl, sntpclock, taiclock, clockadd, clockview
"""
import collections
import errno
import fcntl
import getopt
import math
import os
import select
import signal
import stat
import struct
import sys
import time
try:
    import json
except ImportError:  # python3-minimal has none
    json = None

PROGRAM = "clockspeed"
USAGE = "clockspeed [-n] [-S] [-u user] [home]"
HOME = "/usr/local/clockspeed"
RELEASE_SEC = 1793491200  # 2026-11-01: real time is later than this release
ERA_SEC = 2**32  # an NTP era, 136 years: no mark from beyond it can be meant
STEP_NS = 5 * 10**8  # over 0.5 s the first mark of a boot steps: slewing that takes 17 minutes
SLEW_PPM = 500  # what Linux and the BSDs slew at
LONG_SLEW_SEC, SLEW_AGAIN_SEC = 60, 3600  # from here on a slew is worth a line; and how often another one
SETTLED_NS = 5000  # below this the clock is looked at once a minute, above it every 3 seconds
BUSY_SEC, SETTLED_SEC = 3, 60
MOVED_NS = 10**7  # a clock that moved this much against the prediction was set by somebody else...
MOVED_PPM = 1000  # ...unless slews and rates, which never reach this, had the time for it
SUSPENDED_NS = 10**8  # CLOCK_BOOTTIME gains as much on CLOCK_MONOTONIC only in a suspend
STATUS_SEC = 600  # etc/status is never older
STATE_SEC = 3600  # nor is etc/state, which wears out flash memory and changes with marks only
TABLE_SEC = 21600  # how often the leap second table is read again; leaps are announced half a year ahead
ARM_SEC = 86400  # the kernel leaps at the next UTC midnight: it is told on the last day only
LEAP_NS = 2 * 10**9  # so near to a leap second the clock's reading is ambiguous, and let alone
FOREIGN_SEC = 3600  # how often a second program on the same clock is worth a line
ADJ_FREQUENCY, ADJ_MAXERROR, ADJ_ESTERROR, ADJ_STATUS, ADJ_TAI, ADJ_TICK = 0x2, 0x4, 0x8, 0x10, 0x80, 0x4000
ADJ_OFFSET_SINGLESHOT, ADJ_OFFSET_SS_READ = 0x8001, 0xA001
STA_INS, STA_DEL, STA_UNSYNC = 0x10, 0x20, 0x40
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS, CAP_SYS_TIME, CAPABILITY_VERSION = 8, 38, 25, 0x20080522
BIAS_LIMIT_PPM = 50  # no kernel's clock is off the rate that it was given by more: somebody else was at work
RATE_RANGE = (0.9, 1.1)  # ns of real time per tick; an atto outside was made with another counter
UNKNOWN_PPM = 500.0  # what a rate may be off by before any mark: a crystal 50, a virtual machine some 100
REBOOT_PPM = 1.0  # what temperature and a new calibration of the counter may make of a kept rate
ATTO_PPM = 10.0  # and of one from etc/atto, which tells nothing of its quality


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
#         the held ones best: they are wild, or real time stepped, or the rate jumped, or noise or wander
#         grew, or nothing that was known holds.
# LIMITS  A floor that is longer one way shifts the clock, unseen.  A wave's harmonics are followed as wander.
#
# Units are ns, s and ns/s (0.001 ppm); phase and rate are real time minus counter.  NOTES.md has the sources.
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
WAVE_CHANCE, WAVE_PPM, WEATHER_PPM, WAVE_WANDERS = 0.15, 0.3, 0.08, (1e-11, 1e-10, 1e-9)
WAVE_SECS = 3600, 10800, 21600, 43200   # from now: moments to bound a wave's error at
LEAN, LEAN_DRIFT = 0.25, 0.01   # usual lean (1: queueing is one way only), and its change from mark to mark
SWITCH = 1e-3         # chance that wander or noise change between two marks: some times a year, marked hourly
SILENT = 1e-2         # a model so much less likely than the best has no say: a hundred of them would shout
NEVER = -200.0        # logarithm of the least likelihood beside the best, that nothing underflows
DIGITS = 1e-12        # the least share of a variance that a float's 16 digits can subtract well
# What a contradicting mark may be, as chances per mark.  Sizes are unknown: a density of 1/(SIZES |e|) is the
# same in each decade; 1 us to 10 s and both signs make 2 ln(10^7) = 32, and its logarithm hardly matters.
WILD, STEP, BEND, ANEW = 0.03, 1e-3, 1e-3, 1e-4
SIZES = 32.0
# (marks needed, what happened before them): as many as unknowns (the step; size and moment; phase and rate;
# noise and wander) and one more to confirm.  Fewer can't be believed, but make a rival explanation wait.
EXPLANATIONS = (2, "step"), (3, "bend"), (3, "anew"), (3, "noisy")
HELD_MAX = 8          # so many contradictions in a row by wild marks: once in 10^12; the old belief has to go
FAR_SEC = 1e8         # next_mark's longest answer
LEAST_WAIT_SEC = 64   # what time servers ask for
EXCHANGES, LOOKAHEAD = (1, 2, 3, 4, 6, 8), 12  # next_mark_plan compares these, over so many marks

Model = collections.namedtuple("Model", "wander_var noise_var share unknowns weather_var")
Belief = collections.namedtuple("Belief", "model weight mean cov")  # model: its place in MODELS
Mark = collections.namedtuple("Mark", "tick_ns real_ns spread_ns")
Plan = collections.namedtuple("Plan", "wait_sec exchanges")
PHASE, RATE, LEANING, COS, SIN = range(5)   # the unknowns; a model without a wave has the first three


def grid(wanders, noises, chance, unknowns, weather_ppm):
    pairs = [(w, n, math.exp(-0.5 * math.log10(n / USUAL_NOISE) ** 2)) for w in wanders for n in noises]
    total = sum(share for _, _, share in pairs)
    return [Model((w * 1e9) ** 2, (n * 1e9) ** 2, chance * share / total, unknowns,
                  (weather_ppm * 1e3) ** 2 / DAY_SEC) for w, n, share in pairs]


PLAIN = grid(WANDERS, NOISES, 1 - WAVE_CHANCE, 3, 0.0)
MODELS = PLAIN + grid(WAVE_WANDERS, NOISES[::2], WAVE_CHANCE, 5, WEATHER_PPM)


def dot(a, b):
    return sum([x * y for x, y in zip(a, b)])


def reach(real_ns, sec):
    """What each unknown, if it is 1, adds to the phase in sec from real_ns on: row 1 of the transition."""
    start = real_ns % DAY_NS * 1e-9 * OMEGA
    end = start + OMEGA * sec
    return 1.0, sec, 0.0, (math.sin(end) - math.sin(start)) / OMEGA, (math.cos(start) - math.cos(end)) / OMEGA


def carried(mean, cov, moves, wander_var, weather_var):
    """Kalman's prediction: the phase moves by reach(), the others stay; wander's covariance is Allan's."""
    sec = moves[RATE]
    phase_row = [dot(row, moves) for row in cov]
    phase_var = dot(phase_row, moves)
    cov = [[p] + row[1:] for p, row in zip(phase_row, cov)]
    cov[PHASE] = [phase_var + wander_var * sec**3 / 3] + phase_row[1:]
    cov[PHASE][RATE] += wander_var * sec**2 / 2
    cov[RATE][PHASE] = cov[PHASE][RATE]
    cov[RATE][RATE] += wander_var * sec
    cov[LEANING][LEANING] += LEAN_DRIFT**2
    for i in range(COS, len(mean)):
        cov[i][i] += weather_var * sec
    return [dot(mean, moves)] + mean[1:], cov


def updated(mean, cov, ahead_ns, excess_ns, noise_var):
    """Kalman's update by a mark: phase + excess * lean + noise -> (log likelihood, mean, cov)."""
    off = ahead_ns - mean[PHASE] - excess_ns * mean[LEANING]
    with_mark = [row[PHASE] + excess_ns * row[LEANING] for row in cov]
    var = with_mark[PHASE] + excess_ns * with_mark[LEANING]
    noise_var = max(noise_var, DIGITS * var)
    var += noise_var
    gain = [p / var for p in with_mark]
    after = [[p - k * m for p, m in zip(row, with_mark)] for row, k in zip(cov, gain)]
    for i, row in enumerate(after):   # Cauchy and Schwarz know a least variance, rounding does not
        row[i] = max(row[i], cov[i][i] * noise_var / var)
    return (-0.5 * (math.log(2 * math.pi * var) + off * off / var),
            [x + k * off for x, k in zip(mean, gain)], after)


def learn(beliefs, before, mark, excess_ns, excess_var, burst=0.0):
    """Each filter's step from the mark before to this one -> (log evidence, beliefs).

    Phases are relative to the mark before, then to this one.  burst is wander in between in addition.
    """
    sec, ahead_ns = gained(before, mark)
    moves = reach(before.real_ns, sec)
    logs, known = [], []
    for belief in beliefs:
        model = MODELS[belief.model]
        mean, cov = carried(belief.mean, belief.cov, moves[:model.unknowns], model.wander_var + burst,
                            model.weather_var)
        log, mean, cov = updated(mean, cov, ahead_ns, excess_ns, model.noise_var + excess_var)
        mean[PHASE] -= ahead_ns
        logs.append(math.log(belief.weight) + log)
        known.append((mean, cov))
    top = max(logs)
    weights = [math.exp(max(log - top, NEVER)) for log in logs]
    total = sum(weights)
    return top + math.log(total), [Belief(belief.model, weight / total, mean, cov)
                                   for belief, weight, (mean, cov) in zip(beliefs, weights, known)]


def gained(before, mark):
    """(s on the counter, ns that real time gained on it) from one mark to another; exact until a float."""
    ticks = mark.tick_ns - before.tick_ns
    return ticks * 1e-9, float(mark.real_ns - before.real_ns - ticks)


def anchored(beliefs, sec, excess_ns, excess_var, rate_var):
    """Beliefs that take their phase from a mark sec after the last; the rate is less certain by rate_var."""
    anchor = []
    for number, weight, mean, cov in beliefs:
        row = [-excess_ns * p for p in cov[LEANING]]
        row[PHASE] = -excess_ns * row[LEANING] + MODELS[number].noise_var + excess_var
        cov = [row] + [[p] + old[1:] for p, old in zip(row[1:], cov[1:])]
        cov[RATE][RATE] += MODELS[number].wander_var * sec + rate_var
        anchor.append(Belief(number, weight, [-excess_ns * mean[LEANING]] + mean[1:], cov))
    return anchor


def by_kind(beliefs):
    """What has learned a wave and what knows of none mix among themselves only, or neither would stay so."""
    return [[belief for belief in beliefs if len(belief.mean) == size] for size in (3, 5)]


def loud(beliefs):
    """Those that have a say among their kind."""
    return [belief for kind in by_kind(beliefs) if kind
            for least in [SILENT * max([belief.weight for belief in kind])]
            for belief in kind if belief.weight >= least]


def mixture(beliefs):
    """-> (mean, cov) of those that have a say, what they differ by included."""
    heard = loud(beliefs)
    total = sum([belief.weight for belief in heard])
    size = range(len(heard[0].mean))
    mean = [sum([belief.weight * belief.mean[i] for belief in heard]) / total for i in size]
    cov = [[0.0 for _ in size] for _ in size]
    for _, weight, its_mean, its_cov in heard:
        share = weight / total
        off = [x - x0 for x, x0 in zip(its_mean, mean)]
        for row, its_row, d in zip(cov, its_cov, off):
            for j in size:
                row[j] += share * (its_row[j] + d * off[j])
    return mean, cov


def summed_up(beliefs):
    """-> ([(mean, cov) of each kind], mean, cov of both); no wave is amplitudes of 0."""
    kinds, both = [], []
    for kind in by_kind(beliefs):
        mean, cov = mixture(kind)
        kinds.append((mean, cov))
        more = [0.0] * (5 - len(mean))
        both.append(Belief(None, sum([belief.weight for belief in kind]), mean + more,
                           [row + more for row in cov] + [[0.0] * 5 for _ in more]))
    return (kinds, *mixture(both))


def sleepers(kinds):
    """What a model is of which the data said nothing: the mixture of its kind, with a newcomer's weight."""
    return [Belief(number, SWITCH * model.share, *kinds[number >= len(PLAIN)])
            for number, model in enumerate(MODELS)]


def awake(beliefs, kinds):
    """All models after some of them may have become others: one that is less than a newcomer sleeps."""
    models = sleepers(kinds)
    for belief in beliefs:
        stay, come = (1 - SWITCH) * belief.weight, models[belief.model].weight
        if stay >= come:
            models[belief.model] = belief._replace(weight=stay + come)
    return models


# So many spreads are remembered: with more the floor is known better, slow changes are noticed later.  The
# floor has moved if a mark is under it by FAR typical excesses, or if the last three are as much over it, and
# by more than twice what they differ among themselves.
PATH_MARKS, FAR = 200, 4.0
FIRST_EXCESS, FIRST_MARKS = 1 / 8, 4  # typical before there are some marks, as a share of the first spread
TWO_WAYS, ONE_WAY = 0.8, 1.0  # least of n excesses / typical: * n^-0.5, as both queues must be empty; * n^-1
SCALES = 1.0, 1 / 3, 0.1, 0.03, 0.003, 0.0003  # a mark's variance / excess^2: heavy tails, exponential ... none
SCALE_SHARES = [0.1, 0.7, 0.1, 0.05, 0.03, 0.02]
SCALE_SWITCH = 0.01   # chance that it changes between two marks


class Path(collections.namedtuple("Path", "spreads counts first_ns lean scales")):
    """The way to the server, as marks show it: their spreads since its floor moved, of how many exchanges,
    the excess that was typical before, the lean and the chances of SCALES."""

    def typical(self):
        """The median excess."""
        count = len(self.spreads)
        if not count:
            return self.first_ns
        seen = (sorted(self.spreads)[count // 2] - min(self.spreads)) / (1 - TWO_WAYS / math.sqrt(count + 1))
        return self.first_ns + (seen - self.first_ns) * count**2 / (count**2 + FIRST_MARKS**2)

    def gap(self):
        """By how much the least spread is likely to be over the floor."""
        one_way, count = min(self.lean**2, 1.0), max(len(self.spreads), 1)
        return self.typical() * ((1 - one_way) * TWO_WAYS / math.sqrt(count) + one_way * ONE_WAY / count)

    def after(self, spread_ns, exchanges):
        """The path with one more mark."""
        spreads, keep, first_ns = self.spreads + [spread_ns], PATH_MARKS, self.first_ns
        if not self.spreads:
            first_ns = spread_ns * FIRST_EXCESS
        elif min(self.spreads) - spread_ns > FAR * self.typical():
            keep, first_ns = 1, self.typical()
        elif len(spreads) > 3:
            before = self._replace(spreads=spreads[:-3])
            over, among = min(spreads[-3:]) - min(spreads[:-3]), max(spreads[-3:]) - min(spreads[-3:])
            if over > max(FAR * before.typical(), 2 * among):
                keep, first_ns = 3, before.typical()
        counts = self.counts + [exchanges]
        return self._replace(spreads=spreads[-keep:], counts=counts[-keep:], first_ns=first_ns)

    def excess(self, spread_ns):
        """-> (ns, the variance that it adds to a mark's noise); typical for a mark that doesn't tell."""
        excess_ns = self.typical()
        if spread_ns is not None:
            path = self.after(spread_ns, 1)
            excess_ns = spread_ns - min(path.spreads) + path.gap()
        return excess_ns, dot(self.scales, SCALES) * excess_ns**2

    def weighed(self, excess_ns, off_ns, var):
        """The path after a mark that was off by off_ns, of which other things explain the variance var."""
        variances = [var + scale * excess_ns**2 for scale in SCALES]
        logs = [-0.5 * (math.log(v) + off_ns**2 / v) for v in variances]
        likely = [share * math.exp(max(log - max(logs), NEVER)) for share, log in zip(self.scales, logs)]
        return self._replace(scales=[(1 - SCALE_SWITCH) * share / sum(likely) + SCALE_SWITCH * share0
                                     for share, share0 in zip(likely, SCALE_SHARES)])

    def noise_var(self, rest_var, exchanges):
        """What a mark of so many exchanges is worth: of k, the least queue each way is about one k-th."""
        if not self.spreads:
            return rest_var / exchanges
        floor_ns, scale = min(self.spreads) - self.gap(), dot(self.scales, SCALES)
        worths = [1 / (rest_var + scale * ((spread_ns - floor_ns) * count / exchanges) ** 2)
                  for spread_ns, count in zip(self.spreads, self.counts)]
        return len(worths) / sum(worths)

    def is_sound(self):
        """Whether a state can have it."""
        return (len(self.spreads) == len(self.counts) <= PATH_MARKS and len(self.scales) == len(SCALES)
                and all(is_int(spread_ns) and spread_ns >= 0 for spread_ns in self.spreads)
                and all(is_int(count) and count in EXCHANGES for count in self.counts)
                and is_float(self.first_ns, 0, LIMIT_NS) and is_float(self.lean, -1e9, 1e9)
                and all(is_float(share, 1e-9, 1) for share in self.scales))


def is_int(value):
    return type(value) is int and abs(value) < LIMIT_NS


def is_float(value, least, most):
    return type(value) in (int, float) and least <= value <= most   # NaN fails


def is_mark(mark):
    return (is_int(mark.tick_ns) and is_int(mark.real_ns)
            and (mark.spread_ns is None or is_int(mark.spread_ns) and mark.spread_ns >= 0))


def is_known(mean, cov, unknowns):
    """Bounded so that no arithmetic overflows, and a covariance indeed."""
    every = range(unknowns)
    return ([len(row) for row in [mean] + cov] == [unknowns] * (unknowns + 1)
            and all(is_float(value, -1e40, 1e40) for row in [mean] + cov for value in row)
            and all(cov[i][i] >= 0 for i in every)
            and all(cov[i][j] ** 2 <= cov[i][i] * cov[j][j] * 1.000001
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
    if error_after(far) < target_ns:
        return far
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
        deviations = [0.0, rate_error_ppm * 1e3, LEAN, WAVE_PPM * 1e3, WAVE_PPM * 1e3]
        cov = [[sd**2 if i == j else 0.0 for j in range(5)] for i, sd in enumerate(deviations)]
        self.last = None        # the last mark used: phases are relative to it
        self.held = []          # marks doubted since
        self.path, self.exchanges = Path([], [], 0.0, 0.0, SCALE_SHARES), 1
        self._sum_up([Belief(number, model.share, mean[:model.unknowns],
                             [row[:model.unknowns] for row in cov[:model.unknowns]])
                      for number, model in enumerate(MODELS)])

    def mark(self, tick_ns, real_ns, spread_ns=None):
        """At counter value tick_ns real time was real_ns -> "used", "doubted" (held), "refused" (none)."""
        mark = Mark(tick_ns, real_ns, spread_ns)
        if not is_mark(mark):
            return "refused"
        if self.last is None:
            self._use(anchored(self.beliefs, 0.0, *self.path.excess(spread_ns), 0.0), [mark])
            return "used"
        if tick_ns <= (self.held or [self.last])[-1].tick_ns:
            return "refused"
        evidence, beliefs = self._learn(self.beliefs, self.last, mark)
        if evidence > self._any_size(mark, WILD) and is_possible(summed_up(beliefs)[1]):
            if spread_ns is not None:
                self._weigh_path(mark)
            self._use(beliefs, [mark])
            return "used"
        self.held.append(mark)
        explained = self._explained()
        if explained is None:
            return "doubted"
        self._use(*explained)
        return "used"

    def _learn(self, beliefs, before, mark, burst=0.0):
        return learn(beliefs, before, mark, *self.path.excess(mark.spread_ns), burst)

    def _use(self, beliefs, marks):
        for mark in marks:
            if mark.spread_ns is not None:
                self.path = self.path.after(mark.spread_ns, self.exchanges)
        self.last, self.held = marks[-1], []
        self._sum_up(beliefs)

    def _sum_up(self, beliefs):
        """The mixture of each kind and of both; wander and noise are geometric means, as their models are."""
        self.kinds, self.mean, self.cov = summed_up(beliefs)
        heard = loud(beliefs)
        total = sum([belief.weight for belief in heard])
        self.wander_var, self.noise_var = [
            math.exp(sum([belief.weight * math.log(MODELS[belief.model][what]) for belief in heard]) / total)
            for what in (0, 1)]
        self.path = self.path._replace(lean=self.mean[LEANING])
        self.beliefs = awake(beliefs, self.kinds)

    def _weigh_path(self, mark):
        """Let the path learn from how far the mark is off the prediction."""
        sec, ahead_ns = gained(self.last, mark)
        mean, cov = carried(self.mean, self.cov, reach(self.last.real_ns, sec), self.wander_var, 0.0)
        excess_ns, _ = self.path.excess(mark.spread_ns)
        lean = [1.0, 0.0, excess_ns, 0.0, 0.0]
        self.path = self.path.weighed(excess_ns, ahead_ns - dot(mean, lean),
                                      dot(lean, [dot(row, lean) for row in cov]) + self.noise_var)

    def _gain(self, sec):
        """ns that real time is expected to gain on the counter, sec after (or before) the last mark used."""
        return dot(self.mean, reach(self.last.real_ns, sec))

    def _any_size(self, mark, chance):
        """Log density of a mark off by any size from the predicted error up: a lucky one is not wild."""
        sec, ahead_ns = gained(self.last, mark)
        size = abs(ahead_ns - self._gain(sec)) + self._error(sec) + 1.0  # ns: no clock is better
        return math.log(chance / (SIZES * size))

    def _explained(self):
        """(beliefs, marks) of what explains the held marks better than that they are wild, or None."""
        found = [self._explain(need, how) for need, how in EXPLANATIONS]
        odds, need, beliefs = max(found, key=lambda explanation: explanation[0])
        desperate = len(self.held) >= HELD_MAX
        if not (desperate or odds > 0 and len(self.held) >= need):
            return None
        if is_possible(summed_up(beliefs)[1]):
            return beliefs, self.held[-need:]
        if not desperate:
            return None
        sec, _ = gained(self.last, self.held[-1])   # the time is that of the last mark, the rate as it was
        return anchored(self.beliefs, sec, *self.path.excess(self.held[-1].spread_ns), 0.0), self.held[-1:]

    def _explain(self, need, how):
        """(log odds against wild, need, beliefs) if the last marks held are right, and how it came."""
        first, *later = self.held[-need:]
        sec, ahead_ns = gained(self.last, first)
        excess = self.path.excess(first.spread_ns)
        heard = loud(self.beliefs)
        if how == "step":       # of real time: phase from the mark, rate as it was
            odds, beliefs = self._any_size(first, STEP), anchored(heard, sec, *excess, 0.0)
        elif how == "anew":     # counter or real time are not what they were
            odds, beliefs = self._any_size(first, ANEW), anchored(heard, sec, *excess, 1e6 * UNKNOWN_PPM**2)
        elif how == "bend":     # a jump of the rate at any moment since: as random as a burst of wander
            jump = 2 * (ahead_ns - self._gain(sec)) / sec
            odds = self._any_size(first, BEND)
            _, beliefs = self._learn(heard, self.last, first, jump**2 / sec)
        else:                   # noise or wander grew: the unlikely models were right
            odds, beliefs = self._learn(self.beliefs, self.last, first)
        odds -= self._any_size(first, WILD)
        for before, mark in zip([first] + later, later):
            evidence, beliefs = self._learn(loud(beliefs), before, mark)
            odds += evidence - self._any_size(mark, WILD)
        return odds, need, beliefs

    def _var(self, sec):
        """Square of the expected error of real time in ns^2, sec after (or before) the last mark used."""
        moves = reach(self.last.real_ns, sec)
        known_var = max(dot(moves, [dot(row, moves) for row in self.cov]), 0.0)
        floor_var = (self.mean[LEANING] * self.path.gap())**2 / 2   # if queueing leans, a wrong floor shifts
        return known_var + self.wander_var * abs(sec)**3 / 3 + floor_var

    def _error(self, sec):
        return math.sqrt(self._var(sec))

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

        Exact without a wave.  A wave's error rises and falls by the day: the factor of t is large enough
        for half a day, after which it grows no more.
        """
        sec, q = self._sec(tick_ns), self.wander_var
        now, square = self._var(sec), self.cov[RATE][RATE] + q * sec
        return [now, max([(self._var(sec + t) - now) / t - t * (square + q * t / 3) for t in WAVE_SECS]),
                square, q / 3]

    def rate(self):
        """-> (ppm, standard deviation in ppm) over whole days, as of the last mark used."""
        return self.mean[RATE] * 1e-3, math.sqrt(self.cov[RATE][RATE]) * 1e-3

    def rate_at(self, tick_ns):
        """-> ppm at one moment of the day."""
        angle = 0.0 if self.last is None else self.real(tick_ns)[0] % DAY_NS * 1e-9 * OMEGA
        return (self.mean[RATE] + self.mean[COS] * math.cos(angle) + self.mean[SIN] * math.sin(angle)) * 1e-3

    def learned(self):
        """-> (wander per sqrt(s), noise of a usual mark in ns, queueing included)."""
        return (math.sqrt(self.wander_var) * 1e-9,
                math.sqrt(self.noise_var + self.path.excess(None)[1]))

    def next_mark(self, tick_ns, target_ns):
        """Seconds from tick_ns until the predicted error reaches target_ns; 0 if it has, or in doubt."""
        if self.last is None or self.held:
            return 0.0
        start = self._sec(tick_ns)
        return wait_for(lambda sec: self._error(start + sec), target_ns)

    def next_mark_plan(self, tick_ns, target_ns, most=EXCHANGES[-1]):
        """-> Plan(wait_sec, exchanges): when to take the next mark, and of how many exchanges up to most, for
        the fewest packets.  The path takes marks for made so."""
        counts = [count for count in EXCHANGES if count <= max(most, 1)]
        if self.last is not None:
            self.exchanges = max(counts, key=lambda count: self._worth(count, target_ns))
        return Plan(max(LEAST_WAIT_SEC, self.next_mark(tick_ns, target_ns)), self.exchanges)

    def _worth(self, exchanges, target_ns):
        """Seconds that a packet buys in the marks to come: a Kalman filter of (phase, rate) looks ahead."""
        noise_var, q = self.path.noise_var(self.noise_var, exchanges), self.wander_var
        pp, pv, vv, total = self.cov[PHASE][PHASE], self.cov[PHASE][RATE], self.cov[RATE][RATE], 0.0
        for _ in range(LOOKAHEAD):
            sec = max(LEAST_WAIT_SEC, wait_for(
                lambda t: math.sqrt(max(pp + 2 * t * pv + t**2 * vv + q * t**3 / 3, 0.0)), target_ns))
            pp, pv, vv = (pp + 2 * sec * pv + sec**2 * vv + q * sec**3 / 3, pv + sec * vv + q * sec**2 / 2,
                          vv + q * sec)
            var = pp + max(noise_var, DIGITS * pp)
            pp, pv, vv = pp - pp * pp / var, pv - pv * pp / var, vv - pv * pv / var
            total += sec
        return total / exchanges

    def forget_phase(self, rate_error_ppm):
        """The counter started anew (a boot) or stood still: keep the rate, less certain by this much."""
        beliefs = []
        for number, weight, mean, cov in self.beliefs:
            cov = [[0.0] * len(mean)] + [[0.0] + row[1:] for row in cov[1:]]
            cov[RATE][RATE] += (rate_error_ppm * 1e3) ** 2
            beliefs.append(Belief(number, weight, [0.0] + mean[1:], cov))
        self.last, self.held = None, []
        self._sum_up(beliefs)

    def state(self):
        """Plain data for JSON, the sleeping models left out.  from_state(state()) goes on to the last bit."""
        asleep, marks = sleepers(self.kinds), ([self.last] if self.last else []) + self.held
        return {"grid": len(MODELS), "marks": [list(mark) for mark in marks],
                "kinds": [list(kind) for kind in self.kinds], "mean": self.mean, "cov": self.cov,
                "wander_var": self.wander_var, "noise_var": self.noise_var, "exchanges": self.exchanges,
                "path": list(self.path),
                "models": [list(belief) for belief in self.beliefs if belief != asleep[belief.model]]}

    @classmethod
    def from_state(cls, state):
        """ValueError for what state() can't have given."""
        self = cls()
        try:
            marks = [Mark(*mark) for mark in state["marks"]]
            self.last, self.held = (marks + [None])[0], marks[1:]
            (plain, wave), self.mean, self.cov = state["kinds"], state["mean"], state["cov"]
            self.kinds, self.path = [tuple(plain), tuple(wave)], Path(*state["path"])
            self.wander_var, self.noise_var = state["wander_var"], state["noise_var"]
            self.exchanges, self.beliefs = state["exchanges"], sleepers(self.kinds)
            known = [(*plain, 3), (*wave, 5), (self.mean, self.cov, 5)]
            for belief in [Belief(*belief) for belief in state["models"]]:
                known.append((belief.mean, belief.cov, MODELS[belief.model].unknowns))
                self.beliefs[belief.model] = belief
            sound = (state["grid"] == len(MODELS) and all(is_mark(mark) for mark in marks)
                     and len(marks) <= HELD_MAX
                     and all(a.tick_ns < b.tick_ns for a, b in zip(marks, marks[1:]))
                     and all(is_known(*each) for each in known) and is_possible(self.mean)
                     and all(belief.model == i and is_float(belief.weight, 1e-99, 2)
                             for i, belief in enumerate(self.beliefs))
                     and is_float(self.wander_var, 1e-12, 1e12) and is_float(self.noise_var, 1, 1e20)
                     and self.exchanges in EXCHANGES and self.path.is_sound())
        except (ArithmeticError, AttributeError, LookupError, TypeError) as err:
            raise ValueError("damaged state: %s" % err)
        if not sound:
            raise ValueError("damaged state, or of another release")
        return self


# ---- the bound ----
#
# A mark proves that real time is within its spread and the server's root distance of it, however the path is.
# ASSUMPTION  The counter's mean rate over the time to come differs from that over a stretch of two days
#             before by at most 1.1 ppm for a day, then by that times the square root of the days: a wave of
#             1 ppm a day, or four standard deviations of a rate that wanders by 1e-9 per sqrt(s).  A stretch
#             x times as long or as short tells less: the square root of x times as much is allowed.
# Both ends of the stretch are proven ranges, which bound its mean rate.  A mark that contradicts the bound
# shows that some server did not tell the truth, or a counter less steady than assumed: what is proven begins
# anew with it, and twice the change is allowed from then on.

CHANGE_PPM = 1.1
STRETCH_NS, ANCHORS = 2 * DAY_NS, 8   # and how many proven ranges are kept within it to measure rates from
Range = collections.namedtuple("Range", "tick_ns earliest_ns latest_ns")


class Bound:
    """Where real time certainly is, if all servers told the truth within their root distance."""

    def __init__(self):
        self.forget()

    def forget(self):
        """The counter stood still or went back: nothing is known."""
        self.anchors, self.last = [], None
        self.slow_ppm, self.fast_ppm = -LIMIT_PPM, LIMIT_PPM
        self.change_ppm, self.allowed_ppm = 0.0, CHANGE_PPM

    def mark(self, tick_ns, real_ns, spread_ns, distance_ns):
        """Real time was within spread and distance of real_ns -> "used", "refused" (it proves nothing), or
        "restarted": it contradicts the bound."""
        if not (all(is_int(value) for value in (tick_ns, real_ns, spread_ns, distance_ns))
                and min(spread_ns, distance_ns) >= 0 and (self.last is None or tick_ns > self.last.tick_ns)):
            return "refused"
        proven = Range(tick_ns, real_ns - spread_ns - distance_ns, real_ns + spread_ns + distance_ns)
        if self.last is None:
            self.last, self.anchors = proven, [proven]
            return "used"
        earliest_ns, latest_ns = self.at(tick_ns)
        both = Range(tick_ns, max(earliest_ns, proven.earliest_ns), min(latest_ns, proven.latest_ns))
        if both.earliest_ns <= both.latest_ns:
            self._measure(both)
            return "used"
        allowed_ppm = min(2 * self.allowed_ppm, LIMIT_PPM)
        self.forget()
        self.last, self.anchors, self.allowed_ppm = proven, [proven], allowed_ppm
        return "restarted"

    def _measure(self, last):
        """The rates that the counter can have had since the oldest anchor."""
        self.last = last
        while len(self.anchors) > 1 and last.tick_ns - self.anchors[1].tick_ns >= STRETCH_NS:
            del self.anchors[0]
        first = self.anchors[0]
        ticks = last.tick_ns - first.tick_ns
        self.slow_ppm = max((last.earliest_ns - first.latest_ns - ticks) / ticks * 1e6, -LIMIT_PPM)
        self.fast_ppm = min((last.latest_ns - first.earliest_ns - ticks) / ticks * 1e6, LIMIT_PPM)
        self.change_ppm = self.allowed_ppm * math.sqrt(max(ticks / STRETCH_NS, STRETCH_NS / ticks))
        if last.tick_ns - self.anchors[-1].tick_ns >= STRETCH_NS / ANCHORS:
            self.anchors.append(last)

    def coefficients(self):
        """What carries the bound on to any later counter value, or None; with t = (tick - tick_ns) / 10^9 and
        change = change_ppm * sqrt(max(1, t / 86400)), real time is

            from  earliest_ns + (tick - tick_ns) + t * 1000 * max(slow_ppm - change, -1000)
            to    latest_ns   + (tick - tick_ns) + t * 1000 * min(fast_ppm + change, 1000)
        """
        if self.last is None:
            return None
        return dict(self.last._asdict(), slow_ppm=self.slow_ppm, fast_ppm=self.fast_ppm,
                    change_ppm=self.change_ppm)

    def at(self, tick_ns):
        """-> (earliest_ns, latest_ns) of real time at a counter value from the last mark on, or None."""
        if self.last is None:
            return None
        ticks = tick_ns - self.last.tick_ns
        change_ppm = self.change_ppm * math.sqrt(max(1, ticks / DAY_NS))
        slow_ppm = max(self.slow_ppm - change_ppm, -LIMIT_PPM)
        fast_ppm = min(self.fast_ppm + change_ppm, LIMIT_PPM)
        return (self.last.earliest_ns + ticks + math.floor(ticks * 1e-6 * slow_ppm),
                self.last.latest_ns + ticks + math.ceil(ticks * 1e-6 * fast_ppm))

    def state(self):
        """Plain data for JSON; from_state(state()) goes on to the last bit."""
        return {"ranges": [list(each) for each in self.anchors + [self.last] if each],
                "ppm": [self.slow_ppm, self.fast_ppm, self.change_ppm, self.allowed_ppm]}

    @classmethod
    def from_state(cls, state):
        """ValueError for what state() can't have given."""
        self = cls()
        try:
            ranges = [Range(*each) for each in state["ranges"]]
            slow_ppm, fast_ppm, change_ppm, allowed_ppm = state["ppm"]
            sound = (len(ranges) != 1 and len(ranges) <= ANCHORS + 3
                     and all(is_int(value) for each in ranges for value in each)
                     and all(each.earliest_ns <= each.latest_ns for each in ranges)
                     and all(a.tick_ns < b.tick_ns for a, b in zip(ranges, ranges[1:-1]))
                     and (not ranges or ranges[-2].tick_ns <= ranges[-1].tick_ns)
                     and -LIMIT_PPM <= slow_ppm <= fast_ppm <= LIMIT_PPM
                     and is_float(change_ppm, 0, 1e9) and is_float(allowed_ppm, CHANGE_PPM, LIMIT_PPM))
        except (ArithmeticError, AttributeError, LookupError, TypeError) as err:
            raise ValueError("damaged bound: %s" % err)
        if not sound:
            raise ValueError("damaged bound")
        if ranges:
            self.anchors, self.last = ranges[:-1], ranges[-1]
        self.slow_ppm, self.fast_ppm, self.change_ppm, self.allowed_ppm = state["ppm"]
        return self


# ==== the counter and the clock ====

def reads(clock_id):
    """A function that reads a clock in nanoseconds; None where the system hasn't got it."""
    try:
        clock = getattr(time, clock_id)
        time.clock_gettime_ns(clock)
    except (AttributeError, OSError):
        return None
    return lambda: time.clock_gettime_ns(clock)


class Clock:
    """The counter and the system clock, looked at only.

    What steers a system clock derives from this.  A clock's `steer` is told at each wake-up how it
    should run, and answers in how many seconds it wants to be told again.
    """
    doing = "observing"

    def __init__(self):
        self.counter = "CLOCK_MONOTONIC_RAW" if reads("CLOCK_MONOTONIC_RAW") else "CLOCK_MONOTONIC"
        self.ticks = reads(self.counter)
        self.bias_ppm = 0.0  # of the kernel's clock, see KernelClock.learn_bias
        self.foreign = False  # somebody else has set the frequency since

    def read(self):
        """-> (tick_ns, clock_ns) at one moment: of 5 readings the one with the least time around it."""
        def once():
            before, clock_ns = self.ticks(), time.time_ns()
            after = self.ticks()
            return after - before, (before + after) // 2, clock_ns
        return min(once() for _ in range(5))[1:]

    def suspended_ns(self):
        """The time that this boot slept, during which the counter stood still."""
        boottime = reads("CLOCK_BOOTTIME")
        return boottime() - time.monotonic_ns() if boottime else 0

    def boot_id(self):
        """What tells this boot from every other; empty where the system doesn't say."""
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                return file.read(64).strip()
        except OSError:
            return ""

    def steer(self, rate_ppm, offset_ns, tick_ns, clock_ns, changed):
        return SETTLED_SEC

    def step(self, delta_ns):
        raise OSError(errno.EPERM, "observing only")

    def forget(self):
        """The counter is not what it was: what was seen of the clock by it says nothing any more."""

    def announce(self, error_ns, offset_ns, tai_offset_sec, leap):
        """Tell the kernel how wrong the clock may be (one standard deviation), TAI minus clock, and
        whether this UTC day ends with a leap second more (1), less (-1) or neither (0)."""

    def report(self):
        """The kernel's view for etc/status."""


class AdjtimeClock(Clock):
    """adjtime(), as every Unix has it: no rate, so the clock is nudged every 3 seconds."""
    doing = "nudging the system clock with adjtime"

    def __init__(self):
        super().__init__()
        import ctypes
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.adjtime(0)  # fails here and now without the privilege

    def adjtime(self, delta_ns):
        import ctypes
        # struct timeval: both of them long, on every system that comes this way
        delta = (ctypes.c_long * 2)(*divmod(delta_ns // 1000, 10**6))
        if self.libc.adjtime(delta, None) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def steer(self, rate_ppm, offset_ns, tick_ns, clock_ns, changed):
        self.adjtime(offset_ns)  # it replaces the slew before
        return BUSY_SEC

    def step(self, delta_ns):
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + delta_ns)


class KernelClock(Clock):
    """Linux: the rate by ADJ_FREQUENCY and ADJ_TICK, the phase by ADJ_OFFSET_SINGLESHOT.

    The kernel applies a single shot second by second, 500 us in each; until it is through, and the
    second it is in is over, what the clock is off by can't be told from what is on its way.
    """
    doing = "steering the system clock with adjtimex"
    SECOND_NS = 1100000000  # from a request to the end of the second it came in, and some
    BIAS_NS = 2 * 10**10  # over 20 s the readings' 100 ns are 0.005 ppm
    MOST_US = 10**9  # of a single shot; it takes 23 days, and 32-bit kernels can't count much more
    BIAS_GAIN = 0.25  # of a new reading of the bias; it averages about 4 of them
    UNEVEN = 0.06  # of a slew: with a kernel that sleeps through its ticks, 3000 us came out as 2832 to 3199
    BIAS_DOUBT_PPM = 0.5  # no bias is read off a clock that slews leave in more doubt
    # A slew that was on its way when a mark came is begun anew if that is worth more than the second of it
    # that is lost; besides, up to 500 us are in the kernel's current second, where nobody can read them.
    ASTRAY_US = 2 * SLEW_PPM

    def __init__(self, adjtimex=adjtimex, nominal_tick=10**6 // os.sysconf("SC_CLK_TCK")):
        super().__init__()
        self.adjtimex, self.nominal_tick = adjtimex, nominal_tick
        now = adjtimex()
        adjtimex(modes=ADJ_FREQUENCY, freq=now["freq"])  # fails here and now without the privilege
        self.set_to = None  # the (freq, tick) that we gave the kernel
        self.forget()

    def forget(self):
        self.busy_until_ns = 0
        self.seen = None  # (tick_ns, clock_ns) at a look when no slew was on its way
        self.promised_ns = self.promised_at = 0  # what it was told to gain since then, up to which tick
        self.slewed_ns = 0  # how much of that was slews, to and fro

    def steer(self, rate_ppm, offset_ns, tick_ns, clock_ns, changed):
        if self.set_to:
            self.promised_ns += self.given_ppm() * (tick_ns - self.promised_at) / 1e6
        self.promised_at = tick_ns
        if tick_ns < self.busy_until_ns:
            if changed:
                self.redirect(offset_ns, tick_ns)
            self.set_rate(rate_ppm)
            return min(SETTLED_SEC, (self.busy_until_ns - tick_ns) / 10**9)
        self.learn_bias(tick_ns, clock_ns)
        self.set_rate(rate_ppm)
        slew_us = max(-self.MOST_US, min(self.MOST_US, round(offset_ns / 1000)))
        if slew_us:
            self.adjtimex(modes=ADJ_OFFSET_SINGLESHOT, offset=slew_us)
            self.promised_ns += slew_us * 1000
            self.slewed_ns += abs(slew_us) * 1000
            self.busy_until_ns = tick_ns + -(-abs(slew_us) // SLEW_PPM) * 10**9 + self.SECOND_NS
        if abs(offset_ns) <= SETTLED_NS:
            return SETTLED_SEC
        return min(SETTLED_SEC, max(BUSY_SEC, (self.busy_until_ns - tick_ns) / 10**9))

    def redirect(self, offset_ns, tick_ns):
        """Stop the slew that is on its way if it leads astray; the next one begins with the next second."""
        left_us = self.adjtimex(modes=ADJ_OFFSET_SS_READ)["offset"]
        if left_us and abs(offset_ns / 1000 - left_us) > self.ASTRAY_US:
            self.adjtimex(modes=ADJ_OFFSET_SINGLESHOT, offset=0)
            self.promised_ns -= left_us * 1000
            left_us = 0
        if not left_us:
            self.busy_until_ns = min(self.busy_until_ns, tick_ns + self.SECOND_NS)

    def learn_bias(self, tick_ns, clock_ns):
        """The kernel's clock is some ppm off the rate that it was given (its own rounding, and the
        counter's calibration that went on after the boot): what it has gained beyond what it was told to."""
        past_ns = tick_ns - self.seen[0] if self.seen else math.inf
        if past_ns < self.BIAS_NS:
            return
        if self.slewed_ns * self.UNEVEN < past_ns * self.BIAS_DOUBT_PPM / 1e6 and self.seen:
            bias_ppm = (clock_ns - self.seen[1] - past_ns - self.promised_ns) / past_ns * 1e6
            if abs(bias_ppm) < BIAS_LIMIT_PPM:
                self.bias_ppm += (bias_ppm - self.bias_ppm) * (self.BIAS_GAIN if self.bias_ppm else 1)
        self.seen, self.promised_ns, self.slewed_ns = (tick_ns, clock_ns), 0, 0

    def given_ppm(self):
        freq, tick = self.set_to
        return freq / 65536 + (tick - self.nominal_tick) * 1e6 / self.nominal_tick

    def set_rate(self, rate_ppm):
        """Let the clock gain rate_ppm on the counter."""
        rate_ppm -= self.bias_ppm
        ppm_per_tick = 1e6 / self.nominal_tick
        ticks = round(rate_ppm / ppm_per_tick) if abs(rate_ppm) > SLEW_PPM else 0
        want = round((rate_ppm - ticks * ppm_per_tick) * 65536), self.nominal_tick + ticks
        now = self.adjtimex()
        have = now["freq"], now["tick"]
        self.foreign = self.set_to is not None and have != self.set_to
        if have[1] != want[1]:
            self.adjtimex(modes=ADJ_TICK, tick=want[1])
        if have[0] != want[0]:
            self.adjtimex(modes=ADJ_FREQUENCY, freq=want[0])
        self.set_to = want

    def step(self, delta_ns):
        step_kernel(self.adjtimex, delta_ns)
        self.forget()  # the kernel drops its slews at a step

    def announce(self, error_ns, offset_ns, tai_offset_sec, leap):
        now = self.adjtimex()
        # maxerror is a bound: 4 standard deviations, and what is still to be slewed
        self.adjtimex(modes=ADJ_STATUS | ADJ_MAXERROR | ADJ_ESTERROR,
                      status=now["status"] & ~(STA_UNSYNC | STA_INS | STA_DEL) | (0, STA_INS, STA_DEL)[leap],
                      esterror=min(16 * 10**6, int(error_ns / 1000) + 1),
                      maxerror=min(16 * 10**6, int((4 * error_ns + abs(offset_ns)) / 1000) + 1))
        if now["tai"] != tai_offset_sec:
            self.adjtimex(modes=ADJ_TAI, constant=tai_offset_sec)

    def report(self):
        now = self.adjtimex()
        return {"freq_ppm": now["freq"] / 65536, "tick": now["tick"], "maxerror_us": now["maxerror"],
                "esterror_us": now["esterror"], "synchronised": not now["status"] & STA_UNSYNC}


# ==== files ====

def replace_file(etc_fd, name, data):
    """Write etc/NAME whole: a temporary file, fsync, rename, fsync of the directory; OSError.

    The temporary file is always a new one, so that no planted link is followed.
    """
    temporary = name + ".tmp"
    try:
        os.unlink(temporary, dir_fd=etc_fd)
    except FileNotFoundError:
        pass
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=etc_fd)
    try:
        while data:
            data = data[os.write(fd, data):]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=etc_fd, dst_dir_fd=etc_fd)
    os.fsync(etc_fd)


def read_file(etc_fd, name):
    """The bytes of etc/NAME, 256 KiB at most (a state has 50 when its models are all awake); OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=etc_fd)
    try:
        return os.read(fd, 1 << 18)
    finally:
        os.close(fd)


class Fifo:
    """`adjust`: made when missing, kept when there, looked for again when it was deleted or replaced."""

    def __init__(self, path):
        self.path, self.reader, self.writer = path, None, None

    def open(self):
        """Make and open it where that isn't done yet; OSError."""
        try:
            there = os.lstat(self.path)
        except FileNotFoundError:
            os.mkfifo(self.path, 0o600)
            there = os.lstat(self.path)
        if self.reader is not None:
            if os.path.samestat(there, os.fstat(self.reader)):
                return
            self.close()
        flags = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        reader = os.open(self.path, os.O_RDONLY | flags) if stat.S_ISFIFO(there.st_mode) else None
        try:
            if reader is None or not stat.S_ISFIFO(os.fstat(reader).st_mode):
                raise OSError(errno.EEXIST, "there is something that is not a FIFO")
            self.writer = os.open(self.path, os.O_WRONLY | flags)  # else each writer's end is one to read
            self.reader, reader = reader, None
        finally:
            if reader is not None:
                os.close(reader)

    def close(self):
        os.close(self.reader)
        os.close(self.writer)
        self.reader = None

    def packets(self):
        """What was written: a list of packets; where one has another size, all that came at once as one."""
        try:
            data = os.read(self.reader, 65536)
        except BlockingIOError:
            return []
        if len(data) % 16:
            return [data]  # where one packet ends and the next begins can't be told any more
        return [data[i:i + 16] for i in range(0, len(data), 16)]


# ==== the daemon ====

def say(text):
    """One line for the log; a log that is gone or full is no reason to stop."""
    try:
        emit((text + "\n").encode(errors="replace"))
    except OSError:
        pass


def duration(sec):
    """Seconds as people say them: 45 s, 12 min, 5.6 h, 3.2 d."""
    for limit, unit_sec, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if sec < limit:
            return "%.3g %s" % (sec / unit_sec, unit)
    return "%.3g d" % (sec / 86400)


def may_follow_leap(start_sec, sign):
    """Whether a leap second may come right before that Unix second; not of this world is neither."""
    return (type(start_sec) is int and 0 < start_sec < ERA_SEC and start_sec % 86400 == 0
            and time.gmtime(start_sec)[1:3] in ((1, 1), (7, 1)) and type(sign) is int and sign in (1, -1))


def rate_from_atto(packet):
    """The bytes of etc/atto -> rate in ppm; ValueError."""
    ns_per_tick = unpack(packet) / 10**9
    if not RATE_RANGE[0] <= ns_per_tick <= RATE_RANGE[1]:
        raise ValueError("%.9g ns per tick, so it was made with another counter" % ns_per_tick)
    return (ns_per_tick - 1) * 1e6


class Clockspeed:
    """What happens at a start, a mark and a wake-up.

    `clock` is a Clock, `etc_fd` the directory of the files.  Real time is in nanoseconds of TAI; an offset is
    real time minus system clock.  ValueError when the leap second table is damaged.
    """

    def __init__(self, clock, etc_fd, may_step=True, say=say):
        self.clock, self.etc_fd, self.may_step, self.say = clock, etc_fd, may_step, say
        self.estimator = Estimator()
        self.marks = {"used": 0, "doubted": 0, "refused": 0}  # of this boot
        self.last_mark = None
        self.troubles = {}  # what failed -> why, so that the same trouble is said once
        self.done_ns = {}  # what is done now and then -> tick when it was last done
        self.known_ns = RELEASE_SEC * 10**9  # no system clock is right that shows less
        self.announced = []  # by the time servers: (the Unix second after a leap second, +1 or -1)
        self.look()
        self.read_leaps()
        self.begin_phase()

    def look(self):
        self.tick_ns, self.clock_ns = self.clock.read()

    def look_again(self):
        """A counter that stood still, or went back, since the last look does not tell the time any more."""
        before_ns = self.tick_ns
        self.look()
        slept_ns, back_ns = self.clock.suspended_ns() - self.suspended_ns, before_ns - self.tick_ns
        if back_ns > 0:
            self.say("counter: it went back by %s, as in a machine that is restored from a snapshot; "
                     "a mark is wanted" % duration(back_ns / 1e9))
            self.done_ns.clear()
        elif abs(slept_ns) > SUSPENDED_NS:
            self.say("suspend: the counter stood still for %s; a mark is wanted" % duration(slept_ns / 1e9))
        else:
            return
        self.clock.forget()
        self.estimator.forget_phase(REBOOT_PPM if back_ns > 0 else 0)
        self.begin_phase()

    def begin_phase(self):
        """No mark has told the time since the boot or a suspend: the system clock is taken as it is."""
        self.anchor = self.tick_ns, to_tai(self.clock_ns, self.rows)
        self.slew_told_ns = 0  # until which tick nothing more is said of a slew
        self.suspended_ns = self.clock.suspended_ns()
        self.offset_ns = 0

    def real(self):
        """-> (real time at the last look, its standard deviation or None before the first mark)."""
        if self.estimator.has_phase():
            return self.estimator.real(self.tick_ns)
        ticks_ns = self.tick_ns - self.anchor[0]
        return self.anchor[1] + ticks_ns + round(ticks_ns * self.estimator.rate()[0] / 1e6), None

    def trouble(self, doing, err=None):
        """Say that something fails, once as long as it fails for that reason; without err, it works."""
        if err is None:
            self.troubles.pop(doing, None)
        elif self.troubles.get(doing) != reason(err):
            self.troubles[doing] = reason(err)
            complain("warning", "unable to %s: %s" % (doing, reason(err)))

    # -- files

    def load(self):
        """Take up what an earlier run knew -> where it came from, for the start line."""
        atto = self.read_atto()
        return self.load_state(atto) or self.load_atto(atto) or "no rate known"

    def load_state(self, atto):
        if not json:
            self.trouble("keep more than etc/atto", ImportError("this Python has no json module"))
            return None
        try:
            state = json.loads(read_file(self.etc_fd, "state"))
            self.load_announced(state.get("announced", []))
            if state["counter"] != self.clock.counter or state["atto"] != atto.hex():
                return None  # another counter, or the C clockspeed has been at work since
            known_ns = int(state["known_ns"])
            estimator = Estimator.from_state(state["estimator"])
            marks = {outcome: int(state["marks"][outcome]) for outcome in self.marks}
            bias_ppm = float(state["bias_ppm"])
            if not abs(bias_ppm) < BIAS_LIMIT_PPM:
                raise ValueError("a bias of %s ppm" % bias_ppm)
            if not RATE_RANGE[0] <= 1 + estimator.rate()[0] / 1e6 <= RATE_RANGE[1]:
                raise ValueError("a rate of %s ppm" % estimator.rate()[0])
            same_boot, last_mark = self.same_boot(state), state["last_mark"]
            same_tai = to_tai(int(state["clock_ns"]), self.rows) == int(state["tai_ns"])
        except FileNotFoundError:
            return None
        except (OSError, AttributeError, ValueError, KeyError, TypeError, OverflowError,
                RecursionError) as err:
            self.trouble("use etc/state", err)
            return None
        self.estimator, self.known_ns = estimator, max(self.known_ns, known_ns)
        if not same_boot:
            estimator.forget_phase(REBOOT_PPM)
            return "rate of etc/state"
        self.marks, self.last_mark, self.clock.bias_ppm = marks, last_mark, bias_ppm
        if not same_tai:
            estimator.forget_phase(0)
            return "rate of etc/state (its phase was of another leap second table)"
        return "phase and rate of etc/state"

    def load_atto(self, atto):
        try:
            if atto:
                self.estimator = Estimator(rate_from_atto(atto), ATTO_PPM)
                return "rate of etc/atto"
        except ValueError as err:
            self.trouble("use etc/atto", err)
        return None

    def read_atto(self):
        try:
            return read_file(self.etc_fd, "atto")
        except FileNotFoundError:
            return b""
        except OSError as err:
            self.trouble("read etc/atto", err)
            return b""

    def same_boot(self, state):
        """Whether the counter has run on since that state was written."""
        return (bool(state["boot_id"]) and state["boot_id"] == self.clock.boot_id()
                and int(state["tick_ns"]) <= self.tick_ns
                and abs(self.suspended_ns - int(state["suspended_ns"])) < SUSPENDED_NS)

    def save(self, name, data):
        try:
            replace_file(self.etc_fd, name, data)
            self.trouble("write etc/" + name)
        except OSError as err:
            self.trouble("write etc/" + name, err)
        self.done_ns[name] = self.tick_ns

    def save_state(self):
        """etc/atto and etc/state."""
        if self.estimator.has_phase():
            self.known_ns = max(self.known_ns, from_tai(self.real()[0], self.rows))
        ppm, _ = self.estimator.rate()
        atto = pack(round(10**9 * (1 + ppm / 1e6)))
        if self.marks["used"] > 1 and atto != self.read_atto():  # one mark tells no rate
            self.save("atto", atto)
        self.save_json("state", {
            "version": 1, "boot_id": self.clock.boot_id(), "counter": self.clock.counter,
            "atto": self.read_atto().hex(), "suspended_ns": self.suspended_ns,
            "bias_ppm": self.clock.bias_ppm,
            "known_ns": self.known_ns, "tick_ns": self.tick_ns, "clock_ns": self.clock_ns,
            "tai_ns": to_tai(self.clock_ns, self.rows), "announced": self.announced, "marks": self.marks,
            "last_mark": self.last_mark, "estimator": self.estimator.state()})

    def save_status(self):
        known = self.estimator.has_phase()
        (ppm, error_ppm), (wander, noise_ns) = self.estimator.rate(), self.estimator.learned()
        tai_offset_sec, leap = self.leap()
        self.save_json("status", {
            "version": 1, "pid": os.getpid(), "boot_id": self.clock.boot_id(), "doing": self.clock.doing,
            "observe_only": type(self.clock) is Clock, "tick_ns": self.tick_ns, "written_ns": self.clock_ns,
            "offset_ns": self.offset_ns if known else None,
            "variance": self.estimator.variance(self.tick_ns) if known else None,
            "rate_ppm": ppm, "rate_error_ppm": error_ppm, "noise_ns": noise_ns, "wander": wander,
            "marks": self.marks, "last_mark": self.last_mark, "asking_early": self.estimator.doubts(),
            "leap": {"source": self.leap_source, "expires": self.leap_expiry, "tai_offset": tai_offset_sec,
                     "next": leap},
            "kernel": self.clock.report()}, indent=1)

    def save_json(self, name, content, **style):
        if json:
            self.save(name, json.dumps(content, **style).encode() + b"\n")

    # -- leap seconds

    def read_leaps(self):
        """The leap second table, and what it makes of the system clock; ValueError when it is damaged."""
        leaps, self.leap_expiry, self.leap_source = read_leap_table()
        self.rows = clock_table(leaps)
        if self.rows is leaps:
            self.rows = leaps + self.read_announced(leaps[-1])
        self.done_ns["leaps"] = self.tick_ns
        if self.leap_expiry is not None and self.leap_expiry < self.clock_ns // 10**9:
            self.trouble("rely on " + self.leap_source, ValueError("it expired on %s; a newer table is wanted"
                         % time.strftime("%Y-%m-%d", time.gmtime(self.leap_expiry))))

    def read_announced(self, last_row):
        """-> rows for the leap seconds that were announced and that the table does not reach: those lived
        through, and that of etc/leap, which sntpclock keeps, and which may be taken back until it comes."""
        now_sec = self.clock_ns // 10**9
        covered_sec = max(last_row[0], self.leap_expiry or 0)
        self.announced = [(start, sign) for start, sign in self.announced if covered_sec < start <= now_sec]
        try:
            start, sign = map(int, read_file(self.etc_fd, "leap").split())
            if 0 < start - now_sec <= ARM_SEC and start > covered_sec and may_follow_leap(start, sign):
                self.announced.append((start, sign))
        except (OSError, ValueError):  # as on most days
            pass
        rows = [last_row]
        for start, sign in self.announced:
            rows.append((start, rows[-1][1] + sign))
        return rows[1:]

    def load_announced(self, announced):
        """Take up what an earlier run heard of and lived through; ValueError, TypeError."""
        announced = [(start, sign) for start, sign in announced]
        if sorted(set(announced)) != announced or not all(may_follow_leap(*each) for each in announced):
            raise ValueError("no leap seconds")
        self.announced = announced
        self.read_leaps()
        self.begin_phase()  # in that TAI

    def reread_leaps(self):
        """A table that makes another TAI of the clock tells nothing of real time."""
        before, was_tai_ns = self.rows, to_tai(self.clock_ns, self.rows)
        self.read_leaps()
        for start, sign in self.announced:
            if start not in dict(before) and start in dict(self.rows):
                self.say("leap: the time servers announce a day that ends with a second %s"
                         % ("more" if sign > 0 else "less"))
        if to_tai(self.clock_ns, self.rows) != was_tai_ns:
            self.say("leap: another table tells another TAI; a mark is wanted")
            self.estimator.forget_phase(0)
            self.begin_phase()

    def leap(self):
        """-> (TAI minus system clock in s, [the Unix second after the next leap second, 1 or -1] or None)."""
        offset_sec = (to_tai(self.clock_ns, self.rows) - self.clock_ns) // 10**9
        later = [row for row in self.rows if row[0] > self.clock_ns // 10**9]
        return offset_sec, [later[0][0], later[0][1] - offset_sec] if later else None

    def near_leap(self):
        return any(abs(self.clock_ns - start * 10**9) < LEAP_NS for start, _ in self.rows)

    # -- events

    def mark(self, packet):
        """An adjustment has come out of the FIFO; wake(True) is to follow."""
        self.look_again()
        clock_tai_ns = to_tai(self.clock_ns, self.rows)
        try:
            if len(packet) != 16:
                raise ValueError("%d bytes at once, not 16" % len(packet))
            if self.near_leap():
                raise ValueError("a mark within %d s of a leap second" % (LEAP_NS // 10**9))
            offset_ns = (unpack(packet) + 5 * 10**8) // 10**9
            if not 0 <= clock_tai_ns + offset_ns - RELEASE_SEC * 10**9 < ERA_SEC * 10**9:
                raise ValueError("no real time is %s from the system clock"
                                 % duration(abs(offset_ns) / 10**9))
        except ValueError as err:
            self.marks["refused"] += 1
            return self.say("refused: %s" % err)
        outcome = self.estimator.mark(self.tick_ns, clock_tai_ns + offset_ns)
        self.marks[outcome] += 1
        self.last_mark = {"tick_ns": self.tick_ns, "offset_ns": offset_ns, "outcome": outcome}
        real_ns, error_ns = self.real()
        self.say("mark: offset %+.9f s, error %.9f s, rate %+.4f ppm, rate error %.4f ppm, %s"
                 % (offset_ns / 1e9, error_ns / 1e9, *self.estimator.rate(), outcome))
        self.offset_ns = real_ns - clock_tai_ns
        if outcome == "used" and self.marks["used"] == 1 and abs(self.offset_ns) > STEP_NS:
            self.step(from_tai(real_ns, self.rows), "at the first mark of this boot")
            self.offset_ns = self.real()[0] - to_tai(self.clock_ns, self.rows)
        self.tell_slew()

    def step(self, target_ns, why):
        """Set the system clock from what it shows to target_ns."""
        if not self.may_step or type(self.clock) is Clock:
            return
        try:
            self.clock.step(target_ns - self.clock_ns)
            self.say("step: the system clock by %+.9f s, %s" % ((target_ns - self.clock_ns) / 1e9, why))
        except (OSError, struct.error) as err:  # the latter where the kernel's seconds have 32 bits
            self.trouble("step the clock", err)
        self.look()

    def begin_clock(self):
        """A clock from before what is known, as on a host without a hardware clock, goes forward to it at the
        start; a mark tells the rest."""
        if not self.estimator.has_phase() and self.clock_ns < self.known_ns:
            self.step(self.known_ns, "which showed a time before the newest one known")
            self.begin_phase()

    def tell_slew(self):
        """A line for a long slew, but not for every mark that comes while it is on its way."""
        slew_sec = abs(self.offset_ns) / 1e9 / (SLEW_PPM / 1e6)
        if slew_sec > LONG_SLEW_SEC and self.tick_ns >= self.slew_told_ns and type(self.clock) is not Clock:
            self.slew_told_ns = self.tick_ns + round(min(slew_sec, SLEW_AGAIN_SEC) * 10**9)
            self.say("slew: %+.3f s will take %s; clockctl set steps at once"
                     % (self.offset_ns / 1e9, duration(slew_sec)))

    def wake(self, changed=False):
        """Look at the clock and steer it -> seconds until the next time.  changed: a mark has come."""
        before_ns = self.tick_ns
        self.look_again()
        if self.near_leap():
            return 1
        offset_before_ns = self.offset_ns
        real_ns, error_ns = self.real()
        self.offset_ns = real_ns - to_tai(self.clock_ns, self.rows)
        moved_ns = offset_before_ns - self.offset_ns
        if abs(moved_ns) > MOVED_NS + max(self.tick_ns - before_ns, 0) * MOVED_PPM // 10**6:
            changed = True  # a slew that was on its way is lost in a step
            self.say("moved: somebody set the system clock by %+.3f s" % (moved_ns / 1e9))
            if error_ns is None:
                self.begin_phase()
            self.slew_told_ns = 0
            self.tell_slew()
        try:
            rate_ppm = self.estimator.rate_at(self.tick_ns)
            wait_sec = self.clock.steer(rate_ppm, self.offset_ns, self.tick_ns, self.clock_ns, changed)
            if error_ns is not None:
                tai_offset_sec, leap = self.leap()
                today = leap and leap[0] - self.clock_ns / 10**9 <= ARM_SEC
                self.clock.announce(error_ns, self.offset_ns, tai_offset_sec, leap[1] if today else 0)
            self.trouble("steer the clock")
        except OSError as err:
            self.trouble("steer the clock", err)
            wait_sec = SETTLED_SEC
        self.tell_foreign()
        if changed or self.due("leaps", TABLE_SEC):  # etc/leap comes with a mark
            try:
                self.reread_leaps()
            except ValueError as err:
                self.trouble("read leap seconds", err)
        if changed or self.due("state", STATE_SEC):
            self.save_state()
        if changed or self.due("status", STATUS_SEC):
            self.save_status()
        return wait_sec

    def tell_foreign(self):
        if self.clock.foreign and self.due("foreign", FOREIGN_SEC):
            self.say("foreign: another program sets the clock's frequency; one of the two must go")
            self.done_ns["foreign"] = self.tick_ns

    def due(self, name, sec):
        """Whether NAME was last done so many seconds ago."""
        return name not in self.done_ns or self.tick_ns - self.done_ns[name] >= sec * 10**9


# ==== main ====

def choose_clock(observe):
    """The best way to steer the clock that there is; without a way or the privilege, only looking at it."""
    if observe:
        return Clock()
    try:
        return KernelClock() if sys.platform == "linux" else AdjtimeClock()
    except (OSError, ImportError, AttributeError) as err:
        complain("warning", "unable to steer the clock: %s; observing only" % reason(err))
        return Clock()


def become(user, capabilities, etc_fd, fifo):
    """Give etc/ and adjust to user, become it and keep those capabilities alone; OSError, LookupError."""
    import ctypes
    import pwd
    entry = pwd.getpwnam(user)
    for fd in (etc_fd, fifo.reader):
        if fd is not None:
            os.fchown(fd, entry.pw_uid, -1)
    libc = ctypes.CDLL(None, use_errno=True)

    def check(status):
        if status != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.prctl(PR_SET_KEEPCAPS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    check(libc.capset(struct.pack("=Ii", CAPABILITY_VERSION, 0),
                      struct.pack("=6I", capabilities, capabilities, 0, 0, 0, 0)))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))


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


def serve(daemon, fifo, signal_fd):
    """Until TERM or INT: marks as they come, the clock when it is time."""
    changed = False
    while True:
        try:
            fifo.open()
            daemon.trouble("read adjust")
        except OSError as err:
            daemon.trouble("read adjust", err)
        wait_sec = daemon.wake(changed)
        changed = False
        fds = [signal_fd] + ([] if fifo.reader is None else [fifo.reader])
        ready = select.select(fds, [], [], wait_sec)[0]
        if signal_fd in ready:
            return
        if fifo.reader in ready:
            for packet in fifo.packets():
                daemon.mark(packet)
                changed = True


def main(argv):
    try:
        options, operands = getopt.getopt(argv[1:], "nSu:", ["help"])
        options = dict(options)
        if len(operands) > 1:
            raise getopt.GetoptError("one home")
    except getopt.GetoptError:
        complain("usage", USAGE)
        return 100
    home = operands[0] if operands else os.environ.get("CLOCKSPEED_HOME") or HOME
    signal_fd, signal_writer = os.pipe()
    os.set_blocking(signal_writer, False)
    signal.set_wakeup_fd(signal_writer)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # what it sends through the pipe ends serve()
    try:
        doing = "write output"
        if "--help" in options:
            emit_manual()
            return 0
        doing = "use " + home
        os.umask(0o022)
        home_fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(home_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doing = "use %s/etc" % home
        try:
            os.mkdir("etc", 0o755, dir_fd=home_fd)
        except FileExistsError:
            pass
        etc_fd = os.open("etc", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=home_fd)
    except BlockingIOError:
        complain("fatal", "unable to use %s: another clockspeed is running there" % home)
        return 111
    except FileNotFoundError as err:
        complain("fatal", "unable to %s: %s; svc/install makes it, and so does: mkdir -p %s" % (
            doing, reason(err), home))
        return 111
    except (OSError, ValueError) as err:
        complain("fatal", "unable to %s: %s" % (doing, reason(err)))
        return 111
    clock = choose_clock("-n" in options)
    try:
        daemon = Clockspeed(clock, etc_fd, "-S" not in options)
    except ValueError as err:
        complain("fatal", "unable to read leap seconds: " + reason(err))
        return 111
    fifo = Fifo(os.path.join(home, "adjust"))
    try:
        fifo.open()
    except OSError as err:
        daemon.trouble("read adjust", err)
    if "-u" in options and os.getuid() == 0:
        try:
            become(options["-u"], 0 if "-n" in options else 1 << CAP_SYS_TIME, etc_fd, fifo)
        except LookupError:
            complain("warning", "there is no user %s; running on as root" % options["-u"])
        except (OSError, ImportError, AttributeError) as err:
            complain("fatal", "unable to become %s: %s" % (options["-u"], reason(err)))
            return 111
    source = daemon.load()
    say("start: %s, %s, rate %+.4f ppm, rate error %.4f ppm, %s"
        % (clock.doing, clock.counter, *daemon.estimator.rate(), source))
    daemon.begin_clock()
    settle()
    try:
        serve(daemon, fifo, signal_fd)
    finally:
        daemon.save_state()
        daemon.save_status()
    say("stop: the clock runs on at the rate it has")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
