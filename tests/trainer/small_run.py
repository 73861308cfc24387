"""The options of a run that takes a second, and what to compare when it has ended."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

# A model that trains in milliseconds, and everything that could differ from run to run said out loud.
SMALL = [
    *("--hidden_size=32", "--num_hidden_layers=2", "--num_attention_heads=4", "--num_key_value_heads=2"),
    *("--intermediate_size=64", "--global_batch_size=4", "--compile=false", "--dtype=fp32", "--threads=1"),
    "--tensorboard=false",
]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    def sentence(self) -> str:
        """The one line on stderr of a command that failed with exit status 1."""
        assert self.status == 1, (self.status, self.out, self.err)
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "unexpected" not in lines[0], "an error that nobody thought of"
        return lines[0]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*.pth")
    return torch.load(path, weights_only=True)


def assert_same_weights(found: Path, expected: Path) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
