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
import importlib.machinery
import importlib.util
import json
import random
import re
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

# ==== clockspeed: the process =======================================================================

# ==== bad days ======================================================================================

# ==== clockctl ======================================================================================

CTL = load("clockctl")
MARK = ADD.pack(-3200000, 720133918)  # 3.2 ms ahead, give or take 20.13 ms and 0.61 ms
BOOT_ID = CTL.take_reading("CLOCK_MONOTONIC").boot_id
DEAD = {"pid": 2**22 + 1}
NO_PLAN = {"wait_sec": None, "exchanges": None, "settling": True}


class Host:
    """An installation that everybody may look into, with stand-ins for the programs."""

    def __init__(self, home):
        self.home, self.bin, self.conf = home, home + "/bin", home + "/conf"
        self.adjust, self.asked = home + "/adjust", home + "/asked"
        os.chmod(home, 0o755)
        for name in ("bin", "etc", "mark"):
            os.mkdir(os.path.join(home, name))
            os.chmod(os.path.join(home, name), 0o777)
        os.mkfifo(self.adjust)
        self.write("asked", "", 0o666)
        self.configure("CLOCK_IP=192.0.2.1\n")
        self.stand_in("sntpclock", MARK)
        self.stand_in("clockview", b"before: 1\nafter:  2\n")
        self.env = dict(UTC_ENV, CLOCKSPEED_CONF=self.conf, LC_ALL="C.UTF-8")

    def write(self, name, text, mode=0o644):
        with open(os.path.join(self.home, name), "w") as file:
            file.write(text)
        os.chmod(os.path.join(self.home, name), mode)

    def configure(self, text):
        self.write("conf", "CLOCKSPEED_HOME=%s\nCLOCKSPEED_BIN=%s\n%s" % (self.home, self.bin, text))

    def stand_in(self, name, answer=b"", ours=True, then="exit 0"):
        """A program that notes its arguments and answers; one of ours knows --version."""
        with open(os.path.join(self.bin, name + ".answer"), "wb") as file:
            file.write(answer)
        version = "echo %s 2026.11; exit" % name if ours else "exit 100"
        self.write("bin/" + name, '#!/bin/sh\n[ "$1" = --version ] && { %s; }\necho "%s:$*" >>%s\n'
                   "cat $0.answer\n%s\n" % (version, name, self.asked, then), 0o755)

    def lines(self):
        with open(self.asked) as file:
            return file.read().replace(self.home, "HOME").splitlines()

    def status(self, **changes):
        self.write("etc/status", json.dumps(a_status(**changes)))

    def run(self, *args, **env):
        return run("clockctl", *args, **dict(self.env, **env))

    def start(self, *args, **options):
        return process(command_of("clockctl", *args), env=self.env, **options)

    def says(self, *args, **env):
        done = self.run(*args, **env)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.decode()

    def refuses(self, *args, **env):
        done = self.run(*args, **env)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (111, b"", 1), done.stderr
        return re.sub("^clockctl: fatal: unable to ", "", done.stderr.rstrip()).replace(self.home, "HOME")


@pytest.fixture
def host():
    with tempfile.TemporaryDirectory() as path:
        yield Host(path)


def a_status(age_sec=100, clock_off_sec=0.0032, **changes):
    """What clockspeed wrote that long ago, by which this clock is that far behind now."""
    now = CTL.take_reading("CLOCK_MONOTONIC_RAW")
    tick_ns = now.tick_ns - age_sec * 10**9
    status = {
        "version": 2, "pid": os.getpid(), "boot_id": now.boot_id, "doing": "steering the clock",
        "observe_only": False, "counter": "CLOCK_MONOTONIC_RAW", "scale": "utc", "tick_ns": tick_ns,
        "written_ns": now.clock_ns - age_sec * 10**9, "suspended_ns": now.suspended_ns,
        "offset_ns": round(clock_off_sec * 1e9),
        "variance": [1e10, 0, 1e4, 0], "bound": A_BOUND, "rate_ppm": 0.0, "rate_error_ppm": 0.0123,
        "noise_ns": 2e6, "wander": 1e-9, "marks": {"used": 12, "doubted": 1, "refused": 0},
        "last_mark": {"tick_ns": tick_ns, "offset_ns": 1234567, "spread_ns": 10**6, "distance_ns": 10**5,
                      "outcome": "used"},
        "next": {"wait_sec": 700.0, "exchanges": 4, "settling": False},
        "kernel": {"freq_ppm": 12.3, "tick": 10000, "maxerror_us": 5000, "esterror_us": 100,
                   "synchronised": True}}
    return dict(status, **changes)


A_BOUND = {"earliest_ns": -5 * 10**6, "latest_ns": 4 * 10**6}


@pytest.mark.parametrize("text, wanted", [
    ("# only a comment, isn't it\n\n  # another", {}), ("CLOCK_IP=192.0.2.1", {"CLOCK_IP": "192.0.2.1"}),
    ('CLOCK_IP="192.0.2.1 192.0.2.2" # two\r\n', {"CLOCK_IP": "192.0.2.1 192.0.2.2"}),
    ("CLOCK_TYPE=n't'\"p\"; CLOCK_KEY=1", {"CLOCK_TYPE": "ntp", "CLOCK_KEY": "1"}),
    ("export CLOCK_KEY=a#b\\ c\nexport CLOCK_KEY CLOCK_IP", {"CLOCK_KEY": "a#b c"}),
    ("CLOCK_KEY=1\nCLOCK_KEY=';&|<>()'\nCLOCK_IP=", {"CLOCK_KEY": ";&|<>()", "CLOCK_IP": ""}),
])
def test_shell_assignments_are_understood(text, wanted):
    assert CTL.parse_assignments(text) == wanted


@pytest.mark.parametrize("line, said", [(line, "not of the form") for line in (
    "CLOCK_IP=$HOME", "CLOCK_IP=`id`", "CLOCK_IP=~/a", 'CLOCK_IP="$(id)"', "CLOCK_IP=a b", "CLOCK_IP", "id",
    "CLOCK_IP = a", "CLOCK_IP=a & id", "CLOCK_IP=a>b", "CLOCK_IP=(a)", "CLOCK_IP=a\0", "1A=b", "A-B=c", "=",
    ". x", "if CLOCK_IP=a; then", "CLOCK_IP+=a")] + [
    ('CLOCK_IP="a', "No closing quotation"), ("CLOCK_IP=a\\", "No escaped character"),
    ('CLOCK_IP="a # b"', "No closing quotation"), ("LD_PRELOAD=/tmp/x", "there is no variable LD_PRELOAD"),
    ("PATH=/tmp", "no variable PATH"), ("PYTHONPATH=/tmp", "no variable"), ("IFS=x", "no variable IFS"),
    ("CLOCK_ERR=1", "no variable CLOCK_ERR; the nearest known one is CLOCK_ERROR"),
    ("CLOCK_IPS=a", "no variable CLOCK_IPS; the nearest known one is CLOCK_IP")])
def test_what_needs_a_shell_or_is_unknown_is_refused_with_its_line(line, said):
    with pytest.raises(ValueError, match="^line 3: .*" + re.escape(said)):
        CTL.parse_assignments("\nCLOCK_KEY=1\n" + line)


def test_spans_of_time():
    for text, sec in (("0.010", 0.01), ("10ms", 0.01), ("10 us", 1e-5), (".5s", 0.5), ("1e-3", 1e-3)):
        assert CTL.parse_span(text) == pytest.approx(sec)
    for text in ("", "0", "0ms", "-1", "5x", "nan", "inf", "1e999", "ms", "1 2", "0x1"):
        with pytest.raises(ValueError):
            CTL.parse_span(text)


def test_run_gives_a_program_the_configuration_and_nothing_else(host):
    host.configure("CLOCK_TYPE=tai\nCLOCK_SCALE=tai\n")
    script = 'echo "$CLOCK_TYPE $CLOCK_IP $CLOCKSPEED_HOME $OTHER $CLOCK_SCALE $*"'
    assert host.says("run", "sh", "-c", script, "sh", "-u", "--help", CLOCK_IP="environment", OTHER="kept",
                     CLOCK_SCALE="utc") == "tai environment %s kept tai -u --help\n" % host.home
    assert host.refuses("run", "/none") == "run /none: No such file or directory"
    assert host.refuses("atto", CLOCKSPEED_CONF="/none") == "read /none: No such file or directory"


@contextlib.contextmanager
def reading(path):
    fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield lambda: os.read(fifo, 100)
    os.close(fifo)


@pytest.mark.parametrize("text, changes, asked", [
    ("CLOCK_IP='a,b  c'", None, "-l 0 -s HOME/mark a b c"),
    ("CLOCK_IP=a\nCLOCK_KEYFILE=/k\nCLOCK_KEY=7", {}, "-k /k -K 7 -r 4 -s HOME/mark a"),
    ("CLOCK_IP=a", {"marks": {"used": 0, "doubted": 0, "refused": 9}}, "-l 0 -s HOME/mark a"),
    ("CLOCK_IP=a", {"boot_id": "other"}, "-l 0 -s HOME/mark a"), ("CLOCK_IP=a", DEAD, "-s HOME/mark a"),
    ("CLOCK_IP=a", {"next": dict(NO_PLAN, exchanges=8)}, "-r 8 -T 30000 -s HOME/mark a"),
    ("CLOCK_IP=a", {"next": NO_PLAN}, "-s HOME/mark a"),
    ("CLOCK_IP=a", {"next": dict(NO_PLAN, exchanges=999)}, "-s HOME/mark a"),
])
def test_what_a_mark_asks_of_our_client(host, text, changes, asked):
    host.configure(text)
    changes is None or host.status(**changes)
    with reading(host.adjust) as read:
        assert host.says("mark") == "mark: offset -0.003200000 s from ntp %s\n" % asked.rpartition("mark ")[2]
        assert read() == MARK and host.lines() == ["sntpclock:" + asked]


def test_other_clients_are_given_one_server_and_their_12_bytes_are_taken(host):
    host.configure("CLOCK_IP='192.0.2.1 192.0.2.2'\nCLOCK_TYPE=tai")
    host.stand_in("taiclock", MARK[:12], ours=False)
    with reading(host.adjust) as read:
        done = host.run("mark")
        assert read() == MARK[:12] + bytes(4) and host.lines() == ["taiclock:192.0.2.1"]
    assert re.fullmatch("clockctl: warning: .* asks only the first of CLOCK_IP, 192.0.2.1\n", done.stderr)


@pytest.mark.parametrize("text, answer, then, said", [
    ("CLOCK_IP=' , '", MARK, "", "ask the time: CLOCK_IP is not set in HOME/conf"),
    ("CLOCK_IP='-f a'", MARK, "", "ask the time: CLOCK_IP is not an address in HOME/conf"),
    ("CLOCK_TYPE=gps", MARK, "", "ask the time: CLOCK_TYPE is none of ntp, tai and nts in HOME/conf"),
    ("CLOCK_KEY=1", MARK, "", "ask the time: of CLOCK_KEYFILE and CLOCK_KEY only one is set in HOME/conf"),
    ("CLOCK_TYPE=tai\nCLOCK_KEYFILE=k\nCLOCK_KEY=1", MARK, "",
     "ask the time: CLOCK_KEY needs CLOCK_TYPE=ntp and our sntpclock, not HOME/bin/taiclock"),
    ("CLOCK_TYPE=nts", MARK, "", "find ntsclock: it is not in HOME/bin"),
    ("", b"", "", "use the answer of HOME/bin/sntpclock: 0 bytes, not 16"),
    ("", bytes(17), "", "use the answer of HOME/bin/sntpclock: 17 bytes, not 16"),
    ("", b"\xff" * 16, "", "use the answer of HOME/bin/sntpclock: not a TAI64NA packet"),
    ("", MARK, "exit 111", "ask the time: sntpclock failed (exit status 111)"),
    ("", MARK, "kill -KILL $$", "ask the time: sntpclock failed (signal 9)"),
])
def test_no_answer_is_a_line_and_no_mark(host, text, answer, then, said):
    host.configure("CLOCK_IP=192.0.2.1\n" + text)
    host.stand_in("sntpclock", answer, then=then)
    host.stand_in("taiclock")
    with reading(host.adjust) as read:
        assert host.refuses("mark") == said
        with pytest.raises(BlockingIOError):
            read()


def endless(path):
    with open(path, "wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("make, said", [
    (None, "there is none: clockspeed makes it when it starts"), (os.mkfifo, "no clockspeed is reading it"),
    (os.mkdir, "Is a directory"), (endless, "it is not a FIFO"),
    (lambda path: os.symlink("/dev/null", path), "it is a symbolic link")])
def test_nobody_is_asked_for_a_mark_that_nobody_would_take(host, make, said):
    os.unlink(host.adjust)
    make and make(host.adjust)
    assert host.refuses("mark") == "write HOME/adjust: " + said and host.lines() == []


def test_a_mark_waits_for_no_full_fifo_but_for_a_clockspeed_that_starts(host):
    with reading(host.adjust), open(os.open(host.adjust, os.O_RDWR | os.O_NONBLOCK), "wb", 0) as fifo:
        while fifo.write(bytes(4096)):
            pass
        assert host.refuses("mark") == "write HOME/adjust: it is full: clockspeed has stopped reading it"
    with host.start("mark", "--patience", PATIENCE_SEC, stdout=subprocess.DEVNULL) as marking:
        time.sleep(0.3)
        with reading(host.adjust) as read:
            assert marking.wait(PATIENCE_SEC) == 0 and read() == MARK


@pytest.mark.parametrize("ns, last, words", [
    (3200000, 720133918, "3.2 ms behind ntp 192.0.2.1, give or take 20.7 ms"),
    (-5 * 10**10, 0, "50 s ahead of ntp 192.0.2.1"), (0, 0, "0 s behind ntp 192.0.2.1")])
def test_view_shows_clockviews_lines_and_one_in_words(host, ns, last, words):
    host.stand_in("sntpclock", ADD.pack(ns, last))
    host.stand_in("clockview", b"shown\n", then="od -An -v -tx1 | tr -d ' \\n' >>%s" % host.asked)
    assert host.says("view") == "shown\nthis clock is %s\n" % words
    assert host.lines() == ["sntpclock:192.0.2.1", "clockview:", ADD.pack(ns, last).hex()]


def test_set_asks_for_any_offset_and_says_first_that_it_may_not(host, monkeypatch, capfd):
    host.stand_in("clockadd")
    command = without_the_right(command_of("clockctl", "set"))
    done = subprocess.run(command, stderr=subprocess.PIPE, env=host.env)
    assert (done.returncode, done.stderr, host.lines()) == (
        111, b"clockctl: fatal: unable to set the clock: this process has no right to; run it as root\n", [])
    monkeypatch.setattr(CTL, "may_set_clock", lambda: True)
    monkeypatch.setattr(CTL, "CONF", host.conf)
    assert CTL.main(["clockctl", "set"]) == 0
    assert capfd.readouterr().out == "set: clock stepped by -0.003200000 s, as ntp 192.0.2.1 has it\n"
    assert host.lines() == ["sntpclock:-l 0 192.0.2.1", "clockadd:"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_root_asks_as_clocksd_with_a_small_environment(monkeypatch):
    nobody = CTL.pwd.getpwnam("nobody")
    monkeypatch.setattr(CTL.pwd, "getpwnam", lambda name: {"clocksd": nobody}[name])
    monkeypatch.setenv("SECRET", "1")
    config = dict(CTL.DEFAULTS, CLOCK_KEY="7")
    done = CTL.capture(["sh", "-c", "id -u; id -G; grep CapEff /proc/self/status; env"], config)
    uid, groups, _, capabilities, *env = done.stdout.decode().split()
    assert (int(uid), int(groups), int(capabilities, 16)) == (nobody.pw_uid, nobody.pw_gid, 0)
    assert "CLOCK_KEY=7" in env and "SECRET=1" not in env
    assert CTL.capture(["id", "-u"], config, user="missing").stdout == b"0\n"


@pytest.mark.parametrize("tick_ns, last, said", [
    (1, 50000, "0.000000001000050000 s per tick, rate +50.000 ppm"),
    (0, 4 * 10**8, "0.000000000400000000 s per tick, which is not about 1 ns: "),
    (1, 500001, "0.000000001000500001 s per tick, which is not about 1 ns: ")])
def test_atto_shows_the_rate(host, tick_ns, last, said):
    assert host.says("atto") == "atto: not known yet; clockspeed writes it when it has two marks\n"
    with open(host.home + "/etc/atto", "wb") as file:
        file.write(ADD.pack(tick_ns, last))
    assert host.says("atto").startswith("atto: %s" % said)


@pytest.mark.parametrize("command, name", [
    ("atto", "etc/atto"), ("status", "etc/status"), ("now", "etc/status"), ("sources", "mark/sources")])
def test_what_others_planted_is_a_line_and_never_waited_for(host, command, name):
    path = os.path.join(host.home, name)
    for plant, said in (
            (os.mkfifo, "it is not a regular file"), (os.mkdir, "Is a directory"),
            (endless, "it has more than "),
            (lambda path: os.symlink("/dev/zero", path), "it is a symbolic link")):
        plant(path)
        assert host.refuses(command).startswith("read HOME/%s: %s" % (name, said))
        os.rmdir(path) if plant == os.mkdir else os.unlink(path)


def test_output_replaces_files_writes_to_devices_and_follows_no_link(host):
    host.status()
    path, link = host.home + "/out", host.home + "/link"
    for _ in range(2):
        assert host.says("metrics", "--output", path) == "" and "clockspeed_up 1\n" in open(path).read()
    assert not os.path.exists(path + ".tmp")
    assert host.says("metrics", "--output", "/dev/null") == "" and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.symlink(path, link)
    assert host.refuses("metrics", "--output", link) == "write HOME/link: it is a symbolic link"
    assert host.refuses("metrics", "--output", host.adjust) == "write HOME/adjust: No such device or address"


def test_metrics_tell_bound_and_deviation_or_just_that_it_is_down(host):
    host.status()
    values = dict(line.rsplit(" ", 1) for line in host.says("metrics").splitlines())
    low, high = (float(values['clockspeed_bound_seconds{side="%s"}' % side]) for side in ("low", "high"))
    assert low < float(values["clockspeed_offset_seconds"]) < high and high - low == pytest.approx(0.009)
    assert values['clockspeed_marks_total{outcome="used"}'] == "12"
    host.status(**DEAD)
    done = host.run("metrics")
    assert (done.stdout, done.returncode) == (b"clockspeed_up 0\n", 0) and "does not run" in done.stderr


@pytest.mark.parametrize("changes, problem", [
    ({"boot_id": "other"}, "clockspeed has not run since the last boot"),
    ({"age_sec": -60}, "clockspeed has not run since the last boot"),
    ({"suspended_ns": -10**12}, "clockspeed has written nothing since a suspend"),
    ({"age_sec": 1500}, "clockspeed has written nothing for 25 min"),
    (DEAD, "clockspeed does not run any more")])
def test_a_status_that_says_nothing_of_now_says_why(host, changes, problem):
    host.status(**changes)
    shown = host.says("status")
    assert shown.startswith("clock now     not known: %s\n" % problem) and "next mark" not in shown
    assert host.refuses("now") == "tell the time: " + problem
    assert host.refuses("until", "1s", "--timeout", "10ms").endswith("unable to tell the time: " + problem)
    assert json.loads(host.says("status", "--json"))["now"]["offset_sec"] is None


@pytest.mark.parametrize("off_sec, said", [
    (3600, "60 min behind"), (-3600, "60 min ahead of"), (0.0032, r"3\.\d+ ms behind")])
def test_status_begins_with_how_far_the_clock_is_off_now(host, off_sec, said):
    """Whatever the system clock showed when clockspeed wrote it."""
    host.status(clock_off_sec=0, written_ns=a_status()["written_ns"] + round(off_sec * 1e9))
    assert re.match(r"clock now     %s real time, ± \d+ µs\n"
                    r"bound         real time is certainly within \S+ \S+ and \S+ \S+ of the clock\n"
                    r"deviation     \d+ µs now; without a mark \d+ µs in an hour, .* in a day, " % said,
                    host.says("status"))
    assert not [line for line in host.says("status", LC_ALL="C") if not line.isascii()]


@pytest.mark.parametrize("changes, due, said", [
    ({}, None, r"wanted in (10|9\.\d+) min"), ({}, 125, r"in 2\.\d+ min"), ({}, -5, "now"),
    ({"next": NO_PLAN}, None, "as clockspeed_adjust has it, settling: 13 marks so far")])
def test_status_knows_the_next_mark_from_the_loop_itself(host, changes, due, said):
    host.status(**changes)
    due_sec = time.clock_gettime(time.CLOCK_BOOTTIME) + (due or 0)
    host.write("mark/due", "%s %d\n" % ("other" if due is None else BOOT_ID, due_sec))
    assert re.search("^next mark     %s$" % said, host.says("status"), re.M)


def test_now_tells_the_earliest_and_the_latest(host):
    host.status(clock_off_sec=0)
    before_ns, now, after_ns = time.time_ns(), json.loads(host.says("now", "--json")), time.time_ns()
    assert before_ns - 6 * 10**6 < now["earliest_ns"] < now["latest_ns"] < after_ns + 5 * 10**6
    assert now["width_ns"] == 9 * 10**6 and now["deviation_ns"] >= 10**5
    latest = time.gmtime(now["latest_ns"] // 10**9)
    assert now["latest"].startswith(time.strftime("%Y-%m-%dT%H:%M:%S.", latest))
    assert re.fullmatch(r"earliest   \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}\nlatest     \S+\nwidth      9 ms\n"
                        r"deviation  \d+ µs\n", host.says("now"))
    host.status(clock_off_sec=0, scale="tai")
    assert abs(json.loads(host.says("now", "--json"))["earliest_ns"] + 27 * 10**9 - time.time_ns()) < 10**10
    host.status(bound=None)
    assert host.refuses("now") == "tell the time: there has been no mark yet that tells how good it is"


def test_until_waits_for_the_bound(host):
    host.status()
    assert host.says("until", "9ms", "--timeout", "20s") == ""
    assert "the clock is certainly within" in host.refuses("until", "1ms", "--timeout", "10ms")
    with host.start("until", "1ms") as waiting:
        host.status(clock_off_sec=0, bound={"earliest_ns": -10**5, "latest_ns": 10**5})
        assert waiting.wait(PATIENCE_SEC) == 0
    assert host.run("until", "0").returncode == host.run("until", "1s", "--timeout", "x").returncode == 100


SOURCES = """%d ntp 192.0.2.1 -1234567 412000 20000000 210000 2 c0000201 agreed
%d nts b.example - - - - - - %s
"""


def test_sources_are_a_table_with_their_ages(host):
    host.write("mark/sources", SOURCES % (time.time() - 3600, time.time() - 7300, "failed: timed out\x1b[2J"))
    _, first, second = [re.sub("  +", "|", line) for line in host.says("sources").splitlines()]
    assert first == "ntp 192.0.2.1|60 min|-1.23 ms|412 µs|20 ms|210 µs|2|c0000201|agreed"
    assert second == "nts b.example|2.03 h|-|-|-|-|-|-|failed: timed out?[2J"
    host.status()
    assert "\nsource        ntp 192.0.2.1, 60 min ago: agreed\n" in host.says("status")


@pytest.mark.parametrize("changes, args, said", [
    (None, "541 2617923", 1623), (None, "900000 2617923", 2617923), ({}, "541 2617923", 599),
    ({"next": dict(NO_PLAN, wait_sec=10)}, "541 2617923", 64), (DEAD, "541 2617923", 1623),
    ({"next": NO_PLAN}, "541 2617923", 1623), ({}, "541 100", 100),
    ("failed: timed out", "--failed 541 2617923", 541),
    ("failed: kiss-o'-death RATE", "--failed 541 2617923", 1024),
    ("failed: kiss-o'-death DENY", "--failed 541 2617923", 86400),
    ("failed: kiss-o'-death RSTR", "--failed 541 600", 600)])
def test_wait_goes_by_clockspeed_else_triples_and_minds_kisses(host, changes, args, said):
    if isinstance(changes, str):
        host.write("mark/sources", SOURCES % (time.time(), time.time(), changes))
    elif changes is not None:
        host.status(**changes)
    assert abs(int(host.says("wait", *args.split())) - said) <= (10 if said == 599 else 0)


def test_wait_lets_clockspeed_take_in_the_mark_first(host):
    host.status(next=dict(NO_PLAN, wait_sec=10))
    os.utime(host.home + "/etc/status", (1, 1))
    with host.start("wait", 541, 2617923, stdout=subprocess.PIPE) as waiting:
        time.sleep(0.3)
        host.status(next=dict(NO_PLAN, wait_sec=9000))
        assert int(waiting.stdout.read()) > 8000


BAD_VALUES = (None, "x", -1, 1e308, 10**400, float("nan"), float("inf"), [], {}, "\x1b[2J", [1e308] * 9)


def test_a_damaged_status_is_a_line_and_shows_no_escapes(host, monkeypatch, capfd):
    monkeypatch.setattr(CTL, "CONF", host.conf)
    good = a_status()
    inner = [(name, key) for name in ("last_mark", "next", "kernel", "marks", "bound") for key in good[name]]
    for name, key in [(name, None) for name in good] + inner:
        for value in BAD_VALUES:
            host.status(**{name: dict(good[name], **{key: value}) if key else value})
            for command in (["status"], ["status", "--json"], ["now"], ["wait", "541", "999"], ["metrics"]):
                assert CTL.main(["clockctl"] + command) in (0, 111)
    said = capfd.readouterr()
    assert "unable to read %s/etc/status: it is damaged\n" % host.home in said.err
    assert "\x1b" not in said.err + said.out and "unable to write output" not in said.err


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
def test_a_signal_ends_a_mark_and_its_client(host, number):
    host.stand_in("sntpclock", then="echo $$ >>%s; exec sleep 3571" % host.asked)
    with reading(host.adjust), host.start("mark", stderr=subprocess.PIPE) as marking:
        until(lambda: len(host.lines()) == 2)
        marking.send_signal(number)
        assert (marking.wait(PATIENCE_SEC), marking.stderr.read()) == (128 + number, b"")
    until(lambda: not os.path.exists("/proc/" + host.lines()[1]))


def test_every_command_has_its_part_of_the_manual_and_unknown_words_are_named(host):
    for name in CTL.COMMANDS:
        text = run("clockctl", "help", name).stdout.decode()
        assert text.startswith("clockctl " + name) and text.count("\n") > 1
        assert all(run("clockctl", name, option).stdout.decode() == text for option in ("-h", "--help"))
        done = host.run(name, "--bad")
        assert (done.returncode, done.stderr) == (100, "clockctl: usage: %s\n" % text.partition("\n")[0])
    for word in ("version", "help"):
        assert run("clockctl", word).stdout == run("clockctl", "--" + word).stdout
    for args in (["statsu"], ["help", "statsu"]):
        assert "; statsu is not one; the nearest known one is status\n" in run("clockctl", *args).stderr


def test_check_and_graph_are_run_from_beside_it(host):
    path = shutil.copy(path_of("clockctl"), host.bin)
    os.symlink(path, host.home + "/link")
    done = subprocess.run([sys.executable, "-IS", path, "check"], stderr=subprocess.PIPE)
    assert done.returncode == 111 and done.stderr.endswith(b"there is none: copy clockctl-check there\n")
    host.stand_in("clockctl-check", then="exit 2")
    done = subprocess.run([sys.executable, "-IS", host.home + "/link", "check", "--json", "x"])
    assert done.returncode == 2
    assert host.lines() == ["clockctl-check:--json x"]


@pytest.mark.skipif(os.path.exists("/usr/local/etc/clockspeed.conf"), reason="there is a configuration here")
def test_without_modules_that_python3_minimal_lacks_it_does_what_it_can(host):
    code = ("import sys, runpy; sys.modules.update(dict.fromkeys(('json', 'ctypes', 'difflib', 'shlex'))); "
            "sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    env = dict(UTC_ENV, CLOCKSPEED_HOME=host.home, CLOCKSPEED_BIN=host.bin, CLOCK_IP="192.0.2.1")
    host.status()
    for args, status, said in ((["view"], 0, ""), (["statsu"], 100, "usage: .*"), (["atto"], 0, ""),
                               (["status"], 111, ".*json.*"), (["until", "1s"], 111, ".*json.*")):
        done = subprocess.run([sys.executable, "-IS", "-c", code, path_of("clockctl")] + args, env=env,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == status and re.fullmatch("(clockctl: %s\n)?" % said, done.stderr.decode())


TRIED = """#!%s
import os, shutil, sys
home = sys.argv[2]
open("%s", "a").write("%%d\\n" %% os.getpid())
os.mkdir(home + "/etc")
os.mkfifo(home + "/adjust")
fifo = os.open(home + "/adjust", os.O_RDWR)
while os.read(fifo, 16):
    shutil.copy("%s/etc/status", home + "/etc/status")
"""


@pytest.fixture
def trying(host, monkeypatch):
    """A host whose clockctl finds stand-ins only; its clockspeed takes each mark for the same."""
    host.status(rate_ppm=10.0)
    host.write("bin/clockspeed", TRIED % (sys.executable, host.asked, host.home), 0o755)
    for name, value in (("__file__", host.bin + "/clockctl"), ("CONF", host.conf), ("TRY_SEC", 0.1),
                        ("TRY_EVERY_SEC", 0.5)):
        monkeypatch.setattr(CTL, name, value)
    monkeypatch.setattr(tempfile, "tempdir", host.home + "/mark")
    yield host
    assert os.listdir(host.home + "/mark") == []
    until(lambda: not any(os.path.exists("/proc/" + line) for line in host.lines() if line.isdecimal()))


def test_try_shows_what_clockspeed_makes_of_the_answers(trying, capfd):
    assert CTL.main(["clockctl", "try", "ntp:192.0.2.9"]) == 0
    said = capfd.readouterr().out.replace("±", "+-").splitlines()
    assert said[0].endswith("13 marks: rate +10.00 +- 0.01 ppm")
    assert said[1].endswith("is off by 864 ms a day, +- 1.06 ms.")
    assert trying.lines()[1:] == ["sntpclock:-r 1 192.0.2.9"]


def test_try_ends_at_a_failure_that_time_will_not_mend_with_one_line(trying, capfd):
    for words in ("unable to find no.such.host: Name or service not known", "kiss-o'-death DENY"):
        trying.stand_in("sntpclock", then='echo "sntpclock: fatal: %s" >&2; exit 111' % words)
        assert CTL.main(["clockctl", "try", "ntp:no.such.host"]) == 111
        assert capfd.readouterr().err == "clockctl: fatal: unable to ask ntp:no.such.host: %s\n" % words
    shutil.copy("/bin/true", trying.bin + "/clockspeed")
    assert CTL.main(["clockctl", "try", "ntp:192.0.2.9"]) == 111
    assert capfd.readouterr().err.endswith("/clockspeed: a clockspeed in C would set the clock\n")
    assert CTL.main(["clockctl", "try", "gps:192.0.2.9"]) == CTL.main(["clockctl", "try", "ntp:-f"]) == 100


def test_a_signal_ends_a_try_and_all_that_it_started(trying):
    shutil.copy(path_of("clockctl"), trying.bin)
    trying.stand_in("sntpclock", then="echo $$ >>%s; exec sleep 3571" % trying.asked)
    command = [sys.executable, "-IS", trying.bin + "/clockctl", "try", "ntp:192.0.2.9"]
    env = dict(trying.env, TMPDIR=trying.home + "/mark")
    with process(command, stderr=subprocess.PIPE, env=env) as running:
        until(lambda: len(trying.lines()) == 3)
        running.terminate()
        assert (running.wait(PATIENCE_SEC), running.stderr.read()) == (143, b"")


@pytest.mark.skipif(not hasattr(time, "CLOCK_MONOTONIC_RAW"), reason="no CLOCK_MONOTONIC_RAW")
def test_try_without_a_server_compares_the_counter_with_the_kernels_clock(monkeypatch, capfd):
    monkeypatch.setattr(CTL, "TRY_SEC", 2)
    assert CTL.main(["clockctl", "try"]) == 0
    first, *shown, last = capfd.readouterr().out.replace("±", "+-").splitlines()
    assert first.startswith("No server is asked.") and "a server would tell: clockctl try ntp:HOST" in last
    for second, line in enumerate(shown, 1):
        assert re.fullmatch(r" %d s: the kernel's clock is off by \S+ \+- \S+ ppm" % second, line)


def test_real_programs_from_the_server_to_the_status(host):
    """An observing clockspeed, a taiclockd on loopback, and what clockctl does with them."""
    address = "127.%d.%d.1" % divmod(os.getpid() % 65000 + 256, 256)
    for name in ("taiclock", "clockview"):
        shutil.copy(path_of(name), host.bin + "/" + name)
    host.configure("CLOCK_TYPE=tai\nCLOCK_IP=%s\nCLOCK_ERROR=10ms\n" % address)
    os.unlink(host.adjust)
    env = dict(host.env, CLOCK_ERROR="10ms")
    with process(command_of("taiclockd", "-i", address), env=env, stdout=subprocess.DEVNULL), process(
            command_of("clockspeed", "-n", host.home), env=env, stdout=subprocess.DEVNULL):
        for _ in range(3):
            assert host.says("mark", "--patience", PATIENCE_SEC).endswith(" s from tai %s\n" % address)
        assert 64 <= int(host.says("wait", 541, 2617923)) < 10**5
        assert host.says("until", "1s", "--timeout", "20s") == ""
        assert host.says("now").startswith("earliest   20")
        shown = host.says("status")
        assert "\nmarks         3 used, " in shown and "\nsource        tai %s, " % address in shown
        assert " agreed\n" in host.says("sources") and "this clock is " in host.says("view")


# ==== clockctl-check ================================================================================

# ==== clockctl-graph ================================================================================

# ==== the services ==================================================================================

SHELLS = [pytest.param(command.split(), id=command) for command in ("dash", "bash", "mksh", "busybox sh")]
ADJUST = path_of("svc/clockspeed_adjust/clock_adjust.sh")
# marks fail by the file `failing`; the sleeps are noted, and end at once but for the tenth
FAKE_CLOCKCTL = """case $1 in
run) echo %(home)s ;; atto) echo atto ;;
mark) [ ! -e %(home)s/failing ] ;;
wait) [ -z "$SAYS" ] && exec %(clockctl)s "$@"; echo "$SAYS" ;;
esac
"""
FAKE_SLEEP = """echo "$1 $(cat %(home)s/mark/due | cut -d' ' -f2)" >>%(home)s/sleeps
[ $(wc -l <%(home)s/sleeps) -lt ${SLEEPS:-10} ] || exec /bin/sleep 3573
"""


@pytest.fixture
def loop(host):
    """Starts the loop in a shell; its clockctl and sleep are stand-ins."""
    clockctl = "%s -IS %s" % (sys.executable, path_of("clockctl"))
    for name, text in (("clockctl", FAKE_CLOCKCTL), ("sleep", FAKE_SLEEP)):
        host.write("bin/" + name, "#!/bin/sh\n" + text % {"home": host.home, "clockctl": clockctl}, 0o755)

    def start(shell, **env):
        need(shell[0])
        return process(shell + [ADJUST], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(
            UTC_ENV, PATH=host.bin + ":" + os.environ["PATH"], CLOCKSPEED_CONF=host.conf, **env))

    def sleeps(count):
        path = os.path.join(host.home, "sleeps")
        until(lambda: os.path.exists(path) and open(path).read().count("\n") == count)
        with open(path) as file:
            return [tuple(map(int, line.split())) for line in file]
    host.start, host.sleeps = start, sleeps
    return host


@pytest.mark.parametrize("shell", SHELLS)
def test_the_waits_triple_up_to_a_month_and_what_is_due_is_kept(loop, shell):
    with loop.start(shell) as adjusting:
        seen = loop.sleeps(10)
        assert [wait for wait, _ in seen] == [541 * 3**power for power in range(8)] + [2617923] * 2
        up_sec = time.clock_gettime(time.CLOCK_BOOTTIME)
        assert all(-PATIENCE_SEC < due - wait - up_sec <= 1 for wait, due in seen)
        adjusting.terminate()
        assert adjusting.wait(PATIENCE_SEC) == 0
        said = adjusting.stdout.read().decode().splitlines()
    assert said[:3] == ["atto", "===", "Waiting 541 seconds until next adjustment..."]
    assert not os.path.exists(loop.home + "/mark/due")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_loop_goes_by_clockctl_and_by_what_a_kiss_wants(loop, shell):
    for env, failing, waits in (
            ({"SAYS": "100"}, False, [100, 100]), ({"SAYS": "garbage"}, False, [541, 1623]),
            ({}, "timed out", [541, 541]), ({}, "kiss-o'-death RATE", [1024, 1024])):
        if failing:
            loop.write("failing", "")
            loop.write("mark/sources", SOURCES % (time.time(), time.time(), "failed: " + failing))
        with loop.start(shell, SLEEPS="2", **env):
            assert [wait for wait, _ in loop.sleeps(2)] == waits
        os.unlink(loop.home + "/sleeps")
        os.unlink(loop.home + "/mark/due")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("due, first", [
    ("%s 300", 300), ("%s -300", 541), ("other 300", 541), ("%s 9999999", 541), ("x", 541)])
def test_a_restart_asks_no_sooner_than_the_mark_was_due(loop, shell, due, first):
    words = due.split()
    if words[1:]:
        words[1] = "%d" % (time.clock_gettime(time.CLOCK_BOOTTIME) + int(words[1]))
    loop.write("mark/due", " ".join(words).replace("%s", BOOT_ID) + "\n")
    with loop.start(shell, SLEEPS="1"):
        assert first - PATIENCE_SEC < loop.sleeps(1)[0][0] <= first + 1


@pytest.mark.parametrize("shell", SHELLS)
def test_a_term_ends_the_mark_or_sleep_under_way(loop, shell):
    noted = "echo $$ >>%s\nexec /bin/sleep 3572\n" % loop.asked
    loop.write("bin/sleep", "#!/bin/sh\n" + noted, 0o755)
    loop.write("bin/clockctl", "#!/bin/sh\n[ $1 != mark ] && exit\n[ -e %s/passing ] && exit\n%s" % (
        loop.home, noted), 0o755)
    for passing in (False, True):
        if passing:
            loop.write("passing", "")
        with loop.start(shell) as adjusting:
            until(lambda: len(loop.lines()) == 1 + passing)
            adjusting.terminate()
            assert adjusting.wait(PATIENCE_SEC) == 0
        until(lambda: not os.path.exists("/proc/" + loop.lines()[-1]))


# ==== svc/install ===================================================================================

# ==== the README ====================================================================================

# ==== every decoder =================================================================================
# One row for each function that reads what others wrote: name, function of bytes, good inputs, what it may
# raise.

DECODERS = [
    ("clockctl's configuration", lambda data: CTL.parse_assignments(os.fsdecode(data)),
     [b"CLOCK_IP=a # b\n", b"export CLOCK_KEY='7' CLOCK_TYPE=\"ntp\"; CLOCK_IP=\n"], ValueError),
    ("clockctl's status", CTL.parse_status, [json.dumps(a_status()).encode()], CTL.DAMAGES),
    ("clockctl's sources", CTL.parse_sources, [(SOURCES % (1, 2, "failed: timed out")).encode()], CTL.DAMAGES),
]


def mutated(rng, data):
    """The data with some of its bytes changed, doubled, left out or made up."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(at + rng.choice((1, 1, 4, 40)), len(data))
        data[at:end] = rng.choice((b"", data[at:end] * 2, random_bytes(rng, end - at), bytes(end - at),
                                   b"\xff", b"-9" * 20, bytes(data[:at])))
    return bytes(data)


@pytest.mark.parametrize("count", (3000, pytest.param(10**6, marks=pytest.mark.long)))
@pytest.mark.parametrize("name, decode, good, allowed", DECODERS, ids=[row[0] for row in DECODERS])
def test_whatever_a_decoder_reads_it_takes_or_refuses(name, decode, good, allowed, count):
    rng = random.Random(SEED)
    for data in good:
        decode(data)
    for _ in range(count):
        data = mutated(rng, rng.choice(good)) if rng.random() < 0.9 else random_bytes(rng, rng.randrange(300))
        try:
            decode(data)
        except allowed:
            pass
        except Exception as err:
            pytest.fail("%s: %r on %r" % (name, err, data))
