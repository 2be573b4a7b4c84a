"""Truncated singular value decomposition: the exact and the fast mode, and the choice between their routes."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pymerge.linalg import _checks, _dense, _factors, _iteration
from pymerge.linalg._factors import Factors
from pymerge.linalg.svd_info import SVD, SVDInfo
from pymerge.ops._foreign import takes_arrays

MODES = ("exact", "fast")
ROUTES = ("gram", "iteration", "full")
# Above these, iteration beats the Gram matrix plus range eigensolve (measured: benchmarks/bench_truncated_svd.py).
GRAM_SIDE = 1024
ITERATED_SHARE = 16  # iteration pays while rank <= side / 16
# A float64 Gram matrix keeps s_k with a relative error of about 1e-16 (s_1 / s_k)^2. That is less than what a float32
# decomposition makes of it down to the float32 noise; for float64 it is not, and these inputs are decomposed in full.
FLOAT64_CONDITION = 1e4


@takes_arrays
def truncated_svd(
    a: Tensor, rank: int, *, mode: str = "exact", tol: float | None = None, seed: int = 0, route: str | None = None
) -> SVD:
    """Top `rank` singular triplets of each matrix in a batch, A ~ U diag(S) Vh.

    a        [..., m, n], float32 or float64, any strides. Half precision is refused: widening is the caller's decision.
    mode     exact: as good as a full decomposition in a's dtype, or better. fast: randomised, reproducible by `seed`;
             near the best residual, but directions of close singular values are mixed: read info.certified_rank.
    tol      largest allowed info.excess; where it is not met, the full decomposition is taken and info says so.
    route    gram, iteration or full in place of the choice by shape, rank and dtype (exact only).
    Returns  U [..., m, k], S [..., k] (descending, >= 0), Vh [..., k, n], info; U and V have orthonormal columns also
             where A has a lower rank; the entry of largest magnitude of each U column is positive. A batch gives the
             bits that its matrices give one by one.
    Error    info.certified_rank: leading directions, left and right, whose angle to the true ones is proven to have a
             sine <= 0.1 (Wedin); info.residual, info.captured, info.excess.
    Cost     r = min(m, n), N = max(m, n), l = k + max(16, k/8). gram: r^2 N / 2 float64 multiply-adds, a range
             eigensolve (CPU; a full one on CUDA) and r N k; iteration: with l = max(2 k, k + 16) 2 r N l for each of
             about 12 steps, most often in one round; fast: 7 r N l.
    Raises   NonFinite (NaN/Inf in a, with batch index); ValueError (rank outside 1..min(m, n), dtype, mode, tol,
             route).
    Source   arXiv 0909.4061, algorithms 4.4 and 5.1 (fast); Rayleigh-Ritz with a Chebyshev filter (iteration)."""
    _checks.check_matrices("a", a)
    _checks.check_count("rank", rank, a.shape)
    _checks.check_choice("mode", mode, MODES)
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must be >= 0 or None, got {tol!r}")
    if route is not None:
        _checks.check_choice("route", route, ROUTES)
        if mode != "exact":
            raise ValueError(f"route={route!r} goes with mode='exact', got mode={mode!r}")
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    found = [_one(x, rank, mode, tol, seed, route, (i, batch)) for i, x in enumerate(a.reshape(math.prod(batch), m, n))]
    return _collect(a, rank, found)


def _choose(wide: Tensor, rank: int) -> tuple[str, str]:
    r = wide.shape[0]
    if r <= GRAM_SIDE:
        return "gram", f"smaller side {r} <= {GRAM_SIDE}"
    if rank * ITERATED_SHARE > r:
        return "gram", f"rank {rank} > {r} / {ITERATED_SHARE}"
    return "iteration", f"smaller side {r} > {GRAM_SIDE}, rank {rank} <= {r} / {ITERATED_SHARE}"


def _gram_or_full(wide: Tensor, rank: int, norm: float, reason: str) -> tuple[Factors, str, str]:
    found = _factors.from_gram(wide, rank, norm)
    if wide.dtype == torch.float64 and float(found.s[-1]) * FLOAT64_CONDITION < float(found.s[0]):
        reason += f"; s_1 / s_{rank} > {FLOAT64_CONDITION:g} is too much for a float64 Gram matrix: full"
        return _factors.from_full(wide, rank), "full", reason
    return found, "gram", reason


def _exact(wide: Tensor, rank: int, norm: float, seed: int, asked: str | None) -> tuple[Factors, str, str]:
    route, reason = (asked, "asked for") if asked else _choose(wide, rank)
    if route == "full":
        return _factors.from_full(wide, rank), route, reason
    if route == "iteration":
        found = _iteration.converge(wide, rank, norm, seed)
        if found is not None:
            return found, route, reason
        reason += "; values too close together beyond the rank: gram"
    return _gram_or_full(wide, rank, norm, reason)


def _frobenius(a: Tensor) -> float:
    """In float64, a few rows at a time: several times as fast as vector_norm(dtype=float64)."""
    rows = a if a.stride(-1) == 1 else a.mT
    total = 0.0
    for block in rows.split(max(1, (1 << 16) // max(1, rows.shape[1]))):
        wide = block.double().reshape(-1)
        total += float(wide @ wide)
    return math.sqrt(total)


def scaled(a: Tensor) -> tuple[Tensor, float, float]:
    """(a over a power of two, its Frobenius norm, that power): squares of what comes back neither vanish nor
    overflow. The norm is NaN or infinite where a has such entries."""
    norm = _frobenius(a)
    if 2.0**-20 < norm < 2.0**20:
        return a, norm, 1.0
    largest = float(a.abs().max())  # squares of tiny entries vanish: the norm does not tell zero from these
    if largest == 0.0 or not math.isfinite(largest):
        return a, largest, 1.0
    power = 2.0 ** (math.frexp(largest)[1] - 1)
    small = (a.double() / power).to(a.dtype)
    return small, _frobenius(small), power


def _one(
    a: Tensor, rank: int, mode: str, tol: float | None, seed: int, route: str | None, place: tuple[int, torch.Size]
) -> tuple[Tensor, Tensor, Tensor, tuple]:
    """U [m, k], s float64 [k], V [n, k], (captured, excess, certified, rounds, route, reason)."""
    turned = a.shape[0] > a.shape[1]
    wide, norm, power = scaled(a.mT if turned else a)
    _checks.check_finite("a", norm, a, *place)
    if norm == 0.0:
        found, route, reason = _factors.zero(wide, rank), "zero", "every entry is 0"
    elif mode == "fast":
        found, route, reason = _iteration.power(wide, rank, norm, seed), "fast", "asked for"
    else:
        found, route, reason = _exact(wide, rank, norm, seed, route)
    if tol is not None and found.excess > tol:
        reason += f"; excess {found.excess:.3g} > tol {tol:.3g}: full"
        found, route = replace(_factors.from_full(wide, rank), rounds=found.rounds), "full"
    assert found.right is not None
    captured = min(1.0, float(found.s.square().sum()) / norm**2) if norm else 1.0
    u, v = (found.right, found.left) if turned else (found.left, found.right)
    u, v = _dense.fix_signs(u, v)
    return u, found.s * power, v, (captured, found.excess, found.certified, found.rounds, route, reason)


def _collect(a: Tensor, rank: int, found: list) -> SVD:
    batch, (m, n) = a.shape[:-2], a.shape[-2:]
    u, v = a.new_empty((len(found), m, rank)), a.new_empty((len(found), rank, n))
    s = a.new_empty((len(found), rank))
    for i, (left, values, right, _) in enumerate(found):
        u[i], s[i], v[i] = left, values, right.mT
    columns = list(zip(*(x[3] for x in found), strict=True)) or [()] * 6
    captured, excess, certified, rounds = (
        torch.tensor(x, dtype=dtype).reshape(batch)
        for x, dtype in zip(columns[:4], (torch.float64, torch.float64, torch.int64, torch.int64), strict=True)
    )
    info = SVDInfo((1 - captured).sqrt(), captured, excess, certified, rounds, tuple(columns[4]), tuple(columns[5]))
    return SVD(u.reshape(*batch, m, rank), s.reshape(*batch, rank), v.reshape(*batch, rank, n), info)
