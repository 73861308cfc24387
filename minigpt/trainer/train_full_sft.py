"""Supervised fine-tuning: the same loop over conversations; only the assistant's words carry loss (milestone 5).

python trainer/train_full_sft.py --epochs 1 --batch_size 2 --save_dir ./out_sft_test
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from minigpt.trainer.loop import train
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.stage import Stage, language_model_loss

SFT = Stage(
    name="sft",
    weights="full_sft",
    packed_as="sft",
    from_scratch=False,
    stop_token="<|im_end|>",
    loss=language_model_loss,
)


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
