"""Workers that die or hang, as the controller sees them: what it says of them, who waits for whom, who is replaced."""

import os
import signal
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from tiny_rl import arrays_of, make_job, make_request, wait_until, write_run

from minigpt.rl import cluster
from minigpt.rl.batch import RolloutBatch
from minigpt.rl.group import WorkerDied, WorkerGroup, _last_words
from minigpt.rl.roles import Roles

pytestmark = pytest.mark.slow

EXIT = "The actor is dead because its worker process has died. Worker exit type: "
DEATHS = {
    "out of memory": (
        EXIT + "NODE_OUT_OF_MEMORY Worker exit detail: Task was killed due to the node running low on memory.\nMemory",
        "NODE_OUT_OF_MEMORY Worker exit detail: Task was killed due to the node running low on memory.",
    ),
    "killed": (
        EXIT + "SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2.",
        "SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2.",
    ),
    "its node": ("The actor died because its node has died. Node Id: 12\n\tthe node was terminated", "Node Id: 12"),
}


@pytest.mark.parametrize(("told", "cause"), DEATHS.values(), ids=DEATHS)
def test_of_a_death_the_cause_is_told(told, cause):
    context = ActorDiedErrorContext(
        class_name="RolloutWorker", actor_id=bytes(16), pid=7, node_ip_address="10.0.0.1", error_message=told
    )
    assert _last_words(ActorDiedError(context)).endswith(cause)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("ValueError: no threads", "ValueError: no threads"),
        (
            "torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported.\n"
            "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n",
            "torch.AcceleratorError: CUDA error: out of memory",
        ),
        ("SystemExit: 3", "SystemExit: 3"),
    ],
)
def test_of_a_worker_that_cannot_start_the_error_is_told(error, told):
    trace = f'Traceback (most recent call last):\n  File "base.py", line 1, in __init__\n{error}'
    cause = RayTaskError("RolloutWorker.__init__", trace, ValueError(), "ray::RolloutWorker", 7, "10.0.0.1")
    assert _last_words(ActorDiedError(cause)) == told


def test_a_worker_that_ray_ends_for_want_of_memory_has_died(monkeypatch):
    told = "1 worker(s) were killed due to the node running low on memory. Memory on the node was 23.1GB used"
    group = object.__new__(WorkerGroup)
    group.role, group.timeout = "rollout", 1.0
    monkeypatch.setattr(ray, "get", Mock(side_effect=OutOfMemoryError(f"{told}\nOOM kill reason: 98.1%")))
    with pytest.raises(WorkerDied) as death:
        group.result(Mock(), 1, "answer")
    assert (death.value.rank, str(death.value)) == (1, f"rollout worker 1 died: {told}")


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def roles(tmp_path_factory, said) -> Iterator[Roles]:
    """A policy and two samplers that take turns."""
    folder = tmp_path_factory.mktemp("rl")
    layout = folder / "layout.yaml"
    layout.write_text("policy: {threads: 1}\nrollout: {workers: 2, threads: 1}\n")
    cluster.connect(num_cpus=2)
    roles = Roles(make_job(write_run(folder / "sft", sharpness=5.0), layout=str(layout), sleep=True), said.append)
    try:
        roles.setup()
        roles.publish(0)
        yield roles
    finally:
        roles.close()
        cluster.disconnect()


@pytest.fixture(scope="module")
def answers(roles) -> RolloutBatch:
    return roles.collect(roles.sample(make_request()))


def stop(sampler: Any) -> int:
    """Let a sampler hang; its process."""
    pid = ray.get(sampler.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
    os.kill(pid, signal.SIGSTOP)
    return pid


def assert_same(found: RolloutBatch, expected: RolloutBatch) -> None:
    assert all(np.array_equal(array, arrays_of(expected)[name]) for name, array in arrays_of(found).items())


def test_a_sampler_that_hangs_is_ended_and_another_one_answers_the_same(roles, answers, said, monkeypatch):
    """Its time is short, but not that of those who work: the other one is waited for before, the new one has longer."""
    samplers = roles.groups["rollout"]
    restart, patient = samplers.restart, samplers.timeout

    def restart_with_patience(rank: int) -> None:
        samplers.timeout = patient
        restart(rank)

    monkeypatch.setattr(samplers, "restart", restart_with_patience)
    said.clear()
    hung = stop(samplers.workers[1])
    under_way = roles.sample(make_request())
    samplers.result(under_way.asked[0].generating, 0, "answer")
    monkeypatch.setattr(samplers, "timeout", 2.0)
    assert_same(roles.collect(under_way), answers)
    why = "rollout worker 1 did not finish to load weights within 2 s (if it is only slow, raise --timeout)"
    assert said == [f"{why}; a new one answers the same prompts"]
    assert wait_until(lambda: not psutil.pid_exists(hung)), "it would hold its part of a GPU"


def test_the_policy_waits_for_every_sampler_that_makes_room_for_it(roles, answers, said, monkeypatch):
    """One is dead, the other one hangs. Whoever sleeps or is ended holds no memory."""
    samplers = roles.groups["rollout"]
    said.clear()
    hung = [stop(worker) for worker in samplers.workers]
    under_way = roles.sample(make_request())
    ray.kill(samplers.workers[0])
    with pytest.raises(WorkerDied):
        samplers.result(under_way.asked[0].generating, 0, "answer")
    with monkeypatch.context() as patch:
        patch.setattr(samplers, "timeout", 2.0)
        roles.log_probs(answers)
    why = "rollout worker 1 did not finish to sleep within 2 s (if it is only slow, raise --timeout)"
    assert said == [f"{why}; it is ended"]
    assert not any(map(psutil.pid_exists, hung))
    assert_same(roles.collect(under_way), answers)
    assert sum("died: The actor is dead because it was killed" in sentence for sentence in said) == 2
