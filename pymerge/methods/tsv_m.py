"""TSV-M: task singular vectors, decorrelated and summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pymerge.methods.base import MatrixCombine, TaskGroup, TensorInfo, param, register
from pymerge.methods.work import Work, passes, polar, truncated

if TYPE_CHECKING:
    from torch import Tensor


@register("tsv_m")
@dataclass(frozen=True, kw_only=True)
class TsvM(MatrixCombine):
    """M = polar(U) diag(S) polar(V)^T: the top r/T singular triplets of each task, their stacks made orthonormal.

    The default leaves out singular values that are rounding errors of the stored weights, and directions in which the
    stacks have none of their own (polar factors are partial isometries). preset="released" gives both full weight, as
    the authors' code does: the same where the task vectors have full rank. Fewer rows or columns than tasks: M = 0.
    """

    scale: float = param(1.0, "lambda, multiplies the merged update")
    preset: Literal["default", "released"] = param(
        "default", "released: every singular vector counts, also those of zeros", choices=("default", "released")
    )

    paper = "arXiv 2412.00081"

    @property
    def on_cores(self) -> bool:
        return self.preset == "default"  # else vectors of zeros count, which are arbitrary

    def combine(self, group: TaskGroup) -> Tensor:
        import torch

        from pymerge.methods import _spectral as sp

        m, n = group.tuned[0].shape
        tasks = len(group.tuned)
        count = int(min(group.info.shape) * (1 / tasks))  # as the authors: not r // T for r = T = 49
        if count == 0:
            group.notes.facts["rank"] = 0
            return torch.zeros(m, n, device=group.tuned[0].device)
        released = self.preset == "released"
        errors, parts = sp.stored_errors(group), []
        for t in range(tasks):
            delta = group.delta(t)
            noise = None if released else sp.noise_level(sp.spread(delta), errors[t])
            parts.append(sp.top_triplets(delta, min(count, m, n), noise))
        tol = sp.stack_tolerance(parts, released)
        left = sp.polar_of_stack([p.left for p in parts], tol)
        right = sp.polar_of_stack([p.right for p in parts], tol)
        values = torch.cat([p.s for p in parts])
        sp.note_ranks(group, parts)
        group.notes.facts["mean_singular_value"] = sp.sum64(values) / (count * tasks)
        group.notes.facts["condition"] = [float(left.condition), float(right.condition)]
        return ((left.factor * values) @ right.factor.mT).mul_(self.scale)

    def work(self, info: TensorInfo) -> Work:
        """The leading triplets of each task, both polar factors, their product."""
        m, n = info.shape
        count = min(m, n) // info.tasks
        kept = count * info.tasks
        each = truncated(m, n, count) + passes(info.numel, 4)
        return each.times(info.tasks) + polar(m, kept) + polar(n, kept) + Work(single=2.0 * m * n * kept)

    def workspace(self, info: TensorInfo) -> int:
        """A task vector; both stacks and their factors; Gram matrix and eigenvectors in float64, and a polar factor's
        products with them; as measured for two tasks, the most."""
        m, n = info.shape[0], info.numel // max(1, info.shape[0])
        return 4 * info.numel + (3 * 4 + 8) * (m + n) * min(m, n) + 7 * 8 * min(m, n) ** 2
