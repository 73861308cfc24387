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
from dataclasses import dataclass, field

import numpy as np
import torch

NUCLEUS_CANDIDATES = 256  # a nucleus is looked for among so many best tokens before the whole vocabulary is sorted


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is sampled and when it ends.

    Args:
        max_new_tokens: Most tokens to add.
        temperature: Logits are divided by it; 0 takes the most probable token (greedy).
        top_k: Keep the k most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens until their probabilities reach this sum (nucleus, arXiv:1904.09751).
        min_p: Keep tokens at least this fraction as probable as the most probable one (arXiv:2407.01082).
        repetition_penalty: Logits of tokens that already occurred are divided (if > 0) or multiplied (if < 0) by it
            (CTRL, arXiv:1909.05858); 1 does nothing.
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
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature < math.inf, "0 (greedy) or greater"),
            ("top_k", self.top_k >= 0, "0 (off) or greater"),
            ("top_p", 0.0 < self.top_p <= 1.0, "greater than 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("repetition_penalty", 0.0 < self.repetition_penalty < math.inf, "greater than 0"),
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
        top_k: int64 [B, 1], V where off.
        top_p: float32 [B, 1], 1 where off.
        log_min_p: float32 [B, 1], -inf where off.
        repetition_penalty: float32 [B, 1].
    """

    temperature: torch.Tensor
    greedy: torch.Tensor
    all_greedy: bool
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
        return cls(
            temperature=torch.tensor([[p.temperature or 1.0] for p in rows], dtype=torch.float32, device=device),
            greedy=torch.tensor(greedy, device=device),
            all_greedy=all(greedy),
            max_top_k=max((k for k in top_k if k < vocab_size), default=0),
            top_k=column(top_k, torch.int64, vocab_size),
            top_p=column([p.top_p for p in rows], torch.float32, 1.0),
            log_min_p=column(log_min_p, torch.float32, -math.inf),
            repetition_penalty=column([p.repetition_penalty for p in rows], torch.float32, 1.0),
        )

    def rows(self, keep: torch.Tensor) -> SamplingTensors:
        """The same for the rows with these indices (int64 [n])."""

        def pick(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[keep]

        return SamplingTensors(
            temperature=self.temperature[keep],
            greedy=self.greedy[keep],
            all_greedy=self.all_greedy,
            max_top_k=self.max_top_k,
            top_k=pick(self.top_k),
            top_p=pick(self.top_p),
            log_min_p=pick(self.log_min_p),
            repetition_penalty=pick(self.repetition_penalty),
        )


def penalize_repetition(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty_B1: torch.Tensor) -> torch.Tensor:
    """Makes tokens that occurred (`seen_BV`, bool) less probable where the penalty is above 1."""
    penalized = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, penalized, logits_BV)


def filter_logits(logits_BV: torch.Tensor, params: SamplingTensors) -> torch.Tensor:
    """Sets the logits outside top-k, then top-p of what is left, then min-p, to -inf.

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
    """The smallest logit of each row's nucleus [B, 1]; -inf where top_p is 1."""
    log_total_B1 = logits_BV.logsumexp(1, keepdim=True)
    best_BK = torch.topk(logits_BV, min(logits_BV.shape[1], NUCLEUS_CANDIDATES)).values  # sorted, greatest first
    threshold_B1, found_B1 = _last_of_nucleus(best_BK, log_total_B1, top_p_B1)
    off_B1 = top_p_B1 >= 1.0
    rest = (~(found_B1 | off_B1)).nonzero()[:, 0]
    if len(rest):
        sorted_BV = logits_BV[rest].sort(1, descending=True).values
        threshold_B1[rest] = _last_of_nucleus(sorted_BV, log_total_B1[rest], top_p_B1[rest])[0]
    return torch.where(off_B1, -math.inf, threshold_B1)


def _last_of_nucleus(
    best_BK: torch.Tensor, log_total_B1: torch.Tensor, top_p_B1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first of the sorted logits at which the cumulative probability reaches top_p, and whether it does [B, 1].

    Where it does not, the last logit: by rounding even the whole vocabulary may miss a top_p close to 1.
    """
    reached_BK = (best_BK - log_total_B1).exp().cumsum(1, dtype=torch.float64) >= top_p_B1
    last_B1 = (~reached_BK).sum(1, keepdim=True).clamp(max=best_BK.shape[1] - 1)
    return best_BK.gather(1, last_B1), reached_BK[:, -1:]


def draw(logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """Samples one token a row from softmax(logits) by inverting the cumulative distribution.

    Args:
        logits_BV: float32; -inf is never drawn.
        uniforms_B: float64 in [0, 1), one a row.

    Returns:
        int64 [B].
    """
    cumulative = logits_BV.softmax(1).cumsum(1, dtype=torch.float64)
    target = uniforms_B[:, None] * cumulative[:, -1:]
    # right=True: the first token whose cumulative sum lies above the target, so one of probability 0 is never met
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


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

    Args:
        logits_BV: of the model, any float dtype.
        params: the rows' settings.
        uniforms_B: float64 [B] in [0, 1); None is enough when all rows are greedy.
        seen_BV: bool, which tokens occurred in each row; needed when a row has a repetition penalty.
        bias_BV: float32, added to the logits behind the penalty.
        log_probs: also return the log-probabilities.
    """
    logits_BV = logits_BV.float()
    tempered = logits_BV if params.all_greedy else logits_BV / params.temperature
    chosen_from = logits_BV
    if params.repetition_penalty is not None:
        assert seen_BV is not None
        chosen_from = penalize_repetition(logits_BV, seen_BV, params.repetition_penalty)
    if bias_BV is not None:
        chosen_from = chosen_from + bias_BV
    filtered = None
    if params.all_greedy:
        ids = chosen_from.argmax(1)
    else:
        assert uniforms_B is not None
        same = chosen_from is logits_BV
        filtered = filter_logits(tempered if same else chosen_from / params.temperature, params)
        ids = torch.where(params.greedy, chosen_from.argmax(1), draw(filtered, uniforms_B))
    if not log_probs:
        return Draw(ids)
    behaviour = torch.zeros(len(ids), device=ids.device)
    if filtered is not None:
        behaviour = torch.where(params.greedy, 0.0, _log_prob(filtered, ids))
    return Draw(ids, _log_prob(tempered, ids), behaviour)


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
