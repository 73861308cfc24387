"""The network as generation runs it: token ids to logits with a KV cache, in as few operations as a step can have.

A decode step multiplies a few rows by every weight, so what it costs is reading the weights and calling operators. Here
q, k and v are one product, gate and up another; on a CPU the weights are laid out once in the order in which oneDNN's
kernels read them (float32 products of 16 rows take a third of the time of `F.linear`'s on an EPYC, measured); adapters
are in the weights. The formulas are those of `model_minigpt.py`, which the tests compare this file with.

Tokens come flat, N of them, whichever sequences they belong to; what a token sees is the business of `attend`.

Shapes: N tokens, E hidden size, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import nn

    from minigpt.model.model_minigpt import Attention, DecoderModel, FeedForward

# q_NHD and the new keys and values kv_N2GD of a layer -> what the heads read, [N, H, D]
Attend = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]

PREPARED_BYTES = 4 << 30  # larger models are not copied: their products are long, and memory is what they lack


class Decoder:
    """The weights of a model, prepared for `rows` tokens a step, and the forward pass over them.

    Args:
        model: A MiniGPT, with or without LoRA layers, or another network on the same transformer; it is only read, when
            the first tokens come and at `refresh`.
        max_length: Positions from 0 to this are computed.
        rows: Tokens that a step has as a rule.
    """

    def __init__(self, model: DecoderModel, max_length: int, rows: int) -> None:
        self.model, self.rows = model, rows
        config = model.config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        weight = model.model.embed_tokens.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.prepares = prepares(model)
        positions = torch.arange(max_length, device=self.device)[None]
        cos_T1D, sin_T1D = (x[0].transpose(0, 1) for x in model.model.rope(positions, self.dtype))
        # channel i + D/2 turns against channel i: with the sign in the sine, turning needs no negation
        self.cos_T1D, self.sin_T1D = torch.cat((cos_T1D, cos_T1D), -1), torch.cat((-sin_T1D, sin_T1D), -1)
        self.layers: list[_Layer] = []
        self.head: _Product | None = None

    @torch.inference_mode()
    def refresh(self) -> None:
        """Read the weights of the model again, after they changed. Copies stay in their places where they can."""
        transformer, small = self.model.model, self.prepares
        self.embedding_VE = transformer.embed_tokens.weight.detach()
        before, self.layers = self.layers, []
        for number, block in enumerate(transformer.layers):
            attention, mlp = cast("Attention", block.self_attn), cast("FeedForward", block.mlp)
            heads = None
            if self.model.config.qk_norm:
                heads = torch.cat(
                    (
                        norm_weight(attention.q_norm).expand(self.num_heads, -1),
                        norm_weight(attention.k_norm).expand(self.num_kv_heads, -1),
                    )
                )
            layer = _Layer(
                input_norm=norm_weight(block.input_layernorm),
                qkv=_Product((attention.q_proj, attention.k_proj, attention.v_proj), small, self.rows),
                head_norm=heads,
                out=_Product((attention.o_proj,), small, self.rows),
                mlp_norm=norm_weight(block.post_attention_layernorm),
                gate_up=_Product((mlp.gate_proj, mlp.up_proj), small, self.rows),
                down=_Product((mlp.down_proj,), small, self.rows),
            )
            if before:
                layer.reuse_memory_of(before[number])
            self.layers.append(layer)
        self.final_norm = norm_weight(transformer.norm)
        head = getattr(self.model, "lm_head", None)
        if head is not None:
            product = _Product((head,), small, self.rows)
            if self.head is not None:
                product.reuse_memory_of(self.head)
            self.head = product
        tensors = [self.embedding_VE, self.final_norm, *([] if self.head is None else self.head.tensors)]
        tensors += [tensor for layer in self.layers for tensor in layer.tensors]
        self._places = tuple(tensor.data_ptr() for tensor in tensors)

    @property
    def places(self) -> tuple[int, ...]:
        """Addresses of all that a step reads, but for weights in oneDNN's layout."""
        self._prepare()
        return self._places

    def forget(self) -> None:
        """Free what `refresh` prepares; the weights are read again when the next tokens come."""
        self.layers, self.head, self._places = [], None, ()
        self.embedding_VE = self.final_norm = torch.empty(0)  # which may keep memory of older weights

    def _prepare(self) -> None:
        if not self.layers:
            self.refresh()

    def hidden(self, ids_N: torch.Tensor, positions_N: torch.Tensor, attend: Attend) -> torch.Tensor:
        """[N, E] behind the last norm."""
        self._prepare()
        N, H, G, D = len(ids_N), self.num_heads, self.num_kv_heads, self.head_dim
        x_NE = F.embedding(ids_N, self.embedding_VE)
        cos_N1D, sin_N1D = self.cos_T1D[positions_N], self.sin_T1D[positions_N]
        for number, layer in enumerate(self.layers):
            heads = layer.qkv(self._norm(x_NE, layer.input_norm)).view(N, H + 2 * G, D)
            qk = heads[:, : H + G]
            if layer.head_norm is not None:
                qk = self._norm(qk) * layer.head_norm
            qk = (qk * cos_N1D).addcmul_(qk.roll(D // 2, -1), sin_N1D)
            kv_N2GD = torch.cat((qk[:, H:], heads[:, H + G :]), dim=1).view(N, 2, G, D)
            out_NHD = attend(number, qk[:, :H], kv_N2GD)
            x_NE = layer.out.onto(x_NE, out_NHD.reshape(N, H * D))
            gate, up = layer.gate_up(self._norm(x_NE, layer.mlp_norm)).chunk(2, dim=-1)
            x_NE = layer.down.onto(x_NE, F.silu(gate).mul_(up))
        return self._norm(x_NE, self.final_norm)

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        """float32 [N, V]."""
        assert self.head is not None, "this network has no vocabulary to predict"
        return self.head(hidden_NE).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self.eps)


class _Layer:
    """The weights of one block."""

    __slots__ = ("down", "gate_up", "head_norm", "input_norm", "mlp_norm", "out", "qkv")

    def __init__(
        self,
        input_norm: torch.Tensor,
        qkv: _Product,
        head_norm: torch.Tensor | None,
        out: _Product,
        mlp_norm: torch.Tensor,
        gate_up: _Product,
        down: _Product,
    ) -> None:
        self.input_norm, self.qkv, self.head_norm, self.out = input_norm, qkv, head_norm, out
        self.mlp_norm, self.gate_up, self.down = mlp_norm, gate_up, down

    @property
    def products(self) -> tuple[_Product, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    @property
    def tensors(self) -> list[torch.Tensor]:
        norms = [self.input_norm, self.mlp_norm] + ([] if self.head_norm is None else [self.head_norm])
        return norms + [tensor for product in self.products for tensor in product.tensors]

    def reuse_memory_of(self, before: _Layer) -> None:
        """Moves copies of weights to where those of `before` are."""
        if self.head_norm is not None and before.head_norm is not None:
            self.head_norm = before.head_norm.copy_(self.head_norm)
        for product, old in zip(self.products, before.products, strict=True):
            product.reuse_memory_of(old)


class _Product:
    """x W^T + b, where W is several linear layers that read the same x, one above the other."""

    def __init__(self, layers: Sequence[nn.Linear], prepare: bool, rows: int) -> None:
        weights = [adapted_weight(layer) for layer in layers]
        biases = [layer.bias for layer in layers]
        self._bias = torch.cat([b.detach() for b in biases]) if all(b is not None for b in biases) else None
        self._parts = weights
        self._packed: torch.Tensor | None = None
        if prepare and len(weights) > 1:
            self._parts = [torch.cat(weights)]
        originals = {layer.weight.data_ptr() for layer in layers}
        self._copies = [part.data_ptr() not in originals for part in self._parts]
        if prepare and _packs(weights[0]):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._parts[0].contiguous(), rows)
            self._parts, self._copies = [], []

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What a step reads, but for weights in oneDNN's layout."""
        return self._parts + ([] if self._bias is None else [self._bias])

    def reuse_memory_of(self, before: _Product) -> None:
        """Moves copies of weights to where those of `before` are; weights that are the model's own stay there."""
        for i, (new, old) in enumerate(zip(self._parts, before._parts, strict=True)):
            if self._copies[i] and before._copies[i]:
                self._parts[i] = old.copy_(new)
        if self._bias is not None and before._bias is not None:
            self._bias = before._bias.copy_(self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        y = [F.linear(x, weight) for weight in self._parts]
        product = y[0] if len(y) == 1 else torch.cat(y, dim=-1)
        return product if self._bias is None else product + self._bias

    def onto(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + x W^T + b."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self._bias, "add")
        return residual + self(x)


def _packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN has kernels with their own weight layout for it here."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def prepares(model: DecoderModel) -> bool:
    """Whether the weights of this network are copied into other layouts."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) <= PREPARED_BYTES


def adapted_weight(layer: nn.Linear) -> torch.Tensor:
    """The weight with the active adapter in it, where the layer is one of `model_lora.py`."""
    adapted = getattr(layer, "adapted_weight", None)
    return (adapted() if adapted is not None else layer.weight).detach()


def norm_weight(norm: nn.Module | torch.Tensor) -> torch.Tensor:
    return cast("torch.Tensor", cast("nn.Module", norm).weight).detach()
