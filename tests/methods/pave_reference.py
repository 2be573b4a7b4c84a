"""PAVE as its specification states it, in float64: greedy search, explicit inverse of C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def covariance(x: Tensor, eps: float, divisor: int | None = None) -> Tensor:
    x = x.double()
    return x.mT @ x / (divisor or len(x)) + eps * torch.eye(x.shape[1], dtype=torch.float64)


def truncated(w: Tensor, c: Tensor, rank: int) -> Tensor:
    """SVD_r(W C) C^-1"""
    u, s, vh = torch.linalg.svd(w.double() @ c, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(c)


def normalised(w: Tensor, c: Tensor) -> Tensor:
    s = torch.linalg.svdvals(w.double() @ c)
    return s / s[0]


def greedy(z: Sequence[Tensor], ratio: float) -> list[int]:
    """One direction at a time from the model whose last one is smallest."""
    tasks, k = len(z), len(z[0])
    floor = k - round(1.5 * (k - round(ratio * k)))
    ranks = [k] * tasks
    while sum(ranks) / (tasks * k) >= ratio:
        free = [t for t in range(tasks) if ranks[t] > max(floor, 0) and not bool(z[t].isnan().any())]
        if not free:
            break
        ranks[min(free, key=lambda t: float(z[t][ranks[t] - 1]))] -= 1
    return ranks
