from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.errors import RecipeError
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.model_stock import ModelStock
from pymerge.recipe import Recipe
from tests.methods.conftest import Merge


def truth(base: Tensor, tuned: list[Tensor], rows: bool = False) -> Tensor:
    """W = q mean W_t + (1 - q) W_0, float64, on the whole tensor or on each row of the last dimension."""
    shape = base.shape
    flat = [x.double().reshape(-1, shape[-1] if rows and shape else base.numel()) for x in (base, *tuned)]
    deltas = [x - flat[0] for x in flat[1:]]
    pairs = itertools.combinations(deltas, 2)
    c = torch.stack([torch.cosine_similarity(a, b, dim=1, eps=1e-30) for a, b in pairs]).mean(0).unsqueeze(1)
    q = len(tuned) * c / (1 + (len(tuned) - 1) * c)
    return (q * torch.stack(flat[1:]).mean(0) + (1 - q) * flat[0]).view(shape)


def cloud(tasks: int, shape: tuple[int, ...] = (13, 29), size: float = 0.1) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(tasks)
    base, common = (torch.randn(shape, generator=g) for _ in range(2))
    return base, [base + size * (t + 1) * (common + torch.randn(shape, generator=g)) for t in range(tasks)]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("shape", [(13, 29), (40,), (6, 5, 3, 3), (300, 700)], ids=str)  # the last in several parts
@pytest.mark.parametrize("style", ["authors", "mergekit"])
def test_interpolation_ratio(style: Any, shape: tuple[int, ...], tasks: int, rows: bool, merge: Merge) -> None:
    base, tuned = cloud(tasks, shape)
    merged = merge(ModelStock(style=style, filter_wise=rows), base, tuned).double()
    expected = truth(base, tuned, rows)
    # rows of three entries may come near the pole of q, where rounding of float32 task vectors is amplified
    torch.testing.assert_close(merged, expected, rtol=1e-4 if rows else 0, atol=1e-5)


@pytest.mark.parametrize("rows", [False, True])
def test_bfloat16_inputs_are_widened(rows: bool, merge: Merge) -> None:
    base, tuned = cloud(3)
    base, tuned = base.bfloat16(), [t.bfloat16() for t in tuned]
    merged = merge(ModelStock(filter_wise=rows), base, tuned).double()
    torch.testing.assert_close(merged, truth(base, tuned, rows), rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("tasks", [2, 5])
def test_identical_tasks_return_one_of_them(tasks: int, rows: bool, merge: Merge) -> None:
    base, tuned = cloud(1)
    merged = merge(ModelStock(filter_wise=rows), base, tuned * tasks)
    torch.testing.assert_close(merged, tuned[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [False, True])
def test_orthogonal_tasks_return_the_base(rows: bool, merge: Merge) -> None:
    base, step = torch.ones(3, 4), torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    tuned = [base + step, base + step.roll(1), base - step.roll(2)]
    assert torch.equal(merge(ModelStock(filter_wise=rows), base, tuned), base)


@pytest.mark.parametrize("rows", [False, True])
def test_tasks_that_point_apart(rows: bool, merge: Merge) -> None:
    """c = -0.4 with three tasks: q = -6; clamped it is 0."""
    gram = torch.full((3, 3), -0.4, dtype=torch.float64).fill_diagonal_(1.0)
    steps = torch.linalg.cholesky(gram).float()  # rows: three unit vectors with these cosines
    base = torch.zeros(1, 3)
    tuned = [s.view(1, 3) for s in steps]
    merged = merge(ModelStock(filter_wise=rows), base, tuned)
    torch.testing.assert_close(merged, -2 * steps.sum(0, keepdim=True), rtol=0, atol=1e-5)
    assert torch.equal(merge(ModelStock(filter_wise=rows, clamp=True), base, tuned), base)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
def test_the_pole_returns_the_base(clamp: bool, rows: bool, merge: Merge) -> None:
    base, tuned = cloud(1)
    opposite = 2 * base - tuned[0]
    method = ModelStock(filter_wise=rows, clamp=clamp)
    zero = torch.zeros_like(base)
    assert torch.equal(merge(method, zero, [tuned[0], -tuned[0]]), zero)
    assert bool(torch.isfinite(merge(method, base, [tuned[0], opposite])).all())


@pytest.mark.parametrize("rows", [False, True])
def test_tasks_that_do_not_move(rows: bool, merge: Merge) -> None:
    base, tuned = cloud(2)
    method = ModelStock(filter_wise=rows)
    assert torch.equal(merge(method, base, [base, base, base]), base)
    assert torch.equal(merge(method, base, [tuned[0], base]), base)
    torch.testing.assert_close(  # cosines 1, 0, 0: c = 1/3, q = 3/5
        merge(method, base, [tuned[0], tuned[0], base]), base + 0.4 * (tuned[0] - base), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("rows", [False, True])
def test_the_update_is_homogeneous_but_for_mergekits_floor(rows: bool, merge: Merge) -> None:
    _, tuned = cloud(3)
    zero, size = torch.zeros(13, 29), 2.0**-24
    method, mergekit = (ModelStock(style=style, filter_wise=rows) for style in ("authors", "mergekit"))  # type: ignore[arg-type]
    small = [size * t for t in tuned]
    assert torch.equal(merge(method, zero, small), size * merge(method, zero, tuned))
    assert float(merge(mergekit, zero, small).norm()) < 1e-3 * size * float(merge(mergekit, zero, tuned).norm())


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 0), (3, 1)], ids=str)
def test_odd_shapes(shape: tuple[int, ...], rows: bool, merge: Merge) -> None:
    base = torch.ones(shape)
    merged = merge(ModelStock(filter_wise=rows), base, [base + 1, base + 2, base + 6])
    torch.testing.assert_close(merged, base + 3, rtol=0, atol=1e-6)


def test_rows_do_not_depend_on_the_block_they_come_in() -> None:
    base, tuned = cloud(4)
    method = ModelStock(filter_wise=True)
    info = TensorInfo(name="w", shape=(13, 29), tasks=4)
    whole = method.combine(TaskGroup(info=info, base=base, tuned=tuple(tuned)))
    for step in (1, 5):
        parts = [
            method.combine(
                TaskGroup(info=info, base=base[i : i + step], tuned=tuple(t[i : i + step] for t in tuned), first=i * 29)
            )
            for i in range(0, 13, step)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert method.unit == "rows" and ModelStock().element_wise


@pytest.mark.parametrize("models", [1, 0])
def test_two_models_at_least(models: int) -> None:
    raw = {"base_model": "base", "merge_method": "model_stock", "models": [{"model": "a"}, {"model": "base"}][:models]}
    with pytest.raises(RecipeError, match="model"):
        Recipe.from_dict(raw, models_must_exist=False)
