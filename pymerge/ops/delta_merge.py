"""The element-wise merge of one tensor in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops import _reference as r
from pymerge.ops._arguments import selection_arguments, weight_arguments
from pymerge.ops._foreign import takes_arrays
from pymerge.ops.delta_rule import DeltaRule


def _combined(x: list[Tensor], weights: list[float], elect: bool, tie_sign: int, norm: str) -> Tensor:
    """norm(sum_t x_t), over the entries that take part."""
    s = r.total(x)
    one = torch.ones_like(s)
    sign = torch.where(s > 0, one, torch.where(s < 0, -one, r.scalar(tie_sign, s)))
    if not elect and norm == "none":
        return s
    part = [one_x * sign > 0 if elect else one_x != 0 for one_x in x]
    zero = torch.zeros((), device=s.device)
    s = r.total([torch.where(p, v, zero) for p, v in zip(part, x, strict=True)])
    if norm == "weights":
        divisor = r.total([torch.where(p, r.scalar(w, s), zero) for p, w in zip(part, weights, strict=True)])
        return s / torch.where(divisor.abs() < r.scalar(1e-8, s), one, divisor)
    if norm == "count":
        return s / torch.maximum(r.total([p.float() for p in part]), one)
    if norm == "max":
        largest = torch.zeros_like(s)
        for p, v in zip(part, x, strict=True):
            largest = torch.where(p & (v.abs() > largest), v.abs(), largest)
        return sign * largest
    return s


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()


def delta_merge_reference(
    base: Tensor | None,
    tuned: list[Tensor],
    add: Tensor | None,
    weights: list[float],
    scale: float,
    divisor: float,
    rescales: list[float] | None,
    keep: list[float] | None,
    keys: list[int] | None,
    row_length: int,
    top_theta: Tensor | None,
    top_index: Tensor | None,
    skip_theta: Tensor | None,
    skip_index: Tensor | None,
    elect: bool,
    tie_sign: int,
    norm: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    top, skip = r.pair(top_theta, top_index), r.pair(skip_theta, skip_index)
    selection = r.Selection(keep=keep, keys=keys, row_length=row_length, top=top, skip=skip)
    x = r.weighted(r.selected(r.deltas(base, tuned), selection), weights, rescales)
    s = _combined(x, weights, elect, tie_sign, norm)
    s = s if divisor == 1.0 else s / r.scalar(divisor, s)
    s = r.scalar(scale, s) * s
    if add is not None:
        s = add.float().reshape(-1) + s
    out = s.to(out_dtype).reshape(tuned[0].shape)
    zero = torch.zeros((), dtype=torch.int64, device=out.device)
    shared = base is not None and add is not None and _same_place(base, add)
    bad = [zero if base is None else r.count_nonfinite(base), *(r.count_nonfinite(t) for t in tuned)]
    bad += [zero if add is None or shared else r.count_nonfinite(add), (~torch.isfinite(out)).sum()]
    return out, torch.stack(bad)


impl("pymerge::delta_merge", "CompositeExplicitAutograd", delta_merge_reference)


@register_fake("pymerge::delta_merge")
def _(base, tuned, add, *numbers):
    out = tuned[0].new_empty(tuned[0].shape, dtype=numbers[-1])
    return out, tuned[0].new_empty((len(tuned) + 3,), dtype=torch.int64)


@takes_arrays
def delta_merge(
    rule: DeltaRule,
    base: Tensor | None,
    tuned: Sequence[Tensor],
    *,
    add: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """out = add + scale * (norm(sum_t x_t) / divisor) with x_t = weight_t * (rescale_t * selected(tuned_t - base)).

    rule     what `pymerge.ops.delta_rule.resolve` returned
    base     subtracted from every tuned tensor; None: nothing is
    tuned    T tensors of base's shape; bfloat16, float16, float32 or float64, in any mixture
    add      added at the end, usually base; None: nothing is
    Returns  out (tuned's shape, out_dtype, nearest even) and bad int64 [T + 3]: how many entries of base, tuned_0 ..
             tuned_{T-1}, add (0 where add is base) and out are NaN or infinite.
    Error    float32 arithmetic in a fixed order: the same bits on every device, CPU level, thread count and tiling.
    Cost     one pass: T + 1 reads, 1 write.
    Raises   RuntimeError (shapes, dtypes or devices differ; the rule does not have T entries)."""
    return torch.ops.pymerge.delta_merge(
        base,
        list(tuned),
        add,
        scale=rule.scale,
        divisor=rule.divisor,
        elect=rule.elect is not None,
        tie_sign=rule.tie_sign,
        norm=rule.norm,
        out_dtype=out_dtype,
        **weight_arguments(rule),
        **selection_arguments(rule, tuned[0].device),
    )
