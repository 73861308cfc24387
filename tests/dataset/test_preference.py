"""Batches of pairs: which pairs, where their documents stand, and that nothing else decides what is learnt."""

from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest

from minigpt.dataset.preference import (
    choose_rows,
    documents_of,
    pack_pairs,
    pair_lengths,
    pair_statistics,
    pair_steps,
    pair_window,
    sequential_pairs,
)
from minigpt.dataset.shards import GlobalOrder, PreferenceRow
from minigpt.errors import UserError

SEQ_LEN = 64


@dataclass
class Pairs:
    """Made-up pairs: answer ids from 100 on, prompt ids below, a last token without weight behind every answer."""

    n: int
    seq_len: int = SEQ_LEN
    longest: int = 30

    def __len__(self) -> int:
        return self.n

    def row(self, index: int) -> PreferenceRow:
        rng = np.random.default_rng(index)
        prompt = rng.integers(1, 100, rng.integers(1, self.longest))
        sides = [rng.integers(100, 1000, rng.integers(1, self.longest)) for _ in range(2)]
        ids = [np.append(side, 7).astype(np.uint16) for side in sides]
        codes = [np.append(np.ones(len(side)), 0).astype(np.uint8) for side in sides]
        return PreferenceRow(prompt.astype(np.uint16), *ids, *codes)


def answers_in(batch) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """(pair, side) → (all tokens, label tokens) of the documents of a batch, read back from its arrays."""
    found = {}
    slots = len(batch["pair_indices"])
    for row in range(len(batch["input_ids"])):
        for answer in dict.fromkeys(batch["answer_ids"][row].tolist()):
            if answer == 2 * slots:
                continue
            where = batch["answer_ids"][row] == answer
            assert len(set(batch["document_ids"][row][where])) == 1
            assert batch["position_ids"][row][where].tolist() == list(range(where.sum()))
            labels = batch["labels"][row][where]
            pair = int(batch["pair_indices"][answer // 2])
            found[pair, answer % 2] = (batch["input_ids"][row][where].tolist(), labels[labels >= 0].tolist())
            last = batch["last_tokens"][answer // 2, answer % 2]
            assert last == row * batch["input_ids"].shape[1] + np.flatnonzero(where)[-1]
    return found


def test_a_batch_holds_prompt_and_answer_of_both_sides_and_labels_on_the_answers_alone():
    data = Pairs(40)
    (batch,) = pair_window(data, np.arange(12), rows=24, slots=20)
    found = answers_in(batch)
    assert len(found) == 24
    for index in range(12):
        row = data.row(index)
        for side, ids in enumerate((row.chosen_ids, row.rejected_ids)):
            answer = ids[:-1].tolist()  # the last token has no weight: nothing is read there
            assert found[index, side] == (row.prompt_ids.tolist() + answer, answer)
    assert batch["pair_weights"].sum() == 12
    assert batch["pair_indices"][12:].tolist() == [-1] * 8
    assert (batch["last_tokens"][12:] == -1).all()
    padding = batch["document_ids"] < 0
    assert (batch["labels"][padding] == -100).all()
    statistics = pair_statistics(batch)
    lengths = np.array([len(ids) for ids, _ in found.values()])
    assert statistics.tokens == lengths.sum() == sum(sum(pair_lengths(data.row(i))) for i in range(12))
    assert statistics.labels == sum(len(labels) for _, labels in found.values())
    assert statistics.attention_pairs == (lengths * (lengths + 1) // 2).sum()
    assert statistics.label_weight == 12


def test_user_turns_inside_an_answer_carry_no_label():
    codes = np.array([1, 0, 0, 1, 0], dtype=np.uint8)
    row = PreferenceRow(np.array([5]), np.arange(10, 15), np.arange(20, 25), codes, codes)
    chosen, _ = documents_of(row)
    assert chosen.input_ids.tolist() == [5, 10, 11, 12, 13]
    assert chosen.is_answer.tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_packing_keeps_pairs_together_and_never_overlaps(rows):
    rng = np.random.default_rng(rows)
    lengths = rng.integers(2, SEQ_LEN + 1, (200, 2))
    batches = pack_pairs(lengths, rows, SEQ_LEN)
    seen = []
    for places in batches:
        used = np.zeros((rows, SEQ_LEN), dtype=int)
        slots: dict[int, set[int]] = {}
        for place in places:
            end = place.start + lengths[place.pair, place.side]
            assert end <= SEQ_LEN
            used[place.row, place.start : end] += 1
            slots.setdefault(place.pair, set()).add(place.slot)
        assert used.max() == 1
        assert all(len(s) == 1 for s in slots.values())
        assert sorted(next(iter(s)) for s in slots.values()) == list(range(len(slots)))
        pairs = [place.pair for place in places]
        assert all(pairs.count(pair) == 2 for pair in pairs)
        seen += list(slots)
    assert sorted(seen) == list(range(200))


def test_rows_are_full_but_for_the_last_micro_batch_of_a_step():
    """256 pairs of 40 tokens a side on average, in rows of 256: small passes waste little, the chosen ones 6 %."""
    data = Pairs(600, seq_len=256, longest=40)
    chosen = choose_rows(data, pairs_per_step=256, world_size=1, max_tokens=4096)
    for rows, fill in ((2, 0.97), (4, 0.96), (chosen, 0.92)):
        tokens = positions = 0
        for window in islice(pair_steps(data, rows=rows, global_batch_size=256), 8):
            tokens += sum(pair_statistics(batch).tokens for batch in window)
            positions += len(window) * rows * 256
        assert tokens / positions >= fill


@pytest.mark.parametrize(("lengths", "rows", "fits"), [((64, 64), 2, True), ((64, 1), 1, False), ((40, 24), 1, True)])
def test_a_pass_that_cannot_hold_a_pair_is_refused_with_the_remedy(lengths, rows, fits):
    if fits:
        assert len(pack_pairs(np.array([lengths]), rows, SEQ_LEN)) == 1
        return
    with pytest.raises(UserError, match="--micro_batch_size 2"):
        pack_pairs(np.array([lengths]), rows, SEQ_LEN)


@pytest.mark.parametrize("rows", [2, 4, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_takes_the_same_pairs_at_any_world_size_and_micro_batch(rows, world_size):
    """Also the same documents token by token; every rank has equally many batches, all of one shape."""
    data, order = Pairs(50), GlobalOrder(50, seed=3)
    for step in range(7):
        ranks = []
        for rank in range(world_size):
            steps = pair_steps(data, rows=rows, global_batch_size=10, rank=rank, world_size=world_size, seed=3)
            ranks.append(next(islice(steps, step, None)))
        assert len({len(window) for window in ranks}) == 1
        batches = [batch for window in ranks for batch in window]
        assert len({tuple((name, array.shape) for name, array in batch.items()) for batch in batches}) == 1
        found: dict = {}
        for batch in batches:
            assert not found.keys() & answers_in(batch).keys()
            found |= answers_in(batch)
        expected = [order.index(10 * step + i) for i in range(10)]
        assert sorted(pair for pair, side in found if side == 0) == sorted(expected)
        (whole,) = pair_window(data, np.array(expected), rows=32, slots=10)
        assert found == answers_in(whole)


def test_resuming_goes_on_with_the_next_pairs():
    data = Pairs(30)
    whole = list(islice(pair_steps(data, rows=4, global_batch_size=8), 6))
    later = list(islice(pair_steps(data, rows=4, global_batch_size=8, start_sample=24), 3))
    for expected, found in zip(whole[3:], later, strict=True):
        for a, b in zip(expected, found, strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("max_pairs", [None, 13])
def test_evaluation_sees_every_pair_once(world_size, max_pairs):
    data = Pairs(23)
    seen, batches = [], []
    for rank in range(world_size):
        mine = list(sequential_pairs(data, rows=4, slots=8, rank=rank, world_size=world_size, max_pairs=max_pairs))
        batches.append(len(mine))
        seen += [int(i) for batch in mine for i in batch["pair_indices"] if i >= 0]
    assert sorted(seen) == list(range(max_pairs or 23))
    assert len(set(batches)) == 1


def test_rows_of_a_pass_are_many_where_that_costs_no_padding_and_few_where_it_would():
    data = Pairs(600)
    assert choose_rows(data, pairs_per_step=512, world_size=1, max_tokens=SEQ_LEN * 32) >= 8
    assert 2 <= choose_rows(data, pairs_per_step=4, world_size=1, max_tokens=SEQ_LEN * 32) <= 6
    assert choose_rows(data, pairs_per_step=512, world_size=1, max_tokens=1) == 2
