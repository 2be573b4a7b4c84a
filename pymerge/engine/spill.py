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
    process. Any thread may write and read. OutputError where the disk does not take it."""

    def __init__(self, folder: Path) -> None:
        self.folder = next(place for place in (folder, *folder.parents) if place.is_dir())
        self._end, self._mutex = 0, threading.Lock()
        try:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)
        except OSError as e:
            raise self._error(e) from e

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Spilled:
        """For a tensor that is to be written."""
        with self._mutex:
            start, self._end = self._end, self._end + math.prod(shape) * dtype.itemsize
        return Spilled(self, start, shape, dtype)

    def put(self, tensor: Tensor) -> Spilled:
        kept = self.room(tuple(tensor.shape), tensor.dtype)
        kept.write(0, bytes_of(tensor.contiguous()))
        return kept

    def write(self, view: memoryview, start: int) -> None:
        done = 0
        try:
            while done < view.nbytes:
                done += os.pwrite(self._file.fileno(), view[done:], start + done)
        except OSError as e:
            raise self._error(e) from e

    def read_into(self, view: memoryview, start: int) -> None:
        done = 0
        while done < view.nbytes:
            if not (got := os.preadv(self._file.fileno(), [view[done:]], start + done)):
                raise OutputError(f"{self.folder}: what was kept on this disk meanwhile is shorter than it was written")
            done += got

    def close(self) -> None:
        self._file.close()

    def _error(self, e: OSError) -> OutputError:
        return OutputError(f"{self.folder}: what is to become the adapter cannot be kept there: {e.strerror or e}")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
