"""Which tensors are weight matrices of linear layers, and what the others get from a method for matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

from pymerge.methods.base import ElementWiseCombine, TensorInfo, param
from pymerge.ops.delta_rule import DeltaRule

Rest = Literal["mean", "sum", "base"]
RESTS: Final = ("mean", "sum", "base")

# Two-dimensional, yet no map from features to features: vocabularies, positions, classes. No spectral method's authors
# decompose them by choice, and their row count would dominate the cost.
_TABLES = re.compile(
    r"embed|position|relative_attention_bias|text_projection|lm_head|logits?_|(^|[._])(cls|class)_token"
    r"|(^|[./])(wte|wpe|shared|head|heads|score|classifier|predictions)(\.|$)",
    re.IGNORECASE,
)
# Linear layers of all experts as one tensor [E, m, n].
_EXPERTS = re.compile(
    r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)$|\.block_sparse_moe\.(input|output)_linear\.weight$"
)


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """What methods for matrices act on: two-dimensional tensors with two rows and columns at least that are no tables
    (embeddings, heads, positions), by name; and experts stored as one tensor, each of its matrices for itself.

    include, exclude  name patterns that opt two-dimensional tensors in and out
    rest              what all other tensors get; None: what the method says
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rest: Rest | None = None

    def plain(self) -> dict[str, object]:
        """As the recipe writes it."""
        given = {"include": list(self.include), "exclude": list(self.exclude), "rest": self.rest}
        return {key: value for key, value in given.items() if value}

    def has(self, name: str, shape: tuple[int, ...]) -> bool:
        if len(shape) != 2 or any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return False
        if any(fnmatchcase(name, pattern) for pattern in self.include):
            return min(shape) > 0
        return min(shape) > 1 and not _TABLES.search(name)

    def has_stacked(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor [E, m, n] is the matrices of E experts, decomposed one by one."""
        if len(shape) != 3 or any(fnmatchcase(name, pattern) for pattern in self.exclude):
            return False
        return shape[0] > 0 and min(shape[1:]) > 1 and bool(_EXPERTS.search(name))


@dataclass(frozen=True, kw_only=True)
class OfTaskVectors(ElementWiseCombine):
    """scale times the mean (or the sum) of the task vectors: for tensors that a method for matrices leaves aside."""

    how: str = param("mean", "mean or sum", choices=("mean", "sum"))
    scale: float = param(1.0, "lambda")

    name = "of_task_vectors"

    def rule(self, info: TensorInfo) -> DeltaRule:
        return DeltaRule(
            weights=(1.0,) * info.tasks, scale=self.scale, divisor=float(info.tasks) if self.how == "mean" else 1.0
        )
