"""What is otherwise on GPUs: NCCL between policy and samplers, roles that leave their GPU to each other, the recipes.

Every test runs on CPUs as well, by the same lines, so that it has been tried out where there is no GPU.
"""

import json
import multiprocessing
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import tiny_rewards
import torch
from broadcast_member import LIMIT_S, take_part
from tiny_rl import (
    arrays_of,
    bytes_held,
    fingerprint,
    make_job,
    make_policy,
    make_request,
    metrics_of,
    pack_prompts,
    run_here,
    sample,
    with_columns,
    write_run,
)
from whole_runs import runs_without_actors

from minigpt.rl import cluster
from minigpt.rl.batch import RolloutBatch
from minigpt.rl.publish import unpack
from minigpt.rl.roles import CLASSES, Roles
from minigpt.rl.workers import PolicyWorker, RolloutWorker
from minigpt.trainer.setup import load_masters
from minigpt.trainer.sleep import tensors_within

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = REPOSITORY / "minigpt" / "rl" / "recipes"
CPU = pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="workers take a GPU if there is"))
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# Heads of 64, the size that kernels are made for
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 256,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A random model in `sft`, and prompts packed for it."""
    root = tmp_path_factory.mktemp("world")
    write_run(root / "sft", sharpness=3.0, shape=SHAPE)
    pack_prompts(root)
    return root


def need_gpus(device: str, count: int) -> None:
    if device == "cuda" and torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, since NCCL refuses two members on one; here is {torch.cuda.device_count()}")


# ------------------------------------------------------------- whole runs, first since they start a Ray of their own

TINY_STEPS = [
    *("--max_steps=2", "--prompts_per_step=4", "--samples_per_prompt=4", "--max_new_tokens=12", "--overlong_buffer=4"),
    *("--eval_prompts=4", "--dtype=bf16", "--tensorboard=false", f"--reward={Path(tiny_rewards.__file__)}:letters"),
]
MODELS = {"grpo": {"update_policy", "reference_log_probs"}, "ppo": {"update_policy", "values", "update_critic"}}
ON_CPUS = ["--layout=laptop", "--sleep=true", "--threads=1", "--compile=false"]


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize(("stage", "options"), [("grpo", []), ("ppo", ["--critic_warmup=1"])], ids=["grpo", "ppo"])
def test_two_steps_of_the_recipe_for_one_gpu_in_which_all_roles_take_turns(world, tmp_path, device, stage, options):
    places = [f"--data={world / 'prompts'}", f"--init={world / 'sft'}", f"--save_dir={tmp_path / stage}"]
    recipe = ["--config", str(RECIPES / f"{stage}_1gpu.yaml")]
    with runs_without_actors() if device == "cpu" else nullcontext():
        status = run_here(
            "train", stage, *recipe, *places, *TINY_STEPS, *options, *(ON_CPUS if device == "cpu" else [])
        )
    assert status == 0
    lines = metrics_of(tmp_path / stage)
    assert [line["step"] for line in lines] == [1, 2]
    last = lines[-1]
    assert last["seconds_turns"] > 0, "whoever did not work slept"
    assert all(last[f"seconds_{phase}"] > 0 for phase in {"generate", "publish", *MODELS[stage]})
    assert last["grad_norm"] > 0
    assert last["version_lag"] == 0
    assert last["sampler_gap_max"] < 0.3, "rounding in bf16; other weights or tokens would be nats apart"
    assert json.loads((tmp_path / stage / "summary.json").read_text())["steps"] == 2
    assert run_here("generate", str(tmp_path / stage), "--prompt=abc", "--max_new_tokens=4") == 0


# ------------------------------------------------------------------------------------------------------- the broadcast


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


@pytest.mark.parametrize(
    ("device", "size"),
    [pytest.param(*CPU.values, 2, marks=CPU.marks), *(pytest.param("cuda", n, marks=CUDA.marks) for n in (1, 2))],
)
def test_a_group_that_broke_off_is_made_again_by_the_same_processes(device, size):
    need_gpus(device, size)
    spawn, ports = multiprocessing.get_context("spawn"), free_ports(2)
    shared = (size, spawn.Barrier(size))
    members = [spawn.Process(target=take_part, args=(BACKENDS[device], ports, rank, *shared)) for rank in range(size)]
    try:
        for process in members:
            process.start()
        for process in members:
            process.join(3 * LIMIT_S)
        assert [process.exitcode for process in members] == [0] * size
    finally:
        for process in members:
            process.kill()


@pytest.fixture(scope="module")
def our_ray():
    cluster.connect(num_cpus=None if torch.cuda.is_available() else 2)  # as many as GPUs need
    yield
    cluster.disconnect()


def showing() -> type:
    """A class that Ray sends along, since it is in a function: actors cannot import this module."""

    class ShowingSampler(RolloutWorker):
        def weights(self) -> dict[str, np.ndarray]:
            return {name: p.cpu().numpy() for name, p in self.engine.model.named_parameters()}

    return ShowingSampler


@pytest.mark.parametrize(
    ("device", "options"),
    [
        pytest.param("cpu", {"layout": "laptop", "weight_transport": "broadcast"}, marks=CPU.marks),
        pytest.param("cuda", {"layout": "split", "weight_transport": "auto"}, marks=CUDA.marks),
    ],
    ids=["cpu", "cuda"],
)
def test_policy_and_samplers_on_gpus_of_their_own_broadcast(our_ray, world, monkeypatch, device, options):
    """Nothing goes through the object store, and what arrives are the bits of each version."""
    need_gpus(device, 2)
    monkeypatch.setitem(CLASSES, "rollout", showing())
    roles = Roles(make_job(world / "sft", **options), pytest.fail)
    try:
        assert roles.setup()["policy"]["device"].startswith(device)
        assert roles.delivery.backend == BACKENDS[device]
        policy, samplers = roles.groups["policy"], roles.groups["rollout"]
        expected = dict(load_masters(world / "sft").named_parameters())
        for version in (0, 1):
            roles.publish(version)
            assert not roles.delivery.for_worker(0, version).in_store
            for held in samplers.wait(samplers.all("weights"), "show"):
                assert all(np.array_equal(array, expected[name].detach()) for name, array in held.items())
            batch = roles.collect(roles.sample(make_request(version=version)))
            advantages = np.resize([1.0, -1.0], len(batch))
            roles.update_policy(with_columns(batch, advantages=advantages), 1e-3, 0.0)
            (learned,) = policy.wait([policy.one(0, "publish", version + 1)], "publish")
            before, expected = expected, dict(unpack(learned.value, ray.get))
            assert not all(torch.equal(tensor, before[name]) for name, tensor in expected.items())
    finally:
        roles.close()


# --------------------------------------------------------------------------------------------------- sleeping, waking


@pytest.fixture(scope="module")
def batch(our_ray, world) -> RolloutBatch:
    drawn = sample(make_policy(make_job(world / "sft", dtype="bf16")))
    return with_columns(drawn, advantages=np.resize([1.0, -1.0], len(drawn)))


def state_of(policy: PolicyWorker) -> list[str]:
    """Hashes of all weights, masters and moments, wherever DeepSpeed has them."""
    engine: Any = policy.engine
    tensors = tensors_within([engine._optimizer, *engine.module.parameters()])
    # copies, since torch never frees the memory of a tensor that NumPy has seen
    copies = [tensor.detach().to("cpu", copy=True).flatten() for tensor in tensors if not tensor.is_meta]
    return fingerprint([copy.view(torch.uint8).numpy() for copy in copies])


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_policy_leaves_its_device_and_comes_back_with_every_bit(batch, world, tmp_path, stage, device):
    """A bfloat16 weight, its float32 master and AdamW's two moments are 14 bytes."""
    config = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}.json").read_text())
    config["zero_optimization"]["reduce_bucket_size"] = 10_000  # else buffers are larger than such a small model
    (tmp_path / "zero.json").write_text(json.dumps(config))
    policy = make_policy(make_job(world / "sft", dtype="bf16", deepspeed=tmp_path / "zero.json"))
    assert policy.device.type == device
    policy.update(batch, 1e-3, 0.0)
    judged, state = policy.log_probs(batch).value, state_of(policy)
    awake = bytes_held(policy.engine._sleeper)
    policy.sleep()
    asleep = bytes_held(policy.engine._sleeper)
    policy.wake()
    assert awake - asleep >= 14 * policy.parameters
    assert bytes_held(policy.engine._sleeper) - asleep >= 14 * policy.parameters
    assert state_of(policy) == state
    assert np.array_equal(policy.log_probs(batch).value, judged)
    assert policy.update(batch, 1e-3, 0.0).value["grad_norm"] > 0


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_sampler_leaves_its_device_and_answers_the_same_afterwards(our_ray, world, device):
    job = make_job(world / "sft", dtype="bf16")
    sampler = RolloutWorker(0, 1, 1, job)
    sampler.setup()
    sampler.load(make_policy(job).publish(0).value)
    sampler.generate(make_request())  # the cache grows, and products of other shapes may round otherwise
    expected = arrays_of(sampler.generate(make_request()).value)
    # on a CPU the weights' memory is the object store's
    weights = sum(p.numel() * p.element_size() for p in sampler.network.parameters()) if device == "cuda" else 0
    awake = bytes_held(sampler._sleeper)
    sampler.sleep()
    asleep = bytes_held(sampler._sleeper)
    sampler.wake()
    assert awake - asleep >= weights + sampler.engine._cache.kv.nbytes
    found = arrays_of(sampler.generate(make_request()).value)
    assert all(np.array_equal(array, found[name]) for name, array in expected.items())
