"""`align`: the units of the models put in one order before they are merged, by a file or found first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pymerge.methods.param import Auto, param, params_of
from pymerge.recipe.problems import Problems

METHOD = "mudsc"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How permutations are found: options of pymerge.find_permutations, then of the samples. Its defaults hold where a
    recipe says nothing."""

    alpha: float = param(Auto("0.5, without data 1"), "weights' share of the similarity", low=0.0, high=1.0)
    mode: str = param("permute", "one to one, or many to one (zip)", choices=("permute", "zip"))
    spec: str = param(Auto("by the model's config", str), "architecture whose groups of units are used")
    start: str = param(
        Auto("activations, without data identity", str), "of the sweeps", choices=("activations", "identity")
    )
    similarity: str = param("correlation", "of weights", choices=("correlation", "cosine"))
    max_sweeps: int = param(100, "over all groups, at most", low=1)
    patience: int = param(5, "sweeps in a row that may bring nothing", low=1)
    seed: int = param(0, "of the order in which groups are visited", low=0)
    tie_heads: bool = param(True, "one order of heads for q, k and v")
    threshold: float = param(1e-6, "a group stays as it is where permuting it gains less", low=0.0)
    zip_decay: float = param(0.5, "similarity of a merged unit", low=0.0, high=1.0, open_low=True)
    zip_budget: float = param(1.0, "share of the merges that may be within one model", low=0.0, high=1.0)
    samples: int = param(64, "how many samples are run", low=1)
    length: int = param(128, "longest sample, tokens", low=1)
    batch_size: int = param(8, "samples run at once", low=1)
    field: str = param("text", "key of the text in .jsonl and datasets")


PLAIN = (bool, int, float, str)
SAMPLING = ("samples", "length", "batch_size", "field")
KEYS_OF_ALIGN = ("method", "data", *params_of(Settings))


@dataclass(frozen=True, kw_only=True)
class Align:
    """Permutations that a recipe gives, or how they are found.

    file     the file of permutations as the recipe spells it, or a label where `value` holds them; None: to be found
    value    Permutations or Clusters from Python
    data     file or folder of samples; a label where `batches` holds them; None: weights alone
    batches  what the models are called with, from Python
    options  those given of `Settings`
    """

    file: str | None = None
    value: Any = field(default=None, repr=False, compare=False)
    data: str | None = None
    batches: Any = field(default=None, repr=False, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def in_memory(self) -> bool:
        """Whether some of it is given as objects of Python, which no recipe's text can say."""
        objects = any(not isinstance(value, PLAIN) for value in self.options.values())
        return objects or self.value is not None or self.batches is not None

    @property
    def search(self) -> dict[str, Any]:
        """The options that find_permutations takes."""
        return {name: value for name, value in self.options.items() if name not in SAMPLING}

    @property
    def sampling(self) -> dict[str, Any]:
        """How the samples are made into batches, defaults filled in."""
        return {name: self.options.get(name, params_of(Settings)[name].authors) for name in SAMPLING}

    def plain(self) -> Any:
        """As a recipe writes it; groups from Python have a label."""
        if self.file is not None:
            return self.file
        options = {name: value if isinstance(value, PLAIN) else "<in memory>" for name, value in self.options.items()}
        return {"method": METHOD} | ({"data": self.data} if self.data is not None else {}) | options


def parse_align(raw: Any, problems: Problems, *, python: bool, must_exist: bool) -> Align | None:
    """`align: FILE` or `align: {method: mudsc, data: ..., alpha: ...}`; in Python also permutations, and batches as
    `data`."""
    if raw is None:
        return None
    if isinstance(raw, str | os.PathLike):
        return Align(file=_path(raw, "align", problems, must_exist))
    if not isinstance(raw, Mapping):
        if python:
            return Align(file="<align in memory>", value=raw)
        problems.add("align", f"must be a file of permutations or {{method: {METHOD}, ...}}, got {raw!r}")
        return None
    if raw.get("method") != METHOD:
        problems.add("align: method", f"must be {METHOD}, got {raw.get('method')!r}")
    data, batches = raw.get("data"), None
    if data is not None and python and not isinstance(data, str | os.PathLike):
        data, batches = "<data in memory>", data
    elif data is not None:
        data = _path(data, "align: data", problems, must_exist)
    return Align(data=data, batches=batches, options=_options(raw, problems, python=python))


def _path(raw: Any, where: str, problems: Problems, must_exist: bool) -> str:
    if not isinstance(raw, str | os.PathLike) or (must_exist and not os.path.exists(raw)):
        problems.add(where, f"{raw}: no such file or folder (paths start from {os.getcwd()})")
    return os.fspath(raw) if isinstance(raw, str | os.PathLike) else str(raw)


def _options(raw: Mapping[Any, Any], problems: Problems, *, python: bool) -> dict[str, Any]:
    known = params_of(Settings)
    options: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in KEYS_OF_ALIGN:
            problems.unknown("align", name, KEYS_OF_ALIGN)
        if name not in known or value is None:
            continue
        if name == "spec" and python and not isinstance(value, str):
            options[name] = value
            continue
        try:
            options[name] = known[name].convert(value)
        except ValueError as e:
            problems.add("align", f"{name}: {e}")
    if raw.get("data") is None:
        unused = [name for name in SAMPLING if name in options]
        if unused:
            problems.add("align", f"{', '.join(unused)}: say how samples are run, `data` gives none")
        if options.get("alpha", 1.0) < 1.0:
            problems.add("align", f"alpha: must be 1 where there is no `data`, got {options['alpha']}")
    return options
