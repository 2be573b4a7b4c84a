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
    """

    path: str
    value: Any = field(repr=False, compare=False)
    params: Mapping[str, Setting] = field(default_factory=dict)
    fisher: ModelRef | None = None
    statistics: ModelRef | None = None
    data: DataRef | None = None

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


def parse_reference(raw: Any, where: str, problems: Problems, *, must_exist: bool) -> str | None:
    """The local path that a model reference names: text, or {model: {path, revision}, lora, override_architecture}.

    Text that exists as a path is that path, whatever characters it has; else `path@revision+lora@revision`.
    """
    if isinstance(raw, os.PathLike):
        raw = os.fspath(raw)
    if isinstance(raw, dict):
        return _parse_mapping(raw, where, problems, must_exist=must_exist)
    if not isinstance(raw, str) or not raw or "\0" in raw:
        problems.add(where, f"must be the path of a model, got {raw!r}")
        return None
    if os.path.exists(raw):
        return raw
    path, plus, lora = raw.partition("+")
    name, at, revision = path.partition("@")
    if plus and os.path.exists(name if at else path):
        problems.add(where, f"{raw}: LoRA adapters (+{lora}) are {_LATER}: merge the adapter first and give the result")
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
        if key in ("lora", "override_architecture"):
            if value is not None:
                problems.add(where, f"{key} is {_LATER}")
        elif key not in ("model", "path", "revision"):
            problems.unknown(where, key, ("model", "lora", "path", "revision"))
    inner = raw.get("model", raw)
    if isinstance(inner, dict):
        if inner.get("revision") is not None:
            problems.add(where, f"revision is {_LATER}: give the folder that holds that revision")
        for key in inner if inner is not raw else ():
            if key not in ("path", "revision"):
                problems.unknown(f"{where}: model", key, ("path", "revision"))
        inner = inner.get("path")
    return parse_reference(inner, where, problems, must_exist=must_exist)
