"""Where the time of a training step goes, ours and the peer's, by group of operations (rows of 256 tokens).

    python benchmarks/profile_step.py [--contenders ours peer] [--threads 1] [--steps 5] [--operations 20]

The first line of each is measured without the profiler, in CPU time: on one thread (the default) it means something on
a busy machine too. The groups are wall time by the profiler, best read as shares. The compiled pointwise kernels of a
CPU run inside the compiled graph, so what the graph spends in itself is theirs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import CONFIG_S, packed_microworld
from torch.profiler import ProfilerActivity, profile

WARMUP_STEPS = 3
# The first group that has a word of an operation's name takes it.
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention kernel", ("scaled_dot_product", "flash", "document_attention", "varlen", "fmha")),
    ("optimizer", ("adam", "foreach", "clip_grad", "linalg_vector_norm", "multi_tensor")),
    ("matrix products", ("mm", "matmul", "linear", "gemm", "cutlass", "nvjet")),
    ("compiled pointwise", ("compiledfxgraph", "triton", "cpp_fused", "graph_")),
    ("copies and memory", ("copy", "fill", "zero", "empty", "memcpy", "memset", "cat", "_to_copy")),
)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data or packed_microworld(
            Path(scratch), "pretrain", 256, "tiny" if arguments.smoke else "small"
        )
        for name in arguments.contenders:
            step = STEPS[name](arguments, data)
            cpu_ms = cpu_milliseconds(step, arguments.steps)
            print(f"\n{name}: {cpu_ms:.1f} ms of CPU a step, {arguments.threads} thread(s), {arguments.rows} rows")
            print(report(profile_steps(step, arguments.steps), arguments.steps, arguments.operations))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=tuple(STEPS), default=list(STEPS))
    parser.add_argument("--data", type=Path, help="packed rows; the embedded micro-world when not given")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--operations", type=int, default=0, help="also list this many single operations")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--smoke", action="store_true", help="few rows and steps, eager: does it run at all")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rows, arguments.steps, arguments.compile = 2, 1, False
    return arguments


def _ours(arguments: argparse.Namespace, data: Path) -> Callable[[], None]:
    from minigpt.dataset.shards import BatchIterator, PackedDataset
    from minigpt.model.attention import choose_backend
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
    from minigpt.trainer.engine import Engine, init_processes
    from minigpt.trainer.loop import to_tensors
    from minigpt.trainer.stage import StageModule, language_model_loss

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    processes, packed_rows = init_processes(), PackedDataset(data, "train")
    model = MiniGPT(MiniGPTConfig(**CONFIG_S))
    model.attention_backend = choose_backend(processes.device, packed_rows.seq_len, dtype)
    module = StageModule(model, language_model_loss)
    engine = Engine(module, processes, dtype=dtype, learning_rate=1e-3, compile=arguments.compile)
    batches = iter(BatchIterator(packed_rows, micro_batch_size=arguments.rows, global_batch_size=arguments.rows))

    def step() -> None:
        batch = next(batches)
        engine.forward_backward(
            to_tensors(batch, processes.device, model.attention_backend), 1.0 / float(batch["weights"].sum())
        )
        engine.step(1e-3)

    return step


def _peer(arguments: argparse.Namespace, data: Path) -> Callable[[], None]:
    import peer_hf

    arguments = argparse.Namespace(**vars(arguments), **CONFIG_S)
    arguments.data, arguments.steps = data, 10**9
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one_step = peer_hf.make_step(peer_hf.build_model(arguments).to(device), arguments.dtype, arguments.compile, 1e-3)
    batches = peer_hf.batches(arguments, device)
    return lambda: float(one_step(next(batches)))  # type: ignore[return-value, arg-type]


STEPS: dict[str, Callable[[argparse.Namespace, Path], Callable[[], None]]] = {"ours": _ours, "peer": _peer}


def cpu_milliseconds(step: Callable[[], None], steps: int) -> float:
    """CPU time of the fastest of some steps, all threads together, after the warm-up."""
    for _ in range(WARMUP_STEPS):
        step()
    times = []
    for _ in range(steps):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return 1000 * min(times)


def profile_steps(step: Callable[[], None], steps: int) -> list[tuple[str, float]]:
    """Every operation's own time over all steps, in ms: on the GPU where there is one, else on the CPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return [(event.key, getattr(event, own) / 1000) for event in recorded.key_averages()]


def group_of(operation: str) -> str:
    """The group that an operation's time is counted to."""
    lowered = operation.lower()
    return next((group for group, words in GROUPS if any(word in lowered for word in words)), "everything else")


def report(operations: list[tuple[str, float]], steps: int, singles: int = 0) -> str:
    """Milliseconds a step and share of each group, the largest first; then single operations."""
    totals: dict[str, float] = {}
    for name, milliseconds in operations:
        totals[group_of(name)] = totals.get(group_of(name), 0.0) + milliseconds / steps
    whole = sum(totals.values())
    by_time = sorted(totals.items(), key=lambda item: -item[1])
    lines = [f"  {name:22s} {ms:9.1f} {ms / whole:6.1%}" for name, ms in [*by_time, ("together", whole)]]
    largest = sorted(operations, key=lambda item: -item[1])[:singles]
    return "\n".join(lines + [f"    {ms / steps:9.2f}  {name[:90]}" for name, ms in largest])


if __name__ == "__main__":
    main()
