"""`inspect` shows what is trained on, in the colours of its weights, and data cannot drive the terminal through it."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from data_prep.inspect import LEGEND, coloured, inspect
from data_prep.pack import PackOptions, pack
from minigpt.dataset.chat import ANSWER, CONTEXT, TAG, ChatEncoder
from minigpt.errors import UserError

CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two", "reasoning_content": "one, one"}]


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    return path


def shown(path: Path, *, colour: bool = False, **options) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=colour, color_system="standard" if colour else None)
    inspect(path, console=console, **options)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_each_run_of_one_weight_has_its_colour(shipped_tokenizer: Path) -> None:
    encoder = ChatEncoder(shipped_tokenizer)
    ids, codes = encoder.encode(CHAT, tag_code=TAG)
    text = coloured(encoder, ids, codes)
    assert text.plain == encoder.decode(ids, skip_special_tokens=False)
    by_style = {style: "" for _, style in LEGEND.values()}
    for span in text.spans:
        by_style[str(span.style)] += text.plain[span.start : span.end]
    assert by_style[LEGEND[TAG][1]] == "<think></think><answer></answer>"
    assert by_style[LEGEND[ANSWER][1]] == "one, onetwo<|im_end|>"
    assert by_style[LEGEND[CONTEXT][1]] == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n\n"


def test_a_raw_file_is_described_with_its_counts(tmp_path: Path, shipped_tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", {"messages": CHAT}, {"wrong": 1})
    output = shown(path, stage="reason")
    ids, codes = ChatEncoder(shipped_tokenizer).encode(CHAT, tag_code=TAG)
    assert "jsonl" in output
    assert "2, of which 1 cannot be used" in output
    assert "r.jsonl:2: found the keys wrong" in output.replace("\n", "")
    assert f"record 1: {len(ids)} tokens" in output
    for code in (CONTEXT, ANSWER, TAG):
        assert f"{LEGEND[code][0]} × {codes.count(code)}" in output
    assert "\x1b[1;35m<think>" in shown(path, stage="reason", colour=True)


@pytest.mark.parametrize(
    ("record", "stage", "words"),
    [
        ({"text": "Once upon a time"}, "pretrain", ["Once upon a time<|endoftext|>"]),
        ({"conversations": CHAT}, "sft", ["<think>one, one</think><answer>two</answer><|im_end|>"]),
        ({"prompt": "Q", "chosen": "yes", "rejected": "no"}, "preference", ["record 1, chosen", "record 1, rejected"]),
        ({"messages": CHAT[:1], "answer": "2", "verifier": "math"}, "prompt", ["answer '2', verifier math"]),
    ],
)
def test_the_stage_is_guessed(record: dict, stage: str, words: list[str], tmp_path: Path) -> None:
    output = shown(write_jsonl(tmp_path / "x.jsonl", record))
    assert f"stage            {stage}" in output
    for word in words:
        assert word in output


def test_a_folder_lists_its_files(tmp_path: Path) -> None:
    folder = tmp_path / ("a long name " * 9)  # which leaves the files' own names whole
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", {"text": "first"})
    write_jsonl(folder / "b.jsonl", {"messages": CHAT})
    output = shown(folder)
    assert "2 files" in output
    assert "first<|endoftext|>" in output
    assert "b.jsonl" in output


@pytest.mark.parametrize("stage", ["pretrain", "reason", "preference", "prompt"])
def test_a_packed_dataset_shows_what_its_source_showed(stage: str, tmp_path: Path) -> None:
    records = {
        "pretrain": {"text": "Once upon a time"},
        "reason": {"messages": CHAT},
        "preference": {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        "prompt": {"messages": CHAT[:1], "answer": "2", "verifier": "math"},
    }
    source = write_jsonl(tmp_path / "x.jsonl", records[stage])
    packed = tmp_path / "packed"
    pack(PackOptions(stage=stage, input=[source], output=packed, seq_len=64, workers=1, valid_fraction=0.0))
    frames = ("│", "╰")
    lines = [line for line in shown(source, stage=stage).splitlines() if line.startswith(frames)]
    output = shown(packed)
    assert "minigpt-arrow" in output
    assert [line for line in output.splitlines() if line.startswith(frames)] == lines != []


def test_a_folder_with_a_manifest_of_somebody_else_is_one_of_raw_files(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    write_jsonl(tmp_path / "a.jsonl", {"text": "first"})
    assert "first<|endoftext|>" in shown(tmp_path)


def test_a_dataset_that_is_not_finished_is_called_so(tmp_path: Path) -> None:
    (tmp_path / ".packing").mkdir()
    with pytest.raises(UserError, match="not a finished dataset"):
        shown(tmp_path)


def test_long_records_are_cut_and_control_characters_drawn(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"text": "\x1b[31mred\x07" + "word " * 100})
    output = shown(path, max_chars=50)
    assert "\x1b" not in output
    assert "␛[31mred␇" in output
    assert "more characters" in output


def test_an_unknown_stage_and_a_missing_path_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 'dpo' is not known"):
        shown(tmp_path, stage="dpo")
    with pytest.raises(UserError, match="does not exist"):
        shown(tmp_path / "none")
