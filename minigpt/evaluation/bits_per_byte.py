"""Bits per byte: how well a model predicts text, in a unit that does not depend on the tokenizer.

Σ NLL / (ln 2 · Σ UTF-8 bytes of the predicted tokens). A fair coin for every bit of the text costs 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minigpt.dataset.shards import PackedDataset, sequential_batches

if TYPE_CHECKING:
    from minigpt.model.model_minigpt import MiniGPT

LossFn = Callable[[dict[str, torch.Tensor]], float]


@dataclass(frozen=True)
class BitsPerByteResult:
    """Sums over a split, and what follows from them.

    Attributes:
        nll: summed negative log-likelihood of all labels of weight > 0, in nats.
        tokens: number of those labels.
        bytes: UTF-8 bytes that they stand for; added tokens such as `<|endoftext|>` count 0.
    """

    nll: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """NaN where there is no text."""
        return self.nll / (math.log(2) * self.bytes) if self.bytes else math.nan

    @property
    def loss(self) -> float:
        """Mean over the labels, in nats per token."""
        return self.nll / self.tokens if self.tokens else math.nan


class BitsPerByte:
    """Bits per byte of a packed split.

    Args:
        dataset: a packed split of a pretraining or conversation stage; of conversations only the trained tokens count.
        batch_size: rows in a forward pass.
        max_rows: use only the first rows.
    """

    def __init__(self, dataset: PackedDataset, batch_size: int = 16, max_rows: int | None = None) -> None:
        self.dataset, self.batch_size, self.max_rows = dataset, batch_size, max_rows

    def __call__(self, model: MiniGPT | None = None, *, loss_fn: LossFn | None = None) -> BitsPerByteResult:
        """Measure.

        Args:
            model: scored in evaluation mode, without gradients; its mode is restored.
            loss_fn: instead of a model, a function from a batch of tensors (`collate`) to the summed loss in nats.
        """
        assert (model is None) != (loss_fn is None), "give a model or a loss_fn"
        score = loss_fn or _model_loss(model)
        nll, tokens, n_bytes = 0.0, 0, 0
        was_training = model.training if model is not None else False
        if model is not None:
            model.eval()
        try:
            for batch in sequential_batches(self.dataset, self.batch_size, max_rows=self.max_rows):
                # A label counts once, whatever weight training gives it (tags may weigh 10).
                counted = batch["weights"] > 0
                batch["weights"] = counted.astype(np.float32)
                nll += score({name: torch.from_numpy(array) for name, array in batch.items()})
                tokens += int(counted.sum())
                n_bytes += int(self.dataset.token_byte_lengths[batch["labels"][counted]].sum())
        finally:
            if model is not None:
                model.train(was_training)
        return BitsPerByteResult(nll, tokens, n_bytes)


def _model_loss(model: Any) -> LossFn:
    device = next(model.parameters()).device

    @torch.no_grad()
    def loss(batch: dict[str, torch.Tensor]) -> float:
        return model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss_sum.item()

    return loss
