"""DARE: drop entries at random, rescale the rest, add."""

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
from pymerge.methods.selection import INT8_MASK, random_mask, weight_sum, zero_sum
from pymerge.ops.delta_rule import DeltaRule


@register("dare_linear")
@dataclass(frozen=True, kw_only=True)
class DareLinear(ElementWiseCombine):
    """W = W_0 + scale * sum_t w_t r_t B_t (W_t - W_0), B_t a random mask that keeps the share `density`.

    authors   r_t = 1 / density (density is one minus the paper's drop rate)
    mergekit  r_t restores the L1 norm of each tensor's task vector (1 where a norm is below 1e-7)
    """

    style: Style = param("authors", "whose formula and defaults", mergekit="mergekit", choices=STYLES)
    weight: PerModel = param(1.0, "w_t", per_model=True, mergekit=REQUIRED)
    density: PerModel = param(0.5, "probability of keeping an entry", low=0, high=1, per_model=True, mergekit=1.0)
    rescale: bool = param(True, "make up for the dropped entries")
    normalize: bool = param(False, "divide by the sum of the weights")
    scale: float = param(0.3, "lambda", mergekit=1.0)

    paper = "arXiv 2311.03099"
    ignored = INT8_MASK

    def conflicts(self) -> list[str]:
        return zero_sum(self.weight, self.normalize)

    def rule(self, info: TensorInfo) -> DeltaRule:
        mask = random_mask(self.density, info)
        rescale = "keep" if self.style == "authors" else "l1"
        return DeltaRule(
            weights=per_task(self.weight, info.tasks, "weight"),
            scale=self.scale,
            divisor=weight_sum(self.weight, info.tasks) if self.normalize else 1.0,
            rescale=rescale if self.rescale and mask else "none",
            **mask,
        )
