"""What the emulator of csrc/emu must pass and what it must catch, in every order of the threads."""

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

import tests.native.emulated as e

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulated kernels")
THREADS = 256
X = np.arange(1, 2 * THREADS + 1, dtype=np.float32) / 4
ONE = X[:THREADS]
LANES = np.arange(THREADS)

# kernel: (entries of x, right result, what the emulator says of the planted mistake)
KERNELS = {
    "sum": (401, [X[:256].sum(), X[256:401].sum()], r"no barrier: .* of shared scratch .*, planted_kernels.cpp:\d+$"),
    "twice": (256, 3 * np.roll(ONE, -37), "no barrier: .* of shared scratch"),
    "double": (401, 2 * X[:401], r"out of bounds: writes 4 bytes at byte 1604 of a buffer \(1604 bytes\)"),
    "reverse": (401, X[:401][::-1], "out of bounds: reads 4 bytes at byte -4 of a buffer"),
    "array": (256, ONE[::-1] + 1, r"out of bounds: writes 4 bytes at byte 1024 of shared first \(1024 bytes\)"),
    "dynamic": (256, np.roll(ONE, -1), r"out of bounds: .*byte 1024 of dynamic shared memory \(1024 bytes\)"),
    "barriers": (256, np.ones(256), "128 threads wait at the barrier planted_kernels.cpp:.*, 128 threads wait"),
    "return": (401, X[:401], "block .1, 0, 0.*111 threads have returned, 145 threads wait at the barrier"),
    "half_warp": (
        256,
        np.where(LANES % 32 < 16, ONE[LANES // 32 * 32], ONE),
        "128 threads have returned, 128 threads wait in the collective planted_kernels.cpp:.*",
    ),
    "exchange": (256, ONE[LANES ^ 1], "no barrier: .* of shared scratch"),
    "poison": (256, ONE, None),
    "vector": (256, (4 * LANES + 2) / 4, r"not aligned: reads 16 bytes at byte \d+ of a buffer"),
    "count": (256, np.full(256, 64), "no barrier: .* of shared bins"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return e.build(tmp_path_factory.mktemp("planted"), Path(__file__).parent / "planted_kernels.cpp")


@pytest.fixture(params=e.ORDERS)
def library(request, built):
    built.set_order(request.param, seed=3)
    return built


def run(library, kernel: str, planted: bool) -> np.ndarray:
    count, right, _ = KERNELS[kernel]
    x = e.buffer(count if kernel != "vector" else 4 * THREADS, np.float32)
    x[:] = np.arange(1, x.size + 1) / 4
    y = e.filled(len(right), np.float32)
    addresses = (ctypes.c_void_p(a.ctypes.data) for a in (x, y))
    library.emulate_planted(list(KERNELS).index(kernel), int(planted), *addresses, count)
    return y


@pytest.mark.parametrize("kernel", KERNELS)
def test_right_kernels_pass(library, kernel):
    right = np.asarray(KERNELS[kernel][1], dtype=np.float32)
    assert np.array_equal(run(library, kernel, planted=False), right)


@pytest.mark.parametrize("kernel", [name for name, (_, _, message) in KERNELS.items() if message])
def test_planted_mistakes_are_caught(library, kernel):
    with pytest.raises(e.EmulationError, match=KERNELS[kernel][2]):
        run(library, kernel, planted=True)
    test_right_kernels_pass(library, kernel)  # and leave nothing behind


def test_shared_memory_holds_nan_until_it_is_written(library):
    assert np.isnan(run(library, "poison", planted=True)).all()


def test_collectives(library):
    y = e.filled(40, np.float32)
    library.emulate_collectives(ctypes.c_void_p(y.ctypes.data))
    assert (y == 8).all()


def test_a_block_that_no_device_takes(library):
    with pytest.raises(e.EmulationError, match=r"no device takes grid \(1, 1, 1\) of blocks \(1025, 1, 1\)"):
        library.emulate_large_block(ctypes.c_void_p(0))


def test_guard_pages_stop_what_is_not_reported(library):
    """numpy's accesses go through no check; the page behind a buffer refuses them all the same."""
    y = e.buffer(4, np.float32)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    end = f"{y.ctypes.data + y.nbytes:x}"
    assert any(fields[0].startswith(f"{end}-") and fields[1] == "---p" for fields in maps)
