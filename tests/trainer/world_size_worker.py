"""What two processes do for `test_resume_world_size.py`, under the `deepspeed` launcher, in one start.

    python world_size_worker.py JOBS.json

JOBS.json is a list of jobs: {"train": [OPTION …]} trains; {"copy": CASE, "from": CHECKPOINT, "to": RUN} loads a
checkpoint into an engine, whoever wrote it, and writes it again without a step between.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from distributed_worker import CONFIGS, make_model, windows

from minigpt import cli
from minigpt.trainer import checkpoint
from minigpt.trainer.engine import Engine, Processes, init_processes
from minigpt.trainer.loop import to_tensors
from minigpt.trainer.stage import StageModule
from minigpt.trainer.train_pretrain import PRETRAIN

COPIES = [(stage, optimizer) for stage in (1, 2) for optimizer in ("adamw", "muon")]


def make_engine(processes: Processes, stage: int, optimizer: str) -> Engine:
    """bf16 with float32 masters."""
    return Engine(
        StageModule(make_model(), PRETRAIN.loss),
        processes,
        dtype=torch.bfloat16,
        learning_rate=1e-2,
        optimizer_name=optimizer,
        config=CONFIGS / f"zero{stage}.json",
    )


def trained_engine(processes: Processes, stage: int, optimizer: str) -> Engine:
    """The same after three steps: with moments."""
    engine = make_engine(processes, stage, optimizer)
    for window in windows(processes, micro_batch=4)[:3]:
        for batch in window:
            engine.forward_backward(to_tensors(batch, processes.device), 1e-2)
        engine.step(1e-2)
    return engine


def copy(processes: Processes, case: tuple[int, str], source: Path, run: Path) -> Path:
    """Load and save: the new checkpoint's folder."""
    engine = make_engine(processes, *case)
    checkpoint.load(engine, source)
    folder = checkpoint.save(engine, run, {"step": 3}, keep=1)
    engine.close()
    return folder


def main() -> None:
    torch.set_num_threads(1)
    processes = init_processes()
    for job in json.loads(Path(sys.argv[-1]).read_text()):
        if "train" in job:
            cli.main(["train", "pretrain", *job["train"]])
        else:
            copy(processes, tuple(job["copy"]), Path(job["from"]), Path(job["to"]))


if __name__ == "__main__":
    main()
