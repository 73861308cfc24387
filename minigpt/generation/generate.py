"""Texts for prompts in one call, each with an engine of its own: what `MiniGPT.generate` and the commands use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from minigpt.generation.engine import Engine
from minigpt.generation.request import Completion, OnSampleToken
from minigpt.generation.sampling import SamplingParams
from minigpt.generation.text import Decode

if TYPE_CHECKING:
    from minigpt.model.model_minigpt import MiniGPT

END_IDS = (2, 0)  # <|im_end|> and <|endoftext|> of MiniGPT's own tokenizer
OnToken = Callable[[int, int], None]


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
    batch_invariant: bool = False,
) -> list[Completion]:
    """Continues every prompt; equal prompts with equal params are read once.

    Args:
        model: In training or evaluation mode; there is no dropout here.
        prompts: Token ids, of any lengths; or int64 [B, T].
        params: For all prompts, or one each.
        decode: ids → text; needed for stop strings, and fills `Completion.text`.
        on_token: Called as `on_token(prompt index, token id)` for every new token, in the order of its sequence.
        log_probs: Record log-probabilities.
        sequence_ids: Numbers of the random streams; by default the index in `prompts`.
        batch_size: Sequences decoded together.
        batch_invariant: Bit-equal results whatever else is in `prompts`; slower where torch computes them.

    Returns:
        One completion a prompt, in the order of the prompts.

    Raises:
        ValueError: for an empty or too long prompt, ids outside the vocabulary, or stop strings without `decode`.
    """
    texts = prompts.tolist() if isinstance(prompts, torch.Tensor) else [list(map(int, prompt)) for prompt in prompts]
    settings = [params] * len(texts) if isinstance(params, SamplingParams) else list(params)
    streams = list(range(len(texts))) if sequence_ids is None else list(map(int, sequence_ids))
    if len(settings) != len(texts) or len(streams) != len(texts):
        raise ValueError(
            f"{len(texts)} prompts but {len(settings)} params and {len(streams)} sequence ids; give one each"
        )
    if not texts:
        return []
    slots = batch_size if batch_invariant else min(batch_size, len(texts))
    engine = Engine(model, slots=slots, prefix_cache_tokens=0, batch_invariant=batch_invariant)
    same: dict[tuple[SamplingParams | int, ...], list[int]] = {}
    for i, (ids, p) in enumerate(zip(texts, settings, strict=True)):
        engine.check(ids, p, decode=decode, name=f"prompt {i}")
        same.setdefault((p, *ids), []).append(i)
    completions: dict[int, Completion] = {}
    for indices in same.values():
        first = indices[0]
        heard = None if on_token is None else _by_prompt(on_token, indices)
        request = engine.submit(
            texts[first],
            settings[first],
            n=len(indices),
            sequence_ids=[streams[i] for i in indices],
            on_token=heard,
            decode=decode,
            log_probs=log_probs,
        )
        completions |= zip(indices, request.completions, strict=True)
    while engine.has_work:
        engine.step()
    return [completions[i] for i in range(len(texts))]


def _by_prompt(on_token: OnToken, indices: list[int]) -> OnSampleToken:
    return lambda sample, token, _: on_token(indices[sample], token)


def stream(model: MiniGPT, prompt_ids: Sequence[int], params: SamplingParams, *, sequence_id: int = 0) -> Iterator[int]:
    """Yields the new ids of one prompt as they come, a stop token included; closing the iterator stops the work.

    Stop strings are the business of whoever turns ids into text (`text.TextStream`, `text.StopStrings`).

    Raises:
        ValueError: for an empty or too long prompt or ids outside the vocabulary (at the first `next`).
    """
    engine = Engine(model, slots=1, prefix_cache_tokens=0)
    engine.check(list(prompt_ids), replace(params, stop=()), name="prompt 0")
    yield from engine.stream(prompt_ids, params, sequence_id=sequence_id)


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
        model: In training or evaluation mode; it is only read.
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
    longest = max((len(c.ids) for c in completions), default=0)
    new = [c.ids + [pad] * (longest - len(c.ids)) for c in completions]
    new_ids = torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device).view(len(new), longest)
    return torch.cat([input_ids, new_ids], dim=1)


def stop_token_ids(model: MiniGPT) -> tuple[int, ...]:
    """The ids that end an answer of this model: those it was loaded with, or else those of MiniGPT's own tokenizer."""
    loaded: Any = getattr(model, "eos_token_ids", None)
    return tuple(loaded) if loaded else END_IDS
