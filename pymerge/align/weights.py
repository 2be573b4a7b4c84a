"""How alike the units of two models are in their weights: inner products by gathers, kept while they hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pymerge.align.groups import Entry, Group, Spec, View
from pymerge.align.match import Match, UnitSet, blocks_of
from pymerge.align.moments import Moments, folded, matched_similarity, moments, similarities
from pymerge.align.permutations import Permutations, positions, whole_axis
from pymerge.checkpoint import Checkpoint
from pymerge.errors import NonFinite

SLAB = 1 << 24  # entries of a parameter that are widened to float32 at a time

Placed = Mapping[str, Match]  # group -> where its units are in one model
Keys = tuple[bytes, ...]


@dataclass(frozen=True)
class Term:
    """Entries of one view whose inner products change together: with the groups on their other axes."""

    group: str
    view: View
    others: tuple[str, ...]


class WeightSimilarity:
    """Similarity of the units of a group between the anchor (models[0]) and another model, from their weights.

    Only the products of the anchor with the other model are formed; what permutations cannot change (means, deviations)
    is computed once. A term's products are kept, within `memory` bytes, until a group that they depend on has changed.
    Holds besides SLAB entries of each model in float32 and, of models on disk, one parameter of each as stored."""

    def __init__(self, spec: Spec, models: Sequence[Checkpoint], *, cosine: bool, memory: int) -> None:
        self.spec, self.models, self.cosine = spec, models, cosine
        self.by_parameter = spec.by_parameter()
        self.members = Permutations(spec=spec, index={}, models=()).members
        self.terms: dict[str, dict[Term, list[Entry]]] = {group.name: {} for group in spec.groups}
        for group in spec.groups:
            for entry in group.entries:
                if entry.similarity:
                    term = Term(group.name, entry.view, self.others(entry))
                    self.terms[group.name].setdefault(term, []).append(entry)
        self.keepable = self.within(memory // max(1, len(models) - 1))
        self.kept: dict[tuple[Term, int], tuple[Keys, Tensor]] = {}
        self.known_moments: dict[tuple[str, int, Keys], dict[View, Moments]] = {}

    def others(self, entry: Entry) -> tuple[str, ...]:
        """The groups that an entry's products depend on: those on its parameter's other axes, and the one whose units
        are whole parameters, if this is one."""
        found = {group.name for group, other in self.by_parameter[entry.parameter] if other.axis != entry.axis}
        if entry.parameter in self.members:
            found.add(self.members[entry.parameter][0].name)
        return tuple(sorted(found))

    def neighbours(self, group: str) -> tuple[str, ...]:
        """All groups that a group's similarity depends on."""
        return tuple(sorted({name for term in self.terms[group] for name in term.others}))

    def within(self, memory: int) -> set[Term]:
        """The terms whose products are worth keeping most: first those that never change, then the longest rows."""
        cost = {
            term: (bool(term.others), -sum(self.width(entry) for entry in entries))
            for terms in self.terms.values()
            for term, entries in terms.items()
        }
        found = set()
        for term in sorted(cost, key=cost.__getitem__):
            nbytes = 4 * self.spec.group(term.group).views()[term.view] ** 2
            if nbytes <= memory:
                found.add(term)
                memory -= nbytes
        return found

    def width(self, entry: Entry) -> int:
        """Numbers that a unit has in an entry."""
        shape = self.models[0][entry.parameter].shape
        return prod(size for axis, size in enumerate(shape) if axis != entry.axis) * entry.span

    def scores(self, group: Group, t: int, placed: Placed) -> dict[View, Tensor]:
        """Similarities of the units of the anchor with those of model t, in the form that `match` takes; the model's
        other groups are where `placed` says, its own units in their own order."""
        grams: dict[View, Tensor] = {}
        for term, entries in self.terms[group.name].items():
            gram = self.gram(term, entries, t, placed)
            if term.view in grams:
                grams[term.view] += gram
            else:
                grams[term.view] = gram.clone() if term in self.keepable else gram
        blocks = blocks_of(group)
        one, other = self.moments(group, 0, placed), self.moments(group, t, placed)
        found: dict[View, Tensor] = {}
        for unit_set in blocks.sets:
            if unit_set.base in one:
                found |= similarities(blocks, unit_set, grams, (one[unit_set.base], other[unit_set.base]))
        return found

    def gram(self, term: Term, entries: Sequence[Entry], t: int, placed: Placed) -> Tensor:
        """sum over entries of A_0 A_t^T, float32 [n, n]."""
        keys = tuple(placed[name].key for name in term.others)
        known = self.kept.get((term, t))
        if known is not None and known[0] == keys:
            return known[1]
        size = self.spec.group(term.group).views()[term.view]
        gram = torch.zeros(size, size)
        for entry in entries:
            for one, other in self.rows(entry, size, t, placed, None):
                gram.addmm_(one, other.T)
        if term in self.keepable:
            self.kept[term, t] = keys, gram
        return gram

    def rows(
        self, entry: Entry, size: int, t: int, placed: Placed, own: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Slabs [size, width] of an entry's rows in the anchor and in model t, the latter's other axes permuted and its
        own by `own`."""
        places = places_of(entry, size, None)
        gathered = places_of(entry, size, own)
        one = self.models[0][entry.parameter].load().cpu()
        other = self.models[t][self.name(entry.parameter, placed)].load().cpu()
        indices = self.indices(entry, placed)
        for cut in cuts(one.shape, entry.axis):
            slabs = piece(one, entry.axis, places, {}, cut), piece(other, entry.axis, gathered, indices, cut)
            yield slabs[0].reshape(size, -1), slabs[1].reshape(size, -1)

    def name(self, parameter: str, placed: Placed) -> str:
        """What the parameter that belongs to this one of the anchor is called in the model."""
        if parameter not in self.members:
            return parameter
        group, unit, place = self.members[parameter]
        return group.members[int(placed[group.name].index["units"][unit])][place]

    def indices(self, entry: Entry, placed: Placed) -> dict[int, Tensor]:
        """Axis -> index of all its entries, for the other axes of an entry's parameter that move."""
        found: dict[int, Tensor] = {}
        for group, other in self.by_parameter[entry.parameter]:
            if other.axis == entry.axis:
                continue
            index = placed[group.name].index[other.view]
            if not torch.equal(index, torch.arange(len(index))):
                axis, before = whole_axis(index, other), found.get(other.axis)  # of another part of the axis
                found[other.axis] = axis if before is None else before[axis]
        return found

    def moments(self, group: Group, t: int, placed: Placed) -> dict[View, Moments]:
        """Of the units of each set in model t, by base view."""
        renaming = sorted({self.members[e.parameter][0].name for e in group.entries if e.parameter in self.members})
        key = (group.name, t, tuple(placed[name].key for name in renaming) if t else ())
        if key not in self.known_moments:
            self.known_moments[key] = {
                unit_set.base: found
                for unit_set in blocks_of(group).sets
                if (found := self.moments_of(group, unit_set, t, placed if t else {})) is not None
            }
        return self.known_moments[key]

    def moments_of(self, group: Group, unit_set: UnitSet, t: int, placed: Placed) -> Moments | None:
        blocks = blocks_of(group)
        first, second = torch.zeros(2, blocks.count * blocks.width, dtype=torch.float64)
        count = 0
        for entry in group.entries:
            if not entry.similarity or entry.view not in unit_set.views:
                continue
            shared = entry.view == unit_set.shared
            size = group.views()[entry.view]
            name = self.name(entry.parameter, placed) if placed else entry.parameter
            places = places_of(entry, size, None)
            tensor = self.models[t][name].load().cpu()
            for cut in cuts(tensor.shape, entry.axis):
                x = piece(tensor, entry.axis, places, {}, cut).reshape(size, -1).double()
                sums = x.sum(1), x.square().sum(1)
                first += folded(blocks, sums[0]) if shared else sums[0]
                second += folded(blocks, sums[1]) if shared else sums[1]
            if not bool(torch.isfinite(first).all()):
                raise NonFinite(f"{name}: has NaN or infinite entries in model {t}")
            count += self.width(entry) * (blocks.queries if shared else 1)
        return moments(count, first, second, self.cosine) if count else None

    def matched(self, group: Group, t: int, placed: Placed) -> dict[View, float]:
        """Mean similarity of the units that `placed` matches, of each set by base view. Forms no matrix."""
        blocks, found = blocks_of(group), {}
        one, other = self.moments(group, 0, placed), self.moments(group, t, placed)
        for unit_set in blocks.sets:
            products: dict[View, Tensor] = {}
            for entry in group.entries:
                if not entry.similarity or entry.view not in unit_set.views:
                    continue
                own = placed[group.name].index[entry.view]
                total = products.setdefault(entry.view, torch.zeros(len(own), dtype=torch.float64))
                for a, b in self.rows(entry, len(own), t, placed, own):
                    total += (a * b).sum(1, dtype=torch.float64)
            if products:
                of = one[unit_set.base], other[unit_set.base]
                index = placed[group.name].index[unit_set.base]
                found[unit_set.base] = matched_similarity(blocks, unit_set, products, of, index)
        return found


def places_of(entry: Entry, size: int, own: Tensor | None) -> Tensor | None:
    """Where on its axis the units of an entry are, in the order `own`; None: the whole axis as it is."""
    if entry.part == (0, 1) and own is None:
        return None
    places = positions(size, entry)
    return (places if own is None else places[own]).flatten()


Cut = tuple[int, int, int] | None  # axis, first, last


def cuts(shape: Sequence[int], axis: int) -> Iterator[Cut]:
    """Cuts a parameter across its first other axis into slabs."""
    if len(shape) < 2:
        yield None
        return
    across = 0 if axis else 1
    step = max(1, SLAB * shape[across] // max(1, prod(shape)))
    for first in range(0, shape[across], step):
        yield across, first, min(first + step, shape[across])


def piece(tensor: Tensor, axis: int, places: Tensor | None, indices: Mapping[int, Tensor], cut: Cut) -> Tensor:
    """A slab in float32 with `axis` in front, at `places`; other axes gathered by `indices`."""
    if cut is not None:
        across, first, last = cut
        part = slice(first, last)
        if across in indices:
            tensor = tensor.index_select(across, indices[across][part])
        else:
            tensor = tensor.narrow(across, first, last - first)
        for other, index in indices.items():
            if other != across:
                tensor = tensor.index_select(other, index)
    if places is not None:
        tensor = tensor.index_select(axis, places)
    return tensor.movedim(axis, 0).float()
