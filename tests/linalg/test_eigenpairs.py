"""Ranges of eigenpairs of symmetric float64 matrices, by each of the ways to solve the tridiagonal problem."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.errors import NumericError
from pymerge.linalg import _dense, _lapack

EPS = torch.finfo(torch.float64).eps
SIZES = {
    "spread": lambda r: torch.rand(r, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    "graded": lambda r: 10.0 ** -torch.linspace(0, 14, r, dtype=torch.float64),
    "one value": lambda r: torch.ones(r, dtype=torch.float64),
    "clusters": lambda r: torch.arange(r, dtype=torch.float64).div(r / 4, rounding_mode="floor") + 1,
    "half of the rank": lambda r: torch.arange(r, dtype=torch.float64).sub(r // 2).clamp(min=0),
    "zero": lambda r: torch.zeros(r, dtype=torch.float64),
}


def symmetric(values: Tensor) -> Tensor:
    r = len(values)
    q = torch.linalg.qr(torch.randn(r, r, generator=torch.Generator().manual_seed(r), dtype=torch.float64)).Q
    m = q * values @ q.mT
    return (m + m.mT) / 2


def check(m: Tensor, values: Tensor, vectors: Tensor, low: int, high: int) -> None:
    """To the backward error of LAPACK's symmetric eigensolvers."""
    r, norm = len(m), float(torch.linalg.matrix_norm(m, 2))
    bound = 4 * r * EPS
    assert values.shape == (high - low,)
    assert vectors.shape == (r, high - low)
    assert float((values - torch.linalg.eigvalsh(m)[low:high]).abs().amax()) <= bound * norm
    assert float((vectors.mT @ vectors - torch.eye(high - low, dtype=m.dtype)).abs().amax()) <= bound
    assert float((m @ vectors - vectors * values).abs().amax()) <= bound * norm


@pytest.mark.parametrize("share", [1, 2, 3, 5, 12, 40])
@pytest.mark.parametrize("kind", SIZES)
def test_both_ends_of_the_spectrum(kind: str, share: int) -> None:
    m = symmetric(SIZES[kind](120))
    for low, high in ((0, 120 // share), (120 - 120 // share, 120)):
        lower = m.tril() + 99.0 * torch.ones_like(m).triu(1)  # only the lower triangle is read
        check(m, *_dense.range_eigh(lower, low, high), low, high)


@pytest.mark.parametrize("r", [1, 2, 3, 25, 26, _dense.LAPACK_SIDE, _dense.LAPACK_SIDE + 1])
def test_all_pairs(r: int) -> None:
    m = symmetric(SIZES["spread"](r))
    for laid_out in (m.clone(), m.clone().mT):
        check(m, *_dense.eigh(laid_out), 0, r)


@pytest.mark.parametrize(("way", "count"), [("divide_and_conquer", 120), ("mrrr", 20)])
def test_bisection_takes_over(monkeypatch: pytest.MonkeyPatch, way: str, count: int) -> None:
    def fails(*_: object) -> None:
        raise NumericError("info 1")

    monkeypatch.setattr(_lapack, way, fails)
    m = symmetric(SIZES["spread"](120))
    check(m, *_dense.range_eigh(m.clone(), 120 - count, 120), 120 - count, 120)
