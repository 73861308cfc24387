"""What all evaluations have in common: how a model is asked, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from minigpt.errors import UserError

from .answers import wilson_interval

if TYPE_CHECKING:
    from minigpt.dataset.chat import ChatEncoder
    from minigpt.model.model_minigpt import MiniGPT

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""
SAMPLES_KEPT = 10  # replies of each kind, right and wrong, that a result keeps


@dataclass(frozen=True)
class Metric:
    """A number with its 95 % interval; `low` and `high` are NaN where nothing is known about its spread."""

    name: str
    value: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of_share(cls, name: str, value: float, n: int) -> Metric:
        """A mean of `n` numbers between 0 and 1, with Wilson's interval."""
        return cls(name, value, *wilson_interval(value, n))

    @classmethod
    def of_ratio(cls, name: str, numerators: np.ndarray, denominators: np.ndarray) -> Metric:
        """Σ numerators / Σ denominators over n independent texts.

        The interval is 1.96 standard errors of a ratio estimator (Cochran, Sampling Techniques, section 2.11).
        """
        n, total = len(numerators), float(denominators.sum())
        if not total:
            return cls(name, math.nan)
        ratio = float(numerators.sum()) / total
        if n < 2:
            return cls(name, ratio)
        half = 1.96 * math.sqrt(n / (n - 1) * float(np.square(numerators - ratio * denominators).sum())) / total
        return cls(name, ratio, ratio - half, ratio + half)


@dataclass(frozen=True)
class TaskResult:
    """What came of a task.

    Attributes:
        task: Its name.
        metrics: What was measured, the most telling first.
        n: Over how many questions or texts.
        details: Whatever else explains the numbers, ready for JSON.
        samples: Some of the replies: {"question", "expected", "reply", "right"}, right ones and wrong ones.
    """

    task: str
    metrics: list[Metric]
    n: int
    details: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The most telling metric."""
        return self.metrics[0].value

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return self.metrics[0].low, self.metrics[0].high


@dataclass(frozen=True)
class Settings:
    """How a model is asked.

    Args:
        limit: Only the first so many questions or texts (windows of long ones); None: all.
        max_new_tokens: A reply is cut here.
        samples: Replies to each question.
        k: pass@k is computed for each of these.
        temperature: Of sampling; 0 always takes the most probable token.
        enable_thinking: True and False switch thinking on and off; None leaves it to the model.
        shots: Solved examples before each multiple-choice question.
        chat: Whether multiple-choice questions are put as a chat instead of as plain text.
        context: Tokens of a window over a long text; None: as long as the model was made for, at most 2,048.
        batch_size: Replies generated together, and rows of text in one pass.
        seed: Of the random numbers.
    """

    limit: int | None = None
    max_new_tokens: int = 256
    samples: int = 1
    k: tuple[int, ...] = (1,)
    temperature: float = 0.0
    enable_thinking: bool | None = None
    shots: int = 0
    chat: bool = False
    context: int | None = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least 1")
        for name in ("limit", "context"):
            value = getattr(self, name)
            if value is not None and value < 1 + (name == "context"):
                raise UserError(f"--{name} is {value}, it must be at least {1 + (name == 'context')}")
        if self.shots < 0:
            raise UserError(f"--shots is {self.shots}, it must be at least 0")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}, it must be 0 (greedy) or greater")
        if self.samples > 1 and self.temperature == 0:
            raise UserError("--samples above 1 needs a --temperature above 0: without it all replies are the same")
        if not self.k or not all(1 <= k <= self.samples for k in self.k):
            raise UserError(f"--k is {list(self.k)}: each k must be from 1 to --samples, which is {self.samples}")


class Task(Protocol):
    """Something that a model can be judged by. Its data is read, and found good, when the task is made.

    Attributes:
        name: Names the result, in tables, metrics and files.
        source: Where its data is from, ready for JSON: path and fingerprint.
    """

    name: str
    source: dict[str, str]

    def run(
        self, model: MiniGPT, encoder: ChatEncoder, settings: Settings, progress: Progress | None = None
    ) -> TaskResult:
        """Judge a model."""


def keep_samples(judged: Sequence[tuple[bool, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The first right and the first wrong replies, each with `right`."""
    kept = []
    for wanted in (False, True):
        fitting = [sample for right, sample in judged if right is wanted][:SAMPLES_KEPT]
        kept += [{**sample, "right": wanted} for sample in fitting]
    return kept


def task_name(kind: str, path: Path) -> str:
    """`gsm8k-test` of test.jsonl; the file's own name where that says it already."""
    return path.stem if path.stem.casefold().startswith(kind) else f"{kind}-{path.stem}"


def fingerprint(*paths: Path) -> str:
    """SHA-256 over the contents of files, in the given order."""
    import hashlib

    from minigpt.dataset.shards import file_sha256

    digests = [file_sha256(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
