"""Merging problems for the spectral methods, and float64 pieces of their references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pymerge import methods
from pymerge.methods.base import MatrixCombine, Notes, TaskGroup, TensorInfo
from tests.golden.cases import FOLDER, Golden, delta_error, read_golden

SHAPES = [(48, 48), (40, 72), (72, 40)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def updates(m: int, n: int, tasks: int, seed: int = 0, rank: int | None = None) -> list[Tensor]:
    """float64 task vectors of norm 1, spectrum i^-0.6, of full rank or of `rank`; 0.3 of the directions is common."""
    g = generator(seed)
    r = min(m, n) if rank is None else rank
    common = [torch.randn(x, r, generator=g, dtype=torch.float64) for x in (m, n)]
    found = []
    for _ in range(tasks):
        sides = [torch.randn(len(c), r, generator=g, dtype=torch.float64) + 0.3 * c for c in common]
        u, v = (torch.linalg.qr(x).Q for x in sides)
        d = (u * torch.arange(1, r + 1, dtype=torch.float64) ** -0.6) @ v.mT
        found.append(d / d.norm())
    return found


def base_weights(m: int, n: int, size: float = 20.0, seed: int = 99) -> Tensor:
    """float64 weights that are float32 and bfloat16 numbers, `size` times the norm of the updates."""
    w = torch.randn(m, n, generator=generator(seed))
    return (w * (size / w.norm())).bfloat16().double()


def run(
    name: str, tuned: Sequence[Tensor], base: Tensor | None = None, dtype: torch.dtype | None = None, **settings: Any
) -> tuple[Tensor, Notes]:
    """The merged update in float64 and the notes. `tuned` are updates, stored in dtype with the base added."""
    method = methods.get(name)(**settings)
    assert isinstance(method, MatrixCombine)
    stored = [d if base is None else base + d for d in tuned]
    info = TensorInfo(name="w", shape=tuple(tuned[0].shape), tasks=len(tuned))
    group = TaskGroup(
        info=info,
        base=base.to(dtype or base.dtype) if base is not None else None,
        tuned=tuple(x.to(dtype or x.dtype) for x in stored),
    )
    merged = method.combine(group)
    assert merged.dtype == torch.float32 and merged.shape == tuned[0].shape and bool(torch.isfinite(merged).all())
    return merged.double(), group.notes


def off(mine: Tensor, truth: Tensor) -> float:
    """Relative Frobenius distance; absolute where the truth is zero."""
    return float((mine - truth).norm() / (truth.norm() or 1.0))


def isometry(a: Tensor, tol: float = 1e-9) -> Tensor:
    """The polar factor over singular values above tol times the largest."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    keep = s > tol * s[:1]
    return u[:, keep] @ vh[keep]


def leading(a: Tensor, count: int, tol: float = 1e-9) -> tuple[Tensor, Tensor, Tensor]:
    """Top triplets U [m, q], s [q], V [n, q] above tol times the largest."""
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    keep = (s > tol * s[:1])[:count]
    return u[:, :count][:, keep], s[:count][keep], vh[:count][keep].mT


def rotations(m: int, n: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.linalg.qr(torch.randn(x, x, generator=generator(x), dtype=torch.float64)).Q for x in (m, n))


def golden_files(folder: str) -> list[Any]:
    return sorted((FOLDER / folder).glob("*.safetensors"))


def golden_errors(path: Any, name: str, excluded: Sequence[str] = (), **settings: Any) -> dict[str, float]:
    """Relative error of the merged delta of each matrix; names with a word of `excluded` are not the method's."""
    golden: Golden = read_golden(path)
    errors = {}
    for key, base in golden.base.items():
        if base.dim() == 2 and not any(word in key for word in excluded):
            deltas = [task[key].double() - base.double() for task in golden.tasks]
            merged = run(name, deltas, base.double(), torch.float32, **settings)[0]
            errors[key] = delta_error(base.double() + merged, golden, key)
    assert errors
    return errors
