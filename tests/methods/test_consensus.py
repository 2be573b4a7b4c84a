from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.consensus import Consensus


def group_of(base: Tensor | None, tuned: Sequence[Tensor]) -> TaskGroup:
    info = TensorInfo(name="w", shape=tuple(tuned[0].shape), tasks=len(tuned))
    return TaskGroup(info=info, base=base, tuned=tuple(tuned))


def consensus_truth(deltas: Sequence[Tensor], threshold: Sequence[float], k: int, scale: float) -> Tensor:
    stacked = torch.stack([d.double() for d in deltas])
    total = stacked.sum(0)
    limits = torch.tensor(threshold, dtype=torch.float64).reshape(-1, *[1] * total.dim())
    users = (stacked.abs() > limits * (total - stacked).abs()).sum(0)
    return torch.where(users >= k, scale * total, 0.0)


def dyadic(tasks: int, *shape: int) -> list[Tensor]:
    """Multiples of 1/64 up to 8: sums and products with thresholds of few bits are exact, ties included."""
    g = torch.Generator().manual_seed(tasks)
    return [torch.randint(-512, 513, shape, generator=g) / 64 for _ in range(tasks)]


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5])
def test_keeps_what_k_tasks_use(k: int) -> None:
    deltas, threshold = dyadic(4, 33, 65), (0.25, 0.375, 0.5, 0.625)
    merged = Consensus(threshold=threshold, k=k, scale=0.5).combine(group_of(None, deltas))
    assert torch.equal(merged.double(), consensus_truth(deltas, threshold, k, 0.5))
    assert (merged == 0).all() == (k == 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_on_random_task_vectors(dtype: torch.dtype, tensors: Any) -> None:
    base, tuned = tensors[0].to(dtype), [t.to(dtype) for t in tensors[1]]
    deltas = [t.float() - base.float() for t in tuned]
    expected = consensus_truth(deltas, (0.4,) * 3, 2, 1.0)
    merged = Consensus().combine(group_of(base, tuned)).double()
    wrong = (merged - expected).abs() > 1e-6
    assert wrong.float().mean() < 1e-3  # entries whose rounded sum is on the other side of the threshold
    assert 0.05 < (merged == 0).float().mean() < 0.95


def test_k_zero_is_the_sum_and_k_beyond_t_nothing(tensors: Any) -> None:
    base, tuned = tensors
    total = (tuned[0] - base) + (tuned[1] - base) + (tuned[2] - base)
    assert torch.equal(Consensus(k=0).combine(group_of(base, tuned)), total)
    assert not Consensus(k=4).combine(group_of(base, tuned)).any()


def test_one_task_is_kept_unless_two_are_asked_for(tensors: Any) -> None:
    base, tuned = tensors
    assert torch.equal(Consensus().combine(group_of(base, tuned[:1])), tuned[0] - base)
    assert not Consensus(k=2).combine(group_of(base, tuned[:1])).any()


def test_zero_task_vectors_use_nothing(tensors: Any) -> None:
    base, tuned = tensors
    assert not Consensus(k=1).combine(group_of(base, [base] * 3)).any()
    assert not Consensus().combine(group_of(base, [tuned[0], base, base])).any()  # used by one task


def test_order_of_tasks_does_not_matter() -> None:
    deltas = dyadic(3, 40, 7)
    one = Consensus(threshold=(0.25, 0.5, 0.625)).combine(group_of(None, deltas))
    other = Consensus(threshold=(0.625, 0.5, 0.25)).combine(group_of(None, deltas[::-1]))
    assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(), (0, 4), (3, 1), (2, 3, 3, 3)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    merged = Consensus().combine(group_of(torch.zeros(shape), [torch.full(shape, 0.5), torch.full(shape, 0.25)]))
    assert torch.equal(merged, torch.full(shape, 0.75))


def test_blocks_give_the_whole(tensors: Any) -> None:
    base, tuned = tensors
    whole = Consensus().combine(group_of(base, tuned)).reshape(-1)
    base, tuned = base.reshape(-1), [t.reshape(-1) for t in tuned]
    parts = [
        Consensus().combine(group_of(base[i : i + 77], [t[i : i + 77] for t in tuned])) for i in range(0, len(base), 77)
    ]
    assert torch.equal(torch.cat(parts), whole)
