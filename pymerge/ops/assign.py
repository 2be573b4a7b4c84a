"""Linear assignment: the matching of rows and columns with the largest or smallest total score, and prices that prove
it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import impl, register_fake

from pymerge.ops import _load  # noqa: F401
from pymerge.ops._foreign import takes_arrays

Result = tuple[Tensor, Tensor, Tensor, Tensor]


def _augment(cost: Tensor, row: int, column_of: list[int], row_of: list[int], prices: Tensor) -> None:
    """Dijkstra over columns from a free row of a square problem; float64, prices [n] change in place."""
    n = len(cost)
    distance, before = torch.full((n,), torch.inf, dtype=torch.float64), [row] * n
    done: list[int] = []
    at, shift = row, 0.0
    while True:
        step = cost[at] - prices - shift
        step[done] = torch.inf
        for j in torch.nonzero(step < distance).flatten().tolist():
            distance[j], before[j] = step[j], at
        left = distance.clone()
        left[done] = torch.inf
        nearest = torch.nonzero(left == left.min()).flatten().tolist()
        j = next((j for j in nearest if row_of[j] < 0), nearest[0])
        if row_of[j] < 0:
            break
        done.append(j)
        at = row_of[j]
        shift = float(cost[at, j] - prices[j] - distance[j])
    prices[done] += distance[done] - distance[j]
    at = -1
    while at != row:
        at = before[j]
        row_of[j], column_of[at], j = at, j, column_of[at]


def _solve(score: Tensor, sign: float) -> tuple[list[int], Tensor, Tensor, list[float]]:
    """One problem [n, m], n <= m: zero rows make it square."""
    rows, columns = score.shape
    cost = torch.zeros(columns, columns, dtype=torch.float64)
    cost[:rows] = sign * score.double()
    prices = torch.zeros(columns, dtype=torch.float64)
    column_of, row_of = [-1] * columns, [-1] * columns
    for row in range(columns):
        _augment(cost, row, column_of, row_of, prices)
    top = prices.max() if rows < columns else prices.new_zeros(())
    prices = prices - top
    row_prices = (cost[:rows] - prices).min(1).values
    primal = cost[torch.arange(rows), column_of[:rows]].sum()
    dual = row_prices.sum() + prices.sum()
    value = [sign * float(primal), sign * float(dual), float(primal - dual)]
    return column_of[:rows], sign * row_prices, sign * prices, value


def assign_reference(score: Tensor, maximize: bool, prices: Tensor | None, tolerance: float | None) -> Result:
    """Shortest augmenting paths in float64, row by row; `prices` and `tolerance` would only make it faster."""
    if score.shape[1] > score.shape[2]:
        found, few, many, value = assign_reference(score.mT, maximize, None, tolerance)
        columns = torch.full(score.shape[:2], -1, dtype=torch.int64, device=score.device)
        for match, row_of in zip(columns, found.tolist(), strict=True):
            for column, row in enumerate(row_of):
                if row >= 0:
                    match[row] = column
        return columns, many, few, value
    batch, rows, many = score.shape
    columns = torch.full((batch, rows), -1, dtype=torch.int64)
    u, v, value = (torch.full((batch, k), torch.nan, dtype=torch.float64) for k in (rows, many, 3))
    for b in range(batch):
        if rows == 0:
            v[b], value[b] = 0.0, 0.0
        elif bool(torch.isfinite(score[b].float()).all()):
            found, u[b], v[b], value_of = _solve(score[b].cpu(), -1.0 if maximize else 1.0)
            columns[b], value[b] = torch.tensor(found), torch.tensor(value_of, dtype=torch.float64)
    device = score.device
    return columns.to(device), u.to(device), v.to(device), value.to(device)


impl("pymerge::assign", "CompositeExplicitAutograd", assign_reference)


@register_fake("pymerge::assign")
def _(score, maximize, prices, tolerance):
    batch, rows, columns = score.shape
    double = {"dtype": torch.float64}
    return (
        score.new_empty((batch, rows), dtype=torch.int64),
        score.new_empty((batch, rows), **double),
        score.new_empty((batch, columns), **double),
        score.new_empty((batch, 3), **double),
    )


@takes_arrays
def assign(score: Tensor, maximize: bool, prices: Tensor | None = None, tolerance: float | None = None) -> Result:
    """The best matching of each problem of a batch; `pymerge.linalg.assign` is the friendlier form.

    score    [B, n, m], bfloat16, float16 or float32; min(n, m) pairs are matched
    prices   float64 [B, m]: col_prices of a similar problem to start from; used where n <= m
    tolerance  total score per row that the matching may fall short of the best; None: exact. Only CUDA stops early
    Returns  columns int64 [B, n] (-1: no column), row_prices float64 [B, n], col_prices float64 [B, m] and value
             float64 [B, 3]: primal (the matching's score), dual (its bound), gap (>= 0 up to rounding; 0 proves the
             optimum). score <= row_price + col_price everywhere when maximising, >= when minimising.
             NaN (and -1) for a problem with a score or a starting price that is NaN or infinite.
    Error    scores are exact, prices float64: the gap is at rounding level, 64 eps times the largest score a row.
    Cost     O(n^3) at worst, a few passes over the scores for most. The same at every CPU level and thread count.
    Raises   RuntimeError (dtype, shape, device).
    Source   Jonker and Volgenant, Computing 38 (1987); lists of candidates with a dense certificate: Volgenant, "a
             core oriented approach", Computers and OR 23 (1996)."""
    return torch.ops.pymerge.assign(score, maximize, prices, tolerance)
