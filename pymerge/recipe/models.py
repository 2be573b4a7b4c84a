"""Which model a recipe means."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pymerge.recipe.data import DataRef
from pymerge.recipe.problems import Problems
from pymerge.recipe.references import parse_reference
from pymerge.recipe.settings import Setting


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """One model of a recipe.

    path    folder, file or name on the Hub, as the recipe spells it; for a model in memory a label such as `models[0]`
    value   what the caller gave: the path, or the state dict or module itself
    params  hyperparameters given for this model
    fisher  the file, or the tensors, with the Fisher information of its parameters
    statistics  the file that `pymerge observe` made of it, or a Statistics object
    data    samples of its task, which the merge observes itself
    found   the path, or `base+adapter`, that `path` means, where that is another: a folder in the Hub's cache
    layers  of a source of a slice: the first of its layers that are taken, and the one behind the last; None: all
    """

    path: str
    value: Any = field(repr=False, compare=False)
    params: Mapping[str, Setting] = field(default_factory=dict)
    fisher: ModelRef | None = None
    statistics: ModelRef | None = None
    data: DataRef | None = None
    found: str | None = field(default=None, compare=False)
    layers: tuple[int, int] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process, perhaps on another machine, names and URLs are looked up anew."""
        self.__dict__.update(state)
        if self.found is not None:
            problems = Problems(self.path)
            place = parse_reference(self.path, "", problems, must_exist=True)
            problems.raise_if_any()
            self.__dict__["found"] = None if place is None or place[1] == self.path else place[1]

    @property
    def in_memory(self) -> bool:
        return self.value is not self.path

    @property
    def local(self) -> str:
        """The path, or `base+adapter`, where its files are."""
        return self.path if self.found is None else self.found

    def plain(self) -> str:
        """As a recipe writes it beside a model."""
        return self.path

    def same_model(self, other: ModelRef) -> bool:
        """Whether both name the same model."""
        if self.in_memory or other.in_memory:
            return self.value is other.value
        return os.path.realpath(self.local) == os.path.realpath(other.local)
