from __future__ import annotations

import pytest
import torch

from pymerge.ops.finite_cast import finite_cast, finite_cast_reference
from tests.ops.cases import DTYPES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (129, 1025)], ids=str)
def test_matches_reference(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e5  # half overflow float16
    x.reshape(-1)[::1000] = torch.nan
    y, bad = finite_cast(x, dtype)
    expected, expected_bad = finite_cast_reference(x, dtype)
    assert bad == expected_bad and torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
    assert y.data_ptr() != x.data_ptr() or x.numel() == 0


def test_non_contiguous():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).t()
    y, bad = finite_cast(x, torch.bfloat16)
    assert torch.equal(y, x.bfloat16()) and y.is_contiguous() and bad == 0


def test_opcheck():
    for dtype in (torch.float16, torch.float32):
        torch.library.opcheck(torch.ops.pymerge.finite_cast.default, (torch.randn(30), dtype))
    torch.library.opcheck(torch.ops.pymerge.finite_cast.default, (torch.empty(0), torch.float32))


def test_bad_arguments():
    with pytest.raises(RuntimeError, match="x must be float32, got Half"):
        finite_cast(torch.zeros(3, dtype=torch.float16), torch.float32)
    with pytest.raises(RuntimeError, match="dtype must be bfloat16"):
        finite_cast(torch.zeros(3), torch.int8)
