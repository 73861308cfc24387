"""`--overwrite` throws an earlier run away: that run only, and not before the new one can begin."""

import shutil
from pathlib import Path

import pytest
from small_run import SMALL, weights


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(packed, tmp_path, train) -> Path:
    folder = tmp_path / "run"
    train("pretrain", "--data", packed, "--save_dir", folder, "--max_steps", 1)
    return folder


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--data", "typo"), "typo does not exist"),
        (("--init", "typo"), "--init typo holds no model"),
        (("--eval_tasks", "typo"), "typo"),
        (("--deepspeed", "typo.json"), "no DeepSpeed configuration at typo.json"),
        (("--seq_len", "64", "--data", "{empty}"), "empty"),
    ],
)
def test_a_run_that_cannot_begin_throws_nothing_away(options, sentence, run, packed, tmp_path, minigpt):
    (tmp_path / "empty").mkdir()
    before = files(run)
    options = [str(option).format(empty=tmp_path / "empty") for option in options]
    ended = minigpt(
        "train", "pretrain", *SMALL, "--data", packed, "--max_steps", 1, "--save_dir", run, "--overwrite", *options
    )
    assert sentence in ended.sentence()
    after = files(run)
    assert {path: after[path] for path in before} == before


def test_neither_does_reinforcement_learning(run, tmp_path, minigpt):
    shutil.copytree(run, tmp_path / "init")
    before = files(run)
    ended = minigpt("train", "grpo", "--init", tmp_path / "init", "--data", "typo", "--save_dir", run, "--overwrite")
    assert "typo does not exist" in ended.sentence()
    assert files(run) == before


@pytest.mark.parametrize("below", ["", "hf"])
def test_the_weights_that_a_run_starts_from_are_not_thrown_away(below, run, packed, minigpt):
    before = files(run)
    ended = minigpt(
        "train", "pretrain", "--data", packed, "--init", run / below, "--save_dir", run, "--overwrite", "--max_steps", 1
    )
    assert "--overwrite would delete the weights that --init names" in ended.sentence()
    assert files(run) == before


def test_a_folder_that_holds_no_run_is_not_emptied(packed, tmp_path, minigpt):
    mine = tmp_path / "mine"
    (mine / "report").mkdir(parents=True)
    (mine / "report" / "thesis.txt").write_text("years of work")
    (mine / "model.pth").write_text("of somebody else")
    before = files(mine)
    ended = minigpt("train", "pretrain", *SMALL, "--data", packed, "--save_dir", mine, "--overwrite", "--max_steps", 1)
    assert f"{mine} holds no run that --overwrite could replace" in ended.sentence()
    assert files(mine) == before


def test_a_run_in_raw_files_is_replaced_as_well(texts, tmp_path, train):
    folder = tmp_path / "run"
    options = ("--data", texts, "--save_dir", folder, "--max_steps", 2)
    train("pretrain", *options, "--seq_len", 64, "--save_interval", 1)
    first = weights(folder)
    train("pretrain", *options, "--seq_len", 32, "--overwrite", "--seed", 3)
    assert any(not first[name].equal(weight) for name, weight in weights(folder).items())
