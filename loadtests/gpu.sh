#!/bin/sh
# Everything that needs a CUDA device, in one go: tests/gpu with the checks of the kernels, the measurements.
#   sh loadtests/gpu.sh [FOLDER]    leaves gpu-tests.log and gpu.json in FOLDER (default: the current one)
set -u
mkdir -p "${1:-.}"
out=$(cd "${1:-.}" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
status=0
"$python" -m pytest tests/gpu -rs >"$out/gpu-tests.log" 2>&1 || status=1
tail -n 5 "$out/gpu-tests.log"
"$python" loadtests/gpu.py >"$out/gpu.out" || status=1
cat "$out/gpu.out"
tail -n 1 "$out/gpu.out" >"$out/gpu.json"
exit $status
