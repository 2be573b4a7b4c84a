"""What a truncated SVD returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class SVDInfo:
    """How good a result is, one entry per matrix of the batch.

    residual        float64 [...], ||A - U diag(S) Vh|| / ||A|| (Frobenius) as sqrt(1 - captured): of what lies below
                    1e-7 (gram), or sqrt(4 eps) of A's dtype (other routes), only that; 0 for a zero matrix
    captured        float64 [...], share of ||A||^2 in the returned values; 1 for a zero matrix
    excess          float64 [...], estimate from above of (residual^2 - best^2) / best^2, best: of any matrix
                    of this rank, not less than 4 eps; 0 after a direct decomposition
    certified_rank  int64 [...], largest j for which both leading j-dimensional singular subspaces are proven to lie
                    within sin(angle) <= 0.1 of the true ones (provided that no larger direction was missed)
    rounds          int64 [...], Rayleigh-Ritz steps; 0 after a direct decomposition
    routes          "gram", "iteration", "full", "fast" or "zero"
    reasons         why this route, and what it fell through from
    """

    residual: Tensor
    captured: Tensor
    excess: Tensor
    certified_rank: Tensor
    rounds: Tensor
    routes: tuple[str, ...]
    reasons: tuple[str, ...]


class SVD(NamedTuple):
    """A ~ U diag(S) Vh: U [..., m, k], S [..., k] descending, Vh [..., k, n]."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    info: SVDInfo
