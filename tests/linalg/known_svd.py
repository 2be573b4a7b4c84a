"""Matrices with known singular vectors, and angles between subspaces."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(m: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator)).Q


def matrix(m: int, n: int, s: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """a float64 [m, n] of singular values s [r], with its U [m, r] and V [n, r]."""
    generator = torch.Generator().manual_seed(seed)
    u, v = orthonormal(m, len(s), generator), orthonormal(n, len(s), generator)
    return u * s @ v.mT, u, v


def spectrum(name: str, r: int) -> Tensor:
    i = torch.arange(r, dtype=torch.float64)
    return {
        "heavy": (1 + i) ** -0.6,
        "fast": 10 ** (-5 * i / max(r - 1, 1)),
        "clustered": 2.0 ** -(i // 8) * (1 + 1e-3 * (1 - i % 8 / 8)),
        "equal": torch.ones(r, dtype=torch.float64),
        "gap": torch.where(i < r // 4, 2.0, 0.01) * (1 - i / (2 * r)),
    }[name]


def sine(basis: Tensor, truth: Tensor) -> float:
    """Of the largest angle from `basis` (orthonormal [m, j]) to the space of `truth`."""
    x = basis.double()
    if x.shape[1] == 0:
        return 0.0
    return float(torch.linalg.matrix_norm(x - truth @ (truth.mT @ x), ord=2))
