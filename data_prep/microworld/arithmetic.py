"""Sums with two-digit numbers and their steps, worked out digit by digit as at school."""

import re
from dataclasses import dataclass

from data_prep.microworld.rng import Stream
from data_prep.microworld.world import Lang

LOW, HIGH = 10, 99
# A sum of two two-digit numbers in any wording of this module: 47 + 38, 47+38, 47加38, 47 plus 38, 47 and 38 …
WRITTEN_SUM = re.compile(
    r"(?<!\d)(\d\d)(?:\s*(?:\+|-|加上?|减去?|和|与)\s*|\s+(?:plus|minus|and|from|to)\s+)(\d\d)(?!\d)"
)

QUESTIONS: dict[str, dict[Lang, tuple[str, ...]]] = {
    "+": {
        "en": ("What is {a} + {b}?", "How much is {a} plus {b}?", "Please add {a} and {b}.", "{a} + {b} = ?"),
        "zh": ("{a} + {b} 等于多少？", "{a}加{b}是多少？", "请算一算{a}加{b}。", "{a} + {b} = ?"),
    },
    "-": {
        "en": ("What is {a} - {b}?", "How much is {a} minus {b}?", "Please subtract {b} from {a}.", "{a} - {b} = ?"),
        "zh": ("{a} - {b} 等于多少？", "{a}减{b}是多少？", "请算一算{a}减{b}。", "{a} - {b} = ?"),
    },
}


@dataclass(frozen=True)
class Sum:
    """`a + b` or `a - b` with two-digit operands (and `a >= b` for `-`)."""

    a: int
    op: str
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b

    @property
    def pair(self) -> tuple[int, int]:
        """The operands without order: 47 + 38, 38 + 47 and 47 - 38 are held out together."""
        return min(self.a, self.b), max(self.a, self.b)

    def question(self, lang: Lang, form: int) -> str:
        return QUESTIONS[self.op][lang][form].format(a=self.a, b=self.b)

    def steps(self, lang: Lang) -> str:
        """The written-out work: ones, carry or borrow, tens."""
        return (_addition if self.op == "+" else _subtraction)(self.a, self.b, lang)


def _addition(a: int, b: int, lang: Lang) -> str:
    ones, tens = a % 10 + b % 10, a // 10 + b // 10 + (a % 10 + b % 10) // 10
    low, high = f"{a % 10}+{b % 10}={ones}", f"{a // 10}+{b // 10}={tens}"
    if ones >= 10:
        high = f"{a // 10}+{b // 10}+1={tens}"
    if lang == "en":
        carry = f", write {ones % 10}, carry 1" if ones >= 10 else ""
        return f"Ones: {low}{carry}. Tens: {high}. Result: {a + b}."
    carry = f"，写{ones % 10}进1" if ones >= 10 else ""
    return f"个位：{low}{carry}。十位：{high}。结果：{a + b}。"


def _subtraction(a: int, b: int, lang: Lang) -> str:
    borrow = a % 10 < b % 10
    ones, tens = (a - b) % 10, (a - b) // 10
    low = f"{a % 10 + 10 * borrow}-{b % 10}={ones}"
    high = f"{a // 10}-{b // 10}-1={tens}" if borrow else f"{a // 10}-{b // 10}={tens}"
    if lang == "en":
        return f"Ones: {'borrow 1, ' if borrow else ''}{low}. Tens: {high}. Result: {a - b}."
    return f"个位：{'借1，' if borrow else ''}{low}。十位：{high}。结果：{a - b}。"


def split_pairs(seed: int, heldout_fraction: float = 0.08) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All unordered operand pairs in random order, as (trained, held out)."""
    pairs = [(a, b) for a in range(LOW, HIGH + 1) for b in range(a, HIGH + 1)]
    shuffled = Stream(seed, "operand pairs").shuffled(pairs)
    count = round(len(shuffled) * heldout_fraction)
    return shuffled[count:], shuffled[:count]


def draw_sum(pairs: list[tuple[int, int]], stream: Stream) -> Sum:
    """A sum over one of `pairs`: six additions to four subtractions, either order for an addition."""
    low, high = stream.choice(pairs)
    if stream.chance(0.4):
        return Sum(high, "-", low)
    return Sum(high, "+", low) if stream.chance(0.5) else Sum(low, "+", high)


def worked_text(pairs: list[tuple[int, int]], lang: Lang, stream: Stream) -> str:
    """A page of worked sums for pretraining."""
    lines = []
    for _ in range(stream.between(3, 5)):
        problem = draw_sum(pairs, stream)
        lines.append(f"{problem.question(lang, stream.below(4))} {problem.steps(lang)}")
    return "\n".join(lines)
