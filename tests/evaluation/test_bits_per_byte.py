"""Bits per byte of packed data against definitions that know nothing of packing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from data_prep.microworld import MicroWorldOptions, write_microworld
from data_prep.pack import PackOptions, pack
from minigpt.dataset.chat import ChatEncoder
from minigpt.dataset.shards import GlobalOrder, PackedDataset
from minigpt.errors import UserError
from minigpt.evaluation.bits_per_byte import PackedText, RawText
from minigpt.evaluation.task import Metric, Settings
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


def tiny_model(vocab_size: int, seed: int = 0, **shape) -> MiniGPT:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | shape
    return MiniGPT(MiniGPTConfig(vocab_size, **shape))


@pytest.fixture(scope="module")
def encoder(shipped_tokenizer) -> ChatEncoder:
    return ChatEncoder(shipped_tokenizer)


@pytest.fixture(scope="module")
def model(encoder) -> MiniGPT:
    return tiny_model(encoder.vocab_size)


def alone(model: MiniGPT, encoder: ChatEncoder, text: str) -> float:
    """What a document costs in one forward pass in float64, nats."""
    exact = MiniGPT(model.config).double()
    exact.load_state_dict(model.state_dict())
    ids = torch.tensor([[*encoder.encode_text(text), encoder.eos_id]])
    with torch.no_grad():
        log_probs = exact(ids[:, :-1]).logits.log_softmax(-1)
    return -log_probs.gather(-1, ids[:, 1:, None]).sum().item()


def test_bytes_are_those_of_the_text(pretrain, model):
    """Every text starts with a digit, one token of one byte, which nothing predicts; the rest of it is all labels."""
    cost = PackedText(pretrain).cost(model)
    assert len(pretrain) == 1  # one row holds it all, so no document is cut
    assert cost.bytes.sum() == sum(len(text.encode()) - 1 for text in TEXTS)


def test_a_uniform_guess_costs_log2_of_the_vocabulary_a_token(pretrain, encoder):
    model = tiny_model(encoder.vocab_size)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits are 0
    result = PackedText(pretrain).run(model, encoder, Settings())
    tokens = sum(len(encoder.encode_text(text)) for text in TEXTS)  # less the first of each, plus <|endoftext|>
    named = {metric.name: metric.value for metric in result.metrics}
    bits = math.log2(encoder.vocab_size)
    assert math.isclose(named["bits_per_byte"], bits * tokens / sum(len(t.encode()) - 1 for t in TEXTS), rel_tol=1e-6)
    assert math.isclose(named["loss"], bits * math.log(2), rel_tol=1e-6)
    assert math.isclose(named["perplexity"], encoder.vocab_size, rel_tol=1e-5)


def test_model_is_scored_as_on_each_document_alone(pretrain, model, encoder):
    model.train()
    cost = PackedText(pretrain).cost(model)
    assert model.training
    assert math.isclose(cost.nll.sum(), sum(alone(model, encoder, text) for text in TEXTS), rel_tol=1e-5)


def test_raw_text_costs_what_the_same_text_costs_packed(pretrain, model, encoder, tmp_path):
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.md").write_text(text, encoding="utf-8")
    packed_value = PackedText(pretrain).run(model, encoder, Settings()).value
    for path in (lines, folder):
        result = RawText(path).run(model, encoder, Settings(batch_size=4))
        assert math.isclose(result.value, packed_value, rel_tol=1e-6)
        assert result.n == len(TEXTS)


def test_a_window_over_a_long_text_scores_each_token_once_behind_at_least_half_a_window(model, encoder, tmp_path):
    path = tmp_path / "long.txt"
    text = " ".join(TEXTS)
    path.write_text(text, encoding="utf-8")
    context = 16
    ids = [*encoder.encode_text(text), encoder.eos_id]
    assert len(ids) > 5 * context
    nll = 0.0
    for position in range(1, len(ids)):  # one token at a time, by the definition
        steps = max(0, position - context + context // 2 - 1) // (context // 2)
        start = steps * (context // 2)
        assert position - start >= min(position, context // 2)
        with torch.no_grad():
            logits = model(torch.tensor([ids[start:position]])).logits[0, -1].double()
        nll -= logits.log_softmax(-1)[ids[position]].item()
    result = RawText(path).run(model, encoder, Settings(context=context))
    n_bytes = len(text.encode()) - 1
    assert math.isclose(result.value, nll / math.log(2) / n_bytes, rel_tol=1e-6)
    assert result.details == {"tokens": len(ids) - 1, "bytes": n_bytes, "documents": 1, "context": context}
    first = RawText(path).run(model, encoder, Settings(context=context, limit=3))
    assert first.n == 3
    assert first.details["tokens"] == context + 2 * (context // 2)
    assert first.details["bytes"] == len(encoder.decode(ids[1 : 2 * context + 1]).encode())


def test_a_token_that_the_tokenizer_puts_first_makes_all_of_the_text_count(model, encoder, tmp_path, shipped_tokenizer):
    """As Llama's `<|begin_of_text|>`: then the first token of the text is predicted too."""
    content = json.loads((shipped_tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    begin, text = encoder.token_id("<|im_start|>"), TEXTS[2]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", begin)])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    result = RawText(tmp_path / "text.txt").run(model, ChatEncoder(tokenizer), Settings())
    ids = torch.tensor([[begin, *encoder.encode_text(text), encoder.eos_id]])
    with torch.no_grad():
        log_probs = model(ids[:, :-1]).logits.double().log_softmax(-1)
    nll = -log_probs.gather(-1, ids[:, 1:, None]).sum().item()
    assert result.details["bytes"] == len(text.encode())
    assert math.isclose(result.value, nll / math.log(2) / len(text.encode()), rel_tol=1e-6)


def test_of_conversations_only_the_assistants_text_counts(tmp_path, model):
    source = write_microworld(tmp_path / "world", MicroWorldOptions(size="tiny"))["sft"]
    dataset = packed(tmp_path / "packed", "sft", source, seq_len=512)
    messages = {
        line: json.loads(line)["messages"] for line in source.read_text(encoding="utf-8").splitlines()
    }.values()  # a repeated conversation is packed once
    said = [
        m["content"] + m.get("reasoning_content", "") for turns in messages for m in turns if m["role"] == "assistant"
    ]
    assert PackedText(dataset).cost(model).bytes.sum() == sum(len(text.encode()) for text in said)


def test_rows_can_be_limited(model, encoder, tmp_path):
    source = write_microworld(tmp_path / "world", MicroWorldOptions(size="tiny"))["pretrain"]
    dataset = packed(tmp_path / "packed", "pretrain", source, seq_len=64)
    done = []
    result = PackedText(dataset).run(
        model, encoder, Settings(limit=10, batch_size=4), lambda n, total: done.append((n, total))
    )
    assert done == [(4, 10), (8, 10), (10, 10)]
    assert result.n == 10
    full, part = PackedText(dataset).cost(model), PackedText(dataset).cost(model, Settings(limit=10))
    rows = np.sort(GlobalOrder(len(dataset), seed=0).indices(np.arange(10)))
    np.testing.assert_allclose(part.nll, full.nll[rows], rtol=1e-6)


def test_another_tokenizer_is_refused(pretrain, model, tmp_path):
    other = tmp_path / "tokenizer.json"
    content = json.loads((Path(pretrain.folder) / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    other.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="another tokenizer"):
        PackedText(pretrain).run(model, ChatEncoder(other), Settings())


def test_interval_of_a_ratio_covers_the_truth_as_often_as_it_says():
    """Texts of different lengths whose true cost is 2 bits a byte: about 95 % of the intervals hold it."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        n_bytes = draw.integers(20, 400, size=60)
        bits = 2.0 * n_bytes + draw.normal(size=60) * 8 * np.sqrt(n_bytes)
        metric = Metric.of_ratio("bits_per_byte", bits, n_bytes)
        held += metric.low <= 2.0 <= metric.high
    assert 0.92 < held / 2000 < 0.97


def test_nothing_to_predict_is_nan_and_one_text_has_no_interval():
    assert math.isnan(Metric.of_ratio("bits_per_byte", np.zeros(3), np.zeros(3)).value)
    one = Metric.of_ratio("bits_per_byte", np.array([6.0]), np.array([3]))
    assert one.value == 2.0
    assert math.isnan(one.low)
