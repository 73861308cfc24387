"""Exact answers: counting, and the same replies through a real (untrained) model as by hand."""

import json

import pytest
import torch

from minigpt.dataset.chat import ChatEncoder
from minigpt.evaluation.exact_answer import ExactAnswer, ModelAnswers
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
    for conversation, reply in zip(conversations, replies, strict=True):
        ids = encoder.encode_prompt(conversation, enable_thinking=thinking)
        new: list[int] = []
        with torch.no_grad():
            while len(new) < 6 and (not new or new[-1] not in (encoder.im_end_id, encoder.eos_id)):
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert reply == encoder.decode(new)
