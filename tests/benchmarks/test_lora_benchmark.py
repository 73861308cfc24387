"""The comparison with peft is fair: the same weights, rows, loss and trained matrices."""

import lora
import peer_hf
import peft
import torch
from common import packed_microworld
from transformers import AutoModelForCausalLM

from minigpt.dataset.shards import PackedDataset, collate
from minigpt.model.model_lora import apply_lora
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig


def test_peft_starts_from_the_same_loss_and_trains_as_many_weights(tmp_path):
    lora.make_base(tmp_path / "base", lora.SMOKE_SHAPE)
    rows = PackedDataset(packed_microworld(tmp_path, "pretrain", 128, "tiny"), "train")
    batch = {name: torch.from_numpy(array) for name, array in collate([rows.row(i) for i in range(3)]).items()}
    ours = apply_lora(MiniGPT.from_pretrained(tmp_path / "base"), rank=lora.RANK)
    config = peft.LoraConfig(r=lora.RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    assert torch.isclose(ours(**batch).loss_sum, peer_hf.summed_loss(theirs, batch), rtol=1e-5)
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert counts[0] == counts[1]


def test_rank_8_trains_less_than_a_twentieth_of_either_shape():
    """Masters and moments are three numbers for each trained weight, whichever weights these are."""
    for shape in lora.SHAPES.values():
        with torch.device("meta"):
            model = MiniGPT(MiniGPTConfig(**shape))
        whole = model.num_parameters()
        with torch.device("meta"):
            apply_lora(model, rank=lora.RANK)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) <= 0.05 * whole
