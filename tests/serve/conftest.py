"""The servers that these tests talk to; see `scripted_server`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from openai import OpenAI
from scripted_server import SHIPPED, SLOTS, WAITING, Running, Script, scripted_model, start_server, stop_server

from minigpt.model.model_lora import apply_lora
from minigpt.model.peft_format import save_adapter


@pytest.fixture(scope="session")
def script() -> Script:
    return Script()


@pytest.fixture(scope="session")
def scripted_run(script, tmp_path_factory) -> Path:
    """A finished run with the scripted model."""
    run = tmp_path_factory.mktemp("serve") / "scripted"
    scripted_model(script).save_pretrained(run / "hf", tokenizer_folder=SHIPPED)
    (run / "summary.json").write_text(json.dumps({"stage": "sft"}))
    return run


@pytest.fixture(scope="session")
def adapter(script, tmp_path_factory) -> Path:
    """An adapter that makes the scripted model say something else."""
    model = scripted_model(script)
    apply_lora(model, rank=2, alpha=6400.0, targets=["o_proj"])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="session")
def server(scripted_run, tmp_path_factory) -> Iterator[Running]:
    """The server that most tests talk to; greedy unless asked otherwise."""
    options = ["--temperature", "0", "--slots", str(SLOTS), "--max_waiting", str(WAITING), "--max_new_tokens", "30000"]
    running = start_server(tmp_path_factory.mktemp("log"), scripted_run, *options)
    yield running
    assert stop_server(running) == 0, running.log.read_text()
    assert running.log.read_text() == ""  # no traceback, whatever the tests sent


@pytest.fixture
def client(server) -> OpenAI:
    """OpenAI's client as it is."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=60)
