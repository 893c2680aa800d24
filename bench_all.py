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
    clients    the error and cost of a mark by sntpclock and taiclock, beside the other clients
               that are installed; on loopback and over a path with jitter, on an idle and on a
               busy machine
    server     CPU per reply of taiclockd, beside the original's loop in C, compiled on the spot,
               and the servers that are installed; for queries of 32 and of 28 bytes
    nts        the error and cost of ntsclock's marks, beside sntpclock and chronyd -Q with nts
    programs   start-up time and memory of each program, resident size of clockspeed and its CPU
               for a mark

    The figures are medians.  What is compared is measured in turns, so that whatever else the
    machine does meanwhile counts for all.  `clients` and `nts` need root, iproute2, openssl and
    chronyd, which serves this machine's own clock, so that any offset is an error.

OPTIONS
    -s seeds  simulated worlds of each kind (10: a quarter of an hour)
    -w word   only those lines of `estimator` that have this word

EXIT STATUS
    0 measured; 100 wrong usage; 111 a log that `replay` can't make again
"""
import collections
import contextlib
import ctypes
import getopt
import heapq
import importlib.machinery
import importlib.util
import itertools
import math
import os
import random
import re
import selectors
import shutil
import socket
import statistics
import struct
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


# Runs a command and writes its cost into a file; small itself, since a child begins as its copy.
METER = """
import os, sys, time
start = time.perf_counter()
usage = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)[2]
print((time.perf_counter() - start) * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3,
      usage.ru_maxrss * 1024 / 1e6, file=open(sys.argv[1], "w"))
"""


def metered(command, directory=None):
    """Run it -> (how it ended, [ms from start to end, ms of CPU, MB at most])."""
    with tempfile.NamedTemporaryFile() as file:
        done = subprocess.run(["python3", "-IS", "-c", METER, file.name, *command], cwd=directory, env=ENV,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return done, list(map(float, file.read().split()))


@contextlib.contextmanager
def started(*command, stdout=subprocess.DEVNULL, directory=None):
    """A process that is killed at the end."""
    process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.DEVNULL, env=ENV, cwd=directory)
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


def wild(noise):
    """Three marks of a hundred wrong by 0.05 to 5 s more; the others as without this."""
    def draw(rng, index, exchanges):
        drawn = noise(rng, index, exchanges)
        apart = random.Random(repr(drawn.error_sec))
        if apart.random() >= 0.03:
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


# When the next mark comes, and of how many exchanges: f(estimator, sec, index) -> (s, exchanges).

def every(interval, exchanges=1):
    return lambda estimator, sec, index: (interval, exchanges)


def asked(target_sec):
    """As clockctl asks: the wait grows threefold at most."""
    def wait(estimator, sec, index):
        plan = estimator.next_mark_plan(TICK0_NS + int(sec * 1e9), target_sec * 1e9)
        return min(plan.wait_sec, 541.0 * 3**min(index, 8)), plan.exchanges
    return wait


class Run:
    """What a run gave: the samples, how many marks and packets, how often real time was not within the bound,
    and the bound's widths [(sec, s)]."""

    def __init__(self, estimator, wander):
        self.estimator, self.informed, self.bound = estimator, Informed(wander), Bound()
        self.samples, self.marks, self.packets, self.outside, self.widths = [], 0, 0, 0, []

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
        self.marks += 1
        self.packets += exchanges

    def rms(self, since, until=math.inf):
        return rms(sample.error_sec for sample in self.samples if since <= sample.sec < until)


Sample = collections.namedtuple("Sample", "sec error_sec predicted_sec informed_sec")


def rms(values):
    return math.sqrt(statistics.fmean(value * value for value in values))


def simulate(seed, days, noise, schedule, make=Estimator, sample_sec=300.0, dark_days=0, **counter):
    """One estimator in one world, then dark_days without marks.  Wander and noise draw from generators of
    their own, so that a seed gives the same noise to different estimators, with or without wild marks.
    """
    counter_rng, noise_rng = (random.Random("%s %d" % (what, seed)) for what in "cn")
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
            run.mark(*now, noise(noise_rng, run.marks, exchanges), exchanges)
            wait_sec, exchanges = schedule(run.estimator, sec, run.marks - 1)
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
    "one way": (world(4, Queues(back=none), every(1024)), dict(ms=0.1)),
    "other way, 4 a mark": (world(4, Queues(out=none, back=exponential(5e-3)), every(1024, 4)),
                            dict(ms=0.05)),
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
    if options.get("dark_days"):  # a world's dark errors all come from one error of its rate: more worlds
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


# ==== clients, nts ==================================================================================
RUNS, SLOW_RUNS, SLOW = 50, 6, ("chronyd", "busybox")  # which take seconds by design
RELAY_DELAY_SEC, RELAY_JITTER_SEC = 0.5e-3, 0.3e-3  # the least and the mean of the rest, each way
NEAR, FAR = "127.0.0.1", "127.0.0.2"  # on the usual ports, as not all clients can choose
RELAY = "a relay, %.1f ms + %.1f ms of jitter each way" % (RELAY_DELAY_SEC * 1e3, RELAY_JITTER_SEC * 1e3)
CLONE_NEWNET = 0x40000000
CERTIFICATE = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=bench " \
              "-keyout host.key -out host.crt -days 9 -addext subjectAltName=IP:" + NEAR
CHRONYD = ("chronyd", "-x", "-d", "local stratum 1", "allow", "user root", "cmdport 0", "bindcmdaddress /",
           "bindaddress " + NEAR, "ntsntpserver " + FAR, "ntsservercert host.crt", "ntsserverkey host.key",
           "pidfile server.pid")
CHRONYD_QUERY = ["chronyd", "-Q", "-x", "-t", "20", "cmdport 0", "user root", "pidfile query.pid",
                 "ntstrustedcerts host.crt"]


def relay(port):
    """Relay UDP from FAR to NEAR and keep each packet a while; not every kernel has netem."""
    chance, selector, count = random.Random(1), selectors.PollSelector(), itertools.count()
    backs, waiting = {}, []  # a socket for each client; (when, number, function, its operands)
    front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    front.bind((FAR, port))
    selector.register(front, selectors.EVENT_READ)
    while True:
        left_sec = waiting[0][0] - time.monotonic() if waiting else 1
        for key, _ in selector.select(left_sec - 1e-3):  # spins for the last millisecond
            if key.fileobj is front:
                packet, client = front.recvfrom(2048)
                if client not in backs:
                    backs[client] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    backs[client].connect((NEAR, port))
                    selector.register(backs[client], selectors.EVENT_READ, client)
                send, operands = backs[client].send, (packet,)
            else:
                send, operands = front.sendto, (key.fileobj.recv(2048), key.data)
            due = time.monotonic() + RELAY_DELAY_SEC + chance.expovariate(1 / RELAY_JITTER_SEC)
            heapq.heappush(waiting, (due, next(count), send, operands))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, send, operands = heapq.heappop(waiting)
            send(*operands)


@contextlib.contextmanager
def servers():
    """Servers at NEAR, and behind relays at FAR, in a network that has only loopback -> their directory."""
    ctypes.CDLL(None).unshare(CLONE_NEWNET)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        subprocess.run(CERTIFICATE.split(), cwd=home, check=True, stderr=subprocess.DEVNULL)
        relays = [installed("bench_all.py", "relay", port) for port in ("123", "4014")]
        for command in (CHRONYD, installed("taiclockd.py", "-i", NEAR), *relays):
            stack.enter_context(started("nice", "-n", "-15", *command, directory=home))  # cores of its own
        time.sleep(2)  # for chronyd's start
        yield home


def packet_offset(done):
    """The adjustment on a client's stdout -> (ns, bound in ns or None), or None if there is none."""
    if not done.stdout:
        return None
    view = load("clockview")
    offset_ns, last = view.unpack(done.stdout)
    quality = view.unpack_quality(last)
    # the C originals are off by whole seconds where the clock counts UTC
    return (offset_ns + 5 * 10**8) % 10**9 - 5 * 10**8, quality and sum(quality)


def number_after(pattern):
    """-> what finds the seconds after that in a client's output and makes ns of them."""
    def offset(done):
        found = re.search(pattern + rb"([-+]?[\d.]+(?:e-?\d+)?)", done.stdout + done.stderr)
        return found and (float(found.group(1)) * 1e9, None)
    return offset


def compare_marks(clients, home):
    """Print a line for each (name, command, done -> (offset, bound) in ns or None) that is installed."""
    print("%-24s %8s %8s %8s %4s %7s %7s %6s %6s %7s" % (
        "", "error us", "95%", "bound us", "over", "ms", "CPU ms", "MB", "marks", "x first"))
    found, first_us = {name: [] for name, command, _ in clients if shutil.which(command[0])}, None
    for turn in range(RUNS):
        for name, command, offset_of in clients:
            if name in found and (turn < SLOW_RUNS or command[0] not in SLOW):
                done, cost = metered(command, home)
                mark = offset_of(done)
                if mark:
                    found[name].append((abs(mark[0]) / 1e3, mark[1] and mark[1] / 1e3, *cost))
    for name, marks in found.items():
        if not marks:
            print("%-24s no answer" % name)
            continue
        errors, bounds, *costs = zip(*marks)
        error_us = statistics.median(errors)
        first_us = first_us or error_us
        bound, over = ("-", "-") if None in bounds else (
            "%.2f" % statistics.median(bounds), sum(error > bound for error, bound in zip(errors, bounds)))
        print("%-24s %8.2f %8.2f %8s %4s %7.1f %7.1f %6.1f %6d %7.2f" % (
            name, error_us, sorted(errors)[int(len(errors) * 0.95)], bound, over,
            *map(statistics.median, costs), len(marks), error_us / first_us), flush=True)


def bench_clients():
    """|error| of a mark, the bound that it tells, how many errors were over that; cost."""
    with servers() as home:
        for address, state in itertools.product((NEAR, FAR), ("idle", "busy")):
            print("\n%s, %s" % ("loopback" if address == NEAR else RELAY, state))
            with contextlib.ExitStack() as stack:
                for _ in range(os.cpu_count() if state == "busy" else 0):
                    stack.enter_context(started(sys.executable, "-c", "while True: pass"))
                compare_marks([
                    ("sntpclock.py", installed("sntpclock.py", address), packet_offset),
                    ("taiclock.py", installed("taiclock.py", address), packet_offset),
                    ("ntpdig", ["ntpdig", "-j", "-p10", "-g10", address], number_after(rb'"offset":')),
                    ("chronyd", CHRONYD_QUERY + ["server %s iburst" % address], number_after(rb"wrong by ")),
                    ("busybox", ["busybox", "ntpd", "-nqwddd", "-p", address], number_after(rb"offset:")),
                ] + [(name, [name, address], packet_offset)
                     for name in ("sntpclock", "s6-sntpclock", "taiclock", "s6-taiclock")], home)


def bench_nts():
    """|error| and cost of a mark of four exchanges by NTS, sntpclock, and chronyd -Q with nts."""
    ntsclock = installed("ntsclock.py", "-r4", "-c", "host.crt")  # key establishment at NEAR, which names FAR
    print(RELAY)
    with servers() as home:
        compare_marks([
            ("sntpclock.py", installed("sntpclock.py", "-r4", FAR), packet_offset),
            ("ntsclock.py, stored keys", ntsclock + ["-s", ".", NEAR], packet_offset),
            ("ntsclock.py, new keys", ntsclock + [NEAR], packet_offset),
            ("chronyd", CHRONYD_QUERY + ["server %s iburst nts" % NEAR], number_after(rb"wrong by "))], home)


# ==== server ========================================================================================
SERVER_ROUNDS, ROUND_SEC = 25, 0.1
MSG_WAITFORONE = 0x10000
# What the original taiclockd does for each query: recvfrom, gettimeofday, sendto.
C_SERVER = r"""
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
"""


@contextlib.contextmanager
def serving(command, port=None):
    """A server -> (process, port), which it prints if it is not known."""
    with started(*command, stdout=subprocess.PIPE) as process:
        yield process, port or int(re.search(rb"port (\d+)", process.stdout.readline()).group(1))


def ask(port, size, outstanding):
    """Send queries for ROUND_SEC, so many by one system call -> (replies, s)."""
    libc, answered, begin = ctypes.CDLL(None), 0, time.perf_counter()
    query = ctypes.create_string_buffer(b"ctai", size)
    iovec = ctypes.create_string_buffer(struct.pack("@PN", ctypes.addressof(query), size))
    header = struct.pack("@PIPNPNi0PI0P", 0, 0, ctypes.addressof(iovec), 1, 0, 0, 0, 0)  # C's struct mmsghdr
    queries = ctypes.create_string_buffer(header * outstanding)
    replies = ctypes.create_string_buffer(len(queries))  # without room for any: they are only counted
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((NEAR, port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 200000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        while time.perf_counter() < begin + ROUND_SEC:
            missing = libc.sendmmsg(sock.fileno(), queries, outstanding, 0)
            while missing > 0:
                received = libc.recvmmsg(sock.fileno(), replies, missing, MSG_WAITFORONE, None)
                if received <= 0:  # some are lost
                    break
                missing -= received
                answered += received
    return answered, time.perf_counter() - begin


def compare_servers(processes, size, outstanding):
    """Print a line for each server, {name: (process, port)}."""
    figures = {name: [] for name in processes}
    for _ in range(SERVER_ROUNDS):
        for name, (process, port) in processes.items():
            before_ns = cpu_ns(process.pid)
            answered, sec = ask(port, size, outstanding)
            used_us = (cpu_ns(process.pid) - before_ns) / 1000
            figures[name].append((used_us / max(answered, 1), answered / sec))
    ours = figures["taiclockd.py"]
    for name, rows in figures.items():
        share = statistics.median(row[0] / our[0] for row, our in zip(rows, ours))
        print("  %d bytes, %3d outstanding  %-16s %6.2f us %8.0f/s, x ours %.2f" % (
            size, outstanding, name, *map(statistics.median, zip(*rows)), share), flush=True)


def bench_server():
    """CPU per reply, the server's own; replies per second."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        processes = {"taiclockd.py": stack.enter_context(serving(installed("taiclockd.py", "-p", "0")))}
        if shutil.which("gcc"):
            binary = os.path.join(directory, "server")
            subprocess.run(["gcc", "-O2", "-xc", "-o", binary, "-"], input=C_SERVER.encode(), check=True)
            processes["the loop in C"] = stack.enter_context(serving([binary]))
        for name, port, args in (("taiclockd", 4014, ()), ("s6-taiclockd", 4015, ("-i", NEAR, "-p", "4015"))):
            if shutil.which(name):
                process, _ = stack.enter_context(serving([name, *args], port))
                time.sleep(0.5)  # it does not say when it is ready
                if process.poll() is None:
                    processes[name] = process, port
                else:
                    print("  %s does not run; something else may have port %d" % (name, port))
        for size, outstanding in itertools.product((32, 28), (1, 8, 64, 256)):
            compare_servers(processes, size, outstanding)
        print("  taiclockd.py, resident after that: %.1f MB" % resident_mb(processes["taiclockd.py"][0].pid))


# ==== programs ======================================================================================
PROGRAMS = ("clockview.py", "clockadd.py", "sntpclock.py", "taiclock.py", "ntsclock.py", "taiclockd.py",
            "clockspeed.py", "clockctl", "clockctl-check", "clockctl-graph")
STARTS, MARKS = 15, 50


def bench_programs():
    """Start-up, resident memory, CPU; as installed."""
    print("%-16s %6s %6s %6s" % ("--help", "ms", "CPU ms", "MB"))
    for command in [["python3", "-IS", "-c", "pass"]] + [installed(name, "--help") for name in PROGRAMS]:
        costs = zip(*(metered(command)[1] for _ in range(STARTS)))
        print("%-16s %6.1f %6.1f %6.1f" % (os.path.basename(command[2]), *map(statistics.median, costs)))
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
    if argv[1:2] == ["relay"]:  # of servers(); it runs until it is killed
        relay(int(argv[2]))
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
    able = os.getuid() == 0 and all(map(shutil.which, ("ip", "chronyd", "openssl")))
    for name in names or BENCHES:
        bench = BENCHES[name]
        print("\n== %s: %s" % (name, bench.__doc__.strip().splitlines()[0]), flush=True)
        if name in ("clients", "nts") and not able:
            print("needs root, iproute2, chronyd and openssl, for servers in a network of their own")
            continue
        bench(*[seeds, [word for letter, word in options if letter == "-w"]] * (name == "estimator"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
