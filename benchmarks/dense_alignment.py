"""MuDSC's search as plain dense algebra: permutation matrices, stacked Grams of all models, scipy, every sweep in full.

What bench_align.py times `find_permutations` against, and what the tests compare it with: the schedule of the released
code (specification, sections 3.4 to 3.7) with nothing remembered. For specs of Units and models in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from pymerge.align import Spec, Units
from pymerge.align.permutations import positions

Placed = dict[str, list[Tensor]]  # group -> of each model the matrix P, P[r, pi(r)] = 1


class DenseSolver:
    """activations  group -> correlations of the units of all models [T n, T n]; alpha 1 needs none"""

    def __init__(
        self,
        spec: Spec,
        models: Sequence[Mapping[str, Tensor]],
        activations: Mapping[str, Tensor],
        alpha: float,
        seed: int = 0,
    ) -> None:
        self.spec, self.models, self.activations, self.alpha = spec, models, activations, alpha
        self.by_parameter = spec.by_parameter()
        self.generator = torch.Generator().manual_seed(seed)
        self.objectives: list[float] = []

    def identity(self) -> Placed:
        return {g.name: [torch.eye(n) for _ in self.models] for g in self.spec.groups for n in g.views().values()}

    def from_activations(self) -> Placed:
        return {g.name: self.matched(units(g), self.activations[g.name])[0] for g in self.spec.groups}

    def run(self, placed: Placed, max_sweeps: int = 100, patience: int = 5) -> Placed:
        """All sweeps until `patience` of them in a row are no better than the best."""
        best, best_value, waited = placed, -float("inf"), 0
        for _ in range(max_sweeps):
            placed = dict(best)
            value = self.sweep(placed)
            self.objectives.append(value)
            if value > best_value:
                best, best_value, waited = placed, value, 0
            else:
                waited += 1
                if waited == patience:
                    break
        return best

    def sweep(self, placed: Placed) -> float:
        values = []
        for at in torch.randperm(len(self.spec.groups), generator=self.generator).tolist():
            group = units(self.spec.groups[at])
            scores = self.scores(group, placed)
            if self.alpha < 1:
                scores = self.alpha * scores + (1 - self.alpha) * self.activations[group.name]
            placed[group.name], value = self.matched(group, scores)
            values.append(value)
        return sum(values) / len(values)

    def scores(self, group: Units, placed: Placed) -> Tensor:
        """Correlations of the weight vectors of all units of all models [T n, T n]."""
        vectors = [
            torch.cat([self.rows(group, e, t, placed) for e in group.entries if e.similarity], 1)
            for t in range(len(self.models))
        ]
        z = torch.cat(vectors)
        mean = z.mean(1)
        covariance = z @ z.T / z.shape[1] - torch.outer(mean, mean)
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        return covariance / torch.outer(deviation, deviation).clamp(min=1e-7)

    def rows(self, group: Units, entry, t: int, placed: Placed) -> Tensor:
        tensor = self.models[t][entry.parameter].float()
        for other_group, other in self.by_parameter[entry.parameter]:
            if other.axis != entry.axis:
                tensor = along(tensor, other.axis, whole(placed[other_group.name][t], other))
        size = group.size
        places = positions(size, entry).flatten()
        return tensor.movedim(entry.axis, 0)[places].reshape(size, -1)

    def matched(self, group: Units, scores: Tensor) -> tuple[list[Tensor], float]:
        """Matrices of all models, mean matched similarity."""
        n = group.size
        found, values = [torch.eye(n)], []
        for t in range(1, len(self.models)):
            index, value = matched_blocks(scores[:n, t * n : (t + 1) * n].numpy(), group.blocks)
            found.append(torch.eye(n)[torch.from_numpy(index)])
            values.append(value)
        return found, sum(values) / len(values)


def units(group) -> Units:
    assert isinstance(group, Units)
    return group


def along(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    moved = tensor.movedim(axis, 0)
    return (matrix @ moved.reshape(moved.shape[0], -1)).reshape(moved.shape).movedim(0, axis)


def whole(matrix: Tensor, entry) -> Tensor:
    """A matrix over units as one over the entry's whole axis."""
    if entry.part == (0, 1) and entry.span == 1:
        return matrix
    places = positions(len(matrix), entry)
    full = torch.eye(places.numel() * entry.part[1])
    full[places.flatten()] = full[places[matrix.argmax(1)].flatten()]
    return full


def matched_blocks(scores: np.ndarray, blocks: int) -> tuple[np.ndarray, float]:
    n = len(scores)
    width = n // blocks
    value, inner = np.empty((blocks, blocks), np.float32), np.empty((blocks, blocks, width), np.int64)
    for j in range(blocks):
        for k in range(blocks):
            block = scores[j * width : (j + 1) * width, k * width : (k + 1) * width]
            rows, columns = linear_sum_assignment(block, maximize=True)
            value[j, k], inner[j, k] = block[rows, columns].mean(), columns + k * width
    rows, columns = linear_sum_assignment(value, maximize=True)
    index = inner[rows, columns].reshape(-1)
    return index, float(scores[np.arange(n), index].mean())
