#!/bin/sh
# What a GPU does with this toolkit, in phases; none stops the next. Rows go to $OUT/results.jsonl (default
# ./build/gpu_check), the table is printed last. Exit code 1 when a phase fails. Arguments go to benchmarks/gpu.py:
#   sh benchmarks/gpu_check.sh                              7B on a GPU, about 10 minutes
#   sh benchmarks/gpu_check.sh --size tiny --device cpu     the same phases, to try them
# Under `timeout SECONDS`, the table of what was measured until then is printed.
set -u

HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(dirname "$HERE")
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$ROOT/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
OUT=${OUT:-./build/gpu_check}
ENGINE=${ENGINE:-./build/gpu/engine}
mkdir -p "$OUT" "$ENGINE"
OUT=$(cd "$OUT" && pwd)
ENGINE=$(cd "$ENGINE" && pwd)
# Transformer Engine lies in its own folder, which is empty until its phase: the others shall not find it.
PYTHONPATH=$ROOT:$ENGINE${PYTHONPATH:+:$PYTHONPATH}
# As for a run, whose lengths vary; a few compiler processes leave the cores to what is measured.
PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-4}
export PYTORCH_CUDA_ALLOC_CONF TORCHINDUCTOR_COMPILE_THREADS
export OUT PYTHONPATH PYTHONUNBUFFERED=1
rm -f "$OUT/results.jsonl"

failed=0
child=
table() {
    "$PYTHON" "$HERE/gpu_table.py" "$OUT" || failed=1
}
# In the background and waited for, so that a signal is answered at once.
trap 'kill "$child" 2>/dev/null; table; exit 124' TERM INT

"$PYTHON" "$HERE/gpu.py" plan "$@" >"$OUT/plan.txt" || exit 2
while read -r seconds phases; do
    # Its words are the names of phases.
    # shellcheck disable=SC2086
    timeout -k 10 "$seconds" "$PYTHON" -W ignore "$HERE/gpu.py" $phases "$@" --engine "$ENGINE" </dev/null &
    child=$!
    wait "$child"
    code=$?
    if [ "$code" -ne 0 ]; then
        failed=1
    fi
    if [ "$code" -gt 1 ]; then
        # shellcheck disable=SC2086
        "$PYTHON" "$HERE/gpu.py" $phases "$@" --ended "$code" </dev/null
    fi
done <"$OUT/plan.txt"
table
exit "$failed"
