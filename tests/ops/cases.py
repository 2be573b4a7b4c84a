"""Inputs of the operator tests, and the three doors to the same kernels: reference, torch operator, host module."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pymerge import _C
from pymerge.ops._arguments import selection_arguments, weight_arguments
from pymerge.ops.delta import TensorSurvey
from pymerge.ops.delta_merge import delta_merge_reference
from pymerge.ops.delta_rule import DeltaRule, resolve
from pymerge.ops.native import delta_params

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
SIZES = [0, 1, 17, 1024, 4099, 70001]  # empty, one, odd, a block, several, more than is sorted at once
KEYS = (1, 2**64 - 5, 77)
W = (0.5, 0.3, 0.7)


def rules(n: int) -> dict[str, DeltaRule]:
    """One of every kind, for three tasks of n entries."""
    k = n // 5
    mask: dict[str, Any] = {"keep": (0.5, 0.1, 1.0), "keys": KEYS}
    found = {
        "linear": DeltaRule(weights=W, divisor=1.5),
        "scaled": DeltaRule(weights=W, scale=0.3, rescales=(1.0, 2.5, 0.1)),
        "dare": DeltaRule(weights=W, rescale="keep", **mask),
        "dare_l1": DeltaRule(weights=W, rescale="l1", **mask),
        "trim": DeltaRule(weights=W, top=(k, 0, n)),
        "trim_ties": DeltaRule(weights=W, top=(k, k, k), keep_ties=True),
        "window": DeltaRule(weights=W, top=(2 * k, k, n), skip=(k // 2, 0, k)),
        "ties_authors": DeltaRule(weights=W, top=(k, k, k), keep_ties=True, elect="authors", norm="count"),
        "ties_mergekit": DeltaRule(weights=W, top=(k, k, k), elect="mergekit", norm="weights"),
        "ties_sum": DeltaRule(weights=W, elect="mergekit"),
        "ties_max": DeltaRule(weights=W, top=(k, k, k), elect="authors", norm="max"),
        "count": DeltaRule(weights=W, top=(k, k, k), norm="count"),
        "dare_ties": DeltaRule(weights=W, top=(k, k, k), mask_first=True, rescale="l1", elect="mergekit", **mask),
    }
    if n > 0 and n % 241 == 0:
        found["rows"] = DeltaRule(weights=W, top=(60, 50, 241), skip=(20, 0, 3), row_length=241)
    return found


def models(n: int, dtype: torch.dtype = torch.float32, tasks: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Every 7th update is exactly zero and many are equal: ties are the rule, not the exception."""
    generator = torch.Generator().manual_seed(n)
    base = torch.randn(n, generator=generator)
    updates = (torch.randn(tasks, n, generator=generator) * 64).round() / 1024
    updates[:, ::7] = 0
    return base.to(dtype), [(base + u).to(dtype) for u in updates]


def resolved(rule: DeltaRule, base: Tensor | None, tuned: list[Tensor]) -> DeltaRule:
    return resolve(rule, TensorSurvey(base, tuned))


def reference(rule: DeltaRule, base: Tensor | None, tuned: list[Tensor], add: Tensor | None, dtype: torch.dtype):
    return delta_merge_reference(base, tuned, add, **merge_arguments(rule, tuned), out_dtype=dtype)


def merge_arguments(rule: DeltaRule, tuned: list[Tensor]) -> dict[str, Any]:
    return {
        "scale": rule.scale,
        "divisor": rule.divisor,
        "elect": rule.elect is not None,
        "tie_sign": rule.tie_sign,
        "norm": rule.norm,
        **weight_arguments(rule),
        **selection_arguments(rule, tuned[0].device),
    }


def buffer(x: Tensor | None) -> tuple[int, str] | None:
    return None if x is None else (x.data_ptr() or 64, CODES[x.dtype])  # an empty tensor has no address


def host_merge(rule, base, tuned, add, dtype, tiles: int = 1) -> tuple[Tensor, list[int]]:
    """Through `_C`, in `tiles` parts that end at any entry (at rows where there are rows)."""
    n, out, params = tuned[0].numel(), torch.empty(tuned[0].shape, dtype=dtype), delta_params(rule)
    step = rule.row_length or 1
    edges = [step * int(e) for e in np.linspace(0, n // step, tiles + 1)]
    bad = np.zeros(len(tuned) + 3, dtype=np.int64)
    for low, high in zip(edges, edges[1:], strict=False):
        part = [None if x is None else x[low:high] for x in (base, add, out)]
        buffers = [buffer(t[low:high]) for t in tuned]
        first, last, to = map(buffer, part)
        bad += np.array(_C.delta_merge(first, buffers, last, to, high - low, low, params))
    return out, bad.tolist()


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))
