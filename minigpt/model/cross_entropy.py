"""Cross-entropy and log-probabilities of a linear output layer, a piece of the batch at a time.

With a vocabulary of V entries the logits of N tokens take N·V numbers, and their gradient as many again: 10 GB for 16k
tokens of a 150k vocabulary in float32. Here they exist for one chunk of tokens only. The gradient with respect to the
hidden states and the weight is computed along with the loss, because the loss is a sum and its upstream gradient is one
scalar that can be multiplied in later; so no logits are kept or computed twice.
(The idea is that of Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989, section 3.)

Losses that are no sum over tokens (DPO's is a function of whole answers) want the log-probability of each token, whose
upstream gradient is known only when all of them are. So `linear_log_probs` keeps the logits for its backward pass where
they are few. Where they are many it computes those of a chunk once more, unless the weight is frozen: four products
where the loss has three, and one chunk in memory.

On a CPU all this is an operator that `torch.compile` does not look into. Inside, tokens without a label (prompts,
padding) are left out, which a graph of fixed shapes could not do, and what lies between two products is compiled code
(`cross_entropy.cpp`) where there is a compiler. On a GPU, where finding out how many labels there are would make it
wait, all positions are computed and those without a label count nothing.

Shapes: N tokens, E hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from .native import load_native

SOURCE = Path(__file__).with_name("cross_entropy.cpp")
_CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}  # logits alive at a time: 128 MB and 1 GB in float32
_KEPT_ELEMENTS = 1 << 24  # no more logits are kept for the backward pass
TokenStats = Sequence[torch.Tensor]
"""Of each token: log-normaliser, entropy, and the upstream gradients of its log-probability and entropy."""


def linear_cross_entropy(
    x_NE: torch.Tensor, weight_VE: torch.Tensor, labels_N: torch.Tensor, weights_N: torch.Tensor
) -> torch.Tensor:
    """Σ_n weights_n · −log softmax(weight · x_n)[labels_n], without all logits in memory.

    Args:
        x_NE: hidden states.
        weight_VE: the output layer.
        labels_N: int64; negative: no label. Such a position gives no loss and exactly zero gradient, whatever it holds.
        weights_N: float32 weight of each label.

    Returns:
        float32 scalar (float64 for float64 input), in nats. The softmax is computed in that precision too.
    """
    return _LinearCrossEntropy.apply(x_NE, weight_VE, labels_N, weights_N)


def linear_log_probs(
    x_NE: torch.Tensor, weight_VE: torch.Tensor, labels_N: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log softmax(weight · x_n / temperature)[labels_n] for every n, without all logits in memory.

    Args:
        x_NE: hidden states.
        weight_VE: the output layer.
        labels_N: int64; negative: no label. Such a position has log-probability 0 and exactly zero gradient, whatever
            it holds.
        temperature: the logits are divided by it.

    Returns:
        float32 [N] (float64 for float64 input), in nats. The softmax is computed in that precision too.
    """
    return _LinearLogProbs.apply(x_NE, weight_VE, labels_N, temperature, False)[0]


def linear_log_probs_and_entropy(
    x_NE: torch.Tensor, weight_VE: torch.Tensor, labels_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_log_probs`, and the entropy −Σ p log p of each distribution [N], 0 where there is no label."""
    return _LinearLogProbs.apply(x_NE, weight_VE, labels_N, temperature, True)


def _on_cpu(x: torch.Tensor) -> bool:
    return x.device.type == "cpu"


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NE, weight_VE, labels_N, weights_N):
        compute = torch.ops.minigpt.labelled_loss if _on_cpu(x_NE) else _loss
        loss, grad_x, grad_weight = compute(x_NE, weight_VE, labels_N, weights_N, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        gradients = (
            grad * grad_loss.to(grad.dtype) if needed else None
            for grad, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        )
        return *gradients, None, None


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NE, weight_VE, labels_N, temperature, with_entropy):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        # a row's gradient is upstream times this: no logits are needed again
        ctx.keeps_gradient = needs_x and not needs_weight and not with_entropy
        few = x_NE.shape[0] * weight_VE.shape[0] <= _KEPT_ELEMENTS
        keeps_logits = few and (needs_x or needs_weight) and not ctx.keeps_gradient
        ctx.temperature, ctx.with_entropy = temperature, with_entropy
        compute = torch.ops.minigpt.labelled_log_probs if _on_cpu(x_NE) else _log_probs_of_all
        arguments = x_NE, weight_VE, labels_N, temperature, with_entropy, ctx.keeps_gradient, keeps_logits
        log_probs_N, entropies_N, log_sums_N, grad_x, logits_NV = compute(*arguments)
        if ctx.keeps_gradient:
            ctx.save_for_backward(grad_x, labels_N)
        else:
            ctx.save_for_backward(x_NE, weight_VE, labels_N, log_sums_N, entropies_N, logits_NV)
        return log_probs_N, entropies_N

    @staticmethod
    def backward(ctx, grads_N, entropy_grads_N):
        if ctx.keeps_gradient:
            grad_x, labels_N = ctx.saved_tensors
            return grad_x * torch.where(labels_N >= 0, grads_N, 0.0)[:, None].to(grad_x.dtype), None, None, None, None
        x_NE, weight_VE, labels_N, log_sums_N, entropies_N, logits_NV = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        stats = log_sums_N, entropies_N, grads_N, entropy_grads_N
        options = ctx.temperature, ctx.with_entropy, needs_x, needs_weight
        if _on_cpu(x_NE):
            backward = torch.ops.minigpt.labelled_log_probs_backward
            grad_x, grad_weight = backward(x_NE, weight_VE, labels_N, logits_NV, *stats, *options)
        else:
            grad_x, grad_weight = _log_probs_backward(x_NE, weight_VE, labels_N, logits_NV, stats, *options)
        return grad_x if needs_x else None, grad_weight if needs_weight else None, None, None, None


# ------------------------------------------------------------------------------------------------- chunk by chunk
# What is not asked for is returned as an empty tensor, since operators return nothing but tensors.


def _loss(x_NE, weight_VE, labels_N, weights_N, needs_x: bool, needs_weight: bool):
    """The loss, and its gradients with respect to x and the weight."""
    counts_N = (labels_N >= 0) & (weights_N != 0)
    weights_N = torch.where(counts_N, weights_N, 0.0).to(_precision(x_NE))
    labels_N = torch.where(counts_N, labels_N, 0)
    loss = torch.zeros((), dtype=_precision(x_NE), device=x_NE.device)
    gradients = _Gradients(x_NE, weight_VE, needs_x, needs_weight)
    for x, label, w in _chunks(weight_VE, x_NE, labels_N, weights_N):
        x = torch.where((w != 0)[:, None], x, 0.0)
        grads = -w if needs_x or needs_weight else None
        log_probs, _, _, grad_logits = _softmax_stats(x @ weight_VE.T, label, 1.0, False, grads)
        loss = loss - (w * log_probs).sum()  # not in place: torch 2.11 would compile that to gradients of 0
        gradients.add(x, grad_logits)
    return loss, *gradients.results()


def _log_probs(x_NE, weight_VE, labels_N, temperature: float, with_entropy: bool, keeps_gradient: bool, logits_NV):
    """Of the labels: log-probabilities, entropies, log-normalisers, and the log-probabilities' gradients for x.

    `logits_NV` is the memory for the logits, or empty: then they are not kept.
    """
    found = []
    gradients = _Gradients(x_NE, weight_VE, keeps_gradient, False)
    for x, label, place in _chunks(weight_VE, x_NE, labels_N, kept=logits_NV):
        has_label, label = label >= 0, label.clamp_min(0)
        x = torch.where(has_label[:, None], x, 0.0)
        grads = has_label.to(_precision(x)) if keeps_gradient else None
        logits = torch.mm(x, weight_VE.T, out=place)
        *stats, grad_logits = _softmax_stats(logits, label, temperature, with_entropy, grads)
        found.append([torch.where(has_label, n, 0.0) if n.numel() else n for n in stats])
        gradients.add(x, grad_logits)
    log_probs_N, log_sums_N, entropies_N = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    return log_probs_N, entropies_N, log_sums_N, gradients.results()[0]


def _log_probs_of_all(x_NE, weight_VE, labels_N, temperature, with_entropy, keeps_gradient, keeps_logits):
    """`_log_probs` with or without a label, and the logits."""
    logits_NV = _memory(x_NE, weight_VE, keeps_logits)
    arguments = x_NE, weight_VE, labels_N, temperature, with_entropy, keeps_gradient
    return *_log_probs(*arguments, logits_NV), logits_NV


def _log_probs_backward(
    x_NE,
    weight_VE,
    labels_N,
    logits_NV,
    stats: TokenStats,
    temperature: float,
    with_entropy: bool,
    needs_x: bool,
    needs_weight: bool,
):
    """The gradients of x and the weight, from those of log-probabilities and entropies."""
    gradients = _Gradients(x_NE, weight_VE, needs_x, needs_weight)
    if not with_entropy:
        stats = tuple(n if len(n) else torch.zeros(len(x_NE), device=x_NE.device) for n in stats)
    for x, label, *pieces, logits in _chunks(weight_VE, x_NE, labels_N, *stats, kept=logits_NV):
        has_label, label = label >= 0, label.clamp_min(0)
        x = torch.where(has_label[:, None], x, 0.0)
        known = [torch.where(has_label, n, 0.0) for n in pieces]
        if logits is None:
            logits = to = x @ weight_VE.T
        else:
            to = torch.empty_like(logits)  # kept ones may be asked for again
        gradients.add(x, _grad_logits(logits, label, known, temperature, with_entropy, to))
    return gradients.results()


class _Gradients:
    """Gradients of x, piece by piece, and of the weight, summed up in float32."""

    def __init__(self, x_NE, weight_VE, needs_x: bool, needs_weight: bool) -> None:
        self.x_NE, self.weight_VE, self.needs_x, self.needs_weight = x_NE, weight_VE, needs_x, needs_weight
        self.of_x: list[torch.Tensor] = []
        shape = weight_VE.shape if needs_weight else 0
        self.of_weight = torch.zeros(shape, dtype=_precision(x_NE), device=x_NE.device)

    def add(self, x, grad_logits) -> None:
        if self.needs_x:
            self.of_x.append(grad_logits @ self.weight_VE)
        if self.needs_weight:
            self.of_weight += grad_logits.T @ x

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        of_x = self.of_x[0] if len(self.of_x) == 1 else torch.cat(self.of_x) if self.of_x else self.x_NE.new_empty(0)
        return of_x, self.of_weight.to(self.weight_VE.dtype)


def _memory(x_NE, weight_VE, keeps_logits: bool) -> torch.Tensor:
    """For the logits, or nothing."""
    return x_NE.new_empty((len(x_NE), len(weight_VE)) if keeps_logits else 0)


def _chunks(weight_VE, *tensors, kept=None):
    """Pieces of the tensors; behind them, if asked for, that of the kept logits or None where there are none."""
    chunk = max(1, _CHUNK_ELEMENTS.get(weight_VE.device.type, 1 << 25) // weight_VE.shape[0])
    pieces = [t.split(chunk) for t in tensors]
    if kept is not None:
        pieces.append(kept[: len(tensors[0])].split(chunk) if kept.numel() else [None] * len(pieces[0]))
    return zip(*pieces, strict=True)


def _precision(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------- between the two products


def _softmax_stats(logits_NV, labels_N, temperature: float, with_entropy: bool, grads_N=None):
    """(log-probabilities of the labels, log-normalisers, entropies, gradients of the logits under `grads_N`)."""
    if (native := _native(logits_NV)) is not None:
        return native.softmax_stats(logits_NV, labels_N, temperature, with_entropy, grads_N)
    logits = logits_NV.to(_precision(logits_NV)) / temperature
    log_sums = logits.logsumexp(-1)
    log_probs = logits.gather(1, labels_N[:, None])[:, 0] - log_sums
    entropies, gradient = log_sums.new_empty(0), None
    if with_entropy:  # not log Σ − Σ p · logit: where the model is sure, two large numbers would cancel
        log_p = logits - log_sums[:, None]
        entropies = -(log_p.exp() * log_p).sum(-1)
    if grads_N is not None:
        stats = log_sums, entropies, grads_N, entropies
        gradient = _grad_logits(logits_NV, labels_N, stats, temperature, False, logits_NV)
    return log_probs, log_sums, entropies, gradient


def _grad_logits(logits_NV, labels_N, stats: TokenStats, temperature: float, with_entropy: bool, to):
    """Gradients of the logits: d log p_label / d logits = label − p;  dH / d logits = −p (log p + H).

    They may be written into the memory `to`, which may be that of the logits.
    """
    if (native := _native(logits_NV)) is not None:
        return native.grad_logits(logits_NV, labels_N, stats, temperature, with_entropy, to)
    log_sums_N, entropies_N, grads_N, entropy_grads_N = stats
    log_p = logits_NV.to(_precision(logits_NV)) / temperature - log_sums_N[:, None]
    is_label = torch.arange(log_p.shape[1], device=log_p.device) == labels_N[:, None]
    inner = grads_N[:, None]
    if with_entropy:
        inner = inner + entropy_grads_N[:, None] * (log_p + entropies_N[:, None])
    gradient = is_label * grads_N[:, None] - log_p.exp() * inner
    return (gradient / temperature).to(logits_NV.dtype)


def _native(logits: torch.Tensor) -> _Native | None:
    """The compiled code, if it computes in this precision and this machine can compile it."""
    if logits.device.type != "cpu" or logits.dtype not in (torch.float32, torch.bfloat16):
        return None
    library = load_native(SOURCE)
    return None if library is None else _Native(library)


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "to")),
        *((name, ctypes.c_int64) for name in ("N", "V", "is_bf16", "threads")),
        ("labels", ctypes.c_void_p),
        ("temperature", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("log_probs", "log_sums", "entropies", "grads", "entropy_grads")),
    ]


class _Native:
    """The two calls of cross_entropy.cpp. `softmax_stats` writes gradients over the logits."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def softmax_stats(self, logits, labels, temperature: float, with_entropy: bool, grads=None):
        log_probs, log_sums = torch.empty(2, len(labels))
        entropies = torch.empty(len(labels) if with_entropy else 0)
        stats = {"log_probs": log_probs, "log_sums": log_sums, "grads": grads}
        if with_entropy:
            stats["entropies"] = entropies
        self._call(self._library.softmax_stats, logits, logits, labels, temperature, stats)
        return log_probs, log_sums, entropies, logits

    def grad_logits(self, logits, labels, stats: TokenStats, temperature: float, with_entropy: bool, to):
        names = ("log_sums", "entropies", "grads", "entropy_grads") if with_entropy else ("log_sums", "", "grads", "")
        given = {name: n for name, n in zip(names, stats, strict=True) if name}
        self._call(self._library.grad_logits, logits, to, labels, temperature, given)
        return to

    def _call(self, function, logits, to, labels, temperature: float, stats) -> None:
        kept = {name: n.float().contiguous() for name, n in stats.items() if n is not None}
        labels = labels.contiguous()
        assert logits.is_contiguous()
        assert to.is_contiguous()
        arguments = _Arguments(
            logits=logits.data_ptr(),
            to=to.data_ptr(),
            N=logits.shape[0],
            V=logits.shape[1],
            is_bf16=logits.dtype == torch.bfloat16,
            threads=torch.get_num_threads(),
            labels=labels.data_ptr(),
            temperature=temperature,
            **{name: n.data_ptr() for name, n in kept.items()},
        )
        function(ctypes.byref(arguments))


# ------------------------------------------------------------------------------------------ operators for a CPU
# The same on the tokens that have a label.


def _among(N: int, chosen: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` at the chosen ones of N positions, 0 at the others; empty ones stay so."""
    if not values.numel() and len(chosen):
        return values
    return values.new_zeros(N, *values.shape[1:]).index_copy_(0, chosen, values)


@torch.library.custom_op("minigpt::labelled_loss", mutates_args=(), device_types="cpu")
def _labelled_loss(
    x_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    weights_N: torch.Tensor,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = ((labels_N >= 0) & (weights_N != 0)).nonzero()[:, 0]
    arguments = x_NE[chosen], weight_VE, labels_N[chosen], weights_N[chosen]
    loss, grad_x, grad_weight = _loss(*arguments, needs_x, needs_weight)
    return loss, _among(len(x_NE), chosen, grad_x) if needs_x else grad_x, grad_weight


@_labelled_loss.register_fake
def _(x_NE, weight_VE, labels_N, weights_N, needs_x, needs_weight):
    loss = x_NE.new_empty((), dtype=_precision(x_NE))
    return (
        loss,
        x_NE.new_empty(x_NE.shape if needs_x else 0),
        weight_VE.new_empty(weight_VE.shape if needs_weight else 0),
    )


@torch.library.custom_op("minigpt::labelled_log_probs", mutates_args=(), device_types="cpu")
def _labelled_log_probs(
    x_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    temperature: float,
    with_entropy: bool,
    keeps_gradient: bool,
    keeps_logits: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    chosen = (labels_N >= 0).nonzero()[:, 0]
    N = len(x_NE)
    logits = _memory(x_NE, weight_VE, keeps_logits)  # those of a label come first; the rest is never touched
    arguments = x_NE[chosen], weight_VE, labels_N[chosen], temperature, with_entropy, keeps_gradient
    log_probs, entropies, log_sums, grad_x = _log_probs(*arguments, logits)
    return (
        _among(N, chosen, log_probs),
        _among(N, chosen, entropies) if with_entropy else entropies,
        _among(N, chosen, log_sums),
        _among(N, chosen, grad_x) if keeps_gradient else grad_x,
        logits,
    )


@_labelled_log_probs.register_fake
def _(x_NE, weight_VE, labels_N, temperature, with_entropy, keeps_gradient, keeps_logits):
    stats = [
        x_NE.new_empty(n, dtype=_precision(x_NE)) for n in (len(x_NE), len(x_NE) if with_entropy else 0, len(x_NE))
    ]
    return *stats, x_NE.new_empty(x_NE.shape if keeps_gradient else 0), _memory(x_NE, weight_VE, keeps_logits)


@torch.library.custom_op("minigpt::labelled_log_probs_backward", mutates_args=(), device_types="cpu")
def _labelled_log_probs_backward(
    x_NE: torch.Tensor,
    weight_VE: torch.Tensor,
    labels_N: torch.Tensor,
    logits_NV: torch.Tensor,
    log_sums_N: torch.Tensor,
    entropies_N: torch.Tensor,
    grads_N: torch.Tensor,
    entropy_grads_N: torch.Tensor,
    temperature: float,
    with_entropy: bool,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = (labels_N >= 0).nonzero()[:, 0]
    stats = [n[chosen] if len(n) else n for n in (log_sums_N, entropies_N, grads_N, entropy_grads_N)]
    options = temperature, with_entropy, needs_x, needs_weight
    arguments = x_NE[chosen], weight_VE, labels_N[chosen], logits_NV, stats, *options
    grad_x, grad_weight = _log_probs_backward(*arguments)
    return _among(len(x_NE), chosen, grad_x) if needs_x else grad_x, grad_weight


@_labelled_log_probs_backward.register_fake
def _(
    x_NE,
    weight_VE,
    labels_N,
    logits_NV,
    log_sums_N,
    entropies_N,
    grads_N,
    entropy_grads_N,
    temperature,
    with_entropy,
    needs_x,
    needs_weight,
):
    return x_NE.new_empty(x_NE.shape if needs_x else 0), weight_VE.new_empty(weight_VE.shape if needs_weight else 0)
