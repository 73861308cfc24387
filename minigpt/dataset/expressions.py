"""Arithmetic written as text, such as `(3 + 4) * 2`: worked out exactly, step by step, and without `eval`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 300  # characters; so neither the depth nor the numbers can grow beyond what is quick to work out

_OPERATORS: dict[type, tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}


@dataclass(frozen=True)
class WorkedOut:
    """What an expression says.

    Attributes:
        value: Its exact value.
        numbers: The numbers that it uses, from left to right.
        steps: One line an operation, in the order in which they are done: `3 + 4 = 7`.
    """

    value: Fraction
    numbers: tuple[int, ...]
    steps: tuple[str, ...]


def work_out(expression: str) -> WorkedOut:
    """Evaluate whole numbers, + - * / and brackets.

    Raises:
        ValueError: for anything else, for a division by zero, and beyond `MAX_LENGTH` characters.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression has {len(expression)} characters, at most {MAX_LENGTH} are read")
    numbers: list[int] = []
    steps: list[str] = []
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, numbers, steps)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} cannot be worked out ({error})") from None
    return WorkedOut(value, tuple(numbers), tuple(steps))


def _value(node: ast.expr, numbers: list[int], steps: list[str]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError("only whole numbers, + - * / and brackets are known")
    left, right = _value(node.left, numbers, steps), _value(node.right, numbers, steps)
    sign, apply = _OPERATORS[type(node.op)]
    result = apply(left, right)
    steps.append(f"{left} {sign} {right} = {result}")
    return result
