#!/bin/sh
# Everything that needs a CUDA device, in one go: the measurements, then tests/gpu with the checks of the kernels.
#   sh loadtests/gpu.sh [FOLDER]    leaves gpu.json, gpu.err and gpu-tests.log in FOLDER (default: the current one)
# It is meant for a machine lent for ten minutes: gpu.json is whole after each part, and one that fails stops no other.
set -u
mkdir -p "${1:-.}"
out=$(cd "${1:-.}" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
rm -f "$out/gpu.json"  # of an earlier run
status=0
# A few seconds that say whether the kernels run at all; then the figures; the slower tests may be cut short.
PYTHONUNBUFFERED=1 timeout 90 "$python" -m pytest tests/gpu -rs -x -k "silu_mul or random_step or by_graph" \
    >"$out/gpu-first.log" 2>&1 || status=1
tail -n 5 "$out/gpu-first.log"
timeout 420 "$python" loadtests/gpu.py 2>"$out/gpu.err" | while IFS= read -r line; do
    printf '%s\n' "$line" >"$out/gpu.json.part" && mv "$out/gpu.json.part" "$out/gpu.json"
done
tail -n 20 "$out/gpu.err"
"$python" -c 'import json, sys; sys.exit(bool(json.load(open(sys.argv[1]))["failed"]))' "$out/gpu.json" || status=1
PYTHONUNBUFFERED=1 "$python" -m pytest tests/gpu -rs >"$out/gpu-tests.log" 2>&1 || status=1
tail -n 5 "$out/gpu-tests.log"
exit $status
