"""Keys and values of beginnings that were computed before: a system prompt, the turns of a conversation so far.

Sequences are cut into blocks of a fixed number of tokens. A block's keys and values depend on all tokens before it, so
it is found by its own tokens and the number of the block before it: a chain that starts at the beginning of the text.
Tokens are compared themselves, no hashes, so nothing is ever mistaken for something else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

ROOT = 0


class PrefixCache:
    """Blocks of `block` tokens, at most `max_tokens` of them in all; the ones that were not used for longest go first.

    A block is a tensor [layers, 2, G, block, D] (keys and values).
    """

    def __init__(self, max_tokens: int, block: int) -> None:
        self.block, self.max_blocks = block, max_tokens // block
        self._blocks: OrderedDict[tuple[int, tuple[int, ...]], tuple[int, torch.Tensor]] = OrderedDict()
        self._numbered = ROOT

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """The blocks of the longest beginning of `ids` that is known."""
        keys, found, parent = [], [], ROOT
        for key_ids in self._cut(ids):
            entry = self._blocks.get((parent, key_ids))
            if entry is None:
                break
            keys.append((parent, key_ids))
            parent, kv = entry
            found.append(kv)
        self._used(keys)
        return found

    def store(self, ids: Sequence[int], read: Callable[[int, int], torch.Tensor]) -> None:
        """Keeps the whole blocks of `ids`; `read(start, end)` gives a copy of the keys and values of these positions.

        A block whose predecessor is evicted is never found again (numbers are not given twice) and ages out by itself.
        """
        keys, parent = [], ROOT
        for number, key_ids in enumerate(self._cut(ids)[: self.max_blocks]):
            key = (parent, key_ids)
            keys.append(key)
            if key not in self._blocks:
                self._numbered += 1
                start = number * self.block
                self._blocks[key] = (self._numbered, read(start, start + self.block))
            parent = self._blocks[key][0]
        self._used(keys)
        while len(self._blocks) > self.max_blocks:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forgets everything, because the weights changed."""
        self._blocks.clear()

    def _used(self, keys: list[tuple[int, tuple[int, ...]]]) -> None:
        for key in reversed(keys):  # the end of a chain goes before its beginning, without which it is worth nothing
            self._blocks.move_to_end(key)

    def _cut(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        whole = len(ids) - len(ids) % self.block
        return [tuple(ids[i : i + self.block]) for i in range(0, whole, self.block)]
