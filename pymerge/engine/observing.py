"""What it takes to run the models over their samples while they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymerge.statistics.live import LiveStatistics

IN_WORK = 2  # distinct inputs whose moments are held: one that is merged from, one that is being observed


def observing_bytes(live: Sequence[LiveStatistics]) -> dict[str, int]:
    """Memory beside the merge, estimated from the models' configurations: hidden states that are carried, weights of
    the modules that run, moments. The sums of an input take as much as two of its triangles."""
    if not live:
        return {}
    tables = max(found.weight_bytes[0] for found in live)  # embeddings, which one model after the other looks up
    return {
        "states": sum(found.state_bytes for found in live),
        "weights": max(tables, sum(found.weight_bytes[1] for found in live)),
        "moments": sum((2 + IN_WORK) * found.moment_bytes for found in live),
    }
