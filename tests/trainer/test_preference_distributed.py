"""DPO and the reward model at every ZeRO stage, world size and number of rows a pass: the same loss and gradient."""

from typing import Any

import numpy as np
import pytest
import torch
from preference_worker import PAIRS_PER_STEP, FixedPairs, make_network, make_stage
from test_distributed import WORKER, launch

from minigpt.dataset.preference import pair_window
from minigpt.dataset.shards import GlobalOrder
from minigpt.trainer.loop import to_tensors

pytestmark = pytest.mark.slow

CASES = [f"{name}:{stage}:{rows}" for name in ("dpo", "reward") for stage, rows in ((0, 12), (1, 2), (2, 5), (3, 2))]

Results = dict[tuple[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """What every case came to, by (case, world size); one entry a rank. 12 rows hold a whole step: with two processes
    the second has nothing to do."""
    found: Results = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world_size}")
        launch(world_size, str(WORKER.with_name("preference_worker.py")), str(folder), *CASES)
        for case in CASES:
            name = case.replace(":", "_")
            found[case, world_size] = [
                torch.load(folder / f"{name}_rank{rank}.pt", weights_only=True) for rank in range(world_size)
            ]
    return found


@pytest.fixture(scope="module", params=["dpo", "reward"])
def reference(request) -> tuple[str, list[float], dict[str, torch.Tensor]]:
    """Loss and metrics of the first step, and its gradients, by plain autograd in float64 over all pairs at once."""
    stage = make_stage(request.param)
    network = make_network(stage).double()
    order, data = GlobalOrder(len(FixedPairs())), FixedPairs()
    pairs = order.indices(np.arange(PAIRS_PER_STEP))
    (batch,) = pair_window(data, pairs, rows=12, slots=PAIRS_PER_STEP)
    tensors = to_tensors(stage.prepared(batch, data), torch.device("cpu"))
    loss, sums = stage.loss(network, **tensors)
    (loss / PAIRS_PER_STEP).backward()
    values = [value / PAIRS_PER_STEP for value in (loss.item(), *sums.tolist())]
    return request.param, values, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("zero_stage", range(4))
def test_loss_metrics_and_gradients_equal_plain_autograd_on_the_whole_step(results, reference, zero_stage, world_size):
    name, values, gradients = reference
    (case,) = (case for case in CASES if case.startswith(f"{name}:{zero_stage}:"))
    for rank in results[case, world_size]:
        assert rank["sums"][0] == pytest.approx(values, rel=1e-6, abs=1e-6)
        assert rank["gradients"].keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            error = (rank["gradients"][parameter].double() - gradient).norm() / gradient.norm()
            assert error <= 1e-5, parameter


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_later_steps_too_and_all_ranks_hold_the_same_weights(results, case, world_size):
    first = next(other for other in CASES if other.split(":")[0] == case.split(":")[0])
    expected = results[first, 1][0]
    for rank in results[case, world_size]:
        np.testing.assert_allclose(rank["sums"], expected["sums"], rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(rank["norms"], expected["norms"], rtol=2e-4)
        for name, weight in results[case, world_size][0]["weights"].items():
            assert torch.equal(weight, rank["weights"][name]), name
    assert expected["sums"][0][0] != pytest.approx(expected["sums"][2][0], rel=1e-3), "weights moved"
