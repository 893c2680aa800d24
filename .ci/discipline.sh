#!/bin/sh
# discipline.sh - see discipline.py
exec python3 -u /rig/main/.ci/discipline.py
