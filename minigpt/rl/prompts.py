"""Prompts for the rollout workers, and answers as text for those who judge them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minigpt.dataset.chat import ChatEncoder
from minigpt.dataset.shards import GlobalOrder, PackedDataset, PromptRow
from minigpt.errors import UserError
from minigpt.generation.sampling import SamplingParams

from .batch import RolloutBatch
from .request import PromptRequest

Texts = tuple[list[str], list[str], list[dict[str, Any]]]
"""Prompts, completions and references as reward functions take them (`rewards.py`)."""


class PromptSource:
    """The prompts of a data set in the order of a seed; prompt number k is the same in every run.

    Args:
        data: Packed by `--stage prompt`.
        encoder: Of the model that answers.
        thinking: Render the prompts anew with thinking switched on or off; None: as they were packed.
        seed: Of the order.
        limit: Longest prompt; longer ones are an error, since the data was packed with a limit of its own.
    """

    def __init__(self, data: PackedDataset, encoder: ChatEncoder, thinking: bool | None, seed: int, limit: int) -> None:
        self.data, self.encoder, self.thinking = data, encoder, thinking
        self.order = GlobalOrder(len(data), seed)
        self.longest = max(len(self.prompt_ids(row)) for row in range(len(data)))
        if self.longest > limit:
            raise UserError(
                f"{data.folder} holds a prompt of {self.longest} tokens, which leaves no room for an answer in the "
                f"model's context of {limit}; pack the prompts again with a smaller --seq_len"
            )

    @property
    def unanswered(self) -> int:
        """Prompts without an answer to compare with."""
        return sum(self.data.row(row).verifier == "none" for row in range(len(self.data)))

    def prompt_ids(self, row: int) -> np.ndarray:
        """The ids of a prompt, int32."""
        record: PromptRow = self.data.row(row)
        if self.thinking is None:
            return np.asarray(record.prompt_ids, dtype=np.int32)
        return np.array(self.encoder.encode_prompt(record.messages, enable_thinking=self.thinking), dtype=np.int32)

    def request(self, first: int, count: int, samples: int, params: SamplingParams, version: int) -> PromptRequest:
        """The next `count` prompts from number `first` on, `samples` answers to each."""
        counters = np.arange(first, first + count, dtype=np.int64)
        return self.request_rows(self.order.indices(counters), counters * samples, samples, params, version)

    def request_rows(
        self, rows: np.ndarray, first_sample_ids: np.ndarray, samples: int, params: SamplingParams, version: int
    ) -> PromptRequest:
        """Certain prompts."""
        ids = [self.prompt_ids(int(row)) for row in rows]
        lengths = np.array([len(one) for one in ids], dtype=np.int32)
        return PromptRequest(np.concatenate(ids), lengths, rows, first_sample_ids, samples, params, version)

    def texts(self, batch: RolloutBatch, stop_ids: Sequence[int], max_new_tokens: int) -> Texts:
        """What those who judge by rules read of a batch."""
        prompts, completions, references = [], [], []
        known: dict[int, tuple[str, PromptRow]] = {}
        for row, answer, stopped in zip(batch.prompt_rows.tolist(), batch.answers(), batch.stopped, strict=True):
            if row not in known:
                prompt = self.encoder.decode(self.prompt_ids(row).tolist(), skip_special_tokens=False)
                known[row] = prompt, self.data.row(row)
            prompt, record = known[row]
            ids = answer.tolist()
            text = ids[:-1] if ids and ids[-1] in stop_ids else ids
            prompts.append(prompt)
            completions.append(self.encoder.decode(text))
            references.append(
                {
                    "answer": record.answer,
                    "verifier": record.verifier,
                    "meta": record.meta,
                    "messages": record.messages,
                    "tokens": len(ids),
                    "max_tokens": max_new_tokens,
                    "finish_reason": "stop" if stopped else "length",
                }
            )
        return prompts, completions, references
