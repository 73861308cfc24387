"""A job between the engine's thread and the event loop, and what becomes of it when one of them ends."""

import asyncio
import threading

import pytest

from minigpt.generation.request import Request
from minigpt.generation.sampling import SamplingParams
from minigpt.serve import worker
from minigpt.serve.schemas import ApiError
from minigpt.serve.worker import EngineWorker, Job, Piece


async def all_of(job: Job) -> list[int]:
    return [token async for batch in job.batches() for piece in batch for token in piece.ids]


def test_tokens_that_came_before_anybody_listened_are_not_lost():
    async def run() -> list[int]:
        job = Job([1], SamplingParams())
        job.take([Piece(0, [5])], ended=False)
        job.take([Piece(0, [6])], ended=True)
        return await all_of(job)

    assert asyncio.run(run()) == [5, 6]


def test_a_waiting_listener_gets_signs_of_life_then_tokens_then_the_end(monkeypatch):
    monkeypatch.setattr(worker, "KEEP_ALIVE_SECONDS", 0.01)

    async def run() -> list[list[int]]:
        job = Job([1], SamplingParams())
        batches = job.batches()
        seen = [await anext(batches)]
        job.take([Piece(0, [7])], ended=True)
        return seen + [batch async for batch in batches]

    assert asyncio.run(run()) == [[], [Piece(0, [7])]]


def test_a_cancelled_job_ends_at_once_and_a_broken_engine_is_told():
    async def run() -> list[int]:
        cancelled = Job([1], SamplingParams())
        cancelled.cancelled = True
        cancelled.take([Piece(0, [5])], ended=False)
        ids = await all_of(cancelled)
        broken = Job([1], SamplingParams(), error=ApiError("broken", status=500))
        broken.take([], ended=True)
        with pytest.raises(ApiError, match="broken"):
            await all_of(broken)
        return ids

    assert asyncio.run(run()) == []


class Stuck:
    """An engine whose first step lasts until it is let go, and then breaks or has made nothing."""

    slots = 1

    def __init__(self) -> None:
        self.steps, self.go = threading.Event(), threading.Event()
        self.has_work, self.breaks = False, True

    def submit(self, *_: object, **__: object) -> object:
        self.has_work = True
        return Request([1], SamplingParams(), n=1, log_probs=False)

    def cancel(self, request: object) -> None:
        self.has_work = False

    def step(self) -> list:
        self.steps.set()
        self.go.wait(30)
        if self.breaks:
            raise RuntimeError("out of memory")
        return []


@pytest.fixture
def stuck():
    """A worker whose engine is in the middle of a step, and the coroutine that tells how its jobs end."""
    engine = Stuck()
    worker = EngineWorker(engine, max_waiting=9)
    thread = threading.Thread(target=worker.run)

    async def outcome(job: Job) -> ApiError:
        try:
            await worker.submit(job)
            await all_of(job)
        except ApiError as error:
            return error
        raise AssertionError("it ended as if all were well")

    def start() -> None:
        worker.attach()
        thread.start()

    yield engine, worker, start, outcome
    engine.go.set()
    worker.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_a_broken_engine_is_told_to_those_that_ran_and_to_those_that_waited_to_be_taken(stuck):
    engine, worker, start, outcome = stuck

    async def run() -> list[ApiError]:
        start()
        worker.reserve(2)
        first = asyncio.create_task(outcome(Job([1], SamplingParams())))
        await asyncio.to_thread(engine.steps.wait, 30)
        second = asyncio.create_task(outcome(Job([1], SamplingParams())))  # the engine never sees it
        await asyncio.sleep(0)
        engine.go.set()
        return [await asyncio.wait_for(first, 30), await asyncio.wait_for(second, 30)]

    errors = asyncio.run(run())
    assert [error.status for error in errors] == [500, 500]
    assert worker.in_flight == 0


@pytest.mark.parametrize(("seconds", "hurried"), [(0.1, False), (1e6, True)])
def test_an_answer_that_a_server_cannot_finish_or_is_not_to_wait_for_is_no_answer(seconds, hurried, stuck):
    engine, worker, start, outcome = stuck

    async def run() -> ApiError:
        engine.breaks = False
        start()
        worker.reserve(1)
        asked = asyncio.create_task(outcome(Job([1], SamplingParams())))
        await asyncio.to_thread(engine.steps.wait, 30)
        await asyncio.wait_for(worker.drain(seconds, lambda: hurried), 30)
        return await asyncio.wait_for(asked, 30)

    error = asyncio.run(run())
    assert error.status == 503
    assert "not all of it" in error.message
