"""Arcee Fusion: the base takes over the entries that change most, by size and by what that does to their row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pymerge.methods.base import Combine, TaskGroup, TensorInfo, register
from pymerge.methods.blocks import BLOCK
from pymerge.methods.selection import INT8_MASK

if TYPE_CHECKING:
    from torch import Tensor

_FLOOR: Final = 1e-8  # mergekit 0.1.5 arcee_fusion: added to every probability
_NO_NORM: Final = "entries are taken over or not, nothing is summed"


@register("arcee_fusion")
@dataclass(frozen=True, kw_only=True)
class ArceeFusion(Combine):
    """W = W_1 where s >= median(s) + 1.5 (Q3(s) - Q1(s)), else W_0 (the base), tensor by tensor.

    s  |W_1 - W_0| times the divergence of the entry's row: sum p log(p / q), with p and q the softmax of the row of W_1
       and of W_0, plus 1e-8 each. Rows run along the last dimension; a vector is one row. In float64, at least 0.
    Q1, Q3 and the median are order statistics, x at place int(x (n - 1)) of the ascending order of all n entries. Where
    three quarters of the scores are 0, so is the threshold: all entries are taken over.
    """

    paper = "https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration"
    base_role = "first"
    models = (1, 1)
    ignored = INT8_MASK | {"normalize": _NO_NORM, "rescale": _NO_NORM}

    def combine(self, group: TaskGroup) -> Tensor:
        import torch

        base, tuned = group.tuned
        if not base.numel():
            return base.float()
        scores = importance(base, tuned)
        keep = scores >= threshold(scores.view(-1))
        return torch.where(keep.view(base.shape), tuned, base).float()

    def workspace(self, info: TensorInfo) -> int:
        row = info.shape[-1] if info.shape else 1
        return 7 * info.numel + 32 * max(row, min(BLOCK, info.numel))


def importance(base: Tensor, tuned: Tensor) -> Tensor:
    """s: float32 [rows, length of a row]."""
    import torch

    length = base.shape[-1] if base.dim() else 1
    base, tuned = base.reshape(-1, length), tuned.reshape(-1, length)
    scores = torch.empty(base.shape, dtype=torch.float32, device=base.device)
    step = max(1, BLOCK // length)
    for row in range(0, len(base), step):
        rows = slice(row, row + step)
        q = base[rows].double().softmax(dim=1).add_(_FLOOR)
        p = tuned[rows].double().softmax(dim=1).add_(_FLOOR)
        divergence = q.reciprocal_().mul_(p).log_().mul_(p).sum(dim=1, keepdim=True).clamp_(min=0)
        torch.mul((tuned[rows].float() - base[rows].float()).abs_(), divergence.float(), out=scores[rows])
    return scores


def threshold(scores: Tensor) -> Tensor:
    """median + 1.5 (Q3 - Q1), as float32."""
    from pymerge.ops.delta_kth import delta_kth

    n = len(scores)
    ranks = [n - int(quantile * (n - 1)) for quantile in (0.25, 0.5, 0.75)]
    found = delta_kth(None, [scores] * 3, ranks)[0][:, 0]
    q1, median, q3 = (value if rank < n else scores.min() for value, rank in zip(found, ranks, strict=True))
    return median + 1.5 * (q3 - q1)
