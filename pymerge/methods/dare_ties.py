"""DARE, then the sign election of TIES."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pymerge.methods.base import (
    REQUIRED,
    STYLES,
    UNUSED,
    ElementWiseCombine,
    PerModel,
    Style,
    TensorInfo,
    param,
    per_task,
    register,
)
from pymerge.methods.selection import INT8_MASK, random_mask, trim_authors
from pymerge.methods.ties import NORM_OF, MergeFunc, Scope
from pymerge.ops.delta_rule import DeltaRule, Norm


@register("dare_ties")
@dataclass(frozen=True, kw_only=True)
class DareTies(ElementWiseCombine):
    """Random mask and rescale as `dare_linear`, then only entries with the elected sign are merged.

    authors   1 / density; then the authors' TIES with its trim (over masked magnitudes). Defaults of fusion_bench:
              drop rate 0.5, trim 0.2, sum, lambda 0.5.
    mergekit  L1 rescale; no trim; normalize divides by the weights of the entries that agree.
    """

    style: Style = param("authors", "whose formula and defaults", mergekit="mergekit", choices=STYLES)
    weight: PerModel = param(1.0, "w_t", per_model=True, mergekit=REQUIRED)
    density: PerModel = param(0.5, "probability of keeping an entry", low=0, high=1, per_model=True, mergekit=1.0)
    rescale: bool = param(True, "make up for the dropped entries")
    trim: PerModel = param(0.2, "share kept by magnitude after it", low=0, high=1, per_model=True, mergekit=UNUSED)
    merge_func: MergeFunc = param(
        "sum", "how agreeing entries become one", choices=("mean", "sum", "max"), mergekit=UNUSED
    )
    scope: Scope = param("global", "what is ranked together", choices=("tensor", "global"), mergekit=UNUSED)
    normalize: bool = param(UNUSED, "divide by the weights of agreeing entries", mergekit=False)
    scale: float = param(0.5, "lambda", mergekit=1.0)

    paper = "arXiv 2311.03099, 2306.01708"
    ignored = INT8_MASK

    @property
    def survey_scope(self) -> Literal["tensor", "model"]:
        return "model" if self.scope == "global" else "tensor"

    def rule(self, info: TensorInfo) -> DeltaRule:
        mask = random_mask(self.density, info)
        weights = per_task(self.weight, info.tasks, "weight")
        if self.style != "authors":
            norm: Norm = "weights" if self.normalize else "none"
            rescale = "l1" if self.rescale and mask else "none"
            return DeltaRule(weights=weights, scale=self.scale, rescale=rescale, elect="mergekit", norm=norm, **mask)
        trim = per_task(self.trim, info.tasks, "trim")
        return DeltaRule(
            weights=weights,
            scale=self.scale,
            rescale="keep" if self.rescale and mask else "none",
            top=None if min(trim) >= 1 else tuple(trim_authors(share, info.numel) for share in trim),
            keep_ties=True,
            mask_first=bool(mask),
            elect="authors",
            norm=NORM_OF[self.merge_func],
            **mask,
        )
