"""Weights on their way from the policy to those who sample: a few buckets of bytes with a version.

What is published are the bits that the policy computes with (its bf16 copy, adapters merged as its forward pass merges
them), so that the sampler and the policy differ by kernels only. Or the adapter alone, for samplers that hold the
frozen weights and merge it in the same way.

All policy ranks walk the same buckets. Into the store each puts what it has: under ZeRO-3 its share of every parameter,
and who loads them puts the shares together, so that nothing is gathered; else rank 0 puts all. What is only whole where
all ranks gather it, the sum of a weight and its adapter or what is broadcast, comes from rank 0 as well.
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


class Pieces(NamedTuple):
    """A bucket at one rank: `data` is the bytes of each tensor (uint8, flat), or those that this rank has of it.

    What the ranks have of a tensor lies in it in the order of the ranks; it may be nothing.
    """

    entries: list[Entry]
    data: list[torch.Tensor]


@dataclass(frozen=True)
class Bucket:
    """Some tensors: `data` are references to what each rank put into Ray's store of them, the `slices` of its pieces.

    Nothing: they are elsewhere."""

    entries: list[Entry]
    data: list[Any]


@dataclass(frozen=True)
class Published:
    """The weights of a version: all, under the names of the model without adapters, or those of the adapter."""

    version: int
    buckets: list[Bucket]

    @property
    def in_store(self) -> bool:
        """Whether they can be had by whoever holds this."""
        return all(bucket.data for bucket in self.buckets)

    @classmethod
    def by_all(cls, ranks: Sequence[Published]) -> Published:
        """A version of which every rank published something."""
        together = zip(*(one.buckets for one in ranks), strict=True)
        buckets = [Bucket(each[0].entries, [data for one in each for data in one.data]) for each in together]
        return cls(ranks[0].version, buckets)


class _Item(NamedTuple):
    """A parameter to publish, and what must be whole beside it: an adapted weight is the sum of several."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    needs: list[nn.Parameter]

    @property
    def is_adapted(self) -> bool:
        """Whether it is published as the sum of a weight and its adapter."""
        return isinstance(self.module, LoRA) and len(self.needs) > 1 and self.parameter is self.module.weight

    @property
    def entry(self) -> Entry:
        """Of the whole tensor, wherever ZeRO-3 has put its parts."""
        shape = getattr(self.parameter, "ds_shape", self.parameter.shape)
        return Entry(self.name, tuple(shape), self.parameter.dtype)


@torch.no_grad()
def weight_buckets(
    network: nn.Module,
    engine: Engine,
    bucket_bytes: int = BUCKET_BYTES,
    adapter_only: bool = False,
    in_shares: bool = False,
) -> Iterator[Pieces]:
    """The network's weights as its forward pass uses them, or its adapter's, as uint8 tensors on the engine's device.

    All ranks walk it; rank 0 gets whole tensors and the others nothing, or each its shares where `in_shares` allows it.
    They are the weights themselves wherever possible, so what is wanted of a bucket must be copied before the next one
    comes.
    """
    for items in _plan(network, bucket_bytes, adapter_only):
        shares = [engine.share_of(item.parameter) if in_shares and not item.is_adapted else None for item in items]
        missing = [item for item, share in zip(items, shares, strict=True) if share is None]
        with engine.gathered([parameter for item in missing for parameter in item.needs]):
            tensors = [
                share if share is not None else _whole(item) if engine.processes.rank == 0 else torch.empty(0)
                for item, share in zip(items, shares, strict=True)
            ]
            yield Pieces([item.entry for item in items], [tensor.view(torch.uint8) for tensor in tensors])


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


def _whole(item: _Item) -> torch.Tensor:
    """Flat; of an adapted weight, with its adapter merged."""
    tensor: torch.Tensor = item.parameter
    if item.is_adapted:
        assert isinstance(item.module, LoRA)
        tensor = item.module.adapted_weight()
    return tensor.detach().contiguous().flatten()


def data_bytes(entries: Sequence[Entry]) -> int:
    """Room that the tensors of a bucket take end to end."""
    return sum(entry.room for entry in entries)


def split(entries: Sequence[Entry], memory: torch.Tensor) -> list[torch.Tensor]:
    """The bytes of every tensor in a bucket, as views of memory (uint8) in which they lie end to end."""
    places = memory[: data_bytes(entries)].split([entry.room for entry in entries])
    return [place[: entry.nbytes] for place, entry in zip(places, entries, strict=True)]


def copy_into(pieces: Pieces, memory: torch.Tensor) -> list[torch.Tensor]:
    """Copy the pieces of a bucket to where `split` finds its tensors in memory (uint8); returns the copies."""
    places = zip(split(pieces.entries, memory), pieces.data, strict=True)
    return [place[: len(piece)].copy_(piece) for place, piece in places]


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


def unpack(
    published: Published,
    fetch: Callable[[list[Any]], list[list[list[np.ndarray]]]],
    memory: dict[str, np.ndarray] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight, all of which must not be written to.

    Args:
        published: A version in the store.
        fetch: From references to what they refer to: `slices` of each tensor, by rank.
        memory: Where tensors that come in several shares are put together, by name; it is filled with memory, which the
            next call uses again. Other tensors are views of what was fetched.
    """
    memory = {} if memory is None else memory
    for bucket in published.buckets:
        data = []
        for entry, *by_rank in zip(bucket.entries, *fetch(bucket.data), strict=True):
            shares = [share for share in map(_joined, by_rank) if len(share)] or [np.empty(0, np.uint8)]
            if len(shares) > 1:
                whole = memory.setdefault(entry.name, np.empty(entry.nbytes, np.uint8))
                shares = [np.concatenate(shares, out=whole)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch says that the arrays must not be written to
                data.append(torch.from_numpy(shares[0]))
        yield from tensors_in(bucket.entries, data)
