"""Writes a model as one GGUF file for llama.cpp and what is built on it (ollama, LM Studio, ...).

The file's architecture is `qwen3`, `llama` or `qwen2`, whichever the model is. llama.cpp's `llama` turns neighbouring
channels (2i, 2i+1) where Hugging Face's layout turns (i, i + D/2), so q and k are reordered there, and only there.
Names and meaning of the metadata: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minigpt.errors import UserError

from .hf import special_token_ids

if TYPE_CHECKING:
    import gguf

    from .model_minigpt import MiniGPTConfig

DTYPES = ("fp32", "fp16", "bf16", "q8_0")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def write_gguf(
    path: str | Path,
    config: MiniGPTConfig,
    state_dict: Mapping[str, torch.Tensor],
    tokenizer_folder: str | Path,
    *,
    dtype: str = "bf16",
    name: str = "minigpt",
    chat_template: str | None = None,
    eos_token_id: int | None = None,
) -> Path:
    """Writes the file, whole or not at all; returns its path.

    Args:
        path: of the file.
        config: the model's shape.
        state_dict: its weights by our names.
        tokenizer_folder: where tokenizer.json and tokenizer_config.json lie.
        dtype: of the matrices: one of `DTYPES`. Vectors (norms, biases) are float32. A matrix whose rows cannot be
            cut into q8_0's blocks of 32 is stored in fp16.
        name: of the model, for people.
        chat_template: Jinja source for llama.cpp's chat.
        eos_token_id: what ends an answer; None: the tokenizer's.

    Raises:
        UserError: the package `gguf` is missing, or llama.cpp knows no such model or tokenizer.
        OSError: there is no room for it.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("writing GGUF needs the package gguf: pip install gguf") from None
    path = Path(path)
    architecture = _architecture(config)
    tokenizer = _tokenizer(Path(tokenizer_folder), config.vocab_size)
    ids = special_token_ids(tokenizer_folder, vocab_size=config.vocab_size)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(None, architecture)
    _add_shape(writer, config, name, dtype)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer["pre"])
    writer.add_token_list(tokenizer["tokens"])
    writer.add_token_types(tokenizer["types"])
    writer.add_token_merges(tokenizer["merges"])
    writer.add_eos_token_id(ids["eos"][0] if eos_token_id is None else eos_token_id)
    writer.add_pad_token_id(ids["pad"])
    if tokenizer["bos"] is not None:
        writer.add_bos_token_id(tokenizer["bos"])
    writer.add_add_bos_token(tokenizer["bos"] is not None)
    if chat_template:
        writer.add_chat_template(chat_template)
    for tensor_name, array in _tensors(config, state_dict):
        kind = _kind(array, dtype)
        writer.add_tensor(tensor_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path}: cannot be written ({reason}); make room or choose another folder") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def _architecture(config: MiniGPTConfig) -> str:
    if config.qk_norm and config.attention_bias:
        raise UserError("llama.cpp knows no model with both q/k-norm and attention biases: export as hf or pth")
    return "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"


def _add_shape(writer: gguf.GGUFWriter, config: MiniGPTConfig, name: str, dtype: str) -> None:
    import gguf

    file_types = {
        "fp32": gguf.LlamaFileType.ALL_F32,
        "fp16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_types[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling and config.rope_scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope_scaling["factor"]))


def _tensors(config: MiniGPTConfig, state_dict: Mapping[str, torch.Tensor]) -> list[tuple[str, np.ndarray]]:
    """GGUF's names and float32 arrays; a tied output layer is left out, since llama.cpp takes the embedding then."""
    within = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in within.items()}
    tensors = []
    for key, tensor in state_dict.items():
        module, _, kind = key.rpartition(".")
        if config.tie_word_embeddings and module == "lm_head":
            continue
        array = tensor.detach().to("cpu", torch.float32).numpy()
        if _architecture(config) == "llama" and module.endswith(("q_proj", "k_proj")):
            array = _interleave(array, config.head_dim)
        tensors.append((f"{names[module]}.{kind}", np.ascontiguousarray(array)))
    if config.rope_scaling and config.rope_scaling["rope_type"] == "llama3":
        tensors.append(("rope_freqs.weight", _frequency_factors(config)))
    return tensors


def _interleave(array: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows i and i + D/2 of every head become neighbours. float32 [H*D, ...] → the same shape."""
    heads = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return heads.swapaxes(1, 2).reshape(array.shape)


def _frequency_factors(config: MiniGPTConfig) -> np.ndarray:
    """What llama.cpp divides the rotary frequencies by, float32 [D/2]: Llama 3's scaling as numbers."""
    from dataclasses import replace

    from .model_minigpt import RoPE

    plain = RoPE(replace(config, rope_scaling=None)).frequencies()
    return (plain / RoPE(config).frequencies()).float().numpy()


def _kind(array: np.ndarray, dtype: str) -> gguf.GGMLQuantizationType:
    from gguf import GGMLQuantizationType as Kind

    if array.ndim == 1 or dtype == "fp32":
        return Kind.F32
    if dtype == "q8_0":
        return Kind.Q8_0 if array.shape[-1] % 32 == 0 else Kind.F16
    return Kind.F16 if dtype == "fp16" else Kind.BF16


def _tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The vocabulary as llama.cpp stores it; rows of the model that no token uses are filled up."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for text, i in content["model"]["vocab"].items():
        tokens[i], types[i] = text, NORMAL
    for token in content["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "tokens": tokens,
        "types": types,
        "merges": merges,
        "pre": _split_rule(content.get("pre_tokenizer"), folder / "tokenizer.json"),
        "bos": _first_token(content.get("post_processor")),
    }


def _split_rule(rule: Any, source: Path) -> str:
    """llama.cpp's name for how the tokenizer splits text. Errors: UserError for rules that it does not know."""
    steps = rule.get("pretokenizers", [rule]) if isinstance(rule, dict) else []
    patterns = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    kinds = [step.get("type") for step in steps]
    if kinds == ["Split", "ByteLevel"] and patterns[0] in (QWEN_SPLIT, LLAMA_SPLIT):
        return "qwen2" if patterns[0] == QWEN_SPLIT else "llama-bpe"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex"):
        return "smollm"
    raise UserError(
        f"{source}: llama.cpp would split text in another way than this tokenizer does: export as hf, or train with a "
        f"tokenizer of the Qwen2, Llama 3 or SmolLM families (MiniGPT's is one)"
    )


def _first_token(post_processor: Any) -> int | None:
    """The id that the tokenizer puts before every text, None where it puts nothing there."""
    steps = post_processor.get("processors", [post_processor]) if isinstance(post_processor, dict) else []
    for step in steps:
        first = (step.get("single") or [{}])[0].get("SpecialToken")
        if step.get("type") == "TemplateProcessing" and first:
            return int(step["special_tokens"][first["id"]]["ids"][0])
    return None
