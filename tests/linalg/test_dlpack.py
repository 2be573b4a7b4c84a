"""Arrays of other libraries through pymerge.linalg: NumPy in, NumPy out, field by field, with the values of tensors."""

import inspect
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from pymerge import linalg
from tests.ops.arrays import STORED, library, locked

RANDOM = np.random.default_rng(0)
A = RANDOM.standard_normal((2, 9, 6))
SPD = A.swapaxes(1, 2) @ A + np.eye(6)
SCORES = RANDOM.standard_normal((5, 7)).astype(np.float32)
U = RANDOM.standard_normal((2, 6))

CALLS = {
    "assign": ((SCORES, True), {"check": True}),
    "capped_ridge": ((SPD[0], 1e-3, 100.0), {}),
    "condition_estimate": ((SPD,), {}),
    "covariance_subspace": ((A, SPD, 3), {}),
    "mean_singular_value": ((A, A), {}),
    "polar": ((A.astype(np.float32),), {}),
    "polar_product": ((A[0], SPD[0]), {}),
    "singular_values": ((A,), {}),
    "solve_psd": ((SPD, SPD), {"rank_one": (U, U)}),
    "solve_ridge": ((SPD, A.swapaxes(1, 2)), {"ridge": np.float64(0.1)}),
    "subspace": ((A, 2), {"side": "right"}),
    "tail_subspace": ((A, 2), {}),
    "truncated_svd": ((A, 3), {}),
}


def mapped(change, x):
    if isinstance(x, np.ndarray):
        return change(x)
    if isinstance(x, tuple):
        return tuple(mapped(change, one) for one in x)
    return {key: mapped(change, one) for key, one in x.items()} if isinstance(x, dict) else x


def assert_same(found, wanted, kind=np.ndarray):
    if is_dataclass(wanted):
        assert type(found) is type(wanted)
        for field in fields(wanted):
            assert_same(getattr(found, field.name), getattr(wanted, field.name), kind)
    elif isinstance(wanted, tuple):
        assert type(found) is type(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other, kind)
    elif isinstance(wanted, torch.Tensor):
        assert type(found) is kind
        assert np.array_equal(found if kind is np.ndarray else found.x, wanted.numpy())
    else:
        assert type(found) is type(wanted) and found == wanted


def test_every_function_has_a_case_and_takes_arrays():
    functions = {name for name in linalg.__all__ if inspect.isfunction(getattr(linalg, name))}
    assert functions == set(CALLS)
    for name in functions:
        assert getattr(linalg, name).__code__.co_name == "taking"


@pytest.mark.parametrize("name", CALLS)
def test_numpy_in_numpy_out(name):
    args, kwargs = CALLS[name]
    function = getattr(linalg, name)
    numbers = {key: float(x) if isinstance(x, np.generic) else x for key, x in kwargs.items()}
    wanted = function(*mapped(torch.tensor, args), **mapped(torch.tensor, numbers))
    assert_same(function(*mapped(locked, args), **mapped(locked, kwargs)), wanted)


@pytest.mark.parametrize("stored", STORED)
def test_however_it_is_stored(stored):
    wanted = linalg.truncated_svd(torch.tensor(A), 3)
    found = linalg.truncated_svd(STORED[stored](A), 3)
    for one, other in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-12, atol=1e-13)


def test_another_library(monkeypatch):
    other = library(monkeypatch)
    assert_same(linalg.polar(other.Array(A)), linalg.polar(torch.tensor(A)), other.Array)


def test_overwrite_needs_an_array_that_can_be_written():
    x = linalg.solve_psd(SPD.copy(), SPD, precision="float64", overwrite=True).x
    np.testing.assert_allclose(x, np.broadcast_to(np.eye(6), x.shape), atol=1e-10)
    with pytest.raises(ValueError, match="solve_psd: m is written in place, and it is read-only"):
        linalg.solve_psd(locked(SPD), SPD, precision="float64", overwrite=True)
    linalg.solve_psd(locked(SPD), SPD, precision="float64")


def test_mixed_libraries():
    with pytest.raises(TypeError, match="solve_psd: arrays of numpy and torch in one call"):
        linalg.solve_psd(SPD, SPD, rank_one=(torch.tensor(U), U))
