from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.errors import RecipeError
from pymerge.methods.multislerp import MultiSlerp
from tests.methods.conftest import Merge


def truth(weights: list[float], x: list[Tensor], eps: float = 1e-8) -> Tensor:
    """The published steps in float64: weighted mean direction, tangents there, their mean, back to the sphere."""
    flat = [one.double().flatten() for one in x]
    units = [one / (one.norm() + eps) for one in flat]
    mu = sum(w * u for w, u in zip(weights, units, strict=True))
    assert isinstance(mu, Tensor)
    mu = mu / mu.norm()
    g = sum(w * (u - (u @ mu) * mu) for w, u in zip(weights, units, strict=True))
    assert isinstance(g, Tensor)
    a = g.norm() + eps
    size = sum(w * one.norm() for w, one in zip(weights, flat, strict=True))
    return ((mu * torch.cos(a) + g * torch.sin(a) / a) * size).view_as(x[0])


def cloud(tasks: int, spread: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(tasks)
    base, common = (torch.randn(13, 29, generator=g) for _ in range(2))
    return base, [base + 0.1 * (t + 1) * (common + spread * torch.randn(13, 29, generator=g)) for t in range(tasks)]


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_steps_of_the_reference(tasks: int, normalize: bool, with_base: bool, eps: float, merge: Merge) -> None:
    base, tuned = cloud(tasks)
    weights = [0.5, 0.2, 0.4, 0.3, 0.9][:tasks]
    method = MultiSlerp(weight=tuple(weights), normalize_weights=normalize, eps=eps)
    merged = merge(method, base if with_base else None, tuned).double()
    weights = [w / sum(weights) for w in weights] if normalize else weights
    origin = base.double() if with_base else torch.zeros_like(base).double()
    expected = origin + truth(weights, [t - origin for t in tuned], eps)
    torch.testing.assert_close(merged, expected, rtol=0, atol=2e-6)


def test_bfloat16_inputs_are_widened(merge: Merge) -> None:
    base, tuned = cloud(3)
    base, tuned = base.bfloat16(), [t.bfloat16() for t in tuned]
    expected = truth([1 / 3] * 3, [t.double() - base.double() for t in tuned])
    torch.testing.assert_close(merge(MultiSlerp(), base, tuned).double(), base + expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_identical_tasks_return_one_of_them(tasks: int, merge: Merge) -> None:
    base, tuned = cloud(1)
    torch.testing.assert_close(merge(MultiSlerp(), base, tuned * tasks), tuned[0], rtol=0, atol=1e-6)


def test_nearly_identical_tasks(merge: Merge) -> None:
    base, tuned = cloud(3, spread=1e-5)
    expected = truth([1 / 3] * 3, [t.double() - base.double() for t in tuned])
    torch.testing.assert_close(merge(MultiSlerp(), base, tuned).double(), base + expected, rtol=0, atol=1e-6)


def test_parallel_tasks_of_other_length(merge: Merge) -> None:
    base, (one,) = cloud(1)
    merged = merge(MultiSlerp(weight=(1.0, 3.0)), base, [one, base + 5 * (one - base)])
    torch.testing.assert_close(merged, base + 4 * (one - base), rtol=0, atol=5e-6)


@pytest.mark.parametrize("others", [0, 1, 3])
def test_opposite_tasks_are_averaged(others: int, merge: Merge) -> None:
    """Two opposite directions, and tasks that do not move at all: no direction is left, the linear merge is taken."""
    base, (one,) = cloud(1)
    tuned = [one, base - 3 * (one - base), *[base] * others]
    merged = merge(MultiSlerp(), base, tuned)
    torch.testing.assert_close(merged, base - 2 / (2 + others) * (one - base), rtol=0, atol=2e-6)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_no_task_moves(tasks: int, merge: Merge) -> None:
    base, _ = cloud(1)
    assert torch.equal(merge(MultiSlerp(), base, [base] * tasks), base)


def test_a_task_that_does_not_move_counts_in_the_size_alone(merge: Merge) -> None:
    base, (one,) = cloud(1)
    torch.testing.assert_close(merge(MultiSlerp(), base, [one, base]), base + 0.5 * (one - base), rtol=0, atol=1e-6)


def test_one_model_is_returned_whatever_its_weight(merge: Merge) -> None:
    base, (one,) = cloud(1)
    method = MultiSlerp(weight=0.2, normalize_weights=False)
    assert torch.equal(merge(method, None, [one]), one)
    torch.testing.assert_close(merge(method, base, [one]), one, rtol=0, atol=3e-7)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 1)], ids=str)
def test_odd_shapes(shape: tuple[int, ...], merge: Merge) -> None:
    merged = merge(MultiSlerp(), torch.ones(shape), [torch.full(shape, 2.0), torch.full(shape, 0.0)])
    torch.testing.assert_close(merged, torch.ones(shape), rtol=0, atol=1e-6)


def test_weights_that_cannot_be_normalised() -> None:
    with pytest.raises(RecipeError, match="weights sum to 0, which cannot be normalised: .* normalize_weights: false"):
        MultiSlerp(weight=(1.0, -1.0))
    with pytest.raises(RecipeError, match="eps: must be > 0"):
        MultiSlerp(eps=0)


def test_order_of_tasks_does_not_matter(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    weights = (0.5, 1.0, 0.25)
    there, back = (merge(MultiSlerp(weight=w), base, t) for w, t in ((weights, tuned), (weights[::-1], tuned[::-1])))
    torch.testing.assert_close(there, back, rtol=0, atol=1e-6)
