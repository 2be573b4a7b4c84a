from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.blocks import BLOCK, blocks
from pymerge.methods.pcb import Pcb


def group_of(base: Tensor | None, tuned: Sequence[Tensor]) -> TaskGroup:
    info = TensorInfo(name="w", shape=tuple(tuned[0].shape), tasks=len(tuned))
    return TaskGroup(info=info, base=base, tuned=tuple(tuned))


def clipped(x: Tensor, first: int, last: int) -> Tensor:
    ordered = x.sort(dim=1).values
    return torch.clamp(x, ordered[:, first, None], ordered[:, last, None])


def unit(x: Tensor) -> Tensor:
    low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
    return (x - low) / (high - low)


def pcb_truth(deltas: Sequence[Tensor], ratio: float, scale: float) -> Tensor:
    """The formula of the authors on flat vectors, in float64."""
    x = torch.stack([d.double().reshape(-1) for d in deltas])
    tasks, n = x.shape
    size = clipped(x.abs(), int(1e-4 * n), int(n * (1 - 1e-4) - 1))
    score = torch.exp(tasks * unit(size) ** 2) * torch.tanh(x * x.sum(0))
    weight = unit(clipped(score, int(n * (1 - ratio)), n - 1))
    merged = (weight * size * x.sign()).sum(0) / weight.sum(0).clamp(min=1e-12)
    return scale * merged.reshape(deltas[0].shape)


def random(tasks: int, *shape: int, scale: float = 1.0) -> list[Tensor]:
    g = torch.Generator().manual_seed(tasks)
    return [scale * torch.randn(shape, generator=g) for _ in range(tasks)]


@pytest.mark.parametrize("tasks", [1, 2, 8, 120])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 1.0])
def test_formula(tasks: int, ratio: float) -> None:
    deltas = random(tasks, 41, 300)
    merged = Pcb(ratio=ratio, scope="tensor", scale=1.2).combine(group_of(None, deltas))
    expected = pcb_truth(deltas, ratio, 1.2)
    # Weights near 0 are differences of nearly equal scores, so entries that barely win are known to fewer digits.
    error = torch.linalg.vector_norm(merged.double() - expected) / torch.linalg.vector_norm(expected)
    assert error < 1e-4 and (merged != 0).any()


@pytest.mark.parametrize("scale", [1e-3, 1e-2])
def test_task_vectors_as_small_as_real_ones(scale: float) -> None:
    deltas = random(4, 200, 100, scale=scale)
    merged = Pcb(scope="tensor").combine(group_of(None, deltas))
    expected = pcb_truth(deltas, 0.1, 1.0)
    assert torch.linalg.vector_norm(merged.double() - expected) < 1e-4 * torch.linalg.vector_norm(expected)


def test_stored_in_bfloat16(tensors: Any) -> None:
    base, tuned = tensors[0].bfloat16(), [t.bfloat16() for t in tensors[1]]
    wide = Pcb(scope="tensor").combine(group_of(None, [t.float() - base.float() for t in tuned]))
    assert torch.equal(Pcb(scope="tensor").combine(group_of(base, tuned)), wide)


def test_blocks_of_any_size_are_surveyed_alike() -> None:
    """Answers and merges of uneven blocks, joined in another order, have the bits of the whole."""
    group = group_of(None, random(3, BLOCK + 12345))
    whole = Pcb(scope="tensor").combine(group)
    borders = [0, 1 << 14, 5 << 14, BLOCK, len(whole)]
    parts = [
        TaskGroup(info=group.info, base=None, tuned=tuple(t[a:b] for t in group.tuned), first=a)
        for a, b in zip(borders, borders[1:], strict=False)
    ]
    step: Any = Pcb()
    while hasattr(step, "survey"):
        answer = None
        for part in reversed(parts):
            found = step.survey(part)
            answer = found if answer is None else step.join(answer, found)
        step = step.decide(answer)
    assert torch.equal(torch.cat([step.combine(part) for part in parts]), whole)
    assert len(list(blocks(group))) == 2


def test_a_zero_task_takes_no_part() -> None:
    deltas = random(2, 50, 40)
    expected = Pcb(scope="tensor").combine(group_of(None, [*deltas]))
    merged = Pcb(scope="tensor").combine(group_of(None, [*deltas, torch.zeros(50, 40)]))
    agree = (merged != 0) == (expected != 0)  # exp(3 s^2) instead of exp(2 s^2) ranks a few entries otherwise
    assert agree.float().mean() > 0.97 and torch.isfinite(merged).all()
    assert not Pcb(scope="tensor").combine(group_of(None, [torch.zeros(5, 4)] * 2)).any()


def test_constant_task_vectors_are_averaged() -> None:
    merged = Pcb(scope="tensor").combine(group_of(None, [torch.full((6, 7), 0.5), torch.full((6, 7), 0.25)]))
    assert torch.equal(merged, torch.full((6, 7), 0.375))


def test_constant_task_vectors_that_disagree() -> None:
    """The sum goes with the first task; the scores of the other are one negative value."""
    merged = Pcb(scope="tensor").combine(group_of(None, [torch.full((6, 7), 0.5), torch.full((6, 7), -0.25)]))
    assert torch.equal(merged, torch.full((6, 7), 0.5))


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 1), (2, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("ratio", [1e-6, 0.1, 1.0])
def test_odd_shapes_and_ratios_stay_finite(shape: tuple[int, ...], ratio: float) -> None:
    merged = Pcb(scope="tensor", ratio=ratio).combine(group_of(torch.zeros(shape), random(3, *shape)))
    assert merged.shape == shape and bool(torch.isfinite(merged).all())


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_tiny_and_huge_task_vectors_stay_finite(scale: float) -> None:
    deltas = random(3, 30, 40, scale=scale)
    merged = Pcb(scope="tensor").combine(group_of(None, deltas))
    assert torch.isfinite(merged).all() and merged.abs().max() <= max(float(d.abs().max()) for d in deltas)


def test_order_of_tasks_does_not_matter() -> None:
    deltas = random(3, 30, 41)
    one, other = (Pcb(scope="tensor").combine(group_of(None, d)) for d in (deltas, deltas[::-1]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
