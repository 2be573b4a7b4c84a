"""Tensors on disk that a merge comes back to, so that what it remembers does not grow with the model."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pymerge.checkpoint.shard_file import read_all, write_all
from pymerge.checkpoint.staging import require_space
from pymerge.errors import OutputError


@dataclass(frozen=True)
class Spilled:
    """A tensor in a `Spill`."""

    spill: Spill
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def load(self) -> Tensor:
        """In memory of its own."""
        return self.part(0, self.numel).reshape(self.shape)

    def part(self, first: int, count: int) -> Tensor:
        """These entries, flat."""
        found = torch.empty(count, dtype=self.dtype)
        self.spill.read_into(bytes_of(found), self.start + first * self.dtype.itemsize)
        return found

    def write(self, start: int, view: memoryview) -> None:
        """Bytes start .. start + len(view)."""
        self.spill.write(view, self.start + start)


class Spill:
    """A file without a name on the disk of `folder`, or of the nearest folder above it that is there: gone with the
    process. Any thread may write and read.

    needed  bytes that must be free there
    Raises  OutputError where they are not, or the disk does not take what is written."""

    def __init__(self, folder: Path, needed: int = 0) -> None:
        self.folder = next(place for place in (folder, *folder.parents) if place.is_dir())
        require_space(self.folder, needed, f"{self.folder}: the adapter, while it is made,")
        self._end, self._mutex = 0, threading.Lock()
        self._free: dict[int, list[int]] = {}  # bytes -> where there is room of this size again
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)
        except OSError as e:
            raise self._error(e) from e

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, *, used: bool = False) -> Spilled:
        """For a tensor that is to be written; zeros where it is not. used: it may have been another tensor's, whose
        values are there."""
        size = math.prod(shape) * dtype.itemsize
        with self._mutex:
            if used and (free := self._free.get(size)):
                return Spilled(self, free.pop(), shape, dtype)
            start, self._end = self._end, self._end + size
            os.ftruncate(self._file.fileno(), self._end)
        return Spilled(self, start, shape, dtype)

    def give_back(self, kept: Spilled) -> None:
        """The tensor is not needed any more."""
        with self._mutex:
            self._free.setdefault(kept.numel * kept.dtype.itemsize, []).append(kept.start)

    def put(self, tensor: Tensor) -> Spilled:
        kept = self.room(tuple(tensor.shape), tensor.dtype)
        kept.write(0, bytes_of(tensor.contiguous()))
        return kept

    def write(self, view: memoryview, start: int) -> None:
        try:
            write_all(self._file.fileno(), view, start)
        except OSError as e:
            raise self._error(e) from e

    def read_into(self, view: memoryview, start: int) -> None:
        try:
            read_all(self._file.fileno(), view, start, self.folder)
        except OSError as e:
            raise self._error(e) from e

    def close(self) -> None:
        self._file.close()

    def _error(self, e: OSError) -> OutputError:
        return OutputError(f"{self.folder}: what is to become the adapter cannot be kept there: {e.strerror or e}")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
