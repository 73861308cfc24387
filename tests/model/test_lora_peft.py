"""Adapters on disk against `peft` itself: what we write loads there, what it writes loads here, same logits."""

import json
import shutil

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import KINDS, MANY, ids, small_model, stir
from transformers import AutoModelForCausalLM

from minigpt.errors import UserError
from minigpt.model.model_lora import apply_lora, lora_layers, set_adapter, unload_lora
from minigpt.model.model_minigpt import MiniGPT
from minigpt.model.peft_format import load_adapter, save_adapter

SHAPES = {
    "qwen3": {},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
    "qwen2": {"qk_norm": False, "attention_bias": True},
}


@pytest.fixture
def exported(tmp_path):
    """A model of ours and the folder it was exported to."""

    def export(**shape) -> tuple[MiniGPT, str]:
        model = small_model(**shape)
        model.save_pretrained(tmp_path / "base")
        return model, str(tmp_path / "base")

    return export


def peft_logits(base: str, adapter) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    return model(ids(MANY)).logits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_our_adapter_and_says_the_same(exported, tmp_path, kind, shape):
    model, base = exported(**SHAPES[shape])
    stir(apply_lora(model, rank=4, alpha=6.0, **KINDS[kind])).eval()
    save_adapter(model, tmp_path / "adapter")
    unmerged = model(ids(MANY)).logits
    assert (peft_logits(base, tmp_path / "adapter") - unmerged).abs().max() <= 1e-5
    assert (unload_lora(model)(ids(MANY)).logits - unmerged).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 2, "lora_alpha": 3},
        {"target_modules": r".*layers\.1\..*proj", "use_dora": True},
        {"target_modules": ["up_proj"], "layers_to_transform": [0], "lora_dropout": 0.1},
        {"target_modules": ["o_proj"], "init_lora_weights": "gaussian"},
    ],
)
def test_an_adapter_made_by_peft_loads_here_and_says_the_same(exported, tmp_path, options):
    ours, base = exported(**SHAPES["qwen2"])
    torch.manual_seed(2)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter", name="theirs")
    set_adapter(ours, "theirs")
    assert (ours.eval()(ids(MANY)).logits - theirs(ids(MANY)).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"], ["model.layers.1.mlp.up_proj", "k_proj"]])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_bit_for_bit_under_another_name(tmp_path, kind, targets):
    model = stir(apply_lora(small_model(), rank=4, dropout=0.2, targets=targets, **KINDS[kind])).eval()
    save_adapter(model, tmp_path)
    again = load_adapter(small_model().eval(), tmp_path, name="again")
    set_adapter(again, "again")
    assert torch.equal(again(ids(MANY)).logits, model(ids(MANY)).logits)
    assert lora_layers(again).keys() == lora_layers(model).keys()
    first = next(iter(lora_layers(again)))
    assert lora_layers(again)[first].adapters["again"] == lora_layers(model)[first].adapters["default"]


def test_a_file_holds_the_matrices_and_nothing_else_although_the_embedding_is_tied(tmp_path):
    model = stir(apply_lora(small_model(), rank=4))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        f"base_model.model.{path}.lora_{kind}.weight": tuple(layer.matrices("default")[kind].shape)
        for path, layer in lora_layers(model).items()
        for kind in "AB"
    }
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < 4 * sum(t.numel() for t in tensors.values()) + 8_000  # and the header


def test_float32_masters_are_stored_instead_of_the_models_own_weights(tmp_path):
    model = stir(apply_lora(small_model(torch.bfloat16), rank=4))
    masters = {name: torch.randn(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, tmp_path, weights=masters)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    stored = tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"]
    assert torch.equal(stored, masters["model.layers.1.mlp.up_proj.lora_A_default"])


@pytest.fixture
def adapter(tmp_path):
    save_adapter(stir(apply_lora(small_model(), rank=4)), tmp_path / "good")
    return tmp_path / "good"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("peft_type", "IA3", "only LORA"),
        ("bias", "all", "trained biases"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("rank_pattern", {"q_proj": 2}, "rank_pattern"),
        ("alpha_pattern", {"q_proj": 2}, "alpha_pattern"),
        ("fan_in_fan_out", True, "fan_in_fan_out"),
        ("init_lora_weights", "pissa", "changes the base weights"),
        ("use_something_new", True, "use_something_new"),
        ("r", 8, "lora_A.weight has shape"),
        ("r", None, "r, lora_alpha or lora_dropout is missing or wrong"),
        ("lora_dropout", 2, "less than 1"),
        ("use_dora", True, "lora_magnitude_vector is missing"),
    ],
)
def test_an_adapter_that_we_would_compute_wrongly_is_refused(adapter, key, value, said):
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**content, key: value}))
    model = small_model()
    with pytest.raises(UserError, match=said):
        load_adapter(model, adapter)
    assert not lora_layers(model)


@pytest.mark.parametrize("shape", [{"num_hidden_layers": 3}, {"intermediate_size": 64}, {"rope_theta": 5e5}])
def test_an_adapter_of_ours_is_refused_on_another_base_model(adapter, shape):
    torch.manual_seed(0)
    config = {**small_model().config.to_dict(), **shape}
    other = MiniGPT(type(small_model().config)(**config))
    with pytest.raises(UserError, match=f"another base model: one with {next(iter(shape))}"):
        load_adapter(other, adapter)


def test_an_adapter_of_pefts_is_refused_on_a_model_without_its_layers_or_widths(adapter):
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path), path)  # without our header, as peft writes it
    with pytest.raises(UserError, match="has no linear layer"):
        load_adapter(small_model(num_hidden_layers=1), adapter)
    with pytest.raises(UserError, match="has shape"):
        load_adapter(small_model(num_key_value_heads=4), adapter)


def _without(name):
    def damage(folder):
        (folder / name).unlink()

    return damage


def _cut(folder):
    content = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])


def _pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _no_json(folder):
    (folder / "adapter_config.json").write_text("{")


def _with_more(folder):
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.weight": torch.ones(1)}, path)


def _with_less(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
    save_file(tensors, folder / "adapter_model.safetensors")


def _empty(folder):
    save_file({}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without("adapter_config.json"), "holds no adapter"),
        (_without("adapter_model.safetensors"), "is missing"),
        (_cut, "not a whole safetensors file"),
        (_pickle, "is a pickle"),
        (_no_json, "not valid JSON"),
        (_with_more, r"lm_head\.weight is no matrix"),
        (_with_less, r"up_proj\.lora_B\.weight is missing"),
        (_empty, "is empty"),
    ],
)
def test_a_damaged_folder_is_refused_and_the_model_stays_as_it_was(adapter, tmp_path, damage, said):
    shutil.copytree(adapter, tmp_path / "bad")
    damage(tmp_path / "bad")
    model = small_model()
    with pytest.raises(UserError, match=said):
        load_adapter(model, tmp_path / "bad")
    assert not lora_layers(model)


def test_the_header_says_which_base_the_adapter_is_for(adapter):
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        made_for = json.loads(file.metadata()["minigpt_base"])
    assert made_for["hidden_size"] == 32
    assert made_for["num_hidden_layers"] == 2
