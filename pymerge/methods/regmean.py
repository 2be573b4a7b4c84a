"""RegMean: the merged layer whose outputs are nearest to those of every model's layer on its own inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.errors import NumericError
from pymerge.methods.base import LayerInput, MatrixCombine, TaskGroup, TensorInfo, param, register
from pymerge.methods.work import NOTHING, Work, cholesky_solve, passes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pymerge.linalg.solve import Solved

_RIDGE = 2.0**-20  # of the mean diagonal, then doubled
_MAX_CONDITION = 1e10  # float64 solves are off by some 1e-16 times this


@register("regmean")
@dataclass(frozen=True, kw_only=True)
class RegMean(MatrixCombine):
    """D = (sum_t D_t G~_t)(sum_t G~_t)^-1, G~_t = a G_t + (1 - a) diag(G_t), G_t = X_t^T X_t / N_t.

    With a = 1 it minimises sum_t ||X_t (D - D_t)^T||^2 / N_t. Models weigh equally, however many rows each has. A
    feature that is 0 in all samples of all models has nothing to say: its column is the mean of the models' columns.
    Where the sum of G~_t is singular otherwise, or its condition above 1e10 (a = 1, fewer rows than features), a ridge
    that pulls towards the mean is added, the least of 2^k 1e-6 of the mean diagonal that mends it. Matrices without
    statistics, and all other tensors, get the mean.

    a is 0.95 for vision and 0.6 for GPT-2 in FusionBench, 0.1 to 0.9 by task in the authors' scripts.

    Computed as D_T + (sum_{t<T} (D_t - D_T) G~_t)(sum_t G~_t)^-1: one product less.

    Cost: per task but one 2 m n^2 flops (N n^2 more where the rows are kept), n^3 / 3 + 2 m n^2 for the solve, all
    in float64; memory three n x n and four m x n in float64, whatever the number of models. Leaves in the summary:
    condition (estimated), ridge (relative to the mean diagonal), the number of features without a signal.
    """

    alpha: float = param(0.95, "a, how much of the off-diagonal is kept", low=0, high=1)
    scale: float = param(1.0, "lambda")

    paper = "arXiv 2212.09849"
    needs = ("covariance",)

    def workspace(self, info: TensorInfo) -> int:
        if len(info.shape) != 2:
            return 0
        m, n = info.shape
        return 8 * (3 * n * n + 4 * m * n)  # the sum, its factor, copies of both; right-hand sides, solutions, copies

    def work(self, info: TensorInfo) -> Work:
        """A product with each task's moments but the last's, one solve."""
        if len(info.shape) != 2:
            return NOTHING
        m, n = info.shape
        product = Work(double=2.0 * m * n**2).times(info.tasks - 1)
        return product + passes(info.numel + 2 * n * n, 4).times(info.tasks) + cholesky_solve(n, m)

    def combine(self, group: TaskGroup) -> Tensor:
        import torch

        if group.inputs is None:
            group.notes.facts["regmean"] = "mean: no statistics"
            return _mean(group).float().mul_(self.scale)
        m, n = group.tuned[0].shape
        total = torch.zeros(n, n, dtype=torch.float64, device=group.tuned[0].device)
        weighted = total.new_zeros(m, n)
        for task, seen in enumerate(group.inputs):
            gram = shrunk(seen, self.alpha, total.device)
            if task < len(group.inputs) - 1:
                weighted.addmm_(_from_last(group.delta(task), group), gram)
            total += gram
            del gram
        return self._solved(total, weighted, group).add_(group.delta(-1)).float().mul_(self.scale)

    def _solved(self, total: Tensor, weighted: Tensor, group: TaskGroup) -> Tensor:
        """weighted total^-1 [m, n], float64, to be added to the last task vector; both are overwritten."""
        from pymerge.linalg import capped_ridge, solve_psd

        facts, diagonal, mean = group.notes.facts, total.diagonal(), None
        silent = diagonal <= 0
        unit = float(diagonal[~silent].mean()) if not bool(silent.all()) else 1.0
        if bool(silent.any()):
            mean = _from_last(_mean(group), group)
            diagonal[silent] = unit  # their rows and columns are zero: solved apart from the others
            weighted[:, silent] = unit * mean[:, silent]
            facts["regmean_silent"] = int(silent.sum())
        solved, ridge = _well_solved(total, weighted), 0.0
        if solved is None:
            ridge = capped_ridge(total, _RIDGE * unit, _MAX_CONDITION)
            diagonal.add_(ridge)
            weighted.add_(_from_last(_mean(group), group) if mean is None else mean, alpha=ridge)
            solved = solve_psd(total, weighted, precision="float64")
        facts["regmean_condition"], facts["regmean_ridge"] = float(solved.condition), ridge / unit
        return solved.x


def _well_solved(total: Tensor, weighted: Tensor) -> Solved | None:
    """weighted total^-1, None where the result would not be sure to 1e-5."""
    from pymerge.linalg import solve_psd

    try:
        solved = solve_psd(total, weighted, precision="float64")
    except NumericError:
        return None
    return solved if float(solved.condition) <= _MAX_CONDITION else None


def shrunk(seen: LayerInput, alpha: float, device: torch.device) -> Tensor:
    """a G + (1 - a) diag(G) [n, n], float64, G = X^T X / N."""
    import torch

    gram = seen.second_moment(torch.float64).to(device)
    diagonal = gram.diagonal().clone()
    gram *= alpha / max(1, seen.rows)
    gram.diagonal().copy_(diagonal / max(1, seen.rows))
    return gram


def _from_last(delta: Tensor, group: TaskGroup) -> Tensor:
    """What a task vector [m, n] differs by from the last model's, float64."""
    return delta.double().sub_(group.delta(-1))  # both made for this: the first may be overwritten


def _mean(group: TaskGroup) -> Tensor:
    """Of the task vectors, float64."""
    total = group.delta(0).double()
    for task in range(1, len(group.tuned)):
        total += group.delta(task)
    return total.div_(len(group.tuned))
