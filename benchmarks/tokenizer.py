"""Bytes per token of MiniGPT's tokenizer and of others, on text that MiniGPT's was not trained on.

    python benchmarks/tokenizer.py --text novels=../data/pretrain_zh --text wiki=wiki.txt \\
        --peer gpt2=folder/with/vocab.json+merges.txt --peer minimind=folder/with/tokenizer.json

Of each `--text` only the documents that `minigpt data tokenizer --held_out 0.05` leaves out are measured (all of them
with `--held_out 0`, for texts that were not trained on at all). Foreign tokenizers are read from the paths given.
"""

import argparse
import re
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.readers import read_texts
from data_prep.tokenizer import training_texts
from minigpt.dataset.chat import load_tokenizer

SHIPPED = Path(__file__).parents[1] / "minigpt" / "model"
CJK = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")


def load(folder: Path) -> Tokenizer:
    """tokenizer.json, or GPT-2's pair of vocab.json and merges.txt."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def measured_texts(path: Path, held_out: float) -> list[str]:
    """The documents of `path` that are measured."""
    return list(training_texts(path, held_out=held_out, take_held_out=True) if held_out else read_texts([path]))


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """UTF-8 bytes of `texts` over the tokens that encode them."""
    tokens = sum(len(encoding) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    return sum(len(text.encode()) for text in texts) / tokens


def megabytes_per_second(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Encoding speed of the whole set, best of three."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        best = max(best, size / (time.perf_counter() - start))
    return best


def cjk_share(texts: list[str]) -> float:
    """Share of the characters that are Chinese."""
    joined = "".join(texts)
    return len(CJK.findall(joined)) / max(1, len(joined))


def named_path(value: str) -> tuple[str, Path]:
    name, _, path = value.partition("=")
    return name, Path(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=named_path, action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--peer", type=named_path, action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--tokenizer", type=Path, default=SHIPPED, help="ours; default: the shipped one")
    parser.add_argument("--held_out", type=float, default=0.05)
    args = parser.parse_args()
    tokenizers = {"MiniGPT": load(args.tokenizer)} | {name: load(path) for name, path in args.peer}
    headings = [f"{name} ({t.get_vocab_size()})" for name, t in tokenizers.items()]
    print(f"| text | KB | Chinese | {' | '.join(headings)} |")
    print("|---" * (3 + len(tokenizers)) + "|")
    everything: list[str] = []
    for name, path in args.text:
        texts = measured_texts(path, args.held_out)
        everything += texts
        size = sum(len(text.encode()) for text in texts) / 1e3
        ratios = [f"{bytes_per_token(t, texts):.2f}" for t in tokenizers.values()]
        print(f"| {name} | {size:.0f} | {cjk_share(texts):.0%} | {' | '.join(ratios)} |")
    speeds = [f"{megabytes_per_second(t, everything):.1f}" for t in tokenizers.values()]
    print(f"| all of them, MB/s | {sum(len(t.encode()) for t in everything) / 1e3:.0f} | | {' | '.join(speeds)} |")


if __name__ == "__main__":
    main()
