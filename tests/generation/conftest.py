"""Small random models that behave like trained ones: next-token distributions are peaked and depend on the text."""

from pathlib import Path

import pytest
import torch

from minigpt.generation.native import NativeDecoder
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

SHIPPED = Path(__file__).parents[2] / "minigpt" / "model"


def peaked_model(seed: int = 0, **options) -> MiniGPT:
    """A tiny model with weights so large that its logits spread over several nats."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 400,
    }
    model = MiniGPT(MiniGPTConfig(**{**shape, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


@pytest.fixture(scope="session")
def make_model():
    return peaked_model


@pytest.fixture(scope="session")
def model() -> MiniGPT:
    return peaked_model()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A finished run with the shipped tokenizer and a model that babbles."""
    run = tmp_path_factory.mktemp("run")
    model = peaked_model(vocab_size=6400, max_position_embeddings=4096)
    model.save_pretrained(run / "hf", tokenizer_folder=SHIPPED)
    (run / "summary.json").write_text('{"stage": "sft"}')
    return run


@pytest.fixture(params=["native", "torch"])
def computed_by(request, monkeypatch) -> str:
    """Once with the compiled decode step, once without."""
    if request.param == "torch":
        monkeypatch.setattr(NativeDecoder, "covers", lambda decoder: False)
    return request.param
