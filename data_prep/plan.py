"""The plan of a packed dataset: which documents are kept, which split they go to, which row holds which tokens.

Everything here is a pure function of small integer arrays (a few dozen bytes a document), so the plan, and with it
every byte of the output, depends on neither the number of workers nor on what was interrupted when.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

MIN_FILL = 0.995


@dataclass(frozen=True)
class Rows:
    """Rows made of pieces of documents: row r holds pieces `offsets[r]:offsets[r + 1]`, one after the other.

    Args:
        offsets: int64 [rows + 1].
        document: int64 [pieces].
        start: first token of the piece within its document, int64 [pieces].
        length: tokens of the piece, int64 [pieces].
    """

    offsets: np.ndarray
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def first_occurrences(digests: np.ndarray) -> np.ndarray:
    """True for the documents whose digest no earlier document has. uint64 [documents, 2] → bool [documents]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests stay in their original order
    ordered = digests[order]
    repeated = np.zeros(len(digests), dtype=bool)
    repeated[1:] = (ordered[1:] == ordered[:-1]).all(axis=1)
    first = np.ones(len(digests), dtype=bool)
    first[order[repeated]] = False
    return first


def choose_valid(digests: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """True for the documents of the validation split, decided by each document's own digest.

    So a document stays in its split when others are added or removed. When there are at least two different documents
    and `fraction` is above 0, both splits get at least one. uint64 [documents, 2] → bool [documents].
    """
    if fraction <= 0 or len(digests) < 2:
        return np.zeros(len(digests), dtype=bool)
    place = (digests[:, 0] ^ np.uint64(seed % (1 << 64))) * np.uint64(0x9E3779B97F4A7C15)
    valid = (place >> np.uint64(11)).astype(np.float64) / 2.0**53 < fraction
    if not valid.any():
        valid[np.argmin(place)] = True
    if valid.all():
        valid[np.argmax(place)] = False
    return valid


def one_row_each(lengths: np.ndarray) -> Rows:
    """Every document a row of its own (preference pairs and prompts)."""
    n = len(lengths)
    return Rows(np.arange(n + 1), np.arange(n), np.zeros(n, dtype=np.int64), np.asarray(lengths, dtype=np.int64))


def pack_whole(lengths: np.ndarray, seq_len: int) -> Rows:
    """Documents of at most `seq_len` tokens into rows, none cut (conversations). int64 [documents] → rows."""
    documents = np.arange(len(lengths))
    return _rows(best_fit_decreasing(lengths, seq_len), documents, np.zeros_like(documents), lengths)


def pack_with_splits(lengths: np.ndarray, seq_len: int, min_fill: float = MIN_FILL) -> Rows:
    """Documents of any length into rows that are at least `min_fill` full, no token lost. int64 [documents] → rows.

    Documents longer than a row give full rows and a rest; all pieces are packed best-fit-decreasing
    (Ding et al. 2024, "Fewer truncations improve language modeling", https://arxiv.org/abs/2404.10830). Where lengths
    do not match well enough, the emptiest rows are dissolved and their tokens fill the largest gaps of the others.
    """
    document, start, length = _cut(lengths, seq_len)
    row = best_fit_decreasing(length, seq_len)
    tokens = int(length.sum())
    wanted = max(-(-tokens // seq_len), int(tokens / (min_fill * seq_len)))
    if tokens and row.max() + 1 > wanted:
        row, document, start, length = _dissolve(row, document, start, length, seq_len, wanted)
    return _rows(row, document, start, length)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: longest pieces first, each into the fullest row that still has room for it.

    Equal lengths are placed together and rows with equal room are kept together, so the time depends on the number of
    different lengths, not of pieces. int64 [pieces], each ≤ capacity → int64 [pieces].
    """
    rows = np.zeros(len(lengths), dtype=np.int64)
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    open_rows = _OpenRows(capacity)
    cuts = np.flatnonzero(np.diff(lengths[order])) + 1
    for items in np.split(order, cuts):
        while len(items):
            length = int(lengths[items[0]])
            room, candidates = open_rows.take_fullest(length, len(items))
            each = room // length
            placed = min(len(items), each * len(candidates))
            used = -(-placed // each)
            rows[items[:placed]] = np.repeat(candidates[:used], each)[:placed]
            items = items[placed:]
            in_last = placed - (used - 1) * each
            open_rows.put(room - each * length, candidates[: used - 1])
            open_rows.put(room - in_last * length, candidates[used - 1 : used])
            open_rows.put(room, candidates[used:])
    return rows


class _OpenRows:
    """Rows grouped by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self.by_room: dict[int, list[np.ndarray]] = {}
        self.rooms: list[int] = []  # sorted keys of by_room

    def take_fullest(self, length: int, n_pieces: int) -> tuple[int, np.ndarray]:
        """Take all rows with the least room ≥ `length`; when there are none, open enough for `n_pieces`."""
        at = bisect_left(self.rooms, length)
        if at < len(self.rooms):
            room = self.rooms.pop(at)
            return room, np.concatenate(self.by_room.pop(room))
        n_new = -(-n_pieces // (self.capacity // length))
        self.count += n_new
        return self.capacity, np.arange(self.count - n_new, self.count)

    def put(self, room: int, rows: np.ndarray) -> None:
        if room == 0 or len(rows) == 0:
            return
        if room not in self.by_room:
            self.by_room[room] = []
            insort(self.rooms, room)
        self.by_room[room].append(rows)


def _cut(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut documents every `seq_len` tokens: (document, start, length) of each piece."""
    lengths = np.asarray(lengths, dtype=np.int64)
    n_pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), n_pieces)
    first_piece = np.cumsum(n_pieces) - n_pieces
    start = (np.arange(len(document)) - np.repeat(first_piece, n_pieces)) * seq_len
    return document, start, np.minimum(seq_len, lengths[document] - start)


def _dissolve(
    row: np.ndarray, document: np.ndarray, start: np.ndarray, length: np.ndarray, seq_len: int, wanted: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Spread the emptiest rows over the gaps of the `wanted` fullest ones, cutting pieces where gaps end.

    The tokens of the dissolved pieces and the gaps, largest first, are two lines of the same length laid side by
    side; each piece is cut wherever either line has a boundary.
    """
    fill = np.bincount(row, weights=length).astype(np.int64)
    by_fill = np.argsort(-fill, kind="stable")
    kept_rows = np.sort(by_fill[:wanted])
    new_number = np.full(len(fill), -1)
    new_number[kept_rows] = np.arange(wanted)
    moving = np.flatnonzero(new_number[row] < 0)
    gaps = seq_len - fill[kept_rows]
    gap_order = np.argsort(-gaps, kind="stable")

    piece_ends = np.cumsum(length[moving])
    gap_ends = np.cumsum(gaps[gap_order])
    ends = np.union1d(piece_ends, gap_ends[gap_ends < piece_ends[-1]])
    begins = np.concatenate([[0], ends[:-1]])
    piece = np.searchsorted(piece_ends, begins, side="right")
    gap = np.searchsorted(gap_ends, begins, side="right")
    piece_begins = piece_ends - length[moving]

    stays = new_number[row] >= 0
    return (
        np.concatenate([new_number[row[stays]], gap_order[gap]]),
        np.concatenate([document[stays], document[moving][piece]]),
        np.concatenate([start[stays], start[moving][piece] + begins - piece_begins[piece]]),
        np.concatenate([length[stays], ends - begins]),
    )


def _rows(row: np.ndarray, document: np.ndarray, start: np.ndarray, length: np.ndarray) -> Rows:
    order = np.argsort(row, kind="stable")
    n_rows = int(row.max()) + 1 if len(row) else 0
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=n_rows))]).astype(np.int64)
    return Rows(offsets, document[order], start[order], np.asarray(length, dtype=np.int64)[order])
