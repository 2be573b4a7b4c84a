"""MuDSC's zip: units of all models clustered by a mix of weights and activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pymerge.align.clusters import collected, shares_of
from pymerge.align.groups import Entry, Group, Spec, Units
from pymerge.align.match import blocks_of
from pymerge.align.moments import moments, similarities
from pymerge.align.sweeps import Options, Solution, search
from pymerge.align.weights import piece, places_of
from pymerge.align.zip import Zip, zip_units
from pymerge.checkpoint import Checkpoint
from pymerge.errors import InputError, NonFinite


class ZipSolver:
    """Finds clusters of the units of all models, group by group.

    activations  group -> correlations of all units of all models, float32 [T n, T n]; a group that is not in it goes by
                 its weights alone
    cosine, decay, budget  as of `find_permutations`
    Holds        a parameter of every model in float32, and (T n)^2 numbers of a group"""

    def __init__(
        self,
        spec: Spec,
        models: Sequence[Checkpoint],
        activations: Mapping[str, Tensor],
        options: Options,
        *,
        cosine: bool,
        decay: float,
        budget: float,
    ) -> None:
        whole = [group.name for group in spec.groups if not isinstance(group, Units) or group.members]
        if whole:
            raise InputError(f"zip: units of {whole[0]} are whole heads or experts, which cannot be put together")
        self.spec, self.models, self.activations, self.options = spec, models, activations, options
        self.cosine, self.decay, self.budget = cosine, decay, budget
        self.by_parameter = spec.by_parameter()

    def run(self, from_activations: bool) -> Solution[Zip]:
        start = {group.name: self.start(group, from_activations) for group in self.spec.groups}
        if self.options.alpha == 0 and all(group.name in self.activations for group in self.spec.groups):
            return Solution(state=[start])
        return search(self.spec.groups, [start], self.solve, self.neighbours, self.options)

    def start(self, group: Group, from_activations: bool) -> Zip:
        if from_activations and group.name in self.activations:
            return self.zipped(group, self.activations[group.name])
        assert isinstance(group, Units)
        return Zip(clusters=torch.arange(group.size).repeat(len(self.models), 1), values=())

    def zipped(self, group: Group, similarity: Tensor) -> Zip:
        assert isinstance(group, Units)
        return zip_units(group, similarity, len(self.models), self.decay, self.budget)

    def neighbours(self, group: str) -> list[str]:
        """The groups on the other axes of a group's parameters."""
        entries = [entry for entry in self.spec.group(group).entries if entry.similarity]
        return sorted({other.name for entry in entries for other, _ in self.on_other_axes(entry)})

    def on_other_axes(self, entry: Entry) -> list[tuple[Group, Entry]]:
        return [(group, other) for group, other in self.by_parameter[entry.parameter] if other.axis != entry.axis]

    def solve(self, group: Group, t: int, placed: Mapping[str, Zip]) -> Zip:
        seen, alpha = self.activations.get(group.name), self.options.alpha
        if seen is not None and alpha == 0:
            return self.zipped(group, seen)
        scores = self.scores(group, placed)
        return self.zipped(group, scores if seen is None else scores.mul_(alpha).add_(seen, alpha=1 - alpha))

    def scores(self, group: Group, placed: Mapping[str, Zip]) -> Tensor:
        """Similarities of the weights of all units of all models, float32 [T n, T n]."""
        total = len(self.models) * group.views()["units"]
        gram = torch.zeros(total, total)
        first, second = torch.zeros(2, total, dtype=torch.float64)
        count = 0
        for entry in group.entries:
            if entry.similarity:
                rows = torch.cat([self.rows(group, entry, t, placed) for t in range(len(self.models))])
                gram.addmm_(rows, rows.T)
                first += rows.sum(1, dtype=torch.float64)
                second += rows.square().sum(1, dtype=torch.float64)
                count += rows.shape[1]
                if not bool(torch.isfinite(first).all()):
                    raise NonFinite(f"{entry.parameter}: has NaN or infinite entries")
        of = moments(count, first, second, self.cosine)
        return similarities(blocks_of(group), blocks_of(group).sets[0], {"units": gram}, (of, of))["units"]

    def rows(self, group: Group, entry: Entry, t: int, placed: Mapping[str, Zip]) -> Tensor:
        """What a model's units have in an entry, [n, width]. Clusters on other axes are averaged where the axis
        consumes units and summed where it produces them: the reverse of the merge, as released."""
        tensor = self.models[t][entry.parameter].load().cpu()
        for neighbour, other in self.on_other_axes(entry):
            clusters = placed[neighbour.name].clusters
            tensor = collected(tensor, other, clusters[t], shares_of(clusters) if other.role == "in" else None)
        size = group.views()[entry.view]
        return piece(tensor, entry.axis, places_of(entry, size, None), {}, None).reshape(size, -1)
