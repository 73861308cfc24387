"""metrics.jsonl survives kills and resumes; what is shown is short and complete; TensorBoard holds the same numbers."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from minigpt.observe.metrics import RunLogger, format_duration, format_metrics, read_metrics, truncate_metrics


def make_logger(folder: Path, **options) -> RunLogger:
    """A logger that shows nothing on the test's terminal."""
    defaults = {"title": "pretrain", "total_steps": 10, "tensorboard": False, "console": Console(file=io.StringIO())}
    return RunLogger(folder, **{**defaults, **options})


def write_steps(folder: Path, steps: range, start_step: int = 0, offset: float = 0.0, **options) -> None:
    with make_logger(folder, start_step=start_step, **options) as logger:
        for step in steps:
            logger.log(step, {"loss": 10.0 - step + offset, "tokens": step * 4096})


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not strict JSON")


def test_lines_are_strict_json_and_read_back_equal_nan_included(tmp_path):
    with make_logger(tmp_path) as logger:
        logger.log(1, {"loss": 8.5, "lr": 3e-3})
        logger.log(2, {"loss": math.nan, "grad_norm": math.inf})
        logger.log(2, {"kind": "valid", "valid_loss": -math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse_constant)["step"] for line in lines] == [1, 2, 2]
    first, second, valid = read_metrics(tmp_path)
    assert first == {"step": 1, "loss": 8.5, "lr": 3e-3}
    assert math.isnan(second["loss"])
    assert second["grad_norm"] == math.inf
    assert valid == {"step": 2, "kind": "valid", "valid_loss": -math.inf}


def test_tensors_and_numpy_scalars_become_plain_numbers(tmp_path):
    import torch

    with make_logger(tmp_path) as logger:
        logger.log(1, {"loss": torch.tensor(2.5), "grad_norm": np.float32(0.5), "tokens": np.int64(4096)})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1,
        "loss": 2.5,
        "grad_norm": 0.5,
        "tokens": 4096,
    }


def test_resume_cuts_the_steps_beyond_the_checkpoint_and_equals_the_uninterrupted_file(tmp_path):
    write_steps(tmp_path / "whole", range(1, 11))
    write_steps(tmp_path / "resumed", range(1, 8), offset=0.0)
    write_steps(tmp_path / "resumed", range(5, 11), start_step=4)
    whole, resumed = (tmp_path / name / "metrics.jsonl" for name in ("whole", "resumed"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in resumed.parent.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", [b'{"step": 5, "lo', b'{"step": 5, "loss": 5.0}'])
def test_a_line_without_its_end_is_not_read_and_is_gone_after_resume(tmp_path, cut):
    write_steps(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + cut)
    assert read_metrics(tmp_path)[-1] == {"step": 5, "loss": 5.0, "tokens": 5 * 4096}
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    truncate_metrics(path, last_step=5)
    assert path.read_bytes() == whole


def test_a_fresh_start_empties_the_file_and_a_missing_one_is_fine(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", last_step=3)
    assert not (tmp_path / "metrics.jsonl").exists()
    write_steps(tmp_path, range(1, 6))
    make_logger(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_of_a_step_logged_twice_the_later_record_counts(tmp_path):
    lines = [{"step": 2, "loss": 5.0}, {"step": 2, "kind": "valid", "valid_loss": 6.0}, {"step": 2, "loss": 4.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record.get("loss", record.get("valid_loss")) for record in read_metrics(tmp_path)] == [4.0, 6.0]


def log_fifty_steps_and_be_killed(folder: Path) -> subprocess.CompletedProcess[bytes]:
    script = f"""
import os, signal
from pathlib import Path
from minigpt.observe.metrics import RunLogger
logger = RunLogger(Path({str(folder)!r}), title="pretrain", total_steps=100)
for step in range(1, 51):
    logger.log(step, {{"loss": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)


def test_every_logged_step_is_in_the_file_after_kill_9(tmp_path):
    result = log_fifty_steps_and_be_killed(tmp_path)
    assert result.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, 51))


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    script = f"""
import resource
from pathlib import Path
from minigpt.observe.metrics import RunLogger
logger = RunLogger(Path({str(tmp_path)!r}), title="pretrain", total_steps=100, tensorboard=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (110, 110))
try:
    for step in range(100):
        logger.log(step, {{"loss": 1.0}})
except OSError as error:
    print("refused", step, error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    refusal = result.stdout.splitlines()[-1]
    assert refusal.startswith("refused 4 ")  # 25 bytes a line: of the fifth, 10 bytes fit
    assert str(tmp_path / "metrics.jsonl") in refusal
    assert (tmp_path / "metrics.jsonl").stat().st_size == 110
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_tensorboard_on_a_full_disk_is_the_same_error_and_nothing_else(tmp_path):
    """No traceback of a thread that writes behind our back, and closing does not say it once more."""
    script = f"""
import resource
from pathlib import Path
from minigpt.observe.metrics import RunLogger
logger = RunLogger(Path({str(tmp_path)!r}), title="pretrain", total_steps=1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    for step in range(1000):
        logger.log(step, {{"loss": 1.0}})
except OSError as error:
    print("refused", error)
logger.close()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    (refusal,) = (line for line in result.stdout.splitlines() if line.startswith("refused"))
    assert "free some space" in refusal
    assert str(tmp_path / "tensorboard" / "events.out.tfevents.") in refusal
    points = tensorboard_points(tmp_path, "train/loss")
    assert points == [(record["step"], 1.0) for record in read_metrics(tmp_path)][: len(points)] != []


def test_tensorboard_has_every_logged_step_after_kill_9(tmp_path):
    log_fifty_steps_and_be_killed(tmp_path)
    assert [step for step, _ in tensorboard_points(tmp_path, "train/loss")] == list(range(1, 51))


def test_cutting_off_records_on_a_full_disk_names_the_file_and_leaves_it_as_it_was(tmp_path):
    with make_logger(tmp_path) as logger:
        for step in range(1, 9):
            logger.log(step, {"loss": 1.0})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    script = f"""
import resource
from pathlib import Path
from minigpt.observe.metrics import truncate_metrics
resource.setrlimit(resource.RLIMIT_FSIZE, (110, 110))
try:
    truncate_metrics(Path({str(tmp_path / "metrics.jsonl")!r}), 6)
except OSError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert str(tmp_path / "metrics.jsonl") in result.stdout
    assert "free some space" in result.stdout
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_rank_that_is_not_the_first_writes_and_shows_nothing(tmp_path, capsys):
    with RunLogger(tmp_path / "run", title="pretrain", total_steps=10, enabled=False) as logger:
        logger.log(1, {"loss": 1.0})
        logger.message("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def tensorboard_points(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_the_same_numbers_and_forgets_what_a_resume_cut_off(tmp_path):
    with make_logger(tmp_path, tensorboard=True) as logger:
        for step in range(1, 8):
            logger.log(step, {"loss": float(step)})
        logger.log(7, {"kind": "valid", "valid_loss": 6.5})
    assert tensorboard_points(tmp_path, "train/loss") == [(step, float(step)) for step in range(1, 8)]
    assert tensorboard_points(tmp_path, "valid/loss") == [(7, 6.5)]
    with make_logger(tmp_path, tensorboard=True, start_step=4) as logger:
        for step in range(5, 7):
            logger.log(step, {"loss": 10.0 * step})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0)]
    assert tensorboard_points(tmp_path, "train/loss") == expected


# --- what is shown ---------------------------------------------------------------------------------------------------


def shown_lines(
    folder: Path, steps: range, *, seconds_a_step: float, total_steps: int, close: bool = True
) -> list[str]:
    """The plain lines of a run whose clock moves by `seconds_a_step` at every look at the step's time."""
    output = io.StringIO()
    now = itertools.count()
    state = {"time": 0.0}
    logger = make_logger(
        folder, total_steps=total_steps, console=Console(file=output, width=60), clock=lambda: state["time"]
    )
    for step in steps:
        state["time"] = next(now) * seconds_a_step
        logger.log(step, {"loss": 6.12344, "lr": 3e-3, "grad_norm": 1.21, "tokens_per_second": 8123.4, "mfu": 0.21})
    if close:
        logger.close()
    return output.getvalue().splitlines()


def test_the_plain_line_is_as_published_and_is_not_wrapped(tmp_path):
    lines = shown_lines(tmp_path, range(1, 21), seconds_a_step=0.1, total_steps=600)
    assert lines[0] == (
        "pretrain  step 1/600  loss: 6.1234  lr 3.0e-03  grad_norm 1.21  8,123 tok/s  mfu 21 %  eta -:--"
    )
    assert lines[-1].startswith("pretrain  step 20/600  loss: 6.1234  ")
    assert lines[-1].endswith("eta 0:58")  # 580 steps of 0.1 s


@pytest.mark.parametrize(
    ("seconds_a_step", "total_steps", "most"),
    [
        pytest.param(0.001, 1000, 12, id="a short run: every tenth part"),
        pytest.param(0.5, 120, 24, id="a minute: every five seconds or every tenth part"),
        pytest.param(1.0, 36_000, 600, id="ten hours: ever more seldom"),
    ],
)
def test_logs_stay_short_and_hold_the_first_and_the_last_step(tmp_path, seconds_a_step, total_steps, most):
    lines = shown_lines(tmp_path, range(1, total_steps + 1), seconds_a_step=seconds_a_step, total_steps=total_steps)
    steps = [int(line.split("step ")[1].split("/")[0]) for line in lines]
    assert (steps[0], steps[-1]) == (1, total_steps)
    assert steps == sorted(set(steps))
    assert 10 <= len(steps) <= most


def test_the_last_step_is_shown_at_once_not_only_when_the_logger_is_closed(tmp_path):
    lines = shown_lines(tmp_path, range(1, 9), seconds_a_step=0.001, total_steps=8, close=False)
    assert lines[-1].startswith("pretrain  step 8/8 ")
    tail = shown_lines(tmp_path, range(90, 101), seconds_a_step=0.001, total_steps=100, close=False)
    assert [line.split()[2] for line in tail] == ["90/100", "100/100"]
    almost = shown_lines(tmp_path, range(95, 101), seconds_a_step=0.001, total_steps=100, close=False)
    assert [line.split()[2] for line in almost] == ["95/100", "100/100"]


def test_an_interrupted_run_still_shows_its_last_step(tmp_path):
    lines = shown_lines(tmp_path, range(1, 8), seconds_a_step=0.001, total_steps=1000)
    assert [line.split()[2] for line in lines] == ["1/1000", "7/1000"]


def test_validation_and_messages_are_always_shown_as_written(tmp_path):
    output = io.StringIO()
    with make_logger(tmp_path, console=Console(file=output, width=40), total_steps=1000) as logger:
        logger.message("[bold] 数据 was packed; 12 of 34 documents were dropped as duplicates")
        logger.log(1, {"loss": 8.0})
        logger.log(2, {"loss": 7.0})
        logger.log(2, {"kind": "valid", "valid_loss": 7.1, "valid_bits_per_byte": 3.2})
    assert output.getvalue().splitlines()[:3] == [
        "[bold] 数据 was packed; 12 of 34 documents were dropped as duplicates",
        "pretrain  step 1/1000  loss: 8.0000  eta -:--",
        "pretrain  step 2/1000  valid_loss: 7.1000  bits/byte 3.200",
    ]


def test_numbers_without_a_format_of_their_own_follow_and_nan_is_shown():
    assert (
        format_metrics({"loss": math.nan, "reward": 0.51234, "kind": "train", "tokens": 9})
        == "loss: nan  reward 0.5123"
    )


def test_of_a_step_of_reinforcement_learning_a_handful_of_numbers_is_shown():
    record = {
        **{"kind": "train", "accuracy": 0.375, "reward": 0.4, "reward_std": 0.48, "response_length": 39.4},
        **{"truncated": 0.25, "lr": 3e-4, "loss": -0.01, "policy_loss": -0.01, "kl": 0.0123, "entropy": 0.0747},
        **{"sampler_gap_max": 0.156, "seconds_generate": 0.3, "seconds_step": 1.165, "tokens_per_second": 4332.03},
    }
    assert format_metrics(record) == (
        "reward 0.400  accuracy 37.5 %  kl 0.0123  entropy 0.075  length 39  truncated 25 %  lr 3.0e-04  "
        "1.17 s/step  4,332 tok/s"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3675, "1:01:15"), (math.nan, "-:--")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def read_terminal(script: str) -> str:
    """What a program writes to a real (pseudo-)terminal."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=child, stderr=child, env=environment)
    os.close(child)
    written = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # Linux reports the closed other end as EIO
            break
        if not chunk:
            break
        written += chunk
    os.close(parent)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_a_terminal_gets_a_bar_with_the_numbers_and_its_cursor_back(tmp_path):
    script = f"""
from pathlib import Path
from minigpt.observe.metrics import RunLogger
with RunLogger(Path({str(tmp_path)!r}), title="pretrain", total_steps=4, tensorboard=False) as logger:
    logger.message("starting [now]")
    for step in range(1, 5):
        logger.log(step, {{"loss": 7.0 - step / 10, "lr": 1e-3, "tokens_per_second": 8123.0}})
"""
    written = read_terminal(script)
    assert "starting [now]" in written
    assert "━" in written
    assert "4/4" in written
    assert "loss: 6.6000  lr 1.0e-03  8,123 tok/s" in written
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # shown again after it was hidden


def test_the_logger_costs_no_heavy_import(tmp_path):
    script = f"""
import sys
from pathlib import Path
from minigpt.observe import hardware, metrics, plots, reference, report, doctor
with metrics.RunLogger(Path({str(tmp_path)!r}), title="x", total_steps=1, tensorboard=False) as logger:
    logger.log(1, {{"loss": 1.0}})
heavy = {{"torch", "tensorboard", "matplotlib", "deepspeed", "transformers", "tensorflow"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE])
def test_output_that_cannot_be_written_does_not_hide_what_ended_the_run(number, tmp_path, monkeypatch):
    """The pipe that the log goes to is closed, or the disk is full that it lies on: the error is what is said."""
    import torch

    from minigpt.errors import UserError
    from minigpt.trainer.engine import Processes
    from minigpt.trainer.run import Run
    from minigpt.trainer.train_pretrain import PretrainOptions

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    def train() -> None:
        try:
            raise UserError("the data end here")
        finally:
            run.pause()

    run = Run("pretrain", PretrainOptions(save_dir=tmp_path), Processes(0, 0, 1, torch.device("cpu")))
    run._logger = make_logger(tmp_path, total_steps=1000, tensorboard=True)
    for step in (1, 2):
        run.log(step, {"loss": 1.0})
    run._logger._display._console.file = Gone()  # step 2 was held back and is shown when the display closes
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # rich would give all later tests' output to /dev/null
    with pytest.raises(UserError, match="the data end here"):
        train()
