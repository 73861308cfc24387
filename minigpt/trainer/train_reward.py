"""The reward model: which of two answers people prefer, as one number an answer (what PPO maximises).

The loss of a pair is −ln σ(r_chosen − r_rejected) (Bradley & Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1),
with the reward read at the last token of prompt + answer. Only differences of rewards mean anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from minigpt.dataset.shards import TokenStatistics
from minigpt.model.model_critic import RewardModel
from minigpt.model.model_minigpt import MiniGPT
from minigpt.trainer.loop import train
from minigpt.trainer.options import TrainOptions
from minigpt.trainer.preference_stage import PreferenceStage, weighted_sums
from minigpt.trainer.stage import Batch, LossOutput
from minigpt.trainer.weights import DTYPES, write_state_dict


class Reward(PreferenceStage):
    """A scalar head on the transformer of a fine-tuned model."""

    name = weights = "reward"

    def network(self, model: MiniGPT, options: TrainOptions) -> RewardModel:
        return RewardModel.from_decoder(model)

    def loss(  # type: ignore[override]  # the batch by the names that `prepared` gives it
        self,
        network: Any,
        *,
        last_tokens: torch.Tensor,
        pair_weights: torch.Tensor,
        labels: torch.Tensor | None = None,
        answer_ids: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> LossOutput:
        """Σ −ln σ(margin) over the pairs of the batch, and the sums of the metrics."""
        rewards_P2 = network(**inputs, last_tokens=last_tokens)
        margin_P = rewards_P2[:, 0] - rewards_P2[:, 1]
        right = margin_P > 0
        sums = weighted_sums(
            pair_weights, bradley_terry_loss(margin_P), [right, margin_P, rewards_P2[:, 0], rewards_P2[:, 1]]
        )
        return sums[0], sums[1:]

    def statistics(self, batch: Batch) -> TokenStatistics:
        """As of pairs; there is no output layer over the vocabulary whose work could be credited."""
        counts = super().statistics(batch)
        return TokenStatistics(counts.tokens, 0, counts.label_weight, counts.attention_pairs)

    def write_weights(
        self,
        folder: Path,
        network: RewardModel,
        weights: dict[str, torch.Tensor],
        tokenizer_folder: Path,
        options: TrainOptions,
    ) -> list[Path]:
        """`reward_<hidden>.pth` (float32) and `hf/`, a stock sequence classifier with one label."""
        path = write_state_dict(folder / f"{self.weights}_{network.config.hidden_size}.pth", weights)
        dtype = DTYPES[options.export_dtype]
        network.save_pretrained(folder / "hf", dtype, state_dict=weights, tokenizer_folder=tokenizer_folder)
        return [path, folder / "hf"]


def bradley_terry_loss(margin: torch.Tensor) -> torch.Tensor:
    """−ln σ(margin): how surprised the model is by which answer was preferred."""
    return -F.logsigmoid(margin)


REWARD = Reward()


@dataclass
class RewardOptions(TrainOptions):
    __doc__ = cleandoc(TrainOptions.__doc__ or "")

    save_dir: Path = Path("out/reward")
    optimizer: Literal["auto", "adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    eval_rows: int = 1000
    export_dtype: Literal["bf16", "fp32"] = "fp32"


def main(options: RewardOptions) -> None:
    """Train a reward model on preference pairs, from a fine-tuned model."""
    train(REWARD, options)


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(main, RewardOptions)
