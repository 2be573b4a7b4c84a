"""Filtered subspace iteration with Rayleigh-Ritz for the top singular triplets of one wide matrix, and the plain
power iteration of the fast mode.

M = a a^T is applied as two products. A Chebyshev polynomial of M that is small on [0, theta_l] and grows beyond takes
the place of the power (Saad, Numerical Methods for Large Eigenvalue Problems, 7.4), with two guards against the growth
of rounding errors: values above 4 theta_l are filtered apart, by a degree of their own, and the degrees are capped
where the filter would spread a group's directions over more than SPREAD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.linalg import _dense
from pymerge.linalg._certify import certified_rank
from pymerge.linalg._factors import Factors
from pymerge.ops.sketch import sketch

MAX_ROUNDS = 8
MAX_DEGREE = 8
POWER_STEPS = 2  # of the fast mode: the residual is then below that of svd_lowrank(niter=2) of the same width
SPREAD = 3e4  # largest T_d(x_first) / T_d(x_last wanted): float32 keeps the smallest direction to 2e-3 of itself
ANGLE = 1e-5  # what a wanted direction may still lack: sine of its angle to the basis


@dataclass(frozen=True)
class Ritz:
    """q [r, l] Ritz vectors, b = q^T a [l, n], theta float64 [l] descending; of the first of them image = M q, and
    errors float64: the norms of a v - s u, with what rounding may hide in them."""

    q: Tensor
    b: Tensor
    image: Tensor
    theta: Tensor
    errors: Tensor


def oversampled(rank: int, limit: int) -> int:
    return min(limit, rank + max(16, rank // 8))


def rayleigh_ritz(a: Tensor, q: Tensor, norm: float, count: int | None = None) -> Ritz:
    """count: how many images and errors are wanted, all of them by default."""
    b = q.mT @ a  # [l, n]
    wide = b.double()
    theta, z = torch.linalg.eigh(wide @ wide.mT)  # l x l
    theta, z = theta.flip(0).clamp(min=0), z.flip(1).to(a.dtype)
    q, b = q @ z, z.mT @ b
    image = a @ b[:count].mT
    s = theta[:count].sqrt()
    residual = (image - q[:, :count] * theta[:count].to(a.dtype)).norm(dim=0).double()
    floor = 2 * torch.finfo(a.dtype).eps * norm
    return Ritz(q, b, image, theta, residual / s.clamp(min=floor) + floor)


def missing(ritz: Ritz, rank: int) -> float:
    """Largest sine of the angle between a wanted singular vector and the basis, to first order: the residual of M over
    the distance to the values outside, which are at most the last Ritz value."""
    s, theta = ritz.theta[:rank].sqrt(), ritz.theta
    distance = (theta[:rank] - theta[-1]).clamp(min=float(theta[0]) * 1e-15)
    return float((ritz.errors[:rank] * s / distance).max())


def excess(ritz: Ritz, rank: int, norm: float) -> float:
    """Estimate, from above, of how much more than the best approximation's squared error this one has, relative to the
    latter (or to what the values resolve of it, where that is more)."""
    theta = ritz.theta
    if len(theta) == ritz.q.shape[0]:
        return 0.0  # the basis is the whole space
    residual = ritz.errors[:rank] * theta[:rank].sqrt()  # of M
    # The last Ritz values lie below the true ones; one in the middle of the oversampling is above the values outside.
    distance = (theta[:rank] - theta[(rank + len(theta)) // 2]).clamp(min=float(theta[0]) * 1e-15)
    settled = 4 * residual <= distance  # below that the error of a value is the residual's square over the distance
    growth = float(torch.where(settled, residual.square() / distance, residual).sum())
    best = norm**2 - float(theta[:rank].sum()) - growth
    return growth / max(best, 4 * torch.finfo(ritz.q.dtype).eps * norm**2)


def _degree(first: float, last: float) -> int:
    """Largest degree whose Chebyshev polynomial spreads the values at x = first >= last >= 1 by no more than SPREAD;
    1 (M itself, which grows less than any of these) where there is none."""
    grow, hold = math.acosh(max(first, 1.0)), math.acosh(max(last, 1.0))

    def allowed(d: int) -> bool:
        return d * grow < 700 and math.cosh(d * grow) <= SPREAD * math.cosh(d * hold)

    return max((d for d in range(2, MAX_DEGREE + 1) if allowed(d)), default=1)


def _chebyshev(a: Tensor, q: Tensor, image: Tensor, center: float, degree: int, apart: Tensor | None = None) -> Tensor:
    """T_degree(M / center - 1) q, given image = M q; what `apart` spans is taken out on the way."""
    old, new = q, image / center - q
    for _ in range(2, degree + 1):
        if apart is not None:
            new = new - apart @ (apart.mT @ new)
        old, new = new, (a @ (a.mT @ new) / center - new) * 2 - old
    return new if apart is None else new - apart @ (apart.mT @ new)


def filtered(a: Tensor, ritz: Ritz, rank: int) -> Tensor:
    """The next basis [r, l]."""
    theta, q, image = ritz.theta, ritz.q, ritz.image
    center = max(float(theta[-1]), float(theta[0]) * torch.finfo(a.dtype).eps) / 2
    x = theta / center - 1
    above = int((theta > 8 * center).sum())
    top = image[:, :above]
    if above:
        degree = _degree(float(x[0]), float(x[above - 1]))
        top = top if degree == 1 else _chebyshev(a, q[:, :above], top, center, degree)
    if above == len(theta):
        return _dense.orth(top)
    degree = max(2, _degree(float(x[above]), float(x[max(above, rank - 1)])))
    rest = _chebyshev(a, q[:, above:], image[:, above:], center, degree, q[:, :above] if above else None)
    return _dense.orth(torch.cat([top, rest], dim=1))


def start(a: Tensor, width: int, seed: int) -> Tensor:
    return _dense.orth(sketch(a, width, kind="sparse_sign", seed=seed))


def factors(a: Tensor, ritz: Ritz, rank: int, norm: float, rounds: int) -> Factors:
    s = ritz.theta.sqrt()
    certified = certified_rank(s[: rank + 1], ritz.errors[: rank + 1], rank)
    right = _dense.unit_columns(ritz.b[:rank].mT, s[:rank])
    return Factors(ritz.q[:, :rank], s[:rank], right, certified, excess(ritz, rank, norm), rounds)


def converge(a: Tensor, rank: int, norm: float, seed: int) -> Factors | None:
    """None where MAX_ROUNDS do not reach ANGLE (values too close together beyond the rank)."""
    q = start(a, oversampled(rank, a.shape[0]), seed)
    ritz = rayleigh_ritz(a, _dense.orth(a @ (a.mT @ q)), norm)
    for rounds in range(1, MAX_ROUNDS + 1):
        at_noise = bool((ritz.errors[:rank] <= 8 * torch.finfo(a.dtype).eps * norm).all())
        if at_noise or missing(ritz, rank) <= ANGLE:
            return factors(a, ritz, rank, norm, rounds)
        if rounds < MAX_ROUNDS:
            ritz = rayleigh_ritz(a, filtered(a, ritz, rank), norm)
    return None


def power(a: Tensor, rank: int, norm: float, seed: int) -> Factors:
    """Randomised: a sparse-sign sketch of a^T, its image, POWER_STEPS power steps, one Rayleigh-Ritz (arXiv 0909.4061,
    algorithms 4.4 and 5.1). A step is M - c, c half the smallest Ritz value, in place of M: it damps what lies below
    2 c at no cost (arXiv 2404.09276)."""
    p = _dense.orth(sketch(a.mT, oversampled(rank, a.shape[0]), kind="sparse_sign", seed=seed))
    q = _dense.orth(a @ p)
    for _ in range(POWER_STEPS):
        image = a @ (a.mT @ q)
        center = float(torch.linalg.eigvalsh((q.mT @ image).double())[0].clamp(min=0)) / 2
        q = _dense.orth(image - center * q)
    return factors(a, rayleigh_ritz(a, q, norm, rank + 1), rank, norm, 1)
