"""Small folders in the style of public model families: tokenizer, chat template, and a random model of its class.

The tokenizers have the vocabulary of ours with the family's split rules, added tokens, normalizer and post-processor.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "minigpt" / "model"
TEMPLATES = Path(__file__).parent / "dataset" / "templates"
QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_REGEX = QWEN_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


class Family(NamedTuple):
    """What sets a family apart.

    Attributes:
        architecture: transformers' class.
        special: control tokens, from id 0 on.
        plain: added tokens that are text, after them.
        eos: tokenizer_config.json's eos_token.
        end_of_turn: what ends an answer.
        config: of the model class, over the small shape.
    """

    architecture: str
    special: tuple[str, ...]
    plain: tuple[str, ...]
    eos: str
    end_of_turn: str
    config: dict


QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "smollm2": Family(
        "LlamaForCausalLM",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"),
        (),
        "<|im_end|>",
        "<|im_end|>",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 100_000.0},
    ),
    "qwen2.5": Family(
        "Qwen2ForCausalLM",
        QWEN_SPECIAL,
        ("<tool_call>", "</tool_call>"),
        "<|im_end|>",
        "<|im_end|>",
        {"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_theta": 1e6},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        QWEN_SPECIAL,
        ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
        "<|im_end|>",
        "<|im_end|>",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 32, "rope_theta": 1e6},
    ),
    "llama3.2": Family(
        "LlamaForCausalLM",
        LLAMA_SPECIAL,
        (),
        "<|eot_id|>",
        "<|eot_id|>",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    ),
}


def write_tokenizer(folder: Path, name: str, template: bool = True) -> Path:
    """tokenizer.json and tokenizer_config.json of a family, with its chat template."""
    family = FAMILIES[name]
    content = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    old = [token["content"] for token in content["added_tokens"]]
    own = (*family.special, *family.plain)
    spare = [f"<|unused_{i}|>" for i in range(len(own), len(old))]
    renamed = dict(zip(old, [*own, *spare], strict=True))
    content["model"]["vocab"] = {renamed.get(text, text): i for text, i in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        token["content"] = renamed[token["content"]]
        token["special"] = token["content"] not in family.plain
    if name.startswith("qwen"):
        content["normalizer"] = {"type": "NFC"}
    if name == "smollm2":
        digits = {"type": "Digits", "individual_digits": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, {**BYTES, "use_regex": True}]}
    if name == "llama3.2":
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": LLAMA_REGEX}
        bos = {"id": "<|begin_of_text|>", "ids": [0], "tokens": ["<|begin_of_text|>"]}
        first, text = {"SpecialToken": {"id": bos["id"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        second = {"Sequence": {"id": "B", "type_id": 1}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"SpecialToken": {"id": bos["id"], "type_id": 1}}, second],
            "special_tokens": {bos["id"]: bos},
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": family.eos,
        "bos_token": "<|begin_of_text|>" if name == "llama3.2" else None,
        "pad_token": None if name == "llama3.2" else family.special[0],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if template:
        shutil.copy(TEMPLATES / f"{name}.jinja", folder / "chat_template.jinja")
    return folder


def write_model(folder: Path, name: str, max_shard_size: str = "5GB", context: int = 512):
    """A random model of the family's class, made and saved by transformers, with its tokenizer; returns the model."""
    import torch
    import transformers

    family = FAMILIES[name]
    torch.manual_seed(0)
    settings = dict(family.config)
    rope = {"rope_type": "default", **settings.pop("rope_scaling", {}), "rope_theta": settings.pop("rope_theta")}
    config = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))(
        vocab_size=6400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        bos_token_id=0,
        eos_token_id=family.special.index(family.eos),
        attn_implementation="eager",
        **settings,
    )
    model = getattr(transformers, family.architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder, name)
    return model
