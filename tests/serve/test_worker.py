"""A job between the engine's thread and the event loop; no engine is needed."""

import asyncio

import pytest

from minigpt.generation.sampling import SamplingParams
from minigpt.serve import worker
from minigpt.serve.schemas import ApiError
from minigpt.serve.worker import Job, Piece


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
