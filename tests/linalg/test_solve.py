"""Positive definite solves against float64 inverses, and the choice of precision."""

from __future__ import annotations

import math

import pytest
import torch

from pymerge.errors import NonFinite, NumericError
from pymerge.linalg import capped_ridge, condition_estimate, solve_psd, solve_ridge
from tests.linalg.spectra import geometric, orthonormal, with_values

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def definite(n: int, condition: float, seed: int = 0) -> torch.Tensor:
    q = orthonormal(n, n, seed)
    m = (q * geometric(n, condition)) @ q.T
    return (m + m.T) / 2


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distance(x: torch.Tensor, true: torch.Tensor) -> float:
    return float((x.double() - true).norm() / true.norm().clamp(min=1e-300))


@pytest.mark.parametrize("precision", ["auto", "float32", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", [1.0, 30.0, 500.0, 5e3, 1e5])
def test_solve_psd(precision, dtype, condition):
    for n, k in ((60, 13), (1, 1), (33, 200)):
        m, b = definite(n, condition).to(dtype), randn(k, n).to(dtype)
        found = solve_psd(m, b, precision=precision)
        true = b.double() @ torch.linalg.inv(m.double())
        wide = precision == "float64" or (precision == "auto" and (dtype == torch.float64 or found.condition > 1e3))
        assert found.x.dtype == dtype and bool(found.wide) == wide
        own = EPS[torch.float64 if wide else torch.float32]
        assert distance(found.x, true) <= 4 * math.sqrt(n) * float(condition) * own + EPS[dtype]
        if precision == "auto" and n > 1:
            assert 0.5 * condition <= float(found.condition) <= 1.01 * condition + 1


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_overwriting_gives_the_same_bits(precision, batch):
    m = definite(40, 100.0).to(getattr(torch, precision)).expand(*batch, 40, 40).contiguous()
    b = randn(*batch, 7, 40).to(m)
    expected = solve_psd(m, b, precision=precision)
    found = solve_psd(m.clone(), b, precision=precision, overwrite=True)
    assert torch.equal(found.x, expected.x) and torch.equal(found.condition, expected.condition)
    with pytest.raises(ValueError, match="solve_psd: overwrite needs a precision"):
        solve_psd(m, b, overwrite=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_one_term(dtype):
    """The prior of ACE: one row added to all rows of M, so the matrix is not symmetric."""
    for condition in (10.0, 1e4):
        m, b = definite(40, condition).to(dtype), randn(7, 40).to(dtype)
        u, v = torch.ones(40, dtype=dtype), randn(40, seed=1).to(dtype) / 40
        full = m.double() + u.double()[:, None] * v.double()
        found = solve_psd(m, b, rank_one=(u, v))
        true = b.double() @ torch.linalg.inv(full)
        precision = EPS[torch.float64 if bool(found.wide) else torch.float32]
        amplified = float(torch.linalg.cond(full)) + condition
        assert distance(found.x, true) <= 4 * math.sqrt(40) * amplified * precision + 2 * EPS[dtype]


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (20, 20), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("ridge", [1e-1, 1e-4, 1e-7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solve_ridge(shape, ridge, dtype):
    """Both systems give the same; the smaller one is solved."""
    z = with_values(*shape, geometric(min(shape), 30.0)).to(dtype)
    g, u, w = randn(6, shape[0]).to(dtype), torch.ones(shape[1], dtype=dtype), randn(shape[0], seed=2).to(dtype) / 30
    wide = z.double()
    left, s, right = torch.linalg.svd(wide, full_matrices=False)
    mapped = (left * (s / (s * s + ridge))) @ right  # Z (Z^T Z + ridge)^-1, accurate for any ridge
    true = g.double() @ mapped
    found = solve_ridge(g, z, ridge)
    small = min(shape)
    assert float(found.condition) <= (1 + ridge) / (1 / 900 * (small > 1) + ridge) * 1.01 + 1
    precision = EPS[torch.float64 if bool(found.wide) else torch.float32]
    # of the n x n system the right-hand side g z is rounded first: condition * eps of the results' dtype
    bound = 8 * math.sqrt(max(shape)) * float(found.condition) * max(precision, EPS[dtype] * (shape[0] > shape[1]))
    assert distance(found.x, true) <= bound + 8 * EPS[dtype] * float(found.condition)
    corrected = solve_ridge(g, z, ridge, rank_one=(u, w))
    row = w.double() @ mapped
    divisor = 1 + row @ u.double()
    truth = true - (true @ u.double())[:, None] * row / divisor
    part = float((true @ u.double()).norm() * row.norm() / divisor.abs())
    growth = (
        (float(true.norm()) + part) / float(truth.norm()) * (1 + float(row.norm() * u.double().norm() / divisor.abs()))
    )
    assert distance(corrected.x, truth) <= 4 * growth * (bound + 8 * EPS[dtype] * float(found.condition))


def test_push_through_is_the_accurate_form():
    """Rank 12 in 200 dimensions and a small ridge: the 200 x 200 system has condition 1e7, the 12 x 12 one 9."""
    z = with_values(12, 200, geometric(12, 3.0)).float()
    g = randn(5, 12).float()
    true = g.double() @ z.double() @ torch.linalg.inv(z.double().T @ z.double() + 1e-7 * torch.eye(200).double())
    found = solve_ridge(g, z, 1e-7)
    assert not bool(found.wide) and float(found.condition) < 10
    assert distance(found.x, true) <= 16 * 10 * EPS[torch.float32]


def test_batches_choose_their_own_precision():
    m = torch.stack([definite(30, 10.0), definite(30, 1e5), definite(30, 300.0), definite(30, 1e10)]).float()
    m += 1e-6 * torch.eye(30) * torch.tensor([0.0, 0, 0, 1])[:, None, None]
    b = randn(4, 3, 30).float()
    found = solve_psd(m, b)
    assert found.wide.tolist() == [False, True, False, True]
    for i in range(4):
        alone = solve_psd(m[i], b[i])
        assert torch.equal(alone.x, found.x[i]) and alone.condition == found.condition[i]
    nested = solve_psd(m.reshape(2, 2, 30, 30), b.reshape(2, 2, 3, 30))
    assert torch.equal(nested.x.reshape(4, 3, 30), found.x) and nested.wide.shape == (2, 2)


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e6, 1e10])
def test_condition_estimate(condition):
    for seed in range(5):
        found = float(condition_estimate(definite(80, condition, seed)))
        assert 0.5 * condition <= found <= 1.001 * condition
    clustered = torch.ones(80, dtype=torch.float64)
    clustered[0] = 1 / condition
    q = orthonormal(80, 80, 1)
    assert 0.5 * condition <= float(condition_estimate((q * clustered) @ q.T)) <= 1.001 * condition
    assert condition_estimate(torch.zeros(2, 3, 3)).tolist() == [math.inf] * 2


@pytest.mark.parametrize("most", [1e2, 1e4, 1e6])
def test_capped_ridge(most):
    flat = with_values(400, 400, 1.0 - torch.arange(400, dtype=torch.float64) / 1000)
    for c in (definite(50, 1e8), with_values(50, 50, geometric(20, 10.0)), flat, torch.zeros(5, 5).double()):
        c = c @ c.T
        ridge = capped_ridge(c, 1e-9, most)
        values = torch.linalg.eigvalsh(c).clamp(min=0)
        reached = [float((values[-1] + r) / (values[0] + r)) for r in (ridge, ridge / 2)]
        assert reached[0] <= most * (1 + 1e-3)
        assert ridge == 1e-9 or reached[1] >= most * (1 - 1e-3)
        assert math.log2(ridge / 1e-9).is_integer()


def test_half_precision_and_empty():
    m, b = definite(8, 5.0).bfloat16(), randn(3, 8).half()
    m = (m + m.mT) / 2
    found = solve_psd(m, b)
    assert found.x.dtype == torch.float32
    assert distance(found.x, b.double() @ torch.linalg.inv(m.double())) <= 200 * EPS[torch.float32]
    assert solve_psd(torch.eye(3), torch.zeros(0, 3)).x.shape == (0, 3)
    assert solve_psd(torch.zeros(0, 0), torch.zeros(2, 0)).x.shape == (2, 0)
    assert solve_psd(torch.zeros(0, 3, 3), torch.zeros(0, 2, 3)).x.shape == (0, 2, 3)
    assert solve_ridge(torch.zeros(2, 0), torch.zeros(0, 3), 1.0).x.equal(torch.zeros(2, 3))


def test_bad_arguments():
    eye, b = torch.eye(3), torch.ones(2, 3)
    bad = torch.full((2, 3), math.nan)
    for call, error, message in [
        (lambda: solve_psd(torch.ones(3, 2), b), ValueError, r"expected \[..., n, n\], got \[3, 2\]"),
        (lambda: solve_psd(eye, torch.ones(2, 4)), ValueError, r"expected b of \[2, 3\], got \[2, 4\]"),
        (lambda: solve_psd(eye, torch.ones(3)), ValueError, "expected b"),
        (lambda: solve_psd(eye.int(), b), ValueError, "got torch.int32"),
        (lambda: solve_psd(eye, b, precision="half"), ValueError, "got 'half'"),  # type: ignore[arg-type]
        (lambda: solve_psd(eye, b, rank_one=(b[0], b)), ValueError, r"rank_one vector must be \[3\]"),
        (lambda: solve_psd(eye, bad), NonFinite, "NaN or infinite"),
        (lambda: solve_psd(-eye, b), NumericError, "matrix 0 of 1 is not positive definite in torch.float64"),
        (lambda: solve_psd(-eye, b, precision="float32"), NumericError, "in torch.float32"),
        (lambda: solve_psd(eye, b, rank_one=(eye[0], -eye[0])), NumericError, "makes the matrix singular"),
        (lambda: solve_ridge(b, torch.ones(3, 5), 0.0), ValueError, "ridge must be positive, got 0.0"),
        (lambda: solve_ridge(b, torch.ones(4, 5), 1.0), ValueError, r"expected g of \[2, 4\], got \[2, 3\]"),
        (lambda: capped_ridge(eye, 0.0, 10.0), ValueError, "start > 0"),
        (lambda: capped_ridge(bad[:, :2], 1.0, 10.0), NonFinite, "capped_ridge"),
    ]:
        with pytest.raises(error, match=message):
            call()
