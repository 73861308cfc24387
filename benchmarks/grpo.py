"""A GRPO step against TRL's, on the same model, prompts and lengths; and where our step's time goes.

    python benchmarks/grpo.py [--rounds 5] [--steps 3] [--threads 2] [--json FILE] [--markdown FILE]

Config S with random weights (so that no answer ends early), 8 prompts x 4 answers of 64 new tokens, β = 0.04, one
update a step. Ours is `minigpt train grpo`, in the precision that this machine is best at (or --dtype): Ray actors,
DeepSpeed ZeRO-1, reference model, rewards in a process of their own. TRL is its `GRPOTrainer` on the exported folder,
in fp32 and in bf16, with a reward of one line. They run interleaved (see `common.py`); the tokens are those generated.
The peer is not one of our dependencies: `pip install -c constraints.txt trl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import CONFIG_S, REPOSITORY, Contender, Rates, interleave, output_arguments, publish, spread

from minigpt.observe.hardware import probe_machine

PEERS = {"fp32": "TRL, fp32", "bf16": "TRL, bf16"}
PROMPTS, SAMPLES, NEW_TOKENS, BETA, RATE = 8, 4, 64, 0.04, 1e-6
PHASES = ("generate", "rewards", "reference_log_probs", "update_policy", "publish")


def main() -> None:
    arguments = _arguments()
    if arguments.task:
        {"ours": run_ours, "trl": run_trl}[arguments.task](arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, {**CONFIG_S, "hidden_size": 64, "num_hidden_layers": 1} if arguments.smoke else CONFIG_S)
        ours = f"MiniGPT, {arguments.dtype}"
        contenders = [
            _contender(arguments, folder, "ours", ours, folder / "run" / "metrics.jsonl", arguments.dtype),
            *(
                _contender(arguments, folder, "trl", name, folder / f"{precision}.jsonl", precision)
                for precision, name in PEERS.items()
                if precision in arguments.peers
            ),
        ]
        rates = interleave(contenders, rounds=arguments.rounds, steps=arguments.steps, warmup_steps=arguments.warmup)
        steps = contenders[0].lines[arguments.warmup :]
    phases = {name: statistics.median(step[f"seconds_{name}"] for step in steps) for name in (*PHASES, "step")}
    overhead = statistics.median(step["overhead"] for step in steps)
    result = {
        "rates": {name: [rate.per_second for rate in values] for name, values in rates.items()},
        "phases": phases,
        "overhead": overhead,
        "settings": {"threads": arguments.threads, "steps": arguments.steps, "rounds": arguments.rounds},
    }
    publish("A GRPO step", result, _table(rates, phases, overhead), arguments.json, arguments.markdown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each contender in a round")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of ours; by default the machine's best")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    output_arguments(parser)
    for name in ("--task", "--folder", "--progress", "--precision"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.task:
        arguments.dtype = arguments.dtype or probe_machine(0.2).dtype
    if arguments.smoke and not arguments.task:
        arguments.rounds, arguments.steps, arguments.warmup, arguments.compile = 1, 1, 1, False
    return arguments


def _contender(
    arguments: argparse.Namespace, folder: Path, task: str, name: str, progress: Path, precision: str
) -> Contender:
    command = [
        *(sys.executable, str(Path(__file__).resolve()), "--task", task, "--folder", str(folder)),
        *("--progress", str(progress), "--precision", precision, "--threads", str(arguments.threads)),
        "--compile" if arguments.compile else "--no-compile",
    ]
    return Contender(name, command, progress, folder / f"{task}-{precision}.log")


def prepare(folder: Path, shape: dict[str, int]) -> None:
    """A model with random weights, exported, and the micro-world's sums as prompts."""
    import torch

    from data_prep.microworld import MicroWorldOptions, write_microworld
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
    from minigpt.trainer.weights import write_language_model

    torch.manual_seed(0)
    model = MiniGPT(MiniGPTConfig(**shape))
    (folder / "init").mkdir()
    write_language_model(
        folder / "init",
        model,
        dict(model.state_dict()),
        name="sft",
        tokenizer_folder=REPOSITORY / "minigpt" / "model",
        stop_token="<|im_end|>",
        dtype="fp32",
    )
    write_microworld(folder / "world", MicroWorldOptions(size="tiny"))


def run_ours(arguments: argparse.Namespace) -> None:
    """`minigpt train grpo` until it is killed."""
    from minigpt.rl.options import GRPOOptions
    from minigpt.rl.run import train

    folder = Path(arguments.folder)
    options = GRPOOptions(
        data=[folder / "world" / "prompt.jsonl"],
        save_dir=folder / "run",
        init=folder / "init",
        reward=["length"],
        prompts_per_step=PROMPTS,
        samples_per_prompt=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        max_steps=100_000,
        learning_rate=RATE,
        kl_coefficient=BETA,
        dtype=arguments.precision,
        compile=arguments.compile,
        threads=arguments.threads,
        eval_prompts=1,
        tensorboard=False,
    )
    train(options, "grpo")


def run_trl(arguments: argparse.Namespace) -> None:
    """TRL's trainer until it is killed."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.folder)
    lines = (folder / "world" / "prompt.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = Dataset.from_list([{"prompt": json.loads(line)["messages"]} for line in lines])

    class Report(TrainerCallback):
        """A line of progress after each step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            record = {"step": state.global_step, "tokens": state.global_step * PROMPTS * SAMPLES * NEW_TOKENS}
            with open(arguments.progress, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "init" / "hf", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(folder / "init" / "hf"),
        reward_funcs=reward,
        train_dataset=prompts,
        callbacks=[Report()],
        args=GRPOConfig(
            output_dir=str(folder / f"trl-{arguments.precision}"),
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            beta=BETA,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_steps=100_000,
            bf16=arguments.precision == "bf16",
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
        ),
    )
    trainer.train()


def _table(rates: dict[str, list[Rates]], phases: dict[str, float], overhead: float) -> str:
    lines = ["| | generated tokens/s | seconds a step | ours / this |", "|---|---:|---:|---:|"]
    per_step, ours = PROMPTS * SAMPLES * NEW_TOKENS, next(iter(rates.values()))
    for name, values in rates.items():
        s = spread([value.per_second for value in values])
        compared = ""
        if values is not ours:
            r = spread([a.per_second / b.per_second for a, b in zip(ours, values, strict=True)])
            compared = f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"
        rate = f"{s['median']:,.0f} ({s['min']:,.0f} to {s['max']:,.0f})"
        lines.append(f"| {name} | {rate} | {per_step / s['median']:.2f} | {compared} |")
    parts = ", ".join(f"{name.replace('_', ' ')} {1000 * phases[name]:.0f} ms" for name in PHASES)
    lines += [
        "",
        f"Our step of {1000 * phases['step']:.0f} ms (median): {parts}. Neither sampling nor model: {overhead:.1%}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
