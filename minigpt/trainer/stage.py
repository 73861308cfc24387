"""What makes a training stage different from the others: its data, its loss, and what it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from minigpt.model.model_minigpt import MiniGPT


@dataclass(frozen=True)
class Stage:
    """What makes a stage different from the others.

    Attributes:
        name: As in `minigpt train NAME` and summary.json.
        weights: Beginning of the .pth file's name: `<weights>_<hidden_size>.pth`.
        packed_as: The `--stage` its data is packed for.
        from_scratch: Whether the stage may start from random weights.
        stop_token: What ends a generated text: the end of a document or of a chat turn.
        loss: Computes the summed loss from the model and a batch of tensors.
    """

    name: str
    weights: str
    packed_as: str
    from_scratch: bool
    stop_token: str
    loss: Callable[..., torch.Tensor]


def language_model_loss(model: MiniGPT, **batch: torch.Tensor) -> torch.Tensor:
    """Σ weight · cross-entropy of the next token."""
    loss_sum = model(**batch).loss_sum
    assert loss_sum is not None
    return loss_sum


class StageModule(nn.Module):
    """The model together with its loss, so that everything that uses a weight happens inside one forward call."""

    def __init__(self, model: MiniGPT, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model, **batch)
