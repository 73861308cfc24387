"""Batches of preference pairs: the same prompt with a better and a worse answer.

A step takes `global_batch_size` pairs in the global order. Prompt + chosen and prompt + rejected are two documents; all
documents of a step are packed into rows of `seq_len` tokens, and `rows` of them make a micro-batch, so every
micro-batch of a run has one shape. Both documents of a pair are in the same micro-batch, because the loss is a function
of both. The packing is a function of the step's pairs alone and is done for all ranks together; rank r takes the
micro-batches r, r + world_size, …; where they do not come out even, some ranks get an empty one.

An answer ends with its last token that is trained on (the end of the turn): what the chat format puts behind it is
never a label, and a reward is to be read where generation stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from minigpt.dataset.shards import NO_DOCUMENT, NO_LABEL, GlobalOrder, PreferenceRow, TokenStatistics
from minigpt.errors import UserError

CHOSEN, REJECTED = 0, 1
Batch = dict[str, np.ndarray]


class PairSource(Protocol):
    """Anything with numbered pairs, such as a `PackedDataset` of stage preference."""

    seq_len: int

    def __len__(self) -> int: ...

    def row(self, index: int) -> PreferenceRow: ...


@dataclass(frozen=True, slots=True)
class Document:
    """A prompt with one of its answers.

    Args:
        input_ids: int64 [n].
        is_answer: bool [n], the tokens that the model is to prefer or to avoid.
    """

    input_ids: np.ndarray
    is_answer: np.ndarray


def documents_of(row: PreferenceRow) -> tuple[Document, Document]:
    """Prompt + chosen and prompt + rejected, each cut behind its last trained token."""
    return (
        _document(row.prompt_ids, row.chosen_ids, row.chosen_weight),
        _document(row.prompt_ids, row.rejected_ids, row.rejected_weight),
    )


def _document(prompt_ids: np.ndarray, answer_ids: np.ndarray, codes: np.ndarray) -> Document:
    end = _answer_length(codes)
    is_answer = np.concatenate([np.zeros(len(prompt_ids), dtype=bool), codes[:end] > 0])
    return Document(np.concatenate([prompt_ids, answer_ids[:end]]).astype(np.int64), is_answer)


def _answer_length(codes: np.ndarray) -> int:
    trained = np.flatnonzero(codes)
    return int(trained[-1]) + 1 if len(trained) else 0


def pair_lengths(row: PreferenceRow) -> tuple[int, int]:
    """Tokens of the two documents."""
    prompt = len(row.prompt_ids)
    return prompt + _answer_length(row.chosen_weight), prompt + _answer_length(row.rejected_weight)


# ---------------------------------------------------------------------------------------------------------------------
# Packing


@dataclass(frozen=True, slots=True)
class Place:
    """Where a document of a micro-batch stands: `pair` counts within the step, `slot` within the micro-batch."""

    pair: int
    slot: int
    side: int
    row: int
    start: int


def pack_pairs(lengths_P2: np.ndarray, rows: int, seq_len: int) -> list[list[Place]]:
    """Micro-batches of `rows` rows, both documents of a pair in the same one; a pure function of the lengths.

    Longest pairs first, each into the first micro-batch that has room for both documents, and there into the fullest
    rows that have (best fit decreasing).

    Args:
        lengths_P2: int [pairs, 2], tokens of the chosen and the rejected document.
        rows: Rows of a micro-batch.
        seq_len: Tokens of a row.

    Raises:
        UserError: when a pair does not fit into an empty micro-batch.
    """
    batches: list[list[Place]] = []
    room_MR = np.zeros((0, rows), dtype=np.int64)
    for pair in np.argsort(-lengths_P2.sum(1), kind="stable").tolist():
        long_side = int(lengths_P2[pair, REJECTED] > lengths_P2[pair, CHOSEN])
        long, short = int(lengths_P2[pair, long_side]), int(lengths_P2[pair, 1 - long_side])
        m = _first_with_room(room_MR, long, short)
        if m == len(batches):
            batches.append([])
            room_MR = np.vstack([room_MR, np.full(rows, seq_len)])
            if _first_with_room(room_MR[m:], long, short):
                raise UserError(
                    f"a pair of {long} and {short} tokens does not fit into {rows} rows of {seq_len}; "
                    f"give --micro_batch_size {rows + 1} (it is the number of rows in a pass)"
                )
        slot = len(batches[m]) // 2
        for side, length in ((long_side, long), (1 - long_side, short)):
            row = int(np.where(room_MR[m] >= length, room_MR[m], seq_len + 1).argmin())
            batches[m].append(Place(pair, slot, side, row, seq_len - int(room_MR[m, row])))
            room_MR[m, row] -= length
    return batches


def _first_with_room(room_MR: np.ndarray, long: int, short: int) -> int:
    """The first micro-batch with room for both documents, in one row or in two; their number when none has."""
    if not len(room_MR):
        return 0
    most = room_MR.max(1)
    second = np.sort(room_MR, axis=1)[:, -2] if room_MR.shape[1] > 1 else np.full(len(room_MR), -1)
    # best fit puts the long document into the smallest row that holds it: the largest stays free for the short one,
    # unless it is the only one that holds the long
    fits = (most >= long) & ((most - long >= short) | (second >= short))
    return int(fits.argmax()) if fits.any() else len(room_MR)


def choose_rows(
    data: PairSource, *, pairs_per_step: int, world_size: int, max_tokens: int, seed: int = 0, steps: int = 8
) -> int:
    """Rows of a micro-batch that make a step the least work: few leave little padding, many mean few passes.

    Judged by how the first steps pack, with a pass as dear as `max_tokens` / 64 positions. At least 2, so that any pair
    fits; at most `max_tokens` positions besides that.
    """
    order = GlobalOrder(len(data), seed)
    steps = max(1, min(steps, 512 // pairs_per_step, len(data) // pairs_per_step))
    step_lengths = [
        _lengths(data, order.indices(np.arange(s * pairs_per_step, (s + 1) * pairs_per_step))) for s in range(steps)
    ]
    largest = max(2, max_tokens // data.seq_len)
    work = {}
    for rows in [*range(2, min(largest, 16)), *range(16, min(largest, 64), 2), largest]:
        packed = [len(pack_pairs(lengths, rows, data.seq_len)) for lengths in step_lengths]
        passes = sum(-(-n // world_size) for n in packed)
        work[rows] = passes * (rows * data.seq_len + max_tokens / 64)
    return min(work, key=work.__getitem__)


def _lengths(data: PairSource, pairs: np.ndarray) -> np.ndarray:
    return np.array([pair_lengths(data.row(int(pair))) for pair in pairs], dtype=np.int64).reshape(-1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def collate_pairs(
    pairs: Sequence[tuple[Document, Document]],
    pair_indices: Sequence[int] | np.ndarray,
    places: Sequence[Place],
    *,
    rows: int,
    seq_len: int,
    slots: int,
) -> Batch:
    """One micro-batch. B = `rows`, T = `seq_len`, P = `slots`, so that the shapes do not depend on what is in it.

    Args:
        pairs: The step's pairs.
        pair_indices: Number of each pair in the data.
        places: Where the documents of this micro-batch stand; none: an empty micro-batch.
        rows: Rows of the batch.
        seq_len: Tokens of a row.
        slots: Most pairs of a micro-batch.

    Returns:
        input_ids int64 [B, T]; labels int64 [B, T]: the next token where that is part of an answer, else -100;
        position_ids int64 [B, T]; document_ids int32 [B, T]: from 0 in each row, -1 on padding;
        answer_ids int64 [B, T]: 2·slot + side of the document that a position belongs to, 2·P on padding;
        last_tokens int64 [P, 2]: position of each document's last token in the flattened batch, -1 in empty slots;
        pair_weights float32 [P]: 1, or 0 in an empty slot; pair_indices int64 [P]: -1 in an empty slot.
    """
    batch: Batch = {
        "input_ids": np.zeros((rows, seq_len), dtype=np.int64),
        "labels": np.full((rows, seq_len), NO_LABEL, dtype=np.int64),
        "position_ids": np.zeros((rows, seq_len), dtype=np.int64),
        "document_ids": np.full((rows, seq_len), NO_DOCUMENT, dtype=np.int32),
        "answer_ids": np.full((rows, seq_len), 2 * slots, dtype=np.int64),
        "last_tokens": np.full((slots, 2), -1, dtype=np.int64),
        "pair_weights": np.zeros(slots, dtype=np.float32),
        "pair_indices": np.full(slots, -1, dtype=np.int64),
    }
    documents_in_row = [0] * rows
    for place in sorted(places, key=lambda p: (p.row, p.start)):
        document = pairs[place.pair][place.side]
        ids, n = document.input_ids, len(document.input_ids)
        where = (place.row, slice(place.start, place.start + n))
        batch["input_ids"][where] = ids
        batch["position_ids"][where] = np.arange(n)
        batch["document_ids"][where] = documents_in_row[place.row]
        batch["answer_ids"][where] = 2 * place.slot + place.side
        batch["labels"][place.row, place.start : place.start + n - 1] = np.where(
            document.is_answer[1:], ids[1:], NO_LABEL
        )
        batch["last_tokens"][place.slot, place.side] = place.row * seq_len + place.start + n - 1
        batch["pair_weights"][place.slot] = 1.0
        batch["pair_indices"][place.slot] = pair_indices[place.pair]
        documents_in_row[place.row] += 1
    return batch


def pair_statistics(batch: Batch) -> TokenStatistics:
    """Count a micro-batch; its weight is its number of pairs."""
    real = batch["document_ids"] >= 0
    return TokenStatistics(
        tokens=int(real.sum()),
        labels=int((batch["labels"] >= 0).sum()),
        label_weight=float(batch["pair_weights"].sum(dtype=np.float64)),
        attention_pairs=int((batch["position_ids"][real] + 1).sum()),
    )


def pair_window(
    data: PairSource, pair_indices: np.ndarray, *, rows: int, slots: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """This rank's micro-batches of the given pairs; every rank gets equally many."""
    packed = pack_pairs(_lengths(data, pair_indices), rows, data.seq_len)
    packed += [[] for _ in range(-len(packed) % world_size)]
    mine = packed[rank::world_size]
    needed = {place.pair for places in mine for place in places}
    pairs = {pair: documents_of(data.row(int(pair_indices[pair]))) for pair in needed}
    return [
        collate_pairs(pairs, pair_indices, places, rows=rows, seq_len=data.seq_len, slots=slots)  # type: ignore[arg-type]
        for places in mine
    ]


def pair_steps(
    data: PairSource,
    *,
    rows: int,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    start_sample: int = 0,
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of one optimizer step after the other, for ever.

    Step s takes the `global_batch_size` pairs from `start_sample + s · global_batch_size` on in the global order: the
    same ones at any number of ranks and rows.
    """
    order = GlobalOrder(len(data), seed)
    start = start_sample
    while True:
        pairs = order.indices(np.arange(start, start + global_batch_size, dtype=np.int64))
        yield pair_window(data, pairs, rows=rows, slots=global_batch_size, rank=rank, world_size=world_size)
        start += global_batch_size


def sequential_pairs(
    data: PairSource,
    *,
    rows: int,
    slots: int,
    rank: int = 0,
    world_size: int = 1,
    max_pairs: int | None = None,
) -> Iterator[Batch]:
    """Each pair once, for evaluation: this rank's micro-batches; every rank gets equally many."""
    n = len(data) if max_pairs is None else min(len(data), max_pairs)
    for start in range(0, n, slots):
        pairs = np.arange(start, min(start + slots, n))
        yield from pair_window(data, pairs, rows=rows, slots=slots, rank=rank, world_size=world_size)
