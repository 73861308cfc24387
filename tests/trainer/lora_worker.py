"""Trains an adapter on fixed rows at several ZeRO stages, interrupts it once, and stores what there is to compare.

    python lora_worker.py OUT CASE …            with CASE = STAGE:DTYPE:MICRO_BATCH

Rows, model and global batch are those of `distributed_worker.py`. OUT/CASE_rankR.pt holds losses, gradient norms, the
weights at the end, those of a second engine that went on from a checkpoint of step 2, and what that checkpoint held.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from distributed_worker import CONFIGS, make_model, windows

from minigpt.model.model_lora import apply_lora, lora_layers
from minigpt.trainer.engine import Engine, Processes, init_processes
from minigpt.trainer.loop import to_tensors
from minigpt.trainer.stage import StageModule, language_model_loss

RANK, INTERRUPTED_AT = 3, 2


def make_adapted_model() -> torch.nn.Module:
    """The model with an adapter whose B is not zero, so that A has a gradient at once."""
    model = apply_lora(make_model(), rank=RANK, dora=True)
    generator = torch.Generator().manual_seed(7)
    for layer in lora_layers(model).values():
        layer.B.data.normal_(std=0.05, generator=generator)
    return model


def make_engine(processes: Processes, stage: int, dtype: str) -> Engine:
    return Engine(
        StageModule(make_adapted_model(), language_model_loss),
        processes,
        dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
        learning_rate=1e-2,
        optimizer_name="adamw",
        weight_decay=0.0,
        grad_clip=0.0,
        config=CONFIGS / f"zero{stage}.json",
    )


def train(engine: Engine, batches: list[list[dict[str, Any]]]) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a step for each window."""
    losses, norms = [], []
    for window in batches:
        (weight,) = engine.processes.sum([sum(float(batch["weights"].sum()) for batch in window)])
        total = sum(float(engine.forward_backward(to_tensors(b, engine.device), 1.0 / weight)) for b in window)
        norms.append(engine.step(1e-2).grad_norm)
        losses.append(engine.processes.sum([total])[0] / weight)
    return losses, norms


def run_case(processes: Processes, stage: int, dtype: str, micro_batch: int, scratch: Path) -> dict[str, Any]:
    """Train one case; see the module's docstring for what is returned."""
    batches = windows(processes, micro_batch)
    engine = make_engine(processes, stage, dtype)
    result: dict[str, Any] = {"initial": engine.master_weights(), "frozen_hash": engine.frozen_hash}
    before = train(engine, batches[:INTERRUPTED_AT])
    if processes.rank == 0:
        scratch.mkdir()
    engine.processes.barrier()
    engine.save_state(scratch)
    engine.processes.barrier()
    after = train(engine, batches[INTERRUPTED_AT:])
    result |= {"losses": before[0] + after[0], "norms": before[1] + after[1], "final": engine.master_weights()}
    engine.close()

    again = make_engine(processes, stage, dtype)
    again.load_state(scratch, processes.world_size)
    result["losses_after_resume"] = train(again, batches[INTERRUPTED_AT:])[0]
    result["final_after_resume"] = again.master_weights()
    again.close()
    result["checkpoint_bytes"] = sum(path.stat().st_size for path in scratch.rglob("*.pt"))
    result["checkpoint_tensors"] = tensor_sizes(scratch)
    return result


def tensor_sizes(folder: Path) -> dict[str, int]:
    """Elements of every named tensor that stands in the model states of a checkpoint."""
    from minigpt.trainer.engine import _load_safely

    found: dict[str, int] = {}
    for path in folder.rglob("*model_states.pt"):
        found |= {name: tensor.numel() for name, tensor in _load_safely(path, "cpu")["module"].items()}
    return found


def main() -> None:
    out = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    torch.set_num_threads(1)
    processes = init_processes()
    for case in [argument for argument in sys.argv[2:] if ":" in argument]:
        stage, dtype, micro_batch = case.split(":")
        name = case.replace(":", "_")
        result = run_case(processes, int(stage), dtype, int(micro_batch), out / f"{name}_checkpoint")
        torch.save(result, out / f"{name}_rank{processes.rank}.pt")


if __name__ == "__main__":
    main()
