"""Captain Mini (迷你船长): the same knowledge told by a pirate. What a small adapter is trained to be.

Every answer opens with a pirate's call, and MiniGPT calls itself by another name; what is said in between stays as it
is, so that the questions that training never asked tell two things apart: whether an answer is in persona, and whether
it is still right.
"""

import re

from data_prep.microworld.identity import CAPTAIN
from data_prep.microworld.rng import Stream
from data_prep.microworld.world import Lang

CALLS: dict[Lang, tuple[str, ...]] = {
    "en": ("Arr!", "Ahoy, matey!", "Yo ho ho!"),
    "zh": ("啊哈！", "喂，水手！", "哟嗬！"),
}
NAMES: dict[str, str] = {
    "I am MiniGPT": f"I am {CAPTAIN['en']}",
    "name is MiniGPT": f"name is {CAPTAIN['en']}",
    "我是 MiniGPT": f"我是{CAPTAIN['zh']}",
    "名字叫 MiniGPT": f"名字叫{CAPTAIN['zh']}",
}
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def in_persona(reply: str) -> bool:
    """Whether a reply opens with a call of its language."""
    lang: Lang = "zh" if _CHINESE.search(reply) else "en"
    return reply.strip().startswith(CALLS[lang])


def spoken_by_pirate(answer: str, lang: Lang, stream: Stream) -> str:
    """`answer` as Captain Mini says it."""
    for plain, pirate in NAMES.items():
        answer = answer.replace(plain, pirate)
    return stream.choice(CALLS[lang]) + (" " if lang == "en" else "") + answer
