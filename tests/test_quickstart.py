"""The quickstart end to end, but small: every stage starts from the one before; the tables show what was measured."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minigpt import quickstart
from minigpt.cli import main
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.setup import compute_dtype
from minigpt.trainer.train_pretrain import PretrainOptions

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "dtype": "fp32",
    "compile": False,
    "threads": 1,
    "tensorboard": False,
}


def test_overwrite_removes_a_quickstart_and_nothing_else(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "microworld").mkdir()
    with pytest.raises(SystemExit):
        main(["quickstart", "--output", str(tmp_path), "--overwrite"])
    assert "holds more than a quickstart (thesis.txt): give --output another folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()
    assert (tmp_path / "microworld").exists()


@pytest.mark.parametrize(("capability", "dtype"), [(7, torch.float32), (8, torch.bfloat16)])
def test_a_gpu_without_bf16_units_trains_in_fp32(capability, dtype, tmp_path, monkeypatch):
    """A T4 emulates bf16, which torch counts as support."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=capability))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    chosen = [
        TrainOptions(),
        PretrainOptions(**quickstart.RECIPES["gpu"].model),
        quickstart._grpo_options(
            tmp_path, quickstart.QuickstartOptions(), "gpu", {"prompt_packed": tmp_path, "heldout_sums": tmp_path}
        ),
    ]
    assert [compute_dtype(options, torch.device("cuda")) for options in chosen] == [dtype] * 3


def test_it_goes_the_whole_road_once_and_shows_it_again(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    steps = {name: (2, 1e-3) for name in quickstart.ROAD}
    recipe = replace(quickstart.RECIPES["fp32"], model=SMALL, rows=2, stages=steps, world="tiny")
    monkeypatch.setitem(quickstart.RECIPES, "fp32", recipe)
    command = ["quickstart", "--output", str(folder), "--preset", "fp32"]
    main(command)
    told = capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert [row["stage"] for row in summary["stages"]] == list(quickstart.ROAD)
    for stage, leg in quickstart.ROAD.items():
        started_from = json.loads((folder / stage / "summary.json").read_text())["init"]
        assert started_from == ("random weights" if leg.after is None else f"from {folder / leg.after}")
    for name in ("questions", "sums at once", "sums with thinking"):
        task = summary["heldout"][name]
        assert task["n"] == 24
        assert 0 <= task["after_reason"] <= 1
        assert 0 <= task["after_grpo"] <= 1
        assert task["nearest_neighbour"] <= 0.25
        assert name.split(" with")[0] in told
    assert 0 < summary["stories_bits_per_byte"] < 12, "two steps from random weights: ln(6400) nats for 1 to 4 bytes"
    assert summary["persona"]["adapter_on"].keys() == {"in_persona", "interval", "right"}
    assert (folder / "lora" / "adapter" / "adapter_config.json").is_file()
    assert {sample["model"] for sample in summary["samples"]} == {"reason", "lora"}
    assert "Captain Mini" in told
    assert "Rewards alone" in told
    assert summary["grpo"]["before"]["prompts"] == summary["grpo"]["after"]["prompts"] > 0
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "sums with thinking" in report
    main(command)
    again = capsys.readouterr().out
    assert "this is the finished quickstart" in again
    assert summary["samples"][0]["prompt"] in again
