"""Steps of a recipe that are each fine and do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pymerge.errors import RecipeError
from pymerge.methods.base import Combine, Method, Purify, TensorInfo, chain_rule, merges_by_rule
from pymerge.recipe.problems import Problems
from pymerge.recipe.steps import StepTemplate


def check_together(templates: Sequence[StepTemplate], purify: int, has_base: bool, problems: Problems) -> None:
    """Of all steps the first `purify` are purify steps. Where hyperparameters differ by tensor, the plan checks."""
    combine = templates[purify].cls
    assert issubclass(combine, Combine)
    if purify and not combine.subtracts(has_base):
        hint = "; give base_model" if combine.base_role == "optional" else ""
        problems.add("purify", f"{combine.name} merges whole weights, purify steps need task vectors{hint}")
        return
    if late := [template.cls.name for template in templates[1:purify] if _needs_weights(template.cls)]:
        problems.add("purify", f"{late[0]} needs the models' weights, not task vectors: make it the first step")
        return
    if combine.sequential and (observing := [t.cls.name for t in templates[:purify] if "covariance" in t.cls.needs]):
        text = f"{observing[0]} and {combine.name} take different inputs of a layer: leave one out"
        problems.add("purify", text)
        return
    if len(templates) > purify + 1 and combine.base_role != "required":
        problems.add("calibrate", f"{combine.name} merges whole weights, calibrate steps need a merged update")
        return
    if not all(template.static for template in templates):
        return
    try:
        steps: list[Any] = [template.at("", 0.0) for template in templates]
        if merges_by_rule(steps[:purify], steps[purify]):
            tasks = len(templates[purify].labels)
            chain_rule(steps[:purify], steps[purify], TensorInfo(name="any", shape=(64, 64), tasks=tasks))
    except RecipeError as e:
        for line in str(e).splitlines():
            problems.add("", line)


def _needs_weights(cls: type[Method]) -> bool:
    return issubclass(cls, Purify) and cls.whole_weights
