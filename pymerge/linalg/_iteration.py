"""Filtered subspace iteration with Rayleigh-Ritz for the top singular triplets of one wide matrix, and the plain
power iteration of the fast mode.

M = a a^T is applied as two products. A Chebyshev polynomial of M that is small on [0, theta_l] and grows beyond takes
the place of the power (Saad, Numerical Methods for Large Eigenvalue Problems, 7.4). It is applied as the product of its
factors M - root, with an orthonormal basis in between: a polynomial at once would spread the directions over more than
float32 resolves. The basis has twice the wanted directions: each step then gains more than the wider products cost.
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

MAX_ROUNDS = 3
MAX_DEGREE = 12  # beyond, the Gram matrix costs less
MARGIN = 10.0  # in what a filter has to gain: the values it is made for are not settled
START = 50.0  # tangent of the angle between a wanted direction and the first basis, and its first values' error
POWER_STEPS = 2  # of the fast mode: the residual is then below that of svd_lowrank(niter=2) of the same width
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


def rayleigh_ritz(a: Tensor, q: Tensor, norm: float, count: int | None = None) -> Ritz:
    """count: how many images and errors are wanted, all of them by default."""
    b = q.mT @ a  # [l, n]
    wide = b.double()
    theta, z = _dense.eigh(wide @ wide.mT)  # l x l
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


def _degree(theta: Tensor, rank: int, center: float, angle: float) -> int:
    """Steps that take the wanted directions from `angle` to ANGLE; more than MAX_DEGREE where the values beyond the
    basis are too close to the wanted ones."""
    rate = math.acosh(max(1.0, float(theta[rank - 1]) / center - 1))  # T_d grows by exp(rate) a degree
    steps = math.log(max(1.0, MARGIN * angle / ANGLE))
    return max(2, math.ceil(steps / rate)) if rate * MAX_DEGREE >= steps else MAX_DEGREE + 1


def _filtered(a: Tensor, q: Tensor, image: Tensor, center: float, degree: int) -> Tensor:
    """Orthonormal basis of T_degree(M / center - 1) q, given image = M q: a factor M - root at a time. The largest root
    comes first: what rounding adds in a step, the later ones damp."""
    for i in range(degree):
        root = center * (1 + math.cos((2 * i + 1) * math.pi / (2 * degree)))
        image = a @ (a.mT @ q) if i else image
        q = _dense.orth(image - root * q)
    return q


def _damped(a: Tensor, q: Tensor) -> Tensor:
    """A step M - c, c half the smallest Ritz value, in place of the power M: it damps what lies below 2 c at no cost
    (arXiv 2404.09276)."""
    image = a @ (a.mT @ q)
    center = float(torch.linalg.eigvalsh((q.mT @ image).double())[0].clamp(min=0)) / 2
    return _dense.orth(image - center * q)


def _start(a: Tensor, width: int, seed: int) -> Tensor:
    """The image of a sparse-sign sketch of a^T."""
    return _dense.orth(a @ _dense.orth(sketch(a.mT, width, kind="sparse_sign", seed=seed)))


def factors(a: Tensor, ritz: Ritz, rank: int, norm: float, rounds: int) -> Factors:
    s = ritz.theta.sqrt()
    certified = certified_rank(s[: rank + 1], ritz.errors[: rank + 1], rank)
    right = _dense.unit_columns(ritz.b[:rank].mT, s[:rank])
    return Factors(ritz.q[:, :rank], s[:rank], right, certified, excess(ritz, rank, norm), rounds)


def converge(a: Tensor, rank: int, norm: float, seed: int) -> Factors | None:
    """None where the values beyond the rank are too close together for MAX_DEGREE steps a round, MAX_ROUNDS rounds."""
    q = _damped(a, _start(a, min(a.shape[0], max(2 * rank, rank + 16)), seed))
    image = a @ (a.mT @ q)
    theta, z = _dense.eigh((q.mT @ image).double())
    theta, z = theta.flip(0), z.flip(1).to(a.dtype)
    q, image, angle = q @ z, image @ z, START
    for rounds in range(1, MAX_ROUNDS + 1):
        center = max(float(theta[-1]), float(theta[0]) * torch.finfo(a.dtype).eps) / 2
        degree = _degree(theta, rank, center, angle) if len(theta) < a.shape[0] else 0
        if degree > MAX_DEGREE:
            return None
        ritz = rayleigh_ritz(a, _filtered(a, q, image, center, degree), norm)
        angle = missing(ritz, rank)
        at_noise = bool((ritz.errors[:rank] <= 8 * torch.finfo(a.dtype).eps * norm).all())
        if at_noise or angle <= ANGLE:
            return factors(a, ritz, rank, norm, rounds)
        q, image, theta = ritz.q, ritz.image, ritz.theta
    return None


def power(a: Tensor, rank: int, norm: float, seed: int) -> Factors:
    """Randomised: the image of a sketch, POWER_STEPS damped steps, one Rayleigh-Ritz (arXiv 0909.4061, algorithms 4.4
    and 5.1)."""
    q = _start(a, min(a.shape[0], rank + max(16, rank // 8)), seed)
    for _ in range(POWER_STEPS):
        q = _damped(a, q)
    return factors(a, rayleigh_ritz(a, q, norm, rank + 1), rank, norm, 1)
