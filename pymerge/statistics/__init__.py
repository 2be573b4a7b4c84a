"""What linear layers see: second moments (or rows) of their inputs, collected from a few samples, kept in a file."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymerge.statistics.batch_norm import reset_batch_norm
    from pymerge.statistics.moments import Moments
    from pymerge.statistics.observing import observe
    from pymerge.statistics.store import Statistics, open_statistics

__all__ = ["Moments", "Statistics", "observe", "open_statistics", "reset_batch_norm"]

_HOME = {
    "Moments": "moments",
    "Statistics": "store",
    "observe": "observing",
    "open_statistics": "store",
    "reset_batch_norm": "batch_norm",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pymerge.statistics' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pymerge.statistics.{_HOME[name]}"), name)
    globals()[name] = value
    return value
