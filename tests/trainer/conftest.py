"""A small packed data set, and the `minigpt` command as a function."""

import json
import random
from pathlib import Path

import pytest
import torch
from small_run import SMALL, Ended

from data_prep.pack import PackOptions, pack
from minigpt import cli

WORDS = "the cat sat on a mat and saw dogs run far away 你好 世界 小猫 在 垫子 上"


@pytest.fixture
def minigpt(capsys):
    """`minigpt("train", "pretrain", …)`: runs the command in this process and says how it ended."""

    def run(*arguments: object) -> Ended:
        threads = torch.get_num_threads()
        status = 0
        capsys.readouterr()
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        finally:
            torch.set_num_threads(threads)
        return Ended(status, *capsys.readouterr())

    return run


@pytest.fixture
def train(minigpt):
    """A successful `minigpt train STAGE` of the small model; returns its output."""

    def run(stage: str, *arguments: object) -> str:
        ended = minigpt("train", stage, *SMALL, *arguments)
        assert ended.status == 0, ended.err
        return ended.out

    return run


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(4, 40)))


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """120 short documents as raw JSON lines."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("texts")
    return write_jsonl(folder / "texts.jsonl", ({"text": f"{i} {sentence(rng)}"} for i in range(120)))


@pytest.fixture(scope="session")
def packed(tmp_path_factory, texts) -> Path:
    """The same, packed for pretraining in rows of 64 tokens, some held out."""
    folder = tmp_path_factory.mktemp("packed") / "pretrain"
    pack(PackOptions(stage="pretrain", input=[texts], output=folder, seq_len=64, workers=1, valid_fraction=0.1))
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """40 conversations, packed for fine-tuning."""
    rng = random.Random(1)
    turns = (
        {"messages": [{"role": "user", "content": sentence(rng)}, {"role": "assistant", "content": sentence(rng)}]}
        for _ in range(40)
    )
    folder = tmp_path_factory.mktemp("conversations")
    source = write_jsonl(folder / "chats.jsonl", turns)
    pack(PackOptions(stage="sft", input=[source], output=folder / "sft", seq_len=128, workers=1, valid_fraction=0.1))
    return folder / "sft"
