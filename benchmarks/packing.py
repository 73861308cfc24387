"""How fast is packing, next to nothing but tokenizing?

    python benchmarks/packing.py [--input FILE_OR_FOLDER …] [--megabytes 48] [--rounds 3]

In every round, interleaved: bare `tokenizers.encode_batch` on one thread over the same documents, already in memory;
the same in two processes at once, which is what two workers could reach on this machine if only tokenizing cost time;
then `minigpt data pack` end to end (read, filter, hash, tokenize, plan, write, fsync) with one worker and with two.
Each runs in a fresh process. Ratios are taken within a round. Prints a table; `--json FILE` stores the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BATCH_CHARS = 1 << 18
TARGETS = {
    "pack, 1 worker / bare": "≥ 0.85",
    "pack, 1 worker / bare, per CPU second": "≥ 0.85",
    "pack, 2 workers / bare, per CPU second": "≥ 0.85",
    "pack, 2 workers / 1 worker": "≥ 1.8",
    "bare, 2 processes at once / 1": "what the machine allows",
}


def main() -> None:
    arguments = _arguments()
    if arguments.task:
        print(json.dumps(TASKS[arguments.task](arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        inputs = [str(path) for path in arguments.input] or [_generate(Path(scratch), arguments.megabytes)]
        rounds = [_round(inputs, Path(scratch)) for _ in range(arguments.rounds)]
    result = _summarize(rounds)
    print(_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, default=[], help="text files or folders; generated if absent")
    parser.add_argument("--megabytes", type=int, default=48, help="size of the generated text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for temporary files")
    parser.add_argument("--json", type=Path, help="where to store the numbers")
    parser.add_argument("--task", choices=tuple(TASKS), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _round(inputs: Sequence[str], scratch: Path) -> dict[str, dict[str, float]]:
    """One measurement of each, every one in a process of its own."""
    output = scratch / "packed"
    bare = ["--task", "bare", "--input", *inputs]
    results = {"bare": _spawn(bare)}
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(_spawn, [bare, bare]))
    results["bare_2"] = {
        "tokens": sum(one["tokens"] for one in both),
        "seconds": max(one["seconds"] for one in both),
        "cpu_seconds": sum(one["cpu_seconds"] for one in both),
    }
    for workers in (1, 2):
        shutil.rmtree(output, ignore_errors=True)
        task = ["--task", "pack", "--workers", str(workers), "--output", str(output), "--input", *inputs]
        results[f"pack_{workers}"] = _spawn(task)
    return results


def _spawn(task: list[str]) -> dict[str, float]:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *task]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_bare(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of `encode_batch` alone, over documents that are in memory."""
    from tokenizers import Tokenizer

    import minigpt
    from data_prep.readers import read_records

    tokenizer = Tokenizer.from_file(str(Path(minigpt.__file__).parent / "model" / "tokenizer.json"))
    batches: list[list[str]] = [[]]
    for record in read_records(arguments.input, "pretrain"):
        batches[-1].append(record["text"])
        if sum(map(len, batches[-1])) >= BATCH_CHARS:
            batches.append([])
    start, cpu = time.perf_counter(), _cpu_seconds()
    tokens = sum(len(encoding) for batch in batches for encoding in tokenizer.encode_batch(batch))
    return {"tokens": tokens, "seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - cpu}


def run_pack(arguments: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of packing, and the largest process's memory."""
    from data_prep.pack import PackOptions, pack

    start, cpu = time.perf_counter(), _cpu_seconds()
    options = PackOptions(
        stage="pretrain", input=arguments.input, output=arguments.output, workers=arguments.workers, seq_len=512
    )
    manifest = pack(options)
    seconds = time.perf_counter() - start
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)  # children: the largest of them
    return {
        "tokens": manifest["tokens"]["stored"],
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds() - cpu,
        "memory_mb": max(resource.getrusage(each).ru_maxrss for each in who) / 1024,
        "fill": manifest["splits"]["train"]["fill"],
    }


def _cpu_seconds() -> float:
    """Processor time of this process and its finished children: unlike the clock, it does not count other programs."""
    return sum(os.times()[:4])


TASKS = {"bare": run_bare, "pack": run_pack}


def _summarize(rounds: list[dict[str, dict[str, float]]]) -> dict:
    rates = {name: [r[name]["tokens"] / r[name]["seconds"] for r in rounds] for name in rounds[0]}
    per_cpu = {name: [r[name]["tokens"] / r[name]["cpu_seconds"] for r in rounds] for name in rounds[0]}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rounds": rounds,
        "tokens_per_second": rates,
        "ratios": {
            "pack, 1 worker / bare": [p / b for p, b in zip(rates["pack_1"], rates["bare"], strict=True)],
            "pack, 1 worker / bare, per CPU second": [
                p / b for p, b in zip(per_cpu["pack_1"], per_cpu["bare"], strict=True)
            ],
            "pack, 2 workers / bare, per CPU second": [
                p / b for p, b in zip(per_cpu["pack_2"], per_cpu["bare"], strict=True)
            ],
            "pack, 2 workers / 1 worker": [b / a for a, b in zip(rates["pack_1"], rates["pack_2"], strict=True)],
            "bare, 2 processes at once / 1": [b / a for a, b in zip(rates["bare"], rates["bare_2"], strict=True)],
        },
        "memory_mb": max(r[name]["memory_mb"] for r in rounds for name in ("pack_1", "pack_2")),
        "fill": rounds[0]["pack_1"]["fill"],
    }


def _table(result: dict) -> str:
    lines = ["| what | min | median | max | target |", "|---|---|---|---|---|"]
    for name, values in result["tokens_per_second"].items():
        lines.append(f"| {name}, tokens/s | " + " | ".join(f"{v:,.0f}" for v in _spread(values)) + " | |")
    for name, values in result["ratios"].items():
        lines.append(f"| {name} | " + " | ".join(f"{v:.2f}" for v in _spread(values)) + f" | {TARGETS[name]} |")
    lines.append(f"| memory of the largest process, MB | | | {result['memory_mb']:,.0f} | ≤ 600 |")
    lines.append(f"| fill of the training rows | | {result['fill']:.3%} | | ≥ 99.5 % |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def _generate(folder: Path, megabytes: int) -> str:
    """Seeded text in two languages whose words are distributed as in real text (Zipf); a jsonl file's path."""
    rng = random.Random(0)
    syllables = [c + v + e for c in "bcdfghklmnprstvw" for v in "aeiou" for e in ("", "n", "r", "st", "nd", "l")]
    english = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(30_000)]
    chinese = ["".join(chr(rng.randrange(0x4E00, 0x6E00)) for _ in range(rng.choice((1, 1, 2)))) for _ in range(8_000)]
    path = folder / "generated.jsonl"
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes << 20:
            words, space, stop = (english, " ", ". ") if rng.random() < 0.5 else (chinese, "", "。")
            picks = [int(len(words) ** rng.random()) - 1 for _ in range(rng.randrange(30, 1500))]
            sentences = [space.join(words[i] for i in picks[at : at + 15]) for at in range(0, len(picks), 15)]
            line = json.dumps({"text": stop.join(sentences) + stop.strip()}, ensure_ascii=False) + "\n"
            size += len(line.encode())
            file.write(line)
    return str(path)


if __name__ == "__main__":
    main()
