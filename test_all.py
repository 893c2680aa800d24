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
import struct
import time
import xml.etree.ElementTree

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

# ==== clockctl-check ================================================================================

CHECK = load("clockctl-check")
SAID = CHECK.Said(0, b"", "")


def failed(text, status=111):
    return CHECK.Said(status, b"", text)


def levels(findings):
    """(level, topic)… in short, and all the words."""
    findings = list(findings)
    return " ".join(each.level for each in findings), "\n".join(each.text + "; " + each.todo for each in findings)


def test_one_cause_is_one_failure_and_what_follows_says_so():
    found = [CHECK.fail("services", "down", "svc -u"), CHECK.fail("clockspeed", "does not run", "start it"),
             CHECK.fail("marks", "not known", "look"), CHECK.fail("space", "full", "make room"),
             CHECK.ok("adjust", "is read")]
    shown = list(CHECK.single_causes(found))
    assert [each.level for each in shown] == ["fail", "warn", "warn", "fail", "ok"]
    assert [each.todo for each in shown[1:3]] == ["that follows from services"] * 2
    assert list(CHECK.single_causes(found[1:3]))[1].todo == "that follows from clockspeed"


CONFIG = {"CLOCK_TYPE": "ntp", "CLOCK_IP": "192.0.2.7 192.0.2.8"}
STATUS = {"pid": 7, "doing": "steering", "observe_only": False, "marks": {"used": 9, "doubted": 0, "refused": 1},
          "tick_ns": 10**12, "last_mark": {"tick_ns": 9 * 10**11, "outcome": "used"}, "next": {"settling": False},
          "now": {"problem": None, "offset_sec": 0.003, "deviation_sec": 4e-4, "age_sec": 5, "next_mark_sec": 50}}


def status(**fields):
    """STATUS with other fields, those of `now` included."""
    return dict(STATUS, now=dict(STATUS["now"], **{k: v for k, v in fields.items() if k in STATUS["now"]}),
                **{k: v for k, v in fields.items() if k not in STATUS["now"]})


def disk(blocks, files=9, flags=0):
    return ["/"], lambda path: os.statvfs_result((4096, 4096, 0, 0, blocks, 9, files, files, flags, 255))


def viewed(words, stderr=""):
    return CHECK.Said(0, b"before: x\nafter:  y\nthis clock is %s\n" % words.encode(), stderr)


@pytest.mark.parametrize("probe, arguments, level, words", [
    ("configuration", (CONFIG, True, SAID, SAID), "ok", "ntp servers: 192.0.2.7 192.0.2.8"),
    ("configuration", ({}, True, failed("clockctl: fatal: unable to read c: line 1: no\n"), failed("")), "fail",
     "^unable to read c: line 1: no; correct it"),
    ("configuration", (CONFIG, True, failed("p: fatal: unable to run c: Permission denied"), SAID), "fail",
     "^clocksd can't use it: unable to run c: Permission denied; chmod"),
    ("configuration", (dict(CONFIG, CLOCK_IP="192.0.2.1"), True, SAID, SAID), "fail", "still the example's"),
    ("configuration", (dict(CONFIG, CLOCK_IP=""), True, SAID, SAID), "fail", "not set"),
    ("configuration", (CONFIG, False, SAID, SAID), "fail", "there is no .*clockspeed.conf"),
    ("programs", (HERE, ("clockview", "clockctl")), "ok", "clockview, clockctl in "),
    ("programs", (HERE, ("clockview", "LICENSE", "none")), "fail", "no executable LICENSE or none"),
    ("users", ([("a", "-w", "/x")], {"a"}.__contains__, lambda *need: True), "ok", ""),
    ("users", ([("a", "-w", "/x"), ("b", "-r", "/y")], {"a"}.__contains__, lambda *need: False), "warn fail",
     "no user b;(.|\n)*a can't write /x; chown a /x"),
    ("clockspeed", (STATUS, SAID, True), "ok", "process 7, steering"),
    ("clockspeed", (status(observe_only=True), SAID, True), "warn", "only observes"),
    ("clockspeed", (status(problem="it died"), SAID, False), "fail", "it died; read its log"),
    ("clockspeed", (None, failed("clockctl: fatal: unable to read s: there is none"), False), "fail", "is none; read"),
    ("clockspeed", (None, failed("clockctl: fatal: unable to read s: No module named 'json'"), True), "warn",
     "it runs, but tells nothing: unable to read s: No module named 'json'"),
    ("adjust", ("/adjust", None), "ok", "is read"), ("adjust", ("/adjust", PermissionError()), "warn", "as root"),
    ("adjust", ("/adjust", ImportError("No module named 'termios'")), "warn", "unable to see .*'termios'"),
    ("adjust", ("/adjust", ValueError("no clockspeed reads it")), "fail", "^/adjust: no clockspeed reads it; read"),
    ("marks", (STATUS,), "ok", "^the clock is 3 ms behind, give or take 400 µs, by 10 marks, the next one in 50 s"),
    ("marks", (status(offset_sec=-3599.9),), "fail", "^the clock is 60 min ahead.*clockctl set.*83.3 days"),
    ("marks", (status(offset_sec=-3599.9, next={"settling": True}),), "fail", "60 min ahead"),
    ("marks", (status(next={"settling": True}, next_mark_sec=64),), "ok", "^settling, .*by 10 marks, .*in 64 s"),
    ("marks", (status(offset_sec=None, last_mark=None, next={"settling": True}),), "ok",
     "^settling, none in this boot, the next one in 50 s"),
    ("marks", (status(offset_sec=None, last_mark=None, next_mark_sec=None),), "warn", "none in this boot; read the log"),
    ("marks", (status(next_mark_sec=-601),), "warn", "the next one is late"),
    ("marks", (status(tick_ns=3 * 10**15, next_mark_sec=None),), "warn", "late"),
    ("marks", (status(last_mark={"tick_ns": 9 * 10**11, "outcome": "doubted"}),), "warn", "one was doubted"),
    ("marks", (status(problem="it died"),), "fail", "not known"), ("marks", (None,), "fail", "not known"),
    ("server", (viewed("3.2 ms behind ntp 192.0.2.1, give or take 0.4 ms"),), "ok", "^this clock is 3.2 ms behind"),
    ("server", (viewed("60 min ahead of ntp x, give or take 1 ms"),), "fail", "60 min ahead.*`clockctl set`"),
    ("server", (viewed("1 ms behind ntp x", "sntpclock: warning: 192.0.2.8: a falseticker\n"),), "warn ok",
     "^192.0.2.8: a falseticker; correct CLOCK_IP"),
    ("server", (failed("sntpclock: fatal: this clock is 6 years off; see `clockctl set`"),), "fail",
     "^this clock is 6 years off; see `clockctl set`; $"),
    ("server", (failed("sntpclock: warning: w\nsntpclock: fatal: unable to ask x: no usable answer\nclockctl: fatal: z"),),
     "fail", "^unable to ask x: no usable answer; correct"),
    ("space", disk(10**6), "ok", "3906 MB at /"), ("space", disk(2000), "warn", "only 7 MB"),
    ("space", disk(10**6, files=0), "fail", "full"), ("space", disk(200), "fail", "full"),
    ("space", disk(10**6, flags=os.ST_RDONLY), "fail", "read-only"),
    ("rivals", ([], b"", 0), "ok", ""), ("rivals", ([("ntpd", "7")], b"", 0), "fail", "ntpd sets .* process 7; stop"),
    ("rivals", ([], b"@4000000000000e1a00000000 foreign: x\n", 10000), "fail", "another program steers"),
    ("rivals", ([], b"@4000000000000e1a00000000 foreign: x\n", 20000), "ok", ""),
    ("scale", ("utc", "utc", None), "ok", ""), ("scale", ("tai", "tai", "utc"), "fail", "set CLOCK_SCALE"),
    ("scale", ("tai", "utc", "tai"), "warn", "take a right/ zone"),
    ("counter", ("tsc", None), "ok", "tsc"), ("counter", ("hpet", None), "warn", "slow"),
    ("counter", ("tsc", "CLOCK_MONOTONIC"), "warn", "others steer"), ("counter", ("jiffies", None), "fail", "ms|milli"),
])
def test_a_probe_finds(probe, arguments, level, words):
    found = list(getattr(CHECK, "check_" + probe)(*arguments))
    assert {each.topic for each in found} == {probe}
    assert levels(found)[0] == level and re.search(words, levels(found)[1]), levels(found)


@pytest.mark.parametrize("kept, tool, said, age_sec, level, words", [
    ((), "svstat", "s: up (pid 7) 0 seconds", 500, "ok", "up for 8.33 min"),  # the clock was set back
    ((), "svstat", "s: up (pid 7) 900 seconds", 1, "warn", "just been started"),
    ((), "svstat", "s: down 3 seconds, normally up", None, "fail", "down 3 seconds.*svc -u"),
    (("stat",), "sv", "run: s: (pid 7) 5s; run: log: (pid 8) 5s", 50, "ok", "50 s"),
    (("stat",), "sv", "down: s: 5s; run: log: (pid 8) 5s", 50, "fail", "down"),
    (("death_tally",), "s6-svstat", "up (pid 7 pgid 7) 5 seconds", 50, "ok", "50 s"),
])
def test_a_service_is_up_by_the_age_of_its_process(kept, tool, said, age_sec, level, words, tmp_path):
    for service in ("clockspeed", "clockspeed_adjust"):
        (tmp_path / service / "supervise").mkdir(parents=True)
        for name in kept:
            (tmp_path / service / "supervise" / name).touch()

    def run_tool(command):
        assert command[0] == tool
        return CHECK.Said(0, said.encode(), "")
    found = levels(CHECK.check_services([str(tmp_path)], run_tool, {"7": age_sec}.get))
    assert found[0] == level + " " + level and re.search(words, found[1])
    assert 0 <= CHECK.age_sec(str(os.getpid())) < 10**5 and CHECK.age_sec("0") == 0
    assert levels(CHECK.check_services([str(tmp_path / "none")]))[0] == "warn"


@pytest.mark.parametrize("uid, mode, level", [
    (0, 0o40755, "ok"), (0, 0o41777, "ok"), (0, 0o120777, "ok"), (0, 0o40775, "fail"), (0, 0o100666, "fail"),
    (1234, 0o40755, "fail"), (77, 0o40755, "ok")])
def test_who_can_change_what_root_runs(uid, mode, level):
    def lstat(path):
        odd = path == "/usr/local/etc"
        return os.stat_result((mode if odd else 0o40755, 0, 0, 1, uid if odd else 0, 0, 0, 0, 0, 0))
    found = list(CHECK.check_owners(["/usr/local/etc/clockspeed.conf", "/usr/local/etc/x"], [], lstat, 77))
    assert [each.level for each in found] == [level] and (level == "ok" or "/usr/local/etc" in found[0].text)
    private = levels(CHECK.check_owners([], ["/usr/local/etc"], lstat, 77))
    assert private[0] == ("fail" if mode == 0o100666 else "ok")


def test_whether_marks_get_through_the_fifo(tmp_path):
    path = str(tmp_path / "adjust")
    assert "not there" in str(CHECK.adjust_trouble(path))
    (tmp_path / "adjust").touch()
    assert "not a FIFO" in str(CHECK.adjust_trouble(path))
    os.unlink(path)
    os.mkfifo(path)
    assert "no clockspeed reads it" in str(CHECK.adjust_trouble(path))
    reader = os.open(path, os.O_RDWR)
    assert CHECK.adjust_trouble(path) is None
    os.write(reader, bytes(32))
    assert "32 bytes wait" in str(CHECK.adjust_trouble(path))
    os.close(reader)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another")
def test_root_looks_with_the_eyes_of_another(tmp_path):
    secret = tmp_path / "conf"
    secret.write_text("x")
    secret.chmod(0o600)
    assert CHECK.run(["cat", str(secret)]).stdout == b"x" and not CHECK.may_use("nobody", "-r", str(secret))
    assert "Permission denied" in CHECK.complaint(CHECK.run([str(secret)], "nobody"))
    assert CHECK.may_use("nobody", "-r", str(tmp_path / "none")) and CHECK.may_use("nobody", "-r", "/")
    assert CHECK.run(["id", "-G"], "nobody").stdout.split() == [str(CHECK.find_user("nobody").pw_gid).encode()]


def test_who_sets_the_clock_is_known_by_name(tmp_path):
    for pid, (name, words) in enumerate([("chronyd", "chronyd"), ("chronyd", "chronyd -x"), ("sh", "-x"), ("ntpd", "a")]):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(name + "\n")
        (tmp_path / str(pid) / "cmdline").write_text(words.replace(" ", "\0") + "\0")
    assert sorted(CHECK.find_rivals(str(tmp_path))) == [("chronyd", "0"), ("ntpd", "3")]


def test_check_looks_at_every_topic_once_where_nothing_is_installed(tmp_path):
    (tmp_path / "conf").write_text("CLOCK_IP=127.0.0.9\nCLOCKSPEED_HOME=%s\nCLOCKSPEED_BIN=%s\n" % (tmp_path, HERE))
    done = run("clockctl-check", "--json", CLOCKSPEED_CONF=tmp_path / "conf")
    found = {each["topic"]: each for each in json.loads(done.stdout)["findings"]}
    assert set(found) | {"space", "users"} == {
        "configuration", "programs", "owners", "users", "services", "clockspeed", "adjust", "marks", "server", "space",
        "rivals", "scale", "counter"}
    assert [found[topic]["level"] for topic in ("configuration", "programs", "scale")] == ["ok"] * 3
    assert [found[topic]["level"] for topic in ("adjust", "marks")] == ["warn"] * 2  # clockspeed is their cause


def test_check_counts_and_its_status_is_the_worst(tmp_path):
    (tmp_path / "conf").write_text("CLOCK_IP=(x)\n")
    done = run("clockctl-check", CLOCKSPEED_CONF=tmp_path / "conf")
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 2 and lines[0].startswith("fail  configuration: unable to read %s" % tmp_path)
    assert "line 1" in lines[0] and lines[1:] == ["0 ok, 0 warn, 1 fail"]
    done = run("clockctl-check", "--json", CLOCKSPEED_CONF=tmp_path / "conf")
    assert done.returncode == 2 and json.loads(done.stdout)["findings"][0]["topic"] == "configuration"
    with subprocess.Popen(command_of("clockctl-check"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=dict(UTC_ENV, CLOCKSPEED_CONF=str(tmp_path / "conf"))) as process:
        process.stdout.close()  # as `check | head -0` has it
        assert process.stderr.read() == b"" and process.wait() == -signal.SIGPIPE


# ==== clockctl-graph ================================================================================

GRAPH = load("clockctl-graph")
LABEL = "@400000006b49d20a075bcd15 "  # 2027-01-15 08:00:00.123456789
OLD_MARK = "mark: offset +0.5 s, error 0.25 s, rate -3.5 ppm, rate error 0.5 ppm, used"
NEW_MARK = ("mark: tick 5 ns, real 1800000001000000000 ns, spread 2 ns, distance - ns, offset -0.5 s, error 0.25 s, "
            "bound 0.75 s, rate +3.5 ppm, rate error 0.5 ppm, refused")


def parse_line(line):
    """What the graph makes of a line of the log."""
    marks = [GRAPH.parse_mark(match) for match in GRAPH.MARK_LINE.finditer(line)]
    return marks[0] if marks else None


@pytest.mark.parametrize("line, mark", [
    (LABEL + OLD_MARK, ("used", 1800000000.123456789, 0.5, 0.25, None, -3.5, 0.5)),
    (LABEL + NEW_MARK, ("refused", 1800000001, -0.5, 0.25, 0.75, 3.5, 0.5)),
    (LABEL + NEW_MARK.replace("0.75", "-"), ("refused", 1800000001, -0.5, 0.25, None, 3.5, 0.5)),
    (OLD_MARK, None), (LABEL + OLD_MARK + "?", None), (LABEL + OLD_MARK.replace("0.25", "nan"), None),
    (LABEL + OLD_MARK.replace("0.25", "-"), None), (LABEL + OLD_MARK.replace("0.25", "1e300"), None),
    (LABEL + OLD_MARK.replace("error", "terror"), None), (LABEL + "mark: , used", None),
    (LABEL + "slew: 0.5 s", None), (LABEL + " " + OLD_MARK, None)])
def test_a_mark_is_read_off_the_log(line, mark):
    found = parse_line(line)
    assert found == mark if mark is None else found == pytest.approx(mark)


def write_log(directory, count, offset=lambda number: number * 1e-6, bound="0.000900000"):
    """Marks ten minutes apart, in two of multilog's files."""
    lines = ["@%016x00000000 mark: tick 1 ns, offset %+.9f s, error 0.000050000 s, bound %s s, rate +12.%04d ppm, "
             "rate error 0.0100 ppm, used\n" % (2**62 + 10 + 1800000000 + 600 * number, offset(number), bound, number)
             for number in range(count)]
    directory.mkdir(exist_ok=True)
    (directory / ("@" + "4" * 24 + ".s")).write_text("".join(lines[:count // 2]) + LABEL + "moved: x\nrubbish\n\xff")
    (directory / "current").write_text("".join(lines[count // 2:]))
    return str(directory)


def test_a_log_is_read_whole_and_nothing_else_is(tmp_path):
    log = write_log(tmp_path / "log", 9)
    assert [round(mark.offset_sec * 1e6) for mark in GRAPH.read_marks(log)] == list(range(9))
    os.rename(log + "/current", log + "/kept")
    for plant in (lambda path: os.symlink(log + "/kept", path), os.mkfifo):
        plant(log + "/current")
        done = run("clockctl-graph", CLOCKSPEED_CONF=conf_of(tmp_path, log))
        assert done.returncode == 111 and "unable to read the log in " + log in done.stderr
        os.unlink(log + "/current")


def conf_of(tmp_path, log):
    (tmp_path / "conf").write_text("CLOCKSPEED_LOG=%s\n" % log)
    return str(tmp_path / "conf")


def test_fewer_than_three_marks_are_said_to_be_so_few(tmp_path):
    done = run("clockctl-graph", CLOCKSPEED_CONF=conf_of(tmp_path, write_log(tmp_path / "log", 2)))
    assert (done.returncode, done.stdout) == (111, b"")
    assert "unable to draw the offset: marks to draw so far: 2; a graph needs 3" in done.stderr


def test_standard_deviation_and_bound_are_two_things(tmp_path):
    conf = conf_of(tmp_path, write_log(tmp_path / "log", 200, lambda number: 1e-4 * (number % 20) - 1e-3))
    shown = run("clockctl-graph", "--ascii", CLOCKSPEED_CONF=conf).stdout.decode("ascii").splitlines()
    assert shown[0] == "offset, real time minus system clock; marks: 200 used"
    assert shown[1] == "* offset +900 us,  . standard deviation 50 us,  = bound 900 us"
    assert re.fullmatch(r" +01-15 08:00 +01-15 19:\d\d +01-16 06:\d\d +01-16 17:10", shown[-1])
    picture = "".join(shown[2:-2])
    assert all(glyph in picture for glyph in "*.=") and "+1 ms +" in picture
    assert any("\u2801" <= char <= "\u28ff" for char in run(
        "clockctl-graph", "error", CLOCKSPEED_CONF=conf, LC_ALL="C.UTF-8").stdout.decode())
    assert run("clockctl-graph", "rate", "--svg", tmp_path / "x.svg", CLOCKSPEED_CONF=conf).returncode == 0
    assert run("clockctl-graph", "--svg", tmp_path / "x.svg", CLOCKSPEED_CONF=conf).returncode == 0
    curves = [each.get("class") for each in xml.etree.ElementTree.parse(tmp_path / "x.svg").iter()
              if each.tag.endswith("polyline") and each.get("points").count(",") == 200]
    assert sorted(curves) == ["bound", "bound", "deviation", "deviation", "value"]
    os.rename(tmp_path / "x.svg", tmp_path / "y.svg")
    os.symlink(tmp_path / "y.svg", tmp_path / "x.svg")
    assert "a symbolic link" in run("clockctl-graph", "--svg", tmp_path / "x.svg", CLOCKSPEED_CONF=conf).stderr
    table = run("clockctl-graph", "--csv", CLOCKSPEED_CONF=conf).stdout.decode().splitlines()
    assert len(table) == 201 and table[1] == (
        "2027-01-15T08:00:00Z,used,-0.001000000,0.000050000,0.000900000,12.000000000,0.010000000")


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 3), (0.3, 0.6), (1.2345, 1.23451), (-7e-9, 1e-9), (0, 1e12), (5, 65)])
def test_ticks_are_round_some_and_differ(low, high):
    ticks = GRAPH.round_ticks(low, high)
    assert 3 <= len(ticks) <= 8 and all(low - 1e-12 <= tick <= high * (1 + 1e-12) for tick in ticks)
    marks = [GRAPH.Mark("used", at_sec, value, 1e-12, None, 0, 0) for at_sec, value in enumerate((low, high, low))]
    words = [words for _, words in GRAPH.make_chart("offset", marks).ticks]
    assert len(set(words)) == len(words) >= 2, words


def test_one_value_far_out_does_not_flatten_the_rest():
    low, high = GRAPH.value_range([3600.0] + [number * 1e-6 for number in range(50)])
    assert -1e-5 < low <= 0 and 49e-6 <= high < 1e-4
    marks = [GRAPH.Mark("used", number, 3600 if number == 0 else 1e-6 * number, 1e-6, None, 0, 0) for number in range(50)]
    assert GRAPH.make_chart("offset", marks).title.endswith("marks: 50 used, 1 beyond the edge")


def test_a_curve_has_no_gaps():
    rng = random.Random(SEED)
    points = sorted((rng.random(), rng.random()) for _ in range(60))
    rows = {}
    for column, top, bottom in GRAPH.strokes(points, 200, 50):
        low, high = rows.get(column, (top, bottom))
        rows[column] = min(low, top), max(high, bottom)
    columns = sorted(rows)
    assert columns == list(range(columns[0], columns[-1] + 1))
    for left, right in zip(columns, columns[1:]):
        assert rows[right][0] <= rows[left][1] + 1 and rows[left][0] <= rows[right][1] + 1
    assert not list(GRAPH.strokes([(0, -2), (1, -1)], 9, 9)) and not list(GRAPH.strokes([(0, 2), (1, 3)], 9, 9))
    assert all(0 <= top <= bottom <= 8 for _, top, bottom in GRAPH.strokes([(0, -2), (0.5, 3), (1, -2)], 9, 9))


@pytest.mark.parametrize("words", (["offsets"], ["offset", "rate"], ["--csv", "--ascii"], ["--svg"]))
def test_graph_words_that_make_no_sense_are_usage(words):
    assert run("clockctl-graph", *words).returncode == 100


# ==== the services ==================================================================================

# ==== svc/install ===================================================================================

# ==== the README ====================================================================================

# ==== every decoder =================================================================================
# One row for each function that reads what others wrote: name, function of bytes, good inputs, what it may
# raise.

def text_of(data):
    return data.decode("ascii", "replace")


DECODERS = [
    ("a mark in the log", lambda data: parse_line(text_of(data)),
     [(LABEL + mark + "\n").encode() for mark in (OLD_MARK, NEW_MARK)], ()),
    ("what check reads of clockctl", lambda data: (CHECK.parse_environment(CHECK.Said(0, data, "")),
                                                   levels(CHECK.check_server(CHECK.Said(0, data, text_of(data)))),
                                                   levels(CHECK.check_rivals([], data, 0))),
     [b"CLOCK_IP=192.0.2.1\nCLOCK_TYPE=ntp\n", b"this clock is 3 ms behind\n", b"x: warning: y: fatal: z"], ()),
]


def mutated(rng, data):
    """The data with some of its bytes changed, doubled, left out or made up."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(at + rng.choice((1, 1, 4, 40)), len(data))
        data[at:end] = rng.choice((b"", data[at:end] * 2, random_bytes(rng, end - at), bytes(end - at), b"\xff",
                                   b"-9" * 20, bytes(data[:at])))
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
