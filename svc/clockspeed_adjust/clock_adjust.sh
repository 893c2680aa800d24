#!/bin/sh
# periodically get timing mark for clockspeed service
# The first mark is taken at once.  The waits between marks, in seconds, begin with
# $WAIT and triple up to $WAIT_MAX (30.3 days), or are shorter where CLOCK_ERROR in
# clockspeed.conf asks for it.  A mark that failed is tried again after $WAIT.
WAIT_MIN=${WAIT:-541} WAIT_MAX=${WAIT_MAX:-2617923}
LAST=$WAIT_MIN MOST=$WAIT_MIN
PATH=$PATH:/usr/local/bin

# A shell acts on a TERM at once only while it waits for what runs beside it.
trap 'kill $! 2>/dev/null; exit 0' TERM
run() {
    "$@" &
    wait $!
}

# loop indefinitely
while :; do
    # obtain timing mark for calibrating clockspeed adjust:
    # (svscan may have started clockspeed only now)
    if run clockctl mark --patience 10; then
        # log current "attoseconds":
        run clockctl atto
        WAIT=$(clockctl wait "$LAST" "$MOST")
        case $WAIT in '' | *[!0-9]*) WAIT=$((LAST * 3)) ;; esac  # clockctl could not tell
        [ "$WAIT" -le "$MOST" ] || WAIT=$MOST
        LAST=$WAIT MOST=$WAIT_MAX
    else
        WAIT=$WAIT_MIN
    fi
    echo "==="
    echo "Waiting ${WAIT} seconds until next adjustment..."
    run sleep "$WAIT"
done
