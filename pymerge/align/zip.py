"""Greedy clustering of the units of all models into as many as one has (zip)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pymerge.align.groups import Units
from pymerge.align.match import match
from pymerge.errors import NumericError


@dataclass(frozen=True, kw_only=True)
class Zip:
    """clusters int64 [T, n] of each unit; values: mean similarity of what was put together."""

    clusters: Tensor
    values: tuple[float, ...]
    key: bytes = b""

    def __post_init__(self) -> None:
        digest = hashlib.blake2b(self.clusters.numpy().tobytes(), digest_size=16)
        object.__setattr__(self, "key", digest.digest())


def zip_units(group: Units, similarity: Tensor, models: int, decay: float, budget: float) -> Zip:
    """n clusters of the T n units, best pairs first, whole blocks of one model with whole blocks of another.

    similarity  float32 [T n, T n], symmetric
    decay       similarity of what was put together to others: that times the smaller one
    budget      share of the merges that may be within one model, over the group; within a block all of its share
    Cost        a pass over the similarities, then O(T n) for each of (T - 1) n merges
    Source      arXiv 2305.03053; the released MuDSC, default_group_fusion_weight"""
    n, blocks = group.size, group.blocks
    width, removed = n // blocks, (models - 1) * n
    state = similarity.numpy()
    left = [int((removed // models) * budget + 1e-4)] * models
    spent: set[int] = set()  # models with no merges left; a budget is looked at after a merge, so one is always free
    clusters = torch.empty(models * n, dtype=torch.int64)
    values: list[float] = []
    for number, chosen in enumerate(matched_blocks(group, similarity, models)):
        units = np.concatenate([np.arange(width) + model * n + block * width for model, block in enumerate(chosen)])
        greedy = Greedy(state[np.ix_(units, units)], np.repeat(np.arange(models), width), decay)
        of_block = [removed // (models * blocks)] * models
        for model in spent:
            greedy.forbid(model)
        for _ in range((models - 1) * width):
            value, within = greedy.merge()
            values.append(value)
            if within is not None:
                left[within] -= 1
                of_block[within] -= 1
                if left[within] <= 0:
                    spent.add(within)
                if within in spent or (blocks > 1 and of_block[within] <= 0):
                    greedy.forbid(within)
        clusters[torch.from_numpy(units)] = torch.from_numpy(greedy.numbered()) + number * width
    return Zip(clusters=clusters.view(models, n), values=(sum(values) / len(values),))


def matched_blocks(group: Units, similarity: Tensor, models: int) -> list[list[int]]:
    """For each block of the anchor the blocks of all models that it goes with."""
    n = group.size
    sets = [[b] for b in range(group.blocks)]
    for model in range(1, models):
        scores = similarity[:n, model * n : (model + 1) * n].contiguous()
        index = match(group, {"units": scores}, -float("inf")).index["units"]
        order = index.view(group.blocks, -1)[:, 0] // (n // group.blocks)
        for b, own in enumerate(order.tolist()):
            sets[b].append(own)
    return sets


class Greedy:
    """Repeatedly puts the two most similar together; the best partner behind each row is kept.

    state  float32 [N, N], symmetric; overwritten
    model  [N]: which model a unit is of; a cluster counts as of its first unit's
    """

    def __init__(self, state: np.ndarray, model: np.ndarray, decay: float) -> None:
        self.state, self.model, self.decay = state, model, np.float32(decay)
        self.owner = np.arange(len(model))  # unit -> first unit of its cluster
        self.alive = np.ones(len(model), dtype=bool)
        np.fill_diagonal(state, -np.inf)
        self.partner = np.zeros(len(model), dtype=np.int64)
        self.best = np.full(len(model), -np.inf, dtype=np.float32)
        self.rescan(range(len(model)))

    def rescan(self, rows: Iterable[int]) -> None:
        for row in rows:
            tail = self.state[row, row + 1 :]
            if len(tail):
                self.partner[row] = at = row + 1 + int(tail.argmax())
                self.best[row] = self.state[row, at]

    def merge(self) -> tuple[float, int | None]:
        """Puts the most similar pair together, of equal ones the first, row by row; its similarity, and the model that
        both are of, if one is."""
        i = int(self.best.argmax())
        j, value = int(self.partner[i]), float(self.best[i])
        if value == -np.inf:
            raise NumericError("zip: no pair of units is left that may be put together: raise zip_budget")
        within = int(self.model[i]) if self.model[i] == self.model[j] else None
        joined = self.decay * np.minimum(self.state[i], self.state[j])
        joined[i] = joined[j] = -np.inf
        self.state[i], self.state[:, i] = joined, joined
        self.state[j], self.state[:, j] = -np.inf, -np.inf
        self.owner[self.owner == j] = i
        self.alive[j], self.best[j] = False, -np.inf
        self.update(i, j)
        return value, within

    def update(self, i: int, j: int) -> None:
        """Best partners after row and column i have changed and j is gone."""
        lost = np.isin(self.partner[:j], (i, j)) & self.alive[:j]
        lost[i] = True
        column, best, partner = self.state[:i, i], self.best[:i], self.partner[:i]
        better = ~lost[:i] & ((column > best) | ((column == best) & (i < partner)))
        best[better], partner[better] = column[better], i
        self.rescan(np.flatnonzero(lost).tolist())

    def forbid(self, model: int) -> None:
        """No more pairs within a model."""
        own = np.flatnonzero(self.alive & (self.model == model))
        self.state[np.ix_(own, own)] = -np.inf
        self.rescan(own.tolist())

    def numbered(self) -> np.ndarray:
        """Cluster of each unit, numbered by first units."""
        return np.searchsorted(np.flatnonzero(self.alive), self.owner)
