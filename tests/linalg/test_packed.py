"""Symmetric matrices by their upper triangle: products of slabs against products of the whole."""

import pytest
import torch

from pymerge.linalg import covariance_subspace
from pymerge.linalg.packed import SLAB, congruence, pack, packed_covariance_subspace, unpack

WIDTHS = (1, 7, SLAB, SLAB + 1, 2 * SLAB + 30)


def covariance(n: int, rows: int | None = None) -> torch.Tensor:
    x = torch.randn(rows or n + 5, n, generator=torch.Generator().manual_seed(n)) * torch.linspace(2, 0.1, n)
    return x.mT @ x


def left(m: int, n: int) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m + n), dtype=torch.float64)


@pytest.mark.parametrize("n", WIDTHS)
def test_a_product_of_slabs_is_that_of_the_whole(n):
    c, w = covariance(n), left(5, n)
    whole = c.triu().double() + c.triu(1).double().mT
    assert torch.equal(unpack(pack(c), n, torch.float64), c.triu().double())
    expected = (w @ whole @ w.mT).tril()
    for d in (w, w.mT.contiguous().mT):  # row by row, and column by column as a turned weight has it
        found = congruence(d, pack(c)).tril()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10 * float(expected.norm()))


@pytest.mark.parametrize("scale", (1.0, 1e-30))  # squares of the second vanish
@pytest.mark.parametrize(("m", "n", "rows"), ((20, 300, 400), (20, 300, 10), (40, 16, 60)))
def test_directions_are_those_of_the_whole_matrix(m, n, rows, scale):
    d, c = left(m, n).float() * scale, covariance(n, rows)
    basis, values = packed_covariance_subspace(d, pack(c), 4)
    expected, theta = covariance_subspace(d, c.double(), 4)
    torch.testing.assert_close(values, theta, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(basis, expected, rtol=0.0, atol=2e-6)


def test_a_covariance_of_zeros_and_entries_that_are_no_numbers():
    basis, values = packed_covariance_subspace(left(6, 9).float(), torch.zeros(45), 2)
    assert torch.equal(values, torch.zeros(2, dtype=torch.float64)) and basis.shape == (6, 2)
    with pytest.raises(ValueError, match="c has 1 NaN"):
        packed_covariance_subspace(left(6, 9).float(), torch.ones(45).index_fill(0, torch.tensor([3]), torch.nan), 2)
