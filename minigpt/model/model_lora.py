"""LoRA: a frozen model is tuned by small matrices beside its weights (arXiv:2106.09685).

A linear layer y = x Wᵀ becomes y = x (W + s·B A)ᵀ, with A of shape [r, in], B of shape [out, r] and r much smaller than
either. Only A and B are trained; B starts at zero, so that nothing changes at first. s is alpha / r, or alpha / √r
(rsLoRA, arXiv:2312.03732). DoRA (arXiv:2402.09353) gives every row of W + s·B A a length m of its own, which is trained
too.

A model can hold several adapters by name; one of them, or none, is active. `peft_format.py` reads and writes them.

Shape suffixes: N tokens, I input features, O output features, R rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from minigpt.errors import UserError

from .model_minigpt import LMHead, MiniGPTOutput, score_labels

DEFAULT_ADAPTER = "default"
# For fewer tokens than this the sum W + s·B A costs more than the two thin products of the branch beside W.
_TOKENS_WORTH_A_SUM = 64


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter is besides its weights.

    Args:
        rank: r, rows of A and columns of B.
        alpha: The adapter is scaled by alpha / rank.
        dropout: Probability with which an input of the branch is dropped in training.
        rslora: Scale by alpha / √rank instead, so that a larger rank does not learn more slowly.
        dora: Also train the length of every row of the adapted weight.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"the rank of an adapter is {self.rank}, it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"the dropout of an adapter is {self.dropout}, it must be at least 0 and less than 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"the alpha of an adapter is {self.alpha}, it must be a number above 0")

    @property
    def scale(self) -> float:
        """s, what B A is multiplied by."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank


class LoRA(nn.Linear):
    """A linear layer whose own weight is frozen, with adapters: two low-rank matrices A and B each.

    It keeps the weight (the same `Parameter`) and its name, so that the names of the base model's weights stay what
    they are. The matrices are parameters of the layer itself and not of a module inside it, since ZeRO-3 gathers what
    belongs to the module that runs.

    Args:
        base: The layer to take the place of.
    """

    def __init__(self, base: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.adapters: dict[str, LoRAConfig] = {}
        self.active: str | None = None
        self._unmerged: torch.Tensor | None = None
        self.train(base.training)

    def add(self, name: str, config: LoRAConfig) -> None:
        """A new adapter that changes nothing yet: A as `nn.Linear` starts (Kaiming), B zero, m the rows' lengths."""
        weight = self.weight.detach()
        A_RI = torch.empty(config.rank, self.in_features, device=weight.device)
        nn.init.kaiming_uniform_(A_RI, a=math.sqrt(5))
        matrices = {"A": A_RI.to(weight.dtype), "B": weight.new_zeros(self.out_features, config.rank)}
        if config.dora:
            matrices["magnitude"] = _row_lengths(weight)
        for matrix, value in matrices.items():
            self.register_parameter(f"lora_{matrix}_{name}", nn.Parameter(value))
        self.adapters[name] = config

    def matrices(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter: A, B and, for DoRA, magnitude."""
        kinds = ("A", "B", "magnitude") if self.adapters[name].dora else ("A", "B")
        return {kind: getattr(self, f"lora_{kind}_{name}") for kind in kinds}

    @property
    def A(self) -> nn.Parameter:
        """[r, in] of the active adapter."""
        return getattr(self, f"lora_A_{self.active}")

    @property
    def B(self) -> nn.Parameter:
        """[out, r] of the active adapter."""
        return getattr(self, f"lora_B_{self.active}")

    @property
    def merged(self) -> bool:
        """Whether the weight holds an adapter now."""
        return self._unmerged is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.active is None or self.merged:
            return F.linear(x, self.weight, self.bias)
        config = self.adapters[self.active]
        p = config.dropout if self.training else 0.0
        bias = None if config.dora else self.bias
        if p or x.numel() < _TOKENS_WORTH_A_SUM * self.in_features:
            branch = F.linear(F.linear(F.dropout(x, p), self.A), self.B)
            y = F.linear(x, self.weight, bias) + config.scale * branch
        else:
            y_NO = _LowRankLinear.apply(x.flatten(0, -2), self.weight, self.A, self.B, bias, config.scale)
            y = y_NO.view(*x.shape[:-1], -1)
        if config.dora:
            y = y * self._row_factor(config)
            y = y if self.bias is None else y + self.bias
        return y

    def _row_factor(self, config: LoRAConfig) -> torch.Tensor:
        """m / ‖W + s·B A‖ of every row, [out]; the length is no path for gradients (DoRA, section 4.3)."""
        with torch.no_grad():
            lengths = _row_lengths(torch.addmm(self.weight, self.B, self.A, alpha=config.scale))
        return getattr(self, f"lora_magnitude_{self.active}") / lengths

    def adapted_weight(self) -> torch.Tensor:
        """W with the active adapter in it, through which gradients flow to the adapter; in the dtype of W."""
        if self.active is None or self.merged:
            return self.weight
        config = self.adapters[self.active]
        weight = torch.addmm(self.weight, self.B, self.A, alpha=config.scale)
        return weight * self._row_factor(config)[:, None] if config.dora else weight

    def merge(self) -> None:
        """Put the active adapter into the weight, which is kept for `unmerge`."""
        if self.active is None or self.merged:
            return
        adapted = merged_weight(self.weight, self.adapters[self.active], **self.matrices(self.active))
        self._unmerged = self.weight.detach().clone()
        self.weight.data.copy_(adapted)

    def unmerge(self) -> None:
        """The weight as it was before `merge`, to the last bit."""
        if self._unmerged is not None:
            self.weight.data.copy_(self._unmerged)
            self._unmerged = None


class LoRAHead(LoRA):
    """An output layer with adapters; with labels it returns what `LMHead` does, without dropout in the branch."""

    def forward(  # type: ignore[override]  # with labels it is more than a linear layer
        self, x_BTE, labels_BT=None, weights_BT=None, reduction: str = "sum", temperature: float = 1.0
    ) -> torch.Tensor | MiniGPTOutput:
        if labels_BT is None:
            return super().forward(x_BTE)
        return score_labels(self.adapted_weight(), x_BTE, labels_BT, weights_BT, reduction, temperature)


class _LowRankLinear(torch.autograd.Function):
    """x (W + s·B A)ᵀ + bias, with gradients for x, A and B and no product that the frozen W does not need.

    Thin products (x Aᵀ, g B) run far below a machine's rate, and a branch beside W has three of them forward and six in
    all. Here the sum W + s·B A is formed first, which costs r multiplications a weight and not a token, and one full
    product remains. (In bf16 that rounds as the merged weight does, so training sees what is exported.)
    """

    @staticmethod
    def forward(ctx, x_NI, weight_OI, A_RI, B_OR, bias_O, scale):
        ctx.save_for_backward(x_NI, weight_OI, A_RI, B_OR)
        ctx.scale = scale
        return F.linear(x_NI, torch.addmm(weight_OI, B_OR, A_RI, alpha=scale), bias_O)

    @staticmethod
    def backward(ctx, grad_NO):
        x_NI, weight_OI, A_RI, B_OR = ctx.saved_tensors
        thin_NR = (grad_NO @ B_OR) * ctx.scale
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_NO @ torch.addmm(weight_OI, B_OR, A_RI, alpha=ctx.scale)
        grad_A = thin_NR.T @ x_NI
        grad_B = (((x_NI @ A_RI.T) * ctx.scale).T @ grad_NO).T  # this way round it takes half the time on a CPU
        return grad_x, None, grad_A, grad_B, None, None


def _row_lengths(weight_OI: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(weight_OI, dim=1)


def merged_weight(
    weight: torch.Tensor,
    config: LoRAConfig,
    A: torch.Tensor,
    B: torch.Tensor,
    magnitude: torch.Tensor | None = None,
) -> torch.Tensor:
    """W + s·B A, with rows of DoRA's lengths; computed and returned in float32 (float64 for float64)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    merged = torch.addmm(weight.detach().to(dtype), B.detach().to(dtype), A.detach().to(dtype), alpha=config.scale)
    if magnitude is not None:
        merged *= (magnitude.detach().to(dtype) / _row_lengths(merged))[:, None]
    return merged


# ------------------------------------------------------------------------------------------------------ whole models


def apply_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    rslora: bool = False,
    dora: bool = False,
    name: str = DEFAULT_ADAPTER,
) -> nn.Module:
    """Give linear layers of a model an adapter, in place, and freeze everything else.

    Args:
        model: Its linear layers are replaced by `LoRA` layers with the same weights.
        rank: r of every adapted layer.
        alpha: Scale of the adapter; None: 2 · rank.
        dropout: On the input of the adapters, in training.
        targets: Which layers: ends of names ("q_proj"), whole names or regular expressions of whole names. None: all
            but the output layer.
        rslora: Scale by alpha / √rank.
        dora: Also train the length of the weight's rows.
        name: Of the adapter. It becomes the active one; adapters that were there before stay, frozen.

    Returns:
        The model.

    Raises:
        UserError: when a target matches no linear layer, or the name is taken.
    """
    config = LoRAConfig(rank, 2.0 * rank if alpha is None else alpha, dropout, rslora, dora)
    add_adapter(model, name, config, find_targets(model, targets))
    set_adapter(model, name)
    return model


def add_adapter(model: nn.Module, name: str, config: LoRAConfig, layers: Sequence[str]) -> None:
    """Give the named linear layers a further adapter, which is not active yet. Errors: UserError."""
    if not name.isidentifier():
        raise UserError(f"{name!r} is no name for an adapter: take letters, digits and underscores")
    if name in adapter_names(model):
        raise UserError(f"the model has an adapter named {name!r} already; choose another name")
    if any(layer.merged for layer in lora_layers(model).values()):
        raise UserError("an adapter is merged into the weights; unmerge it before another one is added")
    for path in layers:
        parent_path, _, child = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        layer = getattr(parent, child)
        if not isinstance(layer, LoRA):
            layer = (LoRAHead if isinstance(layer, LMHead) else LoRA)(layer)
            setattr(parent, child, layer)
        layer.add(name, config)


def find_targets(model: nn.Module, targets: Sequence[str] | None = None) -> list[str]:
    """Names of the linear layers that `targets` mean (see `apply_lora`), in the model's order.

    Raises:
        UserError: when one of them matches none.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if targets is None or list(targets) == ["all-linear"]:
        return [name for name, layer in linear.items() if type(layer) in (nn.Linear, LoRA)]  # a head is a subclass
    chosen = set()
    for target in targets:
        found = {name for name in linear if _matches(target, name)}
        if not found:
            there = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            raise UserError(f"no linear layer is named {target!r}; there are {there}")
        chosen |= found
    return [name for name in linear if name in chosen]


def _matches(target: str, name: str) -> bool:
    if name == target or name.endswith("." + target):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise UserError(f"{target!r} is neither the name of a layer nor a regular expression ({error})") from None


def lora_layers(model: nn.Module) -> dict[str, LoRA]:
    """The layers with adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters that a model holds, the oldest first."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.adapters))


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make one adapter active, the only one that is trained; None: none, and nothing is trained."""
    names = adapter_names(model)
    if name is not None and name not in names:
        raise UserError(f"the model has no adapter named {name!r}; it has {', '.join(names) or 'none'}")
    layers = lora_layers(model).values()
    if any(layer.merged for layer in layers):
        raise UserError("an adapter is merged into the weights; unmerge it before another one is made active")
    model.requires_grad_(False)
    for layer in layers:
        layer.active = name if name in layer.adapters else None
        if layer.active is not None:
            for matrix in layer.matrices(layer.active).values():
                matrix.requires_grad_(True)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what it did before it had adapters (DPO's reference)."""
    layers = list(lora_layers(model).values())
    if any(layer.merged for layer in layers):
        raise UserError("an adapter is merged into the weights; unmerge it before it can be switched off")
    active = [layer.active for layer in layers]
    try:
        for layer in layers:
            layer.active = None
        yield
    finally:
        for layer, name in zip(layers, active, strict=True):
            layer.active = name


def merge_lora(model: nn.Module) -> nn.Module:
    """Put the active adapter into the weights: no cost any more, same output. The sum is formed in float32.

    Raises:
        UserError: when an adapted weight is also another layer's (a tied output layer): merging would change both.
    """
    refuse_tied(model)
    for layer in lora_layers(model).values():
        layer.merge()
    return model


def unmerge_lora(model: nn.Module) -> nn.Module:
    """Undo `merge_lora`: the weights are what they were, to the last bit."""
    for layer in lora_layers(model).values():
        layer.unmerge()
    return model


def unload_lora(model: nn.Module) -> nn.Module:
    """Merge the active adapter and put plain linear layers back: a model without adapters."""
    merge_lora(model)
    for path, layer in lora_layers(model).items():
        parent_path, _, child = path.rpartition(".")
        plain = LMHead if isinstance(layer, LoRAHead) else nn.Linear
        with torch.device("meta"):
            linear = plain(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight, linear.bias = layer.weight, layer.bias
        setattr(model.get_submodule(parent_path), child, linear.train(layer.training))
    return model


def refuse_tied(model: nn.Module) -> None:
    """Errors: UserError when an adapted weight belongs to another layer too, so that it cannot be merged."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in lora_layers(model).items():
        others = [owner for owner in owners[id(layer.weight)] if owner != f"{name}.weight"]
        if layer.active is not None and others:
            raise UserError(
                f"the adapter of {name} cannot be merged: its weight is tied to {others[0]}, which would change too; "
                f"leave {name} out of the targets, or untie the two"
            )


def split_state_dict(
    model: nn.Module, weights: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of a model with adapters (by name, such as an engine's masters) as (merged base, adapter).

    The base has the names of the model without adapters, the active adapter merged into it in float32; the adapter is
    the tensors of the active adapter under the model's names. The model itself gives the structure only.
    """
    refuse_tied(model)
    base = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
    adapter: dict[str, torch.Tensor] = {}
    for path, layer in lora_layers(model).items():
        if layer.active is None:
            continue
        names = {kind: f"{path}.lora_{kind}_{layer.active}" for kind in layer.matrices(layer.active)}
        matrices: dict[str, Any] = {kind: weights[name] for kind, name in names.items()}
        base[f"{path}.weight"] = merged_weight(weights[f"{path}.weight"], layer.adapters[layer.active], **matrices)
        adapter |= {name: weights[name] for name in names.values()}
    return base, adapter
