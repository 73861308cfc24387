"""The built-in rewards against their rules in other words, and how rewards are named."""

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt.dataset.chat import ChatEncoder
from minigpt.errors import UserError
from minigpt.rl.rewards import BUILT_IN, UNITS_A_GRAM, accuracy, overlong, parse_rewards, repetition, well_formed

USER = "<|im_start|>user\nWhat is 7 + 5?<|im_end|>\n<|im_start|>assistant\n"
THINKING_ON, THINKING_OFF = USER + "<think>", USER + "<think></think>"
SUM = {"answer": "12", "verifier": "math", "meta": {}, "messages": [], "finish_reason": "stop", "tokens": 10}
GSM8K = {**SUM, "answer": "He eats 3 * 400 = <<3*400=1200>>1200 grams.\n#### 1,200"}
COUNTDOWN = {**SUM, "answer": "", "verifier": "countdown", "meta": {"nums": [3, 4, 2], "target": 14}}
CAPITAL = {**SUM, "answer": "Paris", "verifier": "exact"}

ENGLISH_PROSE = """The old lighthouse keeper climbed the stairs every evening, although nobody had asked him to do it
for years. From the gallery he could see the fishing boats come home, one after another, their lamps swaying like sleepy
fireflies. Sometimes a gull landed on the rail and looked at him as if it wanted to know why a man would spend his time
polishing a lens that no ship needed any more. He had no good answer. Habit, perhaps, or the feeling that a promise does
not end when the person who heard it is gone. When rain came in from the west he closed the shutters, made tea, and
wrote a line or two about the weather into a thick book that his grandfather had begun."""
CHINESE_PROSE = """老守塔人每天傍晚都要爬上那道旋梯，虽然多年来已经没有人要求他这样做了。站在塔顶的走廊上，
他看得见渔船一艘接一艘地回港，船头的灯摇摇晃晃，像瞌睡的萤火虫。偶尔有只海鸥落在栏杆上，歪着头打量他，
仿佛想弄明白，为什么有人肯花工夫去擦一面再也没有船需要的透镜。他说不出什么道理。也许是习惯，也许是觉得，
听过承诺的人走了，承诺却并不因此作废。西边下起雨来，他就关好百叶窗，泡一壶茶，在祖父留下的厚本子里记一两句
当天的天气。"""


# ------------------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.parametrize(
    ("prompt", "completion", "record", "right"),
    [
        (USER, "<think>7 + 5 = 12</think><answer>12</answer>", SUM, True),
        (USER, "<think>12</think><answer>13</answer>", SUM, False),
        (THINKING_ON, "7 + 5 = 12</think><answer>12</answer>", SUM, True),
        (THINKING_ON, "7 + 5 = 12", SUM, False),  # the thought that the prompt began never ended
        (THINKING_ON, "7 + 5 = 12</think>12", SUM, True),
        (THINKING_OFF, "12", SUM, True),
        (USER, "He eats 1200 grams", GSM8K, True),
        (USER, "He eats 1.200 grams", GSM8K, False),
        (USER, "<answer>(3 + 4) * 2</answer>", COUNTDOWN, True),
        (USER, "<answer>14</answer>", COUNTDOWN, False),
        (USER, "<answer>9**9**9**9</answer>", COUNTDOWN, False),
        (USER, " paris. ", CAPITAL, True),
        (USER, "London", CAPITAL, False),
        (USER, "", SUM, False),
    ],
)
def test_accuracy_is_what_the_verifier_of_the_record_says(prompt, completion, record, right):
    assert accuracy(prompt, completion, record) == float(right)


# -------------------------------------------------------------------------------------------------------------- format


@pytest.mark.parametrize(
    ("prompt", "completion", "value"),
    [
        (USER, "<think>7 + 5</think><answer>12</answer>", 1),
        (USER, "\n<think>\n7 + 5\n</think>\n\n<answer>\n12\n</answer>\n", 1),
        (THINKING_ON, "7 + 5</think><answer>12</answer>", 1),
        (THINKING_ON, "<think>7 + 5</think><answer>12</answer>", -1),  # a second beginning
        (THINKING_ON, "</think><answer>12</answer>", -1),  # it was to think
        (THINKING_ON + "\n", "7 + 5</think><answer>12</answer>", 1),  # other families' templates end so
        (THINKING_OFF, "<answer>12</answer>", 1),
        (THINKING_OFF, "12", -1),
        (USER, "<think></think><answer>12</answer>", -1),
        (USER, "<think>7 + 5</think><answer> </answer>", -1),
        (USER, "<answer>12</answer>", -1),
        (USER, "<think>7 + 5</think>so <answer>12</answer>", -1),
        (USER, "<think>7 + 5</think><answer>12</answer> done", -1),
        (USER, "<answer>12</answer><think>7 + 5</think>", -1),
        (USER, "<think>a</think><answer>12</answer><answer>13</answer>", -1),
        (USER, "<think>a<think>b</think></think><answer>12</answer>", -1),
        (USER, "<think>a</think><answer>12", -1),
        ("<|im_start|>user\n<think>", "a</think><answer>12</answer>", 1),  # what a prompt ends with is what counts
        ("<|im_start|>user\n<think> hm<|im_end|>", "a</think><answer>12</answer>", -1),
        (USER, "", -1),
    ],
)
def test_format_is_one_thought_and_one_answer(prompt, completion, value):
    assert well_formed(prompt, completion, SUM) == value


def test_the_shipped_templates_prompts_are_those_that_the_format_knows(shipped_tokenizer):
    encoder = ChatEncoder(shipped_tokenizer)
    for thinking, completion in ((None, "<think>a</think>"), (True, "a</think>"), (False, "")):
        ids = encoder.encode_prompt([{"role": "user", "content": "7 + 5?"}], enable_thinking=thinking)
        prompt = encoder.decode(ids, skip_special_tokens=False)
        assert well_formed(prompt, completion + "<answer>12</answer>", SUM) == 1
        assert well_formed(prompt, completion + "12", SUM) == -1


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FRAGMENTS = st.sampled_from([*TAGS, " ", "\n", "a", "答", "<", "think>", "\0", "\ud800"])
GOOD = ["<think>", "a", "</think>", "\n", "<answer>", "答", "</answer>"]


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.lists(FRAGMENTS, max_size=12), st.permutations(GOOD)))
@example(GOOD)
def test_format_agrees_with_cutting_the_text_at_its_tags(fragments):
    text = "".join(fragments)
    pieces = re.split(r"(</?(?:think|answer)>)", text)
    good = pieces[1::2] == list(TAGS)
    if good:
        before, thought, between, answer, after = pieces[::2]
        good = not (before + between + after).strip() and bool(thought.strip()) and bool(answer.strip())
    assert well_formed(USER, text, SUM) == (1 if good else -1)


# -------------------------------------------------------------------------------------------------------------- length


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0), (79, 0), (80, 0), (85, -0.25), (90, -0.5), (99, -0.95), (100, -1), (130, -1)]
)
def test_length_costs_nothing_up_to_four_fifths_of_the_limit_and_1_at_it(tokens, value):
    assert overlong(USER, "", {**SUM, "tokens": tokens, "max_tokens": 100}) == pytest.approx(value)


def test_a_cut_answer_costs_1_whatever_is_known_of_the_limit():
    assert overlong(USER, "", {**SUM, "finish_reason": "length"}) == -1
    assert overlong(USER, "", {**SUM, "finish_reason": "length", "max_tokens": 1000}) == -1
    assert overlong(USER, "", SUM) == 0


# ---------------------------------------------------------------------------------------------------------- repetition


@pytest.mark.parametrize(
    ("clause", "units"),
    [
        ("the weather is nice today and we all go walking ", 10),
        ("今天天气好我们去散步", 10),
        ("오늘은 날씨가 좋아서 산책을 갑니다 ", 5),
        ("今日はいい天気ですから散歩します", 16),
    ],
)
def test_a_clause_written_sixty_times_costs_the_same_in_every_language(clause, units):
    ngrams = 60 * units - UNITS_A_GRAM + 1
    assert repetition(USER, clause * 60, SUM) == pytest.approx(units / ngrams - 1)  # units different ones, one a start
    assert repetition(USER, clause * 60, SUM) < -0.97


@pytest.mark.parametrize("loop", ["a" * 500, "ha" * 300, "!" * 100, "1" * 400, "哈" * 100, "5 " * 60, "😀" * 50])
def test_loops_without_words_cost_too(loop):
    assert repetition(USER, loop, SUM) < -0.8


@pytest.mark.parametrize("prose", [ENGLISH_PROSE, CHINESE_PROSE])
def test_ordinary_prose_costs_next_to_nothing(prose):
    assert -0.02 < repetition(USER, prose, SUM) <= 0
    assert repetition(USER, prose + prose, SUM) == pytest.approx(-0.5, abs=0.03)


def test_a_text_shorter_than_one_ngram_costs_nothing():
    assert repetition(USER, "5 5 5 5 5", SUM) == 0
    assert repetition(USER, "5 5 5 5 5 5 5", SUM) == -0.5
    assert repetition(USER, "", SUM) == 0


def test_a_loop_at_the_end_of_a_very_long_text_is_seen():
    assert repetition(USER, ENGLISH_PROSE * 1000 + "again and " * 12_000, SUM) < -0.99


# ---------------------------------------------------------------------------------------------------------- any text

RANGES = {"accuracy": (0, 1), "format": (-1, 1), "length": (-1, 0), "repetition": (-1, 0)}
ANY_TEXT = st.lists(
    st.one_of(
        FRAGMENTS, st.text(st.characters(exclude_categories=())), st.sampled_from(["(((", "9**9", "1,", "-", "÷"])
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT, st.sampled_from([USER, THINKING_ON, THINKING_OFF]), st.sampled_from([SUM, COUNTDOWN, CAPITAL]))
def test_no_text_breaks_a_reward_or_leaves_its_range(completion, prompt, record):
    for name, (low, high) in RANGES.items():
        value = BUILT_IN[name](prompt, completion, record)
        assert low <= value <= high


# --------------------------------------------------------------------------------------------------- names and weights


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder with modules in it, where Python finds them."""
    (tmp_path / "house_rewards.py").write_text(
        "import math\ndef polite(prompt, completion, reference):\n    return float('please' in completion)\n"
        "def lonely(text):\n    return 1.0\nclass Scale:\n    def __init__(self, a, b, c): pass\nnumber = 3\n"
    )
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "a=b").mkdir()
    (tmp_path / "a=b" / "mine.py").write_text(
        "import beside\ndef score(prompt, completion, reference):\n    return beside.X\n"
    )
    (tmp_path / "a=b" / "beside.py").write_text("X = 7.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_weights_modules_and_files(modules):
    rewards = parse_rewards(["accuracy", "format=0.5", "length=-2", "house_rewards:polite=1e-1", "a=b/mine.py:score"])
    assert [r.name for r in rewards] == ["accuracy", "format", "length", "house_rewards:polite", "a=b/mine.py:score"]
    assert [r.weight for r in rewards] == [1, 0.5, -2, 0.1, 1]
    assert rewards[3].function(USER, "12, please", SUM) == 1
    assert rewards[4].function(USER, "", SUM) == 7  # it imports what lies beside it


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("acuracy", r"no reward 'acuracy', did you mean accuracy\?"),
        ("", "no reward ''"),
        ("accuracy=nan", "weight .* write accuracy=0.5"),
        ("accuracy=inf", "weight"),
        ("accuracy=much", "weight"),
        ("accuracy=", "weight"),
        ("house_rewards:polite=-inf", "weight"),
        ("house_reward:polite", r"no module 'house_reward', did you mean house_rewards\?"),
        ("minigpt.evaluation.answer:f", r"no module 'minigpt.evaluation.answer', did you mean answers\?"),
        ("house_rewards:polit", r"no function 'polit', did you mean polite\?"),
        ("house_rewards:number", "no function 'number'"),
        ("house_rewards:", "no function ''"),
        (":polite", "Empty module name"),
        ("house_rewards.inner:f", "no module 'house_rewards.inner'"),
        ("house_rewards:lonely", r"cannot take \(prompt, completion, reference\)"),
        ("needs_more:f", r"cannot be imported: ModuleNotFoundError: .*not_installed_anywhere.* \(needs_more.py:1\)"),
        ("broken:f", "cannot be imported: SyntaxError"),
        ("raises:f", r"cannot be imported: ZeroDivisionError: division by zero \(raises.py:1\)"),
        ("leaves:f", "cannot be imported: SystemExit"),
        ("a=b/mime.py:score", r"no file .*mime.py, did you mean mine.py\?"),
        ("raises.py:f", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(modules, spec, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        parse_rewards([spec])
    assert "\n" not in str(error.value)


def test_no_reward_and_the_same_twice_are_refused():
    with pytest.raises(UserError, match="there is no reward"):
        parse_rewards([])
    with pytest.raises(UserError, match="named twice"):
        parse_rewards(["accuracy", "accuracy=0.5"])


def test_a_weight_of_zero_keeps_a_reward_as_a_metric():
    (reward,) = parse_rewards(["repetition=0"])
    assert reward.weight == 0
    assert math.isfinite(reward.function(USER, "a", SUM))
