#!/bin/bash
# document.sh - from a fresh machine to a disciplined clock by the README's own blocks
# Guest A is the time server, 5 s ahead of guest B and 80 ppm faster.  Guest B is the fresh machine: first by
# svc/install (the blocks `sh install`) and back, then, fresh again, by hand (the blocks `sh host`).
cd /rig/main || exit 1
umask 077
rig() { python3 -c "import sys; sys.path.insert(0, '.ci/vm'); from rig import *; $1"; }
[ "$RIG_GUEST" = B ] || rig 'serve(80, 5 * 10**9)'
rig 'wait_for_server()'

# block KIND N - the Nth block of that kind, asking guest A
block() {
    awk -v kind="\`\`\`sh $1" -v n="$2" \
        '$0 == kind { at++; next } /^```$/ { if (at == n) exit } at == n' README.md |
        sed 's/192\.0\.2\.[0-9]*/10.9.0.1/g'
}
blocks() { grep -c "^\`\`\`sh $1\$" README.md; }
# follow KIND N COMMAND... - have the command do what it says
follow() {
    echo "== $1 $2"
    block "$1" "$2" >/tmp/block
    shift 2
    PS4='# ' "$@" /tmp/block
}
# here BLOCK - do it in this shell, as one who pastes block after block does
here() {
    set -ex
    . "$1"
    { set +ex; } 2>/dev/null
}
failures=0
check() { # WHAT COMMAND...
    local what=$1
    shift
    if "$@"; then echo "PASS $what"; else echo "FAIL $what"; failures=$((failures + 1)); fi
}

# by svc/install, on a host where daemontools runs
(umask 022; mkdir /service)
svscan /service &
svscan=$!
count=$(blocks install)
for ((n = 1; n <= count; n++)); do
    # clockctl check ends with 1 when there are warnings
    follow install $n bash -ex || { [ $? = 1 ] && grep -q 'clockctl check' /tmp/block; } || exit 1
    grep -q -- --start /tmp/block || continue
    sleep 20
    clockctl status
    check "svc/install sets the clock and starts the services" grep -q 'mark: .*offset [+-]0\.0.*, used$' \
        /var/multilog/clockspeed/current
    check "a second run finds nothing to do" grep -q '^nothing to do$' <(bash /tmp/block 2>&1)
    sleep 3
done
check "svc/install --remove --purge leaves nothing" \
    [ -z "$(ls -A /service /var/svc.d /var/multilog /usr/local/clockspeed \
    /usr/local/etc/clockspeed.conf /usr/local/bin/clockctl 2>/dev/null | grep -v :)" ]
sleep 6  # svscan buries its dead every 5 s
check "and no process" [ -z "$(pgrep supervise)" ]
kill $svscan
wait $svscan
rm -rf /service
rig 'fresh(0, -5 * 10**9)'

# by hand
count=$(blocks host)
for ((n = 1; n <= count; n++)); do
    follow host $n here
    grep -q 'clocksd clockctl mark' /tmp/block || continue
    for wait in 10 15 20 25; do  # more marks than the service takes
        sleep $wait
        setuidgid clocksd clockctl mark
    done
    sleep 10
done
svstat /service/* /service/*/log
tail -n 99 /var/multilog/*/current | tai64nlocal | cut -c 1-300
clockctl check

# What it came to, by a plain SNTP query of guest A, and CLOCK_REALTIME against the counter
check "by hand, all of the below" python3 - <<'END'
import re, subprocess, sys, time
sys.path.insert(0, ".ci/vm")
from rig import ask, check, finish, rate_ppm
first = ask(40)
time.sleep(30)
last = ask(40)
server_ppm, unsure_ppm = rate_ppm(first, last)
log = open("/var/multilog/clockspeed/current").read()
mark = [line for line in log.splitlines() if "mark: " in line][-1]
rate, rate_error, error = (float(re.search(r" %s ([-+.\d]+)" % name, mark).group(1))
                           for name in ("rate", "rate error", "error"))
check("the clock is within 4 of what it says its error is",
      abs(last.offset_ns) < 4e9 * error + last.unsure_ns + 10**5,
      "off by %+.1f us +- %.1f, error %.1f us" % (last.offset_ns / 1e3, last.unsure_ns / 1e3, error * 1e6))
check("and so is the rate", abs(rate - server_ppm) < 4 * rate_error + unsure_ppm,
      "%+.2f ppm, error %.2f; the server's %+.2f +- %.2f" % (rate, rate_error, server_ppm, unsure_ppm))
check("the log tells of the first mark, 5 s off", re.search(r"offset \+[45]\.\d+ s", log))
def sh(command):
    return subprocess.run(command, shell=True, stdout=subprocess.PIPE, universal_newlines=True).stdout
logs = sh("cat /var/multilog/*/current")
check("nothing failed", "fatal" not in logs and "warning" not in logs)
owners = sh("cd /usr/local/clockspeed; stat -c '%U %a' adjust etc mark;"
            " ps -o user= -C clockspeed,taiclockd,multilog,clock_adjust.sh | sort -u").split()
check("each has its user",
      " ".join(owners) == "clocksd 600 clockspeed 755 clocksd 700 clocksd clockspeed multilog", str(owners))
finish()
END
exit $((failures > 0))
