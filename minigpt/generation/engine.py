"""Batched generation with a KV cache: `generate` for batches, `stream` for one prompt, `generate_ids` for tensors.

Prompts of different lengths go into one batch without left padding: row b's token at position p lies at index p of its
cache, the prefill is padded on the right, and what a padded position wrote is overwritten when the row grows to it. The
cache starts small and doubles, so a step costs what the text is long, not what the context could hold. Rows that ended
are taken out once half of the batch is done.

The random numbers of a sequence come from its own stream (seed, sequence, position), see `sampling.uniforms`: they are
the same alone, in any batch, and when a sequence is continued from its own beginning.

Shapes: B rows of the batch, V vocabulary, N new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minigpt.generation.sampling import SamplingParams, SamplingTensors, sample, uniforms
from minigpt.generation.text import Decode, StopStrings, TextStream
from minigpt.model.attention import AttentionPattern
from minigpt.model.kv_cache import KVCache

if TYPE_CHECKING:
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

CACHE_BUCKET = 128  # the cache holds this many tokens times a power of two
PREFILL_TOKENS = 8192  # most (padded) prompt tokens in one forward pass
UNIFORMS_BLOCK = 64  # random numbers are made for so many steps at once
END_IDS = (2, 0)  # <|im_end|> and <|endoftext|> of MiniGPT's own tokenizer

OnToken = Callable[[int, int], None]


@dataclass
class Completion:
    """What was generated for one prompt.

    Attributes:
        ids: The new tokens, including the stop token that ended them.
        finish_reason: "stop" (a stop token or stop string) or "length" (max_new_tokens or the context is used up).
        text: The new text without stop token and stop string; None without a `decode` function.
        log_probs: Of each id: full vocabulary, at the temperature, before penalties and filters; None if not asked for.
        behaviour_log_probs: Of each id under the distribution that it was drawn from; None if not asked for.
    """

    ids: list[int]
    finish_reason: str
    text: str | None = None
    log_probs: list[float] | None = None
    behaviour_log_probs: list[float] | None = None


def generate(
    model: MiniGPT,
    prompts: Sequence[Sequence[int]] | torch.Tensor,
    params: SamplingParams | Sequence[SamplingParams],
    *,
    decode: Decode | None = None,
    on_token: OnToken | None = None,
    log_probs: bool = False,
    sequence_ids: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[Completion]:
    """Continues every prompt.

    Args:
        model: In training or evaluation mode (restored afterwards).
        prompts: Token ids, of any lengths; or int64 [B, T].
        params: For all prompts, or one each.
        decode: ids → text; needed for stop strings, and fills `Completion.text`.
        on_token: Called as `on_token(prompt index, token id)` for every new token, in the order of its sequence.
        log_probs: Record log-probabilities.
        sequence_ids: Numbers of the random streams; by default the index in `prompts`.
        batch_size: Sequences decoded together.

    Returns:
        One completion a prompt, in the order of the prompts.

    Raises:
        ValueError: for an empty or too long prompt, ids outside the vocabulary, or stop strings without `decode`.
    """
    checked = _checked_prompts(prompts, model.config)
    rows = [params] * len(checked) if isinstance(params, SamplingParams) else list(params)
    streams = list(range(len(checked))) if sequence_ids is None else list(sequence_ids)
    if len(rows) != len(checked) or len(streams) != len(checked):
        raise ValueError(
            f"{len(checked)} prompts but {len(rows)} params and {len(streams)} sequence ids; give one each"
        )
    if decode is None and any(p.stop for p in rows):
        raise ValueError(
            "stop strings are given without a decode function; pass decode= (for example ChatEncoder.decode)"
        )
    completions: dict[int, Completion] = {}
    by_length = sorted(range(len(checked)), key=lambda i: len(checked[i]))  # neighbours pad each other least
    with _evaluating(model):
        for first in range(0, len(by_length), batch_size):
            chosen = by_length[first : first + batch_size]
            batch = _Batch(
                model,
                [checked[i] for i in chosen],
                [rows[i] for i in chosen],
                [streams[i] for i in chosen],
                log_probs=log_probs,
            )
            completions |= zip(chosen, _run(batch, chosen, decode, on_token), strict=True)
    return [completions[i] for i in range(len(checked))]


def stream(model: MiniGPT, prompt_ids: Sequence[int], params: SamplingParams, *, sequence_id: int = 0) -> Iterator[int]:
    """Yields the new ids of one prompt as they come, a stop token included; closing the iterator stops the work.

    Stop strings are the business of whoever turns ids into text (`text.TextStream`, `text.StopStrings`).

    Raises:
        ValueError: for an empty or too long prompt or ids outside the vocabulary (at the first `next`).
    """
    prompts = _checked_prompts([prompt_ids], model.config)
    with _evaluating(model):
        batch = _Batch(model, prompts, [params], [sequence_id])
        batch.prefill()
        while True:
            batch.sample()
            yield int(batch.last_ids_B[0])
            if not any(batch.alive):
                return
            batch.forward()


def generate_ids(
    model: MiniGPT,
    input_ids: torch.Tensor,
    max_new_tokens: int = 128,
    *,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    attention_mask: torch.Tensor | None = None,
    seed: int = 0,
) -> torch.Tensor:
    """Continues a tensor of prompts: what `MiniGPT.generate` returns.

    Greedy as in transformers, unless `do_sample=True` or one of temperature (above 0), top_k, top_p and min_p is given.

    Args:
        model: In any mode; restored afterwards.
        input_ids: int64 [B, T].
        max_new_tokens: Most tokens to add; fewer when the context is used up.
        do_sample: True samples, False is greedy, None decides as said above.
        temperature: 1 when sampling and not given; 0 is greedy.
        top_k: 0 or None keeps all.
        top_p: None keeps all.
        min_p: None keeps all.
        repetition_penalty: 1 does nothing.
        eos_token_id: One or several ids that end a row; () never ends early; None takes the ids that the model was
            loaded with (`model.eos_token_ids`), otherwise those of MiniGPT's own tokenizer (<|im_end|>, <|endoftext|>).
        pad_token_id: Fills the rows that ended; by default the last of the ids that end a row.
        attention_mask: [B, T], 0 at padding, which may lie on either side.
        seed: Of the random streams; row i draws from stream (seed, i).

    Returns:
        int64 [B, T + N]: `input_ids` as given, then the new ids.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; give [batch, tokens]")
    if do_sample is None:
        do_sample = temperature != 0 and any(option is not None for option in (temperature, top_k, top_p, min_p))
    if eos_token_id is None:
        eos_token_id = stop_token_ids(model)
    eos = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=(1.0 if temperature is None else temperature) if do_sample else 0.0,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        min_p=min_p or 0.0,
        repetition_penalty=repetition_penalty,
        stop_token_ids=eos,
        seed=seed,
    )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    completions = generate(model, prompts, params)
    pad = pad_token_id if pad_token_id is not None else (eos[-1] if eos else 0)
    longest = max(len(c.ids) for c in completions)
    new = [c.ids + [pad] * (longest - len(c.ids)) for c in completions]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def stop_token_ids(model: MiniGPT) -> tuple[int, ...]:
    """The ids that end an answer of this model: those it was loaded with, or else those of MiniGPT's own tokenizer."""
    loaded: Any = getattr(model, "eos_token_ids", None)
    return tuple(loaded) if loaded else END_IDS


def _run(batch: _Batch, prompts: list[int], decode: Decode | None, on_token: OnToken | None) -> list[Completion]:
    """Decodes until every sequence has ended; `prompts` are the numbers that the callback knows them by."""
    watchers = {i: _StopWatcher(decode, p.stop) for i, p in enumerate(batch.params) if decode and p.stop}
    batch.prefill()
    while True:
        before = list(batch.alive)
        batch.sample()
        if watchers or on_token:
            for sequence, alive, token in zip(batch.sequence, before, batch.last_ids_B.tolist(), strict=True):
                if alive and on_token:
                    on_token(prompts[sequence], token)
                is_text = alive and token not in batch.params[sequence].stop_token_ids
                if is_text and sequence in watchers and watchers[sequence].push(token):
                    batch.finish([sequence], "stop")
        if not any(batch.alive):
            break
        batch.forward()
    completions = batch.completions()
    for i, completion in enumerate(completions):
        if i in watchers:
            completion.text = watchers[i].text()
        elif decode is not None:
            completion.text = decode(_without_stop_token(completion, batch.params[i]))
    return completions


class _StopWatcher:
    """The text of one row up to its first stop string."""

    def __init__(self, decode: Decode, stop: Sequence[str]) -> None:
        self._decoder, self._stop, self._parts = TextStream(decode), StopStrings(stop), [""]

    def push(self, token: int) -> bool:
        self._parts.append(self._stop.push(self._decoder.push(token)))
        return self._stop.found is not None

    def text(self) -> str:
        self._parts += [self._stop.push(self._decoder.flush()), self._stop.flush()]
        return "".join(self._parts)


class _Batch:
    """B sequences that are decoded together: `prefill`, then `sample` and `forward` in turn until no row is alive.

    Tensors and lists are per row of the current batch, which shrinks; `sequence` says which of the B sequences a row
    is. Results are stored per sequence.
    """

    def __init__(
        self,
        model: MiniGPT,
        prompts: list[list[int]],
        params: list[SamplingParams],
        sequence_ids: list[int],
        *,
        log_probs: bool = False,
    ) -> None:
        self.model, self.prompts, self.params, self.sequence_ids = model, prompts, params, sequence_ids
        self.device = model.model.embed_tokens.weight.device
        B, context = len(prompts), model.config.max_position_embeddings
        limits = [min(p.max_new_tokens, context - len(prompt)) for p, prompt in zip(params, prompts, strict=True)]
        self.step = 0  # new tokens so far

        self.sequence = list(range(B))
        self.alive = [True] * B
        self.alive_B = torch.ones(B, dtype=torch.bool, device=self.device)
        self.sequence_B = torch.arange(B, device=self.device)
        self.lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)  # tokens in the cache
        self.limits_B = torch.tensor(limits, device=self.device)
        self.stop_ids_BS = _padded([list(p.stop_token_ids) for p in params], fill=-1).to(self.device)
        self.sampling = SamplingTensors.of(params, model.config.vocab_size, self.device)
        self.seen_BV = self._seen_tokens() if self.sampling.repetition_penalty is not None else None
        self.uniforms_BK: torch.Tensor | None = None  # the random numbers of the next K steps
        self.cache: KVCache
        self.logits_BV: torch.Tensor  # of the next token
        self.last_ids_B: torch.Tensor  # sampled, not in the cache yet

        self.capacity = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        self.new_ids = torch.zeros(B, max(limits), dtype=torch.int64, device=self.device)
        self.log_probs = torch.zeros(2, B, max(limits), device=self.device) if log_probs else None
        self.counts = [0] * B
        self.finish_reasons = ["length"] * B

    @torch.no_grad()
    def prefill(self) -> None:
        """Reads the prompts into the cache and computes the logits of the first new tokens."""
        longest = max(len(prompt) for prompt in self.prompts)
        self.cache = self._new_cache(len(self.prompts), self._bucket(longest + 1))
        logits = []
        group_size = max(1, PREFILL_TOKENS // longest)
        for first in range(0, len(self.prompts), group_size):
            group = self.prompts[first : first + group_size]
            logits.append(self._prefill_group(group, slice(first, first + len(group))))
        self.logits_BV = torch.cat(logits)

    def _prefill_group(self, prompts: list[list[int]], rows: slice) -> torch.Tensor:
        """Fills the cache of some rows from a cache of exactly their length, where plain causal attention is enough."""
        ids_BT = _padded(prompts, fill=0).to(self.device)
        B, T = ids_BT.shape
        positions_BT = torch.arange(T, device=self.device).expand(B, T)
        cache = self._new_cache(B, T)
        pattern = AttentionPattern(self.model.attention_backend or "sdpa")
        hidden_BTE = self.model.model(ids_BT, positions_BT, pattern, cache)
        for stored, new in zip((*self.cache.k, *self.cache.v), (*cache.k, *cache.v), strict=True):
            stored[rows, :, :T] = new
        last_BE = hidden_BTE[torch.arange(B, device=self.device), self.lengths_B[rows] - 1]
        return self.model.lm_head(last_BE)

    @torch.no_grad()
    def sample(self) -> None:
        """Samples the next token of every row into `last_ids_B` and ends the sequences for which it is the last."""
        draw = sample(
            self.logits_BV, self.sampling, self._uniforms(), self.seen_BV, log_probs=self.log_probs is not None
        )
        self.last_ids_B = draw.ids
        self.new_ids[self.sequence_B, self.step] = draw.ids
        if self.log_probs is not None:
            assert draw.log_probs is not None
            assert draw.behaviour_log_probs is not None
            self.log_probs[0, self.sequence_B, self.step] = draw.log_probs
            self.log_probs[1, self.sequence_B, self.step] = draw.behaviour_log_probs
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, draw.ids[:, None], True)
        self.step += 1
        stopped_B = (draw.ids[:, None] == self.stop_ids_BS).any(1)
        ended_B = self.alive_B & (stopped_B | (self.step >= self.limits_B))
        if bool(ended_B.any()):
            self.finish([self.sequence[i] for i in (ended_B & stopped_B).nonzero().flatten().tolist()], "stop")
            self.finish([self.sequence[i] for i in (ended_B & ~stopped_B).nonzero().flatten().tolist()], "length")

    def finish(self, sequences: list[int], reason: str) -> None:
        """Ends sequences with the token just sampled."""
        for sequence in sequences:
            row = self.sequence.index(sequence)
            if self.alive[row]:
                self.alive[row], self.counts[sequence] = False, self.step
                self.alive_B[row] = False
            self.finish_reasons[sequence] = reason

    @torch.no_grad()
    def forward(self) -> None:
        """Puts the sampled tokens into the cache and computes the logits of the next ones."""
        if 2 * sum(self.alive) <= len(self.alive):
            self._drop_ended_rows()
        rows = zip(self.sequence, self.alive, strict=True)
        longest = self.step + max(len(self.prompts[s]) for s, alive in rows if alive)
        if longest > self.cache.max_length:
            self.cache = self._copied_cache(torch.arange(len(self.sequence)), self._bucket(longest))
        # rows that ended stand still: their last place is written again, never one beyond the cache
        self.logits_BV = self.model(
            self.last_ids_B[:, None], position_ids=self.lengths_B[:, None], kv_cache=self.cache
        ).logits[:, 0]
        self.lengths_B = self.lengths_B + self.alive_B

    def completions(self) -> list[Completion]:
        """The results, in the order of the prompts."""
        ids = self.new_ids.tolist()
        log_probs, behaviour = self.log_probs.tolist() if self.log_probs is not None else (None, None)
        return [
            Completion(
                ids=ids[i][:count],
                finish_reason=self.finish_reasons[i],
                log_probs=log_probs[i][:count] if log_probs else None,
                behaviour_log_probs=behaviour[i][:count] if behaviour else None,
            )
            for i, count in enumerate(self.counts)
        ]

    def _drop_ended_rows(self) -> None:
        keep = [row for row, alive in enumerate(self.alive) if alive]
        kept = torch.tensor(keep, device=self.device)
        self.cache = self._copied_cache(kept, self.cache.max_length)
        self.sequence, self.alive = [self.sequence[row] for row in keep], [True] * len(keep)
        for name in ("alive_B", "sequence_B", "lengths_B", "limits_B", "stop_ids_BS", "last_ids_B"):
            setattr(self, name, getattr(self, name)[kept])
        self.sampling = self.sampling.rows(kept)
        self.seen_BV = None if self.seen_BV is None else self.seen_BV[kept]
        self.uniforms_BK = None if self.uniforms_BK is None else self.uniforms_BK[kept]

    def _uniforms(self) -> torch.Tensor | None:
        """One random number a row for this step, made for many steps at a time."""
        if self.sampling.all_greedy:
            return None
        offset = self.step % UNIFORMS_BLOCK
        if offset == 0 or self.uniforms_BK is None:
            block = [
                uniforms(
                    self.params[s].seed,
                    self.sequence_ids[s],
                    len(self.prompts[s]) + self.step - offset,
                    UNIFORMS_BLOCK,
                )
                for s in self.sequence
            ]
            self.uniforms_BK = torch.from_numpy(np.stack(block)).to(self.device)
        return self.uniforms_BK[:, offset]

    def _seen_tokens(self) -> torch.Tensor:
        seen_BV = torch.zeros(len(self.prompts), self.model.config.vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(self.prompts):
            seen_BV[row, prompt] = True
        return seen_BV.to(self.device)

    def _bucket(self, tokens: int) -> int:
        """Cache length for so many tokens: few different shapes, and never more than can be needed."""
        length = CACHE_BUCKET
        while length < tokens:
            length *= 2
        return min(length, self.capacity)

    def _new_cache(self, rows: int, length: int) -> KVCache:
        return KVCache(self.model.config, rows, length, self.model.model.embed_tokens.weight.dtype, self.device)

    def _copied_cache(self, rows: torch.Tensor, length: int) -> KVCache:
        """A cache of `length` tokens with the contents of the given rows."""
        new, old_length = self._new_cache(len(rows), length), self.cache.max_length
        for target, source in zip((*new.k, *new.v), (*self.cache.k, *self.cache.v), strict=True):
            target[:, :, :old_length] = source[rows]
        return new


def _checked_prompts(prompts: Sequence[Sequence[int]] | torch.Tensor, config: MiniGPTConfig) -> list[list[int]]:
    rows = prompts.tolist() if isinstance(prompts, torch.Tensor) else [list(map(int, prompt)) for prompt in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty; give at least one token, for example the end-of-text token")
        if len(row) >= config.max_position_embeddings:
            raise ValueError(
                f"prompt {i} has {len(row)} tokens, which leaves no room in the model's context of "
                f"{config.max_position_embeddings}; shorten the prompt"
            )
        if min(row) < 0 or max(row) >= config.vocab_size:
            raise ValueError(
                f"prompt {i} has token id {min(row) if min(row) < 0 else max(row)}, outside the model's vocabulary of "
                f"{config.vocab_size}; use the tokenizer that the model was trained with"
            )
    return rows


def _padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    """int64 [B, longest], filled on the right."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64)


def _without_stop_token(completion: Completion, params: SamplingParams) -> list[int]:
    ended = completion.ids and completion.ids[-1] in params.stop_token_ids
    return completion.ids[:-1] if ended else completion.ids


@contextmanager
def _evaluating(model: MiniGPT) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
