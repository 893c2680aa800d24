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
import io
import json
import random
import re
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
DECODERS += [
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
@pytest.mark.parametrize("args", [(), ("-i", "127.0.0.1", "-i", "::1")], ids=["one socket", "two"])
def test_taiclockd_answers_the_vectors_of_the_specification(lack, args, host):
    with taiclockd(*args, lack=lack) as server, client_of(server.port, host) as sock:
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
@pytest.mark.parametrize("args", [(), ("-i", "127.0.0.1", "-i", "::1")], ids=["one socket", "two"])
def test_taiclockd_gives_each_query_of_a_mix_its_own_reply_and_the_rest_none(lack, args):
    rng = random.Random(SEED)
    with taiclockd(*args, lack=lack) as server, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(client_of(server.port, ("127.0.0.1", "::1")[i % 2])) for i in range(20)]
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


def test_taiclockd_serves_on_the_addresses_given_and_on_ipv4_where_there_is_no_ipv6(monkeypatch):
    with taiclockd("-i", "127.0.0.1", "-i", "::1") as server, client_of(server.port, "127.0.0.2") as sock:
        assert server.start == "start: serving on 127.0.0.1 port %d, ::1 port %d\n" % (2 * (server.port,))
        sock.send(QUERY)
        with pytest.raises(ConnectionRefusedError):
            sock.recv(256)

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
def test_taiclockd_counts_what_it_does_not_answer(kind):
    now_sec = [SERVER.RELEASE_SEC]
    clock = SERVER.Clock(False, 37, lambda: now_sec[0] * 10**9)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        server = kind(sock, False)
        assert server.serve(clock) == (0, 0, 0)  # nothing there
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


def taken_for_a_query(data):
    assert SERVER.is_query(bytearray(data), 0, len(data)) == (len(data) >= 20 and data.startswith(b"ctai"))


DECODERS += [
    ("taiclockd's query", taken_for_a_query, [b"ctai" + bytes(28), b"ctai" * 5, b"ctai" * 64], ()),
]


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
    tick_ns, offset_ns = now.tick_ns - age_sec * 10**9, round(clock_off_sec * 1e9)
    real_ns = changes.get("written_ns", now.clock_ns - age_sec * 10**9) + offset_ns
    status = {
        "version": 2, "pid": os.getpid(), "boot_id": now.boot_id, "doing": "steering the clock",
        "observe_only": False, "counter": "CLOCK_MONOTONIC_RAW", "scale": "utc", "tick_ns": tick_ns,
        "written_ns": now.clock_ns - age_sec * 10**9, "suspended_ns": now.suspended_ns,
        "offset_ns": offset_ns,
        "variance": [1e10, 0, 1e4, 0], "bound": a_bound(tick_ns, real_ns), "rate_ppm": 0.0, "rate_error_ppm": 0.0123,
        "noise_ns": 2e6, "wander": 1e-9, "marks": {"used": 12, "doubted": 1, "refused": 0},
        "last_mark": {"tick_ns": tick_ns, "offset_ns": 1234567, "spread_ns": 10**6, "distance_ns": 10**5,
                      "outcome": "used"},
        "next": {"wait_sec": 700.0, "exchanges": 4, "settling": False},
        "kernel": {"freq_ppm": 12.3, "tick": 10000, "maxerror_us": 5000, "esterror_us": 100,
                   "synchronised": True}}
    return dict(status, **changes)


def a_bound(tick_ns, real_ns, early_ns=5 * 10**6, late_ns=4 * 10**6):
    return {"tick_ns": tick_ns, "earliest_ns": real_ns - early_ns, "latest_ns": real_ns + late_ns,
            "slow_ppm": 0.0, "fast_ppm": 0.0, "change_ppm": 0.0}


def test_the_bound_is_carried_on_as_clockspeed_does():
    rng, bound = random.Random(SEED), load("clockspeed").Bound()
    for tick_ns in sorted(rng.randrange(1, 10**15) for _ in range(9)):
        bound.mark(tick_ns, 10**18 + tick_ns + round(tick_ns * 2e-5), 10**7, 10**6)
        for ahead_ns in (0, 10**9, 10**12, 10**15):
            later = CTL.Reading(tick_ns + ahead_ns, 0, 0, "")
            assert CTL.Status(a_status(bound=bound.coefficients()), later).carry_bound(
                bound.coefficients()) == bound.at(tick_ns + ahead_ns)


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
        now = CTL.take_reading("CLOCK_MONOTONIC_RAW")
        host.status(clock_off_sec=0, bound=a_bound(now.tick_ns, now.clock_ns, 10**5, 10**5))
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
            damaged = dict(good, **{name: dict(good[name], **{key: value}) if key else value})
            host.write("etc/status", json.dumps(damaged))
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


DECODERS += [
    ("clockctl's configuration", lambda data: CTL.parse_assignments(os.fsdecode(data)),
     [b"CLOCK_IP=a # b\n", b"export CLOCK_KEY='7' CLOCK_TYPE=\"ntp\"; CLOCK_IP=\n"], ValueError),
    ("clockctl's status", CTL.parse_status, [json.dumps(a_status()).encode()], CTL.DAMAGES),
    ("clockctl's sources", CTL.parse_sources, [(SOURCES % (1, 2, "failed: x")).encode()], CTL.DAMAGES),
]

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
NO_FIFO = FileNotFoundError(2, "No such file or directory")
STATUS = {"pid": 7, "doing": "steering", "observe_only": False, "marks": {"used": 9, "doubted": 0, "refused": 1},
          "tick_ns": 10**12, "last_mark": {"tick_ns": 9 * 10**11, "outcome": "used"}, "next": {"settling": False},
          "now": {"problem": None, "offset_sec": 0.003, "deviation_sec": 4e-4, "age_sec": 5, "next_mark_sec": 50}}


def status(**fields):
    """STATUS with other fields, those of `now` included."""
    return dict(STATUS, now=dict(STATUS["now"], **{k: v for k, v in fields.items() if k in STATUS["now"]}),
                **{k: v for k, v in fields.items() if k not in STATUS["now"]})


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
    ("marks", (status(last_mark={"tick_ns": 9 * 10**11, "outcome": "doubted"}),), "warn", "the last one was doubted"),
    ("marks", (status(problem="it died"),), "fail", "not known"), ("marks", (None,), "fail", "not known"),
    ("server", (viewed("3.2 ms behind ntp 192.0.2.1, give or take 0.4 ms"),), "ok", "^this clock is 3.2 ms behind"),
    ("server", (viewed("60 min ahead of ntp x, give or take 1 ms"),), "fail", "60 min ahead.*`clockctl set`"),
    ("server", (viewed("1 ms behind ntp x", "sntpclock: warning: 192.0.2.8: a falseticker\n"),), "warn ok",
     "^192.0.2.8: a falseticker; correct CLOCK_IP"),
    ("server", (failed("sntpclock: warning: w\nsntpclock: fatal: unable to ask x: no usable answer\nclockctl: fatal: z"),),
     "fail", "^unable to ask x: no usable answer; correct"),
    ("space", (["/"], lambda path: os.statvfs_result((4096, 4096, 0, 0, 10**6, 9, 9, 9, 0, 255))), "ok", "3906 MB at /"),
    ("space", (["/"], lambda path: os.statvfs_result((4096, 4096, 0, 0, 2000, 9, 9, 9, 0, 255))), "warn", "only 7 MB"),
    ("space", (["/"], lambda path: os.statvfs_result((4096, 4096, 0, 0, 10**6, 9, 0, 0, 0, 255))), "fail", "full"),
    ("space", (["/"], lambda path: os.statvfs_result((4096, 4096, 0, 0, 10**6, 9, 9, 9, os.ST_RDONLY, 255))), "fail",
     "read-only"),
    ("rivals", ([], b"", 0), "ok", ""),
    ("rivals", ([("ntpd", "7")], b"", 0), "fail", "ntpd sets the clock too, as process 7; stop"),
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
    for name in ("clockspeed", "clockspeed_adjust"):
        (tmp_path / name / "supervise").mkdir(parents=True)
    for name in kept:
        (tmp_path / "clockspeed" / "supervise" / name).touch()
        (tmp_path / "clockspeed_adjust" / "supervise" / name).touch()

    def run_tool(command):
        assert command[0] == tool
        return CHECK.Said(0, said.encode(), "")
    found = CHECK.check_services([str(tmp_path)], run_tool, {"7": age_sec}.get)
    assert levels(found)[0] == level + " " + level
    found = CHECK.check_services([str(tmp_path)], run_tool, {"7": age_sec}.get)
    assert re.search(words, levels(found)[1])
    assert 0 <= CHECK.age_sec(str(os.getpid())) < 10**5
    assert levels(CHECK.check_services([str(tmp_path / "none")]))[0] == "warn"


@pytest.mark.parametrize("uid, mode, level", [
    (0, 0o40755, "ok"), (0, 0o41777, "ok"), (0, 0o120777, "ok"), (0, 0o40775, "fail"), (0, 0o100666, "fail"),
    (1234, 0o40755, "fail"), (77, 0o40755, "ok")])
def test_who_can_change_what_root_runs(uid, mode, level):
    def lstat(path):
        odd = path == "/usr/local/etc"
        return os.stat_result((mode if odd else 0o40755, 0, 0, 1, uid if odd else 0, 0, 0, 0, 0, 0))
    found = list(CHECK.check_owners(["/usr/local/etc/clockspeed.conf", "/usr/local/etc/x"], lstat, 77))
    assert [each.level for each in found] == [level] and (level == "ok" or "/usr/local/etc," in found[0].text)


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
    assert CHECK.run(["id", "-G"], "nobody").stdout.split() == [str(CHECK.find_user("nobody").pw_gid).encode()]


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


def text_of(data):
    return data.decode("ascii", "replace")


DECODERS += [
    ("a mark in the log", lambda data: parse_line(text_of(data)),
     [(LABEL + mark + "\n").encode() for mark in (OLD_MARK, NEW_MARK)], ()),
    ("what check reads of clockctl", lambda data: (CHECK.parse_environment(CHECK.Said(0, data, "")),
                                                   levels(CHECK.check_server(CHECK.Said(0, data, text_of(data)))),
                                                   levels(CHECK.check_rivals([], data, 0))),
     [b"CLOCK_IP=192.0.2.1\nCLOCK_TYPE=ntp\n", b"this clock is 3 ms behind\n", b"x: warning: y: fatal: z"], ()),
]


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
# A row stands in DECODERS for each function that reads what others wrote.


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
