"""Bits per byte: how well a model predicts text, in a unit that does not depend on the tokenizer.

Σ NLL / (ln 2 · Σ UTF-8 bytes of the predicted tokens). A fair coin for every bit of the text costs 8. The first token
of a document is given, not predicted, and its bytes are not counted (a tokenizer that puts a token of its own there
gives that one); its end is predicted and has no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from minigpt.dataset.shards import PackedDataset, sequential_batches
from minigpt.errors import UserError

from .task import Metric, Progress, Settings, TaskResult, fingerprint

if TYPE_CHECKING:
    from minigpt.dataset.chat import ChatEncoder
    from minigpt.model.model_minigpt import MiniGPT

TEXT_ENDINGS = (".txt", ".text", ".md", ".markdown")
RECORD_ENDINGS = (".jsonl", ".json")
LONGEST_WINDOW = 2048
ROWS_TOKENS = 16_384  # tokens of one forward pass


@dataclass(frozen=True)
class TextCost:
    """What n texts (documents, or rows of packed data) cost a model.

    Attributes:
        nll: float64 [n], summed negative log-likelihood of the labels, in nats.
        tokens: int64 [n], number of labels.
        bytes: int64 [n], UTF-8 bytes that they stand for; added tokens such as `<|endoftext|>` count 0.
    """

    nll: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray

    def metrics(self) -> list[Metric]:
        """Bits per byte; loss in nats per token; perplexity, its exponential."""
        loss = Metric.of_ratio("loss", self.nll, self.tokens)
        perplexity = Metric("perplexity", *(_exp(x) for x in (loss.value, loss.low, loss.high)))
        return [Metric.of_ratio("bits_per_byte", self.nll / math.log(2), self.bytes), loss, perplexity]

    def result(self, task: str) -> TaskResult:
        """The same as a task's result."""
        totals = {"tokens": int(self.tokens.sum()), "bytes": int(self.bytes.sum())}
        return TaskResult(task, self.metrics(), len(self.nll), totals)


class PackedText:
    """Bits per byte of a packed split; of conversations only what the assistant says counts.

    Args:
        dataset: A split of a packed stage.
        name: Of the task.
    """

    def __init__(self, dataset: PackedDataset, name: str = "valid") -> None:
        self.dataset, self.name = dataset, name
        self.source = {"path": str(dataset.folder), "split": dataset.split, "fingerprint": dataset.fingerprint}

    def run(
        self, model: MiniGPT, encoder: ChatEncoder, settings: Settings, progress: Progress | None = None
    ) -> TaskResult:
        """See `Task.run`; `settings.limit` counts rows. UserError when model and data have different tokenizers."""
        from minigpt.dataset.chat import load_tokenizer

        if load_tokenizer(self.dataset.folder).get_vocab() != encoder.tokenizer.get_vocab():
            raise UserError(
                f"{self.dataset.folder} was packed with another tokenizer than the model's: pack it again with "
                "--tokenizer, or give raw text, bpb:FILE"
            )
        return self.cost(model, settings, progress).result(self.name)

    def cost(self, model: MiniGPT, settings: Settings | None = None, progress: Progress | None = None) -> TextCost:
        """What each row costs."""
        settings = settings or Settings(batch_size=16)
        total = min(len(self.dataset), settings.limit or len(self.dataset))
        lengths = self.dataset.token_byte_lengths
        nll, tokens, n_bytes = np.zeros(total), np.zeros(total, np.int64), np.zeros(total, np.int64)
        rows = max(1, min(settings.batch_size, ROWS_TOKENS // self.dataset.seq_len))
        batches = sequential_batches(self.dataset, rows, max_rows=total)
        for first, batch in zip(range(0, total, rows), batches, strict=True):
            # A label counts once, whatever weight training gives it (tags may weigh 10).
            labels_BT = np.where(batch["weights"] > 0, batch["labels"], -100)
            log_probs_BT = _log_probs(
                model, batch["input_ids"], labels_BT, batch["position_ids"], batch["document_ids"]
            )
            here = slice(first, min(first + rows, total))
            n = here.stop - here.start
            counted_BT = labels_BT >= 0
            nll[here], tokens[here] = -log_probs_BT.sum(1)[:n], counted_BT.sum(1)[:n]
            n_bytes[here] = np.where(counted_BT, lengths[labels_BT.clip(0)], 0).sum(1)[:n]
            if progress is not None:
                progress(here.stop, total)
        return TextCost(nll, tokens, n_bytes)


class RawText:
    """Bits per byte of text files: every document is read through a window that moves by half its length.

    So each token but the first is predicted once, from at least half a window of text before it where there is as much.

    Args:
        path: A text or Markdown file (one document), a JSON Lines file of {"text"} (a document a line), or a folder of
            such files.
        name: Of the task.

    Raises:
        UserError: when there is no text there.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or f"bpb-{path.stem}"
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (*TEXT_ENDINGS, *RECORD_ENDINGS))
        else:
            files = [path]
        self.texts = [text for file in files for text in _read_texts(file) if text]
        if not self.texts:
            raise UserError(
                f"{path} holds no text: give a text or Markdown file, a jsonl with text, or a folder of them"
            )
        self.source = {"path": str(path), "fingerprint": fingerprint(*files)}

    def run(
        self, model: MiniGPT, encoder: ChatEncoder, settings: Settings, progress: Progress | None = None
    ) -> TaskResult:
        """See `Task.run`; `settings.limit` counts windows, of which a short document is one."""
        context = min(settings.context or LONGEST_WINDOW, model.config.max_position_embeddings)
        chosen = list(islice(self._windows(encoder, context), settings.limit))
        lengths = _token_bytes(encoder)
        nll, tokens, n_bytes = np.zeros(len(chosen)), np.zeros(len(chosen), np.int64), np.zeros(len(chosen), np.int64)
        by_length = sorted(range(len(chosen)), key=lambda i: len(chosen[i][0]))  # neighbours pad each other least
        rows = max(1, ROWS_TOKENS // context)
        for first in range(0, len(chosen), rows):
            batch = by_length[first : first + rows]
            width = max(len(chosen[i][0]) for i in batch) - 1
            ids_BT = np.zeros((len(batch), width), dtype=np.int64)
            labels_BT = np.full((len(batch), width), -100, dtype=np.int64)
            for row, i in enumerate(batch):
                ids, scored = chosen[i]
                ids_BT[row, : len(ids) - 1] = ids[:-1]
                labels_BT[row, scored - 1 : len(ids) - 1] = ids[scored:]
                tokens[i], n_bytes[i] = len(ids) - scored, lengths[ids[scored:]].sum()
            nll[batch] = -_log_probs(model, ids_BT, labels_BT).sum(1)
            if progress is not None:
                progress(first + len(batch), len(chosen))
        result = TextCost(nll, tokens, n_bytes).result(self.name)
        result.details.update(documents=len(self.texts), context=context)
        return result

    def _windows(self, encoder: ChatEncoder, context: int) -> Iterator[tuple[list[int], int]]:
        """The windows of all documents: up to `context` + 1 ids, and the number of the first id that is scored."""
        for text in self.texts:
            ids = [*encoder.bos_ids, *encoder.encode_text(text), encoder.eos_id]
            for start, end, scored in _windows(len(ids) - 1, context):
                yield ids[start : end + 1], scored + 1 - start


def _windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored) of the windows over the positions 0 … length - 1 of a document."""
    start = scored = 0
    while scored < length:
        end = min(start + context, length)
        yield start, end, scored
        start, scored = start + max(1, context // 2), end


def _token_bytes(encoder: ChatEncoder) -> np.ndarray:
    """UTF-8 bytes of each id of a byte-level vocabulary (a character of an entry is a byte); 0 for added tokens."""
    lengths = np.zeros(encoder.vocab_size, dtype=np.int64)
    for token, index in encoder.tokenizer.get_vocab(with_added_tokens=False).items():
        lengths[index] = len(token)
    lengths[list(encoder.tokenizer.get_added_tokens_decoder())] = 0
    return lengths


def _read_texts(file: Path) -> list[str]:
    from minigpt.dataset.lm_dataset import read_jsonl

    if file.suffix.lower() in RECORD_ENDINGS:
        return [record["text"] for record in read_jsonl(file, "pretrain")]
    try:
        return [file.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; give a text file or a folder of text files") from None


@torch.no_grad()
def _log_probs(
    model: MiniGPT,
    ids_BT: np.ndarray,
    labels_BT: np.ndarray,
    position_ids_BT: np.ndarray | None = None,
    document_ids_BT: np.ndarray | None = None,
) -> np.ndarray:
    """log p of each label, float64 [B, T]; 0 where there is none. The model's mode is restored."""
    device = model.model.embed_tokens.weight.device

    def tensor(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.from_numpy(array).to(device)

    was_training = model.training
    model.eval()
    try:
        output = model(
            torch.from_numpy(ids_BT).to(device),
            position_ids=tensor(position_ids_BT),
            document_ids=tensor(document_ids_BT),
            labels=tensor(labels_BT),
            reduction="none",
        )
    finally:
        model.train(was_training)
    assert output.log_probs is not None
    return output.log_probs.double().cpu().numpy()


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
