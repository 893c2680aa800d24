#!/usr/bin/env python3
"""bench_readme.part.py - the README's picture, for bench_all.py"""
import importlib.machinery
import importlib.util
import math
import os
import random
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SEED = 20261122


def load(name, path):
    loader = importlib.machinery.SourceFileLoader(name, path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


def bench_picture(picture=os.path.join(HERE, "svc", "graph.svg")):
    """README's svc/graph.svg, by `clockctl graph offset` from 60 simulated days: a counter that is 23 ppm off
    and wanders by 1e-9 per sqrt(s), a server whose marks are good to 1 ms, CLOCK_ERROR="0.010"."""
    estimator = load("clockspeed", os.path.join(HERE, "clockspeed.py")).Estimator()
    rng = random.Random(SEED)
    wander, noise_ns, rate, limit_ns, waits_sec = 1e-9, 1e6, 23e-6, 1e7, (541, 2617923)
    start_ns, tick_ns, real_ns, wait_sec, lines, off = 1796000000 * 10**9, 0, 0.0, 0, [], []
    while tick_ns < 60 * 86400 * 10**9:
        # the counter wanders, exactly as over t seconds: phase and rate gain q [[t^3/3, t^2/2], [t^2/2, t]]
        first, second = rng.gauss(0, 1), rng.gauss(0, 1)
        phase = wander * wait_sec**1.5 * (first / 2 + second / math.sqrt(12))
        real_ns += (wait_sec * (1 + rate) + phase) * 1e9
        rate += wander * math.sqrt(wait_sec) * first
        tick_ns += wait_sec * 10**9
        clock_ns = estimator.real(tick_ns)[0] - start_ns if estimator.has_phase() else 0
        marked_ns = real_ns + rng.gauss(0, noise_ns)
        outcome = estimator.mark(tick_ns, start_ns + round(marked_ns))
        off.append(real_ns - clock_ns)
        sec, nano = divmod(start_ns + round(real_ns), 10**9)
        lines.append("@%016x%08x mark: offset %+.9f s, error %.9f s, rate %+.4f ppm, rate error %.4f ppm, %s\n" % (
            sec + 2**62 + 10, nano, (marked_ns - clock_ns) / 1e9, estimator.real(tick_ns)[1] / 1e9,
            *estimator.rate(), outcome))
        wait_sec = min(max(64, int(min(3 * wait_sec or waits_sec[0], estimator.next_mark(tick_ns, limit_ns)))),
                       waits_sec[1])
    with tempfile.TemporaryDirectory() as logs:
        with open(os.path.join(logs, "current"), "w") as file:
            file.writelines(lines)
        subprocess.run([os.path.join(HERE, "clockctl"), "graph", "offset", "--svg", picture], check=True,
                       env=dict(os.environ, CLOCKSPEED_CONF="/dev/null", CLOCKSPEED_LOG=logs, TZ="UTC"))
    print("%s: %d marks in 60 days, the clock off by %.1f ms rms when they came" % (
        os.path.basename(picture), len(lines), math.sqrt(sum(each**2 for each in off) / len(off)) / 1e6))


if __name__ == "__main__":
    start_sec = time.monotonic()
    bench_picture()
    print("%.1f s" % (time.monotonic() - start_sec))
