"""The look-up baseline finds what a plain search finds, and is counted in its favour."""

import math
from collections import Counter

from minigpt.evaluation.answers import normalise
from minigpt.evaluation.nearest_neighbour import (
    CHUNK,
    nearest_neighbour_baseline,
    nearest_neighbours,
    question_answer_pairs,
)


def conversation(*turns: str) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def slow_similarity(a: str, b: str) -> float:
    """Cosine of the 1- to 3-gram counts, by its definition."""

    def counts(text: str) -> Counter:
        marked = f"^{normalise(text)}$"
        grams: Counter = Counter()
        for n in (1, 2, 3):
            for i in range(len(marked) - n + 1):
                grams[marked[i : i + n]] += 1
        return grams

    x, y = counts(a), counts(b)
    dot = sum(x[g] * y[g] for g in x)
    return dot / math.sqrt(sum(v * v for v in x.values()) * sum(v * v for v in y.values()))


def test_neighbours_equal_a_plain_search():
    known = [f"What is {a} + {b}?" for a in range(10, 99, 7) for b in range(10, 99, 5)]
    known += [f"{a}加{b}是多少？" for a in range(11, 99, 6) for b in range(10, 99, 9)]
    known = known * (CHUNK // len(known) + 2)  # more than one chunk; the first of equals must win
    questions = ["What is 55 + 66?", "23加91是多少？", "Where does Mei live?", "zzz", "What is 17 + 10?"]
    found = nearest_neighbours(questions, known)
    distinct = list(dict.fromkeys(known))
    for question, index in zip(questions, found, strict=True):
        best = max(slow_similarity(question, other) for other in distinct)
        assert math.isclose(slow_similarity(question, known[index]), best, rel_tol=1e-5)
        assert index < len(distinct)


def test_pairs_are_turns_in_order_without_repeats():
    records = [conversation("a", "b", "c", "d"), conversation("a", "b"), conversation("a", "e")]
    assert question_answer_pairs(records) == [("a", "b"), ("c", "d"), ("a", "e")]


def test_baseline_counts_a_value_in_another_sentence():
    train = [
        conversation("Where does Mei live?", "Mei lives in Willow Bay."),
        conversation("What is Mei's pet?", "Mei has a cat."),
    ]

    def heldout(question: str, answer: str, **meta: str) -> dict:
        return conversation(question) | {"answer": answer, "verifier": "exact", "meta": meta}

    asked = [
        heldout("Where does Mia live?", "Mia lives in Willow Bay.", value="Willow Bay"),  # right by chance
        heldout("Where does Max live?", "Max lives in Oak Hill.", value="Oak Hill"),
        heldout("What is Mei's pet?", "Mei has a cat."),  # the very question: a look-up gets it
        heldout("What is Tom's pet?", "Tom has a cat."),  # no value named: the sentence must be the same
    ]
    result = nearest_neighbour_baseline(train, asked)
    assert (result.correct, result.total) == (2, 4)
