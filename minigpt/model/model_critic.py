"""The transformer with one number on top: a reward for a whole answer, or a value for every token of it.

A reward model is a stock Hugging Face `Qwen3ForSequenceClassification` (or Llama's, Qwen2's) with one label: trunk and
`score.weight` have its names, the reward is read at the last token, and folders move both ways without conversion.
The critic of PPO is the same trunk with a `value_head`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from minigpt.errors import UserError

from .model_minigpt import DecoderModel, MiniGPTConfig

CAUSAL_LM, SEQUENCE_CLASSIFICATION = "ForCausalLM", "ForSequenceClassification"


class ScalarHead(nn.Linear):
    """One number for each hidden state, computed in float32 (float64 for float64): in bf16 margins would be steps.

    It starts small, so that what it says begins near 0 at any width: Normal(0, 0.1 / sqrt(E)).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1 * self.in_features**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., E] → [...]."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype))[..., 0]


class RewardModel(DecoderModel):
    """How good an answer is: a scalar read at the last token of prompt + answer.

    Example:
        >>> model = RewardModel(MiniGPTConfig(hidden_size=64, num_hidden_layers=2))
        >>> model.rewards([[1, 2, 3], [4, 5]]).shape
        torch.Size([2])
    """

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__(config)
        self.score = ScalarHead(config.hidden_size)

    @classmethod
    def from_decoder(cls, source: DecoderModel) -> Self:
        """A reward model on the transformer of `source` (shared, not copied), with a new head."""
        with torch.device("meta"):
            reward = cls(source.config)
        reward.model, reward.score = source.model, ScalarHead(source.config.hidden_size)
        reward.attention_backend = source.attention_backend
        return reward

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        last_tokens: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The reward at each of `last_tokens`.

        Args:
            input_ids, position_ids, document_ids, cu_seqlens: as `MiniGPT.forward` takes them.
            last_tokens: int64 of any shape, positions in the flattened batch; negative: none, with reward 0 and
                exactly zero gradient. Default: the last one of each row.

        Returns:
            float32 of the shape of `last_tokens`.
        """
        x_BTE = self.hidden_states(input_ids, position_ids, document_ids, cu_seqlens=cu_seqlens)
        if last_tokens is None:
            return self.score(x_BTE[:, -1])
        x = x_BTE.flatten(0, 1)[last_tokens.clamp_min(0)]
        return self.score(torch.where((last_tokens >= 0)[..., None], x, 0.0))

    @torch.no_grad()
    def rewards(self, sequences: Sequence[Sequence[int]], max_tokens: int = 16384) -> torch.Tensor:
        """The reward of each sequence of token ids (prompt and answer, up to the end of its turn).

        Args:
            sequences: None of them empty, as many as you like; neighbours of like length share a pass.
            max_tokens: Of one pass, padding included.

        Returns:
            float32 [n], on the model's device, in the order of `sequences`.
        """
        if not all(len(sequence) for sequence in sequences):
            raise ValueError("an empty sequence has no last token to read a reward at")
        device = self.score.weight.device
        rewards = torch.zeros(len(sequences), device=device)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        while order:
            T = len(sequences[order[0]])
            n = max(1, max_tokens // T)
            chosen, order = order[:n], order[n:]
            input_ids = torch.zeros((len(chosen), T), dtype=torch.int64)
            for b, i in enumerate(chosen):  # padding stands behind the tokens, where causal attention cannot see it
                input_ids[b, : len(sequences[i])] = torch.as_tensor(sequences[i])
            last_tokens = torch.tensor([b * T + len(sequences[i]) - 1 for b, i in enumerate(chosen)])
            found = self(input_ids.to(device), last_tokens=last_tokens.to(device))
            rewards[torch.tensor(chosen, device=device)] = found.float()
        return rewards

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> RewardModel:
        """Read the folder of a reward run (or its `hf/`), or a stock sequence-classification folder with one label.

        The float32 weights of a run (`reward_<hidden>.pth`) are taken where they lie beside `hf/`.

        Raises:
            FileNotFoundError, ValueError: as `minigpt.model.hf.load_hf_folder`; also when it is no reward model.
        """
        folder = Path(folder)
        run, folder = (folder, folder / "hf") if (folder / "hf" / "config.json").exists() else (None, folder)
        config, tensors = _load_folder(folder)
        model = cls(config)
        model.load_state_dict(tensors)
        masters = sorted(run.glob("reward_*.pth")) if run is not None else []
        if masters:
            model.load_state_dict(torch.load(masters[-1], map_location="cpu", weights_only=True))
        return model.to(dtype)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None, **options: Any) -> None:
        """Write a folder that transformers loads as a sequence classifier with one label, without code of ours.

        Args:
            folder: made when missing.
            dtype: of the stored weights; None keeps each tensor's own.
            **options: `state_dict` and `tokenizer_folder`, as `minigpt.model.hf.save_hf_folder` takes them.
        """
        from .hf import config_to_hf, save_hf_folder

        causal = config_to_hf(self.config)["architectures"][0]
        extra = {
            "architectures": [causal.replace(CAUSAL_LM, SEQUENCE_CLASSIFICATION)],
            "id2label": {"0": "reward"},
            "label2id": {"reward": 0},
        }
        save_hf_folder(self, folder, dtype, extra_config=extra, **options)


class ValueModel(DecoderModel):
    """PPO's critic: for every token, the return that is expected from there on."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__(config)
        self.value_head = ScalarHead(config.hidden_size)

    @classmethod
    def from_decoder(cls, source: DecoderModel) -> Self:
        """A critic on the transformer of `source` (shared, not copied).

        The head is a new one, or a copy of a reward model's: the last token's value is then its reward
        (InstructGPT starts its critic so, arXiv:2203.02155, section 3.5).
        """
        with torch.device("meta"):
            critic = cls(source.config)
        critic.model, critic.value_head = source.model, ScalarHead(source.config.hidden_size)
        critic.attention_backend = source.attention_backend
        if isinstance(source, RewardModel):
            critic.value_head.load_state_dict(source.score.state_dict())
        return critic

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """float32 [B, T]; the arguments are those of `MiniGPT.forward`."""
        return self.value_head(self.hidden_states(input_ids, position_ids, document_ids, cu_seqlens=cu_seqlens))


def _load_folder(folder: Path) -> tuple[MiniGPTConfig, dict[str, torch.Tensor]]:
    """Config and tensors of a stock sequence-classification folder, with exactly the keys of `RewardModel(config)`."""
    from .hf import _fit, _read_json, _read_safetensors, _weight_files, config_from_hf

    path = folder / "config.json"
    raw = _read_json(path)
    architectures = [str(name) for name in raw.get("architectures") or []]
    if not any(name.endswith(SEQUENCE_CLASSIFICATION) for name in architectures):
        raise UserError(
            f"{path}: {', '.join(architectures) or 'no architecture named'} is no reward model; "
            "train one with `minigpt train reward`, or give a …ForSequenceClassification folder with one label"
        )
    causal = [name.replace(SEQUENCE_CLASSIFICATION, CAUSAL_LM) for name in architectures]
    config = config_from_hf({**raw, "architectures": causal}, path)
    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        tensors |= _read_safetensors(file)
    score = tensors.pop("score.weight", None)
    if score is None or tuple(score.shape) != (1, config.hidden_size):
        found = "missing" if score is None else f"of shape {tuple(score.shape)}"
        raise UserError(
            f"{folder}: score.weight is {found}, a reward model has one label: (1, {config.hidden_size}); "
            "take both config.json and weights from one reward model"
        )
    # a tied language model has the trunk's keys, and a head that is none of them
    body = _fit(replace(config, tie_word_embeddings=True), tensors, folder)
    body.pop("lm_head.weight", None)
    return config, {**body, "score.weight": score}
