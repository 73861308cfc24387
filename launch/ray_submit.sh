#!/usr/bin/env bash
# Runs a command on a Ray cluster and ends with the command's exit status:
#
#   ./launch/ray_submit.sh [OPTIONS] -- minigpt train grpo --data /shared/prompts --save_dir /shared/out/grpo …
#
# The files that git tracks here are sent and used there; data and runs are not, so name them by absolute paths that are good
# on every node. Ctrl-C ends the following, not the job. See ./launch/ray_submit.sh --help.
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
ensure_environment
exec python -m minigpt.rl.submit "$@"
