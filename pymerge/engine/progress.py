"""The progress bar of a merge: bytes read, rate, time left, current tensor. Silent in pipes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class NoProgress:
    """Counts and shows nothing."""

    def __init__(self) -> None:
        self.read = 0

    def advance(self, read: int, name: str) -> None:
        self.read += read

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Bar(NoProgress):
    """A rich progress bar on standard error."""

    def __init__(self, total: int) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("", total=total)

    def advance(self, read: int, name: str) -> None:
        from rich.markup import escape

        super().advance(read, name)
        self.bar.update(self.task, advance=read, description=escape(name[:60].encode("ascii", "replace").decode()))

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()


def make_progress(total: int, wanted: bool | None) -> NoProgress:
    """A bar where it is wanted, or where nobody said and a person is looking."""
    show = sys.stderr.isatty() if wanted is None else wanted
    return Bar(total) if show else NoProgress()


@contextmanager
def sweeps_shown(wanted: bool | None) -> Iterator[Callable[[int, float], None] | None]:
    """A line on standard error that says how far a search for permutations is: called with the number of sweeps done
    and their similarity. None where nobody is looking."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("activations and first matches") as status:
        yield lambda sweep, similarity: status.update(f"sweep {sweep}: similarity {similarity:.4f}")
