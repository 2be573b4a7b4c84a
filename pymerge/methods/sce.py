"""SCE: select what differs most between tasks, calculate their weights, erase minority directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pymerge.methods.base import Combine, TaskGroup, TensorInfo, param, register
from pymerge.methods.blocks import BLOCK, blocks, in_blocks
from pymerge.methods.selection import INT8_MASK

if TYPE_CHECKING:
    from torch import Tensor

_EQUAL_BELOW = 1e-6  # mergekit 0.1.5 sce: with a smaller sum of mean squares all tasks weigh the same
_DIVISOR_FLOOR = 1e-6  # same: smallest divisor of the weighted mean

Selection = Callable[[TaskGroup], "Tensor | None"]  # of a block: which entries are kept; None: all


@register("sce")
@dataclass(frozen=True, kw_only=True)
class Sce(Combine):
    """W = W_0 + sum_t w_t e_t d_t / max(sum_t w_t e_t, 1e-6), tensor by tensor.

    d_t  the task vector where its entry is selected, 0 elsewhere: the int(select_topk v) entries with the largest
         variance over the tasks, v the number of entries whose variance is not 0, lowest index first among equals;
         select_topk 1 selects all entries, those without variance too
    w_t  mean square of d_t over the sum of these means; all equal where that sum is below 1e-6
    e_t  1 where d_t has the sign of sum_s d_s, + where that is 0; else 0
    One task has no variance: the merge is the base unless select_topk is 1.
    """

    select_topk: float = param(1.0, "share of the entries that are merged", low=0, high=1)

    paper = "arXiv 2408.07990"
    ignored = INT8_MASK

    def combine(self, group: TaskGroup) -> Tensor:
        selected = self.selection(group)
        weights = weights_of(group, selected)
        return in_blocks(group, partial(merged, selected=selected, weights=weights))

    def selection(self, group: TaskGroup) -> Selection:
        if self.select_topk >= 1 or group.tuned[0].numel() == 0:
            return lambda block: None
        from pymerge.ops.delta_kth import delta_kth

        spread = in_blocks(group, variance).view(-1)
        count = int(spread.count_nonzero() * self.select_topk)  # the product in float32, as in mergekit
        theta, index = delta_kth(None, [spread], [count])
        last = int(index)

        def selected(block: TaskGroup) -> Tensor:
            start = block.first - group.first
            part = spread[start : start + len(block.tuned[0])]
            keep = part > theta[0]
            if last > start:
                keep[: last - start].logical_or_(part[: last - start] == theta[0])
            return keep

        return selected

    def workspace(self, info: TensorInfo) -> int:
        return (4 * info.numel if self.select_topk < 1 else 0) + (4 * info.tasks + 40) * min(BLOCK, info.numel)


def variance(block: TaskGroup) -> Tensor:
    """Of each entry over the tasks, in one pass (Welford): exactly 0 where all tasks agree."""
    mean = block.delta(0)
    squares = mean.new_zeros(mean.shape)
    for t in range(1, len(block.tuned)):
        delta = block.delta(t)
        step = delta - mean
        mean.add_(step, alpha=1 / (t + 1))
        squares.addcmul_(step, delta.sub_(mean))
    return squares.div_(len(block.tuned)).clamp_(min=0)


def chosen(block: TaskGroup, selected: Selection) -> list[Tensor]:
    """d_t of each task."""
    keep = selected(block)
    deltas = [block.delta(t) for t in range(len(block.tuned))]
    return deltas if keep is None else [delta.mul_(keep) for delta in deltas]


def weights_of(group: TaskGroup, selected: Selection) -> list[float]:
    """w_t"""
    import torch

    tasks = len(group.tuned)
    squares: list[list[float]] = [[] for _ in range(tasks)]
    for block in blocks(group):
        for t, delta in enumerate(chosen(block, selected)):
            squares[t].append(float(delta.square_().sum(dtype=torch.float64)))
    means = [math.fsum(sums) / max(1, group.tuned[0].numel()) for sums in squares]
    total = math.fsum(means)
    return [1 / tasks] * tasks if total < _EQUAL_BELOW else [mean / total for mean in means]


def merged(block: TaskGroup, selected: Selection, weights: list[float]) -> Tensor:
    deltas = chosen(block, selected)
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total += delta
    elected = (total >= 0).float().mul_(2).sub_(1)
    out, divisor = total.zero_(), total.new_zeros(total.shape)
    for delta, weight in zip(deltas, weights, strict=True):
        share = delta.sign().mul_(elected).clamp_(min=0).mul_(weight)  # w_t e_t
        out.addcmul_(delta, share)
        divisor += share
    return out.div_(divisor.clamp_(min=_DIVISOR_FLOOR))
