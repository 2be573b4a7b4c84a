"""DARE as a purify step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pymerge.errors import RecipeError
from pymerge.methods.base import STYLES, ElementWisePurify, PerModel, Style, TensorInfo, param, register
from pymerge.methods.selection import random_mask, refuse
from pymerge.ops.delta_rule import DeltaRule


@register("dare")
@dataclass(frozen=True, kw_only=True)
class Dare(ElementWisePurify):
    """Drop entries of each task vector at random and make up for them, before any combine step on task vectors.

    authors   kept entries are divided by density
    mergekit  the L1 norm of each tensor's task vector is restored; not possible together with a magnitude selection
              in the same recipe
    """

    style: Style = param("authors", "whose formula and defaults", mergekit="mergekit", choices=STYLES)
    density: PerModel = param(0.5, "probability of keeping an entry", low=0, high=1, per_model=True)
    rescale: bool = param(True, "make up for the dropped entries")

    paper = "arXiv 2311.03099"

    def amend(self, rule: DeltaRule, info: TensorInfo) -> DeltaRule:
        mask = random_mask(self.density, info)
        if not mask:
            return rule
        window = rule.top is not None or rule.skip is not None
        refuse(rule, self.name, mask=True, rescale=self.rescale)
        if rule.rescale == "l1":
            raise RecipeError("purify dare: the combine step's rescale would undo the mask's; set its rescale: false")
        if window and self.rescale and self.style != "authors":
            raise RecipeError(
                "purify dare: the L1 rescale of style mergekit cannot be combined with a magnitude selection;"
                " use style: authors (division by density) or rescale: false"
            )
        rescale = "none" if not self.rescale else "keep" if self.style == "authors" else "l1"
        return replace(rule, rescale=rescale, mask_first=window, **mask)
