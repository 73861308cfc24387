"""Packing loses and invents nothing, its bytes depend on input and options only, and bad input leaves nothing."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

import minigpt
from data_prep.pack import PackOptions, describe, pack
from data_prep.plan import best_fit_decreasing, choose_valid, first_occurrences, pack_whole, pack_with_splits
from data_prep.spill import split_text
from data_prep.verify import verify
from minigpt.dataset.chat import ChatEncoder
from minigpt.dataset.shards import PackedDataset, collate
from minigpt.errors import UserError

SHIPPED = Path(minigpt.__file__).parent / "model"
WORDS = ("the", "a", "river", "stone", "blue", "bird", "sings", "and", "goes", "home", "again")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def sentence(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(rng.randint(2, 30))) + "。"
    return " ".join(rng.choice(WORDS) for _ in range(9)) + ". "


def texts(count: int, sentences: int, seed: int = 0) -> list[str]:
    """Documents of very different lengths, each with a number of its own."""
    rng = random.Random(seed)
    size = lambda: max(1, int(rng.expovariate(1 / sentences)))  # noqa: E731
    return [f"{seed}-{i}. " + "".join(sentence(rng) for _ in range(size())) for i in range(count)]


def write_jsonl(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def write_texts(path: Path, documents: list[str]) -> Path:
    return write_jsonl(path, [{"text": text} for text in documents])


def options(stage: str, source: Path, output: Path, **changes) -> PackOptions:
    return PackOptions(**{"stage": stage, "input": [source], "output": output, "workers": 1, "seq_len": 128, **changes})


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored_documents(folder: Path, split: str) -> list[list[int]]:
    dataset = PackedDataset(folder, split)
    rows = [dataset.row(i) for i in range(len(dataset))]
    return [part.tolist() for row in rows for part in np.split(row.input_ids, np.cumsum(row.seq_lens))[:-1]]


# --- nothing is lost or invented -------------------------------------------------------------------------------------


def test_every_token_of_pretraining_text_is_stored_once_and_rows_are_full(tmp_path):
    documents = texts(600, 4)
    source = write_texts(tmp_path / "a.jsonl", documents)
    manifest = pack(options("pretrain", source, tmp_path / "out", valid_fraction=0.05))
    encoder = ChatEncoder(SHIPPED)
    expected = [[*encoder.encode_text(text), encoder.eos_id] for text in documents]
    pieces = [piece for split in ("train", "valid") for piece in stored_documents(tmp_path / "out", split)]
    assert Counter(i for ids in expected for i in ids) == Counter(i for ids in pieces for i in ids)
    whole = Counter(tuple(ids) for ids in expected if len(ids) < 40)
    stored = Counter(tuple(ids) for ids in pieces if ids[-1] == encoder.eos_id)
    assert (whole & stored).total() >= 0.95 * whole.total()  # few short documents are cut
    for split in ("train", "valid"):
        dataset = PackedDataset(tmp_path / "out", split)
        tokens = sum(int(dataset.seq_lens(i).sum()) for i in range(len(dataset)))
        assert tokens == manifest["splits"][split]["tokens"]
        assert len(dataset) <= max(-(-tokens // 128), tokens / (128 * 0.995))
    assert manifest["splits"]["train"]["fill"] >= 0.995
    n_tokens = sum(map(len, expected))
    assert manifest["tokens"] == {"in": n_tokens, "stored": n_tokens, "truncated": 0}
    assert manifest["splits"]["valid"]["documents"] > 10


def test_long_documents_come_back_in_order(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", texts(3, 400))
    pack(options("pretrain", source, tmp_path / "out", valid_fraction=0))
    encoder = ChatEncoder(SHIPPED)
    long = [[*encoder.encode_text(text), encoder.eos_id] for text in texts(3, 400)]
    full = [piece for piece in stored_documents(tmp_path / "out", "train") if len(piece) == 128]
    for ids in long:
        for start in range(0, len(ids) - 127, 128):
            assert ids[start : start + 128] in full


def conversations(count: int, turns: int = 2, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "messages": [
                {"role": role, "content": f"{seed} {i} {t} " + sentence(rng)}
                for t in range(turns)
                for role in ("user", "assistant")
            ]
        }
        for i in range(count)
    ]


def test_conversations_are_stored_whole_and_only_answers_are_trained_on(tmp_path):
    records = conversations(200, turns=1)
    source = write_jsonl(tmp_path / "a.jsonl", records)
    manifest = pack(options("sft", source, tmp_path / "out", seq_len=256, valid_fraction=0))
    encoder = ChatEncoder(SHIPPED)
    expected = Counter(tuple(encoder.encode(record["messages"])[0]) for record in records)
    assert Counter(tuple(ids) for ids in stored_documents(tmp_path / "out", "train")) == expected
    dataset = PackedDataset(tmp_path / "out")
    trained = []
    for i in range(len(dataset)):
        batch = collate([dataset.row(i)])
        for document in range(len(dataset.seq_lens(i))):
            chosen = (batch["document_ids"][0] == document) & (batch["weights"][0] > 0)
            trained.append(encoder.decode(batch["labels"][0][chosen], skip_special_tokens=False))
    assert Counter(trained) == Counter(record["messages"][1]["content"] + "<|im_end|>" for record in records)
    assert manifest["splits"]["train"]["fill"] > 0.9


def test_reasoning_tags_carry_their_own_weight(tmp_path):
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "reasoning_content": "two and two", "content": "4"},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    pack(options("reason", source, tmp_path / "out"))
    row = PackedDataset(tmp_path / "out").row(0)
    encoder = ChatEncoder(SHIPPED)
    tagged = [encoder.decode([i]) for i, code in zip(row.input_ids, row.weight, strict=True) if code == 2]
    assert tagged == ["<think>", "</think>", "<answer>", "</answer>"]
    assert collate([row])["weights"].max() == 10.0


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_long_conversations_are_truncated_or_dropped_and_counted(tmp_path, too_long):
    short = conversations(20, turns=1)
    long = conversations(5, turns=30, seed=1)
    endless = [{"messages": [{"role": "user", "content": "word " * 500}, {"role": "assistant", "content": "no room"}]}]
    source = write_jsonl(tmp_path / "a.jsonl", short + long + endless)
    manifest = pack(options("sft", source, tmp_path / "out", seq_len=256, too_long=too_long, valid_fraction=0))
    encoder = ChatEncoder(SHIPPED)
    lengths = [len(encoder.encode(record["messages"])[0]) for record in short + long]
    stored = [min(256, n) for n in lengths] if too_long == "truncate" else lengths[:20]
    dropped = 1 if too_long == "truncate" else 6
    assert manifest["documents"] == {"in": 26, "kept": 26 - dropped, "dropped": {"over_seq_len": dropped}}
    truncated = sum(lengths) - sum(stored) if too_long == "truncate" else 0
    assert manifest["tokens"] == {"in": sum(stored) + truncated, "stored": sum(stored), "truncated": truncated}
    assert sorted(map(len, stored_documents(tmp_path / "out", "train"))) == sorted(stored)


def test_answers_that_differ_only_behind_the_cut_are_equal_answers(tmp_path):
    long = "word " * 200
    pairs = [{"prompt": f"{i}?", "chosen": f"{long} yes", "rejected": f"{long} no"} for i in range(3)]
    good = [{"prompt": f"{i}?", "chosen": f"yes {long}", "rejected": f"no {long}"} for i in range(3)]
    source = write_jsonl(tmp_path / "a.jsonl", [*pairs, *good])
    manifest = pack(options("preference", source, tmp_path / "out", valid_fraction=0.0))
    assert manifest["documents"] == {"in": 6, "kept": 3, "dropped": {"equal_answers": 3}}
    assert manifest["tokens"]["truncated"] > 0


def test_preferences_keep_prompt_and_both_answers(tmp_path):
    records = [
        {
            "messages": [{"role": "user", "content": f"Question {i}?"}],
            "chosen": [{"role": "assistant", "content": f"Good {i}"}],
            "rejected": [{"role": "assistant", "content": f"Bad {i} bad"}],
        }
        for i in range(30)
    ]
    same = {**records[0], "rejected": records[0]["chosen"]}
    source = write_jsonl(tmp_path / "a.jsonl", [*records, same])
    manifest = pack(options("preference", source, tmp_path / "out", valid_fraction=0.2))
    assert manifest["documents"]["dropped"] == {"equal_answers": 1}
    encoder = ChatEncoder(SHIPPED)
    found = []
    for split in ("train", "valid"):
        dataset = PackedDataset(tmp_path / "out", split)
        assert len(dataset) > 0
        for row in dataset:
            ids = [getattr(row, f"{name}_ids") for name in ("prompt", "chosen", "rejected")]
            trained = [row.chosen_ids[row.chosen_weight > 0], row.rejected_ids[row.rejected_weight > 0]]
            found.append([encoder.decode(each, skip_special_tokens=False) for each in (*ids, *trained)])
    question, answer = "<|im_start|>user\nQuestion {}?<|im_end|>\n", "<|im_start|>assistant\n{}\n"
    answers = [(i, f"Good {i}<|im_end|>", f"Bad {i} bad<|im_end|>") for i in range(30)]
    assert sorted(found) == sorted(
        [question.format(i), answer.format(good), answer.format(bad), good, bad] for i, good, bad in answers
    )
    assert verify(tmp_path / "out")


PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def test_pairs_of_a_template_without_control_tokens_between_turns_are_whole_conversations(tmp_path):
    """The space behind the question is a token of its own in the prompt, and a part of the next word elsewhere."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    plain = json.loads((SHIPPED / "tokenizer.json").read_text())
    end = next(token for token in plain["added_tokens"] if token["content"] == "<|endoftext|>")
    end["content"] = "</s>"
    plain["model"]["vocab"]["</s>"] = plain["model"]["vocab"].pop("<|endoftext|>", 0)
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    config = {"eos_token": "</s>", "chat_template": PLAIN_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    question = [{"role": "user", "content": "Why?"}]
    sides = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "So."), ("rejected", "No!"))}
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": question, **sides}])
    pack(options("preference", source, tmp_path / "out", tokenizer=folder, valid_fraction=0))
    (row,) = PackedDataset(tmp_path / "out", "train")
    encoder = ChatEncoder(folder)
    for side, answer in sides.items():
        ((whole, codes),) = encoder.encode_many([[*question, *answer]])
        assert [*row.prompt_ids, *getattr(row, f"{side}_ids")] == whole
        assert ([0.0] * len(row.prompt_ids) + (getattr(row, f"{side}_weight") > 0).tolist()) == [c > 0 for c in codes]


def test_prompts_keep_what_a_verifier_needs(tmp_path):
    records = [
        {
            "messages": [{"role": "user", "content": f"{i}+1=？"}],
            "answer": str(i + 1),
            "verifier": "math",
            "meta": {"operands": [i, 1]},
        }
        for i in range(20)
    ]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    pack(options("prompt", source, tmp_path / "out", valid_fraction=0))
    rows = list(PackedDataset(tmp_path / "out"))
    assert [{k: getattr(row, k) for k in ("messages", "answer", "verifier", "meta")} for row in rows] == records
    assert len({row.id for row in rows}) == 20
    encoder = ChatEncoder(SHIPPED)
    assert all(row.prompt_ids.tolist() == encoder.encode_prompt(row.messages) for row in rows)
    assert verify(tmp_path / "out")


def test_a_long_text_cut_into_parts_has_the_same_tokens():
    rng = random.Random(5)
    encoder = ChatEncoder(SHIPPED)
    alphabet = "ab cde  \n\n\r\t'st'll.,!?()—_-0123好天地，。「」éñ\u0301🙂"
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 600)))
        parts = split_text(text, 40)
        assert "".join(parts) == text
        assert [i for part in parts for i in encoder.encode_text(part)] == encoder.encode_text(text)
    assert len(split_text("word " * 1000, 40)) > 100


@pytest.mark.slow
def test_the_longest_line_that_is_accepted_needs_less_than_600_mb(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", ["".join(texts(9000, 20))[:4_600_000]])
    assert 6 << 20 < source.stat().st_size < 8 << 20
    program = """
import re, sys
from pathlib import Path
from data_prep.pack import PackOptions, pack
pack(PackOptions("pretrain", [Path(sys.argv[1])], Path(sys.argv[2]), workers=1))
# Not ru_maxrss: that also counts what the process which started this one held when it forked.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 < 600


# --- what is dropped -------------------------------------------------------------------------------------------------


def test_duplicates_are_kept_once_and_every_document_is_accounted_for(tmp_path):
    unique = texts(40, 3)
    again = [*unique[5:15], unique[3] + "  \n", unique[3]]
    write_texts(tmp_path / "in" / "a.jsonl", unique)
    write_jsonl(tmp_path / "in" / "b.jsonl", [{"text": t} for t in again] + [{"text": "   "}, {"txt": "x"}])
    manifest = pack(options("pretrain", tmp_path / "in", tmp_path / "out", on_bad_record="skip"))
    documents = manifest["documents"]
    assert documents == {"in": 54, "kept": 40, "dropped": {"bad_record": 1, "duplicate": 12, "too_few_chars": 1}}
    assert manifest["bad_records"][0].startswith("b.jsonl:14:")
    report = describe(manifest)
    for part in ("54 in = 40 kept", "12 duplicate", "1 bad record", "b.jsonl:14"):
        assert part in report


def test_near_duplicates_and_evaluation_data_are_dropped_when_asked_for(tmp_path):
    rng = random.Random(3)
    base = [" ".join(f"w{rng.randrange(5000)}" for _ in range(120)) for _ in range(30)]
    near = [text.replace(text.split()[60], "changed", 1) for text in base[:5]]
    exam = " ".join(base[20].split()[40:60])
    source = write_texts(tmp_path / "a.jsonl", base + near)
    write_jsonl(tmp_path / "exam.jsonl", [{"text": exam}, {"text": "too short"}])
    manifest = pack(options("pretrain", source, tmp_path / "out", minhash=0.8, decontaminate=[tmp_path / "exam.jsonl"]))
    dropped = {"in_evaluation_data": 1, "near_duplicate": 5}
    assert manifest["documents"] == {"in": 35, "kept": 29, "dropped": dropped}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 29
    plain = pack(options("pretrain", source, tmp_path / "plain"))
    assert plain["documents"]["dropped"] == {}


def test_evaluation_files_of_any_layout_are_read_and_what_is_too_short_is_said(tmp_path):
    rng = random.Random(4)
    base = [" ".join(f"w{rng.randrange(5000)}" for _ in range(60)) for _ in range(10)]
    question = " ".join(base[3].split()[10:30])
    source = write_texts(tmp_path / "a.jsonl", base)
    exam = write_jsonl(tmp_path / "exam.jsonl", [{"ctx": question, "endings": ["a", "b"], "meta": {"source": "c"}}])
    manifest = pack(options("pretrain", source, tmp_path / "out", decontaminate=[exam]))
    assert manifest["documents"]["dropped"] == {"in_evaluation_data": 1}
    assert manifest["evaluation_items"] == {"given": 4, "too_short": 3}
    assert "of 4 evaluation texts 3 are too short to be looked for" in describe(manifest)
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "What is Mei's pet?"}, {"text": "12 + 7 = ?"}])
    with pytest.raises(UserError, match="would find nothing: all its 2 texts are shorter than 8 words"):
        pack(options("pretrain", source, tmp_path / "none", decontaminate=[short]))


def test_filters_are_counted_by_reason(tmp_path):
    broken = "\x01\x02\x03 control " * 3
    documents = ["short", "long " * 1000, "好" * 100 + "的", broken, "Слово за словом идёт", "A good text."]
    source = write_texts(tmp_path / "a.jsonl", documents)
    filters = {"min_chars": 6, "max_chars": 4000, "max_repetition": 0.5, "max_bad_chars": 0.05}
    chosen = options("pretrain", source, tmp_path / "out", scripts=["latin", "han"], **filters)
    dropped = {"bad_characters": 1, "other_script": 1, "repetitive": 1, "too_few_chars": 1, "too_many_chars": 1}
    assert pack(chosen)["documents"] == {"in": 6, "kept": 1, "dropped": dropped}


def test_the_split_of_a_document_does_not_change_when_others_are_added(tmp_path):
    documents = texts(300, 2)
    write_texts(tmp_path / "one" / "a.jsonl", documents[:150])
    write_texts(tmp_path / "two" / "a.jsonl", documents[150:][::-1] + documents[:150])
    held_out = {}
    for name in ("one", "two"):
        pack(options("pretrain", tmp_path / name, tmp_path / f"out_{name}", valid_fraction=0.2, seq_len=4096))
        held_out[name] = {tuple(ids) for ids in stored_documents(tmp_path / f"out_{name}", "valid")}
    encoder = ChatEncoder(SHIPPED)
    first = {(*encoder.encode_text(text), encoder.eos_id) for text in documents[:150]}
    assert len(held_out["one"]) > 15
    assert held_out["one"] == held_out["two"] & first


# --- the same bytes --------------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path
from data_prep.pack import PackOptions, pack
if __name__ == "__main__":
    stage, source, output, workers = sys.argv[1:]
    def progress(what, done, total):
        print(what, done, flush=True)
    pack(PackOptions(stage, [Path(source)], Path(output), workers=int(workers), seq_len=128, shard_mb=1), progress)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Eight files, so eight chunks, and three shards."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        write_texts(folder / f"{i}.jsonl", texts(900, 7, seed=i))
    return folder


@pytest.fixture(scope="module")
def packed(corpus, tmp_path_factory) -> dict[str, str]:
    """The files that one worker writes."""
    output = tmp_path_factory.mktemp("packed") / "out"
    manifest = pack(PackOptions("pretrain", [corpus], output, workers=1, seq_len=128, shard_mb=1))
    assert len(manifest["splits"]["train"]["shards"]) >= 3
    return tree(output)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_writes_the_same_bytes(corpus, packed, tmp_path, workers):
    pack(PackOptions("pretrain", [corpus], tmp_path / "out", workers=workers, seq_len=128, shard_mb=1))
    assert tree(tmp_path / "out") == packed


def chats(stage: str, count: int, seed: int) -> list[dict]:
    """Records of a stage other than pretraining."""
    records = conversations(count, turns=1, seed=seed)
    if stage == "reason":
        for record in records:
            record["messages"][1]["reasoning_content"] = "Step by step."
    if stage in ("preference", "prompt"):
        for i, record in enumerate(records):
            answer = record["messages"].pop()
            if stage == "preference":
                record |= {"chosen": [answer], "rejected": [{"role": "assistant", "content": f"no {i}"}]}
            else:
                record |= {"answer": str(i), "verifier": "math", "meta": {"seed": seed}}
    return records


@pytest.fixture(scope="module")
def stage_corpora(tmp_path_factory) -> dict[str, tuple[Path, dict[str, str]]]:
    """Of every stage but pretraining: four files, so four chunks, and the files that one worker makes of them."""
    made = {}
    for stage in ("sft", "reason", "preference", "prompt"):
        folder = tmp_path_factory.mktemp(stage)
        for i in range(4):
            write_jsonl(folder / "in" / f"{i}.jsonl", chats(stage, 400, seed=i))
        manifest = pack(PackOptions(stage, [folder / "in"], folder / "out", workers=1, seq_len=128, shard_mb=1))
        assert all(split["shards"] for split in manifest["splits"].values())
        assert manifest["documents"]["kept"] == 1600
        made[stage] = folder / "in", tree(folder / "out")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("stage", ["sft", "reason", "preference", "prompt"])
def test_any_number_of_workers_writes_the_same_bytes_of_every_stage(stage_corpora, tmp_path, stage, workers):
    source, expected = stage_corpora[stage]
    pack(PackOptions(stage, [source], tmp_path / "out", workers=workers, seq_len=128, shard_mb=1))
    assert tree(tmp_path / "out") == expected


@pytest.mark.slow
def test_workers_do_not_import_the_program_that_packs(corpus, packed, tmp_path):
    """It may be a trainer with torch, or, as here, a script that does its work when it is imported."""
    program = (
        "import sys; from pathlib import Path; from data_prep.pack import PackOptions, pack\n"
        "print('imported')\n"
        "pack(PackOptions('pretrain', [Path(sys.argv[1])], Path('out'), workers=2, seq_len=128, shard_mb=1))\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "program.py", str(corpus)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "imported\n", "")
    assert tree(tmp_path / "out") == packed


def test_the_size_of_chunks_of_lines_does_not_show_in_the_dataset(tmp_path, monkeypatch):
    source = write_texts(tmp_path / "in.jsonl", texts(1500, 9))
    trees, chunks = [], []
    for name, chunk_bytes in (("one", 64 << 20), ("many", 64 << 10)):
        monkeypatch.setattr("data_prep.pack.CHUNK_BYTES", chunk_bytes)
        done: list[tuple[str, int, int]] = []
        pack(options("pretrain", source, tmp_path / name), lambda *what, seen=done: seen.append(what))
        trees.append(tree(tmp_path / name))
        chunks.append(sum(what == "tokenize" for what, _, _ in done))
    assert chunks[0] == 1
    assert chunks[1] > 4
    assert trees[0] == trees[1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_again_and_again_it_writes_the_same_bytes(corpus, packed, tmp_path, workers):
    moments = ("tokenize 1", "tokenize 5", "plan 0", "write shards 1", "write shards 2")
    kill_and_go_on(moments, "pretrain", corpus, packed, tmp_path, workers)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "workers"), [("sft", 2), ("preference", 1)])
def test_killed_again_and_again_it_writes_the_same_bytes_of_other_stages(stage_corpora, tmp_path, stage, workers):
    kill_and_go_on(("tokenize 2", "write shards 1"), stage, *stage_corpora[stage], tmp_path, workers)


def kill_and_go_on(
    moments: Sequence[str], stage: str, source: Path, expected: dict[str, str], tmp_path: Path, workers: int
) -> None:
    """Pack, killed at each of these moments and started again; the result is the files that are expected."""
    (tmp_path / "run.py").write_text(RUN)
    command = [sys.executable, "run.py", stage, str(source), str(tmp_path / "out"), str(workers)]
    for moment in moments:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == moment:
                os.kill(process.pid, signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(UserError, match="not a finished dataset"):
            PackedDataset(tmp_path / "out")
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert tree(tmp_path / "out") == expected


@pytest.mark.slow
def test_ray_writes_the_same_bytes(corpus, packed, tmp_path):
    (tmp_path / "run.py").write_text(RUN.replace("shard_mb=1", "shard_mb=1, ray=True"))
    command = [sys.executable, "run.py", "pretrain", str(corpus), str(tmp_path / "out"), "2"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert tree(tmp_path / "out") == packed


def test_a_finished_dataset_is_not_packed_again(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", texts(20, 3))
    first = pack(options("pretrain", source, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert pack(options("pretrain", source, tmp_path / "out", workers=2)) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    for changed in ({"seq_len": 64}, {"seed": 1}, {"min_chars": 5}):
        with pytest.raises(UserError, match="overwrite"):
            pack(options("pretrain", source, tmp_path / "out", **changed))
    write_texts(source, texts(21, 3))
    with pytest.raises(UserError, match="overwrite"):
        pack(options("pretrain", source, tmp_path / "out"))
    assert pack(options("pretrain", source, tmp_path / "out", overwrite=True))["documents"]["in"] == 21


def test_an_output_within_the_input_is_not_read_as_input(tmp_path):
    data = tmp_path / "data"
    write_texts(data / "a.jsonl", texts(50, 3))

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "write shards":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(options("pretrain", data, data / "packed"), interrupt)
    begun = (data / "packed" / ".packing" / "job.json").read_bytes()
    seen: list[bytes] = []
    job = data / "packed" / ".packing" / "job.json"
    pack(options("pretrain", data, data / "packed"), lambda *_: seen.append(job.read_bytes()))
    assert set(seen) == {begun}, "it goes on"
    pack(options("pretrain", data / "a.jsonl", tmp_path / "reference"))
    assert tree(data / "packed") == tree(tmp_path / "reference")
    pack(options("pretrain", data, data / "second", seq_len=64))
    for lost in ("manifest.json", "nothing more"):
        with pytest.raises(UserError, match="holds what is packed already, and no other data file"):
            pack(options("pretrain", data / "packed", tmp_path / "again"))
        (data / "packed" / lost).unlink(missing_ok=True)  # then `--data` calls it unfinished


def test_overwrite_never_removes_the_tokenizer_that_it_would_need(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", texts(20, 3))
    out = tmp_path / "out"
    pack(options("pretrain", source, out))
    before = tree(out)
    with pytest.raises(UserError, match="holds the tokenizer that --overwrite would remove"):
        pack(options("pretrain", source, out, seq_len=64, tokenizer=out, overwrite=True))
    assert tree(out) == before


def test_what_an_interrupted_run_with_other_options_left_is_not_used(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", texts(50, 3))
    pack(options("pretrain", source, tmp_path / "reference", seq_len=64))

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "write shards":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(options("pretrain", source, tmp_path / "out"), interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack(options("pretrain", source, tmp_path / "out", seq_len=64), interrupt)
    (tmp_path / "out" / "train" / ".shard_00000.arrow.123.tmp").write_bytes(b"killed while writing")
    pack(options("pretrain", source, tmp_path / "out", seq_len=64))
    assert tree(tmp_path / "out") == tree(tmp_path / "reference")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "content", "expected"),
    [
        ("pretrain", b'{"text": "a"}\n{"text": "b"\n', "in.jsonl:2: broken JSON"),
        ("pretrain", b'{"txt": "a"}\n', "in.jsonl:1: .*txt.*text"),
        ("pretrain", b'{"text": "a\xff"}\n', "in.jsonl:1: .*UTF-8"),
        ("pretrain", b'{"text": "a\\u0000b"}\n', "in.jsonl:1: .*NUL"),
        ("pretrain", b'{"text": "\\ud800"}\n', "in.jsonl:1: "),
        ("pretrain", b'{"text": "' + b"x " * 5_500_000 + b'"}\n', "in.jsonl:1: .*longer than"),
        ("pretrain", b"", "in.jsonl is empty"),
        ("pretrain", b'{"text": " "}\n', "No document is left"),
        ("sft", b'{"messages": [{"role": "alien", "content": "x"}]}\n', "in.jsonl:1: .*alien"),
        ("sft", b'{"messages": [{"role": "user", "content": "x"}]}\n', "in.jsonl:1: .*assistant"),
    ],
)
def test_bad_records_are_one_sentence_with_file_and_line_and_leave_nothing(tmp_path, stage, content, expected):
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        pack(options(stage, source, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["page", "text"])
def test_a_damaged_parquet_file_is_one_sentence_or_skipped_and_counted(tmp_path, damage):
    column = pa.array([b"caf\xe9" if damage == "text" and i == 7 else b"row %d" % i for i in range(40)])
    table = pa.table({"text": column.view(pa.string())})
    source = tmp_path / "in.parquet"
    pq.write_table(table, source, row_group_size=20, compression="gzip", use_dictionary=False)
    if damage == "page":
        page = pq.read_metadata(source).row_group(1).column(0)
        content = bytearray(source.read_bytes())
        content[page.data_page_offset + page.total_compressed_size // 2] ^= 0xFF
        source.write_bytes(content)
    line, kept = (21, 20) if damage == "page" else (8, 39)
    with pytest.raises(UserError, match=rf"in\.parquet:{line}: .*--on_bad_record skip") as caught:
        pack(options("pretrain", source, tmp_path / "out"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    manifest = pack(options("pretrain", source, tmp_path / "out", on_bad_record="skip"))
    assert manifest["documents"] == {"in": kept + 1, "kept": kept, "dropped": {"bad_record": 1}}
    assert f"in.parquet:{line}: " in manifest["bad_records"][0]


def test_what_was_made_is_removed_when_packing_fails_in_a_way_that_nobody_foresaw(tmp_path, monkeypatch):
    source = write_texts(tmp_path / "a.jsonl", texts(20, 3))

    def broken(*_):
        raise RuntimeError("a mistake of the program")

    monkeypatch.setattr("data_prep.pack.tokenize_chunk", broken)
    with pytest.raises(RuntimeError):
        pack(options("pretrain", source, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_run_killed_after_its_manifest_leaves_nothing_that_the_next_one_does_not_remove(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", texts(20, 3))
    manifest = pack(options("pretrain", source, tmp_path / "out"))
    finished = tree(tmp_path / "out")
    (tmp_path / "out" / ".packing" / "spill").mkdir(parents=True)
    (tmp_path / "out" / ".packing" / "spill" / "000000.ids.npy").write_bytes(b"of a run killed before it was removed")
    assert pack(options("pretrain", source, tmp_path / "out")) == manifest
    assert tree(tmp_path / "out") == finished


def test_a_byte_order_mark_is_no_text(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"text": "hello there"}\n')
    pack(options("pretrain", source, tmp_path / "out"))
    encoder = ChatEncoder(SHIPPED)
    assert stored_documents(tmp_path / "out", "train") == [[*encoder.encode_text("hello there"), encoder.eos_id]]


@pytest.mark.slow
def test_the_first_bad_record_is_reported_from_any_worker(tmp_path):
    for i in range(6):
        bad = [{"wrong": 1}] if i in (2, 4) else []
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", [{"text": text} for text in texts(20, 3, seed=i)] + bad)
    with pytest.raises(UserError, match=r"2\.jsonl:21:"):
        pack(options("pretrain", tmp_path / "in", tmp_path / "out", workers=2))
    assert not (tmp_path / "out").exists()


def test_missing_input_tokenizer_and_bad_options_are_named(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", ["text"])
    with pytest.raises(UserError, match="nowhere does not exist"):
        pack(options("pretrain", tmp_path / "nowhere", tmp_path / "out"))
    with pytest.raises(UserError, match=r"No tokenizer\.json in"):
        pack(options("pretrain", source, tmp_path / "out", tokenizer=tmp_path))
    for wrong in ({"seq_len": 1}, {"workers": 0}, {"valid_fraction": 1.0}, {"minhash": 2.0}, {"scripts": ["klingon"]}):
        with pytest.raises(UserError, match=next(iter(wrong)).rstrip("s")):
            pack(options("pretrain", source, tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_tokenizers_that_join_a_text_with_its_neighbours_are_refused_before_anything_is_packed(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", ["some text"])
    unigram = Tokenizer(Unigram([("<unk>", 0.0), ("▁some", -1.0), ("▁text", -1.0)], unk_id=0))
    unigram.pre_tokenizer = Metaspace()
    unigram.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json is Unigram and no byte-level BPE"):
        pack(options("pretrain", source, tmp_path / "out", tokenizer=tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_in_it_is_not_touched(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", texts(20, 3))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        pack(options("pretrain", source, tmp_path / "out", overwrite=True))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("manifest", ["{}", '{"formats": ["minigpt-arrow"]}', "no JSON"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_manifest_of_somebody_else_is_no_dataset_to_overwrite(manifest, begun, tmp_path):
    """Many programs call a file manifest.json, and many folders are called train."""
    source, out = write_texts(tmp_path / "a.jsonl", texts(20, 3)), tmp_path / "out"
    for name, content in (("manifest.json", manifest), ("train/photo.txt", "of the family"), ("tokenizer.json", "{}")):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    if begun:
        (out / ".packing").mkdir()
    before = tree(out)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty and not a dataset"):
            pack(options("pretrain", source, out, overwrite=overwrite))
        assert tree(out) == before


def test_overwrite_removes_what_packing_wrote_and_nothing_else(tmp_path):
    source, out = write_texts(tmp_path / "a.jsonl", texts(20, 3)), tmp_path / "out"
    pack(options("pretrain", source, out, valid_fraction=0.5))
    (out / "train" / "photo.txt").write_text("of the family")
    pack(options("pretrain", source, out, seq_len=64, valid_fraction=0, overwrite=True))
    pack(options("pretrain", source, tmp_path / "reference", seq_len=64, valid_fraction=0))
    assert (out / "train" / "photo.txt").read_text() == "of the family"
    (out / "train" / "photo.txt").unlink()
    assert tree(out) == tree(tmp_path / "reference")
    assert not (out / "valid").exists()


def test_killed_while_it_overwrites_the_next_run_goes_on(tmp_path, monkeypatch):
    source, out = write_texts(tmp_path / "a.jsonl", texts(20, 3)), tmp_path / "out"
    pack(options("pretrain", source, out, seq_len=64))

    def killed(output):
        raise KeyboardInterrupt  # no signal: a suite in the background of a shell ignores that one

    monkeypatch.setattr("data_prep.pack._clear", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(options("pretrain", source, out, overwrite=True))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack(options("pretrain", source, out, overwrite=True))
    pack(options("pretrain", source, tmp_path / "reference"))
    assert tree(out) == tree(tmp_path / "reference")


def test_a_damaged_manifest_can_be_overwritten(tmp_path):
    source, out = write_texts(tmp_path / "a.jsonl", texts(20, 3)), tmp_path / "out"
    pack(options("pretrain", source, out))
    whole, path = tree(out), out / "manifest.json"
    path.write_bytes(path.read_bytes()[:200] + b"\xff")
    with pytest.raises(UserError, match=r"manifest\.json is damaged or was edited: .* --overwrite"):
        pack(options("pretrain", source, out))
    pack(options("pretrain", source, out, overwrite=True))
    assert tree(out) == whole


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(corpus, packed, tmp_path):
    program = """
import resource, sys
from pathlib import Path
from data_prep.pack import PackOptions, pack
from minigpt.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    pack(PackOptions("pretrain", [Path(sys.argv[1])], Path(sys.argv[2]), workers=1, seq_len=128, shard_mb=1))
except UserError as error:
    assert sys.argv[4] in str(error) and "No space to write" in str(error) and "\\n" not in str(error), error
    sys.exit(1)
"""
    for limit, failing in ((1000, "tokenizer.json"), (195_000, "ids.npy"), (1_000_000, "shard_00000.arrow")):
        run = [sys.executable, "-c", program, str(corpus), str(tmp_path / "out"), str(limit), failing]
        assert subprocess.run(run).returncode == 1
        with pytest.raises(UserError, match="not a finished dataset"):
            PackedDataset(tmp_path / "out")
    pack(PackOptions("pretrain", [corpus], tmp_path / "out", workers=1, seq_len=128, shard_mb=1))
    assert tree(tmp_path / "out") == packed


# --- the plan --------------------------------------------------------------------------------------------------------


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit-decreasing as it is defined: how full the rows are (which of two equally full rows is taken is free)."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [fill for fill in fills if fill + length <= capacity]
        if fitting:
            fills.remove(max(fitting))
        fills.append(max(fitting, default=0) + length)
    return sorted(fills)


@pytest.mark.parametrize("seed", range(20))
def test_grouped_best_fit_is_best_fit_decreasing(seed):
    rng = random.Random(seed)
    capacity = rng.choice((10, 64, 500))
    lengths = [rng.randint(1, capacity) for _ in range(rng.choice((1, 30, 400)))]
    rows = best_fit_decreasing(np.array(lengths), capacity)
    assert sorted(np.bincount(rows, weights=lengths)) == slow_best_fit(lengths, capacity)


@pytest.mark.parametrize("lengths", [[300] * 5000, [513] * 3000, [1] * 999, [512], [7, 5000, 1]])
def test_rows_with_splits_are_full_and_cover_every_token_once(lengths):
    rows = pack_with_splits(np.array(lengths), 512)
    seen = [np.zeros(n, dtype=int) for n in lengths]
    for document, start, length in zip(rows.document, rows.start, rows.length, strict=True):
        assert length > 0
        seen[document][start : start + length] += 1
    assert all((counts == 1).all() for counts in seen)
    fill = np.add.reduceat(rows.length, rows.offsets[:-1])
    assert fill.max() <= 512
    assert len(rows) <= max(-(-sum(lengths) // 512), sum(lengths) / (512 * 0.995))


def test_whole_documents_are_never_cut():
    lengths = np.array([60, 60, 40, 30, 10, 100])
    rows = pack_whole(lengths, 100)
    assert len(rows) == 3
    assert sorted(rows.document.tolist()) == list(range(6))
    assert np.array_equal(rows.length, lengths[rows.document])


def test_first_occurrences_and_the_split_are_functions_of_the_digests():
    digests = np.array([[1, 2], [3, 4], [1, 2], [1, 5], [3, 4]], dtype=np.uint64)
    assert first_occurrences(digests).tolist() == [True, True, False, True, False]
    many = np.random.default_rng(0).integers(0, 2**63, (100_000, 2)).astype(np.uint64)
    valid = choose_valid(many, 0.1, seed=7)
    assert abs(valid.mean() - 0.1) < 0.005  # five standard errors
    assert np.array_equal(choose_valid(many[::-1], 0.1, seed=7), valid[::-1])
    assert abs((choose_valid(many, 0.1, seed=8) & valid).mean() - 0.01) < 0.002
    assert choose_valid(many[:2], 1e-9, seed=0).sum() == 1
    assert not choose_valid(many, 0.0, seed=0).any()
