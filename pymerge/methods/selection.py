"""From shares to counts: the parts of a `DeltaRule` that several element-wise methods have in common."""

from __future__ import annotations

import math
from typing import Any, Final

from pymerge.errors import RecipeError
from pymerge.methods.base import TensorInfo, per_task
from pymerge.ops.delta_rule import DeltaRule, mask_key

INT8_MASK: Final = {"int8_mask": "the mask is never stored, so it has no type"}
_SUM_FLOOR = 1e-8  # below it mergekit's normalisation does not divide


def trim_exactly(density: float, entries: int) -> int:
    """Entries that a trim keeps in mergekit 0.1.5: int(density * entries), at least one unless density is 0."""
    if density >= 1:
        return entries
    return max(1, int(density * entries)) if density > 0 else 0


def trim_authors(density: float, entries: int) -> int:
    """Entries that the authors' TIES keeps, ties aside (prateeky2806/ties-merging merge_utils.py:topk_values_mask)."""
    return entries if density >= 1 else int(density * entries) + 1


def random_mask(density: Any, info: TensorInfo) -> dict[str, Any]:
    """`keep` and `keys` of a rule; nothing where every task keeps all."""
    keep = per_task(density, info.tasks, "density")
    if all(p >= 1 for p in keep):
        return {}
    return {"keep": keep, "keys": tuple(mask_key(info.seed, info.name, t) for t in range(info.tasks))}


def weight_sum(weight: Any, tasks: int) -> float:
    """The divisor of a normalised weighted sum."""
    return math.fsum(per_task(weight, tasks, "weight"))


def zero_sum(weight: Any, normalize: bool | None, switch: str = "normalize") -> list[str]:
    """The problem of weights that cannot be normalised, if they are normalised at all."""
    total = math.fsum(weight) if isinstance(weight, tuple) else weight
    if not normalize or abs(total) >= _SUM_FLOOR:
        return []
    return [f"weight: the weights sum to {total:g}, which cannot be normalised: change a weight or set {switch}: false"]


def refuse(rule: DeltaRule, step: str, *, mask: bool = False, window: bool = False, rescale: bool = False) -> None:
    """RecipeError where `step` would add a second random mask, magnitude window or rescaling to a rule that has one."""
    if mask and rule.keep is not None:
        raise RecipeError(f"purify {step}: two random masks in one recipe; leave one out")
    if window and (rule.top is not None or rule.skip is not None):
        raise RecipeError(
            f"purify {step}: two magnitude selections in one recipe; leave one out, or set its density to 1"
        )
    if rescale and rule.rescale != "none":
        raise RecipeError(f"purify {step}: two rescalings in one recipe; set rescale: false in one of the steps")
