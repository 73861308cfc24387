"""Servers to talk to: real processes with a small model that follows a script.

The model is a MiniGPT whose next token depends on the last token only: attention and feed-forward layers add nothing,
and the output layer holds, for each token of the script, a multiple of the embedding of the token before it. So every
answer and every probability is known in advance:

    prompt → <think> 思 考 </think> <answer> one two three one two three …

After " two" the logit of " three" is 12 and that of "</answer>" 11; all others are 0. Greedy answers never end by
themselves; with a bias on " three" they do, after " two". Tokens outside of the script are followed by any token.
"""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from minigpt.dataset.chat import ChatEncoder
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

SHIPPED = Path(__file__).parents[2] / "minigpt" / "model"
VOCABULARY, CONTEXT = 6400, 32768
GOES_ON, ENDS = 12.0, 11.0
SLOTS, WAITING = 8, 120


class Script:
    """The ids of the script's tokens, and who follows whom."""

    def __init__(self) -> None:
        encoder = ChatEncoder(SHIPPED)
        self.prompt_end = encoder.encode_prompt([{"role": "user", "content": "x"}])[-1]
        self.one, self.two, self.three = (encoder.encode_text(f" {word}")[0] for word in ("one", "two", "three"))
        tags = [encoder.token_id(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
        think, end_think, answer, self.end_answer = tags
        thoughts = [encoder.encode_text(character)[0] for character in "思考"]
        chain = [self.prompt_end, think, *thoughts, end_think, answer, self.one, self.two, self.three, self.one]
        self.followers = {a: {b: GOES_ON} for a, b in pairwise(chain)}
        self.followers[self.two][self.end_answer] = ENDS
        self.followers[self.end_answer] = {encoder.im_end_id: GOES_ON}
        self.to_the_end = {str(self.three): -100.0}  # a logit bias

    @staticmethod
    def words(count: int) -> str:
        """So many tokens of an endless answer."""
        return "".join(f" {('one', 'two', 'three')[i % 3]}" for i in range(count))


def scripted_model(script: Script) -> MiniGPT:
    """The model described above."""
    torch.manual_seed(0)
    config = MiniGPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    model = MiniGPT(config).eval()
    directions = torch.linalg.qr(torch.randn(64, 64)).Q  # orthogonal, so that no token answers for another
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()
        model.lm_head.weight.zero_()
        for direction, (token, followers) in zip(directions, script.followers.items(), strict=False):
            model.model.embed_tokens.weight[token] = direction * 64.0  # long, so that the norm's epsilon is nothing
            for follower, logit in followers.items():
                model.lm_head.weight[follower] += direction * logit / 8.0  # the final norm makes it sqrt(64) long
    return model


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen
    url: str
    log: Path
    name: str

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        return next(float(line.split()[1]) for line in self.get("/metrics").splitlines() if line.startswith(f"{name} "))

    def memory(self) -> int:
        """Resident memory in bytes."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


SERVE = ("-m", "minigpt.cli", "serve")


def start_server(folder: Path, run: Path, *options: str, program: Sequence[str] = SERVE, **place: Any) -> Running:
    """Starts `minigpt serve`, or another program of Python's, on a free port and waits until it listens."""
    log = folder / "server.log"
    process = subprocess.Popen(
        [sys.executable, *program, str(run), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        **place,
    )
    line = process.stdout.readline()
    assert " is served at http://" in line, log.read_text()
    return Running(process, line.split(" is served at ")[1].split()[0], log, line.split()[0])


def stop_server(server: Running) -> int:
    """Asks it to end; its exit status."""
    server.process.send_signal(signal.SIGTERM)
    try:
        return server.process.wait(timeout=60)
    finally:
        server.process.kill()


def wait_until(condition: Callable[[], bool], tries: int, pause: float = 0.05) -> bool:
    """Looks again and again, `tries` times."""
    for _ in range(tries):
        if condition():
            return True
        time.sleep(pause)
    return False
