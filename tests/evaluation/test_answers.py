"""What counts as an answer, and how sure an accuracy is."""

import json
import math

import pytest

from minigpt.errors import UserError
from minigpt.evaluation.answers import Accuracy, extract_answer, is_correct, last_number, normalise, read_prompt_records


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>7+8=15</think><answer>85</answer>", "85"),
        ("<answer>one</answer> no, <answer> two </answer>", "two"),
        ("<think>a</think><answer>cut off", "cut off"),
        ("<think>never ends", ""),
        ("<think>a</think>Hello!", "Hello!"),
        ("  plain text\n", "plain text"),
    ],
)
def test_answer_is_what_stands_in_the_tags_or_outside_the_thought(reply, answer):
    assert extract_answer(reply) == answer


def test_normalising_forgives_form_and_nothing_else():
    assert normalise("  Mei  lives in WILLOW Bay. ") == normalise("mei lives in willow bay")
    assert normalise("小梅住在柳湾。") == normalise("小梅住在柳湾")
    assert normalise("８５") == "85"
    assert normalise("Mei has a cat.") != normalise("Mei has a dog.")
    assert normalise("-5") != normalise("5")


@pytest.mark.parametrize(
    ("text", "number"),
    [("85", 85), ("The result is 1,234.5.", 1234.5), ("-7", -7), ("3 or 4", 4), ("结果：16。", 16), ("none", None)],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_verifiers():
    assert is_correct("<think>9</think><answer>It is 85.</answer>", "85", "math")
    assert not is_correct("<think>85</think><answer>84</answer>", "85", "math")
    assert not is_correct("no number", "no number", "math")
    assert is_correct("Mei has a cat.", "mei has a cat", "exact")
    assert not is_correct("Mei has a cat and a dog.", "Mei has a cat.", "exact")
    with pytest.raises(UserError, match="countdown"):
        is_correct("1+1", "2", "countdown")


@pytest.mark.parametrize(("correct", "total"), [(0, 20), (19, 20), (20, 20), (81, 263), (500, 1000)])
def test_interval_solves_wilsons_equation(correct, total):
    """Its ends are where a true rate p is just z standard errors from what was seen: (p̂ - p)² = z² p (1 - p) / n."""
    z = 1.96
    low, high = Accuracy(correct, total).interval(z)
    assert 0 <= low <= correct / total <= high <= 1
    for p in (low, high):
        assert math.isclose((correct / total - p) ** 2, z**2 * p * (1 - p) / total, abs_tol=1e-12)


def test_accuracy_without_questions_knows_nothing():
    assert math.isnan(Accuracy(0, 0).value)
    assert Accuracy(0, 0).interval() == (0.0, 1.0)
    assert str(Accuracy(19, 20)).startswith("95.0% (19/20, 95 % interval 76.4% to 99.1%)")


def test_reading_names_file_and_line(tmp_path):
    path = tmp_path / "q.jsonl"
    good = {"messages": [{"role": "user", "content": "你好"}], "answer": "1"}
    path.write_text(json.dumps(good) + "\n\n{broken\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"q\.jsonl:3 is not valid JSON"):
        read_prompt_records(path)
    path.write_text(json.dumps(good) + '\n{"messages": []}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"q\.jsonl:2 has no answer"):
        read_prompt_records(path)
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"q\.jsonl:1 has no messages and no answer"):
        read_prompt_records(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no prompt records"):
        read_prompt_records(path)
    with pytest.raises(FileNotFoundError):
        read_prompt_records(tmp_path / "missing.jsonl")
    path.write_text(json.dumps(good) + "\n", encoding="utf-8")
    assert read_prompt_records(path) == [{"verifier": "exact", "meta": {}} | good]
