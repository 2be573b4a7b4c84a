"""Magnitude trimming as a purify step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pymerge.errors import RecipeError
from pymerge.methods.base import ElementWisePurify, PerModel, TensorInfo, param, per_task, register
from pymerge.methods.selection import refuse, trim_exactly
from pymerge.ops.delta_rule import DeltaRule


@register("trim")
@dataclass(frozen=True, kw_only=True)
class Trim(ElementWisePurify):
    """Keep exactly int(density n) entries of largest magnitude (at least one unless density is 0), lowest index first
    among equals.

    n is the number of entries of the tensor; before a combine step with scope "global", of the whole model (then ties
    are kept).
    """

    density: PerModel = param(0.2, "share of entries to keep", low=0, high=1, per_model=True)
    rescale: bool = param(False, "restore the L1 norm of each task vector")

    paper = "arXiv 2306.01708, step 1"

    def amend(self, rule: DeltaRule, info: TensorInfo) -> DeltaRule:
        density = per_task(self.density, info.tasks, "density")
        if min(density) >= 1:
            return rule
        refuse(rule, self.name, window=True, rescale=self.rescale)
        if rule.rescale == "l1":
            raise RecipeError(
                "purify trim: the L1 rescale of the random mask that follows would undo the trim;"
                " use style: authors (division by density) or rescale: false there"
            )
        return replace(
            rule,
            top=tuple(trim_exactly(d, info.numel) for d in density),
            keep_ties=info.name == "",
            mask_first=False,
            rescale="l1" if self.rescale else rule.rescale,
        )
