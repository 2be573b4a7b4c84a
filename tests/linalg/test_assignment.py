"""linalg.assign: certificate, refusals (fault row S37), warm starts."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pymerge import linalg
from pymerge.errors import NonFinite, NumericError
from pymerge.linalg import assignment
from pymerge.ops import assign as assign_op


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (30, 30), (12, 30), (30, 12), (3, 20, 20), (2, 5, 9), (520, 520)], ids=str)
def test_objective_is_scipys(shape, maximize):
    score = scores(*shape)
    found = linalg.assign(score, maximize, check=True)
    batch = score.reshape(-1, *shape[-2:]).double()
    best = [float(s[linear_sum_assignment(s.numpy(), maximize)].sum()) for s in batch]
    assert (found.primal.reshape(-1) - torch.tensor(best, dtype=torch.float64)).abs().max() <= 1e-6 * shape[-1]
    assert found.gap.abs().max() <= 1e-12 * shape[-1] and found.columns.shape == shape[:-1]
    assert found.gap.shape == found.primal.shape == found.dual.shape == shape[:-2]
    assert found.row_prices.shape == shape[:-1] and found.col_prices.shape == (*shape[:-2], shape[-1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 7, 47], ids=str)
def test_nan_and_inf_are_refused(value, at):
    score = scores(3, 4, 4)
    score.view(-1)[at] = value
    with pytest.raises(ValueError, match=f"scores of problem {at // 16} of 3 hold NaN or infinite values"):
        linalg.assign(score, True)
    with pytest.raises(NonFinite, match="problem 0 of 1"):
        linalg.assign(score[at // 16], False)
    with pytest.raises(NonFinite, match="prices hold NaN"):
        linalg.assign(scores(4, 4), True, prices=torch.full((4,), value, dtype=torch.float64))


def test_empty_rectangular_and_all_ties():
    empty = linalg.assign(torch.empty(0, 0), True, check=True)
    assert empty.columns.shape == (0,) and empty.primal == empty.dual == empty.gap == 0.0
    assert linalg.assign(torch.empty(0, 4, 4), True, check=True).columns.shape == (0, 4)
    assert linalg.assign(torch.empty(3, 0), False, check=True).columns.tolist() == [-1, -1, -1]
    ties = linalg.assign(torch.full((5, 5), 0.7), True, check=True)
    assert ties.columns.tolist() == [0, 1, 2, 3, 4] and abs(ties.gap) < 1e-15
    tall = linalg.assign(torch.tensor([[1.0], [5.0], [5.0]]), True, check=True)
    assert tall.columns.tolist() == [-1, 0, -1] and tall.primal == 5.0


def test_warm_start_from_an_earlier_solution():
    score = scores(2, 90, 90)
    first = linalg.assign(score, True)
    moved = score + 0.01 * scores(2, 90, 90, seed=1)
    warm, cold = linalg.assign(moved, True, prices=first.col_prices, check=True), linalg.assign(moved, True, check=True)
    assert torch.equal(warm.columns, cold.columns)
    single = linalg.assign(score[0], True, prices=first.col_prices[0])
    assert torch.equal(single.columns, first.columns[0])


@pytest.mark.parametrize(
    "part, message",
    [(0, "columns matched, expected 6"), (1, "a price is exceeded by"), (3, "score or gap is off by")],
)
def test_check_finds_a_wrong_result(monkeypatch, part, message):
    def wrong(*arguments: object) -> tuple[torch.Tensor, ...]:
        result = right(*arguments)
        result[part][0, 0] = result[part][0, 1] if part == 0 else result[part][0, 0] - 0.5
        return result

    right = assign_op.assign
    monkeypatch.setattr(assignment.assign_op, "assign", wrong)
    linalg.assign(scores(6, 6), True)
    with pytest.raises(NumericError, match=message):
        linalg.assign(scores(6, 6), True, check=True)


def test_the_bound_promised_for_an_early_end_holds_where_everything_is_exact():
    found = linalg.assign(scores(64, 64), True, tolerance=0.5, check=True)
    assert found.gap <= 1e-12 and linalg.assign(scores(64, 64), True, exact=True).primal == found.primal
