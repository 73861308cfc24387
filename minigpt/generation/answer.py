"""The parts of an assistant's answer as its tokens come: thinking, answer, tool calls.

The parts are told apart by the ids of the tags, never by text, so a model that spells `<think>` in ordinary characters
changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from minigpt.dataset.chat import ChatEncoder
from minigpt.generation.text import TextStream

THINKING, ANSWER, TOOL_CALL = "thinking", "answer", "tool_call"


class Part(NamedTuple):
    """A piece of text and the part of the answer that it belongs to (THINKING, ANSWER or TOOL_CALL)."""

    kind: str
    text: str


class AnswerStream:
    """Sorts the tokens of one answer into its parts.

    Args:
        encoder: of the model.
        enable_thinking: what the prompt was rendered with. Where the prompt ended with `<think>`, the answer begins
            inside it; False: thinking was closed by the prompt.

    Attributes:
        thinking_tokens: Tokens so far that stood in the thinking part, `<think>` included.
    """

    def __init__(self, encoder: ChatEncoder, enable_thinking: bool | None = None) -> None:
        self._text = TextStream(encoder.decode)
        after = {
            "<think>": THINKING,
            "</think>": ANSWER,
            "<answer>": ANSWER,
            "</answer>": ANSWER,
            "<tool_call>": TOOL_CALL,
            "</tool_call>": ANSWER,
        }
        ids = {encoder.tokenizer.token_to_id(tag): kind for tag, kind in after.items()}
        self._kind_after = {token: kind for token, kind in ids.items() if token is not None}
        inside = encoder.opens_thinking(enable_thinking)
        self._kind = THINKING if inside else ANSWER
        self._thinking: str | None = "" if inside or enable_thinking is not None else None
        self._answer = ""
        self.thinking_tokens = 0
        self._tool_calls: list[str] = []

    def push(self, token_id: int) -> list[Part]:
        """Takes one id, returns the text that is certain now."""
        if token_id not in self._kind_after:
            self.thinking_tokens += self._kind == THINKING
            return self._add(self._text.push(token_id))
        parts = self._add(self._text.flush())
        self._kind = self._kind_after[token_id]
        self.thinking_tokens += self._kind == THINKING
        if self._kind == THINKING:
            self._thinking = self._thinking or ""
        elif self._kind == TOOL_CALL:
            self._tool_calls.append("")
        return parts

    def extend(self, token_ids: Sequence[int]) -> list[Part]:
        """Takes several ids at once: the same text in all, with fewer calls of the tokenizer."""
        parts: list[Part] = []
        run: list[int] = []
        for token_id in token_ids:
            if token_id in self._kind_after:
                parts += self._run(run) + self.push(token_id)
                run = []
            else:
                run.append(token_id)
        return parts + self._run(run)

    def _run(self, token_ids: list[int]) -> list[Part]:
        """Tokens of one part."""
        self.thinking_tokens += len(token_ids) if self._kind == THINKING else 0
        return self._add(self._text.extend(token_ids)) if token_ids else []

    def flush(self) -> list[Part]:
        """Returns what is left at the end."""
        return self._add(self._text.flush())

    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self._answer}
        if self._thinking is not None:
            message["reasoning_content"] = self._thinking
        calls = [_tool_call(text) for text in self._tool_calls]
        if calls and all(calls):
            message["tool_calls"] = calls
        elif calls:  # a call that is no JSON is shown as the text that it is
            message["content"] += "".join(self._tool_calls)
        return message

    def _add(self, text: str) -> list[Part]:
        if not text:
            return []
        if self._kind == THINKING:
            self._thinking = (self._thinking or "") + text
        elif self._kind == TOOL_CALL:
            self._tool_calls[-1] += text
        else:
            self._answer += text
        return [Part(self._kind, text)]


def _tool_call(text: str) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
        json.dumps(call, ensure_ascii=False).encode()  # raises for half an emoji, which nobody could be sent
    except (ValueError, RecursionError):
        return None
    return call if isinstance(call, dict) and {"name", "arguments"} <= call.keys() else None
