"""The options of PPO and GRPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from inspect import cleandoc
from pathlib import Path
from typing import Literal

from minigpt.errors import UserError
from minigpt.trainer.options import TrainOptions, check_adapter


@dataclass
class RLOptions:
    """Options of reinforcement learning. Every field is a flag (`--max_steps 100`) and a key of a YAML file.

    Args:
        data: A folder packed by `minigpt data pack --stage prompt`, or raw files of prompts (questions with answers,
            GSM8K, countdown …), which are packed into SAVE_DIR/data first. None: the embedded micro-world's sums.
        save_dir: The run folder: checkpoints, metrics, weights, report.
        init: The run (or Hugging Face folder) that the policy starts from, and that the reference stays at. None: the
            newest reasoning or fine-tuned run beside save_dir.
        reward: What is rewarded: names (accuracy, format, length, repetition) or module:function, each with =WEIGHT if
            it is not 1; several are added up.
        reward_model: A run of `minigpt train reward` whose reward is added to the others.
        reward_model_weight: Its weight in the sum.
        prompts_per_step: Prompts that are answered for one step.
        samples_per_prompt: Answers to each of them.
        max_new_tokens: Longest answer.
        max_prompt_tokens: Longer prompts are left out when raw files are packed here.
        temperature: Of sampling, and of every log-probability that is compared with it.
        thinking: true: prompts end with an open <think>; false: with a closed one; null: as they were packed.
        max_steps: Steps: each samples answers and updates the policy on them.
        minibatches: Optimizer steps that the answers of a step are divided into.
        update_epochs: Passes over the answers of a step.
        optimizer: adamw or muon.
        learning_rate: Peak learning rate of the policy.
        schedule: How it falls after the warm-up: constant, cosine, wsd.
        min_lr_ratio: The rate at the end, as a fraction of the peak.
        warmup_ratio: Fraction of the steps over which the rate rises linearly from 0.
        weight_decay: Decoupled decay of the matrices.
        beta1: AdamW's first-moment decay.
        beta2: AdamW's second-moment decay.
        grad_clip: Largest global gradient norm; 0 switches clipping off.
        objective: ppo: clipped ratio of each token; gspo: of the whole answer; cispo: clipped weights.
        clip_low: Ratios below 1 - clip_low get no gradient.
        clip_high: Ratios above 1 + clip_high get none; null: as clip_low. DAPO's clip-higher is 0.28 with 0.2 below.
        dual_clip: Bounds the loss of answers with a negative advantage at -dual_clip * advantage; null: not. (Not with
            cispo.)
        aggregation: How tokens are averaged: token (all alike), sequence (all answers alike), constant (Dr. GRPO).
        kl_coefficient: How dearly leaving the reference is paid for. 0: no reference model is loaded.
        kl_in: loss: as a term of the loss (ratio times k3); reward: taken off each token's reward (k1, PPO only).
        kl_target: KL per answer, in nats, that the coefficient is adapted to; null: the coefficient stays.
        kl_gain: How fast it is adapted: a KL that is off by a fifth of the target or more moves the coefficient by a
            fifth of kl_gain in a step (2 % at 0.1, which is tenfold in 116 steps).
        entropy_coefficient: Reward for uncertainty, which keeps samples diverse.
        behaviour_correction: Weigh tokens by min(policy / sampler, behaviour_cap). null: when overlap is 1.
        behaviour_cap: See above.
        dynamic_sampling: Groups whose answers all got the same reward teach nothing; up to so many further rounds of
            prompts are sampled to replace them.
        overlong_buffer: The last so many tokens before max_new_tokens are punished linearly, down to -1 at the limit.
        overlap: 1: the next answers are sampled while the policy is updated, by weights that are one step old.
        layout: Which role runs where: auto, laptop, colocate, split, or a YAML file (docs: the RL guide).
        sleep: Roles that share a device take turns: what the others hold there goes to the CPU's memory meanwhile.
            null: on GPUs that several roles share; true: on CPUs too.
        publish: What the samplers get in a run with lora_rank. merged: all weights, the adapter in them. adapter: the
            adapter alone, about a hundredth of the bytes; they hold the frozen weights and merge it themselves, which
            takes the memory of the weights once more.
        weight_transport: How new weights reach the samplers. store: through Ray's object store. broadcast: to all of
            them at once, by NCCL between GPUs that are all different, else by gloo. auto: NCCL or store.
        ray_address: A running Ray cluster to join (host:port of its head, or auto). null: RAY_ADDRESS, or a private
            one of this machine.
        rollout_slots: Answers that a sampler works on together.
        batch_invariant: Sample so that every answer is bit-equal whatever runs beside it. Slower, but
            hardly where a CPU has compiled code.
        micro_batch_tokens: Tokens of a forward pass. null: 2,048 on a CPU, 32,768 on a GPU.
        eval_data: Held-out prompts: a packed folder (its held-out split, if it has one) or raw files. null: the
            validation split of the data.
        eval_interval: Steps between two evaluations; there is always one before the first and after the last step.
        eval_prompts: At most this many held-out prompts, answered greedily.
        save_interval: Steps between two checkpoints; 0: only at the end.
        keep_checkpoints: How many checkpoints are kept.
        resume: auto: go on from the newest good checkpoint in save_dir. never: ignore checkpoints.
        overwrite: Delete what save_dir holds of an earlier run and start over.
        restarts: A dead trainer rank restarts the run from its last checkpoint, at most so many times.
        timeout: Seconds after which a call to a worker counts as hung.
        reward_processes: Processes that rewards are computed in.
        reward_timeout: Seconds for one call of one reward function.
        reward_memory_mb: Memory of such a process.
        lora_rank: Rank of the adapter that is trained while the model is frozen; the reference is the model without
            it. 0: all weights are trained.
        lora_alpha: Scale of the adapter. null: twice the rank.
        lora_targets: Linear layers that get an adapter. null: all but the output layer.
        dtype: Precision of all models: bf16 (with fp32 masters), fp32, auto.
        compile: torch.compile. null: where a C++ compiler (or a GPU) is there and the run is long enough to gain by it.
        deepspeed: A DeepSpeed JSON file, such as ds_configs/zero2.json. null: ZeRO stage 1.
        gradient_checkpointing: Recompute activations in the backward pass.
        seed: Of prompt order and sampling.
        log_interval: Steps between two lines of metrics.jsonl.
        tensorboard: Also write TensorBoard events.
        max_nan_steps: Abort after this many skipped optimizer steps in a row.
        export_dtype: Precision of the exported Hugging Face folder.
        recipe: Name of the reference curve for the report.
        threads: CPU threads of a worker; 0: all cores of its node.
    """

    data: list[Path] | None = None
    save_dir: Path = Path("out/grpo")
    init: Path | None = None
    reward: list[str] = field(default_factory=lambda: ["accuracy"])
    reward_model: Path | None = None
    reward_model_weight: float = 1.0
    prompts_per_step: int = 16
    samples_per_prompt: int = 8
    max_new_tokens: int = 256
    max_prompt_tokens: int = 512
    temperature: float = 1.0
    thinking: bool | None = None
    max_steps: int = 200
    minibatches: int = 1
    update_epochs: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-5
    schedule: Literal["cosine", "wsd", "constant"] = "constant"
    min_lr_ratio: float = 0.0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0
    objective: Literal["ppo", "gspo", "cispo"] = "ppo"
    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    aggregation: Literal["token", "sequence", "constant"] = "token"
    kl_coefficient: float = 0.0
    kl_in: Literal["loss", "reward"] = "loss"
    kl_target: float | None = None
    kl_gain: float = 0.1
    entropy_coefficient: float = 0.0
    behaviour_correction: bool | None = None
    behaviour_cap: float = 2.0
    dynamic_sampling: int = 0
    overlong_buffer: int = 0
    overlap: int = 0
    layout: str = "auto"
    sleep: bool | None = None
    publish: Literal["merged", "adapter"] = "merged"
    weight_transport: Literal["auto", "store", "broadcast"] = "auto"
    ray_address: str | None = None
    rollout_slots: int = 64
    batch_invariant: bool = False
    micro_batch_tokens: int | None = None
    eval_data: list[Path] | None = None
    eval_interval: int = 0
    eval_prompts: int = 64
    save_interval: int = 0
    keep_checkpoints: int = 2
    resume: Literal["auto", "never"] = "auto"
    overwrite: bool = False
    restarts: int = 1
    timeout: float = 1800.0
    reward_processes: int = 1
    reward_timeout: float = 5.0
    reward_memory_mb: int = 2048
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: list[str] | None = None
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool | None = None
    deepspeed: Path | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    log_interval: int = 1
    tensorboard: bool = True
    max_nan_steps: int = 5
    export_dtype: Literal["bf16", "fp32"] = "bf16"
    recipe: str | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        # What both kinds of runs have is checked alike
        TrainOptions(**{f.name: getattr(self, f.name) for f in fields(TrainOptions) if hasattr(self, f.name)})
        at_least_one = (
            *("prompts_per_step", "samples_per_prompt", "max_new_tokens", "max_prompt_tokens", "minibatches"),
            *("update_epochs", "rollout_slots", "eval_prompts", "reward_processes", "reward_memory_mb"),
        )
        for name in at_least_one:
            self._require(getattr(self, name) >= 1, name, "at least 1")
        not_negative = (
            *("kl_coefficient", "entropy_coefficient", "clip_low", "restarts", "dynamic_sampling", "overlong_buffer"),
            *("lora_rank", "seed"),
        )
        for name in not_negative:
            self._require(0 <= getattr(self, name) < math.inf, name, "a number of at least 0")
        for name in ("temperature", "timeout", "reward_timeout", "behaviour_cap"):
            self._require(0 < getattr(self, name) < math.inf, name, "a number above 0")
        for name, above in (("clip_high", 0), ("dual_clip", 1), ("kl_target", 0), ("micro_batch_tokens", 0)):
            value = getattr(self, name)
            self._require(value is None or above < value < math.inf, name, f"null or a number above {above}")
        self._require(0 < self.kl_gain <= 1, "kl_gain", "above 0 and at most 1")  # from 5 on a low KL would make β 0
        check_adapter(self)
        self._require(self.publish == "merged" or self.lora_rank > 0, "publish", "merged without --lora_rank")
        self._require(self.overlap in (0, 1), "overlap", "0 or 1")
        self._require(bool(self.reward) or self.reward_model is not None, "reward", "at least one reward")
        self._require(self.overlong_buffer <= self.max_new_tokens, "overlong_buffer", "at most --max_new_tokens")
        if self.answers_per_step % self.minibatches:
            raise UserError(
                f"{self.prompts_per_step} prompts x {self.samples_per_prompt} samples do not divide into "
                f"--minibatches {self.minibatches}"
            )
        if self.dynamic_sampling and self.samples_per_prompt < 2:
            raise UserError(
                "--dynamic_sampling compares answers to the same prompt: give --samples_per_prompt at least 2"
            )
        if self.overlap and self.behaviour_correction is False:
            raise UserError("--overlap 1 samples with older weights, which needs --behaviour_correction; leave it out")
        if self.kl_target is not None and not self.kl_coefficient:
            raise UserError("--kl_target adapts --kl_coefficient, which is 0; give it a first value above 0")
        if self.dual_clip is not None and self.objective == "cispo":
            raise UserError(
                "--dual_clip bounds a ratio, of which --objective cispo has no gradient; leave out one of the two"
            )

    def _require(self, good: bool, name: str, rule: str) -> None:
        if not good:
            raise UserError(f"--{name} is {getattr(self, name)}, it must be {rule}")

    def without_effect(self) -> list[str]:
        """A sentence about each option that differs from its default and changes nothing beside the others."""
        alike = "with one update a step, whose ratios are all 1: --minibatches or --update_epochs make more"
        groups = [
            (self.updates_per_step == 1, ("objective", "clip_low", "clip_high", "dual_clip", "value_clip"), alike),
            (not self.corrects_behaviour, ("behaviour_cap",), "without --behaviour_correction true or --overlap 1"),
            (not self.kl_coefficient, ("kl_in",), "with a --kl_coefficient of 0"),
            (self.kl_target is None, ("kl_gain",), "without --kl_target"),
            (self.reward_model is None, ("reward_model_weight",), "without --reward_model"),
            (not self.reward, ("reward_processes", "reward_timeout", "reward_memory_mb"), "without --reward"),
            (self.schedule == "constant", ("min_lr_ratio",), "with --schedule constant"),
        ]
        defaults = {one.name: one.default for one in fields(self)}
        return [
            f"--{name} {getattr(self, name)} is without effect {why}"
            for unused, names, why in groups
            for name in names
            if unused and getattr(self, name, None) not in (None, defaults.get(name))
        ]

    @property
    def answers_per_step(self) -> int:
        """Answers that are sampled for a step."""
        return self.prompts_per_step * self.samples_per_prompt

    @property
    def corrects_behaviour(self) -> bool:
        """Whether the loss is weighted by how likely the policy finds what the sampler drew."""
        return bool(self.overlap) if self.behaviour_correction is None else self.behaviour_correction

    @property
    def pays_for_more_than_rewards(self) -> bool:
        """Whether the loss has terms besides the advantages: then answers of advantage 0 have a gradient, too."""
        return bool(self.entropy_coefficient or (self.kl_coefficient and self.kl_in == "loss"))

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a step."""
        return self.minibatches * self.update_epochs


@dataclass
class GRPOOptions(RLOptions):
    __doc__ = f"""{cleandoc(RLOptions.__doc__ or "")}
    baseline: What an answer's reward is compared with: grpo: the group's mean, in units of its standard deviation;
        dr_grpo: the mean; rloo: the mean of the others.
"""

    baseline: Literal["grpo", "dr_grpo", "rloo"] = "grpo"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples_per_prompt < 2:
            raise UserError("--samples_per_prompt is 1: GRPO compares answers to the same prompt, give at least 2")
        if self.kl_in == "reward":
            raise UserError("--kl_in reward belongs to PPO; GRPO has the KL in its loss")


@dataclass
class PPOOptions(RLOptions):
    __doc__ = f"""{cleandoc(RLOptions.__doc__ or "")}
    critic_init: What the critic starts from: a reward model's run, or any other. null: the reward model if there is
        one, else the policy's --init.
    critic_learning_rate: Peak learning rate of the critic.
    critic_warmup: Steps in which only the critic learns; the policy's learning rate and its warm-up begin behind them.
    value_clip: Values may move so far from what they were at sampling before their gradient stops; null: no limit.
    gamma: Discount of later rewards.
    lam: λ of generalised advantage estimation.
    whiten_advantages: Bring the advantages of a step to mean 0 and variance 1.
"""

    save_dir: Path = Path("out/ppo")
    samples_per_prompt: int = 4
    kl_coefficient: float = 0.02
    kl_in: Literal["loss", "reward"] = "reward"
    critic_init: Path | None = None
    critic_learning_rate: float = 1e-4
    critic_warmup: int = 0
    value_clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "lam"):
            self._require(0 <= getattr(self, name) <= 1, name, "between 0 and 1")
        self._require(0 <= self.critic_learning_rate < math.inf, "critic_learning_rate", "a number of at least 0")
        self._require(0 <= self.critic_warmup < self.max_steps, "critic_warmup", "at least 0 and less than --max_steps")
        self._require(self.value_clip is None or self.value_clip > 0, "value_clip", "null or a number above 0")
