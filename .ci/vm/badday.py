#!/usr/bin/env python3
"""badday.py - bad days on a real kernel: a clock set by hand, a read-only etc, a FIFO that is deleted

A guest runs the services as svc/install sets them up, with a server of its own that is 100 s ahead of its
clock and 50 ppm faster.  Its hardware clock is read all the time from outside of the services.
"""
import os
import random
import subprocess
import sys
import time

sys.path.insert(0, "/rig/main/.ci/vm")
from rig import (HOME, PROJECT, SERVER, Watch, ask, check, finish, raw_ns, say, serve_counter, until,
                 wait_for_server)

LOG = "/var/multilog/clockspeed/current"
HOUR_SEC = 3600
COPIED_SEC = 2.5  # the kernel writes the hardware clock in the middle of the next second or the one after
LONG_SEC = 300  # for what takes seconds on an idle host
RTC_SEC = 2  # the hardware clock has seconds, and is read a little later


def look_at_clocks():
    """-> (counter in ns, system clock's error in s, hardware clock's error in s), or None."""
    look = ask(1)
    with open("/sys/class/rtc/rtc0/since_epoch") as file:
        rtc_sec = int(file.read())
    if not look:
        return None
    return raw_ns(), look.offset_ns / 1e9, rtc_sec + 0.5 - (look.clock_ns + look.offset_ns) / 1e9


def clock_off_sec():
    return watch.samples[-1][1]


def hardware_clock_is_right(what, since_ns):
    """All the while since then."""
    worst = max((rtc for tick_ns, _, rtc in watch.samples if tick_ns >= since_ns), key=abs)
    check(what, abs(worst) < RTC_SEC, "worst %+.1f s" % worst)


def sh(command):
    return subprocess.run(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True).stdout


def lines(word=""):
    with open(LOG) as file:
        return [line.split(" ", 1)[1] for line in file if word in line]


def mark():
    before = len(lines("mark: "))
    said = sh("setuidgid clocksd clockctl mark")
    return until(lambda: len(lines("mark: ")) > before, LONG_SEC, 0.001) or say("no mark: " + said)


def set_clock(sec):
    """As `date -s` does."""
    time.clock_settime(time.CLOCK_REALTIME, time.time() + sec)


def running():
    """The process that clockspeed is, or None while supervise waits."""
    words = sh("svstat /service/clockspeed").split()
    return words[3].rstrip(")") if words[1:2] == ["up"] else None


def fifo_is_there():
    return sh("stat -c '%F %U' " + HOME + "/adjust") == "fifo clocksd\n"


serve_counter(50, 100 * 10**9)
wait_for_server()
os.makedirs("/service")
subprocess.Popen(["svscan", "/service"])
time.sleep(1)
say(sh("cd %s && svc/install --no-set --server ntp:%s --start" % (PROJECT, SERVER)))
watch = Watch(look_at_clocks, 0.2)
until(lambda: os.path.exists(LOG) and lines("mark: "), LONG_SEC)
for _ in range(5):
    time.sleep(6)
    mark()
check("the first mark steps the clock", abs(clock_off_sec()) < 0.01, "off by %+.6f s" % clock_off_sec())
check("the kernel sets the hardware clock right",
      until(lambda: abs(watch.samples[-1][2]) < RTC_SEC, LONG_SEC), "off by %+.1f s" % watch.samples[-1][2])

set_at_ns, steps = raw_ns(), len(lines("step: "))
set_clock(HOUR_SEC)
back = until(lambda: raw_ns() - set_at_ns > 10**9 and abs(clock_off_sec()) < 0.5, LONG_SEC)
check("a clock set by hand is set back", back, "after %.0f s" % ((raw_ns() - set_at_ns) / 1e9))
time.sleep(15)
check("once, and says so", len(lines("step: ")) == steps + 1 and lines("moved: "))
mark()
time.sleep(30)
mark()
hardware_clock_is_right("and the hardware clock stays right all the while", set_at_ns)

set_at_ns, rng = raw_ns(), random.Random()
for _ in range(10):
    mark()  # clockspeed is about to tell the kernel that its clock is right
    time.sleep(rng.uniform(0, 0.01))
    set_clock(HOUR_SEC)
    time.sleep(COPIED_SEC)
    if clock_off_sec() < -HOUR_SEC / 2:
        set_clock(-HOUR_SEC)
hardware_clock_is_right("and whenever the clock is set right after a mark", set_at_ns)
mark()
check("the clock is right again", abs(clock_off_sec()) < 0.01, "off by %+.6f s" % clock_off_sec())

sh("mount --bind {0} {0} && mount -o remount,bind,ro {0}".format(HOME + "/etc"))
starts = len(lines("start: "))
sh("svc -t /service/clockspeed")
until(lambda: len(lines("start: ")) > starts, LONG_SEC)
pid = until(running, LONG_SEC)
time.sleep(8)
check("with etc read-only it starts, stays and steers",
      pid and running() == pid and lines("start: steering") and len(lines("start: ")) == starts + 1)
check("and says what it can't keep", lines("Read-only file system"))
mark()
check("and takes marks", lines("mark: ")[-1].rstrip().endswith("used"), lines("mark: ")[-1].strip())
sh("umount " + HOME + "/etc")

os.unlink(HOME + "/adjust")
check("a FIFO that was deleted is made anew", until(fifo_is_there, LONG_SEC))
check("and takes marks", until(mark, LONG_SEC))
os.unlink(HOME + "/adjust")
open(HOME + "/adjust", "w").close()
check("of a file in its place a line says what to remove", until(lambda: lines("adjust: "), LONG_SEC),
      (lines("adjust") or [""])[-1])
os.unlink(HOME + "/adjust")
check("and when that was done it goes on", until(fifo_is_there, LONG_SEC) and until(mark, LONG_SEC))
say(sh("tail -n 60 %s | cut -d' ' -f2- | cut -c1-200" % LOG))
finish()
