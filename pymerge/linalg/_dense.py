"""Dense pieces: float64 Gram matrix, range eigensolver, orthonormal bases, the sign rule."""

from __future__ import annotations

import torch
from torch import Tensor

from pymerge.errors import NumericError
from pymerge.linalg import _lapack

CHUNK = 2048  # columns that are widened to float64 at a time
LAPACK_SIDE = 256  # torch's eigensolver is as fast below
DIVIDE_SHARE, MRRR_SHARE = 3, 12  # of the eigenpairs wanted, from which on each way is the fastest


def wide_blocks(a: Tensor) -> list[tuple[int, int]]:
    n = a.shape[1]
    return [(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]


def gram(a: Tensor) -> Tensor:
    """a a^T in float64 [r, r]; on the CPU only the lower triangle is computed, the upper one is unspecified."""
    if a.device.type != "cpu":
        wide = a.double()
        return wide @ wide.mT
    total = torch.zeros(a.shape[0], a.shape[0], dtype=torch.float64).mT  # column-major: LAPACK works in place
    for low, high in wide_blocks(a):
        _lapack.add_gram_(total, a[:, low:high].double().contiguous())
    return total


def congruence(d: Tensor, s: Tensor) -> Tensor:
    """d S d^T [m, m], float64; S symmetric, of which the upper triangle s [n, n] is read; on the CPU only the lower
    triangle is computed, the upper one is unspecified."""
    if d.device.type == "cpu":
        return _lapack.congruence(d.contiguous(), s.contiguous())
    return d @ (s.triu() + s.triu(1).mT) @ d.mT


def range_eigh(g: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs low..high-1 (ascending order of all) of a symmetric float64 matrix given by its lower triangle; may
    overwrite it. Values ascending [high - low], vectors [r, high - low].

    On the CPU LAPACK's steps one by one, for the tridiagonal eigenproblem is solved in the fastest way for the share of
    pairs wanted: bisection and inverse iteration up to a twelfth, relatively robust representations (MRRR) up to a
    third, divide and conquer (twice [r, r] more in memory) from there on. All pairs take 0.5 (r = 768) to 0.8 (3072) of
    what they do by MRRR."""
    if g.device.type != "cpu":
        values, vectors = torch.linalg.eigh(g)
        return values[low:high], vectors[:, low:high]
    r, count = g.shape[0], high - low
    if r == 1:
        return g[0], torch.ones_like(g)
    if g.stride(0) != 1:
        g = g.mT.contiguous().mT
    diagonal, off, tau = _lapack.tridiagonal(g)
    if count * DIVIDE_SHARE >= r:
        solve = _lapack.divide_and_conquer
    else:
        solve = _lapack.mrrr if count * MRRR_SHARE >= r else _lapack.bisection
    try:
        values, vectors = solve(diagonal, off, low, high)
    except NumericError:
        values, vectors = _lapack.bisection(diagonal, off, low, high)
    _lapack.reflect_(g, tau, vectors)
    return values, vectors


def eigh(g: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenpairs, ascending, of symmetric float64 matrices [..., r, r], which may be overwritten."""
    if g.shape[-1] < LAPACK_SIDE or g.device.type != "cpu":
        values, vectors = torch.linalg.eigh(g)
        return values, vectors
    if g.dim() > 2:
        found = [eigh(one) for one in g.reshape(-1, *g.shape[-2:])]
        values, vectors = (torch.stack(x).reshape(*g.shape[:-2], *x[0].shape) for x in zip(*found, strict=True))
        return values, vectors
    return range_eigh(g.mT if g.stride(1) == 1 else g, 0, g.shape[0])


def top_eigh(g: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenpairs, descending, values clamped at 0."""
    r = g.shape[0]
    values, vectors = range_eigh(g, r - count, r)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def other_side(a: Tensor, left: Tensor) -> Tensor:
    """a^T left [n, k] in left's dtype, left float64 or in a's dtype [r, k]."""
    if a.device.type != "cpu" or a.dtype == left.dtype:
        return a.to(left.dtype).mT @ left
    return torch.cat([a[:, low:high].double().mT @ left for low, high in wide_blocks(a)])


def unit_columns(y: Tensor, s: Tensor) -> Tensor:
    """The orthonormal factor of y = V diag(s) whose columns are orthogonal up to rounding; columns that are zero, or so
    small that rounding has tilted them, are re-orthogonalised against the ones before (Householder, signs kept)."""
    if float(s[-1]) > 1e-4 * float(s[0]):
        return y / y.norm(dim=0)
    q, upper = torch.linalg.qr(y / y.norm(dim=0).clamp(min=torch.finfo(y.dtype).tiny))
    return q * torch.where(upper.diagonal() < 0, -1.0, 1.0)


def orth(y: Tensor) -> Tensor:
    """Orthonormal basis of the columns of y [r, l], up to a few eps: Householder QR on the CPU (faster there, whatever
    the columns), Cholesky QR on other devices."""
    return torch.linalg.qr(y).Q if y.device.type == "cpu" else cholesky_orth(y)


def cholesky_orth(y: Tensor) -> Tensor:
    """Cholesky QR of the columns scaled to one length (float64 Gram), repeated until the Gram matrix was close enough
    to 1 for the last step to be exact: twice as a rule. Where Cholesky fails, once with a shift, then Householder."""
    q = y / y.norm(dim=0).clamp(min=torch.finfo(y.dtype).tiny)
    eye = torch.eye(q.shape[1], dtype=torch.float64, device=q.device)
    for attempt in range(4):
        wide = q.double()
        g = wide.mT @ wide
        close = bool((g - eye).abs().max() < 1e-4)  # a step leaves an error of the order of this one's square
        factor, failed = torch.linalg.cholesky_ex(g)
        if int(failed) and attempt == 0:
            factor, failed = torch.linalg.cholesky_ex(g + 1e-6 * g.diagonal().max() * eye)
        if int(failed):
            break
        q = torch.linalg.solve_triangular(factor.mT.to(q.dtype), q, upper=True, left=False)
        if close:
            return q
    return torch.linalg.qr(y).Q


def fix_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of u and v flipped together, so that the entry of largest magnitude of each column of u is positive."""
    flip = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0).to(u.dtype)
    return u * flip, v * flip


def eigenvalues(g: Tensor) -> Tensor:
    """All eigenvalues, ascending, of a symmetric float64 matrix given by its lower triangle."""
    return torch.linalg.eigvalsh(g, UPLO="L")


def largest_eigenvalue(g: Tensor, steps: int = 20) -> Tensor:
    """A lower bound of the largest eigenvalue, close enough to judge a condition number by: power iteration from the
    column of the largest diagonal entry, on the lower triangle."""
    lower = g.tril()
    full = lower + lower.mT - torch.diag(g.diagonal())
    x = full[:, int(g.diagonal().argmax())]
    for _ in range(steps):
        x = full @ (x / x.norm())
    return x.norm()
