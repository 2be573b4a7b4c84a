"""Spherical interpolation between two models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pymerge.methods.base import REQUIRED, ElementWiseCombine, TensorInfo, param, register
from pymerge.ops.delta_rule import DeltaRule

_DOT_THRESHOLD = 0.9995  # mergekit merge_methods/slerp.py: closer than this in direction, interpolate linearly
_NORM_FLOOR = 1e-8  # same file: a shorter vector is not normalised


@dataclass(frozen=True)
class SlerpWeights:
    """Gram matrix of the two flattened tensors -> the coefficients of the two ends."""

    t: float

    def __call__(self, gram: Sequence[Sequence[float]]) -> tuple[float, ...]:
        norms = [norm if norm > _NORM_FLOOR else 1.0 for norm in (math.sqrt(gram[0][0]), math.sqrt(gram[1][1]))]
        dot = max(-1.0, min(1.0, gram[0][1] / norms[0] / norms[1]))
        if abs(dot) > _DOT_THRESHOLD:
            return (1.0 - self.t, self.t)
        theta = math.acos(dot)
        return (math.sin((1.0 - self.t) * theta) / math.sin(theta), math.sin(self.t * theta) / math.sin(theta))


@register("slerp")
@dataclass(frozen=True, kw_only=True)
class Slerp(ElementWiseCombine):
    """The base (t = 0) and one other model (t = 1), each tensor as one vector: constant speed along the great circle.

    Ends within about 1.8 degrees of each other (or of opposite directions) are interpolated linearly.
    """

    t: float = param(REQUIRED, "position between the base (0) and the other model (1)", low=0.0, high=1.0)

    paper = "Shoemake 1985, doi 10.1145/325165.325242"
    base_role = "first"
    models = (1, 1)

    def rule(self, info: TensorInfo) -> DeltaRule:
        return DeltaRule(weights=(1.0 - self.t, self.t), gram_weights=SlerpWeights(self.t))
