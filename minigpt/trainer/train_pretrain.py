"""Pretraining: next-token prediction on plain text (milestone 4 of the guide).

python trainer/train_pretrain.py --epochs 1 --batch_size 2 --save_dir ./out_test
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minigpt.trainer.loop import train
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.stage import Stage


class Pretraining(Stage):
    """Next-token prediction on plain text, from random weights."""

    name = weights = packed_as = "pretrain"
    stop_token = "<|endoftext|>"


PRETRAIN = Pretraining()


@dataclass
class PretrainOptions(TrainOptions):
    __doc__ = TrainOptions.__doc__

    save_dir: Path = Path("out/pretrain")


def main(options: PretrainOptions) -> None:
    """Train a model from random weights (or go on from --init) on packed text."""
    train(PRETRAIN, options)


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(main, PretrainOptions)
