"""One output file: allocated at its full size at once, then written at any offset by any thread."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from pymerge import _C
from pymerge.checkpoint.layout import ALIGNMENT, Shard

MIN_DIRECT = 256 * 1024  # below this, direct I/O costs more than the page cache
_READ_BLOCK = 8 * 1024 * 1024
_NO_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class ShardFile:
    """An open shard. All methods raise OSError; `write` may be called by several threads for disjoint ranges."""

    def __init__(self, folder: Path, shard: Shard, *, create: bool) -> None:
        self.path = folder / shard.file
        self._direct_fd = -1
        self._direct_allowed = hasattr(os, "O_DIRECT")
        if not create:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _allocate(self._fd, shard.size)
            write_all(self._fd, memoryview(shard.header), 0)
        except BaseException:
            self.close()
            raise

    def matches(self, shard: Shard) -> bool:
        """The file has the planned size and header."""
        return os.fstat(self._fd).st_size == shard.size and os.pread(self._fd, len(shard.header), 0) == shard.header

    def write(self, view: memoryview, offset: int) -> None:
        """Write bytes at `offset`. Whole blocks bypass the page cache where view and offset are aligned alike; the
        ends never do."""
        end = offset + view.nbytes
        low, high = -(-offset // ALIGNMENT) * ALIGNMENT, end // ALIGNMENT * ALIGNMENT
        if high - low < MIN_DIRECT or not self._direct_allowed or not _aligned(view, offset):
            return write_all(self._fd, view, offset)
        write_all(self._fd, view[: low - offset], offset)
        done = self._write_direct(view[low - offset : high - offset], low)
        write_all(self._fd, view[low - offset + done :], low + done)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with what was written from `offset` on."""
        read_all(self._fd, view, offset, self.path)

    def checksum(self, offset: int, nbytes: int) -> int:
        """CRC-32C of the bytes that are in the file now."""
        block = memoryview(bytearray(min(nbytes, _READ_BLOCK)))
        crc = 0
        while nbytes > 0:
            got = os.preadv(self._fd, [block[: min(nbytes, _READ_BLOCK)]], offset)
            if got == 0:
                break  # shorter than planned: the checksum will not agree
            crc = _C.crc32c(block[:got], crc)
            offset, nbytes = offset + got, nbytes - got
        return crc

    def sync_data(self) -> None:
        os.fdatasync(self._fd)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1

    def _write_direct(self, view: memoryview, offset: int) -> int:
        """Direct I/O as far as the file system takes it; returns how many bytes that was (a multiple of the block
        size)."""
        done = 0
        try:
            if self._direct_fd < 0:
                self._direct_fd = self._open_direct()
            while done < view.nbytes:
                wrote = os.pwrite(self._direct_fd, view[done:], offset + done)
                if wrote % ALIGNMENT:
                    return done  # the rest, this piece again included, goes through the page cache
                done += wrote
        except OSError as e:
            if e.errno not in _NO_DIRECT:
                raise
            self._direct_allowed = False
        return done

    def _open_direct(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)


def _aligned(view: memoryview, offset: int) -> bool:
    if view.readonly:  # only writable buffers tell their address; the engine's pools are
        return False
    return (ctypes.addressof(ctypes.c_char.from_buffer(view)) - offset) % ALIGNMENT == 0


def _allocate(fd: int, size: int) -> None:
    """Reserve the blocks now: a full disk shows here, not after hours."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(fd, size)  # a file system that cannot reserve


def write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:], offset + done)


def read_all(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """path: of the file, or where it is, for the error"""
    done = 0
    while done < view.nbytes:
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise OSError(errno.EIO, "the file is shorter than it was made", str(path))
        done += got
