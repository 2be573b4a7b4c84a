"""Spherical mean of any number of models, or of their task vectors, in one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pymerge.methods.base import REQUIRED, PerModel, param, per_task, register
from pymerge.methods.gram import Gram, GramCombine, norms
from pymerge.methods.selection import zero_sum

_RESOLVED = 1e-7  # a shorter mean of unit vectors is rounding: its square is a difference of float64 numbers near 1


@dataclass(frozen=True)
class MultiSlerpWeights:
    """Gram matrix -> coefficients of the tensors. weights: normalised if the method does so."""

    weights: tuple[float, ...]
    eps: float

    def __call__(self, gram: Gram) -> tuple[float, ...]:
        if len(self.weights) == 1:
            return (1.0,)
        lengths = norms(gram)
        a = [w / (length + self.eps) for w, length in zip(self.weights, lengths, strict=True)]
        squares = (x * g * y for x, row in zip(a, gram, strict=True) for g, y in zip(row, a, strict=True))
        mean = math.sqrt(max(0.0, math.fsum(squares)))
        if mean < max(self.eps, _RESOLVED):
            return self.weights
        size = math.fsum(w * length for w, length in zip(self.weights, lengths, strict=True))
        return tuple(x * size * math.cos(self.eps) / mean for x in a)


@register("multislerp")
@dataclass(frozen=True, kw_only=True)
class MultiSlerp(GramCombine):
    """Direction of the weighted mean of unit vectors, times the weighted mean of norms; with a base of task vectors.

    u_t = x_t / (||x_t|| + eps), m = sum_t w_t u_t, merged = m / ||m|| cos(eps) sum_t w_t ||x_t||.
    mergekit projects the u_t onto the tangent space at m / ||m||, averages there and projects back; that average is
    zero by the choice of the point, which leaves this formula. Where m vanishes (opposite vectors; no update at all)
    the merge is sum_t w_t x_t (mergekit: for two models; for more it stops). One model is returned as it is.
    """

    weight: PerModel = param(1.0, "w_t", per_model=True, mergekit=REQUIRED)
    normalize_weights: bool = param(True, "divide the weights by their sum")
    eps: float = param(1e-8, "added to norms, and the angle of the last step", low=0, open_low=True)

    paper = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    base_role = "optional"

    def conflicts(self) -> list[str]:
        return zero_sum(self.weight, self.normalize_weights, "normalize_weights")

    def coefficients(self, tasks: int) -> MultiSlerpWeights:
        weights = per_task(self.weight, tasks, "weight")
        total = math.fsum(weights) if self.normalize_weights else 1.0
        return MultiSlerpWeights(tuple(w / total for w in weights), self.eps)
