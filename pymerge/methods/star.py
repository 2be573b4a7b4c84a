"""STAR: truncated task vectors, rescaled to their nuclear norm, averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.base import MatrixCombine, TaskGroup, TensorInfo, param, register
from pymerge.methods.work import Work, eigen, gram, passes, truncated

if TYPE_CHECKING:
    from torch import Tensor


@register("star")
@dataclass(frozen=True, kw_only=True)
class Star(MatrixCombine):
    """M = mean_t of the leading part of D_t, its singular values times (their sum before) / (their sum after).

    The leading part is that of the fewest values whose sum reaches eta percent of the nuclear norm; a sum that meets it
    to the last bits may come out on either side. A zero task vector gives zeros and counts in the mean.
    """

    scale: float = param(1.0, "lambda, multiplies the merged update")
    eta: float = param(40.0, "percent of the nuclear norm that is kept", low=0, high=100)

    paper = "arXiv 2502.10339"

    def combine(self, group: TaskGroup) -> Tensor:
        import torch

        from pymerge.linalg import singular_values, truncated_svd
        from pymerge.methods import _spectral as sp

        tasks = len(group.tuned)
        merged = torch.zeros(group.tuned[0].shape, device=group.tuned[0].device)
        ranks, shares = [0] * tasks, [0.0] * tasks
        for t in range(tasks):
            delta = group.delta(t)
            partial = singular_values(delta).double().cumsum(0)
            norm = float(partial[-1]) if len(partial) else 0.0
            if norm == 0.0:
                continue
            ranks[t] = 1 + int((partial < self.eta / 100 * norm).sum())
            found = truncated_svd(delta, ranks[t])
            shares[t] = sp.sum64(found.S) / norm
            merged.addmm_(found.U * (found.S / (tasks * shares[t])), found.Vh)
        group.notes.facts |= {"ranks": ranks, "nuclear_shares": shares}
        if 0 in ranks:
            group.notes.facts["skipped_tasks"] = [t for t in range(tasks) if not ranks[t]]
        return merged.mul_(self.scale)

    def work(self, info: TensorInfo) -> Work:
        """Singular values and leading triplets of each task: about half of eta percent of them, as of random ones."""
        m, n = info.shape
        rank = max(1, int(self.eta / 200 * min(m, n)))
        values = gram(min(m, n), max(m, n)) + eigen(min(m, n), 0.0)
        task = values + truncated(m, n, rank) + Work(single=2.0 * m * n * rank) + passes(info.numel, 3)
        return task.times(info.tasks)

    def workspace(self, info: TensorInfo) -> int:
        """A task vector, singular vectors, Gram matrix and eigenvectors in float64."""
        m = info.shape[0]
        n = info.numel // max(1, m)
        return 4 * info.numel + 12 * (m + n) * min(m, n) + 3 * 8 * min(m, n) ** 2
