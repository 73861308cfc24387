"""Rewards for the tests of the RL loop, which compute them once more. Imported by the pool's workers as a file."""

import zlib


def teaches(prompt):
    """One prompt in three; the others get the same reward whatever is answered."""
    return zlib.crc32(prompt.encode()) % 3 == 0


def sometimes(prompt, completion, reference):
    """Between 0 and 1, and seldom the same for two answers; 0.3 for the prompts that teach nothing."""
    return zlib.crc32(completion.encode()) % 1009 / 1009 if teaches(prompt) else 0.3


def never(prompt, completion, reference):
    """The same for all."""
    return 0.3


def letters(prompt, completion, reference):
    """The share of ASCII letters."""
    return sum(c.isascii() and c.isalpha() for c in completion) / max(1, len(completion))
