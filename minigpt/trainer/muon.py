"""Muon for the matrices, AdamW for the rest, on plain parameters or on ZeRO's flat partitions.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
orthogonal matrix, so that every direction is learnt at the same speed. Small models learn several times faster by it.
Updates are scaled to the root mean square that AdamW's have (arXiv:2502.16982, eq. 4), so one learning rate and one
weight decay serve both.

Under ZeRO stages 1 and 2 a rank's optimizer sees one flat slice of all matrices, and a matrix may straddle two ranks.
The momentum is element-wise and stays sliced; its update is gathered, each rank orthogonalises the matrices that reach
into its slice, and takes its slice of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any, NamedTuple

import torch

MUON = "muon"  # marks a parameter group; not DeepSpeed's `use_muon`, which would have it do the same a second time
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_ADAMW_RMS = 0.2


class _Part(NamedTuple):
    """What this process updates of a matrix: `weights`, a flat view of them, are `elements` of the matrix in order."""

    direction: torch.Tensor
    weights: torch.Tensor
    elements: slice


class MuonWithAdamW(torch.optim.AdamW):
    """Groups with `"muon": True` hold matrices and are updated by Muon, the others by AdamW.

    Args:
        groups: As for AdamW; in a group marked as Muon all parameters have two dimensions.
        lr: Learning rate of both.
        betas: AdamW's.
        momentum: Muon's.
        compute_dtype: What the orthogonalisation is computed in.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        momentum: float = 0.95,
        compute_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(list(groups), lr=lr, betas=betas, fused=True)
        self.momentum, self.compute_dtype = momentum, compute_dtype
        for group in self.param_groups:
            if group.get(MUON):
                group["shapes"] = [tuple(p.shape) for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        for group in groups:
            if group.get(MUON):
                self._muon_step(group)
        self.param_groups = [group for group in groups if not group.get(MUON)]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups

    def _muon_step(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        directions = [self._direction(p) for p in parameters]
        if parameters and parameters[0].dim() == 1:  # ZeRO's slice of all matrices laid end to end
            parts = _parts_of_slice(parameters[0], directions[0], group["shapes"])
        else:
            parts = [_Part(d, p.view(-1), slice(None)) for d, p in zip(directions, parameters, strict=True)]
        for p in parameters:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        updates = _orthogonal([part.direction for part in parts], self.compute_dtype)
        for part, update in zip(parts, updates, strict=True):
            scale = _ADAMW_RMS * max(update.shape) ** 0.5
            part.weights.add_(update.reshape(-1)[part.elements], alpha=-group["lr"] * scale)

    def _direction(self, p: torch.Tensor) -> torch.Tensor:
        """Nesterov momentum: what is orthogonalised."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
            state["step"] = torch.zeros((), device=p.device)  # AdamW's `load_state_dict` wants one in every state
        state["step"] += 1
        assert p.grad is not None
        gradient = p.grad.to(p.dtype)
        state["momentum"].mul_(self.momentum).add_(gradient)
        return gradient.add(state["momentum"], alpha=self.momentum)


def _parts_of_slice(slice_: torch.Tensor, direction: torch.Tensor, shapes: list[tuple[int, int]]) -> list[_Part]:
    """The matrices that reach into this rank's slice of all weights. `direction`: the same slice of all directions."""
    rank, world = 0, 1
    if torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    full = direction
    if world > 1:
        full = direction.new_empty(world * direction.numel())
        torch.distributed.all_gather(list(full.chunk(world)), direction.contiguous())
    first, last = rank * slice_.numel(), (rank + 1) * slice_.numel()
    parts: list[_Part] = []
    start = 0
    for shape in shapes:
        end = start + shape[0] * shape[1]
        low, high = max(start, first), min(end, last)
        if low < high:
            matrix = full[start:end].view(shape)
            parts.append(_Part(matrix, slice_[low - first : high - first], slice(low - start, high - start)))
        start = end
    return parts


def _orthogonal(matrices: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """`orthogonalise` of each matrix, those of one shape together."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(matrices)
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    for shape, indices in by_shape.items():
        batch = matrices[indices[0]].new_empty((len(indices), *shape), dtype=dtype)
        for row, i in zip(batch, indices, strict=True):
            row.copy_(matrices[i])  # which rounds: a pass less than to stack first
        for i, result in zip(indices, orthogonalise(batch, dtype), strict=True):
            found[i] = result
    return found


def orthogonalise(matrices_KMN: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """About U Vᵀ of each matrix U S Vᵀ: singular values between 0.7 and 1.2.

    Args:
        matrices_KMN: K matrices.
        dtype: Of the computation and the result.
    """
    x = matrices_KMN.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT.contiguous()  # a product of transposed views takes twice as long
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    wide = x.shape[2] >= 2 * x.shape[1]
    x = _newton_schulz_on_gram(x) if wide and dtype.itemsize >= 4 else _newton_schulz(x)
    return x.mT if tall else x


def _newton_schulz(x_KMN: torch.Tensor) -> torch.Tensor:
    """The quintic iteration X ← a·X + (b·G + c·G²)·X with G = X Xᵀ."""
    a, b, c = _COEFFICIENTS
    x = x_KMN
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)  # rounded once
    return x


def _newton_schulz_on_gram(x_KMN: torch.Tensor) -> torch.Tensor:
    """The same iteration with fewer operations where N is much more than M: 17 products of [M, M] and 2 of [M, N].

    Every step multiplies X by a polynomial P of the Gram matrix G = X Xᵀ, and the next G is P G P. So G alone is
    iterated on, and X is multiplied once by the product of all P. G has the squares of the singular values, which
    bfloat16 could not tell apart.
    """
    a, b, c = _COEFFICIENTS
    gram = x_KMN @ x_KMN.mT
    polynomials: list[torch.Tensor] = []
    for iteration in range(_ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        polynomials.append(polynomial)
        if iteration + 1 < _ITERATIONS:
            gram = polynomial @ gram @ polynomial
    return reduce(torch.matmul, polynomials) @ x_KMN
