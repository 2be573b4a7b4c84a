from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.blocks import BLOCK
from pymerge.methods.sce import Sce


def group_of(base: Tensor | None, tuned: Sequence[Tensor]) -> TaskGroup:
    info = TensorInfo(name="w", shape=tuple(tuned[0].shape), tasks=len(tuned))
    return TaskGroup(info=info, base=base, tuned=tuple(tuned))


def truth(deltas: Sequence[Tensor], topk: float) -> Tensor:
    """The published steps in float64, with an order among equal variances: lowest index first."""
    x = torch.stack([d.double() for d in deltas]).reshape(len(deltas), -1)
    if topk < 1:
        variance = (x - x.mean(0)).square().mean(0)
        order = torch.sort(variance, descending=True, stable=True).indices
        keep = torch.zeros_like(variance)
        keep[order[: int((variance != 0).sum() * topk)]] = 1
        x = x * keep
    squares = x.square().mean(1)
    weights = squares / squares.sum() if squares.sum() >= 1e-6 else torch.full_like(squares, 1 / len(x))
    elected = torch.where(x.sum(0) >= 0, 1.0, -1.0)
    share = weights[:, None] * (x.sign() == elected)
    return ((share * x).sum(0) / share.sum(0).clamp(min=1e-6)).reshape(deltas[0].shape)


def random(tasks: int, *shape: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(tasks)
    return [scale * (t + 1) * torch.randn(shape, generator=g) for t in range(tasks)]


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("topk", [0.0, 0.1, 0.75, 1.0])
def test_formula(tasks: int, topk: float) -> None:
    deltas = random(tasks, 41, 30)
    merged = Sce(select_topk=topk).combine(group_of(None, deltas))
    torch.testing.assert_close(merged.double(), truth(deltas, topk), rtol=1e-6, atol=0)
    assert merged.any() == (topk == 1 or (topk > 0 and tasks > 1))


@pytest.mark.parametrize("scale", [1e-4, 1e-7])
@pytest.mark.parametrize("topk", [0.5, 1.0])
def test_small_task_vectors_weigh_the_same(scale: float, topk: float) -> None:
    deltas = random(3, 41, 30, scale=scale)
    merged = Sce(select_topk=topk).combine(group_of(None, deltas)).double()
    torch.testing.assert_close(merged, truth(deltas, topk), rtol=0, atol=2e-6 * scale)


def test_lowest_index_first_among_equal_variances() -> None:
    deltas = [torch.tensor([1.0, -2.0, 2.0, 2.0, 0.0, 5.0]), torch.tensor([-1.0, 2.0, -2.0, -2.0, 0.0, 5.0])]
    merged = Sce(select_topk=0.5).combine(group_of(None, deltas))  # 2 of the 4 entries that differ
    assert merged.tolist() == [0.0, 2.0, 2.0, 0.0, 0.0, 0.0]


def test_ties_across_blocks() -> None:
    one = torch.zeros(BLOCK + 3000)
    one[BLOCK - 1000 : BLOCK + 1000] = 0.5
    merged = Sce(select_topk=0.75).combine(group_of(None, [one, torch.zeros_like(one)]))
    expected = torch.where(torch.arange(len(one)) < BLOCK + 500, one, 0.0)
    assert torch.equal(merged, expected)


def test_agreeing_tasks() -> None:
    """Their variance is exactly 0, whatever their number: nothing is selected unless all is."""
    deltas = random(1, 20, 30) * 3
    assert not Sce(select_topk=0.9).combine(group_of(None, deltas)).any()
    torch.testing.assert_close(Sce().combine(group_of(None, deltas)), deltas[0], rtol=1e-6, atol=0)


def test_the_sign_of_the_sum_wins_and_zero_counts_as_plus() -> None:
    deltas = [torch.tensor([1.0, 3.0, -2.0, 0.0]), torch.tensor([-1.0, -1.0, -2.0, 0.0])]
    assert Sce().combine(group_of(None, deltas)).tolist() == [1.0, 3.0, -2.0, 0.0]


def test_a_task_of_little_weight_alone_is_shrunk() -> None:
    """Its weight, about 1e-8, is below the smallest divisor, 1e-6."""
    big, small = torch.tensor([100.0, 0.0]), torch.tensor([0.0, 0.01])
    merged = Sce().combine(group_of(None, [big, small]))
    torch.testing.assert_close(merged, torch.tensor([100.0, 0.0001]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("topk", [0.5, 1.0])
def test_bfloat16_inputs_are_widened(topk: float, tensors: Any) -> None:
    base, tuned = tensors[0].bfloat16(), [t.bfloat16() for t in tensors[1]]
    method = Sce(select_topk=topk)
    wide = method.combine(group_of(None, [t.float() - base.float() for t in tuned]))
    assert torch.equal(method.combine(group_of(base, tuned)), wide)


@pytest.mark.parametrize("topk", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 1), (2, 3, 3, 3)], ids=str)
def test_odd_shapes(shape: tuple[int, ...], topk: float) -> None:
    merged = Sce(select_topk=topk).combine(group_of(None, [torch.full(shape, 0.5), torch.full(shape, 0.25)]))
    assert merged.shape == shape and torch.isfinite(merged).all()
    torch.testing.assert_close(merged.double(), truth([torch.full(shape, 0.5), torch.full(shape, 0.25)], topk))


def test_no_task_moves() -> None:
    assert not Sce(select_topk=0.5).combine(group_of(None, [torch.zeros(5, 4)] * 2)).any()
    assert not Sce().combine(group_of(None, [torch.zeros(5, 4)] * 2)).any()
