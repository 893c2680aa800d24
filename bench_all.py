#!/usr/bin/env python3
"""bench_all.py - what the programs reach, and what they cost

SYNOPSIS
    ./bench_all.py [-s seeds] [-w word] [estimator | clients | server | nts | programs] ...
    ./bench_all.py replay LOG

DESCRIPTION
    Without a name, all of them.  Nothing here touches the clock.

    estimator  how near the estimator keeps to real time in simulated worlds, beside a filter
               that is told everything and the original's two points, over the seeds
    replay     makes each estimate in a log of clockspeed again from its marks, to the last digit;
               what differs is printed, and the exit status then 111
    clients    the error of one measurement by sntpclock and taiclock, beside the other clients
               that are installed; on loopback and over a path with jitter, on an idle and on a
               busy machine.  Needs root, iproute2 and chronyd: it makes two network namespaces
    server     CPU per reply of taiclockd, beside the original's loop in C, compiled on the spot,
               and the servers that are installed; for queries of 32 and of 28 bytes
    nts        the error, CPU and memory of ntsclock's marks, beside sntpclock and chronyd -Q with nts
    programs   start-up time and memory of each program, resident size of the daemons, CPU of
               clockspeed for a mark

    The figures are medians.  What is compared is measured in turns, so that whatever else the
    machine does meanwhile counts for all; the ratios are those of turns that followed each
    other.  The servers of `clients` have this machine's own clock, so that any offset they tell
    is an error.

OPTIONS
    -s seeds  simulated worlds of each kind (10: a quarter of an hour)
    -w word   only those lines of `estimator` that have this word

EXIT STATUS
    0 measured; 100 wrong usage; 111 a log that `replay` can't make again
"""
import collections
import contextlib
import getopt
import heapq
import importlib.machinery
import importlib.util
import itertools
import math
import os
import random
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
USAGE = "./bench_all.py [-s seeds] [-w word] [replay LOG | estimator | clients | server | nts | programs] ..."
# No shim before the interpreter: the programs are measured as they run on a plain host.
os.environ["PATH"] = "/usr/bin:" + os.environ["PATH"]
ENV = dict(os.environ, CLOCK_SCALE="utc", TZ="UTC")


def load(name):
    """A script as a module, without running it."""
    loader = importlib.machinery.SourceFileLoader(name, os.path.join(HERE, name + ".py"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


def installed(script, *args):
    """The command of a script, isolated as it is when installed."""
    return ["python3", "-IS", os.path.join(HERE, script), *args]


def medians(rows):
    return [statistics.median(column) for column in zip(*rows)]


# Runs a command and tells its ms and the MB it had at most; small itself, since a child begins as its copy.
METER = """
import os, sys, time
start = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ,
                      file_actions=[(os.POSIX_SPAWN_OPEN, 1, "/dev/null", 1, 0)])
usage = os.wait4(pid, 0)[2]
print((time.perf_counter() - start) * 1e3, usage.ru_maxrss * 1024 / 1e6)
"""


def cost(command, runs=15):
    """-> [ms from start to end, MB at most] of a command."""
    meter = ["python3", "-IS", "-c", METER, *command]

    def measured():
        return subprocess.run(meter, stdout=subprocess.PIPE, env=ENV, check=True).stdout.split()
    return medians(map(float, measured()) for _ in range(runs))


@contextlib.contextmanager
def started(*command, stdout=subprocess.DEVNULL):
    """A process that is killed at the end."""
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, env=ENV)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def cpu_ns(pid):
    with open("/proc/%d/schedstat" % pid) as file:
        return int(file.read().split()[0])


def resident_mb(pid):
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)) * 1024 / 1e6


# ==== the estimator ===============================================================================
CLOCKSPEED = load("clockspeed")
Estimator, Bound, REBOOT_PPM = CLOCKSPEED.Estimator, CLOCKSPEED.Bound, CLOCKSPEED.REBOOT_PPM
DAY = 86400.0
EPOCH_NS = 1800000000 * 10**9  # big enough that a float would lose 256 ns
TICK0_NS = 7 * 10**14  # up for eight days
RATIO_LEAST, RATIO_MOST = 0.7, 1.4  # wanted: rms of error / predicted error
DISTANCE_SEC = 1e-3  # the servers' root distance; they are right within it


class Counter:
    """Real time against a counter, integrated exactly between events.

    The rate (real - counter, s per s) walks randomly by `wander` per sqrt(s) from `ppm`; its integral over
    t is drawn with it (covariance wander^2 [[t^3/3, t^2/2], [t^2/2, t]]), so that no step size matters.
    `daily_ppm` adds a sinusoid over the day, `jumps` ((sec, ppm), ...) changes of rate and `steps`
    ((sec, step_sec), ...) of real time.
    """

    def __init__(self, rng, wander=1e-9, ppm=50.0, daily_ppm=0.0, jumps=(), steps=()):
        self.rng, self.wander, self.sec, self.phase, self.rate = rng, wander, 0.0, 0.0, ppm * 1e-6
        self.daily, self.turn = daily_ppm * 1e-6, rng.uniform(0, 2 * math.pi)
        self.jumps, self.steps = jumps, steps

    def at(self, sec):
        """Real minus counter at counter second sec (never decreasing), in s."""
        t, self.sec = sec - self.sec, sec
        one, two = self.rng.gauss(0, 1), self.rng.gauss(0, 1)
        self.phase += self.rate * t + self.wander * t**1.5 * (one / 2 + two / math.sqrt(12))
        self.rate += self.wander * math.sqrt(t) * one
        jumped = sum(ppm * 1e-6 * max(0.0, sec - when) for when, ppm in self.jumps)
        return self.phase + self.wave(sec) + jumped + sum(step for when, step in self.steps if sec >= when)

    def wave(self, sec):
        omega = 2 * math.pi / DAY
        return self.daily / omega * (math.sin(omega * sec + self.turn) - math.sin(self.turn))


class TwoPoints:
    """The original's algorithm: rate from the first mark to the latest, phase of the latest."""

    def __init__(self):
        self.first = self.last = None

    def mark(self, tick_ns, real_ns, spread_ns=None):
        self.last = tick_ns, real_ns
        self.first = self.first or self.last
        return "used"

    def real(self, tick_ns):
        (tick0, real0), (tick1, real1) = self.first, self.last
        rate = (real1 - real0 - (tick1 - tick0)) / (tick1 - tick0) if tick1 > tick0 else 0.0
        return real1 + tick_ns - tick1 + round(rate * (tick_ns - tick1)), 1.0


class Informed:
    """A Kalman filter of (phase, rate) that is told wander, daily wave, floor and the law of queueing.

    A mark comes with the mean and variance of its error, given how far its spread is over the true floor.
    """

    def __init__(self, wander):
        self.wander_var, self.sec = wander**2, None

    def mark(self, sec, phase, mean, var):
        phase, var = phase - mean, var + 1e-18
        if self.sec is None:
            self.phase, self.rate, self.cov, self.sec = phase, 0.0, (var, 0.0, (500e-6) ** 2), sec
            return
        t, q, (pp, pv, vv) = sec - self.sec, self.wander_var, self.cov
        pp, pv, vv = pp + 2 * t * pv + t**2 * vv + q * t**3 / 3, pv + t * vv + q * t**2 / 2, vv + q * t
        off = phase - self.at(sec)
        both = pp + var
        self.phase, self.rate, self.sec = self.at(sec) + pp / both * off, self.rate + pv / both * off, sec
        self.cov = pp * var / both, pv * var / both, max(vv - pv**2 / both, vv * var / both)

    def at(self, sec):
        return self.phase + self.rate * (sec - self.sec)


# Exchanges over a path, or a mark that tells no spread: f(rng, index, exchanges) -> Noise.
Noise = collections.namedtuple("Noise", "error_sec spread_sec mean_sec var")


def normal(sigma):
    return lambda rng, index, exchanges: Noise(rng.gauss(0, sigma), None, 0.0, sigma**2)


def wild(noise, share=0.03, where=()):
    """Some marks, and those numbered in where, wrong by 0.05 to 5 s more; the others as without this."""
    def draw(rng, index, exchanges):
        drawn = noise(rng, index, exchanges)
        apart = random.Random(repr(drawn.error_sec))
        if not (apart.random() < share or index in where):
            return drawn
        more_sec = apart.uniform(0.05, 5) * apart.choice((-1, 1))
        return drawn._replace(error_sec=drawn.error_sec + more_sec, var=1e6)
    return draw


def louder(before, after, first):
    """Noise of another size from a mark on: a new route."""
    return lambda rng, index, exchanges: normal(before if index < first else after)(rng, index, exchanges)


def exponential(mean_sec):
    return lambda rng, index: rng.expovariate(1 / mean_sec)


def heavy(mean_sec, shape=1.8):
    return lambda rng, index: mean_sec * (shape - 1) * (rng.paretovariate(shape) - 1)


def bursts(mean_sec):
    """Ten times the queueing in a tenth of the time, ten marks on end."""
    def draw(rng, index):
        loud = random.Random(index // 10).random() < 0.1
        return rng.expovariate(1 / mean_sec) * (10 if loud else 1)
    return draw


def none(rng, index):
    return 0.0


class Queues:
    """Exchanges over a path: a floor in s each way, queueing out and back; the mark is what all prove.

    Given the excess, exponential queueing alike both ways leaves the error uniform within it; one way, none.
    asymmetry_sec is what the way out is longer for good; moved is (mark, another floor).
    """

    def __init__(self, floor_sec=0.02, out=exponential(5e-3), back=None, asymmetry_sec=0.0, moved=None):
        self.floor_sec, self.asymmetry_sec, self.moved = floor_sec, asymmetry_sec, moved
        self.out, self.back = out, back or out

    def __call__(self, rng, index, exchanges):
        floor = self.moved[1] if self.moved and index >= self.moved[0] else self.floor_sec
        earliest, latest = -math.inf, math.inf
        for _ in range(exchanges):
            out, back = floor + self.asymmetry_sec + self.out(rng, index), floor + self.back(rng, index)
            earliest, latest = max(earliest, -back), min(latest, out)
        error, spread = (earliest + latest) / 2, (latest - earliest) / 2
        excess = spread - floor - self.asymmetry_sec / 2
        lean = (self.back is none) - (self.out is none)
        return Noise(error, spread, lean * excess, 0.0 if lean else excess**2 / 3)


# When the next mark comes, and of how many exchanges: f(estimator, rng, sec, index) -> (s, exchanges).

def every(interval, exchanges=1):
    return lambda estimator, rng, sec, index: (interval, exchanges)


def asked(target_sec):
    """As clockctl asks: the wait grows threefold at most."""
    def wait(estimator, rng, sec, index):
        plan = estimator.next_mark_plan(TICK0_NS + int(sec * 1e9), target_sec * 1e9)
        return min(plan.wait_sec, 541.0 * 3**min(index, 8)), plan.exchanges
    return wait


class Run:
    """What a run gave: the samples, the outcomes of its marks [(sec, outcome)], packets, how often real time
    was not within the bound, and the bound's widths [(sec, s)]."""

    def __init__(self, estimator, wander):
        self.estimator, self.informed, self.bound = estimator, Informed(wander), Bound()
        self.samples, self.marks, self.packets, self.outside, self.widths = [], [], 0, 0, []

    def take(self, sec, tick_ns, real_ns, steady):
        """A sample; steady is real minus counter without the daily wave."""
        guess_ns, error_ns = self.estimator.real(tick_ns)
        self.samples.append(Sample(sec, (guess_ns - real_ns) * 1e-9, error_ns * 1e-9,
                                   self.informed.at(sec) - steady))
        bound = self.bound.at(tick_ns)
        if bound:
            self.outside += not bound[0] <= real_ns <= bound[1]
            self.widths.append((sec, (bound[1] - bound[0]) * 1e-9))

    def mark(self, sec, tick_ns, real_ns, steady, drawn, exchanges):
        marked_ns = real_ns + round(drawn.error_sec * 1e9)
        spread_ns = round(drawn.spread_sec * 1e9) if drawn.spread_sec else None
        outcome = self.estimator.mark(tick_ns, marked_ns, spread_ns)
        if outcome == "used":
            self.bound.mark(tick_ns, marked_ns, spread_ns, round(DISTANCE_SEC * 1e9))
        self.informed.mark(sec, steady + drawn.error_sec, drawn.mean_sec, drawn.var)
        self.marks.append((sec, outcome))
        self.packets += exchanges

    def rms(self, since, until=math.inf):
        return rms(sample.error_sec for sample in self.samples if since <= sample.sec < until)


Sample = collections.namedtuple("Sample", "sec error_sec predicted_sec informed_sec")


def rms(values):
    return math.sqrt(statistics.fmean(value * value for value in values))


def simulate(seed, days, noise, schedule, make=Estimator, sample_sec=300.0, dark_days=0, **counter):
    """One estimator in one world, then dark_days without marks.  Wander, noise and schedule draw from
    generators of their own, so that a seed gives the same noise to different estimators, with or without wild
    marks.
    """
    counter_rng, noise_rng, schedule_rng = [random.Random("%s %d" % (what, seed)) for what in "cns"]
    counter = Counter(counter_rng, **counter)
    run = Run(make(), counter.wander)
    next_mark, next_sample, exchanges = 0.0, sample_sec, 1
    while min(next_mark, next_sample) <= (days + dark_days) * DAY:
        sec = min(next_mark, next_sample)
        phase = counter.at(sec)
        tick_ns = TICK0_NS + int(sec * 1e9)
        now = sec, tick_ns, EPOCH_NS + tick_ns - TICK0_NS + round(phase * 1e9), phase - counter.wave(sec)
        if sec == next_sample:
            run.take(*now)
            next_sample += sample_sec
        if sec == next_mark:
            run.mark(*now, noise(noise_rng, len(run.marks), exchanges), exchanges)
            wait_sec, exchanges = schedule(run.estimator, schedule_rng, sec, len(run.marks) - 1)
            next_mark += wait_sec if next_mark + wait_sec <= days * DAY else math.inf
    return run


def world(days, noise, schedule, **counter):
    return dict(days=days, noise=noise, schedule=schedule, **counter)


# name: (world, the most that is wanted of the figures named in Found)
WAN, LAN, NEARER = Queues(), Queues(100e-6, exponential(50e-6)), Queues(out=exponential(2.8e-3))
SPREADS = {
    "w 1e-9, 1 a mark, 896 s": (world(2, WAN, every(896)), dict(informed=1.15)),
    "w 1e-9, 4 a mark, 3600 s": (world(2, WAN, every(3600, 4)), dict(informed=1.15)),
    "w 1e-9, 8 a mark, 1024 s": (world(2, WAN, every(1024, 8)), dict(informed=1.15)),
    "1 ppm daily, 4 a mark": (world(2, WAN, every(3600, 4), daily_ppm=1.0), dict(ms=0.6)),
    "w 1e-9, 30 days, 4 a mark": (world(30, WAN, every(4094, 4)), dict(informed=1.15)),
    "w 1e-11, 30 days, 4 a mark": (world(30, WAN, every(4094, 4), wander=1e-11),
                                   dict(informed=1.15)),
    "w 1e-11, 2 dark days, 1": (world(2, WAN, every(495), wander=1e-11, dark_days=2), dict(informed=1.4)),
    "w 1e-11, 2 dark days, 4": (world(2, WAN, every(1980, 4), wander=1e-11, dark_days=2),
                                dict(informed=1.15)),
    "LAN, 576 s": (world(2, LAN, every(576)), dict(informed=1.15)),
    "LAN, 8 a mark, 1024 s": (world(2, LAN, every(1024, 8)), dict(informed=1.15)),
    "bursts": (world(4, Queues(out=bursts(5e-3)), every(1024)), dict(informed=1.4)),
    "bursts, 4 a mark": (world(4, Queues(out=bursts(5e-3)), every(1024, 4)), dict(informed=1.4)),
    "heavy tails": (world(4, Queues(out=heavy(5e-3)), every(1024)), dict(informed=1.4)),
    "one way": (world(4, Queues(back=none), every(1024)), dict(ms=0.92)),
    "other way, 4 a mark": (world(4, Queues(out=none, back=exponential(5e-3)), every(1024, 4)),
                            dict(ms=0.92)),
    # at most 0.7 of the packets of an estimator that knew no spreads and took one exchange a mark
    "30 days, asked 10 ms": (world(30, NEARER, asked(10e-3)), dict(ms=10, packets=89)),
    "30 days, w 1e-10, asked 10 ms": (world(30, NEARER, asked(10e-3), wander=1e-10), dict(ms=10, packets=36)),
    "30 days, asked 2 ms": (world(30, WAN, asked(2e-3)), dict(ms=2, packets=771)),
    "10 days, asked 1 ms": (world(10, WAN, asked(1e-3)), dict(ms=1, packets=1372)),
}
# As sudden as a change between two marks can be.  name: world
MOVED, MARK_SEC = 168, 1024.0
CHANGE_SEC = (MOVED - 0.63) * MARK_SEC


def change(noise, exchanges=1, **counter):
    return world((MOVED + 8) * MARK_SEC / DAY, noise, every(MARK_SEC, exchanges), **counter)


CHANGES = {
    "floor 30 ms up, 1 a mark": change(Queues(moved=(MOVED, 0.05))),
    "floor 30 ms down, 1 a mark": change(Queues(0.05, moved=(MOVED, 0.02))),
    "floor 30 ms up, 4 a mark": change(Queues(moved=(MOVED, 0.05)), 4),
    "floor 30 ms down, 4 a mark": change(Queues(0.05, moved=(MOVED, 0.02)), 4),
    "20 us, 1 ppm": change(normal(20e-6), jumps=[(CHANGE_SEC, 1.0)]),
    "20 us, -100 ppm": change(normal(20e-6), jumps=[(CHANGE_SEC, -100.0)]),
    "20 us, 1 ms": change(normal(20e-6), steps=[(CHANGE_SEC, 0.001)]),
    "2 ms, an hour": change(normal(2e-3), steps=[(CHANGE_SEC, -3600.0)]),
}
WITHOUT = {
    "w 1e-9, 20 us, 1024 s": (world(4, normal(20e-6), every(1024)), dict(points=0.3)),
    "w 1e-9, 20 us, 3600 s": (world(10, normal(20e-6), every(3600)), dict(points=0.2)),
    "w 1e-9, 2 ms, 1024 s": (world(4, normal(2e-3), every(1024)), dict(points=0.45)),
    "w 1e-10, 2 ms, 1024 s": (world(4, normal(2e-3), every(1024), wander=1e-10), dict(points=0.25)),
    "w 1e-10, 2 ms, 1 ppm daily": (world(10, normal(2e-3), every(3600), wander=1e-10, daily_ppm=1.0),
                                   dict(points=0.9)),
    "w 1e-9, 2 ms, asked 10 ms": (world(30, normal(2e-3), asked(10e-3)), dict(ms=8, packets=65)),
    "w 1e-10, 2 ms, asked 10 ms": (world(30, normal(2e-3), asked(10e-3), wander=1e-10),
                                   dict(ms=9, packets=30)),
    "w 1e-8, 20 us, 64 s": (world(1, normal(20e-6), every(64), wander=1e-8), {}),
    "w 1e-9, 3 ms, 1 s": (world(1 / 24, normal(3e-3), every(1), sample_sec=10.0), {}),
    "w 0, 2 ms, 1024 s": (world(8, normal(2e-3), every(1024), wander=0.0), {}),
    "2 ms, 1 ppm, asked 10 ms": (world(30, normal(2e-3), asked(10e-3), wander=1e-10, daily_ppm=1.0), {}),
    "50 us, then 5 ms": (world(6, louder(50e-6, 5e-3, 200), every(1024)), {}),
    "5 ms, then 50 us": (world(6, louder(5e-3, 50e-6, 200), every(1024)), {}),
    "20 us, wild": (world(4, wild(normal(20e-6)), every(1024)), dict(informed=1.3)),
    "2 ms, wild": (world(4, wild(normal(2e-3)), every(1024)), dict(informed=1.3)),
    "2 ms, wild, asked 10 ms": (world(30, wild(normal(2e-3)), asked(10e-3)), {}),
}
Found = collections.namedtuple("Found", "ms informed points honesty packets outside")


def compare(options, seeds, points=False):
    """-> Found: rms in ms of all seeds, beside the informed filter's and two points', rms of error/predicted,
    packets, and how often real time was not within the bound.  Errors are those of the last three quarters,
    or of the days without marks."""
    start = options["days"] * DAY * 0.25
    if options.get("dark_days"):  # each world has one error of the rate for all of them
        start, seeds = options["days"] * DAY, range(4 * len(seeds))
    runs = [simulate(seed, **options) for seed in seeds]
    samples = [sample for run in runs for sample in run.samples if sample.sec >= start]
    error = rms(sample.error_sec for sample in samples)
    informed = rms(sample.informed_sec for sample in samples)
    two = points and rms(simulate(seed, make=TwoPoints, **options).rms(start) for seed in seeds)
    return Found(error * 1e3, error / informed, error / two if two else math.nan,
                 rms(sample.error_sec / sample.predicted_sec for sample in samples),
                 statistics.fmean(run.packets for run in runs), sum(run.outside for run in runs))


def after_change(options, seeds):
    """-> ([rms in ms before a change, after the 1st, 2nd ... mark since], most of error / predicted since)"""
    first, rows, worst = MOVED * MARK_SEC, [], 0.0
    for seed in seeds:
        run = simulate(seed, sample_sec=MARK_SEC / 4 + 0.001, **options)
        since = [first + index * MARK_SEC for index in range(9)]
        rows.append([run.rms(DAY, CHANGE_SEC)] + [run.rms(*times) for times in zip(since, since[1:])])
        worst = max([worst] + [abs(sample.error_sec) / sample.predicted_sec
                               for sample in run.samples if sample.sec >= first])
    return [rms(column) * 1e3 for column in zip(*rows)], worst


def bound_growth(seeds, noise=WAN, days=4):
    """-> (ms that each side of the bound grows in 24 hours without marks, at most; times outside)"""
    runs = [simulate(seed, days, noise, every(1024), dark_days=1) for seed in seeds]
    grown = [run.widths[-1][1] - min(width for sec, width in run.widths if sec > (days - 0.02) * DAY)
             for run in runs]
    return max(grown) / 2 * 1e3, sum(run.outside for run in runs)


def cpu_per_mark(marks=300):
    """-> (s for a mark, s for the dearest of eight that contradict everything, s for a plan)."""
    rng, estimator, used = random.Random(1), Estimator(), []
    for index in range(marks + 8):
        tick_ns = (index + 1) * 10**12
        wrong_ns = rng.randrange(10**6 if index < marks else 10**18)
        start = time.process_time()
        estimator.mark(tick_ns, EPOCH_NS + tick_ns + wrong_ns, 20 * 10**6 + rng.randrange(10**7))
        used.append(time.process_time() - start)
    start = time.process_time()
    estimator.next_mark_plan(tick_ns, 10**7)
    return statistics.median(used[:marks]), max(used[marks:]), time.process_time() - start


def verdict(found, goals):
    """What is wanted of a row, and whether found has it; a true deviation and bound always."""
    wanted = " ".join("%s %g" % goal for goal in goals.items())
    reached = (all(getattr(found, name) <= most for name, most in goals.items())
               and RATIO_LEAST <= found.honesty <= RATIO_MOST and not found.outside)
    return "%s: %s" % (wanted or "-", "reached" if reached else "MISSED")


def bench_estimator(seeds=range(10), words=()):
    """Accuracy beside the informed filter and the original's two points, honesty, packets, bound, cost."""
    def say(name, text):
        if not words or any(word in name for word in words):
            print("%-29s %s" % (name, text()), flush=True)

    def figures(options, goals):
        found = compare(options, seeds, "points" in goals)
        return "%9.4f %8.3f %8.3f %8.2f %7.0f  %s" % (*found[:5], verdict(found, goals))

    def since(options):
        errors, worst = after_change(options, seeds)
        return "ms before, after each mark: %s; error/predicted %.1f at most" % (
            " ".join("%.3g" % error for error in errors), worst)

    header = "%9s %8s %8s %8s %7s  wanted" % ("rms ms", "informed", "points", "honesty", "packets")
    for title, rows in ("with spread", SPREADS), ("without", WITHOUT):
        print("%-29s %s" % (title, header))
        for name, row in rows.items():
            say(name, lambda: figures(*row))
    for name, options in CHANGES.items():
        say(name, lambda: since(options))
    for name, noise in ("bound", WAN), ("bound, 100 ms more one way", Queues(asymmetry_sec=0.1)):
        say(name, lambda: "grows by %.1f ms in a day without marks, outside %d times"
            % bound_growth(seeds, noise))
    say("CPU", lambda: "%.2f ms a mark (wanted 10), %.1f ms the dearest, %.1f ms a plan" % tuple(
        value * 1e3 for value in cpu_per_mark()))


# What clockspeed's lines say: what went in, and what came out of it.
MARK_LINE = re.compile(
    r"mark: tick (?P<tick>\d+) ns, real (?P<real>\d+) ns, spread (?P<spread>\d+|-) ns, "
    r"distance (?P<distance>\d+|-) ns, offset \S+ s, (?P<found>error .*)$")
RATE = re.compile(r"rate (\S+) ppm, rate error (\S+) ppm")


def replay(log):
    """Feed the marks of clockspeed's log to today's estimator and bound -> (marks, [lines that differ])"""
    estimator, bound, marks, differing = Estimator(), Bound(), 0, []
    for line in log:
        line = re.sub(r"^@[0-9a-f]{24} ", "", line.rstrip("\n"))
        if line.startswith("start:") and not line.endswith(", phase and rate of etc/state"):
            rate = list(map(float, RATE.search(line).groups()))
            bound = Bound()
            if line.endswith(", rate of etc/state"):
                estimator.forget_phase(REBOOT_PPM)
            elif line.endswith(", the rest of etc/state"):
                estimator.assume_rate(*rate)
            else:
                estimator = Estimator(*rate)
        elif line.startswith(("suspend:", "counter:")):
            estimator.forget_phase(REBOOT_PPM if line.startswith("counter:") else 0.0)
            bound = Bound()
        match = MARK_LINE.match(line)
        if match:
            spread, distance = [None if match[name] == "-" else int(match[name])
                                for name in ("spread", "distance")]
            found = replayed(estimator, bound, int(match["tick"]), int(match["real"]), spread, distance)
            marks += 1
            if found != match["found"]:
                differing.append("%s\n    replayed: %s" % (line, found))
    return marks, differing


def replayed(estimator, bound, tick_ns, real_ns, spread_ns, distance_ns):
    """What clockspeed's line of such a mark says after the offset."""
    outcome = estimator.mark(tick_ns, real_ns, spread_ns)
    if outcome == "used":
        bound.mark(tick_ns, real_ns, spread_ns, distance_ns)
    error_sec, half = "-", "-"
    if estimator.has_phase():
        known_ns, error_ns = estimator.real(tick_ns)
        error_sec, within = "%.9f" % (error_ns / 1e9), bound.at(tick_ns)
        if within:
            half = "%.9f" % (max(within[1] - known_ns, known_ns - within[0]) / 1e9)
    return "error %s s, bound %s s, rate %+.4f ppm, rate error %.4f ppm, %s" % (
        error_sec, half, *estimator.rate(), outcome)


def bench_replay(path):
    """Each estimate in a log of clockspeed (multilog's or svlogd's file) made again from its marks."""
    with open(path, errors="replace") as log:
        marks, differing = replay(log)
    print("%d marks, %d differ" % (marks, len(differing)), *differing, sep="\n")
    return 111 if differing else 0


# ==== clients =======================================================================================
RUNS, SLOW_RUNS = 50, 6  # chronyd -Q and busybox take seconds by design
RELAY_DELAY_SEC, RELAY_JITTER_SEC = 0.5e-3, 0.3e-3  # the least and the mean of the rest, each way
NEAR, FAR = "127.0.0.1", "10.99.99.1"


def relay(address, port, upstream_port):
    """A UDP relay to 127.0.0.1 that keeps each packet a while; not every kernel has netem."""
    chance, poller = random.Random(1), select.poll()
    front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    front.bind((address, port))
    poller.register(front, select.POLLIN)
    backs, clients, waiting, count = {}, {}, [], itertools.count()
    while True:
        left_sec = waiting[0][0] - time.monotonic() if waiting else 1
        for descriptor, _ in poller.poll(max(int(left_sec * 1000), 0)):  # spins for the last millisecond
            if descriptor == front.fileno():
                packet, client = front.recvfrom(2048)
                if client not in backs:
                    backs[client] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    backs[client].connect(("127.0.0.1", upstream_port))
                    clients[backs[client].fileno()] = client
                    poller.register(backs[client], select.POLLIN)
            else:
                client = clients[descriptor]
                packet = backs[client].recv(2048)
            due = time.monotonic() + RELAY_DELAY_SEC + chance.expovariate(1 / RELAY_JITTER_SEC)
            heapq.heappush(waiting, (due, next(count), packet, client, descriptor == front.fileno()))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, packet, client, forward = heapq.heappop(waiting)
            if forward:
                backs[client].send(packet)
            else:
                front.sendto(packet, client)


def packet_offset(done):
    """The adjustment on a client's stdout -> (ns, bound in ns or None), or None if there is none."""
    if not done.stdout:
        return None
    view = load("clockview")
    offset_ns, last = view.unpack(done.stdout)
    quality = view.unpack_quality(last)
    return offset_ns, quality and sum(quality)


def original_offset(done):
    """The same of a C original, which is off by whole seconds where the clock counts UTC."""
    found = packet_offset(done)
    return found and ((found[0] + 5 * 10**8) % 10**9 - 5 * 10**8, None)


def number_after(pattern):
    """-> what finds the seconds after that in a client's output and makes ns of them."""
    def offset(done):
        found = re.search(pattern + rb"([-+]?[\d.]+(?:e-?\d+)?)", done.stdout + done.stderr)
        return found and (float(found.group(1)) * 1e9, None)
    return offset


def without_kernel_stamps(script):
    """A command that runs a client of ours without the kernel's stamps."""
    path, asked_for, not_asked_for = os.path.join(HERE, script), "SO_TIMESTAMPNS = 35", "SO_TIMESTAMPNS = -1"
    with open(path) as file:
        assert asked_for in file.read(), "it asks for stamps in another way"
    source = "import sys; sys.argv = sys.argv[1:]; exec(open(sys.argv[0]).read().replace(%r, %r))"
    return ["python3", "-IS", "-c", source % (asked_for, not_asked_for), path, "ADDRESS"]


def rivals(home):
    """[(name, command with ADDRESS, done -> (offset, bound) in ns or None, runs)], in two groups; none
    of them touches the clock."""
    chronyd = ["chronyd", "-Q", "-x", "-t", "20", "cmdport 0", "user root", "server ADDRESS iburst",
               "pidfile " + os.path.join(home, "query.pid")]
    busybox = ["busybox", "ntpd", "-n", "-q", "-w", "-ddd", "-p", "ADDRESS"]
    groups = [[("sntpclock.py", installed("sntpclock.py", "ADDRESS"), packet_offset, RUNS),
               ("  user-space stamps", without_kernel_stamps("sntpclock.py"), packet_offset, RUNS),
               ("ntpdig", ["ntpdig", "-j", "ADDRESS"], number_after(rb'"offset":'), RUNS),
               ("ntpdig, 10 samples", ["ntpdig", "-j", "-p", "10", "-g", "10", "ADDRESS"],
                number_after(rb'"offset":'), RUNS),
               ("chronyd -Q", chronyd, number_after(rb"wrong by "), SLOW_RUNS),
               ("busybox ntpd -qw", busybox, number_after(rb"offset:"), SLOW_RUNS),
               ("C sntpclock", ["sntpclock", "ADDRESS"], original_offset, RUNS),
               ("s6-sntpclock", ["s6-sntpclock", "ADDRESS"], original_offset, RUNS)],
              [("taiclock.py", installed("taiclock.py", "ADDRESS"), packet_offset, RUNS),
               ("  user-space stamps", without_kernel_stamps("taiclock.py"), packet_offset, RUNS),
               ("C taiclock", ["taiclock", "ADDRESS"], original_offset, RUNS),
               ("s6-taiclock", ["s6-taiclock", "ADDRESS"], original_offset, RUNS)]]
    return [[client for client in group if shutil.which(client[1][0])] for group in groups]


@contextlib.contextmanager
def network(home):
    """Two network namespaces joined by a veth: ours with servers on 127.0.0.1, another with servers behind
    relays on 10.99.99.1; on the usual ports, as not all clients can choose.  -> a prefix for commands"""
    here, there = "clockbench%d-a" % os.getpid(), "clockbench%d-b" % os.getpid()

    def ip(*words):
        subprocess.run(("ip",) + words, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    with contextlib.ExitStack() as stack:
        def start(name, *command):
            nice = ["nice", "-n", "-15"] if name == there else []  # another machine has cores of its own
            stack.enter_context(started("ip", "netns", "exec", name, *nice, *command))

        def start_servers(name, ntp_port, tai_port):
            start(name, "chronyd", "-x", "-d", "local stratum 1", "allow", "user root", "cmdport 0",
                  "bindcmdaddress /", "port %d" % ntp_port, "pidfile " + os.path.join(home, name + ".pid"))
            start(name, *installed("taiclockd.py", "-p", str(tai_port)))
        for name in here, there:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", here, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", there)
        for name, address in (here, "10.99.99.2/24"), (there, FAR + "/24"):
            ip("-n", name, "address", "add", address, "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
        start_servers(here, 123, 4014)
        start_servers(there, 10123, 14014)
        for port, upstream_port in (123, 10123), (4014, 14014):
            start(there, sys.executable, __file__, "relay", FAR, str(port), str(upstream_port))
        time.sleep(2)  # for chronyd's start
        yield ["ip", "netns", "exec", here]


def compare_clients(group, prefix, address):
    """Print a line for each client of the group."""
    first = None
    for name, command, offset_of, runs in group:
        command = prefix + [word.replace("ADDRESS", address) for word in command]
        found = [offset_of(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV))
                 for _ in range(runs)]
        found = [(abs(offset_ns), bound_ns) for offset_ns, bound_ns in filter(None, found)]
        if not found:
            print("%-20s no answer" % name)
            continue
        errors = sorted(error for error, _ in found)
        median, first = statistics.median(errors), first or statistics.median(errors)
        bounds = [bound for _, bound in found if bound is not None]
        print("%-20s %9.2f %9.2f %9s %4s %5d %7.1f" % (
            name, median / 1e3, errors[int(len(errors) * 0.95)] / 1e3,
            "%.2f" % (statistics.median(bounds) / 1e3) if bounds else "-",
            sum(error > bound for error, bound in found if bound is not None) if bounds else "-",
            len(found), median / first), flush=True)


def bench_clients():
    """|error| of one measurement in us; the bound that it told, and how many errors were over it."""
    if os.getuid() or not shutil.which("ip") or not shutil.which("chronyd"):
        print("needs root, iproute2 and chronyd, for two network namespaces and a server")
        return
    far = "a relay, %.1f ms + %.1f ms jitter each way" % (RELAY_DELAY_SEC * 1e3, RELAY_JITTER_SEC * 1e3)
    with tempfile.TemporaryDirectory() as home, network(home) as prefix:
        for place, address in ("loopback", NEAR), (far, FAR):
            for state, hogs in ("idle", 0), ("all cores busy", os.cpu_count()):
                print("\n%s, %s\n%-20s %9s %9s %9s %4s %5s %7s" % (
                    place, state, "", "median", "95%", "bound", "over", "runs", "x ours"))
                with contextlib.ExitStack() as stack:
                    for _ in range(hogs):
                        stack.enter_context(started(sys.executable, "-c", "while True: pass"))
                    for group in rivals(home):
                        compare_clients(group, prefix, address)
        for name in ("sntpclock.py", "taiclock.py"):
            print("\n%s, start to answer on loopback: %.0f ms, %.1f MB" % (
                name, *cost(prefix + installed(name, NEAR))))


# ==== server ========================================================================================
SERVER_ROUNDS, ROUND_SEC = 25, 0.1
# Sends queries of that size to a server, `outstanding` at a time, each batch by one system call.
LOAD = r'''
import ctypes, socket, struct, sys, time
port, size, outstanding, sec = *map(int, sys.argv[1:4]), float(sys.argv[4])
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect(("127.0.0.1", port))
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 200000))
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
libc, kept = ctypes.CDLL(None), []
def place(data):
    kept.append(ctypes.create_string_buffer(data, len(data)))
    return ctypes.addressof(kept[-1])
def headers(data):
    return [ctypes.c_void_p(place(b"".join(
        struct.pack("@PIPNPNi0PI0P", 0, 0, place(struct.pack("@PN", place(data), len(data))), 1, 0, 0, 0, 0)
        for _ in range(outstanding))))][0]
queries, replies = headers(b"ctai" + bytes(size - 4)), headers(bytes(64))
fd, answered, lost, begin = sock.fileno(), 0, 0, time.perf_counter()
while time.perf_counter() < begin + sec:
    assert libc.sendmmsg(fd, queries, outstanding, 0) == outstanding
    missing = outstanding
    while missing:
        received = libc.recvmmsg(fd, replies, missing, 0x10000, None)
        if received <= 0:
            lost += missing
            break
        missing -= received
        answered += received
print(answered, lost, time.perf_counter() - begin)
'''
# What the original taiclockd does for each query: recvfrom, gettimeofday, sendto.
C_SERVER = r'''
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
int main(void) {
  struct sockaddr_in6 address = {.sin6_family = AF_INET6}; socklen_t size = sizeof address;
  int fd = socket(AF_INET6, SOCK_DGRAM, 0); unsigned char packet[256]; struct timeval now;
  bind(fd, (void *) &address, size); getsockname(fd, (void *) &address, &size);
  printf("port %d\n", ntohs(address.sin6_port)); fflush(stdout);
  for (;;) {
    size = sizeof address;
    int i, length = recvfrom(fd, packet, sizeof packet, 0, (void *) &address, &size);
    if (length < 20 || memcmp(packet, "ctai", 4)) continue;
    gettimeofday(&now, 0); packet[0] = 's';
    unsigned long long sec = 4611686018427387914ULL + now.tv_sec; unsigned nano = now.tv_usec * 1000 + 500;
    for (i = 0; i < 8; ++i) packet[4 + i] = sec >> (56 - 8 * i);
    for (i = 0; i < 4; ++i) packet[12 + i] = nano >> (24 - 8 * i);
    memset(packet + 16, 0, 4);
    sendto(fd, packet, length, 0, (void *) &address, size); } }
'''


@contextlib.contextmanager
def serving(command, port=None):
    """A server -> (process, port), which it prints if it is not known."""
    with started(*command, stdout=subprocess.PIPE) as process:
        yield process, port or int(re.search(rb"port (\d+)", process.stdout.readline()).group(1))


def compare_servers(servers, size, outstanding):
    """Print a line for each server."""
    figures, lost = {name: [] for name in servers}, dict.fromkeys(servers, 0)
    for _ in range(SERVER_ROUNDS):
        for name, (process, port) in servers.items():
            before_ns = cpu_ns(process.pid)
            command = ["python3", "-IS", "-c", LOAD, *map(str, (port, size, outstanding, ROUND_SEC))]
            load = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()
            used_us, answered = (cpu_ns(process.pid) - before_ns) / 1000, int(load[0])
            lost[name] += int(load[1])
            figures[name].append((used_us / answered, answered / float(load[2])))
    (first, ours), *others = figures.items()
    for name, rows in figures.items():
        print("  %d bytes, %3d outstanding  %-22s %6.2f us %8.0f/s%s" % (
            size, outstanding, name, *medians(rows), ", %d lost" % lost[name] if lost[name] else ""), end="")
        for other, theirs in others if name == first else ():
            share = statistics.median(our[0] / their[0] for our, their in zip(ours, theirs))
            print(", %.2f of %s" % (share, other), end="")
        print(flush=True)


def bench_server():
    """CPU per reply, the server's own; replies per second."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        servers = {"taiclockd.py": stack.enter_context(serving(installed("taiclockd.py", "-p", "0")))}
        if shutil.which("gcc"):
            binary = os.path.join(directory, "server")
            subprocess.run(["gcc", "-O2", "-xc", "-o", binary, "-"], input=C_SERVER.encode(), check=True)
            servers["the loop in C"] = stack.enter_context(serving([binary]))
        for name, port, args in (("taiclockd", 4014, ()), ("s6-taiclockd", 4015, ("-i", NEAR, "-p", "4015"))):
            if shutil.which(name):
                servers[name] = stack.enter_context(serving([name, *args], port))
        time.sleep(0.5)  # for those that don't say when they are ready
        for name, (process, port) in list(servers.items()):
            if process.poll() is not None:
                print("  %s does not run; something else may have port %d" % (name, port))
                del servers[name]
        for size, outstanding in itertools.product((32, 28), (1, 8, 64, 256)):
            compare_servers(servers, size, outstanding)
        print("  taiclockd.py, resident after that: %.1f MB" % resident_mb(servers["taiclockd.py"][0].pid))


# ==== nts ===========================================================================================
NTS_RUNS, NTS_SLOW_RUNS = 60, 6
NTS_CONF = """local stratum 1
allow
user root
cmdport 0
bindcmdaddress /
bindaddress 127.0.0.1
port %d
ntsport %d
ntsntpserver 127.0.0.2
ntsservercert %s
ntsserverkey %s
pidfile %s
"""
NTS_CERTIFICATE = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=bench " \
                  "-keyout host.key -out host.crt -days 9 -addext subjectAltName=IP:127.0.0.1"
# Runs a command and writes its s of CPU and the kB it had at most into a file.
CPU_METER = """
import os, sys
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
usage = os.wait4(pid, 0)[2]
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss, file=open(sys.argv[1], "w"))
"""


def spent(command, offset_of, home):
    """-> (|error| in us, ms of CPU, MB at most) of a command that measures, or None."""
    done = subprocess.run(["python3", "-IS", "-c", CPU_METER, "usage"] + command, cwd=home, env=ENV,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with open(os.path.join(home, "usage")) as file:
        cpu_sec, most_kb = map(float, file.read().split())
    found = offset_of(done)
    return found and (abs(found[0]) / 1e3, cpu_sec * 1e3, most_kb * 1024 / 1e6)


def bench_nts():
    """|error|, CPU and memory of a mark of four exchanges by NTS, sntpclock, and chronyd -Q with nts."""
    if not shutil.which("chronyd") or not shutil.which("openssl"):
        print("needs chronyd and openssl")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]  # for key establishment by TCP, and for NTP by UDP
    asks = ["-r", "4", "-c", "host.crt", "-p", str(port), "127.0.0.1"]
    chronyd = ["chronyd", "-Q", "-x", "-t", "20", "cmdport 0", "user root", "ntstrustedcerts host.crt",
               "pidfile query.pid", "server 127.0.0.1 iburst nts ntsport %d" % port]
    rows = [("sntpclock.py", installed("sntpclock.py", "-r4", "-p", str(port), "127.0.0.2"), packet_offset),
            ("ntsclock.py, stored keys", installed("ntsclock.py", "-s", ".", *asks), packet_offset),
            ("ntsclock.py, new keys", installed("ntsclock.py", *asks), packet_offset),
            ("chronyd -Q with nts", chronyd, number_after(rb"wrong by ")),
            ("sntpclock.py --version", installed("sntpclock.py", "--version"), lambda done: (0, None)),
            ("ntsclock.py --version", installed("ntsclock.py", "--version"), lambda done: (0, None))]
    with tempfile.TemporaryDirectory() as home:
        subprocess.run(NTS_CERTIFICATE.split(), cwd=home, check=True, stderr=subprocess.DEVNULL)
        conf, *paths = [os.path.join(home, name) for name in ("conf", "host.crt", "host.key", "server.pid")]
        with open(conf, "w") as file:
            file.write(NTS_CONF % (port, port, *paths))
        # All answers come through the relay, since key establishment says that NTP is asked at 127.0.0.2.
        with started("chronyd", "-x", "-d", "-f", conf), \
                started(sys.executable, __file__, "relay", "127.0.0.2", str(port), str(port)):
            time.sleep(2)  # for chronyd's start
            found = {name: [] for name, _, _ in rows}
            for turn in range(NTS_RUNS):
                for name, command, offset_of in rows:
                    if turn < NTS_SLOW_RUNS or not name.startswith("chronyd"):
                        found[name] += filter(None, [spent(command, offset_of, home)])
    print("a relay keeps each packet %.1f ms + %.1f ms of jitter\n%-24s %9s %11s %7s %6s %6s" % (
        RELAY_DELAY_SEC * 1e3, RELAY_JITTER_SEC * 1e3, "", "error us", "x sntpclock", "CPU ms", "MB", "seen"))
    first_us = None
    for name, marks in found.items():
        if not marks:
            print("%-24s no answer" % name)
            continue
        error_us, cpu_ms, most_mb = medians(marks)
        first_us = first_us or error_us
        print("%-24s %9.2f %11.2f %7.1f %6.1f %6d" % (
            name, error_us, error_us / first_us, cpu_ms, most_mb, len(marks)))


# ==== programs ======================================================================================
PROGRAMS = ("clockview.py", "clockadd.py", "sntpclock.py", "taiclock.py", "ntsclock.py", "taiclockd.py",
            "clockspeed.py", "clockctl", "clockctl-check", "clockctl-graph")
MARKS = 50


def bench_programs():
    """Start-up, resident memory, CPU; as installed."""
    print("%-16s %6s %6s" % ("--help", "ms", "MB"))
    for name in PROGRAMS:
        if os.path.exists(os.path.join(HERE, name)):
            print("%-16s %6.1f %6.1f" % (name, *cost(installed(name, "--help"))))
    print("%-16s %6.1f %6.1f" % ("python3 alone", *cost(["python3", "-IS", "-c", "pass"])))
    with serving(installed("taiclockd.py", "-p", "0")) as (process, _):
        time.sleep(0.5)
        print("taiclockd.py, resident: %.1f MB" % resident_mb(process.pid))
    with tempfile.TemporaryDirectory() as home, started(*installed("clockspeed.py", "-n", home),
                                                        stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        started_ms, used_ns = cpu_ns(process.pid) / 1e6, []
        for _ in range(MARKS):
            time.sleep(0.02)
            before_ns = cpu_ns(process.pid)
            with open(home + "/adjust", "wb", buffering=0) as fifo:
                fifo.write(bytes(16))
            process.stdout.readline()
            time.sleep(0.02)  # for the files that it writes after the line
            used_ns.append(cpu_ns(process.pid) - before_ns)
        print("clockspeed.py, resident after %d marks: %.1f MB; CPU: %.0f ms to start, %.2f ms for a mark" % (
            MARKS, resident_mb(process.pid), started_ms, statistics.median(used_ns) / 1e6))


BENCHES = {"estimator": bench_estimator, "clients": bench_clients, "server": bench_server, "nts": bench_nts,
           "programs": bench_programs}


def main(argv):
    if argv[1:2] == ["relay"]:  # of bench_clients, in a network namespace; it runs until it is killed
        relay(argv[2], *map(int, argv[3:]))
    if argv[1:] in (["-h"], ["--help"]):
        sys.stdout.write(__doc__)
        return 0
    if argv[1:2] == ["replay"] and len(argv) == 3:
        return bench_replay(argv[2])
    try:
        options, names = getopt.getopt(argv[1:], "s:w:")
        seeds = range(int(dict(options).get("-s", "10")))
        if not seeds or not set(names) <= set(BENCHES):
            raise ValueError
    except (ValueError, getopt.GetoptError):
        sys.stderr.write("bench_all.py: usage: %s\n" % USAGE)
        return 100
    for name in names or BENCHES:
        bench = BENCHES[name]
        print("\n== %s: %s" % (name, bench.__doc__.strip().splitlines()[0]), flush=True)
        bench(*[seeds, [word for letter, word in options if letter == "-w"]] * (name == "estimator"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
