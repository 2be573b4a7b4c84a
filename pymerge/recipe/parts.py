"""`slices` and `modules` of a recipe: the output's layers in parts, each a merge of its own.

A part is one slice: models with the layers that they give, the slice's base and hyperparameters. Top-level slices are
one module without a name. A module that lists models is one part of all their layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pymerge.methods.base import Combine, Method
from pymerge.recipe.models import ModelRef
from pymerge.recipe.params import parse_params
from pymerge.recipe.problems import Problems
from pymerge.recipe.settings import Setting

if TYPE_CHECKING:
    from pymerge.recipe.schema import Parsed

WAYS = ("models", "slices", "modules")
KEYS_OF_SLICE = ("sources", "base_model", "parameters")
KEYS_OF_MODULE = ("models", "slices", "parameters")
KEYS_OF_SOURCE = ("model", "layer_range", "parameters")


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where in a recipe one part is.

    where   of the part, for messages: "slices[0]", "modules.encoder"
    key     under which it lists its models: sources or models
    raw     the part, as written
    params  hyperparameters as written, nearest first: (mapping, where)
    """

    where: str
    key: str
    raw: Mapping[Any, Any]
    params: tuple[tuple[Any, str], ...]

    @property
    def sliced(self) -> bool:
        return self.key == "sources"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One slice of a module.

    recipe  the merge of its models, whose `layers` say which; has the hyperparameters of all levels
    base    as the slice gives it; None: the recipe's
    params  of the slice
    where   of it in the recipe
    """

    recipe: Any  # Recipe, which is made of this module
    base: ModelRef | None
    params: Mapping[str, Setting]
    where: str


@dataclass(frozen=True, kw_only=True)
class Module:
    """name: "" for slices without modules; whole: it lists models, not slices."""

    name: str
    parts: tuple[Part, ...]
    params: Mapping[str, Setting]
    whole: bool

    @property
    def where(self) -> str:
        return f"modules.{self.name}" if self.name else "slices"

    def of(self, recipe: Callable[[Parsed], Any]) -> Module:
        """The module with its parts' merges as recipes."""
        return replace(self, parts=tuple(replace(part, recipe=recipe(part.recipe)) for part in self.parts))


def ways_given(raw: Mapping[Any, Any]) -> list[str]:
    """Which of models, slices and modules a recipe, or a module of it, has."""
    return [way for way in WAYS if raw.get(way)]


def parse_modules(
    raw: Mapping[Any, Any],
    cls: type[Combine] | None,
    problems: Problems,
    parse: Callable[[Scope], tuple[Parsed | None, ModelRef | None]],
) -> tuple[Module, ...]:
    """The modules of a recipe that has slices or modules.

    parse  the merge of one part, and the part's own base"""
    shared = (raw.get("parameters"), "parameters")
    if raw.get("slices"):
        return (_module("", {"slices": raw["slices"]}, (shared,), cls, problems, parse),)
    modules = raw.get("modules")
    if not isinstance(modules, dict):
        problems.add("modules", f"must be a mapping of names to {{models or slices: [...]}}, got {modules!r}")
        return ()
    found = []
    for name, entry in modules.items():
        where = f"modules.{name}"
        if not isinstance(entry, dict) or not isinstance(name, str) or len(ways_given(entry)) != 1:
            problems.add(where, "must have either models or slices")
            continue
        for key in entry:
            if key not in KEYS_OF_MODULE:
                problems.unknown(where, key, KEYS_OF_MODULE)
        levels = ((entry.get("parameters"), f"{where}: parameters"), shared)
        found.append(_module(name, entry, levels, cls, problems, parse))
    return tuple(found)


def _module(
    name: str,
    entry: Mapping[Any, Any],
    levels: tuple[tuple[Any, str], ...],
    cls: type[Combine] | None,
    problems: Problems,
    parse: Callable[[Scope], tuple[Parsed | None, ModelRef | None]],
) -> Module:
    where = f"modules.{name}" if name else ""
    scopes = []
    if whole := bool(entry.get("models")):
        scopes.append(Scope(where=where, key="models", raw=entry, params=levels))
    slices = entry.get("slices") or []
    if not isinstance(slices, list):
        problems.add(f"{where}: slices" if where else "slices", f"must be a list of {{sources: [...]}}, got {slices!r}")
        slices = []
    for i, slice_ in enumerate(slices):
        here = f"{where}.slices[{i}]" if where else f"slices[{i}]"
        if not isinstance(slice_, dict) or not slice_.get("sources"):
            problems.add(here, f"must be {{sources: [{{model, layer_range}}, ...]}}, got {slice_!r}")
            continue
        for key in slice_:
            if key not in KEYS_OF_SLICE:
                problems.unknown(here, key, KEYS_OF_SLICE)
        own = (slice_.get("parameters"), f"{here}: parameters")
        scopes.append(Scope(where=here, key="sources", raw=slice_, params=(own, *levels)))
    parts = []
    for scope in scopes:
        merge, base = parse(scope)
        if merge is not None:
            params = merge.params if scope.sliced else {}
            parts.append(Part(recipe=merge, base=base, params=params, where=scope.where))
    raw, said = levels[0]
    params = parse_params(raw, cls, said, problems) if name else {}
    return Module(name=name, parts=tuple(parts), params=params, whole=whole)


def parse_range(raw: Any, where: str, problems: Problems) -> tuple[int, int] | None:
    """layer_range: [first, behind the last]; None: all layers."""
    if raw is None:
        return None
    whole = isinstance(raw, list | tuple) and len(raw) == 2 and all(type(end) is int for end in raw)
    if not whole or not 0 <= raw[0] < raw[1]:
        problems.add(where, f"layer_range must be [first, behind the last] of its layers, 0 the first; got {raw!r}")
        return None
    return raw[0], raw[1]


def base_of_part(
    cls: type[Combine], base: ModelRef | None, listed: Sequence[ModelRef], where: str, problems: Problems
) -> ModelRef | None:
    """The base of a slice with the layers that it gives: those that its source says, else those of all sources. A
    method that subtracts no base takes none that is not a source."""
    if base is None or not listed:
        return base
    for source in listed:
        if source.same_model(base):
            return replace(base, layers=source.layers)
    if cls.base_role == "none":
        return None
    if len({source.layers for source in listed}) > 1:
        problems.add(where, f"the sources give different layers: list the base {base.path} with those that it gives")
    return replace(base, layers=listed[0].layers)


def models_of(modules: Sequence[Module]) -> tuple[ModelRef, ...]:
    """All models of all parts, each once and as a whole, in the order of the recipe."""
    found: list[ModelRef] = []
    for part in parts_of(modules):
        bases = [part.recipe.base] if part.recipe.base is not None else []
        for ref in (*part.recipe.listed, *bases):
            if not any(ref.same_model(other) for other in found):
                found.append(ModelRef(path=ref.path, value=ref.value, found=ref.found))
    return tuple(found)


def parts_of(modules: Sequence[Module]) -> Iterator[Part]:
    for module in modules:
        yield from module.parts


def check_parts(raw: Mapping[Any, Any], steps: Sequence[type[Method]], key: str, problems: Problems) -> None:
    """What does not go with parts of models, known without the models."""
    if raw.get("align") is not None:
        problems.add("align", f"is for whole models, not for {key}: align the models first, merge what that gives")
    for cls in steps:
        if cls.needs:
            problems.add(key, f"{cls.name} needs {', '.join(cls.needs)} of whole models: merge them under `models`")
        elif issubclass(cls, Combine) and cls.beside:
            problems.add(key, f"{cls.name} leaves {cls.beside} beside a whole model: merge them under `models`")


def plain_modules(modules: Sequence[Module], model: Callable[[ModelRef], dict[str, Any]]) -> dict[str, Any]:
    """As a recipe writes them: {slices: ...} or {modules: ...}. model: how it writes a model."""

    def of_slice(part: Part) -> dict[str, Any]:
        sources = [model(ref) for ref in part.recipe.listed]
        own = {"base_model": part.base.path} if part.base is not None else {}
        return {"sources": sources} | own | of_params(part.params)

    def of_params(params: Mapping[str, Setting]) -> dict[str, Any]:
        return {"parameters": {name: setting.plain() for name, setting in params.items()}} if params else {}

    def of_module(module: Module) -> dict[str, Any]:
        if module.whole:
            return {"models": [model(ref) for ref in module.parts[0].recipe.listed]} | of_params(module.params)
        return {"slices": [of_slice(part) for part in module.parts]} | of_params(module.params)

    if not modules or modules[0].name == "":
        return {"slices": [of_slice(part) for module in modules for part in module.parts]}
    return {"modules": {module.name: of_module(module) for module in modules}}
