"""One hyperparameter: its documentation, its default in each style, and its range, which is checked here alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Literal

Style = Literal["authors", "mergekit", "mergekit-0.1.4"]
STYLES: Final = ("authors", "mergekit", "mergekit-0.1.4")

REQUIRED: Final = None  # a default: the value must be given
UNUSED: Final = "(unused)"  # a default: the hyperparameter has no meaning in that style, giving it is an error
_SAME: Final = "(same)"


@dataclass(frozen=True)
class Auto:
    """A default that the method works out from the tensor, the tasks or its other values; the field holds None."""

    says: str
    kind: type = float

    def __str__(self) -> str:
        return self.says


_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True, kw_only=True)
class Param:
    """What is known of one hyperparameter, apart from its name."""

    doc: str
    kind: type  # float, int, bool or str
    authors: Any  # default in the authors' style, REQUIRED or UNUSED
    mergekit: Any  # default in mergekit's style, REQUIRED or UNUSED
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    choices: tuple[str, ...] | None = None
    per_model: bool = False

    def default(self, style: Style) -> Any:
        return self.authors if style == "authors" else self.mergekit

    @property
    def range(self) -> str:
        """The valid values in words: `one of mean, sum`, `in [0, 1]`, `> 0`, `a finite number`."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return "text"
        left = "(" if self.open_low else "["
        if self.low is not None and self.high is not None:
            return f"in {left}{self.low:g}, {self.high:g}]"
        if self.low is not None:
            return f"{'>' if self.open_low else '>='} {self.low:g}"
        return "a whole number" if self.kind is int else "a finite number"

    def convert(self, value: Any) -> Any:
        """`value` as this hyperparameter's kind and within its range; ValueError says what was expected and got."""
        result = _as_kind(value, self.kind)
        if result is None or (self.choices and result not in self.choices) or not self._within(result):
            raise ValueError(f"must be {self.range}, got {value!r}")
        return result

    def _within(self, value: Any) -> bool:
        if self.kind not in (int, float):
            return True
        low = self.low is None or value > self.low or (value == self.low and not self.open_low)
        return math.isfinite(value) and low and (self.high is None or value <= self.high)


def _as_kind(value: Any, kind: type) -> Any:
    """The value as `kind`, or None. YAML 1.1 reads `1e0` as a string: text that spells a number is a number."""
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is bool:
        text = str(value).lower()
        return True if text in _TRUE else False if text in _FALSE else None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number


def param(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    choices: tuple[str, ...] | None = None,
    per_model: bool = False,
    mergekit: Any = _SAME,
) -> Any:
    """A dataclass field that holds a hyperparameter. A value that is not given becomes the default of the method's
    style.

    default    in the authors' style (REQUIRED: must be given; UNUSED: must not be given in this style; Auto: the method
               works it out)
    mergekit   in the styles mergekit and mergekit-0.1.4, where it differs
    per_model  the field holds one value for all tasks or a tuple with one entry a task
    """
    other = default if mergekit is _SAME else mergekit
    example = next((v for v in (default, other) if v is not REQUIRED and v is not UNUSED), 0.0)
    known = Param(
        doc=doc,
        kind=example.kind if isinstance(example, Auto) else type(example),
        authors=default,
        mergekit=other,
        low=low,
        high=high,
        open_low=open_low,
        choices=choices,
        per_model=per_model,
    )
    return field(default=None, metadata={"param": known})


def params_of(cls: type) -> dict[str, Param]:
    """Field name -> Param of a method class, in the order of its definition."""
    return {f.name: f.metadata["param"] for f in fields(cls) if "param" in f.metadata}


def complete(known: Mapping[str, Param], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Every hyperparameter's value, converted and checked, defaults filled in; and the problems found.

    given   field name -> value, None where not given; `style` chooses the defaults where the method has one
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    style: Style = "authors"
    if "style" in known:
        style = given["style"] if given["style"] in STYLES else known["style"].authors
    for name, p in known.items():
        value = given[name]
        default = p.default(style)
        if value is None and default is REQUIRED:
            problems.append(f"{name}: must be given ({p.range}; {p.doc})")
        elif value is None:
            values[name] = None if default is UNUSED or isinstance(default, Auto) else default
        elif default is UNUSED:
            problems.append(f"{name}: has no meaning in style {style}, leave it out ({p.doc})")
        else:
            try:
                several = p.per_model and isinstance(value, list | tuple)
                values[name] = tuple(p.convert(v) for v in value) if several else p.convert(value)
            except ValueError as e:
                problems.append(f"{name}: {e}")
    return values, problems
