"""Tensor algorithms that the methods share, built from operators: truncated SVD and its relatives.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.linalg.subspaces import covariance_subspace, singular_values, subspace, tail_subspace
    from pymerge.linalg.svd import truncated_svd
    from pymerge.linalg.svd_info import SVD, SVDInfo

_HOME = {
    "SVD": "svd_info",
    "SVDInfo": "svd_info",
    "covariance_subspace": "subspaces",
    "singular_values": "subspaces",
    "subspace": "subspaces",
    "tail_subspace": "subspaces",
    "truncated_svd": "svd",
}

__all__ = [
    "SVD",
    "SVDInfo",
    "covariance_subspace",
    "singular_values",
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
