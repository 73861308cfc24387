"""Look at training data as the model will see it: detected format and stage, token counts, coloured loss weights."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data_prep.readers import BadRecord, detect_format, list_files, read_chunk, split_into_chunks, stage_of_file
from minigpt.dataset.chat import ANSWER, CONTEXT, TAG, ChatEncoder
from minigpt.dataset.records import STAGES
from minigpt.dataset.shards import PackedDataset, is_packed
from minigpt.errors import UserError

SHIPPED_TOKENIZER = Path(__file__).parents[1] / "minigpt" / "model"
SAMPLE = 1000
"""Records that are counted; a file may hold millions."""
LEGEND = {
    CONTEXT: ("context: weight 0", "dim"),
    ANSWER: ("trained on: weight 1", "green"),
    TAG: ("tags: weight 10", "bold magenta"),
}
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}
"""Control characters are drawn as symbols: a data file must not be able to drive the terminal."""

Encoded = tuple[Sequence[int], Sequence[int]]
"""Token ids and their weight codes."""


def inspect(
    path: Path,
    stage: str | None = None,
    tokenizer: Path | None = None,
    records: int = 2,
    max_chars: int = 1500,
    console: Console | None = None,
) -> None:
    """Print what a data file, a folder of them or a packed dataset holds, and its first records as they are trained on.

    Args:
        path: A file or folder of any accepted format, or a folder that `minigpt data pack` wrote.
        stage: pretrain, sft, reason, preference or prompt; guessed from the first record when not given.
        tokenizer: Folder with a tokenizer.json; the shipped one by default, a packed dataset's own for that.
        records: How many records to show.
        max_chars: Longer records are shown up to here.
        console: Where to print.
    Raises:
        UserError: nothing there, or an unknown stage.
    """
    console = console or Console()
    if stage is not None and stage not in STAGES:
        raise UserError(f"stage {stage!r} is not known: use one of {', '.join(STAGES)}")
    if is_packed(path):
        _inspect_packed(PackedDataset(path), tokenizer, records, max_chars, console)
        return
    encoder = ChatEncoder(tokenizer or SHIPPED_TOKENIZER)
    files = list_files([path])
    if len(files) > 1:
        console.print(_file_table(files, path))
    _inspect_file(files[0], stage or stage_of_file(files[0]), encoder, records, max_chars, console)


def _file_table(files: list[Path], folder: Path) -> Table:
    table = Table("file", "format", "stage", title=f"{len(files)} files in {folder}", title_justify="left")
    for file in files:
        table.add_row(str(file.relative_to(folder)), detect_format(file), stage_of_file(file))
    return table


def _inspect_file(path: Path, stage: str, encoder: ChatEncoder, records: int, max_chars: int, console: Console) -> None:
    found = list(islice(_first_records(path, stage), SAMPLE))
    good = [record for record in found if not isinstance(record, BadRecord)]
    bad = [record for record in found if isinstance(record, BadRecord)]
    sides = [_encode(record, stage, encoder) for record in good]
    console.print(
        _summary(
            path=str(path),
            format=detect_format(path),
            stage=stage,
            size=f"{path.stat().st_size:,} bytes",
            records=f"{'first ' if len(found) == SAMPLE else ''}{len(found):,}, of which {len(bad):,} cannot be used",
            **_token_counts([encoded for side in sides for _, encoded in side]),
        )
    )
    for problem in bad[:records]:
        console.print(Text(str(problem), style="red"))
    console.print(_legend())
    for number, (record, parts) in enumerate(zip(good[:records], sides, strict=False), start=1):
        for name, encoded in parts:
            console.print(_panel(f"record {number}{name}", encoded, encoder, max_chars))
        if stage == "prompt":
            console.print(Text(f"answer {record['answer']!r}, verifier {record['verifier']}, meta {record['meta']}"))


def _first_records(path: Path, stage: str) -> Iterator[dict[str, Any] | BadRecord]:
    for chunk in split_into_chunks(path):
        for _, record in read_chunk(chunk, stage):
            yield record


def _encode(record: dict[str, Any], stage: str, encoder: ChatEncoder) -> list[tuple[str, Encoded]]:
    """The sequences of a record, each with the words that set it apart."""
    if stage == "pretrain":
        ids = [*encoder.bos_ids, *encoder.encode_text(record["text"]), encoder.eos_id]
        return [("", (ids, [ANSWER] * len(ids)))]
    tools = record.get("tools")
    if stage == "prompt":
        ids = encoder.encode_prompt(record["messages"], tools=tools)
        return [("", (ids, [CONTEXT] * len(ids)))]
    if stage == "preference":
        prompt = [{**message, "weight": 0} for message in record["messages"]]
        return [(f", {side}", encoder.encode(prompt + record[side], tools=tools)) for side in ("chosen", "rejected")]
    return [("", encoder.encode(record["messages"], tools=tools, tag_code=TAG if stage == "reason" else ANSWER))]


def _inspect_packed(
    dataset: PackedDataset, tokenizer: Path | None, records: int, max_chars: int, console: Console
) -> None:
    encoder = ChatEncoder(tokenizer or dataset.folder)
    rows = [dataset.row(i) for i in range(min(SAMPLE, len(dataset)))]
    sides = [_packed_sequences(row) for row in rows]
    console.print(
        _summary(
            path=str(dataset.folder),
            format="minigpt-arrow",
            stage=dataset.stage,
            rows=f"{len(dataset):,} of {dataset.seq_len:,} tokens",
            fingerprint=dataset.fingerprint,
            **_token_counts([encoded for side in sides for _, encoded in side]),
        )
    )
    console.print(_legend())
    for number, parts in enumerate(sides[:records], start=1):
        for name, encoded in parts:
            console.print(_panel(f"row {number}{name}", encoded, encoder, max_chars))


def _packed_sequences(row: Any) -> list[tuple[str, Encoded]]:
    """The documents of a packed row, or the sequences of a preference or prompt row."""
    if hasattr(row, "chosen_ids"):
        prompt = row.prompt_ids.tolist()
        return [
            (f", {side}", (prompt + ids.tolist(), [CONTEXT] * len(prompt) + weight.tolist()))
            for side, ids, weight in (
                ("chosen", row.chosen_ids, row.chosen_weight),
                ("rejected", row.rejected_ids, row.rejected_weight),
            )
        ]
    if not hasattr(row, "seq_lens"):
        ids = row.prompt_ids.tolist()
        return [("", (ids, [CONTEXT] * len(ids)))]
    documents, start = [], 0
    for number, length in enumerate(row.seq_lens.tolist(), start=1):
        ids = row.input_ids[start : start + length].tolist()
        codes = [ANSWER] * length if row.weight is None else row.weight[start : start + length].tolist()
        documents.append((f", document {number}", (ids, codes)))
        start += length
    return documents


def _summary(**facts: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(Text(name.replace("_", " "), style="bold"), Text(fact))
    return table


def _token_counts(sequences: Sequence[Encoded]) -> dict[str, str]:
    """Numbers a person needs to choose `seq_len`."""
    lengths = [len(ids) for ids, _ in sequences]
    if not lengths:
        return {}
    trained = sum(1 for _, codes in sequences for code in codes if code)
    return {
        "tokens": f"{sum(lengths):,} in {len(lengths):,} sequences, {trained:,} of them with a loss weight",
        "sequence_length": f"median {statistics.median(lengths):,.0f}, mean {statistics.mean(lengths):,.0f}, "
        f"longest {max(lengths):,}",
    }


def _legend() -> Text:
    text = Text()
    for words, style in LEGEND.values():
        text.append("■ ", style).append(words + "   ", style)
    return text


def _panel(title: str, encoded: Encoded, encoder: ChatEncoder, max_chars: int) -> Panel:
    """One sequence in the colours of its weights; the frame says them in numbers, for a terminal without colour."""
    ids, codes = encoded
    counts = "   ".join(f"{LEGEND[code][0]} × {sum(c == code for c in codes)}" for code in sorted(set(codes)))
    text = coloured(encoder, ids, codes)
    if len(text) > max_chars:
        text = text[:max_chars].append(f" … and {len(text) - max_chars:,} more characters", "italic")
    title = f"{title}: {len(ids)} tokens"
    return Panel(text, title=title, subtitle=counts, title_align="left", subtitle_align="left")


def coloured(encoder: ChatEncoder, ids: Iterable[int], codes: Iterable[int]) -> Text:
    """The text of `ids`, each run of equal weight codes in its colour."""
    text = Text()
    for code, run in groupby(zip(ids, codes, strict=True), key=lambda pair: pair[1]):
        part = encoder.decode([token for token, _ in run], skip_special_tokens=False)
        text.append(part.translate(VISIBLE), LEGEND[code][1])
    return text
