"""A machine without a C++ compiler trains the same, only slower (DeepSpeed and torch.compile would look for one)."""

import os
import subprocess
import sys

import pytest
from small_run import SMALL, metrics

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
