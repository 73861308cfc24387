"""FLOPs of a training step against what PyTorch's own counter sees in the operators that run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minigpt.model.model_lora import apply_lora
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.trainer.flops import training_flops


@pytest.fixture(autouse=True)
def products_in_sight(monkeypatch):
    """PyTorch's counter does not look into the operator that a CPU has for the output layer."""
    monkeypatch.setattr("minigpt.model.cross_entropy._on_cpu", lambda x: False)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts_on_an_unpadded_batch(kv_heads, tied):
    """The reference attention multiplies every pair, visible or not: B·T·T of them. No label is missing."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": kv_heads}
    model = MiniGPT(MiniGPTConfig(vocab_size=320, intermediate_size=96, tie_word_embeddings=tied, **shape))
    model.attention_backend = "reference"
    B, T = 2, 24
    ids = torch.randint(0, 320, (B, T))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss_sum.backward()
    ours = training_flops(model.config, tokens=B * T, labels=B * T, attention_pairs=B * T * T)
    assert ours == counter.get_total_flops()


@pytest.mark.parametrize("rank", [1, 8])
def test_flops_of_an_adapter_beside_frozen_weights_are_those_that_pytorch_counts(rank):
    """Within what the adapters of the first block save: the text has no gradient, so neither has their input."""
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = apply_lora(MiniGPT(MiniGPTConfig(vocab_size=320, intermediate_size=96, **shape)), rank=rank)
    model.attention_backend = "reference"
    B, T = 2, 24
    ids = torch.randint(0, 320, (B, T))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss_sum.backward()
    adapter_weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = {"tokens": B * T, "labels": B * T, "attention_pairs": B * T * T}
    ours = training_flops(model.config, **counts, adapter_weights=adapter_weights)
    assert ours - counter.get_total_flops() == 3 * 2 * rank * 32 * B * T
    assert ours < training_flops(model.config, **counts)


def test_padding_hidden_pairs_and_positions_without_label_earn_nothing():
    config = MiniGPTConfig()
    full = training_flops(config, tokens=256, labels=255, attention_pairs=256 * 257 / 2)
    in_halves = training_flops(config, tokens=256, labels=254, attention_pairs=2 * 128 * 129 / 2)
    half_padded = training_flops(config, tokens=128, labels=127, attention_pairs=128 * 129 / 2)
    assert half_padded < in_halves < full
    assert in_halves == pytest.approx(2 * half_padded)
