"""Weights on their way from the policy to those who sample: a few buckets of bytes with a version.

What is published are the bits that the policy computes with (its bf16 copy, adapters merged as its forward pass merges
them), so that the sampler and the policy differ by kernels only. Or the adapter alone, for samplers that hold the
frozen weights and merge it in the same way. All policy ranks walk the same buckets, because under ZeRO-3 a parameter is
whole only while all ranks gather it; rank 0 copies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from minigpt.model.model_lora import LoRA
from minigpt.trainer.engine import Engine

BUCKET_BYTES = 128 << 20
VERSIONS_KEPT = 2
ALIGNMENT = 8  # of tensors that lie end to end
# Ray starts six threads to copy an array of more than 1 MiB. For one of a few MiB that takes longer than the copy, so
# it is handed over in slices; they come back end to end, since their size is a multiple of the store's alignment.
SLICE_BYTES = 1 << 20
LARGE_BYTES = 16 << 20  # here the threads are worth it


class Entry(NamedTuple):
    """A tensor within a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of the tensor, without what aligns the next one."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def room(self) -> int:
        """Bytes that it takes where tensors lie end to end."""
        return self.nbytes + -self.nbytes % ALIGNMENT


@dataclass(frozen=True)
class Bucket:
    """Some tensors: `data` is the bytes of each (uint8), a reference to their `slices` in Ray's store, or None:
    elsewhere."""

    entries: list[Entry]
    data: Any


@dataclass(frozen=True)
class Published:
    """The weights of a version: all, under the names of the model without adapters, or those of the adapter."""

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


@torch.no_grad()
def weight_buckets(
    network: nn.Module, engine: Engine, bucket_bytes: int = BUCKET_BYTES, adapter_only: bool = False
) -> Iterator[Bucket]:
    """The network's weights as its forward pass uses them, or its adapter's, as uint8 tensors on the engine's device.

    All ranks walk it; only rank 0 gets any bytes. They are the weights themselves wherever these are whole, so what is
    wanted of a bucket must be copied before the next one comes.
    """
    for items in _plan(network, bucket_bytes, adapter_only):
        with engine.gathered([parameter for item in items for parameter in item.needs]):
            entries = [item.entry for item in items] if engine.processes.rank == 0 else []
            yield Bucket(entries, [_bytes_of(item) for item in items[: len(entries)]])


def bucket_plan(network: nn.Module, bucket_bytes: int = BUCKET_BYTES, adapter_only: bool = False) -> list[list[Entry]]:
    """What is in each bucket; a rank finds it alone."""
    return [[item.entry for item in items] for items in _plan(network, bucket_bytes, adapter_only)]


def _plan(network: nn.Module, bucket_bytes: int, adapter_only: bool) -> Iterator[list[_Item]]:
    pending: list[_Item] = []
    size = 0
    for item in _adapter_items(network) if adapter_only else _items(network):
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
            if is_of_adapter(name) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            adapted = isinstance(module, LoRA) and name == "weight"
            needs = list(module.parameters(recurse=False)) if adapted else [parameter]
            yield _Item(f"{owner}.{name}", module, parameter, needs)


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2].startswith("lora_")


def _adapter_items(network: nn.Module) -> Iterator[_Item]:
    for name, parameter in network.named_parameters():
        if is_of_adapter(name):
            yield _Item(name, network, parameter, [parameter])


def _bytes_of(item: _Item) -> torch.Tensor:
    """uint8, flat; of an adapted weight, with its adapter merged."""
    tensor: torch.Tensor = item.parameter
    if isinstance(item.module, LoRA) and len(item.needs) > 1 and item.parameter is item.module.weight:
        tensor = item.module.adapted_weight()
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def data_bytes(entries: Sequence[Entry]) -> int:
    """Room that the tensors of a bucket take end to end."""
    return sum(entry.room for entry in entries)


def split(entries: Sequence[Entry], memory: torch.Tensor) -> list[torch.Tensor]:
    """The bytes of every tensor in a bucket, as views of memory (uint8) in which they lie end to end."""
    places = memory[: data_bytes(entries)].split([entry.room for entry in entries])
    return [place[: entry.nbytes] for place, entry in zip(places, entries, strict=True)]


def copy_into(bucket: Bucket, memory: torch.Tensor) -> None:
    """Put the tensors of a bucket end to end into memory (uint8), where `split` finds them."""
    for place, piece in zip(split(bucket.entries, memory), bucket.data, strict=True):
        place.copy_(piece)


def tensors_in(entries: Sequence[Entry], data: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight in a bucket, as views of their bytes."""
    for entry, piece in zip(entries, data, strict=True):
        yield entry.name, piece.view(entry.dtype).view(entry.shape)


def slices(pieces: Sequence[torch.Tensor]) -> list[list[np.ndarray]]:
    """The bytes (uint8, on a CPU) of each tensor of a bucket as the store takes them fastest; no copies."""
    return [[part.numpy() for part in piece.split(_slice_bytes(len(piece)))] for piece in pieces]


def _slice_bytes(nbytes: int) -> int:
    return SLICE_BYTES if SLICE_BYTES < nbytes < LARGE_BYTES else max(nbytes, 1)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """One array of slices: a view of the memory that they share, if they lie end to end in it."""
    if any(a.ctypes.data + len(a) != b.ctypes.data for a, b in pairwise(parts)):
        return np.concatenate(parts)
    return np.lib.stride_tricks.as_strided(parts[0], (sum(map(len, parts)),), writeable=False)


def unpack(published: Published, fetch: Callable[[Any], list[list[np.ndarray]]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight; the tensors are read-only views of the `slices` that `fetch(bucket.data)`
    returns."""
    for bucket in published.buckets:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that the arrays must not be written to
            data = [torch.from_numpy(_joined(parts)) for parts in fetch(bucket.data)]
        yield from tensors_in(bucket.entries, data)
