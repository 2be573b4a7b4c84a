"""Singular value calibration written out from its definition, and what its tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.base import Notes, TaskGroup, TensorInfo
from pymerge.methods.svc import SVC

SHAPES = [(24, 24), (20, 56), (56, 20)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def truth(
    update: Tensor,
    deltas: Sequence[Tensor],
    alpha: float,
    *,
    right: bool = False,
    rule: str = "clip_then_mean",
    target: int | None = None,
    given: tuple[Tensor, Tensor] | None = None,
    floor: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """The calibrated update and eta in float64, direction by direction. A response counts as none up to `floor` times
    the task's norm."""
    d = update.double()
    if given is None:
        u, _, vh = torch.linalg.svd(d, full_matrices=False)
    else:
        u, vh = given[0].double(), given[1].double().mT
    result, etas = torch.zeros_like(d), []
    for i in range(u.shape[1]):
        merged = vh[i] @ d.mT if right else u[:, i] @ d
        s = []
        for delta in deltas:
            response = vh[i] @ delta.double().mT if right else u[:, i] @ delta.double()
            heard = float(response.norm()) > floor * float(delta.double().norm())
            s.append(float(merged @ response / response.square().sum()) if heard else 0.0)
        if target is not None:
            eta = max(s[target], alpha) if s[target] > 0 else 1.0
        elif rule == "mean_then_clip":
            eta = max(sum(s) / len(s), alpha) if min(s) > 0 else 1.0
        else:
            eta = sum(max(x, alpha) for x in s) / len(s)
        etas.append(eta)
        result += torch.outer(merged, vh[i]) / eta if right else torch.outer(u[:, i], merged) / eta
    return result, torch.tensor(etas, dtype=torch.float64)


def tasks_of(shape: tuple[int, int], count: int = 3, seed: int = 0, shared: float = 1.0) -> list[Tensor]:
    """Task vectors that share a few directions."""
    g = torch.Generator().manual_seed(seed)
    m, n = shape
    common = torch.randn(m, 4, generator=g) @ torch.randn(4, n, generator=g)
    return [shared * torch.rand((), generator=g) * common + torch.randn(m, n, generator=g) for _ in range(count)]


def group_of(tuned: Sequence[Tensor], base: Tensor | None = None, combine: str = "") -> TaskGroup:
    info = TensorInfo(name="layer.weight", shape=tuple(tuned[0].shape), tasks=len(tuned))
    return TaskGroup(info=info, base=base, tuned=tuple(tuned), notes=Notes(combine=combine))


def calibrated(update: Tensor, tuned: Sequence[Tensor], base: Tensor | None = None, **given: Any) -> Tensor:
    return SVC(**given).calibrate(update.clone(), group_of(tuned, base))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
