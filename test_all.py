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
import signal
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

# ==== the estimator =================================================================================

# ==== clockspeed: a simulated kernel ================================================================

# ==== clockspeed: the process =======================================================================

# ==== bad days ======================================================================================

# ==== clockctl ======================================================================================

# ==== clockctl-check ================================================================================

# ==== clockctl-graph ================================================================================

# ==== the services ==================================================================================

# ==== svc/install ===================================================================================

INSTALL = path_of("svc/install")
INSTALL_SHELLS = [pytest.param(command.split(), id=command)
                  for command in ("dash", "bash", "mksh", "busybox sh")]
PROGRAMS = ("clockspeed", "sntpclock", "taiclock", "ntsclock", "taiclockd", "clockadd", "clockview")
SERVICES = ("clockspeed", "clockspeed_adjust", "taiclockd")
BIN, CONF = "usr/local/clockspeed/bin/", "usr/local/etc/clockspeed.conf"


class Image:
    """A directory into which svc/install installs."""

    def __init__(self, path):
        self.path = str(path)

    def install(self, *args, shell=("sh",), script=INSTALL, umask=None, status=0, root=True, stdout=None):
        words = list(shell) + [script] + ["--root", self.path] * root + list(args)
        env = {key: value for key, value in UTC_ENV.items() if not key.startswith("CLOCKSPEED_")}
        done = subprocess.run(words, stdout=stdout or subprocess.PIPE, stderr=subprocess.PIPE, env=env,
                              timeout=60, preexec_fn=umask and (lambda: os.umask(umask)))
        lines = ((done.stdout or b"") + done.stderr).decode().splitlines()
        assert done.returncode == status, lines
        return [line for line in lines if not line.startswith("left to you: ")]

    def __call__(self, name):
        return os.path.join(self.path, name)

    def read(self, name):
        with open(self(name)) as file:
            return file.read()

    def write(self, name, text):
        os.makedirs(os.path.dirname(self(name)), exist_ok=True)
        with open(self(name), "w") as file:
            file.write(text)

    def tree(self):
        """-> name: mode, of all that is in it."""
        names = [os.path.relpath(os.path.join(place, name), self.path)
                 for place, directories, files in os.walk(self.path) for name in directories + files]
        return {name: oct(os.lstat(self(name)).st_mode)[-4:] for name in names}


@pytest.fixture
def image(tmp_path):
    (tmp_path / "image").mkdir()
    return Image(tmp_path / "image")


@pytest.fixture
def project(tmp_path):
    """A copy of this project, to make a next version of -> its svc/install."""
    for name in SCRIPTS:
        (tmp_path / "project").mkdir(exist_ok=True)
        shutil.copy(path_of(name), str(tmp_path / "project"))
    shutil.copytree(path_of("svc"), str(tmp_path / "project" / "svc"))
    return str(tmp_path / "project" / "svc" / "install")


@pytest.mark.parametrize("shell", INSTALL_SHELLS)
def test_every_shell_installs_the_same_and_then_finds_nothing_to_do(image, shell):
    need(shell[0])
    args, umask = ("--server", "ntp:192.0.2.7,2001:db8::1"), 0o002 if shell == ["dash"] else 0o077
    assert image.install("--dry-run", *args, shell=shell)[-1] == "write /var/svc.d/.clockspeed-installed"
    assert not image.tree()
    image.install(*args, shell=shell, umask=umask)
    tree = image.tree()
    assert {BIN + name + ".py" for name in PROGRAMS} | {BIN + name for name in PROGRAMS} <= set(tree)
    for name in [BIN + program for program in PROGRAMS] + ["usr/local/bin/clockctl"]:
        source = read_script(os.path.basename(name))
        assert image.read(name) == source.replace("#!/usr/bin/env python3\n", "#!/usr/bin/python3 -IS\n", 1)
        assert os.access(image(name), os.X_OK)
    for service in SERVICES:
        for script in (service + "/run", service + "/log/run"):
            assert image.read("var/svc.d/" + script) == read_script("svc/" + script)
    assert tree["usr/local/clockspeed/adjust"] == "0600" and tree["usr/local/clockspeed/mark"] == "0700"
    plain = {mode for name, mode in tree.items() if not name.endswith(("adjust", "/mark"))}
    assert plain == {"0755", "0644", "0777"}, "directories and programs, files, links"
    assert '\nCLOCK_TYPE="ntp"\n' in image.read(CONF)
    assert '\nCLOCK_IP="192.0.2.7 2001:db8::1"\n' in image.read(CONF)
    for again in (args, ()):
        assert image.install(*again, shell=shell) == ["nothing to do"]
    assert image.tree() == tree
    assert image.install("--remove", "--purge", shell=shell)[0] == "remove /usr/local/clockspeed/adjust"
    assert set(image.tree()) == {"usr", "usr/local", "usr/local/bin", "usr/local/etc", "var"}
    assert image.install("--remove", "--purge", shell=shell) == ["nothing to do"]


@pytest.mark.parametrize("args, status, said", [
    (["--server", "192.0.2.1"], 100,
     "usage: --server 192.0.2.1: the type is missing: ntp:192.0.2.1, or tai: or nts:"),
    (["--server", "ntp:"], 100, "usage: --server ntp:: that is no list of hosts"),
    (["--server=tai:a,,b"], 100, "usage: --server tai:a,,b: that is no list of hosts"),
    (["--server", 'nts:a"; reboot'], 100, "usage: --server nts:a\"; reboot: that is no list of hosts"),
    (["--server"], 100, "usage: --server needs a value"),
    (["--purge"], 100, "usage: --purge goes with --remove"),
    (["--supervisor", "upstart"], 100, "usage: --supervisor upstart: daemontools, runit or s6"),
    (["--remove", "--start"], 100, "usage: --remove goes with --purge, --root and --dry-run"),
    (["--no-such"], 100, r"usage: install \[.* \(--no-such is unknown\)"),
    (["here"], 100, r"usage: install \[.* \(here is unknown\)"),
    (["--root", "/no/such"], 111, "fatal: unable to use /no/such: it is no directory"),
])
def test_what_is_wrong_is_one_line_and_changes_nothing(image, args, status, said):
    line, = image.install(*args, status=status)
    assert re.fullmatch("install: " + said, line) and not image.tree()


def test_its_manual_and_version(image):
    manual = image.install("--help", root=False)
    assert manual == image.install("-h", root=False)
    assert manual[0].startswith("install - ") and {"SYNOPSIS", "OPTIONS", "EXIT STATUS"} < set(manual)
    assert image.install("--version", root=False) == ["install " + load("clockview").RELEASE]
    with open("/dev/full", "wb") as full:
        assert image.install(status=111, stdout=full) == ["install: fatal: unable to write output"]


@pytest.mark.parametrize("supervisor, become, log", [
    ("runit", "exec chpst -u clocksd ", "exec chpst -u multilog svlogd -t /"),
    ("s6", "exec s6-setuidgid clocksd ", "exec s6-setuidgid multilog s6-log t /"),
])
def test_scripts_are_written_for_the_supervisor_which_is_remembered(image, supervisor, become, log):
    image.install("--supervisor", supervisor)
    assert become in image.read("var/svc.d/clockspeed_adjust/run")
    assert log in image.read("var/svc.d/taiclockd/log/run")
    assert image.install() == ["nothing to do"]
    assert "write /var/svc.d/taiclockd/run" in image.install("--supervisor", "daemontools")
    assert image.read("var/svc.d/taiclockd/run") == read_script("svc/taiclockd/run")


def test_another_home_is_the_configurations(image):
    image.write(CONF, 'CLOCKSPEED_HOME="/srv/clock"\nCLOCKSPEED_BIN=/opt/bin  # ours\nCLOCK_IP="192.0.2.7"\n')
    image.install()
    assert image.read("var/svc.d/clockspeed/run").endswith(
        "/opt/bin/clockspeed -u clockspeed -w clocksd /srv/clock\n")
    assert "/opt/bin/taiclockd\n" in image.read("var/svc.d/taiclockd/run")
    assert {"opt/bin/sntpclock", "srv/clock/adjust", "srv/clock/etc"} <= set(image.tree())
    image.write(CONF, 'CLOCKSPEED_HOME="/srv/$(reboot)"\n')
    assert image.install(status=111) == [
        "install: fatal: unable to use CLOCKSPEED_HOME: it is not a plain absolute path"]


def test_the_next_version_replaces_what_was_not_edited(image, project):
    image.install("--server", "tai:192.0.2.7")
    image.write("var/svc.d/clockspeed/run", "#!/bin/sh\n# edited\n")
    for name in ("clockview.py", "svc/clockspeed/run"):
        with open(os.path.join(os.path.dirname(os.path.dirname(project)), name), "a") as file:
            file.write("# the next version\n")
    with open(project) as file:
        text = file.read()
    with open(project, "w") as file:  # which has no clockctl-graph
        file.write(text.replace("clockctl clockctl-check clockctl-graph", "clockctl clockctl-check"))
    assert image.install(script=project) == [
        "write /usr/local/clockspeed/bin/clockview.py", "write /var/svc.d/clockspeed/run.new, since "
        "/var/svc.d/clockspeed/run was edited", "remove /usr/local/bin/clockctl-graph",
        "write /var/svc.d/.clockspeed-installed"]
    assert image.install(script=project) == ["nothing to do"]
    os.rename(image("var/svc.d/clockspeed/run.new"), image("var/svc.d/clockspeed/run"))
    assert image.install(script=project) == ["write /var/svc.d/.clockspeed-installed"]
    assert image.install(script=project) == ["nothing to do"]


def test_other_servers_change_two_lines_of_the_configuration(image):
    image.install("--server", "tai:192.0.2.7")
    assert image.install("--server", "nts:a.example.org")[0] == "write /usr/local/etc/clockspeed.conf"
    mine = image.read(CONF) + "CLOCK_KEY=1\n"
    image.write(CONF, mine)
    assert image.install() == ["nothing to do"]
    image.install("--server", "ntp:192.0.2.8")
    assert image.read(CONF) == mine and 'CLOCK_IP="192.0.2.8"\n' in image.read(CONF + ".new")
    assert image.read(CONF + ".new").endswith("CLOCK_KEY=1\n")


def test_removal_leaves_what_was_edited_or_learned_and_follows_no_link(image, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("")
    image.install("--server", "ntp:192.0.2.7")
    image.write("var/svc.d/clockspeed/run", "edited")
    image.write("usr/local/clockspeed/etc/state", "")
    for name in ("var/multilog/clockspeed/current", "var/multilog/clockspeed/deep" + "/deep" * 300 + "/file"):
        image.write(name, "")
    os.symlink(str(tmp_path / "theirs"), image("var/multilog/taiclockd/link"))
    image.install("--remove")
    kept = {"var/svc.d/clockspeed/run", "usr/local/clockspeed/etc/state", "var/multilog/clockspeed/current",
            CONF}
    assert kept < set(image.tree()) and not os.path.exists(image(BIN))
    image.install("--remove", "--purge")
    left = set(image.tree())
    assert not kept & left - {"var/svc.d/clockspeed/run"} and "var/multilog/clockspeed/deep" in left
    assert "var/multilog/taiclockd" not in left and os.path.exists(str(tmp_path / "theirs" / "file"))


def test_links_are_made_only_where_something_scans(image):
    assert not any("service" in name for name in image.tree())
    image.install("--start", "--server", "ntp:192.0.2.7")
    assert not any("service" in name for name in image.tree()), "no supervisor is there"
    image.write("usr/bin/svscan", "")
    os.chmod(image("usr/bin/svscan"), 0o755)
    os.makedirs(image("etc/service"))
    image.install("--start")
    assert os.listdir(image("etc/service")) and sorted(os.listdir(image("etc/service"))) == list(SERVICES[:2])
    assert os.readlink(image("etc/service/clockspeed")) == "/var/svc.d/clockspeed"


def test_a_file_where_the_fifo_should_be_is_refused(image):
    image.write("usr/local/clockspeed/adjust", "")
    assert image.install(status=111)[-1] == (
        "install: fatal: unable to use /usr/local/clockspeed/adjust: it is no FIFO; remove it")


@pytest.mark.parametrize("modes, trusted", [((0o755, 0o755), True), ((0o775, 0o755), False),
                                            ((0o1777, 0o755), False), ((0o755, 0o757), False)])
def test_what_others_than_root_can_write_is_no_scan_directory(modes, trusted):
    """By the function alone: the whole is tried in a clean root, with real scanners."""
    if os.getuid():
        pytest.skip("not root")
    with contextlib.ExitStack() as stack:
        top = "/run/clockspeed-test-%d" % os.getpid()
        stack.callback(shutil.rmtree, top)
        os.makedirs(top + "/service")
        os.chmod(top, modes[0])
        os.chmod(top + "/service", modes[1])
        function = re.search(r"^only_root\(\) \{\n.*?^\}\n", read_script("svc/install"), re.M | re.S).group()
        done = subprocess.run(["sh", "-c", function + "only_root " + top + "/service"])
        assert (done.returncode == 0) == trusted


# ==== the README ====================================================================================

# The README's blocks: sh install and sh host are followed in a virtual machine (.ci/vm), sh client and
# sh also are for other hosts and cases, conf and text are no commands, sh and sh tests need no root.
README, NOTES = read_script("README.md"), read_script("NOTES.md")
BLOCKS = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", README, re.M)


def blocks(*kinds):
    return [text for kind, text in BLOCKS if kind in kinds]


def test_the_readme_is_short_and_its_blocks_are_of_known_kinds():
    assert len(README.encode()) <= 16 * 1024
    assert {kind for kind, _ in BLOCKS} == {"conf", "text", "sh", "sh tests", "sh install", "sh host",
                                            "sh client", "sh also"}
    assert len(BLOCKS) * 2 == README.count("\n```")


@pytest.mark.parametrize("shell", INSTALL_SHELLS)
def test_every_shell_understands_its_blocks(shell):
    need(shell[0])
    text = "\n".join(text for kind, text in BLOCKS if kind.startswith("sh"))
    subprocess.run(shell + ["-n"], input=text.encode(), check=True)


def test_by_hand_the_programs_are_as_installed(tmp_path):
    home, system = str(tmp_path / "home"), str(tmp_path / "system")
    text = blocks("sh host")[0].replace("/usr/local/clockspeed", home).replace("/usr/local", system)
    subprocess.run(["sh", "-ec", "umask 077\n" + text], cwd=HERE, check=True)
    for name in PROGRAMS:
        with open(os.path.join(home, "bin", name)) as file:
            first, _, rest = file.read().partition("\n")
        assert re.fullmatch("#!/.*python3 -IS", first) and rest == read_script(name).partition("\n")[2]
        assert os.stat(os.path.join(home, "bin", name)).st_mode & 0o777 == 0o755
    done = subprocess.run([os.path.join(system, "bin", "clockctl"), "version"], stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize("supervisor, word", (("runit", "chpst"), ("s6", "s6-setuidgid")))
def test_by_hand_the_scripts_for_other_supervisors_are_as_installed(supervisor, word, image, tmp_path):
    image.install("--supervisor", supervisor)
    text, = [text for text in blocks("sh also") if word in text]
    for service in SERVICES:
        shutil.copytree(path_of("svc/" + service), str(tmp_path / "svc.d" / service))
    subprocess.run(["sh", "-ec", text.replace("/var/svc.d", str(tmp_path / "svc.d"))], check=True,
                   stderr=subprocess.DEVNULL)
    for script in ("/run", "/log/run"):
        for service in SERVICES:
            name = "svc.d/" + service + script
            assert (tmp_path / name).read_text() == image.read("var/" + name)


@pytest.mark.parametrize("text", blocks("conf"))
def test_clockctl_understands_its_configurations(text, tmp_path):
    (tmp_path / "conf").write_text(read_script("svc/clockspeed.conf") + text)
    said = run("clockctl", "run", "env", CLOCKSPEED_CONF=str(tmp_path / "conf")).stdout.decode()
    assert set(text.replace('"', "").splitlines()) <= set(said.splitlines())


def test_what_it_names_exists():
    manual = run("clockctl", "--help").stdout.decode() + "check graph help"
    code = "".join(text for _, text in BLOCKS) + "".join(re.findall("`.*?`", README))
    for command in re.findall(r"clockctl ([a-z]+)", code):
        assert re.search(r"\b%s\b" % command, manual), command
    options = subprocess.run(["sh", INSTALL, "--help"], stdout=subprocess.PIPE).stdout.decode()
    for option in re.findall(r"--[a-z][-a-z]+", " ".join(re.findall(r"svc/install.*", README))):
        assert option in options, option
    for name in re.findall(r"\b(?:CLOCK|CLOCKSPEED)_[A-Z]+", README):
        assert name in manual, name
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
# One row for each function that reads what others wrote: good inputs, bad ones, and what it may raise.
