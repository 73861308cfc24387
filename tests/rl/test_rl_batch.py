"""Sampled answers in flat arrays: what is predicted where, against plain loops over sequences; order; nothing lost."""

import copy

import numpy as np
import pytest

from minigpt.generation.sampling import SamplingParams
from minigpt.rl.batch import NO_LABEL, RolloutBatch, micro_batches, pack_rows, partition, restore
from minigpt.rl.request import PromptRequest

ROW = 24


def make_batch(n: int, seed: int = 0, longest: int = ROW) -> RolloutBatch:
    """`n` sequences of random lengths (one of them with a single answer token, one as long as a row)."""
    rng = np.random.default_rng(seed)
    prompt_lens = rng.integers(1, longest // 2, n).astype(np.int32)
    answer_lens = rng.integers(1, longest // 2, n).astype(np.int32)
    answer_lens[0] = 1
    answer_lens[-1] = longest - prompt_lens[-1]
    answers = int(answer_lens.sum())
    return RolloutBatch(
        tokens=rng.integers(1, 1000, int(prompt_lens.sum()) + answers).astype(np.int32),
        prompt_lens=prompt_lens,
        answer_lens=answer_lens,
        sample_ids=np.arange(100, 100 + n),
        prompt_rows=rng.integers(0, 9, n),
        stopped=rng.integers(0, 2, n).astype(bool),
        behaviour_log_probs=rng.normal(size=answers).astype(np.float32),
        versions=rng.integers(0, 2, answers).astype(np.int32),
        columns={"advantages": rng.normal(size=answers).astype(np.float32)},
    )


def sequences(batch: RolloutBatch) -> list[dict[str, list]]:
    """The batch as a list of sequences, taken apart token by token."""
    found, token, answer = [], 0, 0
    for i in range(len(batch)):
        n, m = int(batch.prompt_lens[i]), int(batch.answer_lens[i])
        found.append(
            {
                "prompt": batch.tokens[token : token + n].tolist(),
                "answer": batch.tokens[token + n : token + n + m].tolist(),
                "behaviour": batch.behaviour_log_probs[answer : answer + m].tolist(),
                "versions": batch.versions[answer : answer + m].tolist(),
                "columns": {name: column[answer : answer + m].tolist() for name, column in batch.columns.items()},
                "facts": [int(batch.sample_ids[i]), int(batch.prompt_rows[i]), bool(batch.stopped[i])],
            }
        )
        token, answer = token + n + m, answer + m
    return found


def assert_unchanged(batch: RolloutBatch, before: RolloutBatch) -> None:
    for name, value in vars(batch).items():
        if name != "columns":
            assert np.array_equal(value, getattr(before, name)), name
    assert all(np.array_equal(batch.columns[name], before.columns[name]) for name in before.columns)


def frozen(batch: RolloutBatch) -> RolloutBatch:
    """As Ray hands it over: writing into it raises."""
    for array in [*(v for v in vars(batch).values() if isinstance(v, np.ndarray)), *batch.columns.values()]:
        array.flags.writeable = False
    return batch


@pytest.mark.parametrize("indices", [[], [3], [4, 0, 2], [0, 1, 2, 3, 4, 5, 6], [2, 2]], ids=str)
def test_taken_sequences_are_whole_and_in_the_order_asked_for(indices):
    batch = frozen(make_batch(7))
    whole = sequences(batch)
    assert sequences(batch.take(np.array(indices, dtype=np.int64))) == [whole[i] for i in indices]


def test_concatenated_parts_are_the_batch():
    batch = make_batch(7)
    parts = [batch.take(np.array(part, dtype=np.int64)) for part in ([0, 1, 2], [], [3], [4, 5, 6])]
    assert sequences(RolloutBatch.concatenate(parts)) == sequences(batch)


def test_answers_are_those_of_the_sequences():
    batch = make_batch(7)
    expected = [one["answer"] for one in sequences(batch)]
    assert [ids.tolist() for ids in batch.answers()] == expected


def test_a_padded_column_holds_each_answer_in_its_row():
    batch = make_batch(6)
    rectangle, mask = batch.padded(batch.behaviour_log_probs)
    assert [row[kept].tolist() for row, kept in zip(rectangle, mask, strict=True)] == [
        one["behaviour"] for one in sequences(batch)
    ]
    assert not rectangle[~mask].any()
    assert np.array_equal(rectangle[mask], batch.behaviour_log_probs), "and comes back by the mask"


def test_one_value_a_sequence_is_spread_over_its_answer():
    batch = make_batch(4)
    spread = batch.spread(np.array([1.0, 2.0, 3.0, 4.0]))
    assert spread.tolist() == [float(i + 1) for i in range(4) for _ in range(batch.answer_lens[i])]


# ------------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_shares_hold_every_sequence_once_and_are_put_back_in_order(workers):
    """5 sequences on 1 to 8 workers: also where they do not divide, and where some workers get nothing."""
    batch = make_batch(5)
    parts = partition(batch.lengths, workers)
    assert sorted(np.concatenate(parts).tolist()) == list(range(5))
    results = [batch.take(part).behaviour_log_probs for part in parts]
    assert np.array_equal(restore(parts, results, batch.answer_lens), batch.behaviour_log_probs)
    one_a_sequence = [batch.sample_ids[part] for part in parts]
    assert np.array_equal(restore(parts, one_a_sequence, np.ones(5, dtype=np.int64)), batch.sample_ids)


def test_shares_are_about_equally_long():
    lengths = np.random.default_rng(0).integers(1, 400, 64)
    loads = [int(lengths[part].sum()) for part in partition(lengths, 4)]
    assert max(loads) - min(loads) <= lengths.max()
    assert max(loads) < 1.05 * min(loads)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_prompts_are_dealt_to_the_same_workers_whoever_asks(workers):
    lengths = np.array([3, 1, 2, 4, 1], dtype=np.int32)
    request = PromptRequest(
        np.arange(11, dtype=np.int32), lengths, np.arange(5), 10 * np.arange(5), 4, SamplingParams(), 3
    )
    prompts = np.split(request.tokens, np.cumsum(lengths)[:-1])
    dealt = {}
    for rank in range(workers):
        share = request.share(rank, workers)
        assert (share.samples, share.version) == (4, 3)
        ids = np.split(share.tokens, np.cumsum(share.prompt_lens)[:-1]) if len(share.prompt_lens) else []
        for row, first, prompt in zip(share.prompt_rows, share.first_sample_ids, ids, strict=True):
            assert first == 10 * row
            assert np.array_equal(prompt, prompts[row])
            dealt[int(row)] = rank
    assert dealt == {row: row % workers for row in range(5)}


# ------------------------------------------------------------------------------------------------------- packed rows


def test_rows_hold_every_sequence_once_and_none_is_too_full():
    lengths = np.random.default_rng(1).integers(1, ROW + 1, 200)
    rows = pack_rows(lengths, ROW)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(lengths[row].sum() <= ROW for row in rows)
    assert len(rows) <= 1.05 * np.ceil(lengths.sum() / ROW), "and they are nearly full"


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="25 tokens does not fit a row of 24"):
        pack_rows(np.array([3, 25]), ROW)


@pytest.mark.parametrize(("rows", "fixed_shape"), [(1, False), (3, True), (100, False)], ids=str)
def test_each_answer_token_is_the_label_of_the_place_that_predicts_it(rows, fixed_shape):
    """By a walk through the rows, against the sequences: labels, positions, documents and columns."""
    batch = frozen(make_batch(11))
    before = copy.deepcopy(batch)
    seen: dict[int, list] = {}
    for one in micro_batches(batch, ROW, rows, batch.columns, fixed_shape=fixed_shape):
        arrays = one.arrays
        assert arrays["input_ids"].shape[1] == ROW
        assert len(arrays["input_ids"]) == rows if fixed_shape else len(arrays["input_ids"]) <= rows
        labelled = []
        for b in range(len(arrays["input_ids"])):
            for document in range(arrays["document_ids"][b].max() + 1):
                here = np.flatnonzero(arrays["document_ids"][b] == document)
                assert np.array_equal(here, np.arange(here[0], here[-1] + 1)), "a document is in one piece"
                assert np.array_equal(arrays["position_ids"][b, here], np.arange(len(here)))
                ids, labels = arrays["input_ids"][b, here], arrays["labels"][b, here]
                number = int(arrays["sequence_ids"][b, here[0]])
                assert (arrays["sequence_ids"][b, here] == number).all()
                answer = np.flatnonzero(labels != NO_LABEL)
                assert np.array_equal(labels[answer], ids[answer + 1]), "the label is the next token of the sequence"
                seen[number] = [
                    ids[: answer[0] + 1].tolist(),
                    labels[answer].tolist(),
                    arrays["advantages"][b, here[answer]].tolist(),
                ]
                assert not arrays["advantages"][b, here[labels == NO_LABEL]].any()
                labelled += [b * ROW + p for p in here[answer]]
            padding = arrays["document_ids"][b] < 0
            assert (arrays["labels"][b, padding] == NO_LABEL).all()
        assert sorted(one.positions.tolist()) == sorted(labelled)
        labels = arrays["labels"].reshape(-1)[one.positions]
        assert np.array_equal(labels, np.concatenate(batch.answers())[one.answer_tokens])
    expected = sequences(batch)
    assert seen == {i: [s["prompt"], s["answer"], s["columns"]["advantages"]] for i, s in enumerate(expected)}
    assert_unchanged(batch, before)


def test_every_answer_token_is_in_exactly_one_pass():
    batch = make_batch(11)
    passes = micro_batches(batch, ROW, 2, {})
    assert len(passes) > 1
    tokens = np.concatenate([one.answer_tokens for one in passes])
    assert sorted(tokens.tolist()) == list(range(len(batch.behaviour_log_probs)))


def test_passes_without_sequences_fill_up_the_number_that_all_ranks_make():
    batch = make_batch(3)
    passes = micro_batches(batch, ROW, 100, batch.columns, at_least=3)
    assert len(passes) == 3
    for empty in passes[1:]:
        assert not len(empty.positions)
        assert (empty.arrays["document_ids"] < 0).all()
        assert empty.arrays["input_ids"].shape == (1, ROW), "a row all the same: the model runs it"
        assert (empty.arrays["labels"] == NO_LABEL).all()
    nothing = batch.take(np.zeros(0, dtype=np.int64))
    (only,) = micro_batches(nothing, ROW, 2, nothing.columns, at_least=1)
    assert not len(only.positions)
    assert (only.arrays["document_ids"] < 0).all()
    assert only.arrays["advantages"].shape == (1, ROW)
