"""The CUDA kernels, run on the CPU by an emulator, against the CPU kernels: the same bits."""

import ctypes
import shutil
from dataclasses import replace

import numpy as np
import pytest

import tests.native.emulated as e
from pymerge import _C
from tests.native.emulated import Problem, store

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to build the emulated kernels")
KEYS = tuple(0x9E3779B97F4A7C15 * (t + 1) % 2**64 for t in range(40))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return e.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module", params=e.ORDERS)
def library(request, built):
    """Every order of the threads of a block gives the same bits."""
    built.set_order(request.param, seed=1)
    return built


def problem(count, codes=("BF16",) * 3, base: str | None = "BF16", offset=0, seed=0, **fields) -> Problem:
    """Tuned tensors near a base, rounded so that many deltas are equal and some are zero."""
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(count).astype(np.float32)
    tuned = tuple(store(start + np.round(rng.standard_normal(count) * 4) / 64, code, offset) for code in codes)
    return Problem(base=None if base is None else store(start, base, offset), tuned=tuned, **fields)


def assert_same_merge(library, p: Problem, add, out_code="BF16", offset=0):
    ours, theirs = (e.empty(p.count, out_code, offset) for _ in range(2))
    assert e.emulated_merge(library, p, add, ours) == e.host_merge(p, add, theirs)
    assert ours.array.tobytes() == theirs.array.tobytes()


RULES = {
    "linear": {"weights": (0.3, -0.7, 1.1), "scale": 0.9, "divisor": 1.7},
    "dare": {"weights": (0.3, 0.5, -1.1), "keep": (0.5, 0.1, 1.0), "keys": KEYS[:3], "rescales": (2.0, 10.0, 1.0)},
    "elect": {"weights": (1.0, 0.5, 2.0), "elect": True, "tie_sign": -1},
    "elect_weights": {"weights": (1.0, -1.0, 2.0), "elect": True, "norm": "weights"},
    "elect_count": {"weights": (1.0, 1.0, 1.0), "elect": True, "norm": "count", "scale": 0.4},
    "elect_max": {"weights": (1.0, 0.2, 1.0), "elect": True, "norm": "max"},
    "weights": {"weights": (1.0, 0.2, 0.3), "norm": "weights"},
    "count": {"weights": (1.0, 0.2, 0.3), "norm": "count"},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 8, 37, 5003])
def test_merge_rules(library, rule, count):
    p = problem(count, **RULES[rule])
    assert_same_merge(library, p, p.base)
    assert_same_merge(library, p, None, "F32")


@pytest.mark.parametrize("codes", [("F32",) * 2, ("F16",) * 2, ("BF16", "F32"), ("F64", "F16")], ids="-".join)
@pytest.mark.parametrize("out_code", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("offset", [0, 3])
def test_merge_dtypes_and_places(library, codes, out_code, offset):
    p = problem(611, codes, codes[0], offset, weights=(0.3, 0.9))
    assert_same_merge(library, p, p.base, out_code, offset)
    assert_same_merge(library, replace(p, base=None), store(np.arange(611) / 8, "F16"), out_code)


@pytest.mark.parametrize("row_length", [0, 5, 8, 100])
@pytest.mark.parametrize("mask", [False, True])
def test_merge_selection(library, row_length, mask):
    fields = {"keep": (0.6, 0.6, 0.6), "keys": KEYS[:3]} if mask else {}
    p = problem(1000, weights=(1.0, 1.0, 1.0), row_length=row_length, elect=True, **fields)
    length = row_length or 1000
    p = p.with_cut("top", (length // 2, length // 3, length)).with_cut("skip", (length // 10, 0, 1))
    assert_same_merge(library, p, p.base)


def test_merge_of_more_tasks_than_a_launch_carries(library):
    p = problem(301, ("BF16",) * 40, weights=tuple(0.1 * t for t in range(40)), keep=(0.5,) * 40, keys=KEYS)
    assert_same_merge(library, replace(p, elect=True, norm="count"), p.base)


@pytest.mark.parametrize("code", ["BF16", "F16", "F32"])
def test_merge_counts_what_is_not_finite(library, code):
    base, tuned = np.ones(2000, dtype=np.float32), np.ones(2000, dtype=np.float32)
    base[3], tuned[[7, 8, 1999]], base[1500] = np.nan, (np.inf, -np.inf, np.nan), np.inf
    p = Problem(
        base=store(base, code), tuned=(store(tuned, code),) * 2, weights=(1.0, 2.0), keep=(0.0, 0.5), keys=(1, 2)
    )
    assert_same_merge(library, p, p.base, code)
    assert_same_merge(library, p, store(tuned, code), code)
    large = Problem(base=None, tuned=(store(np.full(50, 6e4), "F32"),), weights=(3e35,))
    assert_same_merge(library, large, None, "F16")
    assert_same_merge(library, large, None, "BF16")


@pytest.mark.parametrize("keep", [0.0, 2.0**-32, 0.3, 1 - 2.0**-33, 1.0])
def test_random_mask_over_many_entries(library, keep):
    p = problem(150_000 if keep == 0.3 else 999, ("F32",), None, weights=(1.0,), keep=(keep,), keys=(KEYS[7],))
    assert_same_merge(library, p, None, "F32")


def ranks_of(length: int) -> list[tuple[int, ...]]:
    return [(1, length // 2, length - 1), (0, length, length // 7), (length // 5, 2, length + 3)]


@pytest.mark.parametrize("count", [1, 9, 2050, 70_001])
@pytest.mark.parametrize("mask", [False, True])
def test_kth_of_one_long_row(library, count, mask):
    fields = {"keep": (0.6, 0.3, 1.0), "keys": KEYS[:3]} if mask else {}
    for ranks in ranks_of(count):
        p = problem(count, ranks=ranks, **fields)
        for ours, theirs in zip(e.emulated_kth(library, p, long_row=True), e.host_kth(p), strict=True):
            assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize(("count", "row_length"), [(1, 0), (2050, 0), (2600, 650), (60, 3), (21, 1)])
@pytest.mark.parametrize("mask", [False, True])
def test_kth_of_short_rows(library, count, row_length, mask):
    fields = {"keep": (0.6, 0.3, 1.0), "keys": KEYS[:3]} if mask else {}
    for ranks in ranks_of(row_length or count):
        p = problem(count, ("F16", "F32", "BF16"), row_length=row_length, ranks=ranks, **fields)
        for ours, theirs in zip(e.emulated_kth(library, p, long_row=False), e.host_kth(p), strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_kth_of_float32_needs_all_bits(library):
    rng = np.random.default_rng(1)
    x = store(1.0 + rng.integers(0, 2**15, 40_000) * 2.0**-23, "F32")  # one bin of the first level
    for rank in (1, 17, 20_000, 39_999):
        p = Problem(base=None, tuned=(x,), ranks=(rank,))
        for ours, theirs in zip(e.emulated_kth(library, p, long_row=True), e.host_kth(p), strict=True):
            assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("prefix", [None, (0x8590, 0, 0x7C80)])
@pytest.mark.parametrize("scale", [1.0, 100.0])  # magnitudes above 2 are counted another way
def test_histogram(library, prefix, scale):
    p = problem(63_000, weights=None, keep=(1.0, 0.5, 0.9), keys=KEYS[:3], prefix=prefix)
    tuned = tuple(store((x.array.astype(np.uint32) << 16).view(np.float32) * scale, "F32") for x in p.tuned)
    p = replace(p, tuned=tuned)
    ours, theirs = (e.filled(3 << (15 if prefix else 16), np.int64).reshape(3, -1) for _ in range(2))
    _C.delta_histogram(p.host_base, p.host_tuned, p.count, 0, p.keep, p.keys, prefix and list(prefix), theirs)
    fields = p.fields()
    library.emulate_histogram(ctypes.byref(fields), int(prefix is not None), ctypes.c_void_p(ours.ctypes.data))
    assert ours.sum() == theirs.sum() > 0
    assert np.array_equal(ours, theirs)


def test_histogram_of_more_chunks_than_blocks(library):
    p = problem(250_003, ("BF16",))
    ours = e.filled(1 << 16, np.int64)
    theirs = np.zeros((1, 1 << 16), dtype=np.int64)
    _C.delta_histogram(p.host_base, p.host_tuned, p.count, 0, None, None, None, theirs)
    fields = p.fields()
    library.emulate_histogram(ctypes.byref(fields), 0, ctypes.c_void_p(ours.ctypes.data))
    assert np.array_equal(ours, theirs[0])


def test_sums(library):
    p = problem(100_003, weights=(1.0, -0.5, 0.7), keep=(0.5, 0.9, 1.0), keys=KEYS[:3], rescales=(2.0, 1.1, 1.0))
    p = p.with_cut("top", (50_000, 20_000, 99_999))
    fields = p.fields()
    norms, gram = (e.filled(n, np.float64).reshape(3, -1) for n in (6, 9))
    total = e.filled(1, np.int64)
    library.emulate_l1(ctypes.byref(fields), ctypes.c_void_p(norms.ctypes.data))
    library.emulate_gram(ctypes.byref(fields), ctypes.c_void_p(gram.ctypes.data))
    library.emulate_signs(ctypes.byref(fields), ctypes.c_void_p(total.ctypes.data))
    host = p.host_base, p.host_tuned, p.count
    np.testing.assert_allclose(norms, np.frombuffer(_C.delta_l1(*host, 0, p.params())).reshape(3, 2), rtol=1e-12)
    np.testing.assert_allclose(gram, np.frombuffer(_C.delta_gram(*host)).reshape(3, 3), rtol=1e-12)
    assert total[0] == _C.delta_signs(*host, 0, p.params())


@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
def test_finite_cast(library, code):
    x = np.random.default_rng(0).standard_normal(3001).astype(np.float32) * 1e5
    x[:5] = np.inf, -np.inf, np.nan, 3.4e38, 1e-42
    source, ours = store(x, "F32"), e.empty(3001, code)
    bad = e.filled(1, np.int64)
    address = [ctypes.c_void_p(a) for a in (source.address, ours.address, bad.ctypes.data)]
    library.emulate_finite_cast(address[0], address[1], e.CODES[code], ctypes.c_int64(3001), address[2])
    theirs = e.empty(3001, code)
    weights = Problem(base=None, tuned=(source,), weights=(1.0,))
    assert bad[0] == e.host_merge(weights, None, theirs)[-1]
    assert ours.array.tobytes() == theirs.array.tobytes()
