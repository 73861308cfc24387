"""How probable a model finds continuations of a text: what multiple choice is decided by.

The tokens of a batch form a tree of three levels, and each level is computed once: what all contexts begin with (the
solved examples), the rest of each context, and its continuations. So four choices behind a long context cost little
more than one.

Shapes: Q contexts of a batch, R different continuations of them, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from minigpt.model.kv_cache import KVCache
    from minigpt.model.model_minigpt import MiniGPT

CACHE_TOKENS = {"cpu": 16_384, "cuda": 262_144}  # tokens whose keys and values a batch may hold


@dataclass(frozen=True)
class Likelihoods:
    """What a model thinks of the continuations of each context.

    Attributes:
        log_probs: Of each context, of each continuation: Σ log p(token | all before it), in nats.
        truncated: Contexts whose beginning was cut off because they did not fit into the model's context.
    """

    log_probs: list[list[float]]
    truncated: int


@torch.no_grad()
def continuation_log_probs(
    model: MiniGPT,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    progress: Callable[[int], None] | None = None,
) -> Likelihoods:
    """Log-probabilities of several continuations of each context.

    Args:
        model: In any mode; restored afterwards.
        contexts: Token ids, at least one each.
        continuations: Of each context, lists of token ids, at least one id each.
        progress: Called with the number of contexts that are done.
    """
    assert all(contexts)
    assert all(ids for several in continuations for ids in several)
    room = [model.config.max_position_embeddings - max(map(len, several)) + 1 for several in continuations]
    cut = [list(context)[-max(1, n) :] for context, n in zip(contexts, room, strict=True)]
    truncated = sum(len(short) < len(full) for short, full in zip(cut, contexts, strict=True))
    by_length = sorted(range(len(cut)), key=lambda i: len(cut[i]))  # neighbours pad each other least
    budget = CACHE_TOKENS[model.model.embed_tokens.weight.device.type]
    results: dict[int, list[float]] = {}
    was_training = model.training
    model.eval()
    try:
        while len(results) < len(cut):
            chosen: list[int] = []
            rows = 0
            for i in by_length[len(results) :]:
                length = len(cut[i]) + max(map(len, continuations[i]))
                rows += len({tuple(ids[:-1]) for ids in continuations[i]})
                if chosen and rows * length > budget:
                    break
                chosen.append(i)
            scores = _score_batch(model, [cut[i] for i in chosen], [continuations[i] for i in chosen])
            results |= zip(chosen, scores, strict=True)
            if progress is not None:
                progress(len(results))
    finally:
        model.train(was_training)
    return Likelihoods([results[i] for i in range(len(cut))], truncated)


def _score_batch(
    model: MiniGPT, contexts: list[list[int]], continuations: list[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The last token of a context is left to the third level, since it predicts the first token behind it."""
    device = model.model.embed_tokens.weight.device
    bodies = [context[:-1] for context in contexts]
    shared = _common_prefix(bodies)
    # Continuations that differ in their last token only, such as A, B, C and D, are read once.
    inputs: dict[tuple[int, tuple[int, ...]], int] = {}
    for q, several in enumerate(continuations):
        for ids in several:
            inputs.setdefault((q, (contexts[q][-1], *ids[:-1])), len(inputs))
    owners_R = torch.tensor([q for q, _ in inputs], device=device)
    length = max(map(len, bodies)) + max(len(ids) for _, ids in inputs)

    cache = _read_contexts(model, bodies, shared, length).rows(owners_R)
    ids_RT = _padded([ids for _, ids in inputs]).to(device)
    starts_R = torch.tensor([len(bodies[q]) for q, _ in inputs], device=device)
    positions_RT = starts_R[:, None] + torch.arange(ids_RT.shape[1], device=device)
    hidden_RTE = _transformer(model, ids_RT, positions_RT, cache)

    rows: list[int] = []
    places: list[int] = []
    labels: list[int] = []
    for q, several in enumerate(continuations):
        for ids in several:
            rows += [inputs[q, (contexts[q][-1], *ids[:-1])]] * len(ids)
            places += range(len(ids))
            labels += ids
    chosen_1NE = hidden_RTE[rows, places][None]
    scored = model.lm_head(chosen_1NE, torch.tensor([labels], device=device), reduction="none")
    log_probs = scored.log_probs[0].double()
    sums = iter(piece.sum().item() for piece in log_probs.split([len(ids) for s in continuations for ids in s]))
    return [[next(sums) for _ in several] for several in continuations]


def _read_contexts(model: MiniGPT, bodies: list[list[int]], shared: int, length: int) -> KVCache:
    """A cache of `length` tokens with the contexts in it: their common beginning is read once."""
    from minigpt.model.kv_cache import KVCache

    embedding = model.model.embed_tokens.weight

    def new_cache(rows: int) -> KVCache:
        return KVCache(model.config, rows, length, embedding.dtype, embedding.device)

    cache = new_cache(1)
    if shared:
        ids_1T = torch.tensor([bodies[0][:shared]], device=embedding.device)
        _transformer(model, ids_1T, torch.arange(shared, device=embedding.device)[None], cache)
    cache = cache.rows(torch.zeros(len(bodies), dtype=torch.int64, device=embedding.device))
    rests_QT = _padded([body[shared:] for body in bodies]).to(embedding.device)
    if rests_QT.shape[1]:
        positions_T = torch.arange(shared, shared + rests_QT.shape[1], device=embedding.device)
        _transformer(model, rests_QT, positions_T.expand_as(rests_QT), cache)
    return cache


def _transformer(model: MiniGPT, ids_BT: torch.Tensor, positions_BT: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Final hidden states of new tokens behind what the cache holds."""
    from minigpt.model.attention import cached_pattern

    return model.model(ids_BT, positions_BT, cached_pattern(positions_BT, cache.max_length), cache)


def _common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many first ids all rows share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def _padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """int64 [rows, longest], filled with 0 on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
