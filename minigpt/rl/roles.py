"""All workers of a run behind one face: what the loop says is one line here and N actors there.

The policy (and PPO's critic) learn, the reference (if the KL costs anything) and the reward model (if there is one)
judge, the rollout workers sample. Where they run is the layout's business.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray

from minigpt.rl.cluster import check_resources

from .batch import RolloutBatch, restore
from .delivery import Delivery
from .group import InputLost, WorkerDied, WorkerGroup, WorkerHung, place
from .layout import ENGINES, bundles, choose_layout, sharing, strangers
from .options import PPOOptions
from .request import PromptRequest
from .workers import CriticWorker, Job, PolicyWorker, ReferenceWorker, RewardWorker, RolloutWorker, Timed

ATTEMPTS = 3  # of one request, each by a new worker
GONE_SECONDS = 10.0  # until a process is gone with its memory: Ray waits 5 s before it kills one that does not listen
CLASSES = {
    "policy": PolicyWorker,
    "critic": CriticWorker,
    "reference": ReferenceWorker,
    "reward": RewardWorker,
    "rollout": RolloutWorker,
}


@dataclass
class Clock:
    """Where the time of a step went.

    Attributes:
        waited: Seconds that the controller waited, by phase.
        computed: Seconds that the slowest worker computed, by phase.
        tokens: Answer tokens that a model's phase went through.
    """

    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    computed: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waited[name] += time.perf_counter() - started

    def clear(self) -> None:
        """Begin with a new step."""
        for found in (self.waited, self.computed, self.tokens):
            found.clear()


class Asked(NamedTuple):
    """A rollout worker at work: the actor itself, since another one may take its place, and what it was told to do."""

    worker: Any
    loading: ray.ObjectRef
    generating: ray.ObjectRef


@dataclass
class Sampling:
    """Answers under way: the request, and who was asked, by rank."""

    request: PromptRequest
    asked: list[Asked]


class Roles:
    """The workers of a run.

    Args:
        job: What they all know.
        say: Shows a sentence to the person who watches.

    Errors: UserError when the cluster has no room for the layout.
    """

    def __init__(self, job: Job, say: Callable[[str], None]) -> None:
        o = job.options
        self.job, self.say, self.clock = job, say, Clock()
        self.has_critic = isinstance(o, PPOOptions)
        self.has_reference = o.kl_coefficient > 0 and not o.lora_rank
        roles = ["policy", *(["critic"] if self.has_critic else []), *(["reference"] if self.has_reference else [])]
        roles += [*(["reward"] if o.reward_model is not None else []), "rollout"]
        layout = choose_layout(o.layout, int(ray.cluster_resources().get("GPU", 0)))
        needed = bundles(layout, roles)
        check_resources([b.resources for b in needed], [b.roles for b in needed])
        if (pair := strangers(needed)) and o.sleep is not False:
            say(
                f"{pair[0]} and {pair[1]} may come to lie on one GPU, where they do not sleep for each other: put one "
                "beside the other in the layout, give them more of a GPU, or say --sleep false"
            )
        self.placement = place(needed, seconds=60.0)
        self.groups = {
            role: WorkerGroup(CLASSES[role], role, layout, needed, self.placement, (job,), o.timeout) for role in roles
        }
        self._sharing = sharing(layout, roles, o.sleep)
        self._awake: set[str] = set()
        self.delivery = Delivery(self.groups["policy"], self.groups["rollout"], say)

    def setup(self) -> dict[str, dict[str, Any]]:
        """Load all models; returns what they say of themselves.

        Side by side, but for roles that share a device: of those each sleeps before the next one loads, so that a start
        takes no more memory than a step. The policy comes last, since it is asked first.
        """
        waiting: dict[str, list[ray.ObjectRef]] = {}
        found: dict[str, list[Any]] = {}
        for role in sorted(self.groups, key=lambda role: (role in self._sharing, role == "policy")):
            for other in self._sharing.get(role, set()) & self._awake:
                found[other] = self.groups[other].wait(waiting.pop(other), "load its model")
                self._tell(other, "sleep")
                self._awake.remove(other)
            waiting[role] = self._load(role)
            self._awake.add(role)
        found |= {role: self.groups[role].wait(refs, "load its model") for role, refs in waiting.items()}
        self.delivery.setup(self.job.options.weight_transport)
        return {role: results[0] for role, results in found.items() if results[0] is not None}

    def _load(self, role: str) -> list[ray.ObjectRef]:
        group = self.groups[role]
        if role not in ENGINES:
            return group.all("setup")
        (address,) = group.wait([group.one(0, "address")], "find a port") if len(group) > 1 else [None]
        return group.all("setup", address)

    def _turn(self, *roles: str) -> None:
        """Of the roles that share a device, only these are awake: the others make room first."""
        others = set().union(*(self._sharing.get(role, set()) for role in roles)).difference(roles)
        leaving, coming = others & self._awake, set(roles) - self._awake
        if leaving or coming:
            with self.clock.phase("turns"):
                for role in sorted(leaving):
                    if not self._tell(role, "sleep"):
                        time.sleep(GONE_SECONDS)
                for role in sorted(coming):
                    self._tell(role, "wake")
            self._awake = (self._awake - leaving) | coming

    def _tell(self, role: str, method: str, what: str = "") -> bool:
        """Call a method on all workers of a role; whether all did it. A rollout worker that hangs is ended."""
        group, what, all_did = self.groups[role], what or method, True
        references = group.all(method)
        if role != "rollout":
            group.wait(references, what)
            return True
        for rank, reference in enumerate(references):  # also behind a dead one: the living still fill the device
            try:
                group.result(reference, rank, what)
            except WorkerDied:
                all_did = False  # whoever waits for its answers will replace it
            except WorkerHung as hung:
                all_did = False
                self.say(f"{hung.what}; it is ended")
                ray.kill(group.workers[rank])
        return all_did

    # ---------------------------------------------------------------------------------------------------- sampling

    def sample(self, request: PromptRequest) -> Sampling:
        """Begin to answer prompts, with the weights that the request names."""
        rollout = self.groups["rollout"]
        self._turn("rollout")
        return Sampling(request, [self._ask(rank, request) for rank in range(len(rollout))])

    def _ask(self, rank: int, request: PromptRequest) -> Asked:
        # A worker does one thing after the other: weights never change in the middle of an answer.
        rollout = self.groups["rollout"]
        loading = rollout.one(rank, "load", self.delivery.for_worker(rank, request.version))
        return Asked(rollout.workers[rank], loading, rollout.one(rank, "generate", request))

    def collect(self, sampling: Sampling) -> RolloutBatch:
        """Wait for the answers; by ascending sample number, each once. A new worker answers for a dead or hung one."""
        with self.clock.phase("generate"):
            parts = [self._collect_one(rank, sampling) for rank in range(len(self.groups["rollout"]))]
        self._note("generate", [part for _, part in parts])
        self._note("load", [load for load, _ in parts])
        batch = RolloutBatch.concatenate([part.value for _, part in parts])
        numbers, first = np.unique(batch.sample_ids, return_index=True)
        wanted = np.sort(sampling.request.sample_ids)
        assert np.array_equal(numbers, wanted), "answers are missing, or nobody asked for them"
        return batch if np.array_equal(first, np.arange(len(batch))) else batch.take(first)

    def are_at_work(self, sampling: Sampling, seconds: float) -> bool:
        """Wait for answers, no longer than so many seconds; whether somebody works on them still."""
        answers = [asked.generating for asked in sampling.asked]
        return len(ray.wait(answers, num_returns=len(answers), timeout=seconds)[0]) < len(answers)

    def have_come(self, sampling: Sampling) -> bool:
        """Whether `collect` would have to ask nobody anew for these answers, on which nobody works any more."""
        try:
            for rank, asked in enumerate(sampling.asked):
                self.groups["rollout"].result(asked.generating, rank, "answer")
        except (WorkerDied, InputLost):
            return False
        return True

    def _collect_one(self, rank: int, sampling: Sampling) -> tuple[Timed[int], Timed[RolloutBatch]]:
        rollout = self.groups["rollout"]
        dead: Any = None  # the worker that has to be replaced
        death = ""
        for attempt in range(ATTEMPTS):
            try:
                if dead is not None:
                    self._turn("rollout")
                    if dead is rollout.workers[rank]:  # else it was replaced while another request was waited for
                        self.say(f"{death}; a new one answers the same prompts")
                        self.delivery.forget(rank)
                        rollout.restart(rank)
                        rollout.result(rollout.one(rank, "setup"), rank, "load its model")
                    sampling.asked[rank] = self._ask(rank, sampling.request)
                _, loading, generating = sampling.asked[rank]
                return rollout.result(loading, rank, "load weights"), rollout.result(generating, rank, "answer")
            except InputLost as loss:
                publisher = self.delivery.publisher_of(loss.reference)
                raise WorkerDied("policy", publisher, "the weights that it had published are gone") from loss
            except (WorkerDied, WorkerHung) as error:
                if error.role != "rollout" or attempt + 1 == ATTEMPTS:
                    raise
                dead = rollout.workers[rank] if death else sampling.asked[rank].worker
                death = error.what if isinstance(error, WorkerHung) else str(error)
        raise AssertionError

    # ---------------------------------------------------------------------------------------------------- judging

    def reference_log_probs(self, batch: RolloutBatch) -> np.ndarray:
        """log π_ref of every answer token, float32 [A]: of the reference, or of the policy without its adapter."""
        if not self.has_reference:
            return self._call("policy", "reference_log_probs", batch)[0]
        return self._shared("reference", "log_probs", batch, batch.answer_lens)

    def rewards(self, batch: RolloutBatch) -> np.ndarray:
        """The reward model's judgement of every sequence, float32 [S]; equal ones are judged once.

        Twice they would be in passes of other shapes, which round otherwise, and advantages of a group have the same
        size however little its rewards differ.
        """
        ends = np.cumsum(batch.lengths)
        number: dict[bytes, int] = {}
        which = np.array(
            [
                number.setdefault(batch.tokens[end - n : end].tobytes(), len(number))
                for end, n in zip(ends, batch.lengths, strict=True)
            ]
        )
        distinct = batch.take(np.unique(which, return_index=True)[1])
        return self._shared("reward", "rewards", distinct, np.ones(len(distinct), dtype=np.int64))[which]

    def log_probs(self, batch: RolloutBatch) -> np.ndarray:
        """log π of every answer token by the graph that is trained, float32 [A]."""
        return self._call("policy", "log_probs", batch)[0]

    def values(self, batch: RolloutBatch) -> np.ndarray:
        """The critic's values of every answer token [A]."""
        return self._call("critic", "values", batch)[0]

    def _shared(self, role: str, method: str, batch: RolloutBatch, lengths: np.ndarray) -> np.ndarray:
        parts = self._call(role, method, batch)
        return restore([part for part, _ in parts], [values for _, values in parts], lengths)

    # ---------------------------------------------------------------------------------------------------- learning

    def update_policy(self, batch: RolloutBatch, learning_rate: float, kl_coefficient: float) -> dict[str, float]:
        """The optimizer steps of the policy on a batch; what there is to see."""
        found = self._call("policy", "update", batch, learning_rate, kl_coefficient)[0]
        self.clock.tokens["update_policy"] = found["trained_tokens"]
        return found

    def update_critic(self, batch: RolloutBatch, learning_rate: float) -> dict[str, float]:
        """The optimizer steps of the critic on a batch."""
        found = self._call("critic", "update", batch, learning_rate)[0]
        self.clock.tokens["update_critic"] *= self.job.options.update_epochs
        return found

    def publish(self, version: int) -> None:
        """Make the policy's weights, as they are now, available to the rollout workers."""
        self._turn("policy", *(["rollout"] if self.delivery.backend else []))
        all_listen = True
        if self.delivery.backend:
            # With overlap they may sample for long; who waits for a bucket must not count that as a hanging member
            with self.clock.phase("generate"):
                all_listen = self._tell("rollout", "ping", "answer")
        with self.clock.phase("publish"):
            results = self.delivery.publish(version, all_listen)
        self._note("publish", results)

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """A checkpoint of everything; the policy's, which says that it is complete, comes last."""
        if self.has_critic:
            self._plain("critic", "save", folder / "critic", {**state, "answers": None})  # which only one has to hold
        self._plain("policy", "save", folder, state)

    def load(self, folder: Path, critic: Path | None) -> None:
        """Go on from verified checkpoints."""
        self._plain("policy", "load", folder)
        if critic is not None:
            self._plain("critic", "load", critic)

    def export(self, folder: Path) -> list[str]:
        """Write the policy's weights into the run folder."""
        return self._plain("policy", "export", folder)[0]

    def _plain(self, role: str, method: str, *arguments: Any) -> list[Any]:
        self._turn(role)
        group = self.groups[role]
        return group.wait(group.all(method, *arguments), method)

    def _call(self, role: str, method: str, *arguments: Any) -> list[Any]:
        """The values that the workers of a role return, with the time noted; a batch crosses once."""
        names = {"update": f"update_{role}", "log_probs": f"{role}_log_probs", "rewards": "reward_model"}
        name = names.get(method, method)
        self.clock.tokens[name] += sum(len(a.behaviour_log_probs) for a in arguments if isinstance(a, RolloutBatch))
        with self.clock.phase(name):
            shared = [ray.put(a) if isinstance(a, RolloutBatch) else a for a in arguments]
            results: list[Timed] = self._plain(role, method, *shared)
        self._note(name, results)
        return [result.value for result in results]

    def _note(self, phase: str, results: list[Timed]) -> None:
        self.clock.computed[phase] += max(result.seconds for result in results)

    def close(self) -> None:
        """End all workers and give back their place."""
        for group in self.groups.values():
            group.kill()
        ray.util.remove_placement_group(self.placement)
