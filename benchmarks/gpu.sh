#!/usr/bin/env bash
# What a GPU is asked, in under ten minutes and without a network: do the kernels compute what they should, which is the fastest, and
# how fast are whole schedules over them. Needs torch, triton, pytest >= 8.4, pytest-timeout and hypothesis; pytest-xdist is used
# where it is there.
#
#   OUT=folder PYTHON=python3 benchmarks/gpu.sh
#
# Writes to OUT (default: out/gpu) log.txt, kernels-cuda.md and schedule-cuda-KERNEL.md, which belong in benchmarks/results, and
# trace-KERNEL.svg. A table is written as far as it is after every mask, so that what a limit cuts short is kept.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-out/gpu} PYTHON=${PYTHON:-python3} failed=0
mkdir -p "$OUT"
export PYTHONPATH=. PYTHONUNBUFFERED=1

# Interrupted, pytest tells what has failed so far; terminated, nothing.
step() { # SECONDS COMMAND...
    echo "== ${*:2}"
    timeout -s INT -k 10 "$1" "${@:2}" 2>&1 | tee -a "$OUT/log.txt" | tail -n 45
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
    echo "== $SECONDS s, failed: $failed"
}

# 520 s at most, and 10 more for each that has to be killed. Warnings of versions that were not tried before are no errors here.
parallel=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-p xdist -n 8")
# shellcheck disable=SC2086
step 160 "$PYTHON" -m pytest tests/test_kernels.py tests/test_triton.py tests/test_benchmarks_schedule.py \
    -m "" -k "not compile" --device cuda -q --tb=short -W default -p no:cacheprovider --timeout 120 $parallel
step 70 "$PYTHON" -m benchmarks kernels --device cuda --repeats 5 --save --results "$OUT"
for kernel in aten triton; do
    step 100 "$PYTHON" -m benchmarks schedule --device cuda --kernel "$kernel" --repeats 3 --save --results "$OUT"
done
for kernel in aten triton; do
    step 45 "$PYTHON" -m benchmarks schedule --device cuda --kernel "$kernel" --trace "$OUT/trace-$kernel.svg"
done
exit "$failed"
