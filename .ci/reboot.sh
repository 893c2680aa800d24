#!/bin/sh
# reboot.sh - see reboot.py
exec python3 -u /rig/main/.ci/reboot.py "$@"
