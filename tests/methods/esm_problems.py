"""Merging problems for ESM, and section 3 of its specification in plain float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymerge.methods.base import Notes, TaskGroup, TensorInfo
from pymerge.methods.esm import Esm
from pymerge.statistics.moments import Moments, pack
from tests.methods.spectral import generator, isometry, updates

VIT: dict[str, Any] = {"gain": 2.0, "task_power": 2.0, "dim_power": 2.0}
ROBERTA: dict[str, Any] = {"gain": 1.0, "task_power": 0.0, "dim_power": 0.0}


def of_rows(x: Tensor) -> Moments:
    """The rows themselves."""
    return Moments(rows=x.shape[0], mean=x.double().mean(0).float(), samples=x.float())


def of_covariance(x: Tensor, dtype: torch.dtype = torch.float32) -> Moments:
    """The second moment, whatever the number of rows."""
    wide = x.to(dtype)
    return Moments(rows=x.shape[0], mean=x.double().mean(0).float(), triangle=pack(wide.mT @ wide))


def inputs(rows: int, n: int, tasks: int, seed: int = 0) -> list[Tensor]:
    """float64 samples [rows, n], not centred, with a spectrum; float32 numbers."""
    g = generator(1000 + seed)
    found = []
    for _ in range(tasks):
        mix = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
        x = torch.randn(rows, n, generator=g, dtype=torch.float64) * torch.arange(1, n + 1) ** -0.5 @ mix
        found.append((x + 0.2 * torch.randn(n, generator=g, dtype=torch.float64)).float().double())
    return found


@dataclass(frozen=True)
class Problem:
    """Task vectors and samples, float64."""

    deltas: list[Tensor]
    samples: list[Tensor]


def problem(m: int, n: int, tasks: int, rows: int | None = None, seed: int = 0, rank: int | None = None) -> Problem:
    """Task vectors of different sizes."""
    deltas = [(0.6 + 0.2 * t) * d for t, d in enumerate(updates(m, n, tasks, seed, rank))]
    return Problem(deltas, inputs(rows or 2 * max(m, n), n, tasks, seed))


def reference(
    deltas: Sequence[Tensor],
    samples: Sequence[Tensor],
    *,
    gain: float,
    task_power: float,
    dim_power: float,
    eig_power: float = 0.15,
    task_norm: str = "delta",
    rank: int | None = None,
    tol: float = 1e-11,
) -> Tensor:
    """Sections 3.1, 3.2 and 7.2 (a), (b): all directions, by the SVD of X D^T."""
    m, n = deltas[0].shape
    tasks = len(deltas)
    k = max(1, rank or m // tasks)
    lefts, rights, norms = [], [], []
    for d, x in zip(deltas, samples, strict=True):
        _, s, vh = torch.linalg.svd(x @ d.mT, full_matrices=False)
        lam, e = s**2, vh.mT
        full = torch.cat([e, torch.eye(m, dtype=torch.float64)[:, e.shape[1] :]], dim=1)
        coordinates = full.mT @ d
        norms.append({"delta": d, "released": coordinates, "truncated": coordinates[:k]}[task_norm].norm())
        lam = torch.cat([lam, lam.new_zeros(m)])[:k]
        keep = lam > tol * lam[0]
        w = torch.where(keep, (lam / lam.mean()) ** eig_power, 0.0) if keep.any() else torch.zeros_like(lam)
        w = w / w.mean() if keep.any() else w
        lefts.append(full[:, :k] * w)
        rights.append(w[:, None] * coordinates[:k])
    mean = sum(norms) / tasks
    u = torch.cat(lefts, dim=1)
    v = torch.cat([r * ((x / mean) ** task_power if x else 0.0) for r, x in zip(rights, norms, strict=True)])
    columns = v.norm(dim=0)
    v = v * (columns / columns.mean()) ** dim_power if columns.any() else v
    sizes = [(isometry(a, 1e-5) * a).sum() / min(a.shape) for a in (u, v)]
    return gain * sizes[0] * sizes[1] * (isometry(u, 1e-5) @ isometry(v, 1e-5))


def run(
    p: Problem,
    how: Any = of_rows,
    base: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "w",
    **settings: Any,
) -> tuple[Tensor, Notes]:
    """The merged update in float64 and the notes. how: of_rows, of_covariance, None (no statistics)."""
    stored = [d if base is None else base + d for d in p.deltas]
    group = TaskGroup(
        info=TensorInfo(name=name, shape=tuple(stored[0].shape), tasks=len(stored)),
        base=base.to(dtype) if base is not None else None,
        tuned=tuple(x.to(dtype) for x in stored),
        inputs=None if how is None else tuple(how(x) for x in p.samples),
    )
    merged = Esm(**{"preset": "vit", **settings}).combine(group)
    assert merged.dtype == torch.float32 and merged.shape == stored[0].shape and bool(torch.isfinite(merged).all())
    return merged.double(), group.notes
