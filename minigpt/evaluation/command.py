"""`minigpt eval RUN`: judge a finished model, and keep what is needed to believe the numbers later."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.dataset.shards import write_atomically
from minigpt.errors import UserError

from .task import Metric, Settings, TaskResult, fingerprint
from .tasks import data_of_run, make_tasks, tasks_of_run

if TYPE_CHECKING:
    from minigpt.model.model_minigpt import MiniGPT

FOLDER = "eval"
SAMPLING_TEMPERATURE = 0.8  # of several samples, when none is given
PACKAGES = ("torch", "transformers", "tokenizers")


@dataclass
class EvalOptions:
    """Judge a model by held-out text, questions with known answers, and multiple choice.

    Args:
        run: Run folder, Hugging Face folder or .pth file.
        tasks: What to judge by, NAME:PATH each. bpb: bits per byte and perplexity of raw text or of a packed folder
            (without a path: the validation split of the run's data). questions: prompt records with answers. gsm8k,
            countdown: files in the layout of these sets. arc: multiple choice, jsonl. cmmlu, ceval: multiple choice,
            csv or a folder of them. None: what fits the run.
        limit: Only the first so many questions of each file, or windows over its texts.
        max_new_tokens: A reply is cut here.
        samples: Replies sampled for each question; above 1, pass@k is reported.
        k: pass@k for these k. None: 1 and the number of samples.
        temperature: Of sampling. None: 0 (always the most probable token) for one sample, 0.8 for several.
        enable_thinking: true and false switch the model's thinking on and off; null leaves it to the model.
        shots: Solved examples before each multiple-choice question.
        dev: File or folder of the solved examples.
        chat: Put multiple-choice questions as a chat instead of as plain text.
        context: Tokens of the window over long texts. None: the rows that the run was trained on, else what the model
            was made for, up to 2,048.
        batch_size: Replies generated together.
        seed: Of the random numbers; the same seed gives the same replies.
        adapter: A LoRA folder to merge into the weights first, or a run that has one.
        device: auto, cpu or cuda.
        dtype: auto, fp32 or bf16.
    """

    run: Path
    tasks: list[str] | None = None
    limit: int | None = None
    max_new_tokens: int = 256
    samples: int = 1
    k: list[int] | None = None
    temperature: float | None = None
    enable_thinking: bool | None = None
    shots: int = 0
    dev: Path | None = None
    chat: bool = False
    context: int | None = None
    batch_size: int = 64
    seed: int = 0
    adapter: Path | None = None
    device: str = "auto"
    dtype: str = "auto"


def evaluate(options: EvalOptions) -> list[TaskResult]:
    """Run the tasks, write RUN/eval/*.json and show a table.

    Raises:
        UserError: before anything is computed, for options, data or a run that cannot be used.
    """
    from minigpt.generation.load import find_weights, load_for_inference, stage_of
    from minigpt.observe.progress import progress_bar

    settings = _settings(options)
    run, weights, stage = options.run, find_weights(options.run), stage_of(options.run)
    if stage == "reward":
        raise UserError(f"{run} is a reward model, which neither predicts text nor answers; give a language model")
    if options.tasks is None:
        tasks = tasks_of_run(run, stage)
    else:
        tasks = make_tasks(options.tasks, dev=options.dev, own_data=data_of_run(run))
    if options.dev is not None and not options.shots:
        raise UserError("--dev is given but --shots is 0; say how many solved examples to show, such as --shots 5")
    model, encoder = load_for_inference(run, options.device, options.dtype, options.adapter)
    folder = (run if run.is_dir() else run.parent) / FOLDER
    folder.mkdir(exist_ok=True)
    about = _surroundings(options, weights, stage, model)
    results = []
    for task in tasks:
        started = time.monotonic()
        with progress_bar() as report:
            result = task.run(model, encoder, settings, partial(report, task.name))
        seconds = round(time.monotonic() - started, 3)
        record = {**_as_json(result), "data": task.source, "settings": asdict(settings), "seconds": seconds, **about}
        path = _free_path(folder / f"{_file_name(task.name, settings, options.adapter)}.json", record)
        write_atomically(path, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
        results.append(result)
    _show(results)
    reported = (folder.parent / "metrics.jsonl").exists()
    print(f"written to {folder}" + (f"; `minigpt report {folder.parent}` shows them with samples" if reported else ""))
    return results


def _settings(options: EvalOptions) -> Settings:
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if options.samples == 1 else SAMPLING_TEMPERATURE
    return Settings(
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        samples=options.samples,
        k=tuple(options.k or sorted({1, options.samples})),
        temperature=temperature,
        enable_thinking=options.enable_thinking,
        shots=options.shots,
        chat=options.chat,
        context=options.context or _row_length(options.run),
        batch_size=options.batch_size,
        seed=options.seed,
    )


def _row_length(run: Path) -> int | None:
    """Tokens of the rows that a run was trained on."""
    try:
        length = json.loads((run / "summary.json").read_text(encoding="utf-8"))["seq_len"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return length if isinstance(length, int) and length > 1 else None


def _surroundings(options: EvalOptions, weights: Path, stage: str | None, model: MiniGPT) -> dict[str, Any]:
    """What was judged, with what, and by which command."""
    from minigpt.observe.hardware import describe_hardware, package_version, source_commit

    files = [weights] if weights.is_file() else sorted([*weights.glob("*.safetensors"), weights / "config.json"])
    return {
        "model": {
            "path": str(weights),
            "adapter": None if options.adapter is None else str(options.adapter),
            "sha256": fingerprint(*files),
            "stage": stage,
            "parameters": model.num_parameters(),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": str(next(model.parameters()).device),
        },
        "command": shlex.join(["minigpt", *sys.argv[1:]]),
        "commit": source_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: package_version(name) for name in PACKAGES},
        "hardware": describe_hardware(),
    }


def _as_json(result: TaskResult) -> dict[str, Any]:
    """Strict JSON: what is not a number is null."""

    def number(x: float) -> float | None:
        return x if math.isfinite(x) else None

    metrics = [
        {"name": m.name, "value": number(m.value), "low": number(m.low), "high": number(m.high)} for m in result.metrics
    ]
    return {
        "task": result.task,
        "metrics": metrics,
        "n": result.n,
        "details": result.details,
        "samples": result.samples,
    }


def _file_name(task: str, settings: Settings, adapter: Path | None) -> str:
    """The task and what was asked differently from usual, so that no result takes another one's place."""
    thinking = {None: "", True: "think", False: "no-think"}[settings.enable_thinking]
    parts = [
        task,
        f"{settings.samples}-samples" if settings.samples > 1 else "",
        thinking,
        f"{settings.shots}-shot" if settings.shots else "",
        "chat" if settings.chat else "",
        f"with-{adapter.resolve().name}" if adapter is not None else "",
        f"first-{settings.limit}" if settings.limit else "",
    ]
    return re.sub(r"[^\w.-]+", "-", "-".join(part for part in parts if part))


def _free_path(path: Path, record: dict[str, Any]) -> Path:
    """`path`, or one beside it where that holds a result of other settings or data."""

    def asked(found: dict[str, Any]) -> str:
        model = found.get("model") or {}
        return json.dumps([found.get("settings"), found.get("data"), model.get("adapter")], sort_keys=True, default=str)

    try:
        other = asked(json.loads(path.read_text(encoding="utf-8"))) != asked(
            json.loads(json.dumps(record, default=str))
        )
    except (OSError, ValueError):
        return path
    if not other:
        return path
    return path.with_name(f"{path.stem}-{hashlib.sha256(asked(record).encode()).hexdigest()[:8]}.json")


def _show(results: Iterable[TaskResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 110)
    table = Table("task", "metric", "value", "95 % interval", "n")
    for result in results:
        for i, metric in enumerate(result.metrics):
            value, interval = in_words(metric)
            table.add_row(result.task if i == 0 else "", metric.name, value, interval, str(result.n) if i == 0 else "")
    console.print(table)


def in_words(metric: Metric) -> tuple[str, str]:
    """Value and interval as a table shows them: shares as per cent, everything else with three decimals."""
    share = metric.name.startswith(("acc", "pass@"))

    def text(x: float) -> str:
        return f"{x:.1%}" if share else f"{x:,.3f}"

    return text(metric.value), f"{text(metric.low)} to {text(metric.high)}" if math.isfinite(metric.low) else ""
