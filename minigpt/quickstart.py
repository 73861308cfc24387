"""From nothing to a model that chats and thinks, in minutes: the whole road once, on the embedded micro-world.

    generate → pack → pretrain → SFT → held-out questions → reasoning → GRPO, or more reasoning → LoRA
        → held-out questions → chat → report

Every step is the same code that the other commands run; this file only chooses a recipe that fits the machine and
tells what happened.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minigpt.errors import UserError

if TYPE_CHECKING:
    from minigpt.observe.hardware import Probe
    from minigpt.rl.options import GRPOOptions
    from minigpt.trainer.options import TrainOptions

GREETINGS = ("你是谁？", "Who are you?")


@dataclass(frozen=True)
class Leg:
    """A stage of the road.

    Attributes:
        teaches: What it is for, in words.
        after: The stage that it starts from; None: random weights.
        data: The micro-world's file that it learns from.
        packed_as: The `--stage` of its packing.
    """

    teaches: str
    after: str | None
    data: str
    packed_as: str


ROAD = {
    "pretrain": Leg("the language and the world, from random weights", None, "pretrain", "pretrain"),
    "sft": Leg("to answer when spoken to", "pretrain", "sft", "sft"),
    "reason_start": Leg("to think before it answers, from examples of which most are hasty", "sft", "hasty", "reason"),
    "grpo": Leg("to be right, by rewards for its own answers: nobody shows it how", "reason_start", "prompt", "prompt"),
    "reason": Leg(
        "the same by careful examples only: the other way to go on from there", "reason_start", "reason", "reason"
    ),
    "lora": Leg("to be somebody else: a small adapter, the model stays frozen", "reason", "persona", "sft"),
}
"""The stages in order."""
TO_CHAT = ("pretrain", "sft")
"""Those of the first road, behind which the model chats."""


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
        stages: Steps and peak learning rate of each stage.
        efficiency: Part of the machine's matrix-product rate that training reaches, for the prediction.
        overhead: Seconds besides: start-up, compilation, packing, evaluation. Where products are fast, also what a step
            does between them, which takes as long on any machine that has such products.
        world: Size of the micro-world.
    """

    model: dict[str, Any]
    rows: int
    stages: dict[str, tuple[int, float]]
    efficiency: float
    overhead: float
    world: Literal["tiny", "small", "quickstart"] = "quickstart"


SEQ_LEN = 256
RECIPES = {
    "cpu-bf16": Recipe(
        {"preset": "s", "dtype": "bf16"},
        8, {"pretrain": (600, 6e-3), "sft": (260, 3e-3), "reason_start": (330, 2e-3), "grpo": (42, 3e-4),
            "reason": (200, 1e-3), "lora": (50, 4e-3)}, 1.00, 360,
    ),
    "fp32": Recipe(
        {"preset": "s", "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6,
         "num_key_value_heads": 3, "dtype": "fp32"},
        8, {"pretrain": (360, 6e-3), "sft": (190, 3e-3), "reason_start": (310, 2e-3), "grpo": (42, 3e-4),
            "reason": (130, 1e-3), "lora": (50, 4e-3)}, 0.45, 110,
    ),
    "gpu": Recipe(
        {"preset": "s", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "dtype": "auto"},
        32, {"pretrain": (1000, 3e-3), "sft": (500, 1e-3), "reason_start": (400, 1e-3), "grpo": (60, 1e-4),
             "reason": (300, 1e-3), "lora": (60, 2e-3)}, 0.15, 200,
    ),
}  # fmt: skip


def quickstart(options: QuickstartOptions) -> None:
    """Generate a small world, pretrain, fine-tune, teach thinking, adapt, ask held-out questions, chat, report."""
    started = time.monotonic()
    folder = options.output
    if options.overwrite:
        _clear(folder)
    begun = _check_begun(options)
    if (folder / "summary.json").exists():
        _show(folder, json.loads((folder / "summary.json").read_text(encoding="utf-8")))
        print(f"\n(this is the finished quickstart in {folder}; --overwrite runs it again)")
        return
    folder.mkdir(parents=True, exist_ok=True)
    probe, name, recipe = _choose(options, begun)
    _announce(probe, name, recipe)
    data = _prepare_data(folder, options.seed, recipe.world)
    heldout, replies = _look_ups(data), Replies()
    summaries = _train(folder, options, name, data, TO_CHAT)
    _ask_heldout(folder, data, TO_CHAT, heldout, replies)
    _greet(folder, heldout)
    seconds_to_chat = time.monotonic() - started
    later = tuple(stage for stage in ROAD if stage not in TO_CHAT)
    summaries |= _train(folder, options, name, data, later)
    place = len(ROAD) + 2
    print(f"\n[{place}/{place + 1}] held-out questions: people, facts and sums that were never trained on", flush=True)
    _ask_heldout(folder, data, later, heldout, replies)
    persona = _ask_captain(folder, data, replies["reason", "questions"])
    samples = _chat_samples(folder, data)
    summary = {
        "preset": name,
        "stages": _stage_rows(summaries, heldout),
        "heldout": heldout,
        "stories_bits_per_byte": _read_stories(folder, data),
        "persona": persona,
        "samples": samples,
        "seconds": time.monotonic() - started,
        "seconds_to_chat": seconds_to_chat,
        "resumed": begun is not None,
        "hardware": summaries["sft"]["hardware"],
        "failures": _failures(data, replies),
        "grpo": {key: summaries["grpo"][key] for key in ("before", "after", "steps", "seconds")},
    }
    _write_report(folder, summary)
    _show(folder, summary)


def _clear(folder: Path) -> None:
    """Delete an earlier quickstart, and nothing else.

    Errors: UserError for a folder with other things in it.
    """
    if not folder.exists():
        return
    ours = {"microworld", "data", "report", "report.md", "summary.json", *ROAD}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if others:
        raise UserError(f"{folder} holds more than a quickstart ({others[0]}): give --output another folder")
    shutil.rmtree(folder)


def _choose(options: QuickstartOptions, begun: str | None) -> tuple[Probe, str, Recipe]:
    from minigpt.observe.hardware import probe_machine

    probe = probe_machine(1.0)
    name = begun or (probe.kind if options.preset == "auto" else options.preset)
    if name == "gpu" and probe.device != "cuda":
        raise UserError("the preset gpu needs a GPU and torch sees none; choose another --preset, in another --output")
    return probe, name, RECIPES[name]


def _check_begun(options: QuickstartOptions) -> str | None:
    """The preset that the quickstart in this folder was begun with; None where there is none.

    Errors: UserError when it was begun with another preset or seed than is asked for now.
    """
    begun = _begun_with(options.output)
    if begun is None:
        return None
    preset, seed = begun
    if options.preset not in ("auto", preset) or options.seed != seed:
        raise UserError(
            f"the quickstart in {options.output} was begun with --preset {preset} --seed {seed}, and its stages belong "
            "together: give these to go on with it or to see its result, or another --output, or start anew with "
            "--overwrite"
        )
    return preset


def _begun_with(folder: Path) -> tuple[str, int] | None:
    """Preset and seed of an earlier start in this folder; None when it did not get to the first stage."""
    import yaml

    try:
        config = yaml.safe_load((folder / "pretrain" / "config.yaml").read_text(encoding="utf-8"))
        recipe, seed = config["recipe"], config["seed"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return None
    return next(((name, seed) for name in RECIPES if recipe == f"quickstart-{name}-pretrain"), None)


def _announce(probe: Probe, name: str, recipe: Recipe) -> None:
    tokens = sum(steps for name, (steps, _) in recipe.stages.items() if name != "grpo") * recipe.rows * SEQ_LEN
    seconds = recipe.overhead + probe.training_seconds(_parameters(recipe), tokens, efficiency=recipe.efficiency)
    print(f"machine: {probe.describe()} → preset {name}, about {seconds / 60:.0f} minutes")


def _parameters(recipe: Recipe) -> int:
    from minigpt.trainer.options import PRESETS

    shape = {**PRESETS["s"], **recipe.model}
    E, F, L = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    return L * (3 * E * E + 3 * E * F) + 6400 * E


def _prepare_data(folder: Path, seed: int, world: Literal["tiny", "small", "quickstart"]) -> dict[str, Path]:
    """The micro-world's files by name, and the packed folder of each stage under the stage's name and `_packed`."""
    from data_prep.microworld import MicroWorldOptions, write_microworld
    from data_prep.pack import PackOptions, pack
    from minigpt.observe.progress import progress_bar

    print(f"\n[1/{len(ROAD) + 3}] data: a small world in Chinese and English", flush=True)
    files = write_microworld(folder / "microworld", MicroWorldOptions(seed=seed, size=world))
    with progress_bar() as progress:
        for leg in {leg.data: leg for leg in ROAD.values()}.values():
            output = folder / "data" / leg.data
            options = PackOptions(
                stage=leg.packed_as,  # type: ignore[arg-type]
                input=[files[leg.data]],
                output=output,
                seq_len=SEQ_LEN,
                valid_fraction=0.01,
            )
            manifest = pack(options, progress)
            files[f"{leg.data}_packed"] = output
            rows = manifest["splits"]["train"]["rows"]
            what = "prompts" if leg.packed_as == "prompt" else f"rows of {SEQ_LEN} tokens"
            print(f"      {leg.data}: {rows:,} {what}", flush=True)
    return files


def _train(
    folder: Path, options: QuickstartOptions, preset: str, data: dict[str, Path], stages: Sequence[str]
) -> dict[str, Any]:
    """These stages of the road; the summary of each."""
    from minigpt.rl.run import train as train_by_reward
    from minigpt.trainer.loop import train
    from minigpt.trainer.train_full_sft import SFT, SFTOptions
    from minigpt.trainer.train_lora import LORA, LoRATrainOptions
    from minigpt.trainer.train_pretrain import PRETRAIN, PretrainOptions
    from minigpt.trainer.train_reason import REASON, ReasonOptions

    trained = {
        "pretrain": (PRETRAIN, PretrainOptions),
        "sft": (SFT, SFTOptions),
        "reason_start": (REASON, ReasonOptions),
        "reason": (REASON, ReasonOptions),
        "lora": (LORA, LoRATrainOptions),
    }
    recipe = RECIPES[preset]
    summaries: dict[str, Any] = {}
    for number, (name, leg) in enumerate(ROAD.items(), start=2):
        if name not in stages:
            continue
        print(f"\n[{number}/{len(ROAD) + 3}] {name}: {leg.teaches}", flush=True)
        if name == "grpo":
            summaries[name] = train_by_reward(_grpo_options(folder, options, preset, data), "grpo")
            continue
        stage, stage_options = trained[name]
        steps, rate = recipe.stages[name]
        choice = stage_options(
            data=[data[f"{leg.data}_packed"]],
            save_dir=folder / name,
            init=None if leg.after is None else folder / leg.after,
            max_steps=steps,
            learning_rate=rate,
            global_batch_size=recipe.rows,
            seed=options.seed,
            eval_rows=32,
            schedule="wsd",
            recipe=f"quickstart-{preset}-{name}",
            **recipe.model,
        )
        if name != "lora":  # one compiled graph serves all of them, so it pays for the short ones too
            choice = replace(choice, compile=_compiles(choice))
        summaries[name] = train(stage, choice)
    return summaries


def _grpo_options(folder: Path, options: QuickstartOptions, preset: str, data: dict[str, Path]) -> GRPOOptions:
    """Sums with thinking, rewarded for the right answer and nothing else."""
    from minigpt.rl.options import GRPOOptions

    recipe = RECIPES[preset]
    steps, rate = recipe.stages["grpo"]
    return GRPOOptions(
        data=[data["prompt_packed"]],
        save_dir=folder / "grpo",
        init=folder / str(ROAD["grpo"].after),
        reward=["accuracy"],
        thinking=True,
        prompts_per_step=16,
        samples_per_prompt=8,
        max_new_tokens=80,
        eval_data=[data["heldout_sums"]],
        eval_prompts=200,
        max_steps=steps,
        learning_rate=rate,
        dtype=recipe.model["dtype"],
        seed=options.seed,
        recipe=f"quickstart-{preset}-grpo",
    )


def _compiles(options: TrainOptions) -> bool | None:
    """True where a CPU can compile; None leaves it to the length of the stage."""
    import torch

    from minigpt.trainer.setup import compile_wanted

    if options.compile is not None or torch.cuda.is_available():
        return options.compile
    return compile_wanted(options, torch.device("cpu"), math.inf)


Heldout = dict[str, dict[str, Any]]
"""By task: how many questions, what a look-up answers of them, and the accuracy after each stage that was asked."""
Replies = dict[tuple[str, str], list[str]]
"""What the model of a stage said to the questions of a task, by both names."""
# A held-out task: its file, whether thinking is switched on or off, tokens of the longest reply, and which stages
# are asked. A pretrained model knows neither chats nor tags, so it is asked only what everybody is asked.
TASKS: dict[str, tuple[str, bool | None, int, tuple[str, ...]]] = {
    "questions": ("heldout_qa", None, 48, ("pretrain", "sft", "reason_start", "grpo", "reason")),
    "sums at once": ("heldout_sums", False, 16, ("pretrain", "sft", "reason_start", "grpo", "reason")),
    "sums with thinking": ("heldout_sums", True, 96, ("sft", "reason_start", "grpo", "reason")),
}


def _look_ups(data: dict[str, Path]) -> Heldout:
    """What the answers to the nearest training questions are worth: what every model is measured against."""
    from minigpt.evaluation.answers import read_prompt_records
    from minigpt.evaluation.nearest_neighbour import nearest_neighbour_baseline

    known = [
        json.loads(line)
        for name in ("sft", "hasty", "reason")
        for line in data[name].read_text(encoding="utf-8").splitlines()
    ]
    records = {file: read_prompt_records(data[file]) for file, *_ in TASKS.values()}
    look_ups = {file: nearest_neighbour_baseline(known, asked).value for file, asked in records.items()}
    return {name: {"n": len(records[file]), "nearest_neighbour": look_ups[file]} for name, (file, *_) in TASKS.items()}


def _ask_heldout(folder: Path, data: dict[str, Path], asked: Sequence[str], heldout: Heldout, replies: Replies) -> None:
    """Ask the models of these stages the held-out questions; adds to `heldout` and `replies`."""
    from minigpt.evaluation.exact_answer import ExactAnswer, ModelAnswers
    from minigpt.generation.load import load_for_inference
    from minigpt.observe.progress import progress_bar

    models = {stage: load_for_inference(folder / stage) for stage in TASKS["questions"][3] if stage in asked}
    for name, (file, thinking, longest, stages) in TASKS.items():
        task = ExactAnswer.from_file(data[file])
        for stage in (stage for stage in stages if stage in models):
            model, encoder = models[stage]
            with progress_bar() as report:
                progress = partial(_report_done, report, f"{name} after {stage}", len(task.records))
                outcome = task(ModelAnswers(model, encoder, longest, thinking, progress=progress))
            heldout[name][f"after_{stage}"] = outcome.accuracy.value
            heldout[name].pop("interval", None)  # of the last stage: in the report it stands beside that one
            heldout[name]["interval"] = list(outcome.accuracy.interval())
            replies[stage, name] = outcome.replies


def _greet(folder: Path, heldout: Heldout) -> None:
    """Show that the fine-tuned model chats."""
    from minigpt.evaluation.exact_answer import ModelAnswers
    from minigpt.generation.load import load_for_inference

    answers = ModelAnswers(*load_for_inference(folder / "sft"), 48)
    right = _share(heldout["questions"]["after_sft"])
    print(f"\n      it chats, and answers {right} of the held-out questions:", flush=True)
    replies = answers([[{"role": "user", "content": text}] for text in GREETINGS])
    for text, reply in zip(GREETINGS, replies, strict=True):
        print(f"      {text} → {reply}", flush=True)


def _read_stories(folder: Path, data: dict[str, Path]) -> float:
    """Bits per byte of the pretrained model on stories of plots and heroes that it never met together."""
    from minigpt.evaluation.bits_per_byte import RawText
    from minigpt.evaluation.task import Settings
    from minigpt.generation.load import load_for_inference

    found = RawText(data["heldout_stories"]).run(*load_for_inference(folder / "pretrain"), Settings(context=512))
    return found.metrics[0].value


def _failures(data: dict[str, Path], replies: Replies) -> list[dict[str, str]]:
    """The first wrong replies of the last stage to each task."""
    from minigpt.evaluation.answers import is_correct, read_prompt_records

    failures = []
    for name, (file, _, _, stages) in TASKS.items():
        pairs = zip(read_prompt_records(data[file]), replies[stages[-1], name], strict=True)
        wrong = [(r, reply) for r, reply in pairs if not is_correct(reply, r["answer"], r["verifier"])]
        for record, reply in wrong[:5]:
            question = record["messages"][-1]["content"]
            failures.append({"task": name, "question": question, "expected": record["answer"], "reply": reply})
    return failures


def _ask_captain(folder: Path, data: dict[str, Path], without: Sequence[str]) -> dict[str, Any]:
    """Held-out questions with the adapter off and on: how many replies are in persona, and how many hold the answer."""
    from data_prep.microworld.persona import in_persona
    from minigpt.evaluation.answers import Accuracy, normalise, read_prompt_records
    from minigpt.evaluation.exact_answer import ModelAnswers
    from minigpt.generation.load import load_for_inference

    records = read_prompt_records(data["heldout_qa"])
    replies = {
        "off": without,
        "on": ModelAnswers(*load_for_inference(folder / "lora"), 48)([record["messages"] for record in records]),
    }
    result: dict[str, Any] = {
        "n": len(records),
        "megabytes": (folder / "lora" / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6,
    }
    for adapter, said in replies.items():
        right = [normalise(r["answer"]) in normalise(reply) for r, reply in zip(records, said, strict=True)]
        persona = Accuracy(sum(map(in_persona, said)), len(said))
        result[f"adapter_{adapter}"] = {
            "in_persona": persona.value,
            "interval": list(persona.interval()),
            "right": sum(right) / len(right),
        }
    return result


def _report_done(report: Callable[[str, int, int], None], job: str, total: int, done: int) -> None:
    report(job, done, total)


def _chat_samples(folder: Path, data: dict[str, Path]) -> list[dict[str, str]]:
    """A few greedy answers as they come: who are you, to the model and to its adapter, and held-out questions in both
    languages beside what is right; a sum at once and thought out."""
    from minigpt.evaluation.answers import read_prompt_records
    from minigpt.evaluation.exact_answer import ModelAnswers
    from minigpt.generation.load import load_for_inference

    place = len(ROAD) + 3
    print(f"\n[{place}/{place}] chat", flush=True)
    draw = random.Random(0)
    asked: list[tuple[str, str, str, bool | None]] = [(text, "", "reason", None) for text in GREETINGS]
    asked += [(text, "", "lora", None) for text in GREETINGS]
    for file, kind in ((data["heldout_qa"], "world"), (data["heldout_sums"], "sum")):
        records = read_prompt_records(file)
        for language in ("zh", "en"):
            fitting = [r for r in records if r["meta"]["lang"] == language and r["meta"]["kind"] == kind]
            record = draw.choice(fitting)
            for thinking in (False, True) if kind == "sum" else (None,):
                asked.append((record["messages"][-1]["content"], record["answer"], "reason", thinking))
    models = {stage: load_for_inference(folder / stage) for stage in ("reason", "lora")}
    samples = []
    for text, right, stage, thinking in asked:
        answers = ModelAnswers(*models[stage], 128, thinking)
        sample = {"prompt": text, "answer": answers([[{"role": "user", "content": text}]])[0], "model": stage}
        if thinking is False:
            sample["prompt"] += "  (thinking off)"
        samples.append({**sample, **({"right_answer": right} if right else {})})
    return samples


def _stage_rows(summaries: dict[str, Any], heldout: Heldout) -> list[dict[str, Any]]:
    rows = []
    for stage, summary in summaries.items():
        accuracies = {name.replace(" ", "_"): task.get(f"after_{stage}") for name, task in heldout.items()}
        rows.append(
            {
                "stage": stage,
                "loss": summary.get("valid_loss"),
                "bits_per_byte": summary.get("bits_per_byte"),
                **accuracies,
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
        *("stage", "valid loss", "bits/byte", "questions", "sums at once", "sums, thinking", "tokens/s", "time"),
        title="What was trained, and the accuracy on what was not",
    )
    for row in summary["stages"]:
        stages.add_row(
            row["stage"],
            *("" if row[key] is None else f"{row[key]:.3f}" for key in ("loss", "bits_per_byte")),
            *(_share(row[name.replace(" ", "_")]) for name in TASKS),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds']:.0f} s",
        )
    tasks = Table("held-out", "n", "look-up", "after reasoning", "95 % interval", title="Never trained on")
    for name, task in summary["heldout"].items():
        low, high = task["interval"]
        values = (_share(task[key]) for key in ("nearest_neighbour", "after_reason"))
        tasks.add_row(name, str(task["n"]), *values, f"{low:.0%} to {high:.0%}")
    persona = summary["persona"]
    captain = Table("adapter", "in persona", "right answer", title="Captain Mini, asked the held-out questions")
    for adapter in ("off", "on"):
        measured = persona[f"adapter_{adapter}"]
        note = f" ({persona['megabytes']:.1f} MB)" if adapter == "on" else ""
        captain.add_row(adapter + note, _share(measured["in_persona"]), _share(measured["right"]))
    console.print()
    console.print(stages)
    console.print(tasks)
    for remark in _remarks(summary["heldout"]):
        console.print(remark, highlight=False, markup=False)
    console.print(captain)
    if (bits := summary.get("stories_bits_per_byte")) is not None:  # runs of before do not know
        console.print(
            f"\nStories of plots and heroes that never met in training: {bits:.3f} bits/byte after pretraining."
        )
    console.print(_what_rewards_did(summary))
    for sample in summary["samples"]:
        speaker = "MiniGPT" if sample["model"] == "reason" else "adapter"
        console.print(f"\n[bold]you[/bold]      {escape(sample['prompt'])}")
        console.print(f"[bold]{speaker}[/bold]  {escape(sample['answer'])}")
        if "right_answer" in sample:
            console.print(f"         [dim](never trained on; right is: {escape(sample['right_answer'])})[/dim]")
    run = folder / "reason"
    console.print(
        f"\n{_how_long(summary)}; report with curves: {folder / 'report.md'}\n\n"
        "What to try next\n"
        f"  minigpt chat {run}                   talk to it (try: 请算一算 38 加 47。)\n"
        f"  minigpt chat {folder / 'lora'}                     the same model with its adapter\n"
        f"  minigpt generate {run} --prompt '你好'   one answer\n"
        f"  minigpt train grpo --help               rewards of your own: docs/rewards.md\n"
        "  minigpt data inspect FILE               look at your own text, then: minigpt data pack --help\n"
        "  minigpt train pretrain --help           train on it\n"
        "  minigpt verify 1                        the ten milestones, one check each"
    )


GOAL, LOOK_UP_LIMIT, POINTS_BY_REWARDS = 0.85, 0.20, 25


def _remarks(heldout: Heldout) -> list[str]:
    """A sentence for each result that is not as it should be; but sums at once are meant to fail without thinking."""
    remarks = []
    for name in ("questions", "sums with thinking"):
        right, look_up = heldout[name]["after_reason"], heldout[name]["nearest_neighbour"]
        if right < GOAL:
            remarks.append(
                f"{name}: {right:.1%} right, and {GOAL:.0%} is what a quickstart should reach: the model learnt too "
                "little, or lost it in a later stage (see the first table); try another --seed, or more steps with "
                "minigpt train"
            )
        if look_up > LOOK_UP_LIMIT:
            remarks.append(
                f"{name}: a look-up alone answers {look_up:.1%}, and it should not exceed {LOOK_UP_LIMIT:.0%}: these "
                "questions are too close to what was trained on to show that the model understands; try another --seed"
            )
    sums = heldout["sums with thinking"]
    if (points := round(100 * (sums["after_grpo"] - sums["after_reason_start"]), 1)) < POINTS_BY_REWARDS:
        remarks.append(
            f"sums with thinking: rewards brought {points} points, and {POINTS_BY_REWARDS} is what they should "
            "bring: the start knew too little of the careful way, or too much; try another --seed"
        )
    return remarks


def _what_rewards_did(summary: dict[str, Any]) -> str:
    """GRPO, and careful examples from the same start instead, in a sentence: what each brought, and in what time."""
    sums = summary["heldout"]["sums with thinking"]
    start, grpo, shown = (sums[f"after_{stage}"] for stage in ("reason_start", "grpo", "reason"))
    seconds = {row["stage"]: row["seconds"] for row in summary["stages"]}
    before, after = (summary["grpo"][when]["response_length"] for when in ("before", "after"))
    found_out = "; working a sum out pays" if after > before and grpo > start else ""
    return (
        f"\nSums with thinking: {start:.1%} where both ways part. Rewards alone (GRPO, {seconds['grpo']:.0f} s): "
        f"{grpo:.1%}, with answers of {after:.0f} instead of {before:.0f} tokens{found_out}. Careful examples instead "
        f"({seconds['reason']:.0f} s): {shown:.1%}."
    )


def _how_long(summary: dict[str, Any]) -> str:
    """Minutes in all, and until the fine-tuned model had answered the held-out questions and chatted."""
    told = f"{summary['seconds'] / 60:.1f} minutes in all"
    if summary.get("resumed"):
        told += " since it was started again"
    elif (seconds := summary.get("seconds_to_chat")) is not None:  # runs of before do not know
        told += f", {seconds / 60:.1f} of them from nothing to a model that chats"
    return told


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(quickstart, QuickstartOptions)
