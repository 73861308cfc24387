"""A decode step in fixed shapes and at fixed addresses, so that a GPU can record it once and replay it.

A step of a small batch is hundreds of short kernels, and Python takes longer to start them than the GPU to run them. A
CUDA graph starts them all with one call, but it always computes the same shapes from the same memory. So there is a
recording for every pair of a number of rows and a number of cached tokens, both rounded up to few sizes: rows that
nobody uses are computed as if they held one token of id 0, and what lies behind a row's last token is masked. A row
that nobody uses is a free slot: what is written there nobody reads, and a sequence that enters later overwrites it.

Recordings are made when a size is met for the first time. They stay valid while cache and weights keep their places
(`Decoder.refresh` writes new weights where the old ones were), and are made again when these have moved. What cannot
be recorded is computed without: the same operators, one by one. So it is done on a CPU as well, where the tests compare
it with the step in exact shapes.

Shapes: B rows, L cached tokens, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from minigpt.generation.decoder import Attend, Decoder
from minigpt.model.attention import decode_attention
from minigpt.model.kv_cache import KVCache

LENGTH_STEP = 128  # cached tokens: multiples of this, beyond 512 of a quarter of the next power of two
WARMUP_STEPS = 2  # before a recording: libraries choose kernels and allocate workspaces in their first calls


def graphs_wanted(option: bool | None, device: torch.device, batch_invariant: bool) -> bool:
    """Whether an engine decodes in fixed shapes: as the option says, or by default on a GPU.

    Args:
        option: None leaves it to the device and to MINIGPT_CUDA_GRAPHS=0, which switches it off.
        device: Of the model.
        batch_invariant: Torch then computes rows one by one, in shapes of their own.

    Raises:
        ValueError: when both are asked for.
    """
    if option and batch_invariant:
        raise ValueError("cuda_graphs and batch_invariant exclude each other: leave one of them out")
    if option is not None:
        return option
    return device.type == "cuda" and not batch_invariant and os.environ.get("MINIGPT_CUDA_GRAPHS") != "0"


def rows_bucket(rows: int, slots: int) -> int:
    """The next power of two, at most all slots."""
    return min(1 << (rows - 1).bit_length(), slots)


def length_bucket(tokens: int, longest: int) -> int:
    """At least so many cached tokens, at most a quarter more above 512; never more than `longest`, the cache's own."""
    step = max(LENGTH_STEP, (1 << (tokens - 1).bit_length()) // 4)
    return min(-(-tokens // step) * step, longest)


def attend_together(cache: KVCache, positions_B: torch.Tensor, tokens: int) -> Attend:
    """Writes the new keys and values of rows 0 .. B - 1 and reads their first `tokens` cached ones, in one call a
    layer."""
    B, kv, device = len(positions_B), cache.kv, positions_B.device
    rows_B = torch.arange(B, device=device)
    behind_BL = torch.arange(tokens, device=device) > positions_B[:, None]
    hidden_BL = torch.zeros(behind_BL.shape, dtype=kv.dtype, device=device).masked_fill_(behind_BL, -math.inf)

    def attend(layer: int, q_BHD: torch.Tensor, kv_B2GD: torch.Tensor) -> torch.Tensor:
        kv[layer][:, rows_B, :, positions_B] = kv_B2GD.to(kv.dtype)
        k_BGLD, v_BGLD = kv[layer][:, :B, :, :tokens]
        return decode_attention(q_BHD.to(kv.dtype), k_BGLD, v_BGLD, hidden_BL).to(q_BHD.dtype)

    return attend


class StaticDecoder:
    """Decode steps of up to `slots` rows.

    Args:
        decoder: Whose step it is.
        slots: Rows of the cache.

    Attributes:
        recorded: Sizes (rows, cached tokens) of which there are recordings.
        refused: Why recording was given up, None while it was not.
    """

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self._decoder, self._slots, self._device = decoder, slots, decoder.device
        self._inputs_2B = torch.zeros(2, slots, dtype=torch.int64, device=self._device)  # ids and positions
        self._logits_BV = torch.zeros(slots, decoder.model.config.vocab_size, device=self._device)
        self._replays: dict[tuple[int, int], Callable[[], None]] = {}
        self._places: tuple[int, ...] = ()
        self._pool: Any = None
        self._stream: Any = None
        self.refused: str | None = None if self._device.type == "cuda" else "there is no GPU"

    @property
    def recorded(self) -> list[tuple[int, int]]:
        return sorted(self._replays)

    def decode(self, ids: list[int], positions: list[int], cache: KVCache) -> torch.Tensor:
        """Takes one token of each of the first rows into the cache.

        Args:
            ids: Token ids of rows 0, 1, …
            positions: Where in their rows they belong.
            cache: With room for them.

        Returns:
            float32 [rows, V], valid until the next call.
        """
        B, rows = rows_bucket(len(ids), self._slots), len(ids)
        L = length_bucket(max(positions) + 1, cache.max_length)
        padding = [0] * (B - rows)
        self._inputs_2B[:, :B].copy_(torch.tensor([ids + padding, positions + padding]))
        self._forget_if_moved(cache)
        if (B, L) not in self._replays and self.refused is None:
            self._record(B, L, cache)
        self._replays.get((B, L), lambda: self._compute(B, L, cache))()
        return self._logits_BV[:rows]

    def _compute(self, B: int, L: int, cache: KVCache) -> None:
        ids_B, positions_B = self._inputs_2B[:, :B]
        hidden_BE = self._decoder.hidden(ids_B, positions_B, attend_together(cache, positions_B, L))
        self._logits_BV[:B].copy_(self._decoder.logits(hidden_BE))

    def _forget_if_moved(self, cache: KVCache) -> None:
        places = (cache.kv.data_ptr(), *cache.kv.shape, *self._decoder.places)
        if places != self._places:
            self.forget()
            self._places = places

    def forget(self) -> None:
        """Give back the recordings and their memory."""
        self._replays.clear()
        self._places, self._pool = (), None

    def _record(self, B: int, L: int, cache: KVCache) -> None:
        """Runs the step as it stands, which may be done twice, and records it."""
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()  # steps follow each other: they share working memory
            if self._stream is None:
                self._stream = torch.cuda.Stream(self._device)  # one for all: memory is given again on its stream only
            stream, graph = self._stream, torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_STEPS):
                    self._compute(B, L, cache)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                self._compute(B, L, cache)
        except RuntimeError as error:  # among them: no memory left
            self.refused = str(error).partition("\n")[0]
            self._replays.clear()
            print(f"CUDA graphs are off, decoding goes on without them: {self.refused}", file=sys.stderr)
            return
        self._replays[B, L] = graph.replay
