"""Sums of two numbers of two or of three digits and their steps, worked out digit by digit as at school."""

from dataclasses import dataclass

from data_prep.microworld.rng import Stream
from data_prep.microworld.world import Lang

DIGITS = {"2": 0.4, "3": 0.6}
"""How often the two numbers have how many digits (both have equally many)."""
HELDOUT_FRACTION = 0.08

QUESTIONS: dict[Lang, tuple[str, ...]] = {
    "en": ("What is {a} + {b}?", "How much is {a} plus {b}?", "Please add {a} and {b}.", "{a} + {b} = ?"),
    "zh": ("{a} + {b} 等于多少？", "{a}加{b}是多少？", "请算一算{a}加{b}。", "{a} + {b} = ?"),
}
PLACES: dict[Lang, tuple[str, ...]] = {"en": ("Ones", "Tens", "Hundreds"), "zh": ("个位", "十位", "百位")}


@dataclass(frozen=True)
class Sum:
    """`a + b`; both have equally many digits."""

    a: int
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b

    @property
    def digits(self) -> int:
        return len(str(self.a))

    def question(self, lang: Lang, form: int) -> str:
        return QUESTIONS[lang][form].format(a=self.a, b=self.b)

    def steps(self, lang: Lang) -> str:
        """The written-out work: each place from the ones on, with its carry; then the result."""
        work: list[str] = []
        carry = 0
        columns = list(zip(reversed(str(self.a)), reversed(str(self.b)), strict=True))
        for place, (x, y) in zip(PLACES[lang], columns, strict=False):
            total = int(x) + int(y) + carry
            step = f"{x}+{y}{'+1' * carry}={total}"
            carry = total // 10
            if carry and len(work) < len(columns) - 1:
                step += f", write {total % 10}, carry 1" if lang == "en" else f"，写{total % 10}进1"
            work.append(f"{place}: {step}. " if lang == "en" else f"{place}：{step}。")
        return "".join(work) + (f"Result: {self.result}." if lang == "en" else f"结果：{self.result}。")


def is_heldout(seed: int, a: int, b: int) -> bool:
    """Whether two operands never meet in training; 47 + 38 and 38 + 47 are one pair."""
    return Stream(seed, "operand pair", min(a, b), max(a, b)).chance(HELDOUT_FRACTION)


def draw_sum(seed: int, stream: Stream, heldout: bool = False) -> Sum:
    """A sum of a trained pair of operands, or of a held-out one."""
    digits = int(stream.weighted(DIGITS))
    low, high = 10 ** (digits - 1), 10**digits - 1
    while True:
        problem = Sum(stream.between(low, high), stream.between(low, high))
        if is_heldout(seed, problem.a, problem.b) == heldout:
            return problem


def worked_text(seed: int, lang: Lang, stream: Stream) -> str:
    """A worked sum as plain text for pretraining. (One a document: among several, a model takes long to learn which
    digits are meant.)"""
    problem = draw_sum(seed, stream)
    return f"{problem.question(lang, stream.below(len(QUESTIONS[lang])))} {problem.steps(lang)}"
