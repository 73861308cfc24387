"""Sampled answers on their way: from the rollout workers to the controller, to the policy's ranks, into packed rows.

A batch is a handful of flat NumPy arrays, whatever its lengths are: that is what crosses between processes cheaply
(lists of small tensors take ten times as long), and there is nothing in it to pad. Tokens are the sampled ids
themselves; no text is ever encoded again.

Shapes: S sequences (a prompt and one answer each), N tokens of all sequences end to end, A answer tokens of all
sequences end to end.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NO_LABEL, NO_DOCUMENT = -100, -1
ROW_MULTIPLE = 64


@dataclass
class RolloutBatch:
    """Prompts with their sampled answers.

    Attributes:
        tokens: int32 [N], prompt and answer of each sequence, end to end.
        prompt_lens, answer_lens: int32 [S].
        sample_ids: int64 [S], number of the sample in the run: prompt counter · samples per prompt + sample.
        prompt_rows: int64 [S], the row of the prompt data set.
        stopped: bool [S], ended by itself; False: cut off at the limit, where the text would have gone on.
        behaviour_log_probs: float32 [A], of each answer token under the distribution that it was drawn from.
        versions: int32 [A], of the weights that drew it.
        columns: More float32 [A] arrays that came later: log-probabilities, values, advantages …
    """

    tokens: np.ndarray
    prompt_lens: np.ndarray
    answer_lens: np.ndarray
    sample_ids: np.ndarray
    prompt_rows: np.ndarray
    stopped: np.ndarray
    behaviour_log_probs: np.ndarray
    versions: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_lens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence, int32 [S]."""
        return self.prompt_lens + self.answer_lens

    def answers(self) -> list[np.ndarray]:
        """The answers' ids of all sequences."""
        ends = np.cumsum(self.lengths)
        return [self.tokens[end - n : end] for end, n in zip(ends, self.answer_lens, strict=True)]

    def take(self, indices: np.ndarray) -> RolloutBatch:
        """Some of the sequences, in the order given."""
        tokens = _pieces(self.lengths, indices)
        answers = _pieces(self.answer_lens, indices)
        return RolloutBatch(
            tokens=self.tokens[tokens],
            **{name: getattr(self, name)[indices] for name in _PER_SEQUENCE},
            **{name: getattr(self, name)[answers] for name in _PER_ANSWER_TOKEN},
            columns={name: column[answers] for name, column in self.columns.items()},
        )

    def spread(self, values: np.ndarray) -> np.ndarray:
        """One value a sequence, [S], as one value an answer token, [A]."""
        return np.repeat(values, self.answer_lens)

    def padded(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A column [A] as a rectangle [S, longest answer] and the mask of what is in it."""
        mask = np.arange(max(1, int(self.answer_lens.max(initial=0)))) < self.answer_lens[:, None]
        rectangle = np.zeros(mask.shape, dtype=values.dtype)
        rectangle[mask] = values
        return rectangle, mask

    @staticmethod
    def concatenate(batches: Sequence[RolloutBatch]) -> RolloutBatch:
        """All sequences of several batches, which hold the same columns."""
        arrays = {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in _SAMPLED}
        columns = {name: np.concatenate([batch.columns[name] for batch in batches]) for name in batches[0].columns}
        return RolloutBatch(**arrays, columns=columns)

    def to_text(self) -> str:
        """The answers as they were sampled, for a JSON file; `columns` come later and are not in it."""
        file = io.BytesIO()
        np.savez_compressed(file, **{name: getattr(self, name) for name in _SAMPLED})
        return base64.b64encode(file.getvalue()).decode()

    @staticmethod
    def from_text(text: str) -> RolloutBatch:
        """The answers of `to_text`, bit for bit."""
        with np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False) as arrays:
            return RolloutBatch(**arrays)


_PER_SEQUENCE = ("prompt_lens", "answer_lens", "sample_ids", "prompt_rows", "stopped")
_PER_ANSWER_TOKEN = ("behaviour_log_probs", "versions")
_SAMPLED = ("tokens", *_PER_SEQUENCE, *_PER_ANSWER_TOKEN)


def _pieces(lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Where the elements of some pieces lie when all pieces stand end to end."""
    ends = np.cumsum(lengths)
    parts = [np.arange(ends[i] - lengths[i], ends[i]) for i in chosen]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def partition(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Sequences for each of several workers, with about equally many tokens: the longest first to whoever has least.

    Every sequence is in exactly one part; the parts are in ascending order and depend on nothing but the arguments.
    """
    loads = np.zeros(parts)
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for index in np.argsort(-lengths, kind="stable"):
        least = int(np.argmin(loads))
        loads[least] += lengths[index]
        chosen[least].append(int(index))
    return [np.array(sorted(part), dtype=np.int64) for part in chosen]


def restore(parts: Sequence[np.ndarray], values: Sequence[np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """What the workers returned for their `parts`, in the order of the whole batch.

    Args:
        parts: From `partition`.
        values: Of each part, all its sequences' values end to end, each a number or an array.
        lengths: How many values each sequence of the whole batch has.
    """
    whole = np.zeros((int(lengths.sum()), *values[0].shape[1:]), dtype=values[0].dtype)
    for part, found in zip(parts, values, strict=True):
        whole[_pieces(lengths, part)] = found
    return whole


def choose_row_length(longest: int, sequences: int, most: int) -> int:
    """T of packed rows, such that `sequences` of the longest possible length leave little of their rows empty.

    Args:
        longest: Tokens of the longest sequence there can be.
        sequences: Of an optimizer step.
        most: No row is longer, unless a sequence is.
    """
    candidates = range(_round_up(longest, ROW_MULTIPLE), max(most, longest + ROW_MULTIPLE), ROW_MULTIPLE)

    def cost(T: int) -> float:  # positions of all rows; attention's share of a position's work grows with T
        return _round_up(sequences, T // longest) // (T // longest) * T * (1 + T / 8192)

    return min(candidates, key=cost)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pack_rows(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Sequences for each row of `row_length` tokens: best fit, the longest first."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        if length > row_length:
            raise ValueError(f"a sequence of {length} tokens does not fit a row of {row_length}")
        best = (
            min((free, row) for row, free in enumerate(room) if free >= length)[1]
            if max(room, default=-1) >= length
            else len(rows)
        )
        if best == len(rows):
            rows.append([])
            room.append(row_length)
        rows[best].append(int(index))
        room[best] -= length
    return rows


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: packed rows, and where in them the answer tokens are predicted.

    Attributes:
        arrays: What the model takes, [B, T]: input_ids, position_ids, document_ids, labels (the next id where it is
            one of an answer, else -100); and what was asked for of the batch's columns under their names, 0 elsewhere;
            `sequence_ids`, the number of the sequence in the batch.
        positions: int64 [answer tokens here], where in the flattened [B, T] each is predicted.
        answer_tokens: int64, the same long: which of the batch's A answer tokens they are.
    """

    arrays: dict[str, np.ndarray]
    positions: np.ndarray
    answer_tokens: np.ndarray


def micro_batches(
    batch: RolloutBatch,
    row_length: int,
    rows: int,
    columns: dict[str, np.ndarray],
    *,
    fixed_shape: bool = False,
    at_least: int = 1,
) -> list[MicroBatch]:
    """A batch as forward passes of up to `rows` packed rows.

    Args:
        batch: The sequences.
        row_length: T.
        rows: B, at most.
        columns: Values of the A answer tokens that go along.
        fixed_shape: Fill up with empty rows, so that all have one shape (compiled models).
        at_least: So many passes, empty ones among them if need be: every rank must make equally many.
    """
    packed = pack_rows(batch.lengths, row_length)
    groups = [packed[first : first + rows] for first in range(0, len(packed), rows)]
    groups += [[] for _ in range(at_least - len(groups))]
    starts = np.cumsum(batch.lengths) - batch.lengths
    answer_starts = np.cumsum(batch.answer_lens) - batch.answer_lens
    return [
        _micro_batch(
            batch, group, row_length, rows if fixed_shape else max(1, len(group)), columns, starts, answer_starts
        )
        for group in groups
    ]


def _micro_batch(
    batch: RolloutBatch,
    group: list[list[int]],
    T: int,
    B: int,
    columns: dict[str, np.ndarray],
    starts: np.ndarray,
    answer_starts: np.ndarray,
) -> MicroBatch:
    sequences = np.array([s for row in group for s in row], dtype=np.int64)
    lengths = batch.lengths[sequences].astype(np.int64)
    offsets = np.concatenate([b * T + _starts(batch.lengths[row]) for b, row in enumerate(group)] or [lengths])
    document = np.concatenate([np.arange(len(row)) for row in group] or [lengths])
    within = _ramp(lengths)  # position of each token in its sequence
    place = np.repeat(offsets, lengths) + within
    flat: dict[str, np.ndarray] = {
        "input_ids": np.zeros(B * T, dtype=np.int64),
        "position_ids": np.zeros(B * T, dtype=np.int64),
        "document_ids": np.full(B * T, NO_DOCUMENT, dtype=np.int32),
        "labels": np.full(B * T, NO_LABEL, dtype=np.int64),
        "sequence_ids": np.zeros(B * T, dtype=np.int64),
    }
    flat["input_ids"][place] = batch.tokens[np.repeat(starts[sequences], lengths) + within]
    flat["position_ids"][place] = within
    flat["document_ids"][place] = np.repeat(document, lengths)
    flat["sequence_ids"][place] = np.repeat(sequences, lengths)
    answers = batch.answer_lens[sequences].astype(np.int64)
    in_answer = _ramp(answers)
    # the token at place p is predicted at p - 1
    predicted_at = np.repeat(offsets + batch.prompt_lens[sequences], answers) + in_answer - 1
    answer_tokens = np.repeat(answer_starts[sequences], answers) + in_answer
    flat["labels"][predicted_at] = flat["input_ids"][predicted_at + 1]
    for name, values in columns.items():
        flat[name] = np.zeros(B * T, dtype=values.dtype)
        flat[name][predicted_at] = values[answer_tokens]
    return MicroBatch({name: array.reshape(B, T) for name, array in flat.items()}, predicted_at, answer_tokens)


def _starts(lengths: Any) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _ramp(lengths: np.ndarray) -> np.ndarray:
    """0, 1 … n-1 for each n of `lengths`, end to end."""
    return np.arange(int(lengths.sum())) - np.repeat(_starts(lengths), lengths)
