"""A run that is interrupted and goes on is the run that never was: same metrics, same weights, to the last bit."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import SMALL, assert_same_weights, metrics, weights

from minigpt.dataset.shards import PackedDataset
from minigpt.trainer.checkpoint import list_checkpoints, verify
from minigpt.trainer.run import Run

STEPS = 8
SAVE_ALL = ("--max_steps", STEPS, "--save_interval", 1, "--keep_checkpoints", STEPS)
TIMES = {"tokens_per_second", "mfu", "memory_gb", "seconds"}


def learnt(run: Path) -> list[dict]:
    """The metrics without what depends on the machine's mood."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in metrics(run)]


def as_it_was_at(step: int, finished: Path, folder: Path) -> Path:
    """A copy of a finished run as a power cut right after the checkpoint of `step` would have left it, with a torn
    line at the end of the metrics and the beginning of the next checkpoint."""
    shutil.copytree(finished, folder)
    for path in list_checkpoints(folder):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    for path in [folder / "summary.json", *folder.glob("*.pth")]:
        path.unlink()
    shutil.rmtree(folder / "hf")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[: step + 2]) + '{"step": 9, "lo')
    partial = folder / "checkpoints" / f".step_{step + 1:08d}.partial"
    partial.mkdir()
    (partial / "state.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    "options",
    [("--dtype", "fp32"), ("--dtype", "bf16"), ("--dtype", "bf16", "--optimizer", "adamw", "--schedule", "wsd")],
    ids=["fp32 muon", "bf16 muon", "bf16 adamw"],
)
def test_resuming_at_any_step_gives_the_bits_of_the_run_that_was_not_interrupted(options, packed, tmp_path, train):
    whole = tmp_path / "whole"
    train("pretrain", "--data", packed, "--save_dir", whole, *SAVE_ALL, "--eval_interval", 3, *options)
    for step in (1, 4, 7):
        again = as_it_was_at(step, whole, tmp_path / f"from_{step}")
        out = train("pretrain", "--data", packed, "--save_dir", again, *SAVE_ALL, "--eval_interval", 3, *options)
        assert f"at step {step} of {STEPS}" in out
        assert learnt(again) == learnt(whole)
        assert_same_weights(again, whole)
        assert not list((again / "checkpoints").glob(".*")), "nothing is left of the torn checkpoint"


def test_an_interruption_between_the_last_checkpoint_and_the_export_costs_nothing(packed, tmp_path, train):
    whole = tmp_path / "whole"
    train("pretrain", "--data", packed, "--save_dir", whole, *SAVE_ALL)
    again = as_it_was_at(STEPS, whole, tmp_path / "again")
    train("pretrain", "--data", packed, "--save_dir", again, *SAVE_ALL)
    assert learnt(again) == learnt(whole)
    assert_same_weights(again, whole)


def test_a_run_over_raw_files_goes_on_too(texts, tmp_path, train):
    """Packing again gives the same bytes, so the data are the checkpoint's."""
    whole = tmp_path / "whole"
    options = ("--data", texts, "--seq_len", 64, *SAVE_ALL)
    train("pretrain", *options, "--save_dir", whole)
    again = as_it_was_at(3, whole, tmp_path / "again")
    assert "at step 3" in train("pretrain", *options, "--save_dir", again)
    assert_same_weights(again, whole)


def test_fine_tuning_goes_on_with_its_own_weights_not_with_those_it_started_from(
    packed, conversations, tmp_path, train
):
    train("pretrain", "--data", packed, "--save_dir", tmp_path / "base", "--max_steps", 2)
    whole = tmp_path / "whole"
    options = ("--data", conversations, "--init", tmp_path / "base", *SAVE_ALL)
    train("sft", *options, "--save_dir", whole)
    again = as_it_was_at(5, whole, tmp_path / "again")
    train("sft", *options, "--save_dir", again)
    assert learnt(again) == learnt(whole)
    assert_same_weights(again, whole)


def test_what_was_trained_is_saved_before_it_is_judged(packed, tmp_path, minigpt, train):
    """A byte of the validation rows is wrong, which their first use finds out."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(packed, data)
    (shard,) = (data / "valid").glob("*.arrow")
    good = shard.read_bytes()
    shard.write_bytes(good[:-400] + bytes([good[-400] ^ 1]) + good[-399:])
    found = minigpt("train", "pretrain", "--data", data, "--save_dir", run, "--max_steps", 3, *SMALL)
    assert "damaged" in found.sentence()
    assert [path.name for path in list_checkpoints(run)] == ["step_00000003"]
    shard.write_bytes(good)
    assert "at step 3 of 3" in train("pretrain", "--data", data, "--save_dir", run, "--max_steps", 3)
    train("pretrain", "--data", packed, "--save_dir", tmp_path / "whole", "--max_steps", 3)
    assert learnt(run) == learnt(tmp_path / "whole")
    assert_same_weights(run, tmp_path / "whole")


def test_a_step_that_has_a_checkpoint_is_not_saved_again(packed, tmp_path, train):
    """Else a kill in between would find neither the old one nor the new one."""
    whole = tmp_path / "whole"
    train("pretrain", "--data", packed, "--save_dir", whole, *SAVE_ALL)
    again = as_it_was_at(STEPS, whole, tmp_path / "again")
    last = list_checkpoints(again)[-1]
    before = {path: path.stat().st_mtime_ns for path in last.rglob("*")}
    train("pretrain", "--data", packed, "--save_dir", again, *SAVE_ALL)
    assert {path: path.stat().st_mtime_ns for path in last.rglob("*")} == before


def test_a_run_goes_on_with_the_weights_it_began_with_whatever_was_trained_since(
    packed, conversations, tmp_path, train
):
    whole = tmp_path / "whole"
    train("pretrain", "--data", packed, "--save_dir", tmp_path / "base", "--max_steps", 2)
    train("sft", "--data", conversations, "--save_dir", whole, *SAVE_ALL)
    again = as_it_was_at(5, whole, tmp_path / "again")
    train("pretrain", "--data", packed, "--save_dir", tmp_path / "newer", "--max_steps", 2, "--hidden_size", 64)
    assert "newest" not in train("sft", "--data", conversations, "--save_dir", again, *SAVE_ALL)
    assert_same_weights(again, whole)


def test_epochs_are_epochs_also_when_a_run_goes_on_in_steps_of_another_size(packed, tmp_path, train):
    """As many rows in all: what is left of the epoch is divided by the new size."""
    rows = len(PackedDataset(packed))
    options = ("--data", packed, "--epochs", 1, "--save_interval", 1, "--keep_checkpoints", 99)
    whole = tmp_path / "whole"
    train("pretrain", *options, "--save_dir", whole, "--global_batch_size", 4)
    again = as_it_was_at(2, whole, tmp_path / "again")
    train("pretrain", *options, "--save_dir", again, "--global_batch_size", 8)
    assert metrics(again)[-1]["step"] == 2 + math.ceil((rows - 8) / 8)


def test_files_that_changed_under_a_run_are_said_and_its_packed_data_stay(texts, tmp_path, train, minigpt):
    raw, run = tmp_path / "raw", tmp_path / "run"
    raw.mkdir()
    shutil.copy(texts, raw)
    options = ("--data", raw, "--seq_len", 64, *SAVE_ALL)
    train("pretrain", *options, "--save_dir", run)
    again = as_it_was_at(3, run, tmp_path / "again")
    (raw / "more.txt").write_text("One more text, of which the checkpoints know nothing.\n" * 9)
    found = minigpt("train", "pretrain", *options, "--save_dir", again, *SMALL).sentence()
    assert f"--data {again / 'data'} goes on with them, --overwrite starts anew" in found
    assert "at step 3" in train("pretrain", "--data", again / "data", *SAVE_ALL, "--save_dir", again)
    assert_same_weights(again, run)


def test_a_finished_run_is_not_trained_again(packed, tmp_path, train):
    run = tmp_path / "run"
    train("pretrain", "--data", packed, "--save_dir", run, "--max_steps", 2)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    out = train("pretrain", "--data", packed, "--save_dir", run, "--max_steps", 2)
    assert "loss: " in out
    assert "--overwrite" in out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    first = weights(run)
    (run / "eval").mkdir()
    (run / "eval" / "sums.json").write_text("{}")
    train("pretrain", "--data", packed, "--save_dir", run, "--max_steps", 2, "--overwrite", "--seed", 5)
    assert not (run / "eval").exists(), "what was found about other weights"
    assert any(not (weights(run)[name] == first[name]).all() for name in first)


def test_without_resume_the_run_starts_over_and_its_own_checkpoints_stay(packed, tmp_path, train):
    """Those of the abandoned run are further on; they must neither be kept in place of the new ones nor be resumed."""
    whole = tmp_path / "whole"
    train("pretrain", "--data", packed, "--save_dir", whole, *SAVE_ALL)
    again = as_it_was_at(6, whole, tmp_path / "again")
    options = ("--max_steps", 4, "--save_interval", 1, "--keep_checkpoints", 2)
    out = train("pretrain", "--data", packed, "--save_dir", again, *options, "--resume", "never")
    assert "resuming" not in out
    assert [path.name for path in list_checkpoints(again)] == ["step_00000003", "step_00000004"]


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "minigpt.cli", "train", "pretrain", *SMALL, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Return when the metrics say that `step` is done."""
    path = run / "metrics.jsonl"
    while not (path.exists() and f'{{"step": {step}, ' in path.read_text()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.slow
def test_kill_9_during_saves_loses_nothing_and_the_end_is_the_same(packed, tmp_path, train):
    """Every step writes a checkpoint, which takes longer than the step: most kills hit a half-written one."""
    options = ("--data", packed, "--max_steps", 60, "--save_interval", 1, "--eval_rows", 4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train("pretrain", *options, "--save_dir", whole, "--save_interval", 0)
    reached = 0
    for step in (3, 19, 38):
        process = start(*options, "--save_dir", killed)
        wait_for_step(process, killed, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps = [verify(folder)["step"] for folder in list_checkpoints(killed)]
        assert steps, "there is a checkpoint, and every one of them is whole"
        assert max(steps) > reached
        reached = max(steps)
    train("pretrain", *options, "--save_dir", killed)
    assert learnt(killed) == learnt(whole)
    assert_same_weights(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_ends_the_run_which_then_goes_on_to_the_same_end(number, packed, tmp_path, train):
    options = ("--data", packed, "--max_steps", 40)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train("pretrain", *options, "--save_dir", whole)
    process = start(*options, "--save_dir", stopped)
    wait_for_step(process, stopped, 3)
    process.send_signal(number)
    rest, _ = process.communicate()
    assert process.returncode == 128 + number
    assert "the same command goes on" in rest
    (checkpoint,) = list_checkpoints(stopped)
    assert 3 <= verify(checkpoint)["step"] < 40
    assert not (stopped / "summary.json").exists()
    train("pretrain", *options, "--save_dir", stopped)
    assert learnt(stopped) == learnt(whole)
    assert_same_weights(stopped, whole)


@pytest.mark.parametrize("step", [2, 4, STEPS], ids=["plain", "before a validation", "last"])
def test_a_signal_ends_the_run_after_the_very_step_that_it_came_in(step, packed, tmp_path, train, minigpt, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = ("--data", packed, "--max_steps", STEPS, "--eval_interval", 4, "--log_interval", 1)
    train("pretrain", *options, "--save_dir", whole)
    log = Run.log

    def log_and_be_stopped(self: Run, number: int, record: dict) -> None:
        log(self, number, record)
        if number == step and record["kind"] == "train":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "log", log_and_be_stopped)
        ended = minigpt("train", "pretrain", *SMALL, *options, "--save_dir", stopped)
    assert ended.status == 128 + signal.SIGTERM
    (checkpoint,) = list_checkpoints(stopped)
    assert verify(checkpoint)["step"] == step
    assert not any(record["kind"] == "valid" for record in metrics(stopped)[step:]), "it was asked to end"
    train("pretrain", *options, "--save_dir", stopped)
    assert learnt(stopped) == learnt(whole)
    assert_same_weights(stopped, whole)


def test_another_length_of_a_run_that_goes_on_is_said_where_the_learning_rate_follows_it(packed, tmp_path, train):
    for schedule, said in (("cosine", True), ("constant", False)):
        whole = tmp_path / schedule
        options = ("--data", packed, *SAVE_ALL, "--schedule", schedule, "--warmup_ratio", 0)
        train("pretrain", *options, "--save_dir", whole)
        again = as_it_was_at(4, whole, tmp_path / f"{schedule}, longer")
        out = train("pretrain", *options, "--save_dir", again, "--max_steps", 20)
        assert ("--max_steps was 8 before the interruption and is 20 now" in out) == said
        assert ("the learning rate follows the new length" in out) == said
