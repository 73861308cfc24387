"""A run of PPO or GRPO from its folder to its folder: set up, resume, loop, evaluate, save, export."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from minigpt.dataset.chat import ChatEncoder
from minigpt.dataset.shards import PackedDataset
from minigpt.errors import UserError
from minigpt.generation.load import stage_of
from minigpt.model.hf import load_generation_config, read_config
from minigpt.observe.hardware import describe_hardware, package_version, source_commit
from minigpt.trainer import checkpoint
from minigpt.trainer.engine import Processes, check_deepspeed_config
from minigpt.trainer.loop import GracefulStop
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.run import PACKAGES, SUMMARY, Run, write_text, writing_results
from minigpt.trainer.setup import Source, check_packed_for, model_folder, prepare_data, tokenizer_of, with_init

from . import cluster
from .batch import RolloutBatch, choose_row_length
from .cluster import SUBMITTED
from .group import WorkerDied, WorkerFailed
from .loop import STOPPING_SECONDS, Loop, Position
from .options import RLOptions
from .prompts import PromptSource
from .reward_pool import RewardPool
from .roles import Roles
from .workers import Job, PolicyStage

ALONE = Processes(0, 0, 1, torch.device("cpu"))
FOLLOWS = ("reason", "dpo", "sft")
LONG_ROW = 1024  # tokens of a packed row, if the sequences themselves are not longer
SAMPLED_BY = {  # options that say which answers are sampled for a step, and how
    "overlap", "prompts_per_step", "samples_per_prompt", "max_new_tokens", "temperature", "thinking", "seed",
}  # fmt: skip


class RLStage(PolicyStage):
    """What a run of reinforcement learning starts from."""

    packed_as = "prompt"
    follows = FOLLOWS


def train(options: RLOptions, name: str) -> dict[str, Any]:
    """Run PPO or GRPO from wherever its folder stands to exported weights; returns what summary.json holds.

    Args:
        options: `GRPOOptions` or `PPOOptions`.
        name: grpo or ppo.

    Errors: UserError for everything that a person can mend.
    """
    stage = RLStage(name)
    run = Run(name, options, ALONE)  # type: ignore[arg-type]  # it reads the options that both kinds have
    if (summary := run.finished_summary()) is not None:
        return summary
    _check_save_dir(options.save_dir)
    check_deepspeed_config(options.deepspeed)
    options = with_init(stage, options)
    run.options = options  # type: ignore[assignment]
    init = options.init
    assert init is not None
    model_folder(init)
    _check_judges(options, init)
    run.open()
    if stage_of(init) == "pretrain":
        run.say(
            f"{init} is a pretrained model that never saw a chat: it will hardly answer or stop, and rewards cannot "
            "teach it what it never does; fine-tune it first (minigpt train sft --init …) and start from that"
        )
    encoder = _encoder(init)
    source, heldout = _prompts(stage, options, init)
    if heldout is None:
        run.say(
            "no prompts are held out, so nothing is evaluated (--eval_interval, --eval_prompts): give some, --eval_data"
        )
    for sentence in options.without_effect():
        run.say(sentence)
    config = read_config(model_folder(init))  # the weights are read by the workers alone
    limit = config.max_position_embeddings
    prompts = PromptSource(source.train, encoder, options.thinking, options.seed, limit - 1)
    judged = None if heldout is None else PromptSource(heldout, encoder, options.thinking, options.seed, limit - 1)
    for asked in filter(None, (prompts, judged)):
        _check_answers(options, asked)
    longest_prompt = max(prompts.longest, judged.longest if judged else 0)
    longest = min(limit, longest_prompt + options.max_new_tokens)
    if longest < longest_prompt + options.max_new_tokens:
        run.say(
            f"the model's context of {limit} leaves {limit - longest_prompt} tokens behind the longest prompt: answers "
            f"to it are cut off there, not at --max_new_tokens {options.max_new_tokens}"
        )
    answers = options.answers_per_step // options.minibatches
    most = min(limit, LONG_ROW, options.micro_batch_tokens or LONG_ROW)
    job = Job(
        options=_with_absolute_paths(options),
        init=init.resolve(),
        row_length=choose_row_length(longest, answers, most),
        longest=longest,
        stop_ids=_stop_ids(init, encoder),
        tokenizer=model_folder(init).resolve(),
        name=name,
        config=config,
    )
    pool = (
        RewardPool(
            options.reward,
            processes=options.reward_processes,
            timeout=options.reward_timeout,
            memory_mb=options.reward_memory_mb,
        )
        if options.reward
        else None
    )
    try:
        cluster.connect(options.ray_address)
        with GracefulStop() as stop:
            resume = options.resume == "auto"
            for attempt in range(options.restarts + 1):
                trial = _Attempt(run, job, source.train, prompts, judged, pool, stop)
                try:
                    return trial.go(resume)
                except WorkerDied as death:
                    run.pause()
                    resume = resume or trial.saved
                    saved = resume and checkpoint.list_checkpoints(options.save_dir)
                    if stop.asked:  # the signal may have gone to the worker, too
                        run.say(f"{death}; stopped, {_how_to_go_on(run, bool(saved))}")
                        raise SystemExit(128 + stop.signal_number) from death
                    if attempt == options.restarts:
                        raise UserError(f"{death}; {_how_to_go_on(run, bool(saved))}") from death
                    where = "from the last checkpoint" if saved else "from the beginning, since nothing was saved yet"
                    run.say(f"{death}; starting its group again {where}")
        raise AssertionError
    except WorkerFailed as failure:
        run.pause()
        print(failure.traceback, file=sys.stderr, flush=True)
        raise UserError(f"{failure}; its traceback stands above") from failure
    finally:
        run.pause()
        if pool is not None:
            pool.close()
        cluster.disconnect()


class _Attempt:
    """A run from its newest checkpoint until it is done or a trainer's worker dies."""

    def __init__(
        self,
        run: Run,
        job: Job,
        data: PackedDataset,
        prompts: PromptSource,
        heldout: PromptSource | None,
        pool: RewardPool | None,
        stop: GracefulStop,
    ) -> None:
        self.run, self.job, self.data, self.stop = run, job, data, stop
        self.options, self.prompts, self.heldout, self.pool = job.options, prompts, heldout, pool
        self.saved = False  # whether there is a checkpoint of this attempt
        self.network = SimpleNamespace(config=job.config)

    def go(self, resume: bool) -> dict[str, Any]:
        """Until the end; from the newest checkpoint if `resume` says so."""
        roles = Roles(self.job, self.run.say)
        try:
            self.facts = roles.setup()
            self.run.clear()  # now: nothing is left that could be found wrong
            position, answers = self._resume(roles, resume)
            self.loop = Loop(
                self.options, roles, self.pool, self.prompts, self.heldout, self.job.stop_ids, position, answers
            )
            return self._steps(roles, position)
        finally:
            roles.close()

    def _resume(self, roles: Roles, resume: bool) -> tuple[Position, RolloutBatch | None]:
        """Where to go on, and the answers that were under way there."""
        o = self.options
        fresh = Position(kl_coefficient=o.kl_coefficient), None
        if not resume:
            return fresh
        run_folder = self.run.folder.resolve()  # the workers are in other working directories
        critics = run_folder / "critic" if "critic" in self.facts else None
        found = checkpoint.newest_good(run_folder, self.run.say, critics)
        if found is None:
            return fresh
        folder, state = found
        self._check_resumable(state)
        roles.load(folder, None if critics is None else checkpoint.checkpoint_folder(critics, state["step"]))
        self.run.say(f"resuming from {folder} at step {state['step']} of {o.max_steps}")
        position = Position(**state["position"])
        before = state["options"]
        adapted = o.kl_target is not None and before.get("kl_target") is not None
        if not adapted or before["kl_coefficient"] != o.kl_coefficient:  # else it goes on from where it was moved to
            position.kl_coefficient = o.kl_coefficient
        return position, _answers_under_way(state, o)

    def _check_resumable(self, state: dict[str, Any]) -> None:
        """Errors: UserError when what is learned from would be something else than it was."""
        identity = self._engine_identity()
        before, now = (one.get("reference_hash") for one in (state, identity))
        if before is None or now is None:  # the KL's coefficient was 0, or is it now: that option is said
            identity["reference_hash"] = before
        self.run.check_resumable(state, self.data, self.network, identity)
        before, now = (one.get("reward_hash") for one in (state, identity))
        if before is not None and now is not None and before != now:
            raise UserError(
                f"the checkpoint in {self.run.folder} was rewarded by other weights than those that --reward_model "
                "gives now; give the --reward_model that it was made with, or start anew with --overwrite, or give "
                "another --save_dir"
            )

    def _engine_identity(self) -> dict[str, Any]:
        policy = self.facts["policy"]
        keys = ("precision", "zero_stage", "optimizer", "frozen_hash", "trained_layout")
        judges = {f"{role}_hash": self.facts[role]["hash"] for role in ("reference", "reward") if role in self.facts}
        return {**{key: policy[key] for key in keys}, **judges}

    def _steps(self, roles: Roles, position: Position) -> dict[str, Any]:
        o, run, loop = self.options, self.run, self.loop
        evaluated = position.evaluated_step == position.step
        run.start(self._description(), o.max_steps, position.step, None, torch.float32, evaluated)
        roles.publish(position.step)
        if not position.first_evaluation:
            position.first_evaluation = self._evaluate(position)
        while position.step < o.max_steps:
            due = o.eval_interval and position.step % o.eval_interval == 0
            if due and position.evaluated_step != position.step:
                position.last_evaluation = self._evaluate(position)
            metrics = loop.step()
            last = position.step == o.max_steps
            if position.step % o.log_interval == 0 or last or position.step == 1:
                record = {"kind": "train", **metrics, "seconds": position.seconds, "tokens": position.tokens}
                run.log(position.step, record)
            if last or (o.save_interval and position.step % o.save_interval == 0) or self.stop.asked:
                self._save(roles, position)
            if self.stop.asked:
                run.say(f"stopped at step {position.step}; {run.same_command} goes on from here")
                raise SystemExit(128 + self.stop.signal_number)
        if position.evaluated_step != position.step:
            position.last_evaluation = self._evaluate(position)
        return self._finish(roles, position)

    def _evaluate(self, position: Position) -> dict[str, Any]:
        started = time.perf_counter()
        found = self.loop.evaluate()
        if found:
            numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
            numbers["seconds_eval"] = time.perf_counter() - started
            self.run.log(position.step, {"kind": "eval", **numbers, "tokens": position.tokens})
        position.evaluated_step = position.step
        return found

    def _save(self, roles: Roles, position: Position) -> None:
        answers = self.loop.answers_under_way(lambda: self.stop.asked)
        if answers is None and position.under_way is not None:
            self.run.say(
                f"the answers under way did not come within {STOPPING_SECONDS:g} s: the next step's prompts will be "
                "answered again, by newer weights, so the result will differ from an undisturbed run's"
            )
        state = {
            "step": position.step,
            "position": asdict(position),
            "answers": None if answers is None else answers.to_text(),
            **self.run.identity(self.data, self.network),
            **self._engine_identity(),
        }
        roles.save(self.run.folder.resolve(), json.loads(json.dumps(state, default=str)))
        self.saved = True

    def _finish(self, roles: Roles, position: Position) -> dict[str, Any]:
        written = roles.export(self.run.folder.resolve())
        first, last, results = position.first_evaluation, position.last_evaluation, position.results
        summary = {
            "stage": self.job.name,
            "recipe": self.options.recipe,
            "steps": position.step,
            "tokens": position.tokens,
            "loss": results.get("loss"),
            "reward": results.get("reward"),
            "before": first,
            "after": last,
            "seconds": position.seconds,
            "tokens_per_second": results.get("tokens_per_second"),
            "parameters": self.facts["policy"]["parameters"],
            "vocab_size": self.network.config.vocab_size,
            "zero_stage": self.facts["policy"]["zero_stage"],
            "init": f"from {self.job.init}",
            "fingerprint": self.data.fingerprint,
            "hardware": describe_hardware(),
            "versions": {name: package_version(name) for name in (*PACKAGES, "ray")},
            "commit": source_commit(),
        }
        with writing_results(self.run.folder, self.options):
            write_text(self.run.folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False, default=str) + "\n")
        if first and last:
            what = "accuracy" if "accuracy" in first and "accuracy" in last else "reward"  # they may have changed
            self.run.say(f"held-out {what}: {first[what]:.3f} before, {last[what]:.3f} after {position.step} steps")
        self.run.say(f"{self.job.name}: {'  and  '.join(written)}")
        return summary

    def _description(self) -> str:
        o, policy = self.options, self.facts["policy"]
        models = " + ".join(f"{name} ({len(group)})" for name, group in self.loop.roles.groups.items())
        compiled = ", compiled" if policy["compiled"] else ""
        return (
            f"{policy['parameters'] / 1e6:.2f}M parameters (from {self.job.init}); {len(self.data):,} prompts; a step: "
            f"{o.prompts_per_step} prompts x {o.samples_per_prompt} answers of up to {o.max_new_tokens} tokens, "
            f"{o.updates_per_step} updates in passes of {policy['rows']} rows of {self.job.row_length} tokens; "
            f"{policy['precision']}{compiled}, {policy['optimizer']}, ZeRO stage {policy['zero_stage']}; {models}"
        )


def _answers_under_way(state: dict[str, Any], options: RLOptions) -> RolloutBatch | None:
    """The answers that a checkpoint holds for the step after it; None: there are none (also in one of an earlier
    MiniGPT), or other ones would be sampled now."""
    now = asdict(options)
    if not state.get("answers") or any(state["options"].get(name) != now[name] for name in SAMPLED_BY):
        return None
    return RolloutBatch.from_text(state["answers"])


def _how_to_go_on(run: Run, saved: bool) -> str:
    if saved:
        return f"{run.same_command} goes on from the last checkpoint in {run.folder}"
    return "no checkpoint was saved yet, so the run has to begin anew; --save_interval N saves one every N steps"


def _prompts(stage: RLStage, options: RLOptions, init: Path) -> tuple[Source, PackedDataset | None]:
    """The prompts of training, and those held out."""
    packing = TrainOptions(
        data=options.data,
        save_dir=options.save_dir,
        init=init,
        seq_len=options.max_prompt_tokens,
        seed=options.seed,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    source = prepare_data(stage, packing, ALONE)
    asked = options.eval_data
    if asked is None and options.data is None:  # sums of operands that stand nowhere in the micro-world
        asked = [options.save_dir / "microworld" / "heldout_sums.jsonl"]
    if asked is None:
        heldout = source.valid
    else:
        folder = options.save_dir / "heldout"
        judged = replace(packing, data=asked, save_dir=folder)
        judged_source = prepare_data(stage, judged, ALONE, valid_fraction=0)
        heldout = judged_source.valid
        if heldout is not None:
            print(f"--eval_data: the {len(heldout)} held-out prompts of {heldout.folder}", flush=True)
        elif judged_source.train.fingerprint == source.train.fingerprint:
            raise UserError(
                f"--eval_data {judged_source.train.folder} is what is trained on, and nothing of it is held out: give "
                "other prompts, or pack it again with --valid_fraction 0.02"
            )
        else:
            heldout = judged_source.train
    for data in filter(None, (source.train, heldout)):
        check_packed_for(init, data)
    if heldout is not None and asked is not None:
        _say_what_is_trained_on(source.train, heldout)
    return source, heldout


def _say_what_is_trained_on(train: PackedDataset, heldout: PackedDataset) -> None:
    """Raw files may be those of `--data`, or share prompts with them."""
    trained = {train.row(row).prompt_ids.tobytes() for row in range(len(train))}
    common = sum(heldout.row(row).prompt_ids.tobytes() in trained for row in range(len(heldout)))
    if common:
        print(f"--eval_data: {common} of its {len(heldout)} prompts are trained on too, so not held out", flush=True)


def _with_absolute_paths(options: RLOptions) -> RLOptions:
    """The options for workers, whose working directory is that of their node's Ray."""
    names = ("save_dir", "deepspeed", "reward_model", "critic_init")
    paths = {name: path for name in names if (path := getattr(options, name, None)) is not None}
    return replace(options, **{name: path.resolve() for name, path in paths.items()})


def _check_save_dir(folder: Path) -> None:
    if os.environ.get(SUBMITTED) and not folder.is_absolute():
        raise UserError(f"--save_dir {folder} would be thrown away with the job's folder: give an absolute path")


def _check_answers(options: RLOptions, prompts: PromptSource) -> None:
    """The reward `accuracy` compares with a known answer, so every prompt must have one."""
    if not any(spec.split("=")[0] == "accuracy" for spec in options.reward):
        return
    unanswered = prompts.unanswered
    if unanswered:
        raise UserError(
            f"{unanswered} of {len(prompts.data)} prompts in {prompts.data.folder} have no answer to compare with, "
            "which the reward accuracy needs: give other rewards with --reward, or none by --reward=[] beside "
            "--reward_model"
        )


def _check_judges(options: RLOptions, init: Path) -> None:
    """Reward model and critic read the policy's ids, so their tokenizer must be the policy's."""
    for option in ("reward_model", "critic_init"):
        other = getattr(options, option, None)
        if other is not None and len({tokenizer_of(init), tokenizer_of(other, option)} - {None}) > 1:
            raise UserError(
                f"--{option} {other} has another tokenizer than {init}: train it on the same model, or give another"
            )


def _encoder(init: Path) -> ChatEncoder:
    return ChatEncoder(model_folder(init))


def _stop_ids(init: Path, encoder: ChatEncoder) -> tuple[int, ...]:
    ends = load_generation_config(model_folder(init)).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tuple(dict.fromkeys([*ids, encoder.im_end_id, encoder.eos_id]))
