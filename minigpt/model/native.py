"""Compiled code for CPUs: a C++ file becomes a library that Python calls with addresses of tensors.

It is compiled once on a machine, into the user's cache folder, and loaded without any binding library. Where there is
no compiler callers compute the same with torch. MINIGPT_NATIVE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
COMPILE_SECONDS = 120
HEADER = Path(__file__).with_name("vectors.h")  # what every source includes


@functools.cache
def load_native(source: Path) -> ctypes.CDLL | None:
    """The compiled file, compiled now if this machine has not done it yet; None where that is not possible."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None or os.environ.get("MINIGPT_NATIVE") == "0":
        return None
    code = (path.read_text(encoding="utf-8") for path in (source, HEADER))
    key = "\0".join((*code, *FLAGS, compiler, _processor()))
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    target = Path(cache_home) / "minigpt" / f"{source.stem}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if target.exists():
            with suppress(OSError):  # empty or no library: built once more
                return ctypes.CDLL(str(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # other processes see a whole file or none
            built = Path(folder) / "native.so"
            command = [compiler, *FLAGS, str(source), "-o", str(built)]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
            with open(built, "rb") as file:
                os.fsync(file.fileno())  # the loader crashes on half a library
            built.replace(target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    """What the code is compiled for: machines that share a home folder may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
