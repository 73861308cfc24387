"""Reading answers: what a model's reply says, whether it is right, and how sure an accuracy is.

Plain text in, numbers out: nothing here knows a model, a tokenizer or torch.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.errors import UserError

ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
THOUGHT = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
VERIFIERS = ("exact", "math")


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
        """Wilson's score interval (1927), 95 % at `z` = 1.96. Unlike the normal one it holds at 0 % and 100 %."""
        if not self.total:
            return 0.0, 1.0
        n, p = self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.value:.1%} ({self.correct}/{self.total}, 95 % interval {low:.1%} to {high:.1%})"


def extract_answer(reply: str) -> str:
    """The text in the last `<answer>…</answer>`, otherwise the reply without its `<think>…</think>`."""
    answers = ANSWER.findall(reply)
    return (answers[-1] if answers else THOUGHT.sub("", reply)).strip()


def normalise(text: str) -> str:
    """Case, full-width forms, spaces and a final full stop do not make an answer wrong."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(" .。!")


def last_number(text: str) -> float | None:
    """The last number of a text, without thousands separators."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def is_correct(reply: str, answer: str, verifier: str) -> bool:
    """Whether a reply gives the expected answer.

    Args:
        reply: what the model wrote, with or without tags.
        answer: what is right.
        verifier: "exact" compares normalised texts, "math" the last number of each.

    Raises:
        UserError: for a verifier that cannot decide from these texts alone.
    """
    said = extract_answer(reply)
    if verifier == "math":
        expected = last_number(answer)
        return expected is not None and last_number(said) == expected
    if verifier == "exact":
        return normalise(said) == normalise(answer)
    raise UserError(f"answers with the verifier {verifier!r} cannot be compared; known here: {', '.join(VERIFIERS)}")


def read_prompt_records(path: Path | str) -> list[dict[str, Any]]:
    """Prompt records from a jsonl file: {"messages", "answer", "verifier", "meta"} on each line.

    Raises:
        FileNotFoundError: when there is no such file.
        UserError: naming file and line of one that is not such a record, or the file when it is empty.
    """
    records = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number} is not valid JSON ({error.msg}); mend or delete the line") from None
            missing = [key for key in ("messages", "answer") if key not in record]
            if missing:
                raise UserError(f"{path}:{number} has no {' and no '.join(missing)}; a prompt record needs both")
            records.append({"verifier": "exact", "meta": {}} | record)
    if not records:
        raise UserError(f"{path} holds no prompt records; name a file with one JSON object a line")
    return records


def group_accuracy(records: Sequence[dict[str, Any]], correct: Sequence[bool], key: str) -> dict[str, Accuracy]:
    """Accuracy by a field of the records' `meta`, in order of first appearance."""
    groups: dict[str, list[bool]] = {}
    for record, right in zip(records, correct, strict=True):
        groups.setdefault(str(record["meta"].get(key, "")), []).append(right)
    return {name: Accuracy(sum(rights), len(rights)) for name, rights in groups.items()}
