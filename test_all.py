#!/usr/bin/env python3
"""test_all.py - every test of clockspeed in Python

SYNOPSIS
    ./test_all.py [pytest options and names]
    ./test_all.py -k taiclockd

DESCRIPTION
    Runs on its own on a fresh machine: where pytest can't be imported, it is installed into a
    private virtual environment, .test-venv, beside this file (or, as root, as a package).
    The tests use real parts: chronyd on a loopback port, daemontools, the shells.  A test whose
    part is not installed is skipped with the reason; with CI=true in the environment that is a
    failure, so that CI can't go green on what it did not run.

    No test touches the clock of this machine: what would set it runs against a fake clock here,
    and for real in a virtual machine (.ci/run).
"""
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".test-venv")


def install_pytest():
    """A Python that has pytest: from a private virtual environment, or the system's package."""
    python = os.path.join(VENV, "bin", "python")
    ways = ([sys.executable, "-m", "venv", VENV], [python, "-m", "pip", "install", "--quiet", "pytest"])
    if all(subprocess.run(way, stderr=subprocess.DEVNULL).returncode == 0 for way in ways):
        return python
    # Debian's python3 comes without ensurepip, Alpine's without pip: ask the system for the package.
    for way in (["apt-get", "install", "-qq", "-y", "--no-install-recommends", "python3-pytest"],
                ["apk", "add", "--quiet", "py3-pytest"]):
        try:
            if subprocess.run(way).returncode == 0:
                return "/usr/bin/python3"
        except FileNotFoundError:
            continue
    sys.exit("test_all.py: fatal: unable to install pytest: "
             "no venv with pip, no apt-get, no apk (or not root)")


if __name__ == "__main__":
    try:
        import pytest
    except ImportError:
        if os.environ.get("TEST_ALL_PYTHON"):
            raise
        os.environ["TEST_ALL_PYTHON"] = python = install_pytest()
        os.execv(python, [python] + sys.argv)
    sys.exit(pytest.main(["-p", "no:cacheprovider", "-rs"] + (sys.argv[1:] or ["-q"])
                         + [os.path.abspath(__file__)]))

# ==== what the tests share =========================================================================
import base64
import calendar
import contextlib
import errno
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import pathlib
import random
import re
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import tempfile
import threading
import time
import warnings
import xml.dom.minidom

import pytest

SCRIPTS = ("clockadd", "clockspeed", "clockview", "sntpclock", "taiclock", "taiclockd")
ALL_SCRIPTS = SCRIPTS + ("clockctl", "svc/install")
UTC_ENV = dict(os.environ, CLOCK_SCALE="utc", TZ="UTC", LEAPSECS="")
SEED = 20261122


def path_of(name):
    """clockctl and svc/install have no suffix."""
    path = os.path.join(HERE, name)
    return path if os.path.exists(path) else path + ".py"


def load(name):
    """A script as a module, without running it."""
    loader = importlib.machinery.SourceFileLoader(name, path_of(name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    return module


def need(*commands):
    """Skip where a real part is absent; on CI, where all are installed, that fails."""
    missing = [command for command in commands if not shutil.which(command)]
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            "not installed: " + ", ".join(missing))


def run(name, *args, stdin=b"", timeout=60, **env):
    """A script as a process of its own -> CompletedProcess with stdout in bytes and stderr as text."""
    done = subprocess.run([path_of(name), *map(str, args)], input=stdin, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=timeout, env=dict(UTC_ENV, **env))
    done.stderr = done.stderr.decode()
    assert "Traceback" not in done.stderr, done.stderr
    return done


def marked_blocks(name):
    """The shared blocks in a script: title -> text."""
    blocks, title = {}, None
    with open(path_of(name)) as file:
        for line in file:
            if line.startswith("# ==== end shared"):
                title = None
            elif line.startswith("# ==== shared"):
                title = line
                blocks[title] = ""
            elif title:
                blocks[title] += line
    assert title is None, "%s: a shared block does not end" % name
    return blocks


# ==== the layout ====================================================================================

def test_shared_blocks_are_the_same_bytes_in_every_copy():
    copies = {}
    for name in ALL_SCRIPTS:
        for title, text in marked_blocks(name).items():
            copies.setdefault(title, {}).setdefault(text, []).append(name)
    for title, texts in copies.items():
        assert len(texts) == 1, "%s differs between %s" % (title, list(texts.values()))
        assert len(sum(texts.values(), [])) > 1, "%s is in one script only" % title
    everywhere = [title for title in copies if title.startswith("# ==== shared:")]
    assert len(everywhere) == 1
    assert set(SCRIPTS) <= set(next(iter(copies[everywhere[0]].values())))


def test_every_script_begins_in_the_same_way():
    heads = set()
    for name in ALL_SCRIPTS:
        with open(path_of(name)) as file:
            heads.add(file.readline() + file.readline())
        assert os.access(path_of(name), os.X_OK)
    assert len(heads) == 1 and heads.pop().startswith('#!/bin/sh\n"""exec" python3 -IS -c ')


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_help_is_the_manual_page(name):
    done = run(name, "--help")
    assert done.returncode == 0 and done.stderr == ""
    text = done.stdout.decode()
    assert text.startswith("%s - " % os.path.basename(name))
    for heading in ("SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "SEE ALSO"):
        assert "\n%s\n" % heading in text


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_usage_errors_exit_100_with_one_line(name):
    done = run(name, "--no-such-option")
    assert done.returncode == 100 and done.stdout == b""
    assert done.stderr.startswith("{0}: usage: {0}".format(os.path.basename(name)))
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ALL_SCRIPTS)
def test_a_full_stdout_is_a_clear_line(name):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([path_of(name), "--help"], stdout=full, stderr=subprocess.PIPE, env=UTC_ENV)
    assert done.returncode == 111
    assert done.stderr.decode() == (
        "%s: fatal: unable to write output: No space left on device\n" % os.path.basename(name))


# ==== clockview, clockadd =========================================================================

# The adjustments of the specification and their bytes.
PACKETS = (("ffffffffffffffff3b9ac80c00000000", -500 * 10**9), ("00000000000000010000000000000000", 10**18),
           ("00000000000000000000000017d78400", 4 * 10**8), ("00000000000000000000000100000000", 10**9),
           ("0000000000000000000000003b9a06b2", 999950002), ("0000000000000000000000010000c350", 1000050000))
CODES = load("clockview")


def test_packets_of_the_specification():
    for text, atto in PACKETS:
        assert CODES.pack(atto).hex() == text
        assert CODES.unpack(bytes.fromhex(text)) == atto
    assert CODES.unpack(bytes.fromhex(PACKETS[0][0])[:12]) == PACKETS[0][1]


def test_every_packet_comes_back():
    rng = random.Random(SEED)
    for _ in range(10000):
        atto = rng.randrange(-2**63, 2**63) * 10**18 + rng.randrange(10**18)
        assert CODES.unpack(CODES.pack(atto)) == atto


def test_garbage_is_a_packet_or_a_value_error():
    rng = random.Random(SEED)
    for _ in range(10000):
        packet = getattr(rng, "randbytes", os.urandom)(rng.randrange(20))  # Python 3.8 has none
        try:
            assert CODES.pack(CODES.unpack(packet)) == packet.ljust(16, b"\0")
        except ValueError:
            pass


def test_labels_of_the_utc_scale():
    rows = CODES.read_leap_table()[0]
    for unix_sec, label in ((1483228799, "40000000586846a3"), (1483228800, "40000000586846a5"),
                            (1796000000, "400000006b0cc925"), (0, "400000000000000a")):
        tai_ns = CODES.to_tai(unix_sec * 10**9 + 5, rows)
        assert "%016x" % (tai_ns // 10**9 + CODES.LABEL_ZERO_SEC) == label and tai_ns % 10**9 == 5
        assert CODES.from_tai(tai_ns, rows) == unix_sec * 10**9 + 5


def test_a_leap_second_repeats_or_skips_on_the_way_back():
    start = 1900000800 // 86400 * 86400
    for sign in (1, -1):
        rows = [(-2**63, 10), (start, 10 + sign)]
        before, after = CODES.to_tai((start - 2) * 10**9, rows), CODES.to_tai(start * 10**9, rows)
        assert after - before == (2 + sign) * 10**9
        shown = [CODES.from_tai(tai_ns, rows) // 10**9 - start for tai_ns in range(before, after + 1, 10**9)]
        assert shown == ([-2, -1, -1, 0] if sign == 1 else [-2, 0])


def leapsecs_dat():
    return b"".join(struct.pack(">Q", 2**62 + day * 86400 + 10 + n) for n, day in enumerate(CODES.LEAP_DAYS))


def test_leapsecs_dat_is_djbs_and_equal_to_the_built_in_table(tmp_path):
    data = leapsecs_dat()
    assert len(data) == 216 and data[:8].hex() == "4000000004b2580a" and data[-8:].hex() == "40000000586846a4"
    assert CODES.parse_leap_table(data) == CODES.read_leap_table()[:1] + (None,)


@pytest.mark.skipif(not os.path.exists("/usr/share/zoneinfo/leap-seconds.list"),
                    reason="no leap-seconds.list here")
def test_the_systems_leap_seconds_list_begins_with_the_built_in_table():
    with open("/usr/share/zoneinfo/leap-seconds.list", "rb") as file:
        rows, expiry = CODES.parse_leap_table(file.read())
    assert rows[:28] == CODES.parse_leap_table(leapsecs_dat())[0] and expiry > 1767225600


def test_a_negative_leap_second_in_a_list():
    text = b"#@ 4102444800\n2272060800 10 # 1972\n2287785600 11\n2303683200 10\n"
    rows, expiry = CODES.parse_leap_table(text)
    assert rows == [(-2**63, 10), (78796800, 11), (94694400, 10)] and expiry == 4102444800 - 2208988800


def test_damaged_leap_tables_are_refused():
    good = leapsecs_dat()
    text = b"2272060800 10\n2287785600 11\n2303683200 12\n"
    for data in (b"", b"\0" * 8, good[:-1], good[:8] * 2, good[8:], good[::-1], text.replace(b"11", b"13"),
                 text.replace(b"2287785600", b"2287785601"), text.replace(b"10", b"9"), b"\xff" + text,
                 b"1\n"):
        with pytest.raises((ValueError, IndexError)):
            CODES.parse_leap_table(data)
    rng = random.Random(SEED)
    for _ in range(10000):
        data = bytearray(rng.choice((good, text)))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            rows = CODES.parse_leap_table(bytes(data))[0]
        except (ValueError, IndexError):
            continue
        assert rows[0] == (-2**63, 10) and all(row[0] % 86400 == 0 for row in rows[1:])


@pytest.mark.parametrize("name", ("clockview", "clockadd", "taiclock"))
def test_a_damaged_leap_table_is_a_clear_error(name, tmp_path):
    (tmp_path / "leapsecs.dat").write_bytes(b"garbage")
    done = run(name, *(["127.0.0.1"] if name == "taiclock" else []), LEAPSECS=str(tmp_path / "leapsecs.dat"))
    assert done.returncode == 111
    assert done.stderr == "%s: fatal: unable to read leap seconds: leap second table %s is damaged\n" % (
        name, tmp_path / "leapsecs.dat")


def view(packet, **env):
    """clockview's two lines -> the seconds since 1970 that they show, in attoseconds."""
    done = run("clockview", stdin=packet, **env)
    assert done.returncode == 0 and done.stderr == ""
    import calendar
    shown = []
    for line, title in zip(done.stdout.decode().splitlines(), ("before: ", "after:  ")):
        assert line.startswith(title) and len(line) == len("before: 2026-11-22 15:41:44.") + 18
        date, _, fraction = line[8:].partition(".")
        shown.append(calendar.timegm(time.strptime(date, "%Y-%m-%d %H:%M:%S")) * 10**18 + int(fraction))
    return shown


def test_clockview_shows_the_clock_and_the_sum_exactly():
    for text, atto in PACKETS:
        for size in (12, 16):
            packet = bytes.fromhex(text)[:size]
            before, after = view(packet)
            assert abs(before - time.time() * 1e18) < 60e18
            assert after - before == CODES.unpack(packet)


def test_clockview_on_the_tai_scale_shows_the_same_difference():
    before, after = view(CODES.pack(-10**15), CLOCK_SCALE="tai")
    assert after - before == -10**15


def test_clockview_back_across_a_leap_second():
    rows = CODES.read_leap_table()[0]
    text = CODES.report(1483228800 * 10**9, -2 * 10**18, rows)
    assert text.splitlines()[1].endswith(":59.000000000000000000")  # two seconds before midnight of a day with 61


@pytest.mark.parametrize("name", ("clockview", "clockadd"))
@pytest.mark.parametrize("packet", (b"", b"x", b"x" * 11, b"x" * 13, b"x" * 15))
def test_short_packets_exit_111_with_the_originals_words(name, packet):
    done = run(name, stdin=packet)
    assert (done.returncode, done.stdout) == (111, b"")
    assert done.stderr == "%s: fatal: data split across packets\n" % name


@pytest.mark.parametrize("name", ("clockview", "clockadd"))
def test_a_closed_stdin_is_a_clear_line(name):
    done = subprocess.run(["sh", "-c", '"$0" <&-', path_of(name)], stderr=subprocess.PIPE, env=UTC_ENV)
    assert done.returncode == 111
    assert done.stderr.decode() == "%s: fatal: unable to read the adjustment: Bad file descriptor\n" % name


def test_clockview_refuses_what_no_clock_can_show():
    done = run("clockview", stdin=CODES.pack(2**62 * 10**18))
    assert done.returncode == 111 and done.stderr.startswith("clockview: fatal: unable to show that time: ")
    assert run("clockview", stdin=b"\0" * 8 + b"\xff" * 8).stderr.endswith(": not a TAI64NA packet\n")


def feed(monkeypatch, packet):
    """Let os.read(0, …) give the packet."""
    pipe, writer = os.pipe()
    os.write(writer, packet)
    os.close(writer)
    real_read = os.read
    monkeypatch.setattr(os, "read", lambda fd, size: real_read(pipe if fd == 0 else fd, size))


def test_clockadd_steps_by_the_adjustment_rounded_to_the_nanosecond(monkeypatch):
    clockadd = load("clockadd")
    for atto, delta_ns in ((-500 * 10**9, -500), (3 * 10**18 + 499999999, 3 * 10**9), (5 * 10**8, 1)):
        steps = []
        feed(monkeypatch, CODES.pack(atto))
        assert clockadd.main(["clockadd"], lambda: 1796000000 * 10**9, steps.append) == 0
        assert steps == [delta_ns]


def test_clockadd_refuses_steps_over_the_limit_unless_forced(monkeypatch, capfd):
    clockadd = load("clockadd")
    for options, status in ((["-e", "500"], 111), (["-e", "500", "-f"], 0), (["-e", "501"], 0)):
        for sign in (1, -1):
            steps = []
            feed(monkeypatch, CODES.pack(sign * 501 * 10**15))
            assert clockadd.main(["clockadd"] + options, time.time_ns, steps.append) == status
            assert steps == ([] if status else [sign * 501 * 10**6])
    assert "over the limit of -e" in capfd.readouterr().err


def test_clockadd_across_a_leap_second():
    clockadd = load("clockadd")
    rows = clockadd.read_leap_table()[0]
    # the clock shows 1 s after the leap second of 2016; real time is 3 s of TAI earlier, 1 s before it
    assert clockadd.step_ns(1483228801 * 10**9, -3 * 10**18, rows) == -2 * 10**9


def test_one_adjtimex_call_steps_and_leaves_the_unit_alone():
    clockadd, calls = load("clockadd"), []
    for status in (0, clockadd.STA_NANO):
        del calls[:]
        clockadd.step_kernel(lambda **fields: calls.append(fields) or {"status": status}, -3 * 10**8)
        assert calls[1] == {"modes": 0x2100, "sec": -1, "frac": 7 * 10**8}
        assert calls[2:] == ([] if status else [{"modes": 0x1000}])


def test_adjtimex_reads_the_kernel_in_every_layout():
    clockadd = load("clockadd")
    assert (clockadd.TIMEX.size, clockadd.TIMEX32.size) == (208, 128)
    assert len(clockadd.TIMEX.unpack(bytes(208))) == len(clockadd.TIMEX32.unpack(bytes(128))) == 21
    now = clockadd.adjtimex()
    assert abs(now["sec"] - time.time()) < 60 and 9000 <= now["tick"] <= 11000 and 0 <= now["state"] <= 5


# ==== clockspeed: the kernel's clock, simulated ====================================================

class FakeKernel:
    """A counter, a system clock and adjtimex() that behave as Linux's do; real time passes by sleep().

    ppm: real seconds per counter second - 1; bias_ppm: what the kernel's clock gains unasked.
    """
    START_NS = 1796000000 * 10**9

    def __init__(self, ppm=0.0, behind_ns=0, bias_ppm=0.0, start_ns=START_NS):
        self.ppm, self.bias_ppm = ppm, bias_ppm
        self.tick, self.tai = 10**9, start_ns + 37 * 10**9
        self.clock = float(-behind_ns)  # system clock minus (TAI - 37 s), which is right until a leap second
        self.fields = dict.fromkeys("offset freq esterror constant tai".split(), 0)
        self.fields.update(maxerror=16 * 10**6, status=0x40, tick=10000)
        self.slew_us = self.slewing_ns = 0
        self.calls, self.boot, self.slept_ns, self.denied = [], "boot-1", 0, False
        self.elapsed, self.leapt = 0.0, False

    def sleep(self, sec):
        """Let so many counter seconds pass; the kernel works second by second."""
        while sec > 1e-9:
            part = min(sec, 1 - self.elapsed % 1 or 1)
            gain = (self.fields["freq"] / 65536 + (self.fields["tick"] - 10000) * 100 + self.bias_ppm) * 1e-6
            self.clock += part * (1e9 * gain + self.slewing_ns - self.ppm * 1e3)
            self.tick += round(part * 1e9)
            self.tai += round(part * 1e9 * (1 + self.ppm / 1e6))
            self.fields["maxerror"] = min(16 * 10**6, self.fields["maxerror"] + 500 * part)
            if self.fields["maxerror"] >= 16 * 10**6:
                self.fields["status"] |= 0x40
            self.elapsed, sec = self.elapsed + part, sec - part
            if self.clock_ns() // 10**9 % 86400 in (86399, 0):
                self.leap()
            if self.elapsed % 1 < 1e-9 or self.elapsed % 1 > 1 - 1e-9:
                self.elapsed = float(round(self.elapsed))
                step_us = max(-500, min(500, self.slew_us))
                self.slew_us -= step_us
                self.slewing_ns = step_us * 1000

    def leap(self):
        """What the kernel does at the end of a UTC day for which it is armed; once for an arming."""
        sec = self.clock_ns() // 10**9 % 86400
        sign = {0x10: 1, 0x20: -1}.get(self.fields["status"] & 0x30, 0)
        if not self.leapt and (sign == 1 and sec == 0 or sign == -1 and sec == 86399):
            self.leapt = True
            self.clock -= sign * 1e9
            self.fields["tai"] += sign

    def clock_ns(self):
        return self.tai - 37 * 10**9 + round(self.clock)

    def read(self):
        return self.tick, self.clock_ns()

    def adjtimex(self, modes=0, **fields):
        if modes and self.denied:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        self.calls.append((modes, fields))
        if modes == 0x8001:
            self.slew_us, fields = fields["offset"], {}
        elif modes == 0xA001:
            return dict(self.fields, modes=modes, state=0, offset=self.slew_us)
        elif modes & 0x8000:
            raise AssertionError("a single shot can't be combined")
        elif modes & 0x100:
            self.clock += fields["sec"] * 10**9 + fields["frac"]
            self.slew_us = self.slewing_ns = 0
            self.fields.update(status=self.fields["status"] | 0x40, maxerror=16 * 10**6)
        for bit, name in ((1, "offset"), (2, "freq"), (4, "maxerror"), (8, "esterror"), (0x10, "status"),
                          (0x80, "tai"), (0x4000, "tick")):
            if modes & bit and modes != 0x8001:
                self.fields[name] = fields["constant" if name == "tai" else name]
        assert abs(self.fields["freq"]) <= 32768000 and 9000 <= self.fields["tick"] <= 11000
        return dict(self.fields, modes=modes, state=0, maxerror=int(self.fields["maxerror"]))

    def rate_error_ppm(self, seconds=600):
        """How fast the system clock moves off real time when nobody looks after it."""
        before = self.clock
        self.sleep(seconds)
        return (self.clock - before) / seconds / 1e3


class Simulation:
    """clockspeed on a FakeKernel, with its files in a directory; lines is what it said."""

    def __init__(self, directory, kernel, may_step=True):
        self.module = load("clockspeed")
        self.kernel, self.lines, self.due = kernel, [], 0.0
        self.directory = directory
        self.etc_fd = os.open(str(directory), os.O_RDONLY)
        self.start(may_step)

    def start(self, may_step=True):
        cs = self.module
        self.clock = cs.KernelClock.__new__(cs.KernelClock)
        self.clock.read, self.clock.boot_id = self.kernel.read, lambda: self.kernel.boot
        self.clock.suspended_ns = lambda: self.kernel.slept_ns + self.kernel.tick % 300  # two clocks are read
        self.clock.__init__(self.kernel.adjtimex, 10000)
        self.daemon = cs.Clockspeed(self.clock, self.etc_fd, may_step, self.lines.append)
        self.source = self.daemon.load()
        self.daemon.begin_clock()
        self.due = self.daemon.wake()

    def run(self, sec):
        """So many seconds of wake-ups."""
        while sec > 0:
            part = min(sec, self.due)
            self.kernel.sleep(part)
            sec, self.due = sec - part, self.due - part
            if self.due <= 1e-6:
                self.due = self.daemon.wake()

    def mark(self, error_ns=0):
        """A mark as an exact client makes it, but for error_ns."""
        real_ns = self.kernel.tai - 37 * 10**9
        self.daemon.mark(CODES.pack((real_ns + error_ns - self.kernel.clock_ns()) * 10**9))
        self.due = self.daemon.wake(True)


@pytest.fixture
def simulate(tmp_path):
    """Makes Simulations on directories below the test's own."""
    made = []

    def make(kernel, name="etc", **options):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        made.append(Simulation(directory, kernel, **options))
        return made[-1]
    yield make
    for simulation in made:
        os.close(simulation.etc_fd)


def test_a_clock_5_s_and_80_ppm_off_comes_right_and_stays_right_alone(simulate):
    kernel = FakeKernel(ppm=80, behind_ns=5 * 10**9, bias_ppm=2)
    simulation = simulate(kernel)
    simulation.mark()
    assert abs(kernel.clock) < 1000, "the first mark of a boot steps"
    for wait_sec in (60, 300, 541, 1623):
        simulation.run(wait_sec)
        simulation.mark()
    simulation.run(600)
    assert abs(kernel.clock) < 20000
    assert abs(kernel.rate_error_ppm()) < 0.1, "killed now, the clock runs on at the right rate"


def test_the_first_mark_only_steps_and_not_with_the_option_against_it(simulate):
    for may_step, steps in ((True, 1), (False, 0)):
        kernel = FakeKernel(behind_ns=2 * 10**9)
        simulation = simulate(kernel, "steps-%d" % steps, may_step=may_step)
        simulation.mark()
        assert [modes for modes, _ in kernel.calls if modes & 0x100 and not modes & 0x8000] == [0x2100] * steps
        assert any(line.startswith("slew: ") for line in simulation.lines) == (not steps)
    kernel.clock += 3e9
    for wait_sec in (64, 64, 541):
        simulation.run(wait_sec)
        simulation.mark()
    assert not [modes for modes, _ in kernel.calls if modes & 0x100 and not modes & 0x8000]


def test_rates_beyond_500_ppm_use_the_kernels_tick(simulate):
    for ppm in (-3000, 700, 499, 20000):
        kernel = FakeKernel(ppm=ppm)
        simulation = simulate(kernel, "rate%d" % ppm)
        simulation.mark()
        for wait_sec in (64, 128, 541, 541, 1623, 1623):
            simulation.run(wait_sec)
            simulation.mark()
        assert abs(simulation.daemon.estimator.rate()[0] - ppm) < 1
        simulation.run(9 * 3600)  # 20000 ppm takes a slew of 8 hours
        assert abs(kernel.rate_error_ppm()) < 1
        assert (kernel.fields["tick"] == 10000) == (abs(ppm) < 500)


def test_the_kernel_is_told_how_wrong_the_clock_can_be(simulate):
    kernel = FakeKernel(ppm=30)
    kernel.fields["status"] |= 0x2001  # STA_PLL and STA_NANO of somebody else
    simulation = simulate(kernel)
    simulation.run(300)
    assert kernel.fields["status"] == 0x2041, "unsynchronised before the first mark"
    for _ in range(4):
        simulation.mark()
        simulation.run(300)
        assert kernel.fields["status"] == 0x2001, "synchronised, and the others' bits survive"
        assert abs(kernel.clock) / 1000 <= kernel.fields["maxerror"] < 16 * 10**6
    simulation.run(6 * 3600)
    assert kernel.fields["status"] == 0x2001 and kernel.fields["maxerror"] < 10**6


def test_a_slew_that_is_replaced_does_not_overshoot(simulate):
    kernel = FakeKernel()
    simulation = simulate(kernel, may_step=False)
    simulation.mark()
    simulation.run(64)
    kernel.clock += 8e6  # under what counts as somebody else's step
    worst = 0
    for _ in range(40):
        simulation.run(1.7)
        simulation.mark()
        worst = min(worst, kernel.clock)
    simulation.run(60)
    assert worst > -100000 and abs(kernel.clock) < 5000


def test_marks_every_second_let_a_slew_pass(simulate):
    kernel = FakeKernel(ppm=20, bias_ppm=3)
    simulation = simulate(kernel, may_step=False)
    kernel.clock = 80e6
    rng = random.Random(1)
    for _ in range(200):
        simulation.run(1)
        simulation.mark(round(rng.gauss(0, 20000)))
    assert abs(kernel.clock) < 200000, "80 ms at 500 ppm take 160 s"
    assert len([line for line in simulation.lines if line.startswith("slew: ")]) <= 2
    for _ in range(120):
        simulation.run(1)
        simulation.mark()
    assert abs(simulation.clock.bias_ppm - 3) < 0.1 and abs(kernel.rate_error_ppm()) < 0.1


def test_an_uneven_slew_tells_no_bias(simulate):
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel)
    for wait_sec in (64, 64, 541, 541):
        simulation.run(wait_sec)
        simulation.mark()
    simulation.run(30)
    kernel.clock += 8e6
    simulation.mark()
    simulation.run(5)
    kernel.clock += 4e5  # 5% of the slew more than it was told to
    simulation.run(5)
    assert abs(simulation.clock.bias_ppm) < 0.01
    simulation.run(300)
    assert abs(simulation.clock.bias_ppm) < 0.01 and abs(kernel.clock) < 5000


def test_a_settled_daemon_wakes_once_a_minute(simulate):
    kernel = FakeKernel(ppm=12)
    simulation = simulate(kernel)
    for _ in range(5):
        simulation.mark()
        simulation.run(541)
    looks = []
    wake = simulation.daemon.wake
    simulation.daemon.wake = lambda *args: looks.append(1) or wake(*args)
    simulation.run(3600)
    assert len(looks) <= 61


def test_a_restart_in_the_same_boot_goes_on_as_if_nothing_had_happened(simulate):
    kernel = FakeKernel(ppm=-42, bias_ppm=1)
    simulation = simulate(kernel)
    for wait_sec in (64, 541, 1623):
        simulation.mark()
        simulation.run(wait_sec)
    kernel.sleep(600)  # killed; nobody looks after the clock
    frequency = kernel.fields["freq"]
    restarted = simulate(kernel)
    assert restarted.source == "phase and rate of etc/state"
    assert abs(kernel.fields["freq"] - frequency) <= 65.536, "within 0.001 ppm"
    assert restarted.daemon.estimator.real(kernel.tick) == simulation.daemon.estimator.real(kernel.tick)
    assert restarted.daemon.marks["used"] == simulation.daemon.marks["used"]
    assert not [line for line in restarted.lines if "step" in line]


def test_a_reboot_keeps_the_rate_and_begins_the_phase_anew(simulate):
    kernel = FakeKernel(ppm=-42)
    simulation = simulate(kernel)
    for wait_sec in (64, 541, 1623, 4869):
        simulation.mark()
        simulation.run(wait_sec)
    rebooted = FakeKernel(ppm=-42.3, behind_ns=10**9)
    rebooted.boot = "boot-2"
    simulation = simulate(rebooted)
    assert simulation.source == "rate of etc/state"
    ppm, error_ppm = simulation.daemon.estimator.rate()
    assert abs(ppm + 42) < 0.1 and 0.3 < error_ppm < 5
    assert abs(rebooted.rate_error_ppm() - 0.3) < 0.2, "the kept rate is in the kernel before any mark"
    simulation.mark()
    assert abs(rebooted.clock) < 1e6, "and the first mark of the new boot may step"


def test_an_atto_of_the_c_clockspeed_is_taken_when_it_is_newer(simulate, tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "atto").write_bytes(CODES.pack(1000050000))
    simulation = simulate(FakeKernel())
    assert simulation.source == "rate of etc/atto"
    assert simulation.daemon.estimator.rate()[0] == pytest.approx(50)
    for _ in range(3):
        simulation.mark()
        simulation.run(3600)
    assert (tmp_path / "etc" / "atto").read_bytes() != CODES.pack(1000050000)
    assert simulate(simulation.kernel).source == "phase and rate of etc/state"
    (tmp_path / "etc" / "atto").write_bytes(CODES.pack(1000049000))
    simulation = simulate(simulation.kernel)
    assert simulation.source == "rate of etc/atto"
    assert simulation.daemon.estimator.rate()[0] == pytest.approx(49)


def test_an_atto_of_another_counter_is_refused_with_a_line(simulate, tmp_path, capfd):
    (tmp_path / "etc").mkdir()
    for atto in (4 * 10**8, 0, -10**9, 10**20):
        (tmp_path / "etc" / "atto").write_bytes(CODES.pack(atto))
        assert simulate(FakeKernel()).source == "no rate known"
        assert capfd.readouterr().err.count("unable to use etc/atto: ") == 1
    (tmp_path / "etc" / "atto").write_bytes(b"garbage")
    assert simulate(FakeKernel()).source == "no rate known"


def test_damaged_states_are_refused_and_never_kill(simulate, tmp_path, capfd):
    kernel = FakeKernel(ppm=5)
    simulation = simulate(kernel)
    for wait_sec in (64, 541):
        simulation.mark()
        simulation.run(wait_sec)
    path = tmp_path / "etc" / "state"
    good = path.read_bytes()
    rng = random.Random(SEED)
    for number in range(300):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.choice(b'0123456789{}[]",:eE-nultrfas \0\xff')
        path.write_bytes(data if number % 3 else data[:rng.randrange(len(data))])
        damaged = simulate(kernel)
        assert damaged.source in ("phase and rate of etc/state", "rate of etc/state", "rate of etc/atto",
                                  "no rate known")
    mad = json.loads(good.decode())
    for kind in mad["estimator"]["kinds"]:
        kind[2] = 3e8  # 30% off: no counter is, and no kernel could follow
    for text in ("[]", "0", "null", '{"estimator":', "[" * 100000, json.dumps(mad)):
        path.write_text(text)
        assert simulate(kernel).source == "rate of etc/atto"


def test_a_step_by_somebody_else_is_said_and_slewed_back(simulate):
    kernel = FakeKernel(ppm=3)
    simulation = simulate(kernel)
    for wait_sec in (64, 541, 541):
        simulation.mark()
        simulation.run(wait_sec)
    rate = simulation.daemon.estimator.rate()
    kernel.clock += 1e9
    simulation.run(60)
    assert [line for line in simulation.lines if line.startswith("moved: ")] == [
        "moved: somebody set the system clock by +1.000 s"]
    assert simulation.daemon.estimator.rate() == rate, "and it is not learned as drift"
    simulation.run(2100)
    assert abs(kernel.clock) < 1e6, "1 s takes 2000 s at 500 ppm"
    assert not [modes for modes, _ in kernel.calls if modes == 0x2100]


def test_before_the_first_mark_the_system_clock_is_taken_as_it_is(simulate):
    kernel = FakeKernel()
    simulation = simulate(kernel)
    simulation.run(300)
    kernel.clock -= 3600e9
    simulation.run(300)
    assert kernel.clock == pytest.approx(-3600e9, abs=1e6)
    assert "moved: somebody set the system clock by -3600.000 s" in simulation.lines


def test_a_suspend_is_said_and_not_learned_as_drift(simulate):
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel)
    for wait_sec in (64, 541, 1623):
        simulation.mark()
        simulation.run(wait_sec)
    kernel.tai += 8 * 3600 * 10**9  # the counter stands still, the kernel sets the clock from the hardware's
    kernel.slept_ns += 8 * 3600 * 10**9
    kernel.clock -= 4e8
    simulation.run(64)
    assert [line for line in simulation.lines if line.startswith("suspend: ")] == [
        "suspend: the counter stood still for 8 h; a mark is wanted"]
    assert kernel.clock == pytest.approx(-4e8, abs=2e6)
    simulation.mark()
    simulation.run(1200)
    assert abs(kernel.clock) < 1e6 and abs(simulation.daemon.estimator.rate()[0] - 20) < 0.5


def test_another_program_at_the_frequency_is_said_once_an_hour(simulate):
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel)
    simulation.mark()
    for _ in range(60):
        simulation.run(120)
        kernel.fields["freq"] = 7 << 16
    assert 2 <= len([line for line in simulation.lines if line.startswith("foreign: ")]) <= 3


def test_garbage_in_the_fifo_is_a_line_each_and_harmless(simulate):
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel)
    for wait_sec in (64, 541):
        simulation.mark()
        simulation.run(wait_sec)
    rng = random.Random(SEED)
    rate, lines = simulation.daemon.estimator.rate(), len(simulation.lines)
    for number in range(10000):
        size = rng.choice((0, 1, 12, 15, 17, 32, 512))
        # every other one has the right size, and a fraction that no packet has
        simulation.daemon.mark(os.urandom(8) + b"\xff" * 8 if number % 2 else bytes(size))
    assert len(simulation.lines) - lines == 10000
    assert all(line.startswith("refused: ") for line in simulation.lines[lines:])
    assert simulation.daemon.estimator.rate() == rate and simulation.daemon.marks["refused"] == 10000


def test_no_real_time_before_the_release_or_an_era_later_is_believed(simulate):
    kernel = FakeKernel()
    simulation = simulate(kernel)
    for sec in (-10**9, -2**63, 2**32, 2**63 - 1):
        simulation.daemon.mark(CODES.pack(sec * 10**18))
    assert simulation.daemon.marks == {"used": 0, "doubted": 0, "refused": 4}


def test_a_denied_kernel_is_said_once_and_survived(simulate, capfd):
    kernel = FakeKernel()
    simulation = simulate(kernel)
    kernel.denied = True
    simulation.mark()
    simulation.run(600)
    assert capfd.readouterr().err.count("unable to steer the clock: Operation not permitted") == 1


def test_a_full_disk_is_said_once_and_the_old_file_stays(simulate, capfd, monkeypatch, tmp_path):
    simulation = simulate(FakeKernel())
    simulation.mark()
    before = (tmp_path / "etc" / "state").read_bytes()
    with monkeypatch.context() as patch:
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(simulation.module.os, "fsync", full)
        for _ in range(3):
            simulation.run(64)
            simulation.mark()
    assert capfd.readouterr().err.count("unable to write etc/state: No space left on device") == 1
    assert (tmp_path / "etc" / "state").read_bytes() == before
    simulation.run(64)
    simulation.mark()
    assert (tmp_path / "etc" / "state").read_bytes() != before


def leap_table(directory, *rows):
    """A leap-seconds.list with the built-in table and more rows -> its path."""
    path = directory / "leap-seconds.list"
    table = [(63072000, 10)] + CODES.parse_leap_table(leapsecs_dat())[0][1:] + list(rows)
    path.write_text("#@ 4102444800\n" + "".join("%d %d\n" % (sec + 2208988800, offset) for sec, offset in table))
    return str(path)


@pytest.mark.parametrize("scale", ("utc", "tai"))
@pytest.mark.parametrize("sign", (1, -1))
def test_a_leap_second_is_no_error_no_drift_and_no_jump(simulate, tmp_path, monkeypatch, sign, scale):
    start = 1798761600  # 2027-01-01
    monkeypatch.setenv("LEAPSECS", leap_table(tmp_path, (start, 37 + sign)))
    monkeypatch.setenv("CLOCK_SCALE", scale)
    kernel = FakeKernel(ppm=5, start_ns=(start - 2 * 86400) * 10**9)
    simulation = simulate(kernel)
    real_ns = lambda: kernel.tai - (37 + sign * (kernel.leapt and scale == "utc")) * 10**9
    armed = {}
    while kernel.tai < (start + 86400 + 37) * 10**9:
        # a mark an hour, and one within the ambiguous seconds
        simulation.daemon.mark(CODES.pack((real_ns() - kernel.clock_ns()) * 10**9))
        simulation.due = simulation.daemon.wake(True)
        to_go = start - kernel.clock_ns() // 10**9
        simulation.run(to_go - 1 if 10 < to_go < 3700 else 3600)
        armed[kernel.clock_ns() // 10**9 - start] = kernel.fields["status"] & 0x30
    target = sign * 1e9 if scale == "utc" else 0
    assert abs(kernel.clock + target) < 1e6 and abs(kernel.rate_error_ppm()) < 0.1
    assert not [line for line in simulation.lines if line.startswith(("moved", "slew", "step"))]
    assert not [modes for modes, _ in kernel.calls if modes == 0x2100]
    if scale == "tai":
        assert set(armed.values()) == {0} and kernel.fields["tai"] == 10
        return
    bit = 0x10 if sign == 1 else 0x20
    assert {bits for sec, bits in armed.items() if -86000 < sec < -1} == {bit}, "on the last day"
    assert {bits for sec, bits in armed.items() if sec < -86400 or sec > 60} == {0}, "on no other"
    assert kernel.fields["tai"] == 37 + sign
    assert simulation.daemon.marks["doubted"] == 0


def test_a_damaged_table_is_said_and_the_old_one_kept(simulate, tmp_path, monkeypatch, capfd):
    path = leap_table(tmp_path, (1798761600, 38))
    monkeypatch.setenv("LEAPSECS", path)
    simulation = simulate(FakeKernel())
    simulation.mark()
    with open(path, "w") as file:
        file.write("garbage")
    simulation.run(86400)
    assert capfd.readouterr().err.count("unable to read leap seconds: leap second table %s is damaged" % path) == 1
    assert simulation.daemon.rows[-1] == (1798761600, 38)


def test_an_expired_table_is_one_warning(simulate, tmp_path, monkeypatch, capfd):
    path = tmp_path / "list"
    path.write_text("#@ 3991593600\n2272060800 10\n")  # 2026-06-28
    monkeypatch.setenv("LEAPSECS", str(path))
    simulation = simulate(FakeKernel())
    simulation.run(86400)
    assert capfd.readouterr().err.count("it expired on 2026-06-28; a newer table is wanted") == 1


def test_a_clock_without_hardware_clock_goes_forward_to_the_newest_time_known(simulate, tmp_path):
    kernel = FakeKernel()
    simulation = simulate(kernel)
    simulation.mark()
    simulation.run(4000)
    known_ns = simulation.daemon.known_ns
    assert abs(known_ns - kernel.START_NS) < 4100 * 10**9
    rebooted = FakeKernel(behind_ns=kernel.START_NS)  # 1970
    rebooted.boot = "boot-2"
    simulation = simulate(rebooted)
    assert rebooted.clock_ns() == known_ns
    assert simulation.lines[0].startswith("step: the system clock by +17960")
    simulation.mark()
    assert abs(rebooted.clock) < 1e6
    ahead = FakeKernel(behind_ns=-10**18)
    ahead.boot = "boot-3"
    simulation = simulate(ahead)
    assert ahead.clock == 1e18, "never back"


# ==== clockspeed: the process ======================================================================

class Daemon:
    """clockspeed -n as a process; its lines come out of a file."""

    def __init__(self, home, *options, name="clockspeed"):
        self.home, self.log = str(home), str(home) + ".log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([path_of(name), *(options or ["-n"]), self.home], stdout=log, stderr=log,
                                            env=UTC_ENV)
        self.wait_for("start: ")

    def lines(self):
        with open(self.log) as log:
            return log.read().splitlines()

    def wait_for(self, text, count=1, timeout=30):
        deadline = time.monotonic() + timeout
        while sum(text in line for line in self.lines()) < count:
            assert time.monotonic() < deadline, "%r not in %s" % (text, self.lines())
            time.sleep(0.02)

    def write(self, data):
        with open(os.path.join(self.home, "adjust"), "wb", buffering=0) as fifo:
            fifo.write(data)

    def stop(self, number=15):
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def daemon(tmp_path):
    (tmp_path / "home").mkdir()
    made = []

    def make(*options, **named):
        made.append(Daemon(tmp_path / "home", *options, **named))
        return made[-1]
    yield make
    for process in made:
        process.process.kill()
        process.process.wait()
        assert "Traceback" not in "\n".join(process.lines())


def test_clockspeed_learns_from_its_fifo_and_ends_cleanly_on_term(daemon):
    process = daemon()
    mode = os.lstat(process.home + "/adjust").st_mode
    assert oct(mode) == "0o10600"
    for count in range(1, 4):
        process.write(CODES.pack(count * 10**12))
        process.wait_for("mark: offset +0.00000%d000 s" % count)
    process.write(b"short")
    process.wait_for("refused: 5 bytes at once, not 16")
    assert process.stop() == 0
    assert process.lines()[-1].startswith("stop: ")
    assert [line for line in process.lines() if "start: observing, CLOCK_MONOTONIC_RAW" in line]
    assert os.lstat(process.home + "/adjust").st_mode == mode


def test_atto_is_the_c_programs(daemon, tmp_path):
    process = daemon()
    for count in range(3):  # real time gains 50 ppm: 50 us in a second
        process.write(CODES.pack(count * 50 * 10**12))
        process.wait_for("mark: ", count + 1)
        time.sleep(1)
    process.stop()
    atto = (tmp_path / "home" / "etc" / "atto").read_bytes()
    assert len(atto) == 16 and 1.00001 < CODES.unpack(atto) / 1e9 < 1.0002
    before, after = view(atto)
    assert after - before == CODES.unpack(atto)


def test_kill_9_loses_no_mark(daemon):
    process = daemon()
    for count in range(3):
        process.write(CODES.pack(0))
        process.wait_for("mark: ", count + 1)
    time.sleep(0.3)  # the files follow the line
    process.stop(9)
    process = daemon()
    process.wait_for("phase and rate of etc/state")
    process.stop()


def test_a_second_clockspeed_refuses_to_run_beside_the_first(daemon):
    process = daemon()
    done = run("clockspeed", "-n", process.home)
    assert done.returncode == 111
    assert done.stderr == (
        "clockspeed: fatal: unable to use %s: another clockspeed is running there\n" % process.home)


def test_a_missing_home_is_a_clear_line(tmp_path):
    none = tmp_path / "none"
    for home, why in (
            (none, "No such file or directory; svc/install makes it, and so does: mkdir -p %s" % none),
            (path_of("clockview"), "Not a directory")):
        done = run("clockspeed", "-n", home)
        assert (done.returncode, done.stdout) == (111, b"")
        assert done.stderr == "clockspeed: fatal: unable to use %s: %s\n" % (home, why)


@pytest.mark.parametrize("make", (lambda path: path.write_bytes(b""), lambda path: path.mkdir(),
                                  lambda path: path.symlink_to("elsewhere")),
                         ids=("file", "directory", "symlink"))
def test_what_is_no_fifo_is_said_and_left_alone(daemon, tmp_path, make):
    make(tmp_path / "home" / "adjust")
    before = os.lstat(str(tmp_path / "home" / "adjust"))
    process = daemon()
    process.wait_for("clockspeed: warning: unable to read adjust: there is something that is not a FIFO")
    assert process.stop() == 0
    assert os.lstat(str(tmp_path / "home" / "adjust")) == before
    assert not (tmp_path / "home" / "elsewhere").exists()


def test_a_fifo_that_is_deleted_or_replaced_is_found_again(tmp_path):
    module = load("clockspeed")
    fifo = module.Fifo(str(tmp_path / "adjust"))
    fifo.open()
    first = fifo.reader
    fifo.open()
    assert fifo.reader == first, "the same one stays open"
    for renew in (lambda: None, lambda: os.mkfifo(fifo.path)):
        os.unlink(fifo.path)
        renew()
        fifo.open()
        with open(fifo.path, "wb", buffering=0) as writer:
            writer.write(b"0123456789abcdef" * 2)
        assert fifo.packets() == [b"0123456789abcdef"] * 2
        assert fifo.packets() == []
    fifo.close()


def test_files_are_replaced_whole_and_follow_no_link(tmp_path):
    module = load("clockspeed")
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "status.tmp").symlink_to(victim)
    etc_fd = os.open(str(tmp_path), os.O_RDONLY)
    module.replace_file(etc_fd, "status", b"new")
    assert victim.read_bytes() == b"precious" and module.read_file(etc_fd, "status") == b"new"
    assert sorted(os.listdir(str(tmp_path))) == ["status", "victim"]
    (tmp_path / "link").symlink_to(victim)
    with pytest.raises(OSError):
        module.read_file(etc_fd, "link")
    os.close(etc_fd)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root")
def test_clockspeed_becomes_the_user_and_keeps_no_more_than_it_needs():
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)  # pytest's own are root's alone
        os.mkdir(directory + "/home")
        check_the_user(Daemon(directory + "/home", "-n", "-u", "nobody"))


def check_the_user(process):
    with open("/proc/%d/status" % process.process.pid) as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    assert status["Uid"].split() == ["65534"] * 4 and status["NoNewPrivs"] == "1"
    assert not status["Groups"].strip()
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0, "observing needs none"
    process.write(CODES.pack(0))
    process.wait_for("mark: ")
    assert process.stop() == 0
    assert os.stat(process.home + "/etc/state").st_uid == os.stat(process.home + "/adjust").st_uid == 65534
    assert os.stat(process.home).st_uid == 0, "the programs beside it stay root's"


# ==== taiclockd ===================================================================================
VECTORS = [  # what is sent, how many bytes come back
    (b"ctai" + bytes(12) + bytes(range(16)), 32),
    (b"ctai" + bytes(16), 20),
    (b"ctai" + bytes(15), None),
    (b"ctai" + bytes(16) + bytes(range(256)) + bytes(28), 256),
    (b"ctai" + bytes(16) + bytes(range(236)), 256),
    (b"stai" + bytes(28), None),
    (b"Ctai" + bytes(28), None),
    (b"cta", None),
    (b"", None),
]
NO_CTYPES = ("import runpy, sys; sys.modules['ctypes'] = None; sys.argv = sys.argv[1:];"
             "runpy.run_path(sys.argv[0], run_name='__main__')")


class Taiclockd:
    """A server on a free port for the length of a `with`."""

    def __init__(self, *args, plain=False, prefix=(), **env):
        command = [sys.executable, "-c", NO_CTYPES] if plain else [*prefix]
        command += [path_of("taiclockd"), "-p", "0", *args]
        self.process = subprocess.Popen(command, env=dict(UTC_ENV, **env), stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        self.start = self.process.stdout.readline().decode()
        assert self.start.startswith("start: serving on "), self.process.stderr.read()
        self.ports = [int(port) for port in re.findall(r"port (\d+)", self.start)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.out, self.err = self.process.communicate(timeout=10)
        assert b"Traceback" not in self.err

    def client(self, host="127.0.0.1"):
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        sock.settimeout(10)
        sock.connect((host, self.ports[0]))
        return sock


def check_reply(query, reply, before_ns, after_ns, tai_utc=37):
    """The reply is the query with a label from between the two times."""
    assert len(reply) == min(len(query), 256)
    assert reply[:4] == b"stai" and reply[20:] == query[20:256]
    sec, nano, atto = struct.unpack(">QII", reply[4:20])
    label_ns = (sec - 2**62 - tai_utc) * 10**9 + nano
    assert before_ns <= label_ns <= after_ns and atto == 0


def ask_server(sock, query):
    before_ns = time.time_ns()
    sock.send(query)
    reply = sock.recv(65536)
    check_reply(query, reply, before_ns, time.time_ns())


@pytest.fixture(scope="module", params=["batches", "plain"])
def taiclockd(request):
    with Taiclockd(plain=request.param == "plain") as server:
        yield server


def test_taiclockd_answer_vectors():
    answer = load("taiclockd").answer
    label = bytes(range(100, 116))
    for query, size in VECTORS:
        assert answer(query, label) == (b"stai" + label + query[20:256] if size else None)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_taiclockd_answers_the_vectors(taiclockd, host):
    with taiclockd.client(host) as sock:
        for query, size in VECTORS:
            if size:
                ask_server(sock, query)
            else:
                sock.send(query)
        marker = b"ctai" + bytes(16) + b"the last"  # replies come in order: nothing else is on its way
        ask_server(sock, marker)
        sock.settimeout(0.2)
        with pytest.raises(socket.timeout):
            sock.recv(65536)


def plain_query(rng):
    return b"ctai" + bytes(12) + rng.getrandbits(128).to_bytes(16, "big")


def hostile_datagram(rng):
    """Mostly near misses: cut, lengthened, altered queries; a third are what clients send."""
    query = bytearray(plain_query(rng))
    way = rng.randrange(9)
    if way == 0:
        query = query[:rng.randrange(32)]
    elif way == 1:
        query += bytes(rng.randrange(1, 1400))
    elif way == 2:
        query[rng.randrange(4)] ^= 1 << rng.randrange(8)
    elif way == 3:
        query[:4] = b"stai"
    elif way == 4:
        query = bytearray(rng.getrandbits(8) for _ in range(rng.randrange(300)))
    elif way == 5:
        query[4:20] = bytes([rng.getrandbits(8)]) * 16
    return bytes(query)


def test_taiclockd_tells_10000_hostile_datagrams_apart(taiclockd):
    """Every query gets its own reply at its own sender, everything else gets none, in whatever mix."""
    rng = random.Random(SEED)
    socks = [taiclockd.client(rng.choice(["127.0.0.1", "::1"])) for _ in range(50)]
    for _ in range(100):
        sent = [(sock, hostile_datagram(rng)) for sock in socks for _ in range(2)]
        rng.shuffle(sent)
        expected = {sock: [] for sock in socks}
        before_ns = time.time_ns()
        for sock, datagram in sent:
            sock.send(datagram)
            if len(datagram) >= 20 and datagram[:4] == b"ctai":
                expected[sock].append(datagram)
        for sock in socks:
            last = b"ctai" + bytes(16) + rng.getrandbits(64).to_bytes(8, "big")
            sock.send(last)
            for query in expected[sock] + [last]:
                check_reply(query, sock.recv(65536), before_ns, time.time_ns())
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("args", [(), ("-i", "127.0.0.1", "-i", "::1")], ids=["one socket", "two"])
def test_taiclockd_answers_lone_datagrams_of_any_kind(args):
    """One at a time, over more than a second, with bursts in between: no reply is another's or old."""
    rng = random.Random(SEED)
    with Taiclockd(*args) as server, server.client() as sock, server.client() as other:
        end = time.monotonic() + 2.2
        while time.monotonic() < end:
            for _ in range(rng.choice([1, 5, 50])):
                query = hostile_datagram(rng)
                if len(query) >= 20 and query[:4] == b"ctai":
                    ask_server(sock, query)
                else:
                    sock.send(query)
            for _ in range(rng.choice([0, 1, 20])):  # nobody reads these replies
                other.send(hostile_datagram(rng))
            ask_server(sock, plain_query(rng))


def test_taiclockd_where_the_kernel_knows_no_recvmmsg():
    """Old kernels, and filters of system calls."""
    need("strace")
    with Taiclockd(prefix=["strace", "-D", "-o", "/dev/null", "-e", "inject=recvmmsg:error=ENOSYS"]) as server:
        with server.client() as sock:
            for _ in range(30):
                ask_server(sock, VECTORS[0][0])


def test_taiclockd_where_there_is_no_ipv6(monkeypatch):
    taiclockd = load("taiclockd")
    real = socket.socket

    def without(family, *args):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *args)
    monkeypatch.setattr(taiclockd.socket, "socket", without)
    sockets = taiclockd.open_sockets([], 0)
    assert [sock.getsockname()[0] for sock in sockets] == ["0.0.0.0"]
    with pytest.raises(OSError, match="not supported"):
        taiclockd.open_sockets(["::1"], 0)
    for sock in sockets:
        sock.close()


def test_taiclockd_serves_on_the_addresses_given():
    with Taiclockd("-i", "127.0.0.1", "-i", "::1") as server:
        assert server.start == "start: serving on 127.0.0.1 port %d, ::1 port %d\n" % (2 * (server.ports[0],))
        for host in ("127.0.0.1", "::1", "127.0.0.1"):
            with server.client(host) as sock:
                ask_server(sock, VECTORS[0][0])
        with server.client("127.0.0.2") as sock:
            with pytest.raises(ConnectionRefusedError):
                sock.send(VECTORS[0][0])
                sock.recv(256)


def start_with_descriptor(fd, count, **options):
    """taiclockd with that descriptor as its descriptor 3, as systemd passes a socket."""
    code = ("import os, sys; os.dup2(%d, 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='%s');"
            "os.execv(sys.argv[1], sys.argv[1:] + ['-p', '1'])" % (fd, count))
    return subprocess.Popen([sys.executable, "-c", code, path_of("taiclockd")], pass_fds=[fd], env=UTC_ENV,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_taiclockd_takes_inherited_sockets():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        process = start_with_descriptor(sock.fileno(), 1)
        try:
            port = sock.getsockname()[1]
            assert process.stdout.readline().decode() == "start: serving on 127.0.0.1 port %d\n" % port
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(10)
                client.connect(("127.0.0.1", port))
                ask_server(client, VECTORS[0][0])
        finally:
            process.terminate()
            process.communicate(timeout=10)


def test_taiclockd_refuses_inherited_descriptors_that_are_no_use():
    with open(os.devnull) as null, socket.socket() as tcp:
        for file, count, why in ((null, 1, "Socket operation on non-socket"), (null, "x", "invalid literal"),
                                 (tcp, 1, "descriptor 3 is not a UDP socket")):
            process = start_with_descriptor(file.fileno(), count)
            err = process.communicate(timeout=60)[1].decode()
            assert process.returncode == 111 and err.count("\n") == 1
            assert err.startswith("taiclockd: fatal: unable to take the sockets of LISTEN_FDS: " + why)


def test_taiclockd_says_what_it_could_not_bind():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        for args, place in ((["-i", "127.0.0.1"], "127.0.0.1"), ([], "::")):
            done = run("taiclockd", "-p", port, *args)
            assert done.returncode == 111 and done.stdout == b""
            assert done.stderr == ("taiclockd: fatal: unable to bind %s port %d: Address already in use\n"
                                   % (place, port))


@pytest.mark.parametrize("option, most", [("-p", 65535), ("-j", 1024)])
def test_taiclockd_says_which_numbers_it_takes(option, most):
    for value in (most + 1, -1, "x", "", "1_0"):
        done = run("taiclockd", option, value)
        assert (done.returncode, done.stdout) == (100, b"")
        assert done.stderr.endswith(" [-j workers]; %s takes a number from 0 to %d\n" % (option, most)), value


def test_taiclockd_term_ends_it_while_it_waits():
    for args in ((), ("-i", "127.0.0.1", "-i", "::1")):
        with Taiclockd(*args) as server:
            time.sleep(0.2)
            begin = time.monotonic()
            server.process.terminate()
            assert server.process.wait(timeout=10) == -signal.SIGTERM
            assert time.monotonic() - begin < 1


def stopped(server):
    """Let what is sent meanwhile come as a batch."""
    class Stopped:
        def __enter__(self):
            server.process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)

        def __exit__(self, *_):
            server.process.send_signal(signal.SIGCONT)
    return Stopped()


def test_taiclockd_answers_each_of_a_batch():
    """Plain batches, odd ones and plain ones again, of all sizes: each reply is that of its own query."""
    rng = random.Random(SEED)
    with Taiclockd() as server:
        socks = [server.client(rng.choice(["127.0.0.1", "::1"])) for _ in range(100)]
        for round in range(30):
            size = rng.choice([1, 2, 63, 64, 65, 100])
            queries = [hostile_datagram(rng) if round % 3 == 1 else plain_query(rng) for _ in range(size)]
            with stopped(server):
                for sock, query in zip(socks, queries):
                    sock.send(query)
                resumed_ns = time.time_ns()
            for sock, query in zip(socks, queries):
                if len(query) >= 20 and query[:4] == b"ctai":
                    check_reply(query, sock.recv(65536), resumed_ns, time.time_ns())
        for sock in socks:
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(256)
            sock.close()


def test_taiclockd_drops_only_the_reply_that_can_not_be_sent():
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    except PermissionError:
        pytest.skip("not root: no raw socket")
    for place in (0, 5, 9):
        with Taiclockd() as server, raw.dup() as sender:
            socks = [server.client() for _ in range(10)]
            with stopped(server):
                for number, sock in enumerate(socks):
                    if number == place:  # from port 0, to which nothing can be sent
                        header = struct.pack(">4H", 0, server.ports[0], 40, 0)
                        sender.sendto(header + VECTORS[0][0], ("127.0.0.1", 0))
                    sock.send(VECTORS[0][0])
            for sock in socks:
                assert sock.recv(256)[20:] == VECTORS[0][0][20:]
                sock.close()
    raw.close()


FLOOD_SEC = 60 if os.environ.get("CI") else 4  # at what one process can send, an hour of thousands per second


def flood(server, sec, payloads):
    """As much as one process can send."""
    with server.client() as sock:
        end, sent = time.monotonic() + sec, 0
        while time.monotonic() < end:
            for payload in payloads:
                sock.send(payload)
            sent += len(payloads)
    return sent


def resident_kb(pid):
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))


@pytest.mark.parametrize("plain", [False, True])
def test_taiclockd_does_not_grow_under_a_flood_and_term_ends_it(plain):
    rng = random.Random(SEED)
    payloads = [hostile_datagram(rng) for _ in range(1000)]
    with Taiclockd(plain=plain) as server:
        flood(server, 0.5, payloads)
        before_kb = resident_kb(server.process.pid)
        for _ in range(FLOOD_SEC):
            flood(server, 1, payloads)
            assert resident_kb(server.process.pid) <= before_kb + 64
        with stopped(server):
            flood(server, 0.1, payloads)  # so that its queue is full
            begin = time.monotonic()
            server.process.terminate()
        server.process.wait(timeout=10)
        assert time.monotonic() - begin < 1


def test_taiclockd_workers_share_the_port_and_end_together():
    def alive(pids):
        return [pid for pid in pids if os.path.exists("/proc/%d" % pid)
                and " (zombie)" not in open("/proc/%d/status" % pid).read()]

    def gone(pids):
        end = time.monotonic() + 5
        while alive(pids) and time.monotonic() < end:
            time.sleep(0.01)
        return not alive(pids)

    for end_it, status in ((lambda parent, workers: os.kill(parent, signal.SIGTERM), 0),
                           (lambda parent, workers: os.kill(workers[0], signal.SIGKILL), 111),
                           (lambda parent, workers: os.kill(parent, signal.SIGKILL), -signal.SIGKILL)):
        with Taiclockd("-j", "3") as server:
            for _ in range(50):  # of as many ports, so that each worker gets some
                with server.client() as sock:
                    ask_server(sock, VECTORS[0][0])
            with open("/proc/%d/task/%d/children" % (2 * (server.process.pid,))) as file:
                workers = [int(pid) for pid in file.read().split()]
            assert len(workers) == 3
            for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGHUP):  # no reason to end
                os.kill(workers[0], number)
            other = run("taiclockd", "-j", "3", "-p", server.ports[0])
            assert other.returncode == 111 and "Address already in use" in other.stderr
            end_it(server.process.pid, workers)
            assert server.process.wait(timeout=10) == status
            assert gone(workers)
        assert (b"taiclockd: fatal: a worker died\n" in server.err) == (status == 111)


class FakeClock:
    """A kernel that inserts (step_sec 1) or leaves out (-1) the second before leap_sec; a tick late, as
    kernels are."""

    def __init__(self, leap_sec, step_sec, tick_late_ns=4 * 10**6):
        self.leap_ns, self.step_ns, self.late_ns = leap_sec * 10**9, step_sec * 10**9, tick_late_ns
        self.elapsed_ns = self.leap_ns - 5 * 10**9  # counts every second
        self.armed, self.tai = 0, 0

    def leapt(self, late_ns):
        return self.elapsed_ns >= self.leap_ns - max(-self.step_ns, 0) + late_ns

    def now_ns(self):
        return self.elapsed_ns - (self.step_ns if self.leapt(self.late_ns) else 0)

    def kernel(self):  # adjtimex(2) corrects what the clock shows before the late tick
        clock_ns = self.elapsed_ns - (self.step_ns if self.leapt(0) else 0)
        state = 3 if self.leapt(0) and clock_ns < self.leap_ns else 0
        status = 0x2000 | (self.armed and (0x10 if self.step_ns > 0 else 0x20))
        tai = self.tai and self.tai + (self.step_ns // 10**9 if self.leapt(0) else 0)
        return dict(state=state, status=status, sec=clock_ns // 10**9, frac=clock_ns % 10**9, tai=tai)


@pytest.mark.parametrize("step_sec", [1, -1])
def test_taiclockd_labels_run_through_a_leap_second(step_sec, monkeypatch, tmp_path):
    leap_day = 30000  # in 2052
    table = ["2272060800 10"] + ["%d %d" % (2208988800 + 86400 * day, 11 + n)
                                 for n, day in enumerate(load("taiclockd").LEAP_DAYS)]
    table.append("%d %d" % (2208988800 + 86400 * leap_day, 37 + step_sec))
    (tmp_path / "list").write_text("\n".join(table))
    monkeypatch.setenv("LEAPSECS", str(tmp_path / "list"))
    monkeypatch.setenv("CLOCK_SCALE", "utc")
    fake = FakeClock(leap_day * 86400, step_sec)
    clock = load("taiclockd").Clock(now_ns=fake.now_ns, kernel=fake.kernel)
    begin_ns, steps = fake.elapsed_ns, 0
    while fake.elapsed_ns < begin_ns + 10 * 10**9:
        sec, nano, _ = struct.unpack(">QII", clock.label())
        assert (sec - 2**62) * 10**9 + nano == fake.elapsed_ns + 37 * 10**9
        fake.elapsed_ns += 1234567
        steps += 1
    assert steps > 8000


LABEL_ZERO_NS = 2**62 * 10**9


def label_ns(clock):
    sec, nano, _ = struct.unpack(">QII", clock.label())
    return sec * 10**9 + nano - LABEL_ZERO_NS


@pytest.mark.parametrize("armed_sec", [6000, 30])
@pytest.mark.parametrize("step_sec", [1, -1])
def test_taiclockd_labels_run_through_a_leap_second_that_only_the_kernel_knows(
        step_sec, armed_sec, monkeypatch):
    """As when the time servers announced it to clockspeed: no table has it."""
    monkeypatch.setenv("CLOCK_SCALE", "utc")
    monkeypatch.setenv("LEAPSECS", "")
    module = load("taiclockd")
    monkeypatch.setattr(module, "LEAP_FILES", ())
    fake = FakeClock(29952 * 86400, step_sec)  # 2052-01-03: no day for one
    fake.armed, fake.tai = 1, 37
    clock = module.Clock(now_ns=fake.now_ns, kernel=fake.kernel)
    clock.label()
    assert clock.heard == []
    fake = FakeClock(calendar.timegm((2052, 7, 1, 0, 0, 0)), step_sec)
    fake.elapsed_ns -= 7200 * 10**9
    clock = module.Clock(now_ns=fake.now_ns, kernel=fake.kernel)
    while fake.elapsed_ns < fake.leap_ns + 7200 * 10**9:
        fake.armed = -armed_sec * 10**9 < fake.elapsed_ns - fake.leap_ns < 60 * 10**9
        fake.tai = 37
        assert label_ns(clock) == fake.elapsed_ns + 37 * 10**9
        near = abs(fake.elapsed_ns - fake.leap_ns) < 4 * 10**9
        fake.elapsed_ns += 1234567 if near else 1234567891
    later = module.Clock(now_ns=fake.now_ns, kernel=fake.kernel)
    behind_ns = fake.elapsed_ns + 37 * 10**9 - label_ns(later)
    assert behind_ns == (0 if step_sec > 0 else -10**9), "of a second less no later start hears"


def test_taiclockd_forgets_a_leap_second_that_was_taken_back(monkeypatch):
    monkeypatch.setenv("CLOCK_SCALE", "utc")
    monkeypatch.setenv("LEAPSECS", "")
    module = load("taiclockd")
    monkeypatch.setattr(module, "LEAP_FILES", ())
    fake = FakeClock(calendar.timegm((2052, 7, 1, 0, 0, 0)), 0)
    fake.step_ns = 1  # armed for a second more, which does not come
    fake.elapsed_ns -= 7200 * 10**9
    clock = module.Clock(now_ns=fake.now_ns, kernel=lambda: dict(fake.kernel(), state=0, tai=37))
    fake.armed = 1
    assert label_ns(clock) == fake.elapsed_ns + 37 * 10**9 and clock.heard
    fake.armed = 0
    fake.elapsed_ns += 3600 * 10**9
    assert label_ns(clock) == fake.elapsed_ns + 37 * 10**9 and not clock.heard
    fake.step_ns = 0
    fake.elapsed_ns += 7200 * 10**9
    assert label_ns(clock) == fake.elapsed_ns + 37 * 10**9


def test_taiclockd_label_on_both_scales(monkeypatch):
    for scale, seconds in (("utc", "400000006b0cc925"), ("tai", "400000006b0cc90a")):
        monkeypatch.setenv("CLOCK_SCALE", scale)
        clock = load("taiclockd").Clock(now_ns=lambda: 1796000000 * 10**9 + 5)
        assert clock.label().hex() == seconds + "00000005" + "00000000"


def test_taiclockd_says_once_that_its_clock_is_not_to_be_trusted(monkeypatch, capfd):
    monkeypatch.setenv("CLOCK_SCALE", "utc")
    now, status = [10**9], [0x40]
    clock = load("taiclockd").Clock(True, now_ns=lambda: now[0], kernel=lambda: dict(status=status[0], tai=37))
    for now[0] in (10**9, 5 * 10**9, 1795305599 * 10**9):
        assert clock.label() is None
    out = capfd.readouterr().out
    assert out == "silent: the clock was never set, it shows a time before this program's release\n"
    now[0] = 1795305600 * 10**9
    assert clock.label() is None  # still so by the kernel
    status[0] = 0
    now[0] += 10**9
    assert clock.label()
    assert capfd.readouterr().out == "answering: the clock is to be trusted now\n"
    status[0] = 0x40
    now[0] += 10**9
    assert clock.label() is None
    assert capfd.readouterr().out == "silent: the kernel does not take its clock for synchronized\n"


def test_taiclockd_keeps_silent_while_unsynchronized():
    """By a kernel that does not tell at all, as without ctypes."""
    with Taiclockd(plain=True, CLOCK_SERVE="synced") as server:
        line = server.process.stdout.readline()
        assert line == b"silent: the kernel does not take its clock for synchronized\n"
        with server.client() as sock:
            sock.settimeout(0.2)
            for _ in range(3):
                sock.send(VECTORS[0][0])
            with pytest.raises(socket.timeout):
                sock.recv(256)
    assert server.out == b""
    done = run("taiclockd", "-p", "0", CLOCK_SERVE="sync")
    assert done.returncode == 111
    assert done.stderr == "taiclockd: fatal: unable to obey CLOCK_SERVE: it is neither synced nor empty\n"


def test_taiclockd_reads_a_changed_leap_table_on_hup(tmp_path):
    table = tmp_path / "list"
    table.write_text("2272060800 10\n3692217600 11\n")
    with Taiclockd(LEAPSECS=str(table)) as server:
        with server.client() as sock:
            for rows in ("3692217600 11\n3723753600 12\n", "3692217600 12\n"):  # the second are damaged
                table.write_text("2272060800 10\n" + rows)
                server.process.send_signal(signal.SIGHUP)
                time.sleep(0.2)
                before_ns = time.time_ns()
                sock.send(VECTORS[0][0])
                check_reply(VECTORS[0][0], sock.recv(256), before_ns, time.time_ns(), 12)
    assert server.err.decode() == ("taiclockd: warning: unable to read leap seconds: "
                                   "leap second table %s is damaged\n" % table)


def test_taiclockd_tells_its_counts_once_an_hour_for_all_workers(capfd):
    now = [0]
    tally = load("taiclockd").Tally(2, lambda: now[0])
    tally.add(64, 60, 50)
    tally.take(1)
    tally.add(1, 1, 1)
    tally.tell()
    assert capfd.readouterr().out == ""
    now[0] = 3600 * 10**9
    tally.tell()
    tally.tell()
    assert capfd.readouterr().out == "count: 51 answered, 4 odd, 10 refused\n"
    tally.add(2, 2, 2)
    now[0] = 7200 * 10**9
    tally.tell()
    assert capfd.readouterr().out == "count: 2 answered, 0 odd, 0 refused\n"
    now[0] = 10800 * 10**9
    tally.tell()
    assert capfd.readouterr().out == ""


# ==== measurement: sntpclock, taiclock ==============================================================
SNTP, TAI = load("sntpclock"), load("taiclock")
LEAP_TABLE = tempfile.NamedTemporaryFile()  # unlike the system's it never expires
for count, day in enumerate(TAI.LEAP_DAYS):
    LEAP_TABLE.write(struct.pack(">Q", 2**62 + 10 + count + day * 86400))
LEAP_TABLE.flush()
QUIET_ENV = {"LEAPSECS": LEAP_TABLE.name}
NTP_NOW_SEC = 1795305600 + 5 * 86400
MOST_IDLE_ERROR_NS = 100 * 10**3  # on a machine shared with other tests; bench_all.py shows the real figure


class Rogue:
    """A server in a thread: answer(query, n) -> the datagrams to send back for the nth query it gets."""

    def __init__(self, answer, address="127.0.0.1", port=0):
        self.answer, self.queries = answer, []
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, port))
        self.port = self.socket.getsockname()[1]

    def serve(self):
        while True:
            query, self.client = self.socket.recvfrom(2048)
            if not query:
                return
            self.queries.append(query)
            for packet in self.answer(query, len(self.queries)):
                try:
                    self.socket.sendto(packet, self.client)
                except OSError:  # it asks no more
                    pass

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        with socket.socket(self.socket.family, socket.SOCK_DGRAM) as stop:
            stop.sendto(b"", self.socket.getsockname())
        self.thread.join()
        self.socket.close()


def ntp_stamp(unix_ns):
    sec, nano = divmod(unix_ns, 10**9)
    return (sec + 2208988800) % 2**32 << 32 | (nano << 32) // 10**9


def ntp_answer(query, off_ns=0, **fields):
    """A correct answer, or one with wrong fields."""
    now = ntp_stamp(time.time_ns() + off_ns)
    values = dict(flags=4 << 3 | 4, stratum=1, poll=0, precision=-25, delay=0, dispersion=0, refid=b"TEST",
                  reference=now, originate=struct.unpack(">Q", query[40:48])[0], receive=now, transmit=now)
    assert set(fields) <= set(values)
    return SNTP.NTP.pack(*dict(values, **fields).values())


def tai_answer(query, off_ns=0, **fields):
    """The same for TAICLOCK, of a server on the utc scale."""
    label = TAI.pack((TAI.to_tai(time.time_ns() + off_ns, TAI_ROWS) + 2**62 * 10**9) * 10**9)
    return fields.get("head", b"stai") + fields.get("label", label) + fields.get("rest", query[20:])


TAI_ROWS = [TAI.BEFORE_LEAPS] + [(day * 86400, 11 + n) for n, day in enumerate(TAI.LEAP_DAYS)]
DECODE = {"sntpclock": lambda query, packet: SNTP.decode_answer(query, packet, NTP_NOW_SEC),
          "taiclock": TAI.decode_answer}
PROTOCOLS = [("sntpclock", ntp_answer), ("taiclock", tai_answer)]
both = pytest.mark.parametrize("name, answer", PROTOCOLS, ids=["sntpclock", "taiclock"])


def ask(name, port, *args, hosts=("127.0.0.1",), **env):
    return run(name, "-p", port, *args, *hosts, **dict(QUIET_ENV, **env))


def offset_ns(done):
    """What came out, in ns."""
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 16
    return SNTP.unpack(done.stdout) / 10**9


def result_of(done):
    """-> (offset, bound) in ns as `-v 2` shows it."""
    offset, bound = re.search(r"info: result: offset ([-+]\S+) s, bound (\S+) s", done.stderr).groups()
    return float(offset) * 1e9, float(bound) * 1e9


class Chronyd:
    """A real one on a free port, which does not touch the clock."""

    def __init__(self, home, *lines):
        need("chronyd")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        conf = home / "chrony.conf"
        lines = lines or ("local stratum 1",)
        conf.write_text("port %d\ncmdport 0\nbindcmdaddress /\nuser root\nallow\npidfile %s\n%s\n"
                        % (self.port, home / "chronyd.pid", "\n".join(lines)))
        self.command = ["chronyd", "-x", "-d", "-f", str(conf)]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.settimeout(0.1)
            probe.connect(("127.0.0.1", self.port))
            for _ in range(100):
                try:
                    probe.send(SNTP.make_query())
                    probe.recv(100)
                    return self
                except OSError:
                    time.sleep(0.05)
        self.__exit__()
        pytest.fail("chronyd does not answer: %s" % self.process.stdout.read().decode())

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


@pytest.mark.parametrize("scale", ["utc", "tai"])
@both
def test_the_result_is_the_servers_offset(name, answer, scale):
    # On the tai scale this clock, which shows UTC, is 27 s slow: what it shows is taken for TAI - 10.
    missing_ns = 27 * 10**9 if scale == "tai" else 0
    for off_ns in 0, 123456789, -3 * 3600 * 10**9 - 5:
        with Rogue(lambda query, n: [answer(query, off_ns)]) as server:
            done = ask(name, server.port, "-v", 2, CLOCK_SCALE=scale)
        assert abs(offset_ns(done) - off_ns - missing_ns) <= result_of(done)[1] + 1
        assert result_of(done)[1] < 50 * 10**6
        assert len(server.queries) == 10
        assert len(set(server.queries)) == 10, "a cookie came twice"


@both
def test_exchanges_and_pause(name, answer):
    with Rogue(lambda query, n: [answer(query)]) as server:
        began = time.monotonic()
        offset_ns(ask(name, server.port, "-r", 3, "-h", 200))
        assert time.monotonic() - began >= 0.4
    assert len(server.queries) == 3


@both
def test_ipv6_and_a_name(name, answer):
    with Rogue(lambda query, n: [answer(query, 10**9)], "::1") as server:
        assert abs(offset_ns(ask(name, server.port, hosts=["::1"])) - 10**9) < 50 * 10**6
        assert abs(offset_ns(ask(name, server.port, "-6", hosts=["::1%1"])) - 10**9) < 50 * 10**6
    with Rogue(lambda query, n: [answer(query, 10**9)]) as server:
        assert abs(offset_ns(ask(name, server.port, "-4", hosts=["localhost"])) - 10**9) < 50 * 10**6
        assert abs(offset_ns(ask(name, server.port, hosts=["0"])) - 10**9) < 50 * 10**6


@both
def test_no_server_is_a_quick_111_with_a_warning_for_each_exchange(name, answer):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = ask(name, port, "-r", 2, timeout=20)
    assert (done.returncode, done.stdout) == (111, b"")
    assert done.stderr == (
        2 * "{0}: warning: unable to ask 127.0.0.1: Connection refused\n" +
        "{0}: fatal: unable to get the time from 127.0.0.1: time uncertainty too large\n").format(name)
    hosts = ["127.0.0.1", "127.0.0.2"]  # each has its own
    assert ask(name, port, "-r", 1, hosts=hosts).stderr.count("Connection refused\n") == 2
    assert ask(name, port, "-v", 0, "-r", 2).stderr.count("\n") == 1


@both
def test_a_silent_server_costs_its_timeouts_only(name, answer):
    with Rogue(lambda query, n: []) as server:
        began = time.monotonic()
        done = ask(name, server.port, "-r", 3, "-t", 100)
        assert 0.3 <= time.monotonic() - began < 3
        assert done.returncode == 111 and done.stdout == b"" and done.stderr.count("timed out") == 3
        began = time.monotonic()
        done = ask(name, server.port, "-r", 1000, "-t", 100, "-T", 400)
        assert 0.4 <= time.monotonic() - began < 3


@both
def test_a_name_that_is_none(name, answer):
    done = ask(name, 1, hosts=["no-such-host.invalid"])
    assert done.returncode == 111
    assert done.stderr.startswith("%s: fatal: unable to find no-such-host.invalid: " % name)
    assert done.stderr.count("\n") == 1


@both
def test_wrong_usage(name, answer):
    for line in "", "-r 0 0", "-r x 0", "-p 65536 0", "-e nan 0", "-t inf 0", "-l -1 0", "-p 0 0":
        args = line.split()
        done = run(name, *args)
        assert done.returncode == 100 and done.stderr.startswith("%s: usage: " % name), args


@both
def test_two_days_off_is_refused_and_f_and_l_override(name, answer):
    off_ns = -2 * 86400 * 10**9 - 10**9
    with Rogue(lambda query, n: [answer(query, off_ns)]) as server:
        done = ask(name, server.port)
        assert done.returncode == 111 and done.stdout == b"" and "2.0 days away" in done.stderr
        for args in ("-f",), ("-l", 3), ("-l", 0):
            assert abs(offset_ns(ask(name, server.port, *args)) - off_ns) < 50 * 10**6


@both
def test_e_limits_the_uncertainty_and_f_overrides(name, answer):
    def slow(query, n):
        time.sleep(0.02)
        return [answer(query)]
    with Rogue(slow) as server:
        done = ask(name, server.port, "-r", 2, "-e", 5)
        assert done.returncode == 111 and done.stdout == b"" and "time uncertainty too large" in done.stderr
        offset_ns(ask(name, server.port, "-r", 2, "-e", 5, "-f"))
        offset_ns(ask(name, server.port, "-r", 2, "-e", 500))


@both
def test_answers_that_are_late_doubled_forged_or_from_elsewhere_do_not_count(name, answer):
    lie_ns = 3600 * 10**9
    kept = []

    def late(query, n):  # each query is answered, with a lie, only after the next one has come
        kept.append(query)
        return [answer(kept[-2], lie_ns)] if n > 1 else []
    with Rogue(late) as server:
        done = ask(name, server.port, "-r", 3, "-t", 100)
        assert done.returncode == 111 and done.stderr.count("timed out") == 3

    def doubled(query, n):
        return [answer(query), answer(query, lie_ns), answer(query, lie_ns)]
    with Rogue(doubled) as server:
        done = ask(name, server.port)
        assert abs(offset_ns(done)) < 50 * 10**6 and done.stderr == ""

    def forged(query, n):
        return [answer(os.urandom(len(query)), lie_ns), query, b"", b"x", answer(query)[:-1], answer(query)]
    with Rogue(forged) as server:
        done = ask(name, server.port, "-v", 2)
        assert abs(offset_ns(done)) < 50 * 10**6
        assert "warning" not in done.stderr

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as elsewhere:
        def from_elsewhere(query, n):
            elsewhere.sendto(answer(query, lie_ns), server.client)
            return [answer(query)]
        with Rogue(from_elsewhere) as server:
            assert abs(offset_ns(ask(name, server.port))) < 50 * 10**6


@both
def test_a_lost_exchange_is_a_warning(name, answer):
    with Rogue(lambda query, n: [answer(query)] if n != 2 else []) as server:
        done = ask(name, server.port, "-r", 3, "-t", 200)
    assert abs(offset_ns(done)) < 50 * 10**6
    assert done.stderr == "%s: warning: unable to ask 127.0.0.1: timed out\n" % name


@both
def test_several_servers_are_asked_at_once_and_falsetickers_are_named(name, answer):
    """On three addresses of loopback, with one port."""
    def lying(query, n):
        time.sleep(0.1)
        return [answer(query, 10**9)]

    def honest(query, n):
        time.sleep(0.1)
        return [answer(query)]
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    with Rogue(honest) as one:
        with Rogue(lying, hosts[1], one.port), Rogue(honest, hosts[2], one.port):
            began = time.monotonic()
            done = ask(name, one.port, "-r", 5, "-v", 2, hosts=hosts)
            assert time.monotonic() - began < 1.4, "three servers of 0.5 s each, one after the other"
            assert abs(offset_ns(done)) < 200 * 10**6
            warnings = [line for line in done.stderr.splitlines() if "warning" in line]
            assert len(warnings) == 1 and "127.0.0.2 is a falseticker: offset +1.0" in warnings[0]
            done = ask(name, one.port, hosts=hosts[:2])
            assert (done.returncode, done.stdout) == (111, b"")
            assert done.stderr.endswith("no majority of the servers agrees\n")
            # A server that is dead has no vote, and one asked under two names has but one.
            done = ask(name, one.port, "-t", 300, "-r", 1, hosts=["127.0.0.1", "127.0.0.4"])
            assert abs(offset_ns(done)) < 200 * 10**6 and "127.0.0.4" in done.stderr
            done = ask(name, one.port, hosts=["127.0.0.2", "127.0.0.1", "0", "localhost"])
            assert done.returncode == 111


@both
def test_a_silent_server_costs_one_timeout_when_another_answers(name, answer):
    with Rogue(lambda query, n: [answer(query)]) as server, \
            Rogue(lambda query, n: [], "::1", server.port) as silent:
        began = time.monotonic()
        done = ask(name, server.port, "-t", 500, hosts=["::1", "127.0.0.1"])
        assert time.monotonic() - began < 2.5 and abs(offset_ns(done)) < 50 * 10**6
        assert done.stderr == "%s: warning: unable to ask ::1: timed out\n" % name
        assert len(silent.queries) == 1
    # Where it is the only one, each exchange is tried; so is each of one that did answer once.
    with Rogue(lambda query, n: []) as silent:
        ask(name, silent.port, "-t", 50, "-r", 3)
        assert len(silent.queries) == 3


@both
def test_ctrl_c_ends_it_without_a_traceback(name, answer):
    with Rogue(lambda query, n: []) as server:
        client = subprocess.Popen([path_of(name), "-p", str(server.port), "0"], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, env=dict(UTC_ENV, **QUIET_ENV))
        while not server.queries:
            time.sleep(0.01)
        client.send_signal(signal.SIGINT)
        assert client.communicate() == (b"", b"") and client.returncode == 111


@both
def test_hostile_datagrams_at_the_decoder(name, answer):
    """Whatever comes, it is ignored, refused with a reason, or an Answer whose range is no lie by itself."""
    module, chance = load(name), random.Random(SEED)
    kinds = dict.fromkeys(("ignored", "refused", "taken"), 0)
    for _ in range(10000):
        query = module.make_query()
        packet = bytearray(answer(query))
        for _ in range(chance.choice((0, 1, 2, 5, 50))):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        packet = bytes(packet[:chance.choice((len(packet), chance.randrange(80)))]) \
            + chance.choice((b"", b"", bytes(chance.randrange(400))))
        try:
            found = DECODE[name](query, packet)
            kinds["taken" if found else "ignored"] += 1
            assert found is None or found.received_ns <= found.sent_ns + 1
        except (ValueError, SNTP.Dismissed) as err:
            kinds["refused"] += 1
            assert str(err)
    assert min(kinds.values()) > 100, kinds


NO_FILTER = "def admit_only_answers(sock, query):\n    pass"


@pytest.mark.parametrize("kernel_filters", [True, False])
@both
def test_hostile_datagrams_through_sockets(name, answer, kernel_filters, tmp_path):
    path = path_of(name) if kernel_filters else patched(name, NO_FILTER, tmp_path)
    chance = random.Random(SEED)

    def hostile(query, n):
        packets = []
        for _ in range(50):  # more would not fit into the socket's buffer
            packet = bytearray(answer(query, 10**9))
            packet[chance.randrange(24, 32)] ^= chance.randrange(1, 256)  # the cookie of either protocol
            cut = chance.choice((32, 48, chance.randrange(48)))
            packets.append(bytes(packet[:cut]) + bytes(chance.randrange(900)))
        right = answer(query)  # which zeros may repeat by chance
        return [packet for packet in packets if packet[24:32] != right[24:32]] + [right]
    with Rogue(hostile) as server:
        done = ask(path, server.port, "-r", 100)
        assert abs(offset_ns(done)) < 500 * 10**6 and done.stderr == ""
        assert len(server.queries) == 100


@both
def test_combine_and_agreement(name, answer):
    module = load(name)
    assert module.combine([(0, 10), (5, 20), (-5, 8)]) == (5, 8, True)
    # An empty intersection: the exchanges of least delay (10 and 12 long), and all that they allow.
    assert module.combine([(0, 10), (20, 32), (1000, 1100)]) == (0, 32, False)
    assert module.combine([(0, 10), (7, 3)]) == (0, 10, False)  # it took the server longer than the exchange
    with pytest.raises(ValueError):
        module.combine([(7, 3)])
    assert module.agreement([(0, 10)]) == (0, 10, 1)
    assert module.agreement([(0, 10), (5, 20), (50, 60)]) == (5, 10, 2)
    assert module.agreement([(0, 10), (20, 30)]) == (0, 30, 1)
    assert module.agreement([(0, 30), (5, 10), (20, 25)]) == (5, 25, 2)  # either of two may be right


@pytest.mark.parametrize("ppm", [500, -500, 5000, -80000, 100])
@both
def test_a_slew_during_the_measurement_is_corrected(name, answer, ppm):
    """Four exchanges of 20 ms, 2 s apart, while the clock is slewed: the bound holds at the end."""
    module, chance = load(name), random.Random(SEED)
    for _ in range(50):
        offset = chance.randrange(-10**9, 10**9)  # real - clock at the beginning

        def clocks(real_ns):
            return real_ns - offset + (real_ns - 10**18) * ppm // 10**6, real_ns + 7  # the counter is true
        ranges, counter_ppm = [], chance.uniform(-50, 50)

        def read(real_ns):
            clock_ns, ticks = clocks(real_ns)
            return clock_ns, ticks + int((real_ns - 10**18) * counter_ppm / 10**6)
        end = read(10**18 + 6100 * 10**6)
        for start in range(4):
            real_ns = 10**18 + start * 2 * 10**9
            exchange = module.Exchange(b"", read(real_ns))
            there_ns = real_ns + chance.randrange(20 * 10**6)
            exchange.received = read(real_ns + 20 * 10**6)
            exchange.answer = module.Answer(there_ns, there_ns, 0, "")
            ranges.append(module.offset_range(exchange, end, lambda clock_ns: clock_ns))
        least, most, agree = module.combine(ranges)
        true_ns = 10**18 + 6100 * 10**6 - end[0]
        assert agree and least <= true_ns <= most
        assert most - least < 21 * 10**6


@both
def test_a_step_of_the_clock_during_the_measurement_is_corrected(name, answer):
    """Through real sockets, with a clock that somebody sets back by a second after the second exchange."""
    module = load(name)
    settings = module.Settings(["-p", "1", "-r", "4", "0"], 1)
    stepped = []

    def clocks():
        clock_ns, ticks = module.read_clocks()
        return clock_ns - (10**9 if stepped else 0), ticks
    module.enable_kernel_stamps = lambda sock: None  # those would be of the real clock

    def reply(query, n):
        stepped.extend([n] * (n == 3))
        return [answer(query)]
    with Rogue(reply) as server:
        settings.port = server.port
        servers = module.find_servers(["0"], settings)
        end = module.ask(servers, settings, module.make_query, DECODE[name], clocks)
    rows = [(-2**63, 0)] if name == "sntpclock" else TAI_ROWS
    least, most = module.conclude(servers, settings, end, lambda clock_ns: module.to_tai(clock_ns, rows))
    assert least <= 10**9 <= most


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernel stamps are Linux's")
@both
def test_kernel_stamps_are_paired_with_their_exchange(name, answer):
    """Each exchange has both, they lie between our own, and those of leaving all differ."""
    module = load(name)
    with Rogue(lambda query, n: [answer(query), answer(query)] if n != 3 else []) as server:
        settings = module.Settings(["-p", str(server.port), "-r", "6", "-t", "100", "0"], 1)
        servers = module.find_servers(["0"], settings)
        module.ask(servers, settings, module.make_query, DECODE[name])
    exchanges = servers[0].exchanges
    assert len(exchanges) == 5
    for exchange in exchanges:
        assert exchange.sent[0] <= exchange.kernel_sent <= exchange.kernel_received <= exchange.received[0]
        assert [stamp for stamp, _ in exchange.stamps()] == [exchange.kernel_sent, exchange.kernel_received]
    assert len({exchange.kernel_sent for exchange in exchanges}) == 5
    assert len({exchange.kernel_received for exchange in exchanges}) == 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernel stamps are Linux's")
@both
def test_kernel_stamps_that_come_late_find_their_exchange(name, answer):
    """Two exchanges are over when the stamps of their queries come, the second's first, one of them twice."""
    module = load(name)
    settings = module.Settings(["127.0.0.1"], 1)
    server, = module.find_servers(settings.hosts, settings)
    server.exchanges = [module.Exchange(module.make_query(), (0, 0)) for _ in range(2)]
    server.current = module.Exchange(module.make_query(), (0, 0))

    class ErrorQueue:
        waiting = [(server.exchanges[1].query, 7), (server.exchanges[0].query, 5), (os.urandom(48), 1),
                   (server.exchanges[0].query, 6)]

        def recvmsg(self, size, ancillary_size, flags):
            assert flags == socket.MSG_ERRQUEUE
            if not self.waiting:
                raise BlockingIOError
            query, nano = self.waiting.pop(0)
            stamp = module.TIMESPEC.pack(1, nano) + bytes(2 * module.TIMESPEC.size)
            beside = [(socket.IPPROTO_IP, 11, b"?" * 32), (socket.SOL_SOCKET, 37, stamp)]
            return b"headers" + query, beside, 0, None
    server.socket = ErrorQueue()
    server.collect_sent_stamps()
    stamps = [exchange.kernel_sent for exchange in server.exchanges + [server.current]]
    assert stamps == [10**9 + 5, 10**9 + 7, None]


@both
def test_what_arrives_after_the_stamp_is_left_for_the_next_time(name, answer):
    """poll() told of a stamp or an error only; a packet that is there by now came after we read the clock."""
    module = load(name)
    settings = module.Settings(["127.0.0.1"], 1)
    with Rogue(lambda query, n: [answer(query)]) as rogue:
        settings.port = rogue.port
        server, = module.find_servers(settings.hosts, settings)
        server.connect()
        server.act(module.make_query, module.read_clocks, time.monotonic_ns() + 10**10)
        poller = select.poll()
        poller.register(server.socket, select.POLLIN)
        assert await_that(lambda: any(events & select.POLLIN for _, events in poller.poll(100)))
        server.receive(select.POLLERR, module.read_clocks(), DECODE[name])
        assert not server.exchanges and server.current
        server.receive(select.POLLIN | select.POLLERR, module.read_clocks(), DECODE[name])
        assert len(server.exchanges) == 1 and not server.current
        server.socket.close()


@both
def test_a_kernel_stamp_counts_only_between_our_own(name, answer):
    exchange = load(name).Exchange(b"", (1000, 50))
    exchange.received = (3000, 2050)
    assert exchange.stamps() == ((1000, 50), (3000, 2050))
    exchange.kernel_sent, exchange.kernel_received = 1500, 2500
    assert exchange.stamps() == ((1500, 550), (2500, 1550))
    exchange.kernel_sent, exchange.kernel_received = 999, 3001
    assert exchange.stamps() == ((1000, 50), (3000, 2050))


@both
def test_public_addresses_are_spared(name, answer):
    module = load(name)
    for near in "10.1.2.3", "127.9.9.9", "169.254.1.1", "172.16.0.1", "172.31.255.255", "192.168.7.7":
        assert module.is_near(socket.AF_INET, near)
        assert module.is_near(socket.AF_INET6, "::ffff:" + near)
    for far in "9.9.9.9", "172.15.0.1", "172.32.0.1", "192.167.0.1", "169.253.0.1", "128.0.0.1", "11.0.0.0":
        assert not module.is_near(socket.AF_INET, far)
        assert not module.is_near(socket.AF_INET6, "::ffff:" + far)
    for near in "::1", "fc00::1", "fdff::1", "fe80::1%lo", "febf::1":
        assert module.is_near(socket.AF_INET6, near)
    for far in "fec0::1", "fe00::1", "::2", "2001:db8::1", "::":
        assert not module.is_near(socket.AF_INET6, far)
    settings = module.Settings(["10.0.0.1", "192.0.2.1", "2001:db8::1"], 123)
    servers = module.find_servers(settings.hosts, settings)
    assert [(server.left, server.pause_ns) for server in servers] == [(10, 0), (4, 2 * 10**9), (4, 2 * 10**9)]
    settings = module.Settings(["-r", "7", "-h", "5", "192.0.2.1"], 123)
    server, = module.find_servers(settings.hosts, settings)
    assert (server.left, server.pause_ns) == (7, 5 * 10**6)


@both
def test_a_name_with_many_addresses_is_as_many_servers_up_to_four(name, answer, monkeypatch):
    module = load(name)
    found = [(socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("2001:db8::%d" % n, 123, 0, 0)) for n in (1, 2)] \
        + [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("192.0.2.%d" % n, 123)) for n in range(1, 5)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: list(found))
    settings = module.Settings(["pool.example", "again.example"], 123)
    servers = module.find_servers(settings.hosts, settings)
    assert [server.name for server in servers] == ["pool.example (%s)" % address for address in (
        "2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2")]


@both
def test_options(name, answer):
    module = load(name)
    for words in ("-46fr7 a b", "-r7 -f -4 -6 -- a b", "-f -r 7 a b", "-4f6 -r 7 a b"):
        settings = module.Settings(words.split(), 123)
        assert (settings.exchanges, settings.force, settings.hosts) == (7, "f" in words, ["a", "b"]), words
    for words in "-r", "-fr", "-x a", "-f: a", "-: a", "--force a", "":
        with pytest.raises(ValueError):
            module.Settings(words.split(), 123)
    assert module.Settings(["-e", "0.25", "a"], 123).most_error_ns == 250000


# ==== sntpclock =====================================================================================

@pytest.mark.parametrize("fields, words", [
    ({"flags": 3 << 6 | 4 << 3 | 4}, "not synchronised"),
    ({"stratum": 16}, "not synchronised"),
    ({"stratum": 0, "refid": b"INIT"}, "stratum 0, INIT"),
    ({"stratum": 0, "refid": b"\n\x1b[m"}, "stratum 0, ??[m"),
    ({"flags": 4 << 3 | 3}, "mode 3"),
    ({"flags": 4 << 3 | 5}, "mode 5"),
    ({"flags": 4}, "version 0"),
    ({"receive": 0}, "without time"),
    ({"transmit": 0}, "without time"),
    ({"receive": ntp_stamp(10**18 + 1000), "transmit": ntp_stamp(10**18)}, "sent before the query came"),
    ({"delay": 3 * 2**16 + 9}, "1.5 s off"),
    ({"delay": 2**16, "dispersion": 2**16 + 9}, "1.5 s off"),
    ({"delay": 2**32 - 1, "dispersion": 2**32 - 1}, "98304.0 s off"),
])
def test_answers_that_are_refused(fields, words):
    with Rogue(lambda query, n: [ntp_answer(query, **fields)]) as server:
        done = ask("sntpclock", server.port, "-r", 2, "-t", 500)
    assert (done.returncode, done.stdout) == (111, b"")
    assert done.stderr.count("warning: unable to ask 127.0.0.1: ") == 2 and done.stderr.count(words) == 2
    assert done.stderr.endswith("time uncertainty too large\n")


def test_answers_that_are_taken():
    for fields in {"flags": 1 << 6 | 3 << 3 | 4}, {"flags": 1 << 3 | 2}, {"stratum": 15}, {"delay": 3 << 16}:
        with Rogue(lambda query, n: [ntp_answer(query, **fields) + bytes(20 * (n % 2))]) as server:
            assert abs(offset_ns(ask("sntpclock", server.port))) < 50 * 10**6


def test_kiss_of_death():
    for word in b"DENY", b"RSTR", b"RATE":
        with Rogue(lambda query, n: [ntp_answer(query, stratum=0, refid=word, flags=0xe4)]) as server:
            done = ask("sntpclock", server.port)
        assert (done.returncode, done.stdout) == (111, b"") and len(server.queries) == 1
        assert done.stderr.endswith("get the time from 127.0.0.1: kiss-o'-death %s\n" % word.decode())

        def later(query, n):
            return [ntp_answer(query) if n < 3 else ntp_answer(query, stratum=0, refid=word)]
        with Rogue(later) as server:
            done = ask("sntpclock", server.port)
        assert len(server.queries) == 3
        assert done.returncode == (0 if word == b"RATE" else 111), "what came before a RATE is good"


def test_eras():
    era1_sec = 2**32 - 2208988800  # 2036-02-07 06:28:16
    for pivot_sec in NTP_NOW_SEC, era1_sec - 1, era1_sec, era1_sec + 10**9, 2**33:
        for distance_sec in -2**31 + 1, -86400, -1, 0, 1, 86400, 2**31 - 1:
            sec = pivot_sec + distance_sec
            assert SNTP.stamp_ns(ntp_stamp(sec * 10**9), pivot_sec) == sec * 10**9
    # Received before the end of the era and sent in the next one, to a client whose clock says 1970.
    query = SNTP.make_query()
    packet = ntp_answer(query, receive=2**64 - 2**31, transmit=2**31)
    found = SNTP.decode_answer(query, packet, SNTP.RELEASE_SEC)
    assert found.received_ns - 1 == era1_sec * 10**9 - 5 * 10**8
    assert found.sent_ns == era1_sec * 10**9 + 5 * 10**8
    off_ns = (era1_sec + 10**9) * 10**9 - time.time_ns()
    with Rogue(lambda query, n: [ntp_answer(query, off_ns)]) as server:
        assert abs(offset_ns(ask("sntpclock", server.port, "-l", 0)) - off_ns) < 50 * 10**6


def test_a_real_chronyd(tmp_path):
    with Chronyd(tmp_path) as server:
        for host in "127.0.0.1", "::1":
            done = ask("sntpclock", server.port, "-v", 2, hosts=[host])
            result_ns, bound_ns = result_of(done)
            assert abs(result_ns) <= bound_ns + 1 and abs(offset_ns(done) - result_ns) < 2
            assert bound_ns < MOST_IDLE_ERROR_NS
            assert "stratum 1, reference 7f7f0101" in done.stderr
        done = ask("sntpclock", server.port, "-v", 2, hosts=["127.0.0.1", "::1"])
        assert abs(offset_ns(done)) <= result_of(done)[1] + 1


def test_several_servers_may_differ_by_their_root_distance():
    """Each is sure of itself to some us, and 0.3 s from the other: that is within what both admit, or not."""
    for distance, agree in (0x4000, True), (0x1000, False):  # 0.25 s, 0.06 s
        def right(query, n):
            return [ntp_answer(query, dispersion=distance)]

        def fast(query, n):
            return [ntp_answer(query, 3 * 10**8, dispersion=distance)]
        with Rogue(right) as one, Rogue(fast, "127.0.0.2", one.port):
            done = ask("sntpclock", one.port, "-v", 2, hosts=["127.0.0.1", "127.0.0.2"])
        if agree:
            assert abs(offset_ns(done) - 150 * 10**6) < 50 * 10**6 and abs(result_of(done)[1] - 10**8) < 10**7
        else:
            assert done.returncode == 111 and "no majority" in done.stderr


def test_an_unsynchronised_chronyd_is_refused(tmp_path):
    with Chronyd(tmp_path, "maxupdateskew 1") as server:
        done = ask("sntpclock", server.port)
        assert done.returncode == 111 and done.stdout == b"" and "not synchronised" in done.stderr


KEYS = """# keys, as chronyc keygen and people write them
1 MD5 tulip
2 SHA1 HEX:933F62BE1D604E68A81B557F18CFA200483F5B70
3 SHA256 ASCII:chrysanthemum
4 SHA384 HEX:000102030405060708090a0b0c0d0e0f101112131415161718
5 SHA512 HEX:000102030405060708090a0b0c0d0e0f101112131415161718
6 AES128 HEX:000102030405060708090a0b0c0d0e0f
7 without-a-type
8
"""


def test_authentication_with_a_real_chronyd(tmp_path):
    keys, others = tmp_path / "keys", tmp_path / "others"
    keys.write_text(KEYS)
    others.write_text(KEYS.replace("tulip", "daisy").replace("933F", "933E"))
    keys.chmod(0o600)
    others.chmod(0o640)
    with Chronyd(tmp_path, "local stratum 1", "keyfile %s" % keys) as server:
        for ident in 1, 2, 3, 4, 5, 7:
            done = ask("sntpclock", server.port, "-k", keys, "-K", ident)
            assert abs(offset_ns(done)) < 50 * 10**6 and done.stderr == "", ident
        for ident in 1, 2:
            done = ask("sntpclock", server.port, "-k", others, "-K", ident, "-r", 1, "-t", 300)
            assert (done.returncode, done.stdout) == (111, b"")
        done = ask("sntpclock", server.port, "-k", keys, "-K", 6)
        assert done.returncode == 111 and "it is of type AES128, and only MD5, SHA1" in done.stderr
        done = ask("sntpclock", server.port, "-k", keys, "-K", 9)
        assert done.returncode == 111 and "take key 9 from %s: it is not there" % keys in done.stderr
        keys.chmod(0o604)
        done = ask("sntpclock", server.port, "-k", keys, "-K", 1)
        assert done.returncode == 111 and "others can read" in done.stderr
    done = ask("sntpclock", 1, "-k", tmp_path / "none", "-K", 1)
    assert done.returncode == 111 and "No such file" in done.stderr


def test_answers_that_are_not_authenticated_are_refused(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    mac = SNTP.Signer(2, *SNTP.read_key(keys, 2)).mac
    wrong = [lambda answer: answer,  # none
             lambda answer: answer + bytes(4),  # crypto-NAK
             lambda answer: answer + mac(answer)[:-1] + b"?",
             lambda answer: answer + SNTP.Signer(1, *SNTP.read_key(keys, 1)).mac(answer),
             lambda answer: answer + mac(answer) + bytes(4),
             lambda answer: answer + mac(answer[:-1] + b"?")]
    for tamper in wrong:
        with Rogue(lambda query, n: [tamper(ntp_answer(query))]) as server:
            done = ask("sntpclock", server.port, "-k", keys, "-K", 2, "-r", 1)
            assert done.returncode == 111 and "not authenticated" in done.stderr
    with Rogue(lambda query, n: [ntp_answer(query, stratum=0, refid=b"DENY")]) as server:
        done = ask("sntpclock", server.port, "-k", keys, "-K", 2, "-r", 2)
        assert "DENY" not in done.stderr and len(server.queries) == 2, "anybody could turn us away"
    with Rogue(lambda query, n: [ntp_answer(query) + mac(ntp_answer(query))]) as server:
        ask("sntpclock", server.port, "-k", keys, "-K", 2)
        assert [len(query) for query in server.queries] == [72] * 10


def test_keys_need_both_options():
    for args in ("-k", "/etc/chrony/keys"), ("-K", "1"), ("-k", "/x", "-K", "0"), ("-k", "/x", "-K", "1x"):
        assert run("sntpclock", *args, "0").returncode == 100


def test_kisses_are_remembered_across_runs(tmp_path):
    path, words = tmp_path / "kisses", []

    def answer(query, n):
        return [ntp_answer(query, stratum=0, refid=words[-1]) if words else ntp_answer(query)]
    with Rogue(answer) as server:
        def ask_again():
            before = len(server.queries)
            return ask("sntpclock", server.port, "-s", tmp_path), len(server.queries) - before
        done, queries = ask_again()
        assert done.returncode == 0 and queries == 10 and not path.exists()
        for word, rest_sec in (b"RATE", 1024), (b"RATE", 2048), (b"DENY", 4096):
            words.append(word)
            done, queries = ask_again()
            assert (done.returncode, done.stdout, queries) == (111, b"", 1)
            address, until_sec, kept_sec, kept_word = path.read_text().split()
            assert (address, int(kept_sec), kept_word) == ("127.0.0.1", rest_sec, word.decode())
            assert abs(int(until_sec) - time.time() - rest_sec) < 30
            done, queries = ask_again()
            assert done.returncode == 111 and queries == 0, "it was asked again"
            assert "kiss-o'-death %s, not to be asked for another" % word.decode() in done.stderr
            path.write_text("127.0.0.1 %d %d %s\n" % (time.time() - 1, rest_sec, word.decode()))  # it is over
        assert sorted(os.listdir(tmp_path)) == ["kisses"]
        # A rest longer than any can be: the clock was set back since.  It is asked, and has no more to say.
        path.write_text("127.0.0.1 %d 1024 RATE\n" % (time.time() + 10**6))
        words.clear()
        done, queries = ask_again()
        assert done.returncode == 0 and queries == 10 and path.read_text() == ""
        for damage in "127.0.0.1 soon\n", "\0\xff\n", "127.0.0.1 1 2 3 4 5\n":
            path.write_text(damage)
            assert ask_again()[0].returncode == 0
        # One of two rests: the other is asked.
        path.write_text("127.0.0.1 %d 1024 RATE\n" % (time.time() + 1000))
        done = ask("sntpclock", server.port, "-s", tmp_path, hosts=["0", "localhost", "127.0.0.2"])
        assert "another" in done.stderr
    with Rogue(lambda query, n: [ntp_answer(query, stratum=0, refid=b"DENY")]) as server:
        path.unlink()
        ask("sntpclock", server.port, "-s", tmp_path)
        assert path.read_text().split()[2:] == ["86400", "DENY"]
        done = ask("sntpclock", server.port, "-s", tmp_path / "nowhere")
        assert "warning: unable to write" in done.stderr and "DENY" in done.stderr.splitlines()[-1]


class Https:
    """A TLS server with a certificate by an authority of this test, valid in the years given, which shows a
    time that is off_ns off."""

    def __init__(self, home, valid=(2020, 2035), off_ns=0, authority_valid=(2020, 2060)):
        need("openssl")
        self.home, self.off_ns, self.header = home, off_ns, "Date: %s GMT"
        self.hostile = None  # what to do instead of answering, with the TLS connection
        (home / "index.txt").write_text("")
        (home / "ca.conf").write_text("""[ca]
default_ca = here
[here]
dir = %s
database = $dir/index.txt
new_certs_dir = $dir
rand_serial = yes
default_md = sha256
policy = any
[any]
commonName = supplied
[authority]
basicConstraints = critical, CA:true
subjectKeyIdentifier = hash
[leaf]
subjectAltName = DNS:localhost, IP:127.0.0.1
[req]
distinguished_name = name
[name]
""" % home)
        for name, years in ("authority", authority_valid), ("leaf", valid):
            self.openssl("req -config ca.conf -newkey rsa:2048 -nodes -keyout %s.key -out %s.req -subj /CN=%s"
                         % (name, name, name))
            signer = "-selfsign" if name == "authority" else "-cert authority.pem"
            self.openssl("ca -config ca.conf -batch -notext -keyfile authority.key -extensions %s %s "
                         "-in %s.req -out %s.pem -startdate %d0101000000Z -enddate %d0101000000Z"
                         % (name, signer, name, name, years[0], years[1]))
        self.env = {"SSL_CERT_FILE": str(home / "authority.pem"), "SSL_CERT_DIR": "/nonexistent"}
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(str(home / "leaf.pem"), str(home / "leaf.key"))
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = "https://localhost:%d/" % self.socket.getsockname()[1]

    def openssl(self, line):
        subprocess.run(["openssl"] + line.split(), cwd=str(self.home), check=True, stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE)

    def serve(self):
        while True:
            client, _ = self.socket.accept()
            try:
                with client, self.context.wrap_socket(client, server_side=True) as tls:
                    request = tls.recv(4096)
                    if request == b"stop":
                        return
                    assert request.startswith(b"HEAD / HTTP/1.1\r\nHost: localhost:")
                    if self.hostile:
                        self.hostile(tls)
                        continue
                    shown = time.gmtime((time.time_ns() + self.off_ns) // 10**9)
                    header = self.header.replace("%s", time.strftime("%a, %d %b %Y %H:%M:%S", shown))
                    tls.sendall(("HTTP/1.1 200 OK\r\nServer: test\r\n%s\r\n\r\n" % header).encode())
            except OSError:  # it did not like our certificate
                pass

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        anyone = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(self.socket.getsockname()) as plain, anyone.wrap_socket(plain) as tls:
            tls.sendall(b"stop")
        self.thread.join()
        self.socket.close()


DAYS_5000_NS = 5000 * 86400 * 10**9  # from 2026 to 2040


def test_https_confirms_the_time(tmp_path):
    with Rogue(lambda query, n: [ntp_answer(query)]) as server, Https(tmp_path) as https:
        done = ask("sntpclock", server.port, "-c", https.url, "-c", https.url, **https.env)
        assert abs(offset_ns(done)) < 50 * 10**6 and done.stderr == ""
        for off_ns in 10**10, -10**10:
            https.off_ns = off_ns
            done = ask("sntpclock", server.port, "-f", "-c", https.url, **https.env)
            assert (done.returncode, done.stdout) == (111, b"")
            assert re.search(r"fatal: .*: %s contradicts: it is [-+]\d+ s from" % https.url, done.stderr)
        https.off_ns = 0
        # Whom our authorities don't know, or whose name is another, can't confirm anything.
        for url, env in ((https.url, {}), (https.url.replace("localhost", "127.0.0.2"), https.env)):
            done = ask("sntpclock", server.port, "-c", url, **env)
            assert (done.returncode, done.stdout) == (111, b"")
            assert "warning: unable to ask " + url in done.stderr
            assert done.stderr.endswith("no HTTPS server confirms it\n")
        # One that is silent is no reason to distrust another.
        done = ask("sntpclock", server.port, "-c", "https://127.0.0.1:1", "-c", https.url, **https.env)
        assert abs(offset_ns(done)) < 50 * 10**6 and "127.0.0.1:1: Connection refused" in done.stderr
        for header in "Date:", "Date: yesterday", "Date: Sun, 99 Nov 2026 99:99:99 GMT", "X: y", "x" * 100000:
            https.header = header
            done = ask("sntpclock", server.port, "-c", https.url, **https.env)
            assert (done.returncode, done.stdout) == (111, b""), header
        for url in "http://localhost/", "https://", "https://a b/", "https://localhost:x/", "https://x/\r\n", \
                "https://localhost:65536/", "https://localhost:\u0663/":
            done = ask("sntpclock", server.port, "-c", url)
            assert done.returncode == 111 and "not a https:// address" in done.stderr, url


def test_certificates_are_judged_by_the_time_measured_not_by_this_clock(tmp_path):
    """The clock is 5000 days slow: a certificate of then is good, one that is good by this clock is not."""
    for number, (valid, authority_valid, good) in enumerate((
            ((2038, 2045), (2037, 2060), True), ((2020, 2035), (2020, 2060), False),
            ((2038, 2045), (2020, 2035), False))):
        home = tmp_path / str(number)
        home.mkdir()
        with Rogue(lambda query, n: [ntp_answer(query, DAYS_5000_NS)]) as server, \
                Https(home, valid, DAYS_5000_NS, authority_valid) as https:
            done = ask("sntpclock", server.port, "-l", 0, "-c", https.url, **https.env)
        if good:
            assert abs(offset_ns(done) - DAYS_5000_NS) < 50 * 10**6
        elif number == 1 or sys.version_info >= (3, 10):  # before, an authority's dates can't be seen
            assert (done.returncode, done.stdout) == (111, b"")
            assert "certificate is not valid at the time" in done.stderr


def http_answer(date=None, status="HTTP/1.1 200 OK", more=""):
    date = time.strftime(SNTP.HTTP_DATE, time.gmtime()) if date is None else date
    return ("%s\r\nServer: test\r\nDate: %s\r\n%s\r\n" % (status, date, more)).encode("latin-1")


def test_the_date_of_an_https_answer():
    date, sec = "Sun, 22 Nov 2026 16:20:42 GMT", 1795364442
    for answer in (http_answer(date), http_answer(date, "HTTP/1.0 404 Not Found"), http_answer(date) + bytes(99),
                   http_answer(date).replace(b"Date: ", b"dATE:\t  "), http_answer(date) + http_answer("x"),
                   http_answer(date, more="X-Date: x\r\nDated: x\r\n")):
        assert SNTP.http_date(answer) == sec
    assert SNTP.http_date(http_answer("Fri, 31 Dec 9999 23:59:59 GMT")) == 253402300799
    for wrong in ("", "x", date[:-4], date + " x", "Mon" + date[3:], date.lower(), date.replace("GMT", "UTC"),
                  "Sun, 1 Nov 2026 16:20:42 GMT", "Mon, 30 Feb 2026 16:20:42 GMT", "Sun, 22 Nov 26 16:20:42 GMT",
                  "Thu, 31 Dec 2026 23:59:60 GMT", "Sunday, 22-Nov-26 16:20:42 GMT", "Sun Nov 22 16:20:42 2026",
                  date.replace(" ", "  "), date.replace(" ", "\xa0"), date.replace("2", "\xb2"),
                  "Sat, 01 Jan 0000 00:00:00 GMT", date * 2000, date + "\0", date + "\r\nDate: " + date):
        with pytest.raises(ValueError) as refused:
            SNTP.http_date(http_answer(wrong))
        assert len(str(refused.value)) < 100
    for answer in (b"", b"\r\n\r\n", http_answer(date)[:-2], http_answer(date)[:50], http_answer(date, "220 mail"),
                   http_answer(date, "HTTP/2 200"), http_answer(date).replace(b"\r", b""),
                   b"HTTP/1.1 200 OK\r\n\r\n" + http_answer(date)):
        with pytest.raises(ValueError):
            SNTP.http_date(answer)


def trickle(tls):
    for byte in http_answer():
        tls.sendall(bytes([byte]))
        time.sleep(0.05)


def endless(tls):
    while True:
        tls.sendall(b"X: y\r\n" * 1000)


def late(tls):
    """The Date is right when it is sent, and was so half a minute ago if it is held up for so long."""
    answer = http_answer()
    time.sleep(2.5)
    tls.sendall(answer)


HOSTILE_ANSWERS = {
    "closed at once": b"", "random": random.Random(SEED).getrandbits(8 * 5000).to_bytes(5000, "big"),
    "cut off": b"HTTP/1.1 200 OK\r\nDate: %s\r\n", "mail": b"220 mail\r\nDate: %s\r\n\r\n",
    "in the body": b"HTTP/1.1 200 OK\r\n\r\nDate: %s\r\n\r\n", "old lines": b"HTTP/1.1 200 OK\nDate: %s\n\n",
    "two": b"HTTP/1.1 200 OK\r\nDate: %s\r\nDate: %s\r\n\r\n",
    "no such day": b"HTTP/1.1 200 OK\r\nDate: Mon, 30 Feb 2026 16:20:42 GMT\r\n\r\n",
    "a long one": b"HTTP/1.1 200 OK\r\nDate: a %s b c d e f " + b"9" * 60000 + b"\r\n\r\n",
    "a million": b"X" * 10**6, "trickling": trickle, "endless": endless, "late": late,
    "silent": lambda tls: time.sleep(2.5)}


def test_hostile_https_answers_confirm_nothing_in_a_line_and_in_time(tmp_path):
    rng = random.Random(SEED)
    with Rogue(lambda query, n: [ntp_answer(query)]) as server, Https(tmp_path) as https:
        for name, hostile in HOSTILE_ANSWERS.items():
            date = time.strftime(SNTP.HTTP_DATE, time.gmtime()).encode()
            https.hostile = hostile if callable(hostile) else (
                lambda tls, answer=hostile.replace(b"%s", date): tls.sendall(answer))
            begin = time.monotonic()
            done = ask("sntpclock", server.port, "-r", 1, "-c", https.url, **https.env)
            assert (done.returncode, done.stdout) == (111, b""), name
            assert time.monotonic() - begin < SNTP.MOST_HTTPS_SEC + 4, name  # and a busy host's start
            warning, fatal = done.stderr.splitlines()
            assert warning.startswith("sntpclock: warning: unable to ask " + https.url) and len(warning) < 200
            assert fatal.endswith("no HTTPS server confirms it")
        # Who is late can't confirm; who has another time contradicts.  Any other change is found or harmless.
        with contextlib.ExitStack() as stack:
            for name, value in https.env.items():
                before = os.environ.get(name)
                stack.callback(lambda n=name, v=before: os.environ.update({n: v}) if v else os.environ.pop(n))
                os.environ[name] = value
            taken = 0
            for number in range(300):
                answer = http_answer()
                answer = mutated(rng, answer) if number % 10 else answer
                https.hostile = lambda tls: tls.sendall(answer)
                with contextlib.suppress(OSError, ValueError):
                    date_sec, before_ns, after_ns, validities = SNTP.ask_https(https.url, 5)
                    assert time.strftime(SNTP.HTTP_DATE, time.gmtime(date_sec)).encode() in answer
                    assert before_ns <= after_ns and len(validities) in (1, 2)
                    taken += 1
            assert taken >= 30


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x03\x40\x00\x02", b"HTTP/1.1 400 Bad Request\r\n\r\n",
                                   b"\0" * 10**5], ids=["nothing", "a record", "plain HTTP", "zeros"])
def test_what_is_no_tls_ends_in_time_and_in_a_line(first):
    """A server that says something wrong, or begins a record and sends a byte of it now and then, or nothing."""
    with Rogue(lambda query, n: [ntp_answer(query)]) as server, socket.create_server(("127.0.0.1", 0)) as listener:
        def serve():
            with contextlib.suppress(OSError), listener.accept()[0] as client:
                while client.send(first or b"\x16"):
                    time.sleep(0.2)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        begin = time.monotonic()
        url = "https://127.0.0.1:%d/" % listener.getsockname()[1]
        done = ask("sntpclock", server.port, "-r", 1, "-T", 1500, "-c", url)
        assert time.monotonic() - begin < 1.5 + 4
        assert (done.returncode, done.stdout) == (111, b"") and len(done.stderr.splitlines()) == 2
        assert "unable to ask " + url in done.stderr
    thread.join()


# ==== taiclock ======================================================================================

def test_labels():
    """Vectors of the convention: on the utc scale the leap second lies between two labels."""
    query = TAI.make_query()
    for unix_sec, label in ((1483228799, "40000000586846a3"), (1483228800, "40000000586846a5")):
        found = TAI.decode_answer(query, b"stai" + bytes.fromhex(label) + bytes(8) + query[20:])
        assert found.received_ns == found.sent_ns == TAI.to_tai(unix_sec * 10**9, TAI_ROWS)
    label = bytes.fromhex("40000000586846a3" "00000005" "00000001")
    found = TAI.decode_answer(query, b"stai" + label + query[20:])
    assert found.received_ns - found.sent_ns == 1, "a bound has to allow for the attosecond"


def test_labels_that_are_none_are_refused():
    for label in bytes(8) + b"\xff" * 8, b"\x80" + bytes(15), bytes(8) + b"\0\0\0\0\x3b\x9a\xca\0":
        with Rogue(lambda query, n: [tai_answer(query, label=label)]) as server:
            done = ask("taiclock", server.port, "-r", 1, "-t", 300)
        assert (done.returncode, done.stdout) == (111, b"") and "not a TAI64NA" in done.stderr
    for label in bytes(16), b"\x7f" + b"\xff" * 7 + bytes(8):  # true labels of absurd times
        with Rogue(lambda query, n: [tai_answer(query, label=label)]) as server:
            done = ask("taiclock", server.port, "-r", 1)
            assert done.returncode == 111 and "days away" in done.stderr
            done = ask("taiclock", server.port, "-r", 1, "-f")
            assert done.returncode in (0, 111)


def test_an_expired_leap_table_is_a_warning(tmp_path):
    table = tmp_path / "leap-seconds.list"
    table.write_text("#@ 3000000000\n2272060800 10\n")
    with Rogue(lambda query, n: [tai_answer(query)]) as server:
        done = ask("taiclock", server.port, LEAPSECS=str(table))
        assert done.stderr == "taiclock: warning: the leap second table has expired\n"
    with Rogue(lambda query, n: [ntp_answer(query)]) as server:
        assert ask("sntpclock", server.port, LEAPSECS=str(table)).stderr == "", "there they cancel"
    table.write_text("nonsense")
    for name in "taiclock", "sntpclock":
        done = ask(name, 1, LEAPSECS=str(table))
        assert done.returncode == 111 and "is damaged" in done.stderr


@pytest.mark.skipif(not os.path.exists(path_of("taiclockd")), reason="taiclockd.py is not here")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_taiclock_asks_taiclockd(address):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([path_of("taiclockd"), "-i", address, "-p", str(port)],
                              env=dict(UTC_ENV, **QUIET_ENV))
    try:
        for _ in range(50):
            done = ask("taiclock", port, "-v", 2, hosts=[address])
            if done.returncode == 0:
                break
            time.sleep(0.1)
        assert abs(offset_ns(done)) <= result_of(done)[1] + 1
        assert result_of(done)[1] < 10 * MOST_IDLE_ERROR_NS
    finally:
        server.terminate()
        server.wait()


# ==== clockctl ======================================================================================

CONF = 'CLOCKSPEED_HOME="%s"\nCLOCKSPEED_BIN="%s"\nCLOCK_TYPE="%s"\nCLOCK_IP="%s"\n'
PLUS_QUARTER = struct.pack(">qII", 0, 250000000, 0)  # +0.25 s


def stand_in(directory, name, packet=PLUS_QUARTER, status=0, first=":"):
    """A program that writes down its arguments and what it reads, prints a packet and exits with status."""
    path = os.path.join(str(directory), name)
    with open(path, "w") as file:
        file.write("#!/bin/sh\n%s\necho \"$@\" >> '%s.args'\ncat > '%s.stdin'\nprintf '%s'\nexit %d\n" % (
            first, path, path, "".join("\\%03o" % byte for byte in packet), status))
    os.chmod(path, 0o755)
    return path


def contents(path):
    with open(str(path), "rb") as file:
        return file.read()


def await_that(condition, patience_sec=30):
    """Until it is true; None at the end of patience, so `assert await_that(...)`."""
    deadline_sec = time.monotonic() + patience_sec
    while time.monotonic() < deadline_sec:
        if condition():
            return True
        time.sleep(0.02)


def processes_in(directory):
    """The processes whose working directory is below: pid -> command line."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink("/proc/%s/cwd" % pid).startswith(str(directory)):
                found[int(pid)] = contents("/proc/%s/cmdline" % pid).replace(b"\0", b" ").decode().strip()
        except OSError:  # it has ended
            pass
    return found


class Host:
    """A home, a directory of programs and a clockspeed.conf of their own."""

    def __init__(self, directory, kind="ntp", address="192.0.2.1"):
        self.bin, self.home, self.conf = directory / "bin", directory / "home", directory / "clockspeed.conf"
        self.adjust = str(self.home / "adjust")
        self.bin.mkdir()
        (self.home / "etc").mkdir(parents=True)
        self.write_conf(CONF % (self.home, self.bin, kind, address))

    def write_conf(self, text):
        self.conf.write_bytes(text.encode())

    def clockctl(self, *args, **env):
        return run("clockctl", *args, CLOCKSPEED_CONF=str(self.conf), **env)

    def make_fifo(self):
        """-> a descriptor that reads it."""
        os.mkfifo(self.adjust)
        return os.open(self.adjust, os.O_RDONLY | os.O_NONBLOCK)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


@pytest.mark.parametrize("text, wanted", [
    ("", {}),
    ("A=b", {"A": "b"}),
    ("A=b\n", {"A": "b"}),
    ('A="b c" # d', {"A": "b c"}),
    ("A='b \"c'", {"A": 'b "c'}),
    ("A='$x `y` \\'", {"A": "$x `y` \\"}),
    ("# A=b\n\n  # c\n  B=c", {"B": "c"}),
    ("export A=b\nexport B='c'", {"A": "b", "B": "c"}),
    ("A=b; export A", {"A": "b"}),
    ("A=b C=d;E=f", {"A": "b", "C": "d", "E": "f"}),
    ("A=b#c", {"A": "b#c"}),
    ("A=#c", {"A": "#c"}),
    ("A=", {"A": ""}),
    ("A=\nB=c", {"A": "", "B": "c"}),
    ("A=b\nA=c", {"A": "c"}),
    ('A="b\\"c\\\\d\\$e\\f"', {"A": 'b"c\\d$e\\f'}),
    ("A=b\\ c", {"A": "b c"}),
    ("A=b'c d'\"e\"", {"A": "bc de"}),
    ('A="b\nc"\nB=d', {"A": "b\nc", "B": "d"}),
    ('A="b\\\nc" B=d\\\ne', {"A": "bc", "B": "de"}),
    ('A="b"\r\nC=d\r\n', {"A": "b", "C": "d"}),
    ("A=2001:db8::1,192.0.2.1", {"A": "2001:db8::1,192.0.2.1"}),
    ("A_1=é", {"A_1": "é"}),
    ("A=b\u00a0c", {"A": "b\u00a0c"}),
])
def test_a_configuration_is_read_as_a_shell_reads_it(text, wanted, tmp_path):
    assert load("clockctl").parse_assignments(text) == wanted
    if "\r" not in text:  # the shell would keep it in the value
        (tmp_path / "conf").write_bytes(text.encode())
        script = ". %s/conf\n" % tmp_path
        script += "".join('printf "%%s\\0" "$%s"\n' % name for name in sorted(wanted))
        shown = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=True).stdout
        assert shown.decode().split("\0")[:-1] == [wanted[name] for name in sorted(wanted)]


@pytest.mark.parametrize("text, line", [
    ("A=$B", 1), ('A=b\nC="${D}"', 2), ("A=`date`", 1), ('\n\nA="$(date)"', 3), ("A=~/b", 1), ("A = b", 1),
    ("A=b\nif true; then", 2), ('A="b', 1), ("A='b\n\n", 1), ("A=b|c", 1), ("A=b & B=c", 1), ("1A=b", 1),
    ("rm -rf /", 1), ("A=b export", 1), ("A=(b c)", 1), ('A="b"\n. /etc/passwd', 2), ("A=b\\", 1),
    ("A+=b", 1),
])
def test_what_needs_a_shell_is_refused_with_its_line(text, line, host):
    with pytest.raises(ValueError, match="^line %d is not of the form" % line):
        load("clockctl").parse_assignments(text)
    host.write_conf(text)
    done = host.clockctl("atto")
    assert done.returncode == 111
    assert done.stderr.startswith("clockctl: fatal: unable to read %s: line %d is not" % (host.conf, line))


def test_a_binary_configuration_is_refused():
    with pytest.raises(ValueError, match="not a text file"):
        load("clockctl").parse_assignments("A=b\0")


def test_random_configurations_are_read_or_refused():
    rng, parse = random.Random(SEED), load("clockctl").parse_assignments
    for _ in range(3000):
        text = "".join(rng.choice("AB=\"'\\ \n#;$x") for _ in range(rng.randrange(30)))
        try:
            parse(text)
        except ValueError:
            pass


def test_a_configuration_that_is_named_must_be_there(host):
    host.conf.unlink()
    done = host.clockctl("atto")
    assert (done.returncode, done.stderr) == (
        111, "clockctl: fatal: unable to read %s: No such file or directory\n" % host.conf)


def test_variables_come_from_the_file_else_the_environment_and_go_to_the_programs(host):
    host.write_conf("CLOCKSPEED_BIN=%s\nCLOCK_SCALE=tai\nFOO=file" % host.bin)
    client = stand_in(host.bin, "taiclock", first="echo $CLOCK_SCALE $FOO $BAR >&2")
    stand_in(host.bin, "clockview", b"shown\n")
    done = host.clockctl("view", CLOCK_TYPE="tai", CLOCK_IP="192.0.2.7", FOO="environment", BAR="kept")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"shown\n", "tai file kept\n")
    assert contents(client + ".args") == b"192.0.2.7\n"


def test_run_becomes_the_program_with_the_variables_of_the_file(host):
    """So do the daemons get CLOCK_SCALE: as any other child of sh would, but for the environment."""
    host.write_conf("CLOCK_SCALE=tai\nCLOCK_SERVE='a b'\n")
    script = 'echo "$CLOCK_SCALE $CLOCK_SERVE $BAR $*"; grep SigIgn /proc/self/status; exit 7'
    done = host.clockctl("run", "sh", "-c", script, "sh", "-u", "--help", CLOCK_SCALE="utc", BAR="kept")
    assert (done.returncode, done.stderr) == (7, "")
    said, ignored = done.stdout.decode().splitlines()
    assert said == "tai a b kept -u --help"
    assert int(ignored.split()[1], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0
    done = host.clockctl("run", "/none")
    assert (done.returncode, done.stderr) == (
        111, "clockctl: fatal: unable to run /none: No such file or directory\n")
    assert host.clockctl("run").returncode == 100
    host.write_conf("CLOCK_SCALE=$(cat scale)\n")
    done = host.clockctl("run", "echo", "it runs")
    assert (done.returncode, done.stdout) == (111, b"") and "line 1 is not of the form" in done.stderr


def test_mark_writes_one_packet_and_says_so(host):
    reader = host.make_fifo()
    client = stand_in(host.bin, "sntpclock")
    done = host.clockctl("mark")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == b"mark: offset +0.250000000 s from ntp 192.0.2.1\n"
    assert os.read(reader, 100) == PLUS_QUARTER
    assert contents(client + ".args") == b"192.0.2.1\n"


@pytest.mark.parametrize("kind, address, client, args, shown", [
    ("sntp", "192.0.2.1", "sntpclock", b"192.0.2.1\n", b"sntp 192.0.2.1"),
    ("tai", "2001:db8::1", "taiclock.py", b"2001:db8::1\n", b"tai 2001:db8::1"),
    ("ntp", "192.0.2.1 a.example, 192.0.2.3", "sntpclock.py", b"192.0.2.1 a.example 192.0.2.3\n",
     b"ntp 192.0.2.1 a.example 192.0.2.3"),
])
def test_mark_asks_the_servers_by_the_client_of_the_type(tmp_path, kind, address, client, args, shown):
    host = Host(tmp_path, kind, address)
    reader = host.make_fifo()
    client = stand_in(host.bin, client, struct.pack(">qII", -1, 999999500, 0))
    assert host.clockctl("mark").stdout == b"mark: offset -0.000000500 s from %s\n" % shown
    assert contents(client + ".args") == args and len(os.read(reader, 100)) == 16


@pytest.mark.parametrize("trap, why", [
    ("missing", "there is none: clockspeed makes it when it starts"),
    ("regular file", "it is not a FIFO"),
    ("directory", "Is a directory"),
    ("symlink", "it is a symbolic link"),
    ("no reader", "no clockspeed is reading it"),
])
def test_mark_asks_nobody_when_clockspeed_is_not_there(host, tmp_path, trap, why):
    client = stand_in(host.bin, "sntpclock")
    target = tmp_path / "fifo"
    {"missing": lambda: None,
     "regular file": lambda: open(host.adjust, "w").close(),
     "directory": lambda: os.mkdir(host.adjust),
     "symlink": lambda: (os.mkfifo(str(target)), os.symlink(str(target), host.adjust)),
     "no reader": lambda: os.mkfifo(host.adjust)}[trap]()
    reader = os.open(str(target), os.O_RDONLY | os.O_NONBLOCK) if trap == "symlink" else None
    done = host.clockctl("mark")
    assert (done.returncode, done.stdout) == (111, b"")
    assert done.stderr == "clockctl: fatal: unable to write %s: %s\n" % (host.adjust, why)
    assert not os.path.exists(client + ".args"), "the server was asked"
    assert trap != "missing" or not os.path.lexists(host.adjust)
    assert trap != "regular file" or os.path.getsize(host.adjust) == 0
    if reader is not None:
        os.close(reader)


def test_mark_does_not_wait_for_a_full_fifo(host):
    reader = host.make_fifo()
    stand_in(host.bin, "sntpclock")
    writer = os.open(host.adjust, os.O_WRONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(16))
    done = host.clockctl("mark")
    assert done.returncode == 111
    assert done.stderr == (
        "clockctl: fatal: unable to write %s: it is full: clockspeed has stopped reading it\n" % host.adjust)
    os.close(reader)


def test_mark_says_when_clockspeed_left_while_the_server_was_asked(host):
    reader = host.make_fifo()
    stand_in(host.bin, "sntpclock", first="touch '%s/asked'; sleep 1" % host.bin)
    process = subprocess.Popen([path_of("clockctl"), "mark"], stderr=subprocess.PIPE,
                               env=dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf)))
    assert await_that((host.bin / "asked").exists)
    os.close(reader)
    assert process.communicate(timeout=60)[1].decode() == (
        "clockctl: fatal: unable to write %s: no clockspeed is reading it\n" % host.adjust)


def test_mark_with_patience_awaits_a_clockspeed_that_is_starting(host):
    stand_in(host.bin, "sntpclock")
    process = subprocess.Popen([path_of("clockctl"), "mark", "--patience", "30"], stdout=subprocess.PIPE,
                               env=dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf)))
    time.sleep(0.5)
    reader = host.make_fifo()
    assert process.communicate(timeout=60)[0].startswith(b"mark: offset +0.25")
    assert os.read(reader, 100) == PLUS_QUARTER


@pytest.mark.parametrize("packet, status, why", [
    (b"", 111, "unable to ask the time: sntpclock failed (exit status 111)"),
    (PLUS_QUARTER, 1, "unable to ask the time: sntpclock failed (exit status 1)"),
    (PLUS_QUARTER[:12], 0, "unable to use the answer of sntpclock: 12 bytes, not 16"),
    (PLUS_QUARTER * 2, 0, "unable to use the answer of sntpclock: 32 bytes, not 16"),
    (b"", 0, "unable to use the answer of sntpclock: 0 bytes, not 16"),
    (b"\xff" * 16, 0, "unable to use the answer of sntpclock: not a TAI64NA packet"),
])
@pytest.mark.parametrize("command", ["mark", "view", "set"])
def test_a_client_that_failed_changes_nothing(host, command, packet, status, why):
    reader = host.make_fifo()
    stand_in(host.bin, "sntpclock", packet, status)
    others = [stand_in(host.bin, name) for name in ("clockview", "clockadd")]
    done = host.clockctl(command)
    assert (done.returncode, done.stdout, done.stderr) == (111, b"", "clockctl: fatal: %s\n" % why)
    assert os.read(reader, 100) == b"" and not any(os.path.exists(name + ".args") for name in others)


@pytest.mark.parametrize("conf, why", [
    ("CLOCKSPEED_BIN=%(bin)s", "ask the time: CLOCK_IP is not set in %(conf)s"),
    ("CLOCK_IP=', ,'", "ask the time: CLOCK_IP is not set in %(conf)s"),
    ("CLOCK_IP=-e", "ask the time: CLOCK_IP is not an address in %(conf)s"),
    ("CLOCK_IP=a CLOCK_TYPE=ptp", "ask the time: CLOCK_TYPE is neither ntp nor tai in %(conf)s"),
    ("CLOCK_IP=a CLOCKSPEED_BIN=%(bin)s", "find sntpclock: it is not in %(bin)s"),
])
def test_a_configuration_that_can_not_work_is_named(host, conf, why):
    names = dict(bin=host.bin, conf=host.conf)
    host.write_conf(conf % names)
    done = host.clockctl("view")
    assert (done.returncode, done.stderr) == (111, "clockctl: fatal: unable to %s\n" % (why % names))


def test_view_and_set_hand_on_the_answer(host):
    stand_in(host.bin, "sntpclock")
    clockview = stand_in(host.bin, "clockview.py", b"before: 1\nafter:  2\n")
    clockadd = stand_in(host.bin, "clockadd", b"")
    assert host.clockctl("view").stdout == b"before: 1\nafter:  2\n"
    assert contents(clockview + ".stdin") == PLUS_QUARTER and not os.path.exists(clockadd + ".args")
    assert host.clockctl("set").stdout == b"set: clock stepped by +0.250000000 s, as ntp 192.0.2.1 has it\n"
    assert contents(clockadd + ".stdin") == PLUS_QUARTER


def test_set_says_when_the_clock_was_not_stepped(host):
    stand_in(host.bin, "sntpclock")
    stand_in(host.bin, "clockadd", b"", 111)
    done = host.clockctl("set")
    assert (done.returncode, done.stdout) == (111, b"")
    assert done.stderr == "clockctl: fatal: unable to set the clock: clockadd failed (exit status 111)\n"


@pytest.mark.parametrize("packet, shown", [
    ("0000000000000000 00000001 00000000", b"0.000000001000000000 s per tick, rate +0.000 ppm"),
    ("0000000000000000 00000001 0000c350", b"0.000000001000050000 s per tick, rate +50.000 ppm"),
    ("0000000000000000 00000000 3b9a06b2", b"0.000000000999950002 s per tick, rate -49.998 ppm"),
    ("0000000000000000 00000000 17d78400",
     b"0.000000000400000000 s per tick, which is not about 1 ns: it was made with another counter"),
])
def test_atto_shows_the_digits_and_the_rate(host, packet, shown):
    (host.home / "etc" / "atto").write_bytes(bytes.fromhex(packet))
    assert host.clockctl("atto").stdout == b"atto: " + shown + b"\n"


@pytest.mark.parametrize("data, why", [
    (b"", "0 bytes, not 16"),
    (bytes(17), "17 bytes, not 16"), (b"\xff" * 16, "not a TAI64NA packet")])
def test_an_unusable_atto_is_a_clear_line(host, data, why):
    (host.home / "etc" / "atto").write_bytes(data)
    done = host.clockctl("atto")
    assert done.stderr == "clockctl: fatal: unable to read %s/etc/atto: %s\n" % (host.home, why)


def test_a_rate_that_is_not_known_yet_is_no_error(host):
    done = host.clockctl("atto")
    assert done.returncode == 0 and done.stderr == "" and b"not known yet" in done.stdout


def test_every_command_has_a_help_with_an_example():
    for name in load("clockctl").COMMANDS:
        text = run("clockctl", "help", name).stdout.decode()
        assert text.startswith("clockctl " + name) and "clockctl %s" % name in text.partition("\n")[2]
        assert run("clockctl", name, "--help").stdout.decode() == text


@pytest.mark.parametrize("args", [
    ["mark", "x"], ["mark", "--patience"], ["mark", "--patience", "x"], ["mark", "--patience", "nan"],
    ["mark", "--patience", "inf"], ["wait"], ["wait", "1"], ["wait", "1", "9" * 5000],
    ["wait", "1", "4294967296"],
    ["wait", "x", "1"], ["wait", "-1", "1"], ["status", "x"], ["check", "x"], ["leap", "a", "b"],
    ["metrics", "--output"], ["graph", "phase"], ["run"],
    ["try", "ftp:x"], ["try", "ntp:"], ["try", "a", "b"], ["try", "tai:-f"], ["help", "x"], ["version", "-v"],
    ["nonsense"], []])
def test_wrong_usage_of_a_command_says_how(host, args):
    done = host.clockctl(*args)
    assert done.returncode == 100 and done.stderr.count("\n") == 1 and done.stdout == b""
    name = args[0] if args and args[0] != "nonsense" else "mark"
    assert done.stderr.startswith("clockctl: usage: clockctl " + name)


def test_a_stopped_mark_stops_its_client(host):
    reader = host.make_fifo()
    stand_in(host.bin, "sntpclock", first="cd '%s'; exec sleep 3573" % host.bin)
    process = subprocess.Popen([path_of("clockctl"), "mark"],
                               env=dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf)))
    assert await_that(lambda: "sleep 3573" in processes_in(host.bin).values())
    process.terminate()
    assert process.wait(30) == 143
    assert await_that(lambda: not processes_in(host.bin), 5)
    os.close(reader)


def test_mark_and_view_with_the_real_programs(host):
    server = subprocess.Popen([path_of("taiclockd"), "-i", "127.40.14.2"], stdout=subprocess.PIPE,
                              env=UTC_ENV)
    try:
        assert server.stdout.readline().startswith(b"start: ")
        host.write_conf(CONF % (host.home, HERE, "tai", "127.40.14.2"))
        reader = host.make_fifo()
        assert host.clockctl("mark").stdout.startswith((b"mark: offset +0.000", b"mark: offset -0.000"))
        assert abs(load("clockctl").unpack(os.read(reader, 100))) < 10**15
        before, after = host.clockctl("view").stdout.decode().splitlines()
        assert before.startswith("before: 20") and after.startswith("after:  20")
        os.close(reader)
        done = host.clockctl("try", "tai:127.40.14.2")
        assert done.returncode == 0 and " against tai:127.40.14.2\n" in done.stdout.decode()
    finally:
        server.kill()
        server.communicate()


# `try` runs the real programs.
def left_behind(directory):
    """What `try` has in its temporary directory, and its children that still run: by their environment."""
    found = os.listdir(str(directory))
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if b"TMPDIR=" + os.fsencode(str(directory)) in contents("/proc/%s/environ" % pid):
                found.append(contents("/proc/%s/cmdline" % pid))
    return found


def try_env(directory, **env):
    return dict(UTC_ENV, TMPDIR=str(directory), CLOCKSPEED_CONF="/dev/null", **env)


def test_try_shows_the_rate_and_leaves_nothing_behind(tmp_path):
    odd = tmp_path / "a b\n'c"
    odd.mkdir()
    began_sec = time.monotonic()
    (tmp_path / "expired").write_bytes(leap_seconds_list(expires=1e9))
    done = subprocess.run([path_of("clockctl"), "try"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
                          env=try_env(odd, LC_ALL="C", LEAPSECS=str(tmp_path / "expired")))
    lines = done.stdout.decode("ascii").splitlines()
    assert done.returncode == 0, done.stderr
    assert 15 < time.monotonic() - began_sec < 60
    assert re.match(r"\d+ marks in 20 seconds; the clock was not touched", lines[-4])
    rate, error = map(float, re.search(r"counter: +(\S+) \+- (\S+) ppm", lines[-3]).groups())
    assert abs(rate) < 600 and error < 50
    assert done.stderr == b""
    assert left_behind(odd) == []


@pytest.mark.parametrize("number, status", [("INT", 130), ("TERM", 143), ("HUP", 129)])
@pytest.mark.parametrize("after_sec", [0.1, 0.5, 3])
def test_a_stopped_try_leaves_nothing_behind(tmp_path, number, status, after_sec):
    process = subprocess.Popen([path_of("clockctl"), "try"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=try_env(tmp_path))
    time.sleep(after_sec)
    process.send_signal(getattr(signal, "SIG" + number))
    assert b"Traceback" not in process.communicate(timeout=30)[1]
    assert process.returncode in (status, -getattr(signal, "SIG" + number))  # the latter: before it had begun
    assert left_behind(tmp_path) == []


# ==== the services ==================================================================================

SHELLS = [["dash"], ["busybox", "ash"], ["mksh"], ["bash"], ["bash", "--posix"], ["ksh"]]
SERVICE_SCRIPTS = sorted(os.path.relpath(os.path.join(place, name), HERE)
                         for place, _, names in os.walk(os.path.join(HERE, "svc")) for name in names
                         if name == "run" or name.endswith(".sh"))


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
@pytest.mark.parametrize("script", SERVICE_SCRIPTS)
def test_the_service_scripts_are_good_in_every_shell(script, shell):
    need(shell[0])
    path = os.path.join(HERE, script)
    assert os.access(path, os.X_OK)
    assert subprocess.run(shell + ["-n", path], stderr=subprocess.PIPE).stderr == b""
    lines = contents(path).decode().splitlines()
    assert lines[0] == "#!/bin/sh" and (not script.endswith("run") or len(lines) < 10)


def test_the_sample_configuration_is_valid_and_documented():
    values = load("clockctl").parse_assignments(contents(path_of("svc/clockspeed.conf")).decode())
    assert values == dict(CLOCKSPEED_HOME="/usr/local/clockspeed", CLOCKSPEED_BIN="/usr/local/clockspeed/bin",
                          CLOCK_TYPE="ntp", CLOCK_IP="192.0.2.1", CLOCK_ERROR="0.010")


@pytest.fixture
def public_tmp():
    """A temporary directory that other users may enter; pytest's own may not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield pathlib.Path(name)


@pytest.fixture
def supervised(public_tmp):
    """start(name, {script: text}) -> the service's directory, under a real svscan."""
    need("svscan", "supervise", "svc", "svstat")
    services = public_tmp / "service"
    services.mkdir()

    def start(name, scripts):
        place = services / ("." + name)  # which svscan passes over, until it is complete
        for script, text in scripts.items():
            (place / script).parent.mkdir(parents=True, exist_ok=True)
            (place / script).write_text(text)
            (place / script).chmod(0o755)
        os.rename(str(place), str(services / name))
        return services / name

    svscan = subprocess.Popen(["svscan", str(services)], env=UTC_ENV)
    try:
        yield start
    finally:
        svscan.terminate()
        svscan.wait()
        for place in services.iterdir():
            for each in filter(os.path.exists, (str(place), str(place / "log"))):
                subprocess.run(["svc", "-dx", each])
        assert await_that(lambda: not processes_in(public_tmp)), processes_in(public_tmp)


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
@pytest.mark.parametrize("how", ["-t", "-d"])
def test_clock_adjust_ends_at_once_and_leaves_no_sleep(supervised, host, tmp_path, shell, how):
    need(shell[0])
    shutil.copy(path_of("svc/clockspeed_adjust/clock_adjust.sh"), str(tmp_path))
    stand_in(tmp_path, "clockctl", b"said\n")
    place = supervised("adjust", {"run": "#!/bin/sh\nexport PATH=%s:$PATH WAIT=3571\nexec %s %s >log\n" % (
        tmp_path, " ".join(shell), tmp_path / "clock_adjust.sh")})

    def sleeping():
        return [pid for pid, command in processes_in(place).items() if command == "sleep 3571"]
    assert await_that(sleeping)
    old = sleeping()
    subprocess.run(["svc", how, str(place)], check=True)
    assert await_that(lambda: not set(old) & set(processes_in(place)), 5), "the sleep outlived its shell"
    if how == "-t":
        assert await_that(sleeping), "it was not started again"
    else:
        assert await_that(lambda: " down " in subprocess.run(["svstat", str(place)],
                                                             stdout=subprocess.PIPE).stdout.decode(), 5)
        assert not sleeping()


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_clock_adjust_stops_a_mark_that_is_under_way(supervised, tmp_path, shell):
    need(shell[0])
    shutil.copy(path_of("svc/clockspeed_adjust/clock_adjust.sh"), str(tmp_path))
    (tmp_path / "clockctl").write_text("#!/bin/sh\nexec sleep 3572\n")
    (tmp_path / "clockctl").chmod(0o755)
    place = supervised("adjust", {"run": "#!/bin/sh\nexport PATH=%s:$PATH\nexec %s %s >log\n" % (
        tmp_path, " ".join(shell), tmp_path / "clock_adjust.sh")})
    assert await_that(lambda: "sleep 3572" in processes_in(place).values())
    subprocess.run(["svc", "-d", str(place)], check=True)
    assert await_that(lambda: "sleep 3572" not in processes_in(place).values(), 5)


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
@pytest.mark.parametrize("answers", ["nothing", "nonsense", "waits"])
def test_the_waits_triple_and_a_failed_mark_is_tried_again_soon(tmp_path, shell, answers):
    """Also when clockctl can't tell the wait."""
    need(shell[0])
    (tmp_path / "sleep").write_text('#!/bin/sh\nprintf "%s " "$1" >> "$OUT"\n'
                                    '[ "$(wc -w < "$OUT")" -lt 13 ] || kill -TERM $PPID\n')
    (tmp_path / "clockctl").write_text(  # the fourth mark fails
        '#!/bin/sh\necho $1 >> "$OUT.ctl"\ncase $1 in\n'
        'mark) [ "$(grep -c mark "$OUT.ctl")" != 4 ] ;;\nwait) %s\nesac\n' % {
            "nothing": "exit 111", "nonsense": "echo -x", "waits": 'exec "$CLOCKCTL" "$@"'}[answers])
    for name in ("sleep", "clockctl"):
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "waits"
    done = subprocess.run(
        shell + [path_of("svc/clockspeed_adjust/clock_adjust.sh")], timeout=60, stdout=subprocess.PIPE,
        env=dict(UTC_ENV, OUT=str(out), CLOCKCTL=path_of("clockctl"), CLOCKSPEED_CONF="/dev/null",
                 CLOCKSPEED_HOME=str(tmp_path), PATH="%s:%s" % (tmp_path, os.environ["PATH"])))
    waits = [541 * 3**n for n in range(3)] + [541] + [541 * 3**n for n in range(3, 8)] + [2617923] * 4
    assert list(map(int, contents(out).split())) == waits
    assert done.stdout.decode().splitlines()[:2] == ["===", "Waiting 541 seconds until next adjustment..."]


def test_the_services_run_under_daemontools(supervised, public_tmp):
    """As installed, but for paths, users, and -n: this machine's clock is not touched."""
    need("svscan", "multilog", "setuidgid")
    if os.geteuid():
        pytest.skip("not root: setuidgid can't change the user")
    home, logs = public_tmp / "clockspeed", public_tmp / "multilog"
    for place in (home / "etc", home / "bin", logs):
        place.mkdir(parents=True)
    logs.chmod(0o777)
    for name in SCRIPTS:
        shutil.copy(path_of(name), str(home / "bin" / name))
    shutil.copy(path_of("clockctl"), str(home / "bin" / "clockctl"))
    server = "127.40.14.1"
    # The scale is that of the file for the clients and the daemons alike, else they were 27 s apart.
    (public_tmp / "clockspeed.conf").write_text(
        CONF % (home, home / "bin", "tai", server) + "CLOCK_SCALE=tai\n")
    substitutions = [
        ("/usr/local/bin/clockctl", "%s/bin/clockctl" % home),
        ("/usr/local/clockspeed/bin/clockspeed -u clocksd", "%s/bin/clockspeed -n -u nobody %s" % (home, home)),
        ("/usr/local/clockspeed/bin/taiclockd", "%s/bin/taiclockd -i %s" % (home, server)),
        ("/usr/local/clockspeed", str(home)), ("/var/multilog", str(logs)),
        ("setuidgid clocksd", "setuidgid nobody"), ("setuidgid multilog", "setuidgid nobody"),
        ("PATH=$PATH", "PATH=%s/bin:$PATH" % home),
        ("#!/bin/sh\n", "#!/bin/sh\nexport WAIT=1 WAIT_MAX=2 CLOCKSPEED_CONF=%s\n" % (
            public_tmp / "clockspeed.conf"))]

    def substituted(script):
        text = contents(os.path.join(HERE, script)).decode()
        for old, new in substitutions:
            text = text.replace(old, new)
        return text

    def log(service):
        path = logs / service / "current"
        return path.read_text() if path.exists() else ""

    places = {}
    for service in ("taiclockd", "clockspeed", "clockspeed_adjust"):
        prefix = "svc/%s/" % service
        places[service] = supervised(service, {script[len(prefix):]: substituted(script)
                                               for script in SERVICE_SCRIPTS if script.startswith(prefix)})
    assert await_that(lambda: log("clockspeed").count(" mark: offset ") >= 3, 60), log("clockspeed_adjust")
    for service in places:
        assert re.search(r"^@[0-9a-f]{24} \*\*\* Starting %s\.\.\.$" % service, log(service), re.M)
    assert re.search(r"^@\w+ mark: offset [+-]0\.0\d+ s from tai %s$" % re.escape(server),
                     log("clockspeed_adjust"), re.M)
    assert await_that(lambda: re.search(r" atto: 0\.0000000\d+ s per tick, rate ", log("clockspeed_adjust")))
    assert "Waiting 1 seconds until next adjustment..." in log("clockspeed_adjust")
    nobody = os.stat(str(logs / "clockspeed")).st_uid
    adjust = os.stat(str(home / "adjust"))
    assert adjust.st_uid == nobody and stat.S_IMODE(adjust.st_mode) == 0o600

    # Whoever makes the FIFO, at the next start it is clocksd's again.
    (home / "adjust").unlink()
    subprocess.run(["svc", "-t", str(places["clockspeed"])], check=True)
    assert await_that(lambda: (home / "adjust").exists() and os.stat(str(home / "adjust")).st_uid == nobody)
    marks = log("clockspeed").count(" mark: offset ")
    assert await_that(lambda: log("clockspeed").count(" mark: offset ") > marks), log("clockspeed")

    # A link in its place is neither followed nor given away.
    (home / "adjust").unlink()
    victim = public_tmp / "victim"
    victim.write_text("")
    (home / "adjust").symlink_to(victim)
    starts = log("clockspeed").count("Starting")
    subprocess.run(["svc", "-t", str(places["clockspeed"])], check=True)
    assert await_that(lambda: log("clockspeed").count("Starting") > starts)
    time.sleep(0.5)
    assert os.stat(str(victim)).st_uid == 0 and victim.read_text() == ""


# ==== clockctl: status, wait, metrics ================================================================

def a_status(age_sec=100, **changes):
    """What clockspeed writes: 10 us of error and 0.01 ppm of rate error, of which 1 ms is made in a day."""
    ticks_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    boot_id = contents("/proc/sys/kernel/random/boot_id").decode().strip()
    status = {
        "version": 1, "pid": os.getpid(), "boot_id": boot_id,
        "observe_only": False, "tick_ns": ticks_ns - int(age_sec * 10**9), "written_ns": time.time_ns(),
        "offset_ns": -1500, "variance": [1e8, 0.0, 100.0, 0.0], "rate_ppm": 12.34567, "rate_error_ppm": 0.01,
        "noise_ns": 21000.0, "wander": 1.2e-9, "marks": {"used": 12, "doubted": 0, "refused": 1},
        "last_mark": {"tick_ns": ticks_ns - 3600 * 10**9, "offset_ns": 123456, "outcome": "used"},
        "kernel": {"freq_ppm": 12.3, "tick": 10000, "maxerror_us": 1200, "esterror_us": 20,
                   "synchronised": True},
        "leap": {"source": "built in", "expires": 1782604800, "tai_offset": 37, "next": None},
        "asking_early": False}
    return dict(status, **changes)


@pytest.fixture
def told(host):
    """Write etc/status; call a command."""
    def tell(status):
        text = status if isinstance(status, bytes) else json.dumps(status).encode()
        (host.home / "etc" / "status").write_bytes(text)
        return host
    return tell


def test_a_status_is_what_clockspeed_writes(simulate, tmp_path):
    simulate(FakeKernel()).mark()
    written = json.loads(contents(tmp_path / "etc" / "status"))
    assert set(written) == set(a_status()) | {"doing"}
    for name in ("last_mark", "kernel", "leap", "marks"):
        assert set(written[name]) == set(a_status()[name]), name


def test_status_is_a_page_that_tells_how_wrong_the_clock_can_be(told):
    done = told(a_status()).clockctl("status", LC_ALL="C.UTF-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.decode() == """\
clockspeed    runs as process %d, steering the clock
clock now     ± 10 µs; still to be corrected: -1.5 µs
in an hour    ± 38.3 µs
in a day      ± 865 µs
in a month    ± 25.9 ms
rate          +12.3457 ± 0.0100 ppm
wander, noise 1.2e-09 per √s, 21 µs per mark
marks         12 used, 0 doubted, 1 refused
last mark     60 min ago, offset +123 µs, used
next mark     as clockspeed_adjust has it (CLOCK_ERROR is not set)
kernel        synchronised, frequency +12.300 ppm, tick 10000, error 1.2 ms at most
leap seconds  TAI - UTC is 37 s
leap table    built in, expired on 2026-06-28: `clockctl leap FILE` takes a newer one
""" % os.getpid()
    assert told(a_status()).clockctl("status", LC_ALL="C").stdout.isascii()


@pytest.mark.parametrize("changes, shown", [
    (dict(boot_id="other"), "clockspeed    clockspeed has not run since the last boot\n"),
    (dict(pid=2**22 + 1), "clockspeed    clockspeed does not run any more\n"),
    (dict(age_sec=7200), "clockspeed    clockspeed has written nothing for 2 h\n"),
    (dict(age_sec=-10), "clockspeed    clockspeed has not run since the last boot\n"),
    (dict(variance=None, offset_ns=None, last_mark=None), "clock now     not known: no mark yet\n"),
    (dict(asking_early=True), "next mark     at once: the last one is in doubt\n"),
    (dict(kernel=None, last_mark=None), "refused\nleap seconds"),
    (dict(leap={"source": "/etc/leapsecs.dat", "expires": None, "tai_offset": 37, "next": [1798761600, -1]}),
     "TAI - UTC is 37 s, -1 s at the end of 2026-12-31\nleap table    /etc/leapsecs.dat\n"),
    (dict(leap={"source": "built in", "expires": None, "tai_offset": 10, "next": None}),
     "leap seconds  the clock counts them, on the tai scale\nleap table    built in\n"),
    (dict(written_ns=10**40), "steering the clock"),
    (dict(written_ns=10**40, boot_id=""), "last written  Unix second 1"),
])
def test_status_in_other_situations(told, changes, shown):
    done = told(a_status(**changes)).clockctl("status", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout.decode()


def test_status_tells_when_the_next_mark_is_wanted(told):
    host = told(a_status())
    host.write_conf("CLOCKSPEED_HOME=%s CLOCK_ERROR=0.001" % host.home)
    assert "next mark     in 27.7 h, when the error reaches 1 ms\n" in host.clockctl("status").stdout.decode()
    host.write_conf("CLOCKSPEED_HOME=%s CLOCK_ERROR=0.1" % host.home)
    assert "not within a month: the error stays below 100 ms\n" in host.clockctl("status").stdout.decode()


def test_status_for_machines_adds_what_it_means_now(told):
    status = a_status()
    shown = json.loads(told(status).clockctl("status", "--json").stdout)
    now = shown.pop("now")
    assert shown == status
    assert now["problem"] is None and now["mark_wanted_sec"] is None and 100 <= now["age_sec"] < 160
    assert now["error_ns"] == pytest.approx(1e4, rel=0.1)
    for label, ahead_sec in (("hour", 3600), ("day", 86400), ("month", 2592000)):
        assert now["error_ns_in"][label] == pytest.approx((1e8 + 100 * (100 + ahead_sec)**2)**0.5, rel=0.1)
    now = json.loads(told(a_status(boot_id="other")).clockctl("status", "--json").stdout)["now"]
    assert now["error_ns"] is None and now["problem"] == "clockspeed has not run since the last boot"


def damaged_statuses():
    yield json.dumps(a_status(doing="\x1b[2J\ud800", leap=dict(a_status()["leap"], source="\udcff"))).encode()
    yield from (b"", b"{", b"[]", b"null", b"3", b"[" * 60000, b"\xff", b"{}", b"1" * 5000)
    for name in a_status():
        for value in ("x", [], {}, float("nan"), float("inf"), 10**400, [1], {"used": "x"}, -1, None, True):
            yield json.dumps(dict(a_status(), **{name: value})).encode()
        yield json.dumps({key: value for key, value in a_status().items() if key != name}).encode()


def test_whatever_the_status_holds_there_is_no_traceback(told, capfd):
    """In this process, since there are many."""
    clockctl = load("clockctl")
    for text in damaged_statuses():
        host = told(text)
        config = dict(clockctl.DEFAULTS, CLOCKSPEED_HOME=str(host.home), CLOCK_ERROR="0.001")
        for command, options, operands in (
                (clockctl.show_status, {}, []), (clockctl.show_status, {"--json": ""}, []),
                (clockctl.wait, {}, ["541", "2617923"]), (clockctl.metrics, {}, [])):
            try:
                command(config, options, operands)
            except clockctl.Failure as err:
                assert str(err).startswith("unable to read %s/etc/status: it is damaged" % host.home)
    assert "\x1b" not in capfd.readouterr().out


def test_a_missing_status_says_what_to_do(host):
    done = host.clockctl("status")
    assert done.returncode == 111
    assert done.stderr == "clockctl: fatal: unable to read %s/etc/status: there is none: %s\n" % (
        host.home, "clockspeed (in Python) has not run here")


@pytest.mark.parametrize("error, last_sec, most_sec, changes, wanted_sec", [
    ("", 541, 2617923, {}, 1623),
    ("", 541, 541, {}, 541),
    ("", 872641, 2617923, {}, 2617923),
    ("", 872642, 2617923, {}, 2617923),
    ("", 1, 3600, {}, 64),
    ("", 541, 10, {}, 10),
    ("0.001", 541, 2617923, {}, 1623),
    ("0.001", 541000, 2617923, {}, 99895),  # 1 ms after 99995 s, 100 of which have gone by
    ("0.000001", 541, 2617923, {}, 64),
    ("1e9", 541, 2617923, {}, 1623),
    ("0.001", 541000, 2617923, dict(asking_early=True), 64),
    ("", 541, 2617923, dict(asking_early=True), 64),
    ("0.001", 541, 2617923, dict(variance=None, offset_ns=None), 1623),
])
def test_wait_triples_or_is_what_the_accuracy_allows(told, error, last_sec, most_sec, changes, wanted_sec):
    host = told(a_status(**changes))
    host.write_conf("CLOCKSPEED_HOME=%s CLOCK_ERROR=%s" % (host.home, error))
    done = host.clockctl("wait", last_sec, most_sec)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == pytest.approx(wanted_sec, abs=30 if wanted_sec == 99895 else 0)


@pytest.mark.parametrize("status, warning", [
    (None, ""),
    (b"{", "unable to read {home}/etc/status: it is damaged"),
    (dict(boot_id="other"), "unable to go by the status: clockspeed has not run since the last boot"),
    (dict(age_sec=1300), "unable to go by the status: clockspeed has written nothing for 21.7 min"),
])
def test_wait_triples_without_a_status_of_now(told, host, status, warning):
    if status:
        told(a_status(**status) if isinstance(status, dict) else status)
    done = host.clockctl("wait", 541, 2617923)
    assert (done.returncode, done.stdout) == (0, b"1623\n")
    assert done.stderr == ("clockctl: warning: %s\n" % warning.format(home=host.home) if warning else "")


def test_wait_refuses_a_wrong_accuracy(told):
    for wrong in ("soon", "-1", "nan", "inf", "0"):
        host = told(a_status())
        host.write_conf("CLOCKSPEED_HOME=%s CLOCK_ERROR=%s" % (host.home, wrong))
        done = host.clockctl("wait", 541, 2617923)
        assert (done.returncode, done.stdout) == (111, b"")
        assert done.stderr == ("clockctl: fatal: unable to tell the accuracy asked for: "
                               "CLOCK_ERROR is not a number of seconds in %s\n" % host.conf)


def test_wait_lets_clockspeed_take_in_the_mark_first(told):
    host = told(a_status())
    os.utime(str(host.home / "etc" / "status"), (0, 0))
    reader = host.make_fifo()
    process = subprocess.Popen([path_of("clockctl"), "wait", "541", "2617923"], stdout=subprocess.PIPE,
                               env=dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf)))
    time.sleep(0.3)
    told(a_status(asking_early=True))
    assert process.communicate(timeout=60)[0] == b"64\n"
    os.close(reader)


METRIC = re.compile(r'(clockspeed_[a-z_]+)(\{outcome="[a-z]+"\})? (-?[0-9.e+-]+)$')


def test_metrics_are_what_prometheus_reads(told, tmp_path):
    lines = told(a_status()).clockctl("metrics").stdout.decode().splitlines()
    values, helped, typed = {}, set(), {}
    for line in lines:
        if line.startswith("# HELP "):
            helped.add(line.split()[2])
        elif line.startswith("# TYPE "):
            typed[line.split()[2]] = line.split()[3]
        else:
            name, label, value = METRIC.match(line).groups()
            assert name in helped and typed[name] == ("counter" if name.endswith("_total") else "gauge")
            values[name + (label or "")] = float(value)
    assert values["clockspeed_up"] == 1
    assert values["clockspeed_offset_seconds"] == -1.5e-6
    assert values["clockspeed_error_seconds"] == pytest.approx(10e-6, rel=0.1)
    assert values["clockspeed_rate_ratio"] == pytest.approx(12.34567e-6)
    assert values['clockspeed_marks_total{outcome="used"}'] == 12
    assert values["clockspeed_last_mark_timestamp_seconds"] == pytest.approx(time.time() - 3600, abs=60)
    output = tmp_path / "clockspeed.prom"
    output.write_text("old")
    assert told(a_status()).clockctl("metrics", "--output", output).stdout == b""
    assert output.read_text().startswith("# HELP clockspeed_up ")
    assert sorted(os.listdir(str(tmp_path))) == ["bin", "clockspeed.conf", "clockspeed.prom", "home"]


@pytest.mark.parametrize("changes", [dict(boot_id="other"), dict(pid=2**22 + 1), dict(age_sec=7200), None])
def test_metrics_of_a_clockspeed_that_does_not_run(told, host, changes):
    if changes:
        told(a_status(**changes))
    done = host.clockctl("metrics")
    assert done.returncode == 0 and done.stderr.startswith("clockctl: warning: unable to ")
    assert done.stdout.decode().splitlines()[2:] == ["clockspeed_up 0"]


def test_metrics_that_can_not_be_written_are_a_clear_line(told, tmp_path):
    path = tmp_path / "missing" / "x.prom"
    done = told(a_status()).clockctl("metrics", "--output", path)
    assert (done.returncode, done.stderr) == (
        111, "clockctl: fatal: unable to write %s: No such file or directory\n" % path)


# ==== clockctl: graph ================================================================================

def label(unix_sec):
    return "@%016x%08x" % (2**62 + 10 + int(unix_sec), int(unix_sec % 1 * 1e9))


def mark_line(unix_sec, offset_sec, error_sec=2e-5, rate_ppm=12.5, rate_error_ppm=0.01, outcome="used"):
    return "%s mark: offset %+.9f s, error %.9f s, rate %+.4f ppm, rate error %.4f ppm, %s\n" % (
        label(unix_sec), offset_sec, error_sec, rate_ppm, rate_error_ppm, outcome)


DAYS = [1790000000 + 86400 * n for n in range(60)]


@pytest.fixture
def log(tmp_path):
    """A multilog directory: two old files, the current one, and what else is found there."""
    directory = tmp_path / "log"
    directory.mkdir()
    lines = [mark_line(day, 1e-3 * (n % 7 - 3), 10.0**-(2 + n / 20), 12 + n / 60)
             for n, day in enumerate(DAYS)]
    lines[0] = mark_line(DAYS[0], 5.0)  # the first mark of a new clock
    lines.insert(5, label(DAYS[4] + 5) + " start: steering the clock\n")
    lines.insert(6, mark_line(DAYS[4] + 5, 9.0).partition(" ")[2])
    lines.insert(7, mark_line(DAYS[4] + 9, 3.0, outcome="doubted"))
    lines.insert(8, mark_line(DAYS[4] + 9, float("nan")) + "\xff\0\n" + label(0)[:9] + "\n")
    (directory / (label(DAYS[20]) + ".s")).write_text("".join(lines[:24]), "latin-1")
    (directory / (label(DAYS[40]) + ".u")).write_text("".join(lines[24:44]), "latin-1")
    (directory / "current").write_text("".join(lines[44:]), "latin-1")
    for name in ("lock", "state", "note.txt"):
        (directory / name).write_text(lines[3])
    return str(directory)


def graph(log, *args, **env):
    return run("clockctl", "graph", *args, CLOCKSPEED_CONF="/dev/null", CLOCKSPEED_LOG=log, **env)


def test_csv_has_every_mark_in_order(log):
    rows = [line.split(",") for line in graph(log, "--csv").stdout.decode().splitlines()]
    assert rows[0] == "time offset_seconds error_seconds rate_ppm rate_error_ppm outcome".split()
    assert len(rows) == 62 and [row[0] for row in rows] == [rows[0][0]] + sorted(row[0] for row in rows[1:])
    assert rows[1] == ["2026-09-21T14:13:20Z", "+5.000000000", "0.000020000", "+12.5000", "0.0100", "used"]
    assert [row[5] for row in rows].count("doubted") == 1


@pytest.mark.parametrize("what, ticks", [
    ("offset", ["+2 ms", "0 s", "-2 ms"]), ("rate", ["+12.2 ppm", "+12.8 ppm"]),
    ("error", ["10 ms", "1 ms", "100 us", "10 us"])])
@pytest.mark.parametrize("columns", [40, 80, 132])
def test_a_graph_fits_the_terminal_and_has_real_units_and_dates(log, what, ticks, columns):
    for args, locale in ((["--ascii"], "C.UTF-8"), ([], "C"), ([], "C.UTF-8")):
        text = graph(log, what, *args, COLUMNS=str(columns), LINES="24", LC_ALL=locale).stdout.decode()
        title, *lines = text.splitlines()
        assert "marks: 60 used, 1 doubted or refused" in title
        assert max(map(len, lines)) <= columns and len(lines) == 20
        assert lines[-1].split()[0] == "2026-09-21" and lines[-1].split()[-1] == "2026-11-19"
        shown = [line[:11].replace("µ", "u") for line in lines]
        assert all(any(tick in start for start in shown) for tick in ticks), text
        assert any("\u2800" <= char <= "\u28ff" for char in text) == (locale != "C" and not args)
        assert text.isascii() or locale != "C"


def test_the_line_of_a_graph_has_no_gaps_and_shows_peaks():
    clockctl = load("clockctl")
    rng = random.Random(SEED)
    points = sorted((rng.random() * 1000, rng.gauss(0, 1)) for _ in range(5000))
    peak = points[2500] = (points[2500][0], 9.0)
    chart = clockctl.Chart("rate", [
        (b"%010x" % int(at + 10), b"00000000", b"0", b"0", b"%.4f" % value, b"0", b"used")
        for at, value in points])
    reached = list(chart.strokes(120, 80))
    assert {column for column, _, _ in reached} == set(range(120))
    assert any(top == 0 and abs(column - peak[0] * 119 / 1000) < 2 for column, top, _ in reached)
    for (_, top, bottom), (_, next_top, next_bottom) in zip(reached, reached[1:]):
        assert max(top, next_top) <= min(bottom, next_bottom), "the line is broken"


def test_an_svg_is_well_formed_and_follows_light_and_dark(log, tmp_path):
    path = tmp_path / "rate.svg"
    assert graph(log, "rate", "--svg", path).returncode == 0
    text = path.read_text()
    root = xml.dom.minidom.parseString(text).documentElement
    assert root.tagName == "svg" and "prefers-color-scheme: dark" in text
    assert root.getElementsByTagName("rect"), "no background but the viewer's"
    points = [tuple(map(float, point.split(","))) for point in
              root.getElementsByTagName("polyline")[0].getAttribute("points").split()]
    assert points[0][0] == 100 and points[-1][0] == 740 and all(50 <= y <= 350 for _, y in points)
    assert points == sorted(points, key=lambda point: point[0])


@pytest.mark.parametrize("args, marks", [([], 1), (["rate"], 2), (["error"], 1), (["offset", "--ascii"], 2)])
def test_a_graph_of_one_mark_or_of_equal_ones(tmp_path, args, marks):
    (tmp_path / "current").write_text("".join(mark_line(DAYS[n], 0) for n in range(marks)))
    done = graph(str(tmp_path), *args)
    assert done.returncode == 0 and done.stderr == ""
    assert graph(str(tmp_path), *args[:1], "--svg", str(tmp_path / "x.svg")).returncode == 0


def test_a_log_without_marks_or_no_log_is_a_clear_line(tmp_path):
    refused = mark_line(DAYS[0], 1, outcome="refused")
    (tmp_path / "current").write_text(label(DAYS[0]) + " start: observing\n" + refused)
    assert graph(str(tmp_path)).stderr == (
        "clockctl: fatal: unable to draw the offset: there is no mark in the log (CLOCKSPEED_LOG) yet\n")
    done = graph(str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (
        111, "clockctl: fatal: unable to read the log %s/none: No such file or directory; "
             "CLOCKSPEED_LOG tells where it is\n" % tmp_path)


def test_random_logs_draw_or_say_why_not(tmp_path, capfd):
    clockctl, rng = load("clockctl"), random.Random(SEED)

    def size(least):
        return rng.gauss(0, 10.0**rng.randrange(least, 9))

    for _ in range(150):
        lines = [mark_line(rng.choice([0, 1e9, 1.79e9, 2**33]) + rng.random() * 10**rng.randrange(8),
                           size(-9), abs(size(-9)), size(-4)) for _ in range(rng.randrange(5))]
        text = bytearray("".join(lines).encode())
        for _ in range(rng.randrange(3) if text else 0):
            text[rng.randrange(len(text))] = rng.randrange(256)
        (tmp_path / "current").write_bytes(bytes(text))
        for what in clockctl.CHARTS:
            for options in ({}, {"--ascii": ""}, {"--csv": ""}, {"--svg": str(tmp_path / "x.svg")}):
                try:
                    clockctl.graph({"CLOCKSPEED_LOG": str(tmp_path)}, options, [what])
                except clockctl.Failure as err:
                    assert "there is no mark" in str(err)
    capfd.readouterr()


# ==== the estimator =========================================================================


bench_all = load("bench_all")  # the simulated worlds, and what is wanted in them
NOISE_OF_FEW_SEEDS = 1.3  # how much looser than bench_all's limits, which are for many seeds
DAY_NS = 86400 * 10**9


@pytest.mark.parametrize("name", ("w 1e-9, 4 a mark, 3600 s", "LAN, 8 a mark, 1024 s"))
def test_estimator_comes_near_the_filter_that_is_told_everything(name):
    options, _, goal_ms, most = bench_all.SPREADS[name]
    error_sec, ratio, honesty, _, outside = bench_all.compare_informed(options, range(SEED, SEED + 2))
    assert error_sec < goal_ms * 1e-3 * 2 and ratio < most * NOISE_OF_FEW_SEEDS
    assert bench_all.RATIO_LEAST / NOISE_OF_FEW_SEEDS < honesty < bench_all.RATIO_MOST * NOISE_OF_FEW_SEEDS
    assert not outside, "of the bound"


def test_estimator_without_spreads_reaches_what_it_did():
    options, _, most_sec, most_marks = bench_all.TABLE["w 1e-9, 2 ms, asked 10 ms"]
    error_sec, _, ratio, marks = bench_all.compare(options, [SEED, SEED + 1])
    assert error_sec < most_sec * NOISE_OF_FEW_SEEDS and marks < most_marks * NOISE_OF_FEW_SEEDS
    assert bench_all.RATIO_LEAST / NOISE_OF_FEW_SEEDS < ratio < bench_all.RATIO_MOST * NOISE_OF_FEW_SEEDS


@pytest.mark.parametrize("out, back, lean", ((bench_all.exponential(5e-3), bench_all.none, 1),
                                             (bench_all.none, bench_all.exponential(5e-3), -1),
                                             (bench_all.exponential(5e-3), None, 0)))
def test_estimator_learns_to_which_side_queueing_leans(out, back, lean):
    run = bench_all.simulate(SEED, 1, bench_all.Queues(out=out, back=back), bench_all.every(1024))
    assert run.estimator.path.lean == pytest.approx(lean, abs=0.35)
    assert run.rms(bench_all.DAY / 2) < 1.5e-3


@pytest.mark.parametrize("name", ("floor 30 ms up, 4 a mark", "floor 30 ms down, 4 a mark"))
def test_estimator_notices_that_the_path_changed(name):
    (before_sec, *after_sec), worst = bench_all.moved(*bench_all.MOVES[name], [SEED])
    assert worst < 4 and max(after_sec[5:]) < 2 * before_sec


def test_a_spread_that_tells_nothing_is_no_worse_than_none():
    errors = []
    for spread_sec in (None, 0.02):
        def noise(rng, index, exchanges, spread_sec=spread_sec):
            return bench_all.normal(1e-3)(rng, index, exchanges)._replace(spread_sec=spread_sec)
        errors.append(bench_all.simulate(SEED, 2, noise, bench_all.every(1024)).rms(bench_all.DAY / 2))
    assert errors[1] < 1.1 * errors[0]


def test_estimator_learns_the_wave_of_the_day():
    error_sec, _, _, packets = bench_all.compare(bench_all.OTHERS["2 ms, 1 ppm, asked 10 ms"], [SEED])
    assert error_sec < 0.010 and packets < 60, "without a wave it takes over 200"


def test_estimator_lives_with_wild_marks():
    assert bench_all.wild_price(1, 20e-6, 1024, 1e-9, [SEED, SEED + 1]) < bench_all.WILD_MOST


@pytest.mark.parametrize("index", (0, 1, 2))
def test_estimator_recovers_from_a_wild_beginning(index):
    noise = bench_all.normal(20e-6)
    run = bench_all.simulate(SEED, 0.5, bench_all.wild(noise, 0.0, [index]), bench_all.every(1024))
    assert run.rms(bench_all.DAY / 4) < 2 * bench_all.simulate(SEED, 0.5, noise, bench_all.every(1024)).rms(
        bench_all.DAY / 4)


@pytest.mark.parametrize("sigma, change", bench_all.CHANGES[::2])
def test_estimator_recovers_within_four_marks(sigma, change):
    normal_sec, *after_sec = bench_all.recovery(sigma, [SEED], **change)
    assert after_sec[0] > 1.5 * normal_sec, "or nothing happened"
    assert after_sec[3] < 2.5 * normal_sec


def settled(**options):
    """An estimator after two days of marks -> (it, the tick of its last mark, real time then)."""
    noise = bench_all.normal(options.pop("noise", 1e-4))
    run = bench_all.simulate(SEED, options.pop("days", 1), noise, bench_all.every(1024), **options)
    tick_ns = bench_all.TICK0_NS + int(run.marks[-1][0] * 1e9)
    return run.estimator, tick_ns, run.estimator.real(tick_ns)[0]


def later(estimator, tick_ns, off_ns=0):
    """A mark as the estimator expects it, or off by so much."""
    return tick_ns, estimator.real(tick_ns)[0] + off_ns


def test_a_lone_wild_mark_leaves_no_trace():
    (estimator, tick_ns, _), twin = settled(), settled()[0]
    assert estimator.mark(*later(estimator, tick_ns + 10**12, 10**9), 10**6) == "doubted"
    assert estimator.doubts() and estimator.next_mark(tick_ns + 10**12, 10**9) == 0
    assert estimator.next_mark_plan(tick_ns + 10**12, 10**9).wait_sec == 64
    assert estimator.rate() == twin.rate()
    for sec in (0, 10, 10**4, 10**7):
        assert estimator.real(tick_ns + sec * 10**9) == twin.real(tick_ns + sec * 10**9)
    mark = later(twin, tick_ns + 2 * 10**12)
    assert estimator.mark(*mark) == twin.mark(*mark) == "used"
    assert dict(estimator.state(), exchanges=1) == twin.state(), "for ever"


@pytest.mark.parametrize("step_ns", (-10**16, -10**9, 10**7, 36 * 10**11))
def test_two_marks_that_agree_are_a_step(step_ns):
    estimator, tick_ns, _ = settled()
    rate_ppm = estimator.rate()[0]
    marks = [later(estimator, tick_ns + index * 10**12, step_ns) for index in (1, 2)]
    assert [estimator.mark(*mark) for mark in marks] == ["doubted", "used"]
    assert abs(estimator.real(marks[1][0])[0] - marks[1][1]) < 10**6
    assert abs(estimator.rate()[0] - rate_ppm) < 0.5, "never learned as drift"


@pytest.mark.parametrize("ppm", (90500, -5000, 1500))
def test_no_rate_over_1000_ppm_is_ever_believed(ppm):
    for estimator, tick_ns, real_ns in settled(), (bench_all.Estimator(), 0, 18 * 10**17):
        for index in range(1, 12):
            estimator.mark(tick_ns + index * 10**11, real_ns + index * 10**11 + index * ppm * 10**5, 10**6)
            assert abs(estimator.rate()[0]) <= 1000 and abs(estimator.rate_at(tick_ns + 10**13)) <= 1000
        state = estimator.state()
        state["mean"][1] = ppm * 1e3
        with pytest.raises(ValueError):
            bench_all.Estimator.from_state(state)
    with pytest.raises(ValueError):
        bench_all.Estimator(ppm)


def test_nothing_hangs_for_ever_on_an_old_belief_and_each_mark_costs_little():
    estimator, tick_ns, _ = settled()
    rng, outcomes, used = random.Random(SEED), set(), []
    for index in range(1, 25):
        start = time.process_time()
        outcomes.add(estimator.mark(tick_ns + index * 10**12, rng.randrange(10**18, 2 * 10**18), 10**6))
        used.append(time.process_time() - start)
    assert "used" in outcomes and sorted(used)[-3] < 0.1, "a slow core; 20 ms on a usual one"


def test_estimator_refuses_what_is_no_mark():
    estimator, tick_ns, real_ns = settled()
    state = estimator.state()
    for mark in ((tick_ns, real_ns), (tick_ns - 1, real_ns), (None, real_ns), (tick_ns + 1, 1.5), ("1", "2"),
                 (1 << 64, real_ns), (tick_ns + 1, float("nan")), (True, real_ns), (tick_ns + 1, -1 << 200),
                 (tick_ns + 1, real_ns, -1), (tick_ns + 1, real_ns, 1e6), (tick_ns + 1, real_ns, 1 << 64)):
        assert estimator.mark(*mark) == "refused"
    assert estimator.state() == state


WORLDS = {}, {"daily_ppm": 1.0, "wander": 1e-10, "noise": 2e-3, "days": 3}


@pytest.mark.parametrize("world", WORLDS)
def test_next_mark_is_monotone_and_exact(world):
    estimator, tick_ns, _ = settled(**world)
    targets_ns = [10**(exponent / 4) for exponent in range(12, 50)]
    waits = [estimator.next_mark(tick_ns, target_ns) for target_ns in targets_ns]
    assert waits == sorted(waits) and waits[0] == 0 and waits[-1] > 10**6
    for target_ns, wait_sec in zip(targets_ns, waits):
        if 0 < wait_sec < 1e8:
            assert estimator.real(tick_ns + int((wait_sec - 2) * 1e9))[1] < target_ns
            assert estimator.real(tick_ns + int((wait_sec + 2) * 1e9))[1] > target_ns * 0.999
    assert estimator.next_mark(tick_ns, float("nan")) == estimator.next_mark(tick_ns, -1) == 0
    assert estimator.next_mark(tick_ns, float("inf")) == 1e8


def test_a_plan_takes_many_exchanges_where_queueing_is_the_noise_and_one_where_wander_is():
    estimator = bench_all.simulate(SEED, 1, bench_all.WAN, bench_all.every(1024)).estimator
    for target_ns, least, most in (10**6, 2, 8), (10**9, 1, 1):
        assert least <= estimator.next_mark_plan(estimator.last.tick_ns, target_ns).exchanges <= most
        assert estimator.next_mark_plan(estimator.last.tick_ns, target_ns, 1).exchanges == 1
    assert bench_all.Estimator().next_mark_plan(0, 10**6) == (64, 1)


@pytest.mark.parametrize("world", WORLDS)
def test_variance_foretells_the_error(world):
    estimator, tick_ns, _ = settled(**world)
    tick_ns += 10**12
    factors = estimator.variance(tick_ns)
    for sec in (0, 60, 3600, 21600, 43200, 86400, 10**6, 10**7):
        foretold = sum(factor * sec**power for power, factor in enumerate(factors))**0.5
        error_ns = estimator.real(tick_ns + sec * 10**9)[1]
        assert error_ns * 0.95 < foretold < error_ns * 3
    assert factors[0]**0.5 == pytest.approx(estimator.real(tick_ns)[1])


def test_the_wave_outlives_a_boot():
    estimator, tick_ns, _ = settled(days=6, daily_ppm=1.0, wander=1e-11, noise=1e-4)
    expected = [estimator.real(tick_ns + DAY_NS + hour * 36 * 10**11)[0] for hour in range(24)]
    rates = [estimator.rate_at(tick_ns + hour * 36 * 10**11) for hour in range(24)]
    assert 1.8 < max(rates) - min(rates) < 2.2, "twice 1 ppm"
    estimator.forget_phase(0)
    assert estimator.mark(5 * 10**9, expected[0]) == "used", "the counter begins anew, a day later"
    again = [estimator.real(5 * 10**9 + hour * 36 * 10**11)[0] for hour in range(24)]
    assert max(abs(a - b) for a, b in zip(again, expected)) < 3 * 10**6, "without the wave it is 27 ms"


def some_states():
    """(class, state) of all kinds: new, with a rate only, settled, in doubt, after a boot; a bound."""
    doubting, tick_ns, _ = settled()
    for index in range(1, 4):
        doubting.mark(*later(doubting, tick_ns + index * 10**12, index**2 * 10**9), 10**6)
    booted = settled(daily_ppm=1.0)[0]
    booted.forget_phase(1.0)
    run = bench_all.simulate(SEED, 1, bench_all.WAN, bench_all.every(3600))
    known = [bench_all.Estimator(), bench_all.Estimator(50.0, 10.0), doubting, booted, run.estimator,
             bench_all.Bound(), run.bound]
    return [(type(each), each.state()) for each in known]


def test_states_go_on_to_the_last_bit():
    for kind, state in some_states():
        text = json.dumps(state)
        one, two = (kind.from_state(json.loads(text)) for _ in range(2))
        assert json.dumps(one.state()) == text
        for index in range(1, 5):
            mark = 8 * 10**14 + index * 10**12, 18 * 10**17 + index * 10**12 + index % 2 * 10**5, 10**7, 10**6
            two = kind.from_state(json.loads(json.dumps(two.state())))
            arguments = mark if kind is bench_all.Bound else mark[:3]
            assert one.mark(*arguments) == two.mark(*arguments)
        assert json.dumps(one.state()) == json.dumps(two.state())


def damage(state, rng):
    """Change or drop something at a random place."""
    here = state
    while True:
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        if not (isinstance(here[key], (dict, list)) and here[key]) or rng.random() < 0.15:
            break
        here = here[key]
    if rng.random() < 0.2:
        del here[key]
    else:
        here[key] = rng.choice([None, True, 0, 1, -1, 1e300, -1e300, 1e30, -1e30, float("nan"), float("inf"),
                                10**400, "x", [], {}, [[]], [1, 2, 3], 1e-300, 10**19, 0.5, 186])


def test_a_hostile_state_is_a_value_error_or_does_no_harm():
    rng, states, outcomes = random.Random(SEED), some_states(), set()
    for _ in range(300):
        kind, state = rng.choice(states)
        state = json.loads(json.dumps(state))
        for _ in range(rng.choice((1, 1, 2, 5))):
            damage(state, rng)
        try:
            taken = kind.from_state(state)
        except ValueError:
            outcomes.add("ValueError")
            continue
        outcomes.add("taken")
        for tick_ns in (10**15, 10**15 + 1, 10**17):
            mark = tick_ns, 18 * 10**17 + tick_ns, 10**7, 10**6
            taken.mark(*(mark if kind is bench_all.Bound else mark[:3]))
        if kind is bench_all.Bound:
            assert taken.at(tick_ns)[0] <= taken.at(tick_ns)[1]
            continue
        if taken.has_phase():
            assert taken.real(tick_ns)[1] >= 0 and len(taken.variance(tick_ns)) == 4
        assert taken.rate()[1] >= 0 and min(taken.learned()) > 0 and abs(taken.rate_at(tick_ns)) <= 1000
        assert taken.next_mark_plan(tick_ns, 1e6).wait_sec >= 64
    assert outcomes == {"ValueError", "taken"}
    for kind in (bench_all.Estimator, bench_all.Bound):
        for state in (None, 1, "x", [], {}, float("nan")):
            with pytest.raises(ValueError):
                kind.from_state(state)


@pytest.mark.parametrize("world", ({}, {"daily_ppm": 1.0}, {"wander": 1e-10}))
def test_real_time_is_within_the_bound_which_grows_slowly_in_the_dark(world):
    noise = bench_all.Queues(asymmetry_sec=0.1 if world else 0.0)
    run = bench_all.simulate(SEED, 3, noise, bench_all.every(7200), bench_all.TwoPoints, dark_days=1, **world)
    assert not run.outside
    assert world or (run.widths[-1][1] - run.widths[-290][1]) / 2 < 15e-6 * 86400 / 10


def test_the_bound_is_what_marks_prove_and_can_be_carried_on_by_its_formula():
    bound = bench_all.Bound()
    assert bound.at(5) is None and bound.coefficients() is None and bound.mark(5, 5, None, 1) == "refused"
    assert bound.mark(10**12, 10**18, 10**7, 10**6) == "used"
    assert bound.at(10**12) == (10**18 - 11 * 10**6, 10**18 + 11 * 10**6)
    assert bound.at(2 * 10**12)[1] - 10**18 == 10**12 + 11 * 10**6 + 10**9, "1000 ppm before a second mark"
    for index in range(1, 100):
        assert bound.mark(10**12 + index * 36 * 10**11, 10**18 + index * 36 * 10**11, 10**7, 10**6) == "used"
    known = bound.coefficients()
    for sec in (0, 3600, 86400, 10**6):
        change_ppm = known["change_ppm"] * max(1, sec / 86400)**0.5
        more_ns = sec * 1000 * min(known["fast_ppm"] + change_ppm, 1000)
        latest_ns = bound.at(known["tick_ns"] + sec * 10**9)[1]
        assert abs(latest_ns - known["latest_ns"] - sec * 10**9 - more_ns) < 2


def test_a_mark_that_contradicts_the_bound_begins_it_anew_and_wider():
    bound = bench_all.Bound()
    outcomes = []
    for tick_ns in range(36 * 10**11, 60 * 36 * 10**11, 36 * 10**11):
        lie_ns = 10**10 if tick_ns == 50 * 36 * 10**11 else 0
        outcomes.append(bound.mark(tick_ns, 10**18 + tick_ns + lie_ns, 10**7, 10**6))
    assert [index for index, outcome in enumerate(outcomes, 1) if outcome == "restarted"] == [50, 51]
    assert bound.allowed_ppm == 4 * bench_all.load("clockspeed").CHANGE_PPM
    bound.forget()
    assert bound.at(10**15) is None


def test_replay_makes_each_estimate_of_a_log_again():
    estimator, bound, lines = bench_all.Estimator(), bench_all.Bound(), ["start: steering, no rate known"]
    rng = random.Random(SEED)
    for index in range(1, 20):
        tick_ns, spread_ns = index * 10**12, rng.randrange(2 * 10**7, 3 * 10**7)
        mark = tick_ns, 18 * 10**17 + tick_ns + rng.randrange(10**6), spread_ns if index % 5 else None, 10**6
        if index == 10:
            lines.append("suspend: 100 s")
            estimator.forget_phase(0.0)
            bound.forget()
        found = bench_all.replayed(estimator, bound, *mark)
        lines.append("@4000000068dcd2a5075bcd15 mark: tick %d ns, real %d ns, spread %s ns, distance %s ns,"
                     " offset +0.000123456 s, %s" % (*mark[:2], *(mark[2:] if mark[2] else "--"), found))
    assert bench_all.replay(lines) == (19, [])
    assert len(bench_all.replay(lines[:5] + lines[6:])[1]) > 5, "each mark counts"


# ==== svc/install ====================================================================================

INSTALL = load("svc/install")
CONF_PATH = "usr/local/etc/clockspeed.conf"
RUN_PATH = "var/svc.d/clockspeed/run"


def install(root, *args, status=0, source=HERE, user=None, **env):
    """svc/install into an image -> what it printed, or the line of its failure."""
    done = subprocess.run([os.path.join(source, "svc", "install"), "--root", str(root), *args],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60, env=dict(UTC_ENV, **env),
                          preexec_fn=user and (lambda: os.setuid(user)))
    stdout, stderr = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == status, stderr
    assert stderr.count("\n") == bool(status) and "Traceback" not in stderr, stderr
    return stderr if status else stdout


def snapshot(root):
    """path: all that tells whether it was touched."""
    found = {}
    for place, directories, names in os.walk(str(root)):
        for path in (os.path.join(place, name) for name in directories + names):
            there = os.lstat(path)
            data = contents(path) if stat.S_ISREG(there.st_mode) else None
            link = os.readlink(path) if stat.S_ISLNK(there.st_mode) else None
            found[os.path.relpath(path, str(root))] = (there.st_mode, there.st_ino, there.st_mtime_ns, data,
                                                       link)
    return found


def files_below(root):
    return {path for path, each in snapshot(root).items() if not stat.S_ISDIR(each[0])}


@pytest.fixture
def source(public_tmp):
    """A copy of the project, as the next version has it."""
    place = public_tmp / "src"
    place.mkdir()
    for name in SCRIPTS + ("clockctl",):
        shutil.copy(path_of(name), str(place))
    shutil.copytree(os.path.join(HERE, "svc"), str(place / "svc"))
    return place


def test_an_empty_directory_gets_all_that_a_host_needs(tmp_path):
    said = install(tmp_path, "--server", "ntp:192.0.2.7,2001:db8::1")
    found = snapshot(tmp_path)
    modes = {path: stat.S_IMODE(each[0]) for path, each in found.items() if not stat.S_ISLNK(each[0])}
    bin_path = "usr/local/clockspeed/bin/"
    for name in SCRIPTS:
        assert found[bin_path + name + ".py"][3] == contents(path_of(name))
        assert modes[bin_path + name + ".py"] == 0o755
        assert found[bin_path + name][4] == name + ".py"
    assert found[bin_path + "clockctl"][3] == contents(path_of("clockctl"))
    assert found["usr/local/bin/clockctl"][4] == "/usr/local/clockspeed/bin/clockctl"
    for script in SERVICE_SCRIPTS:
        assert found[script.replace("svc/", "var/svc.d/")][3] == contents(os.path.join(HERE, script))
        assert modes[script.replace("svc/", "var/svc.d/")] == 0o755
    for service in ("clockspeed", "clockspeed_adjust", "taiclockd"):
        assert modes["var/multilog/" + service] == 0o755
        assert "left to you: chown multilog:nofiles /var/multilog/%s\n" % service in said
        assert "left to you: ln -s /var/svc.d/%s /service/%s" % (service, service) in said
    assert stat.S_ISFIFO(found["usr/local/clockspeed/adjust"][0])
    assert modes["usr/local/clockspeed/adjust"] == 0o600
    values = load("clockctl").parse_assignments(found[CONF_PATH][3].decode())
    assert (values["CLOCK_TYPE"], values["CLOCK_IP"]) == ("ntp", "192.0.2.7 2001:db8::1")
    assert modes[CONF_PATH] == 0o644 and modes["usr/local/clockspeed/etc"] == 0o755
    assert "left to you: chown clocksd /usr/local/clockspeed/adjust\n" in said and "clockctl set\n" in said
    assert not [path for path in found if path.endswith((".tmp", ".new"))]


def test_a_second_run_finds_nothing_to_do_and_touches_nothing(tmp_path):
    install(tmp_path)
    before = snapshot(tmp_path)
    assert install(tmp_path).startswith("nothing to do\n")
    assert snapshot(tmp_path) == before


def test_a_dry_run_tells_what_the_run_then_does_and_changes_nothing(tmp_path):
    dry = install(tmp_path, "--dry-run", "--start")
    assert snapshot(tmp_path) == {}
    assert install(tmp_path, "--start") == dry
    before = snapshot(tmp_path)
    dry = install(tmp_path, "--remove", "--purge", "--dry-run")
    assert snapshot(tmp_path) == before
    assert install(tmp_path, "--remove", "--purge") == dry


def test_the_next_version_replaces_what_was_not_edited(tmp_path, source):
    install(tmp_path)
    edited = tmp_path / RUN_PATH
    edited.write_text("#!/bin/sh\n# mine\n")
    for name in ("clockview.py", "svc/clockspeed/run", "svc/taiclockd/run"):
        (source / name).write_text((source / name).read_text() + "# the next version\n")
    (source / "svc/taiclockd/log/notes").write_text("new\n")
    said = install(tmp_path, source=str(source))
    assert "write /var/svc.d/clockspeed/run.new, mode 755; /var/svc.d/clockspeed/run stays" in said
    assert edited.read_text() == "#!/bin/sh\n# mine\n"
    assert (tmp_path / (RUN_PATH + ".new")).read_bytes() == contents(str(source / "svc/clockspeed/run"))
    assert (tmp_path / "usr/local/clockspeed/bin/clockview.py").read_text().endswith("# the next version\n")
    assert (tmp_path / "var/svc.d/taiclockd/run").read_text().endswith("# the next version\n")
    assert (tmp_path / "var/svc.d/taiclockd/log/notes").read_text() == "new\n"
    assert install(tmp_path, source=str(source)).startswith("nothing to do\n")

    # Who takes FILE.new is up to date; and what a version no longer has goes, unless edited.
    (tmp_path / (RUN_PATH + ".new")).rename(edited)
    (source / "svc/taiclockd/log/notes").unlink()
    said = install(tmp_path, source=str(source))
    assert "run.new" not in said and "remove /var/svc.d/taiclockd/log/notes\n" in said
    assert not (tmp_path / "var/svc.d/taiclockd/log/notes").exists()
    assert install(tmp_path, source=str(source)).startswith("nothing to do\n")


def test_a_configuration_is_filled_once_and_then_the_administrators(tmp_path):
    assert "edit CLOCK_IP in /usr/local/etc/clockspeed.conf" in install(tmp_path)
    assert "write /%s, mode 644\n" % CONF_PATH in install(tmp_path, "--server", "tai:192.0.2.9")
    conf = tmp_path / CONF_PATH
    assert 'CLOCK_TYPE="tai"' in conf.read_text() and 'CLOCK_IP="192.0.2.9"' in conf.read_text()
    conf.write_text("CLOCK_TYPE=ntp\nCLOCK_IP=192.0.2.1,192.0.2.2\n")
    assert install(tmp_path).startswith("nothing to do\n")
    assert install(tmp_path, "--server", "ntp:192.0.2.1,192.0.2.2").startswith("nothing to do\n")
    assert "/%s stays" % CONF_PATH in install(tmp_path, "--server", "ntp:192.0.2.3")
    assert conf.read_text() == "CLOCK_TYPE=ntp\nCLOCK_IP=192.0.2.1,192.0.2.2\n"
    assert 'CLOCK_IP="192.0.2.3"' in (tmp_path / (CONF_PATH + ".new")).read_text()


def test_other_directories_reach_the_scripts(tmp_path):
    install(tmp_path, CLOCKSPEED_HOME="/srv/clock", CLOCKSPEED_BIN="/opt/bin")
    text = (tmp_path / RUN_PATH).read_text()
    assert text.endswith("exec $ctl /opt/bin/clockspeed -u clocksd /srv/clock\n")
    assert "/opt/bin/taiclockd\n" in (tmp_path / "var/svc.d/taiclockd/run").read_text()
    assert os.readlink(str(tmp_path / "usr/local/bin/clockctl")) == "/opt/bin/clockctl"
    assert stat.S_ISFIFO(os.stat(str(tmp_path / "srv/clock/adjust")).st_mode)
    assert install(tmp_path).startswith("nothing to do\n"), "the configuration does not say where"
    install(tmp_path, "--remove", "--purge")
    assert not (tmp_path / "srv/clock").exists()


@pytest.mark.parametrize("name, tools", [
    ("daemontools", ("setuidgid clocksd ", "setuidgid multilog multilog t /var/multilog/taiclockd\n")),
    ("runit", ("chpst -u clocksd ", "chpst -u multilog svlogd -t /var/multilog/taiclockd\n")),
    ("s6", ("s6-setuidgid clocksd ", "s6-setuidgid multilog s6-log t /var/multilog/taiclockd\n"))])
def test_the_scripts_fit_the_supervisor(tmp_path, name, tools):
    scanner = tmp_path / "usr/bin" / INSTALL.SUPERVISORS[name].scanner
    scanner.parent.mkdir(parents=True)
    scanner.write_text("")
    said = install(tmp_path)  # finds it
    scan_dir = INSTALL.SUPERVISORS[name].scan_dirs[0]
    assert "ln -s /var/svc.d/clockspeed %s/clockspeed\n" % scan_dir in said
    assert ("s6-svscanctl -a " + scan_dir in said) == (name == "s6")
    place = tmp_path / "var/svc.d/taiclockd"
    assert "\nexec " + tools[0] in (place / "run").read_text()
    assert (place / "log/run").read_text().endswith("\nexec " + tools[1])
    for script in SERVICE_SCRIPTS:
        path = str(tmp_path / script.replace("svc/", "var/svc.d/"))
        assert subprocess.run(["sh", "-n", path], stderr=subprocess.PIPE).stderr == b""
        words = re.findall(r"(?m)^(?!#).*", contents(path).decode())
        assert name == "daemontools" or not re.search(r"(?<!-)setuidgid |multilog t ", "\n".join(words))
    scanner.unlink()
    said = install(tmp_path, "--supervisor", name)
    assert said.startswith("write /var/svc.d/.clockspeed-installed\nleft to you")
    assert install(tmp_path).startswith("nothing to do\n"), "the supervisor was forgotten"


@pytest.mark.parametrize("tool, command", [
    ("useradd", "useradd "), ("pw", "pw useradd clocksd -g nofiles"),
    ("adduser", "adduser -S -D -H -h /nonexistent -s /bin/false -G nofiles clocksd"),
    ("busybox", "busybox adduser -S ")])
def test_users_are_made_with_what_there_is(tmp_path, tool, command):
    (tmp_path / "usr/sbin").mkdir(parents=True)
    (tmp_path / "usr/sbin" / tool).write_text("")
    (tmp_path / "sbin").symlink_to("usr/sbin")
    said = install(tmp_path)
    assert "left to you: " + command in said and said.count("nofiles\n") >= 1


def test_what_starts_at_boot_can_be_linked_in_an_image(tmp_path):
    (tmp_path / "etc/service").mkdir(parents=True)
    assert "ln -s /var/svc.d/clockspeed /etc/service/clockspeed\n" in install(tmp_path, "--start")
    assert sorted(os.listdir(str(tmp_path / "etc/service"))) == ["clockspeed", "clockspeed_adjust"]
    assert install(tmp_path, "--start").startswith("nothing to do\n")
    install(tmp_path, "--remove")
    assert os.listdir(str(tmp_path / "etc/service")) == []
    (tmp_path / "etc/service/clockspeed").mkdir()
    assert install(tmp_path, "--start", status=111) == (
        "install: fatal: unable to ln -s /var/svc.d/clockspeed /etc/service/clockspeed: there is something else\n")


def test_a_running_service_is_restarted_and_its_clock_let_alone(tmp_path, source):
    install(tmp_path, "--server", "ntp:192.0.2.7", "--start")
    assert "clockctl set" in install(tmp_path)
    supervise = tmp_path / "var/svc.d/clockspeed/supervise"
    supervise.mkdir()
    os.mkfifo(str(supervise / "control"))
    assert "clockctl set" in install(tmp_path)
    reader = os.open(str(supervise / "control"), os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert "clockctl set" not in install(tmp_path) and "svc -t" not in install(tmp_path)
        with open(str(source / "clockspeed.py"), "a") as file:
            file.write("# the next version\n")
        assert "left to you: svc -t /service/clockspeed\n" in install(tmp_path, source=str(source))
        assert install(tmp_path, source=str(source)).count("svc -t") == 0
    finally:
        os.close(reader)


def test_removal_keeps_what_is_not_ours_and_purge_does_not(tmp_path):
    install(tmp_path, "--server", "tai:192.0.2.9")
    before = snapshot(tmp_path)
    (tmp_path / "var/multilog/clockspeed/current").write_text("log\n")
    (tmp_path / "usr/local/clockspeed/etc/atto").write_bytes(PACKETS[0][0].encode())
    (tmp_path / "usr/local/bin/other").write_text("")
    (tmp_path / RUN_PATH).write_text("# mine\n")
    (tmp_path / "var/svc.d/clockspeed/supervise").mkdir()
    said = install(tmp_path, "--remove")
    assert "left to you: remove /var/svc.d/clockspeed/run, which is not as we installed it\n" in said
    assert files_below(tmp_path) == {CONF_PATH, RUN_PATH, "var/multilog/clockspeed/current",
                                     "usr/local/clockspeed/etc/atto", "usr/local/bin/other"}
    assert install(tmp_path, "--remove").startswith("nothing to do\n")
    (tmp_path / RUN_PATH).unlink()
    install(tmp_path, "--remove", "--purge")
    assert files_below(tmp_path) == {"usr/local/bin/other"}
    install(tmp_path, "--server", "tai:192.0.2.9")
    assert set(snapshot(tmp_path)) == set(before) | {"usr/local/bin/other"}
    (tmp_path / RUN_PATH).write_text("# mine\n")
    (tmp_path / "usr/local/clockspeed/etc/notes").write_text("")
    (tmp_path / "usr/local/clockspeed/adjust").unlink()
    (tmp_path / "usr/local/clockspeed/adjust").write_text("")
    install(tmp_path, "--remove", "--purge")
    assert files_below(tmp_path) == {"usr/local/bin/other", "usr/local/clockspeed/adjust",
                                     "usr/local/clockspeed/etc/notes"}
    assert not (tmp_path / "var/svc.d").exists()


def test_links_in_place_of_files_are_not_followed(tmp_path):
    image, victim = tmp_path / "image", tmp_path / "victim"
    victim.write_text("precious")
    install(image if image.mkdir() else image)
    files = [path for path, each in snapshot(image).items() if stat.S_ISREG(each[0])]
    install(image, "--remove", "--purge")
    for path in files:
        (image / path).parent.mkdir(parents=True, exist_ok=True)
        (image / path).symlink_to(victim)
    manifest = image / "var/svc.d/.clockspeed-installed"
    assert install(image, status=111) == (
        "install: fatal: unable to read /usr/local/etc/clockspeed.conf: Too many levels of symbolic links\n")
    (image / CONF_PATH).unlink()
    assert "unable to read /var/svc.d/.clockspeed-installed: Too many" in install(image, status=111)
    manifest.unlink()
    for path in files:  # not even the temporary name's
        (image / path).parent.joinpath("." + (image / path).name + ".new.tmp").symlink_to(victim)
    install(image)
    assert victim.read_text() == "precious"
    assert os.readlink(str(image / RUN_PATH)) == str(victim) and (image / (RUN_PATH + ".new")).read_text()


def test_links_on_the_way_stay_in_the_image(tmp_path):
    image, outside = tmp_path / "image", tmp_path / "outside"
    for place in (image / "data", image / "usr", outside / "deep"):
        place.mkdir(parents=True)
    (image / "var").symlink_to("/data")
    (image / "usr/local").symlink_to("../../../../.." + str(outside / "deep"))
    install(image)
    inside = str(image) + str(outside / "deep")  # as one sees it who is chrooted there
    assert os.path.lexists(inside + "/bin/clockctl")
    assert (image / "data/svc.d/clockspeed/run").exists() and os.listdir(str(outside / "deep")) == []
    (image / "data/multilog/loop").symlink_to("loop")
    install(image, "--remove", "--purge")
    assert not os.path.lexists(inside + "/bin/clockctl") and (image / "data/multilog/loop").is_symlink()


def test_links_of_other_users_on_the_way_are_refused(public_tmp):
    if os.geteuid():
        pytest.skip("not root: the link can't be another user's")
    image = public_tmp / "image"
    (image / "var/elsewhere").mkdir(parents=True)
    (image / "var/svc.d").symlink_to("elsewhere")
    os.chown(str(image / "var/svc.d"), 65534, 65534, follow_symlinks=False)
    assert install(image, status=111).endswith(": svc.d in it is a link that is not followed\n")
    assert snapshot(image / "var/elsewhere") == {}


@pytest.mark.parametrize("path, make", [
    ("usr/local/clockspeed/adjust", "file"), ("usr/local/clockspeed", "file"), ("var/svc.d/clockspeed", "file"),
    ("var/multilog/clockspeed", "file"), (CONF_PATH, "directory"), ("var/svc.d/.clockspeed-installed", "directory"),
    (CONF_PATH, "CLOCK_IP=$(reboot)\n"), ("var/svc.d/.clockspeed-installed", "#\ngarbage\n"),
    ("var/svc.d/.clockspeed-installed", "\xff\xfe"), (CONF_PATH, "CLOCKSPEED_HOME=/a b\n"),
    (CONF_PATH, "CLOCKSPEED_BIN=../bin\n"), (CONF_PATH, "CLOCKSPEED_HOME=/a/../b\n")])
def test_what_is_in_the_way_is_a_clear_line(tmp_path, path, make):
    place = tmp_path / path
    place.parent.mkdir(parents=True)
    if make == "directory":
        place.mkdir()
    else:
        place.write_bytes(b"" if make == "file" else make.encode("latin-1"))
    before = snapshot(tmp_path)[path]
    for status in (111, 111):
        assert re.match(r"install: fatal: unable to \S.*: \S.*\n$", install(tmp_path, status=status))
    assert snapshot(tmp_path)[path][3:] == before[3:]


def test_a_directory_that_can_not_be_written_is_a_clear_line(public_tmp, source):
    image = public_tmp / "image"
    image.mkdir()
    image.chmod(0o555)
    said = install(image, status=111, source=str(source), user=65534 if os.geteuid() == 0 else None)
    assert said == "install: fatal: unable to mkdir -p /usr/local/clockspeed/etc: Permission denied\n"


def test_only_root_installs_on_the_host_but_all_may_look(source):
    if os.geteuid():
        pytest.skip("not root: what runs as another user here must not be the tester")
    said = install("/", status=111, source=str(source), user=65534)
    assert said == "install: fatal: unable to install: not root; --dry-run shows what would be done\n"
    assert "clockspeed" in install("/", "--dry-run", source=str(source), user=65534)


@pytest.mark.parametrize("args", [
    ["operand"], ["--server"], ["--server", "ntp"], ["--server", "ntp:"], ["--server", "ntp:-x"],
    ["--server", "ntp:a b"], ["--server", "ntp:a,,b"], ["--server", "ntp,a"], ["--server", 'ntp:$(reboot)"'],
    ["--server", "http:a"], ["--supervisor", "systemd"], ["--purge"], ["--remove", "--start"],
    ["--remove", "--server", "ntp:a"], ["-x"]])
def test_wrong_usage_of_install(tmp_path, args):
    assert install(tmp_path, *args, status=100).startswith("install: usage: install ")
    assert snapshot(tmp_path) == {}


def test_a_directory_that_is_none_is_a_clear_line(tmp_path):
    assert install(tmp_path / "none", status=111) == (
        "install: fatal: unable to use %s: No such file or directory\n" % (tmp_path / "none"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    tree = INSTALL.Tree(str(tmp_path))
    (tmp_path / "file").write_text("old")

    def fail(name, directory_fd):
        os.close(os.open(name, os.O_CREAT, dir_fd=directory_fd))
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError):
        tree.put("/file", fail)
    assert os.listdir(str(tmp_path)) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_the_running_scanner_is_found_with_its_directory(tmp_path):
    scanned = tmp_path / "scanned"
    scanned.mkdir()

    def process(pid, root, cwd, *words):
        place = tmp_path / "proc" / str(pid)
        place.mkdir(parents=True)
        (place / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
        (place / "root").symlink_to(root)
        (place / "cwd").symlink_to(cwd)
    process(1, "/", "/", "/sbin/init", "svscan")
    process(20, str(tmp_path), "/", "svscan", str(tmp_path))  # in a container
    process(30, "/", "/", "/usr/bin/runsvdir", "-P", str(scanned), "log: ....")
    process(40, "/", str(scanned), "s6-svscan", "-t", "0")
    assert INSTALL.running_scanners(str(tmp_path / "proc")) == {"runit": str(scanned), "s6": str(scanned)}
    assert INSTALL.running_scanners(str(tmp_path / "none")) == {}


@pytest.mark.parametrize("off, status, asked, done", [
    ("00.250000000000000000", 0, "view", True), ("58.999999999000000000", 0, "view set", True),
    ("02.000000000000000000", 0, "view set", True), ("00.250000000000000000", 111, "view", False),
    ("garbage", 0, "view", False)])
def test_a_clock_over_a_second_off_is_set_once(tmp_path, monkeypatch, capfd, off, status, asked, done):
    clockctl = tmp_path / "clockctl"
    clockctl.write_text('#!/bin/sh\necho $1 >>"$0.asked"\necho "before: 2026-11-22 15:41:00.000000000000000000"\n'
                        'echo "after:  2026-11-22 15:41:%s"\nexit %d\n' % (off, status))
    clockctl.chmod(0o755)
    monkeypatch.setattr(INSTALL, "CLOCKCTL", str(clockctl))
    installed = {}
    action = INSTALL.SetClock(installed)
    assert not action.is_done(None)
    action.do(None)
    assert contents(str(clockctl) + ".asked").decode().split() == asked.split()
    assert action.is_done(None) == done
    assert ("install: warning: unable to set the clock now" in capfd.readouterr().err) == (not done)


# ==== clockctl: what the clients are asked for =======================================================

def our_client(host, name="sntpclock"):
    """A Python client that writes down its arguments -> a function that tells those of the last run."""
    path = host.bin / name
    path.write_text('#!/bin/sh\n"""exec" python3 -IS "$0" "$@"\n"""\nimport os, sys\n'
                    "open(%r, 'w').write(' '.join(sys.argv[1:]))\nos.write(1, %r)\n"
                    % (str(path) + ".args", PLUS_QUARTER))
    path.chmod(0o755)
    return lambda: contents(str(path) + ".args").decode()


TRUST = "CLOCK_KEYFILE=/etc/keys CLOCK_KEY=7\nCLOCK_HTTPS='https://a.example/ https://b.example/'\n"


def test_our_clients_get_the_options_of_the_configuration_and_c_ones_refuse_them(host, told):
    told(a_status())
    conf, args = contents(host.conf).decode(), our_client(host)
    memory = "-s %s/etc " % host.home
    stand_in(host.bin, "clockview", b"shown\n")
    assert host.clockctl("view").returncode == 0 and args() == memory + "192.0.2.1"
    host.write_conf(conf + TRUST)
    assert host.clockctl("view").returncode == 0
    assert args() == memory + "-k /etc/keys -K 7 -c https://a.example/ -c https://b.example/ 192.0.2.1"
    client = stand_in(host.bin, "sntpclock")
    os.unlink(client + ".args")  # of the one before
    refusal = ("clockctl: fatal: unable to ask the time: CLOCK_KEYFILE and CLOCK_HTTPS need CLOCK_TYPE=ntp "
               "and the Python sntpclock, not %s/%s\n")
    assert host.clockctl("view").stderr == refusal % (host.bin, "sntpclock")
    args = our_client(host, "taiclock")
    host.write_conf(conf.replace("ntp", "tai") + TRUST)
    assert host.clockctl("view").stderr == refusal % (host.bin, "taiclock")
    assert not os.path.exists(client + ".args"), "an answer that nobody vouches for was asked for"
    host.write_conf(conf.replace("ntp", "tai"))
    assert host.clockctl("view").returncode == 0 and args() == "192.0.2.1"
    host.write_conf(conf + "CLOCK_KEYFILE=/etc/keys\n")
    assert "CLOCK_KEYFILE and CLOCK_KEY only one is set in %s\n" % host.conf in host.clockctl("view").stderr


@pytest.mark.parametrize("name, kind", [("sntpclock", "ntp"), ("taiclock", "tai")])
def test_set_and_the_first_mark_of_a_boot_ask_without_limit(tmp_path, name, kind):
    host = Host(tmp_path, kind)
    reader, args = host.make_fifo(), our_client(host, name)
    stand_in(host.bin, "clockadd", b"")
    status = host.home / "etc" / "status"

    def limit(command, *statuses):
        for each in statuses:
            status.write_text(json.dumps(each))
        assert host.clockctl(command).returncode == 0
        return "-l 0" in args()
    assert limit("set") and limit("mark")
    assert limit("mark", a_status(marks={"used": 0, "doubted": 2, "refused": 1}))
    assert limit("mark", a_status(boot_id="another"))
    assert not limit("mark", a_status()) and limit("set")
    os.close(reader)


@pytest.mark.parametrize("error, changes, wanted", [
    ("", {}, ""), ("soon", {}, ""), ("1e-300", {}, ""), ("0.01", {}, "-r 1 "), ("0.01", dict(wander=0), ""),
    ("0.01", dict(asking_early=True), ""), ("0.01", dict(age_sec=7200), ""),
    ("0.0005", dict(noise_ns=2e6, wander=1e-8), "-r 2 "), ("0.0002", dict(noise_ns=2e6, wander=1e-8), "")])
def test_mark_asks_for_no_more_exchanges_than_the_accuracy_needs(host, told, error, changes, wanted):
    told(a_status(**changes))
    host.write_conf(contents(host.conf).decode() + "CLOCK_ERROR=%s\n" % error)
    reader, args = host.make_fifo(), our_client(host)
    assert host.clockctl("mark").returncode == 0
    assert args() == "-s %s/etc %s192.0.2.1" % (host.home, wanted)
    os.close(reader)


def test_a_slow_client_is_awaited_visibly_on_a_terminal_only(host):
    need("script")
    stand_in(host.bin, "sntpclock", first="sleep 3")
    stand_in(host.bin, "clockview", b"shown\n")
    env = dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf))
    seen = subprocess.run(["script", "-qec", path_of("clockctl") + " view", "/dev/null"], stdout=subprocess.PIPE,
                          env=env, stdin=subprocess.DEVNULL, timeout=60).stdout
    assert b"waiting for sntpclock ..." in seen and seen.endswith(b"\r\x1b[Kshown\r\n")
    assert host.clockctl("view").stdout == b"shown\n"


def test_the_wait_between_marks_is_that_of_the_filters_steady_state():
    """Against the filter itself, run until it settles."""
    clockctl = load("clockctl")
    for noise, wander, target in ((2e6, 1e-9, 1e7), (2e6, 1e-10, 1e7), (2e4, 1e-9, 1e6), (3e7, 1e-8, 1e7)):
        sec = clockctl.mark_every_sec(noise, wander, target)
        a = b = c = 1e12  # ns^2, ns^2/s, ns^2/s^2: nothing known
        a, q = a * 1e6, (wander * 1e9)**2
        for _ in range(3000):
            s = a + noise**2
            a, b, c = a - a * a / s, b - a * b / s, c - b * b / s
            a, b, c = a + sec * (2 * b + sec * c) + q * sec**3 / 3, b + sec * c + q * sec**2 / 2, c + q * sec
        assert a**0.5 == pytest.approx(target, rel=1e-3)


def test_exchanges_are_the_fewest_packets_for_an_accuracy():
    clockctl, rng = load("clockctl"), random.Random(SEED)
    for _ in range(500):
        noise, wander, target = (10**rng.uniform(*powers) for powers in ((3, 8), (-11, -7.5), (4, 8)))

        def every(count):
            return clockctl.mark_every_sec(noise / count**0.5, wander, target)
        chosen = clockctl.exchanges(noise, wander, target)
        assert 1 <= chosen <= 10
        good = [count for count in range(1, 11) if every(count) >= 64]
        if good:
            assert chosen / every(chosen) == min(count / every(count) for count in good)
        else:
            assert chosen == 10


# ==== clockctl: check ================================================================================

def levels(probe):
    """What a probe found: its levels; each complete, and what is not well with what to do."""
    found = list(probe)
    for level, text, todo in found:
        assert level in ("ok", "warn", "fail") and text and "\n" not in text + todo
        assert todo or level == "ok", text
    return " ".join(level for level, _, _ in found)


def told_by(text, status=0, packet=PLUS_QUARTER):
    """What runs a program, pretended: its stderr or, for a service, its stdout."""
    def run(command, stderr):
        services = stderr == subprocess.STDOUT
        return subprocess.CompletedProcess(command, status, text.encode() if services else packet,
                                           text.encode())
    return run


@pytest.fixture
def clockctl():
    return load("clockctl")


def status_of(clockctl, **changes):
    boot_id = contents("/proc/sys/kernel/random/boot_id").decode().strip()
    return clockctl.Status(a_status(**changes), time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW), boot_id)


def test_check_config(clockctl, tmp_path):
    path = str(tmp_path / "conf")
    good = dict(clockctl.DEFAULTS, CLOCK_IP="198.51.100.1")

    def found(problem=None, **changes):
        return levels(clockctl.check_config(path, problem, dict(good, **changes)))
    assert found() == "warn ok"  # no such file
    (tmp_path / "conf").write_text("")
    assert found() == "ok" and found(CLOCK_ERROR="0.01") == "ok"
    assert found(clockctl.Failure("read " + path, "line 3 is wrong")) == "fail"
    with pytest.raises(clockctl.Failure):  # which findings() makes a warning of
        found(clockctl.Failure("read " + path, PermissionError()))
    for wrong in (dict(CLOCK_IP=""), dict(CLOCK_IP="-f"), dict(CLOCK_TYPE="ptp"), dict(CLOCK_ERROR="x"),
                  dict(CLOCK_KEY="1"), dict(CLOCK_IP="192.0.2.1")):
        assert found(**wrong) == "fail", wrong
    (tmp_path / "conf").chmod(0o666)
    assert found() == "fail ok"


def test_check_programs(clockctl, tmp_path):
    stand_in(tmp_path, "clockview")
    shutil.copy(path_of("clockadd"), str(tmp_path / "clockadd.py"))
    tmp_path.chmod(0o755)

    def found(*names):
        return list(clockctl.check_programs(str(tmp_path), names))
    assert found("clockview", "clockadd") == [
        ("ok", "clockview, clockadd.py in %s; in C: clockview" % tmp_path, "")]
    assert levels(found("clockspeed", "clockview")) == "fail ok" and levels(found("clockspeed")) == "fail"
    assert found("clockspeed", "sntpclock")[0][1] == "there is no clockspeed or sntpclock in %s" % tmp_path
    (tmp_path / "clockview").chmod(0o666)
    assert levels(found("clockview")) == "fail fail ok"  # not executable; everybody's
    tmp_path.chmod(0o777)
    assert levels(found("clockadd")) == "fail ok"


@pytest.mark.parametrize("said, status, packet, wanted", [
    ("taiclock: info: a: offset +0.25 s, delay 0.001 s\ntaiclock: info: result: offset", 0, PLUS_QUARTER, "ok ok"),
    ("", 0, struct.pack(">qII", 7, 0, 0), "warn"), ("", 0, b"", "fail"),
    ("sntpclock: warning: b is a falseticker: offset\nsntpclock: warning: the leap second table has expired\n",
     0, PLUS_QUARTER, "warn ok"),
    ("sntpclock: fatal: unable to get the time\n", 111, b"", "fail"),
    ("sntpclock: fatal: unable to take key 1 from x: Permission denied\n", 111, b"", "warn"),
    ("\xff \x1b", 100, b"", "fail")])
def test_check_server(clockctl, said, status, packet, wanted):
    assert levels(clockctl.check_server(["sntpclock", "a"], told_by(said, status, packet))) == wanted


def test_check_clockspeed_and_its_marks(clockctl):
    def found(limit_sec=None, **changes):
        status = status_of(clockctl, **changes)
        return (levels(clockctl.check_clockspeed(status, None, True)),
                levels(clockctl.check_marks(status, limit_sec)))
    assert found() == found(0.01) == ("ok", "ok") and found(1e-6) == ("ok", "warn")
    assert found(observe_only=True) == ("warn", "ok") and found(asking_early=True) == ("ok", "warn")
    assert found(last_mark=None) == ("ok", "warn") and found(variance=None, offset_ns=None) == ("ok", "warn")
    old = {"tick_ns": time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - 40 * 86400 * 10**9, "offset_ns": 0,
           "outcome": "used"}
    assert found(last_mark=old) == ("ok", "warn") and found(pid=2**22 + 1) == ("fail", "")
    for ours, error in ((True, "there is none"), (False, "there is none"), (True, PermissionError())):
        probe = clockctl.check_clockspeed(None, clockctl.Failure("read it", error), ours)
        if ours and error == "there is none":
            assert levels(probe) == "fail"
        else:
            with pytest.raises(clockctl.Failure):
                levels(probe)
    assert levels(clockctl.check_marks(None, None)) == ""


def test_check_adjust(clockctl, host, monkeypatch):
    def found():
        return levels(clockctl.check_adjust(host.adjust, 0.1))
    assert found() == "fail"
    open(host.adjust, "w").close()
    assert found() == "fail"
    os.unlink(host.adjust)
    reader = host.make_fifo()
    only_root = "warn " if os.geteuid() == 0 else ""
    os.chmod(host.adjust, 0o600)
    assert found() == only_root + "ok"
    os.chmod(host.adjust, 0o620)
    assert found() == "ok"
    os.chmod(host.adjust, 0o622)
    assert found() == "fail ok"
    os.chmod(host.adjust, 0o620)
    writer = os.open(host.adjust, os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, bytes(16))
    assert found() == "fail", "it hangs"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert found() == "warn"
    monkeypatch.undo()
    os.close(reader)
    os.close(writer)
    assert found() == "fail", "nobody reads it"


def test_check_etc(clockctl, tmp_path):
    def found(uid=None):
        return levels(clockctl.check_etc(str(tmp_path / "etc"), uid))
    assert found() == "fail"
    (tmp_path / "etc").write_text("")
    assert found() == "fail"
    (tmp_path / "etc").unlink()
    for mode, wanted in ((0o755, "ok"), (0o700, "warn"), (0o777, "fail")):
        (tmp_path / "etc").mkdir(exist_ok=True)
        (tmp_path / "etc").chmod(mode)
        assert found() == found(0) == found(os.geteuid()) == wanted
    (tmp_path / "etc").chmod(0o755)
    assert found(54321) == "fail"


@pytest.mark.parametrize("files, said, wanted", [
    (["status"], "/service/clockspeed: up (pid 21088) 200 seconds", "ok"),
    (["status"], "/service/clockspeed: up (pid 21088) 1 seconds", "warn"),
    (["status"], "/service/clockspeed: down 4 seconds, normally up", "fail"),
    (["status"], "/service/clockspeed: supervise not running", "fail"),
    (["stat"], "run: /run/service/clockspeed: (pid 21201) 200s; run: log: (pid 3) 0s", "ok"),
    (["stat"], "down: /run/service/clockspeed: 3s, normally up; run: log: (pid 3) 900s", "fail"),
    (["death_tally"], "up (pid 21199) 100 seconds", "ok"),
    (["death_tally"], "down (exitcode 111) 0 seconds, normally up, ready 0 seconds", "fail"),
    (None, "", "fail")])
def test_check_services(clockctl, tmp_path, files, said, wanted):
    assert levels(clockctl.check_services([str(tmp_path)])) == "warn"
    (tmp_path / "clockspeed").mkdir()
    for name in files or ():
        (tmp_path / "clockspeed" / "supervise").mkdir()
        (tmp_path / "clockspeed" / "supervise" / name).write_text("")
    assert levels(clockctl.check_services([str(tmp_path)], told_by(said))) == wanted


def test_check_services_without_their_programs_or_the_right(clockctl, tmp_path, monkeypatch):
    (tmp_path / "clockspeed" / "supervise").mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert levels(clockctl.check_services([str(tmp_path)])) == "warn"

    def denied(path):
        raise PermissionError
    monkeypatch.setattr(os, "listdir", denied)
    assert levels(clockctl.check_services([str(tmp_path)])) == "warn"


def test_check_services_sees_a_real_one(supervised, clockctl):
    place = supervised("clockspeed", {"run": "#!/bin/sh\nexec sleep 3574\n"})
    found = []

    def up():
        found[:] = clockctl.check_services([str(place.parent)])
        return found[0][0] == "ok"
    assert await_that(up), found
    subprocess.run(["svc", "-d", str(place)], check=True)
    assert await_that(lambda: levels(clockctl.check_services([str(place.parent)])) == "fail")


def test_check_logs(clockctl, tmp_path):
    def found(user=None):
        return levels(clockctl.check_logs([str(tmp_path / "log")], user))
    assert found() == "warn"
    (tmp_path / "log").mkdir()
    assert found() == found(os.geteuid()) == "ok" and found(54321) == "fail"
    (tmp_path / "log").chmod(0o500)
    assert found() == "fail"


def test_check_rivals(clockctl, tmp_path):
    def found(*processes, log=""):
        proc = tmp_path / "proc"
        shutil.rmtree(str(proc), ignore_errors=True)
        (proc / "self").mkdir(parents=True)
        (proc / "77").mkdir()  # one that has ended
        for pid, (name, arguments) in enumerate(processes):
            (proc / str(pid)).mkdir()
            (proc / str(pid) / "comm").write_text(name + "\n")
            (proc / str(pid) / "cmdline").write_text(arguments.replace(" ", "\0"))
        (tmp_path / "current").write_text(log)
        return levels(clockctl.check_rivals(str(proc), str(tmp_path)))
    assert found(("sh", "sh"), ("chronyd", "chronyd -x")) == "ok"
    assert found(("chronyd", "chronyd -d"), ("systemd-timesyn", "x"), ("vmtoolsd", "x")) == "warn warn warn"
    foreign = " foreign: another program sets the clock's frequency; one of the two must go\n"
    assert found(log=label(time.time() - 600) + foreign) == "warn"
    assert found(log=label(time.time() - 9000) + foreign) == "ok"


def test_check_scale_and_zone(clockctl, tmp_path, monkeypatch):
    def found(status=None, **env):
        for name in ("CLOCK_SCALE", "TZ"):
            monkeypatch.setenv(name, env.get(name, ""))
        time.tzset()
        return levels(clockctl.check_scale(status))
    tai = status_of(clockctl, leap=dict(a_status()["leap"], tai_offset=10))
    try:
        assert found() == found(status_of(clockctl)) == found(CLOCK_SCALE="utc") == "ok"
        assert found(CLOCK_SCALE="tai") == "warn" and found(CLOCK_SCALE="gps") == "fail" == found(tai)
        if os.path.exists("/usr/share/zoneinfo/right/UTC"):
            assert found(tai, TZ="right/UTC") == "ok" and found(TZ="right/UTC", CLOCK_SCALE="utc") == "warn"
    finally:
        monkeypatch.undo()
        time.tzset()
    (tmp_path / "A").mkdir()
    (tmp_path / "A" / "B").write_text("")

    def zone(name, path="A/B"):
        return levels(clockctl.check_zone(str(tmp_path / path), name, str(tmp_path)))
    assert zone("") == zone(None) == zone(":A/B") == zone("CET-1") == "ok"
    assert zone("", "none") == zone("A/C") == "warn"


def test_check_leap(clockctl, tmp_path, monkeypatch):
    def found(table, *files):
        path = tmp_path / "table"
        path.write_bytes(table)
        monkeypatch.setenv("LEAPSECS", str(path))
        return levels(clockctl.check_leap(list(map(str, files))))
    good = leapsecs_dat()
    assert found(good) == "ok" and found(good[:-8]) == found(b"x") == "fail"
    assert found(leap_seconds_list(expires=time.time() + 1e6)) == "ok"
    assert found(leap_seconds_list(expires=time.time() - 1e6)) == "warn"
    newer = tmp_path / "newer"
    newer.write_bytes(good + struct.pack(">Q", 2**62 + 10 + 1830297600 + 27))
    assert found(good, tmp_path / "none", newer) == "warn"
    monkeypatch.setenv("LEAPSECS", "")
    monkeypatch.setattr(clockctl, "read_leap_table", lambda: (clockctl.built_in_leaps(), None, "built in"))
    assert levels(clockctl.check_leap([])) == "warn"


@pytest.mark.parametrize("source, wanted", [
    ("tsc", "ok"), ("kvm-clock", "ok"), ("hpet", "warn"), ("jiffies", "fail"), (None, "ok")])
def test_check_counter(clockctl, tmp_path, monkeypatch, source, wanted):
    if source:
        (tmp_path / "source").write_text(source + "\n")
    assert levels(clockctl.check_counter(str(tmp_path / "source"))) == wanted
    monkeypatch.setattr(clockctl, "COUNTER", time.CLOCK_MONOTONIC)
    assert levels(clockctl.check_counter(str(tmp_path / "source"))) == wanted.replace("ok", "warn")


@pytest.mark.parametrize("megabytes, inodes, flags, wanted", [
    (900, 9, 0, "ok"), (5, 9, 0, "warn"), (0, 9, 0, "fail"), (900, 0, 0, "fail"),
    (900, 9, os.ST_RDONLY, "fail")])
def test_check_space(clockctl, tmp_path, megabytes, inodes, flags, wanted):
    def statvfs(path):
        return os.statvfs_result((1, 1 << 20, 1000, megabytes, megabytes, 100, inodes, inodes, flags, 255))
    assert levels(clockctl.check_space([str(tmp_path), str(tmp_path / "none")], statvfs)) == wanted


def test_check_of_a_host_with_nothing_and_of_one_that_works(public_tmp):
    none = public_tmp / "none"
    done = run("clockctl", "check", CLOCKSPEED_CONF=str(none), CLOCKSPEED_HOME=str(none))
    assert done.returncode == 2 and done.stderr == "" and b"\x1b" not in done.stdout
    assert re.search(rb"^fail  configuration: unable to read .*; correct it$", done.stdout, re.M)
    done = run("clockctl", "check", CLOCKSPEED_CONF="/dev/null", CLOCKSPEED_BIN=HERE, CLOCKSPEED_HOME=str(none),
               CLOCK_IP="127.0.0.1", CLOCK_TYPE="tai", CLOCK_HTTPS="https://a.example/")
    assert b"fail  server: unable to ask the time: CLOCK_KEYFILE and CLOCK_HTTPS need" in done.stdout
    host = Host(public_tmp, "tai", "127.40.14.3")
    for name in SCRIPTS:
        shutil.copy(path_of(name), str(host.bin))
    host.write_conf(contents(host.conf).decode() + "CLOCKSPEED_LOG=%s/clockspeed\n" % public_tmp)
    shutil.copy(path_of("clockctl"), str(public_tmp))
    process = Daemon(host.home)
    server = subprocess.Popen([path_of("taiclockd"), "-i", "127.40.14.3"], stdout=subprocess.PIPE,
                              env=UTC_ENV)
    try:
        assert server.stdout.readline().startswith(b"start: ")
        assert host.clockctl("mark").returncode == 0
        process.wait_for("mark: ")
        done = host.clockctl("check", "--json")
        told = json.loads(done.stdout)
        found = {}
        for each in told["findings"]:
            assert sorted(each) == ["finding", "level", "todo", "topic"]
            found.setdefault(each["topic"], []).append(each["level"])
        assert done.stderr == "" and done.returncode == told["status"] >= 1  # it only observes
        assert found["configuration"] == found["programs"] == found["etc"] == ["ok"]
        assert found["server"] == ["ok", "ok"] and found["clockspeed"] == ["warn"]
        assert found["marks"] == ["ok"]
        assert found["adjust"][-1] == "ok" and "fail" not in sum(found.values(), [])
        lines = host.clockctl("check").stdout.decode().splitlines()
        assert all(re.match("(ok  |warn|fail)  [a-z ]+: .", line) for line in lines)
        assert len(lines) == len(told["findings"])
        if os.geteuid() == 0:
            need("setpriv")
            done = subprocess.run(
                ["setpriv", "--reuid=65534", "--clear-groups", str(public_tmp / "clockctl"), "check"],
                env=dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf), PATH="/usr/bin:/bin"), timeout=60,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert (done.returncode, done.stderr) == (1, b"")
            assert b"adjust: this user can't see whether %s" % os.fsencode(host.adjust) in done.stdout
    finally:
        process.stop()
        server.kill()
        server.communicate()


def test_check_without_ctypes_and_json(tmp_path):
    lacking = "import runpy, sys; sys.modules.update(ctypes=None, json=None); sys.argv = sys.argv[1:]\n"
    for option in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-ISc", lacking + "runpy.run_path(sys.argv[0], run_name='__main__')",
             path_of("clockctl"), "check"] + option, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
            env=dict(UTC_ENV, CLOCKSPEED_CONF="/dev/null", CLOCKSPEED_HOME=str(tmp_path), CLOCKSPEED_BIN=HERE,
                     CLOCK_IP="127.0.0.1", CLOCK_TYPE="tai"))
        if option:
            assert done.stderr == (
                b"clockctl: fatal: unable to print JSON: import of json halted; None in sys.modules\n")
        else:
            assert done.stderr == b"" and b"warn  clockspeed: unable to look: unable to read " in done.stdout


@pytest.mark.parametrize("no_color, coloured", [("", True), ("1", False)])
def test_check_has_colours_on_a_terminal_only_and_never_with_no_color(no_color, coloured, tmp_path):
    need("script")
    done = subprocess.run(["script", "-qec", path_of("clockctl") + " check", "/dev/null"], stdout=subprocess.PIPE,
                          env=dict(UTC_ENV, CLOCKSPEED_CONF="/dev/null", CLOCKSPEED_HOME=str(tmp_path),
                                   NO_COLOR=no_color, CLOCK_IP=""), stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 2 and (b"\x1b[31mfail\x1b[m  " in done.stdout) == coloured


# ==== clockctl: leap =================================================================================

def leap_seconds_list(*rows, expires=4102444800, broken=False):
    """A list with its right hash: the built-in table and more rows, as bytes."""
    table = [(63072000, 10)] + CODES.parse_leap_table(leapsecs_dat())[0][1:] + list(rows)
    stamps = ["3960835200", "%d" % (expires + 2208988800)]
    lines = ["%d %d" % (sec + 2208988800, offset) for sec, offset in table]
    digest = hashlib.sha1("".join(stamps + lines).replace(" ", "").encode()).hexdigest()
    words = ["%x" % (int(digest[at:at + 8], 16) ^ broken) for at in range(0, 40, 8)]  # without leading zeros
    return ("# a list\n#$\t%s\n#@\t%s\n%s\n#h %s\n" % (
        *stamps, "\n".join(line.replace(" ", "\t") + "\t# a day" for line in lines),
        " ".join(words))).encode()


NEXT_LEAP = 1830297600  # 2028-01-01


def test_leap_shows_the_table_in_use(tmp_path):
    table = tmp_path / "table"
    table.write_bytes(leap_seconds_list((NEXT_LEAP, 38), expires=1861920000))
    os.utime(str(table), (time.time() - 100 * 86400 - 60,) * 2)
    assert run("clockctl", "leap", LEAPSECS=str(table), CLOCKSPEED_CONF="/dev/null").stdout.decode() == """\
leap seconds  TAI - UTC is 37 s, +1 s at the end of 2027-12-31
leap table    %s, 100 days old, expires on 2029-01-01
""" % table
    table.write_bytes(b"x")
    done = run("clockctl", "leap", LEAPSECS=str(table), CLOCKSPEED_CONF="/dev/null")
    assert (done.returncode, done.stderr) == (
        111, "clockctl: fatal: unable to read leap seconds: leap second table %s is damaged\n" % table)


@pytest.mark.parametrize("data, expired", [
    (leap_seconds_list(), False), (leapsecs_dat(), False), (leap_seconds_list((NEXT_LEAP, 38)), False),
    (leap_seconds_list((NEXT_LEAP, 38), expires=1e9), True),
    (leapsecs_dat() + struct.pack(">Q", 2**62 + 10 + NEXT_LEAP + 27), False)])
def test_leap_takes_a_table_and_writes_it_as_djb_has_it(clockctl, tmp_path, monkeypatch, capfd, data,
                                                        expired):
    new, target = tmp_path / "new", tmp_path / "leapsecs.dat"
    new.write_bytes(data)
    target.write_bytes(b"old")
    monkeypatch.setattr(clockctl, "LEAP_FILES", (str(target),))
    monkeypatch.setenv("LEAPSECS", "")
    assert not clockctl.leap({}, {}, [str(new)])
    written, told = target.read_bytes(), capfd.readouterr()
    assert written[:216] == leapsecs_dat() and len(written) == (224 if b"4039286400" in data
                                                                or len(data) == 224 else 216)
    assert clockctl.parse_leap_table(written)[0] == clockctl.parse_leap_table(data)[0]
    assert told.out.startswith("leap: %s has %d leap seconds now" % (target, len(written) // 8))
    assert ("expired on 2001-09-09" in told.err) == expired and sorted(os.listdir(str(tmp_path))) == [
        "leapsecs.dat", "new"]
    monkeypatch.setenv("LEAPSECS", str(new))
    clockctl.leap({}, {}, [str(new)])
    assert "warning: LEAPSECS=%s is used before it\n" % new in capfd.readouterr().err


@pytest.mark.parametrize("data, why", [
    (None, "unable to take {0}: No such file or directory"),
    (b"", "unable to take {0}: it is damaged, or no leap second table"),
    (leapsecs_dat()[:-3], "unable to take {0}: it is damaged, or no leap second table"),
    (leapsecs_dat()[:-8], "unable to take {0}: it lacks leap seconds that there have been"),
    (leap_seconds_list(broken=True), "unable to take {0}: it is damaged, by its #h line"),
    (leap_seconds_list().replace(b"3960835200", b"3960835201"),
     "unable to take {0}: it is damaged, by its #h line"),
    (leap_seconds_list().partition(b"#h")[0], "unable to take {0}: it has no #h line to check it by"),
    (leap_seconds_list() + b"#h x\n", "unable to take {0}: it is damaged, by its #h line"),
    (leap_seconds_list(expires=1e9),
     "unable to take {0}: it expired on 2001-09-09 and has nothing that is not built in"),
    (leap_seconds_list((NEXT_LEAP, 36)),
     "unable to write {1}: leapsecs.dat can't hold the negative leap second of 2027-12-31: "
     "set LEAPSECS={0} in /usr/local/etc/clockspeed.conf instead"),
    (leap_seconds_list((NEXT_LEAP, 36), (NEXT_LEAP + 366 * 86400, 37)),
     "unable to write {1}: leapsecs.dat can't hold the negative leap second of 2027-12-31: "
     "set LEAPSECS={0} in /usr/local/etc/clockspeed.conf instead")])
def test_leap_refuses_what_is_not_fit(clockctl, tmp_path, monkeypatch, data, why):
    new, target = tmp_path / "new", tmp_path / "leapsecs.dat"
    if data is not None:
        new.write_bytes(data)
    target.write_bytes(b"old")
    monkeypatch.setattr(clockctl, "LEAP_FILES", (str(target),))
    with pytest.raises(clockctl.Failure) as failure:
        clockctl.leap({}, {}, [str(new)])
    assert str(failure.value) == why.format(new, target) and target.read_bytes() == b"old"


def test_leap_takes_no_random_table(clockctl, tmp_path):
    rng, new = random.Random(SEED), tmp_path / "new"
    for _ in range(2000):
        data = bytearray(leap_seconds_list((NEXT_LEAP, 38)))
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        new.write_bytes(bytes(data))
        with contextlib.suppress(clockctl.Failure):  # a comment has no hash
            assert clockctl.read_new_table(str(new))[0][28:] == [(NEXT_LEAP, 38)]


# ==== the README ====================================================================================
# Its fenced blocks say by their kind how they are tried:
#   sh          harmless: run here as they are
#   sh tests    what this file is called by
#   sh install  svc/install and what follows it   } in the virtual machine (.ci/document.sh) for real, and here
#   sh host     a host set up by hand, in order   } in a directory that stands for the root, where the clock is
#   sh client, sh also   what comes after that    } only observed, users are not made and servers are local
#   conf        assignments for clockspeed.conf; text is not tried

README = contents(os.path.join(HERE, "README.md")).decode()
README_BLOCKS = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", README, re.M)
README_KINDS = {"sh", "sh tests", "sh install", "sh host", "sh client", "sh also", "conf", "text"}
README_ADDRESS = "127.40.14.2"  # stands for all servers


def readme_blocks(*kinds):
    return [(kind, text) for kind, text in README_BLOCKS if kind in kinds]


def test_each_block_of_the_readme_is_of_a_kind():
    assert {kind for kind, _ in README_BLOCKS} == README_KINDS
    assert len(README_BLOCKS) * 2 == README.count("\n```")
    assert readme_blocks("sh tests") == [("sh tests", "./test_all.py\n")]
    assert "\n./test_all.py\n" in contents(os.path.join(HERE, ".ci", "run")).decode()


@pytest.mark.parametrize("text", [text for _, text in readme_blocks("sh")])
def test_the_readmes_harmless_blocks(text):
    for line in text.splitlines():  # root runs this, too
        assert "install" not in line or "--dry-run" in line
    done = subprocess.run(["sh", "-e"], input=text.encode(), cwd=HERE, env=UTC_ENV, stdout=subprocess.PIPE,
                          timeout=120)
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize("text", [text for _, text in readme_blocks("conf")])
def test_the_readmes_configurations(text):
    clockctl = load("clockctl")
    for name in clockctl.parse_assignments(text):
        assert re.search(r"^    (\w+, )*%s\b" % name, clockctl.__doc__, re.M), name


class StandInRoot:
    """A directory that stands for /: /usr/local, /var, /service and /tmp of scripts are within."""

    def __init__(self, directory, port):
        self.root, self.source, self.calls = directory, directory / "source", directory / "calls"
        self.stand_ins = directory / "stand-ins"
        for place in (self.source, self.stand_ins, directory / "tmp"):
            place.mkdir()
        for name in [name + ".py" for name in SCRIPTS] + ["clockctl"]:
            self.write(self.source / name, self.mapped(contents(os.path.join(HERE, name)).decode()))
        for place, _, names in os.walk(os.path.join(HERE, "svc")):
            folder = self.source / os.path.relpath(place, HERE)
            folder.mkdir()
            for name in names:
                self.write(folder / name, self.mapped(contents(os.path.join(place, name)).decode()))
        self.replace("clockspeed.py", 'choose_clock("-n" in options)', "choose_clock(True)")
        self.replace("svc/taiclockd/run", "/taiclockd\n", "/taiclockd -i %s\n" % README_ADDRESS)
        self.write(self.source / "sntpclock.py",
                   '#!/bin/sh\nexec %s -p %d "$@"\n' % (path_of("sntpclock"), port))
        self.write(self.source / "clockadd.py", self.recorder("clockadd"))
        self.write(self.source / "svc" / "install",
                   '#!/bin/sh\nexec %s --dry-run --root %s "$@"\n' % (
                       os.path.join(HERE, "svc", "install"), directory / "tmp"))
        self.write(self.stand_ins / "setuidgid", '#!/bin/sh\nshift\nexec "$@"\n')
        for name in ("chown", "groupadd", "groupdel", "systemctl", "useradd", "userdel"):
            self.write(self.stand_ins / name, self.recorder(name))

    def write(self, path, text):
        path.write_text(text)
        path.chmod(0o755)

    def replace(self, name, old, new):
        text = (self.source / name).read_text()
        assert old in text
        (self.source / name).write_text(text.replace(old, new))

    def recorder(self, name):
        return '#!/bin/sh\necho "%s $*" >> %s\n' % (name, self.calls)

    def mapped(self, text):
        text = re.sub(r"(?<![\w./-])/(?=(usr/local|var|service|tmp)\b)", "%s/" % self.root, text)
        return re.sub(r"\b(192\.0\.2\.\d+|127\.0\.0\.1)\b", README_ADDRESS, text)

    def run(self, text):
        """A block, as root's shell would -> (exit status, output)."""
        path = "%s:%s:%s" % (self.root / "usr/local/bin", self.stand_ins, os.environ["PATH"])
        done = subprocess.run(["sh", "-e"], input=self.mapped(text).encode(), cwd=str(self.source), timeout=120,
                              env=dict(UTC_ENV, PATH=path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout.decode()


@pytest.fixture
def stand_in_root(tmp_path):
    need("svscan", "svstat", "multilog", "tai64nlocal")
    (tmp_path / "chronyd").mkdir()
    (tmp_path / "root").mkdir()
    with Chronyd(tmp_path / "chronyd") as server:
        root = StandInRoot(tmp_path / "root", server.port)
        try:
            yield root
        finally:
            for pid, command in processes_in(root.root).items():
                if command.startswith("svscan "):
                    os.kill(pid, signal.SIGTERM)
            for place in (root.root / "var/svc.d").glob("*"):
                for each in filter(os.path.exists, (str(place / "supervise"), str(place / "log/supervise"))):
                    subprocess.run(["svc", "-dx", os.path.dirname(each)])
            assert await_that(lambda: not processes_in(root.root)), processes_in(root.root)


def test_a_host_set_up_by_the_readmes_blocks(stand_in_root):
    said = ""
    for kind, text in readme_blocks("sh host"):
        status, output = stand_in_root.run(text)
        assert status == 0, "%s\n%s" % (text, output)
        said += output
    calls = stand_in_root.calls.read_text()
    assert "groupadd nofiles\n" in calls and re.search(r"^useradd .* clocksd$", calls, re.M)
    for service in ("clockspeed", "clockspeed_adjust"):
        assert re.search(r"/service/%s: up \(pid" % service, said)
    for pattern in (r"^before: ", r"mark: offset .*, used$", r"^mark: offset \S+ s from ntp ", r"^clock now  ",
                    r"^atto: ", "^offset, real time minus system clock", r"info: result: offset [+-]0\.000"):
        assert re.search(pattern, said, re.M), (pattern, said)
    assert (stand_in_root.root / "tmp/rate.svg").exists()
    assert (stand_in_root.root / "tmp/marks.csv").read_text().count("\n") >= 2
    assert "warning" not in (stand_in_root.root / "var/multilog/clockspeed_adjust/current").read_text()

    # what comes after it, each from the same beginning
    (stand_in_root.root / "usr/local/etc/clockspeed.keys").write_text("1 SHA256 HEX:00\n")
    for kind, text in readme_blocks("sh client", "sh also"):
        stand_in_root.run("cp -R svc/clockspeed svc/clockspeed_adjust svc/taiclockd /var/svc.d/\n")
        status, output = stand_in_root.run(text)
        assert status == 0, "%s\n%s" % (text, output)
        if "chpst" in text or "s6-setuidgid" in text:  # the same as svc/install makes of them
            supervisor = "runit" if "chpst" in text else "s6"
            install = load("svc/install")
            for script in SERVICE_SCRIPTS:
                before = (stand_in_root.source / script).read_text()
                for old, new in install.SUPERVISORS[supervisor].words:
                    before = before.replace(old, new)
                after = (stand_in_root.root / "var/svc.d" / os.path.relpath(script, "svc")).read_text()
                assert after == before and "exec setuidgid" not in after
        if "CLOCK_TYPE" in text:
            assert "\nafter:  " in output
    assert "systemctl disable --now chrony\n" in stand_in_root.calls.read_text()
    assert "clockadd \n" in stand_in_root.calls.read_text()
    assert not (stand_in_root.root / "service/clockspeed").exists()
    for kind, text in readme_blocks("sh install"):
        status, output = stand_in_root.run(text)
        assert status == 0 or "clockctl check" in text and status < 3, "%s\n%s" % (text, output)


def test_the_readme_explains_every_line_of_the_logs():
    for name in ("clockspeed", "taiclockd"):
        source = contents(path_of(name)).decode()
        words = re.findall(r"""(?:\bsay\(\*?|else )\(?"(\w+)(?:: |",)""", source)
        assert len(words) > 2
        for word in words:
            assert re.search(r"^\| `%s: " % word, README, re.M), (name, word)
        for doing in re.findall(r'trouble\("([^"]+)"', source):
            assert doing in README, (name, doing)


def test_the_readme_names_every_program_command_and_heading():
    for name in SCRIPTS + ("clockctl",):
        assert re.search(r"^\| `%s\b" % name, README, re.M), name
    listed = re.search(r"one command for all: `([a-z ]+)`", README).group(1).split()
    assert sorted(listed + ["help", "version"]) == sorted(load("clockctl").COMMANDS)
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
               for line in README.splitlines() if line.startswith("#")}
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert link[1:] in anchors if link.startswith("#") else os.path.exists(os.path.join(HERE, link)), link


def test_the_readmes_picture_is_one():
    picture = xml.dom.minidom.parse(os.path.join(HERE, "svc", "graph.svg"))
    assert picture.getElementsByTagName("polyline")
# ==== leap seconds that the servers announce ========================================================

NEW_YEAR_SEC = 1798761600  # 2027-01-01


@pytest.mark.parametrize("votes, days, wanted", [
    ("+", 0, "1798761600 +1\n"), ("-", 0, "1798761600 -1\n"), (".", 0, None), ("+", 1, None), ("+", -1, None),
    ("++.", 0, "1798761600 +1\n"), ("+..", 0, None), ("+-.", 0, None), ("--+", 0, "1798761600 -1\n"),
    ("+.", 0, None), ("+", 181, "1814400000 +1\n"), ("x..", 0, None), ("x+", 0, None), ("xx...", 0, None),
    ("+++..", 0, "1798761600 +1\n"),
    ("xx+++", 0, "1798761600 +1\n")])
def test_sntpclock_keeps_what_the_majority_announces_on_the_last_day(votes, days, wanted, tmp_path):
    """+ - . are servers that agree on the time, x is a falseticker that announces a second more."""
    off_ns = (NEW_YEAR_SEC + 86400 * days - 3600) * 10**9 - time.time_ns()

    def server(vote):
        off = off_ns + 900 * 10**9 * (vote == "x")
        flags = ".+-".index(vote.replace("x", "+")) << 6 | 4 << 3 | 4
        return lambda query, n: [ntp_answer(query, off, flags=flags)]
    (tmp_path / "leap").write_text("1798761600 +1\n")  # of an hour ago
    (tmp_path / "leap.tmp").symlink_to("victim")
    hosts = ["127.0.0.%d" % (number + 1) for number in range(len(votes))]
    with contextlib.ExitStack() as servers:
        port = servers.enter_context(Rogue(server(votes[0]))).port
        for vote, host in zip(votes[1:], hosts[1:]):
            servers.enter_context(Rogue(server(vote), host, port))
        done = ask("sntpclock", port, "-r", 1, "-l", 0, "-s", tmp_path, hosts=hosts)
    if votes == "x+":
        assert done.returncode == 111 and (tmp_path / "leap").read_text() == "1798761600 +1\n"
        return
    assert done.returncode == 0, done.stderr
    assert ((tmp_path / "leap").read_text() if (tmp_path / "leap").exists() else None) == wanted
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("scale, sign, table, heeded", [
    ("utc", 1, "", True), ("utc", -1, "", True), ("tai", 1, "", False),
    ("utc", 1, "#@ 3991593600\n", True),  # expired on 2026-06-28
    ("utc", 1, "#@ 4102444800\n", False)])  # 2030: it would know
def test_clockspeed_heeds_the_servers_leap_where_no_table_tells(scale, sign, table, heeded, simulate,
                                                                 tmp_path, monkeypatch):
    path = tmp_path / "table"
    path.write_text(table + "2272060800 10\n")
    monkeypatch.setenv("LEAPSECS", str(path))
    monkeypatch.setenv("CLOCK_SCALE", scale)
    kernel = FakeKernel(ppm=5, start_ns=(NEW_YEAR_SEC - 40000) * 10**9)
    simulation = simulate(kernel)

    def announce(text):
        if text is None:
            (tmp_path / "etc" / "leap").unlink()
        else:
            (tmp_path / "etc" / "leap").write_text(text)
        simulation.mark()
        simulation.run(600)
        return kernel.fields["status"] & 0x30
    bit = (0x10 if sign == 1 else 0x20) if heeded else 0
    for wrong in ("", "soon", "1798761600 2", "1798761600 0", "1798848000 1", "1798675200 1", "1798761601 1",
                  "1798761600 1 1", "9" * 5000, "\0" * 70000):
        assert announce(wrong) == 0, wrong
    announced = "%d %+d\n" % (NEW_YEAR_SEC, sign)
    assert announce(announced) == bit
    assert announce(None) == 0, "taken back"
    assert announce(announced) == bit
    assert sum(line.startswith("leap: the time servers announce") for line in simulation.lines) == 2 * heeded
    simulation.run(NEW_YEAR_SEC - kernel.clock_ns() // 10**9 - 30)
    simulation = simulate(kernel)
    simulation.run(3600)
    assert kernel.leapt == heeded and kernel.fields["status"] & 0x30 == 0
    assert abs(kernel.clock + sign * heeded * 1e9) < 1e6
    if heeded:
        assert kernel.fields["tai"] == 10 + sign
    assert not [line for line in simulation.lines if line.startswith(("moved", "slew", "step"))]
    # The next run knows it still, and so does the next boot.
    (tmp_path / "etc" / "leap").unlink()
    kernel.fields["tai"] = 0
    simulation = simulate(kernel)
    assert simulation.source.startswith("phase and rate of etc/state")
    simulation.run(3600)
    assert kernel.fields["tai"] == 10 + sign * heeded
    assert abs(kernel.clock + sign * heeded * 1e9) < 1e6 and not simulation.lines
    simulation.mark(-sign * heeded * 10**9)  # as the servers have it
    kernel.sleep(60)
    kernel.boot, kernel.tick, kernel.fields["tai"] = "boot-2", 10**9, 0
    simulation = simulate(kernel)
    simulation.mark(-sign * heeded * 10**9)
    assert kernel.fields["tai"] == 10 + sign * heeded and simulation.daemon.marks["used"] == 1
    # A table that reaches so far knows better, be it that there was none; it is no reason to move the clock.
    for leap_rows in [], [(NEW_YEAR_SEC, 10 + sign)]:
        rows = "".join("%d %d\n" % (start + 2208988800, offset) for start, offset in leap_rows)
        path.write_text("#@ 4102444800\n2272060800 10\n" + rows)
        kernel.sleep(60)
        simulation = simulate(kernel)
        simulation.run(600)
        simulation.mark(-sign * heeded * 10**9)
        want = (10 + sign if leap_rows else 10) if scale == "utc" else 10
        assert kernel.fields["tai"] == want and (scale == "tai" or simulation.daemon.announced == [])
        assert abs(kernel.clock + sign * heeded * 1e9) < 1e6 and not stepped(kernel)


@pytest.mark.parametrize("announced", [
    [[1798761600, 2]], [[1798761601, 1]], [[1798848000, 1]], [[1798761600, 1]] * 2, [[1, 1]], [[1798761600.0, 1]],
    [[1798761600, True]], [[10**30, 1]], [["1798761600", 1]], [[1798761600]], [1], 1, "x", None, {"a": 1},
    [[1814400000, 1], [1798761600, 1]]])
def test_no_announced_leap_second_is_taken_from_a_damaged_state(announced, simulate, tmp_path, capfd):
    kernel = FakeKernel(start_ns=(NEW_YEAR_SEC + 10**8) * 10**9)
    simulation = simulate(kernel)
    for _ in range(2):
        simulation.mark()
        simulation.run(600)
    for value, source in ((announced, "rate of etc/atto"), ([], "phase and rate of etc/state")):
        simulation.daemon.save_state()
        path = tmp_path / "etc" / "state"
        path.write_text(json.dumps(dict(json.loads(path.read_text()), announced=value)))
        simulation = simulate(kernel)
        assert simulation.source == source and simulation.daemon.announced == []
        assert ("unable to use etc/state" in capfd.readouterr().err) == (value != [])
        simulation = simulate(kernel)


def test_one_announced_leap_second_after_another(simulate, tmp_path, monkeypatch):
    """Half a year on, and no table has either: the second one is added to the first."""
    path = tmp_path / "table"
    path.write_text("2272060800 10\n")
    monkeypatch.setenv("LEAPSECS", str(path))
    kernel, leapt = FakeKernel(start_ns=(NEW_YEAR_SEC - 3600) * 10**9), 0
    for start in NEW_YEAR_SEC, NEW_YEAR_SEC + 181 * 86400:
        kernel.tai += (start - 3600) * 10**9 - kernel.clock_ns()
        kernel.leapt, kernel.boot, kernel.tick = False, "boot-%d" % start, 10**9
        simulation = simulate(kernel)
        (tmp_path / "etc" / "leap").write_text("%d +1\n" % start)
        for _ in range(3):
            simulation.mark(-leapt * 10**9)
            simulation.run(600)
        simulation.run(7200)
        leapt += 1
        assert kernel.leapt and kernel.fields["tai"] == 10 + leapt
        assert abs(kernel.clock + leapt * 1e9) < 1e6
        (tmp_path / "etc" / "leap").unlink()
        simulation.daemon.save_state()


def test_a_table_that_learns_of_a_leap_second_afterwards_moves_no_clock(simulate, tmp_path, monkeypatch):
    monkeypatch.setenv("LEAPSECS", leap_table(tmp_path))
    kernel = FakeKernel(ppm=5)
    simulation = simulate(kernel)
    for _ in range(4):
        simulation.mark()
        simulation.run(600)
    leap_table(tmp_path, (1782864000, 38))  # 2026-07-01
    simulation.run(8 * 3600)
    assert abs(kernel.clock) < 5e6
    assert simulation.lines[-1] == "leap: another table tells another TAI; a mark is wanted"
    for _ in range(3):
        simulation.mark()
        simulation.run(600)
    assert abs(kernel.clock) < 1e6 and kernel.fields["tai"] == 38
    assert not [line for line in simulation.lines if line.startswith(("moved", "slew", "step"))]


# ==== bad days ======================================================================================
# Those that have no test above.

def settled_daemon(simulate, ppm=20, waits=(64, 541, 1623, 3600, 3600, 3600), **options):
    """A kernel and a simulation that has learned."""
    kernel = FakeKernel(ppm=ppm, **options)
    simulation = simulate(kernel)
    for wait_sec in waits:
        simulation.mark()
        simulation.run(wait_sec)
    assert abs(kernel.clock) < 1e6 and abs(simulation.daemon.estimator.rate()[0] - ppm) < 0.1
    return kernel, simulation


def outcomes(simulation):
    return [line.rpartition(" ")[2] for line in simulation.lines if line.startswith("mark: ")]


def stepped(kernel):
    return [modes for modes, _ in kernel.calls if modes == 0x2100]


@pytest.mark.parametrize("days, first", ((30, "used"), (1, "doubted")))
def test_a_server_that_is_back_after_long_3_s_off_is_believed_and_slewed(simulate, days, first):
    """In a month a clock may drift by so much; in a day it can't, and the next mark has to confirm it."""
    kernel, simulation = settled_daemon(simulate)
    simulation.run(days * 86400)
    assert abs(kernel.clock) < 1e7, "alone"
    simulation.mark(3 * 10**9)
    assert outcomes(simulation)[-1] == first
    simulation.run(541)
    assert abs(kernel.clock) < (1e7 if first == "doubted" else 6e8)
    for _ in range(4):
        simulation.mark(3 * 10**9)
        simulation.run(541)
    assert "slew: +3.0" in "".join(simulation.lines)
    simulation.run(3 * 3600)
    assert abs(kernel.clock - 3e9) < 2e6 and not stepped(kernel)
    assert abs(simulation.daemon.estimator.rate()[0] - 20) < 0.5, "it is no drift"


def test_single_wild_marks_move_nothing(simulate):
    kernel, simulation = settled_daemon(simulate)
    rng, worst = random.Random(SEED), 0
    for number in range(60):
        wild = number % 4 == 3
        good_ns, wild_ns = rng.randrange(-10**5, 10**5), rng.choice((-1, 1)) * 10 ** rng.randrange(7, 12)
        simulation.mark(wild_ns if wild else good_ns)
        assert outcomes(simulation)[-1] == ("doubted" if wild else "used")
        simulation.run(3600)
        worst = max(worst, abs(kernel.clock))
    assert worst < 3e5


def test_a_hardware_clock_in_local_time_is_put_right_by_the_first_mark(simulate):
    for hours in (-11, 2, 14):
        kernel = FakeKernel(ppm=20, behind_ns=hours * 3600 * 10**9)
        simulation = simulate(kernel, "tz%d" % hours)
        simulation.run(3600)
        simulation.mark()
        assert abs(kernel.clock) < 1e6 and len(stepped(kernel)) == 1


def test_a_counter_that_goes_back_begins_the_phase_anew(simulate):
    """A process that is restored elsewhere from a snapshot."""
    kernel, simulation = settled_daemon(simulate)
    kernel.tick -= 10 * 3600 * 10**9
    kernel.clock -= 2e8
    simulation.run(64)
    assert [line for line in simulation.lines if line.startswith("counter: ")] == [
        "counter: it went back by 9.98 h, as in a machine that is restored from a snapshot; a mark is wanted"]
    simulation.mark()
    assert outcomes(simulation)[-1] == "used"
    simulation.run(1200)
    assert abs(kernel.clock) < 1e6 and abs(simulation.daemon.estimator.rate()[0] - 20) < 1
    # The file remembers a counter that is ahead of this one's.
    kernel.tick -= 10 * 3600 * 10**9
    assert simulate(kernel).source == "rate of etc/state"


# What a migration does to the counter, in s: on the new host it stands elsewhere and, as the machine stands
# still on the way, everything is late.  Linux's clock follows its counter forward, never back.
MIGRATIONS = (0, 0.5, 7200, -7200)
AWAY_SEC = 0.2
PPM_BEFORE, PPM_AFTER = 20, -35


@pytest.mark.parametrize("jump_sec", MIGRATIONS)
def test_a_migrated_machine_learns_the_new_hosts_counter(simulate, jump_sec):
    """Rate and value of the counter change at once."""
    kernel, simulation = settled_daemon(simulate, PPM_BEFORE)
    kernel.ppm = PPM_AFTER
    kernel.tai += round(AWAY_SEC * 1e9)
    kernel.tick += round(jump_sec * 1e9)
    kernel.clock += (max(jump_sec, 0) - AWAY_SEC) * 1e9
    before = len(outcomes(simulation))
    for _ in range(6):
        simulation.run(541)
        simulation.mark()
    assert outcomes(simulation)[before:][-2:] == ["used", "used"]
    assert abs(simulation.daemon.estimator.rate()[0] - PPM_AFTER) < 0.5
    assert abs(simulation.daemon.estimator.real(kernel.tick)[0] - kernel.tai) < 1e5
    assert not stepped(kernel)
    if abs(jump_sec) < 60 or jump_sec < 0:
        assert abs(kernel.clock) < 1e5
    else:
        assert any(line.startswith("slew: -7") for line in simulation.lines[-13:]), "clockctl set does that"
    assert any(line.startswith("counter: it went back") for line in simulation.lines) == (jump_sec < 0)


@pytest.mark.parametrize("jump_sec", MIGRATIONS)
def test_a_clockspeed_that_is_migrated_runs_on_and_says_so(daemon, tmp_path, jump_sec):
    """The process, with a counter and a clock that it reads from a file; observing."""
    world = tmp_path / "world"
    path = patched("clockspeed", "Clock.read = lambda self: tuple(map(int, open(%r).read().split()))\n"
                   "Clock.suspended_ns = lambda self: 0" % str(world), tmp_path)
    ticks, clock_ns, real_ns = 10**13, 1796000000 * 10**9, 1796000000 * 10**9

    def look():
        (tmp_path / "new").write_text("%d %d" % (ticks, clock_ns))
        os.rename(str(tmp_path / "new"), str(world))
    look()
    process, ppm = daemon(name=path), PPM_BEFORE
    for count in range(1, 13):
        ticks, clock_ns = ticks + 541 * 10**9, clock_ns + 541 * 10**9
        real_ns += 541 * (10**9 + ppm * 1000)
        if count == 7:
            ppm = PPM_AFTER
            real_ns += round(AWAY_SEC * 1e9)
            ticks, clock_ns = ticks + round(jump_sec * 1e9), clock_ns + round(max(jump_sec, 0) * 1e9)
        look()
        process.write(CODES.pack((real_ns - clock_ns) * 10**9))
        process.wait_for("mark: ", count)
    assert process.stop() == 0
    status = json.loads(contents(process.home + "/etc/status"))
    assert abs(status["rate_ppm"] - PPM_AFTER) < 0.5
    assert abs(status["offset_ns"] - (real_ns - clock_ns)) < 1e5
    marks = [line.rpartition(" ")[2] for line in process.lines() if line.startswith("mark: ")]
    assert marks == ["used"] * 6 + (["used"] if jump_sec < 0 else []) + ["doubted"] * 2 + ["used"] * (
        3 if jump_sec < 0 else 4)
    assert any(line.startswith("counter: it went back") for line in process.lines()) == (jump_sec < 0)


@pytest.mark.parametrize("gone_sec", (0.3, 60, 86400))
def test_a_machine_that_was_paused_gets_its_clock_back(simulate, gone_sec):
    """The counter and the clock stood still, and nothing in the machine can tell."""
    kernel, simulation = settled_daemon(simulate)
    kernel.tai += round(gone_sec * 1e9)
    kernel.clock -= gone_sec * 1e9
    for _ in range(6):
        simulation.mark()
        simulation.run(300)
    assert abs(simulation.daemon.estimator.rate()[0] - 20) < 5
    assert abs(simulation.daemon.estimator.real(kernel.tick)[0] - kernel.tai) < 1e6, "it knows better"
    assert not stepped(kernel), "clockctl set does that"
    if gone_sec < 1:
        assert abs(kernel.clock) < 1e6
    else:
        assert any(line.startswith("slew: ") for line in simulation.lines)


def test_a_mark_right_after_a_suspend_counts(simulate):
    """It may be in the FIFO before clockspeed has seen that it slept."""
    kernel, simulation = settled_daemon(simulate)
    kernel.tai += 8 * 3600 * 10**9
    kernel.slept_ns += 8 * 3600 * 10**9
    kernel.clock -= 4e8
    simulation.mark()
    assert "suspend: " in "".join(simulation.lines[-3:]) and outcomes(simulation)[-1] == "used"
    simulation.run(1200)
    assert abs(kernel.clock) < 1e6


@pytest.mark.parametrize("years", (20, -20, 230, -100))
def test_a_system_clock_that_jumps_by_decades_is_said_and_learned_from_never(simulate, years):
    kernel, simulation = settled_daemon(simulate)
    kernel.clock += years * 31556952e9
    simulation.run(3600)
    moved, = [line for line in simulation.lines if line.startswith("moved: ")]
    moved_sec = float(moved.split("by ")[1][:-2])
    assert abs(moved_sec - years * 31556952) <= 27, "TAI - UTC was another then"
    for _ in range(3):
        clock_tai_ns = simulation.module.to_tai(kernel.clock_ns(), simulation.daemon.rows)
        simulation.daemon.mark(CODES.pack((kernel.tai - clock_tai_ns) * 10**9))
        simulation.due = simulation.daemon.wake(True)
        simulation.run(600)
    assert simulation.daemon.marks == {"used": 9, "doubted": 0, "refused": 0}
    assert abs(simulation.daemon.estimator.rate()[0] - 20) < 0.1
    kernel.clock = 0.0  # clockctl set
    kernel.slew_us = 0
    for _ in range(3):
        simulation.mark()
        simulation.run(600)
    assert abs(kernel.clock) < 1e6 and not stepped(kernel)


@pytest.mark.parametrize("turn_sec", (2**32 - 2208988800, 2**31, 2**32))  # 2036-02-07, 2038-01-19, 2106-02-07
def test_clockspeed_across_the_turns_of_32_bits(simulate, turn_sec):
    kernel = FakeKernel(ppm=20, start_ns=(turn_sec - 7200) * 10**9)
    simulation = simulate(kernel)
    for _ in range(8):
        # as sntpclock makes it, through NTP's 32 bits of seconds
        now_ns = kernel.tai - 37 * 10**9
        query = SNTP.make_query()
        packet = ntp_answer(query, receive=ntp_stamp(now_ns), transmit=ntp_stamp(now_ns))
        answer = SNTP.decode_answer(query, packet, kernel.clock_ns() // 10**9)
        simulation.mark(answer.sent_ns - now_ns)
        simulation.run(1800)
    assert simulation.daemon.marks == {"used": 8, "doubted": 0, "refused": 0}
    assert kernel.clock_ns() > turn_sec * 10**9 and abs(kernel.clock) < 1e5
    assert simulate(kernel).source == "phase and rate of etc/state"


class Libc32:
    """The C library of a 32-bit system before 2020, with a FakeKernel below it."""

    def __init__(self, module, kernel):
        import ctypes
        self.module, self.kernel, self.set_errno = module, kernel, ctypes.set_errno

    def syscall(self, *_):
        self.set_errno(errno.ENOSYS)
        return -1

    def adjtimex(self, buffer):
        values = dict(zip(self.module.TIMEX_FIELDS, self.module.TIMEX32.unpack(buffer.raw[:128])))
        known = "offset freq maxerror esterror status constant sec frac tick".split()
        now = self.kernel.adjtimex(values["modes"], **{name: values[name] for name in known})
        values.update({name: value for name, value in now.items() if name in values})
        buffer[:128] = self.module.TIMEX32.pack(*values.values())
        return now["state"]


def test_32_bits_of_time_are_enough_until_2038(simulate, monkeypatch, capfd):
    import ctypes
    kernel = FakeKernel(ppm=20, behind_ns=3 * 10**9)
    simulation = simulate(kernel)
    libc = Libc32(simulation.module, kernel)
    monkeypatch.setattr(ctypes, "sizeof", lambda kind: 4)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
    simulation.clock.adjtimex = simulation.module.adjtimex
    for wait_sec in (64, 541, 1623, 3600):
        simulation.mark()
        simulation.run(wait_sec)
    assert abs(kernel.clock) < 1e5 and abs(kernel.rate_error_ppm()) < 0.1
    assert kernel.fields["tai"] == 37
    kernel.clock += 20 * 31556952e9  # a slew of 20 years has more microseconds than 32 bits
    simulation.run(600)
    with monkeypatch.context() as patch:
        patch.setattr(simulation.module.Clockspeed, "tell_slew", lambda self: None)
        simulation.daemon.step(simulation.daemon.clock_ns + 2**31 * 10**9, "in a test")
    err = capfd.readouterr().err
    assert "unable to step the clock: " in err and "steer" not in err


@pytest.fixture
def unprivileged(public_tmp):
    """start(*options) -> clockspeed as a user without any capability, on a home that root made."""
    home = public_tmp / "home"
    (home / "etc").mkdir(parents=True)
    shutil.copy(path_of("clockspeed"), str(public_tmp / "clockspeed"))
    (public_tmp / "clockspeed").chmod(0o755)
    (public_tmp / "home.log").write_text("")
    os.mkfifo(str(home / "adjust"), 0o600)
    if os.getuid() == 0:
        need("setpriv")
        os.chown(str(home / "adjust"), 65534, -1)
    made = []

    def start():
        # Without the capability, or this would steer the clock of this machine.
        drop = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set=-all",
                "--inh-caps=-all", "--no-new-privs"] if os.getuid() == 0 else []
        with open(str(home) + ".log", "ab") as log:
            made.append(subprocess.Popen(drop + [str(public_tmp / "clockspeed"), str(home)],
                                         stdout=log, stderr=log, env=UTC_ENV))
        return home, made[-1]
    yield start
    for process in made:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_without_the_privilege_and_with_a_read_only_etc_it_observes_and_says_both_once(unprivileged):
    home, process = unprivileged()
    log = pathlib.Path(str(home) + ".log")
    if os.getuid():
        (home / "etc").chmod(0o555)
    assert await_that(lambda: "start: observing, " in log.read_text())
    with open("/proc/%d/status" % process.pid) as status:
        assert "CapEff:\t0000000000000000\n" in status.read()
    for count in range(1, 4):
        with open(str(home / "adjust"), "wb", buffering=0) as fifo:
            fifo.write(CODES.pack(0))
        assert await_that(lambda: log.read_text().count("mark: ") == count)
    process.terminate()
    assert process.wait(30) == 0
    text = log.read_text()
    assert text.count("warning: unable to steer the clock: Operation not permitted; observing only\n") == 1
    for name in ("state", "status"):
        assert text.count("unable to write etc/%s: Permission denied" % name) == 1
    assert "Traceback" not in text and os.listdir(str(home / "etc")) == []


# ==== hostile neighbours ============================================================================

def test_no_module_and_no_environment_of_others_gets_into_a_script(tmp_path):
    """In the current directory, beside the script, in PYTHONPATH: what is planted is not run."""
    for name in SCRIPTS + ("clockctl",):
        shutil.copy(path_of(name), str(tmp_path / name))
    text = "import os\nopen(%r, 'a').close()\nraise SystemExit('planted')\n" % str(tmp_path / "hit")
    for module in ("struct", "os", "time", "json", "ctypes", "socket", "getopt", "select", "_struct", "re", "ssl",
                   "sitecustomize", "usercustomize", "encodings", "contextlib", "collections", "math",
                   "hashlib"):
        (tmp_path / (module + ".py")).write_text(text)
    place = str(tmp_path)
    env = dict(UTC_ENV, PYTHONPATH=place, PYTHONHOME=place, PYTHONUSERBASE=place, PYTHONSTARTUP=place + "/os.py",
               PYTHONINSPECT="1", CLOCKSPEED_CONF="/dev/null")
    for name in SCRIPTS + ("clockctl",):
        done = subprocess.run(["./" + name, "--help"], cwd=str(tmp_path), env=env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"") and b"SYNOPSIS" in done.stdout
    for command, stdin in (["./clockview"], bytes(16)), (["./sntpclock", "-t", "1", "127.0.0.1"], b""), \
            (["./taiclock", "-t", "1", "127.0.0.1"], b""), (["./clockspeed", "-n", "none"], b""), \
            (["./clockctl", "status"], b""), (["./taiclockd", "-p", "99999"], b""):
        done = subprocess.run(command, cwd=str(tmp_path), env=env, input=stdin, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=60)
        assert done.returncode in (0, 100, 111)
        assert b"planted" not in done.stderr and b"Traceback" not in done.stderr
    assert not (tmp_path / "hit").exists()


def test_planted_links_are_not_followed(tmp_path, host):
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "home").mkdir(exist_ok=True)
    shutil.rmtree(str(tmp_path / "home" / "etc"), ignore_errors=True)
    for target in (victim, tmp_path / "nowhere"):
        (tmp_path / "home" / "etc").symlink_to(target)
        done = run("clockspeed", "-n", tmp_path / "home")
        assert done.returncode == 111 and "unable to use %s/home/etc: " % tmp_path in done.stderr
        (tmp_path / "home" / "etc").unlink()
    assert os.listdir(str(victim)) == []
    precious = victim / "precious"
    precious.write_text("precious")
    for name in ("kisses", "leap"):
        (tmp_path / (name + ".tmp")).symlink_to(precious)
        (tmp_path / name).symlink_to(precious)
    done = ask("sntpclock", 9, "-s", tmp_path)
    assert done.returncode == 111 and "unable to read %s/kisses: " % tmp_path in done.stderr
    (tmp_path / "kisses").unlink()
    with Rogue(lambda query, n: [ntp_answer(query, stratum=0, refid=b"RATE")]) as server:
        ask("sntpclock", server.port, "-s", tmp_path)
    assert "RATE" in (tmp_path / "kisses").read_text() and not (tmp_path / "kisses").is_symlink()
    output = tmp_path / "metrics.prom"
    for planted in (output, tmp_path / "metrics.prom.tmp"):
        planted.symlink_to(precious)
    (host.home / "etc").mkdir(exist_ok=True)
    (host.home / "etc" / "status").write_text(json.dumps(a_status()))
    done = host.clockctl("metrics", "--output", output)
    assert done.returncode == 0 and not output.is_symlink()
    assert precious.read_text() == "precious"


def test_a_writer_can_not_fill_clockspeeds_memory_nor_hold_it_up(daemon):
    process = daemon()
    process.write(CODES.pack(0))
    process.wait_for("mark: ")
    before_kb, rng = resident_kb(process.process.pid), random.Random(SEED)
    fd = os.open(process.home + "/adjust", os.O_WRONLY | os.O_NONBLOCK)
    end, written = time.monotonic() + 5, 0
    while time.monotonic() < end:
        size = rng.choice((1, 16, 17, 512, 4096, 65536))
        try:
            packet = CODES.pack(rng.randrange(-10**15, 10**15))
            written += os.write(fd, packet * (size // 16) + bytes(size % 16))
        except BlockingIOError:
            time.sleep(0.01)
    begin = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - begin < 20 and written > 10**5
    os.close(fd)
    status = json.loads(contents(process.home + "/etc/status"))
    assert sum(status["marks"].values()) > 1000
    assert os.stat(process.home + "/etc/state").st_size < 65536
    process = daemon()  # what was learned of it is taken up, and no reason to stop
    assert resident_kb(process.process.pid) - before_kb < 4096


# Sends from the sockets that argv names, in turn, to all ports from the first to the last of 127.0.0.1, as
# fast as one core can, until TERM; then prints how many and in how many seconds.
FLOODER = r"""
import ctypes, itertools, os, signal, socket, struct, sys, time
packet, first, last, *descriptors = bytes.fromhex(sys.argv[1]), *map(int, sys.argv[2:])
MMSGHDR = struct.Struct("@PIPNPNi0PI0P")  # name, its size, parts, their number, control data, flags; length
BATCH, libc, ending = 256, ctypes.CDLL(None), []
signal.signal(signal.SIGTERM, lambda *_: ending.append(1))
keep = [ctypes.create_string_buffer(packet, len(packet))]
part = struct.pack("@PN", ctypes.addressof(keep[0]), len(packet))  # struct iovec
keep.append(ctypes.create_string_buffer(part))
messages = []
for port in range(first, max(last, first + BATCH - 1) + 1):
    port = min(port, last)
    name = struct.pack("=H", socket.AF_INET) + struct.pack(">H4s8x", port, bytes([127, 0, 0, 1]))
    keep.append(ctypes.create_string_buffer(name))
    messages.append(MMSGHDR.pack(ctypes.addressof(keep[-1]), 16, ctypes.addressof(keep[1]), 1, 0, 0, 0, 0))
keep.append(ctypes.create_string_buffer(b"".join(messages)))
count, sent, at, begin = len(messages), 0, 0, time.monotonic()
print("ready", flush=True)
for descriptor in itertools.cycle(descriptors):
    if ending:
        break
    start = ctypes.c_void_p(ctypes.addressof(keep[-1]) + at * MMSGHDR.size)
    done = libc.sendmmsg(descriptor, start, min(BATCH, count - at), 0)
    sent, at = sent + max(done, 0), (at + max(done, 1)) % count
print(sent, time.monotonic() - begin)
"""
FLOOD_WANTED = 100000  # datagrams a second
FLOOD_LEAST = 20000  # on a slow or busy machine: even then the queue of some 270 is filled anew 70 times a second


class Flood:
    """A process that sends a packet over and over from these sockets to these ports; `rate` when it is over."""

    def __init__(self, sockets, packet, ports):
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", FLOODER, packet.hex()]
            + [str(number) for number in ports + tuple(sock.fileno() for sock in sockets)],
            stdout=subprocess.PIPE, pass_fds=[sock.fileno() for sock in sockets])
        assert self.process.stdout.readline() == b"ready\n"

    def end(self):
        self.process.terminate()
        sent, sec = self.process.communicate(timeout=60)[0].split()
        self.rate = int(sent) / float(sec)


def dropped(port):
    """How many datagrams for that UDP port of this host the kernel has dropped."""
    with open("/proc/net/udp") as file:
        return sum(int(line.split()[-1]) for line in file if ":%04X " % port in line.split(" rem")[0][:22])


def patched(name, statement, directory):
    """A copy of a script with a statement put in before it starts."""
    path = directory / name
    text, start = contents(path_of(name)).decode(), "\nif __name__ =="
    path.write_text(text.replace(start, "\n%s\n\n%s" % (statement, start)))
    path.chmod(0o755)
    return str(path)


def ask_in_a_flood(path, answer, spoofer, exchanges):
    """A client asks one true server, of this clock, and a spoofer sends answers that are 1 s off, see SPOOFERS.

    -> (the client, done; how many of its queries came; s that it took; spoofed a second; of those dropped
    at the client's socket a second).
    """
    with contextlib.ExitStack() as stack:
        server, *strangers = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                              for _ in range(4)]
        for sock in [server] + strangers:
            sock.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        begin = time.monotonic()
        client = stack.enter_context(subprocess.Popen(
            [path, "-p", str(port), "-r", str(exchanges), "-t", "500", "-T", "5000", "-v", "2", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=dict(UTC_ENV, **QUIET_ENV)))
        server.settimeout(0.1)
        flood, answered, drops = None, 0, 0
        while client.poll() is None:
            try:
                query, address = server.recvfrom(2048)
            except OSError:
                continue
            if address[1] == port:  # the spoofer tries this port too
                continue
            if not flood:
                ports = (1024, 65535) if spoofer == "knows no port" else (address[1], address[1])
                sockets = strangers if spoofer == "strangers" else [server]
                flood = Flood(sockets, answer(bytes(48), 10**9), ports)
                stack.callback(flood.process.kill)
                flooded = time.monotonic()
                time.sleep(0.1)  # for it to be under way
            answered += 1
            server.sendto(answer(query), address)
            with contextlib.suppress(OSError):
                drops = max(drops, dropped(address[1]) / (time.monotonic() - flooded))
        out, err = client.communicate()
        took_sec = time.monotonic() - begin
        if flood:
            flood.end()
    done = subprocess.CompletedProcess(path, client.returncode, out, err.decode())
    return done, answered, took_sec, flood.rate if flood else 0, drops


# All of them send from the address of the true server, but for the strangers, and none has seen a query.
SPOOFERS = ("knows no port", "knows the port", "strangers", "no kernel filter")


@pytest.mark.skipif(sys.platform != "linux", reason="sendmmsg, and the filter, are Linux's")
@pytest.mark.parametrize("spoofer", SPOOFERS)
@both
def test_spoofed_answers_100000_a_second_beside_one_true_server(name, answer, spoofer, tmp_path):
    """The true server is measured all the same: the kernel drops the forgeries before they take room in
    the socket's queue.  Without its filter many true answers get lost, and the measurement may fail."""
    path = path_of(name)
    if spoofer == "no kernel filter":
        path = patched(name, NO_FILTER, tmp_path)
    exchanges = 20 if spoofer == "no kernel filter" else 200
    done, answered, took_sec, rate, drops = ask_in_a_flood(path, answer, spoofer, exchanges)
    print("%s, %s: %d/s spoofed, %d/s of them dropped at the socket" % (name, spoofer, rate, drops))
    assert rate >= FLOOD_LEAST, "the spoofer is too slow to tell"
    if rate < FLOOD_WANTED:
        warnings.warn("this machine sends only %d datagrams a second" % rate)
    if spoofer == "knows the port" and os.path.exists("/proc/net/udp"):
        assert drops > rate / 4, "they did not get there"  # drops while the client was there, rate in the mean
    assert "Traceback" not in done.stderr and took_sec < 5 + 5  # -T, and time to start and end on a busy host
    if spoofer == "no kernel filter" and done.returncode:
        assert (done.returncode, done.stdout) == (111, b"") and "time uncertainty too large" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    result_ns, bound_ns = result_of(done)
    assert abs(SNTP.unpack(done.stdout) / 10**9) <= bound_ns + 1 and bound_ns < 400e6 and abs(result_ns) < 400e6
    if spoofer != "no kernel filter":
        assert answered == exchanges
        assert done.stderr.count("warning") <= exchanges // 20  # of a host too busy to answer in time


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@both
def test_the_kernel_drops_what_does_not_repeat_the_cookie(name, answer, address):
    module = load(name)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as server, socket.socket(family, socket.SOCK_DGRAM) as client:
        server.bind((address, 0))
        client.connect(server.getsockname())
        client.settimeout(0.2)
        at, _, size = module.ECHO
        for _ in range(3):
            query = module.make_query()
            module.admit_only_answers(client, query)
            client.send(query)
            right, (_, asker) = answer(query), server.recvfrom(2048)
            for place in range(at, at + size):
                forged = bytearray(right)
                forged[place] ^= 1 << place % 8
                server.sendto(bytes(forged), asker)
            for forged in b"", right[:at + size - 1], answer(module.make_query()), bytes(400):
                server.sendto(forged, asker)
            longer = right + bytes(100)
            server.sendto(right, asker)
            server.sendto(longer, asker)
            assert [client.recv(2048) for _ in range(2)] == [right, longer]
            with pytest.raises(OSError):
                client.recv(2048)


def ask_past_a_delayer(name, answer, to_sec, back_sec, rng, exchanges=10):
    """A client asks a server of this clock, and somebody on the path holds up each packet, for half of those
    times to the whole -> (offset, bound) in ns; 0 is the right offset."""
    def late(query, n):
        time.sleep(to_sec * rng.uniform(0.5, 1))
        packet = answer(query)
        time.sleep(back_sec * rng.uniform(0.5, 1))
        return [packet]
    with Rogue(late) as server:
        return result_of(ask(name, server.port, "-v", 2, "-r", exchanges))


@pytest.mark.parametrize("to_sec, back_sec", [(0.05, 0), (0, 0.05), (0.02, 0.08), (0, 0.3)])
@both
def test_a_delayer_moves_the_result_by_no_more_than_the_bound(name, answer, to_sec, back_sec):
    result_ns, bound_ns = ask_past_a_delayer(name, answer, to_sec, back_sec, random.Random(SEED))
    assert abs(result_ns) <= bound_ns + 1
    assert 0.2e9 * (to_sec + back_sec) < bound_ns < 0.55e9 * (to_sec + back_sec)


CERTIFICATE = """
MIIBgDCCASegAwIBAgIUa7v9ug/J3P+iDE3GtAiBXWvhZfAwCgYIKoZIzj0EAwIwDDEKMAgGA1UEAwwBYTAeFw0yNjExMjIx
OTUwMzlaFw0zNjExMTkxOTUwMzlaMAwxCjAIBgNVBAMMAWEwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASqtxoeWUaIFiwk
xr2nypHMJ5AzzXqiEg6nTF1qXK7c6Nh36vH6Uaua794RH8IN5Kngf9NeC6bnb2a3YyHVo9zeo2cwZTAdBgNVHQ4EFgQUHt+Q
3B5MbEHTGRsZs6ZS8f/hiJcwHwYDVR0jBBgwFoAUHt+Q3B5MbEHTGRsZs6ZS8f/hiJcwDwYDVR0TAQH/BAUwAwEB/zASBgNV
HREECzAJggFhhwR/AAABMAoGCCqGSM49BAMCA0cAMEQCIFzmj0vOREyrWF8T4cgDVdDT1pXxFovlTIU4WP+zpHwMAiAXdOcy
IZf5u6GWuekoDH2xSBEXY2hXC1nvsZtNm/38Tw==
"""  # of no importance

# What reads what others wrote, each with good examples to start from, and the least number of inputs.
# A function may raise ValueError, and what its callers catch too.

def fuzz_targets(directory):
    """name -> (inputs, examples, what may be raised, function)"""
    clockctl, taiclockd = load("clockctl"), load("taiclockd")
    simulation = Simulation(directory, FakeKernel(ppm=20))
    for wait_sec in (64, 541, 1623):
        simulation.mark()
        simulation.run(wait_sec)
    cs, daemon = simulation.module, simulation.daemon
    state, atto = contents(str(directory / "state")), contents(str(directory / "atto"))
    status = json.dumps(a_status()).encode()
    ntp_query, tai_query = SNTP.make_query(), TAI.make_query()
    table = b"#$ 3676924800\n#@ 3991593600\n2272060800 10\n2287785600 11 # 1 Jul 1972\n2303683200 12\n"
    config = dict(clockctl.DEFAULTS, CLOCKSPEED_HOME=str(directory))
    (directory / "etc").mkdir(exist_ok=True)
    (directory / "log").mkdir(exist_ok=True)
    (directory / "keys").touch(0o600)

    def via(path, function):
        def read(data):
            with open(str(directory / path), "wb") as file:
                file.write(data)
            return function()
        return read

    def reply(data):
        made = taiclockd.answer(data, bytes(16))
        assert made is None or len(made) <= len(data) and taiclockd.answer(made, bytes(16)) is None
        return made

    def taken(data):
        before = dict(daemon.marks)
        daemon.mark(data)
        simulation.lines.clear()
        return daemon.marks["refused"] == before["refused"]

    def estimated(data):
        estimator = cs.Estimator.from_state(json.loads(data.decode("latin-1"))["estimator"])
        tick_ns = (estimator.tick_ns or 0) + 10**12
        estimator.mark(tick_ns, tick_ns + 10**18)
        return estimator.next_mark(tick_ns, 1e6) >= 0

    def lines():
        return clockctl.read_marks(str(directory / "log"))

    def dated(data):
        date_sec = SNTP.http_date(data)
        assert time.strftime(SNTP.HTTP_DATE, time.gmtime(date_sec)).encode() in data, "a time that nobody said"
        SNTP.disagreement((-10**9, 10**9), (date_sec, 10**18, 10**18, [(0, date_sec)]), sum_of)
        return date_sec

    def certified(data):
        """As ask_https() sees it, through OpenSSL and ssl, of which only this reads a file."""
        text = ssl.DER_cert_to_PEM_cert(data)
        (directory / "certificate").write_text(text)
        return SNTP.validity(ssl._ssl._test_decode_cert(str(directory / "certificate")))

    def sum_of(clock_ns, offset_ns):
        return clock_ns + offset_ns

    def shown():
        read = clockctl.read_status(config)
        return clockctl.describe(read, 1e-3), clockctl.measures(read)

    value = (ValueError,)
    date = "Sun, 22 Nov 2026 16:20:42 GMT"
    dates = b"Nov 22 16:20:42 2026 GMT\nFeb  1 00:00:00 2027 GMT"
    return {
        "adjustment": (200000, [CODES.pack(-5 * 10**17), CODES.pack(10**18)[:12]], value, CODES.unpack),
        "leap table": (50000, [table, leapsecs_dat()[:40]], value + (IndexError,), cs.parse_leap_table),
        "NTP answer": (250000, [ntp_answer(ntp_query), ntp_answer(ntp_query, stratum=0, refid=b"RATE")],
                       value + (SNTP.Dismissed,),
                       lambda data: SNTP.decode_answer(ntp_query, data, NTP_NOW_SEC)),
        "TAICLOCK answer": (250000, [tai_answer(tai_query)], value,
                            lambda data: TAI.decode_answer(tai_query, data)),
        "TAICLOCK query": (250000, [plain_query(random.Random(SEED)), b"ctai" + bytes(16)], value, reply),
        "atto": (50000, [atto], value, cs.rate_from_atto),
        "configuration": (20000, [b'CLOCK_TYPE="ntp"\nCLOCK_IP=192.0.2.1 # x\n'], value,
                          lambda data: clockctl.parse_assignments(data.decode("latin-1"))),
        "HTTPS answer": (100000, [http_answer(date), http_answer(date, "HTTP/1.0 404 x", "Date: x\r\n")], value,
                         dated),
        "certificate": (20000, [base64.b64decode(CERTIFICATE)], value + (OSError,), certified),
        "certificate's dates": (20000, [dates], value + (KeyError,), lambda data: SNTP.validity(
            dict(zip(("notBefore", "notAfter"), data.decode("latin-1").split("\n"))))),
        "options": (20000, [b"-r\n3\n-t\n500\n--\n192.0.2.1", b"-46f\n-l0\nh"], value + (OverflowError,),
                    lambda data: SNTP.Settings(data.decode("latin-1").split("\n"), 123, "c:k:K:s:")),
        "adjust": (20000, [CODES.pack(10**12)], (), taken),
        "etc/state": (3000, [state], (), via("state", lambda: daemon.load_state(atto))),
        "estimator": (3000, [state], value + (KeyError, TypeError, RecursionError), estimated),
        "etc/leap": (5000, [b"1798761600 +1\n"], value,
                     via("leap", lambda: daemon.read_announced(daemon.rows[-1]) is None)),
        "kisses": (5000, [b"127.0.0.1 1796000000 1024 RATE\n::1 1 2 DENY\n"], (),
                   via("kisses", lambda: SNTP.Kisses(str(directory)).known)),
        "keys": (5000, [b"# keys\n1 SHA256 HEX:0123456789abcdef\n2 ASCII:secret\n"], value,
                 via("keys", lambda: SNTP.read_key(str(directory / "keys"), 1))),
        "etc/status": (3000, [status], (clockctl.Failure,), via("etc/status", shown)),
        "log": (2000, [mark_line(1796000000, 0.01).encode() * 3], (clockctl.Failure,),
                via("log/current", lines)),
    }


def mutated(rng, data):
    """One to four changes of the kinds that find something."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        kind, at = rng.randrange(6), rng.randrange(len(data) + 1)
        if kind < 3 and at < len(data):
            data[at] = (rng.randrange(256), data[at] ^ 1 << rng.randrange(8),
                        rng.choice(b'0919-+.eE"{}[],:# \n\0\xff'))[kind]
        elif kind == 3:
            del data[at:at + rng.randrange(9)]
        elif kind == 4:
            data[at:at] = rng.choice((bytes(8), b"\xff" * 8, b"9" * 30, b"-", b"1e999", b"NaN", b"[" * 99, b"\n"))
        else:
            data[at:at] = data[rng.randrange(len(data) + 1):][:rng.randrange(40)]
    return bytes(data)


def test_a_million_inputs_and_no_traceback(tmp_path, capfd):
    rng, total = random.Random(SEED), 0
    for name, (count, examples, allowed, function) in fuzz_targets(tmp_path).items():
        taken = 0
        for number in range(count):
            data = rng.choice(examples)
            if number % 8:
                data = mutated(rng, data)
            elif number % 16:
                data = rng.getrandbits(8 * 48).to_bytes(48, "big")[:rng.randrange(49)]
            try:
                taken += bool(function(data))
            except allowed:
                pass
            except Exception as err:
                raise AssertionError("%s: %r raises %r" % (name, data, err))
        assert taken or name == "etc/leap", "%s: even the good examples were refused" % name
        total += count
    assert total >= 10**6
    assert "Traceback" not in capfd.readouterr().err


FUZZER = r'''
import atheris, pathlib, sys, types
sys.path.insert(0, sys.argv.pop(1))
import test_all
def instrumented(module):
    for holder in [module] + [each for each in vars(module).values() if isinstance(each, type)]:
        for function in list(vars(holder).values()):
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                atheris.instrument_func(function)
    return module
load = test_all.load
test_all.load = lambda name: instrumented(load(name))
instrumented(test_all.SNTP), instrumented(test_all.TAI), instrumented(test_all.CODES)
targets = list(test_all.fuzz_targets(pathlib.Path(sys.argv.pop(1))).values())
def one(data):
    if data:
        _, _, allowed, function = targets[data[0] % len(targets)]
        try:
            function(data[1:])
        except allowed:
            pass
atheris.Setup(sys.argv, one)
atheris.Fuzz()
'''


def test_coverage_guided_inputs_and_no_traceback(tmp_path):
    """With atheris, where it is installed: it keeps what reaches new code, and goes on from there."""
    if subprocess.run([sys.executable, "-c", "import atheris"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("atheris is not installed (it has no wheel for every Python)")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (tmp_path / "work").mkdir()
    for number, (_, examples, _, _) in enumerate(fuzz_targets(tmp_path / "work").values()):
        for count, example in enumerate(examples):
            (corpus / ("%d-%d" % (number, count))).write_bytes(bytes([number]) + example)
    done = subprocess.run([sys.executable, "-c", FUZZER, HERE, str(tmp_path / "work"), "-max_total_time=15",
                           "-seed=%d" % SEED, "-max_len=8192", "-artifact_prefix=%s/" % tmp_path,
                           str(corpus)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=UTC_ENV,
                          timeout=300)
    out = done.stdout.decode(errors="replace")
    assert done.returncode == 0 and "Traceback" not in out, out[-3000:]
    assert re.search(r"Done \d{3,} runs", out), out[-3000:]


# ==== endurance =====================================================================================

class YearKernel(FakeKernel):
    """A FakeKernel that sleeps in one go where nothing happens, and whose quartz wanders."""

    def __init__(self, rng, wander_ppm=3e-4, daily_ppm=0.0, **options):
        super().__init__(**options)
        self.rng, self.wander_ppm, self.daily_ppm = rng, wander_ppm, daily_ppm  # per sqrt(s); amplitude
        self.mean_ppm = self.ppm

    def sleep(self, sec):
        while sec > 1e-9:
            part = min(sec, 600)
            self.mean_ppm += self.rng.gauss(0, self.wander_ppm * part**0.5)
            self.ppm = self.mean_ppm + self.daily_ppm * math.sin(self.elapsed / 86400 * 2 * math.pi)
            to_midnight_sec = 86400 - self.clock_ns() // 10**9 % 86400
            if self.slew_us or self.slewing_ns or self.fields["status"] & 0x30 and to_midnight_sec < 1200:
                super().sleep(part)
            else:
                gain = (self.fields["freq"] / 65536 + (self.fields["tick"] - 10000) * 100 + self.bias_ppm) * 1e-6
                self.clock += part * (1e9 * gain - self.ppm * 1e3)
                self.tick += round(part * 1e9)
                self.tai += round(part * 1e9 * (1 + self.ppm / 1e6))
                self.fields["maxerror"] += 500 * part
                self.elapsed += part
            sec -= part

    def reboot(self):
        self.boot, self.tick = self.boot + "'", 10**9
        self.mean_ppm += self.rng.gauss(0, 0.3)  # the counter is calibrated anew
        self.fields.update(freq=0, tick=10000, status=0x40, maxerror=16 * 10**6, tai=0)
        self.slew_us = self.slewing_ns = 0
        self.clock += self.rng.gauss(0, 3e8)  # the hardware clock's


def live_through_a_year(simulation, kernel, rng, days, noise_ns=2 * 10**5, target_ns=10**7):
    """Marks when the error would reach target_ns, as the service takes them -> counts, and the samples:
    [(error of what is believed of real time, the sigma told for it, the clock's error)]."""
    counts = dict.fromkeys(("marks", "failed", "wild", "restarts", "reboots"), 0)
    samples, left_sec, last_sec, wait_sec = [], days * 86400, 541, 0
    while left_sec > 0:
        until_sec = min(wait_sec, left_sec)
        left_sec -= until_sec
        while until_sec > 0:
            simulation.run(min(until_sec, 3600))
            until_sec -= 3600
            daemon = simulation.daemon
            if daemon.estimator.has_phase():
                real_ns, sigma_ns = daemon.estimator.real(kernel.tick)
                clock_tai_ns = simulation.module.to_tai(kernel.clock_ns(), daemon.rows)
                samples.append((real_ns - kernel.tai, sigma_ns, clock_tai_ns - kernel.tai))
        what = rng.random()
        if what < 0.1:
            counts["failed"] += 1
            wait_sec = 541
            continue
        if what < 0.15:
            counts["restarts"] += 1
            simulation.start()
        elif what < 0.16:
            counts["reboots"] += 1
            kernel.reboot()
            simulation.start()
        error_ns = round(rng.gauss(0, noise_ns))
        if what > 0.98:
            counts["wild"] += 1
            error_ns = rng.choice((-1, 1)) * 10 ** rng.randrange(8, 12)
        counts["marks"] += 1
        simulation.lines.clear()
        clock_tai_ns = simulation.module.to_tai(kernel.clock_ns(), simulation.daemon.rows)
        simulation.daemon.mark(CODES.pack((kernel.tai + error_ns - clock_tai_ns) * 10**9))
        simulation.due = simulation.daemon.wake(True)
        wanted_sec = simulation.daemon.estimator.next_mark(kernel.tick, target_ns)
        wait_sec = last_sec = min(3 * last_sec, max(541, wanted_sec))
    return counts, samples


def share_within(samples, sigmas):
    return sum(abs(error_ns) <= sigmas * sigma_ns for error_ns, sigma_ns, _ in samples) / len(samples)


def test_a_year_in_a_minute(tmp_path, monkeypatch, capfd):
    """A leap second, lost and wild marks, restarts, reboots: the error is what was told, nothing grows."""
    import tracemalloc
    monkeypatch.setenv("LEAPSECS", leap_table(tmp_path, (NEW_YEAR_SEC, 38)))
    monkeypatch.setenv("CLOCK_SCALE", "utc")
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # of which the disk would take an hour
    rng = random.Random(SEED)
    kernel = YearKernel(rng, ppm=20, behind_ns=10**9, start_ns=(NEW_YEAR_SEC - 20 * 86400) * 10**9)
    (tmp_path / "etc").mkdir()
    simulation = Simulation(tmp_path / "etc", kernel)
    simulation.module.SETTLED_SEC = 600  # else it wakes half a million times
    simulation.module.STATUS_SEC = 3600
    counts, samples = live_through_a_year(simulation, kernel, rng, 335)
    tracemalloc.start()
    live_through_a_year(simulation, kernel, rng, 5)
    before, _ = tracemalloc.get_traced_memory()
    del kernel.calls[:]
    _, more = live_through_a_year(simulation, kernel, rng, 25)
    del kernel.calls[:]
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    samples += more
    assert counts["reboots"] and counts["restarts"] > 5 and counts["wild"] and counts["failed"] > 10
    tai_ns = simulation.module.to_tai(kernel.clock_ns(), simulation.daemon.rows)
    assert kernel.leapt and tai_ns - kernel.clock_ns() == 38e9
    # One mark spoils or saves days of samples: over 12 such years 99.89% are within 3 sigmas.
    assert share_within(samples, 3) > 0.985 and 0.6 < share_within(samples, 1) < 0.85
    assert after - before < 10**5 + 300 * len(more), "it grows"
    assert max(os.stat(str(path)).st_size for path in (tmp_path / "etc").iterdir()) < 65536
    assert "Traceback" not in capfd.readouterr().err


def test_kill_9_at_a_thousand_moments_of_a_write_never_damages_the_file(tmp_path):
    """The process writes one content after the other until it is killed; the file is always one of them."""
    module, rng = load("clockspeed"), random.Random(SEED)
    etc_fd = os.open(str(tmp_path), os.O_RDONLY)
    contents_of = [bytes([65 + number]) * (5000 + 977 * number) for number in range(8)]
    module.replace_file(etc_fd, "state", contents_of[0])
    seen, left = set(), 0
    for _ in range(1000):
        writer = os.fork()
        if not writer:
            with contextlib.suppress(BaseException):
                while True:
                    for data in contents_of:
                        module.replace_file(etc_fd, "state", data)
            os._exit(1)
        time.sleep(rng.uniform(0.0005, 0.006))
        os.kill(writer, signal.SIGKILL)
        assert os.waitpid(writer, 0)[1] == signal.SIGKILL
        data = module.read_file(etc_fd, "state")
        assert data in contents_of, "%d bytes of it" % len(data)
        seen.add(data)
        left += os.path.exists(str(tmp_path / "state.tmp"))
    assert len(seen) > 4 and left > 20, "killed at other moments"
    os.close(etc_fd)
