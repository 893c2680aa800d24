#!/bin/sh
# endurance.sh - see endurance.py
exec python3 -u /rig/main/.ci/endurance.py "$@"
