"""Pretraining: next-token prediction on plain text (milestone 4 of the guide).

python trainer/train_pretrain.py --epochs 1 --batch_size 2 --save_dir ./out_test
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minigpt.trainer.loop import train
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.stage import Stage, language_model_loss

PRETRAIN = Stage(
    name="pretrain",
    weights="pretrain",
    packed_as="pretrain",
    from_scratch=True,
    stop_token="<|endoftext|>",
    loss=language_model_loss,
)


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
