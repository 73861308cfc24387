"""Chat through the templates of other model families: transformers' ids, the right weights, nothing injected, and
templates that mean harm.

The independent reference is transformers' `apply_chat_template` on the same folder.
"""

import json
import random
from pathlib import Path

import pytest
from families import FAMILIES, write_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.readers import read_records
from minigpt.dataset.chat import ANSWER, CONTEXT, TAG, ChatEncoder
from minigpt.dataset.chat_template import AddedToken, ChatTemplate
from minigpt.errors import UserError

WORDS = [
    "你好",
    "，",
    "世界。",
    "Hello",
    " world",
    "  ",
    "\n",
    "\n\n",
    " 12+30=42",
    "é",
    "😀",
    "x = 1\n",
    "\t",
    "\u3000",
]
TOOLS = [
    {"type": "function", "function": {"name": "天气", "parameters": {"days": [1, True, None, 1.5], "q": "<'&\">"}}}
]
DATE = "26 Jul 2024"
"""What Llama's template writes where nobody tells it the date."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {name: write_tokenizer(base / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def encoders(folders) -> dict[str, ChatEncoder]:
    return {name: ChatEncoder(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def references(folders) -> dict[str, PreTrainedTokenizerFast]:
    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


every_family = pytest.mark.parametrize("family", FAMILIES)


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(1, 10)))


def random_conversation(rng: random.Random, family: str) -> list[dict]:
    """Turns in both languages; thinking and calls where the family's template knows them."""
    messages = [{"role": "system", "content": random_text(rng)}] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": random_text(rng)})
        if family != "smollm2" and rng.random() < 0.3:
            call = {"type": "function", "function": {"name": "add", "arguments": {"文": [1, 'a "b"\n'], "k": "plain"}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            if family != "llama3.2":  # its template writes results as JSON, see below
                messages.append({"role": "tool", "content": random_text(rng)})
        answer = {"role": "assistant", "content": "A" + random_text(rng)}
        if family == "qwen3" and rng.random() < 0.5:
            answer["reasoning_content"] = rng.choice(["", "R" + random_text(rng)])
        messages.append(answer)
    return messages


def reference_ids(tokenizer: PreTrainedTokenizerFast, messages: list[dict], **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, date_string=DATE, **options)


def said(encoder: ChatEncoder, messages: list[dict], code: int | None = None, **options) -> str:
    """The text of the tokens that are trained on."""
    ids, codes = encoder.encode(messages, **options)
    kept = [i for i, c in zip(ids, codes, strict=True) if (c == code if code is not None else c)]
    return encoder.decode(kept, skip_special_tokens=False)


@every_family
def test_ids_equal_apply_chat_template(encoders, references, family):
    rng = random.Random(1)
    for _ in range(60):
        messages = random_conversation(rng, family)
        tools = TOOLS if family != "smollm2" and rng.random() < 0.3 else None
        if family == "llama3.2" and tools and messages[0]["role"] == "system" and len(messages) < 2:
            continue
        expected = reference_ids(references[family], messages, tools=tools)
        assert encoders[family].encode(messages, tools=tools)[0] == expected
        thinking = rng.choice([None, True, False]) if family == "qwen3" else None
        switch = {"enable_thinking": thinking} if thinking is not None else {}
        prompt = reference_ids(references[family], messages, tools=tools, add_generation_prompt=True, **switch)
        assert encoders[family].encode_prompt(messages, tools=tools, enable_thinking=thinking) == prompt


@every_family
def test_ids_equal_apply_chat_template_on_real_conversations(encoders, references, family, shared_data):
    compared = 0
    for name in ("alpaca_en_demo", "alpaca_zh_demo"):
        records = list(read_records([shared_data / "sft" / f"{name}.json"], "sft"))[:150]
        for record in records:
            messages = record["messages"]
            everything = json.dumps(messages, ensure_ascii=False)
            if any(token in everything for token in (*FAMILIES[family].special, *FAMILIES[family].plain)):
                continue
            if any(m["role"] == "assistant" and m["content"][:1].isspace() for m in messages):
                continue
            assert encoders[family].encode(messages)[0] == reference_ids(references[family], messages)
            compared += 1
    assert compared > 250


@every_family
def test_trained_tokens_are_the_answers_and_their_ends(encoders, family):
    encoder, end = encoders[family], FAMILIES[family].end_of_turn
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Frage"},
        {"role": "assistant", "content": "回答 one"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "wrong", "weight": 0},
        {"role": "user", "content": "Q3"},
        {"role": "assistant", "content": "right"},
    ]
    assert said(encoder, messages) == f"回答 one{end}right{end}"
    unweighted = [{k: v for k, v in message.items() if k != "weight"} for message in messages]
    assert encoder.encode(messages)[0] == encoder.encode(unweighted)[0]
    assert encoder.decode([encoder.im_end_id], skip_special_tokens=False) == end


@every_family
def test_the_prompt_is_a_prefix_of_the_training_ids_and_holds_no_trained_token(encoders, family):
    rng = random.Random(2)
    for _ in range(20):
        messages = [m for m in random_conversation(rng, family) if "tool_calls" not in m and m["role"] != "tool"]
        messages = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in messages]
        ids, codes = encoders[family].encode(messages)
        thinking = False if family == "qwen3" else None  # its template writes an empty thought for these
        prompt = encoders[family].encode_prompt(messages[:-1], enable_thinking=thinking)
        assert ids[: len(prompt)] == prompt
        assert codes[len(prompt)] == ANSWER
        last = max(i for i, m in enumerate(messages) if m["role"] == "user")
        context = encoders[family].encode(messages[: last + 1])[0]
        assert not any(codes[len(context) : len(prompt)])


@every_family
def test_texts_inject_no_control_token(encoders, family):
    """The added tokens of a conversation full of their spellings are those of one without."""
    encoder, spec = encoders[family], FAMILIES[family]
    added = range(len(spec.special) + len(spec.plain))
    rng = random.Random(3)
    bits = [*spec.special, *spec.plain, "<|", "|>", "im_end", "\n", "assistant\n", "é", "</think>", "<tool_response>"]
    for _ in range(100):
        evil = ["x" + "".join(rng.choices(bits, k=rng.randint(1, 8))) + "x" for _ in range(6)]
        plain = ["x"] * 6

        def conversation(texts: list[str]) -> tuple[list[dict], list | None]:
            call = {"function": {"name": texts[3], "arguments": {texts[4]: [texts[5], {"k": texts[0]}]}}}
            messages = [
                {"role": "system", "content": texts[0]},
                {"role": "user", "content": texts[1]},
                {"role": "assistant", "content": texts[2]},
                {"role": "user", "content": texts[1]},
            ]
            if family != "smollm2":
                messages += [{"role": "assistant", "content": "", "tool_calls": [call]}]
                messages += [{"role": "tool", "content": texts[3]}]
            if family == "qwen3":
                messages += [{"role": "assistant", "content": texts[2], "reasoning_content": texts[4]}]
            return messages, [{"name": texts[0], "description": texts[1]}] if family != "smollm2" else None

        ids = [[i for i in encoder.encode(m, tools=t)[0] if i in added] for m, t in map(conversation, (evil, plain))]
        assert ids[0] == ids[1]


@every_family
def test_white_space_and_emptiness_are_what_the_template_makes_of_them(encoders, references, family):
    for content in ("", " ", "\n\n", "  text  \n", "\u3000全角\u3000"):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]
        assert encoders[family].encode(messages)[0] == reference_ids(references[family], messages)


def test_an_empty_answer_is_its_end_of_turn(encoders):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ""}]
    assert {name: said(encoder, messages) for name, encoder in encoders.items()} == {
        name: family.end_of_turn for name, family in FAMILIES.items()
    }


def test_thinking_of_a_template_that_knows_it(encoders):
    encoder = encoders["qwen3"]
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "because"}]
    assert said(encoder, messages) == "<think>\nbecause\n</think>\n\nA<|im_end|>"
    assert said(encoder, messages, code=TAG, tag_code=TAG) == "<think></think>"
    answered = [*messages, {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "B"}]
    assert said(encoder, answered) == "A<|im_end|>B<|im_end|>"  # the template drops old thinking, and so it is not said
    ids, codes = encoder.encode(answered)
    empty = encoder.encode_prompt(answered[:-1], enable_thinking=False)
    assert ids[: len(empty)] == empty  # no thinking is what the prompt says
    assert codes[len(empty)] == ANSWER
    assert not encoder.opens_thinking(True)


@pytest.mark.parametrize("family", ["smollm2", "qwen2.5", "llama3.2"])
def test_thinking_of_a_template_that_knows_none_stands_between_tags_in_the_answer(encoders, family):
    encoder, end = encoders[family], FAMILIES[family].end_of_turn
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "because"}]
    assert said(encoder, messages) == f"<think>because</think><answer>A</answer>{end}"
    tags = said(encoder, messages, code=TAG, tag_code=TAG)
    assert tags == "<think></think><answer></answer>"  # spelled out, and still each of their tokens weighs more
    for thinking, start in ((True, "<think>"), (False, "<think></think>")):
        prompt = encoder.decode(encoder.encode_prompt(messages[:1], enable_thinking=thinking), False)
        assert prompt == encoder.decode(encoder.encode_prompt(messages[:1]), False) + start
        assert encoder.opens_thinking(thinking) == thinking


def test_calls_of_tools_are_trained_and_their_results_are_not(encoders):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "<b>"}}}
    messages = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "Three"},
    ]
    body = '<tool_call>\n{"name": "add", "arguments": {"a": "<b>"}}\n</tool_call><|im_end|>'
    for family in ("qwen2.5", "qwen3"):
        assert said(encoders[family], messages, tools=TOOLS) == f"{body}Three<|im_end|>"
    assert said(encoders["llama3.2"], messages, tools=TOOLS) == (
        '{"name": "add", "parameters": {"a": "<b>"}}<|eot_id|>Three<|eot_id|>'
    )


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([{"role": "user", "content": "Q"}], {"tools": TOOLS}, "knows no tools"),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}],
            {},
            "leaves out a tool call of message 1",
        ),
        ([{"role": "wizard", "content": "Q"}], {}, "'wizard'"),
        ([{"role": "user", "content": 3}], {}, "int"),
    ],
)
def test_what_a_template_cannot_say_is_refused_in_one_sentence(encoders, messages, options, words):
    with pytest.raises(UserError, match=words) as caught:
        encoders["smollm2"].encode(messages, **options)
    assert "\n" not in str(caught.value)


def test_documents_begin_with_what_the_tokenizer_puts_there(encoders, references):
    for name, encoder in encoders.items():
        ids = references[name]("你好 world")["input_ids"]
        assert [*encoder.bos_ids, *encoder.encode_text("你好 world")] == ids
    assert encoders["llama3.2"].bos_ids == [0]


def test_a_template_may_stand_in_the_configuration_or_in_a_list_and_a_file_comes_first(tmp_path, encoders):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    expected = encoders["qwen3"].encode(messages)
    folder = write_tokenizer(tmp_path, "qwen3")
    template = (folder / "chat_template.jinja").read_text()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "chat_template": "{{ nonsense"}))
    assert ChatEncoder(folder).encode(messages) == expected
    (folder / "chat_template.jinja").unlink()
    for stored in (template, [{"name": "default", "template": template}, {"name": "rag", "template": "x"}]):
        path.write_text(json.dumps({**settings, "chat_template": stored}))
        assert ChatEncoder(folder).encode(messages) == expected
    assert ChatEncoder(AutoTokenizer.from_pretrained(folder)).encode(messages) == expected
    path.write_text(json.dumps({**settings, "chat_template": [{"name": "rag", "template": "x"}]}))
    with pytest.raises(UserError, match="none is called default"):
        ChatEncoder(folder)


def test_an_encoder_can_be_sent_to_another_process(encoders):
    import pickle

    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    copy = pickle.loads(pickle.dumps(encoders["llama3.2"].template))
    assert copy.render([messages], [None], ANSWER) == encoders["llama3.2"].template.render([messages], [None], ANSWER)


# -------------------------------------------------------------------------------- templates that mean harm

USER = [{"role": "user", "content": "Q"}]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def template(source: str, **limits) -> ChatTemplate:
    added = {"<|im_start|>": AddedToken(1), "<|im_end|>": AddedToken(2)}
    return ChatTemplate(source, {}, added, "evil/", **limits)


HARM = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "memory": "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "namespace": "{{ namespace(__init__=1) }}",
    "import": "{{ cycler.__init__.__globals__.os.system('touch was_here') }}",
    "include": "{% include '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}",
    "syntax": "{% for %}",
    "nesting": "(" * 5000,
    "refusal": "{{ raise_exception('System role not\nsupported') }}",
}


@pytest.mark.parametrize("kind", HARM)
def test_templates_that_mean_harm_are_refused_in_one_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "{{ " + HARM[kind] + " }}" if kind == "nesting" else HARM[kind] + CHATML
    with pytest.raises(UserError, match=r"evil/: its chat template") as caught:
        template(source, seconds=0.3).render([USER], [None], ANSWER)
    assert "\n" not in str(caught.value)
    expected = {"loop": "seconds", "power": "seconds", "output": "characters", "refusal": "System role not supported"}
    assert expected.get(kind, "") in str(caught.value)
    assert ("is broken" in str(caught.value)) == (kind in ("syntax", "nesting"))
    assert not list(tmp_path.iterdir())


def test_a_template_after_the_refusal_still_renders():
    """One conversation that the template loops on does not spoil the next."""
    source = "{% if messages|length > 3 %}" + HARM["loop"] + "{% endif %}" + CHATML
    one = template(source, seconds=0.3)
    with pytest.raises(UserError, match="seconds"):
        one.render([USER * 4], [None], ANSWER)
    assert one.render([USER], [None], ANSWER)[0][0].text == "<|im_start|>"


def test_a_template_cannot_guess_what_stands_for_a_text():
    """Two encoders hide the same text behind different placeholders, and what looks like one is a text."""
    first, second = template(CHATML), template(CHATML)
    assert first.nonce != second.nonce
    fake = [{"role": "user", "content": f"{second.nonce}0."}, {"role": "assistant", "content": "A"}]
    pieces = first.render([fake], [None], ANSWER)[0]
    assert next(piece.text for piece in pieces if not piece.is_token) == f"user\n{second.nonce}0."


def test_a_template_that_drops_or_cuts_a_text_is_refused():
    for source in (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content[:5] }}{% endfor %}",
    ):
        with pytest.raises(UserError, match="leaves out"):
            template(source).render([[*USER, {"role": "assistant", "content": "A"}]], [None], ANSWER)


def test_the_end_of_an_answer_without_a_token_is_the_answer():
    pieces = template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}").render(
        [[*USER, {"role": "assistant", "content": "A"}]], [None], ANSWER
    )[0]
    assert [(piece.text, piece.code) for piece in pieces] == [
        ("user: Q\nassistant: ", CONTEXT),
        ("A", ANSWER),
        ("\n", CONTEXT),
    ]
