"""The embedded micro-world: a seeded generator of bilingual stories, chats and sums, with held-out parts.

`world` deals out who lives in Lantern Valley and what is true of them; `phrases` is the grammar; `stories`, `identity`,
`arithmetic` and `chats` make text from it; `generate` writes the files. Pure Python, no network, and the same bytes
on every platform.
"""

from data_prep.microworld.generate import SIZES, MicroWorldOptions, write_microworld

__all__ = ["SIZES", "MicroWorldOptions", "write_microworld"]
