"""Whole runs in this process, where roles of one worker need no actors, and what their folders hold."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_rl import InlineGroup

from minigpt.rl import cluster
from minigpt.rl.group import WorkerGroup
from minigpt.rl.layout import Layout
from minigpt.trainer.engine import _load_safely


@contextmanager
def runs_without_actors() -> Iterator[None]:
    """One Ray for all runs meanwhile. Roles of several workers are actors as ever."""

    def make_group(worker: type, role: str, layout: Layout, *rest: Any) -> Any:
        return (WorkerGroup if layout[role].workers > 1 else InlineGroup)(worker, role, layout, *rest)

    cluster.connect(num_cpus=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt.rl.roles.WorkerGroup", make_group)
        patch.setattr(cluster, "connect", lambda address: None)
        patch.setattr(cluster, "disconnect", lambda: None)
        try:
            yield
        finally:  # a test that fails here leaves no Ray to the next one
            patch.undo()
            cluster.disconnect()


def interrupted(whole: Path, folder: Path, step: int) -> Path:
    """The run as a kill between the critic's checkpoint and the policy's leaves it: the critic's is one step ahead."""
    shutil.copytree(whole, folder)
    for left in [folder / "summary.json", folder / "hf", *folder.glob("*.pth")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    for engine, last in ((folder, step), (folder / "critic", step + 1)):
        for checkpoint in (engine / "checkpoints").glob("step_*"):
            if int(checkpoint.name.removeprefix("step_")) > last:
                shutil.rmtree(checkpoint)
    return folder


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def module_weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    (path,) = checkpoint(run, step).rglob("*model_states.pt")
    return torch.load(path, weights_only=True)["module"]


def tensors_in(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a saved state, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for k, v in items for key, tensor in tensors_in(v, f"{name}/{k}").items()}


def engine_state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, masters, moments and random state of a checkpoint."""
    files = sorted(checkpoint(run, step).rglob("*.pt"))
    return {key: t for file in files for key, t in tensors_in(_load_safely(file, "cpu"), file.name).items()}


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl but for what a clock says."""
    timed = ("seconds", "overhead", "tokens_per_second", "generated_tokens_per_second", "time")
    return {key: value for key, value in line.items() if not key.startswith(timed)}


def position(run: Path, step: int) -> dict[str, Any]:
    """Where a checkpoint says that the run stands."""
    found = json.loads((checkpoint(run, step) / "state.json").read_text())["position"]
    return {**without_times(found), "results": without_times(found["results"])}
