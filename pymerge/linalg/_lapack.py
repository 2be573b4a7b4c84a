"""float64 LAPACK and BLAS that libtorch does not export, called so that other Python threads run meanwhile.

The routines are scipy's (their addresses are public through scipy.linalg.cython_lapack); scipy's own Python wrappers
keep the interpreter's lock, and matrices of a merge that are decomposed side by side would wait for each other.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pymerge.errors import NumericError

_KINDS: dict[type, Any] = {bytes: ctypes.c_char, int: ctypes.c_int, float: ctypes.c_double}


@lru_cache(maxsize=16)
def _routine(name: str) -> Any:
    """A Fortran routine: all arguments are addresses. ctypes drops the interpreter's lock around the call."""
    modules = [importlib.import_module(f"scipy.linalg.cython_{kind}") for kind in ("blas", "lapack")]
    api: dict[str, Any] = {key: value for module in modules for key, value in module.__pyx_capi__.items()}
    python = ctypes.pythonapi
    python.PyCapsule_GetName.restype, python.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    python.PyCapsule_GetPointer.restype = ctypes.c_void_p
    python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = python.PyCapsule_GetPointer(api[name], python.PyCapsule_GetName(api[name]))
    return ctypes.CFUNCTYPE(None)(address)


def _call(name: str, *arguments: Any) -> None:
    """Text, integers, floats by address; tensors by their data."""
    held: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            held.append(ctypes.c_void_p(value.data_ptr()))
        else:
            held.append(ctypes.byref(_KINDS[type(value)](value)))
    _routine(name)(*held)


def _int(value: int = 0) -> Tensor:
    return torch.full((1,), value, dtype=torch.int32)


def columns(rows: int, count: int) -> Tensor:
    """[rows, count], float64, column by column in memory, as Fortran has it."""
    return torch.empty(count, rows, dtype=torch.float64).mT


def add_gram_(total: Tensor, block: Tensor) -> None:
    """total += block block^T, lower triangle; total [r, r] column-major, block [r, n] row-major, both float64."""
    r, n = block.shape
    _call("dsyrk", b"L", b"T", r, n, 1.0, block, max(1, n), 1.0, total, r)


def congruence(d: Tensor, s: Tensor) -> Tensor:
    """d S d^T [m, m], lower triangle, column-major; d [m, n], S symmetric given by the upper triangle s [n, n], both
    float64 and row-major. With U = s: d U d^T + (d U d^T)^T has the diagonal of S once too often; n^2 m / 2 + n m^2
    multiply-adds, where two products take n^2 m + n m^2."""
    m, n = d.shape
    y = d.clone()  # d U; row-major is the transpose to Fortran, whose lower triangle s is
    _call("dtrmm", b"L", b"L", b"N", b"N", n, m, 1.0, s, max(1, n), y, max(1, n))
    y.addcmul_(d, s.diagonal(), value=-0.5)
    return symmetric_product(d, y)


def symmetric_product(d: Tensor, y: Tensor) -> Tensor:
    """d y^T + y d^T [m, m], lower triangle, column-major; both [m, n], float64 and row-major."""
    m, n = d.shape
    total = torch.zeros(m, m, dtype=torch.float64).mT
    _call("dsyr2k", b"L", b"T", m, n, 1.0, d, max(1, n), y, max(1, n), 0.0, total, m)
    return total


def tridiagonal(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Householder reduction of the symmetric matrix whose lower triangle g [r, r] (column-major) holds; g becomes the
    reflectors. Returns diagonal [r], off-diagonal [r] (the last entry is no part of it), factors of the reflectors."""
    r = g.shape[0]
    diagonal, off, tau = (torch.zeros(r, dtype=torch.float64) for _ in range(3))
    work, info = torch.empty(64 * r, dtype=torch.float64), _int()
    _call("dsytrd", b"L", r, g, r, diagonal, off, tau, work, 64 * r, info)
    return diagonal, off, tau


def divide_and_conquer(diagonal: Tensor, off: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs low..high-1 of a tridiagonal matrix, ascending, out of all: two [r, r] in memory, most of it in matrix
    products. Keeps its inputs."""
    r = diagonal.shape[0]
    values, off, vectors, size = diagonal.clone(), off.clone(), columns(r, r), 1 + 4 * r + r * r
    work, integers, info = torch.empty(size, dtype=torch.float64), torch.empty(3 + 5 * r, dtype=torch.int32), _int()
    _call("dstedc", b"I", r, values, off, vectors, r, work, size, integers, 3 + 5 * r, info)
    if int(info):
        raise NumericError(f"dstedc: info {int(info)}")
    del work
    return values[low:high], vectors if high - low == r else vectors[:, low:high].mT.clone().mT


def mrrr(diagonal: Tensor, off: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs low..high-1 of a tridiagonal matrix by relatively robust representations. Keeps its inputs.

    Raises   NumericError where the representations fail (seen on no matrix so far)."""
    r, count = diagonal.shape[0], high - low
    diagonal, off, values, vectors = diagonal.clone(), off.clone(), torch.empty_like(diagonal), columns(r, count)
    support, found, robust, info = torch.empty(2 * count, dtype=torch.int32), _int(), _int(1), _int()
    work, integers = torch.empty(18 * r, dtype=torch.float64), torch.empty(10 * r, dtype=torch.int32)
    _call(
        "dstemr", b"V", b"I", r, diagonal, off, 0.0, 0.0, low + 1, high, found, values, vectors, r, count, support,
        robust, work, 18 * r, integers, 10 * r, info,
    )  # fmt: skip
    if int(info) or int(found) != count:
        raise NumericError(f"dstemr: info {int(info)}, {int(found)} of {count} eigenvalues")
    return values[:count], vectors


def bisection(diagonal: Tensor, off: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """As mrrr, by bisection and inverse iteration: cheaper for few of many pairs."""
    r, count = diagonal.shape[0], high - low
    values, vectors = torch.empty(r, dtype=torch.float64), columns(r, count)
    block, split = (torch.empty(r, dtype=torch.int32) for _ in range(2))
    found, splits, info = _int(), _int(), _int()
    work, integers = torch.empty(5 * r, dtype=torch.float64), torch.empty(3 * r, dtype=torch.int32)
    _call(
        "dstebz", b"I", b"B", r, 0.0, 0.0, low + 1, high, 0.0, diagonal, off, found, splits, values, block, split, work,
        integers, info,
    )  # fmt: skip
    if int(info) or int(found) != count:
        raise NumericError(f"dstebz: info {int(info)}, {int(found)} of {count} eigenvalues")
    failed = torch.empty(count, dtype=torch.int32)
    _call("dstein", r, diagonal, off, count, values, block, split, vectors, r, work, integers, failed, info)
    if int(info):
        raise NumericError(f"dstein: {int(info)} of {count} eigenvectors did not converge")
    order = values[:count].argsort()  # they come block by block
    return values[:count][order], vectors if bool((order.diff() > 0).all()) else vectors[:, order].mT.contiguous().mT


def reflect_(reflectors: Tensor, tau: Tensor, vectors: Tensor) -> None:
    """vectors <- Q vectors, Q the reflections that `tridiagonal` left; all column-major."""
    r, count = vectors.shape
    work = torch.empty(64 * max(1, count), dtype=torch.float64)
    _call("dormtr", b"L", b"L", b"N", r, count, reflectors, r, tau, vectors, r, work, 64 * count, _int())
