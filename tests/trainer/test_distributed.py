"""The same training at every ZeRO stage, world size and micro-batch; ranks agree; a NaN anywhere is skipped everywhere.

Two real processes under the `deepspeed` launcher (gloo), for a few cases four, one without any launcher, and as the
independent yardstick plain PyTorch autograd on the whole global batch in float64.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_worker import GLOBAL_BATCH, NAN_STEP, STEPS, FixedRows, make_model

from minigpt.dataset.shards import GlobalOrder, collate

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("distributed_worker.py")
FP32 = [f"{stage}:fp32:{micro}" for stage in range(4) for micro in (1, 4)]
BF16 = [f"{stage}:bf16:{micro}" for stage in (1, 2, 3) for micro in (2,)]
WITH_NAN = ["0:fp32:4:nan", "1:bf16:4:nan", "2:bf16:4:nan", "3:bf16:4:nan"]
MUON = ["0:fp32:2:muon", "1:fp32:2:muon", "2:fp32:4:muon"]
MUON_WITH_NAN = ["0:fp32:4:nan:muon", "1:bf16:4:nan:muon", "2:bf16:4:nan:muon"]
CASES = [*FP32, *BF16, *WITH_NAN, *MUON, *MUON_WITH_NAN]
CASES_OF_FOUR = ["1:fp32:1", "2:fp32:1", "3:fp32:1", "1:bf16:2", "1:fp32:2:muon"]


def with_world_size(cases: list[str]) -> pytest.MarkDecorator:
    """Every case at world size 1 and 2, and where it is one of the few also at 4."""
    sizes = [(case, size) for case in cases for size in (1, 2, *(4,) * (case in CASES_OF_FOUR))]
    return pytest.mark.parametrize(("case", "world_size"), sizes)


Results = dict[tuple[str, int], list[dict[str, Any]]]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(world_size: int, *arguments: str) -> None:
    """Run a script in `world_size` processes; its output is in the error when it fails."""
    launcher = [sys.executable]
    if world_size > 1:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        launcher = [str(deepspeed), "--num_accelerators", str(world_size), "--master_port", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, timeout=500)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """What every case came to, by (case, world size); one entry a rank."""
    found: Results = {}
    for world_size, cases in ((1, CASES), (2, CASES), (4, CASES_OF_FOUR)):
        folder = tmp_path_factory.mktemp(f"world{world_size}")
        launch(world_size, str(WORKER), str(folder), *cases)
        for case in cases:
            name = case.replace(":", "_")
            found[case, world_size] = [
                torch.load(folder / f"{name}_rank{rank}.pt", weights_only=True) for rank in range(world_size)
            ]
    return found


@pytest.fixture(scope="module")
def reference() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first global batch by plain autograd in float64."""
    model = make_model().double()
    rows, order = FixedRows(), GlobalOrder(GLOBAL_BATCH * STEPS)
    batch = {
        k: torch.from_numpy(v) for k, v in collate([rows.row(order.index(i)) for i in range(GLOBAL_BATCH)]).items()
    }
    logits = model(batch["input_ids"], batch["position_ids"], batch["document_ids"]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    weights = batch["weights"].flatten().double()
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@with_world_size(FP32)
def test_loss_and_gradients_equal_plain_autograd_on_the_whole_batch(results, reference, case, world_size):
    loss, gradients = reference
    for rank in results[case, world_size]:
        assert rank["losses"][0] == pytest.approx(loss, rel=1e-6)
        assert rank["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (rank["gradients"][name].double() - gradient).norm() / gradient.norm()
            assert error <= 1e-5, name


@with_world_size(FP32)
def test_gradient_norm_is_that_of_the_whole_gradient(results, reference, case, world_size):
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in reference[1].values()]))
    for rank in results[case, world_size]:
        assert rank["norms"][0] == pytest.approx(float(norm), rel=1e-5)


@with_world_size(FP32[1:])
def test_float32_losses_do_not_depend_on_stage_world_size_or_micro_batch(results, case, world_size):
    np.testing.assert_allclose(results[case, world_size][0]["losses"], results[FP32[0], 1][0]["losses"], rtol=2e-5)


@with_world_size(MUON)
def test_muon_takes_the_same_steps_however_its_matrices_are_cut(results, case, world_size):
    """At stages 1 and 2 a rank holds a slice of all matrices laid end to end; two matrices here lie across the cut or
    beside it. Stage 0 with one process cuts nothing."""
    found, uncut = results[case, world_size][0], results[MUON[0], 1][0]
    np.testing.assert_allclose(found["losses"], uncut["losses"], rtol=2e-5)
    np.testing.assert_allclose(found["norms"], uncut["norms"], rtol=2e-4)
    for name, weight in uncut["weights"][-1].items():
        assert (found["weights"][-1][name] - weight).abs().median() < 1e-6, name


@with_world_size(BF16)
def test_bf16_stages_follow_the_float32_run(results, case, world_size):
    float32 = np.array(results["1:fp32:4", 1][0]["losses"])
    assert np.abs(np.array(results[case, world_size][0]["losses"]) - float32).max() <= 0.03


@with_world_size(CASES)
def test_masters_start_as_the_unrounded_float32_weights(results, case, world_size):
    for name, parameter in make_model().named_parameters():
        assert torch.equal(results[case, world_size][0]["weights"][0][name], parameter.detach()), name


@pytest.mark.parametrize(
    ("case", "world_size"), [*((case, 2) for case in CASES), *((case, 4) for case in CASES_OF_FOUR)]
)
def test_all_ranks_hold_the_same_weights_after_every_step(results, case, world_size):
    first, *others = results[case, world_size]
    assert len(others) == world_size - 1
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(first["weights"][0][embedding], first["weights"][1][embedding])
    for step in range(STEPS + 1):
        for name, weight in first["weights"][step].items():
            assert all(torch.equal(weight, other["weights"][step][name]) for other in others), (step, name)


@with_world_size([*WITH_NAN, *MUON_WITH_NAN])
def test_an_infinite_loss_on_one_rank_makes_all_ranks_skip_the_step_and_go_on(results, case, world_size):
    for rank in results[case, world_size]:
        assert rank["applied"] == [step != NAN_STEP for step in range(STEPS)]
        for name, before in rank["weights"][NAN_STEP].items():
            assert torch.equal(before, rank["weights"][NAN_STEP + 1][name]), name
        assert all(torch.isfinite(w).all() for w in rank["weights"][-1].values())
        moved = [not torch.equal(w, rank["weights"][NAN_STEP + 1][n]) for n, w in rank["weights"][-1].items()]
        assert all(moved)
