"""Iso-CTS: an isotropic spectrum over common and task-specific directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pymerge.methods.base import MatrixCombine, TaskGroup, TensorInfo, param, register
from pymerge.methods.work import Work, eigen, gram, passes, polar, truncated

if TYPE_CHECKING:
    from torch import Tensor


@register("iso_cts")
@dataclass(frozen=True, kw_only=True)
class IsoCTS(MatrixCombine):
    """M = mean(s) polar(U) polar(V)^T: U, V stack the top singular vectors of the sum and of what each task adds.

    Of r = min(m, n) directions, the common ones are the leading of sum_t D_t; each task gives n_t more, the leading of
    D_t - U_c U_c^T D_t. T n_t is r less the common share, rounded to a multiple of T (at most r). The mean is over all
    r stacked values. The default leaves out directions whose singular values are rounding errors of the stored weights;
    preset="released" gives them full weight, as the authors' code does: the same where all have full rank.
    """

    scale: float = param(1.0, "lambda, multiplies the merged update")
    common_space_fraction: float = param(0.8, "share of the directions that the sum gives", low=0, high=1)
    preset: Literal["default", "released"] = param(
        "default", "released: every singular vector counts, also those of zeros", choices=("default", "released")
    )

    paper = "arXiv 2502.04959"

    def split(self, r: int, tasks: int) -> tuple[int, int]:
        """How many directions are common, and how many each task adds."""
        wanted = round((r - int(r * self.common_space_fraction)) / tasks)  # half to even, as the authors' code
        each = min(wanted, r // tasks)
        return r - each * tasks, each

    def combine(self, group: TaskGroup) -> Tensor:
        from pymerge.methods import _common_space as cs
        from pymerge.methods import _spectral as sp

        base, tuned, tasks = group.base, group.tuned, len(group.tuned)
        r = min(tuned[0].shape)
        count, each = self.split(r, tasks)
        released = self.preset == "released"
        total, sizes = sp.sum_and_sizes(group)
        errors = sp.stored_errors(group)
        tol = 0.0 if released else sp.rank_tolerance(total, sum(errors), sum(sizes))
        common = cs.common_space(total, count, tol)
        del total
        parts = []
        for t in range(tasks if each else 0):
            noise = None if released else max(sp.noise_level(sizes[t], errors[t]), common.angle * sizes[t])
            parts.append(cs.outside(group.delta(t), common, each, noise))
        sp.note_ranks(group, parts)
        facts = group.notes.facts
        facts["common_rank"] = rank = common.rank
        facts["mean_singular_value"] = mean = (common.values + sum(sp.sum64(p.s) for p in parts)) / max(1, r)
        if not any(len(p.s) for p in parts):
            group.notes.basis = lambda: sp.directions_of_sum(base, tuned, rank)
            return common.product.mul_(mean).mul_(self.scale)
        left, right, stack_tol = cs.stacks(parts, released)
        merged, condition = cs.stacked_product(common, left.factor, right, stack_tol)
        facts["condition"] = [float(left.condition), condition]
        group.notes.basis = lambda: cs.stacked_directions(base, tuned, rank, left.factor, right, stack_tol)
        return merged.mul_(mean).mul_(self.scale)

    def work(self, info: TensorInfo) -> Work:
        """The polar factor and the last directions of the sum, triplets of each task outside the common ones, and the
        polar factors of both stacks with the products between them."""
        m, n = info.shape
        r, long = min(m, n), max(m, n)
        count, each = self.split(r, info.tasks)
        own, left = each * info.tasks, r - count
        total = (
            polar(m, n, decaying=True) + gram(r, long) + eigen(r, left / max(1, r)) + passes(info.numel, 6 * info.tasks)
        )
        if m <= n:
            task = Work(single=2.0 * left * m * n) + truncated(left, n, each)
        else:
            task = Work(single=4.0 * m * n * n) + truncated(m, n, each)
        stacks = polar(m, own) + gram(own, m) + gram(2 * own, n) + eigen(own) + eigen(2 * own)
        return total + task.times(info.tasks) + stacks + Work(single=18.0 * m * n * own)

    def workspace(self, info: TensorInfo) -> int:
        """The sum and its polar factor, a task vector, stacks, products of that size; Gram matrices and their
        eigenvectors in float64; as measured where two tasks leave half of the directions to each, the most."""
        r = min(info.shape[0], info.numel // max(1, info.shape[0]))
        return 8 * 4 * info.numel + 8 * 8 * r * r
