"""From the plain data of a recipe to a checked one: every problem is collected, then raised together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pymerge.errors import RecipeError
from pymerge.methods import REGISTRY
from pymerge.methods.base import STYLES, Combine, Method, Purify, Style, TensorInfo, chain_rule, merges_by_rule
from pymerge.methods.matrices import Matrices
from pymerge.methods.names import nearest
from pymerge.methods.param import Param, params_of
from pymerge.recipe.align import Align, parse_align
from pymerge.recipe.beside import check_beside
from pymerge.recipe.data import parse_data
from pymerge.recipe.fused import Fused, parse_fused, parse_matrices, parse_patterns
from pymerge.recipe.keys import (
    BESIDE_MODEL,
    DTYPE_WORDS,
    DTYPES,
    KEYS,
    KEYS_OF_MODEL,
    LATER,
    RELAXATIONS,
)
from pymerge.recipe.models import ModelRef, parse_reference
from pymerge.recipe.params import find_method, method_names, parse_params
from pymerge.recipe.problems import Problems
from pymerge.recipe.settings import Setting
from pymerge.recipe.steps import StepSpec, StepTemplate, make_template
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


def parse_recipe(raw: Any, source: str, *, python: bool, must_exist: bool, problems: Problems | None = None) -> Parsed:
    """The checked recipe; RecipeError with all problems.

    python   the caller is Python: the authors' style is the default, models may be objects
    problems those found already by whoever made `raw`
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"{source}: a recipe is a mapping of keys to values, got {type(raw).__name__}")
    return _Parser(raw, problems or Problems(source), python=python, must_exist=must_exist).parse()


class _Parser:
    """One run over one recipe."""

    def __init__(self, raw: dict[Any, Any], problems: Problems, *, python: bool, must_exist: bool) -> None:
        self.raw, self.problems, self.python, self.must_exist = raw, problems, python, must_exist

    def parse(self) -> Parsed:
        cls = self._method()
        self._keys(cls)
        style = self._style(cls)
        base, listed = self._models(cls)
        tasks = self._tasks(cls, base, listed) if cls else ()
        params = parse_params(self.raw.get("parameters"), cls, "parameters", self.problems)
        purify = self._steps("purify", len(tasks))
        calibrate = self._steps("calibrate", len(tasks))
        if cls:
            steps = [*(REGISTRY[spec.method] for spec in purify), cls, *(REGISTRY[s.method] for s in calibrate)]
            check_beside(steps, tasks, self.problems)
        dtype, out_dtype = self._dtype("dtype"), self._dtype("out_dtype")
        patterns = {key: parse_patterns(self.raw.get(key), key, self.problems) for key in ("exclude", "include")}
        matrices = parse_matrices(self.raw.get("spectral"), self.problems)
        fused = parse_fused(self.raw.get("split"), self.raw.get("join"), self.problems)
        align = parse_align(self.raw.get("align"), self.problems, python=self.python, must_exist=self.must_exist)
        if align is not None and any(task.data is not None for task in tasks):
            self.problems.add(
                "align", "the models are not observed while they are aligned: statistics in place of data"
            )
        seed, strict, relax = self._seed(), self._strict(), self._relax()
        vocabulary = parse_vocabulary(self.raw, self._reference, self.problems)
        chat_template = parse_chat_template(self.raw.get("chat_template"), self.problems)
        templates: tuple[StepTemplate, ...] = ()
        if cls and tasks:
            main = StepSpec(method=cls.name, params=params)
            combine = make_template(main, cls, style, _rows(tasks), cls.name, self.problems)
            templates = (*self._templates(purify, tasks), combine, *self._templates(calibrate, tasks))
        if not self.problems.found:
            self._together(templates, len(purify), len(tasks))
        self.problems.raise_if_any()
        assert cls is not None
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
            seed=seed,
            strict=strict,
            relax=relax,
            dtype=dtype,
            out_dtype=out_dtype,
            vocabulary=vocabulary,
            chat_template=chat_template,
            notes=tuple(self.problems.notes),
            templates=templates,
            **patterns,
        )

    def _keys(self, cls: type[Method] | None) -> None:
        for key, value in self.raw.items():
            if key in LATER:
                if value is not None:
                    self.problems.add("", f"{key}: not supported yet, it comes in a later release")
            elif key not in KEYS:
                self._unknown_key(key, params_of(cls) if cls else {})

    def _unknown_key(self, key: object, hyperparameters: Mapping[str, Param]) -> None:
        near = nearest(key, (*KEYS, *LATER))
        inner = nearest(key, (*hyperparameters, "lambda"))
        if near.startswith("known") and inner.startswith("did"):
            near = f"{inner} Hyperparameters go under `parameters`"
        self.problems.add("", f"unknown key {key!r}: {near}")

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

    def _models(self, cls: type[Combine] | None) -> tuple[ModelRef | None, tuple[ModelRef, ...]]:
        base = self._reference(self.raw["base_model"], "base_model") if self.raw.get("base_model") is not None else None
        raw = self.raw.get("models")
        if not isinstance(raw, list) or not raw:
            if not any(self.raw.get(key) is not None for key in ("slices", "modules")):
                self.problems.add("models", f"must be a list of {{model: ..., parameters: ...}}, got {raw!r}")
            return base, ()
        listed: list[ModelRef] = []
        for i, entry in enumerate(raw):
            ref = self._model(entry, f"models[{i}]", cls)
            if ref is None:
                continue
            if any(ref.same_model(other) for other in listed):
                self.problems.add(f"models[{i}]", f"{ref.path} is listed twice")
            listed.append(ref)
        return base, tuple(listed)

    def _model(self, entry: Any, where: str, cls: type[Combine] | None) -> ModelRef | None:
        if not isinstance(entry, dict):
            self.problems.add(where, f"must be {{model: PATH, parameters: {{...}}}}, got {entry!r}")
            return None
        for key in entry:
            if key not in KEYS_OF_MODEL:
                self.problems.unknown(where, key, KEYS_OF_MODEL)
        ref = self._reference(entry.get("model"), where)
        if ref is None:
            return None
        params = (
            parse_params(entry.get("parameters"), cls, f"{where} ({ref.path})", self.problems, model=True)
            if cls
            else {}
        )
        beside: dict[str, Any] = {key: entry[key] for key in BESIDE_MODEL if entry.get(key) is not None}
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
        return ModelRef(path=ref.path, value=ref.value, params=params, **beside)

    def _reference(self, raw: Any, where: str) -> ModelRef | None:
        if self.python and not isinstance(raw, str | os.PathLike):
            return ModelRef(path=f"<{where} in memory>", value=raw)
        path = parse_reference(raw, where, self.problems, must_exist=self.must_exist)
        return None if path is None else ModelRef(path=path, value=path)

    def _tasks(self, cls: type[Combine], base: ModelRef | None, listed: tuple[ModelRef, ...]) -> tuple[ModelRef, ...]:
        """The models that the method sees, by mergekit's rules for the base."""
        others = tuple(m for m in listed if base is None or not m.same_model(base))
        if base is None and cls.base_role in ("required", "first"):
            self.problems.add("base_model", f"must be given: {cls.name} needs a base")
        if cls.base_role == "none":
            tasks = listed if base is None or len(others) < len(listed) else (*listed, base)
            if len(tasks) > len(listed):
                self._base_among_the_models(cls, tasks[-1])
            return tasks
        for model in listed:
            if model not in others and model.params:
                self.problems.note(
                    f"parameters of the base model {model.path} have no effect: {', '.join(model.params)}"
                )
        low, high = cls.models
        if listed and (len(others) < low or (high is not None and len(others) > high)):
            wanted = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            beside = "" if base is None and cls.base_role == "optional" else " beside the base"
            self.problems.add("models", f"{cls.name} merges {wanted}{beside}, got {len(others)}")
        return (base, *others) if cls.base_role == "first" and base else others

    def _base_among_the_models(self, cls: type[Combine], base: ModelRef) -> None:
        """A base that is not listed, of a method that subtracts none: one more model, where nothing else is missing."""
        weighted = "weight" in params_of(cls)
        averages = f"{cls.name} averages the base like any other model"
        if self.python or (weighted and "weight" not in (self.raw.get("parameters") or {})):
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

    def _dtype(self, key: str) -> str | None:
        value = self.raw.get(key)
        if value is None:
            return None
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in DTYPES:
            self.problems.add(key, f"unknown dtype {value!r}: {nearest(DTYPE_WORDS.get(name, name), DTYPES)}")
            return None
        return name

    def _seed(self) -> int:
        value = self.raw.get("seed", 0)
        value = 0 if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            self.problems.add("seed", f"must be a whole number from 0 to 2^63 - 1, got {value!r}")
            return 0
        return value

    def _strict(self) -> bool:
        value = self.raw.get("strict")
        if value is not None and not isinstance(value, bool):
            self.problems.add("strict", f"must be true or false, got {value!r}")
        return value is not False

    def _relax(self) -> dict[str, str]:
        value = self.raw.get("relax")
        if value is None:
            return {}
        if not isinstance(value, dict):
            names = ", ".join(f"{name}: {'|'.join(choices)}" for name, choices in RELAXATIONS.items())
            self.problems.add("relax", f"must be a mapping of {names}; got {value!r}")
            return {}
        for name, choice in value.items():
            if name not in RELAXATIONS:
                self.problems.unknown("relax", name, RELAXATIONS, "check")
            elif choice not in RELAXATIONS[name]:
                self.problems.add(f"relax: {name}", f"must be {' or '.join(RELAXATIONS[name])}, got {choice!r}")
        return {str(name): str(choice) for name, choice in value.items()}

    def _together(self, templates: tuple[StepTemplate, ...], purify: int, tasks: int) -> None:
        """Steps that are each fine and do not go together; where hyperparameters differ by tensor, the plan checks."""
        combine = templates[purify].cls
        assert issubclass(combine, Combine)
        if purify and not combine.subtracts(self.raw.get("base_model") is not None):
            hint = "; give base_model" if combine.base_role == "optional" else ""
            self.problems.add("purify", f"{combine.name} merges whole weights, purify steps need task vectors{hint}")
            return
        if late := [template.cls.name for template in templates[1:purify] if _needs_weights(template.cls)]:
            self.problems.add(
                "purify", f"{late[0]} needs the models' weights, not task vectors: make it the first step"
            )
            return
        if combine.sequential and (
            observing := [t.cls.name for t in templates[:purify] if "covariance" in t.cls.needs]
        ):
            text = f"{observing[0]} and {combine.name} take different inputs of a layer: leave one out"
            self.problems.add("purify", text)
            return
        if len(templates) > purify + 1 and combine.base_role != "required":
            self.problems.add("calibrate", f"{combine.name} merges whole weights, calibrate steps need a merged update")
            return
        if not all(template.static for template in templates):
            return
        try:
            steps: list[Any] = [template.at("", 0.0) for template in templates]
            if merges_by_rule(steps[:purify], steps[purify]):
                chain_rule(steps[:purify], steps[purify], TensorInfo(name="any", shape=(64, 64), tasks=tasks))
        except RecipeError as e:
            for line in str(e).splitlines():
                self.problems.add("", line)


def _needs_weights(cls: type[Method]) -> bool:
    return issubclass(cls, Purify) and cls.whole_weights


def _rows(tasks: Sequence[ModelRef]) -> list[tuple[str, Mapping[str, Setting]]]:
    return [(model.path, model.params) for model in tasks]
