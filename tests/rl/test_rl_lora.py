"""A run of GRPO whose policy is an adapter, with a KL and an evaluation every other step: once whole, once resumed, and
once with two ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rl import metrics_of, run_here, write_world
from whole_runs import engine_state, interrupted, position, runs_without_actors, without_times

from minigpt.dataset.shards import PackedDataset
from minigpt.trainer.setup import load_masters

pytestmark = pytest.mark.slow

STEPS, INTERVAL = 5, 2
OPTIONS = [
    *("--dtype=fp32", "--compile=false", "--threads=1", "--tensorboard=false", "--export_dtype=fp32"),
    *("--prompts_per_step=4", "--samples_per_prompt=2", "--max_new_tokens=8", "--eval_prompts=2"),
    *("--minibatches=2", "--update_epochs=2", "--learning_rate=1e-2", "--lora_rank=4", "--kl_coefficient=0.1"),
    *(f"--max_steps={STEPS}", "--save_interval=1", "--keep_checkpoints=10", f"--eval_interval={INTERVAL}"),
]
REWARDS = '''
HELD_OUT = {held_out!r}

def held_out(prompt, completion, reference):
    """1 for the prompts that nothing is learned from."""
    return float(reference["messages"][-1]["content"] in HELD_OUT)

def letters(prompt, completion, reference):
    return sum(c.isascii() and c.isalpha() for c in completion) / max(1, len(completion))
'''


@pytest.fixture(scope="module", autouse=True)
def our_ray():
    with runs_without_actors():
        yield


def texts(prompts: PackedDataset) -> set[str]:
    return {prompts.row(row).messages[-1]["content"] for row in range(len(prompts))}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = write_world(tmp_path_factory.mktemp("world"))
    trained, held_out = (texts(PackedDataset(root / "prompts", split)) for split in ("train", "valid"))
    assert not trained & held_out
    (root / "rewards.py").write_text(REWARDS.format(held_out=held_out))
    return root


def train(world: Path, folder: Path, *options: str) -> None:
    rewards = ["--reward", f"{world / 'rewards.py'}:letters", f"{world / 'rewards.py'}:held_out"]
    places = [f"--data={world / 'prompts'}", f"--init={world / 'sft'}", f"--save_dir={folder}"]
    assert run_here("train", "grpo", *places, *rewards, *OPTIONS, *options) == 0


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """Never interrupted, one rank."""
    folder = tmp_path_factory.mktemp("whole") / "grpo"
    train(world, folder)
    return folder


def named(line: dict[str, Any], reward: str) -> float:
    (name,) = (name for name in line if name.startswith("reward_") and name.endswith(reward))
    return line[name]


def test_every_interval_held_out_prompts_are_asked_and_nothing_is_learned_from_them(whole):
    lines = metrics_of(whole, "eval")
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert [named(line, "held_out") for line in lines] == [1.0] * 4
    assert [named(line, "held_out") for line in metrics_of(whole)] == [0.0] * STEPS
    scores = [named(line, "letters") for line in lines]
    assert len(set(scores)) > 1, "each asks the weights of its step"


def test_an_adapter_moves_away_from_the_model_without_it(whole, world):
    """What its KL is measured from: the weights that it started from, which are frozen."""
    lines = metrics_of(whole)
    assert all(line["kl"] > 0 for line in lines)
    assert lines[-1]["kl"] > 1.5 * lines[0]["kl"]
    start, merged = load_masters(world / "sft").state_dict(), load_masters(whole).state_dict()
    moved = {name for name, weight in start.items() if not torch.equal(merged[name], weight)}
    assert moved == {name for name in start if name.endswith("_proj.weight")}


def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(whole, world, tmp_path, capsys):
    run = interrupted(whole, tmp_path / "grpo", 3)
    train(world, run)
    assert f"at step 3 of {STEPS}" in capsys.readouterr().out
    ours, theirs = engine_state(run, STEPS), engine_state(whole, STEPS)
    assert ours.keys() == theirs.keys()
    assert any("exp_avg" in name for name in theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert position(run, STEPS) == position(whole, STEPS)
    for kind in ("train", "eval"):
        ours, theirs = ([without_times(line) for line in metrics_of(one, kind)] for one in (run, whole))
        assert ours == theirs


def test_an_adapter_alone_may_be_published_and_changes_no_bit(whole, world, tmp_path):
    run = tmp_path / "grpo"
    train(world, run, "--publish=adapter")
    assert [without_times(line) for line in metrics_of(run)] == [without_times(line) for line in metrics_of(whole)]
    ours, theirs = load_masters(run).state_dict(), load_masters(whole).state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_overwrite_replaces_a_run_and_keeps_the_held_out_prompts_that_it_has_just_packed(whole, world, tmp_path):
    run, asked = tmp_path / "grpo", tmp_path / "asked.jsonl"
    shutil.copytree(whole, run)
    questions = [{"messages": [{"role": "user", "content": text}]} for text in ("1 + 1?", "2 + 2?")]
    asked.write_text("".join(json.dumps(one) + "\n" for one in questions))
    train(world, run, f"--eval_data={asked}", "--overwrite", "--max_steps=1")
    assert len(PackedDataset(run / "heldout" / "data", "train")) == 2
    assert [line["step"] for line in metrics_of(run)] == [1]


def test_two_ranks_learn_what_one_does(whole, world, tmp_path):
    layout = tmp_path / "layout.yaml"
    layout.write_text("policy: {workers: 2, threads: 1}\n")
    run = tmp_path / "grpo"
    train(world, run, f"--layout={layout}")
    for ours, theirs in zip(metrics_of(run), metrics_of(whole), strict=True):
        for name, value in without_times(theirs).items():
            if name != "kind":
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    ours, theirs, start = (load_masters(one).state_dict() for one in (run, whole, world / "sft"))
    for name, weight in theirs.items():
        learned = (weight - start[name]).norm()
        assert (ours[name] - weight).norm() <= 1e-3 * learned, name
