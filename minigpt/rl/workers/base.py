"""What all workers share: what they know of the run, threads, device, precision, and their way into a broadcast."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import ray
import torch

from minigpt.errors import UserError
from minigpt.model.attention import choose_backend
from minigpt.model.model_minigpt import MiniGPTConfig
from minigpt.trainer.adapters import LoRAOptions
from minigpt.trainer.engine import Processes
from minigpt.trainer.flops import training_flops
from minigpt.trainer.loop import to_tensors
from minigpt.trainer.reference_log_probs import weights_hash
from minigpt.trainer.setup import compile_wanted, compute_dtype, configure_torch
from minigpt.trainer.sleep import Sleeper

from ..batch import MicroBatch
from ..options import RLOptions
from ..publish import Entry, data_bytes
from ..transport import Backend, WeightGroup, limit_within

P = ParamSpec("P")
T = TypeVar("T")
CPU_TOKENS, GPU_TOKENS = 2048, 32768  # of a forward pass, unless the options say otherwise


@dataclass
class Timed(Generic[T]):
    """What a worker returns, and how long it computed."""

    value: T
    seconds: float


def timed(method: Callable[P, T]) -> Callable[P, Timed[T]]:
    """A worker's method that says how long it computed."""

    @wraps(method)
    def run(*arguments: P.args, **named: P.kwargs) -> Timed[T]:
        started = time.perf_counter()
        value = method(*arguments, **named)
        return Timed(value, time.perf_counter() - started)

    return run


@dataclass(frozen=True)
class Job:
    """What every worker knows of the run.

    Attributes:
        options: Of the run.
        init: The folder that the policy starts from.
        row_length: T of packed rows.
        longest: Tokens of the longest sequence there can be; at most T.
        stop_ids: What ends an answer.
        tokenizer: Folder of the tokenizer.
        name: grpo or ppo.
        config: The policy's shape.
    """

    options: RLOptions
    init: Path
    row_length: int
    longest: int
    stop_ids: tuple[int, ...]
    tokenizer: Path
    name: str
    config: MiniGPTConfig

    @property
    def torch_options(self) -> LoRAOptions:
        """The fields of a training run that mean the same here."""
        o = self.options
        return LoRAOptions(
            save_dir=o.save_dir,
            init=self.init,
            dtype=o.dtype,
            compile=o.compile,
            optimizer=o.optimizer,
            seed=o.seed,
            threads=o.threads,
            export_dtype=o.export_dtype,
            lora_rank=o.lora_rank,
            lora_alpha=o.lora_alpha,
            lora_targets=o.lora_targets,
        )


def loaded(load: Callable[[Path], T], folder: Path) -> T:
    """A model from its folder. Errors: UserError, also for the sentences about damaged files, which are ValueErrors."""
    try:
        return load(folder)
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


class Worker:
    """What all workers share: threads, device, precision, and how a batch becomes forward passes."""

    network: Any
    _transport: WeightGroup | None = None

    def __init__(self, rank: int, world_size: int, threads: int, job: Job) -> None:
        self.rank, self.world_size, self.job = rank, world_size, job
        self.threads = threads or job.options.threads
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def ping(self) -> str:
        """Answers once the worker is there: the node it is on."""
        return ray.util.get_node_ip_address()

    def sleep(self) -> None:
        """Leave the device to others until `wake`: memory goes to the CPU's."""
        self._sleeper.sleep((*self.network.parameters(), *self.network.buffers()))

    def wake(self) -> None:
        """Undo `sleep`; a no-op when awake."""
        self._sleeper.wake()

    def gpu(self) -> str | None:
        """A name that only the GPU of this worker has; None without one."""
        if self.device.type != "cuda":
            return None
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def join_transport(
        self,
        backend: Backend,
        address: tuple[str, int],
        rank: int,
        size: int,
        plan: Sequence[Sequence[Entry]] = (),
    ) -> str | None:
        """Become a member of the group that weights are broadcast in; what went wrong, if anything did.

        Args:
            backend, address, rank, size: See `WeightGroup`.
            plan: What will come in each bucket, for who receives.
        """
        self._leave_transport()
        self._plan = plan
        try:
            self._transport = WeightGroup(backend, address, rank, size, limit_within(self.job.options.timeout))
            largest = max(map(data_bytes, plan), default=0)
            self._received = torch.empty(largest, dtype=torch.uint8, device=self._transport.device)
        except RuntimeError as error:  # among them: no memory left
            self._leave_transport()
            return first_line(error)
        return None

    def _leave_transport(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._transport = None

    def _configure(self, processes: Processes) -> None:
        options = self.job.torch_options
        options.threads = self.threads
        configure_torch(options, processes)
        self.device = processes.device
        self.dtype = compute_dtype(options, self.device)
        self._sleeper = Sleeper(self.device)

    def _alone(self) -> None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._configure(Processes(0, 0, 1, device))

    def _identity(self) -> dict[str, str] | None:
        """The hash of the float32 weights as they were loaded, for checkpoints; one worker's is enough."""
        return {"hash": weights_hash(self.network.state_dict())} if self.rank == 0 else None

    def _compiles(self, network: Any) -> bool:
        """Whether the run is long enough for this rank's share of it to be worth compiling."""
        o = self.job.options
        tokens = o.max_steps * o.update_epochs * o.answers_per_step * self.job.row_length / 2 / self.world_size
        flops = training_flops(network.config, tokens=tokens, labels=tokens, attention_pairs=0)
        return compile_wanted(self.job.torch_options, self.device, flops)

    @property
    def _rows(self) -> int:
        """Rows of a pass: a step's rows, if all answers are as long as can be, in passes of equal size."""
        job, o = self.job, self.job.options
        budget = o.micro_batch_tokens or (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS)
        sequences = -(-o.answers_per_step // (o.minibatches * self.world_size))
        rows = -(-sequences // (job.row_length // job.longest))
        passes = -(-rows * job.row_length // budget)
        return max(1, min(-(-rows // passes), budget // job.row_length))

    @property
    def _backend(self) -> str:
        return choose_backend(self.device, self.job.row_length, self.dtype)

    def _tensors(self, part: MicroBatch, network: Any, names: Sequence[str]) -> dict[str, torch.Tensor]:
        arrays = {name: part.arrays[name] for name in ("input_ids", "position_ids", "document_ids", *names)}
        return to_tensors(arrays, self.device, network.attention_backend)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
