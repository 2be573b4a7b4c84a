"""A recipe from Python arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pymerge.errors import RecipeError
from pymerge.methods import REGISTRY
from pymerge.methods.base import Combine
from pymerge.methods.param import params_of
from pymerge.recipe.keys import BESIDE_MODEL, KEYS
from pymerge.recipe.problems import Problems

WHAT = {
    "fisher": "the Fisher information of each: paths or state dicts",
    "statistics": "what `observe` found of each: paths or Statistics",
    "data": "samples of the task of each: paths or batches",
}


def python_mapping(
    base: Any, models: Sequence[Any], method: str, options: Mapping[str, Any], problems: Problems
) -> dict[str, Any]:
    """The mapping of a recipe from Python arguments: lists for per-model hyperparameters go to their models."""
    if isinstance(models, str | os.PathLike) or not isinstance(models, Sequence):
        raise RecipeError(f"merge: models must be a list of models, got {type(models).__name__}")
    cls = REGISTRY.get(method)
    known = params_of(cls) if cls else {}
    models = list(models)
    if cls is not None and issubclass(cls, Combine) and cls.base_role == "first" and base is None and models:
        base, models = models[0], models[1:]
    raw: dict[str, Any] = {"base_model": base, "merge_method": method, "parameters": {}}
    entries: list[dict[str, Any]] = [{"model": model, "parameters": {}} for model in models]
    for name, value in options.items():
        if name in KEYS:
            raw[name] = [_python_step(v) for v in _as_list(value)] if name in ("purify", "calibrate") else value
        elif name in BESIDE_MODEL or (name in known and known[name].per_model and isinstance(value, list | tuple)):
            if name in BESIDE_MODEL and not isinstance(value, list | tuple):
                problems.add(name, f"must be a list with one entry a model, {WHAT[name]}")
                continue
            if len(value) != len(models):
                problems.add(name, f"has {len(value)} entries for {len(models)} models: give one value or one a model")
            for entry, one in zip(entries, value, strict=False):
                (entry if name in BESIDE_MODEL else entry["parameters"])[name] = one
        else:
            raw["parameters"][name] = value
    return raw | {"models": entries}


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _python_step(step: Any) -> Any:
    """A purify or calibrate step from Python: lists for per-model hyperparameters have one entry a model."""
    cls = REGISTRY.get(step.get("method", "")) if isinstance(step, dict) else None
    if cls is None:
        return step
    known = params_of(cls)
    rows = {k: v for k, v in step.items() if k in known and known[k].per_model and isinstance(v, list | tuple)}
    return {k: v for k, v in step.items() if k not in rows} | ({"per_model": rows} if rows else {})
