"""The controller on workers in this process: which prompts it asks and asks again, what it learns from, what it hands
to whom. What passes between it and the workers goes through Ray's object store, only the actors are left out."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import ray
import tiny_rewards
import torch
from tiny_rl import STOP_IDS, Call, InlineGroup, make_job, plain_forward, write_world

from data_prep.pack import PackOptions, pack
from minigpt.dataset.chat import ChatEncoder
from minigpt.dataset.shards import PackedDataset
from minigpt.errors import UserError
from minigpt.model.model_critic import RewardModel
from minigpt.rl import cluster
from minigpt.rl.batch import RolloutBatch
from minigpt.rl.group import WorkerDied
from minigpt.rl.loop import Loop, Position
from minigpt.rl.options import GRPOOptions, PPOOptions
from minigpt.rl.prompts import PromptSource
from minigpt.rl.reward_pool import RewardPool
from minigpt.rl.roles import CLASSES, Roles
from minigpt.rl.run import RLStage, _answers_under_way, _check_judges, _prompts
from minigpt.rl.workers import RolloutWorker, Timed
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.setup import load_masters

pytestmark = pytest.mark.slow

REWARDS = Path(tiny_rewards.__file__)
PROMPTS, SAMPLES = 4, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module", autouse=True)
def our_ray():
    cluster.connect(num_cpus=1)
    yield
    cluster.disconnect()


@pytest.fixture(scope="module")
def pools():
    """One process for each reward."""
    made = {name: RewardPool([f"{REWARDS}:{name}"]) for name in ("sometimes", "never", "letters")}
    yield made
    for pool in made.values():
        pool.close()


@pytest.fixture(scope="module")
def reward_model(world, tmp_path_factory) -> Path:
    """One that knows nothing: a new head on the policy's transformer."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("reward") / "reward"
    RewardModel.from_decoder(load_masters(world / "sft")).save_pretrained(folder, tokenizer_folder=None)
    return folder


class Run:
    """A loop, and what its workers were asked so far."""

    def __init__(
        self,
        world: Path,
        pool: RewardPool,
        position: Position | None = None,
        checkpoint: Path | None = None,
        answers: RolloutBatch | None = None,
        name: str = "grpo",
        stop_ids: tuple[int, ...] = STOP_IDS,
        **options: Any,
    ) -> None:
        sizes = {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_new_tokens": 6, "max_steps": 6}
        job = make_job(world / "sft", name, 128, **{**sizes, **options})
        self.source = PromptSource(
            PackedDataset(world / "prompts"), ChatEncoder(world / "sft" / "hf"), None, job.options.seed, 100
        )
        job = replace(job, longest=self.source.longest + 6, stop_ids=stop_ids)
        self.roles = Roles(job, print)
        self.roles.setup()
        position = position or Position(kl_coefficient=job.options.kl_coefficient)
        if checkpoint is not None:
            self.roles.load(checkpoint, None)
        self.roles.publish(position.step)
        self.loop = Loop(job.options, self.roles, pool, self.source, None, stop_ids, position, answers)

    def calls(self, role: str, method: str) -> list[Call]:
        return [call for call in self.roles.groups[role].calls if call.method == method]

    def values(self, role: str, method: str) -> list[Any]:
        return [call.value for call in self.calls(role, method)]

    @property
    def asked(self) -> list[list[int]]:
        """Numbers of the prompts of each request."""
        requests = [call.arguments[0] for call in self.calls("rollout", "generate")]
        return [(request.first_sample_ids // SAMPLES).tolist() for request in requests]

    @property
    def learned(self) -> list[RolloutBatch]:
        """What the policy was updated on."""
        return [call.arguments[0] for call in self.calls("policy", "update")]

    def teaches(self, number: int) -> bool:
        ids = self.source.prompt_ids(int(self.source.order.indices(np.array([number]))[0]))
        return tiny_rewards.teaches(self.source.encoder.decode(ids.tolist(), skip_special_tokens=False))

    def weights(self) -> dict[str, torch.Tensor]:
        """The policy's, under the names of the model."""
        weights = self.roles.groups["policy"].worker.engine.master_weights()
        return {name.removeprefix("model."): weight for name, weight in weights.items()}

    def close(self) -> None:
        self.roles.close()


@pytest.fixture
def start(world, pools, monkeypatch):
    """Makes runs, and ends them."""
    monkeypatch.setattr("minigpt.rl.roles.WorkerGroup", InlineGroup)
    made = []

    def begin(reward: str = "sometimes", **options) -> Run:
        made.append(Run(world, pools[reward], **options))
        return made[-1]

    yield begin
    for run in made:
        run.close()


def numbers(batch: RolloutBatch) -> list[int]:
    """Of the prompts of a batch."""
    return (batch.sample_ids[::SAMPLES] // SAMPLES).tolist()


def same(a: RolloutBatch, b: RolloutBatch, but: tuple[str, ...] = ()) -> bool:
    ours, theirs = ({**vars(x), **x.columns, "columns": sorted(x.columns)} for x in (a, b))
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[k], theirs[k]) for k in ours.keys() - {*but})


# ---------------------------------------------------------------------------------------------------- dynamic sampling


@pytest.mark.parametrize("overlap", [0, 1])
def test_groups_that_teach_nothing_give_way_to_the_prompts_that_come_next(start, overlap):
    run = start(dynamic_sampling=2, overlap=overlap, learning_rate=1e-3)
    rounds = []
    for _ in range(6):
        before = len(run.asked)
        metrics = run.loop.step()
        rounds.append(len(run.asked) - before)
        if (coming := run.loop.position.under_way) is not None:
            assert max(numbers(run.learned[-1])) < coming, "what fills up does not wait behind the next step's answers"
        drawn = [len(batch.versions) for batch in run.values("rollout", "generate")][before:]
        if not overlap:
            seconds = run.roles.clock.computed["generate"]
            assert metrics["generated_tokens_per_second"] * seconds == pytest.approx(sum(drawn))
            assert_metrics_are_of_all_rounds(run, before, metrics)
    asked = run.asked
    assert [k for request in asked for k in request] == list(range(run.loop.position.prompts)), "each once, in order"
    assert len(run.learned) == 6
    assert [len(batch) // SAMPLES for batch in run.learned].count(PROMPTS) > 1, "some were filled up"
    found = [numbers(batch) for batch in run.learned]
    assert sorted(k for one in found for k in one) == [k for k in range(run.loop.position.prompts) if run.teaches(k)]
    for one, made in zip(found, rounds, strict=True):
        assert one == sorted(one)
        assert len(one) == PROMPTS or made >= 2 + (overlap and made > 2), "it gave up before its last round"
        assert 0 < len(one) <= PROMPTS
    assert max(rounds) <= 3 + overlap
    for batch in run.learned:
        assert_advantages_are_of_these_answers(run, batch)


def assert_metrics_are_of_all_rounds(run: Run, before: int, metrics: dict[str, float]) -> None:
    """Also of the answers that gave way: what is left of them after the choice looks better than the policy is."""
    lengths = np.concatenate([batch.answer_lens for batch in run.values("rollout", "generate")[before:]])
    assert metrics["response_length"] == pytest.approx(lengths.mean())
    assert metrics["response_length_max"] == lengths.max()
    teaches = [run.teaches(k) for request in run.asked[before:] for k in request]
    assert metrics["zero_variance_groups"] == pytest.approx(1 - np.mean(teaches))
    (name,) = (name for name in metrics if name.endswith("sometimes"))
    assert metrics["reward"] == pytest.approx(metrics[name], abs=1e-6)


def assert_advantages_are_of_these_answers(run: Run, batch: RolloutBatch) -> None:
    """Every row has its own prompt, and the advantage of its own answer."""
    starts = np.cumsum(batch.lengths) - batch.lengths
    for k, start in zip(range(len(batch)), starts, strict=True):
        row = int(run.source.order.indices(batch.sample_ids[k : k + 1] // SAMPLES)[0])
        assert batch.prompt_rows[k] == row
        assert np.array_equal(batch.tokens[start : start + batch.prompt_lens[k]], run.source.prompt_ids(row))
    assert np.array_equal(batch.sample_ids.reshape(-1, SAMPLES), np.array(numbers(batch))[:, None] * 2 + [0, 1])
    texts = [
        run.source.encoder.decode([i for i in ids.tolist() if i not in STOP_IDS or i != ids[-1]])
        for ids in batch.answers()
    ]
    prompts = [
        run.source.encoder.decode(run.source.prompt_ids(r).tolist(), skip_special_tokens=False)
        for r in batch.prompt_rows
    ]
    rewards = np.array([tiny_rewards.sometimes(p, t, {}) for p, t in zip(prompts, texts, strict=True)])
    groups = rewards.reshape(-1, SAMPLES)
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(batch.columns["advantages"], np.repeat(expected.reshape(-1), batch.answer_lens), atol=1e-4)


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_resumed_run_learns_from_what_the_uninterrupted_one_learned_from(start, tmp_path, overlap):
    """Also from the answers that were under way, which weights sampled that nobody has any more."""
    options = {"dynamic_sampling": 2, "overlap": overlap, "learning_rate": 1e-2}
    undisturbed, run = start(**options), start(**options)
    for _ in range(6):
        undisturbed.loop.step()
    for _ in range(3):
        run.loop.step()
    answers = run.loop.answers_under_way()
    assert (answers is not None) == bool(overlap)
    text = None if answers is None else answers.to_text()
    saved = json.loads(json.dumps({"step": 3, "position": asdict(run.loop.position), "answers": text}))
    run.roles.save(tmp_path, saved)
    place = {"position": Position(**saved["position"]), "checkpoint": tmp_path / "checkpoints" / "step_00000003"}
    if overlap:
        place["answers"] = RolloutBatch.from_text(saved["answers"])
    resumed = start(**place, **options)
    for one in (run, resumed):
        for _ in range(3):
            metrics = one.loop.step()
        assert metrics["version_lag"] == overlap
        assert len(undisturbed.learned) == 6
        for ours, theirs in zip(one.learned[-3:], undisturbed.learned[3:], strict=True):
            assert same(ours, theirs)
        assert one.loop.position.prompts == undisturbed.loop.position.prompts
        assert one.loop.position.tokens == undisturbed.loop.position.tokens
        ours, theirs = one.weights(), undisturbed.weights()
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_a_run_that_is_to_stop_does_not_wait_long_for_the_answers_under_way(start, monkeypatch):
    """They are asked again when it goes on. It may be told to while it waits already."""
    run = start(overlap=1)
    run.loop.step()
    looks: list[float] = []

    def at_work(sampling: Any, seconds: float) -> bool:
        looks.append(seconds)
        return True

    with monkeypatch.context() as patch:
        patch.setattr("minigpt.rl.loop.STOPPING_SECONDS", 0.0)
        patch.setattr(run.roles, "are_at_work", at_work)
        assert run.loop.answers_under_way(lambda: len(looks) >= 3) is None
    assert looks == [1.0, 1.0, 1.0]
    position = replace(run.loop.position)
    assert position.under_way == PROMPTS
    resumed = start(overlap=1, position=position)
    assert resumed.loop.step()["version_lag"] == 0
    assert resumed.asked[0] == [PROMPTS + k for k in range(PROMPTS)]
    found = run.loop.answers_under_way(lambda: True)
    assert found is not None, "they are there"
    assert numbers(found) == [PROMPTS + k for k in range(PROMPTS)]


def test_a_run_that_is_to_stop_does_not_replace_who_died_of_the_answers_under_way(start, monkeypatch):
    run = start(overlap=1)
    run.loop.step()

    def died(reference: Any, rank: int, what: str) -> None:
        raise WorkerDied("rollout", rank, "it was told to stop, too")

    monkeypatch.setattr(run.roles.groups["rollout"], "result", died)
    monkeypatch.setattr(run.roles, "collect", pytest.fail)
    assert run.loop.answers_under_way(lambda: True) is None


def test_answers_that_other_options_would_not_sample_are_not_learned_from(world):
    """They would be of other prompts, too many, too long, or corrected by nothing; so they are sampled again."""
    batch = RolloutBatch(*(np.arange(3) for _ in range(8)))
    asked = make_job(world / "sft", overlap=1, thinking=True).options
    state = {"options": json.loads(json.dumps(asdict(asked), default=str)), "answers": batch.to_text()}
    found = _answers_under_way(state, replace(asked, learning_rate=1.0, save_interval=3))
    assert found is not None
    assert same(found, batch)
    others = {"overlap": 0, "prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 5, "temperature": 0.9}
    for name, value in {**others, "seed": 1, "thinking": None}.items():
        assert _answers_under_way(state, replace(asked, **{name: value})) is None, name


def test_where_no_group_teaches_anything_nothing_is_learned(start):
    """Not even by the optimizer's momentum; the step counts, and so do the prompts that were asked in vain."""
    run = start("never", dynamic_sampling=2, learning_rate=1e-2)
    before = run.weights()
    metrics = run.loop.step()
    assert run.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert (run.loop.position.prompts, run.loop.position.step) == (12, 1)
    assert "loss" not in metrics
    assert metrics["zero_variance_groups"] == 1.0
    assert not run.learned
    first = run.values("rollout", "generate")[0]
    assert run.loop.position.tokens == len(first.behaviour_log_probs), "a step is no larger for having asked in vain"
    after = run.weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    run.loop.step()
    assert run.asked[3] == [12, 13, 14, 15]


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_steps_in_a_row_that_teach_nothing_are_said_once(start, capsys, name):
    """Also in PPO, whose critic makes advantages of equal rewards, and where a KL in the loss updates the policy."""
    run = start("never", name=name, max_steps=8, kl_coefficient=0.1)
    for step in range(7):
        run.loop.step()
        said = capsys.readouterr().out
        assert ("5 steps in a row had nothing to learn" in said) == (step == 4), said
        assert "(reward 0.3; 100% are cut off at --max_new_tokens)" in said or step != 4
    other = start("letters", name=name, max_steps=8)
    for _ in range(6):
        other.loop.step()
    assert "nothing to learn" not in capsys.readouterr().out


def test_a_step_of_fewer_answers_than_minibatches_makes_no_step_on_nothing(start):
    """One group is left, of two answers; the other minibatches would be the momentum's alone."""
    run = start(dynamic_sampling=1, minibatches=8, learning_rate=1e-3)
    first = next(k for k in range(100) if [run.teaches(j) for j in range(k, k + 8)].count(True) == 1)
    run.loop.position.prompts = first
    metrics = run.loop.step()
    (batch,) = run.learned
    assert len(batch) == SAMPLES
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    assert optimizer_steps(run) == 2


def test_a_minibatch_without_any_advantage_makes_no_step(start):
    """It would be the momentum's alone. Here each minibatch is one group."""
    run = start(minibatches=PROMPTS, learning_rate=1e-3)
    for _ in range(4):
        run.loop.step()
    asked = [k for request in run.asked for k in request]
    assert 0 < optimizer_steps(run) == sum(run.teaches(k) for k in asked) < len(asked)


def test_dynamic_sampling_of_single_answers_is_refused():
    """All groups of one would be put aside."""
    with pytest.raises(UserError, match="--samples_per_prompt at least 2"):
        PPOOptions(samples_per_prompt=1, dynamic_sampling=1)


REFUSED = {"warmup_ratio": 3.0, "min_lr_ratio": 5.0, "beta1": 1.0, "beta2": -0.1, "learning_rate": math.inf}


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=REFUSED)
@pytest.mark.parametrize("kind", [GRPOOptions, PPOOptions])
def test_what_other_stages_refuse_is_refused_in_the_same_words(kind, name, value):
    sentences = set()
    for options in (kind, TrainOptions):
        with pytest.raises(UserError, match=f"--{name} is ") as refused:
            options(**{name: value})
        sentences.add(str(refused.value))
    assert len(sentences) == 1


CONTRADICTIONS = {
    "a critic that warms up until the end": (
        {"critic_warmup": 20, "max_steps": 20},
        "critic_warmup is 20, .* less than",
    ),
    "a target without a coefficient": ({"kl_coefficient": 0, "kl_target": 1.0}, "--kl_target adapts --kl_coefficient"),
    "a bound on what has no gradient": (
        {"objective": "cispo", "dual_clip": 3.0},
        "--dual_clip bounds .* leave out one",
    ),
}


@pytest.mark.parametrize(("options", "sentence"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        PPOOptions(**options)


IDLE = {
    "clip_high": ({"clip_high": 0.28}, {"minibatches": 2}, "--minibatches or --update_epochs make more"),
    "clip_low": ({"clip_low": 0.1}, {"update_epochs": 2}, "--minibatches or --update_epochs make more"),
    "dual_clip": ({"dual_clip": 3.0}, {"minibatches": 2}, "--minibatches or --update_epochs make more"),
    "objective": ({"objective": "gspo"}, {"minibatches": 2}, "--minibatches or --update_epochs make more"),
    "value_clip": ({"value_clip": 0.5}, {"minibatches": 2}, "--minibatches or --update_epochs make more"),
    "behaviour_cap": ({"behaviour_cap": 3.0}, {"overlap": 1}, "without --behaviour_correction true or --overlap 1"),
    "kl_in": ({"kl_in": "loss", "kl_coefficient": 0.0}, {"kl_coefficient": 0.1}, "with a --kl_coefficient of 0"),
    "kl_gain": ({"kl_gain": 0.5}, {"kl_target": 1.0}, "without --kl_target"),
    "reward_model_weight": ({"reward_model_weight": 2.0}, {"reward_model": Path("x")}, "without --reward_model"),
    "reward_timeout": (
        {"reward": [], "reward_model": Path("x"), "reward_timeout": 9.0},
        {"reward": ["format"]},
        "--reward",
    ),
    "min_lr_ratio": ({"min_lr_ratio": 0.1}, {"schedule": "cosine"}, "with --schedule constant"),
}


@pytest.mark.parametrize(("name", "options", "used", "why"), [(k, *v) for k, v in IDLE.items()], ids=IDLE)
def test_an_option_without_effect_is_one_sentence_that_says_what_it_needs(name, options, used, why):
    (sentence,) = PPOOptions(**options).without_effect()
    assert sentence.startswith(f"--{name} {options[name]} is without effect ")
    assert sentence.endswith(why)
    assert not PPOOptions(**{**options, **used}).without_effect()


@pytest.mark.parametrize("options", [{}, {"objective": "gspo"}, {"objective": "cispo"}, {"clip_high": 0.5}], ids=str)
def test_what_is_said_to_be_without_effect_is(start, options):
    """One update a step: the objectives and their clips come to the same bits."""
    run, plain = start("letters", learning_rate=1e-2, **options), start("letters", learning_rate=1e-2)
    for _ in range(2):
        run.loop.step(), plain.loop.step()
    ours, theirs = run.weights(), plain.weights()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def optimizer_steps(run: Run) -> int:
    engine = run.roles.groups["policy"].worker.engine
    return engine._engine.global_steps


# ----------------------------------------------------------------------------------------- results that come twice


def counted(run: Run, steps: int) -> tuple[list[RolloutBatch], dict[str, torch.Tensor], int, int]:
    """What was learned from, what came of it, and how much was counted."""
    for _ in range(steps):
        run.loop.step()
    return run.learned, run.weights(), run.loop.position.tokens, run.loop.position.prompts


def assert_counted_once(ours: Run, theirs: Run, steps: int = 3) -> None:
    (learned, weights, *numbers), (expected, others, *right) = (counted(run, steps) for run in (ours, theirs))
    assert all(same(a, b) for a, b in zip(learned, expected, strict=True))
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert numbers == right


class LosingResults(InlineGroup):
    """Of its samplers every other answer is lost on its way, after it was written: Ray says that the worker died."""

    lost: ClassVar[int] = 0

    def result(self, reference: ray.ObjectRef, rank: int, what: str) -> Any:
        found = super().result(reference, rank, what)
        if what == "answer" and len([c for c in self.calls if c.method == "generate"]) % 2:
            LosingResults.lost += 1
            raise WorkerDied(self.role, rank, "its answer is lost")
        return found

    def restart(self, rank: int) -> None:
        self.worker = RolloutWorker(0, 1, 1, self.worker.job)
        self.workers = [self.worker]


@pytest.mark.parametrize("overlap", [0, 1])
def test_answers_that_are_written_twice_count_once(start, monkeypatch, overlap):
    """Asked again after a death that came behind the work."""
    options = {"overlap": overlap, "learning_rate": 1e-3}
    expected = start("letters", **options)
    monkeypatch.setattr("minigpt.rl.roles.WorkerGroup", LosingResults)
    monkeypatch.setattr(LosingResults, "lost", 0)
    run = start("letters", **options)
    assert_counted_once(run, expected)
    assert LosingResults.lost == 3
    assert len(run.asked) == len(expected.asked) + 3


class RepeatedSampler(RolloutWorker):
    """Its results hold every answer twice, as of a call that ran twice."""

    def generate(self, request):
        found = super().generate(request)
        found.value = RolloutBatch.concatenate([found.value, found.value])
        return found


def test_answers_that_arrive_twice_count_once(start, monkeypatch):
    expected = start("letters", learning_rate=1e-3)
    monkeypatch.setitem(CLASSES, "rollout", RepeatedSampler)
    assert_counted_once(start("letters", learning_rate=1e-3), expected)


def test_answers_that_are_missing_are_no_smaller_batch(start, monkeypatch):
    run = start("letters")
    worker = run.roles.groups["rollout"].worker
    generate = worker.generate

    def forgetful(request):
        found = generate(request)
        found.value = found.value.take(np.arange(1, len(found.value)))
        return found

    monkeypatch.setattr(worker, "generate", forgetful)
    with pytest.raises(AssertionError, match="answers are missing"):
        run.loop.step()


# ------------------------------------------------------------------------------------------- tokens a second, turns


def test_every_phase_of_a_model_tells_its_answer_tokens_a_second(start):
    """The policy's are those that it learned from; groups of equal rewards were left out of its update."""
    run = start("sometimes", learning_rate=1e-3)
    first = next(k for k in range(100) if 0 < [run.teaches(j) for j in range(k, k + PROMPTS)].count(True) < PROMPTS)
    run.loop.position.prompts = first
    metrics = run.loop.step()
    (drawn,), (learned,) = run.values("rollout", "generate"), run.learned
    assert metrics["trained_tokens"] == learned.answer_lens.sum() < drawn.answer_lens.sum()
    assert run.loop.position.tokens == drawn.answer_lens.sum()
    computed = run.roles.clock.computed
    assert metrics["tokens_per_second_update_policy"] * computed["update_policy"] == pytest.approx(
        learned.answer_lens.sum()
    )
    assert metrics["tokens_per_second"] * metrics["seconds_step"] == pytest.approx(drawn.answer_lens.sum())


def test_a_phase_of_several_epochs_counts_its_tokens_as_often(start, reward_model):
    options = {"name": "ppo", "kl_coefficient": 0.1, "update_epochs": 3, "minibatches": 2, "reward_model": reward_model}
    run = start("letters", **options)
    metrics = run.loop.step()
    (drawn,) = run.values("rollout", "generate")
    once = ("reference_log_probs", "policy_log_probs", "values", "reward_model")
    for phase, times in {**dict.fromkeys(once, 1), "update_policy": 3, "update_critic": 3}.items():
        found = metrics[f"tokens_per_second_{phase}"] * run.roles.clock.computed[phase]
        assert found == pytest.approx(times * drawn.answer_lens.sum()), phase


MODELS = ("reference_log_probs", "policy_log_probs", "values", "reward_model", "update_policy", "update_critic")


def test_overhead_is_all_that_is_neither_generation_nor_a_models_work(start, reward_model, pools, monkeypatch):
    """Rewards by rules and weights on their way are, here slow ones."""
    options = {"name": "ppo", "kl_coefficient": 0.1, "minibatches": 2, "reward_model": reward_model}
    run = start("letters", **options)
    run.loop.step()
    pool, policy = pools["letters"], run.roles.groups["policy"].worker
    for owner, method in ((pool, "score"), (policy, "publish"), (run.roles.groups["rollout"].worker, "load")):
        monkeypatch.setattr(owner, method, slowly(getattr(owner, method)))
    metrics = run.loop.step()
    assert {f"seconds_{name}" for name in ("generate", *MODELS)} < metrics.keys()
    busy = sum(run.roles.clock.computed[name] for name in ("generate", *MODELS))
    assert metrics["overhead"] == pytest.approx(1 - busy / metrics["seconds_step"], abs=1e-6)
    assert metrics["overhead"] * metrics["seconds_step"] > 3 * SLOW


SLOW = 0.4  # seconds


def slowly(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, which takes a while longer, by the worker's clock as well."""

    def slow(*arguments: Any) -> Any:
        time.sleep(SLOW)
        found = call(*arguments)
        if isinstance(found, Timed):
            found.seconds += SLOW
        return found

    return slow


class Watched(InlineGroup):
    """Knows which roles hold their memory: from the call that loads or wakes one until its sleep was waited for."""

    awake: ClassVar[set[str]] = set()
    most: ClassVar[list[str]] = []
    loaded: ClassVar[list[str]] = []

    def all(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        if method in ("setup", "wake"):
            self.awake.add(self.role)
            Watched.most = max(self.most, sorted(self.awake), key=len)
        if method == "setup":
            self.loaded.append(self.role)
        return super().all(method, *arguments)

    def result(self, reference: ray.ObjectRef, rank: int, what: str) -> Any:
        found = super().result(reference, rank, what)
        if what == "sleep":
            self.awake.remove(self.role)
        return found


@pytest.mark.parametrize("sleep", [True, False])
def test_roles_that_take_turns_load_one_after_the_other(start, reward_model, monkeypatch, sleep):
    """A start takes the memory of the largest role, as a step does, not of all together."""
    monkeypatch.setattr("minigpt.rl.roles.WorkerGroup", Watched)
    for name, empty in (("awake", set()), ("most", []), ("loaded", [])):
        monkeypatch.setattr(Watched, name, empty)
    run = start("letters", name="ppo", kl_coefficient=0.1, reward_model=reward_model, sleep=sleep)
    assert sorted(Watched.loaded) == ["critic", "policy", "reference", "reward", "rollout"]
    assert len(Watched.most) == (1 if sleep else 5), Watched.most
    run.loop.step()
    assert len(Watched.most) == (1 if sleep else 5), Watched.most


# -------------------------------------------------------------------------------------------------------------- overlap


def test_with_a_learning_rate_of_0_overlap_changes_nothing_but_the_version(start):
    """Every array of every batch that the policy learns from, but whose weights drew it."""
    apart, together = (start("letters", overlap=overlap, learning_rate=0) for overlap in (0, 1))
    for _ in range(4):
        for run in (apart, together):
            run.loop.step()
    for step in range(4):
        ours, theirs = (run.learned[step] for run in (together, apart))
        assert same(ours, theirs, but=("versions",))
        assert (theirs.versions == step).all()
        assert (ours.versions == max(0, step - 1)).all()


def test_with_overlap_every_token_is_drawn_and_weighed_by_the_weights_that_its_version_names(start):
    """The behaviour's log-probabilities are those of the weights one update ago, not of the ones that learn."""
    run = start("letters", overlap=1, learning_rate=1e-2)
    of_step = []
    for _ in range(3):
        of_step.append(run.weights())
        run.loop.step()
    for step, batch in enumerate(run.learned):
        version = max(0, step - 1)
        assert set(batch.versions.tolist()) == {version}
        assert np.abs(log_probs_of(run, of_step[version], batch) - batch.behaviour_log_probs).max() < 1e-5
        if step:
            assert np.abs(log_probs_of(run, of_step[step], batch) - batch.behaviour_log_probs).max() > 1e-3


def test_with_overlap_the_loss_weighs_every_token_by_policy_over_sampler(start):
    """min(π_old/μ, cap), where μ is the probability that it was drawn with: w · -advantage, on average."""
    run = start("letters", overlap=1, learning_rate=1e-2, behaviour_cap=1.02)
    metrics = {}
    for step in range(3):
        weights = run.weights()
        metrics = run.loop.step()
        batch = run.learned[step]
        ratio = np.exp(log_probs_of(run, weights, batch) - batch.behaviour_log_probs)
        weighed = np.minimum(ratio, 1.02)
        assert metrics["behaviour_weight"] == pytest.approx(weighed.mean(), abs=1e-5)
        assert metrics["loss"] == pytest.approx(-(weighed * batch.columns["advantages"]).mean(), abs=1e-5)
    assert (ratio > 1.02).any()
    assert (ratio < 0.98).any()
    assert abs(metrics["loss"] + batch.columns["advantages"].mean()) > 1e-4, "without weights it would be another one"


def log_probs_of(run: Run, weights: dict[str, torch.Tensor], batch: RolloutBatch) -> np.ndarray:
    """Of every answer token by certain weights, one sequence after the other."""
    model = load_masters(run.roles.job.init)
    model.load_state_dict(weights)
    with torch.no_grad():
        return torch.cat([log_p for log_p, _ in plain_forward(model, batch)]).double().numpy()


def test_the_loop_samples_from_the_distribution_that_policy_and_reference_score(start):
    """At a temperature of its own: no filter and no penalty stands between what is drawn and what is learned from."""
    run = start("letters", temperature=0.6, kl_coefficient=0.1, learning_rate=1e-3)
    metrics = run.loop.step()
    assert metrics["sampler_gap_max"] < 1e-5
    assert metrics["kl"] < 1e-9
    assert run.loop.step()["sampler_gap_max"] < 1e-5


# --------------------------------------------------------------------------------------------------------- overlong


def test_the_last_tokens_before_the_limit_are_punished_linearly(start):
    """DAPO's soft punishment (arXiv:2503.14476, eq. 13) of answers of 1 to 6 tokens, the last four of them too many."""
    run = start("letters", overlong_buffer=4, stop_ids=tuple(range(0, 6400, 5)), samples_per_prompt=SAMPLES, seed=3)
    metrics = run.loop.step()
    run.loop.heldout = run.source
    held_out = run.loop.evaluate()
    drawn, asked = run.values("rollout", "generate")
    assert len(set(drawn.answer_lens.tolist())) > 3
    rewards, of_held_out = (
        [
            tiny_rewards.letters("", text, {}) + {1: 0.0, 2: 0.0, 3: -0.25, 4: -0.5, 5: -0.75, 6: -1.0}[length]
            for text, length in zip(
                run.source.texts(batch, run.loop.stop_ids, 6)[1], batch.answer_lens.tolist(), strict=True
            )
        ]
        for batch in (drawn, asked)
    )
    assert metrics["reward"] == pytest.approx(np.mean(rewards), abs=1e-6)
    assert held_out["reward"] == pytest.approx(np.mean(of_held_out), abs=1e-6), "beside each other they are one curve"
    groups = np.array(rewards).reshape(-1, SAMPLES)
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-6)
    (learned,) = run.learned
    assert len(learned) == len(drawn)
    assert np.allclose(learned.columns["advantages"], np.repeat(expected.reshape(-1), drawn.answer_lens), atol=1e-4)


# ------------------------------------------------------------------------------------------------------ KL coefficient


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_the_kl_coefficient_follows_its_target(start, name):
    """β is multiplied by 1 + K_β · clip(KL / target - 1, ±0.2) (arXiv:1909.08593, section 2.2). KL is the sum over an
    answer's tokens of k3 (in GRPO's loss) or k1 (in PPO's rewards), on average."""
    run = start("letters", name=name, kl_coefficient=0.5, kl_target=0.05, kl_gain=0.3, learning_rate=3e-3)
    first, coefficient, errors = run.weights(), 0.5, []
    for _ in range(4):
        weights = run.weights()
        metrics = run.loop.step()
        update = run.calls("policy", "update")[-1]
        batch = update.arguments[0]
        delta = log_probs_of(run, first, batch) - log_probs_of(run, weights, batch)
        kl = (-delta if name == "ppo" else np.exp(delta) - 1 - delta).sum() / len(batch)
        assert metrics["kl_per_answer"] == pytest.approx(kl, rel=1e-3, abs=1e-4)
        assert metrics["kl_coefficient"] == update.arguments[2] == pytest.approx(coefficient, rel=1e-6)
        errors.append(min(max(kl / 0.05 - 1, -0.2), 0.2))
        coefficient *= 1 + 0.3 * errors[-1]
    assert errors[0] == -0.2
    assert errors[-1] == 0.2


def test_a_skipped_step_leaves_the_kl_coefficient_alone(start):
    """Where the reference says NaN for once, the KL is NaN and the step is skipped; the next one is as ever."""
    run = start("letters", kl_coefficient=0.5, kl_target=0.05)
    norm = run.roles.groups["reference"].worker.network.model.norm.weight
    right = norm.clone()
    norm.fill_(math.nan)
    metrics = run.loop.step()
    assert metrics["skipped"] == 1
    assert run.loop.position.kl_coefficient == 0.5
    norm.copy_(right)
    metrics = run.loop.step()
    assert metrics["skipped"] == 0
    assert run.loop.position.kl_coefficient == pytest.approx(0.5 * 0.98)


def test_while_the_critic_warms_up_neither_the_rate_of_the_policy_nor_its_kl_coefficient_moves(start):
    """Two steps of six: the policy's warm-up, half of the steps, takes two of the four that are left."""
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 6e-3, "warmup_ratio": 0.5}
    run = start("letters", name="ppo", critic_warmup=2, kl_coefficient=0.5, kl_target=0.05, **rates)
    coefficients = [run.loop.step()["kl_coefficient"] for _ in range(6)]
    assert coefficients[:3] == [0.5, 0.5, 0.5]
    assert coefficients[3] == pytest.approx(0.5 * 0.98)
    policy = [call.arguments[1] for call in run.calls("policy", "update")]
    critic = [call.arguments[1] for call in run.calls("critic", "update")]
    assert policy == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])
    assert critic == pytest.approx([2e-3, 4e-3, 6e-3, 6e-3, 6e-3, 6e-3])


# -------------------------------------------------------------------------------------------------------- reward model


def test_equal_answers_get_equal_rewards_and_each_is_judged_once(start, reward_model):
    """Judged twice, in passes of other shapes, they would differ by rounding; GRPO would make advantages of it."""
    run = start("letters", reward_model=reward_model)
    run.loop.step()
    (drawn,) = run.values("rollout", "generate")
    batch = drawn.take(np.array([3, 0, 3, *[1] * 400, 5, 0]))
    found = run.roles.rewards(batch)
    assert found[0] == found[2]
    assert found[1] == found[-1]
    assert len(set(found[3:403].tolist())) == 1
    judge = RewardModel.from_pretrained(reward_model)
    assert np.allclose(found, judge.rewards(sequences(batch)).numpy(), atol=1e-6)
    asked = run.calls("reward", "rewards")[-1].arguments[0]
    assert sequences(asked) == sequences(drawn.take(np.array([3, 0, 1, 5])))


# ------------------------------------------------------------------------------------------------------------------ PPO


def by_definition(batch: RolloutBatch, rewards, old, ref, values, beta: float, o: PPOOptions):
    """Returns and advantages of PPO answer by answer, as double sums over the later tokens, in float64."""
    ends = np.cumsum(batch.answer_lens)
    advantages, returns = [], []
    for i, (end, n) in enumerate(zip(ends, batch.answer_lens, strict=True)):
        here = slice(end - n, end)
        r = -beta * (old[here].astype(float) - ref[here])
        r[-1] += rewards[i]
        v = np.append(values[here].astype(float), 0.0)
        delta = r + o.gamma * v[1:] - v[:-1]
        a = [sum((o.gamma * o.lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        advantages += a
        returns += list(np.array(a) + v[:-1])
    return np.array(advantages), np.array(returns)


def test_ppo_learns_from_the_advantages_of_its_definition(start):
    """KL off each token's reward, the answer's reward at its last token, also where that was cut off."""
    run = start("letters", name="ppo", kl_coefficient=0.3, learning_rate=3e-3, critic_learning_rate=1e-2, gamma=0.97)
    for _ in range(3):
        run.loop.step()
    o = run.loop.options
    for step, batch in enumerate(run.learned):
        texts = run.source.texts(batch, STOP_IDS, o.max_new_tokens)[1]
        rewards = [tiny_rewards.letters("", text, {}) for text in texts]
        values = run.values("critic", "values")[step]
        old, ref = run.values("policy", "log_probs")[step], run.values("reference", "log_probs")[step][1]
        advantages, returns = by_definition(batch, rewards, old, ref, values, 0.3, o)
        assert np.allclose(batch.columns["returns"], returns, atol=1e-5)
        white = (advantages - advantages.mean()) / advantages.std()
        assert np.allclose(batch.columns["advantages"], white, atol=1e-4)
        assert np.array_equal(batch.columns["values"], values)
        assert not batch.stopped.all()
    assert np.abs(old - ref).max() > 1e-3
    assert np.abs(values).max() > 1e-2


def test_every_record_of_a_raw_file_for_evaluation_is_asked(world):
    """Nothing of it is set aside for a validation of its own."""
    raw = world / "microworld" / "heldout_sums.jsonl"
    options = make_job(world / "sft", eval_data=[raw], data=[world / "prompts"]).options
    _, heldout = _prompts(RLStage("grpo"), options, world / "sft")
    assert heldout is not None
    assert len(heldout) == len(raw.read_text(encoding="utf-8").splitlines())


def test_ppo_with_all_four_models_and_the_kl_in_its_loss(start, reward_model, world, tmp_path):
    """The reward model counts by its weight, the critic begins as another one, the KL (k3) is in no reward."""
    critic = RewardModel.from_decoder(load_masters(world / "sft"))
    with torch.no_grad():
        critic.score.weight.mul_(5.0)
    critic.save_pretrained(tmp_path / "critic", tokenizer_folder=None)
    judge = {"reward_model": reward_model, "reward_model_weight": 3.0, "critic_init": tmp_path / "critic"}
    rates = {"learning_rate": 3e-3, "critic_learning_rate": 1e-2}
    run = start("letters", name="ppo", kl_in="loss", kl_coefficient=0.3, **judge, **rates)
    first = run.weights()
    for step in range(3):
        weights = run.weights()
        metrics = run.loop.step()
        batch = run.learned[step]
        texts = run.source.texts(batch, STOP_IDS, run.loop.options.max_new_tokens)[1]
        judged = RewardModel.from_pretrained(reward_model).rewards(sequences(batch)).numpy()
        rewards = np.array([tiny_rewards.letters("", text, {}) for text in texts]) + 3.0 * judged
        assert metrics["reward"] == pytest.approx(rewards.mean(), abs=1e-5)
        values = run.values("critic", "values")[step]
        zeros = np.zeros_like(values)
        advantages, returns = by_definition(batch, rewards, zeros, zeros, values, 0.0, run.loop.options)
        assert np.allclose(batch.columns["returns"], returns, atol=1e-5)
        white = (advantages - advantages.mean()) / advantages.std()
        assert np.allclose(batch.columns["advantages"], white, atol=1e-4)
        delta = log_probs_of(run, first, batch) - log_probs_of(run, weights, batch)
        kl = (np.exp(delta) - 1 - delta).mean()
        assert metrics["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        assert metrics["loss"] == pytest.approx(0.3 * kl - white.mean(), abs=1e-5)
        if step == 0:
            states = [ids[: len(ids) - n + t] for ids, n in answered(batch) for t in range(n)]
            assert np.allclose(values, RewardModel.from_pretrained(tmp_path / "critic").rewards(states), atol=1e-5)
    assert kl > 1e-3
    assert np.abs(judged).std() > 1e-3


def sequences(batch: RolloutBatch) -> list[list[int]]:
    ends = np.cumsum(batch.lengths)
    return [batch.tokens[end - n : end].tolist() for end, n in zip(ends, batch.lengths, strict=True)]


def answered(batch: RolloutBatch) -> list[tuple[list[int], int]]:
    return list(zip(sequences(batch), batch.answer_lens.tolist(), strict=True))


def test_a_packed_folder_for_evaluation_gives_its_held_out_split(world, tmp_path, capsys):
    """So the folder that is trained on can be given as it is; of another one without such a split all is asked."""
    both = make_job(world / "sft", eval_data=[world / "prompts"], data=[world / "prompts"]).options
    source, heldout = _prompts(RLStage("grpo"), both, world / "sft")
    assert (source.train.split, heldout.split) == ("train", "valid")
    assert len(heldout) < len(source.train)
    assert f"the {len(heldout)} held-out prompts of {world / 'prompts'}" in capsys.readouterr().out
    raw = world / "microworld" / "heldout_sums.jsonl"
    pack(PackOptions(stage="prompt", input=[raw], output=tmp_path / "exam", seq_len=64, workers=1, valid_fraction=0))
    other = make_job(world / "sft", eval_data=[tmp_path / "exam"], data=[world / "prompts"]).options
    _, heldout = _prompts(RLStage("grpo"), other, world / "sft")
    assert len(heldout) == len(raw.read_text(encoding="utf-8").splitlines())
    trained = make_job(world / "sft", eval_data=[tmp_path / "exam"], data=[tmp_path / "exam"]).options
    with pytest.raises(UserError, match=r"--eval_data .*exam is what is trained on, and nothing of it is held out"):
        _prompts(RLStage("grpo"), trained, world / "sft")


def raw_prompts(path: Path, numbers: range) -> Path:
    records = [{"messages": [{"role": "user", "content": f"{n} + {n}?"}], "answer": str(2 * n)} for n in numbers]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_prompts_for_evaluation_that_are_trained_on_too_are_counted(world, tmp_path, capsys):
    """Also of raw files, and in whatever files they lie."""
    data = raw_prompts(tmp_path / "data.jsonl", range(10))
    for name, numbers in (("same", range(10)), ("some", range(7, 15))):
        exam = raw_prompts(tmp_path / f"{name}.jsonl", numbers)
        options = make_job(world / "sft", data=[data], eval_data=[exam]).options
        source, _ = _prompts(RLStage("grpo"), replace(options, save_dir=tmp_path / name), world / "sft")
        trained = {source.train.row(row).messages[-1]["content"] for row in range(len(source.train))}
        common = sum(f"{n} + {n}?" in trained for n in numbers)
        assert common > 1
        said = f"--eval_data: {common} of its {len(numbers)} prompts are trained on too, so not held out"
        assert said in capsys.readouterr().out
    exam = raw_prompts(tmp_path / "other.jsonl", range(10, 15))
    other = make_job(world / "sft", data=[data], eval_data=[exam]).options
    _prompts(RLStage("grpo"), replace(other, save_dir=tmp_path / "other"), world / "sft")
    assert "trained on" not in capsys.readouterr().out


@pytest.mark.parametrize("anew", [{"overwrite": True}, {"resume": "never"}], ids=str)
def test_raw_files_that_changed_are_packed_again_for_a_run_that_starts_anew(world, tmp_path, anew):
    """One that goes on with its checkpoints is refused instead."""
    run, data = tmp_path / "grpo", tmp_path / "data.jsonl"
    options = replace(make_job(world / "sft", data=[raw_prompts(data, range(10))]).options, save_dir=run)
    _prompts(RLStage("grpo"), options, world / "sft")
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    raw_prompts(data, range(12))
    with pytest.raises(UserError, match="was packed from other files or options than those given now"):
        _prompts(RLStage("grpo"), options, world / "sft")
    source, _ = _prompts(RLStage("grpo"), replace(options, **anew), world / "sft")
    assert source.valid is not None
    assert len(source.train) + len(source.valid) == 12


def test_a_reward_model_of_another_tokenizer_is_refused(world, tmp_path):
    """It would read the policy's ids as other words."""
    _check_judges(make_job(world / "sft", reward_model=world / "sft").options, world / "sft")
    shutil.copytree(world / "sft", tmp_path / "reward")
    path = tmp_path / "reward" / "hf" / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    options = make_job(world / "sft", reward_model=tmp_path / "reward").options
    with pytest.raises(UserError, match=r"--reward_model .*reward has another tokenizer"):
        _check_judges(options, world / "sft")


def test_the_embedded_sums_are_judged_by_sums_that_stand_nowhere_in_them(world, tmp_path):
    options = replace(make_job(world / "sft").options, save_dir=tmp_path, data=None)
    assert options.data is options.eval_data is None
    source, heldout = _prompts(RLStage("grpo"), options, world / "sft")
    sums = (tmp_path / "microworld" / "heldout_sums.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(heldout) == len(sums) >= 200
    trained = {source.train.row(row).prompt_ids.tobytes() for row in range(len(source.train))}
    assert not trained & {heldout.row(row).prompt_ids.tobytes() for row in range(len(heldout))}
