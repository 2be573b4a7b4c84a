"""Reinforced Agent Merging: what several tasks changed is averaged, what one alone changed is kept whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.base import Combine, TaskGroup, TensorInfo, param, register
from pymerge.methods.blocks import BLOCK, in_blocks

if TYPE_CHECKING:
    from torch import Tensor


@register("ram")
@dataclass(frozen=True, kw_only=True)
class Ram(Combine):
    """W = W_0 + sum_t a_t D_t / max(1, sum_t a_t), D_t = W_t - W_0, a_t = (|D_t| > epsilon), entry by entry.

    The mean goes over the tasks that changed an entry, not over all; changes up to epsilon are dropped.
    """

    epsilon: float = param(1e-5, "largest change of an entry that counts as none", low=0)

    paper = "arXiv 2601.13572"
    unit = "entries"

    def combine(self, group: TaskGroup) -> Tensor:
        return in_blocks(group, self._combine)

    def _combine(self, group: TaskGroup) -> Tensor:
        total = self.changes(group, 0)
        users = changed(total)
        for t in range(1, len(group.tuned)):
            delta = self.changes(group, t)
            users += changed(delta)
            total += delta
        return total.div_(users.clamp_(min=1.0))

    def changes(self, group: TaskGroup, task: int) -> Tensor:
        """a_t D_t: not 0 where the task changed an entry."""
        from torch.nn.functional import hardshrink

        return hardshrink(group.delta(task), self.epsilon)

    def workspace(self, info: TensorInfo) -> int:
        return 24 * min(BLOCK, info.numel)


def changed(delta: Tensor) -> Tensor:
    """a_t, in float32: faster than booleans that are added."""
    return delta.sign().abs_()
