"""From a path that a person types to a model that answers: a run folder, a Hugging Face folder or a .pth file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

from minigpt.dataset.chat import ChatEncoder
from minigpt.errors import UserError
from minigpt.model.hf import config_from_hf, load_generation_config
from minigpt.model.model_lora import DEFAULT_ADAPTER, set_adapter, unload_lora
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.model.peft_format import is_adapter, load_adapter

SHIPPED_TOKENIZER = Path(__file__).parents[1] / "model"
TRACES_OF_A_RUN = ("checkpoints", "metrics.jsonl", "config.yaml")


def load_for_inference(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    adapter: str | Path | None = None,
) -> tuple[MiniGPT, ChatEncoder]:
    """Loads a model and its tokenizer.

    Args:
        path: A run folder (its `hf/` is read, or else its newest .pth), a Hugging Face folder, or a .pth file.
        device: "auto" takes the GPU where there is one.
        dtype: "auto" is bfloat16 on a GPU and float32 on a CPU; else "float32", "bfloat16" (also "fp32", "bf16").
        adapter: A LoRA folder in PEFT's format, merged into the weights; also a run that has one in `adapter/`.

    Returns:
        The model in evaluation mode, with `eos_token_ids` set to the ids that end its answers, and the encoder.

    Raises:
        FileNotFoundError: when there is no such path, or it holds no model.
        UserError: when the run has not finished, or model and tokenizer do not belong together.
        ValueError: when the folder is damaged or of another layout.
    """
    path = Path(path)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    source = find_weights(path)
    if source.suffix == ".pth":
        model, tokenizer_folder = _load_pth(source), _tokenizer_beside(source)
    else:
        model, tokenizer_folder = MiniGPT.from_pretrained(source), source
    if adapter is not None:
        _merge_adapter(model, Path(adapter))
    encoder = _load_encoder(tokenizer_folder, model.config)
    model.eos_token_ids = _stop_token_ids(tokenizer_folder, encoder)  # type: ignore[assignment]
    return model.to(device=device, dtype=dtype).eval(), encoder


def _merge_adapter(model: MiniGPT, folder: Path) -> None:
    """Put an adapter into the weights, in float32."""
    within = folder / "adapter"
    load_adapter(model, within if is_adapter(within) and not is_adapter(folder) else folder)
    set_adapter(model, DEFAULT_ADAPTER)
    unload_lora(model)


def choose_device(device: str | torch.device) -> torch.device:
    """The device that is meant; "auto" is the GPU where there is one."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device {device!r} is unknown: use auto, cpu or cuda") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda is asked for but torch finds no GPU: use --device cpu")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that is meant; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    named = {"auto": auto, "fp32": torch.float32, "float32": torch.float32} | dict.fromkeys(
        ("bf16", "bfloat16"), torch.bfloat16
    )
    if dtype not in named:
        raise UserError(f"dtype {dtype!r} is unknown: use auto, fp32 or bf16")
    return named[dtype]


def find_weights(path: str | Path) -> Path:
    """Returns what holds the weights: a folder with config.json, or a .pth file.

    Raises:
        FileNotFoundError, UserError: as `load_for_inference`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such run; give a run folder, a Hugging Face folder or a .pth file")
    if path.is_file():
        if path.suffix != ".pth":
            raise UserError(f"{path}: not a model; give a run folder, a Hugging Face folder or a .pth file")
        return path
    for folder in (path / "hf", path):
        if (folder / "config.json").is_file():
            return folder
    weights = sorted(path.glob("*.pth"), key=lambda file: file.stat().st_mtime)
    if weights:
        return weights[-1]
    if any((path / name).exists() for name in TRACES_OF_A_RUN):
        raise UserError(
            f"{path}: the run has not finished, so it has no hf/ yet; repeat its train command to resume it"
        )
    raise FileNotFoundError(
        f"{path}: neither hf/config.json nor config.json is there; give the folder of a finished run"
    )


def stage_of(path: str | Path) -> str | None:
    """The stage that summary.json of a run names ("pretrain", "sft" …), None for folders without one."""
    path = Path(path)
    for folder in (path, path.parent):
        try:
            return json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("stage")
        except (OSError, ValueError, AttributeError):
            continue
    return None


def _load_encoder(folder: Path, config: MiniGPTConfig) -> ChatEncoder:
    encoder = ChatEncoder(folder)
    if encoder.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'}: the tokenizer has {encoder.vocab_size} entries but the model only "
            f"{config.vocab_size}; use the tokenizer that the model was trained with"
        )
    return encoder


def _stop_token_ids(folder: Path, encoder: ChatEncoder) -> tuple[int, ...]:
    """The ids that end an answer: those of generation_config.json, the end of a turn and the end of a text."""
    named: Any = load_generation_config(folder).get("eos_token_id") or []
    named = named if isinstance(named, list) else [named]
    return tuple(dict.fromkeys([*map(int, named), encoder.im_end_id, encoder.eos_id]))


def _tokenizer_beside(weights: Path) -> Path:
    """The tokenizer of a .pth file: of its run, or the shipped one."""
    for folder in (weights.parent, weights.parent / "hf", weights.parent / "data"):
        if (folder / "tokenizer.json").is_file():
            return folder
    return SHIPPED_TOKENIZER


def _load_pth(path: Path) -> MiniGPT:
    """A model from a state dict of plain tensors; nothing in the file is executed."""
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable state dict ({reason}); copy it again, or use the run's hf/") from None
    if not isinstance(state_dict, dict) or "model.embed_tokens.weight" not in state_dict:
        raise UserError(f"{path}: not a state dict of MiniGPT; use a .pth file that a train command wrote")
    beside = path.parent / "hf" / "config.json"
    if beside.is_file():
        config = config_from_hf(json.loads(beside.read_text(encoding="utf-8")), beside)
    else:
        config = config_of_state_dict(state_dict, path)
    model = MiniGPT(config)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: the weights do not fit {beside}: {reason}; take both from one run") from None
    return model


def config_of_state_dict(state_dict: dict[str, torch.Tensor], source: str | Path) -> MiniGPTConfig:
    """Reads a model's shape off its tensors; what leaves no trace in them (rope_theta, context) is the default.

    Raises:
        UserError: without q/k-norm, since then nothing tells the size of a head.
    """
    q_norm = state_dict.get("model.layers.0.self_attn.q_norm.weight")
    if q_norm is None:
        raise UserError(f"{source}: the shape of a model without q/k-norm cannot be read off its weights; use its hf/")
    embedding, head_dim = state_dict["model.embed_tokens.weight"], q_norm.numel()
    attention = "model.layers.0.self_attn."
    head = state_dict.get("lm_head.weight")
    return MiniGPTConfig(
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in state_dict if name.startswith("model.layers.")),
        num_attention_heads=state_dict[attention + "q_proj.weight"].shape[0] // head_dim,
        num_key_value_heads=state_dict[attention + "k_proj.weight"].shape[0] // head_dim,
        intermediate_size=state_dict["model.layers.0.mlp.gate_proj.weight"].shape[0],
        head_dim=head_dim,
        tie_word_embeddings=head is None or torch.equal(head, embedding),
        attention_bias=attention + "q_proj.bias" in state_dict,
    )
