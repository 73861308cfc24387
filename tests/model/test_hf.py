"""Our weights in transformers' classes and theirs in ours: the same logits; and folders that must not be loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.model import hf
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

TOLERANCE = 1e-5
TOKENIZER = Path(hf.__file__).parent
SHAPE = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def random_model(seed: int = 0, **options) -> MiniGPT:
    """A model whose norms and biases are not at their trivial start values, and whose attention is not uniform."""
    torch.manual_seed(seed)
    model = MiniGPT(MiniGPTConfig(**{**SHAPE, "max_position_embeddings": 256, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.08 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def load_stock(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, attn_implementation="eager").eval()


LAYOUTS = {
    "Qwen3ForCausalLM": {"qk_norm": True},
    "LlamaForCausalLM": {"qk_norm": False},
    "Qwen2ForCausalLM": {"qk_norm": False, "attention_bias": True},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("architecture", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_exported_folder_gives_equal_logits_in_transformers(tmp_path, architecture, tied, kv_heads):
    model = random_model(
        tie_word_embeddings=tied, num_key_value_heads=kv_heads, rope_theta=500.0, **LAYOUTS[architecture]
    )
    model.save_pretrained(tmp_path)
    stock = load_stock(tmp_path)
    assert type(stock).__name__ == architecture
    ids = torch.randint(0, 131, (2, 100))
    assert (logits_of(stock, ids) - logits_of(model, ids)).abs().max() <= TOLERANCE
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not tied)


@pytest.mark.parametrize("architecture", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "60KB"])
def test_stock_folder_gives_equal_logits_in_minigpt(tmp_path, architecture, tied, shard_size):
    import transformers

    torch.manual_seed(1)
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    config = config_class(
        **SHAPE,
        intermediate_size=160,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 750.0},
        attn_implementation="eager",
    )
    stock = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    stock.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / hf.WEIGHTS_INDEX).exists() == (shard_size == "60KB")
    model = MiniGPT.from_pretrained(tmp_path)
    ids = torch.randint(0, 131, (2, 100))
    assert (logits_of(stock, ids) - logits_of(model, ids)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 2.0}], ids=lambda s: s["rope_type"])
def test_scaled_rotary_frequencies_survive_the_round_trip_and_agree(tmp_path, scaling):
    model = random_model(qk_norm=False, rope_scaling=scaling, rope_theta=5000.0)
    plain = random_model(qk_norm=False, rope_theta=5000.0)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 131, (1, 200))
    assert (logits_of(load_stock(tmp_path), ids) - logits_of(model, ids)).abs().max() <= TOLERANCE
    assert (logits_of(plain, ids) - logits_of(model, ids)).abs().max() > 0.01
    assert MiniGPT.from_pretrained(tmp_path).config == model.config


def test_packed_documents_equal_each_document_alone_in_transformers(tmp_path):
    model = random_model(num_key_value_heads=2)
    model.save_pretrained(tmp_path)
    stock = load_stock(tmp_path)
    lengths = [17, 1, 60, 22]
    ids = torch.randint(0, 131, (1, sum(lengths)))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    document_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=position_ids, document_ids=document_ids).logits[0]
    alone = torch.cat([logits_of(stock, part[None])[0] for part in ids[0].split(lengths)])
    assert (packed - alone).abs().max() <= TOLERANCE


def test_save_and_load_is_bit_exact_and_stores_the_asked_dtype(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "fp32")
    again = MiniGPT.from_pretrained(tmp_path / "fp32")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    model.save_pretrained(tmp_path / "bf16", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "bf16" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_rope_theta_stands_at_both_places(tmp_path):
    random_model(rope_theta=1234.0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1234.0
    for absent in ("rope_theta", "rope_parameters"):  # either place alone is enough for us
        one = {key: value for key, value in config.items() if key != absent}
        assert hf.config_from_hf(one).rope_theta == 1234.0


def test_tokenizer_travels_with_the_weights_and_names_the_end_tokens(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    random_model(vocab_size=6400).save_pretrained(tmp_path, tokenizer_folder=TOKENIZER)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    text = "你好，MiniGPT!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    stock = load_stock(tmp_path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert stock(ids).logits.shape == (1, ids.shape[1], 6400)
    expected = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == expected
    assert stock.config.eos_token_id == expected[0]
    assert stock.config.pad_token_id == expected[1]


def test_a_tokenizer_without_a_configuration_ends_texts_with_a_token_of_a_known_name(tmp_path):
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    assert hf.special_token_ids(tmp_path) == {"eos": [0], "pad": 0}
    plain = json.loads((tmp_path / "tokenizer.json").read_text())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] == "<think>"]
    plain["model"]["vocab"] = {"a": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"eos_token None is not in tokenizer\.json"):
        hf.special_token_ids(tmp_path)


def test_a_smaller_vocabulary_than_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer has ids up to 6399 .* vocab_size is 131"):
        random_model().save_pretrained(tmp_path, tokenizer_folder=TOKENIZER)


def test_convert_keeps_weights_tokenizer_and_generation_settings(tmp_path):
    model = random_model(vocab_size=6400)
    model.save_pretrained(tmp_path / "a", tokenizer_folder=TOKENIZER, generation_config={"temperature": 0.7})
    hf.convert_hf_folder(tmp_path / "a", tmp_path / "b")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert hf.load_generation_config(tmp_path / "b")["temperature"] == 0.7


# ------------------------------------------------------------------------------------- what must not be left or loaded


def test_a_failed_save_leaves_the_old_model_whole(tmp_path, monkeypatch):
    """RLIMIT_FSIZE makes the disk really refuse to store the weights half-way."""
    import resource
    import signal

    old = random_model(seed=1)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors: cannot be written"):
            random_model(seed=2).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_over_an_old_folder_replaces_it_and_keeps_other_files(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    random_model(seed=1).save_pretrained(tmp_path)
    new = random_model(seed=2)
    new.save_pretrained(tmp_path)
    assert torch.equal(MiniGPT.from_pretrained(tmp_path).lm_head.weight, new.lm_head.weight)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not list(tmp_path.glob(".partial*"))


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_index(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / hf.WEIGHTS_INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def add_bias(tensors: dict) -> None:
    tensors["model.layers.1.self_attn.o_proj.bias"] = torch.ones(64)


BAD_FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "config without heads": (
        lambda f: (f / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}'),
        r"'num_attention_heads' is missing",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"neither model\.safetensors nor"),
    "pickle": (as_pickle, r"pickles \(pytorch_model\.bin\)"),
    "remote code": (lambda f: edit_config(f, auto_map={"AutoModel": "evil.Model"}), r"'auto_map' asks to run code"),
    "architecture": (lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]), r"GPT2LMHeadModel is not supported"),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), r'hidden_act = "gelu" is not supported'),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), r"quantized"),
    "sliding window": (lambda f: edit_config(f, use_sliding_window=True), r"use_sliding_window = true"),
    "yarn": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        r"rope_type 'yarn' is not supported",
    ),
    "missing tensor": (
        lambda f: edit_weights(f, lambda t: t.pop("model.layers.2.mlp.up_proj.weight")),
        r"1 missing \(model\.layers\.2\.mlp\.up_proj\.weight\)",
    ),
    "unexpected tensor": (
        lambda f: edit_weights(f, lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2, 2)})),
        r"1 unexpected \(model\.layers\.3\.mlp\.up_proj\.weight\)",
    ),
    "bias that we do not have": (lambda f: edit_weights(f, add_bias), r"o_proj\.bias is not zero"),
    "other shape": (lambda f: edit_config(f, intermediate_size=64), r"gate_proj\.weight has shape \(192, 64\) but"),
    "tied but different": (
        lambda f: edit_weights(f, lambda t: t.update({"lm_head.weight": torch.zeros(131, 64)})),
        r"lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "truncated": (truncate, r"model\.safetensors: not a whole safetensors file"),
    "path in the index": (lambda f: as_index(f, "../outside.safetensors"), r"is not the name of a safetensors file"),
    "absolute path in the index": (lambda f: as_index(f, "/etc/passwd"), r"is not the name of a safetensors file"),
    "shard that is absent": (lambda f: as_index(f, "model-00001.safetensors"), r"no such file, though"),
}


@pytest.mark.parametrize("damage", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_sentence_that_names_the_trouble(tmp_path, damage):
    folder = tmp_path / "model"
    random_model().save_pretrained(folder)
    change, message = BAD_FOLDERS[damage]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        MiniGPT.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_stored_zero_output_bias_is_accepted(tmp_path):
    """Stock Qwen3 with attention_bias has a bias on o_proj; ours has none: export writes zeros, import drops them."""
    model = random_model(attention_bias=True)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 131, (2, 50))
    assert (logits_of(load_stock(tmp_path), ids) - logits_of(model, ids)).abs().max() <= TOLERANCE
    assert torch.equal(logits_of(MiniGPT.from_pretrained(tmp_path), ids), logits_of(model, ids))


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        MiniGPT.from_pretrained(tmp_path / "nowhere")
