"""Cleaning: the filters measure what they say, in Chinese as in English, and the hashes are exact where it matters."""

import random
import subprocess
import sys

import numpy as np
import pytest

from data_prep.clean import (
    SCRIPTS,
    ContaminationIndex,
    Filters,
    bad_char_share,
    foreign_letter_share,
    minhash_signature,
    near_duplicates,
    repetition,
    units,
)

ENGLISH = "The old man of the sea told a story that nobody in the village had ever heard before that long evening."
CHINESE = "那天晚上，海边的老人讲了一个村里谁也没有听过的故事，孩子们围着火堆，一句话也不说。"


def test_repetition_is_the_share_of_windows_seen_before():
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choice("ab好") for _ in range(rng.randint(20, 200)))
        windows = [text[i : i + 10] for i in range(len(text) - 9)]
        assert repetition(text) == pytest.approx(1 - len(set(windows)) / len(windows))


@pytest.mark.parametrize("sentence", [ENGLISH, CHINESE])
def test_a_repeated_clause_is_repetitive_with_and_without_spaces(sentence):
    assert repetition(sentence) < 0.05
    assert repetition(sentence * 60) > 0.95


def test_units_are_words_or_single_characters():
    assert units("It's 3 o'clock: 今天，天气 very好！") == ["it", "s", "3", "o", "clock", *"今天天气", "very", "好"]


def test_bad_characters_are_counted():
    assert bad_char_share("plain\ttext\r\n再见") == 0
    assert bad_char_share("ab\x00\x07\ufffd\ue000cdef") == pytest.approx(0.4)
    assert bad_char_share("") == 0


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Façade Über", "latin"),
        ("天地玄黄", "han"),
        ("ひらがなカタカナ", "kana"),
        ("한국어", "hangul"),
        ("Привет", "cyrillic"),
        ("Ελλάδα", "greek"),
        ("مرحبا", "arabic"),
        ("שלום", "hebrew"),
        ("ไทย", "thai"),
        ("कखग", "devanagari"),
    ],
)
def test_each_script_knows_its_own_letters_only(text, script):
    assert foreign_letter_share(text, [script]) == 0
    for other in set(SCRIPTS) - {script}:
        assert foreign_letter_share(text, [other]) == 1


def test_letters_of_several_scripts_and_no_letters():
    assert foreign_letter_share("abc天地12!", ["latin"]) == pytest.approx(0.4)
    assert foreign_letter_share("12 + 34 = ?", ["latin"]) == 0


def test_filters_name_the_first_limit_that_is_broken():
    assert Filters().reason_to_drop(" x ") is None
    assert Filters().reason_to_drop(" \n ") == "too_few_chars"
    assert Filters(min_chars=3).reason_to_drop("  ab  ") == "too_few_chars"
    assert Filters(max_chars=3).reason_to_drop("abcd") == "too_many_chars"
    assert Filters(scripts=("han",)).reason_to_drop(ENGLISH) == "other_script"
    strict = Filters(max_repetition=0.2, max_bad_chars=0.01, scripts=("latin", "han"))
    assert strict.reason_to_drop(ENGLISH + CHINESE) is None


def random_text(rng: random.Random, n: int) -> list[str]:
    return [f"w{rng.randrange(10**6)}" for _ in range(n)]


def test_signatures_estimate_the_jaccard_similarity_of_shingles():
    rng = random.Random(1)
    errors = []
    for share in (0.2, 0.5, 0.8, 0.95):
        for _ in range(10):
            common, a, b = random_text(rng, 400), random_text(rng, 400), random_text(rng, 400)
            cut = int(share * 400)
            one, two = common[:cut] + a[cut:], common[:cut] + b[cut:]
            shingles = [{tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one, two)]
            exact = len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])
            estimate = (minhash_signature(" ".join(one)) == minhash_signature(" ".join(two))).mean()
            errors.append(estimate - exact)
    assert np.sqrt(np.mean(np.square(errors))) < 0.06  # sqrt(p(1-p)/128) is at most 0.044


def test_near_duplicates_drops_the_later_of_two_and_keeps_the_rest():
    rng = random.Random(2)
    words = [random_text(rng, 300) for _ in range(40)]
    copies = [[*words[i][:150], "changed", *words[i][151:]] for i in (3, 7, 11)]
    documents = [" ".join(w) for w in words + copies]
    signatures = np.stack([minhash_signature(text) for text in documents])
    assert near_duplicates(signatures, 0.8).tolist() == [False] * 40 + [True] * 3
    chinese = np.stack([minhash_signature(t) for t in (CHINESE * 3, CHINESE * 3 + "完", ENGLISH)])
    assert near_duplicates(chinese, 0.8).tolist() == [False, True, False]


def test_contamination_is_found_by_an_exact_run_of_units_and_only_then():
    rng = random.Random(3)
    exam = random_text(rng, 40)
    index = ContaminationIndex.build([" ".join(exam), "3 + 4 = ?", "床前明月光疑是地上霜"], n=13)
    assert index.skipped == 1
    filler = random_text(rng, 50)
    assert index.matches(" ".join([*filler, *exam[10:23], *filler]))
    assert index.matches(", ".join(exam[10:23]).upper())
    assert not index.matches(" ".join([*filler, *exam[10:22], *filler, *exam[23:35]]))
    assert index.matches("他念道：“床前明月光，疑是地上霜。”")
    assert not index.matches("床前明月光，低头思故乡。")
    assert not index.matches("")


def test_an_index_and_a_signature_are_the_same_in_another_process(tmp_path):
    index = ContaminationIndex.build([ENGLISH], n=13)
    (tmp_path / "index.npz").write_bytes(index.dump())
    program = f"""
import sys
from pathlib import Path
from data_prep.clean import ContaminationIndex, minhash_signature
assert ContaminationIndex.load(Path(sys.argv[1])).matches({ENGLISH!r})
print(minhash_signature({ENGLISH!r}).tolist())
"""
    command = [sys.executable, "-c", program, str(tmp_path / "index.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(minhash_signature(ENGLISH).tolist())
