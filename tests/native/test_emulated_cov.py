"""The CUDA kernels of cov_accumulate, run on the CPU by an emulator, against float64."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

import tests.native.emulated as e

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulated kernels")
SOURCE = Path(__file__).parent / "emulated_cov.cpp"
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CODES = {BF16: 0, F16: 1, F32: 2, F64: 3}


class CovFields(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cov", "rows_kept", "columns_kept")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride", "cov_stride")),
        ("alpha", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("dtype", "wide_totals", "wide_products", "multiprocessors")),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return e.build(tmp_path_factory.mktemp("emulated"), SOURCE)


def accumulate(library, x, *, mask=None, small=False, wide=False, totals=F32, sms=1, backward=False):
    """cov, which began as 3 everywhere, and the number of parts."""
    source = x.mT if small else x
    rows, columns = source.shape
    cov = torch.full((columns, columns + 5), 3.0, dtype=totals)
    fields = CovFields(
        x=x.data_ptr(),
        cov=cov.data_ptr(),
        rows_kept=None if mask is None or small else mask.data_ptr(),
        columns_kept=mask.data_ptr() if mask is not None and small else None,
        rows=rows,
        columns=columns,
        row_stride=source.stride(0),
        column_stride=source.stride(1),
        cov_stride=cov.stride(0),
        alpha=0.5,
        dtype=CODES[x.dtype],
        wide_totals=int(totals == F64),
        wide_products=int(wide),
        multiprocessors=sms,
    )
    library.set_order("reversed" if backward else "forward")
    parts = library.emulate_cov(ctypes.byref(fields))
    assert (cov[:, columns:] == 3).all(), "entries beyond the row were written"
    return cov[:, :columns], parts


def check(cov, x, *, mask=None, small=False, wide=False):
    used = x.double() if mask is None else torch.where(mask[:, None], x.double(), 0)
    used = used.mT if small else used
    exact, size = used.mT @ used, used.abs().mT @ used.abs()
    unit = 2.0**-53 if wide or x.dtype == F64 else 2.0**-24
    split = 3 * 2.0**-22 if x.dtype == F32 and not wide else 0.0  # three products of tf32 halves
    stored = (2.0**-24 if cov.dtype == F32 else 2.0**-53) * 4 * (3 + exact.abs())
    bound = 0.5 * (used.shape[0] * unit + split) * size + stored
    upper = torch.triu(torch.ones_like(cov, dtype=torch.bool))
    assert ((cov.double() - 3 - 0.5 * exact).abs() <= bound)[upper].all()
    assert (cov == 3)[~upper].all()


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (37, 24), (130, 136), (50, 131)], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "reversed"])
def test_tiles_against_float64(library, dtype, shape, backward):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    cov, _ = accumulate(library, x, backward=backward)
    check(cov, x)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["columns", "small"])
def test_masked_rows_are_not_read(library, dtype, small):
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.rand(40, generator=torch.Generator().manual_seed(2)) < 0.6
    x[~mask] = torch.nan
    cov, _ = accumulate(library, x, mask=mask, small=small)
    check(cov, x, mask=mask, small=small)


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_parts_are_added_in_order(library, dtype):
    x = torch.randn(530, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    cov, parts = accumulate(library, x, sms=4, totals=F64)
    assert parts == 2
    check(cov, x)
    again, _ = accumulate(library, x, sms=4, totals=F64, backward=True)
    assert torch.equal(cov, again)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_float64_products_of_narrow_entries(library, dtype):
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(4)).to(dtype)
    cov, _ = accumulate(library, x, wide=True, totals=F64)
    check(cov, x, wide=True)


def test_strided_entries(library):
    wide = torch.randn(64, 90, generator=torch.Generator().manual_seed(5)).bfloat16()
    for x in (wide[:, ::2], wide[::2, 1:], wide.mT):
        cov, _ = accumulate(library, x)
        check(cov, x)
