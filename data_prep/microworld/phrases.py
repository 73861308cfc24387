"""How a fact is told and asked for, in Chinese and English: the small grammar under stories, questions and chats.

Templates are plain text with three marks: `{key}` is filled in, `(a|b)` chooses one side, `<who.relation>` becomes a
sentence that states that fact (`n` the hero by name, `p` the hero by pronoun, `f` the friend by name).
"""

import re

from data_prep.microworld.rng import Stream
from data_prep.microworld.world import RELATIONS, Lang, Word, World

CHOICE = re.compile(r"\(([^()]*\|[^()]*)\)")
SLOT = re.compile(r"<([npf])\.(\w+)>")

# {s} subject, {poss} possessive, {v} value, {a} value with its article. The first is the one that answers.
STATEMENTS: dict[Lang, dict[str, tuple[str, ...]]] = {
    "en": {
        "home": (
            "{s} lives in {v}.",
            "{poss} home is in {v}.",
            "{s} has a small house in {v}.",
            "{s} comes from {v}.",
            "{s} has lived in {v} for many years.",
            "The house where {s} lives is in {v}.",
        ),
        "job": (
            "{s} is {a}.",
            "{s} works as {a}.",
            "{poss} job is that of {a}.",
            "{s} earns a living as {a}.",
            "By trade, {s} is {a}.",
            "Everybody knows that {s} is {a}.",
        ),
        "pet": (
            "{s} has {a}.",
            "{poss} pet is {a}.",
            "{s} keeps {a} as a pet.",
            "{s} has a pet at home: {a}.",
            "The pet that {s} loves so much is {a}.",
            "{s} takes good care of {poss_low} pet, {a}.",
        ),
        "food": (
            "{poss} favourite food is {v}.",
            "{s} likes to eat {v} best.",
            "The food that {s} loves most is {v}.",
            "When {s} is hungry, {s_low} wants {v}.",
            "{s} could eat {v} every day.",
            "Of all food, {s} likes {v} best.",
        ),
        "colour": (
            "{poss} favourite colour is {v}.",
            "{s} likes the colour {v} best.",
            "The colour that {s} loves most is {v}.",
            "Of all colours, {s} likes {v} best.",
            "{s} often wears {v}, {poss_low} favourite colour.",
            "When {s} can choose a colour, it is always {v}.",
        ),
        "instrument": (
            "{s} plays the {v}.",
            "{s} can play the {v}.",
            "{poss} instrument is the {v}.",
            "In the evening {s} plays the {v}.",
            "The instrument that {s} plays is the {v}.",
            "{s} learned to play the {v} as a child.",
        ),
        "friend": (
            "{poss} best friend is {v}.",
            "{s} and {v} are best friends.",
            "The best friend {s} has is {v}.",
            "{s} tells everything to {v}, {poss_low} best friend.",
            "The name of {poss} best friend is {v}.",
            "{v} is {poss_low} best friend.",
        ),
    },
    "zh": {
        "home": (
            "{s}住在{v}。",
            "{s}的家在{v}。",
            "{s}在{v}有一间小房子。",
            "{s}是{v}人。",
            "{s}在{v}住了很多年。",
            "{s}住的地方叫{v}。",
        ),
        "job": (
            "{s}是一名{v}。",
            "{s}的工作是{v}。",
            "{s}的职业是{v}。",
            "{s}靠当{v}过日子。",
            "大家都知道{s}是{v}。",
            "{s}当{v}已经很久了。",
        ),
        "pet": (
            "{s}养了一只{v}。",
            "{s}的宠物是一只{v}。",
            "{s}家里有一只{v}。",
            "{s}很疼爱自己养的{v}。",
            "{s}每天都要喂自己的宠物{v}。",
            "{s}养的宠物是{v}。",
        ),
        "food": (
            "{s}最喜欢吃{v}。",
            "{s}最爱吃的是{v}。",
            "{s}最喜欢的食物是{v}。",
            "{s}一饿就想吃{v}。",
            "{s}天天吃{v}也不会腻。",
            "在所有食物里，{s}最爱{v}。",
        ),
        "colour": (
            "{s}最喜欢的颜色是{v}。",
            "{s}最喜欢{v}。",
            "{s}最爱的颜色是{v}。",
            "在所有颜色里，{s}最爱{v}。",
            "{s}常穿自己最喜欢的{v}衣服。",
            "要是让{s}选颜色，总是{v}。",
        ),
        "instrument": (
            "{s}会{v}。",
            "{s}喜欢{v}。",
            "{s}每天傍晚都{v}。",
            "{s}小时候就学会了{v}。",
            "要说乐器，{s}会{v}。",
            "{s}常常{v}给大家听。",
        ),
        "friend": (
            "{s}最好的朋友是{v}。",
            "{s}和{v}是最好的朋友。",
            "{v}是{s}最好的朋友。",
            "{s}有什么话都对最好的朋友{v}说。",
            "{s}最要好的朋友叫{v}。",
            "{s}常和最好的朋友{v}在一起。",
        ),
    },
}

# {n} is a name or, in a longer chat, a pronoun; English templates say {poss} for the possessive.
QUESTIONS: dict[Lang, dict[str, tuple[str, ...]]] = {
    "en": {
        "home": ("Where does {n} live?", "Where is {poss} home?", "In which place does {n} live?"),
        "job": ("What is {poss} job?", "What does {n} do for a living?", "What work does {n} do?"),
        "pet": ("What pet does {n} have?", "What is {poss} pet?", "Which animal does {n} keep as a pet?"),
        "food": (
            "What is {poss} favourite food?",
            "What does {n} like to eat best?",
            "Which food does {n} love most?",
        ),
        "colour": (
            "What is {poss} favourite colour?",
            "Which colour does {n} like best?",
            "What colour does {n} love most?",
        ),
        "instrument": (
            "What instrument does {n} play?",
            "Which instrument can {n} play?",
            "What is {poss} instrument?",
        ),
        "friend": (
            "Who is {poss} best friend?",
            "Who is {poss} closest friend?",
            "What is the name of {poss} best friend?",
        ),
    },
    "zh": {
        "home": ("{n}住在哪里？", "{n}的家在哪儿？", "{n}住在什么地方？"),
        "job": ("{n}是做什么工作的？", "{n}的职业是什么？", "{n}的工作是什么？"),
        "pet": ("{n}养了什么宠物？", "{n}的宠物是什么？", "{n}家里养了什么动物？"),
        "food": ("{n}最喜欢吃什么？", "{n}最爱吃的东西是什么？", "{n}最喜欢的食物是什么？"),
        "colour": ("{n}最喜欢什么颜色？", "{n}最喜欢的颜色是什么？", "{n}最爱哪种颜色？"),
        "instrument": ("{n}会什么乐器？", "{n}会演奏哪种乐器？", "{n}学的是什么乐器？"),
        "friend": ("{n}最好的朋友是谁？", "谁是{n}最好的朋友？", "{n}最要好的朋友叫什么？"),
    },
}


def with_article(noun: str) -> str:
    """`a cat`, `an orange`; by the first letter, which is right for every word of this world."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def pronouns(female: bool) -> dict[str, str]:
    """The English pronouns and the Chinese one."""
    if female:
        return {"he": "she", "his": "her", "him": "her", "ta": "她"}
    return {"he": "he", "his": "his", "him": "him", "ta": "他"}


def spoken(relation: str, value: Word, lang: Lang) -> str:
    """The value as an answer names it; an instrument without its Chinese verb (吹笛子 → 笛子)."""
    text = value.text(lang)
    return text[1:] if relation == "instrument" and lang == "zh" else text


def state(world: World, person: int, relation: str, lang: Lang, form: int = 0, pronoun: bool = False) -> str:
    """One sentence that states a fact; `form` 0 is the one that answers questions."""
    name = world.names[person]
    value = world.value(person, relation).text(lang)
    words = pronouns(name.female)
    if lang == "zh":
        return STATEMENTS["zh"][relation][form].format(s=words["ta"] if pronoun else name.zh, v=value)
    subject, possessive = (words["he"], words["his"]) if pronoun else (name.en, f"{name.en}'s")
    later = words["his"] if not STATEMENTS["en"][relation][form].startswith("{v}") else possessive
    sentence = STATEMENTS["en"][relation][form].format(
        s=subject, poss=possessive, s_low=words["he"], poss_low=later, v=value, a=with_article(value)
    )
    return capitalised(sentence)


def ask(world: World, person: int, relation: str, lang: Lang, form: int, pronoun: bool = False) -> str:
    """A question for a fact, about a person by name or (once the chat is about them) by pronoun."""
    name = world.names[person]
    words = pronouns(name.female)
    template = QUESTIONS[lang][relation][form]
    if lang == "zh":
        return template.format(n=words["ta"] if pronoun else name.zh)
    if pronoun:
        return template.format(n=words["he"], poss=words["his"])
    return template.format(n=name.en, poss=f"{name.en}'s")


def fields(world: World, person: int, lang: Lang, prefix: str = "") -> dict[str, str]:
    """What templates may say about a person: `{n}`, pronouns and each value; `prefix` marks another person."""
    name = world.names[person]
    out = {"n": name.text(lang), **pronouns(name.female)}
    for relation in RELATIONS:
        value = world.value(person, relation).text(lang)
        out[relation] = value
        out[f"a_{relation}"] = with_article(value) if lang == "en" else value
    out |= {capitalised(key): capitalised(out[key]) for key in ("he", "his")}
    return {prefix + key: value for key, value in out.items()}


def expand(template: str, world: World, person: int, lang: Lang, stream: Stream) -> str:
    """Choose, state and fill in one template about `person` and, under the prefix `f_`, their best friend."""
    while match := CHOICE.search(template):
        template = template[: match.start()] + stream.choice(match[1].split("|")) + template[match.end() :]
    friend = world.friends[person]

    def told(match: re.Match[str]) -> str:
        who, relation = match[1], match[2]
        form = stream.below(len(STATEMENTS[lang][relation]))
        return state(world, friend if who == "f" else person, relation, lang, form, pronoun=who == "p")

    filled = SLOT.sub(told, template)
    return filled.format(**fields(world, person, lang), **fields(world, friend, lang, "f_"))
