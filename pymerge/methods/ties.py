"""TIES: trim, elect signs, merge what agrees."""

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
from pymerge.methods.selection import INT8_MASK, trim_authors, trim_exactly
from pymerge.ops.delta_rule import DeltaRule, Norm

MergeFunc = Literal["mean", "sum", "max"]
Scope = Literal["tensor", "global"]
NORM_OF: dict[MergeFunc, Norm] = {"mean": "count", "sum": "none", "max": "max"}


@register("ties")
@dataclass(frozen=True, kw_only=True)
class Ties(ElementWiseCombine):
    """Keep the largest entries of each task vector, elect a sign for each entry, merge the entries that have it.

    authors   int(density n) + 1 entries and every entry equal to the smallest of them are kept; where the summed
              entries cancel, the sign is the majority of all signs; merge_func over the kept non-zero entries that
              agree.
    mergekit  exactly int(density n) entries (at least one unless density is 0), lowest index first among equals; +
              where the sum cancels; normalize divides by the weights of the entries that agree (0: by 1).
    n is the number of entries of the tensor, or with scope "global" of the whole model; then ties are kept in both
    styles.
    """

    style: Style = param("authors", "whose formula and defaults", mergekit="mergekit", choices=STYLES)
    weight: PerModel = param(1.0, "w_t, multiplies the trimmed task vector", per_model=True, mergekit=REQUIRED)
    density: PerModel = param(0.2, "share of entries to keep", low=0, high=1, per_model=True, mergekit=1.0)
    merge_func: MergeFunc = param(
        "mean", "how agreeing entries become one", choices=("mean", "sum", "max"), mergekit=UNUSED
    )
    normalize: bool = param(UNUSED, "divide by the weights of agreeing entries", mergekit=True)
    rescale: bool = param(UNUSED, "restore the L1 norm after trimming", mergekit=False)
    scope: Scope = param("global", "what is ranked together", choices=("tensor", "global"), mergekit="tensor")
    scale: float = param(1.0, "lambda")

    paper = "arXiv 2306.01708"
    ignored = INT8_MASK

    @property
    def survey_scope(self) -> Literal["tensor", "model"]:
        return "model" if self.scope == "global" else "tensor"

    def rule(self, info: TensorInfo) -> DeltaRule:
        authors = self.style == "authors"
        density = per_task(self.density, info.tasks, "density")
        count = trim_authors if authors else trim_exactly
        norm: Norm = NORM_OF[self.merge_func] if authors else "weights" if self.normalize else "none"
        return DeltaRule(
            weights=per_task(self.weight, info.tasks, "weight"),
            scale=self.scale,
            top=None if min(density) >= 1 else tuple(count(d, info.numel) for d in density),
            keep_ties=authors or self.scope == "global",
            rescale="l1" if self.rescale else "none",
            elect="authors" if authors else "mergekit",
            norm=norm,
        )
