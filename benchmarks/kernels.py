"""The compiled kernels of a CPU against the same in torch: attention of packed rows, and the output layer's loss.

    python benchmarks/kernels.py [--rounds 7] [--threads 2] [--dtype bf16] [--json FILE] [--markdown FILE]

Milliseconds of a forward and a backward pass in the precision that the machine trains in, the two in turn within every
round. Attention: one layer,
document by document, `attention.cpp` against torch's flash kernel. Loss: 4,096 tokens, hidden 256, vocabulary 6,400,
`cross_entropy.cpp` against torch's operators, which get the same tokens to work on. Log-probabilities with the entropy:
2,048 tokens, which is what a pass of reinforcement learning has here.
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
    found = {name: compare(one, 1 if arguments.smoke else arguments.rounds) for name, one in cases.items()}
    lines = [f"| {dtype} | C++, ms | torch, ms | torch / C++ |", "|---|---:|---:|---:|"]
    for name, (ours, torchs) in found.items():
        ratio = spread([b / a for a, b in zip(ours, torchs, strict=True)])
        cells = f"{statistics.median(ours):.1f} | {statistics.median(torchs):.1f}"
        lines.append(f"| {name} | {cells} | {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) |")
    publish("Kernels", {"milliseconds": found}, "\n".join(lines), arguments.json, arguments.markdown)


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


def compare(one_pass: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds with and without compiled code, round by round; the first round is not counted."""
    times: tuple[list[float], list[float]] = [], []
    for number in range(rounds + 1):
        for kind, load in enumerate((load_native, lambda source: None)):
            attention.load_native = cross_entropy.load_native = load  # type: ignore[attr-defined, assignment]
            started = time.perf_counter()
            one_pass()
            if number:
                times[kind].append(1000 * (time.perf_counter() - started))
    return times


if __name__ == "__main__":
    main()
