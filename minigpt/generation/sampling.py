"""From logits to the next token: temperature, top-k, top-p, min-p, repetition penalty; every row with its own settings.

Every filter is a threshold on the logits: a token stays when its logit is at least the row's threshold. So the kept set
depends on the row alone (ties at the threshold all stay), never on how another row in the batch is filtered or on the
order in which a sort returned equal values. The draw walks the kept tokens in the order of their ids (inverse CDF),
with one uniform number from the sequence's own counter-based stream.

Shapes: B rows, V vocabulary. All arithmetic in float32, sums of probabilities in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

NUCLEUS_CANDIDATES = 64  # a nucleus is looked for among so many best tokens before the whole vocabulary is sorted
SPARE = 14  # tokens looked at behind the last one that counts, which may be equal to it
LEAST_TEMPERATURE = 1e-5
PENALTIES = (0.01, 100.0)  # what lies far outside is 0 or infinite as a float32
MOST_CANDIDATES = 256  # a top-k up to this is sampled from a sorted list of so many tokens
COLUMN = 8  # tokens of which the best is looked for first
BLOCK = 64  # tokens whose probabilities are summed up before one of them is chosen


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled and when it ends.

    Args:
        max_new_tokens: Most tokens to add.
        temperature: Logits are divided by it; 0 takes the most probable token (greedy), and so does what is so small
            that the quotients would overflow.
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens until their probabilities reach this sum (nucleus, arXiv:1904.09751).
        min_p: Keep tokens at least this fraction as probable as the most probable one (arXiv:2407.01082).
        repetition_penalty: Logits of tokens that already occurred are divided (if > 0) or multiplied (if < 0) by it
            (CTRL, arXiv:1909.05858); 1 does nothing. From 0.01 to 100.
        stop_token_ids: A sequence ends with the first of these.
        stop: A sequence ends when its text contains one of these strings, which are cut off the text.
        seed: Of the random streams. Sequence i draws from stream (seed, i).
        logit_bias: Token ids and what is added to their logits, before the temperature.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = field(default=())
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if 0 < self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        low, high = PENALTIES
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < math.inf, "0 (greedy) or greater"),
            ("top_k", self.top_k >= 0, "0 (off) or greater"),
            ("top_p", 0.0 < self.top_p <= 1.0, "greater than 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", low <= self.repetition_penalty <= high, f"between {low:g} and {high:g}"),
            ("seed", 0 <= self.seed < 2**64, "between 0 and 2^64 - 1"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "finite numbers"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give {wanted}")


@dataclass
class SamplingTensors:
    """The parameters of B rows as tensors on the device; a filter that no row uses is None and costs nothing.

    Attributes:
        temperature: float32 [B, 1], 1 where a row is greedy.
        greedy: bool [B].
        all_greedy, any_greedy: Of the rows.
        limit: int64 [B, 1], so many best tokens show all that a row can draw: its top-k where that is small, or the
            NUCLEUS_CANDIDATES among which a nucleus is looked for; 0 where the whole vocabulary is needed.
        max_limit: The greatest of them.
        max_top_k: The greatest top-k.
        top_k: int64 [B, 1], V where off.
        top_p: float64 [B, 1], 1 where off.
        log_min_p: float32 [B, 1], -inf where off.
        repetition_penalty: float32 [B, 1].
    """

    temperature: torch.Tensor
    greedy: torch.Tensor
    all_greedy: bool
    any_greedy: bool
    limit: torch.Tensor
    max_limit: int
    max_top_k: int
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    log_min_p: torch.Tensor | None
    repetition_penalty: torch.Tensor | None

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], vocab_size: int, device: torch.device | str) -> SamplingTensors:
        """Stacks the rows' parameters."""

        def column(values: list, dtype: torch.dtype, off: float) -> torch.Tensor | None:
            if all(value == off for value in values):
                return None
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        top_k = [min(p.top_k, vocab_size) or vocab_size for p in rows]
        log_min_p = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in rows]
        greedy = [p.temperature == 0 for p in rows]
        limits = [candidates_of(p, k, vocab_size) for p, k in zip(rows, top_k, strict=True)]
        return cls(
            temperature=torch.tensor([[p.temperature or 1.0] for p in rows], dtype=torch.float32, device=device),
            greedy=torch.tensor(greedy, device=device),
            all_greedy=all(greedy),
            any_greedy=any(greedy),
            limit=torch.tensor(limits, device=device)[:, None],
            max_limit=max(limits),
            max_top_k=max((k for k in top_k if k < vocab_size), default=0),
            top_k=column(top_k, torch.int64, vocab_size),
            top_p=column([p.top_p for p in rows], torch.float64, 1.0),
            log_min_p=column(log_min_p, torch.float32, -math.inf),
            repetition_penalty=column([p.repetition_penalty for p in rows], torch.float32, 1.0),
        )

    def rows(self, keep: torch.Tensor) -> SamplingTensors:
        """The same for the rows with these indices (int64 [n])."""
        picked: dict[str, Any] = {n: value[keep] for n, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **picked)


def candidates_of(params: SamplingParams, top_k: int, vocab_size: int) -> int:
    if params.temperature == 0:
        return 0
    if top_k < vocab_size:
        return top_k if top_k <= MOST_CANDIDATES else 0
    return min(NUCLEUS_CANDIDATES, vocab_size) if params.top_p < 1.0 else 0


def penalize_repetition(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty_B1: torch.Tensor) -> torch.Tensor:
    """Makes tokens that occurred (`seen_BV`, bool) less probable where the penalty is above 1."""
    penalized = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, penalized, logits_BV)


def adjust(
    logits_BV: torch.Tensor, params: SamplingTensors, seen_BV: torch.Tensor | None, bias_BV: torch.Tensor | None
) -> torch.Tensor:
    """The logits behind repetition penalty and bias; the very same tensor where no row has either."""
    if params.repetition_penalty is not None:
        assert seen_BV is not None
        logits_BV = penalize_repetition(logits_BV, seen_BV, params.repetition_penalty)
    return logits_BV if bias_BV is None else logits_BV + bias_BV


def filter_logits(logits_BV: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """Sets the logits outside top-k, then top-p of what is left, then min-p, to -inf; equals at a border all stay.

    Args:
        logits_BV: float32, already divided by the temperature.
        params: the rows' settings.
    """
    if params.top_k is not None:
        best = torch.topk(logits_BV, params.max_top_k).values
        kth = best.gather(1, (params.top_k - 1).clamp(max=params.max_top_k - 1))
        off = params.top_k > params.max_top_k  # rows without a top-k in a batch that has one
        logits_BV = logits_BV.masked_fill((logits_BV < kth) & ~off, -math.inf)
    if params.top_p is not None:
        logits_BV = logits_BV.masked_fill(logits_BV < _nucleus_threshold(logits_BV, params.top_p), -math.inf)
    if params.log_min_p is not None:
        least = logits_BV.max(dim=1, keepdim=True).values + params.log_min_p
        logits_BV = logits_BV.masked_fill(logits_BV < least, -math.inf)
    return logits_BV


def _nucleus_threshold(logits_BV: torch.Tensor, top_p_B1: torch.Tensor) -> torch.Tensor:
    """The smallest logit of each row's nucleus [B, 1]; -inf where top_p is 1.

    By rounding even the whole vocabulary may miss a top_p close to 1: then it is the smallest logit of all.
    """
    sorted_BV = logits_BV.sort(1, descending=True).values
    reached_BV = sorted_BV.softmax(1).cumsum(1, dtype=torch.float64) >= top_p_B1
    last_B1 = (~reached_BV).sum(1, keepdim=True).clamp(max=sorted_BV.shape[1] - 1)
    return torch.where(top_p_B1 >= 1.0, -math.inf, sorted_BV.gather(1, last_B1))


def draw(logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Samples one token a row from softmax(logits) by inverting the cumulative distribution.

    First the block of tokens into which the number falls, then the token in it, so that nothing runs one by one through
    the vocabulary.

    Args:
        logits_BV: float32; -inf is never drawn.
        uniforms_B: float64 in [0, 1), one a row.

    Returns:
        int64 [B].
    """
    weights_BV = (logits_BV - logits_BV.amax(1, keepdim=True)).exp_()
    weights_BKW = F.pad(weights_BV, (0, -weights_BV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    block_B1, rest_B = _invert(weights_BKW.sum(2), uniforms_B)
    inside_BW = weights_BKW.gather(1, block_B1[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    token_B1, _ = _invert(inside_BW, rest_B)
    return (block_B1 * BLOCK + token_B1)[:, 0]


def _invert(lengths_BK: torch.Tensor, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of K pieces, laid end to end, a number in [0, 1) falls into [B, 1], and where in it, in [0, 1) [B]."""
    ends_BK = lengths_BK.cumsum(1, dtype=torch.float64)
    target_B1 = uniforms_B[:, None] * ends_BK[:, -1:]
    # right=True: the first piece that ends above the target, so one of length 0 is never met
    piece_B1 = torch.searchsorted(ends_BK, target_B1, right=True).clamp(max=ends_BK.shape[1] - 1)
    length_B1 = lengths_BK.gather(1, piece_B1).double()
    start_B1 = ends_BK.gather(1, piece_B1) - length_B1
    return piece_B1, ((target_B1 - start_B1) / length_B1).clamp(0.0, 1 - 2.0**-32)[:, 0]


def _best(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest logits of each row, sorted, and their tokens: [B, count] each.

    On a CPU NumPy selects, whose vectorised quickselect takes a third of the time of `torch.topk` (measured on logits
    that change: on the same ones again and again the branch predictor has learnt them). A token is among the `count`
    best only if the maximum of its column is (or an equal one is): with columns of a few tokens that lie far apart, the
    maxima cost one pass and leave a tenth of the vocabulary to select from.
    """
    B, V = logits_BV.shape
    if logits_BV.device.type != "cpu":
        best = logits_BV.topk(count)
        return best.values, best.indices
    width = V // COLUMN
    if V % COLUMN or width < 2 * count:
        tokens = _greatest(logits_BV, count)
        values = logits_BV.gather(1, tokens)
    else:
        columns_BK = _greatest(logits_BV.view(B, COLUMN, width).amax(1), count)
        tokens = (columns_BK[:, :, None] + torch.arange(0, V, width)).flatten(1)
        values = logits_BV.gather(1, tokens)
        chosen = _greatest(values, count)
        values, tokens = values.gather(1, chosen), tokens.gather(1, chosen)
    order = torch.from_numpy(np.argsort(-values.numpy(), axis=1))
    return values.gather(1, order), tokens.gather(1, order)


def _greatest(x_BN: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` greatest numbers of each row are, in any order: int64 [B, count]."""
    first = x_BN.shape[1] - count
    return torch.from_numpy(np.argpartition(x_BN.detach().numpy(), first, axis=1)[:, first:] if first else _all(x_BN))


def _all(x_BN: torch.Tensor) -> np.ndarray:
    return np.broadcast_to(np.arange(x_BN.shape[1]), x_BN.shape).copy()


def _draw_from_best(
    logits_BV: torch.Tensor, params: SamplingTensors, uniforms_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples among the best tokens: what the filters leave is a beginning of their sorted list.

    Whether a row can be decided so depends on the row alone, and its sums run one by one from the best token down; so
    how its token is found never depends on its batch mates.

    Args:
        logits_BV: float32, not yet divided by the temperature.
        params: the rows' settings.
        uniforms_B: float64 in [0, 1).

    Returns:
        ids [B], their log-probabilities float32 [B], and for which rows they mean something [B].
    """
    V, limit_B1 = logits_BV.shape[1], params.limit.clamp(min=1)
    best_BK, tokens_BK = _ordered(*_best(logits_BV, min(params.max_limit + SPARE, V)))
    best_BK = best_BK / params.temperature
    weights_BK = (best_BK - best_BK[:, :1]).double().exp_()
    ends_BK = weights_BK.cumsum(1)
    least_B1 = best_BK.gather(1, limit_B1 - 1)
    counted_B1 = _count_from(best_BK, least_B1)
    # more equals of the last one of a top-k may not have been looked at
    decided_B1 = (counted_B1 < limit_B1 + SPARE) | (limit_B1 + SPARE >= V)
    if params.top_p is not None:
        total_B1 = ends_BK.gather(1, counted_B1 - 1)
        nucleus_B1 = params.limit > 0 if params.top_k is None else (params.limit > 0) & (params.top_k == V)
        if bool(nucleus_B1.any()):
            whole_B1 = (logits_BV / params.temperature - best_BK[:, :1]).exp_().sum(1, keepdim=True)
            total_B1 = torch.where(nucleus_B1, whole_B1.double(), total_B1)
        # a token stays while the mass before it has not reached top_p
        inside_BK = (ends_BK - weights_BK < params.top_p * total_B1) | (params.top_p >= 1.0)
        least_B1 = torch.maximum(least_B1, best_BK.gather(1, inside_BK.sum(1, keepdim=True) - 1))
    if params.log_min_p is not None:
        least_B1 = torch.maximum(least_B1, best_BK[:, :1] + params.log_min_p)
    kept_B1 = _count_from(best_BK, least_B1)
    if params.top_p is not None:  # the nucleus may go on behind the tokens that were looked at
        decided_B1 = torch.where(nucleus_B1, (kept_B1 < limit_B1) | (limit_B1 == V), decided_B1)
    decided_B1 = decided_B1 & (params.limit > 0)
    last_B1 = kept_B1 - 1
    total_B1 = ends_BK.gather(1, last_B1)
    place_B1 = torch.minimum((ends_BK <= uniforms_B[:, None] * total_B1).sum(1, keepdim=True), last_B1)
    log_probs_B1 = (weights_BK.gather(1, place_B1) / total_B1).log().float()
    return tokens_BK.gather(1, place_B1)[:, 0], log_probs_B1[:, 0], decided_B1[:, 0]


def _ordered(best_BK: torch.Tensor, tokens_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted by value, and equals by token: their order must not depend on how many tokens were looked at."""
    if not bool((best_BK[:, 1:] == best_BK[:, :-1]).any()):
        return best_BK, tokens_BK
    tokens_BK, order = tokens_BK.sort(1)
    best_BK, by_value = best_BK.gather(1, order).sort(dim=1, descending=True, stable=True)
    return best_BK, tokens_BK.gather(1, by_value)


def _count_from(best_BK: torch.Tensor, least_B1: torch.Tensor) -> torch.Tensor:
    """How many of the sorted values are not below `least_B1`, [B, 1]."""
    return (best_BK >= least_B1).sum(1, keepdim=True)


@dataclass
class Draw:
    """What one step sampled.

    Attributes:
        ids: int64 [B].
        log_probs: float32 [B] or None: of the full vocabulary at the row's temperature (at 1 where greedy), before
            penalties and filters: what a policy's own forward pass gives.
        behaviour_log_probs: float32 [B] or None: of the distribution that was really drawn from (0 where greedy).
    """

    ids: torch.Tensor
    log_probs: torch.Tensor | None = None
    behaviour_log_probs: torch.Tensor | None = None


def sample(
    logits_BV: torch.Tensor,
    params: SamplingTensors,
    uniforms_B: torch.Tensor | None,
    seen_BV: torch.Tensor | None = None,
    bias_BV: torch.Tensor | None = None,
    *,
    log_probs: bool = False,
) -> Draw:
    """Samples the next token of every row.

    A network that has diverged gets a token as well: a logit that is NaN counts as -inf, and a row whose greatest one
    is infinite (at its temperature) draws token 0, with NaN as its log-probabilities.

    Args:
        logits_BV: of the model, any float dtype.
        params: the rows' settings.
        uniforms_B: float64 [B] in [0, 1); None is enough when all rows are greedy.
        seen_BV: bool, which tokens occurred in each row; needed when a row has a repetition penalty.
        bias_BV: float32, added to the logits behind the penalty.
        log_probs: also return the log-probabilities.
    """
    logits_BV = torch.nan_to_num(logits_BV.float(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    chosen_from = adjust(logits_BV, params, seen_BV, bias_BV)
    lost_B1 = ~(chosen_from.amax(1, keepdim=True) / params.temperature).isfinite()
    chosen_from, lost_B = chosen_from.masked_fill(lost_B1, 0.0), lost_B1[:, 0]
    if params.all_greedy:
        ids, behaviour = chosen_from.argmax(1), torch.zeros(len(logits_BV), device=logits_BV.device)
    else:
        assert uniforms_B is not None
        ids, behaviour = _draw_filtered(chosen_from, params, uniforms_B, log_probs)
        if params.any_greedy:
            ids = torch.where(params.greedy, chosen_from.argmax(1), ids)
            behaviour = behaviour.masked_fill(params.greedy, 0.0)
    ids = ids.masked_fill(lost_B, 0)
    if not log_probs:
        return Draw(ids)
    tempered = logits_BV if params.all_greedy else logits_BV / params.temperature
    return Draw(ids, *(x.masked_fill(lost_B, math.nan) for x in (_log_prob(tempered, ids), behaviour)))


def _draw_filtered(
    logits_BV: torch.Tensor, params: SamplingTensors, uniforms_B: torch.Tensor, log_probs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and (if asked for) their log-probabilities under what they were drawn from; noise in greedy rows."""
    if not params.max_limit:
        return _draw_from_all(logits_BV, params, uniforms_B, log_probs)
    ids, behaviour, decided_B = _draw_from_best(logits_BV, params, uniforms_B)
    rest = (~(decided_B | params.greedy)).nonzero()[:, 0]
    if len(rest) == 1:
        rest = rest.repeat(2)  # a sum with a single result is cut among the threads and would round otherwise
    if len(rest):
        ids[rest], behaviour[rest] = _draw_from_all(logits_BV[rest], params.rows(rest), uniforms_B[rest], log_probs)
    return ids, behaviour


def _draw_from_all(
    logits_BV: torch.Tensor, params: SamplingTensors, uniforms_B: torch.Tensor, log_probs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    filtered = filter_logits(logits_BV / params.temperature, params)
    ids = draw(filtered, uniforms_B)
    return ids, _log_prob(filtered, ids) if log_probs else torch.zeros(len(ids), device=ids.device)


def _log_prob(logits_BV: torch.Tensor, ids_B: torch.Tensor) -> torch.Tensor:
    return logits_BV.gather(1, ids_B[:, None])[:, 0] - logits_BV.logsumexp(1)


def uniforms(seed: int, sequence: int, start: int, count: int) -> np.ndarray:
    """Random numbers `start` .. `start + count - 1` of stream (seed, sequence): float64 in [0, 1), multiples of 2^-32.

    Philox (Salmon et al., SC 2011) turns a counter into random bits, so a number depends on (seed, sequence, position)
    and on nothing that was drawn before: not on batch mates, and a sequence that is taken up again half-way goes on as
    if it had never stopped.
    """
    bits = np.random.Philox(key=seed | sequence << 64, counter=start // 4).random_raw(start % 4 + count)
    # 32 bits: the greatest is so far below 1 that its product with a total of about 1 cannot round up to the total
    return (bits[start % 4 :] >> np.uint64(32)) * 2.0**-32
