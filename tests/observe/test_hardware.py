"""What we say of the machine against what other tools say of it."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys

import psutil
import pytest
import torch

from minigpt.observe.hardware import (
    Probe,
    describe_hardware,
    known_gpu_peak,
    measure_matmul_rate,
    memory_bytes,
    peak_flops,
    probe_machine,
    summarise_hardware,
)
from minigpt.system import usable_cores

# No CPU core issues more than two 512-bit AMX-like tile products a cycle: 2,048 bf16 FLOPs, at no more than 7 GHz.
FASTEST_CORE = 2048 * 7e9


def test_the_description_is_json_and_agrees_with_torch_and_python():
    hardware = json.loads(json.dumps(describe_hardware()))
    assert hardware["torch"] == torch.__version__
    assert hardware["python"] == platform.python_version()
    assert len(hardware["gpus"]) == torch.cuda.device_count()
    assert hardware["bf16"] in ("none", "avx512_bf16", "amx_bf16", "arm_bf16", "cuda")
    summary = summarise_hardware(hardware)
    assert hardware["cpu"] in summary
    assert str(hardware["ram_gb"]) in summary


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bf16_units_agree_with_torch_own_detection():
    if torch.cuda.is_available():
        pytest.skip("the description names the GPU's bf16 here")
    avx512, amx = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    assert (describe_hardware()["bf16"] in ("avx512_bf16", "amx_bf16")) == (avx512 or amx)


def test_memory_is_the_machine_s_or_a_container_s_smaller_limit():
    assert 0 < memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_cores_follow_the_affinity_of_the_process():
    script = """
import os
from minigpt.system import usable_cores
print(usable_cores())
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(usable_cores())
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    all_cores, one = (int(line) for line in output.split())
    assert all_cores == usable_cores() <= psutil.cpu_count()
    assert one == 1


QUOTAS = [
    ({"cpu.max": "max 100000"}, 4),
    ({"cpu.max": "20000 100000"}, 1),
    ({"cpu.max": "100000 100000"}, 1),
    ({"cpu.max": "120000 100000"}, 2),
    ({"cpu.max": "75000 25000"}, 3),
    ({"cpu.max": "900000 100000"}, 4),
    ({"cpu/cpu.cfs_quota_us": "-1"}, 4),
    ({"cpu/cpu.cfs_quota_us": "110000", "cpu/cpu.cfs_period_us": "50000"}, 3),
]


@pytest.mark.parametrize(("files", "cores"), QUOTAS)
def test_a_container_s_quota_counts_rounded_up_to_whole_cores(files, cores, tmp_path, monkeypatch):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    monkeypatch.setattr("minigpt.system.CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert usable_cores() == cores
    assert describe_hardware()["cores"] == cores


@pytest.mark.parametrize(("processes", "threads"), [(1, 3), (2, 1), (8, 1)])
def test_training_and_packing_take_no_more_threads_than_the_quota(processes, threads, tmp_path, monkeypatch):
    from data_prep.pack import PackOptions
    from minigpt.trainer.engine import Processes
    from minigpt.trainer.options import TrainOptions
    from minigpt.trainer.setup import configure_torch

    (tmp_path / "cpu.max").write_text("250000 100000\n")
    monkeypatch.setattr("minigpt.system.CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    before = torch.get_num_threads()
    try:
        configure_torch(TrainOptions(), Processes(0, 0, processes, torch.device("cpu")))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert PackOptions("pretrain", [tmp_path], tmp_path).workers == 3


@pytest.mark.parametrize(
    ("name", "tera_flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 836),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX A3000", None),
        ("Tesla T4", None),
    ],
)
def test_gpu_peaks_are_the_data_sheets_and_never_another_model_s(name, tera_flops):
    assert known_gpu_peak(name) == (tera_flops and tera_flops * 1e12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_rate_is_physically_possible(dtype):
    rate = measure_matmul_rate(dtype, "cpu", seconds=0.05)
    assert 1e8 < rate < FASTEST_CORE * psutil.cpu_count()


def test_the_peak_of_a_cpu_says_that_it_was_measured():
    peak = peak_flops("cpu", torch.float32)
    assert peak.flops > 1e8
    assert peak.source == f"fp32 matrix product measured on this cpu, {torch.get_num_threads()} threads"


def test_the_probe_names_a_device_that_is_there_and_a_type_that_fits_its_kind():
    probe = probe_machine(seconds=0.1)
    assert (probe.kind == "gpu") == torch.cuda.is_available()
    assert (probe.kind, probe.dtype) in {("fp32", "fp32"), ("cpu-bf16", "bf16"), ("gpu", "bf16"), ("gpu", "fp32")}
    assert probe.threads == torch.get_num_threads()
    assert f"{probe.matmul_flops / 1e12:.2f} TFLOP/s" in probe.describe()


def test_predicted_seconds_follow_six_flops_a_parameter_and_token():
    probe = Probe("gpu", "cuda", "bf16", matmul_flops=1e15, threads=1, memory_gb=80)
    # 1e9 parameters, 20e9 tokens at 40 % of 1 PFLOP/s: 1.2e20 / 4e14 = 300,000 s
    assert math.isclose(probe.training_seconds(10**9, 20 * 10**9, efficiency=0.4), 300_000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_known_gpu_reaches_but_does_not_exceed_its_data_sheet():
    known = known_gpu_peak(torch.cuda.get_device_name(0))
    if known is None:
        pytest.skip(f"no data sheet rate for {torch.cuda.get_device_name(0)}")
    assert peak_flops("cuda").flops == known
    assert 0.4 * known < measure_matmul_rate(torch.bfloat16, "cuda", seconds=1.0) < 1.05 * known
