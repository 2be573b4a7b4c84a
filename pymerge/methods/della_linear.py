"""DELLA: drop entries at random, the smaller the likelier, rescale the rest, add."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pymerge.methods.base import (
    REQUIRED,
    STYLES,
    Combine,
    PerModel,
    Style,
    TaskGroup,
    TensorInfo,
    param,
    per_task,
    register,
)
from pymerge.methods.selection import INT8_MASK, weight_sum, zero_sum
from pymerge.ops.delta_rule import DeltaRule, mask_key

if TYPE_CHECKING:
    from torch import Tensor

PART = 1 << 18  # entries that are worked on at once (whole rows): their temporaries stay in the cache
_PART_BYTES = 96  # of temporaries an entry, beside the thinned task vectors


@register("della_linear")
@dataclass(frozen=True, kw_only=True)
class DellaLinear(Combine):
    """W = W_0 + scale * sum_t w_t r_t B_t (W_t - W_0), B_t a random mask that keeps large entries more often.

    In each row the magnitudes are ranked (equal ones: lowest index first, as the larger); the largest is kept with
    probability density + epsilon, the smallest with density - epsilon, linear in between. Rows run along the last
    dimension of a matrix, along dimension 1 of a tensor with more; a vector is one row; a row of one entry has
    probability `density`. density 1 keeps everything, whatever epsilon is.

    authors   r_t divides each kept entry by its own probability (epsilon 0, their code's default, is DARE)
    mergekit  r_t restores the L1 norm of each tensor's task vector (1 where a norm is below 1e-7)
    """

    style: Style = param("authors", "whose formula and defaults", mergekit="mergekit", choices=STYLES)
    weight: PerModel = param(1.0, "w_t", per_model=True, mergekit=REQUIRED)
    density: PerModel = param(0.5, "mean probability of keeping", low=0, high=1, per_model=True, mergekit=1.0)
    epsilon: PerModel = param(0.15, "half the range of the probabilities", low=0, high=1, per_model=True)
    rescale: bool = param(True, "make up for the dropped entries")
    normalize: bool = param(False, "divide by the sum of the weights")
    scale: float = param(1.0, "lambda")

    paper = "arXiv 2406.11617"
    ignored = INT8_MASK
    elects: ClassVar[bool] = False  # whether only entries with the elected sign are merged

    def conflicts(self) -> list[str]:
        problems = [] if self.elects else zero_sum(self.weight, self.normalize)
        for density, epsilon in self._ranges(self._models()):
            if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                problems.append(
                    f"epsilon: density {density:g} +- epsilon {epsilon:g} must lie between 0 and 1: choose epsilon "
                    f"below {min(density, 1 - density):g}, or density 1 to keep everything"
                )
        return list(dict.fromkeys(problems))

    def _models(self) -> int:
        """As many models as the hyperparameters tell."""
        return max((len(v) for v in (self.density, self.epsilon) if isinstance(v, tuple)), default=1)

    def _ranges(self, tasks: int) -> list[tuple[float, float]]:
        """(density, epsilon) of each task."""
        density, epsilon = per_task(self.density, tasks, "density"), per_task(self.epsilon, tasks, "epsilon")
        return list(zip(density, epsilon, strict=True))

    @property
    def restores_norm(self) -> bool:
        return self.rescale and self.style != "authors"

    @property
    def unit(self) -> Literal["tensor", "rows"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "tensor" if self.restores_norm else "rows"

    def workspace(self, info: TensorInfo) -> int:
        row = math.prod(info.shape[1:]) if len(info.shape) > 1 else info.numel
        masks = info.numel * info.tasks if self.restores_norm else 0
        return min(info.numel, max(PART, row)) * (4 * info.tasks + _PART_BYTES) + masks

    def rule(self, info: TensorInfo) -> DeltaRule:
        """The merge of the thinned task vectors."""
        weights = per_task(self.weight, info.tasks, "weight")
        if self.elects:
            norm = "weights" if self.normalize else "none"
            return DeltaRule(weights=weights, scale=self.scale, elect="mergekit", norm=norm)
        divisor = weight_sum(weights, info.tasks) if self.normalize else 1.0
        return DeltaRule(weights=weights, scale=self.scale, divisor=divisor)

    def combine(self, group: TaskGroup) -> Tensor:
        from pymerge.methods._della_mask import RankedDrop, merge_dropped

        info = group.info
        drops = [
            RankedDrop(density=density, epsilon=epsilon, key=mask_key(info.seed, info.name, task))
            for task, (density, epsilon) in enumerate(self._ranges(info.tasks))
        ]
        rescale = "none" if not self.rescale else "l1" if self.restores_norm else "keep"
        return merge_dropped(group, drops, rescale, self.rule(info))
