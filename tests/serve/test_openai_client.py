"""OpenAI's Python client, unchanged, against a running server. What the model says is known (conftest)."""

import json
import math
import urllib.request
from itertools import pairwise

import openai
import pytest
from scripted_server import CONTEXT, ENDS, GOES_ON, SHIPPED, VOCABULARY

from minigpt.dataset.chat import ChatEncoder

QUESTION = [{"role": "user", "content": "Count."}]
ENCODER = ChatEncoder(SHIPPED)


def test_a_chat_answer_has_its_thinking_apart_and_counts_tokens(client, server, script):
    answer = client.chat.completions.create(
        model=server.name, messages=QUESTION, logit_bias=script.to_the_end, max_tokens=100
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.message.role == "assistant"
    assert choice.message.content == " one two"
    assert choice.message.reasoning_content == "思考"
    prompt = ENCODER.encode_prompt(QUESTION)
    # <think> 思 考 </think> <answer> one two </answer> <|im_end|>
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 9)
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3  # <think> and what stands behind it
    assert (answer.object, answer.model) == ("chat.completion", server.name)


def test_a_streamed_answer_is_the_whole_answer_in_pieces(client, server, script):
    events = list(
        client.chat.completions.create(
            model=server.name,
            messages=QUESTION,
            logit_bias=script.to_the_end,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [event.choices[0].delta for event in events if event.choices]
    assert "".join(delta.content or "" for delta in deltas) == " one two"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "思考"
    assert deltas[0].role == "assistant"
    reasons = [event.choices[0].finish_reason for event in events if event.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == 9
    assert len({event.id for event in events}) == 1


def test_long_streams_arrive_in_many_pieces_and_end_at_the_limit(client, server, script):
    events = list(client.chat.completions.create(model=server.name, messages=QUESTION, stream=True, max_tokens=8000))
    text = "".join(event.choices[0].delta.content or "" for event in events)
    assert text == script.words(7995)
    assert len(events) > 5
    assert events[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_is_switched_by_the_template_and_an_answer_sent_back_is_what_was_read_and_written(
    thinking, stream, client, server, script
):
    asked = {"model": server.name, "messages": QUESTION, "logit_bias": script.to_the_end, "stream": stream}
    arguments = {"chat_template_kwargs": {"enable_thinking": thinking}}
    answer = client.chat.completions.create(**asked, extra_body=arguments)
    parts = [event.choices[0].delta for event in answer] if stream else [answer.choices[0].message]
    content = "".join(part.content or "" for part in parts)
    reasoning = "".join(part.reasoning_content for part in parts if hasattr(part, "reasoning_content"))
    assert content == " one two"
    assert reasoning == ("思考" if thinking else "")
    assert hasattr(parts[0], "reasoning_content")
    written = [*ENCODER.encode_text("思考"), ENCODER.token_id("</think>")] if thinking else []
    written += [ENCODER.token_id("<answer>"), script.one, script.two, script.end_answer, ENCODER.im_end_id]
    known = ENCODER.encode_prompt(QUESTION, enable_thinking=thinking) + written
    said = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    assert ENCODER.encode_prompt([*QUESTION, said, *QUESTION])[: len(known)] == known


def test_stop_strings_end_the_text_before_themselves_also_across_tokens(client, server, script):
    for stop, expected in (("two", " one "), (["zzz", "e two th"], " on"), ([" three one"], " one two")):
        whole = client.chat.completions.create(model=server.name, messages=QUESTION, stop=stop, max_tokens=200)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason == "stop"
        events = client.chat.completions.create(
            model=server.name, messages=QUESTION, stop=stop, max_tokens=200, stream=True
        )
        assert "".join(event.choices[0].delta.content or "" for event in events) == expected
    thought = client.chat.completions.create(model=server.name, messages=QUESTION, stop="考 one")
    assert thought.choices[0].message.reasoning_content == "思"  # thinking and answer are one text for a stop string
    assert thought.choices[0].message.content == ""


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_log_probs_are_those_of_the_distribution_at_the_temperature(temperature, client, server, script):
    answer = client.chat.completions.create(
        model=server.name,
        messages=QUESTION,
        logprobs=True,
        temperature=temperature,
        max_tokens=8,
        extra_body={"top_k": 1},
    )
    listed = answer.choices[0].logprobs.content
    assert [bytes(token.bytes).decode() for token in listed[-3:]] == [" one", " two", " three"]
    a, b = GOES_ON / temperature, ENDS / temperature
    others = VOCABULARY - 2
    assert listed[-1].logprob == pytest.approx(a - math.log(math.exp(a) + math.exp(b) + others), abs=1e-5)
    assert listed[-2].logprob == pytest.approx(a - math.log(math.exp(a) + others + 1), abs=1e-5)


def test_top_log_probs_are_the_most_probable_tokens_best_first(client, server, script):
    asked = {"model": server.name, "messages": QUESTION, "max_tokens": 8, "temperature": 2.0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, extra_body={"top_k": 1})
    last = answer.choices[0].logprobs.content[-1]
    normaliser = math.log(math.exp(GOES_ON / 2) + math.exp(ENDS / 2) + VOCABULARY - 2)
    expected = [GOES_ON / 2 - normaliser, ENDS / 2 - normaliser, -normaliser]
    assert [token.logprob for token in last.top_logprobs] == pytest.approx(expected, abs=1e-5)
    assert last.top_logprobs[0].token == last.token == " three"
    assert last.top_logprobs[0].bytes == list(b" three")
    without = client.chat.completions.create(**asked, logprobs=True)
    assert without.choices[0].logprobs.content[0].top_logprobs == []


def test_streamed_log_probs_are_those_of_the_whole_answer(client, server):
    asked = {"model": server.name, "messages": QUESTION, "logprobs": True, "top_logprobs": 2, "max_tokens": 40}
    whole = client.chat.completions.create(**asked).choices[0].logprobs.content
    events = client.chat.completions.create(**asked, stream=True)
    pieces = [t for event in events if event.choices[0].logprobs for t in event.choices[0].logprobs.content]
    assert [(t.token, t.bytes) for t in pieces] == [(t.token, t.bytes) for t in whole]
    assert [t.logprob for t in pieces] == pytest.approx([t.logprob for t in whole], abs=1e-5)
    assert len(pieces) == 40


def test_a_seed_repeats_the_samples_and_samples_differ(client, server):
    def ask(seed):
        answer = client.completions.create(
            model=server.name, prompt=" sun", n=3, seed=seed, temperature=1.0, max_tokens=8
        )
        return [choice.text for choice in answer.choices]

    first = ask(7)
    assert ask(7) == first
    assert len({*first, *ask(8)}) == 6
    assert ask(-7) == ask(-7)


def test_texts_are_continued_several_at_once_as_strings_and_as_ids(client, server, script):
    asked = {"model": server.name, "max_tokens": 4, "n": 2}
    answer = client.completions.create(prompt=[" one", " two", "x one two three"], **asked)
    expected = [" two three one two", " three one two three", " one two three one"]
    assert [choice.text for choice in answer.choices] == [text for text in expected for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage.completion_tokens == 24
    by_id = client.completions.create(prompt=[[script.one], [script.two]], **asked)
    assert [choice.text for choice in by_id.choices] == [text for text in expected[:2] for _ in range(2)]
    events = client.completions.create(prompt=[" one", " two"], **asked, stream=True)
    texts = [""] * 4
    for event in events:
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == [text for text in expected[:2] for _ in range(2)]
    logged = client.completions.create(model=server.name, prompt=" one", max_tokens=3, logprobs=1).choices[0].logprobs
    assert logged.tokens == [" two", " three", " one"]
    assert logged.text_offset == [0, 4, 10]
    for token, value, top in zip(logged.tokens, logged.token_logprobs, logged.top_logprobs, strict=True):
        assert top == {token: pytest.approx(value, abs=1e-5)}
    pieces = client.completions.create(model=server.name, prompt=" one", max_tokens=40, logprobs=1, stream=True)
    streamed = [n for piece in pieces if piece.choices[0].logprobs for n in piece.choices[0].logprobs.text_offset]
    assert streamed == [len(script.words(i + 1)) - len(" one") for i in range(40)]


def test_equal_prompts_of_one_request_get_texts_of_their_own(client, server, script):
    asked = {"model": server.name, "max_tokens": 30, "temperature": 1, "n": 2}
    answer = client.completions.create(prompt=[[100]] * 3, **asked, extra_body={"top_p": 1})
    assert len({choice.text for choice in answer.choices}) == 6
    alone = client.completions.create(prompt=[100], seed=5, **asked)
    among = client.completions.create(prompt=[[100], [script.one]], seed=5, **asked)
    assert [choice.text for choice in among.choices[:2]] == [choice.text for choice in alone.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_behind_its_end_where_that_is_asked_for(stream, client, server, script):
    asked = {"model": server.name, "messages": QUESTION, "logit_bias": script.to_the_end, "max_tokens": 25}
    events = client.chat.completions.create(**asked, extra_body={"ignore_eos": True}, stream=stream)
    events = list(events) if stream else [events]
    choices = [event.choices[0] for event in events]
    assert choices[-1].finish_reason == "length"
    text = "".join((c.delta if stream else c.message).content or "" for c in choices)
    assert text == " one two", "end tokens are not shown"
    if not stream:
        assert events[0].usage.completion_tokens == 25
    usual = client.chat.completions.create(**asked, extra_body={"ignore_eos": False})
    assert usual.choices[0].finish_reason == "stop"


def test_a_temperature_too_small_to_divide_by_is_greedy(client, server, script):
    asked = {"model": server.name, "messages": [{"role": "user", "content": "Count."}], "max_tokens": 9}
    answer = client.chat.completions.create(**asked, temperature=1e-38, top_p=0.9, logprobs=True).choices[0]
    assert answer.message.content == script.words(4)
    assert all(math.isfinite(token.logprob) for token in answer.logprobs.content)


def test_models_are_listed_and_found(client, server):
    (listed,) = client.models.list().data
    assert listed.id == server.name
    assert listed.max_model_len == CONTEXT
    assert client.models.retrieve(server.name).id == server.name
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-5'"):
        client.models.retrieve("gpt-5")


def test_errors_reach_the_client_as_its_own_exceptions(client, server):
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as wrong_model:
        ask(model="gpt-5", messages=QUESTION)
    assert wrong_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        ask(model=server.name, messages=[{"role": "user", "content": "a b c d " * 10_000}])
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as hot:
        ask(model=server.name, messages=QUESTION, temperature=9)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="n is 99; this server gives at most 8"):
        ask(model=server.name, messages=QUESTION, n=99)
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        ask(model=server.name, messages=QUESTION, top_logprobs=2)


def test_earlier_turns_tools_and_parts_of_content_are_rendered(client, server):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    answer = client.chat.completions.create(model=server.name, messages=messages, tools=[tool], max_tokens=6)
    rendered = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": call["function"]}]},
        {"role": "tool", "content": "2"},
    ]
    assert answer.usage.prompt_tokens == len(ENCODER.encode_prompt(rendered, tools=[tool]))
    assert answer.choices[0].message.content == " one"


def test_events_end_with_done(server):
    body = json.dumps({"prompt": " one", "stream": True, "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        text = response.read().decode()
        assert response.headers["Content-Type"].startswith("text/event-stream")
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    contents = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all(a["id"] == b["id"] for a, b in pairwise(contents))
