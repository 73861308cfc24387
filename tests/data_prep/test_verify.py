"""`verify` accepts what the packer writes and names the file of every kind of damage."""

import json
from pathlib import Path

import numpy as np
import pytest

import minigpt
from data_prep.pack import PackOptions, pack
from data_prep.verify import verify
from minigpt.dataset.shards import (
    PackedDataset,
    Ragged,
    ShardFormat,
    ShardWriter,
    read_manifest,
    write_manifest,
)
from minigpt.errors import UserError

SHIPPED = Path(minigpt.__file__).parent / "model"


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "a.jsonl"
    turn = '{{"messages": [{{"role": "user", "content": "{0}?"}}, {{"role": "assistant", "content": "{0}!"}}]}}\n'
    source.write_text("".join(turn.format(f"number {i}") for i in range(60)))
    pack(PackOptions("sft", [source], tmp_path / "out", seq_len=64, workers=1, valid_fraction=0.2))
    return tmp_path / "out"


def test_a_good_dataset_is_summed_up_in_one_line(dataset):
    summary = verify(dataset)
    assert "\n" not in summary
    manifest, fingerprint = read_manifest(dataset)
    for part in ("good", "sft", f"{manifest['splits']['train']['rows']:,} rows", fingerprint[:16]):
        assert part in summary


@pytest.mark.parametrize(
    "name", ["train/shard_00000.arrow", "valid/shard_00000.arrow", "tokenizer.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_refused_by_name(dataset, name, damage):
    path = dataset / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-9])
    else:
        path.unlink()
    with pytest.raises(UserError, match=name) as caught:
        verify(dataset)
    assert "\n" not in str(caught.value)


def test_damage_is_found_even_where_a_reader_remembers_the_file_as_good(dataset, tmp_path):
    path = dataset / "train" / "shard_00000.arrow"
    digest = read_manifest(dataset)[0]["splits"]["train"]["shards"][0]["sha256"]
    data = bytearray(path.read_bytes())
    ids = PackedDataset(dataset).row(0).input_ids.tobytes()
    data[data.index(ids)] ^= 1
    path.write_bytes(data)
    stat = path.stat()
    key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    cache = tmp_path / "cache" / "minigpt" / "verified_shards.json"
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({key: digest}))
    PackedDataset(dataset).row(0)
    with pytest.raises(UserError, match="shard_00000"):
        verify(dataset)


def test_a_file_that_the_manifest_does_not_list_is_refused(dataset):
    (dataset / "train" / "shard_00009.arrow").write_bytes(b"stray")
    with pytest.raises(UserError, match="shard_00009"):
        verify(dataset)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input_ids": 6400}, "token id 6400"),
        ({"weight": 7}, "weight code 7"),
        ({"seq_lens": 65}, "beyond their row"),
        ({"seq_lens": 0}, "empty document"),
    ],
)
def test_content_against_the_format_is_refused_although_its_hash_is_right(dataset, change, expected):
    manifest, _ = read_manifest(dataset)
    tokenizer = manifest["tokenizer"]["hash"]
    values = {"input_ids": 5, "weight": 1, "seq_lens": 64, **change}
    columns = {
        "input_ids": np.full((2, 64), values["input_ids"], np.uint16),
        "weight": np.full((2, 64), values["weight"], np.uint8),
        "seq_lens": Ragged.from_lengths(np.array([values["seq_lens"], 3], np.int32), np.array([1, 1])),
    }
    info = ShardWriter(dataset, ShardFormat("sft", 64, 6400, tokenizer)).write("train", 0, columns)
    manifest["splits"]["train"].update(shards=[vars(info)], rows=2, tokens=values["seq_lens"] + 3)
    write_manifest(dataset, manifest)
    with pytest.raises(UserError, match=expected):
        verify(dataset)


def test_counts_that_do_not_add_up_are_refused(dataset):
    manifest, _ = read_manifest(dataset)
    manifest["splits"]["valid"]["tokens"] += 1
    write_manifest(dataset, manifest)
    with pytest.raises(UserError, match="the manifest says"):
        verify(dataset)
