"""Collects the entries of a spec module by module; sizes come from the shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pymerge.align.groups import Entry, Group, Heads, Spec, Tap, Units, View
from pymerge.errors import InputError

Role = Literal["out", "in"]
SUFFIXES = ("weight", "bias", "gamma", "beta")  # the last two: what a LayerNorm's are called in old BERT checkpoints


@dataclass(frozen=True)
class Place:
    """The units that lie on an axis: of which group and view, and where on the axis (see Entry)."""

    group: str
    view: View = "units"
    part: tuple[int, int] = (0, 1)
    interleave: int = 1
    span: int = 1
    similarity: bool = True


Places = Place | Sequence[Place] | None  # several: fused parts of one axis


@dataclass
class Builder:
    """Entries, taps and groups of a spec in the making. A group that has entries of view q is one of Heads.

    shapes   of all floating parameters of the model
    blocks   group -> number of its blocks, or of its query heads; the groups that are not named have one block
    rotary   the first channels of q and k in each head that stay; None: all of them
    members  group -> what its units are named, see Units
    fixed    parameters that are not permuted, found so far"""

    shapes: Mapping[str, Sequence[int]]
    entries: dict[str, list[Entry]] = field(default_factory=dict)
    taps: dict[str, list[Tap]] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    rotary: int | None = 0
    members: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    fixed: list[str] = field(default_factory=list)

    def axis(self, parameter: str, axis: int, places: Places, role: Role) -> None:
        """One axis of one parameter lies in a group (or in several, each on its part)."""
        for place in as_tuple(places):
            entry = Entry(
                parameter=parameter,
                axis=axis,
                role=role,
                view=place.view,
                part=place.part,
                interleave=place.interleave,
                span=place.span,
                similarity=place.similarity,
            )
            self.entries.setdefault(place.group, []).append(entry)

    def module(self, module: str, out: Places, into: Places = None, *, transposed: bool = False) -> None:
        """The parameters that a module has: its weight [out, in, ...] and its bias [out], its scale and shift [out].

        transposed   the weight is stored [in, out]: embeddings, GPT-2's Conv1D
        Raises       InputError if the model has no such module"""
        names = [f"{module}.{suffix}" for suffix in SUFFIXES if f"{module}.{suffix}" in self.shapes]
        if not names:
            raise InputError(f"{module}: the permutation groups need it, the model has no such module")
        for name in names:
            rank = len(self.shapes[name])
            out_axis = 1 if transposed and rank > 1 else 0
            self.axis(name, out_axis, out, "out")
            if rank > 1:
                self.axis(name, 1 - out_axis, into, "in")
            if not as_tuple(out) and (rank == 1 or not as_tuple(into)):
                self.fixed.append(name)

    def tap(self, module: str, side: Literal["input", "output"], places: Places, axis: int = -1) -> None:
        """The activations of the places' groups are seen at a module's input or output."""
        for place in as_tuple(places):
            tap = Tap(
                module=module, side=side, axis=axis, view=place.view, part=place.part, interleave=place.interleave
            )
            self.taps.setdefault(place.group, []).append(tap)

    def spec(self, fixed: Sequence[str] = ()) -> Spec:
        """The finished spec, checked against the shapes.

        fixed    patterns of parameters that may not be permuted, beyond those that `module` has found
        Raises   InputError that lists every problem"""
        spec = Spec(groups=tuple(self.group(name) for name in self.entries), fixed=(*self.fixed, *fixed))
        spec.check(self.shapes)
        return spec

    def group(self, name: str) -> Group:
        entries, taps, blocks = tuple(self.entries[name]), tuple(self.taps.get(name, ())), self.blocks.get(name, 1)
        sizes = {entry.view: self.size(entry) for entry in reversed(entries)}
        if "q" not in sizes:
            members = self.members.get(name, ())
            size = sizes.get("units", 0)
            return Units(name=name, size=size, entries=entries, taps=taps, blocks=blocks, members=members)
        width = max(1, sizes["q"] // blocks)
        return Heads(
            name=name,
            heads=blocks,
            kv_heads=sizes.get("k", sizes.get("v", 0)) // width,
            width=width,
            entries=entries,
            taps=taps,
            rotary=width if self.rotary is None else self.rotary,
        )

    def size(self, entry: Entry) -> int:
        """The number of units on an axis; 0 where the model has no such axis, which `Spec.check` reports."""
        shape = self.shapes.get(entry.parameter, ())
        return shape[entry.axis] // (entry.part[1] * entry.span) if entry.axis < len(shape) else 0


def as_tuple(places: Places) -> tuple[Place, ...]:
    if places is None:
        return ()
    return (places,) if isinstance(places, Place) else tuple(places)
