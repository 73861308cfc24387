"""The datasets of the guide: one JSON Lines file in, `(x, y, mask)` out.

These read a file directly, tokenize it once and pad every row to `max_length`: the shortest way to see what a model is
trained on. The trainer itself uses packed shards (`minigpt.dataset.shards`), which waste nothing on padding; both
render conversations with the same `ChatEncoder`.

`x` is `ids[:-1]`, `y` is `ids[1:]`, and `mask[t]` is the loss weight of `y[t]`, so that
`(cross_entropy(model(x), y) * mask).sum() / mask.sum()` is the loss.
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from minigpt.dataset.chat import ANSWER, TAG, ChatEncoder
from minigpt.dataset.records import Record, RecordError, canonical, check_characters
from minigpt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TAG_WEIGHT = 10.0
BATCH = 256
Tokens = tuple[Sequence[int], Sequence[int]]
"""Token ids and their weight codes, equally long."""


def read_jsonl(path: str | Path, stage: str) -> Iterator[Record]:
    """Canonical records of a JSON Lines file (or a JSON array).

    Raises:
        UserError: the file is missing, empty or not UTF-8, or a line cannot be used; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a JSON Lines file")
    found = False
    for number, raw in _json_values(path):
        try:
            check_characters(raw)
            record = canonical(raw, stage)
        except (RecordError, RecursionError) as error:
            raise UserError(f"{path}:{number}: {error}") from error
        found = True
        yield record
    if not found:
        raise UserError(f"{path} is empty: it needs at least one record")


def _json_values(path: Path) -> Iterator[tuple[int, Any]]:
    number = 1
    try:
        with path.open("rb") as file:
            first = file.readline().removeprefix(codecs.BOM_UTF8)
            if first.startswith(b"["):
                text = (first + file.read()).decode("utf-8", "surrogateescape")  # a bad byte is named with its record
                yield from enumerate(json.loads(text), start=1)
                return
            for number, line in enumerate(chain([first], file), start=1):
                if line.strip():
                    yield number, json.loads(line.decode("utf-8").rstrip())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{number + error.lineno - 1}: broken JSON at column {error.colno}: {error.msg}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 ({error.reason}): save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: broken JSON: {error}") from error


class TokenRows:
    """Rows of token ids of different lengths in two flat arrays, handed out as padded `(x, y, mask)`.

    Args:
        rows: Token ids and weight codes of each row.
        weight_table: What each code weighs.
        max_length: Ids in a row; longer rows must have been cut. `x` and `y` have `max_length - 1`.
        pad_id: Fills short rows; its weight is 0.
    """

    def __init__(self, rows: Iterator[Tokens], weight_table: Sequence[float], max_length: int, pad_id: int) -> None:
        ids, codes, lengths = [], [], [0]
        for row_ids, row_codes in rows:
            ids.append(np.asarray(row_ids, dtype=np.uint32))
            codes.append(np.asarray(row_codes, dtype=np.uint8))
            lengths.append(len(row_ids))
        self.ids = np.concatenate(ids) if ids else np.empty(0, np.uint32)
        self.codes = np.concatenate(codes) if codes else np.empty(0, np.uint8)
        self.ends = np.cumsum(lengths)
        self.weight_table = np.asarray(weight_table, dtype=np.float32)
        self.max_length, self.pad_id = max_length, pad_id

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`x` int64, `y` int64 and `mask` float32, each `[max_length - 1]`."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        row = slice(self.ends[index], self.ends[index + 1])
        ids = np.full(self.max_length, self.pad_id, dtype=np.int64)
        weights = np.zeros(self.max_length, dtype=np.float32)
        ids[: row.stop - row.start] = self.ids[row]
        weights[: row.stop - row.start] = self.weight_table[self.codes[row]]
        return torch.from_numpy(ids[:-1].copy()), torch.from_numpy(ids[1:].copy()), torch.from_numpy(weights[1:].copy())


class PretrainDataset(Dataset):
    """Windows of plain text: `{"text": …}` records, each followed by `<|endoftext|>`.

    A text longer than `max_length` becomes several windows that overlap by one id, so that every token after a text's
    first is predicted exactly once.

    Args:
        path: JSON Lines file.
        tokenizer: Anything that `ChatEncoder` takes.
        max_length: Ids in a window.
    """

    def __init__(self, path: str | Path, tokenizer: "PreTrainedTokenizerFast", max_length: int = 512) -> None:
        _check_max_length(max_length)
        self.encoder = ChatEncoder(tokenizer)
        self.rows = TokenRows(self._windows(path, max_length), (0.0, 1.0), max_length, self.encoder.pad_id)

    def _windows(self, path: str | Path, max_length: int) -> Iterator[Tokens]:
        for records in _batches(read_jsonl(path, "pretrain")):
            for ids in self.encoder.encode_texts([record["text"] for record in records]):
                ids = [*self.encoder.bos_ids, *ids, self.encoder.eos_id]
                for start in range(0, max(1, len(ids) - 1), max_length - 1):
                    window = ids[start : start + max_length]
                    yield window, [ANSWER] * len(window)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.rows[index]


class SFTDataset(Dataset):
    """Conversations; the mask is 1 over what the assistant says and its `<|im_end|>`, 0 elsewhere.

    Args:
        path: JSON Lines file of conversations in any layout that `minigpt.dataset.records` knows.
        tokenizer: Anything that `ChatEncoder` takes.
        max_length: Ids in a row; longer conversations are cut at the end and counted in `truncated`. Those of which
            nothing that the assistant says is left are left out and counted in `dropped`: their mean loss is 0 / 0.
    """

    tag_code = ANSWER
    stage = "sft"

    def __init__(
        self,
        path: str | Path,
        tokenizer: "PreTrainedTokenizerFast",
        max_length: int = 512,
        *,
        tag_weight: float = TAG_WEIGHT,
    ) -> None:
        _check_max_length(max_length)
        self.encoder = ChatEncoder(tokenizer)
        self.truncated = self.dropped = 0
        rows = self._conversations(path, max_length)
        self.rows = TokenRows(rows, (0.0, 1.0, tag_weight), max_length, self.encoder.pad_id)

    def _conversations(self, path: str | Path, max_length: int) -> Iterator[Tokens]:
        for records in _batches(read_jsonl(path, self.stage)):
            encoded = self.encoder.encode_many(
                [record["messages"] for record in records],
                tools=[record.get("tools") for record in records],
                tag_code=self.tag_code,
            )
            for ids, codes in encoded:
                if not any(codes[1:max_length]):
                    self.dropped += 1
                    continue
                self.truncated += len(ids) > max_length
                yield ids[:max_length], codes[:max_length]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.rows[index]


class ReasonDataset(SFTDataset):
    """`SFTDataset` whose `<think>`, `</think>`, `<answer>`, `</answer>` weigh `tag_weight`, so that none is skipped."""

    tag_code = TAG
    stage = "reason"


class DPODataset(Dataset):
    """Preference pairs: the same prompt with a chosen and a rejected answer, rendered and masked like `SFTDataset`.

    An item is a dict of `x_chosen`, `y_chosen`, `mask_chosen`, `x_rejected`, `y_rejected`, `mask_rejected`. Only the
    answer is weighed: assistant turns inside the prompt are context. Pairs of which nothing of an answer, or no
    difference between the two, is left within `max_length` are left out and counted in `dropped`.
    """

    def __init__(self, path: str | Path, tokenizer: "PreTrainedTokenizerFast", max_length: int = 512) -> None:
        _check_max_length(max_length)
        self.encoder = ChatEncoder(tokenizer)
        records = list(read_jsonl(path, "preference"))
        chosen, rejected = (self._answers(records, side, max_length) for side in ("chosen", "rejected"))
        kept = [pair for pair in zip(chosen, rejected, strict=True) if _differ(*pair)]
        self.dropped = len(records) - len(kept)
        self.sides = {
            side: TokenRows((pair[i] for pair in kept), (0.0, 1.0), max_length, self.encoder.pad_id)
            for i, side in enumerate(("chosen", "rejected"))
        }

    def _answers(self, records: list[Record], side: str, max_length: int) -> Iterator[Tokens]:
        for part in _batches(records):
            encoded = self.encoder.encode_many(
                [[{**m, "weight": 0} for m in record["messages"]] + record[side] for record in part],
                tools=[record.get("tools") for record in part],
            )
            yield from ((ids[:max_length], codes[:max_length]) for ids, codes in encoded)

    def __len__(self) -> int:
        return len(self.sides["chosen"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item: dict[str, torch.Tensor] = {}
        for side, rows in self.sides.items():
            item[f"x_{side}"], item[f"y_{side}"], item[f"mask_{side}"] = rows[index]
        return item


def _differ(chosen: Tokens, rejected: Tokens) -> bool:
    """Whether both answers have something to judge, and not the same."""
    return any(chosen[1][1:]) and any(rejected[1][1:]) and chosen[0] != rejected[0]


class PromptDataset(Dataset):
    """Prompts for reinforcement learning, each with what is needed to score an answer.

    An item is a dict: `prompt_ids` (int64 `[n]`, ends where the assistant's answer starts), `prompt` (the same as
    text), `messages`, `answer`, `verifier` and `meta`. Prompts longer than `max_length` are left out and counted in
    `dropped`, since a prompt cut in half asks something else.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: "PreTrainedTokenizerFast",
        max_length: int = 512,
        *,
        enable_thinking: bool | None = None,
    ) -> None:
        self.encoder = ChatEncoder(tokenizer)
        self.items: list[dict[str, Any]] = []
        self.dropped = 0
        for record in read_jsonl(path, "prompt"):
            ids = self.encoder.encode_prompt(
                record["messages"], tools=record.get("tools"), enable_thinking=enable_thinking
            )
            if len(ids) > max_length:
                self.dropped += 1
            else:
                prompt = self.encoder.decode(ids, skip_special_tokens=False)
                self.items.append({**record, "prompt_ids": torch.tensor(ids), "prompt": prompt})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


RLHFDataset = PromptDataset
"""The guide's name for the prompts of reinforcement learning."""


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Lists of up to `BATCH` records: the tokenizer is quicker with many texts at a time."""
    iterator = iter(records)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _check_max_length(max_length: int) -> None:
    if max_length < 2:
        raise UserError(f"max_length {max_length} leaves nothing to predict: use 2 or more")
