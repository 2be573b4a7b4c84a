"""pymerge: merge fine-tuned models into one, without training, at the speed of the machine.

Names are imported when they are first used: `import pymerge` costs milliseconds, torch is imported only where needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pymerge.version import __version__

if TYPE_CHECKING:
    from pymerge import linalg, methods, ops
    from pymerge.checkpoint import Checkpoint, open_checkpoint
    from pymerge.engine.api import Recipe, merge
    from pymerge.engine.local import plan_merge
    from pymerge.engine.plan import Options
    from pymerge.engine.verify import verify
    from pymerge.errors import MergeError
    from pymerge.statistics import Statistics, observe, open_statistics
    from pymerge.tuning import search

__all__ = [
    "Checkpoint",
    "MergeError",
    "Options",
    "Recipe",
    "Statistics",
    "__version__",
    "linalg",
    "merge",
    "methods",
    "observe",
    "open_checkpoint",
    "open_statistics",
    "ops",
    "plan_merge",
    "search",
    "verify",
]

_HOME = {
    "Checkpoint": "pymerge.checkpoint",
    "MergeError": "pymerge.errors",
    "Options": "pymerge.engine.plan",
    "Recipe": "pymerge.engine.api",
    "Statistics": "pymerge.statistics",
    "merge": "pymerge.engine.api",
    "observe": "pymerge.statistics",
    "open_statistics": "pymerge.statistics",
    "open_checkpoint": "pymerge.checkpoint",
    "plan_merge": "pymerge.engine.local",
    "search": "pymerge.tuning",
    "verify": "pymerge.engine.verify",
}


def __getattr__(name: str) -> Any:
    if name in ("linalg", "methods", "ops"):
        return importlib.import_module(f"pymerge.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'pymerge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
