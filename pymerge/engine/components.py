"""Models of several components in sub-folders: which components they have, and of which classes."""

from __future__ import annotations

from collections.abc import Sequence

from pymerge.checkpoint import Checkpoint, safe_name
from pymerge.checkpoint.components import declared
from pymerge.checkpoint.layout import component_of
from pymerge.errors import InputError
from pymerge.recipe import Recipe


def check_components(
    recipe: Recipe, base: Checkpoint | None, models: Sequence[Checkpoint], labels: Sequence[str]
) -> None:
    """Refuses models whose components do not fit: one line a component, where headers would give one a tensor.

    Raises   InputError, with all problems."""
    first, where = (models[0], labels[0]) if base is None else (base, "base")
    own, problems, extra = classes(first), [], recipe.relaxations.get("extra")
    for label, model in zip(labels, models, strict=True):
        other = classes(model)
        for name in {**own, **other}:
            here, there = own.get(name), other.get(name)
            if here == there or (here and not there and "missing" in recipe.relaxations):
                continue
            if not here and extra is not None:
                fits = extra == "drop"  # a copy would need its configs too
            else:
                fits = not is_merged(recipe, name, first if here else model)
            if not fits:
                hint = "relax: {extra: drop}" if extra else f'exclude: ["{safe_name(name)}/*"]'
                shown = f"{here or 'absent'} in {where}, {there or 'absent'} in {label}: {hint} leaves it out"
                problems.append(f"component {safe_name(name) or '(the folder itself)'}: {shown}")
    if problems:
        raise InputError("\n".join(dict.fromkeys(problems)))


def classes(model: Checkpoint) -> dict[str, str]:
    """Component with weights -> its class; empty for a plain model."""
    if not model.components or model.folder is None:
        return {}
    listed = declared(model.folder)
    return {name: listed.get(name) or listed.get(name.partition("/")[0], "a model") for name in model.components}


def is_merged(recipe: Recipe, component: str, model: Checkpoint) -> bool:
    """Whether the recipe selects anything of a component."""
    return any(component_of(name, model.components) == component and recipe.selects(name) for name in model)
