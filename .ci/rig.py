"""rig.py - what the virtual machine scenarios share: an independent look at the clock, and checks"""
import glob
import importlib.machinery
import os
import socket
import struct
import subprocess
import sys
import time

kernel = importlib.machinery.SourceFileLoader("clockadd", "/rig/main/clockadd.py").load_module()
SERVER = "10.9.0.1"
failures = []


def say(text):
    print("%7.1f %s" % (time.clock_gettime(time.CLOCK_MONOTONIC_RAW), text), flush=True)


def check(what, so, detail=""):
    say("%s %s%s" % ("PASS" if so else "FAIL", what, detail and ": " + detail))
    if not so:
        failures.append(what)


def finish():
    say("%d failures" % len(failures))
    sys.exit(bool(failures))


def serve(ppm, ahead_ns):
    """Guest A: an NTP server whose clock is so much faster and ahead."""
    kernel.adjtimex(modes=0x2, freq=ppm << 16)
    kernel.step_kernel(kernel.adjtimex, ahead_ns)
    with open("/tmp/chrony.conf", "w") as file:
        file.write("local stratum 1\nallow 10.9.0.0/24\ncmdport 0\nbindcmdaddress /\npidfile /run/chrony.pid\n")
    subprocess.run(["chronyd", "-x", "-d", "-f", "/tmp/chrony.conf"])


def raw_ns():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


def pair():
    """(counter, system clock) in ns: the tightest of 15 bracketed readings."""
    def once():
        before, clock, after = raw_ns(), time.time_ns(), raw_ns()
        return after - before, (before + after) // 2, clock
    return min(once() for _ in range(15))[1:]


def ask(exchanges=40):
    """(offset of the server in s, delay in s) by plain SNTP: the quickest of the exchanges."""
    def once():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            t1 = time.time()
            sock.sendto(b"\x23" + bytes(47), (SERVER, 123))
            data, t4 = sock.recv(512), time.time()
        t2, t3 = (a - 2208988800 + b / 2**32 for a, b in struct.iter_unpack("!II", data[32:48]))
        return (t4 - t1) - (t3 - t2), ((t2 - t1) + (t3 - t4)) / 2
    answers = []
    while not answers:
        for _ in range(exchanges):
            try:
                answers.append(once())
            except OSError:
                time.sleep(0.2)
    delay, offset = min(answers)
    return offset, delay


def clock_ppm(seconds):
    """The system clock's rate against the counter over so many seconds."""
    tick, clock = pair()
    time.sleep(seconds)
    tick2, clock2 = pair()
    return ((clock2 - clock) / (tick2 - tick) - 1) * 1e6


class Server:
    """The server's rate against the counter since this was made: the longer ago, the better known."""

    def __init__(self):
        self.tick, self.real = self.look()

    def look(self):
        offset = ask(100)[0]
        tick, clock = pair()
        return tick, clock + round(offset * 1e9)

    def ppm(self):
        tick, real = self.look()
        return ((real - self.real) / (tick - self.tick) - 1) * 1e6


def host():
    """(counter, the host's clock) in ns at one moment: the quickest of 10 exchanges on the rig's port."""
    def once():
        before, line = raw_ns(), b""
        os.write(port, b"?")
        while not line.endswith(b"\n"):
            line += os.read(port, 100)
        after = raw_ns()
        return after - before, (before + after) // 2, int(line.split()[1])
    port = os.open(glob.glob("/dev/vport*p2")[0], os.O_RDWR)
    try:
        return min(once() for _ in range(10))[1:]
    finally:
        os.close(port)
