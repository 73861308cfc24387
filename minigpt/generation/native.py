"""A step of the engine and its sampling as two calls of compiled code, where a CPU and a C++ compiler are there.

How `native.cpp` gets compiled is in `minigpt/model/native.py`; what goes in and out are addresses of tensors. Where
there is no compiler, on a GPU, and for networks that it does not cover the engine uses `decoder.py` and `sampling.py`,
which compute the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F

from minigpt.generation.decoder import Decoder, adapted_weight, norm_weight, prepares
from minigpt.generation.sampling import SamplingParams, candidates_of
from minigpt.model.native import load_native

if TYPE_CHECKING:
    from minigpt.model.kv_cache import KVCache
    from minigpt.model.model_minigpt import Attention, DecoderModel, FeedForward

SOURCE = Path(__file__).with_name("native.cpp")
DRAW = np.dtype(
    [
        *((name, np.int64) for name in ("slot", "top_k", "limit")),
        *((name, np.float64) for name in ("uniform", "top_p")),
        *((name, np.float32) for name in ("temperature", "log_min_p")),
        ("id", np.int64),
        *((name, np.float64) for name in ("log_prob", "behaviour_log_prob")),
    ]
)


class _Layer(Structure):
    _fields_ = [
        (name, c_void_p)
        for name in ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "mlp_norm", "gate_up", "down")
    ]


class _Network(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("layers", "E", "H", "G", "D", "F", "V", "bf16_weights")),
        ("eps", c_float),
        *((name, c_void_p) for name in ("cos", "sin", "embedding")),
        ("layer", POINTER(_Layer)),
        *((name, c_void_p) for name in ("final_norm", "head")),
    ]


class _Cache(Structure):
    _fields_ = [("kv", c_void_p), ("slots", c_int64), ("length", c_int64)]


def library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be compiled."""
    return load_native(SOURCE)


def vector() -> int:
    """W there: numbers in a vector of this machine, two of which are the columns of a panel; 0: no compiled code."""
    compiled = library()
    return 0 if compiled is None else compiled.vector_width()


class NativeDecoder:
    """The weights of a network as `native.cpp` reads them, and the two calls.

    Args:
        decoder: What it computes the same as; it must be `covered`.
        slots: Of the engine.
    """

    def __init__(self, decoder: Decoder, slots: int) -> None:
        compiled = library()
        assert compiled is not None
        self._library, self._decoder = compiled, decoder
        self._kept: list[torch.Tensor] = []  # what the addresses in `_network` point to, besides
        self._packs: list[torch.Tensor] = []  # which stay where they are: new memory takes longer to get than to fill
        self._vector, self._panel = vector(), 2 * vector()
        self.vocab_size = decoder.model.config.vocab_size
        self._stride = -(-self.vocab_size // self._panel) * self._panel
        self._slots, self.logits_BV = slots, torch.zeros(0)
        self.refresh()

    @staticmethod
    def covers(model: DecoderModel) -> bool:
        """Whether this network can be computed here."""
        config, head, weight = model.config, getattr(model, "lm_head", None), model.model.embed_tokens.weight
        return (
            weight.device.type == "cpu"
            and weight.dtype in (torch.float32, torch.bfloat16)
            and head is not None
            and prepares(model)
            and (W := vector()) > 0
            and config.head_dim % W == config.num_attention_heads * config.head_dim % (2 * W) == 0
            and config.hidden_size % (2 * W) == config.intermediate_size % (2 * W) == 0
        )

    @staticmethod
    def cache_dtype(model: DecoderModel) -> torch.dtype:
        """Of the keys and values of a network that is covered."""
        config, compiled = model.config, library()
        assert compiled is not None
        group = config.num_attention_heads // config.num_key_value_heads
        tiles = compiled.attends_by_tiles(c_int64(config.head_dim), c_int64(group))
        return model.model.embed_tokens.weight.dtype if tiles else torch.float32

    def forget(self) -> None:
        """Free what `refresh` prepares."""
        self._kept, self._packs, self.logits_BV = [], [], torch.zeros(0)

    @torch.inference_mode()
    def refresh(self) -> None:
        """Read the weights of the model again, after they changed."""
        decoder, transformer = self._decoder, self._decoder.model.model
        config = decoder.model.config
        self._kept, self._filled = [], 0
        if not len(self.logits_BV):
            with torch.inference_mode(False):  # or nobody could write into it elsewhere
                self.logits_BV = torch.zeros(self._slots, self._stride)[:, : self.vocab_size]
        layers = (_Layer * config.num_hidden_layers)()
        for layer, block in zip(layers, transformer.layers, strict=True):
            attention, mlp = cast("Attention", block.self_attn), cast("FeedForward", block.mlp)
            heads = [attention.q_proj, attention.k_proj, attention.v_proj]
            layer.input_norm = self._floats(norm_weight(block.input_layernorm))
            layer.qkv = self._packed([adapted_weight(p) for p in heads])
            if config.attention_bias:
                bias = torch.cat([cast("torch.Tensor", p.bias) for p in heads])
                layer.qkv_bias = self._floats(F.pad(bias, (0, -len(bias) % self._panel)))
            if config.qk_norm:
                layer.q_norm = self._floats(norm_weight(attention.q_norm))
                layer.k_norm = self._floats(norm_weight(attention.k_norm))
            layer.out = self._packed([adapted_weight(attention.o_proj)])
            layer.mlp_norm = self._floats(norm_weight(block.post_attention_layernorm))
            layer.gate_up = self._packed([adapted_weight(p) for p in (mlp.gate_proj, mlp.up_proj)], alternate=True)
            layer.down = self._packed([adapted_weight(mlp.down_proj)])
        self._network = _Network(
            layers=config.num_hidden_layers,
            E=config.hidden_size,
            H=config.num_attention_heads,
            G=config.num_key_value_heads,
            D=config.head_dim,
            F=config.intermediate_size,
            V=config.vocab_size,
            bf16_weights=decoder.dtype == torch.bfloat16,
            eps=config.rms_norm_eps,
            cos=self._floats(decoder.cos_T1D),
            sin=self._floats(decoder.sin_T1D),
            embedding=self._address(transformer.embed_tokens.weight.detach()),
            layer=layers,
            final_norm=self._floats(norm_weight(transformer.norm)),
            head=self._packed([adapted_weight(cast("torch.nn.Linear", decoder.model.lm_head))]),
        )

    def _address(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _floats(self, tensor: torch.Tensor) -> int:
        return self._address(tensor.detach().float())

    def _packed(self, weights: Sequence[torch.Tensor], alternate: bool = False) -> int:
        """[N, K] each, one above the other, as `pack` there lays them out; or W rows of each in turn."""
        weights = [weight.contiguous() for weight in weights]
        K, dtype = weights[0].shape[1], weights[0].dtype
        rows = [w.data_ptr() + np.arange(len(w), dtype=np.int64) * K * dtype.itemsize for w in weights]
        together = np.stack([r.reshape(-1, self._vector) for r in rows], axis=1) if alternate else np.concatenate(rows)
        panels = -(-together.size // self._panel)
        table = np.zeros(panels * self._panel, dtype=np.int64)
        table[: together.size] = together.reshape(-1)
        if self._filled == len(self._packs):
            self._packs.append(torch.empty(len(table) * K, dtype=dtype))
        packed = self._packs[self._filled].data_ptr()
        self._filled += 1
        self._library.pack(
            *(c_void_p(table.ctypes.data), c_int64(panels), c_int64(K), c_int(dtype == torch.bfloat16)),
            *(c_void_p(packed), c_int(torch.get_num_threads())),
        )
        return packed

    def decode(self, rows: np.ndarray, cache: KVCache) -> None:
        """Takes tokens into the cache; writes the rows of `logits_BV` whose slots have a token that is heard.

        Args:
            rows: int64 [N, 6], `Row` there: token id, slot, position, the slot whose first so many positions hold the
                same as its own (it is read there, where rows of the same prompt read as well) with their number, and 1
                for the one token of a slot whose logits are wanted. Tokens of a slot follow each other in the cache.
            cache: Of dtype `cache_dtype`.
        """
        table, kv = np.ascontiguousarray(rows, dtype=np.int64), cache.kv
        assert kv.dtype == self.cache_dtype(self._decoder.model)
        assert kv.is_contiguous()
        cells = _Cache(kv.data_ptr(), cache.batch_size, cache.max_length)
        self._library.decode(
            *(ctypes.byref(self._network), ctypes.byref(cells), c_void_p(table.ctypes.data), c_int64(len(table))),
            *(c_void_p(self.logits_BV.data_ptr()), c_int64(self._stride), c_int(torch.get_num_threads())),
        )

    def draw(self, rows: np.ndarray, log_probs: bool, adjusted_BV: torch.Tensor | None = None) -> None:
        """Samples one token for each row from `logits_BV`.

        Args:
            rows: Of dtype DRAW, as `draws_of` makes them, with `slot` and `uniform`; `id`, `behaviour_log_prob` and, if
                `log_probs`, `log_prob` are filled in, as `sampling.Draw` defines them.
            log_probs: Whether they are wanted.
            adjusted_BV: float32, what is sampled from, if that is not the model's own logits.
        """
        logits = self.logits_BV
        if adjusted_BV is not None:
            logits = F.pad(adjusted_BV, (0, self._stride - self.vocab_size))
        self._library.draw(
            *(c_void_p(self.logits_BV.data_ptr()), c_void_p(logits.data_ptr())),
            *(c_int64(self._stride), c_int64(self.vocab_size), c_int(log_probs)),
            *(c_void_p(rows.ctypes.data), c_int64(len(rows)), c_int(torch.get_num_threads())),
        )


def draws_of(rows: Sequence[SamplingParams], vocab_size: int) -> np.ndarray:
    """How these rows are sampled, in slots 0, 1, …: an array of dtype DRAW."""
    draws = np.zeros(len(rows), dtype=DRAW)
    for slot, (row, p) in enumerate(zip(draws, rows, strict=True)):
        top_k = min(p.top_k, vocab_size) or vocab_size
        row["slot"], row["top_k"], row["top_p"] = slot, top_k, p.top_p
        row["temperature"], row["limit"] = p.temperature, candidates_of(p, top_k, vocab_size)
        row["log_min_p"] = np.log(p.min_p) if p.min_p > 0 else -np.inf
    return draws
