"""The comparison of generation is fair: the same weights, and only wanted tokens count."""

import generate
import pytest
import torch
from transformers import AutoModelForCausalLM

from minigpt.generation.generate import generate as ours
from minigpt.generation.sampling import SamplingParams


@pytest.mark.parametrize("case", generate.SLOTS)
def test_both_make_every_wanted_token_of_a_case(case):
    torch.manual_seed(0)
    requests = generate.workload(case, smoke=True)
    wanted = sum(new * n for _, new, n in requests)
    model = generate._model(torch.float32, True)
    for who in ("ours", "invariant"):
        assert generate._ours(requests, model, case, who)() == wanted
    assert generate._peer(requests, model, case)() == wanted


def test_both_have_the_same_weights(tmp_path):
    torch.manual_seed(0)
    model = generate._model(torch.float32, True)
    model.save_pretrained(tmp_path)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = generate.workload("batch", smoke=True)[0][0]
    expected = peer.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert ours(model, [prompt], SamplingParams(max_new_tokens=8, temperature=0))[0].ids == expected[0, 32:].tolist()


def test_ragged_lengths_are_spread_fourfold():
    new = [new for _, new, _ in generate.workload("ragged")]
    assert (min(new), max(new), len(new)) == (32, 128, 64)
