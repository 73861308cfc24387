#!/usr/bin/env bash
# Text to chat on a bare machine: sets up .venv (once), then trains a small bilingual model from nothing and shows it.
# Options go to `minigpt quickstart`; see ./launch/quickstart.sh --help.
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
ensure_environment
minigpt quickstart "$@"
printf '\nFor the commands above, enter this environment first:  source %s/bin/activate\n' "$VENV"
