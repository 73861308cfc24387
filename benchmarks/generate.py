"""New tokens per second of the generation engine against transformers' `generate`, on the same weights.

    python benchmarks/generate.py [--cases batch ragged group] [--rounds 5] [--threads 2] [--json FILE]

Config S, vocabulary 6,400, temperature 0.8, top-p 0.85, top-k 50. The cases:

    batch    16 prompts of 32 tokens, 64 new tokens each
    ragged   64 prompts of 8 to 56 tokens that get 32 to 128 new tokens, in batches of 16 (the peer waits for the
             longest of each batch; ours refills its slots)
    group    8 samples of each of 4 prompts of 512 tokens, 64 new tokens each

All contenders run interleaved (see `common.py`), in float32 and in bfloat16; what a step is for `common.py` is here all
texts of a case. `--invariant` adds ours with `batch_invariant`. The roofline of a decode step is printed with it: the
bytes of weights and cache over the measured rate of reading memory, and the time of the operator calls by themselves.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import CONFIG_S, REPOSITORY, Contender, interleave, output_arguments, publish, rates_table, ratios

SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.85}
BATCH = 16
CASES = ["batch", "ragged", "group"]
SMOKE_SHAPE = {**CONFIG_S, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}


def workload(case: str, smoke: bool = False) -> list[tuple[list[int], int, int]]:
    """(prompt ids, new tokens, samples) of each request of a case."""
    generator, scale = random.Random(0), 8 if smoke else 1

    def prompt(tokens: int) -> list[int]:
        return [generator.randrange(10, CONFIG_S["vocab_size"]) for _ in range(tokens)]

    if case == "batch":
        return [(prompt(32), 64 // scale, 1) for _ in range(16)]
    if case == "group":
        return [(prompt(512 // scale), 64 // scale, 8) for _ in range(4)]
    requests = [(prompt(generator.randint(8, 56)), 32 + 96 * i // 63, 1) for i in range(64)]
    generator.shuffle(requests)
    return [(ids, max(1, new // scale), n) for ids, new, n in requests][: 64 // scale]


# ---------------------------------------------------------------------------------------------------------- contenders


def contender(who: str, case: str, precision: str, progress: Path, smoke: bool, threads: int) -> None:
    """Generate all texts of a case over and over; a line of JSON after each time."""
    import torch

    torch.set_num_threads(threads)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    requests = workload(case, smoke)
    torch.manual_seed(0)
    generate = _peer(requests, dtype, smoke) if who == "peer" else _ours(requests, dtype, smoke, who == "invariant")
    total = 0
    with open(progress, "a", encoding="utf-8") as file:
        while True:
            total += generate()
            file.write(json.dumps({"tokens": total}) + "\n")
            file.flush()


def _model(dtype: Any, smoke: bool) -> Any:
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

    return MiniGPT(MiniGPTConfig(**(SMOKE_SHAPE if smoke else CONFIG_S))).to(dtype).eval()


def _ours(requests: list, dtype: Any, smoke: bool, invariant: bool) -> Any:
    from minigpt.generation.engine import Engine
    from minigpt.generation.sampling import SamplingParams

    engine = Engine(_model(dtype, smoke), slots=BATCH, prefix_cache_tokens=0, batch_invariant=invariant)

    def generate() -> int:
        submitted = [
            engine.submit(ids, SamplingParams(max_new_tokens=new, seed=i, **SAMPLING), n=n)
            for i, (ids, new, n) in enumerate(requests)
        ]
        while engine.has_work:
            engine.step()
        return sum(len(c.ids) for request in submitted for c in request.completions)

    return generate


def _peer(requests: list, dtype: Any, smoke: bool) -> Any:
    """transformers on the exported weights; a batch ends when its longest text does, and only wanted tokens count."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        _model(dtype, smoke).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    rows = [(ids, new) for ids, new, n in requests for _ in range(n)]

    def generate() -> int:
        for first in range(0, len(rows), BATCH):
            batch = rows[first : first + BATCH]
            longest, new = max(len(ids) for ids, _ in batch), max(new for _, new in batch)
            ids = torch.tensor([[0] * (longest - len(i)) + i for i, _ in batch])
            mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i, _ in batch])
            config = GenerationConfig(
                do_sample=True, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None, **SAMPLING
            )
            with torch.inference_mode():
                model.generate(ids, attention_mask=mask, generation_config=config)
        return sum(new for _, new in rows)

    return generate


# ------------------------------------------------------------------------------------------------------------ roofline


def roofline(precision: str, smoke: bool, threads: int) -> dict[str, float]:
    """What a decode step of the `batch` case must take at least, and what it takes, in milliseconds.

    `memory` is the time to read the weights of all products and the used cache once; `calls` the time of a step of the
    same network with the smallest shapes, where nothing but calling operators is left.
    """
    import torch

    from minigpt.generation.engine import Engine
    from minigpt.generation.sampling import SamplingParams
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

    torch.set_num_threads(threads)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    shape = SMOKE_SHAPE if smoke else CONFIG_S
    tiny = {**shape, "vocab_size": 128, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    step: dict[str, float] = {}
    read_bytes = 0
    for name, config in (("step", shape), ("calls", {**tiny, "intermediate_size": 32, "head_dim": 16})):
        model = MiniGPT(MiniGPTConfig(**config)).to(dtype).eval()
        rows = BATCH if name == "step" else 1
        engine = Engine(model, slots=rows, prefix_cache_tokens=0)
        for i in range(rows):
            engine.submit([1] * 32, SamplingParams(max_new_tokens=64, seed=i, **SAMPLING))
        times = []
        while engine.has_work:
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        step[name] = sorted(times)[len(times) // 2] * 1e3
        if name == "step":
            read_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
            read_bytes += engine._cache.bytes() * 64 // engine._cache.max_length  # half-way through the texts
    block = torch.ones(read_bytes // 4)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return {"memory": sorted(times)[15] * 1e3, **step, "megabytes": read_bytes / 1e6}


def main() -> None:
    arguments = _arguments()
    if arguments.contender:
        contender(*arguments.contender[:3], Path(arguments.contender[3]), arguments.smoke, arguments.threads)
        return
    result: dict[str, Any] = {"settings": {"threads": arguments.threads, **SAMPLING}, "cases": {}}
    tables = []
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as scratch:
            contenders = _contenders(arguments, case, Path(scratch))
            rates = interleave(contenders, rounds=arguments.rounds, steps=1, warmup_steps=1)
        result["cases"][case] = {name: [r._asdict() for r in values] for name, values in rates.items()}
        for precision in arguments.precisions:
            ours = f"MiniGPT {precision}"
            result["cases"][case][f"{ours} over"] = ratios(rates, ours)
            chosen = {n: r for n, r in rates.items() if n == ours or not n.endswith(precision) or "MiniGPT" not in n}
            tables.append(f"### {case}, ours in {precision}\n\n{rates_table(chosen, ours, 'new tokens')}")
    for precision in arguments.precisions:
        line = result[f"roofline {precision}"] = roofline(precision, arguments.smoke, arguments.threads)
        tables.append(
            f"A decode step of `batch` in {precision}: {line['step']:.2f} ms; reading {line['megabytes']:.0f} MB of "
            f"weights and cache takes {line['memory']:.2f} ms, calling its operators {line['calls']:.2f} ms."
        )
    publish("Generation, config S", result, "\n\n".join(tables), arguments.json, arguments.markdown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=["batch", "ragged", "group"], choices=["batch", "ragged", "group"]
    )
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--invariant", action="store_true", help="also measure ours with batch_invariant")
    parser.add_argument("--contender", nargs=4, help=argparse.SUPPRESS)
    output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.precisions = 1, ["fp32"]
    return arguments


def _contenders(arguments: argparse.Namespace, case: str, folder: Path) -> list[Contender]:
    kinds = {"MiniGPT": "ours", "transformers": "peer", **({"invariant": "invariant"} if arguments.invariant else {})}
    contenders = []
    for name, who in kinds.items():
        for precision in arguments.precisions:
            progress = folder / f"{who}_{precision}.jsonl"
            command = [
                *(sys.executable, str(REPOSITORY / "benchmarks" / "generate.py")),
                *("--contender", who, case, precision, str(progress), "--threads", str(arguments.threads)),
                *(["--smoke"] if arguments.smoke else []),
            ]
            title = "MiniGPT batch-invariant" if who == "invariant" else name
            contenders.append(Contender(f"{title} {precision}", command, progress, folder / f"{who}_{precision}.log"))
    return contenders


if __name__ == "__main__":
    main()
