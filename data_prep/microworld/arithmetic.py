"""Sums of two two-digit numbers and their steps, worked out digit by digit as at school."""

from dataclasses import dataclass

from data_prep.microworld.rng import Stream
from data_prep.microworld.world import Lang

LOW, HIGH = 10, 99

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
            return f"Ones: {low}{carry}. Tens: {high}. Result: {self.result}."
        carry = f"，写{ones % 10}进1" * carries
        return f"个位：{low}{carry}。十位：{high}。结果：{self.result}。"


def split_pairs(seed: int, heldout_fraction: float = 0.08) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All unordered operand pairs in random order, as (trained, held out): 47 + 38 and 38 + 47 go together."""
    pairs = [(a, b) for a in range(LOW, HIGH + 1) for b in range(a, HIGH + 1)]
    shuffled = Stream(seed, "operand pairs").shuffled(pairs)
    count = round(len(shuffled) * heldout_fraction)
    return shuffled[count:], shuffled[:count]


def draw_sum(pairs: list[tuple[int, int]], stream: Stream) -> Sum:
    """A sum over one of `pairs`, in either order."""
    low, high = stream.choice(pairs)
    return Sum(high, low) if stream.chance(0.5) else Sum(low, high)


def worked_text(pairs: list[tuple[int, int]], lang: Lang, stream: Stream) -> str:
    """A worked sum as plain text for pretraining. (One a document: among several, a model takes long to learn which
    digits are meant.)"""
    problem = draw_sum(pairs, stream)
    return f"{problem.question(lang, stream.below(len(QUESTIONS[lang])))} {problem.steps(lang)}"
