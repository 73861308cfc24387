"""`minigpt eval RUN`: what is run, written and shown, and one sentence for what cannot be."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.microworld import MicroWorldOptions, write_microworld
from data_prep.pack import PackOptions, pack
from minigpt import cli
from minigpt.dataset.shards import file_sha256
from minigpt.evaluation.tasks import make_tasks
from minigpt.generation.load import load_for_inference
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.observe.report import build_report


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, shipped_tokenizer) -> Path:
    """A folder like the quickstart's: a micro-world, packed chats, and a finished (random) model in `sft`."""
    folder = tmp_path_factory.mktemp("quickstart")
    files = write_microworld(folder / "microworld", MicroWorldOptions(size="tiny"))
    data = folder / "data" / "sft"
    pack(PackOptions(stage="sft", input=[files["sft"]], output=data, seq_len=128, workers=1, valid_fraction=0.1))
    torch.manual_seed(0)
    model = MiniGPT(MiniGPTConfig(6400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2))
    model.save_pretrained(folder / "sft" / "hf", dtype=torch.float32, tokenizer_folder=shipped_tokenizer)
    (folder / "sft" / "config.yaml").write_text(f"stage: sft\ndata:\n- {data}\n")
    (folder / "sft" / "summary.json").write_text('{"stage": "sft", "seq_len": 128}')
    (folder / "sft" / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 8.8, "tokens": 100}\n')
    return folder


@pytest.fixture
def evaluate(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        status = 0
        try:
            cli.main(["eval", *map(str, arguments)])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run


def results(run: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (run / "eval").glob("*.json")}


def test_without_tasks_a_run_is_judged_by_its_validation_split_and_its_heldout_questions(quickstart, evaluate):
    run = quickstart / "sft"
    status, out, err = evaluate(run, "--limit", 4, "--max_new_tokens", 3)
    assert status == 0, err
    found = results(run)
    assert set(found) == {f"{n}-first-4" for n in ("valid", "heldout_qa", "heldout_sums", "heldout_stories")}
    sums = found["heldout_sums-first-4"]
    assert sums["n"] == 4
    assert sums["metrics"][0]["low"] <= sums["metrics"][0]["value"] <= sums["metrics"][0]["high"]
    assert len(sums["samples"]) == 4
    assert {"question", "expected", "reply", "right"} == set(sums["samples"][0])
    assert sums["data"]["fingerprint"] == file_sha256(quickstart / "microworld" / "heldout_sums.jsonl")
    assert sums["model"]["stage"] == "sft"
    assert sums["settings"]["context"] == 128
    assert sums["command"].startswith("minigpt")
    for name in ("valid", "heldout_qa", "accuracy", "bits_per_byte"):
        assert name in out
    report = build_report(run).read_text(encoding="utf-8")
    assert "| heldout_sums-first-4 | accuracy |" in report
    assert sums["samples"][0]["question"] in report


def test_results_are_reproducible_and_do_not_take_each_others_place(quickstart, evaluate, tmp_path):
    run = tmp_path / "sft"
    shutil.copytree(quickstart / "sft", run, ignore=shutil.ignore_patterns("eval"))
    asked = quickstart / "microworld" / "heldout_sums.jsonl"
    common = (run, "--tasks", f"questions:{asked}", "--limit", 3, "--max_new_tokens", 4)
    for options in (("--samples", 3), ("--enable_thinking",), ("--enable_thinking", "false"), ()):
        assert evaluate(*common, *options)[0] == 0
    found = results(run)
    end = "first-3"
    assert set(found) == {f"heldout_sums-{part}{end}" for part in ("3-samples-", "think-", "no-think-", "")}
    assert [m["name"] for m in found[f"heldout_sums-3-samples-{end}"]["metrics"]][:2] == ["pass@1", "pass@3"]
    assert found[f"heldout_sums-3-samples-{end}"]["settings"]["temperature"] == 0.8
    assert all(s["reply"].startswith("<think>") for s in found[f"heldout_sums-think-{end}"]["samples"])
    before = (run / "eval" / f"heldout_sums-{end}.json").read_bytes()
    other = tmp_path / "elsewhere" / asked.name
    other.parent.mkdir()
    other.write_text("".join(asked.read_text().splitlines(keepends=True)[5:]))
    assert evaluate(*common[:-1], 2)[0] == 0
    assert evaluate(run, "--tasks", f"questions:{other}", *common[3:])[0] == 0
    assert evaluate(*common[:-1], 2)[0] == 0
    assert (run / "eval" / f"heldout_sums-{end}.json").read_bytes() == before
    assert len(results(run)) == len(found) + 2, "shorter answers, and other questions of the same name"
    assert evaluate(*common, "--samples", 3)[0] == 0
    again = results(run)[f"heldout_sums-3-samples-{end}"]
    assert again["samples"] == found[f"heldout_sums-3-samples-{end}"]["samples"]


def test_several_tasks_can_stand_in_one_word(quickstart):
    world = quickstart / "microworld"
    tasks = make_tasks([f"questions:{world / 'heldout_qa.jsonl'},bpb:{world / 'heldout_stories.jsonl'}"])
    assert [task.name for task in tasks] == ["heldout_qa", "bpb-heldout_stories"]
    comma = world / "a,b.jsonl"
    shutil.copy(world / "heldout_qa.jsonl", comma)
    tasks = make_tasks([f"questions:{comma}, questions:{comma}"])
    comma.unlink()
    assert [task.name for task in tasks] == ["a,b", "a,b-2"]


def test_what_cannot_be_done_is_said_in_one_sentence_before_the_model_is_loaded(quickstart, evaluate, tmp_path):
    run, world = quickstart / "sft", quickstart / "microworld"
    questions = f"questions:{world / 'heldout_qa.jsonl'}"
    bare = tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copytree(run / "hf", bare / "hf")
    reward = tmp_path / "reward"
    shutil.copytree(bare, reward)
    (reward / "summary.json").write_text('{"stage": "reward"}')
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    for arguments, sentence in (
        ((run, "--tasks", "gms8k:x"), "there is no task 'gms8k', did you mean gsm8k?"),
        ((run, "--tasks", "gsm8k"), "needs its data: gsm8k:PATH"),
        ((run, "--tasks", "gsm8k:nowhere.jsonl"), "nowhere.jsonl does not exist"),
        ((run, "--tasks", f"questions:{tmp_path / 'text.jsonl'}"), "text.jsonl:1: found the keys text"),
        ((run, "--tasks", f"bpb:{tmp_path / 'empty'}"), "holds no text"),
        ((run, "--tasks", f"bpb:{reward / 'hf' / 'model.safetensors'}"), "is not UTF-8"),
        ((bare,), "comes with nothing to be judged by"),
        ((bare, "--tasks", "bpb"), "there is none: bpb:PATH"),
        ((reward, "--tasks", questions), "is a reward model"),
        ((tmp_path / "nothing",), "no such run"),
        ((run, "--tasks", questions, "--samples", 4, "--temperature", 0), "all replies are the same"),
        ((run, "--tasks", questions, "--k", 4), "from 1 to --samples, which is 1"),
        ((run, "--tasks", questions, "--limit", 0), "--limit is 0"),
        ((run, "--tasks", questions, "--samples", "many"), "--samples is many"),
        ((run, "--tasks", questions, "--dev", world), "--shots is 0"),
    ):
        status, _, err = evaluate(*arguments)
        assert status == 1, arguments
        assert sentence in err, err
        assert len(err.strip().splitlines()) == 1, err
        assert "unexpected" not in err
    assert not (bare / "eval").exists()


def test_a_result_is_of_the_model_that_generates(quickstart, evaluate):
    """The values in the file are those of the same task called by hand."""
    from minigpt.evaluation.task import Settings

    run, stories = quickstart / "sft", quickstart / "microworld" / "heldout_stories.jsonl"
    assert evaluate(run, "--tasks", f"bpb:{stories}", "--context", 32)[0] == 0
    (task,) = make_tasks([f"bpb:{stories}"])
    by_hand = task.run(*load_for_inference(run), Settings(context=32))
    written = results(run)["bpb-heldout_stories"]
    assert written["metrics"][0]["value"] == by_hand.value
    assert written["details"]["context"] == 32
