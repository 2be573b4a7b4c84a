"""Permutations of the units of several models, and how they act on a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pymerge.align.groups import Entry, Group, Spec


@dataclass(frozen=True, kw_only=True)
class Permutations:
    """For every group and view an index vector per model: unit r of model 0 is unit index[t, r] of model t.

    index   group name -> view -> int64 [T, n]; row 0 is the identity
    models  labels of the T models, the anchor first
    report  what the solver says of each group: numbers and short words
    """

    spec: Spec
    index: Mapping[str, Mapping[str, Tensor]]
    models: tuple[str, ...]
    report: Mapping[str, Any] = field(default_factory=dict)

    def of(self, group: Group, entry: Entry, model: int) -> Tensor:
        """The index vector [n] of a model on an entry's axis (or on its part of it)."""
        return self.index[group.name][entry.view][model]

    def aligned(self, name: str, tensor: Tensor, model: int) -> Tensor:
        """A parameter of a model with its units in the anchor's order; `tensor` itself where nothing moves."""
        for group, entry in self.entries.get(name, ()):
            index = self.of(group, entry, model)
            if not torch.equal(index, torch.arange(len(index))):
                tensor = tensor.index_select(entry.axis, whole_axis(index, entry.part).to(tensor.device))
        return tensor

    @property
    def entries(self) -> dict[str, list[tuple[Group, Entry]]]:
        return self.spec.by_parameter()


def whole_axis(index: Tensor, part: tuple[int, int]) -> Tensor:
    """An index of one of several equal parts of an axis as an index of the axis."""
    number, parts = part
    n = len(index)
    axis = torch.arange(n * parts)
    axis[number * n : (number + 1) * n] = index + number * n
    return axis


def identity(spec: Spec, models: Sequence[str]) -> Permutations:
    """The permutations that move nothing."""
    index = {
        group.name: {view: torch.arange(n).repeat(len(models), 1) for view, n in group.views().items()}
        for group in spec.groups
    }
    return Permutations(spec=spec, index=index, models=tuple(models))
