"""Bits per byte of packed data against definitions that know nothing of packing."""

import json
import math
from pathlib import Path

import pytest
import torch

from data_prep.microworld import MicroWorldOptions, write_microworld
from data_prep.pack import PackOptions, pack
from minigpt.dataset.chat import ChatEncoder
from minigpt.dataset.shards import PackedDataset
from minigpt.evaluation.bits_per_byte import BitsPerByte
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

TEXTS = [
    f"{i} 灯谷很小。The valley is small, and {i * 7} lanterns hang in it. 你好" * (i % 3 + 1) for i in range(1, 10)
]


def packed(folder: Path, stage: str, source: Path, seq_len: int) -> PackedDataset:
    pack(PackOptions(stage=stage, input=[source], output=folder, seq_len=seq_len, valid_fraction=0.0, workers=1))
    return PackedDataset(folder, "train")


@pytest.fixture(scope="module")
def pretrain(tmp_path_factory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("text")
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in TEXTS), encoding="utf-8")
    return packed(folder / "packed", "pretrain", source, seq_len=1024)


def test_bytes_are_those_of_the_text(pretrain):
    """Every text starts with a digit, one token of one byte, which nothing predicts; the rest of it is all labels."""
    result = BitsPerByte(pretrain)(loss_fn=lambda batch: 0.0)
    assert len(pretrain) == 1  # one row holds it all, so no document is cut
    assert result.bytes == sum(len(text.encode()) - 1 for text in TEXTS)
    assert result.bits_per_byte == 0.0


def test_a_uniform_guess_costs_log2_of_the_vocabulary_a_token(pretrain):
    bits = 11.0
    result = BitsPerByte(pretrain, batch_size=4)(
        loss_fn=lambda batch: batch["weights"].sum().item() * bits * math.log(2)
    )
    encoder = ChatEncoder(pretrain.folder)
    tokens = sum(len(encoder.encode_text(text)) for text in TEXTS)  # less the first of each, plus <|endoftext|>
    assert result.tokens == tokens
    assert math.isclose(result.bits_per_byte, bits * tokens / sum(len(t.encode()) - 1 for t in TEXTS))
    assert math.isclose(result.loss, bits * math.log(2))


def test_model_is_scored_as_on_each_document_alone(pretrain):
    torch.manual_seed(0)
    encoder = ChatEncoder(pretrain.folder)
    model = MiniGPT(MiniGPTConfig(encoder.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    model.train()
    result = BitsPerByte(pretrain)(model)
    assert model.training
    nll = 0.0
    for text in TEXTS:
        ids = torch.tensor([[*encoder.encode_text(text), encoder.eos_id]])
        with torch.no_grad():
            log_probs = model(ids[:, :-1]).logits.double().log_softmax(-1)
        nll -= log_probs.gather(-1, ids[:, 1:, None]).sum().item()
    assert math.isclose(result.nll, nll, rel_tol=1e-5)


def test_of_conversations_only_the_assistants_text_counts(tmp_path):
    source = write_microworld(tmp_path / "world", MicroWorldOptions(size="tiny"))["sft"]
    dataset = packed(tmp_path / "packed", "sft", source, seq_len=512)
    messages = {
        line: json.loads(line)["messages"] for line in source.read_text(encoding="utf-8").splitlines()
    }.values()  # a repeated conversation is packed once
    said = [
        m["content"] + m.get("reasoning_content", "") for turns in messages for m in turns if m["role"] == "assistant"
    ]
    result = BitsPerByte(dataset)(loss_fn=lambda batch: 0.0)
    assert result.bytes == sum(len(text.encode()) for text in said)


def test_rows_can_be_limited_and_an_empty_split_is_nan(pretrain, tmp_path):
    source = write_microworld(tmp_path / "world", MicroWorldOptions(size="tiny"))["pretrain"]
    dataset = packed(tmp_path / "packed", "pretrain", source, seq_len=64)
    seen = []

    def count(batch: dict[str, torch.Tensor]) -> float:
        seen.append(int((batch["document_ids"] >= 0).any(1).sum()))
        return 0.0

    BitsPerByte(dataset, batch_size=4, max_rows=10)(loss_fn=count)
    assert sum(seen) == 10
    assert math.isnan(BitsPerByte(dataset, max_rows=0)(loss_fn=count).bits_per_byte)
