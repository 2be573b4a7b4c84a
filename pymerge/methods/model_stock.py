"""Model Stock: how far from the base to the mean, by the angle between the task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.methods.base import STYLES, Style, param, register
from pymerge.methods.gram import Gram, GramCombine, Vectors, norms

if TYPE_CHECKING:
    from torch import Tensor

_PRODUCT_FLOOR = 1e-6  # mergekit 0.1.5 model_stock: smallest divisor of a cosine
_SINGULAR = 1e-6  # same: 1 + (T - 1) c closer to zero gives no finite estimate


@dataclass(frozen=True)
class ModelStockWeights:
    """Gram matrix of the task vectors -> q / T for each."""

    floor: float
    clamp: bool

    def __call__(self, gram: Gram) -> tuple[float, ...]:
        tasks, lengths = len(gram), norms(gram)
        total = 0.0
        for t in range(tasks):
            for s in range(t):
                divisor = max(lengths[s] * lengths[t], self.floor)
                total += max(-1.0, min(1.0, gram[s][t] / divisor)) if divisor else 0.0
        cosine = total / (tasks * (tasks - 1) / 2)
        divisor = 1.0 + (tasks - 1) * cosine
        q = 0.0 if abs(divisor) < _SINGULAR else tasks * cosine / divisor
        return ((max(0.0, min(1.0, q)) if self.clamp else q) / tasks,) * tasks


@register("model_stock")
@dataclass(frozen=True, kw_only=True)
class ModelStock(GramCombine):
    """W = W_0 + q mean_t (W_t - W_0), q = T c / (1 + (T - 1) c), c the mean cosine between two task vectors.

    Task vectors that point apart (c < 0) give q < 0, away from them; q is 0 where no estimate is finite
    (c = -1 / (T - 1)) and where no task differs from the base.
    authors   cosines of any task vectors; one with a task vector that is zero is 0
    mergekit  the product of the norms counts as 1e-6 where it is smaller, which shrinks small updates
    """

    style: Style = param("authors", "whose formula and defaults", mergekit="mergekit", choices=STYLES)
    filter_wise: bool = param(False, "one q for each row (along the last dimension), not one for the tensor")
    clamp: bool = param(False, "keep q within [0, 1]")

    paper = "arXiv 2403.19522"
    models = (2, None)

    @property
    def vectors(self) -> Vectors:
        return "rows" if self.filter_wise else "tensor"

    @property
    def floor(self) -> float:
        return 0.0 if self.style == "authors" else _PRODUCT_FLOOR

    def coefficients(self, tasks: int) -> ModelStockWeights:
        return ModelStockWeights(self.floor, self.clamp)

    def row_coefficients(self, gram: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        tasks = len(gram)
        lengths = [gram[t][t].sqrt() for t in range(tasks)]
        cosine = gram[0][0].new_zeros(gram[0][0].shape)
        for t in range(tasks):
            for s in range(t):
                divisor = (lengths[s] * lengths[t]).clamp(min=self.floor)
                cosine += (gram[s][t] / divisor.masked_fill(divisor == 0, 1.0)).clamp(-1.0, 1.0)
        cosine /= tasks * (tasks - 1) / 2
        divisor = 1.0 + (tasks - 1) * cosine
        singular = divisor.abs() < _SINGULAR
        q = (tasks * cosine / divisor.masked_fill(singular, 1.0)).masked_fill(singular, 0.0)
        return [(q.clamp(0.0, 1.0) if self.clamp else q) / tasks] * tasks
