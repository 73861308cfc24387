"""Groups of Ray actors: N workers of a role, placed as the layout says, called together.

Every wait has a time limit and a name, and a dead worker is a `WorkerDied` that says which one it was and what it said
last; nothing hangs without a word.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from minigpt.errors import UserError

from .layout import Bundle, Layout

PLACING_SECONDS = 120.0  # until a new worker answers
DEATH_NOTICE_SECONDS = 5.0  # until Ray knows that a process ended


class WorkerDied(Exception):
    """A worker's process ended.

    Attributes:
        role, rank: Which worker's.
    """

    def __init__(self, role: str, rank: int, why: str) -> None:
        super().__init__(f"{role} worker {rank} died: {why}")
        self.role, self.rank = role, rank


class WorkerHung(UserError):
    """A worker's method did not end in time. A rollout worker is replaced like a dead one; others end the run.

    Attributes:
        role, rank: Which worker's.
        what: What happened, without what to do about it.
    """

    def __init__(self, role: str, rank: int, what: str, seconds: float) -> None:
        self.what = (
            f"{role} worker {rank} did not finish to {what} within {seconds:g} s (if it is only slow, raise --timeout)"
        )
        super().__init__(f"{self.what}; the same command goes on from the last checkpoint that --save_interval left")
        self.role, self.rank = role, rank


class WorkerFailed(Exception):
    """A worker's method raised something that is no sentence for a person.

    Attributes:
        traceback: The worker's, with its name and process, line by line.
    """

    def __init__(self, role: str, rank: int, what: str, reason: str, traceback: str) -> None:
        super().__init__(f"{role} worker {rank} failed to {what}: {reason}")
        self.traceback = traceback


class InputLost(WorkerDied):
    """What a worker was to fetch from the object store died with whoever had put it there.

    Attributes:
        reference: The object's number, as `ObjectRef.hex` gives it.
    """

    def __init__(self, role: str, rank: int, reference: str) -> None:
        super().__init__(role, rank, "what it was to read is gone")
        self.reference = reference


class WorkerGroup:
    """The workers of a role.

    Args:
        worker: Their class.
        role: Its name in the layout.
        layout: How many there are, and what each needs.
        bundles: The bundles of the placement group.
        placement: The placement group.
        arguments: Of the class, behind `rank`, `world_size` and `threads`.
        timeout: Seconds after which a call counts as hung.
    """

    def __init__(
        self,
        worker: type,
        role: str,
        layout: Layout,
        bundles: list[Bundle],
        placement: PlacementGroup,
        arguments: tuple[Any, ...],
        timeout: float,
    ) -> None:
        self.role, self.timeout = role, timeout
        self.needs = layout[role]
        self._worker, self._arguments, self._placement = worker, arguments, placement
        self._bundle_of = {rank: i for i, b in enumerate(bundles) for name, rank in b.workers if name == role}
        self.workers = [self._start(rank) for rank in range(self.needs.workers)]

    def __len__(self) -> int:
        return len(self.workers)

    def _start(self, rank: int) -> Any:
        where = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=self._bundle_of[rank])
        options: dict[str, Any] = {
            "num_cpus": self.needs.cpus,
            "num_gpus": self.needs.gpus,
            "scheduling_strategy": where,
            "max_restarts": 0,  # an actor that Ray restarts is an empty one
            "max_task_retries": 0,  # and a call that it repeats runs twice
        }
        if not self.needs.gpus and ray.cluster_resources().get("GPU"):
            # Ray leaves the GPUs visible to those that asked for none, and DeepSpeed would take one
            options["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}}
        actor: Any = ray.remote(self._worker).options(**options)
        return actor.remote(rank, self.needs.workers, self.needs.threads, *self._arguments)

    def restart(self, rank: int) -> None:
        """A new worker in the place of a dead or hung one; it knows nothing but what it was constructed with.

        Errors: WorkerDied when there is no place for it any more: its node is gone.
        """
        ray.kill(self.workers[rank])
        self.workers[rank] = self._start(rank)
        (there, _) = ray.wait([self.one(rank, "ping")], timeout=PLACING_SECONDS)
        if not there:
            raise WorkerDied(self.role, rank, f"no new one could be started within {PLACING_SECONDS:.0f} s")

    def all(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        """Call a method on all workers at the same time; returns references, one a worker."""
        return [getattr(worker, method).remote(*arguments) for worker in self.workers]

    def one(self, rank: int, method: str, *arguments: Any) -> ray.ObjectRef:
        """Call a method on one worker."""
        return getattr(self.workers[rank], method).remote(*arguments)

    def wait(self, references: Sequence[ray.ObjectRef], what: str) -> list[Any]:
        """The results of `all`, in order.

        Errors: WorkerDied; WorkerHung; UserError when a worker raised one; WorkerFailed when it raised another.
        """
        pending, ranks = list(references), {ref: rank for rank, ref in enumerate(references)}

        def errors(ready: list[ray.ObjectRef]) -> list[Exception]:
            found = []
            for ref in ready:
                try:
                    self.result(ref, ranks[ref], what)
                except Exception as error:
                    found.append(error)
            return found

        ready, unready = ray.wait(pending, num_returns=len(pending), timeout=0)
        while unready and not errors(ready):
            before = len(ready)
            ready, unready = ray.wait(pending, num_returns=before + 1, timeout=self.timeout)
            if len(ready) == before:
                raise WorkerHung(self.role, ranks[unready[0]], what, self.timeout)
        if unready:  # a rank whose neighbour dies fails too, and perhaps sooner: the death is what to report
            ready, unready = ray.wait(pending, num_returns=len(pending), timeout=DEATH_NOTICE_SECONDS)
        for error in sorted(errors(ready), key=lambda error: not isinstance(error, WorkerDied)):
            raise error
        return [self.result(ref, ranks[ref], what) for ref in references]

    def result(self, reference: ray.ObjectRef, rank: int, what: str) -> Any:
        """One result; errors as in `wait`."""
        try:
            return ray.get(reference, timeout=self.timeout)
        except GetTimeoutError:
            raise WorkerHung(self.role, rank, what, self.timeout) from None
        except RayTaskError as error:  # before the others, since it is an instance of its cause's class, too
            cause = error.cause
            if isinstance(cause, UserError):
                raise cause from error
            if isinstance(cause, ObjectLostError):
                raise InputLost(self.role, rank, cause.object_ref_hex) from error
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
            raise WorkerFailed(self.role, rank, what, reason, _plain(error)) from error
        except RayActorError as error:
            if error.actor_init_failed:  # another one would end in the same way
                raise WorkerFailed(self.role, rank, "start", _last_words(error), _plain(error)) from error
            raise WorkerDied(self.role, rank, _last_words(error)) from error
        except OutOfMemoryError as error:  # Ray ended it before its node had none left
            raise WorkerDied(self.role, rank, _plain(error).partition("\n")[0]) from error
        except ObjectLostError as error:  # it may live, but what it returned lay in the memory of a node that is gone
            raise WorkerDied(self.role, rank, "what it returned is lost, as with its node") from error

    def kill(self) -> None:
        """End all workers."""
        for worker in self.workers:
            ray.kill(worker)


def _plain(error: Exception) -> str:
    """What Ray says, without its colours."""
    return re.sub(r"\x1b\[\d*m", "", str(error))


def _last_words(error: RayActorError) -> str:
    """The cause, which Ray tells behind lines that every death has: class, actor, process, address."""
    lines = [line.strip() for line in _plain(error).splitlines() if line.strip()]
    if error.actor_init_failed:  # a traceback ends with it, and CUDA's errors end with lines of advice
        named = (line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line))
        return next(named, lines[-1])
    told = next((line for line in lines if " because " in line), lines[0])
    return told.rpartition("Worker exit type: ")[2]


def place(bundles: list[Bundle], seconds: float) -> PlacementGroup:
    """Reserve the bundles, on as few nodes as possible. What the cluster has must have been checked before.

    Errors: UserError when they are taken by others for too long.
    """
    group = placement_group([bundle.resources for bundle in bundles], strategy="PACK")
    if not group.wait(seconds):
        remove_placement_group(group)
        wanted = ", ".join(f"{bundle.resources} for {bundle.workers}" for bundle in bundles)
        raise UserError(f"the cluster has no room now for {wanted}: other jobs hold it; wait for them or end them")
    return group


def own_address() -> tuple[str, int]:
    """This node's address and a free port on it, for ranks to meet at."""
    import socket

    host = ray.util.get_node_ip_address()
    with socket.socket() as listener:
        listener.bind(("", 0))
        return host, listener.getsockname()[1]


def join_environment(rank: int, world_size: int, address: tuple[str, int] | None) -> None:
    """What `init_processes` reads of a rank that meets others at `address`; alone without one."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    if address is not None and world_size > 1:
        os.environ.update(MASTER_ADDR=address[0], MASTER_PORT=str(address[1]))
