"""Memory that leaves its device for a while and comes back bit for bit.

Roles of reinforcement learning that share a GPU take turns, and what one of them holds there the others lack. Storages
are emptied and filled again in place. So every tensor stays the object that it was, with all its views: DeepSpeed's
parameters, masters and gradients are views of a few flat buffers, which nothing here needs to know. (DeepSpeed's own
`offload_states` does this for some of its optimizers only; the one for bf16 at ZeRO stage 1 is not among them.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch

PIECE_BYTES = 256 << 20  # pinned memory comes in powers of two, so larger pieces would waste more of it
FOLLOWED = ("deepspeed.", "torch.optim", "minigpt.trainer.muon")  # modules of the objects that are looked into


class Sleeper:
    """Keeps the contents of storages in CPU memory (pinned beside a GPU) while they hold none.

    Args:
        device: Whose memory is to be freed; tensors elsewhere stay as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._away: list[tuple[torch.UntypedStorage, list[torch.Tensor]]] = []
        self._spare: dict[int, list[torch.Tensor]] = defaultdict(list)  # pieces by size: pinning is slow

    @property
    def bytes_on_cpu(self) -> int:
        """Memory that this takes, also while all are awake."""
        used = [pieces for _, pieces in self._away]
        return sum(len(piece) for pieces in (*used, *self._spare.values()) for piece in pieces)

    def sleep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Free the memory of these tensors, and of whatever shares it; nobody may read or write them until `wake`."""
        storages = {}
        for tensor in tensors:
            if tensor.device.type == self.device.type:
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage
        for storage in storages.values():
            if storage.nbytes() and storage.resizable():  # memory of files or of others is not ours to free
                pieces = [self._piece(part).copy_(part) for part in _bytes_of(storage).split(PIECE_BYTES)]
                storage.resize_(0)
                self._away.append((storage, pieces))
        self._spare.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the other processes on this GPU

    def _piece(self, part: torch.Tensor) -> torch.Tensor:
        spare = self._spare[len(part)]
        if spare:
            return spare.pop()
        return torch.empty(len(part), dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def wake(self) -> None:
        """Everything as it was."""
        for storage, pieces in self._away:
            storage.resize_(sum(len(piece) for piece in pieces))
            for part, piece in zip(_bytes_of(storage).split(PIECE_BYTES), pieces, strict=True):
                part.copy_(piece)
                self._spare[len(piece)].append(piece)
        self._away.clear()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def tensors_within(thing: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """All tensors in containers, optimizers and DeepSpeed's objects, with what hangs on them: gradients, partitions."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    inner: Iterable[Any] = ()
    if isinstance(thing, torch.Tensor):
        yield thing
        inner = (thing.grad, vars(thing)) if thing.is_leaf else (vars(thing),)
    elif isinstance(thing, dict):
        inner = (*thing.keys(), *thing.values())
    elif isinstance(thing, (list, tuple, set)):
        inner = thing
    elif type(thing).__module__.startswith(FOLLOWED) and hasattr(thing, "__dict__"):
        inner = vars(thing).values()
    for one in inner:
        yield from tensors_within(one, seen)
