from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.errors import RecipeError
from pymerge.methods.karcher import Karcher
from tests.methods.conftest import Merge


def truth(x: list[Tensor], max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The iteration on the vectors themselves, float64; all norms above tol, no two directions opposite."""
    flat = [one.double().flatten() for one in x]
    units = [one / one.norm() for one in flat]
    share = 1 / len(x)
    u = torch.stack(units).mean(0)
    u = u / u.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(u)
        for v in units:
            c = (v @ u).clamp(-1, 1)
            theta = torch.arccos(c)
            if theta >= tol:
                step += share * theta / torch.sin(theta) * (v - c * u)
        size = step.norm()
        if size < tol:
            break
        u = torch.cos(size) * u + torch.sin(size) * step / size
    return (u * share * sum(one.norm() for one in flat)).view_as(x[0])


def cloud(tasks: int, spread: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(tasks)
    common = torch.randn(13, 29, generator=g)
    return [(t + 1) * (common + spread * torch.randn(13, 29, generator=g)) for t in range(tasks)]


@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("spread", [3.0, 0.3, 1e-3, 1e-6])
@pytest.mark.parametrize(("max_iter", "tol"), [(10, 1e-5), (0, 1e-5), (2, 1e-9)])
def test_iteration_on_the_vectors(tasks: int, spread: float, max_iter: int, tol: float, merge: Merge) -> None:
    tuned = cloud(tasks, spread)
    merged = merge(Karcher(max_iter=max_iter, tol=tol), None, tuned).double()
    torch.testing.assert_close(merged, truth(tuned, max_iter, tol), rtol=0, atol=5e-6)


def test_the_mean_has_the_least_squared_angle(merge: Merge) -> None:
    tuned = cloud(5, 2.0)
    mean = merge(Karcher(max_iter=100, tol=1e-10), None, tuned).double()

    def cost(m: Tensor) -> float:
        cosines = [(m * t.double()).sum() / m.norm() / t.double().norm() for t in tuned]
        return sum(math.acos(min(1.0, float(c))) ** 2 for c in cosines)

    towards = [t.double() / t.double().norm() * mean.norm() for t in tuned]
    assert all(cost(mean) < cost(mean + step * t) for t in towards for step in (-0.01, 0.01, 0.1))


def test_two_models_meet_half_way(merge: Merge) -> None:
    a, b = cloud(2)
    merged = merge(Karcher(), None, [a, b]).double()
    middle = a.double() / a.double().norm() + b.double() / b.double().norm()
    expected = middle / middle.norm() * (a.double().norm() + b.double().norm()) / 2
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_bfloat16_inputs_are_widened(merge: Merge) -> None:
    tuned = [t.bfloat16() for t in cloud(3)]
    torch.testing.assert_close(merge(Karcher(), None, tuned).double(), truth(tuned), rtol=0, atol=5e-6)


@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, 2.0, 6.0)])
def test_parallel_models(factors: tuple[float, ...], merge: Merge) -> None:
    (one,) = cloud(1)
    merged = merge(Karcher(), None, [f * one for f in factors])
    torch.testing.assert_close(merged, sum(factors) / len(factors) * one, rtol=0, atol=5e-6)


def test_opposite_models_give_the_direction_of_the_first(merge: Merge) -> None:
    (one,) = cloud(1)
    torch.testing.assert_close(merge(Karcher(), None, [one, -3 * one]), 2 * one, rtol=0, atol=2e-6)
    torch.testing.assert_close(merge(Karcher(), None, [-3 * one, one]), -2 * one, rtol=0, atol=2e-6)


def test_a_model_opposite_to_the_mean_of_the_others_is_finite(merge: Merge) -> None:
    (one,) = cloud(1)
    merged = merge(Karcher(), None, [one, one, -one])
    torch.testing.assert_close(merged, one, rtol=0, atol=2e-6)


def test_zero_models_count_in_the_size_alone(merge: Merge) -> None:
    a, b = cloud(2)
    zero = torch.zeros_like(a)
    merged = merge(Karcher(), None, [zero, a, b, zero])
    torch.testing.assert_close(merged, 0.5 * merge(Karcher(), None, [a, b]), rtol=0, atol=2e-6)
    assert torch.equal(merge(Karcher(), None, [zero, zero]), zero)


def test_one_model_is_returned(merge: Merge) -> None:
    (one,) = cloud(1)
    assert torch.equal(merge(Karcher(), None, [one]), one)
    assert torch.equal(merge(Karcher(), None, [1e-9 * one]), 1e-9 * one)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 1)], ids=str)
def test_odd_shapes(shape: tuple[int, ...], merge: Merge) -> None:
    merged = merge(Karcher(), None, [torch.full(shape, 2.0), torch.full(shape, 4.0)])
    torch.testing.assert_close(merged, torch.full(shape, 3.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", [{"max_iter": -1}, {"max_iter": 1.5}, {"tol": 0}])
def test_ranges(given: Any) -> None:
    with pytest.raises(RecipeError, match="karcher: (max_iter|tol): must be"):
        Karcher(**given)
