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
import ray
import torch

from minigpt.rl.delivery import Delivery
from minigpt.rl.group import WorkerDied, WorkerHung
from minigpt.rl.publish import Published
from minigpt.rl.roles import GONE_SECONDS, Clock, Roles
from minigpt.rl.transport import WeightGroup, _no_watchdog, choose_transport, limit_within
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


@pytest.mark.parametrize("where", ["in making the group", "in its first broadcast"])
def test_connecting_the_members_has_a_limit_too(where, monkeypatch):
    """NCCL does it in the first broadcast, in a call that returns when all are there: here one died on the way, or all
    come when nobody waits for them any more."""
    over, left, sent = threading.Event(), threading.Event(), threading.Event()

    class Connecting:
        def __init__(self, *_):
            if where == "in making the group":
                over.wait(20)

        def broadcast(self, *_):
            sent.set()
            over.wait(20)
            raise RuntimeError("somebody died 20 s ago")

        def abort(self):
            left.set()

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", Connecting)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"not all others joined within 2 s"):
        WeightGroup("gloo", ("127.0.0.1", 0), 0, 1, 2.0)
    assert time.monotonic() - started < 15
    assert left.is_set() == (where == "in its first broadcast")
    over.set()
    assert left.wait(20), "who comes too late leaves"
    assert sent.is_set() == (where == "in its first broadcast")


def test_who_is_waited_for_in_vain_is_told_of_before_the_wait_itself_counts_as_hung():
    assert [limit_within(timeout) for timeout in (1800.0, 240.0, 120.0, 6.0)] == [120.0, 120.0, 60.0, 3.0]


class Group:
    """Workers of a role whose calls return at once, or raise; the first one after so many seconds."""

    def __init__(self, role: str, happened: list[str], result: object = None, seconds: float = 0.0, **errors) -> None:
        self.role, self.happened, self.value, self.seconds, self.errors = role, happened, result, seconds, errors
        self.timeout, self.workers = 60.0, [role]

    def all(self, method: str, *_):
        self.happened.append(f"{self.role}: {method}")
        return [method]

    def result(self, method: str, *_):
        time.sleep(self.seconds)
        self.seconds = 0.0
        if method in self.errors:
            raise self.errors[method]
        return Timed(self.value, 0.0)

    def wait(self, references, _):
        return [self.result(reference) for reference in references]


def make_roles(policy: Group, rollout: Group, said: list[str]) -> Roles:
    """Of two groups that have joined for a broadcast; the samplers are awake."""
    roles = object.__new__(Roles)
    roles.clock, roles._sharing, roles._awake, roles.say = Clock(), {}, {"policy", "rollout"}, said.append
    roles.groups = {"policy": policy, "rollout": rollout}
    roles.delivery = Delivery(policy, rollout, said.append)
    roles.delivery.backend, roles.delivery._joined = "gloo", True
    return roles


@pytest.fixture
def happened(monkeypatch) -> list[str]:
    """What is done to workers, in order."""
    found: list[str] = []
    monkeypatch.setattr(ray, "kill", lambda worker: found.append(f"{worker}: ended"))
    monkeypatch.setattr(ray, "wait", lambda references, **_: (references, []))
    return found


def test_the_wait_for_answers_that_are_under_way_counts_as_generation_and_not_as_publishing(happened):
    """With overlap and samplers that are slower than the policy it is most of a step."""
    policy, rollout = Group("policy", happened, Published(1, [])), Group("rollout", happened, seconds=0.3)
    roles = make_roles(policy, rollout, said := [])
    roles.publish(1)
    assert roles.clock.waited["generate"] >= 0.3
    assert roles.clock.waited["publish"] < 0.3
    assert happened == ["rollout: ping", "rollout: receive", "policy: publish"]
    assert roles.delivery.for_worker(0, 1).version == 1, "it was received"
    assert not said


HUNG = WorkerHung("rollout", 0, "answer", 6.0)
DEAD = WorkerDied("rollout", 0, "it was killed")


@pytest.mark.parametrize(("error", "ending"), [(HUNG, ["rollout: ended"]), (DEAD, [])], ids=["hangs", "is dead"])
def test_to_who_cannot_listen_nothing_is_broadcast_and_the_run_goes_on(happened, error, ending):
    policy, rollout = Group("policy", happened, Published(1, [])), Group("rollout", happened, ping=error)
    make_roles(policy, rollout, said := []).publish(1)
    assert happened == ["rollout: ping", *ending, "policy: publish"], "asked once, and nobody receives"
    hint = "(if it is only slow, raise --timeout)"
    assert said == [f"rollout worker 0 did not finish to answer within 6 s {hint}; it is ended"] * len(ending)


@pytest.mark.parametrize(
    ("errors", "wait"),
    [({}, []), ({"sleep": DEAD}, ["waited"]), ({"sleep": HUNG}, ["rollout: ended", "waited"])],
    ids=["sleeps", "is dead", "hangs"],
)
def test_the_policy_wakes_when_the_device_is_free_again(happened, errors, wait, monkeypatch):
    """A process that is ended holds its memory until it is gone."""
    roles = make_roles(Group("policy", happened), Group("rollout", happened, **errors), [])
    roles._sharing, roles._awake = {"policy": {"rollout"}}, {"rollout"}
    monkeypatch.setattr(time, "sleep", lambda seconds: happened.append("waited") if seconds == GONE_SECONDS else None)
    roles._turn("policy")
    assert happened == ["rollout: sleep", *wait, "policy: wake"]


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
