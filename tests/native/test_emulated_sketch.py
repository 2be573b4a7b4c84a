"""The sketch kernels for CUDA, run on the CPU by the emulator, against the CPU operator: the same bits."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

import tests.native.emulated as e
from pymerge.ops.sketch import gaussian_matrix, sketch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulated kernels")
SOURCE = Path(__file__).parent / "emulated_sketch.cpp"
CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return e.build(tmp_path_factory.mktemp("emulated"), SOURCE)


@pytest.fixture(params=e.ORDERS)
def library(request, built):
    """Every order of the threads of a block gives the same bits."""
    built.set_order(request.param, seed=1)
    return built


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


@pytest.mark.parametrize("dtype", [*CODES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 70, 20), (5, 31, 5), (40, 37, 300)], ids=str)  # m, n, width
def test_sparse(library, dtype, shape):
    m, n, width = shape
    a = torch.randn(m, n, generator=torch.Generator().manual_seed(m)).to(dtype)
    expected = sketch(a, width, seed=7)
    y = torch.full_like(expected, torch.nan)
    if dtype == torch.float64:
        library.sparse_double(pointer(a), pointer(y), *sizes(m, n, width), ctypes.c_uint64(7))
    else:
        library.sparse_float(pointer(a), CODES[dtype], pointer(y), *sizes(m, n, width), ctypes.c_uint64(7))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("shape", [(1, 1), (37, 5), (300, 64)], ids=str)
def test_gaussian(library, shape):
    omega = torch.full(shape, torch.nan)
    library.gaussian(pointer(omega), *sizes(*shape), ctypes.c_uint64(2**64 - 3))
    assert torch.equal(omega, gaussian_matrix(*shape, -3, omega.device))
