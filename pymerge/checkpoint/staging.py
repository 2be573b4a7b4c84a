"""The staging folder OUT.partial/: who owns it, and what of an interrupted merge in it can be kept."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from pymerge.checkpoint.header import name_list, safe_name
from pymerge.checkpoint.journal import JOURNAL, Journal, Segment, differences, read_journal, rewrite_journal
from pymerge.checkpoint.layout import Layout, Shard
from pymerge.checkpoint.place import sync_folder, sync_folders
from pymerge.checkpoint.shard_file import ShardFile
from pymerge.errors import OutputError

OWNER = ".owner"
_NO_FOLDER_LOCK = (errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def lock_staging(staging: Path, layout: Layout) -> int:
    """Make the staging folder exist and own it; returns the descriptor that holds the lock (the kernel drops it with
    the process).

    Raises   OutputError if another process holds it, or if the folder is not one of ours; OSError."""
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(staging, layout)
        try:
            fd, locked = _flock(staging, os.O_RDONLY | os.O_DIRECTORY), staging
        except OSError as e:
            if e.errno not in _NO_FOLDER_LOCK:
                raise
            locked = staging / OWNER  # network file systems lock files only
            fd = _flock(locked, os.O_RDWR | os.O_CREAT)
        if _is_same(fd, locked):
            (staging / OWNER).write_text(f"pymerge, process {os.getpid()} on {socket.gethostname()}\n")
            return fd
        os.close(fd)  # another process finished and renamed the folder between our steps


def resume_staging(
    staging: Path, layout: Layout, identity: dict[str, Any]
) -> tuple[list[ShardFile], Journal, list[Segment]] | None:
    """Continue an interrupted merge: its shards, its journal, and the segments that were read back and are right.

    Returns  None where there is nothing to continue.
    Raises   OutputError if the staging folder belongs to another merge; says in what they differ."""
    found, segments = read_journal(staging / JOURNAL)
    if found is None:
        return None
    if found != identity:
        changes = differences(found, identity)
        more = f"; and {len(changes) - 10} more" if len(changes) > 10 else ""
        raise OutputError(
            f"{staging}: holds an interrupted merge that is not this one: {'; '.join(changes[:10])}{more}. "
            "Repeat that merge to finish it, or start anew (no resume), or delete the folder"
        )
    keep = {JOURNAL, OWNER, *(shard.file for shard in layout.shards)}
    _clear(staging, keep)
    shards: list[ShardFile] = []
    intact: list[bool] = []
    try:
        for shard in layout.shards:
            file, whole = _reopen(staging, shard)
            shards.append(file)
            intact.append(whole)
        verified = [s for s in segments if _is_right(s, layout, shards, intact)]
        rewrite_journal(staging / JOURNAL, identity, verified)
        sync_folders(staging)
        return shards, Journal(staging / JOURNAL), verified
    except BaseException:
        for file in shards:
            file.close()
        raise


def start_staging(staging: Path, layout: Layout, identity: dict[str, Any]) -> tuple[list[ShardFile], Journal]:
    """Empty the staging folder, allocate all shards, write their headers, begin the journal.

    Raises   OutputError if the disk is plainly too small; OSError."""
    _clear(staging, {OWNER})
    require_space(staging, layout.disk_size, f"{staging.parent}: the output")
    shards: list[ShardFile] = []
    try:
        for shard in layout.shards:
            shards.append(ShardFile(staging, shard, create=True))
        for file in shards:
            file.sync()
        journal = Journal(staging / JOURNAL, create_for=identity)
    except BaseException:
        for file in shards:
            file.close()
        raise
    sync_folders(staging)
    sync_folder(staging.parent)
    return shards, journal


def _reopen(staging: Path, shard: Shard) -> tuple[ShardFile, bool]:
    """A shard of an interrupted merge; made anew (False) where it is not as it was allocated."""
    try:
        file = ShardFile(staging, shard, create=False)
        if file.matches(shard):
            return file, True
        file.close()
        (staging / shard.file).unlink()
    except FileNotFoundError:
        pass
    file = ShardFile(staging, shard, create=True)
    file.sync()
    return file, False


def _is_right(segment: Segment, layout: Layout, shards: list[ShardFile], intact: list[bool]) -> bool:
    slot = layout.slots.get(segment.name)
    if slot is None or not intact[slot.shard] or segment.start < 0 or segment.start + segment.nbytes > slot.nbytes:
        return False
    return shards[slot.shard].checksum(slot.offset + segment.start, segment.nbytes) == segment.crc


def _refuse_foreign(staging: Path, layout: Layout) -> None:
    """Never delete or fill a folder that only happens to be called OUT.partial."""
    names = os.listdir(staging)
    if not names or OWNER in names or JOURNAL in names:
        return
    first = layout.shards[0]
    try:  # killed between the last clean-up and the rename: all planned files, no journal any more
        with open(staging / first.file, "rb") as f:
            if f.read(len(first.header)) == first.header:
                return
    except OSError:
        pass
    raise OutputError(
        f"{staging}: is needed as staging folder, but holds files that are not of a merge: {name_list(sorted(names))}. "
        "Move it away, or choose another output"
    )


def _flock(path: Path, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise OutputError(
            f"{path.parent if path.name == OWNER else path}: {_owner(path)} is writing there now. Wait for it, or "
            "choose another output"
        ) from None
    except OSError:
        os.close(fd)
        raise
    return fd


def _owner(path: Path) -> str:
    file = path if path.name == OWNER else path / OWNER
    try:
        return safe_name(file.read_text(errors="replace").strip()) or "another process"
    except OSError:
        return "another process"


def _is_same(fd: int, path: Path) -> bool:
    try:
        now = os.stat(path)
    except OSError:
        return False
    held = os.fstat(fd)
    return (now.st_dev, now.st_ino) == (held.st_dev, held.st_ino)


def _clear(folder: Path, keep: set[str], below: str = "") -> None:
    """Delete all but the files `keep`, paths below the staging folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = below + entry.name
            if path in keep:
                continue
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            elif any(kept.startswith(f"{path}/") for kept in keep):
                _clear(Path(entry.path), keep, f"{path}/")
            else:
                shutil.rmtree(entry.path)


def require_space(folder: Path, needed: int, what: str) -> None:
    """OutputError where the disk of a folder has fewer bytes free."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        raise OutputError(f"{what} takes {needed} bytes, the disk has {free} bytes free")
