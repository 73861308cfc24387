"""The shipped tokenizer is exact on every string, and training one gives the same kind."""

import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.tokenizer import (
    ADDED_TOKENS,
    MAX_TOKEN_BYTES,
    SPLIT_REGEX,
    TAG_TOKENS,
    TokenizerOptions,
    repetitions,
    tokenizer_config,
    train_from_texts,
    train_tokenizer,
    training_texts,
)
from minigpt.errors import UserError

QWEN2_SPLIT = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
"""As in Qwen2's and Qwen3's published tokenizer.json."""
BYTE_ALPHABET_SIZE = 256


@pytest.fixture(scope="module")
def shipped(shipped_tokenizer: Path) -> Tokenizer:
    return Tokenizer.from_file(str(shipped_tokenizer / "tokenizer.json"))


@pytest.fixture(scope="module")
def fast(shipped_tokenizer: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(shipped_tokenizer)


def random_character(rng: random.Random) -> str:
    """From everywhere in Unicode: ASCII, Latin, Chinese, marks, emoji, private use, unassigned; no surrogates."""
    low, high = rng.choice(
        [
            (0, 0x7F),
            (0x80, 0x24F),
            (0x300, 0x36F),
            (0x2000, 0x206F),
            (0x4E00, 0x9FFF),
            (0x1F300, 0x1FAFF),
            (0, 0x10FFFF),
        ]
    )
    code = rng.randint(low, high)
    return chr(code) if not 0xD800 <= code <= 0xDFFF else " "


def random_text(rng: random.Random) -> str:
    return "".join(random_character(rng) for _ in range(rng.randint(0, 60)))


def bytes_of_alphabet() -> dict[str, int]:
    """GPT-2's table of visible characters for bytes, written out independently of the library."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def test_ten_thousand_random_unicode_strings_round_trip(shipped: Tokenizer) -> None:
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(10_000)]
    not_nfc = sum(unicodedata.normalize("NFC", text) != text for text in texts)
    assert not_nfc > 100, "the strings must contain what a normalizer would change"
    for text, encoding in zip(texts, shipped.encode_batch(texts, add_special_tokens=False), strict=True):
        assert shipped.decode(encoding.ids, skip_special_tokens=False) == text


def test_random_strings_round_trip_through_transformers(fast: PreTrainedTokenizerFast) -> None:
    rng = random.Random(2)
    for text in (random_text(rng) for _ in range(500)):
        assert fast.decode(fast.encode(text)) == text


def test_every_byte_is_an_entry_and_every_entry_is_the_bytes_it_spells(shipped: Tokenizer) -> None:
    alphabet = bytes_of_alphabet()
    vocabulary = shipped.get_vocab(with_added_tokens=True)
    assert {alphabet[token] for token in vocabulary if len(token) == 1} == set(range(256))
    for token in vocabulary.keys() - set(ADDED_TOKENS):
        assert all(character in alphabet for character in token)
        assert len(token) <= MAX_TOKEN_BYTES
    for code in [*range(0x80), 0xFF, 0x7FF, 0x800, 0xFFFF, 0x10000, 0x10FFFF]:
        text = chr(code)
        ids = shipped.encode(text, add_special_tokens=False).ids
        spelled = bytes(alphabet[c] for i in ids for c in shipped.id_to_token(i))
        assert spelled == text.encode()


def test_split_regex_is_qwen2s_and_splits_digits_one_by_one(shipped: Tokenizer) -> None:
    stored = json.loads(shipped.to_str())
    assert stored["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == SPLIT_REGEX == QWEN2_SPLIT
    assert stored["normalizer"] is None
    text = "It's 12345 元，  共\n\n3.14！"
    pieces = [text[start:end] for _, (start, end) in shipped.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == regex.findall(QWEN2_SPLIT, text)
    assert [shipped.id_to_token(i) for i in shipped.encode("2024").ids] == ["2", "0", "2", "4"]


def test_vocabulary_has_6400_entries_with_the_control_tokens_and_tags_first(shipped: Tokenizer) -> None:
    assert shipped.get_vocab_size() == 6400
    expected = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<answer>", "</answer>"]
    expected += ["<tool_call>", "</tool_call>"] + [f"<|reserved_{i}|>" for i in range(23)]
    assert [shipped.id_to_token(i) for i in range(32)] == expected
    for i, token in enumerate(expected):
        assert shipped.encode(token, add_special_tokens=False).ids == [i]


def test_decoding_without_special_tokens_keeps_the_tags(fast: PreTrainedTokenizerFast) -> None:
    ids = fast.encode("<|im_start|>x<think>a</think><answer>b</answer><|im_end|><|endoftext|><|reserved_0|>")
    assert fast.decode(ids, skip_special_tokens=True) == "x<think>a</think><answer>b</answer>"


@pytest.mark.parametrize("model_type", [None, "qwen3", "llama"])
def test_auto_tokenizer_gives_the_same_ids_in_an_exported_folder(
    model_type: str | None, shipped_tokenizer: Path, fast: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((shipped_tokenizer / name).read_bytes())
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    text = "Café cafe\u0301  it's １２ 12\n\n 你好<think>！"
    assert auto.encode(text) == fast.encode(text)
    assert auto.decode(auto.encode(text)) == text
    assert (auto.eos_token, auto.pad_token, auto.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


def test_the_guides_first_check(shipped_tokenizer: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(shipped_tokenizer))
    text = "你好，MiniGPT！"
    assert text == tokenizer.decode(tokenizer.encode(text)).replace(" ", "")


def test_shipped_configuration_is_the_one_that_training_writes(shipped_tokenizer: Path) -> None:
    assert json.loads((shipped_tokenizer / "tokenizer_config.json").read_text(encoding="utf-8")) == tokenizer_config()


def sample_texts(count: int = 400) -> list[str]:
    rng = random.Random(3)
    words = [
        "river",
        "mill",
        "Anna",
        "carries",
        "three",
        "磨坊",
        "河边",
        "安娜",
        "带着",
        "三个",
        "苹果",
        "12",
        "apples",
    ]
    return [" ".join(rng.choices(words, k=20)) + "。" for _ in range(count)]


def write_corpus(folder: Path) -> Path:
    file = folder / "corpus.jsonl"
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in sample_texts())
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_training_writes_a_tokenizer_of_the_size_asked_for_and_twice_the_same(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    for name in ("a", "b"):
        train_tokenizer(TokenizerOptions(input=[corpus], output=tmp_path / name, vocab_size=330))
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b"))
    assert first == second
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "a")
    assert len(tokenizer) == 330
    assert tokenizer.convert_tokens_to_ids("</answer>") == 6
    added = json.loads(first)["added_tokens"]
    assert [token["content"] for token in added if not token["special"]] == list(TAG_TOKENS)
    rng = random.Random(4)
    for text in (random_text(rng) for _ in range(200)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    frequent, unseen = tokenizer.encode(" river"), tokenizer.encode(" zebra")
    assert len(frequent) < len(unseen)


FULL_DISK = """
import resource, sys
from pathlib import Path
from data_prep.tokenizer import TokenizerOptions, train_tokenizer
from minigpt.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    train_tokenizer(TokenizerOptions([Path(sys.argv[1])], Path(sys.argv[2]), vocab_size=300))
except UserError as error:
    sys.exit(str(error))
"""


def test_a_full_disk_leaves_the_tokenizer_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 50)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{} of an earlier training")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.txt"), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"No space to write {folder / 'tokenizer.json'} (")
    assert [path.read_text() for path in sorted(folder.iterdir())] == ["{} of an earlier training"] * 2


def test_held_out_documents_are_not_trained_on_and_together_with_the_others_are_all(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    trained = list(training_texts(corpus, held_out=0.2))
    held_out = list(training_texts(corpus, held_out=0.2, take_held_out=True))
    assert sorted(trained + held_out) == sorted(sample_texts())
    assert 0.1 < len(held_out) / 400 < 0.3
    assert not set(trained) & set(held_out)


def test_a_weight_is_the_mean_number_of_repetitions() -> None:
    texts = sample_texts(400)
    for weight in (0.0, 0.5, 1.0, 2.25):
        counts = [repetitions(text, weight) for text in texts]
        assert set(counts) <= {int(weight), int(weight) + 1}
        assert sum(counts) / len(texts) == pytest.approx(weight, abs=0.1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": []}, "--input"),
        ({"weights": [1.0, 2.0]}, "--weights has 2 numbers but --input has 1"),
        ({"weights": [-1.0]}, "negative"),
        ({"vocab_size": 200}, "288"),
        ({"vocab_size": 100_000}, "add text"),
    ],
)
def test_unusable_options_are_one_sentence(change: dict, words: str, tmp_path: Path) -> None:
    options = TokenizerOptions(**({"input": [write_corpus(tmp_path)], "output": tmp_path / "out"} | change))
    with pytest.raises(UserError, match=words):
        train_tokenizer(options)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_bytes_only_needs_no_text() -> None:
    tokenizer = train_from_texts([], len(ADDED_TOKENS) + BYTE_ALPHABET_SIZE)
    assert tokenizer.decode(tokenizer.encode("任何 text").ids) == "任何 text"
