"""The controller on workers in this process: which prompts it asks and asks again, what it learns from, what it hands
to whom. What passes between it and the workers goes through Ray's object store, only the actors are left out."""

import copy
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny_rewards
import torch
from tiny_rl import STOP_IDS, InlineGroup, make_job, pack_prompts, write_run

from minigpt.dataset.chat import ChatEncoder
from minigpt.dataset.shards import PackedDataset
from minigpt.errors import UserError
from minigpt.rl import cluster
from minigpt.rl.batch import RolloutBatch
from minigpt.rl.loop import Loop, Position
from minigpt.rl.options import PPOOptions
from minigpt.rl.prompts import PromptSource
from minigpt.rl.reward_pool import RewardPool
from minigpt.rl.roles import Roles

pytestmark = pytest.mark.slow

REWARDS = Path(tiny_rewards.__file__)
PROMPTS, SAMPLES = 4, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    write_run(root / "sft", sharpness=5.0)
    pack_prompts(root)
    return root


@pytest.fixture(scope="module", autouse=True)
def our_ray():
    cluster.connect(num_cpus=1)
    yield
    cluster.disconnect()


@pytest.fixture(scope="module")
def pools():
    """One process for each reward."""
    made = {name: RewardPool([f"{REWARDS}:{name}"]) for name in ("sometimes", "never")}
    yield made
    for pool in made.values():
        pool.close()


class Run:
    """A loop, and what its workers were asked so far."""

    def __init__(self, world: Path, pool: RewardPool, position: Position | None = None, name="grpo", **options) -> None:
        sizes = {"prompts_per_step": PROMPTS, "samples_per_prompt": SAMPLES, "max_new_tokens": 6, "max_steps": 6}
        job = make_job(world / "sft", name, 128, **{**sizes, **options})
        self.source = PromptSource(
            PackedDataset(world / "prompts"), ChatEncoder(world / "sft" / "hf"), None, job.options.seed, 100
        )
        job = replace(job, longest=self.source.longest + 6)
        InlineGroup.calls = self.calls = []
        self.roles = Roles(job, print)
        self.roles.setup()
        position = position or Position(kl_coefficient=job.options.kl_coefficient)
        self.roles.publish(position.step)
        self.loop = Loop(job.options, self.roles, pool, self.source, None, STOP_IDS, position)

    def values(self, role: str, method: str) -> list:
        return [call.value for call in self.calls if (call.role, call.method) == (role, method)]

    @property
    def asked(self) -> list[list[int]]:
        """Numbers of the prompts of each request."""
        requests = [call.arguments[0] for call in self.calls if call.method == "generate"]
        return [(request.first_sample_ids // SAMPLES).tolist() for request in requests]

    @property
    def learned(self) -> list[RolloutBatch]:
        """What the policy was updated on."""
        return [c.arguments[0] for c in self.calls if (c.role, c.method) == ("policy", "update")]

    def teaches(self, number: int) -> bool:
        ids = self.source.prompt_ids(int(self.source.order.indices(np.array([number]))[0]))
        return tiny_rewards.teaches(self.source.encoder.decode(ids.tolist(), skip_special_tokens=False))

    def weights(self, role: str = "policy") -> dict[str, torch.Tensor]:
        return self.roles.groups[role].worker.engine.master_weights()

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
        run.loop.step()
        rounds.append(len(run.asked) - before)
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
def test_a_resumed_run_asks_what_the_uninterrupted_one_would_have_asked(start, overlap):
    """With a learning rate of 0 the weights are those of the checkpoint."""
    run = start(dynamic_sampling=2, overlap=overlap, learning_rate=0)
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(asdict(run.loop.position))
        run.loop.step()
    resumed = start(position=Position(**saved), dynamic_sampling=2, overlap=overlap, learning_rate=0)
    for _ in range(3):
        resumed.loop.step()
    assert len(resumed.learned) == 3
    for ours, theirs in zip(resumed.learned, run.learned[3:], strict=True):
        assert numbers(ours) == numbers(theirs)
        assert same(ours, theirs, but=("versions",))
    assert resumed.loop.position.prompts == run.loop.position.prompts


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
    after = run.weights()
    assert all(torch.equal(after[name], before[name]) for name in before)
    run.loop.step()
    assert run.asked[3] == [12, 13, 14, 15]


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


def optimizer_steps(run: Run) -> int:
    engine = run.roles.groups["policy"].worker.engine
    return engine._engine.global_steps
