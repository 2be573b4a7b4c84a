"""Tensor algorithms that the methods share, built from operators: truncated SVD, polar factors, PSD solves, assignment.

Functions take arrays of any library with DLPack and return that library's. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.linalg.assignment import Assignment, assign
    from pymerge.linalg.polar_factor import Polar, mean_singular_value, polar, polar_product
    from pymerge.linalg.solve import Solved, capped_ridge, condition_estimate, solve_psd, solve_ridge
    from pymerge.linalg.subspaces import covariance_subspace, singular_values, subspace, tail_subspace
    from pymerge.linalg.svd import truncated_svd
    from pymerge.linalg.svd_info import SVD, SVDInfo

_HOME = {
    "SVD": "svd_info",
    "Assignment": "assignment",
    "Polar": "polar_factor",
    "SVDInfo": "svd_info",
    "Solved": "solve",
    "assign": "assignment",
    "capped_ridge": "solve",
    "condition_estimate": "solve",
    "covariance_subspace": "subspaces",
    "mean_singular_value": "polar_factor",
    "polar": "polar_factor",
    "polar_product": "polar_factor",
    "singular_values": "subspaces",
    "solve_psd": "solve",
    "solve_ridge": "solve",
    "subspace": "subspaces",
    "tail_subspace": "subspaces",
    "truncated_svd": "svd",
}

__all__ = [
    "SVD",
    "Assignment",
    "Polar",
    "SVDInfo",
    "Solved",
    "assign",
    "capped_ridge",
    "condition_estimate",
    "covariance_subspace",
    "mean_singular_value",
    "polar",
    "polar_product",
    "singular_values",
    "solve_psd",
    "solve_ridge",
    "subspace",
    "tail_subspace",
    "truncated_svd",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pymerge.linalg' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pymerge.linalg.{_HOME[name]}"), name)
    globals()[name] = value
    return value
