"""Read, compute, write at the same time: the caller reads, worker threads compute, one thread writes.

The native kernels release the GIL, so threads are enough. Memory is bounded by the arena: the caller waits in
`Arena.take` when the others cannot follow. The first error stops everything and is raised in the caller.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pymerge.engine.arena import Arena, Block
from pymerge.engine.devices import HOST, IN_FLIGHT


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


Compute = Callable[[], "Output | Compute | None"]  # what it returns may be what is left to do on the CPU
Write = Callable[[Segment], None]


class Pipeline:
    """`threads` workers on the CPU, one for each other device, and one writer. Use as a context manager; `drain` before
    leaving.

    At most `ahead` pieces of work wait or run when another is submitted: reading further ahead would only touch more
    memory, and the first touch of a page costs as much as reading it."""

    def __init__(self, arena: Arena, threads: int, write: Write, devices: Sequence[str] = ()) -> None:
        self.arena, self.write = arena, write
        self.ahead = 2 * threads + IN_FLIGHT * len(devices) + 2
        self.changed = threading.Condition()
        self.ready: dict[str, deque[Compute]] = {where: deque() for where in (HOST, *devices)}
        self.finished: deque[Output] = deque()
        self.pending = 0  # submitted and not yet written
        self.error: BaseException | None = None
        self.closing = False
        self.busy = {"read": 0.0, "compute": 0.0, "write": 0.0}  # seconds, of all threads together
        workers = [partial(self.compute_loop, self.ready[where]) for where in (*[HOST] * threads, *devices)]
        self.threads = [threading.Thread(target=target, daemon=True) for target in (*workers, self.write_loop)]

    @property
    def busy_seconds(self) -> dict[str, float] | None:
        """Seconds by stage; None where nothing was done here, but by other machines."""
        return self.busy if any(self.busy.values()) else None

    def __enter__(self) -> Pipeline:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self.changed:
            self.closing = True
            for queue in self.ready.values():
                queue.clear()
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def submit(self, compute: Compute, *, first: bool = False, device: str = HOST) -> None:
        """Queue work; `first` puts it before everything that waits (the rest of a tensor that is in memory)."""
        self.raise_error()
        with self.changed:
            if first:
                self.ready[device].appendleft(compute)
            else:
                self.changed.wait_for(lambda: self.pending < self.ahead or self.error is not None)
                self.ready[device].append(compute)
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

    def compute_loop(self, ready: deque[Compute]) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: ready or self.closing or self.error is not None)
                if self.error is not None or (self.closing and not ready):
                    return
                compute = ready.popleft()
            started = time.perf_counter()
            try:
                output = compute()
            except BaseException as error:
                self.fail(error)
                return
            with self.changed:
                self.busy["compute"] += time.perf_counter() - started
                if output is None:
                    self.pending -= 1
                elif callable(output):
                    self.ready[HOST].appendleft(output)
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
            started = time.perf_counter()
            try:
                for segment in output.segments:
                    self.write(segment)
                output.block.release()
            except BaseException as error:
                self.fail(error)
                return
            with self.changed:
                self.busy["write"] += time.perf_counter() - started
                self.pending -= 1
                self.changed.notify_all()
