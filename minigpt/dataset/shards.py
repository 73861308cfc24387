"""The shard format `minigpt-arrow` v1: schemas, writer, memory-mapped reader, global order, batches.

A dataset is a folder::

    train/shard_00000.arrow …   valid/shard_00000.arrow …   manifest.json   tokenizer.json   tokenizer_config.json

Every shard is an uncompressed Arrow IPC *file* with one record batch, so a row is a view into the page cache and any
Arrow reader (pyarrow, polars, DuckDB, `datasets`) opens it. Arrow itself has no checksum: a flipped byte reads fine.
So a shard is hashed against the manifest before its first row is used. `manifest.json` is written last: a folder
without it is unfinished. Its SHA-256 is the dataset's fingerprint.

The order of training samples is a pure function of (seed, sample counter): the position in a run is one integer,
and it means the same samples at any number of ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from minigpt.errors import UserError
from minigpt.system import cache_folders, sync

FORMAT = "minigpt-arrow"
VERSION = 1
MANIFEST = "manifest.json"
WORK = ".packing"  # within a folder that a dataset is being packed into
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

PACKED_STAGES = ("pretrain", "sft", "reason")  # rows of exactly seq_len tokens
STAGES = (*PACKED_STAGES, "preference", "prompt")
WEIGHTED_STAGES = ("sft", "reason")  # packed stages whose tokens carry a weight code

DEFAULT_WEIGHT_TABLE = (0.0, 1.0, 10.0)  # code → loss weight: not trained on, trained on, a tag of the reasoning format
NO_LABEL = -100
NO_DOCUMENT = -1


# ---------------------------------------------------------------------------------------------------------------------
# Files


class NoSpaceError(UserError):
    """The disk, the quota or the file size limit is full."""


def write_atomically(path: Path, data: bytes | memoryview | pa.Buffer) -> None:
    """Write `data` to `path` so that the file is either absent (or as it was) or complete, also after a power cut.

    Errors: NoSpaceError; other OSErrors pass through.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(
                f"No space to write {path} ({len(data):,} bytes: {error.strerror}): free some space and run the same "
                "command again, finished parts are kept."
            ) from error
        raise
    sync(path.parent)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 of what decides the token ids in `folder`/tokenizer.json: not of its layout, padding or truncation."""
    path = Path(folder) / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"No tokenizer.json in {folder}: name a folder that holds one.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore the file.") from None
    for key in ("padding", "truncation", "version"):
        content.pop(key, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def token_byte_lengths(folder: Path) -> np.ndarray:
    """UTF-8 bytes that each token id stands for, int32 [vocabulary]; 0 for added tokens, which are no text.

    For a byte-level vocabulary, where every character of an entry is one byte. With it, bits per byte is exact:
    Σ loss / (ln 2 · Σ lengths[labels]).
    """
    content = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    added = {token["id"] for token in content.get("added_tokens", [])}
    lengths = np.zeros(max([*vocabulary.values(), *added]) + 1, dtype=np.int32)
    for token, index in vocabulary.items():
        lengths[index] = 0 if index in added else len(token)
    return lengths


# ---------------------------------------------------------------------------------------------------------------------
# Schema and writer


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class ShardFormat:
    """What all shards of a dataset share.

    Args:
        stage: one of `STAGES`.
        seq_len: tokens a row holds (packed stages), or the longest sequence (preference, prompt).
        vocab_size: entries of the tokenizer; decides between uint16 and uint32 ids.
        tokenizer_hash: see `tokenizer_hash`.
        weight_table: loss weight of each weight code.
    """

    stage: str
    seq_len: int
    vocab_size: int
    tokenizer_hash: str
    weight_table: tuple[float, ...] = DEFAULT_WEIGHT_TABLE

    @property
    def weighted(self) -> bool:
        return self.stage in WEIGHTED_STAGES

    def schema(self) -> pa.Schema:
        """The Arrow schema, with the format's metadata."""
        ids = pa.from_numpy_dtype(token_dtype(self.vocab_size))
        if self.stage in PACKED_STAGES:
            fields = [("input_ids", pa.list_(ids, self.seq_len)), ("seq_lens", pa.list_(pa.int32()))]
            if self.weighted:
                fields.append(("weight", pa.list_(pa.uint8(), self.seq_len)))
        elif self.stage == "preference":
            fields = [(name, pa.list_(ids)) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
            fields += [(name, pa.list_(pa.uint8())) for name in ("chosen_weight", "rejected_weight")]
        else:
            fields = [("id", pa.string()), ("prompt_ids", pa.list_(ids))]
            fields += [(name, pa.string()) for name in ("messages", "answer", "verifier", "meta")]
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "stage": self.stage,
            "seq_len": str(self.seq_len),
            "tokenizer_hash": self.tokenizer_hash,
        }
        if self.stage in WEIGHTED_STAGES or self.stage == "preference":
            metadata["weight_table"] = json.dumps(self.weight_table)
        return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields], metadata=metadata)


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths: list i is `values[offsets[i]:offsets[i + 1]]`; offsets int32 [n + 1]."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> Ragged:
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


@dataclass(frozen=True)
class ShardInfo:
    """A written shard as the manifest lists it; `file` is relative to the dataset's folder."""

    file: str
    rows: int
    bytes: int
    sha256: str


class ShardWriter:
    """Writes the shards of one dataset: `write("train", 0, columns)`. The same columns give the same bytes.

    Columns are NumPy [rows, seq_len] arrays for fixed-size lists, `Ragged` for lists, and Python strings.
    """

    def __init__(self, folder: Path, shard_format: ShardFormat) -> None:
        self.folder = Path(folder)
        self.schema = shard_format.schema()

    def write(self, split: str, index: int, columns: dict[str, Any]) -> ShardInfo:
        """Write shard `index` of `split` atomically and say what was written."""
        arrays = [_arrow_array(columns[field.name], field.type) for field in self.schema]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self.schema) as writer:
            writer.write_batch(batch)
        data = sink.getvalue()
        name = f"{split}/shard_{index:05d}.arrow"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        return ShardInfo(name, batch.num_rows, data.size, hashlib.sha256(data).hexdigest())


def _arrow_array(column: Any, kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1), kind.value_type), type=kind)
    if pa.types.is_list(kind):
        values = pa.array(column.values, kind.value_type)
        return pa.ListArray.from_arrays(pa.array(column.offsets, pa.int32()), values, type=kind)
    return pa.array(column, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write `manifest.json`, which makes the folder a dataset; returns the manifest with its checksum."""
    sealed = {key: value for key, value in manifest.items() if key != "checksum"}
    sealed["checksum"] = hashlib.sha256(_manifest_bytes(sealed)).hexdigest()
    write_atomically(Path(folder) / MANIFEST, _manifest_bytes(sealed))
    return sealed


def has_manifest(folder: Path) -> bool:
    """Whether a manifest of ours is there, be it damaged: many programs call a file manifest.json."""
    try:
        return f'"format": "{FORMAT}"'.encode() in (Path(folder) / MANIFEST).read_bytes()
    except OSError:
        return False


def is_packed(folder: Path) -> bool:
    """Whether a dataset was packed into this folder, whole or not, or is being packed."""
    folder = Path(folder)
    return has_manifest(folder) or (folder / WORK).is_dir() or any((folder / "train").glob("shard_*.arrow"))


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a finished dataset and the dataset's fingerprint (SHA-256 of the file).

    Errors: UserError when the folder is missing, unfinished, of another format, or when the file was changed.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        if not Path(folder).is_dir():
            raise UserError(f"No such dataset folder: {folder}; make one with `minigpt data pack`.")
        raise UserError(
            f"{folder} has no {MANIFEST}, so it is not a finished dataset: run the same `minigpt data pack` command "
            "again, it goes on where it stopped."
        )
    if not has_manifest(folder):
        raise UserError(f"{path} is of no packed dataset: pack one with `minigpt data pack` into a folder of its own.")
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        checksum = manifest.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{path} is damaged or was edited: pack the dataset again with --overwrite.") from None
    intact = hashlib.sha256(_manifest_bytes(manifest)).hexdigest() == checksum
    manifest["checksum"] = checksum
    if not intact or _manifest_bytes(manifest) != raw:
        raise UserError(f"{path} is damaged or was edited: pack the dataset again with --overwrite.")
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        found = f"{manifest.get('format')} v{manifest.get('version')}"
        raise UserError(f"{path} says {found}, this version reads {FORMAT} v{VERSION}: pack the dataset again.")
    return manifest, hashlib.sha256(raw).hexdigest()


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Checking a shard before its first use


class _VerifiedFiles:
    """Remembers, across runs, which files were hashed: (device, inode, size, mtime, ctime) → SHA-256.

    It lives in the user's cache folder and only saves time: when it cannot be read or written, files are hashed again.
    """

    LIMIT = 20_000
    SETTLED_NS = 2_000_000_000  # a file changed within the clock's granularity after hashing would keep its mtime

    def __init__(self) -> None:
        folder = next(cache_folders(), None)
        self.path = None if folder is None else folder / "verified_shards.json"
        self.entries = self._load()

    def _load(self) -> dict[str, str]:
        if self.path is None:
            return {}
        try:
            entries = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    @staticmethod
    def _key(stat: os.stat_result) -> str:
        return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"

    def get(self, stat: os.stat_result) -> str | None:
        return self.entries.get(self._key(stat))

    def remember(self, stat: os.stat_result, sha256: str) -> None:
        if self.path is None or time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) < self.SETTLED_NS:
            return
        merged = {**self._load(), **self.entries, self._key(stat): sha256}
        self.entries = dict(list(merged.items())[-self.LIMIT :])
        try:
            write_atomically(self.path, json.dumps(self.entries).encode())
        except (OSError, NoSpaceError):
            return  # a cache that cannot be written only costs time


class _ShardChecker:
    """Hashes shards before their first use, the next one ahead in a background thread."""

    def __init__(self, paths: list[Path], digests: list[str]) -> None:
        self.paths = paths
        self.digests = digests
        self.good = [False] * len(paths)
        self.remembered = _VerifiedFiles()
        self.ahead: tuple[int, threading.Thread] | None = None

    def require(self, index: int) -> None:
        """Return when shard `index` is known to be what the manifest says. Errors: UserError naming the file."""
        if self.good[index]:
            return
        if self.ahead is not None:
            ahead_index, thread = self.ahead
            if ahead_index == index or not thread.is_alive():
                thread.join()
                self.ahead = None
        if not self.good[index]:
            self._check(index)
        self._start_next(index)

    def _check(self, index: int) -> None:
        path = self.paths[index]
        stat = path.stat()
        digest = self.remembered.get(stat)
        if digest != self.digests[index]:
            digest = file_sha256(path)
            if digest != self.digests[index]:
                raise UserError(
                    f"{path} is damaged (its SHA-256 is not the one in {MANIFEST}): restore the file or pack the "
                    "dataset again."
                )
            self.remembered.remember(stat, digest)
        self.good[index] = True

    def _start_next(self, index: int) -> None:
        if self.ahead is not None:
            return
        order = [*range(index + 1, len(self.paths)), *range(index)]
        following = next((i for i in order if not self.good[i]), None)
        if following is not None:
            thread = threading.Thread(target=self._check_quietly, args=(following,), daemon=True)
            self.ahead = (following, thread)
            thread.start()

    def _check_quietly(self, index: int) -> None:
        # What is wrong with a shard ahead is said by `require`, which checks it again when it is needed.
        try:
            self._check(index)
        except (OSError, UserError):
            return


# ---------------------------------------------------------------------------------------------------------------------
# Rows and the reader


@dataclass(frozen=True, slots=True)
class Row:
    """A packed row: `seq_lens` cuts `input_ids` into documents; what is left at the end is padding.

    Args:
        input_ids: uint16 or uint32 [T].
        seq_lens: int32 [documents], sum ≤ T.
        weight: weight codes, uint8 [T], or None: every token weighs 1.
        weight_table: float32 [codes], or None.
    """

    input_ids: np.ndarray
    seq_lens: np.ndarray
    weight: np.ndarray | None = None
    weight_table: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A prompt with a better and a worse continuation; ids uint16 or uint32, weight codes uint8 (as in `Row`)."""

    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_weight: np.ndarray
    rejected_weight: np.ndarray


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt for reinforcement learning, with what a verifier needs to score an answer."""

    id: str
    prompt_ids: np.ndarray
    messages: list[dict[str, Any]]
    answer: str
    verifier: str
    meta: dict[str, Any]


class PackedDataset:
    """One split of a packed dataset, memory-mapped.

    Args:
        folder: what `minigpt data pack` wrote.
        split: "train" or "valid".
        weight_table: loss weights to use instead of the stored ones, one for each code.

    Errors: UserError when the folder is unfinished, a file is missing, has another size, or (at the first use of one
    of its rows) another SHA-256 than the manifest says.
    """

    def __init__(self, folder: Path | str, split: str = "train", weight_table: Sequence[float] | None = None) -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest, self.fingerprint = read_manifest(self.folder)
        if split not in self.manifest["splits"]:
            raise UserError(f"{self.folder} has no split {split!r}: it has {', '.join(self.manifest['splits'])}.")
        self.stage: str = self.manifest["stage"]
        self.seq_len: int = self.manifest["seq_len"]
        self.vocab_size: int = self.manifest["vocab_size"]
        self.tokenizer_hash: str = self.manifest["tokenizer"]["hash"]
        table = self.manifest["weight_table"] if weight_table is None else list(weight_table)
        self.weight_table = None if table is None else np.asarray(table, dtype=np.float32)
        shards = self.manifest["splits"][split]["shards"]
        paths = [self.folder / shard["file"] for shard in shards]
        for path, shard in zip(paths, shards, strict=True):
            _check_size(path, shard["bytes"])
        self._checker = _ShardChecker(paths, [shard["sha256"] for shard in shards])
        self._first_rows = np.concatenate([[0], np.cumsum([shard["rows"] for shard in shards], dtype=np.int64)])
        self._columns: list[dict[str, Any] | None] = [None] * len(shards)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getitem__(self, index: int) -> Row | PreferenceRow | PromptRow:
        return self.row(index)

    def __reduce__(self):
        table = None if self.weight_table is None else self.weight_table.tolist()
        return PackedDataset, (self.folder, self.split, table)

    def row(self, index: int) -> Any:
        """Row `index` as a `Row`, `PreferenceRow` or `PromptRow`; its arrays are read-only views of the file."""
        columns, i = self._locate(index)
        if self.stage in PACKED_STAGES:
            weight = columns["weight"][i] if "weight" in columns else None
            return Row(columns["input_ids"][i], _item(columns["seq_lens"], i), weight, self.weight_table)
        if self.stage == "preference":
            return PreferenceRow(**{name: _item(column, i) for name, column in columns.items()})
        text = {name: columns[name][i].as_py() for name in ("id", "messages", "answer", "verifier", "meta")}
        text["messages"], text["meta"] = json.loads(text["messages"]), json.loads(text["meta"])
        return PromptRow(prompt_ids=_item(columns["prompt_ids"], i), **text)

    def seq_lens(self, index: int) -> np.ndarray:
        """Lengths of the documents in packed row `index`, int32 [documents]: what FLOP counting needs."""
        columns, i = self._locate(index)
        return _item(columns["seq_lens"], i)

    @cached_property
    def token_byte_lengths(self) -> np.ndarray:
        """See the function of the same name; int32 [vocabulary]."""
        return token_byte_lengths(self.folder)

    def _locate(self, index: int) -> tuple[dict[str, Any], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.folder} ({self.split})")
        shard = int(np.searchsorted(self._first_rows, index, side="right")) - 1
        columns = self._columns[shard]
        if columns is None:
            self._checker.require(shard)
            columns = self._columns[shard] = map_columns(self._checker.paths[shard], self.seq_len)
        return columns, index - int(self._first_rows[shard])


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore the file or pack the dataset again.") from None
    if found != size:
        raise UserError(f"{path} is damaged ({found:,} bytes instead of {size:,}): restore it or pack again.")


def shard_schema(path: Path) -> pa.Schema:
    """The Arrow schema of a checked shard."""
    return pa.ipc.open_file(pa.memory_map(str(path))).schema


def map_columns(path: Path, seq_len: int) -> dict[str, Any]:
    """The columns of a checked shard: [rows, seq_len] arrays, `Ragged`, or Arrow strings; nothing is copied."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    columns: dict[str, Any] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if pa.types.is_fixed_size_list(field.type):
            columns[field.name] = column.values.to_numpy(zero_copy_only=True).reshape(-1, seq_len)
        elif pa.types.is_list(field.type):
            columns[field.name] = Ragged(column.values.to_numpy(), column.offsets.to_numpy())
        else:
            columns[field.name] = column
    return columns


def _item(lists: Ragged, i: int) -> np.ndarray:
    return lists.values[lists.offsets[i] : lists.offsets[i + 1]]


# ---------------------------------------------------------------------------------------------------------------------
# Rows → batch


def collate(rows: Sequence[Row], *, pad_to: int | None = None, n_rows: int | None = None) -> dict[str, np.ndarray]:
    """Stack rows into a batch. B = len(rows), T = `pad_to` or the longest row.

    Args:
        rows: packed rows.
        pad_to: length of the batch's rows; at least the longest row.
        n_rows: pad the batch with rows of padding up to this number (fixed shapes for compiled models).

    Returns:
        input_ids int64 [B, T]; labels int64 [B, T]: the next token of the same document, else -100;
        weights float32 [B, T]: loss weight of the *label*, 0 where there is none; position_ids int64 [B, T], from 0
        in each document; document_ids int32 [B, T], from 0 in each row, -1 on padding.
    """
    T = pad_to if pad_to is not None else max(len(row.input_ids) for row in rows)
    B = max(len(rows), n_rows or 0)
    input_ids = np.zeros((B, T), dtype=np.int64)
    token_weights = np.zeros((B, T), dtype=np.float32)
    document_ids = np.full((B, T), NO_DOCUMENT, dtype=np.int32)
    position_ids = np.zeros((B, T), dtype=np.int64)
    for b, row in enumerate(rows):  # a few vectorised operations a row, none a token
        n = int(row.seq_lens.sum())
        if n > T:
            raise ValueError(f"a row of {n} tokens does not fit into pad_to={T}: raise pad_to to {n}.")
        input_ids[b, : len(row.input_ids)] = row.input_ids[:T]
        document_ids[b, :n] = np.repeat(np.arange(len(row.seq_lens), dtype=np.int32), row.seq_lens)
        starts = np.cumsum(row.seq_lens) - row.seq_lens
        position_ids[b, :n] = np.arange(n) - np.repeat(starts, row.seq_lens)
        token_weights[b, :n] = _token_weights(row)[:n]
    has_label = np.zeros((B, T), dtype=bool)
    has_label[:, :-1] = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, :-1] >= 0)
    labels = np.full((B, T), NO_LABEL, dtype=np.int64)
    labels[:, :-1][has_label[:, :-1]] = input_ids[:, 1:][has_label[:, :-1]]
    weights = np.zeros((B, T), dtype=np.float32)
    weights[:, :-1] = np.where(has_label[:, :-1], token_weights[:, 1:], 0.0)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "weights": weights,
        "position_ids": position_ids,
        "document_ids": document_ids,
    }


def _token_weights(row: Row) -> np.ndarray:
    if row.weight is None:
        return np.ones(len(row.input_ids), dtype=np.float32)
    table = row.weight_table
    if table is None:
        table = np.asarray(DEFAULT_WEIGHT_TABLE, dtype=np.float32)
    return table[row.weight]


@dataclass(frozen=True)
class TokenStatistics:
    """What a batch holds, for loss normalisation and FLOP counting.

    Args:
        tokens: positions that belong to a document.
        labels: positions with a label of weight > 0.
        label_weight: sum of the label weights.
        attention_pairs: (query, key) pairs that block-diagonal causal attention computes, Σ n(n+1)/2.
    """

    tokens: int
    labels: int
    label_weight: float
    attention_pairs: int


def token_statistics(batch: dict[str, np.ndarray]) -> TokenStatistics:
    """Count a collated batch."""
    real = batch["document_ids"] >= 0
    return TokenStatistics(
        tokens=int(real.sum()),
        labels=int((batch["weights"] > 0).sum()),
        label_weight=float(batch["weights"].sum(dtype=np.float64)),
        attention_pairs=int((batch["position_ids"][real] + 1).sum()),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Order and batches


class GlobalOrder:
    """The order of samples in a run: `index(counter)` is the row that sample number `counter` is.

    Each epoch is another pseudo-random permutation of the rows, computed in O(1) memory by a Feistel network over
    the smallest power of four that covers `n_rows`; results outside are encrypted again until they fall inside
    ("cycle walking", Black & Rogaway 2002, https://doi.org/10.1007/3-540-45760-7_9).
    """

    ROUNDS = 8

    def __init__(self, n_rows: int, seed: int = 0) -> None:
        if n_rows < 1:
            raise ValueError(f"an order needs at least one row, not {n_rows}.")
        self.n_rows = n_rows
        self.seed = seed
        self.half_bits = max(1, ((n_rows - 1).bit_length() + 1) // 2)

    def index(self, counter: int) -> int:
        """The row of sample number `counter` (0, 1, 2 … over all epochs)."""
        return int(self.indices(np.array([counter], dtype=np.int64))[0])

    def indices(self, counters: np.ndarray) -> np.ndarray:
        """The rows of several samples: int64 [n] → int64 [n]."""
        epochs, positions = np.divmod(np.asarray(counters, dtype=np.int64), self.n_rows)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._permute(positions[chosen], int(epoch))
        return rows

    def _permute(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        keys = self._round_keys(epoch)
        values = self._encrypt(positions.astype(np.uint64), keys)
        while (outside := values >= self.n_rows).any():
            values[outside] = self._encrypt(values[outside], keys)
        return values.astype(np.int64)

    def _round_keys(self, epoch: int) -> np.ndarray:
        text = f"minigpt global order, seed {self.seed}, epoch {epoch}".encode()
        return np.frombuffer(hashlib.blake2b(text, digest_size=8 * self.ROUNDS).digest(), dtype="<u8")

    def _encrypt(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        bits = np.uint64(self.half_bits)
        mask = np.uint64((1 << self.half_bits) - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every input bit moves every output bit. uint64 [n]."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class RowSource(Protocol):
    """Anything with numbered packed rows."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row: ...


class BatchIterator:
    """Micro-batches of one rank, from sample `start_sample` on, in the global order.

    Step s takes the `global_batch_size` samples from `start_sample + s · global_batch_size`; rank r has the r-th of
    `world_size` equal slices of them, cut into micro-batches in order. So the samples of a step do not depend on the
    world size or the micro-batch, and resuming needs one integer. The last step of the last epoch is filled up from
    the epoch after it, so that all steps have one shape.

    Args:
        dataset: rows, such as a `PackedDataset` of a packed stage.
        micro_batch_size: rows in each yielded batch.
        global_batch_size: rows in a step over all ranks.
        rank: this process.
        world_size: processes.
        seed: of the order.
        start_sample: samples that were consumed before.
        epochs: stop after this many passes (rounded up to a whole step); None: no limit by epochs.
        max_samples: stop at this sample number (rounded up to a whole step); None: no limit by samples.
        pad_to: see `collate`.
    """

    def __init__(
        self,
        dataset: RowSource,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_sample: int = 0,
        epochs: int | None = None,
        max_samples: int | None = None,
        pad_to: int | None = None,
    ) -> None:
        if global_batch_size % (world_size * micro_batch_size):
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} × "
                f"{world_size} ranks: change one of them."
            )
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.order = GlobalOrder(len(dataset), seed)
        self.samples_consumed = start_sample
        limits = [epochs * len(dataset) if epochs is not None else None, max_samples]
        self.end_sample = min((limit for limit in limits if limit is not None), default=None)
        self.pad_to = pad_to

    @property
    def micro_batches_per_step(self) -> int:
        """How many batches one rank receives for one optimizer step."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield batches (see `collate`); `samples_consumed` counts whole steps, and already includes the current one
        when its last micro-batch is handed out."""
        while self.end_sample is None or self.samples_consumed < self.end_sample:
            rows = self.order.indices(self._counters(self.samples_consumed))
            for i in range(self.micro_batches_per_step):
                chosen = rows[i * self.micro_batch_size : (i + 1) * self.micro_batch_size]
                batch = collate([self.dataset.row(int(row)) for row in chosen], pad_to=self.pad_to)
                if i == self.micro_batches_per_step - 1:
                    self.samples_consumed += self.global_batch_size
                yield batch

    def _counters(self, start: int) -> np.ndarray:
        share = self.global_batch_size // self.world_size
        return start + self.rank * share + np.arange(share, dtype=np.int64)


def sequential_batches(
    dataset: RowSource,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int | None = None,
    pad_to: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Each row once for evaluation, or `max_rows` of them: this rank's batches, all of one shape.

    All ranks get the same number of batches; missing rows are rows of padding, whose weights are 0.
    """
    n = len(dataset) if max_rows is None else min(len(dataset), max_rows)
    order = np.arange(n)
    if n < len(dataset):  # packing puts the longest documents first, and they are easier than others
        order = np.sort(GlobalOrder(len(dataset), seed=0).indices(order))
    width = pad_to
    for start in range(0, n, batch_size * world_size):
        first = start + rank * batch_size
        rows = [dataset.row(int(i)) for i in order[first : min(first + batch_size, n)]]
        if width is None:
            width = len(dataset.row(0).input_ids)
        yield collate(rows, pad_to=width, n_rows=batch_size)
