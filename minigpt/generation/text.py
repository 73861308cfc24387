"""From a stream of token ids to a stream of text: no half characters, and stop strings found and cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice

REPLACEMENT = "\ufffd"
INCOMPLETE_BYTES = 3  # of UTF-8 are at most a character without its end
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
Decode = Callable[[Sequence[int]], str]


def printable(text: str) -> str:
    """The text without control characters but tab and line break: what a model says must not steer a terminal."""
    return CONTROL_CHARACTERS.sub("", text)


class TextStream:
    """Decodes ids as they come, holding back the bytes of a character that is not complete yet.

    With a byte-level vocabulary one Chinese character or emoji may arrive in up to four tokens. Decoding an incomplete
    character gives one U+FFFD at the end, so that one waits for the next token; bytes that are no UTF-8 at all come out
    as U+FFFD, as they do when the whole sequence is decoded at once.

    Args:
        decode: ids → text, for example `ChatEncoder.decode`; decoding parts and joining them must give the whole.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._pending: list[int] = []  # ids since the last character boundary, or the last ones of them
        self._shown = 0  # characters of the pending ids' text that were given out

    def push(self, token_id: int) -> str:
        """Takes one id, returns the text that is certain now (often "")."""
        return self.extend([token_id])

    def extend(self, token_ids: Sequence[int]) -> str:
        """Takes several ids at once: the same text in all, for the price of one call of `decode`."""
        self._pending += token_ids
        text = self._decode(self._pending)
        complete = not text.endswith(REPLACEMENT)
        certain = text if complete else text[:-1]
        new = certain[self._shown :]
        self._shown = len(certain)
        if complete:
            self._pending, self._shown = [], 0
        elif len(self._pending) > INCOMPLETE_BYTES:  # a run of broken bytes must not get slower and slower
            self._let_go()
        return new

    def _let_go(self) -> None:
        """Keeps the last ids in which an incomplete character can have begun. Where they are the end of another one,
        their text begins otherwise than it did, but those characters were given out."""
        with_bytes = (token for token in reversed(self._pending) if self._decode([token]))
        self._pending = list(islice(with_bytes, INCOMPLETE_BYTES))[::-1]
        self._shown = len(self._decode(self._pending)) - 1

    def flush(self) -> str:
        """Returns what is left at the end, an incomplete character as U+FFFD."""
        text = self._decode(self._pending)[self._shown :] if self._pending else ""
        self._pending, self._shown = [], 0
        return text


class StopStrings:
    """Cuts a stream of text before the stop string that is complete first; what may be the beginning of one waits.

    Args:
        stop: the strings; () lets everything pass.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Takes more text, returns what may be shown; after `found` is set always ""."""
        if self.found is not None:
            return ""
        self._held += text
        # the string that was complete first, whatever pieces the text came in; of several the longest
        hits = [(self._held.find(s) + len(s), -len(s), s) for s in self._stop if s in self._held]
        if hits:
            end, _, self.found = min(hits)
            shown, self._held = self._held[: end - len(self.found)], ""
            return shown
        keep = max((self._overlap(s) for s in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Returns what was held back, at the end of the stream."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """The length of the longest end of the held text that `stop` begins with."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
