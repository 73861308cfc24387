"""A member of a group that weights are broadcast in, as a process that starts fast: it imports little."""

from collections.abc import Sequence
from typing import Any

import torch

from minigpt.rl.transport import Backend, WeightGroup

LIMIT_S = 60.0  # for all to start
SILENCE_S = 2.0  # until a member that does not answer counts as gone
ENDLESS = 512 << 20  # bytes that fit into no buffer on the way, of which NCCL has some MiB a channel


def take_part(backend: Backend, ports: Sequence[int], rank: int, size: int, all_are_here: Any) -> None:
    """Join one group after the other, each at its port; all but the last end with a broadcast that nobody answers."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
    for port in ports:
        group = WeightGroup(backend, ("127.0.0.1", port), rank, size, LIMIT_S)
        for length in (1, 1 << 20):
            expected = torch.arange(1, 1 + length).remainder(251).to(torch.uint8)
            data = (expected if rank == 0 else torch.zeros_like(expected)).to(group.device)
            group.broadcast(data)
            assert torch.equal(data.cpu(), expected)
        if rank == 0 and size > 1 and port != ports[-1]:
            group.limit_s = SILENCE_S
            assert "no answer from the others within 2 s" in failure_of(group, torch.empty(ENDLESS, dtype=torch.uint8))
        all_are_here.wait(LIMIT_S)  # who keeps silent does not leave
        group.close()


def failure_of(group: WeightGroup, data: torch.Tensor) -> str:
    """Why a broadcast of the data fails."""
    try:
        group.broadcast(data.to(group.device))
    except RuntimeError as error:
        return str(error)
    return ""
