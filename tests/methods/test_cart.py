from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.methods.spectral import SHAPES, base_weights, off, rotations, run, updates


def reference(deltas: Sequence[Tensor], rho: float = 0.12, c: float = 2.0) -> Tensor:
    average = torch.stack(list(deltas)).mean(0)
    total = average.clone()
    for d in deltas:
        u, s, vh = torch.linalg.svd(d - average, full_matrices=False)
        q = max(1, int(rho * len(s)))
        total += c * (u[:, :q] * s[:q]) @ vh[:q]
    return total


@pytest.mark.parametrize(("rho", "c"), [(0.12, 2.0), (0.32, 1.9), (1e-3, 1.0), (0.5, -0.5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, int], rho: float, c: float) -> None:
    deltas = updates(*shape, 4)
    merged, notes = run("cart", deltas, base_weights(*shape), torch.float32, rho=rho, c=c, scale=0.5)
    assert off(merged, 0.5 * reference(deltas, rho, c)) <= 2e-5
    rest = deltas[1] - torch.stack(deltas).mean(0)
    q = max(1, int(rho * min(shape)))
    share = float((torch.linalg.svdvals(rest)[:q].square().sum()) / rest.square().sum())
    assert notes.facts["rank"] == q and notes.facts["captured"][1] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_weights(shape: tuple[int, int]) -> None:
    base = base_weights(*shape, size=2.0)
    stored = [(base + d).bfloat16().double() - base for d in updates(*shape, 3)]
    assert off(run("cart", stored, base, torch.bfloat16)[0], reference(stored)) <= 2e-5


@pytest.mark.parametrize("settings", [{"rho": 1.0, "c": 2.0}, {"c": 0.0}])
def test_the_average(settings: dict[str, float]) -> None:
    """rho = 1: what differs from the average sums to zero."""
    deltas = updates(40, 72, 4)
    assert off(run("cart", deltas, **settings)[0], torch.stack(deltas).mean(0)) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_invariants(shape: tuple[int, int]) -> None:
    deltas = updates(*shape, 4)
    merged = run("cart", deltas)[0]
    left, right = rotations(*shape)
    assert off(run("cart", deltas[::-1])[0], merged) <= 1e-5
    assert off(run("cart", [left @ d @ right for d in deltas])[0], left @ merged @ right) <= 2e-5
    assert off(run("cart", [d.mT for d in deltas])[0].mT, merged) <= 2e-5
    for size in (2.0**-60, 2.0**40):
        assert off(run("cart", [size * d for d in deltas])[0], size * merged) <= 1e-5


@pytest.mark.parametrize("tasks", [1, 4])
def test_identical_tasks_are_one(tasks: int) -> None:
    deltas = updates(48, 48, 1) * tasks
    assert off(run("cart", deltas, base_weights(48, 48), torch.float32)[0], deltas[0]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_rank_and_zero_updates(dtype: torch.dtype) -> None:
    deltas = [*updates(64, 64, 3, rank=4), torch.zeros(64, 64, dtype=torch.float64)]
    assert off(run("cart", deltas, base_weights(64, 64), dtype)[0], reference(deltas)) <= 2e-5
    zeros = run("cart", deltas[3:] * 2)[0]
    assert not zeros.any()


@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (0, 20), (20, 0)], ids=str)
def test_narrow_matrices(shape: tuple[int, int]) -> None:
    deltas = updates(*shape, 2) if min(shape) else [torch.zeros(shape, dtype=torch.float64)] * 2
    truth = reference(deltas) if min(shape) else deltas[0]
    merged, notes = run("cart", deltas)
    assert off(merged, truth) <= 1e-5 and notes.facts["rank"] == min(shape)
