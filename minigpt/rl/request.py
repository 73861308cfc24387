"""What rollout workers are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minigpt.generation.sampling import SamplingParams


@dataclass(frozen=True)
class PromptRequest:
    """What a rollout worker is to answer.

    Attributes:
        tokens: int32, the prompts end to end.
        prompt_lens: int32 [P].
        prompt_rows: int64 [P], rows of the prompt data set.
        first_sample_ids: int64 [P], number of the first answer to each; the others follow it.
        samples: Answers to each.
        params: How to sample.
        version: Of the weights that are to answer.
    """

    tokens: np.ndarray
    prompt_lens: np.ndarray
    prompt_rows: np.ndarray
    first_sample_ids: np.ndarray
    samples: int
    params: SamplingParams
    version: int

    @property
    def sample_ids(self) -> np.ndarray:
        """Numbers of all answers that are wanted, int64 [P · samples], in the order of the prompts."""
        return (self.first_sample_ids[:, None] + np.arange(self.samples)).reshape(-1)

    def share(self, rank: int, world_size: int) -> PromptRequest:
        """The prompts of one of several workers: every world_size-th, so that the assignment never changes."""
        chosen = np.arange(rank, len(self.prompt_lens), world_size)
        ends = np.cumsum(self.prompt_lens)
        pieces = [self.tokens[ends[i] - self.prompt_lens[i] : ends[i]] for i in chosen]
        return PromptRequest(
            np.concatenate(pieces) if pieces else self.tokens[:0],
            self.prompt_lens[chosen],
            self.prompt_rows[chosen],
            self.first_sample_ids[chosen],
            self.samples,
            self.params,
            self.version,
        )
