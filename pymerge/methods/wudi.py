"""WUDI: the update that interferes least with the input subspaces of all tasks, found by a fixed number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pymerge.methods.base import MatrixCombine, TaskGroup, TensorInfo, param, register
from pymerge.methods.work import Work, passes

if TYPE_CHECKING:
    from torch import Tensor


@register("wudi")
@dataclass(frozen=True, kw_only=True)
class Wudi(MatrixCombine):
    """M after `steps` steps of Adam on L(M) = sum_t ||(M - D_t) D_t^T||^2 / ||D_t||^2, from M = sum_t D_t.

    lr and steps are part of the definition: an entry moves by lr a step at most or so, and L has a far minimum. Tasks
    with a zero D_t are left out. preset="released" leaves all other tensors at the base, as the authors' code does.
    """

    scale: float = param(1.0, "lambda, multiplies the merged update")
    lr: float = param(1e-5, "step size of Adam", low=0)
    steps: int = param(300, "steps of Adam", low=1)
    preset: Literal["default", "released"] = param(
        "default", "released: tensors that are no weight matrices stay at the base", choices=("default", "released")
    )

    paper = "arXiv 2503.08099"

    @property
    def rest(self) -> Literal["mean", "sum", "base"]:
        return "base" if self.preset == "released" else "mean"

    def combine(self, group: TaskGroup) -> Tensor:
        from pymerge.methods._wudi import Interference, adam

        problem = Interference(group)
        merged, losses = adam(problem, self.lr, self.steps)
        group.notes.facts |= {"loss": losses, "products": problem.form}
        if problem.skipped:
            group.notes.facts["skipped_tasks"] = problem.skipped
        return merged.mul_(self.scale)

    def work(self, info: TensorInfo) -> Work:
        """Gram matrices and products of each task once, then a product and Adam's passes a step."""
        m, n = info.shape
        by_factors = 2 * info.tasks * m < n
        task = 4.0 * m * n * min(m, n) + (0.0 if by_factors or m >= n else 2.0 * m * n**2)
        step = 4.0 * info.tasks * m**2 * n if by_factors else 2.0 * m * n**2
        steps = Work(single=step) + passes(info.numel, 7)
        return (Work(single=task) + passes(info.numel, 6)).times(info.tasks) + steps.times(self.steps + 1)

    def workspace(self, info: TensorInfo) -> int:
        """P, the gradient, both moments of Adam and the root of one; the Gram matrix of the inputs and one task's."""
        n = info.numel // max(1, info.shape[0])
        return 4 * (6 * info.numel + 2 * n * n)
