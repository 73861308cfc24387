"""`minigpt data verify`: is a packed dataset whole, and is its content what the manifest says?

Every shard and tokenizer file is hashed (nothing is remembered from earlier runs), then the content is checked against
the format: ids within the vocabulary, documents within their rows, counts equal to the manifest's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minigpt.dataset.shards import (
    PACKED_STAGES,
    Ragged,
    ShardFormat,
    file_sha256,
    map_columns,
    read_manifest,
    shard_schema,
    tokenizer_hash,
)
from minigpt.errors import UserError

REMEDY = "restore the file or pack the dataset again with --overwrite."


def verify(folder: Path | str) -> str:
    """Check the whole dataset and return one line that sums it up. Errors: UserError naming the file and the fault."""
    folder = Path(folder)
    manifest, fingerprint = read_manifest(folder)
    for name, digest in manifest["tokenizer"]["files"].items():
        _check_digest(folder / name, digest)
    if tokenizer_hash(folder) != manifest["tokenizer"]["hash"]:
        raise UserError(f"{folder}/tokenizer.json is not the tokenizer that the manifest names: {REMEDY}")
    for split, entry in manifest["splits"].items():
        _check_listing(folder, split, entry)
        counts = [_check_shard(folder / shard["file"], shard, manifest) for shard in entry["shards"]]
        rows, tokens = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        if (rows, tokens) != (entry["rows"], entry["tokens"]):
            raise UserError(
                f"{folder}/{split} holds {rows:,} rows and {tokens:,} tokens, the manifest says {entry['rows']:,} and "
                f"{entry['tokens']:,}: {REMEDY}"
            )
    sizes = ", ".join(f"{split} {e['rows']:,} rows {e['tokens']:,} tokens" for split, e in manifest["splits"].items())
    n_shards = sum(len(entry["shards"]) for entry in manifest["splits"].values())
    return f"{folder}: good. Stage {manifest['stage']}, {sizes}, {n_shards} shards, fingerprint {fingerprint[:16]}."


def _check_digest(path: Path, digest: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing: {REMEDY}")
    if file_sha256(path) != digest:
        raise UserError(f"{path} is damaged (its SHA-256 is not the one in the manifest): {REMEDY}")


def _check_listing(folder: Path, split: str, entry: dict[str, Any]) -> None:
    listed = {shard["file"] for shard in entry["shards"]}
    for path in sorted((folder / split).glob("*.arrow")):
        if f"{split}/{path.name}" not in listed:
            raise UserError(f"{path} is not in the manifest: remove the file or pack the dataset again.")


def _check_shard(path: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> tuple[int, int]:
    """Check one shard; (rows, tokens)."""
    _check_digest(path, entry["sha256"])
    expected = ShardFormat(
        manifest["stage"],
        manifest["seq_len"],
        manifest["vocab_size"],
        manifest["tokenizer"]["hash"],
        tuple(manifest["weight_table"] or ()),
    )
    if not shard_schema(path).equals(expected.schema(), check_metadata=True):
        raise UserError(f"{path} has another schema than the manifest asks for: {REMEDY}")
    columns = map_columns(path, manifest["seq_len"])
    n_rows = entry["rows"]
    fault = _content_fault(columns, manifest, n_rows)
    if fault:
        raise UserError(f"{path} {fault}: {REMEDY}")
    if manifest["stage"] in PACKED_STAGES:
        return n_rows, int(columns["seq_lens"].values.sum())
    return n_rows, sum(len(columns[name].values) for name in columns if name.endswith("_ids"))


def _content_fault(columns: dict[str, Any], manifest: dict[str, Any], n_rows: int) -> str | None:
    """What is wrong with the content of a shard, or None."""
    for name, column in columns.items():
        values = column.values if isinstance(column, Ragged) else column
        if name.endswith("_ids") and len(values) and int(values.max()) >= manifest["vocab_size"]:
            return f"holds the token id {int(values.max())} of a vocabulary of {manifest['vocab_size']}"
        if name.endswith("weight") and len(values) and int(values.max()) >= len(manifest["weight_table"]):
            return f"holds the weight code {int(values.max())}, which the weight table lacks"
        found = len(column.offsets) - 1 if isinstance(column, Ragged) else len(column)
        if found != n_rows:
            return f"has {found} rows in {name}, the manifest says {n_rows}"
    if manifest["stage"] in PACKED_STAGES:
        lengths: Ragged = columns["seq_lens"]
        if len(lengths.values) and int(lengths.values.min()) < 1:
            return "holds an empty document"
        if n_rows and int(np.add.reduceat(lengths.values, lengths.offsets[:-1]).max()) > manifest["seq_len"]:
            return "holds documents that reach beyond their row"
    return None
