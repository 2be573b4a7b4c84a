"""Gauss-Seidel sweeps over the groups of a spec, with the stopping rule of the released MuDSC."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from pymerge.align.groups import Group


class Place(Protocol):
    """Where the units of a group are: `key` names it, `values` are the similarities that it was found with."""

    @property
    def key(self) -> bytes: ...
    @property
    def values(self) -> tuple[float, ...]: ...


P = TypeVar("P", bound=Place)
State = list[dict[str, P]]  # of each model that is placed, group -> where its units are
Solve = Callable[[Group, int, Mapping[str, P]], P]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of `find_permutations`."""

    alpha: float
    max_sweeps: int = 100
    patience: int = 5
    seed: int = 0
    threshold: float = 1e-6
    progress: Callable[[int, float], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Solution(Generic[P]):
    """The state found, how many sweeps and group solves it took, and the objective of each sweep: the mean similarity
    that each group had when it was visited."""

    state: State[P]
    objectives: list[float] = field(default_factory=list)
    solved: int = 0


def search(
    groups: Sequence[Group],
    start: State[P],
    solve: Solve[P],
    neighbours: Callable[[str], Sequence[str]],
    options: Options,
) -> Solution[P]:
    """The best state that the sweeps meet. A sweep starts from the best one so far; `patience` of them in a row that
    are no better end the search.

    A group's solution depends on its neighbours alone, so one that sees what it has seen before is not solved again,
    and a sweep that changes nothing is the last: both give what all sweeps would.

    solve       group, number of the model, where its groups are -> where this group goes
    neighbours  group -> the groups that its solution depends on"""
    generator = torch.Generator().manual_seed(options.seed)
    memo: dict[tuple[str, int, tuple[bytes, ...]], P] = {}
    best, best_value, waited, objectives = start, -float("inf"), 0, []
    for _ in range(options.max_sweeps):
        current, values = [dict(placed) for placed in best], []
        for at in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[at]
            for t, placed in enumerate(current):
                key = group.name, t, tuple(placed[name].key for name in neighbours(group.name))
                if key not in memo:
                    memo[key] = solve(group, t, placed)
                placed[group.name] = memo[key]
            of_sets = zip(*(placed[group.name].values for placed in current), strict=True)
            values += [sum(of_set) / len(current) for of_set in of_sets]
        objectives.append(sum(values) / len(values))
        done = same(best, current)
        waited = 0 if objectives[-1] > best_value else waited + 1
        if not waited:
            best, best_value = current, objectives[-1]
        if options.progress is not None:
            options.progress(len(objectives), best_value)
        if done or waited == options.patience:
            break
    return Solution(state=best, objectives=objectives, solved=len(memo))


def same(one: State[P], other: State[P]) -> bool:
    return all(a[name].key == b[name].key for a, b in zip(one, other, strict=True) for name in a)
