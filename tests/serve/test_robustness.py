"""What strangers and crowds do to a server: malformed requests, many clients, clients that leave, overload, long use.

No clock is read: "within a second" is twenty looks, a twentieth of a second apart.
"""

import asyncio
import http.client
import json
import random
import socket
from contextlib import closing
from urllib.parse import urlparse

import pytest
from openai import AsyncOpenAI
from scripted_server import CONTEXT, SLOTS, WAITING, wait_until

JSON = {"Content-Type": "application/json"}
HELLO = [{"role": "user", "content": "Count."}]
MESSAGES = json.dumps(HELLO)
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def connect(server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(urlparse(server.url).netloc, timeout=60)


def post(connection, path: str, body, headers=JSON):
    """Status, headers and JSON of a request; `body` is an object or bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, headers)
    response = connection.getresponse()
    return response.status, response.headers, json.loads(response.read())


def malformed() -> list[tuple[str, bytes]]:
    """Requests that nobody should answer with 200 or 500."""
    wrong_values = {
        "messages": [[], None, "hi", {}, [[]], [{}], [{"role": "user"} for _ in range(2000)], [{"role": "robot"}]],
        "temperature": [-1, 9, "0.5", True, [], {}],
        "top_p": [0, 1.5, -1, "1"],
        "top_k": [-2, 1.5, "5", 10**9],
        "min_p": [-0.1, 2],
        "repetition_penalty": [0, -1, 100, 1e-300, 0.009],
        "n": [0, -1, 9, 10**9, 1.5, "2", True],
        "max_tokens": [0, -5, CONTEXT + 1, 10**30, "7", 2.5],
        "max_completion_tokens": [0, CONTEXT + 1],
        "stop": [["a"] * 9, "", [""], ["x" * 300], 5, [1], {"a": 1}],
        "seed": ["1", 2**70, 1.5],
        "stream": ["yes", 1],
        "ignore_eos": ["yes", 1],
        "stream_options": ["x", {"include_usage": "yes"}],
        "logprobs": [3, "true"],
        "top_logprobs": [-1, 21, 2],
        "logit_bias": [{"x": 1}, {"-1": 1}, {"5": 1000}, {"999999": 1}, [], {"1": "a"}],
        "presence_penalty": [1, 5, "x"],
        "frequency_penalty": [0.5, -3],
        "response_format": [{"type": "json_object"}, "text"],
        "tools": ["x", [1], [{"type": "function"}], [{"type": "function", "function": {"name": 5}}]],
        "tool_choice": ["required", {"type": "function"}],
        "chat_template_kwargs": [{"enable_thinking": "maybe"}, 5],
        "model": ["gpt-5", 5, "../../etc/passwd", ""],
    }
    cases = [
        (CHAT, json.dumps({"messages": HELLO, name: value}).encode())
        for name, values in wrong_values.items()
        for value in values
    ]
    contents = [5, {}, [1], [{"type": "image_url", "image_url": {"url": "http://x"}}], [{"type": "text", "text": 5}]]
    cases += [(CHAT, json.dumps({"messages": [{"role": "user", "content": c}]}).encode()) for c in contents]
    prompts = [
        None,
        [],
        [[]],
        {},
        5,
        [1, "a"],
        [[1], "a"],
        [-1],
        [6400],
        [10**30],
        [[1.5]],
        ["a"] * 65,
        "a b " * CONTEXT,
    ]
    cases += [(TEXT, json.dumps({"prompt": prompt}).encode()) for prompt in prompts]
    wrong_texts = [{"echo": True}, {"suffix": "x"}, {"best_of": 5}, {"logprobs": 6}, {"logprobs": True}]
    cases += [(TEXT, json.dumps({"prompt": "a", **wrong}).encode()) for wrong in wrong_texts]
    bodies = ["", "[]", "5", "null", '"text"', "{", "{}", "[" * 20000, '{"a":' * 20000, "{'messages': 1}", "NaN"]
    bodies += [
        f'{{"messages": {MESSAGES}, "temperature": {number}}}' for number in ("NaN", "Infinity", "1e999", "-0x1")
    ]
    bodies += ['{"messages": [{"role": "user", "content": "\\ud800"}]}', '{"prompt": "\\udfff"}', "\ufeff{}"]
    cases += [(path, body.encode()) for body in bodies for path in (CHAT, TEXT)]
    cases += [(CHAT, b"\xff\xfe\x00"), (CHAT, b'{"messages": "\xff"}'), (CHAT, b"\x00" * 100)]
    return cases


def broken_at_random(model: str) -> list[tuple[str, bytes]]:
    """400 good requests of which one byte was changed or the end cut off, so that they are no JSON any longer."""
    chat = {"model": model, "messages": HELLO, "stop": ["a", "b"], "seed": 5, "max_tokens": 1}
    text = {"model": model, "prompt": [" one", "two"], "logprobs": 1, "logit_bias": {"5": -1.5}, "max_tokens": 1}
    bodies = {CHAT: json.dumps(chat).encode(), TEXT: json.dumps(text).encode()}
    rng, cases = random.Random(0), []
    while len(cases) < 400:
        path, good = rng.choice(list(bodies.items()))
        at = rng.randrange(len(good))
        junk = rng.choice([b"", b"}", b'"', b"\x00", b"[", bytes([rng.randrange(256)])])
        body = good[:at] + junk + rng.choice([b"", good[at:], good[at + 1 :]])
        try:
            json.loads(body)
        except ValueError:
            cases.append((path, body))
    return cases


def test_malformed_requests_get_4xx_with_openais_error_object(server):
    by_hand, at_random = malformed(), broken_at_random(server.name)
    assert len(by_hand) >= 150
    with closing(connect(server)) as connection:
        for path, body in [*by_hand, *at_random]:
            status, _, answer = post(connection, path, body)
            assert 400 <= status < 500, (path, body[:300], answer)
            error = answer["error"]
            assert set(error) == {"message", "type", "param", "code"}, body[:300]
            assert error["message"]
            assert error["type"]
        for path, body in at_random:
            assert post(connection, path, body)[2]["error"]["code"] == "invalid_json", body
        assert post(connection, CHAT, {"messages": HELLO, "max_tokens": 1})[0] == 200
    assert server.metric("minigpt_sequences_in_flight") == 0


def test_other_ways_to_ask_wrongly_get_4xx_too(server):
    with closing(connect(server)) as connection:

        def status(method: str, path: str, body: bytes | None = None, headers: dict = JSON) -> int:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            error = json.loads(response.read())["error"]
            assert error["message"]
            return response.status

        good = json.dumps({"messages": HELLO, "max_tokens": 1}).encode()
        assert status("POST", CHAT, good, {"Content-Type": "text/plain"}) == 415
        assert status("POST", CHAT, good, {"Content-Type": "application/x-www-form-urlencoded"}) == 415
        assert status("POST", CHAT, good, JSON | {"Host": "evil.example"}) == 403
        assert status("GET", CHAT) == 405
        assert status("PUT", CHAT, good) == 405
        assert status("OPTIONS", CHAT) == 405
        assert status("GET", "/v1/nothing") == 404
        for path in (
            "/../../etc/passwd",
            "/%2e%2e/%2e%2e/app.py",
            "/%00",
            "/static/..%2f..%2fapp.py",
            "/" + "a" * 5000,
        ):
            assert status("GET", path) == 404
    with closing(connect(server)) as connection:
        assert post(connection, CHAT, b"x" * (1 << 20) + b"x")[0] == 413
    with closing(connect(server)) as connection:  # without a length: the limit holds for what really comes
        parts = (b"x" * 65536 for _ in range(20))
        connection.request("POST", CHAT, parts, JSON, encode_chunked=True)
        assert connection.getresponse().status == 413


def test_unknown_fields_are_passed_over(server):
    with closing(connect(server)) as connection:
        asked = {
            "messages": HELLO,
            "max_tokens": 1,
            "user": "u",
            "metadata": {"a": [1]},
            "store": True,
            "top_logprobs": 0,
        }
        assert post(connection, CHAT, asked)[0] == 200


def test_a_hundred_clients_at_once_are_all_answered_rightly(server, script):
    async def ask(number: int) -> tuple[str, str]:
        count = number % 40 + 6
        start = (" one", " two", " three")[number % 3]
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=120) as client:
            asked = {"model": server.name, "prompt": f"n {number}{start}", "max_tokens": count}
            if number % 2:
                text = (await client.completions.create(**asked)).choices[0].text
            else:
                stream = await client.completions.create(**asked, stream=True)
                text = "".join([event.choices[0].text async for event in stream])
        return text, script.words(count + number % 3 + 1)[len(script.words(number % 3 + 1)) :]

    async def all_at_once():
        return await asyncio.gather(*map(ask, range(100)))

    answers = asyncio.run(all_at_once())
    assert [given for given, _ in answers] == [expected for _, expected in answers]


ENDLESS = {"messages": HELLO, "max_tokens": 30000}


def open_stream(server, body: dict, path: str = CHAT) -> tuple[socket.socket, bytes]:
    """A connection on which an answer has begun, and what came of it."""
    address = urlparse(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=30)
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
    return connection, connection.recv(65536) if body.get("stream") else b""


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_slot(stream, server):
    connection, begun = open_stream(server, {**ENDLESS, "stream": stream, "n": 4})
    assert begun.startswith(b"HTTP/1.1 200 OK") == stream
    assert wait_until(lambda: server.metric("minigpt_sequences_in_flight") == 4, tries=40)
    connection.close()
    # twenty looks, a twentieth of a second apart
    assert wait_until(lambda: server.metric("minigpt_sequences_in_flight") == 0, tries=20)
    assert server.metric("minigpt_slots_used") == 0


def test_overload_is_told_at_once_and_passes(server):
    with closing(connect(server)) as connection:
        crowd = [open_stream(server, {**ENDLESS, "stream": True, "n": 8})[0] for _ in range((SLOTS + WAITING) // 8)]
        assert server.metric("minigpt_sequences_in_flight") == SLOTS + WAITING
        status, headers, answer = post(connection, CHAT, {"messages": HELLO, "max_tokens": 1})
        assert status == 429
        assert headers["Retry-After"] == "1"
        assert answer["error"]["code"] == "rate_limit_exceeded"
        too_long = {"prompt": "a b " * CONTEXT}
        assert post(connection, TEXT, too_long)[0] == 429, "before anybody reads it"
        assert json.loads(server.get("/health"))["status"] == "ok"
        for one in crowd:
            one.close()
        assert wait_until(lambda: server.metric("minigpt_sequences_in_flight") == 0, tries=40)
        assert post(connection, CHAT, {"messages": HELLO, "max_tokens": 1})[0] == 200
        assert post(connection, TEXT, too_long)[0] == 400
        status, _, answer = post(connection, TEXT, {"prompt": ["a"] * 64, "n": 8, "max_tokens": 1})
        assert status == 400  # more than there could ever be room for
        assert "at most 128" in answer["error"]["message"]


def test_memory_stays_bounded_over_2000_requests(server):
    """Whole answers, streams of several samples with log-probabilities and stop strings, and clients that leave."""
    memory = []
    with closing(connect(server)) as connection:
        for number in range(2000):
            if number % 500 == 0:
                memory.append(server.memory())
            messages = [{"role": "user", "content": f"{number} {'x' * (number % 50)}"}]
            if number % 4 == 0:
                assert post(connection, CHAT, {"messages": messages, "max_tokens": 1})[0] == 200
            elif number % 4 == 1:
                several = {"n": 2, "logprobs": True, "top_logprobs": 3, "stop": ["two"], "max_tokens": 12}
                body = json.dumps({"messages": messages, "stream": True, **several}).encode()
                connection.request("POST", CHAT, body, JSON)
                events = connection.getresponse().read()
                assert events.count(b'"finish_reason":"stop"') == 2
                assert events.endswith(b"data: [DONE]\n\n")
            elif number % 4 == 2:
                left, begun = open_stream(server, {**ENDLESS, "messages": messages, "stream": True, "n": 2})
                assert begun.startswith(b"HTTP/1.1 200 OK")
                left.close()
            else:
                body = {"prompt": f"{number} one", "n": 2, "logprobs": 2, "stop": ["three"], "max_tokens": 5}
                assert post(connection, TEXT, body)[0] == 200
        memory.append(server.memory())
    assert wait_until(lambda: server.metric("minigpt_sequences_in_flight") == 0, tries=40)
    # the first five hundred fill caches that have a size; behind them 16 MiB are 11 kB a request
    assert memory[-1] - memory[1] < 16 << 20, [m >> 20 for m in memory]
