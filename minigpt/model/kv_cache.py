"""The memory of generation: keys and values of every layer, preallocated, written in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .model_minigpt import MiniGPTConfig


class KVCache:
    """Keys and values for `batch_size` sequences of up to `max_length` tokens.

    A token at position p of row b is stored at index p of that row, so ragged rows need no padding bookkeeping: a query
    at position p sees the indices 0..p of its own row, and whatever lies behind a row's last token is never seen and
    is overwritten when the row grows.

    Shapes: `k[layer]`, `v[layer]`: [batch_size, num_key_value_heads, max_length, head_dim].
    """

    def __init__(
        self,
        config: MiniGPTConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch_size, self.max_length = batch_size, max_length
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def update(
        self, layer: int, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, position_ids_BS: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new keys and values at their positions; return everything stored for this layer (views)."""
        index = position_ids_BS[:, None, :, None].expand(-1, k_BHSD.shape[1], -1, k_BHSD.shape[3])
        self.k[layer].scatter_(2, index, k_BHSD)
        self.v[layer].scatter_(2, index, v_BHSD)
        return self.k[layer], self.v[layer]

    def rows(self, index_N: torch.Tensor) -> KVCache:
        """A cache of its own with copies of the rows of these numbers (int64 [N]); a row may be taken several times."""
        chosen = object.__new__(KVCache)
        chosen.batch_size, chosen.max_length = len(index_N), self.max_length
        chosen.k, chosen.v = [k[index_N] for k in self.k], [v[index_N] for v in self.v]
        return chosen

    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in (*self.k, *self.v))
