"""Activated weights, the directions that PAVE drops, and how many each model loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pymerge.errors import NonFinite, NumericError
from pymerge.linalg import capped_ridge, singular_values, tail_subspace
from pymerge.methods.base import LayerInput

Metric = Literal["cov", "chol", "diag", "none"]
FACTOR = 1.5  # a model loses at most about this times its even share


@dataclass(frozen=True, kw_only=True)
class Ridge:
    """eps of C + eps I: `start` (times the mean of diag C if relative), doubled until the condition is met."""

    start: float
    relative: bool
    max_condition: float  # 0: no condition

    def of(self, c: Tensor, mean: float) -> float:
        """For a matrix with the extreme eigenvalues of C; mean: of diag C."""
        start = self.start * mean if self.relative and mean else self.start
        # The smallest eigenvalue is 0 at least: the usual case, without a factorisation.
        if not self.max_condition or largest_at_most(c) + start <= self.max_condition * start:
            return start
        return capped_ridge(c, start, self.max_condition)


def largest_at_most(c: Tensor) -> float:
    """A bound on the largest eigenvalue of C [n, n], positive semidefinite: with Q [16, n] orthonormal and R the rest
    of the space, that of Q C Q^T plus ||R C R^T||. Near the eigenvalue where a few directions carry most of C: Q spans
    what one step of subspace iteration finds. Three reads of C."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(min(16, c.shape[0]), c.shape[0], generator=generator, dtype=torch.float64).to(c)
    q = torch.linalg.qr((start @ c).mT).Q.mT.contiguous()  # in rows: products of a few columns are slower
    image = q @ c
    inner, whole = image @ q.mT, float(c.norm() ** 2)
    rest = whole - 2.0 * float(image.norm() ** 2) + float(inner.norm() ** 2)
    return float(torch.linalg.eigvalsh(inner)[-1]) + max(rest, 1e-14 * whole) ** 0.5  # `rest` is off by rounding


def activated(
    weight: Tensor, seen: LayerInput, metric: Metric, divisor: int | None, ridge: Ridge
) -> tuple[Tensor, float]:
    """P = W F up to a factor [m, n] in float64, and eps. weight [m, n] float64.

    cov: F = C; chol: C = F F^T; diag: F = diag(mean_j |C_ij|); none: F = 1. C = X^T X / N + eps I."""
    if metric == "none":
        return weight, 0.0
    rows = max(1, divisor or seen.rows)
    x = seen.samples if metric == "cov" else None
    if x is not None and x.shape[0] < x.shape[1]:  # 4 m n N operations; C itself takes N n^2, and 2 m n^2 with it
        return _activated_by_rows(weight, x.to(weight), rows, ridge)
    c = seen.second_moment(torch.float64).to(weight.device).div_(rows)
    eps = ridge.of(c, float(c.diagonal().mean()))
    c.diagonal().add_(eps)
    if metric == "diag":
        return weight * c.abs().mean(1), eps
    if metric == "cov":
        return weight @ c, eps
    factor, failed = torch.linalg.cholesky_ex(c)
    if int(failed):
        raise NumericError(f"the inputs' covariance with eps {eps:g} is not positive definite: give a larger eps")
    return weight @ factor, eps


def _activated_by_rows(weight: Tensor, x: Tensor, rows: int, ridge: Ridge) -> tuple[Tensor, float]:
    """As `activated` with metric cov, without C: X [N, n] has few rows. C has the eigenvalues of X X^T / N, and 0."""
    n, features = x.shape
    small = x.new_zeros(n + 1, n + 1)
    small[:n, :n] = (x @ x.mT).div_(rows)
    eps = ridge.of(small, float(small.diagonal().sum()) / features)
    return ((weight @ x.mT) @ x).div_(rows).add_(weight, alpha=eps), eps


def spectrum(p: Tensor) -> Tensor:
    """s_i / s_1 of P, descending, float64 [min(m, n)]; NaN where P is 0."""
    norm = p.norm()
    if not bool(torch.isfinite(norm)):
        raise NonFinite("an activated weight has NaN or infinite entries")
    s = singular_values((p / norm.clamp(min=torch.finfo(p.dtype).tiny)).float()).double()
    return s / s[0]


def ranks(z: Sequence[Tensor], ratio: float, factor: float = FACTOR) -> list[int]:
    """How many directions each of T models keeps in one layer, from its z = s_i / s_1 [K], descending.

    The greedy search that takes one direction at a time from the model whose last one is smallest (the first of equal
    ones) while the kept share of all T K is at least `ratio`, done as one sort: a stable one of the T tails. No model
    goes below K - round(factor (K - round(ratio K))); a model of zeros loses nothing."""
    tasks, k = len(z), z[0].shape[0]
    floor = max(0, k - round(factor * (k - round(ratio * k))))
    whole = tasks * k
    count = next((q for q in range(whole + 1) if (whole - q) / whole < ratio), whole)
    alive = [t for t in range(tasks) if not bool(torch.isnan(z[t]).any())]
    pool = torch.cat([z[t][floor:] for t in alive]) if alive else torch.empty(0)
    owner = torch.tensor([t for t in alive for _ in range(k - floor)], dtype=torch.long)
    taken = owner[torch.sort(pool, stable=True).indices[:count].cpu()]
    return [k - int((taken == t).sum()) for t in range(tasks)]


def purified(weight: Tensor, delta: Tensor, p: Tensor, rank: int) -> Tensor:
    """D - U_d U_d^T W, float32: U_d are the last min(m, n) - rank left singular directions of P. weight, p float64."""
    lost = min(p.shape) - rank
    if lost == 0 or not bool(weight.any()):
        return delta
    u = tail_subspace(p, lost)  # [m, d]
    return delta.sub_((u @ (u.mT @ weight)).float())
