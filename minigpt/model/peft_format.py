"""Adapters on disk, as Hugging Face's PEFT lays them out: adapter_config.json + adapter_model.safetensors.

Our layers have the names of the stock Hugging Face classes, so an adapter that was trained here loads with `peft` on
the exported model and one that `peft` trained loads here, without conversion. peft itself is not needed.

A file holds the adapter's matrices and nothing else. What it was made for is in its header (the shape of the base
model); it is refused on another one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minigpt.errors import UserError
from minigpt.system import sync

from .model_lora import DEFAULT_ADAPTER, LoRA, LoRAConfig, adapter_names, add_adapter, find_targets, lora_layers

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE_KEY = "minigpt_base"
# Our kinds of matrices and what follows the layer's name in a file.
SUFFIXES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# Keys of adapter_config.json that say nothing about the arithmetic, or that are read here; the matrices in the file say
# which layers are adapted. Any other key must be empty.
KNOWN_KEYS = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type", "inference_mode",
    "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size",
    "runtime_config",
}  # fmt: skip
# Ways to start an adapter that leave the base weights alone; the others subtract something from them.
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
SHAPE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "head_dim", "qk_norm", "attention_bias", "rope_theta",
)  # fmt: skip


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    name: str | None = None,
    *,
    weights: Mapping[str, torch.Tensor] | None = None,
    base: str | None = None,
) -> Path:
    """Write an adapter's folder; returns it.

    Args:
        model: With adapters, and a `config`.
        folder: Made when missing.
        name: Which adapter; None: the only one.
        weights: The matrices by the model's names instead of the model's own (for example an engine's masters).
        base: Where the base model is found, for people and for peft.

    Raises:
        UserError: when there is no such adapter.
        OSError: when the disk is full; the folder is as it was.
    """
    name = _chosen(model, name)
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.adapters}
    tensors = {}
    for path, layer in layers.items():
        for kind, parameter in layer.matrices(name).items():
            value = parameter if weights is None else weights[f"{path}.lora_{kind}_{name}"]
            tensors[f"{PREFIX}{path}.{SUFFIXES[kind]}"] = value.detach().cpu().contiguous()
    config = next(iter(layers.values())).adapters[name]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": _target_modules(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", BASE_KEY: json.dumps(_shape(model))}
    partial = folder / f".{WEIGHTS}.partial"
    try:
        save_file(tensors, partial, metadata=header)
        sync(partial)
        (folder / CONFIG).unlink(missing_ok=True)  # so that no config ever stands beside weights of another adapter
        os.replace(partial, folder / WEIGHTS)
    except SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS}: cannot be written ({error}); make room or choose another folder") from None
    finally:
        partial.unlink(missing_ok=True)
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(partial)
    os.replace(partial, folder / CONFIG)
    return folder


def load_adapter(model: nn.Module, folder: str | Path, name: str = DEFAULT_ADAPTER) -> nn.Module:
    """Give a model the adapter of a folder, under a name; it is not active until `set_adapter`. Returns the model.

    Raises:
        UserError: when the folder holds no adapter, one of another kind, or one for another model.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors, header = _read_tensors(folder)
    _check_base(model, header, folder)
    by_layer = _by_layer(tensors, config, folder)
    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    for path, matrices in by_layer.items():
        if path not in linear:
            raise UserError(f"{folder / WEIGHTS}: the model has no linear layer {path}; the adapter is another model's")
        _check_shapes(path, linear[path], matrices, config, folder)
    add_adapter(model, name, config, list(by_layer))
    for path, layer in lora_layers(model).items():
        for kind, parameter in layer.matrices(name).items() if path in by_layer else ():
            parameter.data.copy_(by_layer[path][kind])
            parameter.requires_grad_(False)
    return model


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder looks like an adapter's."""
    return (Path(folder) / CONFIG).is_file()


def _chosen(model: nn.Module, name: str | None) -> str:
    names = adapter_names(model)
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        raise UserError(f"the model has no adapter named {name!r}; it has {', '.join(names) or 'none'}")
    return name  # type: ignore[return-value]  # `in names` says that it is a name


def _target_modules(model: nn.Module, layers: list[str]) -> list[str]:
    """The shortest list of names by which peft finds exactly these layers: ends of names, else whole names."""
    ends = sorted({path.rpartition(".")[2] for path in layers})
    return ends if find_targets(model, ends) == layers else layers


def _shape(model: nn.Module) -> dict[str, Any]:
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    return {key: config[key] for key in SHAPE}


def _read_config(folder: Path) -> LoRAConfig:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no adapter ({CONFIG} is missing); give the folder that peft saved") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        kind = content.get("peft_type") if isinstance(content, dict) else None
        raise UserError(f"{path}: peft_type is {kind}, only LORA is supported")
    if content.get("bias", "none") != "none":
        raise UserError(
            f"{path}: bias is {content['bias']!r}, trained biases are not supported; train with bias='none'"
        )
    if content.get("init_lora_weights", True) not in INITIALISATIONS:
        raise UserError(
            f"{path}: init_lora_weights is {content['init_lora_weights']!r}, which changes the base weights; "
            "convert the adapter to plain LoRA with peft first"
        )
    for key, value in content.items():
        if key not in KNOWN_KEYS and value:
            raise UserError(f"{path}: {key} is {json.dumps(value)}, which is not supported; train the adapter without")
    try:
        return LoRAConfig(
            rank=int(content["r"]),
            alpha=float(content.get("lora_alpha") or 8),
            dropout=float(content.get("lora_dropout") or 0.0),
            rslora=bool(content.get("use_rslora")),
            dora=bool(content.get("use_dora")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: r, lora_alpha or lora_dropout is missing or wrong ({error})") from None


def _read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder}: the adapter is a pickle ({pickles[0]}), which can run code and is not opened; "
                f"save it again as {WEIGHTS}"
            )
        raise UserError(f"{path} is missing; copy the adapter's folder again")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy it again") from None


def _check_base(model: nn.Module, header: Mapping[str, str], folder: Path) -> None:
    """Errors: UserError when the adapter says that it was made for a model of another shape."""
    if BASE_KEY not in header:
        return  # made by peft, which does not say
    made_for, ours = json.loads(header[BASE_KEY]), _shape(model)
    different = [f"{key} {made_for[key]}, not {ours[key]}" for key in SHAPE if made_for.get(key) != ours[key]]
    if different:
        raise UserError(f"{folder} was made for another base model: one with {', '.join(different)}")


def _by_layer(
    tensors: Mapping[str, torch.Tensor], config: LoRAConfig, folder: Path
) -> dict[str, dict[str, torch.Tensor]]:
    """The matrices of every layer by kind. Errors: UserError when there is anything else, or one of them is missing."""
    kinds = ("A", "B", "magnitude") if config.dora else ("A", "B")
    pattern = re.compile(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(re.escape(SUFFIXES[kind]) for kind in kinds)})")
    kind_of = {suffix: kind for kind, suffix in SUFFIXES.items()}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = pattern.fullmatch(name)
        if not found:
            raise UserError(f"{folder / WEIGHTS}: {name} is no matrix of such an adapter; only LoRA's are supported")
        layers.setdefault(found[1], {})[kind_of[found[2]]] = tensor
    for path, matrices in layers.items():
        for kind in kinds:
            if kind not in matrices:
                raise UserError(f"{folder / WEIGHTS}: {path}.{SUFFIXES[kind]} is missing; copy the adapter again")
    if not layers:
        raise UserError(f"{folder / WEIGHTS} is empty; copy the adapter again")
    return layers


def _check_shapes(
    path: str, layer: nn.Linear | LoRA, matrices: Mapping[str, torch.Tensor], config: LoRAConfig, folder: Path
) -> None:
    wanted = {"A": (config.rank, layer.in_features), "B": (layer.out_features, config.rank)}
    wanted |= {"magnitude": (layer.out_features,)}  # type: ignore[dict-item]
    for kind, tensor in matrices.items():
        if tuple(tensor.shape) != wanted[kind]:
            raise UserError(
                f"{folder / WEIGHTS}: {path}.{SUFFIXES[kind]} has shape {tuple(tensor.shape)}, the model and "
                f"{CONFIG} ask for {wanted[kind]}; the adapter is another model's"
            )
