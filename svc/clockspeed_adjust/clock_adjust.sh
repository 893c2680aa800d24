#!/bin/sh
# periodically get timing mark for clockspeed service
# The first mark is taken at once.  The waits between marks, in seconds, begin with
# $WAIT and triple up to $WAIT_MAX (30.3 days).  Where CLOCK_ERROR in clockspeed.conf
# asks for an accuracy, they are as clockspeed wants them.  A mark that failed is tried
# again after $WAIT, or later where the server asked for that.
WAIT_MIN=${WAIT:-541} WAIT_MAX=${WAIT_MAX:-2617923}
LAST=$WAIT_MIN MOST=$WAIT_MIN
PATH=$PATH:/usr/local/bin

# When the next mark is due, in seconds since this boot, is kept in mark/due: a restart
# by supervise asks no sooner.  A TERM, as by `svc -t`, removes it, and then it asks at once.
CLOCKSPEED_HOME=$(clockctl run sh -c 'echo "$CLOCKSPEED_HOME"')
DUE=${CLOCKSPEED_HOME:-/usr/local/clockspeed}/mark/due

# A shell acts on a TERM at once only while it waits for what runs beside it.
trap 'kill $! 2>/dev/null; rm -f "$DUE"; exit 0' TERM
run() {
    "$@" &
    wait $!
}

# what the kernel says of this boot: its id, and how old it is
look() {
    read -r BOOT && read -r UP REST </proc/uptime
    UP=${UP%.*}
} 2>/dev/null </proc/sys/kernel/random/boot_id

# the next mark is due in $1 seconds
keep() {
    look && echo "$BOOT $((UP + $1 + 1))" >"$DUE"
} 2>/dev/null

rest() {
    echo "Waiting ${1} seconds until next adjustment..."
    run sleep "$1"
}

if look && { read -r ID AT <"$DUE"; } 2>/dev/null && [ "$ID" = "$BOOT" ]; then
    case $AT in '' | *[!0-9]* | ???????????*) AT=0 ;; esac
    [ "$AT" -le "$UP" ] || [ "$AT" -gt $((UP + WAIT_MAX)) ] || rest $((AT - UP))
fi

# loop indefinitely
while :; do
    keep "$WAIT_MIN" # should this end in the middle
    # obtain timing mark for calibrating clockspeed adjust:
    # (svscan may have started clockspeed only now)
    if run clockctl mark --patience 10; then
        # log current "attoseconds":
        run clockctl atto
        WAIT=$(clockctl wait "$LAST" "$MOST")
        case $WAIT in '' | *[!0-9]*) WAIT=$((LAST * 3)) ;; esac # clockctl could not tell
        [ "$WAIT" -le "$MOST" ] || WAIT=$MOST
        LAST=$WAIT MOST=$WAIT_MAX
    else
        WAIT=$(clockctl wait --failed "$WAIT_MIN" "$WAIT_MAX")
        case $WAIT in '' | *[!0-9]*) WAIT=$WAIT_MIN ;; esac
    fi
    echo "==="
    keep "$WAIT"
    rest "$WAIT"
done
