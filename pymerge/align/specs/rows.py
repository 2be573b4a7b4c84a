"""Specs of transformers as tables: which module, by the end of its name, has which units on which axis."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pymerge.align.specs.builder import SUFFIXES, Builder, Place, Places, as_tuple
from pymerge.errors import InputError

RESIDUAL = Place("residual")


@dataclass(frozen=True)
class Row:
    """Modules and the units on the axes of their weight, out and in. `{at}` in a group's name stands for what is in
    front of `end`, `{name}` for a named part of it.

    end         regular expression of the end of the name, behind a dot
    transposed  the weight is stored [in, out]
    tap         the side at which the units' activations are seen: of `out` at the output, of `into` at the input"""

    end: str
    out: Places
    into: Places = None
    transposed: bool = False
    tap: Literal["input", "output"] | None = None

    def match(self, module: str) -> dict[str, str] | None:
        """What stands for what in the names of groups; None where the module's name does not end so."""
        found = re.fullmatch(rf"(?:(?P<at>.*)\.)?(?:{self.end})", module)
        return None if found is None else found.groupdict("")


def embeddings(end: str) -> Row:
    """Tables whose columns are the residual stream."""
    return Row(end, RESIDUAL, transposed=True)


def fused(group: str, interleave: int = 1) -> tuple[Place, ...]:
    """q, k and v on equal parts of one axis."""
    views: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
    return tuple(Place(group, view, (i, 3), interleave) for i, view in enumerate(views))


def fill(builder: Builder, rows: Sequence[Row], heads: int, *, tie_heads: bool = True) -> None:
    """The entries of all modules that some row describes, by the first that does.

    heads      query heads of every attention group
    tie_heads  False: q and k in one group of blocks, v in another"""
    for module in modules_of(builder.shapes):
        row, names = next(((row, found) for row in rows if (found := row.match(module)) is not None), (None, {}))
        if row is None:
            continue
        form = untied if not tie_heads else lambda place: place
        out, into = placed(row.out, names), placed(row.into, names)
        builder.blocks |= {form(place).group: heads for place in (*out, *into) if place.view != "units"}
        builder.module(module, [form(p) for p in out], [form(p) for p in into], transposed=row.transposed)
        if row.tap is not None:
            seen = out if row.tap == "output" else into
            builder.tap(module, row.tap, [form(place) for place in seen if place.view != "v"])


def placed(places: Places, names: Mapping[str, str]) -> tuple[Place, ...]:
    """The places of a row for one module."""
    return tuple(replace(place, group=place.group.format_map(names).removeprefix(".")) for place in as_tuple(places))


def untied(place: Place) -> Place:
    """A place among heads in the released form: q and k are one group, v another."""
    if place.view == "units":
        return place
    return replace(place, group=place.group + (".qk" if place.view in "qk" else ".v"), view="units")


def refuse_untied(tie_heads: bool) -> None:
    if not tie_heads:
        raise InputError(
            "tie_heads=False: the released form permutes q and k within a head, which rotary positions do not allow; "
            "leave tie_heads on"
        )


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules that have a parameter of a usual name, in order."""
    split = (name.rpartition(".") for name in names)
    return list(dict.fromkeys(module for module, _, suffix in split if suffix in SUFFIXES))


def number(config: Mapping[str, Any], *names: str) -> int:
    """A number that the config has under one of these names.

    Raises   InputError if it has none"""
    for name in names:
        if isinstance(config.get(name), int):
            return config[name]
    raise InputError(f"the permutation groups need {' or '.join(names)}, which the config does not have: add it there")


def tables(builder: Builder, end: str, place: Place) -> bool:
    """Parameters of no module of their own (tokens, positions, scales), whose last axis has the place's units.

    end      regular expression of the end of the name, behind a dot
    Returns  whether there is any"""
    found = [name for name in builder.shapes if re.fullmatch(rf"(.*\.)?({end})", name)]
    for name in found:
        builder.axis(name, len(builder.shapes[name]) - 1, place, "out")
    return bool(found)


def seen_at_the_end(builder: Builder, stream: Place, norm: Row) -> None:
    """Where no head has shown the stream's activations, the output of the last norm does."""
    if stream.group not in builder.taps:
        for module in modules_of(builder.shapes):
            if norm.match(module) is not None:
                builder.tap(module, "output", stream)
