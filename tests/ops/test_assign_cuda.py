"""assign on CUDA against the CPU operator: the same optimum, prices that prove it."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.device
torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

from pymerge import linalg  # noqa: E402

SHAPES = [(0, 3, 3), (2, 0, 4), (3, 1, 1), (512, 64, 64), (5, 130, 131), (2, 30, 200), (2, 200, 30), (1, 1024, 1024)]


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_problems_are_exact(shape, dtype):
    score = scores(*shape).to(dtype)
    for maximize in (False, True):
        cpu, cuda = linalg.assign(score, maximize), linalg.assign(score.cuda(), maximize, check=True)
        torch.testing.assert_close(cuda.primal.cpu(), cpu.primal, rtol=0, atol=1e-12 * max(shape))
        assert (cuda.gap.abs() <= 1e-12 * max(shape)).all()


@pytest.mark.parametrize("n", [1025, 2048])
def test_large_problems_keep_the_promised_gap(n):
    score = torch.rand(1, n, n, generator=torch.Generator().manual_seed(0))
    best = linalg.assign(score, True).primal
    near = linalg.assign(score.cuda(), True, check=True)
    assert near.gap.item() <= 1e-6 * n + 1e-9 and best.item() - near.primal.item() <= near.gap.item() + 1e-9
    exact = linalg.assign(score.cuda(), True, exact=True, check=True)
    assert abs(exact.primal.item() - best.item()) <= 1e-12 * n and exact.gap.item() <= 1e-12 * n
    again = linalg.assign(score.cuda(), True, prices=near.col_prices, check=True)
    assert again.gap.item() <= 1e-6 * n + 1e-9


def test_non_finite_scores_are_refused():
    for n in (50, 1100):
        score = scores(1, n, n).cuda()
        score[0, n - 1, n - 2] = torch.nan
        with pytest.raises(ValueError, match="scores of problem 0 of 1 hold NaN"):
            linalg.assign(score, True)


def test_the_same_matching_each_time():
    score = scores(1, 1500, 1500).cuda()
    first = linalg.assign(score, True)
    assert all(torch.equal(first.columns, linalg.assign(score, True).columns) for _ in range(3))
