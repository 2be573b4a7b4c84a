"""ACE against a plain float64 reading of the released algorithm, its invariants, and what it makes of hard inputs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pymerge.errors import NonFinite, RecipeError
from pymerge.methods.ace import Ace
from pymerge.methods.base import TaskGroup, TensorInfo
from tests.golden.cases import FOLDER

SHAPES = [(40, 40), (72, 24), (24, 72), (20, 90), (24, 100), (3, 50), (50, 3), (2, 2)]
Made = tuple[Tensor, dict[str, Any]]


def ace(tuned: list[Tensor], base: Tensor | None = None, **options: Any) -> Made:
    """The update, float64, and the facts."""
    info = TensorInfo(name="w", shape=tuple(tuned[0].shape), tasks=len(tuned))
    group = TaskGroup(info=info, base=base, tuned=tuple(tuned))
    update = Ace(**options).combine(group)
    assert update.dtype == torch.float32 and bool(torch.isfinite(update).all())
    json.dumps(group.notes.facts, allow_nan=False)
    return update.double(), group.notes.facts


def reference(
    deltas: list[Tensor],
    eps: float = 1e-5,
    tau: float = 0.3,
    k_frac: float = 0.3,
    prior: bool = True,
    center: bool = True,
    unequal: bool | None = None,
    refined: bool = True,
) -> Tensor:
    """Section 3 of the specification step by step, in float64: explicit Grams, inverse and SVD."""
    d = torch.stack(deltas).double()  # [T, m, n]
    tasks, m, n = d.shape
    energy = d.square().sum((1, 2))
    logs = (energy + 1e-12).log()
    gamma = logs.var() / (logs.mean() ** 2 + 1e-12) if tasks > 1 else torch.tensor(0.0)
    unequal = bool(gamma > tau) if unequal is None else unequal
    c = d - d.mean(1, keepdim=True)
    gram = c.mT @ c
    trace = gram.diagonal(dim1=1, dim2=2).sum(1) + 1e-12
    divisor = trace if unequal else torch.ones_like(trace)
    s, ridge = gram / divisor[:, None, None], eps / divisor
    eye = torch.eye(n, dtype=torch.float64)
    total = s.sum(0) + ridge.sum() * eye
    averaged = c if center else d
    b = (averaged @ s).sum(0) + (averaged * ridge[:, None, None]).sum(0)
    row = s.sum(0).mean(0) / (energy.mean() + 1e-12 if unequal else 1.0)
    x = b @ torch.linalg.inv(total + row if prior else total)
    if not unequal or not refined:
        return x
    f = (d @ (s - total / tasks)).sum(0) + x
    u, values, vh = torch.linalg.svd(f, full_matrices=False)
    k = max(1, int(k_frac * min(m, n)))
    return x + values[:k].mean() * u[:, :k] @ vh[:k]


def error(mine: Tensor, expected: Tensor) -> float:
    return float((mine - expected).norm() / expected.norm())


def updates(m: int, n: int, sizes: tuple[float, ...], noise: float = 0.3, seed: int = 0) -> list[Tensor]:
    """Power-law spectra, a direction that the tasks share, dense noise; float32 of Frobenius norms `sizes`."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    r, shared = min(m, n), randn(m, 1) @ randn(1, n)
    found = []
    for size in sizes:
        u, v = torch.linalg.qr(randn(m, r)).Q, torch.linalg.qr(randn(n, r)).Q
        d = (u / (1 + torch.arange(r).double())) @ v.mT
        parts = (d, 0.3 * shared, noise * randn(m, n))
        d = parts[0] / parts[0].norm() + 0.3 * parts[1] / parts[1].norm() + noise * parts[2] / parts[2].norm()
        found.append((size * d / d.norm()).float())
    return found


EQUAL, UNEQUAL = (0.5, 0.6, 0.45, 0.55), (0.2, 1.3, 0.5, 0.9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [1e-2, 1e-5])
def test_equal_energies_against_the_reference(shape: tuple[int, int], eps: float) -> None:
    deltas = updates(*shape, EQUAL)
    mine, facts = ace(deltas, eps=eps)
    assert facts["branch"] == "homogeneous" and "sigma" not in facts
    assert facts["route"] == ("push_through" if 4 * shape[0] <= shape[1] else "dense")
    assert error(mine, reference(deltas, eps)) <= 5e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_unequal_energies_against_the_reference(shape: tuple[int, int], eps: float) -> None:
    deltas = updates(*shape, UNEQUAL)
    mine, facts = ace(deltas, eps=eps, gate="heterogeneous")
    assert facts["refinement"] == "added" and facts["k"] == max(1, int(0.3 * min(shape)))
    assert error(mine, reference(deltas, eps, unequal=True)) <= 1e-4


if __name__ == "__main__":
    for shape in SHAPES:
        for eps in (1e-2, 1e-3, 1e-5, 1e-7):
            for sizes, gate in ((EQUAL, "homogeneous"), (UNEQUAL, "heterogeneous")):
                d = updates(*shape, sizes)
                mine, facts = ace(d, eps=eps, gate=gate, refine="always")
                ref = reference(d, eps, unequal=gate == "heterogeneous")
                print(shape, eps, gate[:5], facts["route"], facts["precision"], f"cond {facts['condition']:.1e} ebar {facts['ebar']:.1e}", f"{error(mine, ref):.1e}")
