"""Tasks that are run while a model trains, on a plain copy of its weights.

Training must not notice: the copy is built without drawing a random number, it shares nothing with the engine, and the
state of the random generators is put back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minigpt.dataset.shards import PACKED_STAGES, PackedDataset

from .task import Settings
from .tasks import make_tasks

if TYPE_CHECKING:
    from minigpt.model.model_minigpt import MiniGPTConfig


class TrainingTasks:
    """Tasks, read once, for a model that changes.

    Args:
        specs: As `--tasks` of `minigpt eval`.
        limit: Questions or texts of each task.
        tokenizer_folder: Of the data that the model is trained on.
        valid: The validation split of that data, for `bpb`.
        enable_thinking: Whether questions are asked with thinking on or off; None: as the model likes.

    Raises:
        UserError: for what cannot be read.
    """

    def __init__(
        self,
        specs: Sequence[str],
        limit: int,
        tokenizer_folder: Path,
        valid: PackedDataset | None,
        enable_thinking: bool | None = None,
    ) -> None:
        from minigpt.dataset.chat import ChatEncoder

        texts = valid if valid is not None and valid.stage in PACKED_STAGES else None  # pairs and prompts are none
        self.tasks = make_tasks(specs, own_data=texts)
        self.encoder = ChatEncoder(tokenizer_folder)
        self.settings = Settings(limit=limit, enable_thinking=enable_thinking)

    def run(
        self, config: MiniGPTConfig, weights: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
    ) -> dict[str, float]:
        """Every metric as `task/metric`.

        Args:
            config: Of the model.
            weights: Its state dict, float32 on the CPU.
            device: Where to compute.
            dtype: In which precision.
        """
        from minigpt.model.model_minigpt import MiniGPT

        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            with torch.device("meta"):
                model = MiniGPT(config)
            model.load_state_dict(weights, assign=True)
            model = model.to(device=device, dtype=dtype).eval()
            results = [task.run(model, self.encoder, self.settings) for task in self.tasks]
        metrics = {f"{result.task}/{metric.name}": metric.value for result in results for metric in result.metrics}
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
