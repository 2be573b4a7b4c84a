"""Linear assignment with a certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.errors import NonFinite, NumericError
from pymerge.ops import assign as assign_op
from pymerge.ops._foreign import takes_arrays

_CHECKED_ENTRIES = 1 << 24  # of a slab of rows whose slack is looked at at a time


@dataclass(frozen=True)
class Assignment:
    """columns [.., n] int64: the column of each row (-1: none); all else float64: primal, dual, gap [..], row_prices
    [.., n], col_prices [.., m]. primal: score of the matching; dual: bound on every matching's; gap: their distance."""

    columns: Tensor
    primal: Tensor
    dual: Tensor
    gap: Tensor
    row_prices: Tensor
    col_prices: Tensor


@takes_arrays
def assign(
    score: Tensor,
    maximize: bool,
    *,
    prices: Tensor | None = None,
    tolerance: float = 1e-6,
    exact: bool = False,
    check: bool = False,
) -> Assignment:
    """The matching of rows and columns with the largest (maximize) or smallest total score, one a problem of the batch.

    score    [n, m] or [B, n, m], bfloat16, float16 or float32; finite; min(n, m) pairs are matched
    prices   col_prices of an earlier, similar problem to start from: fewer steps, the same optimum; used where n <= m
    tolerance, exact   gap / n that is good enough, or none but 0. Only large problems on CUDA are not always exact
    check    verify the certificate in float64 by PyTorch: a matching, prices that bound every score, the gap they leave
    Returns  Assignment. Equal optima: lowest column first among equal choices of a row, all equal: the identity; the
             same on every run, CPU level and thread count, not across devices.
    Error    gap: 0 up to rounding (64 eps times the largest score, a row) where exact, else at most n * tolerance.
    Cost     O(n^3) at worst; a few passes over the scores for most.
    Raises   NonFinite, a ValueError (a NaN or infinite score, with its batch index); NumericError (check failed);
             RuntimeError (dtype or shape).
    Source   Jonker and Volgenant, Computing 38 (1987); Bertsekas, Annals of OR 14 (1988) on large CUDA problems."""
    single = score.dim() == 2
    batch = score.unsqueeze(0) if single else score
    start = prices if prices is None or not single else prices.unsqueeze(0)
    if start is not None and not bool(torch.isfinite(start).all()):
        raise NonFinite("assign: prices hold NaN or infinite values; leave them out to start from none")
    columns, row_prices, col_prices, value = assign_op.assign(batch, maximize, start, None if exact else tolerance)
    # Few tensor operations from here on: on small problems they take longer than the solver.
    bad = [b for b, (primal, *_) in enumerate(value.tolist()) if math.isnan(primal)]
    if bad:
        raise NonFinite(f"assign: scores of problem {bad[0]} of {len(batch)} hold NaN or infinite values")
    if check:
        _verify(batch, maximize, columns, row_prices, col_prices, value)
    if single:
        columns, value, row_prices, col_prices = columns[0], value[0], row_prices[0], col_prices[0]
    primal, dual, gap = value.unbind(-1)
    return Assignment(columns, primal, dual, gap, row_prices, col_prices)


def _verify(
    score: Tensor, maximize: bool, columns: Tensor, row_prices: Tensor, col_prices: Tensor, value: Tensor
) -> None:
    rows, many = score.shape[1:]
    sign = -1.0 if maximize else 1.0
    for b in range(len(score)):
        used = columns[b][columns[b] >= 0]
        if len(used) != min(rows, many) or len(used.unique()) != len(used):
            raise NumericError(f"assign: problem {b}: {len(used.unique())} columns matched, expected {min(rows, many)}")
        if len(used) == 0:
            continue
        largest = float(torch.maximum(score[b].abs().max().double(), col_prices[b].abs().max()))
        allowed = 256 * torch.finfo(torch.float64).eps * largest
        step = max(1, _CHECKED_ENTRIES // many)
        for first in range(0, rows, step):
            part = slice(first, first + step)
            slack = sign * (score[b, part].double() - row_prices[b, part, None] - col_prices[b])
            if float(slack.min()) < -allowed:
                raise NumericError(f"assign: problem {b}: a price is exceeded by {-float(slack.min()):.3g}")
        matched = (columns[b] >= 0).nonzero().flatten()
        primal = score[b, matched, columns[b][matched]].double().sum()
        gap = sign * (primal - row_prices[b].sum() - col_prices[b].sum())
        wrong = max(abs(float(primal - value[b, 0])), abs(float(gap - value[b, 2])))
        if wrong > allowed * max(rows, many):
            raise NumericError(f"assign: problem {b}: the reported score or gap is off by {wrong:.3g}")
