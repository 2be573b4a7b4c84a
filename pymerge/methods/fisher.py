"""Fisher merging: each entry weighted by how much each model's output depends on it."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.errors import InputError
from pymerge.methods.base import Combine, PerModel, TaskGroup, TensorInfo, param, per_task, register
from pymerge.methods.blocks import BLOCK, in_blocks
from pymerge.methods.surveyed import SUM_BLOCK, SurveyedCombine

if TYPE_CHECKING:
    from torch import Tensor


@register("fisher")
@dataclass(frozen=True, kw_only=True)
class Fisher(SurveyedCombine):
    """W = sum_t c_t (F_t + floor) W_t / sum_t c_t (F_t + floor), entry by entry, of whole weights.

    F_t is the diagonal of the Fisher information of model t, given beside the model (`fisher`), not negative. c_t is
    weight_t over the sum of weights; with normalize it is multiplied by a_t, proportional to 1 / (||F_t|| + floor) with
    the norm over all merged parameters, and of sum 1. Where all F_t are 0 the result is the average with weights c_t.
    """

    weight: PerModel = param(1.0, "how much each model counts", low=0, per_model=True)
    normalize: bool = param(True, "divide each F_t by its norm")
    floor: float = param(1e-6, "added to F_t and to its norm", low=0, open_low=True)

    paper = "arXiv 2111.09832"
    needs = ("fisher",)
    base_role = "none"

    def conflicts(self) -> list[str]:
        zero = not any(self.weight) if isinstance(self.weight, tuple) else self.weight == 0
        return ["weight: one of the weights must be above 0"] if zero else []

    def workspace(self, info: TensorInfo) -> int:
        return 20 * min(BLOCK, info.numel)

    @property
    def rounds(self) -> int:
        return int(self.normalize)

    def survey(self, group: TaskGroup) -> list[array[float]]:
        """Of each task, the sums of F_t^2 over blocks of SUM_BLOCK entries."""
        return [
            array("d", [float(part.double().square_().sum()) for part in importance.reshape(-1).split(SUM_BLOCK)])
            for importance in importances(group)
        ]

    def join(self, one: list[array[float]], other: list[array[float]]) -> list[array[float]]:
        for mine, more in zip(one, other, strict=True):
            mine.extend(more)
        return one

    def decide(self, answer: list[array[float]] | None) -> Combine:
        norms = None if answer is None else tuple(math.sqrt(math.fsum(sums)) for sums in answer)
        return FisherMerge(method=self, norms=norms)


@dataclass(frozen=True, kw_only=True)
class FisherMerge(Combine):
    """The last pass. norms: ||F_t||; None: not divided by."""

    method: Fisher
    norms: tuple[float, ...] | None

    name = "fisher"
    unit = "entries"
    base_role = "none"

    def coefficients(self, tasks: int) -> list[float]:
        """c_t up to a common factor, the largest 1."""
        floor = self.method.floor
        weight = per_task(self.method.weight, tasks, "weight")
        shares = [w / (norm + floor) for w, norm in zip(weight, self.norms or (0.0,) * tasks, strict=True)]
        return [share / max(shares) for share in shares]

    def combine(self, group: TaskGroup) -> Tensor:
        return in_blocks(group, self._combine)

    def _combine(self, group: TaskGroup) -> Tensor:
        import torch

        merged = torch.zeros_like(group.tuned[0], dtype=torch.float32)
        total = torch.zeros_like(merged)
        given, coefficients = importances(group), self.coefficients(len(group.tuned))
        for w, importance, c in zip(group.tuned, given, coefficients, strict=True):
            if bool((importance < 0).any()):
                raise InputError(f"{group.info.name}: Fisher information is never negative, a value here is")
            share = importance.float().add(self.method.floor).mul_(c)
            total += share
            merged += share.mul_(w)
        return merged.div_(total)

    def workspace(self, info: TensorInfo) -> int:
        return 20 * min(BLOCK, info.numel)


def importances(group: TaskGroup) -> tuple[Tensor, ...]:
    if group.weights is None:
        raise InputError(f"{group.info.name}: fisher needs the Fisher information of each model")
    return group.weights
