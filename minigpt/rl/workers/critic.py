"""The value model of PPO: what an answer is worth from each token on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from minigpt.errors import UserError
from minigpt.model.model_critic import RewardModel, ValueModel
from minigpt.trainer import checkpoint
from minigpt.trainer.setup import load_masters

from ..batch import RolloutBatch
from ..losses import value_objective
from ..options import PPOOptions
from .base import loaded, timed
from .trained import TrainedWorker


class CriticWorker(TrainedWorker):
    """PPO's value model."""

    def setup(self, address: tuple[str, int] | None) -> dict[str, Any]:
        """Load the weights and make the engine; all ranks call it."""
        o = self.job.options
        assert isinstance(o, PPOOptions)
        processes = self._join(address)
        torch.manual_seed(o.seed)  # of a new value head
        self._make_engine(
            loaded(_value_model, o.critic_init or o.reward_model or self.job.init),
            value_objective(o.value_clip),
            processes,
            o.critic_learning_rate,
        )
        return self.describe()

    @timed
    def values(self, batch: RolloutBatch) -> np.ndarray:
        """V of the state in which each answer token was chosen, float32 [A]."""
        return self._run_passes(batch, {}, [], lambda tensors: self.engine.evaluate(tensors).float().cpu().numpy())

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """As the policy's, and one more is kept: a run killed before the policy's is written needs the one before."""
        checkpoint.save(self.engine, folder, state, self.job.options.keep_checkpoints + 1)

    @timed
    def update(self, batch: RolloutBatch, learning_rate: float) -> dict[str, float]:
        """Learn the `returns` of a batch, whose `values` were those at sampling; all ranks call it."""
        o = self.job.options
        columns = {name: batch.columns[name] for name in ("values", "returns")}
        windows = self._windows(batch, columns)
        total, steps, skipped = 0.0, 0, 0
        norms = []
        for _ in range(o.update_epochs):
            for window in windows:
                count = float(batch.answer_lens[window.chosen].sum())
                for one in window.passes:
                    tensors = self._tensors(one, self.network, ["labels", "values", "returns"])
                    output = self.engine.forward_backward(tensors, 1.0 / count)
                    total += float(output) / count
                result = self.engine.step(learning_rate)
                norms.append(result.grad_norm)
                skipped += not result.applied
                steps += 1
        (total,) = self.engine.processes.sum([total])
        found = {"value_loss": total / steps, "value_grad_norm": float(np.mean(norms)), "value_skipped": float(skipped)}
        return found


def _value_model(folder: Path) -> ValueModel:
    """A critic on a reward model's transformer and head, or on a language model's with a new head."""
    try:
        return ValueModel.from_decoder(RewardModel.from_pretrained(folder))
    except UserError:
        return ValueModel.from_decoder(load_masters(folder))
