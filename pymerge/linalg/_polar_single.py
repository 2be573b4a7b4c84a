"""Polar factors of large float32 matrices of full rank from float32 Gram matrices, with float64 only where it counts.

Two routes, both of which check their result and return None where it is not accurate. `halley`, for tall matrices of a
low condition: two Halley steps on the Gram matrix. `rotated`, for the others: the float32 eigenvectors of the Gram
matrix are only a rotation. What they miss is measured on the rotated columns and corrected, and the few columns of
small singular values, which float32 would fill with rounding errors, are formed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.linalg import _dense
from pymerge.linalg._gram_root import SLAB
from pymerge.linalg._polar_iterations import halley_weights
from pymerge.ops.gram64 import gram64

SMALLEST = 256  # below this, float64 eigenvectors cost no more
ACCEPTED = 2e-6  # estimated relative error of the factor
HALLEY_CONDITION = 3.2  # of the estimate; up to here a float32 Gram matrix is right to some 1e-7
LOW = 0.25  # two Halley steps take [LOW, 1] to 1 within 3e-7
MARGIN = 1.2  # of the largest eigenvalue, whose estimate is from below
STEPS, VECTORS, CHECKS = 8, 4, 2
COLUMN_BLOCKS = 4
SECOND_ORDER = 1e-6  # error of the first-order step that the split into large and small singular values aims at
DECAYING = 0.1  # share of the effective rank below which `rotated` would take longer than float64 throughout
APART = 0.5  # from this ratio on, small and large singular values are told apart before the step
EPS = 2.0**-24


def gram32(x: Tensor) -> Tensor:
    """x^T x in float32: blocks on and above the diagonal, then their mirror images."""
    n = x.shape[-1]
    total = x.new_empty(n, n)
    step = -(-n // COLUMN_BLOCKS)
    for i in range(0, n, step):
        torch.mm(x[:, i : i + step].mT, x[:, i:], out=total[i : i + step, i:])
        total[i : i + step, :i] = total[:i, i : i + step].mT
    return total


def decays(gram: Tensor) -> bool:
    """Whether the singular values fall off so fast that most are small: their effective rank tr(G)^2 / |G|^2, of which
    sums of task vectors have 1 to 4 % and stacks of singular vectors 20 to 50 %."""
    size = float(torch.linalg.vector_norm(gram)) ** 2
    return float(gram.trace()) ** 2 < DECAYING * gram.shape[-1] * size


def halley(x: Tensor, gram: Tensor, tol: float) -> tuple[Tensor, float] | None:
    """The polar factor of x [m, n], m >= n, with x^T x = gram, and the estimated condition.

    A step is x (p + q N), N = (1 + c G)^-1, for singular values of x in [low, 1]. The Gram matrix after it,
    G (p + q N)^2, needs no product but N N, since G N = (1 - N) / c."""
    largest = _largest(gram)
    if not largest > 0.0:
        return None
    gram = gram / (MARGIN * largest)
    (p1, q1, c1), low = halley_step(LOW)
    first = _inverse(gram * c1)
    smallest = (1.0 / _largest(first) - 1.0) / c1  # eigenvalue of gram, whose largest one is 1 / MARGIN
    condition = (MARGIN * max(smallest, 1e-30)) ** -0.5
    if condition > HALLEY_CONDITION or 4 * tol * condition >= 1.0:
        return None
    between = gram32(first).mul_(-q1 * q1 / c1)
    between.add_(first, alpha=(q1 - 2 * p1) * q1 / c1).add_(gram, alpha=p1 * p1)
    between.diagonal().add_(2 * p1 * q1 / c1)
    (p2, q2, c2), low = halley_step(low)
    second = _inverse(between.mul_(c2))
    scale = 2.0 / (1.0 + low) / (MARGIN * largest) ** 0.5
    root = torch.addmm(second, first, second, beta=scale * p1 * q2, alpha=scale * q1 * q2)
    root.add_(first, alpha=scale * q1 * p2)
    root.diagonal().add_(scale * p1 * p2)
    factor = x @ root
    return (factor, condition) if _error(factor) <= ACCEPTED else None


def _largest(m: Tensor) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, from below."""
    v = torch.randn(VECTORS, m.shape[-1], generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        v = torch.nn.functional.normalize(v @ m)
    return float((v @ m).norm(dim=1).amax())


def halley_step(low: float) -> tuple[tuple[float, float, float], float]:
    """p, q, c of the Halley step for singular values in [low, 1], and their lower bound after it."""
    a, b, c = (float(w) for w in halley_weights(torch.tensor(low, dtype=torch.float64)))
    return (b / c, a - b / c, c), min(1.0, low * (a + b * low * low) / (1.0 + c * low * low))


def _inverse(m: Tensor) -> Tensor:
    """(1 + m)^-1; m is overwritten."""
    m.diagonal().add_(1.0)
    return torch.cholesky_inverse(torch.linalg.cholesky(m))


def _error(p: Tensor) -> float:
    """|P^T P - 1| / 2 in the Frobenius norm relative to sqrt(n), estimated on random vectors."""
    generator = torch.Generator().manual_seed(1)
    errors = []
    for _ in range(CHECKS):
        v = torch.randn(p.shape[1], generator=generator)
        errors.append(float((p.mT @ (p @ v) - v).norm() / v.norm()) / 2)
    return max(errors)


def rotated(x: Tensor, gram: Tensor, tol: float) -> tuple[Tensor, float] | None:
    """The polar factor of x [m, n], m >= n, with x^T x = gram, and the condition.

    With Z = X V / sigma of nearly orthonormal columns and F = Z^T Z - 1, the factor is Z (1 + F o W) V^T up to the
    order of F^2, W_ij = -sigma_i / (sigma_i + sigma_j) (`refined` says why). F_ij is some 6e-8 / (sigma_i sigma_j) for
    eigenvectors V in float32, relative to the largest singular value: too much where both are small or one is tiny, so
    these columns are handled by `_small_columns`."""
    values, vectors = torch.linalg.eigh(gram)
    small = _count_small(values)
    if 2 * small > x.shape[1]:
        return None
    z = x.new_empty(x.shape)
    large = torch.mm(x, vectors[:, small:], out=z[:, small:])
    sigma = values.double()
    sigma[small:] = large.norm(dim=0)
    large /= sigma[small:].float()
    if small > 0:
        sigma[:small] = _small_columns(x, z, sigma, vectors, small)
    largest, smallest = float(sigma.amax()), float(sigma.amin())
    if not smallest > 4 * tol * largest:
        return None
    step = gram32(z)
    step.diagonal().sub_(1.0)
    if 0.5 * float(step.norm()) ** 2 > ACCEPTED * x.shape[1] ** 0.5:
        return None
    single = sigma.float()
    step.mul_(-single[:, None]).div_(single[:, None] + single)
    step.diagonal().add_(1.0)
    factor = z @ (step @ vectors.mT)
    return (factor, largest / smallest) if _error(factor) <= ACCEPTED else None


def _count_small(values: Tensor) -> int:
    """How many of the ascending eigenvalues to leave out for an expected |F|^2 / sqrt(n) of SECOND_ORDER at most."""
    inverse = values.double().flip(0).clamp(min=1e-300).reciprocal() * float(values[-1])
    kept = (EPS * inverse.cumsum(0)).square() <= SECOND_ORDER * values.numel() ** 0.5
    return values.numel() - int(kept.sum())


def _small_columns(x: Tensor, z: Tensor, sigma: Tensor, vectors: Tensor, small: int) -> Tensor:
    """Puts the first `small` columns of z and vectors right and returns their singular values: X V in float64, turned
    out of the space of the large ones (which turn a little too) and diagonalised."""
    large, others = z[:, small:], vectors[:, small:]
    v = vectors[:, :small].double()
    rows = max(64, SLAB // x.shape[1])
    columns = torch.cat([part.double() @ v for part in x.split(rows)])
    norms = columns.norm(dim=0).clamp(min=1e-300)
    ratio = (norms / sigma[small:, None]).float()
    turn = torch.where(ratio < APART, large.mT @ (columns / norms).float() * ratio / (1 - ratio * ratio), 0.0)
    weights = sigma[small:].float()
    change = large @ (weights[:, None] * turn)
    large += (columns.float() @ turn.mT) / weights
    columns -= change
    change = others @ turn
    others += v.float() @ turn.mT
    v -= change
    values, turned = _dense.eigh(gram64(columns))
    found = values.clamp(min=0).sqrt()
    z[:, :small] = columns @ (turned / found.clamp(min=1e-300))
    vectors[:, :small] = v @ turned
    return found
