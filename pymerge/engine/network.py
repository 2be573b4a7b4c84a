"""The share of a merge's memory that reading over the network takes."""

from __future__ import annotations

from collections.abc import Iterable

from pymerge.checkpoint import Checkpoint
from pymerge.remote.blocks import BLOCKS
from pymerge.remote.files import RemoteFile

LARGEST = 256 << 20  # bytes; more do not make a merge faster
SHARE = 4  # of the budget at most one in so many


def read_ahead(checkpoints: Iterable[Checkpoint | None], memory: int) -> int:
    """Bytes that blocks read ahead may take beside the arena; from here on they keep to it. 0: all inputs are local."""
    streams = {
        id(checkpoint)
        for checkpoint in checkpoints
        if checkpoint is not None and any(isinstance(file, RemoteFile) for file in checkpoint.files)
    }
    if not streams:
        return 0
    limit = min(LARGEST, memory // SHARE)
    BLOCKS.plan(limit, len(streams))
    return limit
