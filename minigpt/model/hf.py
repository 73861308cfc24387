"""Reads and writes Hugging Face checkpoint folders: config.json + model.safetensors + tokenizer.

Our parameters carry Qwen3's names, so the weights need no conversion: a model with q/k-norm is a stock
`Qwen3ForCausalLM`, one without is a stock `LlamaForCausalLM`, and transformers, vLLM and llama.cpp load either without
remote code. Read are the same two layouts and Qwen2 (a Llama with biases on q, k and v). transformers is not needed.

Folders come from strangers: only safetensors is opened (a pickle runs code), `auto_map` is refused, and an index or a
link may lead to files of its own folder only. Whatever does not fit is an error with a name: nothing stays at its
random value.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minigpt.system import sync

if TYPE_CHECKING:
    from minigpt.model.model_minigpt import DecoderModel, MiniGPTConfig

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
ARCHITECTURES = {"Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
ROPE_TYPES = ("default", "linear", "llama3")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
END_OF_TEXT = "<|endoftext|>"
OTHER_ENDS = ("<|end_of_text|>", "<|eot_id|>", "</s>", "<|im_end|>")  # where a tokenizer does not say
MAX_JSON = 256 << 20
"""Bytes; the tokenizer.json of the largest public vocabularies takes a tenth."""
MAX_SIZES = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 40,
}
"""Larger numbers in a config.json are mistakes or attacks; even a model without weights would not fit into memory."""


# -------------------------------------------------------------------------------------------------------------- config


def config_to_hf(config: MiniGPTConfig, *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Returns the config.json of the stock class with the same arithmetic (token ids of eos/pad are not in it).

    `rope_theta` stands twice: transformers 5 reads `rope_parameters`, 4.x and most engines read the top level and
    silently take 10,000 when it is absent.
    """
    # Llama with biases on q, k and v is Qwen2; Llama's own attention_bias puts one on the output projection as well
    architecture = "Qwen2ForCausalLM" if config.attention_bias else "LlamaForCausalLM"
    architecture = "Qwen3ForCausalLM" if config.qk_norm else architecture
    dtype_name = str(dtype).removeprefix("torch.")
    raw: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, **(config.rope_scaling or {})},
        "bos_token_id": None,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
    if config.rope_scaling:
        raw["rope_scaling"] = dict(config.rope_scaling)  # 4.x reads the scaling here
    if architecture == "LlamaForCausalLM":
        raw |= {"mlp_bias": False, "pretraining_tp": 1}
    else:
        raw |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_hidden_layers}
    return raw


def config_from_hf(raw: Mapping[str, Any], source: str | Path = "config.json") -> MiniGPTConfig:
    """Returns our config for a stock Qwen3, Llama or Qwen2 config.json.

    Args:
        raw: the parsed JSON.
        source: the file's name, for messages.

    Raises:
        ValueError: for remote code, other architectures and options that would change the arithmetic.
    """
    from minigpt.model.model_minigpt import MiniGPTConfig

    _refuse_other_arithmetic(raw, source)
    model_type = ARCHITECTURES[_architecture(raw, source)]
    try:
        sizes = {key: _size(raw, key, source) for key in MAX_SIZES if raw.get(key) is not None}
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        return MiniGPTConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=hidden,
            intermediate_size=sizes["intermediate_size"],
            num_hidden_layers=sizes["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=sizes.get("num_key_value_heads", heads),
            # absent, stock classes differ: Qwen3 takes 128 whatever the hidden size is
            head_dim=sizes.get("head_dim", 128 if model_type == "qwen3" else hidden // heads),
            max_position_embeddings=sizes["max_position_embeddings"],
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qk_norm=model_type == "qwen3",
            attention_bias=model_type == "qwen2" or bool(raw.get("attention_bias", False)),
            rope_theta=_rope_theta(raw),
            rope_scaling=_rope_scaling(raw, source),
        )
    except KeyError as error:
        raise ValueError(
            f"{source}: the key {error} is missing; take the config.json that belongs to the weights"
        ) from None
    except (TypeError, ValueError) as error:
        sentence = str(error)
        named = sentence if sentence.startswith(str(source)) else f"{source}: {sentence}; copy the file again"
        raise ValueError(named) from None


def _size(raw: Mapping[str, Any], key: str, source: str | Path) -> int:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZES[key]:
        raise ValueError(
            f"{source}: {key} is {json.dumps(value)[:40]}, it must be a whole number from 1 to {MAX_SIZES[key]}; "
            f"take the config.json that belongs to the weights"
        )
    return value


def _architecture(raw: Mapping[str, Any], source: str | Path) -> str:
    found = raw.get("architectures") or []
    if len(found) == 1 and found[0] in ARCHITECTURES:
        return str(found[0])
    by_type = {model_type: name for name, model_type in ARCHITECTURES.items()}
    if not found and raw.get("model_type") in by_type:
        return by_type[raw["model_type"]]
    named = ", ".join(map(str, found)) or raw.get("model_type") or "none named"
    raise ValueError(f"{source}: architecture {named} is not supported; supported are {', '.join(ARCHITECTURES)}")


def _refuse_other_arithmetic(raw: Mapping[str, Any], source: str | Path) -> None:
    """Raises for options under which our network would compute something else than the stock class."""
    if "auto_map" in raw:
        raise ValueError(
            f"{source}: 'auto_map' asks to run code from the folder, which is never done; use a stock checkpoint"
        )
    if raw.get("quantization_config"):
        raise ValueError(f"{source}: the weights are quantized; use the unquantized checkpoint of this model")
    sliding = raw.get("use_sliding_window") and "sliding_attention" in raw.get("layer_types", ["sliding_attention"])
    partial = raw.get("partial_rotary_factor") or (raw.get("rope_parameters") or {}).get("partial_rotary_factor")
    for key, differs in {
        "hidden_act": raw.get("hidden_act", "silu") not in ("silu", "swish"),
        "mlp_bias": bool(raw.get("mlp_bias")),
        "use_sliding_window": bool(sliding),
        "partial_rotary_factor": partial not in (None, 1, 1.0),
    }.items():
        if differs:
            value = json.dumps(raw.get(key, partial))
            raise ValueError(f"{source}: {key} = {value} is not supported; choose a checkpoint of the plain layout")


def _rope_theta(raw: Mapping[str, Any]) -> float:
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    return float(parameters.get("rope_theta") or raw.get("rope_theta") or 10_000.0)


def _rope_scaling(raw: Mapping[str, Any], source: str | Path) -> dict[str, Any] | None:
    """The scaling of the rotary frequencies (`rope_type` and its numbers), None for the default kind."""
    scaling = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope_type = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    for key in ("type", "rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
    if rope_type == "default":
        return None
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{source}: rope_type {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if rope_type == "llama3":
        scaling.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    return {"rope_type": rope_type, **scaling}


# -------------------------------------------------------------------------------------------------------------- saving


def save_hf_folder(
    model: DecoderModel,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    tokenizer_folder: str | Path | None = None,
    generation_config: Mapping[str, Any] | None = None,
    extra_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load; returns its path.

    Everything is written and synced under a temporary name first. Then config.json goes, the new files take their
    places, and config.json comes last: after a crash the folder holds the old model, the new one, or no config.json.

    Args:
        model: whose `config` and, without `state_dict`, whose weights are stored.
        folder: made when missing; files of other names in it stay.
        dtype: of the stored weights; None keeps each tensor's own.
        state_dict: weights to store instead of the model's (for example fp32 masters gathered from a ZeRO engine).
        tokenizer_folder: where tokenizer.json and tokenizer_config.json lie; they are copied byte for byte, and the
            ids of eos and pad are taken from them. None writes weights and configs only.
        generation_config: entries added to generation_config.json (for example temperature).
        extra_config: entries of config.json to add or replace (a reward model names another architecture).

    Raises:
        ValueError: when the tokenizer has ids that the model has no row for.
        FileNotFoundError: when the tokenizer's files are missing.
        OSError: when the disk is full; the folder is as it was.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _storable(model.state_dict() if state_dict is None else state_dict, model.config, dtype)
    stored_dtype = tensors["model.embed_tokens.weight"].dtype
    config = config_to_hf(model.config, dtype=stored_dtype)
    generation: dict[str, Any] = {}
    if tokenizer_folder is not None:
        ids = special_token_ids(tokenizer_folder, vocab_size=model.config.vocab_size)
        config |= {"eos_token_id": ids["eos"][0], "pad_token_id": ids["pad"]}
        generation |= {"eos_token_id": ids["eos"], "pad_token_id": ids["pad"]}
    generation |= dict(generation_config or {})
    config |= dict(extra_config or {})

    for stale in folder.glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        staging = Path(name)
        try:
            save_file(tensors, staging / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(
                f"{folder / WEIGHTS}: cannot be written ({error}); make room or choose another folder"
            ) from None
        _write_json(staging / "generation_config.json", generation)
        for file in TOKENIZER_FILES if tokenizer_folder is not None else ():
            if (Path(tokenizer_folder or "") / file).exists():
                shutil.copyfile(Path(tokenizer_folder or "") / file, staging / file)
        _write_json(staging / "config.json", config)
        _move_into_place(staging, folder)
    return folder


def _storable(
    tensors: Mapping[str, torch.Tensor], config: MiniGPTConfig, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors in the wanted dtype, the tied head once."""
    stored = {}
    for name, tensor in tensors.items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        tensor = tensor.detach()
        stored[name] = tensor.to(device="cpu", dtype=dtype if tensor.is_floating_point() else None).contiguous()
    if config.attention_bias and config.qk_norm:  # the stock Qwen3 class has one bias that we do not: zero
        for layer in range(config.num_hidden_layers):
            bias = torch.zeros(config.hidden_size, dtype=stored["model.embed_tokens.weight"].dtype)
            stored[f"model.layers.{layer}.self_attn.o_proj.bias"] = bias
    return stored


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move_into_place(staging: Path, folder: Path) -> None:
    """Moves the staged files over the folder's, config.json last, each step synced to the disk."""
    staged = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
    for path in staged:
        sync(path)
    (folder / "config.json").unlink(missing_ok=True)
    (folder / WEIGHTS_INDEX).unlink(missing_ok=True)
    sync(folder)
    for path in staged:
        os.chmod(path, 0o644)
        if path.name == "config.json":
            sync(folder)
        os.replace(path, folder / path.name)
    sync(folder)


def special_token_ids(tokenizer_folder: str | Path, vocab_size: int | None = None) -> dict[str, Any]:
    """Reads the ids that end a text from a tokenizer folder.

    Returns:
        `{"eos": [ids], "pad": id}`: eos is tokenizer_config.json's eos_token, then `<|endoftext|>` where it is another
        one: a chat model stops at the end of its turn, and at the end of the text as a base model does. Where the file
        or the entry is missing, it is the first known name of such a token that tokenizer.json has.

    Raises:
        FileNotFoundError: when tokenizer.json is missing.
        ValueError: when no token ends a text, a named token is not in the vocabulary, or an id is beyond `vocab_size`.
    """
    folder = Path(tokenizer_folder)
    tokenizer = _read_json(folder / "tokenizer.json")
    config = folder / "tokenizer_config.json"
    settings = _read_json(config) if config.exists() else {}
    vocab = tokenizer.get("model", {}).get("vocab", {})
    ids: dict[str, int] = dict(vocab) if isinstance(vocab, dict) else {}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    if vocab_size is not None and ids and max(ids.values()) >= vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: the tokenizer has ids up to {max(ids.values())} but the model's vocab_size "
            f"is {vocab_size}; use the tokenizer that the model was trained with"
        )

    def find(key: str) -> int:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token not in ids:
            raise ValueError(f"{config}: {key} {token!r} is not in tokenizer.json; name a token of it")
        return ids[token]

    known = next((ids[name] for name in (END_OF_TEXT, *OTHER_ENDS) if name in ids), None)
    eos = [known if settings.get("eos_token") is None and known is not None else find("eos_token")]
    if ids.get(END_OF_TEXT, eos[0]) != eos[0]:
        eos.append(ids[END_OF_TEXT])
    return {"eos": eos, "pad": find("pad_token") if settings.get("pad_token") else eos[-1]}


# ------------------------------------------------------------------------------------------------------------- loading


def read_config(folder: Path) -> MiniGPTConfig:
    """The shape of the model in a Hugging Face folder.

    Raises:
        ValueError: for a damaged file or an unknown layout: one sentence that names the file.
    """
    path = folder / "config.json"
    return config_from_hf(_read_json(path), path)


def load_hf_folder(folder: str | Path) -> tuple[MiniGPTConfig, dict[str, torch.Tensor]]:
    """Reads a stock Qwen3, Llama or Qwen2 folder.

    Returns:
        Our config, and a state dict (dtypes as stored, CPU) with exactly the keys and shapes of `MiniGPT(config)`.

    Raises:
        FileNotFoundError: when the folder, config.json or a weight file is missing.
        ValueError: for pickles, remote code, unknown layouts, damaged files, and tensors that are missing, unexpected
            or of another shape: one sentence that names them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a folder with config.json and {WEIGHTS}")
    for name in ("config.json", "generation_config.json", WEIGHTS_INDEX, *TOKENIZER_FILES):
        refuse_links_out(folder / name)
    config = read_config(folder)
    check_tokenizer(folder)
    tensors: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        refuse_links_out(path)
        more = _read_safetensors(path)
        if twice := sorted(tensors.keys() & more.keys()):
            raise ValueError(f"{path}: {_some(twice)} is stored in another file as well; download the model again")
        tensors |= more
    return config, _fit(config, tensors, folder)


def refuse_links_out(path: Path) -> None:
    """Raises ValueError for a file that is a link to somewhere outside of its folder.

    What it shows would be copied with the model. Hugging Face's cache, whose `snapshots/REVISION/` link to the `blobs/`
    beside, is meant so.
    """
    folder, target = path.parent.resolve(), path.resolve()
    cache = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    if target.parent not in (folder, cache):
        raise ValueError(f"{path}: is a link to {target}, outside of its folder; put the file itself there")


def check_tokenizer(folder: Path) -> None:
    """Raises ValueError where the tokenizer of a folder (if there is one) asks for code, or is not byte-level BPE;
    FileNotFoundError where its configuration is missing.

    Others, such as SentencePiece's, join a text with its neighbours, so that segments could not be encoded one by one.
    """
    if (folder / "tokenizer_config.json").is_file() and "auto_map" in _read_json(folder / "tokenizer_config.json"):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: 'auto_map' asks to run code from the folder, which is never done; "
            f"use a stock checkpoint"
        )
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer_config.json'}: no such file; take the whole folder of a model")
    tokenizer = _read_json(path)
    kind = (tokenizer.get("model") or {}).get("type")
    if kind != "BPE" or '"ByteLevel"' not in json.dumps([tokenizer.get("pre_tokenizer"), tokenizer.get("decoder")]):
        raise ValueError(
            f"{path}: the tokenizer is {kind or 'of an unknown kind'} and not byte-level BPE, the only kind that is "
            f"supported; choose a model of the Qwen, Llama 3 or SmolLM families"
        )


def load_generation_config(folder: str | Path) -> dict[str, Any]:
    """Returns generation_config.json, or {} where there is none."""
    path = Path(folder) / "generation_config.json"
    return _read_json(path) if path.exists() else {}


def convert_hf_folder(source: str | Path, output: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Reads a folder with every check and writes it anew in our layout: both `export` and `import` are this.

    Args:
        source: a stock folder. Its tokenizer is copied when it has one.
        output: the folder to write.
        dtype: of the stored weights; None keeps the source's.
    """
    from minigpt.model.model_minigpt import MiniGPT

    config, tensors = load_hf_folder(source)
    with torch.device("meta"):
        model = MiniGPT(config)
    has_tokenizer = (Path(source) / "tokenizer.json").exists()
    extra = {key: value for key, value in load_generation_config(source).items() if key != "transformers_version"}
    return save_hf_folder(
        model,
        output,
        dtype,
        state_dict=tensors,
        tokenizer_folder=source if has_tokenizer else None,
        generation_config=extra,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a complete Hugging Face folder")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: has {path.stat().st_size:,} bytes, far more than any real one; copy the file again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object was expected, found {type(content).__name__}; copy the file again")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files to read: the single one, or those of the index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder}: the weights are pickles ({pickles[0]}), which can run code and are not opened; "
                f"convert them to {WEIGHTS}"
            )
        raise FileNotFoundError(f"{folder}: neither {WEIGHTS} nor {WEIGHTS_INDEX} is there; give a complete folder")
    index = folder / WEIGHTS_INDEX
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: 'weight_map' is missing or empty; copy the file again")
    files = []
    for name in sorted(set(map(str, names.values()))):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {name!r} is not the name of a safetensors file in this folder; refuse this checkpoint"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file, though {WEIGHTS_INDEX} names it; download it")
        files.append(folder / name)
    return files


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); copy it again") from None


def _fit(config: MiniGPTConfig, tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Returns `tensors` with exactly the keys and shapes of `MiniGPT(config)`, or raises with the difference."""
    from minigpt.model.model_minigpt import MiniGPT

    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in MiniGPT(config).state_dict().items()}
    # buffers that old transformers stored, recomputed from the config
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    _resolve_tied_head(config, tensors, expected, folder)
    for name in [name for name in tensors if name.endswith("self_attn.o_proj.bias")]:
        if tensors[name].any():
            raise ValueError(f"{folder}: {name} is not zero and MiniGPT has no such bias; choose another checkpoint")
        del tensors[name]
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind} ({_some(names)})"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(
            f"{folder}: the weights do not fit config.json: {', '.join(parts)}; take both from one checkpoint"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensors[name].shape)} but config.json asks for {shape}; "
                f"take both from one checkpoint"
            )
    return tensors


def _resolve_tied_head(
    config: MiniGPTConfig, tensors: dict[str, torch.Tensor], expected: Iterable[str], folder: Path
) -> None:
    """Makes `lm_head.weight` present or absent as the model's state dict has it; refuses a tied head that differs."""
    if not config.tie_word_embeddings or "model.embed_tokens.weight" not in tensors:
        return
    embedding, head = tensors["model.embed_tokens.weight"], tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, embedding):
        raise ValueError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight although config.json ties them; "
            f"set tie_word_embeddings to false in config.json"
        )
    if "lm_head.weight" in expected:
        tensors["lm_head.weight"] = embedding


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
