"""What the stages share that can train an adapter instead of all weights: options, network, files."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

import torch

from minigpt.errors import UserError
from minigpt.model.model_lora import apply_lora, lora_layers, refuse_tied, split_state_dict
from minigpt.model.model_minigpt import MiniGPT
from minigpt.model.peft_format import save_adapter

from .options import TrainOptions, check_adapter
from .setup import model_folder
from .stage import Stage
from .weights import write_language_model, write_state_dict

ADAPTER_WEIGHTS = "lora"  # beginning of the name of the file that holds an adapter and no model
MERGED_WEIGHTS = "merged"


@dataclass
class LoRAOptions(TrainOptions):
    __doc__ = f"""{cleandoc(TrainOptions.__doc__ or "")}
    lora_rank: Rank of the adapter that is trained while the model is frozen. 0: all weights are trained.
    lora_alpha: Scale of the adapter. None: twice the rank.
    lora_dropout: Dropout on the input of the adapter.
    lora_targets: Linear layers that get an adapter: ends of names (q_proj v_proj), whole names or regular
        expressions. None: all but the output layer.
    lora_rslora: Scale by alpha / √rank instead of alpha / rank.
    lora_dora: Also train the length of every row of the adapted weights (DoRA).
"""

    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    lora_targets: list[str] | None = None
    lora_rslora: bool = False
    lora_dora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0:
            raise UserError(f"--lora_rank is {self.lora_rank}, it must be at least 0")
        check_adapter(self)
        if self.lora_rank and self.optimizer == "auto":
            self.optimizer = "adamw"  # A and B are factors: making their updates orthogonal has no meaning


class AdapterStage(Stage):
    """A stage that trains an adapter when `--lora_rank` says so, all weights otherwise. Its options: `LoRAOptions`."""

    def network(self, model: MiniGPT, options: TrainOptions) -> Any:
        """The model, frozen and with an adapter, or as it is."""
        assert isinstance(options, LoRAOptions)
        if not options.lora_rank:
            return super().network(model, options)
        apply_lora(
            model,
            options.lora_rank,
            options.lora_alpha,
            options.lora_dropout,
            options.lora_targets,
            options.lora_rslora,
            options.lora_dora,
        )
        refuse_tied(model)  # at the end it is merged: better said now
        return model

    def language_model(self, network: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model with the adapter merged into it."""
        return split_state_dict(network, weights)[0] if lora_layers(network) else weights

    def write_weights(
        self,
        folder: Path,
        network: Any,
        weights: dict[str, torch.Tensor],
        tokenizer_folder: Path,
        options: TrainOptions,
    ) -> list[Path]:
        """`adapter/` (PEFT's format) and `lora_<hidden_size>.pth`, and the model with the adapter merged into it, as
        the other stages leave it, so that it can be talked to, exported and trained further at once."""
        if not lora_layers(network):
            return super().write_weights(folder, network, weights, tokenizer_folder, options)
        merged, matrices = split_state_dict(network, weights)
        base = None if options.init is None else str(model_folder(options.init))
        adapter = save_adapter(network, folder / "adapter", weights=weights, base=base)
        write_state_dict(folder / f"{ADAPTER_WEIGHTS}_{network.config.hidden_size}.pth", matrices)
        model = write_language_model(
            folder,
            network,
            merged,
            name=MERGED_WEIGHTS if self.weights == ADAPTER_WEIGHTS else self.weights,
            tokenizer_folder=tokenizer_folder,
            stop_token=self.stop_token,
            dtype=options.export_dtype,
        )
        return [adapter, *model]
