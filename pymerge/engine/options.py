"""How a merge is run, as the user asks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from pymerge.engine.devices import HOST
from pymerge.engine.process import available_memory
from pymerge.engine.progress import Shown


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a merge is run: nothing here changes a byte of the result on one device."""

    memory: int | None = None  # bytes on top of what the process holds; None: a quarter of what is free, at most 8 GB
    threads: int | None = None  # compute threads; None: the processors this process may use
    device: str = HOST  # cpu; cuda, cuda:1; several with commas; auto
    device_memory: int | None = None  # bytes of each device; None: a share of what is free there
    shard_bytes: int = 5_000_000_000
    overwrite: bool = False
    resume: bool = True
    allow_pickle: bool = False
    prefer: Literal["single", "sharded"] | None = None
    progress: Shown = None  # a bar; None: where standard error is a terminal; "json": lines on standard output

    @property
    def memory_bytes(self) -> int:
        return self.memory if self.memory is not None else min(available_memory() // 4, 8_000_000_000)

    @property
    def thread_count(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))
