"""Direct preference optimisation: the preferred answer becomes more likely, the other less, near where we started.

With the reward β·ln(π(y|x)/π_ref(y|x)) that a policy stands for, the Bradley–Terry loss of a pair is
−ln σ(β·h), h = ln π(c|x)/π_ref(c|x) − ln π(r|x)/π_ref(r|x) (Rafailov et al. 2023, arXiv:2305.18290, eq. 7): a reward
model and its optimal policy in one, without sampling. π_ref are the weights that the run starts from; an answer's
log-probability is the plain sum over its tokens.

The reference's part is computed once, before the first step (`reference_log_probs.py`). An adapter changes nothing as
long as its B is zero, so with `--lora_rank` the reference is the model with the adapter off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from minigpt.dataset.shards import PackedDataset
from minigpt.errors import UserError
from minigpt.trainer.adapters import AdapterStage, LoRAOptions
from minigpt.trainer.loop import train
from minigpt.trainer.preference_stage import PreferenceStage, weighted_sums
from minigpt.trainer.reference_log_probs import FILE, Tables, read_tables, weights_hash, write_tables
from minigpt.trainer.stage import Batch, LossOutput

if TYPE_CHECKING:
    from minigpt.trainer.loop import Trainer


@dataclass
class DPOOptions(LoRAOptions):
    __doc__ = f"""{cleandoc(LoRAOptions.__doc__ or "")}
    loss_type: dpo, or ipo: the difference of mean log-ratios is drawn to 1/(2·beta) instead of without end.
    beta: How dearly leaving the reference is paid for: the scale of the implied reward.
    label_smoothing: Share of pairs that are assumed to be labelled the wrong way round (cDPO; dpo only).
    sft_weight: Weight of an extra term, the chosen answer's mean loss per token, which keeps it from becoming less
        likely together with the other one.
"""

    save_dir: Path = Path("out/dpo")
    optimizer: Literal["auto", "adamw", "muon"] = "adamw"
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    eval_rows: int = 1000
    loss_type: Literal["dpo", "ipo"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for good, name, rule in (
            (0 < self.beta < math.inf, "beta", "a number above 0"),
            (0 <= self.sft_weight < math.inf, "sft_weight", "a number of at least 0"),
            (0 <= self.label_smoothing < 0.5, "label_smoothing", "at least 0 and less than 0.5"),
        ):
            if not good:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be {rule}")
        if self.loss_type == "ipo" and self.label_smoothing:
            raise UserError("--label_smoothing belongs to --loss_type dpo; ipo is bounded by itself, leave it out")


class DirectPreference(PreferenceStage, AdapterStage):
    """DPO and IPO on pairs of answers.

    Args:
        options: Decide the loss.
    """

    name = weights = "dpo"
    metrics = (*PreferenceStage.metrics, "chosen_log_prob", "rejected_log_prob")

    def __init__(self, options: DPOOptions) -> None:
        self.options = options
        self.reference: Tables = {}

    def loss(  # type: ignore[override]  # the batch by the names that `prepared` gives it
        self,
        network: Any,
        *,
        labels: torch.Tensor,
        answer_ids: torch.Tensor,
        pair_weights: torch.Tensor,
        reference_log_probs: torch.Tensor | None = None,
        last_tokens: torch.Tensor | None = None,
        **inputs: torch.Tensor,
    ) -> LossOutput:
        """Σ loss over the pairs of the batch, and the sums of the metrics.

        Without `reference_log_probs`: the log-probabilities of the answers, float64 [P, 2].
        """
        log_probs_BT = network(**inputs, labels=labels, reduction="none").log_probs
        policy_P2 = answer_sums(log_probs_BT, answer_ids, len(pair_weights))
        if reference_log_probs is None:
            return policy_P2
        lengths_P2 = answer_sums((labels >= 0).to(log_probs_BT.dtype), answer_ids, len(pair_weights))
        o = self.options
        losses_P = preference_loss(
            policy_P2,
            reference_log_probs,
            lengths_P2,
            loss_type=o.loss_type,
            beta=o.beta,
            label_smoothing=o.label_smoothing,
            sft_weight=o.sft_weight,
        )
        reward_P2 = o.beta * (policy_P2 - reference_log_probs)
        margin_P = reward_P2[:, 0] - reward_P2[:, 1]
        metrics = [margin_P > 0, margin_P, *reward_P2.unbind(1), *policy_P2.unbind(1)]
        sums = weighted_sums(pair_weights, losses_P, metrics).to(log_probs_BT.dtype)
        return sums[0], sums[1:]

    def before_training(self, trainer: Trainer) -> None:
        """Load the reference's log-probabilities, or compute them by the engine and store them."""
        path = trainer.run_folder.folder / FILE
        self.reference_hash = weights_hash(trainer.engine.master_weights())
        splits = {"train": trainer.data} | ({"valid": trainer.valid} if trainer.valid is not None else {})
        key = {
            "data": trainer.data.fingerprint,
            "weights": self.reference_hash,
            "precision": str(trainer.engine.dtype).removeprefix("torch."),
        }
        tables, problem = None, ""
        if trainer.processes.rank == 0:
            tables, problem = read_tables(path, key)
        tables = trainer.processes.broadcast(tables)
        if tables is None:
            n = sum(len(data) for data in splits.values())
            why = f"{path} {problem}: " if problem else ""
            trainer.run_folder.say(f"{why}computing the reference's log-probabilities of {n:,} pairs, once")
            tables = {name: self._reference_of(trainer, data) for name, data in splits.items()}
            if trainer.processes.rank == 0:
                write_tables(path, tables, key)
        self.reference = tables

    def _reference_of(self, trainer: Trainer, data: PackedDataset) -> np.ndarray:
        """Log-probabilities of both answers of every pair, float64 [pairs, 2], the same on every rank."""
        table_P2 = np.zeros((len(data), 2))
        for batch in self.evaluation_batches(trainer, data, None):
            indices = batch.pop("pair_indices")
            found_P2 = trainer.engine.evaluate(trainer.tensors(batch)).cpu().numpy()
            table_P2[indices[indices >= 0]] = found_P2[indices >= 0]
        return np.array(trainer.processes.sum(table_P2.ravel().tolist())).reshape(-1, 2)

    def extra_arrays(self, batch: Batch, data: PackedDataset) -> Batch:
        indices = batch["pair_indices"]
        found_P2 = np.where(indices[:, None] >= 0, self.reference[data.split][indices], 0.0)
        return {"reference_log_probs": found_P2}


def answer_sums(values_BT: torch.Tensor, answer_ids_BT: torch.Tensor, slots: int) -> torch.Tensor:
    """Sums over the positions of each answer, float64 [slots, 2].

    In float64 the order of the terms, and so the packing, decides nothing: a sum of 200 log-probabilities in float32
    would be off by more than the difference that the first steps look at.

    Args:
        values_BT: one value a position.
        answer_ids_BT: int64, 2·slot + side; 2·slots on padding.
        slots: pairs that there is room for.
    """
    sums = torch.zeros(2 * slots + 1, dtype=torch.float64, device=values_BT.device)
    return sums.index_add(0, answer_ids_BT.flatten(), values_BT.flatten().double())[:-1].view(slots, 2)


def preference_loss(
    policy_P2: torch.Tensor,
    reference_P2: torch.Tensor,
    lengths_P2: torch.Tensor,
    *,
    loss_type: str = "dpo",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> torch.Tensor:
    """The loss of each pair, [P].

    Args:
        policy_P2: log-probabilities of the chosen and the rejected answer under what is trained.
        reference_P2: the same under the reference.
        lengths_P2: tokens of the answers (0 in an empty slot).
        loss_type: "dpo": −(1−ε)·ln σ(β·h) − ε·ln σ(−β·h), where ε is `label_smoothing` (Mitchell 2023, "A note on DPO
            with noisy preferences", eq. 3; ε = 0 is DPO). "ipo": (h − 1/(2β))², with h the difference of the *mean*
            log-ratios per token (Azar et al. 2023, arXiv:2310.12036, eq. 17, where h is the difference of sums; with
            means β does not depend on the answers' lengths: its authors asked TRL for this).
        beta: β.
        label_smoothing: ε.
        sft_weight: α of an added α · −ln π(chosen) / |chosen| (Pang et al. 2024, arXiv:2404.19733, eq. 1).
    """
    lengths_P2 = lengths_P2.clamp_min(1)
    ratio_P2 = policy_P2 - reference_P2
    if loss_type == "ipo":
        ratio_P2 = ratio_P2 / lengths_P2
    h_P = ratio_P2[:, 0] - ratio_P2[:, 1]
    if loss_type == "ipo":
        losses = (h_P - 1 / (2 * beta)).square()
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h_P) - label_smoothing * F.logsigmoid(-beta * h_P)
    if sft_weight:
        losses = losses - sft_weight * policy_P2[:, 0] / lengths_P2[:, 0]
    return losses


def main(options: DPOOptions) -> None:
    """Tune a model on pairs of a better and a worse answer (DPO, IPO)."""
    train(DirectPreference(options), options)


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(main, DPOOptions)
