"""Polar factors by iterations made of products, Cholesky and QR alone: what a GPU does well, and in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.ops.gram64 import gram64

# Iterations in float32 are off by condition * 6e-8 (times some 1 to 4): from here on they run in float64.
FLOAT32_CONDITION = 100.0
MOST_ITERATIONS = 60  # a bound against NaN; 40 suffice for a condition of 1e8


@dataclass(frozen=True)
class Bounds:
    """Proven bounds of the singular values, from the Gram matrix and its inverse; each is off by sqrt(n) at most."""

    upper: Tensor  # float64 [...]
    lower: Tensor  # float64 [...]
    full_rank: Tensor  # bool [...]: every singular value is above tol times the largest

    @property
    def condition(self) -> Tensor:
        return self.upper / self.lower


def bounds(x: Tensor, tol: float, power_steps: int = 16) -> Bounds:
    """x [..., m, n], m >= n. By Sylvester's law the Gram matrix less its smallest wanted eigenvalue has a Cholesky
    factor exactly where all singular values are kept; the largest one is taken from power steps (from below)."""
    gram = gram64(x)
    v = gram.sum(-1, keepdim=True) + gram.diagonal(dim1=-2, dim2=-1)[..., None]
    for _ in range(power_steps):
        v = torch.nn.functional.normalize(gram @ v, dim=-2)
    top = (v.mT @ (gram @ v))[..., 0, 0]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    floor = (tol * tol * top)[..., None, None] * eye
    _, failed = torch.linalg.cholesky_ex(gram - floor)
    full_rank = (failed == 0) & (top > 0)
    factor = torch.linalg.cholesky(torch.where(full_rank[..., None, None], gram, eye))
    inverse_norm = torch.cholesky_inverse(factor).abs().sum(-1).amax(-1)
    upper = torch.where(full_rank, gram.abs().sum(-1).amax(-1).sqrt(), 1.0)
    return Bounds(upper, torch.where(full_rank, inverse_norm.rsqrt(), 1.0), full_rank)


def _start(x: Tensor, found: Bounds) -> tuple[Tensor, Tensor]:
    """x scaled to singular values in [low, 1], in the precision that its condition asks for."""
    wide = x.dtype == torch.float64 or bool((found.condition > FLOAT32_CONDITION).any())
    dtype = torch.float64 if wide else torch.float32
    return (x.to(dtype) / found.upper[..., None, None].to(dtype)), found.lower / found.upper


def newton_schulz(x: Tensor, found: Bounds) -> Tensor:
    """P <- rho P (3 - rho^2 P^T P) / 2 with the rho that lifts the smallest singular value most (Chen and Chow,
    stable scaling of Newton-Schulz, 2014): a step multiplies small values by up to 2.6 instead of 1.5, then it is
    quadratic. x [..., m, n] of full rank; 4 m n^2 multiply-adds a step."""
    p, low = _start(x, found)
    done = 1.0 - 8 * torch.finfo(p.dtype).eps
    for _ in range(MOST_ITERATIONS):
        if bool((low >= done).all()):
            break
        rho = (3.0 / (1.0 + low + low * low)).sqrt()
        r = rho[..., None, None].to(p.dtype)
        p = 1.5 * r * p - 0.5 * r**3 * (p @ (p.mT @ p))
        low = torch.clamp(0.5 * rho * low * (3.0 - (rho * low) ** 2), max=1.0)
    return p.to(x.dtype)


def halley_weights(low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamical weights a, b, c of the Halley step P (a + b P^T P) (1 + c P^T P)^(-1) for singular values in [low, 1]
    (Nakatsukasa, Bai and Gygi, SIAM J. Matrix Anal. Appl. 31(5), 2010, 2700-2720)."""
    square = low * low
    d = (4.0 * (1.0 - square) / (square * square)).clamp(min=0).pow(1.0 / 3.0)
    root = (1.0 + d).sqrt()
    a = root + 0.5 * (8.0 - 4.0 * d + 8.0 * (2.0 - square) / (square * root)).clamp(min=0).sqrt()
    b = (a - 1.0).square() / 4.0
    return a, b, a + b - 1.0


def qdwh(x: Tensor, found: Bounds) -> Tensor:
    """QR-based dynamically weighted Halley iteration: 4 to 6 steps for any condition. Steps whose weight c exceeds 100
    factor [sqrt(c) P; 1] by QR, the others 1 + c P^T P by Cholesky. x [..., m, n] of full rank."""
    p, low = _start(x, found)
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    done = 1.0 - 8 * torch.finfo(p.dtype).eps
    for _ in range(MOST_ITERATIONS):
        if bool((low >= done).all()):
            break
        weights = halley_weights(low)
        a, b, c = (w[..., None, None].to(p.dtype) for w in weights)
        if bool((weights[2] > 100.0).any()):
            q, _ = torch.linalg.qr(torch.cat([c.sqrt() * p, eye.expand(*p.shape[:-2], -1, -1)], dim=-2))
            top, bottom = q[..., : p.shape[-2], :], q[..., p.shape[-2] :, :]
            p = (b / c) * p + ((a - b / c) / c.sqrt()) * (top @ bottom.mT)
        else:
            factor = torch.linalg.cholesky(eye + c * (p.mT @ p))
            p = (b / c) * p + (a - b / c) * torch.cholesky_solve(p.mT, factor).mT
        square = low * low
        low = torch.clamp(low * (weights[0] + weights[1] * square) / (1.0 + weights[2] * square), max=1.0)
    return p.to(x.dtype)
