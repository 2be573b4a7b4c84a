"""NumPy, CuPy, JAX and other arrays with `__dlpack__` in, arrays of the same library out, without copies.

`takes_arrays` is put on every public function of `pymerge.ops` and `pymerge.linalg`; it costs calls with tensors a look
at the types of the arguments.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from pymerge.ops.delta_rule import DeltaRule

P = ParamSpec("P")
R = TypeVar("R")

# What a call with tensors has for arguments, most often; anything else is looked at.
_KNOWN = frozenset({Tensor, torch.nn.Parameter, torch.dtype, DeltaRule, type(None), bool, int, float, str})
_DTYPES = ("bfloat16", "float16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")
_HOMES = {"jaxlib": "jax.dlpack", "jax": "jax.dlpack"}  # where from_dlpack is, if not in the package of the class
_CUDA = 2  # kDLCUDA


def takes_arrays(function: Callable[P, R], *, writes: str | None = None) -> Callable[P, R]:
    """`function` for arrays of any one library, whose arrays its results are then: tensors by themselves, in tuples and
    in dataclasses. None, numbers and words stay. (JAX without jax_enable_x64 makes 64-bit results 32-bit ones.)

    writes   the argument that is written in place; with an argument `overwrite`, only where that is true
    Raises   TypeError (several libraries in one call; a dtype that torch lacks; a masked array; no way back);
             ValueError (several devices; a GPU without CUDA in torch; an array that cannot be written in place)."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def taking(*args: P.args, **kwargs: P.kwargs) -> R:
        for x in (*args, *kwargs.values()) if kwargs else args:
            if type(x) not in _KNOWN and _is_foreign(x):
                return _through(function, signature, writes, args, kwargs)
        return function(*args, **kwargs)

    return taking


def writes_array(argument: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`takes_arrays` for functions that write `argument` in place."""
    return functools.partial(takes_arrays, writes=argument)


def _is_foreign(x: Any) -> bool:
    if isinstance(x, (list, tuple)):
        return not _KNOWN.issuperset(map(type, x)) and any(map(_is_foreign, x))
    return hasattr(x, "__dlpack__") and not isinstance(x, Tensor)


def _through(function: Callable, signature: inspect.Signature, writes: str | None, args: tuple, kwargs: dict) -> Any:
    bound = signature.bind(*args, **kwargs)
    arguments = bound.arguments
    name = function.__qualname__
    home = _home(name, list(_arrays(arguments.values())))
    if "overwrite" in signature.parameters and not arguments.get("overwrite"):
        writes = None
    given: list[tuple[Tensor, Any]] = []
    for key, x in arguments.items():
        arguments[key] = _to_torch(x, f"{name}: {key}", key == writes, given)
    return _from_torch(function(*bound.args, **bound.kwargs), name, home, given)


def _arrays(values: Iterable) -> Iterable[Any]:
    for x in values:
        if isinstance(x, (list, tuple)):
            yield from _arrays(x)
        elif hasattr(x, "__dlpack__"):
            yield x


def _home(name: str, arrays: list) -> str:
    """The module whose from_dlpack makes the arrays of the library that all of these belong to."""
    roots = ["numpy" if isinstance(x, np.ndarray) else type(x).__module__.partition(".")[0] for x in arrays]
    homes = sorted({_HOMES.get(root, root) for root in roots})
    if len(homes) > 1:
        libraries = " and ".join(home.partition(".")[0] for home in homes)
        raise TypeError(f"{name}: arrays of {libraries} in one call: convert them to one library")
    for x in arrays:
        if not hasattr(x, "__dlpack_device__"):
            raise TypeError(f"{name}: a {type(x).__name__} has no memory: call it outside of jax.jit and the like")
    devices = sorted({tuple(map(int, x.__dlpack_device__())) for x in arrays})
    if len(devices) > 1:
        places = " and ".join(map(str, devices))
        raise ValueError(f"{name}: arrays on several devices, {places} as DLPack counts them: move them to one")
    if devices[0][0] == _CUDA and torch.version.cuda is None:
        raise ValueError(f"{name}: arrays on a GPU, but torch {torch.__version__} is a build without CUDA")
    if not hasattr(importlib.import_module(homes[0]), "from_dlpack"):
        raise TypeError(f"{name}: {homes[0]} has no from_dlpack that would make its arrays of the results")
    return homes[0]


def _to_torch(x: Any, what: str, written: bool, given: list[tuple[Tensor, Any]]) -> Any:
    if isinstance(x, (list, tuple)):
        return [_to_torch(one, f"{what}[{i}]", written, given) for i, one in enumerate(x)]
    if isinstance(x, np.generic):
        return x.item()
    if not hasattr(x, "__dlpack__"):
        dtype = np.dtype(x) if isinstance(x, type) and issubclass(x, np.generic) else getattr(x, "dtype", x)
        return getattr(torch, dtype.name) if isinstance(dtype, np.dtype) else x  # the library's dtypes as torch's
    if written and _HOMES.get(type(x).__module__.partition(".")[0]):
        raise ValueError(f"{what} is written in place, and JAX arrays cannot be: use a NumPy array or a tensor")
    tensor = _from_numpy(x, what, written) if isinstance(x, np.ndarray) else torch.from_dlpack(x)
    given.append((tensor, x))
    return tensor


def _from_numpy(x: np.ndarray, what: str, written: bool) -> Tensor:
    """torch.from_numpy also of read-only and bfloat16 arrays; other byte orders and negative strides are copied."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{what} is a masked array: fill it (x.filled(0.0)), or give the mask by itself")
    if x.dtype.name not in _DTYPES:
        raise TypeError(f"{what} has dtype {x.dtype}: expected one of {', '.join(_DTYPES)}")
    y = np.asarray(x)
    odd = not y.dtype.isnative or not y.flags.aligned or any(step < 0 or step % y.itemsize for step in y.strides)
    if odd:
        y = y.astype(y.dtype.newbyteorder("="), order="C")
    if written and (odd or not x.flags.writeable):
        why = "read-only" if not x.flags.writeable else "of a byte order or strides that torch lacks"
        raise ValueError(f"{what} is written in place, and it is {why}: give a plain writable array")
    is_bfloat16 = x.dtype.name == "bfloat16"  # of the package ml_dtypes
    y = y.view(np.int16) if is_bfloat16 else y
    tensor = torch.from_numpy(y if y.flags.writeable else np.asarray(_Unlocked(y)))
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


class _Unlocked:
    """A read-only array as a writable one on the same memory: torch has no read-only tensors and warns of them."""

    def __init__(self, x: np.ndarray) -> None:
        self.held = x
        place, _ = x.__array_interface__["data"]
        self.__array_interface__ = {**x.__array_interface__, "data": (place, False)}


def _from_torch(result: Any, name: str, home: str, given: list[tuple[Tensor, Any]]) -> Any:
    if isinstance(result, Tensor):
        for tensor, array in given:
            if result is tensor:
                return array
        return _to_numpy(result, name) if home == "numpy" else importlib.import_module(home).from_dlpack(result)
    if is_dataclass(result) and not isinstance(result, type):
        parts = (getattr(result, field.name) for field in fields(result))
        return type(result)(*(_from_torch(part, name, home, given) for part in parts))
    if isinstance(result, tuple):
        converted = [_from_torch(part, name, home, given) for part in result]
        return type(result)(*converted) if hasattr(result, "_fields") else tuple(converted)
    return result


def _to_numpy(x: Tensor, name: str) -> np.ndarray:
    if x.dtype != torch.bfloat16:
        return x.numpy()
    try:
        ml_dtypes = importlib.import_module("ml_dtypes")
    except ImportError as error:
        raise TypeError(f"{name}: NumPy has bfloat16 by the package ml_dtypes: pip install ml_dtypes") from error
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
