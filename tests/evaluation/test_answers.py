"""What counts as an answer, and how sure an accuracy is."""

import itertools
import json
import math
import time

import pytest

from minigpt.errors import UserError
from minigpt.evaluation.answers import (
    Accuracy,
    extract_answer,
    is_correct,
    last_number,
    normalise,
    pass_at_k,
    read_prompt_records,
    solves_countdown,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>7+8=15</think><answer>85</answer>", "85"),
        ("<answer>one</answer> no, <answer> two </answer>", "two"),
        ("<think>a</think><answer>cut off", "cut off"),
        ("<think>never ends", ""),
        ("<think>maybe <answer>12</answer> hm", ""),
        ("<think>maybe <answer>12</answer> no, 13</think>13", "13"),
        ("<think>maybe <answer>12</answer></think><answer>13</answer>", "13"),
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
    [
        ("85", 85),
        ("The result is 1,234.5.", 1234.5),
        ("-7", -7),
        ("it is −7", -7),
        ("20-5", 5),
        ("3 or 4", 4),
        ("结果：16。", 16),
        ("#### 1,024", 1024),
        ("none", None),
        ("a size-12 shoe", 12),
        ("答案是-5", -5),
        ("３．５", 3.5),
        ("－７", -7),
        ("１，０２４。", 1024),
        ("3/4", 0.75),
        ("-1/2", -0.5),
        ("0.5/2", 0.25),
        ("1/0", 0),
        ("12/4 = 3", 3),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


def test_numbers_are_compared_exactly():
    assert float("9007199254740993") == float("9007199254740992")  # what floats cannot tell apart
    assert not is_correct("9007199254740993", "9007199254740992", "math")
    assert is_correct("0.50", ".5 is one half: 0.5", "math")
    assert not is_correct("7" * 5000, "7", "math")


def test_verifiers():
    assert is_correct("<think>9</think><answer>It is 85.</answer>", "85", "math")
    assert not is_correct("<think>85</think><answer>84</answer>", "85", "math")
    assert not is_correct("no number", "no number", "math")
    assert is_correct("one half: 1/2", "0.5", "math")
    assert not is_correct("1/4", "3/4", "math")
    assert is_correct("Mei has a cat.", "mei has a cat", "exact")
    assert not is_correct("Mei has a cat and a dog.", "Mei has a cat.", "exact")
    with pytest.raises(UserError, match="sympy"):
        is_correct("1+1", "2", "sympy")


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("(95 + 33) + 92", True),
        ("The answer is (95+33)+92 = 220.", True),
        ("95 + 33 = 128\n(95 + 33) + 92", True),
        ("（95＋33）＋92", True),
        ("92 − -33", False),
        ("95 + 33 + 92 + 0", False),  # a number that was not given
        ("95 + 125", False),
        ("95 + 33 + 33 + 59", False),
        ("220", False),
        ("95 + 33 = 128, 128 + 92 = 220", False),  # no single expression
        ("((95 + 33) + 92", False),
        ("95 / (33 - 33)", False),
        ("", False),
        ("__import__('os').system('exit')", False),
        ("9**9**9**9", False),
        ("(" * 5000 + "95" + ")" * 5000, False),
        ("95+" * 5000 + "1", False),
    ],
)
def test_countdown_takes_the_last_expression_with_each_number_once_and_runs_nothing(said, right):
    started = time.process_time()
    assert solves_countdown(said, [92, 33, 95], 220) is right
    record = {"nums": [92, 33, 95], "target": 220}
    assert is_correct(f"<think>no</think><answer>{said}</answer>", "", "countdown", record) is right
    assert time.process_time() - started < 5


def test_countdown_is_worked_out_in_fractions():
    assert solves_countdown("8 / (3 - 8 / 3)", [8, 8, 3, 3], 24)  # 23.999999999999993 in floating point


def test_pass_at_k_is_the_share_of_draws_with_a_right_reply():
    """By counting: of all ways to take k of n replies without putting them back, those that hold a right one."""
    for n, correct in ((1, 0), (1, 1), (5, 0), (5, 1), (6, 3), (6, 6)):
        replies = [True] * correct + [False] * (n - correct)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(replies, k))
            assert math.isclose(pass_at_k(n, correct, k), sum(map(any, draws)) / len(draws))


def test_interval_of_shares_is_the_interval_of_counts():
    assert wilson_interval(0.25, 80) == Accuracy(20, 80).interval()


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


def test_reading_knows_the_layouts_and_names_file_and_line(tmp_path):
    path = tmp_path / "q.jsonl"
    good = {"messages": [{"role": "user", "content": "你好"}], "answer": "1"}
    gsm8k = {"question": "How many?", "answer": "2 + 1,000 = <<2+1000=1002>>1,002\n#### 1,002"}
    countdown = {"nums": [1, 2], "target": 3, "solution": "1 + 2"}
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, gsm8k, countdown)), encoding="utf-8")
    records = read_prompt_records(path)
    assert records[0] == {"verifier": "exact", "meta": {}} | good
    assert (records[1]["answer"], records[1]["verifier"]) == ("1002", "math")
    assert records[1]["messages"] == [{"role": "user", "content": "How many?"}]
    assert (records[2]["meta"], records[2]["verifier"]) == ({"nums": [1, 2], "target": 3}, "countdown")
    for text, sentence in (
        (json.dumps(good) + "\n\n{broken\n", r"q\.jsonl:3: broken JSON"),
        (json.dumps(good) + '\n{"messages": []}\n', r"q\.jsonl:2: the messages are empty"),
        ("[1]\n", r"q\.jsonl:1: the record is a number"),
        ("\n", "is empty"),
        ('{"messages": [{"role": "user", "content": "?"}]}\n', "1 of 1 records hold no answer"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=sentence):
            read_prompt_records(path)
    with pytest.raises(UserError, match="does not exist"):
        read_prompt_records(tmp_path / "missing.jsonl")
