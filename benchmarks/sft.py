"""Useful tokens per second of fine-tuning on short conversations: packed, padded to the maximum, length-bucketed.

    python benchmarks/sft.py [--input FILE …] [--seq_len 512] [--rounds 7] [--json FILE] [--markdown FILE]

The model, the engine, the optimizer step and the conversations are the same, and so is their number per optimizer step;
only the batches differ:

    packed      rows of seq_len tokens with several conversations each (what the trainer does)
    padded      one conversation a row, every row padded to seq_len
    bucketed    one conversation a row, neighbours of like length in a micro-batch, padded to its longest

A micro-batch has as many rows in all three, seq_len tokens long at most: what a batch size that fits the memory means.
Buckets are short as a rule, and products of more rows fill a machine better: --bucket_rows gives them more.

Useful tokens are those of conversations. All run interleaved (see `common.py`). Without --input: the micro-world.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from common import CONFIG_S, Contender, interleave, output_arguments, packed, packed_microworld, publish, rates_table
from common import ratios as ratios_of

from minigpt.dataset.shards import GlobalOrder, PackedDataset, Row, collate

if TYPE_CHECKING:
    from minigpt.trainer.engine import Engine

PACKED, PADDED, BUCKETED = "packed", "padded", "bucketed"
KINDS = (PACKED, PADDED, BUCKETED)
TITLES = {
    PACKED: "packed rows",
    PADDED: "padded to the maximum",
    BUCKETED: "bucketed by length, padded to the longest of the micro-batch",
}
POSITIONS_PER_STEP = 4096  # of the packed rows
POOL_STEPS = 16  # bucketing sorts the conversations of this many steps

Window = list[dict[str, np.ndarray]]


def main() -> None:
    arguments = _arguments()
    if arguments.task:
        run(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if arguments.input:
            data = packed(arguments.input, folder / "packed", "sft", arguments.seq_len)
        else:
            data = packed_microworld(folder, "sft", arguments.seq_len, "tiny" if arguments.smoke else "small")
        contenders = [_contender(arguments, kind, data, folder) for kind in KINDS]
        rates = interleave(contenders, rounds=arguments.rounds, steps=arguments.steps, warmup_steps=arguments.warmup)
        rows = PackedDataset(data, "train")
        pool = itertools.islice(windows(rows, BUCKETED, arguments.bucket_rows, arguments.bucket_multiple), POOL_STEPS)
        statistics = {**describe(rows), "bucketed_fill": fill(pool)}
    result = {
        "rates": {name: [r._asdict() for r in values] for name, values in rates.items()},
        "packed_over": ratios_of(rates, TITLES[PACKED]),
        "data": statistics,
        "settings": {"seq_len": arguments.seq_len, "threads": arguments.threads, "compile": arguments.compile},
    }
    table = f"{_data_line(statistics)}\n\n{rates_table(rates, TITLES[PACKED], 'useful tokens')}"
    publish("Fine-tuning on short conversations", result, table, arguments.json, arguments.markdown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, default=[], help="files of conversations")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=POOL_STEPS, help="optimizer steps of each contender in a round")
    parser.add_argument("--warmup", type=int, default=3, help="optimizer steps before the first round")
    parser.add_argument(
        "--bucket_multiple",
        type=int,
        default=64,
        help="widths of bucketed micro-batches are rounded up to multiples of this; each is a graph to compile",
    )
    parser.add_argument(
        "--bucket_rows", type=int, help="conversations of a bucketed micro-batch, if not as packed rows"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    output_arguments(parser)
    parser.add_argument("--task", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.bucket_rows = arguments.bucket_rows or _rows_per_step(arguments.seq_len)
    if arguments.smoke and not arguments.task:
        arguments.rounds, arguments.steps, arguments.warmup, arguments.compile = 1, 1, 1, False
    return arguments


def _contender(arguments: argparse.Namespace, kind: str, data: Path, folder: Path) -> Contender:
    progress = folder / f"{kind}.jsonl"
    command = [
        *(sys.executable, str(Path(__file__).resolve()), "--task", kind, "--data", str(data)),
        *("--progress", str(progress), "--threads", str(arguments.threads)),
        *("--bucket_multiple", str(arguments.bucket_multiple), "--bucket_rows", str(arguments.bucket_rows)),
        "--compile" if arguments.compile else "--no-compile",
        *(["--smoke"] if arguments.smoke else []),
    ]
    return Contender(TITLES[kind], command, progress, folder / f"{kind}.log")


def describe(data: PackedDataset) -> dict[str, float]:
    """Conversations, their mean and median length, and how full packed rows are."""
    lengths = np.concatenate([data.row(i).seq_lens for i in range(len(data))])
    return {
        "conversations": len(lengths),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "rows": len(data),
        "seq_len": data.seq_len,
        "fill": float(lengths.sum() / (len(data) * data.seq_len)),
    }


def fill(steps: Iterable[Window]) -> float:
    """Share of the positions that hold tokens."""
    useful = np.concatenate([(batch["document_ids"] >= 0).reshape(-1) for window in steps for batch in window])
    return float(useful.mean())


def _data_line(s: dict[str, float]) -> str:
    return (
        f"{s['conversations']:,.0f} conversations, {s['mean_length']:.0f} tokens on average (median "
        f"{s['median_length']:.0f}), maximum {s['seq_len']:.0f}; packed rows are {s['fill']:.1%} full, "
        f"bucketed ones {s['bucketed_fill']:.1%}"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train for ever on one kind of batches; a line with the counter of useful tokens after every step."""
    from minigpt.model.attention import choose_backend
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
    from minigpt.trainer.engine import Engine, init_processes
    from minigpt.trainer.loop import to_tensors
    from minigpt.trainer.options import TrainOptions
    from minigpt.trainer.setup import configure_torch
    from minigpt.trainer.stage import StageModule, language_model_loss

    processes = init_processes()
    configure_torch(TrainOptions(threads=arguments.threads), processes)
    data = PackedDataset(arguments.data, "train")
    shape = {**CONFIG_S, "hidden_size": 64, "num_hidden_layers": 1} if arguments.smoke else CONFIG_S
    config = MiniGPTConfig(**{**shape, "max_position_embeddings": max(2048, data.seq_len)})
    model = MiniGPT(config)
    model.attention_backend = choose_backend(processes.device, data.seq_len, torch.bfloat16)
    module = StageModule(model, language_model_loss)
    engine = Engine(module, processes, dtype=torch.bfloat16, learning_rate=1e-3, compile=arguments.compile)
    if arguments.compile:
        widths, rows = [data.seq_len], _rows_per_step(data.seq_len)
        if arguments.task == BUCKETED:
            widths, rows = list(bucket_widths(data.seq_len, arguments.bucket_multiple)), arguments.bucket_rows
        compile_widths(engine, widths, rows, model.attention_backend)
    batches = windows(data, arguments.task, arguments.bucket_rows, arguments.bucket_multiple)
    useful = 0
    with open(arguments.progress, "a", encoding="utf-8") as progress:
        for number, window in enumerate(batches, start=1):
            weight = sum(float(batch["weights"].sum()) for batch in window)
            for batch in window:
                engine.forward_backward(to_tensors(batch, processes.device, model.attention_backend), 1.0 / weight)
            engine.step(1e-3)
            useful += sum(int((batch["document_ids"] >= 0).sum()) for batch in window)
            progress.write(json.dumps({"step": number, "tokens": useful}) + "\n")
            progress.flush()


def compile_widths(engine: Engine, widths: Sequence[int], rows: int, backend: str) -> None:
    """Compile a graph of fixed shape for every width there will be, by a step on nothing but padding each.

    One graph for all widths would be slower, and takes minutes to compile.
    """
    from minigpt.trainer.loop import to_tensors

    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 1 + len(widths)
    for width in widths:
        padding = collate([], pad_to=width, n_rows=rows)
        engine.forward_backward(to_tensors(padding, engine.device, backend), 1.0)
        engine.step(0.0)


def _rows_per_step(seq_len: int) -> int:
    return max(1, POSITIONS_PER_STEP // seq_len)


def bucket_widths(seq_len: int, multiple: int) -> range:
    """Of bucketed micro-batches."""
    return range(multiple, _round_up(seq_len, multiple) + 1, multiple)


def windows(data: PackedDataset, kind: str, bucket_rows: int, bucket_multiple: int = 64) -> Iterator[Window]:
    """The micro-batches of one optimizer step after the other, without end, for one kind of batches."""
    rows_per_step = _rows_per_step(data.seq_len)
    if kind == PACKED:
        order = GlobalOrder(len(data))
        for start in itertools.count(0, rows_per_step):
            yield [collate([data.row(order.index(start + i)) for i in range(rows_per_step)], pad_to=data.seq_len)]
    single = conversations(data)
    per_step = max(rows_per_step, round(len(single) / len(data) * rows_per_step / bucket_rows) * bucket_rows)
    order = GlobalOrder(len(single))
    if kind == PADDED:
        for start in itertools.count(0, per_step):
            rows = [single[order.index(start + i)] for i in range(per_step)]
            pieces = [rows[i : i + rows_per_step] for i in range(0, per_step, rows_per_step)]
            yield [collate(piece, pad_to=data.seq_len, n_rows=rows_per_step) for piece in pieces]
    rng = np.random.default_rng(0)
    for start in itertools.count(0, POOL_STEPS * per_step):
        pool = [single[order.index(start + i)] for i in range(POOL_STEPS * per_step)]
        yield from bucketed_windows(pool, per_step, bucket_rows, rng, bucket_multiple)


def bucketed_windows(
    pool: Sequence[Row], per_step: int, rows: int, rng: np.random.Generator, multiple: int = 64
) -> Iterator[Window]:
    """Sort a pool by length, cut it into micro-batches, shuffle those, and deal them out to steps."""
    ordered = sorted(pool, key=lambda row: len(row.input_ids))
    batches = [ordered[i : i + rows] for i in range(0, len(ordered), rows)]
    shuffled = [batches[i] for i in rng.permutation(len(batches))]
    batches_per_step = max(1, per_step // rows)
    for i in range(0, len(shuffled), batches_per_step):
        yield [
            collate(batch, pad_to=_round_up(max(len(row.input_ids) for row in batch), multiple), n_rows=rows)
            for batch in shuffled[i : i + batches_per_step]
        ]


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def conversations(data: PackedDataset) -> list[Row]:
    """Each document of the packed rows as a row of its own."""
    single = []
    for index in range(len(data)):
        row = data.row(index)
        ends = np.cumsum(row.seq_lens)
        for start, end in zip(ends - row.seq_lens, ends, strict=True):
            weight = None if row.weight is None else row.weight[start:end]
            lengths = np.array([end - start], dtype=np.int32)
            single.append(Row(row.input_ids[start:end], lengths, weight, row.weight_table))
    return single


if __name__ == "__main__":
    main()
