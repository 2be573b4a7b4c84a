"""Consensus merging: keep what at least k tasks have a use for, by their TALL masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.base import Combine, PerModel, TaskGroup, TensorInfo, param, per_task, register
from pymerge.methods.blocks import BLOCK, in_blocks
from pymerge.methods.param import Auto

if TYPE_CHECKING:
    from torch import Tensor


@register("consensus")
@dataclass(frozen=True, kw_only=True)
class Consensus(Combine):
    """scale * D where at least k of the masks |D_t| > l_t |D - D_t| are true, D = sum_t D_t; 0 elsewhere.

    An entry that one task alone uses is selfish, one that none uses is noise of the sum. k = 0 keeps all entries, k > T
    none. The authors choose l_t of 0.2, 0.3, ..., 0.6 and scale on validation data. With one task D - D_1 is 0 and the
    mask holds every entry that is not 0.
    """

    threshold: PerModel = param(
        0.4, "l_t: how much of the other tasks' sum an entry must exceed", low=0, per_model=True
    )
    k: int = param(Auto("2; 1 with one task", kind=int), "tasks that must use an entry", low=0)
    scale: float = param(1.0, "lambda")

    paper = "arXiv 2405.07813"
    unit = "entries"

    def combine(self, group: TaskGroup) -> Tensor:
        return in_blocks(group, self._combine)

    def _combine(self, group: TaskGroup) -> Tensor:
        import torch

        tasks = len(group.tuned)
        threshold = per_task(self.threshold, tasks, "threshold")
        needed = min(2, tasks) if self.k is None else self.k
        total = group.delta(0)
        for t in range(1, tasks):
            total += group.delta(t)
        users = torch.zeros(total.shape, dtype=torch.int16, device=total.device)
        for t in range(tasks):
            users += is_used(group.delta(t), total, threshold[t])
        return total.mul_(self.scale).masked_fill_(users < needed, 0)

    def workspace(self, info: TensorInfo) -> int:
        return 24 * min(BLOCK, info.numel)


def is_used(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """The TALL mask of a task, given its task vector, which is overwritten."""
    others = (total - delta).abs_().mul_(threshold)
    return delta.abs_() > others
