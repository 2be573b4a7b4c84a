"""What is seen of long work: a bar for a person at a terminal, lines of JSON for a machine, nothing in pipes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pymerge.engine.process import resident_memory

Shown = bool | Literal["json"] | None  # None: a bar where standard error is a terminal
EVERY = 0.5  # seconds between two lines of JSON, and between two looks at the memory


class NoProgress:
    """Counts and shows nothing.

    total  bytes that will be read; None: not known
    count  tensors that will be read; 0: not known"""

    def __init__(self, total: int | None = None, count: int = 0) -> None:
        self.total, self.count = total, count
        self.read = 0
        self.names: set[str] = set()

    def advance(self, read: int, name: str) -> None:
        """So many more bytes were read, of this tensor."""
        self.read += read
        self.names.add(name)

    @property
    def tensors(self) -> str:
        return f"{len(self.names)}/{self.count}" if self.count else f"{len(self.names)}"

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Bar(NoProgress):
    """A rich progress bar on standard error: bytes, GB/s, time left, tensors, memory, the current tensor."""

    def __init__(self, total: int | None = None, count: int = 0) -> None:
        super().__init__(total, count)
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.table import Column

        one = Column(no_wrap=True)
        rest = Column(no_wrap=True, ratio=1, overflow="ellipsis")
        columns = (
            BarColumn(bar_width=10, table_column=one),
            DownloadColumn(table_column=one),
            TransferSpeedColumn(table_column=one),
            TimeRemainingColumn(compact=True, table_column=one),
            TextColumn("{task.fields[tensors]} tensors, {task.fields[memory]:.1f} GB memory", table_column=one),
            TextColumn("{task.description}", table_column=rest),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, expand=True)
        self.looked = time.monotonic()
        self.task = self.bar.add_task("", total=total, tensors=self.tensors, memory=resident_memory() / 1e9)

    def advance(self, read: int, name: str) -> None:
        from rich.markup import escape

        super().advance(read, name)
        shown = escape(name[-60:].encode("ascii", "replace").decode())
        self.bar.update(self.task, advance=read, description=shown, tensors=self.tensors)
        if time.monotonic() - self.looked > EVERY:
            self.looked = time.monotonic()
            self.bar.update(self.task, memory=resident_memory() / 1e9)

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


class Lines(NoProgress):
    """An object of JSON a line on standard output, twice a second, and at the end of the work."""

    def __init__(self, total: int | None = None, count: int = 0) -> None:
        super().__init__(total, count)
        self.started = self.said = time.monotonic()

    def advance(self, read: int, name: str) -> None:
        super().advance(read, name)
        if time.monotonic() - self.said >= EVERY:
            self.say(name)

    def say(self, name: str | None = None) -> None:
        self.said = time.monotonic()
        rate = self.read / max(self.said - self.started, 1e-9)
        left = (self.total - self.read) / rate if self.total is not None and rate else None
        print_event(
            "progress",
            bytes_read=self.read,
            bytes_to_read=self.total,
            bytes_per_second=round(rate),
            seconds_left=None if left is None else round(max(0.0, left), 1),
            tensors=len(self.names),
            tensors_to_read=self.count or None,
            tensor=name,
            resident_bytes=resident_memory(),
        )

    def __exit__(self, *exc: object) -> None:
        self.say()


def print_event(event: str, **fields: Any) -> None:
    """One line of JSON on standard output."""
    print(json.dumps({"event": event} | fields), flush=True)


def make_progress(total: int | None, wanted: Shown, count: int = 0) -> NoProgress:
    """What shows `total` bytes of `count` tensors: as wanted, or, where nobody said, a bar if a person is looking."""
    if wanted == "json":
        return Lines(total, count)
    return Bar(total, count) if seen(wanted) else NoProgress(total, count)


def seen(wanted: Shown) -> bool:
    """Whether there is a person who sees what is drawn on standard error."""
    return sys.stderr.isatty() if wanted is None else wanted is True


@contextmanager
def status_shown(wanted: Shown, first: str) -> Iterator[Callable[[str], None] | None]:
    """A line on standard error that says how far work without a known end is, at first `first`; it is called with what
    to say. None where nobody is looking."""
    if not seen(wanted):
        yield None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(first)) as status:
        yield lambda text: status.update(escape(text))
