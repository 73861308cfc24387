"""The Ray actors: policy, critic, reference, reward model, rollout.

Plain classes: the controller wraps them (`group.py`), tests may call them without Ray. What they are handed by Ray is
shared, read-only memory; nothing here writes into it. Batches come whole and every rank takes its own part, which it
computes from the batch alone, so nothing has to be scattered and put back in order.

Every method that computes returns the seconds that it computed for, so that the controller can tell what Ray costs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np
import ray
import torch

from minigpt.errors import UserError
from minigpt.generation.decoder import PREPARED_BYTES
from minigpt.generation.engine import Engine as GenerationEngine
from minigpt.generation.engine import cache_bytes
from minigpt.model.attention import choose_backend
from minigpt.model.model_critic import RewardModel, ValueModel
from minigpt.model.model_lora import adapters_off
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.trainer import checkpoint
from minigpt.trainer.adapters import AdapterStage, LoRAOptions
from minigpt.trainer.engine import Engine, Processes, init_processes
from minigpt.trainer.flops import training_flops
from minigpt.trainer.loop import to_tensors
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.reference_log_probs import weights_hash
from minigpt.trainer.run import writing_results
from minigpt.trainer.setup import compile_wanted, compute_dtype, configure_torch, load_masters
from minigpt.trainer.sleep import Sleeper
from minigpt.trainer.stage import StageModule, trained_layout

from .algorithms import token_weights
from .batch import MicroBatch, RolloutBatch, micro_batches, pack_rows, partition, restore
from .group import join_environment, own_address
from .losses import PolicyLossTerms, policy_objective, value_objective
from .options import PPOOptions, RLOptions
from .publish import (
    VERSIONS_KEPT,
    Bucket,
    Entry,
    Pieces,
    Published,
    bucket_plan,
    copy_into,
    data_bytes,
    is_of_adapter,
    slices,
    split,
    tensors_in,
    unpack,
    weight_buckets,
)
from .request import PromptRequest
from .transport import Backend, WeightGroup

P = ParamSpec("P")
T = TypeVar("T")
CPU_TOKENS, GPU_TOKENS = 2048, 32768  # of a forward pass, unless the options say otherwise
CACHE_SHARE = 0.5  # of a GPU's free memory: while a sampler's cache grows, the old one is there as well


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


def _loaded(load: Callable[[Path], T], folder: Path) -> T:
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
            self._transport = WeightGroup(backend, address, rank, size)
            largest = max(map(data_bytes, plan), default=0)
            self._received = torch.empty(largest, dtype=torch.uint8, device=self._transport.device)
        except RuntimeError as error:  # among them: no memory left
            self._leave_transport()
            return _first_line(error)
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


@dataclass
class _Window:
    """One optimizer step of one rank."""

    mine: RolloutBatch
    part: np.ndarray  # the sequences of the batch that are mine
    chosen: np.ndarray  # those of all ranks
    passes: list[MicroBatch]


class TrainedWorker(Worker):
    """A rank of a DeepSpeed engine: what policy and critic share."""

    engine: Engine

    def address(self) -> tuple[str, int]:
        """Where the ranks meet; asked of rank 0."""
        return own_address()

    def _join(self, address: tuple[str, int] | None) -> Processes:
        join_environment(self.rank, self.world_size, address)
        processes = init_processes()
        self._configure(processes)
        return processes

    def _make_engine(self, network: Any, loss: Callable[..., Any], processes: Processes, rate: float) -> None:
        o = self.job.options
        self.network = network
        # now: ZeRO stage 3 will take the shapes apart
        self.trained_layout, self.parameters = trained_layout(network), network.num_parameters()
        self.engine = Engine(
            StageModule(network, loss),
            processes,
            dtype=self.dtype,
            learning_rate=rate,
            optimizer_name=o.optimizer,
            betas=(o.beta1, o.beta2),
            weight_decay=o.weight_decay,
            grad_clip=o.grad_clip,
            config=o.deepspeed,
            compile=self._compiles(network),
        )
        network.attention_backend = self._backend
        network.model.gradient_checkpointing = o.gradient_checkpointing

    def describe(self) -> dict[str, Any]:
        """For the line at the start of a run, and for checkpoints."""
        return {
            "precision": str(self.dtype).removeprefix("torch."),
            "compiled": self.engine.compiled,
            "zero_stage": self.engine.zero_stage,
            "optimizer": self.engine.optimizer_name,
            "parameters": self.parameters,
            "rows": self._rows,
            "device": str(self.device),
            "frozen_hash": self.engine.frozen_hash,
            "trained_layout": self.trained_layout,
        }

    def sleep(self) -> None:
        """Leave the device to others until `wake`: the whole engine goes to the CPU's memory."""
        self.engine.sleep()

    def wake(self) -> None:
        """Be as before `sleep`."""
        self.engine.wake()

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """A checkpoint in `folder`/checkpoints; all ranks call it."""
        checkpoint.save(self.engine, folder, state, self.job.options.keep_checkpoints)

    def load(self, folder: Path) -> None:
        """Go on from a verified checkpoint; all ranks call it."""
        checkpoint.load(self.engine, folder)

    def _windows(self, batch: RolloutBatch, columns: dict[str, np.ndarray]) -> list[_Window]:
        """The batch cut into optimizer steps, ranks and passes, always in the same way.

        Every rank makes equally many passes, empty ones at the end if need be: under ZeRO they communicate in each.
        Of fewer sequences than `minibatches` each is a step of its own: one on nothing would be the momentum's.
        """
        found = []
        whole = RolloutBatch(**{**batch.__dict__, "columns": columns})
        for chosen in np.array_split(np.arange(len(batch)), min(self.job.options.minibatches, len(batch))):
            lengths = batch.lengths[chosen]
            parts = [chosen[part] for part in partition(lengths, self.world_size)]
            rows = [len(pack_rows(batch.lengths[part], self.job.row_length)) for part in parts]
            part = parts[self.rank]
            mine = whole.take(part)
            passes = micro_batches(
                mine,
                self.job.row_length,
                self._rows,
                mine.columns,
                fixed_shape=self.engine.compiled,
                at_least=-(-max(rows) // self._rows),
            )
            found.append(_Window(mine, part, chosen, passes))
        return found

    def _gather(self, batch: RolloutBatch, windows: list[_Window], values: list[np.ndarray]) -> np.ndarray:
        """What each rank found for its answer tokens, on all ranks for the whole batch, float32 [A]."""
        whole = restore([window.part for window in windows], values, batch.answer_lens)
        return self._sum_arrays(whole)

    def _sum_arrays(self, array: np.ndarray) -> np.ndarray:
        if self.world_size == 1:
            return array
        tensor = torch.from_numpy(array).to(self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    def _run_passes(
        self,
        batch: RolloutBatch,
        columns: dict[str, np.ndarray],
        names: Sequence[str],
        run: Callable[..., np.ndarray],
        width: int = 1,
    ) -> np.ndarray:
        """What `run`, which returns [B·T] or [B·T, width], finds at the answer tokens; on all ranks the same."""
        windows = self._windows(batch, columns)
        values = []
        for window in windows:
            tokens = len(window.mine.behaviour_log_probs)
            found = np.zeros((tokens, width) if width > 1 else tokens, dtype=np.float32)
            for one in window.passes:
                found[one.answer_tokens] = run(self._tensors(one, self.network, names))[one.positions]
            values.append(found)
        return self._gather(batch, windows, values)


class PolicyStage(AdapterStage):
    """What the policy is (all weights, or an adapter) and what it leaves in the run folder."""

    def __init__(self, name: str) -> None:
        self.name = self.weights = name


class PolicyWorker(TrainedWorker):
    """The model that learns."""

    def setup(self, address: tuple[str, int] | None) -> dict[str, Any]:
        """Load the weights and make the engine; all ranks call it."""
        job, o = self.job, self.job.options
        processes = self._join(address)
        self.stage = PolicyStage(job.name)
        network = self.stage.network(_loaded(load_masters, job.init), job.torch_options)
        self.terms = PolicyLossTerms(
            objective=o.objective,
            clip_low=o.clip_low,
            clip_high=o.clip_high,
            dual_clip=o.dual_clip,
            temperature=o.temperature,
            entropy_coefficient=o.entropy_coefficient,
            behaviour_cap=o.behaviour_cap if o.corrects_behaviour else None,
            max_sequences=o.answers_per_step,
        )
        self._make_engine(network, policy_objective(self.terms), processes, o.learning_rate)
        self._sent: dict[int, list[torch.Tensor]] = {}  # versions that were broadcast, by bucket
        self._memory: dict[torch.device, torch.Tensor] = {}  # a staging buffer on each device
        return self.describe()

    def _host_memory(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type != "cpu")

    def log_probs(self, batch: RolloutBatch) -> Timed[np.ndarray]:
        """log π of every answer token by the graph that is trained, float32 [A]; all ranks call it."""
        return self._by_forward_pass(batch, self.engine.training_forward)

    def reference_log_probs(self, batch: RolloutBatch) -> Timed[np.ndarray]:
        """log π_ref of every answer token, where the reference is the policy with its adapter off."""
        with adapters_off(self.network):
            return self._by_forward_pass(batch, self.engine.evaluate)

    @timed
    def _by_forward_pass(self, batch: RolloutBatch, forward: Callable[..., torch.Tensor]) -> np.ndarray:
        names = [*self._columns(batch), "old_log_probs"]  # what an update takes, so that its compiled graph fits
        zeros = {name: np.zeros_like(batch.behaviour_log_probs) for name in names}
        coefficient = torch.zeros((), device=self.device)

        def run(tensors: dict[str, torch.Tensor]) -> np.ndarray:
            output = forward({**tensors, "kl_coefficient": coefficient})
            return output[1 + len(self.terms.metrics) :].float().cpu().numpy()

        found = self._run_passes(batch, zeros, ["labels", "sequence_ids", *zeros], run)
        return found

    def _columns(self, batch: RolloutBatch) -> list[str]:
        """What the loss takes besides the tokens, in the batch's columns or made for it."""
        optional = [name for name in ("ref_log_probs", "old_log_probs") if name in batch.columns]
        if self.job.options.kl_in == "reward" and "ref_log_probs" in optional:
            optional.remove("ref_log_probs")
        behaviour = [] if self.terms.behaviour_cap is None else ["behaviour_log_probs"]
        return ["weights", "advantages", *behaviour, *optional]

    @timed
    def update(self, batch: RolloutBatch, learning_rate: float, kl_coefficient: float) -> dict[str, float]:
        """Learn from a batch with `advantages` (and `ref_log_probs`, `old_log_probs`); all ranks call it.

        Without `old_log_probs` they are the log-probabilities of the one update itself: its ratio is exactly 1.
        """
        o = self.job.options
        columns = {
            **{name: batch.columns[name] for name in self._columns(batch) if name in batch.columns},
            "behaviour_log_probs": batch.behaviour_log_probs,
            "weights": np.zeros_like(batch.behaviour_log_probs),
        }
        windows = self._windows(batch, columns)
        if not o.pays_for_more_than_rewards:  # a step without any advantage would be the momentum's alone
            windows = [window for window in windows if batch.take(window.chosen).columns["advantages"].any()]
        names = ["labels", "sequence_ids", *self._columns(batch)]
        coefficient = torch.tensor(kl_coefficient, device=self.device)
        sums = torch.zeros(1 + len(self.terms.metrics), device=self.device)
        norms, skipped, gaps = [], 0, _Gap()
        optimizer_steps = labels = 0.0
        for epoch in range(o.update_epochs):
            order = np.random.default_rng([o.seed, int(batch.sample_ids[0]), epoch]).permutation(len(windows))
            for window in (windows[i] for i in order):
                denominator = self._weigh(window)
                labels += float(window.mine.answer_lens.sum())
                optimizer_steps += 1
                scale = 1.0 / denominator if denominator else 0.0
                for one in window.passes:
                    tensors = self._tensors(one, self.network, names)
                    tensors["kl_coefficient"] = coefficient
                    output = self.engine.forward_backward(tensors, scale)
                    sums[0] += output[0] * scale
                    sums[1:] += output[1 : len(sums)]
                    if epoch == 0:
                        drawn = window.mine.behaviour_log_probs[one.answer_tokens]
                        gaps.add(output[len(sums) :].float().cpu().numpy()[one.positions] - drawn)
                result = self.engine.step(learning_rate)
                norms.append(result.grad_norm)
                skipped += not result.applied
        loss, *metrics, labels, gap_sum, gap_n = self.engine.processes.sum(
            [*sums.tolist(), labels, gaps.total, float(gaps.count)]
        )
        found = {"loss": loss / optimizer_steps}
        found |= {name: x / max(1.0, labels) for name, x in zip(self.terms.metrics, metrics, strict=True)}
        if "ref_log_probs" not in self._columns(batch):
            del found["kl"]  # nothing was compared
        found |= {
            "grad_norm": float(np.mean(norms)),
            "skipped": float(skipped),
            "trained_tokens": labels,
            "sampler_gap_mean": gap_sum / max(1.0, gap_n),
            "sampler_gap_max": self._max_over_ranks(gaps.largest),
        }
        return found

    def _max_over_ranks(self, value: float) -> float:
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return float(tensor)

    def _weigh(self, window: _Window) -> float:
        """Put the weight of every answer token into the passes; returns the denominator of all ranks."""
        o, mine = self.job.options, window.mine
        ids = torch.from_numpy(mine.spread(np.arange(len(mine))))
        weights, denominator = token_weights(
            torch.ones(len(ids), dtype=torch.bool), ids, len(mine), o.aggregation, o.max_new_tokens
        )
        for one in window.passes:
            one.arrays["weights"] = one.arrays["weights"].copy()
            one.arrays["weights"].reshape(-1)[one.positions] = weights.numpy()[one.answer_tokens]
        return self.engine.processes.sum([denominator])[0]

    def open_transport(self) -> tuple[tuple[str, int], list[list[Entry]]]:
        """Where the group for broadcasts can meet, and what will come in each bucket; asked of rank 0."""
        return own_address(), self._plan_of_buckets()

    def _plan_of_buckets(self) -> list[list[Entry]]:
        return bucket_plan(self.network, adapter_only=self.job.options.publish == "adapter")

    @timed
    def publish(self, version: int, broadcast: bool = False) -> Published:
        """The weights in the object store, or to all who listen; all ranks call it, and `Published.by_all` joins them.

        A broadcast that fails is not told here, since the receivers know best what they have: all ranks go on to the
        last bucket, because under ZeRO-3 they gather it together, and `store` gives the version to whoever lacks it.
        """
        kept = self._memory_to_keep() if broadcast else []
        buckets = []
        adapter_only = self.job.options.publish == "adapter"
        walk = weight_buckets(self.network, self.engine, adapter_only=adapter_only, in_shares=not broadcast)
        for number, pieces in enumerate(walk):
            if broadcast and self.rank == 0:
                copy_into(pieces, kept[number])
                self._send(pieces, kept[number])
            buckets.append(Bucket(pieces.entries, [] if broadcast else self._put(pieces)))
        if kept:
            self._sent[version] = kept
        return Published(version, buckets)

    def _memory_to_keep(self) -> list[torch.Tensor]:
        """Room for a version that is broadcast: that of the oldest one, which nobody can ask for any more."""
        if self.rank != 0:
            return []
        if len(self._sent) >= VERSIONS_KEPT:
            return self._sent.pop(min(self._sent))
        return [self._host_memory(data_bytes(entries)) for entries in self._plan_of_buckets()]

    def _send(self, pieces: Pieces, on_host: torch.Tensor) -> None:
        if self._transport is None:
            return
        device = self._transport.device
        try:
            self._transport.broadcast(on_host if device.type == "cpu" else self._end_to_end(pieces, device)[0])
        except RuntimeError:
            self._leave_transport()  # or the others wait for it

    def _put(self, pieces: Pieces) -> list[ray.ObjectRef]:
        """What there is of a bucket, in the object store: from a CPU's weights, by way of pinned memory from a GPU."""
        if not any(map(len, pieces.data)):
            return []
        if self.device.type != "cpu":
            _, copies = self._end_to_end(pieces, torch.device("cpu"))
            return _store(copies)
        return _store(pieces.data)

    def _end_to_end(self, pieces: Pieces, device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The bucket in one piece, and where its pieces are, until the next one comes: new memory takes longer to get
        than to fill."""
        memory = self._memory.get(device)
        if memory is None:
            size = max(data_bytes(entries) for entries in self._plan_of_buckets())
            on_host = device.type == "cpu"
            memory = self._host_memory(size) if on_host else torch.empty(size, dtype=torch.uint8, device=device)
            self._memory[device] = memory
        memory = memory[: data_bytes(pieces.entries)]
        return memory, copy_into(pieces, memory)

    def store(self, version: int) -> Published:
        """A version that was broadcast, in the object store; asked of rank 0."""
        kept = zip(self._plan_of_buckets(), self._sent[version], strict=True)
        return Published(version, [Bucket(entries, _store(split(entries, data))) for entries, data in kept])

    def export(self, folder: Path) -> list[str]:
        """Write the finished weights into the run folder; all ranks call it, rank 0 writes.

        Errors: UserError when they cannot be written.
        """
        weights = {name.removeprefix("model."): w for name, w in self.engine.master_weights().items()}
        if self.rank != 0:
            return []
        options: TrainOptions = self.job.torch_options
        with writing_results(folder, self.job.options):
            written = self.stage.write_weights(folder, self.network, weights, self.job.tokenizer, options)
        return [str(path) for path in written]


def _store(pieces: list[torch.Tensor]) -> list[ray.ObjectRef]:
    """The bytes of a bucket's tensors in the object store, which takes arrays without a copy before its own."""
    return [ray.put(slices(pieces))]


@dataclass
class _Gap:
    """How far two log-probabilities of the same tokens lie apart."""

    total: float = 0.0
    count: int = 0
    largest: float = 0.0

    def add(self, differences: np.ndarray) -> None:
        if len(differences):
            self.total += float(differences.sum(dtype=np.float64))
            self.count += len(differences)
            self.largest = max(self.largest, float(np.abs(differences).max()))


class CriticWorker(TrainedWorker):
    """PPO's value model."""

    def setup(self, address: tuple[str, int] | None) -> dict[str, Any]:
        """Load the weights and make the engine; all ranks call it."""
        o = self.job.options
        assert isinstance(o, PPOOptions)
        processes = self._join(address)
        torch.manual_seed(o.seed)  # of a new value head
        self._make_engine(
            _loaded(_value_model, o.critic_init or o.reward_model or self.job.init),
            value_objective(o.value_clip),
            processes,
            o.critic_learning_rate,
        )
        return self.describe()

    @timed
    def values(self, batch: RolloutBatch) -> tuple[np.ndarray, np.ndarray]:
        """V of the state in which each answer token was chosen, float32 [A], and behind the last one, [S]."""
        found = self._run_passes(batch, {}, [], self._values_of, width=2)
        last = np.cumsum(batch.answer_lens) - 1
        return found[:, 0].copy(), found[last, 1]

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """As the policy's, and one more is kept: a run killed before the policy's is written needs the one before."""
        checkpoint.save(self.engine, folder, state, self.job.options.keep_checkpoints + 1)

    def _values_of(self, tensors: dict[str, torch.Tensor]) -> np.ndarray:
        """[B·T, 2]: the value where a token is predicted, and one place on, where that token was read."""
        values = self.engine.evaluate(tensors).float().cpu().numpy()
        return np.stack((values, np.roll(values, -1)), axis=1)

    @timed
    def update(self, batch: RolloutBatch, learning_rate: float) -> dict[str, float]:
        """Learn the `returns` of a batch, whose `values` were those at sampling; all ranks call it."""
        o = self.job.options
        columns = {name: batch.columns[name] for name in ("values", "returns")}
        windows = self._windows(batch, columns)
        total, steps, skipped = 0.0, 0, 0
        norms = []
        for _ in range(o.update_epochs):
            for window in windows:
                (count,) = self.engine.processes.sum([float(window.mine.answer_lens.sum())])
                for one in window.passes:
                    tensors = self._tensors(one, self.network, ["labels", "values", "returns"])
                    output = self.engine.forward_backward(tensors, 1.0 / max(1.0, count))
                    total += float(output) / max(1.0, count)
                result = self.engine.step(learning_rate)
                norms.append(result.grad_norm)
                skipped += not result.applied
                steps += 1
        (total,) = self.engine.processes.sum([total])
        found = {"value_loss": total / steps, "value_grad_norm": float(np.mean(norms)), "value_skipped": float(skipped)}
        return found


def _value_model(folder: Path) -> ValueModel:
    """A critic on a reward model's transformer and head, or on a language model's with a new head."""
    try:
        return ValueModel.from_decoder(RewardModel.from_pretrained(folder))
    except UserError:
        return ValueModel.from_decoder(load_masters(folder))


class ReferenceWorker(Worker):
    """The policy as it was at the start, frozen, in the policy's precision: the bits of its first compute copy."""

    def setup(self) -> dict[str, str] | None:
        """Load the weights; the first worker says which they are."""
        self._alone()
        self.network = _loaded(load_masters, self.job.init)
        found = self._identity()
        self.network = self.network.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.network.attention_backend = self._backend
        self._forward = torch.compile(self._log_probs) if self._compiles(self.network) else self._log_probs
        return found

    def _log_probs(self, **tensors: torch.Tensor) -> torch.Tensor:
        temperature = self.job.options.temperature
        found = self.network(**tensors, reduction="none", temperature=temperature).log_probs
        assert found is not None
        return found

    @timed
    @torch.no_grad()
    def log_probs(self, batch: RolloutBatch) -> tuple[np.ndarray, np.ndarray]:
        """log π_ref of this worker's share: (sequences, float32 of their answer tokens end to end)."""
        part = partition(batch.lengths, self.world_size)[self.rank]
        mine = batch.take(part)
        found = np.zeros(len(mine.behaviour_log_probs), dtype=np.float32)
        fixed = self._forward is not self._log_probs
        for one in micro_batches(mine, self.job.row_length, self._rows, {}, fixed_shape=fixed) if len(mine) else []:
            log_probs = self._forward(**self._tensors(one, self.network, ["labels"]))
            found[one.answer_tokens] = log_probs.flatten().float().cpu().numpy()[one.positions]
        return part, found


class RewardWorker(Worker):
    """A trained reward model."""

    def setup(self) -> dict[str, str] | None:
        """Load the weights; the first worker says which they are."""
        self._alone()
        folder = self.job.options.reward_model
        assert folder is not None
        self.network = _loaded(RewardModel.from_pretrained, folder)
        found = self._identity()
        self.network = self.network.to(device=self.device, dtype=self.dtype).eval()
        return found

    @timed
    def rewards(self, batch: RolloutBatch) -> tuple[np.ndarray, np.ndarray]:
        """The reward of this worker's share: (sequences, float32 of each)."""
        part = partition(batch.lengths, self.world_size)[self.rank]
        ends = np.cumsum(batch.lengths)
        texts = [batch.tokens[ends[i] - batch.lengths[i] : ends[i]] for i in part]
        found = self.network.rewards([text.tolist() for text in texts]).cpu().numpy()
        return part, found


class RolloutWorker(Worker):
    """Samples answers with a plain copy of the policy."""

    version = -1

    def setup(self) -> None:
        """Make the model; its weights, or those of its adapter, come with `load`."""
        self._alone()
        o = self.job.options
        self.adapter_only = o.publish == "adapter"
        network: Any = MiniGPT(self.job.config)
        if self.adapter_only:
            stage = PolicyStage(self.job.name)
            network = stage.network(_loaded(load_masters, self.job.init), self.job.torch_options)
        self.network = network.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.asleep = False
        self._joined: dict[str, np.ndarray] = {}
        self.engine = GenerationEngine(
            self.network,
            slots=self._slots(),
            max_length=self.job.longest,
            batch_invariant=o.batch_invariant,
            prefix_cache_tokens=0,
        )

    def _slots(self) -> int:
        """Answers that are worked on together: as many as wanted, or as have room in the GPU's memory.

        Errors: UserError when not even one has.
        """
        o, longest = self.job.options, self.job.longest
        wanted = min(o.rollout_slots, max(o.answers_per_step, o.eval_prompts))
        free = free_memory(self.device)
        if free is None:
            return wanted
        weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
        free -= weights if weights <= PREPARED_BYTES else 0  # the engine copies them
        one = cache_bytes(self.network, 1, longest)
        fitting = int(CACHE_SHARE * free / one)
        if fitting < 1:
            raise UserError(
                f"the cache of one answer of {longest} tokens takes {one / 1e9:.1f} GB and the GPU has only "
                f"{free / 1e9:.1f} GB left: take shorter prompts and answers, or fewer roles on a GPU"
            )
        if fitting < wanted:
            print(
                f"the GPU has room for {fitting} answers of {longest} tokens at a time, not for {wanted}; they take "
                "turns (--rollout_slots)",
                file=sys.stderr,
                flush=True,
            )
        return min(wanted, fitting)

    def sleep(self) -> None:
        """Leave the device to others until `wake`: no cache, no weights in the order of the kernels."""
        if not self.asleep:
            self.engine.sleep()
            super().sleep()
            self.asleep = True

    def wake(self) -> None:
        """Undo `sleep`; a no-op when awake."""
        if self.asleep:
            super().wake()
            self.engine.wake()
            self.asleep = False

    def _expected(self) -> dict[str, torch.Tensor]:
        """What a version consists of."""
        return {n: p for n, p in self.network.named_parameters() if is_of_adapter(n) or not self.adapter_only}

    @timed
    @torch.no_grad()
    def load(self, published: Published) -> int:
        """Take the weights of a version; a version that is there already is not loaded again."""
        if published.version != self.version:
            weights = unpack(published, ray.get, self._joined)
            if self.adapter_only:
                expected = self._expected()
                for name, tensor in weights:
                    expected.pop(name).copy_(tensor)
                assert not expected, f"nobody published {list(expected)}"
                self.engine.refresh()
            else:  # on a CPU the object store's memory becomes the weights': it stays as long as they refer to it
                self.engine.load_weights(weights, adopt=True)
            self.version = published.version
        return self.version

    @timed
    @torch.no_grad()
    def receive(self, version: int) -> str | None:
        """Take the weights of a version that is broadcast, bucket by bucket; what went wrong, if anything did."""
        assert self._transport is not None, "the controller lets nobody receive who has not joined"
        self.version = -1  # until all of them are there
        try:
            self._receive_into_parameters(self._transport)
        except RuntimeError as error:  # among them: no memory left
            self._leave_transport()
            return _first_line(error)
        self.version = version
        return None

    def _receive_into_parameters(self, transport: WeightGroup) -> None:
        missing = self._expected()
        for parameter in missing.values():
            if not parameter.untyped_storage().resizable():  # of the object store, where nothing may be written
                parameter.data = torch.empty_like(parameter)
        for entries in self._plan:
            data = self._received[: data_bytes(entries)]
            transport.broadcast(data)
            for name, tensor in tensors_in(entries, split(entries, data)):
                missing.pop(name).copy_(tensor)
        assert not missing, f"nobody sent {list(missing)}"
        self.engine.refresh()

    @timed
    def generate(self, request: PromptRequest) -> RolloutBatch:
        """Answers to this worker's share of the prompts, those to a prompt adjacent, in the order of the request."""
        if request.version != self.version:
            raise RuntimeError(f"answers of weights {request.version} are wanted, these are {self.version}")
        mine = request.share(self.rank, self.world_size)
        ends = np.cumsum(mine.prompt_lens)
        prompts = [mine.tokens[end - n : end] for end, n in zip(ends, mine.prompt_lens, strict=True)]
        requests = [
            self.engine.submit(
                prompt.tolist(),
                mine.params,
                n=mine.samples,
                sequence_ids=range(first, first + mine.samples),
                log_probs=True,
            )
            for prompt, first in zip(prompts, mine.first_sample_ids.tolist(), strict=True)
        ]
        while self.engine.has_work:
            self.engine.step()
        answers = [completion for one in requests for completion in one.completions]
        assert all(set(a.versions or ()) <= {self.engine.version} for a in answers), "weights came amid an answer"
        pieces = [
            piece
            for prompt, one in zip(prompts, requests, strict=True)
            for completion in one.completions
            for piece in (prompt, np.array(completion.ids, dtype=np.int32))
        ]
        batch = RolloutBatch(
            tokens=np.concatenate(pieces).astype(np.int32) if pieces else np.zeros(0, dtype=np.int32),
            prompt_lens=np.repeat(mine.prompt_lens, mine.samples).astype(np.int32),
            answer_lens=np.array([len(a.ids) for a in answers], dtype=np.int32),
            sample_ids=(mine.first_sample_ids[:, None] + np.arange(mine.samples)).reshape(-1).astype(np.int64),
            prompt_rows=np.repeat(mine.prompt_rows, mine.samples).astype(np.int64),
            stopped=np.array([a.finish_reason == "stop" for a in answers], dtype=bool),
            behaviour_log_probs=_flat((a.behaviour_log_probs for a in answers), np.float32),
            versions=np.full(sum(len(a.ids) for a in answers), self.version, dtype=np.int32),
        )
        return batch


def free_memory(device: torch.device) -> int | None:
    """Bytes that nobody holds on a GPU; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _flat(lists: Any, dtype: type) -> np.ndarray:
    return np.array([x for values in lists for x in values or ()], dtype=dtype)
