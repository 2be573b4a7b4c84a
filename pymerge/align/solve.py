"""MuDSC: the units of every model matched to the anchor's by a mix of weights and activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pymerge.align.groups import Group, Spec, View
from pymerge.align.match import Match, blocks_of, match, unmoved
from pymerge.align.sweeps import Options, Solution, search
from pymerge.align.weights import WeightSimilarity

Scores = Mapping[View, Tensor]  # as `match` takes them


class Solver:
    """Finds permutations of the groups of a spec, of each model by itself.

    weights      None: activations alone
    activations  of each model but the anchor, group -> similarities; a set of units that is not in it goes by its
                 weights alone
    """

    def __init__(
        self,
        spec: Spec,
        weights: WeightSimilarity | None,
        activations: Sequence[Mapping[str, Scores]],
        options: Options,
    ) -> None:
        self.spec, self.weights, self.activations, self.options = spec, weights, activations, options

    def run(self, from_activations: bool) -> Solution[Match]:
        """Sweeps from what activations alone ask for, or from the identity."""
        groups = self.spec.groups
        place = self.by_activations if from_activations else lambda group, t: unmoved(group)
        start = [{group.name: place(group, t) for group in groups} for t in range(len(self.activations))]
        if self.weights is None:
            return Solution(state=start)
        return search(groups, start, self.solve, self.weights.neighbours, self.options)

    def by_activations(self, group: Group, t: int) -> Match:
        seen = self.activations[t].get(group.name)
        return unmoved(group) if seen is None else match(group, seen, self.options.threshold)

    def solve(self, group: Group, t: int, placed: Mapping[str, Match]) -> Match:
        assert self.weights is not None
        if self.options.alpha == 0 and not unseen(group, self.activations[t]):
            return self.by_activations(group, t)
        scores = self.weights.scores(group, t + 1, placed)
        seen, alpha = self.activations[t].get(group.name, {}), self.options.alpha
        for unit_set in blocks_of(group).sets:
            for view in unit_set.views:
                if view in scores and unit_set.base in seen:
                    scores[view].mul_(alpha)
                    if view in seen:
                        scores[view].add_(seen[view], alpha=1 - alpha)
        return match(group, scores, self.options.threshold)


def unseen(group: Group, activations: Mapping[str, Scores]) -> bool:
    """Whether there are units of the group that no activations say anything of."""
    return any(unit_set.base not in activations.get(group.name, {}) for unit_set in blocks_of(group).sets)
