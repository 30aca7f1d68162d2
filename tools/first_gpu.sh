#!/usr/bin/env bash
# The first quarter of an hour on GPUs: does everything run, how fast, and where does the time go?
#
#   bash tools/first_gpu.sh [OUTPUT]         all GPUs of this machine; OUTPUT: first_gpu.jsonl
#   bash tools/first_gpu.sh --cpu [OUTPUT]   the same with tiny models on CPU: tests this script
#
# Works from a checkout with its .venv (or PYTHON=…) and without a network: models are random.
# SHAPE=1b takes less memory and disk than the default, 8b: 18 GB on the GPU and on the disk. Models,
# logs and runs are in SCRATCH (default: OUTPUT without .jsonl).
#
# Each part appends one line of JSON to OUTPUT: {"part", "seconds", "status", "found"}. A part has a
# time limit and does not stop the others. A part that has a line is not run again, so that the
# script can be repeated after an interruption; delete a line to repeat its part. The row liger fails
# without pip install 'shardway[liger]'.
set -euo pipefail

shape=${SHAPE:-8b} rows=(lora compile liger short-packed) patience=1
if [[ ${1:-} == --cpu ]]; then
    shift
    shape=tiny rows=(lora short-packed) patience=8
    export CUDA_VISIBLE_DEVICES=
fi
output=$(realpath "${1:-first_gpu.jsonl}")
scratch=$(realpath "${SCRATCH:-${output%.jsonl}}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
if [[ ! -x $(command -v "$python") ]]; then
    echo "$python is not there → make .venv/user, or PYTHON=/path/to/python" >&2
    exit 2
fi
mkdir -p "$scratch"
touch "$output"
export HF_HUB_OFFLINE=1 SHARDWAY_CACHE=${SHARDWAY_CACHE:-$scratch/cache}

# part SECONDS PART [NAME]: run a part of tools/first_gpu.py and record what it found.
part() {
    local limit=$(($1 * patience)) words=("${@:2}")
    local id="${words[*]}" status=ok found=null began=$SECONDS
    if grep -qF "{\"part\": \"$id\"," "$output"; then
        echo "$id: has a line in $output"
        return
    fi
    local log="$scratch/${id// /-}"
    timeout --kill-after=20 "$limit" "$python" tools/first_gpu.py "${words[@]}" \
        --scratch "$scratch" --shape "$shape" >"$log.out" 2>"$log.log" || status=$?
    case $status in
        ok) found=$(tail -n 1 "$log.out") ;;
        124 | 137) status="more than $limit seconds" ;;
        *) status="failed, see $log.log" ;;
    esac
    printf '{"part": "%s", "seconds": %d, "status": "%s", "found": %s}\n' \
        "$id" "$((SECONDS - began))" "$status" "$found" >>"$output"
    tail -n 1 "$output"
}

part 60 machine
for strategy in single ddp fsdp hsdp zero1 zero2 zero3 fsdp_offload zero2_offload zero3_offload; do
    part 90 smoke "$strategy"
done
part 90 experts fsdp
part 90 experts zero3
part 180 resume
part 240 model "$shape"
for row in "${rows[@]}"; do
    part 240 bench "$row"
done
part 240 plan
part 240 profile
part 300 save

failed=$(grep -cvF '"status": "ok"' "$output" || true)
echo "$output: $(wc -l <"$output") parts, $failed not ok"
[[ $failed == 0 ]]
