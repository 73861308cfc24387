"""Models that judge and do not learn: the reference and the reward model."""

from __future__ import annotations

import numpy as np
import torch

from minigpt.model.model_critic import RewardModel
from minigpt.trainer.setup import load_masters

from ..batch import RolloutBatch, micro_batches, partition
from .base import Worker, loaded, timed


class ReferenceWorker(Worker):
    """The policy as it was at the start, frozen, in the policy's precision: the bits of its first compute copy."""

    def setup(self) -> dict[str, str] | None:
        """Load the weights; the first worker says which they are."""
        self._alone()
        self.network = loaded(load_masters, self.job.init)
        found = self._identity()
        self.network = self.network.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.network.attention_backend = self._backend
        self._forward = torch.compile(self._log_probs) if self._compiles(self.network) else self._log_probs
        return found

    def _log_probs(self, **tensors: torch.Tensor) -> torch.Tensor:
        temperature = self.job.options.temperature
        found = self.network(**tensors, reduction="none", temperature=temperature).log_probs
        assert found is not None
        return found

    @timed
    @torch.no_grad()
    def log_probs(self, batch: RolloutBatch) -> tuple[np.ndarray, np.ndarray]:
        """log π_ref of this worker's share: (sequences, float32 of their answer tokens end to end)."""
        part = partition(batch.lengths, self.world_size)[self.rank]
        mine = batch.take(part)
        found = np.zeros(len(mine.behaviour_log_probs), dtype=np.float32)
        fixed = self._forward is not self._log_probs
        for one in micro_batches(mine, self.job.row_length, self._rows, {}, fixed_shape=fixed) if len(mine) else []:
            log_probs = self._forward(**self._tensors(one, self.network, ["labels"]))
            found[one.answer_tokens] = log_probs.flatten().float().cpu().numpy()[one.positions]
        return part, found


class RewardWorker(Worker):
    """A trained reward model."""

    def setup(self) -> dict[str, str] | None:
        """Load the weights; the first worker says which they are."""
        self._alone()
        folder = self.job.options.reward_model
        assert folder is not None
        self.network = loaded(RewardModel.from_pretrained, folder)
        found = self._identity()
        self.network = self.network.to(device=self.device, dtype=self.dtype).eval()
        return found

    @timed
    def rewards(self, batch: RolloutBatch) -> tuple[np.ndarray, np.ndarray]:
        """The reward of this worker's share: (sequences, float32 of each)."""
        part = partition(batch.lengths, self.world_size)[self.rank]
        ends = np.cumsum(batch.lengths)
        texts = [batch.tokens[ends[i] - batch.lengths[i] : ends[i]] for i in part]
        found = self.network.rewards([text.tolist() for text in texts]).cpu().numpy()
        return part, found
