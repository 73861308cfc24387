"""The comparison is fair (both compute the same loss) and its bound is what its docstring derives."""

import json

import dpo
import numpy as np
import pytest
import torch
from common import Rates, packed

from minigpt.dataset.shards import PackedDataset
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.trainer.loop import to_tensors
from minigpt.trainer.train_dpo import DirectPreference, DPOOptions


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> PackedDataset:
    folder = tmp_path_factory.mktemp("pairs")
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dogs", "run"]
    rng = np.random.default_rng(0)
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(12):
            prompt, chosen, rejected = (" ".join(rng.choice(words, 5)) for _ in range(3))
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")
    return PackedDataset(packed([folder / "pairs.jsonl"], folder / "packed", "preference", 64), "train")


def test_recomputing_the_reference_gives_the_loss_of_the_cached_one(data):
    """The reference is the start, the policy has moved on from it."""
    options = DPOOptions(global_batch_size=8)
    cached, anew = DirectPreference(options), dpo.recomputing_stage(options)
    start = MiniGPT(MiniGPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    both = anew.network(start, options)
    both.attention_backend = "sdpa"
    assert both.reference.attention_backend == "sdpa"
    for parameter in both.policy.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    (batch,) = next(dpo.windows(cached, data, options, 16, with_reference=False))
    batch = to_tensors(batch, torch.device("cpu"))
    with torch.no_grad():
        reference = cached.loss(both.reference, **batch)
    expected, _ = cached.loss(both.policy, **batch, reference_log_probs=reference)
    found, _ = anew.loss(both, **batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    assert all(p.grad is None for p in both.reference.parameters())
    assert both.policy.lm_head.weight.grad.any()


def test_the_bound_is_one_plus_forward_over_backward():
    """A forward pass of 1 s a batch, forward and backward of 4 s: at best 5/4 as fast; 4.4 s against 5.4 s is less."""
    seconds = {dpo.FORWARD: 1.0, dpo.BACKWARD: 4.0, dpo.CACHED: 4.4, dpo.RECOMPUTED: 5.4}
    rates = {dpo.TITLES[task]: [Rates(100 / s, 100 / s)] * 3 for task, s in seconds.items()}
    found = dpo.gain_and_bound(rates)
    assert found["bound"] == pytest.approx(1.25)
    assert found["gain"] == pytest.approx(5.4 / 4.4)
    assert found["share"] == pytest.approx(5.4 / 4.4 / 1.25)
