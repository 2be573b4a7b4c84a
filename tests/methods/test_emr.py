from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.blocks import BLOCK
from pymerge.methods.emr import Emr, task_masks


def group_of(base: Tensor | None, tuned: Sequence[Tensor]) -> TaskGroup:
    info = TensorInfo(name="w", shape=tuple(tuned[0].shape), tasks=len(tuned))
    return TaskGroup(info=info, base=base, tuned=tuple(tuned))


def emr_truth(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """E and the masks [T, ...], in float64."""
    stacked = torch.stack([d.double() for d in deltas])
    sign = torch.where(stacked.mean(0) > 0, 1.0, -1.0)
    masks = stacked * sign > 0
    return sign * (stacked.abs() * masks).amax(0), masks


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (33, 65), (2, 3, 3, 3), (BLOCK + 5,)], ids=str)
def test_formula(tasks: int, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(tasks)
    deltas = [torch.randint(-64, 65, shape, generator=g) / 16 for _ in range(tasks)]
    elected, masks = emr_truth(deltas)
    group = group_of(None, deltas)
    assert torch.equal(Emr().combine(group).double(), elected)
    parts = list(task_masks(group))
    bits = [np.concatenate([part.bits[t].numpy() for part in parts] or [np.empty(0, np.uint8)]) for t in range(tasks)]
    for t in range(tasks):
        unpacked = np.unpackbits(bits[t], bitorder="little")[: masks[t].numel()]
        assert np.array_equal(unpacked.astype(bool), masks[t].reshape(-1).numpy())
        assert sum(x for part in parts for x in part.deltas[t]) == float(deltas[t].double().abs().sum())
        assert sum(x for part in parts for x in part.used[t]) == float((elected * masks[t]).abs().sum())


def test_stored_in_bfloat16(tensors: Any) -> None:
    base, tuned = tensors[0].bfloat16(), [t.bfloat16() for t in tensors[1]]
    expected, _ = emr_truth([t.float() - base.float() for t in tuned])
    assert torch.equal(Emr().combine(group_of(base, tuned)).double(), expected)


def test_one_task_comes_back(tensors: Any) -> None:
    base, tuned = tensors
    assert torch.equal(Emr().combine(group_of(base, tuned[:1])), tuned[0] - base)


def test_where_nothing_agrees_nothing_is_elected() -> None:
    """A sum of zero elects the minus sign, which a task that is zero or positive does not have."""
    assert not Emr().combine(group_of(None, [torch.zeros(9), torch.zeros(9)])).any()
    (masks,) = task_masks(group_of(None, [torch.zeros(9), torch.zeros(9)]))
    assert not masks.bits.any() and masks.used == ([0.0], [0.0])
