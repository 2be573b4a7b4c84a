"""What may be permuted in a model without changing its function, as data.

A group is a set of hidden units. Its entries are the axes of parameters that the units lie on: permuting all of them
alike leaves the function as it is. A parameter is usually in two groups, on different axes. Names are those of the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from pymerge.errors import InputError

View = Literal["units", "q", "k", "v", "o"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One axis of a parameter.

    role        "out": the axis produces the units (rows of a Linear, its bias, the scale of a norm, columns of an
                embedding); "in": it consumes them
    view        which of its group's index vectors permutes the axis
    part        (i, c): the axis holds c equal parts, as of fused q, k, v, and the units are the i-th
    interleave  the axis is b = interleave such axes one after another, each with its c parts: [b, c, n / b], as where
                q, k, v are fused head by head; the units are [:, i, :]
    span        entries of the axis that each unit has, one after the other: positions of a flattened channel
    similarity  False: permuted and averaged, but no part of the weights' similarity (running statistics)
    """

    parameter: str
    axis: int
    role: Literal["out", "in"]
    view: View = "units"
    part: tuple[int, int] = (0, 1)
    interleave: int = 1
    span: int = 1
    similarity: bool = True


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Where a group's activations are seen: an input or output of a module (named as in the checkpoint), its units on
    `axis`, in the i-th of c equal parts of it (`part`, `interleave` as of an Entry); all other axes are samples.

    The modules named are those whose parameters the checkpoint has; in memory they may be called otherwise."""

    module: str
    side: Literal["input", "output"] = "input"
    axis: int = -1
    view: View = "units"
    part: tuple[int, int] = (0, 1)
    interleave: int = 1


@dataclass(frozen=True, kw_only=True)
class Units:
    """n = size units that are permuted freely, or, with b = blocks > 1 (heads, GroupNorm groups), whole blocks of n / b
    with each other and units within each block. Its one view is "units" [n].

    members   for units that are whole parameters of their own (experts of a checkpoint): the names of those of each
              unit, in one order. Permuting the units renames them; all entries are named as in the anchor."""

    name: str
    size: int
    entries: tuple[Entry, ...]
    taps: tuple[Tap, ...] = ()
    blocks: int = 1
    members: tuple[tuple[str, ...], ...] = ()

    def views(self) -> dict[View, int]:
        return {"units": self.size}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention heads, whose order q, k and v share. `heads` query heads in `kv_heads` groups of r = heads / kv_heads;
    width d of a head.

    May move: key-value heads with their query heads (sigma), the r query heads of each (tau), the channels of v in each
    key-value head (rho; v rows and o columns), and the channels of q and k from `rotary` on, common to both and to all
    query heads of a key-value head. The first `rotary` channels of q and k stay: rotary position embeddings and norms
    over a head hold them.

    Views: "q", "o" [heads d], "k", "v" [kv_heads d]."""

    name: str
    heads: int
    kv_heads: int
    width: int
    entries: tuple[Entry, ...]
    taps: tuple[Tap, ...] = ()
    rotary: int = 0

    def views(self) -> dict[View, int]:
        outer, inner = self.heads * self.width, self.kv_heads * self.width
        return {"q": outer, "k": inner, "v": inner, "o": outer}


Group = Units | Heads


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All groups of an architecture, and the parameters that no permutation touches (name patterns)."""

    groups: tuple[Group, ...]
    fixed: tuple[str, ...] = ()

    def group(self, name: str) -> Group:
        return next(group for group in self.groups if group.name == name)

    def by_parameter(self) -> dict[str, list[tuple[Group, Entry]]]:
        """Parameter -> its entries, each with its group."""
        found: dict[str, list[tuple[Group, Entry]]] = {}
        for group in self.groups:
            for entry in group.entries:
                found.setdefault(entry.parameter, []).append((group, entry))
        return found

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Every parameter is in a group or fixed, every axis has its group's size and is in one group only.

        shapes   of all floating parameters
        Raises   InputError that lists every problem"""
        problems = self.structure_problems()
        entries = self.by_parameter()
        for name, found in entries.items():
            if name not in shapes:
                problems.append(f"{name}: in group {found[0][0].name}, the model has no such parameter")
                continue
            for group, entry in found:
                problems += size_problems(group, entry, shapes[name])
        covered = set(entries)
        for group in self.groups:
            problems += member_problems(group, shapes)
            covered.update(name for names in getattr(group, "members", ()) for name in names)
        for name in shapes:
            if name not in covered and not any(fnmatchcase(name, pattern) for pattern in self.fixed):
                problems.append(f"{name} {list(shapes[name])}: in no group and not listed as fixed")
        if problems:
            raise InputError("the permutation groups do not fit the model:\n" + "\n".join(problems))

    def structure_problems(self) -> list[str]:
        """What is wrong whatever the model."""
        problems, seen = [], set()
        parts: dict[tuple[str, int], tuple[int, int]] = {}  # how each axis is cut
        for group in self.groups:
            whole, of = (group.size, group.blocks) if isinstance(group, Units) else (group.heads, group.kv_heads)
            if of < 1 or whole % of:
                problems.append(f"group {group.name}: {whole} cannot be cut into {of} equal blocks")
            for entry in group.entries:
                size = group.views().get(entry.view)
                if size is None:
                    problems.append(f"{entry.parameter}: group {group.name} has no view {entry.view!r}")
                elif not 0 <= entry.part[0] < entry.part[1] or min(entry.interleave, entry.span) < 1:
                    problems.append(
                        f"{entry.parameter}: axis {entry.axis} has no part {entry.part} of group {group.name}"
                    )
                elif size % entry.interleave:
                    problems.append(
                        f"{entry.parameter}: {size} units cannot be cut into {entry.interleave} equal parts"
                    )
                place = (entry.parameter, entry.axis, entry.part)
                cut = entry.part[1], entry.interleave
                if place in seen or parts.setdefault(place[:2], cut) != cut:
                    problems.append(f"{entry.parameter}: axis {entry.axis} is in two groups, one is {group.name}")
                seen.add(place)
        return problems


def size_problems(group: Group, entry: Entry, shape: Sequence[int]) -> list[str]:
    if not 0 <= entry.axis < len(shape):
        return [f"{entry.parameter} {list(shape)}: has no axis {entry.axis} (group {group.name})"]
    needed = group.views().get(entry.view, 0) * entry.span * entry.part[1]
    if shape[entry.axis] != needed:
        return [
            f"{entry.parameter} {list(shape)}: axis {entry.axis} has {shape[entry.axis]} entries, group {group.name} "
            f"needs {needed}"
        ]
    return []


def member_problems(group: Group, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Units that are whole parameters must have the same ones, unit by unit."""
    if isinstance(group, Heads) or not group.members:
        return []
    found = [tuple(tuple(shapes.get(name, ())) for name in names) for names in group.members]
    if len(found) != group.size:
        return [f"group {group.name}: {group.size} units, parameters of {len(found)}"]
    return [
        f"group {group.name}: unit {unit} has parameters of shapes {other}, unit 0 of {found[0]}"
        for unit, other in enumerate(found)
        if other != found[0] or () in other
    ]
