"""The formulas of `algorithms.py` as modules that an engine trains: everything that uses a weight in one forward call.

Both return sums over tokens; what they are divided by is known only for the whole batch, to the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import algorithms
from .algorithms import PolicyObjective, kl_estimate, kl_loss, masked, policy_loss, truncated_importance_weights


@dataclass(frozen=True)
class PolicyLossTerms:
    """What the policy's loss is made of.

    Attributes:
        objective, clip_low, clip_high, dual_clip: As `algorithms.policy_loss` takes them.
        temperature: Of all log-probabilities and of the entropy.
        entropy_coefficient: What is subtracted: this times the entropy.
        behaviour_cap: Of the importance weights between policy and sampler; None: no such weights.
        max_sequences: Upper bound on `sequence_ids` + 1 in a forward pass.
    """

    objective: PolicyObjective = "ppo"
    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    temperature: float = 1.0
    entropy_coefficient: float = 0.0
    behaviour_cap: float | None = None
    max_sequences: int = 1

    @property
    def metrics(self) -> tuple[str, ...]:
        """Sums over tokens that the loss returns behind itself."""
        return ("policy_loss", "kl", "entropy", "clip_fraction", "ratio", "behaviour_weight")


def policy_objective(terms: PolicyLossTerms) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The loss for a `StageModule`: (Σ weight · loss, the sums of `terms.metrics` and then every token's log π)."""

    def loss(
        network: Any,
        *,
        labels: torch.Tensor,
        weights: torch.Tensor,
        advantages: torch.Tensor,
        sequence_ids: torch.Tensor,
        kl_coefficient: torch.Tensor,
        ref_log_probs: torch.Tensor | None = None,
        old_log_probs: torch.Tensor | None = None,
        behaviour_log_probs: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output = network(**inputs, labels=labels, reduction="entropy", temperature=terms.temperature)
        log_probs, entropy = output.log_probs, output.entropy
        mask = labels >= 0
        old = log_probs.detach() if old_log_probs is None else old_log_probs
        correction = None
        if terms.behaviour_cap is not None:
            assert behaviour_log_probs is not None
            correction = truncated_importance_weights(old, behaviour_log_probs, mask, terms.behaviour_cap)
        surrogate = policy_loss(
            log_probs,
            old,
            advantages,
            mask,
            objective=terms.objective,
            clip_low=terms.clip_low,
            clip_high=terms.clip_high,
            dual_clip=terms.dual_clip,
            sequence_ids=sequence_ids,
            n_sequences=terms.max_sequences,
            behaviour_weights=correction,
        )
        per_token = surrogate.loss
        kl = torch.zeros_like(log_probs)
        if ref_log_probs is not None:
            kl = kl_estimate(log_probs.detach(), ref_log_probs, mask)
            # an expectation over π_old, like the surrogate: tokens of another sampler are weighed alike
            of_kl = kl_loss(log_probs, old, ref_log_probs, mask)
            per_token = per_token + kl_coefficient * (of_kl if correction is None else correction * of_kl)
        if terms.entropy_coefficient:
            per_token = per_token - terms.entropy_coefficient * masked(entropy, mask)
        loss_sum = (masked(per_token, mask) * weights).sum()
        ratio = masked(surrogate.ratio, mask)
        watched = (
            surrogate.loss,
            kl,
            entropy,
            surrogate.clipped,
            ratio,
            mask.float() if correction is None else correction,
        )
        sums = torch.stack([masked(value.detach().float(), mask).sum() for value in watched])
        return loss_sum, torch.cat((sums, log_probs.detach().float().flatten()))

    return loss


def value_objective(clip: float | None) -> Callable[..., torch.Tensor]:
    """The critic's loss for a `StageModule`: Σ over tokens; without `returns` the values themselves, [B·T]."""

    def loss(
        network: Any,
        *,
        labels: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
        returns: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        found = network(**inputs)
        if returns is None:
            return found.flatten()
        assert labels is not None
        assert values is not None
        return algorithms.value_loss(found, values, returns, labels >= 0, clip).sum()

    return loss
