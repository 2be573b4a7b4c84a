"""The hyperparameters and method names of a recipe, read against what the methods know."""

from __future__ import annotations

from typing import Any

from pymerge.errors import RecipeError
from pymerge.methods import REGISTRY
from pymerge.methods.base import Method
from pymerge.methods.param import params_of
from pymerge.recipe.problems import Problems
from pymerge.recipe.settings import Setting, parse_setting


def method_names(step: str) -> list[str]:
    return REGISTRY.of_step(step)


def find_method(name: Any, step: str, where: str, problems: Problems) -> type[Method] | None:
    """A method of one step by name; what is wrong with the name is a problem."""
    try:
        cls = REGISTRY.get(name) if isinstance(name, str) else None
    except RecipeError as e:  # a package declares it and cannot give it
        problems.add(where, str(e))
        return None
    if cls is not None and cls.step == step:
        return cls
    if cls is not None:
        key = "merge_method" if cls.step == "combine" else cls.step
        problems.add(where, f"{name} is a {cls.step} step: write {key}: {name}")
    else:
        problems.unknown(where, name, method_names(step), "method")
    return None


def parse_params(
    raw: Any, cls: type[Method] | None, where: str, problems: Problems, *, model: bool = False
) -> dict[str, Setting]:
    """Field name -> setting. `lambda` is `scale`; names that mergekit accepts without effect become notes.

    model  the parameters of one model: only per-model ones have a meaning there
    """
    if raw is None or cls is None:
        return {}
    if not isinstance(raw, dict):
        problems.add(where, f"parameters must be a mapping of names to values, got {raw!r}")
        return {}
    known = {name: p for name, p in params_of(cls).items() if name != "style"}
    found: dict[str, Setting] = {}
    for key, value in raw.items():
        name = "scale" if key == "lambda" and "scale" in known else key
        if name in known and model and not known[name].per_model:
            problems.useless(where, f"{key} has one value for the whole merge: move it to the recipe's parameters")
        elif name in known and (name in found or (key == "lambda" and "scale" in raw)):
            problems.add(where, "lambda and scale are two names of one value: give one of them")
        elif name in known:
            setting = parse_setting(value, known[name], f"{where}: {key}", problems)
            if setting is not None:
                found[name] = setting
        elif key in cls.ignored:
            problems.note(f"{key} has no effect in {cls.name}: {cls.ignored[key]}")
        else:
            names = (*known, "lambda") if "scale" in known else known
            problems.unknown(where, key, names, "hyperparameter")
    return found
