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
import re
import shutil
import signal
import socket
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

    def __init__(self, *args, plain=False, **env):
        command = [sys.executable, "-c", NO_CTYPES] if plain else []
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


def ask(sock, query):
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
                ask(sock, query)
            else:
                sock.send(query)
        marker = b"ctai" + bytes(16) + b"the last"  # replies come in order: nothing else is on its way
        ask(sock, marker)
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


def test_taiclockd_serves_on_the_addresses_given():
    with Taiclockd("-i", "127.0.0.1", "-i", "::1") as server:
        assert server.start == "start: serving on 127.0.0.1 port %d, ::1 port %d\n" % (2 * (server.ports[0],))
        for host in ("127.0.0.1", "::1", "127.0.0.1"):
            with server.client(host) as sock:
                ask(sock, VECTORS[0][0])
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
                ask(client, VECTORS[0][0])
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
        flood(server, 3, payloads)
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
                    ask(sock, VECTORS[0][0])
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

    def leapt(self, late_ns):
        return self.elapsed_ns >= self.leap_ns - max(-self.step_ns, 0) + late_ns

    def now_ns(self):
        return self.elapsed_ns - (self.step_ns if self.leapt(self.late_ns) else 0)

    def kernel(self):  # adjtimex(2) corrects what the clock shows before the late tick
        clock_ns = self.elapsed_ns - (self.step_ns if self.leapt(0) else 0)
        state = 3 if self.leapt(0) and clock_ns < self.leap_ns else 0
        return dict(state=state, status=0x2000, sec=clock_ns // 10**9, frac=clock_ns % 10**9)


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


def test_taiclockd_label_on_both_scales(monkeypatch):
    for scale, seconds in (("utc", "400000006b0cc925"), ("tai", "400000006b0cc90a")):
        monkeypatch.setenv("CLOCK_SCALE", scale)
        clock = load("taiclockd").Clock(now_ns=lambda: 1796000000 * 10**9 + 5)
        assert clock.label().hex() == seconds + "00000005" + "00000000"


def test_taiclockd_says_once_that_its_clock_is_not_to_be_trusted(monkeypatch, capfd):
    monkeypatch.setenv("CLOCK_SCALE", "utc")
    now, status = [10**9], [0x40]
    clock = load("taiclockd").Clock(True, now_ns=lambda: now[0], kernel=lambda: dict(status=status[0]))
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
