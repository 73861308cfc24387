#!/usr/bin/env bash
# Everything a change must pass: sets up .venv (once), then linter, formatter, type checker and tests.
# Options go to pytest: ./launch/test.sh tests/model -k packed
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
ensure_environment
cd "$ROOT"

summary="" failed=0
step() { # name, command …
    local name="$1" outcome=ok
    shift
    printf '\n== %s ==\n' "$name"
    "$@" || { outcome="FAILED" && failed=1; }
    summary+="$name $outcome · "
}

step "ruff check" ruff check .
step "ruff format" ruff format --check .
step "mypy" mypy
step "pytest" pytest "$@"
printf '\n== summary: %s ==\n' "${summary% · }"
exit "$failed"
