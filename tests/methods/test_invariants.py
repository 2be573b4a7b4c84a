"""What holds for every element-wise combine step, in both styles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge import methods
from pymerge.methods.base import Combine, ElementWiseCombine, TensorInfo
from tests.methods.conftest import Merge

STYLED = [
    (name, style)
    for name in methods.list("combine")
    if name not in ("linear", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "passthrough")
    and issubclass(methods.get(name), ElementWiseCombine)
    for style in ("authors", "mergekit", "mergekit-0.1.4")
    if not (name == "breadcrumbs_ties" and style == "authors")
]
IDS = [f"{name}-{style}" for name, style in STYLED]


def build(name: str, style: str, **given: Any) -> Combine:
    """A method with weights 1 and, where it has them, densities that select."""
    cls = methods.get(name)
    assert issubclass(cls, Combine)
    names = {p.name for p in methods.describe(name).parameters}
    return cls(**({"style": style, "weight": 1.0} | ({"density": 0.5} if "density" in names else {}) | given))


@pytest.mark.parametrize(("name", "style"), STYLED, ids=IDS)
def test_zero_deltas_return_the_base(name: str, style: str, merge: Merge, tensors: Any) -> None:
    base = tensors[0]
    assert torch.equal(merge(build(name, style), base, [base.clone() for _ in range(3)]), base)


@pytest.mark.parametrize(("name", "style"), STYLED, ids=IDS)
def test_scale_zero_returns_the_base(name: str, style: str, merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    assert torch.equal(merge(build(name, style, scale=0), base, tuned), base)


@pytest.mark.parametrize(("name", "style"), STYLED, ids=IDS)
def test_update_is_homogeneous_in_the_task_vectors(name: str, style: str, merge: Merge, tensors: Any) -> None:
    _, tuned = tensors
    zero = torch.zeros_like(tuned[0])
    method = build(name, style)
    once, four_times = merge(method, zero, tuned), merge(method, zero, [4 * t for t in tuned])
    assert torch.equal(four_times, 4 * once) and once.abs().sum() > 0


@pytest.mark.parametrize(("name", "style"), STYLED, ids=IDS)
def test_order_of_tasks_does_not_matter(name: str, style: str, merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    weight = (0.5, 1.0, 0.25)
    if name.startswith(("dare", "della")):
        method, permuted = (build(name, style, weight=w, density=1) for w in (weight, weight[::-1]))
    else:
        method, permuted = (build(name, style, weight=w) for w in (weight, weight[::-1]))
    torch.testing.assert_close(merge(method, base, tuned), merge(permuted, base, tuned[::-1]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("style", ["authors", "mergekit"])
@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_identical_tasks_with_an_averaging_norm_return_one_trimmed_task(
    name: str, style: str, merge: Merge, tensors: Any
) -> None:
    base, tuned = tensors
    average = {"merge_func": "mean"} if style == "authors" else {"normalize": True}
    full = {"density": 1, "scale": 1} | ({"trim": 1} if name == "dare_ties" and style == "authors" else {})
    merged = merge(build(name, style, **average, **full), base, [tuned[0]] * 3)
    torch.testing.assert_close(merged, tuned[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "style"), STYLED, ids=IDS)
def test_one_task_without_selection_returns_it(name: str, style: str, merge: Merge, tensors: Any) -> None:
    if name == "breadcrumbs" and style == "authors":
        selection = {"density": 1, "gamma": 0}
    else:
        selection = {"density": 1} if name != "task_arithmetic" else {}
    if name == "dare_ties" and style == "authors":
        selection["trim"] = 1
    base, tuned = tensors
    merged = merge(build(name, style, scale=1, **selection), base, tuned[:1])
    torch.testing.assert_close(merged, tuned[0], rtol=0, atol=5e-7)


@pytest.mark.parametrize(("name", "style"), STYLED, ids=IDS)
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 1), (2, 3, 3, 3)], ids=str)
def test_odd_shapes_keep_their_shape_and_stay_finite(
    name: str, style: str, shape: tuple[int, ...], merge: Merge
) -> None:
    base = torch.zeros(shape)
    tuned = [torch.full(shape, 0.5), torch.full(shape, -0.25)]
    merged = merge(build(name, style), base, tuned)
    assert merged.shape == shape and bool(torch.isfinite(merged).all())


@pytest.mark.parametrize(("name", "style"), STYLED, ids=IDS)
def test_inputs_of_mixed_dtypes_are_widened(name: str, style: str, merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    stored = [base.bfloat16(), tuned[0].half(), tuned[1].bfloat16(), tuned[2]]
    wide: list[Tensor] = [t.float() for t in stored]
    method = build(name, style)
    assert torch.equal(merge(method, stored[0], stored[1:]), merge(method, wide[0], wide[1:]))


def test_rules_know_their_tasks(tensors: Any) -> None:
    method = build("ties", "authors", density=(0.1, 0.2))
    assert isinstance(method, ElementWiseCombine)
    with pytest.raises(methods.base.RecipeError, match="density: 2 values for 3 models"):
        method.rule(TensorInfo(name="w", shape=(4,), tasks=3))
