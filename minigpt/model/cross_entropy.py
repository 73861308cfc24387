"""Cross-entropy of a linear output layer, a piece of the batch at a time.

With a vocabulary of V entries the logits of N tokens take N·V numbers, and their gradient as many again: 10 GB for 16k
tokens of a 150k vocabulary in float32. Here they exist for one chunk of tokens only. The gradient with respect to the
hidden states and the weight is computed along with the loss, because the loss is a sum and its upstream gradient is one
scalar that can be multiplied in later; so no logits are kept or computed twice.
(The idea is that of Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989, section 3.)
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
