"""One model's weights, as they are."""

from __future__ import annotations

from dataclasses import dataclass

from pymerge.methods.base import ElementWiseCombine, PerModel, TensorInfo, param, per_task, register
from pymerge.ops.delta_rule import DeltaRule


@register("passthrough")
@dataclass(frozen=True, kw_only=True)
class Passthrough(ElementWiseCombine):
    """W = s W_1: the one model of each slice, for models that are put together from layers of others."""

    scale: PerModel = param(1.0, "s, of all its weights", per_model=True)

    paper = "arXiv 2312.15166"
    base_role = "none"
    models = (1, 1)

    def rule(self, info: TensorInfo) -> DeltaRule:
        return DeltaRule(weights=per_task(self.scale, info.tasks, "scale"))
