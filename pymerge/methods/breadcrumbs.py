"""Model Breadcrumbs: drop the largest and the smallest entries of each task vector, add the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from pymerge.methods.selection import INT8_MASK, weight_sum, zero_sum
from pymerge.ops.delta_rule import DeltaRule


def middle_of_tensor(density: Any, gamma: Any, info: TensorInfo, style: Style) -> dict[str, Any]:
    """`skip` and `top` of a rule as mergekit counts them, over the whole tensor.

    int(density n) entries are kept below the int(gamma n) largest; fewer large ones are dropped where there would not
    be enough left. density 1 keeps everything, the largest too. Version 0.1.4 keeps nothing where int(gamma n) is 0:
    every small tensor loses its update.
    """
    n = info.numel
    skip, top = [], []
    for share, dropped in zip(
        per_task(density, info.tasks, "density"), per_task(gamma, info.tasks, "gamma"), strict=True
    ):
        kept = n if share >= 1 else int(share * n)
        largest = min(int(dropped * n), n - kept)
        if style == "mergekit-0.1.4" and share < 1 and largest == 0:
            kept = 0
        skip.append(largest)
        top.append(largest + kept)
    return {"skip": tuple(skip), "top": tuple(top)} if any(k < n for k in top) or any(skip) else {}


def middle_of_rows(density: Any, gamma: Any, info: TensorInfo) -> dict[str, Any]:
    """`skip`, `top`, `row_length` as the authors count them: by rows of the last dimension; a scalar is kept whole."""
    if not info.shape or info.numel == 0:
        return {}
    n = info.shape[-1]
    skip = tuple(int(n * g) for g in per_task(gamma, info.tasks, "gamma"))
    kept = per_task(density, info.tasks, "density")
    top = tuple(min(n, s + int(n * d)) for s, d in zip(skip, kept, strict=True))
    return {"skip": skip, "top": top, "row_length": n}


@register("breadcrumbs")
@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(ElementWiseCombine):
    """W = W_0 + scale * sum_t w_t M_t (W_t - W_0), M_t keeps the magnitudes below the share gamma, `density` of them.

    authors   in each row of the last dimension: the int(gamma n) largest are dropped, the int(density n) next are
              kept; rows too short for one entry (int(density n) = 0) keep nothing
    mergekit  over the whole tensor; int(density n) = 0 keeps nothing
    """

    style: Style = param("authors", "whose formula and defaults", mergekit="mergekit", choices=STYLES)
    weight: PerModel = param(1.0, "w_t", per_model=True, mergekit=REQUIRED)
    density: PerModel = param(0.2, "share to keep (beta)", low=0, high=1, per_model=True, mergekit=1.0)
    gamma: PerModel = param(0.1, "share of largest to drop", low=0, high=1, per_model=True, mergekit=0.01)
    normalize: bool = param(False, "divide by the sum of the weights")
    rescale: bool = param(UNUSED, "restore the L1 norm of each task vector", mergekit=False)
    scale: float = param(0.4, "lambda (alpha)", mergekit=1.0)

    paper = "arXiv 2312.06795"
    ignored = INT8_MASK

    def conflicts(self) -> list[str]:
        return zero_sum(self.weight, self.normalize)

    def rule(self, info: TensorInfo) -> DeltaRule:
        if self.style == "authors":
            window = middle_of_rows(self.density, self.gamma, info)
        else:
            window = middle_of_tensor(self.density, self.gamma, info, self.style)
        return DeltaRule(
            weights=per_task(self.weight, info.tasks, "weight"),
            scale=self.scale,
            divisor=weight_sum(self.weight, info.tasks) if self.normalize else 1.0,
            rescale="l1" if self.rescale else "none",
            **window,
        )
