"""First pass of packing: one chunk of an input file → filtered, hashed, tokenized documents in NumPy files.

A chunk's spill is `ids` (and `codes`, the weight codes, and `text`, what prompts carry beside their ids), each one
array of all its documents end to end, and `meta`, which is written last: a chunk with a meta file is finished. Ids
go from process to process through these files only.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.clean import NUM_PERM, ContaminationIndex, Filters, minhash_signature
from data_prep.readers import BadRecord, Chunk, read_chunk
from minigpt.dataset.chat import TAG, ChatEncoder, text_of
from minigpt.dataset.shards import token_dtype, write_atomically
from minigpt.errors import UserError

BATCH_CHARS = 1 << 18  # characters in one call of the tokenizer: its results are large objects, 100 bytes a token
MAX_EXAMPLES = 20
_SAFE_CUT = re.compile(r"[^\W\d_](?=\W)")


@dataclass(frozen=True)
class Job:
    """What the workers need to know; stored as `job.json` in the work folder.

    Args:
        stage: stage of the dataset.
        seq_len: tokens a row.
        on_bad_record: "error" or "skip".
        too_long: "truncate" or "drop", for conversations longer than a row.
        filters: limits on the text.
        minhash: whether near-duplicates are looked for.
        contamination: whether `contamination.npz` lies in the work folder.
        tokenizer: folder of the tokenizer: the output, so that it cannot change while the job runs.
        chunks: all chunks of the input, in order.
        inputs: (name, size, mtime in ns) of each input file; makes a changed input another job.
        plan_options: the options that only the plan uses.
    """

    stage: str
    seq_len: int
    on_bad_record: str
    too_long: str
    filters: Filters
    minhash: bool
    contamination: bool
    tokenizer: str
    chunks: tuple[Chunk, ...]
    inputs: tuple[tuple[str, int, int], ...]
    plan_options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Document:
    """A record that passed the filters, and then its ids.

    `parts` are the lengths of what `ids` is made of: one part, or prompt, chosen and rejected.
    """

    line: int
    record: dict[str, Any]
    digest: bytes
    text: str
    ids: np.ndarray | None = None
    codes: np.ndarray | None = None
    parts: tuple[int, ...] = ()
    truncated: int = 0
    text_bytes: int = 0


@dataclass
class Tally:
    """What became of a chunk's records: all that were seen, why some were dropped, and the first bad ones."""

    seen: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


def tokenize_chunk(work: Path, job_digest: str, index: int) -> int:
    """Make the spill of chunk `index`, unless it is there; returns the index. Errors: UserError for a bad record."""
    if not spill_path(work, index, "meta.npz").exists():
        with single_threaded_tokenizers():
            _Chunk(_worker(Path(work), job_digest), index).run()
    return index


def spill_path(work: Path, index: int, suffix: str) -> Path:
    """Where a part of chunk `index` lies."""
    return Path(work) / "spill" / f"{index:06d}.{suffix}"


@contextmanager
def single_threaded_tokenizers() -> Iterator[None]:
    """One thread a process: the processes are the parallelism."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@dataclass
class _Worker:
    """What a process loads once for all its chunks."""

    work: Path
    job: Job
    encoder: ChatEncoder
    contamination: ContaminationIndex | None


@lru_cache(maxsize=1)
def _worker(work: Path, job_digest: str) -> _Worker:
    job = load_job(work)
    contamination = ContaminationIndex.load(work / "contamination.npz") if job.contamination else None
    return _Worker(work, job, ChatEncoder(job.tokenizer), contamination)


def load_job(work: Path) -> Job:
    """Read `job.json`."""
    stored = json.loads((Path(work) / "job.json").read_text(encoding="utf-8"))
    filters = stored.pop("filters")
    filters["scripts"] = tuple(filters["scripts"]) if filters["scripts"] else None
    chunks = tuple(Chunk(**chunk) for chunk in stored.pop("chunks"))
    inputs = tuple((name, size, mtime) for name, size, mtime in stored.pop("inputs"))
    return Job(**stored, filters=Filters(**filters), chunks=chunks, inputs=inputs)


class _Chunk:
    """One chunk on its way through the pass."""

    def __init__(self, worker: _Worker, index: int) -> None:
        self.worker = worker
        self.job = worker.job
        self.index = index
        self.chunk = worker.job.chunks[index]
        self.tally = Tally()
        self.done: list[Document] = []
        self.signatures: list[np.ndarray] = []

    def run(self) -> None:
        waiting: list[Document] = []
        waiting_chars = 0
        for line, record in read_chunk(self.chunk, self.job.stage):
            self.tally.seen += 1
            document = self._admit(line, record)
            if document is None:
                continue
            waiting.append(document)
            waiting_chars += len(document.text)
            if waiting_chars >= BATCH_CHARS:
                self._encode(waiting)
                waiting, waiting_chars = [], 0
        self._encode(waiting)
        self._write()

    def _admit(self, line: int, record: dict[str, Any] | BadRecord) -> Document | None:
        if isinstance(record, BadRecord):
            self._reject(record.line, record.reason)
            return None
        try:
            text = document_text(self.job.stage, record)
            digest = document_digest(self.job.stage, record)
        except UserError as error:
            self._reject(line, str(error))
            return None
        reason = self.job.filters.reason_to_drop(text)
        if reason is None and self.worker.contamination is not None and self.worker.contamination.matches(text):
            reason = "in_evaluation_data"
        if reason is not None:
            self.tally.dropped[reason] += 1
            return None
        return Document(line, record, digest, text)

    def _reject(self, line: int, reason: str) -> None:
        if self.job.on_bad_record == "error":
            raise UserError(
                f"{self.chunk.path}:{line}: {reason}; mend the record, or leave such records out with "
                "--on_bad_record skip."
            )
        self.tally.dropped["bad_record"] += 1
        if len(self.tally.bad) < MAX_EXAMPLES:
            self.tally.bad.append(f"{Path(self.chunk.path).name}:{line}: {reason}")

    def _encode(self, documents: list[Document]) -> None:
        try:
            encode_documents(self.worker.encoder, self.job.stage, documents)
        except UserError as error:
            if len(documents) == 1:
                self._reject(documents[0].line, str(error))
            else:  # one of them is bad: find out which
                for document in documents:
                    self._encode([document])
            return
        for document in documents:
            reason = fit(document, self.job.stage, self.job.seq_len, self.job.too_long)
            if reason is None:
                self._keep(document)
            else:
                self.tally.dropped[reason] += 1

    def _keep(self, document: Document) -> None:
        if self.job.minhash:
            self.signatures.append(minhash_signature(document.text))
        document.text_bytes = len(document.text.encode())
        document.text = ""  # from here on only ids are needed, and for prompts the record
        if self.job.stage != "prompt":
            document.record = {}
        self.done.append(document)

    def _write(self) -> None:
        dtype = token_dtype(self.worker.encoder.vocab_size)
        write = {"ids.npy": _joined([d.ids for d in self.done], dtype)}
        if self.job.stage not in ("pretrain", "prompt"):
            write["codes.npy"] = _joined([d.codes for d in self.done], np.dtype(np.uint8))
        texts = [_prompt_text(d) for d in self.done] if self.job.stage == "prompt" else []
        if texts:
            write["text.npy"] = np.frombuffer(b"".join(texts), dtype=np.uint8)
        for suffix, array in write.items():
            write_atomically(self._path(suffix), npy_bytes(array))
        n_parts = 3 if self.job.stage == "preference" else 1
        meta = {
            "line": np.array([d.line for d in self.done], dtype=np.int64),
            "digest": np.frombuffer(b"".join(d.digest for d in self.done), dtype="<u8").reshape(-1, 2),
            "parts": np.array([d.parts for d in self.done], dtype=np.int32).reshape(-1, n_parts),
            "truncated": np.array([d.truncated for d in self.done], dtype=np.int32),
            "text_bytes": np.array([d.text_bytes for d in self.done], dtype=np.int64),
            "text_lengths": np.array([len(text) for text in texts], dtype=np.int32),
            "signature": np.array(self.signatures, dtype=np.uint32).reshape(-1, NUM_PERM),
            "vocab_size": np.array([self.worker.encoder.vocab_size]),
            "tally": np.array(json.dumps([self.tally.seen, self.tally.dropped, self.tally.bad], ensure_ascii=False)),
        }
        buffer = io.BytesIO()
        np.savez(buffer, **meta)  # type: ignore[arg-type]
        write_atomically(self._path("meta.npz"), buffer.getbuffer())

    def _path(self, suffix: str) -> Path:
        return spill_path(self.worker.work, self.index, suffix)


def _joined(arrays: list[Any], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def npy_bytes(array: np.ndarray) -> memoryview:
    """What `np.save` would write."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getbuffer()


def _prompt_text(document: Document) -> bytes:
    wanted = {key: document.record.get(key) for key in ("messages", "answer", "verifier", "meta")}
    return json.dumps({"id": document.digest.hex(), **wanted}, ensure_ascii=False).encode()


# ---------------------------------------------------------------------------------------------------------------------
# Records


def document_text(stage: str, record: dict[str, Any]) -> str:
    """What the filters look at: the text, or all turns of a conversation."""
    if stage == "pretrain":
        return record["text"]
    messages = [*record["messages"], *record.get("chosen", []), *record.get("rejected", [])]
    parts = [(message.get("reasoning_content"), text_of(message)) for message in messages]
    return "\n".join(text for pair in parts for text in pair if text)


def document_digest(stage: str, record: dict[str, Any]) -> bytes:
    """128 bits of BLAKE2 of the content: equal for exact duplicates, whatever file and layout they came from."""
    if stage == "pretrain":
        content = record["text"].strip()
    else:
        keys = ("messages", "tools", "chosen", "rejected", "answer")
        content = json.dumps({key: record.get(key) for key in keys}, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def encode_documents(encoder: ChatEncoder, stage: str, documents: list[Document]) -> None:
    """Set `ids`, `codes` and `parts` of each document, in few calls to the tokenizer. Errors: UserError."""
    if not documents:
        return
    if stage == "pretrain":
        _encode_texts(encoder, documents)
    elif stage == "prompt":
        for document in documents:
            ids = encoder.encode_prompt(document.record["messages"], tools=document.record.get("tools"))
            document.ids, document.parts = np.array(ids, dtype=np.uint32), (len(ids),)
    elif stage == "preference":
        _encode_preferences(encoder, documents)
    else:
        messages, tools = [d.record["messages"] for d in documents], [d.record.get("tools") for d in documents]
        tag = {"tag_code": TAG} if stage == "reason" else {}
        for document, (ids, codes) in zip(documents, encoder.encode_many(messages, tools=tools, **tag), strict=True):
            document.ids, document.codes = np.array(ids, dtype=np.uint32), np.array(codes, dtype=np.uint8)
            document.parts = (len(ids),)


def _encode_texts(encoder: ChatEncoder, documents: list[Document]) -> None:
    """Text and the end-of-text token; a very long document goes to the tokenizer in parts, for the sake of memory."""
    long = [document for document in documents if len(document.text) > BATCH_CHARS]
    short = [document for document in documents if len(document.text) <= BATCH_CHARS]
    encoded = encoder.encode_texts([document.text for document in short])
    for document, ids in zip(short, encoded, strict=True):
        document.ids = np.array([*encoder.bos_ids, *ids, encoder.eos_id], dtype=np.uint32)
    for document in long:
        parts = [np.array(encoder.encode_text(part), np.uint32) for part in split_text(document.text, BATCH_CHARS)]
        bos, eos = np.array(encoder.bos_ids, np.uint32), np.array([encoder.eos_id], np.uint32)
        document.ids = np.concatenate([bos, *parts, eos])
    for document in documents:
        assert document.ids is not None
        document.parts = (len(document.ids),)


def split_text(text: str, size: int) -> list[str]:
    """Cut `text` into parts of about `size` characters that have the same tokens, one after the other, as the whole.

    A cut between a letter and a following space or punctuation mark is also one of the split regexes of the GPT-2 and
    Qwen2 families, which never look back.
    """
    parts = []
    begin = 0
    while (cut := _SAFE_CUT.search(text, begin + size)) is not None:
        parts.append(text[begin : cut.end()])
        begin = cut.end()
    return [*parts, text[begin:]]


def _encode_preferences(encoder: ChatEncoder, documents: list[Document]) -> None:
    """The ids that both conversations begin with, as far as they are the prompt's, and what each goes on with.

    Where a template puts no control token between turns, the prompt's last ids may be others before an answer.
    """
    tools = [d.record.get("tools") for d in documents]
    prompts = encoder.encode_many([d.record["messages"] for d in documents], tools=tools)
    answers = [
        encoder.encode_many([[*d.record["messages"], *d.record[key]] for d in documents], tools=tools)
        for key in ("chosen", "rejected")
    ]
    for document, (prompt, _), chosen, rejected in zip(documents, prompts, *answers, strict=True):
        alike = (a == b == c for a, b, c in zip(prompt, chosen[0], rejected[0], strict=False))
        n = next((i for i, same in enumerate(alike) if not same), min(len(prompt), len(chosen[0]), len(rejected[0])))
        document.ids = np.array(prompt[:n] + chosen[0][n:] + rejected[0][n:], dtype=np.uint32)
        document.codes = np.array([0] * n + chosen[1][n:] + rejected[1][n:], dtype=np.uint8)
        document.parts = (n, len(chosen[0]) - n, len(rejected[0]) - n)


def fit(document: Document, stage: str, seq_len: int, too_long: str) -> str | None:
    """Make a document fit into a row, or say why it is dropped. Pretraining text is cut by the plan, losing nothing."""
    assert document.ids is not None
    if stage == "pretrain":
        return None
    if stage == "prompt":
        return "over_seq_len" if len(document.ids) > seq_len else None
    assert document.codes is not None
    prompt, *answers = document.parts if stage == "preference" else (0, *document.parts)
    begins = np.cumsum([prompt, *answers])
    trained = [slice(begin, begin + length) for begin, length in zip(begins, answers, strict=False)]
    if not all(document.codes[piece].any() for piece in trained):
        return "no_answer"
    if stage == "preference" and _equal(document.ids, trained):
        return "equal_answers"
    room = seq_len - prompt
    if max(answers) <= room:
        return None
    kept = [slice(piece.start, piece.start + min(room, length)) for piece, length in zip(trained, answers, strict=True)]
    if too_long == "drop" or room < 1 or not all(document.codes[piece].any() for piece in kept):
        return "over_seq_len"
    if stage == "preference" and _equal(document.ids, kept):  # they differ only behind the cut
        return "equal_answers"
    before = len(document.ids)
    whole = [slice(0, prompt), *kept]
    document.ids = np.concatenate([document.ids[piece] for piece in whole])
    document.codes = np.concatenate([document.codes[piece] for piece in whole])
    document.parts = tuple(piece.stop - piece.start for piece in (whole if stage == "preference" else kept))
    document.truncated = before - len(document.ids)
    return None


def _equal(ids: np.ndarray, answers: list[slice]) -> bool:
    return np.array_equal(ids[answers[0]], ids[answers[1]])
