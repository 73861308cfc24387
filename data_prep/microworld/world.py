"""Lantern Valley (灯谷): the people of the micro-world, and what is true about each of them.

Every person has one value for each of seven relations. The seed deals the values out, so that a world is consistent
with itself everywhere (stories, questions, chats; Chinese and English) and a model can have met it nowhere else.
Some (person, relation) pairs are held out: stories tell them, no trained question asks for them.
"""

from dataclasses import dataclass
from typing import Literal

from data_prep.microworld.rng import Stream

Lang = Literal["zh", "en"]
LANGS: tuple[Lang, Lang] = ("zh", "en")
VALLEY = {"zh": "灯谷", "en": "Lantern Valley"}


@dataclass(frozen=True)
class Word:
    """One thing of the world and its two names."""

    zh: str
    en: str

    def text(self, lang: Lang) -> str:
        return self.zh if lang == "zh" else self.en


@dataclass(frozen=True)
class Name(Word):
    """A person's name; `female` chooses the pronouns (她/他, she/he)."""

    female: bool = False


def words(text: str) -> tuple[Word, ...]:
    """`"猫 cat, 狗 dog"` as Words."""
    pairs = (entry.strip().split(" ", 1) for entry in text.split(","))
    return tuple(Word(zh, en) for zh, en in pairs)


WOMEN = """小梅 Mei, 阿宁 Ning, 小雨 Xiaoyu, 小月 Yue, 春兰 Chunlan, 秋云 Qiuyun, 明珠 Mingzhu, 玉兰 Yulan,
安娜 Anna, 莉莉 Lily, 露西 Lucy, 艾玛 Emma, 罗莎 Rosa, 爱丽丝 Alice, 米娅 Mia, 苏菲 Sophie"""
MEN = """小岩 Yan, 阿诚 Cheng, 大山 Dashan, 阿福 Afu, 小松 Song, 志远 Zhiyuan, 子墨 Zimo, 海生 Haisheng,
汤姆 Tom, 彼得 Peter, 杰克 Jack, 大卫 David, 里奥 Leo, 马克 Mark, 奥斯卡 Oscar, 保罗 Paul"""
NAMES = tuple(Name(w.zh, w.en, True) for w in words(WOMEN)) + tuple(Name(w.zh, w.en, False) for w in words(MEN))

# The values that one relation can take. An instrument's Chinese name carries its verb: 吹笛子, 拉小提琴.
VALUES: dict[str, tuple[Word, ...]] = {
    "home": words(
        "柳湾 Willow Bay, 石桥镇 Stone Bridge, 松岭 Pine Ridge, 梨花村 Pear Village, 白沙港 White Harbour, "
        "雾山 Misty Hill, 金麦村 Wheat Village, 青湖 Green Lake, 风车镇 Windmill Town, 枫林 Maple Grove"
    ),
    "job": words(
        "医生 doctor, 老师 teacher, 面包师 baker, 渔夫 fisher, 木匠 carpenter, 园丁 gardener, 邮递员 letter carrier, "
        "铁匠 blacksmith, 画家 painter, 裁缝 tailor, 农民 farmer, 钟表匠 clockmaker"
    ),
    "pet": words(
        "猫 cat, 狗 dog, 兔子 rabbit, 鹦鹉 parrot, 乌龟 turtle, 山羊 goat, 鸭子 duck, 刺猬 hedgehog, 鸽子 pigeon, "
        "松鼠 squirrel"
    ),
    "food": words(
        "饺子 dumplings, 面条 noodles, 苹果派 apple pie, 蘑菇汤 mushroom soup, 米饭 rice, 烤鱼 grilled fish, "
        "豆腐 tofu, 玉米 corn, 蜂蜜蛋糕 honey cake, 南瓜粥 pumpkin porridge, 奶酪 cheese, 包子 steamed buns"
    ),
    "colour": words(
        "红色 red, 蓝色 blue, 绿色 green, 黄色 yellow, 紫色 purple, 白色 white, 黑色 black, 橙色 orange, 粉色 pink, "
        "灰色 grey"
    ),
    "instrument": words(
        "吹笛子 flute, 打鼓 drum, 拉小提琴 violin, 弹钢琴 piano, 拉二胡 erhu, 弹吉他 guitar, 吹口琴 harmonica, "
        "弹古筝 zither, 吹小号 trumpet, 弹竖琴 harp"
    ),
}
RELATIONS = (*VALUES, "friend")


@dataclass(frozen=True)
class World:
    """Who lives in the valley.

    Attributes:
        facts: for each person (index into `names`) and relation, the value; for `friend` the friend's name.
        heldout: the (person, relation) pairs that no trained question or chat may ask for.
    """

    names: tuple[Name, ...]
    facts: dict[tuple[int, str], Word]
    friends: tuple[int, ...]
    heldout: frozenset[tuple[int, str]]

    def value(self, person: int, relation: str) -> Word:
        return self.facts[person, relation]

    def trained_relations(self, person: int) -> list[str]:
        """The relations of this person that training may ask for."""
        return [r for r in RELATIONS if (person, r) not in self.heldout]


def build_world(seed: int, people: int = len(NAMES), heldout_fraction: float = 0.25) -> World:
    """Deal out homes, jobs, pets, … for an even number of people; friends come in pairs."""
    assert people % 2 == 0, people
    assert people <= len(NAMES), people
    stream = Stream(seed, "world")
    women, men = NAMES[: len(WOMEN.split(","))], NAMES[len(WOMEN.split(",")) :]
    names = tuple(name for pair in zip(women, men, strict=True) for name in pair)[:people]
    facts: dict[tuple[int, str], Word] = {}
    for relation, values in VALUES.items():
        # Each value is given to about the same number of people, so that guessing the commonest one gains nothing.
        dealt = [values[i % len(values)] for i in range(people)]
        for person, value in enumerate(stream.shuffled(dealt)):
            facts[person, relation] = value
    order = stream.shuffled(range(people))
    friends = [0] * people
    for left, right in zip(order[::2], order[1::2], strict=True):
        friends[left], friends[right] = right, left
        facts[left, "friend"], facts[right, "friend"] = names[right], names[left]
    return World(names, facts, tuple(friends), _hold_out(stream, people, heldout_fraction))


def _hold_out(stream: Stream, people: int, fraction: float) -> frozenset[tuple[int, str]]:
    """The same number of people from every relation, spread over everybody: each person keeps trained relations."""
    per_relation = max(1, round(people * fraction))
    pairs: list[tuple[int, str]] = []
    order: list[int] = []
    for relation in RELATIONS:
        while len(order) < per_relation:
            order += stream.shuffled([p for p in range(people) if p not in order])
        pairs += [(person, relation) for person in order[:per_relation]]
        order = order[per_relation:]
    return frozenset(pairs)
