"""A whole run under the `deepspeed` launcher with two processes: raw data, a Ctrl-C, the rest, and the same weights
as one process gets."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import SMALL, metrics, weights
from test_distributed import free_port

from minigpt.trainer.checkpoint import list_checkpoints, verify

pytestmark = pytest.mark.slow


def start(*arguments: object) -> subprocess.Popen:
    """`deepspeed … train_pretrain` as the first process of a group, as a shell starts it."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--no_local_rank"]
    command = [*launcher, "--master_port", str(free_port()), "--module", "minigpt.trainer.train_pretrain"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *SMALL, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def test_ctrl_c_saves_and_the_finished_run_has_the_weights_of_one_process(texts, tmp_path, train):
    """A terminal's Ctrl-C reaches launcher and ranks at once, and the launcher sends them another signal on top."""
    zero2 = Path(__file__).parents[2] / "ds_configs" / "zero2.json"
    options = ("--data", texts, "--seq_len", 64, "--max_steps", 40, "--deepspeed", zero2, "--save_interval", 30)
    options += ("--eval_tasks", f"bpb:{texts}", "--eval_limit", 8)
    alone, together = tmp_path / "alone", tmp_path / "together"
    train("pretrain", *options, "--save_dir", alone)
    process = start(*options, "--save_dir", together)
    while not (together / "metrics.jsonl").exists() or '{"step": 3, ' not in (together / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    (checkpoint,) = list_checkpoints(together)
    stopped_at = verify(checkpoint)["step"]
    assert 3 <= stopped_at < 30, output
    assert not (together / "summary.json").exists()

    process = start(*options, "--save_dir", together)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"at step {stopped_at} of 40" in " ".join(output.split())
    ours, theirs = ([r for r in metrics(run) if r["kind"] == "train"] for run in (together, alone))
    assert [r["step"] for r in ours] == list(range(1, 41))
    assert [r["tokens"] for r in ours] == [r["tokens"] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    valid = [json.loads((run / "summary.json").read_text())["valid_loss"] for run in (together, alone)]
    assert valid[0] == pytest.approx(valid[1], rel=1e-4)
    judged, expected_task = (metrics(run)[-1]["bpb-texts/bits_per_byte"] for run in (together, alone))
    assert judged == pytest.approx(expected_task, rel=1e-4)
    expected = weights(alone)
    assert all((w - expected[name]).abs().median() < 1e-4 for name, w in weights(together).items())


def test_what_is_wrong_is_said_once_for_all_processes_and_ends_them(conversations, tmp_path):
    process = start("--data", conversations, "--save_dir", tmp_path / "run")
    output, _ = process.communicate()
    assert process.returncode == 1
    (said,) = [line for line in output.splitlines() if "error: " in line]
    assert said.startswith("error: ")
    assert "--stage sft" in said
    assert "Traceback" not in output


def test_one_damaged_file_of_one_rank_is_passed_over_by_all(texts, tmp_path):
    options = ("--data", texts, "--seq_len", 64, "--max_steps", 4, "--save_interval", 1, "--keep_checkpoints", 4)
    run = tmp_path / "run"
    process = start(*options, "--save_dir", run)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    expected = weights(run)
    newest = run / "checkpoints" / "step_00000004"
    (run / "summary.json").unlink()
    (damaged,) = newest.rglob("*zero_pp_rank_1_*optim_states.pt")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    process = start(*options, "--save_dir", run)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    said = " ".join(output.split())
    assert f"{damaged} is damaged" in said
    assert "at step 3 of 4" in said
    assert all(torch.equal(w, expected[name]) for name, w in weights(run).items()), "two processes: the same bits again"
