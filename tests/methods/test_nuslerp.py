from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.errors import RecipeError
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.dare import Dare
from pymerge.methods.nuslerp import NuSlerp, NuSlerpWeights
from tests.methods.conftest import Merge

FLAT, ROWS = {}, {"nuslerp_flatten": False}
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}


def truth(t: float, a: Tensor, b: Tensor, dim: int | None) -> Tensor:
    """The formula in float64, on vectors along `dim`, or on all entries at once."""
    a, b = a.double(), b.double()
    dims: Any = tuple(range(a.dim())) if dim is None else dim
    inner = (a * b).sum(dims, keepdim=True)
    theta = torch.arccos(inner / a.square().sum(dims, keepdim=True).sqrt() / b.square().sum(dims, keepdim=True).sqrt())
    return (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)


def group(base: Tensor | None, tuned: list[Tensor], first: int = 0, shape: tuple[int, ...] | None = None) -> TaskGroup:
    info = TensorInfo(name="w", shape=shape or tuple(tuned[0].shape), tasks=len(tuned))
    return TaskGroup(info=info, base=base, tuned=tuple(tuned), first=first)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("shape", [(17, 31), (40,), (6, 5, 3, 3), (300, 700)], ids=str)  # the last in several parts
@pytest.mark.parametrize(("given", "dim"), [(FLAT, None), (ROWS, -1), (COLUMNS, 0)])
def test_great_circle(
    given: dict[str, Any], dim: int | None, shape: tuple[int, ...], with_base: bool, merge: Merge
) -> None:
    g = torch.Generator().manual_seed(1)
    base, a, b = (torch.randn(shape, generator=g) for _ in range(3))
    merged = merge(NuSlerp(weight=(0.3, 0.9), **given), base if with_base else None, [a, b]).double()
    origin = base.double() if with_base else torch.zeros(shape)
    torch.testing.assert_close(merged, origin + truth(0.75, a - origin, b - origin, dim), rtol=0, atol=5e-6)


@pytest.mark.parametrize(("given", "dim"), [(FLAT, None), (ROWS, -1), (COLUMNS, 0)])
def test_bfloat16_inputs_are_widened(given: dict[str, Any], dim: int | None, merge: Merge, tensors: Any) -> None:
    base, tuned = (tensors[0].bfloat16(), [t.bfloat16() for t in tensors[1][:2]])
    expected = truth(0.5, tuned[0].float() - base.float(), tuned[1].float() - base.float(), dim)
    merged = merge(NuSlerp(**given), base, tuned).double()
    torch.testing.assert_close(merged, base.double() + expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "t"), [(1.0, 0.5), ((1.0, 3.0), 0.75), ((2.0, -1.0), -1.0), ((1.0, -1.0), 0.5), ((0.0, 0.0), 0.5)]
)
def test_position_from_the_weights(weight: Any, t: float) -> None:
    assert NuSlerp(weight=weight).position() == t


@pytest.mark.parametrize("given", [FLAT, ROWS, COLUMNS])
@pytest.mark.parametrize("factor", [1.0, 2.5, -1.0, -0.3])
def test_vectors_on_one_line_are_interpolated_linearly(
    given: dict[str, Any], factor: float, merge: Merge, tensors: Any
) -> None:
    a = tensors[1][0]
    merged = merge(NuSlerp(weight=(0.7, 0.3), **given), None, [a, factor * a])
    torch.testing.assert_close(merged, (0.7 + 0.3 * factor) * a, rtol=0, atol=2e-6)


@pytest.mark.parametrize("given", [FLAT, ROWS, COLUMNS])
def test_a_zero_vector_counts_as_orthogonal(given: dict[str, Any], merge: Merge, tensors: Any) -> None:
    base, (a, *_) = tensors
    merged = merge(NuSlerp(**given), base, [a, base])
    torch.testing.assert_close(merged, base + math.sin(math.pi / 4) * (a - base), rtol=0, atol=1e-6)
    assert torch.equal(merge(NuSlerp(**given), base, [base, base]), base)


@pytest.mark.parametrize("given", [FLAT, ROWS, COLUMNS])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (3, 0), (5, 1), (1, 5)], ids=str)
def test_odd_shapes(given: dict[str, Any], shape: tuple[int, ...], merge: Merge) -> None:
    base = torch.ones(shape)
    merged = merge(NuSlerp(**given), base, [base + 1, base - 0.5])
    assert merged.shape == shape and bool(torch.isfinite(merged).all())
    if shape in ((), (1,), (5, 1)):  # one number each, or one line: 1 and -0.5 are opposite
        torch.testing.assert_close(merged, base + 0.25, rtol=0, atol=1e-6)


def test_rows_do_not_depend_on_the_block_they_come_in(tensors: Any) -> None:
    base, (a, b, _) = tensors
    method = NuSlerp(weight=(0.4, 0.2), nuslerp_flatten=False)
    whole = method.combine(group(base, [a, b]))
    for step in (1, 7):
        parts = [
            method.combine(group(base[i : i + step], [a[i : i + step], b[i : i + step]], i * 65, (33, 65)))
            for i in range(0, 33, step)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_one_row_is_the_flattened_tensor(tensors: Any) -> None:
    _, (a, b, _) = tensors
    flat, row = (
        NuSlerp(weight=(0.4, 0.2), nuslerp_flatten=f).combine(group(None, [a[:1], b[:1]])) for f in (True, False)
    )
    torch.testing.assert_close(flat, row, rtol=0, atol=1e-6)


def test_what_must_be_seen_at_once() -> None:
    assert NuSlerp().element_wise and NuSlerp().workspace(TensorInfo(name="w", shape=(4, 4), tasks=2)) == 0
    rows, columns = NuSlerp(**ROWS), NuSlerp(**COLUMNS)
    assert (rows.element_wise, rows.unit, columns.element_wise, columns.unit) == (False, "rows", False, "tensor")


def test_the_gram_matrix_is_that_of_purified_task_vectors(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors[0], tensors[1][:2]
    purify = Dare(density=0.5)
    info = TensorInfo(name="w", shape=(33, 65), tasks=2)
    a, b = purify.purify(TaskGroup(info=info, base=base, tuned=tuple(tuned)))
    merged = merge(NuSlerp(weight=(0.3, 0.6)), base, tuned, purify=[purify])
    torch.testing.assert_close(merged.double(), base + truth(2 / 3, a, b, None), rtol=0, atol=1e-6)


def test_rounding_noise_of_opposite_vectors_is_not_an_angle() -> None:
    size = 1.0 - 3e-16
    assert NuSlerpWeights(0.5)([[1.0, -size], [-size, 1.0]]) == (0.5, 0.5)


@pytest.mark.parametrize("weight", [(1.0, 2.0, 3.0), (1.0,)])
def test_two_weights(weight: Any) -> None:
    with pytest.raises(RecipeError, match="weight: .* values for 2 models"):
        NuSlerp(weight=weight).rule(TensorInfo(name="w", shape=(2,), tasks=2))
