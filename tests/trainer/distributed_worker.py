"""Trains a small model on fixed rows for a few steps, under any launcher, and stores what there is to compare.

    python distributed_worker.py OUT CASE …            with CASE = STAGE:DTYPE:MICRO_BATCH[:nan][:muon]

Every case is trained from the same weights on the same rows; rank r of n takes the r-th slice of each global batch.
OUT/CASE_rankR.pt holds the losses, gradient norms, first gradients (of AdamW), weights before and after.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigpt.dataset.shards import BatchIterator, Row
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.trainer.engine import Engine, Processes, init_processes
from minigpt.trainer.loop import to_tensors
from minigpt.trainer.stage import StageModule, language_model_loss

VOCABULARY, ROW_TOKENS, GLOBAL_BATCH, STEPS, NAN_STEP = 97, 24, 8, 4, 2
BETA1 = 0.9
CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


class FixedRows:
    """Packed rows with two documents each. The second half of the first global batch has no loss weight at all, so
    that with two processes one of them has nothing to learn from in that step."""

    def __len__(self) -> int:
        return GLOBAL_BATCH * STEPS

    def row(self, index: int) -> Row:
        rng = np.random.default_rng(index)
        cut = int(rng.integers(3, ROW_TOKENS - 3))
        codes = rng.integers(0, 3, ROW_TOKENS).astype(np.uint8)
        if index in _rows_without_weight():
            codes[:] = 0
        return Row(
            rng.integers(0, VOCABULARY, ROW_TOKENS).astype(np.uint16),
            np.array([cut, ROW_TOKENS - cut], dtype=np.int32),
            codes,
            np.array([0.0, 1.0, 10.0], dtype=np.float32),
        )


def _rows_without_weight() -> set[int]:
    from minigpt.dataset.shards import GlobalOrder

    order = GlobalOrder(GLOBAL_BATCH * STEPS)
    return {order.index(i) for i in range(GLOBAL_BATCH // 2, GLOBAL_BATCH)}


def make_model() -> MiniGPT:
    torch.manual_seed(0)
    return MiniGPT(
        MiniGPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
        )
    )


def windows(processes: Processes, micro_batch: int) -> list[list[dict[str, np.ndarray]]]:
    """The micro-batches of this rank, a list a step."""
    source = BatchIterator(
        FixedRows(),
        micro_batch_size=micro_batch,
        global_batch_size=GLOBAL_BATCH,
        rank=processes.rank,
        world_size=processes.world_size,
        epochs=1,
    )
    batches = list(source)
    n = source.micro_batches_per_step
    return [batches[i : i + n] for i in range(0, len(batches), n)]


def run_case(
    processes: Processes, stage: int, dtype: str, micro_batch: int, with_nan: bool, muon: bool
) -> dict[str, Any]:
    """Train one case; see the module's docstring for what is returned."""
    engine = Engine(
        StageModule(make_model(), language_model_loss),
        processes,
        dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
        learning_rate=1e-2,
        optimizer_name="muon" if muon else "adamw",
        betas=(BETA1, 0.95),
        weight_decay=0.0,
        grad_clip=0.0,
        config=CONFIGS / f"zero{stage}.json",
    )
    result: dict[str, Any] = {"losses": [], "norms": [], "applied": [], "weights": [full_weights(engine)]}
    for number, window in enumerate(windows(processes, micro_batch)):
        weight = sum(float(batch["weights"].sum()) for batch in window)
        (weight,) = engine.processes.sum([weight])
        loss_sum = 0.0
        for batch in window:
            if with_nan and number == NAN_STEP and processes.rank == processes.world_size - 1:
                batch["weights"][0, 0] = np.inf
                batch["labels"][0, 0] = 1
            loss_sum += float(engine.forward_backward(to_tensors(batch, processes.device), 1.0 / weight))
        step = engine.step(1e-2)
        (loss_sum,) = engine.processes.sum([loss_sum])
        result["losses"].append(loss_sum / weight)
        result["norms"].append(step.grad_norm)
        result["applied"].append(step.applied)
        result["weights"].append(full_weights(engine))
        if number == 0 and not muon:
            result["gradients"] = first_gradients(engine)
    engine.close()
    return result


def full_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The float32 weights as this rank sees them (`master_weights` keeps them on rank 0 only)."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = {}
    for name, parameter in engine.module.named_parameters():
        master = parameter.detach() if engine.zero_stage == 0 else safe_get_full_fp32_param(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        full[name.removeprefix("model.")] = master.float().view(shape).clone()
    return full


def first_gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """The gradients of the first step, read off AdamW's first moment, which is then (1 - beta1) · gradient."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.zero_stage in (1, 2):
        # DeepSpeed links parameters to their moments when the first parameter group was stepped; the second is missing.
        engine._optimizer._hp_optimizer_states_linked = False
        engine._optimizer._lazy_init_hp_params_optimizer_state()
    gradients = {}
    for name, parameter in engine.module.named_parameters():
        if engine.zero_stage == 0:
            moment = engine._optimizer.state[parameter]["exp_avg"]
        else:
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        shape = getattr(parameter, "ds_shape", parameter.shape)
        gradients[name.removeprefix("model.")] = moment.view(shape).clone() / (1 - BETA1)
    return gradients


def main() -> None:
    out = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    cases = [a for a in sys.argv[1:] if ":" in a]
    torch.set_num_threads(1)
    processes = init_processes()
    for case in cases:
        stage, dtype, micro_batch, *more = case.split(":")
        result = run_case(processes, int(stage), dtype, int(micro_batch), "nan" in more, "muon" in more)
        torch.save(result, out / f"{case.replace(':', '_')}_rank{processes.rank}.pt")


if __name__ == "__main__":
    main()
