"""Floating-point operations of a training step, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

from typing import Any


def training_flops(
    config: Any, *, tokens: float, labels: float, attention_pairs: float, adapter_weights: float | None = None
) -> float:
    """FLOPs of one forward and backward pass: 6 per weight and token (arXiv:2001.08361, table 1), plus attention.

    Only useful work is credited: documents by their own length, no padding, no pair that the mask hides, and the
    output layer where there is a label.

    Args:
        config: MiniGPTConfig.
        tokens: Positions that belong to a document.
        labels: Positions with a label.
        attention_pairs: (query, key) pairs within documents, Σ n(n+1)/2.
        adapter_weights: When the model is frozen: weights of the adapter that is trained. A frozen weight costs 4 a
            token, since it has no gradient (and the first block's input needs none); one of the adapter 6.
    """
    E, D, F = config.hidden_size, config.head_dim, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights_per_layer = E * D * (2 * heads + 2 * kv_heads) + 3 * E * F
    if adapter_weights is None:
        per_weight, per_token = 6, 6 * config.num_hidden_layers * weights_per_layer
    else:
        per_weight, per_token = 4, 4 * config.num_hidden_layers * weights_per_layer + 6 * adapter_weights
        per_token -= 2 * E * D * (heads + 2 * kv_heads)
    per_pair = 12 * config.num_hidden_layers * heads * D  # q·k and p·v: 2·2·D forward, twice that backward
    return per_token * tokens + per_weight * E * config.vocab_size * labels + per_pair * attention_pairs
