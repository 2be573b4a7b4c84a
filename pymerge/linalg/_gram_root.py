"""The polar factor from the float64 Gram matrix: eigenvectors, a rank rule, one Newton step in their basis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.linalg import _dense
from pymerge.ops.gram64 import gram64

EPS64 = 2.0**-52
TARGET = 1e-7  # error that float32 results may have beyond their own rounding
SLAB = 1 << 20  # entries that are widened to float64 at a time
FLOAT32_SPREAD = 4.0  # up to which a float32 product with the root is within some 1e-6
SAME_VALUE = 1e-3  # singular values on both sides of tol closer than this are not told apart
# Below this share of the largest singular value the float64 Gram matrix holds rounding errors, not data.
RESOLUTION = 4e-7


def wide_product(x: Tensor, s: Tensor) -> Tensor:
    """x [..., m, n] s [..., n, k] in float64, rounded to x's dtype; a block of rows at a time, no float64 copy of x."""
    if x.dtype == torch.float64:
        return x @ s
    out = x.new_empty((*x.shape[:-1], s.shape[-1]))
    step = max(64, SLAB // max(1, x.shape[-1]))
    for i in range(0, x.shape[-2], step):
        out[..., i : i + step, :] = x[..., i : i + step, :].double() @ s
    return out


@dataclass(frozen=True)
class GramRoot:
    """(X^T X)^(-1/2) on the space of the kept singular values, of each matrix of a batch."""

    sigma: Tensor  # float64 [..., n], ascending
    vectors: Tensor  # float64 [..., n, n], right singular vectors in columns
    keep: Tensor  # bool [..., n]

    @property
    def rank(self) -> Tensor:
        return self.keep.sum(-1)

    @property
    def smallest(self) -> Tensor:
        """The smallest kept singular value [...]; 1 where none is kept."""
        kept = torch.where(self.keep, self.sigma, torch.inf).amin(-1)
        return torch.where(torch.isfinite(kept), kept, 1.0)

    @property
    def condition(self) -> Tensor:
        """Largest over smallest kept singular value [...]; 0 where none is kept."""
        return torch.where(self.keep.any(-1), self.sigma.amax(-1) / self.smallest, 0.0)

    @property
    def inverse(self) -> Tensor:
        """1 / sigma [..., n], 0 where dropped."""
        return torch.where(self.keep, 1.0 / torch.where(self.keep, self.sigma, 1.0), 0.0)

    def root(self) -> Tensor:
        """The inverse root itself, float64 [..., n, n]: V diag(1/sigma) V^T as a Gram matrix, half the products."""
        return gram64((self.vectors * self.inverse.sqrt()[..., None, :]).mT)

    @property
    def spread(self) -> float:
        """rms(sigma) rms(1/sigma) of the worst matrix: what a product with the root multiplies rounding errors by."""
        mean = self.sigma.square().mean(-1) * self.inverse.square().mean(-1)
        return float(mean.amax().sqrt()) if mean.numel() else 0.0

    @property
    def mixing(self) -> float:
        """What the Gram matrix' rounding does to the worst matrix: it grows with the square of the condition."""
        return float(self.condition.amax().square() * 16 * EPS64) if self.condition.numel() else 0.0

    @property
    def is_plain(self) -> bool:
        """Products with the root need no Newton step for float32 results."""
        return self.mixing <= TARGET


def gram_root(x: Tensor, tol: float) -> GramRoot:
    """x [..., m, n], m >= n. Keeps singular values above tol times the largest."""
    values, vectors = _dense.eigh(gram64(x))
    sigma = values.clamp(min=0).sqrt()
    top = sigma[..., -1:]
    return GramRoot(sigma, vectors, (sigma > tol * top) & (top > 0))


def _step_weights(root: GramRoot) -> Tensor:
    """W [..., n, n] of `refined`: what each entry of the defect contributes to the step."""
    smallest = root.smallest[..., None, None]
    row, row_kept = root.sigma[..., :, None], root.keep[..., :, None]
    column, column_kept = root.sigma[..., None, :], root.keep[..., None, :]
    inside = -row / torch.where(row_kept & column_kept, row + column, 1.0)
    gap = (row.square() - column.square()).abs()
    apart = gap > SAME_VALUE * torch.maximum(row, column).square()  # else the cut at tol is arbitrary anyway
    across = torch.where(row_kept, row, smallest) * smallest / torch.where(apart, gap, 1.0)
    weights = torch.where((row_kept ^ column_kept) & apart, across, 0.0)
    return torch.where(row_kept & column_kept, inside, weights)


def refined(x: Tensor, root: GramRoot) -> tuple[Tensor, float]:
    """The polar factor with one Newton step, and the largest entry of the step.

    Columns of Z = X V / sigma are accurate to condition * eps, but orthonormal and aligned with X's singular vectors to
    condition^2 * eps only. With F = Z^T Z - 1, first-order perturbation of X = Z diag(sigma) V^T gives
    P = Z (1 + F o W) V^T, W_ij = -sigma_i / (sigma_i + sigma_j); what is left is of the order of F^2. Dropped columns j
    are divided by s, the smallest kept value, instead; they turn the kept spaces on both sides:
    W_ij = sigma_i s / (sigma_i^2 - sigma_j^2) and W_ji = s^2 / (sigma_i^2 - sigma_j^2).
    """
    scale = torch.where(root.keep, root.inverse, 1.0 / root.smallest[..., None])
    z = wide_product(x, root.vectors * scale[..., None, :])
    gram = gram64(z) if z.dtype == torch.float64 else (z.mT @ z).double()
    one = torch.diag_embed(root.keep.double())
    step = (gram - one) * _step_weights(root)  # [..., n, n]
    size = float(step.abs().amax()) if step.numel() else 0.0
    return z @ ((one + step).to(z.dtype) @ root.vectors.mT.to(z.dtype)), size


def polar_of_gram(x: Tensor, root: GramRoot) -> tuple[Tensor, float]:
    """The polar factor [..., m, n] of x, and the size of the Newton step that it took (0: none was worth it)."""
    if x.dtype == torch.float64 or not root.is_plain:
        return refined(x, root)
    if root.spread <= FLOAT32_SPREAD:
        return x @ root.root().to(x.dtype), 0.0
    return wide_product(x, root.root()), 0.0
