"""Model Breadcrumbs, then the sign election of TIES."""

from __future__ import annotations

from dataclasses import dataclass

from pymerge.methods.base import ElementWiseCombine, PerModel, Style, TensorInfo, param, per_task, register
from pymerge.methods.breadcrumbs import middle_of_tensor
from pymerge.methods.selection import INT8_MASK
from pymerge.ops.delta_rule import DeltaRule


@register("breadcrumbs_ties")
@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(ElementWiseCombine):
    """The middle magnitudes of each task vector (`breadcrumbs`, over the whole tensor), merged where they have the
    elected sign.

    mergekit's combination; the authors of Breadcrumbs have no such method, so its style is mergekit's in Python too
    (weights that are not given are 1; mergekit requires them).
    """

    style: Style = param("mergekit", "which version's rules", choices=("mergekit", "mergekit-0.1.4"))
    weight: PerModel = param(1.0, "w_t", per_model=True)
    density: PerModel = param(1.0, "share of entries to keep", low=0, high=1, per_model=True)
    gamma: PerModel = param(0.01, "share of largest to drop", low=0, high=1, per_model=True)
    normalize: bool = param(False, "divide by the weights of agreeing entries")
    rescale: bool = param(False, "restore the L1 norm of each task vector")
    scale: float = param(1.0, "lambda")

    paper = "arXiv 2312.06795, 2306.01708"
    ignored = INT8_MASK

    def rule(self, info: TensorInfo) -> DeltaRule:
        return DeltaRule(
            weights=per_task(self.weight, info.tasks, "weight"),
            scale=self.scale,
            rescale="l1" if self.rescale else "none",
            elect="mergekit",
            norm="weights" if self.normalize else "none",
            **middle_of_tensor(self.density, self.gamma, info, self.style),
        )
