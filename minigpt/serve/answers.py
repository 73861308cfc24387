"""From tokens to the objects that OpenAI's clients expect: whole answers and streamed pieces.

The thinking part goes to `reasoning_content`, what stands in `<answer>` or outside of any tag to `content`; the tags
themselves are left out, tool calls become `tool_calls`. Stop strings are looked for in the visible text, thinking and
answer taken as one.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from minigpt.dataset.chat import ChatEncoder
from minigpt.generation.answer import ANSWER, THINKING, TOOL_CALL, AnswerStream, Part
from minigpt.generation.text import REPLACEMENT, Decode, StopStrings, TextStream
from minigpt.serve.worker import Piece


class Token(NamedTuple):
    """A token of an answer with its log-probability, the most probable ones at its place, and how many characters of
    text stand before it."""

    id: int
    log_prob: float
    top: Sequence[tuple[int, float]] = ()
    offset: int = 0


TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>")


def visible_decode(encoder: ChatEncoder) -> Decode:
    """ids → text without tags: what the engine looks for stop strings in, in a chat."""
    tags = {encoder.tokenizer.token_to_id(tag) for tag in TAGS}
    return lambda ids: encoder.decode([i for i in ids if i not in tags])


_AS_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes one for each call


class PlainStream:
    """The tokens of a continued text; the interface of `AnswerStream`."""

    thinking_tokens = 0

    def __init__(self, encoder: ChatEncoder) -> None:
        self._text = TextStream(encoder.decode)

    def extend(self, token_ids: Sequence[int]) -> list[Part]:
        """Takes the next ids, returns the text that is certain now."""
        return [Part(ANSWER, text)] if (text := self._text.extend(token_ids)) else []

    def flush(self) -> list[Part]:
        """Returns what is left at the end."""
        return [Part(ANSWER, text)] if (text := self._text.flush()) else []


class Choice:
    """One sample of an answer while it is made.

    Args:
        encoder: Of the model.
        stream: Sorts tokens into parts.
        stop_ids: Tokens that end an answer; they are not shown.
        stop: Strings that end it; cut off.
        log_probs: Whether to record them.

    Attributes:
        finish_reason: Why it ended, once `finish` was called.
        tokens: New tokens so far, a stop token included.
    """

    def __init__(
        self,
        encoder: ChatEncoder,
        stream: AnswerStream | PlainStream,
        stop_ids: Sequence[int],
        stop: Sequence[str],
        log_probs: bool,
    ) -> None:
        self.stream, self.finish_reason = stream, "length"
        self.tokens = 0
        self._characters = 0  # of text so far
        self._encoder, self._stop_ids, self._wants_log_probs = encoder, frozenset(stop_ids), log_probs
        self._stop = StopStrings(stop)
        self._held: deque[Part] = deque()  # given to `_stop` and not given back
        self._parts: list[Part] = []
        self._calls = ""
        self._log_probs: list[Token] = []

    def push(self, piece: Piece) -> None:
        """Takes the next tokens."""
        self.tokens += len(piece.ids)
        if not self._wants_log_probs or piece.log_probs is None:
            self._extend([token for token in piece.ids if token not in self._stop_ids])
            return
        tops: Sequence[Sequence[tuple[int, float]]] = piece.top or [()] * len(piece.ids)
        for token, log_prob, top in zip(piece.ids, piece.log_probs, tops, strict=True):
            if token not in self._stop_ids:
                self._log_probs.append(Token(token, log_prob, top, self._characters))
                self._extend([token])

    def finish(self, reason: str) -> None:
        """The sample has ended: gives out what was held back."""
        self._show(self.stream.flush())
        self._release(self._stop.flush())
        self.finish_reason = "stop" if self._stop.found is not None else reason

    def take(self) -> tuple[list[Part], list[Token]]:
        """Text, neighbours of one kind joined, and tokens with log-probabilities since the last call."""
        parts: list[Part] = []
        for part in self._parts:
            if parts and parts[-1].kind == part.kind:
                parts[-1] = Part(part.kind, parts[-1].text + part.text)
            else:
                parts.append(part)
        log_probs, self._parts, self._log_probs = self._log_probs, [], []
        return parts, log_probs

    def has_thinking(self) -> bool:
        """Whether there is a thinking part so far. An empty one is told as well: its tags stand in the prompt, and the
        next one begins with the same tokens only if who sends the answer back says so. Not so where a model's template
        has no place for thinking."""
        if not isinstance(self.stream, AnswerStream):
            return False
        thinking, template = self.stream.message().get("reasoning_content"), self._encoder.template
        return bool(thinking) or (thinking is not None and (template is None or template.shows_reasoning))

    def failed_calls(self) -> str:
        """Visible text of tool calls that are no JSON, to be shown as the text that it is."""
        return "" if self.tool_calls() else self._calls

    def _extend(self, ids: list[int]) -> None:
        parts = self.stream.extend(ids)
        self._characters += sum(len(part.text) for part in parts)
        self._show(parts)

    def _show(self, parts: list[Part]) -> None:
        for part in parts:
            self._held.append(part)
            self._release(self._stop.push(part.text))

    def _release(self, text: str) -> None:
        """Gives back as many characters as `_stop` let pass, with the kinds they came with."""
        left = len(text)
        while left > 0:
            part = self._held.popleft()
            self._parts.append(Part(part.kind, part.text[:left]))
            self._calls += part.text[:left] if part.kind == TOOL_CALL else ""
            if len(part.text) > left:
                self._held.appendleft(Part(part.kind, part.text[left:]))
            left -= len(part.text)

    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls that the answer made, in OpenAI's shape."""
        if not isinstance(self.stream, AnswerStream):
            return []
        return [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {
                    "name": str(call["name"]),
                    "arguments": call["arguments"]
                    if isinstance(call["arguments"], str)
                    else json.dumps(call["arguments"], ensure_ascii=False),
                },
            }
            for call in self.stream.message().get("tool_calls", [])
        ]


class Envelope:
    """Builds the objects of one response: `id`, `created` and `model` are the same in all of them.

    Args:
        encoder: Of the model.
        model: Its name.
        chat: Chat, or the continuation of texts.
    """

    def __init__(self, encoder: ChatEncoder, model: str, chat: bool) -> None:
        self._encoder, self._chat = encoder, chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._object = "chat.completion" if chat else "text_completion"

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any], log_probs: bool) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        make = self._chat_choice if self._chat else self._text_choice
        made = [make(index, choice, log_probs) for index, choice in enumerate(choices)]
        return {**self._head, "object": self._object, "choices": made, "usage": usage}

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        """One server-sent event."""
        kind = "chat.completion.chunk" if self._chat else self._object
        record = {**self._head, "object": kind, "choices": choices}
        if usage is not None:
            record["usage"] = usage
        return event(record)

    def greeting(self, index: int, choice: Choice) -> list[dict[str, Any]]:
        """What a streamed chat answer begins with."""
        if not self._chat:
            return []
        thinking = {"reasoning_content": ""} if choice.has_thinking() else {}
        return [_chunk(index, {"role": "assistant", "content": "", **thinking})]

    def pieces(self, index: int, choice: Choice) -> list[dict[str, Any]]:
        """The new text of a streamed choice, one object for each kind of text in it."""
        parts, drawn = choice.take()
        log_probs = self._log_probs(drawn) if drawn else None
        if not self._chat:
            text = "".join(part.text for part in parts)
            return [_text_chunk(index, text, log_probs)] if text or log_probs else []
        deltas = [
            {"reasoning_content" if part.kind == THINKING else "content": part.text}
            for part in parts
            if part.kind != TOOL_CALL
        ]
        if log_probs and not deltas:
            deltas = [{}]
        chunks = [_chunk(index, delta) for delta in deltas]
        if log_probs:
            chunks[0]["logprobs"] = log_probs
        return chunks

    def ending(self, index: int, choice: Choice) -> list[dict[str, Any]]:
        """The last objects of a streamed choice, which has been finished."""
        chunks = self.pieces(index, choice)
        if not self._chat:
            return [*chunks, _text_chunk(index, "", None, choice.finish_reason)]
        reason = choice.finish_reason
        if calls := choice.tool_calls():
            listed = [{"index": i, **call} for i, call in enumerate(calls)]
            chunks.append(_chunk(index, {"tool_calls": listed}))
            reason = "tool_calls" if reason == "stop" else reason
        elif choice.failed_calls():
            chunks.append(_chunk(index, {"content": choice.failed_calls()}))
        return [*chunks, _chunk(index, {}, reason)]

    def _chat_choice(self, index: int, choice: Choice, log_probs: bool) -> dict[str, Any]:
        parts, drawn = choice.take()
        thinking = "".join(part.text for part in parts if part.kind == THINKING)
        content = "".join(part.text for part in parts if part.kind == ANSWER)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if thinking or choice.has_thinking():
            message["reasoning_content"] = thinking
        reason = choice.finish_reason
        if calls := choice.tool_calls():
            message["tool_calls"] = calls
            message["content"] = content or None
            reason = "tool_calls" if reason == "stop" else reason
        else:
            message["content"] += choice.failed_calls()
        listed = self._log_probs(drawn) if log_probs else None
        return {"index": index, "message": message, "logprobs": listed, "finish_reason": reason}

    def _text_choice(self, index: int, choice: Choice, log_probs: bool) -> dict[str, Any]:
        parts, drawn = choice.take()
        text = "".join(part.text for part in parts)
        return _text_chunk(index, text, self._log_probs(drawn) if log_probs else None, choice.finish_reason)

    def _log_probs(self, drawn: Sequence[Token]) -> dict[str, Any]:
        if self._chat:
            content = [
                {
                    **self._listed(token.id, token.log_prob),
                    "top_logprobs": [self._listed(*one) for one in token.top],
                }
                for token in drawn
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(token.id) for token in drawn]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.log_prob) for token in drawn],
            # two tokens may be halves of characters and have the same text: the more probable one is told
            "top_logprobs": [
                {self._text(i): _finite(log_prob) for i, log_prob in [(token.id, token.log_prob), *reversed(token.top)]}
                for token in drawn
            ],
            "text_offset": [token.offset for token in drawn],
        }

    def _listed(self, token_id: int, log_prob: float) -> dict[str, Any]:
        text = self._text(token_id)
        return {"token": text, "logprob": _finite(log_prob), "bytes": token_bytes(self._encoder, token_id, text)}

    def _text(self, token_id: int) -> str:
        return self._encoder.decode([token_id], skip_special_tokens=False)


def _finite(log_prob: float) -> float:
    """-9999, as OpenAI has it, for NaN and -infinity: they come of a network that has diverged, and are no JSON."""
    return max(-9999.0, log_prob)  # in this order: a comparison with NaN keeps the first


def event(record: dict[str, Any]) -> bytes:
    """A record as a server-sent event."""
    return b"data: " + _AS_JSON(record).encode() + b"\n\n"


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts of a request."""
    new = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
        "completion_tokens_details": {"reasoning_tokens": sum(choice.stream.thinking_tokens for choice in choices)},
    }


def _chunk(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _text_chunk(index: int, text: str, log_probs: Any, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish_reason}


def token_bytes(encoder: ChatEncoder, token_id: int, text: str) -> list[int] | None:
    """The bytes of a token, also where they are only a part of a character; None where they cannot be told."""
    if REPLACEMENT not in text:
        return list(text.encode())
    name = encoder.tokenizer.id_to_token(token_id) or ""
    known = _byte_of_character()
    return [known[c] for c in name] if all(c in known for c in name) else None


@cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
