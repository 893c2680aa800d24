"""leap.py - leap seconds of both signs on both clock scales, on a real kernel: vm --share PROJECT .ci/leap.sh

The services run as installed, under svscan.  Their time server, on 127.0.0.2, is a thread of this
program: its time is the counter's, a little faster, and counts every second.  In each of four lives the
table has another day that ends with a leap second, and the clock is set to shortly before its end.  In two
more no table has it: the server, which speaks NTP then, announces it.
"""
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time

from rig import check, finish, kernel, raw_ns, say

HOME, LOGS, SERVICES = "/usr/local/clockspeed", "/var/multilog", "/service"
TABLE, CONF = "/tmp/leap-seconds.list", "/usr/local/etc/clockspeed.conf"
FIRST_LEAP_SEC = 1814400000  # 2027-07-01 00:00:00 UTC
ANNOUNCED_SEC = {1: 1830297600, -1: 1846022400}  # 2028-01-01 and 2028-07-01, since only such days can be
BEFORE_SEC, WATCHED_SEC, AFTER_SEC = 60, 20, 18
TRUE_PPM = 20
CLOSE_NS = 2 * 10**6  # what a clock may be off that was marked for 40 s; a leap that goes wrong is a second
STA_LEAPS = 0x30


class Truth:
    """TAI, and a taiclockd and an NTP server of its own that serve it."""

    def __init__(self):
        for port, serve in ((4014, self.serve), (123, self.serve_ntp)):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("127.0.0.2", port))
            threading.Thread(target=serve, args=(sock,), daemon=True).start()

    def begin(self, tai_ns, leap_sec, sign, offset_sec):
        self.began = raw_ns(), tai_ns
        self.leap_tai_ns = (leap_sec + offset_sec + min(sign, 0)) * 10**9
        self.sign, self.offset_sec = sign, offset_sec

    def at(self, tick_ns):
        """TAI in ns when the counter showed that."""
        elapsed_ns = tick_ns - self.began[0]
        return self.began[1] + elapsed_ns + elapsed_ns * TRUE_PPM // 10**6

    def now(self):
        return self.at(raw_ns())

    def serve(self, sock):
        while True:
            query, client = sock.recvfrom(256)
            label = kernel.pack((self.now() + 2**62 * 10**9) * 10**9)
            sock.sendto(b"stai" + label + query[20:], client)

    def serve_ntp(self, sock):
        while True:
            query, client = sock.recvfrom(256)
            tai_ns = self.now()
            leapt = tai_ns >= self.leap_tai_ns
            utc_ns = tai_ns - (self.offset_sec + self.sign * leapt) * 10**9 + 2208988800 * 10**9
            stamp = struct.pack(">Q", (utc_ns << 32) // 10**9)
            indicator = 0 if leapt else 1 if self.sign == 1 else 2
            head = struct.pack(">BBbbII4s", indicator << 6 | 0x24, 1, 6, -20, 0, 0, b"TEST")
            sock.sendto(head + stamp + query[40:48] + stamp + stamp, client)


def log(service):
    try:
        with open("%s/%s/current" % (LOGS, service)) as file:
            return [line.split(" ", 1)[1].rstrip("\n") for line in file if " " in line]
    except FileNotFoundError:
        return []


def set_up(leap_sec, sign, scale, announced):
    """The table, the clock and the services of one life -> svscan's process."""
    for place in (SERVICES, LOGS, HOME + "/etc", HOME + "/adjust"):
        subprocess.run(["rm", "-rf", place], check=True)
    for service in ("clockspeed", "clockspeed_adjust", "taiclockd"):
        shutil.copytree("/rig/main/svc/" + service, "%s/%s" % (SERVICES, service))
        os.makedirs("%s/%s" % (LOGS, service))
        shutil.chown("%s/%s" % (LOGS, service), "multilog")
    # the other address is the truth's
    subprocess.run(["sed", "-i", "s/^exec.*taiclockd$/& -i 127.0.0.1/", SERVICES + "/taiclockd/run"],
                   check=True)
    table, _, _ = kernel.read_leap_table()
    with open(TABLE, "w") as file:
        file.write("2272060800 10\n" if announced else "#@ 4102444800\n2272060800 10\n")
        for start, offset in table[1:] + [(leap_sec, table[-1][1] + sign)] * (not announced):
            file.write("%d %d\n" % (start + 2208988800, offset))
    with open(CONF, "w") as file:
        file.write('CLOCK_TYPE="%s"\nCLOCK_IP="127.0.0.2"\n' % ("ntp" if announced else "tai"))
    clock_sec = leap_sec - BEFORE_SEC
    if scale == "tai":
        clock_sec += table[-1][1] - 10
    truth.begin((leap_sec - BEFORE_SEC + table[-1][1]) * 10**9, leap_sec, sign, table[-1][1])
    kernel.step_kernel(kernel.adjtimex, clock_sec * 10**9 - time.time_ns())
    environment = dict(os.environ, LEAPSECS=TABLE, CLOCK_SCALE=scale, WAIT="4", WAIT_MAX="4")
    return subprocess.Popen(["svscan", SERVICES], env=environment)


def tear_down(svscan):
    svscan.kill()
    svscan.wait()
    for service in os.listdir(SERVICES):
        for place in ("%s/%s" % (SERVICES, service), "%s/%s/log" % (SERVICES, service)):
            subprocess.run(["svc", "-dx", place])
    while subprocess.run(["pgrep", "-x", "supervise"], stdout=subprocess.DEVNULL).returncode == 0:
        time.sleep(0.1)


def ask_taiclockd(sock):
    """-> label in TAI ns, the counter before and after."""
    before = raw_ns()
    sock.send(b"ctai" + bytes(28))
    reply = sock.recv(256)
    after = raw_ns()
    sec, nano, _ = struct.unpack(">QII", reply[4:20])
    return (sec - 2**62) * 10**9 + nano, before, after


def watch(leap_tai_ns, apart_sec, sock):
    """Sample 50 times a second, through the leap second -> [(label, how far it is off TAI at least,
    CLOCK_TAI, how far that is off, how far CLOCK_REALTIME is off TAI but for apart_sec, all in ns;
    what adjtimex told)]."""
    samples, packet, fifo = [], bytes(16), None
    while truth.now() < leap_tai_ns - WATCHED_SEC * 10**9:
        time.sleep(0.1)
    due = raw_ns()
    while truth.now() < leap_tai_ns + AFTER_SEC * 10**9:
        label, before, after = ask_taiclockd(sock)
        kernel_before = raw_ns()
        tai, clock = time.clock_gettime_ns(time.CLOCK_TAI), time.time_ns()
        kernel_after = raw_ns()

        def off(clock_ns, tick, tick2):
            """0 when the clock can have been right at a moment between two of the counter."""
            least, most = clock_ns - truth.at(tick2), clock_ns - truth.at(tick)
            return max(least, 0) or min(most, 0)
        samples.append((label, off(label, before, after), tai, off(tai, kernel_before, kernel_after),
                        off(clock + apart_sec * 10**9, kernel_before, kernel_after), kernel.adjtimex()))
        if fifo is None and truth.now() > leap_tai_ns + 3 * 10**8:  # a mark made before the leap, and late
            fifo = os.open(HOME + "/adjust", os.O_WRONLY | os.O_NONBLOCK)
            os.write(fifo, packet)
            os.close(fifo)
        due += 2 * 10**7
        time.sleep(max(due - raw_ns(), 0) / 1e9)
    return samples


def rates(lines):
    """-> [(rate, its error) in ppm] of the marks."""
    return [tuple(map(float, re.search(r" rate (\S+) ppm, rate error (\S+) ppm", line).groups()))
            for line in lines if line.startswith("mark: ")]


def live(leap_sec, sign, scale, announced=False):
    name = "%+d on %s%s: " % (sign, scale, ", announced" * announced)
    offset_sec = kernel.read_leap_table()[0][-1][1]
    # of the first moment that counts differently: 23:59:60, or 00:00:00 instead of 23:59:59
    leap_tai_ns = (leap_sec + offset_sec + min(sign, 0)) * 10**9
    apart_sec = offset_sec if scale == "utc" else 10
    svscan = set_up(leap_sec, sign, scale, announced)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("127.0.0.1", 4014))
        sock.settimeout(5)
        while truth.now() < leap_tai_ns - WATCHED_SEC * 10**9:
            time.sleep(0.1)
        lines_before = log("clockspeed")
        samples = watch(leap_tai_ns, apart_sec, sock)
    lines = log("clockspeed")
    tear_down(svscan)
    for line in lines:
        say("  " + line)

    labels, label_offs, tais, tai_offs, clock_offs, kernels = zip(*samples)
    states = [now["state"] for now in kernels]
    armed = {now["status"] & STA_LEAPS for now in kernels}

    def worst(offs):
        return "worst %+.1f us of %d" % (max(offs, key=abs) / 1e3, len(offs))
    check(name + "taiclockd's labels go on", max(map(abs, label_offs)) < CLOSE_NS
          and all(a < b for a, b in zip(labels, labels[1:])), worst(label_offs))
    if scale == "utc":
        check(name + "CLOCK_TAI goes on", max(map(abs, tai_offs)) < CLOSE_NS
              and all(a < b for a, b in zip(tais, tais[1:])), worst(tai_offs))
        bit = 0x10 if sign == 1 else 0x20
        seen = [a for a, b in zip(states, states[1:] + [None]) if a != b]
        wanted = [1, 3, 4, 0] if sign == 1 else [2, 4, 0]
        ends = [kernels[at]["status"] & STA_LEAPS for at in (0, -1)]
        check(name + "the kernel leaps, and is disarmed then",
              seen == wanted and armed == {0, bit} and ends == [bit, 0], str(seen))
        check(name + "the clock is UTC before and after",
              abs(clock_offs[0]) < CLOSE_NS and abs(clock_offs[-1] + sign * 10**9) < CLOSE_NS)
        check(name + "the kernel's TAI offset is right",
              (kernels[0]["tai"], kernels[-1]["tai"]) == (offset_sec, offset_sec + sign))
        check(name + "a mark in flight across it is refused",
              "refused: a mark within 2 s of a leap second" in lines)
    else:
        check(name + "nothing happens", set(states) == armed == {0}
              and {now["tai"] for now in kernels} == {10}
              and max(map(abs, clock_offs)) < CLOSE_NS, worst(clock_offs))
    said = [line for line in lines
            if line.startswith(("step", "moved", "slew", "suspend", "counter")) or "warning" in line]
    check(name + "clockspeed steps and slews nothing, and doubts no mark",
          not said and not any(line.endswith("doubted") for line in lines), str(said))
    before, after = rates(lines_before), rates(lines)
    (ppm, error_ppm), (ppm_after, _) = before[-1], after[-1]
    check(name + "marks go on, and the rate is the same", len(after) > len(before) + 2 > 4
          and abs(ppm_after - ppm) < 3 * error_ppm, "%+.3f ppm (error %.3f) before, %+.3f after" % (
              ppm, error_ppm, ppm_after))


subprocess.run("groupadd nofiles; useradd -r -g nofiles clocksd; useradd -r -g nofiles multilog",
               shell=True, check=True)
os.makedirs(HOME + "/bin")
os.makedirs("/usr/local/etc", exist_ok=True)
for script in ("clockspeed", "sntpclock", "taiclock", "taiclockd"):
    shutil.copy("/rig/main/%s.py" % script, "%s/bin/%s" % (HOME, script))
shutil.copy("/rig/main/clockctl", "/usr/local/bin/clockctl")
truth = Truth()
for number, (sign, scale) in enumerate(((1, "utc"), (-1, "utc"), (1, "tai"), (-1, "tai"))):
    live(FIRST_LEAP_SEC + number * 86400, sign, scale)
for sign in (1, -1):
    live(ANNOUNCED_SEC[sign], sign, "utc", announced=True)
finish()
