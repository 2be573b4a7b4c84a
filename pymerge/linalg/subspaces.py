"""Relatives of the truncated SVD: one side only, values only, the other end of the spectrum, D C D^T from D and C."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pymerge.linalg import _checks, _dense, _factors
from pymerge.linalg.svd import GRAM_SIDE, ITERATED_SHARE, MODES, scaled, truncated_svd
from pymerge.ops._foreign import takes_arrays
from pymerge.ops.sketch import sketch

SIDES = ("left", "right")
FAST_STEPS, FAST_GAIN = 12, 1e-6  # of the iterated fast mode: steps at most, relative gain of a step at which it ends
TAIL_CONDITION = 1e5  # a float64 Gram matrix loses the tail beyond (measured on activated weights, cut in the tail)


def _flat(a: Tensor) -> Tensor:
    return a.reshape(math.prod(a.shape[:-2]), *a.shape[-2:])


def _stack(found: list[Tensor], batch: torch.Size, empty: Tensor) -> Tensor:
    return torch.stack(found).reshape(*batch, *found[0].shape) if found else empty


def _scaled(what: str, a: Tensor, index: int, batch: torch.Size) -> tuple[Tensor, float, float]:
    small, norm, power = scaled(a)
    _checks.check_finite(what, norm, a, index, batch)
    return small, norm, power


def _column_signs(u: Tensor) -> Tensor:
    return _dense.fix_signs(u, u)[0]


@takes_arrays
def subspace(a: Tensor, rank: int, *, side: str = "left") -> Tensor:
    """Orthonormal basis of the top `rank` left (right) singular directions: of the columns' (rows') space.

    a        [..., m, n], float32 or float64
    Returns  [..., m, rank] (left) or [..., n, rank] (right), columns in the order of their singular values,
             sign as in truncated_svd(...).U of that side
    Cost     as truncated_svd, less the product that gives the other side where only the smaller side is asked for
    Raises   as truncated_svd; ValueError (side)."""
    _checks.check_matrices("a", a)
    _checks.check_count("rank", rank, a.shape)
    _checks.check_choice("side", side, SIDES)
    rows = a if side == "left" else a.mT
    m, n = rows.shape[-2:]
    iterated = min(m, n) > GRAM_SIDE and rank * ITERATED_SHARE <= min(m, n)
    if m > n or iterated or a.dtype == torch.float64:  # the larger side; or routes that have both sides anyway
        return truncated_svd(rows, rank).U
    found = []
    for i, x in enumerate(_flat(rows)):
        x, norm, _ = _scaled("a", x, i, a.shape[:-2])
        factors = _factors.from_gram(x, rank, norm, both=False) if norm else _factors.zero(x, rank)
        found.append(_column_signs(factors.left))
    return _stack(found, a.shape[:-2], a.new_empty((*a.shape[:-2], m, rank)))


@takes_arrays
def singular_values(a: Tensor) -> Tensor:
    """All singular values of each matrix, descending.

    a        [..., m, n], float32 or float64
    Returns  [..., min(m, n)] in a's dtype
    Error    float32: eps64 s_1^2 / s_i in s_i, at most 2e-8 s_1 (below float32's own); float64: LAPACK's.
    Cost     float32: min(m, n)^2 max(m, n) / 2 float64 multiply-adds and an eigensolve without vectors
    Raises   NonFinite; ValueError (dtype, dimensions)."""
    _checks.check_matrices("a", a)
    r = min(a.shape[-2:])
    found = []
    for i, x in enumerate(_flat(a)):
        if r == 0:
            found.append(a.new_empty(0))
            continue
        x, _, power = _scaled("a", x, i, a.shape[:-2])
        if a.dtype == torch.float64:
            found.append(torch.linalg.svdvals(x) * power)
        else:
            values = _dense.eigenvalues(_dense.gram(x if x.shape[0] == r else x.mT))
            found.append((values.flip(0).clamp(min=0).sqrt() * power).to(a.dtype))
    return _stack(found, a.shape[:-2], a.new_empty((*a.shape[:-2], r)))


@takes_arrays
def tail_subspace(a: Tensor, count: int) -> Tensor:
    """Left singular directions of the `count` smallest of the min(m, n) singular values (PAVE's discarded subspace).

    a        [..., m, n], float32 or float64; for m > n the directions lie in the range of a
    Returns  [..., m, count] orthonormal, smallest value last; well defined where s_{r - count} > s_{r - count + 1}
    Error    float64 Gram matrix while s_1 / s_r <= 1e5; beyond, that of R^-1 (QR), and a float64 SVD where these
             `count` values themselves differ by more
    Cost     min(m, n)^2 max(m, n) / 2 float64 multiply-adds and a range eigensolve; m > n: a QR of m x count more
    Raises   NonFinite; ValueError (dtype, count outside 1..min(m, n))."""
    _checks.check_matrices("a", a)
    _checks.check_count("count", count, a.shape)
    found = []
    for i, x in enumerate(_flat(a)):
        x, norm, _ = _scaled("a", x, i, a.shape[:-2])
        tail = _tail(x, count, norm) if norm else torch.eye(x.shape[0], dtype=a.dtype, device=a.device)[:, -count:]
        found.append(_column_signs(tail.to(a.dtype)))
    return _stack(found, a.shape[:-2], a.new_empty((*a.shape[:-2], a.shape[-2], count)))


def _tail(a: Tensor, count: int, norm: float) -> Tensor:
    """float64 [m, count]"""
    m, n = a.shape
    wide = a if m <= n else a.mT
    g = _dense.gram(wide)
    largest = float(_dense.largest_eigenvalue(g))
    theta, vectors = _dense.range_eigh(g, 0, count)
    if float(theta[0]) * TAIL_CONDITION**2 < largest:
        return _far_tail(a.double(), count)
    vectors, s = vectors.flip(1), theta.flip(0).sqrt()
    if m <= n:
        return vectors
    y = a.double() @ vectors  # columns u_i s_i: QR against what rounding left of the other directions
    q, upper = torch.linalg.qr(y / s)
    return q * torch.where(upper.diagonal() < 0, -1.0, 1.0)


def _far_tail(a: Tensor, count: int) -> Tensor:
    """As _tail whatever the condition of a: what is small in R, A = Q R, is large in its inverse."""
    m, n = a.shape
    q, r = torch.linalg.qr(a, mode="reduced") if m > n else torch.linalg.qr(a.mT, mode="r")
    inverse = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=a.dtype, device=a.device), upper=True)
    if bool(torch.isfinite(inverse).all()):
        theta, vectors = _dense.top_eigh(_dense.gram(inverse.mT if m > n else inverse), count)
        if float(theta[0]) <= TAIL_CONDITION**2 * float(theta[-1]):
            return (q @ vectors if m > n else vectors).flip(1)
    return torch.linalg.svd(a, full_matrices=False)[0][:, min(m, n) - count :]


@takes_arrays
def covariance_subspace(d: Tensor, c: Tensor, rank: int, *, mode: str = "exact") -> tuple[Tensor, Tensor]:
    """Top `rank` eigenpairs of D C D^T without the square root of C where that is avoidable (ESM's directions).

    d        [..., m, n], c [..., n, n] symmetric positive semidefinite (only its upper triangle is read); float32 or
             float64
    mode     fast: large matrices of which few directions are asked for are iterated on; near the best captured sum of
             eigenvalues, but directions of close ones are mixed
    Returns  basis [..., m, rank] orthonormal in d's dtype (largest entry of each column positive),
             values float64 [..., rank] descending, >= 0
    Error    all of it in float64; values below about 1e-12 of the largest are noise, and so are their directions
    Cost     m <= n: m n^2 / 2 + m^2 n multiply-adds, a range eigensolve of m; m > n: n^3 / 3 + m n^2 and one of n.
             fast, iterated: 2 rank (2 m n + n^2) for each of at most FAST_STEPS steps
    Raises   NonFinite; ValueError (shapes, dtypes, mode, rank outside 1..min(m, n))."""
    _checks.check_choice("mode", mode, MODES)
    for what, x in (("d", d), ("c", c)):
        _checks.check_matrices(what, x)
    _checks.check_count("rank", rank, d.shape)
    batch, (m, n) = d.shape[:-2], d.shape[-2:]
    if c.shape != (*batch, n, n) or c.device != d.device:
        raise ValueError(
            f"c must be {[*batch, n, n]} on {d.device} for d {list(d.shape)}, got {list(c.shape)} on {c.device}"
        )
    bases, values = [], []
    for i, (x, y) in enumerate(zip(_flat(d), _flat(c), strict=True)):
        x, norm, power = _scaled("d", x, i, batch)
        y, weight, scale = _scaled("c", y, i, batch)
        if norm == 0.0 or weight == 0.0:
            basis, theta = torch.eye(m, rank, device=d.device), torch.zeros(rank, dtype=torch.float64, device=d.device)
        else:
            few = min(m, n) > GRAM_SIDE and rank * ITERATED_SHARE <= min(m, n)
            find = _covariance_iterated if mode == "fast" and few else _covariance_top
            basis, theta = find(x.double(), y.double(), rank)
        bases.append(_column_signs(basis.to(d.dtype)))
        values.append(theta * power**2 * scale)
    empty = d.new_empty((*batch, m, rank))
    return _stack(bases, batch, empty), _stack(values, batch, empty.new_empty((*batch, rank), dtype=torch.float64))


def _covariance_top(d: Tensor, c: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if d.shape[0] <= d.shape[1]:
        theta, basis = _dense.top_eigh(_dense.congruence(d, c), rank)
        return basis, theta
    b = d @ _square_root(c)  # [m, n]
    theta, right = _dense.top_eigh(_dense.gram(b.mT), rank)
    return _dense.unit_columns(b @ right, theta.sqrt()), theta


def _covariance_iterated(d: Tensor, c: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Subspace iteration with twice the wanted directions until the sum of the wanted values settles; c by its upper
    triangle."""
    c = c.triu() + c.triu(1).mT
    q = _dense.orth(d @ (c @ sketch(d.mT, min(d.shape[0], max(2 * rank, rank + 16)))))
    before, steps = 0.0, 0
    while True:
        image, steps = d @ (c @ (d.mT @ q)), steps + 1
        product = q.mT @ image
        theta, z = _dense.eigh((product + product.mT) / 2)
        captured = float(theta[-rank:].sum())
        if captured - before <= FAST_GAIN * captured or steps == FAST_STEPS:
            return q @ z[:, -rank:].flip(1), theta[-rank:].flip(0).clamp(min=0)
        q, before = _dense.orth(image), captured


def _square_root(c: Tensor) -> Tensor:
    """L with L L^T = c, by the upper triangle of c: Cholesky, or, where c is singular, from its eigenpairs."""
    factor, failed = torch.linalg.cholesky_ex(c, upper=True)
    if not int(failed):
        return factor.mT
    values, vectors = _dense.range_eigh(c.clone().mT, 0, len(c))
    return vectors * values.clamp(min=0).sqrt()
