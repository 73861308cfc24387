"""What the benchmarks share: data, interleaved measurement of processes, ratios, results on disk.

Two programs are compared by running both at once but never at the same time: each is a process of its own that appends
a line of JSON with a `tokens` counter to a file after every step, and `interleave` lets one of them run for some steps,
stops it (SIGSTOP), lets the next run, and so on. A slow minute of the machine then falls on all of them, and the ratios
are taken within a round. The clock is the observer's, so a program cannot flatter itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.002
PEAK_FLOPS_H100 = 989e12  # dense bf16, the data sheet of H100 SXM and H200

# Config S: what the ratios to a plain PyTorch loop are measured on.
CONFIG_S = {
    "vocab_size": 6400,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 832,
}


def packed_microworld(folder: Path, stage: str, seq_len: int, size: str = "small") -> Path:
    """A packed dataset of the embedded micro-world, made unless `folder` holds it already."""
    from data_prep.microworld import MicroWorldOptions, write_microworld

    files = write_microworld(folder / "text", MicroWorldOptions(size=size))  # type: ignore[arg-type]
    return packed([files["pretrain" if stage == "pretrain" else "sft"]], folder / "packed", stage, seq_len)


def packed(inputs: Sequence[Path], output: Path, stage: str, seq_len: int) -> Path:
    """`inputs` packed into `output`."""
    from data_prep.pack import PackOptions, pack

    pack(PackOptions(stage=stage, input=list(inputs), output=output, seq_len=seq_len, overwrite=True))  # type: ignore[arg-type]
    return output


@dataclass
class Contender:
    """A program to be measured.

    Args:
        name: as it stands in the table.
        command: its command line.
        progress: the file that it appends a line of JSON with a `tokens` counter to after every step.
        log: where its output goes.
        environment: variables it gets besides ours.
    """

    name: str
    command: list[str]
    progress: Path
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0

    def start(self) -> None:
        """Start it in a process group of its own."""
        self.progress.unlink(missing_ok=True)
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                cwd=REPOSITORY,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait_for_step(self) -> tuple[float, dict[str, Any]]:
        """The moment at which the next step is reported, and its record.

        Errors: RuntimeError with the end of its log when the process ends instead.
        """
        assert self.process is not None
        seen = len(self.lines)
        while True:
            ended = self.process.poll() is not None
            self._read()
            if len(self.lines) > seen:
                return time.perf_counter(), self.lines[-1]
            if ended:
                tail = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
                raise RuntimeError(f"{self.name} ended with status {self.process.returncode}:\n{tail}")
            time.sleep(POLL_SECONDS)

    def _read(self) -> None:
        if not self.progress.exists():
            return
        with open(self.progress, "rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                record = json.loads(line)
                if record.get("kind", "train") == "train":
                    self.lines.append(record)

    def measure(self, steps: int) -> Rates:
        """Over `steps` steps from now on; the step that is under way is not counted."""
        seen = []
        for _ in range(steps + 1):
            moment, record = self.wait_for_step()
            seen.append((moment, self.cpu_seconds(), record["tokens"]))
        return rates_between(seen[0], seen[-1])

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far (proc_pid_stat(5), fields 14 and 15)."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Rates(NamedTuple):
    """How fast a contender was: tokens a second of the clock, and of its own CPU time.

    On a machine that others use, the first says little and the second still compares programs with as many threads
    (best: one, since waiting threads burn CPU time).
    """

    per_second: float
    per_cpu_second: float


def rates_between(first: tuple[float, float, float], last: tuple[float, float, float]) -> Rates:
    """From two readings of (seconds, CPU seconds, tokens)."""
    seconds, cpu_seconds, tokens = (b - a for a, b in zip(first, last, strict=True))
    return Rates(tokens / seconds, tokens / cpu_seconds if cpu_seconds else float("nan"))


@contextmanager
def running(contenders: Sequence[Contender], warmup_steps: int) -> Iterator[None]:
    """All contenders started, warmed up one after the other, and stopped; killed at the end."""
    started = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that we clean up
    try:
        for contender in contenders:
            contender.start()
            started.append(contender)
            for _ in range(warmup_steps):
                contender.wait_for_step()
            contender.signal(signal.SIGSTOP)
        yield
    finally:
        for contender in started:
            contender.signal(signal.SIGKILL)
            assert contender.process is not None
            contender.process.wait()
        signal.signal(signal.SIGTERM, previous)


def interleave(
    contenders: Sequence[Contender], *, rounds: int, steps: int, warmup_steps: int = 3
) -> dict[str, list[Rates]]:
    """Each contender's rates in each round; every other round in the opposite order."""
    rates: dict[str, list[Rates]] = {contender.name: [] for contender in contenders}
    with running(contenders, warmup_steps):
        for number in range(rounds):
            for contender in contenders if number % 2 == 0 else reversed(contenders):
                contender.signal(signal.SIGCONT)
                rates[contender.name].append(contender.measure(steps))
                contender.signal(signal.SIGSTOP)
            latest = "   ".join(f"{name} {values[-1].per_second:,.0f}" for name, values in rates.items())
            print(f"round {number + 1}/{rounds}, tokens/s:   {latest}", file=sys.stderr, flush=True)
    return rates


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(rates: dict[str, list[Rates]], ours: str) -> dict[str, dict[str, dict[str, float]]]:
    """How many times as fast `ours` is as each of the others, compared round by round, by either clock."""
    return {
        other: {
            clock: spread([getattr(a, clock) / getattr(b, clock) for a, b in zip(rates[ours], values, strict=True)])
            for clock in Rates._fields
        }
        for other, values in rates.items()
        if other != ours
    }


def rates_table(rates: dict[str, list[Rates]], ours: str, unit: str = "tokens") -> str:
    """Markdown: each contender's rates, and how `ours` compares with it."""
    compared = ratios(rates, ours)
    lines = [
        f"| | {unit}/s | ours / this | {unit} per CPU second | ours / this |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, values in rates.items():
        cells = []
        for clock in Rates._fields:
            s = spread([getattr(v, clock) for v in values])
            cells.append(f"{s['median']:,.0f} ({s['min']:,.0f} to {s['max']:,.0f})")
            r = compared[name][clock] if name in compared else None
            cells.append(f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" if r else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Medians over the rounds (smallest to largest); ratios within a round."])


def surroundings() -> dict[str, Any]:
    """What a number is worth nothing without: hardware, versions, commit."""
    from minigpt.observe.hardware import describe_hardware, package_version

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return {
        "hardware": describe_hardware(),
        "versions": {name: package_version(name) for name in ("torch", "deepspeed", "transformers")},
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def surroundings_line(about: dict[str, Any]) -> str:
    """The same in one line."""
    from minigpt.observe.hardware import summarise_hardware

    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{summarise_hardware(about['hardware'])}; {versions}; commit {about['commit']}; {about['date']}"


def publish(name: str, result: dict[str, Any], table: str, json_path: Path | None, markdown_path: Path | None) -> None:
    """Print the table and store it with the numbers; the Markdown file is appended to."""
    about = surroundings()
    text = f"## {name}\n\n{table}\n\n{surroundings_line(about)}\n"
    print(text)
    if json_path is not None:
        json_path.write_text(json.dumps({"benchmark": name, **result, **about}, indent=1, default=str) + "\n")
    if markdown_path is not None:
        with open(markdown_path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def output_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark has."""
    parser.add_argument("--json", type=Path, help="where to store the numbers")
    parser.add_argument("--markdown", type=Path, help="where to append the table")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few steps: does it run at all")
