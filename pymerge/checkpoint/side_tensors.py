"""A safetensors file beside a model's weights, written piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from pymerge.checkpoint.layout import Entry, plan_layout
from pymerge.checkpoint.shard_file import ShardFile


class SideTensors:
    """Allocates the file at its full size and writes its header; `write` then puts bytes of a tensor in their place.

    entries   (name, safetensors dtype, shape)
    checksum  CRC-32C of the whole file, as it is read back, once the file is closed
    Raises    OSError. As a context manager it syncs and closes the file. `write` may be called by several threads."""

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        layout = plan_layout(entries, 1 << 62, metadata)
        self._slots = layout.slots
        self._size = layout.shards[0].size
        self.checksum = 0
        self._file = ShardFile(path.parent, replace(layout.shards[0], file=path.name), create=True)

    def write(self, name: str, start: int, view: memoryview) -> None:
        """Write bytes start .. start + len(view) of a tensor."""
        slot = self._slots[name]
        if start < 0 or start + view.nbytes > slot.nbytes:
            raise ValueError(f"{name}: bytes {start}..{start + view.nbytes} written, the tensor has {slot.nbytes}")
        if view.nbytes:
            self._file.write(view.cast("B"), slot.offset + start)

    def __enter__(self) -> SideTensors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.sync()
                self.checksum = self._file.checksum(0, self._size)
        finally:
            self._file.close()
