"""Tasks that are run during training: training does not notice them, and their values are those of the weights."""

import json
from pathlib import Path

import pytest
from small_run import SMALL, assert_same_weights, metrics

from minigpt.evaluation.task import Settings
from minigpt.evaluation.tasks import make_tasks
from minigpt.generation.load import load_for_inference
from minigpt.observe.plots import Curve, plot_details
from minigpt.observe.report import build_report


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "questions.jsonl"
    records = [{"messages": [{"role": "user", "content": f"{i} 你好"}], "answer": str(i)} for i in range(5)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def test_training_is_bit_identical_with_and_without_tasks(train, packed, texts, questions, tmp_path):
    common = ("--data", packed, "--max_steps", 6, "--eval_interval", 2, "--export_dtype", "fp32")
    train("pretrain", *common, "--save_dir", tmp_path / "plain")
    tasks = ("--eval_tasks", f"questions:{questions}", "bpb", f"bpb:{texts}", "--eval_limit", 3, "--tensorboard=true")
    train("pretrain", *common, *tasks, "--save_dir", tmp_path / "judged")
    assert_same_weights(tmp_path / "judged", tmp_path / "plain")
    records = metrics(tmp_path / "judged")

    def losses(run: Path) -> list:
        return [(r["step"], r.get("loss"), r.get("valid_loss")) for r in metrics(run) if r["kind"] != "eval"]

    assert losses(tmp_path / "judged") == losses(tmp_path / "plain")
    judged = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in judged] == [2, 4, 6]
    assert {"questions/accuracy", "valid/bits_per_byte", "bpb-texts/bits_per_byte"} <= judged[0].keys()
    assert judged[0]["bpb-texts/bits_per_byte"] != judged[2]["bpb-texts/bits_per_byte"]

    model, encoder = load_for_inference(tmp_path / "judged")
    (task,) = make_tasks([f"bpb:{texts}"])
    by_hand = task.run(model, encoder, Settings(limit=3))
    assert judged[2]["bpb-texts/bits_per_byte"] == pytest.approx(by_hand.value, rel=1e-6)

    assert plot_details(Curve("pretrain", records), tmp_path / "details.png") is not None
    assert b"eval/questions/accuracy" in next((tmp_path / "judged" / "tensorboard").iterdir()).read_bytes()
    build_report(tmp_path / "judged")


def test_a_run_ends_when_its_goal_is_reached(train, minigpt, packed, texts, questions, tmp_path):
    common = ("--data", packed, "--max_steps", 6, "--eval_interval", 2, "--eval_limit", 3)
    goal = ("--eval_tasks", f"questions:{questions}", "--stop_when")
    told = train("pretrain", *common, *goal, "questions/accuracy>=0", "--save_dir", tmp_path / "easy")
    assert "questions/accuracy>=0 is reached at step 2" in told
    assert json.loads((tmp_path / "easy" / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "easy" / "hf" / "config.json").exists()
    (tmp_path / "easy" / "summary.json").unlink()  # as if killed before the export
    assert "at step 2 of 6" in train(
        "pretrain", *common, *goal, "questions/accuracy>=0", "--save_dir", tmp_path / "easy"
    )
    assert json.loads((tmp_path / "easy" / "summary.json").read_text())["steps"] == 2
    (tmp_path / "easy" / "summary.json").unlink()
    train("pretrain", *common, *goal, "questions/accuracy>=-1", "--save_dir", tmp_path / "easy")
    assert json.loads((tmp_path / "easy" / "summary.json").read_text())["steps"] == 2, "another goal, met already"
    (tmp_path / "easy" / "summary.json").unlink()
    train("pretrain", *common, *goal, "questions/accuracy>=1.1", "--save_dir", tmp_path / "easy")
    assert json.loads((tmp_path / "easy" / "summary.json").read_text())["steps"] == 6, "another goal goes on"
    train("pretrain", *common, *goal, "questions/accuracy>=1.1", "--save_dir", tmp_path / "never")
    assert json.loads((tmp_path / "never" / "summary.json").read_text())["steps"] == 6
    for wrong, why in (("accuracy > 1", "TASK/METRIC>=VALUE"), ("sums/accuracy>=0.5", "questions/accuracy")):
        ended = minigpt("train", "pretrain", *SMALL, *common, *goal, wrong, "--save_dir", tmp_path / "wrong")
        assert why in ended.sentence()
    ended = minigpt("train", "pretrain", *SMALL, "--stop_when", "x/y>=1", "--save_dir", tmp_path / "wrong")
    assert "--eval_tasks" in ended.sentence()


def bits_per_byte(run: Path, texts: Path) -> float:
    """Of a finished run's export, by hand."""
    (task,) = make_tasks([f"bpb:{texts}"])
    return task.run(*load_for_inference(run), Settings(limit=3)).value


def test_an_adapter_is_judged_merged_and_zero_3_gathered(train, packed, conversations, texts, tmp_path):
    """The last values during training are those of what the run leaves. And with dropout, which draws random numbers,
    neither the tasks nor the validation beside them change what is trained."""
    zero3 = Path(__file__).parents[2] / "ds_configs" / "zero3.json"
    common = ("--export_dtype", "fp32", "--eval_interval", 1, "--eval_tasks", f"bpb:{texts}", "--eval_limit", 3)
    base, tuned, again = (tmp_path / name for name in ("base", "tuned", "again"))
    train("pretrain", "--data", packed, "--max_steps", 2, "--deepspeed", zero3, *common, "--save_dir", base)
    adapter = ("--data", conversations, "--init", base, "--max_steps", 3, "--lora_dropout", 0.2)
    train("lora", *adapter, *common, "--save_dir", tuned)
    train("lora", *adapter, "--save_dir", again)
    for run in (base, tuned):
        judged = [r["bpb-texts/bits_per_byte"] for r in metrics(run) if r["kind"] == "eval"]
        assert len(set(judged)) == len(judged) > 1
        assert judged[-1] == pytest.approx(bits_per_byte(run, texts), rel=1e-6)
    assert [r["loss"] for r in metrics(tuned) if r["kind"] == "train"] == [
        r["loss"] for r in metrics(again) if r["kind"] == "train"
    ]


def test_wrong_tasks_are_told_before_the_training(minigpt, packed, tmp_path):
    ended = minigpt(
        "train", "pretrain", "--data", packed, "--save_dir", tmp_path / "r", "--eval_tasks", "gsm8k:no.jsonl"
    )
    assert "no.jsonl does not exist" in ended.sentence()
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_bits_per_byte_of_pairs_are_told_to_be_none_before_the_training(minigpt, packed, tmp_path):
    minigpt("train", "pretrain", *SMALL, "--data", packed, "--save_dir", tmp_path / "base", "--max_steps", 1)
    ended = minigpt(
        *("train", "dpo", *SMALL, "--init", tmp_path / "base", "--save_dir", tmp_path / "r"),
        *("--seq_len", 256, "--eval_tasks", "bpb"),
    )
    assert "bpb without a path means the validation split of the run's data, and there is none" in ended.sentence()
    assert not (tmp_path / "r" / "metrics.jsonl").exists()
