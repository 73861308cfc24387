"""`minigpt doctor`: what this machine has of what MiniGPT needs, and for everything that is missing, what to do.

A check never raises: what it cannot find out is a finding too. Only what stops a run from starting is an error; what
makes it slower or smaller is a warning.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from minigpt.observe.hardware import (
    cpu_bf16_units,
    cpu_model,
    gpu_descriptions,
    memory_bytes,
    package_version,
)
from minigpt.system import usable_cores

OK, WARNING, ERROR = "ok", "warning", "error"
PACKAGES = ("deepspeed", "transformers", "tokenizers", "pyarrow", "safetensors", "ray")
GIB = 2**30
INSTALL_AGAIN = "Run ./launch/test.sh or `pip install -c constraints.txt -e .` in the checkout."
INSTALL_COMPILER = (
    "Install one, for example `sudo apt-get install build-essential python3-dev`, or name one that is here with CXX."
)


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        name: What was looked at.
        status: `ok`, `warning` (it works, but slower or smaller) or `error` (a run would not start).
        detail: What was found.
        remedy: One sentence that says what to do; empty when ok.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


def doctor(folder: Path = Path("."), not_compiled: str = "") -> list[Check]:
    """Look the machine over; takes a few seconds.

    Args:
        folder: Where runs would be written.
        not_compiled: Why our own code for CPUs could not be compiled, if it was tried.
    """
    needed = minimum_versions()
    return [
        check_python(needed.get("python", ())),
        check_torch(needed.get("torch", ())),
        *(check_package(name, needed.get(name, ())) for name in PACKAGES),
        check_compiler(),
        check_kernels(not_compiled),
        check_ninja(),
        check_cpu(),
        check_gpu(),
        check_bf16(),
        check_memory(memory_bytes()),
        check_disk(folder),
        check_shared_memory(),
    ]


def print_doctor(folder: Path = Path("."), not_compiled: str = "") -> int:
    """Print the findings as a table with the remedies under it; returns the exit status, 1 when there is an error."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, checks = Console(), doctor(folder, not_compiled)
    marks = {OK: Text("ok", "green"), WARNING: Text("warning", "yellow"), ERROR: Text("error", "bold red")}
    table = Table("", "check", "found", box=None, pad_edge=False)
    for check in checks:
        table.add_row(marks[check.status], check.name, Text(check.detail))
    console.print(table)
    for check in checks:
        if check.remedy:
            console.print(
                f"{check.status}: {check.name}: {check.remedy}", markup=False, highlight=False, soft_wrap=True
            )
    failed = any(check.status == ERROR for check in checks)
    console.print("Something above stops a run from starting." if failed else "Ready to train.")
    return int(failed)


def minimum_versions() -> dict[str, tuple[int, ...]]:
    """Of Python and each package, the least version that our own metadata ask for; empty when there are none."""
    try:
        metadata = importlib.metadata.metadata("minigpt")
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [f"python{metadata['Requires-Python']}", *(metadata.get_all("Requires-Dist") or [])]
    found = (re.match(r"([\w-]+)(?:\[.*?\])?>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: parse_version(match[2]) for match in found if match}


def check_python(minimum: tuple[int, ...]) -> Check:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= minimum:
        return Check("Python", OK, found)
    needed = ".".join(map(str, minimum))
    return Check("Python", ERROR, found, f"Install Python {needed} or newer and run the launch script with it.")


def check_package(name: str, minimum: tuple[int, ...] = ()) -> Check:
    """Whether a package is installed, in that version or a newer one. It is not imported."""
    found = package_version(name)
    if found is None:
        return Check(name, ERROR, "not installed", INSTALL_AGAIN)
    if parse_version(found) < minimum:
        needed = ".".join(map(str, minimum))
        return Check(name, ERROR, found, f"Version {needed} or newer is needed. {INSTALL_AGAIN}")
    return Check(name, OK, found)


def parse_version(text: str) -> tuple[int, ...]:
    """`2.13.0+cpu` → (2, 13, 0); stops at the first part that is not a number."""
    parts = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def check_torch(minimum: tuple[int, ...]) -> Check:
    """torch is installed, new enough, loads, and computes a gradient."""
    installed = check_package("torch", minimum)
    if installed.status != OK:
        return installed
    try:
        import torch

        x = torch.ones(3, requires_grad=True)
        (x * x).sum().backward()
    except (ImportError, OSError, RuntimeError) as error:
        return Check("torch", ERROR, f"{installed.detail} does not work: {error}", INSTALL_AGAIN)
    return Check("torch", OK, f"{torch.__version__}, {torch.get_num_threads()} CPU threads")


def check_compiler() -> Check:
    """A C++ compiler that finds its own headers and Python's; `torch.compile` and DeepSpeed's extensions need it."""
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    slower = "without it runs start with --compile false and are slower."
    if found is None:
        return Check("C++ compiler", WARNING, f"{name} not found", f"{INSTALL_COMPILER} It is optional: {slower}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "check.cpp")
        source.write_text("#include <Python.h>\n#include <cmath>\nint main() { return std::isnan(0.0); }\n")
        command = [found, "-I", sysconfig.get_paths()["include"], "-fsyntax-only", str(source)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Check(
                "C++ compiler", WARNING, f"{found} does not run: {error}", f"{INSTALL_COMPILER} Or go on: {slower}"
            )
    if result.returncode != 0:
        problem = next((line for line in result.stderr.splitlines() if "error" in line), "unknown error")
        return Check("C++ compiler", WARNING, f"{found}: {problem}", f"{INSTALL_COMPILER} Or go on: {slower}")
    return Check("C++ compiler", OK, found)


def check_kernels(not_compiled: str) -> Check:
    """Our own code for CPUs: attention, the loss, decoding."""
    if not not_compiled:
        return Check("CPU code", OK, "nothing stands in its way")
    remedy = (
        "Set XDG_CACHE_HOME to a folder where you may write and run files, CXX to a C++17 compiler with OpenMP, and "
        "leave MINIGPT_NATIVE unset."
    )
    return Check("CPU code", WARNING, f"could not be compiled: {not_compiled}", f"{remedy} Without it torch is slower.")


def check_ninja() -> Check:
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if found is None:
        remedy = "Run `pip install ninja` in this environment: DeepSpeed builds its extensions with it."
        return Check("ninja", WARNING, "not found", remedy)
    return Check("ninja", OK, found)


def check_cpu() -> Check:
    cores = usable_cores()
    detail = f"{cpu_model()}, {cores} usable {'core' if cores == 1 else 'cores'}"
    if cores == 1:
        return Check("CPU", WARNING, detail, "Give the machine or container two cores or more if you can.")
    return Check("CPU", OK, detail)


def check_gpu() -> Check:
    """No GPU is fine; a GPU that torch cannot see is not."""
    gpus = gpu_descriptions()
    if gpus:
        return Check("GPU", OK, ", ".join(f"{gpu['name']} ({gpu['memory_gb']:.0f} GiB)" for gpu in gpus))
    if shutil.which("nvidia-smi") is None:
        return Check("GPU", OK, "none; training runs on the CPU")
    if (package_version("torch") or "").endswith("+cpu"):
        remedy = "Install the CUDA build of torch: remove .venv and run the launch script again."
        return Check("GPU", WARNING, "an NVIDIA driver is here, but this torch is the CPU build", remedy)
    remedy = "Compare the driver's CUDA version in `nvidia-smi` with torch's, and look at CUDA_VISIBLE_DEVICES."
    return Check("GPU", WARNING, "an NVIDIA driver is here, but torch sees no GPU", remedy)


def check_bf16() -> Check:
    gpus = gpu_descriptions()
    units = ["cuda"] if any(gpu["bf16"] for gpu in gpus) else [] if gpus else cpu_bf16_units()
    if units:
        return Check("bf16", OK, units[0])
    device = "GPU" if gpus else "CPU"
    remedy = "Nothing to do: --dtype auto trains in fp32 here, two to four times slower."
    return Check("bf16", WARNING, f"this {device} has no bf16 units", remedy)


def check_memory(total: int) -> Check:
    detail = f"{total / GIB:.1f} GiB"
    if total < 2 * GIB:
        return Check("memory", ERROR, detail, "Give the machine or container 4 GiB or more; 2 GiB is the least.")
    if total < 4 * GIB:
        return Check("memory", WARNING, detail, "Use one packing worker (--workers 1) and a small --micro_batch_size.")
    return Check("memory", OK, detail)


def check_disk(folder: Path) -> Check:
    existing = next(path for path in [folder.resolve(), *folder.resolve().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIB:.1f} GiB free in {existing}"
    if not os.access(existing, os.W_OK):
        return Check(
            "disk", ERROR, f"{existing} is not writable", "Go to a folder that you may write to, or use --save_dir."
        )
    if free < GIB:
        return Check("disk", ERROR, detail, "Free some space, or write runs to another disk with --save_dir.")
    if free < 5 * GIB:
        return Check("disk", WARNING, detail, "Keep few checkpoints, or write runs to another disk with --save_dir.")
    return Check("disk", OK, detail)


def check_shared_memory() -> Check:
    """Ray's object store and NCCL live in /dev/shm, which containers make 64 MiB small by default."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Check("shared memory", OK, "no /dev/shm on this system")
    total = shutil.disk_usage(path).total
    detail = f"{total / GIB:.1f} GiB in /dev/shm"
    if total < GIB:
        remedy = "Start the container with --shm-size=4g before using PPO, GRPO or several GPUs."
        return Check("shared memory", WARNING, detail, remedy)
    return Check("shared memory", OK, detail)
