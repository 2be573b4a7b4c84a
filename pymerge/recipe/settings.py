"""Values of hyperparameters as a recipe writes them: a number, a gradient over the layers, a choice by tensor name.

The rules are mergekit's (design: mergekit 1.4): inside a list of conditions the first whose filter is absent, `*` or
part of the tensor name wins; a list of numbers is interpolated over the depth of the model; what gives no value leaves
it to the next level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pymerge.methods.param import Param
from pymerge.recipe.problems import Problems


@dataclass(frozen=True)
class Constant:
    value: Any

    def at(self, name: str, t: float) -> Any:
        return self.value

    def plain(self) -> Any:
        return self.value


@dataclass(frozen=True)
class Gradient:
    """Values at equal distances over the depth; numbers are interpolated, anything else is picked."""

    values: tuple[Any, ...]

    def at(self, name: str, t: float) -> Any:
        scaled = t * (len(self.values) - 1)
        low = int(scaled)
        if not isinstance(self.values[0], float):
            return self.values[low]
        share = scaled - low
        return (1 - share) * self.values[low] + share * self.values[min(len(self.values) - 1, low + 1)]

    def plain(self) -> Any:
        return list(self.values)


@dataclass(frozen=True)
class Conditions:
    """(filter, value) pairs; the first filter that fits decides, also where its value is None."""

    entries: tuple[tuple[str | None, Constant | Gradient | None], ...]

    def at(self, name: str, t: float) -> Any:
        for pattern, setting in self.entries:
            if pattern is None or pattern == "*" or (name and pattern in name):
                return None if setting is None else setting.at(name, t)
        return None

    def plain(self) -> Any:
        return [
            ({} if pattern is None else {"filter": pattern}) | {"value": None if s is None else s.plain()}
            for pattern, s in self.entries
        ]


Setting = Constant | Gradient | Conditions


def parse_setting(raw: Any, param: Param, where: str, problems: Problems) -> Setting | None:
    """The setting that `raw` spells, checked value by value; None where it gives no value (null, an empty list)."""
    if raw is None or (isinstance(raw, Sequence) and not isinstance(raw, str) and not raw):
        return None
    entries = [raw] if isinstance(raw, dict) else raw
    if isinstance(entries, list | tuple) and all(isinstance(e, dict) for e in entries):
        return _conditions(entries, param, where, problems)
    return _plain_setting(raw, param, where, problems)


def _conditions(entries: Sequence[Any], param: Param, where: str, problems: Problems) -> Conditions:
    parsed = []
    for i, entry in enumerate(entries):
        here = f"{where}[{i}]"
        for key in entry:
            if key not in ("filter", "value"):
                problems.unknown(here, key, ("filter", "value"))
        pattern = entry.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            problems.add(here, f"filter must be text, got {pattern!r}")
        if "value" not in entry:
            problems.add(here, "has no value: write {filter: ..., value: ...}")
        value = entry.get("value")
        empty = value is None or (isinstance(value, list | tuple) and not value)
        parsed.append((pattern, None if empty else _plain_setting(value, param, here, problems)))
    return Conditions(tuple(parsed))


def _plain_setting(raw: Any, param: Param, where: str, problems: Problems) -> Constant | Gradient:
    several = isinstance(raw, list | tuple)
    values = []
    for value in raw if several else (raw,):
        try:
            values.append(param.convert(value))
        except ValueError as e:
            problems.add(where, str(e))
    if not values:
        return Constant(None)  # wrong, but given: no second problem about a missing value
    return Gradient(tuple(values)) if several else Constant(values[0])


@dataclass(frozen=True)
class Lookup:
    """One value's levels, highest precedence first, then its default."""

    levels: tuple[Setting, ...]
    default: Any

    @classmethod
    def of(cls, levels: Sequence[Setting | None], default: Any) -> Lookup:
        """Levels that cannot be reached are left out."""
        kept: list[Setting] = []
        for setting in levels:
            if setting is None:
                continue
            kept.append(setting)
            if not isinstance(setting, Conditions):
                break
        return cls(tuple(kept), default)

    @property
    def static(self) -> bool:
        """Whether the value is the same for all tensors."""
        return not self.levels or isinstance(self.levels[0], Constant)

    def at(self, name: str, t: float) -> Any:
        for setting in self.levels:
            value = setting.at(name, t)
            if value is not None:
                return value
        return self.default
