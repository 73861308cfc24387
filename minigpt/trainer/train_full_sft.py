"""Supervised fine-tuning: the same loop over conversations; only the assistant's words carry loss (milestone 5).

python trainer/train_full_sft.py --epochs 1 --batch_size 2 --save_dir ./out_sft_test
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minigpt.trainer.loop import train
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.stage import Stage


class SupervisedFineTuning(Stage):
    """Next-token prediction on what the assistant says in conversations."""

    name = packed_as = "sft"
    weights = "full_sft"
    follows = ("pretrain",)


SFT = SupervisedFineTuning()


@dataclass
class SFTOptions(TrainOptions):
    __doc__ = TrainOptions.__doc__

    save_dir: Path = Path("out/sft")
    learning_rate: float = 1e-3


def main(options: SFTOptions) -> None:
    """Tune all weights of a pretrained model on conversations."""
    train(SFT, options)


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(main, SFTOptions)
