"""What an answer is worth by rules: the built-in reward functions, and how the user's own are named.

A reward function is `(prompt, completion, reference) -> float`, or a mapping of several numbers::

    prompt      what the model was given, as text with its control tokens
    completion  what it wrote: tags kept, without the token that ended it
    reference   "answer", "verifier", "meta" and "messages" of the prompt's record;
                "tokens" of the completion, its "finish_reason" ("stop" or "length"), and "max_tokens", the limit

A mapping is worth its "reward", or the sum of its values where there is none; the others are shown as metrics.

These functions run in processes of their own (`reward_pool.py`), which start in a moment because nothing here imports
torch or NumPy.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from minigpt.errors import UserError, did_you_mean
from minigpt.evaluation.answers import is_correct

Reference = Mapping[str, Any]
RewardFn = Callable[[str, str, Reference], "float | Mapping[str, float]"]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
OPENING = re.compile(r"<think>(?:\s*</think>)?\s*$")
"""How a prompt ends that switches thinking on, or off; a person's `<think>` is never the end of a prompt."""
WELL_FORMED = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
SOFT_SHARE = 0.2  # of the limit: DAPO's 4,096 of 20,480 tokens

UNSPACED = (  # scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNIT = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]{{1,16}}|[^\w\s]")
UNITS_A_GRAM = 6
MAX_CHARACTERS = 100_000


# ------------------------------------------------------------------------------------------------ the built-in rewards


def accuracy(prompt: str, completion: str, reference: Reference) -> float:
    """1 for a right answer, otherwise 0, by the record's verifier: see `minigpt.evaluation.answers.is_correct`.

    What is still inside of a thought is no answer, also of a thought that the prompt began.
    """
    reply = _opening(prompt) + completion
    return float(is_correct(reply, reference["answer"], reference["verifier"], reference["meta"]))


def well_formed(prompt: str, completion: str, reference: Reference) -> float:
    """+1 for `<think>…</think><answer>…</answer>`, otherwise −1.

    Each tag stands exactly once and in this order, with nothing but white space before, between and after the two
    parts, and neither part is blank. What the prompt ends with is read as the completion's beginning: `<think>` where
    thinking is switched on, `<think></think>` where it is off; only then may the thought be blank.
    """
    opening = _opening(prompt)
    text = opening + completion
    found = WELL_FORMED.fullmatch(text) if all(text.count(tag) == 1 for tag in TAGS) else None
    if found is None:
        return -1.0
    thought, answer = found.groups()
    return 1.0 if answer.strip() and (thought.strip() or "</think>" in opening) else -1.0


def overlong(prompt: str, completion: str, reference: Reference) -> float:
    """0 up to 80 % of the limit in tokens, from there a straight line down to −1 at the limit.

    DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13) with the paper's proportions. An answer that was cut
    gets −1, whatever the limit was.
    """
    if reference["finish_reason"] == "length":
        return -1.0
    limit = reference.get("max_tokens")
    if not limit:
        return 0.0
    return -min(1.0, max(0.0, (reference["tokens"] / limit - (1 - SOFT_SHARE)) / SOFT_SHARE))


def repetition(prompt: str, completion: str, reference: Reference) -> float:
    """−(share of n-grams that were there before), between −1 and 0; ordinary prose is near 0 (−0.03).

    1 − different n-grams / n-grams, as in arXiv:2502.03373 (appendix C.2), but not over words between spaces, of which
    a Chinese paragraph has one. A unit is a character of a script without spaces, at most 16 letters or digits in a row
    of another (so that `hahaha…` is not one word), or a sign. Six units are about as much in both languages: a phrase
    that good prose seldom repeats. Of more than 100,000 characters the last ones are read.
    """
    units = UNIT.findall(completion[-MAX_CHARACTERS:].lower())
    total = len(units) - UNITS_A_GRAM + 1
    if total < 1:
        return 0.0
    different = set(zip(*(units[i:] for i in range(UNITS_A_GRAM)), strict=False))
    return len(different) / total - 1.0


def _opening(prompt: str) -> str:
    found = OPENING.search(prompt)
    return found.group() if found else ""


BUILT_IN: dict[str, RewardFn] = {
    "accuracy": accuracy,
    "format": well_formed,
    "length": overlong,
    "repetition": repetition,
}
SYNTAX = f"{', '.join(BUILT_IN)}, package.module:function or path/to/file.py:function, each with =WEIGHT if it is not 1"
MAX_WEIGHT = 1e6


# ------------------------------------------------------------------------------------------- from names to functions


@dataclass(frozen=True)
class WeightedReward:
    """A part of the reward: its name (the spec without the weight), its weight and its function."""

    name: str
    weight: float
    function: RewardFn


def parse_rewards(specs: Sequence[str]) -> list[WeightedReward]:
    """The rewards that are meant, their modules imported.

    Args:
        specs: `NAME`, `package.module:function` or `path/to/file.py:function`, each with `=WEIGHT` or without (1).

    Raises:
        UserError: there is none; a name, module, file or function is unknown; a module cannot be imported; a function
            does not take three arguments; a weight is no finite number; a reward is named twice.
    """
    if not specs:
        raise UserError(f"there is no reward: name {SYNTAX}")
    rewards: list[WeightedReward] = []
    for spec in specs:
        name, weight = _split_weight(spec)
        if any(reward.name == name for reward in rewards):
            raise UserError(f"the reward {name} is named twice: name it once, with the sum of the weights")
        rewards.append(WeightedReward(name, weight, _find_function(name)))
    return rewards


def _split_weight(spec: str) -> tuple[str, float]:
    """`accuracy=0.5` → ("accuracy", 0.5). A path may hold `=` too."""
    name, equals, written = spec.rpartition("=")
    if not equals or ":" in written:
        return spec, 1.0
    try:
        weight = float(written)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= MAX_WEIGHT:
        raise UserError(
            f"the weight of the reward {spec!r} is no number up to {MAX_WEIGHT:,.0f}: write {name}=0.5, say"
        )
    return name, weight


def _find_function(name: str) -> RewardFn:
    where, colon, function_name = name.rpartition(":")
    if not colon:
        if name not in BUILT_IN:
            raise UserError(f"there is no reward {name!r}{did_you_mean(name, BUILT_IN)}; rewards are {SYNTAX}")
        return BUILT_IN[name]
    module = _import_file(name, Path(where)) if where.endswith(".py") else _import_module(name, where)
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    function = getattr(module, function_name, None)
    if not callable(function):
        hint = did_you_mean(function_name, functions)
        raise UserError(f"the reward {name}: {where} has no function {function_name!r}{hint}")
    try:
        inspect.signature(function).bind("prompt", "completion", {})
    except TypeError as error:
        raise UserError(f"the reward {name} cannot take (prompt, completion, reference): {error}") from None
    except ValueError:
        pass  # written in C, without a signature that can be read
    return function


def _import_module(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise _import_failed(name, error) from None  # the module is there, what it imports is not
        parent, _, wanted = error.name.rpartition(".")
        folders = getattr(sys.modules.get(parent), "__path__", []) if parent else [os.getcwd()]
        hint = did_you_mean(wanted, [module.name for module in pkgutil.iter_modules(folders)])
        raise UserError(
            f"the reward {name}: there is no module {error.name!r}{hint}; "
            f"modules are looked for where Python does and in {os.getcwd()}"
        ) from None
    except BaseException as error:  # an import runs a program: anything can go wrong in it
        raise _import_failed(name, error) from None


def _import_file(name: str, path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        hint = did_you_mean(path.name, [file.name for file in path.parent.glob("*.py")])
        raise UserError(f"the reward {name}: there is no file {path}{hint}")
    if str(path) in sys.modules:
        return sys.modules[str(path)]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # what it imports from beside it
    found = importlib.util.spec_from_file_location(str(path), path)  # so called, it hides no module
    assert found is not None
    assert found.loader is not None
    module = sys.modules[str(path)] = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[str(path)]
        raise _import_failed(name, error) from None
    return module


def _import_failed(name: str, error: BaseException) -> UserError:
    return UserError(f"the reward {name} cannot be imported: {describe(error)}")


def describe(error: BaseException) -> str:
    """An exception in one line that can be printed, with the place in the source where it was raised."""
    try:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    except Exception:  # its __str__ is somebody's code too
        said = type(error).__name__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename if trace is not None else "<unknown>"
    place = "" if trace is None or file.startswith("<") else f" ({Path(file).name}:{trace.tb_lineno})"
    printable = said[:1000].encode("utf-8", "backslashreplace").decode()
    return " ".join(printable.split())[:250] + place
