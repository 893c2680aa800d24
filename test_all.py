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
import getpass
import importlib.machinery
import importlib.util
import io
import random
import re
import signal
import socket
import ssl
import stat
import struct
import threading
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

SNTP, TAI = load("sntpclock"), load("taiclock")
SECOND_NS = 10**9
NEAR_NS = 50 * 10**6  # what a busy machine may take from an exchange
LINUX_ONLY = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kernel stamps and filters are Linux's")


class Rogue:
    """A server in a thread: answer(query, n) -> the datagrams to send back for the nth query that it gets."""

    def __init__(self, answer, address="127.0.0.1", port=0):
        self.answer, self.queries = answer, []
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, port))
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def serve(self):
        while True:
            query, self.client = self.socket.recvfrom(2048)
            if not query:
                return
            self.queries.append(query)
            for packet in self.answer(query, len(self.queries)):
                with contextlib.suppress(OSError):  # it asks no more
                    self.socket.sendto(packet, self.client)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        with socket.socket(self.socket.family, socket.SOCK_DGRAM) as stop:
            stop.sendto(b"", self.socket.getsockname())
        self.thread.join(PATIENCE_SEC)
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


def tai_answer(query, off_ns=0):
    """The same for TAICLOCK."""
    return b"stai" + TAI.pack(time.time_ns() + off_ns + (2**62 + 37) * 10**9) + query[20:]


both = pytest.mark.parametrize("name, answer", [("sntpclock", ntp_answer), ("taiclock", tai_answer)],
                               ids=["sntpclock", "taiclock"])
DECODE = {"sntpclock": lambda _, query, packet: SNTP.decode_answer(packet) if SNTP.answers(query, packet) else None,
          "taiclock": lambda _, query, packet: TAI.decode_answer(query, packet, 37 * 10**9)}
QUERY = {"sntpclock": lambda server: SNTP.make_query(), "taiclock": TAI.make_query}


def ask(name, port, *args, hosts=("127.0.0.1",), **env):
    return run(name, "-p", port, *args, *hosts, **env)


def offset_of(done):
    """What came out, in ns."""
    assert done.returncode == 0, done.stderr
    return SNTP.unpack(done.stdout)[0]


def result_of(done):
    """-> (offset, spread, root distance) in ns as `-v 2` shows them, which is what came out."""
    shown = re.search(r"info: result: offset (\S+) s, spread (\S+) s, root distance (\S+) s\n", done.stderr).groups()
    value_ns, spread_ns, distance_ns = (round(float(text) * 1e9) for text in shown)
    ns, last = SNTP.unpack(done.stdout)
    assert abs(ns - value_ns) <= 1 and last == SNTP.pack_quality(spread_ns, distance_ns)
    return value_ns, spread_ns, distance_ns


def free_port(address="127.0.0.1"):
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((address, 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("scale, missing_sec", [("utc", 0), ("tai", 27)])
@both
def test_the_result_is_the_servers_offset(name, answer, scale, missing_sec):
    """On the tai scale this clock, which shows UTC, is 27 s slow."""
    for off_ns in 0, 123456789, -3 * 3600 * SECOND_NS - 5:
        with Rogue(lambda query, n: [answer(query, off_ns)]) as server:
            value_ns, spread_ns, _ = result_of(ask(name, server.port, "-v", 2, CLOCK_SCALE=scale))
        assert abs(value_ns - off_ns - missing_sec * SECOND_NS) <= spread_ns < NEAR_NS
        assert len(server.queries) == len(set(server.queries)) == 10, "a cookie came twice"


def test_the_scale_is_the_environments_or_the_zones(monkeypatch):
    for scale, zone, offset_sec in (("utc", "UTC", 37), ("tai", "UTC", 10), ("", "UTC", 37)):
        monkeypatch.setenv("CLOCK_SCALE", scale)
        assert TAI.scale_offset_sec() == offset_sec
    monkeypatch.setattr(TAI.time, "localtime", lambda sec: time.struct_time((1972, 6, 30, 23, 59, 60, 4, 182, 0)))
    assert TAI.scale_offset_sec() == 10
    done = ask("taiclock", 1, CLOCK_SCALE="gps")
    assert done.returncode == 111 and "tell this clock's scale: CLOCK_SCALE is neither utc nor tai" in done.stderr


@pytest.mark.parametrize("spread_ns, distance_ns, last", [
    (20123000, 250000, 720133400), (1, 0, 10000000), (999, 0, 299900000), (10**9, 0, 910000000), (0, 0, 0),
    (10001, 0, 410010000), (9999001, 0, 710000000), (9999 * 10**6, 0, 999990000), (9999 * 10**6 + 1, 0, 0),
    (1000, 1, 310000100), (1000, 1179, 310000100), (1000, 1180, 310000200), (1000, 1500 * 10**6, 310008700),
    (1000, 11787686348, 310009900), (1000, 11787686349, 0)])
def test_what_a_mark_tells_of_itself_is_rounded_up(spread_ns, distance_ns, last):
    packed = SNTP.pack_quality(spread_ns, distance_ns)
    assert packed // 100 == last // 100 and packed % 97 == (1 if last else 0)
    if packed:
        told = VIEW.unpack_quality(packed)
        assert spread_ns <= told[0] <= spread_ns * 1.001 + 1 and distance_ns <= told[1] <= max(distance_ns * 1.18, 1180)


@both
def test_exchanges_pause_and_addresses(name, answer):
    with Rogue(lambda query, n: [answer(query, SECOND_NS)]) as server:
        began = time.monotonic()
        ask(name, server.port, "-r", 3, "-h", 200, hosts=["0"])
        assert time.monotonic() - began >= 0.4 and len(server.queries) == 3
        for args, host in (["-4"], "localhost"), (["-46"], "0"):
            assert abs(offset_of(ask(name, server.port, *args, hosts=[host])) - SECOND_NS) < NEAR_NS
    with Rogue(lambda query, n: [answer(query, SECOND_NS)], "::1") as server:
        for args, host in ([], "::1"), (["-6"], "::1%1"):
            assert abs(offset_of(ask(name, server.port, *args, hosts=[host])) - SECOND_NS) < NEAR_NS


@both
def test_what_fails_often_is_one_line_with_a_count(name, answer):
    port = free_port()
    done = ask(name, port, "-r", 4, hosts=["127.0.0.1", "127.0.0.2"])
    line = "{0}: warning: unable to ask 127.0.0.%d: Connection refused (4 times)\n"
    assert (done.returncode, done.stdout, done.stderr) == (111, b"", (line % 1 + line % 2 +
            "{0}: fatal: unable to get the time from 127.0.0.1, 127.0.0.2: no usable answer\n").format(name))
    assert ask(name, port, "-v", 0, "-r", 1).stderr.count("\n") == 1
    with Rogue(lambda query, n: [answer(query)] if n != 2 else []) as server:
        done = ask(name, server.port, "-r", 3, "-t", 200)
    assert abs(offset_of(done)) < NEAR_NS
    assert done.stderr == "%s: warning: unable to ask 127.0.0.1: timed out\n" % name
    done = ask(name, 1, hosts=["no-such-host.invalid", "nor-this.invalid"])
    assert (done.returncode, done.stderr.count("\n")) == (111, 1)
    assert done.stderr.startswith("%s: fatal: unable to find no-such-host.invalid, nor-this.invalid: " % name)


@both
def test_silent_servers_cost_their_timeouts_and_no_more_than_the_total(name, answer):
    with Rogue(lambda query, n: []) as silent:
        for args, least_sec, queries in (("-r3", "-t100"), 0.3, 3), (("-r9", "-t300", "-T700"), 0.6, 3):
            del silent.queries[:]
            began = time.monotonic()
            done = ask(name, silent.port, *args)
            assert least_sec <= time.monotonic() - began < least_sec + 3 and len(silent.queries) == queries
            assert done.stdout == b"" and "timed out (3 times)" in done.stderr
        del silent.queries[:]
        with Rogue(lambda query, n: [answer(query)], "127.0.0.2", silent.port):
            done = ask(name, silent.port, "-t", 500, hosts=["127.0.0.1", "127.0.0.2"])
            assert abs(offset_of(done)) < NEAR_NS
            assert len(silent.queries) == 1, "it is silent, and another has told all: one timeout is enough"


@both
def test_the_total_bounds_names_and_pauses_too(name, answer):
    """getaddrinfo() can't be interrupted, so that a thread waits for it."""
    program = ("import importlib.machinery as m, socket, sys, time\n"
               "module = m.SourceFileLoader('client', %r).load_module()\n"
               "def slow(host, *args, find=socket.getaddrinfo):\n"
               "    return time.sleep(60) if host == b'slow' else find(host, *args)\n"
               "module.socket.getaddrinfo = slow\n"
               "sys.exit(module.main(sys.argv))") % path_of(name)

    def asked(*args):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program] + list(args), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=LIMIT_SEC, env=UTC_ENV)
        assert time.monotonic() - began < 10
        return done.returncode, len(done.stdout), done.stderr.decode()
    assert asked("-T500", "slow") == (111, 0, "%s: fatal: unable to find slow: timed out\n" % name)
    with Rogue(lambda query, n: [answer(query)]) as server:
        assert asked("-p%d" % server.port, "-T3000", "slow", "127.0.0.1") == (
            0, 16, "%s: warning: unable to ask slow: timed out\n" % name)
        del server.queries[:]
        assert asked("-p%d" % server.port, "-T1000", "-h300", "0") == (0, 16, "")
        assert 2 <= len(server.queries) <= 4


@both
def test_wrong_usage(name, answer):
    for line in ("", "-r 0 0", "-r x 0", "-r", "-p 65536 0", "-p 0 0", "-e nan 0", "-e -1 0", "-t inf 0", "-T -1 0",
                 "-l -1 0", "-h -1 0", "-v -1 0", "-x 0", "--force 0", "-h 5"):
        done = run(name, *line.split())
        assert done.returncode == 100 and done.stderr.startswith("%s: usage: %s [" % (name, name)), line
    module = load(name)
    for words in "-46fr7 a b", "-r7 -f -4 -6 -- a b", "-f -r 7 a b":
        settings = module.Settings(words.split(), 123)
        assert (settings.exchanges, settings.force, settings.hosts) == (7, True, ["a", "b"]), words
        assert settings.family == (socket.AF_INET if words.startswith("-f4") else socket.AF_UNSPEC)
    settings = module.Settings("-e 0.25 -t 1 -T 2 -h 0 -l 0.5 a".split(), 9)
    assert (settings.most_spread_ns, settings.wait_ns, settings.total_ns, settings.pause_ns, settings.limit_ns,
            settings.port) == (250000, 10**6, 2 * 10**6, 0, 43200 * 10**9, 9)


@pytest.mark.parametrize("days, said", [(2.1, "2.1 days behind"), (-2.1, "2.1 days ahead"), (2192, "6.0 years behind"),
                                        (999.9, "999.9 days behind")])
@both
def test_a_clock_far_away_is_told_so_and_how_to_set_it(name, answer, days, said):
    off_ns = round(days * 86400) * SECOND_NS
    with Rogue(lambda query, n: [answer(query, off_ns)]) as server:
        done = ask(name, server.port)
        assert (done.returncode, done.stdout) == (111, b"")
        assert done.stderr.endswith(": this clock is %s; `clockctl set` sets it\n" % said)
        for args in ["-f"], ["-l", abs(days) + 0.1], ["-l", 0]:
            assert abs(offset_of(ask(name, server.port, *args)) - off_ns) < NEAR_NS


@both
def test_e_limits_the_spread_and_f_overrides(name, answer):
    def slow(query, n):
        time.sleep(0.02)
        return [answer(query)]
    with Rogue(slow) as server:
        done = ask(name, server.port, "-r", 2, "-e", 5)
        assert (done.returncode, done.stdout) == (111, b"")
        assert re.search(r": time uncertainty too large, 0\.0\d+ s\n$", done.stderr)
        for args in ["-e", 5, "-f"], ["-e", 500]:
            assert abs(offset_of(ask(name, server.port, "-r", 2, *args))) < NEAR_NS


@both
def test_answers_that_are_late_doubled_forged_or_from_elsewhere_do_not_count(name, answer):
    lie_ns, kept = 3600 * SECOND_NS, []
    elsewhere = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def late(query, n):  # each query is answered, with a lie, only after the next one has come
        kept.append(query)
        return [answer(kept[-2], lie_ns)] if n > 1 else []

    def forged(query, n):  # 2000 are more than a socket's queue holds
        elsewhere.sendto(answer(query, lie_ns), server.client)
        lies = [answer(os.urandom(len(query)), lie_ns), query, b"", b"x", answer(query)[:31]]
        return [lies[n % 5] for n in range(2000 if sys.platform.startswith("linux") else 5)] + [
            answer(query), answer(query, lie_ns)]
    with Rogue(late) as server:
        done = ask(name, server.port, "-r", 3, "-t", 100)
        assert done.returncode == 111 and "timed out (3 times)" in done.stderr
    with Rogue(forged) as server, elsewhere:
        done = ask(name, server.port)
        assert abs(offset_of(done)) < 2 * NEAR_NS and done.stderr == "" and len(server.queries) == 10


@LINUX_ONLY
@both
def test_the_kernel_drops_what_does_not_repeat_the_cookie(name, answer):
    module = load(name)
    for family, address in (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"):
        with socket.socket(family, socket.SOCK_DGRAM) as server, socket.socket(family, socket.SOCK_DGRAM) as client:
            server.bind((address, 0))
            client.connect(server.getsockname())
            client.setblocking(False)
            at, _, size = module.ECHO
            for _ in range(2):
                query = QUERY[name](None)
                module.admit_only_answers(client, query)
                client.send(query)
                right, (_, asker) = answer(query), server.recvfrom(2048)
                wrong = [right[:at + size - 1], b"", bytes(400)] + [
                    right[:place] + bytes([right[place] ^ 1 << place % 8]) + right[place + 1:]
                    for place in range(at, at + size)]
                for packet in wrong + [right, right + bytes(100)]:
                    server.sendto(packet, asker)
                assert [client.recv(2048) for _ in range(2)] == [right, right + bytes(100)]
                with pytest.raises(BlockingIOError):
                    client.recv(2048)


@both
def test_several_servers_are_asked_at_once_and_falsetickers_are_named(name, answer):
    def serve(off_ns):
        def late(query, n):
            time.sleep(0.1)
            return [answer(query, off_ns)]
        return late
    one, two, three = hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    with Rogue(serve(0)) as server, Rogue(serve(SECOND_NS), two, server.port), Rogue(serve(0), three, server.port):
        began = time.monotonic()
        done = ask(name, server.port, "-r", 5, hosts=hosts)
        assert time.monotonic() - began < 1.4, "three servers of 0.5 s each, one after the other"
        assert abs(offset_of(done)) < 4 * NEAR_NS
        assert re.fullmatch("%s: warning: 127.0.0.2 is a falseticker: offset .1[.]0.*\n" % name, done.stderr)
        for hosts in [one, two], [two, one, "0", "localhost"]:  # one asked under three names has one vote
            done = ask(name, server.port, "-r", 1, "-4", hosts=hosts)
            assert (done.returncode, done.stdout) == (111, b"")
            assert done.stderr.endswith(": no majority of the servers agrees\n")
        done = ask(name, server.port, "-r", 1, hosts=[one, "127.0.0.4"])
        assert abs(offset_of(done)) < 4 * NEAR_NS and "127.0.0.4" in done.stderr, "who is dead has no vote"


@both
def test_s_keeps_what_each_server_said(name, answer, tmp_path):
    kind, about = {"sntpclock": ("ntp", "1 54455354"), "taiclock": ("tai", "- -")}[name]
    (tmp_path / "elsewhere").write_text("before")
    for planted in "sources", "sources.tmp":
        (tmp_path / planted).symlink_to("elsewhere")
    with Rogue(lambda query, n: [answer(query)]) as server, Rogue(
            lambda query, n: [answer(query, -SECOND_NS)], "127.0.0.2", server.port), Rogue(
            lambda query, n: [answer(query)], "127.0.0.3", server.port):
        hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4", "a.invalid"]
        ask(name, server.port, "-s", tmp_path, hosts=hosts)
        lines = (tmp_path / "sources").read_text().splitlines()
        assert ask(name, server.port, "-s", tmp_path / "none").stderr == (
            "%s: warning: unable to write %s/none/sources: No such file or directory\n" % (name, tmp_path))
    times = [line.split()[0] for line in lines]
    assert len(set(times)) == 1 and abs(int(times[0]) - time.time()) < LIMIT_SEC
    right = r" %s 127.0.0.%s (-?\d+) (\d+) (\d+) 0 %s %s"
    for line, host, off_ns, verdict in ((lines[0], 1, 0, "agreed"), (lines[1], 2, -SECOND_NS, "falseticker"),
                                        (lines[2], 3, 0, "agreed")):
        value_ns, spread_ns, delay_ns = map(int, re.fullmatch(right % (kind, host, about, verdict),
                                                              line[len(times[0]):]).groups())
        assert abs(value_ns - off_ns) <= spread_ns <= delay_ns < 2 * NEAR_NS
    assert lines[3] == "%s %s 127.0.0.4 - - - - - - failed: Connection refused" % (times[0], kind)
    assert lines[4].startswith("%s %s a.invalid - - - - - - failed: " % (times[0], kind))
    assert (tmp_path / "elsewhere").read_text() == "before" and sorted(os.listdir(str(tmp_path))) == [
        "elsewhere", "sources"]
    assert stat.S_IMODE(os.lstat(str(tmp_path / "sources")).st_mode) == 0o644


@both
def test_signals_end_it_at_once_and_a_terminal_gets_no_raw_bytes(name, answer):
    for number in signal.SIGINT, signal.SIGTERM:
        with Rogue(lambda query, n: []) as server, process(
                command_of(name, "-p", server.port, "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
            until(lambda: server.queries)
            client.send_signal(number)
            assert client.communicate(timeout=PATIENCE_SEC) == (b"", b"") and client.returncode == -number
    ours, theirs = os.openpty()
    done = subprocess.run(command_of(name, "0"), stdout=theirs, stderr=subprocess.PIPE, timeout=PATIENCE_SEC)
    assert done.returncode == 100
    assert done.stderr.decode().startswith("%s: usage: the result is 16 raw bytes: %s [" % (name, name))
    assert done.stderr.endswith(b" host... | clockview\n")
    os.close(ours)
    os.close(theirs)


def test_the_range_of_a_server_and_of_all():
    assert SNTP.server_range([(0, 10), (5, 20), (-5, 8)]) == (5, 8)
    assert SNTP.server_range([(0, 10), (10, 20)]) == (10, 10)
    # Empty intersections: the exchanges of up to twice the least delay (10), and all that they allow.
    assert SNTP.server_range([(0, 10), (20, 40), (1000, 1021)]) == (0, 40)
    assert SNTP.server_range([(0, 10), (7, 3)]) == (0, 10)  # it took the server longer than the exchange
    with pytest.raises(ValueError, match="longer than we waited"):
        SNTP.server_range([(7, 3)])
    for ranges, wanted in (([(0, 10)], ((0, 10), 1)), ([(0, 10), (5, 20), (50, 60)], ((5, 10), 2)),
                           ([(0, 10), (20, 30)], ((0, 30), 1)), ([(0, 30), (5, 10), (20, 25)], ((5, 25), 2)),
                           ([(0, 10), (10, 20)], ((10, 10), 2))):
        assert SNTP.vote([SNTP.Range(*pair) for pair in ranges]) == wanted


def test_what_real_time_can_have_gained_on_the_clock():
    then = SNTP.Reading(10**18, 5)
    for clock_ns, tick_ns, wanted in (
            (10**9, 10**9, (0, 0)), (10**9, 10**9 + 300, (0, 300)), (10**9, 10**9 - 300, (-300, 0)),
            (10**9, 10**9 + 251000, (0, 251000)), (10**9 + 251000, 10**9, (-251000, 0)),
            (10**9 + 251001, 10**9, (-752001, 249999)), (0, 10**9, (999499000, 1000501000))):
        now = SNTP.Reading(then.clock_ns + clock_ns, then.tick_ns + tick_ns)
        assert SNTP.gained(then, now) == wanted


@pytest.mark.parametrize("ppm", [500, -500, 5000, -80000, 0])
def test_a_slew_during_the_measurement_is_allowed_for(ppm):
    """Four exchanges of 20 ms, 2 s apart, while the clock is slewed: the range holds at the end."""
    rng = random.Random(SEED)
    for _ in range(50):
        offset_ns, counter_ppm, ranges = rng.randrange(-10**9, 10**9), rng.uniform(-50, 50), []

        def read(real_ns):
            return SNTP.Reading(10**18 + real_ns - offset_ns + real_ns * ppm // 10**6,
                                real_ns + round(real_ns * counter_ppm / 10**6))
        end = read(6100 * 10**6)
        for start_ns in range(0, 8 * 10**9, 2 * 10**9):
            there_ns = 10**18 + start_ns + rng.randrange(20 * 10**6)
            answer = SNTP.Answer(there_ns, there_ns, 0, 1, "-")
            ranges.append(SNTP.sample_range(answer, (read(start_ns), read(start_ns + 20 * 10**6)), end))
        least_ns, most_ns = SNTP.server_range(ranges)
        assert least_ns <= 10**18 + 6100 * 10**6 - end.clock_ns <= most_ns < least_ns + 21 * 10**6


def samples_of(name, answer, monkeypatch, clocks=None, exchanges=4):
    """Exchanges of this process with a server -> (the Server, the Reading at the end)."""
    module = load(name)
    if clocks:  # the kernel's stamps would be of the real clock
        monkeypatch.setattr(module, "enable_kernel_stamps", lambda sock: None)
    with Rogue(answer) as rogue:
        settings = module.Settings(["-r%d" % exchanges, "-t100", "0"], rogue.port)
        servers = module.find_servers(settings.hosts, settings.port, settings)
        end = module.ask(servers, settings, QUERY[name], DECODE[name], clocks or module.read_clocks)
    module.weigh(servers[0], settings, end)
    return servers[0], end


@both
def test_a_step_during_the_measurement_is_allowed_for(name, answer, monkeypatch):
    """Somebody sets the clock back by a second after the second exchange."""
    queries = []

    def clocks():
        clock_ns, tick_ns = SNTP.read_clocks()
        return SNTP.Reading(clock_ns - SECOND_NS * (len(queries) > 2), tick_ns)
    server, _ = samples_of(name, lambda query, n: queries.append(n) or [answer(query)], monkeypatch, clocks)
    assert len(server.samples) == 4 and server.range.least_ns <= SECOND_NS <= server.range.most_ns


@LINUX_ONLY
@both
def test_kernel_stamps_are_paired_with_their_exchange(name, answer, monkeypatch):
    server, _ = samples_of(name, lambda query, n: [answer(query)] * 2 if n != 3 else [], monkeypatch, exchanges=6)
    assert len(server.samples) == 5 and server.failures == {"timed out": 1}
    for _, own, kernel in server.samples:
        assert own[0].clock_ns < kernel[0].clock_ns < kernel[1].clock_ns < own[1].clock_ns
        assert own[0].tick_ns < kernel[0].tick_ns < kernel[1].tick_ns < own[1].tick_ns
    least_ns = min(t1.clock_ns - t0.clock_ns for _, _, (t0, t1) in server.samples)
    assert server.delay_ns() in range(least_ns, least_ns + 70)


@LINUX_ONLY
def test_only_the_stamp_of_this_query_counts():
    class ErrorQueue:
        waiting = [(b"query", 7), (b"other", 5)]

        def recvmsg(self, size, ancillary_size, flags):
            if flags != socket.MSG_ERRQUEUE or not self.waiting:
                raise BlockingIOError
            query, nano = self.waiting.pop()
            stamp = SNTP.TIMESPEC.pack(1, nano) + bytes(2 * SNTP.TIMESPEC.size)
            others = [(socket.IPPROTO_IP, 37, b"?" * 48), (socket.SOL_SOCKET, 11, b"?" * 48)]
            return b"headers" + query, others + [(socket.SOL_SOCKET, 37, stamp)], 0, None
    queue = ErrorQueue()
    assert SNTP.sent_stamp(queue, b"query") == 10**9 + 7 and SNTP.sent_stamp(queue, b"query") is None
    zero = (socket.SOL_SOCKET, 37, bytes(48))
    assert SNTP.kernel_stamp([zero]) is None and SNTP.kernel_stamp([]) is None
    assert SNTP.kernel_stamp([(socket.SOL_SOCKET, 35, SNTP.TIMESPEC.pack(2, 3))]) == 2 * 10**9 + 3


def test_a_kernel_stamp_counts_only_between_our_own():
    own = SNTP.Reading(1000, 50), SNTP.Reading(3000, 2050)
    for stamps, wanted in (((None, None), own), ((999, 3001), own), ((1000, 3000), own),
                           ((1500, 2500), ((1500, 550), (2500, 1550))), ((2500, None), ((2500, 1550), own[1]))):
        assert SNTP.kernel_readings(own, *stamps) == wanted


@pytest.mark.parametrize("near, addresses", [
    (True, "10.1.2.3 127.9.9.9 169.254.1.1 172.16.0.1 172.31.255.255 192.168.7.7 ::1 fc00::1 fdff::1 fe80::1%lo"),
    (False, "9.9.9.9 172.15.0.1 172.32.0.1 192.167.0.1 169.253.0.1 128.0.0.1 11.0.0.1 2600::1 fec0::1 ::ffff:9.9.9.9")])
def test_public_addresses_are_spared(near, addresses, monkeypatch):
    sent, paused = [], []

    def exchange(*args):
        sent.append(args)
        raise ValueError("no")
    monkeypatch.setattr(SNTP, "exchange", exchange)
    monkeypatch.setattr(SNTP.socket.socket, "connect", lambda sock, address: None)
    monkeypatch.setattr(SNTP.time, "sleep", paused.append)
    for address in addresses.split():
        assert SNTP.is_near(address) is near
    server = SNTP.Server("a", socket.AF_INET, (address, 1))
    SNTP.ask([server], SNTP.Settings(["a"], 1), QUERY["sntpclock"], None)
    assert (len(sent), paused) == ((10, 9 * [0]) if near else (4, 3 * [2]))


@both
def test_a_name_with_many_addresses_is_as_many_servers_up_to_four(name, answer, monkeypatch):
    module = load(name)
    found = [(socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("2001:db8::%d" % n, 123, 0, 0)) for n in (1, 2)] \
        + [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("192.0.2.%d" % n, 123)) for n in range(1, 5)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: list(found))
    settings = module.Settings(["pool.example", "again.example"], 123)
    assert [server.name for server in module.find_servers(settings.hosts, 123, settings)] == [
        "pool.example/" + address for address in ("2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2")]


@pytest.mark.parametrize("to_sec, back_sec", [(0.05, 0), (0, 0.05), (0.02, 0.08)])
@both
def test_a_delayer_moves_the_result_by_no_more_than_the_spread(name, answer, to_sec, back_sec):
    """Somebody on the path holds up each packet, for half of those times to the whole."""
    rng = random.Random(SEED)

    def late(query, n):
        time.sleep(to_sec * rng.uniform(0.5, 1))
        packet = answer(query)
        time.sleep(back_sec * rng.uniform(0.5, 1))
        return [packet]
    with Rogue(late) as server:
        value_ns, spread_ns, _ = result_of(ask(name, server.port, "-v", 2, "-r", 5))
    assert abs(value_ns) <= spread_ns and 0.2e9 * (to_sec + back_sec) < spread_ns < 1.05e9 * (to_sec + back_sec)



# ==== sntpclock =====================================================================================

class Chronyd:
    """A real one on a free port, which can't touch the clock."""

    def __init__(self, home, *lines):
        need("chronyd")
        self.home, self.port, self.lines = home, free_port(), lines or ("local stratum 1",)

    def __enter__(self):
        conf = self.home / "chrony.conf"
        conf.write_text("port %d\ncmdport 0\nbindcmdaddress /\nuser %s\nallow\npidfile %s\n%s\n" % (
            self.port, getpass.getuser(), self.home / "chronyd.pid", "\n".join(self.lines)))
        self.process = subprocess.Popen(without_the_right(["chronyd", "-x", "-d", "-f", str(conf)]),
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.settimeout(0.1)
            probe.connect(("127.0.0.1", self.port))

            def answered():
                assert self.process.poll() is None, self.process.stdout.read().decode()
                with contextlib.suppress(OSError):
                    probe.send(SNTP.make_query())
                    return probe.recv(100)
            try:
                until(answered)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def test_a_real_chronyd_and_one_that_is_not_synchronised(tmp_path):
    with Chronyd(tmp_path) as server:
        for hosts in ["127.0.0.1"], ["::1"], ["127.0.0.1", "::1"]:
            done = ask("sntpclock", server.port, "-v", 2, hosts=hosts)
            value_ns, spread_ns, distance_ns = result_of(done)
            assert abs(value_ns) <= spread_ns < 10**6 and distance_ns == 0
            assert "root distance 0.000000000 s, stratum 1, reference 7f7f0101\n" in done.stderr
    with Chronyd(tmp_path, "maxupdateskew 1") as server:
        done = ask("sntpclock", server.port)
        assert (done.returncode, done.stdout) == (111, b"") and done.stderr == (
            "sntpclock: warning: unable to ask 127.0.0.1: the server is not synchronised (10 times)\n"
            "sntpclock: fatal: unable to get the time from 127.0.0.1: no usable answer\n")


def test_every_answer_of_a_coarse_chronyd_counts(tmp_path):
    """It randomises what is below a millisecond, so that it seems to send before it receives half of the time."""
    with Chronyd(tmp_path, "local stratum 1", "clockprecision 1e-3") as server:
        done = ask("sntpclock", server.port, "-r", 20, "-v", 2)
    value_ns, spread_ns, _ = result_of(done)
    assert "warning" not in done.stderr and abs(value_ns) <= spread_ns < 2 * 10**6


def decoded(ahead_ns=0, **fields):
    query = SNTP.make_query()
    packet = ntp_answer(query, **fields)
    return SNTP.decode_answer(packet, ahead_ns) if SNTP.answers(query, packet) else None


@pytest.mark.parametrize("fields, words", [
    (dict(flags=0xe4), "the server is not synchronised"), (dict(stratum=16), "the server is not synchronised"),
    (dict(stratum=0, refid=bytes(4)), "the server is not synchronised"),
    (dict(stratum=0, refid=b"INIT"), "stratum 0, INIT"), (dict(stratum=0, refid=b"\n\x1b[m"), r"stratum 0, \?\?\[m"),
    (dict(flags=0x23), "answer of mode 3, version 4"), (dict(flags=0x25), "mode 5"), (dict(flags=4), "version 0"),
    (dict(receive=0), "answer without time"), (dict(transmit=0), "answer without time"),
    (dict(receive=ntp_stamp(10**18 + 2000), transmit=ntp_stamp(10**18)), "sent before the query came"),
    (dict(receive=5 * 2**22 + 2**60, transmit=2**60, precision=-10), "sent before the query came"),
    (dict(precision=1), "precise to 2 s only"), (dict(precision=127), "precise to"),
    (dict(delay=3 * 2**16 + 2), "up to 1.5 s off"), (dict(delay=2**16, dispersion=2**16 + 1), "up to 1.5 s off"),
    (dict(delay=2**32 - 1, dispersion=2**32 - 1), "up to 98304.0 s off")])
def test_answers_that_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        decoded(**fields)


def test_answers_that_are_taken():
    for fields in (dict(flags=0x1c), dict(flags=0x5c), dict(flags=0x9c), dict(flags=0x0a), dict(stratum=15),
                   dict(delay=3 * 2**16), dict(precision=0), dict(precision=-128)):
        assert decoded(**fields)
    assert decoded(originate=1) is None and not SNTP.answers(SNTP.make_query(), bytes(47))
    base = 2**64 - 2**40
    for precision, ahead_ns, early in ((-10, 0, 0), (-10, 27 * 10**9, 2**22), (-32, 0, 0), (-128, 0, 0)):
        answer = decoded(ahead_ns, precision=precision, receive=base + early, transmit=base, delay=2**16, dispersion=1)
        at_ns, coarse_ns = SNTP.stamp_ns(base) + ahead_ns, (10**9 >> -precision) + 1
        early_ns = early * 10**9 >> 32
        assert answer == (at_ns + early_ns + coarse_ns, at_ns - coarse_ns, 500015258, 1, "54455354")


def test_a_kiss_of_death_ends_that_servers_part():
    for word, usable in ("DENY", False), ("RSTR", False), ("RATE", True):
        for first in 1, 3:
            with Rogue(lambda query, n: [ntp_answer(query) if n < first else ntp_answer(
                    query, stratum=0, refid=word.encode(), flags=0xe4)]) as server:
                done = ask("sntpclock", server.port)
            warning, *fatal = done.stderr.splitlines()
            assert len(server.queries) == first
            assert warning == "sntpclock: warning: unable to ask 127.0.0.1: kiss-o'-death " + word
            assert done.returncode == (0 if usable and first == 3 else 111)
            assert fatal == [] if done.returncode == 0 else fatal == [
                "sntpclock: fatal: unable to get the time from 127.0.0.1: kiss-o'-death " + word]


def test_the_era_is_the_one_that_holds_the_release():
    for sec in (SNTP.RELEASE_SEC, SNTP.RELEASE_SEC + 1, 2**32 - 2208988800 - 1, 2**32 - 2208988800,
                SNTP.RELEASE_SEC + 2**32 - 1):
        assert SNTP.stamp_ns(ntp_stamp(sec * 10**9)) == sec * 10**9
    assert SNTP.stamp_ns(ntp_stamp(SNTP.RELEASE_SEC * 10**9) - 1) == (SNTP.RELEASE_SEC + 2**32) * 10**9 - 1
    off_ns = (2**32 - 2208988800 + 10**9) * 10**9 - time.time_ns()
    with Rogue(lambda query, n: [ntp_answer(query, off_ns)]) as server:
        assert abs(offset_of(ask("sntpclock", server.port, "-l", 0)) - off_ns) < NEAR_NS


def test_ranges_are_widened_by_the_root_distance():
    """Each server is sure of itself to some us, and 0.3 s from the other: that is within what both admit, or not."""
    for one_distance, other_distance, agree in (0x4000, 0x4000, True), (0x4000, 0x2000, True), (0x1000, 0x1000, False):
        with Rogue(lambda query, n: [ntp_answer(query, dispersion=one_distance)]) as server, Rogue(
                lambda query, n: [ntp_answer(query, 3 * 10**8, dispersion=other_distance)], "127.0.0.2", server.port):
            done = ask("sntpclock", server.port, "-v", 2, hosts=["127.0.0.1", "127.0.0.2"])
        if agree:
            _, spread_ns, distance_ns = result_of(done)
            value_ns = SNTP.unpack(done.stdout)[0]
            least_ns, most_ns = 3 * 10**8 - other_distance * 10**9 / 65536, one_distance * 10**9 / 65536
            assert abs(value_ns - (least_ns + most_ns) / 2) < NEAR_NS
            assert distance_ns == min(one_distance, other_distance) * 10**9 >> 16
            assert abs(max((most_ns - least_ns) / 2 - distance_ns, 1) - spread_ns) < NEAR_NS
        else:
            assert done.returncode == 111 and "no majority" in done.stderr
    with Rogue(lambda query, n: [ntp_answer(query, delay=2**15)]) as server:
        _, spread_ns, distance_ns = result_of(ask("sntpclock", server.port, "-v", 2))
    assert distance_ns == 250 * 10**6 and spread_ns < NEAR_NS, "of one server too, the two are told apart"


HEX_KEY = "HEX:" + bytes(range(16)).hex()
KEYS = """# keys, as chronyc keygen writes them
1 MD5 ASCII:sixteen-bytes-16
2 SHA1 HEX:933F62BE1D604E68A81B557F18CFA200483F5B70
3 SHA256 chrysanthemum-and-lotus
4 SHA384 %s
5 SHA512 %s
""" % (HEX_KEY, HEX_KEY)


@pytest.mark.parametrize("line, said", [
    ("7 SHA256 HEX:", "it has 0 bytes, and 16 are the least"), ("7 SHA256 ASCII:", "0 bytes"),
    ("7 SHA1 fifteen-bytes-1", "15 bytes"), ("7 SHA1 ASCII:fifteen-bytes-1", "15 bytes"),
    ("7 SHA1 HEX:" + 15 * "00", "15 bytes"), ("7 SHA1 HEX:0g", "non-hexadecimal"), ("7 SHA256", "its line is not"),
    ("7 chrysanthemum-and-lotus", "its line is not the number, MD5 or SHA1 or SHA256 or SHA384 or SHA512, and the"),
    ("7 AES128 " + HEX_KEY, "its line is not"), ("7 SHA256 %s x" % HEX_KEY, "its line is not"),
    ("7", "its line is not"), ("#7 SHA256 " + HEX_KEY, "it is not there"), ("77 MD5 " + HEX_KEY, "it is not there")])
def test_keys_that_are_refused(line, said):
    with pytest.raises(ValueError, match=said):
        SNTP.parse_key(KEYS + line + "\n", 7)


def test_authentication_with_a_real_chronyd(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    keys.chmod(0o640)
    (tmp_path / "others").write_text(KEYS.replace("933F", "933E"))
    (tmp_path / "others").chmod(0o600)
    with Chronyd(tmp_path, "local stratum 1", "keyfile %s" % keys) as server:
        for ident in range(1, 6):
            done = ask("sntpclock", server.port, "-k", keys, "-K", ident)
            assert abs(offset_of(done)) < NEAR_NS and done.stderr == "", ident
        done = ask("sntpclock", server.port, "-k", tmp_path / "others", "-K", 2, "-r", 1, "-t", 300)
        assert (done.returncode, done.stdout) == (111, b"")
    for mode, ident, said in ((0o604, 1, "take key 1 from %s: others can read or write it"),
                              (0o602, 1, "take key 1 from %s: others can"), (0o600, 9, "take key 9 from %s: it is not")):
        keys.chmod(mode)
        done = ask("sntpclock", 1, "-k", keys, "-K", ident)
        assert done.returncode == 111 and said % keys in done.stderr
    for args in ("-k", keys), ("-K", 1), ("-k", keys, "-K", 0), ("-k", keys, "-K", "1x"), ("-k", keys, "-K", 2**32):
        assert ask("sntpclock", 1, *args).returncode == 100
    os.mkfifo(str(tmp_path / "fifo"), 0o600)
    assert "it is not there" in ask("sntpclock", 1, "-k", tmp_path / "fifo", "-K", 1).stderr


def test_only_what_is_authenticated_counts(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    key, other = SNTP.read_key(str(keys), 2), SNTP.read_key(str(keys), 1)
    for tamper in (lambda answer: answer, lambda answer: answer + bytes(4),
                   lambda answer: answer + SNTP.mac(key, answer)[:-1] + b"?",
                   lambda answer: answer + SNTP.mac(other, answer), lambda answer: answer + SNTP.mac(key, answer) + b"?",
                   lambda answer: answer + SNTP.mac(key, answer[:-1] + b"?")):
        with Rogue(lambda query, n: [tamper(ntp_answer(query))]) as server:
            done = ask("sntpclock", server.port, "-k", keys, "-K", 2, "-r", 1)
        assert done.returncode == 111 and "answer not authenticated with the key" in done.stderr
    with Rogue(lambda query, n: [ntp_answer(query, stratum=0, refid=b"DENY")]) as server:
        done = ask("sntpclock", server.port, "-k", keys, "-K", 2, "-r", 2)
        assert "DENY" not in done.stderr and [len(query) for query in server.queries] == [72, 72]


# ==== taiclock ======================================================================================

def test_the_query_has_zeros_where_the_label_will_be():
    one, two = TAI.make_query(None), TAI.make_query(None)
    assert len(one) == 32 and one[:20] == two[:20] == b"ctai" + bytes(16) and one[20:] != two[20:]


def test_labels_that_are_taken():
    """The label of Unix second 1483228800, the first after the last leap second, is 2^62 and 37 s more."""
    query = TAI.make_query(None)
    for label, tai_minus_clock_sec, wanted in (
            ("40000000586846a5" + "00000005" + "00000000", 37, (5, 5)),
            ("40000000586846a5" + "00000005" + "00000001", 37, (6, 5)),  # an attosecond must not make it a lie
            ("40000000586846a5" + "00000005" + "3b9ac9ff", 10, (27 * 10**9 + 6, 27 * 10**9 + 5))):
        answer = TAI.decode_answer(query, b"stai" + bytes.fromhex(label) + query[20:], tai_minus_clock_sec * 10**9)
        received_ns, sent_ns = (1483228800 * 10**9 + ns for ns in wanted)
        assert answer == (received_ns, sent_ns, 0, "-", "-")


def test_what_is_no_answer_is_ignored_and_what_is_no_label_refused():
    query = TAI.make_query(None)
    right = tai_answer(query)
    for packet in (query, right[:-1], right + b"?", b"Stai" + right[4:], b"stbi" + right[4:], b"", bytes(32)) + tuple(
            right[:place] + bytes([right[place] ^ 1]) + right[place + 1:] for place in (20, 31)):
        assert TAI.decode_answer(query, packet) is None
    for label in bytes(8) + b"\xff" * 8, b"\x80" + bytes(15), bytes(8) + bytes.fromhex("000000003b9aca00"):
        with pytest.raises(ValueError, match="not a TAI64NA"):
            TAI.decode_answer(query, b"stai" + label + query[20:])
    for label in bytes(16), b"\x7f" + b"\xff" * 7 + bytes(8):  # true labels of absurd times
        with Rogue(lambda query, n: [b"stai" + label + query[20:]]) as server:
            assert "years" in ask("taiclock", server.port, "-r", 1).stderr


def test_an_s6_taiclockd_writes_12_bytes_of_the_label():
    with Rogue(lambda query, n: [tai_answer(query)[:16] + query[16:]]) as server:
        done = ask("taiclock", server.port, "-r", 20)
    assert abs(offset_of(done)) < NEAR_NS and done.stderr == ""


def test_the_value_is_by_our_own_stamps_and_the_bound_by_the_kernels():
    def result(*samples):
        server = TAI.Server("a")
        server.samples = [TAI.Sample(TAI.Answer(t2, t2, 0, "-", "-"), *[
            tuple(TAI.Reading(ns, ns) for ns in pair) for pair in (own, kernel)]) for t2, own, kernel in samples]
        end = TAI.Reading(300, 300)
        server.range = server.certain = TAI.server_range([
            TAI.sample_range(sample.answer, sample.kernel, end) for sample in server.samples])
        return TAI.Result(server.range, 0, [server], end)
    # It stamps 40 ns after the query came, and we learn of its answer as late: 0 is the truth.
    balanced = result((150, (100, 200), (105, 160)))
    assert balanced.range == (-10, 45) and TAI.balanced_value_ns(balanced) == 0
    packet = TAI.pack_mark(balanced, 0, TAI.Settings(["a"], 1))
    assert TAI.unpack(packet) == (0, TAI.pack_quality(45, 0))
    for own, value_ns in ((0, 200), 45), ((100, 300), -10):  # the kernel's range is proven
        assert TAI.balanced_value_ns(result((150, own, (105, 160)))) == value_ns


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_taiclock_asks_taiclockd(address):
    port = free_port(address)
    with process(command_of("taiclockd", "-i", address, "-p", port), env=UTC_ENV, stdout=subprocess.DEVNULL):
        done = until(lambda: [done for done in [ask("taiclock", port, "-v", 2, hosts=[address])]
                              if done.returncode == 0])[0]
    value_ns, spread_ns, _ = result_of(done)
    assert abs(value_ns) <= spread_ns < 10**6


# ==== ntsclock ======================================================================================

NTS = load("ntsclock")
DAY_SEC, YEAR_SEC = 86400, 365 * 86400
CMAC_KEY, CMAC_TEXT = "2b7e151628aed2a6abf7158809cf4f3c", ("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac"
                                                           "45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445")
VECTORS = [  # FIPS 197 C.1; RFC 4493, each with its size; RFC 5297 A.1 and A.2
    (lambda key, text: b"%032x" % NTS.Aes(key).encrypt(int(text.hex(), 16)), "000102030405060708090a0b0c0d0e0f",
     "00112233445566778899aabbccddeeff", b"69c4e0d86a7b0430d8cdb78070b4c55a")] + [
    (lambda key, text: b"%032x" % NTS.cmac(NTS.Aes(key), text), CMAC_KEY, CMAC_TEXT[:2 * size], mac)
    for size, mac in ((0, b"bb1d6929e95937287fa37d129b756746"), (16, b"070a16b46b4d4144f79bdd9dd04a287c"),
                      (40, b"dfa66747de9ae63030ca32611497c827"))] + [
    (lambda key, text: NTS.Siv(key).seal([bytes(range(16, 40))], text).hex().encode(),
     "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", "112233445566778899aabbccddee",
     b"85632d07c6e8f37f950acd320a2ecc9340c02b9690c4dc04daef7f6afe5c"),
    (lambda key, text: NTS.Siv(key).seal([bytes.fromhex(
        "00112233445566778899aabbccddeeffdeaddadadeaddadaffeeddccbbaa99887766554433221100"), bytes.fromhex(
        "102030405060708090a0"), bytes.fromhex("09f911029d74e35bd84156c5635688c0")], text).hex().encode(),
     "7f7e7d7c7b7a79787776757473727170404142434445464748494a4b4c4d4e4f",
     b"this is some plaintext to encrypt using SIV-AES".hex(),
     b"7bdb6e3b432667eb06f4d14bff2fbd0fcb900f2fddbe404326601965c889bf17"
     b"dba77ceb094fa663b7a3f748ba8af829ea64ad544a272e9c485b62a3fd5c0d")]


@pytest.mark.parametrize("function, key, text, expected", VECTORS)
def test_the_vectors_of_the_standards(function, key, text, expected):
    assert function(bytes.fromhex(key), bytes.fromhex(text)) == expected


class Authority:
    """A certificate authority, and hosts that it vouches for."""

    def __init__(self, home, days=36500):
        need("openssl")
        self.home, self.path = home, str(home / "ca.crt")
        (home / "ca.conf").write_text(
            "[ca]\ndefault_ca=here\n[here]\ndatabase=index\nrand_serial=yes\nnew_certs_dir=.\npolicy=any\n"
            "default_md=sha256\nunique_subject=no\n[any]\ncommonName=supplied\n")
        (home / "index").write_text("")
        self.make_key("ca", "-x509", "-days", str(days), "-addext", "basicConstraints=critical,CA:TRUE",
                      "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        self.make_key("host")
        self.good = self.host()

    def openssl(self, *words):
        subprocess.run(("openssl",) + words, cwd=str(self.home), check=True, stderr=subprocess.DEVNULL)

    def make_key(self, name, *words):
        self.openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=" + name,
                     "-keyout", name + ".key", "-out", name + ".crt", *words)

    def host(self, since_sec=-DAY_SEC, until_sec=YEAR_SEC, names="DNS:localhost,IP:127.0.0.1"):
        """-> (certificate, key) of a host, valid between those times from now."""
        since, until_ = [time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + sec))
                         for sec in (since_sec, until_sec)]
        (self.home / "ext").write_text(
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nsubjectKeyIdentifier=hash\n"
            "authorityKeyIdentifier=keyid\nsubjectAltName=%s\n" % names)
        path = self.home / (os.urandom(4).hex() + ".crt")
        self.openssl("ca", "-batch", "-notext", "-config", "ca.conf", "-cert", "ca.crt", "-keyfile", "ca.key", "-in",
                     "host.crt", "-out", path.name, "-startdate", since, "-enddate", until_, "-extfile", "ext")
        return str(path), str(self.home / "host.key")


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def ke_records(*records):
    return b"".join(NTS.RECORD.pack(kind, len(body)) + body for kind, body in records + ((0x8000, b""),))


def nts_header(query, off_ns=0, stratum=1, word=b"TEST"):
    stamp = ((time.time_ns() + off_ns + NTS.NTP_UNIX_SEC * 10**9) % (2**32 * 10**9) << 32) // 10**9
    return NTS.NTP.pack(0x24, stratum, 6, -20, 0, 0, word, stamp, NTS.NTP.unpack_from(query)[-1], stamp, stamp)


def sealed_answer(siv, query, header, cookies=()):
    message, nonce = header + NTS.field(NTS.IDENTIFIER, NTS.identifier_of(query)), os.urandom(16)
    sealed = siv.seal([message, nonce], b"".join(NTS.field(NTS.COOKIE, cookie) for cookie in cookies))
    return message + NTS.field(NTS.AUTHENTICATOR, struct.pack(">HH", 16, len(sealed)) + nonce + sealed)


def bare_kiss(query, word=b"NTSN"):
    return nts_header(query, stratum=0, word=word) + NTS.field(NTS.IDENTIFIER, NTS.identifier_of(query))


class NtsHost:
    """An NTS server of our own, which can do what real ones don't: talk(tls, grant) speaks in key
    establishment, reply(host, siv, query, good answer) -> the packets that are sent."""

    def __init__(self, certificate, off_sec=0, talk=lambda tls, grant: tls.sendall(grant),
                 reply=lambda host, siv, query, good: [good], ntp_address="127.0.0.1"):
        self.off_ns, self.talk, self.reply = off_sec * 10**9, talk, reply
        self.keylog, path = NTS.open_keylog()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(*certificate)
        self.context.set_alpn_protocols(["ntske/1"])
        self.context.keylog_filename = path
        self.keys, self.used, self.sessions = {}, [], 0
        self.tcp, self.udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.tcp.bind(("127.0.0.1", 0))
        self.udp.bind((ntp_address, 0))
        self.tcp.listen(5)
        self.port, self.ntp_port = self.tcp.getsockname()[1], self.udp.getsockname()[1]

    def __enter__(self):
        for loop in (self.establish, self.serve):
            threading.Thread(target=loop, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.tcp.shutdown(socket.SHUT_RDWR)  # which ends accept()
        self.udp.sendto(b"", self.udp.getsockname())
        assert len(set(self.used)) == len(self.used), "a cookie came twice"

    def establish(self):
        while True:
            try:
                plain, _ = self.tcp.accept()
            except OSError:
                return self.tcp.close()
            with plain, contextlib.suppress(OSError, ValueError):
                plain.settimeout(PATIENCE_SEC)
                with self.context.wrap_socket(plain, server_side=True) as tls:
                    if tls.recv(100) == ke_records((0x8001, b"\0\0"), (0x8004, b"\0\x0f")):
                        keys = [NTS.Siv(key) for key in NTS.export_keys(NTS.secret_of(os.pread(self.keylog, 9999, 0)))]
                        os.ftruncate(self.keylog, 0)
                        self.sessions += 1
                        self.talk(tls, self.grant(self.new_cookies(keys, 8)))

    def grant(self, cookies):
        return ke_records((0x8001, b"\0\0"), (0x8004, b"\0\x0f"), (7, struct.pack(">H", self.ntp_port)),
                          *[(5, cookie) for cookie in cookies])

    def new_cookies(self, keys, count):
        cookies = [os.urandom(100) for _ in range(count)]
        self.keys.update(dict.fromkeys(cookies, keys))
        return cookies

    def serve(self):
        while True:
            query, client = self.udp.recvfrom(2000)
            if not query:
                return self.udp.close()
            (one, _, _), (two, _, cookie), *_, (_, start, body) = fields = NTS.split_fields(query, 48)
            assert (one, two) == (NTS.IDENTIFIER, NTS.COOKIE)
            self.used.append(cookie)
            query_siv, answer_siv = keys = self.keys[cookie]
            assert query_siv.open([query[:start], body[4:20]], body[20:]) == b""
            good = sealed_answer(answer_siv, query, nts_header(query, self.off_ns),
                                 self.new_cookies(keys, len(fields) - 2))
            for packet in self.reply(self, answer_siv, query, good):
                self.udp.sendto(packet, client)


@contextlib.contextmanager
def nts_chronyd(home, authority, port=None):
    """A real one -> its port, the same for NTP and key establishment; each start has new keys."""
    need("chronyd")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = port or free.getsockname()[1]
    (home / "conf").write_text(
        "local stratum 1\nallow\nntsport %d\nport %d\ncmdport 0\nbindcmdaddress /\nuser root\npidfile %s\n"
        "ntsservercert %s\nntsserverkey %s\n" % (port, port, home / "pid", *authority.good))
    with process(without_the_right(["chronyd", "-x", "-d", "-f", str(home / "conf")]), stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL):
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield port


@pytest.fixture(scope="module")
def chronyd_port(tmp_path_factory, authority):
    with nts_chronyd(tmp_path_factory.mktemp("chronyd"), authority) as port:
        yield port


def nts_args(authority, port, *args, host="127.0.0.1"):
    return ["-p", str(port), "-c", authority.path, "-r", "2", "-l", "0"] + [str(arg) for arg in args] + [host]


def nts_run(authority, port, *args, host="127.0.0.1", **env):
    return run("ntsclock", *nts_args(authority, port, *args, host=host), **env)


def nts_offset_ns(done):
    assert done.returncode == 0, done.stderr
    return NTS.unpack(done.stdout)[0]


@pytest.mark.parametrize("suite", ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"))
def test_a_real_chronyd_tells_the_time_by_nts(suite, chronyd_port, authority, tmp_path):
    (tmp_path / "conf").write_text(
        "openssl_conf=a\n[a]\nssl_conf=b\n[b]\nsystem_default=c\n[c]\nCiphersuites=" + suite)
    done = nts_run(authority, chronyd_port, "-v", 2, host="localhost", OPENSSL_CONF=str(tmp_path / "conf"))
    assert abs(nts_offset_ns(done)) < 10**7 and "warning" not in done.stderr and "new keys, 8 cookies" in done.stderr
    assert 0 < VIEW.unpack_quality(NTS.unpack(done.stdout)[1])[0] < 10**7


def test_a_thousand_exchanges_in_a_row_renew_their_cookies(chronyd_port, authority, tmp_path):
    done = nts_run(authority, chronyd_port, "-r", 1000, "-T", 60000, "-s", tmp_path)
    assert abs(nts_offset_ns(done)) < 10**7 and done.stderr == ""
    assert len(NTS.parse_keys((tmp_path / "nts").read_text()).cookies) == NTS.COOKIES


def test_a_run_with_stored_keys_does_not_even_load_tls(chronyd_port, authority, tmp_path):
    command = command_of("ntsclock", *nts_args(authority, chronyd_port, "-s", tmp_path))
    for first in (True, False):
        done = subprocess.run(command[:1] + ["-X", "importtime"] + command[1:], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, env=UTC_ENV)
        assert done.returncode == 0 and (re.search(rb"\| *ssl\n", done.stderr) is not None) is first
    assert (tmp_path / "nts").stat().st_mode & 0o777 == 0o600 and " nts 127.0" in (tmp_path / "sources").read_text()


def test_a_server_with_new_keys_is_asked_for_them_once(authority, tmp_path):
    port = None
    for words in ("", "timed out"):  # a NAK may be forged: the answer is waited for
        with nts_chronyd(tmp_path, authority, port) as port:
            done = nts_run(authority, port, "-s", tmp_path, "-r", 3, "-v", 2)
            assert abs(nts_offset_ns(done)) < 10**7 and done.stderr.count("new keys") == 1 and words in done.stderr


def exchange_with(port, authority):
    """-> (NtsServer, query, answer)."""
    settings = NTS.Settings(nts_args(authority, port), 4460, "c:")
    keys = NTS.establish("127.0.0.1", settings)
    server = NTS.NtsServer(keys, True, *NTS.locate(keys, settings))
    query = NTS.query_of(server, settings)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE_SEC)
        sock.sendto(query, server.address)
        return server, query, sock.recv(2000)


def test_no_answer_counts_that_is_not_the_servers_to_its_last_bit(chronyd_port, authority):
    server, query, answer = exchange_with(chronyd_port, authority)
    other, other_query, other_answer = exchange_with(chronyd_port, authority)
    (_, a, _), (_, b, _) = NTS.split_fields(answer, 48)  # identifier and authenticator
    size, number = len(answer), int.from_bytes(answer, "big")
    wrong = [(number ^ 1 << bit).to_bytes(size, "big") for bit in range(8 * size)]
    wrong += [answer[:end] for end in range(size)]
    wrong += [answer + more for more in (b"\0", bytes(4), NTS.field(0x2004, bytes(12)), answer[a:b], answer[b:])]
    wrong += [answer[:48] + answer[b:] + answer[a:b], answer[:48] + answer[b:], answer[:b] + other_answer[b:],
              other_answer, answer[:a + 4] + NTS.identifier_of(other_query) + answer[b:]]
    assert [packet for packet in wrong if NTS.decode(server, query, packet, 0)] == []
    assert NTS.decode(server, other_query, answer, 0) is None is NTS.decode(other, query, answer, 0)
    assert len(server.keys.cookies) == 7 and NTS.decode(server, query, answer, 0) and len(server.keys.cookies) == 8


@pytest.mark.parametrize("certificate, off_sec, words", [
    ({}, 0, None),
    (dict(since_sec=20 * YEAR_SEC, until_sec=21 * YEAR_SEC), int(20.5 * YEAR_SEC), None),  # this clock is slow
    ({}, 2 * YEAR_SEC, "its certificate is valid from .* to .*, and its time is "),
    (dict(since_sec=-3600), -7200, "its certificate is valid from .* to .*, and its time is "),
    (dict(since_sec=-9 * DAY_SEC, until_sec=-DAY_SEC), 0, "its certificate is valid from .* to .*, and"),
    (dict(names="DNS:time.example.org"), 0, "its certificate can't be trusted: .*mismatch"),
    ("self-signed", 0, "its certificate can't be trusted: self.signed certificate"),
    ("another", 0, "its certificate can't be trusted: unable to get local issuer certificate"),
    ("old authority", YEAR_SEC, "its certificate is valid from .* to .*, and"),
])
def test_a_certificate_is_judged_by_name_authority_and_the_time_measured(certificate, off_sec, words, authority,
                                                                        tmp_path):
    if certificate == "old authority" and sys.version_info < (3, 10):
        pytest.skip("this Python shows the host's certificate only")
    if certificate == "self-signed":
        authority.make_key("self", "-x509", "-days", "9", "-addext", "subjectAltName=IP:127.0.0.1")
        pair = str(authority.home / "self.crt"), str(authority.home / "self.key")
    elif isinstance(certificate, str):
        other = Authority(tmp_path, 30)
        pair = other.host(until_sec=9 * YEAR_SEC)
        authority = other if certificate == "old authority" else authority
    else:
        pair = authority.host(**certificate)
    with NtsHost(pair, off_sec) as server:
        done = nts_run(authority, server.port)
        if words:
            assert done.returncode == 111 and done.stdout == b"" and re.search("fatal: .*" + words, done.stderr)
        else:
            assert abs(nts_offset_ns(done) - off_sec * 10**9) < 10**9


def test_stored_keys_are_used_for_28_days_and_within_the_certificates_time(authority, tmp_path):
    with NtsHost(authority.good) as server:
        for days, sessions in ((0, 1), (27, 1), (29, 2), (58, 3), (1000, 4)):
            server.off_ns = days * DAY_SEC * 10**9
            done = nts_run(authority, server.port, "-s", tmp_path)
            assert server.sessions == sessions and (done.returncode == 0) is (days < 365)
    assert "its certificate is valid from" in done.stderr


def drip(tls, grant):
    for at in range(len(grant)):
        tls.sendall(grant[at:at + 1])
        time.sleep(0.2)


def flood(tls, grant):
    while True:
        tls.sendall(NTS.RECORD.pack(99, 1000) + bytes(1000))


GOOD = NTPV4, SIV, COOKIE = (0x8001, b"\0\0"), (0x8004, b"\0\x0f"), (5, bytes(100))


@pytest.mark.parametrize("talk, words", [
    (drip, "timed out"), (flood, "its answer never ends"), (lambda tls, grant: time.sleep(2), "timed out"),
    (lambda tls, grant: None, "its answer is cut short|eof"),
    (lambda tls, grant: tls.sendall(grant[:-1]), "its answer is cut short|eof"),
    (lambda tls, grant: tls.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "its answer is cut short|eof"),
    ([(0x8002, b"\0\0")], "it says: it does not know a critical record"), ([(0x8002, b"\0\1")], "says: bad request"),
    ([(0x8002, b"\0\2")], "it says: internal error"), ([(0x8002, b"\0\x09")], "it says: error 9"),
    ([*GOOD, (0x8003, b"\0\1")], "it says: warning 1"), ([*GOOD, (0x8063, b"")], "unknown critical record, 99"),
    ([(0x8001, b""), SIV, COOKIE], "it does not offer NTPv4"), ([(0x8001, b"\0\1"), SIV, COOKIE], "NTPv4"),
    ([NTPV4, (0x8004, b""), COOKIE], "AEAD_AES_SIV_CMAC_256"), ([NTPV4, (4, b"\0\x10"), COOKIE], "AEAD_AES"),
    ([NTPV4, *GOOD], "it sent record 1 twice"), ([NTPV4, SIV], "it sent no cookie"),
    ([NTPV4, SIV, (5, b""), (5, bytes(3)), (5, bytes(4096))], "it sent no cookie"),
    ([*GOOD, (7, b"\0\0")], "of no server"), ([*GOOD, (7, b"\1")], "of no server"),
    ([*GOOD, (6, b"\x1b[2J")], "of no server"), ([*GOOD, (6, b"\xff")], "codec")])
def test_a_key_establishment_that_goes_wrong_is_a_line_in_time(talk, words, authority):
    def answer(tls, grant):
        talk(tls, grant) if callable(talk) else tls.sendall(ke_records(*talk))
    with NtsHost(authority.good, talk=answer) as server:
        before_sec = time.monotonic()
        done = nts_run(authority, server.port, "-T", 2000)
        assert time.monotonic() - before_sec < PATIENCE_SEC / 6 and server.used == []
    assert done.returncode == 111 and re.search("fatal: unable to get the time from .*: .*" + words, done.stderr)


@pytest.mark.parametrize("change, words", [
    (lambda tls: tls.set_alpn_protocols(["http/1.1"]), "it does not speak ntske/1|TLS: .*application protocol"),
    (lambda tls: setattr(tls, "maximum_version", ssl.TLSVersion.TLSv1_2), "TLS: .*version")])
def test_other_tls_is_refused(change, words, authority):
    with NtsHost(authority.good) as server:
        change(server.context)
        assert re.search("fatal: .*" + words, nts_run(authority, server.port).stderr)


def test_the_ntp_server_is_where_key_establishment_says(authority):
    def elsewhere(tls, grant):
        tls.sendall(NTS.RECORD.pack(6, 9) + b"127.0.0.2" + NTS.RECORD.pack(0x4001, 2) + bytes(2) + grant)
    with NtsHost(authority.good, talk=elsewhere, ntp_address="127.0.0.2") as server:
        done = nts_run(authority, server.port, "-v", 2)
        assert nts_offset_ns(done) and "127.0.0.1/127.0.0.2: offset" in done.stderr and len(server.used) == 2


@pytest.mark.parametrize("reply, words", [
    (lambda host, siv, query, good: [bare_kiss(query), good], None),
    (lambda host, siv, query, good: [bare_kiss(query, b"RATE"), bare_kiss(query, b"DENY"), good], "not authentic"),
    (lambda host, siv, query, good: [good[:-1] + b"!", good, good], "was not authentic"),
    (lambda host, siv, query, good: [sealed_answer(siv, query, nts_header(query, stratum=0, word=b"DENY"))],
     "fatal: .*kiss-o'-death DENY"),
    (lambda host, siv, query, good: [good] if len(host.used) == 1 else [
        sealed_answer(siv, query, nts_header(query, stratum=0, word=b"RATE"))], "warning: .*kiss-o'-death RATE"),
    (lambda host, siv, query, good: [bare_kiss(query)], "fatal: .*does not know our keys any more"),
    (lambda host, siv, query, good: [nts_header(query)], "fatal: .*no usable answer"),
    (lambda host, siv, query, good: [], "fatal: .*no usable answer")])
def test_only_what_is_authentic_counts(reply, words, authority):
    with NtsHost(authority.good, reply=reply) as server:
        done = nts_run(authority, server.port, "-t", 300)
    assert (done.returncode == 111) is str(words).startswith("fatal") and server.sessions == 1
    assert re.search(words, done.stderr) if words else done.stderr == ""


def test_a_week_of_hourly_marks_takes_one_key_establishment(authority, tmp_path, capfd):
    rng = random.Random(SEED)
    with NtsHost(authority.good, reply=lambda host, siv, query, good: [good] * (rng.random() > 0.1)) as server:
        for _ in range(7 * 24):
            words = nts_args(authority, server.port, "-s", tmp_path, "-r", 4, "-t", 50, "-v", 0)
            assert NTS.main(["ntsclock"] + words) == 0, capfd.readouterr().err
        assert server.sessions == 1 and len(server.used) == 4 * 7 * 24


def test_a_killed_run_leaves_no_cookie_and_two_at_once_share_none(authority, tmp_path):
    with NtsHost(authority.good, reply=lambda *_: []) as server:  # which looks at the cookies
        command = command_of("ntsclock", *nts_args(authority, server.port, "-s", tmp_path, "-v", 0))
        with process(command, stdout=subprocess.PIPE):
            until(lambda: server.used)
        assert not (tmp_path / "nts").exists()
        server.reply = lambda host, siv, query, good: [good]
        for count in (1, 4, 4):
            runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
            assert [len(started.communicate()[0]) for started in runs] == [16] * count
        assert server.sessions >= 3


def spoil(path, kind):
    """Put something else in place of dir/nts."""
    text, own = path.read_text(), str(path) + ".own"
    if kind in ("link", "fifo"):
        path.rename(own)
        os.symlink(own, str(path)) if kind == "link" else os.mkfifo(str(path), 0o600)
    elif kind in ("owner", "directory"):
        os.chown(str(path if kind == "owner" else path.parent), 65534, -1)
    elif kind == "mode":
        path.chmod(0o640)
    else:
        path.write_text({"empty": "", "torn": text[:-7], "zeros": "\0" * 999, "endless": text * 999}[kind])


@pytest.mark.parametrize("kind", ["link", "fifo", "owner", "mode", "directory", "empty", "torn", "zeros", "endless"])
def test_a_damaged_or_foreign_store_is_as_good_as_none(kind, authority, tmp_path):
    if kind in ("owner", "directory") and os.getuid() != 0:
        pytest.skip("only root can give files away")
    with NtsHost(authority.good) as server:
        nts_run(authority, server.port, "-s", tmp_path)
        spoil(tmp_path / "nts", kind)
        before = (tmp_path / "nts").lstat()
        assert nts_offset_ns(nts_run(authority, server.port, "-s", tmp_path)) and server.sessions == 2
    after = (tmp_path / "nts").lstat()
    assert stat.S_ISREG(after.st_mode) and after.st_mode & 0o777 == 0o600
    assert (before.st_ino == after.st_ino) is (kind == "directory")  # another user's is left alone


def test_no_secret_leaves_the_program(authority, tmp_path, monkeypatch, capfd):
    files, secrets, make, read = [], [], NTS.make_context, NTS.secret_of

    def watched(ssl, path, authorities):
        files.append(os.stat(path).st_mode & 0o777)
        context = make(ssl, path, authorities)
        files.append(os.path.exists(path))
        return context
    monkeypatch.delattr(NTS.os, "memfd_create", raising=False)  # as on a system that has none
    monkeypatch.setattr(NTS, "make_context", watched)
    monkeypatch.setattr(NTS, "secret_of", lambda keylog: secrets.append(read(keylog)) or secrets[-1])
    with NtsHost(authority.good) as server:
        assert NTS.main(["ntsclock"] + nts_args(authority, server.port, "-s", tmp_path, "-v", 2)) == 0
    stored = (tmp_path / "nts").read_text()
    said = "".join(capfd.readouterr()) + (tmp_path / "sources").read_text()
    assert files == [0o600, False] and secrets[0].hex() not in stored
    keys = NTS.parse_keys(stored)
    secrets += [keys.query_key, keys.answer_key] + keys.cookies
    assert "127.0.0.1" in said and not [secret for secret in secrets if secret.hex() in said]


# ==== taiclockd =====================================================================================

# ==== the estimator =================================================================================

# ==== clockspeed: a simulated kernel ================================================================

# ==== clockspeed: the process =======================================================================

# ==== bad days ======================================================================================

# ==== clockctl ======================================================================================

# ==== clockctl-check ================================================================================

# ==== clockctl-graph ================================================================================

# ==== the services ==================================================================================

# ==== svc/install ===================================================================================

# ==== the README ====================================================================================

# ==== every decoder =================================================================================
# One row for each function that reads what others wrote: good inputs, and what it may raise.


def from_bytes(data):
    """-> read(size), which ends as a connection does."""
    file = io.BytesIO(data)

    def read(size):
        got = file.read(size)
        if len(got) < size:
            raise ValueError("its answer is cut short")
        return got
    return read


NTS_SIV = NTS.Siv(bytes(range(32)))
NTS_QUERY = NTS.seal_query(NTS_SIV, NTS.make_query(), bytes(32), bytes(100), 7, bytes(16))
NTS_ANSWER = sealed_answer(NTS_SIV, NTS_QUERY, nts_header(NTS_QUERY), [bytes(100)] * 8)
NTS_KEYS = NTS.Keys("host", 4460, "::1", 123, 0, 1, bytes(32), bytes(32), [bytes(100)])
DECODERS = [
    ("ntsclock: key establishment", lambda data: NTS.read_grant(from_bytes(data)),
     [ke_records(*GOOD, (6, b"a.example.org"), (7, b"\0\x7b"))], ValueError),
    ("ntsclock: extension fields", lambda data: NTS.split_fields(data, 48), [NTS_QUERY, NTS_ANSWER], ValueError),
    ("ntsclock: unique identifier", NTS.identifier_of, [NTS_QUERY, NTS_ANSWER], ValueError),
    ("ntsclock: authenticator", lambda data: NTS.open_answer(NTS_SIV, data), [NTS_ANSWER], ValueError),
    ("ntsclock: stored keys", lambda data: NTS.parse_keys(data.decode()), [NTS.format_keys(NTS_KEYS).encode()],
     ValueError),
    ("ntsclock: secrets of a session", lambda data: NTS.secret_of(data),
     [b"# by OpenSSL\nEXPORTER_SECRET %s %s\n" % (b"0" * 64, b"f" * 96)], ValueError),
]


def mutants(rng, good, count):
    """Random inputs, and good ones with bytes changed, cut, doubled and moved."""
    for _ in range(count):
        data = bytearray(rng.choice(good)) if rng.random() < 0.9 else bytearray(random_bytes(rng, rng.randrange(200)))
        for _ in range(rng.randrange(1, 4)):
            a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
            change = rng.randrange(4)
            data[a:b] = (random_bytes(rng, min(b - a, 8)), b"", data[a:b] * 2, data[a:b][::-1])[change]
        yield bytes(data)


@pytest.mark.parametrize("name, function, good, allowed", DECODERS, ids=[row[0] for row in DECODERS])
def test_no_decoder_stumbles_over_3000_inputs(name, function, good, allowed, count=3000):
    for data in good:
        function(data)
    for data in mutants(random.Random(SEED), good, count):
        with contextlib.suppress(allowed):
            function(data)


@pytest.mark.long
@pytest.mark.parametrize("name, function, good, allowed", DECODERS, ids=[row[0] for row in DECODERS])
def test_no_decoder_stumbles_over_a_million_inputs(name, function, good, allowed):
    test_no_decoder_stumbles_over_3000_inputs(name, function, good, allowed, 10**6)
