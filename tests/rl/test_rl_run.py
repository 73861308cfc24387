"""Whole runs of `minigpt train grpo|ppo` on Ray and DeepSpeed: they learn what is rewarded, end with the same bits
however often they are disturbed, and say in a sentence what is wrong."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from tiny_rl import MARK, marked, metrics_of, pack_prompts, run_here, wait_until, write_run
from whole_runs import checkpoint, engine_state, interrupted, position, runs_without_actors, without_times

from minigpt.rl import algorithms

pytestmark = pytest.mark.slow

REWARDS = '''
import time

def letters(prompt, completion, reference):
    """The share of ASCII letters."""
    return sum(c.isascii() and c.isalpha() for c in completion) / max(1, len(completion))

def hangs(prompt, completion, reference):
    time.sleep(1000)
'''
CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
SMALL = ["--dtype=fp32", "--compile=false", "--threads=1", "--tensorboard=false", "--max_new_tokens=8"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A random model, prompts packed for it, and a file of rewards."""
    root = tmp_path_factory.mktemp("world")
    write_run(root / "sft")
    pack_prompts(root)
    (root / "rewards.py").write_text(REWARDS)
    return root


def arguments(world: Path, stage: str, save_dir: Path, reward: str, *options: str) -> list[str]:
    return [
        *("train", stage, f"--data={world / 'prompts'}", f"--init={world / 'sft'}", f"--save_dir={save_dir}"),
        *(f"--reward={world / 'rewards.py'}:{reward}", *SMALL, *options),
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*.pth")
    return torch.load(path, weights_only=True)


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ------------------------------------------------------------------------------------------------------------ learning

BANDIT = ["--prompts_per_step=8", "--samples_per_prompt=8", "--learning_rate=1e-2", "--eval_prompts=8"]
LEARNS = {
    "grpo": [*BANDIT, "--max_steps=60"],
    "ppo": [*BANDIT, "--max_steps=60", "--kl_coefficient=0", "--critic_learning_rate=1e-2"],
}


@pytest.fixture(scope="module", params=LEARNS)
def learned(request, world, tmp_path_factory) -> tuple[str, Path, float]:
    """A run that was rewarded for letters, and how many seconds it took from the command to its end."""
    folder = tmp_path_factory.mktemp("learned") / request.param
    started = time.monotonic()
    assert run_here(*arguments(world, request.param, folder, "letters", *LEARNS[request.param])) == 0
    return request.param, folder, time.monotonic() - started


def test_it_learns_what_is_rewarded(learned):
    stage, folder, seconds = learned
    lines = metrics_of(folder)
    rewards = [line["reward"] for line in lines]
    assert rewards[0] < 0.85
    assert sum(rewards[-5:]) / 5 > 0.9
    assert lines[-1]["seconds"] < seconds < 90
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stage"] == stage
    assert summary["after"]["reward"] > 0.9
    assert summary["before"]["reward"] < summary["after"]["reward"]
    assert summary["after"]["samples"][0].keys() >= {"prompt", "answer", "reward"}


def test_it_logs_what_there_is_to_see(learned):
    stage, folder, _ = learned
    always = {
        *("reward", "reward_std", "zero_variance_groups", "response_length", "truncated", "version_lag"),
        *("seconds_step", "seconds_generate", "seconds_rewards", "seconds_publish", "tokens_per_second"),
    }
    if stage == "ppo":
        always |= {"explained_variance", "value_loss", "seconds_values", "seconds_update_critic"}
    of_updates = {
        *("lr", "loss", "entropy", "clip_fraction", "ratio", "grad_norm", "sampler_gap_mean", "sampler_gap_max"),
        "seconds_update_policy",
    }
    lines = metrics_of(folder)
    updates = [line for line in lines if line["zero_variance_groups"] < 1]
    assert len(updates) > 30
    for line in lines:
        assert not always - line.keys()
        assert line["version_lag"] == 0
    for line in updates:
        assert not of_updates - line.keys()
        assert line["ratio"] == 1.0, "one update a step: exact by construction"
        assert line["sampler_gap_max"] < 1e-4


def test_the_exported_model_generates(learned, capsys):
    _, folder, _ = learned
    for place in (folder, folder / "hf"):
        assert run_here("generate", str(place), "--prompt=abc", "--max_new_tokens=8") == 0
        written = capsys.readouterr().out
        assert sum(c.isascii() and c.isalpha() for c in written) > 0.8 * len(written.strip())


@pytest.mark.parametrize("stage", LEARNS)
def test_with_negated_advantages_it_unlearns_what_is_rewarded(world, tmp_path, monkeypatch, stage):
    """The same run that learned, but for a sign in the controller, which runs in this process; a critic sees right."""
    group_advantages, gae = algorithms.group_advantages, algorithms.gae

    def negated(*arguments, **options):
        advantages, returns = gae(*arguments, **options)
        return -advantages, returns

    monkeypatch.setattr(algorithms, "group_advantages", lambda *a, **options: -group_advantages(*a, **options))
    monkeypatch.setattr(algorithms, "gae", negated)
    folder = tmp_path / "negated"
    with runs_without_actors():
        assert run_here(*arguments(world, stage, folder, "letters", *LEARNS[stage])) == 0
    rewards = [line["reward"] for line in metrics_of(folder)]
    assert max(rewards) < 0.9
    assert sum(rewards[-5:]) / 5 < rewards[0]


# -------------------------------------------------------------------------------------------------------- disturbances

DISTURBED = [
    *("--prompts_per_step=4", "--samples_per_prompt=4", "--max_new_tokens=48", "--batch_invariant=true"),
    *("--rollout_slots=8", "--learning_rate=1e-3", "--max_steps=6", "--save_interval=1", "--eval_prompts=4"),
]


def start(world: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "minigpt.cli", *arguments(world, "grpo", folder, "letters", *DISTURBED, *options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def steps_done(folder: Path) -> int:
    return len(list(folder.glob("checkpoints/step_*/manifest.json"))) and max(
        int(path.name.removeprefix("step_")) for path in folder.glob("checkpoints/step_*")
    )


def kill_actor(driver: subprocess.Popen[str], title: str) -> None:
    """Kill -9 the actor in the middle of a method, which Ray puts into its process title."""
    found: list[psutil.Process] = []

    def running() -> bool:
        for process in psutil.Process(driver.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] == [f"ray::{title}"]:
                    found.append(process)
                    process.kill()
                    return True
            except psutil.Error:  # it ended while we looked
                continue
        return False

    wait_for(running, driver)


def undisturbed_run(world: Path, folder: Path, *options: str) -> Path:
    ended(start(world, folder, *options))
    assert not torch.equal(weights(folder)["model.norm.weight"], weights(world / "sft")["model.norm.weight"]), (
        "it trained"
    )
    return folder


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory) -> Path:
    return undisturbed_run(world, tmp_path_factory.mktemp("undisturbed") / "grpo")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[str]:
    """Options of a policy that is cut in two, and of answers that are sampled while it learns."""
    layout = tmp_path_factory.mktemp("layout") / "layout.yaml"
    layout.write_text("policy: {workers: 2, threads: 1}\n")
    return [f"--layout={layout}", f"--deepspeed={CONFIGS / 'zero3.json'}", "--overlap=1"]


@pytest.fixture(scope="module")
def undisturbed_two_ranks(world, two_ranks, tmp_path_factory) -> Path:
    folder = undisturbed_run(world, tmp_path_factory.mktemp("two_ranks") / "grpo", *two_ranks)
    assert [line["version_lag"] for line in metrics_of(folder)] == [0, 1, 1, 1, 1, 1]
    return folder


def test_a_sampler_killed_in_mid_generation_changes_no_bit(world, undisturbed, tmp_path):
    driver = start(world, tmp_path / "run")
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, driver)
    kill_actor(driver, "RolloutWorker.generate")
    output = ended(driver)
    assert "rollout worker 0 died" in output
    assert "a new one answers the same prompts" in output
    assert_same_weights(tmp_path / "run", undisturbed)


def test_roles_that_take_turns_and_a_sampler_killed_in_its_turn_change_no_bit(world, undisturbed, tmp_path):
    driver = start(world, tmp_path / "run", "--sleep=true")
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, driver)
    kill_actor(driver, "RolloutWorker.generate")
    assert "a new one answers the same prompts" in ended(driver)
    assert all(line["seconds_turns"] > 0 for line in metrics_of(tmp_path / "run"))
    assert all("seconds_turns" not in line for line in metrics_of(undisturbed)), "there is no GPU that roles share"
    assert_same_weights(tmp_path / "run", undisturbed)


def test_weights_by_broadcast_and_a_sampler_killed_under_it_change_no_bit(world, undisturbed, tmp_path):
    """Two samplers here, one there."""
    layout = tmp_path / "layout.yaml"
    layout.write_text("rollout: {workers: 2}\n")
    driver = start(world, tmp_path / "run", "--weight_transport=broadcast", f"--layout={layout}")
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, driver)
    kill_actor(driver, "RolloutWorker.generate")
    output = ended(driver)
    assert "a new one answers the same prompts" in output
    assert "object store" not in output, "each version was broadcast, also to the new one"
    assert_same_weights(tmp_path / "run", undisturbed)


def test_a_killed_policy_starts_again_from_the_last_checkpoint(world, undisturbed, tmp_path):
    driver = start(world, tmp_path / "run")
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, driver)
    kill_actor(driver, "PolicyWorker.update")
    output = ended(driver)
    assert "policy worker 0 died" in output
    assert "resuming from" in output
    assert_same_weights(tmp_path / "run", undisturbed)


def test_one_of_two_policy_ranks_that_is_killed_starts_both_again_and_leaves_no_process_behind(
    world, two_ranks, undisturbed_two_ranks, tmp_path, monkeypatch
):
    """The other rank waits in a collective for a neighbour that will not come."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    driver = start(world, tmp_path / "run", *two_ranks)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, driver)
    kill_actor(driver, "PolicyWorker.update")
    output = ended(driver)
    assert re.search(r"policy worker [01] died", output)
    assert len(re.findall(r"resuming from .* at step [2-5] of 6", output)) == 1
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(tmp_path / "run", undisturbed_two_ranks)
    assert wait_until(lambda: not marked(mark)), marked(mark)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_stopped_run_goes_on_to_the_same_bits_and_leaves_no_process_behind(
    world, undisturbed, two_ranks, undisturbed_two_ranks, tmp_path, number
):
    """Killed, it had answers under way."""
    options, expected = ([], undisturbed) if number == signal.SIGTERM else (two_ranks, undisturbed_two_ranks)
    driver = start(world, tmp_path / "run", *options)
    wait_for(lambda: steps_done(tmp_path / "run") >= 2, driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, number)
    output, _ = driver.communicate(timeout=60)
    assert driver.returncode == (128 + number if number == signal.SIGTERM else -number), output
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert not (tmp_path / "run" / "summary.json").exists()
    assert "resuming from" in ended(start(world, tmp_path / "run", *options))
    assert_same_weights(tmp_path / "run", expected)


# ------------------------------------------------------------------------------------------------------ overlap, errors


def test_ppo_with_overlap_goes_on_with_the_answers_that_were_under_way(world, tmp_path):
    """Its critic, groups that give way to others and a coefficient that follows its target change nothing in that. A
    checkpoint that an earlier MiniGPT wrote holds no answers: its prompts are asked again, by its own weights."""
    options = ["--overlap=1", "--dynamic_sampling=1", "--kl_coefficient=0.2", "--kl_target=0.05", "--max_steps=5"]
    options += ["--prompts_per_step=4", "--samples_per_prompt=4", "--learning_rate=1e-2", "--critic_learning_rate=1e-2"]
    options += ["--save_interval=1", "--keep_checkpoints=10", "--eval_prompts=4"]
    whole = tmp_path / "whole"

    def train(folder: Path) -> list[dict]:
        assert run_here(*arguments(world, "ppo", folder, "letters", *options)) == 0
        return metrics_of(folder)

    with runs_without_actors():
        expected = [without_times(line) for line in train(whole)]
        resumed = interrupted(whole, tmp_path / "resumed", 2)
        assert [without_times(line) for line in train(resumed)] == expected
        assert [line["version_lag"] for line in expected] == [0, 1, 1, 1, 1]
        for folder, other in ((resumed, whole), (resumed / "critic", whole / "critic")):
            ours, theirs = engine_state(folder, 5), engine_state(other, 5)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert position(resumed, 5) == position(whole, 5)

        older = interrupted(whole, tmp_path / "older", 2)
        without_answers(checkpoint(older, 2))
        lines = train(older)
        assert [line["version_lag"] for line in lines] == [0, 1, 0, 1, 1]
        assert position(older, 3)["prompts"] >= 4 * 4


def without_answers(folder: Path) -> None:
    """The checkpoint as it was written before checkpoints held answers."""
    state, manifest = (json.loads((folder / name).read_text()) for name in ("state.json", "manifest.json"))
    assert state.pop("answers")
    (folder / "state.json").write_text(json.dumps(state))
    manifest["state.json"] = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_hanging_reward_counts_as_a_failure(world, tmp_path, capsys):
    options = ["--prompts_per_step=1", "--samples_per_prompt=2", "--max_steps=1", "--reward_timeout=0.5"]
    command = arguments(world, "grpo", tmp_path / "run", "hangs", *options, "--eval_prompts=1")
    assert run_here(*command) == 0
    (line,) = metrics_of(tmp_path / "run")
    assert line["reward_failures"] == 2
    assert line["reward"] == 0
    assert "took more than 0.5 s" in capsys.readouterr().out


FAILING = """
import sys
from minigpt import cli
from minigpt.rl.roles import CLASSES
from minigpt.rl.workers import PolicyWorker

class Failing(PolicyWorker):
    def update(self, *arguments):
        return self.deep_inside(0)

    def deep_inside(self, count):
        raise ValueError(f"the mean of {count} answers")

CLASSES["policy"] = Failing
cli.main(sys.argv[1:])
"""


def test_a_workers_traceback_reaches_the_person_line_by_line(world, tmp_path):
    """A ValueError in an actor is nobody's input: it does not pass for a sentence about it."""
    options = ["--prompts_per_step=1", "--samples_per_prompt=2", "--max_steps=1", "--eval_prompts=1"]
    command = arguments(world, "grpo", tmp_path / "run", "letters", *options)
    done = subprocess.run([sys.executable, "-c", FAILING, *command], capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    (begin,) = (i for i, line in enumerate(lines) if line.startswith("ray::Failing.update()"))
    shown = lines[begin:]
    assert any(line.endswith(", in update") for line in shown)
    assert any(line.endswith(", in deep_inside") for line in shown)
    assert shown[-2:] == [
        "ValueError: the mean of 0 answers",
        "error: policy worker 0 failed to update: ValueError: the mean of 0 answers; its traceback stands above",
    ]
    assert "\x1b" not in done.stderr


def test_weights_that_are_damaged_are_one_sentence(world, tmp_path, capsys):
    """They are read by the workers; what is wrong with them is the person's to mend."""
    init = shutil.copytree(world / "sft", tmp_path / "sft")
    weights_file = init / "hf" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1000])
    assert run_here(*arguments(world, "grpo", tmp_path / "run", "letters", f"--init={init}")) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {weights_file.resolve()}: not a whole safetensors file")
    assert "\n" not in error


WRONG = {
    "data that is not there": (["--data=nowhere"], "nowhere"),
    "an init that is no model": (["--init=nowhere"], "--init nowhere holds no model"),
    "a reward model that is none": (["--reward_model=nowhere"], "--reward_model nowhere holds no model"),
    "a reward that nobody knows": (["--reward=acuracy"], "acuracy"),
    "one answer a prompt": (["--samples_per_prompt=1"], "--samples_per_prompt is 1"),
    "overlap without correction": (["--overlap=1", "--behaviour_correction=false"], "--behaviour_correction"),
    "minibatches that do not divide": (["--minibatches=3"], "do not divide into --minibatches 3"),
    "a layout that is not there": (["--layout=nowhere.yaml"], "nowhere.yaml is neither a file nor one of"),
    "a layout for GPUs": (["--layout=split"], "needs two GPUs"),
}


@pytest.mark.parametrize(("options", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_sentence(world, tmp_path, capsys, options, sentence):
    status = run_here(*arguments(world, "grpo", tmp_path / "run", "letters", *options))
    error = capsys.readouterr().err.strip()
    assert status == 1
    assert error.startswith("error: ")
    assert "\n" not in error
    assert sentence in error
    assert "unexpected" not in error


def test_prompts_without_answers_need_another_reward_than_accuracy(world, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": f"Tell me about {i}."}) + "\n" for i in range(40)))
    options = ["--max_steps=1", f"--data={asked}", "--reward=accuracy"]
    assert run_here(*arguments(world, "grpo", tmp_path / "run", "letters", *options)) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: (\d+) of \1 prompts in", error)
    assert "give other rewards with --reward, or none by --reward=[] beside --reward_model" in error


def test_an_adapter_of_other_layers_is_another_run(world, tmp_path, capsys, monkeypatch):
    """The optimizer's flat state of one would fit the other by its size."""
    monkeypatch.setattr("minigpt.trainer.run.peak_flops", None)  # the driver measures no machine that others train on
    common = ["--save_interval=1", "--lora_rank=4", "--max_steps=2"]
    folder = tmp_path / "run"
    assert run_here(*arguments(world, "grpo", folder, "letters", *common, "--lora_targets=q_proj")) == 0
    (folder / "summary.json").unlink()
    capsys.readouterr()
    again = [*common[:-1], "--max_steps=3", "--lora_targets=o_proj"]
    assert run_here(*arguments(world, "grpo", folder, "letters", *again)) == 1
    assert "trains other weights than these options" in capsys.readouterr().err


LAYOUTS = {
    "a role that there is not": ("actor: {workers: 1}", "there is no role 'actor'"),
    "more than the cluster has": ("policy: {workers: 2, cpus: 500}", "the layout needs 1000"),
}


@pytest.mark.parametrize(("layout", "sentence"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_that_cannot_be_is_refused_at_once(world, tmp_path, capsys, layout, sentence):
    path = tmp_path / "layout.yaml"
    path.write_text(layout)
    started = time.monotonic()
    status = run_here(*arguments(world, "grpo", tmp_path / "run", "letters", f"--layout={path}"))
    assert status == 1
    assert sentence in capsys.readouterr().err
    assert time.monotonic() - started < 60
