#!/usr/bin/env bash
# What a GPU is asked, in under ten minutes and without a network: do the kernels compute what they should, which is the fastest, and
# how fast are whole schedules over them. Needs torch, triton, pytest >= 8.4, pytest-timeout and hypothesis; without pytest-xdist
# the slow tests are left out: one process compiles their kernels for minutes.
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

# Interrupted, once, pytest tells what has failed so far; terminated, nothing.
step() { # SECONDS COMMAND...
    echo "== ${*:2}"
    timeout --foreground -s INT -k 10 "$1" "${@:2}" 2>&1 | tee -a "$OUT/log.txt" | tail -n 45
    [ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
    echo "== $SECONDS s, failed: $failed"
}

# 520 s at most, and 10 more for each that has to be killed. Warnings of versions that were not tried before are no errors here.
workers=(-m "not slow")
"$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-m "" -p xdist -n 8)
step 160 "$PYTHON" -m pytest tests/test_{benchmarks_schedule,kernels,triton,device}.py "${workers[@]}" \
    -k "not compile" --device cuda -q --tb=short -W default -p no:cacheprovider --timeout 120
step 70 "$PYTHON" -m benchmarks kernels --device cuda --repeats 5 --save --results "$OUT"
step 90 "$PYTHON" -m benchmarks schedule --device cuda --kernel aten --repeats 3 --save --results "$OUT"
step 110 "$PYTHON" -m benchmarks schedule --device cuda --kernel triton --repeats 2 --save --results "$OUT" # slower in its backward
for kernel in aten triton; do
    step 45 "$PYTHON" -m benchmarks schedule --device cuda --kernel "$kernel" --trace "$OUT/trace-$kernel.svg"
done
exit "$failed"
