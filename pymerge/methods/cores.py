"""Adapters' task vectors in coordinates of the little that they span: D_t = Q_left C_t Q_right^T with small C_t."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.methods.base import Factors


class Cores(NamedTuple):
    """left [m, p] and right [n, q], orthonormal float64 columns; cores T of [p, q], float32."""

    left: Tensor
    right: Tensor
    cores: tuple[Tensor, ...]

    def factors(self, core: Tensor) -> Factors:
        """left core right^T, on the side of fewer columns."""
        if core.shape[0] <= core.shape[1]:
            return Factors(self.left.float(), (core.double() @ self.right.mT).float())
        return Factors((self.left @ core.double()).float(), self.right.mT.float().contiguous())


def cores_of(parts: Sequence[Factors]) -> Cores:
    """Two QR decompositions, of the stacked left and of the stacked right factors, in float64.

    Both bases hold (1, ..., 1), and are turned such that it has equal coordinates: column means over the rows of a core
    are those of the matrix up to one factor, and so is what ACE does with means.

    Cost  (m + n) (sum r)^2 float64 multiply-adds."""
    left, by_left = _basis([part.left for part in parts])
    right, by_right = _basis([part.right.mT for part in parts])
    cores = tuple((a @ b.mT).float() for a, b in zip(by_left, by_right, strict=True))
    return Cores(left, right, cores)


def orthonormal(stack: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Q [m, p] with orthonormal columns, and the coordinates [p, r_t] of each of the blocks [m, r_t]; float64."""
    q, r = torch.linalg.qr(torch.cat([block.double() for block in stack], dim=1))
    return q, list(r.split([block.shape[1] for block in stack], dim=1))


def _basis(stack: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    m = stack[0].shape[0]
    ones = torch.full((m, 1), m**-0.5, dtype=torch.float64, device=stack[0].device)
    q, (first, *coordinates) = orthonormal([ones, *stack])
    # The Householder reflection that takes the coordinates of `ones`, (+-1, 0, ...), to equal ones.
    p = q.shape[1]
    normal = first[:, 0] - p**-0.5
    size = float(normal @ normal)
    if size < 1e-20:
        return q, coordinates

    def reflect(x: Tensor) -> Tensor:
        return x - torch.outer(normal, (normal @ x) * (2 / size))

    return reflect(q.mT).mT, [reflect(c) for c in coordinates]
