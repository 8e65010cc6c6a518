#!/usr/bin/env bash
# Every kernel's check and timing on this machine's GPU, within eight minutes: benchmarks/gpu.sh [FILE.json]
set -euo pipefail
cd "$(dirname "$0")/.."
export TQAI_TRITON=1
exec timeout 480 "${PYTHON:-python3}" benchmarks/gpu.py --json "${1:-gpu.json}"
