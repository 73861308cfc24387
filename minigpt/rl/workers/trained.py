"""A rank of a DeepSpeed engine: how a batch becomes its optimizer steps and passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigpt.trainer import checkpoint
from minigpt.trainer.engine import Engine, Processes, init_processes
from minigpt.trainer.stage import StageModule, trained_layout

from ..batch import MicroBatch, RolloutBatch, micro_batches, pack_rows, partition, restore
from ..group import join_environment, own_address
from .base import Worker


@dataclass
class Window:
    """One optimizer step of one rank."""

    mine: RolloutBatch
    part: np.ndarray  # the sequences of the batch that are mine
    chosen: np.ndarray  # those of all ranks
    passes: list[MicroBatch]


class TrainedWorker(Worker):
    """A rank of a DeepSpeed engine: what policy and critic share."""

    engine: Engine

    def address(self) -> tuple[str, int]:
        """Where the ranks meet; asked of rank 0."""
        return own_address()

    def _join(self, address: tuple[str, int] | None) -> Processes:
        join_environment(self.rank, self.world_size, address)
        processes = init_processes()
        self._configure(processes)
        return processes

    def _make_engine(self, network: Any, loss: Callable[..., Any], processes: Processes, rate: float) -> None:
        o = self.job.options
        self.network = network
        # now: ZeRO stage 3 will take the shapes apart
        self.trained_layout, self.parameters = trained_layout(network), network.num_parameters()
        self.engine = Engine(
            StageModule(network, loss),
            processes,
            dtype=self.dtype,
            learning_rate=rate,
            optimizer_name=o.optimizer,
            betas=(o.beta1, o.beta2),
            weight_decay=o.weight_decay,
            grad_clip=o.grad_clip,
            config=o.deepspeed,
            compile=self._compiles(network),
        )
        network.attention_backend = self._backend
        network.model.gradient_checkpointing = o.gradient_checkpointing

    def describe(self) -> dict[str, Any]:
        """For the line at the start of a run, and for checkpoints."""
        return {
            "precision": str(self.dtype).removeprefix("torch."),
            "compiled": self.engine.compiled,
            "zero_stage": self.engine.zero_stage,
            "optimizer": self.engine.optimizer_name,
            "parameters": self.parameters,
            "rows": self._rows,
            "device": str(self.device),
            "frozen_hash": self.engine.frozen_hash,
            "trained_layout": self.trained_layout,
        }

    def sleep(self) -> None:
        """Leave the device to others until `wake`: the whole engine goes to the CPU's memory."""
        self.engine.sleep()

    def wake(self) -> None:
        """Be as before `sleep`."""
        self.engine.wake()

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """A checkpoint in `folder`/checkpoints; all ranks call it."""
        checkpoint.save(self.engine, folder, state, self.job.options.keep_checkpoints)

    def load(self, folder: Path) -> None:
        """Go on from a verified checkpoint; all ranks call it."""
        checkpoint.load(self.engine, folder)

    def _windows(self, batch: RolloutBatch, columns: dict[str, np.ndarray]) -> list[Window]:
        """The batch cut into optimizer steps, ranks and passes, always in the same way.

        Every rank makes equally many passes, empty ones at the end if need be: under ZeRO they communicate in each.
        Of fewer sequences than `minibatches` each is a step of its own: one on nothing would be the momentum's.
        """
        found = []
        whole = RolloutBatch(**{**batch.__dict__, "columns": columns})
        for chosen in np.array_split(np.arange(len(batch)), min(self.job.options.minibatches, len(batch))):
            lengths = batch.lengths[chosen]
            parts = [chosen[part] for part in partition(lengths, self.world_size)]
            rows = [len(pack_rows(batch.lengths[part], self.job.row_length)) for part in parts]
            part = parts[self.rank]
            mine = whole.take(part)
            passes = micro_batches(
                mine,
                self.job.row_length,
                self._rows,
                mine.columns,
                fixed_shape=self.engine.compiled,
                at_least=-(-max(rows) // self._rows),
            )
            found.append(Window(mine, part, chosen, passes))
        return found

    def _gather(self, batch: RolloutBatch, windows: list[Window], values: list[np.ndarray]) -> np.ndarray:
        """What each rank found for its answer tokens, on all ranks for the whole batch, float32 [A]."""
        whole = restore([window.part for window in windows], values, batch.answer_lens)
        return self._sum_arrays(whole)

    def _sum_arrays(self, array: np.ndarray) -> np.ndarray:
        if self.world_size == 1:
            return array
        tensor = torch.from_numpy(array).to(self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    def _run_passes(
        self,
        batch: RolloutBatch,
        columns: dict[str, np.ndarray],
        names: Sequence[str],
        run: Callable[..., np.ndarray],
    ) -> np.ndarray:
        """What `run`, which returns [B·T], finds at the answer tokens, float32 [A]; on all ranks the same."""
        windows = self._windows(batch, columns)
        values = []
        for window in windows:
            found = np.zeros(len(window.mine.behaviour_log_probs), dtype=np.float32)
            for one in window.passes:
                found[one.answer_tokens] = run(self._tensors(one, self.network, names))[one.positions]
            values.append(found)
        return self._gather(batch, windows, values)
