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

from minigpt.rl.transport import WeightGroup, _no_watchdog, choose_transport

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
