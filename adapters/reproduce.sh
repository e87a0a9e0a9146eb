#!/usr/bin/env bash
# Trains and measures: adapters, baselines, gates beside each other, as docs/results.md shows them.
#
#     bash adapters/reproduce.sh OUT [KEY=VALUE ...]
#
# KEY=VALUE changes every recipe. The budgets in the recipes suit a CPU (a day). On one GPU:
#
#     bash adapters/reproduce.sh OUT run.tokens=20_000_000 run.batch_tokens=32768 run.dtype=bfloat16 \
#         run.warmup_tokens=300_000 run.checkpoint_every=2_000_000 run.validate_every=2_000_000
#
# What is finished is not done again, so it may be stopped and called again. The text is fetched, or read from the folder
# that the environment variable CORPUS names.
set -euo pipefail
out=$1
shift
changes=()
for change in "$@"; do changes+=(--set "$change"); done
corpus=${CORPUS:-$out/corpus}
here=$(dirname "$0")
domains=(hu da sk bio)

mkdir -p "$out"
[ -n "${CORPUS:-}" ] || nr-serve fetch-corpus "$here/corpora.toml" --out "$corpus"
for domain in "${domains[@]}"; do
    [ -e "$out/$domain/$domain.safetensors" ] ||
        nr-serve train "$here/$domain/recipe.toml" --corpus "$corpus" --out "$out/$domain" --resume "${changes[@]}"
done
# Gates are fitted once more, to twice the text; Slovak's beside the others, whose blocks move what they read.
together=$out/together
mkdir -p "$together"
cp "$out/bio/bio.safetensors" "$together"
for domain in hu da; do
    [ -e "$together/$domain.safetensors" ] ||
        nr-serve calibrate "$out/$domain/$domain.safetensors" --corpus "$corpus" \
            --out "$together/$domain.safetensors" --set fit_tokens=12288
done
[ -e "$together/sk.safetensors" ] ||
    nr-serve calibrate "$out/sk/sk.safetensors" --corpus "$corpus" --out "$together/sk.safetensors" --carry 0.9 \
        --set fit_tokens=12288 --set background_percentile=99.5 --set threshold=0.7 \
        --beside "$together/hu.safetensors" --beside "$together/da.safetensors" --beside "$together/bio.safetensors"
files=("$together"/{hu,da,sk,bio}.safetensors)
nr-serve evaluate "${files[@]}" --corpus "$corpus" --interference --near nb=da --near sv=da --near cs=sk \
    --markdown "$out/interference.md" --plots "$out"
nr-serve sweep "$here/eight.toml" --corpus "$corpus" --out "$out/eight" "${changes[@]}"
nr-serve evaluate "${files[@]}" "$out"/eight/*/??.safetensors --corpus "$corpus" --interference \
    --near nb=da --near sv=da --near cs=sk --markdown "$out/eight.md" --plots "$out/eight"
for domain in "${domains[@]}"; do
    nr-serve sweep "$here/$domain/methods.toml" --corpus "$corpus" --out "$out/$domain-methods" "${changes[@]}"
done
for runs in rates ablations; do
    nr-serve sweep "$here/hu/$runs.toml" --corpus "$corpus" --out "$out/hu-$runs" "${changes[@]}"
done
