"""New tokens per second of the generation engine against transformers' `generate`, on the same weights.

    python benchmarks/generate.py [--cases batch ragged group rl] [--rounds 5] [--threads 2] [--json FILE]

Config S, vocabulary 6,400. Temperature 0.8, top-p 0.85, top-k 50, but in `rl` temperature 1 and nothing else, with
log-probabilities. The cases:

    batch    16 prompts of 32 tokens, 64 new tokens each
    ragged   64 prompts of 8 to 56 tokens that get 32 to 128 new tokens, in batches of 16 (the peer waits for the
             longest of each batch; ours refills its slots)
    group    8 samples of each of 4 prompts of 512 tokens, 64 new tokens each
    rl       4 samples of each of 8 prompts of 32 tokens, 64 new tokens each: a rollout of GRPO

All contenders run interleaved (see `common.py`), in float32 and in bfloat16; what a step is for `common.py` is here all
texts of a case. `--invariant` adds ours with `batch_invariant`, `--torch` ours without the compiled step; `rl` has ours
without log-probabilities too. The roofline of a decode step is printed with it: the bytes of weights and cache over the
measured rate of reading memory, the arithmetic over the measured rate of a large product, and what is neither.

    python benchmarks/generate.py --gpu [--presets 100m 1b] [--batches 1 64 256]

One device instead: the larger presets in bfloat16, prompts of 32 tokens and 128 new ones, temperature 1, with and
without CUDA graphs. The roofline is what the device must read for a step (weights once, and of the cache what is used
half-way) over the rate at which it copies memory, measured in the same process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from common import CONFIG_S, REPOSITORY, Contender, interleave, output_arguments, publish, rates_table, ratios

SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.85}
RL_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
SLOTS = {"batch": 16, "ragged": 16, "group": 16, "rl": 32}
TITLES = {
    "peer": "transformers",
    "ours": "MiniGPT",
    "invariant": "MiniGPT batch-invariant",
    "torch": "MiniGPT torch only",
}
TITLES |= {"silent": "MiniGPT without log-probabilities"}
SMOKE_SHAPE = {**CONFIG_S, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}


def workload(case: str, smoke: bool = False) -> list[tuple[list[int], int, int]]:
    """(prompt ids, new tokens, samples) of each request of a case."""
    generator, scale = random.Random(0), 8 if smoke else 1

    def prompt(tokens: int) -> list[int]:
        return [generator.randrange(10, CONFIG_S["vocab_size"]) for _ in range(tokens)]

    if case == "batch":
        return [(prompt(32), 64 // scale, 1) for _ in range(16)]
    if case == "rl":
        return [(prompt(32), 64 // scale, 4) for _ in range(8)]
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
    model = _model(dtype, smoke)
    generate = _peer(requests, model, case) if who == "peer" else _ours(requests, model, case, who)
    total = 0
    with open(progress, "a", encoding="utf-8") as file:
        while True:
            total += generate()
            file.write(json.dumps({"tokens": total}) + "\n")
            file.flush()


def _model(dtype: Any, smoke: bool) -> Any:
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

    return MiniGPT(MiniGPTConfig(**(SMOKE_SHAPE if smoke else CONFIG_S))).to(dtype).eval()


def _sampling(case: str) -> dict[str, Any]:
    return RL_SAMPLING if case == "rl" else SAMPLING


def _ours(requests: list, model: Any, case: str, who: str) -> Any:
    from minigpt.generation.engine import Engine
    from minigpt.generation.sampling import SamplingParams

    engine = Engine(model, slots=SLOTS[case], prefix_cache_tokens=0, batch_invariant=who == "invariant")
    log_probs = case == "rl" and who != "silent"

    def generate() -> int:
        submitted = [
            engine.submit(ids, SamplingParams(max_new_tokens=new, seed=i, **_sampling(case)), n=n, log_probs=log_probs)
            for i, (ids, new, n) in enumerate(requests)
        ]
        while engine.has_work:
            engine.step()
        return sum(len(c.ids) for request in submitted for c in request.completions)

    return generate


def _peer(requests: list, ours: Any, case: str) -> Any:
    """transformers on the exported weights; a batch ends when its longest text does, and only wanted tokens count."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=ours.model.embed_tokens.weight.dtype).eval()
    rows = [(ids, new) for ids, new, n in requests for _ in range(n)]

    def generate() -> int:
        for first in range(0, len(rows), SLOTS[case]):
            batch = rows[first : first + SLOTS[case]]
            longest, new = max(len(ids) for ids, _ in batch), max(new for _, new in batch)
            ids = torch.tensor([[0] * (longest - len(i)) + i for i, _ in batch])
            mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i, _ in batch])
            length = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0, "eos_token_id": None}
            config = GenerationConfig(do_sample=True, **length, **_sampling(case))
            with torch.inference_mode():
                model.generate(ids, attention_mask=mask, generation_config=config)
        return sum(new for _, new in rows)

    return generate


# ------------------------------------------------------------------------------------------------------------ roofline


def roofline(case: str, precision: str, smoke: bool, threads: int) -> dict[str, float]:
    """What a decode step of a case must take at least, and what it takes, in milliseconds.

    `memory` is the time to read the weights of all products and the used cache once, `products` the arithmetic of all
    products at the rate of a large float32 one, `calls` the time of a step of the same rows in the smallest network,
    where nothing is left but Python and sampling.
    """
    import torch

    from minigpt.generation.engine import Engine
    from minigpt.generation.sampling import SamplingParams
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

    torch.set_num_threads(threads)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    shape = SMOKE_SHAPE if smoke else CONFIG_S
    tiny = {**shape, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    step: dict[str, float] = {}
    read_bytes = parameters = 0
    for name, config in (("step", shape), ("calls", {**tiny, "intermediate_size": 32, "head_dim": 16})):
        model = MiniGPT(MiniGPTConfig(**config)).to(dtype).eval()
        engine = Engine(model, slots=SLOTS[case], prefix_cache_tokens=0)
        for i in range(SLOTS[case]):
            params = SamplingParams(max_new_tokens=64, seed=i, **_sampling(case))
            engine.submit([1] * 32, params, log_probs=case == "rl")
        times = []
        while engine.has_work:
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        step[name] = _median_ms(times)
        if name == "step":
            parameters = model.num_parameters()
            read_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
            read_bytes += engine._cache.bytes() * 64 // engine._cache.max_length  # half-way through the texts
    block, square = torch.ones(read_bytes // 4), torch.ones(1024, 1024)
    rate = 2 * 1024**3 / _median_ms(_times(lambda: square @ square))
    return {
        "memory": _median_ms(_times(block.sum)),
        "products": 2 * parameters * SLOTS[case] / rate,
        **step,
        "megabytes": read_bytes / 1e6,
    }


def _times(work: Callable[[], object], repeat: int = 30) -> list[float]:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def _median_ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


# -------------------------------------------------------------------------------------------------------------- one GPU


def on_device(presets: list[str], batches: list[int], smoke: bool) -> Iterator[dict[str, Any]]:
    """Decode steps of the larger presets, with and without CUDA graphs; a line each, as soon as it is known."""
    import torch

    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
    from minigpt.trainer.options import PRESETS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bandwidth = copy_bytes_per_second(device, 1 << 24 if smoke else 1 << 30)
    for preset in presets:
        shape = SMOKE_SHAPE if smoke else {**PRESETS[preset], "vocab_size": CONFIG_S["vocab_size"]}
        torch.manual_seed(0)
        with torch.device(device):
            model = MiniGPT(MiniGPTConfig(**shape)).to(torch.bfloat16).eval()
        for batch in batches:
            for graphs in (False, True):
                try:
                    line = decode_rate(model, batch, graphs, new_tokens=8 if smoke else 128)
                except torch.OutOfMemoryError as error:
                    line = {"error": str(error).partition("\n")[0]}
                if "bytes" in line:
                    line["of_roofline"] = line["bytes"] / bandwidth / line["seconds"]
                    line["bytes_per_second"] = bandwidth
                yield {"preset": preset, "batch": batch, "cuda_graphs": graphs, **line}


def decode_rate(model: Any, batch: int, graphs: bool, new_tokens: int, prompt_tokens: int = 32) -> dict[str, Any]:
    """Tokens per second of whole steps, sampling included, and the bytes that such a step must read."""
    from minigpt.generation.engine import Engine
    from minigpt.generation.sampling import SamplingParams

    engine = Engine(model, slots=batch, prefix_cache_tokens=0, cuda_graphs=graphs)
    for i in range(batch):
        engine.submit([1 + i] * prompt_tokens, SamplingParams(max_new_tokens=new_tokens, seed=i, **RL_SAMPLING))
    times = []
    while engine.has_work:
        start = time.perf_counter()
        engine.step()  # it ends with the drawn tokens on the host, so the device has done it
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:])  # the first reads prompts; the median is of no step that records
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cached = engine._cache.bytes() * (prompt_tokens + new_tokens // 2) // engine._cache.max_length
    static = engine._static
    recorded = len(static.recorded) if static is not None else 0
    result = {"tokens_per_second": batch / seconds, "seconds": seconds, "bytes": weights + cached, "recorded": recorded}
    return result | ({"refused": static.refused} if static is not None and static.refused else {})


def copy_bytes_per_second(device: Any, size: int) -> float:
    """Bytes that a copy of so large a block reads and writes in a second, the best of several."""
    import torch

    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    copy()
    return 2 * size / min(_times(copy, repeat=10))


def device_table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| preset | batch | CUDA graphs | tokens/s | ms a step | of the roofline |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for line in lines:
        graphs = "off" if not line["cuda_graphs"] else f"not recorded: {line['refused']}" if "refused" in line else "on"
        cells = [line["preset"], f"{line['batch']}", graphs]
        if "error" in line:
            cells += [f"not measured: {line['error']}", "", ""]
        else:
            milliseconds = f"{1e3 * line['seconds']:.2f}"
            cells += [f"{line['tokens_per_second']:,.0f}", milliseconds, f"{line['of_roofline']:.0%}"]
        rows.append(f"| {' | '.join(cells)} |")
    measured = [line["bytes_per_second"] for line in lines if "bytes_per_second" in line]
    if measured:
        rows.append(f"\nThe device copies {measured[0] / 1e9:,.0f} GB/s.")
    return "\n".join(rows)


def _publish_lines(found: Iterable[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The numbers after every line, the table after every preset: whoever is stopped later has them."""
    lines: list[dict[str, Any]] = []
    for preset, of_preset in itertools.groupby(found, lambda line: line["preset"]):
        first = len(lines)
        for line in of_preset:
            lines.append(line)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps({"benchmark": "Generation on one device", "steps": lines}))
        title = f"Generation on one device, {preset}"
        publish(title, {"steps": lines}, device_table(lines[first:]), arguments.json, arguments.markdown)


def main() -> None:
    arguments = _arguments()
    if arguments.contender:
        contender(*arguments.contender[:3], Path(arguments.contender[3]), arguments.smoke, arguments.threads)
        return
    if arguments.gpu:
        _publish_lines(on_device(arguments.presets, arguments.batches, arguments.smoke), arguments)
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
            chosen = {n: r for n, r in rates.items() if n.endswith(precision) or n.startswith(TITLES["peer"])}
            tables.append(f"### {case}, ours in {precision}\n\n{rates_table(chosen, ours, 'new tokens')}")
    for case in {"batch", "rl"} & set(arguments.cases):
        for precision in arguments.precisions:
            line = roofline(case, precision, arguments.smoke, arguments.threads)
            result[f"roofline {case} {precision}"] = line
            tables.append(
                f"A decode step of `{case}` in {precision}: {line['step']:.2f} ms; reading {line['megabytes']:.0f} MB "
                f"of weights and cache takes {line['memory']:.2f} ms, the arithmetic of its products "
                f"{line['products']:.2f} ms, Python and sampling {line['calls']:.2f} ms."
            )
    publish("Generation, config S", result, "\n\n".join(tables), arguments.json, arguments.markdown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(SLOTS), choices=list(SLOTS))
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--invariant", action="store_true", help="also measure ours with batch_invariant")
    parser.add_argument("--torch", action="store_true", help="also measure ours without the compiled step")
    parser.add_argument("--gpu", action="store_true", help="decode steps of the larger presets on one device instead")
    parser.add_argument("--presets", nargs="+", default=["100m", "1b"], help="with --gpu")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 256], help="with --gpu")
    parser.add_argument("--contender", nargs=4, help=argparse.SUPPRESS)
    output_arguments(parser)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.precisions = 1, ["fp32"]
        arguments.presets, arguments.batches = ["100m"], [1, 3]
    return arguments


def _contenders(arguments: argparse.Namespace, case: str, folder: Path) -> list[Contender]:
    kinds = ["ours", "peer"]
    kinds += [kind for kind in ("invariant", "torch") if getattr(arguments, kind)] + ["silent"] * (case == "rl")
    contenders = []
    for who in kinds:
        for precision in arguments.precisions:
            progress, log = folder / f"{who}_{precision}.jsonl", folder / f"{who}_{precision}.log"
            command = [
                *(sys.executable, str(REPOSITORY / "benchmarks" / "generate.py")),
                *("--contender", who, case, precision, str(progress), "--threads", str(arguments.threads)),
                *(["--smoke"] if arguments.smoke else []),
            ]
            environment = {"MINIGPT_NATIVE": "0"} if who == "torch" else {}
            contenders.append(Contender(f"{TITLES[who]} {precision}", command, progress, log, environment))
    return contenders


if __name__ == "__main__":
    main()
