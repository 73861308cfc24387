"""Tokens per second and MFU of the trainer on one device, for the larger presets.

    python benchmarks/presets.py [--presets 100m 300m 1b] [--seq_len 2048] [--steps 30] [--json FILE]

Each preset is trained by the stage that users call (`minigpt.trainer.loop.train`), in a process of its own that first
measures the rate of a bf16 matrix product. MFU is given twice: of 989 TFLOP/s (H100/H200 data sheet) and of the rate
just measured. FLOPs are counted per document (`minigpt.trainer.flops`): padding and masked pairs earn nothing, nor does
an optimizer, which is therefore AdamW: Muon's products would be work that is not counted.
The first steps, which compile, do not count. What is known is published after every preset, and of one that takes
longer than `--limit_seconds` the steps that it made until then count; once it made them all, it is ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import PEAK_FLOPS_H100, output_arguments, packed, publish

if TYPE_CHECKING:
    from minigpt.dataset.shards import PackedDataset
    from minigpt.model.model_minigpt import MiniGPTConfig

DOCUMENT_CHARACTERS = 16_000  # stories are joined to documents of this length: a row is then mostly one document
SMOKE_SHAPE = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}
FACTS = "facts.json"  # in the run folder
WARMUP_FRACTION = 0.3  # of the logged steps


def main() -> None:
    arguments = _arguments()
    if arguments.task:
        train_preset(arguments.task, arguments)
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or _long_documents(Path(scratch), arguments.seq_len, arguments.smoke)
        for preset in arguments.presets:
            results.append(_in_a_process(preset, data, Path(scratch) / preset, arguments))
            title, numbers = f"Preset {preset} on one device", {"presets": results}
            publish(title, numbers, table(results[-1:]), arguments.json, arguments.markdown)
    if all("error" in result for result in results):
        raise SystemExit("no preset could be measured")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["100m", "300m", "1b"])
    parser.add_argument("--data", type=Path, help="packed rows; joined stories of the micro-world when not given")
    parser.add_argument("--seq_len", type=int, default=2048)
    parser.add_argument("--tokens_per_step", type=int, default=131_072)
    parser.add_argument("--micro_batch_size", type=int, help="rows; the trainer's own choice when not given")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compile", nargs="*", default=["100m", "300m", "1b"], help="the presets that are compiled")
    parser.add_argument("--limit_seconds", type=int, default=150, help="a preset that takes longer is stopped")
    output_arguments(parser)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--save_dir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.smoke and not arguments.task:
        arguments.seq_len, arguments.tokens_per_step, arguments.steps, arguments.compile = 128, 512, 4, []
    return arguments


def _long_documents(folder: Path, seq_len: int, smoke: bool) -> Path:
    """The micro-world's stories joined to long documents and packed."""
    from data_prep.microworld import MicroWorldOptions, write_microworld

    size = "tiny" if smoke else "quickstart"
    stories = write_microworld(folder / "text", MicroWorldOptions(size=size))["pretrain"]  # type: ignore[arg-type]
    joined, length = [[]], 0  # type: ignore[var-annotated]
    for line in stories.read_text(encoding="utf-8").splitlines():
        joined[-1].append(json.loads(line)["text"])
        length += len(joined[-1][-1])
        if length > DOCUMENT_CHARACTERS:
            joined, length = [*joined, []], 0
    path = folder / "long.jsonl"
    documents = ({"text": "\n".join(texts)} for texts in joined if texts)
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), encoding="utf-8")
    return packed([path], folder / "packed", "pretrain", seq_len)


def _in_a_process(preset: str, data: Path, save_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """`train_preset` in a fresh process, and what came of it."""
    command = [
        *(sys.executable, str(Path(__file__).resolve()), "--task", preset, "--data", str(data)),
        *("--save_dir", str(save_dir), "--seq_len", str(arguments.seq_len), "--steps", str(arguments.steps)),
        *("--tokens_per_step", str(arguments.tokens_per_step)),
        *(["--micro_batch_size", str(arguments.micro_batch_size)] if arguments.micro_batch_size else []),
        *("--compile", *arguments.compile),
        *(["--smoke"] if arguments.smoke else []),
    ]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        deadline, error = time.monotonic() + arguments.limit_seconds, None
        while process.poll() is None and error is None and len(_steps_of(save_dir)) < arguments.steps:
            if time.monotonic() > deadline:
                error = f"took more than {arguments.limit_seconds} s"
            time.sleep(0.2)
        status = process.poll()
        process.kill()  # saving what it learned would take longer than the steps
        process.wait()
        if status:
            output.seek(0)
            lines = [line for line in output.read().splitlines() if line.strip()]
            error = lines[-1] if lines else f"status {status}"
    return measured(preset, save_dir, error)


def train_preset(preset: str, arguments: argparse.Namespace) -> None:
    """Train one preset for some steps, after saying in `facts.json` what its steps are to be compared with."""
    import torch

    from minigpt.dataset.shards import PackedDataset
    from minigpt.model.model_minigpt import MiniGPT
    from minigpt.observe.hardware import measure_matmul_rate
    from minigpt.trainer.loop import train
    from minigpt.trainer.setup import new_model_config
    from minigpt.trainer.train_pretrain import PRETRAIN, PretrainOptions

    options = PretrainOptions(
        data=[arguments.data],
        save_dir=arguments.save_dir,
        preset="s" if arguments.smoke else preset,  # type: ignore[arg-type]
        max_steps=arguments.steps,
        global_batch_size=max(1, arguments.tokens_per_step // arguments.seq_len),
        micro_batch_size=arguments.micro_batch_size,
        compile=preset in arguments.compile,
        optimizer="adamw",
        dtype="bf16",
        schedule="constant",
        tensorboard=False,
        eval_rows=1,
        **(SMOKE_SHAPE if arguments.smoke else {}),  # type: ignore[arg-type]
    )
    rows = PackedDataset(arguments.data, "train")
    config = new_model_config(options, rows)
    with torch.device("meta"):
        parameters = MiniGPT(config).num_parameters()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {
        "compiled": options.compile,
        "parameters": parameters,
        "flops_per_token": flops_per_token(rows, config),
        "matmul_flops_per_second": measure_matmul_rate(torch.bfloat16, device, seconds=1.0),
    }
    arguments.save_dir.mkdir(parents=True)
    (arguments.save_dir / FACTS).write_text(json.dumps(facts))
    train(PRETRAIN, options)


def flops_per_token(rows: PackedDataset, config: MiniGPTConfig) -> float:
    """What training on one token of these rows costs on average, forward and backward."""
    from minigpt.trainer.flops import training_flops

    lengths = np.concatenate([rows.row(i).seq_lens for i in range(len(rows))]).astype(np.float64)
    tokens, labels, pairs = lengths.sum(), (lengths - 1).sum(), (lengths * (lengths + 1) / 2).sum()
    return training_flops(config, tokens=tokens, labels=labels, attention_pairs=pairs) / tokens


def _steps_of(save_dir: Path) -> list[dict[str, Any]]:
    from minigpt.observe.metrics import read_metrics

    records = read_metrics(save_dir) if save_dir.exists() else []
    return [record for record in records if record.get("kind") == "train"]


def measured(preset: str, save_dir: Path, error: str | None) -> dict[str, Any]:
    """Tokens/s, MFU and memory of a run that ended, well or by an error: medians over the steps after the warm-up.

    {"preset", "error"} when it did not get that far.
    """
    steps = _steps_of(save_dir)
    after_warmup = steps[max(1, int(len(steps) * WARMUP_FRACTION)) :]
    if not after_warmup:
        return {"preset": preset, "error": error or "no step was logged"}
    facts = json.loads((save_dir / FACTS).read_text())
    tokens_per_second = statistics.median(step["tokens_per_second"] for step in after_warmup)
    flops_per_second = tokens_per_second * facts["flops_per_token"]
    return {
        "preset": preset,
        **facts,
        "tokens_per_second": tokens_per_second,
        "flops_per_second": flops_per_second,
        "mfu_of_989": flops_per_second / PEAK_FLOPS_H100,
        "mfu_of_measured_matmul": flops_per_second / facts["matmul_flops_per_second"],
        "memory_gb": max(step["memory_gb"] for step in after_warmup),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        **({} if error is None else {"stopped": f"{error}, after {len(steps)} steps"}),
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a line a preset."""
    lines = [
        "| preset | parameters | compiled | tokens/s | TFLOP/s | MFU of 989 TFLOP/s | of own product | GB | loss |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for r in results:
        if "error" in r:
            lines.append(f"| {r['preset']} | not measured: {r['error']} | | | | | | | |")
            continue
        product = f"{r['mfu_of_measured_matmul']:.1%} of {r['matmul_flops_per_second'] / 1e12:,.2f} TFLOP/s"
        lines.append(
            f"| {r['preset']} | {r['parameters'] / 1e6:,.1f}M "
            f"| {'yes' if r['compiled'] else 'no'} | {r['tokens_per_second']:,.0f} "
            f"| {r['flops_per_second'] / 1e12:,.2f} | {r['mfu_of_989']:.1%} | {product} | {r['memory_gb']:.1f} "
            f"| {r['first_loss']:.2f} → {r['last_loss']:.2f}{' (' + r['stopped'] + ')' if 'stopped' in r else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
