"""endurance.py - marks every second on a real kernel: vm --two --share PROJECT .ci/endurance.sh [SECONDS]

Guest A serves NTP, 40 ppm faster than guest B's counter and, as its room warms, a little faster each
minute.  Guest B runs clockspeed, gives it a mark each second for an hour, and looks at the clock by plain
SNTP queries that share no code with it.
"""
import json
import os
import signal
import subprocess
import sys
import time

from rig import SERVER, Server, ask, check, clock_ppm, finish, kernel, say, serve

HOME, BIN = "/usr/local/clockspeed", "/rig/main"
LENGTH_SEC = int(sys.argv[1]) if sys.argv[1:] else 3600
BEGIN_SEC = min(300, LENGTH_SEC // 3)  # by then all is there that clockspeed will ever need
KEPT_MAX = 64 << 10  # bytes: the state holds 187 models, most of them asleep
LOOK_SEC = 10  # between looks at the clock, each of 4 exchanges
WARMING = 655  # a minute, in the kernel's 2^-16 ppm: 0.01 ppm, 0.6 ppm in the hour

if os.environ["RIG_GUEST"] == "A":
    if not os.fork():
        while True:
            time.sleep(60)
            kernel.adjtimex(modes=0x2, freq=kernel.adjtimex()["freq"] + WARMING)
    serve(40, 3 * 10**9)

os.makedirs(HOME + "/etc")
subprocess.run("groupadd nofiles; useradd -r -g nofiles clocksd; chmod 755 /rig /rig/main", shell=True, check=True)
ask()
with open("/tmp/clockspeed.log", "wb", buffering=0) as log:
    process = subprocess.Popen([BIN + "/clockspeed.py", "-u", "clocksd"], stdout=log, stderr=log)
while not os.path.exists(HOME + "/adjust"):
    time.sleep(0.1)
adjust = os.open(HOME + "/adjust", os.O_RDWR)


def needs():
    """What clockspeed takes: resident kB, descriptors, CPU s, bytes in etc."""
    with open("/proc/%d/status" % process.pid) as file:
        resident_kb = next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
    with open("/proc/%d/stat" % process.pid) as file:
        ticks = sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
    return (resident_kb, len(os.listdir("/proc/%d/fd" % process.pid)), ticks / os.sysconf("SC_CLK_TCK"),
            sum(entry.stat().st_size for entry in os.scandir(HOME + "/etc")))


def mark():
    return subprocess.run([BIN + "/sntpclock.py", "-r", "2", SERVER], stdout=adjust).returncode == 0


made, late, errors, over, first = 0, 0, [], 0, None  # errors: (of the clock, predicted, the look's own bound) in s
began = time.monotonic()
while time.monotonic() < began + LENGTH_SEC:
    second = int(time.monotonic() - began)
    made += mark()
    if second >= BEGIN_SEC:
        first = first or needs()
        if second // LOOK_SEC > len(errors) + BEGIN_SEC // LOOK_SEC - 1:
            now = kernel.adjtimex()
            offset, delay = ask(4)
            errors.append((offset, now["esterror"] / 1e6, delay / 2))
            over += abs(offset) > now["maxerror"] / 1e6 + delay / 2
            if len(errors) % 30 == 1:
                say("%d marks; off by %+.1f us, esterror %d us, maxerror %d us; %d kB, %d descriptors, %.1f s of CPU, "
                    "%d bytes in etc" % ((made, offset * 1e6, now["esterror"], now["maxerror"]) + needs()))
    rest_sec = began + second + 1 - time.monotonic()
    late += rest_sec < 0
    time.sleep(max(0, rest_sec))
last, log = needs(), open("/tmp/clockspeed.log").read()
taken = log.count("\nmark: ")
with open(HOME + "/etc/status") as file:
    marks = json.load(file)["marks"]
say("%d marks made, %d taken, %d seconds late; %s" % (made, taken, late, marks))
check("a mark for each second, all of them heard", made >= 0.95 * LENGTH_SEC and taken >= made - 1)
check("nothing failed", process.poll() is None and "fatal" not in log and "warning" not in log and "unable" not in log,
      "\n".join(line for line in log.splitlines() if "warning" in line or "unable" in line)[:500])
check("memory is constant", last[0] <= first[0] + 128, "%d kB, at first %d kB" % (last[0], first[0]))
check("so are descriptors", last[1] <= first[1], "%d" % last[1])
check("and what is kept", last[3] < KEPT_MAX, "%d bytes, at first %d" % (last[3], first[3]))
within = sum(abs(offset) <= 3 * predicted + bound for offset, predicted, bound in errors)
worst = max(abs(offset) for offset, _, _ in errors)
rms = (sum(offset * offset for offset, _, _ in errors) / len(errors)) ** 0.5
check("no error is over maxerror", not over, "%d looks, rms %.1f us, worst %.1f us" % (len(errors), rms * 1e6, worst * 1e6))
check("99.7% are within 3 esterror", within >= 0.997 * len(errors) - 1, "%d of %d" % (within, len(errors)))
say("%.2f ms of CPU for each mark" % (1000 * (last[2] - first[2]) / (LENGTH_SEC - BEGIN_SEC)))
process.send_signal(signal.SIGKILL)
process.wait()
time.sleep(2)
server = Server()
ppm, server_ppm = clock_ppm(120), server.ppm()
check("killed after that the clock keeps its rate", abs(ppm - server_ppm) < 0.5,
      "%+.3f ppm against the server's %+.3f" % (ppm, server_ppm))
finish()
