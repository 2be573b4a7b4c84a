"""The CUDA kernels of gram64, run on the CPU by an emulator, against float64 products."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

import tests.native.emulated as e
from tests.native.emulated import CODES, store

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulated kernels")
SOURCE = Path(__file__).parent / "emulated_gram64.cpp"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return e.build(tmp_path_factory.mktemp("emulated"), SOURCE)


@pytest.fixture(params=e.ORDERS)
def library(request, built):
    """Every order of the threads of a block gives the same bits."""
    built.set_order(request.param, seed=1)
    return built


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 3), (1, 40, 64), (2, 33, 70), (1, 300, 129)], ids=str)
@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize(("transposed", "splits"), [(False, 1), (True, 1), (False, 3), (True, 2)])
def test_gram64(library, shape, code, transposed, splits):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stored = store(x.swapaxes(1, 2).ravel() if transposed else x.ravel(), code)
    wide = stored.array.astype(np.uint32) << 16 if code == "BF16" else stored.array
    wide = (wide.view(np.float32) if code == "BF16" else wide).astype(np.float64)
    wide = wide.reshape(shape[0], shape[2], shape[1]).swapaxes(1, 2) if transposed else wide.reshape(shape)
    gram = np.full((shape[0], shape[2], shape[2]), np.nan)
    library.emulate_gram64(
        ctypes.c_void_p(stored.address), CODES[code], *map(ctypes.c_int64, shape), int(transposed), splits,
        ctypes.c_void_p(gram.ctypes.data),
    )  # fmt: skip
    bound = shape[1] * 2.0**-52 * (np.abs(wide).swapaxes(1, 2) @ np.abs(wide))
    assert (np.abs(gram - wide.swapaxes(1, 2) @ wide) <= bound).all()
    assert np.array_equal(gram, gram.swapaxes(1, 2))
