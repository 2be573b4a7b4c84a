"""Remote files: what they were when they were found, and their bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymerge.errors import ChangedInput, InputError
from pymerge.remote.blocks import BLOCKS
from pymerge.remote.urls import asked

# What file systems call the version of a file, the surest first: of its content, then of its time.
VERSIONS = (
    "ETag", "etag", "generation", "md5Hash", "Content-MD5", "blob_id", "sha", "LastModified", "last_modified",
    "Last-Modified", "mtime", "updated", "modified", "created",
)  # fmt: skip
MAX_HEAD = 1 << 20  # of the header of a weight file; longer ones are fetched when they are parsed


class RemoteObject:
    """A file as it was found. versions: what must not change, the surest first; empty where nothing but the size is
    told."""

    def __init__(self, system: Any, key: str, url: str, found: Mapping[str, Any]) -> None:
        self.system, self.key, self.url = system, key, url
        if not isinstance(size_of(found), int):  # some listings say no sizes
            found = asked(lambda: system.info(key), url)
        size = size_of(found)
        if not isinstance(size, int):
            raise InputError(f"{url}: its server does not tell its size")
        self.size, self.versions = size, versions_of(found)
        self.head, self.origin = b"", 0

    @property
    def version(self) -> str | None:
        return next((f"{key} {value}" for key, value in self.versions.items()), None)

    def read(self, begin: int, end: int) -> bytes:
        """One request. Raises OSError where fewer bytes come."""
        options = {} if self.system.async_impl else {"cache_type": "none"}
        data = self.system.cat_file(self.key, start=begin, end=end, **options)
        if len(data) != end - begin:
            raise OSError(f"{len(data)} of {end - begin} bytes came, from byte {begin} on")
        return data

    def read_whole(self) -> bytes:
        return asked(lambda: self.read(0, self.size), self.url) if self.size else b""

    def fetch_head(self) -> None:
        """The header of a weight file, whole or not at all, and where its data begins; and its version, in the words in
        which `check_unchanged` is told it, which may be others than a listing's."""
        self.versions = versions_of(asked(lambda: self.system.info(self.key), self.url))
        if self.size < 8:
            return
        prefix = asked(lambda: self.read(0, 8), self.url)
        (length,) = struct.unpack("<Q", prefix)
        if 8 + length <= self.size:
            self.origin = 8 + length
            if length <= MAX_HEAD:
                self.head = prefix + (asked(lambda: self.read(8, 8 + length), self.url) if length else b"")

    def check_unchanged(self) -> None:
        """Raises ChangedInput where the file is another one now."""
        self.system.invalidate_cache()
        try:
            now = asked(lambda: self.system.info(self.key), self.url)
        except InputError as e:
            if isinstance(e.__cause__, FileNotFoundError):
                raise ChangedInput(f"{self.url}: gone while it was in use") from e
            raise
        size, versions = size_of(now), versions_of(now)
        told = next((key for key in self.versions if key in versions), None)
        before, after = (f"{told} {found[told]}" if told else "" for found in (self.versions, versions))
        if (size, after) != (self.size, before):
            raise ChangedInput(
                f"{self.url}: changed while it was in use: {self.size} bytes, {before} when opened; now {size} bytes, "
                f"{after}. Start again with inputs that stand still"
            )


class RemoteFile:
    """An open remote weight file. As a local one: path, size, time (here the version), digest of its header."""

    def __init__(self, found: RemoteObject, path: Path) -> None:
        self.found, self.path = found, path
        self.size, self.mtime_ns, self.digest = found.size, found.version, ""
        self.metadata: Mapping[str, str] = {}
        self.origin = self.position = found.origin
        self.closed = False

    def read(self, count: int, offset: int) -> bytes:
        """Up to `count` bytes: of the header, which is there already where it is short."""
        if self.found.head and (offset == 0 or offset + count <= len(self.found.head)):
            return self.found.head[offset : offset + count]
        return self.fetch(offset, min(offset + count, self.size)) if offset < self.size else b""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises   ChangedInput for a file that is another one now, InputError where it cannot be read."""
        if self.closed:
            raise ValueError(f"{self.found.url}: the checkpoint is closed")
        BLOCKS.read_into(self, view.cast("B"), offset)

    def fetch(self, begin: int, end: int) -> bytes:
        """Bytes by one request, asked again after a failure that may pass."""
        try:
            return asked(lambda: self.found.read(begin, end), self.found.url, alive=lambda: not self.closed)
        except InputError:
            if not self.closed:
                self.found.check_unchanged()  # says so where that is the reason
            raise

    def check_unchanged(self) -> None:
        self.found.check_unchanged()

    def close(self) -> None:
        self.closed = True
        BLOCKS.drop(self)


def size_of(found: Mapping[str, Any]) -> Any:
    return found.get("size", found.get("Size"))


def versions_of(found: Mapping[str, Any]) -> dict[str, str]:
    """What a file system says of a file's version."""
    return {key: str(found[key]) for key in VERSIONS if found.get(key) not in (None, "")}
