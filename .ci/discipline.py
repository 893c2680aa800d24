"""discipline.py - clockspeed on a real kernel: vm --two --share PROJECT .ci/discipline.sh

Guest A serves NTP, 2 s ahead and 300 ppm faster than guest B's counter; guest B runs clockspeed, and is
looked at by plain SNTP queries that share no code with it.
"""
import os
import signal
import subprocess
import time

from rig import SERVER, Server, ask, check, clock_ppm, finish, kernel, pair, say, serve

if os.environ["RIG_GUEST"] == "A":
    serve(300, 2 * 10**9)

HOME, BIN = "/usr/local/clockspeed", "/rig/main"
os.makedirs(HOME + "/etc")
subprocess.run("groupadd nofiles; useradd -r -g nofiles clocksd; chmod 755 /rig /rig/main", shell=True, check=True)
log = open("/tmp/clockspeed.log", "ab+", buffering=0)


def start():
    before = log.seek(0, 2)
    process = subprocess.Popen([BIN + "/clockspeed.py", "-u", "clocksd"], stdout=log, stderr=log)
    wait_line("start: ", before)
    return process


def wait_line(text, since):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with open("/tmp/clockspeed.log", "rb") as file:
            file.seek(since)
            for line in file:
                if line.startswith(text.encode()) and line.endswith(b"\n"):
                    say("  " + line.decode().strip())
                    return
        time.sleep(0.05)
    check("clockspeed says %r" % text, False)


def mark():
    since = log.seek(0, 2)
    packet = subprocess.run([BIN + "/sntpclock.py", SERVER], stdout=subprocess.PIPE).stdout
    fd = os.open(HOME + "/adjust", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, packet)
    os.close(fd)
    wait_line("mark: ", since)


def settle(limit_sec):
    """Until no slew is on its way."""
    deadline = time.monotonic() + limit_sec
    while time.monotonic() < deadline and kernel.adjtimex(modes=0xA001)["offset"]:
        time.sleep(1)
    time.sleep(2)


ask()
began = time.monotonic()
say("at first: off by %+.6f s" % ask()[0])
process = start()
with open("/proc/%d/status" % process.pid) as status:
    lines = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
check("it runs as clocksd with CAP_SYS_TIME alone", lines["CapEff"] == "0000000002000000" and "0" not in lines["Uid"].split())
looks = []
server = Server()
for wait_sec in (5, 10, 15, 20, 30, 30, 40, 40, 60, 60):
    mark()
    time.sleep(wait_sec)
    looks.append((time.monotonic() - began, ask()[0], clock_ppm(5)))
    say("off by %+.1f us, rate %+.3f ppm" % (looks[-1][1] * 1e6, looks[-1][2]))
server_ppm = server.ppm()
good = [sec for sec, offset, ppm in looks if abs(offset) < 1e-3 and abs(ppm - server_ppm) < 0.5]
check("(1) from 2 s and 300 ppm off to 1 ms and 0.5 ppm", good and good[-1] == looks[-1][0],
      "after %.0f s; the server's rate is %+.3f ppm" % (min(good, default=0), server_ppm))

now = kernel.adjtimex()
offset = ask()[0]
check("(4) the kernel is synchronised, maxerror bounds the error", not now["status"] & 0x40 and now["state"] != 5
      and abs(offset) * 1e6 <= now["maxerror"] < 10**6,
      "off by %+.1f us, maxerror %d us, esterror %d us" % (offset * 1e6, now["maxerror"], now["esterror"]))

settle(60)
process.send_signal(signal.SIGKILL)
process.wait()
ppm, server_ppm = clock_ppm(60), server.ppm()
check("(2) killed between marks the clock keeps its rate", abs(ppm - server_ppm) < 0.5,
      "%+.3f ppm against the server's %+.3f" % (ppm, server_ppm))

offset, (tick, clock) = ask()[0], pair()
process = start()
time.sleep(5)
(tick2, clock2), now = pair(), ask()[0]
jump_us = (clock2 - clock - (tick2 - tick) * (1 + server_ppm / 1e6)) / 1000
with open("/tmp/clockspeed.log") as file:
    text = file.read()
check("(3) a restart loses nothing and jumps nowhere", "phase and rate of etc/state" in text and abs(jump_us) < 500,
      "moved by %+.1f us, off by %+.1f us before and %+.1f us after" % (jump_us, offset * 1e6, now * 1e6))
mark()
time.sleep(3)
kernel.adjtimex(modes=0x100 | 0x2000, sec=0, frac=8 * 10**6)  # 8 ms ahead: less than what counts as a step
kernel.adjtimex(modes=0x1000)
mark()
time.sleep(4)
left_us = kernel.adjtimex(modes=0xA001)["offset"]
process.send_signal(signal.SIGKILL)
process.wait()
check("a slew is on its way", abs(left_us) > 500, "%d us to go" % left_us)
settle(60)
offset = ask()[0]
ppm, server_ppm = clock_ppm(60), server.ppm()
check("(2) killed during a slew the clock comes right and keeps its rate",
      abs(ppm - server_ppm) < 0.5 and abs(offset) < 1e-3,
      "off by %+.1f us, %+.3f ppm against the server's %+.3f" % (offset * 1e6, ppm, server_ppm))

# 5 minutes without a mark, and what they cost
process = start()


def usage():
    """CPU ticks that clockspeed has used."""
    with open("/proc/%d/stat" % process.pid) as file:
        return sum(map(int, file.read().rpartition(")")[2].split()[11:13]))


used, offset = usage(), ask()[0]
time.sleep(300)
now, used = ask()[0], usage() - used
with open("/proc/%d/status" % process.pid) as file:
    memory = [line.split()[1] for line in file if line.startswith("VmHWM")]
check("5 minutes without a mark", abs(now - offset) < 1e-3, "moved by %+.1f us; CPU %.2f s, memory %s kB"
      % ((now - offset) * 1e6, used / os.sysconf("SC_CLK_TCK"), memory[0]))
process.terminate()
check("TERM ends it cleanly", process.wait(10) == 0)
finish()
