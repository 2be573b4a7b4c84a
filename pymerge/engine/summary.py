"""merge.json: what was merged from what, how, with which relaxations, and the checksum of every tensor written."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from pymerge import _C
from pymerge.checkpoint import Checkpoint
from pymerge.engine.plan import Plan
from pymerge.version import __version__

FORMAT = 1  # of merge.json


def packages_of(plan: Plan) -> dict[str, str]:
    """Method -> name and version of the package that brings it, of the methods that are not pymerge's own."""
    steps = {id(item.entry.steps): item.entry.steps for item in plan.items if item.entry.steps is not None}
    return {step.name: step.package for found in steps.values() for step in found.all if step.package}


def summary_of(
    plan: Plan,
    inputs: Sequence[Checkpoint],
    checksums: Mapping[str, int],
    facts: Mapping[str, Mapping[str, Any]],
    *,
    seconds: float,
    peak: int,
    busy: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """What merge.json says. checksums: CRC-32C of each tensor that has entries; facts: what methods note; busy: seconds
    that reading, computing and writing took, at the same time and on several threads."""
    return {
        "format": FORMAT,
        "pymerge": __version__,
        "python": platform.python_version(),
        "machine": {"processor": platform.machine(), "cpu_level": _C.cpu_level()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": plan.recipe.to_dict(),
        **({"resolved": plan.recipe.resolved} if plan.recipe.resolved else {}),
        **({"methods_from": packages} if (packages := packages_of(plan)) else {}),
        **({"align": plan.alignment} if plan.alignment is not None else {}),
        **({"vocabulary": plan.vocabulary} if plan.vocabulary is not None else {}),
        "inputs": [checkpoint.fingerprint() for checkpoint in inputs],
        "tensors": plan.counts,
        "relaxations": plan.recipe.relaxations,
        "notes": [*plan.recipe.notes, *plan.notes],
        "bytes_read": plan.read_bytes,
        "bytes_written": plan.write_bytes,
        "seconds": round(seconds, 3),
        **({"busy_seconds": {stage: round(spent, 3) for stage, spent in busy.items()}} if busy else {}),
        "peak_rss_bytes": peak,
        "per_tensor": {name: dict(facts[name]) for name in plan.layout.slots if name in facts},
        "checksums": {name: f"{checksums.get(name, 0):08x}" for name in plan.layout.slots},
    }
