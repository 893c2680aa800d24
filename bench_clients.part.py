#!/usr/bin/env python3
"""The clients' part of bench_all.py."""
import contextlib
import heapq
import itertools
import os
import random
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))

# ==== clients =======================================================================================
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable  # not a slow shim
RUNS, SLOW_RUNS = 50, 6  # chronyd -Q takes seconds by design
RELAY_DELAY_SEC, RELAY_JITTER_SEC = 0.5e-3, 0.3e-3  # the least and the mean of the rest, each way


def relay(listen, upstream):
    """A UDP relay that keeps each packet a while; not every kernel has netem.  Runs until it is killed."""
    chance, poller = random.Random(1), select.poll()
    front = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    front.bind(listen)
    poller.register(front, select.POLLIN)
    backs, clients, waiting, count = {}, {}, [], itertools.count()
    while True:
        left_sec = waiting[0][0] - time.monotonic() if waiting else 1
        for descriptor, _ in poller.poll(max(int(left_sec * 1000), 0)):  # spins for the last millisecond
            if descriptor == front.fileno():
                packet, client = front.recvfrom(2048)
                if client not in backs:
                    backs[client] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    backs[client].connect(upstream)
                    clients[backs[client].fileno()] = client
                    poller.register(backs[client], select.POLLIN)
            else:
                client = clients[descriptor]
                packet = backs[client].recv(2048)
            due = time.monotonic() + RELAY_DELAY_SEC + chance.expovariate(1 / RELAY_JITTER_SEC)
            heapq.heappush(waiting, (due, next(count), packet, client, descriptor == front.fileno()))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, packet, client, forward = heapq.heappop(waiting)
            if forward:
                backs[client].send(packet)
            else:
                front.sendto(packet, client)


def packet_offset(done):
    """A client's stdout -> ns."""
    sec, nano = int.from_bytes(done.stdout[:8], "big", signed=True), int.from_bytes(done.stdout[8:12], "big")
    return sec * 10**9 + nano if done.stdout else None


def original_offset(done):
    """The same of a C original, which by design is off by the leap seconds where the clock shows UTC."""
    return packet_offset(done) and (packet_offset(done) + 5 * 10**8) % 10**9 - 5 * 10**8


def number_after(pattern):
    """-> what finds the seconds after that in a client's output and makes ns of them."""
    def offset(done):
        found = re.search(pattern + rb"([-+]?[\d.]+(?:e-?\d+)?)", done.stdout + done.stderr)
        return found and float(found.group(1)) * 1e9
    return offset


shown_bound = number_after(rb"result: .* bound ")


def patched(name, statement):
    """A command that runs a script of ours with a statement put in before it starts."""
    source = "import sys; sys.argv = sys.argv[1:]; text = open(sys.argv[0]).read(); " \
             "exec(compile(text.replace('if __name__ ==', %r, 1), sys.argv[0], 'exec'))"
    return [PYTHON, "-IS", "-c", source % (statement + "\nif __name__ =="), os.path.join(HERE, name + ".py")]


def clients(home):
    """[(name, command with ADDRESS, done -> offset in ns or None, runs)]; none of them touches the clock."""
    ours = [PYTHON, "-IS", os.path.join(HERE, "sntpclock.py"), "-v", "2", "ADDRESS"]
    user_stamps = patched("sntpclock", "enable_kernel_stamps = lambda sock: None") + ["-v", "2", "ADDRESS"]
    chronyd = ["chronyd", "-Q", "-x", "-t", "20", "cmdport 0", "user root", "server ADDRESS iburst",
               "pidfile " + os.path.join(home, "query.pid")]
    candidates = [("sntpclock.py", ours, packet_offset, RUNS),
                  ("  user-space stamps", user_stamps, packet_offset, RUNS),
                  ("ntpdig", ["ntpdig", "-j", "ADDRESS"], number_after(rb'"offset":'), RUNS),
                  ("ntpdig, 10 samples", ["ntpdig", "-j", "-p", "10", "-g", "10", "ADDRESS"],
                   number_after(rb'"offset":'), RUNS),
                  ("chronyd -Q", chronyd, number_after(rb"wrong by "), SLOW_RUNS),
                  ("busybox ntpd -qw", ["busybox", "ntpd", "-n", "-q", "-w", "-ddd", "-p", "ADDRESS"],
                   number_after(rb"offset:"), SLOW_RUNS),
                  ("C sntpclock", ["sntpclock", "ADDRESS"], original_offset, RUNS),
                  ("s6-sntpclock", ["s6-sntpclock", "ADDRESS"], original_offset, RUNS)]
    return [client for client in candidates if shutil.which(client[1][0])]


@contextlib.contextmanager
def started(*command, **options):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def network(home):
    """Two network namespaces joined by a veth: ours with a chronyd on 127.0.0.1, another with a chronyd
    behind the relay on 10.99.99.1; on port 123, as not all clients can choose.  -> a prefix for commands"""
    here, there = "clockbench%d-a" % os.getpid(), "clockbench%d-b" % os.getpid()

    elsewhere = ["nice", "-n", "-15"]  # another machine has cores of its own

    def ip(*words):
        subprocess.run(("ip",) + words, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def chronyd(name, port):
        conf = os.path.join(home, name + ".conf")
        with open(conf, "w") as file:
            file.write("local stratum 1\nallow\nuser root\ncmdport 0\nbindcmdaddress /\nport %d\npidfile %s\n"
                       % (port, os.path.join(home, name + ".pid")))
        return started("ip", "netns", "exec", name, *(elsewhere if name == there else []),
                       "chronyd", "-x", "-d", "-f", conf)
    with contextlib.ExitStack() as stack:
        for name in here, there:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", here, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", there)
        for name, address in (here, "10.99.99.2/24"), (there, "10.99.99.1/24"):
            ip("-n", name, "address", "add", address, "dev", "veth0")
            ip("-n", name, "link", "set", "veth0", "up")
        stack.enter_context(chronyd(here, 123))
        stack.enter_context(chronyd(there, 10123))
        stack.enter_context(started("ip", "netns", "exec", there, *elsewhere, sys.executable, __file__,
                                    "relay", "10.99.99.1", "123", "127.0.0.1", "10123"))
        time.sleep(2)  # for chronyd's start
        yield ["ip", "netns", "exec", here]


def measure(command, offset_of, runs):
    """-> (errors in ns, how many were over the bound shown, or None)"""
    errors, over = [], None
    for _ in range(runs):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        offset_ns = offset_of(done)
        if offset_ns is None:
            continue
        errors.append(abs(offset_ns))  # the clocks are one: what they differ by is the error
        bound_ns = shown_bound(done)
        if bound_ns is not None:
            over = (over or 0) + (errors[-1] > bound_ns + 1)
    return errors, over


def cost(prefix):
    """-> (ms from start to answer, MB at most) of sntpclock.py on loopback, medians"""
    report = "import atexit; atexit.register(lambda: os.write(" \
             "2, [line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].encode()))"
    elapsed_ms, memory_mb = [], []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run(prefix + [PYTHON, "-IS", os.path.join(HERE, "sntpclock.py"), "0"],
                       stdout=subprocess.PIPE)
        elapsed_ms.append((time.perf_counter() - start) * 1e3)
        done = subprocess.run(prefix + patched("sntpclock", report) + ["0"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
        memory_mb.append(int(done.stderr.split()[1]) / 1024)
    return statistics.median(elapsed_ms), statistics.median(memory_mb)


def bench_clients():
    """|error| of one measurement; the servers have this machine's own clock, so that the truth is known."""
    if os.getuid() or not shutil.which("ip") or not shutil.which("chronyd"):
        print("clients: needs root, iproute2 and chronyd, for two network namespaces and a server")
        return
    places = [("loopback", "127.0.0.1"),
              ("veth and a relay, %.1f ms + %.1f ms jitter each way"
               % (RELAY_DELAY_SEC * 1e3, RELAY_JITTER_SEC * 1e3), "10.99.99.1")]
    with tempfile.TemporaryDirectory() as home, network(home) as prefix:
        print("|error| of one measurement in us, and how many errors were over the bound that was shown")
        for place, address in places:
            for state, hogs in ("idle", 0), ("all cores busy", os.cpu_count()):
                print("\n%s, %s\n%-20s %9s %9s %6s %5s %7s"
                      % (place, state, "", "median", "95%", "over", "runs", "x ours"))
                with contextlib.ExitStack() as stack:
                    for _ in range(hogs):
                        stack.enter_context(started(sys.executable, "-c", "while True: pass"))
                    ours = None
                    for name, command, offset_of, runs in clients(home):
                        command = [word.replace("ADDRESS", address) for word in command]
                        errors, over = measure(prefix + command, offset_of, runs)
                        if not errors:
                            print("%-20s no answer" % name)
                            continue
                        median = statistics.median(errors)
                        ours = ours or median
                        print("%-20s %9.2f %9.2f %6s %5d %7.1f"
                              % (name, median / 1e3, sorted(errors)[int(len(errors) * 0.95)] / 1e3,
                                 "-" if over is None else over, len(errors), median / ours))
        print("\nsntpclock.py, start to answer on loopback: %.0f ms, %.1f MB (wanted: 60 ms, 12 MB)"
              % cost(prefix))


if __name__ == "__main__":
    if sys.argv[1:2] == ["relay"]:
        relay((sys.argv[2], int(sys.argv[3])), (sys.argv[4], int(sys.argv[5])))
    bench_clients()
