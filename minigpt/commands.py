"""The verbs of the command line that only connect a dataclass of options with a function elsewhere."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_prep.pack import PackOptions
from data_prep.tokenizer import TokenizerOptions
from minigpt.errors import UserError

if TYPE_CHECKING:
    from minigpt.model.model_minigpt import MiniGPT


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
        output: The folder to write; not one that holds a run.
        format: hf: a Hugging Face folder (config, safetensors, tokenizer). pth: a state dict for torch.load. gguf: one
            file for llama.cpp.
        dtype: Precision of the weights; q8_0 (8 bits, blocks of 32 with a scale each) for gguf only.
    """

    run: Path
    output: Path = Path("export")
    format: Literal["hf", "pth", "gguf"] = "hf"
    dtype: Literal["bf16", "fp16", "fp32", "q8_0"] = "bf16"


def export(options: ExportOptions) -> None:
    """Write the weights of a finished run from its float32 masters."""
    import torch

    from minigpt.trainer.setup import load_masters
    from minigpt.trainer.weights import write_state_dict

    if options.dtype == "q8_0" and options.format != "gguf":
        raise UserError("--dtype q8_0 is for --format gguf; choose bf16, fp16 or fp32")
    folder = _model_folder(options.run)
    _check_no_run(options.output)
    model = load_masters(options.run)
    name = options.run.resolve().name
    with _folder_made(options.output):
        if options.format == "pth":
            dtype = getattr(torch, _TORCH_NAMES[options.dtype])
            weights = {key: tensor.to(dtype) for key, tensor in model.state_dict().items()}
            path = write_state_dict(options.output / f"{name}_{model.config.hidden_size}.pth", weights)
        elif options.format == "gguf":
            path = _export_gguf(options, model, folder, name)
        else:
            path = _export_hf(options, model, folder)
    print(f"written to {path}")


def _check_no_run(output: Path) -> None:
    """Refuse a run's folder: what starts from a run reads the newest .pth in it, which would be the rounded weights."""
    from minigpt.trainer.run import SIGNS

    if (output / "hf" / "config.json").exists() or any((output / name).exists() for name in SIGNS):
        raise UserError(
            f"{output} holds a run, and exported weights must not lie beside its own: give another --output"
        )


@contextlib.contextmanager
def _folder_made(output: Path) -> Iterator[None]:
    """Make a folder; whoever fails to fill it leaves none behind that was not there."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a folder that somebody else has put something into stays
            for folder in made:
                folder.rmdir()
        raise


_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _export_hf(options: ExportOptions, model: MiniGPT, folder: Path) -> Path:
    import torch

    from minigpt.model.hf import load_generation_config

    model.save_pretrained(
        options.output,
        dtype=getattr(torch, _TORCH_NAMES[options.dtype]),
        tokenizer_folder=folder,
        generation_config=load_generation_config(folder),
    )
    _write_card(options, model, options.output / "README.md")
    return options.output


def _export_gguf(options: ExportOptions, model: MiniGPT, folder: Path, name: str) -> Path:
    from minigpt.dataset.chat_template import find_template
    from minigpt.model.gguf import write_gguf
    from minigpt.model.hf import load_generation_config

    ends = load_generation_config(folder).get("eos_token_id")
    path = write_gguf(
        options.output / f"{name}-{options.dtype}.gguf",
        model.config,
        model.state_dict(),
        folder,
        dtype=options.dtype,
        name=name,
        chat_template=find_template(folder)[0],
        eos_token_id=ends[0] if isinstance(ends, list) else ends,
    )
    _write_card(options, model, options.output / "README.md", path.name)
    return path


def _write_card(options: ExportOptions, model: MiniGPT, path: Path, file: str | None = None) -> None:
    """The model card; a README of somebody else's stays."""
    from minigpt.model.hf import config_to_hf
    from minigpt.observe.model_card import MARK, model_card

    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        print(f"{path} is not ours and stays as it is")
        return
    card = model_card(options.run, config_to_hf(model.config), model.num_parameters(), options.dtype, file)
    path.write_text(card, encoding="utf-8")


@dataclass
class ImportOptions:
    """Make a run of a Hugging Face folder, for `--init`, chat and generate.

    Args:
        folder: A Qwen2, Qwen3 or Llama style folder: config.json, safetensors, tokenizer.
        output: The run folder to make.
        chat_template: Jinja file of a chat template to use instead of the folder's; for base models without one.
    """

    folder: Path
    output: Path = Path("out/imported")
    chat_template: Path | None = None


def import_hf(options: ImportOptions) -> None:
    """Check a Hugging Face folder and copy it into a run folder."""
    from minigpt.model.hf import convert_hf_folder

    if options.output.exists() and any(options.output.iterdir()):
        raise UserError(f"{options.output} is not empty; give another --output")
    if (options.folder / "config.json").exists() and not (options.folder / "tokenizer.json").exists():
        raise UserError(f"{options.folder} has no tokenizer.json; add the model's tokenizer to the folder")
    output = options.output
    with _folder_made(output), tempfile.TemporaryDirectory(dir=output, prefix=".partial-") as name:
        folder = Path(name) / "hf"
        convert_hf_folder(options.folder, folder)
        _settle_chat_template(options, folder)
        _write_import_summary(options, folder)
        (folder / "summary.json").replace(output / "summary.json")
        folder.rename(output / "hf")
    print(f"written to {options.output}; use it as --init {options.output} or with minigpt chat")


def _settle_chat_template(options: ImportOptions, folder: Path) -> None:
    """Make sure that chat works, or say that it does not. Errors: UserError for a template that cannot be used."""
    from minigpt.dataset.chat import ChatEncoder
    from minigpt.dataset.chat_template import find_template, shipped_template

    if options.chat_template is not None:
        if not options.chat_template.is_file():
            raise UserError(f"--chat_template {options.chat_template} does not exist")
        shutil.copyfile(options.chat_template, folder / "chat_template.jinja")
    encoder = ChatEncoder(folder)
    if encoder.template is not None:
        assert encoder.im_end_id is not None  # renders a conversation, so that a template that cannot is found out now
    elif not encoder.knows_chat:
        print(
            "the tokenizer has neither a chat template nor <|im_start|>: the model can continue text, but not be tuned "
            "for chat before it gets the template of its family with --chat_template FILE"
        )
    elif find_template(folder)[0] is None:
        (folder / "chat_template.jinja").write_text(shipped_template() or "", encoding="utf-8")
        print("the tokenizer has no chat template; MiniGPT's (ChatML) is taken")


def _write_import_summary(options: ImportOptions, folder: Path) -> None:
    """What model cards and others want to know of where the weights came from."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source = options.folder.resolve()
    if source.parent.name == "snapshots":  # Hugging Face's cache: models--ORGANISATION--NAME/snapshots/REVISION
        repository = source.parents[1].name.removeprefix("models--").replace("--", "/")
        name = f"{repository}@{source.name}"
    else:
        name = source.name
    summary = {
        "stage": "import",
        "source": name,
        "architecture": config["architectures"][0],
        "vocab_size": config["vocab_size"],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


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
    from minigpt.model import native
    from minigpt.observe.doctor import print_doctor

    sources = Path(native.__file__).parents[1].rglob("*.cpp")
    if print_doctor(options.folder, next((why for _, why in map(native.build, sources) if why), "")):
        raise SystemExit(1)


def _model_folder(run: Path) -> Path:
    folder = run / "hf" if (run / "hf" / "config.json").exists() else run
    if not (folder / "config.json").exists():
        raise UserError(f"{run} holds no finished model: give the folder of a finished run")
    return folder
