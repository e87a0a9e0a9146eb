#!/bin/sh
# Everything that needs a CUDA device, in one go: the measurements, then tests/gpu with the checks of the kernels.
#   sh loadtests/gpu.sh [FOLDER]    leaves its files in FOLDER (default: the current one)
# gpu.json: the figures, beside gpu.err; gpu-serving.json: the default base by its real weights, over HTTP, from the
# folder $BASE or fetched; gpu-first.log, gpu-tests.log: the tests.
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
command='from nr_serve.cli import main; main()'
base=${BASE:-$("$python" -c "$command" fetch-model 2>>"$out/gpu.err")}
serve="$python -c '$command' serve --model $base --port {port}"
four=$(for name in hu da sk bio; do printf ' --adapter adapters/%s/%s.safetensors' $name $name; done)
timeout 120 "$python" loadtests/serving.py --base "$base" --concurrency 1 16 64 --rounds 2 --save "$out/gpu-serving.json" \
    --contender "none=$serve" --contender "four=$serve$four" >"$out/gpu-serving.log" 2>&1 || status=1
tail -n 5 "$out/gpu-serving.log"
PYTHONUNBUFFERED=1 "$python" -m pytest tests/gpu -rs >"$out/gpu-tests.log" 2>&1 || status=1
tail -n 5 "$out/gpu-tests.log"
exit $status
