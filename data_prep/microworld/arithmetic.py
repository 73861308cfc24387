"""Sums of two two-digit numbers and their steps, worked out digit by digit as at school."""

from dataclasses import dataclass

from data_prep.microworld.rng import Stream
from data_prep.microworld.world import Lang

LOW, HIGH = 10, 99
HELDOUT_FRACTION = 0.08

QUESTIONS: dict[Lang, tuple[str, ...]] = {
    "en": ("What is {a} + {b}?", "How much is {a} plus {b}?", "Please add {a} and {b}.", "{a} + {b} = ?"),
    "zh": ("{a} + {b} 等于多少？", "{a}加{b}是多少？", "请算一算{a}加{b}。", "{a} + {b} = ?"),
}


@dataclass(frozen=True)
class Sum:
    """`a + b` with two-digit operands."""

    a: int
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b

    def question(self, lang: Lang, form: int) -> str:
        return QUESTIONS[lang][form].format(a=self.a, b=self.b)

    def steps(self, lang: Lang) -> str:
        """The written-out work: the ones with their carry, the tens, the result."""
        ones, carries = self.a % 10 + self.b % 10, (self.a % 10 + self.b % 10) // 10
        low = f"{self.a % 10}+{self.b % 10}={ones}"
        high = f"{self.a // 10}+{self.b // 10}{'+1' * carries}={self.result // 10}"
        if lang == "en":
            carry = f", write {ones % 10}, carry 1" * carries
            return f"Ones: {low}{carry}. Tens: {high}. {self.hasty_thought(lang)}"
        carry = f"，写{ones % 10}进1" * carries
        return f"个位：{low}{carry}。十位：{high}。{self.hasty_thought(lang)}"

    def hasty_thought(self, lang: Lang) -> str:
        """The result and nothing that leads to it."""
        return f"Result: {self.result}." if lang == "en" else f"结果：{self.result}。"


def is_heldout(seed: int, a: int, b: int) -> bool:
    """Whether two operands never meet in training; 47 + 38 and 38 + 47 are one pair."""
    return Stream(seed, "operand pair", min(a, b), max(a, b)).chance(HELDOUT_FRACTION)


def draw_sum(seed: int, stream: Stream, heldout: bool = False) -> Sum:
    """A sum of a trained pair of operands, or of a held-out one."""
    while True:
        problem = Sum(stream.between(LOW, HIGH), stream.between(LOW, HIGH))
        if is_heldout(seed, problem.a, problem.b) == heldout:
            return problem


def misread(seed: int, problem: Sum, stream: Stream) -> Sum:
    """The same with a digit of an operand read wrongly by one, and no held-out pair by that: a typical mistake."""
    near = [Sum(problem.a + off, problem.b) for off in (-10, -1, 1, 10)]
    near += [Sum(problem.a, problem.b + off) for off in (-10, -1, 1, 10)]
    inside = [s for s in near if min(s.a, s.b) >= LOW and max(s.a, s.b) <= HIGH and not is_heldout(seed, s.a, s.b)]
    return stream.choice(inside)


def worked_text(seed: int, lang: Lang, stream: Stream) -> str:
    """A worked sum as plain text for pretraining. (One a document: among several, a model takes long to learn which
    digits are meant.)"""
    problem = draw_sum(seed, stream)
    return f"{problem.question(lang, stream.below(len(QUESTIONS[lang])))} {problem.steps(lang)}"
