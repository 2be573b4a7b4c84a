"""The staged output of a merge, as another process than its owner writes into it."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymerge.checkpoint.header import safe_name
from pymerge.checkpoint.journal import JOURNAL, Segment, read_identity
from pymerge.checkpoint.layout import Layout
from pymerge.checkpoint.shard_file import ShardFile
from pymerge.checkpoint.write import write_error
from pymerge.errors import OutputError


class SharedOutput:
    """Writes tensors to their places in the folder that a StagedOutput has prepared.

    The owner keeps the journal: what `finish` returns is on disk, and the owner adopts it. A process that dies before
    that leaves bytes that nobody vouches for; they are written again.

    staging, identity  of the StagedOutput
    Raises             OutputError: this machine does not see that folder"""

    def __init__(self, staging: Path, layout: Layout, identity: Mapping[str, Any]) -> None:
        self.staging, self.layout = staging, layout
        self.done: dict[str, list[tuple[int, int, int]]] = {}  # set by those who know
        self._written: list[Segment] = []
        self._shards: list[ShardFile] = []
        try:
            found = read_identity(staging / JOURNAL)
            for shard in layout.shards:
                self._shards.append(ShardFile(staging, shard, create=False))
            same = found == identity and all(map(ShardFile.matches, self._shards, layout.shards))
        except OSError:
            same = False
        if not same:
            self.close()
            raise OutputError(
                f"{staging}: {socket.gethostname()} does not see the output that is being written there: it must lie "
                "on a file system that all machines share"
            )

    def write(self, name: str, start: int, view: memoryview, crc: int, facts: Mapping[str, Any] | None = None) -> None:
        """As StagedOutput.write; no two processes may write other bytes to one place."""
        slot = self.layout.slots[name]
        try:
            self._shards[slot.shard].write(view.cast("B"), slot.offset + start)
        except OSError as e:
            file = self.layout.shards[slot.shard].file
            raise write_error(e, self.staging, f"writing {safe_name(name)} to {file} failed", self.layout) from e
        self._written.append(Segment(name, start, view.nbytes, crc, facts or {}))

    def finish(self) -> Sequence[Segment]:
        """Puts on disk what was written since the last call, and returns it."""
        written, self._written = self._written, []
        try:
            for shard in sorted({self.layout.slots[segment.name].shard for segment in written}):
                self._shards[shard].sync_data()
        except OSError as e:
            raise write_error(e, self.staging, "the output cannot be put on disk", self.layout) from e
        return written

    def forget(self, name: str) -> None:
        self.done.pop(name, None)

    def read_into(self, name: str, view: memoryview) -> None:
        slot = self.layout.slots[name]
        self._shards[slot.shard].read_into(view, slot.offset)

    def close(self) -> None:
        for shard in self._shards:
            shard.close()
