"""The HTTP side: routes, errors in OpenAI's shape, and the door that every request passes.

What a request may hold stands in `schemas.py`, how tokens become answers in `answers.py`, who makes them in
`worker.py`. This file brings them together.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from minigpt.errors import UserError
from minigpt.generation.answer import AnswerStream
from minigpt.generation.sampling import SamplingParams
from minigpt.serve.answers import Choice, Envelope, PlainStream, event, usage, visible_decode
from minigpt.serve.metrics import CONTENT_TYPE, Metrics
from minigpt.serve.schemas import (
    MAX_BODY_BYTES,
    ApiError,
    ChatRequest,
    CompletionRequest,
    SamplingRequest,
    parse,
)
from minigpt.serve.worker import KEEP_ALIVE_SECONDS, EngineWorker, Job

if TYPE_CHECKING:
    from minigpt.dataset.chat import ChatEncoder
    from minigpt.serve.command import ServeOptions

STATIC = Path(__file__).parent / "static"
BODY_SECONDS = 30.0
SHORT_BODY_BYTES = 8192
PAGE_FILES = ("/", "/app.js", "/words.js", "/markdown.js", "/style.css", "/icon.svg")
OPEN_PATHS = ("/health", *PAGE_FILES)
"""What is shown without an API key: nothing but the page's files, and that the server lives."""
API_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics")
LOOPBACK_NAME = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass
class Served:
    """What the routes need to know.

    Args:
        name: Of the model, in requests and answers.
        encoder: Its tokenizer.
        context: Its longest text in tokens.
        stop_ids: Tokens that end its answers.
        worker: Runs its engine.
        options: Of the command.
        about: What `/v1/models` tells besides.
    """

    name: str
    encoder: ChatEncoder
    context: int
    stop_ids: tuple[int, ...]
    worker: EngineWorker
    options: ServeOptions
    about: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))

    def model_record(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "minigpt",
            "max_model_len": self.context,
            **self.about,
        }

    def sampling(self, request: SamplingRequest) -> SamplingParams:
        """The parameters of a request; what it leaves open is the server's default, the seed is drawn."""
        if request.model is not None and request.model != self.name:
            raise ApiError(
                f"there is no model {_quoted(request.model)}: this server has {self.name}",
                status=404,
                param="model",
                code="model_not_found",
            )
        limit = request.token_limit()
        if limit is not None and limit > self.context:
            raise ApiError(f"max_tokens is {limit}, the model's context is {self.context}", param="max_tokens")
        if request.n is not None and request.n > self.options.max_n:
            raise ApiError(f"n is {request.n}; this server gives at most {self.options.max_n}", param="n")
        asked = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        asked["repetition_penalty"] = request.repetition_penalty
        chosen = {k: getattr(self.options, k) if v is None else v for k, v in asked.items()}
        chosen["top_k"] = max(chosen["top_k"], 0)  # -1 is "all" elsewhere
        return SamplingParams(
            max_new_tokens=limit or min(self.options.max_new_tokens, self.context),
            stop_token_ids=() if request.ignore_eos else self.stop_ids,
            stop=request.stop_strings(),
            logit_bias={int(token): bias for token, bias in (request.logit_bias or {}).items()},
            seed=secrets.randbits(63) if request.seed is None else request.seed % 2**64,
            **chosen,
        )

    def check_length(self, prompt_ids: list[int], param: str) -> None:
        """Raises ApiError for a prompt that the model cannot continue."""
        if not prompt_ids:
            raise ApiError("the prompt is empty", param=param)
        if len(prompt_ids) >= self.context:
            raise ApiError(
                f"the prompt has {len(prompt_ids)} tokens and the model's context is {self.context}: shorten it",
                param=param,
                code="context_length_exceeded",
            )


def make_app(served: Served) -> Door:
    """The ASGI application."""
    worker, metrics = served.worker, served.metrics

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _our_fault)

    async def chat(request: Request) -> Response:
        asked: ChatRequest = parse(ChatRequest, await _body(request))
        return await _answer(served, request, _ChatAnswer(served, asked))

    async def completions(request: Request) -> Response:
        asked: CompletionRequest = parse(CompletionRequest, await _body(request))
        return await _answer(served, request, _TextAnswer(served, asked))

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [served.model_record()]})

    async def model(request: Request) -> Response:
        if (name := request.path_params["name"]) != served.name:
            raise ApiError(
                f"there is no model {_quoted(name)}: this server has {served.name}", status=404, code="model_not_found"
            )
        return JSONResponse(served.model_record())

    async def health(request: Request) -> Response:
        well = worker.crashed is None
        return JSONResponse({"status": "ok" if well else "broken", "model": served.name}, 200 if well else 503)

    async def prometheus(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    async def page_file(request: Request) -> Response:
        return FileResponse(STATIC / (request.url.path.removeprefix("/") or "index.html"))

    # Plain routes: a request's body is read and checked by `parse`, so FastAPI need not look into signatures
    for path, answer in (("/v1/chat/completions", chat), ("/v1/completions", completions)):
        app.add_route(path, answer, methods=["POST"])
    asked_for = {"/v1/models": models, "/v1/models/{name:path}": model, "/health": health, "/metrics": prometheus}
    for path, answer in (asked_for | dict.fromkeys(PAGE_FILES, page_file)).items():
        app.add_route(path, answer, methods=["GET"])
    metrics.gauge("minigpt_slots", "Sequences that can be decoded together", lambda: worker.engine.slots)
    metrics.gauge("minigpt_slots_used", "Slots in use", lambda: worker.engine.stats.running)
    metrics.gauge("minigpt_sequences_in_flight", "Sequences being made or waiting", lambda: worker.in_flight)
    return Door(app, served.options.api_key, metrics)


# ------------------------------------------------------------------------------------------------------------- answers


class _ChatAnswer:
    """A chat request on its way: its prompts, and the choices that its tokens fill."""

    def __init__(self, served: Served, request: ChatRequest) -> None:
        self.served, self.request, self.params = served, request, served.sampling(request)
        self.n, self.log_probs, self.top_log_probs = request.n or 1, bool(request.logprobs), request.top_logprobs or 0
        self.prompts, self.param = 1, "messages"
        arguments = request.chat_template_kwargs
        self.enable_thinking = served.options.enable_thinking()
        if arguments is not None and "enable_thinking" in arguments.model_fields_set:
            self.enable_thinking = arguments.enable_thinking  # null too is a wish: as the model likes
        self.envelope = Envelope(served.encoder, served.name, chat=True)
        self.decode = visible_decode(served.encoder)

    def prompt_ids(self) -> list[list[int]]:
        """The rendered conversation; a long one takes time, and then does not belong on the event loop."""
        messages = [message.as_message() for message in self.request.messages]
        tools = None if self.request.tool_choice == "none" else self.request.tools
        schemas = [tool.model_dump() for tool in tools] if tools else None
        return [self.served.encoder.encode_prompt(messages, tools=schemas, enable_thinking=self.enable_thinking)]

    def choices(self) -> list[Choice]:
        """One for each text that was asked for."""
        encoder, switch = self.served.encoder, self.enable_thinking
        return [self._choice(AnswerStream(encoder, switch)) for _ in range(self.n)]

    def _choice(self, stream: Any) -> Choice:
        return Choice(self.served.encoder, stream, self.params.stop_token_ids, self.params.stop, self.log_probs)


class _TextAnswer(_ChatAnswer):
    """A request to continue texts on its way."""

    def __init__(self, served: Served, request: CompletionRequest) -> None:
        self.served, self.asked, self.params = served, request, served.sampling(request)
        self.n, self.log_probs, self.top_log_probs = request.n or 1, request.logprobs is not None, request.logprobs or 0
        self.request = request  # type: ignore[assignment]
        self.prompts, self.param = len(request.prompts()), "prompt"
        self.envelope = Envelope(served.encoder, served.name, chat=False)
        self.decode = served.encoder.decode

    def prompt_ids(self) -> list[list[int]]:
        """A text gets what the tokenizer begins every text with; ids are taken as they are."""
        encoder = self.served.encoder
        given = self.asked.prompts()
        return [
            ([*encoder.bos_ids, *encoder.encode_text(p)] or [encoder.eos_id]) if isinstance(p, str) else p
            for p in given
        ]

    def choices(self) -> list[Choice]:
        return [self._choice(PlainStream(self.served.encoder)) for _ in range(self.n * self.prompts)]


async def _answer(served: Served, request: Request, asked: _ChatAnswer) -> Response:
    """Runs a request on the engine and answers it, whole or in pieces."""
    worker, sequences = served.worker, asked.n * asked.prompts
    worker.check_room(sequences)  # before the texts become tokens, which is work
    try:
        long = int(request.headers.get("content-length", MAX_BODY_BYTES)) > SHORT_BODY_BYTES
        if long or served.encoder.template is not None:
            prompts = await asyncio.to_thread(asked.prompt_ids)
        else:
            prompts = asked.prompt_ids()  # takes less time than another thread needs to begin
    except (UserError, UnicodeError) as error:
        raise ApiError(str(error), param=asked.param) from None
    except RecursionError:
        raise ApiError("the request is nested too deeply", param=asked.param) from None
    for prompt in prompts:
        served.check_length(prompt, asked.param)
    worker.reserve(sequences)
    jobs = [
        Job(
            ids,
            asked.params,
            asked.n,
            number * asked.n,  # else equal prompts would get equal texts
            asked.log_probs,
            asked.top_log_probs,
            asked.decode if asked.params.stop else None,
        )
        for number, ids in enumerate(prompts)
    ]
    submitted = await asyncio.gather(*map(worker.submit, jobs), return_exceptions=True)
    if failed := [error for error in submitted if error is not None]:
        for job in jobs:
            worker.cancel(job)
        raise failed[0]
    served.metrics.prompt_tokens.inc(sum(map(len, prompts)))
    run = _Run(served, asked, jobs)
    if asked.request.stream:
        return EventStream(run.events(), request, run.cancel)
    watcher = asyncio.create_task(_when_gone(request, run.cancel))
    try:
        return JSONResponse(await run.whole())
    finally:
        watcher.cancel()
        run.cancel()


class _Run:
    """The jobs of one request while they are made."""

    def __init__(self, served: Served, asked: _ChatAnswer, jobs: list[Job]) -> None:
        self.served, self.asked, self.jobs = served, asked, jobs
        self.choices = asked.choices()
        self.prompt_tokens = sum(len(job.prompt_ids) for job in jobs)

    def cancel(self) -> None:
        """Gives up what is not finished."""
        for job in self.jobs:
            self.served.worker.cancel(job)

    async def whole(self) -> dict[str, Any]:
        """The complete answer."""
        async for _ in self._progress():
            pass
        return self.asked.envelope.whole(self.choices, self._usage(), self.asked.log_probs)

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events; the last is `[DONE]`."""
        envelope, options = self.asked.envelope, self.asked.request.stream_options
        running = bool(options and options.continuous_usage_stats)
        for index, choice in enumerate(self.choices):
            if greeting := envelope.greeting(index, choice):
                yield envelope.event(greeting)
        open_jobs, last, sent = len(self.jobs), b"", time.perf_counter()
        try:
            async for changed, ended in self._progress():
                make = envelope.ending if ended else envelope.pieces
                chunks = [chunk for index in changed for chunk in make(index, self.choices[index])]
                part = b"".join(envelope.event([chunk], self._usage() if running else None) for chunk in chunks)
                open_jobs -= ended
                if not open_jobs:
                    last = part
                # tokens may come for long without text to show: a tool call, or what may become a stop string
                elif part or not changed or time.perf_counter() - sent >= KEEP_ALIVE_SECONDS:
                    yield part or b": still here\n\n"
                    sent = time.perf_counter()
        except ApiError as error:  # the engine broke; the status line has been sent long ago
            last = event(_error(error.status, error.message))
        if options and options.include_usage:
            last += envelope.event([], self._usage())
        yield last + b"data: [DONE]\n\n"

    async def _progress(self) -> AsyncIterator[tuple[list[int], bool]]:
        """Fills the choices; yields the numbers of those that changed, and whether they have ended."""
        if len(self.jobs) == 1:
            async for news in self._progress_of(0):
                yield news
            return
        news_queue: asyncio.Queue[Any] = asyncio.Queue()

        async def follow(number: int) -> None:
            try:
                async for news in self._progress_of(number):
                    await news_queue.put(news)
                await news_queue.put(None)
            except Exception as error:
                await news_queue.put(error)

        tasks = [asyncio.create_task(follow(number)) for number in range(len(self.jobs))]
        try:
            open_jobs = len(tasks)
            while open_jobs:
                news = await news_queue.get()
                if isinstance(news, Exception):
                    raise news
                if news is None:
                    open_jobs -= 1
                else:
                    yield news
        finally:
            for task in tasks:
                task.cancel()

    async def _progress_of(self, number: int) -> AsyncIterator[tuple[list[int], bool]]:
        job, first, metrics = self.jobs[number], number * self.asked.n, self.served.metrics
        begun = False
        async for pieces in job.batches():
            if pieces and not begun:
                begun = True
                metrics.first_token.observe(time.perf_counter() - job.submitted)
            for piece in pieces:
                metrics.new_tokens.inc(len(piece.ids))
                self.choices[first + piece.sample].push(piece)
            yield sorted({first + piece.sample for piece in pieces}), False
        if job.finish_reasons is None:
            metrics.sequences.labels("cancelled").inc(job.n)
            return
        metrics.duration.observe(time.perf_counter() - job.submitted)
        for i, reason in enumerate(job.finish_reasons):
            self.choices[first + i].finish(reason)
            metrics.sequences.labels(reason).inc()
        yield list(range(first, first + job.n)), True

    def _usage(self) -> dict[str, Any]:
        return usage(self.prompt_tokens, self.choices)


class EventStream(Response):
    """Server-sent events; `on_gone` is called when the client leaves before the end."""

    def __init__(self, events: AsyncIterator[bytes], request: Request, on_gone: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._request, self._on_gone = events, request, on_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_when_gone(self._request, self._on_gone))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for part in self._events:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            watcher.cancel()
            self._on_gone()


async def _when_gone(request: Request, act: Callable[[], None]) -> None:
    """Waits until the client closes the connection, then acts."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    act()


async def _body(request: Request) -> bytes:
    """The body of a JSON request, if it is not too large, too slow or of another type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError("send the request with the header Content-Type: application/json", status=415)
    too_large = ApiError(f"the body is larger than {MAX_BODY_BYTES} bytes", status=413)
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except ClientDisconnect:
        raise ApiError("the client left before its request was there") from None
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {BODY_SECONDS:.0f} seconds", status=408) from None
    return bytes(body)


# -------------------------------------------------------------------------------------------------- errors and the door


def _error(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, str | None]]:
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(_error(error.status, error.message, error.param, error.code), error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is nothing at this address", 405: f"{request.method} is not possible here"}
    message = what.get(error.status_code, str(error.detail))
    return JSONResponse(_error(error.status_code, message), error.status_code, dict(error.headers or {}))


async def _our_fault(request: Request, error: Exception) -> Response:
    return JSONResponse(_error(500, "something went wrong in the server; its log says what"), 500)


def _quoted(text: str) -> str:
    return repr(text[:80].encode("utf-8", "replace").decode())


class Door:
    """What every request passes: who may come in, which headers go out, and the count of both.

    Without an API key only names of this machine are accepted in the `Host` header, so that no web page can reach the
    server through a name of its own that it lets point here (DNS rebinding).
    """

    def __init__(self, app: FastAPI, api_key: str | None, metrics: Metrics) -> None:
        self.app, self._key, self._metrics = app, api_key, metrics
        self._headers = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
                path = scope["path"] if scope["path"] in (*OPEN_PATHS, *API_PATHS) else "other"
                self._metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        refusal = self._refusal(scope)
        with suppress(asyncio.CancelledError):  # the server is ending
            await (refusal or self.app)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        if self._key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if LOOPBACK_NAME.fullmatch(host):
                return None
            message = f"the server is for this machine only and was called {host[:80]!r}: start it with --api_key"
            return JSONResponse(_error(403, message), 403)
        if scope["path"] in OPEN_PATHS:
            return None
        given = headers.get(b"authorization", b"")
        if hmac.compare_digest(given, b"Bearer " + self._key.encode()):
            return None
        message = "the API key is missing or wrong: send the header Authorization: Bearer KEY"
        return JSONResponse(_error(401, message, code="invalid_api_key"), 401, {"WWW-Authenticate": "Bearer"})
