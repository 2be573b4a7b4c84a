"""An array library of a test's own, and arrays that differ in how they are stored."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np


class Array:
    """Knows DLPack and nothing else."""

    def __init__(self, x: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.x, self.device = x, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def library(monkeypatch: Any, name: str = "arraylib") -> Any:
    """A module with the class Array and from_dlpack, importable by its name."""
    module = types.ModuleType(name)
    module.Array = type("Array", (Array,), {"__module__": f"{name}.core"})
    module.from_dlpack = lambda x: module.Array(np.from_dlpack(x))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def locked(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def misplaced(x: np.ndarray) -> np.ndarray:
    """On addresses that are no multiples of the item size."""
    space = np.zeros(x.nbytes + 1, np.uint8)[1:]
    y = space.view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


STORED = {
    "plain": lambda x: x,
    "read-only": locked,
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "every second": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda x: x[::-1].copy()[::-1],
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder()),
    "misplaced": misplaced,
    "subclass": lambda x: x.view(np.memmap),
}
