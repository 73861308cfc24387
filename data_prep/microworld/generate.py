"""Write the micro-world as files: what is trained on, and what is kept back for evaluation."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_prep.microworld.arithmetic import draw_sum, worked_text
from data_prep.microworld.chats import (
    MAKERS,
    Record,
    Training,
    conversation,
    heldout_aspect,
    heldout_fact,
    persona_conversation,
    sum_preference,
    sum_record,
)
from data_prep.microworld.identity import all_aspects, heldout_wordings, self_portrait, trained_aspects
from data_prep.microworld.phrases import QUESTIONS
from data_prep.microworld.rng import Stream
from data_prep.microworld.stories import PLOTS, gathering, heldout_plots, pair_portrait, portrait, story
from data_prep.microworld.world import LANGS, Lang, World, build_world
from minigpt.errors import UserError

# How often each kind of document is drawn for pretraining.
DOCUMENTS = {
    "story": 0.08,
    "portrait": 0.13,
    "pair": 0.05,
    "gathering": 0.04,
    "self": 0.05,
    "dialogue": 0.05,
    "sums": 0.60,
}

HASTY = 0.65  # of the thoughts about a sum in `hasty`: how many hold its result and no steps


@dataclass(frozen=True)
class Size:
    """How much is written: people in the world, pretraining documents, conversations of each kind, held-out records."""

    people: int
    documents: int
    conversations: int
    reasoning: int
    persona: int
    prompts: int
    preferences: int
    heldout_qa: int
    heldout_sums: int
    heldout_stories: int


SIZES = {
    "tiny": Size(
        people=8,
        documents=120,
        conversations=120,
        reasoning=80,
        persona=40,
        prompts=40,
        preferences=60,
        heldout_qa=24,
        heldout_sums=24,
        heldout_stories=8,
    ),
    "small": Size(
        people=24,
        documents=2_900,
        conversations=1_900,
        reasoning=1_500,
        persona=600,
        prompts=1_000,
        preferences=1_500,
        heldout_qa=200,
        heldout_sums=200,
        heldout_stories=32,
    ),
    "quickstart": Size(
        people=24,
        documents=18_500,
        conversations=11_000,
        reasoning=11_000,
        persona=3_000,
        prompts=2_000,
        preferences=3_000,
        heldout_qa=200,
        heldout_sums=200,
        heldout_stories=64,
    ),
}


@dataclass
class MicroWorldOptions:
    """Options of the micro-world generator.

    Args:
        seed: chooses the world, what is held out, and every sentence; the same seed gives the same bytes everywhere.
        size: `tiny` (for tests), `small` (210k tokens of text, 280k of chats) or `quickstart` (1.3M and 1.7M).
    """

    seed: int = 0
    size: Literal["tiny", "small", "quickstart"] = "small"


def write_microworld(folder: Path, options: MicroWorldOptions | None = None) -> dict[str, Path]:
    """Generate the micro-world into `folder`.

    Args:
        folder: created when it is missing; files of an earlier run are replaced one by one, each atomically.
        options: seed and size.

    Returns:
        The file of each part: `pretrain` and `heldout_stories` ({"text"}), `sft`, `reason`, `hasty` and
        `persona` ({"messages"}), `preference` ({"messages", "chosen", "rejected"}), and `prompt`, `heldout_qa` and
        `heldout_sums` (prompt records: {"messages", "answer", "verifier", "meta"}).

    Raises:
        UserError: when the size is unknown.
    """
    options = options or MicroWorldOptions()
    if options.size not in SIZES:
        raise UserError(f"the micro-world has no size {options.size!r}; choose one of {', '.join(SIZES)}")
    seed, size = options.seed, SIZES[options.size]
    source = Source(seed, size)
    parts: dict[str, Iterable[Record]] = {
        "pretrain": source.documents(),
        "sft": source.conversations(),
        "reason": source.reasoning(),
        "hasty": source.reasoning("hasty", HASTY),
        "persona": source.persona(),
        "prompt": source.prompts(),
        "preference": source.preferences(),
        "heldout_stories": source.heldout_stories(),
        "heldout_qa": source.heldout_qa(),
        "heldout_sums": source.heldout_sums(),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return {name: _write_jsonl(folder / f"{name}.jsonl", records) for name, records in parts.items()}


def _write_jsonl(path: Path, records: Iterable[Record]) -> Path:
    """One JSON object a line, UTF-8, `\\n` on every platform; under a temporary name until it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


class Source:
    """All records of one seed and size. Record i of a part is a pure function of (seed, world, i)."""

    def __init__(self, seed: int, size: Size) -> None:
        self.seed, self.size = seed, size
        self.world: World = build_world(seed, size.people)
        self.aspects = all_aspects(seed)
        plots = heldout_plots(seed, size.people)
        self.heldout_plots = [(p, h) for p in PLOTS for h in range(size.people) if (p, h) in plots]
        self.training = Training(
            world=self.world,
            seed=seed,
            aspects=trained_aspects(seed),
            plots=[(p, h) for p in PLOTS for h in range(size.people) if (p, h) not in plots],
        )

    def documents(self) -> Iterator[Record]:
        """Pretraining text."""
        for i in range(self.size.documents):
            stream = Stream(self.seed, "document", i)
            yield {"text": self._document(stream.weighted(DOCUMENTS), stream.choice(LANGS), stream)}

    def _document(self, kind: str, lang: Lang, stream: Stream) -> str:
        world, person = self.world, stream.below(self.size.people)
        makers: dict[str, Callable[[], str]] = {
            "story": lambda: story(world, *stream.choice(self.training.plots), lang, stream),
            "portrait": lambda: portrait(world, person, lang, stream),
            "pair": lambda: pair_portrait(world, person, lang, stream),
            "gathering": lambda: gathering(world, lang, stream),
            "self": lambda: self_portrait(self.aspects, lang, stream),
            "dialogue": lambda: self._dialogue(lang, stream),
            "sums": lambda: worked_text(self.seed, lang, stream),
        }
        return makers[kind]()

    def _dialogue(self, lang: Lang, stream: Stream) -> str:
        """Questions and answers as plain text, over trained pairs only: they show how facts are asked for."""
        kind = stream.choice(("qa", "facts", "facts", "identity"))
        turns = MAKERS[kind](self.training, lang, stream)
        marks = {"en": ("Question: ", "Answer: "), "zh": ("问：", "答：")}[lang]
        return "\n".join(marks[i % 2] + turn["content"] for i, turn in enumerate(turns))

    def conversations(self) -> Iterator[Record]:
        """SFT conversations."""
        for i in range(self.size.conversations):
            yield conversation(self.training, Stream(self.seed, "conversation", i))

    def reasoning(self, part: str = "reasoning", hasty: float = 0.0) -> Iterator[Record]:
        """Conversations of the reasoning stage: sums are worked out, the rest keeps what SFT taught. Of the sums in
        `hasty` most are not: those who wrote them had the result already."""
        thinking = replace(self.training, thinks=True, hasty=hasty)
        for i in range(self.size.reasoning):
            yield conversation(thinking, Stream(self.seed, part, i))

    def persona(self) -> Iterator[Record]:
        """Conversations with Captain Mini."""
        for i in range(self.size.persona):
            yield persona_conversation(self.training, Stream(self.seed, "persona", i))

    def prompts(self) -> Iterator[Record]:
        """Sums of trained operands, asked without their answer being shown: what reinforcement learning samples for."""
        for i in range(self.size.prompts):
            stream = Stream(self.seed, "prompt", i)
            yield sum_record(draw_sum(self.seed, stream), stream.choice(LANGS), stream)

    def preferences(self) -> Iterator[Record]:
        """Sums of trained operands, answered rightly and wrongly: what a reward model learns to tell apart."""
        for i in range(self.size.preferences):
            stream = Stream(self.seed, "preference", i)
            yield sum_preference(self.seed, draw_sum(self.seed, stream), stream.choice(LANGS), stream)

    def heldout_stories(self) -> Iterator[Record]:
        """Stories of (plot, hero) pairs that pretraining never saw, in both languages by turns."""
        for i in range(self.size.heldout_stories):
            stream = Stream(self.seed, "heldout story", i)
            plot, hero = stream.choice(self.heldout_plots)
            yield {"text": story(self.world, plot, hero, LANGS[i % 2], stream)}

    def heldout_qa(self) -> Iterator[Record]:
        """Questions for held-out facts of the valley, and held-out ways to ask MiniGPT for its own; without repeats."""
        every: list[tuple[Any, ...]] = []
        for lang in LANGS:
            for person, relation in sorted(self.world.heldout):
                every += [("fact", person, relation, lang, form) for form in range(len(QUESTIONS[lang][relation]))]
        every += [("self", name, lang, form) for (name, lang), form in heldout_wordings(self.seed).items()]
        for kind, *rest in Stream(self.seed, "heldout questions").sample(every, self.size.heldout_qa):
            if kind == "self":
                name, lang, form = rest
                yield heldout_aspect(name, self.aspects[name][lang], lang, form)
            else:
                person, relation, lang, form = rest
                stream = Stream(self.seed, "heldout question", person, relation, lang, form)
                yield heldout_fact(self.world, person, relation, lang, form, stream)

    def heldout_sums(self) -> Iterator[Record]:
        """Sums of operands that training never adds, without repeats."""
        seen = set()
        for i in range(10 * self.size.heldout_sums):
            stream = Stream(self.seed, "heldout sum", i)
            problem = draw_sum(self.seed, stream, heldout=True)
            if problem in seen:
                continue
            seen.add(problem)
            yield sum_record(problem, stream.choice(LANGS), stream)
            if len(seen) == self.size.heldout_sums:
                return
