#!/usr/bin/env bash
# Everything that is to be known about this code on one GPU, in at most 8 minutes: the tests marked `gpu`, then the
# benchmarks, the most important first. JSON files and the Markdown tables go to OUT, each as soon as it is known.
# Left out, since they measure a CPU on any machine: generate.py without --gpu, kernels.py, rl.py (it places its roles on
# CPUs), packing.py, tokenizer.py and startup.py; and profile_step.py, whose groups are to be read, not compared.
#
#   benchmarks/gpu.sh [OUT]            (default OUT: benchmarks/results)
#   benchmarks/gpu.sh --smoke [OUT]    the same with tiny models and few steps, on any machine
set -uo pipefail
cd "$(dirname "$0")/.."

smoke=()
if [ "${1:-}" = "--smoke" ]; then
    smoke=(--smoke)
    shift
fi
out=${1:-benchmarks/results}
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
mkdir -p "$out"
report="$out/gpu.md"
echo "# MiniGPT on one device" >"$report"
echo >>"$report"
failed=()
deadline=$((SECONDS + 480))
[ "${#smoke[@]}" -gt 0 ] && deadline=$((SECONDS + 1500)) # the limits below are a device's; without bf16 units it takes long

# run NAME SECONDS COMMAND…: its output goes to OUT/NAME.log; a failure is noted and the next one is tried.
run() {
    local name=$1 limit=$2 left=$((deadline - SECONDS))
    shift 2
    [ "${#smoke[@]}" -gt 0 ] && limit=$((5 * limit))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -le 5 ]; then
        failed+=("$name (no time left)")
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

gpu_tests=("$python" -m pytest -m gpu -q --no-header -p no:cacheprovider)
[ "${#smoke[@]}" -gt 0 ] && gpu_tests+=(--collect-only) # they cannot run on every machine
run gpu_tests 75 "${gpu_tests[@]}"
{
    echo "## Tests marked gpu"
    echo
    tail -n 1 "$out/gpu_tests.log"
    echo
} >>"$report"
# bench NAME SECONDS OPTIONS…: benchmarks/NAME.py with its results where the others are.
bench() {
    local name=$1 limit=$2
    shift 2
    run "$name" "$limit" "$python" "benchmarks/$name.py" "$@" --json "$out/$name.json" --markdown "$report" "${smoke[@]}"
}

# The limits, that of the tests included, add up to the 480 seconds above.
bench presets 165 --limit_seconds 45 --steps 12 --tokens_per_step 65536
run generate_gpu 50 "$python" benchmarks/generate.py --gpu --json "$out/generate_gpu.json" --markdown "$report" "${smoke[@]}"
bench train 40 --rounds 3 --steps 20 --peers bf16
bench grpo 40 --rounds 1 --peers
bench sft 30 --rounds 3 --bucket_multiple 128
bench lora 30 --rounds 2
bench dpo 25 --rounds 2
bench serve 25

if [ "${#failed[@]}" -gt 0 ]; then
    {
        echo "## Failed"
        echo
        printf -- '- %s\n' "${failed[@]}"
    } | tee -a "$report"
    exit 1
fi
echo "results: $report"
