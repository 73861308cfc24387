"""A random stream that gives the same numbers on every platform and in every Python version.

`random.Random` promises that only for `random()`; the choices and shuffles built on it may change between versions.
SplitMix64 (Steele, Lea and Flood, 2014) is eleven lines and ours to keep.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
MASK = (1 << 64) - 1


class Stream:
    """SplitMix64, seeded by a path of names: `Stream(0, "story", 17)` never depends on what else was generated."""

    def __init__(self, *path: int | str) -> None:
        digest = hashlib.sha256("/".join(map(str, path)).encode()).digest()
        self._state = int.from_bytes(digest[:8], "little")

    def bits(self) -> int:
        """The next 64 random bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """A number in [0, n), by multiply and shift; its bias is below n / 2^64."""
        return (self.bits() * n) >> 64

    def between(self, low: int, high: int) -> int:
        """A number in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.bits() < probability * 2.0**64

    def choice(self, items: Sequence[T]) -> T:
        """One item, uniformly."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """A shuffled copy (Fisher and Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """`n` different positions of `items`, in random order."""
        return self.shuffled(items)[:n]

    def weighted(self, weights: dict[str, float]) -> str:
        """One key, with probability proportional to its weight."""
        point = self.bits() / 2.0**64 * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0:
                return key
        return next(reversed(weights))
