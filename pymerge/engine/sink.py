"""Where finished bytes go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Sink(Protocol):
    """Takes finished segments: a staged folder, or tensors in memory."""

    @property
    def done(self) -> Mapping[str, Sequence[tuple[int, int, int]]]:
        """(start, bytes, checksum) of the segments that an earlier run has finished."""
        ...

    def write(self, name: str, start: int, view: memoryview, crc: int, facts: Mapping[str, Any]) -> None: ...

    def forget(self, name: str) -> None:
        """Drop the finished segments of a tensor."""
        ...

    def read_into(self, name: str, view: memoryview) -> None:
        """A tensor that has been written."""
        ...
