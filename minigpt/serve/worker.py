"""The loop that drives the engine, and the jobs that the event loop gives it.

The main thread owns the engine, the event loop has a thread of its own. It must be this way round: OpenMP's threads
stop spinning between two products once two threads of a process have used it, and a small model is then decoded at
half its rate. Jobs and cancellations reach it through a queue between two steps; what is new goes back to the event
loop now and then, that of all texts in one call. A token of a text that is already flowing waits a little for company,
the longer the more texts flow, since a message with several tokens costs the server as much as a message with one, and
while the event loop computes, the engine's thread can not. First and last tokens never wait.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt.serve.schemas import ApiError

if TYPE_CHECKING:
    from minigpt.generation.engine import Engine
    from minigpt.generation.request import Request
    from minigpt.generation.sampling import SamplingParams
    from minigpt.generation.text import Decode

DELIVER_SECONDS = 0.02
DELIVER_SECONDS_A_JOB = 0.002  # with 32 texts each gets a message twelve times a second
KEEP_ALIVE_SECONDS = 15.0
RETRY_AFTER_SECONDS = 1
WAKE_SECONDS = 0.5


class Piece(NamedTuple):
    """New tokens of one sample, with their log-probabilities and the most probable tokens at their places if wanted."""

    sample: int
    ids: list[int]
    log_probs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None


@dataclass(eq=False)
class Job:
    """A prompt on its way through the engine.

    Args:
        prompt_ids: Token ids.
        params: For all samples.
        n: Samples.
        first_stream: Number of the first sample's random stream; the others' follow.
        log_probs: Whether they are wanted.
        top_log_probs: Of so many most probable tokens they are wanted as well.
        decode: ids → the text in which the engine looks for stop strings.

    Attributes:
        finish_reasons: Of each sample, when all have ended; None before, and when the job was cancelled.
    """

    prompt_ids: list[int]
    params: SamplingParams
    n: int = 1
    first_stream: int = 0
    log_probs: bool = False
    top_log_probs: int = 0
    decode: Decode | None = None
    finish_reasons: list[str] | None = None
    submitted: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    error: Exception | None = None
    request: Request | None = None  # the engine thread's
    given: list[int] = field(default_factory=list)  # tokens of each sample that were sent; the engine thread's
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    _pieces: list[Piece] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False

    async def batches(self) -> AsyncIterator[list[Piece]]:
        """New tokens as they come; an empty list now and then while nothing comes, for a sign of life.

        Raises:
            ApiError: the engine broke.
        """
        loop = asyncio.get_running_loop()
        sign_of_life = loop.call_later(KEEP_ALIVE_SECONDS, self._news.set)  # one timer for all the tokens of 15 seconds
        try:
            while not self.cancelled:
                self._news.clear()
                pieces, self._pieces = self._pieces, []
                if pieces:
                    yield pieces
                elif self._ended:
                    break
                else:
                    if sign_of_life.when() <= loop.time():
                        sign_of_life = loop.call_later(KEEP_ALIVE_SECONDS, self._news.set)
                    await self._news.wait()
                    if sign_of_life.when() <= loop.time() and not (self._pieces or self._ended or self.cancelled):
                        yield []
        finally:
            sign_of_life.cancel()
        if self.error is not None:
            raise self.error

    def take(self, pieces: list[Piece], ended: bool) -> None:
        """News from the engine; on the event loop."""
        self._pieces += pieces
        self._ended = self._ended or ended
        self.accepted.set()
        self._news.set()

    def collect(self) -> list[Piece]:
        """What the engine added since the last call; on the engine's thread."""
        if self.request is None:
            return []
        pieces = []
        for sample, completion in enumerate(self.request.completions):
            start, end = self.given[sample], len(completion.ids)
            if end > start:
                log_probs = None if completion.log_probs is None else completion.log_probs[start:end]
                top = None if completion.top_log_probs is None else completion.top_log_probs[start:end]
                pieces.append(Piece(sample, completion.ids[start:end], log_probs, top))
                self.given[sample] = end
        return pieces

    def wake(self) -> None:
        """Lets `batches` see that the job was cancelled."""
        self.accepted.set()
        self._news.set()


class EngineWorker:
    """Runs jobs on an engine.

    Args:
        engine: Nobody else may touch it from now on.
        max_waiting: Sequences that may wait when all slots are taken; one more is refused with status 429.

    Attributes:
        on_crash: Called on the event loop when the engine broke; jobs then end with an exception.
        in_flight: Sequences that were submitted and have not ended.
        crashed: The exception that broke the engine, None while it works.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self.engine, self.capacity = engine, engine.slots + max_waiting
        self.in_flight = 0
        self.crashed: Exception | None = None
        self.on_crash: Callable[[], None] | None = None
        self._ending = False
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._live: set[Job] = set()  # the event loop's
        self._jobs: dict[Any, Job] = {}  # by the engine's request; the engine thread's, as all below
        self._silent: set[Job] = set()  # of which nothing was sent yet
        self._delivered = 0.0
        self._loop: asyncio.AbstractEventLoop

    # ----------------------------------------------------------------------------------------------- on the event loop

    def attach(self) -> None:
        """Makes the running event loop the one that jobs come from."""
        self._loop = asyncio.get_running_loop()

    async def drain(self, seconds: float, hurried: Callable[[], bool] = lambda: False) -> None:
        """Takes no new jobs, and gives those that are under way so long to end, or until `hurried` is true."""
        self._ending = True
        until = time.perf_counter() + seconds
        while self._live and time.perf_counter() < until and not hurried():
            await asyncio.sleep(0.05)
        for job in list(self._live):
            self.cancel(job)
            job.error = ApiError("the server is ending; what was made of the answer is not all of it", status=503)

    def stop(self) -> None:
        """Lets `run` return after the step that is under way."""
        self._inbox.put(None)

    def reserve(self, sequences: int) -> None:
        """Room for so many sequences.

        Raises:
            ApiError: as `check_room`.
        """
        self.check_room(sequences)
        self.in_flight += sequences

    def check_room(self, sequences: int) -> None:
        """Whether so many sequences would be taken now.

        Raises:
            ApiError: 400 when there could never be enough, 429 when there is not enough now.
        """
        if self._ending or self.crashed is not None:
            raise ApiError("the server is ending", status=503)
        if sequences > self.capacity:
            raise ApiError(
                f"{sequences} texts in one request; this server takes at most {self.capacity} at once", param="n"
            )
        if self.in_flight + sequences > self.capacity:
            raise ApiError(
                f"the server is busy: {self.in_flight} texts are being made or waiting; try again in a moment",
                status=429,
                code="rate_limit_exceeded",
                headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
            )

    async def submit(self, job: Job) -> None:
        """Hands a job to the engine; its room must be reserved.

        Raises:
            ApiError: the engine refuses it, or broke.
        """
        self._live.add(job)
        self._inbox.put(lambda: self._submit(job))
        if self.crashed is not None:
            self._fail_all()
        await job.accepted.wait()
        if isinstance(job.error, ValueError):
            raise ApiError(str(job.error)) from job.error
        if job.error is not None:
            raise job.error

    def cancel(self, job: Job) -> None:
        """Nobody wants this job any longer: its slots are free at the next step."""
        if job.cancelled or job.finish_reasons is not None or job.error is not None:
            return
        job.cancelled = True
        job.wake()
        self._inbox.put(lambda: self._cancel(job))

    def _fail_all(self) -> None:
        """The engine has broken: whoever waits for an answer, or for a place, is told so."""
        for job in list(self._live):
            job.error = ApiError("the engine has broken down; the server's log says why", status=500)
            self._deliver([(job, [], True)])

    def _deliver(self, news: list[tuple[Job, list[Piece], bool]]) -> None:
        for job, pieces, ended in news:
            if ended:
                self.in_flight -= job.n
                self._live.discard(job)
            job.take(pieces, ended)

    # ------------------------------------------------------------------------------------------------- engine's thread

    def run(self) -> None:
        """Drives the engine until `stop`, or until it breaks."""
        try:
            while self._take_orders():
                finished = []
                for request in self.engine.step():
                    job = self._jobs.pop(request, None)
                    if job is not None:
                        job.finish_reasons = [completion.finish_reason for completion in request.completions]
                        finished.append(job)
                self._flush(finished)
        except Exception as error:
            self._crash(error)

    def _take_orders(self) -> bool:
        """Submits and cancels what was asked for; waits for orders while there is no work. False: stop."""
        while True:
            try:
                # Not for ever: a signal that comes just before the wait is handled only after it
                order = self._inbox.get(block=not self.engine.has_work, timeout=WAKE_SECONDS)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _submit(self, job: Job) -> None:
        if job.cancelled:
            self._send([(job, [], True)])
            return

        try:
            job.request = self.engine.submit(
                job.prompt_ids,
                job.params,
                n=job.n,
                sequence_ids=range(job.first_stream, job.first_stream + job.n),
                decode=job.decode,
                log_probs=job.log_probs,
                top_log_probs=job.top_log_probs,
            )
        except ValueError as error:  # a sentence about the prompt
            job.error = error
            self._send([(job, [], True)])
            return
        self._jobs[job.request], job.given = job, [0] * job.n
        self._silent.add(job)
        self._on_loop(job.accepted.set)

    def _cancel(self, job: Job) -> None:
        if job.request is not None and job.request in self._jobs:
            del self._jobs[job.request]
            self._silent.discard(job)
            self.engine.cancel(job.request)
            self._send([(job, [], True)])

    def _flush(self, finished: list[Job]) -> None:
        """Sends what is urgent: first and last tokens; and now and then everything."""
        now = time.perf_counter()
        if now - self._delivered >= DELIVER_SECONDS + DELIVER_SECONDS_A_JOB * len(self._jobs):
            chosen, self._delivered = list(self._jobs.values()), now
        else:
            chosen = [job for job in self._silent if job.finish_reasons is None]
        news = [(job, job.collect(), True) for job in finished]
        news += [(job, pieces, False) for job in chosen if (pieces := job.collect())]
        self._silent.difference_update(job for job, _, _ in news)
        if news:
            self._send(news)

    def _on_loop(self, act: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the event loop has ended in the middle of a long step: nobody listens
            self._loop.call_soon_threadsafe(act, *arguments)

    def _send(self, news: list[tuple[Job, list[Piece], bool]]) -> None:
        self._on_loop(self._deliver, news)

    def _crash(self, error: Exception) -> None:
        import traceback

        traceback.print_exc()
        self.crashed = error
        self._send([(job, job.collect(), False) for job in self._jobs.values()])
        self._jobs.clear()
        self._on_loop(self._fail_all)  # also those that still lie in the inbox
        if self.on_crash is not None:
            self._on_loop(self.on_crash)
