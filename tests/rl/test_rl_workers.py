"""Policy, reference, critic and rollout workers as plain objects: the invariants before the first update, loss and
gradient against plain float64, weights on their way to the samplers bit for bit."""

import copy
import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from tiny_rl import (
    BETA1,
    arrays_in,
    arrays_of,
    bytes_held,
    fingerprint,
    make_job,
    make_policy,
    make_request,
    plain_forward,
    sample,
    with_columns,
    write_run,
)

from minigpt.errors import UserError
from minigpt.generation.engine import Engine as GenerationEngine
from minigpt.generation.engine import cache_bytes
from minigpt.model.model_critic import RewardModel, ValueModel
from minigpt.rl import cluster
from minigpt.rl.algorithms import group_advantages
from minigpt.rl.batch import RolloutBatch, micro_batches, restore
from minigpt.rl.delivery import Delivery
from minigpt.rl.group import WorkerGroup, own_address
from minigpt.rl.loop import without_dead_groups
from minigpt.rl.losses import PolicyLossTerms, policy_objective
from minigpt.rl.publish import (
    Bucket,
    Entry,
    Published,
    bucket_plan,
    copy_into,
    data_bytes,
    slices,
    split,
    unpack,
    weight_buckets,
)
from minigpt.rl.workers import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker, RolloutWorker, Timed, Worker
from minigpt.trainer.checkpoint import checkpoint_folder
from minigpt.trainer.options import PRESETS
from minigpt.trainer.setup import load_masters

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def object_store():
    """Published weights lie in Ray's object store."""
    cluster.connect(num_cpus=1)
    yield
    cluster.disconnect()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A policy whose next tokens are neither certain nor all alike."""
    return write_run(tmp_path_factory.mktemp("rl") / "sft", sharpness=10.0)


@pytest.fixture(scope="module")
def smooth_run(tmp_path_factory):
    """A smaller gain in every layer: rounding errors grow less."""
    return write_run(tmp_path_factory.mktemp("rl") / "sft", sharpness=5.0)


@pytest.fixture(scope="module")
def batch(run) -> RolloutBatch:
    """16 answers of the policy to 4 prompts."""
    return sample(make_policy(make_job(run)))


def reference_log_probs(job, batch) -> np.ndarray:
    worker = ReferenceWorker(0, 1, 1, job)
    worker.setup()
    part, found = worker.log_probs(batch).value
    assert np.array_equal(part, np.arange(len(batch)))
    return found


def advantages_of(batch: RolloutBatch, samples: int = 4) -> np.ndarray:
    """Those of random rewards."""
    rewards = torch.from_numpy(np.random.default_rng(3).normal(size=len(batch)).astype(np.float32))
    return group_advantages(rewards, samples).numpy()


# --------------------------------------------------------------------------------------- before and without an update


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_any_update_the_policy_is_the_reference_bit_for_bit(run, temperature):
    job = make_job(run, temperature=temperature, kl_coefficient=0.1)
    policy = make_policy(job)
    batch = sample(policy)
    assert np.array_equal(policy.log_probs(batch).value, reference_log_probs(job, batch))


@pytest.mark.parametrize("old", ["of the update itself", "given"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_with_a_learning_rate_of_0_nothing_moves_for_ever(run, old, dtype):
    """Ratio exactly 1, nothing clipped, and in fp32 a KL of exactly 0, in every one of several updates."""
    options = {"minibatches": 2, "update_epochs": 2} if old == "given" else {}
    job = make_job(run, kl_coefficient=0.1, dtype=dtype, **options)
    policy = make_policy(job)
    batch = sample(policy)
    before = policy.engine.master_weights()
    columns = {"advantages": advantages_of(batch), "ref_log_probs": reference_log_probs(job, batch)}
    if old == "given":
        columns["old_log_probs"] = policy.log_probs(batch).value
        if dtype == "fp32":
            columns["ref_log_probs"] = columns["old_log_probs"]  # packed alike
    for _ in range(3):
        seen = policy.update(with_columns(batch, **columns), 0.0, 0.1).value
        assert seen["ratio"] == 1.0
        assert seen["clip_fraction"] == 0.0
        assert seen["kl"] == 0.0 if dtype == "fp32" else seen["kl"] < 1e-3
        assert seen["grad_norm"] > 0
    after = policy.engine.master_weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_old_log_probs_are_those_of_the_first_update_exactly_and_differ_from_the_second(run):
    policy = make_policy(make_job(run, update_epochs=2, dtype="bf16"))
    batch = sample(policy)
    old = policy.log_probs(batch).value
    columns = {"advantages": advantages_of(batch), "old_log_probs": old}
    policy.job.options.update_epochs = 1
    assert policy.update(with_columns(batch, **columns), 1e-2, 0.0).value["ratio"] == 1.0
    again = policy.update(with_columns(batch, **columns), 0.0, 0.0).value
    assert abs(again["ratio"] - 1.0) > 1e-3
    assert not np.array_equal(policy.log_probs(batch).value, old)


@pytest.fixture(scope="module")
def run_s(tmp_path_factory):
    """Config S: 256 wide, 4 layers."""
    return write_run(tmp_path_factory.mktemp("rl") / "sft", sharpness=3.0, shape=PRESETS["s"])


def test_compiled_in_bf16_the_old_log_probs_come_from_the_graph_that_is_trained(run_s, monkeypatch):
    """Config S, four optimizer steps on the answers of a step. Before the first of them moves anything every token's
    ratio is exactly 1 and none is clipped, however tight the clip; another graph of the same weights rounds otherwise.
    """
    tight = {"clip_low": 1e-9, "clip_high": 1e-9}
    job = make_job(run_s, dtype="bf16", compile=True, minibatches=2, update_epochs=2, kl_coefficient=0.1, **tight)
    policy = make_policy(job)
    batch = sample(policy)
    columns = {"advantages": advantages_of(batch), "ref_log_probs": batch.behaviour_log_probs}
    torch._dynamo.utils.counters.clear()
    columns["old_log_probs"] = policy.log_probs(with_columns(batch, **columns)).value
    given = with_columns(batch, **columns)
    ratios = watched_ratios(policy, monkeypatch)
    for _ in range(2):
        seen = policy.update(given, 0.0, 0.1).value
        assert seen["ratio"] == 1.0
        assert seen["clip_fraction"] == 0.0
        assert seen["grad_norm"] > 0
    assert torch.cat(ratios).numel() == 2 * 2 * len(batch.behaviour_log_probs)
    assert (torch.cat(ratios) == 1.0).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    other = policy._by_forward_pass(given, policy.engine.evaluate).value
    assert not np.array_equal(other, columns["old_log_probs"])
    assert np.array_equal(policy.log_probs(given).value, columns["old_log_probs"])
    ratios.clear()
    seen = policy.update(given, 1e-3, 0.1).value
    (first, *later) = np.split(np.arange(len(ratios)), 4)
    assert all((ratios[i] == 1.0).all() for i in first), "nothing has moved before the first update"
    assert all((ratios[i] != 1.0).any() for i in np.concatenate(later))
    assert seen["clip_fraction"] > 0


def watched_ratios(policy: PolicyWorker, monkeypatch) -> list[torch.Tensor]:
    """π/π_old of the answer tokens of every forward pass that is trained on, as it comes."""
    found: list[torch.Tensor] = []
    forward_backward = policy.engine.forward_backward

    def watched(tensors: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
        output = forward_backward(tensors, scale)
        answer = tensors["labels"].flatten() >= 0
        log_probs = output[1 + len(policy.terms.metrics) :].float()
        found.append((log_probs - tensors["old_log_probs"].flatten())[answer].exp())
        return output

    monkeypatch.setattr(policy.engine, "forward_backward", watched)
    return found


# ------------------------------------------------------------------------------------------- the sampler's and ours


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_sampler_policy_reference_and_plain_log_softmax_agree_at_any_temperature(run, temperature):
    job = make_job(run, temperature=temperature)
    policy = make_policy(job)
    batch = sample(policy)
    with torch.no_grad():
        found = plain_forward(load_masters(run), batch, temperature)
        plain, entropy = (torch.cat(column) for column in zip(*found, strict=True))
    assert plain.std() > 0.5, "the policy is no uniform distribution"
    for found in (batch.behaviour_log_probs, policy.log_probs(batch).value, reference_log_probs(job, batch)):
        assert np.abs(found - plain.numpy()).max() < 1e-5
    seen = policy.update(with_columns(batch, advantages=advantages_of(batch)), 0.0, 0.0).value
    assert seen["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert seen["sampler_gap_max"] == pytest.approx(
        np.abs(policy.log_probs(batch).value - batch.behaviour_log_probs).max(), abs=1e-7
    )


def bf16_gap(run: Path) -> tuple[RolloutBatch, np.ndarray]:
    """64 answers, and log π − log μ of their tokens."""
    policy = make_policy(make_job(run, dtype="bf16", max_new_tokens=40, prompts_per_step=8, samples_per_prompt=8))
    batch = sample(policy, make_request(8, 8, max_new_tokens=40))
    gap = policy.log_probs(batch).value - batch.behaviour_log_probs
    assert len(gap) > 1000
    return batch, gap


def test_in_bf16_the_sampler_is_close_and_unbiased(smooth_run):
    _, gap = bf16_gap(smooth_run)
    assert np.abs(gap).max() < 5e-2
    assert abs(gap.mean()) < 1e-3


def test_in_bf16_the_sampler_of_a_model_that_is_sure_stays_unbiased_and_is_seldom_far(tmp_path):
    """Config S with logits as large as a trained model's, which multiply what rounding does to them: the largest of
    a thousand differences is then above 0.05 (see "Where the code differs from the first plan")."""
    batch, gap = bf16_gap(write_run(tmp_path / "sft", shape=PRESETS["s"], last_gain=8.0))
    assert 0.1 < -batch.behaviour_log_probs.mean() < 1.0, "nats a token: as sure as a model that was fine-tuned"
    assert abs(gap.mean()) < 1e-3
    assert np.quantile(np.abs(gap), 0.99) < 5e-2
    assert np.abs(gap).max() < 0.3


def test_what_was_sampled_is_what_is_trained(run, batch):
    """The ids of the engine are the labels of the passes, one for one; nothing was decoded and encoded again."""
    request = make_request()
    engine = GenerationEngine(load_masters(run), slots=16)
    prompts = np.split(request.tokens, np.cumsum(request.prompt_lens)[:-1])
    asked = [
        engine.submit(prompt.tolist(), request.params, n=4, sequence_ids=range(first, first + 4))
        for prompt, first in zip(prompts, request.first_sample_ids.tolist(), strict=True)
    ]
    while engine.has_work:
        engine.step()
    answers = [completion.ids for one in asked for completion in one.completions]
    labels = {}
    for one in micro_batches(batch, 64, 2, {}):
        flat = {name: one.arrays[name].reshape(-1)[one.positions] for name in ("labels", "sequence_ids")}
        for number in np.unique(flat["sequence_ids"]):
            labels[int(number)] = flat["labels"][flat["sequence_ids"] == number].tolist()
    assert labels == dict(enumerate(answers))


# ------------------------------------------------------------------------------------------------- loss and gradient


def expected_loss(model, batch, o, columns, kl_coefficient) -> torch.Tensor:
    """The loss of a step as the papers write it, one answer after the other, in float64."""
    starts = np.cumsum(batch.answer_lens) - batch.answer_lens
    high = o.clip_low if o.clip_high is None else o.clip_high
    answers = []
    for (log_p, entropy), start, n in zip(
        plain_forward(model, batch, o.temperature), starts, batch.answer_lens, strict=True
    ):
        here = {name: torch.from_numpy(column[start : start + n]).double() for name, column in columns.items()}
        advantage, old, ref = here["advantages"], here["old_log_probs"], here["ref_log_probs"]
        ratio = (log_p - old).exp()
        if o.objective == "gspo":  # every token's gradient is that of the mean
            mean = (log_p - old).mean().detach()
            ratio = (mean + log_p - log_p.detach()).exp()
        if o.objective == "cispo":
            loss = -ratio.clamp(1 - o.clip_low, 1 + high).detach() * advantage * log_p
        else:
            loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - o.clip_low, 1 + high) * advantage)
        loss = loss + kl_coefficient * (log_p - old).exp() * ((ref - log_p).exp() - (ref - log_p) - 1)
        if o.corrects_behaviour:
            loss = loss * (old - here["behaviour"]).exp().clamp(max=o.behaviour_cap)
        answers.append(loss - o.entropy_coefficient * entropy)
    if o.aggregation == "token":
        return torch.cat(answers).mean()
    if o.aggregation == "sequence":
        return torch.stack([answer.mean() for answer in answers]).mean()
    return torch.cat(answers).sum() / (len(answers) * o.max_new_tokens)


def off_policy(batch: RolloutBatch) -> dict[str, np.ndarray]:
    """Advantages, and log-probabilities of older policies: far enough that some ratios are clipped."""
    rng = np.random.default_rng(5)
    exact = batch.behaviour_log_probs
    return {
        "advantages": batch.spread(advantages_of(batch)),
        "old_log_probs": exact + rng.normal(0, 0.3, len(exact)).astype(np.float32),
        "ref_log_probs": exact + rng.normal(0, 0.5, len(exact)).astype(np.float32),
        "behaviour": exact,
    }


def first_gradients(worker) -> dict[str, torch.Tensor]:
    """Read off AdamW's first moment, which is (1 - beta1) · gradient behind the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = worker.engine
    engine._optimizer._hp_optimizer_states_linked = False  # else DeepSpeed links those of the first group only
    engine._optimizer._lazy_init_hp_params_optimizer_state()
    return {
        name: safe_get_full_optimizer_state(parameter, "exp_avg").view(parameter.shape).clone() / (1 - BETA1)
        for name, parameter in worker.network.named_parameters()
    }


CASES = {
    "token mean": {},
    "answer mean": {"aggregation": "sequence"},
    "constant": {"aggregation": "constant"},
    "clip-higher at T 0.7": {"clip_high": 0.28, "temperature": 0.7},
    "gspo": {"objective": "gspo", "aggregation": "sequence", "clip_low": 0.05},
    "cispo": {"objective": "cispo"},
    "entropy": {"entropy_coefficient": 0.1},
    "behaviour correction": {"behaviour_correction": True, "behaviour_cap": 1.2},
    "one row a pass": {"micro_batch_tokens": 64},
    "longer rows": {"row_length": 256},
    "row by row of 32": {"row_length": 32, "micro_batch_tokens": 32, "aggregation": "sequence"},
    "recomputed activations": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_loss_and_gradient_are_those_of_the_formula_in_float64(run, batch, options):
    job = make_job(run, kl_coefficient=0.2, **options)
    policy = make_policy(job)
    columns = off_policy(batch)
    model = load_masters(run).double()
    expected = expected_loss(model, batch, job.options, columns, 0.2)
    expected.backward()
    given = {name: column for name, column in columns.items() if name != "behaviour"}
    seen = policy.update(with_columns(batch, **given), 1e-4, 0.2).value
    assert seen["loss"] == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)  # terms of both signs and about 1
    if job.options.objective == "ppo":
        assert 0.1 < seen["clip_fraction"] < 0.9
    found = first_gradients(policy)
    for name, parameter in model.named_parameters():
        difference = (found[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, f"{name}: {difference}"


def test_a_sampler_whose_log_probs_are_nan_has_no_perfect_gap(run, batch):
    columns = {"advantages": advantages_of(batch)}
    broken = replace(batch, behaviour_log_probs=np.full_like(batch.behaviour_log_probs, np.nan))
    seen = make_policy(make_job(run)).update(with_columns(broken, **columns), 0.0, 0.0).value
    assert math.isnan(seen["sampler_gap_mean"])
    assert math.isnan(seen["sampler_gap_max"])


def test_minibatches_are_the_answers_in_order_each_an_update_of_its_own(run, batch):
    """Two minibatches: the weights behind both are those behind two batches of half the answers."""
    columns = {name: c for name, c in off_policy(batch).items() if name != "behaviour"}
    whole = with_columns(batch, **columns)
    together = make_policy(make_job(run, kl_coefficient=0.2, minibatches=2))
    together.update(whole, 1e-3, 0.2)
    order = np.random.default_rng([together.job.options.seed, int(batch.sample_ids[0]), 0]).permutation(2)
    apart = make_policy(make_job(run, kl_coefficient=0.2))
    for half in order:
        apart.update(whole.take(np.arange(8) + 8 * half), 1e-3, 0.2)
    ours, theirs = together.engine.master_weights(), apart.engine.master_weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cispo"])
def test_what_stands_where_nothing_was_sampled_changes_neither_loss_nor_gradient(run, batch, objective):
    """NaN in the columns of prompts and padding; the loss is a row of everything that is watched."""
    columns = off_policy(batch)
    columns["behaviour_log_probs"] = columns.pop("behaviour")
    terms = PolicyLossTerms(objective=objective, behaviour_cap=2.0, entropy_coefficient=0.1, max_sequences=16)
    model = load_masters(run)
    (one,) = micro_batches(batch, 64, 100, {**columns, "weights": np.ones_like(batch.behaviour_log_probs)})

    def results(garbage: float) -> list[torch.Tensor]:
        arrays = {name: torch.from_numpy(array.copy()) for name, array in one.arrays.items()}
        for name in columns:
            arrays[name][arrays["labels"] < 0] = garbage
        loss, watched = policy_objective(terms)(model, kl_coefficient=torch.tensor(0.1), **arrays)
        return [loss.detach(), watched[:6], *torch.autograd.grad(loss, list(model.parameters()))]

    clean = results(0.0)
    assert all(found.isfinite().all() for found in clean)
    for garbage in (float("nan"), float("inf"), -1e30):
        assert all(torch.equal(a, b) for a, b in zip(clean, results(garbage), strict=True))


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("bucket_bytes", [1, 10_000, 1 << 25])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_published_are_the_bits_that_the_policy_computes_with(tmp_path, dtype, tied, bucket_bytes):
    policy = make_policy(make_job(write_run(tmp_path / "sft", 10.0, tied), dtype=dtype))
    buckets = []
    for pieces in weight_buckets(policy.network, policy.engine, bucket_bytes):  # each is good until the next one comes
        memory = torch.empty(data_bytes(pieces.entries), dtype=torch.uint8)
        copy_into(pieces, memory)
        buckets.append(Bucket(pieces.entries, split(pieces.entries, memory)))
    assert len(buckets) > 1 or bucket_bytes == 1 << 25
    published = policy.publish(0).value
    published = type(published)(3, buckets)
    found = dict(unpack(published, lambda tensors: [slices(tensors)]))
    expected = dict(policy.network.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert found[name].dtype == getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[dtype])
        assert torch.equal(found[name], parameter), name


def test_a_rollout_worker_holds_what_was_published_last_and_answers_for_no_other_version(run, batch):
    policy = make_policy(make_job(run))
    worker = RolloutWorker(0, 1, 1, policy.job)
    worker.setup()
    with pytest.raises(RuntimeError, match="weights 0 are wanted, these are -1"):
        worker.generate(make_request(version=0))
    for version in (0, 1):
        published = policy.publish(version).value
        assert worker.load(published).value == version
        loaded = dict(worker.engine.model.named_parameters())
        assert all(torch.equal(loaded[name], p) for name, p in policy.network.named_parameters())
        answers = worker.generate(make_request(version=version)).value
        assert (answers.versions == version).all()
        assert np.array_equal(answers.tokens, batch.tokens) == (version == 0)
        policy.update(with_columns(batch, advantages=advantages_of(batch)), 1e-2, 0.0)
    with pytest.raises(RuntimeError, match="weights 0 are wanted, these are 1"):
        worker.generate(make_request(version=0))


def test_a_sampler_takes_no_more_slots_than_its_gpu_has_room_for(run, monkeypatch, capsys):
    """Room for the engine's copy of the weights and for the caches of 3 answers, twice since they grow."""
    worker = RolloutWorker(0, 1, 1, make_job(run))
    worker.setup()
    weights = sum(p.numel() * p.element_size() for p in worker.network.parameters())
    one = cache_bytes(worker.network, 1, worker.job.longest)
    wanted = worker.engine.slots
    for free, slots in ((weights + 7 * one, 3), (weights + 2 * wanted * one, wanted)):
        monkeypatch.setattr("minigpt.rl.workers.rollout.free_memory", lambda device, free=free: free)
        worker.setup()
        assert worker.engine.slots == slots
        assert capsys.readouterr().err.count("room for 3 answers") == (slots == 3)
    monkeypatch.setattr("minigpt.rl.workers.rollout.free_memory", lambda device: weights + one)
    with pytest.raises(UserError, match="shorter prompts"):
        worker.setup()


@pytest.mark.parametrize("judged", [4, 50])
def test_a_sampler_has_slots_for_its_share_of_the_prompts(run, judged):
    job = make_job(run, prompts_per_step=10, samples_per_prompt=3, eval_prompts=judged)
    for world_size in (1, 2, 3, 20):
        worker = RolloutWorker(0, world_size, 1, job)
        worker.device = torch.device("cpu")
        shares = [make_request(*sizes).share(0, world_size) for sizes in ((10, 3), (judged, 1))]
        assert worker._slots() == max(len(share.sample_ids) for share in shares)


def test_a_version_that_is_there_already_is_not_loaded_again(run):
    policy = make_policy(make_job(run))
    worker = RolloutWorker(0, 1, 1, policy.job)
    worker.setup()
    published = policy.publish(4).value
    worker.load(published)
    reloaded = worker.engine.version
    worker.load(published)
    assert worker.engine.version == reloaded


def test_large_weights_are_read_where_the_store_has_them_whatever_slices_they_went_in_with(object_store):
    sizes = [7, 1 << 20, (1 << 20) + 1, 3_000_001, 20 << 20, 0]
    pieces = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
    entries = [Entry(str(i), (size,), torch.uint8) for i, size in enumerate(sizes)]
    reference = ray.put(slices(pieces))
    stored = ray.get(reference)
    assert [len(parts) for parts in stored] == [1, 1, 2, 3, 1, 1]
    for bucket, shared in ((stored, True), ([[part.copy() for part in parts] for parts in stored], False)):
        found = dict(unpack(Published(0, [Bucket(entries, [bucket])]), lambda data: data))
        assert all(torch.equal(found[str(i)], piece) for i, piece in enumerate(pieces))
        assert (found["3"].data_ptr() == bucket[3][0].ctypes.data) == shared


def test_shares_of_several_ranks_are_put_together_in_the_same_memory_each_time(object_store):
    """Tensors of which all ranks have something, only some or one, or nobody, each cut where it happens."""
    sizes = [0, 1, 2, 3_000_001, 20 << 20]
    entries = [Entry(str(i), (size,), torch.uint8) for i, size in enumerate(sizes)]
    memory: dict[str, np.ndarray] = {}
    for version in range(2):
        whole = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
        shares = [[tensor[r * -(-len(tensor) // 3) :][: -(-len(tensor) // 3)] for tensor in whole] for r in range(3)]
        ranks = [Published(version, [Bucket(entries, [ray.put(slices(pieces))])]) for pieces in shares]
        joined = Published.by_all([*ranks, Published(version, [Bucket(entries, [])])])
        assert joined.version == version
        found = dict(unpack(joined, ray.get, memory))
        assert all(torch.equal(found[str(i)], tensor) for i, tensor in enumerate(whole))
        if version == 0:
            before = {name: tensor.data_ptr() for name, tensor in found.items()}
    assert memory.keys() == {"2", "3", "4"}
    assert all(found[name].data_ptr() == before[name] for name in memory)


def test_who_cannot_receive_says_why_and_leaves_the_group(run):
    """No room for what will come, and buckets that do not fit the weights: each is a sentence, the store remains."""
    policy = make_policy(make_job(run))
    worker = RolloutWorker(0, 1, 1, policy.job)
    worker.setup()
    plan = bucket_plan(policy.network)
    endless = Entry("lm_head.weight", (1 << 60,), torch.uint8)
    assert "memory" in worker.join_transport("gloo", own_address(), 0, 1, [[endless]])
    assert worker._transport is None
    other = [[entry._replace(shape=(entry.shape[0] + 1, *entry.shape[1:])) for entry in entries] for entries in plan]
    assert worker.join_transport("gloo", own_address(), 0, 1, other) is None
    assert "size of tensor" in worker.receive(1).value
    assert (worker.version, worker._transport) == (-1, None)
    assert worker.load(policy.publish(2).value).value == 2


def test_a_sampler_answers_from_the_stores_memory_and_never_writes_into_it(run):
    """A broadcast after that goes into memory of its own; here of a group that consists of the sampler alone."""
    policy = make_policy(make_job(run))
    published = policy.publish(0).value
    worker = RolloutWorker(0, 1, 1, policy.job)
    worker.setup()
    worker.load(published)
    parameters = list(worker.network.parameters())
    assert not any(parameter.untyped_storage().resizable() for parameter in parameters)
    worker.join_transport("gloo", own_address(), 0, 1, bucket_plan(policy.network))
    assert worker.receive(1).value is None
    assert all(parameter.untyped_storage().resizable() for parameter in parameters)
    stored = dict(unpack(published, ray.get))
    assert all(torch.equal(stored[name], p) for name, p in policy.network.named_parameters())
    worker.load(published)
    assert all(torch.equal(stored[name], p) for name, p in worker.network.named_parameters())


@pytest.fixture
def adapted(tmp_path):
    """A policy whose adapter has learned something, and the batch that it learned from."""
    policy = make_policy(make_job(write_run(tmp_path / "sft", 10.0, tied=False), lora_rank=4))
    batch = sample(policy)
    policy.update(with_columns(batch, advantages=advantages_of(batch)), 3e-2, 0.0)
    return policy, batch


def test_an_adapter_is_published_in_the_weights(adapted):
    policy, _ = adapted
    answers = sample(policy)
    found = dict(unpack(policy.publish(1).value, ray.get))
    adapters = 0
    for name, weight in found.items():
        module = policy.network.get_submodule(name.rpartition(".")[0])
        exact = module.weight.double()
        if hasattr(module, "lora_A_default"):
            exact = exact + 2.0 * module.lora_B_default.double() @ module.lora_A_default.double()  # alpha / rank = 2
            adapters += 1
            assert not torch.equal(weight, module.weight)
        assert (weight.double() - exact).norm() < 1e-7 * exact.norm(), name
    assert adapters == 2 * 7
    assert np.abs(policy.log_probs(answers).value - answers.behaviour_log_probs).max() < 1e-5


def test_the_reference_of_an_adapter_is_the_model_without_it(adapted):
    policy, batch = adapted
    exact = reference_log_probs(policy.job, batch)
    assert np.array_equal(policy.reference_log_probs(batch).value, exact)
    assert np.abs(policy.log_probs(batch).value - exact).max() > 1e-3, "which has learned something"


# --------------------------------------------------------------------------------------------------- sleeping, waking


TRAINERS = {
    **{f"ZeRO {stage}": {"deepspeed": stage, "dtype": "fp32" if stage == 0 else "bf16"} for stage in range(4)},
    "ZeRO 1, fp32": {"deepspeed": 1, "dtype": "fp32"},
    "Muon": {"optimizer": "muon", "dtype": "bf16"},
    "an adapter": {"lora_rank": 4},
}


@pytest.fixture
def small_buckets(tmp_path):
    """A function from a ZeRO stage to its configuration with buffers of the model's size, not of a large one's."""

    def write(stage: int) -> Path:
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000}}))
        return path

    return write


@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
def test_a_policy_that_sleeps_between_updates_holds_nothing_meanwhile_and_learns_the_same_bits(
    run, batch, small_buckets, options
):
    if "deepspeed" in options:
        options = {**options, "deepspeed": small_buckets(options["deepspeed"])}
    batch = with_columns(batch, advantages=advantages_of(batch))
    before = bytes_held()
    one, other = (make_policy(make_job(run, **options)) for _ in range(2))
    for _ in range(2):
        assert one.update(batch, 1e-2, 0.0).value == other.update(batch, 1e-2, 0.0).value
        awake = bytes_held(one.engine._sleeper)
        one.sleep()
        freed = awake - bytes_held(one.engine._sleeper)
        assert freed > 0.98 * (awake - before) / 2
        one.wake()
        assert bytes_held(one.engine._sleeper) == pytest.approx(awake, rel=1e-3)
        assert np.array_equal(one.log_probs(batch).value, other.log_probs(batch).value)
    ours, theirs = one.engine.master_weights(), other.engine.master_weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sampler_and_a_reference_that_slept_say_the_same(run, batch, dtype):
    job = make_job(run, dtype=dtype)
    published = make_policy(job).publish(0).value
    before = bytes_held()
    sampler, reference = RolloutWorker(0, 1, 1, job), ReferenceWorker(0, 1, 1, job)
    sampler.setup(), reference.setup()
    sampler.load(published)
    answers, judged = sampler.generate(make_request()).value, reference.log_probs(batch).value[1]
    awake = bytes_held() - before
    for worker in (sampler, reference):
        worker.sleep()
        worker.sleep()
    asleep = bytes_held(sampler._sleeper, reference._sleeper) - before
    assert asleep < 0.1 * awake
    for worker in (sampler, reference):
        worker.wake()
        worker.wake()
    again = sampler.generate(make_request()).value
    assert all(np.array_equal(array, arrays_of(again)[name]) for name, array in arrays_of(answers).items())
    assert np.array_equal(reference.log_probs(batch).value[1], judged)


# -------------------------------------------------------------------------------------------- critic and reward model


def full_row_batch(batch: RolloutBatch) -> RolloutBatch:
    """The batch with one more sequence, that fills a row of 64 to its last token."""
    rng = np.random.default_rng(0)
    answer = rng.integers(10, 6400, 54).astype(np.int32)
    long = RolloutBatch(
        np.concatenate([rng.integers(10, 6400, 10).astype(np.int32), answer]),
        np.array([10], dtype=np.int32),
        np.array([54], dtype=np.int32),
        np.array([16]),
        np.array([0]),
        np.array([False]),
        np.zeros(54, dtype=np.float32),
        np.zeros(54, dtype=np.int32),
    )
    return RolloutBatch.concatenate([batch, long])


@pytest.fixture
def critic(smooth_run):
    worker = CriticWorker(0, 1, 1, make_job(smooth_run, "ppo", value_clip=0.05))
    worker.setup(None)
    with torch.no_grad():  # a new head says 0 everywhere
        generator = torch.Generator().manual_seed(1)
        for name, parameter in worker.network.named_parameters():
            if name.startswith("value_head"):
                value = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(value)
                _set_master(parameter, value)
    return worker


def _set_master(parameter, value) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, value)


def values_of(model: ValueModel, batch: RolloutBatch) -> list[torch.Tensor]:
    """Of every position from the last of the prompt on, sequence by sequence."""
    found = []
    ends = np.cumsum(batch.lengths)
    for end, length, n in zip(ends, batch.lengths, batch.answer_lens, strict=True):
        ids = torch.from_numpy(batch.tokens[end - length : end].astype(np.int64))
        found.append(model(ids[None])[0, length - n - 1 :])
    return found


def test_values_are_of_the_state_before_each_token(critic, batch):
    batch = full_row_batch(batch)
    with torch.no_grad():
        exact = values_of(critic.network, batch)
    values = critic.values(batch).value
    assert values.std() > 0.1
    assert np.abs(values - torch.cat([v[:-1] for v in exact]).numpy()).max() < 1e-5


def test_loss_and_gradient_of_the_critic_are_those_of_the_formula_in_float64(critic, batch):
    values = critic.values(batch).value
    rng = np.random.default_rng(0)
    old, returns = (values + rng.normal(0, 1, len(values)).astype(np.float32) for _ in range(2))
    model = copy.deepcopy(critic.network).double()
    new = torch.cat([v[:-1] for v in values_of(model, batch)])
    o, r = (torch.from_numpy(x).double() for x in (old, returns))
    bounded = o + (new - o).clamp(-0.05, 0.05)
    expected = (torch.maximum((new - r) ** 2, (bounded - r) ** 2) / 2).mean()
    expected.backward()
    seen = critic.update(with_columns(batch, values=old, returns=returns), 1e-4).value
    assert seen["value_loss"] == pytest.approx(expected.item(), rel=1e-6)
    found = first_gradients(critic)
    for name, parameter in model.named_parameters():
        assert (found[name].double() - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("workers", [2, 3, 20])
def test_shares_of_several_reference_and_reward_workers_make_the_whole(run, batch, tmp_path, workers):
    """Also with more workers than sequences."""
    reward_run = tmp_path / "reward"
    RewardModel.from_decoder(load_masters(run)).save_pretrained(reward_run, tokenizer_folder=None)
    job = make_job(run, reward_model=reward_run)
    lengths = {"log_probs": batch.answer_lens, "rewards": np.ones(len(batch), dtype=np.int64)}
    for kind, method in ((ReferenceWorker, "log_probs"), (RewardWorker, "rewards")):
        found = []
        for n in (1, workers):
            parts = []
            for rank in range(n):
                worker = kind(rank, n, 1, job)
                worker.setup()
                parts.append(getattr(worker, method)(batch).value)
            found.append(restore([part for part, _ in parts], [values for _, values in parts], lengths[method]))
        assert len(found[0]) == lengths[method].sum()
        assert np.abs(found[0] - found[1]).max() < 1e-5
        assert found[0].std() > 1e-4


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_answers_of_advantage_0_are_left_out_and_the_update_stays_the_same(smooth_run, aggregation):
    job = make_job(smooth_run, aggregation=aggregation)
    batch = sample(make_policy(job))
    advantages = np.random.default_rng(3).normal(size=len(batch)).astype(np.float32)
    advantages[4:8] = advantages[12:] = 0.0
    results, start = [], make_policy(job).engine.master_weights()
    for given, values in ((batch, advantages), without_dead_groups(batch, advantages, job.options)):
        policy = make_policy(job)
        found = policy.update(with_columns(given, advantages=values), 1e-3, 0.0).value
        learned = policy.engine.master_weights()
        results.append((len(given), found["grad_norm"], found["loss"], {n: learned[n] - w for n, w in start.items()}))
    (whole, norm, loss, steps), (live, live_norm, live_loss, live_steps) = results
    assert (whole, live) == (16, 8)
    assert live_norm == pytest.approx(norm, rel=1e-5)
    assert live_loss == pytest.approx(loss, rel=1e-5)
    for name, step in steps.items():  # AdamW's first step has the size of the rate, whatever rounding is left of a 0
        assert ((live_steps[name] - step).norm() / step.norm()).item() < 1e-2, name


# -------------------------------------------------------------------------------------------------- batches from Ray


KINDS = (PolicyWorker, CriticWorker, ReferenceWorker, RewardWorker, RolloutWorker)


def calls_of_every_method(run, batch, folder) -> Iterator[tuple[Worker, str, list]]:
    """Workers, methods and arguments, one after the other, as they occur in a run."""
    columns = {name: c for name, c in off_policy(batch).items() if name != "behaviour"}
    policy_batch = with_columns(batch, **columns)
    critic_batch = with_columns(batch, values=batch.behaviour_log_probs, returns=columns["advantages"])
    RewardModel.from_decoder(load_masters(run)).save_pretrained(folder / "reward", tokenizer_folder=None)
    several = {"update_epochs": 2, "minibatches": 2}
    job = make_job(run, kl_coefficient=0.1, reward_model=folder / "reward", behaviour_correction=True, **several)
    policy, adapter = PolicyWorker(0, 1, 1, job), PolicyWorker(0, 1, 1, make_job(run, lora_rank=4))
    critic = CriticWorker(0, 1, 1, make_job(run, "ppo", **several))
    reference, reward, rollout = (kind(0, 1, 1, job) for kind in KINDS[2:])
    for worker in (policy, adapter, critic):
        yield worker, "setup", [None]
        yield worker, "address", []
        yield worker, "describe", []
    for worker in (reference, reward, rollout):
        yield worker, "setup", []
    for worker in (policy, critic, reference, reward, rollout):
        yield worker, "ping", []
        yield worker, "gpu", []
        yield worker, "sleep", []
        yield worker, "wake", []
        plan = bucket_plan(policy.network)
        yield worker, "join_transport", ["gloo", own_address(), 0, 1, plan]  # a group of its own: it hears itself
    yield policy, "open_transport", []
    yield policy, "publish", [0, True]
    yield policy, "store", [0]
    yield rollout, "receive", [0]
    yield policy, "log_probs", [policy_batch]
    yield policy, "update", [policy_batch, 1e-3, 0.1]
    yield adapter, "reference_log_probs", [policy_batch]
    yield adapter, "update", [policy_batch, 1e-3, 0.1]
    yield reference, "log_probs", [policy_batch]
    yield reward, "rewards", [policy_batch]
    yield critic, "values", [critic_batch]
    yield critic, "update", [critic_batch, 1e-3]
    yield policy, "publish", [1]
    yield rollout, "load", [policy.publish(1).value]
    yield rollout, "generate", [make_request(version=1)]
    for worker, name in ((policy, "policy"), (critic, "critic")):
        yield worker, "save", [folder / name, {"step": 1, "position": {"prompts": [1, 2]}}]
        yield worker, "load", [checkpoint_folder(folder / name, 1)]
    yield policy, "export", [folder]
    yield policy, "update", [policy_batch, 1e-3, 0.1]  # with what was loaded
    yield rollout, "load", [policy.publish(2).value]
    yield rollout, "generate", [make_request(version=2)]


def test_no_method_writes_into_what_it_is_handed(run, batch, tmp_path):
    """Ray hands out read-only views, but torch can write through them: all that was handed over so far is compared
    after every call. A new method must be added above."""
    called, handed, before = set(), [], []
    for worker, method, arguments in calls_of_every_method(run, batch, tmp_path):
        for array in arrays_in(arguments):
            array.flags.writeable = False
        handed.append(arguments)
        before.append((fingerprint(arguments), repr(arguments)))
        getattr(worker, method)(*arguments)
        called.add((type(worker), method))
        assert [(fingerprint(one), repr(one)) for one in handed] == before, f"{type(worker).__name__}.{method}"
    public = {(k, name) for k in KINDS for name, _ in inspect.getmembers(k, inspect.isfunction) if name[0] != "_"}
    assert called == public


@pytest.mark.parametrize("workers", [1, 2, 6])
def test_several_samplers_answer_what_one_would(run, workers):
    """4 prompts on 2 and on 6 workers, also greedily (evaluation), in the order of the sample numbers."""
    policy = make_policy(make_job(run, batch_invariant=True, rollout_slots=4))
    published = policy.publish(0).value
    for temperature in (1.0, 0.0):
        request = make_request(temperature=temperature)
        parts = []
        for rank in range(workers):
            worker = RolloutWorker(rank, workers, 1, policy.job)
            worker.setup()
            worker.load(published)
            parts.append(worker.generate(request).value)
        merged = RolloutBatch.concatenate(parts)
        merged = merged.take(np.argsort(merged.sample_ids, kind="stable"))
        alone = RolloutWorker(0, 1, 1, policy.job)
        alone.setup()
        alone.load(published)
        expected = alone.generate(request).value
        assert merged.sample_ids.tolist() == list(range(16))
        for name, array in arrays_of(expected).items():
            assert np.array_equal(array, arrays_of(merged)[name]), name
        ends = expected.tokens[np.cumsum(expected.lengths) - 1]
        assert np.array_equal(expected.stopped, np.isin(ends, policy.job.stop_ids))


# ---------------------------------------------------------------------------------------------------------- broadcast


class Answers(WorkerGroup):
    """A group of one worker whose answers are there already, or never come."""

    def __init__(self, role: str, answers: dict[str, object]) -> None:
        self.role, self.timeout, self.workers = role, 60.0, [None]
        self.answers, self.asked = answers, []

    def one(self, rank: int, method: str, *arguments: object) -> ray.ObjectRef:
        self.asked.append((method, *arguments))
        answer = self.answers.get(method)
        return answer if isinstance(answer, ray.ObjectRef) else ray.put(answer)

    def all(self, method: str, *arguments: object) -> list[ray.ObjectRef]:
        return [self.one(0, method, *arguments)]


@pytest.fixture
def never() -> Iterator[ray.ObjectRef]:
    """What a worker that hangs returns."""
    reference = ray.remote(num_cpus=1000)(lambda: None).remote()
    yield reference
    ray.cancel(reference)


def broadcast_to(answers: dict[str, object]) -> tuple[list[tuple], list[tuple], list[str]]:
    """What the policy and one sampler are asked when version 0 is broadcast, and what is said."""
    published = Timed(Published(0, []), 0.0)
    policy = Answers("policy", {"open_transport": (("127.0.0.1", 0), []), "publish": published})
    rollout, said = Answers("rollout", answers), []
    delivery = Delivery(policy, rollout, said.append)
    delivery.backend = "gloo"
    delivery.publish(0)
    return policy.asked, rollout.asked, said


def test_who_does_not_come_to_the_broadcast_costs_a_sentence_and_not_the_run(never, monkeypatch):
    ended = give_up_soon(monkeypatch)
    policy, rollout, said = broadcast_to({"join_transport": never})
    assert policy[-1] == ("publish", 0, False), "through the object store"
    assert rollout[-1][0] == "join_transport", "nobody was told to listen"
    assert said == [
        "no process group for the broadcast of weights (rollout worker 0 does not answer and is ended); this version "
        "takes the object store"
    ]
    assert len(ended) == 1, "who waits for its answers need not wait for --timeout"


def give_up_soon(monkeypatch) -> list[object]:
    """Long before --timeout; who is ended."""
    ended: list[object] = []
    monkeypatch.setattr("minigpt.rl.transport.LIMIT_S", 0.1)
    monkeypatch.setattr("minigpt.rl.delivery.GRACE_S", 0.1)
    monkeypatch.setattr(ray, "kill", ended.append)
    return ended


def test_who_hangs_under_the_broadcast_is_ended_and_the_run_goes_on(never, monkeypatch):
    ended = give_up_soon(monkeypatch)
    policy, _, said = broadcast_to({"receive": never})
    assert policy[-1] == ("publish", 0, True)
    assert said == [
        "rollout worker 0 did not receive version 0 (it did not answer within 0.2 s and is ended); who replaces it "
        "takes the object store"
    ]
    assert len(ended) == 1
