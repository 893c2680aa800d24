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
import contextlib
import errno
import importlib.machinery
import importlib.util
import json
import pathlib
import random
import re
import shutil
import signal
import stat
import struct
import tempfile
import time
import xml.dom.minidom

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


# ==== clockctl ======================================================================================

CONF = 'CLOCKSPEED_HOME="%s"\nCLOCKSPEED_BIN="%s"\nCLOCK_TYPE="%s"\nCLOCK_IP="%s"\n'
PLUS_QUARTER = struct.pack(">qII", 0, 250000000, 0)  # +0.25 s


def stand_in(directory, name, packet=PLUS_QUARTER, status=0, first=":"):
    """A program that writes down its arguments and what it reads, prints a packet and exits with status."""
    path = os.path.join(str(directory), name)
    with open(path, "w") as file:
        file.write("#!/bin/sh\n%s\necho \"$@\" >> '%s.args'\ncat > '%s.stdin'\nprintf '%s'\nexit %d\n" % (
            first, path, path, "".join("\\%03o" % byte for byte in packet), status))
    os.chmod(path, 0o755)
    return path


def contents(path):
    with open(str(path), "rb") as file:
        return file.read()


def await_that(condition, patience_sec=30):
    """Until it is true; None at the end of patience, so `assert await_that(...)`."""
    deadline_sec = time.monotonic() + patience_sec
    while time.monotonic() < deadline_sec:
        if condition():
            return True
        time.sleep(0.02)


def processes_in(directory):
    """The processes whose working directory is below: pid -> command line."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink("/proc/%s/cwd" % pid).startswith(str(directory)):
                found[int(pid)] = contents("/proc/%s/cmdline" % pid).replace(b"\0", b" ").decode().strip()
        except OSError:  # it has ended
            pass
    return found


class Host:
    """A home, a directory of programs and a clockspeed.conf of their own."""

    def __init__(self, directory, kind="ntp", address="192.0.2.1"):
        self.bin, self.home, self.conf = directory / "bin", directory / "home", directory / "clockspeed.conf"
        self.adjust = str(self.home / "adjust")
        self.bin.mkdir()
        (self.home / "etc").mkdir(parents=True)
        self.write_conf(CONF % (self.home, self.bin, kind, address))

    def write_conf(self, text):
        self.conf.write_bytes(text.encode())

    def clockctl(self, *args, **env):
        return run("clockctl", *args, CLOCKSPEED_CONF=str(self.conf), **env)

    def make_fifo(self):
        """-> a descriptor that reads it."""
        os.mkfifo(self.adjust)
        return os.open(self.adjust, os.O_RDONLY | os.O_NONBLOCK)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


@pytest.mark.parametrize("text, wanted", [
    ("", {}),
    ("A=b", {"A": "b"}),
    ("A=b\n", {"A": "b"}),
    ('A="b c" # d', {"A": "b c"}),
    ("A='b \"c'", {"A": 'b "c'}),
    ("A='$x `y` \\'", {"A": "$x `y` \\"}),
    ("# A=b\n\n  # c\n  B=c", {"B": "c"}),
    ("export A=b\nexport B='c'", {"A": "b", "B": "c"}),
    ("A=b; export A", {"A": "b"}),
    ("A=b C=d;E=f", {"A": "b", "C": "d", "E": "f"}),
    ("A=b#c", {"A": "b#c"}),
    ("A=#c", {"A": "#c"}),
    ("A=", {"A": ""}),
    ("A=\nB=c", {"A": "", "B": "c"}),
    ("A=b\nA=c", {"A": "c"}),
    ('A="b\\"c\\\\d\\$e\\f"', {"A": 'b"c\\d$e\\f'}),
    ("A=b\\ c", {"A": "b c"}),
    ("A=b'c d'\"e\"", {"A": "bc de"}),
    ('A="b\nc"\nB=d', {"A": "b\nc", "B": "d"}),
    ('A="b\\\nc" B=d\\\ne', {"A": "bc", "B": "de"}),
    ('A="b"\r\nC=d\r\n', {"A": "b", "C": "d"}),
    ("A=2001:db8::1,192.0.2.1", {"A": "2001:db8::1,192.0.2.1"}),
    ("A_1=é", {"A_1": "é"}),
    ("A=b\u00a0c", {"A": "b\u00a0c"}),
])
def test_a_configuration_is_read_as_a_shell_reads_it(text, wanted, tmp_path):
    assert load("clockctl").parse_assignments(text) == wanted
    if "\r" not in text:  # the shell would keep it in the value
        (tmp_path / "conf").write_bytes(text.encode())
        script = ". %s/conf\n" % tmp_path
        script += "".join('printf "%%s\\0" "$%s"\n' % name for name in sorted(wanted))
        shown = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, check=True).stdout
        assert shown.decode().split("\0")[:-1] == [wanted[name] for name in sorted(wanted)]


@pytest.mark.parametrize("text, line", [
    ("A=$B", 1), ('A=b\nC="${D}"', 2), ("A=`date`", 1), ('\n\nA="$(date)"', 3), ("A=~/b", 1), ("A = b", 1),
    ("A=b\nif true; then", 2), ('A="b', 1), ("A='b\n\n", 1), ("A=b|c", 1), ("A=b & B=c", 1), ("1A=b", 1),
    ("rm -rf /", 1), ("A=b export", 1), ("A=(b c)", 1), ('A="b"\n. /etc/passwd', 2), ("A=b\\", 1),
    ("A+=b", 1),
])
def test_what_needs_a_shell_is_refused_with_its_line(text, line, host):
    with pytest.raises(ValueError, match="^line %d is not of the form" % line):
        load("clockctl").parse_assignments(text)
    host.write_conf(text)
    done = host.clockctl("atto")
    assert done.returncode == 111
    assert done.stderr.startswith("clockctl: fatal: unable to read %s: line %d is not" % (host.conf, line))


def test_a_binary_configuration_is_refused():
    with pytest.raises(ValueError, match="not a text file"):
        load("clockctl").parse_assignments("A=b\0")


def test_random_configurations_are_read_or_refused():
    rng, parse = random.Random(SEED), load("clockctl").parse_assignments
    for _ in range(3000):
        text = "".join(rng.choice("AB=\"'\\ \n#;$x") for _ in range(rng.randrange(30)))
        try:
            parse(text)
        except ValueError:
            pass


def test_a_configuration_that_is_named_must_be_there(host):
    host.conf.unlink()
    done = host.clockctl("atto")
    assert (done.returncode, done.stderr) == (
        111, "clockctl: fatal: unable to read %s: No such file or directory\n" % host.conf)


def test_variables_come_from_the_file_else_the_environment_and_go_to_the_programs(host):
    host.write_conf("CLOCKSPEED_BIN=%s\nCLOCK_SCALE=tai\nFOO=file" % host.bin)
    client = stand_in(host.bin, "taiclock", first="echo $CLOCK_SCALE $FOO $BAR >&2")
    stand_in(host.bin, "clockview", b"shown\n")
    done = host.clockctl("view", CLOCK_TYPE="tai", CLOCK_IP="192.0.2.7", FOO="environment", BAR="kept")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"shown\n", "tai file kept\n")
    assert contents(client + ".args") == b"192.0.2.7\n"


def test_mark_writes_one_packet_and_says_so(host):
    reader = host.make_fifo()
    client = stand_in(host.bin, "sntpclock")
    done = host.clockctl("mark")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == b"mark: offset +0.250000000 s from ntp 192.0.2.1\n"
    assert os.read(reader, 100) == PLUS_QUARTER
    assert contents(client + ".args") == b"192.0.2.1\n"


@pytest.mark.parametrize("kind, address, client, args, shown", [
    ("sntp", "192.0.2.1", "sntpclock", b"192.0.2.1\n", b"sntp 192.0.2.1"),
    ("tai", "2001:db8::1", "taiclock.py", b"2001:db8::1\n", b"tai 2001:db8::1"),
    ("ntp", "192.0.2.1 a.example, 192.0.2.3", "sntpclock.py", b"192.0.2.1 a.example 192.0.2.3\n",
     b"ntp 192.0.2.1 a.example 192.0.2.3"),
])
def test_mark_asks_the_servers_by_the_client_of_the_type(tmp_path, kind, address, client, args, shown):
    host = Host(tmp_path, kind, address)
    reader = host.make_fifo()
    client = stand_in(host.bin, client, struct.pack(">qII", -1, 999999500, 0))
    assert host.clockctl("mark").stdout == b"mark: offset -0.000000500 s from %s\n" % shown
    assert contents(client + ".args") == args and len(os.read(reader, 100)) == 16


@pytest.mark.parametrize("trap, why", [
    ("missing", "No such file or directory"),
    ("regular file", "it is not a FIFO"),
    ("directory", "Is a directory"),
    ("symlink", "it is a symbolic link"),
    ("no reader", "no clockspeed is reading it"),
])
def test_mark_asks_nobody_when_clockspeed_is_not_there(host, tmp_path, trap, why):
    client = stand_in(host.bin, "sntpclock")
    target = tmp_path / "fifo"
    {"missing": lambda: None,
     "regular file": lambda: open(host.adjust, "w").close(),
     "directory": lambda: os.mkdir(host.adjust),
     "symlink": lambda: (os.mkfifo(str(target)), os.symlink(str(target), host.adjust)),
     "no reader": lambda: os.mkfifo(host.adjust)}[trap]()
    reader = os.open(str(target), os.O_RDONLY | os.O_NONBLOCK) if trap == "symlink" else None
    done = host.clockctl("mark")
    assert (done.returncode, done.stdout) == (111, b"")
    assert done.stderr == "clockctl: fatal: unable to write %s: %s\n" % (host.adjust, why)
    assert not os.path.exists(client + ".args"), "the server was asked"
    assert trap != "missing" or not os.path.lexists(host.adjust)
    assert trap != "regular file" or os.path.getsize(host.adjust) == 0
    if reader is not None:
        os.close(reader)


def test_mark_does_not_wait_for_a_full_fifo(host):
    reader = host.make_fifo()
    stand_in(host.bin, "sntpclock")
    writer = os.open(host.adjust, os.O_WRONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(16))
    done = host.clockctl("mark")
    assert done.returncode == 111
    assert done.stderr == (
        "clockctl: fatal: unable to write %s: it is full: clockspeed has stopped reading it\n" % host.adjust)
    os.close(reader)


def test_mark_says_when_clockspeed_left_while_the_server_was_asked(host):
    reader = host.make_fifo()
    stand_in(host.bin, "sntpclock", first="touch '%s/asked'; sleep 1" % host.bin)
    process = subprocess.Popen([path_of("clockctl"), "mark"], stderr=subprocess.PIPE,
                               env=dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf)))
    assert await_that((host.bin / "asked").exists)
    os.close(reader)
    assert process.communicate(timeout=60)[1].decode() == (
        "clockctl: fatal: unable to write %s: no clockspeed is reading it\n" % host.adjust)


def test_mark_with_patience_awaits_a_clockspeed_that_is_starting(host):
    stand_in(host.bin, "sntpclock")
    process = subprocess.Popen([path_of("clockctl"), "mark", "--patience", "30"], stdout=subprocess.PIPE,
                               env=dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf)))
    time.sleep(0.5)
    reader = host.make_fifo()
    assert process.communicate(timeout=60)[0].startswith(b"mark: offset +0.25")
    assert os.read(reader, 100) == PLUS_QUARTER


@pytest.mark.parametrize("packet, status, why", [
    (b"", 111, "unable to ask the time: sntpclock failed (exit status 111)"),
    (PLUS_QUARTER, 1, "unable to ask the time: sntpclock failed (exit status 1)"),
    (PLUS_QUARTER[:12], 0, "unable to use the answer of sntpclock: 12 bytes, not 16"),
    (PLUS_QUARTER * 2, 0, "unable to use the answer of sntpclock: 32 bytes, not 16"),
    (b"", 0, "unable to use the answer of sntpclock: 0 bytes, not 16"),
    (b"\xff" * 16, 0, "unable to use the answer of sntpclock: not a TAI64NA packet"),
])
@pytest.mark.parametrize("command", ["mark", "view", "set"])
def test_a_client_that_failed_changes_nothing(host, command, packet, status, why):
    reader = host.make_fifo()
    stand_in(host.bin, "sntpclock", packet, status)
    others = [stand_in(host.bin, name) for name in ("clockview", "clockadd")]
    done = host.clockctl(command)
    assert (done.returncode, done.stdout, done.stderr) == (111, b"", "clockctl: fatal: %s\n" % why)
    assert os.read(reader, 100) == b"" and not any(os.path.exists(name + ".args") for name in others)


@pytest.mark.parametrize("conf, why", [
    ("CLOCKSPEED_BIN=%(bin)s", "ask the time: CLOCK_IP is not set in %(conf)s"),
    ("CLOCK_IP=', ,'", "ask the time: CLOCK_IP is not set in %(conf)s"),
    ("CLOCK_IP=-e", "ask the time: CLOCK_IP is not an address in %(conf)s"),
    ("CLOCK_IP=a CLOCK_TYPE=ptp", "ask the time: CLOCK_TYPE is neither ntp nor tai in %(conf)s"),
    ("CLOCK_IP=a CLOCKSPEED_BIN=%(bin)s", "find sntpclock: it is not in %(bin)s"),
])
def test_a_configuration_that_can_not_work_is_named(host, conf, why):
    names = dict(bin=host.bin, conf=host.conf)
    host.write_conf(conf % names)
    done = host.clockctl("view")
    assert (done.returncode, done.stderr) == (111, "clockctl: fatal: unable to %s\n" % (why % names))


def test_view_and_set_hand_on_the_answer(host):
    stand_in(host.bin, "sntpclock")
    clockview = stand_in(host.bin, "clockview.py", b"before: 1\nafter:  2\n")
    clockadd = stand_in(host.bin, "clockadd", b"")
    assert host.clockctl("view").stdout == b"before: 1\nafter:  2\n"
    assert contents(clockview + ".stdin") == PLUS_QUARTER and not os.path.exists(clockadd + ".args")
    assert host.clockctl("set").stdout == b"set: clock stepped by +0.250000000 s, as ntp 192.0.2.1 has it\n"
    assert contents(clockadd + ".stdin") == PLUS_QUARTER


def test_set_says_when_the_clock_was_not_stepped(host):
    stand_in(host.bin, "sntpclock")
    stand_in(host.bin, "clockadd", b"", 111)
    done = host.clockctl("set")
    assert (done.returncode, done.stdout) == (111, b"")
    assert done.stderr == "clockctl: fatal: unable to set the clock: clockadd failed (exit status 111)\n"


@pytest.mark.parametrize("packet, shown", [
    ("0000000000000000 00000001 00000000", b"0.000000001000000000 s per tick, rate +0.000 ppm"),
    ("0000000000000000 00000001 0000c350", b"0.000000001000050000 s per tick, rate +50.000 ppm"),
    ("0000000000000000 00000000 3b9a06b2", b"0.000000000999950002 s per tick, rate -49.998 ppm"),
    ("0000000000000000 00000000 17d78400",
     b"0.000000000400000000 s per tick, which is not about 1 ns: it was made with another counter"),
])
def test_atto_shows_the_digits_and_the_rate(host, packet, shown):
    (host.home / "etc" / "atto").write_bytes(bytes.fromhex(packet))
    assert host.clockctl("atto").stdout == b"atto: " + shown + b"\n"


@pytest.mark.parametrize("data, why", [
    (None, "there is none: clockspeed writes it when it has two marks"), (b"", "0 bytes, not 16"),
    (bytes(17), "17 bytes, not 16"), (b"\xff" * 16, "not a TAI64NA packet")])
def test_an_unusable_atto_is_a_clear_line(host, data, why):
    if data is not None:
        (host.home / "etc" / "atto").write_bytes(data)
    done = host.clockctl("atto")
    assert done.stderr == "clockctl: fatal: unable to read %s/etc/atto: %s\n" % (host.home, why)


def test_every_command_has_a_help_with_an_example():
    for name in load("clockctl").COMMANDS:
        text = run("clockctl", "help", name).stdout.decode()
        assert text.startswith("clockctl " + name) and "clockctl %s" % name in text.partition("\n")[2]
        assert run("clockctl", name, "--help").stdout.decode() == text


@pytest.mark.parametrize("args", [
    ["mark", "x"], ["mark", "--patience"], ["mark", "--patience", "x"], ["mark", "--patience", "nan"],
    ["mark", "--patience", "inf"], ["wait"], ["wait", "1"], ["wait", "1", "9" * 5000],
    ["wait", "1", "4294967296"],
    ["wait", "x", "1"], ["wait", "-1", "1"], ["status", "x"], ["metrics", "--output"], ["graph", "phase"],
    ["try", "ftp:x"], ["try", "ntp:"], ["try", "a", "b"], ["try", "tai:-f"], ["help", "x"], ["version", "-v"],
    ["nonsense"], []])
def test_wrong_usage_of_a_command_says_how(host, args):
    done = host.clockctl(*args)
    assert done.returncode == 100 and done.stderr.count("\n") == 1 and done.stdout == b""
    name = args[0] if args and args[0] != "nonsense" else "mark"
    assert done.stderr.startswith("clockctl: usage: clockctl " + name)


def test_a_stopped_mark_stops_its_client(host):
    reader = host.make_fifo()
    stand_in(host.bin, "sntpclock", first="cd '%s'; exec sleep 3573" % host.bin)
    process = subprocess.Popen([path_of("clockctl"), "mark"],
                               env=dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf)))
    assert await_that(lambda: "sleep 3573" in processes_in(host.bin).values())
    process.terminate()
    assert process.wait(30) == 143
    assert await_that(lambda: not processes_in(host.bin), 5)
    os.close(reader)


def test_mark_and_view_with_the_real_programs(host):
    server = subprocess.Popen([path_of("taiclockd"), "-i", "127.40.14.2"], stdout=subprocess.PIPE,
                              env=UTC_ENV)
    try:
        assert server.stdout.readline().startswith(b"start: ")
        host.write_conf(CONF % (host.home, HERE, "tai", "127.40.14.2"))
        reader = host.make_fifo()
        assert host.clockctl("mark").stdout.startswith((b"mark: offset +0.000", b"mark: offset -0.000"))
        assert abs(load("clockctl").unpack(os.read(reader, 100))) < 10**15
        before, after = host.clockctl("view").stdout.decode().splitlines()
        assert before.startswith("before: 20") and after.startswith("after:  20")
        os.close(reader)
        done = host.clockctl("try", "tai:127.40.14.2")
        assert done.returncode == 0 and " against tai:127.40.14.2\n" in done.stdout.decode()
    finally:
        server.kill()
        server.communicate()


# `try` runs the real programs.
def left_behind(directory):
    """What `try` has in its temporary directory, and its children that still run: by their environment."""
    found = os.listdir(str(directory))
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if b"TMPDIR=" + os.fsencode(str(directory)) in contents("/proc/%s/environ" % pid):
                found.append(contents("/proc/%s/cmdline" % pid))
    return found


def try_env(directory, **env):
    return dict(UTC_ENV, TMPDIR=str(directory), CLOCKSPEED_CONF="/dev/null", **env)


def test_try_shows_the_rate_and_leaves_nothing_behind(tmp_path):
    odd = tmp_path / "a b\n'c"
    odd.mkdir()
    began_sec = time.monotonic()
    done = subprocess.run([path_of("clockctl"), "try"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=120, env=try_env(odd, LC_ALL="C"))
    lines = done.stdout.decode("ascii").splitlines()
    assert done.returncode == 0, done.stderr
    assert 15 < time.monotonic() - began_sec < 60
    assert re.match(r"\d+ marks in 20 seconds; the clock was not touched", lines[-4])
    rate, error = map(float, re.search(r"counter: +(\S+) \+- (\S+) ppm", lines[-3]).groups())
    assert abs(rate) < 600 and error < 50
    warnings = done.stderr.splitlines()
    assert len(warnings) == len(set(warnings)), "the same warning at each mark"
    assert left_behind(odd) == []


@pytest.mark.parametrize("number, status", [("INT", 130), ("TERM", 143), ("HUP", 129)])
@pytest.mark.parametrize("after_sec", [0.1, 0.5, 3])
def test_a_stopped_try_leaves_nothing_behind(tmp_path, number, status, after_sec):
    process = subprocess.Popen([path_of("clockctl"), "try"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=try_env(tmp_path))
    time.sleep(after_sec)
    process.send_signal(getattr(signal, "SIG" + number))
    assert b"Traceback" not in process.communicate(timeout=30)[1]
    assert process.returncode in (status, -getattr(signal, "SIG" + number))  # the latter: before it had begun
    assert left_behind(tmp_path) == []


# ==== clockctl: status, wait, metrics ================================================================

def a_status(age_sec=100, **changes):
    """What clockspeed writes: 10 us of error and 0.01 ppm of rate error, of which 1 ms is made in a day."""
    ticks_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
    boot_id = contents("/proc/sys/kernel/random/boot_id").decode().strip()
    status = {
        "version": 1, "pid": os.getpid(), "boot_id": boot_id,
        "observe_only": False, "tick_ns": ticks_ns - int(age_sec * 10**9), "written_ns": time.time_ns(),
        "offset_ns": -1500, "variance": [1e8, 0.0, 100.0, 0.0], "rate_ppm": 12.34567, "rate_error_ppm": 0.01,
        "noise_ns": 21000.0, "wander": 1.2e-9, "marks": {"used": 12, "doubted": 0, "refused": 1},
        "last_mark": {"tick_ns": ticks_ns - 3600 * 10**9, "offset_ns": 123456, "outcome": "used"},
        "kernel": {"freq_ppm": 12.3, "tick": 10000, "maxerror_us": 1200, "esterror_us": 20,
                   "synchronised": True},
        "leap": {"source": "built in", "expires": 1782604800, "tai_offset": 37, "next": None},
        "asking_early": False}
    return dict(status, **changes)


@pytest.fixture
def told(host):
    """Write etc/status; call a command."""
    def tell(status):
        text = status if isinstance(status, bytes) else json.dumps(status).encode()
        (host.home / "etc" / "status").write_bytes(text)
        return host
    return tell


def test_status_is_a_page_that_tells_how_wrong_the_clock_can_be(told):
    done = told(a_status()).clockctl("status", LC_ALL="C.UTF-8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.decode() == """\
clockspeed    runs as process %d, steering the clock
clock now     ± 10 µs; still to be corrected: -1.5 µs
in an hour    ± 38.3 µs
in a day      ± 865 µs
in a month    ± 25.9 ms
rate          +12.3457 ± 0.0100 ppm
wander, noise 1.2e-09 per √s, 21 µs per mark
marks         12 used, 0 doubted, 1 refused
last mark     60 min ago, offset +123 µs, used
next mark     as clockspeed_adjust has it (CLOCK_ERROR is not set)
kernel        synchronised, frequency +12.300 ppm, tick 10000, error 1.2 ms at most
leap seconds  TAI - UTC is 37 s
leap table    built in, expired on 2026-06-28
""" % os.getpid()
    assert told(a_status()).clockctl("status", LC_ALL="C").stdout.isascii()


@pytest.mark.parametrize("changes, shown", [
    (dict(boot_id="other"), "clockspeed    clockspeed has not run since the last boot\n"),
    (dict(pid=2**22 + 1), "clockspeed    clockspeed does not run any more\n"),
    (dict(age_sec=7200), "clockspeed    clockspeed has written nothing for 2 h\n"),
    (dict(age_sec=-10), "clockspeed    clockspeed has not run since the last boot\n"),
    (dict(variance=None, offset_ns=None, last_mark=None), "clock now     not known: no mark yet\n"),
    (dict(asking_early=True), "next mark     at once: the last one is in doubt\n"),
    (dict(kernel=None, last_mark=None), "refused\nleap seconds"),
    (dict(leap={"source": "/etc/leapsecs.dat", "expires": None, "tai_offset": 37, "next": [1798761600, -1]}),
     "TAI - UTC is 37 s, -1 s on 2027-01-01 00:00:00\nleap table    /etc/leapsecs.dat\n"),
    (dict(written_ns=10**40), "steering the clock"),
    (dict(written_ns=10**40, boot_id=""), "last written  Unix second 1"),
])
def test_status_in_other_situations(told, changes, shown):
    done = told(a_status(**changes)).clockctl("status", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout.decode()


def test_status_tells_when_the_next_mark_is_wanted(told):
    host = told(a_status())
    host.write_conf("CLOCKSPEED_HOME=%s CLOCK_ERROR=0.001" % host.home)
    assert "next mark     in 27.7 h, when the error reaches 1 ms\n" in host.clockctl("status").stdout.decode()
    host.write_conf("CLOCKSPEED_HOME=%s CLOCK_ERROR=0.1" % host.home)
    assert "not within a month: the error stays below 100 ms\n" in host.clockctl("status").stdout.decode()


def test_status_for_machines_adds_what_it_means_now(told):
    status = a_status()
    shown = json.loads(told(status).clockctl("status", "--json").stdout)
    now = shown.pop("now")
    assert shown == status
    assert now["problem"] is None and now["mark_wanted_sec"] is None and 100 <= now["age_sec"] < 160
    assert now["error_ns"] == pytest.approx(1e4, rel=0.1)
    for label, ahead_sec in (("hour", 3600), ("day", 86400), ("month", 2592000)):
        assert now["error_ns_in"][label] == pytest.approx((1e8 + 100 * (100 + ahead_sec)**2)**0.5, rel=0.1)
    now = json.loads(told(a_status(boot_id="other")).clockctl("status", "--json").stdout)["now"]
    assert now["error_ns"] is None and now["problem"] == "clockspeed has not run since the last boot"


def damaged_statuses():
    yield json.dumps(a_status(doing="\x1b[2J\ud800", leap=dict(a_status()["leap"], source="\udcff"))).encode()
    yield from (b"", b"{", b"[]", b"null", b"3", b"[" * 60000, b"\xff", b"{}", b"1" * 5000)
    for name in a_status():
        for value in ("x", [], {}, float("nan"), float("inf"), 10**400, [1], {"used": "x"}, -1, None, True):
            yield json.dumps(dict(a_status(), **{name: value})).encode()
        yield json.dumps({key: value for key, value in a_status().items() if key != name}).encode()


def test_whatever_the_status_holds_there_is_no_traceback(told, capfd):
    """In this process, since there are many."""
    clockctl = load("clockctl")
    for text in damaged_statuses():
        host = told(text)
        config = dict(clockctl.DEFAULTS, CLOCKSPEED_HOME=str(host.home), CLOCK_ERROR="0.001")
        for command, options, operands in (
                (clockctl.show_status, {}, []), (clockctl.show_status, {"--json": ""}, []),
                (clockctl.wait, {}, ["541", "2617923"]), (clockctl.metrics, {}, [])):
            try:
                command(config, options, operands)
            except clockctl.Failure as err:
                assert str(err).startswith("unable to read %s/etc/status: it is damaged" % host.home)
    assert "\x1b" not in capfd.readouterr().out


def test_a_missing_status_says_what_to_do(host):
    done = host.clockctl("status")
    assert done.returncode == 111
    assert done.stderr == "clockctl: fatal: unable to read %s/etc/status: there is none: %s\n" % (
        host.home, "clockspeed (in Python) has not run here")


@pytest.mark.parametrize("error, last_sec, most_sec, changes, wanted_sec", [
    ("", 541, 2617923, {}, 1623),
    ("", 541, 541, {}, 541),
    ("", 872641, 2617923, {}, 2617923),
    ("", 872642, 2617923, {}, 2617923),
    ("", 1, 3600, {}, 64),
    ("", 541, 10, {}, 10),
    ("0.001", 541, 2617923, {}, 1623),
    ("0.001", 541000, 2617923, {}, 99895),  # 1 ms after 99995 s, 100 of which have gone by
    ("0.000001", 541, 2617923, {}, 64),
    ("1e9", 541, 2617923, {}, 1623),
    ("0.001", 541000, 2617923, dict(asking_early=True), 64),
    ("", 541, 2617923, dict(asking_early=True), 64),
    ("0.001", 541, 2617923, dict(variance=None, offset_ns=None), 1623),
])
def test_wait_triples_or_is_what_the_accuracy_allows(told, error, last_sec, most_sec, changes, wanted_sec):
    host = told(a_status(**changes))
    host.write_conf("CLOCKSPEED_HOME=%s CLOCK_ERROR=%s" % (host.home, error))
    done = host.clockctl("wait", last_sec, most_sec)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == pytest.approx(wanted_sec, abs=30 if wanted_sec == 99895 else 0)


@pytest.mark.parametrize("status, warning", [
    (None, ""),
    (b"{", "unable to read {home}/etc/status: it is damaged"),
    (dict(boot_id="other"), "unable to go by the status: clockspeed has not run since the last boot"),
    (dict(age_sec=1300), "unable to go by the status: clockspeed has written nothing for 21.7 min"),
])
def test_wait_triples_without_a_status_of_now(told, host, status, warning):
    if status:
        told(a_status(**status) if isinstance(status, dict) else status)
    done = host.clockctl("wait", 541, 2617923)
    assert (done.returncode, done.stdout) == (0, b"1623\n")
    assert done.stderr == ("clockctl: warning: %s\n" % warning.format(home=host.home) if warning else "")


def test_wait_refuses_a_wrong_accuracy(told):
    for wrong in ("soon", "-1", "nan", "inf", "0"):
        host = told(a_status())
        host.write_conf("CLOCKSPEED_HOME=%s CLOCK_ERROR=%s" % (host.home, wrong))
        done = host.clockctl("wait", 541, 2617923)
        assert (done.returncode, done.stdout) == (111, b"")
        assert done.stderr == ("clockctl: fatal: unable to tell the accuracy asked for: "
                               "CLOCK_ERROR is not a number of seconds in %s\n" % host.conf)


def test_wait_lets_clockspeed_take_in_the_mark_first(told):
    host = told(a_status())
    os.utime(str(host.home / "etc" / "status"), (0, 0))
    reader = host.make_fifo()
    process = subprocess.Popen([path_of("clockctl"), "wait", "541", "2617923"], stdout=subprocess.PIPE,
                               env=dict(UTC_ENV, CLOCKSPEED_CONF=str(host.conf)))
    time.sleep(0.3)
    told(a_status(asking_early=True))
    assert process.communicate(timeout=60)[0] == b"64\n"
    os.close(reader)


METRIC = re.compile(r'(clockspeed_[a-z_]+)(\{outcome="[a-z]+"\})? (-?[0-9.e+-]+)$')


def test_metrics_are_what_prometheus_reads(told, tmp_path):
    lines = told(a_status()).clockctl("metrics").stdout.decode().splitlines()
    values, helped, typed = {}, set(), {}
    for line in lines:
        if line.startswith("# HELP "):
            helped.add(line.split()[2])
        elif line.startswith("# TYPE "):
            typed[line.split()[2]] = line.split()[3]
        else:
            name, label, value = METRIC.match(line).groups()
            assert name in helped and typed[name] == ("counter" if name.endswith("_total") else "gauge")
            values[name + (label or "")] = float(value)
    assert values["clockspeed_up"] == 1
    assert values["clockspeed_offset_seconds"] == -1.5e-6
    assert values["clockspeed_error_seconds"] == pytest.approx(10e-6, rel=0.1)
    assert values["clockspeed_rate_ratio"] == pytest.approx(12.34567e-6)
    assert values['clockspeed_marks_total{outcome="used"}'] == 12
    assert values["clockspeed_last_mark_timestamp_seconds"] == pytest.approx(time.time() - 3600, abs=60)
    output = tmp_path / "clockspeed.prom"
    output.write_text("old")
    assert told(a_status()).clockctl("metrics", "--output", output).stdout == b""
    assert output.read_text().startswith("# HELP clockspeed_up ")
    assert sorted(os.listdir(str(tmp_path))) == ["bin", "clockspeed.conf", "clockspeed.prom", "home"]


@pytest.mark.parametrize("changes", [dict(boot_id="other"), dict(pid=2**22 + 1), dict(age_sec=7200), None])
def test_metrics_of_a_clockspeed_that_does_not_run(told, host, changes):
    if changes:
        told(a_status(**changes))
    done = host.clockctl("metrics")
    assert done.returncode == 0 and done.stderr.startswith("clockctl: warning: unable to ")
    assert done.stdout.decode().splitlines()[2:] == ["clockspeed_up 0"]


def test_metrics_that_can_not_be_written_are_a_clear_line(told, tmp_path):
    path = tmp_path / "missing" / "x.prom"
    done = told(a_status()).clockctl("metrics", "--output", path)
    assert (done.returncode, done.stderr) == (
        111, "clockctl: fatal: unable to write %s: No such file or directory\n" % path)


# ==== clockctl: graph ================================================================================

def label(unix_sec):
    return "@%016x%08x" % (2**62 + 10 + int(unix_sec), int(unix_sec % 1 * 1e9))


def mark_line(unix_sec, offset_sec, error_sec=2e-5, rate_ppm=12.5, rate_error_ppm=0.01, outcome="used"):
    return "%s mark: offset %+.9f s, error %.9f s, rate %+.4f ppm, rate error %.4f ppm, %s\n" % (
        label(unix_sec), offset_sec, error_sec, rate_ppm, rate_error_ppm, outcome)


DAYS = [1790000000 + 86400 * n for n in range(60)]


@pytest.fixture
def log(tmp_path):
    """A multilog directory: two old files, the current one, and what else is found there."""
    directory = tmp_path / "log"
    directory.mkdir()
    lines = [mark_line(day, 1e-3 * (n % 7 - 3), 10.0**-(2 + n / 20), 12 + n / 60)
             for n, day in enumerate(DAYS)]
    lines[0] = mark_line(DAYS[0], 5.0)  # the first mark of a new clock
    lines.insert(5, label(DAYS[4] + 5) + " start: steering the clock\n")
    lines.insert(6, mark_line(DAYS[4] + 5, 9.0).partition(" ")[2])
    lines.insert(7, mark_line(DAYS[4] + 9, 3.0, outcome="doubted"))
    lines.insert(8, mark_line(DAYS[4] + 9, float("nan")) + "\xff\0\n" + label(0)[:9] + "\n")
    (directory / (label(DAYS[20]) + ".s")).write_text("".join(lines[:24]), "latin-1")
    (directory / (label(DAYS[40]) + ".u")).write_text("".join(lines[24:44]), "latin-1")
    (directory / "current").write_text("".join(lines[44:]), "latin-1")
    for name in ("lock", "state", "note.txt"):
        (directory / name).write_text(lines[3])
    return str(directory)


def graph(log, *args, **env):
    return run("clockctl", "graph", *args, CLOCKSPEED_CONF="/dev/null", CLOCKSPEED_LOG=log, **env)


def test_csv_has_every_mark_in_order(log):
    rows = [line.split(",") for line in graph(log, "--csv").stdout.decode().splitlines()]
    assert rows[0] == "time offset_seconds error_seconds rate_ppm rate_error_ppm outcome".split()
    assert len(rows) == 62 and [row[0] for row in rows] == [rows[0][0]] + sorted(row[0] for row in rows[1:])
    assert rows[1] == ["2026-09-21T14:13:20Z", "+5.000000000", "0.000020000", "+12.5000", "0.0100", "used"]
    assert [row[5] for row in rows].count("doubted") == 1


@pytest.mark.parametrize("what, ticks", [
    ("offset", ["+2 ms", "0 s", "-2 ms"]), ("rate", ["+12.2 ppm", "+12.8 ppm"]),
    ("error", ["10 ms", "1 ms", "100 us", "10 us"])])
@pytest.mark.parametrize("columns", [40, 80, 132])
def test_a_graph_fits_the_terminal_and_has_real_units_and_dates(log, what, ticks, columns):
    for args, locale in ((["--ascii"], "C.UTF-8"), ([], "C"), ([], "C.UTF-8")):
        text = graph(log, what, *args, COLUMNS=str(columns), LINES="24", LC_ALL=locale).stdout.decode()
        title, *lines = text.splitlines()
        assert "marks: 60 used, 1 doubted or refused" in title
        assert max(map(len, lines)) <= columns and len(lines) == 20
        assert lines[-1].split()[0] == "2026-09-21" and lines[-1].split()[-1] == "2026-11-19"
        shown = [line[:11].replace("µ", "u") for line in lines]
        assert all(any(tick in start for start in shown) for tick in ticks), text
        assert any("\u2800" <= char <= "\u28ff" for char in text) == (locale != "C" and not args)
        assert text.isascii() or locale != "C"


def test_the_line_of_a_graph_has_no_gaps_and_shows_peaks():
    clockctl = load("clockctl")
    rng = random.Random(SEED)
    points = sorted((rng.random() * 1000, rng.gauss(0, 1)) for _ in range(5000))
    peak = points[2500] = (points[2500][0], 9.0)
    chart = clockctl.Chart("rate", [
        (b"%010x" % int(at + 10), b"00000000", b"0", b"0", b"%.4f" % value, b"0", b"used")
        for at, value in points])
    reached = list(chart.strokes(120, 80))
    assert {column for column, _, _ in reached} == set(range(120))
    assert any(top == 0 and abs(column - peak[0] * 119 / 1000) < 2 for column, top, _ in reached)
    for (_, top, bottom), (_, next_top, next_bottom) in zip(reached, reached[1:]):
        assert max(top, next_top) <= min(bottom, next_bottom), "the line is broken"


def test_an_svg_is_well_formed_and_follows_light_and_dark(log, tmp_path):
    path = tmp_path / "rate.svg"
    assert graph(log, "rate", "--svg", path).returncode == 0
    text = path.read_text()
    root = xml.dom.minidom.parseString(text).documentElement
    assert root.tagName == "svg" and "prefers-color-scheme: dark" in text
    points = [tuple(map(float, point.split(","))) for point in
              root.getElementsByTagName("polyline")[0].getAttribute("points").split()]
    assert points[0][0] == 100 and points[-1][0] == 740 and all(50 <= y <= 350 for _, y in points)
    assert points == sorted(points, key=lambda point: point[0])


@pytest.mark.parametrize("args, marks", [([], 1), (["rate"], 2), (["error"], 1), (["offset", "--ascii"], 2)])
def test_a_graph_of_one_mark_or_of_equal_ones(tmp_path, args, marks):
    (tmp_path / "current").write_text("".join(mark_line(DAYS[n], 0) for n in range(marks)))
    done = graph(str(tmp_path), *args)
    assert done.returncode == 0 and done.stderr == ""
    assert graph(str(tmp_path), *args[:1], "--svg", str(tmp_path / "x.svg")).returncode == 0


def test_a_log_without_marks_or_no_log_is_a_clear_line(tmp_path):
    refused = mark_line(DAYS[0], 1, outcome="refused")
    (tmp_path / "current").write_text(label(DAYS[0]) + " start: observing\n" + refused)
    assert graph(str(tmp_path)).stderr == (
        "clockctl: fatal: unable to draw the offset: there is no mark in %s yet\n" % tmp_path)
    done = graph(str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (
        111, "clockctl: fatal: unable to read the log %s/none: No such file or directory\n" % tmp_path)


def test_random_logs_draw_or_say_why_not(tmp_path, capfd):
    clockctl, rng = load("clockctl"), random.Random(SEED)

    def size(least):
        return rng.gauss(0, 10.0**rng.randrange(least, 9))

    for _ in range(150):
        lines = [mark_line(rng.choice([0, 1e9, 1.79e9, 2**33]) + rng.random() * 10**rng.randrange(8),
                           size(-9), abs(size(-9)), size(-4)) for _ in range(rng.randrange(5))]
        text = bytearray("".join(lines).encode())
        for _ in range(rng.randrange(3) if text else 0):
            text[rng.randrange(len(text))] = rng.randrange(256)
        (tmp_path / "current").write_bytes(bytes(text))
        for what in clockctl.CHARTS:
            for options in ({}, {"--ascii": ""}, {"--csv": ""}, {"--svg": str(tmp_path / "x.svg")}):
                try:
                    clockctl.graph({"CLOCKSPEED_LOG": str(tmp_path)}, options, [what])
                except clockctl.Failure as err:
                    assert "there is no mark" in str(err)
    capfd.readouterr()


# ==== the services ==================================================================================

SHELLS = [["dash"], ["busybox", "ash"], ["mksh"], ["bash"], ["bash", "--posix"], ["ksh"]]
SERVICE_SCRIPTS = sorted(os.path.relpath(os.path.join(place, name), HERE)
                         for place, _, names in os.walk(os.path.join(HERE, "svc")) for name in names
                         if name == "run" or name.endswith(".sh"))


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
@pytest.mark.parametrize("script", SERVICE_SCRIPTS)
def test_the_service_scripts_are_good_in_every_shell(script, shell):
    need(shell[0])
    path = os.path.join(HERE, script)
    assert os.access(path, os.X_OK)
    assert subprocess.run(shell + ["-n", path], stderr=subprocess.PIPE).stderr == b""
    lines = contents(path).decode().splitlines()
    assert lines[0] == "#!/bin/sh" and (not script.endswith("run") or len(lines) < 10)


def test_the_sample_configuration_is_valid_and_documented():
    values = load("clockctl").parse_assignments(contents(path_of("svc/clockspeed.conf")).decode())
    assert values == dict(CLOCKSPEED_HOME="/usr/local/clockspeed", CLOCKSPEED_BIN="/usr/local/clockspeed/bin",
                          CLOCK_TYPE="ntp", CLOCK_IP="192.0.2.1", CLOCK_ERROR="0.010")


@pytest.fixture
def public_tmp():
    """A temporary directory that other users may enter; pytest's own may not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield pathlib.Path(name)


@pytest.fixture
def supervised(public_tmp):
    """start(name, {script: text}) -> the service's directory, under a real svscan."""
    need("svscan", "supervise", "svc", "svstat")
    services = public_tmp / "service"
    services.mkdir()

    def start(name, scripts):
        place = services / ("." + name)  # which svscan passes over, until it is complete
        for script, text in scripts.items():
            (place / script).parent.mkdir(parents=True, exist_ok=True)
            (place / script).write_text(text)
            (place / script).chmod(0o755)
        os.rename(str(place), str(services / name))
        return services / name

    svscan = subprocess.Popen(["svscan", str(services)], env=UTC_ENV)
    try:
        yield start
    finally:
        svscan.terminate()
        svscan.wait()
        for place in services.iterdir():
            for each in filter(os.path.exists, (str(place), str(place / "log"))):
                subprocess.run(["svc", "-dx", each])
        assert await_that(lambda: not processes_in(public_tmp)), processes_in(public_tmp)


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
@pytest.mark.parametrize("how", ["-t", "-d"])
def test_clock_adjust_ends_at_once_and_leaves_no_sleep(supervised, host, tmp_path, shell, how):
    need(shell[0])
    shutil.copy(path_of("svc/clockspeed_adjust/clock_adjust.sh"), str(tmp_path))
    stand_in(tmp_path, "clockctl", b"said\n")
    place = supervised("adjust", {"run": "#!/bin/sh\nexport PATH=%s:$PATH WAIT=3571\nexec %s %s >log\n" % (
        tmp_path, " ".join(shell), tmp_path / "clock_adjust.sh")})

    def sleeping():
        return [pid for pid, command in processes_in(place).items() if command == "sleep 3571"]
    assert await_that(sleeping)
    old = sleeping()
    subprocess.run(["svc", how, str(place)], check=True)
    assert await_that(lambda: not set(old) & set(processes_in(place)), 5), "the sleep outlived its shell"
    if how == "-t":
        assert await_that(sleeping), "it was not started again"
    else:
        assert await_that(lambda: " down " in subprocess.run(["svstat", str(place)],
                                                             stdout=subprocess.PIPE).stdout.decode(), 5)
        assert not sleeping()


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_clock_adjust_stops_a_mark_that_is_under_way(supervised, tmp_path, shell):
    need(shell[0])
    shutil.copy(path_of("svc/clockspeed_adjust/clock_adjust.sh"), str(tmp_path))
    (tmp_path / "clockctl").write_text("#!/bin/sh\nexec sleep 3572\n")
    (tmp_path / "clockctl").chmod(0o755)
    place = supervised("adjust", {"run": "#!/bin/sh\nexport PATH=%s:$PATH\nexec %s %s >log\n" % (
        tmp_path, " ".join(shell), tmp_path / "clock_adjust.sh")})
    assert await_that(lambda: "sleep 3572" in processes_in(place).values())
    subprocess.run(["svc", "-d", str(place)], check=True)
    assert await_that(lambda: "sleep 3572" not in processes_in(place).values(), 5)


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
@pytest.mark.parametrize("answers", ["nothing", "nonsense", "waits"])
def test_the_waits_triple_and_a_failed_mark_is_tried_again_soon(tmp_path, shell, answers):
    """Also when clockctl can't tell the wait."""
    need(shell[0])
    (tmp_path / "sleep").write_text('#!/bin/sh\nprintf "%s " "$1" >> "$OUT"\n'
                                    '[ "$(wc -w < "$OUT")" -lt 13 ] || kill -TERM $PPID\n')
    (tmp_path / "clockctl").write_text(  # the fourth mark fails
        '#!/bin/sh\necho $1 >> "$OUT.ctl"\ncase $1 in\n'
        'mark) [ "$(grep -c mark "$OUT.ctl")" != 4 ] ;;\nwait) %s\nesac\n' % {
            "nothing": "exit 111", "nonsense": "echo -x", "waits": 'exec "$CLOCKCTL" "$@"'}[answers])
    for name in ("sleep", "clockctl"):
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "waits"
    done = subprocess.run(
        shell + [path_of("svc/clockspeed_adjust/clock_adjust.sh")], timeout=60, stdout=subprocess.PIPE,
        env=dict(UTC_ENV, OUT=str(out), CLOCKCTL=path_of("clockctl"), CLOCKSPEED_CONF="/dev/null",
                 CLOCKSPEED_HOME=str(tmp_path), PATH="%s:%s" % (tmp_path, os.environ["PATH"])))
    waits = [541 * 3**n for n in range(3)] + [541] + [541 * 3**n for n in range(3, 8)] + [2617923] * 4
    assert list(map(int, contents(out).split())) == waits
    assert done.stdout.decode().splitlines()[:2] == ["===", "Waiting 541 seconds until next adjustment..."]


def test_the_services_run_under_daemontools(supervised, public_tmp):
    """As installed, but for paths, users, and -n: this machine's clock is not touched."""
    need("svscan", "multilog", "setuidgid")
    if os.geteuid():
        pytest.skip("not root: setuidgid can't change the user")
    home, logs = public_tmp / "clockspeed", public_tmp / "multilog"
    for place in (home / "etc", home / "bin", logs):
        place.mkdir(parents=True)
    logs.chmod(0o777)
    for name in SCRIPTS:
        shutil.copy(path_of(name), str(home / "bin" / name))
    shutil.copy(path_of("clockctl"), str(home / "bin" / "clockctl"))
    server = "127.40.14.1"
    (public_tmp / "clockspeed.conf").write_text(CONF % (home, home / "bin", "tai", server))
    substitutions = [
        ("/usr/local/clockspeed/bin/clockspeed", "%s/bin/clockspeed -n %s" % (home, home)),
        ("/usr/local/clockspeed/bin/taiclockd", "%s/bin/taiclockd -i %s" % (home, server)),
        ("/usr/local/clockspeed", str(home)), ("/var/multilog", str(logs)),
        ("setuidgid clocksd", "setuidgid nobody"), ("setuidgid multilog", "setuidgid nobody"),
        ("chown -h clocksd", "chown -h nobody"), ("PATH=$PATH", "PATH=%s/bin:$PATH" % home),
        ("#!/bin/sh\n", "#!/bin/sh\nexport WAIT=1 WAIT_MAX=2 CLOCKSPEED_CONF=%s\n" % (
            public_tmp / "clockspeed.conf"))]

    def substituted(script):
        text = contents(os.path.join(HERE, script)).decode()
        for old, new in substitutions:
            text = text.replace(old, new)
        return text

    def log(service):
        path = logs / service / "current"
        return path.read_text() if path.exists() else ""

    places = {}
    for service in ("taiclockd", "clockspeed", "clockspeed_adjust"):
        prefix = "svc/%s/" % service
        places[service] = supervised(service, {script[len(prefix):]: substituted(script)
                                               for script in SERVICE_SCRIPTS if script.startswith(prefix)})
    assert await_that(lambda: log("clockspeed").count(" mark: offset ") >= 3, 60), log("clockspeed_adjust")
    for service in places:
        assert re.search(r"^@[0-9a-f]{24} \*\*\* Starting %s\.\.\.$" % service, log(service), re.M)
    assert re.search(r"^@\w+ mark: offset [+-]0\.0\d+ s from tai %s$" % re.escape(server),
                     log("clockspeed_adjust"), re.M)
    assert await_that(lambda: re.search(r" atto: 0\.0000000\d+ s per tick, rate ", log("clockspeed_adjust")))
    assert "Waiting 1 seconds until next adjustment..." in log("clockspeed_adjust")
    nobody = os.stat(str(logs / "clockspeed")).st_uid
    adjust = os.stat(str(home / "adjust"))
    assert adjust.st_uid == nobody and stat.S_IMODE(adjust.st_mode) == 0o600

    # Whoever makes the FIFO, at the next start it is clocksd's again.
    (home / "adjust").unlink()
    subprocess.run(["svc", "-t", str(places["clockspeed"])], check=True)
    assert await_that(lambda: (home / "adjust").exists() and os.stat(str(home / "adjust")).st_uid == nobody)
    marks = log("clockspeed").count(" mark: offset ")
    assert await_that(lambda: log("clockspeed").count(" mark: offset ") > marks), log("clockspeed")

    # A link in its place is neither followed nor given away.
    (home / "adjust").unlink()
    victim = public_tmp / "victim"
    victim.write_text("")
    (home / "adjust").symlink_to(victim)
    starts = log("clockspeed").count("Starting")
    subprocess.run(["svc", "-t", str(places["clockspeed"])], check=True)
    assert await_that(lambda: log("clockspeed").count("Starting") > starts)
    time.sleep(0.5)
    assert os.stat(str(victim)).st_uid == 0 and victim.read_text() == ""
