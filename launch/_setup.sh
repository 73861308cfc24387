# Sourced by the scripts beside it: makes .venv once, with the versions of constraints.txt, and puts it first in PATH.
# Nothing outside the repository is changed. PYTHON=/path/to/python3 chooses the interpreter.

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
STAMP="$VENV/minigpt-setup" # device and hash of what was installed; written when everything is there
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

die() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

say() { printf '%s\n' "$1" >&2; }

device() { # cuda or cpu; asks no nvidia-smi, which can take seconds. The second file is the driver under WSL2.
    if [[ -e /dev/nvidiactl || -e /usr/lib/wsl/lib/libcuda.so.1 ]]; then echo cuda; else echo cpu; fi
}

wanted_stamp() {
    printf '%s %s %s\n' "$(device)" "$(cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | sha256sum | cut -c1-64)" "$ROOT"
}

find_python() { # prints the first interpreter that is new enough and can make an environment
    local candidate old="" bare="" candidates=(python3 python3.12 python3.11 python3.13 python3.14)
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            old+="$("$candidate" -c 'import sys; print(" Python " + sys.version.split()[0])' 2>/dev/null || true)"
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            bare="$candidate"
        else
            command -v "$candidate"
            return
        fi
    done
    if [[ -n "$bare" ]]; then
        die "$bare has no venv module: install it (Debian, Ubuntu: sudo apt-get install python3-venv) and run this again"
    fi
    die "Python 3.11 or newer is needed and ${PYTHON:-python3} is ${old:-not installed}: install it, or name one with PYTHON=/path/to/python3"
}

check_compiler() { # $1: the interpreter
    if ! command -v "${CXX:-g++}" >/dev/null; then
        die "${CXX:-g++} is missing, and torch.compile needs a C++ compiler: install one (Debian, Ubuntu: sudo apt-get install g++) or name it with CXX"
    fi
    if ! "$1" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())'; then
        say "note: Python's headers are missing, so nothing will be compiled and training is slower (Debian, Ubuntu: sudo apt-get install python3-dev)"
    fi
}

install() { # pip with the pinned versions
    "$VENV/bin/python" -m pip --disable-pip-version-check -qq install --constraint "$ROOT/constraints.txt" "$@" ||
        die "pip could not install $*; its reason stands above: mend it and run the same command again"
}

install_torch() { # the small CPU build where there is no NVIDIA GPU, from PyTorch's own index when it answers
    local source=()
    if [[ "$(device)" == cpu ]]; then
        if "$VENV/bin/python" -c "import urllib.request as u; u.urlopen('$TORCH_CPU_INDEX/torch/', timeout=5)" 2>/dev/null; then
            source=(--extra-index-url "$TORCH_CPU_INDEX") # pip prefers 2.13.0+cpu to 2.13.0
        else
            say "$TORCH_CPU_INDEX does not answer: taking torch from pip's own index"
        fi
    fi
    install torch "${source[@]}"
}

make_environment() {
    local python clear=()
    python="$(find_python)" || exit 1 # its sentence is on the screen already
    check_compiler "$python"
    # A GPU that came or went wants another build of torch; a moved folder leaves an environment that cannot start, and one
    # that another Python made would be half of each.
    local which='import sys; print(sys.version, sys.base_prefix)'
    if [[ -f "$STAMP" && "$(cut -d' ' -f1,3- "$STAMP")" != "$(wanted_stamp | cut -d' ' -f1,3-)" ]] ||
        [[ "$("$VENV/bin/python" -c "$which" 2>/dev/null)" != "$("$python" -c "$which")" ]] ||
        ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        clear=(--clear)
    fi
    say "setting up $VENV with $("$python" --version) (once; a few minutes)"
    rm -f "$STAMP"
    "$python" -m venv "${clear[@]}" "$VENV" || die "$VENV could not be made; the reason stands above"
    say "  1/3 build tools"
    install setuptools wheel packaging ninja numpy psutil py-cpuinfo
    say "  2/3 torch, for $(device)"
    install_torch
    say "  3/3 everything else"
    # DeepSpeed comes as source and looks at the torch that is installed, hence no build isolation. DS_BUILD_OPS=0: none of
    # its C++ operators is built now; training uses none. Asking each whether it could be fails where there is a GPU and no
    # nvcc, which torch does not need: DS_IGNORE_CUDA_DETECTION leaves the question out.
    DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1 install --no-build-isolation --editable "$ROOT[test]"
    wanted_stamp >"$STAMP"
}

ensure_environment() {
    # Making the environment anew empties it first: never somebody else's, through a link
    [[ ! -L "$VENV" ]] || die "$VENV is a link: remove it, and an environment of this folder's own is made"
    if [[ "$(cat "$STAMP" 2>/dev/null)" != "$(wanted_stamp)" ]]; then
        exec 9<"$ROOT/launch"
        if command -v flock >/dev/null; then flock 9; fi # two scripts started at once: one installs, the other waits
        if [[ "$(cat "$STAMP" 2>/dev/null)" != "$(wanted_stamp)" ]]; then make_environment; fi
        exec 9<&-
    fi
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
}
