"""Tensor algorithms that the methods share, built from operators.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.linalg.assignment import Assignment, assign

_HOME = {
    "Assignment": "assignment",
    "assign": "assignment",
}

__all__ = [
    "Assignment",
    "assign",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pymerge.linalg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pymerge.linalg.{_HOME[name]}"), name)
    globals()[name] = value
    return value
