"""reboot.py - the rate outlives a reboot, in one virtual machine after the other:

    vm --hosttime --out DIR --share PROJECT .ci/reboot.sh learn      marks from the host's clock
    vm --hosttime --share PROJECT --share DIR/etc .ci/reboot.sh      no marks at all for 10 minutes
"""
import os
import shutil
import subprocess
import sys
import time

from rig import check, clock_ppm, finish, host, kernel, pair, say

HOME = "/usr/local/clockspeed"
LEARN_SEC = (5, 10, 20, 30, 40, 60, 60)  # between marks
HOLD_SEC = 600
pack = kernel.pack


def offset_ns():
    """The host's clock minus ours."""
    tick, real = host()
    tick2, clock = pair()
    return real + tick2 - tick - clock


def start():
    return subprocess.Popen(["/rig/main/clockspeed.py", HOME])


os.makedirs(HOME)
if sys.argv[1:] == ["learn"]:
    os.mkdir(HOME + "/etc")
    process = start()
    for wait_sec in LEARN_SEC:
        time.sleep(wait_sec)
        with open(HOME + "/adjust", "wb", buffering=0) as fifo:
            fifo.write(pack(offset_ns() * 10**9))
    time.sleep(2)
    process.terminate()
    check("it ends cleanly", process.wait(10) == 0)
    shutil.copytree(HOME + "/etc", "/out/etc")
    finish()

shutil.copytree("/rig/etc", HOME + "/etc")
process = start()
time.sleep(3)
began, tick = offset_ns(), pair()[0]
for _ in range(HOLD_SEC // 120):
    time.sleep(120)
    now = offset_ns()
    say("drifted by %+.1f us" % ((now - began) / 1000))
drift_ppm = (now - began) / (pair()[0] - tick) * 1e6
ppm = clock_ppm(10)
process.terminate()
# The rig's counter is calibrated anew at each boot, some ppm differently: a kept rate can't know that.
check("10 minutes after a reboot without a mark", abs(drift_ppm) < 20,
      "the clock drifted %+.1f us, %+.3f ppm; kept rate %+.3f ppm" % ((now - began) / 1000, drift_ppm, ppm))
finish()
