"""Reports: the numbers are the run's, the pictures exist and show the data, and a broken or partial run still reads."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minigpt.errors import UserError
from minigpt.observe.plots import BLUE, ORANGE, Curve, _draw_loss, phase_seconds, plot_details, plot_loss, plot_reward
from minigpt.observe.reference import make_band
from minigpt.observe.report import build_quickstart_report, build_report, fence, find_key, markdown_table, read_run

CONFIG = "stage: {stage}\nmax_steps: 60\nmodel:\n  vocab_size: 6400\n  hidden_size: 256\n"


def train_records(steps: int, first_loss: float) -> list[dict]:
    return [
        {
            "step": step,
            "loss": 2.0 + (first_loss - 2.0) * math.exp(-(step - 1) / 10),
            "lr": 3e-3 * (1 - step / 100),
            "grad_norm": 1.0 + 1 / step,
            "tokens_per_second": 100.0 if step == 1 else 8000.0,
            "mfu": 0.2,
            "seconds": step * 0.5,
            "tokens": step * 4096,
        }
        for step in range(1, steps + 1)
    ]


def write_run(
    folder: Path,
    *,
    stage: str = "pretrain",
    steps: int = 60,
    first_loss: float = 8.764,
    summary: dict | None = None,
    records: list[dict] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    records = train_records(steps, first_loss) if records is None else records
    records.append(
        {"step": steps, "kind": "valid", "valid_loss": 2.5, "valid_bits_per_byte": 1.25, "tokens": steps * 4096}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(CONFIG.format(stage=stage))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps({"stage": stage, **summary}))
    return folder


def table_cells(markdown: str) -> list[dict[str, str]]:
    """The rows of the first table of a Markdown text."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    header = [cell.strip() for cell in rows[0]]
    return [dict(zip(header, row, strict=True)) for row in rows[2:] if len(row) == len(header)]


def linked_files(report: Path) -> list[Path]:
    return [report.parent / target for target in re.findall(r"\]\(([^)]+)\)", report.read_text(encoding="utf-8"))]


def read_png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def share_of_colour(picture: np.ndarray, colour: str) -> float:
    """Part of the picture's pixels that are (nearly) of this colour."""
    wanted = np.array([int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)])
    return float((np.abs(picture[..., :3] - wanted).max(axis=-1) < 0.1).mean())


def test_a_finished_run_s_numbers_stand_in_the_table(tmp_path):
    summary = {
        "steps": 60,
        "final_loss": 2.0123,
        "valid_loss": 2.2,
        "bits_per_byte": 1.1,
        "tokens_per_second": 7900.4,
        "seconds": 75,
        "fingerprint": "ab12cd",
        "hardware": {"cpu": "Test CPU", "cores": 2, "ram_gb": 8.0, "gpus": [], "bf16": "none"},
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "commit": "0123abc",
    }
    report = build_report(write_run(tmp_path / "run", summary=summary))
    text = report.read_text(encoding="utf-8")
    assert table_cells(text) == [
        {
            "run": "run",
            "stage": "pretrain",
            "steps": "60",
            "tokens": "245,760",
            "final loss": "2.0123",
            "valid loss": "2.2000",
            "bits/byte": "1.100",
            "tokens/s": "7,900",
            "MFU": "20.0 %",
            "time": "1:15",
        }
    ]
    for fact in ("Finished after 60 steps", "2 cores of Test CPU", "torch 2.13.0", "`ab12cd`", "`0123abc`"):
        assert fact in text
    assert linked_files(report)
    assert all(path.is_file() for path in linked_files(report))


def test_an_interrupted_run_is_reported_from_its_metrics_alone(tmp_path):
    report = build_report(write_run(tmp_path / "run", steps=40))
    text = report.read_text(encoding="utf-8")
    assert "**Not finished:** this is as far as step 40 of 60" in text
    row = table_cells(text)[0]
    assert (row["steps"], row["valid loss"], row["bits/byte"], row["time"]) == ("40", "2.5000", "1.250", "0:20")
    assert row["tokens/s"] == "8,000"  # the median: the slow first step does not count
    assert float(row["final loss"]) == pytest.approx(2.0 + 6.764 * math.exp(-3.9), abs=1e-4)


def test_the_first_loss_is_judged_against_ln_vocab(tmp_path):
    good = build_report(write_run(tmp_path / "good", first_loss=math.log(6400) + 0.1)).read_text(encoding="utf-8")
    bad = build_report(write_run(tmp_path / "bad", first_loss=12.0)).read_text(encoding="utf-8")
    assert "ln(6400) = 8.76, as it must be" in good
    assert "ln(6400) = 8.76, **which is not near it**" in bad


def test_other_runs_stand_beside_it(tmp_path):
    first, second = (write_run(tmp_path / name, first_loss=loss) for name, loss in (("one", 8.7), ("two", 8.8)))
    report = build_report(first, compare=[second])
    assert [row["run"] for row in table_cells(report.read_text(encoding="utf-8"))] == ["one", "two"]


def test_nan_losses_are_counted_and_do_not_stop_the_report(tmp_path):
    records = train_records(60, 8.764)
    for record in records[30:33]:
        record["loss"] = "nan"
    text = build_report(write_run(tmp_path / "run", records=records)).read_text(encoding="utf-8")
    assert "**3 of 60 logged losses are not a number.**" in text


def test_what_a_model_wrote_cannot_become_markdown(tmp_path):
    answer = "```\n<script>alert(1)</script>\n# heading\n````"
    samples = [{"prompt": "你是谁？", "answer": answer}, {"messages": [{"role": "user", "content": "hi"}]}]
    text = build_report(write_run(tmp_path / "run", summary={"samples": samples})).read_text(encoding="utf-8")
    assert f"`````text\n{answer}\n`````" in text
    assert "你是谁？" in text
    assert "user: hi" in text
    assert fence("plain") == "```text\nplain\n```"


def test_the_loss_picture_shows_the_curve_and_an_empty_run_is_nearly_blank(tmp_path):
    curve = Curve("pretrain", train_records(60, 8.764), vocab_size=6400)
    picture = read_png(plot_loss(curve, tmp_path / "loss.png"))
    empty = read_png(plot_loss(Curve("pretrain", []), tmp_path / "empty.png"))
    assert picture.shape[0] > 400
    assert share_of_colour(picture, BLUE) > 2e-3 > share_of_colour(empty, BLUE)


def drawn_loss(curve: Curve):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    _draw_loss(axis, curve, ())
    return axis


def test_the_drawn_lines_are_the_records_and_their_smoothed_form():
    records = train_records(60, 8.764)
    records.append({"step": 60, "kind": "valid", "valid_loss": 2.5, "tokens": 60 * 4096})
    raw, smoothed, valid = drawn_loss(Curve("pretrain", records)).lines
    assert list(raw.get_xdata()) == [4096 * step for step in range(1, 61)]
    assert list(raw.get_ydata()) == [record["loss"] for record in records[:60]]
    closeness = np.interp(raw.get_xdata(), smoothed.get_xdata(), smoothed.get_ydata()) - raw.get_ydata()
    assert np.abs(closeness).max() < 0.1
    assert (list(valid.get_xdata()), list(valid.get_ydata())) == ([60 * 4096], [2.5])


def test_ln_vocab_is_marked_at_step_0_of_a_run_from_nothing_only():
    fresh = drawn_loss(Curve("pretrain", train_records(60, 8.764), vocab_size=6400))
    marks = [line for line in fresh.lines if list(line.get_xdata()) == [0]]
    assert [float(line.get_ydata()[0]) for line in marks] == [pytest.approx(math.log(6400))]
    assert fresh.get_ylim()[1] > math.log(6400)
    tuned = drawn_loss(Curve("sft", train_records(60, 3.0), vocab_size=6400))
    assert tuned.get_ylim()[1] < 4


def test_a_spike_does_not_flatten_the_curve():
    records = train_records(60, 8.764)
    records[20]["loss"] = 500.0
    assert drawn_loss(Curve("pretrain", records, vocab_size=6400)).get_ylim()[1] < 16


def test_the_band_is_drawn_where_it_lies(tmp_path):
    band = make_band([write_run(tmp_path / "run")], recipe="demo")
    axis = drawn_loss(Curve("pretrain", train_records(60, 8.764), 6400, band))
    corners = axis.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(min(band.loss_low))
    assert corners[:, 1].max() == pytest.approx(max(band.loss_high))


def test_panels_exist_only_for_what_was_recorded(tmp_path):
    assert plot_details(Curve("x", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    one = plot_details(Curve("x", [{"step": step, "lr": 0.1 * step} for step in range(5)]), tmp_path / "one.png")
    assert one is not None
    assert share_of_colour(read_png(one), BLUE) > 1e-3


def test_quickstart_report_has_stages_in_the_order_of_the_road_with_held_out_and_samples(tmp_path):
    write_run(tmp_path / "sft", stage="sft", first_loss=3.0, summary={"steps": 60})
    write_run(tmp_path / "pretrain", summary={"steps": 60})
    summary = {
        "stages": [
            {"stage": "pretrain", "loss": 2.1, "bits_per_byte": 1.05, "tokens_per_second": 8000, "seconds": 150},
            {"stage": "sft", "loss": 0.5, "heldout_accuracy": 0.934, "tokens_per_second": 7900, "seconds": 99.7},
        ],
        "heldout": {"questions": {"accuracy": 0.934, "n": 1200, "interval": [0.92, 0.95], "nearest_neighbour": 0.12}},
        "samples": [{"prompt": "Who are you?", "answer": "I am MiniGPT."}],
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    report = build_report(tmp_path)
    text = report.read_text(encoding="utf-8")
    rows = table_cells(text)
    assert rows[0]["stage"] == "pretrain"
    assert rows[1] == {
        "stage": "sft",
        "loss": "0.5000",
        "bits/byte": "",
        "held-out accuracy": "93.4 %",
        "tokens/s": "7,900",
        "time": "1:40",
    }
    assert "| questions | 93.4 % | 1,200 | 92.0 % to 95.0 % | 12.0 % |" in text
    assert "I am MiniGPT." in text
    assert text.index("## pretrain") < text.index("## sft")
    assert all(path.is_file() for path in linked_files(report))


def test_quickstart_report_without_a_summary_is_made_from_the_runs(tmp_path):
    write_run(tmp_path / "pretrain")
    report = build_quickstart_report(tmp_path)
    assert table_cells(report.read_text(encoding="utf-8"))[0]["run"] == "pretrain"


def test_two_runs_of_one_stage_are_told_apart_by_their_folders(tmp_path):
    for name in ("reason_start", "reason"):
        write_run(tmp_path / name, stage="reason")
    text = build_quickstart_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == ["reason_start", "reason"]


def rl_records(**changed: float) -> list[dict]:
    """As rl/loop.py and rl/run.py write them, the reward rising from 0.2 to 1."""
    steps = 40
    records = [
        {
            **{"step": step, "kind": "train", "reward": 1 - 0.8 * (1 - step / steps), "entropy": 0.1, "kl": 0.0},
            **{"accuracy": 1 - 0.8 * (1 - step / steps), "zero_variance_groups": 0.2, "truncated": 0.0, "lr": 3e-4},
            **{"response_length": 39.0, "response_length_max": 49.0, "loss": -0.01, "grad_norm": 0.2},
            **{"seconds_generate": 0.3, "seconds_update_policy": 0.5, "seconds_step": 1.0, "tokens": 100 * step},
            **{"tokens_per_second": 4000.0, "generated_tokens_per_second": 9000.0, "seconds": float(step)},
            **{"tokens_per_second_update_policy": 7000.0, **changed},
        }
        for step in range(1, steps + 1)
    ]
    first, last = (
        {"step": step, "kind": "eval", "reward": score, "accuracy": score, "response_length": 38.0, "prompts": 200}
        for step, score in ((0, 0.25), (steps, 0.95))
    )
    return [first, *records, last]


def rl_summary(answer: str = "<answer>122</answer>") -> dict:
    """What rl/run.py writes of the held-out prompts."""

    def found(score: float, interval: list[float], sample: str, reward: float) -> dict:
        samples = [{"prompt": "69 + 53?", "right_answer": "122", "answer": sample, "reward": reward}]
        numbers = {"reward": score, "accuracy": score, "accuracy_interval": interval, "response_length": 38.0}
        return {**numbers, "prompts": 200, "samples": samples}

    before, after = found(0.25, [0.195, 0.314], "```no idea", 0.0), found(0.95, [0.91, 0.973], answer, 1.0)
    return {"steps": 40, "before": before, "after": after}


def rl_report(folder: Path, **changed: float) -> str:
    run = write_run(folder, stage="grpo", records=rl_records(**changed), summary=rl_summary())
    return build_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def good_rl_report(tmp_path_factory) -> str:
    return rl_report(tmp_path_factory.mktemp("good") / "run")


def test_a_run_of_rewards_shows_held_out_accuracy_answers_and_phases_before_and_after(tmp_path):
    text = rl_report(tmp_path / "grpo")
    assert "| accuracy | 25.0 % (19.5 % to 31.4 %) | 95.0 % (91.0 % to 97.3 %) | +70.0 points |" in text
    assert "Greedy answers to 200 prompts." in text
    assert "\n| reward |" not in text  # it is the accuracy
    assert text.index("````text\n```no idea\n````") < text.index("**after (reward 1)**") < text.index("<answer>122")
    assert "| generate | 0.300 | 30.0 % | 9,000 |" in text
    assert "| update policy | 0.500 | 50.0 % | 7,000 |" in text
    assert "| whole step | 1.000 |  | 4,000 |" in text
    assert "| other | 0.200 | 20.0 % |" in text
    assert "final loss" not in text
    assert "not drawn: KL to the reference, Answers cut off at the limit." in text
    assert "**" not in text.split("\n\n")[3]  # nothing to complain of
    files = linked_files(tmp_path / "grpo" / "report.md")
    assert {"reward.png", "details.png"} <= {path.name for path in files}
    assert all(path.is_file() for path in files)


def test_an_interrupted_run_of_rewards_is_reported_from_its_metrics_alone(tmp_path):
    text = build_report(write_run(tmp_path / "grpo", stage="grpo", records=rl_records())).read_text(encoding="utf-8")
    assert "| accuracy | 25.0 % | 95.0 % | +70.0 points |" in text


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"zero_variance_groups": 0.7}, "**70.0 % of the late groups have equal rewards and teach nothing;** most are"),
        ({"zero_variance_groups": 0.7, "accuracy": 0.1}, "most are wrong: ask easier questions"),
        ({"truncated": 0.4}, "**40.0 % of the late answers were cut off at the limit;** raise --max_new_tokens"),
        ({"sampler_gap_mean": -0.05}, "**Sampler and policy disagree**"),
        ({"sampler_gap_mean": 0.003, "version_lag": 0.0, "ratio": 1.0}, "**Sampler and policy disagree** by 0.003"),
        ({"sampler_gap_mean": math.nan}, "**40 of 40 gaps between sampler and policy are not a number:**"),
        ({"clip_fraction": 0.5}, "**50.0 % of the tokens are clipped;** lower --learning_rate"),
        ({"explained_variance": -0.3}, "**The critic predicts worse than a constant**"),
        ({"reward_failures": 2.0}, "**80 rewards failed and count as the worst of their batch, at most 0;**"),
    ],
)
def test_what_goes_wrong_in_a_run_of_rewards_is_said(tmp_path, good_rl_report, changed, sentence):
    assert sentence in rl_report(tmp_path / "bad", **changed)
    assert sentence not in good_rl_report


@pytest.mark.parametrize(
    "seen",
    [
        {"sampler_gap_mean": 5e-4, "version_lag": 0.0, "ratio": 1.0},
        {"sampler_gap_mean": -0.005, "version_lag": 1.0, "ratio": 1.0},
        {"sampler_gap_mean": -0.005, "version_lag": 0.0, "ratio": 1.001},
    ],
    ids=["rounding in bf16", "answers of the version before", "several updates a step"],
)
def test_what_rounding_and_updates_put_between_sampler_and_policy_is_no_fault(tmp_path, seen):
    assert "disagree" not in rl_report(tmp_path / "grpo", **seen)


def test_groups_of_equal_rewards_are_no_fault_where_a_critic_learns_from_them(tmp_path):
    assert "teach nothing" not in rl_report(tmp_path / "ppo", zero_variance_groups=1.0, explained_variance=0.5)


def test_a_rising_kl_and_a_collapsed_entropy_are_said(tmp_path):
    records = rl_records(zero_variance_groups=0.9)
    for record in records[1:-1]:
        record |= {"kl": 0.01 * record["step"], "entropy": 0.5 * math.exp(-record["step"] / 8)}
    text = build_report(write_run(tmp_path / "run", stage="grpo", records=records)).read_text(encoding="utf-8")
    assert "**The KL to the reference rises steadily,** from 0.055 to 0.355 nats a token" in text
    assert "**The entropy collapsed,**" in text


def test_the_picture_of_rewards_holds_training_and_held_out_and_accuracy_apart_only_if_it_differs(tmp_path):
    same = read_png(plot_reward(Curve("grpo", rl_records()), tmp_path / "same.png"))
    apart = read_png(plot_reward(Curve("grpo", rl_records(reward=0.3)), tmp_path / "apart.png"))
    assert share_of_colour(same, BLUE) > 1e-3
    assert share_of_colour(same, ORANGE) > 5e-4
    assert apart.shape[1] > same.shape[1]


def test_phases_and_the_rest_add_up_to_the_step():
    phases = phase_seconds(Curve("grpo", rl_records()))
    assert list(phases) == ["generate", "update policy", "other"]
    assert np.sum(list(phases.values()), axis=0) == pytest.approx(np.ones(40))
    assert phase_seconds(Curve("sft", train_records(5, 3.0))) == {}


def test_a_quickstart_that_ends_with_rewards_shows_their_curve(tmp_path):
    write_run(tmp_path / "sft", stage="sft", first_loss=3.0, summary={"steps": 60})
    write_run(tmp_path / "grpo", stage="grpo", records=rl_records(), summary=rl_summary())
    text = build_report(tmp_path).read_text(encoding="utf-8")
    assert text.index("## sft") < text.index("## grpo") < text.index("### Held-out prompts")
    assert table_cells(text)[1]["held-out accuracy"] == "95.0 %"
    picture = read_png(tmp_path / "report" / "curves.png")
    assert share_of_colour(picture[:, picture.shape[1] // 2 :], ORANGE) > 5e-4  # the held-out points


def test_what_is_not_a_run_is_refused_with_the_folder_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        build_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} holds no metrics.jsonl")):
        build_report(tmp_path)
    with pytest.raises(UserError, match=r"neither stage runs nor a summary\.json"):
        build_quickstart_report(tmp_path)
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text("{broken")
    with pytest.raises(UserError, match=r"summary\.json is not valid JSON"):
        build_report(run)


def test_vocab_size_is_found_in_the_exported_model_too(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    assert read_run(run).vocab_size is None
    (run / "hf").mkdir()
    (run / "hf" / "config.json").write_text(json.dumps({"vocab_size": 151_936}))
    assert read_run(run).vocab_size == 151_936


def test_tables_escape_cells_and_drop_columns_that_are_empty():
    table = markdown_table([{"a": "x|y", "b": "", "c": "1\n2"}, {"a": "z", "b": ""}])
    assert table.splitlines() == ["| a | c |", "| --- | ---: |", "| x\\|y | 1 2 |", "| z |  |"]
    assert markdown_table([]) == ""


def test_keys_are_found_outermost_first():
    assert find_key({"model": {"vocab_size": 1}, "vocab_size": 2}, "vocab_size") == 2
    assert find_key({"a": {"b": {"c": 0}}}, "c") == 0
    assert find_key({"a": 1}, "b") is None


@pytest.mark.parametrize(("limit", "file"), [(2000, "report/loss.png"), (200, "report.md")])
def test_a_report_on_a_full_disk_names_the_file_and_leaves_the_last_report_as_it_was(tmp_path, limit, file):
    run = write_run(tmp_path / "run", records=train_records(60, 8.764))
    build_report(run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    program = f"""
import resource
from minigpt import cli
from minigpt.observe import report
report.plot_loss = report.plot_loss if {limit} > 1000 else lambda curve, path, compare: path
report.plot_details = lambda curve, path: None
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
cli.main(["report", {str(run)!r}])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (f"error: {run / file}: File too large; free some space and run the same command again\n")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
