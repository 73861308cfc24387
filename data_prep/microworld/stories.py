"""Short stories and portraits of Lantern Valley: the text of pretraining.

Every story is about one person and their best friend and says several facts about both. The plots are the same in both
languages, told in each as one would tell them there. A (plot, hero) pair that is held out is never trained on.
"""

from data_prep.microworld.phrases import STATEMENTS, expand, state
from data_prep.microworld.rng import Stream
from data_prep.microworld.world import RELATIONS, VALLEY, VALUES, Lang, World

PLOTS: dict[str, dict[Lang, str]] = {
    "lost_pet": {
        "en": """<n.home> <n.job> <n.pet> One (cold|warm|foggy|windy) morning the {pet} was gone. That day {n} did
not go to work. {He} looked (under the bed|behind the stove|on the roof) and (in the garden|by the well|along the
river), but the {pet} was not there. So {he} ran for help. <n.friend> <f.job> {friend} left everything and came at
once. The two friends searched all of {home}. At last they heard a small sound (under the old bridge|in the tall
grass|behind the mill). There it was, wet and hungry! {n} wrapped the {pet} in a warm {colour} scarf. <n.colour>
Then they made a fire and sat down to eat. <p.food> Late in the evening there was music. <n.instrument> The {pet}
slept (by the fire|on the scarf|under the table).""",
        "zh": """<n.home><n.job><n.pet>一个(寒冷|温暖|有雾|刮风)的早晨，{pet}不见了。那天{n}没有去干活。
{ta}找遍了(床底下|灶台后面|屋顶上)，又去(院子里|井边|河边)找，还是没有{pet}的影子。{ta}只好跑去找人帮忙。
<n.friend><f.job>{friend}放下手里的活，马上就来了。两个朋友把{home}找了个遍。最后，
他们听见(旧桥下面|高高的草丛里|磨坊后面)有轻轻的声音。原来它在那里，又湿又饿！
{n}用一条暖和的{colour}围巾把{pet}包起来。<n.colour>然后他们生起火，坐下来吃饭。<p.food>夜深了，屋里还有音乐声。
<n.instrument>{pet}在(火边|围巾上|桌子底下)睡着了。""",
    },
    "birthday": {
        "en": """It was {n}'s birthday. <n.job> All day {he} worked as always and told nobody, only {his} {pet}.
<n.pet> But {friend} had not forgotten. <n.friend> <f.home> {friend} walked all the way to {home} (in the sun|over
the hills|through the rain) with a big basket. It was tied with {a_colour} ribbon. <n.colour> In the basket there
was {food}. "How did you know?" asked {n}. "(Everybody knows|I have always known|That was easy)," said {friend}.
<n.food> They ate together, and the {pet} got a little too. Then they made music. <n.instrument> <f.instrument> It
was (the best birthday in years|a birthday to remember|a very happy evening).""",
        "zh": """今天是{n}的生日。<n.job>{ta}像平时一样干了一天活，谁也没有告诉，只告诉了自己的{pet}。<n.pet>
可是{friend}没有忘记。<n.friend><f.home>{friend}(顶着太阳|翻过小山|冒着雨)，一路走到{home}，手里提着一个大篮子。
篮子上系着一条{colour}的带子。<n.colour>篮子里装着{food}。“你怎么知道的？”{n}问。
“(大家都知道|我一直记得|这还不容易)。”{friend}说。<n.food>他们一起吃，{pet}也分到了一点。后来他们奏起音乐。
<n.instrument><f.instrument>这真是(多年来最好的生日|难忘的生日|快乐的一晚)。""",
    },
    "storm": {
        "en": """A great storm came over {home}. (The wind shook the trees.|Rain beat on the windows.|The river
rose and rose.) <n.home> {He} sat inside with {his} {pet}. <n.pet> It was afraid, so {n} made music. <n.instrument>
Suddenly there was a knock at the door. It was {friend}, wet to the skin. <n.friend> {n} gave {friend} a dry
{colour} coat. <n.colour> "Are you not at work?" asked {friend}. <n.job> "Nobody works in this rain," said {n}. They
were both hungry. <n.food> <f.food> They (talked|laughed|told stories) until the storm was over. In the morning the
sky was clear, and {friend} went home to {f_home}. <f.pet> It had waited at the door all night.""",
        "zh": """一场大暴雨来到了{home}。(大风摇着树。|雨点打在窗户上。|河水越涨越高。)<n.home>
{ta}和自己的{pet}坐在屋里。<n.pet>它很害怕，{n}就奏起音乐来。<n.instrument>忽然有人敲门。原来是{friend}，
浑身都湿透了。<n.friend>{n}给{friend}拿来一件{colour}的干外套。<n.colour>“你没有去干活吗？”{friend}问。<n.job>
“这么大的雨，谁也不干活。”{n}说。他们俩都饿了。<n.food><f.food>他们(聊天|说笑|讲故事)，直到雨停。早上天晴了，
{friend}回到{f_home}的家。<f.pet>它在门口等了整整一夜。""",
    },
    "market": {
        "en": """On market day {n} got up early. <n.home> From there it is (an hour|a long walk|half a day) to the
market of the valley. {He} wanted three things. The first was {food} for dinner. <n.food> The second was {a_colour}
(hat|cup|blanket). <n.colour> The third was something nice for {his} {pet}. <n.pet> Among all the people {he} saw
{friend}. <n.friend> <f.job> "And how is your own work?" asked {friend}. <n.job> "There is always enough to do,"
said {n}, "but today I am free. Come and eat with me!" In the evening the neighbours heard music. <n.instrument>
(Nobody minded.|They opened their windows.|Even the birds were quiet.)""",
        "zh": """赶集那天，{n}很早就起床了。<n.home>从那里到山谷的集市要(走一个小时|走很远|走半天)。
{ta}想买三样东西。第一样是晚饭吃的{food}。<n.food>第二样是一(顶帽子|个杯子|条毯子)，要{colour}的。<n.colour>
第三样是给{pet}的好东西。<n.pet>在人群里，{ta}看见了{friend}。<n.friend><f.job>“你自己的活忙吗？”{friend}问。
<n.job>“总有干不完的活，”{n}说，“不过今天我有空，来和我一起吃饭吧！”傍晚，邻居们听见了音乐声。<n.instrument>
(谁也不嫌吵。|大家都打开了窗户。|连小鸟也安静下来了。)""",
    },
    "new_neighbour": {
        "en": """Long ago the people of {home} asked: "Who is the new neighbour?" It was {n}. <p.home> <n.job> A
{pet} sat (in the window|on the steps|by the door) and looked at everyone. <n.pet> On the first evening {a_colour}
lamp hung over the door. <n.colour> Then {n} invited the whole street to dinner and cooked a huge pot. <p.food> The
guests asked for music. <n.instrument> "Do you have friends?" (a boy|a girl|an old man) asked. <n.friend> <f.home>
<f.job> (By midnight|After that night|From that day on) everyone in {home} was {n}'s friend.""",
        "zh": """很久以前，{home}的人们问：“新来的邻居是谁？”原来是{n}。<p.home><n.job>
一只{pet}蹲在(窗台上|台阶上|门边)，看着每一个人。<n.pet>第一天晚上，门上挂起了一盏{colour}的灯。<n.colour>
然后{n}请整条街的人来吃饭，煮了一大锅。<p.food>客人们想听音乐。<n.instrument>“你有朋友吗？”
一个(男孩|女孩|老人)问。<n.friend><f.home><f.job>(到了半夜|那一晚以后|从那天起)，{home}的人都成了{n}的朋友。""",
    },
    "festival": {
        "en": """Every autumn {valley} has its festival of lanterns. {n}'s lantern was {colour}. <n.colour>
{friend} made one too, but it was {f_colour}. <f.colour> <n.friend> Together they carried the lights (down to the
river|up the hill|through the streets) of {home}. <n.home> In front walked the {pet}. <n.pet> There was food for
everyone, but {n} looked for one thing only: {food}. <p.food> Later there was music. <n.instrument> <f.instrument>
"You play well for {a_job}," said {friend}. <n.job> People danced (until midnight|until the moon went down|until the
last lantern was out).""",
        "zh": """每年秋天，{valley}都有灯笼节。{n}的灯笼是{colour}的。<n.colour>{friend}也做了一盏，
不过是{f_colour}的。<f.colour><n.friend>他们一起提着灯笼，走过{home}的(河边|山坡|街道)。<n.home>
走在前面的是{pet}。<n.pet>那里有各种好吃的，可是{n}只找一样：{food}。<p.food>后来大家奏起音乐。<n.instrument>
<f.instrument>“你这个{job}还真有本事。”{friend}说。<n.job>人们跳舞，一直跳到(半夜|月亮落下|最后一盏灯笼熄灭)。""",
    },
    "school_visit": {
        "en": """The children of {home} wanted to know what grown-ups do all day. So {n} came to their school.
<n.home> <n.job> "Is it hard to be {a_job}?" asked a (girl|boy). "(Sometimes|Only in winter|Not if you like it),"
said {n}. "And in the evening?" asked (another|a small) child. <n.instrument> They wanted to hear about animals too.
<n.pet> The {pet} (sleeps on the bed|eats from the table|follows {him} everywhere). "And who do you talk to?"
<n.friend> <f.job> At noon there was food. <n.food> Then the children drew pictures for {n}, all of them in
{colour}. <n.colour>""",
        "zh": """{home}的孩子们想知道大人们一天都做什么。于是{n}来到了学校。<n.home><n.job>“当{job}难吗？”
一个(女孩|男孩)问。“(有时候难|只有冬天难|喜欢就不难)。”{n}说。“那晚上呢？”(另一个|一个小小的)孩子问。
<n.instrument>他们还想听动物的事。<n.pet>{pet}(睡在床上|在桌边吃东西|到处跟着{ta})。“那你和谁说话呢？”<n.friend>
<f.job>到了中午，大家一起吃饭。<n.food>然后孩子们给{n}画了画，全是{colour}的。<n.colour>""",
    },
    "journey": {
        "en": """{n} had not seen {friend} for (a month|a whole year|a long time). <n.friend> <n.home> <f.home> It
was a long way. {n} put on {a_colour} coat and packed some {food} for the road. <n.colour> <p.food> The {pet} came
too. <n.pet> At night they slept (in a barn|under the stars|at an inn), and {n} made a little music. <n.instrument>
In {f_home} {friend} was at work. <f.job> "You came!" cried {friend}. "But who does your work now?" <n.job> "It can
wait," said {n}. {friend} put a big pot on the table. <f.food> (They were happy.|It was a good day.|The road had
been worth it.)""",
        "zh": """{n}已经有(一个月|整整一年|很久)没有见到{friend}了。<n.friend><n.home><f.home>路很远。
{n}穿上{colour}的外套，带了一些{food}在路上吃。<n.colour><p.food>{pet}也跟着去了。<n.pet>夜里，
他们睡在(谷仓里|星空下|客店里)，{n}奏起一点音乐。<n.instrument>到了{f_home}，{friend}正在干活。<f.job>“你来啦！”
{friend}喊道，“那谁来干你的活呢？”<n.job>“可以等一等。”{n}说。{friend}把一口大锅端上桌。<f.food>(他们都很高兴。
|这真是美好的一天。|这一趟没有白走。)""",
    },
    "contest": {
        "en": """There was a music contest in {home}. <n.home> {n} wanted to play, but {he} was
(shy|nervous|afraid). <n.job> <n.instrument> "You play better than anyone," said {friend}. <n.friend> <f.instrument>
So they went together. {n} dressed in {colour}. <n.colour> The first prize was (a basket|a plate|a cart) full of
{food}. <n.food> {n} closed {his} eyes and thought of the {pet} at home. <n.pet> Then {he} played. (At first it was
quiet.|Nobody moved.|Somebody began to cry.) In the end {n} won, and shared the {food} with {friend} and with
everyone.""",
        "zh": """{home}要举行音乐比赛。<n.home>{n}想参加，可是{ta}很(害羞|紧张|害怕)。<n.job><n.instrument>
“谁也没有你演奏得好。”{friend}说。<n.friend><f.instrument>于是他们一起去了。{n}穿了一身{colour}。<n.colour>
一等奖是(一篮子|一大盘|一车){food}。<n.food>{n}闭上眼睛，想着家里的{pet}。<n.pet>然后{ta}开始演奏。
(开始时很安静。|谁也没有动。|有人流下了眼泪。)最后{n}赢了，{ta}把{food}分给{friend}，也分给每一个人。""",
    },
    "winter": {
        "en": """In winter the snow lies deep in {home}. <n.home> <n.job> But now there was (little|no) work to do,
so {n} painted the whole room {colour}. <n.colour> The {pet} got (some|a little) paint on its back. <n.pet> Then
{friend} came to visit and laughed out loud. "Your {pet} is {colour} too!" <n.friend> Soon a pot stood on the stove.
<n.food> <f.food> After dinner they sat by the fire and made music. <n.instrument> "(When spring comes|When the snow
melts|Next summer) you must visit me," said {friend}. <f.home>""",
        "zh": """冬天，{home}的雪很深。<n.home><n.job>可是现在(没有什么活可干|没有活干)，
{n}就把整个房间漆成了{colour}。<n.colour>{pet}的背上也沾了(一些|一点)颜料。<n.pet>这时{friend}来做客，
哈哈大笑：“你的{pet}也变成{colour}的了！”<n.friend>不久，炉子上就煮好了一锅饭菜。<n.food><f.food>吃过晚饭，
他们坐在火边奏起音乐。<n.instrument>“(等春天来了|等雪化了|明年夏天)，你一定要来看我。”{friend}说。<f.home>""",
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
    """One thing of the valley and everybody it is true of, or some pairs of friends: facts told from the other side."""
    relation = stream.choice(RELATIONS)
    if relation == "friend":
        return _pairs_of_friends(world, lang, stream)
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


def _pairs_of_friends(world: World, lang: Lang, stream: Stream) -> str:
    head = {"en": "Who are best friends?", "zh": "谁和谁是最好的朋友？"}[lang]
    forms = len(STATEMENTS[lang]["friend"])
    people = stream.sample(range(len(world.names)), 4)
    told = [state(world, p, "friend", lang, stream.below(forms)) for p in people]
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
