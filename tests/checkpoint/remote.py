"""A remote file system for tests: fsspec's memory under a name of its own, which counts and fails as told."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

ROOT = "far://bucket"


class FarFileSystem(MemoryFileSystem):
    """reads: (path, first byte, end) of every request; spoil: changes what one answers, or raises."""

    protocol = "far"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    reads: list[tuple[str, int, int]] = []
    spoil: Callable[[str, int, bytes], bytes] | None = None
    at_once, most_at_once = 0, 0
    lock = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("far://", "memory://", 1) if path.startswith("far://") else path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        far = FarFileSystem
        with far.lock:
            far.at_once += 1
            far.most_at_once = max(far.most_at_once, far.at_once)
        try:
            data = super().cat_file(path, start, end, **kwargs)
            far.reads.append((path, start or 0, len(data) if end is None else end))
            return far.spoil(path, start or 0, data) if far.spoil else data
        finally:
            with far.lock:
                far.at_once -= 1


class DistantLocal(LocalFileSystem):
    """fsspec's local file system under a name that is no plain path to pymerge."""

    protocol = "distant"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("distant://"))


def register() -> None:
    fsspec.register_implementation("far", FarFileSystem, clobber=True)
    fsspec.register_implementation("distant", DistantLocal, clobber=True)


def clear() -> None:
    FarFileSystem.store.clear()
    FarFileSystem.pseudo_dirs[:] = [""]
    FarFileSystem.reads.clear()
    FarFileSystem.spoil, FarFileSystem.most_at_once = None, 0


def upload(folder: Path, name: str = "") -> str:
    """The URL of a copy of a folder, or of a file."""
    system, target = FarFileSystem(), f"/bucket/{name or folder.name}"
    if folder.is_file():
        system.pipe_file(target, folder.read_bytes())
        return f"far:/{target}"
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            system.pipe_file(f"{target}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return f"far:/{target}"


def weight_bytes_read(path: str, origin: int) -> Counter[int]:
    """How often each byte of a file's data was fetched, by its offset."""
    counts: Counter[int] = Counter()
    for name, begin, end in FarFileSystem.reads:
        if name.endswith(path):
            counts.update(range(max(begin, origin), end))
    return counts
