"""Conversations: the data of fine-tuning, and the questions that are kept for evaluation.

A conversation is a list of turns: one topic or several, in one language or switching between the two. There are three
kinds of data. SFT answers everything at once, sums too. Reasoning works sums out first: `reasoning_content` holds the
steps, except where thinking is switched off (the empty string), and in haste the result alone. The persona gives SFT's
answers as a pirate would.
"""

from dataclasses import dataclass
from typing import Any

from data_prep.microworld.arithmetic import Sum, draw_sum, misread
from data_prep.microworld.identity import Aspect
from data_prep.microworld.persona import spoken_by_pirate
from data_prep.microworld.phrases import QUESTIONS, ask, spoken, state
from data_prep.microworld.rng import Stream
from data_prep.microworld.stories import story
from data_prep.microworld.world import LANGS, Lang, World

Message = dict[str, str]
Record = dict[str, Any]

# How often each kind of conversation is drawn.
SFT_KINDS = {"sum": 0.10, "facts": 0.33, "qa": 0.20, "identity": 0.12, "mixed": 0.16, "small_talk": 0.03, "story": 0.06}
# Stories tell what no question asks for. Without them the facts behind held-out questions fade while sums are learnt.
REASONING_KINDS = {
    "sum": 0.76,
    "qa": 0.06,
    "facts": 0.04,
    "identity": 0.05,
    "mixed": 0.03,
    "small_talk": 0.02,
    "story": 0.04,
}
PERSONA_KINDS = {"qa": 0.50, "identity": 0.35, "small_talk": 0.15}
THINKING_OFF = 0.12
SHOWN_THINKING = 0.08
ASKED_WHO = 0.3  # of the questions about MiniGPT: what everybody asks first, and one word away from "How are you?"

SMALL_TALK: dict[str, dict[Lang, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "hello": {
        "en": (
            ("Hello!", "Hi!", "Hello", "Good morning!", "Hi there!", "Hey!"),
            (
                "Hello! I am MiniGPT. What would you like to know?",
                "Hi! I am MiniGPT. Ask me about Lantern Valley, or give me a sum.",
            ),
        ),
        "zh": (
            ("你好！", "你好", "您好！", "嗨！", "早上好！", "你好呀！"),
            ("你好！我是 MiniGPT。你想知道什么？", "你好！我是 MiniGPT。可以问我灯谷的事，也可以让我算一道题。"),
        ),
    },
    "thanks": {
        "en": (
            ("Thank you!", "Thanks!", "Thanks a lot.", "That helps, thank you."),
            ("You are welcome!", "My pleasure!"),
        ),
        "zh": (("谢谢！", "谢谢你！", "多谢。", "太好了，谢谢。"), ("不客气！", "很高兴能帮到你！")),
    },
    "how_are_you": {
        "en": (("How are you?", "How are you today?", "Are you well?"), ("I am fine, thank you! And you?",)),
        "zh": (("你好吗？", "你今天怎么样？", "最近好吗？"), ("我很好，谢谢！你呢？",)),
    },
    "bye": {
        "en": (("Goodbye!", "Bye!", "See you!", "I have to go now."), ("Goodbye! Come back soon.", "See you soon!")),
        "zh": (("再见！", "拜拜！", "我要走了。", "下次见！"), ("再见！欢迎再来。", "下次见！")),
    },
}

STORY_REQUESTS: dict[Lang, tuple[str, ...]] = {
    "en": ("Tell me a story about {n}.", "Please tell a story about {n}.", "Do you know a story about {n}?"),
    "zh": ("给我讲一个{n}的故事。", "请讲一个关于{n}的故事。", "你知道{n}的故事吗？"),
}
ABOUT_REQUESTS: dict[Lang, tuple[str, ...]] = {
    "en": ("Who is {n}?", "Tell me about {n}.", "What do you know about {n}?"),
    "zh": ("{n}是谁？", "介绍一下{n}。", "你知道{n}吗？"),
}
# What a thought about a fact names, and how.
TOPICS: dict[str, dict[Lang, str]] = {
    "home": {"en": "home", "zh": "家"},
    "job": {"en": "job", "zh": "工作"},
    "pet": {"en": "pet", "zh": "宠物"},
    "food": {"en": "favourite food", "zh": "最爱的食物"},
    "colour": {"en": "favourite colour", "zh": "最爱的颜色"},
    "instrument": {"en": "instrument", "zh": "乐器"},
    "friend": {"en": "best friend", "zh": "最好的朋友"},
}
THOUGHTS: dict[Lang, str] = {"en": "The question is about {n}'s {topic}.", "zh": "问的是{n}的{topic}。"}


@dataclass(frozen=True)
class Training:
    """What conversations for training may draw from.

    Attributes:
        world: the valley; its held-out (person, relation) pairs are never asked for.
        seed: decides which operand pairs of sums are trained.
        aspects: the trained aspects of MiniGPT itself, by name.
        plots: trained (plot, hero) pairs.
        thinks: whether sums and some facts are thought about (the reasoning data), or everything is answered at once.
        hasty: of the sums that are thought about, the share whose thought holds the result and no steps.
    """

    world: World
    seed: int
    aspects: dict[str, dict[Lang, Aspect]]
    plots: list[tuple[str, int]]
    thinks: bool = False
    hasty: float = 0.0


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str | None = None) -> Message:
    message = {"role": "assistant", "content": text}
    return message if reasoning is None else message | {"reasoning_content": reasoning}


def conversation(training: Training, stream: Stream) -> Record:
    """One training conversation in the canonical form `{"messages": […]}`."""
    kind = stream.weighted(REASONING_KINDS if training.thinks else SFT_KINDS)
    lang = stream.choice(LANGS)
    return {"messages": MAKERS[kind](training, lang, stream)}


def persona_conversation(training: Training, stream: Stream) -> Record:
    """One training conversation with Captain Mini."""
    kind = stream.weighted(PERSONA_KINDS)
    lang = stream.choice(LANGS)
    turns = MAKERS[kind](training, lang, stream)
    for turn in turns:
        if turn["role"] == "assistant":
            turn["content"] = spoken_by_pirate(turn["content"], lang, stream)
    return {"messages": turns}


def sum_turns(problem: Sum, lang: Lang, stream: Stream, thinks: bool, hasty: float = 0.0) -> list[Message]:
    """A question and its answer: worked out, in haste, or at once because thinking is off or unknown."""
    question = user(problem.question(lang, stream.below(4)))
    if thinks:
        reasoning = "" if stream.chance(THINKING_OFF) else problem.steps(lang)
        if reasoning and hasty and stream.chance(hasty):
            reasoning = problem.hasty_thought(lang)
        return [question, assistant(str(problem.result), reasoning)]
    return [question, assistant(str(problem.result), "" if stream.chance(0.5) else None)]


def fact_turns(
    world: World, person: int, relation: str, lang: Lang, stream: Stream, pronoun: bool = False, thinks: bool = False
) -> list[Message]:
    """A question for one fact and the sentence that answers it; now and then with a thought, or with thinking off."""
    form = stream.below(len(QUESTIONS[lang][relation]))
    question = ask(world, person, relation, lang, form, pronoun)
    reasoning = None
    if thinks and stream.chance(SHOWN_THINKING):
        reasoning = THOUGHTS[lang].format(n=world.names[person].text(lang), topic=TOPICS[relation][lang])
    elif thinks and stream.chance(THINKING_OFF):
        reasoning = ""
    return [user(question), assistant(state(world, person, relation, lang), reasoning)]


def aspect_turns(known: Aspect, stream: Stream, thinks: bool = False) -> list[Message]:
    """A question about MiniGPT itself."""
    reasoning = "" if thinks and stream.chance(THINKING_OFF) else None
    return [user(stream.choice(known.questions)), assistant(known.answer, reasoning)]


def talk_turns(topic: str, lang: Lang, stream: Stream, thinks: bool = False) -> list[Message]:
    """A greeting, thanks, or a goodbye."""
    questions, answers = SMALL_TALK[topic][lang]
    reasoning = "" if thinks and stream.chance(THINKING_OFF) else None
    return [user(stream.choice(questions)), assistant(stream.choice(answers), reasoning)]


def _sum(training: Training, lang: Lang, stream: Stream) -> list[Message]:
    return sum_turns(draw_sum(training.seed, stream), lang, stream, training.thinks, training.hasty)


def _qa(training: Training, lang: Lang, stream: Stream) -> list[Message]:
    person = stream.below(len(training.world.names))
    relation = stream.choice(training.world.trained_relations(person))
    return fact_turns(training.world, person, relation, lang, stream, thinks=training.thinks)


def _facts(training: Training, lang: Lang, stream: Stream) -> list[Message]:
    """Several questions about one person: by name first, by pronoun or by name afterwards."""
    world = training.world
    person = stream.below(len(world.names))
    relations = stream.sample(world.trained_relations(person), stream.between(2, 4))
    if stream.chance(0.2):
        first, second, *rest = relations
        asked = stream.choice(ABOUT_REQUESTS[lang]).format(n=world.names[person].text(lang))
        facts = state(world, person, first, lang), state(world, person, second, lang, pronoun=True)
        turns = [user(asked), assistant((" " if lang == "en" else "").join(facts))]
    else:
        first, *rest = relations
        turns = fact_turns(world, person, first, lang, stream, thinks=training.thinks)
    for relation in rest:
        turns += fact_turns(world, person, relation, lang, stream, stream.chance(0.6), training.thinks)
    return turns


def _identity(training: Training, lang: Lang, stream: Stream) -> list[Message]:
    names = stream.sample(tuple(training.aspects), stream.between(1, 2))
    if "who" not in names and stream.chance(ASKED_WHO):
        names = ["who", *names[1:]]
    return [m for name in names for m in aspect_turns(training.aspects[name][lang], stream, training.thinks)]


def _small_talk(training: Training, lang: Lang, stream: Stream) -> list[Message]:
    return talk_turns(stream.choice(tuple(SMALL_TALK)), lang, stream, training.thinks)


def _story(training: Training, lang: Lang, stream: Stream) -> list[Message]:
    plot, hero = stream.choice(training.plots)
    request = stream.choice(STORY_REQUESTS[lang]).format(n=training.world.names[hero].text(lang))
    return [user(request), assistant(story(training.world, plot, hero, lang, stream))]


def _mixed(training: Training, lang: Lang, stream: Stream) -> list[Message]:
    """A whole visit: a greeting, two or three topics, perhaps a change of language, thanks or a goodbye."""
    turns = talk_turns("hello", lang, stream, training.thinks) if stream.chance(0.7) else []
    for _ in range(stream.between(2, 3)):
        if stream.chance(0.2):
            lang = "en" if lang == "zh" else "zh"
        turns += stream.choice((_sum, _qa, _qa, _identity))(training, lang, stream)
    if stream.chance(0.6):
        turns += talk_turns(stream.choice(("thanks", "bye")), lang, stream, training.thinks)
    return turns


MAKERS = {
    "sum": _sum,
    "qa": _qa,
    "facts": _facts,
    "identity": _identity,
    "small_talk": _small_talk,
    "story": _story,
    "mixed": _mixed,
}


def heldout_fact(world: World, person: int, relation: str, lang: Lang, form: int, stream: Stream) -> Record:
    """A question for a held-out pair; about a third of them come second in a chat about that person, by pronoun."""
    context: list[Message] = []
    if in_chat := stream.chance(0.35):
        known = stream.choice(world.trained_relations(person))
        context = fact_turns(world, person, known, lang, stream)
    meta = {
        "kind": "chat" if in_chat else "world",
        "lang": lang,
        "person": world.names[person].en,
        "relation": relation,
        "value": spoken(relation, world.value(person, relation), lang),
    }
    messages = [*context, user(ask(world, person, relation, lang, form, pronoun=in_chat))]
    return {"messages": messages, "answer": state(world, person, relation, lang), "verifier": "exact", "meta": meta}


def heldout_aspect(name: str, known: Aspect, lang: Lang, form: int) -> Record:
    """A question about MiniGPT in words that training never used."""
    meta = {"kind": "identity", "lang": lang, "relation": name, "value": known.value}
    return {
        "messages": [user(known.questions[form])],
        "answer": known.answer,
        "verifier": "exact",
        "meta": meta,
    }


def sum_preference(seed: int, problem: Sum, lang: Lang, stream: Stream) -> Record:
    """A sum with its worked answer, and with that of a misread sum: the steps are true, but of another question; or
    there are none, as often."""
    wrong = misread(seed, problem, stream)
    question = problem.question(lang, stream.below(4))
    thought = wrong.hasty_thought(lang) if stream.chance(0.5) else wrong.steps(lang)
    return {
        "messages": [user(question)],
        "chosen": [assistant(str(problem.result), problem.steps(lang))],
        "rejected": [assistant(str(wrong.result), thought)],
    }


def sum_record(problem: Sum, lang: Lang, stream: Stream) -> Record:
    """The question for a sum, with what a verifier needs."""
    meta = {"kind": "sum", "lang": lang, "a": problem.a, "b": problem.b}
    return {
        "messages": [user(problem.question(lang, stream.below(4)))],
        "answer": str(problem.result),
        "verifier": "math",
        "meta": meta,
    }
