"""What the stages that learn from preference pairs share: their batches, their denominator, their validation.

A step's weight is its number of pairs, whatever their length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from minigpt.dataset.preference import choose_rows, pair_statistics, pair_steps, sequential_pairs
from minigpt.dataset.shards import PackedDataset, TokenStatistics

from .engine import Processes
from .options import TrainOptions
from .stage import Batch, Stage, tokens_per_pass

if TYPE_CHECKING:
    from .loop import Trainer


class PreferenceStage(Stage):
    """A stage whose samples are pairs of answers.

    A subclass gives `loss` with the metrics below; `extra_arrays` may add to a batch what belongs to its pairs.
    """

    packed_as = "preference"
    follows = ("sft",)
    metrics: tuple[str, ...] = ("accuracy", "margin", "chosen_reward", "rejected_reward")

    def micro_batch_size(self, data: PackedDataset, options: TrainOptions, processes: Processes) -> int:
        """Rows of a pass: as asked for, or what packs well."""
        if options.micro_batch_size is not None:
            return options.micro_batch_size
        return choose_rows(
            data,
            pairs_per_step=options.global_batch_size,
            world_size=processes.world_size,
            max_tokens=tokens_per_pass(processes.device),
            seed=options.seed,
        )

    def batch_description(self, trainer: Trainer) -> str:
        pairs, rows, world_size = trainer.options.global_batch_size, trainer.micro_batch, trainer.processes.world_size
        first = next(
            pair_steps(
                trainer.data, rows=rows, global_batch_size=pairs, world_size=world_size, seed=trainer.options.seed
            )
        )
        tokens = sum(pair_statistics(batch).tokens for batch in first)
        fill = tokens / (len(first) * rows * trainer.data.seq_len)
        return (
            f"{len(trainer.data):,} pairs; global batch {pairs} pairs, packed into passes of {rows} rows of "
            f"{trainer.data.seq_len} tokens ({fill:.0%} full in the first step) on {world_size} ranks"
        )

    def extra_arrays(self, batch: Batch, data: PackedDataset) -> Batch:
        """What `loss` needs besides the collated pairs."""
        return {}

    def prepared(self, batch: Batch, data: PackedDataset) -> Batch:
        """A collated batch as `loss` takes it."""
        batch = {**batch, **self.extra_arrays(batch, data)}
        del batch["pair_indices"]
        return batch

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
        """See `minigpt.dataset.preference.pair_steps`."""
        windows = pair_steps(
            data,
            rows=micro_batch_size,
            global_batch_size=options.global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=options.seed,
            start_sample=start_sample,
        )
        for window in windows:
            yield [self.prepared(batch, data) for batch in window]

    def statistics(self, batch: Batch) -> TokenStatistics:
        return pair_statistics(batch)

    def evaluation_batches(self, trainer: Trainer, data: PackedDataset, max_pairs: int | None) -> Iterator[Batch]:
        """This rank's batches of each pair once, `pair_indices` with them."""
        return sequential_pairs(
            data,
            rows=trainer.micro_batch,
            slots=trainer.options.global_batch_size,
            rank=trainer.processes.rank,
            world_size=trainer.processes.world_size,
            max_pairs=max_pairs,
        )

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """`valid_loss`, the stage's metrics, and Wilson's 95 % interval of the accuracy, over held-out pairs."""
        from minigpt.evaluation.answers import Accuracy

        assert trainer.valid is not None
        sums = np.zeros(2 + len(self.metrics))
        for batch in self.evaluation_batches(trainer, trainer.valid, trainer.options.eval_rows):
            output = trainer.engine.evaluate(trainer.tensors(self.prepared(batch, trainer.valid)))
            sums += [batch["pair_weights"].sum(dtype=np.float64), *output.double().tolist()]
        pairs, *totals = trainer.processes.sum(sums.tolist())
        if not pairs:
            return {}
        values = {f"valid_{name}": total / pairs for name, total in zip(("loss", *self.metrics), totals, strict=True)}
        low, high = Accuracy(round(values["valid_accuracy"] * pairs), round(pairs)).interval()
        return {**values, "valid_accuracy_low": low, "valid_accuracy_high": high, "valid_pairs": pairs}


def weighted_sums(pair_weights: torch.Tensor, losses: torch.Tensor, metrics: list[torch.Tensor]) -> torch.Tensor:
    """Σ weight · value of the loss and of each metric, [1 + metrics]; what an empty slot holds counts nothing.

    Args:
        pair_weights: float32 [P], 0 in an empty slot.
        losses: [P].
        metrics: [P] each.
    """
    values = torch.stack((losses, *(metric.to(losses.dtype).detach() for metric in metrics)))
    return torch.where(pair_weights > 0, values * pair_weights, 0.0).sum(1)
