"""The policy on one rank and on two, at every ZeRO stage, as Ray actors: the same log-probabilities, the same weights
behind the same updates, the same bytes for the samplers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError
from ray.util import remove_placement_group
from tiny_rl import arrays_of, make_job, make_policy, make_request, sample, wait_until, with_columns, write_run

from minigpt.errors import UserError
from minigpt.rl import cluster
from minigpt.rl.batch import RolloutBatch
from minigpt.rl.delivery import Delivery
from minigpt.rl.group import WorkerDied, WorkerFailed, WorkerGroup, place
from minigpt.rl.layout import Role, bundles, choose_layout, laptop
from minigpt.rl.publish import Published, unpack
from minigpt.rl.roles import CLASSES, Roles
from minigpt.rl.workers import CriticWorker, Job, PolicyWorker, RolloutWorker
from minigpt.trainer.setup import load_masters

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
STAGES = (0, 1, 2, 3)
# (ranks, ZeRO stage); the first is what the others are compared with
WORLDS = [(1, 1), *((2, stage) for stage in STAGES)]
TOLERANCE = 1e-5  # of the norm of each tensor: sums over two ranks are taken in another order
# Whose denominators are summed over the ranks otherwise than tokens are counted, and terms that are weighed by them
OBJECTIVES: dict[str, dict[str, Any]] = {
    "gspo, every answer alike": {"objective": "gspo", "aggregation": "sequence", "clip_low": 0.02},
    "behaviour correction and entropy, over a constant": {
        **{"aggregation": "constant", "behaviour_correction": True, "behaviour_cap": 1.1},
        "entropy_coefficient": 0.1,
    },
}


@dataclass
class Result:
    """What a policy came to."""

    log_probs: np.ndarray
    metrics: list[dict[str, float]]
    others: dict[str, list[dict[str, float]]]  # by objective: what it said of updates on the same batches
    weights: dict[str, torch.Tensor]
    published: dict[str, torch.Tensor]
    received: dict[str, torch.Tensor]
    published_at_first: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("rl") / "sft", sharpness=5.0)


@pytest.fixture(scope="module", autouse=True)
def our_ray():
    cluster.connect(num_cpus=2)
    yield
    cluster.disconnect()


@pytest.fixture(scope="module")
def batches(run) -> list[RolloutBatch]:
    """Seven answers, which do not divide by two ranks, and one, of which a rank gets nothing."""
    whole = sample(make_policy(make_job(run)), make_request(prompts=7, samples=1))
    rng = np.random.default_rng(0)

    def noise(size: float) -> np.ndarray:
        return rng.normal(0, size, len(whole.behaviour_log_probs)).astype(np.float32)

    filled = with_columns(
        whole,
        advantages=noise(1.0),
        ref_log_probs=whole.behaviour_log_probs + noise(0.5),
        old_log_probs=whole.behaviour_log_probs + noise(0.2),
    )
    return [filled, filled.take(np.array([3]))]


def mortal() -> type:
    """A class that Ray sends along, since it is in a function: actors cannot import this module."""

    class MortalSampler(RolloutWorker):
        """It shows its weights, and dies of the next ones if it is told so."""

        doomed = False

        def doom(self) -> None:
            self.doomed = True

        def receive(self, version: int):
            import os
            import signal

            if self.doomed:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().receive(version)

        def weights(self) -> dict[str, np.ndarray]:
            return {name: p.numpy() for name, p in self.engine.model.named_parameters()}

    return MortalSampler


def walking(worker: type) -> type:
    """Workers that become those of another job: starting a process takes longer than what it is asked here."""

    class Walking(worker):
        def become(self, job: Any, address: tuple[str, int] | None) -> Any:
            self.job = job
            return self.setup(address)

    return Walking


def meeting_place(group: WorkerGroup) -> tuple[str, int] | None:
    return group.wait([group.one(0, "address")], "find a port")[0] if len(group) > 1 else None


def weights_of(samplers: WorkerGroup, rank: int = 0) -> dict[str, torch.Tensor]:
    found = samplers.result(samplers.one(rank, "weights"), rank, "show")
    return {name: torch.from_numpy(array.copy()) for name, array in found.items()}


def published_by(policy: WorkerGroup, version: int, shares: int) -> dict[str, torch.Tensor]:
    """What the object store holds of a version that a policy publishes in so many shares."""
    whole = Published.by_all([one.value for one in policy.wait(policy.all("publish", version), "publish")])
    assert all(len(bucket.data) == shares for bucket in whole.buckets), "nothing is gathered that has shares"
    return {name: tensor.clone() for name, tensor in unpack(whole, ray.get)}


def learn(
    run: Path,
    folder: Path,
    batches: list[RolloutBatch],
    ranks: int,
    stages: Sequence[int],
    objectives: dict[str, dict[str, Any]],
    **options: Any,
) -> list[Result]:
    """What a policy of so many ranks comes to at each ZeRO stage."""
    layout_file = folder / "layout.yaml"
    layout_file.write_text(f"policy: {{workers: {ranks}, threads: 1}}\nrollout: {{threads: 1}}\n")
    layout = choose_layout(str(layout_file), 0)
    needed = bundles(layout, ["policy", "rollout"])
    placement = place(needed, 60)
    several = {"kl_coefficient": 0.1, "grad_clip": 1.0, "update_epochs": 2, **options}

    def job_at(stage: int, **others: Any) -> Job:
        return make_job(run, deepspeed=CONFIGS / f"zero{stage}.json", **{**several, **others})

    group = WorkerGroup(walking(PolicyWorker), "policy", layout, needed, placement, (job_at(stages[0]),), 120.0)
    samplers = WorkerGroup(mortal(), "rollout", layout, needed, placement, (job_at(stages[0]),), 120.0)
    try:
        address, found = meeting_place(group), []
        for stage in stages:
            loading = samplers.all("setup")  # anew, so that it holds no weights of the stage before
            others = {}
            for name, objective in objectives.items():
                group.wait(group.all("become", job_at(stage, **objective), address), "load")
                others[name] = updates_of(group, batches)
            facts = group.wait(group.all("become", job_at(stage), address), "load")[0]
            assert facts["zero_stage"] == stage
            assert facts["parameters"] >= load_masters(run).num_parameters(), "also where they are spread over ranks"
            log_probs = group.wait(group.all("log_probs", batches[0]), "judge")[0].value
            shares = ranks if stage == 3 else 1
            first = published_by(group, 0, shares)
            metrics = updates_of(group, batches)
            published = published_by(group, 1, shares)
            samplers.wait(loading, "load")
            delivery = Delivery(group, samplers, pytest.fail)
            delivery.setup("broadcast")
            delivery.publish(2)
            written = group.wait(group.all("export", folder), "export")[0]
            weights = torch.load(next(path for path in written if path.endswith(".pth")), weights_only=True)
            found.append(Result(log_probs, metrics, others, weights, published, weights_of(samplers), first))
        return found
    finally:
        group.kill()
        samplers.kill()
        remove_placement_group(placement)


def updates_of(group: WorkerGroup, batches: list[RolloutBatch]) -> list[dict[str, float]]:
    """What the first rank of a policy says of an update on each batch."""
    return [group.wait(group.all("update", batch, 1e-3, 0.1), "learn")[0].value for batch in batches]


@pytest.fixture(scope="module")
def results(run, batches, tmp_path_factory) -> dict[tuple[int, int], Result]:
    alone = learn(run, tmp_path_factory.mktemp("alone"), batches, 1, [1], OBJECTIVES)
    together = learn(run, tmp_path_factory.mktemp("together"), batches, 2, STAGES, OBJECTIVES)
    return dict(zip(WORLDS, alone + together, strict=True))


@pytest.mark.parametrize("world", WORLDS[1:], ids=lambda world: f"{world[0]} ranks, ZeRO {world[1]}")
def test_two_ranks_learn_what_one_does_at_every_zero_stage(results, run, world):
    found, expected = results[world], results[WORLDS[0]]
    before = load_masters(run).state_dict()
    assert np.abs(found.log_probs - expected.log_probs).max() < 1e-5
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for name, weight in expected.weights.items():
        assert not torch.equal(weight, before[name]), "it learned"
        assert (found.weights[name] - weight).norm() < TOLERANCE * weight.norm(), name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("world", WORLDS[1:], ids=lambda world: f"{world[0]} ranks, ZeRO {world[1]}")
def test_two_ranks_divide_what_every_objective_sums_by_the_counts_of_both(results, world, objective):
    """Two updates of two steps each, the later ones behind what the first ones learned."""
    found, expected = (results[one].others[objective] for one in (world, WORLDS[0]))
    assert expected[0]["loss"] != pytest.approx(results[WORLDS[0]].metrics[0]["loss"], rel=0.1), "it is another one"
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in theirs.items()}


@dataclass
class Foreseen:
    """Values of answer tokens before and after updates of a critic, and what it said of them."""

    values: list[np.ndarray]
    metrics: list[dict[str, float]]


def foresee(run: Path, batch: RolloutBatch, ranks: int, stages: Sequence[int]) -> list[Foreseen]:
    """What a critic of so many ranks comes to at each ZeRO stage."""
    layout = {**laptop(), "critic": Role(workers=ranks, threads=1)}
    needed = bundles(layout, ["critic"])
    placement = place(needed, 60)
    several = {"update_epochs": 2, "minibatches": 2, "value_clip": 0.05, "grad_clip": 1.0}
    jobs = [make_job(run, "ppo", deepspeed=CONFIGS / f"zero{stage}.json", **several) for stage in stages]
    group = WorkerGroup(walking(CriticWorker), "critic", layout, needed, placement, (jobs[0],), 120.0)

    def judge() -> np.ndarray:
        first, *others = (one.value for one in group.wait(group.all("values", batch), "judge"))
        assert all(np.array_equal(first, other) for other in others)
        return first

    try:
        address, results = meeting_place(group), []
        for job in jobs:
            group.wait(group.all("become", job, address), "load")
            found = Foreseen([], [])
            for _ in range(2):
                values = judge()
                found.values.append(values)
                known = with_columns(batch, values=values, returns=batch.columns["returns"])
                found.metrics.append(group.wait(group.all("update", known, 1e-3), "learn")[0].value)
            found.values.append(judge())
            results.append(found)
        return results
    finally:
        group.kill()
        remove_placement_group(placement)


@pytest.fixture(scope="module")
def foreseen(run, batches) -> dict[tuple[int, int], Foreseen]:
    """What a critic came to in each world."""
    returns = np.random.default_rng(1).normal(0, 1, len(batches[0].behaviour_log_probs))
    batch = with_columns(batches[0], returns=returns)
    return dict(zip(WORLDS, foresee(run, batch, 1, [1]) + foresee(run, batch, 2, STAGES), strict=True))


@pytest.mark.parametrize("world", WORLDS[1:], ids=lambda world: f"{world[0]} ranks, ZeRO {world[1]}")
def test_two_ranks_of_the_critic_learn_what_one_does_at_every_zero_stage(foreseen, world):
    found, expected = foreseen[world], foreseen[WORLDS[0]]
    for ours, right in zip(found.values, expected.values, strict=True):
        assert np.abs(ours - right).max() < 1e-4
    assert np.abs(expected.values[1] - expected.values[0]).max() > 1e-2, "it learned"
    for one, other in zip(found.metrics, expected.metrics, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world[0]} ranks, ZeRO {world[1]}")
def test_what_is_published_are_the_weights_bit_for_bit_at_every_zero_stage(results, world):
    found = results[world]
    assert found.published.keys() == {name for name in found.weights if name != "lm_head.weight"}
    assert all(torch.equal(tensor, found.weights[name]) for name, tensor in found.published.items())


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world[0]} ranks, ZeRO {world[1]}")
def test_equal_weights_are_published_as_equal_bits_at_every_zero_stage(results, run, world):
    """Before the first update, which rounds otherwise at each stage."""
    found, expected = results[world].published_at_first, load_masters(run).state_dict()
    assert found.keys() == results[WORLDS[0]].published.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def publish_in_bf16(run: Path, batch: RolloutBatch, stages: Sequence[int]) -> list[list[dict[str, torch.Tensor]]]:
    """What two ranks publish at the start and behind an update, at each ZeRO stage."""
    layout = {**laptop(), "policy": Role(workers=2, threads=1)}
    needed = bundles(layout, ["policy"])
    placement = place(needed, 60)
    jobs = [
        make_job(run, deepspeed=CONFIGS / f"zero{stage}.json", dtype="bf16", kl_coefficient=0.1) for stage in stages
    ]
    group = WorkerGroup(walking(PolicyWorker), "policy", layout, needed, placement, (jobs[0],), 120.0)
    try:
        address, found = meeting_place(group), []
        for stage, job in zip(stages, jobs, strict=True):
            facts = group.wait(group.all("become", job, address), "load")[0]
            assert (facts["zero_stage"], facts["precision"]) == (stage, "bfloat16")
            shares = 2 if stage == 3 else 1
            first = published_by(group, 0, shares)
            group.wait(group.all("update", batch, 1e-2, 0.1), "learn")
            found.append([first, published_by(group, 1, shares)])
        return found
    finally:
        group.kill()
        remove_placement_group(placement)


def test_what_is_published_in_bf16_is_the_same_at_every_zero_stage_bit_for_bit(run, batches):
    """At the start, where it is what torch rounds the float32 weights to, and behind an update. Stage 0 has no float32
    masters, so it does not train in bf16."""
    with pytest.raises(UserError, match="ZeRO stage 0 keeps no float32 masters and trains bf16 badly"):
        make_policy(make_job(run, deepspeed=CONFIGS / "zero0.json", dtype="bf16"))
    (start, learned), *others = publish_in_bf16(run, batches[0], [1, 2, 3])
    before = load_masters(run).state_dict()
    for name, tensor in start.items():
        assert torch.equal(tensor, before[name].bfloat16()), name
        assert not torch.equal(tensor, learned[name]), "it learned"
    for versions in others:
        for found, expected in zip(versions, (start, learned), strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_weights_that_come_while_answers_are_drawn_wait_for_their_end(run, batches):
    """All calls are under way at once; the answers are those of a worker that was asked one thing after the other."""
    job = replace(make_job(run, row_length=128, max_new_tokens=100), longest=128)
    policy = make_policy(job)
    published = [policy.publish(0).value]
    policy.update(batches[0], 1e-2, 0.0)
    published.append(policy.publish(1).value)
    calls: list[tuple[str, Any]] = []
    for weights in (*published, *published):
        request = make_request(samples=1, version=weights.version, max_new_tokens=100)
        calls += [("load", weights), ("generate", request)]
    alone = RolloutWorker(0, 1, 1, job)
    alone.setup()
    expected = [getattr(alone, method)(argument).value for method, argument in calls]
    needed = bundles(laptop(), ["rollout"])
    placement = place(needed, 60)
    group = WorkerGroup(RolloutWorker, "rollout", laptop(), needed, placement, (job,), 120.0)
    try:
        group.wait(group.all("setup"), "load")
        under_way = [group.one(0, method, argument) for method, argument in calls]
        found = [group.result(reference, 0, "answer").value for reference in under_way]
    finally:
        group.kill()
        remove_placement_group(placement)
    for ours, theirs in zip(found[1::2], expected[1::2], strict=True):
        assert all(np.array_equal(array, arrays_of(theirs)[name]) for name, array in arrays_of(ours).items())
    assert not np.array_equal(found[1].tokens, found[3].tokens)


def mortal_once(mark: Path) -> type:
    """A sampler that dies while it is set up, if there is a mark."""

    class DyingOnce(RolloutWorker):
        def setup(self) -> None:
            import os
            import signal

            if mark.exists():
                mark.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            super().setup()

    return DyingOnce


def test_a_sampler_whose_replacement_dies_is_replaced_once_more(run, tmp_path, monkeypatch):
    mark, said = tmp_path / "mark", []
    monkeypatch.setitem(CLASSES, "rollout", mortal_once(mark))
    roles = Roles(make_job(run), said.append)
    try:
        roles.setup()
        roles.publish(0)
        expected = roles.collect(roles.sample(make_request()))
        under_way = roles.sample(make_request())
        mark.touch()
        ray.kill(roles.groups["rollout"].workers[0])
        found = roles.collect(under_way)
        assert sum("a new one answers" in sentence for sentence in said) == 2
        assert all(np.array_equal(array, arrays_of(expected)[name]) for name, array in arrays_of(found).items())
    finally:
        roles.close()


def test_a_sampler_that_dies_of_two_requests_is_replaced_once(run):
    """With overlap and dynamic sampling a filling round and the next step's answers are under way at the same time."""
    said: list[str] = []
    roles = Roles(make_job(run), said.append)
    try:
        roles.setup()
        roles.publish(0)
        expected = roles.collect(roles.sample(make_request()))
        first = roles.groups["rollout"].workers[0]
        under_way = [roles.sample(make_request()) for _ in range(2)]
        ray.kill(first)
        found, second = [roles.collect(under_way[0])], roles.groups["rollout"].workers[0]
        found += [roles.collect(under_way[1])]
        assert second is not first
        assert roles.groups["rollout"].workers[0] is second, "it holds the weights and has compiled what it needs"
        assert sum("a new one answers" in sentence for sentence in said) == 1
        for batch in found:
            assert all(np.array_equal(array, arrays_of(expected)[name]) for name, array in arrays_of(batch).items())
    finally:
        roles.close()


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"{world[0]} ranks, ZeRO {world[1]}")
def test_what_is_broadcast_are_the_bits_that_the_store_holds_at_every_zero_stage(results, world):
    found = results[world]
    assert found.received.keys() == found.published.keys()
    assert all(torch.equal(tensor, found.published[name]) for name, tensor in found.received.items())


def test_weights_with_their_adapters_are_published_at_zero_3_beside_shares_of_others(run, batches, tmp_path):
    (found,) = learn(run, tmp_path, batches, 3, [3], {}, lora_rank=4, lora_targets=["q_proj", "down_proj"])
    before = load_masters(run).state_dict()
    assert found.published.keys() == {name for name in before if name != "lm_head.weight"}
    assert any(tensor.numel() % 3 for tensor in found.published.values()), "the last shares are filled up"
    for name, tensor in found.published.items():
        assert torch.equal(tensor, found.received[name]), name
        assert torch.equal(tensor, before[name]) != name.endswith(("q_proj.weight", "down_proj.weight")), name


def test_an_adapter_alone_is_published_and_broadcast_at_zero_3(run, batches, tmp_path):
    (found,) = learn(run, tmp_path, batches, 2, [3], {}, lora_rank=4, publish="adapter")
    adapter = {name for name in found.received if "lora_" in name}
    assert found.published.keys() == adapter
    assert all(found.published[name].any() for name in adapter), "it learned"
    before = load_masters(run).state_dict()
    for name, tensor in found.received.items():
        assert torch.equal(tensor, found.published[name] if name in adapter else before[name]), name


def test_who_missed_a_broadcast_gets_the_version_that_is_asked_for_and_the_next_one_reaches_all(run, batches):
    """One of two samplers dies of version 1; the new one is asked for version 0, which the policy has left behind."""
    layout = {**laptop(), "policy": Role(threads=1), "rollout": Role(workers=2, threads=1)}
    needed = bundles(layout, ["policy", "rollout"])
    placement = place(needed, 60)
    said: list[str] = []
    job = make_job(run)
    policy = WorkerGroup(PolicyWorker, "policy", layout, needed, placement, (job,), 120.0)
    samplers = WorkerGroup(mortal(), "rollout", layout, needed, placement, (job,), 120.0)
    try:
        loading = samplers.all("setup")
        policy.wait(policy.all("setup", None), "load")
        samplers.wait(loading, "load")
        delivery = Delivery(policy, samplers, said.append)
        delivery.setup("broadcast")
        delivery.publish(0)
        weights = {0: weights_of(samplers, 1)}
        policy.wait(policy.all("update", batches[0], 1e-3, 0.0), "learn")
        samplers.wait([samplers.one(1, "doom")], "be told")
        delivery.publish(1)
        assert "rollout worker 1 died" in " ".join(said)
        samplers.restart(1)
        delivery.forget(1)
        samplers.wait([samplers.one(1, "setup")], "load")
        for rank, version in ((0, 1), (1, 0), (1, 1)):
            published = delivery.for_worker(rank, version)
            loaded = samplers.result(samplers.one(rank, "load", published), rank, "load")
            assert loaded.value == version
            expected = weights.setdefault(version, weights_of(samplers, rank))
            assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(samplers, rank).items())
        assert not torch.equal(weights[0]["model.norm.weight"], weights[1]["model.norm.weight"])
        said.clear()
        policy.wait(policy.all("update", batches[0], 1e-3, 0.0), "learn")
        delivery.publish(2)
        held = [weights_of(samplers, rank) for rank in (0, 1)]
        assert all(torch.equal(tensor, held[1][name]) for name, tensor in held[0].items())
        assert not torch.equal(held[0]["model.norm.weight"], weights[1]["model.norm.weight"])
        assert not said
    finally:
        policy.kill()
        samplers.kill()
        remove_placement_group(placement)


def is_lost(reference: ray.ObjectRef) -> bool:
    try:
        ray.get(reference, timeout=1)
    except ObjectLostError:
        return True
    except GetTimeoutError:  # it is gone, and why is not known yet
        return False
    return False


def test_the_rank_that_dies_with_its_share_of_the_weights_is_named(run, tmp_path):
    """At ZeRO 3 each of two ranks has a share of every weight in the store. Who misses one is not to blame."""
    layout = tmp_path / "layout.yaml"
    layout.write_text("policy: {workers: 2, threads: 1}\nrollout: {threads: 1}\n")
    roles = Roles(make_job(run, layout=str(layout), deepspeed=CONFIGS / "zero3.json"), pytest.fail)
    try:
        roles.setup()
        roles.publish(0)
        ray.kill(roles.groups["policy"].workers[1])
        _, share = roles.delivery.for_worker(0, 0).buckets[0].data
        assert wait_until(lambda: is_lost(share), 120), "Ray keeps it for a while"
        with pytest.raises(WorkerDied, match="the weights that it had published are gone") as death:
            roles.collect(roles.sample(make_request()))
        assert (death.value.role, death.value.rank) == ("policy", 1)
    finally:
        roles.close()


def stubborn() -> type:
    """A class that Ray sends along, since it is in a function: actors cannot import this module."""

    class Stubborn:
        """A worker that dies, hangs, or fails, as it is told."""

        def __init__(self, rank: int, world_size: int, threads: int) -> None:
            self.rank = rank

        def behave(self, how: list[str]) -> int:
            import os
            import time

            from minigpt.errors import UserError

            if how[self.rank] == "die":
                os._exit(1)
            if how[self.rank] == "hang":
                time.sleep(1000)
            if how[self.rank] == "fail":
                raise RuntimeError("connection reset by peer")
            if how[self.rank] == "wrong":
                raise ValueError("cannot reshape")
            if how[self.rank] == "refuse":
                raise UserError("give another file")
            return self.rank

    return Stubborn


@pytest.mark.parametrize(
    ("how", "error", "sentence"),
    [
        (["work", "hang"], UserError, "policy worker 1 did not finish to behave within 6 s"),
        (["hang", "die"], WorkerDied, "policy worker 1 died"),
        (["fail", "die"], WorkerDied, "policy worker 1 died"),
        (["hang", "fail"], WorkerFailed, "policy worker 1 failed to behave: RuntimeError: connection reset by peer"),
        (["wrong", "work"], WorkerFailed, "policy worker 0 failed to behave: ValueError: cannot reshape"),
        (["work", "refuse"], UserError, "^give another file$"),
    ],
    ids=[
        *("one hangs", "one dies while the other waits for it", "the death comes before what it caused", "one fails"),
        *("a ValueError is nobody's input", "one refuses"),
    ],
)
def test_no_wait_hangs_and_a_death_is_told_as_one(how, error, sentence):
    layout = {**laptop(), "policy": Role(workers=2)}
    needed = bundles(layout, ["policy"])
    placement = place(needed, 60)
    group = WorkerGroup(stubborn(), "policy", layout, needed, placement, (), 60.0)
    try:
        group.wait(group.all("behave", ["work", "work"]), "start")
        group.timeout = 6.0
        with pytest.raises(error, match=sentence):
            group.wait(group.all("behave", how), "behave")
    finally:
        group.kill()
        remove_placement_group(placement)
