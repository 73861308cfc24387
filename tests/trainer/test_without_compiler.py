"""A machine without a C++ compiler trains the same, only slower (DeepSpeed and torch.compile would look for one)."""

import os
import subprocess
import sys

import pytest
import torch
from small_run import SMALL, metrics

from minigpt.trainer.setup import compile_wanted
from minigpt.trainer.train_pretrain import PretrainOptions

# Any run counts as long enough to compile, so only the missing compiler keeps it from that.
PROGRAM = """
import sys
from minigpt import cli
from minigpt.trainer import setup
setup._WORTH_COMPILING["cpu"] = 0.0
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_without_a_compiler_computes_the_same(dtype, packed, tmp_path, train):
    (tmp_path / "empty").mkdir()
    options = ["--data", packed, "--max_steps", 4, "--seed", 3, f"--dtype={dtype}"]
    train("pretrain", *options, "--save_dir", tmp_path / "with")
    automatic = [option for option in SMALL if not option.startswith("--compile")]
    arguments = ["train", "pretrain", *automatic, *options, "--save_dir", tmp_path / "without"]
    environment = {key: value for key, value in os.environ.items() if key not in ("CC", "CXX")}
    environment |= {
        "PATH": str(tmp_path / "empty"),  # no compiler, no ninja, not even a shell
        "XDG_CACHE_HOME": str(tmp_path / "cache"),  # and nothing that was compiled earlier
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
    }
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compiled" not in done.stdout
    assert not list(tmp_path.rglob("*.so"))
    losses = [[record["loss"] for record in metrics(tmp_path / run) if "loss" in record] for run in ("with", "without")]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == "fp32" else 1e-2)
    assert (tmp_path / "without" / "hf" / "model.safetensors").exists()


def test_compiling_without_a_compiler_is_refused_in_a_sentence(packed, tmp_path, minigpt, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.delenv("CXX", raising=False)
    options = [option for option in SMALL if not option.startswith("--compile")]
    ended = minigpt("train", "pretrain", *options, "--data", packed, "--save_dir", tmp_path / "run", "--compile=true")
    assert "--compile true needs a C++ compiler" in ended.sentence()
    assert "leave it out" in ended.sentence()


def test_a_gpu_needs_a_c_compiler_and_the_headers_too(tmp_path, monkeypatch):
    """Triton builds the module that starts its kernels with CC, gcc or clang, and includes Python.h."""
    gpu, options, long_run = torch.device("cuda"), PretrainOptions(save_dir=tmp_path), 1e20
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compile_wanted(options, gpu, long_run)
    with pytest.raises(ValueError, match="--compile true needs a C"):
        compile_wanted(PretrainOptions(save_dir=tmp_path, compile=True), gpu, long_run)
    for name in ("clang", "my-cc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert compile_wanted(options, gpu, long_run)
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not compile_wanted(options, gpu, long_run), "Triton takes CC's word"
    monkeypatch.setenv("CC", str(tmp_path / "my-cc"))
    assert compile_wanted(options, gpu, long_run)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert not compile_wanted(options, gpu, long_run), "no headers"
