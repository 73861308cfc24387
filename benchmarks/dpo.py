"""DPO with the reference's log-probabilities kept, against the same trainer that computes them anew at every step.

    python benchmarks/dpo.py [--input FILE …] [--seq_len 512] [--rounds 7] [--json FILE] [--markdown FILE]

What can be gained follows from the work. With f the time of a forward pass and b that of a forward and backward pass
over the same batches, a step that recomputes the reference takes b + f and one that does not takes b, so at most

    (b + f) / b = 1 + f / b

is gained; less, by what both pay besides (the optimizer's step, the batches, the metrics). f and b are measured in the
same run on the same batches, compiled as the trainer compiles them, without an optimizer's step. In FLOPs a weight and
token, f is 2 and b is 6, which would make 1.33; but b holds a fourth product of the output layer (its logits are not
kept, see `minigpt/model/cross_entropy.py`), so where that layer is a third of the model, as in config S, it is 1.3.

Four programs run interleaved (see `common.py`): the trainer (`minigpt train dpo`), the trainer with a frozen copy of
the model whose forward pass stands in the same compiled graph, and the two passes. Without --input: made-up pairs from
the micro-world, where the rejected answer belongs to another question.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CONFIG_S, Contender, Rates, interleave, output_arguments, packed, publish, rates_table, ratios
from torch import nn

CACHED, RECOMPUTED, FORWARD, BACKWARD = "cached", "recomputed", "forward", "backward"
TITLES = {
    CACHED: "reference computed once",
    RECOMPUTED: "reference computed at every step",
    FORWARD: "forward pass alone",
    BACKWARD: "forward and backward pass alone",
}
SMOKE_SHAPE = {**CONFIG_S, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}
PAIRS = 1000
FOREVER = 1_000_000  # steps; the benchmark ends the processes


def main() -> None:
    arguments = _arguments()
    if arguments.task:
        run(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        inputs = arguments.input or [made_up_pairs(folder, "tiny" if arguments.smoke else "small")]
        data = packed(inputs, folder / "packed", "preference", arguments.seq_len)
        make_base(folder / "base", SMOKE_SHAPE if arguments.smoke else CONFIG_S, data)
        contenders = [_contender(arguments, task, data, folder) for task in TITLES]
        rates = interleave(contenders, rounds=arguments.rounds, steps=arguments.steps)
    bound = gain_and_bound(rates)
    result = {
        "rates": {name: [r._asdict() for r in values] for name, values in rates.items()},
        "cached_over": ratios(rates, TITLES[CACHED]),
        **bound,
        "settings": {"seq_len": arguments.seq_len, "pairs": arguments.pairs, "threads": arguments.threads},
    }
    summary = (
        f"Gain {bound['gain']:.3f} of at most {bound['bound']:.3f} = {bound['share']:.3f} of the bound "
        "(medians over the rounds, by the clock)."
    )
    publish(
        "DPO with a cached reference",
        result,
        f"{rates_table(rates, TITLES[CACHED])}\n\n{summary}",
        arguments.json,
        arguments.markdown,
    )


def gain_and_bound(rates: dict[str, list[Rates]]) -> dict[str, float]:
    """Medians of the gain, of the most there is (1 + f / b), and of their ratio; each compared within a round."""
    each = {task: [r.per_second for r in rates[title]] for task, title in TITLES.items()}
    gains = [a / b for a, b in zip(each[CACHED], each[RECOMPUTED], strict=True)]
    bounds = [1 + b / f for b, f in zip(each[BACKWARD], each[FORWARD], strict=True)]
    shares = [gain / bound for gain, bound in zip(gains, bounds, strict=True)]
    return {
        "gain": statistics.median(gains),
        "bound": statistics.median(bounds),
        "share": statistics.median(shares),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, default=[], help="files of preference pairs")
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=32, help="of a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of each contender in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    output_arguments(parser)
    parser.add_argument("--task", choices=TITLES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--save_dir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.smoke and not arguments.task:
        arguments.rounds, arguments.steps, arguments.pairs, arguments.compile = 1, 1, 4, False
    return arguments


def _contender(arguments: argparse.Namespace, task: str, data: Path, folder: Path) -> Contender:
    save_dir = folder / task
    command = [
        *(sys.executable, str(Path(__file__).resolve()), "--task", task, "--data", str(data)),
        *("--base", str(folder / "base"), "--save_dir", str(save_dir), "--threads", str(arguments.threads)),
        *("--pairs", str(arguments.pairs), "--compile" if arguments.compile else "--no-compile"),
    ]
    return Contender(TITLES[task], command, save_dir / "metrics.jsonl", folder / f"{task}.log")


def made_up_pairs(folder: Path, size: str) -> Path:
    """Questions of the micro-world with their own answer and, as the worse one, the answer to the next question."""
    from data_prep.microworld import MicroWorldOptions, write_microworld
    from minigpt.dataset.lm_dataset import read_jsonl

    files = write_microworld(folder / "text", MicroWorldOptions(size=size))  # type: ignore[arg-type]
    chats = [record["messages"] for record in islice(read_jsonl(files["sft"], "sft"), PAIRS)]
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for chat, other in zip(chats, chats[1:] + chats[:1], strict=True):
            pair = {"messages": chat[:-1], "chosen": [chat[-1]], "rejected": [other[-1]]}
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    return path


def make_base(folder: Path, shape: dict[str, int], tokenizer_folder: Path) -> None:
    """A model with random weights: what is measured does not depend on them."""
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

    torch.manual_seed(0)
    MiniGPT(MiniGPTConfig(**shape)).save_pretrained(folder, tokenizer_folder=tokenizer_folder)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- the programs


def run(arguments: argparse.Namespace) -> None:
    """Train, or run passes, for ever; a line with the counter of tokens after every step."""
    from minigpt.trainer.loop import train
    from minigpt.trainer.train_dpo import DirectPreference, DPOOptions

    options = DPOOptions(
        data=[arguments.data],
        init=arguments.base,
        save_dir=arguments.save_dir,
        max_steps=FOREVER,
        schedule="constant",
        global_batch_size=arguments.pairs,
        dtype="bf16",
        compile=arguments.compile,
        threads=arguments.threads,
    )
    if arguments.task == CACHED:
        train(DirectPreference(options), options)
    elif arguments.task == RECOMPUTED:
        train(recomputing_stage(options), options)
    else:
        run_passes(options, backward=arguments.task == BACKWARD)


class WithReference(nn.Module):
    """A policy and a frozen copy of it, which the trainer treats as one network."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy, self.reference = policy, copy.deepcopy(policy).requires_grad_(False)
        self.config, self.num_parameters = policy.config, policy.num_parameters

    @property
    def model(self) -> nn.Module:
        return self.policy.model

    @property
    def attention_backend(self) -> str | None:
        return self.policy.attention_backend

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "attention_backend":
            self.policy.attention_backend = self.reference.attention_backend = value
        else:
            super().__setattr__(name, value)


def recomputing_stage(options: Any) -> Any:
    """DPO as the trainer runs it, but for the reference: its forward pass is part of the step's graph."""
    from minigpt.trainer.train_dpo import DirectPreference

    class Recomputing(DirectPreference):
        def network(self, model, options):
            return WithReference(super().network(model, options))

        def loss(self, network, **batch):
            with torch.no_grad():
                reference = super().loss(network.reference, **batch)
            return super().loss(network.policy, **batch, reference_log_probs=reference)

        def before_training(self, trainer):
            return

        def extra_arrays(self, batch, data):
            return {}

    return Recomputing(options)


def run_passes(options: Any, backward: bool) -> None:
    """Forward passes over the trainer's batches, or forward and backward passes; no optimizer step."""
    from minigpt.dataset.shards import PackedDataset
    from minigpt.model.attention import choose_backend
    from minigpt.model.model_minigpt import MiniGPT
    from minigpt.trainer.engine import Engine, init_processes
    from minigpt.trainer.loop import to_tensors
    from minigpt.trainer.setup import configure_torch
    from minigpt.trainer.stage import StageModule
    from minigpt.trainer.train_dpo import DirectPreference

    processes = init_processes()
    configure_torch(options, processes)
    data, stage = PackedDataset(options.data[0], "train"), DirectPreference(options)
    model = MiniGPT.from_pretrained(options.init)
    backend = choose_backend(processes.device, data.seq_len, torch.bfloat16)
    model.attention_backend = backend
    module = StageModule(model, stage.loss)
    if backward:
        engine = Engine(module, processes, dtype=torch.bfloat16, learning_rate=0.0, compile=options.compile)
    else:
        module = module.to(processes.device, torch.bfloat16)
        forward = torch.compile(module) if options.compile else module
    rows = stage.micro_batch_size(data, options, processes)
    tokens = 0
    options.save_dir.mkdir(parents=True, exist_ok=True)
    with open(options.save_dir / "metrics.jsonl", "a", encoding="utf-8") as progress:
        for number, window in enumerate(windows(stage, data, options, rows, backward), start=1):
            tokens += sum(stage.statistics(batch).tokens for batch in window)
            for batch in window:
                tensors = to_tensors(batch, processes.device, backend)
                if backward:
                    engine.forward_backward(tensors, 1e-9)
                else:
                    with torch.no_grad():
                        forward(**tensors)
            progress.write(json.dumps({"step": number, "tokens": tokens}) + "\n")
            progress.flush()


def windows(stage: Any, data: Any, options: Any, rows: int, with_reference: bool) -> Iterator[list[dict[str, Any]]]:
    """The trainer's batches; with any numbers as the reference's log-probabilities, or without."""
    stage.reference = {data.split: np.zeros((len(data), 2))}
    steps = stage.step_batches(data, options, micro_batch_size=rows, rank=0, world_size=1, start_sample=0)
    for window in steps:
        if not with_reference:
            for batch in window:
                del batch["reference_log_probs"]
        yield window


if __name__ == "__main__":
    main()
