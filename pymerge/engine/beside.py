"""What a method leaves in a file of its own beside the merged weights: checked with the plan, written when the weights
are final (EMR's masks, ESM++'s experts).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.engine.experts import check_experts, write_experts
from pymerge.engine.plan import Plan
from pymerge.errors import RecipeError

if TYPE_CHECKING:
    from pymerge.engine.execute import Executor


def check_beside(plan: Plan) -> Plan:
    """The plan with notes on the file. Raises RecipeError where it could not be written."""
    what = plan.recipe.combine_class.beside
    if what and plan.observed:
        raise RecipeError(
            f"{plan.recipe.method} looks at the models again for its {what}: observe them first (statistics, no data)"
        )
    if what == "masks" and plan.recipe.fused.joins:
        raise RecipeError(f"{plan.recipe.method} writes each task's mask tensor by tensor: no join")
    return replace(plan, notes=[*plan.notes, *check_experts(plan)]) if what == "experts" else plan


def write_beside(folder: Path, executor: Executor) -> dict[str, int]:
    """Writes the file into the folder of the finished weights. Returns its name and its checksum."""
    plan = executor.plan
    tasks = {"tasks": json.dumps([model.path for model in plan.recipe.models])}
    if plan.recipe.combine_class.beside == "masks":
        from pymerge.engine.masks import write_masks  # imports torch

        return write_masks(folder, plan, executor.steps_of, tasks)
    return write_experts(folder, plan, tasks)
