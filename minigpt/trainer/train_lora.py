"""LoRA: fine-tuning on conversations that trains small matrices beside frozen weights (milestone 7).

python trainer/train_lora.py --epochs 1 --batch_size 2 --save_dir ./out_lora_test
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minigpt.errors import UserError
from minigpt.trainer.adapters import ADAPTER_WEIGHTS, AdapterStage, LoRAOptions
from minigpt.trainer.loop import train


class LoRAFineTuning(AdapterStage):
    """Supervised fine-tuning of an adapter."""

    name = "lora"
    weights = ADAPTER_WEIGHTS
    packed_as = "sft"
    follows = ("sft", "pretrain")


LORA = LoRAFineTuning()


@dataclass
class LoRATrainOptions(LoRAOptions):
    __doc__ = str(LoRAOptions.__doc__)

    save_dir: Path = Path("out/lora")
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    lora_rank: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lora_rank:
            raise UserError("--lora_rank is 0, an adapter has at least 1; `minigpt train sft` trains all weights")


def main(options: LoRATrainOptions) -> None:
    """Tune a model on conversations by an adapter: a few per cent of the optimizer's memory, a file of a few MB."""
    train(LORA, options)


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(main, LoRATrainOptions)
