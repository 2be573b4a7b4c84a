"""What methods have in common whose coefficients come from inner products of the task tensors alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pymerge.methods.base import ElementWiseCombine, TaskGroup, TensorInfo
from pymerge.ops.delta_rule import DeltaRule

if TYPE_CHECKING:
    from torch import Tensor

Gram = Sequence[Sequence[float]]  # inner products [T][T] of the flattened task tensors, float64
Coefficients = Callable[[Gram], tuple[float, ...]]
Vectors = Literal["tensor", "rows", "columns"]


class GramCombine(ElementWiseCombine):
    """One coefficient a task from the T x T Gram matrix of the task tensors, then one weighted sum.

    A task tensor is one vector, and the merge a `DeltaRule` (two passes over the inputs, no torch); or each of its rows
    (along the last dimension) or columns (along the first) is a vector with coefficients of its own, on torch tensors.
    """

    takes_selection = False  # the Gram matrix must be that of the purified task vectors

    @property
    def vectors(self) -> Vectors:
        """What is one vector."""
        return "tensor"

    def coefficients(self, tasks: int) -> Coefficients:
        """The function from the Gram matrix to the T coefficients."""
        raise NotImplementedError

    def row_coefficients(self, gram: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The same for many vectors at once: gram [T][T] and the T coefficients are float64 tensors of one shape."""
        raise NotImplementedError

    @property
    def element_wise(self) -> bool:
        return self.vectors == "tensor"

    @property
    def unit(self) -> Literal["tensor", "rows"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "rows" if self.vectors == "rows" else "tensor"

    def workspace(self, info: TensorInfo) -> int:
        return 0 if self.vectors == "tensor" else info.numel * (8 * info.tasks + 16)

    def rule(self, info: TensorInfo) -> DeltaRule:
        return DeltaRule(weights=(1.0,) * info.tasks, gram_weights=self.coefficients(info.tasks))

    def combine(self, group: TaskGroup) -> Tensor:
        if self.vectors == "tensor":
            return super().combine(group)
        dim, tasks = -1 if self.vectors == "rows" else 0, range(len(group.tuned))
        shape = group.tuned[0].shape
        x = [group.delta(t).double().reshape(shape or (1,)).movedim(dim, -1) for t in tasks]  # [..., n]
        pairs = {(s, t): (x[s] * x[t]).sum(-1) for t in tasks for s in range(t + 1)}
        weights = self.row_coefficients([[pairs[min(s, t), max(s, t)] for t in tasks] for s in tasks])
        update = weights[0].unsqueeze(-1) * x[0]
        for weight, one in zip(weights[1:], x[1:], strict=True):
            update.addcmul_(weight.unsqueeze(-1), one)
        return update.movedim(-1, dim).float().reshape(shape)


def norms(gram: Gram) -> list[float]:
    """Norm of each task tensor."""
    return [math.sqrt(max(0.0, gram[t][t])) for t in range(len(gram))]
