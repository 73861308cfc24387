"""The network: a decoder-only transformer, top to bottom in one file.

Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention, SwiGLU and (by default) tied embeddings:
parameter for parameter the Qwen3 layout with q/k-norm, the Llama layout without it, so that weights move between this
file and the Hugging Face world by their names alone (`hf.py`).

Shape suffixes: B rows of the batch, T tokens of a row, V vocabulary, E hidden size, H query heads, G key/value heads,
D head size, F intermediate size, N = B*T.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import AttentionPattern, attention, cached_pattern, packed_pattern
from .cross_entropy import linear_cross_entropy, linear_log_probs, linear_log_probs_and_entropy
from .kv_cache import KVCache


@dataclass
class MiniGPTConfig:
    """Shape of a model. The defaults give 5 million parameters, which train on a laptop.

    Args:
        vocab_size: Entries of the tokenizer, reserved ones included.
        hidden_size: Width of the residual stream.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads; a divisor of the query heads. None: as many as query heads.
        intermediate_size: Width of the feed-forward layer. None: 8/3 of hidden_size, rounded up to a multiple of 64.
        head_dim: Size of a head. None: hidden_size / num_attention_heads.
        max_position_embeddings: Longest sequence the model is meant for, in tokens.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: None, or how frequencies are scaled, as Hugging Face writes it (`rope_type: llama3` or `linear`).
        rms_norm_eps: Added to the mean square before its root is taken.
        tie_word_embeddings: Whether the output layer is the input embedding.
        qk_norm: RMSNorm on queries and keys per head (Qwen3). Without it the layout is Llama's.
        attention_bias: Bias on the q, k and v projections (Qwen2).
    """

    vocab_size: int = 6400
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = None  # type: ignore[assignment]  # None is replaced below
    intermediate_size: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    qk_norm: bool = True
    attention_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = math.ceil(self.hidden_size * 8 / 3 / 64) * 64
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; change one of them or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of channels")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class MiniGPTOutput(NamedTuple):
    """What a forward pass returns; the fields that were not asked for are None.

    Attributes:
        logits: [B, T, V].
        loss_sum: float32 scalar, the sum of weight · cross-entropy over the labelled positions, in nats. A sum, not a
            mean: only the caller knows the weight of the whole global batch that it is to be divided by.
        log_probs: float32 [B, T], of each label, in nats; 0 where there is none.
        entropy: float32 [B, T], of the distribution that each label is from; 0 where there is none.
    """

    logits: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, computed in float32 (arXiv:1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float() if x.dtype != torch.float64 else x
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class RoPE(nn.Module):
    """Rotary position embedding (arXiv:2104.09864, eq. 34), in the layout of Llama: channel i turns with i + D/2.

    It holds no buffer: frequencies stay float32 whatever the model is cast to, and nothing is stored in checkpoints.
    """

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling = config.head_dim, config.rope_theta, config.rope_scaling

    def forward(self, position_ids_BT: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position's angles: two tensors [B, 1, T, D/2] of the given dtype."""
        return torch.ops.minigpt.rotation(position_ids_BT, self.frequencies(position_ids_BT.device), dtype)

    def frequencies(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Radians per token of each channel pair, [D/2] float32."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        frequency = self.theta**-exponent
        scaling = self.scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind == "linear":
            return frequency / scaling["factor"]
        if kind == "llama3":
            return _llama3_frequencies(frequency, scaling)
        if kind != "default":
            raise ValueError(f"rope_scaling of type {kind!r} is not supported; known: default, linear, llama3")
        return frequency

    @staticmethod
    def rotate(x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Turn each pair of channels (i, i + D/2) by its angle."""
        first, second = x_BHTD.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# One operator that a compiler does not look into: else it would compute cosines anew for every layer and head.
@torch.library.custom_op("minigpt::rotation", mutates_args=())
def _rotation(
    position_ids_BT: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    angles_B1TD = position_ids_BT[:, None, :, None].float() * frequencies
    return angles_B1TD.cos().to(dtype), angles_B1TD.sin().to(dtype)


@_rotation.register_fake
def _(position_ids_BT, frequencies, dtype):
    B, T = position_ids_BT.shape
    cos, sin = (frequencies.new_empty(B, 1, T, len(frequencies), dtype=dtype) for _ in range(2))
    return cos, sin


def _llama3_frequencies(frequency: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, a smooth step between."""
    wavelength = 2 * math.pi / frequency
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions and optional RMSNorm on queries and keys."""

    def __init__(self, config: MiniGPTConfig, layer: int) -> None:
        super().__init__()
        E, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, D
        self.q_proj = nn.Linear(E, config.num_attention_heads * D, bias=bias)
        self.k_proj = nn.Linear(E, config.num_key_value_heads * D, bias=bias)
        self.v_proj = nn.Linear(E, config.num_key_value_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, E, bias=False)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(D, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(D, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        x_BTE: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        pattern: AttentionPattern,
        position_ids_BT: torch.Tensor,
        kv_cache: KVCache | None = None,
    ) -> torch.Tensor:
        heads = (*x_BTE.shape[:2], -1, self.head_dim)
        q_BHTD = self.q_norm(self.q_proj(x_BTE).view(heads)).transpose(1, 2)
        k_BGSD = self.k_norm(self.k_proj(x_BTE).view(heads)).transpose(1, 2)
        v_BGSD = self.v_proj(x_BTE).view(heads).transpose(1, 2)
        q_BHTD, k_BGSD = RoPE.rotate(q_BHTD, *rotation), RoPE.rotate(k_BGSD, *rotation)
        if kv_cache is not None:
            k_BGSD, v_BGSD = kv_cache.update(self.layer, k_BGSD, v_BGSD, position_ids_BT)
        out_BHTD = attention(q_BHTD, k_BGSD, v_BGSD, pattern)
        return self.o_proj(out_BHTD.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x_BTE)) * self.up_proj(x_BTE))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: MiniGPTConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x_BTE, rotation, pattern, position_ids_BT, kv_cache=None) -> torch.Tensor:
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), rotation, pattern, position_ids_BT, kv_cache)
        return x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))


class Transformer(nn.Module):
    """Token ids to final hidden states. (A module of its own because Hugging Face's parameter names say `model.…`.)"""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = RoPE(config)
        self.gradient_checkpointing = False

    def forward(self, input_ids_BT, position_ids_BT, pattern, kv_cache=None) -> torch.Tensor:
        x_BTE = self.embed_tokens(input_ids_BT)
        rotation = self.rope(position_ids_BT, x_BTE.dtype)
        for block in self.layers:
            if self.gradient_checkpointing and self.training:
                x_BTE = checkpoint(block, x_BTE, rotation, pattern, position_ids_BT, use_reentrant=False)
            else:
                x_BTE = block(x_BTE, rotation, pattern, position_ids_BT, kv_cache)
        return self.norm(x_BTE)


class DecoderModel(nn.Module):
    """The transformer that a head reads from: what the language model, the reward model and the critic share."""

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.attention_backend: str | None = None  # of packed rows; None: the fastest one for device and row length

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        kv_cache: KVCache | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, T, E] of every position, behind the last norm; the arguments are those of `MiniGPT.forward`."""
        if cu_seqlens is not None and document_ids is None:
            raise ValueError("cu_seqlens are given without document_ids, which say which tokens see each other")
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if kv_cache is not None:
            pattern = cached_pattern(position_ids, kv_cache.max_length)
        elif document_ids is not None:
            dtype = self.model.embed_tokens.weight.dtype
            pattern = packed_pattern(document_ids, dtype, self.attention_backend, cu_seqlens)
        else:
            pattern = AttentionPattern(self.attention_backend or "sdpa")
        return self.model(input_ids, position_ids, pattern, kv_cache)

    def num_parameters(self, embeddings: bool = True) -> int:
        """Number of parameters; a tied output layer counts once."""
        total = sum(p.numel() for p in self.parameters())
        return total if embeddings else total - self.model.embed_tokens.weight.numel()


class LMHead(nn.Linear):
    """Hidden states to logits or, with labels, straight to the summed loss or to the labels' log-probabilities.

    They are computed here and not by the caller because under ZeRO-3 a weight exists only while its own module runs.
    """

    def forward(  # type: ignore[override]  # with labels it is more than a linear layer
        self, x_BTE, labels_BT=None, weights_BT=None, reduction: str = "sum", temperature: float = 1.0
    ) -> torch.Tensor | MiniGPTOutput:
        if labels_BT is None:
            return super().forward(x_BTE)
        return score_labels(self.weight, x_BTE, labels_BT, weights_BT, reduction, temperature)


def score_labels(weight_VE, x_BTE, labels_BT, weights_BT, reduction: str, temperature: float) -> MiniGPTOutput:
    """What an output layer makes of labels; `reduction` and the rest are those of `MiniGPT.forward`."""
    x_NE, labels_N = x_BTE.flatten(0, 1), labels_BT.flatten()
    if reduction == "sum":
        if weights_BT is None:
            weights_BT = torch.ones_like(labels_BT, dtype=torch.float32)
        return MiniGPTOutput(loss_sum=linear_cross_entropy(x_NE, weight_VE, labels_N, weights_BT.flatten()))
    if reduction == "none":
        log_probs_N = linear_log_probs(x_NE, weight_VE, labels_N, temperature)
        return MiniGPTOutput(log_probs=log_probs_N.view(labels_BT.shape))
    if reduction == "entropy":
        log_probs_N, entropy_N = linear_log_probs_and_entropy(x_NE, weight_VE, labels_N, temperature)
        return MiniGPTOutput(log_probs=log_probs_N.view(labels_BT.shape), entropy=entropy_N.view(labels_BT.shape))
    raise ValueError(f"reduction is {reduction!r}; give sum, none or entropy")


class MiniGPT(DecoderModel):
    """A causal language model.

    Example:
        >>> model = MiniGPT(MiniGPTConfig(vocab_size=6400, hidden_size=256, num_hidden_layers=2))
        >>> model(torch.randint(0, 6400, (2, 10))).logits.shape
        torch.Size([2, 10, 6400])
    """

    def __init__(self, config: MiniGPTConfig) -> None:
        super().__init__(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Normal(0, 0.02); what writes into the residual stream is scaled by 1/sqrt(2·layers) (GPT-2, section 2.3)."""
        residual_std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(parameter)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else 0.02)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        kv_cache: KVCache | None = None,
        cu_seqlens: torch.Tensor | None = None,
        reduction: str = "sum",
        temperature: float = 1.0,
    ) -> MiniGPTOutput:
        """Logits of every position or, when `labels` are given, what the labels cost, without the logits in memory.

        Args:
            input_ids: int64 [B, T].
            position_ids: int64 [B, T], positions within each document. Default: 0..T-1.
            document_ids: [B, T], which document a token belongs to; documents do not see each other. Default: a row is
                one document.
            labels: int64 [B, T], already shifted: the token that position t is to predict, -100 for none.
            weights: float32 [B, T], weight of each label. Default: 1.
            kv_cache: the tokens are new; they are written at `position_ids` of their rows and see what lies before.
            cu_seqlens: int32, boundaries of the documents in the flattened batch, when known (varlen attention).
            reduction: "sum": the weighted loss of all labels; "none": the log-probability of each label, unweighted;
                "entropy": that, and the entropy of the distribution that it is from.
            temperature: log-probabilities and entropy are those of the logits divided by it.

        Returns:
            MiniGPTOutput with `logits` [B, T, V], or with `loss_sum`, or with `log_probs` (and `entropy`) [B, T].
        """
        x_BTE = self.hidden_states(input_ids, position_ids, document_ids, kv_cache, cu_seqlens)
        if labels is None:
            return MiniGPTOutput(logits=self.lm_head(x_BTE))
        return self.lm_head(x_BTE, labels, weights, reduction, temperature)

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, max_new_tokens: int = 64, **sampling: Any) -> torch.Tensor:
        """Continue each row of `input_ids` [B, T]; greedy unless `temperature` (or another option) says otherwise.

        Args:
            input_ids: int64 [B, T] prompts of equal length (ragged ones: `minigpt.generation.generate.generate`).
            max_new_tokens: At most this many tokens are added.
            **sampling: temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id, seed: see
                `minigpt.generation.sampling.SamplingParams`.

        Returns:
            int64 [B, T + new]: prompt and continuation; behind a row's end of text stands the end-of-text id.
        """
        from minigpt.generation.generate import generate_ids

        return generate_ids(self, input_ids, max_new_tokens=max_new_tokens, **sampling)

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> MiniGPT:
        """Read a Hugging Face folder (Qwen3 or Llama layout): config.json and safetensors."""
        from .hf import load_hf_folder

        config, state_dict = load_hf_folder(folder)
        model = cls(config)
        model.load_state_dict(state_dict)
        return model.to(dtype)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None, **options: Any) -> None:
        """Write a Hugging Face folder that transformers, vLLM and llama.cpp load without any code of ours."""
        from .hf import save_hf_folder

        save_hf_folder(self, folder, dtype=dtype, **options)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; a tied output layer may be missing from the file or present in it."""
        if self.config.tie_word_embeddings and "lm_head.weight" not in state_dict:
            key = "model.embed_tokens.weight"
            if key in state_dict:
                state_dict = {**state_dict, "lm_head.weight": state_dict[key]}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
