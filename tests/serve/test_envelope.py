"""From tokens to objects for clients, without a server."""

import json
import math

import pytest
from scripted_server import SHIPPED

from minigpt.dataset.chat import ChatEncoder
from minigpt.serve.answers import Choice, Envelope, PlainStream, usage
from minigpt.serve.worker import Piece


@pytest.mark.parametrize("chat", [True, False])
def test_log_probs_of_a_network_that_has_diverged_are_still_json(chat):
    encoder = ChatEncoder(SHIPPED)
    choice = Choice(encoder, PlainStream(encoder), (), (), log_probs=True)
    choice.push(Piece(0, [100, 200], [math.nan, -math.inf], [[(100, math.nan)], [(300, -0.5)]]))
    choice.finish("length")
    made = Envelope(encoder, "m", chat).whole([choice], usage(1, [choice]), log_probs=True)
    found = json.loads(json.dumps(made, allow_nan=False))["choices"][0]["logprobs"]
    assert (found["content"][0]["logprob"] if chat else found["token_logprobs"][1]) == -9999.0
