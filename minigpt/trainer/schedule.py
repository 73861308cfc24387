"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

WSD_DECAY = 0.2  # the last part of a warmup-stable-decay run (arXiv:2404.06395 takes 10 %, 20 % is better when short)


def learning_rate(step: int, total_steps: int, *, peak: float, schedule: str, warmup_ratio: float, min_ratio: float):
    """The rate of optimizer step `step` (0-based) of `total_steps`.

    Args:
        peak: The highest rate.
        schedule: "cosine" to `min_ratio`·peak (arXiv:1608.03983, eq. 5), "wsd": constant, then linear to
            `min_ratio`·peak over the last fifth, or "constant".
        warmup_ratio: Part of the run over which the rate rises linearly.
        min_ratio: Last rate over peak.
    """
    warmup = max(1, round(warmup_ratio * total_steps)) if warmup_ratio else 0
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
    decay = max(1, round(WSD_DECAY * total_steps))
    left = total_steps - step
    return peak if left >= decay else peak * (min_ratio + (1 - min_ratio) * left / decay)
