"""The model that learns: log-probabilities, updates, and its weights on their way to the samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from minigpt.model.model_lora import adapters_off
from minigpt.trainer.adapters import AdapterStage
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.run import writing_results
from minigpt.trainer.setup import load_masters

from ..algorithms import token_weights
from ..batch import RolloutBatch
from ..group import own_address
from ..losses import PolicyLossTerms, policy_objective
from ..publish import (
    VERSIONS_KEPT,
    Bucket,
    Entry,
    Pieces,
    Published,
    bucket_plan,
    copy_into,
    data_bytes,
    slices,
    split,
    weight_buckets,
)
from .base import Timed, loaded, timed
from .trained import TrainedWorker


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
        network = self.stage.network(loaded(load_masters, job.init), job.torch_options)
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
            "weights": self._token_weights(batch)[0],
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
                chosen = batch.take(window.chosen)
                _, denominator = self._token_weights(chosen)
                labels += len(chosen.behaviour_log_probs)
                optimizer_steps += 1
                scale = 1.0 / denominator
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
        loss, *metrics, gap_sum, gap_n = self.engine.processes.sum([*sums.tolist(), gaps.total, float(gaps.count)])
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
        values = np.zeros(self.world_size)
        values[self.rank] = value
        return float(self._sum_arrays(values).max())  # a reduction by maximum would lose a NaN, as gloo's does

    def _token_weights(self, batch: RolloutBatch) -> tuple[np.ndarray, float]:
        """The weight of every answer token, float32 [A], and the denominator; every rank has the whole batch."""
        o = self.job.options
        ids = torch.from_numpy(batch.spread(np.arange(len(batch))))
        every = torch.ones(len(ids), dtype=torch.bool)
        weights, denominator = token_weights(every, ids, len(batch), o.aggregation, o.max_new_tokens)
        return weights.numpy(), denominator

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
            self.largest = float(np.maximum(self.largest, np.abs(differences).max()))  # `max` would lose a NaN
