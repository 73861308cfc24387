"""The options that every training stage shares. A stage adds its own defaults, nothing more."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt.errors import UserError

OF_ADAPTERS = ("lora_alpha", "lora_dropout", "lora_targets", "lora_rslora", "lora_dora")


def check_adapter(options: object) -> None:
    """Raises UserError for options of an adapter where none is trained: all weights would be, without a word."""
    given = [name for name in OF_ADAPTERS if getattr(options, name, None)]
    if given and not getattr(options, "lora_rank", 0):
        raise UserError(f"--{given[0]} belongs to an adapter: give --lora_rank too, or leave it out")


_GOAL = re.compile(r"\S+>=-?\d+(\.\d+)?")

SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


@dataclass
class TrainOptions:
    """Options of a training run. Every field is a flag (`--max_steps 100`) and a key of a YAML file (`--config FILE`).

    Args:
        data: A folder packed by `minigpt data pack`, or raw files and folders, which are packed into SAVE_DIR/data
            first. None: the embedded micro-world.
        save_dir: The run folder: checkpoints, metrics, weights, report.
        init: A run folder or a Hugging Face folder to start from. None: random weights (pretrain), or the newest
            pretrain run beside save_dir (sft).
        preset: Shape of a new model: s (5M), 100m, 300m, 1b. auto: s on a CPU, 100m on a GPU.
        vocab_size: Entries of a new model's embedding. None: those of the tokenizer.
        hidden_size: Overrides the preset's width.
        num_hidden_layers: Overrides the preset's depth.
        num_attention_heads: Overrides the preset's query heads.
        num_key_value_heads: Overrides the preset's key/value heads.
        intermediate_size: Overrides the preset's feed-forward width.
        tokenizer: Folder of the tokenizer for raw data. None: the one of --init, or the shipped one.
        seq_len: Tokens of a row when raw data is packed here; packed data brings its own.
        epochs: Passes over the data (fractions are allowed).
        max_steps: Optimizer steps; overrides epochs.
        global_batch_size: Rows of packed tokens per optimizer step over all devices (--batch_size is the same).
        micro_batch_size: Rows in one forward pass of one device. None: as many as fit a sensible pass.
        optimizer: adamw; muon: orthogonalised momentum for the matrices, AdamW for the rest, learns much faster;
            auto: muon up to ZeRO stage 2 where gradients are neither offloaded nor reordered or padded, else adamw.
        learning_rate: Peak learning rate.
        schedule: How the rate falls after the warm-up: cosine, wsd (constant, then linear over the last fifth),
            constant.
        min_lr_ratio: The rate at the end, as a fraction of the peak.
        warmup_ratio: Fraction of the steps over which the rate rises linearly from 0.
        weight_decay: Decoupled decay of the matrices; norms, biases and embeddings are exempt.
        beta1: AdamW's first-moment decay.
        beta2: AdamW's second-moment decay.
        grad_clip: Largest global gradient norm; 0 switches clipping off.
        dtype: Precision of the forward and backward pass: bf16 (masters and accumulation stay fp32), fp32, auto.
        compile: torch.compile. None: where a C++ compiler (or a GPU) is there and the run is long enough to gain by it.
        deepspeed: A DeepSpeed JSON file, such as ds_configs/zero2.json. None: ZeRO stage 1.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, a third more time.
        attention_backend: varlen, sdpa or reference; None: the fastest for the device.
        seed: Of initialisation and data order.
        eval_interval: Steps between two validations; 0: only at the end.
        eval_rows: At most this many rows of the validation split.
        eval_tasks: Also run these tasks at each validation, NAME:PATH each, as `minigpt eval --tasks` takes them.
        eval_limit: At most this many questions or texts of each task.
        eval_thinking: true: these questions are asked with thinking on; false: off; null: as the model likes.
        stop_when: End the run early when one of their results gets there: TASK/METRIC>=VALUE.
        save_interval: Steps between two checkpoints; 0: only at the end.
        keep_checkpoints: How many checkpoints are kept; older ones are deleted.
        resume: auto: go on from the newest good checkpoint in save_dir. never: ignore checkpoints.
        overwrite: Delete what save_dir holds of an earlier run and start over.
        log_interval: Steps between two lines of metrics.jsonl.
        tensorboard: Also write TensorBoard events.
        deterministic: Refuse kernels whose result may differ from run to run.
        max_nan_steps: Abort after this many skipped steps in a row (NaN or infinite loss or gradient).
        export_dtype: Precision of the exported Hugging Face folder.
        recipe: Name of the reference curve that the report lays over this run's loss.
        threads: CPU threads of a process; 0: all cores divided by the processes on this machine.
    """

    data: list[Path] | None = None
    save_dir: Path = Path("out/run")
    init: Path | None = None
    preset: Literal["auto", "s", "100m", "300m", "1b"] = "auto"
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None
    tokenizer: Path | None = None
    seq_len: int = 256
    epochs: float = 1.0
    max_steps: int | None = None
    global_batch_size: int = 16
    micro_batch_size: int | None = None
    optimizer: Literal["auto", "adamw", "muon"] = "auto"
    learning_rate: float = 3e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    warmup_ratio: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool | None = None
    deepspeed: Path | None = None
    gradient_checkpointing: bool = False
    attention_backend: Literal["varlen", "sdpa", "reference"] | None = None
    seed: int = 0
    eval_interval: int = 0
    eval_rows: int = 64
    eval_tasks: list[str] | None = None
    eval_limit: int = 64
    eval_thinking: bool | None = None
    stop_when: str | None = None
    save_interval: int = 0
    keep_checkpoints: int = 2
    resume: Literal["auto", "never"] = "auto"
    overwrite: bool = False
    log_interval: int = 1
    tensorboard: bool = True
    deterministic: bool = False
    max_nan_steps: int = 5
    export_dtype: Literal["bf16", "fp32"] = "bf16"
    recipe: str | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        counts = ["global_batch_size", "seq_len", "eval_rows", "eval_limit", "keep_checkpoints", "log_interval"]
        counts += ["max_nan_steps"]
        optional = ("max_steps", "micro_batch_size", *SHAPE)
        for name in (*counts, *(name for name in optional if getattr(self, name) is not None)):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("learning_rate", "weight_decay", "grad_clip", "eval_interval", "save_interval", "threads"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a number of at least 0")
        for name in ("warmup_ratio", "min_lr_ratio"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and less than 1")
        _require(0 < self.epochs < math.inf, "epochs", self.epochs, "a number above 0")
        if self.stop_when is not None:
            _require(bool(_GOAL.fullmatch(self.stop_when)), "stop_when", self.stop_when, "TASK/METRIC>=VALUE")
            if not (self.eval_tasks and self.eval_interval):
                raise UserError("--stop_when looks at --eval_tasks every --eval_interval steps: give both")

    @property
    def goal(self) -> tuple[str, float] | None:
        """The metric that `stop_when` names, and the value that ends the run."""
        if self.stop_when is None:
            return None
        metric, _, value = self.stop_when.partition(">=")
        return metric, float(value)

    @property
    def shape_overrides(self) -> dict[str, int]:
        """The fields of the model's shape that were given by hand."""
        return {name: getattr(self, name) for name in SHAPE if getattr(self, name) is not None}


def _require(good: bool, name: str, value: object, rule: str) -> None:
    if not good:
        raise UserError(f"--{name} is {value}, it must be {rule}")


# Shapes of new models. Config S trains on a laptop; the others have head_dim 128, which flash kernels are fastest with.
PRESETS: dict[str, dict[str, int]] = {
    "s": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 832,
    },
    "100m": {
        "hidden_size": 768,
        "num_hidden_layers": 14,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "intermediate_size": 2048,
    },
    "300m": {
        "hidden_size": 1152,
        "num_hidden_layers": 20,
        "num_attention_heads": 9,
        "num_key_value_heads": 9,
        "intermediate_size": 3072,
    },
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5632,
    },
}
