"""The reasoning stage: what the tags weigh, what the weighted mean is divided by, and that no packing is in the way."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_run import metrics, weights

from data_prep.pack import PackOptions, pack
from minigpt.dataset.lm_dataset import ReasonDataset
from minigpt.dataset.shards import PackedDataset
from minigpt.model.model_minigpt import MiniGPT
from minigpt.trainer.train_reason import with_tag_weight

TOKENIZER = Path(__file__).parents[2] / "minigpt" / "model"


def thought(question: str, steps: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}]
    return {"messages": [*turns, {"role": "assistant", "content": answer, "reasoning_content": steps}]}


RECORDS = [
    *(
        thought(f"{a} + {b} = ?", f"{a}+{b}={a + b}. Result: {a + b}.", str(a + b))
        for a, b in ((7, 9), (3, 4), (60, 5))
    ),
    thought("6 + 6 = ?", "", "12"),  # thinking is off: <think></think> belongs to the prompt
    {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("reason") / "reason.jsonl"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def packed_reason(source) -> Path:
    folder = source.parent / "packed"
    pack(PackOptions(stage="reason", input=[source], output=folder, seq_len=64, workers=1, valid_fraction=0.0))
    return folder


def loss_by_hand(run: Path, source: Path, tag_weight: float) -> float:
    """Σ w · −ln p / Σ w in float64 over the whole file, a conversation at a time; nothing of the trainer is used."""
    from transformers import PreTrainedTokenizerFast

    model = MiniGPT.from_pretrained(run / "hf").double()
    model.load_state_dict(weights(run))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(TOKENIZER))
    rows = ReasonDataset(source, tokenizer, max_length=64, tag_weight=tag_weight)
    above = below = 0.0
    for x, y, mask in rows:
        with torch.no_grad():
            log_probs = F.log_softmax(model(x[None]).logits[0], dim=-1)
        above -= (log_probs.gather(1, y[:, None])[:, 0] * mask.double()).sum().item()
        below += mask.double().sum().item()
    return above / below


def test_the_loss_is_divided_by_the_sum_of_the_weights_of_the_whole_batch(
    source, packed_reason, packed, tmp_path, train
):
    """The batch is the whole file, in one pass and a row a pass: the mean of the passes' means would be another."""
    base = tmp_path / "base"
    train("pretrain", "--data", packed, "--save_dir", base, "--max_steps", 1)
    rows = len(PackedDataset(packed_reason))
    assert rows > 2
    by_hand = {weight: loss_by_hand(base, source, weight) for weight in (10.0, 1.0, 2.5)}
    assert len({round(loss, 4) for loss in by_hand.values()}) == 3, "the weights make a difference"
    for number, (tag_weight, micro_batch) in enumerate([(None, 1), (None, rows), (1.0, rows), (2.5, 1)]):
        folder = tmp_path / f"reason{number}"
        options = ["--global_batch_size", rows, "--micro_batch_size", micro_batch, "--max_steps", 1]
        options += [] if tag_weight is None else ["--tag_weight", tag_weight]
        train("reason", "--data", packed_reason, "--init", base, "--save_dir", folder, *options)
        (first,) = [record for record in metrics(folder) if record["kind"] == "train"]
        assert first["loss"] == pytest.approx(by_hand[tag_weight or 10.0], rel=1e-6)


def test_extra_weights_steer_training_and_not_judgement(source, packed, tmp_path, train):
    train("pretrain", "--data", packed, "--save_dir", tmp_path / "base", "--max_steps", 1)
    data = tmp_path / "data"
    pack(PackOptions(stage="reason", input=[source], output=data, seq_len=64, workers=1, valid_fraction=0.5))
    assert len(PackedDataset(data, "valid")) > 0
    judged, trained = set(), set()
    for weight in (1, 10):
        options = ("--tag_weight", weight, "--learning_rate", 0, "--max_steps", 1, "--global_batch_size", 1)
        train("reason", "--data", data, "--init", tmp_path / "base", "--save_dir", tmp_path / f"by {weight}", *options)
        first, valid = metrics(tmp_path / f"by {weight}")
        trained.add(first["loss"])
        judged.add(valid["valid_loss"])
    assert len(trained) == 2
    assert len(judged) == 1


def test_the_tag_weight_is_changed_without_packing_again(packed_reason):
    rows = PackedDataset(packed_reason)
    heavier = with_tag_weight(rows, 30.0)
    assert with_tag_weight(rows, None) is rows
    assert rows.weight_table.tolist() == [0.0, 1.0, 10.0]
    assert heavier.weight_table.tolist() == [0.0, 1.0, 30.0]
    assert heavier.fingerprint == rows.fingerprint
    assert len(heavier) == len(rows)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_tag_weight_that_is_no_weight_is_refused(weight, tmp_path, minigpt):
    sentence = minigpt("train", "reason", "--save_dir", tmp_path / "run", "--tag_weight", weight).sentence()
    assert "--tag_weight is" in sentence
    assert "it must be a number" in sentence
    assert not (tmp_path / "run").exists()


def test_it_follows_the_newest_sft_run_and_needs_one(packed, packed_reason, conversations, tmp_path, train, minigpt):
    alone = minigpt("train", "reason", "--data", packed_reason, "--save_dir", tmp_path / "reason").sentence()
    assert "no finished sft or pretrain run beside" in alone
    train("pretrain", "--data", packed, "--save_dir", tmp_path / "base", "--max_steps", 1)
    train("sft", "--data", conversations, "--save_dir", tmp_path / "tuned", "--max_steps", 1)
    printed = train("reason", "--data", packed_reason, "--save_dir", tmp_path / "reason", "--max_steps", 1)
    assert f"the newest sft run, {tmp_path / 'tuned'}" in printed
    assert [file.name for file in (tmp_path / "reason").glob("*.pth")] == ["reason_32.pth"]
    assert json.loads((tmp_path / "reason" / "summary.json").read_text())["stage"] == "reason"


def test_an_adapter_learns_to_reason_while_the_model_stays_as_it_is(packed_reason, packed, tmp_path, train):
    base, run = tmp_path / "base", tmp_path / "reason"
    train("pretrain", "--data", packed, "--save_dir", base, "--max_steps", 1)
    train("reason", "--data", packed_reason, "--init", base, "--save_dir", run, "--lora_rank", 4, "--max_steps", 2)
    (adapter,) = (run / "adapter").glob("*.safetensors")
    assert adapter.stat().st_size < (base / "hf" / "model.safetensors").stat().st_size / 2
    before, after = weights(base), torch.load(run / "reason_32.pth", weights_only=True)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}, "merged at the end, nothing else"
