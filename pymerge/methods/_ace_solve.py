"""The linear systems of ACE: X = (sum D_t (S_t + eps_t)) (sum S_t + eps_t + 1 c)^-1, S_t = w_t C_t^T C_t.

D_t [m, n] are the task vectors, C_t the same less their column means mu_t [n]; M = sum S_t + E, E = sum eps_t.
The residual is R = sum D_t (S_t - M / T).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pymerge.errors import NumericError
from pymerge.linalg import solve_psd
from pymerge.methods.base import TaskGroup
from pymerge.ops.cov_accumulate import cov_accumulate, cov_mirror_
from pymerge.ops.gram64 import gram64

FLOAT32_CONDITION = 1e3  # up to here float32 products leave an error of at most some 5e-5 in X (specification, 7.2)
SMALLEST_BLOCK, BLOCKS = 192, 8  # of the columns of a float32 Gram matrix
POWER_STEPS, POWER_VECTORS = 6, 4
SLAB = 1024  # columns that are widened to float64 at a time


@dataclass(frozen=True, kw_only=True)
class System:
    """What the first pass over the tasks decides, in units of `unit`: 1, or a power of two near the largest |D_t| where
    that is huge.

    tasks   indices into group.tuned of the tasks that take part
    weight  w_t;  ridge  eps_t;  mean  mu_t, float64 [n];  total  sum of D_t, float32 [m, n]
    prior   s of the prior c = s (column means of sum S_t); None: no prior
    center  whether C_t is averaged, or D_t
    """

    group: TaskGroup
    tasks: Sequence[int]
    unit: float
    weight: Sequence[float]
    ridge: Sequence[float]
    mean: Sequence[Tensor]
    total: Tensor
    prior: float | None
    center: bool
    residual: bool  # R is wanted

    @property
    def whole_ridge(self) -> float:
        return math.fsum(self.ridge)

    @property
    def is_low(self) -> bool:
        """The stacked C_t have no more rows than columns: their inner products make the smaller system."""
        return len(self.tasks) * self.total.shape[0] <= self.total.shape[1]

    def centred(self, i: int, dtype: torch.dtype) -> Tensor:
        """C_t of the i-th of `tasks`, a new tensor."""
        c = self.group.delta(self.tasks[i]).to(dtype)
        if self.unit != 1.0:
            c.mul_(1.0 / self.unit)
        return c.sub_(self.mean[i])


@dataclass(frozen=True, kw_only=True)
class Solution:
    x: Tensor  # [m, n]
    residual: Tensor | None  # [m, n]
    condition: float  # of the system that was solved
    route: Literal["dense", "push_through"]
    precision: Literal["float32", "float64"]


def solve(system: System) -> Solution:
    """X and R by the smaller system, in float32 where its condition allows."""
    if system.is_low:
        return _push_through(system)
    return _dense(system, torch.float32) or _wide(system)


def _wide(system: System) -> Solution:
    found = _dense(system, torch.float64)
    assert found is not None
    return found


def add_gram(total: Tensor, x: Tensor, weight: float) -> None:
    """Upper triangle of total += weight x^T x, in x's precision; x [m, n], total [n, n]."""
    if x.dtype == torch.float64:
        return cov_accumulate(total, x, alpha=weight, precision="float64")
    n = x.shape[1]
    step = max(SMALLEST_BLOCK, -(-n // BLOCKS))
    for i in range(0, n, step):
        total[i : i + step, i:].addmm_(x[:, i : i + step].mT, x[:, i:], alpha=weight)


@dataclass
class _Sums:
    """Over the tasks; row is sum w_t mu_t C_t^T C_t and ones is sum S_t 1, [n] both."""

    gram: Tensor  # M
    product: Tensor  # sum w_t C_t C_t^T C_t, [m, n]
    ridged: Tensor  # sum eps_t C_t, [m, n]
    row: Tensor
    ones: Tensor


def _sums(s: System, dtype: torch.dtype) -> _Sums:
    m, n = s.total.shape
    zeros = s.total.new_zeros
    gram, product, ridged = (zeros(shape, dtype=dtype) for shape in ((n, n), (m, n), (m, n)))
    row, ones = zeros(n, dtype=dtype), zeros(n, dtype=dtype)
    square = zeros((min(m, n), min(m, n)), dtype=dtype)
    for i, weight in enumerate(s.weight):
        c = s.centred(i, dtype)
        square.zero_()
        if m >= n:
            add_gram(square, c, 1.0)
            gram.add_(square, alpha=weight)
            product.addmm_(c, cov_mirror_(square), alpha=weight)
        else:
            add_gram(square, c.mT, 1.0)
            product.addmm_(cov_mirror_(square), c, alpha=weight)
            add_gram(gram, c, weight)
        ridged.add_(c, alpha=s.ridge[i])
        row.add_(c.mT @ (c @ s.mean[i].to(dtype)), alpha=weight)
        ones.add_(c.mT @ c.sum(1), alpha=weight)
    cov_mirror_(gram).diagonal().add_(s.whole_ridge)
    return _Sums(gram, product, ridged, row, ones)


def _dense(s: System, dtype: torch.dtype) -> Solution | None:
    """By M itself [n, n]. None where float32 does not suffice."""
    m, n = s.total.shape
    sums = _sums(s, dtype)
    right = sums.ridged.add_(sums.product)  # [m, n]
    if not s.center:
        right += sums.row + _weighted_means(s).to(dtype)
    rank_one = None if s.prior is None else (torch.ones_like(sums.ones), sums.ones * (s.prior / n))
    wide = dtype == torch.float64
    residual = None
    if s.residual:
        residual = sums.product.add_(sums.row)
        residual.addmm_(s.total.to(dtype), sums.gram, alpha=-1.0 / len(s.tasks))
    precision = "float64" if wide else "float32"
    try:
        solved = solve_psd(sums.gram, right, rank_one=rank_one, precision=precision, overwrite=True)
    except NumericError:
        if wide:
            raise
        return None
    condition = float(solved.condition)
    if not wide and not condition <= FLOAT32_CONDITION:
        return None
    return Solution(x=solved.x, residual=residual, condition=condition, route="dense", precision=precision)


def _weighted_means(s: System) -> Tensor:
    """sum eps_t mu_t, float64 [n]"""
    return sum((mean * ridge for mean, ridge in zip(s.mean, s.ridge, strict=True)), torch.zeros_like(s.mean[0]))


def _push_through(s: System) -> Solution:
    """By the inner products of the rows of Z = stack(sqrt(w_t) C_t) [T m, n]: X = G (Z Z^T + E)^-1 Z with
    G = blockrow((w_t C_t C_t^T + eps_t) / sqrt(w_t)) [m, T m]. With the prior, M becomes Z^T Z + E + 1 q^T Z,
    q = s / n Z 1, and Z Z^T + E becomes Z Z^T + E + (Z 1) q^T."""
    m, n = s.total.shape
    rows = s.total.new_empty((len(s.tasks) * m, n))  # Z
    for i, weight in enumerate(s.weight):
        rows[i * m : (i + 1) * m] = s.centred(i, torch.float32).mul_(math.sqrt(weight))
    # Centring makes Z Z^T singular: the condition is its norm over E.
    wide = not _largest_square(rows) <= FLOAT32_CONDITION * s.whole_ridge
    if wide:
        gram = gram64(rows.mT)  # Z Z^T [T m, T m]
    else:
        gram = rows.new_zeros((rows.shape[0], rows.shape[0]))
        add_gram(gram, rows.mT, 1.0)
        cov_mirror_(gram)
    ones = rows.sum(1, dtype=gram.dtype)  # Z 1
    residual = _low_residual(s, rows, gram) if s.residual else None
    left, apart = _left_factor(s, rows, gram, ones)
    gram.diagonal().add_(s.whole_ridge)
    rank_one = None if s.prior is None else (ones, ones * (s.prior / n))
    precision = "float64" if wide else "float32"
    solved = solve_psd(gram, left, rank_one=rank_one, precision=precision, overwrite=True)
    del gram, left
    x = _wide_product(solved.x, rows)
    return Solution(
        x=x if apart is None else x + apart.to(x.dtype),
        residual=residual,
        condition=float(solved.condition),
        route="push_through",
        precision=precision,
    )


def _largest_square(rows: Tensor) -> float:
    """Square of the largest singular value, from below, by power steps."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(POWER_VECTORS, rows.shape[0], generator=generator).to(rows)
    for _ in range(POWER_STEPS):
        v = torch.nn.functional.normalize((v @ rows) @ rows.mT)
    return float((v @ rows).double().square().sum(1).amax())


def _left_factor(s: System, rows: Tensor, gram: Tensor, ones: Tensor) -> tuple[Tensor, Tensor | None]:
    """G [m, T m]; and what D_t - C_t adds to X that is not of the form h Z, [n]. That part is a row
    v = sum eps_t mu_t times the inverse of E + (Z^T + 1 q^T) Z, which is v / E - v (Z^T + 1 q^T) (...)^-1 Z / E."""
    m, n = s.total.shape
    blocks = []
    for i, (weight, ridge) in enumerate(zip(s.weight, s.ridge, strict=True)):
        block = gram[i * m : (i + 1) * m, i * m : (i + 1) * m] / math.sqrt(weight)
        block.diagonal().add_(ridge / math.sqrt(weight))
        blocks.append(block)
    left = torch.cat(blocks, dim=1)
    if s.center:
        return left, None
    means = _weighted_means(s)
    projected = _times(rows, means)
    if s.prior is not None:
        projected += means.sum() * (s.prior / n) * ones
    left += (_own_means(s, rows) - projected / s.whole_ridge).to(left.dtype)
    return left, means / s.whole_ridge


def _low_residual(s: System, rows: Tensor, gram: Tensor) -> Tensor:
    """R = (blockrow(sqrt(w_t) D_t C_t^T) - D Z^T / T) Z - E D / T, D the sum of D_t; float32 [m, n].

    gram is Z Z^T."""
    m = s.total.shape[0]
    tasks = len(s.tasks)
    factor = _own_means(s, rows).repeat(m, 1)  # [m, T m]
    factor -= _times(rows, torch.stack(list(s.mean)).sum(0)) / tasks
    for i, weight in enumerate(s.weight):
        block = gram[i * m : (i + 1) * m]
        factor[:, i * m : (i + 1) * m] += block[:, i * m : (i + 1) * m] / math.sqrt(weight)
        factor.sub_(block, alpha=1.0 / (tasks * math.sqrt(weight)))
    return (factor.float() @ rows).sub_(s.total, alpha=s.whole_ridge / tasks)


def _own_means(s: System, rows: Tensor) -> Tensor:
    """Row of sqrt(w_t) C_t mu_t, float64 [T m]."""
    m = s.total.shape[0]
    return torch.cat([_times(rows[i * m : (i + 1) * m], mean) for i, mean in enumerate(s.mean)])


def _times(x: Tensor, v: Tensor) -> Tensor:
    """x v in float64; x float32 [m, n], v float64 [n]."""
    total = v.new_zeros(x.shape[0])
    for a, b in zip(x.split(SLAB, dim=1), v.split(SLAB), strict=True):
        total += a.double() @ b
    return total


def _wide_product(a: Tensor, x: Tensor) -> Tensor:
    """a x in a's precision; x float32 [m, n]."""
    if a.dtype == x.dtype:
        return a @ x
    return torch.cat([a @ part.double() for part in x.split(SLAB, dim=1)], dim=1)
