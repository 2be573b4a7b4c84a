"""From the plain data of a recipe to a checked one: every problem is collected, then raised together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pymerge.errors import RecipeError
from pymerge.methods import REGISTRY
from pymerge.methods.base import STYLES, Combine, Method, Style
from pymerge.methods.matrices import Matrices
from pymerge.methods.names import nearest
from pymerge.methods.param import Param, params_of
from pymerge.recipe.align import Align, parse_align
from pymerge.recipe.beside import check_beside
from pymerge.recipe.data import parse_data
from pymerge.recipe.fused import Fused, parse_fused, parse_matrices, parse_patterns
from pymerge.recipe.keys import BESIDE_MODEL, KEYS, KEYS_OF_MODEL
from pymerge.recipe.models import ModelRef
from pymerge.recipe.options import parse_options
from pymerge.recipe.params import find_method, method_names, parse_params
from pymerge.recipe.parts import (
    KEYS_OF_SOURCE,
    Module,
    Scope,
    base_of_part,
    check_parts,
    models_of,
    parse_modules,
    parse_range,
    parts_of,
    ways_given,
)
from pymerge.recipe.problems import Problems
from pymerge.recipe.references import parse_reference
from pymerge.recipe.settings import Setting
from pymerge.recipe.steps import StepSpec, StepTemplate, make_template
from pymerge.recipe.together import check_together
from pymerge.recipe.tokenizer import Vocabulary, parse_chat_template, parse_vocabulary


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What a recipe says, checked: the fields of `Recipe`, which explains them."""

    method: str
    base: ModelRef | None
    models: tuple[ModelRef, ...]
    listed: tuple[ModelRef, ...]
    params: Mapping[str, Setting]
    align: Align | None
    purify: tuple[StepSpec, ...]
    calibrate: tuple[StepSpec, ...]
    style: Style
    seed: int
    exclude: tuple[str, ...]
    include: tuple[str, ...]
    matrices: Matrices
    fused: Fused
    strict: bool
    relax: Mapping[str, str]
    dtype: str | None
    out_dtype: str | None
    vocabulary: Vocabulary | None
    chat_template: str | None
    notes: tuple[str, ...]
    templates: tuple[StepTemplate, ...] = field(repr=False, compare=False)  # purify, combine, calibrate
    modules: tuple[Module, ...] = ()


def parse_recipe(raw: Any, source: str, *, python: bool, must_exist: bool, problems: Problems | None = None) -> Parsed:
    """The checked recipe; RecipeError with all problems.

    python   the caller is Python: the authors' style is the default, models may be objects
    problems those found already by whoever made `raw`
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of keys to values, got {type(raw).__name__}")
    problems = problems or Problems(source)
    parsed = _Parser(raw, problems, python=python, must_exist=must_exist).parse()
    problems.raise_if_any()
    assert parsed is not None
    return parsed


class _Parser:
    """One run over one recipe, or over one part of it (`scope`)."""

    def __init__(
        self, raw: dict[Any, Any], problems: Problems, *, python: bool, must_exist: bool, scope: Scope | None = None
    ) -> None:
        self.raw, self.problems, self.python, self.must_exist, self.scope = raw, problems, python, must_exist, scope
        self.listing = f"{scope.where}: {scope.key}" if scope else "models"  # where the models are
        self.levels = scope.params if scope else ((raw.get("parameters"), "parameters"),)

    def parse(self) -> Parsed | None:
        """None where there are problems."""
        cls = self._method()
        self._keys(cls)
        ways = ways_given(self.raw)
        if self.scope is None and ways and ways != ["models"]:
            return self._parts(cls, ways)
        style = self._style(cls)
        base, listed = self._models(cls)
        tasks = self._tasks(cls, base, listed) if cls else ()
        params, *outer = (parse_params(given, cls, where, self.problems) for given, where in self.levels)
        purify = self._steps("purify", len(tasks))
        calibrate = self._steps("calibrate", len(tasks))
        if cls:
            steps = [*(REGISTRY[spec.method] for spec in purify), cls, *(REGISTRY[s.method] for s in calibrate)]
            if self.scope is not None:
                check_parts(self.raw, steps, ways[0], self.problems)
            else:
                check_beside(steps, tasks, self.problems)
        options = parse_options(self.raw, self.problems)
        options["vocabulary"] = parse_vocabulary(self.raw, self._reference, self.problems)
        options["chat_template"] = parse_chat_template(self.raw.get("chat_template"), self.problems)
        patterns = {key: parse_patterns(self.raw.get(key), key, self.problems) for key in ("exclude", "include")}
        matrices = parse_matrices(self.raw.get("spectral"), self.problems)
        fused = parse_fused(self.raw.get("split"), self.raw.get("join"), self.problems)
        align = parse_align(self.raw.get("align"), self.problems, python=self.python, must_exist=self.must_exist)
        if align is not None and any(task.data is not None for task in tasks):
            self.problems.add(
                "align", "the models are not observed while they are aligned: statistics in place of data"
            )
        templates: tuple[StepTemplate, ...] = ()
        if cls and tasks:
            main = StepSpec(method=cls.name, params=params, outer=tuple(outer))
            where = f"{self.scope.where}: {cls.name}" if self.scope else cls.name
            combine = make_template(main, cls, style, _rows(tasks), where, self.problems)
            templates = (*self._templates(purify, tasks), combine, *self._templates(calibrate, tasks))
        if not self.problems.found:
            check_together(templates, len(purify), base is not None, self.problems)
        if self.problems.found or cls is None:
            return None
        return Parsed(
            method=cls.name,
            base=base,
            models=tasks,
            listed=listed,
            params=params,
            align=align,
            purify=purify,
            calibrate=calibrate,
            matrices=matrices,
            fused=fused,
            style=style,
            notes=tuple(self.problems.notes),
            templates=templates,
            **patterns,
            **options,
        )

    def _keys(self, cls: type[Method] | None) -> None:
        for key in self.raw:
            if key not in KEYS:
                self._unknown_key(key, params_of(cls) if cls else {})

    def _unknown_key(self, key: object, hyperparameters: Mapping[str, Param]) -> None:
        near = nearest(key, KEYS)
        inner = nearest(key, (*hyperparameters, "lambda"))
        if near.startswith("known") and inner.startswith("did"):
            near = f"{inner} Hyperparameters go under `parameters`"
        self.problems.useless("", f"unknown key {key!r}: {near}")

    def _style(self, cls: type[Method] | None) -> Style:
        """The style of the combine step: the one asked for, else the caller's default, else the method's own."""
        style: Any = self.raw.get("style")
        known = params_of(cls).get("style") if cls else None
        choices = known.choices if known and known.choices else STYLES
        if style is not None and style not in choices:
            has = f"{cls.name} has" if cls and style in STYLES else "must be one of"
            self.problems.add("style", f"{has} {', '.join(choices)}, got {style!r}")
        default: Style = "authors" if self.python else "mergekit"
        style = default if style is None else style
        return style if style in choices else known.authors if known else default

    def _method(self) -> type[Combine] | None:
        name = self.raw.get("merge_method")
        if name is None:
            self.problems.add("merge_method", f"must be given: one of {', '.join(method_names('combine'))}")
            return None
        cls = find_method(name, "combine", "merge_method", self.problems)
        return cls if cls is not None and issubclass(cls, Combine) else None

    def _parts(self, cls: type[Combine] | None, ways: Sequence[str]) -> Parsed | None:
        """A recipe of slices or modules."""
        if len(ways) > 1:
            self.problems.add("", f"{' and '.join(ways)} are given: a recipe has one of them")
            return None

        def parse(scope: Scope) -> tuple[Parsed | None, ModelRef | None]:
            parser = _Parser(self.raw, self.problems, python=self.python, must_exist=self.must_exist, scope=scope)
            own = scope.raw.get("base_model") if scope.sliced else None
            base = parser._reference(own, f"{scope.where}: base_model") if own is not None else None
            return parser.parse(), base

        modules = parse_modules(self.raw, cls, self.problems, parse)
        params = parse_params(self.raw.get("parameters"), cls, "parameters", self.problems)
        base = self._base()
        first = next((part.recipe for part in parts_of(modules)), None)
        if self.problems.found or first is None:
            return None
        given = {"base": base, "models": models_of(modules), "listed": (), "params": params, "modules": modules}
        return replace(first, **given, notes=tuple(self.problems.notes))

    def _base(self) -> ModelRef | None:
        own = self.scope.raw.get("base_model") if self.scope and self.scope.sliced else None
        where = f"{self.scope.where}: base_model" if self.scope and own is not None else "base_model"
        raw = own if own is not None else self.raw.get("base_model")
        return self._reference(raw, where) if raw is not None else None

    def _models(self, cls: type[Combine] | None) -> tuple[ModelRef | None, tuple[ModelRef, ...]]:
        base = self._base()
        raw = self.scope.raw.get(self.scope.key) if self.scope else self.raw.get("models")
        if not isinstance(raw, list) or not raw:
            keys = "{model: ..., layer_range: ..., parameters: ...}" if self.scope else "{model: ..., parameters: ...}"
            self.problems.add(self.listing, f"must be a list of {keys}, got {raw!r}")
            return base, ()
        listed: list[ModelRef] = []
        for i, entry in enumerate(raw):
            ref = self._model(entry, f"{self.listing}[{i}]", cls)
            if ref is None:
                continue
            if any(ref.same_model(other) for other in listed):
                self.problems.add(f"{self.listing}[{i}]", f"{ref.path} is listed twice")
            listed.append(ref)
        if cls is not None and self.scope is not None and self.scope.sliced:
            base = base_of_part(cls, base, listed, self.scope.where, self.problems)
        return base, tuple(listed)

    def _model(self, entry: Any, where: str, cls: type[Combine] | None) -> ModelRef | None:
        if not isinstance(entry, dict):
            self.problems.add(where, f"must be {{model: PATH, parameters: {{...}}}}, got {entry!r}")
            return None
        sliced = self.scope is not None and self.scope.sliced
        known = KEYS_OF_SOURCE if sliced else ("model", "parameters") if self.scope else KEYS_OF_MODEL
        for key in entry:
            if key not in known:
                self.problems.unknown(where, key, known)
        ref = self._reference(entry.get("model"), where)
        if ref is None:
            return None
        params = (
            parse_params(entry.get("parameters"), cls, f"{where} ({ref.path})", self.problems, model=True)
            if cls
            else {}
        )
        given = [key for key in BESIDE_MODEL if entry.get(key) is not None and self.scope is None]
        beside: dict[str, Any] = {key: entry[key] for key in given}
        for key, raw in beside.items():
            beside[key] = (
                parse_data(raw, f"{where}: data", self.problems, python=self.python, must_exist=self.must_exist)
                if key == "data"
                else self._reference(raw, f"{where}: {key}")
            )
        if "data" in beside and ref.in_memory:
            self.problems.add(
                where, "data: is for models in folders; give statistics=[pymerge.observe(model, batches), ...] instead"
            )
        layers = parse_range(entry.get("layer_range"), where, self.problems) if sliced else None
        return replace(ref, params=params, layers=layers, **beside)

    def _reference(self, raw: Any, where: str) -> ModelRef | None:
        if self.python and not isinstance(raw, str | os.PathLike):
            return ModelRef(path=f"<{where} in memory>", value=raw)
        found = parse_reference(raw, where, self.problems, must_exist=self.must_exist)
        if found is None:
            return None
        path, local = found
        return ModelRef(path=path, value=path, found=None if local == path else local)

    def _tasks(self, cls: type[Combine], base: ModelRef | None, listed: tuple[ModelRef, ...]) -> tuple[ModelRef, ...]:
        """The models that the method sees, by mergekit's rules for the base."""
        others = tuple(m for m in listed if base is None or not m.same_model(base))
        if base is None and cls.base_role in ("required", "first"):
            self.problems.add("base_model", f"must be given: {cls.name} needs a base")
        if cls.base_role == "none":
            tasks = listed if base is None or len(others) < len(listed) else (*listed, base)
            with_base = " with base_model" if len(tasks) > len(listed) else ""
            if listed and self._counted(cls, len(tasks), got=with_base) and with_base:
                self._base_among_the_models(cls, tasks[-1])
            return tasks
        for model in listed:
            if model not in others and model.params:
                self.problems.note(
                    f"parameters of the base model {model.path} have no effect: {', '.join(model.params)}"
                )
        if listed:
            self._counted(cls, len(others), "" if base is None and cls.base_role == "optional" else " beside the base")
        return (base, *others) if cls.base_role == "first" and base else others

    def _counted(self, cls: type[Combine], count: int, beside: str = "", got: str = "") -> bool:
        """Whether the method merges so many models."""
        low, high = cls.models
        if low <= count <= (count if high is None else high):
            return True
        wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        self.problems.add(self.listing, f"{cls.name} merges {wanted}{beside}, got {count}{got}")
        return False

    def _base_among_the_models(self, cls: type[Combine], base: ModelRef) -> None:
        """A base that is not listed, of a method that subtracts none: one more model, where nothing else is missing."""
        weighted = "weight" in params_of(cls)
        averages = f"{cls.name} averages the base like any other model"
        given = any("weight" in (params or {}) for params, _ in self.levels)
        if self.python or (weighted and not given):
            how = "list it with its weight" if weighted else "list it"
            self.problems.add("base_model", f"{averages}: {how}, or drop this key")
        elif not weighted:
            self.problems.note(f"{averages}: {base.path} is one of its models")

    def _steps(self, key: str, tasks: int) -> tuple[StepSpec, ...]:
        raw = self.raw.get(key)
        entries = [] if raw is None else raw if isinstance(raw, list | tuple) else [raw]
        specs = []
        for i, entry in enumerate(entries):
            where = f"{key}[{i}]" if isinstance(raw, list | tuple) else key
            spec = self._step(entry, key, where, tasks)
            if spec is not None:
                specs.append(spec)
        return tuple(specs)

    def _step(self, entry: Any, key: str, where: str, tasks: int) -> StepSpec | None:
        entry = {"method": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or "method" not in entry:
            self.problems.add(where, f"must be the name of a method or {{method: NAME, ...}}, got {entry!r}")
            return None
        cls = find_method(entry["method"], key, where, self.problems)
        if cls is None:
            return None
        style = entry.get("style")
        known = params_of(cls).get("style")
        if style is not None and style not in (known.choices if known and known.choices else ()):
            has = f"it has {', '.join(known.choices)}" if known and known.choices else "it has none"
            self.problems.add(where, f"{cls.name} has no style {style!r}, {has}")
        rest = {k: v for k, v in entry.items() if k not in ("method", "style", "per_model")}
        rows = self._per_model(entry.get("per_model"), cls, f"{where}: per_model", tasks)
        return StepSpec(
            method=cls.name, style=style, params=parse_params(rest, cls, where, self.problems), per_model=rows
        )

    def _per_model(self, raw: Any, cls: type[Method], where: str, tasks: int) -> dict[str, tuple[Setting | None, ...]]:
        """Hyperparameters of a purify or calibrate step with one entry a model."""
        if raw is None:
            return {}
        if not isinstance(raw, dict) or not all(isinstance(v, list | tuple) for v in raw.values()):
            self.problems.add(where, "must be {name: [one entry a model]}")
            return {}
        found: dict[str, tuple[Setting | None, ...]] = {}
        for name, values in raw.items():
            if tasks and len(values) != tasks:
                self.problems.add(f"{where}: {name}", f"has {len(values)} entries for {tasks} models")
            rows = [parse_params({name: value}, cls, where, self.problems, model=True) for value in values]
            found[name] = tuple(row.get(name) for row in rows)
        return found

    def _templates(self, specs: Sequence[StepSpec], tasks: Sequence[ModelRef]) -> list[StepTemplate]:
        templates = []
        for spec in specs:
            cls = REGISTRY[spec.method]
            known = params_of(cls).get("style")
            style = spec.style or (known.authors if known else "authors")
            rows = [(m.path, {}) for m in tasks]
            if all(len(values) == len(rows) for values in spec.per_model.values()):
                templates.append(make_template(spec, cls, style, rows, spec.method, self.problems))
        return templates


def _rows(tasks: Sequence[ModelRef]) -> list[tuple[str, Mapping[str, Setting]]]:
    return [(model.path, model.params) for model in tasks]
