"""LiNeS: the deeper a layer, the more of the update it gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.base import Calibrate, TaskGroup, TensorInfo, param, register
from pymerge.methods.param import Auto

if TYPE_CHECKING:
    from torch import Tensor


@register("lines")
@dataclass(frozen=True, kw_only=True)
class Lines(Calibrate):
    """Multiply the update of layer l of L by a + b l / (L - 1), and by a outside of the layers.

    Shallow layers hold what the base knows in general and change least. The authors' a is
    ||sum_t D_t||_1 / (T ||M||_1) with the merged update M, over the whole model: 1 / T where M is the sum of the task
    vectors, as in task arithmetic, and what to give where M is smaller or larger than that. b is tuned on validation
    data by the authors; the default leaves the deepest layer as it is. With one task only a is free, b = 1 - a: give a
    below 1. The only layer of a stack of one counts as the deepest.
    """

    a: float = param(Auto("1 / T"), "factor of the shallowest layer and of all that is in no layer", low=0)
    b: float = param(Auto("1 - a"), "what the deepest layer gets more than the shallowest")
    scale: float = param(1.0, "multiplies a and b")

    paper = "arXiv 2410.17146"
    unit = "entries"

    @property
    def on_cores(self) -> bool:
        return True

    def calibrate(self, update: Tensor, group: TaskGroup) -> Tensor:
        factor = self.factor(group.info)
        group.notes.facts["lines"] = factor
        return update.mul_(factor)

    def factor(self, info: TensorInfo) -> float:
        """What a tensor's update is multiplied by."""
        a = 1 / info.tasks if self.a is None else self.a
        b = 1 - a if self.b is None else self.b
        return self.scale * (a + b * (info.depth or 0.0))

    def workspace(self, info: TensorInfo) -> int:
        return 0
