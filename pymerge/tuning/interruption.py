"""Runs that end in one line when they are stopped, also while the user's evaluation runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pymerge.errors import Interrupted


@contextmanager
def interruptible(kept: Callable[[], str]) -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, which says what is kept. Merges inside have handlers of their own.

    Python calls handlers in the main thread alone: elsewhere SIGTERM does what it did."""
    found = signal.SIGINT

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal found
        found = signal.SIGTERM
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {kept()}: the same command continues", found) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
