"""The second way of weights to the samplers: a process group of their own, over which each bucket is broadcast.

The first rank of the policy and all rollout workers join it, beside the process group that DeepSpeed trains in, which
is left alone: NCCL between GPUs that are all different (it refuses two ranks on one device), gloo between CPUs. Every
wait has a limit, so that a member who is dead or hangs costs the others time and a sentence, and never the run: what
could not be broadcast goes through the object store (`delivery.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread
from typing import Any, Literal

import torch
from torch.distributed import TCPStore

Backend = Literal["nccl", "gloo"]
LIMIT_S = 120.0  # for a member to join, and for a bucket to arrive
POLL_S = 0.0002


def limit_within(timeout: float) -> float:
    """LIMIT_S, or less: who waits in vain must tell so before its own call (of `timeout` seconds) counts as hung."""
    return min(LIMIT_S, timeout / 2)


def choose_transport(wanted: str, devices: list[str | None]) -> Backend | None:
    """How weights travel; None: through the object store.

    Args:
        wanted: auto, store or broadcast.
        devices: Of the policy's first rank and of each rollout worker: a name of its GPU, None on a CPU.
    """
    apart = None not in devices and len(set(devices)) == len(devices)
    if wanted == "store" or (wanted == "auto" and not apart):
        return None
    return "nccl" if apart else "gloo"


class WeightGroup:
    """A member of the group; making one waits for all others.

    Args:
        backend: nccl or gloo.
        address: Where rank 0 listens.
        rank: 0 sends, the others receive.
        size: Members in all.
        limit_s: Seconds for joining, and for each broadcast.

    Attributes:
        device: Where the bytes must lie.

    Errors: RuntimeError when the others do not come in time.
    """

    _group: Any = None  # the object itself, which no table of torch.distributed knows
    _left = False

    def __init__(self, backend: Backend, address: tuple[str, int], rank: int, size: int, limit_s: float):
        self.device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        self.limit_s = limit_s
        # NCCL has no limit for connecting its members, and `abort` does not reach it there: who never comes costs a
        # thread that waits as long as this process lives
        joined: Future[None] = Future()
        Thread(target=self._join, args=(joined, backend, address, rank, size), daemon=True).start()
        try:
            joined.result(limit_s)
        except TimeoutError:
            self.close()
            raise RuntimeError(f"not all others joined within {limit_s:g} s") from None

    def _join(self, joined: Future[None], backend: Backend, address: tuple[str, int], rank: int, size: int) -> None:
        limit = timedelta(seconds=self.limit_s)
        try:
            store = TCPStore(*address, size, is_master=rank == 0, timeout=limit)
            if self._left:
                return
            if backend == "nccl":
                options = torch.distributed.ProcessGroupNCCL.Options()
                options._timeout = limit
                with _no_watchdog():
                    self._group = torch.distributed.ProcessGroupNCCL(store, rank, size, options)
            else:
                self._group = torch.distributed.ProcessGroupGloo(store, rank, size, limit)
            if self._left:  # meanwhile, when there was no group yet that `close` could have ended
                self._group.abort()
                return
            self.broadcast(torch.zeros(1, dtype=torch.uint8, device=self.device))  # only now NCCL connects its members
        except BaseException as error:
            joined.set_exception(error)
        else:
            joined.set_result(None)

    def broadcast(self, data: torch.Tensor) -> None:
        """Rank 0's bytes into everybody's `data` (uint8, on `device`), complete when this returns.

        Errors: RuntimeError when a member is gone or the time is up; the group is of no use afterwards.
        """
        try:
            self._broadcast(data)
        except RuntimeError:
            self.close()  # so that the others need not wait for their limit
            raise

    def _broadcast(self, data: torch.Tensor) -> None:
        deadline = time.monotonic() + self.limit_s
        work = self._group.broadcast([data], torch.distributed.BroadcastOptions())
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RuntimeError(f"no answer from the others within {self.limit_s:g} s")
            time.sleep(POLL_S)
        work.wait(timedelta(seconds=self.limit_s))  # what failed counts as completed too: this raises its error

    def close(self) -> None:
        """Leave, also in the middle of a broadcast."""
        self._left = True
        if self._group is not None:
            self._group.abort()


@contextmanager
def _no_watchdog() -> Iterator[None]:
    """A group that is made meanwhile has no thread that ends the process when a broadcast fails: waiting raises."""
    name = "TORCH_NCCL_BLOCKING_WAIT"  # read when a group is made, by it alone
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
