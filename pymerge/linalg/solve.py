"""Positive definite solves: Cholesky, rank-one corrections, the push-through form, choice of precision."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pymerge.errors import NonFinite, NumericError
from pymerge.ops._foreign import takes_arrays, writes_array
from pymerge.ops.gram64 import gram64

# A float32 solve is off by condition * 6e-8 (times 0.2 to 4): up to here that is a few 1e-5.
FLOAT32_CONDITION = 1e3
POWER_STEPS, POWER_VECTORS = 8, 4
KRYLOV_STEPS = 12
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Precision = Literal["auto", "float32", "float64"]


class Solved(NamedTuple):
    x: Tensor  # [..., k, n], float32, or float64 where a right-hand side is
    condition: Tensor  # float64 [...]: estimate, seldom below half of the true one
    wide: Tensor  # bool [...]: solved in float64


@writes_array("m")
def solve_psd(
    m: Tensor,
    b: Tensor,
    *,
    rank_one: tuple[Tensor, Tensor] | None = None,
    precision: Precision = "auto",
    overwrite: bool = False,
) -> Solved:
    """X with X (M + u v^T) = B, M symmetric positive definite: rows of B are the right-hand sides.

    m         [..., n, n], symmetric (the lower triangle is read), any of the four float dtypes
    b         [..., k, n], the same batch; M^-1 B is solve_psd(m, B.mT).x.mT
    rank_one  u, v [..., n]: by one more right-hand side, M + u v^T is never formed and need not be symmetric
    precision auto: float32 for results in float32 and estimated conditions up to 1e3, else float64
    overwrite m (both triangles filled, in that precision) may be used up for its factor, which then takes no memory;
              not with auto
    Error     |X - true| <= c condition eps |X|, c about 4, eps 6e-8 or 1.1e-16
    Cost      n^3 / 3 + (k + 1) n^2 multiply-adds; auto repeats the factorisation where it turns to float64.
    Raises    ValueError (shapes, dtypes); NonFinite; NumericError (not positive definite; u v^T makes it singular).
    Source    Sherman and Morrison, 1950."""
    _check_matrix("solve_psd", m)
    if overwrite and precision == "auto":
        raise ValueError("solve_psd: overwrite needs a precision: auto may factor m twice")
    n = m.shape[-1]
    _check("solve_psd", "b", b, (*m.shape[:-2], b.shape[-2] if b.dim() > 1 else 0, n))
    u, v = _vectors("solve_psd", rank_one, (*m.shape[:-2], n), (*m.shape[:-2], n), b)
    rows = b if v is None else torch.cat([b, v[..., None, :].to(b.dtype)], dim=-2)
    return _corrected("solve_psd", _solve_rows("solve_psd", m, rows, precision, overwrite), u)


@takes_arrays
def solve_ridge(
    g: Tensor,
    z: Tensor,
    ridge: float,
    *,
    rank_one: tuple[Tensor, Tensor] | None = None,
    precision: Precision = "auto",
) -> Solved:
    """G Z (Z^T Z + ridge)^-1 by the smaller system: G (Z Z^T + ridge)^-1 Z where Z has no more rows than columns.

    g         [..., k, r]
    z         [..., r, n]
    ridge     > 0
    rank_one  u [..., n], w [..., r]: the inverse is that of Z^T Z + ridge + u (w^T Z)
    Returns   x [..., k, n]; condition is that of the system that was solved
    Error     as solve_psd; the smaller system is up to 70 times better conditioned in float32 (specs of ACE, 7.2)
    Cost      s^2 max(r, n) / 2 + s^3 / 3 + k s (r + n), s = min(r, n); Gram matrices in float64.
    Raises    as solve_psd.
    Source    the push-through identity; Woodbury, 1950."""
    _check("solve_ridge", "z", z, None)
    rows, n = z.shape[-2:]
    _check("solve_ridge", "g", g, (*z.shape[:-2], g.shape[-2] if g.dim() > 1 else 0, rows))
    if not ridge > 0.0:
        raise ValueError(f"solve_ridge: ridge must be positive, got {ridge}")
    u, w = _vectors("solve_ridge", rank_one, (*z.shape[:-2], n), (*z.shape[:-2], rows), g)
    right = g if w is None else torch.cat([g, w[..., None, :].to(g.dtype)], dim=-2)
    dtype = torch.float64 if torch.float64 in (g.dtype, z.dtype) else torch.float32
    right, wide_z = right.to(dtype), z.to(dtype)
    if rows <= n:
        solved = _solve_rows("solve_ridge", _with_ridge(gram64(z.mT), ridge), right, precision)
        solved = solved._replace(x=solved.x @ wide_z)
    else:
        solved = _solve_rows("solve_ridge", _with_ridge(gram64(z), ridge), right @ wide_z, precision)
    return _corrected("solve_ridge", solved, u)


@takes_arrays
def condition_estimate(m: Tensor) -> Tensor:
    """Largest over smallest eigenvalue of positive definite matrices, by power steps on M and on its Cholesky factor.

    m        [..., n, n], symmetric
    Returns  float64 [...], from below: seldom under half of the true condition; infinity where M has no factor in
             float64; 1 for n = 0
    Cost     n^3 / 3 + 64 n^2 multiply-adds in float64."""
    _check_matrix("condition_estimate", m)
    flat = m.double().reshape(math.prod(m.shape[:-2]), *m.shape[-2:])
    if m.shape[-1] == 0:
        return torch.ones(m.shape[:-2], dtype=torch.float64, device=m.device)
    factor, failed = torch.linalg.cholesky_ex(flat)
    found = _largest(flat) * _largest_inverse(_valid(factor, failed))
    return torch.where(failed == 0, found, torch.inf).reshape(m.shape[:-2])


@takes_arrays
def capped_ridge(c: Tensor, start: float, max_condition: float) -> float:
    """The smallest ridge = start * 2^k, k >= 0, with (largest + ridge) / (smallest + ridge) <= max_condition.

    Largest and smallest are eigenvalues of C [n, n], positive semidefinite up to rounding. Deterministic, unlike
    doubling until an inverse looks right.
    Cost     one Cholesky factorisation (n^3 / 3) a doubling: C + ridge - (largest + ridge) / max_condition has a factor
             exactly where the condition is met.
    Raises   ValueError (start <= 0, max_condition <= 1, C not square); NonFinite."""
    _check_matrix("capped_ridge", c)
    if c.dim() != 2 or not start > 0.0 or not max_condition > 1.0:
        raise ValueError(
            f"capped_ridge: expected c [n, n], start > 0, max_condition > 1, got {list(c.shape)}, {start}, "
            f"{max_condition}"
        )
    wide = c.double()
    if not _is_finite(wide):
        raise NonFinite("capped_ridge: c has NaN or infinite entries")
    if c.numel() == 0:
        return start
    top = _krylov_largest(wide)
    ridge = start
    while not _is_definite(_with_ridge(wide, ridge - (top + ridge) / max_condition)):
        ridge *= 2.0
    return ridge


def _is_definite(m: Tensor) -> bool:
    return bool(torch.linalg.cholesky_ex(m)[1] == 0)


def _with_ridge(m: Tensor, ridge: float) -> Tensor:
    result = m.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(ridge)
    return result


def _solve_rows(op: str, m: Tensor, b: Tensor, precision: Precision, overwrite: bool = False) -> Solved:
    """B M^-1, matrix by matrix on the CPU (the same bits as alone), together on CUDA."""
    if precision not in ("auto", "float32", "float64"):
        raise ValueError(f"{op}: precision must be auto, float32 or float64, got {precision!r}")
    batch, n = m.shape[:-2], m.shape[-1]
    out = b.dtype if b.dtype == torch.float64 else torch.float32
    count = math.prod(batch)
    flat_m, flat_b = m.reshape(count, n, n), b.to(out).reshape(count, *b.shape[-2:])
    if not _is_finite(flat_m) or not _is_finite(flat_b):
        raise NonFinite(f"{op}: a matrix or a right-hand side has NaN or infinite entries")
    x = torch.empty_like(flat_b, memory_format=torch.contiguous_format)
    condition = torch.ones(count, dtype=torch.float64, device=m.device)
    wide = torch.full((count,), precision == "float64" or (precision == "auto" and out == torch.float64))
    groups = [slice(0, count)] if m.is_cuda else [slice(i, i + 1) for i in range(count)]
    for at in groups if x.numel() else []:
        part = _Part(flat_m[at], flat_b[at], x[at], condition[at])
        if not bool(wide[at].any()):
            wide[at] = _solve_into(op, part, torch.float32, precision, overwrite)
        if bool(wide[at].all()):
            _solve_into(op, part, torch.float64, "float64", overwrite)
        elif bool(wide[at].any()):
            again = torch.arange(count)[at][wide[at]].to(m.device)
            part = _Part(flat_m[again], flat_b[again], x[again], condition[again])
            _solve_into(op, part, torch.float64, "float64", overwrite)
            x[again], condition[again] = part.x, part.condition
    return Solved(x.reshape(b.shape), condition.reshape(batch), wide.to(m.device).reshape(batch))


class _Part(NamedTuple):
    """Some matrices of a batch; x and condition are filled in."""

    m: Tensor  # [b, n, n]
    b: Tensor  # [b, k, n]
    x: Tensor
    condition: Tensor  # [b]


def _solve_into(op: str, part: _Part, dtype: torch.dtype, precision: Precision, overwrite: bool) -> Tensor:
    """Fills condition, and x where some matrix needs no more than `dtype`; returns on the host which ones need float64
    (auto only)."""
    m = part.m.to(dtype)
    largest = _largest(m)
    factor, failed = _in_place(m) if overwrite else torch.linalg.cholesky_ex(m)
    if precision != "auto" and bool((failed != 0).any()):
        index = int((failed != 0).nonzero()[0])
        raise NumericError(
            f"{op}: matrix {index} of {failed.numel()} is not positive definite in {dtype} (pivot "
            f"{int(failed[index])} of {m.shape[-1]}): add a ridge to its diagonal, or solve in float64"
        )
    factor = _valid(factor, failed)
    part.condition.copy_(largest * _largest_inverse(factor))
    again = ((failed != 0) | (part.condition > FLOAT32_CONDITION)).cpu() & (precision == "auto")
    if not bool(again.all()):
        half = torch.linalg.solve_triangular(factor.mT, part.b.to(dtype), upper=True, left=False)
        part.x.copy_(torch.linalg.solve_triangular(factor, half, upper=False, left=False))
    return again


def _is_finite(x: Tensor) -> bool:
    """No NaN, no infinity: both show in the extremes, which is one pass and nothing of x's size."""
    return x.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def _valid(factor: Tensor, failed: Tensor) -> Tensor:
    if not bool((failed != 0).any()):
        return factor
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.where((failed == 0)[:, None, None], factor, eye)


def _vectors_like(m: Tensor) -> Tensor:
    """[b, POWER_VECTORS, n]: in rows, since products of a few rows are faster than those of a few columns."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(m.shape[-1], POWER_VECTORS, generator=generator, dtype=torch.float64)
    return start.mT.to(m).contiguous().expand(m.shape[0], -1, -1)


def _krylov_largest(m: Tensor) -> float:
    """Largest eigenvalue of a symmetric m [n, n] from below, in the space that KRYLOV_STEPS products span."""
    blocks = [_vectors_like(m[None])[0]]
    for _ in range(KRYLOV_STEPS):
        blocks.append(torch.linalg.qr((blocks[-1] @ m).mT).Q.mT.contiguous())
    q = torch.linalg.qr(torch.cat(blocks[1:]).mT).Q.mT.contiguous()
    return float(torch.linalg.eigvalsh(q @ m @ q.mT)[-1])


def _largest(m: Tensor) -> Tensor:
    """Largest eigenvalue of each symmetric m [b, n, n] from below, float64 [b]."""
    v = _vectors_like(m)
    for _ in range(POWER_STEPS):
        v = torch.nn.functional.normalize(v @ m, dim=-1)
    return (v @ m).double().norm(dim=-1).amax(-1)


def _in_place(m: Tensor) -> tuple[Tensor, Tensor]:
    """cholesky_ex of symmetric matrices [b, n, n] with contiguous rows, in their own memory."""
    columns = m.mT  # LAPACK's order
    failed = torch.empty(m.shape[:-2], dtype=torch.int32, device=m.device)
    torch.linalg.cholesky_ex(columns, out=(columns, failed))
    return columns, failed


def _largest_inverse(factor: Tensor) -> Tensor:
    """Largest eigenvalue of the inverse of each factor factor^T, from below, float64 [b]."""
    v = _vectors_like(factor).mT
    for _ in range(POWER_STEPS):
        v = torch.nn.functional.normalize(_solve_columns(factor, v), dim=-2)
    return _solve_columns(factor, v).double().norm(dim=-2).amax(-1)


def _solve_columns(factor: Tensor, v: Tensor) -> Tensor:
    """As cholesky_solve, which copies the factor: for a few columns that costs several times the solve."""
    half = torch.linalg.solve_triangular(factor, v, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _corrected(op: str, solved: Solved, u: Tensor | None) -> Solved:
    """X0 - (X0 u) r / (1 + r u), r the last row of the solution."""
    if u is None:
        return solved
    x, row = solved.x[..., :-1, :], solved.x[..., -1:, :].double()
    wide_u = u.double()[..., None]  # [..., n, 1]
    divisor = 1.0 + row @ wide_u  # [..., 1, 1]
    eps = torch.finfo(x.dtype).eps
    if bool((divisor.abs() <= 8 * eps * (1.0 + row.abs() @ wide_u.abs())).any()):
        raise NumericError(f"{op}: the rank-one term makes the matrix singular (1 + v^T M^-1 u is 0 up to rounding)")
    share = (x.double() @ wide_u) / divisor  # [..., k, 1]
    return solved._replace(x=x - share.to(x.dtype) * row.to(x.dtype))


def _check_matrix(op: str, m: Tensor) -> None:
    _check(op, "matrix", m, None)
    if m.shape[-1] != m.shape[-2]:
        raise ValueError(f"{op}: expected [..., n, n], got {list(m.shape)}")


def _check(op: str, name: str, x: Tensor, shape: tuple[int, ...] | None) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
    if x.dim() < 2 or (shape is not None and tuple(x.shape) != shape):
        expected = "two or more dimensions" if shape is None else str(list(shape))
        raise ValueError(f"{op}: expected {name} of {expected}, got {list(x.shape)}")


def _vectors(
    op: str, pair: tuple[Tensor, Tensor] | None, first: tuple[int, ...], second: tuple[int, ...], like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if pair is None:
        return None, None
    for x, shape in zip(pair, (first, second), strict=True):
        if tuple(x.shape) != shape or x.device != like.device:
            raise ValueError(f"{op}: rank_one vector must be {list(shape)} on {like.device}, got {list(x.shape)}")
    return pair
