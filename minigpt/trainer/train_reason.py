"""Reasoning: fine-tuning on `<think>…</think><answer>…</answer>`, with extra weight on the four tags (milestone 8).

A model that has learnt to answer at once must be kept from going on like that. The tags decide it, and they are four
among dozens of tokens of steps: they weigh 10 (`--tag_weight`), the assistant's other tokens 1, the user's 0. The
loss of a step is Σ wₜ · −ln p(yₜ) / Σ wₜ, both sums over the whole global batch: ten times the weight also counts
ten times in the denominator, so the size of the loss and of the gradient stays that of a mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

from minigpt.dataset.chat import TAG
from minigpt.dataset.shards import PackedDataset
from minigpt.errors import UserError
from minigpt.trainer.adapters import AdapterStage, LoRAOptions
from minigpt.trainer.loop import train
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.stage import Batch


class Reasoning(AdapterStage):
    """Next-token prediction on conversations whose tags weigh more; of all weights, or of an adapter."""

    name = packed_as = weights = "reason"
    follows = ("sft", "pretrain")

    def step_batches(
        self,
        data: PackedDataset,
        options: TrainOptions,
        *,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_sample: int,
    ) -> Iterator[list[Batch]]:
        """As every stage's; the codes of the packed rows are weighed anew where `--tag_weight` says so."""
        assert isinstance(options, ReasonOptions)
        return super().step_batches(
            with_tag_weight(data, options.tag_weight),
            options,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            start_sample=start_sample,
        )


def with_tag_weight(data: PackedDataset, tag_weight: float | None) -> PackedDataset:
    """The same rows with another weight for the four tags; None: as they were packed."""
    if tag_weight is None:
        return data
    assert data.weight_table is not None
    table = data.weight_table.tolist()
    table[TAG] = tag_weight
    return PackedDataset(data.folder, data.split, table)


REASON = Reasoning()


@dataclass
class ReasonOptions(LoRAOptions):
    __doc__ = f"""{cleandoc(LoRAOptions.__doc__ or "")}
    tag_weight: Loss weight of <think>, </think>, <answer> and </answer>; the assistant's other tokens weigh 1.
        None: what the data was packed with, 10.
"""

    save_dir: Path = Path("out/reason")
    learning_rate: float = 1e-3
    tag_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tag_weight is not None and not 0 < self.tag_weight < math.inf:
            raise UserError(f"--tag_weight is {self.tag_weight}, it must be a number above 0")


def main(options: ReasonOptions) -> None:
    """Teach a fine-tuned model to think before it answers."""
    train(REASON, options)


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(main, ReasonOptions)
