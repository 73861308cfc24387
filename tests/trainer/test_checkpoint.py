"""What a run does with checkpoints that are damaged, hostile, or of another run, and with a full disk."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from small_run import SMALL, metrics, weights

from data_prep.pack import PackOptions, pack
from minigpt.trainer.checkpoint import MANIFEST, list_checkpoints, verify
from minigpt.trainer.engine import _load_safely

INTERRUPTED = ("--max_steps", 4, "--save_interval", 1, "--keep_checkpoints", 4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, packed):
    """A run of four steps with a checkpoint at each, made once."""
    from minigpt import cli

    run = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    cli.main(["train", "pretrain", *SMALL, "--data", str(packed), "--save_dir", str(run), *map(str, INTERRUPTED)])
    torch.set_num_threads(threads)
    return run


@pytest.fixture
def interrupted(finished, tmp_path) -> Path:
    """A copy of it that was stopped behind the checkpoint of step 3."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (run / "summary.json").unlink()
    return run


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_with_a_sentence(interrupted, finished, packed, train):
    """In step 3 the optimizer's file has one bit flipped, step 2 misses a file: the run goes on from step 1."""
    newest, older = (interrupted / "checkpoints" / f"step_0000000{step}" for step in (3, 2))
    (damaged,) = newest.rglob("*optim_states.pt")
    flip_a_bit(damaged)
    (older / "rng_00000.pt").unlink()
    out = train("pretrain", "--data", packed, "--save_dir", interrupted, *INTERRUPTED)
    said = " ".join(out.split())
    assert f"{damaged} is damaged" in said
    assert f"{older / 'rng_00000.pt'} is missing" in said
    assert "at step 1 of 4" in said
    assert all(torch.equal(w, weights(finished)[name]) for name, w in weights(interrupted).items())
    assert [verify(path)["step"] for path in list_checkpoints(interrupted)] == [1, 2, 3, 4]


def test_a_flipped_bit_or_a_cut_is_found_in_every_file(finished, tmp_path):
    original = finished / "checkpoints" / "step_00000004"
    names = [path.relative_to(original) for path in files(original)]
    assert len(names) >= 5
    for number, name in enumerate(names):
        for harm in (flip_a_bit, lambda path: os.truncate(path, path.stat().st_size - 1), Path.unlink):
            folder = tmp_path / f"{number}{harm.__name__}"
            shutil.copytree(original, folder)
            harm(folder / name)
            with pytest.raises(ValueError, match=r"damaged|missing|manifest"):
                verify(folder)


class Hostile:
    """Pickles to a program."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def forge_manifest(folder: Path) -> None:
    hashes = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files(folder)
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(hashes))


@pytest.mark.parametrize("pattern", ["*model_states.pt", "*optim_states.pt", "rng_*.pt"])
def test_a_program_in_a_checkpoint_is_not_run_even_if_the_manifest_fits(
    pattern, interrupted, packed, tmp_path, minigpt
):
    checkpoint = interrupted / "checkpoints" / "step_00000003"
    (path,) = checkpoint.rglob(pattern)
    trap = tmp_path / "trap"
    torch.save({**torch.load(path, weights_only=False), "payload": Hostile(trap)}, path)
    forge_manifest(checkpoint)
    ended = minigpt("train", "pretrain", *SMALL, "--data", packed, "--save_dir", interrupted, *INTERRUPTED)
    assert str(checkpoint) in ended.sentence()
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists(), "the trap works where nobody takes care"


def test_a_state_is_read_whichever_python_wrote_it(tmp_path, monkeypatch):
    """Python 3.11.0 to 3.11.3 (Debian 12's among them) pickles a member of an enumeration as a call of `getattr`."""
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda stage, _: (getattr, (type(stage), stage.name)))
    torch.save({"zero_stage": ZeroStageEnum.gradients}, tmp_path / "state.pt")
    assert _load_safely(tmp_path / "state.pt", "cpu") == {"zero_stage": ZeroStageEnum.gradients}


def test_no_other_attribute_is_read_while_a_state_is_loaded(tmp_path):
    class Attribute:
        def __reduce__(self):
            return getattr, (LossScaler, "backward")

    torch.save({"payload": Attribute()}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        _load_safely(tmp_path / "state.pt", "cpu")


def test_a_program_in_the_weights_that_a_run_starts_from_is_not_run(finished, conversations, tmp_path, minigpt):
    base, trap = tmp_path / "base", tmp_path / "trap"
    shutil.copytree(finished, base)
    (path,) = base.glob("*.pth")
    torch.save({"payload": Hostile(trap)}, path)
    ended = minigpt("train", "sft", *SMALL, "--data", conversations, "--init", base, "--save_dir", tmp_path / "run")
    assert str(path) in ended.sentence()
    assert not trap.exists()


def refused(minigpt, run: Path, *arguments: object) -> str:
    """The sentence of a refused resume, which has changed no file."""
    before = {path: path.read_bytes() for path in files(run)}
    ended = minigpt("train", "pretrain", *SMALL, "--save_dir", run, *INTERRUPTED, *arguments)
    sentence = ended.sentence()
    assert "--overwrite" in sentence
    assert {path: path.read_bytes() for path in files(run)} == before
    return sentence


def test_another_dataset_is_refused(interrupted, texts, tmp_path, minigpt):
    other = tmp_path / "other"
    pack(PackOptions(stage="pretrain", input=[texts], output=other, seq_len=32, workers=1))
    assert "another dataset" in refused(minigpt, interrupted, "--data", other)


def test_another_tokenizer_is_refused(interrupted, texts, tmp_path, shipped_tokenizer, minigpt):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    content = json.loads((shipped_tokenizer / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(shipped_tokenizer / "tokenizer_config.json", tokenizer)
    other = tmp_path / "other"
    pack(PackOptions(stage="pretrain", input=[texts], output=other, seq_len=64, workers=1, tokenizer=tokenizer))
    assert "another tokenizer" in refused(minigpt, interrupted, "--data", other)


def test_another_shape_precision_optimizer_or_zero_stage_is_refused(interrupted, packed, minigpt):
    data = ("--data", packed)
    assert "another model shape" in refused(minigpt, interrupted, *data, "--intermediate_size", 32)
    assert "precision float32, now it is bfloat16" in refused(minigpt, interrupted, *data, "--dtype", "bf16")
    assert "optimizer muon, now it is adamw" in refused(minigpt, interrupted, *data, "--optimizer", "adamw")
    zero2 = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
    assert "ZeRO stage 1, now it is 2" in refused(minigpt, interrupted, *data, "--deepspeed", zero2)


@pytest.mark.parametrize(
    ("stage", "layout", "named"),
    [(3, {}, "ZeRO stage 3"), (1, {"round_robin_gradients": True}, "round_robin_gradients")],
)
def test_another_number_of_processes_is_refused_where_the_layout_depends_on_it(
    stage, layout, named, interrupted, packed, tmp_path, minigpt
):
    checkpoint = interrupted / "checkpoints" / "step_00000003"
    state = json.loads((checkpoint / "state.json").read_text())
    written = {**state, "world_size": 4, "zero_stage": stage, "optimizer": "adamw"}
    (checkpoint / "state.json").write_text(json.dumps(written))
    forge_manifest(checkpoint)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": stage, "overlap_comm": False, **layout}}))
    arguments = ("--data", packed, "--deepspeed", config, "--optimizer", "adamw")
    sentence = refused(minigpt, interrupted, *arguments)
    assert "written by 4 processes, now there are 1" in sentence
    assert named in sentence


def test_a_changed_learning_rate_is_said_and_taken(interrupted, packed, train):
    rate = ("--learning_rate", 1e-4, "--schedule", "constant")
    out = train("pretrain", "--data", packed, "--save_dir", interrupted, *INTERRUPTED, *rate)
    said = " ".join(out.split())
    assert "--learning_rate was 0.003 before the interruption and is 0.0001 now" in said
    assert "--schedule was cosine" in said
    assert [r["lr"] for r in metrics(interrupted) if r["kind"] == "train"][-1] == 1e-4


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_changed_hyperparameter_of_the_optimizer_is_taken_not_only_said(stage, packed, tmp_path, train):
    """The optimizer's own state brings the old values along; they must not win."""
    config = ("--deepspeed", Path(__file__).parents[2] / "ds_configs" / f"zero{stage}.json")
    whole = tmp_path / "whole"
    train("pretrain", "--data", packed, "--save_dir", whole, *INTERRUPTED, *config)
    for name, value in (("--weight_decay", 30.0), ("--beta1", 0.0), ("--beta2", 0.0), ("--grad_clip", 0.01)):
        run = tmp_path / name
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints" / "step_00000004")
        (run / "summary.json").unlink()
        out = train("pretrain", "--data", packed, "--save_dir", run, *INTERRUPTED, *config, name, value)
        assert f"{name} was" in " ".join(out.split())
        before = weights(whole)
        assert any(not torch.equal(w, before[key]) for key, w in weights(run).items()), name


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from minigpt import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_full_disk_ends_in_one_sentence_and_the_checkpoint_before_stays(interrupted, packed):
    """No file may grow beyond half a checkpoint's largest: step 4 cannot be saved, and step 3 is as it was."""
    checkpoint = interrupted / "checkpoints" / "step_00000003"
    limit = max(path.stat().st_size for path in files(checkpoint)) // 2
    arguments = [*SMALL, "--tensorboard=true", "--data", packed, "--save_dir", interrupted, *INTERRUPTED]
    command = [sys.executable, "-c", FULL_DISK, str(limit), "train", "pretrain", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: the checkpoint of step 4 could not be written")
    assert "free some space" in line
    assert verify(checkpoint)["step"] == 3
    assert [path.name for path in sorted((interrupted / "checkpoints").iterdir())][-1] == checkpoint.name
    assert not list((interrupted / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_disk_without_space_for_tensorboard_is_named_once(packed, tmp_path):
    disk = tmp_path / "run" / "tensorboard"
    disk.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system here; tests/observe proves the same of the logger alone")
    try:
        arguments = [*SMALL, "--tensorboard=true", "--data", packed, "--save_dir", tmp_path / "run", "--max_steps", 100]
        command = [sys.executable, "-m", "minigpt.cli", "train", "pretrain", *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 1, ended.stdout
        (line,) = ended.stderr.strip().splitlines()
        assert line.startswith(f"error: {disk}/events.out.tfevents.")
        assert line.endswith("No space left on device; free some space and run the same command again")
        assert not (tmp_path / "run" / "summary.json").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_a_disk_that_is_really_full_does_the_same(packed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system here; the file size limit above proves the same")
    try:
        run = disk / "run"
        arguments = [*SMALL, "--tensorboard=true", "--data", packed, "--save_dir", run, *INTERRUPTED]
        command = [sys.executable, "-m", "minigpt.cli", "train", "pretrain", *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 1, ended.stdout
        (line,) = ended.stderr.strip().splitlines()
        assert "could not be written" in line
        assert "No space left on device" in line
        steps = [verify(path)["step"] for path in list_checkpoints(run)]
        assert steps
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = subprocess.run(command, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert f"at step {steps[-1]} of 4" in " ".join(again.stdout.split())
    finally:
        subprocess.run(["umount", disk], check=True)
