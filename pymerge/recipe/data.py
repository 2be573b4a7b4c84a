"""Samples of a model's task in a recipe: a path, a mapping with the path, or in Python a batch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from dataclasses import field as make_field
from typing import Any

from pymerge.recipe.problems import Problems
from pymerge.remote.urls import is_url


@dataclass(frozen=True, kw_only=True)
class DataRef:
    """Samples of one model's task.

    path     a file or folder as `pymerge observe --data` takes it; for a batch in memory a label
    samples, length, field  as the options of `pymerge observe`
    batch    the keyword arguments that the model is called with, where the caller gave them
    """

    path: str
    samples: int = 32
    length: int = 128
    field: str = "text"
    batch: Mapping[str, Any] | None = make_field(default=None, repr=False, compare=False)

    def plain(self) -> str | dict[str, Any]:
        """As `parse_data` reads it: the path alone where the rest is default."""
        more = {name: getattr(self, name) for name, usual in OPTIONS.items() if getattr(self, name) != usual}
        return {"path": self.path} | more if more else self.path


OPTIONS: dict[str, Any] = {o.name: o.default for o in fields(DataRef) if o.name not in ("path", "batch")}


def parse_data(raw: Any, where: str, problems: Problems, *, python: bool, must_exist: bool) -> DataRef | None:
    """The samples that a recipe names; None where a problem was noted."""
    if python and isinstance(raw, Mapping) and "path" not in raw:
        return DataRef(path=f"<{where} in memory>", batch=raw)
    options = dict(raw) if isinstance(raw, Mapping) else {"path": raw}
    path = options.pop("path", None)
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        problems.add(where, f"must be a path, or {{path, {', '.join(OPTIONS)}}}, got {raw!r}")
        return None
    if is_url(os.fspath(path)):
        problems.add(where, f"{os.fspath(path)}: samples are read from local files: copy it first")
    elif must_exist and not os.path.exists(path):
        problems.add(where, f"{os.fspath(path)}: no such file or folder (paths start from {os.getcwd()})")
    for name, value in options.items():
        if name not in OPTIONS:
            problems.unknown(where, name, ("path", *OPTIONS))
        elif type(value) is not type(OPTIONS[name]) or (isinstance(value, int) and value < 1):
            kind = "text" if isinstance(OPTIONS[name], str) else "a whole number from 1"
            problems.add(where, f"{name}: must be {kind}, got {value!r}")
    return DataRef(path=os.fspath(path), **{name: value for name, value in options.items() if name in OPTIONS})
