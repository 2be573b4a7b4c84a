"""Polar factors by Zolotarev's rational approximations of the sign: Gram matrices and Cholesky inverses alone.

For float32 matrices of full rank and moderate condition. X f(X^T X), f a sum of shifted inverses, has X's polar factor
and singular values in [low, 1]. An ill-conditioned matrix takes one step in float64, which leaves a condition below 3;
the last step runs in float32, whose errors no longer grow there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from pymerge.linalg._gram_root import wide_product
from pymerge.ops.gram64 import gram64

SMALLEST = 512  # below this, eigenvectors cost no more
LARGEST_CONDITION = 2e5
FLOAT32_GRAM_CONDITION = 4.0  # up to which a float32 Gram matrix is right to some 1e-7
LAST_ERROR, FIRST_CONDITION = 6e-7, 3.0
ACCEPTED = 1e-6  # estimated relative error of the factor
SLAB, COLUMN_BLOCKS = 1024, 4
STEPS, VECTORS, CHECKS = 6, 4, 2


class Shifts(NamedTuple):
    """f(G) = scale (1 + sum_j weight_j (G + shift_j)^-1)."""

    scale: float
    shifts: tuple[float, ...]
    weights: tuple[float, ...]
    low: float  # x f(x^2) is in [low, 1] for x in [low0, 1]


@lru_cache(maxsize=256)
def zolotarev(low: float, poles: int) -> Shifts:
    """The best odd rational approximation of sign(x) on [low, 1] of degree 2 poles + 1, scaled to 1 at most
    (Nakatsukasa and Freund, SIAM Review 58(3), 2016, eqs. 3.2 to 3.5)."""
    import numpy as np
    from scipy.special import ellipj, ellipkm1

    index = np.arange(1, 2 * poles + 1)
    sn, cn, _, _ = ellipj(index * ellipkm1(low * low) / (2 * poles + 1), 1.0 - low * low)
    c = (low * sn / cn) ** 2
    odd, even = c[0::2], c[1::2]
    weights = []
    for j in range(poles):
        others = np.delete(odd, j)
        weights.append(float(-np.prod(odd[j] - even) / np.prod(odd[j] - others)))
    x = np.geomspace(low, 1.0, 4096)
    values = x * (1.0 + (np.array(weights) / (x[:, None] ** 2 + odd)).sum(1))
    return Shifts(1.0 / float(values.max()), tuple(map(float, odd)), tuple(weights), float(values.min() / values.max()))


def gram32(x: Tensor) -> Tensor:
    """x^T x in float64 from float32 products of 1024 rows at a time; blocks on and above the diagonal only."""
    n = x.shape[-1]
    step = -(-n // COLUMN_BLOCKS)
    total = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    for rows in x.split(SLAB):
        for i in range(0, n, step):
            total[i : i + step, i:] += rows[:, i : i + step].mT @ rows[:, i:]
    for i in range(step, n, step):
        total[i : i + step, :i] = total[:i, i : i + step].mT
    return total


def _extremes(gram: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Estimates of the largest and smallest singular value of x, from inside; smallest 0 where Cholesky fails.
    In float32, a condition beyond 100 or so is not resolved, but seen."""
    factor, failed = torch.linalg.cholesky_ex(gram.to(dtype))
    single = gram.float()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(gram.shape[-1], VECTORS, generator=generator).to(single)
    w = v.to(dtype)
    for _ in range(STEPS):
        v = torch.nn.functional.normalize(single @ v, dim=0)
        w = torch.nn.functional.normalize(torch.cholesky_solve(w, factor), dim=0)
    top = float((single @ v).norm(dim=0).amax())
    bottom = float(torch.cholesky_solve(w, factor).norm(dim=0).amax()) if int(failed) == 0 else 0.0
    return top**0.5, bottom**-0.5 if bottom > 0 else 0.0


def _root(gram: Tensor, f: Shifts, dtype: torch.dtype) -> Tensor:
    """f(gram) in dtype; gram has eigenvalues up to 1."""
    gram = gram.to(dtype)
    total = torch.zeros_like(gram)
    total.diagonal().fill_(f.scale)
    for shift, weight in zip(f.shifts, f.weights, strict=True):
        shifted = gram.clone()
        shifted.diagonal().add_(shift)
        total.add_(torch.cholesky_inverse(torch.linalg.cholesky(shifted)), alpha=f.scale * weight)
    return total


def _last(x: Tensor, gram: Tensor, low: float) -> Tensor:
    poles = next((r for r in range(1, 7) if _off(zolotarev(low, r)) <= LAST_ERROR), 7)
    f = zolotarev(low, poles)
    return (x @ _root(gram, f, torch.float32)) * (2.0 / (1.0 + f.low))


def _off(f: Shifts) -> float:
    return (1.0 - f.low) / (1.0 + f.low)


def rational(x: Tensor, tol: float) -> tuple[Tensor, float] | None:
    """The polar factor of x [m, n], m >= n, float32, and its estimated condition; None where the matrix is not one for
    this method or the result, checked on random vectors, is not accurate."""
    single = x.shape[0] >= 2 * x.shape[1]
    gram = gram32(x) if single else gram64(x)
    largest, smallest = _extremes(gram, torch.float32 if single else torch.float64)
    if single and not largest <= FLOAT32_GRAM_CONDITION * smallest:
        single, gram = False, gram64(x)
        largest, smallest = _extremes(gram, torch.float64)
    if not (largest <= LARGEST_CONDITION * smallest and smallest > 4 * tol * largest):
        return None
    condition = largest / smallest
    largest, low = 1.1 * largest, 1.0 / (1.4 * condition)  # the estimates are from inside
    gram /= largest * largest
    if not single:
        first = next((zolotarev(low, r) for r in range(1, 4) if zolotarev(low, r).low >= 1 / FIRST_CONDITION), None)
        first = first or zolotarev(low, 4)
        x = wide_product(x, _root(gram, first, torch.float64) / largest)
        gram, low = gram32(x), 0.98 * first.low
        largest = 1.0
    factor = _last(x, gram, low) / largest
    return (factor, condition) if _error(factor) <= ACCEPTED else None


def _error(p: Tensor) -> float:
    """|P^T P - 1| / 2 in the Frobenius norm relative to sqrt(n), estimated on random vectors."""
    generator = torch.Generator().manual_seed(1)
    errors = []
    for _ in range(CHECKS):
        v = torch.randn(p.shape[1], generator=generator).to(p)
        errors.append(float((p.mT @ (p @ v) - v).norm() / v.norm()) / 2)
    return max(errors)
