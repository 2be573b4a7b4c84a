"""The share of a merge's memory that reading over the network takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pymerge.checkpoint import Checkpoint
from pymerge.remote.blocks import BLOCKS
from pymerge.remote.files import RemoteFile

if TYPE_CHECKING:
    from pymerge.engine.plan import Options
    from pymerge.statistics import Statistics

LARGEST, SMALLEST = 256 << 20, 4 << 20  # bytes; more do not make a merge faster
LEAST = 64 << 20  # bytes that any merge needs beside
SHARE = 4  # at most one in so many of those that are left


def offline(
    options: Options,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    fisher: Sequence[Checkpoint],
    statistics: Sequence[Statistics],
) -> Options:
    """The options with the memory that the network leaves. Blocks that are read ahead keep to their share from here on;
    where all inputs are local there is none."""
    given = (base, *models, *fisher, *(found.file for found in statistics))
    streams = {id(checkpoint) for checkpoint in given if checkpoint is not None and is_far(checkpoint)}
    if not streams:
        return options
    left = max(SMALLEST, min(LARGEST, (options.memory_bytes - LEAST) // SHARE))
    share = 1 << (left.bit_length() - 1)  # in steps: a budget raised by what a plan says is lacking seldom moves it
    BLOCKS.plan(share, len(streams))
    return replace(options, memory=options.memory_bytes - share)


def is_far(checkpoint: Checkpoint) -> bool:
    return any(isinstance(file, RemoteFile) for file in checkpoint.files)


def network_notes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What a plan says where inputs are remote."""
    far = sum(map(is_far, checkpoints))
    text = f"{far} of {len(checkpoints)} inputs read over the network; a plan's seconds are those of disks"
    return [text] if far else []
