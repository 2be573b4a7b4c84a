"""The sweeps of MuDSC: every group in turn is matched anew, given where all the others are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pymerge.align.groups import Group, Spec, View
from pymerge.align.match import Match, blocks_of, match, unmoved
from pymerge.align.weights import WeightSimilarity

Scores = Mapping[View, Tensor]  # as `match` takes them


@dataclass(frozen=True, kw_only=True)
class Options:
    """alpha, max_sweeps, patience, seed, threshold of `find_permutations`."""

    alpha: float
    max_sweeps: int = 100
    patience: int = 5
    seed: int = 0
    threshold: float = 1e-6


@dataclass(frozen=True, kw_only=True)
class Solution:
    """placed: of each model but the anchor, group -> Match; what was done: sweeps, assignments solved, objective of
    each sweep, as it was when groups were visited."""

    placed: list[dict[str, Match]]
    sweeps: int = 0
    solved: int = 0
    objectives: list[float] = field(default_factory=list)


class Solver:
    """Gauss-Seidel sweeps over the groups of a spec.

    weights      None: activations alone
    activations  of each model but the anchor, group -> similarities; a set of units that is not in it has its weights'
                 similarity alone
    """

    def __init__(
        self, spec: Spec, weights: WeightSimilarity | None, activations: list[dict[str, Scores]], options: Options
    ) -> None:
        self.spec, self.weights, self.activations, self.options = spec, weights, activations, options
        self.memo: dict[tuple[str, int, tuple[bytes, ...]], Match] = {}

    def run(self, from_activations: bool) -> Solution:
        """The best state that the sweeps have met. A group that sees the neighbours it has seen before has the match
        that it had, and a sweep that changes nothing ends the search: both give what all sweeps would."""
        models = range(1, len(self.activations) + 1)
        if self.weights is None or from_activations:
            placed = [
                {group.name: self.by_activations(group, t) for group in self.spec.groups} for t in models
            ]
        else:
            placed = [{group.name: unmoved(group) for group in self.spec.groups} for t in models]
        if self.weights is None:
            return Solution(placed=placed)
        return self.sweeps(placed)

    def sweeps(self, current: list[dict[str, Match]]) -> Solution:
        groups, generator = self.spec.groups, torch.Generator().manual_seed(self.options.seed)
        best, best_value, waited, objectives = current, -float("inf"), 0, []
        for _ in range(self.options.max_sweeps):
            before, current = current, [dict(placed) for placed in current]
            values: list[float] = []
            for at in torch.randperm(len(groups), generator=generator).tolist():
                values += self.visit(groups[at], current)
            objectives.append(sum(values) / len(values))
            if objectives[-1] > best_value:
                best, best_value, waited = current, objectives[-1], 0
            else:
                waited += 1
            if waited == self.options.patience or same(before, current):
                break
            current = best
        return Solution(placed=best, sweeps=len(objectives), solved=len(self.memo), objectives=objectives)

    def visit(self, group: Group, current: list[dict[str, Match]]) -> list[float]:
        """Matches one group of every model; the mean similarity of each of its sets of units."""
        for t, placed in enumerate(current, 1):
            placed[group.name] = self.solve(group, t, placed)
        values = zip(*(placed[group.name].values for placed in current), strict=True)
        return [sum(value) / len(current) for value in values]

    def solve(self, group: Group, t: int, placed: Mapping[str, Match]) -> Match:
        assert self.weights is not None
        neighbours = self.weights.neighbours(group.name)
        key = group.name, t, tuple(placed[name].key for name in neighbours)
        if key not in self.memo:
            scores = self.weights.scores(group, t, placed)
            self.memo[key] = match(group, self.mixed(group, t, scores), self.options.threshold)
        return self.memo[key]

    def mixed(self, group: Group, t: int, scores: dict[View, Tensor]) -> dict[View, Tensor]:
        """alpha weights + (1 - alpha) activations; overwrites the weights' scores."""
        seen = self.activations[t - 1].get(group.name, {})
        for unit_set in blocks_of(group).sets:
            if unit_set.base not in seen:
                continue
            for view in (unit_set.base, unit_set.shared):
                if view in scores:
                    scores[view].mul_(self.options.alpha).add_(seen[view], alpha=1 - self.options.alpha)
        return scores

    def by_activations(self, group: Group, t: int) -> Match:
        seen = self.activations[t - 1].get(group.name)
        return unmoved(group) if seen is None else match(group, seen, self.options.threshold)


def same(one: list[dict[str, Match]], other: list[dict[str, Match]]) -> bool:
    return all(a[name].key == b[name].key for a, b in zip(one, other, strict=True) for name in a)
