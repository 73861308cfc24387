"""The run folder: what is in it, when a run may go on in it, and what is written at the end."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minigpt.dataset.shards import PackedDataset, write_atomically
from minigpt.errors import UserError
from minigpt.observe.hardware import Peak, describe_hardware, package_version, peak_flops, source_commit
from minigpt.observe.metrics import METRICS_FILE, RunLogger, truncate_metrics

from .engine import Processes
from .options import TrainOptions
from .stage import Stage

SUMMARY = "summary.json"
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "pyarrow")
OURS = (
    *("checkpoints", "metrics.jsonl", "tensorboard", "config.yaml", SUMMARY, "hf", "report", "report.md"),
    "critic",  # of reinforcement learning
    *("adapter", "eval"),  # of LoRA, and what other commands found about the weights
)

SIGNS = (SUMMARY, "metrics.jsonl", "checkpoints")  # one of which every run has from its first step on

# Options that may differ when a run goes on: they change how fast or how far it runs, not what a step computes.
FREE_TO_CHANGE = {
    "save_dir", "data", "resume", "overwrite", "threads", "log_interval", "tensorboard", "recipe",
    "save_interval", "keep_checkpoints", "eval_interval", "eval_rows", "eval_tasks", "eval_limit",
    "eval_thinking", "stop_when",
    "export_dtype", "micro_batch_size",
}  # fmt: skip
LENGTH = {"max_steps", "epochs"}  # free as well, unless the learning rate's schedule is as long as the run


class Run:
    """A run folder seen by one process. Only rank 0 writes; the others call the same methods and do nothing."""

    def __init__(self, stage: str, options: TrainOptions, processes: Processes) -> None:
        self.stage, self.options, self.processes = stage, options, processes
        self.folder = Path(options.save_dir)
        self.first = processes.rank == 0
        self.peak = Peak(math.nan, "not measured")
        self._logger: RunLogger | None = None
        self._cleared = False

    def say(self, text: str) -> None:
        """A sentence for the person who watches."""
        if not self.first:
            return
        if self._logger is not None:
            self._logger.message(text)
        else:
            print(text, flush=True)

    @property
    def same_command(self) -> str:
        """What a person enters again to go on."""
        return same_command(self.options)

    def finished_summary(self) -> dict[str, Any] | None:
        """The summary of a run that is done, after saying so; None when there is something to train."""
        path = self.folder / SUMMARY
        if self.options.overwrite or not path.exists():
            return None
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{path} is damaged; --overwrite trains this run again") from None
        if summary.get("stage") != self.stage:
            raise UserError(
                f"{self.folder} holds a finished {summary.get('stage')} run; give another --save_dir, or --overwrite"
            )
        loss = "" if summary["loss"] is None else f", loss: {summary['loss']:.4f}"  # rewards may have taught nothing
        self.say(
            f"{self.folder} is a finished {self.stage} run of {summary['steps']} steps{loss}; nothing to do "
            "(--overwrite trains it again)"
        )
        return summary

    def open(self) -> None:
        """Make the folder.

        Errors: UserError when it cannot be made, or what is in it should not be overwritten.
        """
        if not self.first:
            return
        if self.options.overwrite:
            self._check_overwrite()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save_dir {self.folder} cannot be made ({error.strerror})") from error

    def _check_overwrite(self) -> None:
        init = None if self.options.init is None else self.options.init.resolve()
        if init is not None and init.is_relative_to(self.folder.resolve()):
            raise UserError("--overwrite would delete the weights that --init names; give another --save_dir")
        if any(path.exists() for path in self._ours()) and not any((self.folder / name).exists() for name in SIGNS):
            raise UserError(
                f"{self.folder} holds no run that --overwrite could replace, and --overwrite would delete files there; "
                "give another --save_dir"
            )

    def _ours(self) -> list[Path]:
        return [*(self.folder / name for name in OURS), *self.folder.glob("*.pth")]

    def clear(self) -> None:
        """Empty the folder of an earlier run if that was asked for, once; the last thing before anything is written."""
        if self.first and self.options.overwrite and not self._cleared:
            for path in self._ours():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        self._cleared = True
        self.processes.barrier()

    def identity(self, data: PackedDataset, network: Any) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued, and what it was made with."""
        return {
            "stage": self.stage,
            "fingerprint": data.fingerprint,
            "tokenizer_hash": data.tokenizer_hash,
            "model": network.config.to_dict(),
            "options": json.loads(json.dumps(asdict(self.options), default=str)),
            "versions": {name: package_version(name) for name in PACKAGES},
        }

    def check_resumable(self, state: dict[str, Any], data: PackedDataset, network: Any, engine: dict[str, Any]) -> None:
        """Refuse to go on with something else than what the checkpoint was made from; name changed options.

        Args:
            state: The checkpoint's.
            data: What is trained on now.
            network: What is trained now.
            engine: ZeRO stage, precision and optimizer of now.
        """
        now = self.identity(data, network)
        remedy = "start anew with --overwrite, or give another --save_dir"
        for key, what in (
            ("stage", "stage"),
            ("tokenizer_hash", "tokenizer"),
            ("fingerprint", "dataset"),
            ("model", "model shape"),
        ):
            if state[key] != now[key]:
                raise UserError(f"the checkpoint in {self.folder} was made with another {what}; {remedy}")
        for key, what in (("zero_stage", "ZeRO stage"), ("precision", "precision"), ("optimizer", "optimizer")):
            if state[key] != engine[key]:
                raise UserError(
                    f"the checkpoint in {self.folder} was made with {what} {state[key]}, now it is {engine[key]}; "
                    f"take the same, or {remedy}"
                )
        if state.get("trained_layout", engine["trained_layout"]) != engine["trained_layout"]:
            raise UserError(
                f"the checkpoint in {self.folder} trains other weights than these options: take the --lora_rank, "
                f"--lora_targets and --lora_dora that it was made with, or {remedy}"
            )
        if state.get("frozen_hash") != engine["frozen_hash"]:
            raise UserError(
                f"the checkpoint in {self.folder} belongs to other frozen weights than those that --init gives now; "
                f"give the --init that it was made with, or {remedy}"
            )
        if state.get("reference_hash", engine.get("reference_hash")) != engine.get("reference_hash"):
            raise UserError(
                f"the checkpoint in {self.folder} was trained against other weights than those that --init gives now; "
                f"give the --init that it was made with, or {remedy}"
            )
        changed = {k: (state["options"].get(k), v) for k, v in now["options"].items() if state["options"].get(k) != v}
        scheduled = self.options.schedule != "constant" or self.options.warmup_ratio > 0
        for key, (old, new) in changed.items():
            if key not in FREE_TO_CHANGE and (key not in LENGTH or scheduled):
                follows = "; the learning rate follows the new length" if key in LENGTH else ""
                self.say(f"--{key} was {old} before the interruption and is {new} now; going on with {new}{follows}")

    def start(
        self,
        description: str,
        total_steps: int,
        step: int,
        device: torch.device | None,
        dtype: torch.dtype,
        judged: bool = True,
    ) -> None:
        """Write config.yaml, measure the machine, open the metrics and say what will run.

        `judged`: whether the weights of `step`, where it goes on, have been validated. Without a `device` nothing is
        measured: what trains is elsewhere.
        """
        if not self.first:
            return
        import yaml

        options = json.loads(json.dumps(asdict(self.options), default=str))
        write_text(self.folder / "config.yaml", yaml.safe_dump({"stage": self.stage, **options}, sort_keys=False))
        if device is not None:
            with torch.random.fork_rng():  # measuring draws random numbers, and a resumed run's were restored already
                self.peak = peak_flops(device, dtype)
        print(f"{self.stage}: {description}", flush=True)
        truncate_metrics(self.folder / METRICS_FILE, step, judged)
        self._logger = RunLogger(
            self.folder,
            title=self.stage,
            total_steps=total_steps,
            start_step=step,
            tensorboard=self.options.tensorboard,
        )

    def log(self, step: int, record: dict[str, Any]) -> None:
        if self._logger is not None:
            self._logger.log(step, record)

    def pause(self) -> None:
        """Close the progress display; what was logged is on disk already.

        That what reads our output went away is not said here: it would take the place of what ended the run.
        """
        if self._logger is not None:
            with suppress(OSError, SystemExit):  # which rich makes of a broken pipe
                self._logger.close()

    def finish(
        self,
        stage: Stage,
        options: TrainOptions,
        network: Any,
        weights: dict[str, torch.Tensor],
        data: PackedDataset,
        results: dict[str, Any],
    ) -> dict[str, Any]:
        """Write what the stage leaves and, last of all, the summary."""
        summary = {
            "stage": stage.name,
            "recipe": options.recipe,
            **results,
            "vocab_size": network.config.vocab_size,
            "global_batch_size": options.global_batch_size,
            "seq_len": data.seq_len,
            "fingerprint": data.fingerprint,
            "mfu_peak": self.peak.source,
            "hardware": describe_hardware(),
            "versions": {name: package_version(name) for name in PACKAGES},
            "commit": source_commit(),
        }
        if not self.first:
            return summary
        with writing_results(self.folder, options):
            written = stage.write_weights(self.folder, network, weights, data.folder, options)
            write_text(self.folder / SUMMARY, json.dumps(summary, indent=2, default=str) + "\n")
        self.say(f"{stage.name}: final loss: {results['loss']:.4f}  →  {'  and  '.join(map(str, written))}")
        return summary


def same_command(options: Any) -> str:
    """What a person enters again to go on with a run of these options, of whichever stage."""
    if options.overwrite:
        return "the same command without --overwrite"
    return f"the same command{' without --resume never' * (options.resume == 'never')}"


@contextmanager
def writing_results(folder: Path, options: Any) -> Iterator[None]:
    """Errors: UserError when what a finished run leaves in its folder cannot be written, as on a full disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(
            f"the weights could not be written to {folder} ({str(error).splitlines()[0]}); the last checkpoint is "
            f"whole: free some space and run {same_command(options)} again"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or as it was, also after a power cut."""
    write_atomically(path, text.encode())
