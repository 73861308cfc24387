"""Log-probabilities of all answers under the weights that a run starts from, computed once and kept in a file.

The reference of DPO never changes, so a forward pass of it at every step is a quarter of the work for nothing. The file
lies in the run folder and is used again when the run goes on, or is trained anew from the same weights. It says what it
belongs to (data, weights, precision) and holds a checksum: a file that is damaged or belongs to something else is said
and made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minigpt.dataset.shards import write_atomically

FILE = "reference_log_probs.safetensors"
Tables = dict[str, np.ndarray]


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the names and float32 values of all weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name].numpy()).view(np.uint8).data)
    return digest.hexdigest()


def write_tables(path: Path, tables: Tables, key: Mapping[str, str]) -> None:
    """Write float64 [pairs, 2] for every split; the file is whole or as it was."""
    header = json.dumps({"key": dict(key), "sha256": _tables_hash(tables)}, sort_keys=True)
    write_atomically(path, save(tables, metadata={"header": header}))


def read_tables(path: Path, key: Mapping[str, str]) -> tuple[Tables | None, str]:
    """What `write_tables` stored, or None and in words why it cannot be used ("" when there is no file)."""
    if not path.exists():
        return None, ""
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        return None, f"cannot be read ({str(error).splitlines()[0]})"
    if header.get("sha256") != _tables_hash(tables):
        return None, "is damaged"
    other = [name for name, value in key.items() if header["key"].get(name) != value]
    return (None, f"was made with other {' and '.join(other)}") if other else (tables, "")


def _tables_hash(tables: Tables) -> str:
    digest = hashlib.sha256()
    for name in sorted(tables):
        digest.update(f"{name} {tables[name].shape} {tables[name].dtype}".encode())
        digest.update(np.ascontiguousarray(tables[name]).tobytes())
    return digest.hexdigest()
