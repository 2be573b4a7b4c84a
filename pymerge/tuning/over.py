"""What is searched over: hyperparameters of a recipe by name, each with a range or a list of values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pymerge.errors import RecipeError
from pymerge.methods import REGISTRY
from pymerge.methods.names import nearest
from pymerge.methods.param import Param, params_of
from pymerge.recipe import Recipe
from pymerge.recipe.parts import parts_of
from pymerge.recipe.settings import Constant

SCALE: Final = ("scale", "lambda", "scaling")  # names of the combine step's overall coefficient
MOST_WHOLE = 50  # whole numbers that a range stands for
DIGITS = 5  # decimals of a value, counted from the first of its range

Over = Mapping[str, "str | Sequence[float]"]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One hyperparameter and its values: `values`, or all between `low` and `high`.

    key, index  where the recipe has it: "parameters", or step `index` of "purify" or "calibrate"
    """

    name: str  # of the hyperparameter; method.name where it is not the combine step's
    given: str  # as the user calls it
    key: str
    index: int
    field: str
    param: Param
    low: float = 0.0
    high: float = 0.0
    values: tuple[float, ...] = ()

    @property
    def is_scale(self) -> bool:
        return (self.key, self.field) == ("parameters", "scale")

    @property
    def is_range(self) -> bool:
        return not self.values

    @property
    def step(self) -> float:
        """What tried values of a range are multiples of."""
        return 10.0 ** (math.floor(math.log10(self.high - self.low)) - DIGITS)

    def rounded(self, value: float) -> float:
        return round(value, max(0, round(-math.log10(self.step))))

    def put(self, raw: dict[str, Any], value: float) -> None:
        """Sets the hyperparameter in the plain data of a recipe."""
        place = raw.setdefault("parameters", {}) if self.key == "parameters" else raw[self.key][self.index]
        place[self.field] = value


def parse_overs(texts: Sequence[str], option: str = "over") -> dict[str, str]:
    """Name -> spec, of NAME=LOW..HIGH and NAME=VALUE,VALUE,..."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, spec = (part.strip() for part in text.partition("="))
        if not equals or not name or not spec:
            forms = "NAME=VALUE,VALUE,..." if option == "grid" else "NAME=LOW..HIGH or NAME=VALUE,VALUE,..."
            raise RecipeError(f"{option}: expected {forms}, got {text!r}")
        if name in found:
            raise RecipeError(f"{option}: {name} is given twice")
        found[name] = spec
    return found


def axes_of(recipe: Recipe, over: Over) -> list[Axis]:
    """The axes of a search, checked against the recipe; RecipeError lists every problem. The overall coefficient comes
    last: it changes fastest, and the update is merged once for all its values."""
    if not isinstance(over, Mapping):
        raise RecipeError(f"over: expected hyperparameters with their values, {{name: values}}, got {over!r}")
    if not over:
        raise RecipeError("over: nothing to search over: give a hyperparameter and its values")
    found: list[Axis] = []
    problems = []
    for name, spec in over.items():
        try:
            found.append(_axis(recipe, name, spec))
        except RecipeError as e:
            problems.append(str(e))
    names = [axis.name for axis in found]
    problems += [f"over: {name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    ranges = [axis.name for axis in found if axis.is_range]
    if ranges and len(over) > 1:
        problems.append(
            f"over: a range is searched alone: list the values of {', '.join(ranges)}, as in {ranges[0]}=0.5,1,1.5"
        )
    if problems:
        raise RecipeError("\n".join(problems))
    return sorted(found, key=lambda axis: axis.is_scale)


def combinations(axes: Sequence[Axis]) -> list[dict[str, float]]:
    """All combinations of values; of a range its ends."""
    each = [axis.values or (axis.low, axis.high) for axis in axes]
    return [dict(zip([axis.name for axis in axes], values, strict=True)) for values in itertools.product(*each)]


def without(recipe: Recipe, axes: Sequence[Axis]) -> dict[str, Any]:
    """The recipe's plain data but for what is varied."""
    raw = recipe.to_dict()
    for axis in axes:
        axis.put(raw, 0.0)
    return raw


def recipe_at(recipe: Recipe, axes: Sequence[Axis], values: Mapping[str, float]) -> Recipe:
    """The recipe with the values put in."""
    raw = recipe.to_dict()
    for axis in axes:
        axis.put(raw, values[axis.name])
    where = ", ".join(f"{name}={value:g}" for name, value in values.items())
    return Recipe.from_dict(raw, source=f"recipe at {where}")


def _axis(recipe: Recipe, name: str, spec: str | Sequence[float]) -> Axis:
    key, index, field = place = _place(recipe, name)
    label = field if key == "parameters" else f"{_steps(recipe)[key, index]}.{field}"
    param = _param(recipe, place)
    if param.kind not in (int, float):
        raise RecipeError(f"over: {name} is no number ({param.range})")
    _refuse_several(recipe, name, key, index, field)
    given = {"name": label, "given": name, "key": key, "index": index, "field": field, "param": param}
    if isinstance(spec, str) and ".." in spec:
        low, high = _range(name, spec, param)
        if param.kind is float:
            return Axis(**given, low=low, high=high)
        if high - low >= MOST_WHOLE:
            raise RecipeError(f"over: {name}: {spec} are more than {MOST_WHOLE} whole numbers: list some of them")
        return Axis(**given, values=tuple(range(int(low), int(high) + 1)))
    if not isinstance(spec, Iterable):
        raise RecipeError(f"over: {name}: expected LOW..HIGH or a list of values, got {spec!r}")
    parts = spec.split(",") if isinstance(spec, str) else list(spec)
    values = tuple(dict.fromkeys(_number(name, part, param) for part in parts if part != ""))
    if not values:
        raise RecipeError(f"over: {name}: no values: write {name}=LOW..HIGH or {name}=VALUE,VALUE,...")
    return Axis(**given, values=values)


def _steps(recipe: Recipe) -> dict[tuple[str, int], str]:
    """Where a step is in the recipe -> its method; the combine step first."""
    steps = {("parameters", 0): recipe.method}
    for key in ("purify", "calibrate"):
        steps |= {(key, i): spec.method for i, spec in enumerate(getattr(recipe, key))}
    return steps


def _places(recipe: Recipe) -> Iterator[tuple[str, tuple[str, int, str]]]:
    """Every name that a hyperparameter may be given by, and where it is; a name may come more than once."""
    for (key, index), method in _steps(recipe).items():
        for field in params_of(REGISTRY[method]):
            if field == "style":
                continue
            names = SCALE if (key, field) == ("parameters", "scale") else (field,)
            for name in names:
                yield name, (key, index, field)
                yield f"{method}.{name}", (key, index, field)


def _param(recipe: Recipe, place: tuple[str, int, str]) -> Param:
    key, index, field = place
    return params_of(REGISTRY[_steps(recipe)[key, index]])[field]


def _place(recipe: Recipe, name: str) -> tuple[str, int, str]:
    places = list(_places(recipe))
    fits = [place for known, place in places if known == name]
    if not fits:
        numbers = [known for known, place in places if _param(recipe, place).kind in (int, float)]
        alike = [known for known in dict.fromkeys(numbers) if ("." in known) == ("." in name)]
        raise RecipeError(f"over: unknown hyperparameter {name!r}: {nearest(name, alike)}")
    combine = [place for place in fits if place[0] == "parameters" and name in SCALE]
    if len(fits) > 1 and not combine:
        methods = [_steps(recipe)[key, index] for key, index, _ in fits]
        if len(set(methods)) < len(methods):
            raise RecipeError(f"over: {name}: the recipe has {methods[0]} more than once, a search cannot tell which")
        raise RecipeError(f"over: {name}: say which: {' or '.join(f'{method}.{name}' for method in methods)}")
    return (combine or fits)[0]


def _refuse_several(recipe: Recipe, name: str, key: str, index: int, field: str) -> None:
    """Values of models, layers or tensors would win over the one that is tried, or be lost to it."""
    if key == "parameters":
        params = recipe.params
        own = [model.path for model in recipe.models if field in model.params]
        own += [module.where for module in recipe.modules if field in module.params]
        for part in parts_of(recipe.modules):
            given = [part.params, *(model.params for model in part.recipe.listed)]
            own += [part.where] if any(field in params for params in given) else []
    else:
        params = getattr(recipe, key)[index].params
        own = ["per_model"] if field in getattr(recipe, key)[index].per_model else []
    one = "a search tries one value for all of them, take it out there"
    if own:
        raise RecipeError(f"over: {name} is given model by model ({', '.join(own)}): {one}")
    if not isinstance(params.get(field, Constant(None)), Constant):
        raise RecipeError(f"over: {name} is given by layer or tensor ({params[field].plain()}): {one}")


def _range(name: str, spec: str, param: Param) -> tuple[float, float]:
    ends = spec.split("..")
    if len(ends) != 2:
        raise RecipeError(f"over: {name}: expected LOW..HIGH, got {spec!r}")
    low, high = (_number(name, end, param) for end in ends)
    if low >= high:
        raise RecipeError(f"over: {name}: the range {spec} is empty: its low end must be below its high end")
    return low, high


def _number(name: str, text: Any, param: Param) -> float:
    try:
        return param.convert(text.strip() if isinstance(text, str) else text)
    except ValueError as e:
        raise RecipeError(f"over: {name}: {e}") from None
