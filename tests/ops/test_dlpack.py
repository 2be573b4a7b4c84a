"""Arrays of other libraries through the operators: values, memory, and what is refused."""

import importlib
import inspect
import sys

import numpy as np
import pytest
import torch

from pymerge import ops
from pymerge.errors import NonFinite
from pymerge.linalg import polar
from pymerge.ops import OPERATORS, _foreign, merge_by_rule
from pymerge.ops.assign import assign
from pymerge.ops.cov_accumulate import cov_accumulate, cov_mirror_
from pymerge.ops.delta import TensorSurvey
from pymerge.ops.delta_kth import delta_kth
from pymerge.ops.delta_merge import delta_merge
from pymerge.ops.delta_rule import DeltaRule
from pymerge.ops.delta_signs import delta_signs
from pymerge.ops.finite_cast import finite_cast
from pymerge.ops.gram64 import gram64
from pymerge.ops.project_delta import project_delta
from pymerge.ops.sketch import sketch
from tests.ops.arrays import STORED, library, locked

RANDOM = np.random.default_rng(0)
RULE = DeltaRule(weights=(0.5, 0.25), top=(20, 30), elect="authors", norm="count")


def normal(*shape, dtype=np.float32):
    return RANDOM.standard_normal(shape).astype(dtype)


def same(found, tensor) -> bool:
    return isinstance(found, np.ndarray) and np.array_equal(found, tensor.numpy())


@pytest.mark.parametrize("stored", STORED)
def test_numpy_in_whatever_way_it_is_stored(stored):
    x = normal(12, 7)
    given = STORED[stored](x)
    before = given.copy()
    assert np.array_equal(given, x)
    assert same(gram64(given), gram64(torch.tensor(x)))
    assert same(sketch(given, 3), sketch(torch.tensor(x), 3))
    assert np.array_equal(given, before)


@pytest.mark.parametrize("stored", ["plain", "read-only", "transposed", "every second", "subclass"])
def test_nothing_is_copied(stored):
    x = STORED[stored](normal(6, 5))
    seen = []
    _foreign.takes_arrays(seen.append)(x)
    assert seen[0].data_ptr() == x.__array_interface__["data"][0] and seen[0].shape == x.shape
    assert [step * x.itemsize for step in seen[0].stride()] == list(x.strides)


def test_results_are_the_operators_own_memory():
    kept = []

    @_foreign.takes_arrays
    def twice(x):
        kept.append(x * 2)
        return kept[0]

    found = twice(normal(3))
    assert found.__array_interface__["data"][0] == kept[0].data_ptr()


def test_lists_keywords_and_tuples_of_results():
    base, tuned = normal(4, 50), [normal(4, 50), normal(4, 50)]
    tensors = torch.tensor(base), [torch.tensor(x) for x in tuned]
    for found, wanted in (
        (delta_kth(base, tuned, [7, 9]), delta_kth(*tensors, [7, 9])),
        (delta_kth(None, tuple(tuned), [7, 9]), delta_kth(None, tensors[1], [7, 9])),
        (finite_cast(base * 1e38, np.float16), finite_cast(tensors[0] * 1e38, torch.float16)),
        (finite_cast(base, np.dtype("float64")), finite_cast(tensors[0], torch.float64)),
    ):
        assert isinstance(found, tuple) and all(map(same, found, wanted))
    assert same(merge_by_rule(RULE, base, tuned, add=base), merge_by_rule(RULE, *tensors, add=tensors[0]))
    assert TensorSurvey(base, tuned).gram() == TensorSurvey(*tensors).gram()
    linear = DeltaRule(weights=(1.0, -0.5))
    signs = delta_signs(linear, base, tuned)
    assert signs.shape == () and signs == int(delta_signs(linear, *tensors))
    assert same(delta_merge(linear, None, tuned)[0], delta_merge(linear, None, tensors[1])[0])


def test_in_place_means_the_callers_array():
    x, cov = normal(9, 6), np.zeros((6, 6))
    assert cov_accumulate(cov, x, alpha=np.float32(0.5), mask=np.arange(9) % 2 == 0) is None
    kept = x[::2].astype(np.float64)
    assert np.allclose(cov, np.triu(0.5 * kept.T @ kept), rtol=1e-6, atol=1e-6)
    assert cov_mirror_(cov) is cov
    assert np.array_equal(cov, cov.T)


@pytest.mark.parametrize("stored", ["read-only", "backwards", "other byte order", "misplaced"])
def test_what_cannot_be_written_in_place_is_refused(stored):
    cov = STORED[stored](np.zeros((6, 6)))
    with pytest.raises(ValueError, match="cov_accumulate: cov is written in place, and it is"):
        cov_accumulate(cov, normal(9, 6))
    assert not cov.any()


def test_bfloat16_of_ml_dtypes():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = normal(8, 5)
    rounded = torch.tensor(x).bfloat16()
    for given in (x.astype(bfloat16), locked(x.astype(bfloat16)), x.T.astype(bfloat16).T):
        assert same(gram64(given), gram64(rounded))
    found, bad = finite_cast(x, bfloat16)
    assert found.dtype == bfloat16 and bad == 0
    assert np.array_equal(found.view(np.int16), rounded.view(torch.int16).numpy())


def test_bfloat16_results_need_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match="finite_cast: NumPy has bfloat16 by the package ml_dtypes"):
        finite_cast(normal(3), torch.bfloat16)


@pytest.mark.parametrize(
    "bad", [np.zeros(3, np.complex64), np.array(["a"]), np.array([None]), np.zeros(3, "V4")], ids=str
)
def test_dtypes_that_torch_lacks(bad):
    with pytest.raises(TypeError, match=r"gram64: x has dtype .*: expected one of bfloat16"):
        gram64(bad)


def test_masked_arrays_are_refused():
    with pytest.raises(TypeError, match=r"project_delta: tuned\[1\] is a masked array"):
        project_delta(normal(4, 2), None, [normal(4, 3), np.ma.masked_less(normal(4, 3), 0)])


def test_libraries_are_not_mixed(monkeypatch):
    other = library(monkeypatch)
    x = normal(4, 4)
    for arrays, names in (
        ([x, torch.tensor(x)], "numpy and torch"),
        ([other.Array(x), x], "arraylib and numpy"),
        ([torch.tensor(x), other.Array(x)], "arraylib and torch"),
    ):
        with pytest.raises(TypeError, match=f"project_delta: arrays of {names} in one call"):
            project_delta(arrays[0], None, arrays[1:])


def test_another_library_gets_its_own_arrays_on_the_same_memory(monkeypatch):
    other = library(monkeypatch)
    x = normal(9, 4)
    theta, index = delta_kth(None, [other.Array(x)], [5])
    assert type(theta) is type(index) is other.Array
    assert np.array_equal(theta.x, delta_kth(None, [torch.tensor(x)], [5])[0].numpy())
    cov = other.Array(np.zeros((4, 4)))
    cov_accumulate(cov, other.Array(x))
    assert np.allclose(cov.x, np.triu(x.T @ x), atol=1e-5)
    assert cov_mirror_(cov) is cov


def test_values_under_a_jit_are_refused(monkeypatch):
    tracer = type("Tracer", (), {"__module__": "jax.core", "__dlpack__": None})()
    with pytest.raises(TypeError, match="gram64: a Tracer has no memory: call it outside of jax.jit"):
        gram64(tracer)


def test_nothing_at_all():
    assert gram64(np.zeros((3, 0), np.float32)).shape == (0, 0)
    assert cov_mirror_(np.zeros((0, 0))).shape == (0, 0)


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
def test_cupy_arrays_stay_where_they_are():
    cupy = pytest.importorskip("cupy")
    x, seen = cupy.asarray(normal(9, 5)), []
    _foreign.takes_arrays(seen.append)(x)
    assert seen[0].is_cuda and seen[0].data_ptr() == x.data.ptr
    found = gram64(x)
    assert type(found) is cupy.ndarray
    assert np.allclose(cupy.asnumpy(found), cupy.asnumpy(x).T.astype(np.float64) @ cupy.asnumpy(x))
    cov = cupy.zeros((5, 5))
    cov_accumulate(cov, x)
    assert np.allclose(cupy.asnumpy(cov), np.triu(cupy.asnumpy(found)), atol=1e-5)


def test_devices(monkeypatch):
    other = library(monkeypatch)
    first, second = other.Array(normal(3, 3), (2, 0)), other.Array(normal(3, 3), (2, 1))
    with pytest.raises(ValueError, match=r"arrays on several devices, \(2, 0\) and \(2, 1\)"):
        project_delta(first, None, [second])
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="gram64: arrays on a GPU, but torch .* is a build without CUDA"):
        gram64(first)


def test_arrays_without_a_way_back(monkeypatch):
    other = library(monkeypatch)
    x = other.Array(normal(3, 3))
    del other.from_dlpack
    with pytest.raises(TypeError, match="gram64: arraylib has no from_dlpack"):
        gram64(x)


def test_jax_arrays_are_not_written(monkeypatch):
    jax = library(monkeypatch, "jax")
    monkeypatch.setitem(sys.modules, "jax.dlpack", jax)
    with pytest.raises(ValueError, match="cov_accumulate: cov is written in place, and JAX arrays cannot be"):
        cov_accumulate(jax.Array(np.zeros((4, 4))), jax.Array(normal(9, 4)))
    assert type(gram64(jax.Array(normal(9, 4)))) is jax.Array


def test_errors_of_the_function_itself_stay():
    with pytest.raises(NonFinite, match="polar: matrix 0 of 1 has 1 NaN"):
        polar(np.array([[1.0, np.nan]]))
    with pytest.raises(RuntimeError, match="gram64"):
        gram64(np.zeros(3))
    with pytest.raises(TypeError, match="missing a required argument: 'width'"):
        sketch(np.zeros((3, 3)))


def test_every_public_function_takes_arrays():
    found = [getattr(importlib.import_module(f"pymerge.ops.{name}"), name) for name in OPERATORS]
    for function in (*found, cov_mirror_, ops.merge_by_rule, TensorSurvey.__init__):
        assert function.__code__.co_name == "taking" and function.__wrapped__.__name__ == function.__name__
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)


def test_tensors_are_passed_on_as_they_are():
    x, seen = torch.ones(3), []
    _foreign.takes_arrays(lambda *args, **kwargs: seen.extend([args, kwargs]))(x, [x, None], b=x)
    assert seen[0][0] is x and seen[0][1][0] is x and seen[1]["b"] is x


@pytest.mark.slow
def test_under_torch_compile():
    x = torch.randn(9, 5)
    compiled = torch.compile(lambda y: gram64(y * 2) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), gram64(x * 2) + 1)


def test_assign_on_numpy():
    score = normal(2, 5, 5)
    assert all(map(same, assign(score, True), assign(torch.tensor(score), True)))
