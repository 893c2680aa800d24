#!/bin/bash
# document.sh - the whole way from a fresh machine to a disciplined clock, command by command as in
# the README, in two virtual machines: vm --two --share PROJECT .ci/document.sh
# Guest A is the time server, 5 s ahead of guest B and 80 ppm faster.  Guest B is the fresh machine.
cd /rig/main || exit 1

if [ "$RIG_GUEST" = A ]; then
	python3 - <<-'END'
		import importlib.machinery, time
		kernel = importlib.machinery.SourceFileLoader("clockadd", "clockadd.py").load_module()
		kernel.adjtimex(modes=0x2, freq=80 << 16)
		kernel.step_kernel(kernel.adjtimex, 5 * 10**9)
	END
	printf '%s\n' 'local stratum 1' 'allow 10.9.0.0/24' 'cmdport 0' 'bindcmdaddress /' 'pidfile /run/c.pid' >/tmp/c.conf
	exec chronyd -x -d -f /tmp/c.conf
fi
until ping -c1 -W1 10.9.0.1 >/dev/null 2>&1; do sleep 0.2; done

set -e
PS4='# '
set -x
# the programs, under djb's names
mkdir -p /usr/local/clockspeed/bin /usr/local/clockspeed/etc /usr/local/etc
for p in clockspeed sntpclock taiclock taiclockd clockadd clockview; do cp $p.py /usr/local/clockspeed/bin/$p; done
cp clockctl /usr/local/bin/clockctl
cp svc/clockspeed.conf /usr/local/etc/clockspeed.conf
sed -i 's/^CLOCK_IP=.*/CLOCK_IP="10.9.0.1"/' /usr/local/etc/clockspeed.conf
# the users and the services
groupadd nofiles
useradd -r -g nofiles -d /nonexistent -s /bin/false clocksd
useradd -r -g nofiles -d /nonexistent -s /bin/false multilog
mkdir -p /var/svc.d
cp -R svc/clockspeed svc/clockspeed_adjust svc/taiclockd /var/svc.d/
mkdir -p /var/multilog/clockspeed /var/multilog/clockspeed_adjust /var/multilog/taiclockd
chown multilog:nofiles /var/multilog/*
mkdir -p /service
svscan /service &
clockctl view
ln -s /var/svc.d/clockspeed /service/clockspeed
sleep 7
ln -s /var/svc.d/clockspeed_adjust /service/clockspeed_adjust
ln -s /var/svc.d/taiclockd /service/taiclockd
sleep 12
svstat /service/clockspeed /service/clockspeed/log /service/clockspeed_adjust /service/clockspeed_adjust/log \
	/service/taiclockd /service/taiclockd/log
ls -l /usr/local/clockspeed/adjust
# more marks than the service takes in its first 541 s, by the user that the service runs as
for wait in 10 20 40 60 60; do sleep $wait; setuidgid clocksd clockctl mark; done
sleep 20
clockctl atto
clockctl status
tail -n 99 /var/multilog/*/current | tai64nlocal
taiclock=/usr/local/clockspeed/bin/taiclock
$taiclock -v 2 127.0.0.1 | /usr/local/clockspeed/bin/clockview
set +x

# What it came to, by other means: a plain SNTP query of guest A, and CLOCK_REALTIME against the counter.
python3 - <<'END'
import importlib.machinery, re, socket, struct, subprocess, sys, time

def ask():
    """(offset of guest A in s, delay): the quickest of 40 exchanges."""
    def once():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.settimeout(1)
            t1 = time.time()
            s.sendto(b"\x23" + bytes(47), ("10.9.0.1", 123))
            data, t4 = s.recv(512), time.time()
        t2, t3 = (a - 2208988800 + b / 2**32 for a, b in struct.iter_unpack("!II", data[32:48]))
        return (t4 - t1) - (t3 - t2), ((t2 - t1) + (t3 - t4)) / 2
    delay, offset = min(once() for _ in range(40))
    return offset, delay

raw = lambda: time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
(o1, d1), r1, c1 = ask(), raw(), time.time_ns()
time.sleep(60)
(o2, d2), r2, c2 = ask(), raw(), time.time_ns()
clock_ppm = ((c2 - c1) / (r2 - r1) - 1) * 1e6
server_ppm = clock_ppm + (o2 - o1) / (r2 - r1) * 1e15
log = open("/var/multilog/clockspeed/current").read()
learned_ppm = float(re.findall(r"rate ([+-][\d.]+) ppm", log)[-1])
uids = subprocess.run("ps -o user= -C taiclockd,multilog,clock_adjust.sh | sort -u; stat -c %U /usr/local/clockspeed/adjust",
                      shell=True, stdout=subprocess.PIPE, text=True).stdout.split()
print("clock off by %+.1f us (delay %.0f us), %.1f us a minute ago; server's rate %+.2f ppm, learned %+.2f ppm, "
      "clock's rate %+.2f ppm" % (o2 * 1e6, d2 * 1e6, o1 * 1e6, server_ppm, learned_ppm, clock_ppm))
wanted = {"the clock is within 1 ms": abs(o2) < 1e-3,
          "the rate is within 2 ppm": abs(learned_ppm - server_ppm) < 2 and abs(clock_ppm - server_ppm) < 2,
          "the server ran 80 ppm faster": 30 < server_ppm < 130,
          "the log tells of the first mark, 5 s off": re.search(r"mark: offset \+[45]\.\d+ s", log),
          "nothing failed": "fatal" not in log and "warning" not in log,
          "adjust is clocksd's": uids[-1] == "clocksd"}
for what, so in wanted.items():
    print("PASS" if so else "FAIL", what)
sys.exit(not all(wanted.values()))
END
