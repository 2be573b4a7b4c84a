"""The only door to native code: per operator a schema in C++, a plain PyTorch reference, a fake and a typed wrapper.

An operator lives in the module of its name: `from pymerge.ops.delta_merge import delta_merge`. Its wrapper takes arrays
of any library with DLPack and returns that library's (`pymerge.ops._foreign`).

Names are imported when they are first used: merges from disk to disk run on byte buffers and never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

try:
    from pymerge import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"the native core of pymerge is not built or does not load ({error}). Build it in the source tree: "
        "pip install --no-build-isolation -e ."
    ) from error

if TYPE_CHECKING:
    from pymerge.ops.delta import TensorSurvey, merge_by_rule

OPERATORS = (
    "assign",
    "cov_accumulate",
    "delta_gram",
    "delta_histogram",
    "delta_kth",
    "delta_l1",
    "delta_merge",
    "delta_signs",
    "finite_cast",
    "gram64",
    "project_delta",
    "projection_stats",
    "sketch",
)
_HOME = {"TensorSurvey": "pymerge.ops.delta", "merge_by_rule": "pymerge.ops.delta"}

__all__ = ["OPERATORS", "TensorSurvey", "implementations", "merge_by_rule"]


def implementations() -> dict[str, dict[str, str]]:
    """Of each operator, what runs on "cpu" and on "cuda": native, nvrtc (its kernels, compiled by CuPy at first use)
    or reference (plain PyTorch)."""
    from pymerge.ops._load import implementation

    for name in OPERATORS:
        importlib.import_module(f"pymerge.ops.{name}")
    return {name: {device: implementation(name, device) for device in ("cpu", "cuda")} for name in OPERATORS}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pymerge.ops' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
