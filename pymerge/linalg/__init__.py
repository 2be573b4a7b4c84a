"""Tensor algorithms that the methods share, built from operators: polar factors and positive definite solves.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.linalg.polar_factor import Polar, mean_singular_value, polar, polar_product
    from pymerge.linalg.solve import Solved, capped_ridge, condition_estimate, solve_psd, solve_ridge

_HOME = {
    "Polar": "polar_factor",
    "Solved": "solve",
    "capped_ridge": "solve",
    "condition_estimate": "solve",
    "mean_singular_value": "polar_factor",
    "polar": "polar_factor",
    "polar_product": "polar_factor",
    "solve_psd": "solve",
    "solve_ridge": "solve",
}

__all__ = [
    "Polar",
    "Solved",
    "capped_ridge",
    "condition_estimate",
    "mean_singular_value",
    "polar",
    "polar_product",
    "solve_psd",
    "solve_ridge",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pymerge.linalg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pymerge.linalg.{_HOME[name]}"), name)
    globals()[name] = value
    return value
