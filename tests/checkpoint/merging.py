"""A small merge at the level of StagedOutput, as a program: python -m tests.checkpoint.merging OUT [OPTIONS as JSON].

Options: seed (of the values), kill_at (SIGKILL before the n-th system call that changes the disk), slow (seconds per
tensor), overwrite. Prints the number of such calls. Imports no torch.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pymerge import _C
from pymerge.checkpoint import Layout, StagedOutput, plan_layout

TILE = 3 * 1024 * 1024 // 8
CHANGING = "open write pwrite fsync fdatasync posix_fallocate mkdir rename replace unlink rmdir close".split()


def layout() -> Layout:
    sizes = [5, 0, 4096, 700_000, 123_457, 1_048_576, 3, 300_001]
    return plan_layout([(f"layer.{i}.weight", "U8", (n,)) for i, n in enumerate(sizes)], 1_000_000)


def value(name: str, nbytes: int, seed: int) -> bytes:
    return random.Random(f"{seed} {name}").randbytes(nbytes)


def run(out: Path, options: dict[str, Any]) -> None:
    seed, plan = options.get("seed", 0), layout()
    pool = memoryview(mmap.mmap(-1, 2 * TILE))
    output = StagedOutput(out, plan, {"seed": seed}, overwrite=options.get("overwrite", False))
    with output:
        done = output.done
        for name, slot in plan.slots.items():
            whole, there = value(name, slot.nbytes, seed), {start for start, _, _ in done.get(name, [])}
            for start in range(0, slot.nbytes, TILE):
                if start in there:
                    continue
                shift = (slot.offset + start) % 4096
                view = pool[shift : shift + min(TILE, slot.nbytes - start)]
                view[:] = whole[start : start + view.nbytes]
                output.write(name, start, view, _C.crc32c(view))
            output.flush()
            time.sleep(options.get("slow", 0))
        output.commit(lambda folder: side_files(folder, seed))


def side_files(folder: Path, seed: int) -> None:
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")


def count_calls(kill_at: int) -> list[int]:
    """Wrap every function of `os` that changes the disk; die before call number `kill_at`."""
    calls = [0]

    def wrapped(name: str) -> Any:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for name in CHANGING:
        setattr(os, name, wrapped(name))
    exchange = _C.rename_exchange

    def counted_exchange(a: str, b: str) -> bool:
        calls[0] += 1
        if calls[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return exchange(a, b)

    _C.rename_exchange = counted_exchange
    return calls


if __name__ == "__main__":
    arguments = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    counter = count_calls(arguments.get("kill_at", 0))
    run(Path(sys.argv[1]), arguments)
    print(counter[0])
