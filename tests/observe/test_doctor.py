"""Each check against a machine (or a pretence of one, made by the environment) whose state is known."""

from __future__ import annotations

import importlib.metadata
import os
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from minigpt.observe import doctor as doctor_module
from minigpt.observe.doctor import (
    ERROR,
    GIB,
    OK,
    WARNING,
    check_compiler,
    check_disk,
    check_memory,
    check_ninja,
    check_package,
    check_torch,
    doctor,
    parse_version,
    print_doctor,
)


def test_here_nothing_stops_a_run_and_every_finding_but_ok_has_one_remedy(tmp_path):
    checks = doctor(tmp_path)
    assert not [check for check in checks if check.status == ERROR]
    for check in checks:
        assert check.detail
        assert bool(check.remedy) == (check.status != OK)
        assert not check.remedy or check.remedy.endswith(".")
    assert len({check.name for check in checks}) == len(checks)


def test_the_printed_table_names_every_check_and_gives_the_exit_status(tmp_path, capsys):
    assert print_doctor(tmp_path) == 0
    printed = capsys.readouterr().out
    assert all(check.name in printed for check in doctor(tmp_path))
    assert "Ready to train." in printed


def test_the_environment_at_hand_passes():
    assert check_torch((2, 11)).status == OK
    assert check_package("deepspeed", (0, 19, 8)).status == OK


def test_an_old_version_of_each_package_is_found_as_pyproject_says(monkeypatch):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needed = {r.name: min(Version(s.version) for s in r.specifier) for r in map(Requirement, project["dependencies"])}
    checked = {"torch", "deepspeed", "transformers", "ray", "tokenizers", "pyarrow", "safetensors"}
    monkeypatch.setattr(doctor_module, "package_version", lambda name: "0.0.1")
    found = {check.name: check for check in doctor() if check.name in checked}
    assert found.keys() == checked
    for name, check in found.items():
        assert check.status == ERROR
        assert f"Version {needed[name]} or newer is needed." in check.remedy
    monkeypatch.setattr(sys, "version_info", (3, 0, 0))
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in doctor()[0].remedy


def test_where_no_metadata_say_what_is_needed_nothing_is_too_old(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", not_installed)
    assert not [check for check in doctor() if check.status == ERROR]


def test_a_missing_and_an_old_package_are_errors_that_say_what_to_install():
    missing = check_package("no-such-package-anywhere")
    assert (missing.status, missing.detail) == (ERROR, "not installed")
    old = check_package("torch", (999, 0))
    assert old.status == ERROR
    assert "999.0 or newer" in old.remedy


@pytest.mark.parametrize("text", ["2.13.0+cpu", "0.19.8", "5.23.0", "2.10.0.dev20260101", "1.0rc1"])
def test_versions_compare_as_packaging_says(text):
    for other in ("0.19.8", "2.10", "2.14"):
        numbers = tuple(int(part) for part in other.split("."))
        assert (parse_version(text) >= numbers) == (Version(text.split(".dev")[0].split("rc")[0]) >= Version(other))


def test_a_compiler_that_is_absent_or_broken_is_a_warning_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    assert check_compiler().status == OK
    monkeypatch.setenv("PATH", str(tmp_path))
    absent = check_compiler()
    assert (absent.status, absent.detail) == (WARNING, "g++ not found")
    assert "build-essential" in absent.remedy
    clang = tmp_path / "clang++"  # which nothing of ours takes unless CXX names it
    clang.write_text("#!/bin/sh\n")
    clang.chmod(0o755)
    assert check_compiler() == absent
    assert "CXX" in absent.remedy
    monkeypatch.setenv("CXX", "clang++")
    assert check_compiler().status == OK
    monkeypatch.setenv("CXX", "g+++")
    assert (check_compiler().status, check_compiler().detail) == (WARNING, "g+++ not found")
    monkeypatch.delenv("CXX")
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\necho 'check.cpp:1:10: fatal error: Python.h: No such file' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    without_headers = check_compiler()
    assert without_headers.status == WARNING
    assert "Python.h" in without_headers.detail


def test_ninja_beside_this_python_is_found_without_the_path(tmp_path, monkeypatch):
    beside = Path(sys.executable).parent / "ninja"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_ninja().status == (OK if beside.exists() else WARNING)


@pytest.mark.parametrize(("gib", "status"), [(1, ERROR), (3, WARNING), (16, OK)])
def test_memory_bounds(gib, status):
    assert check_memory(gib * GIB).status == status


def test_the_disk_of_a_folder_that_does_not_exist_yet_is_its_parent_s(tmp_path):
    check = check_disk(tmp_path / "runs" / "new")
    assert str(tmp_path) in check.detail
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert check.status == (OK if free > 5 * GIB else WARNING if free > GIB else ERROR)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_is_an_error(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount here")
    try:
        assert check_disk(tmp_path).status == ERROR
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_machine_without_cuda_but_with_a_driver_is_told(tmp_path, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    assert doctor_module.check_gpu().status == OK
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    check = doctor_module.check_gpu()
    assert check.status == WARNING
    assert "driver" in check.detail
