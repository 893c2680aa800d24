#!/usr/bin/env python3
"""The part of bench_all.py that tells what faults and hostile inputs do."""
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))

# ==== faults ========================================================================================
FAULT_RUNS = 5
FUZZ_SHARE = 10  # a tenth of what test_all.py tries, which is a million
NIGHT_SEC, DAY_SEC = 8 * 3600, 86400


def faults(tests):
    """[(what happens, function(simulation, kernel, rng) that lets it, the server's error in ns since)]"""
    def month(simulation, kernel, rng):
        simulation.run(30 * DAY_SEC)

    def wild(simulation, kernel, rng):
        simulation.mark(rng.choice((-1, 1)) * 10 ** rng.randrange(7, 12))
        simulation.run(3600)

    def back_3_s_off(simulation, kernel, rng):
        simulation.run(DAY_SEC)

    def moved(sec):
        def move(simulation, kernel, rng):
            kernel.clock += sec * 1e9
            simulation.run(600)
        return move

    def restart(simulation, kernel, rng):
        kernel.sleep(600)
        simulation.start()

    def reboot(simulation, kernel, rng):
        kernel.boot, kernel.tick = "boot-2", 10**9
        kernel.clock += rng.gauss(0, 3e8)
        kernel.fields.update(freq=0, status=0x40)
        simulation.start()

    def suspend(simulation, kernel, rng):
        kernel.tai += NIGHT_SEC * 10**9
        kernel.slept_ns += NIGHT_SEC * 10**9
        kernel.clock += rng.gauss(0, 2e8)
        simulation.run(60)

    def restored(simulation, kernel, rng):
        kernel.tick -= rng.randrange(1, 36000) * 10**9
        simulation.run(60)

    def paused(simulation, kernel, rng):
        kernel.tai += 60 * 10**9
        kernel.clock -= 60e9
        simulation.run(60)

    def damaged(simulation, kernel, rng):
        path = simulation.directory / "state"
        path.write_bytes(tests.mutated(rng, path.read_bytes()))
        simulation.start()

    def unwritable(simulation, kernel, rng):
        simulation.etc_fd = simulation.daemon.etc_fd = -1
        simulation.run(3600)

    def denied(simulation, kernel, rng):
        kernel.denied = True
        simulation.run(3600)
        kernel.denied = False

    def foreign(simulation, kernel, rng):
        for _ in range(10):
            kernel.fields["freq"] = rng.randrange(-10**6, 10**6)
            simulation.run(120)

    def garbage(simulation, kernel, rng):
        for _ in range(1000):
            simulation.daemon.mark(bytes(rng.getrandbits(8) for _ in range(rng.randrange(40))))

    return [("a month without a mark", month, 0), ("a wild mark, 10 ms to 100 s off", wild, 0),
            ("a day silent, then 3 s off", back_3_s_off, 3 * 10**9), ("killed, started 10 min later", restart, 0),
            ("a reboot", reboot, 0), ("a night suspended", suspend, 0), ("the counter goes back", restored, 0),
            ("paused for a minute", paused, 0), ("date -s, an hour", moved(3600), 0),
            ("20 years ahead", moved(20 * 31556952), 0), ("etc/state damaged, restarted", damaged, 0),
            ("etc can not be written", unwritable, 0), ("an hour of EPERM", denied, 0),
            ("another program at the rate", foreign, 0), ("1000 of garbage in the FIFO", garbage, 0)]


def fault_error(tests, directory, happen, server_ns, seed):
    """-> the error of what is believed, and of the clock, in ns, three marks after the fault."""
    rng = random.Random(seed)
    kernel = tests.FakeKernel(ppm=rng.uniform(-80, 80), bias_ppm=rng.uniform(-2, 2))
    simulation = tests.Simulation(directory, kernel)

    def mark(error_ns, wait_sec):
        real_tai_ns = kernel.tai + error_ns + round(rng.gauss(0, 2 * 10**4))
        clock_tai_ns = simulation.module.to_tai(kernel.clock_ns(), simulation.daemon.rows)
        simulation.daemon.mark(tests.CODES.pack((real_tai_ns - clock_tai_ns) * 10**9))
        simulation.due = simulation.daemon.wake(True)
        simulation.run(wait_sec)
    for wait_sec in (64, 541, 1623, 3600, 3600, 3600):
        mark(0, wait_sec)
    happen(simulation, kernel, rng)
    for wait_sec in (541, 541, 1200):
        mark(server_ns, wait_sec)
    believed_ns = simulation.daemon.estimator.real(kernel.tick)[0] - kernel.tai - server_ns
    return abs(believed_ns), abs(kernel.clock - server_ns)


def microseconds(ns):
    return "%.0f us" % (ns / 1e3) if ns < 1e8 else "%.3g s" % (ns / 1e9)


def bench_faults():
    """The time error three marks (of 20 us noise) and 38 minutes after each fault, on test_all.py's
    simulated kernel; what the clock is off more than that is still being slewed.  Then what hostile inputs
    cost."""
    sys.path.insert(0, HERE)
    import test_all as tests  # needs pytest, as test_all.py installs it
    os.environ.update(CLOCK_SCALE="utc", LEAPSECS=tests.LEAP_TABLE.name, TZ="UTC")
    stderr, quiet = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # the warnings are the tests' matter
    print("%-32s %5s %8s   %12s %12s   %12s" % ("fault", "tried", "survived", "believed", "worst", "clock"))
    for name, happen, server_ns in faults(tests):
        errors = []
        for seed in range(FAULT_RUNS):
            with tempfile.TemporaryDirectory() as directory:
                try:
                    errors.append(fault_error(tests, pathlib.Path(directory), happen, server_ns, seed))
                except Exception as err:
                    print("%s: %r" % (name, err))
        believed, clock = zip(*errors)
        print("%-32s %5d %8d   %12s %12s   %12s" % (
            name, FAULT_RUNS, len(errors), microseconds(statistics.median(believed)), microseconds(max(believed)),
            microseconds(statistics.median(clock))))
    print("\n%-32s %9s %9s %9s %9s" % ("hostile inputs to", "tried", "survived", "refused", "each"))
    rng, total = random.Random(1), 0
    with tempfile.TemporaryDirectory() as directory:
        for name, (count, examples, allowed, function) in tests.fuzz_targets(pathlib.Path(directory)).items():
            inputs = [tests.mutated(rng, rng.choice(examples)) for _ in range(count // FUZZ_SHARE)]
            survived = refused = 0
            begin = time.perf_counter()
            for data in inputs:
                try:
                    refused += not function(data)
                except allowed:
                    refused += 1
                survived += 1
            each_us = (time.perf_counter() - begin) / len(inputs) * 1e6
            total += survived
            print("%-32s %9d %9d %9d %6.1f us" % (name, len(inputs), survived, refused, each_us))
    print("%-32s %9s %9d" % ("in total", "", total))
    os.dup2(stderr, 2)


if __name__ == "__main__":
    bench_faults()
