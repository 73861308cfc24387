"""Two nodes, of which one is lost after its worker is done and before its answers are fetched: they lie in the node's
memory, not with the driver, and a call that has succeeded has no result."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import remove_placement_group
from tiny_rl import arrays_of, make_job, make_request, write_run

from minigpt.rl import cluster
from minigpt.rl.group import WorkerDied, WorkerGroup, place
from minigpt.rl.layout import Role, bundles, laptop
from minigpt.rl.roles import Roles
from minigpt.rl.workers import Job

pytestmark = pytest.mark.slow

IN_A_STORE = 100_000  # bytes: smaller results come with the answer to the call


@pytest.fixture
def nodes(monkeypatch) -> Iterator[Cluster]:
    """A head with two CPUs, which this process is a driver of, and `add_node` for more."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    cluster.use_token()
    impatient = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 2}
    head = {"num_cpus": 2, "object_store_memory": 100_000_000, "_system_config": impatient}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.connect(made.address)
        yield made
    finally:
        cluster.disconnect()
        made.shutdown()


def add_node(nodes: Cluster) -> object:
    return nodes.add_node(num_cpus=1, object_store_memory=100_000_000)


def done_but_not_fetched(reference: ray.ObjectRef) -> None:
    (ready, _) = ray.wait([reference], timeout=60, fetch_local=False)
    assert ready


def job_of_two_nodes(folder: Path, head: str, other: str, **options: Any) -> Job:
    """The role `head` fits nowhere but on the head; `other` takes a node with one CPU."""
    layout = folder / "layout.yaml"
    layout.write_text(f"{head}: {{cpus: 2, threads: 1}}\n{other}: {{cpus: 1, threads: 1}}\n")
    return make_job(write_run(folder / "sft", sharpness=5.0), layout=str(layout), **options)


def giving() -> type:
    """A class that Ray sends along."""

    class Giving:
        def __init__(self, *_: object) -> None: ...

        def give(self) -> np.ndarray:
            return np.ones(IN_A_STORE)

    return Giving


def test_a_result_that_is_lost_with_its_node_is_the_death_of_its_worker(nodes):
    second = add_node(nodes)
    layout = {**laptop(), "policy": Role(cpus=2), "rollout": Role(cpus=1)}
    needed = bundles(layout, ["policy", "rollout"])
    placement = place(needed, 60)  # the policy's bundle takes the head
    group = WorkerGroup(giving(), "rollout", layout, needed, placement, (), 60.0)
    try:
        reference = group.one(0, "give")
        done_but_not_fetched(reference)
        nodes.remove_node(second, allow_graceful=False)
        with pytest.raises(WorkerDied, match="rollout worker 0 died"):
            group.result(reference, 0, "give")
    finally:
        group.kill()
        remove_placement_group(placement)


def test_a_sampler_whose_node_is_lost_with_its_answers_is_replaced_on_another_one(nodes, tmp_path):
    second, said = add_node(nodes), []
    sizes = {"prompts_per_step": 32, "samples_per_prompt": 8, "max_new_tokens": 64}
    job = job_of_two_nodes(tmp_path, "policy", "rollout", row_length=128, **sizes)
    request = make_request(prompts=32, samples=8, max_new_tokens=64)
    roles = Roles(replace(job, longest=128), said.append)
    try:
        roles.setup()
        roles.publish(0)
        expected = roles.collect(roles.sample(request))
        assert sum(array.nbytes for array in arrays_of(expected).values()) > IN_A_STORE
        under_way = roles.sample(request)
        done_but_not_fetched(under_way.asked[0].generating)
        nodes.remove_node(second, allow_graceful=False)
        add_node(nodes)
        found = roles.collect(under_way)
        assert sum("a new one answers the same prompts" in sentence for sentence in said) == 1
        assert all(np.array_equal(array, arrays_of(expected)[name]) for name, array in arrays_of(found).items())
    finally:
        roles.close()


def test_a_policy_whose_node_is_lost_with_its_weights_costs_no_sampler(nodes, tmp_path):
    """They cannot load what died with its owner, which is not their fault: the trainers' group starts again."""
    second, said = add_node(nodes), []
    roles = Roles(job_of_two_nodes(tmp_path, "rollout", "policy"), said.append)
    try:
        roles.setup()
        roles.publish(0)
        samplers = list(roles.groups["rollout"].workers)
        nodes.remove_node(second, allow_graceful=False)
        with pytest.raises(WorkerDied, match="the weights that it had published are gone") as death:
            roles.collect(roles.sample(make_request()))
        assert (death.value.role, death.value.rank) == ("policy", 0)
        assert roles.groups["rollout"].workers == samplers
        assert not said
        roles.groups["rollout"].wait(roles.groups["rollout"].all("ping"), "live")
    finally:
        roles.close()
