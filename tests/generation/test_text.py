"""Text that comes token by token: whole characters only, stop strings, and the parts of an answer."""

import random
from pathlib import Path

import pytest

import minigpt
from minigpt.dataset.chat import ChatEncoder
from minigpt.generation.answer import AnswerStream
from minigpt.generation.text import StopStrings, TextStream

encoder = ChatEncoder(Path(minigpt.__file__).parent / "model")


def pieces_of(ids: list[int], decode=encoder.decode) -> list[str]:
    stream = TextStream(decode)
    return [*(stream.push(i) for i in ids), stream.flush()]


def byte_ids(text: str) -> list[int]:
    """One token a byte: the hardest case, every character is cut."""
    return [i for byte in text.encode() for i in [byte_token(byte)]]


def byte_token(byte: int) -> int:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [b for b in range(256) if b not in printable]
    character = chr(byte) if byte in printable else chr(256 + shifted.index(byte))  # GPT-2's table of printable bytes
    return encoder.tokenizer.token_to_id(character)


@pytest.mark.parametrize("text", ["你好，世界", "naïve café", "👩‍👩‍👧 ok 🇨🇳", "a\n\tb  c", ""])
def test_a_character_of_several_byte_tokens_is_never_shown_half(text):
    pieces = pieces_of(byte_ids(text))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len([p for p in pieces if p]) == len(text)  # and each as soon as it is whole


def test_random_token_sequences_stream_to_the_same_text_as_decoded_at_once():
    """Includes bytes that are no UTF-8, cut characters at the end and control tokens."""
    generator = random.Random(0)
    single_bytes = [byte_token(b) for b in range(256)]
    for _ in range(2000):
        source = single_bytes if generator.random() < 0.5 else range(encoder.vocab_size)
        ids = [generator.choice(source) for _ in range(generator.randrange(1, 30))]
        assert "".join(pieces_of(ids)) == encoder.decode(ids)


CONTROL = encoder.im_end_id  # it has no bytes
RUNS = {
    "continuations": [0x80],
    "beginnings": [0xE4],
    "beginnings of four": [0xF0, 0x9F, 0x98],
    "never valid": [0xFF],
    "too long forms": [0xE0, 0x80],
    "a real U+FFFD and half of one": [0xEF, 0xBF, 0xBD, 0xEF, 0xBF],
    "halves that begin behind each other": [0x80, 0xF0, 0x9F, 0x98, 0x80, 0x80],
}


@pytest.mark.parametrize("with_controls", [False, True])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_long_runs_of_broken_bytes_are_the_same_text_and_get_no_slower(run, with_controls):
    ids = [byte_token(0xE4), *[byte_token(byte) for byte in run] * 300, *byte_ids("你好")]
    if with_controls:
        ids = [i for token in ids for i in (token, *[CONTROL] * 5)]
    sizes = []

    def counting(some) -> str:
        sizes[-1] += len(some)
        return encoder.decode(some)

    stream, shown = TextStream(counting), ""
    for token in ids:
        sizes.append(0)
        shown += stream.push(token)
    sizes.append(0)
    assert shown + stream.flush() == encoder.decode(ids)
    assert max(sizes) <= 40
    in_pieces = TextStream(encoder.decode)
    text = "".join(in_pieces.extend(ids[i : i + 7]) for i in range(0, len(ids), 7))
    assert text + in_pieces.flush() == encoder.decode(ids)


def test_tokens_that_end_one_character_and_begin_the_next_are_shown_and_forgotten_too():
    """No boundary between two of them is one between characters."""
    stream, decoded = TextStream(lambda ids: b"".join(map(pieces.__getitem__, ids)).decode("utf-8", "replace")), []
    pieces = {0: b"\xe4\xbd", 1: b"\xa0\xe4\xbd", 2: b"\xa0"}
    for token in [0, *[1] * 500, 2]:
        decoded.append(stream.push(token))
        assert len(stream._pending) <= 4
    assert decoded == ["", *["你"] * 501]


def test_text_is_shown_as_early_as_possible():
    ids = encoder.encode_text("The cat sat on the mat. 猫坐在垫子上。")
    stream = TextStream(encoder.decode)
    for count, token in enumerate(ids, 1):
        stream.push(token)
        whole = encoder.decode(ids[:count])
        if not whole.endswith("\ufffd"):
            assert stream.flush() == "", "nothing may be held back at a character boundary"


def reference_cut(text: str, stops: list[str]) -> str:
    """Generation ends with the first character that completes a stop string; the longest such string is cut off."""
    for end in range(len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


def test_stop_strings_cut_at_the_first_hit_however_the_text_is_divided():
    generator = random.Random(1)
    for _ in range(3000):
        text = "".join(generator.choice("abc") for _ in range(generator.randrange(25)))
        stops = ["".join(generator.choice("abc") for _ in range(generator.randrange(1, 5))) for _ in range(3)]
        stream, shown, rest = StopStrings(stops), "", text
        while rest:
            size = generator.randrange(1, 5)
            shown += stream.push(rest[:size])
            rest = rest[size:]
            assert reference_cut(text, stops).startswith(shown), "shown text can not be taken back"
            if stream.found is not None:
                break
        shown += stream.flush()
        assert shown == reference_cut(text, stops)
        assert (stream.found is not None) == any(s in text for s in stops)


def parts_of(ids: list[int], enable_thinking=None) -> tuple[list[tuple[str, str]], dict]:
    stream = AnswerStream(encoder, enable_thinking)
    parts = [part for i in ids for part in stream.push(i)] + stream.flush()
    joined: list[tuple[str, str]] = []
    for kind, text in parts:
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined, stream.message()


ANSWERS = {
    "plain": {"role": "assistant", "content": "你好! Hi."},
    "thinking": {"role": "assistant", "content": "42", "reasoning_content": "40+2=42\n好"},
    "thinking off": {"role": "assistant", "content": "42", "reasoning_content": ""},
    "tool": {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": "二"}}]},
    "tags as text": {"role": "assistant", "content": "write <think> and </answer> literally"},
}


CAN_FOLLOW = [*((name, None) for name in ANSWERS), ("thinking", True), ("thinking off", False)]


@pytest.mark.parametrize(("name", "enable_thinking"), CAN_FOLLOW)
def test_the_message_read_from_the_stream_is_the_message_that_was_rendered(name, enable_thinking):
    """So the history of a chat renders to the ids that the model produced."""
    message = ANSWERS[name]
    user = [{"role": "user", "content": "?"}]
    prompt = encoder.encode_prompt(user, enable_thinking=enable_thinking)
    whole = encoder.encode([*user, message])[0]
    assert whole[: len(prompt)] == prompt
    answer = whole[len(prompt) : len(whole) - 1 - whole[::-1].index(encoder.im_end_id)]
    parts, read = parts_of(answer, enable_thinking)
    assert read == message
    assert encoder.encode([*user, read])[0] == whole
    kinds = [kind for kind, _ in parts]
    assert kinds == {"thinking": ["thinking", "answer"], "tool": ["tool_call"]}.get(name, ["answer"])


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, '{"name": "f", "arguments": ' + '{"a": ' * 5000, '{"name": "f", "arguments": "\\ud83d"}'],
    ids=["lists", "objects", "half an emoji"],
)
def test_a_tool_call_that_nobody_could_be_sent_is_shown_as_the_text_that_it_is(text):
    stream = AnswerStream(encoder)
    stream.extend([encoder.token_id("<tool_call>"), *encoder.encode_text(text), encoder.token_id("</tool_call>")])
    stream.flush()
    message = stream.message()
    assert message["content"] == text
    assert "tool_calls" not in message
