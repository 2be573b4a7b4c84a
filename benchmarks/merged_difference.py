"""How far a merge of truncated SVDs is from the same in float64: leading triplets of the tasks side by side, U and V
replaced by their polar factors, U diag(S) V^T (TSV-M, arXiv 2412.00081). Orthogonalising gives every kept direction the
same weight, so that a wrong direction shows here where the residual hides it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pymerge.linalg import polar, truncated_svd

Triplets = tuple[Tensor, Tensor, Tensor]


def merged(found: Sequence[Triplets], orthogonal: Callable[[Tensor], Tensor]) -> Tensor:
    u, s, v = (torch.cat(parts, dim=-1) for parts in zip(*((u, s, vh.mT) for u, s, vh in found), strict=True))
    return (orthogonal(u) * s) @ orthogonal(v).mT


def svd_polar(x: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def differences(updates: Sequence[Tensor], k: int) -> dict[str, float]:
    """Relative Frobenius differences to the float64 merge, by way of decomposition."""

    def full(a: Tensor) -> Triplets:
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        return u[:, :k], s[:k], vh[:k]

    truth = merged([full(a.double()) for a in updates], svd_polar)
    width = k + max(16, k // 8)
    ways: dict[str, Callable[[Tensor], Triplets]] = {
        "exact": lambda a: truncated_svd(a, k)[:3],
        "iteration": lambda a: truncated_svd(a, k, route="iteration")[:3],
        "fast": lambda a: truncated_svd(a, k, mode="fast")[:3],
        "svd_lowrank": lambda a: (lambda u, s, v: (u[:, :k], s[:k], v[:, :k].mT))(*torch.svd_lowrank(a, q=width)),
    }
    found = {name: merged([way(a) for a in updates], lambda x: polar(x).factor) for name, way in ways.items()}
    return {name: float((x.double() - truth).norm() / truth.norm()) for name, x in found.items()}
