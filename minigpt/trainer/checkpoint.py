"""Checkpoints that are either whole or not there.

    RUN/checkpoints/step_00000100/
        engine/…          weights, masters and optimizer state, one file a rank (written by the engine)
        rng_00000.pt …    random state, one file a rank
        state.json        step, samples consumed, options, data fingerprint, versions, number of ranks
        manifest.json     SHA-256 of every file above, written last

Everything is written under a temporary name, synced to disk and renamed: a process killed at any moment leaves either
the old checkpoints or the new one besides. Hashes are verified before anything is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minigpt.errors import UserError
from minigpt.system import sync

from .engine import Engine

MANIFEST = "manifest.json"
STATE = "state.json"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def save(engine: Engine, run: Path, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint for `state["step"]` and delete all but the newest `keep`. All ranks call it.

    Args:
        engine: Whose weights and optimizer state are saved.
        run: The run folder.
        state: What else a resumed run needs, as JSON values.
        keep: How many checkpoints stay.
    """
    final = checkpoint_folder(run, state["step"])
    partial = final.with_name(f".{final.name}.partial")
    rank = engine.processes.rank
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.processes.barrier()
    try:
        engine.save_state(partial)
        torch.save(_rng_state(), partial / f"rng_{rank:05d}.pt")
        engine.processes.barrier()
        if rank == 0:
            _seal(partial, {**state, "world_size": engine.world_size})
            if final.exists():  # of a run that was started anew; nobody saves the same step twice
                shutil.rmtree(final)
            partial.rename(final)
            sync(final.parent)
            _tidy(run, final, keep)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the checkpoint of step {state['step']} could not be written to {final.parent} ({_reason(error)}); "
            "free some space and run the same command again, without --overwrite: it goes on from the checkpoint before"
        ) from error
    engine.processes.barrier()
    return final


def _tidy(run: Path, newest: Path, keep: int) -> None:
    """Delete what `newest` replaces: older checkpoints beyond `keep`, and what an earlier attempt left behind.

    Checkpoints of later steps are such leftovers: damaged ones that were passed over, or those of a run that was
    started anew. Kept, they would count among the newest and be resumed from.
    """
    finished = list_checkpoints(run)
    older = [path for path in finished if path.name <= newest.name][:-keep]
    later = [path for path in finished if path.name > newest.name]
    for path in [*older, *later, *newest.parent.glob(".step_*.partial")]:
        shutil.rmtree(path)


def _reason(error: Exception) -> str:
    free = "" if not isinstance(error, OSError) or error.strerror is None else error.strerror
    return free or str(error).splitlines()[0]


def _seal(folder: Path, state: dict[str, Any]) -> None:
    (folder / STATE).write_text(json.dumps(state, indent=2, default=str) + "\n")
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    with open(folder / MANIFEST, "w") as file:
        json.dump(hashes, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync(inner)
    sync(folder)


def list_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def verify(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint whose every file is what was written. Errors: UserError naming the file."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} has no readable {MANIFEST}") from None
    if not isinstance(hashes, dict) or STATE not in hashes:
        raise UserError(f"{folder / MANIFEST} does not list {STATE}")
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise UserError(f"{path} is damaged (its SHA-256 is not the one in {MANIFEST})")
    return json.loads((folder / STATE).read_text())


def newest_good(
    run: Path, say: Callable[[str], None], beside: Path | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its state; damaged ones are named through `say` and passed over.

    With `beside`, the folder of another engine of the same run, those count of which it has the same step, undamaged.
    """
    for folder in reversed(list_checkpoints(run)):
        try:
            state = verify(folder)
            if beside is not None:
                verify(checkpoint_folder(beside, state["step"]))
            return folder, state
        except UserError as error:
            say(f"{error}: passing over this checkpoint, going back to the one before")
    return None


def load(engine: Engine, folder: Path) -> None:
    """Put a verified checkpoint's weights, optimizer state and random state back. All ranks call it.

    At another world size than it was written at, the random streams of its ranks have no ranks to go on in: each rank
    gets a new one, a function of rank 0's saved state and its own number.

    Errors: UserError when a file holds anything but tensors and plain values; nothing in it is executed.
    """
    rank, written_by = engine.processes.rank, json.loads((folder / STATE).read_text())["world_size"]
    try:
        engine.load_state(folder, written_by)
        if written_by == engine.world_size:
            _set_rng_state(torch.load(folder / f"rng_{rank:05d}.pt", weights_only=True))
        else:
            _start_stream(torch.load(folder / "rng_00000.pt", weights_only=True), rank)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{folder} holds objects that a training state has no use for, so it was not loaded; delete that folder "
            "to go on from the checkpoint before it"
        ) from error


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _start_stream(state: dict[str, torch.Tensor], rank: int) -> None:
    """Seed this rank's generators from the state of another run's rank 0, differently for each rank."""
    digest = hashlib.sha256(state["cpu"].numpy().tobytes() + rank.to_bytes(4, "little")).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
