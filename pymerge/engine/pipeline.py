"""Read, compute, write at the same time: the caller reads, worker threads compute, one thread writes.

The native kernels release the GIL, so threads are enough. Memory is bounded by the arena: the caller waits in
`Arena.take` when the others cannot follow. The first error stops everything and is raised in the caller.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pymerge.engine.arena import Arena, Block


@dataclass(frozen=True)
class Segment:
    """Finished bytes of one output tensor: `view` belongs at byte `start` of it. facts: what the summary shall say."""

    name: str
    start: int
    view: memoryview
    crc: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """Segments in one block; the block is released when they are written."""

    block: Block
    segments: Sequence[Segment]


Compute = Callable[[], "Output | None"]
Write = Callable[[Segment], None]


class Pipeline:
    """`threads` workers and one writer. Use as a context manager; `drain` before leaving.

    At most `ahead` pieces of work wait or run when another is submitted: reading further ahead would only touch more
    memory, and the first touch of a page costs as much as reading it."""

    def __init__(self, arena: Arena, threads: int, write: Write) -> None:
        self.arena, self.write = arena, write
        self.ahead = 2 * threads + 2
        self.changed = threading.Condition()
        self.ready: deque[Compute] = deque()
        self.finished: deque[Output] = deque()
        self.pending = 0  # submitted and not yet written
        self.error: BaseException | None = None
        self.closing = False
        targets = [self.compute_loop] * threads + [self.write_loop]
        self.threads = [threading.Thread(target=target, daemon=True) for target in targets]

    def __enter__(self) -> Pipeline:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self.changed:
            self.closing = True
            self.ready.clear()
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def submit(self, compute: Compute, *, first: bool = False) -> None:
        """Queue work; `first` puts it before everything that waits (the rest of a tensor that is in memory)."""
        self.raise_error()
        with self.changed:
            if first:
                self.ready.appendleft(compute)
            else:
                self.changed.wait_for(lambda: self.pending < self.ahead or self.error is not None)
                self.ready.append(compute)
            self.pending += 1
            self.changed.notify_all()

    def finish(self, output: Output) -> None:
        """Queue for the writer what a worker has finished beside what its work returns."""
        with self.changed:
            self.pending += 1
            self.finished.append(output)
            self.changed.notify_all()

    def drain(self) -> None:
        """Wait until everything submitted is written."""
        with self.changed:
            self.changed.wait_for(lambda: self.pending == 0 or self.error is not None)
        self.raise_error()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def fail(self, error: BaseException) -> None:
        with self.changed:
            if self.error is None:
                self.error = error
            self.changed.notify_all()
        self.arena.close()

    def compute_loop(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.ready or self.closing or self.error is not None)
                if self.error is not None or (self.closing and not self.ready):
                    return
                compute = self.ready.popleft()
            try:
                output = compute()
            except BaseException as error:
                self.fail(error)
                return
            with self.changed:
                if output is None:
                    self.pending -= 1
                else:
                    self.finished.append(output)
                self.changed.notify_all()

    def write_loop(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.finished or self.closing or self.error is not None)
                if self.error is not None or (self.closing and not self.finished):
                    return
                output = self.finished.popleft()
            try:
                for segment in output.segments:
                    self.write(segment)
                output.block.release()
            except BaseException as error:
                self.fail(error)
                return
            with self.changed:
                self.pending -= 1
                self.changed.notify_all()
