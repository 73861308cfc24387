"""GGUF files read back: every weight, the shape, the vocabulary; and what llama.cpp cannot read is refused."""

import json

import numpy as np
import pytest
import torch
from families import FAMILIES, SHIPPED, write_tokenizer
from gguf import GGUFReader, dequantize

from minigpt.errors import UserError
from minigpt.model.gguf import write_gguf
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig, RoPE

SHAPE = {"vocab_size": 6464, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32}
LAYOUTS = {
    "qwen3": {"qk_norm": True, "tie_word_embeddings": True},
    "llama": {"qk_norm": False, "tie_word_embeddings": False},
    "qwen2": {"qk_norm": False, "attention_bias": True, "tie_word_embeddings": True},
}
LLAMA3 = FAMILIES["llama3.2"].config["rope_scaling"]


def random_model(**options) -> MiniGPT:
    torch.manual_seed(0)
    model = MiniGPT(MiniGPTConfig(**{**SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 256, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model.eval()


def read(path):
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return fields, tensors


def by_our_names(tensors, layers: int) -> dict[str, np.ndarray]:
    """GGUF's names by the table of its specification."""
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    }
    found = {}
    for name, array in tensors.items():
        if name.startswith("blk."):
            _, layer, part, kind = name.split(".")
            found[f"model.layers.{layer}.{parts[part]}.{kind}"] = array
        else:
            module, kind = name.split(".")
            ours = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
            found[f"{ours.get(module, module)}.{kind}"] = array
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 2**-11), ("bf16", 2**-8), ("q8_0", 2**-6)])
def test_every_weight_is_in_the_file(tmp_path, layout, dtype, tolerance):
    model = random_model(**LAYOUTS[layout])
    path = write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), SHIPPED, dtype=dtype)
    fields, tensors = read(path)
    assert fields["general.architecture"] == layout
    found = by_our_names(tensors, 2)
    expected = {k: v for k, v in model.state_dict().items() if not (k == "lm_head.weight" and layout != "llama")}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        ours, theirs = tensor.numpy(), found[name]
        assert ours.shape == theirs.shape, name
        if layout == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # channel 2i of a head in llama.cpp's file is our channel i, channel 2i + 1 is our channel i + D/2
            order = [head * 32 + i + half * 16 for head in range(len(ours) // 32) for i in range(16) for half in (0, 1)]
            ours = ours[order]
        exact = tensor.dim() == 1
        assert np.abs(ours - theirs).max() <= (0 if exact else tolerance * np.abs(ours).max()), name
    assert not list(tmp_path.glob("*.partial"))


def test_shape_vocabulary_and_template_are_in_the_file(tmp_path):
    model = random_model(rope_theta=12345.0, rms_norm_eps=1e-5)
    path = write_gguf(
        tmp_path / "m.gguf", model.config, model.state_dict(), SHIPPED, name="tiny", chat_template="{{ 1 }}"
    )
    fields, _ = read(path)
    expected = {
        "general.name": "tiny",
        "qwen3.block_count": 2,
        "qwen3.context_length": 256,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": model.config.intermediate_size,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.rope.freq_base": 12345.0,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ 1 }}",
    }
    assert {name: fields[name] for name in expected} == expected
    content = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 6464
    assert {text: tokens.index(text) for text in content["model"]["vocab"]} == content["model"]["vocab"]
    assert tokens[:4] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    assert types[:4] == [3, 3, 3, 4]  # control, control, control, user-defined
    assert set(types[32:6400]) == {1}
    assert set(types[6400:]) == {5}  # rows that no token uses
    assert [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]] == [
        tuple(merge) for merge in content["model"]["merges"]
    ]


@pytest.mark.parametrize(
    ("family", "pre", "bos"),
    [("smollm2", "smollm", None), ("qwen2.5", "qwen2", None), ("qwen3", "qwen2", None), ("llama3.2", "llama-bpe", 0)],
)
def test_split_rules_and_first_tokens_of_the_families(tmp_path, family, pre, bos):
    folder = write_tokenizer(tmp_path / "tokenizer", family)
    model = random_model()
    path = write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), folder, eos_token_id=7)
    fields, _ = read(path)
    assert fields["tokenizer.ggml.pre"] == pre
    assert fields.get("tokenizer.ggml.bos_token_id") == bos
    assert fields["tokenizer.ggml.add_bos_token"] == (bos is not None)
    assert fields["tokenizer.ggml.eos_token_id"] == 7


def test_scaled_frequencies(tmp_path):
    model = random_model(qk_norm=False, rope_scaling=LLAMA3)
    fields, tensors = read(write_gguf(tmp_path / "a.gguf", model.config, model.state_dict(), SHIPPED))
    plain = 10_000.0 ** -(torch.arange(0, 32, 2) / 32)
    assert np.allclose(plain.numpy() / tensors["rope_freqs.weight"], RoPE(model.config).frequencies().numpy())
    model = random_model(qk_norm=False, rope_scaling={"rope_type": "linear", "factor": 4.0})
    fields, tensors = read(write_gguf(tmp_path / "b.gguf", model.config, model.state_dict(), SHIPPED))
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert "rope_freqs.weight" not in tensors


def test_what_llama_cpp_cannot_read_is_refused_and_leaves_no_file(tmp_path):
    model = random_model(attention_bias=True)
    with pytest.raises(UserError, match="both q/k-norm and attention biases"):
        write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), SHIPPED)
    folder = write_tokenizer(tmp_path / "tokenizer", "qwen3")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+|\W+"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    model = random_model()
    with pytest.raises(UserError, match="split text in another way"):
        write_gguf(tmp_path / "m.gguf", model.config, model.state_dict(), folder)
    assert not list(tmp_path.glob("m.*"))
