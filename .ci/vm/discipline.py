#!/usr/bin/env python3
"""discipline.py - clockspeed on a real kernel, beside chronyd under the same load

Guest A serves NTP, 2 s ahead and 300 ppm faster than the counters of B and C.  B runs clockspeed, C runs
chronyd; both ask A about as often, and both are looked at in the same way at the same times.
"""
import os
import re
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, "/rig/main/.ci/vm")
from rig import (HOME, PROJECT, SERVER, STA_UNSYNC, Watch, ask, check, chronyd, clock_ppm, finish, hear,
                 kernel, pair, rate_ppm, raw_ns, say, serve, tell, until, wait_for_server)

BETWEEN_MARKS_SEC = (3, 5, 8, 10, 15, 20, 20, 20, 20, 20, 20)
WATCHED_SEC = 60  # at the end of these, both clocks are judged
LOOK_NS = 10**5  # what a look at a clock that is right may show on a busy host
LOG = "/tmp/clockspeed.log"


def look_at_clock():
    """-> (Look, maxerror in ns or None while the kernel is not synchronised), or None."""
    before, look, now = kernel.adjtimex(), ask(4), kernel.adjtimex()
    bound_us = max(before["maxerror"], now["maxerror"])
    return look and (look, None if now["status"] & STA_UNSYNC else bound_us * 1000)


def rms_ns():
    """Of the better half of the looks in the last minute."""
    looks = sorted((look.unsure_ns, look.offset_ns) for look, _ in watch.samples
                   if look.tick_ns > raw_ns() - WATCHED_SEC * 10**9)
    return statistics.mean(offset**2 for _, offset in looks[:len(looks) // 2 + 1]) ** 0.5


def read_log():
    with open(LOG) as file:
        return file.read()


def start():
    before = len(read_log())
    process = subprocess.Popen([PROJECT + "/clockspeed.py", "-u", "clockspeed", "-w", "clocksd"],
                               stdout=log, stderr=log)
    line = until(lambda: re.search("start: .*\n", read_log()[before:]), 30)
    say("  " + (line.group().strip() if line else "no start"))
    return process


def mark():
    before = len(read_log())
    packet = subprocess.run([PROJECT + "/sntpclock.py", SERVER], stdout=subprocess.PIPE).stdout
    fd = os.open(HOME + "/adjust", os.O_WRONLY | os.O_NONBLOCK)
    os.write(fd, packet)
    os.close(fd)
    line = until(lambda: re.search("mark: .*\n", read_log()[before:]), 30)
    say("  " + (line.group().strip() if line else "no mark"))


def last_mark(name):
    """That figure of the last mark that was used."""
    used = [line for line in read_log().splitlines() if line.startswith("mark: ") and line.endswith("used")]
    return float(re.search(r" %s ([-+.\d]+)" % name, used[-1]).group(1))


guest = os.environ["RIG_GUEST"]
if guest == "A":
    serve(300, 2 * 10**9)
wait_for_server()
watch = Watch(look_at_clock, 1)
if guest == "C":
    chronyd("server %s iburst minpoll 3 maxpoll 4" % SERVER, "makestep 0.5 3", "driftfile /tmp/drift",
            steer=True)
    while True:
        time.sleep(1)
        if watch.samples:
            tell("10.9.0.2", rms_ns())

subprocess.run("groupadd nofiles && useradd -r -g nofiles clocksd && useradd -r -g nofiles clockspeed &&"
               " mkdir -p %s/etc && chmod 755 /rig /rig/main" % HOME, shell=True, check=True)
log = open(LOG, "ab", buffering=0)
say("at first: off by %+.6f s" % (ask().offset_ns / 1e9))
process = start()
with open("/proc/%d/status" % process.pid) as status:
    lines = dict(line.rstrip("\n").split(":\t", 1) for line in status if ":\t" in line)
check("it runs as a user with CAP_SYS_TIME alone, under its name", lines["Name"].startswith("clockspeed")
      and lines["CapEff"] == "0000000002000000" and "0" not in lines["Uid"].split(), lines["Name"])
first = ask(40)
for wait_sec in BETWEEN_MARKS_SEC:
    mark()
    time.sleep(wait_sec)
last = ask(40)
server_ppm, unsure_ppm = rate_ppm(first, last)
theirs_ns, ours_ns = hear(60), rms_ns()
check("from 2 s and 300 ppm off it is as right as chronyd beside it",
      theirs_ns is not None and ours_ns < 2 * theirs_ns + LOOK_NS,
      "%.1f us rms in the last minute, chronyd %.1f us" % (ours_ns / 1e3, (theirs_ns or 0) / 1e3))
rate, rate_error = last_mark("rate"), last_mark("rate error")
check("it knows the rate as well as it says", abs(rate - server_ppm) < 4 * rate_error + unsure_ppm,
      "%+.3f ppm, error %.3f; the server's %+.3f +- %.3f" % (rate, rate_error, server_ppm, unsure_ppm))


def judge_bound():
    bounded = [(look, bound_ns) for look, bound_ns in watch.samples if bound_ns is not None]
    over = [(look, bound_ns) for look, bound_ns in bounded
            if abs(look.offset_ns) - look.unsure_ns > bound_ns]
    least = min((bound_ns for _, bound_ns in bounded), default=0)
    check("maxerror is above the true error in every sample", len(bounded) > 60 and not over,
          "%d of %d under it%s; the least maxerror was %.1f us" % (
              len(over), len(bounded), ", the worst %s" % (over[0],) if over else "", least / 1e3))


# the rate of the clock is measured to what two readings of it tell, the server's to unsure_ppm
limit_ppm = 4 * rate_error + unsure_ppm + 0.1
until(lambda: not kernel.adjtimex(modes=0xA001)["offset"], 60)
process.send_signal(signal.SIGKILL)
process.wait()
ppm = clock_ppm(20)
check("killed between marks the clock keeps its rate", abs(ppm - server_ppm) < limit_ppm,
      "%+.3f ppm against the server's %+.3f +- %.3f" % (ppm, server_ppm, limit_ppm))

before, (tick, clock) = ask(), pair()
process = start()
time.sleep(5)
(tick2, clock2), after = pair(), ask()
jump_ns = clock2 - clock - (tick2 - tick) * (1 + server_ppm / 1e6)
check("a restart loses nothing and jumps nowhere",
      "phase and rate of etc/state" in read_log() and abs(jump_ns) < 200000 + 4 * abs(before.offset_ns),
      "moved by %+.1f us, off by %+.1f us before and %+.1f us after"
      % (jump_ns / 1e3, before.offset_ns / 1e3, after.offset_ns / 1e3))

kernel.adjtimex(modes=0x100 | 0x2000, sec=0, frac=8 * 10**6)  # 8 ms ahead: less than what counts as a step
kernel.adjtimex(modes=0x1000)
mark()
off = ask()
check("a small error is slewed, not stepped", -9e6 < off.offset_ns < -1e6,
      "off by %+.1f us" % (off.offset_ns / 1e3))
time.sleep(3)
process.send_signal(signal.SIGKILL)
process.wait()
time.sleep(25)
off, ppm = ask(), clock_ppm(15)
check("killed during a slew the clock comes right and keeps its rate",
      abs(ppm - server_ppm) < limit_ppm and abs(off.offset_ns) < 10**6,
      "off by %+.1f us, %+.3f ppm against the server's %+.3f" % (off.offset_ns / 1e3, ppm, server_ppm))

process = start()
time.sleep(5)
with open("/proc/%d/status" % process.pid) as file:
    memory = [line.split()[1] for line in file if line.startswith("VmHWM")]
process.terminate()
check("TERM ends it cleanly", process.wait(10) == 0, "it had %s kB of memory at most" % memory[0])
judge_bound()
finish()
