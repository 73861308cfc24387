"""Short stories and portraits of Lantern Valley: the text of pretraining.

Every story is about one person and their best friend and says several facts about both. The plots are the same in both
languages, told in each as one would tell them there. A (plot, hero) pair that is held out is never trained on.
"""

from data_prep.microworld.phrases import STATEMENTS, expand, pronouns, state
from data_prep.microworld.rng import Stream
from data_prep.microworld.world import RELATIONS, VALLEY, VALUES, Lang, World

PLOTS: dict[str, dict[Lang, str]] = {
    "lost_pet": {
        "en": """<n.home> One (cold|warm|foggy|windy) morning {he} woke up and could not find {his} {pet}. <n.job>
That day {he} did not go to work. {He} looked (under the bed|behind the stove|on the roof), (in the garden|by the
well|along the river), but the {pet} was not there. So {n} ran to {friend}, {his} best friend. <f.job> The two
friends searched all of {home}. At last they heard a small sound (under the old bridge|in the tall grass|behind the
mill). There was the {pet}, wet and hungry! {n} wrapped it in a {colour} scarf, for <p.colour_in> That evening they
all ate {food} by the fire, and {n} played the {instrument} until it was late.""",
        "zh": """<n.home>一个(寒冷|温暖|有雾|刮风)的早晨，{ta}醒来，发现自己的{pet}不见了。<n.job>
可是那天{ta}没有去干活。{ta}找遍了(床底下|灶台后面|屋顶上)，又去(院子里|井边|河边)找，还是没有{pet}的影子。
{n}只好跑去找最好的朋友{friend}。<f.job>两个朋友把{home}找了个遍。最后，
他们听见(旧桥下面|高高的草丛里|磨坊后面)有轻轻的声音，原来{pet}就在那里，又湿又饿！
{n}用一条{colour}的围巾把它包起来，因为<p.colour>晚上，大家围着火炉吃{food}，{n}还{instrument}，一直到深夜。""",
    },
    "birthday": {
        "en": """It was {n}'s birthday. <n.job> All day {he} worked as always and told nobody. But {friend} had not
forgotten. <f.home> {friend} walked (for two hours|over the hills|through the rain) with a (box|basket|bag) tied
with a {colour} ribbon, because <n.colour_in> In it was (a big pot|a whole bowl|plenty) of {food}. "How did you
know?" asked {n}. "(Everybody knows|I have always known|That was easy)," said {friend}. <n.food> They ate together,
and the {pet} got a little too. <n.pet> Then {n} played the {instrument} and {friend} sang. It was (the best
birthday in years|a birthday to remember|a very happy evening) in {home}.""",
        "zh": """今天是{n}的生日。<n.job>{ta}像平时一样干了一天活，谁也没有告诉。可是{friend}没有忘记。<f.home>
{friend}(走了两个小时|翻过小山|冒着雨)来了，手里提着一个(盒子|篮子|袋子)，上面系着{colour}的带子，因为<n.colour>
里面装着(满满一锅|一大碗|好多)热乎乎的{food}。“你怎么知道的？”{n}问。“(大家都知道|我一直记得|这还不容易)。”
{friend}说。<n.food>他们一起吃，{pet}也分到了一点。<n.pet>后来{n}{instrument}，{friend}唱歌。在{home}，
这真是(多年来最好的生日|难忘的生日|快乐的一晚)。""",
    },
    "storm": {
        "en": """A great storm came over {home}. (The wind shook the trees.|Rain beat on the windows.|The river
rose and rose.) {n} sat inside with {his} {pet}. <n.job> But nobody came that day. The {pet} was afraid, so {n}
played the {instrument} for it. <n.instrument> Suddenly there was a knock at the door. It was {friend}, wet to the
skin. <n.friend> {n} gave {friend} a dry {colour} coat and made {food}. <n.food> "(What good luck|How nice|I am so
glad) that you live here in {home}," said {friend}. They (talked|laughed|told stories) until the storm was over. In
the morning the sky was clear, and {friend} went home to {f_home}. <f.pet> It had waited all night at the door.""",
        "zh": """一场大暴雨来到了{home}。(大风摇着树。|雨点打在窗户上。|河水越涨越高。){n}和自己的{pet}坐在屋里。
<n.job>可是那天一个人也没有来。{pet}很害怕，{n}就{instrument}给它听。<n.instrument>忽然有人敲门。
原来是{friend}，浑身都湿透了。<n.friend>{n}给{friend}拿来一件{colour}的干外套，又做了{food}。<n.food>
“(真幸运|真好|太好了)，你住在{home}。”{friend}说。他们(聊天|说笑|讲故事)，直到雨停。早上天晴了，
{friend}回到{f_home}的家。<f.pet>它在门口等了整整一夜。""",
    },
    "market": {
        "en": """On market day {n} got up early. <n.job> <p.home> From there it is (an hour|a long walk|half a day)
to the market of the valley. {He} wanted to buy only two things: some {food} for dinner and a {colour}
(hat|cup|blanket). <n.food> <n.colour> At the market {he} met {friend}. <n.friend> <f.job> "Come and eat with me,"
said {n}. On the way home they bought (a carrot|some seeds|an apple) for {n}'s {pet}. <n.pet> In the evening the
neighbours heard music from the house. <n.instrument> (Nobody minded.|They opened their windows.|Even the birds were
quiet.)""",
        "zh": """赶集那天，{n}很早就起床了。<n.job><p.home>从那里到山谷的集市要(走一个小时|走很远|走半天)。
{ta}只想买两样东西：晚饭吃的{food}，还有一(顶帽子|个杯子|条毯子)，要{colour}的。<n.food><n.colour>在集市上，
{ta}碰见了{friend}。<n.friend><f.job>“来和我一起吃饭吧。”{n}说。回家的路上，
他们还给{n}的{pet}买了(胡萝卜|一些种子|一个苹果)。<n.pet>傍晚，邻居们听见屋里传来音乐声。<n.instrument>
(谁也不嫌吵。|大家都打开了窗户。|连小鸟也安静下来了。)""",
    },
    "new_neighbour": {
        "en": """"Who is the new neighbour?" the people of {home} asked. It was {n}. <p.job> <n.pet> The {pet} sat
(in the window|on the steps|by the door) and looked at everyone. On the first evening {n} hung a {colour} lamp over
the door. <n.colour> Then {he} invited the whole street and cooked a huge pot of {food}. <p.food> The guests asked
for music, so {n} played the {instrument}. <n.instrument> "Do you have friends here?" a (boy|girl|old man) asked.
"My best friend is {friend}," said {n}. <f.home> (By midnight|After that night|From that day on) {n} had many
friends in {home}.""",
        "zh": """“新来的邻居是谁？”{home}的人们问。原来是{n}。<p.job><n.pet>{pet}坐在(窗台上|台阶上|门边)，
看着每一个人。第一天晚上，{n}在门上挂了一盏{colour}的灯。<n.colour>然后{ta}请来整条街的人，煮了一大锅{food}。
<p.food>客人们想听音乐，{n}就{instrument}。<n.instrument>“你在这里有朋友吗？”一个(男孩|女孩|老人)问。
“我最好的朋友是{friend}。”{n}说。<f.home>(到了半夜|那一晚以后|从那天起)，{n}在{home}就有了很多朋友。""",
    },
    "festival": {
        "en": """Every autumn {valley} has its festival of lanterns. {n} made a {colour} lantern. <n.colour>
{friend} made one that was {f_colour}. <f.colour> The two best friends carried them (down to the river|up the
hill|through the streets) of {home}. <n.home> {n}'s {pet} walked in front. <n.pet> There was food for everyone, but
{n} looked only for {food}. <p.food> Later there was music. <n.instrument> <f.instrument> They played together, and
people danced. "(You are|You really are) a good {job}," said {friend}, "but you are (an even better friend|a better
musician still)." Then they danced too.""",
        "zh": """每年秋天，{valley}都有灯笼节。{n}做了一盏{colour}的灯笼。<n.colour>
{friend}做的灯笼是{f_colour}的。<f.colour>这两个最好的朋友提着灯笼，走过{home}的(河边|山坡|街道)。<n.home>
{n}的{pet}走在前面。<n.pet>那里有各种好吃的，可是{n}只找{food}。<p.food>后来大家奏起音乐。<n.instrument>
<f.instrument>他们一起演奏，人们跳起舞来。“你(是|真是)个好{job}，”{friend}说，“更是(一个好朋友|一个好乐手)。”""",
    },
    "school_visit": {
        "en": """The children of {home} wanted to know what grown-ups do all day. So {n} came to the school.
<n.job> "Is it hard to be {a_job}?" asked a (girl|boy). "(Sometimes|Only in winter|Not if you like it)," said {n}.
<n.home> <n.friend> "And what do you do in the evening?" asked (another|a small) child. {n} took out {his}
instrument and played. <p.instrument> Then {he} told them about {his} {pet}. <n.pet> It (sleeps on the bed|eats from
the table|follows {him} everywhere). At noon they all had {food}. <n.food> The children drew pictures for {n}, all
of them in {colour}. <n.colour>""",
        "zh": """{home}的孩子们想知道大人们一天都做什么。于是{n}来到了学校。<n.job>“当{job}难吗？”
一个(女孩|男孩)问。“(有时候难|只有冬天难|喜欢就不难)。”{n}说。<n.home><n.friend>“那你晚上做什么呢？”
(另一个|一个小小的)孩子问。{n}拿出自己的乐器演奏起来。<p.instrument>然后{ta}讲起自己的{pet}。<n.pet>
它(睡在床上|在桌边吃东西|到处跟着{ta})。中午，大家一起吃{food}。<n.food>孩子们给{n}画了画，全是{colour}的。
<n.colour>""",
    },
    "journey": {
        "en": """{n} had not seen {friend} for (a month|a whole year|a long time). <n.friend> <n.home> <f.home> So
{n} left {home} and set out for {f_home} with {his} {pet}. <n.pet> {He} wore a {colour} coat and carried some {food}
for the road. <n.colour> <p.food> At night {he} slept (in a barn|under the stars|at an inn) and played the
{instrument}. When {he} came to {f_home}, {friend} was at work. <f.job> "You came!" cried {friend}. "Who does your
work now?" <n.job> "It can wait," said {n}. {friend} cooked {f_food}. <f.food> (They were happy.|It was a good
day.|The road had been worth it.)""",
        "zh": """{n}已经有(一个月|整整一年|很久)没有见到{friend}了。<n.friend><n.home><f.home>
于是{n}带着自己的{pet}离开{home}，向{f_home}走去。<n.pet>{ta}穿着{colour}的外套，路上带了一些{food}。<n.colour>
<p.food>夜里，{ta}睡在(谷仓里|星空下|客店里)，还{instrument}。{ta}到{f_home}的时候，{friend}正在干活。<f.job>
“你来啦！”{friend}喊道，“那谁来干你的活呢？”<n.job>“可以等一等。”{n}说。{friend}做了{f_food}。<f.food>
(他们都很高兴。|这真是美好的一天。|这一趟没有白走。)""",
    },
    "contest": {
        "en": """There was a music contest in {home}. {n} wanted to play, but {he} was (shy|nervous|afraid).
<n.instrument> "I am only {a_job}," {he} said. <n.job> "You play the {instrument} better than anyone," said
{friend}. <n.friend> <f.instrument> So they went together. {n} wore {colour}, {his} favourite colour. The first
prize was (a basket|a plate|a cart) full of {food}, and <n.food_in> {n} closed {his} eyes and thought of {his} {pet}
at home. <n.pet> Then {he} played. (At first it was quiet.|Nobody moved.|Somebody began to cry.) In the end {n} won.
{He} shared the {food} with {friend} and with all of {home}. <n.home>""",
        "zh": """{home}要举行音乐比赛。{n}想参加，可是{ta}很(害羞|紧张|害怕)。<n.instrument>“我只是一名{job}。”
{ta}说。<n.job>“谁也没有你演奏得好。”{friend}说。<n.friend><f.instrument>于是他们一起去了。
{n}穿着{colour}的衣服，那是{ta}最喜欢的颜色。一等奖是(一篮子|一大盘|一车){food}。<n.food>{n}闭上眼睛，
想着家里的{pet}。<n.pet>然后{ta}开始{instrument}。(开始时很安静。|谁也没有动。|有人流下了眼泪。)最后{n}赢了。
{ta}把{food}分给{friend}，也分给{home}的每一个人。<n.home>""",
    },
    "winter": {
        "en": """In winter the snow lies deep in {home}. <n.home> {n} could not go out. <n.job> There was
(little|no) work to do, so {he} painted {his} whole room {colour}. <n.colour> The {pet} got (some|a little) paint on
its back. <n.pet> When {friend} came to visit, {he} laughed out loud. "Your {pet} is {colour} too!" <n.friend> {n}
put a pot of {food} on the stove. <n.food> <f.food> After dinner they sat together, and {n} played the {instrument}.
<n.instrument> "(When spring comes|When the snow melts|Next summer)," said {friend}, "you must come to {f_home}."
<f.home>""",
        "zh": """冬天，{home}的雪很深。<n.home>{n}出不了门。<n.job>(没有什么活可干|没有活干)，
{ta}就把整个房间漆成了{colour}。<n.colour>{pet}的背上也沾了(一些|一点)颜料。<n.pet>{friend}来做客的时候，
{n}自己也笑了：“我的{pet}也变成{colour}的了！”<n.friend>{n}在炉子上煮了一锅{food}。<n.food><f.food>吃过晚饭，
他们坐在一起，{n}{instrument}给朋友听。<n.instrument>“(等春天来了|等雪化了|明年夏天)，”{friend}说，
“你一定要来{f_home}。”<f.home>""",
    },
}

TITLES: dict[Lang, dict[str, str]] = {
    "en": {
        "lost_pet": "The lost {pet}",
        "birthday": "{n}'s birthday",
        "storm": "The storm in {home}",
        "market": "{n} goes to market",
        "new_neighbour": "The new neighbour",
        "festival": "The festival of lanterns",
        "school_visit": "{n} visits the school",
        "journey": "The road to {f_home}",
        "contest": "The contest in {home}",
        "winter": "Winter in {home}",
    },
    "zh": {
        "lost_pet": "丢失的{pet}",
        "birthday": "{n}的生日",
        "storm": "{home}的暴雨",
        "market": "{n}去赶集",
        "new_neighbour": "新来的邻居",
        "festival": "灯笼节",
        "school_visit": "{n}来到学校",
        "journey": "去{f_home}的路",
        "contest": "{home}的比赛",
        "winter": "{home}的冬天",
    },
}


def heldout_plots(seed: int, people: int, fraction: float = 0.1) -> frozenset[tuple[str, int]]:
    """The (plot, hero) pairs whose stories are only for evaluation."""
    pairs = [(plot, hero) for plot in PLOTS for hero in range(people)]
    return frozenset(Stream(seed, "heldout plots").sample(pairs, max(1, round(len(pairs) * fraction))))


def story(world: World, plot: str, hero: int, lang: Lang, stream: Stream) -> str:
    """One story with its title."""
    body = PLOTS[plot][lang].replace("\n", " " if lang == "en" else "").strip()
    # "for <p.colour_in>" continues a sentence: the plain statement, without a capital letter for a pronoun.
    for relation in RELATIONS:
        for who in "np":
            slot = f"<{who}.{relation}_in>"
            if slot in body:
                told = state(world, hero, relation, lang, pronoun=who == "p")
                body = body.replace(slot, told[0].lower() + told[1:] if who == "p" else told)
    body = body.replace("{valley}", VALLEY[lang])
    text = f"{TITLES[lang][plot]}\n\n{body}"
    return expand(text, world, hero, lang, stream)


def portrait(world: World, person: int, lang: Lang, stream: Stream) -> str:
    """A few plain sentences with every fact about one person, in any order and any wording."""
    name = world.names[person]
    sentences = []
    for i, relation in enumerate(stream.shuffled(RELATIONS)):
        form = stream.below(len(STATEMENTS[lang][relation]))
        sentences.append(state(world, person, relation, lang, form, pronoun=i > 0 and stream.chance(0.3)))
    opening = {
        "en": (
            "This is {n}. ",
            "Let me tell you about {n}. ",
            "Do you know {n}? ",
            "Everyone in {valley} knows {n}. ",
            "",
        ),
        "zh": ("这是{n}。", "我来说说{n}。", "你认识{n}吗？", "{valley}的人都认识{n}。", ""),
    }[lang]
    head = stream.choice(opening).format(n=name.text(lang), valley=VALLEY[lang])
    return head + (" " if lang == "en" else "").join(sentences)


def gathering(world: World, lang: Lang, stream: Stream) -> str:
    """One thing of the valley and everybody it is true of: the same facts, told from the value's side."""
    relation = stream.choice(tuple(VALUES))
    value = stream.choice(VALUES[relation])
    people = [p for p in range(len(world.names)) if world.value(p, relation) == value]
    if not people:
        return gathering(world, lang, stream)
    heads = {
        "en": {
            "home": "Who lives in {v}?",
            "job": "Who works as a {v}?",
            "pet": "Who has a {v} at home?",
            "food": "Who likes {v} best?",
            "colour": "Whose favourite colour is {v}?",
            "instrument": "Who plays the {v}?",
        },
        "zh": {
            "home": "谁住在{v}？",
            "job": "谁的工作是{v}？",
            "pet": "谁家养了{v}？",
            "food": "谁最喜欢吃{v}？",
            "colour": "谁最喜欢{v}？",
            "instrument": "谁会{v}？",
        },
    }
    head = heads[lang][relation].format(v=value.text(lang))
    forms = len(STATEMENTS[lang][relation])
    told = [state(world, p, relation, lang, stream.below(forms)) for p in stream.shuffled(people)]
    return f"{head}\n" + (" " if lang == "en" else "").join(told)


def pair_portrait(world: World, person: int, lang: Lang, stream: Stream) -> str:
    """Two friends side by side."""
    friend = world.friends[person]
    names = [world.names[p].text(lang) for p in (person, friend)]
    opening = {
        "en": "{0} and {1} are best friends, but they are not alike. ",
        "zh": "{0}和{1}是最好的朋友，可是他们并不一样。",
    }
    sentences = []
    for relation in stream.sample(tuple(VALUES), 4):
        form = stream.below(len(STATEMENTS[lang][relation]))
        sentences += [state(world, person, relation, lang, form), state(world, friend, relation, lang, form)]
    return opening[lang].format(*names) + (" " if lang == "en" else "").join(sentences)


__all__ = ["PLOTS", "gathering", "heldout_plots", "pair_portrait", "portrait", "pronouns", "story"]
