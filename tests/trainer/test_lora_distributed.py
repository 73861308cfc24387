"""The same adapter at every ZeRO stage and world size, the base untouched, and checkpoints without the base."""

from typing import Any

import numpy as np
import pytest
import torch
from distributed_worker import GLOBAL_BATCH, STEPS, FixedRows, make_model
from lora_worker import make_adapted_model
from test_distributed import launch

from minigpt.dataset.shards import GlobalOrder, collate

pytestmark = pytest.mark.slow

FP32 = ["0:fp32:4", "1:fp32:1", "2:fp32:4", "3:fp32:4"]
BF16 = ["1:bf16:4", "3:bf16:4"]
CASES = [*FP32, *BF16]

Results = dict[tuple[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """What every case came to, by (case, world size); one entry a rank."""
    from test_distributed import WORKER

    found: Results = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world_size}")
        launch(world_size, str(WORKER.with_name("lora_worker.py")), str(folder), *CASES)
        for case in CASES:
            name = case.replace(":", "_")
            found[case, world_size] = [
                torch.load(folder / f"{name}_rank{rank}.pt", weights_only=True) for rank in range(world_size)
            ]
    return found


@pytest.fixture(scope="module")
def reference() -> tuple[float, float]:
    """Loss and gradient norm of the first global batch by plain autograd in float64."""
    model = make_adapted_model().double()
    rows, order = FixedRows(), GlobalOrder(GLOBAL_BATCH * STEPS)
    batch = {
        k: torch.from_numpy(v) for k, v in collate([rows.row(order.index(i)) for i in range(GLOBAL_BATCH)]).items()
    }
    logits = model(batch["input_ids"], batch["position_ids"], batch["document_ids"]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    weights = batch["weights"].flatten().double()
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm()
    return loss.item(), norm.item()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", FP32)
def test_loss_and_gradient_norm_equal_plain_autograd_on_the_whole_batch(results, reference, case, world_size):
    for rank in results[case, world_size]:
        assert rank["losses"][0] == pytest.approx(reference[0], rel=1e-6)
        assert rank["norms"][0] == pytest.approx(reference[1], rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", FP32)
def test_float32_losses_do_not_depend_on_stage_world_size_or_micro_batch(results, case, world_size):
    found = results[case, world_size][0]["losses"]
    assert found[-1] != found[0]
    np.testing.assert_allclose(found, results[FP32[0], 1][0]["losses"], rtol=2e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", BF16)
def test_bf16_stages_follow_the_float32_run(results, case, world_size):
    float32 = np.array(results[FP32[0], 1][0]["losses"])
    assert np.abs(np.array(results[case, world_size][0]["losses"]) - float32).max() <= 0.03


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_base_is_bit_equal_before_and_after_in_float32_and_every_adapter_moves(results, case, world_size):
    """Also in bf16 runs, whose compute copy has lost the last 16 bits."""
    first = results[case, world_size][0]
    expected = {name: p.detach() for name, p in make_model().named_parameters()}
    for moment in ("initial", "final", "final_after_resume"):
        found = {name.removeprefix("model."): w for name, w in first[moment].items()}
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), (moment, name)
    adapters = [name for name in first["initial"] if ".lora_" in name]
    assert len(adapters) == 2 * 7 * 3
    for name in adapters:
        assert not torch.equal(first["initial"][name], first["final"][name]), name
        assert first["initial"][name].shape == first["final"][name].shape


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bit_equal_to_the_one_that_was_not_interrupted(results, case, world_size):
    for rank in results[case, world_size]:
        assert rank["losses_after_resume"] == rank["losses"][-len(rank["losses_after_resume"]) :]
        for name, weight in rank["final"].items():
            assert torch.equal(weight, rank["final_after_resume"][name]), name


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_holds_no_frozen_weight_and_names_the_base(results, case, world_size):
    first = results[case, world_size][0]
    assert {
        name for name, elements in first["checkpoint_tensors"].items() if elements and ".lora_" not in name
    } == set()
    assert len({rank["frozen_hash"] for rank in results[case, world_size]}) == 1
    assert len(first["frozen_hash"]) == 64
    assert first["frozen_hash"] == results[FP32[0], 1][0]["frozen_hash"], "the hash is of the float32 weights"
