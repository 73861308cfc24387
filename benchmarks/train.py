"""Tokens per second of the whole trainer against transformers' Qwen3 in a plain PyTorch loop.

    python benchmarks/train.py [--data DIR] [--rounds 7] [--steps 12] [--threads 2] [--json FILE] [--markdown FILE]

Config S, rows of 256 tokens, 16 rows a step. Ours is `python -m minigpt.trainer.train_pretrain` as a user starts it:
DeepSpeed ZeRO-1, bf16 with float32 masters, compiled, metrics written at every step; with AdamW, which the peer has.
The peers are `peer_hf.py`, bf16 compiled and float32 eager, on the same packed rows with the same masks. All run
interleaved (see `common.py`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from common import (
    CONFIG_S,
    REPOSITORY,
    Contender,
    interleave,
    output_arguments,
    packed_microworld,
    publish,
    rates_table,
    ratios,
)

OURS = "MiniGPT trainer, ZeRO-1, bf16 compiled"
FOREVER = 1_000_000  # steps; the benchmark ends the processes
SMOKE_SHAPE = {**CONFIG_S, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = arguments.data or packed_microworld(folder, "pretrain", 256, "tiny" if arguments.smoke else "small")
        contenders = _contenders(arguments, data, folder)
        rates = interleave(contenders, rounds=arguments.rounds, steps=arguments.steps)
        utilisation = [line["mfu"] for line in contenders[0].lines if isinstance(line.get("mfu"), float)]
    result = {
        "rates": {name: [r._asdict() for r in values] for name, values in rates.items()},
        "ours_over": ratios(rates, OURS),
        "mfu_of_measured_matmul": statistics.median(utilisation) if utilisation else None,
        "settings": {"rows": arguments.rows, "threads": arguments.threads, "steps_per_round": arguments.steps},
    }
    table = rates_table(rates, OURS)
    publish("Training, config S", result, table, arguments.json, arguments.markdown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="packed rows; the embedded micro-world when not given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="steps of each contender in a round")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="*", default=["bf16", "fp32"], choices=["bf16", "autocast", "fp32"])
    parser.add_argument("--optimizer", default="adamw", help="ours; the peer's is AdamW")
    output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.steps, arguments.rows, arguments.peers = 2, 2, 4, ["fp32"]
    return arguments


def _contenders(arguments: argparse.Namespace, data: Path, folder: Path) -> list[Contender]:
    shape = SMOKE_SHAPE if arguments.smoke else CONFIG_S
    flags = [f"--{name}={value}" for name, value in shape.items()]
    compiled = not arguments.smoke
    ours = [
        *(sys.executable, "-m", "minigpt.trainer.train_pretrain", "--data", str(data)),
        *("--save_dir", str(folder / "run"), "--max_steps", str(FOREVER)),
        *("--global_batch_size", str(arguments.rows), "--micro_batch_size", str(arguments.rows)),
        *("--dtype", "bf16", "--compile", str(compiled).lower(), "--threads", str(arguments.threads)),
        *("--schedule", "constant", "--optimizer", arguments.optimizer, "--preset", "s", *flags),
    ]
    contenders = [Contender(OURS, ours, folder / "run" / "metrics.jsonl", folder / "ours.log")]
    for precision in arguments.peers:
        progress = folder / f"peer_{precision}.jsonl"
        how = "float32 eager" if precision == "fp32" else f"{precision} compiled"
        command = [
            *(sys.executable, str(REPOSITORY / "benchmarks" / "peer_hf.py"), "--data", str(data)),
            *("--progress", str(progress), "--precision", precision, "--rows", str(arguments.rows)),
            *("--threads", str(arguments.threads), *flags),
            *([] if precision == "fp32" else ["--compile"]),
        ]
        contenders.append(
            Contender(f"transformers Qwen3, plain loop, {how}", command, progress, folder / f"peer_{precision}.log")
        )
    return contenders


if __name__ == "__main__":
    main()
