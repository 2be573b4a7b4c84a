"""Permutations of the units of several models, and how they act on a tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pymerge.align.groups import Entry, Group, Spec, Tap, Units
from pymerge.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Permutations:
    """For every group and view an index vector per model: unit r of model 0 is unit index[t, r] of model t.

    index   group name -> view -> int64 [T, n]; row 0 is the identity
    models  labels of the T models, the anchor first
    report  what the solver says of each group: numbers and short words
    fingerprints  of the models (`Checkpoint.fingerprint`), where they are known
    """

    spec: Spec
    index: Mapping[str, Mapping[str, Tensor]]
    models: tuple[str, ...]
    report: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: tuple[Mapping[str, Any], ...] = ()

    def of(self, group: Group, entry: Entry, model: int) -> Tensor:
        """The index vector [n] of a model on an entry's axis (or on its part of it)."""
        return self.index[group.name][entry.view][model]

    def source(self, name: str, model: int) -> str:
        """The parameter of a model that becomes the parameter `name` of the aligned one: another where units that are
        whole parameters (experts) have moved."""
        if name not in self.members:
            return name
        group, unit, place = self.members[name]
        return group.members[int(self.index[group.name]["units"][model][unit])][place]

    def moves(self, name: str, model: int) -> dict[int, Tensor]:
        """Axis -> index of the whole axis, for the axes of a parameter on which something moves."""
        found: dict[int, Tensor] = {}
        for group, entry in self.entries.get(name, ()):
            index = self.of(group, entry, model)
            if not torch.equal(index, torch.arange(len(index))):
                axis = whole_axis(index, entry)
                before = found.get(entry.axis)  # of another part of the axis
                found[entry.axis] = axis if before is None else before[axis]
        return found

    def aligned(self, name: str, tensor: Tensor, model: int) -> Tensor:
        """A parameter with its units in the anchor's order, from the model's parameter `source(name, model)`; `tensor`
        itself where nothing moves."""
        for axis, index in self.moves(name, model).items():
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor

    def check(self) -> None:
        """Every index is a permutation that its group allows, and the anchor's is the identity.

        Raises   InputError that lists every problem"""
        problems = self.spec.structure_problems()
        for group in self.spec.groups if not problems else ():
            index = self.index.get(group.name, {})
            shapes = {view: tuple(index[view].shape) if view in index else None for view in group.views()}
            wanted = {view: (len(self.models), n) for view, n in group.views().items()}
            if shapes != wanted:
                problems.append(f"group {group.name}: index vectors {shapes}, expected {wanted}")
                continue
            for model, label in enumerate(self.models):
                vectors = {view: rows[model] for view, rows in index.items()}
                problem = "the anchor's units move" if model == 0 and moved(vectors) else misfit(group, vectors)
                if problem:
                    problems.append(f"group {group.name}, model {label}: {problem}")
        if problems:
            raise InputError("these are not permutations of the spec's groups:\n" + "\n".join(problems))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `open_permutations` reads; it appears complete or not at all."""
        from pymerge.align.store import save

        save(self, path)

    @cached_property
    def entries(self) -> dict[str, list[tuple[Group, Entry]]]:
        return self.spec.by_parameter()

    @cached_property
    def members(self) -> dict[str, tuple[Units, int, int]]:
        """Parameter that belongs to a unit -> group, unit, place among the unit's parameters."""
        return {
            name: (group, unit, place)
            for group in self.spec.groups
            if isinstance(group, Units)
            for unit, names in enumerate(group.members)
            for place, name in enumerate(names)
        }


def positions(n: int, place: Entry | Tap) -> Tensor:
    """Where the n units lie on an entry's axis (or a tap's): int64 [n, span], row r for unit r."""
    (number, parts), blocks, span = place.part, place.interleave, place.span if isinstance(place, Entry) else 1
    return torch.arange(n * parts * span).reshape(blocks, parts, n // blocks, span)[:, number].reshape(n, span)


def whole_axis(index: Tensor, entry: Entry) -> Tensor:
    """An index of the units of an entry as an index of its whole axis, whose other parts stay."""
    places = positions(len(index), entry)
    axis = torch.arange(places.numel() * entry.part[1])
    axis[places] = places[index]
    return axis


def moved(vectors: Mapping[str, Tensor]) -> bool:
    return any(not torch.equal(index, torch.arange(len(index))) for index in vectors.values())


def misfit(group: Group, vectors: Mapping[str, Tensor]) -> str:
    """What keeps the index vectors of one model from being a permutation that the group allows; empty if nothing."""
    for view, index in vectors.items():
        if index.dtype != torch.int64 or not torch.equal(index.sort().values, torch.arange(len(index))):
            return f"view {view} is no permutation"
    if isinstance(group, Units):
        kept = index_of_blocks(vectors["units"], group.blocks) is not None
        return "" if kept else f"units leave their {group.blocks} blocks"
    heads: dict[str, Tensor] = {}
    for view, index in vectors.items():
        order = index_of_blocks(index, len(index) // group.width)
        if order is None:
            return f"channels leave their heads of {group.width}"
        heads[view] = order
    if not torch.equal(heads["k"], heads["v"]) or not torch.equal(heads["q"], heads["o"]):
        return "q, k, v and o differ in the order of heads"
    sigma, queries = heads["k"], group.heads // group.kv_heads
    if not torch.equal(heads["q"].view(-1, queries) // queries, sigma[:, None].expand(-1, queries)):
        return "query heads leave their key-value head"
    inner = {view: (index % group.width).view(group.kv_heads, -1, group.width) for view, index in vectors.items()}
    if not (inner["q"] == inner["k"]).all() or not (inner["o"] == inner["v"]).all():
        return "channels move differently in q and k, or in v and o"
    still = inner["k"][..., : group.rotary]
    return "" if (still == torch.arange(group.rotary)).all() else f"one of the first {group.rotary} channels moves"


def index_of_blocks(index: Tensor, blocks: int) -> Tensor | None:
    """The order of blocks [b] of a permutation [n] that keeps units within them; None if it does not."""
    order = index.view(blocks, -1) // (len(index) // blocks)
    return order[:, 0] if (order == order[:, :1]).all() else None


def identity(spec: Spec, models: Sequence[str]) -> Permutations:
    """The permutations that move nothing."""
    index = {
        group.name: {view: torch.arange(n).repeat(len(models), 1) for view, n in group.views().items()}
        for group in spec.groups
    }
    return Permutations(spec=spec, index=index, models=tuple(models))
