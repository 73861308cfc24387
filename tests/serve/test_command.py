"""`minigpt serve` before it serves, behind an API key, with an adapter, and when it is told to end."""

import asyncio
import json
import signal
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import openai
import psutil
import pytest
from scripted_server import CONTEXT, SHIPPED, scripted_model, start_server, stop_server, wait_until

import minigpt
from minigpt.dataset.chat import ChatEncoder
from minigpt.errors import UserError
from minigpt.generation.engine import cache_bytes
from minigpt.generation.generate import generate
from minigpt.generation.load import load_for_inference
from minigpt.generation.sampling import SamplingParams
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.serve.app import Served, make_app
from minigpt.serve.command import (
    ServeOptions,
    check,
    choose_length,
    is_loopback,
    listen,
    make_engine,
    prefill_tokens,
    serve,
)
from minigpt.serve.worker import EngineWorker

QUESTION = [{"role": "user", "content": "Count."}]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"host": "0.0.0.0"}, "host 0.0.0.0 can be reached from other machines: protect the server with --api_key"),
        ({"host": "::"}, "--api_key"),
        ({"api_key": " "}, "the API key is empty"),
        ({"port": 70000}, "port is 70000"),
        ({"slots": 0}, "slots is 0; give at least 1"),
        ({"max_length": 3}, "max_length is 3; give at least 16"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0; give at least 1"),
        ({"top_p": 3.0}, "top_p is 3.0"),
        ({"think": "maybe"}, "think is 'maybe'"),
    ],
)
def test_options_that_mean_nothing_are_told_before_anything_is_loaded(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(ServeOptions(Path("nowhere"), **options))


def test_a_port_in_use_is_one_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is taken: give another --port"):
            serve(ServeOptions(Path("nowhere"), port=port))


def test_a_run_that_is_not_there_is_told_and_the_port_is_free_again():
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    with pytest.raises(FileNotFoundError, match="no such run"):
        serve(ServeOptions(Path("nowhere"), port=port))
    listen("127.0.0.1", port).close()


def test_conversations_are_as_long_as_all_slots_can_hold_at_once(script, capsys):
    model = scripted_model(script)
    token = cache_bytes(model, 1, 1)
    assert token == 2 * 32 * 4, "keys and values of one head, float32"
    options = ServeOptions(Path("unused"), slots=4)
    assert choose_length(model, options, 8 * CONTEXT * token) == CONTEXT
    assert capsys.readouterr().out == ""
    assert choose_length(model, options, 8 * 1000 * token) == 1000
    assert "enough for 4 slots of 1000 tokens, the model's context is 32768" in capsys.readouterr().out
    shorter = replace(options, max_length=900)
    assert choose_length(model, shorter, 8 * 1000 * token) == 900
    with pytest.raises(UserError, match=r"4 slots of 900 tokens take .* give fewer --slots or --max_length"):
        choose_length(model, shorter, 8 * 800 * token)


def test_the_length_fits_beside_what_the_engine_itself_takes(monkeypatch, capsys):
    """On a machine with 256 MB left, of which this process takes more by and by."""
    config = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MiniGPT(MiniGPTConfig(vocab_size=1 << 16, max_position_embeddings=1 << 15, **config)).eval()
    process, left = psutil.Process(), 256e6
    before = process.memory_info().rss

    def memory() -> SimpleNamespace:
        return SimpleNamespace(available=left - (process.memory_info().rss - before))

    monkeypatch.setattr(psutil, "virtual_memory", memory)
    engine = make_engine(model, ServeOptions(Path("unused"), slots=8))
    assert f"8 slots of {engine.max_length} tokens" in capsys.readouterr().out
    cache = cache_bytes(model, 8, engine.max_length)
    assert 1.5 * cache + cache_bytes(model, 1, 8192) < memory().available, "the old half is there while it is copied"
    assert cache > 0.2 * memory().available
    assert len(engine.decoder.cos_T1D) >= engine.max_length


def test_a_step_reads_so_much_of_prompts_as_the_others_can_wait_for(script):
    assert prefill_tokens(100_000_000, threads=2) == 125  # 2 * 1e8 * 125 FLOP at 1e11 a second
    assert prefill_tokens(100_000_000, threads=8) == 500
    assert prefill_tokens(1_000_000, threads=1) == 2048
    assert prefill_tokens(8_000_000_000, threads=2) == 64
    model = scripted_model(script)
    assert make_engine(model, ServeOptions(Path("unused"))).prefill_chunk == 2048
    assert make_engine(model, ServeOptions(Path("unused"), prefill_chunk=48)).prefill_chunk == 48


def test_a_server_with_a_shorter_max_length_refuses_what_is_longer_and_one_without_thinking_can_be_asked_for_it(
    scripted_run, tmp_path
):
    running = start_server(tmp_path, scripted_run, "--max_length", "64", "--prefill_chunk", "4", "--think", "off")
    try:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="unused", max_retries=0)
        answer = client.chat.completions.create(model=running.name, messages=QUESTION, temperature=0)
        assert answer.usage.total_tokens == 64
        assert answer.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(model=running.name, prompt=" one" * 80)
        assert error.value.code == "context_length_exceeded"
        assert json.loads(running.get("/v1/models"))["data"][0]["max_model_len"] == 64
        encoder = ChatEncoder(SHIPPED)
        for arguments, switch in (({}, False), ({"enable_thinking": None}, None), ({"enable_thinking": True}, True)):
            answer = client.chat.completions.create(
                model=running.name, messages=QUESTION, max_tokens=1, extra_body={"chat_template_kwargs": arguments}
            )
            assert answer.usage.prompt_tokens == len(encoder.encode_prompt(QUESTION, enable_thinking=switch))
    finally:
        assert stop_server(running) == 0


def test_loopback_addresses_are_known():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "example.org")))


def test_behind_a_key_with_an_adapter_and_a_graceful_end(scripted_run, adapter, tmp_path):
    options = [
        "--host",
        "0.0.0.0",
        "--api_key",
        "s3cret",
        "--adapter",
        str(adapter),
        "--slots",
        "1",
        "--temperature",
        "0",
    ]
    server = start_server(tmp_path, scripted_run, *options)
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                stranger.chat.completions.create(model=server.name, messages=QUESTION)
            with pytest.raises(openai.AuthenticationError):
                stranger.models.list()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/metrics")
        with urllib.request.urlopen(f"{url}/health") as health, urllib.request.urlopen(f"{url}/") as page:
            assert json.loads(health.read())["status"] == "ok"
            assert page.headers["X-Content-Type-Options"] == "nosniff"
            assert "script-src 'self'" in page.headers["Content-Security-Policy"]

        model, encoder = load_for_inference(scripted_run, adapter=adapter)
        params = SamplingParams(max_new_tokens=12, temperature=0.0, stop_token_ids=model.eos_token_ids)
        (expected,) = generate(model, [encoder.encode_text(" one two three one")], params, decode=encoder.decode)
        plain, _ = load_for_inference(scripted_run)
        (without,) = generate(plain, [encoder.encode_text(" one two three one")], params, decode=encoder.decode)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as client:
            answer = client.completions.create(model=server.name, prompt=" one two three one", max_tokens=12)
            assert answer.choices[0].text == expected.text != without.text

            events = client.completions.create(model=server.name, prompt=" one", max_tokens=2000, stream=True)
            first = next(events)
            server.process.send_signal(signal.SIGTERM)  # while an answer is being made: it is made to its end
            rest = list(events)
            assert rest[-1].choices[0].finish_reason in ("length", "stop")
            assert first.id == rest[-1].id
        assert server.process.wait(timeout=60) == 0
    finally:
        server.process.kill()
    assert server.log.read_text() == ""


BREAKS = """
import sys
from minigpt.cli import main
from minigpt.generation.engine import Engine

whole_step = Engine.step

def step(engine):
    if engine.stats.steps >= 500:
        raise RuntimeError("out of memory")
    return whole_step(engine)

Engine.step = step
sys.exit(main())
"""


def test_a_server_whose_engine_breaks_tells_its_clients_and_ends_with_status_1(scripted_run, tmp_path):
    """One client streams, one waits for the whole answer, one has not sent anything yet."""
    server = start_server(tmp_path, scripted_run, "--temperature", "0", program=("-c", BREAKS, "serve"))
    try:
        asked = {"model": server.name, "messages": QUESTION, "max_tokens": 30000}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
            events = client.chat.completions.create(**asked, stream=True)
            first = next(events)
            with ThreadPoolExecutor() as pool:
                whole = pool.submit(client.chat.completions.create, **asked)
                assert first.choices[0].finish_reason is None
                with pytest.raises(openai.APIError, match="the engine has broken down; the server's log says why"):
                    list(events)
                with pytest.raises(openai.APIError) as error:
                    whole.result()
        # who was not yet taken, or came when the server had already closed its doors, is told so too
        assert isinstance(error.value, (openai.InternalServerError, openai.APIConnectionError))
        assert server.process.wait(timeout=60) == 1
    finally:
        server.process.kill()
    assert "RuntimeError: out of memory" in server.log.read_text()


def test_health_tells_that_the_engine_is_broken_and_nothing_is_taken_any_more(script):
    encoder = ChatEncoder(SHIPPED)
    worker = EngineWorker(make_engine(scripted_model(script), ServeOptions(Path("unused"))), max_waiting=1)
    app = make_app(Served("m", encoder, CONTEXT, (encoder.im_end_id,), worker, ServeOptions(Path("unused"))))

    def ask(method: str, path: str, body: bytes = b"") -> tuple[int, dict]:
        headers = {b"host": b"localhost", b"content-type": b"application/json"}
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [*headers.items()]}
        sent: list[dict] = []

        async def receive() -> dict:
            return {"type": "http.request", "body": body}

        async def send(message: dict) -> None:
            sent.append(message)

        asyncio.run(app(scope, receive, send))
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))

    assert ask("GET", "/health") == (200, {"status": "ok", "model": "m"})
    worker.crashed = RuntimeError("out of memory")
    assert ask("GET", "/health") == (503, {"status": "broken", "model": "m"})
    assert ask("POST", "/v1/completions", b'{"prompt": "a"}')[0] == 503


def is_refused(url: str) -> bool:
    """Whether nobody listens there any longer."""
    with socket.socket() as caller:
        return caller.connect_ex((urlparse(url).hostname, urlparse(url).port)) != 0


def test_the_guides_web_demo_serves_the_page_and_ends_at_once_when_told_twice(scripted_run, tmp_path):
    program = ("scripts/web_demo.py",)
    server = start_server(tmp_path, scripted_run, "--slots", "2", program=program, cwd=Path(minigpt.__file__).parent)
    try:
        assert json.loads(server.get("/health")) == {"status": "ok", "model": scripted_run.name}
        assert "<!doctype html>" in server.get("/").lower()
        assert server.metric("minigpt_slots") == 2
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            endless = {"model": server.name, "messages": QUESTION, "max_tokens": 30000, "temperature": 0}
            next(client.chat.completions.create(**endless, stream=True))
            server.process.send_signal(signal.SIGINT)
            assert wait_until(lambda: is_refused(server.url), tries=100)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(timeout=5) == 0, "the answer would have had ten seconds"
    finally:
        server.process.kill()
    assert server.log.read_text() == ""
