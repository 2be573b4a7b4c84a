"""Spherical interpolation between two models, or between their task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.base import REQUIRED, PerModel, param, per_task, register
from pymerge.methods.gram import Gram, GramCombine, Vectors, norms

if TYPE_CHECKING:
    from torch import Tensor

_SUM_FLOOR = 1e-6  # mergekit 0.1.5 nuslerp: weights whose sum is smaller count as equal
_NORM_FLOOR = 1e-7  # same: a shorter vector is divided by this
# The squared sine below which two directions are one line: rounding alone makes a Gram matrix of about 1e-15 look so.
_COLINEAR = 1e-12


@dataclass(frozen=True)
class NuSlerpWeights:
    """Gram matrix of two flattened tensors -> the coefficients of the great circle through them, at t."""

    t: float

    def __call__(self, gram: Gram) -> tuple[float, ...]:
        first, second = (max(norm, _NORM_FLOOR) for norm in norms(gram))
        cosine = max(-1.0, min(1.0, gram[0][1] / first / second))
        if 1.0 - cosine**2 <= _COLINEAR:
            return (1.0 - self.t, self.t)
        angle = math.acos(cosine)
        return (math.sin((1.0 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle))


@register("nuslerp")
@dataclass(frozen=True, kw_only=True)
class NuSlerp(GramCombine):
    """Two models along the great circle, at t = w_2 / (w_1 + w_2); with a base their task vectors, without one weights.

    Each tensor is one vector (nuslerp_flatten), or each of its rows along the last dimension, or each of its columns
    along the first (nuslerp_row_wise: the name is mergekit's). Vectors on one line, opposite ones too, are interpolated
    linearly; weights that cancel give t = 1/2.
    """

    weight: PerModel = param(1.0, "w_t", per_model=True, mergekit=REQUIRED)
    nuslerp_flatten: bool = param(True, "a tensor is one vector")
    nuslerp_row_wise: bool = param(False, "where it is not: vectors along the first dimension, not the last")

    paper = "Shoemake 1985, doi 10.1145/325165.325242"
    base_role = "optional"
    models = (2, 2)

    @property
    def vectors(self) -> Vectors:
        return "tensor" if self.nuslerp_flatten else "columns" if self.nuslerp_row_wise else "rows"

    def position(self) -> float:
        """t"""
        first, second = per_task(self.weight, 2, "weight")
        return 0.5 if abs(first + second) < _SUM_FLOOR else second / (first + second)

    def coefficients(self, tasks: int) -> NuSlerpWeights:
        return NuSlerpWeights(self.position())

    def row_coefficients(self, gram: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        first, second = (gram[t][t].sqrt().clamp(min=_NORM_FLOOR) for t in (0, 1))
        t, cosine = self.position(), (gram[0][1] / first / second).clamp(-1.0, 1.0)
        line = 1.0 - cosine**2 <= _COLINEAR
        angle = cosine.masked_fill(line, 0.0).acos()
        sine = angle.sin()
        ends = ((angle * (1.0 - t)).sin() / sine, (angle * t).sin() / sine)
        return [end.masked_fill(line, linear) for end, linear in zip(ends, (1.0 - t, t), strict=True)]
