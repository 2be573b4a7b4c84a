"""Element-wise merges of torch tensors: the survey of a tensor in memory, and the whole walk from rule to result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pymerge.ops._foreign import takes_arrays
from pymerge.ops.delta_gram import delta_gram
from pymerge.ops.delta_kth import delta_kth
from pymerge.ops.delta_l1 import delta_l1
from pymerge.ops.delta_merge import delta_merge
from pymerge.ops.delta_rule import KEEP_ALL_TIES, Cut, DeltaRule, resolve
from pymerge.ops.delta_signs import delta_signs


class TensorSurvey:
    """Answers a rule's questions about one tensor; `Survey` of `pymerge.ops.delta_rule`."""

    @takes_arrays
    def __init__(self, base: Tensor | None, tuned: Sequence[Tensor]) -> None:
        self.base = base
        self.tuned = tuned

    def kth(self, ranks: tuple[int, ...], rule: DeltaRule, keep_ties: bool) -> Cut:
        mask = rule if rule.mask_first else None
        theta, index = delta_kth(self.base, self.tuned, ranks, row_length=rule.row_length, mask=mask)
        if keep_ties:
            index = torch.where(index > 0, KEEP_ALL_TIES, 0)  # 0: nothing is among the first, ties neither
        return Cut(theta=theta.cpu().numpy().tobytes(), index=index.cpu().numpy().tobytes())

    def l1(self, rule: DeltaRule) -> list[tuple[float, float]]:
        return [(a, b) for a, b in delta_l1(rule, self.base, self.tuned).tolist()]

    def gram(self) -> list[list[float]]:
        return delta_gram(self.base, self.tuned).tolist()

    def signs(self, rule: DeltaRule) -> int:
        return int(delta_signs(rule, self.base, self.tuned))


@takes_arrays
def merge_by_rule(
    rule: DeltaRule,
    base: Tensor | None,
    tuned: Sequence[Tensor],
    add: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The merge that `rule` describes: its questions are answered by looking at the tensors, then one pass merges them.

    base     subtracted from every tuned tensor; None: nothing is
    tuned    T tensors of base's shape
    add      added at the end; None: the result is the merged update
    Returns  tensor of tuned's shape, out_dtype
    Raises   RuntimeError (shapes, dtypes or devices differ; the rule does not have T entries)."""
    out, _ = delta_merge(resolve(rule, TensorSurvey(base, tuned)), base, tuned, add=add, out_dtype=out_dtype)
    return out
