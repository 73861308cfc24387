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

    Shapes: `kv`: [layers, 2, batch_size, num_key_value_heads, max_length, head_dim], of which `k[layer]` and
    `v[layer]` are views.
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
        self.kv = torch.zeros(config.num_hidden_layers, 2, *shape, dtype=dtype, device=device)
        self._name_layers()

    def _name_layers(self) -> None:
        # detached: where gradients are recorded, a write into one layer is no business of the others
        self.k, self.v = ([self.kv[layer, i].detach() for layer in range(len(self.kv))] for i in (0, 1))

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
        chosen.kv = self.kv[:, :, index_N]
        chosen._name_layers()
        return chosen

    def resized(self, max_length: int) -> KVCache:
        """A cache with the same contents and room for more tokens."""
        larger = object.__new__(KVCache)
        larger.batch_size, larger.max_length = self.batch_size, max_length
        shape = list(self.kv.shape)
        shape[4] = max_length
        larger.kv = self.kv.new_zeros(shape)
        larger.kv[..., : self.max_length, :] = self.kv
        larger._name_layers()
        return larger

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        """The first `tokens` of one row become those of another."""
        self.kv[:, :, target, :, :tokens] = self.kv[:, :, source, :, :tokens]

    def read(self, row: int, start: int, end: int) -> torch.Tensor:
        """A copy of some positions of a row: [layers, 2, num_key_value_heads, end - start, head_dim]."""
        return self.kv[:, :, row, :, start:end].clone()

    def write(self, row: int, start: int, kv: torch.Tensor) -> None:
        """Puts what `read` gave into a row, from position `start` on."""
        self.kv[:, :, row, :, start : start + kv.shape[3]] = kv

    def bytes(self) -> int:
        """Memory held, in bytes."""
        return self.kv.numel() * self.kv.element_size()
