"""`minigpt train lora`: what a run leaves, what it leaves alone, how it goes on, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_resume import as_it_was_at, learnt

from minigpt.model.model_lora import set_adapter
from minigpt.model.model_minigpt import MiniGPT
from minigpt.model.peft_format import load_adapter

STEPS = ("--max_steps", 6, "--lora_rank", 4)
IDS = torch.arange(3, 83)[None]


@pytest.fixture
def base(packed, tmp_path, train):
    """A pretrained run to start from."""
    train("pretrain", "--data", packed, "--save_dir", tmp_path / "base", "--max_steps", 2)
    return tmp_path / "base"


@pytest.fixture
def tuned(base, conversations, tmp_path, train):
    """`tuned(name, *options)` is the folder of a finished LoRA run."""

    def run(name: str, *options: object, init=base):
        folder = tmp_path / name
        train("lora", "--data", conversations, "--init", init, "--save_dir", folder, *STEPS, *options)
        return folder

    return run


def masters(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("options", [(), ("--dtype", "bf16"), ("--lora_dora", "--lora_rslora")])
def test_a_run_leaves_an_adapter_and_the_merged_model_and_both_say_the_same(tuned, base, options):
    run = tuned("run", "--export_dtype", "fp32", *options)
    names = sorted(p.name for p in run.glob("*.pth"))
    assert names == ["lora_32.pth", "merged_32.pth"]
    adapter, merged = masters(run / "lora_32.pth"), masters(run / "merged_32.pth")
    assert all(".lora_" in name for name in adapter)
    assert not any(".lora_" in name for name in merged)
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(t.numel() for t in adapter.values())

    unmerged = MiniGPT.from_pretrained(base / "hf")
    unmerged.load_state_dict(masters(base / "pretrain_32.pth"))  # the float32 masters
    before = unmerged(IDS).logits
    load_adapter(unmerged, run / "adapter")
    set_adapter(unmerged, "default")
    plain = MiniGPT.from_pretrained(run / "hf")
    assert (plain(IDS).logits - unmerged(IDS).logits).abs().max() <= 1e-5
    assert (plain(IDS).logits - before).abs().max() > 1e-3
    untouched = [n for n in merged if "proj" not in n]
    assert len(untouched) > 5
    start = masters(base / "pretrain_32.pth")
    assert all(torch.equal(merged[n], start[n]) for n in untouched)


def test_the_loss_falls_and_the_run_is_named_as_the_other_stages_are(tuned):
    run = tuned("run", "--learning_rate", 2e-2, "--max_steps", 30)
    losses = [r["loss"] for r in learnt(run) if r["kind"] == "train"]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stage"] == "lora"


def test_later_stages_start_from_the_merged_masters(tuned, conversations, tmp_path, train):
    first = tuned("first")
    train("sft", "--data", conversations, "--init", first, "--save_dir", tmp_path / "sft", "--learning_rate", 0,
          "--max_steps", 1)  # fmt: skip
    after, merged = masters(tmp_path / "sft" / "full_sft_32.pth"), masters(first / "merged_32.pth")
    assert all(torch.equal(after[name], merged[name]) for name in merged)
    second = tuned("second", init=first)
    assert (second / "adapter").is_dir()


@pytest.mark.parametrize("dropout", [(), ("--lora_dropout", 0.2)])
def test_resuming_gives_the_bits_of_the_run_that_was_not_interrupted(dropout, tuned, tmp_path):
    options = ("--save_interval", 1, "--keep_checkpoints", 6, "--dtype", "bf16", *dropout)
    whole = tuned("whole", *options)
    as_it_was_at(2, whole, tmp_path / "again")
    again = tuned("again", *options)
    assert learnt(again) == learnt(whole)
    for name in ("lora_32.pth", "merged_32.pth"):
        ours, theirs = masters(again / name), masters(whole / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_checkpoint_goes_on_only_with_the_base_and_the_adapter_that_it_was_made_with(
    tuned, base, packed, conversations, tmp_path, train, minigpt
):
    from small_run import SMALL

    whole = tuned("whole", "--save_interval", 1, "--keep_checkpoints", 6)
    train("pretrain", "--data", packed, "--save_dir", tmp_path / "other", "--max_steps", 2, "--seed", 5)
    for name, options, said in (
        ("other base", ("--init", tmp_path / "other"), "other frozen weights than those that --init gives now"),
        ("other rank", ("--lora_rank", 2), "take the --lora_rank"),
        ("other layers", ("--lora_targets", "q_proj"), "--lora_targets"),
    ):
        run = as_it_was_at(2, whole, tmp_path / name)
        arguments = ["--data", conversations, "--init", base, "--save_dir", run, *STEPS, "--save_interval", 1, *options]
        sentence = minigpt("train", "lora", *SMALL, *arguments).sentence()
        assert said in sentence


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lora_targets", "query"), "no linear layer is named 'query'; there are q_proj"),
        (("--lora_targets", "lm_head"), "tied to model.embed_tokens.weight"),
        (("--lora_rank", 0), "`minigpt train sft` trains all weights"),
        (("--lora_rank", -1), "at least 0"),
        (("--lora_dropout", 1.5), "dropout of an adapter is 1.5"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_sentence(options, said, base, conversations, tmp_path, minigpt):
    from small_run import SMALL

    ended = minigpt("train", "lora", *SMALL, "--data", conversations, "--init", base, "--save_dir", tmp_path / "run",
                    *options)  # fmt: skip
    assert said in ended.sentence()
    assert not list((tmp_path / "run").glob("*.pth"))


def test_an_adapter_is_put_on_its_base_for_generating_and_refused_on_another_model(tuned, base, tmp_path, minigpt):
    run = tuned("run", "--export_dtype", "fp32", "--learning_rate", 2e-2)
    say = ("--prompt", "你好", "--max_new_tokens", 12, "--temperature", 0)
    with_adapter = minigpt("generate", base / "hf", "--adapter", run / "adapter", "--chat", "on", *say)
    assert with_adapter.status == 0, with_adapter.err
    assert with_adapter.out == minigpt("generate", run, "--chat", "on", *say).out
    assert with_adapter.out != minigpt("generate", base / "hf", "--chat", "on", *say).out
    refused = minigpt("generate", base / "hf", "--adapter", base, *say).sentence()
    assert "holds no adapter" in refused
