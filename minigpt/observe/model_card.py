"""The README.md of an exported model: what it is, where it comes from and what was measured, as its run recorded it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MARK = "<!-- written by minigpt export -->"
METRICS = {
    "loss": "training loss at the end, nats per token",
    "valid_loss": "validation loss, nats per token",
    "valid_bits_per_byte": "validation bits per byte",
    "bits_per_byte": "bits per byte",
    "heldout_accuracy": "held-out answers that are right",
    "valid_accuracy": "held-out pairs in the right order",
    "accuracy": "accuracy",
}
LOADING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")"""


def stage_chain(run: Path) -> list[dict[str, Any]]:
    """The summaries of a run and of those it started from, oldest first, as far as their folders are still there."""
    chain: list[dict[str, Any]] = []
    seen: set[Path] = set()
    folder: Path | None = run
    while folder is not None and folder.resolve() not in seen:
        seen.add(folder.resolve())
        summary = _summary(folder) or (_summary(folder.parent) if folder.name == "hf" else None)
        if summary is None:
            break
        chain.insert(0, summary)
        start = str(summary.get("init") or "")
        folder = Path(start.removeprefix("from ")) if start.startswith("from ") else None
    return chain


def model_card(run: Path, config: dict[str, Any], parameters: int, dtype: str, file: str | None = None) -> str:
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        run: the run folder whose weights are exported.
        config: the exported config.json.
        parameters: of the model.
        dtype: of the stored weights.
        file: name of a GGUF file, None for a Hugging Face folder.
    """
    chain = stage_chain(run)
    front = ["---", "library_name: " + ("gguf" if file else "transformers"), "pipeline_tag: text-generation"]
    front += ["tags:", "- minigpt", "---", MARK, ""]
    lines = [f"# {run.resolve().name}", ""]
    lines.append(
        f"A language model with {parameters:,} parameters, exported by MiniGPT. What it says can be wrong; below is "
        "all that was measured."
    )
    lines += ["", "## Shape", "", "| | |", "|---|---|"]
    shape = {
        "architecture": ", ".join(config.get("architectures", [])),
        "layers": config.get("num_hidden_layers"),
        "hidden size": config.get("hidden_size"),
        "feed-forward size": config.get("intermediate_size"),
        "heads (key/value heads)": f"{config.get('num_attention_heads')} ({config.get('num_key_value_heads')})",
        "vocabulary": config.get("vocab_size"),
        "context, tokens": config.get("max_position_embeddings"),
        "stored as": dtype,
    }
    lines += [f"| {name} | {value} |" for name, value in shape.items()]
    lines += ["", "## How it was made", ""]
    if chain:
        lines += [
            "| stage | steps | tokens | data fingerprint | code | started from |",
            "|---|---|---|---|---|---|",
            *(_stage_row(summary) for summary in chain),
        ]
        found = {METRICS[key]: value for key, value in chain[-1].items() if key in METRICS and _is_number(value)}
        if found:
            lines += ["", f"Measured at the end of the {chain[-1].get('stage', 'last')} stage:", ""]
            lines += [f"- {name}: {value:.4f}" for name, value in found.items()]
    else:
        lines.append("Not recorded: the folder has no summary.json of a training run.")
    lines += ["", "## How to load it", "", "```bash" if file else "```python"]
    lines += [f"llama-cli -m {file}" if file else LOADING.format(folder="."), "```", ""]
    return "\n".join([*front, *lines])


def _stage_row(summary: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return f"{summary[key]:,.0f}" if _is_number(summary.get(key)) else ""

    fingerprint = str(summary.get("fingerprint") or "")[:16]
    cells = [
        str(summary.get("stage") or ""),
        number("steps"),
        number("tokens"),
        f"`{fingerprint}`" if fingerprint else "",
        f"`{summary['commit']}`" if summary.get("commit") else "",
        str(summary.get("source") or Path(str(summary.get("init") or "").removeprefix("from ")).name),
    ]
    return "| " + " | ".join(cells) + " |"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _summary(folder: Path) -> dict[str, Any] | None:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None
