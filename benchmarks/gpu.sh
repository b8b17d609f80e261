#!/usr/bin/env bash
# What a GPU is asked, in under ten minutes and without a network: do the kernels compute what they should, and how fast are whole
# schedules over them. Needs torch, triton, pytest, pytest-timeout and hypothesis; pytest-xdist is used where it is there.
#
#   OUT=folder PYTHON=python3 benchmarks/gpu.sh
#
# Writes to OUT (default: out/gpu) log.txt, schedule-cuda-KERNEL.md, which belong in benchmarks/results, and trace-KERNEL.svg.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-out/gpu} PYTHON=${PYTHON:-python3} failed=0
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1

step() { # SECONDS COMMAND...
    echo "== $*"
    timeout "$@" 2>&1 | tee -a "$OUT/log.txt" | tail -n 45
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
    echo "== $SECONDS s, failed: $failed"
}

parallel=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-p xdist -n 8")
# shellcheck disable=SC2086
step 180 "$PYTHON" -m pytest tests/test_kernels.py tests/test_triton.py tests/test_benchmarks_schedule.py \
    -m "" -k "not compile" --device cuda -q -p no:cacheprovider --timeout 120 $parallel
for kernel in aten triton; do
    step 150 "$PYTHON" -m benchmarks schedule --device cuda --kernel "$kernel" --repeats 3 --save --results "$OUT"
    step 25 "$PYTHON" -m benchmarks schedule --device cuda --kernel "$kernel" --trace "$OUT/trace-$kernel.svg"
done
exit "$failed"
