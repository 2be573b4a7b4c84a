"""Clusters of units of several models (zip), and the mean over them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pymerge.align.groups import Entry, Group, Spec, View
from pymerge.align.permutations import positions
from pymerge.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """For every group the merged unit that each unit of each model goes to.

    spec    of groups of Units: heads without a common order of q, k and v
    index   group name -> view -> int64 [T, n], values 0..n-1, each at least once
    models  labels of the T models
    report, fingerprints  as of Permutations
    """

    spec: Spec
    index: Mapping[str, Mapping[View, Tensor]]
    models: tuple[str, ...]
    report: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: tuple[Mapping[str, Any], ...] = ()

    def source(self, name: str, model: int) -> str:
        """The parameter of a model that `aligned` takes for `name`."""
        return name

    def aligned(self, name: str, tensor: Tensor, model: int) -> Tensor:
        """A parameter of a model, float32, as its share of the merged model's, which is the mean over all models.

        An axis that produces units becomes, for each cluster of s units of all models, T / s times the sum of the
        model's own; an axis that consumes them the sum of the model's own."""
        for group, entry in self.entries.get(name, ()):
            share = self.shares[group.name] if entry.role == "out" else None
            tensor = collected(tensor, entry, self.index[group.name][entry.view][model], share)
        return tensor.float()

    def check(self) -> None:
        """Every merged unit has units of the models, and no unit another merged one.

        Raises   InputError that lists every problem"""
        problems = self.spec.structure_problems()
        for group in self.spec.groups if not problems else ():
            for view, n in group.views().items():
                clusters = self.index.get(group.name, {}).get(view)
                shape = None if clusters is None else tuple(clusters.shape)
                if clusters is None or shape != (len(self.models), n):
                    problems.append(f"group {group.name}: index {shape}, expected {(len(self.models), n)}")
                elif not torch.equal(clusters.unique(), torch.arange(n)):
                    problems.append(f"group {group.name}: its clusters are not 0 to {n - 1}")
        if problems:
            raise InputError("these are not clusters of the spec's groups:\n" + "\n".join(problems))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that `open_permutations` reads; it appears complete or not at all."""
        from pymerge.align.store import save

        save(self, path)

    @cached_property
    def entries(self) -> dict[str, list[tuple[Group, Entry]]]:
        return self.spec.by_parameter()

    @cached_property
    def shares(self) -> dict[str, Tensor]:
        """Group -> T over the number of units in each cluster."""
        return {name: shares_of(views["units"]) for name, views in self.index.items()}


def shares_of(clusters: Tensor) -> Tensor:
    """T / s of each cluster, float32 [n], of int64 [T, n]."""
    models, size = clusters.shape
    return models / torch.bincount(clusters.flatten(), minlength=size).float()


def collected(tensor: Tensor, entry: Entry, clusters: Tensor, share: Tensor | None) -> Tensor:
    """Sums, float32, over the units of each cluster on an entry's axis, times `share` [n] where given.

    clusters  int64 [n]: of each unit of the model"""
    places = positions(len(clusters), entry)
    size = tensor.shape[entry.axis]
    target = torch.arange(size)
    target[places] = places[clusters]
    summed = torch.zeros_like(tensor, dtype=torch.float32).index_add_(entry.axis, target, tensor.float())
    if share is None:
        return summed
    scale = torch.ones(size)
    scale[places] = share[:, None]
    return summed.mul_(scale.view([size if axis == entry.axis else 1 for axis in range(tensor.dim())]))
