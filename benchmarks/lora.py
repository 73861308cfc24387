"""A LoRA step against a step of all weights, and against `peft` on the same exported model.

    python benchmarks/lora.py [--rounds 5] [--threads 2] [--json FILE] [--markdown FILE]

Config S and a model of hidden size 768, rows of 256 tokens, rank 8 on every linear layer but the output. Ours are
`train_full_sft` and `train_lora` as a user starts them: DeepSpeed ZeRO-1, bf16 with float32 masters, AdamW, compiled.
peft runs in a plain PyTorch loop (`peer_hf.py`) at the same precision, on the same weights, rows and masks; compiled
and eager. All of a shape run interleaved (see `common.py`). Optimizer memory is what the checkpoints of a short run
hold: masters and both moments.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import (
    CONFIG_S,
    REPOSITORY,
    Contender,
    interleave,
    output_arguments,
    packed_microworld,
    publish,
    rates_table,
    ratios,
)

HIDDEN_768 = {
    "vocab_size": 6400,
    "hidden_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2048,
}
SHAPES = {"config S": CONFIG_S, "hidden 768": HIDDEN_768}
SMOKE_SHAPE = {**CONFIG_S, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}
RANK = 8
FULL, OURS = "all weights", f"LoRA, rank {RANK}"
PEERS = {"compiled": "peft in a plain loop, bf16 compiled", "eager": "peft in a plain loop, bf16 eager"}
FOREVER = 1_000_000  # steps; the benchmark ends the processes


def main() -> None:
    arguments = _arguments()
    if arguments.task == "peft":
        run_peft(arguments)
        return
    tables, result = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = arguments.data or packed_microworld(folder, "sft", 256, "tiny" if arguments.smoke else "small")
        for name in arguments.shapes:
            shape = SMOKE_SHAPE if arguments.smoke else SHAPES[name]
            place = folder / name.replace(" ", "_")
            make_base(place / "base", shape)
            peers = arguments.peers if name == arguments.shapes[0] else []
            rates = interleave(
                contenders(place, data, peers, arguments), rounds=arguments.rounds, steps=arguments.steps
            )
            memory = optimizer_bytes(place, data, arguments)
            result[name] = {
                "rates": {contender: [r._asdict() for r in values] for contender, values in rates.items()},
                "ours_over": ratios(rates, OURS),
                "optimizer_bytes": memory,
            }
            share = memory[OURS] / memory[FULL]
            sizes = f"{memory[OURS] / 1e6:.2f} MB of {memory[FULL] / 1e6:.2f} MB, {share:.1%}"
            tables.append(f"**{name}**\n\n{rates_table(rates, OURS)} Optimizer memory: {sizes}.")
    publish("LoRA", {"shapes": result}, "\n\n".join(tables), arguments.json, arguments.markdown)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="with the first shape")
    parser.add_argument("--data", type=Path, help="rows packed for sft; the embedded micro-world when not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="steps of each contender in a round")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--threads", type=int, default=2)
    output_arguments(parser)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.rounds, arguments.steps, arguments.rows, arguments.peers = 1, 2, 4, ["eager"]
        arguments.shapes = arguments.shapes[:1]
    return arguments


def make_base(folder: Path, shape: dict[str, int]) -> None:
    """A model of the shape with random weights, as an exported folder."""
    import torch

    import minigpt.model
    from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig

    torch.manual_seed(0)
    MiniGPT(MiniGPTConfig(**shape)).save_pretrained(folder, tokenizer_folder=Path(minigpt.model.__path__[0]))


def stage_command(stage: str, place: Path, data: Path, arguments: argparse.Namespace, run: Path, steps: int) -> list:
    """`minigpt train sft` or `lora` from the shape's base."""
    module = {"sft": "train_full_sft", "lora": "train_lora"}[stage]
    return [
        *(sys.executable, "-m", f"minigpt.trainer.{module}", "--data", str(data), "--init", str(place / "base")),
        *("--save_dir", str(run), "--max_steps", str(steps), "--dtype", "bf16", "--optimizer", "adamw"),
        *("--global_batch_size", str(arguments.rows), "--micro_batch_size", str(arguments.rows)),
        *("--threads", str(arguments.threads), "--schedule", "constant", "--eval_rows", "1"),
        *([f"--lora_rank={RANK}"] if stage == "lora" else []),
    ]


def contenders(place: Path, data: Path, peers: list[str], arguments: argparse.Namespace) -> list[Contender]:
    """All weights, LoRA and the peers on one shape."""
    compiled = f"--compile={str(not arguments.smoke).lower()}"
    found = []
    for name, stage in ((FULL, "sft"), (OURS, "lora")):
        run = place / stage
        command = [*stage_command(stage, place, data, arguments, run, FOREVER), compiled]
        found.append(Contender(name, command, run / "metrics.jsonl", place / f"{stage}.log"))
    for peer in peers:
        progress = place / f"peft_{peer}.jsonl"
        command = [
            *(sys.executable, str(REPOSITORY / "benchmarks" / "lora.py"), "--task", "peft", "--data", str(data)),
            *("--base", str(place / "base"), "--progress", str(progress), "--rows", str(arguments.rows)),
            *("--threads", str(arguments.threads), *(["--compile"] if peer == "compiled" else [])),
        ]
        found.append(Contender(PEERS[peer], command, progress, place / f"peft_{peer}.log"))
    return found


def optimizer_bytes(place: Path, data: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """What one step's checkpoint holds of masters and optimizer state, in bytes."""
    found = {}
    for name, stage in ((FULL, "sft"), (OURS, "lora")):
        run = place / f"{stage}_memory"
        command = [*stage_command(stage, place, data, arguments, run, 1), "--compile=false"]
        subprocess.run(command, check=True, capture_output=True, cwd=REPOSITORY)
        found[name] = sum(path.stat().st_size for path in run.rglob("*optim_states.pt"))
    return found


def run_peft(arguments: argparse.Namespace) -> None:
    """The peer: peft's adapters in transformers' model, with float32 masters of the adapters as ours have them."""
    import peer_hf
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = AutoModelForCausalLM.from_pretrained(arguments.base, attn_implementation="sdpa")
    base.config.use_cache = False
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train().to(device)
    step = peer_hf.make_step(model, "bf16", arguments.compile, 2e-3)
    arguments.steps, tokens = 10**9, 0
    with open(arguments.progress, "a", encoding="utf-8") as progress:
        for number, batch in enumerate(peer_hf.batches(arguments, device), start=1):
            loss = step(batch)
            tokens += int((batch["document_ids"] >= 0).sum())
            progress.write(json.dumps({"step": number, "loss": float(loss), "tokens": tokens}) + "\n")
            progress.flush()


if __name__ == "__main__":
    main()
