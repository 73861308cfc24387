#!/usr/bin/env bash
# A Ray cluster of your own machines, for RL over several of them:
#
#   ./launch/ray_cluster.sh head [OPTIONS]           on one machine: the head, with the job server on port 8265
#   ./launch/ray_cluster.sh join ADDRESS [OPTIONS]   on every other one; `head` prints ADDRESS
#   ./launch/ray_cluster.sh stop                     ends what this script started on this machine, nothing else; jobs that
#                                                    still run are killed (let them save: ./launch/ray_submit.sh --stop)
#
# OPTIONS go to `ray start` (see `ray start --help`). Most used: --port 6379 (head), --dashboard-port 8265 (head),
# --dashboard-host 0.0.0.0 (head: take jobs from other machines too), --num-cpus N, --num-gpus N, --node-ip-address IP.
#
# Ray runs the code of anybody who reaches its ports, so its token authentication is always on here. The token is where Ray
# looks for it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token. `head` makes one where there is none; the
# other machines need the same one. Traffic is not encrypted: keep the ports inside a network that you trust.
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

STATE="${TMPDIR:-/tmp}/minigpt-ray-$(id -u)" # one file a node that runs here: its process id; beside it, its log
START_S=60                                   # a node that is not up by then will not come
STOP_S=5                                     # a running job holds Ray back longer; then its processes are killed

help() { sed -n '2,/^source/ { /^source/d; s/^# \{0,1\}//; p; }' "${BASH_SOURCE[0]}"; }

token_file() { printf '%s\n' "${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"; }

make_token() { # readable by nobody else; Ray's own command would leave it readable by all
    local file
    file="$(token_file)"
    if [[ -z "${RAY_AUTH_TOKEN:-}" && ! -s "$file" ]]; then
        mkdir -p "$(dirname "$file")"
        (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$file")
        say "made a token: $file"
    fi
    if [[ -z "${RAY_AUTH_TOKEN:-}" ]]; then chmod 600 "$file"; fi
}

is_ours() { # $1: a process id that this script wrote; ids are used again, so the command must be ours too
    [[ -r "/proc/$1/cmdline" ]] && tr '\0' ' ' <"/proc/$1/cmdline" | grep -q "ray start --block"
}

start_node() { # head or worker, options of `ray start`; prints the log's name when the node is up
    local kind="$1" log pid waited=0
    shift
    mkdir -p -m 700 "$STATE"
    [[ -O "$STATE" ]] || die "$STATE belongs to somebody else: set TMPDIR to a folder of yours"
    log="$(mktemp "$STATE/$kind-XXXXXX.log")"
    # --block ties Ray's processes to this one: when it ends, however it ends, the kernel ends them. setsid makes them a
    # process group of their own and keeps them running when the terminal is closed.
    setsid ray start --block --disable-usage-stats --log-style pretty --log-color false "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    printf '%s\n' "$pid" >"${log%.log}.pid"
    until grep -q "^Ray runtime started" "$log"; do
        if ! kill -0 "$pid" 2>/dev/null || ((waited++ > START_S * 5)); then
            kill -KILL -- "-$pid" 2>/dev/null || true
            rm -f "${log%.log}.pid"
            tail -n 8 "$log" >&2
            die "Ray did not start; its reason stands above, all of it in $log"
        fi
        sleep 0.2
    done
    printf '%s\n' "$log"
}

head_node() {
    local log address dashboard token
    make_token
    token="${RAY_AUTH_TOKEN:+the variable RAY_AUTH_TOKEN}"
    log="$(start_node head --head --include-dashboard true "$@")" || exit 1
    address="$(sed -n "s/.*ray start --address='\(.*\)'.*/\1/p" "$log" | head -n 1)"
    dashboard="$(sed -n "s|.*RAY_API_SERVER_ADDRESS='\(.*\)'.*|\1|p" "$log" | sed "s/' ray.*//" | head -n 1)"
    cat <<END
The head is up at $address, its job server at $dashboard; log: $log

on every other machine (same checkout; same token, in ${token:-$(token_file)}):
  ./launch/ray_cluster.sh join $address
a job:
  ./launch/ray_submit.sh --address $dashboard -- minigpt train grpo --help
what the cluster has:
  RAY_AUTH_MODE=token $VENV/bin/ray status --address $address
to end:
  ./launch/ray_cluster.sh stop
END
}

join_node() {
    [[ $# -gt 0 && "$1" != -* ]] || die "join which cluster? ./launch/ray_cluster.sh join HOST:PORT, as \`head\` printed it"
    local address="$1" log
    shift
    python -m minigpt.rl.cluster "$address" || exit 1 # is there a head, and does it take our token?
    log="$(start_node worker --address "$address" "$@")" || exit 1
    say "This machine has joined $address; log: $log"
}

descendants() { # of the process $1, itself included; job drivers have process groups of their own
    local child
    printf '%s\n' "$1"
    for child in $(cat "/proc/$1"/task/*/children 2>/dev/null); do descendants "$child"; done
}

stop_nodes() { # workers first: they wait for an answer of the head when they leave
    local file pid pids count=0 waited
    for file in "$STATE"/worker-*.pid "$STATE"/head-*.pid; do
        [[ -e "$file" ]] || continue
        pid="$(cat "$file")"
        if is_ours "$pid"; then
            mapfile -t pids < <(descendants "$pid")
            kill -TERM "$pid"
            for ((waited = 0; waited < STOP_S * 5; waited++)); do
                kill -0 "${pids[@]}" 2>/dev/null || break # fails when none is left
                sleep 0.2
            done
            kill -KILL "${pids[@]}" 2>/dev/null || true
            count=$((count + 1))
        fi
        rm -f "$file"
    done
    say "stopped $count Ray node(s) on this machine"
}

command="${1:-}"
[[ $# -eq 0 ]] || shift
case "$command" in
-h | --help | help) help && exit ;;
head | join | stop) ;;
*) die "${command:+there is no command $command; }use head, join ADDRESS or stop (./launch/ray_cluster.sh --help explains)" ;;
esac
ensure_environment
export RAY_AUTH_MODE=token
export RAY_JOB_STOP_WAIT_TIME_S="${RAY_JOB_STOP_WAIT_TIME_S:-60}" # a stopped job saves a checkpoint first; Ray gives it 3 s
case "$command" in
head) head_node "$@" ;;
join) join_node "$@" ;;
stop) stop_nodes ;;
esac
