"""From files on disk to canonical records, in chunks that several workers can share.

A chunk is a range of one file that depends on the file only, never on how many workers there are, so any number of
workers sees the same records with the same numbers. Text is read as UTF-8 and nothing else; what cannot be read is
yielded as a `BadRecord` with file, line and reason, and the caller decides whether that stops the run.
"""

import json
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.dataset.records import NUL_REASON, RecordError, canonical, check_characters, guess_stage, texts_of
from minigpt.dataset.shards import is_packed
from minigpt.errors import UserError

SUFFIXES = {
    **dict.fromkeys((".txt", ".md", ".markdown", ".text"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".parquet": "parquet",
}
NOT_DATA = {"readme", "license", "licence", "data_license", "copying", "notice", "source", "manifest"}
"""Stems of files that describe a data folder; they are read only when named one by one."""
CHUNK_BYTES = 4 << 20
MAX_LINE_BYTES = 8 << 20
MAX_PART_BYTES = 16 << 20
"""Of a part of a JSON array no more is read: behind a missing quotation mark no record seems to end any more."""
DOCUMENT_BYTES = 16 << 10
"""Plain text is cut into documents of about this size, so that a novel is not one document for the validation split."""
BOM = b"\xef\xbb\xbf"
BLANK_LINE = re.compile(rb"\n(?:[ \t\r]*\n)+")
JSON_MARKS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]', re.DOTALL)


@dataclass(frozen=True)
class Chunk:
    """A range of one file.

    Attributes:
        format: "text", "jsonl", "json" or "parquet".
        start: First byte; for Parquet the first row group.
        end: One past the last byte or row group.
        first_line: Line number of the first byte, from 1; for JSON arrays and Parquet the number of the first record.
    """

    path: str
    format: str
    start: int
    end: int
    first_line: int


@dataclass
class BadRecord:
    """Something in a file that cannot be used: where, and why."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def list_files(inputs: Sequence[Path | str]) -> list[Path]:
    """All data files that `inputs` name, folders walked, sorted within each folder, each file once.

    Raises:
        UserError: a path does not exist or is empty, or a folder holds no data file.
    """
    files: dict[Path, None] = {}
    for path in map(Path, inputs):
        found = [path]
        if path.is_dir():
            packed = {folder for folder in (path, *path.rglob("*/")) if is_packed(folder)}
            found = sorted(
                p for p in path.rglob("*") if _is_data_file(p, path) and not packed.intersection((p, *p.parents))
            )
            if not found and packed:
                raise UserError(f"{path} holds what is packed already, and no other data file: give the raw files")
            if not found:
                raise UserError(f"{path} holds no data file: files end with {', '.join(SUFFIXES)}")
        elif not path.is_file():
            raise UserError(f"{path} does not exist: check how it is written")
        for file in found:
            if file.stat().st_size == 0:
                raise UserError(f"{file} is empty: leave it out, or write it again")
        files.update(dict.fromkeys(found))
    if not files:
        raise UserError("no input given: name files or folders with --input")
    return list(files)


def _is_data_file(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return path.is_file() and path.suffix.lower() in SUFFIXES and not hidden and path.stem.lower() not in NOT_DATA


def detect_format(path: Path | str) -> str:
    """ "text", "jsonl", "json" or "parquet": by the first bytes where they decide, otherwise by the file's name.

    Raises:
        UserError: the file is empty, or UTF-16.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(1 << 16)
    if not head:
        raise UserError(f"{path} is empty: leave it out, or write it again")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path} is UTF-16: save it as UTF-8")
    if head[:4] == b"PAR1":
        return "parquet"
    by_name = SUFFIXES.get(path.suffix.lower())
    if by_name in ("text", "parquet"):
        return by_name
    first = head.removeprefix(BOM).lstrip()[:1]
    if first == b"[" and by_name != "jsonl":
        return "json"
    return "jsonl" if by_name or first == b"{" else "text"


def split_into_chunks(path: Path | str, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """Cut a file into ranges of whole lines (jsonl), documents (text), array elements or row groups."""
    path = Path(path)
    kind = detect_format(path)
    ranges = {"text": _text_ranges, "jsonl": _line_ranges, "json": _array_ranges, "parquet": _row_groups}[kind]
    return [Chunk(str(path), kind, *found) for found in ranges(path, chunk_bytes)]


def read_chunk(
    chunk: Chunk, stage: str, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """The records of a chunk as (line or record number, canonical record or what is wrong with it).

    Raises:
        UserError: plain text for a stage that needs conversations.
    """
    if chunk.format == "text":
        if stage != "pretrain":
            raise UserError(
                f"{chunk.path} is plain text, which the {stage} stage cannot use: give jsonl, JSON or Parquet"
            )
        yield from _read_text(chunk)
        return
    for number, raw in _read_raw(chunk, max_line_bytes):
        if isinstance(raw, BadRecord):
            yield number, raw
            continue
        try:
            record = canonical(raw, stage)
            check_characters(record)
            yield number, record
        except RecordError as error:
            yield number, BadRecord(chunk.path, number, str(error))
        except RecursionError:
            yield number, BadRecord(chunk.path, number, "is nested too deeply")


def read_records(
    inputs: Sequence[Path | str], stage: str, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[dict[str, Any]]:
    """All records of files and folders, in order; the first bad one is an error.

    Raises:
        UserError: naming file and line.
    """
    for path in list_files(inputs):
        for chunk in split_into_chunks(path):
            for _, record in read_chunk(chunk, stage, max_line_bytes=max_line_bytes):
                if isinstance(record, BadRecord):
                    raise UserError(str(record))
                yield record


def read_texts(inputs: Sequence[Path | str]) -> Iterator[str]:
    """One text per record of any format and stage (guessed for each file): what a tokenizer is trained on."""
    for path in list_files(inputs):
        for record in read_records([path], stage_of_file(path)):
            yield "\n".join(texts_of(record))


def read_exam_texts(inputs: Sequence[Path | str]) -> Iterator[str]:
    """The texts of evaluation files: those of records that a stage has, and every string of any others."""
    for path in list_files(inputs):
        stage = stage_of_file(path)
        for chunk in split_into_chunks(path):
            if chunk.format == "text":
                yield from (
                    text
                    for _, record in _read_text(chunk)
                    if not isinstance(record, BadRecord)
                    for text in texts_of(record)
                )
                continue
            for _, raw in _read_raw(chunk, MAX_LINE_BYTES):
                if isinstance(raw, BadRecord):
                    raise UserError(str(raw))
                try:
                    yield "\n".join(texts_of(canonical(raw, stage)))
                except RecordError:  # the layouts of exams are many
                    yield from _strings(raw)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def stage_of_file(path: Path | str) -> str:
    """The stage that a file's first record fits best."""
    chunk = split_into_chunks(path)[0]
    if chunk.format == "text":
        return "pretrain"
    return guess_stage(next((raw for _, raw in _read_raw(chunk, MAX_LINE_BYTES)), None))


# --- plain text ------------------------------------------------------------------------------------------------------


def _text_ranges(path: Path, chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
    size, start, line = path.stat().st_size, 0, 1
    with path.open("rb") as file:
        while start < size:
            file.seek(start)
            data = file.read(chunk_bytes + 4 * DOCUMENT_BYTES)
            end = start + (len(data) if start + len(data) == size else _cut(data, chunk_bytes))
            yield start, end, line
            line += data.count(b"\n", 0, end - start)
            start = end


def _cut(data: bytes, wanted: int) -> int:
    """Where to end a document: the first blank line at or after `wanted`, else a line's end, else a character's."""
    limit = min(len(data), wanted + 3 * DOCUMENT_BYTES)
    blank = BLANK_LINE.search(data, wanted, limit)
    if blank:
        return blank.end()
    line_end = data.find(b"\n", wanted, limit)
    if line_end >= 0:
        return line_end + 1
    cut = limit
    while cut < len(data) and cut > limit - 4 and data[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _read_text(chunk: Chunk) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.end - chunk.start)
    start = len(BOM) if chunk.start == 0 and data.startswith(BOM) else 0
    line = chunk.first_line
    while start < len(data):
        rest = len(data) - start
        end = (
            len(data)
            if rest <= DOCUMENT_BYTES * 3 // 2
            else start + _cut(data[start : start + 5 * DOCUMENT_BYTES], DOCUMENT_BYTES)
        )
        part = data[start:end]
        found = _text_document(chunk.path, line, part)
        if found is not None:
            yield line, found
        line += part.count(b"\n")
        start = end


def _text_document(path: str, line: int, part: bytes) -> dict[str, Any] | BadRecord | None:
    try:
        text = part.decode("utf-8").replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError as error:
        return BadRecord(path, line + part.count(b"\n", 0, error.start), _not_utf8(error))
    if "\0" in text:
        return BadRecord(path, line + part.count(b"\n", 0, part.index(b"\0")), NUL_REASON)
    return {"text": text} if text.strip() else None


# --- JSON Lines ------------------------------------------------------------------------------------------------------


def _line_ranges(path: Path, chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
    size, start, line = path.stat().st_size, 0, 1
    with path.open("rb") as file:
        while start < size:
            file.seek(start)
            lines = last = 0
            block = file.read(chunk_bytes)
            while block:
                lines += block.count(b"\n")
                last = file.tell()
                if block.endswith(b"\n"):
                    break
                block = file.readline(1 << 20)
            yield start, last, line
            line += lines
            start = last


def _read_lines(chunk: Chunk, max_line_bytes: int) -> Iterator[tuple[int, Any]]:
    number = chunk.first_line
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        while file.tell() < chunk.end:
            line = file.readline(max_line_bytes + 1)
            at_start = number == 1
            if len(line) > max_line_bytes and not line.endswith(b"\n"):
                yield number, BadRecord(chunk.path, number, _too_long("line", max_line_bytes))
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
            else:
                line = line.removeprefix(BOM) if at_start else line
                if line.strip():
                    yield number, _parse_line(chunk.path, number, line)
            number += 1


def _parse_line(path: str, number: int, line: bytes) -> Any:
    if b"\0" in line:
        return BadRecord(path, number, NUL_REASON)
    try:
        return json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        return BadRecord(path, number, _not_utf8(error))
    except json.JSONDecodeError as error:
        return BadRecord(path, number, f"broken JSON at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return BadRecord(path, number, f"broken JSON: {error}")


# --- JSON arrays -----------------------------------------------------------------------------------------------------


def _array_ranges(path: Path, chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Byte ranges of whole elements. Only brackets and strings are looked at: the values are parsed by the readers."""
    depth = count = 0
    start, first = 0, 1
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for mark in JSON_MARKS.finditer(data):
            char = data[mark.start()]
            if char in b"[{":
                depth += 1
                if depth == 1:
                    start = mark.end()
            elif char in b"]}":
                depth -= 1
            elif char == ord(",") and depth == 1:
                count += 1
                if mark.start() - start >= chunk_bytes:
                    yield start, mark.start(), first
                    start, first = mark.end(), count + 1
        yield start, len(data), first


def _read_array(chunk: Chunk, max_line_bytes: int) -> Iterator[tuple[int, Any]]:
    """Elements of a part of an array; after a broken one the rest of the part cannot be trusted and is not read."""
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        data = file.read(min(chunk.end - chunk.start, MAX_PART_BYTES))
        at_end = not file.read(1)
    text = data.decode("utf-8", "surrogateescape")  # a bad byte spoils its own record only: see check_characters
    decoder, number, position = json.JSONDecoder(), chunk.first_line, 0
    skip_space = re.compile(r"[ \t\r\n]*").match
    while True:
        position = skip_space(text, position).end()  # type: ignore[union-attr]
        if position == len(text) and not at_end:
            return
        if text[position : position + 1] == "]" and at_end:
            if text[position + 1 :].strip():
                yield number, BadRecord(chunk.path, number, "there is something after the end of the array")
            return
        try:
            value, end = decoder.raw_decode(text, position)
            after = skip_space(text, end).end()  # type: ignore[union-attr]
            if text[after : after + 1] not in (("]", ",") if at_end else ("", ",")):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
        except (ValueError, RecursionError) as error:
            yield number, BadRecord(chunk.path, number, _array_problem(chunk, text, position, error))
            return
        too_long = end - position > max_line_bytes
        yield number, BadRecord(chunk.path, number, _too_long("record", max_line_bytes)) if too_long else value
        number += 1
        position = after + (text[after : after + 1] == ",")


def _array_problem(chunk: Chunk, text: str, position: int, error: Exception) -> str:
    if "\0" in text[position:]:
        return NUL_REASON
    if not isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error}"
    with open(chunk.path, "rb") as file:
        blocks = (file.read(min(1 << 20, chunk.start - begin)) for begin in range(0, chunk.start, 1 << 20))
        line = 1 + sum(block.count(b"\n") for block in blocks) + text.count("\n", 0, error.pos)
    cut = chunk.end - chunk.start > MAX_PART_BYTES
    return f"broken JSON in line {line}: {error.msg}" + f", or {_too_long('record', MAX_LINE_BYTES)}" * cut


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _open_parquet(path: Path | str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable Parquet file ({_first_line(error)}): write it again") from error


def _row_groups(path: Path, chunk_bytes: int) -> Iterator[tuple[int, int, int]]:
    with _open_parquet(path) as file:
        row = 1
        for group in range(file.metadata.num_row_groups):
            yield group, group + 1, row
            row += file.metadata.row_group(group).num_rows


def _read_rows(chunk: Chunk, max_line_bytes: int) -> Iterator[tuple[int, Any]]:
    """Rows of row groups; after a damaged page the rest of them cannot be decoded and is one bad record."""
    import pyarrow

    number = chunk.first_line
    with _open_parquet(chunk.path) as file:
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=range(chunk.start, chunk.end)):
                yield from enumerate(_rows_of(chunk.path, number, batch), number)
                number += batch.num_rows
        except (OSError, pyarrow.ArrowException) as error:
            if isinstance(error, MemoryError):  # says nothing about the file
                raise
            reason = f"the Parquet file is damaged from this row on ({_first_line(error)}): write it again"
            yield number, BadRecord(chunk.path, number, reason)


def _rows_of(path: str, number: int, batch: Any) -> list[Any]:
    """The rows of a batch whose first one has this number; a row that Python has no value for is a bad record."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError) as error:  # bytes that are no text, times beyond all years
        if batch.num_rows == 1:
            reason = _not_utf8(error) if isinstance(error, UnicodeDecodeError) else _first_line(error)
            return [BadRecord(path, number, reason)]
        return [row for i in range(batch.num_rows) for row in _rows_of(path, number + i, batch.slice(i, 1))]


# --- shared ----------------------------------------------------------------------------------------------------------


def _read_raw(chunk: Chunk, max_line_bytes: int) -> Iterator[tuple[int, Any]]:
    read = {"jsonl": _read_lines, "json": _read_array, "parquet": _read_rows}[chunk.format]
    return read(chunk, max_line_bytes)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: the byte 0x{error.object[error.start]:02x}; save the file as UTF-8"


def _too_long(what: str, limit: int) -> str:
    return f"the {what} is longer than {limit / (1 << 20):g} MB"
