"""The steps of a recipe: as written (`StepSpec`), as looked up (`StepTemplate`), as method objects (`Steps`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pymerge.methods.base import UNUSED, Calibrate, Combine, Method, Purify, Style
from pymerge.methods.param import Auto, params_of
from pymerge.recipe.problems import Problems
from pymerge.recipe.settings import Lookup, Setting


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What happens to one tensor, in order. Equal hyperparameters give the same object."""

    purify: tuple[Purify, ...]
    combine: Combine
    calibrate: tuple[Calibrate, ...]

    @property
    def all(self) -> tuple[Method, ...]:
        return (*self.purify, self.combine, *self.calibrate)

    @property
    def spectral(self) -> bool:
        """Whether a step acts on weight matrices only."""
        return any(step.spectral for step in self.all)

    @property
    def need_inputs(self) -> bool:
        """Whether a step asks for statistics of the layers' inputs."""
        return any("covariance" in step.needs for step in self.all)


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """One step as the recipe gives it: hyperparameters for all models, and those given model by model.

    outer  of the step in a slice: hyperparameters of the levels around it, nearest first"""

    method: str
    style: Style | None = None
    params: Mapping[str, Setting] = field(default_factory=dict)
    per_model: Mapping[str, tuple[Setting | None, ...]] = field(default_factory=dict)
    outer: tuple[Mapping[str, Setting], ...] = ()

    def plain(self) -> dict[str, Any]:
        """As `from_dict` reads it."""
        out: dict[str, Any] = {"method": self.method}
        if self.style is not None:
            out["style"] = self.style
        out |= {name: setting.plain() for name, setting in self.params.items()}
        if self.per_model:
            rows = {name: [s and s.plain() for s in settings] for name, settings in self.per_model.items()}
            out["per_model"] = rows
        return out


@dataclass(frozen=True, kw_only=True)
class StepTemplate:
    """A method class with a lookup for each hyperparameter, or one a model."""

    cls: type[Method]
    lookups: Mapping[str, Lookup | tuple[Lookup, ...]]
    labels: tuple[str, ...]  # the models, for messages
    _built: dict[Any, Method] = field(default_factory=dict, repr=False, compare=False)

    def _all(self) -> Iterator[Lookup]:
        for lookup in self.lookups.values():
            yield from (lookup,) if isinstance(lookup, Lookup) else lookup

    @property
    def static(self) -> bool:
        """Whether the step is the same for all tensors."""
        return all(lookup.static for lookup in self._all())

    def at(self, name: str, t: float, own: Sequence[str] | None = None) -> Method:
        """The method object for one tensor; RecipeError where a value is missing or two values do not go together.

        own  its names in the models where those are others: what values of single models are looked up by"""

        def of_models(lookups: Sequence[Lookup]) -> tuple[Any, ...]:
            names = own if own is not None else (name,) * len(lookups)
            return tuple(one.at(its, t) for one, its in zip(lookups, names, strict=True))

        values = tuple(
            lookup.at(name, t) if isinstance(lookup, Lookup) else of_models(lookup) for lookup in self.lookups.values()
        )
        if values not in self._built:
            self._built[values] = self.cls(**self._arguments(values, name))
        return self._built[values]

    def _arguments(self, values: Sequence[Any], name: str) -> dict[str, Any]:
        known = params_of(self.cls)
        problems = Problems(f"tensor {name}" if name else self.cls.name)
        arguments: dict[str, Any] = {}
        for field_name, value in zip(self.lookups, values, strict=True):
            several = isinstance(value, tuple)
            for i, one in enumerate(value if several else (value,)):
                if one is None:
                    where = f"{self.labels[i]}: {field_name}" if several else field_name
                    problems.add(where, f"must be given ({known[field_name].range}); no filter fits this tensor")
            first = value[0] if several and value else value
            arguments[field_name] = None if first == UNUSED or isinstance(first, Auto) else value
        problems.raise_if_any()
        return arguments


def make_template(
    spec: StepSpec,
    cls: type[Method],
    style: Style,
    models: Sequence[tuple[str, Mapping[str, Setting]]],
    where: str,
    problems: Problems,
) -> StepTemplate:
    """A step's lookups: model, then step or recipe, then default. Required values given nowhere are problems.

    models  label and own hyperparameters of each task
    """
    lookups: dict[str, Lookup | tuple[Lookup, ...]] = {}
    for name, p in params_of(cls).items():
        default = style if name == "style" else p.default(style)
        shared = [params.get(name) for params in (spec.params, *spec.outer)]
        if not p.per_model:
            lookups[name] = lookup = Lookup.of(shared, default)
            if default is None and not lookup.levels:
                problems.add(where, f"{name}: must be given ({p.range}; {p.doc})")
            continue
        rows = spec.per_model.get(name, (None,) * len(models))
        each = [Lookup.of([row, own.get(name), *shared], default) for row, (_, own) in zip(rows, models, strict=True)]
        lookups[name] = tuple(each)
        missing = [
            label for (label, _), lookup in zip(models, each, strict=True) if default is None and not lookup.levels
        ]
        if missing:
            problems.add(where, f"{name}: must be given for {', '.join(missing)} ({p.range}; {p.doc})")
    return StepTemplate(cls=cls, lookups=lookups, labels=tuple(label for label, _ in models))
