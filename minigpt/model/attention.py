"""Attention behind one function, whichever kernel the machine has.

The rest of the code says *what* may see what (an `AttentionPattern`, built once a step and shared by all layers) and
calls `attention`. How it is computed is decided here:

    backend    where                          memory of the mask
    varlen     CUDA, from Ampere on: flash    none: documents are given by their boundaries
               CPU: document by document, in compiled code (attention.cpp) or by torch's flash kernel
    sdpa       anywhere; the default on a CPU without a C++ compiler up to 1,024 tokens a row, where one shared
               block-diagonal mask is cheaper than many small calls                                   [B, T, T]
    reference  anywhere, slow: the formula itself, in any precision; the tests' yardstick

Shapes: B rows, T queries, S keys, H query heads, G key/value heads (H a multiple of G), D head size, N = B*T.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from .native import load_native

SOURCE = Path(__file__).with_name("attention.cpp")
BACKENDS = ("varlen", "sdpa", "reference")
_SDPA_MAX_TOKENS_ON_CPU = (
    1024  # beyond it the [B, T, T] mask is quadratic in T; a shared mask costs 7 % of a step at 256
)
_FLASH_HEAD_MULTIPLE = 8  # head sizes that flash kernels take: multiples of this, up to 256
# On Hopper SDPA would ask cuDNN first, which plans every new shape anew, and prompts come in every length
torch.backends.cuda.enable_cudnn_sdp(False)


def _takes_groups(varlen: Callable[..., Any]) -> bool:
    return "enable_gqa" in inspect.signature(varlen).parameters


_flash_takes_groups = _takes_groups(varlen_attn)


@dataclass
class AttentionPattern:
    """Which keys each query sees.

    Attributes:
        backend: One of BACKENDS.
        mask: bool [B, 1, T, S], True = visible, or None for plain causal attention.
        cu_seqlens: int32 [n + 1], boundaries of the documents in the flattened batch (`varlen` only). Entries behind
            the last document repeat N, so that the shape can stay fixed while the number of documents changes.
        max_seqlen: The longest document may not be longer than this (`varlen` only).
    """

    backend: str
    mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0


def choose_backend(device: torch.device | str, seq_len: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """The fastest backend that trains packed rows of `seq_len` tokens on this device in this precision."""
    if torch.device(device).type == "cuda":
        # Flash kernels take no float32, and need compute capability 8.0: Ampere
        flash = dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(device) >= (8, 0)
        return "varlen" if flash else "sdpa"
    if seq_len > _SDPA_MAX_TOKENS_ON_CPU or _native(dtype) is not None:
        return "varlen"
    return "sdpa"


def packed_pattern(
    document_ids_BT: torch.Tensor,
    dtype: torch.dtype,
    backend: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> AttentionPattern:
    """Causal attention within each document of packed rows, none between documents.

    Args:
        document_ids_BT: [B, T], equal for tokens of the same document; the tokens of a document are adjacent.
        dtype: What the attention is computed in.
        backend: One of BACKENDS; None lets `choose_backend` decide.
        cu_seqlens: int32 boundaries when the caller already has them (fixed shape, for `torch.compile`); otherwise
            they are read off `document_ids_BT`, which waits for the device.
    """
    T = document_ids_BT.shape[1]
    backend = backend or choose_backend(document_ids_BT.device, T, dtype)
    if backend == "varlen":
        if cu_seqlens is None:
            cu_seqlens = boundaries(document_ids_BT)
        return AttentionPattern("varlen", cu_seqlens=cu_seqlens, max_seqlen=T)
    same_document = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
    positions = torch.arange(T, device=document_ids_BT.device)
    return AttentionPattern(backend, mask=(same_document & (positions[:, None] >= positions))[:, None])


def cached_pattern(position_ids_BT: torch.Tensor, cache_length: int) -> AttentionPattern:
    """Each new token sees its own row's cache up to and including its own position."""
    indices = torch.arange(cache_length, device=position_ids_BT.device)
    return AttentionPattern("sdpa", mask=(indices <= position_ids_BT[:, :, None])[:, None])


def decode_attention(
    q_BHD: torch.Tensor, k_BGLD: torch.Tensor, v_BGLD: torch.Tensor, bias_BL: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one new token a row over L cached ones; `bias_BL` is -inf at those it does not see, else 0.

    Returns:
        [B, H, D].
    """
    B, H, D = q_BHD.shape
    G = k_BGLD.shape[1]
    if q_BHD.device.type != "cpu":
        return _grouped_queries(q_BHD, k_BGLD, v_BGLD, bias_BL)
    # On a CPU two products are faster than a flash kernel for one query; the heads of a group are rows of one product.
    scores = (q_BHD.view(B, G, H // G, D) * D**-0.5) @ k_BGLD.mT
    if bias_BL is not None:
        scores.add_(bias_BL[:, None, None])
    return (scores.softmax(-1) @ v_BGLD).view(B, H, D)


def _grouped_queries(
    q_BHD: torch.Tensor, k_BGLD: torch.Tensor, v_BGLD: torch.Tensor, bias_BL: torch.Tensor | None
) -> torch.Tensor:
    """The same with SDPA: the query heads of a group are its queries, which all see the same, so that keys and values
    are read once and need not be repeated."""
    B, H, D = q_BHD.shape
    G, L = k_BGLD.shape[1:3]
    bias = None if bias_BL is None else bias_BL[:, None, None].expand(B, G, H // G, L)
    out_BGhD = F.scaled_dot_product_attention(q_BHD.view(B, G, H // G, D), k_BGLD, v_BGLD, attn_mask=bias)
    return out_BGhD.reshape(B, H, D)


def boundaries(document_ids_BT: torch.Tensor) -> torch.Tensor:
    """`cu_seqlens` of packed rows: int32 [number of documents + 1], 0 first and B*T last."""
    B, T = document_ids_BT.shape
    starts = torch.ones_like(document_ids_BT, dtype=torch.bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=B * T).to(torch.int32)


def attention(q_BHTD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor, pattern: AttentionPattern):
    """softmax(q k^T / sqrt(D)) v over the keys that `pattern` makes visible ("Attention is all you need", eq. 1).

    Query head h uses key/value head h // (H / G) (grouped-query attention, arXiv:2305.13245).

    Returns:
        [B, H, T, D], in the dtype of the inputs.
    """
    if pattern.backend == "varlen" and pattern.cu_seqlens is not None:
        return _varlen(q_BHTD, k_BGSD, v_BGSD, pattern)
    if pattern.backend == "reference":
        return _reference(q_BHTD, k_BGSD, v_BGSD, pattern.mask)
    is_causal = pattern.mask is None
    grouped = q_BHTD.shape[1] != k_BGSD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHTD, k_BGSD, v_BGSD, attn_mask=pattern.mask, is_causal=is_causal, enable_gqa=grouped
    )


def _reference(q_BHTD, k_BGSD, v_BGSD, mask):
    T, S, groups = q_BHTD.shape[2], k_BGSD.shape[2], q_BHTD.shape[1] // k_BGSD.shape[1]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).tril()
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k_BGSD, v_BGSD))
    scores = q_BHTD @ k.transpose(-1, -2) * q_BHTD.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def _varlen(q_BHTD, k_BGSD, v_BGSD, pattern: AttentionPattern):
    B, H, T, D = q_BHTD.shape
    q, k, v = (x.transpose(1, 2).reshape(B * T, x.shape[1], D) for x in (q_BHTD, k_BGSD, v_BGSD))
    if q.device.type == "cuda":
        out = _flash(q, k, v, pattern)
    else:
        out, _ = torch.ops.minigpt.document_attention(q, k, v, pattern.cu_seqlens)
    return out.view(B, T, H, D).transpose(1, 2)


def _flash(q_NHD: torch.Tensor, k_NGD: torch.Tensor, v_NGD: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    """torch's flash kernel for packed documents: [N, H, D]."""
    cu, longest, D = pattern.cu_seqlens, pattern.max_seqlen, q_NHD.shape[2]
    assert cu is not None
    if missing := -D % _FLASH_HEAD_MULTIPLE:  # channels of 0 change no score and no other channel
        q_NHD, k_NGD, v_NGD = (F.pad(x, (0, missing)) for x in (q_NHD, k_NGD, v_NGD))
    groups, causal = q_NHD.shape[1] // k_NGD.shape[1], (-1, 0)
    if groups > 1 and not _flash_takes_groups:  # torch 2.11
        k_NGD, v_NGD = (x.repeat_interleave(groups, dim=1) for x in (k_NGD, v_NGD))
    grouped: dict[str, Any] = {"enable_gqa": groups > 1} if _flash_takes_groups else {}
    out: Any = varlen_attn(q_NHD, k_NGD, v_NGD, cu, cu, longest, longest, scale=D**-0.5, window_size=causal, **grouped)
    return out[..., :D]


# On a CPU: document by document, by compiled code (`attention.cpp`), or by torch's flash kernel where that cannot be
# compiled. An opaque operator keeps `torch.compile` from looking into a loop whose trip count is data, so the shapes
# outside stay fixed.


@torch.library.custom_op("minigpt::document_attention", mutates_args=(), device_types="cpu")
def _document_attention(
    q_NHD: torch.Tensor, k_NGD: torch.Tensor, v_NGD: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
    log_sums_NH = torch.empty(q_NHD.shape[:2], dtype=_accumulate_dtype(q_NHD))
    forward = _forward_by_torch if (native := _native(q_NHD.dtype)) is None else native.forward
    forward(q_NHD, k_NGD, v_NGD, cu_seqlens, out_NHD, log_sums_NH)
    return out_NHD, log_sums_NH


@_document_attention.register_fake
def _(q, k, v, cu_seqlens):
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[:2], dtype=_accumulate_dtype(q))


@torch.library.custom_op("minigpt::document_attention_backward", mutates_args=(), device_types="cpu")
def _document_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    backward = _backward_by_torch if (native := _native(q.dtype)) is None else native.backward
    backward(grad, q, k, v, out, log_sums, cu_seqlens, (dq, dk, dv))
    return dq, dk, dv


@_document_attention_backward.register_fake
def _(grad, q, k, v, out, log_sums, cu_seqlens):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])


def _backward(ctx, grad, _):
    q, k, v, out, log_sums, cu_seqlens = ctx.saved_tensors
    return *torch.ops.minigpt.document_attention_backward(grad, q, k, v, out, log_sums, cu_seqlens), None


_document_attention.register_autograd(_backward, setup_context=_save_for_backward)


class _Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]

    @classmethod
    def of(cls, x_NHD: torch.Tensor) -> _Heads:
        return cls(x_NHD.data_ptr(), x_NHD.stride(0), x_NHD.stride(1))


class _Arguments(ctypes.Structure):
    """`struct Attention` of attention.cpp."""

    _fields_ = [
        ("edges", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("documents", "H", "G", "D", "is_bf16", "threads")),
        *((name, _Heads) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("out", "log_sums")),
        ("grad", _Heads),
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dv")),
    ]


class _Native:
    """The two calls of attention.cpp, on tensors whose last stride is 1."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def forward(self, q, k, v, cu_seqlens, out, log_sums) -> None:
        self._library.attention_forward(ctypes.byref(self._arguments(q, k, v, cu_seqlens, out, log_sums)))

    def backward(self, grad, q, k, v, out, log_sums, cu_seqlens, gradients) -> None:
        arguments = self._arguments(q, k, v, cu_seqlens, out, log_sums)
        grad = _with_rows(grad)
        arguments.grad = _Heads.of(grad)
        arguments.dq, arguments.dk, arguments.dv = (x.data_ptr() for x in gradients)
        self._library.attention_backward(ctypes.byref(arguments))

    def _arguments(self, q, k, v, cu_seqlens, out, log_sums) -> _Arguments:
        self._kept = q, k, v = tuple(_with_rows(x) for x in (q, k, v))  # alive as long as their addresses are used
        return _Arguments(
            edges=cu_seqlens.data_ptr(),
            documents=len(cu_seqlens) - 1,
            H=q.shape[1],
            G=k.shape[1],
            D=q.shape[2],
            is_bf16=q.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            q=_Heads.of(q),
            k=_Heads.of(k),
            v=_Heads.of(v),
            out=out.data_ptr(),
            log_sums=log_sums.data_ptr(),
        )


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _native(dtype: torch.dtype) -> _Native | None:
    """The compiled code, if it computes in this precision and this machine can compile it."""
    library = load_native(SOURCE) if dtype in (torch.float32, torch.bfloat16) else None
    return None if library is None else _Native(library)


def _documents(cu_seqlens: torch.Tensor) -> list[slice]:
    edges = cu_seqlens.tolist()
    return [slice(start, end) for start, end in pairwise(edges) if end > start]


def _heads_first(x_NHD: torch.Tensor, document: slice, groups: int = 1) -> torch.Tensor:
    """[1, H, L, D] of one document; each head repeated `groups` times."""
    x = x_NHD[document].transpose(0, 1)
    return (x.repeat_interleave(groups, dim=0) if groups > 1 else x)[None]


def _forward_by_torch(q, k, v, cu_seqlens, out, log_sums) -> None:
    groups = q.shape[1] // k.shape[1]
    for doc in _documents(cu_seqlens):
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q, doc), _heads_first(k, doc, groups), _heads_first(v, doc, groups), is_causal=True
        )
        out[doc] = o[0].transpose(0, 1)
        log_sums[doc] = lse[0].transpose(0, 1)


def _backward_by_torch(grad, q, k, v, out, log_sums, cu_seqlens, gradients) -> None:
    groups = q.shape[1] // k.shape[1]
    dq, dk, dv = gradients
    for doc in _documents(cu_seqlens):
        dq_doc, dk_doc, dv_doc = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad, doc),
            _heads_first(q, doc),
            _heads_first(k, doc, groups),
            _heads_first(v, doc, groups),
            _heads_first(out, doc),
            log_sums[doc].transpose(0, 1)[None],
            dropout_p=0.0,
            is_causal=True,
        )
        dq[doc] = dq_doc[0].transpose(0, 1)
        for d, d_doc in ((dk, dk_doc), (dv, dv_doc)):  # a key/value head collects what its group of query heads gives
            d[doc] = d_doc[0].unflatten(0, (-1, groups)).sum(1).transpose(0, 1)


def _accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
