"""The only door to native code: per operator a schema in C++, a plain PyTorch reference, a fake and a typed wrapper.

An operator lives in the module of its name: `from pymerge.ops.delta_merge import delta_merge`.

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
    "delta_gram",
    "delta_histogram",
    "delta_kth",
    "delta_l1",
    "delta_merge",
    "delta_signs",
    "finite_cast",
    "sketch",
)
_HOME = {"TensorSurvey": "pymerge.ops.delta", "merge_by_rule": "pymerge.ops.delta"}

__all__ = ["OPERATORS", "TensorSurvey", "merge_by_rule", "native_devices"]


def native_devices() -> dict[str, tuple[str, ...]]:
    """Of each operator, the devices on which it runs native code; on others its PyTorch reference runs."""
    from pymerge.ops._load import has_kernel

    for name in OPERATORS:
        importlib.import_module(f"pymerge.ops.{name}")
    return {name: tuple(device for device in ("cpu", "cuda") if has_kernel(name, device)) for name in OPERATORS}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pymerge.ops' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
