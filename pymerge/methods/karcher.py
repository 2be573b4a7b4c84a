"""The Karcher (Riemannian) mean of models on the sphere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pymerge.methods.base import param, register
from pymerge.methods.gram import Gram, GramCombine, norms

_OPPOSITE = 1e-7  # sine of an angle near pi below which the way to the other side has no direction


@dataclass(frozen=True)
class KarcherWeights:
    """Gram matrix -> coefficients of the tensors.

    All vectors of the iteration lie in the span of the T unit vectors u_t: each is a list of T coefficients, with the
    Gram matrix of the u_t as inner product.
    """

    max_iter: int
    tol: float

    def __call__(self, gram: Gram) -> tuple[float, ...]:
        tasks, lengths = len(gram), norms(gram)
        if tasks == 1:
            return (1.0,)
        used = [t for t in range(tasks) if lengths[t] > self.tol]
        weights = [0.0] * tasks
        if used:
            cosines = [[gram[s][t] / lengths[s] / lengths[t] for t in used] for s in used]
            size = math.fsum(lengths) / tasks
            for t, direction in zip(used, self.mean(cosines), strict=True):
                weights[t] = size * direction / lengths[t]
        return tuple(weights)

    def mean(self, cosines: Gram) -> list[float]:
        """Coefficients of the mean direction on unit vectors with these cosines."""
        share = 1.0 / len(cosines)
        m = [share] * len(cosines)
        length = norm(m, cosines)
        # Directions that cancel have no mean to start from: the first of them does.
        m = [1.0, *[0.0] * (len(m) - 1)] if length < self.tol else [x / length for x in m]
        for _ in range(self.max_iter):
            tangent = self.tangent(m, cosines, share)
            angle = norm(tangent, cosines)
            if angle < self.tol:
                break
            m = [math.cos(angle) * x + math.sin(angle) / angle * y for x, y in zip(m, tangent, strict=True)]
            length = norm(m, cosines)
            m = [x / length for x in m]
        return m

    def tangent(self, m: Sequence[float], cosines: Gram, share: float) -> list[float]:
        """sum_t share (theta_t / sin theta_t) (u_t - <u_t, m> m)"""
        step = [0.0] * len(m)
        along = 0.0
        for t, row in enumerate(cosines):
            cosine = max(-1.0, min(1.0, dot(row, m)))
            angle = math.acos(cosine)
            if angle < self.tol or math.sin(angle) < _OPPOSITE:
                continue
            step[t] = share * angle / math.sin(angle)
            along += step[t] * cosine
        return [s - along * x for s, x in zip(step, m, strict=True)]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Sequence[float], cosines: Gram) -> float:
    """Norm of the combination of unit vectors with coefficients a."""
    return math.sqrt(max(0.0, dot(a, [dot(row, a) for row in cosines])))


@register("karcher")
@dataclass(frozen=True, kw_only=True)
class Karcher(GramCombine):
    """The direction with the least mean squared angle to all models, times the mean of their norms.

    Fixed-point iteration on the sphere: mean of the tangents towards each model, then a step along it. Every model has
    the same weight, a base too (no base is subtracted). Tensors with a norm up to `tol` take no part in the direction;
    a model opposite to the current mean pulls nowhere. One model is returned as it is.
    """

    max_iter: int = param(10, "most iterations", low=0)
    tol: float = param(1e-5, "smallest step, in radians, and smallest norm", low=0, open_low=True)

    paper = "Karcher 1977, doi 10.1002/cpa.3160300502; arXiv 2603.04972"
    base_role = "none"

    def coefficients(self, tasks: int) -> KarcherWeights:
        return KarcherWeights(self.max_iter, self.tol)
