"""The look-up baseline: answer a held-out question with the answer of the most similar training question.

It shows what memorising alone is worth. A model that beats it by far has learnt something that it was not told.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from minigpt.evaluation.answers import Accuracy, is_correct, normalise

NGRAM_SIZES = (1, 2, 3)
CHUNK = 4096  # known questions compared at a time


def ngrams(text: str) -> Counter[str]:
    """Character 1- to 3-grams of a normalised text, with its ends marked."""
    marked = f"^{normalise(text)}$"
    return Counter(marked[i : i + n] for n in NGRAM_SIZES for i in range(len(marked) - n + 1))


def question_answer_pairs(records: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    """Every user turn of the training conversations and the assistant's turn after it, without repeats."""
    pairs: dict[tuple[str, str], None] = {}
    for record in records:
        messages = record["messages"]
        for asked, answered in pairwise(messages):
            if asked["role"] == "user" and answered["role"] == "assistant":
                pairs[asked["content"], answered["content"]] = None
    return list(pairs)


def nearest_neighbours(questions: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each question the index of the most similar known one: cosine of n-gram counts, the first one of equals."""
    asked = [ngrams(question) for question in questions]
    column = {gram: i for i, gram in enumerate(sorted(set().union(*asked)))}
    asked_QV = np.zeros((len(asked), len(column)), dtype=np.float32)
    for row, counts in zip(asked_QV, asked, strict=True):
        for gram, count in counts.items():
            row[column[gram]] = count
    best = np.full(len(asked), -1.0)
    index = np.zeros(len(asked), dtype=np.int64)
    for first in range(0, len(known), CHUNK):
        known_KV = np.zeros((len(known[first : first + CHUNK]), len(column)), dtype=np.float32)
        for row, text in zip(known_KV, known[first : first + CHUNK], strict=True):
            counts = ngrams(text)
            norm = math.sqrt(sum(count * count for count in counts.values()))
            for gram in counts.keys() & column.keys():  # n-grams that no question has add nothing to a product
                row[column[gram]] = counts[gram] / norm
        similarity_QK = asked_QV @ known_KV.T
        winner = similarity_QK.argmax(axis=1)
        score = similarity_QK[np.arange(len(asked)), winner]
        better = score > best
        best[better], index[better] = score[better], first + winner[better]
    return index.tolist()


def nearest_neighbour_baseline(
    train_records: Iterable[dict[str, Any]], heldout_records: Sequence[dict[str, Any]]
) -> Accuracy:
    """Accuracy of the look-up, counted in its favour.

    Args:
        train_records: {"messages"}: the conversations that a model is trained on.
        heldout_records: prompt records. Where `meta` has a "value" (what the answer says, without the sentence around
            it), a neighbour's answer that contains it counts as right, whomever it speaks of.
    """
    pairs = question_answer_pairs(train_records)
    questions = [record["messages"][-1]["content"] for record in heldout_records]
    neighbours = nearest_neighbours(questions, [question for question, _ in pairs])
    correct = 0
    for record, neighbour in zip(heldout_records, neighbours, strict=True):
        reply = pairs[neighbour][1]
        value = record["meta"].get("value")
        exact = is_correct(reply, record["answer"], record["verifier"])
        correct += exact or (value is not None and normalise(value) in normalise(reply))
    return Accuracy(correct, len(heldout_records))
