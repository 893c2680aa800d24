#!/usr/bin/env python3
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))

# ==== taiclockd ===================================================================================
# Queries to one server, `outstanding` at a time, each batch sent and received by one system call.
LOAD = r'''
import ctypes, socket, struct, sys, time
port, outstanding, sec = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect(("127.0.0.1", port))
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 200000))
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
libc, kept = ctypes.CDLL(None), []
def place(data):
    kept.append(ctypes.create_string_buffer(data, len(data)))
    return ctypes.addressof(kept[-1])
def headers(data):
    return [ctypes.c_void_p(place(b"".join(
        struct.pack("@PIPNPNi0PI0P", 0, 0, place(struct.pack("@PN", place(data), len(data))), 1, 0, 0, 0, 0)
        for _ in range(outstanding))))][0]
queries, replies = headers(b"ctai" + bytes(28)), headers(bytes(64))
fd, answered, lost, waits, begin = sock.fileno(), 0, 0, [], time.perf_counter()
now = begin
while now < begin + sec:
    sent = now
    assert libc.sendmmsg(fd, queries, outstanding, 0) == outstanding
    missing = outstanding
    while missing:
        received = libc.recvmmsg(fd, replies, missing, 0x10000, None)
        now = time.perf_counter()
        if received <= 0:
            lost += missing
            break
        missing -= received
        answered += received
        waits.append((now - sent, received))
waits.sort()
rank = 0
for wait, received in waits:
    rank += received
    if rank >= 0.99 * answered:
        break
print(answered, lost, now - begin, wait)
'''
C_HEAD = r'''
#define _GNU_SOURCE
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
static struct sockaddr_in6 address = {.sin6_family = AF_INET6};
static int serve(void) {
  int fd = socket(AF_INET6, SOCK_DGRAM, 0), queue = 4 << 20; socklen_t size = sizeof address;
  setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &queue, sizeof queue);
  bind(fd, (void *) &address, size); getsockname(fd, (void *) &address, &size);
  printf("port %d\n", ntohs(address.sin6_port)); fflush(stdout); return fd; }
'''
# What the original taiclockd does for each query: recvfrom, gettimeofday, sendto.
C_PLAIN = C_HEAD + r'''
int main(void) {
  int fd = serve(); unsigned char packet[256]; struct timeval now;
  for (;;) {
    socklen_t size = sizeof address;
    int i, length = recvfrom(fd, packet, sizeof packet, 0, (void *) &address, &size);
    if (length < 20 || memcmp(packet, "ctai", 4)) continue;
    gettimeofday(&now, 0); packet[0] = 's';
    unsigned long long sec = 4611686018427387914ULL + now.tv_sec; unsigned nano = now.tv_usec * 1000 + 500;
    for (i = 0; i < 8; ++i) packet[4 + i] = sec >> (56 - 8 * i);
    for (i = 0; i < 4; ++i) packet[12 + i] = nano >> (24 - 8 * i);
    memset(packet + 16, 0, 4);
    sendto(fd, packet, length, 0, (void *) &address, size); } }
'''
# The least that a server by the batch can do: send back what came.
C_LIMIT = C_HEAD + r'''
#define SLOTS 64
int main(void) {
  static struct mmsghdr headers[SLOTS]; static struct iovec vectors[SLOTS]; static char packets[SLOTS][256];
  static struct sockaddr_in6 names[SLOTS]; int fd = serve(), i, received, sent;
  for (;;) {
    for (i = 0; i < SLOTS; ++i) {
      vectors[i] = (struct iovec) {packets[i], 256};
      headers[i].msg_hdr = (struct msghdr) {.msg_name = &names[i], .msg_namelen = sizeof *names,
                                            .msg_iov = &vectors[i], .msg_iovlen = 1}; }
    received = recvmmsg(fd, headers, SLOTS, MSG_WAITFORONE, 0);
    for (i = 0; i < received; ++i) vectors[i].iov_len = headers[i].msg_len;
    for (i = 0; i < received; i += sent > 0 ? sent : 1) sent = sendmmsg(fd, headers + i, received - i, 0); } }
'''


def bench_server(rounds=25, round_sec=0.1):
    """taiclockd: CPU per reply, replies per second, and the wait of the slowest 1%, beside C's.

    The servers take turns, and all figures are medians, ratios those of turns that followed each other:
    so what else the machine does meanwhile counts for all.  CPU is the server's own.
    """
    ours = os.path.join(HERE, "taiclockd.py")
    # No shim in front of the interpreter, whose caches count.
    env = dict(os.environ, PATH="/usr/bin:" + os.environ["PATH"], CLOCK_SCALE="utc", TZ="UTC")
    with tempfile.TemporaryDirectory() as directory:
        commands = {"taiclockd.py": [ours, "-p", "0"]}
        if shutil.which("gcc"):
            for name, source in (("C by one (stand-in)", C_PLAIN), ("C by the batch (limit)", C_LIMIT)):
                binary = os.path.join(directory, name.replace(" ", "_"))
                subprocess.run(["gcc", "-O2", "-xc", "-o", binary, "-"], input=source.encode(), check=True)
                commands[name] = [binary]
        for name, args in (("taiclockd", []), ("s6-taiclockd", ["-i", "127.0.0.1", "-p", "4015"])):
            if shutil.which(name):
                commands[name] = [name] + args
        print("taiclockd, one worker: CPU per reply, replies per second, 99% answered within")
        servers = {name: start_server(name, command, env) for name, command in commands.items()}
        try:
            for outstanding in (1, 8, 64, 256):
                compare_servers(servers, outstanding, rounds, round_sec)
            process, _ = servers["taiclockd.py"]
            print("  resident after that: %.1f MB" % (resident_kb(process.pid) * 1024 / 1e6))
        finally:
            for process, _ in servers.values():
                process.kill()
                process.communicate()
    bench_workers(ours, env)


def start_server(name, command, env):
    """-> process, port; what does not print its port has the usual one, or that of its arguments."""
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if "taiclockd" in name and not name.endswith(".py"):
        time.sleep(0.5)
        return process, int(command[-1]) if len(command) > 1 else 4014
    return process, int(re.search(rb"port (\d+)", process.stdout.readline()).group(1))


def cpu_ns(pid):
    with open("/proc/%d/schedstat" % pid) as file:
        return int(file.read().split()[0])


def resident_kb(pid):
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))


def compare_servers(servers, outstanding, rounds, round_sec):
    figures = {name: [] for name in servers}  # CPU us per reply, replies per second, p99 us
    lost = dict.fromkeys(servers, 0)
    for _ in range(rounds):
        for name, (process, port) in servers.items():
            before_ns = cpu_ns(process.pid)
            command = [sys.executable, "-IS", "-c", LOAD, str(port), str(outstanding), str(round_sec)]
            load = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()
            used_us = (cpu_ns(process.pid) - before_ns) / 1000
            answered, lost[name] = int(load[0]), lost[name] + int(load[1])
            figures[name].append((used_us / answered, answered / float(load[2]), float(load[3]) * 1e6))
    for name, rows in figures.items():
        ratios = ["%.2f of %s" % (statistics.median(a[0] / b[0] for a, b in zip(rows, figures[other])), other)
                  for other in figures if other != name and name == "taiclockd.py"]
        print("  %4d outstanding  %-22s %6.2f us %8.0f/s %6.0f us%s  %s" % (
            (outstanding, name) + tuple(map(statistics.median, zip(*rows)))
            + (", %d lost" % lost[name] if lost[name] else "", ", ".join(ratios))))


def bench_workers(ours, env, rounds=15, round_sec=0.3):
    """What more workers are worth: CPU per reply, and from it how many times the replies of one worker they
    give if each has a core of its own, which the load would else take from them on a small machine."""
    cores = len(os.sched_getaffinity(0))
    used = {}
    for workers in sorted({1, 2, cores}):
        process, port = start_server("taiclockd.py", [ours, "-p", "0", "-j", str(workers)], env)
        try:
            time.sleep(0.3)  # for all to be there
            pids = [process.pid]
            if workers > 1:
                with open("/proc/%d/task/%d/children" % (process.pid, process.pid)) as file:
                    pids = [int(pid) for pid in file.read().split()]
            command = [sys.executable, "-IS", "-c", LOAD, str(port), "64", str(round_sec)]
            figures = []
            for _ in range(rounds):
                before_ns = sum(map(cpu_ns, pids))
                loads = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
                answered = sum(int(load.communicate()[0].split()[0]) for load in loads)
                figures.append((sum(map(cpu_ns, pids)) - before_ns) / 1000 / answered)
            used[workers] = statistics.median(figures)
            print("  %d worker%s, 4 x 64 outstanding  %6.2f us, on as many free cores %.2f of one, %.1f MB" % (
                workers, "s"[workers == 1:], used[workers], workers * used[1] / used[workers],
                max(map(resident_kb, pids)) * 1024 / 1e6))
        finally:
            process.terminate()
            process.communicate()


if __name__ == "__main__":
    bench_server()
