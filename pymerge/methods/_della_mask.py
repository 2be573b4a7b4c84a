"""DELLA on torch tensors: magnitudes ranked in rows, a random mask by rank, the merge of what is left.

Works on a few rows at a time, so that it holds one byte for each entry that is kept or not, and no whole task vector.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pymerge.methods.base import TaskGroup
from pymerge.methods.della_linear import PART
from pymerge.ops._random import draws, run_of_draws
from pymerge.ops.delta_merge import delta_merge
from pymerge.ops.delta_rule import DeltaRule

Rescale = Literal["none", "keep", "l1"]
_PLANES = (4, 5)  # of the generator: 0 and 1 are DARE's, so that DARE before DELLA is two independent draws
_NORM_FLOOR = 1e-7  # mergekit sparsify: smaller L1 norms are not restored


@dataclass(frozen=True, kw_only=True)
class RankedDrop:
    """How one task's entries are kept: the largest of a row with probability density + epsilon, the smallest with
    density - epsilon, linear in the rank between. density 1 keeps all, 0 nothing.

    key  of the Philox generator
    """

    density: float
    epsilon: float
    key: int

    def apply(self, delta: Tensor, first: int, *, divide: bool = False) -> Tensor:
        """Sets the entries of delta to zero that are dropped; returns the mask of the others, bool, of delta's shape.

        delta   float32, whole rows: ranks run along dimension 1, in a tensor with fewer than two dimensions along all
        first   index of its first entry within the parameter
        divide  the others are divided by the probability that they had
        """
        if self.density >= 1 or not delta.numel():
            return torch.ones_like(delta, dtype=torch.bool)
        if self.density <= 0:
            return torch.zeros_like(delta.zero_(), dtype=torch.bool)
        order = ascending(delta.abs())
        table = self.probabilities(order.shape[1]).to(delta.device)
        limit = (table * 2.0**32).long()
        high, low = spread(limit >> 16, order).view(-1), spread(limit & 0xFFFF, order).view(-1)
        draw = run_of_draws(self.key, first, delta.numel(), _PLANES[0], delta.device)
        keep = draw < high
        tied = (draw == high).nonzero().view(-1)  # one entry in 2^16 is decided by 16 bits more
        keep[tied] = draws(self.key, first + tied, _PLANES[1]) < low[tied]
        keep = keep.view_as(delta)
        delta.mul_(keep)
        if divide:
            delta.div_(spread(table.float(), order).view_as(delta))
        return keep

    def probabilities(self, length: int) -> Tensor:
        """From the smallest magnitude of a row to the largest, float64 [length]; `density` in a row of one entry."""
        if length == 1:
            return torch.tensor([self.density], dtype=torch.float64)
        return torch.linspace(self.density - self.epsilon, self.density + self.epsilon, length, dtype=torch.float64)


def ascending(magnitude: Tensor) -> Tensor:
    """Places within its row of the entries from the smallest to the largest, among equals highest index first: int64,
    of magnitude's shape or one row.

    magnitude  float32, not negative, so that its bits order like its values. With the index behind them no two keys are
               equal, and any sort gives the same order; NumPy's is three times as fast as a stable sort of PyTorch.
    """
    rows = magnitude.reshape(1, -1) if magnitude.dim() < 2 else magnitude.contiguous()
    last = rows.shape[1] - 1
    index = torch.arange(last, -1, -1, device=rows.device).view(1, -1, *(1,) * (rows.dim() - 2))
    keys = rows.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(index)
    keys = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.device.type == "cpu" else keys.sort(dim=1).values
    return keys.bitwise_and_(0xFFFFFFFF).neg_().add_(last)


def spread(table: Tensor, order: Tensor) -> Tensor:
    """The table's entries, smallest magnitude first, at the places that `order` gives: of order's shape."""
    values = table.view(1, -1, *(1,) * (order.dim() - 2)).expand_as(order)
    return torch.empty(order.shape, dtype=table.dtype, device=table.device).scatter_(1, order, values)


def parts(group: TaskGroup) -> Iterator[tuple[Any, TaskGroup]]:
    """(index of its rows, group) of a few rows at a time; tensors with fewer than two dimensions in one piece."""
    shape = group.tuned[0].shape
    if len(shape) < 2:
        yield ..., group
        return
    width = math.prod(shape[1:])
    step = max(1, PART // max(1, width))
    for row in range(0, shape[0], step):
        rows = slice(row, row + step)
        base = group.base[rows] if group.base is not None else None
        tuned = tuple(x[rows] for x in group.tuned)
        yield rows, replace(group, base=base, tuned=tuned, first=group.first + row * width)


def merge_dropped(group: TaskGroup, drops: Sequence[RankedDrop], rescale: Rescale, rule: DeltaRule) -> Tensor:
    """The merge by `rule` of the task vectors that `drops` has thinned out, float32, of the group's shape.

    rescale  keep: entries are divided by the probability they had; l1: the L1 norm of each task vector is restored, for
             which the group must be the whole tensor
    """
    out = torch.empty(group.tuned[0].shape, dtype=torch.float32, device=group.tuned[0].device)
    masks: list[list[Tensor]] = []
    if rescale == "l1":
        masks, rescales = draw_masks(group, drops)
        rule = replace(rule, rescales=rescales)
    for number, (rows, part) in enumerate(parts(group)):
        kept = []
        for task, drop in enumerate(drops):
            delta = part.delta(task)
            if masks:
                delta.mul_(masks[number][task])
            else:
                drop.apply(delta, part.first, divide=rescale == "keep")
            kept.append(delta)
        out[rows] = delta_merge(rule, None, kept)[0]
    return out


def draw_masks(group: TaskGroup, drops: Sequence[RankedDrop]) -> tuple[list[list[Tensor]], tuple[float, ...]]:
    """(masks by part and task, the factor of each task that restores its L1 norm)"""
    masks: list[list[Tensor]] = []
    before: list[list[float]] = [[] for _ in drops]
    after: list[list[float]] = [[] for _ in drops]
    for _, part in parts(group):
        masks.append([])
        for task, drop in enumerate(drops):
            delta = part.delta(task)
            before[task].append(float(delta.abs().sum(dtype=torch.float64)))
            masks[-1].append(drop.apply(delta, part.first))
            after[task].append(float(delta.abs_().sum(dtype=torch.float64)))
    norms = [(math.fsum(a), math.fsum(b)) for a, b in zip(before, after, strict=True)]
    return masks, tuple(a / b if min(a, b) >= _NORM_FLOOR else 1.0 for a, b in norms)
