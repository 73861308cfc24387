#!/usr/bin/env bash
# One training stage under the deepspeed launcher, on one machine or many:
#
#   ./launch/train.sh STAGE [LAUNCHER OPTIONS --] [OPTIONS OF THE STAGE]
#
#   ./launch/train.sh pretrain --data packed --save_dir out/pretrain                     all GPUs of this machine
#   ./launch/train.sh sft --num_gpus 2 -- --data packed_sft --save_dir out/sft           two processes (also on a CPU)
#   ./launch/train.sh pretrain --hostfile hosts --master_port 29501 -- --config run.yaml many machines
#
# Reinforcement learning (ppo, grpo) starts its processes itself, by Ray: minigpt train grpo, or ./launch/ray_submit.sh.
# What stands before `--` goes to `deepspeed` (see `deepspeed --help`), the rest to the stage (`minigpt train STAGE --help`).
# The environment is the active one, else the repository's .venv; it must stand under the same path on every machine.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

BY_RAY="grpo ppo" # one process, the controller, that starts the others: of several each would train a run of its own

stages() { # the stages that exist, by the names of `minigpt train`
    local file name
    for file in "$ROOT"/minigpt/trainer/train_*.py; do
        name="${file##*/train_}"
        name="${name%.py}"
        [[ " $BY_RAY " == *" $name "* ]] || printf '%s ' "${name/#full_sft/sft}"
    done
}

[[ $# -gt 0 && "$1" != -* ]] || die "which stage? ./launch/train.sh STAGE [launcher options --] [options], where STAGE is one of: $(stages)"
stage="$1"
shift
[[ " $BY_RAY " != *" $stage "* ]] || die "$stage starts its processes itself, by Ray: minigpt train $stage …, or on a cluster ./launch/ray_submit.sh -- minigpt train $stage …"
module="train_${stage/#sft/full_sft}"
[[ -f "$ROOT/minigpt/trainer/$module.py" ]] || die "there is no stage $stage; there are: $(stages)"

launcher=()
for argument in "$@"; do
    if [[ "$argument" == -- ]]; then
        while [[ "$1" != -- ]]; do
            launcher+=("$1")
            shift
        done
        shift
        break
    fi
done

bin="${VIRTUAL_ENV:-$ROOT/.venv}/bin"
if [[ ! -x "$bin/deepspeed" ]]; then
    deepspeed="$(command -v deepspeed)" || die "deepspeed is not installed in $bin: run ./launch/test.sh once, or activate your environment"
    bin="$(dirname "$deepspeed")"
fi
export PATH="$bin:$PATH"

# Several runs may share a machine; the launcher's fixed port would let only one of them start.
if [[ "${launcher[*]}" != *--hostfile* && "${launcher[*]}" != *--master_port* ]]; then
    launcher+=(--master_port "$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')")
fi
exec deepspeed "${launcher[@]}" --no_local_rank --module "minigpt.trainer.$module" "$@"
