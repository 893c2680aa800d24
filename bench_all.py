#!/usr/bin/env python3
"""bench_all.py - what clockspeed reaches, and what it costs

SYNOPSIS
    ./bench_all.py [-s seeds] [words]

DESCRIPTION
    Prints how near the estimator keeps to real time in simulated worlds, beside the original's two
    points, and what a mark costs: all lines, or those with one of the words in their name.
    Figures are medians over the seeds (20 if not given: some ten minutes).  A seed gives the same
    world to each estimator; only the CPU figure reads a clock.
"""
import importlib.machinery
import importlib.util
import math
import os
import random
import statistics
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


def load(name):
    """A script as a module, without running it."""
    loader = importlib.machinery.SourceFileLoader(name, os.path.join(HERE, name + ".py"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


# ==== the estimator ====
Estimator = load("clockspeed").Estimator
DAY = 86400.0
EPOCH_NS = 1800000000 * 10**9  # big enough that a float would lose 256 ns
TICK0_NS = 7 * 10**14  # up for eight days
MARK_LEAST_SEC = 64.0  # clockctl asks for no mark sooner
RATIO_LEAST, RATIO_MOST = 0.7, 1.4  # wanted: rms of error / predicted error
WILD_MOST = 1.3  # wanted: rms with 3% of wild marks / without


class Counter:
    """Real time against a counter, integrated exactly between events.

    The rate (real - counter, s per s) walks randomly by `wander` per sqrt(s) from `ppm`; its integral over
    t is drawn with it (covariance wander^2 [[t^3/3, t^2/2], [t^2/2, t]]), so that no step size matters.
    `daily_ppm` adds a sinusoid over the day, whose size differs by `weather` (a share, normal) each day,
    `jumps` ((sec, ppm), ...) changes of rate and `steps` ((sec, step_sec), ...) of real time.
    """

    def __init__(self, rng, wander=1e-9, ppm=50.0, daily_ppm=0.0, weather=0.0, jumps=(), steps=()):
        self.rng, self.wander, self.sec, self.phase, self.rate = rng, wander, 0.0, 0.0, ppm * 1e-6
        self.daily, self.turn = daily_ppm * 1e-6, rng.uniform(0, 2 * math.pi)
        self.weather, self.sizes = weather, []
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
        """A whole day's sinusoid sums up to nothing, so that days may differ in size without a step."""
        day, omega = int(sec / DAY), 2 * math.pi / DAY
        while self.weather and len(self.sizes) <= day:
            self.sizes.append(self.rng.gauss(1, self.weather))
        size = self.sizes[day] if self.weather else 1.0
        return size * self.daily / omega * (math.sin(omega * sec + self.turn) - math.sin(self.turn))


class TwoPoints:
    """The original's algorithm: rate from the first mark to the latest, phase of the latest."""

    def __init__(self):
        self.first = self.last = None

    def mark(self, tick_ns, real_ns):
        self.last = tick_ns, real_ns
        self.first = self.first or self.last
        return "used"

    def real(self, tick_ns):
        (tick0, real0), (tick1, real1) = self.first, self.last
        rate = (real1 - real0 - (tick1 - tick0)) / (tick1 - tick0) if tick1 > tick0 else 0.0
        return real1 + tick_ns - tick1 + round(rate * (tick_ns - tick1)), 1.0


# Noise of a mark: f(rng, index) -> s.

def normal(sigma):
    return lambda rng, index: rng.gauss(0, sigma)


def wild(noise, share=0.03, where=()):
    """Some marks, and those numbered in where, wrong by 0.05 to 5 s more; the others as without this."""
    def draw(rng, index):
        error = noise(rng, index)
        apart = random.Random(repr(error))
        is_wild = apart.random() < share or index in where
        return error + is_wild * apart.uniform(0.05, 5) * apart.choice((-1, 1))
    return draw


def late(sigma):
    """A quiet floor, and Pareto latency on a fifth of the marks: late only, of infinite variance."""
    return lambda rng, index: rng.gauss(0, sigma) + (
        sigma * 10 * (rng.paretovariate(1.5) - 1) if rng.random() < 0.2 else 0.0)


def louder(before, after, first):
    """Noise of another size from a mark on: a new route."""
    return lambda rng, index: rng.gauss(0, before if index < first else after)


# When the next mark comes: f(estimator, rng, sec, index) -> s.

def every(interval):
    return lambda estimator, rng, sec, index: interval


def irregular(low, high):
    return lambda estimator, rng, sec, index: math.exp(rng.uniform(math.log(low), math.log(high)))


def tripling(estimator, rng, sec, index):
    return min(541.0 * 3**index, 30 * DAY)


def asked(target_sec):
    return lambda estimator, rng, sec, index: max(
        MARK_LEAST_SEC, estimator.next_mark(TICK0_NS + int(sec * 1e9), target_sec * 1e9))


class Run:
    """What a run gave: the samples [(sec, error in s, predicted error in s)], marks [(sec, outcome)]."""

    def __init__(self, estimator):
        self.estimator, self.samples, self.marks = estimator, [], []

    def rms(self, since, until=math.inf):
        return rms(error for sec, error, _ in self.samples if since <= sec < until)

    def ratio(self, since):
        return rms(error / predicted for sec, error, predicted in self.samples if sec >= since)


def rms(values):
    return math.sqrt(statistics.fmean(value * value for value in values))


def simulate(seed, days, noise, schedule, make=Estimator, sample_sec=300.0, **counter):
    """One estimator in one world.  Wander, noise and schedule draw from generators of their own, so that a
    seed gives the same noise to different estimators, and with or without wild marks.
    """
    counter_rng, noise_rng, schedule_rng = [random.Random("%s %d" % (what, seed)) for what in "cns"]
    counter, run = Counter(counter_rng, **counter), Run(make())
    next_mark, next_sample = 0.0, sample_sec
    while min(next_mark, next_sample) <= days * DAY:
        sec = min(next_mark, next_sample)
        tick_ns = TICK0_NS + int(sec * 1e9)
        real_ns = EPOCH_NS + tick_ns - TICK0_NS + round(counter.at(sec) * 1e9)
        if sec == next_sample:
            guess_ns, error_ns = run.estimator.real(tick_ns)
            run.samples.append((sec, (guess_ns - real_ns) * 1e-9, error_ns * 1e-9))
            next_sample += sample_sec
        if sec == next_mark:
            noise_ns = round(noise(noise_rng, len(run.marks)) * 1e9)
            run.marks.append((sec, run.estimator.mark(tick_ns, real_ns + noise_ns)))
            next_mark += schedule(run.estimator, schedule_rng, sec, len(run.marks) - 1)
    return run


def world(days, noise, schedule, **counter):
    return dict(days=days, noise=noise, schedule=schedule, **counter)


# name: (world, wanted: most of two points' rms, most rms in s, most marks), as the project's goal has it
TABLE = {
    "w 1e-9, 20 us, 1024 s": (world(4, normal(20e-6), every(1024)), 0.3, None, None),
    "w 1e-9, 20 us, 3600 s": (world(10, normal(20e-6), every(3600)), 0.2, None, None),
    "w 1e-9, 2 ms, 1024 s": (world(4, normal(2e-3), every(1024)), 0.45, None, None),
    "w 1e-10, 2 ms, 1024 s": (world(4, normal(2e-3), every(1024), wander=1e-10), 0.22, None, None),
    "w 1e-10, 2 ms, 1 ppm daily": (world(10, normal(2e-3), every(3600), wander=1e-10, daily_ppm=1.0),
                                   0.9, None, None),
    "w 1e-9, 2 ms, asked 10 ms": (world(30, normal(2e-3), asked(10e-3)), None, 8e-3, 65),
    "w 1e-10, 2 ms, asked 10 ms": (world(30, normal(2e-3), asked(10e-3), wander=1e-10), None, 9e-3, 30),
}
THERMOSTAT = tuple((day * DAY / 3, 0.3 * (-1) ** day) for day in range(1, 30))
OTHERS = {
    "w 1.8e-10, 140 us, 1024 s": world(4, normal(140e-6), every(1024), wander=1.8e-10),
    "w 5.6e-10, 700 us, 1024 s": world(4, normal(700e-6), every(1024), wander=5.6e-10),
    "w 1e-8, 20 us, 64 s": world(1, normal(20e-6), every(64), wander=1e-8),
    "w 1e-9, 3 ms, 1 s": world(1 / 24, normal(3e-3), every(1), sample_sec=10.0),
    "w 1e-9, 30 ms, 1024 s": world(8, normal(30e-3), every(1024)),
    "w 0, 2 ms, 1024 s": world(8, normal(2e-3), every(1024), wander=0.0),
    "-500 ppm, 2 ms, 1024 s": world(4, normal(2e-3), every(1024), ppm=-500.0),
    "2 ms, tripling": world(180, normal(2e-3), tripling, sample_sec=3600.0),
    "1 ms, 10 s to 5 h": world(10, normal(1e-3), irregular(10, 20000)),
    "20 us, 1 ppm daily": world(6, normal(20e-6), every(1024), wander=1e-10, daily_ppm=1.0),
    "2 ms, 1 ppm, weather 50%": world(20, normal(2e-3), every(3600), wander=1e-10, daily_ppm=1.0,
                                      weather=0.5),
    "2 ms, 1 ppm, asked 10 ms": world(30, normal(2e-3), asked(10e-3), wander=1e-10, daily_ppm=1.0),
    "100 us, 0.3 ppm thermostat": world(10, normal(100e-6), every(1024), wander=1e-10, jumps=THERMOSTAT),
    "50 us, then 5 ms": world(6, louder(50e-6, 5e-3, 200), every(1024)),
    "5 ms, then 50 us": world(6, louder(5e-3, 50e-6, 200), every(1024)),
    "2 ms, wild, asked 10 ms": world(30, wild(normal(2e-3)), asked(10e-3)),
    "late Pareto 100 us": world(6, late(100e-6), every(1024)),
}
# (days, noise, interval, wander)
WILD_WORLDS = (4, 20e-6, 1024, 1e-9), (4, 2e-3, 1024, 1e-9), (10, 2e-3, 3600, 1e-10)
CHANGES = ((20e-6, dict(jump_ppm=1.0)), (200e-6, dict(jump_ppm=1.0)), (20e-6, dict(jump_ppm=-100.0)),
           (20e-6, dict(step_sec=0.001)), (2e-3, dict(step_sec=-3600.0)))


def medians(rows):
    return [statistics.median(column) for column in zip(*rows)]


def compare(options, seeds):
    """-> medians of rms in s, rms / two points' (NaN if they can't be asked), rms of error/predicted, marks"""
    rows, start = [], options["days"] * DAY / 4  # errors are those of the last three quarters
    for seed in seeds:
        run, share = simulate(seed, **options), math.nan
        try:
            share = run.rms(start) / simulate(seed, make=TwoPoints, **options).rms(start)
        except AttributeError:  # two points have no next_mark
            pass
        rows.append((run.rms(start), share, run.ratio(start), len(run.marks)))
    return medians(rows)


def wild_price(days, sigma, interval, wander, seeds):
    """rms over all seeds with wild marks / without."""
    with_wild, without = (
        rms(simulate(seed, days, noise, every(interval), wander=wander).rms(days * DAY / 4) for seed in seeds)
        for noise in (wild(normal(sigma)), normal(sigma)))
    return with_wild / without


def recovery(sigma, seeds, jump_ppm=0.0, step_sec=0.0, interval=1024.0, marks=6):
    """-> rms in s before a change of rate or a step of real time, after the 1st, 2nd ... mark since."""
    when, rows = 2 * DAY + 0.37 * interval, []
    first = math.ceil(when / interval) * interval
    for seed in seeds:
        run = simulate(seed, 2 + (marks + 2) * interval / DAY, normal(sigma), every(interval),
                       sample_sec=interval / 4 + 0.001, jumps=[(when, jump_ppm)], steps=[(when, step_sec)])
        rows.append([run.rms(DAY, when)] + [run.rms(first + i * interval, first + (i + 1) * interval)
                                            for i in range(marks)])
    return medians(rows)


def cpu_per_mark(marks=300):
    """-> (s for a mark, s for the dearest: the last of eight that contradict everything)."""
    rng, estimator, used = random.Random(1), Estimator(), []
    for index in range(marks + 8):
        tick_ns = (index + 1) * 10**12
        wrong_ns = rng.randrange(10**6 if index < marks else 10**18)
        start = time.process_time()
        estimator.mark(tick_ns, EPOCH_NS + tick_ns + wrong_ns)
        used.append(time.process_time() - start)
    return statistics.median(used[:marks]), max(used[marks:])


def verdict(found, share, error, marks):
    """What a row of TABLE wants, and whether found has it."""
    wanted = [text % limit for text, limit in (("share %.2f", share), ("%.0f ms", error and error * 1e3),
                                               ("%d marks", marks)) if limit]
    within = all(value <= limit for value, limit in zip(found, (error, share, RATIO_MOST, marks)) if limit)
    return "%-16s %s" % (", ".join(wanted), "reached" if within and found[2] >= RATIO_LEAST else "MISSED")


def bench_estimator(seeds=range(20), words=()):
    """Accuracy beside the original's two points, honesty of the predicted error, robustness, cost."""
    def say(name, text):
        if not words or any(word in name for word in words):
            print("%-27s %s" % (name, text()), flush=True)

    def accuracy(options, *wanted):
        found = compare(options, seeds)
        return "%10.4f %8.3f %9.2f %6d  %s" % (found[0] * 1e3, *found[1:], verdict(found, *wanted))

    def recovered(sigma, change):
        return "ms before, after each mark: " + " ".join(
            "%.3f" % (value * 1e3) for value in recovery(sigma, seeds, **change))

    print("%-27s %10s %8s %9s %6s  %s" % ("world", "rms ms", "share", "err/pred", "marks", "wanted at most"))
    for name, (options, *wanted) in TABLE.items():
        say(name, lambda: accuracy(options, *wanted))
    for name, options in OTHERS.items():
        say(name, lambda: accuracy(options, None, None, None))
    for days, sigma, interval, wander in WILD_WORLDS:
        say("wild, w %g, %g us" % (wander, sigma * 1e6), lambda: "rms times %.3f (wanted %.1f)" % (
            wild_price(days, sigma, interval, wander, seeds), WILD_MOST))
    for sigma, change in CHANGES:
        say("%g us, %s %g" % (sigma * 1e6, *next(iter(change.items()))),
            lambda: recovered(sigma, change))
    say("CPU", lambda: "%.2f ms a mark (wanted 5), %.1f ms the dearest" % tuple(
        value * 1e3 for value in cpu_per_mark()))


def main(argv):
    words, count = argv[1:], 20
    if words[:1] == ["-s"]:
        words, count = words[2:], int(words[1])
    bench_estimator(range(count), words)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
