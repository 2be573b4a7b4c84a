"""Polar factors: the nearest partial isometry to a matrix, with a rule for its rank."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pymerge.errors import NonFinite
from pymerge.linalg._gram_root import RESOLUTION, gram_root, polar_of_gram, wide_product
from pymerge.linalg._polar_iterations import bounds, newton_schulz, qdwh
from pymerge.linalg._polar_single import SMALLEST, decays, gram32, halley, rotated
from pymerge.ops._foreign import takes_arrays

DEFAULT_TOL = 1e-6
LARGEST_STEP = 1e-3  # Newton step of the Gram factor; its error is of the order of the square

PolarMethod = Literal["auto", "gram", "newton_schulz", "qdwh", "svd"]
METHODS = ("auto", "gram", "newton_schulz", "qdwh", "svd")


class Polar(NamedTuple):
    factor: Tensor  # [..., m, n], float32 or float64
    rank: Tensor  # int64 [...]: singular values that were kept
    condition: Tensor  # float64 [...]: largest over smallest kept singular value (0: none was kept)
    methods: tuple[str, ...]  # what ran, one entry per matrix


@takes_arrays
def polar(a: Tensor, tol: float = DEFAULT_TOL, method: PolarMethod = "auto") -> Polar:
    """P = sum of u_i v_i^T over the singular values s_i > tol * s_1: the polar factor, a partial isometry.

    Directions below tol are left out, never completed by arbitrary null vectors, so that the result is defined by its
    input also where that has less than full rank; a zero matrix gives zeros.

    a        [..., m, n], bfloat16, float16, float32 or float64; half precision is widened and the factor is float32
    tol      relative to the largest singular value, in [0, 1)
    method   gram: eigenvectors of the float64 Gram matrix of the smaller side and one Newton step; resolves tol down to
             4e-7. newton_schulz, qdwh: iterations for matrices of full rank, others go to gram. svd: float64 SVD.
             auto: on CUDA qdwh; elsewhere, for float32 matrices of 256 and more: halley (two steps on the float32 Gram
             matrix) where the condition is 3 or so at most and m >= 2 n, else rotated (float32 eigenvectors of the Gram
             matrix as a rotation, small singular values in float64); both check their result. What they decline,
             what is smaller or of low rank, and spectra that decay fast go to gram; svd where the Gram matrix cannot
             resolve tol or the condition.
    Returns  factor, rank, condition (iterations: an upper bound, at most n times too large; halley: an estimate, from
             below) and the methods that ran
    Error    relative to |P|, float32 input: 2e-6 for conditions up to 1e6 (seen: 4e-7 by halley, 1e-6 by rotated, 3e-8
             by the others); float64 input: condition * 1e-15, and (condition * 6e-8)^4 more by gram.
    Cost     with m >= n: halley 1.6 m n^2 + 3 n^3 multiply-adds and rotated 3.2 m n^2 + n^3 + eigh of [n, n], in
             float32; gram 3 to 5 m n^2 + eigh, mostly in float64; svd 4 m n^2 + 22 n^3 or so. Matrices of a batch go
             one by one on the CPU (the same bits as alone) and together on CUDA.
    Raises   NonFinite (NaN or infinity, with the matrix' index); ValueError (shape, dtype, tol, method).
    Source   Higham, Functions of Matrices, chapter 8; the Newton step is first-order perturbation theory."""
    _check(a, tol, method)
    x = a if a.dtype == torch.float64 else a.float()
    batch = x.shape[:-2]
    if a.numel() == 0:
        zeros = torch.zeros(batch, device=a.device)
        return Polar(torch.zeros_like(x), zeros.long(), zeros.double(), (method,) * math.prod(batch))
    scaled = _normalised(x.reshape(-1, *x.shape[-2:]))
    parts = [scaled] if a.is_cuda else [one[None] for one in scaled]
    done = [_of_shape(part, tol, method) for part in parts]
    factor = done[0].factor if len(done) == 1 else torch.cat([one.factor for one in done])
    rank = torch.cat([one.rank for one in done]).reshape(batch)
    condition = torch.cat([one.condition for one in done]).reshape(batch)
    methods = tuple(name for one in done for name in one.methods)
    return Polar(factor.reshape(x.shape), rank, condition, methods)


@takes_arrays
def polar_product(a: Tensor, b: Tensor, tol: float = DEFAULT_TOL) -> Tensor:
    """polar(a) b = a (a^T a)^(-1/2) b, without the factor where that costs less.

    a        [m, n]; b [n, q]; bfloat16, float16, float32 or float64
    Returns  [m, q], float32 or float64
    Error    that of polar, times |b|
    Cost     float32 with n below 256, m >= n and q < m n / (n + m / 2): the Gram matrix and its eigenvectors, through
             which the inverse root is applied to b (2 n^2 q), and m n q; else polar(a), and m n q.
    Raises   as polar; ValueError (shapes do not fit)."""
    _check(a, tol, "gram")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"polar_product: expected [m, n] and [n, q], got {list(a.shape)} and {list(b.shape)}")
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    (m, n), q = a.shape, b.shape[1]
    x, y = a.to(dtype), b.to(dtype)
    on_gram = 0 < n < SMALLEST and m >= n and dtype == torch.float32 and tol >= RESOLUTION
    if on_gram and 0 < q < m * n / (n + m / 2):
        scaled = _normalised(x)
        root = gram_root(scaled, tol)
        if root.is_plain:
            inner = root.vectors @ (root.inverse[:, None] * (root.vectors.mT @ y.double()))
            return wide_product(scaled, inner)
    return polar(x, tol).factor @ y


@takes_arrays
def mean_singular_value(factor: Tensor, a: Tensor) -> Tensor:
    """sum(s) / min(m, n) of each matrix as <polar(a), a> / min(m, n): no singular values are computed.

    factor, a  [..., m, n]; factor of polar(a), whose dropped values count as zeros
    Returns    float64 [...]
    Cost       one pass, products and sums in float64."""
    if factor.shape != a.shape or a.dim() < 2:
        raise ValueError(f"mean_singular_value: expected two [..., m, n], got {list(factor.shape)}, {list(a.shape)}")
    if a.numel() == 0:
        return torch.zeros(a.shape[:-2], dtype=torch.float64, device=a.device)
    total = torch.zeros(a.shape[:-2], dtype=torch.float64, device=a.device)
    for p, x in zip(factor.split(256, dim=-2), a.split(256, dim=-2), strict=True):
        total += (p.double() * x.double()).sum((-2, -1))
    return total / min(a.shape[-2:])


def _check(a: Tensor, tol: float, method: str) -> None:
    if a.dim() < 2:
        raise ValueError(f"polar: expected [..., m, n], got {list(a.shape)}")
    if a.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"polar: expected bfloat16, float16, float32 or float64, got {a.dtype}")
    if not 0.0 <= tol < 1.0:
        raise ValueError(f"polar: tol is relative to the largest singular value, expected 0 <= tol < 1, got {tol}")
    if method not in METHODS:
        raise ValueError(f"polar: method must be one of {', '.join(METHODS)}, got {method!r}")
    if method != "svd" and method != "auto" and tol < RESOLUTION:
        raise ValueError(f"polar: {method} resolves tol down to {RESOLUTION}, got {tol}: use auto or svd")
    if a.is_cuda or a.device.type == "cpu":
        return
    raise ValueError(f"polar: runs on cpu and cuda, got {a.device}")


def _normalised(x: Tensor) -> Tensor:
    """x [..., m, n] times powers of two such that squares and inverses stay in range; the factor is the same."""
    top = x.abs().amax((-2, -1))
    finite = torch.isfinite(top)
    if not bool(finite.all()):
        index = int((~finite).reshape(-1).nonzero()[0])
        bad = int((~torch.isfinite(x.reshape(-1, *x.shape[-2:])[index])).sum())
        raise NonFinite(f"polar: matrix {index} of {finite.numel()} has {bad} NaN or infinite entries")
    if bool(((top == 0) | ((top > 1e-12) & (top < 1e12))).all()):
        return x
    exponent = torch.where(top > 0, top.double().log2().floor(), 0.0).to(torch.int32)
    return torch.ldexp(x, -exponent[..., None, None])


def _of_shape(x: Tensor, tol: float, method: str) -> Polar:
    """x [b, m, n], scaled. The tall orientation is the one that is computed."""
    if x.shape[-2] >= x.shape[-1]:
        return _tall(x, tol, method)
    turned = _tall(x.mT, tol, method)
    return turned._replace(factor=turned.factor.mT.contiguous())


def _tall(x: Tensor, tol: float, method: str) -> Polar:
    count = x.shape[0]
    if method == "svd" or (method == "auto" and tol < RESOLUTION):
        return _by_svd(x, tol)
    if method in ("newton_schulz", "qdwh") or (method == "auto" and x.is_cuda):
        found = bounds(x, tol)
        if bool(found.full_rank.all()):
            run, name = (newton_schulz, "newton_schulz") if method == "newton_schulz" else (qdwh, "qdwh")
            rank = torch.full((count,), x.shape[-1], device=x.device)
            return Polar(run(x, found), rank, found.condition, (name,) * count)
    if method == "auto" and count == 1 and x.dtype == torch.float32 and x.shape[-1] >= SMALLEST:
        found = _single(x[0], tol)
        if found is not None:
            return found
    root = gram_root(x, tol)
    factor, step = polar_of_gram(x, root)
    if method == "auto" and step > LARGEST_STEP:
        return _by_svd(x, tol)
    return Polar(factor, root.rank, root.condition, ("gram",) * count)


def _single(x: Tensor, tol: float) -> Polar | None:
    gram = gram32(x)
    if decays(gram):
        return None
    name, found = "halley", halley(x, gram, tol) if x.shape[0] >= 2 * x.shape[1] else None
    if found is None:
        name, found = "rotated", rotated(x, gram, tol)
    if found is None:
        return None
    rank = torch.full((1,), x.shape[-1], device=x.device)
    return Polar(found[0][None], rank, torch.full((1,), found[1], dtype=torch.float64), (name,))


def _by_svd(x: Tensor, tol: float) -> Polar:
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    keep = (s > tol * s[..., :1]) & (s > 0)
    factor = (u * keep[..., None, :]) @ vh
    smallest = torch.where(keep, s, torch.inf).amin(-1)
    condition = torch.where(keep.any(-1), s[..., 0] / smallest, 0.0)
    return Polar(factor.to(x.dtype), keep.sum(-1), condition, ("svd",) * x.shape[0])
