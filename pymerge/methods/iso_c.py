"""Iso-C: the summed task vectors with an isotropic spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pymerge.methods.base import MatrixCombine, TaskGroup, TensorInfo, param, register
from pymerge.methods.work import Work, passes, polar

if TYPE_CHECKING:
    from torch import Tensor


@register("iso_c")
@dataclass(frozen=True, kw_only=True)
class IsoC(MatrixCombine):
    """M = mean(s) U V^T for the singular value decomposition U diag(s) V^T of the summed task vectors.

    The mean is over all min(m, n) singular values. The default leaves out the directions of those that are rounding
    errors of the stored weights; preset="released" gives them full weight, as the authors' code does: the same where
    the sum has full rank.
    """

    scale: float = param(1.0, "lambda, multiplies the merged update")
    preset: Literal["default", "released"] = param(
        "default", "released: every singular vector counts, also those of zeros", choices=("default", "released")
    )

    paper = "arXiv 2502.04959"

    @property
    def on_cores(self) -> bool:
        return self.preset == "default"  # else vectors of zeros count, which are arbitrary

    def combine(self, group: TaskGroup) -> Tensor:
        from pymerge.linalg import mean_singular_value, polar
        from pymerge.methods import _spectral as sp

        base, tuned = group.base, group.tuned
        total = sp.sum_of_deltas(base, tuned)
        tol = 0.0 if self.preset == "released" else sp.rank_tolerance(total, sum(sp.stored_errors(group)))
        found = polar(total, tol)
        share = min(total.shape) / max(1, min(group.info.shape))  # below 1: a core, beside which all values are zero
        mean, rank = float(mean_singular_value(found.factor, total)) * share, int(found.rank)
        group.notes.facts |= {"rank": rank, "mean_singular_value": mean, "condition": float(found.condition)}
        group.notes.basis = lambda: sp.directions_of_sum(base, tuned, rank)
        return found.factor.mul_(mean).mul_(self.scale)

    def work(self, info: TensorInfo) -> Work:
        """The polar factor of the sum."""
        return polar(*info.shape, decaying=True) + passes(info.numel, info.tasks + 8)

    def workspace(self, info: TensorInfo) -> int:
        """The sum, a float64 product in blocks, Gram matrix and what is inverted in float64."""
        r = min(info.shape[0], info.numel // max(1, info.shape[0]))
        return 2 * 4 * info.numel + 5 * 8 * r * r
