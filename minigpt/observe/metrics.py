"""What a run says while it trains: `metrics.jsonl`, TensorBoard, and a progress bar (plain lines when not a terminal).

`metrics.jsonl` is the record that everything else is made from: one strict-JSON object a line, written with one system
call, so that a killed run loses at most its last line. A resumed run first cuts off what lies beyond its checkpoint, so
that the file always reads as one uninterrupted run.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from minigpt.system import sync

if TYPE_CHECKING:
    from rich.console import Console

METRICS_FILE = "metrics.jsonl"
PLAIN_SECONDS = 5.0  # at least this long between two plain lines …
PLAIN_FRACTION = 0.1  # … unless this part of the run has passed
PLAIN_GROWTH = 0.01  # long runs say less: the pause grows with the time that has passed
RATE_WINDOW = 50  # logged steps that the remaining time is estimated from

# Shown in this order under these formats; every other number follows with four significant digits.
_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss: {v:.4f}",
    "valid_loss": lambda v: f"valid_loss: {v:.4f}",
    "valid_bits_per_byte": lambda v: f"bits/byte {v:.3f}",
    "lr": lambda v: f"lr {v:.1e}",
    "grad_norm": lambda v: f"grad_norm {v:.2f}",
    "tokens_per_second": lambda v: f"{v:,.0f} tok/s",
    "mfu": lambda v: f"mfu {100 * v:.0f} %",
}
_NOT_SHOWN = {"step", "kind", "seconds", "tokens", "memory_gb"}
# A step of reinforcement learning has some thirty numbers; of those a line shows these and no others.
_RL_FORMATS: dict[str, Callable[[float], str]] = {
    "reward": lambda v: f"reward {v:.3f}",
    "accuracy": lambda v: f"accuracy {100 * v:.1f} %",
    "kl": lambda v: f"kl {v:.4f}",
    "entropy": lambda v: f"entropy {v:.3f}",
    "response_length": lambda v: f"length {v:.0f}",
    "truncated": lambda v: f"truncated {100 * v:.0f} %",
    "lr": _FORMATS["lr"],
    "seconds_step": lambda v: f"{v:.2f} s/step",
    "tokens_per_second": _FORMATS["tokens_per_second"],
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, numbers as floats (`"nan"`, `"inf"` become what they name).

    Accepts the file or the run folder. An unfinished last line (a killed run) is left out; a run that was resumed from
    the middle may hold a step twice, then the later record counts. A missing file reads as no records.
    """
    path = path / METRICS_FILE if path.is_dir() else path
    records: dict[tuple[int, str], dict[str, Any]] = {}
    for _, record in _complete_lines(path):
        values = {key: _read_number(key, value) for key, value in record.items()}
        records[record["step"], str(record.get("kind", "train"))] = values
    return sorted(records.values(), key=lambda r: r["step"])


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line of the file that is a whole record, with its parsed form."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


def _read_number(key: str, value: Any) -> Any:
    return float(value) if key not in ("step", "kind") and value in ("nan", "inf", "-inf") else value


def _plain_value(value: Any) -> Any:
    """A value as strict JSON takes it: tensors and NumPy scalars as numbers, NaN and infinities by name."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def truncate_metrics(path: Path, last_step: int, judged: bool = True) -> None:
    """Cut the records beyond `last_step`, and any unfinished line, off `metrics.jsonl`; atomic.

    `last_step` 0 is a fresh start and empties the file. Not `judged`: what was found out about the weights of
    `last_step` goes too, since it will be found out again.
    """

    def stays(record: dict[str, Any]) -> bool:
        end = last_step + 1 if judged or record.get("kind", "train") == "train" else last_step
        return last_step > 0 and record["step"] < end

    if not path.exists():
        return
    kept = b"".join(line for line, record in _complete_lines(path) if stays(record))
    with whole_file(path) as temporary:
        temporary.write_bytes(kept)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` when all is written: `path` is whole or as it was.

    Raises OSError that names `path`: Python's own names a file that cannot be opened, but not one that cannot grow.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")  # the suffix tells the format of a picture
    try:
        yield temporary
        if temporary.exists():
            sync(temporary)
            temporary.replace(path)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _named(error: OSError, path: Path) -> OSError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "; free some space and run the same command again" if full else ""
    return OSError(error.errno, f"{error.strerror or error}{remedy}", str(path))


class _File:
    """A file that grows by whole records, each written with one system call except on a disk that is filling up.

    Raises OSError that names the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        unwritten = memoryview(data)
        try:
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
        except OSError as error:
            raise _named(error, self._path) from error

    def close(self) -> None:
        self._file.close()


def format_duration(seconds: float) -> str:
    """`75` → `1:15`, `3675` → `1:01:15`; `-:--` when unknown."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_metrics(metrics: dict[str, Any]) -> str:
    """The numbers of one record in one line, e.g. `loss: 6.1234  lr 3.0e-03  grad_norm 1.21  8,123 tok/s  mfu 21 %`.

    Of a record about sampled answers (it has `response_length`) the handful that tells how the run goes.
    """
    if "response_length" in metrics:
        return "  ".join(show(metrics[key]) for key, show in _RL_FORMATS.items() if key in metrics)
    numbers = {
        key: value
        for key, value in metrics.items()
        if key not in _NOT_SHOWN and isinstance(value, int | float) and not isinstance(value, bool)
    }
    shown = [show(numbers.pop(key)) for key, show in _FORMATS.items() if key in numbers]
    return "  ".join(shown + [f"{key} {value:.4g}" for key, value in numbers.items()])


class RunLogger:
    """Writes a run's metrics to `metrics.jsonl` and TensorBoard, and shows them.

    Args:
        run_dir: The run folder; made when missing.
        title: The name shown before every line, usually the stage.
        total_steps: Optimizer steps of the whole run, counted from 0 also when resumed.
        start_step: The step that a resumed run continues from: records beyond it are cut off. 0 is a fresh start.
        tensorboard: Also write `run_dir/tensorboard/`.
        enabled: False on every rank but the first: then nothing is written or shown.
        console: Where to show (default: standard output).
        clock: Seconds since some fixed moment.

    Example:
        >>> with RunLogger(run_dir, title="pretrain", total_steps=600) as logger:
        ...     logger.log(1, {"loss": 8.76, "lr": 3e-3, "tokens_per_second": 8123.0, "mfu": 0.21})

    `mfu` is a fraction. Raises OSError, with the file's name, when the disk is full.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        title: str,
        total_steps: int,
        start_step: int = 0,
        tensorboard: bool = True,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        truncate_metrics(self._path, start_step)
        self._file = _File(self._path)
        self._tensorboard = _TensorBoardWriter(run_dir / "tensorboard", start_step) if tensorboard else None
        self._display = _make_display(console, title, total_steps, start_step, clock)
        self._closed = False

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record `metrics` (numbers, one-element tensors, or strings such as `kind`) as of optimizer step `step`."""
        if not self.enabled:
            return
        numbers = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        record = {"step": int(step), **{key: _plain_value(value) for key, value in numbers.items()}}
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        if self._tensorboard is not None:
            self._tensorboard.write(int(step), numbers)
        self._display.show(int(step), numbers)

    def message(self, text: str) -> None:
        """Show a sentence above the bar; it is not recorded."""
        if self.enabled:
            self._display.message(text)

    def close(self) -> None:
        """Show the last step if it was held back, and close the files. May be called twice."""
        if not self.enabled or self._closed:
            return
        self._closed = True
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._display.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _TensorBoardWriter:
    """Scalars for TensorBoard in its own records: importing them does not import torch or TensorFlow.

    Its EventFileWriter writes in a thread, minutes later, and a disk that is full then is that thread's traceback.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"  # read in this order
        self._records = RecordWriter(_File(folder / name))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # A session start tells TensorBoard to forget the points of an earlier, interrupted session beyond this step.
        self._add(Event(wall_time=time.time(), step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        kind = metrics.get("kind", "train")
        values = [
            Summary.Value(tag=f"{kind}/{key.removeprefix('valid_')}", simple_value=value)
            for key, value in metrics.items()
            if isinstance(value, int | float)
        ]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._records.close()

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


class _Pace:
    """Estimates the remaining time from the last logged steps, so that a slow start (compilation) is soon forgotten."""

    def __init__(self, total_steps: int, start_step: int, clock: Callable[[], float]) -> None:
        self.total_steps = total_steps
        self._clock = clock
        self._window: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)

    def update(self, step: int) -> None:
        if not self._window or step > self._window[-1][1]:
            self._window.append((self._clock(), step))

    def remaining_seconds(self) -> float:
        """Seconds left; NaN while fewer than two steps are known."""
        if len(self._window) < 2:
            return math.nan
        (first_time, first_step), (last_time, last_step) = self._window[0], self._window[-1]
        return (last_time - first_time) / (last_step - first_step) * max(self.total_steps - last_step, 0)


class _PlainDisplay:
    """Lines for logs and pipes: the first and the last step always, between them a few."""

    def __init__(self, console: Console, title: str, pace: _Pace, start_step: int, clock: Callable[[], float]) -> None:
        self._console = console
        self._title = title
        self._pace = pace
        self._clock = clock
        self._started = clock()
        self._last_shown: tuple[float, int] | None = None
        self._held_back: tuple[int, dict[str, Any]] | None = None

    def show(self, step: int, metrics: dict[str, Any]) -> None:
        self._pace.update(step)
        if metrics.get("kind", "train") != "train":
            self.message(self._line(step, metrics))
        elif self._is_due(step):
            self._print(step, metrics)
        else:
            self._held_back = (step, metrics)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()

    def close(self) -> None:
        if self._held_back is not None:
            self._print(*self._held_back)

    def _is_due(self, step: int) -> bool:
        if self._last_shown is None or step >= self._pace.total_steps:
            return True
        now = self._clock()
        shown_at, shown_step = self._last_shown
        pause = max(PLAIN_SECONDS, PLAIN_GROWTH * (now - self._started))
        return now - shown_at >= pause or step - shown_step >= PLAIN_FRACTION * self._pace.total_steps

    def _print(self, step: int, metrics: dict[str, Any]) -> None:
        self._last_shown, self._held_back = (self._clock(), step), None
        self.message(f"{self._line(step, metrics)}  eta {format_duration(self._pace.remaining_seconds())}")

    def _line(self, step: int, metrics: dict[str, Any]) -> str:
        return f"{self._title}  step {step}/{self._pace.total_steps}  {format_metrics(metrics)}"


class _BarDisplay:
    """A progress bar with the numbers of the latest step under it, for terminals."""

    def __init__(self, console: Console, title: str, pace: _Pace, start_step: int, clock: Callable[[], float]) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = console
        self._title = title
        self._pace = pace
        self._train, self._valid = "", ""
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task(title, total=pace.total_steps, completed=start_step, eta="-:--")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2)
        self._live.start()

    def _render(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        lines = [Text("  " + line, style="cyan") for line in (self._train, self._valid) if line]
        return Group(self._progress, *lines)

    def show(self, step: int, metrics: dict[str, Any]) -> None:
        self._pace.update(step)
        if metrics.get("kind", "train") == "train":
            self._train = format_metrics(metrics)
        else:
            self._valid = f"step {step}  {format_metrics(metrics)}"
        eta = format_duration(self._pace.remaining_seconds())
        self._progress.update(self._task, completed=step, eta=eta)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def _make_display(
    console: Console | None, title: str, total_steps: int, start_step: int, clock: Callable[[], float]
) -> _PlainDisplay | _BarDisplay:
    from rich.console import Console

    console = console or Console()
    kind = _BarDisplay if console.is_terminal and not console.is_dumb_terminal else _PlainDisplay
    return kind(console, title, _Pace(total_steps, start_step, clock), start_step, clock)
