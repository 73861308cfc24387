"""Exact answers: ask every question of a held-out file, greedily, and count the right ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.evaluation.answers import Accuracy, group_accuracy, is_correct, read_prompt_records

if TYPE_CHECKING:
    from minigpt.dataset.chat import ChatEncoder
    from minigpt.model.model_minigpt import MiniGPT

Conversation = list[dict[str, Any]]
AnswerFn = Callable[[Sequence[Conversation]], list[str]]


@dataclass(frozen=True)
class ExactAnswerResult:
    """What came of one file of questions.

    Attributes:
        accuracy: over all questions.
        by_kind: by `meta["kind"]`.
        replies: what the model wrote, in the order of the records.
        correct: which replies were right.
    """

    accuracy: Accuracy
    by_kind: dict[str, Accuracy]
    replies: list[str]
    correct: list[bool]


class ExactAnswer:
    """Accuracy on prompt records.

    Args:
        records: {"messages", "answer", "verifier", "meta"} each, as `read_prompt_records` returns them.

    Example:
        >>> task = ExactAnswer.from_file("heldout_sums.jsonl")
        >>> print(task(ModelAnswers(model, encoder)).accuracy)
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self.records = list(records)

    @classmethod
    def from_file(cls, path: Path | str, limit: int | None = None) -> ExactAnswer:
        """The first `limit` records of a jsonl file, or all."""
        return cls(read_prompt_records(path)[:limit])

    def __call__(self, answer_fn: AnswerFn) -> ExactAnswerResult:
        """Ask every question.

        Args:
            answer_fn: conversations that end with a user's turn → the replies, in the same order.
        """
        replies = answer_fn([record["messages"] for record in self.records])
        correct = [
            is_correct(reply, record["answer"], record["verifier"])
            for reply, record in zip(replies, self.records, strict=True)
        ]
        by_kind = group_accuracy(self.records, correct, "kind")
        return ExactAnswerResult(Accuracy(sum(correct), len(correct)), by_kind, replies, correct)


@dataclass
class ModelAnswers:
    """Greedy replies of a model: the `answer_fn` of real use.

    Args:
        model: a MiniGPT on any device.
        encoder: renders and encodes the conversations.
        max_new_tokens: a reply is cut here.
        enable_thinking: True and False switch the model's thinking on and off; None leaves it to the model.
        batch_size: conversations generated together.
        progress: called with the number of replies finished so far.
    """

    model: MiniGPT
    encoder: ChatEncoder
    max_new_tokens: int = 96
    enable_thinking: bool | None = None
    batch_size: int = 64
    progress: Callable[[int], None] | None = None

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        from minigpt.generation.engine import generate
        from minigpt.generation.sampling import SamplingParams

        ends = (self.encoder.im_end_id, self.encoder.eos_id)
        params = SamplingParams(max_new_tokens=self.max_new_tokens, temperature=0.0, stop_token_ids=ends)
        replies: list[str] = []
        for first in range(0, len(conversations), self.batch_size):
            batch = conversations[first : first + self.batch_size]
            prompts = [self.encoder.encode_prompt(c, enable_thinking=self.enable_thinking) for c in batch]
            for completion in generate(self.model, prompts, params, batch_size=self.batch_size):
                replies.append(self.encoder.decode(completion.ids))
            if self.progress is not None:
                self.progress(len(replies))
        return replies
