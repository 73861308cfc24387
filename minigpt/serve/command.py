"""`minigpt serve`: from the command line to a server that listens."""

from __future__ import annotations

import gc
import ipaddress
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minigpt.errors import UserError
from minigpt.generation.command import thinking_switch

if TYPE_CHECKING:
    import torch

    from minigpt.generation.engine import Engine
    from minigpt.model.model_minigpt import MiniGPT

DRAIN_SECONDS = 10
MEMORY_SHARE = 0.5  # of what is free: while the cache grows, the old one is there as well
PREFIX_TOKENS = 8192  # of earlier texts, kept for texts that begin like them
LEAST_LENGTH = 16
PREFILL_SECONDS = 0.25  # a step may take so long for prompts; meanwhile nothing flows and nobody is seen to leave
# What a thread computes at least in a second while prompts are read. Measured on an EPYC for 93 M parameters, attention
# included: 64e9 to 129e9 in float32, 76e9 to 196e9 in bfloat16.
FLOPS_A_THREAD = 5e10
LEAST_PREFILL = 64  # fewer tokens use a processor badly
# The engine's thread gets Python back so soon from the event loop. A prompt is some 150 operators, after each of which
# it asks for it: with 0.5 ms the step that read the prompts of a crowd took 33 to 41 ms, a decode step 2.4 (measured).
SWITCH_SECONDS = 0.0001


@dataclass
class ServeOptions:
    """Options of `minigpt serve`. Sampling settings are the defaults of requests that name none.

    Args:
        run: Run folder, Hugging Face folder or .pth file.
        host: Address to listen on. Any but this machine's own needs --api_key.
        port: Port; 0 takes a free one.
        api_key: What clients must send as Authorization: Bearer KEY.
        name: Of the model, as clients see it; by default the run's folder.
        slots: Sequences that are decoded together.
        max_length: Most tokens of a prompt and its answer; by default the model's context, or less where the memory
            would not hold so much in all slots.
        prefill_chunk: Tokens of prompts that are read between two decode steps: fewer let answers flow more evenly
            while long prompts are read, more read them sooner. By default 2048, on a CPU less for a large model.
        max_waiting: Sequences that may wait for a slot; further requests get status 429.
        max_n: Most texts for one prompt.
        max_new_tokens: Most tokens of an answer when the request does not say.
        temperature: 0 always takes the most probable token; larger is more random.
        top_k: Sample among the k most probable tokens only; 0: all.
        top_p: Sample among the most probable tokens that make up this probability; 1: all.
        min_p: Drop tokens less than this fraction as probable as the best one; 0: none.
        repetition_penalty: Above 1 makes tokens that already occurred less probable.
        think: Thinking on, off, or auto: as the model likes.
        device: auto, cpu or cuda.
        dtype: auto, fp32 or bf16.
        adapter: A LoRA adapter for the model: the folder of one in PEFT's format, or a run that trained one.
    """

    run: Path
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    name: str | None = None
    slots: int = 16
    max_length: int | None = None
    prefill_chunk: int | None = None
    max_waiting: int = 256
    max_n: int = 8
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    think: Literal["auto", "on", "off"] = "auto"
    device: str = "auto"
    dtype: str = "auto"
    adapter: Path | None = None

    def enable_thinking(self) -> bool | None:
        """The default of the chat template's switch."""
        return thinking_switch(self.think)


def serve(options: ServeOptions) -> None:
    """Serve a model over HTTP: the API of OpenAI, and a chat page at /.

    Raises:
        UserError, ValueError, FileNotFoundError: one sentence, for options that mean nothing, a port that is taken or
            a run that cannot be loaded.
    """
    check(options)
    listening = listen(options.host, options.port)
    try:
        crashed = _serve(options, listening)
    finally:
        listening.close()
    if crashed:
        sys.exit(1)


def check(options: ServeOptions) -> None:
    """Raises UserError or ValueError for options that mean nothing."""
    from minigpt.generation.sampling import SamplingParams

    shared = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    SamplingParams(**{name: getattr(options, name) for name in shared})
    options.enable_thinking()
    least_values = {"slots": 1, "max_waiting": 0, "max_n": 1, "max_length": LEAST_LENGTH, "prefill_chunk": 1}
    for name, least in least_values.items():
        if (value := getattr(options, name)) is not None and value < least:
            raise UserError(f"{name} is {getattr(options, name)}; give at least {least}")
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"port is {options.port}; give a number up to 65535")
    if options.api_key is not None and (not options.api_key.isascii() or not options.api_key.strip()):
        raise UserError("the API key is empty or has letters beyond ASCII; give another --api_key")
    if options.api_key is None and not is_loopback(options.host):
        raise UserError(
            f"host {options.host} can be reached from other machines: protect the server with --api_key KEY, or leave "
            f"--host out to serve this machine only"
        )


def choose_length(model: MiniGPT, options: ServeOptions, free: int) -> int:
    """Tokens of a sequence that all slots can hold at once in `free` bytes, which the cache grows into by and by.

    Raises:
        UserError: that is less than what was asked for, or than anybody could use.
    """
    from minigpt.generation.engine import cache_bytes

    context = model.config.max_position_embeddings
    wanted = min(options.max_length or context, context)
    fits = int(MEMORY_SHARE * free / cache_bytes(model, options.slots, 1))
    if fits >= wanted:
        return wanted
    if options.max_length is not None or fits < LEAST_LENGTH:
        raise UserError(
            f"{options.slots} slots of {wanted} tokens take {cache_bytes(model, options.slots, wanted) / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free, which is enough for {fits} tokens: give fewer --slots or --max_length"
        )
    print(
        f"the memory is enough for {options.slots} slots of {fits} tokens, the model's context is {context}: longer "
        "conversations are refused (with fewer --slots they may be longer)",
        flush=True,
    )
    return fits


def prefill_tokens(parameters: int, threads: int) -> int:
    """Tokens of prompts that a CPU reads in about PREFILL_SECONDS: 64 to 2048."""
    from minigpt.generation.engine import PREFILL_CHUNK

    tokens = PREFILL_SECONDS * FLOPS_A_THREAD * threads / (2 * parameters)
    return int(min(max(tokens, LEAST_PREFILL), PREFILL_CHUNK))


def make_engine(model: MiniGPT, options: ServeOptions) -> Engine:
    """The engine that serves a model: its cache fits into the memory, and reading prompts does not hold up the others.

    Raises:
        UserError: as `choose_length`.
    """
    import torch

    from minigpt.generation.engine import PREFILL_CHUNK, Engine, cache_bytes

    device = next(model.parameters()).device
    chunk = options.prefill_chunk
    if chunk is None:
        on_cpu = device.type == "cpu"
        chunk = prefill_tokens(model.num_parameters(), torch.get_num_threads()) if on_cpu else PREFILL_CHUNK
    free = _free_memory(device)
    if cache_bytes(model, options.slots, LEAST_LENGTH) > MEMORY_SHARE * free:
        choose_length(model, options, free)  # refuses, before anything is allocated
    prefix_tokens = min(PREFIX_TOKENS, free // (4 * cache_bytes(model, 1, 1)))
    engine = Engine(
        model,
        slots=options.slots,
        max_length=options.max_length,
        prefix_cache_tokens=prefix_tokens,
        prefill_chunk=chunk,
    )
    # Only now: the engine has copied the weights. Its cache is small yet, and grows up to the length that is set here
    free = _free_memory(device) - cache_bytes(model, 1, prefix_tokens)
    engine.max_length = choose_length(model, options, max(free, 0))
    return engine


def _free_memory(device: torch.device) -> int:
    import psutil
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; nobody can connect before the server runs.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"host {host} is unknown ({error.strerror}): give an address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        reason = "is taken" if error.errno == 98 else f"cannot be used ({error.strerror})"
        raise UserError(f"port {port} of {host} {reason}: give another --port, or 0 for any free one") from None
    return bound


def _serve(options: ServeOptions, listening: socket.socket) -> bool:
    """Loads the model and serves until a signal; True when the engine broke."""
    import uvicorn

    from minigpt.generation.generate import stop_token_ids
    from minigpt.generation.load import load_for_inference, stage_of
    from minigpt.serve.app import Served, make_app
    from minigpt.serve.worker import EngineWorker

    model, encoder = load_for_inference(options.run, options.device, options.dtype, options.adapter)
    engine = make_engine(model, options)
    worker = EngineWorker(engine, options.max_waiting)
    stage = stage_of(options.run)
    served = Served(
        name=options.name or options.run.resolve().name or "minigpt",
        encoder=encoder,
        context=engine.max_length,
        stop_ids=stop_token_ids(model),
        worker=worker,
        options=options,
        about={
            "parameters": model.num_parameters(),
            "chat": encoder.knows_chat and stage != "pretrain",
            "defaults": {
                name: getattr(options, name)
                for name in ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "think")
            },
        },
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            worker.attach()
            await super().startup(sockets)
            if self.started:
                host, port = listening.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                size = f"{model.num_parameters() / 1e6:.1f} M parameters"
                print(f"{served.name} ({size}) is served at http://{shown}:{port} (Ctrl-C ends it)", flush=True)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            await worker.drain(DRAIN_SECONDS, lambda: self.force_exit)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        make_app(served),
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        backlog=1024,
        timeout_graceful_shutdown=1,  # what is made by then has been sent
    )
    server = Server(config)

    def end(*_: object) -> None:
        server.force_exit = server.should_exit  # asked for the second time
        server.should_exit = True

    def run_server() -> None:
        try:
            server.run(sockets=[listening])
        finally:
            worker.stop()

    worker.on_crash = end
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
    sys.setswitchinterval(SWITCH_SECONDS)
    # To look through all that torch has made takes 0.2 s, in which nobody gets a token: now, and never again
    gc.collect()
    gc.freeze()
    http = threading.Thread(target=run_server, name="http")
    http.start()
    worker.run()
    http.join()
    return worker.crashed is not None
