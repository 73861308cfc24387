"""What makes a training stage different from the others: its data, its loss, what it starts from and what it leaves.

A stage is a subclass of `Stage` that overrides what differs; the loop (`loop.py`) calls these methods and knows no
stage by name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from minigpt.dataset.shards import (
    BatchIterator,
    PackedDataset,
    TokenStatistics,
    sequential_batches,
    token_statistics,
)
from minigpt.errors import UserError
from minigpt.model.model_minigpt import MiniGPT

from .weights import write_language_model

if TYPE_CHECKING:
    from .engine import Processes
    from .loop import Trainer
    from .options import TrainOptions

Batch = dict[str, np.ndarray]
LossOutput = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def trained_layout(network: Any) -> str:
    """A hash of the names and shapes of what is trained: a checkpoint's flat optimizer state fits nothing else."""
    trained = {name: tuple(p.shape) for name, p in network.named_parameters() if p.requires_grad}
    return hashlib.sha256(repr(sorted(trained.items())).encode()).hexdigest()


class Stage:
    """A stage of next-token prediction on packed rows. Others override what is different about them.

    Attributes:
        name: As in `minigpt train NAME` and summary.json.
        weights: Beginning of the .pth file's name: `<weights>_<hidden_size>.pth`.
        packed_as: The `--stage` its data is packed for.
        follows: The stages that it goes on from when there is no --init, best first. Empty: it starts from random
            weights.
        stop_token: What ends a generated text: the end of a document or of a chat turn.
        reference_hash: Of the weights that it is trained against, if there are such; a run must go on with the same.
        metrics: Names of what `loss` sums up besides the loss; logged divided by the step's weight.
    """

    name: str
    weights: str
    packed_as: str
    follows: tuple[str, ...] = ()
    stop_token: str = "<|im_end|>"
    metrics: tuple[str, ...] = ()
    reference_hash: str | None = None

    def network(self, model: MiniGPT, options: TrainOptions) -> Any:
        """What is trained: the model itself, or the model with adapters in it or another head on it.

        It has the attributes `config`, `attention_backend`, `model` (the transformer) and the method `num_parameters`.
        Parameters that do not require a gradient stay frozen.
        """
        return model

    def loss(self, network: Any, **batch: torch.Tensor) -> LossOutput:
        """Σ weight · cross-entropy of the next token; of stages with `metrics` also their sums, float32 [metrics].

        It runs inside the engine's (compiled) module, so that everything that uses a weight happens in one forward
        call.
        """
        return language_model_loss(network, **batch)

    def micro_batch_size(self, data: PackedDataset, options: TrainOptions, processes: Processes) -> int:
        """Rows of one forward pass. Errors: UserError when the global batch does not divide."""
        return micro_batch_size(options, processes, data.seq_len)

    def batch_description(self, trainer: Trainer) -> str:
        """What is trained on and how a step is cut, for the line at the start of a run."""
        total, rows, world_size = trainer.options.global_batch_size, trainer.micro_batch, trainer.processes.world_size
        return (
            f"{len(trainer.data):,} rows of {trainer.data.seq_len} tokens; global batch {total} rows = {rows} a pass × "
            f"{total // (rows * world_size)} passes × {world_size} ranks"
        )

    def before_training(self, trainer: Trainer) -> None:
        """Called once the engine holds the initial weights, before anything is resumed or trained."""

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
        """All micro-batches of this rank for one optimizer step at a time, from sample `start_sample` on, for ever.

        Every rank gets equally many for a step, and all have one shape.
        """
        source = BatchIterator(
            data,
            micro_batch_size=micro_batch_size,
            global_batch_size=options.global_batch_size,
            rank=rank,
            world_size=world_size,
            seed=options.seed,
            start_sample=start_sample,
        )
        window: list[Batch] = []
        for batch in source:
            window.append(batch)
            if len(window) == source.micro_batches_per_step:
                yield window
                window = []

    def statistics(self, batch: Batch) -> TokenStatistics:
        """What a micro-batch holds; `label_weight` is what it adds to the denominator of the step's mean loss."""
        return token_statistics(batch)

    def validate(self, trainer: Trainer) -> dict[str, float]:
        """`valid_loss` (nats, mean over labelled tokens) and `valid_bits_per_byte`; {} where no token is labelled."""
        assert trainer.valid is not None
        byte_lengths = trainer.valid.token_byte_lengths
        loss, labels, byte_count = 0.0, 0.0, 0.0
        batches = sequential_batches(
            trainer.valid,
            trainer.micro_batch,
            rank=trainer.processes.rank,
            world_size=trainer.processes.world_size,
            max_rows=trainer.options.eval_rows,
        )
        for batch in batches:
            counted = batch["weights"] > 0
            batch["weights"] = counted.astype(np.float32)  # a plain mean: extra weights steer training, not judgement
            loss += trainer.engine.evaluate(trainer.tensors(batch)).item()
            labels += float(counted.sum())
            byte_count += float(byte_lengths[batch["labels"][counted]].sum())
        loss, labels, byte_count = trainer.processes.sum([loss, labels, byte_count])
        if not labels:
            return {}
        result = {"valid_loss": loss / labels}
        if byte_count:
            result["valid_bits_per_byte"] = loss / math.log(2) / byte_count
        return result

    def language_model(self, network: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state dict of the plain model that the trained weights make: what is sampled from, and exported.

        Args:
            network: What is trained; only its shape is used.
            weights: The float32 masters by name.
        """
        return weights

    def write_weights(
        self,
        folder: Path,
        network: Any,
        weights: dict[str, torch.Tensor],
        tokenizer_folder: Path,
        options: TrainOptions,
    ) -> list[Path]:
        """Write the finished weights into the run folder (rank 0 only); returns what was written, best first.

        Args:
            folder: The run folder.
            network: What was trained; only its shape is used.
            weights: The float32 masters by name.
            tokenizer_folder: Where the tokenizer lies.
            options: Of the run.
        """
        return write_language_model(
            folder,
            network,
            weights,
            name=self.weights,
            tokenizer_folder=tokenizer_folder,
            stop_token=self.stop_token,
            dtype=options.export_dtype,
        )


def language_model_loss(model: MiniGPT, **batch: torch.Tensor) -> torch.Tensor:
    """Σ weight · cross-entropy of the next token."""
    loss_sum = model(**batch).loss_sum
    assert loss_sum is not None
    return loss_sum


def tokens_per_pass(device: torch.device) -> int:
    """Positions of a forward pass that keep a device busy and fit into its memory at most sizes of model."""
    return 4096 if device.type == "cpu" else 32768


def micro_batch_size(options: TrainOptions, processes: Processes, seq_len: int) -> int:
    """Rows of one forward pass: as asked for, or the largest that divides a rank's share and fits a sensible pass.

    Errors: UserError when the global batch does not divide.
    """
    per_rank, rest = divmod(options.global_batch_size, processes.world_size)
    if rest or not per_rank:
        raise UserError(
            f"--global_batch_size {options.global_batch_size} does not divide among {processes.world_size} processes"
        )
    if options.micro_batch_size is not None:
        if per_rank % options.micro_batch_size:
            raise UserError(
                f"--micro_batch_size {options.micro_batch_size} does not divide the {per_rank} rows of a process "
                f"(--global_batch_size {options.global_batch_size} over {processes.world_size} processes)"
            )
        return options.micro_batch_size
    limit = max(1, tokens_per_pass(processes.device) // seq_len)
    return max(size for size in range(1, per_rank + 1) if per_rank % size == 0 and (size <= limit or size == 1))


class StageModule(nn.Module):
    """The network together with its loss: what the engine trains.

    Its output is the summed loss, or a vector of the summed loss and the sums of the stage's metrics behind it.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., LossOutput]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        output = self.loss(self.model, **batch)
        if isinstance(output, torch.Tensor):
            return output
        loss_sum, sums = output
        return torch.cat((loss_sum[None], sums.detach().to(loss_sum.dtype)))
