"""From tokens to objects for clients, without a server."""

import asyncio
import json
import math
from pathlib import Path

import pytest
from scripted_server import SHIPPED
from test_worker import Stuck

from minigpt.dataset.chat import ChatEncoder
from minigpt.serve import app
from minigpt.serve.answers import Choice, Envelope, PlainStream, usage
from minigpt.serve.app import Served, _ChatAnswer, _Run
from minigpt.serve.command import ServeOptions
from minigpt.serve.schemas import ChatRequest, parse
from minigpt.serve.worker import EngineWorker, Job, Piece


@pytest.mark.parametrize("chat", [True, False])
def test_log_probs_of_a_network_that_has_diverged_are_still_json(chat):
    encoder = ChatEncoder(SHIPPED)
    choice = Choice(encoder, PlainStream(encoder), (), (), log_probs=True)
    choice.push(Piece(0, [100, 200], [math.nan, -math.inf], [[(100, math.nan)], [(300, -0.5)]]))
    choice.finish("length")
    made = Envelope(encoder, "m", chat).whole([choice], usage(1, [choice]), log_probs=True)
    found = json.loads(json.dumps(made, allow_nan=False))["choices"][0]["logprobs"]
    assert (found["content"][0]["logprob"] if chat else found["token_logprobs"][1]) == -9999.0


def test_a_tool_call_that_takes_long_gives_signs_of_life_though_there_is_nothing_to_show_yet(monkeypatch):
    encoder = ChatEncoder(SHIPPED)
    served = Served("m", encoder, 1024, (), EngineWorker(Stuck(), 1), ServeOptions(Path("unused")))
    asked = _ChatAnswer(served, parse(ChatRequest, b'{"messages": [{"role": "user", "content": "a"}], "stream": true}'))
    job = Job([1], asked.params)

    async def shown() -> list[bytes]:
        events, parts = _Run(served, asked, [job]).events(), []
        await anext(events)  # the greeting
        for ids in ([encoder.token_id("<tool_call>"), 100], [101], [102, encoder.token_id("</tool_call>"), 103]):
            job.take([Piece(0, ids)], ended=False)
            parts.append(await asyncio.wait_for(anext(events), 10))
        return parts

    monkeypatch.setattr(app, "KEEP_ALIVE_SECONDS", 0.0)
    call, more, text = asyncio.run(shown())
    assert call == more == b": still here\n\n"
    assert json.loads(text.removeprefix(b"data: "))["choices"][0]["delta"] == {"content": encoder.decode([103])}
