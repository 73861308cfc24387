"""Every accepted layout becomes the canonical record, chunks lose nothing, bad input is named with file and line."""

import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.readers import (
    DOCUMENT_BYTES,
    BadRecord,
    Chunk,
    detect_format,
    list_files,
    read_chunk,
    read_records,
    read_texts,
    split_into_chunks,
    stage_of_file,
)
from minigpt.dataset.records import RecordError, canonical
from minigpt.errors import UserError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
THOUGHT = {**ANSWER, "reasoning_content": "R"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"name": "add"}]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n", encoding="utf-8")
    return path


def read_all(path: Path, stage: str, chunk_bytes: int = 4 << 20, **options: Any) -> list[tuple[int, Any]]:
    return [found for chunk in split_into_chunks(path, chunk_bytes) for found in read_chunk(chunk, stage, **options)]


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "messages"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, [USER, ANSWER]),
        ({"instruction": "Q", "output": "A"}, [USER, ANSWER]),
        ({"instruction": "Q", "input": "I", "output": "A"}, [{"role": "user", "content": "Q\nI"}, ANSWER]),
        (
            {"instruction": "Q", "output": "A", "system": "S", "history": [["Q0", "A0"]]},
            [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "Q0"},
                {"role": "assistant", "content": "A0"},
                USER,
                ANSWER,
            ],
        ),
        (
            {"instruction": "Q", "output": "I am {{name}} by {{author}}"},
            [USER, {"role": "assistant", "content": "I am MiniGPT by the MiniGPT contributors"}],
        ),
        ({"prompt": "Q", "completion": "A"}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        ({"prompt": "Q", "response": "A"}, [USER, ANSWER]),
        ({"question": "Q", "answer": "A"}, [USER, ANSWER]),
        (
            {"question": "Q", "answer": "3*4=<<3*4=12>>12 $<<1+1=2>>2\n#### 1,012"},
            [USER, {"role": "assistant", "content": "1,012", "reasoning_content": "3*4=12 $2"}],
        ),
        (
            {"nums": [26, 51, 8], "target": 33, "solution": "(51 + 8) - 26"},
            [
                {
                    "role": "user",
                    "content": "Use each of the numbers 26, 51, 8 exactly once, with + - * / and brackets, to make 33.",
                },
                {"role": "assistant", "content": "(51 + 8) - 26", "reasoning_content": "51 + 8 = 59\n59 - 26 = 33"},
            ],
        ),
        ({"messages": [USER, {**ANSWER, "content": "<think>R</think><answer>A</answer>"}]}, [USER, THOUGHT]),
        ({"messages": [USER, {**ANSWER, "content": "<think>\nR\n</think>\n\nA"}]}, [USER, THOUGHT]),
        (
            {"messages": [USER, {**ANSWER, "content": "<think>\n\n</think>\n\nA"}]},
            [USER, THOUGHT | {"reasoning_content": ""}],
        ),
        ({"instruction": "Q", "output": "<think>R</think><answer>A</answer>"}, [USER, THOUGHT]),
        ({"question": "Q", "rationale": " R\n", "answer": "A"}, [USER, THOUGHT]),
        ({"messages": [USER, {**ANSWER, "reasoning": "R"}]}, [USER, THOUGHT]),
        ({"messages": [USER, THOUGHT | {"weight": 0}]}, [USER, THOUGHT | {"weight": 0}]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER]}, [USER, ANSWER]),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]},
            [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"from": "observation", "value": "2"},
                ]
            },
            [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}],
        ),
    ],
)
def test_chat_layouts(raw: dict, messages: list[dict]) -> None:
    assert canonical(raw, "sft") == canonical(raw, "reason") == {"messages": messages}


STEPS_ZH = "每天三个，三天九个。"


@pytest.mark.parametrize(
    ("text", "steps", "answer"),
    [
        ("A is taller. Therefore, the final answer is yes.", "A is taller.", "yes"),
        ("560 * 2 = 1120 The final answer: (C).", "560 * 2 = 1120", "(C)"),
        ("12 x 62 So the answer is: 7 days", "12 x 62", "7 days"),
        ("He died in 1799. Final answer: no.", "He died in 1799.", "no"),
        (f"{STEPS_ZH}所以，答案是9。", STEPS_ZH, "9"),
        (f"{STEPS_ZH}\n最终答案：9", STEPS_ZH, "9"),
        ("The answer is 4 at first. But the answer is 5.", "The answer is 4 at first. But", "5"),
    ],
)
def test_for_reasoning_the_end_of_a_rationale_is_its_answer(text: str, steps: str, answer: str) -> None:
    raw = {"instruction": "Q", "output": text}
    thought = {"role": "assistant", "content": answer, "reasoning_content": steps}
    assert canonical(raw, "reason") == {"messages": [USER, thought]}
    assert canonical(raw, "sft") == {"messages": [USER, {"role": "assistant", "content": text}]}


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 5.",  # nothing leads to it
        "Long. The answer is " + "word " * 30,  # prose
        "Steps. The answer is\nin two lines\nhere.",
        "Steps, but the answer is",
        "Steps whose answer is missing.",
    ],
)
def test_an_answer_without_such_an_end_stays_as_it_is(text: str) -> None:
    message = {"role": "assistant", "content": text}
    assert canonical({"instruction": "Q", "output": text}, "reason") == {"messages": [USER, message]}


def test_a_thought_that_is_given_is_not_cut_again() -> None:
    message = {"role": "assistant", "content": "Well. So the answer is 5.", "reasoning_content": "R"}
    assert canonical({"messages": [USER, message]}, "reason") == {"messages": [USER, message]}


def test_minimind_chat_files_load_unchanged() -> None:
    """Its loader fills absent fields with "" or None and keeps tools and calls as JSON text in the messages."""
    raw = {
        "conversations": [
            {"role": "system", "content": "S", "tools": json.dumps(TOOLS), "reasoning_content": None, "tool_calls": ""},
            {"role": "user", "content": "Q", "reasoning_content": "", "tools": "", "tool_calls": ""},
            {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL["function"]])},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "A", "reasoning_content": "R", "tools": "", "tool_calls": ""},
        ]
    }
    assert canonical(raw, "sft") == {
        "messages": [
            {"role": "system", "content": "S"},
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            THOUGHT,
        ],
        "tools": TOOLS,
    }


@pytest.mark.parametrize(
    "raw",
    [
        {"chosen": [USER, ANSWER], "rejected": [USER, THOUGHT]},
        {"prompt": "Q", "chosen": "A", "rejected": "<think>R</think>A"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [THOUGHT]},
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "A"},
            "rejected": THOUGHT,
        },
        {"instruction": "Q", "chosen": "A", "rejected": "<think>R</think><answer>A</answer>"},
        {"question": "Q", "chosen": "A", "rejected": [THOUGHT]},
    ],
)
def test_preference_layouts(raw: dict) -> None:
    assert canonical(raw, "preference") == {"messages": [USER], "chosen": [ANSWER], "rejected": [THOUGHT]}


def test_equal_answers_and_answers_that_share_a_turn_still_have_a_prompt() -> None:
    same = canonical({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "preference")
    assert same == {"messages": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}
    long = canonical({"chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, THOUGHT]}, "preference")
    assert long == {"messages": [USER, ANSWER, USER], "chosen": [ANSWER], "rejected": [THOUGHT]}


@pytest.mark.parametrize(
    ("raw", "record"),
    [
        ({"question": "Q", "answer": "x\n#### 1,234"}, {"answer": "1234", "verifier": "math", "meta": {}}),
        ({"prompt": "Q", "answer": "yes"}, {"answer": "yes", "verifier": "exact", "meta": {}}),
        ({"messages": [USER], "answer": 7, "verifier": "math"}, {"answer": "7", "verifier": "math", "meta": {}}),
        ({"prompt": "Q", "answer": 0.00001, "verifier": "math"}, {"answer": "0.00001", "verifier": "math", "meta": {}}),
        ({"messages": [USER], "meta": {"n": 1}}, {"answer": "", "verifier": "none", "meta": {"n": 1}}),
        ({"conversations": [USER, ANSWER]}, {"answer": "A", "verifier": "none", "meta": {}}),
        ({"messages": [USER], "answer": None, "meta": None}, {"answer": "", "verifier": "none", "meta": {}}),
    ],
)
def test_prompt_layouts(raw: dict, record: dict) -> None:
    assert canonical(raw, "prompt") == {"messages": [USER], **record}


def test_countdown_as_a_prompt_carries_what_its_verifier_needs() -> None:
    record = canonical({"nums": [1, 2], "target": 3, "solution": "1 + 2"}, "prompt")
    assert (record["verifier"], record["answer"]) == ("countdown", "1 + 2")
    assert record["meta"] == {"nums": [1, 2], "target": 3}


@pytest.mark.parametrize(
    ("stage", "raw", "words"),
    [
        ("pretrain", {"content": "x", "id": 1}, r"found the keys content, id; a pretrain record has text"),
        ("pretrain", {"text": 5}, "text is a number, not text"),
        ("pretrain", [1], "the record is a list"),
        (
            "prompt",
            {"prompt": "Q", "answer": "twelve", "verifier": "math"},
            "compares numbers and the answer is 'twelve'",
        ),
        ("prompt", {"prompt": "Make 14.", "verifier": "countdown"}, "nums is not a list of whole numbers"),
        (
            "prompt",
            {"prompt": "Q", "verifier": "countdown", "meta": {"nums": ["3"], "target": 3}},
            "nums is not a list",
        ),
        ("sft", {"text": "x"}, r"found the keys text; a sft record has messages \| conversations"),
        ("sft", {"messages": []}, "at least one message"),
        ("sft", {"messages": "oops"}, "messages is text that is not JSON"),
        ("sft", {"messages": [USER]}, "nothing to learn"),
        ("sft", {"instruction": "Q", "output": ""}, "nothing to learn"),
        ("sft", {"messages": [{"speaker": "me", "content": "x"}]}, r"role None \(its keys: speaker, content\)"),
        ("sft", {"messages": ["hi"]}, "a message is text"),
        ("sft", {"messages": [USER, ANSWER | {"content": 4}]}, "content of a assistant message is a number"),
        ("sft", {"messages": [USER, ANSWER | {"weight": 0.5}]}, "weight 0.5"),
        ("sft", {"conversations": [{"from": "function_call", "value": "{"}]}, "function_call is text that is not JSON"),
        ("sft", {"messages": [USER, ANSWER], "tools": {"a": 1}}, "tools is an object, not a list"),
        ("sft", {"nums": [1], "target": 2, "solution": "__import__('os')"}, "cannot be worked out"),
        ("sft", {"nums": [1], "target": 2, "solution": "1/0"}, "cannot be worked out"),
        ("sft", {"instruction": "Q", "output": "A", "history": ["x"]}, "history"),
        ("preference", {"chosen": [ANSWER], "rejected": [THOUGHT]}, "no prompt in common"),
        ("preference", {"prompt": "Q", "chosen": "", "rejected": "A"}, "chosen holds no assistant answer"),
        ("preference", {"prompt": "Q", "chosen": "A"}, "found the keys prompt, chosen"),
        ("prompt", {"messages": [USER], "verifier": "vibes"}, "'vibes'"),
        ("prompt", {"messages": [USER], "answer": [1]}, "answer is a list"),
        ("prompt", {"text": "x"}, "found the keys text"),
        ("prompt", {"nums": ["1"], "target": 2}, "whole numbers"),
    ],
)
def test_records_that_cannot_be_understood_say_why(stage: str, raw: Any, words: str) -> None:
    with pytest.raises(RecordError, match=words):
        canonical(raw, stage)


# --- files and chunks ------------------------------------------------------------------------------------------------


def test_folders_are_walked_sorted_without_repeats_hidden_files_and_descriptions(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a/b.md", ".hidden/x.txt", "_cache.txt", "README.md", "LICENSE.txt", "pic.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = list_files([tmp_path, tmp_path / "b.txt", tmp_path / "README.md"])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["a/b.md", "a/z.jsonl", "b.txt", "README.md"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b'{"text": 1}', "text"),
        ("a.md", b"[link](x)", "text"),
        ("a.jsonl", b"{}", "jsonl"),
        ("a.json", b' \n[{"text": 1}]', "json"),
        ("a.json", b'\xef\xbb\xbf[{"text": 1}]', "json"),
        ("a.json", b'{"text": 1}\n{"text": 2}', "jsonl"),
        ("noname", b'{"text": 1}', "jsonl"),
        ("noname", b"Once upon", "text"),
        ("noname", b"PAR1....", "parquet"),
    ],
)
def test_formats_are_detected(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert detect_format(tmp_path / name) == expected


@pytest.mark.parametrize("chunk_bytes", [1, 50, 1000, 4 << 20])
@pytest.mark.parametrize("kind", ["jsonl", "json", "compact json", "parquet"])
def test_any_chunk_size_gives_the_same_numbered_records(kind: str, chunk_bytes: int, tmp_path: Path) -> None:
    rng = random.Random(7)
    odd = ['"', "\\", "]", "[", "}", "{", ",", "\n", "你好", "\\u005d", "a"]
    records = [{"text": "".join(rng.choices(odd, k=rng.randint(1, 30)))} for _ in range(200)]
    path = tmp_path / f"data.{kind.split()[-1]}"
    if kind == "jsonl":
        write_jsonl(path, records)
    elif kind == "json":
        path.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    elif kind == "compact json":
        path.write_text(json.dumps(records, ensure_ascii=True), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=37)
    assert read_all(path, "pretrain", chunk_bytes) == list(enumerate(records, start=1))


def test_parquet_conversations_lose_the_nulls_that_columns_force_on_them(tmp_path: Path) -> None:
    rows = [
        {"messages": [USER, THOUGHT], "tools": "[]"},
        {"messages": [USER, ANSWER]},
        {"prompt": "Q", "response": "A"},
    ]
    schema = pa.Table.from_pylist(rows[:1]).schema.append(pa.field("prompt", pa.string()))
    table = pa.Table.from_pylist(rows, schema=schema.append(pa.field("response", pa.string())))
    pq.write_table(table, tmp_path / "c.parquet")
    found = [record for _, record in read_all(tmp_path / "c.parquet", "sft")]
    assert found == [{"messages": [USER, THOUGHT]}, {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}]


def test_what_is_nested_too_deeply_is_one_bad_record(tmp_path: Path) -> None:
    deep = {"role": "assistant", "content": "", "tool_calls": "[" * 100_000}
    inside = {"messages": [USER, ANSWER], "meta": json.loads("[" * 900 + "]" * 900)}
    lines = [{"messages": [USER, deep]}, {"messages": [USER, ANSWER]}, {"answer": "1", "prompt": "Q", **inside}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [record for _, record in read_all(tmp_path / "a.jsonl", "sft")]
    assert isinstance(found[0], BadRecord)
    assert "nested too deeply" in str(found[0])
    assert found[1] == {"messages": [USER, ANSWER]}


@pytest.mark.parametrize("separator", ["\n\n", "\n", "\r\n\r\n", "。"])
@pytest.mark.parametrize("chunk_bytes", [40_000, 4 << 20])
def test_long_text_becomes_documents_that_add_up_to_it(separator: str, chunk_bytes: int, tmp_path: Path) -> None:
    paragraphs = [f"第{i}段：" + "磨坊主的女儿在河边走。" * (i % 7 + 1) for i in range(1500)]
    text = separator.join(paragraphs)
    (tmp_path / "novel.txt").write_bytes(text.encode())
    found = read_all(tmp_path / "novel.txt", "pretrain", chunk_bytes)
    documents = [record["text"] for _, record in found]
    plain = text.replace("\r\n", "\n")
    assert "".join(documents).replace("\n", "") == plain.replace("\n", "")
    assert all(DOCUMENT_BYTES // 2 <= len(d.encode()) <= 4.1 * DOCUMENT_BYTES for d in documents[:-1])
    if "\n" in separator:
        for (line, _), document in zip(found, documents, strict=True):
            assert document.startswith("第")
            assert document.split("\n") == plain.split("\n")[line - 1 :][: document.count("\n") + 1]


def test_chunks_depend_on_the_file_only_and_cover_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x" * (i % 100)} for i in range(1000)])
    chunks = split_into_chunks(path, 5000)
    assert len(chunks) > 5
    assert chunks == split_into_chunks(path, 5000)
    assert [c.start for c in chunks[1:]] == [c.end for c in chunks[:-1]]
    assert (chunks[0].start, chunks[-1].end) == (0, path.stat().st_size)
    assert isinstance(chunks[0], Chunk)


def test_stages_are_guessed_and_texts_are_found_in_any_format(tmp_path: Path) -> None:
    files = {
        "p.jsonl": ([{"text": "T"}], "pretrain", ["T"]),
        "s.jsonl": ([{"messages": [USER, THOUGHT]}], "sft", ["Q\nR\nA"]),
        "d.jsonl": ([{"chosen": [USER, ANSWER], "rejected": [USER, THOUGHT]}], "preference", ["Q\nA\nR\nA"]),
        "r.jsonl": ([{"messages": [USER], "answer": "A", "verifier": "exact"}], "prompt", ["Q"]),
    }
    for name, (records, stage, texts) in files.items():
        path = write_jsonl(tmp_path / name, records)
        assert stage_of_file(path) == stage
        assert list(read_texts([path])) == texts
    (tmp_path / "t.md").write_text("# T")
    assert stage_of_file(tmp_path / "t.md") == "pretrain"


# --- bad input -------------------------------------------------------------------------------------------------------


def test_missing_and_empty_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path, words in (
        ("none.jsonl", "does not exist"),
        ("empty.jsonl", "is empty"),
        ("folder", "holds no data file"),
    ):
        with pytest.raises(UserError, match=f"{path} {words}"):
            list_files([tmp_path / path])
    with pytest.raises(UserError, match="--input"):
        list_files([])


GOOD = b'{"text": "good"}'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "x"', "broken JSON at column 13"),
        (b'{"text": "x"}}', "broken JSON at column 14: Extra data"),
        (b'{"content": "x"}', "found the keys content; a pretrain record has text"),
        (b'{"text": "\xff\xfe"}', "not UTF-8: the byte 0xff"),
        (b'{"text": "a\x00b"}', "NUL"),
        (b'{"text": "a\\u0000b"}', "NUL"),
        (b'{"text": "\\ud83d"}', "half a surrogate pair"),
        (b"[" * 200_000, "broken JSON"),
        (b'{"text": "' + b"x" * (10 << 20) + b'"}', "the line is longer than 8 MB"),
        (b'"text"', "the record is text, not an object"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [16, 4 << 20])
def test_a_bad_line_is_named_and_its_neighbours_are_read(
    line: bytes, words: str, chunk_bytes: int, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD)
    found = read_all(path, "pretrain", chunk_bytes)
    assert [number for number, _ in found] == [1, 3, 4]
    assert found[0][1] == found[2][1] == {"text": "good"}
    bad = found[1][1]
    assert isinstance(bad, BadRecord)
    assert words in bad.reason
    assert str(bad).startswith(f"{path}:3: ")
    with pytest.raises(UserError, match=r"bad\.jsonl:3: "):
        list(read_records([path], "pretrain"))


@pytest.mark.parametrize(
    ("content", "words", "good"),
    [
        (b'[{"text": "a"},\n{"text": \n{"text": "c"}]', "broken JSON in line 3", 1),
        (b'[{"text": "a"},\n{"text": "b"}', "broken JSON in line 2", 1),
        (b'[{"text": "a"}\n{"text": "b"}]', "broken JSON in line 2", 0),
        (b'[{"text": "a"}, {"text": "\xff"}, {"text": "c"}]', "not UTF-8: the byte 0xff", 2),
        (b'[{"text": "a"}, {"text": "a\x00"}]', "NUL", 1),
        (b'[{"text": "a"}] x', "after the end of the array", 1),
        (b'[{"text": "a"}, {"text": "' + b"x" * (9 << 20) + b'"}, {"text": "c"}]', "the record is longer than 8 MB", 2),
    ],
)
def test_a_bad_json_array_says_where(content: bytes, words: str, good: int, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    found = [record for _, record in read_all(tmp_path / "bad.json", "pretrain")]
    bad = [record for record in found if isinstance(record, BadRecord)]
    assert len(bad) == 1
    assert words in bad[0].reason
    assert len(found) - 1 == good


def test_one_missing_quotation_mark_in_a_large_json_array_is_found_without_reading_all_of_it(tmp_path: Path) -> None:
    """After it nothing looks like the end of a record, so the rest of the file would be one piece."""
    path = tmp_path / "bad.json"
    record = json.dumps({"text": "x" * 1000}).encode()
    broken = b'{"text: "a"}'
    with path.open("wb") as file:
        file.write(b"[" + record + b",\n" + broken)
        for _ in range(60):
            file.write((b",\n" + record) * 1000)
        file.write(b"]")
    tracemalloc.start()
    found = read_all(path, "pretrain")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [number for number, _ in found] == [1, 2]
    assert str(found[1][1]).startswith(f"{path}:2: broken JSON in line 2: Expecting ':' delimiter")
    assert peak < path.stat().st_size


def test_bad_bytes_in_plain_text_name_the_line_and_spoil_one_document(tmp_path: Path) -> None:
    paragraph = ("a quiet day by the river " * 40 + "\n\n").encode()
    path = tmp_path / "book.txt"
    for bad, words in ((b"\xff", "not UTF-8"), (b"\0", "NUL")):
        path.write_bytes(paragraph * 40 + b"here: " + bad + b"\n\n" + paragraph * 40)
        found = [record for _, record in read_all(path, "pretrain")]
        problems = [record for record in found if isinstance(record, BadRecord)]
        assert len(problems) == 1
        assert words in problems[0].reason
        assert problems[0].line == 81
        assert len(found) > 3


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", b"hi"), ("a.jsonl", b'{"text": "hi"}'), ("a.json", b'[{"text": "hi"}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert read_all(tmp_path / name, "pretrain") == [(1, {"text": "hi"})]
    (tmp_path / "wide.txt").write_bytes("hi".encode("utf-16"))
    with pytest.raises(UserError, match=r"wide\.txt is UTF-16"):
        split_into_chunks(tmp_path / "wide.txt")


def test_a_damaged_parquet_file_and_text_for_a_chat_stage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"bad\.parquet is not a readable Parquet file"):
        split_into_chunks(tmp_path / "bad.parquet")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"a\.txt is plain text, which the sft stage cannot use"):
        read_all(tmp_path / "a.txt", "sft")


def damaged_parquet(path: Path, damage: str) -> Path:
    """600 rows in two groups: `page` spoils the compressed page of the second, `text` the 300th row's bytes."""
    texts = [f"row {i + 1}".encode() for i in range(600)]
    if damage == "text":
        texts[299] = b"caf\xe9"
    column = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path, row_group_size=300, compression="gzip", use_dictionary=False)
    if damage == "page":
        metadata = pq.read_metadata(path).row_group(1).column(0)
        content = bytearray(path.read_bytes())
        content[metadata.data_page_offset + metadata.total_compressed_size // 2] ^= 0xFF
        path.write_bytes(content)
    return path


def test_a_damaged_page_of_a_parquet_file_costs_the_rest_of_its_row_group(tmp_path: Path) -> None:
    path = damaged_parquet(tmp_path / "bad.parquet", "page")
    found = read_all(path, "pretrain")
    assert [number for number, _ in found] == [*range(1, 301), 301]
    assert found[299][1] == {"text": "row 300"}
    bad = found[300][1]
    assert str(bad).startswith(f"{path}:301: the Parquet file is damaged from this row on (")
    assert str(bad).endswith("): write it again")


def test_a_parquet_row_that_is_not_utf8_is_named_and_its_neighbours_are_read(tmp_path: Path) -> None:
    path = damaged_parquet(tmp_path / "bad.parquet", "text")
    found = read_all(path, "pretrain")
    assert [number for number, _ in found] == list(range(1, 601))
    assert str(found[299][1]) == f"{path}:300: not UTF-8: the byte 0xe9; save the file as UTF-8"
    assert [record for _, record in found[298:301:2]] == [{"text": "row 299"}, {"text": "row 301"}]


def test_all_real_data_sets_are_read_without_a_bad_record(shared_data: Path) -> None:
    expected = {
        "pretrain_en": ("pretrain", None),
        "sft": ("sft", 999 + 1000 + 91 + 300),
        "preference": ("preference", 600),
        "reasoning": ("reason", 2061 + 2728),
        "gsm8k": ("prompt", 7473 + 1319),
        "countdown": ("prompt", 11_000),
    }
    for folder, (stage, count) in expected.items():
        records = list(read_records([shared_data / folder], stage))
        assert count is None or len(records) == count


def test_in_real_reasoning_sets_the_steps_become_the_thought(shared_data: Path) -> None:
    answers = {"strategyqa_train": r"yes|no", "aqua_train": r"\([A-E]\)"}
    for name, pattern in answers.items():
        records = list(read_records([shared_data / "reasoning" / f"{name}.json"], "reason"))
        replies = [record["messages"][-1] for record in records]
        assert all(reply.get("reasoning_content") for reply in replies)
        assert all(re.fullmatch(pattern, reply["content"]) for reply in replies), name
    for path, digits in (("gsm8k/test.jsonl", r"-?[\d,.]+"), ("countdown/test.jsonl", r"[\d+*/() -]+")):
        replies = [record["messages"][-1] for record in read_records([shared_data / path], "reason")]
        assert all(reply["reasoning_content"] and "<<" not in reply["reasoning_content"] for reply in replies)
        assert all(re.fullmatch(digits, reply["content"]) for reply in replies), path
