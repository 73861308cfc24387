"""Weights on their way from the policy to those who sample: a few buckets of bytes with a version.

What is published are the bits that the policy computes with (its bf16 copy, adapters merged as its forward pass merges
them), so that the sampler and the policy differ by kernels only. All policy ranks walk the same buckets, because under
ZeRO-3 a parameter is whole only while all ranks gather it; rank 0 copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from minigpt.model.model_lora import LoRA
from minigpt.trainer.engine import Engine

BUCKET_BYTES = 32 << 20
ALIGNMENT = 8  # of every tensor in a bucket


class Entry(NamedTuple):
    """A tensor within a bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Bucket:
    """Tensors end to end: `data` is uint8 bytes, or a reference to them in Ray's object store."""

    entries: list[Entry]
    data: Any


@dataclass(frozen=True)
class Published:
    """All weights of a version, under the names of the model without adapters."""

    version: int
    buckets: list[Bucket]


class _Item(NamedTuple):
    """A parameter to publish, and what must be whole beside it: an adapted weight is the sum of several."""

    name: str
    module: nn.Module
    parameter: nn.Parameter
    needs: list[nn.Parameter]


def weight_buckets(network: nn.Module, engine: Engine, bucket_bytes: int = BUCKET_BYTES) -> Iterator[Bucket]:
    """The network's weights as its forward pass uses them. All ranks walk it; only rank 0 gets any bytes."""
    pending: list[_Item] = []
    size = 0
    for item in _items(network):
        pending.append(item)
        size += item.parameter.element_size() * getattr(item.parameter, "ds_numel", item.parameter.numel())
        if size >= bucket_bytes:
            yield _fill(pending, engine)
            pending, size = [], 0
    if pending:
        yield _fill(pending, engine)


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
def _fill(items: list[_Item], engine: Engine) -> Bucket:
    with engine.gathered([parameter for item in items for parameter in item.needs]):
        if engine.processes.rank != 0:
            return Bucket([], np.zeros(0, dtype=np.uint8))
        entries: list[Entry] = []
        pieces: list[torch.Tensor] = []
        for name, module, parameter, needs in items:
            tensor: torch.Tensor = parameter
            if isinstance(module, LoRA) and len(needs) > 1 and parameter is module.weight:
                tensor = module.adapted_weight()
            entries.append(Entry(name, tuple(tensor.shape), tensor.dtype))
            pieces.append(_aligned(tensor.detach().contiguous().flatten().view(torch.uint8)))
        return Bucket(entries, torch.cat(pieces).cpu().numpy())


def _aligned(data: torch.Tensor) -> torch.Tensor:
    """Bytes padded to a multiple of `ALIGNMENT`, so that any dtype may follow."""
    rest = -len(data) % ALIGNMENT
    return torch.nn.functional.pad(data, (0, rest)) if rest else data


def unpack(published: Published, fetch: Callable[[Any], np.ndarray]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every weight; the tensors are read-only views of what `fetch(bucket.data)` returns."""
    for bucket in published.buckets:
        data = fetch(bucket.data)
        offset = 0
        for name, shape, dtype in bucket.entries:
            size = int(np.prod(shape)) * dtype.itemsize
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch says that the array must not be written to
                tensor = torch.from_numpy(data[offset : offset + size])
            yield name, tensor.view(dtype).view(shape)
            offset += size + -size % ALIGNMENT
