#!/usr/bin/env python3
"""test_all.py - every test of clockspeed in Python

SYNOPSIS
    ./test_all.py [--long] [pytest options and names]
    ./test_all.py --sync

DESCRIPTION
    Runs on its own on a fresh machine, in 4 minutes on two cores.  Where pytest can't be
    imported, it is installed into a private virtual environment, .test-venv, beside this
    file; where that can't be made, root gets the system's package.

    The tests use real parts: chronyd on loopback ports, daemontools, the shells.  A test
    whose part is not installed is skipped with the reason; with CI=true in the environment
    it fails.  No test touches the clock of this machine: what would set it runs against a
    fake clock here, and for real in a virtual machine (.ci/run).

OPTIONS
    --long   run the tests that take long too: millions of inputs, a flood, a year
    --sync   copy each shared block of the first script that has it over its other copies

EXIT STATUS
    pytest's: 0 all passed, 1 some failed; 111 pytest can't be installed
"""
import os
import re
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(HERE, ".test-venv")
# In the order in which a block that several share is copied by --sync.
SCRIPTS = ("clockview.py", "clockadd.py", "sntpclock.py", "taiclock.py", "ntsclock.py", "taiclockd.py",
           "clockspeed.py", "clockctl", "clockctl-check", "clockctl-graph")


def install_step(command):
    """Run it -> "", or the last line that it said when it failed."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode(errors="replace").strip() or "no reason"
    return said.splitlines()[-1].strip() if done.returncode else ""


def install_pytest():
    """A Python that has pytest: from a private virtual environment, or the system's package."""
    python, why = os.path.join(VENV, "bin", "python"), "interrupted"
    try:
        why = (install_step([sys.executable, "-m", "venv", VENV])
               or install_step([python, "-m", "pip", "install", "--quiet", "pytest"]))
    finally:
        if why:
            shutil.rmtree(VENV, ignore_errors=True)
    if not why:
        return python
    command = ("apt-get install -qq -y --no-install-recommends python3-pytest" if shutil.which("apt-get") else
               "apk add --quiet py3-pytest" if shutil.which("apk") else "")
    failed = "unable to make %s: %s" % (VENV, why)
    if command and os.getuid() == 0:
        sys.stderr.write("test_all.py: %s; installing a package: %s\n" % (failed, command))
        if sys.stdin.isatty():
            input("Enter goes on, Ctrl-C stops: ")
        why = install_step(command.split())
        if not why:
            return "/usr/bin/python3"
        failed = "unable to install pytest: " + why
    mend = "as root: " + command if command else "install pytest"
    sys.stderr.write("test_all.py: fatal: %s; %s\n" % (failed, mend))
    sys.exit(111)


def marked_blocks(text):
    """The shared blocks of a script: {first line: text from there to the end marker}."""
    blocks = re.findall(r"^# ==== shared.*?^# ==== end shared.*?\n", text, re.M | re.S)
    assert len(blocks) == text.count("\n# ==== shared"), "a shared block does not end"
    return {block.partition("\n")[0]: block for block in blocks}


def sync():
    """Copy each shared block of the first script that has it over its other copies."""
    first = {}
    for name in SCRIPTS:
        with open(os.path.join(HERE, name), "r+") as file:
            text = before = file.read()
            for title, block in marked_blocks(text).items():
                text = text.replace(block, first.setdefault(title, block))
            if text != before:
                file.seek(0)
                file.write(text)
                file.truncate()
                print("wrote " + name)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--long"]
    choice = [] if "--long" in sys.argv else ["-m", "not long"]
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
    sys.exit(pytest.main(["-p", "no:cacheprovider", "-o", "markers=long: takes long, runs with --long", "-rs"]
                         + choice + (words or ["-q"]) + [os.path.abspath(__file__)]))

# ==== what the tests share =========================================================================
import contextlib
import datetime
import errno
import functools
import getpass
import importlib.machinery
import importlib.util
import io
import json
import pathlib
import pwd
import random
import select
import signal
import socket
import ssl
import stat
import struct
import tempfile
import threading
import time
import xml.etree.ElementTree

import pytest

CI = os.environ.get("CI") == "true"
UTC_ENV = dict(os.environ, CLOCK_SCALE="utc", TZ="UTC")
SEED = 20261124
LIMIT_SEC = 120  # of each test: far over what any takes on a busy machine
PATIENCE_SEC = 30  # for what takes milliseconds on an idle machine
DECODERS = []  # (name, function of bytes, good inputs, what it may raise): the last section fuzzes them
sys.dont_write_bytecode = True
# nohup and some shells have programs ignore these
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def limit(request):
    """No test can wait for ever."""
    def end(*_):
        raise TimeoutError("the test took more than its limit")
    signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT_SEC * (20 if request.node.get_closest_marker("long") else 1))
    yield
    signal.alarm(0)


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


def command_with(code, name, *args):
    """The command of a script, which runs after some code of ours."""
    python, flags, *rest = command_of(name, *args)
    start = "import os, sys\n%s\nsys.argv = sys.argv[1:]\n__file__ = sys.argv[0]\n" % code
    return [python, flags, "-c", start + "exec(open(__file__, 'rb').read())"] + rest


def without_the_right(command):
    """The command without the right to set the clock, for root too."""
    if not shutil.which("setpriv"):
        return command
    return ["setpriv", "--bounding-set=-sys_time", "--inh-caps=-sys_time"] * (os.getuid() == 0) + command


def run(name, *args, code="", stdin=b"", timeout=60, stdout=subprocess.PIPE, **env):
    """A script as a process of its own -> CompletedProcess with stdout in bytes and stderr as text."""
    command = without_the_right(command_with(code, name, *args) if code else command_of(name, *args))
    done = subprocess.run(command, input=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=timeout,
                          env=dict(UTC_ENV, **env))
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
    """A process that is killed at the end, whatever happens, with all that it started."""
    running = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def random_bytes(rng, count):
    return bytes(rng.randrange(256) for _ in range(count))


# ==== the layout ====================================================================================

def read_script(name):
    return pathlib.Path(path_of(name)).read_text()


def test_shared_blocks_are_the_same_bytes_in_every_copy():
    copies = {}
    for name in SCRIPTS:
        for title, block in marked_blocks(read_script(name)).items():
            copies.setdefault(title, []).append((name, block))
    for title, found in copies.items():
        names, blocks = zip(*found)
        assert len(set(blocks)) == 1 < len(names), "%s in %s" % (title, names)
        assert "shared by all" not in title or names == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_begins_in_the_same_way(name):
    program, text, manual = name.replace(".py", ""), read_script(name), load(name).__doc__
    assert text.startswith('#!/usr/bin/env python3\n"""%s - ' % program) and os.access(path_of(name), os.X_OK)
    assert max(map(len, text.splitlines())) <= 110 and "\t" not in text
    for heading in ("SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "SEE ALSO"):
        assert "\n%s\n" % heading in manual
    version = "%s %s\n" % (program, load("clockview").RELEASE)
    for option, answer in (("-h", manual), ("--help", manual), ("--version", version)):
        assert run(name, option).stdout.decode() == answer
    without_docstrings = [sys.executable, "-OO"] + command_of(name, "--help")[1:]
    assert subprocess.check_output(without_docstrings).decode().startswith(program)
    done = run(name, "--no-such-option")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (100, b"", 1)
    assert done.stderr.startswith("%s: usage: %s" % (program, program))
    for stdout, why in ((">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")):
        done = subprocess.run(["sh", "-c", '"$@" ' + stdout, "sh"] + command_of(name, "--help"),
                              stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr.decode()) == (
            111, "%s: fatal: unable to write output: %s\n" % (program, why))
    interrupt = "sys.meta_path.insert(0, type('', (), {'find_spec': lambda *_: os.kill(os.getpid(), 2)}))"
    done = run(name, code=interrupt)  # by the first import
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


# ==== clockview, clockadd =========================================================================

VIEW, ADD = load("clockview"), load("clockadd")
# bytes, nanoseconds, last number: the packets of the specification, and marks that tell of themselves
PACKETS = (("ffffffffffffffff3b9ac80c00000000", -500, 0), ("00000000000000010000000000000000", 10**9, 0),
           ("00000000000000000000000017d78400", 0, 400000000), ("00000000000000000000000100000000", 1, 0),
           ("0000000000000000000000003b9a06b2", 0, 999950002), ("0000000000000000000000010000c350", 1, 50000))


def test_packets_of_the_specification():
    release = datetime.datetime.strptime(VIEW.RELEASE + "+0000", "%Y.%m%z")
    assert release.timestamp() == VIEW.RELEASE_SEC
    for text, ns, last in PACKETS:
        assert VIEW.pack(ns, last).hex() == text and VIEW.unpack(bytes.fromhex(text)) == (ns, last)
        assert VIEW.unpack(bytes.fromhex(text)[:12]) == (ns, 0)


@pytest.mark.parametrize("ns, last, size, after, line", [
    (-250000010, 0, 16, "16:41:43.999999999", ""), (10, 999950002, 16, "16:41:44.250000019", ""),
    (3600 * 10**9, 1, 12, "17:41:44.250000009", ""),
    (0, 999950002, 16, "16:41:44.250000009", "atto:   0.000000000999950002 s per tick\n"),
    (1, 0, 16, "16:41:44.250000010", "atto:   0.000000001000000000 s per tick\n"),
    (1, 610000021, 16, "16:41:44.250000010",
     "mark:   give or take 0.001000 s by its exchanges, 0.000000 s by its server\n"),
    (10**6, 720133918, 16, "16:41:44.251000009",
     "mark:   give or take 0.020130 s by its exchanges, 0.000611 s by its server\n")])
def test_clockview_shows_the_sum_and_what_a_mark_tells(ns, last, size, after, line):
    code = "import time; time.time_ns = lambda: 1795362104250000009"
    assert run("clockview", code=code, stdin=VIEW.pack(ns, last)[:size], TZ="XXX-1").stdout.decode() == (
        "before: 2026-11-22 16:41:44.250000009\nafter:  2026-11-22 %s\n%s" % (after, line))


@pytest.mark.parametrize("name", ("clockview", "clockadd"))
@pytest.mark.parametrize("packet, said", [
    (b"x" * 11, "data split across packets"), (b"x" * 13, "data split across packets"),
    (b"", "nothing came on standard input"),
    (b"\xff" * 16, "unable to read the adjustment: not a TAI64NA packet"),
    (b"\x7f" + b"\0" * 15, "unable to (show that time|set the clock): ")])
def test_what_is_no_adjustment_is_a_line(name, packet, said):
    refused(run(name, stdin=packet), "^%s: fatal: %s.*" % (name, said))


def test_clockview_takes_one_packet_of_many_and_does_not_wait_where_it_must_not():
    """As the original does, which a loop in a shell may read from."""
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    for sent, status in (b"", 111), (VIEW.pack(1) + VIEW.pack(2), 0), (b"", 0), (b"", 111):
        os.write(theirs, sent)
        done = subprocess.run(command_of("clockview"), stdin=ours, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
        assert done.returncode == status
        assert done.stderr.decode() == "clockview: fatal: nothing came on standard input\n" * (status == 111)
    os.close(ours)
    os.close(theirs)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not here")
def test_clockview_says_when_it_can_not_write():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command_of("clockview"), input=bytes(16), stdout=full, stderr=subprocess.PIPE)
    assert done.stderr == b"clockview: fatal: unable to write output: No space left on device\n"


@pytest.mark.parametrize("words, ns, status", [
    ("", -5 * 10**17, 0), ("-e 500", 5 * 10**8, 0), ("-e 500", -5 * 10**8 - 1, 111), ("-e 500 -f", 10**12, 0),
    ("-e x", 1, 100), ("here", 1, 100)])
def test_clockadd_steps_unless_that_is_over_its_limit(words, ns, status, monkeypatch, capfd):
    monkeypatch.setattr(ADD, "open", lambda *_, **__: io.BytesIO(ADD.pack(ns, 720133918)), raising=False)
    steps = []
    assert ADD.main(["clockadd"] + words.split(), steps.append) == status
    assert steps == [ns] * (status == 0)
    assert ("a step of -0.500 s is over the limit" in capfd.readouterr().err) is (status == 111)


def test_clockadd_sets_the_clock_where_the_kernel_can_not_add(monkeypatch):
    times = []
    monkeypatch.setitem(sys.modules, "ctypes", None)
    monkeypatch.setattr(ADD.time, "clock_settime_ns", lambda _, ns: times.append(ns))
    ADD.step_clock(10**12)
    assert abs(times[0] - time.time_ns() - 10**12) < PATIENCE_SEC * 10**9


def test_one_adjtimex_call_steps_and_leaves_the_unit_alone():
    for status, after in (0x41, [dict(modes=0x1000)]), (0x2041, []):
        seen = []
        ADD.step_kernel(lambda **fields: seen.append(fields) or {"status": status}, -3 * 10**8)
        assert seen == [{}, dict(modes=0x2100, sec=-1, frac=7 * 10**8)] + after


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="adjtimex is Linux's")
def test_adjtimex_reads_this_kernel():
    pytest.importorskip("ctypes")
    now = ADD.adjtimex()
    assert abs(now["sec"] - time.time()) < 10 and 9000 <= now["tick"] <= 11000 and 0 <= now["state"] <= 5


# ==== the exchange: sntpclock, taiclock =============================================================

SNTP, TAI = load("sntpclock"), load("taiclock")
SECOND_NS = 10**9
NEAR_NS = 50 * 10**6  # what a busy machine may take from an exchange


def udp_socket(address="127.0.0.1", port=0):
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, port))
    return sock


class Rogue:
    """A server in a thread: answer(query, n) -> the datagrams to send back for the nth query that it gets."""

    def __init__(self, answer, address="127.0.0.1", port=0):
        self.answer, self.queries = answer, []
        self.socket = udp_socket(address, port)
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            query, self.client = self.socket.recvfrom(2048)
            if not query:
                return self.socket.close()
            self.queries.append(query)
            for packet in self.answer(query, len(self.queries)):
                with contextlib.suppress(OSError):  # it asks no more
                    self.socket.sendto(packet, self.client)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.sendto(b"", self.socket.getsockname())


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
in_both = pytest.mark.parametrize("module", [SNTP, TAI], ids=["sntpclock", "taiclock"])


def ask(name, port, *args, hosts=("127.0.0.1",), **env):
    return run(name, "-p", port, *args, *hosts, **env)


def result_of(done):
    """What came out -> (offset, spread, root distance) in ns; the last two are rounded up to their digits."""
    assert done.returncode == 0, done.stderr
    offset_ns, last = SNTP.unpack(done.stdout)
    return (offset_ns, *VIEW.unpack_quality(last))


def is_off(done, off_ns=0, stderr="", most_ns=NEAR_NS):
    """Did it measure that, and say only that?"""
    return abs(result_of(done)[0] - off_ns) < most_ns and done.stderr == stderr


def refused(done, words):
    """It wrote nothing, and its one line on stderr ends so."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (111, b"", 1)
    assert re.search(words + r"\n$", done.stderr), done.stderr


def free_port(address="127.0.0.1"):
    with udp_socket(address) as free:
        return free.getsockname()[1]


@both
def test_the_result_is_the_servers_offset(name, answer):
    """On the tai scale this clock, which shows UTC, is 27 s slow."""
    for scale, off_ns, slow_sec in ("utc", 0, 0), ("utc", 123456789, 0), ("tai", -10**13 - 5, 27):
        with Rogue(lambda query, n: [answer(query, off_ns)]) as server:
            value_ns, spread_ns, _ = result_of(ask(name, server.port, CLOCK_SCALE=scale))
        assert abs(value_ns - off_ns - slow_sec * SECOND_NS) <= spread_ns < NEAR_NS
        assert len(server.queries) == len(set(server.queries)) == 10, "a cookie came twice"
    with Rogue(lambda query, n: [answer(query, SECOND_NS)], "::1") as server:
        for host in "::1", "::1%1":
            assert is_off(ask(name, server.port, hosts=[host]), SECOND_NS)
    with Rogue(lambda query, n: [answer(query, SECOND_NS)]) as server:
        began = time.monotonic()
        assert is_off(ask(name, server.port, "-r", 3, "-h", 200, hosts=["0"]), SECOND_NS)
        assert time.monotonic() - began >= 0.4 and len(server.queries) == 3


def test_the_scale_is_the_environments_or_the_zones(monkeypatch):
    for scale, second, offset_sec in ("utc", 60, 37), ("tai", 0, 10), ("", 0, 37), ("", 60, 10):
        monkeypatch.setenv("CLOCK_SCALE", scale)
        with monkeypatch.context() as patch:
            june = time.struct_time((1972, 6, 30, 23, 59, second, 4, 182, 0))
            patch.setattr(TAI.time, "localtime", lambda _: june)
            assert TAI.TAI_MINUS_CLOCK_SEC[TAI.clock_scale()] == offset_sec
    for name in "sntpclock", "taiclock", "ntsclock":
        refused(ask(name, 1, CLOCK_SCALE="gps"), "this clock's scale: CLOCK_SCALE is neither utc nor tai")


@pytest.mark.parametrize("spread_ns, distance_ns, last", [
    (20123000, 250000, 720133400), (1, 0, 10000000), (999, 0, 299900000), (10**9, 0, 910000000),
    (10001, 0, 410010000), (9999001, 0, 710000000), (9999 * 10**6, 0, 999990000), (9999 * 10**6 + 1, 0, 0),
    (1000, 1, 310000100), (1000, 1178, 310000100), (1000, 1180, 310000200), (1000, 1500 * 10**6, 310008700)])
@in_both
def test_what_a_mark_tells_of_itself_is_rounded_up(module, spread_ns, distance_ns, last):
    packed = module.pack_quality(spread_ns, distance_ns)
    assert packed // 100 == last // 100 and packed % 97 == (1 if last else 0)
    if packed:
        told = VIEW.unpack_quality(packed)
        assert spread_ns <= told[0] <= spread_ns * 1.001 + 1
        assert distance_ns <= told[1] <= max(distance_ns * 1.18, 1180)


@both
def test_what_fails_often_is_told_once_with_a_count(name, answer):
    hosts = ["127.0.0.1", "127.0.0.2", "no-such-host.invalid"]
    refused(ask(name, free_port(), "-v", 0, "-r", 4, hosts=hosts),
            "^%s: fatal: unable to get the time from %s: no usable answer; 127.0.0.1: Connection refused "
            r"\(4 times\); 127.0.0.2: Connection refused \(4 times\); no-such-host.invalid: .*"
            % (name, ", ".join(hosts)))
    with Rogue(lambda query, n: [answer(query)] if n != 2 else []) as server:
        for verbosity, line in (1, "%s: warning: unable to ask 127.0.0.1: timed out\n" % name), (0, ""):
            del server.queries[:]
            assert is_off(ask(name, server.port, "-r", 3, "-t", 200, "-v", verbosity), stderr=line)


def test_the_total_bounds_names_and_pauses_too(monkeypatch, capfdbinary):
    """getaddrinfo() can't be interrupted, so that a thread waits for it, while others are asked."""
    def slow(host, *args, find=socket.getaddrinfo, **options):
        return time.sleep(60) if host.startswith(b"slow") else find(host, *args, **options)
    monkeypatch.setattr(SNTP.socket, "getaddrinfo", slow)
    with Rogue(lambda query, n: [ntp_answer(query)]) as server, \
            Rogue(lambda query, n: [], "127.0.0.2", server.port) as silent:
        for args, size, said, queries in (
                (" ".join("slow%d" % n for n in range(200)), 0, b"; slow199: timed out\n", [0]),
                ("slow 127.0.0.1", 16, b": unable to ask slow: timed out\n", [10]),
                ("-t350 127.0.0.2 0", 16, b": unable to ask 127.0.0.2: timed out (3 times)\n", [10]),
                ("-h400 0", 16, b"", [2, 3])):
            began = time.monotonic()
            del server.queries[:]
            assert SNTP.main(["", "-T1000", "-p%d" % server.port] + args.split()) == (0 if size else 111)
            out, err = capfdbinary.readouterr()
            assert len(out) == size and err.endswith(said) and len(server.queries) in queries, args
            assert 0.4 < time.monotonic() - began < 10
        assert len(silent.queries) == 3


@in_both
def test_wrong_usage(module):
    for line in ("", "-r 0 0", "-r x 0", "-r", "-p 65536 0", "-p 0 0", "-e nan 0", "-e -1 0", "-t inf 0",
                 "-T 1.2.3 0", "-T 1000000000000 0", "-l 1%s 0" % (400 * "0"), "-x 0", "--force 0", "-h 5"):
        done = run(module.PROGRAM, *line.split())
        assert done.returncode == 100, line
        assert done.stderr.startswith("%s: usage: %s [" % (module.PROGRAM, module.PROGRAM)), line
    for words in "-fr7 a b", "-r7 -f -- a b", "-f -r 7 a b":
        settings = module.Settings(words.split(), 123)
        assert (settings.exchanges, settings.most_ns, settings.hosts) == (7, module.ANY, ["a", "b"]), words
    settings = module.Settings(["-p", "65535", "a"], 1)
    assert (settings.wait_ns, settings.total_ns, settings.most_ns) == (10**9, 10**10, 172800 * 10**9)
    settings = module.Settings("-e 0.25 -t 1 -T 2 -h 0 -l 0.5 a".split(), 9)
    assert (settings.most_spread_ns, settings.wait_ns, settings.total_ns) == (250000, 10**6, 2 * 10**6)
    assert (settings.pause_ns, settings.most_ns, settings.port) == (0, 43200 * 10**9, 9)


@pytest.mark.parametrize("off_ns, args, words, enough", [
    (-181440 * SECOND_NS, (), ": this clock is 2.1 days ahead; `clockctl set` sets it", ("-l", 2.2)),
    (2192 * 86400 * SECOND_NS, (), ": this clock is 6.0 years behind; `clockctl set` sets it", ("-l", 0)),
    (0, ("-e", 0.001), r": time uncertainty too large, 0\.00\d+ s", ("-e", 500))])
def test_what_exceeds_its_limit_is_refused_and_f_overrides(off_ns, args, words, enough):
    with Rogue(lambda query, n: [ntp_answer(query, off_ns)]) as server:
        refused(ask("sntpclock", server.port, "-r", 2, *args), words)
        for more in (*args, "-f"), enough:
            assert is_off(ask("sntpclock", server.port, "-r", 2, *more), off_ns)


@both
def test_answers_that_are_late_doubled_forged_or_from_elsewhere_do_not_count(name, answer):
    lie_ns, kept = 3600 * SECOND_NS, []
    elsewhere = udp_socket()

    def late(query, n):  # each query is answered, with a lie, only after the next one has come
        kept.append(query)
        return [answer(kept[-2], lie_ns)] if n > 1 else []

    def forged(query, n):
        elsewhere.sendto(answer(query, lie_ns), server.client)
        flood = 2000 if sys.platform == "linux" else 1  # more than the queue of a socket holds
        return flood * [answer(os.urandom(len(query)), lie_ns)] + [
            query, b"", b"x", answer(query)[:31], answer(query), answer(query, lie_ns)]
    with Rogue(late) as server:
        refused(ask(name, server.port, "-r", 3, "-t", 100), r"timed out \(3 times\)")
    with Rogue(forged) as server, elsewhere:
        assert is_off(ask(name, server.port)) and len(server.queries) == 10


@both
def test_several_servers_are_asked_at_once_and_falsetickers_are_named(name, answer):
    first = threading.Barrier(3, timeout=PATIENCE_SEC)

    def serve(off_ns):
        def together(query, n):
            if n == 1:
                first.wait()
            return [answer(query, off_ns)]
        return together
    one, two, three = hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    with Rogue(serve(0)) as server, Rogue(serve(SECOND_NS), two, server.port), \
            Rogue(serve(0), three, server.port), Rogue(lambda query, n: [], "127.0.0.5", server.port):
        done = ask(name, server.port, "-r", 5, "-t", 9000, "-T", 59000, hosts=hosts)
        assert abs(result_of(done)[0]) < NEAR_NS
        said = re.fullmatch(name + r": warning: 127.0.0.2, falseticker: offset (\+\d+) ns, .*\n", done.stderr)
        assert abs(int(said.group(1)) - SECOND_NS) < NEAR_NS
        for hosts in [one, two], [two, one, "127.1", "127.0.1"]:  # who has three names is asked once
            asked = len(server.queries)
            refused(ask(name, server.port, "-r", 1, hosts=hosts), ": no majority of the servers agrees")
            assert len(server.queries) == asked + 1
        for dead, why in ("127.0.0.4", "Connection refused"), ("127.0.0.5", "timed out"):  # it has no vote
            assert is_off(ask(name, server.port, "-r1", "-t500", hosts=[one, dead]),
                          stderr="%s: warning: unable to ask %s: %s\n" % (name, dead, why))


@both
def test_s_keeps_what_each_server_said(name, answer, tmp_path, request):
    request.addfinalizer(functools.partial(os.umask, os.umask(0o077)))
    kind, about = {"sntpclock": ("ntp", "1 54455354"), "taiclock": ("tai", "- -")}[name]
    (tmp_path / "elsewhere").write_text("before")
    for planted in "sources", "sources.tmp":
        (tmp_path / planted).symlink_to("elsewhere")
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4", "a.invalid"]
    with Rogue(lambda query, n: [answer(query)]) as server, \
            Rogue(lambda query, n: [answer(query, -SECOND_NS)], hosts[1], server.port), \
            Rogue(lambda query, n: [answer(query)], hosts[2], server.port):
        done = ask(name, server.port, "-v", 2, "-s", tmp_path, hosts=hosts)
        lines = (tmp_path / "sources").read_text().splitlines()
        assert ask(name, server.port, "-s", tmp_path / "none").stderr == (
            "%s: warning: unable to write %s/none/sources: No such file or directory\n" % (name, tmp_path))
    began = "%s %s " % (lines[0].split()[0], kind)
    assert abs(int(began.split()[0]) - time.time()) < LIMIT_SEC
    for line, host, off_ns, kind, verdict in (
            (lines[0], hosts[0], 0, "info", "agreed"), (lines[2], hosts[2], 0, "info", "agreed"),
            (lines[1], hosts[1], -SECOND_NS, "warning", "falseticker")):
        numbers = re.fullmatch(began + host + r" (-?\d+) (\d+) (\d+) 0 %s %s" % (about, verdict), line)
        value_ns, spread_ns, delay_ns = map(int, numbers.groups())
        assert abs(value_ns - off_ns) <= spread_ns and delay_ns < 2 * NEAR_NS
        said = "%s: %s: %s, %s: offset %+d ns, spread %d ns, delay %d ns, root distance 0 ns, "
        assert said % (name, kind, host, verdict, value_ns, spread_ns, delay_ns) in done.stderr
    assert lines[3] == began + "127.0.0.4 - - - - - - failed: Connection refused"
    assert lines[4].startswith(began + "a.invalid - - - - - - failed: ") and len(lines) == 5
    assert (tmp_path / "elsewhere").read_text() == "before" and sorted(os.listdir(tmp_path)) == [
        "elsewhere", "sources"]
    assert stat.S_IMODE(os.lstat(tmp_path / "sources").st_mode) == 0o644


@both
def test_signals_end_it_at_once(name, answer):
    for number in signal.SIGINT, signal.SIGTERM:
        with Rogue(lambda query, n: []) as server, process(
                command_of(name, "-p", server.port, "0"), stdout=subprocess.PIPE,
                stderr=subprocess.PIPE) as client:
            until(lambda: server.queries)
            client.send_signal(number)
            assert client.communicate(timeout=PATIENCE_SEC) == (b"", b"") and client.returncode == -number


@pytest.mark.skipif(not os.path.exists("/dev/pts/ptmx"), reason="no terminals here")
@pytest.mark.parametrize("name", ("sntpclock", "taiclock", "ntsclock"))
def test_a_terminal_gets_no_raw_bytes(name):
    ours, theirs = os.openpty()
    done = run(name, "0", stdout=theirs)
    said = r"%s: usage: the result is 16 raw bytes: %s \[.* host\.\.\. \| clockview\n" % (name, name)
    assert done.returncode == 100 and re.fullmatch(said, done.stderr)
    os.close(ours)
    os.close(theirs)


@in_both
def test_the_range_of_the_most(module):
    for ranges, wanted in (([(0, 10)], (0, 10, 1)), ([(0, 10), (5, 20), (50, 60)], (5, 10, 2)),
                           ([(0, 10), (20, 30)], (0, 30, 1)), ([(0, 30), (5, 10), (20, 25)], (5, 25, 2)),
                           ([(0, 10), (10, 20)], (10, 10, 2)), ([(0, 10), (5, 20), (-5, 8)], (5, 8, 3))):
        assert module.vote(ranges) == wanted


@in_both
def test_what_real_time_can_have_gained_on_the_clock(module):
    then = module.Reading(10**18, 5)
    for clock_ns, tick_ns, wanted in (
            (10**9, 10**9, (0, 0)), (10**9, 10**9 + 300, (0, 300)), (10**9, 10**9 - 300, (-300, 0)),
            (10**9, 10**9 + 251000, (0, 251000)), (10**9 + 251000, 10**9, (-251000, 0)),
            (10**9 + 251001, 10**9, (-752001, 249999)), (0, 10**9, (999499000, 1000501000))):
        now = module.Reading(then.clock_ns + clock_ns, then.tick_ns + tick_ns)
        assert module.gained(then, now) == wanted


@pytest.mark.parametrize("ppm, step_ns", [(500, 0), (-500, 0), (5000, 0), (-80000, 0), (0, 0), (0, -10**9),
                                          (0, 10**9)])
@in_both
def test_delays_and_a_slew_or_step_move_the_result_by_no_more_than_the_spread(module, ppm, step_ns):
    """Exchanges of 20 ms, up to 6 s before the end; the clock is slewed, or stepped 3 s before it."""
    rng, end_ns = random.Random(SEED), 6 * 10**9
    for _ in range(200):
        offset_ns, counter_ppm = rng.randrange(-10**9, 10**9), rng.uniform(-50, 50)

        def read(real_ns):
            clock_ns = 10**18 + real_ns - offset_ns + real_ns * ppm // 10**6 + step_ns * (real_ns > 3 * 10**9)
            return module.Reading(clock_ns, real_ns + round(real_ns * counter_ppm / 10**6))
        start_ns = rng.randrange(end_ns - 20 * 10**6)
        there_ns = 10**18 + start_ns + rng.randrange(20 * 10**6)
        came = read(start_ns + 20 * 10**6)
        sample = module.Sample(module.Answer(there_ns, there_ns, 0, 1, "-"), read(start_ns), came, came)
        value_ns, spread_ns, *_ = module.weigh([sample], read(end_ns), 0)
        assert abs(10**18 + end_ns - read(end_ns).clock_ns - value_ns) <= spread_ns < 13500000


@pytest.mark.skipif(sys.platform != "linux", reason="kernel stamps are Linux's")
def test_the_kernel_stamps_what_arrives():
    with Rogue(lambda query, n: [ntp_answer(query)] * 2 * (n != 3)) as rogue:
        settings = SNTP.Settings(["-r6", "-t100", "0"], rogue.port)
        settings.key = None
        server = SNTP.Server(settings, "0", ("127.0.0.1", rogue.port))
        SNTP.ask(server)
    assert len(server.samples) == 5 and server.failures == {"timed out": 1}
    last = server.samples[-1]  # a busy Linux takes some ms to begin with the stamps
    for before, after in (last.sent, last.came), (last.came, last.woke):
        assert before.clock_ns < after.clock_ns and before.tick_ns < after.tick_ns
    least_ns = min(sample.came.clock_ns - sample.sent.clock_ns for sample in server.samples)
    assert SNTP.weigh(server.samples, last.woke, 0).delay_ns in range(least_ns, least_ns + 70)


@pytest.mark.parametrize("stamp_ns, woke, came", [
    (None, (3000, 2050), (3000, 2050)), (0, (3000, 2050), (3000, 2050)), (2500, (3000, 2050), (2500, 1550)),
    (1000, (3000, 2050), (1000, 50)), (999, (3000, 2050), (3000, 2050)), (3001, (3000, 2050), (3000, 2050)),
    (999, (3000, 9050), (3000, 9050)),
    (6950, (9000, 2050), (9000, 2050))])  # somebody stepped the clock after the kernel stamped it
@in_both
def test_a_kernel_stamp_counts_only_between_our_own(module, stamp_ns, woke, came):
    ancillary = [(socket.IPPROTO_IP, 35, b"?" * 16), (socket.SOL_SOCKET, 11, b"?" * 16)]
    if stamp_ns is not None:
        ancillary.append((socket.SOL_SOCKET, 35, struct.pack("@ll", stamp_ns and 1, stamp_ns)))
    sent, woke, came = [module.Reading(10**9 + clock_ns, tick_ns)
                        for clock_ns, tick_ns in ((1000, 50), woke, came)]
    assert module.arrival(ancillary, sent, woke) == came


@in_both
def test_clocks_are_read_again_when_the_scheduler_came_between(module, monkeypatch):
    for took, wanted in (([900], 0), ([1001, 800], 1), ([9000, 9000, 1000, 1], 2), ([9000, 5000, 5000], 1),
                         ([5000, 9000, 9000], 0)):
        ticks = iter([tick for n, ns in enumerate(took) for tick in (n * 10**6, n * 10**6 + ns)])
        clocks = iter(range(len(took)))
        monkeypatch.setattr(module.time, "clock_gettime_ns", lambda _: next(ticks))
        monkeypatch.setattr(module.time, "time_ns", lambda: next(clocks))
        assert module.read_clocks() == (wanted, wanted * 10**6 + took[wanted] // 2)
        monkeypatch.undo()


@pytest.mark.parametrize("near, addresses", [
    (True, "10.1.2.3 127.9.9.9 169.254.1.1 172.16.0.1 192.168.7.7 fc00::1 fe80::1%lo ::ffff:10.1.2.3 ::1"),
    (False, "9.9.9.9 172.15.0.1 172.32.0.1 192.167.0.1 128.0.0.1 11.0.0.1 ::ffff:9.9.9.9 2600::1")])
def test_public_addresses_are_spared(near, addresses, monkeypatch):
    paused = []
    monkeypatch.setattr(SNTP.socket.socket, "connect", lambda sock, address: None)
    monkeypatch.setattr(SNTP.time, "sleep", paused.append)
    for address in addresses.split():
        assert SNTP.is_near(address) is near
    settings = SNTP.Settings(["a"], 1)
    settings.key = None
    server = SNTP.Server(settings, "a", (address, 1))
    SNTP.ask(server)  # nothing can be sent
    assert (sum(server.failures.values()), paused) == ((10, 9 * [0]) if near else (4, 3 * [2]))


def test_a_name_with_many_addresses_is_as_many_servers_up_to_four(monkeypatch):
    found = [(socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("2001:db8::%d" % n, 123, 0, 0)) for n in (1, 2)] \
        + [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("192.0.2.%d" % n, 123)) for n in range(1, 5)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    host = SNTP.Server(SNTP.Settings(["pool.example"], 123), "pool.example")
    assert [server.name for server in SNTP.find_servers(host)] == [
        "pool.example/" + address for address in ("2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2")]


# ==== sntpclock =====================================================================================

@contextlib.contextmanager
def chronyd(home, *lines, port=None):
    """A real one -> its port.  It can't touch the clock."""
    need("chronyd")
    port, conf = port or free_port(), home / "chrony.conf"
    conf.write_text("port %d\ncmdport 0\nbindcmdaddress /\nuser %s\nallow\npidfile %s\n%s\n" % (
        port, getpass.getuser(), home / "chronyd.pid", "\n".join(lines)))
    command = without_the_right(["chronyd", "-U", "-x", "-d", "-f", str(conf)])
    with process(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        def answered():
            assert server.poll() is None, server.stdout.read().decode()
            return ask("sntpclock", port, "-r1", "-t100").stdout
        until(answered)
        yield port


@pytest.mark.parametrize("precision, most_ns", [("", 10**6), ("clockprecision 1e-3", 2 * 10**6)])
def test_a_real_chronyd_and_one_with_a_coarse_clock(precision, most_ns, tmp_path):
    """The latter randomises what is below a millisecond: half of the time it seems to send first."""
    with chronyd(tmp_path, "local stratum 1", precision) as port:
        for hosts in ["127.0.0.1"], ["::1"], ["127.0.0.1", "::1"]:
            done = ask("sntpclock", port, "-v", 2, hosts=hosts)
            value_ns, spread_ns, distance_ns = result_of(done)
            assert abs(value_ns) <= spread_ns < most_ns and distance_ns == 0 and "warning" not in done.stderr
            assert done.stderr.count("ns, root distance 0 ns, stratum 1, reference 7f7f0101\n") == len(hosts)


SERVER_ASKED = SNTP.Server(None, "somebody")


def decoded(**fields):
    query = SNTP.ntp_query()
    packet = ntp_answer(query, **fields)
    return SNTP.decode_answer(SERVER_ASKED, packet) if SNTP.answers(query, packet) else None


@pytest.mark.parametrize("fields, words", [
    (dict(flags=0xe4), "the server is not synchronised"), (dict(stratum=16), "is not synchronised"),
    (dict(stratum=0, refid=bytes(4)), "the server is not synchronised: stratum 0, no reason"),
    (dict(stratum=0, refid=b"INIT"), "stratum 0, INIT"), (dict(stratum=0, refid=b"\n\x1b[m"), r"0, \?\?\[m"),
    (dict(flags=0x23), "answer of mode 3, version 4"), (dict(flags=0x25), "mode 5"), (dict(flags=4), "n 0"),
    (dict(receive=0), "answer without time"), (dict(transmit=0), "answer without time"),
    (dict(receive=ntp_stamp(10**18 + 2000), transmit=ntp_stamp(10**18)), "sent before the query came"),
    (dict(receive=5 * 2**22 + 2**60, transmit=2**60, precision=-10), "sent before the query came"),
    (dict(precision=1), "up to 2.0 s off"), (dict(precision=127), "s off"),
    (dict(delay=3 * 2**16), "up to 1.5 s off"), (dict(delay=2**16, dispersion=2**16), "1.5 s off"),
    (dict(delay=2**32 - 1, dispersion=2**32 - 1), "up to 98304.0 s off")])
def test_answers_that_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        decoded(**fields)


def test_answers_that_are_taken_and_their_times_in_the_era_that_holds_the_release():
    for fields in (dict(flags=0x1c), dict(flags=0x5c), dict(flags=0x9c), dict(flags=0x0a), dict(stratum=15),
                   dict(delay=3 * 2**16 - 2), dict(precision=0), dict(precision=-128)):
        assert decoded(**fields)
    assert decoded(originate=1) is None and not SNTP.answers(SNTP.ntp_query(), bytes(47))
    base = 2**64 - 2**40
    for precision, early in (-10, 0), (-10, 2**22), (-32, 0), (-128, 0):
        answer = decoded(precision=precision, receive=base + early, transmit=base, delay=2**16, dispersion=1)
        at_ns, coarse_ns, early_ns = SNTP.stamp_ns(base), (10**9 >> -precision) + 1, early * 10**9 >> 32
        assert answer == (at_ns + early_ns + coarse_ns, at_ns - coarse_ns, 500015258, 1, "54455354")
    first = SNTP.RELEASE_SEC
    for sec in first, 2**32 - 2208988800 - 1, 2**32 - 2208988800, first + 2**32 - 1:
        assert SNTP.stamp_ns(ntp_stamp(sec * 10**9)) == (sec + 37) * 10**9
    assert SNTP.stamp_ns(ntp_stamp(first * 10**9) - 1) == (first + 37 + 2**32) * 10**9 - 1


@pytest.mark.parametrize("word, said", [(word, "kiss-o'-death " + word) for word in ("DENY", "RSTR", "RATE")]
                         + [("", "it says that its answer took longer than we waited for it")])
@pytest.mark.parametrize("before", (0, 2))
def test_only_kisses_of_death_end_that_servers_part(word, said, before):
    """What came before counts, but after DENY and RSTR."""
    slow = dict(receive=ntp_stamp(2 * 10**18), transmit=ntp_stamp(2 * 10**18 + 10**9))
    fields = dict(stratum=0, refid=word.encode()) if word else slow
    with Rogue(lambda query, n: [ntp_answer(query, **(fields if n == before + 1 else {}))]) as server:
        done = ask("sntpclock", server.port, "-r", 3)
    assert len(server.queries) == (before + 1 if word else 3)
    if word == "RATE" and before or not word:
        assert is_off(done, stderr="sntpclock: warning: unable to ask 127.0.0.1: %s\n" % said)
    else:
        refused(done, ": no usable answer; 127.0.0.1: " + said)


@pytest.mark.parametrize("one, two, wanted_ns", [
    (0x4000, 0x4000, (150000000, 1, 250000000)), (0x4000, 0x2000, (212500000, 1, 125000000)),
    (0x8000, 0x2000, (337500000, 37500000, 125000000)), (0x1000, 0x1000, None)])
def test_ranges_are_widened_by_the_root_distance(one, two, wanted_ns):
    """Each is sure of itself to some us, and 0.3 s from the other: that is within what both admit, or not."""
    with Rogue(lambda query, n: [ntp_answer(query, dispersion=one)]) as server, Rogue(
            lambda query, n: [ntp_answer(query, 3 * 10**8, delay=2 * two)], "127.0.0.2", server.port):
        done = ask("sntpclock", server.port, hosts=["127.0.0.1", "127.0.0.2"])
    if wanted_ns:
        value_ns, spread_ns, distance_ns = result_of(done)
        assert abs(value_ns - wanted_ns[0]) < NEAR_NS and abs(spread_ns - wanted_ns[1]) < NEAR_NS
        assert 1 <= distance_ns / wanted_ns[2] < 1.18
    else:
        refused(done, ": no majority of the servers agrees")


HEX_KEY = "HEX:" + bytes(range(16)).hex()
KEYS = """# keys, as chronyc keygen writes them
1 MD5 ASCII:sixteen-bytes-16
2 SHA1 HEX:933F62BE1D604E68A81B557F18CFA200483F5B70
3 SHA256 chrysanthemum-and-lotus
4 SHA384 {0}
5 SHA512 {0}
""".format(HEX_KEY)


@pytest.mark.parametrize("line, said", [
    ("7 SHA256 HEX:", "it has 0 bytes, and 16 are the least"), ("7 SHA256 ASCII:", "0 bytes"),
    ("7 SHA1 fifteen-bytes-1", "15 bytes"), ("7 SHA1 ASCII:fifteen-bytes-1", "15 bytes"),
    ("7 SHA1 HEX:" + 15 * "00", "15 bytes"), ("7 SHA1 HEX:0g", "non-hexadecimal"),
    ("7 SHA256", "its line is not the number, MD5 or SHA1 or SHA256 or SHA384 or SHA512, and the key"),
    ("7 AES128 " + HEX_KEY, "its line is not"), ("7 SHA256 %s x" % HEX_KEY, "its line is not"),
    ("7", "its line is not"), ("#7 MD5 " + HEX_KEY, "is not there"), ("77 MD5 " + HEX_KEY, "is not there")])
def test_keys_that_are_refused(line, said):
    with pytest.raises(ValueError, match=said):
        SNTP.parse_key(KEYS + line + "\n", 7)


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(KEYS)
    path.chmod(0o640)
    return path


def test_authentication_with_a_real_chronyd(keys, tmp_path):
    with chronyd(tmp_path, "local stratum 1", "keyfile %s" % keys) as port:
        for ident in range(1, 6):
            assert is_off(ask("sntpclock", port, "-k", keys, "-K", ident)), ident


def test_key_files_and_options_that_are_refused(keys, tmp_path):
    for mode, ident, said in ((0o604, 1, "take key 1 from %s: others can read or write it"),
                              (0o602, 1, "take key 1 from %s: others can read or write it"),
                              (0o600, 9, "take key 9 from %s: it is not there")):
        keys.chmod(mode)
        refused(ask("sntpclock", 1, "-k", keys, "-K", ident), said % keys)
    for args in [["-k", keys], ["-K", 1]] + [["-k", keys, "-K", ident] for ident in (0, "1x", 2**32)]:
        assert ask("sntpclock", 1, *args).returncode == 100
    os.mkfifo(tmp_path / "fifo", 0o600)
    refused(ask("sntpclock", 1, "-k", tmp_path / "fifo", "-K", 1), "it is not there")


def test_only_what_is_authenticated_counts(keys):
    key, other = SNTP.read_key(str(keys), 2), SNTP.read_key(str(keys), 1)
    for tamper in (lambda answer: answer, lambda answer: answer + bytes(4),
                   lambda answer: answer + SNTP.mac(key, answer)[:-1],
                   lambda answer: answer + SNTP.mac(other, answer),
                   lambda answer: answer + SNTP.mac(key, answer) + b"?",
                   lambda answer: answer + SNTP.mac(key, answer + b"?")):
        with Rogue(lambda query, n: [tamper(ntp_answer(query, stratum=0, refid=b"DENY"))]) as server:
            done = ask("sntpclock", server.port, "-k", keys, "-K", 2, "-r", 2)
        refused(done, r"answer not authenticated with the key \(2 times\)")
        assert [len(query) for query in server.queries] == [72, 72]


# ==== taiclock ======================================================================================

def test_labels_that_are_taken():
    """The label of Unix second 1483228800, the first after the last leap second, is 2^62 and 37 s more."""
    query, other = TAI.make_query(None), TAI.make_query(None)
    assert len(query) == 32 and query[:20] == other[:20] == b"ctai" + bytes(16) and query[20:] != other[20:]
    for atto, more_ns in ("00000000", 0), ("00000001", 1), ("3b9ac9ff", 1):  # an attosecond is no lie
        packet = b"stai" + bytes.fromhex("40000000586846a5" + "00000005" + atto) + query[20:]
        sent_ns = 1483228837 * 10**9 + 5
        assert TAI.decode(None, query, packet) == (sent_ns + more_ns, sent_ns, 0, "-", "-")
    with Rogue(lambda query, n: [tai_answer(query)[:16] + query[16:]]) as server:  # as an s6-taiclockd does
        assert is_off(ask("taiclock", server.port, "-r", 20))


def test_what_is_no_answer_is_ignored_and_what_is_no_label_refused():
    query = TAI.make_query(None)
    right = tai_answer(query)
    changed = [right[:at] + bytes([right[at] ^ 1]) + right[at + 1:] for at in (0, 1, 2, 3, 20, 31)]
    for packet in [query, right[:-1], right + b"?", b"", bytes(32)] + changed:
        assert TAI.decode(None, query, packet) is None
    for label in bytes(8) + b"\xff" * 8, b"\x80" + bytes(15), bytes(8) + bytes.fromhex("000000003b9aca00"):
        with pytest.raises(ValueError, match="not a TAI64NA"):
            TAI.decode(None, query, b"stai" + label + query[20:])
    for label in bytes(16), b"\x7f" + b"\xff" * 7 + bytes(8):  # true labels of absurd times
        with Rogue(lambda query, n: [b"stai" + label + query[20:]]) as server:
            refused(ask("taiclock", server.port, "-r", 1), "is [0-9]{3,}.* years .*")


def test_the_value_is_by_our_own_stamps_and_the_bound_by_the_kernels():
    """It stamps 50 ns after we sent, and we learn of its answer as late: 0 is the truth."""
    answer = TAI.Answer(150, 150, 0, "-", "-")
    for woke_ns, offset_ns, spread_ns in (200, 0, 50), (160, 20, 30), (300, -50, 100):
        sample = TAI.Sample(answer, *[TAI.Reading(ns, ns) for ns in (100, 160, woke_ns)])
        later = TAI.Sample(answer, *[TAI.Reading(ns, ns) for ns in (100, 160, 999)])
        for samples in [sample], [sample, later], [later, sample]:
            assert TAI.weigh(samples, sample.came, 7)[:3] == (offset_ns - 7, spread_ns, 60)
        assert SNTP.weigh([sample], sample.came, 0)[:3] == (20, 30, 60)


NTP_QUERY, TAI_QUERY = SNTP.ntp_query(), TAI.make_query(None)
DECODERS += [
    ("sntpclock: an answer", lambda data: SNTP.decode_answer(SERVER_ASKED, data.ljust(48)),
     [ntp_answer(NTP_QUERY), ntp_answer(NTP_QUERY) + bytes(20)], ValueError),
    ("sntpclock: its cookie", lambda data: SNTP.answers(NTP_QUERY, data), [ntp_answer(NTP_QUERY)], ()),
    ("sntpclock: a key file", lambda data: SNTP.parse_key(data.decode("latin-1"), 2), [KEYS.encode()],
     ValueError),
    ("taiclock: an answer", lambda data: TAI.decode(None, TAI_QUERY, data), [tai_answer(TAI_QUERY)],
     ValueError),
]


# ==== ntsclock ======================================================================================

NTS = load("ntsclock")
DAY_SEC, YEAR_SEC = 86400, 365 * 86400


@pytest.mark.parametrize("key, associated, plain, sealed", [
    ("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
     "101112131415161718191a1b1c1d1e1f2021222324252627", "112233445566778899aabbccddee",
     "85632d07c6e8f37f950acd320a2ecc9340c02b9690c4dc04daef7f6afe5c"),
    ("7f7e7d7c7b7a79787776757473727170404142434445464748494a4b4c4d4e4f",
     "00112233445566778899aabbccddeeffdeaddadadeaddadaffeeddccbbaa99887766554433221100 "
     "102030405060708090a0 09f911029d74e35bd84156c5635688c0",
     b"this is some plaintext to encrypt using SIV-AES".hex(),
     "7bdb6e3b432667eb06f4d14bff2fbd0fcb900f2fddbe404326601965c889bf17"
     "dba77ceb094fa663b7a3f748ba8af829ea64ad544a272e9c485b62a3fd5c0d")])
def test_the_vectors_of_rfc_5297(key, associated, plain, sealed):
    siv, parts = NTS.Siv(bytes.fromhex(key)), list(map(bytes.fromhex, associated.split()))
    assert siv.seal(parts, bytes.fromhex(plain)).hex() == sealed
    assert siv.open(parts, bytes.fromhex(sealed)).hex() == plain


class Authority:
    """A certificate authority, and hosts that it vouches for."""

    def __init__(self, home, days=36500):
        need("openssl")
        self.home, self.path = home, str(home / "ca.crt")
        (home / "ca.conf").write_text(
            "[ca]\ndefault_ca=here\n[here]\ndatabase=index\nrand_serial=yes\nnew_certs_dir=.\npolicy=any\n"
            "default_md=sha256\nunique_subject=no\n[any]\ncommonName=supplied\n")
        (home / "index").touch()
        self.make_key("ca", "-x509", "-days", str(days), "-addext", "basicConstraints=critical,CA:TRUE",
                      "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        self.make_key("host")
        self.good = self.host()

    def openssl(self, *words):
        subprocess.run(("openssl",) + words, cwd=self.home, check=True, stderr=subprocess.DEVNULL)

    def make_key(self, name, *words):
        self.openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                     "-keyout", name + ".key", "-out", name + ".crt", "-subj", "/CN=" + name, *words)

    def host(self, since_sec=-DAY_SEC, until_sec=YEAR_SEC, names="DNS:localhost,IP:127.0.0.1"):
        """-> (certificate, key) of a host, valid between those times from now."""
        now = datetime.datetime.now(datetime.timezone.utc)  # which goes beyond 2038 on 32 bits too
        since, until_ = [(now + datetime.timedelta(seconds=sec)).strftime("%Y%m%d%H%M%SZ")
                         for sec in (since_sec, until_sec)]
        (self.home / "ext").write_text(
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
            "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\nsubjectAltName=%s\n" % names)
        path = self.home / (os.urandom(4).hex() + ".crt")
        self.openssl("ca", "-batch", "-notext", "-config", "ca.conf", "-cert", "ca.crt", "-keyfile", "ca.key",
                     "-in", "host.crt", "-out", path.name, "-startdate", since, "-enddate", until_,
                     "-extfile", "ext")
        return str(path), str(self.home / "host.key")


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


def ke_records(*records):
    return b"".join(NTS.HEAD.pack(kind, len(body)) + body for kind, body in records + ((0x8000, b""),))


def sealed_answer(siv, query, header, cookies=()):
    message, nonce = header + NTS.field(NTS.IDENTIFIER, NTS.identifier_of(query)), os.urandom(16)
    sealed = siv.seal([message, nonce], b"".join(NTS.field(NTS.COOKIE, cookie) for cookie in cookies))
    return message + NTS.field(NTS.AUTHENTICATOR, struct.pack(">HH", 16, len(sealed)) + nonce + sealed)


def kiss(query, word, siv=None):
    """A kiss-o'-death, authentic by keys or without."""
    packet = ntp_answer(query, stratum=0, refid=word)
    if siv:
        return sealed_answer(siv, query, packet)
    return packet + NTS.field(NTS.IDENTIFIER, NTS.identifier_of(query))


class NtsHost:
    """An NTS server of our own, which can do what real ones don't: talk(tls, grant) speaks in key
    establishment, reply(good answer, keys, query, n) -> the packets that are sent."""

    def __init__(self, certificate, off_sec=0, talk=lambda tls, grant: tls.sendall(grant),
                 reply=lambda good, *_: [good], ntp_address="127.0.0.1"):
        self.off_ns, self.talk, self.reply = off_sec * 10**9, talk, reply
        self.keylog, path = NTS.open_keylog()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(*certificate)
        self.context.set_alpn_protocols(["ntske/1"])
        self.context.keylog_filename = path
        self.keys, self.used, self.sessions = {}, [], 0
        self.ntp, self.tcp = Rogue(self.answer, ntp_address), socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        threading.Thread(target=self.establish, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tcp.shutdown(socket.SHUT_RDWR)  # which ends accept()
        self.ntp.__exit__()
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
                        secret = NTS.secret_of(os.pread(self.keylog, 9999, 0))
                        os.ftruncate(self.keylog, 0)
                        keys = [NTS.Siv(key) for key in NTS.export_keys(secret)]
                        self.sessions += 1
                        self.talk(tls, ke_records(
                            (0x8001, b"\0\0"), (0x8004, b"\0\x0f"), (7, struct.pack(">H", self.ntp.port)),
                            *[(5, cookie) for cookie in self.new_cookies(keys, 8)]))

    def new_cookies(self, keys, count):
        cookies = [os.urandom(100) for _ in range(count)]
        self.keys.update(dict.fromkeys(cookies, keys))
        return cookies

    def answer(self, query, n):
        (one, _, _), (two, _, cookie), *_, (_, start, body) = fields = NTS.split_fields(query, 48)
        assert (one, two) == (NTS.IDENTIFIER, NTS.COOKIE)
        self.used.append(cookie)
        query_siv, answer_siv = keys = self.keys[cookie]
        assert query_siv.open([query[:start], body[4:20]], body[20:]) == b""
        good = sealed_answer(answer_siv, query, ntp_answer(query, self.off_ns),
                             self.new_cookies(keys, len(fields) - 2))
        return self.reply(good, answer_siv, query, n)


@contextlib.contextmanager
def nts_chronyd(home, authority, port=None):
    """A real one -> its port, the same for NTP and key establishment; each start has new keys."""
    port = port or free_port()
    lines = "ntsport %d\nntsservercert %s\nntsserverkey %s" % (port, *authority.good)
    with chronyd(home, "local stratum 1", lines, port=port):
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield port


@pytest.fixture(scope="module")
def chronyd_port(tmp_path_factory, authority):
    with nts_chronyd(tmp_path_factory.mktemp("chronyd"), authority) as port:
        yield port


def nts_args(authority, port, *args, host="127.0.0.1"):
    return [str(arg) for arg in ("-p", port, "-c", authority.path, "-r2", "-l0", *args, host)]


def nts_run(authority, port, *args, host="127.0.0.1", **env):
    return run("ntsclock", *nts_args(authority, port, *args, host=host), **env)


def test_a_real_chronyd_tells_the_time_by_nts(chronyd_port, authority, tmp_path):
    """By both hashes of TLS 1.3, and a thousand times in a row."""
    for suite in "TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384":
        (tmp_path / "conf").write_text(
            "openssl_conf=a\n[a]\nssl_conf=b\n[b]\nsystem_default=c\n[c]\nCiphersuites=" + suite)
        done = nts_run(authority, chronyd_port, "-v2", host="localhost", OPENSSL_CONF=str(tmp_path / "conf"))
        assert abs(result_of(done)[0]) <= result_of(done)[1] < 10**7
        assert "warning" not in done.stderr and "new keys, 8 cookies" in done.stderr
    assert is_off(nts_run(authority, chronyd_port, "-r", 1000, "-T", 60000, "-s", tmp_path), most_ns=10**7)
    assert len(NTS.parse_keys((tmp_path / "nts").read_text()).cookies) == NTS.COOKIES
    assert " nts 127.0.0.1 " in (tmp_path / "sources").read_text()


def test_a_server_with_new_keys_is_asked_for_them_once(authority, tmp_path):
    port = None
    for words in ("", "timed out"):  # a NAK may be forged: the answer is waited for
        with nts_chronyd(tmp_path, authority, port) as port:
            done = nts_run(authority, port, "-s", tmp_path, "-r", 3, "-v", 2)
            assert result_of(done) and done.stderr.count("new keys") == 1 and words in done.stderr


def exchange_with(port, authority):
    """-> (Server, query, answer)."""
    settings = NTS.Settings(nts_args(authority, port), 4460, "c:")
    settings.stored, settings.servers = {}, []
    server, = NTS.find_servers(NTS.Server(settings, "127.0.0.1"))
    query = NTS.make_query(server)
    with udp_socket() as sock:
        sock.sendto(query, server.address)
        return server, query, sock.recv(2000)


def test_no_answer_counts_that_is_not_the_servers_to_its_last_bit(chronyd_port, authority):
    server, query, answer = exchange_with(chronyd_port, authority)
    other, other_query, other_answer = exchange_with(chronyd_port, authority)
    (_, a, _), (_, b, _) = NTS.split_fields(answer, 48)  # identifier and authenticator
    size, number = len(answer), int.from_bytes(answer, "big")
    wrong = [(number ^ 1 << bit).to_bytes(size, "big") for bit in range(8 * size)]
    wrong += [answer[:end] for end in range(size)]
    for more in b"\0", bytes(4), NTS.field(0x2004, bytes(12)), answer[a:b], answer[b:]:
        wrong.append(answer + more)
    wrong += [answer[:48] + answer[b:] + answer[a:b], answer[:48] + answer[b:], answer[:b] + other_answer[b:],
              other_answer, answer[:a + 4] + NTS.identifier_of(other_query) + answer[b:]]
    assert [packet for packet in wrong if NTS.decode(server, query, packet)] == []
    assert NTS.decode(server, other_query, answer) is None is NTS.decode(other, query, answer)
    assert len(server.keys.cookies) == 7 and NTS.decode(server, query, answer)
    assert len(server.keys.cookies) == 8


NOT_VALID = "its certificate is valid from .* to .*, and its time is "


@pytest.mark.parametrize("certificate, off_sec, words", [
    ({}, 0, None), (dict(since_sec=20 * YEAR_SEC, until_sec=21 * YEAR_SEC), int(20.5 * YEAR_SEC), None),
    ({}, 2 * YEAR_SEC, NOT_VALID), (dict(since_sec=-3600), -7200, NOT_VALID),
    (dict(since_sec=-9 * DAY_SEC, until_sec=-DAY_SEC), 0, NOT_VALID),
    (dict(names="DNS:time.example.org"), 0, "TLS: .*mismatch"),
    ("self-signed", 0, "TLS: self.signed certificate"), ("old authority", YEAR_SEC, NOT_VALID),
    ("another", 0, "TLS: unable to get local issuer certificate")])
def test_a_certificate_is_judged_by_name_authority_and_the_time_measured(
        certificate, off_sec, words, authority, tmp_path):
    if certificate == "old authority" and sys.version_info < (3, 10):
        pytest.skip("this Python shows the host's certificate only")
    if isinstance(certificate, dict):
        pair = authority.host(**certificate)
    else:
        other = Authority(tmp_path, 30)
        pair = other.host(until_sec=9 * YEAR_SEC)
        if certificate == "self-signed":
            pair = other.path, str(other.home / "ca.key")
        authority = other if certificate == "old authority" else authority
    with NtsHost(pair, off_sec) as server:
        done = nts_run(authority, server.port)
    if words:
        refused(done, words + ".*")
    else:
        assert is_off(done, off_sec * 10**9, most_ns=10**9)


def test_stored_keys_are_used_for_28_days_and_within_the_certificates_time(authority, tmp_path):
    with NtsHost(authority.good) as server:
        for days, sessions in ((0, 1), (27, 1), (29, 2), (58, 3), (1000, 4)):
            server.off_ns = days * DAY_SEC * 10**9
            done = nts_run(authority, server.port, "-s", tmp_path)
            assert server.sessions == sessions and (done.returncode == 0) is (days < 365)


def test_keys_of_no_use_are_not_kept(authority, tmp_path):
    """A run with one exchange can't ask for others any more: the next one does.  Other hosts' keys stay."""
    near = "127.0.0.1"
    with NtsHost(authority.good) as server:
        for host, exchanges, days, nak, status, sessions in (
                (near, 1, 0, False, 0, 1), (near, 1, 29, False, 111, 1), (near, 1, 29, False, 0, 2),
                (near, 1, 29, True, 111, 2), (near, 1, 29, False, 0, 3), ("localhost", 1, 29, False, 0, 4),
                (near, 1, 29, False, 0, 4), (near, 4, 29, True, 111, 5)):  # once in a run
            server.off_ns = days * DAY_SEC * 10**9
            server.reply = lambda good, siv, query, n: [kiss(query, b"NTSN") if nak else good]
            done = nts_run(authority, server.port, "-r", exchanges, "-t", 500, "-s", tmp_path, host=host)
            assert (done.returncode, server.sessions) == (status, sessions)


def drip(tls, grant):
    for byte in grant:
        tls.sendall(bytes([byte]))
        time.sleep(0.2)


GOOD = NTPV4, SIV, COOKIE = (0x8001, b"\0\0"), (0x8004, b"\0\x0f"), (5, bytes(100))


@pytest.mark.parametrize("talk, words", [
    (drip, "timed out"), (lambda tls, grant: tls.sendall((NTS.HEAD.pack(99, 1000) + bytes(1000)) * 99),
                          "its answer never ends"),
    (lambda tls, grant: None, "its answer is cut short|eof"),
    (lambda tls, grant: tls.sendall(grant[:-1]), "its answer is cut short|eof"),
    ([(0x8002, b"\0\0")], "it says: it does not know a critical record"),
    ([(0x8002, b"\0\1")], "it says: bad request"), ([(0x8002, b"\0\x09")], "it says: error 9"),
    ([*GOOD, (0x8003, b"\0\1")], "it says: warning 1"),
    ([*GOOD, (0x8063, b"")], "unknown critical record, 99"),
    ([(0x8001, b""), SIV, COOKIE], "it does not offer NTPv4"), ([(0x8001, b"\0\1"), SIV, COOKIE], "NTPv4"),
    ([NTPV4, (0x8004, b""), COOKIE], "AEAD_AES_SIV_CMAC_256"), ([NTPV4, (4, b"\0\x10"), COOKIE], "AEAD_AES"),
    ([NTPV4, *GOOD], "does not offer NTPv4"), ([NTPV4, SIV], "it sent no cookie"),
    ([NTPV4, SIV, (5, b""), (5, bytes(3)), (5, bytes(4096))], "it sent no cookie"),
    ([*GOOD, (7, b"\0\0")], "of no server"), ([*GOOD, (7, b"\1")], "of no server"),
    ([*GOOD, (6, b"\x1b[2J")], "of no server"), ([*GOOD, (6, b"\xff")], "of no server"),
    ([*GOOD, (6, b"one"), (6, b"two")], "of no server")])
def test_a_key_establishment_that_goes_wrong_is_a_line_in_time(talk, words, authority):
    def answer(tls, grant):
        talk(tls, grant) if callable(talk) else tls.sendall(ke_records(*talk))
    with NtsHost(authority.good, talk=answer) as server:
        before_sec = time.monotonic()
        done = nts_run(authority, server.port, "-T", 2000)
        assert time.monotonic() - before_sec < PATIENCE_SEC / 6 and server.used == []
    refused(done, ": no usable answer; 127.0.0.1: key establishment: .*(%s).*" % words)


def test_the_ntp_server_is_where_key_establishment_says_and_other_tls_is_refused(authority):
    def elsewhere(tls, grant):
        tls.sendall(NTS.HEAD.pack(6, 9) + b"127.0.0.2" + NTS.HEAD.pack(0x4001, 2) + bytes(2) + grant)
    with NtsHost(authority.good, talk=elsewhere, ntp_address="127.0.0.2") as server:
        done = nts_run(authority, server.port, "-v", 2)
        assert result_of(done) and "127.0.0.1/127.0.0.2, agreed: " in done.stderr and len(server.used) == 2
        server.context.set_alpn_protocols(["http/1.1"])
        refused(nts_run(authority, server.port), "it does not speak ntske/1|TLS: .*application.*")
        server.context.maximum_version = ssl.TLSVersion.TLSv1_2
        refused(nts_run(authority, server.port), "TLS: .*version")


@pytest.mark.parametrize("reply, words", [
    (lambda good, siv, query, n: [kiss(query, b"NTSN"), good], ""),
    (lambda good, siv, query, n: [kiss(query, b"RATE"), kiss(query, b"DENY"), good], "was not authentic"),
    (lambda good, *_: [good[:-1] + bytes([good[-1] ^ 1]), good, good], "was not authentic"),
    (lambda good, siv, query, n: [kiss(query, b"DENY", siv)], "fatal: .*kiss-o'-death DENY"),
    (lambda good, siv, query, n: [good if n == 1 else kiss(query, b"RATE", siv)], "warning: .*death RATE"),
    (lambda good, siv, query, n: [good if n == 1 else sealed_answer(siv, query, ntp_answer(
        query, 2 * YEAR_SEC * 10**9))], "fatal: .*its certificate is"),
    (lambda good, siv, query, n: [kiss(query, b"NTSN")], "fatal: .*does not know our keys any more"),
    (lambda good, siv, query, n: [ntp_answer(query)], "fatal: .*no usable answer")])
def test_only_what_is_authentic_counts(reply, words, authority):
    with NtsHost(authority.good, reply=reply) as server:
        done = nts_run(authority, server.port, "-t", 300)
    assert (done.returncode == 111) is words.startswith("fatal") and server.sessions == 1
    assert re.search(words or "^$", done.stderr)


def test_a_week_of_hourly_marks_takes_one_key_establishment(authority, tmp_path, capfd):
    """One packet in ten is lost; a busy machine may lose some more."""
    rng = random.Random(SEED)
    with NtsHost(authority.good, reply=lambda good, *_: [good] * (rng.random() > 0.1)) as server:
        words = nts_args(authority, server.port, "-s", tmp_path, "-r", 4, "-t", 50, "-v", 0)
        marks = [NTS.main(["ntsclock"] + words) for _ in range(7 * 24)]
    assert marks.count(0) > 150 and server.sessions == 1 and len(server.used) == 4 * 7 * 24


def test_a_killed_run_leaves_no_cookie_and_two_at_once_share_none(authority, tmp_path):
    with NtsHost(authority.good, reply=lambda *_: []) as server:  # which looks at the cookies
        command = command_of("ntsclock", *nts_args(authority, server.port, "-s", tmp_path, "-v", 0))
        with process(command, stdout=subprocess.PIPE):
            until(lambda: server.used)
        assert not (tmp_path / "nts").exists()
        server.reply = lambda good, *_: [good]
        for count in (1, 4, 4):
            runs = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
            assert [len(started.communicate()[0]) for started in runs] == [16] * count
        assert server.sessions >= 3


SPOILT = {  # what is put in place of dir/nts
    "link": lambda path: (path.rename(str(path) + ".own"), path.symlink_to(str(path) + ".own")),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
    "owner": lambda path: os.chown(path, 65534, -1),
    "directory": lambda path: os.chown(path.parent, 65534, -1), "mode": lambda path: path.chmod(0o640),
    "empty": lambda path: path.write_text(""), "torn": lambda path: path.write_text(path.read_text()[:-7]),
    "endless": lambda path: path.write_text(path.read_text() * 999)}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_damaged_or_foreign_store_is_as_good_as_none(kind, authority, tmp_path):
    if kind in ("owner", "directory") and os.getuid() != 0:
        pytest.skip("only root can give files away")
    with NtsHost(authority.good) as server:
        nts_run(authority, server.port, "-s", tmp_path)
        SPOILT[kind](tmp_path / "nts")
        before = (tmp_path / "nts").lstat()
        done = nts_run(authority, server.port, "-s", tmp_path)
        assert result_of(done) and server.sessions == 2
    after = (tmp_path / "nts").lstat()
    assert stat.S_ISREG(after.st_mode) and after.st_mode & 0o777 == 0o600
    assert (before.st_mtime_ns == after.st_mtime_ns) is (kind == "directory")  # another user's is left alone
    assert done.stderr == ("ntsclock: warning: no keys are kept, since %s is another user's\n" % tmp_path
                           if kind == "directory" else "")


@pytest.mark.parametrize("memory", [True, False])
def test_no_secret_leaves_the_program(memory, authority, tmp_path, monkeypatch, capfd):
    secrets, read, before = [], NTS.secret_of, set(os.listdir("/tmp"))
    monkeypatch.setattr(NTS, "secret_of", lambda keylog: secrets.append(read(keylog)) or secrets[-1])
    with NtsHost(authority.good) as server:
        if not memory:
            monkeypatch.delattr(NTS.os, "memfd_create", raising=False)
        assert NTS.main(["ntsclock"] + nts_args(authority, server.port, "-s", tmp_path, "-v", 2)) == 0
    stored = (tmp_path / "nts").read_text()
    said = "".join(capfd.readouterr()) + (tmp_path / "sources").read_text()
    assert secrets[0].hex() not in stored
    keys = NTS.parse_keys(stored)
    secrets += [keys.query_key, keys.answer_key] + keys.cookies
    assert "127.0.0.1" in said and not [secret for secret in secrets if secret.hex() in said]
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("ntsclock.")]


NTS_SIV = NTS.Siv(bytes(range(32)))
NTS_KEYS = NTS.Keys("host", 4460, "::1", 123, 0, 1, bytes(32), bytes(32), [bytes(100)])


@pytest.mark.parametrize("size, cookies, placeholders", [
    (100, 8, 0), (100, 7, 1), (100, 1, 7), (300, 1, 2), (548, 1, 1), (552, 1, 0), (1024, 1, 0)])
def test_a_query_asks_for_the_cookies_that_lack_and_fits_into_a_packet(size, cookies, placeholders):
    server = NTS.Server(None, "host")
    server.keys, server.spent = NTS_KEYS._replace(cookies=[bytes(size)] * cookies), None
    query = NTS.make_query(server)
    assert [kind for kind, _, _ in NTS.split_fields(query, 48)] == (
        [NTS.IDENTIFIER, NTS.COOKIE] + placeholders * [NTS.PLACEHOLDER] + [NTS.AUTHENTICATOR])
    assert len(query) <= 1232 and len(server.keys.cookies) == cookies - 1


NTS_QUERY = NTS.ntp_query() + NTS.field(NTS.IDENTIFIER, bytes(32)) + NTS.field(NTS.COOKIE, bytes(100))
NTS_ANSWER = sealed_answer(NTS_SIV, NTS_QUERY, ntp_answer(NTS_QUERY), [bytes(100)] * 8)
DECODERS += [
    ("ntsclock: key establishment", NTS.read_grant,
     [ke_records(*GOOD, (6, b"a.example.org"), (7, b"\0\x7b"))], ValueError),
    ("ntsclock: extension fields", lambda data: NTS.split_fields(data, 48), [NTS_QUERY, NTS_ANSWER],
     ValueError),
    ("ntsclock: unique identifier", NTS.identifier_of, [NTS_QUERY, NTS_ANSWER], ValueError),
    ("ntsclock: authenticator", lambda data: NTS.open_answer(NTS_SIV, data), [NTS_ANSWER], ValueError),
    ("ntsclock: stored keys", lambda data: NTS.parse_keys(data.decode()),
     [NTS.format_keys(NTS_KEYS).encode()], ValueError),
    ("ntsclock: secrets of a session", NTS.secret_of,
     [b"# by OpenSSL\nEXPORTER_SECRET %s %s\n" % (b"0" * 64, b"f" * 96)], ValueError),
]


# ==== taiclockd =====================================================================================

SERVER = load("taiclockd")
VECTORS = (  # what is sent, how many bytes come back
    (b"ctai", None), (b"", None), (b"ctai" + bytes(15), None), (b"stai" + bytes(28), None), (b"cta", None),
    (b"Ctai" + bytes(28), None), (b"ctai" + bytes(16) + bytes(range(12)), 32), (b"ctai" * 7, 28),
    (b"ctai" * 5, 20), (b"ctai" * 5 + b"x", 21), (b"ctai" + bytes(252), 256), (b"ctai" * 76, 256))
QUERY = VECTORS[6][0]
LACKS = {  # what the system lacks, without which there are no batches, or no IPv6
    "nothing": "", "ctypes": "sys.modules['ctypes'] = None",
    "recvmmsg": "import ctypes, types\n"
                "ctypes.PyDLL = lambda _: types.SimpleNamespace(recvmmsg=lambda *_: -1, sendmmsg=None)",
    "ipv6": "import socket; socket.has_dualstack_ipv6 = lambda: False"}
HOSTS = ("127.0.0.1", "::1")
TWO_SOCKETS = ("-i", HOSTS[0], "-i", HOSTS[1])


@contextlib.contextmanager
def taiclockd(*args, lack="nothing", says=b"", pass_fds=(), **env):
    """A server on a free port -> its process, with its first line as `start`, and its `port`; it says no more
    than that.  What it lacks is a word of LACKS or code to run before."""
    with process(command_with(LACKS.get(lack, lack), "taiclockd", "-p", "0", *args), pass_fds=pass_fds,
                 env=dict(UTC_ENV, **env), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        server.start = server.stdout.readline().decode()
        assert server.start.startswith("start: serving on "), server.stderr.read()
        server.port = int(re.search(r"port (\d+)", server.start).group(1))
        yield server
        server.terminate()  # while it waits for queries
        assert server.wait(PATIENCE_SEC) == -signal.SIGTERM and server.stderr.read() == says


def client_of(port, host="127.0.0.1"):
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE_SEC)
    sock.connect((host, port))
    return sock


def check_reply(query, reply, before_ns, tai_minus_clock_sec=37):
    """The reply is the query with a label from between then and now."""
    assert len(reply) == min(len(query), 256) and reply[:4] == b"stai" and reply[20:] == query[20:256]
    sec, nano, atto = struct.unpack(">QII", reply[4:20])
    assert before_ns <= (sec - 2**62 - tai_minus_clock_sec) * 10**9 + nano <= time.time_ns() and atto == 0


def exchange(sock, datagrams):
    """Send them all, and a query -> what came back up to that query's reply, which nothing may follow."""
    marker = b"ctai" + bytes(16) + os.urandom(12)
    for datagram in datagrams + [marker]:
        sock.send(datagram)
    replies = []
    while not replies or replies[-1][20:] != marker[20:]:
        replies.append(sock.recv(65536))
    return replies[:-1]


@pytest.mark.parametrize("lack, args, scale", [
    ("nothing", (), "utc"), ("nothing", TWO_SOCKETS, "tai"), ("ctypes", (), "tai"),
    ("ctypes", TWO_SOCKETS, "utc"), ("recvmmsg", (), "utc"), ("ipv6", (), "utc")])
def test_taiclockd_answers_the_vectors_of_the_specification(lack, args, scale):
    everywhere, hosts = ("0.0.0.0", HOSTS[:1]) if lack == "ipv6" else ("::", HOSTS)
    with taiclockd(*args, lack=lack, CLOCK_SCALE=scale) as server:
        assert server.start == "start: serving on %s\n" % ", ".join(
            "%s port %d" % (place, server.port) for place in args[1::2] or [everywhere])
        before_ns = time.time_ns()
        for host in hosts:
            with client_of(server.port, host) as sock:
                for query, size in VECTORS:
                    replies = exchange(sock, [query])
                    assert list(map(len, replies)) == [size] * (size is not None), query
                    for reply in replies:
                        check_reply(query, reply, before_ns, {"utc": 37, "tai": 10}[scale])
        comm = "/proc/%d/comm" % server.pid
        assert not os.path.exists(comm) or until(lambda: open(comm).read() == "taiclockd\n")


@contextlib.contextmanager
def halted(server):
    """What is sent to it meanwhile comes at once."""
    server.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
    yield
    server.send_signal(signal.SIGCONT)


def hostile_datagram(rng):
    """Mostly near misses: cut, lengthened, altered queries; half are what clients send."""
    query = b"ctai" + bytes(12) + random_bytes(rng, rng.choice((12, 16)))
    return rng.choice([query, query, query, query[:rng.randrange(32)], query + bytes(rng.randrange(1, 1400)),
                       b"s" + query[1:], query[:rng.randrange(4)] + b"\xff" + query[4:], b""])


@pytest.mark.parametrize("lack", ("nothing", "ctypes"))
@pytest.mark.parametrize("args", [(), TWO_SOCKETS], ids=["one socket", "two sockets"])
@pytest.mark.parametrize("rounds", [20, pytest.param(1500, marks=pytest.mark.long)])
def test_taiclockd_gives_each_query_of_a_flood_its_own_reply_and_does_not_grow(lack, args, rounds):
    rng, sizes_kb, raw = random.Random(SEED), [], None
    with taiclockd(*args, lack=lack) as server, contextlib.ExitStack() as stack:
        with contextlib.suppress(PermissionError):  # which root has
            raw = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP))
        from_port_0 = struct.pack(">4H", 0, server.port, 40, 0) + QUERY  # to which nothing can be sent
        socks = [stack.enter_context(client_of(server.port, host)) for host in HOSTS * 10]
        for number in (1, 2, 63, 64, 65, 100) * rounds:
            before_ns, sent = time.time_ns(), {sock: [] for sock in socks}
            with halted(server):
                for _ in range(number):
                    sock, datagram = rng.choice(socks), hostile_datagram(rng)
                    sock.send(datagram)
                    sent[sock].append(datagram)
                    if raw and rng.random() < 0.1:
                        raw.sendto(from_port_0, ("127.0.0.1", 0))
            for sock, datagrams in sent.items():
                queries = [each for each in datagrams if len(each) >= 20 and each.startswith(b"ctai")]
                replies = exchange(sock, [])
                assert len(replies) == len(queries)
                for query, reply in zip(queries, replies):
                    check_reply(query, reply, before_ns)
            status = pathlib.Path("/proc/%d/status" % server.pid).read_text()
            sizes_kb.append(int(re.search(r"VmRSS:\s+(\d+)", status).group(1)))
        assert sizes_kb[-1] <= sizes_kb[5] + 64


@pytest.mark.parametrize("args, place", [((), "::"), (("-i", "127.0.0.1"), "127.0.0.1"), (("-r",), "::")])
def test_taiclockd_says_who_has_its_port(args, place, monkeypatch):
    with udp_socket() as sock:
        port = sock.getsockname()[1]
        who = ", which process %d has" % os.getpid() if os.path.exists("/proc/net/udp") else ""
        refused(run("taiclockd", "-p", port, *args), "^taiclockd: fatal: unable to bind %s port %d%s: %s"
                % (place, port, who, os.strerror(errno.EADDRINUSE)))
        refused(run("taiclockd", "-p", port, "-i", "no.invalid"),  # that is not for want of a port
                "^taiclockd: fatal: unable to bind no.invalid port %d: .*" % port)
    table = "sl local_address\n1: 00000000:0FAE 00000000:0000 07 0:0 0:0 0 1234 0 999999999\n"
    monkeypatch.setattr(SERVER, "open", lambda _: io.StringIO(table), raising=False)
    assert (SERVER.holders(4014), SERVER.holders(4015)) == (", which a process of user 1234 has", "")


def test_taiclockds_share_a_port_by_option_and_tell_it():
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(taiclockd("-r"))
        second = stack.enter_context(taiclockd("-r", "-p", first.port))
        assert second.start.endswith(" port %d, which process %d has\n" % (first.port, first.pid))
        socks = [stack.enter_context(client_of(first.port)) for _ in range(50)]  # of 50 ports
        with halted(first):
            for sock in socks:
                sock.send(QUERY)
            until(lambda: select.select(socks, [], [], 0.2)[0])
            assert 0 < len(select.select(socks, [], [], 0)[0]) < 50
        for sock in socks:
            sock.recv(256)


def test_taiclockd_tells_each_reason_of_its_silence(monkeypatch, capfd):
    clock, release_sec = SERVER.Clock(True, 37), SERVER.RELEASE_SEC
    unset = "silent: the clock shows a time before this program's release; it was never set\n"
    unsynchronised = "silent: the kernel says that its clock is not synchronised\n"
    for sec, state, said, label in (
            (10, 5, unset, None), (11, 5, "", None), (release_sec - 1, 0, "", None),
            (release_sec, 5, unsynchronised, None), (release_sec + 1, 5, "", None),
            (release_sec + 2, 0, "answering: the clock can be trusted now\n", "400000006ae68127"),
            (release_sec + 2, 5, "", "400000006ae68127"),  # it is asked once a second
            (release_sec + 3, 5, unsynchronised, None), (10, 0, unset, None)):
        monkeypatch.setattr(SERVER.time, "time_ns", lambda: sec * 10**9 + 5)
        monkeypatch.setattr(SERVER, "kernel_state", lambda: state)
        head = label and b"stai" + bytes.fromhex(label + "00000005" + "00000000")
        assert (clock.head(), capfd.readouterr().err) == (head, said and "taiclockd: info: " + said)


@pytest.mark.parametrize("maker", (SERVER.in_batches,
                                   lambda sock: functools.partial(SERVER.answer_one, sock)))
def test_taiclockd_is_silent_while_its_clock_is_not_set_and_rests_after_errors(maker, monkeypatch):
    pauses, clock = [], SERVER.Clock(False, 37)
    with udp_socket() as sock:
        sock.setblocking(False)
        answer = maker(sock)
        with client_of(sock.getsockname()[1]) as client:
            for now_sec, datagram, counts in (
                    (0, QUERY, (1, 1, 0)), (SERVER.RELEASE_SEC, b"x", (1, 0, 0)),
                    (SERVER.RELEASE_SEC, QUERY[:31] + b"x", (1, 1, 1))):
                monkeypatch.setattr(SERVER.time, "time_ns", lambda: now_sec * 10**9)
                client.send(datagram)
                assert answer(clock) == counts
            assert client.recv(256)[20:] == datagram[20:]
        monkeypatch.setattr(SERVER.time, "sleep", pauses.append)
        assert (answer(clock), pauses) == ((0, 0, 0), [0.01])  # there is nothing


def test_taiclockd_tells_its_counts_once_an_hour(monkeypatch, capfd):
    now_sec = [0]
    rows = iter([(0, (64, 60, 50)), (3599, (1, 1, 1)), (3600, (1, 1, 1)),
                 (7199, (2, 2, 1)), (7200, (1, 0, 0))])

    def answer(sock, clock):
        now_sec[0], counts = next(rows)
        return counts
    monkeypatch.setitem(sys.modules, "ctypes", None)
    monkeypatch.setattr(SERVER, "answer_one", answer)
    monkeypatch.setattr(SERVER.time, "monotonic", lambda: now_sec[0])
    with udp_socket() as sock, pytest.raises(StopIteration):
        SERVER.serve([sock], None)
    assert capfd.readouterr().err == ("taiclockd: info: count: 52 answered, 4 ignored, 10 refused\n"
                                      "taiclockd: info: count: 1 answered, 1 ignored, 1 refused\n")


def test_taiclockd_takes_inherited_sockets_and_refuses_other_descriptors():
    inherit = "os.dup2(%d, 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')"
    with udp_socket() as sock, socket.socket() as tcp:
        sock.setblocking(False)
        fd, tcp_fd = sock.fileno(), tcp.fileno()
        with taiclockd(lack=inherit % fd, pass_fds=[fd]) as server, client_of(server.port) as client:
            assert server.start == "start: serving on 127.0.0.1 port %d\n" % sock.getsockname()[1]
            exchange(client, [])
        done = subprocess.run(command_with(inherit % tcp_fd, "taiclockd"), pass_fds=[tcp_fd],
                              stderr=subprocess.PIPE)
        assert done.returncode == 111 and done.stderr.endswith(b" not all of them are UDP sockets\n")


def test_taiclockd_asks_the_kernel_where_it_can():
    assert SERVER.kernel_state() in (-1, 0, 5)
    says = b"taiclockd: info: silent: the kernel does not say whether its clock is synchronised\n"
    with taiclockd(lack="ctypes", CLOCK_SERVE="synced", says=says) as server:
        until(lambda: select.select([server.stderr], [], [], 0)[0])


@pytest.mark.parametrize("args, env, status, said", [
    (args, {}, 100, "usage: " + SERVER.USAGE)
    for args in ("-p 65536", "-p -1", "-j 2", "-p", "here")] + [
    ("", dict(CLOCK_SERVE="sync"), 111, "fatal: unable to obey CLOCK_SERVE: it is neither synced nor empty"),
    ("", dict(CLOCK_SCALE="x"), 111,
     "fatal: unable to tell the clock's scale: CLOCK_SCALE is neither utc nor tai")])
def test_taiclockd_refuses_wrong_arguments_and_variables(args, env, status, said):
    done = run("taiclockd", *args.split(), **env)
    assert (done.returncode, done.stderr) == (status, "taiclockd: %s\n" % said)


# ==== the estimator =========================================================================


bench_all = load("bench_all")  # the simulated worlds, and what is wanted in them
NOISE_OF_FEW_SEEDS = 1.3  # how much looser than bench_all's limits, which are for many seeds
DAY_NS = 86400 * 10**9


@pytest.mark.parametrize("name", ("w 1e-9, 4 a mark, 3600 s", "LAN, 8 a mark, 1024 s", "20 us, wild",
                                  "w 1e-9, 2 ms, asked 10 ms"))
def test_estimator_reaches_what_is_wanted(name):
    options, goals = {**bench_all.SPREADS, **bench_all.WITHOUT}[name]
    found = bench_all.compare(options, [SEED, SEED + 1])
    for name, most in dict(goals, honesty=bench_all.RATIO_MOST).items():
        assert getattr(found, name) < most * NOISE_OF_FEW_SEEDS
    assert found.honesty > bench_all.RATIO_LEAST / NOISE_OF_FEW_SEEDS and not found.outside


@pytest.mark.parametrize("out, back, lean", ((bench_all.exponential(5e-3), bench_all.none, 1),
                                             (bench_all.none, bench_all.exponential(5e-3), -1),
                                             (bench_all.exponential(5e-3), None, 0)))
def test_estimator_learns_to_which_side_queueing_leans(out, back, lean):
    run = bench_all.simulate(SEED, 1, bench_all.Queues(out=out, back=back), bench_all.every(1024))
    assert run.estimator.bank.mean[2] == pytest.approx(lean, abs=0.35)
    assert run.rms(bench_all.DAY / 2) < 1.5e-3


@pytest.mark.parametrize("name", bench_all.CHANGES)
def test_estimator_notices_a_change_of_path_or_clock(name):
    (before, *after), worst = bench_all.after_change(bench_all.CHANGES[name], [SEED])
    if name.startswith("floor"):
        assert worst < 4 and max(after[5:]) < 2 * before
    else:
        assert after[0] > 1.5 * before, "or nothing happened"
        assert after[3] < 2.5 * before


def test_no_floor_rises_only_to_find_a_mark_of_a_burst_wild():
    for off_ns, count in (25 * 10**6, 88), (0, 3):
        estimator = bench_all.simulate(SEED, 1, bench_all.WAN, bench_all.every(1024)).estimator
        for index, off_of_this in enumerate((0, 0, off_ns), 1):
            tick_ns = estimator.last.tick_ns + 10**12
            spread_ns = min(estimator.path.spreads[:80]) + 35 * 10**6 + index
            assert estimator.mark(tick_ns, estimator.real(tick_ns)[0] + off_of_this, spread_ns) == "used"
        assert len(estimator.path.spreads) == count


def telling(spread_sec):
    return lambda *args: bench_all.normal(1e-3)(*args)._replace(spread_sec=spread_sec)


@pytest.mark.parametrize("noise, worse, most", [(telling(None), telling(0.02), 1.1)] + [
    (bench_all.normal(2e-5), bench_all.wild(bench_all.normal(2e-5), 0.0, [index]), 2) for index in range(3)])
def test_neither_a_spread_that_tells_nothing_nor_a_wild_beginning_does_much_harm(noise, worse, most):
    errors = [bench_all.simulate(SEED, 1, each, bench_all.every(1024)).rms(bench_all.DAY / 2)
              for each in (noise, worse)]
    assert errors[1] < most * errors[0]


@functools.lru_cache(None)
def settled_state(noise=1e-4, days=1, **options):
    run = bench_all.simulate(SEED, days, bench_all.normal(noise), bench_all.every(1024), **options)
    return json.dumps(run.estimator.state())


def settled(**options):
    """An estimator after some days of marks -> (it, the tick of its last mark, real time then)."""
    estimator = bench_all.Estimator.from_state(json.loads(settled_state(**options)))
    return estimator, estimator.last.tick_ns, estimator.real(estimator.last.tick_ns)[0]


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
        for _, mean, _ in state["awake"]:
            mean[1] = ppm * 1e3
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
    assert "used" in outcomes and sorted(used)[-3] < 0.1, "a slow core; 10 ms on a usual one"


def test_a_new_estimator_knows_what_it_is_told():
    estimator, models = bench_all.Estimator(50.0, 10.0), bench_all.CLOCKSPEED.MODELS
    assert estimator.rate() == pytest.approx((50, 10))
    assert list(estimator.bank.mean) == pytest.approx([0, 50e3, 0, 0, 0]), "the rest: more or less alike"
    assert estimator.bank.cov[3][3]**0.5 == estimator.bank.cov[4][4]**0.5 < 300, "alike"
    assert sum(model.share for model in models) == pytest.approx(1)


def test_estimator_refuses_what_is_no_mark():
    estimator, tick_ns, real_ns = settled()
    state = estimator.state()
    for mark in ((tick_ns, real_ns), (tick_ns - 1, real_ns), (None, real_ns), (tick_ns + 1, 1.5), ("1", "2"),
                 (1 << 65, real_ns), (tick_ns + 1, float("nan")), (True, real_ns), (tick_ns + 1, -1 << 200),
                 (tick_ns + 1, real_ns, -1), (tick_ns + 1, real_ns, 1e6), (tick_ns + 1, real_ns, 1 << 65)):
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
        before_ns, after_ns = (estimator.real(tick_ns + int((wait_sec + sec) * 1e9))[1] for sec in (-2, 2))
        assert wait_sec in (0, 1e8) or before_ns < target_ns < after_ns / 0.999
    assert estimator.next_mark(tick_ns, float("nan")) == estimator.next_mark(tick_ns, -1) == 0
    assert estimator.next_mark(tick_ns, float("inf")) == 1e8


def test_a_plan_takes_many_exchanges_where_queueing_is_the_noise_and_one_where_wander_is():
    estimator = bench_all.simulate(SEED, 1, bench_all.WAN, bench_all.every(1024)).estimator
    for target_ns, least, most in (10**6, 2, 8), (10**9, 1, 1):
        assert least <= estimator.next_mark_plan(estimator.last.tick_ns, target_ns).exchanges <= most
        assert estimator.next_mark_plan(estimator.last.tick_ns, target_ns, 1).exchanges == 1
    assert bench_all.Estimator().next_mark_plan(0, 10**6) == (64, 1)


@pytest.mark.parametrize("seed", (121, 138))
def test_no_plan_waits_for_a_week_because_the_first_marks_agreed_by_luck(seed):
    run = bench_all.simulate(seed, **bench_all.WITHOUT["w 1e-9, 2 ms, asked 10 ms"][0])
    assert run.rms(7.5 * bench_all.DAY) < 10e-3, "or 110 ms and more"


@pytest.mark.parametrize("world", WORLDS)
def test_variance_foretells_the_error(world):
    estimator, tick_ns, _ = settled(**world)
    tick_ns += 10**12
    factors = estimator.variance(tick_ns)
    for sec in (0, 60, 3600, 21600, 43200, 86400, 10**6, 10**7):
        foretold = sum(factor * sec**power for power, factor in enumerate(factors))**0.5
        error_ns = estimator.real(tick_ns + sec * 10**9)[1]
        assert error_ns * 0.95 < foretold < error_ns * (3 if world else 1.5)
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


def feed(kind, one, tick_ns, off_ns=0):
    """A mark, for an estimator or a bound."""
    return one.mark(tick_ns, 18 * 10**17 + tick_ns + off_ns, 10**7, *[10**6] * (kind is bench_all.Bound))


def test_states_go_on_to_the_last_bit():
    for kind, state in some_states():
        text = json.dumps(state)
        one, two = (kind.from_state(json.loads(text)) for _ in range(2))
        assert json.dumps(one.state()) == text
        for index in range(1, 5):
            two = kind.from_state(json.loads(json.dumps(two.state())))
            mark = 8 * 10**14 + index * 10**12, index % 2 * 10**5
            assert feed(kind, one, *mark) == feed(kind, two, *mark)
        assert json.dumps(one.state()) == json.dumps(two.state())


def damage(state, rng):
    """Change or drop something at a random depth."""
    here, inner = {}, state
    while inner and isinstance(inner, (dict, list)) and (not here or rng.random() > 0.15):
        here, key = inner, rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = here[key]
    if here and rng.random() < 0.2:
        del here[key]
    elif here:
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
            feed(kind, taken, tick_ns)
        if kind is bench_all.Bound:
            assert taken.at(tick_ns)[0] <= taken.at(tick_ns)[1]
        else:
            assert not taken.has_phase() or taken.real(tick_ns)[1] >= 0 and len(taken.variance(tick_ns)) == 4
            assert taken.rate()[1] >= 0 and min(taken.learned()) > 0 and abs(taken.rate_at(tick_ns)) <= 1000
            assert taken.next_mark_plan(tick_ns, 1e6).wait_sec >= 64
    assert outcomes == {"ValueError", "taken"}
    for state in (None, 1, "x", [], {}, float("nan")):
        for kind in (bench_all.Estimator, bench_all.Bound):
            with pytest.raises(ValueError):
                kind.from_state(state)


@pytest.mark.parametrize("world", ({}, {"daily_ppm": 1.0}, {"wander": 1e-10}))
def test_real_time_is_within_the_bound_which_grows_slowly_in_the_dark(world):
    noise = bench_all.Queues(asymmetry_sec=0.1 if world else 0.0)
    run = bench_all.simulate(SEED, 3, noise, bench_all.every(7200), bench_all.TwoPoints, dark_days=1, **world)
    assert not run.outside
    assert world or (run.widths[-1][1] - run.widths[-290][1]) / 2 < 15e-6 * 86400 / 10


def test_the_bound_is_what_marks_prove():
    """That its formula carries it on is tested with clockctl, which does that."""
    bound = bench_all.Bound()
    assert bound.at(5) is None and bound.coefficients() is None and bound.mark(5, 5, None, 1) == "refused"
    assert bound.mark(10**12, 10**18, 10**7, 10**6) == "used"
    assert bound.at(10**12) == (10**18 - 11 * 10**6, 10**18 + 11 * 10**6)
    assert bound.at(2 * 10**12)[1] - 10**18 == 10**12 + 11 * 10**6 + 10**9, "1000 ppm before a second mark"


def test_a_mark_that_contradicts_the_bound_begins_it_anew_and_wider():
    bound, outcomes = bench_all.Bound(), {}
    for index in range(1, 60):
        tick_ns, lie_ns = index * 36 * 10**11, 10**10 * (index == 50)
        outcomes[index] = bound.mark(tick_ns, 10**18 + tick_ns + lie_ns, 10**7, 10**6)
    assert [index for index in outcomes if outcomes[index] == "restarted"] == [50, 51]
    assert bound.allowed_ppm == 4 * bench_all.load("clockspeed").CHANGE_PPM
    bound.forget()
    assert bound.at(10**15) is None


def test_replay_makes_each_estimate_of_a_log_again():
    estimator, bound, lines, rng = bench_all.Estimator(), bench_all.Bound(), [], random.Random(SEED)
    start = "start: observing, CLOCK_MONOTONIC_RAW, scale utc, rate +5.0000 ppm, rate error 10.0000 ppm, "
    events = {4: ("suspend: 100 s", lambda: estimator.forget_phase(0.0)),
              8: ("counter: it went back by 3 s", lambda: estimator.forget_phase(1.0)),
              12: (start + "rate of etc/state", lambda: estimator.forget_phase(1.0)),
              16: (start + "rate of etc/atto, the rest of etc/state",
                   lambda: estimator.assume_rate(5.0, 10.0))}
    for index in range(1, 20):
        tick_ns, spread_ns = index * 10**12, rng.randrange(2 * 10**7, 3 * 10**7)
        mark = tick_ns, 18 * 10**17 + tick_ns + rng.randrange(10**6), spread_ns if index % 5 else None, 10**6
        if index in events:
            lines.append(events[index][0])
            events[index][1]()
            bound.forget()
        found = bench_all.replayed(estimator, bound, *mark)
        lines.append("@4000000068dcd2a5075bcd15 mark: tick %d ns, real %d ns, spread %s ns, distance %s ns,"
                     " offset +0.000123456 s, %s" % (*mark[:2], *(mark[2:] if mark[2] else "--"), found))
    assert bench_all.replay(lines) == (19, [])
    assert bench_all.replay(lines + [start + "phase and rate of etc/state", lines[-1]])[0] == 20
    assert len(bench_all.replay(lines[:5] + lines[6:])[1]) > 5, "each mark counts"


# ==== clockspeed: a simulated kernel ================================================================
CS = load("clockspeed")
HOUR_NS = 3600 * 10**9


class FakeKernel:
    """A counter, a system clock and adjtimex() that behave as Linux's do; real time passes by sleep()."""
    START_NS = 1796000000 * 10**9
    NEW = dict(freq=0, tick=10000, status=0x40, maxerror=16 * 10**6)

    def __init__(self, ppm=0.0, behind_ns=0, bias_ppm=0.0, boot="boot-1"):
        self.ppm, self.boot = ppm, boot  # real seconds per counter second - 1
        self.bias_ppm = bias_ppm  # what the system clock gains unasked
        self.tick, self.real, self.elapsed = 10**9, self.START_NS, 0.0
        self.clock = float(-behind_ns)  # system clock minus real time
        self.fields = dict(self.NEW, esterror=0, tai=0)
        self.slew_us = self.slewing_ns = self.slept_ns = 0
        self.steps = []
        self.copied_ns = 0  # the worst clock that the kernel could have copied to the hardware clock
        self.set_in = 0  # after so many calls, if any, somebody sets the clock an hour ahead

    def sleep(self, sec):
        """Let so many counter seconds pass; the kernel slews second by second."""
        while sec > 1e-9:
            slewing = self.slew_us or self.slewing_ns
            part = min(sec, 1 - self.elapsed % 1) if slewing else sec
            self.clock += part * (1e3 * (self.given_ppm() + self.bias_ppm - self.ppm) + self.slewing_ns)
            self.tick += round(part * 1e9)
            self.real += round(part * 1e9 * (1 + self.ppm / 1e6))
            self.fields["maxerror"] = min(16 * 10**6, self.fields["maxerror"] + 500 * part)
            if self.fields["maxerror"] >= 16 * 10**6:
                self.fields["status"] |= 0x40
            self.elapsed, sec = round(self.elapsed + part, 9), sec - part
            if self.elapsed % 1 == 0:
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

    def read(self):
        self.set_in -= 1
        if self.set_in == 0:
            self.set_clock(HOUR_NS)
        return self.tick, self.clock_ns()

    def clock_ns(self):
        return self.real + round(self.clock)

    def adjtimex(self, modes=0, **fields):
        self.read()
        assert not modes & 0x8000 or modes == 0x8001, "a single shot can't be combined"
        if modes == 0x8001:
            self.slew_us = fields["offset"]
        elif modes & 0x100:
            assert modes == 0x2100, "by nanoseconds"
            self.steps.append(fields["sec"] + fields["frac"] / 1e9)
            self.set_clock(fields["sec"] * 10**9 + fields["frac"])
        for bit, name in ((2, "freq"), (4, "maxerror"), (8, "esterror"), (0x10, "status"), (0x80, "tai"),
                          (0x4000, "tick")):
            if modes & bit and modes != 0x8001:
                self.fields[name] = fields["constant" if name == "tai" else name]
        assert abs(self.fields["freq"]) <= 32768000 and 9000 <= self.fields["tick"] <= 11000
        if not self.fields["status"] & 0x40:
            self.copied_ns = max(self.copied_ns, abs(self.clock))
        return dict(self.fields, maxerror=int(self.fields["maxerror"]), offset=self.slew_us)

    def given_ppm(self):
        return self.fields["freq"] / 65536 + (self.fields["tick"] - 10000) * 100

    def rate_error_ppm(self, seconds=600):
        """How fast the system clock moves off real time when nobody looks after it."""
        before = self.clock
        self.sleep(seconds)
        return (self.clock - before) / seconds / 1e3


class Simulation:
    """clockspeed on a FakeKernel, with its files in home/etc; `lines` is what it said after the start."""

    def __init__(self, home, kernel, **options):
        self.kernel, self.lines = kernel, []
        self.clock = CS.KernelClock(kernel.adjtimex, 10000)
        self.clock.read, self.clock.boot_id = kernel.read, lambda: kernel.boot
        self.clock.suspended_ns = lambda: kernel.slept_ns + kernel.tick % 300  # two clocks are read
        self.etc_path, say = home / "etc", self.lines.append
        self.home = CS.Home(str(home))
        self.daemon = CS.Clockspeed(self.clock, self.home, say=say, attempt=CS.Attempts(say), **options)
        start, = self.said("start: ")
        self.lines.remove(start)
        self.source = re.match(r"start: .* rate error [0-9.]+ ppm, (.*)", start).group(1)
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
        """A mark as an exact client makes it, but for error_sec."""
        self.take(CS.pack(round(error_sec * 1e9 - self.kernel.clock), last))

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

    def status(self):
        return json.loads((self.etc_path / "status").read_text())


@pytest.fixture
def simulate(tmp_path, monkeypatch):
    """Makes Simulations on directories below the test's own."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a month has some thousand
    made = []

    def make(kernel, name="home", **options):
        (tmp_path / name).mkdir(exist_ok=True)
        made.append(Simulation(tmp_path / name, kernel, **options))
        return made[-1]
    yield make
    for home in [simulation.home for simulation in made]:
        for fd in (home.etc_fd, home.fifo_fd, home.writer_fd):
            os.close(fd)


@pytest.mark.parametrize("off_sec, options, stepped", [
    (5, {}, True), (-86400, {}, True), (0.500001, {}, True), (0.499999, {}, False),
    (2, {"may_step": False}, False)])
def test_the_first_mark_steps_what_is_over_half_a_second(simulate, off_sec, options, stepped):
    kernel = FakeKernel(ppm=80, behind_ns=round(off_sec * 1e9), bias_ppm=2)
    simulation = simulate(kernel, **options)
    simulation.mark()
    assert kernel.steps == pytest.approx([off_sec] * stepped) and len(simulation.said("slew: ")) != stepped
    assert simulation.said("step: ") == [
        "step: the system clock by %+.9f s, by one of the first 3 marks of this boot" % off_sec] * stepped
    assert not stepped or abs(kernel.clock) < 1000
    simulation.settle(60, 300, 541, 1623)
    assert abs(kernel.clock) < (2e4 if stepped or off_sec < 1 else 1.1e9)
    assert not stepped or abs(kernel.rate_error_ppm()) < 0.1, "killed now, it runs on at the right rate"


@pytest.mark.parametrize("good, wrong, wrong_sec, steps", [
    (0, 1, 10, 2), (0, 1, -3600, 2), (0, 1, 74 * 365 * 86400, 2), (1, 3, 10, 1), (3, 3, 10, 0)])
def test_a_wrong_mark_leaves_nothing_behind_after_five_right_ones(simulate, good, wrong, wrong_sec, steps):
    """Until three are used a step can be undone; after that nothing steps, so that a lie costs little."""
    kernel = FakeKernel(ppm=20, behind_ns=10**8)
    simulation = simulate(kernel)
    for waits, error_sec in ((good * [1623], 0), (wrong * [300], wrong_sec), (5 * [1623], 0)):
        for wait_sec in waits:
            simulation.settle(wait_sec, error_sec=error_sec)
    assert len(kernel.steps) == steps and abs(kernel.clock) < (10e9 if good else 1e6)
    for kernel.boot in ("boot-1", "boot-2"):  # a restart, a reboot
        simulation = simulate(kernel)
        assert abs(simulation.daemon.known_ns - kernel.real) < 2000e9 and abs(simulation.rate_ppm() - 20) < 1
    assert len(kernel.steps) == steps


@pytest.mark.parametrize("ppm", (-980, 700, 499, 3000))
def test_rates_beyond_500_ppm_use_the_kernels_tick_and_none_is_over_1000(simulate, ppm):
    kernel = FakeKernel(ppm=ppm)
    simulation = simulate(kernel).settle(64, 128, 541, 541, 1623, 1623)
    atto = contents(simulation.etc_path / "atto")
    assert not atto or CS.parse_atto(atto) < 500
    assert abs(kernel.given_ppm()) <= 1000 and abs(simulate(kernel).rate_ppm()) <= 1000
    if ppm < 1000:
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
    simulation.mark(last=SNTP.pack_quality(3 * 10**7, 10**6))
    assert 31000 < told["maxerror"] < 33000 and told["esterror"] < 5000
    assert told["maxerror"] == pytest.approx(simulation.daemon.most_ns() / 1000, rel=0.01)
    kernel.clock += 9e6
    simulation.run(60)
    assert told["maxerror"] > 38000, "what is still to be slewed is part of it"
    assert simulate(FakeKernel(), "tai", scale="tai").settle(64).kernel.fields["tai"] == 10


def test_the_hardware_clock_is_never_written_from_a_clock_known_to_be_wrong(simulate):
    """Under -S a clock stays wrong for long."""
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel, may_step=False).settle()
    for moved_ns, unsynchronised in ((0, False), (48 * 10**7, False), (4 * 10**7, True), (HOUR_NS, True)):
        kernel.copied_ns = 0
        kernel.set_clock(moved_ns)
        for _ in range(2):
            simulation.run(20)
            simulation.mark()
            assert bool(kernel.fields["status"] & 0x40) == unsynchronised and kernel.copied_ns < 5 * 10**8
            assert kernel.fields["maxerror"] >= min(16 * 10**6 - 1, abs(kernel.clock) / 1000)
    kernel.set_clock(-kernel.clock)
    simulation.run(60)
    assert not kernel.fields["status"] & 0x40 and kernel.fields["maxerror"] < 10**6
    kernel.pass_by(3600)
    simulation.run(60)
    assert kernel.fields["status"] & 0x40 and kernel.fields["maxerror"] == 16 * 10**6, "nobody knows any more"
    simulation.settle(60, 60)
    (simulation.etc_path / "state").unlink()
    simulation = simulate(kernel)
    assert not kernel.fields["status"] & 0x40 and kernel.fields["maxerror"] < 10**6, "as it was left"
    kernel.pass_by(3600)
    simulation.run(60)
    assert kernel.fields["status"] & 0x40 and kernel.fields["maxerror"] == 16 * 10**6, "nor without a mark"


@pytest.mark.parametrize("before, copied", (("a mark", 0), ("the first mark", 1), ("a setting by 10 ms", 1)))
def test_nor_when_somebody_sets_the_clock_at_any_moment_of_a_wake_up(simulate, before, copied):
    """Only where the flag has to be cleared is there a moment that is too late; it is set again at once."""
    for moment in range(2, 30):  # after the sample by which the mark is taken
        kernel = FakeKernel(ppm=20)
        simulation = simulate(kernel, "home%d" % moment)
        if before != "the first mark":
            simulation.settle(64, 64)
        if before == "a setting by 10 ms":
            kernel.set_clock(10**7)
        kernel.copied_ns, kernel.set_in = 0, moment
        simulation.mark()
        if kernel.set_in > 0:
            break
        assert kernel.fields["status"] & 0x40 or abs(kernel.clock) < 10**6
        copied -= kernel.copied_ns > 5 * 10**8
        simulation.run(200)
        assert abs(kernel.clock) < 10**7 and not kernel.fields["status"] & 0x40
    assert moment > 9 and copied == 0


def test_slews_reach_what_marks_tell_and_nothing_beyond(simulate):
    kernel, worst, rng = FakeKernel(ppm=20, bias_ppm=3), 0, random.Random(SEED)
    simulation = simulate(kernel).settle(64)
    kernel.clock += 8e6  # under what counts as somebody else's step
    for _ in range(40):
        simulation.run(1.7)
        simulation.mark(rng.gauss(0, 2e-5))
        worst = min(worst, kernel.clock)
    assert worst > -100000 and abs(kernel.clock) < 200000, "marks all the time don't keep it from slewing"
    for off_ns, wait_sec, least_ns, most_ns in (  # 150 ms in 300 s; a minute's slew at most has to end first
            (kernel.clock - 4e8, 300, -260e6, -245e6), (0.0, 121, -40e6, 40e6)):
        kernel.clock = off_ns
        simulation.settle(wait_sec)
        assert least_ns < kernel.clock < most_ns


def test_the_bias_of_the_kernels_clock_is_learned_from_what_comes_back_after_short_slews(simulate):
    kernel = FakeKernel(ppm=20, bias_ppm=3)
    simulation = simulate(kernel).settle(64, 541)
    assert abs(simulation.clock.bias_ppm - 3) < 0.05
    kernel.clock += 8e6
    simulation.settle(5)
    kernel.clock += 4e5  # 5% of the slew more than it was told to
    simulation.run(305)
    assert abs(simulation.clock.bias_ppm - 3) < 0.05 and abs(kernel.clock) < 5000
    kernel.bias_ppm = 2000
    simulation.run(86400)
    assert simulation.clock.bias_ppm <= 50 and simulate(kernel).source == "phase and rate of etc/state"


def test_a_mark_is_a_line_with_all_that_went_in_and_came_out(simulate):
    kernel = FakeKernel(behind_ns=-123456)
    simulation = simulate(kernel)
    simulation.mark(last=720133918)
    assert re.fullmatch(
        r"mark: tick 1000000000 ns, real %d ns, spread 20130000 ns, distance 610540 ns, "
        r"offset -0\.000123456 s, error 0\.0\d{8} s, bound 0\.020740540 s, rate [+-]0\.0000 ppm, "
        r"rate error 500\.0000 ppm, used" % kernel.real, simulation.lines[0])
    assert simulation.status()["last_mark"] == dict(tick_ns=10**9, offset_ns=-123456, spread_ns=20130000,
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
    status = simulation.settle(1141, last=SNTP.pack_quality(10**6, 10**5)).status()
    assert kernel.tick - status["tick_ns"] <= 600 * 10**9, "it is never older"
    real_ns = simulation.daemon.estimator.real(status["tick_ns"])[0]
    assert status["written_ns"] + status["offset_ns"] == real_ns and len(status["variance"]) == 4
    assert sorted(status["bound"]) == "change_ppm earliest_ns fast_ppm latest_ns slow_ppm tick_ns".split()
    assert status["kernel"]["freq_ppm"] == pytest.approx(20, abs=1) and status["kernel"]["synchronised"]
    known = dict(version=2, boot_id="boot-1", counter="CLOCK_MONOTONIC_RAW", scale="utc", pid=os.getpid(),
                 observe_only=False, marks={"used": 3, "doubted": 0, "refused": 0})
    assert dict(status, **known) == status and not status["next"]["settling"]
    assert simulate(kernel, target_ns=10**7).status()["next"]["exchanges"] in range(1, 9)


def test_a_restart_in_the_same_boot_goes_on_as_if_nothing_had_happened(simulate):
    kernel = FakeKernel(ppm=-42, bias_ppm=1)
    before = simulate(kernel).settle(64, 541, 1623, last=SNTP.pack_quality(10**6, 0)).daemon
    kernel.sleep(600)  # killed; nobody looks after the clock
    frequency = kernel.fields["freq"]
    restarted = simulate(kernel)
    after = restarted.daemon
    assert restarted.source == "phase and rate of etc/state" and restarted.lines == []
    assert abs(kernel.fields["freq"] - frequency) <= 655, "within 0.01 ppm"
    assert after.estimator.real(kernel.tick) == before.estimator.real(kernel.tick)
    assert after.bound.at(kernel.tick) == before.bound.at(kernel.tick)
    assert (after.marks, after.last_mark) == (before.marks, before.last_mark)
    for happen, said in ((lambda: kernel.set_clock(HOUR_NS), "moved: somebody set the system clock by +3"),
                         (lambda: kernel.pass_by(8000), "suspend: the counter stood still for 2.22 h"),
                         (lambda: setattr(kernel, "tick", 10**9), "counter: it went back by ")):
        happen()  # while nobody is there
        restarted = simulate(kernel)
        assert restarted.lines[0].startswith(said)
        restarted.settle(60)
    kernel.steps.clear()
    (restarted.etc_path / "state").unlink()
    restarted = simulate(kernel)
    restarted.mark(1)
    assert restarted.source == "rate of etc/atto" and not kernel.steps, "no first mark of the boot"


@pytest.mark.parametrize("name", ("state", "atto", "status"))
def test_killed_between_two_files_it_goes_on_as_well(simulate, name):
    kernel = FakeKernel(ppm=-42)
    simulation = simulate(kernel).settle(64, 541, 1623)

    def die(*args, replace=simulation.home.replace):
        if args[0] == name:
            raise KeyboardInterrupt
        replace(*args)
    simulation.home.replace = die
    with pytest.raises(KeyboardInterrupt):
        simulation.mark(0.0001)
    restarted = simulate(kernel)
    assert restarted.source == "phase and rate of etc/state" and restarted.lines == []


def test_a_bound_of_an_earlier_release_is_taken_up():
    bound = CS.Bound.from_state({"ranges": [[1, 2, 3]] * 2, "ppm": [-1000.0, 1000.0, 0.0, 2.2]})
    assert bound.at(1) == (2, 3) and bound.allowed_ppm == 2.2


def test_a_reboot_keeps_the_rate_and_begins_the_phase_anew(simulate):
    simulate(FakeKernel(ppm=-42)).settle(64, 541, 1623, 4869, last=SNTP.pack_quality(10**6, 0))
    rebooted = FakeKernel(ppm=-42.3, behind_ns=10**9, boot="boot-2")
    simulation = simulate(rebooted)
    assert simulation.source == "rate of etc/state" and simulation.daemon.marks["used"] == 0
    assert simulation.daemon.most_ns() is simulation.daemon.last_mark is None
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
    simulation = simulate(kernel)
    assert simulation.source == "rate of etc/atto, the rest of etc/state"
    assert simulation.daemon.estimator.rate() == pytest.approx((-51, 10))
    assert not simulation.daemon.estimator.has_phase() and simulation.daemon.marks["used"] == 3
    assert not kernel.fields["status"] & 0x40, "the kernel is told nothing before a mark"
    assert simulation.daemon.known_ns > kernel.real - 5 * HOUR_NS, "what the state says besides stays"
    assert simulation.daemon.estimator.learned() == pytest.approx(learned, rel=0.2)
    for packet in (CS.pack(0, 4 * 10**8), CS.pack(0), CS.pack(-1), CS.pack(10**11), b"garbage",
                   CS.pack(1, 501000), CS.pack(0, 999499000)):  # of a TSC, or damaged: the state is better
        atto.write_bytes(packet)
        simulation = simulate(kernel)
        assert simulation.source == "rate of etc/state" and len(simulation.lines) == 1
        assert simulation.lines[0].startswith("clockspeed: warning: unable to use etc/atto: ")
    atto.write_bytes(packet)
    (atto.parent / "state").unlink()
    assert simulate(kernel).source == "no rate known"


def test_whatever_is_in_the_state_is_one_line_at_most(simulate):
    kernel = FakeKernel(ppm=5)
    simulation = simulate(kernel).settle(64, 541, last=SNTP.pack_quality(10**6, 0))
    path = simulation.etc_path / "state"
    text = path.read_bytes()
    good = json.loads(text)
    cases = [dict(good, **{name: value}) for name in good if name != "estimator"
             for value in (None, -1e28, 10**30, "x" * 200000, {"tick_ns": "x" * 1000}, True)]
    cases += [{key: good[key] for key in good if key != name} for name in good]
    cases += [dict(good, bias_ppm=51.0), dict(good, known_ns=(CS.RELEASE_SEC - 1) * 10**9),
              dict(good, last_mark=dict(good["last_mark"], outcome="x")), [], {"version": 2}, float("nan")]
    cases += [dict(good, **{name: dict(good[name], more="x" * 10000)}) for name in ("marks", "last_mark")]
    cases = [json.dumps(case).encode() for case in cases] + [
        b"[" * 100000, b'{"a":' * 40000, b"", b"\0", b'{"version": ' + b"9" * 200000 + b"}"]
    refused = 0
    for data in cases + list(mutants(random.Random(SEED), [text], 25)):
        path.write_bytes(data)
        again = simulate(kernel)
        warnings = again.said("clockspeed: warning: unable to use etc/state: ")
        assert len(warnings) == (again.lines != []) and again.source[:4] in ("rate", "phas")
        assert not warnings or again.source == "rate of etc/atto" and len(warnings[0]) < 300
        assert again.status()["rate_ppm"] < 1000 and (again.etc_path / "status").stat().st_size < 5000
        refused += len(warnings)
    assert refused > len(cases) * 0.6


def test_a_clock_that_others_set_again_and_again_is_set_back_once_and_then_seldom(simulate):
    kernel = FakeKernel(ppm=3)
    simulation = simulate(kernel)
    simulation.run(300)
    kernel.set_clock(-HOUR_NS)
    simulation.run(300)
    assert kernel.clock == pytest.approx(-HOUR_NS, abs=1e7) and simulation.lines == [], "no mark has come"
    simulation.settle()
    del kernel.steps[:]
    for _ in range(24 * 12):
        kernel.set_clock(HOUR_NS - round(kernel.clock))
        simulation.run(300)
    assert len(kernel.steps) == 1 + 4, "after 1, 2, 4 and 8 hours"
    said = simulation.said("foreign: another program sets the system clock; one of the two must go")
    assert 20 <= len(said) <= 25
    simulation.run(2 * 86400)
    assert len(kernel.steps) == 6 and abs(kernel.clock) < 1e6, "it gave up"


def test_many_marks_at_once_are_a_few_and_one_line(simulate):
    simulation, rng = simulate(FakeKernel()), random.Random(SEED)
    simulation.take(*[CS.pack(rng.randrange(-10**15, 10**15)) for _ in range(4096)])
    assert simulation.daemon.marks["refused"] >= 4092 and len(simulation.lines) <= 6
    assert simulation.said("refused: ") == ["refused: more than 4 marks at once, and 4091 more"]
    simulation.take(b"short", bytes(8) + b"\xff" * 8)
    assert simulation.lines[-1] == "refused: 5 bytes at once, not 16, and 1 more"
    for to_sec, taken in ((-1, 0), (0, 1), (2**32 - 1, 1), (2**32, 0), (-2**62, 0), (2**62, 0)):
        simulation = simulate(FakeKernel(), str(to_sec))  # no real time is before the release or an era later
        simulation.take(CS.pack((CS.RELEASE_SEC + to_sec) * 10**9 - simulation.kernel.clock_ns()))
        assert simulation.daemon.marks["used"] == taken == 1 - simulation.daemon.marks["refused"]
        assert to_sec != -1 or simulation.lines == ["refused: no real time is 29 d from the system clock"]


def test_a_kernel_that_refuses_is_said_once_and_survived(simulate):
    simulation = simulate(FakeKernel())
    for error in (OSError(errno.EPERM, "Operation not permitted"), struct.error("over 32 bits")):
        def refuse(modes=0, **_):
            if modes:
                raise error
            return simulation.kernel.adjtimex()
        simulation.clock.adjtimex = refuse
        simulation.settle(300, 300)
        simulation.daemon.step(1, "in a test")
    assert simulation.said("clockspeed: ") == [
        "clockspeed: warning: unable to %s the clock: %s" % (what, why)
        for why in ("Operation not permitted", "over 32 bits") for what in ("steer", "step")]


def test_where_there_is_no_adjtimex_the_clock_is_nudged(monkeypatch):
    calls = []
    monkeypatch.setattr(CS, "libc_call", lambda name, timeval, before: calls.append((name, *timeval, before)))
    assert CS.AdjtimeClock().steer(0, -1500000, 0, False) == 3
    assert calls == [("adjtime", 0, 0, None), ("adjtime", -1, 998500, None)]


def test_a_libc_without_the_call_is_said_and_the_clock_observed(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("ctypes"), "CDLL", lambda *_, **__: object())
    lines = []
    for kind in (CS.AdjtimeClock, CS.KernelClock):
        assert CS.Attempts(lines.append)("steer the clock", kind) is None
    assert ["clockspeed: warning: unable to steer the clock: 'object' object has no attribute '%s'" % name
            for name in ("adjtime", "adjtimex")] == lines


def test_a_clock_without_hardware_clock_goes_forward_to_the_last_time_known(simulate):
    known_ns = simulate(FakeKernel()).settle(4000).daemon.known_ns
    assert abs(known_ns - FakeKernel.START_NS) < 4100 * 10**9
    for boot, name, options, behind_ns, shown_ns in (
            ("boot-2", "home", {"may_step": False}, FakeKernel.START_NS, 0),  # 1970
            ("boot-3", "home", {}, FakeKernel.START_NS, known_ns),
            ("boot-4", "home", {}, -10**18, FakeKernel.START_NS + 10**18),  # far ahead
            ("boot-1", "fresh", {}, FakeKernel.START_NS, CS.RELEASE_SEC * 10**9)):
        simulation = simulate(FakeKernel(behind_ns=behind_ns, boot=boot), name, **options)
        assert abs(simulation.kernel.clock_ns() - shown_ns) < 1e9
        stepped = shown_ns in (known_ns, CS.RELEASE_SEC * 10**9)
        assert [line.rpartition(" s, ")[2] for line in simulation.lines] == [
            "which showed a time before the last one known"] * stepped


@pytest.mark.parametrize("layout, most_sec, names", [
    (CS.TIMEX32, 2**31 - 1, {}), (CS.TIMEX_MUSL, 2**63 - 1, {"__adjtimex_time64": None})], ids=["glibc", "musl"])
def test_32_bits_of_time_are_enough_until_2038(layout, most_sec, names, monkeypatch):
    """With the C library of a 32-bit system before Linux 5.1."""
    ctypes, given = pytest.importorskip("ctypes"), []

    def syscall(*_):
        ctypes.set_errno(errno.ENOSYS)
        return -1

    def adjtimex(buffer):
        given.append(dict(zip(CS.TIMEX_FIELDS, layout.unpack_from(buffer))))
        layout.pack_into(buffer, 0, *range(21))
        return 5
    libc = importlib.util.types.SimpleNamespace(adjtimex=adjtimex, syscall=syscall, **names)
    monkeypatch.setattr(ctypes, "sizeof", lambda kind: 4)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
    assert CS.adjtimex(modes=2, freq=-7, sec=most_sec) == dict(zip(CS.TIMEX_FIELDS, range(21)), state=5)
    assert given == [dict(dict.fromkeys(CS.TIMEX_FIELDS, 0), modes=2, freq=-7, sec=most_sec)]
    with pytest.raises(struct.error):
        CS.adjtimex(sec=most_sec + 1)


def test_a_python_without_json_keeps_etc_atto_and_says_what_it_can_not_keep(simulate, monkeypatch):
    monkeypatch.setitem(sys.modules, "json", None)
    simulation = simulate(FakeKernel(ppm=3)).settle()
    assert [line.partition(":")[0] for line in simulation.lines if "unable" in line] == 2 * ["clockspeed"]
    assert os.listdir(simulation.etc_path) == ["atto"]


# ==== clockspeed: the process =======================================================================
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


def contents(path):
    """The bytes of a file, none if there is none."""
    return path.read_bytes() if path.exists() else b""


class Daemon:
    """clockspeed as a process that can't set this machine's clock; its lines come out of a file."""

    def __init__(self, home, *options, before=(), command=None, log=None):
        self.home, self.log = home, home.parent / "log"
        command = [*before, *without_the_right(command or command_of("clockspeed", *options, home))]
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(command, stdout=log or file, stderr=log or file, env=UTC_ENV)

    def text(self):
        return self.log.read_text()

    def wait_for(self, text, count=1):
        until(lambda: self.text().count(text) >= count or self.process.poll() is not None)
        assert self.text().count(text) >= count, self.text()

    def marks(self):
        """How many were taken by etc/status; -1 without one."""
        status = contents(self.home / "etc" / "status")
        return sum(json.loads(status)["marks"].values()) if status else -1

    def write(self, data=CS.pack(0)):
        (self.home / "adjust").write_bytes(data)

    def mark(self, ns=0):
        """Write a mark, and wait until it is taken."""
        until(lambda: self.marks() >= 0)
        before = self.marks()
        self.write(CS.pack(ns))
        until(lambda: self.marks() > before)

    def proc(self, name):
        return pathlib.Path("/proc", str(self.process.pid), name).read_text()

    def end(self, number=signal.SIGTERM):
        """The exit status; it takes a second at most, on a machine that is not busy."""
        self.process.send_signal(number)
        return self.process.wait(10)


@pytest.fixture
def daemon():
    """Starts clockspeed on daemon.home, which every user can enter: pytest's directories are for one."""
    before, made = os.umask(0o022), []
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)

        def start(*options, wait_for="start: ", **named):
            made.append(Daemon(start.home, *options, **named))
            made[-1].wait_for(wait_for)
            return made[-1]
        start.home = pathlib.Path(name) / "home"
        start.home.mkdir()
        yield start
        for each in made:
            each.process.kill()
            each.process.wait()
            assert "Traceback" not in each.text()
    os.umask(before)


def test_clockspeed_learns_from_its_fifo_and_term_or_int_ends_it_with_0(daemon):
    for number, source in ((signal.SIGTERM, "no rate known"), (signal.SIGINT, "phase and rate of etc/state")):
        process = daemon("-n")
        assert process.text().startswith("start: observing, CLOCK_MONOTONIC_RAW, scale utc, rate ")
        assert process.text().endswith(", %s\n" % source) and process.proc("comm") == "clockspeed\n"
        assert os.lstat(process.home / "adjust").st_mode == stat.S_IFIFO | 0o600
        for count in range(1, 4):  # real time gains 50 ppm: 50 us in a second
            process.mark(count * 50000)
            assert "offset +0.000%d" % (count * 50) in process.text().replace("0.00005", "0.00050")
            time.sleep(0.5)
        memory_kb = int(re.search(r"VmHWM:\s+(\d+) kB", process.proc("status")).group(1))
        assert memory_kb < 16 * 1024, "15 with Python 3.11"
        process.write(b"short")
        process.wait_for("refused: 5 bytes at once, not 16")
        assert process.end(number) == 0 and process.text().splitlines()[-1].startswith("stop: ")
        ns, atto = CS.unpack((process.home / "etc" / "atto").read_bytes())
        assert ns == 1 and (10000 < atto < 400000 or number == signal.SIGINT), "s per tick, as the C one's"


def test_kill_9_at_any_moment_of_a_write_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    home, seen = CS.Home(str(tmp_path)), set()
    for moment in range(9):
        home.replace("state", b"old" * 1000)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            calls = []
            for name in ("unlink", "open", "fchmod", "fsync", "rename"):
                def die(*args, real=getattr(os, name), **options):
                    calls.append(real)
                    if len(calls) > moment:
                        raise KeyboardInterrupt
                    return real(*args, **options)
                patch.setattr(os, name, die)
            home.replace("state", b"new" * 1001)
        seen.add(home.read("state"))
    assert [real.__name__ for real in calls] == ["unlink", "open", "fchmod", "fsync", "rename", "fsync"]
    assert seen == {b"old" * 1000, b"new" * 1001} and os.listdir(tmp_path / "etc") == ["state"]


def test_no_link_is_followed_and_no_fifo_waited_for(tmp_path):
    home, victim = CS.Home(str(tmp_path)), tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in ("status.tmp", "state"):
        (tmp_path / "etc" / name).symlink_to(victim)
    os.mkfifo(tmp_path / "etc" / "atto")
    home.replace("status", b"new")
    assert victim.read_bytes() == b"precious" and home.read("status") == b"new" and home.read("atto") == b""
    with pytest.raises(OSError):
        home.read("state")


@pytest.mark.parametrize("home, options, env, said", [
    ("none", [], {}, "use HOME/none/etc \\(a directory, not a link.*\\): No such file or directory"),
    ("file", [], {}, "use HOME/file/etc \\(a directory, not a link.*\\): Not a directory"),
    ("link", [], {}, "use HOME/link/etc \\(a directory, not a link.*\\): Not a directory"),
    ("home", ["-u", "no-such-user"], {}, "become no-such-user: there is no such user"),
    ("home", ["-u", ""], {}, "become : there is no such user"),
    ("home", ["-w", "no-such-user"], {}, "give adjust to no-such-user: there is no such user"),
    ("home", [], {"CLOCK_SCALE": "gps"}, "start: CLOCK_SCALE is neither utc nor tai"),
    ("home", [], {"CLOCK_ERROR": "10 apples"}, "start: CLOCK_ERROR is not a time like 0.010 or 10ms"),
    ("locked", [], {}, "lock HOME/locked/etc: another clockspeed is running there"),
    ("read", [], {}, "read adjust: another program reads adjust.*")])
def test_what_can_not_work_is_a_clear_line(tmp_path, home, options, env, said):
    (tmp_path / "file").write_text("")
    for name in ("home", "link", "victim", "locked", "read"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / "etc").symlink_to(tmp_path / "victim")
    locked, read = (CS.Home(str(tmp_path / name)) for name in ("locked", "read"))
    locked.lock()
    read.open_adjust()
    refused(run("clockspeed", "-n", *options, tmp_path / home, **env),
            "^clockspeed: fatal: unable to %s" % said.replace("HOME", re.escape(str(tmp_path))))
    assert not os.listdir(tmp_path / "victim")


@pytest.mark.parametrize("text, error_ns", [
    ("", None), ("0.010", 10**7), ("10ms", 10**7), ("5us", 5000), ("1s", 10**9), ("2", 2 * 10**9), ("0", 0),
    ("-1", 0), ("nan", 0), ("inf", 0), ("10m", 0), ("ms", 0), ("3601", 0), ("1" * 400, 0)])
def test_the_error_to_be_kept(text, error_ns, monkeypatch):
    monkeypatch.setenv("CLOCK_ERROR", text)
    with pytest.raises(ValueError) if error_ns == 0 else contextlib.nullcontext():
        assert CS.clock_error_ns() == error_ns


@pytest.mark.parametrize("make", (lambda path: path.write_bytes(b"precious"), lambda path: path.mkdir(),
                                  lambda path: path.symlink_to("elsewhere")))
def test_what_is_no_fifo_is_named_and_let_alone(daemon, make):
    adjust = daemon.home / "adjust"
    make(adjust)
    before = os.lstat(adjust)
    process = daemon("-n", wait_for="unable to read adjust: it is not a FIFO; remove it: rm -r %s\n" % adjust)
    process.wait_for("start: ")
    assert process.end() == 0 and os.lstat(adjust) == before
    assert not (process.home / "elsewhere").exists()


def test_a_fifo_that_is_deleted_or_replaced_is_found_again(tmp_path):
    home = CS.Home(str(tmp_path))
    for renew in (None, lambda: None, lambda: os.mkfifo(home.adjust)):
        if renew:
            os.unlink(home.adjust)
            renew()
        for _ in range(2):
            home.open_adjust()
            pathlib.Path(home.adjust).write_bytes(b"0123456789abcdef")
        assert home.packets() == [b"0123456789abcdef"] * 2 and home.packets() == []
    with open(home.adjust, "wb", buffering=0) as writer:
        writer.write(b"0123456789abcdef?")
    assert home.packets() == [b"0123456789abcdef?"], "where a mark begins can't be told any more"


@needs_root
def test_a_fifo_that_is_made_again_belongs_to_whom_the_one_before_did(tmp_path):
    home = CS.Home(str(tmp_path))
    for owner in (0, 4711, 4711):
        home.open_adjust()
        assert os.stat(home.adjust).st_uid == owner
        os.chown(home.adjust, 4711, -1)
        os.unlink(home.adjust)


@needs_root
def test_clockspeed_becomes_its_user_gives_only_its_own_away_and_keeps_no_more_than_it_needs(daemon):
    nobody, writer, etc = pwd.getpwnam("nobody"), pwd.getpwnam("daemon").pw_uid, daemon.home / "etc"
    etc.mkdir()
    (etc / "passwd").write_text("")
    said = "fatal: unable to give %s to nobody: it holds 'passwd', so it is not clockspeed's own\n"
    process = daemon("-u", "nobody", "-w", "daemon", wait_for=said % etc)
    assert process.process.wait(30) == 111 and os.stat(etc).st_uid == 0
    (etc / "passwd").unlink()
    for name in ("atto", "state.tmp", "kisses", "leap"):  # also an earlier version's, and another user's
        (etc / name).write_text("")
    os.chown(etc, 4711, -1)
    for _ in range(2):
        process = daemon("-u", "nobody", "-w", "daemon")
        status = dict(line.split(":\t", 1) for line in process.proc("status").splitlines() if ":\t" in line)
        assert status["Uid"].split() == [str(nobody.pw_uid)] * 4 and status["NoNewPrivs"] == "1"
        assert status["Gid"].split() == [str(nobody.pw_gid)] * 4 and process.proc("comm") == "clockspeed\n"
        assert not status["Groups"].strip() and int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
        assert "clockspeed: warning: unable to steer the clock: Operation not permitted\n" in process.text()
        process.mark()
        assert process.end() == 0
        owners = [os.stat(process.home / name).st_uid for name in (".", "adjust", "etc", "etc/state")]
        assert owners == [0, writer, nobody.pw_uid, nobody.pw_uid]


@needs_root
def test_without_what_python3_minimal_lacks_it_becomes_its_user_and_observes(daemon):
    lacks = "sys.modules.update(dict.fromkeys(('ctypes', 'json')))"
    process = daemon(command=command_with(lacks, "clockspeed", "-u", "nobody", daemon.home))
    assert "start: observing" in process.text() and "unable to steer the clock: " in process.text()
    process.write()
    process.wait_for("mark: ")
    assert re.search(r"^Uid:\t%d\t" % pwd.getpwnam("nobody").pw_uid, process.proc("status"), re.M)
    assert re.search(r"^CapPrm:\t0+$", process.proc("status"), re.M) and process.end() == 0


@needs_root
def test_a_deleted_fifo_that_only_root_can_make_again_ends_it(daemon):
    script = "import sys; sys.dont_write_bytecode = True; sys.path[:0] = [%r]; import clockspeed as p\n" \
        "p.SETTLED_SEC = 0.1; sys.exit(p.main(['', '-u', 'nobody', sys.argv[1]]))" % HERE
    process = daemon(command=[sys.executable, "-IS", "-c", script, str(daemon.home)])
    (daemon.home / "adjust").unlink()
    assert process.process.wait(30) == 111
    assert process.text().endswith(" adjust is another user's, or gone where only root can make it\n")


@needs_root
@pytest.mark.parametrize("owner", ("nobody", "root"))
def test_a_read_only_file_system_is_said_and_no_reason_to_stop(daemon, owner):
    if subprocess.run(["unshare", "-m", "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no mount namespaces")
    os.mkfifo(daemon.home / "adjust")
    (daemon.home / "etc").mkdir()
    for name in ("adjust", "etc"):
        os.chown(daemon.home / name, pwd.getpwnam(owner).pw_uid, -1)
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    process = daemon("-u", "nobody", before=["unshare", "-m", "sh", "-c", mount, str(daemon.home)],
                     wait_for="warning: unable to write etc/status: Read-only file system")
    process.write()
    process.wait_for("mark: ")
    assert "Uid:\t%d\t" % pwd.getpwnam("nobody").pw_uid in process.proc("status") and process.end() == 0
    assert process.text().count("Read-only file system") <= 6 and not contents(daemon.home / "etc" / "state")


def test_a_log_that_takes_no_more_blocks_nothing(daemon):
    """The log's reader hangs, as on a full disk, and the pipe is full."""
    reader, writer = os.pipe()
    with open(reader, "rb", 0) as log, open(writer, "wb", 0) as full:
        process = daemon("-n", log=writer, wait_for="")
        until(lambda: select.select([log], [], [], 0)[0])
        os.set_blocking(writer, False)
        while full.write(b"x" * 4096):
            pass
        os.set_blocking(writer, True)
        process.mark()
        process.mark()
        assert daemon("-n", log=writer, wait_for="").process.wait(10) == 111, "there is one already"
        log.read(65536)
        assert process.end() == 0 and re.search(rb"lost: [2-9] lines\nstop: ", log.read(65536))


def test_what_was_lost_is_counted_in_the_next_line_that_can_be_written():
    reader, writer = os.pipe()
    log = CS.Log(writer)
    while log.lost < 12:
        log("x" * 1000)
    os.read(reader, 65536)
    for line in ("at last", "and another", "y" * 10000):
        log(line)
    assert os.read(reader, 65536) == b"lost: 12 lines\nat last\nand another\n" + b"y" * 4095 + b"\n"
    os.close(reader)
    log("nobody reads")
    assert log.lost == 1
    os.close(writer)


@pytest.mark.parametrize("sizes, some", [((1, 16, 17, 512, 4096, 65536), 10**5), ((1, 17), 10**3)])
def test_many_marks_keep_it_from_nothing(daemon, sizes, some):
    process, rng, written, end_sec = daemon("-n"), random.Random(SEED), 0, time.monotonic() + 2.5
    with open(os.open(process.home / "adjust", os.O_WRONLY | os.O_NONBLOCK), "wb", 0) as fifo:
        while time.monotonic() < end_sec:
            size = rng.choice(sizes)
            packet = CS.pack(rng.randrange(-10**15, 10**15))
            written += fifo.write(packet * (size // 16) + bytes(size % 16)) or 0
            time.sleep(0.001)
        assert process.end() == 0 and written > some
    assert (16 in sizes) <= process.text().count("mark: ") <= 30 and process.text().count("\n") < 80


@pytest.mark.parametrize("closed", (">&-", "2>&-", "<&- >&- 2>&-"))
def test_closed_descriptors_are_no_reason_to_end(daemon, closed):
    process = daemon("-n", before=["sh", "-c", 'exec "$@" ' + closed, "sh"], wait_for="")
    process.mark()
    assert process.end() == 0


# ==== bad days ======================================================================================

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


def moved(*secs, may_step=True):
    def live(simulation):
        simulation.daemon.may_step = may_step
        for sec in secs:
            simulation.kernel.set_clock(round(sec * 1e9))
            simulation.run(1200)
    return live


def set_and_marked(simulation):
    """As by clockctl on a machine that was paused: clockspeed can't know, and the mark is in doubt."""
    simulation.kernel.pass_by(60, suspended=False)
    simulation.run(600)
    simulation.mark()
    simulation.kernel.set_clock(60 * 10**9)
    simulation.settle(60, 60, 60, 60)


def stopped(sec, suspended=False, ppm=0, counter_ns=0):
    """The clock stands still, unless the hardware clock sets it right, but for 0.4 s, after a suspend."""
    def live(simulation):
        kernel = simulation.kernel
        kernel.pass_by(sec, suspended)
        kernel.clock -= 4e8 * suspended
        kernel.ppm += ppm
        kernel.tick += counter_ns
        simulation.settle(*[541] * 7)
    return live


def rival(simulation):
    for _ in range(30):
        simulation.kernel.fields["freq"] = 7 << 16
        simulation.run(60)


def full_disk(simulation):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    simulation.home.replace, replace = no_space, simulation.home.replace
    simulation.settle(541, 541, 541)
    simulation.home.replace = replace
    assert simulation.settle(541).status()["marks"]["used"] == 10


# What happens to a clockspeed that has learned; what lives through it; the lines of the log besides marks,
# with ... for anything; how many s the clock is off at most when it is over.  NOTES.md has the same rows.
BAD_DAYS = (
    ("the server is silent for a month", lambda simulation: simulation.run(30 * 86400), (), 0.01),
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
    ("virtual machine paused for 0.3 s", stopped(0.3), ("slew: +0.3... s will take 10 min; ...",),
     0.001),
    ("virtual machine paused for a minute", stopped(60), ("slew: +... s will take 3... h; ...",), 60),
    ("restored from a snapshot, the counter goes back", stopped(0, counter_ns=-7140 * 10**9),
     ("counter: it went back by 1... min, as in a machine that is restored from a snapshot; ...",), 0.001),
    ("virtual machine migrated, 55 ppm and 0.2 s", stopped(0.2, ppm=-55),
     ("slew: +... s will take ...",), 0.01),
    ("another program sets the frequency", rival,
     ("foreign: another program sets the clock's frequency; one of the two must go",), 0.1),
    ("the disk is full", full_disk,
     ("clockspeed: warning: unable to write etc/state: No space left on device",
      "clockspeed: warning: unable to write etc/status: No space left on device"), 0.001),
)
SIMILAR_DAYS = (
    ("an hour off under -S", moved(0.4, 3600, may_step=False),
     ("moved: somebody set the system clock by +0.400 s", "slew: -0.4... s will take 13.3 min; ...",
      "moved: somebody set the system clock by +3600.000 s", "slew: -3... s will take 83.3 d; ..."), 3600),
    ("not even half a second off", moved(0.4),
     ("moved: somebody set the system clock by +0.400 s", "slew: -0.4... s will take 13.3 min; ..."), 0.001),
    ("hardly more than half a second off", moved(-0.51),
     ("moved: somebody set the system clock by -0.510 s", "step: ... back to the time of the marks; ..."),
     0.001),
    ("set to the right time and marked", set_and_marked,
     ("moved: somebody set the system clock by +60.000 s", "slew: -60... s will take 33.3 h; ..."), 0.001),
)


@pytest.mark.parametrize("event, live, said, off_sec", BAD_DAYS + SIMILAR_DAYS)
def test_a_bad_day(event, live, said, off_sec, simulate, monkeypatch):
    if "month" in event:
        monkeypatch.setattr(CS, "SETTLED_SEC", 1200)  # for the test to be short
    kernel = FakeKernel(ppm=20)
    simulation = simulate(kernel).settle(64, 541, 1623, 3600, 3600, 3600)
    assert abs(kernel.clock) < 1e6 and abs(simulation.rate_ppm() - 20) < 0.1
    del simulation.lines[:]
    live(simulation)
    patterns = {text: ".*".join(map(re.escape, text.split("..."))) for text in said}
    lines = [line for line in simulation.lines if not line.startswith("mark: ")]
    told = [[text for text in said if re.fullmatch(patterns[text], line)] for line in lines]
    assert all(told) and {text for texts in told for text in texts} == set(said), lines
    assert abs(kernel.clock) < off_sec * 1e9
    assert abs(simulation.rate_ppm() - kernel.ppm) < 1, "nothing else is learned as drift"
    assert len(kernel.steps) == sum(text.startswith("step: ") for text in said)


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
            kernel.fields.update(kernel.NEW)
        if what < 0.06:
            simulation = simulate(kernel, target_ns=10**7)
        if what > 0.1:
            wild_sec = rng.choice((-1, 1)) * 10.0 ** rng.randrange(-1, 3) if what > 0.98 else 0
            simulation.mark(rng.gauss(0, 2e-4) + wild_sec)
        wait_sec = min(86400, max(600, simulation.status()["next"]["wait_sec"]))
    assert sorted(errors_sec)[int(len(errors_sec) * 0.9)] < 0.02
    assert max(path.stat().st_size for path in simulation.etc_path.iterdir()) < 65536


# ==== clockctl ======================================================================================

CTL = load("clockctl")
MARK = ADD.pack(-3200000, 720133918)  # 3.2 ms ahead, give or take 20.13 ms and 0.61 ms
BOOT_ID = CTL.this_boot()[0]
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
        path = pathlib.Path(self.home, name)
        path.write_text(text)
        path.chmod(mode)

    def configure(self, text):
        self.write("conf", "CLOCKSPEED_HOME=%s\nCLOCKSPEED_BIN=%s\n%s" % (self.home, self.bin, text))

    def stand_in(self, name, answer=b"", ours=True, then="exit 0"):
        """A program that notes its arguments and answers; one of ours knows --version."""
        pathlib.Path(self.bin, name + ".answer").write_bytes(answer)
        version = "echo %s 2026.11; exit" % name if ours else "exit 100"
        self.write("bin/" + name, '#!/bin/sh\n[ "$1" = --version ] && { %s; }\necho "%s:$*" >>%s\n'
                   "cat $0.answer\n%s\n" % (version, name, self.asked, then), 0o755)

    def lines(self):
        return pathlib.Path(self.asked).read_text().replace(self.home, "HOME").splitlines()

    def status(self, **changes):
        self.write("etc/status", json.dumps(a_status(**changes)))

    def run(self, *args, **env):
        return run("clockctl", *args, **dict(self.env, **env))

    def says(self, *args, **env):
        """What it prints, with its warnings, or why it fails."""
        done = self.run(*args, **env)
        said = (done.stderr + done.stdout.decode()).replace(self.home, "HOME")
        if done.returncode:
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (111, b"", 1), said
            said = re.sub("^clockctl: fatal: unable to ", "", said.rstrip())
        return said


@pytest.fixture
def host():
    with tempfile.TemporaryDirectory() as path:
        yield Host(path)


def a_status(age_sec=100, offset_ns=3200000, then_off_sec=0, bound_ns=5 * 10**6, **changes):
    """What clockspeed wrote that long ago; by it this clock is that far behind now, whatever it was then."""
    tick_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW) - age_sec * 10**9
    written_ns = time.time_ns() + (then_off_sec - age_sec) * 10**9
    boot_id, suspended_ns = CTL.this_boot()
    status = {
        "version": 2, "pid": os.getpid(), "boot_id": boot_id, "doing": "steering the clock",
        "observe_only": False, "counter": "CLOCK_MONOTONIC_RAW", "scale": "utc", "tick_ns": tick_ns,
        "written_ns": written_ns, "suspended_ns": suspended_ns, "offset_ns": offset_ns,
        "variance": [1e10, 0, 1e4, 0], "rate_ppm": 0.0, "rate_error_ppm": 0.0123, "noise_ns": 2e6,
        "wander": 1e-9,
        "bound": {"tick_ns": tick_ns, "earliest_ns": written_ns + offset_ns - bound_ns,
                  "latest_ns": written_ns + offset_ns + bound_ns, "slow_ppm": 0.0, "fast_ppm": 0.0,
                  "change_ppm": 0.0},
        "marks": {"used": 12, "doubted": 1, "refused": 0},
        "last_mark": {"tick_ns": tick_ns, "offset_ns": 1234567, "spread_ns": 10**6, "distance_ns": 10**5,
                      "outcome": "used"},
        "next": {"wait_sec": 700.0, "exchanges": 4, "settling": False},
        "kernel": {"freq_ppm": 12.3, "tick": 10000, "maxerror_us": 5000, "esterror_us": 100,
                   "synchronised": True}}
    return dict(status, **changes)


def test_variance_and_bound_are_carried_on_as_clockspeed_does():
    status = CTL.parse_status(json.dumps(a_status(variance=[1e6, 1e4, 1e2, 1])).encode())  # by 100 s
    assert status["now"]["deviation_sec"] == pytest.approx(2e-6, rel=0.03)
    rng, bound = random.Random(SEED), load("clockspeed").Bound()
    for tick_ns in sorted(rng.randrange(1, 10**15) for _ in range(9)):
        bound.mark(tick_ns, 10**18 + tick_ns + round(tick_ns * 2e-5), 10**7, 10**6)
        for later_ns in (tick_ns, tick_ns + 10**9, tick_ns + 10**12, tick_ns + 10**15):
            assert CTL.carry_bound(bound.coefficients(), later_ns) == bound.at(later_ns)


@pytest.mark.parametrize("text, wanted", [
    ("# only a comment, isn't it\n\n  # another", {}), ("CLOCK_IP=192.0.2.1", {"CLOCK_IP": "192.0.2.1"}),
    ('CLOCK_IP="192.0.2.1 192.0.2.2" # two\r\n', {"CLOCK_IP": "192.0.2.1 192.0.2.2"}),
    ("\texport CLOCK_KEY=a#b #c", {"CLOCK_KEY": "a#b"}),
    ('CLOCK_KEY="it\'s # \'"', {"CLOCK_KEY": "it's # '"}),
    ("CLOCK_KEY=1\nCLOCK_KEY=';&|<>()'\nCLOCK_IP=", {"CLOCK_KEY": ";&|<>()", "CLOCK_IP": ""})] + [
    (line, "not of the form") for line in (
        "CLOCK_IP=$HOME", "CLOCK_IP=`id`", "CLOCK_IP=~/a", 'CLOCK_IP="$(id)"', "CLOCK_IP=a b", "CLOCK_IP",
        "id", "CLOCK_IP = a", "CLOCK_IP=a & id", "CLOCK_IP=a>b", "CLOCK_IP=(a)", "CLOCK_IP=a\0", "A-B=c",
        "=", ". x", "if CLOCK_IP=a; then", "CLOCK_IP+=a", 'CLOCK_IP="a', "CLOCK_IP='a", "CLOCK_IP=a\\",
        'CLOCK_IP="a"#b')] + [
    (name + "=x", "there is no variable " + name) for name in ("LD_PRELOAD", "PATH", "PYTHONPATH", "IFS")] + [
    ("CLOCK_ERR=1", "no variable CLOCK_ERR; the nearest known one is CLOCK_ERROR"),
    ("CLOCK_IPS=a", "no variable CLOCK_IPS; the nearest known one is CLOCK_IP")])
def test_shell_assignments_are_understood_and_all_else_is_refused_with_its_line(text, wanted):
    if isinstance(wanted, dict):
        assert CTL.parse_assignments(text) == wanted
    else:
        with pytest.raises(ValueError, match="^line 3: .*" + re.escape(wanted)):
            CTL.parse_assignments("\nCLOCK_KEY=1\n" + text)


def test_spans_of_time():
    for text, sec in (("0.010", 0.01), ("10ms", 0.01), ("10 us", 1e-5), (".5s", 0.5), ("1e-3", 1e-3)):
        assert CTL.parse_span(text) == pytest.approx(sec)
    for text in ("", "0", "0ms", "-1", "5x", "nan", "inf", "1e999", "ms", "1 2", "0x1"):
        with pytest.raises(CTL.getopt.GetoptError):
            CTL.parse_span(text)
    for sec, text in ((0, "0 ns"), (0.0012345, "1.23 ms"), (0.9997, "1 s"), (59.99, "1 min"), (-7200, "-2 h"),
                      (1796e6, "20800 d"), (3e-10, "0.3 ns")):
        assert CTL.format_span(sec) == text


def test_run_gives_a_program_the_configuration_and_nothing_else(host):
    host.configure("CLOCK_TYPE=tai\nCLOCK_SCALE=tai\n")
    script = 'echo "$CLOCK_TYPE $CLOCK_IP $CLOCKSPEED_HOME $OTHER $CLOCK_SCALE $*"'
    assert host.says("run", "sh", "-c", script, "sh", "-u", "--help", CLOCK_IP="environment", OTHER="kept",
                     CLOCK_SCALE="utc") == "tai environment HOME kept tai -u --help\n"
    assert host.says("run", "/none") == "run /none: No such file or directory"
    assert host.says("atto", CLOCKSPEED_CONF="/none") == "read /none: No such file or directory"
    with pytest.raises(CTL.Failure, match="^unable to run /none: No such file or directory$"):
        CTL.output_of(["/none"], {})


def test_only_a_configuration_that_is_not_there_is_done_without(host, monkeypatch):
    monkeypatch.delenv("CLOCKSPEED_CONF", raising=False)
    monkeypatch.setattr(CTL, "CONF", host.home + "/none")
    assert CTL.read_config()["CLOCK_TYPE"] == "ntp"
    host.write("conf", "CLOCKSPEED_HOME=\n")  # which is not the current directory
    monkeypatch.setattr(CTL, "CONF", host.conf)
    assert CTL.read_config()["CLOCKSPEED_HOME"] == "/usr/local/clockspeed"
    monkeypatch.setattr(CTL, "CONF", host.conf + "/in a file")
    with pytest.raises(CTL.Failure, match="Not a directory"):
        CTL.read_config()


@contextlib.contextmanager
def reading(path):
    """A FIFO that somebody reads, as this file."""
    with open(os.open(path, os.O_RDWR | os.O_NONBLOCK), "r+b", 0) as fifo:
        yield fifo


MARKED = "mark: offset -0.003200000 s from "


@pytest.mark.parametrize("conf, changes, said, asked", [
    ("CLOCK_IP='a,b  c'", None, MARKED + "ntp a b c\n", "sntpclock:-l 0 -s HOME/mark -- a b c"),
    ("CLOCK_KEYFILE=/k\nCLOCK_KEY=7", {}, MARKED + "ntp 192.0.2.1\n",
     "sntpclock:-k /k -K 7 -r 4 -T 30000 -s HOME/mark -- 192.0.2.1"),
    ("CLOCK_IP=-f", {"marks": {"used": 0, "doubted": 0, "refused": 9}}, MARKED + "ntp -f\n",
     "sntpclock:-l 0 -s HOME/mark -- -f"),
    ("CLOCK_IP=a", {"boot_id": "other"}, MARKED + "ntp a\n", "sntpclock:-l 0 -s HOME/mark -- a"),
    ("CLOCK_IP=a", {"next": NO_PLAN}, MARKED + "ntp a\n", "sntpclock:-s HOME/mark -- a"),
    ("CLOCK_IP='a b'\nCLOCK_TYPE=tai", None, "clockctl: warning: HOME/bin/taiclock asks only the first of "
     "CLOCK_IP, a\n" + MARKED + "tai a b\n", "taiclock:a"),
    ("CLOCK_TYPE=nts\nCLOCK_CA=/ca", {}, MARKED + "nts 192.0.2.1\n",
     "ntsclock:-c /ca -r 4 -T 30000 -s HOME/mark -- 192.0.2.1"),
    ("CLOCK_IP=' , '", None, "ask the time: CLOCK_IP is not set in HOME/conf", None),
    ("CLOCK_TYPE=gps", None, "ask the time: CLOCK_TYPE is none of ntp, tai and nts", None),
    ("CLOCKSPEED_BIN=/none", None, "find sntpclock: it is not in /none", None)] + [
    (conf, None, "ask the time: CLOCK_KEYFILE and CLOCK_KEY go together, with our sntpclock only", None)
    for conf in ("CLOCK_KEY=1", "CLOCK_KEYFILE=k", "CLOCK_TYPE=tai\nCLOCK_KEYFILE=k\nCLOCK_KEY=1")])
def test_what_a_mark_asks_of_whom(host, conf, changes, said, asked):
    host.configure("CLOCK_IP=192.0.2.1\n" + conf)
    host.stand_in("taiclock", MARK[:12], ours=False)
    host.stand_in("ntsclock", MARK)
    changes is None or host.status(**changes)
    with reading(host.adjust) as fifo:
        assert host.says("mark") == said and host.lines() == [asked] * bool(asked)
        assert fifo.read(100) == (None if not asked else MARK[:12] + bytes(4) if "tai" in asked else MARK)


@pytest.mark.parametrize("answer, then, said", [
    (b"", "", "use the answer of HOME/bin/sntpclock: 0 bytes, not 16"),
    (bytes(17), "", "use the answer of HOME/bin/sntpclock: 17 bytes, not 16"),
    (b"\xff" * 16, "", "use the answer of HOME/bin/sntpclock: not a TAI64NA packet"),
    (MARK, "echo the client says why >&2; exit 1", "the client says why"),
    (MARK, "kill -KILL $$", "run HOME/bin/sntpclock: signal 9 ended it")])
def test_no_answer_is_a_line_and_no_mark_and_so_is_a_full_fifo(host, answer, then, said):
    with reading(host.adjust) as fifo:
        while fifo.write(bytes(4096)):
            pass
        assert host.says("mark") == "write HOME/adjust: Resource temporarily unavailable"
        while fifo.read(4096):
            pass
        host.stand_in("sntpclock", answer, then=then)
        assert host.says("mark") == said and fifo.read(100) is None


@pytest.mark.parametrize("ns, last, words", [
    (3200000, 720133918, "3.2 ms behind ntp 192.0.2.1, give or take 20.7 ms"),
    (-5 * 10**10, 0, "50 s ahead of ntp 192.0.2.1"), (0, 0, "0 ns behind ntp 192.0.2.1")])
def test_view_shows_clockviews_lines_and_one_in_words(host, ns, last, words):
    host.stand_in("sntpclock", ADD.pack(ns, last))
    host.stand_in("clockview", b"shown\n", then="od -An -v -tx1 | tr -d ' \\n' >>%s" % host.asked)
    assert host.says("view") == "shown\nthis clock is %s\n" % words
    assert host.lines() == ["sntpclock:-- 192.0.2.1", "clockview:", ADD.pack(ns, last).hex()]


def test_set_asks_for_any_offset_and_says_first_that_it_may_not(host, monkeypatch, capfd):
    host.stand_in("clockadd")
    assert host.says("set") == "set the clock: this process has no right to; run it as root"
    assert host.lines() == []
    monkeypatch.setattr(CTL, "may_set_clock", lambda: True)
    monkeypatch.setattr(CTL, "CONF", host.conf)
    with reading(host.adjust) as fifo:
        assert CTL.main(["clockctl", "set"]) == 0
        assert CTL.unpack(fifo.read(100)) == (0, CTL.unpack(MARK)[1])  # the clock is right now
    assert capfd.readouterr().out == "set: clock stepped by -0.003200000 s, as ntp 192.0.2.1 has it\n"
    assert host.lines() == ["sntpclock:-l 0 -- 192.0.2.1", "clockadd:"]


@pytest.fixture
def groups():
    """Some, which another user must not inherit from root."""
    before = os.getgroups()
    os.setgroups([1, 2])
    yield
    os.setgroups(before)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_root_asks_as_clocksd_with_a_small_environment(groups, monkeypatch):
    nobody = CTL.pwd.getpwnam("nobody")
    monkeypatch.setattr(CTL.pwd, "getpwnam", lambda name: {"clocksd": nobody}[name])
    monkeypatch.setenv("SECRET", "1")
    config = dict(CTL.DEFAULTS, CLOCK_KEY="7")
    said = CTL.output_of(["sh", "-c", "id -u; id -G; grep CapEff /proc/self/status; env"], config)
    uid, groups, _, capabilities, *env = said.decode().split()
    assert (int(uid), int(groups), int(capabilities, 16)) == (nobody.pw_uid, nobody.pw_gid, 0)
    assert "CLOCK_KEY=7" in env and "SECRET=1" not in env
    assert CTL.output_of(["id", "-u"], config, user="missing") == b"0\n"


def test_a_signal_ends_the_client_that_is_just_being_started_too(host, monkeypatch):
    def setgroups(_):  # in the client, before it becomes its program
        host.write("asked", "%d\n" % os.getpid())
        time.sleep(0.1)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(0.1)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(CTL.pwd, "getpwnam", lambda name: pwd.struct_passwd((name, "", 7, 7, "", "", "")))
    for name, stand_in in (("setgroups", setgroups), ("setgid", int), ("setuid", int)):
        monkeypatch.setattr(os, name, stand_in)
    child = os.fork()  # which has one thread, as clockctl: another one would take the signal
    if not child:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            CTL.output_of(["sleep", "60"], {})
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 143 << 8
    pid, = host.lines()
    assert not os.path.exists("/proc/" + pid)


def test_atto_shows_the_rate(host):
    assert host.says("atto") == "atto: not known yet; clockspeed writes it when it has two marks\n"
    pathlib.Path(host.home, "etc/atto").write_bytes(ADD.pack(1, 50000))
    assert host.says("atto") == "atto: 0.000000001000050000 s per tick, rate +50.000 ppm\n"
    assert CTL.read_foreign(host.home + "/etc/atto", 16) == ADD.pack(1, 50000)


IRREGULAR = "it is not a regular file of at most 65536 bytes"


@pytest.mark.parametrize("command, name, fifo, file", [
    ("atto", "etc/atto", IRREGULAR, IRREGULAR), ("status", "etc/status", IRREGULAR, IRREGULAR),
    ("now", "etc/status", IRREGULAR, IRREGULAR), ("sources", "mark/sources", IRREGULAR, IRREGULAR),
    ("mark", "adjust", "no clockspeed is reading it", "it is not a FIFO")])
def test_what_others_planted_is_a_line_and_never_waited_for(host, command, name, fifo, file):
    path = os.path.join(host.home, name)
    os.unlink(host.adjust)
    assert host.says("mark") == "write HOME/adjust: no clockspeed is reading it"
    for plant, said in ((os.mkfifo, fifo), (os.mkdir, "Is a directory"),
                        (lambda path: open(path, "wb").truncate(1 << 40), file),
                        (lambda path: os.symlink("/dev/zero", path), os.strerror(errno.ELOOP))):
        plant(path)
        assert re.fullmatch("(read|write) HOME/%s: %s" % (name, said), host.says(command))
        os.rmdir(path) if plant == os.mkdir else os.unlink(path)
    assert host.lines() == [], "nobody was asked"


def test_metrics_replace_files_write_to_devices_and_follow_no_link(host):
    host.status()
    path, link = host.home + "/out", host.home + "/link"
    host.write("before", "")
    os.link(host.home + "/before", path)
    for _ in range(2):
        host.write("out.tmp", "left over")
        assert host.says("metrics", "--output", path) == "" and "clockspeed_up 1\n" in open(path).read()
    assert not os.path.exists(path + ".tmp") and os.path.getsize(host.home + "/before") == 0
    assert host.says("metrics", "--output", "/dev/null") == "" and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.symlink(path, link)
    assert host.says("metrics", "--output", link) == "write output: " + os.strerror(errno.ELOOP)
    assert host.says("metrics", "--output", host.adjust) == "write output: No such device or address"


def test_metrics_tell_bound_and_deviation_or_just_that_it_is_down(host):
    host.status()
    values = dict(line.rsplit(" ", 1) for line in host.says("metrics").splitlines())
    low, high = (float(values['clockspeed_bound_seconds{side="%s"}' % side]) for side in ("low", "high"))
    assert low < float(values["clockspeed_offset_seconds"]) < high and high - low == pytest.approx(0.01)
    assert values['clockspeed_marks_total{outcome="used"}'] == "12"
    assert float(values["clockspeed_last_mark_timestamp_seconds"]) == pytest.approx(time.time() - 100, abs=60)
    for changes in (DEAD, {"wander": "x"}):
        host.status(**changes)
        assert re.fullmatch("clockctl: warning: .*\nclockspeed_up 0\n", host.says("metrics"))


OFF = r"clock now     %s real time, standard deviation \d+ us\n" \
      r"bound         real time is certainly within [-+]\S+ \S+ and [-+]\S+ \S+ of the clock\n(.|\n)*"


@pytest.mark.parametrize("changes, command, said", [
    (changes, "now", "tell the time: " + problem) for changes, problem in (
        ({"boot_id": "other"}, "clockspeed has not run since the last boot"),
        ({"age_sec": -60}, "clockspeed has not run since the last boot"),
        ({"suspended_ns": -10**12}, "clockspeed has written nothing since a suspend"),
        ({"age_sec": 1500}, "clockspeed has written nothing for 25 min"),
        (DEAD, "clockspeed does not run any more"),
        ({"bound": None}, "there has been no mark yet that tells how good it is"))] + [
    (DEAD, "until 1s --timeout 10ms", ".*: unable to tell the time: clockspeed does not run any more"),
    (DEAD, "status", "clock now     not known: clockspeed does not run any more\nrate .*\nmarks .*\ncl.*\n"),
    (DEAD, "status --json", r'(.|\n)*"offset_sec": null(.|\n)*'),
    ({}, "status", OFF % r"3\.\d+ ms behind" + r"marks         12 used, 1 doubted, 0 refused\n"
     r"last mark     used, offset \+1\.23 ms, \d\.\d+ min ago\nnext mark     wanted in (10|9\.\d+) min\n"
     r"kernel        synchronised, error at most 5 ms\nclockspeed    process \d+, steering the clock\n"),
    ({"then_off_sec": 7300}, "status", OFF % r"2\.03 h behind"),
    ({"then_off_sec": -7300}, "status", OFF % r"2\.03 h ahead of"),
    ({"bound": None}, "status", "clock now .*\nbound         there has been no mark yet (.|\n)*"),
    ({"next": NO_PLAN}, "status",
     r"(.|\n)*\nnext mark     as clockspeed_adjust has it, settling, marks so far: 13\n(.|\n)*"),
    ({}, "now", r"earliest   \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}\nlatest     \S+\nwidth      10 ms\n"
     r"deviation  \d+ us\n"),
    ({}, "until 10ms --timeout 20s", ""),
    ({}, "until 1ms --timeout 10ms", r"wait any longer: the clock is certainly within \d.* ms only"),
    (None, "wait 541 2617923", "1623\n"), (None, "wait 900000 2617923", "2617923\n"),
    (DEAD, "wait 541 2617923", "1623\n"), ({"next": NO_PLAN}, "wait 541 2617923", "1623\n"),
    ({}, "wait 541 2617923", r"(600|59\d|58\d)\n"), ({}, "wait 541 100", "100\n"),
    ({"next": dict(NO_PLAN, wait_sec=10)}, "wait 541 2617923", "64\n")])
def test_what_is_told_by_the_status(host, changes, command, said):
    changes is None or host.status(**changes)
    assert re.fullmatch(said, host.says(*command.split()))


@pytest.mark.parametrize("boot_id, due, said", [
    ("other", 0, r"wanted in (10|9\.\d+) min"), (BOOT_ID, 125, r"in 2\.\d+ min"), (BOOT_ID, -5, "now")])
def test_status_knows_the_next_mark_from_the_loop_itself(host, boot_id, due, said):
    host.status()
    host.write("mark/due", "%s %d\n" % (boot_id, time.clock_gettime(time.CLOCK_BOOTTIME) + due))
    assert re.search("^next mark     %s$" % said, host.says("status"), re.M)


def test_now_tells_the_earliest_and_the_latest(host):
    host.status(offset_ns=0)
    before_ns, now, after_ns = time.time_ns(), json.loads(host.says("now", "--json")), time.time_ns()
    assert now["earliest"] < now["latest"] and now["width_sec"] == 0.01 and now["deviation_sec"] >= 1e-4
    assert all(CTL.format_utc(before_ns - 6 * 10**6) < now[each] < CTL.format_utc(after_ns + 6 * 10**6)
               for each in ("earliest", "latest")) and CTL.format_utc(1) == "1970-01-01T00:00:00.000000001"
    host.status(offset_ns=0, scale="tai")
    latest = json.loads(host.says("now", "--json"))["latest"]
    assert CTL.format_utc(before_ns - 28 * 10**9) < latest < now["latest"]


def test_until_waits_for_the_bound(host):
    host.status()
    with process(command_of("clockctl", "until", "1ms"), env=host.env) as waiting:
        host.status(offset_ns=0, bound_ns=10**5)
        assert waiting.wait(PATIENCE_SEC) == 0
    assert host.run("until", "0").returncode == host.run("until", "1s", "--timeout", "x").returncode == 100


SOURCES = """%d ntp 192.0.2.1 1234567 412000 20000000 210000 2 c0000201 agreed
%d nts b.example - - - - - - %s
"""


def test_sources_are_a_table_with_their_ages(host):
    host.write("mark/sources", SOURCES % (time.time() - 3700, time.time() - 7300, "failed: timed out\x1b[2J"))
    _, first, second = [re.sub("  +", "|", line) for line in host.says("sources").splitlines()]
    assert first == "ntp 192.0.2.1|1.03 h|+1.23 ms|412 us|20 ms|210 us|2|c0000201|agreed"
    assert second == "nts b.example|2.03 h|-|-|-|-|-|-|failed: timed out?[2J"
    host.status()
    assert "\nsource        ntp 192.0.2.1, 1.03 h ago: agreed\n" in host.says("status")


@pytest.mark.parametrize("verdict, most, wait_sec", [
    ("failed: timed out", 2617923, 541), ("failed: kiss-o'-death RATE", 2617923, 1024),
    ("failed: kiss-o'-death DENY", 2617923, 86400), ("failed: kiss-o'-death RSTR", 600, 600)])
def test_a_mark_that_failed_is_tried_again_when_its_server_allows_that(host, verdict, most, wait_sec):
    host.write("mark/sources", SOURCES % (time.time(), time.time(), verdict))
    assert host.says("wait", "--failed", 541, most) == "%d\n" % wait_sec


BAD_VALUES = (None, "x", -1, 1e308, 10**400, float("nan"), float("inf"), [], {}, "\x1b[2J", [1e308] * 9)


def test_a_damaged_status_is_a_line_and_shows_no_escapes(host, monkeypatch, capfd):
    monkeypatch.setattr(CTL, "CONF", host.conf)
    good = a_status()
    inner = [(name, key) for name in ("last_mark", "next", "kernel", "marks", "bound") for key in good[name]]
    for name, key in [(name, None) for name in good] + inner:
        for value in BAD_VALUES:
            damaged = dict(good, **{name: dict(good[name], **{key: value}) if key else value})
            host.write("etc/status", json.dumps(damaged))
            for command in (["status"], ["status", "--json"], ["now"], ["wait", "541", "999"], ["metrics"]):
                assert CTL.main(["clockctl"] + command) in (0, 111)
    said = capfd.readouterr()
    assert "unable to read %s/etc/status: it is damaged\n" % host.home in said.err
    assert "\x1b" not in said.err + said.out and "unable to write output" not in said.err


def test_every_command_has_its_part_of_the_manual_and_unknown_words_are_named(capfd):
    def said(*words):
        return (CTL.main(["clockctl", *words]),) + tuple(capfd.readouterr())
    for name in CTL.COMMANDS:
        status, text, _ = said("help", name)
        assert status == 0 and text.startswith("clockctl " + name) and text.count("\n") > 1
        assert said(name, "-h") == said(name, "--help") == (0, text, "")
        assert said(name, "--bad") == (100, "", "clockctl: usage: %s\n" % text.partition("\n")[0])
    assert said("version") == said("--version") and said("help") == said("--help")
    for words in (["status", "x"], ["until"], ["wait", "1"], ["wait", "1", "2", "3"], ["wait", "x", "1"],
                  ["try", "a", "b"], ["run"]):
        usage = said("help", words[0])[1].partition("\n")[0]
        assert said(*words) == (100, "", "clockctl: usage: %s\n" % usage)
    for words in (["statsu"], ["help", "statsu"]):
        assert said(*words)[2].endswith("; statsu is not one; the nearest known one is status\n")


def test_check_and_graph_are_run_from_beside_it(host):
    path = shutil.copy(path_of("clockctl"), host.bin)
    os.symlink(path, host.home + "/link")
    command = [sys.executable, "-IS", host.home + "/link"]
    done = subprocess.run(command + ["check"], stderr=subprocess.PIPE)
    assert done.returncode == 111 and done.stderr.endswith(b"/clockctl-check: No such file or directory\n")
    for name in ("check", "graph"):
        host.stand_in("clockctl-" + name, then="echo $CLOCKSPEED_LOG; exit 2")
        done = subprocess.run(command + [name, "--json", "x"], stdout=subprocess.PIPE, env=host.env)
        assert (done.returncode, done.stdout == b"\n") == (2, name == "check")  # graph is given the log
    assert host.lines() == ["clockctl-check:--json x", "clockctl-graph:--json x"]


@pytest.mark.skipif(os.path.exists("/usr/local/etc/clockspeed.conf"), reason="there is a configuration here")
def test_without_modules_that_python3_minimal_lacks_it_does_what_it_can(host):
    code = "sys.modules.update(dict.fromkeys(('json', 'ctypes', 'difflib', 'shutil')))"
    env = dict(CLOCKSPEED_HOME=host.home, CLOCKSPEED_BIN=host.bin, CLOCK_IP="192.0.2.1")
    host.status()
    for command, status, said in (("view", 0, ""), ("statsu", 100, "usage: .*"), ("atto", 0, ""),
                                  ("status", 111, ".*json.*")):
        done = run("clockctl", command, code=code, **env)
        assert done.returncode == status and re.fullmatch("(clockctl: %s\n)?" % said, done.stderr)


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
    for name, value in (("HERE", host.bin), ("CONF", host.conf), ("TRY_SEC", 0.1), ("TRY_EVERY_SEC", 0.5)):
        monkeypatch.setattr(CTL, name, value)
    monkeypatch.setattr(tempfile, "tempdir", host.home + "/mark")
    yield host
    assert os.listdir(host.home + "/mark") == []
    until(lambda: not any(os.path.exists("/proc/" + line) for line in host.lines() if line.isdecimal()))


def test_try_shows_what_clockspeed_makes_of_the_answers(trying, capfd):
    assert CTL.main(["clockctl", "try", "ntp:192.0.2.9"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[0].endswith("mark 13: rate +10.00 ppm, give or take 0.01")
    assert said[1].endswith("By ntp 192.0.2.9 this machine's counter is off by 864 ms a day.")
    assert trying.lines()[1:] == ["sntpclock:-r 2 -- 192.0.2.9"]
    shutil.copy("/bin/true", trying.bin + "/clockspeed")
    assert CTL.main(["clockctl", "try", "ntp:192.0.2.9"]) == 111
    assert capfd.readouterr().err.endswith("/clockspeed: a clockspeed in C would set the clock\n")
    assert CTL.main(["clockctl", "try", "gps:192.0.2.9"]) == CTL.main(["clockctl", "try", "ntp:"]) == 100


@pytest.mark.parametrize("then, status, said", [
    ('echo "sntpclock: fatal: no such host" >&2; exit 111', 111, b"sntpclock: fatal: no such host\n")] + [
    ("cat; kill -%d $PPID; exec sleep 3571" % number, 128 + number, b"")  # cat ends once it is waited for
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)])
def test_a_try_ends_with_all_that_it_started_by_a_failure_or_signal(trying, then, status, said):
    shutil.copy(path_of("clockctl"), trying.bin)
    trying.stand_in("sntpclock", then="echo $$ >>%s; %s" % (trying.asked, then))
    with process([sys.executable, "-IS", trying.bin + "/clockctl", "try", "ntp:192.0.2.9"],
                 stderr=subprocess.PIPE, env=dict(trying.env, TMPDIR=trying.home + "/mark")) as tried:
        assert tried.communicate(timeout=PATIENCE_SEC) == (None, said) and tried.returncode == status


@pytest.mark.skipif(not hasattr(time, "CLOCK_MONOTONIC_RAW"), reason="no CLOCK_MONOTONIC_RAW")
def test_try_without_a_server_compares_the_counter_with_the_kernels_clock(monkeypatch, capfd):
    monkeypatch.setattr(CTL, "TRY_SEC", 2)
    assert CTL.main(["clockctl", "try"]) == 0
    first, *shown, last = capfd.readouterr().out.splitlines()
    words = re.fullmatch(r" 2 s: the kernel's clock is off by (\S+) ppm, give or take (\S+)", shown[1])
    assert len(shown) == 2 and abs(float(words.group(1))) < 1000 and 0 < float(words.group(2)) < 1000
    assert first.startswith("No server is asked.") and "a server would tell: clockctl try ntp:HOST" in last


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


DECODERS += [
    ("clockctl's configuration", lambda data: CTL.parse_assignments(os.fsdecode(data)),
     [b"CLOCK_IP=a # b\n", b"export CLOCK_KEY='7'\nCLOCK_TYPE=\"ntp\"\n"], ValueError),
    ("clockctl's status", CTL.parse_status, [json.dumps(a_status()).encode()], CTL.DAMAGES),
    ("clockctl's sources", CTL.parse_sources, [(SOURCES % (1, 2, "failed: timed out")).encode()],
     CTL.DAMAGES),
]


# ==== clockctl-check ================================================================================

CHECK = load("clockctl-check")


def said(stdout="", stderr="", status=0):
    return subprocess.CompletedProcess([], status, stdout, stderr)


def failed(stderr):
    return said(stderr=stderr, status=111)


def levels(findings):
    """The levels in short, and all the words."""
    findings = list(findings)
    return (" ".join(each.level for each in findings),
            "\n".join(each.text + "; " + each.todo for each in findings))


def test_one_cause_is_one_failure_and_what_follows_says_so():
    def check_services():
        return [CHECK.fail("down", "svc -u"), CHECK.fail("down too", "svc -u")]

    def check_clockspeed():
        return [CHECK.fail("does not run", "start it"), CHECK.ok("well")]

    def check_space():
        raise OSError(errno.EIO, "broken")
    taken_over = CHECK.check_marks, dict(STATUS, marks=[1])
    found = list(CHECK.findings([(check_services,), (check_clockspeed,), (check_space,), taken_over]))
    assert [" ".join((topic, finding.level)) for topic, finding in found] == [
        "services fail", "services fail", "clockspeed warn", "clockspeed ok", "space warn", "marks warn"]
    assert levels(CHECK.check_marks(status(next={"settling": 10**12})))[1].startswith("settling, the clock")
    assert found[2][1].todo == "that follows from services" and found[4][1].text == "unable to look: broken"
    assert [finding.level for _, finding in CHECK.findings([(check_clockspeed,)])] == ["fail", "ok"]


CONFIG = {"CLOCK_TYPE": "ntp", "CLOCK_IP": "192.0.2.7 192.0.2.8"}
STATUS = {"pid": 7, "doing": "steering", "observe_only": False,
          "marks": {"used": 9, "doubted": 0, "refused": 1}, "last_mark": {"outcome": "used"},
          "next": {"settling": False},
          "now": {"problem": None, "offset_sec": 0.003, "deviation_sec": 4e-4, "mark_age_sec": 105,
                  "next_mark_sec": 50}}


def status(**fields):
    """STATUS with other fields, those of `now` included."""
    now = {name: fields.pop(name, value) for name, value in STATUS["now"].items()}
    return dict(STATUS, now=now, **fields)


def disk(blocks, files=9, flags=0):
    return ["/"], lambda path: os.statvfs_result((4096, 4096, 0, 0, blocks, 9, files, files, flags, 255))


def viewed(words, stderr=""):
    return said("before: x\nafter:  y\nthis clock is %s\n" % words, stderr)


@pytest.mark.parametrize("probe, arguments, level, words", [
    ("configuration", (CONFIG, said(), said()), "ok", "ntp servers: 192.0.2.7 192.0.2.8"),
    ("configuration", ({}, failed("clockctl: fatal: unable to read c: line 1: no\n"), failed("")), "fail",
     "^unable to read c: line 1: no; correct it"),
    ("configuration", (CONFIG, failed("p: fatal: unable to run c: Permission denied"), said()), "fail",
     "^clocksd can't use it: unable to run c: Permission denied; chmod"),
    ("configuration", (dict(CONFIG, CLOCK_IP="192.0.2.1"), said(), said()), "fail", "not name your servers"),
    ("configuration", ({}, said(), said()), "fail", "not name your servers; run svc/install"),
    ("programs", (HERE, ("clockview", "clockctl")), "ok", "clockview, clockctl in "),
    ("programs", (HERE, ("clockview", "LICENSE", "none")), "fail", "no executable LICENSE or none"),
    ("users", ([("a", "-w", "/x")], {"a"}.__contains__, lambda *need: True), "ok", ""),
    ("users", ([("a", "-w", "/x"), ("b", "-r", "/y")], {"a"}.__contains__, lambda *need: False), "warn fail",
     "no user b;(.|\n)*a can't write /x; chown a /x"),
    ("clockspeed", (STATUS, said(), True), "ok", "process 7, steering"),
    ("clockspeed", (STATUS, said(), None), "ok", "process 7, steering"),
    ("clockspeed", (STATUS, said(), False), "fail", "^it does not read adjust; read its log"),
    ("clockspeed", (status(observe_only=True), said(), True), "warn", "only observes"),
    ("clockspeed", (status(problem="it died"), said(), False), "fail", "^it died; read its log"),
    ("clockspeed", (status(problem="it hangs"), said(), True), "fail", "^it hangs; read its log"),
    ("clockspeed", (None, failed("clockctl: fatal: unable to read s: there is none"), None), "fail",
     "is none; read"),
    ("clockspeed", (None, failed("clockctl: fatal: unable to read s: No module named 'json'"), True), "warn",
     "it runs, but tells nothing: unable to read s: No module named 'json'"),
    ("marks", (STATUS,), "ok",
     "^the clock is 3 ms behind, give or take 400 us, marks: 10, the next one in 50 s"),
    ("marks", (status(offset_sec=-3600),), "fail", "^the clock is 1 h ahead.*clockctl set.*83.3 d"),
    ("marks", (status(offset_sec=0.51, next={"settling": True}),), "fail", "510 ms behind"),
    ("marks", (status(next={"settling": True}, last_mark={"outcome": "doubted"}, next_mark_sec=1),), "ok",
     "^settling, .*marks: 10, .*in 1 s"),
    ("marks", (status(offset_sec=None, last_mark=None, next={"settling": True}),), "ok",
     "^settling, none in this boot, the next one in 50 s"),
    ("marks", (status(offset_sec=None, last_mark=None, next_mark_sec=None),), "warn",
     "none in this boot; read the log"),
    ("marks", (status(next_mark_sec=-601),), "warn", "the next one is late"),
    ("marks", (status(next_mark_sec=-599),), "ok", "marks: 10; $"),
    ("marks", (status(mark_age_sec=3 * 10**6, next_mark_sec=None),), "warn", "late"),
    ("marks", (status(last_mark={"outcome": "doubted"}),), "warn", "one was doubted"),
    ("marks", (status(problem="it died"),), "warn", "not known"), ("marks", (None,), "warn", "not known"),
    ("server", (viewed("3.2 ms behind ntp 192.0.2.1, give or take 0.4 ms"),), "ok",
     "^this clock is 3.2 ms behind"),
    ("server", (viewed("1 h ahead of ntp x, give or take 1 ms"),), "fail", "1 h ahead.*`clockctl set`"),
    ("server", (viewed("1 ms behind ntp x", "sntpclock: warning: 192.0.2.8: a falseticker\n"),), "warn ok",
     "^192.0.2.8: a falseticker; correct CLOCK_IP"),
    ("server", (failed("sntpclock: fatal: this clock is 6 years off; see `clockctl set`"),), "fail",
     "^this clock is 6 years off; see `clockctl set`; $"),
    ("server", (said(viewed("1 ms behind x").stdout, "c: fatal: it failed", 1),), "fail", "^it failed"),
    ("server", (said(),), "fail", "ended with 0"),
    ("server", (failed("x: warning: w\nx: fatal: unable to ask x: no usable answer\nclockctl: fatal: z"),),
     "fail", "^unable to ask x: no usable answer; correct"),
    ("space", disk(10**6), "ok", "3906 MB at /"), ("space", disk(10**6, files=0), "fail", "full"),
    ("space", disk(200), "fail", "full"), ("space", disk(10**6, flags=os.ST_RDONLY), "fail", "read-only"),
    ("counter", ("tsc",), "ok", "tsc"), ("counter", ("hpet",), "warn", "slow"),
    ("counter", ("jiffies",), "fail", "milliseconds"),
    ("scale", ("utc", "utc", None), "ok", ""), ("scale", ("tai", "tai", "utc"), "fail", "set CLOCK_SCALE"),
    ("scale", ("tai", "utc", "tai"), "warn", "the time zone utc")])
def test_a_probe_finds(probe, arguments, level, words):
    found = levels(getattr(CHECK, "check_" + probe)(*arguments))
    assert found[0] == level and re.search(words, found[1]), found


@pytest.mark.parametrize("kept, tool, shown, age_sec, level, words", [
    ((), "svstat", "s: up (pid 7) 0 seconds", 500, "ok", "up for 8.33 min"),  # the clock was set back
    ((), "svstat", "s: up (pid 7) 900 seconds", 2.9, "warn", "just been started"),
    ((), "svstat", "s: down 3 seconds, normally up", None, "fail", "down 3 seconds.*svc -u"),
    (("stat",), "sv", "run: s: (pid 7) 5s; run: log: (pid 8) 5s", 3, "ok", "3 s"),
    (("stat",), "sv", "down: s: 5s; run: log: (pid 8) 5s", 50, "fail", "down"),
    (("death_tally",), "s6-svstat", "up (pid 7 pgid 7) 5 seconds", 50, "ok", "50 s")])
def test_a_service_is_up_by_the_age_of_its_process(kept, tool, shown, age_sec, level, words, tmp_path):
    for service in ("clockspeed", "clockspeed_adjust"):
        (tmp_path / service / "supervise").mkdir(parents=True)
        for name in kept:
            (tmp_path / service / "supervise" / name).touch()

    def run_tool(command):
        assert command[0] == tool
        return said(shown)
    found = levels(CHECK.check_services([str(tmp_path)], run_tool, {"7": age_sec}.get))
    assert found[0] == level + " " + level and re.search(words, found[1])
    with process(["sleep", "60"]) as young:
        assert 0 <= CHECK.age_sec(young.pid) < PATIENCE_SEC and CHECK.age_sec("0") == 0
    assert levels(CHECK.check_services([str(tmp_path / "none")]))[0] == "warn warn"


@pytest.mark.parametrize("uid, mode, level", [
    (0, 0o40755, "ok"), (0, 0o41777, "ok"), (0, 0o120777, "ok"), (0, 0o40775, "fail"), (0, 0o100666, "fail"),
    (1234, 0o40755, "fail"), (77, 0o40755, "ok")])
def test_who_can_change_what_root_runs(uid, mode, level):
    def lstat(path):
        odd = path == "/usr/local/etc"
        return os.stat_result((mode if odd else 0o40755, 0, 0, 1, uid if odd else 0, 0, 0, 0, 0, 0))
    found = levels(CHECK.check_owners(["/usr/local/etc/clockspeed.conf", "/usr/local/etc/x"], [], lstat, 77))
    assert found[0] == level and (level == "ok" or "/usr/local/etc" in found[1])
    private = levels(CHECK.check_owners([], ["/usr/local/etc"], lstat, 77))
    assert private[0] == ("fail" if mode == 0o100666 else "ok")


def test_whether_marks_are_read_from_the_fifo(tmp_path):
    fifo, link, file = (str(tmp_path / name) for name in ("fifo", "link", "file"))
    os.mkfifo(fifo)
    os.symlink(fifo, link)
    (tmp_path / "file").touch()
    assert not any(map(CHECK.is_read, (fifo, file, str(tmp_path / "none"))))
    with reading(fifo):
        assert CHECK.is_read(fifo) is True and CHECK.is_read(link) is False


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another")
def test_root_looks_with_the_eyes_of_another(groups, tmp_path):
    secret = tmp_path / "conf"
    secret.write_text("x")
    secret.chmod(0o600)
    assert CHECK.run(["cat", str(secret)]).stdout == "x" and not CHECK.may_use("nobody", "-r", str(secret))
    assert "Permission denied" in CHECK.complaint(CHECK.run([str(secret)], "nobody"))
    assert CHECK.may_use("nobody", "-r", str(tmp_path / "none")) and CHECK.may_use("nobody", "-r", "/")
    assert CHECK.run(["id", "-G"], "nobody").stdout.split() == [str(CHECK.find_user("nobody").pw_gid)]


def test_who_sets_the_clock_is_known_by_name_or_by_the_log(tmp_path):
    line = "@4000000000000e1a00000000 foreign: x\n"
    assert levels(CHECK.check_rivals(tmp_path, line, 20000))[0] == "ok"
    for pid, name, words in (
            ("1", "chronyd", "a"), ("2", "chronyd", "a\0-x"), ("3", "sh", "-x"), ("4", "ntpd", "a")):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "comm").write_text(name + "\n")
        (tmp_path / pid / "cmdline").write_text(words + "\0")
    found = levels(CHECK.check_rivals(tmp_path, line, 10000))
    assert found[0] == "fail fail fail" and "by clockspeed's log another program" in found[1]
    assert set(re.findall(r"(\w+ sets the clock too, as process \d);", found[1])) == {
        "chronyd sets the clock too, as process 1", "ntpd sets the clock too, as process 4"}


def test_check_looks_at_every_topic_where_nothing_is_installed_and_counts(tmp_path):
    conf = tmp_path / "conf"
    conf.write_text("CLOCK_IP=127.0.0.9\nCLOCKSPEED_HOME=%s\nCLOCKSPEED_BIN=%s\nCLOCK_CA=a=b\n" % (
        tmp_path, HERE))
    *lines, _ = run("clockctl-check", CLOCKSPEED_CONF=conf).stdout.decode().splitlines()
    found = {topic: level for level, topic in (line.partition(":")[0].split() for line in lines)}
    assert " ".join(topic for topic in found if topic not in ("users", "counter")) == (
        "configuration programs owners services clockspeed marks server rivals scale")
    assert [found[topic] for topic in ("configuration", "programs", "scale")] == ["ok"] * 3
    assert "unable to look" not in str(lines)
    conf.write_text("CLOCK_IP=(x)\n")
    done = run("clockctl-check", CLOCKSPEED_CONF=conf)
    first, *rest = done.stdout.decode().splitlines()
    assert done.returncode == 2 and rest == ["0 ok, 0 warn, 1 fail"]
    assert first.startswith("fail  configuration: unable to read %s" % tmp_path) and "line 1" in first
    assert run("clockctl-check", "x").returncode == 100
    with open("/dev/full", "wb") as full:
        said = subprocess.run(command_of("clockctl-check"), stdout=full, stderr=subprocess.PIPE).stderr
    assert said == b"clockctl-check: fatal: unable to write output: No space left on device\n"


# ==== clockctl-graph ================================================================================

GRAPH = load("clockctl-graph")
LABEL = "@400000006b49d20a075bcd15 "
A_MARK = ("mark: tick 5 ns, real 1800000001000000000 ns, spread 2 ns, distance - ns, offset -0.5 s, "
          "error 0.25 s, bound 0.75 s, rate +3.5 ppm, rate error 0.5 ppm, refused")


def parse_line(line):
    """What the graph makes of a line of the log."""
    marks = [GRAPH.parse_mark(match) for match in GRAPH.MARK_LINE.finditer(line)]
    return marks[0] if marks else None


@pytest.mark.parametrize("line, mark", [
    (LABEL + A_MARK, ("refused", 1800000001, -0.5, 0.25, 0.75, 3.5, 0.5)),
    (LABEL + A_MARK.replace("0.75", "-"), ("refused", 1800000001, -0.5, 0.25, None, 3.5, 0.5)),
    (LABEL + A_MARK.replace("1800000001000000000", "1e30"), None),
    (A_MARK, None), (LABEL + A_MARK + "?", None), (LABEL + A_MARK.replace("0.25", "nan"), None),
    (LABEL + A_MARK.replace("0.25", "-"), None), (LABEL + A_MARK.replace("0.25", "1e300"), None),
    (LABEL + A_MARK.replace("error", "terror"), None), (LABEL + "mark: , used", None),
    (LABEL + A_MARK.replace(", refused", ", x 1 s" * 200 + ", refused"), None),
    (LABEL + "slew: 0.5 s", None), (LABEL + " " + A_MARK, None)])
def test_a_mark_is_read_off_the_log(line, mark):
    assert parse_line(line) == mark


def write_log(directory, count, offset=lambda number: number * 1e-6):
    """Marks ten minutes apart, in two of multilog's files."""
    lines = [LABEL + "mark: tick 1 ns, real %d ns, offset %+.9f s, error 0.000050000 s, bound 0.000900000 s, "
             "rate +12.%04d ppm, rate error 0.0100 ppm, used\n" % (
                 (1800000000 + 600 * number) * 10**9, offset(number), number) for number in range(count)]
    directory.mkdir(exist_ok=True)
    (directory / ("@" + "4" * 24 + ".s")).write_text(
        "".join(lines[:count // 2]) + LABEL + "moved: x\nrubbish\n\xff")
    (directory / "current").write_text("".join(lines[count // 2:]))
    return str(directory)


def test_a_log_is_read_whole_and_nothing_else_is(tmp_path):
    log = write_log(tmp_path / "log", 9)
    assert [round(mark.offset_sec * 1e6) for mark in GRAPH.read_marks(log)] == list(range(9))
    assert GRAPH.read_foreign(log + "/current", os.path.getsize(log + "/current"))

    def refuses(log, said):
        done = run("clockctl-graph", CLOCKSPEED_LOG=log)
        assert (done.returncode, done.stdout) == (111, b"") and "unable to " + said in done.stderr
    for plant in (lambda path: os.symlink("/dev/zero", path), os.mkfifo):
        os.unlink(log + "/current")
        plant(log + "/current")
        refuses(log, "read the log in " + log)
    refuses(write_log(tmp_path / "short", 2), "draw the offset: marks to draw so far: 2; a graph needs 3")


def chart_of(values, times=None):
    return GRAPH.make_chart("offset", [GRAPH.Mark("used", at_sec, value, 1e-12, None, 0, 0)
                                       for at_sec, value in zip(times or range(len(values)), values)])


def test_standard_deviation_and_bound_are_two_things(tmp_path):
    log = write_log(tmp_path / "log", 200, lambda number: 1e-4 * (number % 20) - 1e-3)

    def shown(*words):
        done = run("clockctl-graph", *words, CLOCKSPEED_LOG=log)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.decode("ascii").splitlines()
    title, legend, *picture, axis, dates = shown()
    assert title == "offset, real time minus system clock; marks: 200 used"
    assert legend == "* offset +900 us,  . deviation 50 us,  = bound 900 us"
    assert re.fullmatch(r" +01-15 08:00 +01-16 00:35 +01-16 17:10", dates)
    assert all(glyph in "".join(picture) for glyph in "*.=") and "+1 ms +" in "".join(picture)
    assert {len(line) for line in [axis, dates]} == {79} and len(picture) == 17
    assert shown("error")[0].startswith("standard deviation")
    picture = tmp_path / "graph.svg"
    picture.write_text("what was there before")
    os.link(picture, str(tmp_path / "before"))
    assert shown("--svg", picture) == []
    assert (tmp_path / "before").read_text() == "what was there before"
    elements = xml.etree.ElementTree.fromstring(picture.read_text()).iter()
    classes = [each.get("class") for each in elements if each.get("points", "").count(",") == 200]
    assert sorted(classes) == ["bound", "bound", "deviation", "deviation", "value"]
    assert len(shown("--csv")) == 201 and shown("--csv")[1] == (
        "2027-01-15T08:00:00Z,used,-0.001000000,0.000050000,0.000900000,12.000000000,0.010000000")


@pytest.mark.parametrize("low, high", [
    (-1, 1), (0, 3), (0.3, 0.6), (1.2345, 1.23451), (-7e-9, 1e-9), (0, 1e12), (5, 65)])
def test_ticks_are_round_some_and_differ(low, high):
    ticks = GRAPH.round_ticks(low, high)
    assert 3 <= len(ticks) <= 8 and all(low - 1e-12 <= tick <= high * (1 + 1e-12) for tick in ticks)
    words = [words for _, words in chart_of([low, high, low]).ticks]
    assert len(set(words)) == len(words) >= 2, words


@pytest.mark.parametrize("field, value, words", [
    ("offset_sec", 90, "+1.5 min"), ("offset_sec", -7200, "-2 h"), ("error_sec", 0.0025, "2.5 ms"),
    ("bound_sec", 3e-10, "0.3 ns"), ("error_sec", 0, "0"), ("rate_ppm", 12.345, "+12.3 ppm"),
    ("rate_error_ppm", 0.01, "0.01 ppm"), ("offset_sec", -0.9997, "-1 s"),
    ("rate_ppm", 1000, "+1000 ppm"), ("offset_sec", 1.5e9, "+17400 d")])
def test_a_value_has_the_unit_and_sign_that_suit_it(field, value, words):
    assert GRAPH.format_value(field, value) == words


def test_one_value_far_out_does_not_flatten_the_rest():
    values = [3600.0] + [number * 1e-6 for number in range(41)]
    assert GRAPH.value_range(values) == pytest.approx((-2e-6, 42e-6))
    assert GRAPH.round_ticks(0, 3) == [0, 1, 2, 3]
    assert chart_of(values).title.endswith("marks: 42 used, 1 beyond the edge")


@pytest.mark.parametrize("span_sec, date", [
    (3600, "01-15 09:00:00"), (3601, "01-15 09:00"), (345600, "01-19 08:00"), (345601, "2027-01-19")])
def test_dates_are_as_fine_as_the_span_wants(span_sec, date, monkeypatch):
    monkeypatch.setattr(GRAPH.time, "localtime", time.gmtime)
    times = [1800000000 + at_sec for at_sec in (0, 9, span_sec)]
    chart = chart_of([1, 1, 1], times)
    assert chart.dates[-1] == (1, date)
    assert all(len(line) <= 60 for line in GRAPH.draw_text(chart, 60))


def test_a_curve_has_no_gaps_and_ends_at_the_edges():
    rng = random.Random(SEED)
    points = sorted((rng.random(), rng.random()) for _ in range(60))
    rows = {}
    for column, row in GRAPH.strokes([(0, 0.5)] + points + [(1, 0.5)], 200, 50):
        rows.setdefault(column, set()).add(row)
    assert sorted(rows) == list(range(200))
    for left in range(199):
        assert any(abs(row - other) <= 1 for row in rows[left] for other in rows[left + 1])
        assert len(rows[left]) == max(rows[left]) - min(rows[left]) + 1
    assert not any(list(GRAPH.strokes(points, 9, 9)) for points in ([(0, -2), (1, -1)], [(0, 2), (1, 3)]))
    assert {row for _, row in GRAPH.strokes([(0, -2), (0.5, 3), (1, -2)], 9, 9)} == set(range(9))
    assert set(GRAPH.strokes([(0, 0), (1, 1)], 9, 9)) == {(each, each) for each in range(9)}


@pytest.mark.parametrize("words", (["offsets"], ["offset", "rate"], ["--csv", "--svg", "x"], ["--svg"]))
def test_graph_words_that_make_no_sense_are_usage(words):
    assert run("clockctl-graph", *words).returncode == 100


@pytest.mark.parametrize("name, word, status", [
    ("clockctl", "atto", 141), ("clockctl-check", "", -signal.SIGPIPE),
    ("clockctl-graph", "--csv", -signal.SIGPIPE)])
def test_a_reader_that_has_gone_ends_it_quietly(host, name, word, status):
    output, pipe = os.pipe()
    os.close(output)  # as `| head` has it
    done = subprocess.run(command_of(name, *word.split()), stdout=pipe, stderr=subprocess.PIPE,
                          env=dict(host.env, CLOCKSPEED_LOG=host.home))
    os.close(pipe)
    assert (done.returncode, done.stderr) == (status, b"")


def text_of(data):
    return data.decode("ascii", "replace")


def read_as_clockctls(text):
    CHECK.parse_environment(said(text)), levels(CHECK.check_server(said(text, text)))
    CHECK.FOREIGN_LINE.findall(text)


DECODERS += [
    ("a mark in the log", lambda data: parse_line(text_of(data)), [(LABEL + A_MARK + "\n").encode()], ()),
    ("what check reads of clockctl", lambda data: read_as_clockctls(text_of(data)),
     [b"CLOCK_IP=192.0.2.1\nCLOCK_TYPE=ntp\n", b"this clock is 3 ms behind\n", b"x: warning: y: fatal: z"],
     ()),
]


# ==== the services ==================================================================================

every_shell = pytest.mark.parametrize(
    "shell", (["dash"], ["bash"], ["mksh"], ["busybox", "sh"]), ids=lambda words: words[0])
ADJUST = path_of("svc/clockspeed_adjust/clock_adjust.sh")
# marks fail by the file `failing`; the sleeps are noted, and end at once but for the last
FAKE_CLOCKCTL = """case $1 in
run) echo %(home)s ;; atto) echo atto ;;
mark) [ ! -e %(home)s/failing ] ;;
wait) [ -z "$SAYS" ] && exec %(clockctl)s "$@"; echo "$SAYS" ;;
esac
"""
FAKE_SLEEP = """echo "$1 $(cat %(home)s/mark/due | cut -d' ' -f2)" >>%(home)s/sleeps
[ $(wc -l <%(home)s/sleeps) -lt $SLEEPS ] || exec /bin/sleep 3573
"""


@pytest.fixture
def loop(host):
    """Starts the loop in a shell; its clockctl and sleep are stand-ins."""
    clockctl = "%s -IS %s" % (sys.executable, path_of("clockctl"))
    for name, text in (("clockctl", FAKE_CLOCKCTL), ("sleep", FAKE_SLEEP)):
        host.write("bin/" + name, "#!/bin/sh\n" + text % {"home": host.home, "clockctl": clockctl}, 0o755)

    def start(shell, **env):
        need(shell[0])
        host.write("sleeps", "")
        return process(shell + [ADJUST], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(
            UTC_ENV, PATH=host.bin + ":" + os.environ["PATH"], CLOCKSPEED_CONF=host.conf, **env))

    def sleeps(count):
        path = pathlib.Path(host.home, "sleeps")
        until(lambda: path.read_text().count("\n") == count)
        return [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
    host.start, host.sleeps = start, sleeps
    return host


@every_shell
@pytest.mark.parametrize("says, failed, due, waits", [
    ("", "", "", [541 * 3**power for power in range(8)] + [2617923] * 2), ("100", "", "", [100, 100]),
    ("garbage", "", "", [541, 1623]), ("", "timed out", "", [541, 541]),
    ("", "kiss-o'-death RATE", "", [1024, 1024]), ("", "", "BOOT +300", [300]), ("", "", "BOOT -300", [541]),
    ("", "", "other +300", [541]), ("", "", "BOOT +9999999", [541]), ("", "", "BOOT x", [541])])
def test_the_waits_triple_or_go_by_clockctl_and_what_is_due_is_kept(loop, shell, says, failed, due, waits):
    up_sec = int(time.clock_gettime(time.CLOCK_BOOTTIME))
    due = re.sub(r"[+-]\d+", lambda found: str(up_sec + int(found.group())), due)
    loop.write("mark/due", due.replace("BOOT", BOOT_ID) + "\n")
    if failed:
        loop.write("failing", "")
        loop.write("mark/sources", SOURCES % (time.time(), time.time(), "failed: " + failed))
    with loop.start(shell, SLEEPS=str(len(waits)), SAYS=says) as adjusting:
        seen = loop.sleeps(len(waits))
        slack_sec = PATIENCE_SEC if due else 0
        assert all(wait - slack_sec <= sleep <= wait for wait, (sleep, _) in zip(waits, seen))
        assert all(-1 <= due - sleep - up_sec <= PATIENCE_SEC for sleep, due in seen)
        adjusting.terminate()
        assert adjusting.wait(PATIENCE_SEC) == 0 and not os.path.exists(loop.home + "/mark/due")
        said = adjusting.stdout.read().decode().splitlines()
    marks = len(waits) - (waits == [300])
    assert (said.count("==="), said.count("atto")) == (marks, 0 if failed else marks)
    assert said[-1] == "Waiting %d seconds until next adjustment..." % seen[-1][0]


@every_shell
@pytest.mark.parametrize("under_way", ("mark", "sleep"))
def test_a_term_ends_the_mark_or_sleep_under_way(loop, shell, under_way):
    noted = "echo $$ >>%s\nexec /bin/sleep 3572\n" % loop.asked
    loop.write("bin/sleep", "#!/bin/sh\n" + noted, 0o755)
    loop.write("bin/clockctl", "#!/bin/sh\n[ $1 = %s ] || exit 0\n%s" % (under_way, noted), 0o755)
    with loop.start(shell) as adjusting:
        until(loop.lines)
        adjusting.terminate()
        assert adjusting.wait(PATIENCE_SEC) == 0
    until(lambda: not os.path.exists("/proc/" + loop.lines()[0]))


# ==== svc/install ===================================================================================

INSTALL = path_of("svc/install")
PROGRAMS = ("clockspeed", "sntpclock", "taiclock", "ntsclock", "taiclockd", "clockadd", "clockview")
SERVICES = ("clockspeed", "clockspeed_adjust", "taiclockd")
BIN, CONF = "usr/local/clockspeed/bin/", "usr/local/etc/clockspeed.conf"


class Image:
    """A directory into which svc/install installs."""

    def __init__(self, path):
        self.path, self.command = path, [INSTALL, "--root", path]
        path.mkdir()

    def install(self, *args, shell=(), status=0, **options):
        """-> the lines that it printed."""
        words = [str(word) for word in list(shell) + self.command + list(args)]
        options = dict({"stdout": subprocess.PIPE}, **options)
        done = subprocess.run(words, env=UTC_ENV, timeout=60, stderr=subprocess.PIPE, **options)
        lines = ((done.stdout or b"") + done.stderr).decode().splitlines()
        assert done.returncode == status, lines
        return lines

    def __call__(self, name):
        return self.path / name

    def read(self, name):
        return self(name).read_text()

    def write(self, name, text="", mode=0o644):
        self(name).parent.mkdir(parents=True, exist_ok=True)
        self(name).write_text(text)
        self(name).chmod(mode)

    def tree(self):
        """-> name: mode, of all that is in it."""
        return {str(path.relative_to(self.path)): oct(path.lstat().st_mode)[-4:]
                for path in self.path.rglob("*")}


@pytest.fixture
def image(tmp_path):
    return Image(tmp_path / "image")


@every_shell
def test_every_shell_installs_the_same_and_then_finds_nothing_to_do(image, shell):
    need(shell[0])
    args, umask = ("--server", "ntp:192.0.2.7,2001:db8::1"), 0o002 if shell == ["dash"] else 0o077
    planned = image.install("--dry-run", *args, shell=shell)
    assert not image.tree()
    assert planned == image.install(*args, shell=shell, preexec_fn=lambda: os.umask(umask))
    tree = image.tree()
    for name in [BIN + program for program in PROGRAMS] + ["usr/local/bin/clockctl"]:
        source = read_script(os.path.basename(name))
        assert image.read(name) == source.replace("#!/usr/bin/env python3\n", "#!/usr/bin/python3 -IS\n", 1)
        assert tree[name] == "0755"
    for script in [name + log + "run" for name in SERVICES for log in ("/", "/log/")]:
        assert image.read("var/svc.d/" + script) == read_script("svc/" + script)
    assert tree["usr/local/clockspeed/adjust"] == "0600" and tree["usr/local/clockspeed/mark"] == "0700"
    plain = {mode for name, mode in tree.items() if not name.endswith(("adjust", "/mark"))}
    assert plain == {"0755", "0644"}, "directories and programs, files"
    assert '\nCLOCK_IP="192.0.2.7 2001:db8::1"\n' in image.read(CONF)
    assert image.install(*args, shell=shell)[0] == image.install(shell=shell)[0] == "nothing to do"
    planned = image.install("--remove", "--purge", "--dry-run", shell=shell)
    assert image.tree() == tree
    assert image.install("--remove", "--purge", shell=shell) == planned and "userdel" in planned[-1]
    assert set(image.tree()) == {"usr", "usr/local", "usr/local/bin", "usr/local/etc", "var"}
    assert image.install("--remove", "--purge", shell=shell) == ["nothing to do"]


@pytest.mark.parametrize("args, said", [
    ("--server 192.0.2.1", "usage: --server 192.0.2.1: the type is missing: ntp:192.0.2.1, or tai: or nts:"),
    ("--server ntp:", "usage: --server ntp:: that is no list of hosts"),
    ("--server tai:a,,b", "usage: --server tai:a,,b: that is no list of hosts"),
    ('--server nts:a";reboot', "usage: --server nts:a\";reboot: that is no list of hosts"),
    ("--server", "usage: --server needs a value"),
    ("--purge", "usage: --purge goes with --remove"),
    ("--remove --start", "usage: --remove goes with --purge, --root and --dry-run"),
    ("--remove --server ntp:a", "usage: --remove goes with --purge, --root and --dry-run"),
    ("--no-such", r"usage: install \[.* \(--no-such is unknown\)"),
    ("--root /dev/null", "fatal: unable to use /dev/null: it is no directory"),
])
def test_what_is_wrong_is_one_line_and_changes_nothing(image, args, said):
    line, = image.install(*args.split(), status=111 if said.startswith("fatal") else 100)
    assert re.fullmatch("install: " + said, line) and not image.tree()


def test_its_manual_and_version(image):
    with open("/dev/full", "wb") as full:
        assert image.install(status=111, stdout=full) == ["install: fatal: unable to write output"]
    image.command = [INSTALL]
    manual = image.install("--help")
    assert manual == image.install("-h") and manual[-1].startswith("    0 done, or nothing to do; ")
    assert manual[0].startswith("install - ") and {"SYNOPSIS", "OPTIONS", "EXIT STATUS"} < set(manual)
    assert image.install("--version") == ["install " + load("clockview").RELEASE]


def test_it_goes_by_the_configuration_and_changes_two_lines_of_it(image):
    conf = ('\texport CLOCKSPEED_HOME="/srv/clock"\nCLOCKSPEED_BIN=/opt/bin  # ours\n'
            'CLOCK_TYPE="tai"\n#CLOCK_IP="b"')
    image.write(CONF, conf, 0o640)
    image.write("usr/local/bin/python3")
    image.install()
    assert image.read(CONF) == conf and image.tree()[CONF] == "0640"
    image.install("--server", "ntp:a,b")
    assert image.read(CONF) == conf.replace('"tai"', '"ntp"') + '\nCLOCK_IP="a b"\n'
    assert image.read("opt/bin/clockview").startswith("#!/usr/local/bin/python3 -IS\n")
    for name in ("clockspeed", "taiclockd"):
        assert " /opt/bin/%s" % name in image.read("var/svc.d/%s/run" % name).splitlines()[-1]
    assert {"opt/bin/sntpclock", "srv/clock/adjust", "srv/clock/etc"} <= set(image.tree())
    for wrong in ("/srv/$(reboot)", "srv", "/srv/", "/srv/../etc"):
        image.write(CONF, "CLOCKSPEED_BIN='%s'\n" % wrong)
        assert image.install(status=111) == [
            "install: fatal: unable to use CLOCKSPEED_BIN: it is not a plain absolute path"]


def test_the_next_version_replaces_what_was_not_edited(image):
    run = "var/svc.d/clockspeed/run"
    image.install("--server", "tai:192.0.2.7")
    image.write(run, "#!/bin/sh\n# edited\n")
    shutil.copytree(HERE, image("next"), ignore=shutil.ignore_patterns(".*"))
    for name in ("next/clockview.py", "next/svc/clockspeed/run"):
        image.write(name, image.read(name) + "# the next version\n", 0o755)
    text = read_script("svc/install").replace("-check clockctl-graph", "-check")  # one program less
    image.write("next/svc/install", text, 0o755)
    image.command[0] = image("next/svc/install")
    assert image.install()[:4] == [
        "write /usr/local/clockspeed/bin/clockview", "write /%s.new, since /%s was edited" % (run, run),
        "remove /usr/local/bin/clockctl-graph", "write /var/svc.d/.clockspeed-installed"]
    assert image.install()[0] == "nothing to do"
    image(run + ".new").rename(image(run))
    assert image.install()[0] == "write /var/svc.d/.clockspeed-installed"


def test_removal_leaves_what_was_edited_or_learned_and_follows_no_link(image):
    kept = {"var/svc.d/clockspeed/run", "usr/local/clockspeed/etc/state", "var/multilog/clockspeed/current"}
    image.write("theirs/file")
    image.write("var/svc.d/taiclockd/run", "it was here before\n")
    image.install("--server", "ntp:192.0.2.7")
    for name in kept | {"var/multilog/clockspeed/deep" + "/deep" * 300 + "/file"}:
        image.write(name, "edited")
    image.install()
    image("var/multilog/clockspeed_adjust").rmdir()
    for link in ("taiclockd/link", "clockspeed_adjust"):
        image("var/multilog/" + link).symlink_to(image("theirs"))
    for _ in range(2):
        edited = image.install("--remove")[-1]
        assert edited == "left to you: remove /var/svc.d/clockspeed/run, which was edited"
    assert image.install("--remove")[0] == "nothing to do"
    assert kept | {CONF} < set(image.tree()) and not os.path.exists(image(BIN))
    said, left = image.install("--remove", "--purge"), set(image.tree())
    assert not left & (kept | {CONF}) and "var/multilog/clockspeed/deep" in left
    assert "left to you: remove /var/multilog/clockspeed, which holds something that is not ours" in said
    assert "var/multilog/taiclockd" not in left and "theirs/file" in left
    assert image.read("var/svc.d/taiclockd/run") == "it was here before\n"


# what svc/install calls on a host, but busybox lacks or a test must not do: it notes what it is asked
STAND_IN = """#!/bin/sh
for last; do :; done
case ${0##*/}:$1:$last in
svok:* | s6-svok:* | sv:status:*) [ -e /supervised ]; exit ;;
python3:*:import*) cat /python; exit ;;
python3:*:view) cat /shown ;;
svc:-dx:* | sv:exit:* | s6-svscanctl:-an:*) [ -e /stubborn ] || rm /supervised ;;
groupadd:* | addgroup:*) echo "$last:x:100:" >>/etc/group ;;
useradd:* | adduser:*) echo "$last:x:$((200 + $(wc -l </etc/passwd))):100::/:" >>/etc/passwd ;;
esac
echo "${0##*/} $*" >>/asked
"""
SET_UP = r"""BUSYBOX mkdir -p /bin /tmp /dev /etc /usr/local/clockspeed /srv/scan /run/service /proc/12
BUSYBOX --install -s /bin
for each in svok svc sv s6-svok s6-svc s6-svscanctl groupadd useradd addgroup adduser python3 sleep; do
    ln -s /stand-in /usr/bin/$each
done
echo /usr/bin/python3 >/python; echo this clock is 2 s behind it >/shown
printf 'root:x:0:0::/:\nnobody:x:7:7::/:\n' >/etc/passwd; echo root:x:0: >/etc/group
printf 'passwd: files\ngroup: files\n' >/etc/nsswitch.conf; touch /dev/null /asked
chmod -R go=rX /
"""
PROCESS = r"""#!/bin/sh
printf 'Name:\t%s\nUid:\t%d\t%d\t0\t0\n' $name ${uid:-0} ${uid:-0} >/proc/12/status
printf '%s\0' $name $words >/proc/12/cmdline
echo $name >/proc/12/comm; echo "0::$cgroup" >/proc/12/cgroup
ln -s ${root:-/} /proc/12/root; ln -s ${cwd:-/} /proc/12/cwd
"""


@pytest.fixture
def machine(image):
    """The image as a host of its own: a chroot with busybox, stand-ins, and files for its processes."""
    need("busybox", "ldd", "chroot")
    if os.getuid():
        pytest.skip("not root")
    busybox = shutil.which("busybox")
    libraries = re.findall(r"/\S+(?= \(0x)", subprocess.check_output(["ldd", busybox]).decode())
    files = pathlib.Path(libraries[0]).parent.glob("libnss_files.so.2")  # an old libc reads /etc/passwd by it
    for name in libraries + [busybox] + [str(path) for path in files]:
        image.write(name[1:])
        shutil.copy(name, image(name[1:]))
    shutil.copytree(HERE, image("src"), ignore=shutil.ignore_patterns(".*", "*_all.py"))
    image.write("stand-in", STAND_IN, 0o755)
    image.write("usr/bin/process", PROCESS, 0o755)
    image.command = ["chroot", image.path, "/bin/env", "PATH=/usr/bin:/bin", "/src/svc/install"]
    inside = ["chroot", str(image.path), busybox, "sh", "-ec"]
    image.sh = lambda script: subprocess.run(inside + [script], check=True)
    image.sh(SET_UP.replace("BUSYBOX", busybox))
    return image


SVSCAN = "name=svscan words=/srv/scan process; "
RUNIT = "rm /usr/bin/useradd; name=runsvdir words='-P /srv/scan log:' process; "
S6 = "name=s6-svscan words=/run/service process; "
NEXT = "svc/install --start; touch /supervised; echo '# the next version' >>clockview.py"
RUNS = "svc/install --start; touch /supervised"
START, ASK = ["--start", "--dry-run"], ["--server", "ntp:192.0.2.7"]
SCANS, NO_SCAN = "ln -s .*/clockspeed /srv/scan/clockspeed", "fatal: .*: no supervisor is here; install .*"
KEEPS = "fatal: unable to start: .* runs and keeps the clock; stop it first: "


@pytest.mark.parametrize("before, args, said", [
    ("name=svscan words='-P /no /srv/scan /tmp' process", START, SCANS),
    ("name=svscan cwd=/srv/scan process", START, SCANS), (SVSCAN + "chmod 775 /srv", START, NO_SCAN),
    ("name=svscan words=/srv/scan uid=7 process", START, NO_SCAN),
    ("name=svscan words=/srv/scan root=/tmp process", START, NO_SCAN),
    (SVSCAN + "chown 7 /srv/scan", START, NO_SCAN),
    (SVSCAN + "chmod 757 /srv/scan", [], "warning: /srv/scan is scanned, but others .*"),
    ("mkdir /etc/service", START, NO_SCAN),
    ("touch /etc/debian_version", [], ".*: apt-get install daemontools-run, which scans .*"),
    ("cp /usr/bin/svc /usr/bin/svscan; mkdir /etc/service", START, "have svscan run at boot on /etc/service"),
    (SVSCAN + "mkdir /srv/scan/clockspeed", [], "warning: .*/clockspeed is not our service, .*"),
    (SVSCAN + "svc/install --start", [], "nothing to do"),
    (SVSCAN, [], "ln -s .*/taiclockd /srv/scan/taiclockd, if this host is to serve .*"),
    (S6, ["--start"], "asked: s6-svscanctl -a /run/service"), (S6, [], "/run/service is made anew at .*"),
    (SVSCAN + NEXT, ["--start"], "asked: svc -t /srv/scan/clockspeed_adjust"),
    (SVSCAN + NEXT + "; : >/asked", [], "asked: "), (SVSCAN + NEXT, [], "svc -t /srv/scan/clockspeed"),
    (RUNIT + NEXT, ["--start"], "asked: sv restart /srv/scan/clockspeed_adjust"),
    (S6 + NEXT, ["--start"], "asked: s6-svc -r /run/service/clockspeed_adjust"),
    (SVSCAN + RUNS, ["--remove"], "asked: svc -dx /var/svc.d/clockspeed /var/svc.d/clockspeed/log"),
    (RUNIT + RUNS, ["--remove"], "asked: sv exit /var/svc.d/clockspeed"),
    (S6 + RUNS, ["--remove"], "asked: s6-svscanctl -an /run/service"),
    (SVSCAN + RUNS, ["--remove", "--root", "/tmp"], "nothing to do"),
    (SVSCAN + RUNS + " /stubborn", ["--remove"], "fatal: .*stop clockspeed: it still runs after .*"),
    ("name=chronyd uid=7 process", START, KEEPS + "kill 12, and take it out of what is started at boot"),
    ("name=systemd-timesyn process", START, KEEPS.replace(".*", "systemd") + "kill 12, .*"),
    ("name=ntpd root=/tmp process", START, NO_SCAN),
    ("name=ntpd cgroup=/system.slice/ntpsec.service process", START, KEEPS + "systemctl .* ntpsec.service"),
    ("name=ntpd cgroup=/user.slice/ntpsec.service process", START, KEEPS + "kill 12, .*"),
    ("start-stop-daemon -S -c nobody -x /src/svc/install 2>&1 | grep ': not root; '", START, NO_SCAN),
    ("echo '' >/python", [], "fatal: unable to find python3, version 3.8 or newer"),
    ("echo /tmp/python3 >/python; chmod 777 /tmp", [], "fatal: unable to use /tmp/python3: others .*"),
    ("ln -s /dev/null /usr/local/clockspeed/adjust", [], "fatal: .*/adjust: it is no FIFO; remove it"),
    ("ln -s /tmp /usr/local/clockspeed/etc", [], "fatal: unable to use .*/etc: it is a link"),
    ("svc/install; cd /usr/local/clockspeed; [ \"$(echo $(stat -c %U . adjust mark etc /var/multilog/*))\" ="
     " 'root clocksd clocksd clockspeed multilog multilog multilog' ]", [], "nothing to do"),
    (SVSCAN + "for dry in --dry-run ''; do svc/install --start --server ntp:a $dry >/tmp/said$dry; done;"
     " cmp /tmp/said /tmp/said--dry-run", [], "nothing to do"),
    ("", [], "name your servers: svc/install --server ntp:HOST,..., or CLOCK_IP in .*"),
    ("", ["--no-set"] + ASK, "asked: useradd .* multilog"), (RUNIT, [], "asked: adduser .* multilog"),
    ("name=ntpd process", ASK, "asked: .* multilog"), (SVSCAN + RUNS + "; : >/asked", ASK, "asked: "),
    ("", ASK, "clockctl set, if the clock is more than a second off"),
    ("echo this clock is 3 ms behind it >/shown", ASK, "asked: .*/clockctl view"),
    ("echo this clock is 3 s ahead of it >/shown", ASK, "asked: .*/clockctl set"),
    ("rm /shown", ASK, "asked: .*/clockctl set"),
])
def test_what_it_makes_of_a_host(machine, before, args, said):
    machine.sh("cd /src; " + before)
    lines = machine.install(*args, status=111 * said.startswith("fatal"))
    asked = machine.read("asked").splitlines() or [""]
    lines = [re.sub("^(install|left to you): ", "", line) for line in lines + ["asked: " + asked[-1]]]
    assert any(re.fullmatch(said, line) for line in lines), lines


# ==== the README ====================================================================================

# The README's blocks: sh install and sh host are followed in a virtual machine (.ci/vm), sh client and
# sh also are for other hosts and cases, conf and text are no commands, sh and sh tests need no root.
KINDS = {"conf", "text", "sh", "sh tests", "sh install", "sh host", "sh client", "sh also"}
README, NOTES = read_script("README.md"), read_script("NOTES.md")
BLOCKS = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", README, re.M)


def blocks(kind):
    return [text for each, text in BLOCKS if each == kind]


@every_shell
def test_the_readme_is_short_and_every_shell_understands_its_blocks(shell):
    need(shell[0])
    assert len(README.encode()) <= 16 * 1024 and len(BLOCKS) * 2 == README.count("\n```")
    assert {kind for kind, _ in BLOCKS} == KINDS
    text = "\n".join(text for kind, text in BLOCKS if kind.startswith("sh"))
    subprocess.run(shell + ["-n"], input=text.encode(), check=True)


def test_by_hand_the_programs_are_as_installed(tmp_path):
    text = blocks("sh host")[0].replace("/usr/local", str(tmp_path))
    subprocess.run(["sh", "-ec", "umask 077\n" + text], cwd=HERE, check=True)
    for name in PROGRAMS:
        path = tmp_path / "clockspeed" / "bin" / name
        first, _, rest = path.read_text().partition("\n")
        assert re.fullmatch("#!/.*python3 -IS", first) and rest == read_script(name).partition("\n")[2]
        assert path.stat().st_mode & 0o777 == 0o755
    assert subprocess.check_output([str(tmp_path / "bin" / "clockctl"), "version"])


@pytest.mark.parametrize("scanner, word", (("runsvdir", "chpst"), ("s6-svscan", "s6-setuidgid")))
def test_by_hand_the_scripts_for_other_supervisors_are_as_installed(scanner, word, image, tmp_path):
    image.write("usr/bin/" + scanner, mode=0o755)
    image.install()
    shutil.copytree(path_of("svc"), tmp_path / "svc.d", ignore=shutil.ignore_patterns("*.conf"))
    text, = [text for text in blocks("sh also") if word in text]
    subprocess.run(["sh", "-ec", text.replace("/var/svc.d", str(tmp_path / "svc.d"))], check=True,
                   stderr=subprocess.DEVNULL)
    for script in [service + log + "run" for service in SERVICES for log in ("/", "/log/")]:
        assert (tmp_path / "svc.d" / script).read_text() == image.read("var/svc.d/" + script)


@pytest.mark.parametrize("text", blocks("conf"))
def test_clockctl_understands_its_configurations(text, tmp_path):
    (tmp_path / "conf").write_text(read_script("svc/clockspeed.conf") + text)
    said = run("clockctl", "run", "env", CLOCKSPEED_CONF=str(tmp_path / "conf")).stdout.decode()
    assert set(text.replace('"', "").splitlines()) <= set(said.splitlines())


def test_what_it_names_exists():
    manuals = subprocess.check_output([INSTALL, "--help"]) + run("clockctl", "--help").stdout
    code = "".join(text for _, text in BLOCKS) + "".join(re.findall("`.*?`", README))
    names = (re.findall(r"clockctl ([a-z]+)", code) + re.findall(r"\b(?:CLOCK|CLOCKSPEED)_[A-Z]+", README)
             + re.findall(r"--[a-z][-a-z]+", " ".join(re.findall(r"svc/install.*", README))))
    assert set(names) <= set(re.findall(r"[-\w]+", manuals.decode())) | {"check", "graph", "help"}
    for text in (README, NOTES):
        anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
                   for title in re.findall("(?m)^#+ (.*)", text)}
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            assert link[1:] in anchors if link.startswith("#") else os.path.exists(path_of(link)), link


def test_notes_tell_of_the_bad_days_what_their_tests_do():
    table = NOTES.partition("## Bad days")[2].partition("\n## ")[0]
    cells = [line.split("|") for line in table.splitlines() if line.startswith("| ")]
    rows = {row[1].strip(): row[3] for row in cells}
    for event, _, said, _ in BAD_DAYS:
        assert event in rows, event
        for text in said:
            assert "`%s`" % text in rows[event], text


# ==== every decoder =================================================================================
# A row stands in DECODERS for each function that reads what others wrote.


def mutants(rng, good, count):
    """Random inputs, and good ones with bytes changed, cut, doubled and moved."""
    for _ in range(count):
        data = bytearray(rng.choice(good) if rng.random() < 0.9 else random_bytes(rng, rng.randrange(200)))
        for _ in range(rng.randrange(1, 4)):
            a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
            change = rng.randrange(4)
            data[a:b] = (random_bytes(rng, min(b - a, 8)), b"", data[a:b] * 2, data[a:b][::-1])[change]
        yield bytes(data)


@pytest.mark.parametrize("count", [3000, pytest.param(10**5, marks=pytest.mark.long)])
@pytest.mark.parametrize("name, function, good, allowed", DECODERS, ids=[row[0] for row in DECODERS])
def test_no_decoder_stumbles(name, function, good, allowed, count):
    for data in good:
        function(data)
    for data in mutants(random.Random(SEED), good, count):
        with contextlib.suppress(allowed):
            function(data)
