"""The output of a merge while it is being written: all or nothing, in any order, resumable.

Everything is staged in OUT.partial/ beside OUT (no config and no index in it, so no loader takes it for a model) and
becomes OUT by one rename when all of it is on disk. The journal in the staging folder says which segments of which
tensors are there already.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pymerge import _C
from pymerge.checkpoint import place
from pymerge.checkpoint.header import name_list, safe_name
from pymerge.checkpoint.index import write_index
from pymerge.checkpoint.journal import JOURNAL, Journal, Segment, normal_form
from pymerge.checkpoint.layout import Layout
from pymerge.checkpoint.read import Checkpoint
from pymerge.checkpoint.shard_file import ShardFile
from pymerge.checkpoint.staging import OWNER, lock_staging, resume_staging, start_staging
from pymerge.errors import OutputError

FLUSH_BYTES = 512 * 1024 * 1024
FLUSH_SECONDS = 2.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StagedOutput:
    """A model being written to `out_path`; nothing is at `out_path` until `commit`.

    layout     where each tensor goes (plan_layout)
    identity   what must be equal for a merge to be continued: recipe, version, fingerprints of the inputs (JSON values)
    overwrite  replace a model that is at `out_path`, once the new one is complete
    resume     continue what an interrupted merge with the same identity left; False starts anew
    inputs     checkpoints or paths that the output must not be, contain or lie in
    Raises     OutputError: something is there already, another process writes there, the disk is too small, another
               merge left its staging folder. As a context manager it keeps the staging folder after an error, to be
               continued, unless the disk is full."""

    def __init__(
        self,
        out_path: str | os.PathLike[str],
        layout: Layout,
        identity: dict[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = True,
        inputs: Iterable[Checkpoint | str | os.PathLike[str]] = (),
    ) -> None:
        self.path = place.check_output_path(out_path, inputs, overwrite=overwrite)
        self.staging = place.staging_of(self.path)
        self.layout = layout
        self.identity = normal_form({**identity, "layout": layout.digest()})
        self._overwrite = overwrite
        self._mutex, self._flushing = threading.Lock(), threading.Lock()
        self._pending: list[Segment] = []
        self._unsynced, self._last_flush = 0, time.monotonic()
        self._segments: dict[str, dict[int, Segment]] = {}
        self._shards: list[ShardFile] = []
        self._journal: Journal | None = None
        self._disk_full = False
        self._lock_fd = -1
        try:
            self._lock_fd = lock_staging(self.staging, layout)
            place.check_free(self.path, overwrite)  # again, now that nobody else can be committing
            self._open(resume)
        except OSError as e:
            self._give_up()
            self._fail(e, "the output cannot be prepared")
        except BaseException:
            self._give_up()
            raise

    @property
    def done(self) -> dict[str, list[tuple[int, int, int]]]:
        """What is written, per tensor: (start, nbytes, crc), ascending. After a resume: what was read back and is
        right."""
        with self._mutex:
            found = {name: [by_start[at] for at in sorted(by_start)] for name, by_start in self._segments.items()}
        return {name: [(s.start, s.nbytes, s.crc) for s in segments] for name, segments in found.items()}

    def write(self, name: str, start: int, view: memoryview, crc: int, facts: Mapping[str, Any] | None = None) -> None:
        """Write bytes start .. start + len(view) of a tensor. Any thread, any order, no overlaps.

        Whole blocks go by direct I/O where (address of view - (offset of the tensor in its file + start)) % 4096 == 0.

        crc    CRC-32C of the bytes; the journal vouches for them with it
        facts  what is to be known of the tensor when all is written (JSON values); see `facts`"""
        slot = self.layout.slots[name]
        if start < 0 or start + view.nbytes > slot.nbytes:
            raise ValueError(f"{name}: bytes {start}..{start + view.nbytes} written, the tensor has {slot.nbytes}")
        try:
            self._shards[slot.shard].write(view.cast("B"), slot.offset + start)
        except OSError as e:
            self._fail(e, f"writing {safe_name(name)} to {self.layout.shards[slot.shard].file} failed")
        with self._mutex:
            segment = Segment(name, start, view.nbytes, crc, facts or {})
            self._segments.setdefault(name, {})[start] = segment
            self._pending.append(segment)
            self._unsynced += view.nbytes
            due = self._unsynced >= FLUSH_BYTES or time.monotonic() - self._last_flush >= FLUSH_SECONDS
        if due and self._flushing.acquire(blocking=False):
            try:
                self._flush()
            finally:
                self._flushing.release()

    def adopt(self, segments: Sequence[Segment]) -> None:
        """Vouch for segments that another process has put on disk (SharedOutput)."""
        with self._mutex:
            for segment in segments:
                self._segments.setdefault(segment.name, {})[segment.start] = segment
        with self._flushing:
            try:
                if segments and self._journal is not None:
                    self._journal.append(list(segments))
            except OSError as e:
                self._fail(e, "the journal cannot be written")

    def read_into(self, name: str, view: memoryview) -> None:
        """Fill `view` with a tensor that has been written."""
        slot = self.layout.slots[name]
        try:
            self._shards[slot.shard].read_into(view, slot.offset)
        except OSError as e:
            self._fail(e, f"reading {safe_name(name)} back from {self.layout.shards[slot.shard].file} failed")

    def forget(self, name: str) -> None:
        """Drop what an earlier run wrote of a tensor: it will be written anew, in other segments."""
        with self._mutex:
            self._segments.pop(name, None)

    def flush(self) -> None:
        """Put what has been written on disk, then into the journal."""
        with self._flushing:
            self._flush()

    def commit(self, write_side_files: Callable[[Path], None]) -> None:
        """Finish: all bytes on disk, side files and index beside them, then the one rename that makes the model appear.

        write_side_files   gets the staging folder: config, tokenizer, model card, summary
        Raises             ValueError if a tensor is not complete (the caller's fault); OutputError."""
        self.flush()
        self._require_complete()
        try:
            for shard in self._shards:
                shard.sync()
            write_side_files(self.staging)
            write_index(self.staging, self.layout)
            place.sync_tree(self.staging)
            place.check_free(self.path, self._overwrite)
            self._close_files()
            (self.staging / OWNER).unlink()
            (self.staging / JOURNAL).unlink()
            place.replace_folder(self.staging, self.path)
        except OSError as e:
            self._fail(e, "the finished output cannot be put in place")
        self._release()

    def abort(self, *, keep: bool) -> None:
        """Stop. keep: leave the staging folder, so that the same merge can be continued; otherwise delete it."""
        if self._lock_fd < 0:
            return
        if keep and self._journal is not None:
            with contextlib.suppress(OutputError):  # what the journal does not vouch for is done again
                self.flush()
        self._close_files()
        if not keep:
            shutil.rmtree(self.staging, ignore_errors=True)
        self._release()

    def checksums(self) -> dict[str, int]:
        """CRC-32C of each tensor, from those of its segments."""
        result = {}
        for name, segments in self.done.items():
            crc = 0
            for _, nbytes, part in segments:
                crc = _C.crc32c_combine(crc, part, nbytes)
            result[name] = crc
        return result

    def facts(self) -> dict[str, dict[str, Any]]:
        """What was handed to `write` of each tensor, by an interrupted run too."""
        with self._mutex:
            segments = [(name, by_start[at]) for name, by_start in self._segments.items() for at in sorted(by_start)]
        found: dict[str, dict[str, Any]] = {}
        for name, segment in segments:
            if segment.facts:
                found.setdefault(name, {}).update(segment.facts)
        return found

    def __enter__(self) -> StagedOutput:
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort(keep=not self._disk_full)

    def _open(self, resume: bool) -> None:
        found = resume_staging(self.staging, self.layout, self.identity) if resume else None
        if found is not None:
            self._shards, self._journal, segments = found
            for segment in segments:
                self._segments.setdefault(segment.name, {})[segment.start] = segment
        else:
            self._shards, self._journal = start_staging(self.staging, self.layout, self.identity)

    def _give_up(self) -> None:
        """Preparing failed: leave no staging folder behind, unless an interrupted merge lies in it."""
        if self._lock_fd >= 0:
            self.abort(keep=(self.staging / JOURNAL).exists())

    def _flush(self) -> None:
        with self._mutex:
            pending, self._pending = self._pending, []
            self._unsynced = 0
        if pending and self._journal is not None:
            try:
                for shard in sorted({self.layout.slots[s.name].shard for s in pending}):
                    self._shards[shard].sync_data()
                self._journal.append(pending)
            except OSError as e:
                self._fail(e, "the output cannot be put on disk")
        self._last_flush = time.monotonic()

    def _require_complete(self) -> None:
        done = self.done
        missing = [n for n, slot in self.layout.slots.items() if not _covers(done.get(n, []), slot.nbytes)]
        if missing:
            raise ValueError(f"commit of an incomplete output; {len(missing)} tensors lack bytes: {name_list(missing)}")

    def _close_files(self) -> None:
        for shard in self._shards:
            shard.close()
        if self._journal is not None:
            self._journal.close()
        self._shards, self._journal = [], None

    def _release(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _fail(self, e: OSError, what: str) -> NoReturn:
        self._disk_full |= e.errno in _FULL
        raise write_error(e, self.path, what, self.layout) from e


def write_error(e: OSError, path: Path, what: str, layout: Layout) -> OutputError:
    """What is said when an output at `path` cannot be written."""
    if e.errno in _FULL:
        return OutputError(
            f"{path}: {what}: the disk is full or the file too large for it ({e.strerror}); "
            f"the output takes {layout.disk_size} bytes"
        )
    return OutputError(f"{path}: {what}: {e.strerror or e}")


def _covers(segments: list[tuple[int, int, int]], nbytes: int) -> bool:
    reached = 0
    for start, count, _ in segments:
        if start != reached:
            return False
        reached += count
    return reached == nbytes
