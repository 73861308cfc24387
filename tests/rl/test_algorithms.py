"""The formulas of reinforcement learning against closed forms, double sums and exact enumeration, in float64."""

import math

import pytest
import torch

from minigpt.rl.algorithms import (
    AdaptiveKL,
    entropy,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    kl_loss,
    masked_mean,
    masked_whiten,
    overlong_penalty,
    policy_loss,
    sequence_sum,
    token_log_probs,
    token_weights,
    truncated_importance_weights,
    value_loss,
)

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# ---- GAE


def gae_by_definition(rewards, values, mask, gamma, lam, bootstrap):
    """A_t = Σ_l (γλ)^l δ_{t+l} as a double sum over the tokens of the mask."""
    advantages = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        tokens = mask[b].nonzero()[:, 0].tolist()
        after = [*(values[b, t] for t in tokens[1:]), bootstrap[b]] if tokens else []
        deltas = [rewards[b, t] + gamma * v - values[b, t] for t, v in zip(tokens, after, strict=True)]
        for i, t in enumerate(tokens):
            advantages[b, t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_double_sum_also_around_tokens_of_the_environment(gamma, lam):
    rewards, values, bootstrap = draw(5, 9), draw(5, 9, seed=1), draw(5, seed=2)
    mask = torch.rand(5, 9, generator=torch.Generator().manual_seed(3)) < 0.6
    mask[4] = False
    advantages, returns = gae(rewards, values, mask, gamma, lam, bootstrap)
    expected = gae_by_definition(rewards, values, mask, gamma, lam, bootstrap)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0.0), rtol=1e-12, atol=1e-12)


def test_gae_ends_are_the_monte_carlo_return_and_the_one_step_error():
    rewards, values, mask = draw(3, 6), draw(3, 6, seed=1), torch.ones(3, 6)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values, mask, 1.0, 1.0)[0], to_go - values)
    following = torch.cat((values[:, 1:], torch.zeros(3, 1, dtype=F64)), 1)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * following - values)


@pytest.mark.parametrize("garbage", [100.0, float("nan"), float("inf")])
def test_what_stands_in_the_padding_changes_no_advantage(garbage):
    rewards, values = draw(4, 7), draw(4, 7, seed=1)
    mask = torch.arange(7) < torch.tensor([[7], [3], [1], [5]])
    clean = gae(rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0), mask, 1.0, 0.95)
    dirty = gae(rewards.masked_fill(~mask, garbage), values.masked_fill(~mask, garbage), mask, 1.0, 0.95)
    for ours, theirs in zip(dirty, clean, strict=True):
        assert torch.equal(ours, theirs)


def test_the_reward_on_the_last_token_reaches_every_earlier_one():
    rewards, mask = torch.zeros(1, 5), torch.tensor([[1, 1, 1, 0, 0]])
    rewards[0, 2] = 1.0
    advantages, _ = gae(rewards, torch.zeros(1, 5), mask, gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.25, 0.5, 1.0, 0.0, 0.0]]))


def test_an_answer_that_was_cut_off_goes_on_where_a_finished_one_is_over():
    rewards, values, mask = torch.zeros(1, 2), torch.full((1, 2), 0.5), torch.ones(1, 2)
    finished, _ = gae(rewards, values, mask, 1.0, 1.0)
    cut_off, _ = gae(rewards, values, mask, 1.0, 1.0, bootstrap=torch.tensor([0.5]))
    torch.testing.assert_close(finished, torch.full((1, 2), -0.5))
    torch.testing.assert_close(cut_off, torch.zeros(1, 2))


# ---- group advantages


def test_group_advantages_are_their_formulas():
    rewards = draw(12)
    groups = rewards.view(3, 4)
    mean, std = groups.mean(1, keepdim=True), groups.std(1, keepdim=True)
    others = (groups.sum(1, keepdim=True) - groups) / 3
    torch.testing.assert_close(group_advantages(rewards, 4).view(3, 4), (groups - mean) / (std + 1e-6))
    torch.testing.assert_close(group_advantages(rewards, 4, "dr_grpo").view(3, 4), groups - mean)
    torch.testing.assert_close(group_advantages(rewards, 4, "rloo").view(3, 4), groups - others)


@pytest.mark.parametrize("baseline", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e-30, -7.3e8])
def test_equal_rewards_give_exactly_no_advantage(baseline, reward):
    rewards = torch.full((14,), reward)
    assert torch.equal(group_advantages(rewards, 7, baseline, eps=1e-9), torch.zeros(14))


def test_a_group_of_one_has_nothing_to_compare_with():
    assert torch.equal(group_advantages(torch.tensor([1.0, 3.0]), 1), torch.zeros(2))


def test_rewards_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="5 rewards do not divide into groups of 2"):
        group_advantages(torch.zeros(5), 2)


# ---- KL


def enumerate_gradient(policy_logits, ref_logits, kind):
    """∇ of E_{y∼π} [estimate(y)] with the samples taken as given: Σ_y π(y) ∇ estimate(y), over the whole vocabulary."""
    logits = policy_logits.clone().requires_grad_()
    log_p, log_r = torch.log_softmax(logits, 0), torch.log_softmax(ref_logits, 0)
    mask = torch.ones_like(log_p)
    if kind == "ratio × k3":
        estimate = kl_loss(log_p, log_p.detach(), log_r, mask)
    else:
        estimate = kl_estimate(log_p, log_r, mask, kind)
    (log_p.detach().exp() * estimate).sum().backward()
    return logits.grad


def true_gradient(policy_logits, ref_logits, reverse=False):
    logits = policy_logits.clone().requires_grad_()
    log_p, log_r = torch.log_softmax(logits, 0), torch.log_softmax(ref_logits, 0)
    kl = (log_r.exp() * (log_r - log_p)).sum() if reverse else (log_p.exp() * (log_p - log_r)).sum()
    kl.backward()
    return logits.grad


def test_expected_gradients_of_the_kl_estimators_by_enumeration():
    policy, ref = draw(11), draw(11, seed=1)
    forward, backward = true_gradient(policy, ref), true_gradient(policy, ref, reverse=True)
    torch.testing.assert_close(enumerate_gradient(policy, ref, "k1"), torch.zeros(11, dtype=F64), atol=1e-14, rtol=0)
    torch.testing.assert_close(enumerate_gradient(policy, ref, "k2"), forward)
    torch.testing.assert_close(enumerate_gradient(policy, ref, "k3"), backward)
    torch.testing.assert_close(enumerate_gradient(policy, ref, "ratio × k3"), forward)
    assert (forward - backward).abs().max() > 0.01


def test_behaviour_weights_give_the_kl_its_expected_gradient_where_another_policy_sampled():
    policy, ref, behaviour = draw(11), draw(11, seed=1), torch.log_softmax(draw(11, seed=2), 0)
    logits, mask = policy.clone().requires_grad_(), torch.ones(11)
    log_p, log_r = torch.log_softmax(logits, 0), torch.log_softmax(ref, 0)
    weights = truncated_importance_weights(log_p, behaviour, mask, cap=1e3)
    (behaviour.exp() * weights * kl_loss(log_p, log_p.detach(), log_r, mask)).sum().backward()
    torch.testing.assert_close(logits.grad, true_gradient(policy, ref), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_have_the_right_expectation(kind):
    log_p, log_r = torch.log_softmax(draw(11), 0), torch.log_softmax(draw(11, seed=1), 0)
    expected = (log_p.exp() * (log_p - log_r)).sum()
    torch.testing.assert_close((log_p.exp() * kl_estimate(log_p, log_r, torch.ones(11), kind)).sum(), expected)


@pytest.mark.parametrize("difference", [-100.0, -1e-9, 0.0, 1e-9, 100.0])
def test_k3_is_never_negative_and_always_finite(difference):
    log_p = torch.tensor([-3.0], requires_grad=True)
    k3 = kl_estimate(log_p, log_p.detach() + difference, torch.ones(1))
    k3.sum().backward()
    assert 0 <= k3.item() < math.inf
    assert torch.isfinite(log_p.grad).all()


@pytest.mark.parametrize(
    ("kl", "factor"), [(60.0, 1.02), (7.2, 1.02), (6.6, 1.01), (6.0, 1.0), (5.7, 0.995), (4.8, 0.98), (0.0, 0.98)]
)
def test_the_kl_coefficient_follows_its_target_as_in_the_paper(kl, factor):
    """1 + K_β · clip(KL/target − 1, ±0.2) with K_β = 0.1: at most 2 % an update, tenfold in ln 10 / ln 1.02 = 116."""
    assert AdaptiveKL(0.3, target=6.0).update(kl) == pytest.approx(0.3 * factor)
    assert AdaptiveKL(0.3, target=6.0, gain=0.5).update(kl) == pytest.approx(0.3 * (1 + 5 * (factor - 1)))


def test_the_kl_coefficient_reaches_the_one_that_holds_the_target_within_a_short_run():
    """Where the KL is 1/β nats that is 1/target. Sixty updates come from a tenth of it to a third, 0.1 · 1.02^60."""
    controller = AdaptiveKL(0.1, target=1.0)
    for _ in range(60):
        controller.update(1 / controller.coefficient)
    assert controller.coefficient == pytest.approx(0.1 * 1.02**60)
    for _ in range(140):
        controller.update(1 / controller.coefficient)
    assert controller.coefficient == pytest.approx(1.0, rel=1e-3)


# ---- policy loss


def test_the_ppo_loss_is_its_formula_and_its_gradient_vanishes_where_it_is_clipped():
    old, advantages = -torch.rand(64, dtype=F64) - 0.5, draw(64, seed=1)
    log_probs = (old + 0.5 * draw(64, seed=2)).requires_grad_()
    result = policy_loss(log_probs, old, advantages, torch.ones(64), clip_low=0.2, clip_high=0.28)
    ratio = (log_probs - old).exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    torch.testing.assert_close(result.loss, expected)
    result.loss.sum().backward()
    outside = ((ratio > 1.28) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert 5 < outside.sum() < 60
    assert torch.equal(result.clipped.bool(), outside)
    assert torch.equal(log_probs.grad == 0, outside)
    torch.testing.assert_close(log_probs.grad[~outside], (-ratio * advantages)[~outside].detach())


def test_one_update_a_batch_has_ratio_one_and_the_policy_gradient():
    log_probs, advantages = draw(20).requires_grad_(), draw(20, seed=1)
    result = policy_loss(log_probs, log_probs.detach(), advantages, torch.ones(20))
    assert torch.equal(result.ratio, torch.ones(20, dtype=F64))
    assert not result.clipped.any()
    result.loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, -advantages)


def test_dual_clip_bounds_what_a_bad_answer_can_cost():
    old, advantages = torch.zeros(3, dtype=F64), torch.tensor([-1.0, -1.0, 1.0], dtype=F64)
    log_probs = torch.tensor([10.0, 0.1, 0.1], dtype=F64, requires_grad=True)
    result = policy_loss(log_probs, old, advantages, torch.ones(3), dual_clip=3.0)
    torch.testing.assert_close(result.loss, torch.tensor([3.0, math.exp(0.1), -math.exp(0.1)], dtype=F64))
    assert result.clipped.tolist() == [1.0, 0.0, 0.0]


def test_gspo_uses_the_geometric_mean_ratio_of_the_answer():
    old, log_probs = draw(2, 5), draw(2, 5, seed=1).mul(0.1).add(draw(2, 5)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    rows = torch.arange(2)[:, None].expand(2, 5)
    advantages = torch.tensor([[1.0], [-2.0]], dtype=F64).expand(2, 5)
    keywords = {"clip_low": 10.0, "clip_high": 10.0, "objective": "gspo", "sequence_ids": rows, "n_sequences": 2}
    result = policy_loss(log_probs, old, advantages, mask, **keywords)
    ratios = [((log_probs - old)[i, : mask[i].sum()].mean()).exp() for i in range(2)]
    weights, _ = token_weights(mask, rows, 2, "sequence")
    loss = (weights * result.loss).sum()
    expected = -ratios[0] * 1.0 + ratios[1] * 2.0
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, log_probs)
    (theirs,) = torch.autograd.grad(expected, log_probs)
    torch.testing.assert_close(ours, theirs)


def test_cispo_keeps_the_gradient_of_every_token_with_a_clipped_weight():
    old = torch.zeros(3, dtype=F64)
    log_probs = torch.tensor([2.0, 0.0, -2.0], dtype=F64, requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0], dtype=F64)
    policy_loss(log_probs, old, advantages, torch.ones(3), objective="cispo").loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, -torch.tensor([1.2, 1.0, 0.8], dtype=F64) * advantages)


@pytest.mark.parametrize("objective", ["ppo", "gspo", "cispo"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_tokens_reach_neither_loss_nor_gradient(objective, poison):
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    rows = torch.arange(2)[:, None].expand(2, 4)
    log_probs = torch.where(mask.bool(), draw(2, 4), poison).requires_grad_()
    other = torch.where(mask.bool(), draw(2, 4, seed=1), poison)
    keywords = {"objective": objective, "sequence_ids": rows, "n_sequences": 2, "behaviour_weights": other}
    loss = policy_loss(log_probs, other, other, mask, **keywords).loss + kl_loss(log_probs, other, other, mask)
    value = value_loss(log_probs, other, other, mask)
    (loss + value).sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.equal(loss[~mask.bool()], torch.zeros(6, dtype=F64))
    assert torch.isfinite(log_probs.grad).all()
    assert torch.equal(log_probs.grad[~mask.bool()], torch.zeros(6, dtype=F64))
    assert log_probs.grad[mask.bool()].abs().min() > 0


def test_behaviour_weights_are_cut_above_and_carry_no_gradient():
    old = torch.tensor([0.0, 3.0, -1.0], requires_grad=True)
    weights = truncated_importance_weights(old, torch.zeros(3), torch.ones(3), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, math.exp(-1)]))
    assert not weights.requires_grad


# ---- values, averages


def test_the_value_loss_is_the_worse_of_the_plain_and_the_clipped_one():
    values, old, returns = draw(50).requires_grad_(), draw(50, seed=1), draw(50, seed=2)
    clipped = old + (values - old).clamp(-0.2, 0.2)
    expected = 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    torch.testing.assert_close(value_loss(values, old, returns, torch.ones(50)), expected)
    torch.testing.assert_close(value_loss(values, old, returns, torch.ones(50), None), 0.5 * (values - returns) ** 2)


def test_token_sequence_and_constant_averages():
    lengths = torch.tensor([4, 1, 0])
    mask = torch.arange(4) < lengths[:, None]
    rows = torch.arange(3)[:, None].expand(3, 4)
    loss = draw(3, 4)
    expected = {
        "token": loss[mask].mean(),
        "sequence": (loss[0].mean() + loss[1, 0]) / 2,
        "constant": loss[mask].sum() / (3 * 10),
    }
    for aggregation, value in expected.items():
        weights, denominator = token_weights(mask, rows, 3, aggregation, max_length=10)
        torch.testing.assert_close((weights * loss).sum() / denominator, value)
        assert not weights[~mask].any()


def test_averages_do_not_depend_on_how_the_batch_is_cut():
    mask = torch.arange(8) < torch.tensor([[8], [2], [5], [1]])
    rows = torch.arange(4)[:, None].expand(4, 8)
    loss = draw(4, 8)
    for aggregation in ("token", "sequence", "constant"):
        whole = token_weights(mask, rows, 4, aggregation, 8)
        parts = [token_weights(mask[i : i + 1], rows[:1], 1, aggregation, 8) for i in range(4)]
        total = sum((w * loss[i : i + 1]).sum() for i, (w, _) in enumerate(parts)) / sum(d for _, d in parts)
        torch.testing.assert_close(total, (whole[0] * loss).sum() / whole[1])


def test_means_over_nothing_are_zero_and_equal_values_whiten_to_zero():
    assert masked_mean(torch.tensor([float("nan")]), torch.tensor([0])) == 0
    assert torch.equal(masked_whiten(torch.full((5,), 0.1), torch.tensor([1, 1, 1, 1, 0])), torch.zeros(5))
    white = masked_whiten(draw(1000), torch.ones(1000))
    assert white.mean().abs() < 1e-12
    assert white.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    sums = sequence_sum(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 0, 1]), torch.tensor([2, 9, 0]), 3)
    assert sums.tolist() == [4.0, 0.0, 1.0]


def test_temperature_scales_log_probs_and_entropy_alike():
    logits, ids = draw(6, 9), torch.arange(6)
    scaled = torch.log_softmax(logits / 0.7, -1)
    torch.testing.assert_close(token_log_probs(logits, ids, 0.7), scaled[torch.arange(6), ids])
    torch.testing.assert_close(entropy(logits, 0.7), -(scaled.exp() * scaled).sum(-1))
    rough = token_log_probs(logits.bfloat16(), ids)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, token_log_probs(logits.bfloat16().double(), ids).float(), rtol=0, atol=1e-5)


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_critic():
    returns, mask = draw(100), torch.ones(100)
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((100,), 3.0, dtype=F64), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones(100), mask))


def test_overlong_answers_are_punished_gradually():
    penalty = overlong_penalty(torch.tensor([10, 80, 90, 100, 500]), max_length=100, buffer=20)
    torch.testing.assert_close(penalty, torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0]))
