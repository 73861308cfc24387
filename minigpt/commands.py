"""The verbs of the command line that only connect a dataclass of options with a function elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_prep.pack import PackOptions
from data_prep.tokenizer import TokenizerOptions
from minigpt.errors import UserError


@dataclass
class InspectOptions:
    """What a file holds.

    Args:
        path: A raw file or folder, or a packed folder.
        stage: How to read it: pretrain, sft, reason, preference, prompt. None: found out.
        tokenizer: Folder of the tokenizer. None: the shipped one.
        records: How many records to show.
    """

    path: Path
    stage: str | None = None
    tokenizer: Path | None = None
    records: int = 2


def inspect(options: InspectOptions) -> None:
    """Show the format of a file or packed folder and a rendered example with its loss weights in colour."""
    from data_prep.inspect import inspect

    inspect(options.path, options.stage, options.tokenizer, options.records)


def tokenizer(options: TokenizerOptions) -> None:
    """Train a byte-level BPE tokenizer and write tokenizer.json and tokenizer_config.json."""
    from data_prep.tokenizer import train_tokenizer

    print(f"written to {train_tokenizer(options)}")


def pack(options: PackOptions) -> None:
    """Clean, deduplicate, tokenize and pack raw files into memory-mapped Arrow shards."""
    from data_prep.pack import describe, pack
    from minigpt.observe.progress import progress_bar

    with progress_bar() as progress:
        manifest = pack(options, progress)
    print(describe(manifest))


@dataclass
class VerifyDataOptions:
    """Check a packed folder.

    Args:
        folder: What `minigpt data pack` wrote.
    """

    folder: Path


def verify_data(options: VerifyDataOptions) -> None:
    """Hash every shard of a packed folder and check it against the manifest."""
    from data_prep.verify import verify

    print(verify(options.folder))


@dataclass
class ExportOptions:
    """Write a run's weights for other programs.

    Args:
        run: A run folder.
        output: The folder to write.
        format: hf: a Hugging Face folder (config, safetensors, tokenizer). pth: a state dict for torch.load.
        dtype: Precision of the weights.
    """

    run: Path
    output: Path = Path("export")
    format: Literal["hf", "pth"] = "hf"
    dtype: Literal["bf16", "fp32"] = "bf16"


def export(options: ExportOptions) -> None:
    """Write the weights of a finished run from its float32 masters."""
    import torch

    from minigpt.model.hf import load_generation_config
    from minigpt.model.model_minigpt import MiniGPT

    folder = _model_folder(options.run)
    model = MiniGPT.from_pretrained(folder)
    masters = sorted(options.run.glob("*.pth"), key=lambda path: path.stat().st_mtime)
    if masters:
        model.load_state_dict(torch.load(masters[-1], map_location="cpu", weights_only=True))
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    if options.format == "hf":
        model.save_pretrained(
            options.output, dtype=dtype, tokenizer_folder=folder, generation_config=load_generation_config(folder)
        )
        print(f"written to {options.output}")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{options.run.name}_{model.config.hidden_size}.pth"
    partial = path.with_name(path.name + ".partial")
    torch.save({name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, partial)
    partial.replace(path)
    print(f"written to {path}")


@dataclass
class ImportOptions:
    """Make a run of a Hugging Face folder, for `--init`, chat and generate.

    Args:
        folder: A Qwen3 or Llama style folder: config.json, safetensors, tokenizer.
        output: The run folder to make.
    """

    folder: Path
    output: Path = Path("out/imported")


def import_hf(options: ImportOptions) -> None:
    """Check a Hugging Face folder and copy it into a run folder."""
    from minigpt.model.hf import convert_hf_folder

    if options.output.exists() and any(options.output.iterdir()):
        raise UserError(f"{options.output} is not empty; give another --output")
    if not (options.folder / "tokenizer.json").exists():
        raise UserError(f"{options.folder} has no tokenizer.json; add the model's tokenizer to the folder")
    convert_hf_folder(options.folder, options.output / "hf")
    print(f"written to {options.output}; use it as --init {options.output} or with minigpt chat")


@dataclass
class ReportOptions:
    """Curves and numbers of a run.

    Args:
        run: A run folder, or the folder of a quickstart.
        compare: Other runs whose loss is drawn beside it.
    """

    run: Path
    compare: list[Path] = field(default_factory=list)


def report(options: ReportOptions) -> None:
    """Write report.md and its pictures into the run folder."""
    from minigpt.observe.report import build_report

    print(f"written to {build_report(options.run, compare=options.compare)}")


@dataclass
class DoctorOptions:
    """Look over this machine.

    Args:
        folder: Where runs will be written (its disk is checked).
    """

    folder: Path = Path(".")


def doctor(options: DoctorOptions) -> None:
    """Check Python, packages, compiler, CPU, GPU, memory and disk, each with a remedy."""
    from minigpt.observe.doctor import print_doctor

    if print_doctor(options.folder):
        raise SystemExit(1)


def _model_folder(run: Path) -> Path:
    folder = run / "hf" if (run / "hf" / "config.json").exists() else run
    if not (folder / "config.json").exists():
        raise UserError(f"{run} holds no finished model: give the folder of a finished run")
    return folder
