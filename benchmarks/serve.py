"""`minigpt serve` under 1, 8 and 32 clients: time to first token and tokens/s, against the engine without a server.

The model is config S with random weights. Server and bare engine are processes of their own that are never busy at the
same time; rounds alternate between them. A client streams one answer after the other, each to its full length.
The bare engine is the server's upper limit: the same engine, slots, prompts, parameters and number of requests that
are under way at a time, without HTTP, JSON, text and another thread. It has all cores, while the server shares them
with the clients; `possible` is the share that a server which costs nothing would reach beside clients that take the
processor time that these took: engine seconds / (engine seconds + clients' seconds / cores).

Latencies are the clients': from the request's first byte to its first event with text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common

PROMPT = "Once upon a time there was a lantern maker in a small valley who loved the rain and"
SLOTS = 32


def make_run(folder: Path, config: dict[str, int]) -> Path:
    """A run folder with random weights and the shipped tokenizer."""
    import torch

    from minigpt.generation.load import SHIPPED_TOKENIZER
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

    torch.manual_seed(0)
    MiniGPT(MiniGPTConfig(**config)).save_pretrained(folder / "hf", tokenizer_folder=SHIPPED_TOKENIZER)
    return folder


def request_of(number: int, new_tokens: int) -> dict[str, Any]:
    """What a client asks; no token ends an answer early, so that all are equally long."""
    return {
        "prompt": f"{PROMPT} {number}",
        "max_tokens": new_tokens,
        "temperature": 0.8,
        "top_p": 0.85,
        "top_k": 50,
        "seed": number,
        "stream": True,
        "ignore_eos": True,
    }


# --------------------------------------------------------------------------------------------------------- bare engine


def bare_engine(run: Path) -> None:
    """A child process: reads lines "clients requests new_tokens", answers each with seconds and tokens."""
    from minigpt.generation.engine import Engine
    from minigpt.generation.load import load_for_inference
    from minigpt.generation.sampling import SamplingParams

    model, encoder = load_for_inference(run)
    engine = Engine(model, slots=SLOTS)
    for line in sys.stdin:
        clients, requests, new_tokens = map(int, line.split())
        begin, asked, tokens = time.perf_counter(), 0, 0
        running = 0
        while asked < requests or running:
            while asked < requests and running < clients:
                body = request_of(asked, new_tokens)
                params = SamplingParams(
                    max_new_tokens=new_tokens,
                    seed=asked,
                    **{name: body[name] for name in ("temperature", "top_p", "top_k")},
                )
                engine.submit(encoder.encode_text(body["prompt"]), params)
                asked, running = asked + 1, running + 1
            for request in engine.step():
                running -= 1
                tokens += len(request.completions[0].ids)
        print(json.dumps({"seconds": time.perf_counter() - begin, "tokens": tokens}), flush=True)


@contextmanager
def child(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with us."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=common.REPOSITORY)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# -------------------------------------------------------------------------------------------------------------- clients


async def one_answer(port: int, body: dict[str, Any]) -> tuple[float, float]:
    """Streams one answer over a bare socket, which costs little; seconds to its first text and to its end."""
    data = json.dumps(body).encode()
    fields = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": len(data),
        "Connection": "close",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, family=socket.AF_INET)
    begin = time.perf_counter()
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + data)
    received, first = b"", 0.0
    while part := await reader.read(65536):
        received += part
        if not first and b'"text":"' in received:
            first = time.perf_counter() - begin
    writer.close()
    assert received.startswith(b"HTTP/1.1 200 OK"), received[:500]
    assert b"data: [DONE]" in received, received[-500:]
    return first, time.perf_counter() - begin


async def crowd(port: int, clients: int, requests: int, new_tokens: int) -> dict[str, Any]:
    """So many clients, each asking again when it was answered; what they saw."""
    numbers = iter(range(requests))
    first, whole = [], []

    async def client() -> None:
        for number in numbers:
            a, b = await one_answer(port, request_of(number, new_tokens))
            first.append(a)
            whole.append(b)

    begin, begin_cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    tokens = requests * new_tokens
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens, "first": first, "whole": whole}


def percentile(values: list[float], share: float) -> float:
    """The smallest value that so large a share does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ---------------------------------------------------------------------------------------------------------- measurement


def measure(run: Path, counts: list[int], rounds: int, per_client: int, new_tokens: int) -> list[dict[str, Any]]:
    """All numbers, by the number of clients."""
    server_command = [sys.executable, "-m", "minigpt.cli", "serve", str(run), "--port", "0", "--slots", str(SLOTS)]
    bare_command = [sys.executable, __file__, "--engine", str(run)]
    results = []
    with child(server_command) as server, child(bare_command) as bare:
        assert server.stdout is not None
        assert bare.stdin is not None
        assert bare.stdout is not None
        port = int(server.stdout.readline().split("http://")[1].split()[0].rpartition(":")[2])
        for clients in counts:
            requests = max(per_client * clients, 4)
            served, engine = [], []
            for number in range(rounds + 1):  # the first warms up
                served.append(asyncio.run(crowd(port, clients, requests, new_tokens)))
                bare.stdin.write(f"{clients} {requests} {new_tokens}\n")
                bare.stdin.flush()
                engine.append(json.loads(bare.stdout.readline()))
                if number == 0:
                    served, engine = [], []
            rates = [r["tokens"] / r["seconds"] for r in served]
            limits = [r["tokens"] / r["seconds"] for r in engine]
            cores = len(os.sched_getaffinity(0))
            possible = [
                e["seconds"] / (e["seconds"] + s["cpu_seconds"] / cores) for s, e in zip(served, engine, strict=True)
            ]
            first = [1000 * value for r in served for value in r["first"]]
            whole = [1000 * value for r in served for value in r["whole"]]
            results.append(
                {
                    "clients": clients,
                    "tokens_per_second": common.spread(rates),
                    "engine_tokens_per_second": common.spread(limits),
                    "share_of_engine": common.spread([a / b for a, b in zip(rates, limits, strict=True)]),
                    "possible_share": common.spread(possible),
                    "first_token_ms": {"p50": statistics.median(first), "p99": percentile(first, 0.99)},
                    "answer_ms": {"p50": statistics.median(whole), "p99": percentile(whole, 0.99)},
                }
            )
            print(f"{clients} clients: {results[-1]['share_of_engine']['median']:.2f} of the engine", file=sys.stderr)
    return results


def table_of(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| clients | tokens/s | bare engine | server / engine | possible | first token p50 | p99 | answer p50 | p99 |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        share = r["share_of_engine"]
        cells = [f"{r['clients']}", f"{r['tokens_per_second']['median']:,.0f}"]
        cells.append(f"{r['engine_tokens_per_second']['median']:,.0f}")
        cells.append(f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})")
        cells.append(f"{r['possible_share']['median']:.2f}")
        cells += [f"{r[kind][p]:,.0f} ms" for kind in ("first_token_ms", "answer_ms") for p in ("p50", "p99")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per_client", type=int, default=3, help="answers of each client in a round")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: as many as torch takes")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)
    common.output_arguments(parser)
    options = parser.parse_args()
    if options.engine is not None:
        bare_engine(options.engine)
        return
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    config = {**common.CONFIG_S, "max_position_embeddings": 1024}
    if options.smoke:
        config |= {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
        options.clients, options.rounds, options.per_client, options.new_tokens = [1, 3], 1, 1, 8
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder) / "run", config)
        results = measure(run, options.clients, options.rounds, options.per_client, options.new_tokens)
    common.publish("Server", {"results": results}, table_of(results), options.json, options.markdown)


if __name__ == "__main__":
    main()
