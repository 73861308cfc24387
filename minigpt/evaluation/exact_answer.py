"""Exact answers: ask every question of a held-out file and count the right replies; pass@k with several of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.errors import UserError

from .answers import Accuracy, group_accuracy, is_correct, pass_at_k, read_prompt_records
from .task import Metric, Progress, Settings, TaskResult, fingerprint, keep_samples, task_name

if TYPE_CHECKING:
    from minigpt.dataset.chat import ChatEncoder
    from minigpt.model.model_minigpt import MiniGPT

Conversation = list[dict[str, Any]]
AnswerFn = Callable[[Sequence[Conversation]], list[str]]
KINDS = {"questions": None, "gsm8k": "math", "countdown": "countdown"}
"""Names of files of questions, and the verifier that all their records must have; None: any."""


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
        name: Of the task.
        source: Where the records are from.

    Example:
        >>> task = ExactAnswer.from_file("heldout_sums.jsonl")
        >>> print(task(ModelAnswers(model, encoder)).accuracy)
    """

    def __init__(
        self, records: Sequence[dict[str, Any]], name: str = "questions", source: dict[str, str] | None = None
    ) -> None:
        self.records, self.name, self.source = list(records), name, source or {}

    @classmethod
    def from_file(cls, path: Path | str, limit: int | None = None, kind: str = "questions") -> ExactAnswer:
        """The first `limit` records of a file, or all.

        Raises:
            UserError: when the file cannot be read, or does not hold what `kind` promises.
        """
        path = Path(path)
        records = read_prompt_records(path)
        wanted = KINDS[kind]
        other = next((r["verifier"] for r in records if wanted and r["verifier"] != wanted), None)
        if other is not None:
            raise UserError(f"{path} holds answers for the verifier {other!r}, not {wanted!r}: use questions:{path}")
        name = task_name(kind, path) if wanted else path.stem
        return cls(records[:limit], name, {"path": str(path), "fingerprint": fingerprint(path)})

    def __call__(self, answer_fn: AnswerFn) -> ExactAnswerResult:
        """Ask every question once.

        Args:
            answer_fn: conversations that end with a user's turn → the replies, in the same order.
        """
        replies = answer_fn([record["messages"] for record in self.records])
        correct = [self._is_correct(reply, record) for reply, record in zip(replies, self.records, strict=True)]
        by_kind = group_accuracy(self.records, correct, "kind")
        return ExactAnswerResult(Accuracy(sum(correct), len(correct)), by_kind, replies, correct)

    def run(
        self, model: MiniGPT, encoder: ChatEncoder, settings: Settings, progress: Progress | None = None
    ) -> TaskResult:
        """See `Task.run`: accuracy, or pass@k when several replies are sampled for each question."""
        records = self.records[: settings.limit]
        total = len(records) * settings.samples
        answers = ModelAnswers(
            model,
            encoder,
            max_new_tokens=settings.max_new_tokens,
            enable_thinking=settings.enable_thinking,
            batch_size=settings.batch_size,
            temperature=settings.temperature,
            seed=settings.seed,
            progress=None if progress is None else lambda done: progress(done, total),
        )
        replies = answers.sample([record["messages"] for record in records], settings.samples)
        correct = [
            [self._is_correct(reply, record) for reply in several]
            for several, record in zip(replies, records, strict=True)
        ]

        def metric(name: str, k: int, chosen: list[int]) -> Metric:
            passed = [pass_at_k(settings.samples, sum(correct[i]), k) for i in chosen]
            return Metric.of_share(name, sum(passed) / len(passed), len(passed))

        everything = list(range(len(records)))
        single = settings.samples == 1
        metrics = [metric("accuracy" if single else f"pass@{k}", k, everything) for k in settings.k]
        kinds: dict[str, list[int]] = {}
        for i, record in enumerate(records):
            kinds.setdefault(str(record["meta"].get("kind", "")), []).append(i)
        if len(kinds) > 1:
            metrics += [metric(f"{metrics[0].name} ({kind})", settings.k[0], chosen) for kind, chosen in kinds.items()]
        details = {"replies": total, "cut_at_max_new_tokens": answers.cut, "prompts_too_long": answers.too_long}
        judged = [
            (right, {"question": r["messages"][-1]["content"], "expected": _expected(r), "reply": reply})
            for r, several, rights in zip(records, replies, correct, strict=True)
            for reply, right in zip(several, rights, strict=True)
        ]
        return TaskResult(self.name, metrics, len(records), details, keep_samples(judged))

    @staticmethod
    def _is_correct(reply: str, record: dict[str, Any]) -> bool:
        return is_correct(reply, record["answer"], record["verifier"], record["meta"])


def _expected(record: dict[str, Any]) -> str:
    return f"= {record['meta']['target']}" if record["verifier"] == "countdown" else record["answer"]


@dataclass
class ModelAnswers:
    """Replies of a model: the `answer_fn` of real use, and several replies to each question.

    Args:
        model: a MiniGPT on any device.
        encoder: renders and encodes the conversations.
        max_new_tokens: a reply is cut here.
        enable_thinking: True and False switch the model's thinking on and off; None leaves it to the model.
        batch_size: replies generated together.
        temperature: 0 always takes the most probable token.
        seed: of the random numbers; reply j to question i draws from stream (seed, i · samples + j).
        progress: called with the number of replies finished so far.

    Attributes:
        cut: How many replies of the last call were cut at `max_new_tokens` or the end of the model's context.
        too_long: How many questions of the last call left no room for a reply; their replies are empty.
    """

    model: MiniGPT
    encoder: ChatEncoder
    max_new_tokens: int = 96
    enable_thinking: bool | None = None
    batch_size: int = 64
    temperature: float = 0.0
    seed: int = 0
    progress: Callable[[int], None] | None = None
    cut: int = field(default=0, init=False)
    too_long: int = field(default=0, init=False)

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        """One reply to each conversation."""
        return [reply for (reply,) in self.sample(conversations, 1)]

    def sample(self, conversations: Sequence[Conversation], samples: int) -> list[list[str]]:
        """`samples` replies to each conversation. A thought that the prompt opened is part of the reply."""
        from minigpt.generation.generate import generate
        from minigpt.generation.sampling import SamplingParams

        ends = getattr(self.model, "eos_token_ids", None) or (self.encoder.im_end_id, self.encoder.eos_id)
        params = SamplingParams(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, stop_token_ids=ends, seed=self.seed
        )
        prompts = [self.encoder.encode_prompt(c, enable_thinking=self.enable_thinking) for c in conversations]
        fits = [len(prompt) < self.model.config.max_position_embeddings for prompt in prompts]
        self.cut, self.too_long = 0, fits.count(False)
        wanted = [i * samples + j for i, good in enumerate(fits) if good for j in range(samples)]
        wanted.sort(key=lambda n: len(prompts[n // samples]))  # neighbours pad each other least
        opening = "<think>" if self.encoder.opens_thinking(self.enable_thinking) else ""
        replies = [""] * (samples * len(prompts))
        for first in range(0, len(wanted), self.batch_size):
            batch = wanted[first : first + self.batch_size]
            completions = generate(
                self.model,
                [prompts[n // samples] for n in batch],
                params,
                sequence_ids=batch,
                batch_size=self.batch_size,
            )
            for n, completion in zip(batch, completions, strict=True):
                replies[n] = opening + self.encoder.decode(completion.ids)
                self.cut += completion.finish_reason == "length"
            if self.progress is not None:
                self.progress(first + len(batch))
        return [replies[i * samples : (i + 1) * samples] for i in range(len(prompts))]
