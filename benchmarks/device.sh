#!/usr/bin/env bash
# Measures jlora on a real accelerator, in at most eight minutes: see benchmarks/device.py.
# Needs this checkout and a Python with JAX for the device: PYTHON=... benchmarks/device.sh [--tiny] [--out FILE]
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
# The processes that measure peaks find the programs that the first process compiled.
export JAX_COMPILATION_CACHE_DIR="$cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export XLA_PYTHON_CLIENT_PREALLOCATE=false # the processes share the card
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
limit=480
[[ " $* " == *" --tiny "* ]] && limit=3600
timeout "$limit" "$python" -m benchmarks.device "$@"
