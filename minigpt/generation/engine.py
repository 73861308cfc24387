"""The engine that all sampling goes through: requests enter, are decoded together, and leave when they end.

A running sequence has a slot, a row of a preallocated KV cache. `Engine.step` lets waiting sequences into free slots,
reads a part of the prompts that are not read yet, and samples one token for every sequence that can go on:

- Prompts of any lengths are read packed end to end, without padding; a long one in pieces between the steps of others,
  a short one on a CPU in the very step of the others.
- The n samples of a prompt share one reading of it. What the engine read before it finds again (`prefix_cache.py`).
- A sequence that ended makes room at once: a waiting one takes its slot, or the last one moves into it.
- New weights may come between two steps. Nothing that older ones computed is used after that: the sequences that run
  are read again, prompt and new tokens, and go on.

The random numbers of a sequence come from its own stream (seed, sequence, position), see `sampling.uniforms`: they are
the same alone, in any batch, and when a sequence is continued from its own beginning. Arithmetic is not, because a
product of 3 rows may round otherwise than one of 16. With `batch_invariant=True` a sequence's tokens and
log-probabilities are equal bit for bit whatever runs beside it, and before or after it: the compiled step on a CPU
computes every row as if it were alone, and reads all prompts then; torch gets shapes that depend on nothing but the
sequence.

One thread drives an engine. Shapes: B rows in use, N packed tokens, V vocabulary, H query heads, G key/value heads, D
head size, L tokens of a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from minigpt.generation.decoder import Attend, Decoder
from minigpt.generation.graphs import StaticDecoder, attend_together, graphs_wanted
from minigpt.generation.native import NativeDecoder, draws_of
from minigpt.generation.prefix_cache import PrefixCache
from minigpt.generation.request import OnSampleToken, PromptRead, Request, RunningSequence
from minigpt.generation.sampling import SamplingParams, SamplingTensors, adjust, sample
from minigpt.generation.text import Decode
from minigpt.model.attention import AttentionPattern, attention, cached_pattern, decode_attention, packed_pattern
from minigpt.model.kv_cache import KVCache

if TYPE_CHECKING:
    from minigpt.model.model_minigpt import MiniGPT

CACHE_BUCKET = 128  # the cache holds this many tokens a slot, times a power of two
PREFIX_BLOCK = 32  # tokens that the prefix cache keeps or forgets together
INVARIANT_CHUNK = 128  # the same, and what is read of a prompt at a time, where results may depend on nothing else
SHORT_PROMPT = 128  # up to so many tokens of a prompt are read by the compiled step; torch's attention is for long ones
PREFILL_CHUNK = 2048  # prompt tokens that are read between two decode steps

_Drawn = tuple[list[int], list[float], list[float]]


@dataclass
class EngineStats:
    """Counters of an engine since it was made, and what it holds now.

    Attributes:
        slots: Sequences that can run together.
        running: Slots in use.
        waiting: Sequences that wait for one.
        generated_tokens: New tokens so far.
        prompt_tokens: Tokens of prompts so far; those that samples share count once.
        prefix_hit_tokens: How many of them were found in the prefix cache.
        steps: Decode steps so far.
    """

    slots: int
    running: int = 0
    waiting: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    steps: int = 0


class Engine:
    """Slots with a KV cache; requests enter, are decoded together, and leave.

    Example:
        >>> engine = Engine(model, slots=8)
        >>> request = engine.submit([1, 2, 3], SamplingParams(max_new_tokens=20), n=4)
        >>> while engine.has_work:
        ...     engine.step()
        >>> [completion.ids for completion in request.completions]

    Args:
        model: A MiniGPT; its weights are read when the engine is made and at `load_weights` or `refresh`, some of them
            later: they must not change without one of these.
        slots: Sequences that are decoded together.
        max_length: Most tokens of a sequence, prompt and continuation; None: the model's context.
        batch_invariant: Compute every sequence in the same way whatever runs beside it. Slower, with torch much.
        prefix_cache_tokens: So many tokens of earlier texts are kept for texts that begin like them; 0: none.
        prefill_chunk: About so many prompt tokens are read between two decode steps.
        cuda_graphs: Decode in few fixed shapes, recorded on a GPU (`graphs.py`). None: on a GPU, unless
            `batch_invariant` or the environment variable MINIGPT_CUDA_GRAPHS=0 forbid it. True on a CPU: the same
            shapes without a recording, which is slower than the default there.
    """

    def __init__(
        self,
        model: MiniGPT,
        *,
        slots: int = 16,
        max_length: int | None = None,
        batch_invariant: bool = False,
        prefix_cache_tokens: int = 8192,
        prefill_chunk: int = PREFILL_CHUNK,
        cuda_graphs: bool | None = None,
    ) -> None:
        context = model.config.max_position_embeddings
        for name, value, least in (
            ("slots", slots, 1),
            ("max_length", context if max_length is None else max_length, 2),
            ("prefix_cache_tokens", prefix_cache_tokens, 0),
            ("prefill_chunk", prefill_chunk, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; give at least {least}")
        self.model, self.slots, self.batch_invariant = model, slots, batch_invariant
        self.max_length = context if max_length is None else min(max_length, context)
        self.prefill_chunk, self.version = prefill_chunk, 0
        self.decoder = Decoder(model, self.max_length, slots)
        self.device = self.decoder.device
        static = graphs_wanted(cuda_graphs, self.device, batch_invariant)
        self._static = StaticDecoder(self.decoder, slots) if static else None
        native = not static and NativeDecoder.covers(model)
        self._native = NativeDecoder(self.decoder, slots) if native else None
        self._apart = batch_invariant and not native  # torch computes every sequence in shapes of its own
        self._prefix = PrefixCache(prefix_cache_tokens, INVARIANT_CHUNK if self._apart else PREFIX_BLOCK)
        self._counters = EngineStats(slots)
        self._waiting: deque[RunningSequence] = deque()
        self._rows: list[RunningSequence | None] = [None] * slots
        self._used = 0  # rows 0 .. _used - 1 are computed
        self._cache = self._new_cache(1)
        self._written = 0  # tokens of a slot that something was written to, since new weights came
        self._sampling: SamplingTensors | None = None  # of the used rows; None: to be made again
        self._draws = draws_of([], 1)  # the same for `native.py`
        self._biased = False  # whether a used row has a bias
        self._bias_BV: torch.Tensor | None = None
        self._seen_BV: torch.Tensor | None = None

    # ------------------------------------------------------------------------------------------------------ requests

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        n: int = 1,
        sequence_ids: Sequence[int] | None = None,
        on_token: OnSampleToken | None = None,
        decode: Decode | None = None,
        log_probs: bool = False,
        top_log_probs: int = 0,
    ) -> Request:
        """Puts a prompt into the queue.

        Args:
            prompt_ids: Token ids.
            params: How to sample and when to end.
            n: So many samples, which share the reading of the prompt.
            sequence_ids: Numbers of the random streams, one a sample; by default 0 .. n - 1.
            on_token: Called as `on_token(sample, token id, log-probability or None)` for every new token, when the
                step that made it is over; it may cancel the request, whose completions keep what the step drew. What it
                raises `step` raises, when all have been called.
            decode: ids → text; needed for stop strings, and fills `Completion.text`.
            log_probs: Record log-probabilities.
            top_log_probs: Record those of so many most probable tokens as well.

        Raises:
            ValueError: one sentence, for an empty or too long prompt, ids outside the vocabulary, or stop strings
                without `decode`.
        """
        prompt = list(map(int, prompt_ids))
        self.check(prompt, params, decode=decode)
        streams = list(range(n)) if sequence_ids is None else list(map(int, sequence_ids))
        if n < 1 or len(streams) != n:
            raise ValueError(f"{n} samples and {len(streams)} sequence ids; give at least one sample and one id each")
        top_log_probs = min(top_log_probs, self.model.config.vocab_size)
        request = Request(prompt, params, n, log_probs, top_log_probs, on_token, decode)
        limit = min(params.max_new_tokens, self.max_length - len(prompt))
        self._waiting += [RunningSequence(request, index, stream, limit) for index, stream in enumerate(streams)]
        return request

    def check(
        self, prompt: Sequence[int], params: SamplingParams, *, decode: Decode | None = None, name: str = "the prompt"
    ) -> None:
        """Raises the ValueError that `submit` would for this prompt, which the sentence calls `name`."""
        vocab_size = self.model.config.vocab_size
        if not prompt:
            raise ValueError(f"{name} is empty; give at least one token, for example the end-of-text token")
        if len(prompt) >= self.max_length:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, which leaves no room in the model's context of {self.max_length}; "
                f"shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            raise ValueError(
                f"{name} has token id {min(prompt) if min(prompt) < 0 else max(prompt)}, outside the model's "
                f"vocabulary of {vocab_size}; use the tokenizer that the model was trained with"
            )
        if decode is None and params.stop:
            raise ValueError(
                "stop strings are given without a decode function; pass decode= (for example ChatEncoder.decode)"
            )
        for token in params.logit_bias:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"logit_bias names token id {token}, outside the model's vocabulary of {vocab_size}; use ids of "
                    f"the model's tokenizer"
                )

    def cancel(self, request: Request) -> None:
        """Takes a request back: it is done now, and its slots are free for the next step."""
        if request.done:
            return
        self._waiting = deque(s for s in self._waiting if s.request is not request)
        self._rows = [None if s is not None and s.request is request else s for s in self._rows]
        for completion in request.completions:
            completion.finish_reason = completion.finish_reason or "cancelled"
        request.cancelled, request.unfinished, request.prompt_read = True, 0, None

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting) or any(sequence is not None for sequence in self._rows)

    @property
    def stats(self) -> EngineStats:
        """What the engine holds and did; a copy."""
        running = sum(sequence is not None for sequence in self._rows)
        return replace(self._counters, running=running, waiting=len(self._waiting))

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams, *, sequence_id: int = 0) -> Iterator[int]:
        """Yields the new ids of one prompt as they come; closing the iterator takes the request back.

        Stop strings are the business of whoever turns the ids into text (`text.TextStream`, `text.StopStrings`).
        """
        request = self.submit(prompt_ids, replace(params, stop=()), sequence_ids=[sequence_id])
        ids, given = request.completions[0].ids, 0
        try:
            while not request.done or given < len(ids):
                if given == len(ids):
                    self.step()
                for token in ids[given:]:  # others who drive the engine may have made several
                    given += 1
                    yield token
        finally:
            self.cancel(request)

    # ------------------------------------------------------------------------------------------------------- weights

    def load_weights(
        self, named_tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], adopt: bool = False
    ) -> int:
        """Puts new weights into the model, in place, and forgets all that older ones computed; between two steps.

        Args:
            named_tensors: All parameters by their names, in any dtype; a tied output layer may be there or not.
            adopt: Tensors that fit in dtype and device become the parameters' memory themselves, which saves a copy.
                It may be read-only; nobody may write into it from now on.

        Returns:
            The version of the weights now.

        Raises:
            ValueError: for missing or unknown names and other shapes, before anything is changed.
        """
        tensors, parameters = dict(named_tensors), dict(self.model.named_parameters())
        tied = set() if "lm_head.weight" in parameters else {"lm_head.weight"}
        missing, unknown = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys() - tied)
        if missing or unknown:
            wrong = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
            raise ValueError(f"the weights do not fit the model: {wrong}; give every parameter by its name")
        for name, parameter in parameters.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensors[name].shape)}, the model's has {tuple(parameter.shape)}; give "
                    f"the weights of a model of the same shape"
                )
        with torch.no_grad():
            for name, parameter in parameters.items():
                tensor = tensors[name]
                if adopt and (tensor.dtype, tensor.device) == (parameter.dtype, parameter.device):
                    parameter.data = tensor
                else:
                    parameter.copy_(tensor)
        return self.refresh()

    def refresh(self) -> int:
        """The same, after somebody else changed the model's weights in place."""
        self.version += 1
        if self._native is None:
            self.decoder.refresh()
        else:  # which reads the short prompts too: torch's copies of the weights are made when a long one comes
            self.decoder.forget()
            self._native.refresh()
        self._prefix.clear()
        with torch.inference_mode():
            self._cache.kv[..., : self._written, :].zero_()  # a weight of 0 does not make NaN of broken weights unseen
        self._written = 0
        for sequence in (*self._rows, *self._waiting):
            if sequence is not None:
                sequence.in_cache, sequence.decoding, sequence.request.prompt_read = 0, False, None
                sequence.shares_prompt = False
        return self.version

    def sleep(self) -> None:
        """Gives back the memory of the cache and of the prepared weights, until `wake`; between requests only.

        The model's own weights are their owner's to move; they must be back before `wake`.
        """
        if self.has_work:
            raise RuntimeError("an engine with requests under way cannot sleep")
        self._prefix.clear()
        cache = self._cache
        self._cache = KVCache(self.model.config, 0, cache.max_length, cache.kv.dtype, self.device)
        self.decoder.forget()
        if self._static is not None:
            self._static.forget()
        if self._native is not None:
            self._native.forget()

    def wake(self) -> None:
        """Makes what `sleep` gave back; the cache is as long as it was, so that products keep their shapes."""
        self.refresh()
        self._cache = self._new_cache(self._cache.max_length)

    # --------------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Lets sequences into free slots, reads of the prompts what `prefill_chunk` allows, and samples one token for
        each sequence that can go on.

        Returns:
            The requests whose last sample ended in this step.
        """
        self._admit()
        self._close_gaps()
        if not self._used:
            return []
        decoding = [sequence is not None and sequence.decoding for sequence in self._rows[: self._used]]
        unread = [(row, s) for row, s in enumerate(self._rows[: self._used]) if s is not None and not s.decoding]
        self._reserve()
        ends, taken_along = self._read_prompts(unread)
        if self._native is not None:
            logits_BV = self._decode_natively(self._native, decoding, taken_along)
            ends |= {row: logits_BV[row] for row in taken_along if self._is_read(row)}
        elif any(decoding):
            logits_BV = self._decode(decoding)
        else:
            logits_BV = torch.zeros(self._used, self.model.config.vocab_size, device=self.device)
        for row, logits_V in self._share(unread, ends):
            logits_BV[row], decoding[row] = logits_V, True
        return self._sample(logits_BV, decoding) if any(decoding) else []

    def _admit(self) -> None:
        """Gives free slots to the sequences that wait longest."""
        if not self._waiting:
            return
        for row in range(self.slots):
            if self._rows[row] is None and self._waiting:
                sequence = self._waiting.popleft()
                sequence.request.waiting -= 1
                self._rows[row] = sequence
                self._prepare_row(row, sequence)

    def _prepare_row(self, row: int, sequence: RunningSequence) -> None:
        """Sets what belongs to a slot besides the cache."""
        self._sampling = None
        params, shape = sequence.request.params, (self.slots, self.model.config.vocab_size)
        if params.repetition_penalty != 1.0:
            if self._seen_BV is None:
                self._seen_BV = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self._seen_BV[row] = False
            self._seen_BV[row, torch.tensor(sequence.ids, device=self.device)] = True
        if params.logit_bias and self._bias_BV is None:
            self._bias_BV = torch.zeros(shape, device=self.device)
        if self._bias_BV is not None:
            self._bias_BV[row] = 0.0
            for token, bias in params.logit_bias.items():
                self._bias_BV[row, token] = bias

    def _close_gaps(self) -> None:
        """Moves the last rows into free slots before them, so that a step computes no more rows than it must."""
        taken = [row for row, sequence in enumerate(self._rows) if sequence is not None]
        used = len(taken)
        if self._apart:
            used = self.slots if taken else 0
        else:
            gaps = [row for row in range(used) if self._rows[row] is None]
            for source, target in zip(reversed(taken), gaps, strict=False):
                self._move(source, target)
        if used != self._used:
            self._used, self._sampling = used, None

    def _move(self, source: int, target: int) -> None:
        sequence = self._rows[source]
        assert sequence is not None
        self._cache.copy_row(source, target, sequence.in_cache)
        self._rows[target], self._rows[source] = sequence, None
        for tensor in (self._seen_BV, self._bias_BV):
            if tensor is not None:
                tensor[target] = tensor[source]
        self._sampling = None

    def _new_cache(self, tokens: int) -> KVCache:
        return KVCache(self.model.config, self.slots, self._bucket(tokens), cache_dtype(self.model), self.device)

    def _bucket(self, tokens: int) -> int:
        """Room for so many tokens: few different sizes."""
        length = CACHE_BUCKET
        while length < tokens:
            length *= 2
        return max(min(length, self.max_length), PREFIX_BLOCK)  # compiled code reads some keys behind the last one

    def _reserve(self) -> None:
        """Makes the slots long enough for every token that is there."""
        longest = max(len(sequence.ids) for sequence in self._rows if sequence is not None)
        self._written = max(self._written, longest + 1)
        if longest + 1 > self._cache.max_length:
            self._cache = self._cache.resized(self._bucket(longest + 1))

    # ------------------------------------------------------------------------------------------------------- prompts

    def _read_prompts(
        self, unread: list[tuple[int, RunningSequence]]
    ) -> tuple[dict[int, torch.Tensor], dict[int, int]]:
        """Reads prompts into the cache; the logits [V] behind those that are read to their end, by row, and of which
        rows the compiled step takes how many tokens along."""
        budget = self.prefill_chunk
        ends: dict[int, torch.Tensor] = {}
        taken_along: dict[int, int] = {}
        whole: list[int] = []
        pieces: dict[int, int] = {}  # of these rows so many tokens
        leads: dict[Request, int] = {}  # the sample that reads the prompt, for the others of its request
        # What is begun goes first: a sibling that came into a lower row must not begin anew
        for row, sequence in sorted(unread, key=lambda one: -one[1].in_cache):
            request = sequence.request
            if sequence.is_prompt and (request.prompt_read is not None or request in leads):
                continue
            if sequence.is_prompt:
                leads[request] = row
            if budget <= 0:
                continue
            if sequence.in_cache == 0:
                self._find_prefix(row, sequence)
            left = len(sequence.ids) - sequence.in_cache
            if self._apart:
                while budget > 0 and left > 0:
                    ends |= self._read_pieces({row: min(left, INVARIANT_CHUNK)})
                    budget, left = budget - INVARIANT_CHUNK, left - INVARIANT_CHUNK
                continue
            if self._native is not None and (self.batch_invariant or left <= min(budget, SHORT_PROMPT)):
                taken_along[row] = min(left, budget)
            elif sequence.in_cache == 0 and left <= budget:
                whole.append(row)
            else:
                pieces[row] = min(left, budget)
            budget -= left
        if whole:
            ends |= self._read_whole(whole)
        if pieces:
            ends |= self._read_pieces(pieces)
        return {row: logits for row, logits in ends.items() if self._is_read(row)}, taken_along

    def _is_read(self, row: int) -> bool:
        sequence = self._rows[row]
        return sequence is not None and sequence.in_cache == len(sequence.ids)

    def _share(
        self, unread: list[tuple[int, RunningSequence]], ends: dict[int, torch.Tensor]
    ) -> list[tuple[int, torch.Tensor]]:
        """Copies what one sample of a request read to its other samples; all rows that are ready now, with logits."""
        readers = {}
        for row, sequence in unread:
            if row in ends:
                self._prefix.store(sequence.ids, partial(self._cache.read, row))
                if sequence.is_prompt:
                    readers[sequence.request] = row
        ready = []
        for row, sequence in unread:
            request = sequence.request
            if row in ends:
                ready.append((row, ends[row]))
            elif sequence.is_prompt and request in readers:
                self._cache.copy_row(readers[request], row, len(sequence.ids))
                ready.append((row, ends[readers[request]]))
            elif sequence.is_prompt and request.prompt_read is not None:
                self._cache.write(row, 0, request.prompt_read.kv)
                ready.append((row, request.prompt_read.logits_V))
            else:
                continue
            sequence.in_cache, sequence.shares_prompt = len(sequence.ids), sequence.is_prompt
        for request, row in readers.items():
            if request.waiting:
                kv = self._cache.read(row, 0, len(request.prompt_ids))
                request.prompt_read = PromptRead(kv, ends[row].clone())
        for _, sequence in unread:
            if not sequence.request.waiting:
                sequence.request.prompt_read = None
        return ready

    def _find_prefix(self, row: int, sequence: RunningSequence) -> None:
        """Copies what is known of the beginning; at least one token is left, to compute the logits behind it."""
        found = self._prefix.find(sequence.ids[:-1])
        if found:
            self._cache.write(row, 0, torch.cat(found, dim=3))
            sequence.in_cache = len(found) * self._prefix.block
        if sequence.is_prompt:
            self._counters.prompt_tokens += len(sequence.ids)
            self._counters.prefix_hit_tokens += sequence.in_cache

    def _read_whole(self, rows: list[int]) -> dict[int, torch.Tensor]:
        """Reads texts that nothing is known of, packed end to end; the logits [V] behind each, by row."""
        sequences = [self._rows[row] for row in rows]
        texts = [sequence.ids for sequence in sequences if sequence is not None]
        lengths = [len(ids) for ids in texts]
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=self.device)
        lengths_S = torch.tensor(lengths, device=self.device)
        rows_N = torch.tensor(rows, device=self.device).repeat_interleave(lengths_S)
        positions_N = torch.cat([torch.arange(n, device=self.device) for n in lengths])
        if len(rows) == 1:
            pattern = AttentionPattern("sdpa")
        else:
            backend = "varlen" if self.device.type == "cpu" else None
            pattern = packed_pattern(rows_N[None], self.decoder.dtype, backend, cu_seqlens)
            pattern.max_seqlen = max(lengths)

        def attend(layer: int, q_NHD: torch.Tensor, kv_N2GD: torch.Tensor) -> torch.Tensor:
            self._cache.kv[layer][:, rows_N, :, positions_N] = kv_N2GD.to(self._cache.kv.dtype)
            q_1HND, k_1GND, v_1GND = (x.transpose(0, 1)[None] for x in (q_NHD, *kv_N2GD.unbind(1)))
            return attention(q_1HND, k_1GND, v_1GND, pattern)[0].transpose(0, 1)

        ids_N = torch.tensor([i for ids in texts for i in ids], device=self.device)
        hidden_NE = self.decoder.hidden(ids_N, positions_N, attend)
        logits_SV = self.decoder.logits(hidden_NE[cu_seqlens[1:].long() - 1])
        for sequence in sequences:
            assert sequence is not None
            sequence.in_cache = len(sequence.ids)
        return dict(zip(rows, logits_SV, strict=True))

    def _read_pieces(self, pieces: dict[int, int]) -> dict[int, torch.Tensor]:
        """Reads so many more tokens of each of these rows, packed end to end, behind what the rows hold; the logits [V]
        behind each, by row."""
        ids: list[int] = []
        spans: list[tuple[int, int, int, AttentionPattern]] = []  # row, start, end, what is seen
        for row, count in pieces.items():
            sequence = self._rows[row]
            assert sequence is not None
            start, end = sequence.in_cache, sequence.in_cache + count
            positions_1N = torch.arange(start, end, device=self.device)[None]
            spans.append((row, start, end, cached_pattern(positions_1N, end) if start else AttentionPattern("sdpa")))
            ids += sequence.ids[start:end]
            sequence.in_cache = end
        lengths = list(pieces.values())
        positions_N = torch.cat([torch.arange(start, end, device=self.device) for _, start, end, _ in spans])

        def attend(layer: int, q_NHD: torch.Tensor, kv_N2GD: torch.Tensor) -> torch.Tensor:
            out = []
            for span, q_nHD, kv_n2GD in zip(spans, q_NHD.split(lengths), kv_N2GD.split(lengths), strict=True):
                row, start, end, pattern = span
                self._cache.kv[layer][:, row, :, start:end] = kv_n2GD.permute(1, 2, 0, 3)
                k_1GLD, v_1GLD = self._cache.kv[layer][:, row : row + 1, :, :end].to(q_nHD.dtype)
                out.append(attention(q_nHD.transpose(0, 1)[None], k_1GLD, v_1GLD, pattern)[0].transpose(0, 1))
            return torch.cat(out)

        hidden_NE = self.decoder.hidden(torch.tensor(ids, device=self.device), positions_N, attend)
        ends_S = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        return dict(zip(pieces, self.decoder.logits(hidden_NE[ends_S]), strict=True))

    # ------------------------------------------------------------------------------------------------ decode, sample

    def _decode(self, decoding: list[bool]) -> torch.Tensor:
        """Takes the last token of every row into the cache; logits [B, V] of the next ones.

        Rows that do not decode are computed as well, as if their next token were 0; it is overwritten in the cache when
        the row gets there.
        """
        ids, positions = [0] * self._used, [0] * self._used
        for row, sequence in enumerate(self._rows[: self._used]):
            if sequence is not None:
                positions[row] = sequence.in_cache
                if decoding[row]:
                    ids[row] = sequence.ids[-1]
        self._counters.steps += 1
        if self._static is not None:
            return self._static.decode(ids, positions, self._cache)
        positions_B = torch.tensor(positions, device=self.device)
        if self._apart:
            attend = self._attend_alone(positions)
        else:
            attend = attend_together(self._cache, positions_B, max(positions) + 1)
        return self.decoder.logits(self.decoder.hidden(torch.tensor(ids, device=self.device), positions_B, attend))

    def _decode_natively(
        self, native: NativeDecoder, decoding: list[bool], taken_along: dict[int, int]
    ) -> torch.Tensor:
        """The same in one call, which reads so many tokens of the prompts in these rows as well. Samples of a request
        read the prompt where the first of them has it, so that it comes from memory once."""
        last: list[tuple[int, ...]] = []
        lenders: dict[Request, int] = {}
        for row, sequence in enumerate(self._rows[: self._used]):
            if sequence is None or not decoding[row]:
                continue
            shared = len(sequence.request.prompt_ids) if sequence.shares_prompt else 0
            lender = lenders.setdefault(sequence.request, row) if shared else row
            last.append((sequence.ids[-1], row, sequence.in_cache, lender, shared, True))
        tokens = [np.array(last, dtype=np.int64)] if last else []
        for row, count in taken_along.items():
            sequence = self._rows[row]
            assert sequence is not None
            start, end = sequence.in_cache, sequence.in_cache + count
            piece = np.zeros((count, 6), dtype=np.int64)
            piece[:, 0], piece[:, 1], piece[:, 2], piece[:, 3] = sequence.ids[start:end], row, range(start, end), row
            piece[-1, 5] = end == len(sequence.ids)
            tokens.append(piece)
            sequence.in_cache = end
        if tokens:
            native.decode(np.concatenate(tokens), self._cache)
            self._counters.steps += bool(last)
        return native.logits_BV[: self._used]

    def _attend_alone(self, positions: list[int]) -> Attend:
        """Each row by itself over exactly its own tokens."""

        def attend(layer: int, q_BHD: torch.Tensor, kv_B2GD: torch.Tensor) -> torch.Tensor:
            out_BHD = torch.zeros_like(q_BHD)
            for row, position in enumerate(positions):
                if self._rows[row] is None:
                    continue
                self._cache.kv[layer][:, row, :, position] = kv_B2GD[row]
                k_1GLD, v_1GLD = self._cache.kv[layer][:, row : row + 1, :, : position + 1]
                out_BHD[row] = decode_attention(q_BHD[row : row + 1].to(k_1GLD.dtype), k_1GLD, v_1GLD, None)[0]
            return out_BHD

        return attend

    def _sample(self, logits_BV: torch.Tensor, chosen: list[bool]) -> list[Request]:
        """Samples the next token of the chosen rows; the requests that end with it."""
        rows = self._rows[: self._used]
        wanted = any(s is not None and s.request.log_probs for s in rows)
        ids, log_probs, behaviour = self._draw(logits_BV, chosen, wanted)
        assert self._sampling is not None
        if self._seen_BV is not None and self._sampling.repetition_penalty is not None:
            drawn_rows = [row for row in range(self._used) if chosen[row]]
            self._seen_BV[drawn_rows, [ids[row] for row in drawn_rows]] = True
        finished: list[Request] = []
        news: list[tuple[Request, int, int, float | None]] = []
        for row, sequence in enumerate(rows):
            if sequence is None or not chosen[row]:
                continue
            completion, request = sequence.completion, sequence.request
            if completion.log_probs is not None:
                assert completion.behaviour_log_probs is not None
                assert completion.versions is not None
                completion.log_probs.append(log_probs[row])
                completion.behaviour_log_probs.append(behaviour[row])
                completion.versions.append(self.version)
            if completion.top_log_probs is not None:
                temperature = request.params.temperature or 1.0
                best = (logits_BV[row].double() / temperature).log_softmax(-1).topk(request.top_log_probs)
                completion.top_log_probs.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
            if request.on_token is not None:
                news.append((request, sequence.index, ids[row], log_probs[row] if request.log_probs else None))
            if self._take(row, sequence, ids[row]) and request.done:
                finished.append(request)
        failed: Exception | None = None
        for request, index, token, log_prob in news:  # all rows are in order now, whatever a callback does
            if request.on_token is not None and not request.cancelled:
                try:
                    request.on_token(index, token, log_prob)
                except Exception as error:
                    failed = failed or error
        if failed is not None:  # everybody has been told
            raise failed
        return finished

    def _draw(self, logits_BV: torch.Tensor, chosen: list[bool], log_probs: bool) -> _Drawn:
        """A token for every used row, and its log-probabilities; those of rows that are not chosen mean nothing."""
        rows = self._rows[: self._used]
        if self._sampling is None:
            params = [IDLE if s is None else s.request.params for s in rows]
            self._sampling = SamplingTensors.of(params, logits_BV.shape[1], self.device)
            self._draws = draws_of(params, logits_BV.shape[1])
            self._biased = any(p.logit_bias for p in params)
        seen_BV = None if self._seen_BV is None else self._seen_BV[: self._used]
        bias_BV = self._bias_BV[: self._used] if self._biased and self._bias_BV is not None else None
        numbers = None
        if not self._sampling.all_greedy:
            numbers = [s.next_uniform() if s is not None and c else 0.0 for s, c in zip(rows, chosen, strict=True)]
        if self._native is not None:
            self._draws["uniform"] = 0.0 if numbers is None else numbers
            adjusted_BV = adjust(logits_BV, self._sampling, seen_BV, bias_BV)
            self._native.draw(self._draws, log_probs, None if adjusted_BV is logits_BV else adjusted_BV)
            ids, own, behaviour = (self._draws[name].tolist() for name in ("id", "log_prob", "behaviour_log_prob"))
            return ids, own, behaviour
        uniforms_B = None if numbers is None else torch.tensor(numbers, dtype=torch.float64, device=self.device)
        drawn = sample(logits_BV, self._sampling, uniforms_B, seen_BV, bias_BV, log_probs=log_probs)
        if drawn.log_probs is None or drawn.behaviour_log_probs is None:
            return drawn.ids.tolist(), [], []
        return drawn.ids.tolist(), drawn.log_probs.tolist(), drawn.behaviour_log_probs.tolist()

    def _take(self, row: int, sequence: RunningSequence, token: int) -> bool:
        """Adds a sampled token to a sequence; whether it ended with it."""
        request, completion = sequence.request, sequence.completion
        sequence.in_cache = len(sequence.ids)
        sequence.ids.append(token)
        sequence.decoding = True
        completion.ids.append(token)
        self._counters.generated_tokens += 1
        stopped = token in sequence.stop_ids
        if not stopped and sequence.watcher is not None:
            stopped = sequence.watcher.push(token)
        if not stopped and len(completion.ids) < sequence.limit:
            return False
        completion.finish_reason = "stop" if stopped else "length"
        if sequence.watcher is not None:
            completion.text = sequence.watcher.text()
        elif request.decode is not None:
            completion.text = request.decode(completion.ids[:-1] if token in sequence.stop_ids else completion.ids)
        if not self._apart:  # what decode steps wrote is not bit for bit what reading the text would write
            self._prefix.store(sequence.ids[: sequence.in_cache], partial(self._cache.read, row))
        self._rows[row] = None
        request.unfinished -= 1
        return True


def cache_dtype(model: MiniGPT) -> torch.dtype:
    """Of an engine's cache: the model's own, but on a CPU float32 where attention to a few queries is faster in it."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype == torch.float64:
        return weight.dtype
    return NativeDecoder.cache_dtype(model) if NativeDecoder.covers(model) else torch.float32


def cache_bytes(model: MiniGPT, slots: int, tokens: int) -> int:
    """Memory of an engine's cache for so many sequences of so many tokens."""
    c = model.config
    numbers = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * slots * tokens
    return numbers * cache_dtype(model).itemsize


IDLE = SamplingParams(temperature=0.0)  # of a row that nobody uses
