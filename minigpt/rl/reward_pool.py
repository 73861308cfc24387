"""Rewards of a batch, computed in processes that may hang, crash or run out of memory without harm to the training.

A worker (`reward_worker.py`) gets a part of the batch and answers call by call. So when it falls silent or dies, it is
known at once which reward function did that with which completion: that call is a failure, a new worker is started and
goes on behind it. Nothing is computed twice, and results keep the order of the batch.

The process pools of the standard library cannot end one hung call. Pebble's can, but a worker that dies between calls
breaks the whole pool, one that leaves with status 0 is noticed only when its time is over, and like all pools upon
`multiprocessing` it imports the main program, torch included, in every worker.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np

from minigpt.errors import UserError
from minigpt.rl.reward_worker import OUT_OF_MEMORY

START_SECONDS = 60.0
"""For imports; also for taking a batch, which needs milliseconds unless the machine swaps."""
CHUNKS_A_PROCESS = 4  # of a batch, so that one slow completion does not leave the other workers idle
MAX_FAILURES = 5
HOPELESS_PROMPTS, HOPELESS_CALLS = 8, 3
"""A reward that is too slow for answers to so many prompts of a batch, in so many calls for each process, and in time
for none, is broken. (All answers to one prompt may hang; a machine that stalls makes a call of every process late.)"""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Many small processes want one thread each; OpenBLAS also takes address space for each thread that it might start."""

Item = tuple[str, str, Mapping[str, Any]]


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch of N completions, in its order.

    Attributes:
        rewards: Σ weight · part, float32 [N].
        parts: Each reward before its weight, float32 [N], by its name; each further metric that it returned as
            `name/metric`, NaN where a completion has none.
        failures: What went wrong, one sentence each; the first few.
        failed: Completions for which a reward function failed, bool [N]. That part is the worst of the batch, or 0.
    """

    rewards: np.ndarray
    parts: dict[str, np.ndarray]
    failures: list[str]
    failed: np.ndarray


class RewardPool:
    """Computes rewards in worker processes with a time and a memory limit.

    Args:
        specs: As `parse_rewards` takes them: `accuracy`, `format=0.5`, `my.module:function`, `rewards.py:function=2`.
        processes: Workers.
        timeout: Seconds that one call of one reward function may take.
        memory_mb: MiB of address space that a worker may use.

    A call that hangs, crashes, raises or returns no finite number is a failure. It counts as the worst that the
    function returned for another completion of the batch, or as 0 if that is worse: where all values are negative, an
    answer that could not be judged must not be the best. (Left out of the loss, what makes a verifier hang would be
    free.) The first call that hangs is told at once, on stderr: each of them costs the whole limit of time.

    Raises:
        UserError: a spec is wrong or its module cannot be imported; a limit makes no sense.

    Example:
        >>> with RewardPool(["accuracy", "format=0.2"]) as pool:
        ...     scores = pool.score(prompts, completions, references)
        >>> scores.rewards.mean(), scores.parts["accuracy"].mean(), scores.failures
    """

    def __init__(
        self,
        specs: Sequence[str],
        *,
        processes: int = 1,
        timeout: float = 5.0,
        memory_mb: int = 2048,
    ) -> None:
        for name, value in {"processes": processes, "timeout": timeout, "memory_mb": memory_mb}.items():
            if not 0 < value < math.inf:
                raise UserError(f"rewards with {name}={value} cannot be computed: give a number above 0")
        self.timeout = timeout
        self._told = False  # that a call took too long
        self._workers = [_Worker(list(specs), memory_mb) for _ in range(processes)]
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # A worker dies with the thread that started it. These threads live as long as the pool.
        self._threads = ThreadPoolExecutor(processes, "rewards")
        try:
            described = list(self._threads.map(_Worker.start, self._workers))
        except BaseException:
            self.close()
            raise
        self.names: list[str] = described[0]["names"]
        self.weights: list[float] = described[0]["weights"]

    def score(
        self, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Mapping[str, Any]]
    ) -> Scores:
        """Rewards of N completions; `minigpt.rl.rewards` says what the three arguments of each are.

        Errors: UserError when a reward is too slow for whatever it is asked, or no process can take the batch.
        """
        items = list(zip(prompts, completions, map(dict, references), strict=True))
        chunks = CHUNKS_A_PROCESS * len(self._workers) if len(self._workers) > 1 else 1
        size = max(1, math.ceil(len(items) / chunks))
        late: dict[str, list[str]] = {name: [] for name in self.names}
        score_items = partial(self._score_items, late=late)
        parts = self._threads.map(score_items, [items[i : i + size] for i in range(0, len(items), size)])
        return self._collect([reply for part in parts for reply in part], len(items))

    def _score_items(self, items: list[Item], late: dict[str, list[str]]) -> list[dict[str, Any]]:
        """One reply for each item and reward: {"reward", "metrics"} or {"error"}.

        Args:
            items: What to judge.
            late: By reward, the prompt of each call of the whole batch that took too long, until one is in time.
        """
        worker = self._idle.get()
        replies: list[dict[str, Any]] = []
        try:
            while len(replies) < len(items) * len(self.names):
                worker.send(items, len(replies))
                while len(replies) < len(items) * len(self.names):
                    item, index = divmod(len(replies), len(self.names))
                    reply = worker.receive(self.timeout)
                    replies.append(reply)
                    if reply.get("late"):
                        self._note_late(self.names[index], items[item][0], late)
                    else:
                        late.pop(self.names[index], None)
                    if not worker.alive:
                        break
        finally:
            self._idle.put(worker)
        return replies

    def _note_late(self, name: str, prompt: str, late: dict[str, list[str]]) -> None:
        if not self._told:
            self._told = True
            print(
                f"the reward {name} took more than {self.timeout:g} s (--reward_timeout); each such call is a failure, "
                "and the step waits for it",
                file=sys.stderr,
                flush=True,
            )
        calls = late.get(name, [])
        calls.append(prompt)
        prompts = len(set(calls))
        if name in late and prompts >= HOPELESS_PROMPTS and len(calls) >= HOPELESS_CALLS * len(self._workers):
            raise UserError(
                f"the reward {name} took more than {self.timeout:g} s for answers to {prompts} prompts and was in time "
                "for none: mend it, or raise --reward_timeout"
            )

    def _collect(self, replies: list[dict[str, Any]], n: int) -> Scores:
        parts: dict[str, np.ndarray] = {name: np.zeros(n, dtype=np.float32) for name in self.names}
        failed, failures = np.zeros((len(self.names), n), dtype=bool), []
        for call, reply in enumerate(replies):
            i, index = divmod(call, len(self.names))
            name = self.names[index]
            if "error" in reply:
                failed[index, i] = True
                failures.append(f"{name} {reply['error']} on completion {i}")
                continue
            parts[name][i] = reply["reward"]
            for metric, value in reply["metrics"].items():
                parts.setdefault(f"{name}/{metric}", np.full(n, np.nan, dtype=np.float32))[i] = value
        rewards = np.zeros(n, dtype=np.float64)
        for name, weight, lost in zip(self.names, self.weights, failed, strict=True):
            values = parts[name]  # 0 where it failed
            if lost.any():
                values[lost] = values.max() if weight < 0 else values.min()
            rewards += weight * values.astype(np.float64)
        return Scores(rewards.astype(np.float32), parts, failures[:MAX_FAILURES], np.logical_or.reduce(failed))

    def close(self) -> None:
        """End the workers, also those in the middle of a call. A second time it does nothing."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """One process, started again whenever it had to be ended. Used by one thread at a time, except for `close`."""

    def __init__(self, specs: list[str], memory_mb: int) -> None:
        paths = [path or os.getcwd() for path in sys.path]
        self.setup: dict[str, Any] = {"specs": specs, "memory_mb": memory_mb, "sys_path": [*paths, os.getcwd()]}
        self.memory_mb = memory_mb
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.closed = False

    @property
    def alive(self) -> bool:
        """Whether there is a process that is not known to be dead."""
        return self.process is not None

    def start(self) -> dict[str, Any]:
        """Start the process and let it import the rewards; returns their names and weights."""
        if self.closed:
            raise RuntimeError("the reward pool was closed")
        self.connection, theirs = Pipe()
        _limit_sending(self.connection, START_SECONDS)
        script = Path(__file__).with_name("reward_worker.py")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **ONE_THREAD},
                start_new_session=True,  # Ctrl-C is the pool's business, and what a reward starts ends with its group
            )
        if self.closed:
            self._kill()
        with contextlib.suppress(OSError):  # it died at once: `receive` says how
            self.connection.send(self.setup)
        described = self.receive(START_SECONDS)
        if "error" not in described:
            return described
        if not self.alive:
            raise UserError(f"importing the rewards {', '.join(self.setup['specs'])} {described['error']}")
        self.stop()
        raise UserError(described["error"])

    def send(self, items: list[Item], first_call: int) -> None:
        """Give the process a batch, of which the calls before `first_call` are done."""
        for _ in range(2):  # it may have died since the last batch: no fault of this one
            if self.process is None:
                self.start()
            assert self.connection is not None
            try:
                self.connection.send((items, first_call))
            except OSError:
                self.stop()
                continue
            if "error" not in self.receive(START_SECONDS):
                return
        raise UserError(f"reward processes with memory_mb={self.memory_mb} die of taking a batch: raise that number")

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next reply; when there is none, {"error"}, "late" if it is that, and the process is ended."""
        assert self.connection is not None
        try:
            if self.connection.poll(seconds):
                return json.loads(self.connection.recv_bytes())
            failure: dict[str, Any] = {"error": f"took more than {seconds:g} s", "late": True}
        except (EOFError, OSError):
            failure = {"error": self._cause_of_death()}
        if self.closed:
            raise RuntimeError("the reward pool was closed")
        self.stop()
        return failure

    def _cause_of_death(self) -> str:
        assert self.process is not None
        try:
            status = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return "closed the connection of its process"
        if status == OUT_OF_MEMORY:
            return f"needed more than {self.memory_mb:,} MB"
        return f"ended its process ({signal.strsignal(-status) if status < 0 else f'status {status}'})"

    def close(self) -> None:
        """Kill the process for good. A thread that waits for it notices and gives up."""
        self.closed = True
        self._kill()

    def stop(self) -> None:
        """Kill the process, and what it started, and forget it."""
        self._kill()
        if self.process is not None:
            self.process.wait()
            self.process = None
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _kill(self) -> None:
        process = self.process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _limit_sending(connection: Connection, seconds: float) -> None:
    """Let sends fail with OSError when the other side does not read: a hung thread of its may keep it from that."""
    with socket.socket(fileno=os.dup(connection.fileno())) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), 0))
