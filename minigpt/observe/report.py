"""`minigpt report RUN`: what a run did, on one page of Markdown with its curves beside it.

Everything comes from the run folder (`metrics.jsonl`, `config.yaml`, `summary.json`), so a report can be written while
the run goes on, after it was interrupted, or on another machine. Files that are missing leave their part out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from minigpt.errors import UserError
from minigpt.observe.hardware import summarise_hardware
from minigpt.observe.metrics import METRICS_FILE, format_duration, read_metrics, whole_file
from minigpt.observe.plots import Curve, always_zero, phase_seconds, plot_details, plot_loss, plot_reward, plot_stages
from minigpt.observe.reference import Band, check_against, load_band

REPORT_FILE = "report.md"
PLOT_FOLDER = "report"
EVALUATIONS = "eval"
SAMPLES_SHOWN = 2  # replies of each evaluation, of the wrong ones and of the right ones
STAGE_ORDER = ("pretrain", "sft", "lora", "reason_start", "reason", "dpo", "reward", "ppo", "grpo")
UNIFORM_GUESS_TOLERANCE = 0.5  # nats: a fresh model's first loss is this near to ln(vocab)
# Nats a token between sampler and policy: tenfold what bf16 rounds to on the same weights, and what a few updates move
ROUNDING_GAP, MOVING_GAP = 0.002, 0.01


@dataclass(frozen=True)
class Run:
    """A run folder as read from disk.

    Args:
        folder: The run folder.
        config: `config.yaml`; empty when missing.
        summary: `summary.json`, written when the run ends; empty for an interrupted run.
        records: The records of `metrics.jsonl`.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def stage(self) -> str:
        return str(self.summary.get("stage") or find_key(self.config, "stage") or self.folder.resolve().name)

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def vocab_size(self) -> int | None:
        """From the summary, the configuration or the exported model, whichever knows."""
        exported = _read_json(self.folder / "hf" / "config.json")
        found = [find_key(source, "vocab_size") for source in (self.summary, self.config, exported)]
        return next((value for value in found if isinstance(value, int)), None)

    @property
    def band(self) -> Band | None:
        """The reference band of the recipe that the run names, when one was recorded."""
        recipe = find_key(self.summary, "recipe") or find_key(self.config, "recipe")
        return load_band(recipe) if isinstance(recipe, str) else None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record.get("kind", "train") == kind]

    def last(self, key: str, kind: str = "train") -> Any:
        """The metric's latest value, or None."""
        return next((record[key] for record in reversed(self.of_kind(kind)) if key in record), None)

    def typical(self, key: str) -> float | None:
        """The metric's median over the training records: a slow start does not count."""
        values = [record[key] for record in self.of_kind("train") if isinstance(record.get(key), int | float)]
        finite = [value for value in values if math.isfinite(value)]
        return median(finite) if finite else None

    def curve(self, name: str | None = None) -> Curve:
        return Curve(name or self.stage, self.records, self.vocab_size, self.band)


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError when there is no such folder or it holds no metrics."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the run folder that the training wrote (its --save_dir)")
    records = read_metrics(folder)
    if not records:
        raise UserError(f"{folder} holds no {METRICS_FILE} with a finished step; train longer, or give a run folder")
    return Run(folder, _read_yaml(folder / "config.yaml"), _read_json(folder / "summary.json"), records)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); remove it, and the report is written without it"
        ) from error
    return content if isinstance(content, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise UserError(f"{path} is not valid YAML ({where}); repair or remove it") from error
    return content if isinstance(content, dict) else {}


def find_key(tree: Any, key: str) -> Any:
    """The value of `key` in nested dictionaries, outermost first; None when absent."""
    if not isinstance(tree, Mapping):
        return None
    if tree.get(key) is not None:
        return tree[key]
    return next((found for branch in tree.values() if (found := find_key(branch, key)) is not None), None)


# --- one run ---------------------------------------------------------------------------------------------------------


def build_report(run_dir: Path, *, compare: Sequence[Path] = ()) -> Path:
    """Write `report.md` and its PNG curves into a run folder.

    Args:
        run_dir: A run folder, finished or not. A folder of several stages (the quickstart's) gets one report for all.
        compare: Other run folders whose training loss is drawn beside this one's.

    Returns the path of `report.md`. Raises UserError when the folder is not a run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / METRICS_FILE).exists() and _stage_folders(run_dir):
        return build_quickstart_report(run_dir)
    run = read_run(run_dir)
    others = [read_run(Path(other)) for other in compare]
    plots = run_dir / PLOT_FOLDER
    curves = [other.curve(other.folder.resolve().name) for other in others]
    if run.curve().is_rl:
        title, path = "Reward, and accuracy on held-out prompts", plots / "reward.png"
        main = _image(title, _drawn(plot_reward, path, run.curve(), compare=curves), run_dir)
    else:
        title, path = "Training and validation loss", plots / "loss.png"
        main = _image(title, _drawn(plot_loss, path, run.curve(), compare=curves), run_dir)
    details_png = _drawn(plot_details, plots / "details.png", run.curve())
    parts = [
        f"# {run.stage}: {run.folder.resolve().name}",
        _status_sentence(run),
        main,
        "\n".join(f"- {sentence}" for sentence in _judgements(run)),
        markdown_table([run_row(each) for each in [run, *others]]),
        before_and_after(run),
        _image("Everything else that was recorded", details_png, run_dir),
        _phase_section(run),
        evaluation_section(run_dir),
        _samples_section(run.summary.get("samples")),
        _paired_samples(run),
        "## How it was made\n\n" + _provenance(run, run_dir),
    ]
    return _write_report(run_dir, parts)


def _status_sentence(run: Run) -> str:
    last_step = run.records[-1]["step"]
    if run.finished:
        return f"Finished after {last_step:,} steps."
    total = find_key(run.config, "total_steps") or find_key(run.config, "max_steps")
    of_total = f" of {total:,}" if isinstance(total, int) and total > 0 else ""
    return f"**Not finished:** this is as far as step {last_step:,}{of_total}; the same command continues it."


def _judgements(run: Run) -> list[str]:
    """Is the loss right? What the start, the reference band and the non-finite steps say."""
    sentences = []
    first = next((record for record in run.of_kind("train") if isinstance(record.get("loss"), int | float)), None)
    if first is not None and first["step"] <= 1 and run.vocab_size and run.stage == "pretrain":
        uniform, loss = math.log(run.vocab_size), first["loss"]
        verdict = "as it must be" if abs(loss - uniform) <= UNIFORM_GUESS_TOLERANCE else "**which is not near it**"
        sentences.append(
            f"First loss {loss:.2f}; a model that knows nothing guesses uniformly among {run.vocab_size:,} tokens: "
            f"ln({run.vocab_size}) = {uniform:.2f}, {verdict}."
        )
    if run.band is not None:
        sentences.append(check_against(run.folder, run.band).sentence)
    losses = [record["loss"] for record in run.of_kind("train") if isinstance(record.get("loss"), float)]
    broken = sum(not math.isfinite(loss) for loss in losses)
    if broken:
        sentences.append(f"**{broken} of {len(losses)} logged losses are not a number.**")
    return sentences + (_rl_judgements(run) if run.curve().is_rl else [])


def _rl_judgements(run: Run) -> list[str]:
    """What the curves of a run of rewards say, each with what to do. Early and late are the quarters of the run."""
    sentences = []
    quarters = {key: _quarters(run, key) for key in {key for record in run.of_kind("train") for key in record}}

    def late(key: str) -> float:
        return quarters[key][-1] if quarters.get(key) else math.nan

    score = "accuracy" if "accuracy" in quarters else "reward"
    has_critic = "explained_variance" in quarters  # then groups of equal rewards teach all the same
    equal = math.nan if has_critic else late("zero_variance_groups")
    if equal > 0.5:
        remedy = (
            "most are right already: stop here, or ask harder questions"
            if late(score) > 0.5
            else "most are wrong: ask easier questions, start from a better model or take more --samples_per_prompt"
        )
        sentences.append(
            f"**{_percent(equal)} of the late groups have equal rewards and teach nothing;** {remedy} "
            "(--dynamic_sampling 2 replaces them by others)."
        )
    if (kl := quarters.get("kl")) and kl == sorted(kl) and kl[-1] > 0.05 and kl[-1] > 2 * kl[1]:
        sentences.append(
            f"**The KL to the reference rises steadily,** from {kl[0]:.3f} to {kl[-1]:.3f} nats a token; a higher "
            "--kl_coefficient or a lower --learning_rate holds it, if the samples below got worse."
        )
    if (entropy := quarters.get("entropy")) and entropy[-1] < 0.2 * entropy[0] and equal > 0.5:
        sentences.append(
            f"**The entropy collapsed,** from {entropy[0]:.3f} to {entropy[-1]:.3f} nats a token, and the answers to a "
            "question are all alike; --clip_high 0.28, a small --entropy_coefficient or a lower --learning_rate keep "
            "them apart."
        )
    if late("truncated") > 0.1:
        sentences.append(
            f"**{_percent(late('truncated'))} of the late answers were cut off at the limit;** raise --max_new_tokens, "
            "or teach brevity with --overlong_buffer."
        )
    same_weights = late("version_lag") == 0 and late("ratio") == 1  # of all answers, up to the last update of a step
    if abs(late("sampler_gap_mean")) > (ROUNDING_GAP if same_weights else MOVING_GAP):
        sentences.append(
            f"**Sampler and policy disagree** by {late('sampler_gap_mean'):.3f} nats a token on average; with answers "
            "of an older version --behaviour_correction true makes up for it, otherwise the two compute differently."
        )
    gaps = [record["sampler_gap_mean"] for record in run.of_kind("train") if "sampler_gap_mean" in record]
    if broken := sum(not math.isfinite(gap) for gap in gaps):  # which no mean above includes
        sentences.append(
            f"**{broken} of {len(gaps)} gaps between sampler and policy are not a number:** one of the two computes "
            "probabilities that are none; --dtype fp32 shows whether it is the precision."
        )
    if late("clip_fraction") > 0.3:
        sentences.append(f"**{_percent(late('clip_fraction'))} of the tokens are clipped;** lower --learning_rate.")
    if late("explained_variance") < 0:
        sentences.append(
            f"**The critic predicts worse than a constant** (explained variance {late('explained_variance'):.2f}); "
            "give it a --critic_warmup or another --critic_learning_rate."
        )
    if failures := sum(record.get("reward_failures", 0.0) for record in run.of_kind("train")):
        sentences.append(
            f"**{failures:,.0f} rewards failed and count as the worst of their batch, at most 0;** the log says why."
        )
    if zero := always_zero(run.curve()):
        sentences.append(f"0 at every step, and not drawn: {', '.join(zero)}.")
    return sentences


def _quarters(run: Run, key: str) -> list[float]:
    """The metric's mean over each quarter of the run; empty with fewer than four finite values."""
    found = [record.get(key) for record in run.of_kind("train")]
    values = [value for value in found if isinstance(value, int | float) and math.isfinite(value)]
    ends = [len(values) * quarter // 4 for quarter in range(5)]
    return [fmean(values[start:stop]) for start, stop in pairwise(ends)] if len(values) >= 4 else []


def before_and_after(run: Run, level: int = 2) -> str:
    """What was measured on held-out prompts before the first step and last; "" for a run without rewards.

    From `summary.json`, or of an interrupted run from its records. An accuracy stands with its `accuracy_interval`.
    """
    evaluations = run.of_kind("eval") if run.curve().is_rl else []
    if not evaluations:
        return ""
    before, after = (
        run.summary.get(name) or found
        for name, found in zip(("before", "after"), (evaluations[0], evaluations[-1]), strict=True)
    )
    skipped = {"step", "tokens", "prompts", "seconds_eval"}
    if before.get("reward") == before.get("accuracy") and after.get("reward") == after.get("accuracy"):
        skipped.add("reward")
    keys = [key for key, value in after.items() if isinstance(value, int | float) and key not in skipped]
    rows = [
        {
            "measure": key.replace("_", " "),
            "before": _measure(before, key),
            "after": _measure(after, key),
            "change": _change(key, before.get(key), after[key]),
        }
        for key in sorted(keys, key=lambda key: key not in ("accuracy", "reward"))
    ]
    asked = _number(after.get("prompts"), ",.0f")
    return f"{'#' * level} Held-out prompts\n\nGreedy answers to {asked} prompts.\n\n" + markdown_table(rows)


def _measure(found: Mapping[str, Any], key: str) -> str:
    interval = found.get(f"{key}_interval")
    shown = _share_or_number(key, found.get(key))
    return f"{shown} ({' to '.join(_percent(end) for end in interval)})" if interval else shown


def _share_or_number(key: str, value: Any) -> str:
    return _percent(value) if key in ("accuracy", "truncated") else _number(value, ",.3g")


def _change(key: str, before: Any, after: float) -> str:
    if not isinstance(before, int | float):
        return ""
    if key in ("accuracy", "truncated"):
        return f"{100 * (after - before):+.1f} points"
    return f"{after - before:+,.3g}"


def _phase_section(run: Run, level: int = 2) -> str:
    """Where the time of a step goes."""
    phases = phase_seconds(run.curve())
    if not phases:
        return ""
    step = run.typical("seconds_step") or math.nan
    medians = {name: median(seconds) for name, seconds in phases.items()}
    rates = {name: f"tokens_per_second_{name.replace(' ', '_')}" for name in medians}
    rates |= {"generate": "generated_tokens_per_second", "whole step": "tokens_per_second"}
    rows = [
        {"phase": name, "median seconds": f"{seconds:.3f}", "share": _percent(seconds / step)}
        for name, seconds in medians.items()
    ]
    rows.append({"phase": "whole step", "median seconds": f"{step:.3f}", "share": ""})
    for row in rows:
        row["answer tokens/s"] = _number(run.typical(rates[row["phase"]]), ",.0f")
    return f"{'#' * level} Time of a step\n\n{markdown_table(rows)}"


def _paired_samples(run: Run, level: int = 2) -> str:
    """The answers to the same prompts before and after."""
    before, after = ((run.summary.get(name) or {}).get("samples") or [] for name in ("before", "after"))
    if not after:
        return ""
    earlier = {sample["prompt"]: sample for sample in before}
    parts = [f"{'#' * level} Answers before and after"]
    for sample in after:
        shown = {"prompt": str(sample["prompt"])}
        if sample.get("right_answer"):
            shown["right answer"] = str(sample["right_answer"])
        if (old := earlier.get(sample["prompt"])) is not None:
            shown[f"before (reward {old['reward']:.3g})"] = old["answer"]
        shown[f"after (reward {sample['reward']:.3g})"] = sample["answer"]
        parts.append(_sample(shown))
    return "\n\n".join(parts)


def run_row(run: Run) -> dict[str, str]:
    """One run as a table row: what it did and how well."""
    summary = run.summary
    rewarded = run.curve().is_rl  # its loss is about 0 throughout and says nothing
    valid_loss = _first(summary.get("valid_loss"), run.last("valid_loss", "valid"))
    bits = _first(summary.get("bits_per_byte"), run.last("valid_bits_per_byte", "valid"))
    row = {
        "run": run.folder.resolve().name,
        "stage": run.stage,
        "steps": _number(_first(summary.get("steps"), run.records[-1]["step"]), ",.0f"),
        "tokens": _number(_first(summary.get("tokens"), run.last("tokens")), ",.0f"),
        "final loss": ""
        if rewarded
        else _number(_first(summary.get("final_loss"), summary.get("loss"), run.last("loss")), ".4f"),
        "reward": _number(run.last("reward"), ".3f"),
        "held-out accuracy": _percent(run.last("accuracy", "eval")) if rewarded else "",
        "valid loss": _number(valid_loss, ".4f"),
        "bits/byte": _number(bits, ".3f"),
        "tokens/s": _number(_first(summary.get("tokens_per_second"), run.typical("tokens_per_second")), ",.0f"),
        "MFU": _percent(_first(summary.get("mfu"), run.typical("mfu"))),
        "memory": _number(run.last("memory_gb"), ".2f", " GiB"),
        "time": _duration(_first(summary.get("seconds"), run.last("seconds"))),
    }
    return row


def _provenance(run: Run, report_folder: Path) -> str:
    """Hardware, versions, data and configuration: what someone needs to get the same numbers again."""
    summary, hardware, versions = run.summary, run.summary.get("hardware"), run.summary.get("versions")
    facts = {
        "hardware": summarise_hardware(hardware) if isinstance(hardware, dict) else hardware,
        "MFU is a fraction of": summary.get("mfu_peak"),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if v) if isinstance(versions, dict) else versions,
        "data fingerprint": _code(find_key(summary, "fingerprint") or find_key(run.config, "fingerprint")),
        "commit": _code(summary.get("commit")),
        "files": ", ".join(
            f"[{name}]({(run.folder / name).relative_to(report_folder).as_posix()})"
            for name in ("config.yaml", METRICS_FILE, "summary.json")
            if (run.folder / name).exists()
        ),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)


# --- a folder of several stages --------------------------------------------------------------------------------------


def build_quickstart_report(folder: Path) -> Path:
    """Write one `report.md` for a folder whose sub-folders are stage runs: a stage table and the curves side by side.

    `folder/summary.json` may hold `stages` (a list of rows: stage, loss, bits_per_byte, heldout_accuracy,
    tokens_per_second, seconds), `heldout` (a task's name → its accuracy, or its fields) and `samples`; without it the
    rows come from the stage runs.
    """
    folder = Path(folder)
    runs = [read_run(stage_folder) for stage_folder in _stage_folders(folder)]
    summary = _read_json(folder / "summary.json")
    if not runs and not summary:
        raise UserError(f"{folder} holds neither stage runs nor a summary.json; give the folder that quickstart wrote")
    parts = [f"# {folder.resolve().name}: from raw text to a model that chats"]
    if runs:
        curves = [run.curve(run.folder.name) for run in runs]
        curves_png = _drawn(plot_stages, folder / PLOT_FOLDER / "curves.png", curves)
        parts.append(_image("Loss of each stage, score where rewards teach", curves_png, folder))
    stages = summary.get("stages")
    parts.append(markdown_table([stage_row(stage) for stage in stages] if stages else [run_row(run) for run in runs]))
    parts.append(_heldout_section(summary.get("heldout")))
    parts.append(_samples_section(summary.get("samples")))
    parts.extend(_stage_section(run, folder) for run in runs)
    return _write_report(folder, parts)


def _stage_folders(folder: Path) -> list[Path]:
    """Sub-folders that are runs, in the order of the road: pretrain, sft, …"""
    found = [path.parent for path in folder.glob(f"*/{METRICS_FILE}") if read_metrics(path)]

    def position(path: Path) -> tuple[int, str]:
        stage = next((stage for stage in STAGE_ORDER if stage in path.name), None)
        return (STAGE_ORDER.index(stage) if stage else len(STAGE_ORDER), path.name)

    return sorted(found, key=position)


def stage_row(stage: Mapping[str, Any]) -> dict[str, str]:
    """One entry of the quickstart's `stages` as a table row."""
    return {
        "stage": str(stage.get("stage", "")),
        "loss": _number(stage.get("loss"), ".4f"),
        "bits/byte": _number(stage.get("bits_per_byte"), ".3f"),
        "held-out accuracy": _percent(stage.get("heldout_accuracy")),
        "questions": _percent(stage.get("questions")),
        "sums at once": _percent(stage.get("sums_at_once")),
        "sums with thinking": _percent(stage.get("sums_with_thinking")),
        "tokens/s": _number(stage.get("tokens_per_second"), ",.0f"),
        "time": _duration(stage.get("seconds")),
    }


def _stage_section(run: Run, folder: Path) -> str:
    details_png = _drawn(plot_details, folder / PLOT_FOLDER / f"{run.folder.name}.png", run.curve())
    parts = [
        f"## {run.folder.name}",
        "\n".join(f"- {sentence}" for sentence in [_status_sentence(run), *_judgements(run)]),
        before_and_after(run, level=3),
        _image(f"{run.folder.name}: everything else that was recorded", details_png, folder),
        _phase_section(run, level=3),
        _paired_samples(run, level=3),
        evaluation_section(run.folder, level=3),
        _provenance(run, folder),
    ]
    return "\n\n".join(part for part in parts if part)


def evaluation_section(run_dir: Path, level: int = 2) -> str:
    """What `minigpt eval` wrote into the run folder: a table of all metrics, then replies, wrong ones first.

    Args:
        run_dir: The run folder.
        level: Of the section's heading.
    """
    results = {path.stem: _read_json(path) for path in sorted((run_dir / EVALUATIONS).glob("*.json"))}
    rows, samples = [], []
    for name, result in results.items():
        for metric in result.get("metrics") or []:
            show = _percent if str(metric.get("name")).startswith(("acc", "pass@")) else _three_decimals
            interval = [show(metric.get(end)) for end in ("low", "high")]
            rows.append(
                {
                    "evaluation": name,
                    "metric": str(metric.get("name")),
                    "value": show(metric.get("value")),
                    "95 % interval": " to ".join(interval) if all(interval) else "",
                    "n": _number(result.get("n"), ",.0f"),
                }
            )
        replies = result.get("samples") or []
        chosen = [s for right in (False, True) for s in [s for s in replies if s.get("right") is right][:SAMPLES_SHOWN]]
        for sample in chosen:
            text = {key: sample.get(key, "") for key in ("question", "expected", "reply")}
            samples.append(f"**{name}: {'right' if sample['right'] else 'wrong'}**\n\n{_sample(text)}")
    if not rows:
        return ""
    marks = "#" * level
    parts = [f"{marks} Evaluations", markdown_table(rows)]
    return "\n\n".join(parts + ([f"{marks}# Replies", *samples] if samples else []))


def _three_decimals(value: Any) -> str:
    return _number(value, ",.3f")


def _heldout_section(heldout: Any) -> str:
    """Accuracies on what was never trained on, one row a task."""
    if not isinstance(heldout, Mapping) or not heldout:
        return ""
    rows = []
    for task, result in heldout.items():
        fields = result if isinstance(result, Mapping) else {"accuracy": result}
        rows.append({"task": str(task), **{key.replace("_", " "): _field(key, value) for key, value in fields.items()}})
    return "## Held-out questions\n\n" + markdown_table(rows)


def _field(key: str, value: Any) -> str:
    """A field of a held-out result: fractions as per cent, counts as they are, intervals as two of them."""
    if isinstance(value, list | tuple):
        return " to ".join(_field(key, each) for each in value)
    if isinstance(value, float) and 0.0 <= value <= 1.0:
        return _percent(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of the rows' cells; columns that are empty in every row are left out."""
    columns = [
        column for column in dict.fromkeys(key for row in rows for key in row) if any(r.get(column) for r in rows)
    ]
    if not columns:
        return ""
    lines = [columns, ["---" if index == 0 else "---:" for index in range(len(columns))]]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _samples_section(samples: Any) -> str:
    """Prompts and answers as they came. What a model wrote is never taken for Markdown: it stands in code fences."""
    if not isinstance(samples, list) or not samples:
        return ""
    return "\n\n".join(["## Samples", *(_sample(sample) for sample in samples)])


def _sample(sample: Any) -> str:
    if not isinstance(sample, Mapping):
        return fence(str(sample))
    parts = []
    for key, value in sample.items():
        text = "\n".join(_message(each) for each in value) if isinstance(value, list) else str(value)
        parts.append(f"**{str(key).replace('_', ' ')}**\n\n{fence(text)}")
    return "\n\n".join(parts) + "\n\n---"


def _message(message: Any) -> str:
    if isinstance(message, Mapping):
        return f"{message.get('role', '')}: {message.get('content', '')}"
    return str(message)


def fence(text: str) -> str:
    """`text` in a code fence that is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}text\n{text}\n{marks}"


def _drawn(plot: Callable[..., Path | None], path: Path, *curves: Any, **more: Any) -> Path | None:
    """What `plot` draws, at `path`, or None when it finds nothing to draw."""
    with whole_file(path) as temporary:
        drawn = plot(*curves, temporary, **more)
    return path if drawn else None


def _image(title: str, path: Path | None, folder: Path) -> str:
    """A picture in Markdown; nothing when there is none."""
    if path is None:
        return ""
    return f"![{title}]({path.relative_to(folder).as_posix()})"


def _write_report(folder: Path, parts: Iterable[str]) -> Path:
    path = folder / REPORT_FILE
    with whole_file(path) as temporary:
        temporary.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _first(*values: Any) -> Any:
    """The first value that is known."""
    return next((value for value in values if value is not None), None)


def _number(value: Any, spec: str, unit: str = "") -> str:
    return f"{value:{spec}}{unit}" if isinstance(value, int | float) else ""


def _percent(value: Any) -> str:
    return _number(100 * value, ".1f", " %") if isinstance(value, int | float) else ""


def _duration(seconds: Any) -> str:
    return format_duration(seconds) if isinstance(seconds, int | float) else ""


def _code(value: Any) -> str | None:
    return f"`{value}`" if value else None
