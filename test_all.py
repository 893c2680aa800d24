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
    sys.exit("test_all.py: fatal: unable to install pytest: no venv with pip, no apt-get, no apk (or not root)")


if __name__ == "__main__":
    try:
        import pytest
    except ImportError:
        if os.environ.get("TEST_ALL_PYTHON"):
            raise
        os.environ["TEST_ALL_PYTHON"] = python = install_pytest()
        os.execv(python, [python] + sys.argv)
    sys.exit(pytest.main(["-p", "no:cacheprovider", "-rs"] + (sys.argv[1:] or ["-q"]) + [os.path.abspath(__file__)]))

# ==== what the tests share =========================================================================
import errno
import importlib.machinery
import importlib.util
import random
import shutil
import struct
import time

import pytest

SCRIPTS = ("clockadd", "clockspeed", "clockview", "sntpclock", "taiclock", "taiclockd")
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
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("not installed: " + ", ".join(missing))


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
    for name in SCRIPTS + ("clockctl",):
        for title, text in marked_blocks(name).items():
            copies.setdefault(title, {}).setdefault(text, []).append(name)
    for title, texts in copies.items():
        assert len(texts) == 1, "%s differs between %s" % (title, list(texts.values()))
        assert len(sum(texts.values(), [])) > 1, "%s is in one script only" % title
    everywhere = [title for title in copies if title.startswith("# ==== shared:")]
    assert len(everywhere) == 1
    assert set(SCRIPTS) <= set(next(iter(copies[everywhere[0]].values())))


@pytest.mark.parametrize("name", SCRIPTS + ("clockctl",))
def test_help_is_the_manual_page(name):
    done = run(name, "--help")
    assert done.returncode == 0 and done.stderr == ""
    text = done.stdout.decode()
    assert text.startswith("%s - " % name)
    for heading in ("SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "SEE ALSO"):
        assert "\n%s\n" % heading in text


@pytest.mark.parametrize("name", SCRIPTS + ("clockctl",))
def test_usage_errors_exit_100_with_one_line(name):
    done = run(name, "--no-such-option")
    assert done.returncode == 100 and done.stdout == b""
    assert done.stderr.startswith("%s: usage: %s" % (name, name)) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", SCRIPTS + ("clockctl",))
def test_a_full_stdout_is_a_clear_line(name):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([path_of(name), "--help"], stdout=full, stderr=subprocess.PIPE, env=UTC_ENV)
    assert done.returncode == 111
    assert done.stderr.decode() == "%s: fatal: unable to write output: No space left on device\n" % name


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
        packet = rng.randbytes(rng.randrange(20)) if hasattr(rng, "randbytes") else os.urandom(rng.randrange(20))
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


@pytest.mark.skipif(not os.path.exists("/usr/share/zoneinfo/leap-seconds.list"), reason="no leap-seconds.list here")
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
                 text.replace(b"2287785600", b"2287785601"), text.replace(b"10", b"9"), b"\xff" + text, b"1\n"):
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

    def __init__(self, ppm=0.0, behind_ns=0, bias_ppm=0.0):
        self.ppm, self.bias_ppm = ppm, bias_ppm
        self.tick, self.tai = 10**9, self.START_NS + 37 * 10**9
        self.clock = float(-behind_ns)  # system clock minus real time at the start
        self.clock_base = self.START_NS
        self.fields = dict.fromkeys("offset freq esterror constant tai".split(), 0)
        self.fields.update(maxerror=16 * 10**6, status=0x40, tick=10000)
        self.slew_us = self.slewing_ns = 0
        self.calls, self.boot, self.slept_ns, self.denied = [], "boot-1", 0, False
        self.elapsed = 0.0

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
            if self.elapsed % 1 < 1e-9 or self.elapsed % 1 > 1 - 1e-9:
                self.elapsed = float(round(self.elapsed))
                step_us = max(-500, min(500, self.slew_us))
                self.slew_us -= step_us
                self.slewing_ns = step_us * 1000

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
        elif modes & 0x8000:
            raise AssertionError("a single shot can't be combined")
        elif modes & 0x100:
            self.clock += fields["sec"] * 10**9 + fields["frac"]
            self.slew_us = self.slewing_ns = 0
            self.fields.update(status=self.fields["status"] | 0x40, maxerror=16 * 10**6)
        for bit, name in ((1, "offset"), (2, "freq"), (4, "maxerror"), (8, "esterror"), (0x10, "status"),
                          (0x4000, "tick")):
            if modes & bit and modes != 0x8001:
                self.fields[name] = fields[name]
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
        self.clock.suspended_ns = lambda: self.kernel.slept_ns
        self.clock.__init__(self.kernel.adjtimex, 10000)
        self.daemon = cs.Clockspeed(self.clock, self.etc_fd, cs.read_leap_table()[0], may_step, self.lines.append)
        self.source = self.daemon.load()
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


