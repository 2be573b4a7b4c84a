"""Tensor-core tiles (csrc/cuda/tile.cuh) in the emulator: fragments, ldmatrix, cp.async and the sums of mma.sync."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

import tests.native.emulated as e
from tests.native.emulated import EmulationError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulated kernels")
OPERANDS = {"BF16": 0, "F16": 1, "TF32": 2}


class ProductFields(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("m", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return e.build(tmp_path_factory.mktemp("tile"), Path(__file__).parent / "tile_kernels.cpp")


@pytest.fixture(params=e.ORDERS)
def library(request, built):
    built.set_order(request.param, seed=2)
    return built


def widened(stored: e.Stored, shape: tuple[int, int]) -> np.ndarray:
    bits = stored.array
    wide = (bits.astype(np.uint32) << 16).view(np.float32) if stored.code == "BF16" else bits
    return wide.reshape(shape).astype(np.float64)


def product(library, operand: str, m: int, n: int, k: int, barrier: int = 1, wait: int = 1, scale: float = 1.0):
    """(emulated, float64 product, sum of |a| |b|)"""
    rng = np.random.default_rng(m + n + k)
    code = "F16" if operand == "F16" else "BF16"
    a, b = e.store(rng.standard_normal(m * k) * scale, code), e.store(rng.standard_normal(k * n), code)
    c = e.empty(m * n, "F32")
    fields = ProductFields(a.address, b.address, c.address, m, n, k)
    library.emulate_product(ctypes.byref(fields), OPERANDS[operand], barrier, wait)
    wide_a, wide_b = widened(a, (m, k)), widened(b, (k, n))
    return c.array.reshape(m, n), wide_a @ wide_b, np.abs(wide_a) @ np.abs(wide_b)


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize(("m", "n", "k"), [(32, 16, 32), (8, 8, 8), (40, 24, 136), (64, 16, 512)])
def test_product_of_partial_tiles(library, operand, m, n, k):
    ours, exact, size = product(library, operand, m, n, k)
    steps = -(-k // 4)  # at most that many sums, each cut at 2^-23 of its largest addend, which size bounds
    assert (np.abs(ours - exact) <= size * steps * 2.0**-23).all()
