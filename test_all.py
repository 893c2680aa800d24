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
import select
import shutil
import signal
import socket
import ssl
import struct
import tempfile
import threading
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
    warning = "%s: warning: unable to ask 127.0.0.1: Connection refused\n" % name
    assert done.stderr == warning * 2 + "%s: fatal: unable to get the time from 127.0.0.1: " \
                                        "time uncertainty too large\n" % name
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


@both
def test_hostile_datagrams_through_sockets(name, answer):
    chance = random.Random(SEED)

    def hostile(query, n):
        packets = []
        for _ in range(50):  # more would not fit into the socket's buffer
            packet = bytearray(answer(query, 10**9))
            packet[chance.randrange(24, 32)] ^= chance.randrange(1, 256)  # the cookie of either protocol
            cut = chance.choice((32, 48, chance.randrange(48)))
            packets.append(bytes(packet[:cut]) + bytes(chance.randrange(900)))
        return packets + [answer(query)]
    with Rogue(hostile) as server:
        done = ask(name, server.port, "-r", 100)
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
        assert select.select([server.socket], [], [], 10)[0]
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
        for url in "http://localhost/", "https://", "https://a b/", "https://localhost:x/", "https://x/\r\n":
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
