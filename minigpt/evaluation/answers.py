"""Reading answers: what a model's reply says, whether it is right, and how sure an accuracy is.

Plain text in, numbers out: nothing here knows a model, a tokenizer or torch.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from minigpt.dataset.expressions import work_out
from minigpt.errors import UserError

ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
# In `20-5` the sign is an operation, in `size-12` a hyphen; `3/4` is one number.
NUMBER = re.compile(r"(?:(?<![0-9A-Za-z)])-)?[0-9][0-9,]*(?:\.[0-9]+)?(?:/0*[1-9][0-9]*(?![0-9.,]))?")
EXPRESSION = re.compile(r"[\d(][\d ()+\-*/]*[\d)]|\d")
FULL_WIDTH = str.maketrans("０１２３４５６７８９．，－／−–", "0123456789.,-/--")
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
VERIFIERS = ("exact", "math", "countdown")


@dataclass(frozen=True)
class Accuracy:
    """How many of `total` answers were right."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The share of right answers; NaN without any question."""
        return self.correct / self.total if self.total else math.nan

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """See `wilson_interval`."""
        return wilson_interval(self.value, self.total, z)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.1%} ({self.correct}/{self.total}, 95 % interval {low:.1%} to {high:.1%})"


def wilson_interval(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share `p` of `n`, 95 % at z = 1.96. It holds at 0 % and 100 % too.

    For a mean of numbers between 0 and 1 instead of zeros and ones (pass@k of each question) it is on the safe side,
    since nothing between 0 and 1 varies more than zeros and ones of the same mean.
    """
    if not n:
        return 0.0, 1.0
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of `k` replies is right, from `samples` replies of which `correct` were: unbiased.

    1 - C(samples - correct, k) / C(samples, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    """
    assert 0 <= correct <= samples
    assert 1 <= k <= samples
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def extract_answer(reply: str) -> str:
    """Of the reply without its `<think>…</think>` the text in the last `<answer>…</answer>`, otherwise all of it."""
    said = THOUGHT.sub("", reply)
    answers = ANSWER.findall(said)
    return (answers[-1] if answers else said).strip()


def normalise(text: str) -> str:
    """Case, full-width forms, spaces and a final full stop do not make an answer wrong."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(" .。!")


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly, without thousands separators: `-7`, `1,234.5`, `3/4`."""
    found = NUMBER.findall(text.translate(FULL_WIDTH))
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").partition("/")
    return Fraction(Decimal(above)) / Fraction(Decimal(below or "1"))  # Decimal takes any number of digits


def solves_countdown(said: str, nums: Sequence[int], target: int) -> bool:
    """Whether the last expression of a text uses each of `nums` exactly once and makes `target`, in exact arithmetic.

    `(3 + 4) * 2 = 14` counts as its left side. Nothing is executed.
    """
    found = EXPRESSION.findall(unicodedata.normalize("NFKC", said).translate(SIGNS))
    written = [text for text in found if re.search(r"[-+*/]", text)] or found
    if not written:
        return False
    try:
        worked_out = work_out(written[-1])
    except ValueError:
        return False
    return worked_out.value == target and Counter(worked_out.numbers) == Counter(nums)


def is_correct(reply: str, answer: str, verifier: str, meta: Mapping[str, Any] | None = None) -> bool:
    """Whether a reply gives the expected answer.

    Args:
        reply: what the model wrote, with or without tags.
        answer: what is right.
        verifier: "exact" compares normalised texts, "math" the last number of each, "countdown" works the reply out.
        meta: of the record; countdown needs its "nums" and "target".

    Raises:
        UserError: for a verifier that is unknown.
    """
    said = extract_answer(reply)
    if verifier == "math":
        expected = last_number(answer)
        return expected is not None and last_number(said) == expected
    if verifier == "exact":
        return normalise(said) == normalise(answer)
    if verifier == "countdown":
        assert meta is not None
        return solves_countdown(said, meta["nums"], meta["target"])
    raise UserError(f"answers with the verifier {verifier!r} cannot be compared; known here: {', '.join(VERIFIERS)}")


def read_prompt_records(path: Path | str) -> list[dict[str, Any]]:
    """Prompt records of a JSON Lines file (or JSON array): {"messages", "answer", "verifier", "meta"} each.

    Every layout that `minigpt.dataset.records` knows as a prompt: our own records, GSM8K (question, answer with
    `####`), countdown (nums, target).

    Raises:
        UserError: when there is no such file or it is empty, or naming file and line of what is not such a record.
    """
    from minigpt.dataset.lm_dataset import read_jsonl

    records = list(read_jsonl(path, "prompt"))
    unanswered = sum(record["verifier"] == "none" for record in records)
    if unanswered:
        raise UserError(f"{path}: {unanswered} of {len(records)} records hold no answer to compare with; take them out")
    return records


def group_accuracy(records: Sequence[dict[str, Any]], correct: Sequence[bool], key: str) -> dict[str, Accuracy]:
    """Accuracy by a field of the records' `meta`, in order of first appearance."""
    groups: dict[str, list[bool]] = {}
    for record, right in zip(records, correct, strict=True):
        groups.setdefault(str(record["meta"].get(key, "")), []).append(right)
    return {name: Accuracy(sum(rights), len(rights)) for name, rights in groups.items()}
