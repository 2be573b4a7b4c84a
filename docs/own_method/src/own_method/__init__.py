"""Two merge methods that pymerge finds by the entry points in pyproject.toml."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods import (
    DeltaRule,
    ElementWiseCombine,
    MatrixCombine,
    PerModel,
    TaskGroup,
    TensorInfo,
    param,
    per_task,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loudness:
    """Inner products [T][T] of the task vectors -> what each is multiplied by."""

    weights: tuple[float, ...]

    def __call__(self, gram: Sequence[Sequence[float]]) -> tuple[float, ...]:
        norms = [math.sqrt(gram[t][t]) for t in range(len(gram))]
        mean = sum(norms) / len(norms)
        return tuple(w * mean / norm if norm else 0.0 for w, norm in zip(self.weights, norms, strict=True))


@dataclass(frozen=True, kw_only=True)
class EqualLoudness(ElementWiseCombine):
    """dW = scale * mean_t of w_t d_t mean(|d|) / |d_t|: in each tensor all tasks are heard equally well."""

    weight: PerModel = param(1.0, "w_t, multiplies the task vector", per_model=True)
    scale: float = param(1.0, "lambda, multiplies the merged update")

    def rule(self, info: TensorInfo) -> DeltaRule:
        weights = per_task(self.weight, info.tasks, "weight")
        return DeltaRule(weights=weights, scale=self.scale, divisor=float(info.tasks), gram_weights=Loudness(weights))


@dataclass(frozen=True, kw_only=True)
class LowRankMean(MatrixCombine):
    """dW = scale * the nearest matrix of low rank to the mean of the task vectors."""

    rank: float = param(0.25, "share of the directions to keep", low=0.0, open_low=True, high=1.0)
    scale: float = param(1.0, "lambda, multiplies the merged update")

    def combine(self, group: TaskGroup) -> Tensor:
        from pymerge.linalg import truncated_svd

        tasks = group.info.tasks
        mean = sum((group.delta(t) for t in range(1, tasks)), group.delta(0)) / tasks  # [m, n]
        kept = truncated_svd(mean, max(1, int(self.rank * min(mean.shape))))
        group.notes.facts["rank"] = len(kept.S)
        return (kept.U * kept.S) @ kept.Vh * self.scale
