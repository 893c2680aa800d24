#!/bin/sh
# leap.sh - see leap.py
exec python3 -u /rig/main/.ci/leap.py
