"""Exact answers: counting, and the same replies through a real (untrained) model as by hand."""

import json
import math

import pytest
import torch

from minigpt.dataset.chat import ChatEncoder
from minigpt.errors import UserError
from minigpt.evaluation.answers import is_correct
from minigpt.evaluation.exact_answer import ExactAnswer, ModelAnswers
from minigpt.evaluation.task import Settings
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig


def record(question: str, answer: str, kind: str, verifier: str = "exact") -> dict:
    return {
        "messages": [{"role": "user", "content": question}],
        "answer": answer,
        "verifier": verifier,
        "meta": {"kind": kind},
    }


RECORDS = [
    record("1+1", "2", "sum", "math"),
    record("2+2", "4", "sum", "math"),
    record("who", "I am MiniGPT.", "identity"),
]


def test_counts_by_kind_and_keeps_the_order():
    replies = ["<think>1+1=2</think><answer>2</answer>", "5", "i am minigpt"]
    result = ExactAnswer(RECORDS)(lambda conversations: replies[: len(conversations)])
    assert result.correct == [True, False, True]
    assert (result.accuracy.correct, result.accuracy.total) == (2, 3)
    assert {k: (a.correct, a.total) for k, a in result.by_kind.items()} == {"sum": (1, 2), "identity": (1, 1)}
    assert result.replies == replies


def test_a_missing_reply_is_an_error():
    with pytest.raises(ValueError, match="argument"):
        ExactAnswer(RECORDS)(lambda conversations: ["2"])


def test_reads_the_first_records_of_a_file(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS), encoding="utf-8")
    assert ExactAnswer.from_file(path, limit=2).records == RECORDS[:2]


@pytest.fixture(scope="module")
def model_and_encoder() -> tuple[MiniGPT, ChatEncoder]:
    import minigpt.model

    torch.manual_seed(0)
    encoder = ChatEncoder(minigpt.model.__path__[0])
    config = MiniGPTConfig(encoder.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return MiniGPT(config), encoder


@pytest.mark.parametrize("thinking", [None, True, False])
def test_model_answers_equal_greedy_decoding_without_a_cache(model_and_encoder, thinking):
    model, encoder = model_and_encoder
    conversations = [r["messages"] for r in RECORDS] + [[{"role": "user", "content": "你好" * 9}]]
    done: list[int] = []
    answers = ModelAnswers(
        model, encoder, max_new_tokens=6, enable_thinking=thinking, batch_size=3, progress=done.append
    )
    replies = answers(conversations)
    assert done == [3, 4]
    ended = 0
    for conversation, reply in zip(conversations, replies, strict=True):
        ids = encoder.encode_prompt(conversation, enable_thinking=thinking)
        new: list[int] = []
        with torch.no_grad():
            while len(new) < 6 and (not new or new[-1] not in (encoder.im_end_id, encoder.eos_id)):
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert reply == ("<think>" if thinking else "") + encoder.decode(new)
        ended += new[-1] in (encoder.im_end_id, encoder.eos_id)
    assert answers.cut == len(conversations) - ended


def test_a_thought_that_never_ends_is_no_answer(model_and_encoder):
    """With thinking on, the prompt opened the thought: a number in a reply that was cut inside it does not count."""
    model, encoder = model_and_encoder
    (reply,) = ModelAnswers(model, encoder, max_new_tokens=3, enable_thinking=True)([RECORDS[0]["messages"]])
    assert not is_correct(reply + " 1+1=2", "2", "math")
    assert is_correct(reply + "</think>2", "2", "math")


def test_samples_are_the_same_in_any_batch_and_differ_among_themselves(model_and_encoder):
    model, encoder = model_and_encoder
    conversations = [r["messages"] for r in RECORDS]

    def sample(batch_size: int) -> list[list[str]]:
        answers = ModelAnswers(model, encoder, max_new_tokens=5, temperature=1.0, seed=3, batch_size=batch_size)
        return answers.sample(conversations, 4)

    several = sample(64)
    assert [len(set(replies)) for replies in several] == [4, 4, 4]
    assert sample(5) == several


def test_a_question_without_room_for_a_reply_is_wrong_and_counted(model_and_encoder):
    model, encoder = model_and_encoder
    long = record("x y " * 3000, "2", "long", "math")
    result = ExactAnswer([*RECORDS, long]).run(model, encoder, Settings(max_new_tokens=2))
    assert result.n == 4
    assert result.details["prompts_too_long"] == 1
    assert [s["reply"] for s in result.samples if s["question"] == long["messages"][0]["content"]] == [""]


def test_pass_at_k_of_a_file_of_questions(model_and_encoder, tmp_path):
    """What is right is set to one of the sampled replies, so that some of the others equal it and some do not."""
    model, encoder = model_and_encoder
    settings = Settings(samples=5, k=(1, 2, 5), temperature=0.1, max_new_tokens=1)
    conversations = [[{"role": "user", "content": f"What is {i}?"}] for i in range(6)]
    replies = ModelAnswers(model, encoder, max_new_tokens=1, temperature=0.1).sample(conversations, 5)
    answers = [max(sorted(set(several)), key=several.count) for several in replies[:5]] + ["never said"]
    path = tmp_path / "words.jsonl"
    questions = [{"messages": c, "answer": a} for c, a in zip(conversations, answers, strict=True)]
    path.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    result = ExactAnswer.from_file(path).run(model, encoder, settings)
    counts = [several.count(answer) for several, answer in zip(replies, answers, strict=True)]
    assert 0 < sum(counts[:5]) < 25
    for metric, k in zip(result.metrics, (1, 2, 5), strict=True):
        assert metric.name == f"pass@{k}"
        assert math.isclose(metric.value, sum(1 - math.comb(5 - c, k) / math.comb(5, k) for c in counts) / 6)
        assert metric.low < metric.value < metric.high
    assert result.n == 6
    assert {s["right"] for s in result.samples} == {True, False}


def test_a_file_of_another_kind_is_told(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"nums": [1, 2], "target": 3}\n')
    with pytest.raises(UserError, match="'countdown', not 'math': use questions:"):
        ExactAnswer.from_file(path, kind="gsm8k")
