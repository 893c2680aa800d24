"""rig.py - what the scenarios in virtual machines share: an independent look at the clock, and checks

Guest A, 10.9.0.1, is the time server; the others look at their clocks by plain SNTP queries of A that share
no code with clockspeed's.
"""
import collections
import importlib.machinery
import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time

SERVER, PROJECT, HOME = "10.9.0.1", "/rig/main", "/usr/local/clockspeed"
STA_UNSYNC = 0x40
loader = importlib.machinery.SourceFileLoader("clockadd", PROJECT + "/clockadd.py")
kernel = importlib.util.module_from_spec(importlib.util.spec_from_loader("clockadd", loader))
loader.exec_module(kernel)
failures = []


def say(text):
    print("%7.1f %s" % (time.clock_gettime(time.CLOCK_MONOTONIC_RAW), text), flush=True)


def check(what, so, detail=""):
    say("%s %s%s" % ("PASS" if so else "FAIL", what, detail and ": " + detail))
    if not so:
        failures.append(what)
    return so


def finish():
    say("%d failures" % len(failures))
    sys.exit(bool(failures))


def fresh(ppm, ahead_ns):
    """This guest's clock becomes one that nobody keeps, so much faster and ahead."""
    kernel.adjtimex(modes=0x2, freq=ppm << 16)
    kernel.step_kernel(kernel.adjtimex, ahead_ns)


def chronyd(*lines, steer):
    """Start a chronyd with that configuration, which steers this guest's clock or not."""
    with open("/tmp/chrony.conf", "w") as file:
        file.write("\n".join(lines + ("cmdport 0", "bindcmdaddress /", "pidfile /run/chrony.pid", "")))
    return subprocess.Popen(["chronyd", "-d", "-f", "/tmp/chrony.conf"] + ["-x"] * (not steer),
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def serve(ppm, ahead_ns):
    """Guest A, to the end."""
    fresh(ppm, ahead_ns)
    sys.exit(chronyd("local stratum 1", "allow 10.9.0.0/24", steer=False).wait())


def serve_counter(ppm, ahead_ns):
    """A server for this guest alone, in a process of its own: its time is the counter's, whatever is done to
    the system clock."""
    subprocess.run(["ip", "address", "add", SERVER, "dev", "lo"], check=True)
    if os.fork():
        return
    tick, clock = pair()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((SERVER, 123))
        while True:
            query, peer = sock.recvfrom(512)
            real_ns = clock + ahead_ns + round((raw_ns() - tick) * (1 + ppm / 1e6))
            stamp = struct.pack("!Q", (real_ns << 32) // 10**9 + (2208988800 << 32))
            # stratum 1, precision 2^-20 s, no root delay or dispersion
            sock.sendto(b"\x24\x01\0\xec" + bytes(8) + b"RAW\0" + stamp + query[40:48] + stamp + stamp, peer)


def raw_ns():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)


def pair():
    """(counter, system clock) in ns at one moment: the tightest of 15 bracketed readings."""
    def once():
        before, clock, after = raw_ns(), time.time_ns(), raw_ns()
        return after - before, (before + after) // 2, clock
    return min(once() for _ in range(15))[1:]


# What a look at the server found: real time - clock lies within offset_ns +- unsure_ns.
Look = collections.namedtuple("Look", "tick_ns clock_ns offset_ns unsure_ns")


def ask(exchanges=20):
    """-> Look, by the quickest of the exchanges that were answered; None if none was."""
    looks = []
    for _ in range(exchanges):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(1)
            tick, t1 = raw_ns(), time.time_ns()
            try:
                sock.sendto(b"\x23" + bytes(47), (SERVER, 123))
                data, t4 = sock.recv(512), time.time_ns()
            except OSError:
                time.sleep(0.1)
                continue
        t2, t3 = (((stamp - (2208988800 << 32)) * 10**9) >> 32
                  for stamp in struct.unpack("!QQ", data[32:48]))
        looks.append((abs((t4 - t1) - (t3 - t2)), tick, t1, ((t2 - t1) + (t3 - t4)) // 2))
    return Look(*min(looks)[1:], min(looks)[0] // 2) if looks else None


class Watch(threading.Thread):
    """Notes what sample() returns, again and again."""

    def __init__(self, sample, pause_sec):
        super().__init__(daemon=True)
        self.sample, self.pause_sec, self.samples = sample, pause_sec, []
        self.start()

    def run(self):
        while True:
            found = self.sample()
            if found:
                self.samples.append(found)
            time.sleep(self.pause_sec)


def wait_for_server():
    while not ask(3):
        time.sleep(0.2)


def clock_ppm(seconds):
    """The system clock's rate against the counter over so many seconds."""
    tick, clock = pair()
    time.sleep(seconds)
    tick2, clock2 = pair()
    return ((clock2 - clock) / (tick2 - tick) - 1) * 1e6


def rate_ppm(first, last):
    """The server's rate against the counter between two looks -> (ppm, how unsure that is)."""
    ticks = last.tick_ns - first.tick_ns
    real = last.clock_ns + last.offset_ns - first.clock_ns - first.offset_ns
    return (real / ticks - 1) * 1e6, (first.unsure_ns + last.unsure_ns) / ticks * 1e6


def until(condition, seconds, pause_sec=0.1):
    """Wait until condition() is true -> its value, or None when the time is over."""
    deadline_ns = raw_ns() + seconds * 10**9
    while raw_ns() < deadline_ns:
        value = condition()
        if value:
            return value
        time.sleep(pause_sec)
    return None


def tell(guest_ip, value):
    """Send a value to another guest, which hears it if it is in hear() then."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(json.dumps(value).encode(), (guest_ip, 7000))


def hear(seconds):
    """-> what another guest tells, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("0.0.0.0", 7000))
        sock.settimeout(seconds)
        try:
            return json.loads(sock.recv(65536).decode())
        except OSError:
            return None
