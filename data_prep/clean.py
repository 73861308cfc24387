"""Cleaning: filters on a document's text, near-duplicates, and contamination by evaluation data.

Lengths and n-grams are counted in characters or in *units*: a word of a script with spaces, or one character of a
script without (Chinese, Japanese, Thai …). Word counts alone see a Chinese page as a few long words.
"""

from __future__ import annotations

import io
import re
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_LETTER = re.compile(r"[^\W\d_]")
_SCRIPTS = {
    "latin": r"A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a",
    "han": r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "kana": r"\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "hangul": r"\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "cyrillic": r"\u0400-\u052f",
    "greek": r"\u0370-\u03ff\u1f00-\u1fff",
    "arabic": r"\u0600-\u06ff\u0750-\u077f\ufb50-\ufdff\ufe70-\ufeff",
    "hebrew": r"\u0590-\u05ff",
    "devanagari": r"\u0900-\u097f",
    "thai": r"\u0e00-\u0e7f",
}
SCRIPTS = tuple(_SCRIPTS)
_BAD_CATEGORIES = ("Cc", "Cn", "Co", "Cs")  # control, unassigned, private use, surrogate

FOREIGN_SHARE = 0.1  # letters of other scripts that a document may hold: names, quotations, code
NGRAM_CHARS = 10
NEAR_DUPLICATE_UNITS = 5
NUM_PERM = 128
SCHEME: Literal["affine32"] = "affine32"  # how datasketch permutes; 32-bit values
MIN_EVAL_UNITS = 8  # shorter evaluation items ("12+34=?") occur everywhere by chance


@dataclass(frozen=True)
class Filters:
    """Limits on a document's text; None switches a limit off.

    Args:
        min_chars: fewest characters, not counting white space at either end.
        max_chars: most characters.
        max_repetition: largest share of repeated text, see `repetition`.
        max_bad_chars: largest share of control, private-use, unassigned and replacement characters.
        scripts: scripts that at least 90 % of the letters belong to, some of `SCRIPTS`.
    """

    min_chars: int = 1
    max_chars: int | None = None
    max_repetition: float | None = None
    max_bad_chars: float | None = None
    scripts: tuple[str, ...] | None = None

    def reason_to_drop(self, text: str) -> str | None:
        """The name of the first limit that `text` breaks, or None."""
        n_chars = len(text.strip())
        if n_chars < self.min_chars:
            return "too_few_chars"
        if self.max_chars is not None and n_chars > self.max_chars:
            return "too_many_chars"
        if self.max_bad_chars is not None and bad_char_share(text) > self.max_bad_chars:
            return "bad_characters"
        if self.scripts is not None and foreign_letter_share(text, self.scripts) > FOREIGN_SHARE:
            return "other_script"
        if self.max_repetition is not None and repetition(text) > self.max_repetition:
            return "repetitive"
        return None


def repetition(text: str) -> float:
    """Share of the 10-character windows of `text` that repeat an earlier one, 0 to below 1; 0 for short texts.

    Characters, not words, so that a clause repeated without spaces (Chinese) counts as much as one with them.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    if len(codes) < 2 * NGRAM_CHARS:
        return 0.0
    return 1.0 - len(np.unique(_ngram_hashes(codes, NGRAM_CHARS))) / (len(codes) - NGRAM_CHARS + 1)


def bad_char_share(text: str) -> float:
    """Share of characters that no one typed: control (but line ends and tabs), private use, unassigned, U+FFFD."""
    if not text:
        return 0.0
    if text.isascii() and text.isprintable():
        return 0.0
    counts = {char: text.count(char) for char in set(text)}
    bad = sum(
        n
        for char, n in counts.items()
        if char == "\ufffd" or (unicodedata.category(char) in _BAD_CATEGORIES and char not in "\n\r\t\f")
    )
    return bad / len(text)


def foreign_letter_share(text: str, scripts: Iterable[str]) -> float:
    """Share of the letters of `text` that belong to none of `scripts`; 0 for a text without letters."""
    inside = re.compile("[" + "".join(_SCRIPTS[script] for script in scripts) + "]")
    letters = _LETTER.findall(text)
    return sum(1 for letter in letters if not inside.match(letter)) / len(letters) if letters else 0.0


def units(text: str) -> list[str]:
    """Words, or single characters of scripts without spaces; lower case, punctuation left out."""
    return _UNIT.findall(text.lower())


def _unit_codes(text: str) -> np.ndarray:
    """A 64-bit number for each unit, the same in every process (Python's `hash` is not)."""
    found = units(text)
    codes = np.fromiter((zlib.crc32(unit.encode("utf-8", "surrogatepass")) for unit in found), np.uint64, len(found))
    return (codes + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def _ngram_hashes(codes: np.ndarray, n: int) -> np.ndarray:
    """A hash of each window of `n` codes: a polynomial modulo 2^64. uint64 [length] → uint64 [length - n + 1]."""
    count = len(codes) - n + 1
    hashes = np.zeros(max(count, 0), dtype=np.uint64)
    for i in range(n if count > 0 else 0):
        hashes = hashes * np.uint64(0xD6E8FEB86659FD93) + codes[i : i + count]
    return hashes ^ (hashes >> np.uint64(29))


def minhash_signature(text: str) -> np.ndarray:
    """MinHash of the 5-unit shingles of `text` (Broder 1997): two signatures agree in about the share of places that
    the texts' shingles have in common (Jaccard). uint32 [128]."""
    from datasketch import MinHash

    codes = _unit_codes(text)
    shingles = _ngram_hashes(codes, min(NEAR_DUPLICATE_UNITS, max(1, len(codes))))
    sketch = MinHash(num_perm=NUM_PERM, seed=1, hashfunc=lambda shingle: shingle, scheme=SCHEME)
    if len(shingles):
        sketch.update_batch((np.unique(shingles) >> np.uint64(32)).tolist())
    return sketch.hashvalues.astype(np.uint32)


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """True for the documents that are like an earlier one that is kept. uint32 [documents, 128] → bool [documents].

    Candidates come from locality-sensitive hashing; those whose estimated similarity is below `threshold` stay.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=threshold, num_perm=signatures.shape[1])
    drop = np.zeros(len(signatures), dtype=bool)
    for i, signature in enumerate(signatures):
        sketch = MinHash(num_perm=len(signature), seed=1, hashvalues=signature, scheme=SCHEME)
        candidates = index.query(sketch)
        if candidates and (signatures[candidates] == signature).mean(axis=1).max() >= threshold:
            drop[i] = True
        else:
            index.insert(i, sketch, check_duplication=False)
    return drop


class ContaminationIndex:
    """The n-grams of evaluation items. A training document that holds one of them has seen the exam.

    Items shorter than `n` units count as one n-gram of their own length; below 8 units they are left out, since
    everybody says such things (`skipped`, of `items`). `dump` and `load` move the index between processes as a NumPy
    file.
    """

    def __init__(self, n: int = 13) -> None:
        self.n = n
        self.items = self.skipped = 0
        self.hashes: dict[int, np.ndarray] = {}  # units in the n-gram → sorted hashes

    @classmethod
    def build(cls, items: Iterable[str], n: int = 13) -> ContaminationIndex:
        index = cls(n)
        found: dict[int, list[np.ndarray]] = {}
        for item in items:
            codes = _unit_codes(item)
            index.items += 1
            if len(codes) < MIN_EVAL_UNITS:
                index.skipped += 1
                continue
            length = min(n, len(codes))
            found.setdefault(length, []).append(_ngram_hashes(codes, length))
        index.hashes = {length: np.unique(np.concatenate(parts)) for length, parts in found.items()}
        return index

    def matches(self, text: str) -> bool:
        """Whether `text` holds an n-gram of an evaluation item."""
        codes = _unit_codes(text)
        for length, known in self.hashes.items():
            hashes = _ngram_hashes(codes, length)
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            if (known[places] == hashes).any():
                return True
        return False

    def dump(self) -> memoryview:
        """The index as the content of a NumPy file."""
        buffer = io.BytesIO()
        arrays = {str(length): hashes for length, hashes in self.hashes.items()}
        np.savez(buffer, counts=np.array([self.items, self.skipped]), **arrays)  # type: ignore[arg-type]
        return buffer.getbuffer()

    @classmethod
    def load(cls, path: Path) -> ContaminationIndex:
        """Read what `dump` gave."""
        index = cls()
        with np.load(path) as stored:
            index.items, index.skipped = map(int, stored["counts"])
            index.hashes = {int(length): stored[length] for length in stored.files if length != "counts"}
        return index
