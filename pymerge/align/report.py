"""What a search did, as numbers: units moved, similarity before and after, how far an assignment may be off."""

from __future__ import annotations

from typing import Any

import torch

from pymerge.align.groups import Group, View
from pymerge.align.match import Match, blocks_of, unmoved
from pymerge.align.solve import Scores, Solver
from pymerge.align.sweeps import Options, Solution


def report_of(solver: Solver, solution: Solution[Match]) -> dict[str, Any]:
    """See `find_permutations`."""
    groups, start = solver.spec.groups, {group.name: unmoved(group) for group in solver.spec.groups}
    before = similarity(solver, [start] * len(solution.state))
    after = similarity(solver, solution.state)
    rows = {}
    for group in groups:
        found = [placed[group.name] for placed in solution.state]
        rows[group.name] = {
            "units": sum(group.views().values()),
            "moved": [moved(match) for match in found],
            "before": [mean(of[group.name]) for of in before],
            "after": [mean(of[group.name]) for of in after],
            "gap": [match.gap for match in found],
        }
    return search_report(solver.options, solution) | {
        "before": overall(before),
        "after": overall(after),
        "groups": rows,
    }


def search_report(options: Options, solution: Solution[Any]) -> dict[str, Any]:
    return {
        "alpha": options.alpha,
        "seed": options.seed,
        "sweeps": len(solution.objectives),
        "assignments": solution.solved,
    }


def similarity(solver: Solver, placed: list[dict[str, Match]]) -> list[dict[str, list[float]]]:
    """Of each model, group -> mean similarity of each set of units, with all groups where they are."""
    alpha = solver.options.alpha
    found: list[dict[str, list[float]]] = []
    for t, of_model in enumerate(placed, 1):
        found.append({})
        for group in solver.spec.groups:
            seen = solver.activations[t - 1].get(group.name, {})
            weights = solver.weights.matched(group, t, of_model) if solver.weights is not None else {}
            acts = activations(group, seen, of_model[group.name])
            found[-1][group.name] = [
                alpha * weights[s.base] + (1 - alpha) * acts[s.base]
                if s.base in weights and s.base in acts
                else weights.get(s.base, acts.get(s.base, 0.0))
                for s in blocks_of(group).sets
            ]
    return found


def activations(group: Group, seen: Scores, match: Match) -> dict[View, float]:
    found: dict[View, float] = {}
    for unit_set in blocks_of(group).sets:
        if unit_set.base in seen:
            matched = [
                seen[view].gather(1, match.index[view][:, None]).sum(dtype=torch.float64)
                for view in unit_set.views
                if view in seen
            ]
            found[unit_set.base] = float(sum(matched)) / len(match.index[unit_set.base])
    return found


def moved(match: Match) -> int:
    return sum(int((index != torch.arange(len(index))).sum()) for index in match.index.values())


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def overall(found: list[dict[str, list[float]]]) -> float:
    """Mean over models of the mean over sets of units: what the sweeps raise, with all groups final."""
    return mean([mean([value for values in of.values() for value in values]) for of in found])
