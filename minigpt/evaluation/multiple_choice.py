"""Multiple choice by log-likelihood: the model does not write, it is asked which continuation is the most probable.

Two kinds of files, asked as lm-evaluation-harness asks them, so that numbers can be compared:

    arc            jsonl   Question: …\\nAnswer:          → the text of each choice
    cmmlu, ceval   csv     …\\nA. …\\nB. …\\nC. …\\nD. …\\n答案：   → A, B, C or D

`acc` takes the choice of the greatest log-probability, `acc_norm` that of the greatest log-probability per UTF-8 byte,
which does not favour short choices.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.errors import UserError

from .likelihood import continuation_log_probs
from .task import Metric, Progress, Settings, TaskResult, fingerprint, keep_samples, task_name

if TYPE_CHECKING:
    from minigpt.dataset.chat import ChatEncoder
    from minigpt.model.model_minigpt import MiniGPT

LAYOUTS = {"arc": ".jsonl", "cmmlu": ".csv", "ceval": ".csv"}
NEEDED = {
    "arc": "it needs question, choices (texts with labels) and answerKey",
    **dict.fromkeys(("cmmlu", "ceval"), "it needs the columns question, A, B, C, D and answer, a letter"),
}
SUBJECT = re.compile(r"[_-](?:dev|val|test|train)$", re.IGNORECASE)
EXAM_HEAD = "以下是单项选择题，请直接给出正确答案的选项。\n\n"
"""What stands before the questions of CMMLU and C-Eval."""


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        text: What is asked, up to where the answer goes on.
        choices: The answers to choose from, as they are written behind the question.
        correct: Index of the right one.
    """

    text: str
    choices: tuple[str, ...]
    correct: int


@dataclass(frozen=True)
class Subject:
    """The questions of one file, and solved examples for it."""

    name: str
    questions: list[Question]
    examples: list[Question]


class MultipleChoice:
    """Multiple-choice questions of one file, or of a folder with a file for each subject.

    Args:
        layout: "arc", "cmmlu" or "ceval".
        path: The file or folder.
        dev: Solved examples: a file, or a folder with a file for each subject. None: no examples.

    Raises:
        UserError: when a file cannot be read as such questions, naming file and line; or a subject has no examples.
    """

    def __init__(self, layout: str, path: Path, dev: Path | None = None) -> None:
        self.layout = layout
        self.name = task_name(layout, path)
        files = _files(layout, path)
        examples = {} if dev is None else {_subject(file): read_questions(layout, file) for file in _files(layout, dev)}
        self.subjects = []
        for file in files:
            own = examples.get(_subject(file), [])
            if dev is not None and not own and len(examples) == 1:
                own = next(iter(examples.values()))
            if dev is not None and not own:
                raise UserError(f"--dev {dev} has no solved examples for the subject {_subject(file)} of {file}")
            self.subjects.append(Subject(_subject(file), read_questions(layout, file), own))
        self.source = {"path": str(path), "fingerprint": fingerprint(*files)}
        if dev is not None:
            self.source |= {"dev": str(dev), "dev_fingerprint": fingerprint(*_files(layout, dev))}

    def run(
        self, model: MiniGPT, encoder: ChatEncoder, settings: Settings, progress: Progress | None = None
    ) -> TaskResult:
        """See `Task.run`; `settings.limit` counts the questions of each subject."""
        chosen = {subject.name: subject.questions[: settings.limit] for subject in self.subjects}
        total, done = sum(map(len, chosen.values())), 0
        by_subject: dict[str, list[tuple[bool, bool]]] = {}
        judged, truncated = [], 0
        for subject in self.subjects:
            questions, examples = chosen[subject.name], self._examples(subject, settings.shots)
            contexts, continuations = [], []
            for question in questions:
                context, several = self._encode(encoder, question, examples, settings)
                contexts.append(context)
                continuations.append(several)
            found = continuation_log_probs(
                model, contexts, continuations, progress=None if progress is None else _shifted(progress, done, total)
            )
            done, truncated = done + len(questions), truncated + found.truncated
            for question, log_probs in zip(questions, found.log_probs, strict=True):
                lengths = [len(choice.encode()) for choice in question.choices]
                best = _argmax(log_probs)
                best_by_byte = _argmax([lp / n for lp, n in zip(log_probs, lengths, strict=True)])
                right = best == question.correct, best_by_byte == question.correct
                by_subject.setdefault(subject.name, []).append(right)
                sample = {
                    "question": question.text,
                    "expected": question.choices[question.correct],
                    "reply": question.choices[best],
                    "log_probs": [list(pair) for pair in zip(question.choices, log_probs, strict=True)],
                }
                judged.append((right[0], sample))
        everything = [right for rights in by_subject.values() for right in rights]
        metrics = [_accuracy("acc", [right for right, _ in everything])]
        if self.layout == "arc":  # letters are all of one length
            metrics.append(_accuracy("acc_norm", [right for _, right in everything]))
        details: dict[str, Any] = {
            "chance": sum(1 / len(q.choices) for several in chosen.values() for q in several) / total,
            "shots": settings.shots,
            "contexts_cut_at_the_left": truncated,
        }
        if len(by_subject) > 1:
            details["by_subject"] = {
                name: {"acc": sum(right for right, _ in rights) / len(rights), "n": len(rights)}
                for name, rights in by_subject.items()
            }
        return TaskResult(self.name, metrics, total, details, keep_samples(judged))

    def _examples(self, subject: Subject, shots: int) -> list[Question]:
        if len(subject.examples) < shots:
            raise UserError(
                f"--shots {shots} needs as many solved examples and {subject.name} has {len(subject.examples)}: "
                "give them with --dev, or lower --shots"
            )
        return subject.examples[:shots]

    def _encode(
        self, encoder: ChatEncoder, question: Question, examples: Sequence[Question], settings: Settings
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of what comes before the answer, and of each choice."""
        if settings.chat:
            turns = []
            for example in examples:
                turns.append({"role": "user", "content": example.text})
                turns.append({"role": "assistant", "content": example.choices[example.correct]})
            turns.append({"role": "user", "content": question.text})
            context = encoder.encode_prompt(turns, enable_thinking=settings.enable_thinking)
            return context, encoder.encode_texts(question.choices)
        solved = [f"{example.text} {example.choices[example.correct]}\n\n" for example in examples]
        head = "" if self.layout == "arc" else EXAM_HEAD
        before = head + "".join(solved) + question.text
        context = encoder.encode_text(before)
        whole = encoder.encode_texts([f"{before} {choice}" for choice in question.choices])
        return [*encoder.bos_ids, *context], [ids[len(context) :] for ids in whole]


def read_questions(layout: str, path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        UserError: naming file and line of what is not a question with one right answer.
    """
    questions = []
    for number, raw in _jsonl(path) if layout == "arc" else _csv(path):
        try:
            questions.append(_arc(raw) if layout == "arc" else _exam(raw))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}:{number} is no question in {layout}'s layout ({error}); {NEEDED[layout]}"
            ) from None
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def _arc(raw: dict[str, Any]) -> Question:
    """ARC as it is published by AI2 (question.stem, question.choices) or on the Hub (choices.text, choices.label)."""
    question, choices = raw["question"], raw.get("choices")
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        labels, texts = [c["label"] for c in choices], [c["text"] for c in choices]
    else:
        labels, texts = choices["label"], choices["text"]  # type: ignore[index]
    if len(texts) < 2 or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("fewer than two choices, or an empty one")
    return Question(f"Question: {question}\nAnswer:", tuple(texts), list(labels).index(raw["answerKey"]))


def _exam(raw: dict[str, str]) -> Question:
    """A row of CMMLU or C-Eval."""
    row = {(key or "").strip().lower(): (value or "").strip() for key, value in raw.items() if isinstance(key, str)}
    choices = "".join(f"{letter}. {row[letter.lower()]}\n" for letter in "ABCD")
    return Question(f"{row['question']}\n{choices}答案：", tuple("ABCD"), "ABCD".index(_letter(row["answer"])))


def _letter(answer: str) -> str:
    if answer.upper() not in ("A", "B", "C", "D"):
        raise ValueError(f"the answer is {answer!r}")
    return answer.upper()


def _jsonl(path: Path) -> list[tuple[int, Any]]:
    found = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number} is not valid JSON ({error.msg}); mend or delete the line") from None
    return found


def _csv(path: Path) -> list[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True))
    try:
        return [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num} is not valid CSV ({error}); mend the line") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a file or folder of multiple-choice questions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from None


def _files(layout: str, path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob(f"*{LAYOUTS[layout]}"))
    if not files:
        raise UserError(f"{path} holds no {LAYOUTS[layout]} files with questions in {layout}'s layout")
    for one, other in pairwise(sorted(files, key=_subject)):
        if _subject(one) == _subject(other):
            raise UserError(
                f"{path} holds several files of {_subject(one)} ({one.name}, {other.name}): give one of them, or a "
                "folder with the files of one split"
            )
    return files


def _subject(file: Path) -> str:
    """`high_school_physics_val.csv` → `high_school_physics`."""
    return SUBJECT.sub("", file.stem)


def _shifted(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    """Tells the progress of a part as that of the whole."""
    return lambda done: progress(before + done, total)


def _argmax(values: Sequence[float]) -> int:
    """The first of the greatest."""
    return max(range(len(values)), key=values.__getitem__)


def _accuracy(name: str, rights: Sequence[bool]) -> Metric:
    return Metric.of_share(name, sum(rights) / len(rights), len(rights))
