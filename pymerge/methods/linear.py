"""Weighted average of models."""

from __future__ import annotations

from dataclasses import dataclass

from pymerge.methods.base import REQUIRED, ElementWiseCombine, PerModel, TensorInfo, param, per_task, register
from pymerge.methods.selection import weight_sum, zero_sum
from pymerge.ops.delta_rule import DeltaRule


@register("linear")
@dataclass(frozen=True, kw_only=True)
class Linear(ElementWiseCombine):
    """W = sum_t w_t W_t / sum_t w_t. No base is subtracted; a base among the models is averaged like any other."""

    weight: PerModel = param(1.0, "w_t", per_model=True, mergekit=REQUIRED)
    normalize: bool = param(True, "divide by the sum of the weights")

    paper = "arXiv 2203.05482"
    base_role = "none"

    def conflicts(self) -> list[str]:
        return zero_sum(self.weight, self.normalize)

    def rule(self, info: TensorInfo) -> DeltaRule:
        weights = per_task(self.weight, info.tasks, "weight")
        return DeltaRule(weights=weights, divisor=weight_sum(weights, info.tasks) if self.normalize else 1.0)
