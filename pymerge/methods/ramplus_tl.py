"""RAM+ of each tensor by itself: what one task alone changed counts more, the more else the task shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pymerge.methods.base import TaskGroup, TensorInfo, param, register
from pymerge.methods.blocks import BLOCK, blocks, in_blocks
from pymerge.methods.ram import Ram, changed

if TYPE_CHECKING:
    from torch import Tensor


@register("ramplus_tl")
@dataclass(frozen=True, kw_only=True)
class RamPlusTl(Ram):
    """`ram`, with entries that task t alone changed times l_t = 1 + r min(alpha, s_t / max(u_t, epsilon)).

    u_t  number of the tensor's entries that task t alone changed
    s_t  number of those that it and others changed: their update is diluted by the mean
    """

    r: float = param(0.1, "how much more for each shared entry beside an own one")
    alpha: float = param(0.2, "largest share that counts", low=0)

    unit = "tensor"

    def combine(self, group: TaskGroup) -> Tensor:
        tasks = len(group.tuned)
        shared, own = [0] * tasks, [0] * tasks
        for block in blocks(group):
            changes, users = self.used(block)
            several = (users > 1).float()
            for t, delta in enumerate(changes):
                mine = changed(delta)
                among_others = int(mine.dot(several))  # a block has fewer entries than float32 counts exactly
                shared[t] += among_others
                own[t] += int(mine.sum()) - among_others
        factors = [1.0 + self.r * self._share(s, u) for s, u in zip(shared, own, strict=True)]
        return in_blocks(group, partial(self._scaled, factors=factors))

    def _share(self, shared: int, own: int) -> float:
        """min(alpha, s_t / u_t); a task without entries of its own has no use for it."""
        return min(self.alpha, shared / max(own, self.epsilon)) if own else 0.0

    def _scaled(self, group: TaskGroup, factors: Sequence[float]) -> Tensor:
        import torch

        changes, users = self.used(group)
        total, scaled = changes[0].clone(), changes[0].mul(factors[0])
        for t in range(1, len(changes)):
            total += changes[t]
            scaled.add_(changes[t], alpha=factors[t])
        return torch.where(users == 1, scaled, total.div_(users.clamp_(min=1)))

    def used(self, group: TaskGroup) -> tuple[list[Tensor], Tensor]:
        """(a_t D_t of each task, number of tasks that changed each entry)"""
        changes = [self.changes(group, t) for t in range(len(group.tuned))]
        users = changed(changes[0])
        for delta in changes[1:]:
            users += changed(delta)
        return changes, users

    def workspace(self, info: TensorInfo) -> int:
        return (4 * info.tasks + 48) * min(BLOCK, info.numel)
