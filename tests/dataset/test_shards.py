"""The shard format: what is written is what is read, damage is refused, and the order is a function of a counter."""

import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

import minigpt
from minigpt.dataset.shards import (
    BatchIterator,
    GlobalOrder,
    PackedDataset,
    Ragged,
    Row,
    ShardFormat,
    ShardWriter,
    collate,
    read_manifest,
    sequential_batches,
    token_byte_lengths,
    token_statistics,
    write_manifest,
)
from minigpt.errors import UserError

SEQ_LEN = 16
VOCAB = 6400
SHIPPED = Path(minigpt.__file__).parent / "model"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def random_rows(n_rows: int, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids, seq_lens, weight codes) of rows with 1 to 4 documents and some padding."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n_rows):
        lens = [rng.randint(1, SEQ_LEN // 4) for _ in range(rng.randint(1, 4))]
        used = sum(lens)
        ids = [rng.randrange(VOCAB) for _ in range(used)] + [0] * (SEQ_LEN - used)
        rows.append((ids, lens, [rng.choice((0, 1, 2)) for _ in range(used)] + [0] * (SEQ_LEN - used)))
    return rows


def write_dataset(folder: Path, shard_sizes: list[int], stage: str = "sft", vocab_size: int = VOCAB):
    """A dataset of random rows, written without the packer; the rows."""
    rows = random_rows(sum(shard_sizes))
    writer = ShardWriter(folder, ShardFormat(stage, SEQ_LEN, vocab_size, "abc"))
    shards, at = [], 0
    for index, size in enumerate(shard_sizes):
        part = rows[at : at + size]
        at += size
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        columns = {
            "input_ids": np.array([ids for ids, _, _ in part], dtype=dtype),
            "seq_lens": Ragged.from_lengths(
                np.array([n for _, lens, _ in part for n in lens], np.int32),
                np.array([len(lens) for _, lens, _ in part]),
            ),
            "weight": np.array([codes for _, _, codes in part], dtype=np.uint8),
        }
        shards.append(vars(writer.write("train", index, columns)))
    write_manifest(
        folder,
        {
            "format": "minigpt-arrow",
            "version": 1,
            "stage": stage,
            "seq_len": SEQ_LEN,
            "vocab_size": vocab_size,
            "weight_table": [0.0, 1.0, 10.0],
            "tokenizer": {"hash": "abc"},
            "splits": {"train": {"shards": shards}},
        },
    )
    return rows


# --- format ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab_size", "dtype"), [(6400, pa.uint16()), (65536, pa.uint16()), (151_936, pa.uint32())])
def test_a_shard_is_an_uncompressed_arrow_file_with_one_batch_that_pyarrow_reads(tmp_path, vocab_size, dtype):
    rows = write_dataset(tmp_path, [7, 5], vocab_size=vocab_size)
    found = []
    for path in sorted(tmp_path.glob("train/*.arrow")):
        reader = pa.ipc.open_file(path)
        assert reader.num_record_batches == 1
        assert reader.schema.field("input_ids").type.value_type == dtype
        assert reader.schema.metadata[b"format"] == b"minigpt-arrow"
        assert json.loads(reader.schema.metadata[b"weight_table"]) == [0.0, 1.0, 10.0]
        table = reader.read_all()
        table.validate(full=True)
        columns = (table[name].to_pylist() for name in ("input_ids", "seq_lens", "weight"))
        found += list(zip(*columns, strict=True))
    assert found == rows


def test_other_arrow_readers_open_the_shards(tmp_path):
    rows = write_dataset(tmp_path, [7, 5])
    files = [str(path) for path in sorted(tmp_path.glob("train/*.arrow"))]
    loaded = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
    assert loaded["input_ids"] == [ids for ids, _, _ in rows]


def test_rows_come_back_as_read_only_views_of_the_file(tmp_path):
    rows = write_dataset(tmp_path, [7, 5, 1])
    dataset = PackedDataset(tmp_path)
    assert len(dataset) == 13
    before = pa.total_allocated_bytes()
    read = [dataset.row(i) for i in range(13)]
    assert pa.total_allocated_bytes() == before
    for row, (ids, lens, codes) in zip(read, rows, strict=True):
        assert row.input_ids.tolist() == ids
        assert row.seq_lens.tolist() == lens
        assert row.weight.tolist() == codes
        for array in (row.input_ids, row.seq_lens, row.weight):
            assert not array.flags.owndata
            assert not array.flags.writeable


def test_a_dataset_can_be_pickled_and_refuses_rows_that_are_not_there(tmp_path):
    write_dataset(tmp_path, [3])
    dataset = pickle.loads(pickle.dumps(PackedDataset(tmp_path, weight_table=[0, 1, 3])))
    assert dataset.weight_table.tolist() == [0, 1, 3]
    assert len(list(dataset)) == 3  # iteration ends with IndexError
    with pytest.raises(IndexError):
        dataset.row(3)
    with pytest.raises(UserError, match="no split 'test'"):
        PackedDataset(tmp_path, "test")


def test_the_same_columns_give_the_same_bytes(tmp_path):
    write_dataset(tmp_path / "a", [7, 5])
    write_dataset(tmp_path / "b", [7, 5])
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_hundred_flips_and_twenty_truncations_are_all_refused_by_name(tmp_path):
    write_dataset(tmp_path, [40, 40])
    path = tmp_path / "train" / "shard_00001.arrow"
    good = path.read_bytes()
    rng = random.Random(1)
    damaged = []
    for _ in range(100):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(data))
    damaged += [good[: rng.randrange(len(good))] for _ in range(20)]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(UserError, match=str(path)):
            PackedDataset(tmp_path).row(79)
    path.write_bytes(good)
    assert PackedDataset(tmp_path).row(79) is not None


def test_damage_ahead_of_the_row_in_use_is_found_when_it_is_reached(tmp_path):
    write_dataset(tmp_path, [4, 4, 4])
    path = tmp_path / "train" / "shard_00001.arrow"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    dataset = PackedDataset(tmp_path)
    for i in (0, 1, 8):
        dataset.row(i)
    with pytest.raises(UserError, match="shard_00001"):
        dataset.row(5)


def test_any_change_of_the_manifest_is_refused(tmp_path):
    write_dataset(tmp_path, [3])
    path = tmp_path / "manifest.json"
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        data = bytearray(good)
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"manifest\.json"):
            PackedDataset(tmp_path)
    path.write_bytes(good + b"\n")
    with pytest.raises(UserError, match=r"manifest\.json"):
        PackedDataset(tmp_path)
    path.write_bytes(good)
    fingerprint = read_manifest(tmp_path)[1]
    assert fingerprint == PackedDataset(tmp_path).fingerprint


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(UserError, match="No such dataset folder"):
        PackedDataset(tmp_path / "nowhere")
    write_dataset(tmp_path, [3, 3])
    (tmp_path / "train" / "shard_00001.arrow").unlink()
    with pytest.raises(UserError, match=r"shard_00001\.arrow is missing"):
        PackedDataset(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished dataset"):
        PackedDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json is of no packed dataset"):
        PackedDataset(tmp_path)


def test_a_remembered_file_is_not_hashed_again_and_a_fresh_one_is_not_remembered(tmp_path):
    write_dataset(tmp_path, [3])
    path = tmp_path / "train" / "shard_00000.arrow"
    PackedDataset(tmp_path).row(0)
    cache = tmp_path / "cache" / "minigpt" / "verified_shards.json"
    assert not cache.exists()  # it could still change within the resolution of its time stamps

    data = bytearray(path.read_bytes())
    ids = np.array(random_rows(3)[0][0], np.uint16).tobytes()
    data[data.index(ids)] ^= 1  # Arrow itself does not notice
    path.write_bytes(data)
    stat = path.stat()
    key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    digest = read_manifest(tmp_path)[0]["splits"]["train"]["shards"][0]["sha256"]
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({key: digest}))
    PackedDataset(tmp_path).row(0)  # believed, since the cache says that this very file was hashed
    os.utime(path)
    with pytest.raises(UserError, match="damaged"):
        PackedDataset(tmp_path).row(0)


def test_a_write_beyond_the_size_limit_is_one_sentence_and_leaves_the_old_file(tmp_path):
    program = """
import resource, sys
from pathlib import Path
from minigpt.dataset.shards import NoSpaceError, write_atomically
path = Path(sys.argv[1])
write_atomically(path, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(path, b"x" * 5000)
except NoSpaceError as error:
    assert str(path) in str(error), error
    sys.exit(0 if path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1 else 3)
"""
    (tmp_path / "folder").mkdir()
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "folder" / "file")]).returncode == 0


# --- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_every_epoch_is_a_permutation(n_rows):
    order = GlobalOrder(n_rows, seed=3)
    for epoch in range(3):
        counters = np.arange(epoch * n_rows, (epoch + 1) * n_rows)
        assert np.array_equal(np.sort(order.indices(counters)), np.arange(n_rows))


def test_order_depends_on_seed_and_epoch_only():
    counters = np.arange(2000)
    first = GlobalOrder(1000, seed=1).indices(counters)
    assert np.array_equal(first, [GlobalOrder(1000, seed=1).index(int(c)) for c in counters])
    assert (first[:1000] != first[1000:]).mean() > 0.99
    assert (first != GlobalOrder(1000, seed=2).indices(counters)).mean() > 0.99


def test_order_needs_no_memory_for_a_trillion_rows():
    rows = GlobalOrder(10**12, seed=0).indices(np.arange(1000))
    assert len(np.unique(rows)) == 1000
    assert rows.min() >= 0
    assert rows.max() < 10**12
    assert abs(rows.mean() / 10**12 - 0.5) < 0.05  # a uniform mean has a standard error of 0.009


def test_every_row_is_equally_likely_at_every_place():
    counts = np.zeros((7, 7))
    for seed in range(3000):
        counts[np.arange(7), GlobalOrder(7, seed).indices(np.arange(7))] += 1
    expected = 3000 / 7
    chi_square = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert chi_square.max() < 30  # 6 degrees of freedom: P(> 30) is 4e-5


# --- batches ---------------------------------------------------------------------------------------------------------


def reference_batch(rows: list[Row], width: int):
    """The definition of a batch, token by token."""
    batch = {name: [] for name in ("input_ids", "labels", "weights", "position_ids", "document_ids")}
    for row in rows:
        table = [1.0] * 3 if row.weight is None else row.weight_table
        codes = [1] * width if row.weight is None else row.weight
        ids, labels, weights, positions, documents = [], [], [], [], []
        at = 0
        for document, length in enumerate(row.seq_lens):
            for position in range(length):
                last = position == length - 1
                ids.append(int(row.input_ids[at]))
                labels.append(-100 if last else int(row.input_ids[at + 1]))
                weights.append(0.0 if last else float(table[codes[at + 1]]))
                positions.append(position)
                documents.append(document)
                at += 1
        rest = width - at
        for name, values, filler in (
            ("input_ids", ids, 0),
            ("labels", labels, -100),
            ("weights", weights, 0.0),
            ("position_ids", positions, 0),
            ("document_ids", documents, -1),
        ):
            batch[name].append(values + [filler] * rest)
    return batch


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("pad_to", [None, SEQ_LEN + 5])
def test_collate_is_the_token_by_token_definition(weighted, pad_to):
    table = np.array([0, 1, 10], np.float32)
    rows = [
        Row(
            np.array(ids, np.uint16),
            np.array(lens, np.int32),
            np.array(codes, np.uint8) if weighted else None,
            table if weighted else None,
        )
        for ids, lens, codes in random_rows(50, seed=4)
    ]
    batch = collate(rows, pad_to=pad_to)
    for name, expected in reference_batch(rows, pad_to or SEQ_LEN).items():
        assert batch[name].tolist() == expected, name
    kinds = {"input_ids": "int64", "labels": "int64", "weights": "float32", "position_ids": "int64"}
    assert {name: str(batch[name].dtype) for name in batch} == {**kinds, "document_ids": "int32"}


def test_statistics_have_the_closed_form_of_the_lengths(tmp_path):
    write_dataset(tmp_path, [20])
    dataset = PackedDataset(tmp_path)
    batch = collate([dataset.row(i) for i in range(20)])
    lens = np.concatenate([dataset.seq_lens(i) for i in range(20)]).astype(np.int64)
    found = token_statistics(batch)
    assert found.tokens == lens.sum()
    assert found.attention_pairs == (lens * (lens + 1) // 2).sum()
    assert found.label_weight == pytest.approx(batch["weights"].sum())
    assert found.labels == np.count_nonzero(batch["weights"])


class Numbered:
    """Rows whose first token is their number."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def row(self, index: int) -> Row:
        return Row(np.array([index, 0], np.uint16), np.array([2], np.int32))


def rows_of(batches) -> list[int]:
    return [int(i) for batch in batches for i in batch["input_ids"][:, 0]]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 12), (1, 4), (2, 3), (4, 1), (3, 4)])
def test_a_step_holds_the_same_samples_at_any_world_size_and_micro_batch(world_size, micro):
    dataset, steps = Numbered(50), 9
    expected = GlobalOrder(50, seed=5).indices(np.arange(steps * 12)).reshape(steps, 12)
    ranks = [
        BatchIterator(
            dataset,
            micro_batch_size=micro,
            global_batch_size=12,
            rank=rank,
            world_size=world_size,
            seed=5,
            max_samples=steps * 12,
        )
        for rank in range(world_size)
    ]
    per_rank = [np.array(rows_of(rank)).reshape(steps, 12 // world_size) for rank in ranks]
    assert np.array_equal(np.concatenate(per_rank, axis=1), expected)


def test_resuming_needs_one_integer_and_may_change_the_world_size():
    whole = rows_of(BatchIterator(Numbered(50), micro_batch_size=4, global_batch_size=8, seed=1, max_samples=80))
    first = BatchIterator(Numbered(50), micro_batch_size=4, global_batch_size=8, seed=1, max_samples=80)
    stream = iter(first)
    done = rows_of([next(stream) for _ in range(6)])
    assert first.samples_consumed == 24
    rest = [
        BatchIterator(
            Numbered(50),
            micro_batch_size=2,
            global_batch_size=8,
            seed=1,
            rank=rank,
            world_size=2,
            start_sample=first.samples_consumed,
            max_samples=80,
        )
        for rank in range(2)
    ]
    halves = [np.array(rows_of(each)).reshape(-1, 4) for each in rest]
    assert done + np.concatenate(halves, axis=1).reshape(-1).tolist() == whole


def test_an_epoch_sees_every_row_and_its_last_step_is_whole():
    seen = rows_of(BatchIterator(Numbered(50), micro_batch_size=4, global_batch_size=8, epochs=1))
    assert len(seen) == 56
    assert sorted(seen[:50]) == list(range(50))


def test_batch_sizes_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="global_batch_size 10"):
        BatchIterator(Numbered(5), micro_batch_size=4, global_batch_size=10)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_row_once_in_batches_of_one_shape(world_size):
    ranks = [list(sequential_batches(Numbered(10), 4, rank=r, world_size=world_size)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch["input_ids"].shape == (4, 2) for batches in ranks for batch in batches)
    real = Counter(
        int(batch["input_ids"][b, 0])
        for batches in ranks
        for batch in batches
        for b in range(4)
        if batch["document_ids"][b, 0] >= 0
    )
    assert real == Counter(range(10))


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_of_some_rows_takes_them_from_the_whole_dataset(world_size):
    """Packing puts the longest documents into the first rows."""
    seen = sorted(
        int(batch["input_ids"][b, 0])
        for r in range(world_size)
        for batch in sequential_batches(Numbered(1000), 4, rank=r, world_size=world_size, max_rows=50)
        for b in range(4)
        if batch["document_ids"][b, 0] >= 0
    )
    assert len(set(seen)) == 50
    assert sum(row < 500 for row in seen) in range(15, 36)
    assert seen == sorted(GlobalOrder(1000, seed=0).indices(np.arange(50)).tolist()), "always the same"


def test_byte_lengths_add_up_to_the_text():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    lengths = token_byte_lengths(SHIPPED)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x4E00, 0x9FFF)))) for _ in range(50))
        assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())
    assert lengths[tokenizer.token_to_id("<|im_end|>")] == 0
