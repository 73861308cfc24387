"""Multiple choice: log-likelihoods against plain forward passes in float64; the layouts of ARC, CMMLU and C-Eval."""

import csv
import json
import random
from pathlib import Path

import pytest
import torch

from minigpt.dataset.chat import ChatEncoder
from minigpt.errors import UserError
from minigpt.evaluation.likelihood import continuation_log_probs
from minigpt.evaluation.multiple_choice import EXAM_HEAD, MultipleChoice, read_questions
from minigpt.evaluation.task import Settings
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig


def peaked_model(vocab_size: int, context: int = 400) -> MiniGPT:
    """Random weights so large that choices differ by whole nats."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MiniGPT(MiniGPTConfig(vocab_size, **shape, max_position_embeddings=context))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


def plain_log_prob(model: MiniGPT, context: list[int], continuation: list[int]) -> float:
    """One forward pass over everything, in float64, without a cache."""
    exact = MiniGPT(model.config).double()
    exact.load_state_dict(model.state_dict())
    exact.attention_backend = "reference"
    with torch.no_grad():
        log_probs = exact(torch.tensor([context + continuation])).logits[0].log_softmax(-1)
    places = torch.arange(len(context) - 1, len(context) + len(continuation) - 1)
    return log_probs[places, torch.tensor(continuation)].sum().item()


@pytest.mark.parametrize("shared", [0, 1, 40])
def test_log_likelihoods_equal_plain_forward_passes_in_float64(shared):
    """Contexts with and without a common beginning, of lengths 1 to 60, with choices of 1 to 7 tokens."""
    model = peaked_model(97)
    draw = random.Random(shared)

    def tokens(least: int, most: int) -> list[int]:
        return [draw.randrange(97) for _ in range(draw.randint(least, most))]

    beginning = tokens(shared, shared)
    contexts = [beginning + tokens(1 if shared != 1 else 0, 20) for _ in range(9)]
    choices = [[tokens(1, 7) for _ in range(draw.randint(1, 5))] for _ in contexts]
    choices[3] = [[1], [2], [3], [4]]  # letters: read once
    choices[4] = [[5, 6, 7], [5, 6, 8], [5, 6]]
    done: list[int] = []
    model.train()
    found = continuation_log_probs(model, contexts, choices, progress=done.append)
    assert model.training
    assert done[-1] == 9
    assert found.truncated == 0
    for context, several, log_probs in zip(contexts, choices, found.log_probs, strict=True):
        expected = [plain_log_prob(model, context, ids) for ids in several]
        assert log_probs == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_log_likelihoods_do_not_depend_on_batch_mates(monkeypatch):
    from minigpt.evaluation import likelihood

    model = peaked_model(97)
    draw = random.Random(1)
    contexts = [[draw.randrange(97) for _ in range(draw.randint(3, 50))] for _ in range(8)]
    choices = [[[draw.randrange(97) for _ in range(3)] for _ in range(4)] for _ in contexts]
    together = continuation_log_probs(model, contexts, choices).log_probs
    monkeypatch.setitem(likelihood.CACHE_TOKENS, "cpu", 1)  # one question a batch
    done: list[int] = []
    alone = continuation_log_probs(model, contexts, choices, progress=done.append).log_probs
    assert done == list(range(1, 9))
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_contexts_too_long_lose_their_beginning_and_are_counted():
    model = peaked_model(97, context=20)
    draw = random.Random(2)
    long = [draw.randrange(97) for _ in range(50)]
    found = continuation_log_probs(model, [long, [1, 2]], [[[3, 4, 5], [6]], [[7]]])
    assert found.truncated == 1
    kept = long[-18:]  # with all but the last of the three tokens, 20
    assert found.log_probs[0] == pytest.approx([plain_log_prob(model, kept, ids) for ids in ([3, 4, 5], [6])], abs=1e-4)


# ------------------------------------------------------------------------------------------------------------- layouts

ARC = [
    {
        "id": "q1",
        "question": {
            "stem": "Which of these is a star?",
            "choices": [{"text": "the Moon", "label": "A"}, {"text": "the Sun", "label": "B"}],
        },
        "answerKey": "B",
    },
    {
        "id": "q2",
        "question": "What melts?",
        "choices": {"text": ["an ice cube in the sun", "a stone", "air"], "label": ["1", "2", "3"]},
        "answerKey": "1",
    },
]
EXAM = [
    {"Question": "水的化学式是什么？", "A": "H2O", "B": "CO2", "C": "O2", "D": "N2", "Answer": "A"},
    {"Question": '他说"好"，意思是', "A": "同意", "B": "反对", "C": "离开", "D": "沉默", "Answer": "A"},
    {"Question": "一年有几个季节？", "A": "一", "B": "二", "C": "三", "D": "四", "Answer": "D"},
]


def write_arc(path: Path) -> Path:
    path.write_text("".join(json.dumps(q) + "\n" for q in ARC), encoding="utf-8")
    return path


def write_exam(path: Path, rows: list[dict], lower: bool = False) -> Path:
    """CMMLU's layout (a nameless column of numbers first), or C-Eval's (id, lower case, an explanation at the end)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        if lower:
            writer = csv.writer(file)
            writer.writerow(["id", "question", *"ABCD", "answer", "explanation"])
            writer.writerows(
                [i, r["Question"], *(r[x] for x in "ABCD"), r["Answer"], "1. …"] for i, r in enumerate(rows)
            )
        else:
            writer = csv.writer(file)
            writer.writerow(["", "Question", *"ABCD", "Answer"])
            writer.writerows([i, r["Question"], *(r[x] for x in "ABCD"), r["Answer"]] for i, r in enumerate(rows))
    return path


def test_both_layouts_of_arc_read_alike(tmp_path):
    first, second = read_questions("arc", write_arc(tmp_path / "arc.jsonl"))
    assert first.text == "Question: Which of these is a star?\nAnswer:"
    assert (first.choices, first.correct) == (("the Moon", "the Sun"), 1)
    assert (second.choices[second.correct], len(second.choices)) == ("an ice cube in the sun", 3)


@pytest.mark.parametrize("layout", ["cmmlu", "ceval"])
def test_exam_csv_files_are_asked_by_letter(tmp_path, layout):
    questions = read_questions(layout, write_exam(tmp_path / "x.csv", EXAM, lower=layout == "ceval"))
    assert questions[0].text == "水的化学式是什么？\nA. H2O\nB. CO2\nC. O2\nD. N2\n答案："
    assert [q.choices[q.correct] for q in questions] == ["A", "A", "D"]
    assert '"好"' in questions[1].text


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "a.jsonl",
            '{"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}\n',
            "a.jsonl:1 is no question",
        ),
        (
            "b.jsonl",
            json.dumps(ARC[1]) + "\n" + json.dumps(ARC[1] | {"answerKey": "4"}) + "\n",
            "b.jsonl:2 is no question",
        ),
        ("c.jsonl", json.dumps(ARC[1]) + "\n{\n", "c.jsonl:2 is not valid JSON"),
        ("d.jsonl", "\n", "d.jsonl holds no questions"),
        ("e.jsonl", '["question"]\n', "e.jsonl:1 is no question"),
        ("f.csv", "Question,A,B,C,D,Answer\nwhat,1,2,3,4,A\nwhat,1,2,3,4,E\n", "f.csv:3 is no question"),
        ("g.csv", "Question,A,B,C,Answer\nwhat,1,2,3,A\n", "g.csv:2 is no question"),
        ("h.csv", "", "h.csv holds no questions"),
    ],
)
def test_what_is_no_question_is_named_by_file_and_line(tmp_path, name, text, sentence):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        MultipleChoice("arc" if path.suffix == ".jsonl" else "cmmlu", path)


# -------------------------------------------------------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def encoder(shipped_tokenizer) -> ChatEncoder:
    return ChatEncoder(shipped_tokenizer)


@pytest.fixture(scope="module")
def model(encoder) -> MiniGPT:
    return peaked_model(encoder.vocab_size)


def test_accuracy_by_sum_and_by_byte_are_those_of_plain_forward_passes(tmp_path, model, encoder):
    result = MultipleChoice("arc", write_arc(tmp_path / "arc.jsonl")).run(model, encoder, Settings())
    rights, rights_by_byte = [], []
    for question in read_questions("arc", tmp_path / "arc.jsonl"):
        context = encoder.encode_text(question.text)
        sums = [plain_log_prob(model, context, encoder.encode_text(" " + choice)) for choice in question.choices]
        by_byte = [s / len(c.encode()) for s, c in zip(sums, question.choices, strict=True)]
        rights.append(sums.index(max(sums)) == question.correct)
        rights_by_byte.append(by_byte.index(max(by_byte)) == question.correct)
        (sample,) = [s for s in result.samples if s["question"] == question.text]
        assert [log_prob for _, log_prob in sample["log_probs"]] == pytest.approx(sums, rel=1e-4)
    assert [(m.name, m.value) for m in result.metrics] == [
        ("acc", sum(rights) / 2),
        ("acc_norm", sum(rights_by_byte) / 2),
    ]
    assert result.details["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_solved_examples_stand_before_the_question(tmp_path, model, encoder):
    test = write_exam(tmp_path / "test" / "physics_val.csv", EXAM)
    dev = write_exam(tmp_path / "dev" / "physics_dev.csv", EXAM[::-1])
    task = MultipleChoice("cmmlu", test, dev.parent)
    result = task.run(model, encoder, Settings(shots=2))
    third, second = (read_questions("cmmlu", dev)[i].text for i in (0, 1))
    for question in read_questions("cmmlu", test):
        before = f"{EXAM_HEAD}{third} D\n\n{second} A\n\n{question.text}"
        context = encoder.encode_text(before)
        sums = [plain_log_prob(model, context, encoder.encode_text(before + f" {c}")[len(context) :]) for c in "ABCD"]
        (sample,) = [s for s in result.samples if s["question"] == question.text]
        assert [log_prob for _, log_prob in sample["log_probs"]] == pytest.approx(sums, rel=1e-4)
    with pytest.raises(UserError, match="--shots 4 needs as many solved examples and physics has 3"):
        task.run(model, encoder, Settings(shots=4))


def test_a_folder_is_asked_subject_by_subject(tmp_path, model, encoder):
    for subject in ("physics", "history"):
        write_exam(tmp_path / "test" / f"{subject}.csv", EXAM)
    write_exam(tmp_path / "dev" / "physics.csv", EXAM)
    write_exam(tmp_path / "dev" / "chemistry.csv", EXAM)
    result = MultipleChoice("ceval", tmp_path / "test").run(model, encoder, Settings(limit=2))
    assert result.n == 4
    assert set(result.details["by_subject"]) == {"physics", "history"}
    assert result.details["chance"] == 0.25
    with pytest.raises(UserError, match="no solved examples for the subject history"):
        MultipleChoice("ceval", tmp_path / "test", tmp_path / "dev")


def test_several_splits_of_one_subject_are_not_asked_as_one(tmp_path):
    """AI2's folder of ARC, and a folder that holds the solved examples beside the questions."""
    for name in ("ARC-Easy-Dev", "ARC-Easy-Test", "ARC-Easy-Train"):
        write_arc(tmp_path / f"{name}.jsonl")
    with pytest.raises(UserError, match=r"several files of ARC-Easy \(ARC-Easy-Dev.jsonl, ARC-Easy-Test.jsonl\)"):
        MultipleChoice("arc", tmp_path)
    for name in ("law_val", "history_dev", "law_dev"):
        write_exam(tmp_path / "ceval" / f"{name}.csv", EXAM)
    with pytest.raises(UserError, match="several files of law"):
        MultipleChoice("ceval", tmp_path / "ceval")


def test_a_question_can_be_put_as_a_chat(tmp_path, model, encoder):
    test = write_exam(tmp_path / "physics.csv", EXAM)
    result = MultipleChoice("cmmlu", test, test).run(model, encoder, Settings(chat=True, shots=1))
    questions = read_questions("cmmlu", test)
    turns = [
        {"role": "user", "content": questions[0].text},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": questions[2].text},
    ]
    context = encoder.encode_prompt(turns)
    sums = [plain_log_prob(model, context, encoder.encode_text(letter)) for letter in "ABCD"]
    (sample,) = [s for s in result.samples if s["question"] == questions[2].text]
    assert [log_prob for _, log_prob in sample["log_probs"]] == pytest.approx(sums, rel=1e-4)
