"""The CUDA kernels of the assignment, run on the CPU by an emulator, against the CPU operator."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

import tests.native.emulated as e
from pymerge.ops.assign import assign

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulated kernels")
EVERYTHING, NO_COSTS, NOTHING = 200_000, 32 * 70, 0  # bytes of shared memory: with the costs, state only, none


class AssignFields(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("score", "prices", "row_prices", "value", "match")),
        ("shared_limit", ctypes.c_int64),
        ("tolerance", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("batch", "rows", "columns", "maximize", "started", "exact")),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return e.build(tmp_path_factory.mktemp("emulated"), Path(__file__).parent / "assign_kernels.cpp")


@pytest.fixture(params=["forward", "shuffled"])
def library(request, built):
    built.set_order(request.param, 1)
    return built


def run(library, score, maximize, *, prices=None, limit=EVERYTHING, tolerance=-1.0, exact=False):
    batch, rows, columns = score.shape
    found = torch.full((batch, rows), -7), torch.full((batch, rows), 7.0, dtype=torch.float64)
    col_prices = torch.full((batch, columns), 7.0, dtype=torch.float64) if prices is None else prices.clone()
    value = torch.full((batch, 3), 7.0, dtype=torch.float64)
    library.emulate_assign(
        ctypes.byref(
            AssignFields(
                score=score.data_ptr(),
                prices=col_prices.zero_().data_ptr() if prices is None and tolerance >= 0 else col_prices.data_ptr(),
                row_prices=found[1].data_ptr(),
                value=value.data_ptr(),
                match=found[0].data_ptr(),
                shared_limit=limit,
                tolerance=tolerance,
                batch=batch,
                rows=rows,
                columns=columns,
                maximize=int(maximize),
                started=int(prices is not None),
                exact=int(exact),
            )
        )
    )
    return found[0], found[1], col_prices, value


def assert_certified(score, maximize, result, gap=0.0):
    """A matching whose score is within `gap` of the CPU's, prices that bound every score, totals that fit them."""
    match, row_prices, col_prices, value = result
    rows, columns = score.shape[1:]
    sign = -1.0 if maximize else 1.0
    best = assign(score, maximize)[3][:, 0]
    rounding = 128 * 2.0**-52 * columns * float(score.abs().max())
    for b in range(len(score)):
        assert match[b].min() >= 0 and match[b].max() < columns and len(match[b].unique()) == rows
        primal = score[b][torch.arange(rows), match[b]].double().sum()
        assert abs(primal - value[b, 0]) <= rounding and sign * (primal - best[b]) <= gap + rounding
        slack = sign * (score[b].double() - row_prices[b, :, None] - col_prices[b])
        assert slack.min() >= -rounding
        assert abs(row_prices[b].sum() + col_prices[b].sum() - value[b, 1]) <= rounding
        assert abs(sign * (value[b, 0] - value[b, 1]) - value[b, 2]) <= rounding and value[b, 2] <= gap + rounding
        if rows < columns:
            assert (sign * col_prices[b]).max() <= rounding


@pytest.mark.parametrize("limit", [EVERYTHING, NO_COSTS, NOTHING])
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 5, 5), (2, 33, 33), (1, 7, 40), (1, 1, 9), (1, 70, 70)], ids=str)
def test_paths(library, shape, limit):
    g = torch.Generator().manual_seed(0)
    for score in (torch.randn(shape, generator=g), torch.randint(3, shape, generator=g).float()):
        for maximize in (False, True):
            assert_certified(score, maximize, run(library, score, maximize, limit=limit))


def test_all_equal_is_the_identity(library):
    match = run(library, torch.full((2, 40, 40), 0.5), True)[0]
    assert torch.equal(match, torch.arange(40).expand(2, 40))


def test_paths_from_prices(library):
    score = torch.randn(2, 34, 34, generator=torch.Generator().manual_seed(1))
    cold = run(library, score, True)
    assert torch.equal(run(library, score, True, prices=cold[2])[0], cold[0])
    assert_certified(score, True, run(library, score, True, prices=torch.randn(2, 34).double()))
    wide = torch.randn(1, 9, 40, generator=torch.Generator().manual_seed(1))
    assert_certified(wide, False, run(library, wide, False, prices=torch.randn(1, 40).double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_problems_are_marked(library, value):
    score = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(0))
    score[1, 5, 4] = value
    match, row_prices, col_prices, totals = run(library, score, True)
    assert (match[1] == -1).all() and all(torch.isnan(x[1]).all() for x in (row_prices, col_prices, totals))
    good = tuple(x[[0, 2]] for x in (match, row_prices, col_prices, totals))
    assert_certified(score[[0, 2]], True, good)
    bad = run(library, score[1:2], True, tolerance=1e-3)
    assert (bad[0] == -1).all() and torch.isnan(bad[3]).all()
    bad = run(library, score[:1], True, prices=torch.full((1, 6), value).double(), tolerance=1e-3)
    assert (bad[0] == -1).all() and torch.isnan(bad[3]).all()


@pytest.mark.parametrize("n", [1, 2, 21])
def test_auction(library, n):
    g = torch.Generator().manual_seed(2)
    ties = torch.randint(4, (1, n, n), generator=g).float()
    for score, maximize in ((torch.randn(1, n, n, generator=g), True), (ties, False)):
        near = run(library, score, maximize, tolerance=1e-3)
        assert_certified(score, maximize, near, gap=1e-3 * n)
        assert_certified(score, maximize, run(library, score, maximize, tolerance=1e-3, exact=True))
        again = run(library, score, maximize, tolerance=1e-5, prices=near[2])
        assert_certified(score, maximize, again, gap=1e-5 * n)


def test_auction_does_not_depend_on_the_order_of_threads(built):
    score, results = torch.randn(1, 40, 40, generator=torch.Generator().manual_seed(3)), []
    for order in ("forward", "reversed", "shuffled"):
        built.set_order(order, 5)
        results.append(run(built, score, True, tolerance=1e-2))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_turning_back(library):
    found = torch.tensor([[3, 0], [-1, -1]])
    match = torch.full((2, 4), -1)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (found, match)]
    library.emulate_turn(pointers[0], ctypes.c_int64(2), 2, 4, pointers[1])
    assert match.tolist() == [[1, -1, -1, 0], [-1, -1, -1, -1]]
