"""Which model a recipe means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pymerge.recipe.data import DataRef
from pymerge.recipe.problems import Problems
from pymerge.recipe.settings import Setting

_LATER = "not supported yet"


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """One model of a recipe.

    path    folder or file, as the recipe spells it; for a model in memory a label such as `models[0]`
    value   what the caller gave: the path, or the state dict or module itself
    params  hyperparameters given for this model
    fisher  the file, or the tensors, with the Fisher information of its parameters
    statistics  the file that `pymerge observe` made of it, or a Statistics object
    data    samples of its task, which the merge observes itself
    layers  of a source of a slice: the first of its layers that are taken, and the one behind the last; None: all
    """

    path: str
    value: Any = field(repr=False, compare=False)
    params: Mapping[str, Setting] = field(default_factory=dict)
    fisher: ModelRef | None = None
    statistics: ModelRef | None = None
    data: DataRef | None = None
    layers: tuple[int, int] | None = None

    @property
    def in_memory(self) -> bool:
        return self.value is not self.path

    def plain(self) -> str:
        """As a recipe writes it beside a model."""
        return self.path

    def same_model(self, other: ModelRef) -> bool:
        """Whether both name the same model."""
        if self.in_memory or other.in_memory:
            return self.value is other.value
        return os.path.realpath(self.path) == os.path.realpath(other.path)


def split_adapter(path: str) -> tuple[str, str] | None:
    """(base, adapter) of `base+adapter`, where that is no path itself and both parts are; else None."""
    if os.path.exists(path):
        return None
    cuts = [(path[:i], path[i + 1 :]) for i, letter in enumerate(path) if letter == "+"]
    return next((parts for parts in cuts if all(os.path.exists(part) for part in parts)), None)


def parse_reference(raw: Any, where: str, problems: Problems, *, must_exist: bool) -> str | None:
    """The local path that a model reference names, or `base+adapter`: text, or {model: {path, revision}, lora, ...}.

    Text that exists as a path is that path, whatever characters it has; else `path@revision+adapter@revision`.
    """
    if isinstance(raw, os.PathLike):
        raw = os.fspath(raw)
    if isinstance(raw, dict):
        return _parse_mapping(raw, where, problems, must_exist=must_exist)
    if not isinstance(raw, str) or not raw or "\0" in raw:
        problems.add(where, f"must be the path of a model, got {raw!r}")
        return None
    if os.path.exists(raw) or split_adapter(raw) is not None:
        return raw
    path, plus, lora = raw.partition("+")
    name, at, revision = path.partition("@")
    if plus and os.path.exists(name if at else path):
        problems.add(where, f"{raw}: the adapter {lora} is no folder here (paths start from {os.getcwd()})")
    elif at and os.path.exists(name):
        problems.add(where, f"{raw}: revisions (@{revision}) are {_LATER}: give the folder that holds that revision")
    elif must_exist:
        problems.add(
            where,
            f"{raw}: no such file or folder; names on the Hugging Face hub are {_LATER}: download the model, give its"
            f" folder (paths start from {os.getcwd()})",
        )
    return raw


def _parse_mapping(raw: dict[Any, Any], where: str, problems: Problems, *, must_exist: bool) -> str | None:
    for key, value in raw.items():
        if key == "override_architecture":
            if value is not None:
                problems.add(where, f"{key} is {_LATER}")
        elif key not in ("model", "lora", "path", "revision"):
            problems.unknown(where, key, ("model", "lora", "path", "revision"))
    path = _path_of(raw.get("model", raw), raw, where, problems)
    adapter = raw.get("lora")
    if adapter is None:
        return parse_reference(path, where, problems, must_exist=must_exist)
    adapter = _path_of(adapter, None, f"{where}: lora", problems)
    if not isinstance(path, str) or not isinstance(adapter, str):
        problems.add(where, f"model and lora must be paths, got {path!r} and {adapter!r}")
        return None
    return parse_reference(f"{path}+{adapter}", where, problems, must_exist=must_exist)


def _path_of(inner: Any, outer: Any, where: str, problems: Problems) -> Any:
    """The path in {path, revision}."""
    if not isinstance(inner, dict):
        return inner
    if inner.get("revision") is not None:
        problems.add(where, f"revision is {_LATER}: give the folder that holds that revision")
    for key in inner if inner is not outer else ():
        if key not in ("path", "revision"):
            problems.unknown(f"{where}: model", key, ("path", "revision"))
    return inner.get("path")
