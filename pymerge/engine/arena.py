"""The memory of a merge: one page-aligned mapping, handed out in blocks and never exceeded.

The budget is a hard limit by construction: read-ahead waits here when everything is handed out. Blocks are placed
first-fit at the lowest address, so the pages that a small merge touches stay few, and freed pages are used again
instead of being faulted in anew.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

from pymerge.errors import MergeError

PAGE = 4096
MADV_HUGEPAGE = 14


def address_of(buffer: mmap.mmap | memoryview) -> int:
    """Address of a writable buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Freed:
    """Memory that work items have freed and the C library keeps. It is handed back to the system whenever so much may
    have gathered, by one large matrix or many small ones: what some left behind must not add to what the next take."""

    limit = 64 << 20  # bytes; handing back takes milliseconds, what frees so much takes seconds

    def __init__(self) -> None:
        self.lock, self.bytes = threading.Lock(), 0

    def add(self, workspace: int) -> None:
        """An item has ended that worked in so many bytes."""
        with self.lock:
            self.bytes += workspace
            if self.bytes < self.limit:
                return
            self.bytes = 0
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if give_back is not None:
            give_back(0)


FREED = Freed()  # the C library's memory is one for all merges of a process


class Closed(MergeError):
    """The arena was closed while somebody waited for memory: the merge is being stopped."""


class Block:
    """A piece of the arena; `release` gives it back once every holder has done so."""

    def __init__(self, arena: Arena, start: int, size: int) -> None:
        self.arena, self.start, self.size = arena, start, size
        self.address = arena.address + start
        self.view = memoryview(arena.mapping)[start : start + size]
        self.holders = 1

    def hold(self, more: int) -> None:
        """Count `more` further holders."""
        with self.arena.changed:
            self.holders += more

    def lend(self, size: int) -> None:
        """The last `size` bytes stand for memory that is taken elsewhere: their pages go back to the system."""
        length = size // PAGE * PAGE
        if length:
            self.arena.mapping.madvise(mmap.MADV_DONTNEED, self.start + self.size - length, length)

    def release(self) -> None:
        with self.arena.changed:
            self.holders -= 1
            if self.holders == 0:
                self.view.release()
                self.arena.give_back(self.start, self.size)


class Arena:
    """`size` bytes of page-aligned memory in blocks. beside: an arena that is closed together with this one."""

    def __init__(self, size: int, beside: Arena | None = None) -> None:
        self.size = size // PAGE * PAGE
        self.mapping = mmap.mmap(-1, self.size)
        if hasattr(self.mapping, "madvise"):
            self.mapping.madvise(MADV_HUGEPAGE)
        self.address = address_of(self.mapping)
        self.changed = threading.Condition() if beside is None else beside.changed
        self.free: list[tuple[int, int]] = [(0, self.size)]  # (start, size), ascending, never adjacent
        self.closing = threading.Event() if beside is None else beside.closing
        self.high_water = 0  # largest end address ever handed out: what the merge really touched

    @property
    def closed(self) -> bool:
        return self.closing.is_set()

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes; waits until there is one. Raises when it can never be, or after `close`."""
        size = max(PAGE, -(-size // PAGE) * PAGE)
        if size > self.size:
            raise MergeError(f"a block of {size} bytes was asked of an arena of {self.size}: the plan is wrong")
        with self.changed:
            while True:
                if self.closed:
                    raise Closed("stopped")
                for i, (start, room) in enumerate(self.free):
                    if room >= size:
                        self.free[i : i + 1] = [(start + size, room - size)] if room > size else []
                        self.high_water = max(self.high_water, start + size)
                        return Block(self, start, size)
                self.changed.wait()

    def give_back(self, start: int, size: int) -> None:
        """Called by Block.release with the lock held."""
        i = next((i for i, (s, _) in enumerate(self.free) if s > start), len(self.free))
        self.free.insert(i, (start, size))
        for j in (i, i - 1):  # merge with the block after, then with the block before
            if 0 <= j < len(self.free) - 1 and sum(self.free[j]) == self.free[j + 1][0]:
                self.free[j : j + 2] = [(self.free[j][0], self.free[j][1] + self.free[j + 1][1])]
        self.changed.notify_all()

    def close(self) -> None:
        """Wake everybody who waits for memory: no more of it will come."""
        with self.changed:
            self.closing.set()
            self.changed.notify_all()

    def discard(self) -> None:
        """Give the pages back to the system now, not when the last view of them is collected."""
        self.mapping.madvise(mmap.MADV_DONTNEED)
