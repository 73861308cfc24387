#!/usr/bin/env bash
# Everything a change must pass: sets up .venv (once), then linter, formatter, type checker and tests.
# All tests run file by file in two processes; options go to a single pytest: ./launch/test.sh tests/model -k packed
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
ensure_environment
cd "$ROOT"

# The chat page is tested in a real browser. Where we are root (containers, CI) it is installed; a person is told how,
# before an hour of tests rather than after it.
chromium() { python tests/serve/chromium.py >/dev/null; }
if ! chromium 2>/dev/null && [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    say "installing chromium, which the tests of the chat page need (once)"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium; } >/dev/null 2>&1 || true
fi
[[ $# -gt 0 ]] || chromium # with options it may not be needed: then the tests of the page say so

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
[[ $# -gt 0 ]] || set -- -n 2 --dist loadfile
export OMP_WAIT_POLICY=passive # threads that wait leave the core to the other process instead of spinning
step "pytest" pytest "$@"
printf '\n== summary: %s ==\n' "${summary% · }"
exit "$failed"
