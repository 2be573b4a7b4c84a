"""RAM, and RAM+ of each tensor by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.base import Combine, TaskGroup, TensorInfo
from pymerge.methods.blocks import BLOCK
from pymerge.methods.ram import Ram
from pymerge.methods.ramplus_tl import RamPlusTl


def group_of(base: Tensor | None, tuned: Sequence[Tensor], first: int = 0) -> TaskGroup:
    info = TensorInfo(name="w", shape=tuple(tuned[0].shape), tasks=len(tuned))
    return TaskGroup(info=info, base=base, tuned=tuple(tuned), first=first)


def truth(deltas: Sequence[Tensor], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Tensor:
    """The published steps in float64; r = 0 is RAM."""
    x = torch.stack([d.double() for d in deltas]).reshape(len(deltas), -1)
    changed = torch.stack([d for d in deltas]).reshape(x.shape).abs() > epsilon
    users = changed.sum(0)
    shared, own = (changed & (users > 1)).sum(1), (changed & (users == 1)).sum(1)
    factor = 1 + r * (shared / own.clamp(min=1e-9)).clamp(max=alpha)
    alone = (x * changed * (users == 1) * factor[:, None]).sum(0)
    together = (x * changed * (users > 1)).sum(0) / users.clamp(min=1)
    return (alone + together).reshape(deltas[0].shape)


def sparse(tasks: int, *shape: int, density: float = 0.3) -> list[Tensor]:
    g = torch.Generator().manual_seed(tasks)
    return [torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < density) for _ in range(tasks)]


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.5])
def test_formulas(tasks: int, epsilon: float) -> None:
    deltas = sparse(tasks, 31, 40)
    torch.testing.assert_close(
        Ram(epsilon=epsilon).combine(group_of(None, deltas)).double(), truth(deltas, epsilon), rtol=0, atol=1e-6
    )
    merged = RamPlusTl(epsilon=epsilon, r=0.3, alpha=0.7).combine(group_of(None, deltas)).double()
    torch.testing.assert_close(merged, truth(deltas, epsilon, 0.3, 0.7), rtol=0, atol=1e-6)


def test_default_of_ramplus() -> None:
    deltas = sparse(3, 31, 40)  # s / u is about 1, beyond alpha
    merged = RamPlusTl().combine(group_of(None, deltas)).double()
    torch.testing.assert_close(merged, truth(deltas, 1e-5, 0.1, 0.2), rtol=0, atol=1e-6)
    assert not torch.equal(merged, Ram().combine(group_of(None, deltas)).double())


def test_by_hand() -> None:
    deltas = [torch.tensor([1.0, 4.0, 0.0, 2.0, 1e-5]), torch.tensor([0.0, -2.0, 0.0, 1e-6, 0.0])]
    assert Ram().combine(group_of(None, deltas)).tolist() == [1.0, 1.0, 0.0, 2.0, 0.0]
    # The first task shares one entry and has two of its own.
    merged = RamPlusTl(r=1.0, alpha=1.0).combine(group_of(None, deltas))
    assert merged.tolist() == [1.5, 1.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 3.0])
def test_a_task_without_own_entries_stays_finite(epsilon: float) -> None:
    """mergekit divides by epsilon there, which gives NaN for 0."""
    delta = torch.tensor([1.0, 2.0, 4.0])
    merged = RamPlusTl(epsilon=epsilon).combine(group_of(None, [delta, delta]))
    assert torch.equal(merged, torch.where(delta > epsilon, delta, 0.0))
    assert not RamPlusTl(epsilon=epsilon).combine(group_of(None, [0 * delta, 0 * delta])).any()


@pytest.mark.parametrize("method", [Ram(), RamPlusTl()], ids=["ram", "ramplus_tl"])
def test_bfloat16_inputs_are_widened(method: Combine, tensors: Any) -> None:
    base, tuned = tensors[0].bfloat16(), [t.bfloat16() for t in tensors[1]]
    wide = method.combine(group_of(None, [t.float() - base.float() for t in tuned]))
    assert torch.equal(method.combine(group_of(base, tuned)), wide)


@pytest.mark.parametrize("method", [Ram(epsilon=0.01), RamPlusTl(epsilon=0.01)], ids=["ram", "ramplus_tl"])
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 1), (2, 3, 3, 3)], ids=str)
def test_odd_shapes(method: Combine, shape: tuple[int, ...]) -> None:
    merged = method.combine(group_of(torch.zeros(shape), [torch.full(shape, 0.5), torch.full(shape, 0.25)]))
    assert torch.equal(merged, torch.full(shape, 0.375))


def test_order_of_tasks_does_not_matter() -> None:
    deltas = [d.mul(64).round() / 64 for d in sparse(4, 20, 30)]
    for method in (Ram(), RamPlusTl(r=0.5, alpha=1.0)):
        one, other = (method.combine(group_of(None, d)) for d in (deltas, deltas[::-1]))
        assert torch.equal(one, other)


def test_parts_have_the_bits_of_the_whole() -> None:
    deltas = sparse(3, BLOCK + 999)
    whole = Ram().combine(group_of(None, deltas))
    cuts = [0, 7, BLOCK - 1, len(whole)]
    parts = [Ram().combine(group_of(None, [d[a:b] for d in deltas], a)) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(parts), whole)
    own = RamPlusTl().combine(group_of(None, deltas)).double()  # counts over more than one block
    torch.testing.assert_close(own, truth(deltas, 1e-5, 0.1, 0.2), rtol=0, atol=1e-6)
