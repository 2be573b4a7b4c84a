"""Task arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from pymerge.methods.base import (
    REQUIRED,
    STYLES,
    ElementWiseCombine,
    PerModel,
    Style,
    TensorInfo,
    param,
    per_task,
    register,
)
from pymerge.methods.selection import INT8_MASK, weight_sum, zero_sum
from pymerge.ops.delta_rule import DeltaRule


@register("task_arithmetic")
@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(ElementWiseCombine):
    """W = W_0 + scale * sum_t w_t (W_t - W_0)."""

    style: Style = param("authors", "whose defaults", choices=STYLES)
    weight: PerModel = param(1.0, "w_t", per_model=True, mergekit=REQUIRED)
    normalize: bool = param(False, "divide by the sum of the weights")
    scale: float = param(0.3, "lambda; 0 returns the base", mergekit=1.0)

    paper = "arXiv 2212.04089"
    ignored = {"density": "nothing is trimmed", "rescale": "nothing is trimmed", **INT8_MASK}

    def conflicts(self) -> list[str]:
        return zero_sum(self.weight, self.normalize)

    def rule(self, info: TensorInfo) -> DeltaRule:
        weights = per_task(self.weight, info.tasks, "weight")
        divisor = weight_sum(weights, info.tasks) if self.normalize else 1.0
        return DeltaRule(weights=weights, scale=self.scale, divisor=divisor)
