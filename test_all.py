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
import random
import re
import select
import signal
import socket
import struct
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

SERVER = load("taiclockd")
VECTORS = (  # what is sent, how many bytes come back
    (b"ctai", None), (b"", None), (b"ctai" + bytes(15), None), (b"stai" + bytes(28), None), (b"cta", None),
    (b"Ctai" + bytes(28), None), (b"ctai" + bytes(16) + bytes(range(12)), 32), (b"ctai" * 7, 28),
    (b"ctai" * 5, 20), (b"ctai" * 5 + b"x", 21), (b"ctai" + bytes(252), 256), (b"ctai" * 76, 256))
QUERY = VECTORS[6][0]
LACKS = {  # what makes batches impossible
    "nothing": "pass", "ctypes": "sys.modules['ctypes'] = None",
    "recvmmsg": "import ctypes, types\n"
                "ctypes.PyDLL = lambda _: types.SimpleNamespace(recvmmsg=lambda *_: -1, sendmmsg=None)"}
each_loop = pytest.mark.parametrize("lack", LACKS)
two_loops = pytest.mark.parametrize("lack", list(LACKS)[:2])
one_or_two_sockets = pytest.mark.parametrize(
    "args", [(), ("-i", "127.0.0.1", "-i", "::1")], ids=["one socket", "two sockets"])


@contextlib.contextmanager
def taiclockd(*args, lack="nothing", **env):
    """A server on a free port -> its process, with its first line as `start`, and its `port`."""
    command = command_of("taiclockd", "-p", "0", *args)
    if lack != "nothing":
        command[2:2] = ["-c", "import runpy, sys\n%s\nsys.argv = sys.argv[1:]\n"
                        "runpy.run_path(sys.argv[0], run_name='__main__')" % LACKS[lack]]
    with process(command, env=dict(UTC_ENV, **env), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        server.start = server.stdout.readline().decode()
        assert server.start.startswith("start: serving on "), server.stderr.read()
        server.port = int(re.search(r"port (\d+)", server.start).group(1))
        yield server
        server.terminate()  # while it waits for queries
        assert server.wait(PATIENCE_SEC) == -signal.SIGTERM and server.stderr.read() == b""


def client_of(port, host="127.0.0.1"):
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE_SEC)
    sock.connect((host, port))
    return sock


def check_reply(query, reply, before_ns):
    """The reply is the query with a label from between then and now."""
    assert len(reply) == min(len(query), 256) and reply[:4] == b"stai" and reply[20:] == query[20:256]
    sec, nano, atto = struct.unpack(">QII", reply[4:20])
    assert before_ns <= (sec - 2**62 - 37) * 10**9 + nano <= time.time_ns() and atto == 0


def exchange(sock, datagrams):
    """Send them all, and a query -> what came back up to that query's reply, which nothing may follow."""
    marker = b"ctai" + bytes(16) + os.urandom(12)
    for datagram in datagrams + [marker]:
        sock.send(datagram)
    replies = []
    while not replies or replies[-1][20:] != marker[20:]:
        replies.append(sock.recv(65536))
    return replies[:-1]


@each_loop
@pytest.mark.parametrize("host", ("127.0.0.1", "::1"))
@one_or_two_sockets
def test_taiclockd_answers_the_vectors_of_the_specification(lack, args, host):
    with taiclockd(*args, lack=lack) as server, client_of(server.port, host) as sock:
        places = [address + " port %d" % server.port for address in args[1::2] or ["::"]]
        assert server.start == "start: serving on %s\n" % ", ".join(places)
        before_ns = time.time_ns()
        for query, size in VECTORS:
            replies = exchange(sock, [query])
            assert list(map(len, replies)) == [size] * (size is not None), query
            for reply in replies:
                check_reply(query, reply, before_ns)
        comm = "/proc/%d/comm" % server.pid
        assert not os.path.exists(comm) or until(lambda: open(comm).read() == "taiclockd\n")


@contextlib.contextmanager
def stopped(server):
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


@two_loops
@one_or_two_sockets
def test_taiclockd_gives_each_query_of_a_mix_its_own_reply_and_the_rest_none(lack, args):
    rng = random.Random(SEED)
    with taiclockd(*args, lack=lack) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(client_of(server.port, ("127.0.0.1", "::1")[i % 2])) for i in range(20)]
        with stopped(server):  # the second 64 come to lie where the first left a query's mark
            for datagram in [b"ctai"] * 64 + [b""] * 64:
                socks[0].send(datagram)
        assert exchange(socks[0], []) == []
        for number in (1, 2, 63, 64, 65, 100) * 4:
            before_ns, sent = time.time_ns(), {sock: [] for sock in socks}
            with stopped(server):
                for _ in range(number):
                    sock, datagram = rng.choice(socks), hostile_datagram(rng)
                    sock.send(datagram)
                    sent[sock].append(datagram)
            for sock, datagrams in sent.items():
                queries = [each for each in datagrams if len(each) >= 20 and each.startswith(b"ctai")]
                replies = exchange(sock, [])
                assert len(replies) == len(queries)
                for query, reply in zip(queries, replies):
                    check_reply(query, reply, before_ns)


@two_loops
def test_taiclockd_drops_only_the_reply_that_can_not_be_sent(lack):
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    except PermissionError:
        pytest.skip("not root: no raw socket")
    with raw, taiclockd(lack=lack) as server, client_of(server.port) as sock:
        for place in (0, 5, 9):
            with stopped(server):
                for number in range(10):
                    if number == place:  # from port 0, to which nothing can be sent
                        raw.sendto(struct.pack(">4H", 0, server.port, 40, 0) + QUERY, ("127.0.0.1", 0))
                    sock.send(QUERY)
            assert len(exchange(sock, [])) == 10


def resident_kb(pid):
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))


@two_loops
@pytest.mark.parametrize("sec", [1, pytest.param(60, marks=pytest.mark.long)])
def test_taiclockd_does_not_grow_under_a_flood_and_term_ends_it(lack, sec):
    rng = random.Random(SEED)
    datagrams = [hostile_datagram(rng) for _ in range(1000)]
    with taiclockd(lack=lack) as server, client_of(server.port) as sock:
        def flood(sec):
            deadline_sec = time.monotonic() + sec
            while time.monotonic() < deadline_sec:
                for datagram in datagrams:
                    sock.send(datagram)
        flood(0.5)
        before_kb = resident_kb(server.pid)
        flood(sec)
        assert resident_kb(server.pid) <= before_kb + 64
        with stopped(server):
            flood(0.1)  # so that its queue is full
            server.terminate()


def test_taiclockd_serves_on_ipv4_where_there_is_no_ipv6(monkeypatch):
    def without(family, *args, real=socket.socket):
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return real(family, *args)
    monkeypatch.setattr(SERVER.socket, "socket", without)
    sock, = SERVER.open_sockets([], 0, False)
    assert sock.getsockname()[0] == "0.0.0.0"
    sock.close()
    with pytest.raises(OSError, match="not supported"):
        SERVER.open_sockets(["::1"], 0, False)


@pytest.mark.parametrize("args", [(), ("-i", "127.0.0.1"), ("-r",)])
def test_taiclockd_says_who_has_its_port(args):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        done = run("taiclockd", "-p", port, *args)
        place = "127.0.0.1" if "-i" in args else "::"
        assert (done.returncode, done.stdout) == (111, b"")
        said = "taiclockd: fatal: unable to bind %s port %d: Address already in use" % (place, port)
        with contextlib.suppress(OSError):
            with open("/proc/self/comm") as comm, open("/proc/net/udp"):
                said += " by %s (process %d)" % (comm.read().strip(), os.getpid())
        assert done.stderr == said + "\n"


def test_taiclockds_share_a_port_by_option_and_tell_it():
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(taiclockd("-r"))
        second = stack.enter_context(taiclockd("-r", "-p", first.port))
        assert re.search("port %d, shared with .* .process %d.\n" % (first.port, first.pid), second.start)
        socks = [stack.enter_context(client_of(first.port)) for _ in range(50)]  # of 50 ports
        with stopped(first):
            for sock in socks:
                sock.send(QUERY)
            until(lambda: select.select(socks, [], [], 0.2)[0])
            assert 0 < len(select.select(socks, [], [], 0)[0]) < 50
        for sock in socks:
            sock.recv(256)


def inheriting(fd, count):
    """The command of a taiclockd with that descriptor as its descriptor 3, as systemd passes a socket."""
    code = ("import os, sys; os.dup2(%d, 3); os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='%s');"
            "os.execv(sys.argv[1], sys.argv[1:])" % (fd, count))
    return [sys.executable, "-c", code] + command_of("taiclockd")


def test_taiclockd_takes_inherited_sockets_and_refuses_other_descriptors():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        port, fds = sock.getsockname()[1], [sock.fileno()]
        with process(inheriting(fds[0], 1), pass_fds=fds, stdout=subprocess.PIPE) as server:
            assert server.stdout.readline().decode() == "start: serving on 127.0.0.1 port %d\n" % port
            with client_of(port) as client:
                exchange(client, [])
    with open(os.devnull) as null, socket.socket() as tcp:
        for file, count, why in ((null, 1, "Socket operation on non-socket"), (null, "x", "invalid literal"),
                                 (tcp, 1, "descriptor 3 is not a UDP socket")):
            done = subprocess.run(inheriting(file.fileno(), count), pass_fds=[file.fileno()],
                                  stderr=subprocess.PIPE)
            assert done.returncode == 111 and done.stderr.count(b"\n") == 1
            assert done.stderr.decode().startswith(
                "taiclockd: fatal: unable to take the sockets of LISTEN_FDS: " + why)


def test_taiclockd_tells_each_reason_of_its_silence(capfd):
    now_sec, status, release_sec = [0], [0x40], SERVER.RELEASE_SEC
    clock = SERVER.Clock(True, 37, lambda: now_sec[0] * 10**9 + 5, lambda: {"status": status[0]})
    unset = "silent: the clock shows a time before this program's release; it was never set\n"
    unsynchronised = "silent: the kernel says that its clock is not synchronised\n"
    for now_sec[0], status[0], said, answers in (
            (10, 0x40, unset, False), (11, 0x40, "", False), (release_sec - 1, 0, "", False),
            (release_sec, 0x41, unsynchronised, False), (release_sec + 1, 0x40, "", False),
            (release_sec + 2, 0x2001, "answering: the clock can be trusted now\n", True),
            (release_sec + 2, 0x40, "", True),  # it is asked once a second
            (release_sec + 3, 0x40, unsynchronised, False), (10, 0, unset, False)):
        assert (clock.head() is not None, capfd.readouterr().out) == (answers, said)


@pytest.mark.parametrize("kind", (SERVER.Single, SERVER.Batches))
def test_taiclockd_counts_what_it_does_not_answer(kind, monkeypatch):
    now_sec = [SERVER.RELEASE_SEC]
    clock = SERVER.Clock(False, 37, lambda: now_sec[0] * 10**9)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        server, pauses = kind(sock, False), []
        with monkeypatch.context() as patch:
            patch.setattr(SERVER.time, "sleep", pauses.append)
            assert server.serve(clock) == (0, 0, 0) and pauses == [0.01]  # nothing there
        with client_of(sock.getsockname()[1]) as client:
            for now_sec[0], answered in ((SERVER.RELEASE_SEC, 3), (0, 0)):
                for datagram in (QUERY, b"x", QUERY, QUERY):
                    client.send(datagram)
                rounds = [server.serve(clock) for _ in range(4 if kind is SERVER.Single else 1)]
                assert tuple(map(sum, zip(*rounds))) == (4, 3, answered)
            for _ in range(3):
                client.recv(256)
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(256)


def test_taiclockd_tells_its_counts_once_an_hour(capfd):
    now_sec = [0]
    counts = SERVER.Counts(lambda: now_sec[0])
    for now_sec[0], counted, said in (
            (0, (64, 60, 50), ""), (3599, (1, 1, 1), ""),
            (3600, (1, 1, 1), "count: 52 answered, 4 ignored, 10 refused\n"), (7199, (2, 2, 1), ""),
            (7200, (1, 0, 0), "count: 1 answered, 1 ignored, 1 refused\n")):
        counts.add(*counted)
        assert capfd.readouterr().out == said


def test_taiclockd_obeys_clock_serve_and_clock_scale(monkeypatch):
    with taiclockd(lack="ctypes", CLOCK_SERVE="synced") as server:
        line = server.stdout.readline()
        assert line == b"silent: the kernel does not say whether its clock is synchronised\n"
    for env, said in ((dict(CLOCK_SERVE="sync"), "obey CLOCK_SERVE: it is neither synced nor empty"),
                      (dict(CLOCK_SCALE="x"), "tell the clock's scale: CLOCK_SCALE is neither utc nor tai")):
        done = run("taiclockd", "-p", 0, **env)
        assert (done.returncode, done.stderr) == (111, "taiclockd: fatal: unable to %s\n" % said)
    for scale, label in (("utc", "400000006b0d07a5"), ("tai", "400000006b0d078a")):
        monkeypatch.setenv("CLOCK_SCALE", scale)
        clock = SERVER.Clock(False, SERVER.scale_offset_sec(), lambda: 1796016000 * 10**9 + 5)
        assert clock.head().hex() == b"stai".hex() + label + "00000005" + "00000000"


@pytest.mark.parametrize("args", ["-p 65536", "-p x", "-p -1", "-j 2", "-p", "192.0.2.1"])
def test_taiclockd_refuses_wrong_arguments(args):
    done = run("taiclockd", *args.split())
    assert (done.returncode, done.stderr) == (100, "taiclockd: usage: %s\n" % SERVER.USAGE)


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
# One row for each function that reads what others wrote: name, function of bytes, good inputs, what it may
# raise.

def taken_for_a_query(data):
    assert SERVER.is_query(bytearray(data), 0, len(data)) == (len(data) >= 20 and data.startswith(b"ctai"))


DECODERS = [
    ("taiclockd's query", taken_for_a_query, [b"ctai" + bytes(28), b"ctai" * 5, b"ctai" * 64], ()),
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
