"""What has to be there before the first step: threads and precision, the data, the model."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from minigpt.dataset.shards import PackedDataset, is_packed, tokenizer_hash
from minigpt.errors import UserError
from minigpt.model.hf import special_token_ids
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.system import usable_cores

from .checkpoint import STATE, list_checkpoints
from .engine import Processes, check_deepspeed_config
from .options import PRESETS, TrainOptions
from .stage import Stage

Options = TypeVar("Options", bound=Any)
SHIPPED_TOKENIZER = Path(__file__).parents[1] / "model"


@dataclass(frozen=True)
class Source:
    """The two splits of a run's data; `valid` is None when nothing is held out."""

    train: PackedDataset
    valid: PackedDataset | None


def configure_torch(options: TrainOptions, processes: Processes) -> None:
    """Threads, seeds and determinism of this process."""
    if processes.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes.world_size))
        torch.set_num_threads(options.threads or max(1, usable_cores() // local))
        _keep_freed_memory()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high" if processes.device.type == "cuda" else "highest")
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _keep_freed_memory() -> None:
    """Tell glibc not to give large blocks back to the kernel: faulting them in again costs 7 to 18 % of a step."""
    import ctypes

    try:
        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)
        libc.mallopt(top_pad, 64 << 20)
    except (OSError, AttributeError):
        return  # another C library: only slower


def compute_dtype(options: TrainOptions, device: torch.device) -> torch.dtype:
    """bf16 where the machine multiplies it faster than fp32, unless the options say otherwise."""
    if options.dtype == "auto":
        from minigpt.observe.hardware import cpu_bf16_units

        on_gpu = device.type == "cuda"
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else bool(cpu_bf16_units())
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if options.dtype == "bf16" else torch.float32


# Compiling takes about a minute on two CPU cores and makes a step two to three times as fast: shorter runs lose by it.
_WORTH_COMPILING = {"cpu": 1.5e13, "cuda": 1e16}  # FLOPs of the whole run


def compile_wanted(options: TrainOptions, device: torch.device, run_flops: float) -> bool:
    """Whether to compile: as asked for, else where the tools are installed and the run is long enough to gain by it.

    Errors: UserError when it is asked for and the tools are missing.
    """
    installed = _can_compile(device)
    if options.compile and not installed:
        raise UserError(
            f"--compile true needs a {'C' if device.type == 'cuda' else 'C++'} compiler and Python's headers "
            "(sudo apt-get install g++ python3-dev); leave it out to train without"
        )
    if options.compile is not None:
        return options.compile
    return installed and run_flops >= _WORTH_COMPILING[device.type]


def _can_compile(device: torch.device) -> bool:
    """Whether there is what torch.compile builds with: C++ for a CPU; for a GPU C, with which Triton starts kernels."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()  # what is built includes it
    if device.type == "cuda":
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        compilers = [os.environ.get("CXX", "g++")]
    return headers and any(shutil.which(compiler) for compiler in compilers)


def prepare_data(stage: Stage, options: TrainOptions, processes: Processes, valid_fraction: float = 0.02) -> Source:
    """Open the packed data, packing raw files (or the embedded micro-world) into the run folder first.

    Args:
        stage, options, processes: Of the run.
        valid_fraction: Part of raw files that is set aside for validation.

    Errors: UserError when the data is missing, unfinished, damaged, or packed for another stage.
    """
    _check_paths(stage, options)
    folder = _packed_folder(options)
    if folder is None:
        folder = Path(options.save_dir) / "data"
        wrong = None
        if processes.rank == 0:
            try:
                _pack_into(folder, stage, options, valid_fraction)
            except UserError as error:
                wrong = str(error)
        if (wrong := processes.broadcast(wrong)) is not None:  # the others must not wait for who has ended
            raise UserError(wrong)
    train = PackedDataset(folder, "train")
    if train.stage != stage.packed_as:
        raise UserError(
            f"{folder} was packed with --stage {train.stage}, {stage.name} needs --stage {stage.packed_as}: "
            f"pack the data again with `minigpt data pack --stage {stage.packed_as}`"
        )
    if not len(train):
        raise UserError(f"{folder} holds no training rows; pack it again with more data")
    try:
        special_token_ids(folder)  # of which the trained model's folder will tell
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from None
    has_valid = bool(train.manifest["splits"].get("valid", {}).get("shards"))
    return Source(train, PackedDataset(folder, "valid") if has_valid else None)


def _check_paths(stage: Stage, options: TrainOptions) -> None:
    """Find out now what would otherwise be found out after the data is packed."""
    check_deepspeed_config(options.deepspeed)
    if options.init is not None:
        model_folder(options.init)


def _packed_folder(options: TrainOptions) -> Path | None:
    """The folder of `--data` when it is packed already (or is meant to be: then opening it says what is wrong)."""
    packed = [p for p in options.data or [] if p.is_dir() and is_packed(p)]
    if packed and len(options.data or []) > 1:
        raise UserError(f"--data takes one packed folder, or raw files: {packed[0]} is packed; pack all together")
    return packed[0] if packed else None


def _pack_into(folder: Path, stage: Stage, options: TrainOptions, valid_fraction: float) -> None:
    from data_prep.microworld import MicroWorldOptions, write_microworld
    from data_prep.pack import OtherDatasetError, PackOptions, pack

    inputs = options.data
    if inputs is None:
        print("no --data: taking the embedded micro-world", flush=True)
        files = write_microworld(Path(options.save_dir) / "microworld", MicroWorldOptions(seed=0, size="small"))
        if stage.packed_as not in files:
            raise UserError(f"{stage.name} has no embedded default data: give --data")
        inputs = [files[stage.packed_as]]
    job = PackOptions(
        stage=stage.packed_as,  # type: ignore[arg-type]
        input=inputs,
        output=folder,
        tokenizer=options.tokenizer or _tokenizer_of(options.init),
        seq_len=options.seq_len,
        valid_fraction=valid_fraction,
    )
    try:
        manifest = pack(job)
    except OtherDatasetError:
        if options.resume != "never" and not options.overwrite and list_checkpoints(Path(options.save_dir)):
            raise UserError(
                f"{folder} was packed from other files or options than those given now, and there are checkpoints that "
                f"were trained on it: --data {folder} goes on with them, --overwrite starts anew"
            ) from None
        manifest = pack(replace(job, overwrite=True))
    rows = manifest["splits"]["train"]["rows"]
    print(f"packed {rows:,} rows of {options.seq_len} tokens into {folder}", flush=True)


def _tokenizer_of(init: Path | None) -> Path | None:
    """The tokenizer that belongs to the weights of `--init`."""
    if init is None:
        return None
    folder = model_folder(init)
    return folder if (folder / "tokenizer.json").exists() else None


def with_init(stage: Stage, options: Options) -> Options:
    """The options with the weights to start from decided: those of the newest run to follow, if none are given.

    A run that goes on keeps those that it began with, whatever was trained beside it since. `options` are those of
    any stage, reinforcement learning included.

    Errors: UserError when a stage that needs weights finds none.
    """
    if options.init is not None or not stage.follows:
        return options
    save_dir = Path(options.save_dir)
    init = None if options.overwrite or options.resume == "never" else _init_of_checkpoint(save_dir)
    if init is None:
        init = run_to_follow(stage, save_dir)
        if init is None:
            raise UserError(_no_weights(stage, options))
        print(f"no --init: starting from the newest {_stage_of(init)} run, {init}", flush=True)
    return replace(options, init=init)


def _init_of_checkpoint(save_dir: Path) -> Path | None:
    """What the run in this folder was started from, if it can be gone on with."""
    for folder in reversed(list_checkpoints(save_dir)):
        try:
            init = json.loads((folder / STATE).read_text(encoding="utf-8"))["options"]["init"]
        except (OSError, ValueError, KeyError):
            continue
        return None if init is None else Path(init)
    return None


def prepare_model(stage: Stage, options: TrainOptions, source: Source) -> tuple[MiniGPT, str]:
    """The model to train, and in words where its weights are from.

    Errors: UserError when the weights cannot be loaded, or the tokenizers do not match.
    """
    if options.init is not None:
        return _load_init(options.init, source.train), f"from {options.init}"
    return MiniGPT(new_model_config(options, source.train)), "random weights"


def _no_weights(stage: Stage, options: TrainOptions) -> str:
    return (
        f"{stage.name} starts from trained weights and there is no finished {' or '.join(stage.follows)} run beside "
        f"{options.save_dir}: give one with --init RUN (first `minigpt train {stage.follows[0]} --save_dir RUN`)"
    )


def run_to_follow(stage: Stage, save_dir: Path) -> Path | None:
    """The finished run among the neighbours of `save_dir` to go on from: the newest of the first stage that has one."""
    finished: dict[str | None, list[tuple[float, Path]]] = {}
    for path in save_dir.resolve().parent.glob("*/summary.json"):
        if path.parent != save_dir.resolve():
            finished.setdefault(_stage_of(path.parent), []).append((path.stat().st_mtime, path.parent))
    for name in stage.follows:
        if name in finished:
            return max(finished[name])[1]
    return None


def _stage_of(run: Path) -> str | None:
    try:
        return json.loads((run / "summary.json").read_text(encoding="utf-8")).get("stage")
    except (OSError, ValueError, AttributeError):
        return None


def new_model_config(options: TrainOptions, data: PackedDataset) -> MiniGPTConfig:
    """The preset with the options' overrides; the vocabulary is the tokenizer's, rounded up to a multiple of 64."""
    preset = options.preset
    if preset == "auto":
        preset = "100m" if torch.cuda.is_available() else "s"
    shape: dict[str, Any] = {
        "vocab_size": math.ceil(data.vocab_size / 64) * 64,
        "max_position_embeddings": max(2048, data.seq_len),
        **PRESETS[preset],
        **options.shape_overrides,
    }
    if shape["vocab_size"] < data.vocab_size:
        raise UserError(f"--vocab_size {shape['vocab_size']} is less than the tokenizer's {data.vocab_size} entries")
    try:
        return MiniGPTConfig(**shape)
    except ValueError as error:
        raise UserError(str(error)) from error


def model_folder(init: Path, option: str = "init") -> Path:
    """Where a model that an option names keeps its config.json. Errors: UserError when there is none."""
    for folder in (init / "hf", init):
        if (folder / "config.json").exists():
            return folder
    raise UserError(f"--{option} {init} holds no model: it must be the folder of a finished run or of a model")


def tokenizer_of(init: Path, option: str = "init") -> str | None:
    """The hash of a model's tokenizer; None when it has none. Errors: UserError when there is no model."""
    folder = model_folder(init, option)
    return tokenizer_hash(folder) if (folder / "tokenizer.json").exists() else None


def check_packed_for(init: Path, data: PackedDataset) -> None:
    """Errors: UserError when the data was packed with another tokenizer than the model's."""
    if tokenizer_of(init) not in (None, data.tokenizer_hash):
        raise UserError(
            f"the data in {data.folder} was packed with another tokenizer than that of {init}: "
            f"pack it again with --tokenizer {model_folder(init)}"
        )


def _load_init(init: Path, data: PackedDataset) -> MiniGPT:
    """Weights of a run (its float32 masters) or of a Hugging Face folder, checked against the data's tokenizer."""
    check_packed_for(init, data)
    model = load_masters(init)
    if data.vocab_size > model.config.vocab_size:
        raise UserError(f"the data's tokenizer has {data.vocab_size} entries, {init} only {model.config.vocab_size}")
    if data.seq_len > model.config.max_position_embeddings:
        raise UserError(
            f"rows of {data.seq_len} tokens are longer than {init} was made for "
            f"({model.config.max_position_embeddings}); pack the data with a smaller --seq_len"
        )
    return model


def load_masters(init: Path) -> MiniGPT:
    """The model of a run with its float32 masters, or of a Hugging Face folder."""
    folder = model_folder(init)
    model = MiniGPT.from_pretrained(folder)
    files = [path for path in init.glob("*.pth") if not path.name.startswith("lora_")]  # those hold an adapter only
    masters = sorted(files, key=lambda path: path.stat().st_mtime) if folder != init else []
    if masters:
        _load_masters(model, masters[-1])
    return model


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _load_masters(model: MiniGPT, path: Path) -> None:
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError) as error:
        raise UserError(
            f"{path} does not hold the weights of the model beside it ({_first_line(error)}); "
            f"export the run again, or start from its Hugging Face folder alone with --init {path.parent / 'hf'}"
        ) from error
