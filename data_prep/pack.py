"""`minigpt data pack`: raw files → clean, tokenized, packed Arrow shards.

Two passes. The first reads every chunk of the input, filters, hashes and tokenizes it into a spill (`spill.py`). Then
the plan (`plan.py`) decides from the documents' digests and lengths alone which are kept and where each token goes.
The second pass writes the shards; a shard is a function of (plan, options, index). All of it happens in
`OUTPUT/.packing`, every file appears there whole or not at all, and `manifest.json` comes last: so the output is the
same, byte for byte, for any number of workers and after any number of kills, and a killed run goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from data_prep.clean import MIN_EVAL_UNITS, SCRIPTS, ContaminationIndex, Filters, near_duplicates
from data_prep.plan import Rows, choose_valid, first_occurrences, one_row_each, pack_whole, pack_with_splits
from data_prep.readers import detect_format, list_files, read_exam_texts, split_into_chunks
from data_prep.spill import MAX_EXAMPLES, Job, load_job, npy_bytes, spill_path, tokenize_chunk
from minigpt.dataset.shards import (
    DEFAULT_WEIGHT_TABLE,
    FORMAT,
    MANIFEST,
    PACKED_STAGES,
    STAGES,
    TOKENIZER_FILES,
    VERSION,
    WEIGHTED_STAGES,
    WORK,
    NoSpaceError,
    Ragged,
    ShardFormat,
    ShardWriter,
    file_sha256,
    has_manifest,
    read_manifest,
    token_dtype,
    tokenizer_hash,
    write_atomically,
    write_manifest,
)
from minigpt.errors import UserError
from minigpt.system import usable_cores

CHUNK_BYTES = 4 << 20
SPLITS = ("train", "valid")
TOKENIZER_COPIES = (*TOKENIZER_FILES, "chat_template.jinja")
Progress = Callable[[str, int, int], None]  # (what is done, how many are finished, how many there are)


class WorkerDiedError(UserError):
    """A worker process was killed from outside."""


class OtherDatasetError(UserError):
    """The output holds a dataset of other input or options."""


RESUMABLE = (NoSpaceError, WorkerDiedError, OSError, MemoryError)  # the same command can go on with what is finished


@dataclass
class PackOptions:
    """Turn raw files into a packed dataset.

    Args:
        stage: what the dataset is for: pretrain, sft, reason, preference or prompt.
        input: files or folders: text, Markdown, JSON Lines, JSON arrays, Parquet.
        output: folder of the dataset; new, empty, or left behind by an interrupted run.
        tokenizer: folder with tokenizer.json; the tokenizer that MiniGPT ships when not given.
        seq_len: tokens a row, or the longest sequence for preference and prompt.
        workers: processes; the output does not depend on it.
        valid_fraction: share of documents held out for validation, chosen by their content.
        seed: of the choice of validation documents.
        on_bad_record: stop at a record that cannot be used, or skip and count it.
        too_long: what becomes of conversations longer than seq_len.
        shard_mb: size of a shard in MiB.
        minhash: drop documents at least this similar (0 to 1) to an earlier one; off when not given.
        min_chars: drop documents with fewer characters.
        max_chars: drop documents with more characters.
        max_repetition: drop documents with a larger share (0 to 1) of repeated 10-character windows.
        max_bad_chars: drop documents with a larger share (0 to 1) of control, private-use and replacement characters.
        scripts: keep documents with at least 90 % of their letters in these scripts, such as latin, han.
        decontaminate: evaluation files; documents that share an n-gram with them are dropped.
        decontaminate_ngram: words (Chinese: characters) of that n-gram.
        overwrite: pack again when the output holds another finished dataset.
        ray: run the work as Ray tasks, on as many machines as the cluster has (they must share the file system).
    """

    stage: Literal["pretrain", "sft", "reason", "preference", "prompt"]
    input: list[Path]
    output: Path
    tokenizer: Path | None = None
    seq_len: int = 512
    workers: int = field(default_factory=usable_cores)
    valid_fraction: float = 0.01
    seed: int = 0
    on_bad_record: Literal["error", "skip"] = "error"
    too_long: Literal["truncate", "drop"] = "truncate"
    shard_mb: int = 64
    minhash: float | None = None
    min_chars: int = 1
    max_chars: int | None = None
    max_repetition: float | None = None
    max_bad_chars: float | None = None
    scripts: list[str] | None = None
    decontaminate: list[Path] = field(default_factory=list)
    decontaminate_ngram: int = 13
    overwrite: bool = False
    ray: bool = False


def pack(options: PackOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Pack a dataset and return its manifest. A finished dataset of the same input and options is left as it is.

    Errors: UserError (or FileNotFoundError) in one sentence for options, input or output that cannot be used.
    """
    _check_options(options)
    job = _make_job(options)
    output = Path(options.output)
    found = _existing(output, options, job)
    work = output / WORK
    if found is not None:
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed after its manifest
        return found
    created = not output.exists()
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        try:
            _prepare(work, job, options)
            manifest = _Packer(output, work, options, job, progress or (lambda *_: None)).run()
        except RESUMABLE:
            raise
        except Exception:  # input or options (or this program) must change: nothing that was made can be used again
            _clear(output)
            _remove(output if created else work)
            raise
    shutil.rmtree(work, ignore_errors=True)  # another process may have found the manifest and be doing the same
    return manifest


def describe(manifest: dict[str, Any]) -> str:
    """A short report of what went in, what was dropped and why, and what is stored."""
    documents, tokens = manifest["documents"], manifest["tokens"]
    lines = [
        f"stage {manifest['stage']}, rows of {manifest['seq_len']} tokens",
        f"documents: {documents['in']:,} in = {documents['kept']:,} kept"
        + "".join(f" + {count:,} {reason.replace('_', ' ')}" for reason, count in documents["dropped"].items()),
        f"tokens: {tokens['in']:,} in = {tokens['stored']:,} stored + {tokens['truncated']:,} truncated",
    ]
    for name, split in manifest["splits"].items():
        full = f", {split['fill']:.2%} full" if manifest["stage"] in PACKED_STAGES else ""
        lines.append(
            f"{name}: {split['rows']:,} rows, {split['documents']:,} documents, {split['tokens']:,} tokens in "
            f"{len(split['shards'])} shards{full}"
        )
    if (exam := manifest.get("evaluation_items")) and exam["too_short"]:
        lines.append(
            f"of {exam['given']:,} evaluation texts {exam['too_short']:,} are too short to be looked for in the data"
        )
    lines += [f"skipped {example}" for example in manifest["bad_records"]]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Before the work


def _check_options(options: PackOptions) -> None:
    shares = ("minhash", "max_repetition", "max_bad_chars")
    wrong = [
        (options.stage not in STAGES, f"stage {options.stage!r} is none of {', '.join(STAGES)}"),
        (not 2 <= options.seq_len <= 1 << 24, f"seq_len {options.seq_len} is not between 2 and {1 << 24}"),
        (options.workers < 1, f"workers {options.workers} is below 1"),
        (not 0 <= options.valid_fraction < 1, f"valid_fraction {options.valid_fraction} is not in [0, 1)"),
        (not 1 <= options.shard_mb <= 1024, f"shard_mb {options.shard_mb} is not between 1 and 1024"),
        (options.decontaminate_ngram < 1, f"decontaminate_ngram {options.decontaminate_ngram} is below 1"),
        *(
            ((value := getattr(options, name)) is not None and not 0 < value <= 1, f"{name} {value} is not in (0, 1]")
            for name in shares
        ),
        *(
            (script not in SCRIPTS, f"script {script!r} is none of {', '.join(SCRIPTS)}")
            for script in _scripts(options)
        ),
    ]
    for is_wrong, sentence in wrong:
        if is_wrong:
            raise UserError(f"{sentence}: change it.")


def _scripts(options: PackOptions) -> list[str]:
    return options.scripts or []


def _make_job(options: PackOptions) -> Job:
    files = list_files(options.input)
    stats = [(path, path.stat()) for path in files]
    _check_tokenizer(_tokenizer_folder(options))
    exams = [(path, path.stat()) for path in list_files(options.decontaminate)] if options.decontaminate else []
    return Job(
        stage=options.stage,
        seq_len=options.seq_len,
        on_bad_record=options.on_bad_record,
        too_long=options.too_long,
        filters=Filters(
            options.min_chars,
            options.max_chars,
            options.max_repetition,
            options.max_bad_chars,
            tuple(options.scripts) if options.scripts else None,
        ),
        minhash=options.minhash is not None,
        contamination=bool(exams),
        tokenizer=str(Path(options.output).resolve()),
        chunks=tuple(
            chunk for path, stat in stats for chunk in split_into_chunks(path, _chunk_bytes(path, stat.st_size))
        ),
        inputs=tuple((path.name, stat.st_size, stat.st_mtime_ns) for path, stat in [*stats, *exams]),
        plan_options={
            "tokenizer_hash": tokenizer_hash(_tokenizer_folder(options)),
            "template_hash": _template_hash(_tokenizer_folder(options)),
            "valid_fraction": options.valid_fraction,
            "seed": options.seed,
            "shard_mb": options.shard_mb,
            "minhash": options.minhash,
            "decontaminate_ngram": options.decontaminate_ngram,
        },
    )


def _check_tokenizer(folder: Path) -> None:
    """Refuse what joins a text with its neighbours, such as SentencePiece: segments could not be encoded one by one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return  # whoever reads it says so
    plain = json.loads(path.read_text(encoding="utf-8"))
    kind = (plain.get("model") or {}).get("type")
    if kind != "BPE" or '"ByteLevel"' not in json.dumps([plain.get("pre_tokenizer"), plain.get("decoder")]):
        raise UserError(
            f"{path} is {kind or 'of an unknown kind'} and no byte-level BPE: give --tokenizer another one."
        )


def _chunk_bytes(path: Path, size: int) -> int:
    """JSON Lines of moderate size go in small chunks: the last chunk keeps all workers but one waiting.

    (Documents of plain text begin where a chunk begins: there the size decides what is packed.)
    """
    return max(CHUNK_BYTES >> 2, min(CHUNK_BYTES, size // 48)) if detect_format(path) == "jsonl" else CHUNK_BYTES


def _tokenizer_folder(options: PackOptions) -> Path:
    if options.tokenizer is None:
        import minigpt

        return Path(minigpt.__file__).parent / "model"
    path = Path(options.tokenizer)
    return path.parent if path.name == "tokenizer.json" else path


def _existing(output: Path, options: PackOptions, job: Job) -> dict[str, Any] | None:
    """The manifest of the same dataset, if `output` holds it; makes room for a new one if that was asked for."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: name a folder as output.")
    if has_manifest(output):
        if not options.overwrite:
            manifest, _ = read_manifest(output)
            if _same_dataset(manifest, options, job):
                return manifest
            raise OtherDatasetError(
                f"{output} already holds a dataset of other input or options: name another output, or pass --overwrite."
            )
        if _tokenizer_folder(options).resolve() == output.resolve():
            raise UserError(f"{output} holds the tokenizer that --overwrite would remove: copy it elsewhere first.")
        (output / WORK).mkdir(exist_ok=True)  # killed from here on, the next run still knows the folder as ours
        (output / MANIFEST).unlink()
        _clear(output)
    elif output.exists() and any(output.iterdir()) and ((output / MANIFEST).exists() or not (output / WORK).is_dir()):
        raise UserError(f"{output} is not empty and not a dataset: name a new folder as output.")
    return None


def _same_dataset(manifest: dict[str, Any], options: PackOptions, job: Job) -> bool:
    if manifest["options"] != _recorded_options(options) or manifest["stage"] != options.stage:
        return False
    expected = (job.plan_options["tokenizer_hash"], job.plan_options["template_hash"])
    if (manifest["tokenizer"]["hash"], manifest["tokenizer"]["template_hash"]) != expected:
        return False
    return manifest["inputs"] == _describe_files(list_files(options.input))


def _recorded_options(options: PackOptions) -> dict[str, Any]:
    """The options that decide the content."""
    elsewhere = ("stage", "seq_len", "input", "output", "tokenizer", "workers", "overwrite", "ray", "decontaminate")
    recorded = {name: value for name, value in asdict(options).items() if name not in elsewhere}
    recorded["seq_len"] = options.seq_len
    recorded["decontaminate"] = _describe_files(list_files(options.decontaminate)) if options.decontaminate else []
    return recorded


def _describe_files(files: Sequence[Path]) -> list[dict[str, Any]]:
    return [{"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files]


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process is packing into {work.parent}: wait for it, or stop it.") from None
        yield


def _prepare(work: Path, job: Job, options: PackOptions) -> None:
    """Make the work folder this job's, keeping what an interrupted run of the same job left."""
    description = (json.dumps(asdict(job), ensure_ascii=False, indent=1) + "\n").encode()
    path = work / "job.json"
    if path.exists() and path.read_bytes() == description:
        return
    path.unlink(missing_ok=True)
    _clear(work.parent)
    for folder in ("spill", "plan", "shards"):
        _remove(work / folder)
        (work / folder).mkdir()
    for name in TOKENIZER_COPIES:
        if (source := _tokenizer_folder(options) / name).exists():
            write_atomically(work.parent / name, source.read_bytes())
    if job.contamination:
        index = ContaminationIndex.build(read_exam_texts(options.decontaminate), options.decontaminate_ngram)
        if index.skipped == index.items:
            raise UserError(
                f"--decontaminate would find nothing: all its {index.items} texts are shorter than {MIN_EVAL_UNITS} "
                "words (Chinese: characters), which other texts hold by chance; leave it out"
            )
        write_atomically(work / "contamination.npz", index.dump())
    write_atomically(path, description)


def _clear(output: Path) -> None:
    """Remove what packing wrote, and nothing that somebody else put beside it."""
    for split in SPLITS:
        for shard in (output / split).glob("shard_*.arrow*"):
            shard.unlink()
        with suppress(OSError):  # it is not there, or holds something else
            (output / split).rmdir()
    for name in TOKENIZER_COPIES:
        _remove(output / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# The work


class _Packer:
    """The steps of one job."""

    def __init__(self, output: Path, work: Path, options: PackOptions, job: Job, progress: Progress) -> None:
        self.output = output
        self.work = work
        self.options = options
        self.job = job
        self.progress = progress
        self.digest = file_sha256(work / "job.json")

    def run(self) -> dict[str, Any]:
        with _tasks(min(self.options.workers, len(self.job.chunks)), self.options.ray) as run:
            chunks = [(self.work, self.digest, index) for index in range(len(self.job.chunks))]
            for done, _ in enumerate(run(tokenize_chunk, chunks), 1):
                self.progress("tokenize", done, len(chunks))
            summary = self._plan()
            shards = [
                (self.output, self.work, split, index)
                for split in SPLITS
                for index in range(summary["splits"][split]["n_shards"])
            ]
            written: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
            for done, (split, info) in enumerate(run(write_shard, shards), 1):
                written[split].append(info)
                self.progress("write shards", done, len(shards))
            digests = [digest for digest in run(file_sha256, [(path,) for path in list_files(self.options.input)])]
        for leftover in [file for folder in (".", *SPLITS) for file in (self.output / folder).glob(".*.tmp")]:
            leftover.unlink()  # half-written when an earlier run was killed
        return write_manifest(self.output, self._manifest(summary, written, digests))

    def _plan(self) -> dict[str, Any]:
        path = self.work / "plan" / "summary.json"
        if not path.exists():
            self.progress("plan", 0, 1)
            summary = _Plan(self.work, self.job).make()
            write_atomically(path, json.dumps(summary).encode())
        self.progress("plan", 1, 1)
        return json.loads(path.read_text())

    def _manifest(
        self,
        summary: dict[str, Any],
        shards: dict[str, list[dict[str, Any]]],
        digests: list[str],
    ) -> dict[str, Any]:
        stage, files = self.job.stage, list_files(self.options.input)
        splits = {
            split: {**{k: v for k, v in summary["splits"][split].items() if k != "n_shards"}, "shards": shards[split]}
            for split in SPLITS
        }
        return {
            "format": FORMAT,
            "version": VERSION,
            "stage": stage,
            "seq_len": self.job.seq_len,
            "vocab_size": summary["vocab_size"],
            "token_type": token_dtype(summary["vocab_size"]).name,
            "weight_table": list(DEFAULT_WEIGHT_TABLE) if stage in (*WEIGHTED_STAGES, "preference") else None,
            "tokenizer": {
                "hash": self.job.plan_options["tokenizer_hash"],
                "template_hash": self.job.plan_options["template_hash"],
                "files": {
                    name: file_sha256(self.output / name) for name in TOKENIZER_COPIES if (self.output / name).exists()
                },
            },
            "options": _recorded_options(self.options),
            "inputs": [
                {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
                for path, digest in zip(files, digests, strict=True)
            ],
            "evaluation_items": self._evaluation_items(),
            "documents": summary["documents"],
            "tokens": summary["tokens"],
            "bad_records": summary["bad_records"],
            "splits": splits,
        }

    def _evaluation_items(self) -> dict[str, int] | None:
        """Texts of `--decontaminate`, and how many of them were too short to be looked for."""
        if not self.job.contamination:
            return None
        index = ContaminationIndex.load(self.work / "contamination.npz")
        return {"given": index.items, "too_short": index.skipped}


def _template_hash(folder: Path) -> str | None:
    """SHA-256 of the chat template, or None when the tokenizer has none."""
    separate, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if separate.exists():
        return file_sha256(separate)
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.exists() else None
    return hashlib.sha256(json.dumps(template, ensure_ascii=False).encode()).hexdigest() if template else None


@contextmanager
def _tasks(workers: int, ray: bool) -> Iterator[Callable[[Callable, list[tuple]], Iterator[Any]]]:
    """A function `run(function, arguments)` that yields the results in order: in this process, several, or on Ray."""
    if ray:
        yield _run_on_ray
    elif workers <= 1:
        yield lambda function, arguments: (function(*each) for each in arguments)
    else:
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_die_with_parent) as pool:
            try:
                yield lambda function, arguments: (f.result() for f in _submit_all(pool, function, arguments))
            except BrokenProcessPool as error:
                raise WorkerDiedError(
                    "A worker process died, most likely for lack of memory: run the same command with fewer "
                    "--workers, finished parts are kept."
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)


def _submit_all(pool: ProcessPoolExecutor, function: Callable, arguments: list[tuple]) -> list[Future]:
    """Hand out all tasks, which starts the workers, without the program that we are part of being imported there.

    A spawned process imports the main module of its parent. Nothing of it is needed here, and it may be a trainer with
    torch and DeepSpeed, or a script that does its work when it is imported.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        return [pool.submit(function, *each) for each in arguments]
    finally:
        sys.modules["__main__"] = main


def _die_with_parent() -> None:
    """A killed parent cannot stop its workers; each watches it instead."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_on_ray(function: Callable, arguments: list[tuple]) -> Iterator[Any]:
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    remote = ray.remote(num_cpus=1)(function)
    try:
        for reference in [remote.remote(*each) for each in arguments]:
            yield ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None


# ---------------------------------------------------------------------------------------------------------------------
# The plan of a job


class _Plan:
    """Reads all spills' meta files and writes, for each split, where the content of each row comes from.

    `plan/SPLIT.*.npy`: `offsets` (pieces of each row), and for each piece `chunk`, `begin` (first token within the
    chunk's ids) and `length`; `shards` (first row of each shard). Rows of lists have one piece a row, and `parts` and
    `text` [rows, 2] (first byte and length within the chunk's text).
    """

    def __init__(self, work: Path, job: Job) -> None:
        self.work = work
        self.job = job
        self.n_documents = 0
        self.dropped: Counter[str] = Counter()
        self.bad: list[str] = []
        metas = [self._load(index) for index in range(len(job.chunks))]
        columns = {name: np.concatenate([meta[name] for meta in metas]) for name in metas[0]}
        self.digest, self.parts, self.signature = columns["digest"], columns["parts"], columns["signature"]
        self.truncated, self.text_bytes = columns["truncated"], columns["text_bytes"]
        self.tokens = self.parts.sum(axis=1, dtype=np.int64)
        counts = np.array([len(meta["digest"]) for meta in metas])
        self.chunk = np.repeat(np.arange(len(metas), dtype=np.int32), counts)
        self.begin = _begin_in_group(self.tokens, counts)
        text_lengths = columns["text_lengths"].astype(np.int64)
        self.text = np.stack([_begin_in_group(text_lengths, counts), text_lengths], 1) if len(text_lengths) else None
        self.vocab_size = int(columns["vocab_size"][0])

    def _load(self, index: int) -> dict[str, np.ndarray]:
        with np.load(spill_path(self.work, index, "meta.npz")) as stored:
            meta = {name: stored[name] for name in stored.files}
        seen, dropped, bad = json.loads(str(meta.pop("tally")))
        self.n_documents += seen
        self.dropped.update(dropped)
        self.bad += bad[: MAX_EXAMPLES - len(self.bad)]
        return meta

    def make(self) -> dict[str, Any]:
        kept = self._kept()
        if len(kept) == 0:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items())) or "none read"
            raise UserError(f"No document is left to pack ({reasons}): loosen the filters or name other input.")
        assert len(kept) + self.dropped.total() == self.n_documents, "every document is kept or dropped for one reason"
        options = self.job.plan_options
        valid = choose_valid(self.digest[kept], options["valid_fraction"], options["seed"])
        splits = {split: self._make_split(split, kept[valid == (split == "valid")]) for split in SPLITS}
        stored, truncated = int(self.tokens[kept].sum()), int(self.truncated[kept].sum())
        assert stored == sum(split["tokens"] for split in splits.values()), "every token has a place"
        return {
            "vocab_size": self.vocab_size,
            "documents": {"in": self.n_documents, "kept": len(kept), "dropped": dict(sorted(self.dropped.items()))},
            "tokens": {"in": stored + truncated, "stored": stored, "truncated": truncated},
            "bad_records": self.bad,
            "splits": splits,
        }

    def _kept(self) -> np.ndarray:
        """Indices of the documents that stay, exact and near duplicates taken out."""
        first = first_occurrences(self.digest)
        kept = np.flatnonzero(first)
        self._count_dropped("duplicate", len(first) - len(kept))
        if self.job.minhash:
            near = near_duplicates(self.signature[kept], self.job.plan_options["minhash"])
            self._count_dropped("near_duplicate", int(near.sum()))
            kept = kept[~near]
        return kept

    def _count_dropped(self, reason: str, count: int) -> None:
        if count:
            self.dropped[reason] += count

    def _make_split(self, split: str, documents: np.ndarray) -> dict[str, Any]:
        rows = self._rows(documents)
        pieces = documents[rows.document]
        row_bytes = self._row_bytes(rows, pieces)
        shard_of_row = (np.cumsum(row_bytes) - row_bytes) // (self.job.plan_options["shard_mb"] << 20)
        n_shards = len(np.unique(shard_of_row))
        first_rows = np.flatnonzero(np.diff(shard_of_row, prepend=-1))
        arrays = {
            "offsets": rows.offsets,
            "chunk": self.chunk[pieces],
            "begin": self.begin[pieces] + rows.start,
            "length": rows.length,
            "shards": np.append(first_rows, len(rows)),
        }
        if self.job.stage not in PACKED_STAGES:
            arrays["parts"] = self.parts[pieces]
            if self.text is not None:
                arrays["text"] = self.text[pieces]
        for name, array in arrays.items():
            write_atomically(self.work / "plan" / f"{split}.{name}.npy", npy_bytes(array))
        tokens = int(rows.length.sum())
        summary: dict[str, Any] = {
            "rows": len(rows),
            "documents": len(documents),
            "tokens": tokens,
            "text_bytes": int(self.text_bytes[documents].sum()),
            "n_shards": n_shards,
        }
        if self.job.stage in PACKED_STAGES:
            summary["fill"] = round(tokens / (len(rows) * self.job.seq_len), 6) if len(rows) else 0.0
        return summary

    def _rows(self, documents: np.ndarray) -> Rows:
        lengths = self.tokens[documents]
        if self.job.stage == "pretrain":
            return pack_with_splits(lengths, self.job.seq_len)
        if self.job.stage in PACKED_STAGES:
            return pack_whole(lengths, self.job.seq_len)
        return one_row_each(lengths)

    def _row_bytes(self, rows: Rows, pieces: np.ndarray) -> np.ndarray:
        per_token = token_dtype(self.vocab_size).itemsize + (self.job.stage in (*WEIGHTED_STAGES, "preference"))
        if self.job.stage in PACKED_STAGES:
            return np.full(len(rows), per_token * self.job.seq_len)
        text = self.text[pieces, 1] if self.text is not None else 0
        return self.tokens[pieces] * per_token + text


def _begin_in_group(lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where each item begins when the items of each group lie end to end; groups are runs of `counts` items."""
    begins = np.cumsum(lengths) - lengths
    firsts = np.cumsum(counts) - counts
    nonempty = counts > 0
    return begins - np.repeat(begins[firsts[nonempty]], counts[nonempty])


# ---------------------------------------------------------------------------------------------------------------------
# Second pass


def write_shard(output: Path, work: Path, split: str, index: int) -> tuple[str, dict[str, Any]]:
    """Write shard `index` of `split` as the plan says, unless it is there; (split, its entry in the manifest)."""
    done = Path(work) / "shards" / f"{split}_{index:05d}.json"
    if not done.exists():
        info = _ShardSource(Path(work), split, index).write(Path(output))
        write_atomically(done, json.dumps(info).encode())
    return split, json.loads(done.read_text())


class _ShardSource:
    """The plan's part for one shard, and the spills it takes its tokens from."""

    def __init__(self, work: Path, split: str, index: int) -> None:
        self.work = work
        self.split = split
        self.index = index
        self.job = load_job(work)
        self.summary = json.loads((work / "plan" / "summary.json").read_text())
        first, self.end = (int(row) for row in self._load("shards")[index : index + 2])
        self.first = first
        offsets = np.asarray(self._load("offsets")[first : self.end + 1])
        pieces = slice(int(offsets[0]), int(offsets[-1]))
        self.offsets = offsets - offsets[0]
        self.chunk, self.begin, self.length = (np.asarray(self._load(n)[pieces]) for n in ("chunk", "begin", "length"))

    def _load(self, name: str) -> np.ndarray:
        return np.load(self.work / "plan" / f"{self.split}.{name}.npy", mmap_mode="r")

    def write(self, output: Path) -> dict[str, Any]:
        vocab_size = self.summary["vocab_size"]
        table_hash = self.job.plan_options["tokenizer_hash"]
        shard_format = ShardFormat(self.job.stage, self.job.seq_len, vocab_size, table_hash)
        columns = self._packed_columns() if self.job.stage in PACKED_STAGES else self._list_columns()
        return asdict(ShardWriter(output, shard_format).write(self.split, self.index, columns))

    def _packed_columns(self) -> dict[str, Any]:
        n_rows, seq_len = self.end - self.first, self.job.seq_len
        row = np.repeat(np.arange(n_rows), np.diff(self.offsets))
        begins = np.cumsum(self.length) - self.length
        target = begins - begins[self.offsets[:-1]][row] + row * seq_len
        dtype = token_dtype(self.summary["vocab_size"])
        columns: dict[str, Any] = {
            "input_ids": self._gather("ids.npy", target, n_rows * seq_len, dtype).reshape(n_rows, seq_len),
            "seq_lens": Ragged(self.length.astype(np.int32), self.offsets.astype(np.int32)),
        }
        if self.job.stage in WEIGHTED_STAGES:
            codes = self._gather("codes.npy", target, n_rows * seq_len, np.dtype(np.uint8))
            columns["weight"] = codes.reshape(n_rows, seq_len)
        return columns

    def _list_columns(self) -> dict[str, Any]:
        rows = slice(self.first, self.end)
        parts = np.asarray(self._load("parts")[rows])
        target = np.cumsum(self.length) - self.length
        ids = self._gather("ids.npy", target, int(self.length.sum()), token_dtype(self.summary["vocab_size"]))
        if self.job.stage == "prompt":
            texts = [json.loads(text) for text in self._texts(np.asarray(self._load("text")[rows]))]
            columns: dict[str, Any] = {"prompt_ids": Ragged.from_lengths(ids, parts[:, 0])}
            for name in ("id", "answer", "verifier"):
                columns[name] = [text[name] for text in texts]
            for name in ("messages", "meta"):
                columns[name] = [json.dumps(text[name], ensure_ascii=False) for text in texts]
            return columns
        codes = self._gather("codes.npy", target, len(ids), np.dtype(np.uint8))
        part_of_token = np.repeat(np.tile(np.arange(3), len(parts)), parts.reshape(-1))
        columns = {
            f"{name}_ids": Ragged.from_lengths(ids[part_of_token == i], parts[:, i])
            for i, name in enumerate(("prompt", "chosen", "rejected"))
        }
        for i, name in enumerate(("chosen", "rejected"), 1):
            columns[f"{name}_weight"] = Ragged.from_lengths(codes[part_of_token == i], parts[:, i])
        return columns

    def _gather(self, suffix: str, target: np.ndarray, size: int, dtype: np.dtype) -> np.ndarray:
        """Copy all pieces from the spills, one spill open at a time, to their places in one array; the rest is 0."""
        result = np.zeros(size, dtype)
        order = np.argsort(self.chunk, kind="stable")
        cuts = np.flatnonzero(np.diff(self.chunk[order])) + 1
        for pieces in np.split(order, cuts):
            spill = np.load(spill_path(self.work, int(self.chunk[pieces[0]]), suffix), mmap_mode="r")
            places = zip(
                self.begin[pieces].tolist(), target[pieces].tolist(), self.length[pieces].tolist(), strict=True
            )
            for begin, to, length in places:
                result[to : to + length] = spill[begin : begin + length]
        return result

    def _texts(self, places: np.ndarray) -> Iterator[bytes]:
        opened: dict[int, np.ndarray] = {}
        for chunk, (begin, length) in zip(self.chunk.tolist(), places.tolist(), strict=True):
            if chunk not in opened:  # rows of lists are in the order of the input
                opened = {chunk: np.load(spill_path(self.work, chunk, "text.npy"), mmap_mode="r")}
            yield opened[chunk][begin : begin + length].tobytes()
