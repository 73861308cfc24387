"""The formulas of reinforcement learning from rewards, as pure functions of tensors.

Everything here is per token. A batch of sampled answers is a set of tokens in any layout (padded [B, T] or packed
rows); `mask` says which of them the policy produced, and `sequence_ids`, of the same shape, which answer a token is of.
What stands at masked positions, NaN included, changes neither a result nor a gradient.

Losses are returned per token. How tokens are averaged is a separate choice (`token_weights`), because it must be made
over the whole global batch: the loss of a step is Σ weight · loss / denominator, whatever the micro-batches are.

Symbols as in the papers: π_θ policy, π_old policy that the update starts from, μ behaviour policy that sampled,
π_ref reference, r_t = π_θ/π_old, A advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

MAX_LOG_RATIO = 20.0  # exp of more than this says nothing but overflows: exp(20) is 5e8

KLEstimator = Literal["k1", "k2", "k3"]
GroupBaseline = Literal["grpo", "dr_grpo", "rloo"]
PolicyObjective = Literal["ppo", "gspo", "cispo"]
Aggregation = Literal["token", "sequence", "constant"]


# ------------------------------------------------------------------------------------------------- masks and averages


def masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`x` where the mask is set, 0 elsewhere; unlike a product it stops NaN and infinity, in the gradient too."""
    return torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `x` over the mask; 0 where nothing is left."""
    return masked(x, mask).sum() / mask.bool().sum().clamp(min=1)


def masked_whiten(x: torch.Tensor, mask: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """(x − mean) / √(variance + eps) over the mask, 0 elsewhere. Equal values give exactly 0."""
    kept = x[mask.bool()]
    if kept.numel() < 2 or bool(kept.max() == kept.min()):
        return torch.zeros_like(x)
    return masked((x - kept.mean()) * torch.rsqrt(kept.var(unbiased=False) + eps), mask)


def sequence_sum(x: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor, n_sequences: int) -> torch.Tensor:
    """Σ of `x` over each sequence's tokens, [n_sequences]."""
    total = torch.zeros(n_sequences, dtype=x.dtype, device=x.device)
    chosen = mask.bool()
    return total.index_add(0, sequence_ids[chosen], x[chosen])


def token_weights(
    mask: torch.Tensor,
    sequence_ids: torch.Tensor,
    n_sequences: int,
    aggregation: Aggregation = "token",
    max_length: int = 1,
) -> tuple[torch.Tensor, float]:
    """How much each token counts, and what these tokens add to the denominator of the global batch.

    Args:
        mask: Which tokens count.
        sequence_ids: Which sequence each belongs to.
        n_sequences: Sequences here (empty ones included).
        aggregation: token: every token alike (DAPO, arXiv:2503.14476, eq. 8). sequence: every answer alike, however
            long (GRPO, arXiv:2402.03300, eq. 3). constant: the sum over tokens divided by sequences · max_length, so
            that length has no influence on a token's weight and none on the total either (Dr. GRPO, arXiv:2503.20783).
        max_length: The constant of the third.

    Returns:
        (weights float32 of the mask's shape, 0 outside it; denominator). loss = Σ weights · loss / Σ denominators.
    """
    ones = mask.bool().float()
    if aggregation == "token":
        return ones, float(ones.sum())
    if aggregation == "constant":
        return ones, float(n_sequences * max_length)
    lengths = sequence_sum(ones, mask, sequence_ids, n_sequences)
    return masked(1.0 / lengths[sequence_ids.clamp(0, n_sequences - 1)], mask), float((lengths > 0).sum())


# ------------------------------------------------------------------------------------------------- log-probs, entropy


def token_log_probs(logits: torch.Tensor, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """log π(ids | …) of logits [..., V] at a temperature; computed in float32 (or float64)."""
    scaled = _at_least_float32(logits) / temperature
    return scaled.gather(-1, ids[..., None])[..., 0] - scaled.logsumexp(-1)


def entropy(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """−Σ π log π of logits [..., V] at a temperature, in nats."""
    log_p = torch.log_softmax(_at_least_float32(logits) / temperature, -1)
    return -(log_p.exp() * log_p).sum(-1)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ----------------------------------------------------------------------------------------------------------------- KL


def kl_estimate(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, mask: torch.Tensor, kind: KLEstimator = "k3"
) -> torch.Tensor:
    """Per-token estimates of KL(π ‖ π_ref) from samples of π (Schulman 2020, http://joschu.net/blog/kl-approx.html).

    With Δ = log π_ref − log π: k1 = −Δ, k2 = Δ²/2, k3 = exp(Δ) − 1 − Δ. k1 and k3 are unbiased as *values*. As losses
    their gradients are something else: E[∇k1] = 0, E[∇k2] = ∇KL(π‖π_ref), E[∇k3] = ∇KL(π_ref‖π). For value and gradient
    of KL(π‖π_ref) there is `kl_loss`. Δ is cut to ±20 in k2 and k3, so that both stay finite.
    """
    delta = masked(ref_log_probs - log_probs, mask)
    if kind == "k1":
        return -delta
    delta = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k2":
        return delta.square() / 2
    if kind == "k3":
        return torch.expm1(delta) - delta
    raise ValueError(f"KL estimator {kind!r} is unknown: k1, k2 or k3")


def kl_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, ref_log_probs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """(π_θ/π_old) · k3 per token: both its value and its gradient are KL(π_θ‖π_ref)'s, in expectation over π_old.

    The ratio carries the derivative of the sampling distribution that plain k3 leaves out (arXiv:2512.02556, section
    3.1).
    """
    log_ratio = masked(log_probs - old_log_probs, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp() * kl_estimate(log_probs, ref_log_probs, mask)


@dataclass
class AdaptiveKL:
    """A KL coefficient that follows a target: β ← β (1 + K_β clip(KL/target − 1, ±0.2)) (arXiv:1909.08593, sec. 2.2).

    Attributes:
        coefficient: The present β.
        target: KL per answer that is aimed at, in nats.
        gain: K_β, 0.1 in the paper. (Its code, and whoever follows it, has the answers of a batch divided by a horizon
            of 10,000 there: with a hundred answers β needs 350 updates to double.)
    """

    coefficient: float
    target: float
    gain: float = 0.1

    def update(self, kl: float) -> float:
        """Move β by the KL of a batch; returns the new one."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + self.gain * error
        return self.coefficient


# --------------------------------------------------------------------------------------------------------- advantages


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16): A_t = Σ_l (γλ)^l δ_{t+l}.

    δ_t = r_t + γ V_{t+1} − V_t, where t + 1 is the next token *in the mask*: tokens of the environment between two
    turns are stepped over, and padding has no influence.

    Args:
        rewards: [B, T], usually all 0 but at the last token of the mask.
        values: [B, T], V of the state in which token t was chosen.
        mask: [B, T], the tokens that the policy chose.
        gamma: Discount.
        lam: λ; 1 is the return minus the value, 0 the one-step error.
        bootstrap: [B], V after the last token. None: 0, the episode is over. One that was cut off and whose last reward
            is no verdict on the whole is not over: it goes on from here.

    Returns:
        (advantages, returns = advantages + values), both 0 outside the mask, without gradient.
    """
    with torch.no_grad():
        keep = mask.bool()
        rewards, values = masked(rewards, keep), masked(values, keep)
        next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.to(values.dtype)
        next_advantage = torch.zeros_like(next_value)
        advantages = torch.zeros_like(values)
        for t in reversed(range(values.shape[1])):
            delta = rewards[:, t] + gamma * next_value - values[:, t]
            advantage = delta + gamma * lam * next_advantage
            here = keep[:, t]
            advantages[:, t] = torch.where(here, advantage, 0.0)
            next_advantage = torch.where(here, advantage, next_advantage)
            next_value = torch.where(here, values[:, t], next_value)
        return advantages, masked(advantages + values, keep)


def group_advantages(
    rewards: torch.Tensor, group_size: int, baseline: GroupBaseline = "grpo", eps: float = 1e-6
) -> torch.Tensor:
    """Advantages of answers compared with their fellows: rewards [N], answers of a prompt adjacent → [N].

    grpo: (R − mean) / (std + eps), the sample standard deviation (arXiv:2402.03300, section 4.1.2).
    dr_grpo: R − mean; dividing by std favours prompts that are nearly always, or nearly never, solved
    (arXiv:2503.20783, section 3.1).
    rloo: R − mean of the others (arXiv:2402.14740, eq. 8), which is dr_grpo times G / (G − 1).

    A group of equal rewards gets exactly 0: what is left of it in floating point, divided by an even smaller standard
    deviation, would be a large advantage made of rounding errors.

    Errors: ValueError when N is no multiple of the group size.
    """
    if group_size < 1 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not divide into groups of {group_size}")
    groups = _at_least_float32(rewards).reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if baseline == "grpo":
        centred = centred / (groups.std(1, keepdim=True) + eps) if group_size > 1 else centred
    elif baseline == "rloo":
        centred = centred * (group_size / max(1, group_size - 1))
    elif baseline != "dr_grpo":
        raise ValueError(f"baseline {baseline!r} is unknown: grpo, dr_grpo or rloo")
    equal = groups.max(1, keepdim=True).values == groups.min(1, keepdim=True).values
    return torch.where(equal, 0.0, centred).reshape(rewards.shape)


# ------------------------------------------------------------------------------------------------------------- losses


class PolicyLoss(NamedTuple):
    """A per-token policy loss and what is worth watching, all of the mask's shape.

    Attributes:
        loss: To be weighted, summed and minimised.
        ratio: π_θ/π_old (of the sequence for gspo), detached.
        clipped: 1 where clipping took the gradient away.
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    objective: PolicyObjective = "ppo",
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    sequence_ids: torch.Tensor | None = None,
    n_sequences: int = 0,
    behaviour_weights: torch.Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate, per token.

    ppo: −min(r A, clip(r, 1 − clip_low, 1 + clip_high) A) (arXiv:1707.06347, eq. 7). A `clip_high` above `clip_low` is
    DAPO's clip-higher (arXiv:2503.14476, section 3.1).
    gspo: the same with the ratio of the whole answer, r = exp(mean_t log π_θ/π_old) (arXiv:2507.18071, eq. 7);
    gradients reach the tokens through its log-probabilities.
    cispo: −sg(clip(r)) · A · log π_θ: the weight is clipped and no token loses its gradient (arXiv:2506.13585, eq. 4).

    Args:
        log_probs: log π_θ of the sampled tokens, with gradient.
        old_log_probs: log π_old. For one update a batch it is `log_probs.detach()`: then r is 1 by construction.
        advantages: A, one a token.
        mask: Tokens that the policy produced.
        objective: See above.
        clip_low: ε below.
        clip_high: ε above; None: as below.
        dual_clip: With c > 1 and A < 0 the loss is at most −c A, however large r is (arXiv:1912.09729, eq. 5).
        sequence_ids: For gspo: the sequence of each token.
        n_sequences: For gspo.
        behaviour_weights: Weights of `truncated_importance_weights`, when the sampler was not π_old.
    """
    keep = mask.bool()
    log_ratio = masked(log_probs - old_log_probs, keep)
    if objective == "gspo":
        if sequence_ids is None:
            raise ValueError("gspo needs sequence_ids: its ratio is that of the whole answer")
        log_ratio = _sequence_log_ratio(log_ratio, keep, sequence_ids, n_sequences)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = masked(advantages, keep)
    low, high = 1 - clip_low, 1 + (clip_low if clip_high is None else clip_high)
    bounded = ratio.clamp(low, high)
    if objective == "cispo":
        loss = -bounded.detach() * advantages * masked(log_probs, keep)
        clipped = (ratio != bounded) & keep
    elif objective in ("ppo", "gspo"):
        plain, cautious = -ratio * advantages, -bounded * advantages
        loss = torch.maximum(plain, cautious)
        clipped = (cautious > plain) & keep
        if dual_clip is not None:
            ceiling = -dual_clip * advantages
            capped = (advantages < 0) & (loss > ceiling)
            loss, clipped = torch.where(capped, ceiling, loss), clipped | capped
    else:
        raise ValueError(f"objective {objective!r} is unknown: ppo, gspo or cispo")
    if behaviour_weights is not None:
        loss = loss * masked(behaviour_weights, keep)
    return PolicyLoss(masked(loss, keep), ratio.detach(), clipped.float())


def _sequence_log_ratio(
    log_ratio: torch.Tensor, mask: torch.Tensor, sequence_ids: torch.Tensor, n_sequences: int
) -> torch.Tensor:
    """mean_t log r_t of each token's sequence, with the gradient of the token alone (GSPO-token, eq. 14)."""
    lengths = sequence_sum(torch.ones_like(log_ratio), mask, sequence_ids, n_sequences).clamp(min=1)
    mean = sequence_sum(log_ratio.detach(), mask, sequence_ids, n_sequences) / lengths
    of_token = masked(mean[sequence_ids.clamp(0, n_sequences - 1)], mask)
    return of_token + log_ratio - log_ratio.detach()


def truncated_importance_weights(
    old_log_probs: torch.Tensor, behaviour_log_probs: torch.Tensor, mask: torch.Tensor, cap: float = 2.0
) -> torch.Tensor:
    """min(π_old / μ, cap) per token, without gradient: corrects for a sampler that is not the policy of the update.

    The sampler may be a step behind, compute in another precision, or have truncated its distribution. Weights above
    the cap are cut, since a few of them would own the gradient (arXiv:2010.05767's truncation, per token as in
    https://fengyao.notion.site/off-policy-rl).
    """
    log_weight = masked(old_log_probs - behaviour_log_probs, mask).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return masked(log_weight.exp().clamp(max=cap), mask)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    clip: float | None = 0.2,
) -> torch.Tensor:
    """½ max((V − R)², (V_clipped − R)²) per token, where V may move by at most `clip` from what it was at sampling.

    (The implementation of PPO that everyone follows clips here too; see arXiv:2006.05990, decision C3.) None: no clip.
    """
    keep = mask.bool()
    values, old_values, returns = masked(values, keep), masked(old_values, keep), masked(returns, keep)
    error = (values - returns).square()
    if clip is not None:
        bounded = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (bounded - returns).square())
    return masked(error / 2, keep)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 − Var(R − V) / Var(R) over the mask: 1 for a perfect critic, 0 for the mean, NaN where R is constant."""
    keep = mask.bool()
    variance = returns[keep].var(unbiased=False)
    return float(1 - (returns[keep] - values[keep]).var(unbiased=False) / variance) if variance > 0 else float("nan")


def overlong_penalty(lengths: torch.Tensor, max_length: int, buffer: int) -> torch.Tensor:
    """DAPO's soft punishment of long answers (arXiv:2503.14476, eq. 13), lengths [N] → float32 [N].

    0 up to max_length − buffer tokens, then linearly down to −1 at max_length, and −1 beyond.
    """
    over = lengths.float() - (max_length - buffer)
    return -(over / max(1, buffer)).clamp(0, 1)
