"""The compiled kernels of a CPU against the same in torch: attention of packed rows, and the output layer's loss.

    python benchmarks/kernels.py [--rounds 7] [--threads 2] [--dtype bf16] [--json FILE] [--markdown FILE]

Milliseconds of a forward and a backward pass in the precision that the machine trains in, the two in turn within every
round. Attention: one layer, document by document, `attention.cpp` against torch's flash kernel. Loss: 4,096 tokens,
hidden 256, vocabulary 6,400, `cross_entropy.cpp` against torch's operators, which get the same tokens to work on.
Log-probabilities with the entropy: 2,048 tokens, which is what a pass of reinforcement learning has here; and with the
logits kept for the backward pass, as they are, against computing them again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from common import output_arguments, publish, spread

from minigpt.model import attention, cross_entropy
from minigpt.model.native import load_native
from minigpt.observe.hardware import probe_machine

Times = tuple[list[float], list[float]]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Documents in tokens, query and key/value heads, head size. Instructions and chats: drawn from exponential lengths.
ATTENTION = {
    "8 rows of 512, documents of 195 on average, 8/4 heads of 32": (8, 512, 195, 8, 4, 32),
    "16 rows of 256, documents of 79 on average, 8/4 heads of 32": (16, 256, 79, 8, 4, 32),
    "2 rows of 2,048, one document each, 8/4 heads of 32": (2, 2048, None, 8, 4, 32),
    "2 rows of 2,048, one document each, 12/4 heads of 64": (2, 2048, None, 12, 4, 64),
}
LABELLED = {"loss, all tokens labelled": 1.0, "loss, 66 % labelled": 0.66}
LOG_PROBS = {"log-probabilities and entropy, half the tokens, 60 % labelled": 0.6}


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    attention_cases = dict(list(ATTENTION.items())[:1]) if arguments.smoke else ATTENTION
    dtype = DTYPES[arguments.dtype or probe_machine(0.2).dtype]
    tokens = 512 if arguments.smoke else 4096
    cases = {name: attention_pass(*shape, dtype) for name, shape in attention_cases.items()}
    cases |= {name: loss_pass(fraction, tokens, dtype) for name, fraction in LABELLED.items()}
    cases |= {name: log_probs_pass(fraction, tokens // 2, dtype) for name, fraction in LOG_PROBS.items()}
    rounds = 1 if arguments.smoke else arguments.rounds
    found = {name: compare(one, rounds, compiled_or_torch) for name, one in cases.items()}
    again = {name: compare(cases[name], rounds, kept_or_again) for name in LOG_PROBS}
    table = [*table_of(found, f"{dtype}", "C++", "torch"), "", *table_of(again, "logits", "kept", "again")]
    results = {"milliseconds": found, "logits_kept_or_again": again}
    publish("Kernels", results, "\n".join(table), arguments.json, arguments.markdown)


def table_of(found: dict[str, Times], title: str, ours: str, theirs: str) -> list[str]:
    """Medians of both, and the ratios of the rounds, in Markdown."""
    lines = [f"| {title} | {ours}, ms | {theirs}, ms | {theirs} / {ours} |", "|---|---:|---:|---:|"]
    for name, (first, second) in found.items():
        ratio = spread([b / a for a, b in zip(first, second, strict=True)])
        cells = f"{statistics.median(first):.1f} | {statistics.median(second):.1f}"
        lines.append(f"| {name} | {cells} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |")
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=list(DTYPES))
    output_arguments(parser)
    return parser.parse_args()


def document_lengths(rows: int, row_length: int, mean: float | None) -> list[int]:
    """Of packed rows without padding; `mean` None: one document a row."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(rows):
        left = row_length
        while left:
            drawn = left if mean is None else int(torch.empty(()).exponential_(1 / mean, generator=generator))
            found.append(min(left, max(4, drawn)))
            left -= found[-1]
    return found


def attention_pass(
    rows: int, row_length: int, mean: float | None, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Callable[[], object]:
    """Forward and backward of one layer's attention."""
    lengths = document_lengths(rows, row_length, mean)
    edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    q, k, v = (
        torch.randn(rows * row_length, h, head_dim).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)
    )
    upstream = torch.randn(q.shape).to(dtype)
    operator = torch.ops.minigpt.document_attention
    return lambda: torch.autograd.grad(operator(q, k, v, edges)[0], (q, k, v), upstream)


def loss_pass(labelled: float, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of the output layer with its loss."""
    x, weight, labels = output_layer(labelled, tokens, dtype)
    ones = torch.ones(tokens)
    return lambda: torch.autograd.grad(cross_entropy.linear_cross_entropy(x, weight, labels, ones), (x, weight))


def log_probs_pass(labelled: float, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of the output layer as a policy's update wants it."""
    x, weight, labels = output_layer(labelled, tokens, dtype)
    upstream = torch.randn(tokens)

    def one_pass() -> object:
        log_probs, _ = cross_entropy.linear_log_probs_and_entropy(x, weight, labels)
        return torch.autograd.grad(log_probs, (x, weight), upstream)

    return one_pass


def output_layer(labelled: float, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, the layer's weight, and labels for a part of the tokens."""
    x = torch.randn(tokens, 256).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(6400, 256)).to(dtype).requires_grad_()
    return x, weight, torch.where(torch.arange(tokens) < labelled * tokens, torch.randint(0, 6400, (tokens,)), -100)


def compiled_or_torch(ours: bool) -> None:
    """Compute with the compiled code, or with torch's operators."""
    load = load_native if ours else lambda source: None
    attention.load_native = cross_entropy.load_native = load  # type: ignore[attr-defined, assignment]


def kept_or_again(ours: bool, limit: int = cross_entropy._KEPT_ELEMENTS) -> None:
    """Keep the logits of a forward pass for its backward pass, or compute them again."""
    compiled_or_torch(True)
    cross_entropy._KEPT_ELEMENTS = limit if ours else 0


def compare(one_pass: Callable[[], object], rounds: int, choose: Callable[[bool], None]) -> Times:
    """Milliseconds of both, round by round, as `choose` sets them up; the first round is not counted."""
    times: Times = [], []
    for number in range(rounds + 1):
        for kind, ours in enumerate((True, False)):
            choose(ours)
            started = time.perf_counter()
            one_pass()
            if number:
                times[kind].append(1000 * (time.perf_counter() - started))
    return times


if __name__ == "__main__":
    main()
