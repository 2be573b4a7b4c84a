from __future__ import annotations

import math

import pytest
import torch

import pymerge.linalg as linalg
from pymerge.errors import NonFinite
from pymerge.linalg import covariance_subspace, singular_values, subspace, subspaces, tail_subspace
from tests.linalg.known_svd import matrix, sine, spectrum

DTYPES = [torch.float32, torch.float64]
SHAPES = [(40, 60), (60, 40), (50, 50), (1, 5), (5, 1)]


def assert_basis(x: torch.Tensor, m: int, k: int, dtype: torch.dtype) -> None:
    assert x.shape == (m, k) and x.dtype == dtype
    assert (x.mT @ x - torch.eye(k, dtype=dtype)).abs().max() <= 10 * m * torch.finfo(dtype).eps
    assert (x.gather(0, x.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subspace(shape, dtype):
    (m, n), k = shape, max(1, min(shape) // 4)
    a, u, v = matrix(m, n, spectrum("gap", min(m, n)))
    for side, size, truth in (("left", m, u), ("right", n, v)):
        basis = subspace(a.to(dtype), k, side=side)
        assert_basis(basis, size, k, dtype)
        assert sine(basis, truth[:, :k]) <= 1e3 * torch.finfo(dtype).eps
        assert sine(basis[:, :1], truth[:, :1]) <= 1e3 * torch.finfo(dtype).eps * min(m, n)  # in order


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values(shape, dtype):
    m, n = shape
    for name in ("heavy", "fast", "clustered", "equal"):
        truth = spectrum(name, min(m, n))
        a, _, _ = matrix(m, n, truth)
        error = (singular_values(a.to(dtype)).double() - truth).abs()
        rounding = math.sqrt(max(m, n)) * 4 * torch.finfo(dtype).eps * float(truth.norm())
        assert (error <= rounding).all()
    assert singular_values(torch.zeros(2, 3, 0, 4)).shape == (2, 3, 0)
    assert torch.equal(singular_values(torch.zeros(2, 3, 4)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tail(shape, dtype):
    """The directions behind a gap, within eps32 cond / gap of float32 inputs."""
    (m, n), r = shape, min(shape)
    truth = 2.0 - torch.arange(r).double() / r
    count = max(1, r // 5)
    truth[r - count :] *= 0.01 if r > 1 else 1.0
    a, u, _ = matrix(m, n, truth)
    basis = tail_subspace(a.to(dtype), count)
    assert_basis(basis, m, count, dtype)
    assert sine(basis, u[:, r - count :]) <= 1e3 * torch.finfo(dtype).eps * r
    last = tail_subspace(a.to(dtype), 1)
    assert (basis[:, -1:] - last).abs().max() <= 1e-3 or r == 1


@pytest.mark.parametrize("cond", [1e2, 1e5, 1e9])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)], ids=str)
def test_ill_conditioned_tail(shape, cond):
    """Beyond cond 1e5 the float64 Gram matrix is given up: eps64 cond / gap, not its square."""
    r = 30
    truth = cond ** (-torch.arange(r).double() / (r - 1))
    a, u, _ = matrix(*shape, truth)
    exact = torch.linalg.svd(a, full_matrices=False).U[:, r - 6 : r]
    assert sine(tail_subspace(a, 6), exact) <= 1e-5 if cond <= 1e5 else sine(tail_subspace(a, 6), exact) <= 1e-7


@pytest.mark.parametrize("count", [1, 6, 20])
@pytest.mark.parametrize("shape", [(30, 30), (30, 50), (50, 30)], ids=str)
def test_tail_far_below_the_largest_value(shape, count):
    """Against the truth, eps64 cond / gap: from the inverse of R, or by SVD where the tail itself is wide (20)."""
    truth = 1e11 ** (-torch.arange(30).double() / 29)
    a, u, _ = matrix(*shape, truth)
    basis = tail_subspace(a, count)
    assert_basis(basis, shape[0], count, torch.float64)
    assert sine(basis, u[:, 30 - count : 30]) <= 1e-4
    assert sine(basis[:, -1:], u[:, 29:30]) <= 1e-4


def test_tail_of_zero_and_whole():
    assert torch.equal(tail_subspace(torch.zeros(3, 5), 2), torch.eye(3)[:, -2:])
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    basis = tail_subspace(a, 4)
    assert_basis(basis, 4, 4, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("samples", [10, 200])
def test_covariance_subspace(shape, samples, dtype):
    """Against the SVD of X D^T; `samples` < n makes C singular."""
    m, n = shape
    g = torch.Generator().manual_seed(1)
    d, x = (torch.randn(i, n, dtype=torch.float64, generator=g) for i in (m, samples))
    x = x * 0.7 ** torch.arange(n).double()
    k = min(m, n, 4)
    _, s, vh = torch.linalg.svd(x @ d.mT, full_matrices=False)
    basis, values = covariance_subspace(d.to(dtype), (x.mT @ x).to(dtype), k)
    assert_basis(basis, m, k, dtype)
    assert values.dtype == torch.float64
    eps = torch.finfo(dtype).eps
    assert ((values - s[:k].square()).abs() <= 100 * eps * n * s[0].square()).all()
    assert sine(basis, vh[:k].mT) <= 1e3 * n * eps
    upper = torch.triu((x.mT @ x).to(dtype)) + torch.randn(n, n, generator=g, dtype=dtype).tril(-1)
    one_triangle, same_values = covariance_subspace(d.to(dtype), upper, k)
    assert (same_values - values).abs().max() <= 1e3 * eps * values[0] and sine(
        one_triangle, basis.double()
    ) <= 1e3 * eps


@pytest.mark.parametrize("shape", [(70, 90), (90, 70)], ids=str)
@pytest.mark.parametrize("samples", [40, 200])
def test_covariance_subspace_by_iteration(shape, samples, monkeypatch):
    """Directions as good as the exact ones in what they capture; a lower rank than asked for is no problem."""
    monkeypatch.setattr(subspaces, "GRAM_SIDE", 64)
    monkeypatch.setattr(subspaces, "_covariance_top", None)  # not used
    m, n = shape
    g = torch.Generator().manual_seed(1)
    d, x = (torch.randn(i, n, dtype=torch.float64, generator=g) for i in (m, samples))
    d, c = d * 0.95 ** torch.arange(n).double(), x.mT @ x
    basis, values = covariance_subspace(d, c, 4, mode="fast")
    assert_basis(basis, m, 4, torch.float64)
    exact = torch.linalg.eigvalsh(d @ c @ d.mT).flip(0)[:4]
    assert 1 - 1e-4 < float(values.sum() / exact.sum()) <= 1 + 1e-12
    low = torch.randn(m, 2, generator=g) @ torch.randn(2, n, generator=g)
    basis, values = covariance_subspace(low, c.float(), 4, mode="fast")
    assert_basis(basis, m, 4, torch.float32)
    assert values[2:].max() < 1e-12 * values[0]
    assert (low - basis @ (basis.mT @ low)).norm() < 1e-5 * low.norm()


def test_covariance_batch_zero_and_scale():
    g = torch.Generator().manual_seed(1)
    d, x = torch.randn(2, 3, 5, 4, generator=g), torch.randn(2, 3, 9, 4, generator=g)
    c = x.mT @ x
    basis, values = covariance_subspace(d, c, 2)
    one, one_values = covariance_subspace(d[1, 2], c[1, 2], 2)
    assert torch.equal(basis[1, 2], one) and torch.equal(values[1, 2], one_values)
    tiny, tiny_values = covariance_subspace(d * 2.0**-60, c * 2.0**-60, 2)
    assert sine(tiny[0, 0], basis[0, 0].double()) < 1e-5
    assert (tiny_values * 2.0**180 / values - 1).abs().max() < 1e-5
    basis, values = covariance_subspace(d * 0, c, 2)
    assert torch.equal(basis[0, 0], torch.eye(5, 2)) and values.eq(0).all()


def test_batches_have_the_bits_of_single_calls():
    a = torch.randn(2, 2, 9, 7, generator=torch.Generator().manual_seed(0))
    for run in (
        lambda x: subspace(x, 3),
        lambda x: subspace(x, 3, side="right"),
        singular_values,
        lambda x: tail_subspace(x, 2),
    ):
        whole = run(a)
        assert all(torch.equal(whole[i, j], run(a[i, j])) for i in range(2) for j in range(2))
        assert run(a[:0]).shape == (0, *whole.shape[1:])


def test_bad_arguments():
    a = torch.randn(5, 4)
    for run, message in (
        (lambda: subspace(a, 5), "rank must be an integer in 1..4"),
        (lambda: subspace(a, 2, side="top"), "side must be one of left, right, got 'top'"),
        (lambda: subspace(a.half(), 2), "must be float32 or float64"),
        (lambda: tail_subspace(a, 0), "count must be an integer in 1..4"),
        (lambda: singular_values(a[0]), "a matrix or a batch"),
        (lambda: covariance_subspace(a, torch.eye(5), 2), r"c must be \[4, 4\] on cpu for d \[5, 4\], got \[5, 5\]"),
        (lambda: covariance_subspace(a, torch.eye(4).half(), 2), "c must be float32 or float64"),
        (lambda: covariance_subspace(a, torch.eye(4), 2, mode="quick"), "mode"),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    a[3, 2] = math.nan
    for run in (lambda: subspace(a, 2), lambda: subspace(a, 2, side="right"), lambda: tail_subspace(a, 2),
                lambda: singular_values(a), lambda: covariance_subspace(a, torch.eye(4), 2)):  # fmt: skip
        with pytest.raises(NonFinite, match="1 NaN or infinite entries of 20"):
            run()


def test_names_are_lazy():
    assert all(callable(getattr(linalg, name)) for name in linalg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'polarize'"):
        _ = linalg.polarize
