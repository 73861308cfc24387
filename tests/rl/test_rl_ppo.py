"""A run of PPO with all that it can carry along (critic, its warm-up, an adaptive KL, several updates a step): once
whole, once resumed, and once with two ranks of policy and critic."""

import json
import os
import re
import runpy
import shutil
from pathlib import Path

import pytest
import tiny_rewards
import torch
from tiny_rl import metrics_of, run_here, write_world
from whole_runs import (
    checkpoint,
    engine_state,
    interrupted,
    module_weights,
    position,
    runs_without_actors,
    without_times,
)

from data_prep.pack import PackOptions, pack
from minigpt.model.model_critic import RewardModel
from minigpt.trainer.setup import load_masters

pytestmark = pytest.mark.slow

STEPS, WARMUP = 6, 2
OPTIONS = [
    *("--dtype=fp32", "--compile=false", "--threads=1", "--tensorboard=false", "--export_dtype=fp32"),
    *("--prompts_per_step=4", "--samples_per_prompt=2", "--max_new_tokens=8", "--eval_prompts=2"),
    *("--minibatches=2", "--update_epochs=2", "--learning_rate=1e-3", "--critic_learning_rate=1e-2"),
    *(f"--max_steps={STEPS}", "--save_interval=1", "--keep_checkpoints=10", f"--critic_warmup={WARMUP}"),
]
ADAPTIVE = ["--kl_coefficient=0.2", "--kl_target=0.05"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", autouse=True)
def our_ray():
    with runs_without_actors():
        yield


def train(world: Path, folder: Path, *options: str) -> int:
    reward = f"--reward={Path(tiny_rewards.__file__)}:letters"
    places = [f"--data={world / 'prompts'}", f"--init={world / 'sft'}", f"--save_dir={folder}"]
    return run_here("train", "ppo", *places, reward, *OPTIONS, *options)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """Never interrupted, one rank."""
    folder = tmp_path_factory.mktemp("whole") / "ppo"
    assert train(world, folder, *ADAPTIVE) == 0
    return folder


def test_while_the_critic_warms_up_it_alone_learns(whole, world):
    start = dict(load_masters(world / "sft").state_dict())
    lines = metrics_of(whole)
    for step in range(1, STEPS + 1):
        policy = module_weights(whole, step)
        moved = [name for name, weight in start.items() if not torch.equal(policy[f"model.{name}"], weight)]
        assert bool(moved) == (step > WARMUP)
        assert ("loss" in lines[step - 1]) == ("lr" in lines[step - 1]) == (step > WARMUP)
        assert lines[step - 1]["value_loss"] > 0
    for step in range(1, STEPS):
        ours, theirs = module_weights(whole / "critic", step), module_weights(whole / "critic", step + 1)
        assert not any(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(whole, world, tmp_path, capsys):
    run = interrupted(whole, tmp_path / "ppo", 3)
    assert train(world, run, *ADAPTIVE) == 0
    assert "at step 3 of 6" in capsys.readouterr().out
    for folder, other in ((run, whole), (run / "critic", whole / "critic")):
        ours, theirs = (engine_state(one, STEPS) for one in (folder, other))
        assert ours.keys() == theirs.keys()
        assert any("exp_avg" in name for name in theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert position(run, STEPS) == position(whole, STEPS)
    assert position(run, STEPS)["kl_coefficient"] not in (0.0, 0.2)
    for ours, theirs in zip(metrics_of(run)[-3:], metrics_of(whole)[-3:], strict=True):
        assert without_times(ours) == without_times(theirs)


def test_a_damaged_checkpoint_of_the_critic_is_passed_over_with_the_policys(whole, world, tmp_path, capsys):
    run = interrupted(whole, tmp_path / "ppo", STEPS - 1)
    (damaged, *_) = checkpoint(run / "critic", STEPS - 1).rglob("*model_states.pt")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert train(world, run, *ADAPTIVE) == 0
    said = capsys.readouterr().out
    assert f"{damaged} is damaged" in said
    assert f"at step {STEPS - 2} of {STEPS}" in said
    ours, theirs = engine_state(run, STEPS), engine_state(whole, STEPS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_other_rewards_on_resume_are_compared_by_what_both_know(whole, world, tmp_path, capsys):
    run = interrupted(whole, tmp_path / "ppo", STEPS - 1)
    assert train(world, run, *ADAPTIVE, "--reward=accuracy") == 0
    assert "held-out reward: " in capsys.readouterr().out, "the accuracy before was not measured"


def test_a_start_without_chats_and_answers_that_do_not_fit_are_said(world, tmp_path, capsys):
    pretrained = tmp_path / "pretrain"
    shutil.copytree(world / "sft", pretrained)
    (pretrained / "summary.json").write_text('{"stage": "pretrain"}')
    few = ["--max_steps=1", "--max_new_tokens=500", "--prompts_per_step=1", "--micro_batch_tokens=512"]
    assert train(world, tmp_path / "ppo", f"--init={pretrained}", *few, "--critic_warmup=0", "--eval_prompts=1") == 0
    said = capsys.readouterr().out
    assert "is a pretrained model that never saw a chat" in said
    assert re.search(r"the model's context of 512 leaves \d+ tokens behind the longest prompt", said)
    assert "not at --max_new_tokens 500" in said
    assert "in passes of 1 rows of 512 tokens" in said


@pytest.mark.parametrize("target", [[], ["--kl_target=0.05"]], ids=["fixed", "adaptive"])
def test_a_resumed_run_goes_on_with_the_kl_coefficient_that_is_asked_for_now(whole, world, tmp_path, capsys, target):
    """Unless a target adapted the very same one, an option is what it says, not what the checkpoint remembers."""
    run = interrupted(whole, tmp_path / "ppo", STEPS - 1)
    assert train(world, run, "--kl_coefficient=0.7", *target) == 0
    assert "--kl_coefficient was 0.2 before the interruption and is 0.7 now" in capsys.readouterr().out
    assert metrics_of(run)[-1]["kl_coefficient"] == pytest.approx(0.7, rel=0.02001 if target else 0)


def test_a_run_killed_before_its_export_has_the_results_of_its_last_step(whole, world, tmp_path):
    run = interrupted(whole, tmp_path / "ppo", STEPS)
    assert train(world, run, *ADAPTIVE) == 0
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, whole))
    last = metrics_of(whole)[-1]
    for name in ("loss", "reward", "tokens_per_second"):
        assert ours[name] == theirs[name] == last[name] != 0


@pytest.mark.parametrize("where", ["hf", "summary.json"])
def test_results_that_cannot_be_written_are_one_sentence_and_the_same_command_writes_them(
    whole, world, tmp_path, capsys, where
):
    """As on a full disk; here a file stands where a folder must be, or the reverse."""
    run = interrupted(whole, tmp_path / "ppo", STEPS)
    obstacle = run / (where if where == "hf" else f".{where}.{os.getpid()}.tmp")
    obstacle.touch() if where == "hf" else obstacle.mkdir()
    assert train(world, run, *ADAPTIVE) == 1
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert sentence.startswith(f"error: the weights could not be written to {run} (")
    assert sentence.endswith("the last checkpoint is whole: free some space and run the same command again")
    assert not (run / "summary.json").exists()
    obstacle.unlink() if where == "hf" else obstacle.rmdir()
    assert train(world, run, *ADAPTIVE) == 0


def trained_again(model: Path, copy: Path) -> Path:
    """The run with a weight that is another one, as after `--overwrite`."""
    shutil.copytree(model, copy)
    (path,) = copy.glob("*.pth")
    weights = torch.load(path, weights_only=True)
    weights["model.norm.weight"][0] += 1e-3
    torch.save(weights, path)
    return copy


def test_a_run_does_not_go_on_against_another_reference(whole, world, tmp_path, capsys):
    """The policy would come from the checkpoint and the reference from weights that it was never near to."""
    run = interrupted(whole, tmp_path / "ppo", STEPS - 1)
    init = f"--init={trained_again(world / 'sft', tmp_path / 'sft')}"
    assert train(world, run, *ADAPTIVE, init) == 1
    assert "was trained against other weights than those that --init gives now" in capsys.readouterr().err
    assert train(world, run, "--kl_coefficient=0", init) == 0, "nothing is compared with the reference"


def test_a_run_does_not_go_on_with_a_reward_model_that_was_trained_again(world, tmp_path, capsys):
    reward = tmp_path / "reward"
    model = RewardModel.from_decoder(load_masters(world / "sft"))
    model.save_pretrained(reward / "hf", tokenizer_folder=None)
    torch.save(model.state_dict(), reward / "reward_32.pth")
    common = ["--kl_coefficient=0", "--max_steps=2", "--critic_warmup=1"]
    assert train(world, tmp_path / "ppo", *common, f"--reward_model={reward}") == 0
    run = interrupted(tmp_path / "ppo", tmp_path / "again", 1)
    other = trained_again(reward, tmp_path / "other")
    assert train(world, run, *common, f"--reward_model={other}") == 1
    sentence = "was rewarded by other weights than those that --reward_model gives now"
    assert sentence in capsys.readouterr().err
    assert train(world, run, *common, f"--reward_model={reward}") == 0


def test_one_command_trains_a_reward_model_and_then_ppo_with_all_four_models(world, tmp_path, monkeypatch, capsys):
    """`examples/ppo_four_models.py`, small; once more it finds both runs finished."""
    example = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "ppo_four_models.py"))["main"]
    quickstart = tmp_path / "quickstart"
    with pytest.raises(SystemExit, match="run minigpt quickstart first"):
        example([f"--quickstart={quickstart}"])
    shutil.copytree(world / "sft", quickstart / "reason_start")
    shutil.copytree(world / "microworld", quickstart / "microworld")
    options = [option for option in OPTIONS if not option.startswith(("--max_steps", "--critic_warmup"))]
    places = [f"--quickstart={quickstart}", f"--save_dir={tmp_path / 'ppo4'}", "--reward_steps=2"]
    command = [*places, *options, "--max_steps=2", "--critic_warmup=1"]
    threads = torch.get_num_threads()
    try:
        example(command)
    finally:
        torch.set_num_threads(threads)
    assert metrics_of(tmp_path / "ppo4" / "reward")[-1]["step"] == 2
    warming, learning = metrics_of(tmp_path / "ppo4" / "ppo")
    assert all("reward_model" in line and "value_loss" in line and "accuracy" in line for line in (warming, learning))
    assert "loss" not in warming
    assert {"loss", "kl_per_answer"} <= learning.keys()
    said = capsys.readouterr().out
    assert "policy (1) + critic (1) + reference (1) + reward (1) + rollout (1)" in said
    held_out = tmp_path / "ppo4" / "ppo" / "heldout" / "data"
    assert f"held-out prompts of {held_out}" in said or f"into {held_out}" in said, "the world of this quickstart"
    example(command)
    assert capsys.readouterr().out.count("nothing to do") == 2


def test_what_has_no_effect_is_said_once_before_the_first_step(world, tmp_path, capsys):
    """Options that the others make idle, and evaluation where nothing is held out."""
    raw, data = world / "microworld" / "prompt.jsonl", tmp_path / "prompts"
    pack(PackOptions(stage="prompt", input=[raw], output=data, seq_len=64, workers=1, valid_fraction=0))
    idle = ["--max_steps=2", "--critic_warmup=0", "--minibatches=1", "--update_epochs=1", "--clip_high=0.28"]
    assert train(world, tmp_path / "ppo", f"--data={data}", *idle, "--eval_interval=1") == 0
    said = capsys.readouterr().out
    assert said.count("no prompts are held out, so nothing is evaluated (--eval_interval, --eval_prompts)") == 1
    assert said.count("--clip_high 0.28 is without effect with one update a step") == 1
    assert said.count("without effect") == 1
    assert not metrics_of(tmp_path / "ppo", "eval")


def test_two_ranks_of_policy_and_critic_learn_what_one_does(whole, world, tmp_path):
    layout = tmp_path / "layout.yaml"
    layout.write_text("policy: {workers: 2, threads: 1}\ncritic: {workers: 2, threads: 1}\n")
    run = tmp_path / "ppo"
    assert train(world, run, *ADAPTIVE, f"--layout={layout}") == 0
    for ours, theirs in zip(metrics_of(run), metrics_of(whole), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in without_times(theirs).items():
            if name != "kind":
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for folder, other in ((run, whole), (run / "critic", whole / "critic")):
        ours, theirs = (module_weights(one, STEPS) for one in (folder, other))
        for name, weight in theirs.items():
            assert (ours[name] - weight).norm() < 1e-4 * weight.norm(), name
