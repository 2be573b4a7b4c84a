"""Which steps look at more than one tensor before anything is merged, and which of a recipe's steps are one rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pymerge.methods.base import ElementWiseCombine, Purify, merges_by_rule
from pymerge.methods.surveyed import SurveyedCombine, SurveyedPurify
from pymerge.recipe import Steps

if TYPE_CHECKING:
    from pymerge.engine.plan import Item


def survey_key(steps: Steps) -> tuple[int, ...]:
    """Equal for steps whose element-wise part is the same: they are surveyed together, matrices (behind the purify
    steps that act on these alone) with the other tensors."""
    return (*(id(step) for step in steps.purify if step.element_wise), id(steps.combine))


def rule_part(steps: Steps) -> tuple[tuple[Purify, ...], tuple[Purify, ...]]:
    """The purify steps up to the last that is no rule, and the element-wise ones behind, which go into the combine
    step's rule where it takes them."""
    last = max((i + 1 for i, step in enumerate(steps.purify) if not step.element_wise), default=0)
    if not merges_by_rule(steps.purify[last:], steps.combine):
        last = len(steps.purify)
    return steps.purify[:last], steps.purify[last:]


def asking_purify(steps: Steps | None) -> SurveyedPurify | None:
    """The purify step that asks something of all matrices, if there is one."""
    first = steps.purify[0] if steps is not None and steps.purify else None
    return first if isinstance(first, SurveyedPurify) and first.asks else None


def survey_scope(steps: Steps) -> str:
    return steps.combine.survey_scope if isinstance(steps.combine, ElementWiseCombine) else "tensor"


def asks_model(steps: Steps | None) -> SurveyedCombine | None:
    """The combine step, if it asks something of all tensors before it merges any."""
    combine = steps.combine if steps is not None else None
    return combine if isinstance(combine, SurveyedCombine) and combine.survey_scope == "model" else None


def by_steps(items: Sequence[Item]) -> dict[tuple[int, ...], tuple[Steps, tuple[Item, ...]]]:
    """Items whose steps up to combine are the same: they are surveyed together."""
    groups: dict[tuple[int, ...], list[Item]] = {}
    steps: dict[tuple[int, ...], Steps] = {}
    for item in items:
        assert item.entry.steps is not None
        key = survey_key(item.entry.steps)
        steps.setdefault(key, item.entry.steps)
        groups.setdefault(key, []).append(item)
    return {key: (steps[key], tuple(found)) for key, found in groups.items()}


def purify_questions(items: Sequence[Item]) -> tuple[tuple[SurveyedPurify, tuple[Item, ...]], ...]:
    """Each purify step that asks, with all matrices that it acts on."""
    found: dict[int, tuple[SurveyedPurify, list[Item]]] = {}
    for item in items:
        step = asking_purify(item.entry.steps)
        if step is not None and item.mode == "generic":
            found.setdefault(id(step), (step, []))[1].append(item)
    return tuple((step, tuple(matrices)) for step, matrices in found.values())
