"""The plan of a merge of models of which only the shapes are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.checkpoint import Checkpoint
from pymerge.checkpoint.index import read_json_object
from pymerge.checkpoint.shapes import PUBLISHED, made, shape_models
from pymerge.engine.local import plan_merge
from pymerge.engine.plan import Options, Plan
from pymerge.errors import InputError, RecipeError
from pymerge.methods import get
from pymerge.methods.base import Combine
from pymerge.recipe import ModelRef, Recipe

if TYPE_CHECKING:
    from pymerge.statistics import Statistics

REQUIRED = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.001}}  # what has no default; the time does not depend on it
LARGEST_CONFIG = 1 << 20  # bytes
SAMPLES = 1 << 20  # rows behind second moments: more than any layer is wide, so that those are kept and not the rows


def config_of(shape: str) -> Mapping[str, Any]:
    """A published config by name, or that of a config.json."""
    if shape in PUBLISHED:
        return PUBLISHED[shape]
    path = Path(shape)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--shape: {shape!r} is neither one of {', '.join(PUBLISHED)} nor a config.json")
    return read_json_object(path, LARGEST_CONFIG)


def plan_shape(shape: str, method: str, models: int, options: Options) -> Plan:
    """A method at its defaults, on `models` models and the base that they were fine-tuned from.

    Raises   RecipeError: the method is unknown, is for another number of models, or for adapters"""
    cls = get(method)
    if not issubclass(cls, Combine):
        raise RecipeError(f"--method: {method} is a {cls.step} step: give a recipe that has it")
    if "adapters" in cls.needs:
        raise RecipeError(f"--method: {method} merges LoRA adapters, whose cost is that of their ranks: give a recipe")
    config = config_of(shape)
    base, *tuned = shape_models(config, models + 1)
    beside: dict[str, Any] = {}
    if "covariance" in cls.needs:
        beside["statistics"] = [moments_of(base) for _ in tuned]
    if "fisher" in cls.needs:
        beside["fisher"] = list(shape_models(config, models))
    base = None if cls.base_role == "none" else base
    recipe = Recipe.from_kwargs(base, tuned, method, **beside, **REQUIRED.get(method, {}))
    return plan_merge(recipe, options)


def moments_of(model: Checkpoint) -> Statistics:
    """Statistics without values: second moments of the input of each matrix."""
    from pymerge.statistics.store import Header, Statistics

    widths = {
        name.removesuffix(".weight"): tensor.shape[1]
        for name, tensor in model.items()
        if len(tensor.shape) == 2 and ".layers." in name
    }
    file = made({f"{name}.mean": (width,) for name, width in widths.items()}, "F32")
    return Statistics(
        header=Header(model={}, data={}, modules={name: name for name in widths}),
        file=Checkpoint(None, None, file, []),
        rows=dict.fromkeys(widths, SAMPLES),
    )


def reshaped(recipe: Recipe, shape: str) -> Recipe:
    """A recipe with models of a shape in place of its own."""
    if recipe.modules or recipe.vocabulary is not None or recipe.align is not None:
        raise RecipeError("--shape: a recipe of slices, modules, tokens or permutations depends on its own models")
    if any(beside_of(model) for model in recipe.models):
        raise RecipeError("--shape: statistics, data and Fisher information are of a recipe's own models")
    refs = {ref.path: ref for ref in (*([recipe.base] if recipe.base else []), *recipe.models, *recipe.listed)}
    values = dict(zip(refs, shape_models(config_of(shape), len(refs)), strict=True))

    def other(ref: ModelRef) -> ModelRef:
        return replace(ref, value=values[ref.path], found=None)

    def others(refs: Sequence[ModelRef]) -> tuple[ModelRef, ...]:
        return tuple(map(other, refs))

    base = other(recipe.base) if recipe.base is not None else None
    return replace(recipe, base=base, models=others(recipe.models), listed=others(recipe.listed))


def beside_of(ref: ModelRef) -> bool:
    return ref.fisher is not None or ref.statistics is not None or ref.data is not None
