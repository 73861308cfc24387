"""The group that weights are broadcast in: chosen where it can be, and never a place to wait for ever."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from minigpt.rl.delivery import Delivery
from minigpt.rl.publish import Published
from minigpt.rl.roles import Clock, Roles
from minigpt.rl.transport import WeightGroup, _no_watchdog, choose_transport
from minigpt.rl.workers import Timed

LIMIT_S = 4.0
MEMBER = """
import sys, time, torch
from minigpt.rl.transport import WeightGroup
group = WeightGroup("gloo", ("127.0.0.1", int(sys.argv[1])), 2, 3, 60.0)
data = torch.zeros(1 << 20, dtype=torch.uint8)
group.broadcast(data)
print(int(data.sum()), flush=True)
time.sleep(1000)
"""


def test_auto_broadcasts_only_between_gpus_that_are_all_different():
    apart, shared, mixed, cpus = ["a", "b", "c"], ["a", "b", "a"], ["a", None], [None, None]
    assert [choose_transport("auto", devices) for devices in (apart, shared, mixed, cpus)] == ["nccl", None, None, None]
    assert [choose_transport("broadcast", d) for d in (apart, shared, mixed, cpus)] == ["nccl", "gloo", "gloo", "gloo"]
    assert {choose_transport("store", devices) for devices in (apart, shared, mixed, cpus)} == {None}


@pytest.mark.parametrize("before", [None, "0"])
def test_nccl_is_told_to_leave_the_process_alone_while_the_group_is_made_and_no_longer(before, monkeypatch):
    name = "TORCH_NCCL_BLOCKING_WAIT"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with _no_watchdog():
        assert os.environ[name] == "1"
    assert os.environ.get(name) == before


def test_a_broadcast_that_failed_is_no_success():
    """NCCL says of one that failed that it is completed; waiting for it raises."""

    class Failing:
        aborted = False

        def broadcast(self, *_):
            return self

        def is_completed(self):
            return True

        def wait(self, timeout: timedelta):
            raise RuntimeError("remote process exited")

        def abort(self):
            self.aborted = True

    group = object.__new__(WeightGroup)
    group.limit_s, group._group = LIMIT_S, Failing()
    with pytest.raises(RuntimeError, match="remote process exited"):
        group.broadcast(torch.zeros(1))
    assert group._group.aborted


def test_connecting_the_members_has_a_limit_too(monkeypatch):
    """NCCL does it in the first broadcast, in a call that returns when all are there: here one died on the way."""
    over, left = threading.Event(), threading.Event()

    class Connecting:
        def __init__(self, *_): ...

        def broadcast(self, *_):
            over.wait(20)
            raise RuntimeError("somebody died 20 s ago")

        def abort(self):
            left.set()

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", Connecting)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"not all others joined within 0\.5 s"):
        WeightGroup("gloo", ("127.0.0.1", 0), 0, 1, 0.5)
    assert time.monotonic() - started < 10
    assert left.is_set()
    over.set()


def test_the_wait_for_answers_that_are_under_way_counts_as_generation_and_not_as_publishing():
    """With overlap and samplers that are slower than the policy it is most of a step."""

    class Group:
        def __init__(self, role: str, seconds: float, published: Published | None = None) -> None:
            self.role, self.free, self.published = role, time.monotonic() + seconds, published

        def all(self, method: str, *_):
            return [method]

        def result(self, *_):
            time.sleep(max(0.0, self.free - time.monotonic()))
            return Timed(self.published, 0.0)

        def wait(self, references, _):
            return [self.result() for _ in references]

    policy, rollout = Group("policy", 0.0, Published(1, [])), Group("rollout", 0.3)
    roles = object.__new__(Roles)
    roles.clock, roles._sharing, roles._awake = Clock(), {}, {"policy", "rollout"}
    roles.groups = {"policy": policy, "rollout": rollout}
    roles.delivery = Delivery(policy, rollout, pytest.fail)
    roles.delivery.backend, roles.delivery._joined = "gloo", True
    roles.publish(1)
    assert roles.clock.waited["generate"] > 0.25
    assert roles.clock.waited["publish"] < 0.1
    assert roles.delivery.for_worker(0, 1).version == 1, "it was received"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_a_member_that_is_gone_is_an_error_for_the_others_within_the_limit(how):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    third = subprocess.Popen(
        [sys.executable, "-c", MEMBER, str(port)], stdout=subprocess.PIPE, text=True, env=environment
    )
    gone, errors = threading.Event(), []

    def member(rank: int) -> None:
        group = WeightGroup("gloo", ("127.0.0.1", port), rank, 3, LIMIT_S)
        data = torch.full((1 << 20,), 7 if rank == 0 else 0, dtype=torch.uint8)
        group.broadcast(data)
        assert (data == 7).all()
        gone.wait()
        try:
            for _ in range(3):
                group.broadcast(data)
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=member, args=(rank,)) for rank in (0, 1)]
    try:
        for thread in threads:
            thread.start()
        assert third.stdout is not None
        assert int(third.stdout.readline()) == 7 << 20
        third.send_signal(how)
        if how == signal.SIGKILL:
            third.wait()
        started = time.monotonic()
        gone.set()
        for thread in threads:
            thread.join(120)
        assert len(errors) == 2
        assert time.monotonic() - started < (30 if how == signal.SIGKILL else 100)
    finally:
        third.kill()
        third.wait()
