"""What machine this is, and how fast it multiplies matrices.

The matrix-product rate is the yardstick for model FLOPs utilisation (MFU): on a GPU that we know by name it is the
dense bf16 rate of the data sheet, elsewhere it is measured in the same process. The rest describes the machine for
reports, so that a number is never without the hardware it was measured on.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.system import read_cgroup, usable_cores

if TYPE_CHECKING:
    import torch

# Dense (not sparse) bf16 tensor-core rates in FLOP/s from NVIDIA's data sheets; the first whose words are in the
# device's name counts, so longer names come first.
DENSE_BF16_PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("B100", 1800e12),
    ("H200 NVL", 836e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 NVL", 836e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 5090", 209.5e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)

# A bf16 product that is this much faster than the fp32 one comes from bf16 units; without them it is slower.
BF16_UNITS_SPEEDUP = 1.3


@dataclass(frozen=True)
class Peak:
    """The matrix-product rate that MFU is a fraction of.

    Args:
        flops: FLOP/s.
        source: Where the number comes from, for reports.
    """

    flops: float
    source: str


@dataclass(frozen=True)
class Probe:
    """What a second of measuring says about this machine.

    Args:
        kind: `fp32` (no bf16 units), `cpu-bf16` or `gpu`.
        device: `cpu` or `cuda`.
        dtype: The precision to train in, `fp32` or `bf16`, as `--dtype` takes it.
        matmul_flops: Rate of a matrix product of that type, FLOP/s.
        threads: CPU threads that torch computes with.
        memory_gb: Memory of the device, GiB.
    """

    kind: str
    device: str
    dtype: str
    matmul_flops: float
    threads: int
    memory_gb: float

    def training_seconds(self, parameters: int, tokens: int, *, efficiency: float) -> float:
        """Predicted seconds to train on `tokens`: 6 FLOPs a parameter and token, at this fraction of the matmul rate.

        `parameters` are those that take part in matrix products (tied embeddings count once, for the output layer).
        """
        return 6.0 * parameters * tokens / (self.matmul_flops * efficiency)

    def describe(self) -> str:
        """One sentence for the user."""
        where = "GPU" if self.device == "cuda" else f"CPU, {self.threads} threads"
        return f"{where}: {self.matmul_flops / 1e12:.2f} TFLOP/s in {self.dtype}, {self.memory_gb:.0f} GB"


def describe_hardware() -> dict[str, Any]:
    """The machine and the versions that matter, as a JSON-able dictionary.

    `cores` are those this process may use (affinity and container quota), `ram_gb` is what it may fill (GiB, container
    limit), `bf16` names the units that compute bf16: `cuda`, `amx_bf16`, `avx512_bf16`, `arm_bf16` or `none`.
    """
    gpus = gpu_descriptions()
    cpu_bf16 = cpu_bf16_units()
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "ram_gb": round(memory_bytes() / 2**30, 1),
        "gpus": gpus,
        "bf16": "cuda" if any(gpu["bf16"] for gpu in gpus) else cpu_bf16[0] if cpu_bf16 else "none",
        "os": platform.platform(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("torch", "deepspeed", "transformers", "tokenizers")},
    }


def summarise_hardware(hardware: dict[str, Any]) -> str:
    """`describe_hardware()` in a few words, e.g. `2 cores of AMD EPYC, 23.5 GB, bf16 by avx512_bf16`."""
    cores, model, memory = (hardware.get(key, "?") for key in ("cores", "cpu", "ram_gb"))
    names = [gpu["name"] for gpu in hardware.get("gpus") or []]
    gpus = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join([*gpus, f"{cores} cores of {model}, {memory} GB, bf16 by {hardware.get('bf16', '?')}"])


def package_version(name: str) -> str | None:
    """The installed version, or None; reads metadata only, so that it costs nothing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_commit() -> str | None:
    """The git commit of the source tree, when it is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none (macOS)."""
    try:
        entry = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in entry.splitlines())}


def cpu_model() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_bf16_units() -> list[str]:
    """Which bf16 instructions the CPU has, best first."""
    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split())
    names = {"amx_bf16": "amx_bf16", "avx512_bf16": "avx512_bf16", "bf16": "arm_bf16"}
    return [name for flag, name in names.items() if flag in flags]


def memory_bytes() -> int:
    """Memory this process may fill: the machine's, or a container's limit."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = read_cgroup("memory.max", "memory/memory.limit_in_bytes")
    return min(installed, int(limit)) if limit.isdigit() else installed


def gpu_descriptions() -> list[dict[str, Any]]:
    """Name, memory (GiB), compute capability and bf16 support of each visible CUDA device."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": device.name,
            "memory_gb": round(device.total_memory / 2**30, 1),
            "capability": f"{device.major}.{device.minor}",
            "bf16": device.major >= 8,
        }
        for device in devices
    ]


def known_gpu_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None when unknown, or a slice (MIG) or a variant of a known one."""
    words = f" {name.replace('-', ' ')} ".upper()
    if any(f" {variant} " in words for variant in ("MIG", "LAPTOP", "TI", "D")):
        return None
    return next((flops for known, flops in DENSE_BF16_PEAKS if f" {known.upper()} " in words), None)


def peak_flops(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Peak:
    """The rate that MFU is computed against on this device, for this compute type (default bf16).

    A known GPU in bf16: its data sheet. Everything else, CPUs among them: measured here, now.
    """
    import torch

    device, dtype = torch.device(device), dtype or torch.bfloat16
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = known_gpu_peak(name)
        if known is not None:
            return Peak(known, f"{name}, dense bf16 by its data sheet")
    short = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}.get(dtype, str(dtype))
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Peak(measure_matmul_rate(dtype, device), f"{short} matrix product measured on this {device.type}{threads}")


def measure_matmul_rate(
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu", seconds: float = 0.3
) -> float:
    """The best rate of a square matrix product in FLOP/s: several sizes, many repetitions, the fastest counts.

    The fastest, since anything else that runs on the machine only ever slows a product down. Takes about `seconds`
    (a slow machine skips the larger sizes) and uses torch's current number of threads.
    """
    import torch

    device, dtype = torch.device(device), dtype or torch.bfloat16
    sizes = (2048, 4096, 8192) if device.type == "cuda" else (256, 512, 1024, 2048)
    started, best = time.perf_counter(), 0.0
    with torch.no_grad():
        for index, size in enumerate(sizes):
            if best and 2.0 * size**3 / best > seconds:
                break
            until = started + seconds * (index + 1) / len(sizes)
            best = max(best, _square_matmul_rate(size, dtype, device, until))
    return best


def _square_matmul_rate(size: int, dtype: torch.dtype, device: torch.device, until: float) -> float:
    """Best FLOP/s of an n×n product; at least one timed product, then repeated until that moment."""
    import torch

    left = torch.randn(size, size, dtype=torch.float32).to(device=device, dtype=dtype)
    right = torch.randn(size, size, dtype=torch.float32).to(device=device, dtype=dtype)
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)
    shortest = float("inf")
    while True:
        shortest = min(shortest, _time_matmul(left, right, out, device))
        if time.perf_counter() >= until:
            return 2.0 * size**3 / shortest


def _time_matmul(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, device: torch.device) -> float:
    """Seconds of one product; on a GPU the mean of ten, so that launching them does not count."""
    import torch

    if device.type != "cuda":
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        torch.mm(left, right, out=out)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / 10


def probe_machine(seconds: float = 1.0) -> Probe:
    """Measure for about `seconds` what kind of machine this is: with a GPU, with bf16 units in its CPU, or neither.

    The CPU's kind is measured, not read from its flags: what counts is whether torch's bf16 product is faster.
    """
    import torch

    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 2**30
        bf16 = torch.cuda.get_device_capability(0)[0] >= 8
        rate = measure_matmul_rate(torch.bfloat16 if bf16 else torch.float32, "cuda", seconds)
        return Probe("gpu", "cuda", "bf16" if bf16 else "fp32", rate, threads, memory_gb)
    memory_gb = memory_bytes() / 2**30
    fp32_rate = measure_matmul_rate(torch.float32, "cpu", seconds / 2)
    bf16_rate = measure_matmul_rate(torch.bfloat16, "cpu", seconds / 2)
    if bf16_rate > BF16_UNITS_SPEEDUP * fp32_rate:
        return Probe("cpu-bf16", "cpu", "bf16", bf16_rate, threads, memory_gb)
    return Probe("fp32", "cpu", "fp32", fp32_rate, threads, memory_gb)
