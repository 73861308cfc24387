"""Weights on their way from the policy to those who sample: a few buckets of bytes with a version.

What is published are the bits that the policy computes with (its bf16 copy, adapters merged as its forward pass merges
them), so that the sampler and the policy differ by kernels only. All policy ranks walk the same buckets, because under
ZeRO-3 a parameter is whole only while all ranks gather it; rank 0 copies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from minigpt.model.model_lora import LoRA
from minigpt.trainer.engine import Engine

BUCKET_BYTES = 32 << 20
VERSIONS_KEPT = 2
ALIGNMENT = 8  # of every tensor in a bucket


class Entry(NamedTuple):
    """A tensor within a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of the tensor, without what aligns the next one."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Tensors end to end: `data` is uint8 bytes, a reference to them in Ray's object store, or None: elsewhere."""

    entries: list[Entry]
    data: Any


@dataclass(frozen=True)
class Published:
    """All weights of a version, under the names of the model without adapters."""

    version: int
    buckets: list[Bucket]

    @property
    def in_store(self) -> bool:
        """Whether they can be had by whoever holds this."""
        return all(bucket.data is not None for bucket in self.buckets)


class _Item(NamedTuple):
    """A parameter to publish, and what must be whole beside it: an adapted weight is the sum of several."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    needs: list[nn.Parameter]

    @property
    def entry(self) -> Entry:
        """Of the whole tensor, wherever ZeRO-3 has put its parts."""
        shape = getattr(self.parameter, "ds_shape", self.parameter.shape)
        return Entry(self.name, tuple(shape), self.parameter.dtype)


def weight_buckets(
    network: nn.Module, engine: Engine, bucket_bytes: int = BUCKET_BYTES, memory: torch.Tensor | None = None
) -> Iterator[Bucket]:
    """The network's weights as its forward pass uses them, as uint8 tensors on the engine's device.

    All ranks walk it; only rank 0 gets any bytes. With `memory` (uint8, as long as the largest bucket) every bucket
    lies in it, until the next one comes: memory that is new to the process takes longer to get than to fill.
    """
    for items in _plan(network, bucket_bytes):
        yield _fill(items, engine, memory)


def bucket_plan(network: nn.Module, bucket_bytes: int = BUCKET_BYTES) -> list[list[Entry]]:
    """What is in each bucket; a rank finds it alone."""
    return [[item.entry for item in items] for items in _plan(network, bucket_bytes)]


def _plan(network: nn.Module, bucket_bytes: int) -> Iterator[list[_Item]]:
    pending: list[_Item] = []
    size = 0
    for item in _items(network):
        pending.append(item)
        size += item.entry.nbytes
        if size >= bucket_bytes:
            yield pending
            pending, size = [], 0
    if pending:
        yield pending


def _items(network: nn.Module) -> Iterator[_Item]:
    seen: set[int] = set()  # tied parameters have several names, and are published under the first
    for owner, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("lora_") or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            adapted = isinstance(module, LoRA) and name == "weight"
            needs = list(module.parameters(recurse=False)) if adapted else [parameter]
            yield _Item(f"{owner}.{name}", module, parameter, needs)


@torch.no_grad()
def _fill(items: list[_Item], engine: Engine, memory: torch.Tensor | None) -> Bucket:
    with engine.gathered([parameter for item in items for parameter in item.needs]):
        if engine.processes.rank != 0:
            return Bucket([], torch.zeros(0, dtype=torch.uint8))
        pieces: list[torch.Tensor] = []
        for _, module, parameter, needs in items:
            tensor: torch.Tensor = parameter
            if isinstance(module, LoRA) and len(needs) > 1 and parameter is module.weight:
                tensor = module.adapted_weight()
            pieces.append(_aligned(tensor.detach().contiguous().flatten().view(torch.uint8)))
        entries = [item.entry for item in items]
        return Bucket(entries, torch.cat(pieces, out=None if memory is None else memory[: data_bytes(entries)]))


def _aligned(data: torch.Tensor) -> torch.Tensor:
    """Bytes padded to a multiple of `ALIGNMENT`, so that any dtype may follow."""
    rest = -len(data) % ALIGNMENT
    return torch.nn.functional.pad(data, (0, rest)) if rest else data


def data_bytes(entries: Sequence[Entry]) -> int:
    """Length of a bucket's data."""
    return sum(entry.nbytes + -entry.nbytes % ALIGNMENT for entry in entries)


def tensors_in(entries: Sequence[Entry], data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight in a bucket, as views of its bytes."""
    offset = 0
    for entry in entries:
        yield entry.name, data[offset : offset + entry.nbytes].view(entry.dtype).view(entry.shape)
        offset += entry.nbytes + -entry.nbytes % ALIGNMENT


def unpack(published: Published, fetch: Callable[[Any], np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight; the tensors are read-only views of what `fetch(bucket.data)` returns."""
    for bucket in published.buckets:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that the array must not be written to
            data = torch.from_numpy(fetch(bucket.data))
        yield from tensors_in(bucket.entries, data)
