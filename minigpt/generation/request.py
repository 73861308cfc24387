"""Requests to an engine, and the sequences that they become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minigpt.generation.sampling import SamplingParams, uniforms
from minigpt.generation.text import Decode, StopStrings, TextStream

UNIFORMS_BLOCK = 64  # random numbers are made for so many tokens of a sequence at once
OnSampleToken = Callable[[int, int, "float | None"], None]


@dataclass
class Completion:
    """What was generated for one prompt.

    Attributes:
        ids: The new tokens, including the stop token that ended them.
        finish_reason: "stop" (a stop token or stop string), "length" (max_new_tokens or the context is used up),
            "cancelled", or "" while it runs.
        text: The new text without stop token and stop string; None without a `decode` function.
        log_probs: Of each id: full vocabulary, at the temperature, before penalties, bias and filters; None if not
            asked for.
        behaviour_log_probs: Of each id under the distribution that it was drawn from; None if not asked for.
        versions: Of the weights that drew each id; None if no log-probabilities were asked for.
        top_log_probs: Before each id, the most probable tokens with their log-probabilities (as in `log_probs`), best
            first; None if not asked for.
    """

    ids: list[int]
    finish_reason: str
    text: str | None = None
    log_probs: list[float] | None = None
    behaviour_log_probs: list[float] | None = None
    versions: list[int] | None = None
    top_log_probs: list[list[tuple[int, float]]] | None = None


class Request:
    """A prompt on its way through an engine, with n samples.

    Attributes:
        prompt_ids, params, and the other arguments: as submitted, see `Engine.submit`.
        completions: One a sample; they grow while the request runs.
        cancelled: Whether somebody took it back.
        unfinished, waiting: So many samples have not ended, and so many have no slot yet; the engine counts them.
        prompt_read: The prompt's keys and values while samples wait for a slot; the engine's.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        n: int = 1,
        log_probs: bool = False,
        top_log_probs: int = 0,
        on_token: OnSampleToken | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.prompt_ids, self.params, self.log_probs, self.top_log_probs = prompt_ids, params, log_probs, top_log_probs
        self.on_token, self.decode = on_token, decode
        self.completions = [
            Completion(
                [],
                "",
                log_probs=[] if log_probs else None,
                behaviour_log_probs=[] if log_probs else None,
                versions=[] if log_probs else None,
                top_log_probs=[] if top_log_probs else None,
            )
            for _ in range(n)
        ]
        self.cancelled = False
        self.unfinished = self.waiting = n
        self.prompt_read: PromptRead | None = None

    @property
    def done(self) -> bool:
        """Whether all samples have ended."""
        return self.unfinished == 0


@dataclass
class PromptRead:
    """What samples that enter later need of a prompt: keys and values, and the logits behind it [V]."""

    kv: torch.Tensor
    logits_V: torch.Tensor


class RunningSequence:
    """One sample of a request: its tokens, how far they are in the cache, and when they end."""

    def __init__(self, request: Request, index: int, stream: int, limit: int) -> None:
        self.request, self.index, self.stream, self.limit = request, index, stream, limit
        self.completion = request.completions[index]
        self.ids = list(request.prompt_ids)  # prompt and new tokens
        self.in_cache = 0  # how many of them the slot's row holds
        self.decoding = False  # all but the last one, which a decode step takes
        self.shares_prompt = False  # its row begins with the very bits that other samples' rows begin with
        self.stop_ids = frozenset(request.params.stop_token_ids)
        decode, stop = request.decode, request.params.stop
        self.watcher = StopWatcher(decode, stop) if decode and stop else None
        self._uniforms: list[float] = []
        self._uniforms_start = 0

    @property
    def is_prompt(self) -> bool:
        """Whether nothing was sampled yet."""
        return len(self.ids) == len(self.request.prompt_ids)

    def next_uniform(self) -> float:
        """The random number of the position that is sampled next."""
        offset = len(self.ids) - self._uniforms_start
        if not 0 <= offset < len(self._uniforms):
            self._uniforms_start, offset = len(self.ids), 0
            self._uniforms = uniforms(self.request.params.seed, self.stream, len(self.ids), UNIFORMS_BLOCK).tolist()
        return self._uniforms[offset]


class StopWatcher:
    """The text of one row up to its first stop string."""

    def __init__(self, decode: Decode, stop: Sequence[str]) -> None:
        self._decoder, self._stop, self._parts = TextStream(decode), StopStrings(stop), [""]

    def push(self, token: int) -> bool:
        self._parts.append(self._stop.push(self._decoder.push(token)))
        return self._stop.found is not None

    def text(self) -> str:
        self._parts += [self._stop.push(self._decoder.flush()), self._stop.flush()]
        return "".join(self._parts)
