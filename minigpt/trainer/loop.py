"""The training loop that all supervised stages share: data → loss → step → metrics → weights.

A stage (`train_pretrain.py`, `train_full_sft.py` …) is its data, its loss and its defaults; everything else is here,
in the order in which it happens. What a step computes does not depend on how it is cut: the loss is the weighted token
mean over the whole global batch, and sample k of the global order belongs to step k // global_batch_size at any
world size.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minigpt.dataset.shards import PackedDataset, TokenStatistics
from minigpt.errors import UserError
from minigpt.model.attention import choose_backend

from . import checkpoint
from .engine import Engine, Processes, init_processes
from .flops import training_flops
from .options import TrainOptions
from .run import Run
from .schedule import learning_rate
from .setup import compile_wanted, compute_dtype, configure_torch, prepare_data, prepare_model, with_init
from .stage import Batch, Stage, StageModule, trained_layout

if TYPE_CHECKING:
    from minigpt.evaluation.during_training import TrainingTasks


def train(stage: Stage, options: TrainOptions) -> dict[str, Any]:
    """Run a stage from wherever its folder stands to exported weights; returns what summary.json holds."""
    processes = init_processes()
    with processes.errors_said_once():
        run = Run(stage.name, options, processes)
        if (summary := run.finished_summary()) is not None:
            return summary
        configure_torch(options, processes)
        run.options = options = with_init(stage, options)
        run.open()
        source = prepare_data(stage, options, processes)
        model, init_weights_from = prepare_model(stage, options, source)
        network = stage.network(model, options)
        return Trainer(stage, options, processes, run, source.train, source.valid, network, init_weights_from).run()


@dataclass
class _Progress:
    """Where a run stands; everything here goes into a checkpoint."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    last_loss: float = math.nan
    seconds: float = 0.0
    validated_step: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    goal_reached: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class _Speed:
    """Tokens per second of the steps after the first, which compiles."""

    tokens: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0
    steps: int = 0

    def add(self, tokens: float, flops: float, seconds: float) -> None:
        self.steps += 1
        if self.steps > 1:
            self.tokens, self.flops, self.seconds = self.tokens + tokens, self.flops + flops, self.seconds + seconds

    def per_second(self, amount: float) -> float:
        return amount / self.seconds if self.seconds else math.nan


@dataclass
class Trainer:
    """One run of a stage.

    Attributes:
        stage: What is special about it.
        options: What the user chose.
        processes: This process among its fellows.
        run_folder: Where everything is written.
        data: What is trained on.
        valid: What is held out, if anything is.
        network: What is trained: the model, with adapters in it or another head on it (see `Stage.network`).
        origin: In words, where its weights are from.

    While it runs there are also `engine`, which holds the network, its optimizer and their state, and `micro_batch`,
    the rows of one forward pass.
    """

    stage: Stage
    options: TrainOptions
    processes: Processes
    run_folder: Run
    data: PackedDataset
    valid: PackedDataset | None
    network: Any
    origin: str
    progress: _Progress = field(default_factory=_Progress)
    speed: _Speed = field(default_factory=_Speed)
    saved_step: int | None = None

    def run(self) -> dict[str, Any]:
        options, run = self.options, self.run_folder
        self.tasks = self._read_tasks()
        self.micro_batch = self.stage.micro_batch_size(self.data, options, self.processes)
        self.total_steps = total_steps(options, len(self.data))
        dtype = compute_dtype(options, self.processes.device)
        tokens = self.total_steps * options.global_batch_size * self.data.seq_len / self.processes.world_size
        trained = {name: p.shape for name, p in self.network.named_parameters() if p.requires_grad}
        # now: ZeRO stage 3 will take the shapes apart
        self.trained_layout, self.parameters = trained_layout(self.network), self.network.num_parameters()
        frozen = any(not p.requires_grad for p in self.network.parameters())
        self.adapter_weights = sum(shape.numel() for shape in trained.values()) if frozen else None
        run_flops = self._flops(tokens=tokens, labels=tokens, attention_pairs=0)
        self.engine = Engine(
            StageModule(self.network, self.stage.loss),
            self.processes,
            dtype=dtype,
            learning_rate=options.learning_rate,
            optimizer_name=options.optimizer,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            grad_clip=options.grad_clip,
            config=options.deepspeed,
            compile=compile_wanted(options, self.processes.device, run_flops),
        )
        self.network.attention_backend = options.attention_backend or choose_backend(
            self.processes.device, self.data.seq_len, dtype
        )
        self.network.model.gradient_checkpointing = options.gradient_checkpointing
        self.stage.before_training(self)
        run.clear()  # now: nothing is left that could be found wrong
        self._resume()
        p = self.progress
        judged = p.validated_step == p.step
        run.start(self._description(dtype), self.total_steps, p.step, self.processes.device, dtype, judged)
        try:
            with GracefulStop() as stop:
                self._steps(stop)
                self.save()  # first: a validation may fail, or be interrupted
                self._leave_if_asked(stop)
                if self.progress.validated_step != self.progress.step:
                    self.validate()
        finally:
            run.pause()
        return self._finish(self.progress.validation)

    def _read_tasks(self) -> TrainingTasks | None:
        """The tasks of `--eval_tasks`, read now so that a wrong path is found out before anything is trained."""
        o = self.options
        if o.eval_tasks is None:
            return None
        if not hasattr(self.network, "lm_head"):
            raise UserError(f"--eval_tasks judge language models and {self.stage.name} trains no such; leave them out")
        from minigpt.evaluation.during_training import TrainingTasks

        return TrainingTasks(o.eval_tasks, o.eval_limit, self.data.folder, self.valid, o.eval_thinking)

    def _resume(self) -> None:
        if self.options.resume == "never":
            return
        found = None
        if self.processes.rank == 0:
            found = checkpoint.newest_good(self.run_folder.folder, self.run_folder.say)
        found = self.processes.broadcast(found)
        if found is None:
            return
        folder, state = found
        self.run_folder.check_resumable(state, self.data, self.network, self._engine_identity())
        checkpoint.load(self.engine, folder)
        self.progress = _Progress(**state["progress"])
        judged_by = ("stop_when", "eval_tasks", "eval_limit", "eval_thinking")
        if any(state["options"].get(name) != getattr(self.options, name) for name in judged_by):
            self.progress.goal_reached, self.progress.validated_step = False, -1  # these weights are judged anew
        self.saved_step = self.progress.step
        self.total_steps = total_steps(self.options, len(self.data), self.progress)
        self.run_folder.say(f"resuming from {folder} at step {self.progress.step} of {self.total_steps}")
        before, now = state["world_size"], self.processes.world_size
        if before != now:
            self.run_folder.say(f"it was written by {before} processes, now {now}: same samples, other rounding")

    def _steps(self, stop: GracefulStop) -> None:
        options, progress = self.options, self.progress
        batches = _prefetch(self._step_batches(), self.tensors, self.stage.statistics)
        nan_steps = 0
        started = time.monotonic()
        while progress.step < self.total_steps and not progress.goal_reached:
            micro_batches, local = next(batches)
            # Before the clock: it waits for the device. All ranks stop together, also if only one was asked
            stop_asked, weight, tokens, labels, pairs = self.processes.sum([float(stop.asked), *local])
            if stop_asked:
                self._leave(stop)
            if self._validation_is_due():
                self.validate()
                if progress.goal_reached:
                    break
                started = time.monotonic()
            scale = 1.0 / weight if weight else 0.0
            sums = torch.zeros(1 + len(self.stage.metrics), device=self.processes.device)
            for batch in micro_batches:
                sums += self.engine.forward_backward(batch, scale)
            rate = self._learning_rate(progress.step)
            result = self.engine.step(rate)
            progress.step += 1
            progress.samples += options.global_batch_size
            progress.tokens += int(tokens)
            nan_steps = 0 if result.applied else nan_steps + 1
            progress.skipped_steps += not result.applied
            logs = progress.step % options.log_interval == 0 or progress.step in (1, self.total_steps)
            if logs:
                progress.last_loss, *metrics = (x * scale for x in self.processes.sum(sums.tolist()))
            seconds = time.monotonic() - started
            started += seconds
            progress.seconds += seconds
            flops = self._flops(tokens=tokens, labels=labels, attention_pairs=pairs)
            self.speed.add(tokens, flops, seconds)
            if logs:
                named = dict(zip(self.stage.metrics, metrics, strict=True))
                self._log(rate, result.grad_norm, tokens / seconds, flops / seconds, named)
            if nan_steps >= options.max_nan_steps:
                self._abort_on_nan(nan_steps)
            if options.save_interval and progress.step % options.save_interval == 0 < self.total_steps - progress.step:
                self.save()
                started = time.monotonic()

    def _validation_is_due(self) -> bool:
        """Between two steps; also where a run goes on that was stopped just before it."""
        step, interval = self.progress.step, self.options.eval_interval
        return bool(interval) and step > 0 and step % interval == 0 and self.progress.validated_step != step

    def _leave_if_asked(self, stop: GracefulStop) -> None:
        if any(self.processes.sum([float(stop.asked)])):
            self._leave(stop)

    def _leave(self, stop: GracefulStop) -> None:
        self.save()
        again = self.run_folder.same_command
        self.run_folder.say(f"stopped at step {self.progress.step}; {again} goes on from here")
        raise SystemExit(128 + (stop.signal_number or signal.SIGTERM))  # or another rank was asked

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            self.total_steps,
            peak=self.options.learning_rate,
            schedule=self.options.schedule,
            warmup_ratio=self.options.warmup_ratio,
            min_ratio=self.options.min_lr_ratio,
        )

    def _flops(self, **counts: float) -> float:
        return training_flops(self.network.config, adapter_weights=self.adapter_weights, **counts)

    def _step_batches(self) -> Iterator[list[Batch]]:
        return self.stage.step_batches(
            self.data,
            self.options,
            micro_batch_size=self.micro_batch,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            start_sample=self.progress.samples,
        )

    def tensors(self, batch: Batch) -> dict[str, torch.Tensor]:
        """A batch on the device, with what the attention backend needs."""
        return to_tensors(batch, self.processes.device, self.network.attention_backend)

    def _log(
        self,
        rate: float,
        grad_norm: float,
        tokens_per_second: float,
        flops_per_second: float,
        metrics: dict[str, float],
    ) -> None:
        peak = self.run_folder.peak.flops * self.processes.world_size
        record = {
            "kind": "train",
            "loss": self.progress.last_loss,
            **metrics,
            "lr": rate,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens_per_second,
            "mfu": flops_per_second / peak,
            "memory_gb": _memory_gb(self.processes.device),
            "seconds": self.progress.seconds,
            "tokens": self.progress.tokens,
        }
        if self.progress.skipped_steps:
            record["skipped_steps"] = self.progress.skipped_steps
        self.run_folder.log(self.progress.step, record)

    def _abort_on_nan(self, steps: int) -> None:
        raise UserError(
            f"the loss or a gradient was NaN or infinite in {steps} steps in a row (now at step {self.progress.step}); "
            "lower --learning_rate, or look at the data with `minigpt data inspect`; the last checkpoint is untouched"
        )

    def validate(self) -> None:
        """The stage's judgement on the validation split, and the tasks of `--eval_tasks`."""
        self.progress.validated_step, self.progress.validation = self.progress.step, {}
        result = self.stage.validate(self) if self.valid is not None else {}
        if result:
            self.progress.validation = result
            self.run_folder.log(self.progress.step, {"kind": "valid", **result, "tokens": self.progress.tokens})
        if self.tasks is not None:
            self._run_tasks(self.tasks)

    def _run_tasks(self, tasks: TrainingTasks) -> None:
        """Rank 0 judges a plain copy of the weights, the others wait; what is trained does not notice."""
        weights = {name.removeprefix("model."): w for name, w in self.engine.master_weights().items()}
        reached = False
        if self.processes.rank == 0:
            device = self.processes.device
            dtype = torch.float32 if device.type == "cpu" else self.engine.dtype
            plain = self.stage.language_model(self.network, weights)
            result = tasks.run(self.network.config, plain, device, dtype)
            self.run_folder.log(self.progress.step, {"kind": "eval", **result, "tokens": self.progress.tokens})
            reached = self._is_reached(result)
        self.progress.goal_reached = self.processes.broadcast(reached)

    def _is_reached(self, result: dict[str, float]) -> bool:
        """Whether `stop_when` ends the run here."""
        if self.options.goal is None:
            return False
        metric, value = self.options.goal
        if metric not in result:
            raise UserError(f"--stop_when names {metric!r}; the tasks measure {', '.join(result) or 'nothing'}")
        if reached := result[metric] >= value:
            self.run_folder.say(f"{self.options.stop_when} is reached at step {self.progress.step}")
        return reached

    def save(self) -> None:
        """Write a checkpoint of this moment, unless there is one."""
        if self.saved_step == self.progress.step:
            return
        state = {
            "step": self.progress.step,
            "progress": self.progress.to_dict(),
            **self.run_folder.identity(self.data, self.network),
            **self._engine_identity(),
        }
        checkpoint.save(self.engine, self.run_folder.folder, state, self.options.keep_checkpoints)
        self.saved_step = self.progress.step

    def _engine_identity(self) -> dict[str, Any]:
        """What decides the layout of the engine's part of a checkpoint."""
        return {
            "zero_stage": self.engine.zero_stage,
            "precision": str(self.engine.dtype).removeprefix("torch."),
            "optimizer": self.engine.optimizer_name,
            "trained_layout": self.trained_layout,
            "frozen_hash": self.engine.frozen_hash,
            "reference_hash": self.stage.reference_hash,
        }

    def _finish(self, result: dict[str, float]) -> dict[str, Any]:
        weights = {name.removeprefix("model."): w for name, w in self.engine.master_weights().items()}
        extra = {
            "steps": self.progress.step,
            "tokens": self.progress.tokens,
            "loss": self.progress.last_loss,
            **result,
            "bits_per_byte": result.get("valid_bits_per_byte"),
            "tokens_per_second": self.speed.per_second(self.speed.tokens),
            "mfu": self.speed.per_second(self.speed.flops) / (self.run_folder.peak.flops * self.processes.world_size),
            "seconds": self.progress.seconds,
            "skipped_steps": self.progress.skipped_steps,
            "zero_stage": self.engine.zero_stage,
            "init": self.origin,
            "parameters": self.parameters,
        }
        summary = self.run_folder.finish(self.stage, self.options, self.network, weights, self.data, extra)
        self.processes.barrier()
        self.engine.close()
        return summary

    def _description(self, dtype: torch.dtype) -> str:
        o = self.options
        steps = f"{self.total_steps:,} steps = {self.total_steps * o.global_batch_size / len(self.data):.2f} epochs"
        kind = str(dtype).removeprefix("torch.")
        compiled = ", compiled" if self.engine.compiled else ""
        size = f"{self.parameters / 1e6:.2f}M parameters ({self.origin})"
        how = f"{kind}{compiled}, {self.engine.optimizer_name}, ZeRO stage {self.engine.zero_stage}"
        return f"{size}; {self.stage.batch_description(self)}; {steps}; {how}"


def total_steps(options: TrainOptions, rows: int, done: _Progress | None = None) -> int:
    """Optimizer steps of the whole run; what is done may have been done in steps of another size."""
    if options.max_steps:
        return options.max_steps
    step, samples = (0, 0) if done is None else (done.step, done.samples)
    return max(1, step + math.ceil((options.epochs * rows - samples) / options.global_batch_size))


def to_tensors(batch: Batch, device: torch.device, attention_backend: str | None = None) -> dict[str, torch.Tensor]:
    """A collated batch as tensors on the device; copies from pinned memory do not wait."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    if attention_backend == "varlen":
        tensors["cu_seqlens"] = _fixed_boundaries(batch["document_ids"])
    if device.type == "cuda":
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in tensors.items()}
    return tensors


def _fixed_boundaries(document_ids_BT: np.ndarray) -> torch.Tensor:
    """Document boundaries in the flattened batch, int32; padded with B·T to one of few lengths for compiled graphs.

    Not to one length for all batches: a kernel starts blocks for every document that there could be.
    """
    size = document_ids_BT.size
    starts = np.ones(document_ids_BT.shape, dtype=bool)
    starts[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    positions = np.flatnonzero(starts)
    room = (1 << max(6, (len(positions) - 1).bit_length())) + 1
    return torch.from_numpy(np.pad(positions, (0, room - len(positions)), constant_values=size).astype(np.int32))


def _prefetch(
    steps: Iterator[list[Batch]],
    to_tensors: Callable[[Batch], dict[str, torch.Tensor]],
    statistics: Callable[[Batch], TokenStatistics],
) -> Iterator[tuple[list[dict[str, torch.Tensor]], list[float]]]:
    """Tensors and statistics (weight, tokens, labels, attention pairs) of a step, the next one made meanwhile."""

    def prepare() -> tuple[list[dict[str, torch.Tensor]], list[float]]:
        window = next(steps)
        counts = [statistics(batch) for batch in window]
        totals = [(c.label_weight, c.tokens, c.labels, c.attention_pairs) for c in counts]
        return [to_tensors(batch) for batch in window], [float(sum(t)) for t in zip(*totals, strict=True)]

    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = pool.submit(prepare)
        while True:
            ready = coming.result()
            coming = pool.submit(prepare)
            yield ready


def _memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class GracefulStop:
    """SIGTERM and Ctrl-C end the run after the current step, with a checkpoint; the same once more ends it at once.

    (The same: at a Ctrl-C under the launcher a process gets the terminal's SIGINT and the launcher's SIGTERM.)
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._previous: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.signal_number != 0

    def __enter__(self) -> GracefulStop:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever runs us there decides about signals
                break
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            if number == self.signal_number:
                os._exit(128 + number)
            return
        self.signal_number = number
        print("stopping after this step (once more: at once)", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
