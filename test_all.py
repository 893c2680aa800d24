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
        self.process = subprocess.Popen(command + [path_of("taiclockd"), "-p", "0", *args], env=dict(UTC_ENV, **env),
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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


def hostile_datagram(rng):
    """Mostly near misses: cut, lengthened, altered queries; a third are what clients send."""
    query = bytearray(b"ctai" + bytes(12) + rng.getrandbits(128).to_bytes(16, "big"))
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
        for file, count, why in ((null, "1", "Socket operation on non-socket"), (null, "x", "invalid literal"),
                                 (tcp, "1", "descriptor 3 is not a UDP socket")):
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
