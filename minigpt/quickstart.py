"""From nothing to a model that chats, in minutes: the whole road once, on the embedded micro-world.

    generate → pack → pretrain → SFT → held-out questions → chat samples → report

Every step is the same code that the other commands run; this file only chooses a recipe that fits the machine and
tells what happened.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt.errors import UserError

if TYPE_CHECKING:
    from minigpt.observe.hardware import Probe

GREETINGS = ("你是谁？", "Who are you?")


@dataclass
class QuickstartOptions:
    """Train a small bilingual model from nothing and see what it can do.

    Args:
        output: Folder for data, runs and report.
        preset: cpu-bf16, fp32 (no bf16 units: smaller) or gpu (larger); auto: after a one-second probe.
        seed: Of the micro-world, the weights and the data order.
        overwrite: Start over when the folder holds an earlier quickstart.
    """

    output: Path = Path("out/quickstart")
    preset: Literal["auto", "cpu-bf16", "fp32", "gpu"] = "auto"
    seed: int = 0
    overwrite: bool = False


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how long.

    Attributes:
        model: Fields of TrainOptions that give the shape and precision.
        rows: Packed rows a step.
        pretrain_steps: Optimizer steps of pretraining.
        sft_steps: Optimizer steps of fine-tuning.
        pretrain_rate: Peak learning rate.
        sft_rate: Peak learning rate.
        efficiency: Part of the machine's matrix-product rate that training reaches, for the prediction.
        overhead: Seconds that are not training: start-up, compilation, packing, evaluation.
    """

    model: dict[str, Any]
    rows: int
    pretrain_steps: int
    sft_steps: int
    pretrain_rate: float
    sft_rate: float
    efficiency: float
    overhead: float


SEQ_LEN = 256
RECIPES = {
    "cpu-bf16": Recipe({"preset": "s", "dtype": "bf16"}, 8, 650, 550, 6e-3, 3e-3, 0.40, 95),
    "fp32": Recipe(
        {"preset": "s", "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6,
         "num_key_value_heads": 3, "dtype": "fp32"}, 8, 550, 450, 6e-3, 3e-3, 0.45, 75,
    ),
    "gpu": Recipe(
        {"preset": "s", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "dtype": "bf16"},
        32, 1000, 600, 3e-3, 1e-3, 0.15, 90,
    ),
}  # fmt: skip


def quickstart(options: QuickstartOptions) -> None:
    """Generate a small world, pretrain, fine-tune, ask held-out questions, chat, and write a report."""
    started = time.monotonic()
    folder = options.output
    if options.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / "summary.json").exists():
        _show(folder, json.loads((folder / "summary.json").read_text(encoding="utf-8")))
        print(f"\n(this is the finished quickstart in {folder}; --overwrite runs it again)")
        return
    folder.mkdir(parents=True, exist_ok=True)
    probe, name, recipe = _choose(options)
    _announce(probe, name, recipe)
    data = _prepare_data(folder, options.seed)
    summaries = _train(folder, options, recipe, data)
    heldout, replies = _ask_heldout(folder, data)
    samples = _chat_samples(folder, data)
    summary = {
        "preset": name,
        "stages": _stage_rows(summaries, heldout),
        "heldout": heldout,
        "samples": samples,
        "seconds": time.monotonic() - started,
        "hardware": summaries["sft"]["hardware"],
        "failures": replies,
    }
    _write_report(folder, summary)
    _show(folder, summary)


def _choose(options: QuickstartOptions) -> tuple[Probe, str, Recipe]:
    from minigpt.observe.hardware import probe_machine

    probe = probe_machine(1.0)
    name = probe.kind if options.preset == "auto" else options.preset
    if name == "gpu" and probe.device != "cuda":
        raise UserError("--preset gpu needs a GPU and torch sees none; leave --preset out")
    return probe, name, RECIPES[name]


def _announce(probe: Probe, name: str, recipe: Recipe) -> None:
    tokens = (recipe.pretrain_steps + recipe.sft_steps) * recipe.rows * SEQ_LEN
    seconds = recipe.overhead + probe.training_seconds(_parameters(recipe), tokens, efficiency=recipe.efficiency)
    print(f"machine: {probe.describe()} → preset {name}, about {seconds / 60:.0f} minutes")


def _parameters(recipe: Recipe) -> int:
    from minigpt.trainer.options import PRESETS

    shape = {**PRESETS["s"], **recipe.model}
    E, F, L = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    return L * (3 * E * E + 3 * E * F) + 6400 * E


def _prepare_data(folder: Path, seed: int) -> dict[str, Path]:
    """The micro-world's files, and the two packed folders."""
    from data_prep.microworld import MicroWorldOptions, write_microworld
    from data_prep.pack import PackOptions, pack
    from minigpt.observe.progress import progress_bar

    print("\n[1/5] data: a small world in Chinese and English", flush=True)
    files = write_microworld(folder / "microworld", MicroWorldOptions(seed=seed, size="quickstart"))
    with progress_bar() as progress:
        for stage in ("pretrain", "sft"):
            output = folder / "data" / stage
            manifest = pack(
                PackOptions(stage=stage, input=[files[stage]], output=output, seq_len=SEQ_LEN, valid_fraction=0.01),
                progress,
            )
            files[f"{stage}_packed"] = output
            rows = manifest["splits"]["train"]["rows"]
            print(f"      {stage}: {rows:,} rows of {SEQ_LEN} tokens", flush=True)
    return files


def _train(folder: Path, options: QuickstartOptions, recipe: Recipe, data: dict[str, Path]) -> dict[str, Any]:
    from minigpt.trainer.loop import train
    from minigpt.trainer.options import TrainOptions
    from minigpt.trainer.train_full_sft import SFT
    from minigpt.trainer.train_pretrain import PRETRAIN

    common = TrainOptions(
        global_batch_size=recipe.rows,
        seed=options.seed,
        eval_rows=32,
        schedule="wsd",
        **recipe.model,
    )
    print("\n[2/5] pretrain: the language and the world, from random weights", flush=True)
    pretrain = replace(
        common,
        data=[data["pretrain_packed"]],
        save_dir=folder / "pretrain",
        max_steps=recipe.pretrain_steps,
        learning_rate=recipe.pretrain_rate,
        recipe="quickstart-pretrain",
    )
    summaries = {"pretrain": train(PRETRAIN, pretrain)}
    print("\n[3/5] SFT: to answer when spoken to", flush=True)
    sft = replace(
        common,
        data=[data["sft_packed"]],
        save_dir=folder / "sft",
        init=folder / "pretrain",
        max_steps=recipe.sft_steps,
        learning_rate=recipe.sft_rate,
        recipe="quickstart-sft",
    )
    summaries["sft"] = train(SFT, sft)
    return summaries


def _ask_heldout(folder: Path, data: dict[str, Path]) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Accuracy on the held-out questions after each stage, beside a look-up of the nearest training question."""
    from minigpt.evaluation.exact_answer import ExactAnswer, ModelAnswers
    from minigpt.evaluation.nearest_neighbour import nearest_neighbour_baseline
    from minigpt.generation.load import load_for_inference
    from minigpt.observe.progress import progress_bar

    print("\n[4/5] held-out questions: people, facts and sums that were never trained on", flush=True)
    training = [json.loads(line) for line in data["sft"].read_text(encoding="utf-8").splitlines()]
    results: dict[str, Any] = {}
    failures: list[dict[str, str]] = []
    for name, file in (("questions", data["heldout_qa"]), ("sums", data["heldout_sums"])):
        task = ExactAnswer.from_file(file)
        result: dict[str, Any] = {"n": len(task.records)}
        for stage in ("pretrain", "sft"):
            model, encoder = load_for_inference(folder / stage)
            with progress_bar() as report:
                progress = partial(_report_done, report, f"{name} after {stage}", len(task.records))
                outcome = task(ModelAnswers(model, encoder, progress=progress))
            result[f"after_{stage}"] = outcome.accuracy.value
            if stage == "sft":
                result["interval"] = list(outcome.accuracy.interval())
                wrong = [i for i, right in enumerate(outcome.correct) if not right]
                failures += [
                    {
                        "question": task.records[i]["messages"][-1]["content"],
                        "expected": task.records[i]["answer"],
                        "reply": outcome.replies[i],
                    }
                    for i in wrong[:5]
                ]
        result["nearest_neighbour"] = nearest_neighbour_baseline(training, task.records).value
        results[name] = result
    return results, failures


def _report_done(report: Callable[[str, int, int], None], job: str, total: int, done: int) -> None:
    report(job, done, total)


def _chat_samples(folder: Path, data: dict[str, Path]) -> list[dict[str, str]]:
    """A few greedy answers as they come: who are you, and held-out questions in both languages with what is right."""
    from minigpt.evaluation.answers import read_prompt_records
    from minigpt.evaluation.exact_answer import ModelAnswers
    from minigpt.generation.load import load_for_inference

    print("\n[5/5] chat", flush=True)
    draw = random.Random(0)
    asked = [(text, "") for text in GREETINGS]
    for file, kind in ((data["heldout_qa"], "world"), (data["heldout_sums"], "sum")):
        records = read_prompt_records(file)
        for language in ("zh", "en"):
            fitting = [r for r in records if r["meta"]["lang"] == language and r["meta"]["kind"] == kind]
            record = draw.choice(fitting)
            asked.append((record["messages"][-1]["content"], record["answer"]))
    model, encoder = load_for_inference(folder / "sft")
    replies = ModelAnswers(model, encoder)([[{"role": "user", "content": text}] for text, _ in asked])
    samples = []
    for (text, right), reply in zip(asked, replies, strict=True):
        samples.append({"prompt": text, "answer": reply, **({"right_answer": right} if right else {})})
    return samples


def _stage_rows(summaries: dict[str, Any], heldout: dict[str, Any]) -> list[dict[str, Any]]:
    total = sum(task["n"] for task in heldout.values())
    rows = []
    for stage, summary in summaries.items():
        right = sum(task["n"] * task[f"after_{stage}"] for task in heldout.values())
        rows.append(
            {
                "stage": stage,
                "loss": summary["valid_loss"],
                "bits_per_byte": summary["bits_per_byte"],
                "heldout_accuracy": right / total,
                "tokens_per_second": summary["tokens_per_second"],
                "seconds": summary["seconds"],
            }
        )
    return rows


def _write_report(folder: Path, summary: dict[str, Any]) -> None:
    from minigpt.observe.report import build_report
    from minigpt.trainer.run import write_text

    write_text(folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False, default=str) + "\n")
    build_report(folder)


def _show(folder: Path, summary: dict[str, Any]) -> None:
    """The tables, the samples, and what to try next."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 110)
    stages = Table(
        "stage", "valid loss", "bits/byte", "held-out accuracy", "tokens/s", "time", title="What was trained"
    )
    for row in summary["stages"]:
        stages.add_row(
            row["stage"],
            f"{row['loss']:.3f}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['heldout_accuracy']:.1%}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds']:.0f} s",
        )
    tasks = Table("held-out", "n", "look-up", "after pretrain", "after SFT", "95 % interval", title="Never trained on")
    for name, task in summary["heldout"].items():
        low, high = task["interval"]
        values = (f"{task[k]:.1%}" for k in ("nearest_neighbour", "after_pretrain", "after_sft"))
        tasks.add_row(name, str(task["n"]), *values, f"{low:.0%} to {high:.0%}")
    console.print()
    console.print(stages)
    console.print(tasks)
    for sample in summary["samples"]:
        console.print(f"\n[bold]you[/bold]      {escape(sample['prompt'])}")
        console.print(f"[bold]MiniGPT[/bold]  {escape(sample['answer'])}")
        if "right_answer" in sample:
            console.print(f"         [dim](never trained on; right is: {escape(sample['right_answer'])})[/dim]")
    run = folder / "sft"
    console.print(
        f"\n{summary['seconds'] / 60:.1f} minutes in all; report with curves: {folder / 'report.md'}\n\n"
        "What to try next\n"
        f"  minigpt chat {run}                      talk to it (try: 请算一算 38 加 47。)\n"
        f"  minigpt generate {run} --prompt '你好'   one answer\n"
        "  minigpt data inspect FILE               look at your own text, then: minigpt data pack --help\n"
        "  minigpt train pretrain --help           train on it\n"
        "  minigpt verify 1                        the ten milestones, one check each"
    )


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(quickstart, QuickstartOptions)
