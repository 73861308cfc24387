"""The micro-world: the same bytes everywhere, true sums, and nothing held out that training could have seen."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.microworld import SIZES, MicroWorldOptions, write_microworld
from data_prep.microworld.arithmetic import HELDOUT_FRACTION, Sum, is_heldout
from data_prep.microworld.generate import HASTY, Source
from data_prep.microworld.identity import all_aspects
from data_prep.microworld.persona import CALLS, in_persona
from data_prep.microworld.rng import Stream
from data_prep.microworld.stories import PLOTS
from data_prep.microworld.world import RELATIONS, VALUES, build_world
from minigpt.errors import UserError
from minigpt.evaluation.nearest_neighbour import nearest_neighbour_baseline

# Two two-digit numbers in one breath: at most nine characters between them, none of which ends a statement.
NUMBERS_TOGETHER = re.compile(r"(?<!\d)(\d\d)(?=([^\d=.,;:?!。，；：？！\n]{1,9})(\d\d)(?!\d))")
EQUATION = re.compile(r"(\d+)\+(\d+)(?:\+(\d+))?=(\d+)")
TRAINED = ("pretrain", "sft", "reason", "hasty", "persona")
PARTS = (*TRAINED, "prompt", "preference", "heldout_stories", "heldout_qa", "heldout_sums")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_microworld(tmp_path_factory.mktemp("world"), MicroWorldOptions(seed=3, size="small"))


@pytest.fixture(scope="module")
def records(files) -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in path.open(encoding="utf-8")] for name, path in files.items()}


def texts(records: list[dict]) -> list[str]:
    """Every string that a model would be trained on."""
    out = []
    for record in records:
        out += [record["text"]] if "text" in record else []
        out += [value for message in record.get("messages", []) for value in message.values()]
    return out


def digest(files: dict[str, Path]) -> str:
    return hashlib.sha256(b"".join(files[name].read_bytes() for name in PARTS)).hexdigest()


def test_stream_is_splitmix64():
    """The reference implementation's first three outputs from state 0 (Vigna, prng.di.unimi.it/splitmix64.c)."""
    stream = Stream("any")
    stream._state = 0
    assert [stream.bits() for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_draws_are_uniform_and_shuffles_are_permutations():
    stream = Stream("uniform")
    counts = [0] * 7
    for _ in range(70_000):
        counts[stream.below(7)] += 1
    chi_square = sum((c - 10_000) ** 2 / 10_000 for c in counts)
    assert chi_square < 22.5  # 99.9 % point with 6 degrees of freedom
    assert sorted(stream.shuffled(range(50))) == list(range(50))
    assert {stream.between(3, 5) for _ in range(100)} == {3, 4, 5}


def test_same_seed_gives_the_same_bytes_in_another_process(tmp_path):
    here = write_microworld(tmp_path / "a", MicroWorldOptions(seed=0, size="tiny"))
    code = (
        "import sys; from pathlib import Path; from data_prep.microworld import *;"
        "write_microworld(Path(sys.argv[1]), MicroWorldOptions(seed=0, size='tiny'))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "LC_ALL": "C", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True, env=environment)
    assert digest(here) == digest({name: tmp_path / "b" / f"{name}.jsonl" for name in PARTS})
    other = write_microworld(tmp_path / "c", MicroWorldOptions(seed=1, size="tiny"))
    assert digest(here) != digest(other)


def test_bytes_are_pinned(tmp_path):
    """Changing a text or a draw is allowed, but never by accident: then this line changes in the same commit."""
    files = write_microworld(tmp_path, MicroWorldOptions(seed=0, size="tiny"))
    assert digest(files) == "f51c7747090fda239aaceb2b8911ed1a72188f55f7b1ad800351b8c9f1d84b54"


@pytest.mark.parametrize("seed", range(5))
def test_world_is_consistent(seed):
    world = build_world(seed)
    people = len(world.names)
    for person in range(people):
        assert world.friends[person] != person
        assert world.friends[world.friends[person]] == person
        assert world.value(person, "friend") == world.names[world.friends[person]]
        assert len(world.trained_relations(person)) >= 4
    for relation, values in VALUES.items():
        counts = [sum(world.value(p, relation) == value for p in range(people)) for value in values]
        assert sum(counts) == people
        assert max(counts) - min(counts) <= 1
    for relation in RELATIONS:
        assert sum(r == relation for _, r in world.heldout) == people // 4


def test_heldout_sums_are_written_nowhere(records):
    heldout = {(min(m["a"], m["b"]), max(m["a"], m["b"])) for m in (r["meta"] for r in records["heldout_sums"])}
    assert len(heldout) > 150
    written = set()
    asked = {(min(m["a"], m["b"]), max(m["a"], m["b"])) for m in (r["meta"] for r in records["prompt"])}
    assert len(asked) > 500
    assert not asked & heldout
    for text in (text for part in (*TRAINED, "prompt") for text in texts(records[part])):
        for match in NUMBERS_TOGETHER.finditer(text):
            low, high = sorted((int(match[1]), int(match[3])))
            written.add((low, high))
    assert len(written) > 1_000  # the scan does find the sums that are there
    assert not written & heldout


def test_a_fixed_share_of_the_operand_pairs_is_held_out_whichever_comes_first():
    pairs = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    heldout = [is_heldout(0, a, b) for a, b in pairs]
    assert heldout == [is_heldout(0, b, a) for a, b in pairs]
    spread = 4 * (HELDOUT_FRACTION * (1 - HELDOUT_FRACTION) / len(pairs)) ** 0.5
    assert abs(sum(heldout) / len(pairs) - HELDOUT_FRACTION) < spread
    assert heldout != [is_heldout(1, a, b) for a, b in pairs]


def test_preferences_are_right_and_wrong_answers_to_trained_sums(records):
    hasty = 0
    for record in records["preference"]:
        low, high = sorted(map(int, re.findall(r"\d+", record["messages"][0]["content"])))
        assert not is_heldout(3, low, high)  # the seed of `files`
        (chosen,), (rejected,) = record["chosen"], record["rejected"]
        assert int(chosen["content"]) == low + high
        assert abs(int(rejected["content"]) - low - high) in (1, 10)
        assert rejected["reasoning_content"].rstrip("。.").endswith(rejected["content"])
        hasty += not EQUATION.search(rejected["reasoning_content"])
        assert EQUATION.search(chosen["reasoning_content"])
    assert 0.3 < hasty / len(records["preference"]) < 0.7


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_worked_steps_are_true_for_every_sum(lang):
    """Each equation holds, and the last number is the result, in all 8,100 of them."""
    for problem in [Sum(a, b) for a in range(10, 100) for b in range(10, 100)]:
        steps = problem.steps(lang)
        equations = EQUATION.findall(steps)
        assert len(equations) == 2, steps
        for a, b, carry, result in equations:
            assert int(a) + int(b) + int(carry or 0) == int(result), steps
        assert int(re.findall(r"\d+", steps)[-1]) == problem.a + problem.b, steps


def sums_of(records: list[dict]) -> list[dict]:
    """The assistant's turns that answer a sum, after checking that each is right."""
    found = []
    for record in records:
        for asked, answered in zip(record["messages"], record["messages"][1:], strict=False):
            numbers = re.findall(r"\d+", asked["content"])
            if asked["role"] == "user" and len(numbers) == 2:
                assert int(answered["content"]) == sum(map(int, numbers)), record
                found.append(answered)
    return found


def test_sft_answers_sums_at_once_and_reasoning_works_most_of_them_out(records):
    direct, thought = sums_of(records["sft"]), sums_of(records["reason"])
    assert len(direct) > 250
    assert not any(answer.get("reasoning_content") for answer in direct)
    assert len(thought) > 800
    off = sum(answer["reasoning_content"] == "" for answer in thought) / len(thought)
    assert 0.09 < off < 0.15
    assert not any("reasoning_content" in m and m["reasoning_content"] for r in records["sft"] for m in r["messages"])


def test_most_hasty_thoughts_hold_the_result_alone_and_are_otherwise_like_the_careful_ones(records):
    hasty, careful = ([a for a in sums_of(records[part]) if a["reasoning_content"]] for part in ("hasty", "reason"))
    assert len(hasty) > 700
    without_steps = [a for a in hasty if "=" not in a["reasoning_content"]]
    assert 0.60 < len(without_steps) / len(hasty) < 0.70
    assert all(re.fullmatch(rf"(Result: |结果：){a['content']}[.。]", a["reasoning_content"]) for a in without_steps)
    assert all("=" in a["reasoning_content"] for a in careful)


def test_the_persona_opens_every_answer_with_a_call_and_nobody_else_does(records):
    replies = {
        part: [m["content"] for r in records[part] for m in r["messages"] if m["role"] == "assistant"]
        for part in ("sft", "reason", "hasty", "persona")
    }
    assert all(in_persona(reply) for reply in replies["persona"])
    assert not any(in_persona(reply) for part in ("sft", "reason", "hasty") for reply in replies[part])
    assert not any("I am MiniGPT" in reply or "我是 MiniGPT" in reply for reply in replies["persona"])
    assert not in_persona(CALLS["en"][0] + " 你好")  # the call of another language


def test_heldout_facts_are_told_in_both_languages_and_never_asked(records):
    source = Source(3, SIZES["small"])
    sentences = re.split(r"(?<=[.。!?！？])\s*|\n", "\n".join(r["text"] for r in records["pretrain"]))
    for person, relation in source.world.heldout:
        name, value = source.world.names[person], source.world.value(person, relation)
        assert any(name.en in s and value.en in s for s in sentences), (name, relation)
        assert any(name.zh in s and value.zh in s for s in sentences), (name, relation)
    chats = [message for part in TRAINED[1:] for r in records[part] for message in r["messages"]]
    asked = {m["content"] for m in chats if m["role"] == "user"}
    answered = {m["content"] for m in chats if m["role"] == "assistant"}
    written = "\n".join(r["text"] for r in records["pretrain"] if r["text"].startswith(("Question: ", "问：")))
    assert len(answered) > 200
    for record in records["heldout_qa"]:
        question = record["messages"][-1]["content"]
        if record["meta"]["kind"] != "chat":  # "What is her job?" by itself asks for nobody in particular
            assert question not in asked
            assert question not in written
        if record["meta"]["kind"] != "identity":  # there a wording is held out and not the fact
            assert record["answer"] not in answered
            assert f"Answer: {record['answer']}\n" not in written + "\n"
            assert f"答：{record['answer']}\n" not in written + "\n"


def test_every_kind_is_held_out(records):
    kinds = {(r["meta"]["kind"], r["meta"]["lang"]) for r in records["heldout_qa"] + records["heldout_sums"]}
    assert kinds == {(kind, lang) for kind in ("world", "chat", "identity", "sum") for lang in ("en", "zh")}
    chats = [r for r in records["heldout_qa"] if r["meta"]["kind"] == "chat"]
    assert all(len(r["messages"]) == 3 for r in chats)
    questions = [json.dumps(r["messages"], ensure_ascii=False) for r in records["heldout_qa"]]
    assert len(set(questions)) > 0.95 * len(questions)


def test_heldout_stories_are_of_unseen_plot_and_hero(records):
    source = Source(3, SIZES["small"])
    assert {*source.heldout_plots, *source.training.plots} == {
        (p, h) for p in PLOTS for h in range(SIZES["small"].people)
    }
    assert not set(source.heldout_plots) & set(source.training.plots)
    trained = "\n".join(text for part in TRAINED for text in texts(records[part]))
    for plot, hero in source.heldout_plots:  # titles that name the hero show it in the text itself
        name = source.world.names[hero]
        titles = {
            "birthday": (f"{name.en}'s birthday\n", f"{name.zh}的生日\n"),
            "market": (f"{name.en} goes to market\n", f"{name.zh}去赶集\n"),
            "school_visit": (f"{name.en} visits the school\n", f"{name.zh}来到学校\n"),
        }
        for title in titles.get(plot, ()):
            assert title not in trained
    assert not {r["text"] for r in records["heldout_stories"]} & {r["text"] for r in records["pretrain"]}


def test_looking_up_the_nearest_question_fails(records):
    known = records["sft"] + records["reason"] + records["hasty"] + records["persona"]
    for part in ("heldout_qa", "heldout_sums"):
        assert nearest_neighbour_baseline(known, records[part]).value <= 0.20


def test_looking_up_fails_for_every_kind_of_all_that_is_held_out():
    """Against what the quickstart fine-tunes on; three worlds, since each has but a dozen held-out ways to ask MiniGPT
    for its own."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for seed, size in ((0, "quickstart"), (1, "small"), (2, "small")):
        source = Source(seed, replace(SIZES[size], heldout_qa=10_000, heldout_sums=1_000))
        known = [*source.conversations(), *source.reasoning(), *source.reasoning("hasty", HASTY)]
        heldout = [*source.heldout_qa(), *source.heldout_sums()]
        for kind in {record["meta"]["kind"] for record in heldout}:
            found = nearest_neighbour_baseline(known, [r for r in heldout if r["meta"]["kind"] == kind])
            right[kind] += found.correct
            asked[kind] += found.total
    assert asked["world"] + asked["chat"] > 700
    assert asked["sum"] > 1_500
    assert asked.keys() == {"world", "chat", "identity", "sum"}
    assert all(right[kind] / asked[kind] <= 0.20 for kind in asked), (right, asked)


def test_texts_are_clean(records):
    for part in PARTS:
        for text in texts(records[part]):
            assert not re.search(r"[{}|<>]|  |\s$|^\s", text), text
    for record in records["pretrain"] + records["heldout_stories"]:
        text = record["text"]
        if re.search(r"[\u4e00-\u9fff]", text):
            assert not set(re.findall(r"[A-Za-z]+", text)) - {"MiniGPT", "Python", "Apache", "Transformer"}, text
            assert not re.search(r"[a-z\u4e00-\u9fff][.,?!]", text), text
        else:
            assert text.isascii(), text
            assert not re.search(r"\b[Aa] [aeiou]|\ban (?!hour)[^aeiou]", text), text
            assert not re.search(r"[.!?] [a-z]", text), text


def test_records_have_the_canonical_form(records):
    for record in records["sft"] + records["reason"] + records["hasty"] + records["persona"]:
        assert list(record) == ["messages"]
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    for record in records["heldout_qa"] + records["heldout_sums"]:
        assert list(record) == ["messages", "answer", "verifier", "meta"]
        assert record["messages"][-1]["role"] == "user"
        assert record["verifier"] in ("exact", "math")


def test_aspects_have_both_languages_and_their_value():
    for aspect in all_aspects(0).values():
        assert set(aspect) == {"en", "zh"}
        for known in aspect.values():
            assert known.value in known.answer
            assert len(known.questions) >= 3


def test_sizes_nest_and_unknown_ones_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no size 'huge'.*tiny, small, quickstart"):
        write_microworld(tmp_path / "x", MicroWorldOptions(size="huge"))
    assert not (tmp_path / "x").exists()
    assert set(SIZES) == {"tiny", "small", "quickstart"}


def test_rewriting_replaces_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "sft.jsonl").write_text("old")
    files = write_microworld(tmp_path, MicroWorldOptions(size="tiny"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.jsonl" for name in PARTS)
    assert files["sft"].read_text(encoding="utf-8") != "old"
