"""pymerge: merge fine-tuned models into one, without training, at the speed of the machine.

Names are imported when they are first used: `import pymerge` costs milliseconds, torch is imported only where needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pymerge.version import __version__

if TYPE_CHECKING:
    from pymerge import align, linalg, methods, ops
    from pymerge.align import Clusters, Permutations, find_permutations, open_permutations
    from pymerge.checkpoint import Checkpoint, open_checkpoint
    from pymerge.engine.api import Recipe, merge
    from pymerge.engine.local import plan_merge
    from pymerge.engine.plan import Options
    from pymerge.engine.verify import verify
    from pymerge.errors import MergeError
    from pymerge.integrations.mergekit_yaml import run_merge
    from pymerge.report.inspection import Inspection, inspect
    from pymerge.statistics import Statistics, observe, open_statistics, reset_batch_norm
    from pymerge.tuning import search, sweep

__all__ = [
    "Checkpoint",
    "Clusters",
    "Inspection",
    "MergeError",
    "Options",
    "Permutations",
    "Recipe",
    "Statistics",
    "__version__",
    "align",
    "find_permutations",
    "inspect",
    "linalg",
    "merge",
    "methods",
    "observe",
    "open_checkpoint",
    "open_permutations",
    "open_statistics",
    "ops",
    "plan_merge",
    "reset_batch_norm",
    "run_merge",
    "search",
    "sweep",
    "verify",
]

_HOME = {
    "Checkpoint": "pymerge.checkpoint",
    "Clusters": "pymerge.align",
    "Inspection": "pymerge.report.inspection",
    "MergeError": "pymerge.errors",
    "Options": "pymerge.engine.plan",
    "Permutations": "pymerge.align",
    "Recipe": "pymerge.engine.api",
    "Statistics": "pymerge.statistics",
    "find_permutations": "pymerge.align",
    "inspect": "pymerge.report.inspection",
    "merge": "pymerge.engine.api",
    "observe": "pymerge.statistics",
    "open_permutations": "pymerge.align",
    "open_statistics": "pymerge.statistics",
    "open_checkpoint": "pymerge.checkpoint",
    "plan_merge": "pymerge.engine.local",
    "reset_batch_norm": "pymerge.statistics",
    "run_merge": "pymerge.integrations.mergekit_yaml",
    "search": "pymerge.tuning",
    "sweep": "pymerge.tuning",
    "verify": "pymerge.engine.verify",
}


def __getattr__(name: str) -> Any:
    if name in ("align", "linalg", "methods", "ops"):
        return importlib.import_module(f"pymerge.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'pymerge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
