"""Matrices with a known singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(n: int, k: int, seed: int) -> Tensor:
    """float64 [n, k] with orthonormal columns."""
    x = torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(x)[0]


def with_values(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """float64 [m, n] with these singular values (at most min(m, n); the rest are 0)."""
    k = values.numel()
    return (orthonormal(m, k, 2 * seed) * values) @ orthonormal(n, k, 2 * seed + 1).T


def geometric(n: int, condition: float) -> Tensor:
    """n values from 1 down to 1 / condition."""
    return torch.logspace(0, -torch.log10(torch.tensor(condition, dtype=torch.float64)).item(), n, dtype=torch.float64)


def concatenated_bases(n: int, tasks: int, seed: int = 0) -> Tensor:
    """float32 [n, n]: `tasks` orthonormal bases of correlated subspaces side by side, as TSV and ESM stack them."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(n, n // tasks, generator=generator, dtype=torch.float64)
    parts = [
        torch.linalg.qr(common + torch.randn(n, n // tasks, generator=generator, dtype=torch.float64))[0]
        for _ in range(tasks)
    ]
    return torch.cat(parts, dim=1).float()


def true_polar(x: Tensor, tol: float = 0.0) -> Tensor:
    """From a float64 SVD: sum of u_i v_i^T over s_i > tol s_1."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return (u * (s > tol * s.max())) @ vh


def distance(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())
