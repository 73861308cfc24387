"""Trains DPO or a reward model for a few steps on fixed pairs, under any launcher, and stores what there is to compare.

    python preference_worker.py OUT CASE …            with CASE = NAME:STAGE:ROWS, NAME dpo or reward

OUT/CASE_rankR.pt holds the losses (with the sums of the metrics), gradient norms, first gradients and last weights.
The reference of DPO is another model than the one it trains, so that the first gradient says something.
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed_worker import CONFIGS, VOCABULARY, first_gradients, full_weights, make_model

from minigpt.dataset.preference import sequential_pairs
from minigpt.dataset.shards import PreferenceRow
from minigpt.trainer.engine import Engine, Processes, init_processes
from minigpt.trainer.loop import to_tensors
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.preference_stage import PreferenceStage
from minigpt.trainer.stage import StageModule
from minigpt.trainer.train_dpo import DirectPreference, DPOOptions
from minigpt.trainer.train_reward import REWARD

PAIRS_PER_STEP, STEPS = 6, 3


class FixedPairs:
    """18 pairs with prompts and answers of any length."""

    seq_len, split = 32, "train"

    def __len__(self) -> int:
        return PAIRS_PER_STEP * STEPS

    def row(self, index: int) -> PreferenceRow:
        rng = np.random.default_rng(index)
        prompt, *answers = (rng.integers(1, VOCABULARY, rng.integers(1, 16)).astype(np.uint16) for _ in range(3))
        return PreferenceRow(prompt, *answers, *(np.ones(len(ids), dtype=np.uint8) for ids in answers))


def make_reference() -> Any:
    """Another model than `make_model`'s."""
    model = make_model()
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def make_stage(name: str) -> PreferenceStage:
    """The stage, DPO's with the log-probabilities of `make_reference`."""
    if name == "reward":
        return REWARD
    stage = DirectPreference(DPOOptions(global_batch_size=PAIRS_PER_STEP))
    table, reference = np.zeros((len(FixedPairs()), 2)), make_reference()
    for batch in sequential_pairs(FixedPairs(), rows=4, slots=PAIRS_PER_STEP):
        indices = batch.pop("pair_indices")
        with torch.no_grad():
            found = stage.loss(reference, **to_tensors(batch, torch.device("cpu")))
        table[indices[indices >= 0]] = found[indices >= 0]
    stage.reference = {"train": table}
    return stage


def make_network(stage: PreferenceStage) -> Any:
    """What the stage trains, from the same weights in every process."""
    return stage.network(make_model(), DPOOptions())


def run_case(processes: Processes, name: str, zero_stage: int, rows: int) -> dict[str, Any]:
    """Train one case; see the module's docstring for what is returned."""
    stage = make_stage(name)
    engine = Engine(
        StageModule(make_network(stage), stage.loss),
        processes,
        dtype=torch.float32,
        learning_rate=1e-2,
        weight_decay=0.0,
        grad_clip=0.0,
        config=CONFIGS / f"zero{zero_stage}.json",
    )
    windows = stage.step_batches(
        FixedPairs(),  # type: ignore[arg-type]
        TrainOptions(global_batch_size=PAIRS_PER_STEP),
        micro_batch_size=rows,
        rank=processes.rank,
        world_size=processes.world_size,
        start_sample=0,
    )
    result: dict[str, Any] = {"sums": [], "norms": []}
    for number, window in enumerate(islice(windows, STEPS)):
        (weight,) = engine.processes.sum([sum(stage.statistics(batch).label_weight for batch in window)])
        sums = torch.zeros(1 + len(stage.metrics))
        for batch in window:
            sums += engine.forward_backward(to_tensors(batch, processes.device), 1.0 / weight)
        result["norms"].append(engine.step(1e-2).grad_norm)
        result["sums"].append([value / weight for value in engine.processes.sum(sums.tolist())])
        if number == 0:
            result["gradients"] = first_gradients(engine)
    result["weights"] = full_weights(engine)
    engine.close()
    return result


def main() -> None:
    out = Path(next(a for a in sys.argv[1:] if not a.startswith("--")))
    torch.set_num_threads(1)
    processes = init_processes()
    for case in (a for a in sys.argv[1:] if ":" in a):
        name, zero_stage, rows = case.split(":")
        result = run_case(processes, name, int(zero_stage), int(rows))
        torch.save(result, out / f"{case.replace(':', '_')}_rank{processes.rank}.pt")


if __name__ == "__main__":
    main()
