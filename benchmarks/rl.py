"""What reinforcement learning costs besides its models' work: publishing weights, waiting for each other, memory.

    python benchmarks/rl.py [--parts publish overlap memory] [--gpu] [--rounds 7] [--json FILE] [--markdown FILE]

publish: seconds from the policy's weights to a sampler that answers with them, at ZeRO stages 0 to 3 and by both
transports, against copying the same tensors within a process by one thread. A part of it is what the sampler does with
the new weights for its kernels (`Engine.refresh`), which it times itself.

overlap: seconds of a GRPO step with `--overlap 0` and `1`, policy and samplers with one thread each. With g seconds of
sampling and t of all the rest, both without overlap, a step of g + t can become max(g, t), so (g + t) / max(g, t) is
the most that can be gained; g and t are medians of the same rounds. It needs a core for each worker.

memory: resident memory of each role's process (RSS), and of all together, in GRPO with its reference and in PPO with
critic, reference and reward model: the largest seen from the third step on. On GPUs also what they hold there together.

Roles are on CPUs. With --gpu they are where a run has them by default: on one GPU they share it (and in `memory` take
turns, so that what sleeps is in the processes' memory), of several the policy and the samplers have their own.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from common import CONFIG_S, REPOSITORY, Contender, output_arguments, publish, running, spread
from grpo import prepare

from minigpt.observe.hardware import probe_machine

PARTS = ("publish", "overlap", "memory")
STAGES = (0, 1, 2, 3)
TRANSPORTS = ("object store", "broadcast")
WARMUP_ROUNDS = 6
# 90M parameters: buckets are full, and weights are most of a process
LARGE = {**CONFIG_S, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}
SMOKE = {**CONFIG_S, "hidden_size": 64, "num_hidden_layers": 1}
ROLES = ("Policy", "Critic", "Reference", "Reward", "Rollout")


def main() -> None:
    arguments = _arguments()
    if arguments.task:
        train(arguments)
        return
    measured = {"publish": measure_publishing, "overlap": measure_overlap, "memory": measure_memory}
    results: dict[str, Any] = {"benchmark": "Reinforcement learning"}  # the title of the JSON, which holds all parts
    for part in arguments.parts:
        with tempfile.TemporaryDirectory() as scratch:
            results[part], table = measured[part](arguments, Path(scratch))
        # now, so that whoever ends this loses only what is missing
        publish(f"Reinforcement learning: {part}", results, table, arguments.json, arguments.markdown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--gpu", action="store_true", help="roles on the GPUs that there are")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="GRPO steps of each contender in a round")
    parser.add_argument("--ranks", type=int, default=1, help="of the policy that publishes, on CPUs")
    parser.add_argument("--samplers", type=int, default=1, help="rollout workers when overlapping")
    parser.add_argument("--prompts", type=int, default=8, help="of a GRPO step, each with 4 answers of --tokens")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="of GRPO and PPO; by default the machine's best")
    output_arguments(parser)
    for name in ("--task", "--folder", "--save_dir", "--overlap"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.dtype = arguments.dtype or probe_machine(0.2).dtype
    if arguments.smoke and not arguments.task:
        arguments.rounds, arguments.steps, arguments.prompts, arguments.tokens = 1, 1, 2, 8
    return arguments


# -------------------------------------------------------------------------------------------------------------- publish


def measure_publishing(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
    """Seconds by stage and transport, round by round, and the table."""
    import torch

    from minigpt.rl import cluster

    torch.set_num_threads(1)
    prepare(folder, SMOKE if arguments.smoke else LARGE)
    cluster.connect()
    try:
        stages = STAGES[-1:] if arguments.smoke else STAGES
        found = {stage: publish_at(stage, arguments, folder / "init") for stage in stages}
    finally:
        cluster.disconnect()
    return found, publishing_table(found)


def publish_at(stage: int, arguments: argparse.Namespace, init: Path) -> dict[str, Any]:
    """A policy at a ZeRO stage and its first sampler: seconds of each round by what was done."""
    import ray
    import torch
    from ray.util import remove_placement_group

    from minigpt.rl.delivery import Delivery
    from minigpt.rl.group import WorkerGroup, place
    from minigpt.rl.layout import Role, bundles, choose_layout
    from minigpt.rl.workers import PolicyWorker, RolloutWorker
    from minigpt.trainer.setup import load_masters

    class Sampler(RolloutWorker):
        """Knows how long its kernels' preparation took the last time."""

        def setup(self) -> None:
            super().setup()
            refresh = self.engine.refresh

            def timed() -> int:
                started = time.perf_counter()
                version = refresh()
                self.seconds = time.perf_counter() - started
                return version

            self.engine.refresh = timed

        def kernel_seconds(self) -> float:
            return self.seconds

    job = _job(init, stage)
    layout = choose_layout("auto" if arguments.gpu else "laptop", int(ray.cluster_resources().get("GPU", 0)))
    on_gpu = layout["policy"].gpus > 0
    if not on_gpu:
        layout |= {"policy": Role(arguments.ranks, threads=1), "rollout": Role(threads=1)}
    needed = bundles(layout, ["policy", "rollout"])
    placement = place(needed, 60.0)
    policy = WorkerGroup(PolicyWorker, "policy", layout, needed, placement, (job,), 600.0)
    sampler = WorkerGroup(Sampler, "rollout", layout, needed, placement, (job,), 600.0)
    try:
        loading = sampler.all("setup")
        address = policy.wait([policy.one(0, "address")], "find a port")[0] if len(policy) > 1 else None
        policy.wait(policy.all("setup", address), "load")
        sampler.wait(loading, "load")
        delivery = Delivery(policy, sampler, lambda sentence: print(sentence, file=sys.stderr))
        delivery.setup("broadcast")
        backends = {"object store": None, "broadcast": delivery.backend}
        source = load_masters(init).to("cuda" if on_gpu else "cpu", torch.float32 if stage == 0 else torch.bfloat16)
        target = [torch.empty_like(p) for p in source.parameters()]
        versions = iter(range(10_000))

        @torch.no_grad()
        def copy() -> float:
            started = time.perf_counter()
            for old, new in zip(target, source.parameters(), strict=True):
                old.copy_(new)
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - started

        def by(transport: str) -> Callable[[], float]:
            def deliver() -> float:
                delivery.backend, version = backends[transport], next(versions)
                started = time.perf_counter()
                delivery.publish(version)
                sampler.wait([sampler.one(0, "load", delivery.for_worker(0, version))], "load")
                passed = time.perf_counter() - started
                (kernels,) = sampler.wait([sampler.one(0, "kernel_seconds")], "look at its clock")
                prepared.append(kernels)
                return passed

            return deliver

        prepared: list[float] = []
        seconds = _interleaved({**{name: by(name) for name in TRANSPORTS}, "copy": copy}, arguments.rounds)
    finally:
        policy.kill()
        sampler.kill()
        remove_placement_group(placement)
    size = sum(p.numel() * p.element_size() for p in source.parameters())
    return {"bytes": size, "ranks": len(policy), "by": backends["broadcast"], "kernels": prepared, **seconds}


def _job(init: Path, stage: int) -> Any:
    from minigpt.model.model_minigpt import MiniGPT
    from minigpt.rl.options import GRPOOptions
    from minigpt.rl.workers import Job

    options = GRPOOptions(
        save_dir=init.parent / "run",
        init=init,
        dtype="fp32" if stage == 0 else "bf16",
        compile=False,
        threads=1,
        deepspeed=REPOSITORY / "ds_configs" / f"zero{stage}.json",
    )
    config = MiniGPT.from_pretrained(init / "hf").config
    return Job(options, init, 256, 256, (0,), REPOSITORY / "minigpt" / "model", "grpo", config)


def _interleaved(tasks: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What every task returns in every round, every other backwards, after those that do not count.

    The store's memory is new in the first ones, and new memory takes longer to get than to fill.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(-WARMUP_ROUNDS, rounds):
        for name in tasks if number % 2 == 0 else reversed(tasks):
            found = tasks[name]()
            if number >= 0:
                seconds[name].append(found)
    return seconds


def publishing_table(found: dict[int, dict[str, Any]]) -> str:
    """Markdown: milliseconds, how many copies they are worth, and what of them the kernels' preparation took."""
    first = next(iter(found.values()))
    lines = [
        f"Publishing and loading, a policy of {first['ranks']} rank(s), broadcast by {first['by']}:",
        "",
        "| ZeRO | MB | copy, ms | object store, ms | / copy | broadcast, ms | / copy | of it kernels, ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for stage, seconds in found.items():
        cells = []
        for transport in TRANSPORTS:
            ratios = [moved / copied for moved, copied in zip(seconds[transport], seconds["copy"], strict=True)]
            cells += [f"{1e3 * statistics.median(seconds[transport]):.0f}", _range(ratios)]
        copy, kernels = (f"{1e3 * statistics.median(seconds[name]):.0f}" for name in ("copy", "kernels"))
        lines.append(f"| {stage} | {seconds['bytes'] / 1e6:.0f} | {copy} | {' | '.join(cells)} | {kernels} |")
    return "\n".join(lines)


def _range(values: Sequence[float]) -> str:
    s = spread(values)
    return f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"


# -------------------------------------------------------------------------------------------------------------- overlap


def measure_overlap(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
    """Seconds of a step with and without overlap, the bound, and the table."""
    prepare(folder, SMOKE if arguments.smoke else CONFIG_S)
    (folder / "layout.yaml").write_text(
        f"policy: {{threads: 1}}\nrollout: {{workers: {arguments.samplers}, threads: 1}}\n"
    )
    contenders = [_contender(arguments, folder, "grpo", overlap) for overlap in (0, 1)]
    rounds = _step_seconds(contenders, arguments.rounds, arguments.steps)
    found = overlap_and_bound(rounds[0], rounds[1])
    s = {name: statistics.median(values) for name, values in found.items()}
    table = "\n".join(
        [
            f"A GRPO step in {arguments.dtype}, one policy and {arguments.samplers} sampler(s), a thread each:",
            "",
            "| without overlap, s | of it sampling | with overlap, s | gain | at most | share |",
            "|---:|---:|---:|---:|---:|---:|",
            f"| {s['apart']:.3f} | {s['sampling']:.3f} | {s['overlapped']:.3f} | {_range(found['gain'])} | "
            f"{_range(found['bound'])} | {_range(found['share'])} |",
        ]
    )
    return found, table


def _step_seconds(contenders: list[Contender], rounds: int, steps: int) -> list[list[dict[str, float]]]:
    """For each contender, the mean record of a step in each round: seconds by the trainer's own clock."""
    found: list[list[dict[str, float]]] = [[] for _ in contenders]
    with running(contenders, warmup_steps=3):
        for number in range(rounds):
            for index in range(len(contenders)) if number % 2 == 0 else reversed(range(len(contenders))):
                contender = contenders[index]
                contender.signal(signal.SIGCONT)
                first, _ = contender.wait_for_step()  # it was under way when it was stopped
                for _ in range(steps):
                    last, _ = contender.wait_for_step()
                contender.signal(signal.SIGSTOP)
                records = contender.lines[-steps:]
                sampling = statistics.fmean(record["seconds_generate"] for record in records)
                found[index].append({"step": (last - first) / steps, "sampling": sampling})
    return found


def overlap_and_bound(apart: list[dict[str, float]], overlapped: list[dict[str, float]]) -> dict[str, list[float]]:
    """Round by round: seconds of both kinds of step, the gain, the most there is, and the share of it."""
    found: dict[str, list[float]] = {
        "apart": [record["step"] for record in apart],
        "sampling": [record["sampling"] for record in apart],
        "overlapped": [record["step"] for record in overlapped],
    }
    found["gain"] = [a / b for a, b in zip(found["apart"], found["overlapped"], strict=True)]
    found["bound"] = [step / max(g, step - g) for step, g in zip(found["apart"], found["sampling"], strict=True)]
    found["share"] = [gain / bound for gain, bound in zip(found["gain"], found["bound"], strict=True)]
    return found


# --------------------------------------------------------------------------------------------------------------- memory


def measure_memory(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
    """Megabytes of each role in GRPO and in PPO, and the table."""
    from minigpt.model.model_critic import RewardModel
    from minigpt.trainer.setup import load_masters

    prepare(folder, SMOKE if arguments.smoke else LARGE)
    RewardModel.from_decoder(load_masters(folder / "init")).save_pretrained(folder / "reward", tokenizer_folder=None)
    (folder / "layout.yaml").write_text("rollout: {threads: 1}\n")
    found = {}
    for name in ("grpo", "ppo"):
        contender = _contender(arguments, folder, name, 0)
        largest: dict[str, float] = {}
        with gpu_memory(largest), running([contender], warmup_steps=2):
            contender.signal(signal.SIGCONT)
            for _ in range(arguments.steps):
                contender.wait_for_step()
                assert contender.process is not None
                for role, megabytes in role_memory(contender.process.pid).items():
                    largest[role] = max(largest.get(role, 0.0), megabytes)
        found[name] = largest
    return found, memory_table(found)


@contextmanager
def gpu_memory(largest: dict[str, float]) -> Iterator[None]:
    """Put into `largest` the most MB that others hold on all GPUs meanwhile; nothing where there is none."""
    import torch

    if not torch.cuda.is_available():
        yield
        return

    def held() -> float:
        free_and_total = [torch.cuda.mem_get_info(device) for device in range(torch.cuda.device_count())]
        return sum(total - free for free, total in free_and_total) / 1e6

    ended, before, seen = threading.Event(), held(), [0.0]

    def watch() -> None:
        while not ended.wait(0.01):
            seen.append(max(seen.pop(), held() - before))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    largest["GPU"] = seen[0]


def role_memory(pid: int) -> dict[str, float]:
    """Resident MB of the actors below a process, by role: Ray puts their class into their title."""
    found: dict[str, float] = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            title, used = (process.cmdline() or [""])[0], process.memory_info().rss / 1e6
        except psutil.Error:  # it ended while we looked
            continue
        for role in ROLES:
            if title.startswith(f"ray::{role}Worker"):
                found[role] = found.get(role, 0.0) + used
    return found


def memory_table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: MB by role and algorithm, and together."""
    lines = [
        "Resident memory, MB:",
        "",
        f"| | {' | '.join(ROLES)} | together | on GPUs |",
        "|---|" + "---:|" * (len(ROLES) + 2),
    ]
    together = {name: sum(used.get(role, 0.0) for role in ROLES) for name, used in found.items()}
    for name, used in found.items():
        cells = " | ".join(f"{used[role]:.0f}" if role in used else "" for role in ROLES)
        on_gpus = f"{used['GPU']:.0f}" if "GPU" in used else ""
        lines.append(f"| {name.upper()} | {cells} | {together[name]:.0f} | {on_gpus} |")
    return "\n".join([*lines, "", f"GRPO takes {together['grpo'] / together['ppo']:.2f} of PPO's memory."])


# ---------------------------------------------------------------------------------------------------------- what is run


def _contender(arguments: argparse.Namespace, folder: Path, task: str, overlap: int) -> Contender:
    save_dir = folder / f"{task}{overlap}"
    command = [
        *(sys.executable, str(Path(__file__).resolve()), "--task", task, "--folder", str(folder)),
        *("--save_dir", str(save_dir), "--overlap", str(overlap)),
        *("--prompts", str(arguments.prompts), "--tokens", str(arguments.tokens), "--dtype", arguments.dtype),
        *(["--gpu"] if arguments.gpu else []),
    ]
    name = f"{task}, overlap {overlap}"
    return Contender(name, command, save_dir / "metrics.jsonl", folder / f"{task}{overlap}.log")


def train(arguments: argparse.Namespace) -> None:
    """`minigpt train grpo` or `ppo` until it is killed; random weights, so that no answer ends early."""
    from minigpt.rl import run
    from minigpt.rl.options import GRPOOptions, PPOOptions

    folder = Path(arguments.folder)
    options = (PPOOptions if arguments.task == "ppo" else GRPOOptions)(
        data=[folder / "world" / "prompt.jsonl"],
        save_dir=Path(arguments.save_dir),
        init=folder / "init",
        reward=["length"],
        prompts_per_step=arguments.prompts,
        samples_per_prompt=4,
        max_new_tokens=arguments.tokens,
        max_steps=100_000,
        learning_rate=1e-6,
        kl_coefficient=0.04,
        kl_in="reward" if arguments.task == "ppo" else "loss",
        overlap=int(arguments.overlap),
        layout="auto" if arguments.gpu else str(folder / "layout.yaml"),
        dtype=arguments.dtype,
        compile=False,
        threads=1,
        eval_prompts=1,
        tensorboard=False,
    )
    if arguments.task == "ppo":
        options = replace(options, reward_model=folder / "reward")
    run.train(options, arguments.task)


if __name__ == "__main__":
    main()
