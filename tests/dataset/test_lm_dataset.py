"""The guide's datasets: shapes, masks and windows, compared with the texts that they were made from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from minigpt.dataset.lm_dataset import (
    DPODataset,
    PretrainDataset,
    PromptDataset,
    ReasonDataset,
    RLHFDataset,
    SFTDataset,
)
from minigpt.errors import UserError

CHAT = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
THOUGHT = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
]


@pytest.fixture(scope="module")
def tokenizer(shipped_tokenizer: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(shipped_tokenizer)


def write_jsonl(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    return path


def learned(tokenizer: PreTrainedTokenizerFast, y: torch.Tensor, mask: torch.Tensor) -> str:
    return tokenizer.decode(y[mask > 0])


def test_the_guides_third_check(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "test_sft.jsonl", {"conversations": CHAT})
    x, y, mask = SFTDataset(str(path), tokenizer, max_length=64)[0]
    assert x.shape == y.shape == mask.shape == (63,)
    assert (x.dtype, y.dtype, mask.dtype) == (torch.int64, torch.int64, torch.float32)
    text = "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n"
    assert tokenizer.decode(x).startswith(text)
    assert tokenizer.decode(x).removeprefix(text).replace("<|endoftext|>", "") == ""
    assert torch.equal(x[1:], y[:-1])
    assert learned(tokenizer, y, mask) == "B<|im_end|>"
    assert set(mask.tolist()) == {0.0, 1.0}


def test_tags_weigh_ten_in_the_reasoning_dataset_and_nothing_else_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", {"messages": THOUGHT}, {"messages": CHAT})
    dataset = ReasonDataset(path, tokenizer, max_length=64)
    _, y, mask = dataset[0]
    assert [tokenizer.decode([i]) for i in y[mask == 10]] == ["<think>", "</think>", "<answer>", "</answer>"]
    assert learned(tokenizer, y, mask) == "<think>one and one</think><answer>2</answer><|im_end|>"
    assert dataset[1][2].max() == 1
    assert ReasonDataset(path, tokenizer, max_length=64, tag_weight=3.0)[0][2].max() == 3
    assert SFTDataset(path, tokenizer, max_length=64)[0][2].max() == 1


def test_windows_of_text_predict_every_token_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["短。", "The miller's daughter " * 30, "", "x"]
    path = write_jsonl(tmp_path / "p.jsonl", *({"text": text} for text in texts))
    dataset = PretrainDataset(path, tokenizer, max_length=16)
    predicted: list[int] = []
    first_tokens: list[int] = []
    for x, y, mask in (dataset[i] for i in range(len(dataset))):
        assert torch.equal(x[1:], y[:-1])
        if not predicted or predicted[-1] == tokenizer.pad_token_id:
            first_tokens.append(int(x[0]))
        predicted += y[mask > 0].tolist()
    expected: list[int] = []
    for text in texts:
        expected += [*tokenizer.encode(text), tokenizer.pad_token_id][1:]
    assert predicted == expected
    assert dataset.encoder.eos_id == tokenizer.pad_token_id == 0


def test_a_padded_row_weighs_its_end_of_text_but_no_padding(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """pad == eos: padding must be masked by position, not by id, or the model never learns to stop."""
    path = write_jsonl(tmp_path / "p.jsonl", {"text": "hello"})
    _, y, mask = PretrainDataset(path, tokenizer, max_length=32)[0]
    assert learned(tokenizer, y, mask).endswith("<|endoftext|>")
    assert int(mask.sum()) == len(tokenizer.encode("hello"))


def test_a_long_conversation_is_cut_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", {"messages": CHAT}, {"messages": [*CHAT, *CHAT]})
    dataset = SFTDataset(path, tokenizer, max_length=16)
    assert dataset.truncated == 1
    assert dataset.dropped == 0
    assert len(dataset) == 2
    assert dataset[1][0].shape == (15,)
    assert torch.equal(dataset[-1][0], dataset[1][0])
    with pytest.raises(IndexError):
        dataset[2]


def test_preference_pairs_share_the_prompt_and_weigh_only_the_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = [*CHAT, {"role": "user", "content": "Again?"}]
    record = {
        side: [*prompt, {"role": "assistant", "content": text}] for side, text in (("chosen", "C"), ("rejected", "R"))
    }
    item = DPODataset(write_jsonl(tmp_path / "d.jsonl", record), tokenizer, max_length=64)[0]
    assert learned(tokenizer, item["y_chosen"], item["mask_chosen"]) == "C<|im_end|>"
    assert learned(tokenizer, item["y_rejected"], item["mask_rejected"]) == "R<|im_end|>"
    start = int(item["mask_chosen"].argmax())
    assert torch.equal(item["x_chosen"][: start + 1], item["x_rejected"][: start + 1])
    assert set(item) == {f"{name}_{side}" for name in ("x", "y", "mask") for side in ("chosen", "rejected")}


def test_prompts_end_where_the_answer_starts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    gsm8k = {"question": "How many?", "answer": "2*500=<<2*500=1000>>1,000\n#### 1,000"}
    path = write_jsonl(tmp_path / "q.jsonl", gsm8k, {"question": "long " * 100, "answer": "#### 1"})
    dataset = RLHFDataset(path, tokenizer, max_length=64, enable_thinking=True)
    assert RLHFDataset is PromptDataset
    assert (len(dataset), dataset.dropped) == (1, 1)
    item = dataset[0]
    assert item["prompt"] == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n<think>"
    assert item["prompt_ids"].tolist() == tokenizer.encode(item["prompt"])
    assert (item["answer"], item["verifier"]) == ("1000", "math")


def test_a_json_array_is_read_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert len(PretrainDataset(path, tokenizer, max_length=8)) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"bad\.jsonl is empty"),
        (b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: broken JSON"),
        (b'{"text": "a"}\n\n{"content": "b"}', r"bad\.jsonl:3: found the keys content; a pretrain record has text"),
        (b'{"text": "\xff"}', r"bad\.jsonl:1: not UTF-8"),
        (b'{"text": "a"}\n' * 49 + b'{"text": "\xff"}\n{"text": "b"}', r"bad\.jsonl:50: not UTF-8"),
        (b'{"text": "a"}\n{"text": "b\0"}', r"bad\.jsonl:2: "),
        (b'{"text": "a"}\n{"text": "b\\u0000"}', r"bad\.jsonl:2: holds a NUL"),
        (b'{"text": "a\\ud83d"}', r"bad\.jsonl:1: half a surrogate pair"),
        (b'{"text": ' + b"[" * 200_000, r"bad\.jsonl:1: broken JSON"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', r"bad\.jsonl:2: not UTF-8"),
        (b'{"text": "a"}\n{"text": ' + b"9" * 5000 + b"}", r"bad\.jsonl:2: broken JSON"),
        (b"[1]", r"bad\.jsonl:1: the record is a number"),
    ],
)
def test_unusable_files_are_named_with_the_line(
    content: bytes, words: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words):
        PretrainDataset(tmp_path / "bad.jsonl", tokenizer, max_length=16)


def test_missing_files_and_useless_lengths_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="does not exist"):
        SFTDataset(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(UserError, match="max_length 1 "):
        SFTDataset(write_jsonl(tmp_path / "s.jsonl", {"messages": CHAT}), tokenizer, max_length=1)


def test_real_conversations_have_something_to_learn(shared_data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = SFTDataset(shared_data / "sft" / "alpaca_zh_demo.json", tokenizer, max_length=256)
    records = json.loads((shared_data / "sft" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    assert len(dataset) == len(records)
    for i in range(0, len(dataset), 50):
        _, y, mask = dataset[i]
        said = learned(tokenizer, y, mask)
        assert (records[i]["output"] + "<|im_end|>").startswith(said.rstrip("�"))


def test_what_has_nothing_left_to_learn_within_the_limit_is_left_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its mean loss would be 0 / 0, and the log-probability of an answer that is not there 0, the greatest there is."""
    long = {"role": "user", "content": "word " * 60}
    short, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
    path = write_jsonl(tmp_path / "s.jsonl", {"messages": [long, answer]}, {"messages": [short, answer]})
    dataset = SFTDataset(path, tokenizer, max_length=32)
    assert (len(dataset), dataset.dropped, dataset.truncated) == (1, 1, 0)
    assert dataset[0][2].sum() > 0
    other = {"role": "assistant", "content": "No."}
    alike = [{"role": "assistant", "content": "word " * 60 + end} for end in ("a", "b")]
    pairs = [
        {"messages": [long], "chosen": [answer], "rejected": [other]},
        {"messages": [short], "chosen": [answer], "rejected": [other]},
        {"messages": [short], "chosen": [alike[0]], "rejected": [alike[1]]},
    ]
    preferences = DPODataset(write_jsonl(tmp_path / "d.jsonl", *pairs), tokenizer, max_length=32)
    assert (len(preferences), preferences.dropped) == (1, 2)
    item = preferences[0]
    assert not torch.equal(item["x_chosen"], item["x_rejected"])
