"""Compiled code for CPUs: a C++ file becomes a library that Python calls with addresses of tensors.

It is compiled once on a machine, into the user's cache folder or else one among the temporary files, and loaded without
any binding library. Where that is not possible callers compute the same with torch. MINIGPT_NATIVE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from minigpt.system import cache_folders, sync

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
COMPILE_SECONDS = 120
HEADERS = sorted(Path(__file__).parent.glob("*.h"))  # what the sources include


@functools.cache
def load_native(source: Path) -> ctypes.CDLL | None:
    """The compiled file, compiled now if this machine has not done it yet; None where that is not possible."""
    library, problem = build(source)
    if problem and not nothing_to_build_with():  # of that there is nothing to say at every start
        _say(problem)
    return library


@functools.cache  # once, not for every file
def _say(problem: str) -> None:
    print(
        f"note: code for this CPU could not be compiled ({problem}), so torch computes the same, slower; "
        "`minigpt doctor` says what to do",
        file=sys.stderr,
        flush=True,
    )


def nothing_to_build_with() -> str:
    """Why nothing is compiled here at all, or nothing."""
    if os.environ.get("MINIGPT_NATIVE") == "0":
        return "MINIGPT_NATIVE=0 switches it off"
    name = os.environ.get("CXX") or "g++"
    return f"there is no {name}" if shutil.which(name) is None else ""


def build(source: Path) -> tuple[ctypes.CDLL | None, str]:
    """The compiled file, or None and why not."""
    if reason := nothing_to_build_with():
        return None, reason
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    assert compiler is not None
    code = (path.read_text(encoding="utf-8") for path in (source, *HEADERS))
    key = "\0".join((*code, *FLAGS, compiler, _processor()))
    name = f"{source.stem}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    problem = "there is no folder to keep it in"
    for folder in cache_folders():
        try:
            return _load(folder / name, [compiler, *FLAGS, str(source)]), ""
        except subprocess.CalledProcessError as error:
            lines = error.stderr.decode(errors="replace").splitlines() or [f"status {error.returncode}"]
            return None, f"{compiler}: {next((line for line in lines if 'error' in line), lines[-1])}"
        except subprocess.TimeoutExpired:
            return None, f"{compiler} took more than {COMPILE_SECONDS} seconds"
        except OSError as error:  # nothing can be written there, or nothing that is to be run
            problem = f"{folder}: {error.strerror or error}"
    return None, problem


def _load(target: Path, command: list[str]) -> ctypes.CDLL:
    """The library at `target`, made by the command if it is not there or damaged."""
    if target.exists():
        with suppress(OSError):  # empty or no library: built once more
            return ctypes.CDLL(str(target))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # other processes see a whole file or none
        built = Path(folder) / "native.so"
        command = [*command, "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
        sync(built)  # the loader crashes on half a library
        built.replace(target)
    return ctypes.CDLL(str(target))


def _processor() -> str:
    """What the code is compiled for: machines that share a home folder may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
