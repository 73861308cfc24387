"""Cross-entropy and log-probabilities of a linear output layer, a piece of the batch at a time.

With a vocabulary of V entries the logits of N tokens take N·V numbers, and their gradient as many again: 10 GB for 16k
tokens of a 150k vocabulary in float32. Here they exist for one chunk of tokens only. The gradient with respect to the
hidden states and the weight is computed along with the loss, because the loss is a sum and its upstream gradient is one
scalar that can be multiplied in later; so no logits are kept or computed twice.
(The idea is that of Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989, section 3.)

Losses that are no sum over tokens (DPO's is a function of whole answers) want the log-probability of each token, whose
upstream gradient is known only when all of them are. So `linear_log_probs` computes the logits of a chunk once more in
its backward pass, unless the weight is frozen: four products where the loss has three, and one chunk in memory.
"""

from __future__ import annotations

import torch

_CHUNK_ELEMENTS = 1 << 23  # logits alive at a time: 32 MB in float32


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


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NE, weight_VE, labels_N, weights_N):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        accumulate = torch.float64 if x_NE.dtype == torch.float64 else torch.float32
        counts_N = (labels_N >= 0) & (weights_N != 0)
        weights_N = torch.where(counts_N, weights_N, 0.0).to(accumulate)
        labels_N = torch.where(counts_N, labels_N, 0)
        loss = torch.zeros((), dtype=accumulate, device=x_NE.device)
        grad_weight = torch.zeros(weight_VE.shape, dtype=accumulate, device=x_NE.device) if needs_weight else None
        grad_x = []
        chunk = max(1, _CHUNK_ELEMENTS // weight_VE.shape[0])
        pieces = zip(x_NE.split(chunk), labels_N.split(chunk), weights_N.split(chunk), strict=True)
        for x, label, w in pieces:
            x = torch.where((w != 0)[:, None], x, 0.0)
            logits = (x @ weight_VE.T).to(accumulate)
            log_z = logits.logsumexp(-1)
            loss += (w * (log_z - logits.gather(1, label[:, None])[:, 0])).sum()
            if needs_x or needs_weight:
                is_label = torch.arange(logits.shape[1], device=x.device) == label[:, None]
                grad_logits = (((logits - log_z[:, None]).exp() - is_label.to(accumulate)) * w[:, None]).to(x.dtype)
                if needs_x:
                    grad_x.append(grad_logits @ weight_VE)
                if grad_weight is not None:
                    grad_weight += grad_logits.T @ x
        ctx.save_for_backward(
            torch.cat(grad_x) if needs_x else None,
            None if grad_weight is None else grad_weight.to(weight_VE.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad_loss.to(grad_x.dtype),
            None if grad_weight is None else grad_weight * grad_loss.to(grad_weight.dtype),
            None,
            None,
        )


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


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NE, weight_VE, labels_N, temperature, with_entropy):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        accumulate = torch.float64 if x_NE.dtype == torch.float64 else torch.float32
        chunk = max(1, _CHUNK_ELEMENTS // weight_VE.shape[0])
        keeps_gradient = needs_x and not needs_weight and not with_entropy
        log_probs, log_normalisers, entropies, grad_x = [], [], [], []
        for x, label in zip(x_NE.split(chunk), labels_N.split(chunk), strict=True):
            has_label, label = label >= 0, label.clamp_min(0)
            logits = (torch.where(has_label[:, None], x, 0.0) @ weight_VE.T).to(accumulate) / temperature
            log_z = logits.logsumexp(-1)
            log_probs.append(torch.where(has_label, logits.gather(1, label[:, None])[:, 0] - log_z, 0.0))
            log_normalisers.append(log_z)
            if with_entropy:  # not log z − Σ p · logit: where the model is sure, two large numbers would cancel
                log_p = logits - log_z[:, None]
                entropies.append(torch.where(has_label, -(log_p.exp() * log_p).sum(-1), 0.0))
            if keeps_gradient:  # a row's gradient is upstream times this: no logits are needed again
                grad_logits = _log_prob_gradient(logits, log_z, label) * has_label[:, None] / temperature
                grad_x.append(grad_logits.to(x.dtype) @ weight_VE)
        ctx.chunk, ctx.temperature, ctx.keeps_gradient = chunk, temperature, keeps_gradient
        entropy_N = torch.cat(entropies) if with_entropy else torch.zeros(())
        if keeps_gradient:
            ctx.save_for_backward(torch.cat(grad_x), None, labels_N, None, None)
        else:
            ctx.save_for_backward(
                x_NE, weight_VE, labels_N, torch.cat(log_normalisers), entropy_N if with_entropy else None
            )
        return torch.cat(log_probs), entropy_N

    @staticmethod
    def backward(ctx, grad_N, grad_entropy_N):
        x_NE, weight_VE, labels_N, log_z_N, entropy_N = ctx.saved_tensors
        if ctx.keeps_gradient:  # what was saved is the gradient with respect to x
            return x_NE * torch.where(labels_N >= 0, grad_N, 0.0)[:, None].to(x_NE.dtype), None, None, None, None
        if entropy_N is None:
            entropy_N = grad_entropy_N = torch.zeros_like(log_z_N)
        grad_weight = torch.zeros(weight_VE.shape, dtype=log_z_N.dtype, device=x_NE.device)
        grad_x = []
        pieces = (t.split(ctx.chunk) for t in (x_NE, labels_N, log_z_N, grad_N, entropy_N, grad_entropy_N))
        for x, label, log_z, grad, entropy, grad_entropy in zip(*pieces, strict=True):
            has_label, label = label >= 0, label.clamp_min(0)
            x = torch.where(has_label[:, None], x, 0.0)
            log_p = (x @ weight_VE.T).to(log_z.dtype) / ctx.temperature - log_z[:, None]
            is_label = torch.arange(log_p.shape[1], device=x.device) == label[:, None]
            # d log p_label / d logits = label − p;  dH / d logits = −p (log p + H)
            inner = grad[:, None] + grad_entropy[:, None] * (log_p + entropy[:, None])
            grad_logits = torch.where(has_label[:, None], is_label * grad[:, None] - log_p.exp() * inner, 0.0)
            grad_logits = (grad_logits / ctx.temperature).to(x.dtype)
            if ctx.needs_input_grad[0]:
                grad_x.append(grad_logits @ weight_VE)
            if ctx.needs_input_grad[1]:
                grad_weight += grad_logits.T @ x
        return (
            torch.cat(grad_x) if grad_x else None,
            grad_weight.to(weight_VE.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
            None,
        )


def _log_prob_gradient(logits: torch.Tensor, log_z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """d log softmax(logits)[label] / d logits: the one-hot label minus the softmax."""
    is_label = torch.arange(logits.shape[1], device=logits.device) == label[:, None]
    return is_label.to(logits.dtype) - (logits - log_z[:, None]).exp()
