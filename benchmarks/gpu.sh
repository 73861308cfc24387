#!/usr/bin/env bash
# What is to be known about this code on one GPU, in at most 8 minutes: the tests marked `gpu`, tokens/s and MFU of the
# presets, decoding (part 1), then as many of the other benchmarks as there is time for, the most important first. What
# found none is named at the end and has 8 minutes of its own in part 2, 3 or 4. JSON files and Markdown tables go to
# OUT, those of presets and decoding case by case. The tests of reinforcement learning are in part 4, since they start
# many processes; what they have to say of NCCL between GPUs takes two of them and is skipped on one.
# Left out, since they measure a CPU on any machine: generate.py without --gpu, kernels.py, packing.py, tokenizer.py and
# startup.py; and profile_step.py, whose groups are to be read, not compared, and what overlap gains in rl.py.
#
#   benchmarks/gpu.sh [OUT]               (default OUT: benchmarks/results)
#   benchmarks/gpu.sh --part 2 [OUT]      one part only, its table in OUT/gpu-2.md
#   benchmarks/gpu.sh --smoke [OUT]       everything with tiny models and few steps, on any machine
set -uo pipefail
cd "$(dirname "$0")/.."

only=""
if [ "${1:-}" = "--part" ]; then
    only=$2
    shift 2
fi
smoke=()
if [ "${1:-}" = "--smoke" ]; then
    smoke=(--smoke)
    shift
fi
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
mkdir -p "$out"
report="$out/gpu${only:+-$only}.md"
echo "# MiniGPT on one device" >"$report"
echo >>"$report"
failed=() later=()
deadline=$((SECONDS + 480))
[ "${#smoke[@]}" -gt 0 ] && deadline=$((SECONDS + 1500)) # the limits below are a device's; without bf16 units it takes long

part=1
# in_part N: what follows belongs to part N; whether that is to run.
in_part() {
    part=$1
    [ -z "$only" ] || [ "$only" = "$part" ]
}

# run NAME SECONDS COMMAND…: its output goes to OUT/NAME.log; a failure is noted and the next one is tried.
run() {
    local name=$1 limit=$2 left=$((deadline - SECONDS))
    shift 2
    [ "${#smoke[@]}" -gt 0 ] && limit=$((5 * limit))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 45 ]; then # it would only load what it measures
        if [ "$part" = 1 ]; then failed+=("$name (no time left)"); else later+=("$name: benchmarks/gpu.sh --part $part"); fi
        return
    fi
    echo "== $name (at most $limit s)"
    if timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1; then
        tail -n 3 "$out/$name.log"
    else
        failed+=("$name")
        tail -n 15 "$out/$name.log"
    fi
}

# bench NAME SECONDS OPTIONS…: benchmarks/NAME.py with its results where the others are.
bench() {
    local name=$1 limit=$2
    shift 2
    run "$name" "$limit" "$python" "benchmarks/$name.py" "$@" --json "$out/$name.json" --markdown "$report" "${smoke[@]}"
}

# gpu_tests NAME SECONDS TITLE FILE…: the tests marked `gpu` in these files; their last line goes into the report.
gpu_tests() {
    local name=$1 limit=$2 title=$3
    shift 3
    local tests=("$python" -m pytest -m gpu -q --no-header -p no:cacheprovider "$@")
    [ "${#smoke[@]}" -gt 0 ] && tests+=(--collect-only) # they cannot run on every machine
    rm -f "$out/$name.log"
    run "$name" "$limit" "${tests[@]}"
    [ -f "$out/$name.log" ] || return # no time was left
    printf '## %s\n\n%s\n\n' "$title" "$(tail -n 1 "$out/$name.log")" >>"$report"
}

# The limits of each part add up to at most the 480 seconds above. A fresh process takes 15 seconds to begin and about a
# minute to compile; what compares two programs starts them together.
if in_part 1; then
    mapfile -t files < <(grep -rlE "mark\.gpu" tests --include='test_*.py' --exclude-dir=rl)
    gpu_tests gpu_tests 60 "Tests marked gpu" "${files[@]}"
    bench presets 345 --limit_seconds 110 --steps 16 --tokens_per_step 65536 --compile 100m 300m
    run generate_gpu 75 "$python" benchmarks/generate.py --gpu --json "$out/generate_gpu.json" --markdown "$report" "${smoke[@]}"
fi
if in_part 2; then
    bench train 120 --rounds 3 --steps 20 --peers bf16
    bench sft 130 --rounds 2 --bucket_multiple 128
    bench serve 70 --rounds 1
    run presets_1b 150 "$python" benchmarks/presets.py --presets 1b --limit_seconds 140 --steps 16 --tokens_per_step 65536 \
        --json "$out/presets_1b.json" --markdown "$report" "${smoke[@]}"
fi
if in_part 3; then
    bench grpo 160 --rounds 1 --peers
    bench lora 160 --rounds 2
    bench dpo 150 --rounds 2
fi
if in_part 4; then
    mapfile -t files < <(grep -rlE "mark\.gpu" tests/rl --include='test_*.py')
    gpu_tests gpu_rl_tests 240 "Tests marked gpu, reinforcement learning" "${files[@]}"
    bench rl 235 --gpu --parts publish memory --rounds 5
fi

if [ "${#later[@]}" -gt 0 ]; then
    {
        echo "## Not run: no time was left"
        echo
        printf -- '- %s\n' "${later[@]}"
        echo
    } | tee -a "$report"
fi
if [ "${#failed[@]}" -gt 0 ]; then
    {
        echo "## Failed"
        echo
        printf -- '- %s\n' "${failed[@]}"
    } | tee -a "$report"
    exit 1
fi
echo "results: $report"
