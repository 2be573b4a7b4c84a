"""What every route of the truncated SVD hands back, for one matrix that is at least as wide as high."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.linalg import _dense
from pymerge.linalg._certify import certified_rank

PLAIN_PRODUCT = (
    1e-2  # s_k / s_1 down to which a^T u is computed in a's dtype: rounding grows by no more than its inverse
)


@dataclass(frozen=True)
class Factors:
    """left [r, k] and right [n, k] in the dtype of the matrix, s float64 [k]; excess as in SVDInfo."""

    left: Tensor
    s: Tensor
    right: Tensor | None
    certified: int
    excess: float = 0.0
    rounds: int = 0


def rounding(a: Tensor, dtype: torch.dtype) -> float:
    """Relative size (of ||a||_F^2) of the errors that a float64 Gram matrix and its eigensolver make: the sum of
    max(r, n) products, and LAPACK's backward error with the same factor."""
    return 2 * max(a.shape) * torch.finfo(dtype).eps


def from_gram(a: Tensor, rank: int, norm: float, *, both: bool = True) -> Factors:
    """Eigenpairs of a a^T in float64, the other side by one product."""
    r = a.shape[0]
    theta, left = _dense.top_eigh(_dense.gram(a), min(rank + 1, r))
    s = theta.sqrt()
    error = rounding(a, torch.float64) * norm**2
    errors = error / s.clamp(min=error**0.5)  # ||G u - theta u|| / s: the residual of the triplet
    certified = certified_rank(s, errors, rank)
    left, s = left[:, :rank], s[:rank]
    right = None
    if both:
        plain = float(s[-1]) > PLAIN_PRODUCT * float(s[0])
        right = _dense.unit_columns(_dense.other_side(a, left.to(a.dtype) if plain else left), s).to(a.dtype)
    return Factors(left.to(a.dtype), s, right, certified)


def from_full(a: Tensor, rank: int) -> Factors:
    """LAPACK's (cuSOLVER's) SVD of the tall transpose: of the wide matrix it takes 2-3 times as long."""
    right, s, left = torch.linalg.svd(a.mT, full_matrices=False)
    wide = s.double()
    error = 4 * max(a.shape) ** 0.5 * torch.finfo(a.dtype).eps * float(wide[0])
    certified = certified_rank(wide[: rank + 1], torch.full_like(wide[: rank + 1], error), rank)
    return Factors(left[:rank].mT, wide[:rank], right[:, :rank], certified)


def zero(a: Tensor, rank: int) -> Factors:
    """Unit vectors."""
    left, right = (torch.eye(x, rank, dtype=a.dtype, device=a.device) for x in a.shape)
    return Factors(left, torch.zeros(rank, dtype=torch.float64, device=a.device), right, 0)
