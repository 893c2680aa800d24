#!/usr/bin/env python3
"""test_all.py - every test of clockspeed in Python

SYNOPSIS
    ./test_all.py [--long] [pytest options and names]
    ./test_all.py -k taiclockd
    ./test_all.py --sync

DESCRIPTION
    Runs on its own on a fresh machine, in 4 minutes on two cores.  Where pytest can't be
    imported, it is installed into a private virtual environment, .test-venv, beside this
    file; where that can't be made, root gets the system's package.

    The tests use real parts: chronyd on loopback ports, daemontools, the shells.  A test
    whose part is not installed is skipped with the reason; with CI=true in the environment
    that is a failure, so that CI can't go green on what it did not run.

    No test touches the clock of this machine: what would set it runs against a fake clock
    here, and for real in a virtual machine (.ci/run).

OPTIONS
    --long   run the tests that take long too: millions of inputs, a flood, twelve years
    --sync   copy each shared block of the first script that has it over its other copies

EXIT STATUS
    pytest's: 0 all passed, 1 some failed; 111 pytest can't be installed
"""
import os
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".test-venv")
# In the order in which a block that several share is copied by --sync.
SCRIPTS = ("clockview.py", "clockadd.py", "sntpclock.py", "taiclock.py", "ntsclock.py", "taiclockd.py",
           "clockspeed.py", "clockctl", "clockctl-check", "clockctl-graph")


def fail(text):
    sys.stderr.write("test_all.py: fatal: %s\n" % text)
    sys.exit(111)


def install_step(command):
    """Run it -> None, or the last line that it said when it failed."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    except OSError as err:
        return err.strerror
    said = done.stdout.decode(errors="replace").split("\n")
    return None if done.returncode == 0 else ([line for line in said if line.strip()] or ["no reason given"])[-1]


def install_pytest():
    """A Python that has pytest: from a private virtual environment, or the system's package."""
    python, made = os.path.join(VENV, "bin", "python"), False
    try:
        why = install_step([sys.executable, "-m", "venv", VENV])
        why = why or install_step([python, "-m", "pip", "install", "--quiet", "pytest"])
        made = why is None
    finally:
        if not made:
            shutil.rmtree(VENV, ignore_errors=True)
    if made:
        return python
    package = {"apt-get": ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "python3-pytest"],
               "apk": ["apk", "add", "--quiet", "py3-pytest"]}
    commands = [command for name, command in package.items() if shutil.which(name)]
    mend = "as root: " + " ".join(commands[0]) if commands else "install pytest"
    if os.getuid() != 0 or not commands:
        fail("unable to make %s: %s; %s" % (VENV, why.strip(), mend))
    sys.stderr.write("test_all.py: no virtual environment (%s); installing a package: %s\n"
                     % (why.strip(), " ".join(commands[0])))
    if sys.stdin.isatty():
        input("Enter goes on, Ctrl-C stops: ")
    why = install_step(commands[0])
    if why:
        fail("unable to install pytest: %s; %s" % (why.strip(), mend))
    return "/usr/bin/python3"


def marked_blocks(text):
    """The shared blocks of a script: {first line: text from there to the end marker}."""
    blocks, title = {}, None
    for line in text.splitlines(keepends=True):
        if line.startswith("# ==== shared"):
            title = line
            blocks[title] = ""
        if title:
            blocks[title] += line
            if line.startswith("# ==== end shared"):
                title = None
    assert title is None, "%s does not end" % title.strip()
    return blocks


def sync():
    """Copy each shared block of the first script that has it over its other copies."""
    first = {}
    for name in SCRIPTS:
        path = os.path.join(HERE, name)
        with open(path) as file:
            text = before = file.read()
        for title, block in marked_blocks(text).items():
            text = text.replace(block, first.setdefault(title, block))
        if text != before:
            with open(path, "w") as file:
                file.write(text)
            print("wrote " + name)


class Chooser:
    """A pytest plugin: the tests marked `long` run with --long only."""

    def __init__(self, long):
        self.long = long

    def pytest_configure(self, config):
        config.addinivalue_line("markers", "long: takes long, runs with --long")

    def pytest_collection_modifyitems(self, config, items):
        if not self.long:
            items[:] = [item for item in items if not item.get_closest_marker("long")]


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--long"]
    if words == ["--sync"]:
        sys.exit(sync())
    if words in (["-h"], ["--help"]):
        sys.exit(print(__doc__.rstrip()))
    try:
        import pytest
    except ImportError:
        if os.environ.get("TEST_ALL_PYTHON"):
            raise
        os.environ["TEST_ALL_PYTHON"] = python = install_pytest()
        os.execv(python, [python] + sys.argv)
    sys.exit(pytest.main(["-p", "no:cacheprovider", "-rs"] + (words or ["-q"]) + [os.path.abspath(__file__)],
                         plugins=[Chooser("--long" in sys.argv)]))

# ==== what the tests share =========================================================================
import contextlib
import errno
import importlib.machinery
import importlib.util
import json
import pathlib
import pwd
import random
import re
import select
import signal
import stat
import struct
import tempfile
import time

import pytest

CI = os.environ.get("CI") == "true"
UTC_ENV = dict(os.environ, CLOCK_SCALE="utc", TZ="UTC")
SEED = 20261124
LIMIT_SEC = 120  # of each test: far over what any takes on a busy machine
PATIENCE_SEC = 30  # for what takes milliseconds on an idle machine
sys.dont_write_bytecode = True
for number in (signal.SIGHUP, signal.SIGINT):  # nohup and some shells have programs ignore them
    signal.signal(number, {signal.SIGINT: signal.default_int_handler}.get(number, signal.SIG_DFL))


@pytest.fixture(autouse=True)
def limit(request):
    """No test can wait for ever."""
    def end(*_):
        raise TimeoutError("the test took more than its limit")
    factor = 20 if request.node.get_closest_marker("long") else 1
    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(factor * LIMIT_SEC)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def path_of(name):
    """The script of that name; clockctl and its two companions have no suffix."""
    path = os.path.join(HERE, name)
    return path if os.path.exists(path) else path + ".py"


def load(name):
    """A script as a module, without running it."""
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), path_of(name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    before = signal.getsignal(signal.SIGINT)
    loader.exec_module(module)
    signal.signal(signal.SIGINT, before)  # a script takes the default at once
    return module


def need(*commands):
    """Skip where a real part is absent; on CI, where all are installed, that fails."""
    missing = [command for command in commands if not shutil.which(command)]
    if missing:
        (pytest.fail if CI else pytest.skip)("not installed: " + ", ".join(missing))


def command_of(name, *args):
    """A script as it is installed: isolated, by this Python."""
    return [sys.executable, "-IS", path_of(name)] + [str(arg) for arg in args]


def run(name, *args, stdin=b"", timeout=60, **env):
    """A script as a process of its own -> CompletedProcess with stdout in bytes and stderr as text."""
    done = subprocess.run(command_of(name, *args), input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=timeout, env=dict(UTC_ENV, **env))
    done.stderr = done.stderr.decode()
    assert "Traceback" not in done.stderr, done.stderr
    return done


def until(condition, patience_sec=PATIENCE_SEC):
    """Wait until condition() is true -> its value; fails when it never is."""
    deadline_sec = time.monotonic() + patience_sec
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline_sec, "it never came true"
        time.sleep(0.02)


@contextlib.contextmanager
def process(command, **options):
    """A process that is killed at the end, whatever happens."""
    running = subprocess.Popen(command, **options)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def random_bytes(rng, count):
    return bytes(rng.randrange(256) for _ in range(count))


# ==== the layout ====================================================================================

def read_script(name):
    with open(path_of(name)) as file:
        return file.read()


def test_shared_blocks_are_the_same_bytes_in_every_copy():
    copies = {}
    for name in SCRIPTS:
        for title, block in marked_blocks(read_script(name)).items():
            copies.setdefault(title, {}).setdefault(block, []).append(name)
    for title, blocks in copies.items():
        assert len(blocks) == 1, "%s differs between %s" % (title, list(blocks.values()))
        assert len(sum(blocks.values(), [])) > 1, "%s is in one script only" % title
    everywhere, = [blocks for title, blocks in copies.items() if title.startswith("# ==== shared by all")]
    assert list(everywhere.values()) == [list(SCRIPTS)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_begins_in_the_same_way_and_fits_the_screen(name):
    text = read_script(name)
    assert text.startswith('#!/usr/bin/env python3\n"""%s - ' % os.path.basename(name).replace(".py", ""))
    assert "\ntry:  # Ctrl-C ends this program" in text and os.access(path_of(name), os.X_OK)
    assert max(map(len, text.splitlines())) <= 110 and "\t" not in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_the_manual_and_version_the_release(name):
    program = name.replace(".py", "")
    manual = run(name, "--help").stdout.decode()
    for heading in ("SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "SEE ALSO"):
        assert "\n%s\n" % heading in manual
    assert manual == run(name, "-h").stdout.decode() and manual.startswith(program + " - ")
    assert run(name, "--version").stdout.decode() == "%s %s\n" % (program, load("clockview").RELEASE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_whatever_is_wrong_with_the_first_steps_is_one_line(name):
    program = name.replace(".py", "")
    done = run(name, "--no-such-option")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (100, b"", 1)
    assert done.stderr.startswith("%s: usage: %s" % (program, program))
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command_of(name, "--help"), stdout=full, stderr=subprocess.PIPE, env=UTC_ENV)
    assert (done.returncode, done.stderr.decode()) == (
        111, "%s: fatal: unable to write output: No space left on device\n" % program)
    done = subprocess.run([sys.executable, "-OO"] + command_of(name, "--help")[1:], stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout.decode().startswith(program)


# ==== clockview, clockadd =========================================================================

VIEW, ADD = load("clockview"), load("clockadd")
# bytes, nanoseconds, last number: the packets of the specification, and marks that tell of themselves
PACKETS = (("ffffffffffffffff3b9ac80c00000000", -500, 0), ("00000000000000010000000000000000", 10**9, 0),
           ("00000000000000000000000017d78400", 0, 400000000), ("00000000000000000000000100000000", 1, 0),
           ("0000000000000000000000003b9a06b2", 0, 999950002), ("0000000000000000000000010000c350", 1, 50000))


@pytest.mark.parametrize("text, ns, last", PACKETS)
def test_packets_of_the_specification(text, ns, last):
    assert VIEW.pack(ns, last).hex() == text and VIEW.unpack(bytes.fromhex(text)) == (ns, last)
    assert VIEW.unpack(bytes.fromhex(text)[:12]) == (ns, 0)


def shown(packet, **env):
    """clockview's lines -> (seconds that the clock moves, third line or None)."""
    done = run("clockview", stdin=packet, **env)
    assert done.returncode == 0 and done.stderr == ""
    lines, times = done.stdout.decode().splitlines(), []
    for line, title in zip(lines, ("before: ", "after:  ")):
        assert re.fullmatch(title + r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{9}", line)
        times.append(int(time.mktime(time.strptime(line[8:27], "%Y-%m-%d %H:%M:%S"))) * 10**9 + int(line[28:]))
    return times[1] - times[0], (lines + [None])[2]


@pytest.mark.parametrize("ns, last, size, line", [
    (-250000000, 0, 16, None), (86400 * 10**9 + 1, 0, 12, None),
    (0, 999950002, 16, "atto:   0.000000000999950002 s per tick"),
    (1, 50000, 16, "atto:   0.000000001000050000 s per tick"),
    (10**6, 720133918, 16, "mark:   give or take 0.020130 s by its exchanges, 0.000611 s by its server"),
])
def test_clockview_shows_the_sum_and_what_a_mark_tells(ns, last, size, line):
    assert shown(VIEW.pack(ns, last)[:size], TZ=time.tzname[0] if time.timezone else "UTC") == (ns, line)


@pytest.mark.parametrize("name", ("clockview", "clockadd"))
@pytest.mark.parametrize("packet, said", [
    (b"x", "data split across packets"), (b"x" * 11, "data split across packets"),
    (b"x" * 13, "data split across packets"), (b"x" * 15, "data split across packets"),
    (b"", "unable to read the adjustment: nothing came on standard input"),
    (b"\xff" * 16, "unable to read the adjustment: not a TAI64NA packet"),
    (b"\x7f" + b"\0" * 15, "unable to (show that time|set the clock): "),
])
def test_what_is_no_adjustment_is_a_line(name, packet, said):
    done = subprocess.run(without_the_right(command_of(name)), input=packet, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (111, b"")
    assert re.fullmatch("%s: fatal: %s.*\n" % (name, said), done.stderr.decode())


def without_the_right(command):
    """The command without the right to set the clock, for root too."""
    if not shutil.which("setpriv"):
        return command
    return ["setpriv", "--bounding-set=-sys_time", "--inh-caps=-sys_time"] * (os.getuid() == 0) + command


@pytest.mark.parametrize("name", ("clockview", "clockadd"))
def test_a_closed_stdin_is_an_empty_one(name):
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh"] + command_of(name), stderr=subprocess.PIPE)
    assert done.returncode == 111 and b"nothing came on standard input" in done.stderr


def feed(monkeypatch, packet):
    reader, writer = os.pipe()
    os.write(writer, packet)
    os.close(writer)
    monkeypatch.setattr(ADD.os, "read", lambda fd, size, read=os.read: read(reader, size))


@pytest.mark.parametrize("options, ns, stepped", [
    ([], 1234567891, [1234567891]), ([], -5 * 10**17, [-5 * 10**17]), (["-e", "500"], 5 * 10**8, [5 * 10**8]),
    (["-e", "500"], -5 * 10**8 - 1, []), (["-e", "500", "-f"], 10**12, [10**12])])
def test_clockadd_steps_by_the_adjustment_unless_that_is_over_its_limit(options, ns, stepped, monkeypatch, capfd):
    feed(monkeypatch, ADD.pack(ns, 720133918))
    steps = []
    assert ADD.main(["clockadd"] + options, steps.append) == (0 if stepped else 111)
    assert steps == stepped and ("over the limit" in capfd.readouterr().err) is not bool(stepped)


def test_one_adjtimex_call_steps_and_leaves_the_unit_alone():
    for status, calls in ((0, [{}, dict(modes=0x2100, sec=-1, frac=7 * 10**8), dict(modes=0x1000)]),
                          (0x2000, [{}, dict(modes=0x2100, sec=-1, frac=7 * 10**8)])):
        seen = []
        ADD.step_kernel(lambda **fields: seen.append(fields) or {"status": status}, -3 * 10**8)
        assert seen == calls


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="adjtimex is Linux's")
def test_adjtimex_reads_this_kernel():
    pytest.importorskip("ctypes")
    now = ADD.adjtimex()
    assert abs(now["sec"] - time.time()) < 10 and 9000 <= now["tick"] <= 11000 and 0 <= now["state"] <= 5


# ==== the exchange: sntpclock, taiclock =============================================================

# ==== sntpclock =====================================================================================

# ==== taiclock ======================================================================================

# ==== ntsclock ======================================================================================

# ==== taiclockd =====================================================================================

# ==== the estimator =================================================================================

# ==== clockspeed: a simulated kernel ================================================================
CS = load("clockspeed")
HOUR_NS = 3600 * 10**9


class FakeKernel:
    """A counter, a system clock and adjtimex() that behave as Linux's do; real time passes by sleep().

    ppm: real seconds per counter second - 1; bias_ppm: what the kernel's clock gains unasked.
    """
    START_NS = 1796000000 * 10**9

    def __init__(self, ppm=0.0, behind_ns=0, bias_ppm=0.0, start_ns=START_NS, boot="boot-1"):
        self.ppm, self.bias_ppm, self.boot = ppm, bias_ppm, boot
        self.tick, self.real = 10**9, start_ns
        self.clock = float(-behind_ns)  # system clock minus real time
        self.fields = dict.fromkeys("offset freq esterror constant tai".split(), 0)
        self.fields.update(maxerror=16 * 10**6, status=0x40, tick=10000)
        self.slew_us = self.slewing_ns = 0
        self.calls, self.slept_ns, self.denied, self.elapsed = [], 0, False, 0.0

    def sleep(self, sec):
        """Let so many counter seconds pass; the kernel slews second by second."""
        while sec > 1e-9:
            slewing = self.slew_us or self.slewing_ns
            part = min(sec, 1 - self.elapsed % 1 or 1) if slewing else sec
            gain = (self.fields["freq"] / 65536 + (self.fields["tick"] - 10000) * 100 + self.bias_ppm) * 1e-6
            self.clock += part * (1e9 * gain + self.slewing_ns - self.ppm * 1e3)
            self.tick += round(part * 1e9)
            self.real += round(part * 1e9 * (1 + self.ppm / 1e6))
            self.fields["maxerror"] = min(16 * 10**6, self.fields["maxerror"] + 500 * part)
            if self.fields["maxerror"] >= 16 * 10**6:
                self.fields["status"] |= 0x40
            self.elapsed, sec = self.elapsed + part, sec - part
            if abs(self.elapsed - round(self.elapsed)) < 1e-9:
                self.elapsed = float(round(self.elapsed))
                step_us = max(-500, min(500, self.slew_us))
                self.slew_us, self.slewing_ns = self.slew_us - step_us, step_us * 1000

    def set_clock(self, delta_ns):
        """settimeofday(), by anybody."""
        self.clock += delta_ns
        self.slew_us = self.slewing_ns = 0
        self.fields.update(status=self.fields["status"] | 0x40, maxerror=16 * 10**6)

    def pass_by(self, sec, suspended=True):
        """Real time goes on without the counter and the clock; a suspend is what the kernel knows of."""
        self.real, self.clock = self.real + round(sec * 1e9), self.clock - sec * 1e9 * (not suspended)
        self.slept_ns += round(sec * 1e9) * suspended

    def clock_ns(self):
        return self.real + round(self.clock)

    def adjtimex(self, modes=0, **fields):
        if modes and self.denied:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        self.calls.append((modes, fields))
        assert not modes & 0x8000 or modes in (0x8001, 0xA001), "a single shot can't be combined"
        if modes == 0x8001:
            self.slew_us = fields["offset"]
        elif modes & 0x100:
            self.set_clock(fields["sec"] * 10**9 + fields["frac"])
        for bit, name in ((2, "freq"), (4, "maxerror"), (8, "esterror"), (0x10, "status"), (0x80, "tai"),
                          (0x4000, "tick")):
            if modes & bit and not modes & 0x8000:
                self.fields[name] = fields["constant" if name == "tai" else name]
        assert abs(self.fields["freq"]) <= 32768000 and 9000 <= self.fields["tick"] <= 11000
        return dict(self.fields, maxerror=int(self.fields["maxerror"]), offset=self.slew_us)

    def steps(self):
        return [fields["sec"] + fields["frac"] / 1e9 for modes, fields in self.calls if modes == 0x2100]

    def given_ppm(self):
        return self.fields["freq"] / 65536 + (self.fields["tick"] - 10000) * 100

    def rate_error_ppm(self, seconds=600):
        """How fast the system clock moves off real time when nobody looks after it."""
        before = self.clock
        self.sleep(seconds)
        return (self.clock - before) / seconds / 1e3


def quality(spread_ns, distance_digits=0):
    """The last number of a mark."""
    exponent = len("%d" % spread_ns) - 1
    number = ((exponent * 10**4 + spread_ns * 1000 // 10**exponent) * 100 + distance_digits) * 100
    return number + (1 - number) % 97


class Simulation:
    """clockspeed on a FakeKernel, with its files in home/etc; `lines` is what it said."""

    def __init__(self, home, kernel, **options):
        self.kernel, self.lines, self.home = kernel, [], home
        self.clock = CS.KernelClock.__new__(CS.KernelClock)
        self.clock.read, self.clock.boot_id = lambda: (kernel.tick, kernel.clock_ns()), lambda: kernel.boot
        self.clock.suspended_ns = lambda: kernel.slept_ns + kernel.tick % 300  # two clocks are read
        self.clock.__init__(kernel.adjtimex, 10000)
        home.mkdir(exist_ok=True)
        home_fd = os.open(str(home), os.O_RDONLY)
        self.etc, say = CS.Etc(home_fd), self.lines.append
        os.close(home_fd)
        self.daemon = CS.Clockspeed(self.clock, self.etc, say=say, warn=say, **options)
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

    def mark(self, error_sec=0, last=0):
        """A mark as an exact client makes it, but for error_sec -> its outcome."""
        self.take(CS.pack(round(error_sec * 1e9 - self.kernel.clock), last))
        return self.said("mark: ")[-1].rpartition(" ")[2]

    def take(self, *packets):
        self.daemon.take(list(packets))
        self.due = self.daemon.wake()

    def settle(self, *waits, last=0, error_sec=0):
        for wait_sec in waits or (64, 541, 1623, 3600, 3600):
            self.mark(error_sec, last)
            self.run(wait_sec)
        return self

    def rate_ppm(self):
        return self.daemon.estimator.rate()[0]

    def said(self, start):
        return [line for line in self.lines if line.startswith(start)]

    def file(self, name):
        return self.home / "etc" / name

    def status(self):
        return json.loads(self.file("status").read_text())


@pytest.fixture
def simulate(tmp_path, monkeypatch):
    """Makes Simulations on directories below the test's own."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a month has some thousand
    made = []

    def make(kernel, name="home", **options):
        made.append(Simulation(tmp_path / name, kernel, **options))
        return made[-1]
    yield make
    for simulation in made:
        os.close(simulation.etc.fd)


def test_a_clock_5_s_and_80_ppm_off_comes_right_and_stays_right_alone(simulate):
    kernel = FakeKernel(ppm=80, behind_ns=5 * 10**9, bias_ppm=2)
    simulation = simulate(kernel)
    simulation.mark()
    assert abs(kernel.clock) < 1000 and simulation.said("step: ") == [
        "step: the system clock by +5.000000000 s, by one of the first 3 marks of this boot"]
    simulation.settle(60, 300, 541, 1623)
    assert abs(kernel.clock) < 20000
    assert abs(kernel.rate_error_ppm()) < 0.1, "killed now, the clock runs on at the right rate"


@pytest.mark.parametrize("off_sec, options, stepped", [
    (2, {}, [2]), (-86400, {}, [-86400]), (0.500001, {}, [0.500001]), (0.499999, {}, []),
    (2, {"may_step": False}, [])])
def test_the_first_mark_steps_what_is_over_half_a_second(simulate, off_sec, options, stepped):
    kernel = FakeKernel(behind_ns=round(off_sec * 1e9))
    simulation = simulate(kernel, **options)
    simulation.mark()
    assert kernel.steps() == pytest.approx(stepped) and len(simulation.said("slew: ")) == (not stepped)
    simulation.run(2000)
    assert abs(kernel.clock) < (1e5 if stepped or off_sec < 1 else 1.1e9)


@pytest.mark.parametrize("good, wrong, wrong_sec, steps", [
    (0, 1, 10, 2), (0, 1, -3600, 2), (0, 1, 74 * 365 * 86400, 2), (1, 3, 10, 1), (3, 3, 10, 0)])
def test_a_wrong_mark_leaves_nothing_behind_after_five_right_ones(simulate, good, wrong, wrong_sec, steps):
    """Until three are used a step can be undone; after that nothing steps, so that a lie costs little."""
    kernel = FakeKernel(ppm=20, behind_ns=10**8)
    simulation = simulate(kernel).settle(*[1623] * good) if good else simulate(kernel)
    simulation.settle(*[300] * wrong, error_sec=wrong_sec).settle(*[1623] * 5)
    assert len(kernel.steps()) == steps and abs(kernel.clock) < (10e9 if good else 1e6)
    for kernel.boot in ("boot-1", "boot-2"):  # a restart, a reboot
        simulation = simulate(kernel)
        assert abs(simulation.daemon.known_ns - kernel.real) < 2000e9 and abs(simulation.rate_ppm() - 20) < 1
    assert len(kernel.steps()) == steps


def test_a_lost_state_does_not_make_a_later_mark_the_first_of_the_boot(simulate):
    kernel = FakeKernel(ppm=20)
    simulate(kernel).settle(64, 541).file("state").unlink()
    simulation = simulate(kernel)
    simulation.mark(1)
    assert simulation.source == "rate of etc/atto" and not kernel.steps()


@pytest.mark.parametrize("ppm", (-980, 700, 499, 3000))
def test_rates_beyond_500_ppm_use_the_kernels_tick_and_none_is_over_1000(simulate, ppm):
    kernel = FakeKernel(ppm=ppm)
    simulation = simulate(kernel).settle(64, 128, 541, 541, 1623, 1623)
    assert not simulation.file("atto").exists() or CS.parse_atto(simulation.file("atto").read_bytes()) < 500
    if ppm > 1000:
        assert kernel.given_ppm() <= 1000 and abs(simulate(kernel).rate_ppm()) <= 1000
    else:
        simulation.run(9 * 3600)
        assert kernel.given_ppm() == pytest.approx(ppm, abs=1) and abs(kernel.rate_error_ppm()) < 1
        assert (kernel.fields["tick"] == 10000) == (abs(ppm) < 500)


def test_the_kernel_is_told_how_wrong_the_clock_can_be(simulate):
    kernel = FakeKernel(ppm=30)
    told = kernel.fields
    told["status"] |= 0x2001  # STA_PLL and STA_NANO of somebody else
    simulation = simulate(kernel)
    simulation.run(300)
    assert told["status"] == 0x2041 and told["tai"] == 0, "nothing before the first mark"
    for _ in range(4):
        simulation.settle(300)
        assert told["status"] == 0x2001 and told["tai"] == 37, "synchronised, and the others' bits survive"
        assert abs(kernel.clock) / 1000 <= told["maxerror"] < 16 * 10**6
    simulation.run(6 * 3600)
    sigma_us = simulation.daemon.estimator.real(kernel.tick)[1] / 1000
    assert told["esterror"] == pytest.approx(sigma_us, rel=0.02)
    assert told["maxerror"] == pytest.approx(4 * sigma_us, rel=0.3), "no bound, as no mark told"
    simulation.mark(last=quality(3 * 10**7, 42))  # 30 ms, and 1 ms of the server's
    bounds = simulation.daemon.bounds()
    assert bounds[0] < 0 < bounds[1] and 31000 < told["maxerror"] < 33000 and told["esterror"] < 5000
    assert told["maxerror"] == pytest.approx(max(map(abs, bounds)) / 1000, rel=0.01)
    kernel.clock += 9e6
    simulation.run(60)
    assert told["maxerror"] > 38000, "what is still to be slewed is part of it"
    assert simulate(FakeKernel(), "tai", scale="tai").settle(64).kernel.fields["tai"] == 10


def test_the_hardware_clock_is_never_written_from_a_clock_known_to_be_wrong(simulate):
    """The kernel writes it while STA_UNSYNC is clear.  Under -S a clock stays wrong for long."""
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel, may_step=False).settle()
    for moved_ns, unsynchronised in ((0, False), (48 * 10**7, False), (4 * 10**7, True), (HOUR_NS, True)):
        kernel.set_clock(moved_ns)
        calls = len(kernel.calls)
        simulation.run(20)
        simulation.mark()
        told = [bool(fields["status"] & 0x40) for modes, fields in kernel.calls[calls:] if modes & 0x10]
        assert set(told) == {unsynchronised}, "not even for a moment"
        assert kernel.fields["maxerror"] >= min(16 * 10**6 - 1, abs(kernel.clock) / 1000)
    kernel.set_clock(-kernel.clock)
    simulation.run(60)
    assert not kernel.fields["status"] & 0x40 and kernel.fields["maxerror"] < 10**6
    kernel.pass_by(3600)
    simulation.run(60)
    assert kernel.fields["status"] & 0x40 and kernel.fields["maxerror"] == 16 * 10**6, "nobody knows any more"


def test_a_slew_that_is_replaced_does_not_overshoot(simulate):
    kernel, worst = FakeKernel(), 0
    simulation = simulate(kernel).settle(64)
    kernel.clock += 8e6  # under what counts as somebody else's step
    for _ in range(40):
        simulation.run(1.7)
        simulation.mark()
        worst = min(worst, kernel.clock)
    simulation.run(60)
    assert worst > -100000 and abs(kernel.clock) < 5000


def test_marks_every_second_let_a_slew_pass(simulate):
    kernel = FakeKernel(ppm=20, bias_ppm=3, behind_ns=-80 * 10**6)
    simulation, rng = simulate(kernel), random.Random(SEED)
    for _ in range(180):
        simulation.run(1)
        simulation.mark(rng.gauss(0, 2e-5))
    assert abs(kernel.clock) < 200000, "80 ms at 500 ppm take 160 s"
    assert len(simulation.said("slew: ")) <= 2
    simulation.settle(*[1] * 80)
    assert abs(simulation.clock.bias_ppm - 3) < 0.2 and abs(kernel.rate_error_ppm()) < 0.2


def test_an_uneven_slew_tells_no_bias(simulate):
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel).settle(64, 64, 541, 571)
    kernel.clock += 8e6
    simulation.settle(5)
    kernel.clock += 4e5  # 5% of the slew more than it was told to
    simulation.run(305)
    assert abs(simulation.clock.bias_ppm) < 0.01 and abs(kernel.clock) < 5000


def test_a_mark_is_a_line_with_all_that_went_in_and_came_out(simulate):
    kernel = FakeKernel(behind_ns=-123456)
    simulation = simulate(kernel)
    simulation.mark(last=quality(20130000, 39))
    assert re.fullmatch(
        r"mark: tick 1000000000 ns, real %d ns, spread 20130000 ns, distance 610540 ns, "
        r"offset -0\.000123456 s, error 0\.0\d{8} s, bound 0\.020740540 s, rate [+-]0\.0000 ppm, "
        r"rate error 500\.0000 ppm, used" % kernel.real, simulation.lines[0])
    assert simulation.daemon.last_mark == dict(tick_ns=10**9, offset_ns=-123456, spread_ns=20130000,
                                               distance_ns=610540, outcome="used")
    line = simulate(FakeKernel(), "other").settle(64).lines[0]
    assert "spread - ns, distance - ns, offset +0.000000000 s, error 0.0" in line and ", bound - s, " in line


def test_status_tells_what_others_need(simulate):
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel)
    status = simulation.status()
    assert status["offset_ns"] is status["variance"] is status["bound"] is status["last_mark"] is None
    assert status["next"] == {"wait_sec": None, "exchanges": None, "settling": True}
    assert simulation.settle(64, 64).status()["next"]["settling"]
    status = simulation.settle(64, 1141, last=quality(10**6, 30)).status()
    assert [status[name] for name in "version boot_id counter scale observe_only pid".split()] == [
        2, "boot-1", "CLOCK_MONOTONIC_RAW", "utc", False, os.getpid()]
    assert status["marks"] == {"used": 4, "doubted": 0, "refused": 0}
    assert kernel.tick - status["tick_ns"] <= 600 * 10**9, "it is never older"
    real_ns = simulation.daemon.estimator.real(status["tick_ns"])[0]
    assert status["written_ns"] + status["offset_ns"] == real_ns and len(status["variance"]) == 4
    assert sorted(status["bound"]) == "change_ppm earliest_ns fast_ppm latest_ns slow_ppm tick_ns".split()
    assert not status["next"]["settling"] and status["kernel"]["synchronised"]
    assert status["kernel"]["freq_ppm"] == pytest.approx(20, abs=1)
    assert simulate(kernel, target_ns=10**7).status()["next"]["exchanges"] in range(1, 9)


def test_a_restart_in_the_same_boot_goes_on_as_if_nothing_had_happened(simulate):
    kernel = FakeKernel(ppm=-42, bias_ppm=1)
    before = simulate(kernel).settle(64, 541, 1623, last=quality(10**6)).daemon
    kernel.sleep(600)  # killed; nobody looks after the clock
    frequency = kernel.fields["freq"]
    restarted = simulate(kernel)
    after = restarted.daemon
    assert restarted.source == "phase and rate of etc/state" and restarted.lines == []
    assert abs(kernel.fields["freq"] - frequency) <= 65.536, "within 0.001 ppm"
    assert after.estimator.real(kernel.tick) == before.estimator.real(kernel.tick)
    assert after.bound.at(kernel.tick) == before.bound.at(kernel.tick)
    assert (after.marks, after.last_mark) == (before.marks, before.last_mark)


@pytest.mark.parametrize("happen, said", [
    (lambda kernel: kernel.set_clock(HOUR_NS), "moved: somebody set the system clock by +3"),
    (lambda kernel: kernel.pass_by(7200), "suspend: the counter stood still for 2 h"),
    (lambda kernel: setattr(kernel, "tick", 10**9), "counter: it went back by 10.1 min")])
def test_what_happened_while_it_did_not_run_is_found_at_the_start(simulate, happen, said):
    kernel = FakeKernel(ppm=-42)
    simulate(kernel).settle(64, 541, 541)
    happen(kernel)
    assert simulate(kernel).lines[0].startswith(said)


def test_a_reboot_keeps_the_rate_and_begins_the_phase_anew(simulate):
    simulate(FakeKernel(ppm=-42)).settle(64, 541, 1623, 4869, last=quality(10**6))
    rebooted = FakeKernel(ppm=-42.3, behind_ns=10**9, boot="boot-2")
    simulation = simulate(rebooted)
    assert simulation.source == "rate of etc/state" and simulation.daemon.marks["used"] == 0
    assert simulation.daemon.bounds() is simulation.daemon.last_mark is None
    ppm, error_ppm = simulation.daemon.estimator.rate()
    assert abs(ppm + 42) < 0.1 and 0.3 < error_ppm < 5
    assert abs(rebooted.rate_error_ppm() - 0.3) < 0.2, "the kept rate is in the kernel before any mark"
    simulation.mark()
    assert abs(rebooted.clock) < 1e6, "and the first mark of the new boot may step"
    assert simulate(rebooted, scale="tai").source == "rate of etc/state", "27 s are between the scales"


def test_an_atto_of_the_c_clockspeed_is_taken_when_it_is_newer(simulate, tmp_path):
    atto = tmp_path / "home" / "etc" / "atto"
    atto.parent.mkdir(parents=True)
    atto.write_bytes(CS.pack(1, 50000))
    simulation = simulate(FakeKernel())
    assert simulation.source == "rate of etc/atto"
    assert simulation.daemon.estimator.rate() == pytest.approx((50, 10))
    kernel, learned = simulation.settle(3600, 3600, 3600).kernel, simulation.daemon.estimator.learned()
    assert atto.read_bytes() != CS.pack(1, 50000) and simulate(kernel).source == "phase and rate of etc/state"
    atto.write_bytes(CS.pack(0, 999949000))
    daemon = simulate(kernel).daemon
    assert daemon.estimator.rate() == pytest.approx((-51, 10)) and not daemon.estimator.has_phase()
    assert daemon.known_ns > kernel.real - 5 * HOUR_NS, "what the state says besides stays"
    assert daemon.estimator.learned() == pytest.approx(learned, rel=0.2)
    atto.write_bytes(CS.pack(0, 400000000))  # of a TSC: the state is better
    assert simulate(kernel).source == "rate of etc/state"


@pytest.mark.parametrize("packet", (CS.pack(0, 4 * 10**8), CS.pack(0), CS.pack(-1), CS.pack(10**11),
                                    b"garbage", CS.pack(1, 501000), CS.pack(0, 998134000),
                                    CS.pack(0, 999499000)))
def test_an_atto_of_another_counter_is_refused_with_a_line(simulate, tmp_path, packet):
    (tmp_path / "home" / "etc").mkdir(parents=True)
    (tmp_path / "home" / "etc" / "atto").write_bytes(packet)
    simulation = simulate(FakeKernel())
    assert simulation.source == "no rate known" and len(simulation.lines) == 1
    assert simulation.lines[0].startswith("clockspeed: warning: unable to use etc/atto: ")


HOSTILE = ('[]', '0', 'null', '{"estimator":', '[' * 100000, '{"a":' * 40000, '', '\0', '{"version": 2}',
           'NaN', '{"version": ' + '9' * 200000 + '}')
HOSTILE_VALUES = (None, -1e28, 1e308, 10**30, "x" * 200000, [], {"tick_ns": "x" * 1000}, True)


def test_whatever_is_in_the_state_is_one_line_at_most(simulate):
    kernel = FakeKernel(ppm=5)
    path, rng = simulate(kernel).settle(64, 541, last=quality(10**6)).file("state"), random.Random(SEED)
    good = json.loads(path.read_text())
    cases = [dict(good, **{name: value}) for name in good if name != "estimator" for value in HOSTILE_VALUES]
    cases += [{key: good[key] for key in good if key != name} for name in good]
    cases += [dict(good, bias_ppm=50.0), dict(good, known_ns=(CS.RELEASE_SEC - 1) * 10**9)]
    cases = [text.encode() for text in HOSTILE + tuple(map(json.dumps, cases))]
    for _ in range(50):
        data = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 9)):
            data[rng.randrange(len(data))] = rng.choice(b'0123456789{}[]",:eE-nultrfas \0\xff')
        cases.append(bytes(data if rng.random() < 0.7 else data[:rng.randrange(len(data))]))
    refused = 0
    for data in cases:
        path.write_bytes(data)
        again = simulate(kernel)
        warnings = again.said("clockspeed: warning: unable to use etc/state: ")
        assert len(warnings) == (again.lines != []) and again.source[:4] in ("rate", "phas")
        assert not warnings or again.source == "rate of etc/atto" and len(warnings[0]) < 300
        assert again.status()["rate_ppm"] < 1000 and again.file("status").stat().st_size < 5000
        refused += len(warnings)
    assert refused > len(cases) * 0.6


def test_a_clock_that_others_set_is_set_back_once_and_then_seldom(simulate):
    kernel = FakeKernel(ppm=3)
    simulation = simulate(kernel).settle()
    rate = simulation.daemon.estimator.rate()
    kernel.set_clock(HOUR_NS)
    simulation.run(60)
    assert simulation.lines[-2:] == [
        "moved: somebody set the system clock by +3600.000 s",
        "step: the system clock by %+.9f s, back to the time of the marks; if it was meant, stop clockspeed "
        "(svc -d) first" % kernel.steps()[0]]
    assert abs(kernel.clock) < 1e6 and simulation.daemon.estimator.rate() == rate, "it is no drift"
    for _ in range(24 * 12):  # it insists
        simulation.run(300)
        kernel.set_clock(HOUR_NS - round(kernel.clock))
    assert len(kernel.steps()) == 1 + 4, "after 1, 2, 4 and 8 hours"
    said = simulation.said("foreign: another program sets the system clock; one of the two must go")
    assert 20 <= len(said) <= 25
    simulation.run(2 * 86400)
    assert len(kernel.steps()) == 6 and abs(kernel.clock) < 1e6, "it gave up"


@pytest.mark.parametrize("moved_ns, options, steps", [
    (HOUR_NS, {"may_step": False}, 0), (4 * 10**8, {}, 0), (6 * 10**8, {}, 1), (-HOUR_NS, {}, 1)])
def test_what_is_not_set_back_at_once_is_slewed(simulate, moved_ns, options, steps):
    simulation = simulate(FakeKernel(ppm=3), **options).settle()
    simulation.kernel.set_clock(moved_ns)
    simulation.mark()
    assert len(simulation.kernel.steps()) == steps and len(simulation.said("moved: ")) == 1
    assert len(simulation.said("slew: ")) == (not steps)
    simulation.run(900)
    assert abs(simulation.kernel.clock) < (1e5 if steps or moved_ns < 10**9 else HOUR_NS)


def test_who_sets_the_clock_and_marks_it_is_not_set_back(simulate):
    """As clockctl set does on a machine that was paused: clockspeed can't know, and the mark is in doubt."""
    simulation = simulate(FakeKernel(ppm=3)).settle()
    simulation.kernel.pass_by(60, suspended=False)
    simulation.run(600)
    simulation.mark()
    simulation.kernel.set_clock(60 * 10**9)
    simulation.settle(60, 60, 60, 60)
    assert abs(simulation.kernel.clock) < 1e6 and not simulation.kernel.steps()


def test_before_the_first_mark_the_system_clock_is_taken_as_it_is(simulate):
    simulation = simulate(FakeKernel())
    simulation.run(300)
    simulation.kernel.set_clock(-HOUR_NS)
    simulation.run(300)
    assert simulation.kernel.clock == pytest.approx(-HOUR_NS, abs=1e6)
    assert simulation.lines == ["moved: somebody set the system clock by -3600.000 s"]


def test_many_marks_at_once_are_a_few_and_one_line(simulate):
    simulation, rng = simulate(FakeKernel()), random.Random(SEED)
    simulation.take(*[CS.pack(rng.randrange(-10**15, 10**15)) for _ in range(4096)])
    assert simulation.daemon.marks["refused"] >= 4092 and len(simulation.lines) <= 6
    assert simulation.said("refused: ") == ["refused: more than 4 marks at once, and 4091 more"]
    simulation.take(b"short", bytes(8) + b"\xff" * 8, CS.pack(2**62))
    assert simulation.lines[-1] == "refused: 5 bytes at once, not 16, and 2 more"


@pytest.mark.parametrize("to_sec, taken", [
    (CS.RELEASE_SEC - 1, 0), (CS.RELEASE_SEC, 1), (CS.RELEASE_SEC + 2**32 - 1, 1),
    (CS.RELEASE_SEC + 2**32, 0), (-2**62, 0), (2**62, 0)])
def test_no_real_time_before_the_release_or_an_era_later_is_believed(simulate, to_sec, taken):
    simulation = simulate(FakeKernel())
    simulation.take(CS.pack(to_sec * 10**9 - simulation.kernel.clock_ns()))
    assert simulation.daemon.marks["used"] == taken == 1 - simulation.daemon.marks["refused"]


def test_a_denied_kernel_is_said_once_and_survived(simulate):
    simulation = simulate(FakeKernel())
    simulation.kernel.denied = True
    simulation.settle(300, 300)
    assert simulation.said("clockspeed: ") == [
        "clockspeed: warning: unable to steer the clock: Operation not permitted"]


def test_a_clock_without_hardware_clock_goes_forward_to_the_last_time_known(simulate):
    known_ns = simulate(FakeKernel()).settle(4000).daemon.known_ns
    assert abs(known_ns - FakeKernel.START_NS) < 4100 * 10**9
    for boot, options, clock_ns, off_ns in (
            ("boot-2", {"may_step": False}, 0, 0), ("boot-3", {}, known_ns, 0), ("boot-4", {}, None, 10**18)):
        kernel = FakeKernel(behind_ns=-off_ns or FakeKernel.START_NS, boot=boot)  # 1970; far ahead
        simulation = simulate(kernel, **options)
        assert clock_ns is None and kernel.clock == 1e18 or abs(kernel.clock_ns() - clock_ns) < 1e9
        assert len(simulation.said("step: ")) == (clock_ns == known_ns)
    fresh = FakeKernel(behind_ns=FakeKernel.START_NS)
    line, = simulate(fresh, "fresh").lines
    assert fresh.clock_ns() == CS.RELEASE_SEC * 10**9
    assert line.endswith(" s, which showed a time before the last one known")


class Libc32:
    """The C library of a 32-bit system before 2020, with a FakeKernel below it."""

    def __init__(self, kernel, set_errno):
        self.kernel, self.set_errno = kernel, set_errno

    def syscall(self, *_):
        self.set_errno(errno.ENOSYS)
        return -1

    def adjtimex(self, buffer):
        values = dict(zip(CS.TIMEX_FIELDS, CS.TIMEX32.unpack(buffer.raw[:128])))
        now = self.kernel.adjtimex(values["modes"], **{name: values[name] for name in CS.TIMEX_FIELDS[1:12]})
        values.update({name: value for name, value in now.items() if name in values})
        buffer[:128] = CS.TIMEX32.pack(*values.values())
        return 0


def test_32_bits_of_time_are_enough_until_2038(simulate, monkeypatch):
    ctypes = pytest.importorskip("ctypes")
    kernel = FakeKernel(ppm=20, behind_ns=3 * 10**9)
    simulation, daemon = simulate(kernel), None
    monkeypatch.setattr(ctypes, "sizeof", lambda kind: 4)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc32(kernel, ctypes.set_errno))
    simulation.clock.adjtimex = CS.adjtimex
    simulation.settle(64, 541, 1623, 3600)
    assert abs(kernel.clock) < 1e5 and kernel.steps() == [3] and kernel.fields["tai"] == 37
    kernel.clock += 20 * 31556952e9  # a slew of 20 years has more microseconds than 32 bits
    simulation.daemon.may_step = False
    simulation.run(600)
    simulation.daemon.may_step = True
    simulation.daemon.step(2**31 * 10**9, "in a test")
    warning, = simulation.said("clockspeed: ")
    assert warning.startswith("clockspeed: warning: unable to step the clock: ")


# ==== clockspeed: the process =======================================================================
ROOT = os.getuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")


def contents(path):
    """The bytes of a file, none if there is none."""
    return path.read_bytes() if path.exists() else b""


@pytest.fixture
def public_tmp():
    """A directory that every user can enter: pytest's own are for one."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield pathlib.Path(name)


class Daemon:
    """clockspeed as a process that can't set this machine's clock; its lines come out of a file."""

    def __init__(self, home, *options, before=(), script=None):
        self.home, self.log = home, home.parent / "log"
        command = script or command_of("clockspeed", *options, home)
        with open(str(self.log), "wb") as log:
            self.process = subprocess.Popen(list(before) + without_the_right(command), stdout=log, stderr=log,
                                            env=UTC_ENV)

    def text(self):
        return self.log.read_text()

    def wait_for(self, text, count=1):
        until(lambda: self.text().count(text) >= count or self.process.poll() is not None)
        assert self.text().count(text) >= count, self.text()

    def mark(self, count=1, ns=0):
        """Write a mark, which is to be the count-th."""
        self.write(CS.pack(ns))
        self.wait_for("mark: ", count)

    def write(self, data):
        with open(str(self.home / "adjust"), "wb", buffering=0) as fifo:
            fifo.write(data)

    def proc(self, name):
        with open("/proc/%d/%s" % (self.process.pid, name)) as file:
            return file.read()

    def end(self, number=signal.SIGTERM):
        """The exit status; it takes a second at most, on a machine that is not busy."""
        self.process.send_signal(number)
        return self.process.wait(10)


@pytest.fixture
def daemon(public_tmp):
    """Starts clockspeed on public_tmp/home."""
    (public_tmp / "home").mkdir()
    made = []

    def start(*options, wait=True, **named):
        made.append(Daemon(public_tmp / "home", *options, **named))
        if wait:
            made[-1].wait_for("start: ")
        return made[-1]
    yield start
    for each in made:
        each.process.kill()
        each.process.wait()
        assert "Traceback" not in each.text()


def test_clockspeed_learns_from_its_fifo_and_term_or_int_ends_it_with_0(daemon):
    for number, source in ((signal.SIGTERM, "no rate known"), (signal.SIGINT, "phase and rate of etc/state")):
        process = daemon("-n")
        assert process.text().startswith("start: observing, CLOCK_MONOTONIC_RAW, scale utc, rate ")
        assert process.text().endswith(", %s\n" % source) and process.proc("comm") == "clockspeed\n"
        assert os.lstat(str(process.home / "adjust")).st_mode == stat.S_IFIFO | 0o600
        for count in range(1, 4):  # real time gains 50 ppm: 50 us in a second
            process.mark(count, count * 50000)
            assert "offset +0.000%d" % (count * 50) in process.text().replace("0.00005", "0.00050")
            time.sleep(0.5)
        process.write(b"short")
        process.wait_for("refused: 5 bytes at once, not 16")
        assert process.end(number) == 0 and process.text().splitlines()[-1].startswith("stop: ")
        ns, atto = CS.unpack((process.home / "etc" / "atto").read_bytes())
        assert ns == 1 and (10000 < atto < 400000 or number == signal.SIGINT), "s per tick, as the C one's"


def test_kill_9_loses_no_mark(daemon):
    process = daemon("-n")
    process.mark()
    until(lambda: b'"used": 1' in contents(process.home / "etc" / "status"))
    process.end(signal.SIGKILL)
    daemon("-n").wait_for("phase and rate of etc/state")


def open_etc(directory):
    home_fd = os.open(str(directory), os.O_RDONLY)
    etc = CS.Etc(home_fd)
    os.close(home_fd)
    return etc


def test_kill_9_at_any_moment_of_a_write_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    etc, seen = open_etc(tmp_path), set()
    for moment in range(12):
        etc.replace("state", b"old" * 1000)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            calls = []
            for name in ("unlink", "open", "fchmod", "write", "fsync", "close", "rename"):
                def die(*args, real=getattr(os, name), **options):
                    calls.append(real)
                    if len(calls) > moment:
                        raise KeyboardInterrupt
                    return real(*args, **options)
                patch.setattr(os, name, die)
            etc.replace("state", b"new" * 1001)
        seen.add(etc.read("state"))
    assert seen == {b"old" * 1000, b"new" * 1001}
    os.close(etc.fd)


def test_files_are_replaced_whole_and_follow_no_link(tmp_path):
    etc, victim = open_etc(tmp_path), tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "etc" / "status.tmp").symlink_to(victim)
    etc.replace("status", b"new")
    assert victim.read_bytes() == b"precious" and etc.read("status") == b"new"
    assert os.listdir(str(tmp_path / "etc")) == ["status"]
    (tmp_path / "etc" / "state").symlink_to(victim)
    os.mkfifo(str(tmp_path / "etc" / "atto"))
    with pytest.raises(OSError):
        etc.read("state")
    assert etc.read("atto") == b"", "and no FIFO is waited for"
    os.close(etc.fd)


def test_a_second_clockspeed_refuses_to_run_beside_the_first(daemon):
    home = daemon("-n").home
    done = run("clockspeed", "-n", home)
    assert (done.returncode, done.stderr) == (
        111, "clockspeed: fatal: unable to use %s/etc: another clockspeed is running there\n" % home)
    assert stat.S_IMODE(os.stat(str(home / "etc" / "lock")).st_mode) == 0o600, "only its user can hold it"


def test_a_program_that_reads_adjust_already_is_let_alone(tmp_path):
    os.mkfifo(str(tmp_path / "adjust"))
    reader = os.open(str(tmp_path / "adjust"), os.O_RDONLY | os.O_NONBLOCK)  # as the C clockspeed's
    done = run("clockspeed", "-n", tmp_path)
    assert (done.returncode, done.stderr) == (
        111, "clockspeed: fatal: unable to use %s: another program reads adjust; stop the other clockspeed "
        "first\n" % tmp_path)
    os.close(reader)


@pytest.mark.parametrize("home, options, env, said", [
    ("none", [], {}, "use HOME/none: No such file or directory; svc/install makes it, and so does: "
     "mkdir -p HOME/none"),
    ("file", [], {}, "use HOME/file: Not a directory"),
    ("link", [], {}, "use HOME/link/etc: Not a directory"),
    ("", ["-u", "no-such-user"], {}, "become no-such-user: there is no such user"),
    ("", ["-w", "no-such-user"], {}, "give adjust to no-such-user: there is no such user"),
    ("", [], {"CLOCK_SCALE": "gps"}, "start: CLOCK_SCALE is neither utc nor tai"),
    ("", [], {"CLOCK_ERROR": "10 apples"}, "start: CLOCK_ERROR is not a time like 0.010 or 10ms")])
def test_what_can_not_work_is_a_clear_line(tmp_path, home, options, env, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").mkdir()
    (tmp_path / "victim").mkdir()
    (tmp_path / "link" / "etc").symlink_to(tmp_path / "victim")
    done = run("clockspeed", "-n", *options, tmp_path / home, **env)
    assert (done.returncode, done.stdout) == (111, b"") and not os.listdir(str(tmp_path / "victim"))
    assert done.stderr == "clockspeed: fatal: unable to %s\n" % said.replace("HOME", str(tmp_path))


@pytest.mark.parametrize("text, error_ns", [
    ("", None), ("0.010", 10**7), ("10ms", 10**7), ("5us", 5000), ("1s", 10**9), ("2", 2 * 10**9), ("0", 0),
    ("-1", 0), ("nan", 0), ("inf", 0), ("10m", 0), ("ms", 0), ("3601", 0), ("1" * 400, 0)])
def test_the_error_to_be_kept(text, error_ns, monkeypatch):
    monkeypatch.setenv("CLOCK_ERROR", text)
    with pytest.raises(ValueError) if error_ns == 0 else contextlib.nullcontext():
        assert CS.clock_error_ns() == error_ns


@pytest.mark.parametrize("make", (lambda path: path.write_bytes(b"precious"), lambda path: path.mkdir(),
                                  lambda path: path.symlink_to("elsewhere")))
def test_what_is_no_fifo_is_named_and_let_alone(daemon, public_tmp, make):
    adjust = public_tmp / "home" / "adjust"
    make(adjust)
    before = os.lstat(str(adjust))
    process = daemon("-n")
    assert "unable to read adjust: it is not a FIFO; remove it: rm -r %s\n" % adjust in process.text()
    assert process.end() == 0 and os.lstat(str(adjust)) == before
    assert not (process.home / "elsewhere").exists()


def test_a_fifo_that_is_deleted_or_replaced_is_found_again(tmp_path):
    fifo = CS.Fifo(str(tmp_path / "adjust"))
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
        assert fifo.packets() == [b"0123456789abcdef"] * 2 and fifo.packets() == []
    fifo.close()


@needs_root
def test_clockspeed_becomes_its_user_and_keeps_no_more_than_it_needs(daemon):
    nobody, writer = pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("daemon").pw_uid
    for _ in range(2):
        process = daemon("-u", "nobody", "-w", "daemon")
        status = dict(line.split(":\t", 1) for line in process.proc("status").splitlines() if ":\t" in line)
        assert status["Uid"].split() == [str(nobody)] * 4 and status["NoNewPrivs"] == "1"
        assert not status["Groups"].strip() and int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert process.proc("comm") == "clockspeed\n"
        assert "unable to steer the clock: Operation not permitted; observing only\n" in process.text()
        process.mark()
        assert process.end() == 0
        for name, owner in ((".", 0), ("adjust", writer), ("etc", nobody), ("etc/state", nobody)):
            assert os.stat(str(process.home / name)).st_uid == owner


@needs_root
@pytest.mark.parametrize("make, said", [
    (lambda home: (home / "etc" / "passwd").write_text(""),
     "give HOME/etc to nobody: it holds 'passwd', so it is not clockspeed's own"),
    (lambda home: os.mkfifo(str(home / "adjust")) or os.chown(str(home / "adjust"), 4711, -1),
     "give adjust to nobody: it belongs to user 4711; chown it"),
    (lambda home: [(home / "etc" / name).write_text("") for name in ("atto", "state.tmp", "kisses", "leap")]
     and os.chown(str(home / "etc"), 4711, -1), None)])  # an earlier version's
def test_nothing_is_given_away_that_is_not_clockspeeds(daemon, public_tmp, make, said):
    home = public_tmp / "home"
    (home / "etc").mkdir()
    make(home)
    process = daemon("-u", "nobody", wait=not said)
    if said:
        assert process.process.wait(30) == 111 and os.stat(str(home / "etc")).st_uid == 0
        assert process.text().endswith("clockspeed: fatal: unable to %s\n" % said.replace("HOME", str(home)))


@needs_root
def test_a_deleted_fifo_that_only_root_can_make_again_ends_it(daemon, public_tmp):
    script = "import sys; sys.dont_write_bytecode = True; sys.path[:0] = [%r]; import clockspeed as p\n" \
        "p.SETTLED_SEC = 0.1; sys.exit(p.main(['', '-u', 'nobody', sys.argv[1]]))" % HERE
    process = daemon(script=[sys.executable, "-IS", "-c", script, str(public_tmp / "home")])
    (process.home / "adjust").unlink()
    assert process.process.wait(30) == 111
    assert "fatal: adjust is gone or another one, which takes root to mend\nstop: " in process.text()


@needs_root
@pytest.mark.parametrize("with_etc", (True, False))
def test_a_read_only_file_system_is_said_and_no_reason_to_stop(daemon, public_tmp, with_etc):
    if subprocess.run(["unshare", "-m", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no mount namespaces")
    home = public_tmp / "home"
    os.mkfifo(str(home / "adjust"))
    if with_etc:
        (home / "etc").mkdir()
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    process = daemon("-u", "nobody", before=["unshare", "-m", "sh", "-c", mount, str(home)])
    process.mark()
    process.wait_for("warning: unable to write etc/status: Read-only file system")
    assert "Uid:\t%d\t" % pwd.getpwnam("nobody").pw_uid in process.proc("status") and process.end() == 0
    assert process.text().count("Read-only file system") <= 6 and not (home / "etc" / "state").exists()


def test_without_the_privilege_and_with_an_etc_of_others_it_observes_and_says_both_once(daemon, public_tmp):
    home = public_tmp / "home"
    (home / "etc").mkdir(0o555)
    as_user = []
    if ROOT:
        need("setpriv")
        os.mkfifo(str(home / "adjust"))
        os.chown(str(home / "adjust"), 65534, -1)
        as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all",
                   "--inh-caps=-all"]
    process = daemon(script=as_user + command_of("clockspeed", home))
    for count in (1, 2, 3):
        process.mark(count)
    assert process.end() == 0 and os.listdir(str(home / "etc")) == []
    for said in ("steer the clock: Operation not permitted; observing only",
                 "write etc/state: Permission denied", "write etc/status: Permission denied"):
        assert process.text().count("warning: unable to %s\n" % said) == 1


def test_a_log_that_takes_no_more_blocks_nothing(tmp_path):
    """The log's reader hangs, as on a full disk, and the pipe is full."""
    reader, writer = os.pipe()
    command = command_of("clockspeed", "-n", tmp_path)
    with process(command, stdout=writer, stderr=writer, env=UTC_ENV) as running:
        until(lambda: select.select([reader], [], [], 0)[0])
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)
        for count in (1, 2):
            with open(str(tmp_path / "adjust"), "wb", buffering=0) as fifo:
                fifo.write(CS.pack(0))
            until(lambda: b'"used": %d' % count in contents(tmp_path / "etc" / "state"))
        os.read(reader, 65536)
        running.terminate()
        assert running.wait(10) == 0
    assert re.search(rb"lost: [2-9] lines\nstop: ", os.read(reader, 65536))
    os.close(reader)
    os.close(writer)


def test_what_was_lost_is_counted_in_the_next_line_that_can_be_written():
    reader, writer = os.pipe()
    log = CS.Log(writer)
    while not log.lost:
        log("x" * 1000)
    for _ in range(11):
        log("lost")
    os.read(reader, 65536)
    for line in ("at last", "and another", "y" * 10000):
        log(line)
    assert os.read(reader, 65536) == b"lost: 12 lines\nat last\nand another\n" + b"y" * 4095 + b"\n"
    os.close(reader)
    log("nobody reads")
    assert log.lost == 1
    os.close(writer)


def test_many_marks_keep_it_from_nothing(daemon):
    process, rng = daemon("-n"), random.Random(SEED)
    fd = os.open(str(process.home / "adjust"), os.O_WRONLY | os.O_NONBLOCK)
    end, written = time.monotonic() + 2.5, 0
    while time.monotonic() < end:
        size = rng.choice((1, 16, 17, 512, 4096, 65536))
        with contextlib.suppress(BlockingIOError):
            written += os.write(fd, CS.pack(rng.randrange(-10**15, 10**15)) * (size // 16) + bytes(size % 16))
        time.sleep(0.001)
    begin = time.monotonic()
    assert process.end() == 0 and time.monotonic() - begin < 5 and written > 10**5
    assert 1 <= process.text().count("mark: ") <= 30 and process.text().count("\n") < 80
    os.close(fd)


@pytest.mark.parametrize("closed", (">&-", "2>&-", "<&- >&- 2>&-"))
def test_closed_descriptors_are_no_reason_to_end(tmp_path, closed):
    status = tmp_path / "etc" / "status"
    with process(["sh", "-c", 'exec "$@" ' + closed, "sh"] + command_of("clockspeed", "-n", tmp_path),
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=UTC_ENV) as running:
        until(lambda: b'"used": 0' in contents(status))
        with open(str(tmp_path / "adjust"), "wb", buffering=0) as fifo:
            fifo.write(CS.pack(0))
        until(lambda: b'"used": 1' in contents(status))
        running.terminate()
        assert running.wait(10) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_clockspeed_takes_little_memory(daemon):
    process = daemon("-n")
    for count in (1, 2, 3):
        process.mark(count)
    assert int(re.search(r"VmHWM:\s+(\d+) kB", process.proc("status")).group(1)) < 17 * 1024


# ==== bad days ======================================================================================

def alone(days):
    return lambda simulation: simulation.run(days * 86400)


def back(days):
    """The server is back after so many days, and 3 s off; it is its time that counts."""
    def live(simulation):
        simulation.run(days * 86400)
        simulation.settle(*[541] * 5, error_sec=3).run(3 * 3600)
        simulation.kernel.clock -= 3e9
    return live


def wild(simulation):
    rng = random.Random(SEED)
    for _ in range(20):
        simulation.settle(3600, error_sec=rng.choice((-1, 1)) * 10.0 ** rng.randrange(-2, 4))
        simulation.settle(3600, 3600, 3600)


def moved(sec):
    def live(simulation):
        simulation.kernel.set_clock(round(sec * 1e9))
        simulation.run(300)
    return live


def stopped(sec, suspended):
    def live(simulation):
        simulation.kernel.pass_by(sec, suspended)
        simulation.kernel.clock -= 4e8 * suspended  # the hardware clock's
        simulation.settle(*[541] * 5)
    return live


def restored(simulation):
    simulation.kernel.tick -= 2 * HOUR_NS
    simulation.run(60)
    simulation.settle(541, 541)


def migrated(simulation):
    simulation.kernel.ppm -= 55
    simulation.kernel.pass_by(0.2, suspended=False)
    simulation.settle(*[541] * 7)


def rival(simulation):
    for _ in range(30):
        simulation.kernel.fields["freq"] = 7 << 16
        simulation.run(60)


def full_disk(simulation):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    simulation.etc.replace, replace = no_space, simulation.etc.replace
    simulation.settle(541, 541, 541)
    simulation.etc.replace = replace
    assert simulation.settle(541).status()["marks"]["used"] == 10


# What happens to a clockspeed that has learned; what lives through it; the lines of the log besides marks,
# with ... for anything; how many s the clock is off at most when it is over.  NOTES.md has the same rows.
BAD_DAYS = (
    ("the server is silent for a month", alone(30), (), 0.01),
    ("the server is back after a day, 3 s off", back(1), ("slew: +3.0... s will take ...",), 0.01),
    ("the server is back after a month, 3 s off", back(30), ("slew: +3.0... s will take ...",), 0.01),
    ("one mark of four is wild", wild, (), 0.001),
    ("date -s by hand, an hour off", moved(3600),
     ("moved: somebody set the system clock by +3600.000 s",
      "step: the system clock by -3... s, back to the time of the marks; ..."), 0.001),
    ("date -s by hand, 20 years off", moved(-20 * 31556952),
     ("moved: somebody set the system clock by -63113... s",
      "step: the system clock by +63113... s, back to the time of the marks; ..."), 0.001),
    ("suspended for a night", stopped(8 * 3600, True),
     ("suspend: the counter stood still for 8 h; a mark is wanted", "slew: +0.4... s will take ..."), 0.001),
    ("virtual machine paused for 0.3 s", stopped(0.3, False), ("slew: +0.3... s will take 10 min; ...",),
     0.001),
    ("virtual machine paused for a minute", stopped(60, False), ("slew: +... s will take 3... h; ...",), 60),
    ("restored from a snapshot, the counter goes back", restored,
     ("counter: it went back by 1... min, as in a machine that is restored from a snapshot; ...",),
     0.001),
    ("virtual machine migrated, 55 ppm and 0.2 s", migrated, ("slew: +... s will take ...",), 0.01),
    ("another program sets the frequency", rival,
     ("foreign: another program sets the clock's frequency; one of the two must go",), 0.1),
    ("the disk is full", full_disk,
     ("clockspeed: warning: unable to write etc/state: No space left on device",
      "clockspeed: warning: unable to write etc/status: No space left on device"), 0.001),
)


@pytest.mark.parametrize("event, live, said, off_sec", BAD_DAYS, ids=[row[0] for row in BAD_DAYS])
def test_a_bad_day(event, live, said, off_sec, simulate, monkeypatch):
    monkeypatch.setattr(CS, "SETTLED_SEC", 60 if live is rival else 300)  # for the test to be short
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel).settle(64, 541, 1623, 3600, 3600, 3600)
    assert abs(kernel.clock) < 1e6 and abs(simulation.rate_ppm() - 20) < 0.1
    del simulation.lines[:]
    live(simulation)
    patterns = {text: ".*".join(map(re.escape, text.split("..."))) for text in said}
    lines = [line for line in simulation.lines if not line.startswith("mark: ")]
    seen = {text for text in said for line in lines if re.fullmatch(patterns[text], line)}
    assert seen == set(said), lines
    assert all(any(re.fullmatch(pattern, line) for pattern in patterns.values()) for line in lines), lines
    assert abs(kernel.clock) < off_sec * 1e9
    assert abs(simulation.rate_ppm() - kernel.ppm) < 1, "nothing else is learned as drift"
    assert len(kernel.steps()) == sum(text.startswith("step: ") for text in said)


def test_a_mark_right_after_a_suspend_counts(simulate):
    """It may be in the FIFO before clockspeed has seen that it slept."""
    simulation = simulate(FakeKernel(ppm=20)).settle()
    simulation.kernel.pass_by(8 * 3600)
    simulation.kernel.clock -= 4e8
    assert simulation.mark() == "used" and "suspend: " in "".join(simulation.lines[-3:])
    simulation.run(1200)
    assert abs(simulation.kernel.clock) < 1e6


@pytest.mark.parametrize("turn_sec", (2**32 - 2208988800, 2**31, 2**32))  # 2036-02-07, 2038-01-19, 2106-02-07
def test_clockspeed_across_the_turns_of_32_bits(simulate, turn_sec):
    kernel = FakeKernel(ppm=20, start_ns=(turn_sec - 7200) * 10**9)
    simulation = simulate(kernel).settle(*[1800] * 6)
    assert simulation.daemon.marks["used"] == 6
    assert kernel.clock_ns() > turn_sec * 10**9 and abs(kernel.clock) < 1e5
    assert simulate(kernel).source == "phase and rate of etc/state"


@pytest.mark.long
def test_a_year_of_restarts_reboots_lost_and_wild_marks(simulate, monkeypatch):
    """The error is what was told, and nothing grows."""
    monkeypatch.setattr(CS, "SETTLED_SEC", 3600)  # else it wakes half a million times
    rng, kernel = random.Random(SEED), FakeKernel(ppm=20, behind_ns=10**9)
    simulation, errors_sec, wait_sec, left_sec = simulate(kernel, target_ns=10**7), [], 600, 365 * 86400
    while left_sec > 0:
        simulation.run(wait_sec)
        left_sec -= wait_sec
        kernel.ppm += rng.gauss(0, 3e-4 * wait_sec**0.5)
        if simulation.daemon.estimator.has_phase():
            errors_sec.append(abs(kernel.clock) / 1e9)
        what = rng.random()
        if what < 0.01:
            kernel.boot += "'"
            kernel.clock += rng.gauss(0, 3e8)
            kernel.fields.update(freq=0, tick=10000, status=0x40, maxerror=16 * 10**6)
        if what < 0.06:
            simulation = simulate(kernel, target_ns=10**7)
        if what > 0.1:
            wild_sec = rng.choice((-1, 1)) * 10.0 ** rng.randrange(-1, 3) if what > 0.98 else 0
            simulation.mark(rng.gauss(0, 2e-4) + wild_sec)
        wait_sec = min(86400, max(600, simulation.status()["next"]["wait_sec"]))
    assert sorted(errors_sec)[int(len(errors_sec) * 0.9)] < 0.02
    assert max(path.stat().st_size for path in (simulation.home / "etc").iterdir()) < 65536


# ==== clockctl ======================================================================================

# ==== clockctl-check ================================================================================

# ==== clockctl-graph ================================================================================

# ==== the services ==================================================================================

# ==== svc/install ===================================================================================

# ==== the README ====================================================================================

# ==== every decoder =================================================================================
# One row for each function that reads what others wrote: good inputs, bad ones, and what it may raise.
