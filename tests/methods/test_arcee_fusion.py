from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.arcee_fusion import ArceeFusion
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.blocks import BLOCK


def group_of(base: Tensor, tuned: Tensor) -> TaskGroup:
    info = TensorInfo(name="w", shape=tuple(base.shape), tasks=2)
    return TaskGroup(info=info, base=None, tuned=(base, tuned))


def truth(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
    """(merged, score less the threshold) in float64."""
    base, tuned = base.double(), tuned.double()
    p, q = tuned.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    scores = (tuned - base).abs() * (p * torch.log(p / q)).sum(-1, keepdim=True)
    ordered = scores.reshape(-1).sort().values
    q1, median, q3 = (ordered[int(x * (len(ordered) - 1))] for x in (0.25, 0.5, 0.75))
    over = scores - (median + 1.5 * (q3 - q1))
    return torch.where(over >= 0, tuned, base), over / scores.max()


def pair(*shape: int, size: float = 0.1) -> list[Tensor]:
    g = torch.Generator().manual_seed(len(shape))
    base = torch.randn(shape, generator=g)
    return [base, base + size * torch.randn(shape, generator=g)]


@pytest.mark.parametrize("shape", [(41, 30), (500,), (6, 5, 3, 3), (300, 1), (3, BLOCK + 5), (2 * BLOCK,)], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_formula(shape: Sequence[int], size: float) -> None:
    base, tuned = pair(*shape, size=size)
    merged = ArceeFusion().combine(group_of(base, tuned))
    expected, over = truth(base, tuned)
    wrong = merged.double() != expected
    assert (over[wrong].abs() < 1e-6).all() and wrong.sum() <= 2  # scores are stored in float32
    if shape[-1] > 1:
        assert 0.01 < (merged != base).float().mean() < 0.3


def test_rows_of_one_entry_say_nothing() -> None:
    """Their softmax is 1 in both models: every score is 0, and so is the threshold."""
    base, tuned = pair(30, 1)
    assert torch.equal(ArceeFusion().combine(group_of(base, tuned)), tuned)


def test_equal_scores_are_all_taken_over() -> None:
    base = torch.zeros(4, 2)
    tuned = torch.tensor([[1.0, -1.0]] * 4)
    assert torch.equal(ArceeFusion().combine(group_of(base, tuned)), tuned)


def test_rows_without_a_change_stay_and_outliers_go_over() -> None:
    base, tuned = pair(40, 30, size=1e-3)
    tuned[3] = base[3]
    tuned[7, :5] += 2.0
    merged = ArceeFusion().combine(group_of(base, tuned))
    assert torch.equal(merged[3], base[3]) and torch.equal(merged[7, :5], tuned[7, :5])


@pytest.mark.parametrize(("unchanged", "over"), [(30, True), (29, False)])
def test_three_quarters_of_unchanged_rows_take_over_the_others(unchanged: int, over: bool) -> None:
    base, tuned = pair(40, 30)
    tuned[:unchanged] = base[:unchanged]
    merged = ArceeFusion().combine(group_of(base, tuned))
    assert torch.equal(merged, tuned) == over


def test_models_that_agree() -> None:
    base, _ = pair(20, 30)
    assert torch.equal(ArceeFusion().combine(group_of(base, base.clone())), base)


def test_bfloat16_inputs_are_widened(tensors: Any) -> None:
    base, tuned = tensors[0].bfloat16(), tensors[1][0].bfloat16()
    merged = ArceeFusion().combine(group_of(base, tuned))
    assert merged.dtype == torch.float32
    assert torch.equal(merged, ArceeFusion().combine(group_of(base.float(), tuned.float())))


@pytest.mark.parametrize("shape", [(), (1,), (2,), (0, 4), (4, 0), (3, 1), (2, 3, 3, 3)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    base, tuned = torch.zeros(shape), torch.full(shape, 0.5)
    assert torch.equal(ArceeFusion().combine(group_of(base, tuned)), tuned)  # equal changes: divergence 0


def test_huge_values_stay_finite() -> None:
    base, tuned = (1e4 * t for t in pair(20, 30))
    merged = ArceeFusion().combine(group_of(base, tuned))
    assert torch.isfinite(merged).all() and ((merged == base) | (merged == tuned)).all()
