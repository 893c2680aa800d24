#!/bin/bash
# document.sh - the whole way from a fresh machine to a disciplined clock, by the README's own blocks,
# in two virtual machines: vm --two --share PROJECT .ci/document.sh
# Guest A is the time server, 5 s ahead of guest B and 80 ppm faster.  Guest B is the fresh machine: first
# by svc/install (the blocks `sh install`) and back, then, fresh again, by hand (the blocks `sh host`).
cd /rig/main || exit 1

# fresh PPM AHEAD_NS - a clock that nobody keeps, so much faster and ahead
fresh() {
	python3 - "$@" <<-'END'
		import importlib.machinery, sys
		kernel = importlib.machinery.SourceFileLoader("clockadd", "clockadd.py").load_module()
		kernel.adjtimex(modes=0x2, freq=int(sys.argv[1]) << 16)
		kernel.step_kernel(kernel.adjtimex, int(sys.argv[2]))
	END
}
if [ "$RIG_GUEST" = A ]; then
	fresh 80 5000000000
	printf '%s\n' 'local stratum 1' 'allow 10.9.0.0/24' 'cmdport 0' 'bindcmdaddress /' 'pidfile /run/c.pid' >/tmp/c.conf
	exec chronyd -x -d -f /tmp/c.conf
fi
until ping -c1 -W1 10.9.0.1 >/dev/null 2>&1; do sleep 0.2; done

# block KIND N - the Nth block of that kind, asking guest A
block() {
	awk -v kind="\`\`\`sh $1" -v n="$2" '$0 == kind { at++; next } /^```$/ { if (at == n) exit } at == n' README.md |
		sed 's/192\.0\.2\.[0-9]*/10.9.0.1/g'
}
blocks() { grep -c "^\`\`\`sh $1\$" README.md; }
# follow KIND N - do what it says, as root's shell would
follow() {
	echo "== $1 $2"
	block "$1" "$2" >/tmp/block
	PS4='# ' bash -ex /tmp/block
}
failures=0
check() { # WHAT COMMAND...
	local what=$1; shift
	if "$@"; then echo "PASS $what"; else echo "FAIL $what"; failures=$((failures + 1)); fi
}

# by svc/install, on a host where daemontools runs
mkdir /service
svscan /service &
svscan=$!
count=$(blocks install)
for ((n = 1; n <= count; n++)); do
	follow install $n || { [ $? = 1 ] && grep -q 'clockctl check' /tmp/block; } || exit 1  # 1: there are warnings
	case $(cat /tmp/block) in
	*--start*)
		sleep 20
		clockctl status
		check "svc/install sets the clock and starts the services" grep -q 'mark: offset [+-]0\.0.*, used$' \
			/var/multilog/clockspeed/current
		check "a second run finds nothing to do" grep -q '^nothing to do$' \
			<(bash /tmp/block 2>&1)
		sleep 3 ;;
	esac
done
check "svc/install --remove --purge leaves nothing" [ -z "$(ls -A /service /var/svc.d /var/multilog /usr/local/clockspeed \
	/usr/local/etc/clockspeed.conf /usr/local/bin/clockctl 2>/dev/null | grep -v :)" ]
sleep 6  # svscan buries its dead every 5 s
check "and no process" [ -z "$(pgrep supervise)" ]
kill $svscan
wait $svscan
rm -rf /service
fresh 0 -5000000000

# by hand
count=$(blocks host)
for ((n = 1; n <= count; n++)); do
	follow host $n || exit 1
	case $(cat /tmp/block) in
	*'clocksd clockctl mark'*) # more marks than the service takes, and of 10 exchanges each: the host may be busy
		for wait in 10 20 40 60 60; do
			sleep $wait
			setuidgid clocksd sh -c '/usr/local/clockspeed/bin/sntpclock 10.9.0.1 >/usr/local/clockspeed/adjust'
		done
		sleep 20 ;;
	esac
done
svstat /service/* /service/*/log
ls -l /usr/local/clockspeed/adjust
tail -n 99 /var/multilog/*/current | tai64nlocal

# What it came to, by other means: a plain SNTP query of guest A, and CLOCK_REALTIME against the counter.
check "by hand, all of the below" python3 - <<'END'
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
time.sleep(120)
(o2, d2), r2, c2 = ask(), raw(), time.time_ns()
clock_ppm = ((c2 - c1) / (r2 - r1) - 1) * 1e6
server_ppm = clock_ppm + (o2 - o1) / (r2 - r1) * 1e15
log = open("/var/multilog/clockspeed/current").read()
learned_ppm = float(re.findall(r"rate ([+-][\d.]+) ppm", log)[-1])
uids = subprocess.run("ps -o user= -C taiclockd,multilog,clock_adjust.sh | sort -u; stat -c %U /usr/local/clockspeed/adjust",
                      shell=True, stdout=subprocess.PIPE, text=True).stdout.split()
print("clock off by %+.1f us (delay %.0f us), %.1f us two minutes ago; server's rate %+.2f ppm, learned %+.2f ppm, "
      "clock's rate %+.2f ppm" % (o2 * 1e6, d2 * 1e6, o1 * 1e6, server_ppm, learned_ppm, clock_ppm))
wanted = {"the clock is within 1 ms": abs(o2) < 1e-3,
          # of this measurement 100 us of queueing at each end are 1.7 ppm
          "the rate is within 4 ppm": abs(learned_ppm - server_ppm) < 4 and abs(clock_ppm - server_ppm) < 4,
          "the server ran 80 ppm faster": 30 < server_ppm < 130,
          "the log tells of the first mark, 5 s off": re.search(r"mark: offset \+[45]\.\d+ s", log),
          "nothing failed": "fatal" not in log and "warning" not in log,
          "adjust is clocksd's": uids[-1] == "clocksd"}
for what, so in wanted.items():
    print("PASS" if so else "FAIL", what)
sys.exit(not all(wanted.values()))
END
exit $((failures > 0))
