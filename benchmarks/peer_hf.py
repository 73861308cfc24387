"""The peer: transformers' Qwen3 in the plain PyTorch loop that an expert would write, on our packed rows.

    python benchmarks/peer_hf.py --data DIR --progress FILE --precision bf16 --compile

Same rows in the same order, same block-diagonal masks and restarted positions, same optimizer, clipping and step as
our trainer at its defaults. `bf16` keeps bf16 weights and float32 masters (faster here than autocast); `--compile`
compiles mask, model and loss into one graph. Each step appends {"step", "loss", "tokens"} to FILE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

IGNORED = -100


def main() -> None:
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(arguments).to(device)
    step = make_step(model, arguments.precision, arguments.compile, arguments.learning_rate)
    tokens = 0
    with open(arguments.progress, "a", encoding="utf-8") as progress:
        for number, batch in enumerate(batches(arguments, device), start=1):
            loss = step(batch)
            tokens += int((batch["document_ids"] >= 0).sum())
            progress.write(json.dumps({"step": number, "loss": float(loss), "tokens": tokens}) + "\n")
            progress.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder packed by `minigpt data pack`")
    parser.add_argument("--progress", type=Path, required=True)
    parser.add_argument("--precision", choices=("bf16", "autocast", "fp32"), default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", type=int, default=16, help="rows a step")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    for name, value in (
        ("vocab_size", 6400),
        ("hidden_size", 256),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("intermediate_size", 832),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def build_model(shape: argparse.Namespace) -> torch.nn.Module:
    """Qwen3 of the given shape with transformers' fastest attention for packed rows on this device."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return Qwen3ForCausalLM(config).train()


def summed_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ cross-entropy of the labels, attention within documents only."""
    documents_BT = batch["document_ids"]
    T = documents_BT.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=documents_BT.device).tril()
    mask_B1TT = ((documents_BT[:, :, None] == documents_BT[:, None, :]) & causal)[:, None]
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=mask_B1TT).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="sum", ignore_index=IGNORED
    )


def make_step(
    model: torch.nn.Module, precision: str, compiled: bool, learning_rate: float
) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """One optimizer step on one batch; returns the mean loss."""
    if precision == "bf16":
        masters = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
        model.to(torch.bfloat16)
    else:
        masters = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in model.parameters() if p.requires_grad]
    decay = [m for m in masters if m.dim() > 1]
    rest = [m for m in masters if m.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        device = batch["input_ids"].device.type
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            return summed_loss(model, batch)

    loss_of = torch.compile(forward) if compiled else forward

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = loss_of(batch) / (batch["labels"] != IGNORED).sum()
        loss.backward()
        if masters is not weights and precision == "bf16":
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        if precision == "bf16":
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        return loss.detach()

    return step


def batches(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """The rows that our trainer sees, in its order."""
    from minigpt.dataset.shards import BatchIterator, PackedDataset

    source = BatchIterator(
        PackedDataset(arguments.data, "train"),
        micro_batch_size=arguments.rows,
        global_batch_size=arguments.rows,
        max_samples=arguments.steps * arguments.rows,
    )
    wanted = ("input_ids", "position_ids", "document_ids", "labels")
    for batch in source:
        yield {name: torch.from_numpy(batch[name]).to(device) for name in wanted}


if __name__ == "__main__":
    main()
