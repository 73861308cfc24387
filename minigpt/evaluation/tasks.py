"""From what a person writes (`gsm8k:test.jsonl`) to tasks with their data read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minigpt.dataset.shards import MANIFEST, PACKED_STAGES, PackedDataset
from minigpt.errors import UserError, did_you_mean

from .bits_per_byte import PackedText, RawText
from .exact_answer import KINDS, ExactAnswer
from .multiple_choice import LAYOUTS, MultipleChoice
from .task import Task

NAMES = ("bpb", *KINDS, *LAYOUTS)
SYNTAX = "bpb, bpb:PATH, " + ", ".join(f"{name}:PATH" for name in NAMES[1:])
_BETWEEN = re.compile(rf",\s*(?=(?:{'|'.join(NAMES)})\b(?:[:,]|\s*$))")


def make_tasks(specs: Sequence[str], *, dev: Path | None = None, own_data: PackedDataset | None = None) -> list[Task]:
    """The tasks that are meant.

    Args:
        specs: NAME:PATH each, or several of them with commas between; `bpb` alone means `own_data`.
        dev: Solved examples for multiple choice.
        own_data: The validation split of the run's own data.

    Raises:
        UserError: for an unknown name, a path that does not exist, and data that is not what the name promises.
    """
    tasks: list[Task] = []
    for spec in (part for text in specs for part in _BETWEEN.split(text)):
        task = _make_task(spec.strip(), dev, own_data)
        names = [other.name for other in tasks]
        if task.name in names:
            task.name = next(name for n in range(2, len(names) + 3) if (name := f"{task.name}-{n}") not in names)
        tasks.append(task)
    if not tasks:
        raise UserError(f"--tasks is empty: tasks are {SYNTAX}")
    return tasks


def _make_task(spec: str, dev: Path | None, own_data: PackedDataset | None) -> Task:
    name, _, rest = spec.partition(":")
    if name not in NAMES:
        raise UserError(f"there is no task {name!r}{did_you_mean(name, NAMES)}; tasks are {SYNTAX}")
    if not rest:
        if name != "bpb":
            raise UserError(f"the task {name} needs its data: {name}:PATH")
        if own_data is None:
            raise UserError(
                "bpb without a path means the validation split of the run's data, and there is none: bpb:PATH"
            )
        return PackedText(own_data)
    path = Path(rest)
    if not path.exists():
        raise UserError(f"{path} does not exist; the task {name} reads it")
    if name in KINDS:
        return ExactAnswer.from_file(path, kind=name)
    if name in LAYOUTS:
        return MultipleChoice(name, path, dev)
    if (path / MANIFEST).exists():
        return PackedText(_validation_split(path), f"bpb-{path.name}")
    return RawText(path)


def _validation_split(folder: Path) -> PackedDataset:
    data = valid_data(folder)
    if data is None:
        raise UserError(f"{folder} holds no validation rows of a packed stage; pack it with --valid_fraction above 0")
    return data


def valid_data(folder: Path) -> PackedDataset | None:
    """The validation split of a packed folder; None where it has none, or none of packed rows."""
    train = PackedDataset(folder, "train")
    if train.stage not in PACKED_STAGES or not train.manifest["splits"].get("valid", {}).get("shards"):
        return None
    return PackedDataset(folder, "valid")


def data_of_run(run: Path) -> PackedDataset | None:
    """The validation split of what a run was trained on, where it still lies; None otherwise."""
    import yaml

    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        config = None
    named = config.get("data") if isinstance(config, dict) else None
    folders = [*(Path(path) for path in named or []), run / "data"]
    packed = [folder for folder in folders if (folder / MANIFEST).exists()]
    return valid_data(packed[0]) if packed else None


def tasks_of_run(run: Path, stage: str | None) -> list[Task]:
    """What fits a run: the validation split of its data, and the held-out part of its micro-world.

    Raises:
        UserError: when there is neither.
    """
    tasks: list[Task] = []
    data = data_of_run(run)
    if data is not None:
        tasks.append(PackedText(data))
    for file in _heldout_files(run):
        first = _first_record(file)
        if "text" in first:
            tasks.append(RawText(file, file.stem))
        elif stage != "pretrain" and "messages" in first:
            tasks.append(ExactAnswer.from_file(file))
    if not tasks:
        raise UserError(f"{run} comes with nothing to be judged by: give --tasks, which are {SYNTAX}")
    return tasks


def _heldout_files(run: Path) -> list[Path]:
    """Of the micro-world that the run, or the quickstart that it is part of, was trained on."""
    for folder in (run / "microworld", run.resolve().parent / "microworld"):
        files = sorted(folder.glob("heldout_*.jsonl"))
        if files:
            return files
    return []


def _first_record(file: Path) -> dict[str, Any]:
    with file.open(encoding="utf-8") as lines:
        try:
            record = json.loads(lines.readline())
        except ValueError:
            return {}
    return record if isinstance(record, dict) else {}
