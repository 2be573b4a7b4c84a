"""CART: task vectors centred at the average of the models, truncated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.base import MatrixCombine, TaskGroup, TensorInfo, param, register
from pymerge.methods.work import Work, passes, truncated

if TYPE_CHECKING:
    from torch import Tensor


@register("cart")
@dataclass(frozen=True, kw_only=True)
class Cart(MatrixCombine):
    """M = A + c sum_t [D_t - A]_q: the average task vector and the top q = int(rho r) triplets of what differs from it.

    r = min(m, n), and q is at least 1. rho = 1 and c = 0 both give the average.
    """

    scale: float = param(1.0, "lambda, multiplies the merged update")
    rho: float = param(
        0.12, "share of the singular values that is kept; 0.16 for 14 tasks, 0.32 for 20", low=0, high=1, open_low=True
    )
    c: float = param(2.0, "weight of the truncated differences; 1.5 for 14 tasks, 1.9 for 20")

    paper = "arXiv 2412.12153"

    def combine(self, group: TaskGroup) -> Tensor:
        from pymerge.linalg import truncated_svd
        from pymerge.methods import _spectral as sp

        tasks = len(group.tuned)
        average = sp.sum_of_deltas(group.base, group.tuned, divisor=tasks)
        merged = average.clone()
        kept = min(merged.shape) and max(1, int(self.rho * min(merged.shape)))
        shares = []
        for t in range(tasks if kept else 0):
            found = truncated_svd(group.delta(t).sub_(average), kept)
            merged.addmm_(found.U * (found.S * self.c), found.Vh)
            shares.append(float(found.info.captured))
        group.notes.facts |= {"rank": kept, "captured": shares}
        return merged.mul_(self.scale)

    def work(self, info: TensorInfo) -> Work:
        """The leading triplets of each difference, and their product."""
        m, n = info.shape
        rank = max(1, int(self.rho * min(m, n)))
        task = truncated(m, n, rank) + Work(single=2.0 * m * n * rank) + passes(info.numel, 4)
        return task.times(info.tasks)

    def workspace(self, info: TensorInfo) -> int:
        """The average, a difference, singular vectors, Gram matrix and what its eigensolver takes in float64."""
        m = info.shape[0]
        n = info.numel // max(1, m)
        return 2 * 4 * info.numel + int(self.rho * 24 * (m + n) * min(m, n)) + 6 * 8 * min(m, n) ** 2
