"""PPO and GRPO: prompts → answers → rewards → advantages → update → new weights for the samplers.

The controller reads as the algorithm. It holds no model: the roles (`roles.py`) compute on Ray actors, the formulas are
in `algorithms.py`, and this file says what happens in which order. A version is the number of updates that weights have
seen; answers of version v train version v (`overlap: 0`) or v + 1 (`overlap: 1`, corrected by `behaviour_cap`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from minigpt.errors import UserError
from minigpt.evaluation.answers import wilson_interval
from minigpt.generation.sampling import SamplingParams
from minigpt.trainer.schedule import learning_rate

from . import algorithms
from .batch import RolloutBatch
from .options import GRPOOptions, PPOOptions, RLOptions
from .prompts import PromptSource, Texts
from .reward_pool import RewardPool
from .roles import Roles, Sampling

EVALUATION_IDS = 1 << 40  # sample numbers that training never reaches
COUNTS = ("reward_failures",)  # what of several rounds is added up; of the other metrics the mean is taken
NO_MODEL = ("publish", "load")  # phases of which workers say how long they took, and which no model computes in
STOPPING_SECONDS = 10.0  # in which a run that is to stop waits for the answers under way
LOOK_SECONDS = 1.0  # after which it is looked whether the run is to stop
IDLE_STEPS = 5  # so many in a row without anything to learn, and it is said
RESULTS = ("loss", "reward", "tokens_per_second")  # what of a step's metrics the summary tells


@dataclass
class Position:
    """Where a run stands; with the engines' states and the answers under way this is what a checkpoint holds.

    Attributes:
        step: Steps done; also the version of the weights.
        prompts: Prompts asked so far.
        under_way: Number of the first prompt of the answers that are under way for the next step (`overlap`). None:
            nothing is.
        kl_coefficient: It moves when `kl_target` says so.
        tokens: Answer tokens of all steps, also of answers that taught nothing and were left out of the update.
        seconds: Of all steps.
        nan_steps: Skipped steps in a row.
        results: `RESULTS` of the last step that had them: one without an update has no loss.
        first_evaluation, last_evaluation: What was measured on held-out prompts.
        evaluated_step: When the last of them was.
    """

    step: int = 0
    prompts: int = 0
    under_way: int | None = None
    kl_coefficient: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    nan_steps: int = 0
    results: dict[str, float] = field(default_factory=dict)
    first_evaluation: dict[str, Any] = field(default_factory=dict)
    last_evaluation: dict[str, Any] = field(default_factory=dict)
    evaluated_step: int = 0


@dataclass
class Experience:
    """Answers with what they were worth.

    Attributes:
        batch: S answers; its columns come to hold everything that the update needs.
        rewards: float32 [S].
        metrics: Of all answers that were sampled for it, for the log.
    """

    batch: RolloutBatch
    rewards: np.ndarray
    metrics: dict[str, float]


def without_dead_groups(
    batch: RolloutBatch, advantages: np.ndarray, options: RLOptions
) -> tuple[RolloutBatch, np.ndarray]:
    """The answers whose advantage is not 0, and advantages that give the same gradient without the others.

    With a single update π_old is π_θ, the loss is linear in the advantages, and an answer of advantage 0 adds exactly
    nothing but to the denominator. So it is not computed, and the others' advantages take up the smaller denominator.

    Args:
        batch: S answers.
        advantages: [S].
        options: Its `aggregation` says what the denominator counts.
    """
    live = np.flatnonzero(advantages)
    if len(live) in (0, len(batch)):
        return batch, advantages
    counts_tokens = options.aggregation == "token"
    lengths = batch.answer_lens if counts_tokens else np.ones(len(batch))
    return batch.take(live), advantages[live] * (lengths[live].sum() / lengths.sum())


class Loop:
    """The algorithm.

    Args:
        options: Of the run.
        roles: The models.
        pool: Rule rewards; None: the reward model alone.
        prompts: What is asked.
        heldout: What is asked to judge; None: nothing.
        stop_ids: What ends an answer.
        position: Where to begin.
        answers: What was under way there, to learn from first; None: its prompts, if any, are asked again.
    """

    def __init__(
        self,
        options: RLOptions,
        roles: Roles,
        pool: RewardPool | None,
        prompts: PromptSource,
        heldout: PromptSource | None,
        stop_ids: tuple[int, ...],
        position: Position,
        answers: RolloutBatch | None = None,
    ) -> None:
        self.options, self.roles, self.pool = options, roles, pool
        self.prompts, self.heldout, self.position = prompts, heldout, position
        self.stop_ids = stop_ids
        # What is sampled from is exactly what the log-probabilities are of: no filters, no penalties
        self.sampling = SamplingParams(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            stop_token_ids=stop_ids,
            seed=options.seed,
        )
        self._coming: Sampling | RolloutBatch | None = answers  # for the next step: under way, or there already
        self._idle = 0  # steps in a row that had nothing to learn
        self._drawn = 0  # answer tokens that were collected in this step, also of groups that were put aside

    # ---------------------------------------------------------------------------------------------------- one step

    def step(self) -> dict[str, float]:
        """Sample, judge, learn, publish. Returns what there is to see."""
        o, position, roles = self.options, self.position, self.roles
        started = time.perf_counter()
        roles.clock.clear()
        self._drawn = 0
        coming = self._coming or self._ask(o.prompts_per_step, position.under_way)
        batch = coming if isinstance(coming, RolloutBatch) else self._collect(coming)
        self._coming = position.under_way = None
        if not o.dynamic_sampling:
            self._ask_ahead()
        experience = self._fill_up(self._judge(batch))
        if o.dynamic_sampling:  # not before: samplers answer in turn, and a round that fills up would wait
            self._ask_ahead()
        metrics = self._learn(experience)
        self._say_when_idle(experience.metrics)
        position.step += 1
        roles.publish(position.step)
        position.tokens += len(experience.batch.behaviour_log_probs)
        seconds = time.perf_counter() - started
        position.seconds += seconds
        metrics = {**experience.metrics, **metrics, **self._times(seconds, experience.batch)}
        position.results |= {name: metrics[name] for name in RESULTS if name in metrics}
        return metrics

    def _ask_ahead(self) -> None:
        """With overlap: have the next step's prompts answered while this one learns."""
        o, position = self.options, self.position
        if o.overlap and position.step + 1 < o.max_steps:
            position.under_way = position.prompts
            self._coming = self._ask(o.prompts_per_step)

    def answers_under_way(self, stopping: Callable[[], bool] = lambda: False) -> RolloutBatch | None:
        """With overlap: the next step's answers, waited for. A checkpoint holds them, since a resumed run could not
        sample them again: their weights are one update older than the checkpoint's.

        Args:
            stopping: Whether the run is to stop. From then on they are waited for `STOPPING_SECONDS` only, since
                whoever stops a run will kill it; None: not all of them came.
        """
        if isinstance(self._coming, Sampling):
            started = time.perf_counter()
            told = math.inf  # when it was to stop
            while self.roles.are_at_work(self._coming, seconds=LOOK_SECONDS):
                now = time.perf_counter()
                told = min(told, now) if stopping() else told
                if now - told >= STOPPING_SECONDS:
                    return None
                if now - started >= self.options.timeout:
                    break  # somebody hangs, and will be replaced
            if stopping() and not self.roles.have_come(self._coming):
                return None
            self._coming = self._collect(self._coming)
            self.position.seconds += time.perf_counter() - started  # which the next step need not wait any more
        return self._coming

    def _ask(self, count: int, first: int | None = None) -> Sampling:
        """Begin to answer the next prompts, or once more those from number `first` on."""
        o, position = self.options, self.position
        first = position.prompts if first is None else first
        position.prompts = max(position.prompts, first + count)
        return self.roles.sample(self.prompts.request(first, count, o.samples_per_prompt, self.sampling, position.step))

    def _collect(self, sampling: Sampling) -> RolloutBatch:
        batch = self.roles.collect(sampling)
        self._drawn += len(batch.behaviour_log_probs)
        return batch

    def _judge(self, batch: RolloutBatch) -> Experience:
        with self.roles.clock.phase("rewards"):
            texts = self.prompts.texts(batch, self.stop_ids, self.options.max_new_tokens)
            rewards, metrics = self._rule_rewards(batch, texts)
        rewards = self._with_judges(batch, rewards, metrics)
        return Experience(batch, rewards.astype(np.float32), metrics | self._describe(batch, rewards))

    def _with_judges(self, batch: RolloutBatch, rewards: np.ndarray, metrics: dict[str, float]) -> np.ndarray:
        """Beside the rules' rewards [S]: the reward model, of which `metrics` is told, and the punishment of length."""
        o = self.options
        if o.reward_model is not None:
            judged = self.roles.rewards(batch)
            metrics["reward_model"] = float(judged.mean())
            rewards = rewards + o.reward_model_weight * judged
        if o.overlong_buffer:
            lengths = torch.from_numpy(batch.answer_lens)
            rewards = rewards + algorithms.overlong_penalty(lengths, o.max_new_tokens, o.overlong_buffer).numpy()
        return rewards

    def _rule_rewards(self, batch: RolloutBatch, texts: Texts) -> tuple[np.ndarray, dict[str, float]]:
        if self.pool is None:
            return np.zeros(len(batch), dtype=np.float32), {}
        scores = self.pool.score(*texts)
        metrics = {f"reward_{name}": float(np.nanmean(values)) for name, values in scores.parts.items()}
        if "accuracy" in scores.parts:
            metrics["accuracy"] = metrics.pop("reward_accuracy")
        if scores.failed.any():
            metrics["reward_failures"] = float(scores.failed.sum())
            self.roles.say(f"a reward failed and counts as the worst of the batch: {scores.failures[0]}")
        return scores.rewards, metrics

    def _describe(self, batch: RolloutBatch, rewards: np.ndarray) -> dict[str, float]:
        groups = rewards.reshape(-1, self.options.samples_per_prompt)
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "zero_variance_groups": float((groups.max(1) == groups.min(1)).mean()),
            "response_length": float(batch.answer_lens.mean()),
            "response_length_max": float(batch.answer_lens.max()),
            "truncated": float(1 - batch.stopped.mean()),
            "version_lag": float(self.position.step - batch.versions.min(initial=self.position.step)),
        }

    def _fill_up(self, experience: Experience) -> Experience:
        """Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): groups of equal rewards give way to others."""
        o, first = self.options, experience
        for _ in range(o.dynamic_sampling):
            missing = o.prompts_per_step - len(self._informative(experience).rewards) // o.samples_per_prompt
            if not missing:
                break
            experience = self._together(experience, self._judge(self._collect(self._ask(missing))))
        found = self._informative(experience)
        if not len(found.rewards):  # nothing to learn anywhere: a step of advantages 0, of the usual size
            return Experience(first.batch, first.rewards, experience.metrics)
        return found

    def _together(self, *rounds: Experience) -> Experience:
        """The answers of several rounds of sampling, and what there is to see of all of them."""
        batch = RolloutBatch.concatenate([one.batch for one in rounds])
        rewards = np.concatenate([one.rewards for one in rounds])
        metrics: dict[str, float] = {}
        for name in dict.fromkeys(name for one in rounds for name in one.metrics):
            values, sizes = zip(*((r.metrics[name], len(r.rewards)) for r in rounds if name in r.metrics), strict=True)
            metrics[name] = float(sum(values) if name in COUNTS else np.average(values, weights=sizes))
        return Experience(batch, rewards, metrics | self._describe(batch, rewards))

    def _informative(self, experience: Experience) -> Experience:
        """The groups whose rewards differ; all of them without dynamic sampling."""
        if not self.options.dynamic_sampling:
            return experience
        groups = experience.rewards.reshape(-1, self.options.samples_per_prompt)
        keep = np.flatnonzero(np.repeat(groups.max(1) > groups.min(1), self.options.samples_per_prompt))
        return Experience(experience.batch.take(keep), experience.rewards[keep], experience.metrics)

    def _say_when_idle(self, metrics: dict[str, float]) -> None:
        """A task that is never or always solved, or a start that cannot answer, is no error; but it should be known."""
        per_group = isinstance(self.options, GRPOOptions)
        idle = metrics["zero_variance_groups"] == 1 if per_group else metrics["reward_std"] == 0
        self._idle = self._idle + 1 if idle else 0
        if self._idle == IDLE_STEPS:
            alike = "all answers to a prompt are" if per_group else "all answers are"
            self.roles.say(
                f"{IDLE_STEPS} steps in a row had nothing to learn: {alike} worth the same (reward "
                f"{metrics['reward']:.3g}; {metrics['truncated']:.0%} are cut off at --max_new_tokens). Is the model "
                "trained to answer such prompts, and does the reward tell good answers from bad ones? (docs/rl.md: "
                "dead groups)"
            )

    # ---------------------------------------------------------------------------------------------------- learning

    def _learn(self, experience: Experience) -> dict[str, float]:
        """Advantages, then the optimizer steps."""
        o, position, batch = self.options, self.position, experience.batch
        metrics: dict[str, float] = {}
        if o.kl_coefficient > 0:
            batch.columns["ref_log_probs"] = self.roles.reference_log_probs(batch)
        if o.updates_per_step > 1 or (o.kl_in == "reward" and o.kl_coefficient > 0):
            batch.columns["old_log_probs"] = self.roles.log_probs(batch)
        if isinstance(o, PPOOptions):
            metrics |= self._estimate_advantages(experience, o)
        elif isinstance(o, GRPOOptions):
            rewards = torch.from_numpy(experience.rewards)
            advantages = algorithms.group_advantages(rewards, o.samples_per_prompt, o.baseline).numpy()
            if o.updates_per_step == 1 and not o.pays_for_more_than_rewards:
                batch, advantages = without_dead_groups(batch, advantages, o)
            batch.columns["advantages"] = batch.spread(advantages).astype(np.float32)
        if isinstance(o, PPOOptions):
            rate = self._rate(o.critic_learning_rate)
            metrics |= self.roles.update_critic(batch, rate)
        updated = self._has_something_to_learn(batch)
        if updated:
            rate = self._rate(o.learning_rate, self._critic_warmup)
            metrics |= {"lr": rate, **self.roles.update_policy(batch, rate, position.kl_coefficient)}
        self._count_nan_steps(metrics)
        self._adapt_kl(metrics, batch, updated)
        return metrics

    @property
    def _critic_warmup(self) -> int:
        """Steps in which the policy does not learn."""
        return self.options.critic_warmup if isinstance(self.options, PPOOptions) else 0

    def _has_something_to_learn(self, batch: RolloutBatch) -> bool:
        """False while only the critic learns, and where the gradient is exactly 0: a step would be the momentum's."""
        if self.position.step < self._critic_warmup:
            return False
        return self.options.pays_for_more_than_rewards or bool(batch.columns["advantages"].any())

    def _estimate_advantages(self, experience: Experience, o: PPOOptions) -> dict[str, float]:
        """PPO: the KL is taken off each token's reward, the answer's reward comes with its last token, then GAE.

        That reward is a verdict on the answer as it stands, also on one that was cut off, so the episode ends there:
        with the value behind the last token added, a cut answer would be paid twice.
        """
        batch = experience.batch
        values = self.roles.values(batch)
        token_rewards, mask = batch.padded(np.zeros_like(values))
        token_rewards[np.arange(len(batch)), batch.answer_lens - 1] = experience.rewards
        keep = torch.from_numpy(mask)
        metrics: dict[str, float] = {}
        if o.kl_in == "reward" and o.kl_coefficient > 0:
            old, reference = (
                torch.from_numpy(batch.padded(batch.columns[f"{name}_log_probs"])[0]) for name in ("old", "ref")
            )
            kl = algorithms.kl_estimate(old, reference, keep, "k1").numpy()
            token_rewards -= self.position.kl_coefficient * kl
            metrics |= {"kl": float(kl.sum() / mask.sum()), "kl_per_answer": float(kl.sum() / len(batch))}
        advantages, returns = algorithms.gae(
            torch.from_numpy(token_rewards),
            torch.from_numpy(batch.padded(values)[0]),
            keep,
            o.gamma,
            o.lam,
        )
        flat_returns = returns[keep]
        metrics["explained_variance"] = algorithms.explained_variance(
            torch.tensor(values), flat_returns, torch.ones_like(flat_returns)
        )
        metrics["value_mean"] = float(values.mean())
        if o.whiten_advantages:
            advantages = algorithms.masked_whiten(advantages, keep)
        batch.columns |= {"values": values, "returns": flat_returns.numpy(), "advantages": advantages[keep].numpy()}
        return metrics

    def _rate(self, peak: float, first: int = 0) -> float:
        """The rate of this step where the schedule begins at step `first`."""
        o = self.options
        return learning_rate(
            self.position.step - first,
            o.max_steps - first,
            peak=peak,
            schedule=o.schedule,
            warmup_ratio=o.warmup_ratio,
            min_ratio=o.min_lr_ratio,
        )

    def _adapt_kl(self, metrics: dict[str, float], batch: RolloutBatch, updated: bool) -> None:
        o, position, answers = self.options, self.position, len(batch)
        if o.kl_coefficient:
            metrics["kl_coefficient"] = position.kl_coefficient  # of this step, before it is moved
        if "kl_per_answer" not in metrics and "kl" in metrics:
            metrics["kl_per_answer"] = metrics["kl"] * len(batch.behaviour_log_probs) / answers
        if updated and o.kl_target is not None and math.isfinite(metrics.get("kl_per_answer", math.nan)):
            controller = algorithms.AdaptiveKL(position.kl_coefficient, o.kl_target, o.kl_gain)
            position.kl_coefficient = controller.update(metrics["kl_per_answer"])

    def _count_nan_steps(self, metrics: dict[str, float]) -> None:
        skipped = metrics.get("skipped", 0.0) + metrics.get("value_skipped", 0.0)
        self.position.nan_steps = self.position.nan_steps + 1 if skipped else 0
        if self.position.nan_steps >= self.options.max_nan_steps:
            raise UserError(
                f"the loss or a gradient was NaN or infinite in {self.position.nan_steps} steps in a row (now at step "
                f"{self.position.step}); lower --learning_rate; the last checkpoint is untouched"
            )

    def _times(self, seconds: float, batch: RolloutBatch) -> dict[str, float]:
        """Seconds of each phase, and the part of the step in which no model sampled, judged or learned: rewards by
        rules, weights on their way, Ray, this process."""
        clock = self.roles.clock
        busy = sum(seconds for name, seconds in clock.computed.items() if name not in NO_MODEL)
        named = {f"seconds_{name}": value for name, value in clock.waited.items()}
        rates = {f"tokens_per_second_{name}": n / max(clock.computed[name], 1e-9) for name, n in clock.tokens.items()}
        if self._drawn:  # else a checkpoint waited for the answers, or they came out of one
            rates["generated_tokens_per_second"] = self._drawn / max(clock.computed["generate"], 1e-9)
        return {
            **named,
            **rates,
            "seconds_step": seconds,
            "overhead": max(0.0, 1 - busy / seconds) if not self.options.overlap else math.nan,
            "tokens_per_second": len(batch.behaviour_log_probs) / seconds,
        }

    # -------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> dict[str, Any]:
        """Greedy answers to held-out prompts: mean rewards, and the first few texts as `samples`."""
        if self.heldout is None:
            return {}
        o = self.options
        count = min(o.eval_prompts, len(self.heldout.data))
        greedy = SamplingParams(max_new_tokens=o.max_new_tokens, temperature=0.0, stop_token_ids=self.stop_ids)
        rows = np.arange(count, dtype=np.int64)
        request = self.heldout.request_rows(rows, EVALUATION_IDS + rows, 1, greedy, self.position.step)
        batch = self.roles.collect(self.roles.sample(request))
        texts = self.heldout.texts(batch, self.stop_ids, o.max_new_tokens)
        rewards, metrics = self._rule_rewards(batch, texts)
        rewards = self._with_judges(batch, rewards, metrics)
        interval = wilson_interval(metrics["accuracy"], count) if "accuracy" in metrics else None
        samples = [
            {
                "prompt": reference["messages"][-1]["content"],
                "right_answer": reference["answer"],
                "answer": ("<think>" if prompt.rstrip().endswith("<think>") else "") + completion,
                "reward": float(reward),
            }
            for prompt, completion, reference, reward in list(zip(*texts, rewards, strict=True))[:4]
        ]
        return {
            "reward": float(rewards.mean()),
            **metrics,
            **({} if interval is None else {"accuracy_interval": list(interval)}),
            "response_length": float(batch.answer_lens.mean()),
            "truncated": float(1 - batch.stopped.mean()),
            "prompts": count,
            "samples": samples,
        }
