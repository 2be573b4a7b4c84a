"""Measures the rates of this machine, in some seconds: medians of short runs, in seconds of the processor where other
programs may run beside."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pymerge import _C
from pymerge.engine.rates import Rates
from pymerge.engine.survey import HeldSurvey, Tile
from pymerge.methods.work import eigen
from pymerge.ops.delta_rule import DeltaRule, mask_key, resolve
from pymerge.ops.native import delta_params

ENTRIES, FEW, TASKS = 1 << 22, 1 << 18, 4  # a tile of a merge: more than caches hold
SIDE, SMALL_SIDE = 1024, 512  # of matrices
FILE_BYTES, BUFFER, BLOCK = 256 << 20, 64 << 20, 8 << 20
ROUNDS, STARTS = 5, 3
LARGE_SIDE, WRITTEN = 8192, 1 << 20  # of the matrix of a larger merge; bytes written at once
LINEAR, TORCH = {"merge_method": "linear", "parameters": {"weight": 1}}, {"merge_method": "tsv_m"}


def typical(run: Callable[[], object], rounds: int = ROUNDS, clock: Callable[[], float] = time.thread_time) -> float:
    """Seconds of a run, the median of some: what other programs leave of caches and memory is part of the machine."""
    seconds = []
    for _ in range(rounds):
        began = clock()
        run()
        seconds.append(clock() - began)
    return statistics.median(seconds)


def crowded(run: Callable[[], object]) -> float:
    """As `typical`, while every other processor does the same, as in a merge: clock, caches and memory are shared.
    For numerics of one thread."""
    from pymerge.engine.generic import use_threads

    done = threading.Event()

    def again() -> None:
        use_threads(1)
        while not done.is_set():
            run()

    others = [threading.Thread(target=again, daemon=True) for _ in range(len(os.sched_getaffinity(0)) - 1)]
    for thread in others:
        thread.start()
    try:
        return typical(run)
    finally:
        done.set()
        for thread in others:
            thread.join()


def calibrate(folder: Path | None = None) -> Rates:
    """Measured rates of this machine. folder: on the disk that is measured; None: the current one."""
    import torch

    from pymerge.engine.generic import threads_of_numerics

    with threads_of_numerics(1), torch.no_grad():
        found: dict[str, Any] = {"kernels": kernel_seconds(), **matrix_rates()}
    found["memory"] = memory_rate()
    found |= disk_rates(folder or Path.cwd()) | merge_rates(found["kernels"])
    return dataclasses.replace(Rates(), **found, sources=dict.fromkeys(found, "measured"))


def kernel_seconds() -> dict[str, float]:
    """By kind: see rates.KERNELS. Each from a rule that differs from a plain sum in that alone."""
    import torch

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(ENTRIES, generator=generator).mul_(0.02)
    tuned = [(base + 0.001 * torch.randn(ENTRIES, generator=generator)).bfloat16() for _ in range(TASKS)]
    head, out = base.bfloat16(), torch.empty(ENTRIES, dtype=torch.bfloat16)
    place, buffers = (head.data_ptr(), "BF16"), [(t.data_ptr(), "BF16") for t in tuned]

    def merged(rule: DeltaRule, tasks: int = TASKS) -> float:
        params = delta_params(rule)

        def run() -> None:
            _C.delta_merge(place, buffers[:tasks], place, (out.data_ptr(), "BF16"), ENTRIES, 0, params)
            _C.crc32c((out.data_ptr(), 2 * ENTRIES))

        return typical(run)

    plain = DeltaRule(weights=(1.0,) * TASKS)
    survey = HeldSurvey(Tile(base=place, tuned=buffers, count=ENTRIES, index0=0, number=0, rule=plain))
    ranks, keys = (ENTRIES // 5,) * TASKS, tuple(mask_key(0, "calibrate", t) for t in range(TASKS))
    trimmed = dataclasses.replace(plain, top=ranks)
    cut = resolve(trimmed, survey)
    one, all_tasks = merged(DeltaRule(weights=(1.0,)), 1), merged(plain)
    rules = {
        "random": dataclasses.replace(plain, keep=(0.5,) * TASKS, keys=keys),
        "elect": dataclasses.replace(plain, elect="authors"),
        "cut": cut,
    }
    few_entries = HeldSurvey(dataclasses.replace(survey.tile, count=FEW))
    many = typical(lambda: survey.kth(ranks, plain, False))
    few = typical(lambda: few_entries.kth((FEW // 5,) * TASKS, plain, False))
    seconds = {kind: merged(rule) - all_tasks for kind, rule in rules.items()} | {
        "task": (all_tasks - one) * TASKS / (TASKS - 1),
        "gram": typical(survey.gram),
        "l1": typical(lambda: survey.l1(cut)),
        "signs": typical(lambda: survey.signs(dataclasses.replace(cut, elect="authors"))),
        "histogram": typical(lambda: histogram(survey.tile)),
    }
    each = {kind: max(0.0, value) / (TASKS * ENTRIES) for kind, value in seconds.items()}
    kth = max(0.0, many - few) / (TASKS * (ENTRIES - FEW))
    asked = {"kth": kth, "asked": max(0.0, few / TASKS - kth * FEW)}
    return each | asked | {"entry": max(0.0, one / ENTRIES - each["task"])}


def histogram(tile: Tile) -> None:
    from array import array

    counts = array("q", bytes(8 * (1 << 16) * len(tile.tuned)))
    _C.delta_histogram(tile.base, tile.tuned, tile.count, 0, None, None, None, counts)


def matrix_rates() -> dict[str, float]:
    """Products in both precisions, eigensolver, plain passes; of one thread, the others at the same."""
    import torch

    from pymerge.linalg import _dense

    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    y = x.double()
    small = (y @ y.mT)[:SMALL_SIDE, :SMALL_SIDE].contiguous()
    entries = torch.zeros(1 << 22)
    return {
        "single": 2 * SIDE**3 / crowded(lambda: x @ x),
        "double": 2 * SIDE**3 / crowded(lambda: y @ y),
        "eigen": eigen(SMALL_SIDE).eigen / crowded(lambda: _dense.eigh(small.clone())),
        "touch": 8 * entries.numel() / crowded(lambda: entries + 1.0),
    }


def memory_rate() -> float:
    """Bytes a second that all threads together copy, read and written; by the clock: other programs count."""
    import torch

    threads = len(os.sched_getaffinity(0))
    pairs = [(torch.ones(1 << 24), torch.empty(1 << 24)) for _ in range(threads)]

    def run() -> None:
        workers = [threading.Thread(target=lambda s=s, t=t: t.copy_(s)) for s, t in pairs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    run()
    return threads * 8 * (1 << 24) / typical(run, clock=time.perf_counter)


def disk_rates(folder: Path) -> dict[str, float]:
    """Direct writes with fsync; the first read, which this system's page cache has
    nothing of (a host's may); reads from the page cache. Through a buffer as large as a merge's."""
    buffer = mmap.mmap(-1, BUFFER)
    buffer.write(os.urandom(BLOCK) * (BUFFER // BLOCK))
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".pymerge-calibrate-") as file, memoryview(buffer) as view:
        direct = opened_direct(file.name)
        os.posix_fallocate(file.fileno(), 0, FILE_BYTES)

        def every(call: Callable[[memoryview, int], object]) -> None:
            for at in range(0, FILE_BYTES, BLOCK):
                call(view[at % BUFFER : at % BUFFER + BLOCK], at)

        def write() -> None:
            every(lambda part, at: os.pwrite(direct, part, at))
            os.fsync(direct)

        def read() -> None:
            every(lambda part, at: os.preadv(file.fileno(), [part], at))

        try:
            seconds = {"write": typical(write, 3, time.perf_counter)}
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            seconds |= {"disk": typical(read, 1, time.perf_counter), "cached": typical(read)}
        finally:
            os.close(direct)
    return {name: FILE_BYTES / value for name, value in seconds.items()}


def opened_direct(path: str) -> int:
    """Past the page cache, where the file system takes that."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return os.open(path, os.O_WRONLY)


def merge_rates(kernels: Mapping[str, float]) -> dict[str, float]:
    """Processor seconds of a merge of one small matrix by the command line, without and with torch; and what a large
    one takes more, less the arithmetic, by bytes."""
    with tempfile.TemporaryDirectory(prefix="pymerge-calibrate-") as folder:
        root = Path(folder)
        found = {}
        for kind, steps, side in (("start", LINEAR, 8), ("torch", TORCH, 8), ("moved", LINEAR, LARGE_SIDE)):
            (root / kind).mkdir()
            models = [write_model(root / kind / str(number), side, number) for number in range(3)]
            recipe = {**steps, "base_model": models[0], "models": [{"model": model} for model in models[1:]]}
            path = root / kind / "recipe.yaml"
            path.write_text(json.dumps(recipe))
            found[kind] = started(path, root / kind / "out")
    entries = LARGE_SIDE**2
    more = found["moved"] - found["start"] - entries * (kernels["entry"] + 2 * kernels["task"])
    return found | {"moved": 2 * 3 * entries / max(more, 1e-3)}


def write_model(folder: Path, side: int, number: int) -> str:
    """A model of one matrix [side, side] in bfloat16."""
    folder.mkdir()
    size = 2 * side * side
    head = json.dumps({"layer.weight": {"dtype": "BF16", "shape": [side, side], "data_offsets": [0, size]}}).encode()
    # Magnitudes of weights: arithmetic on subnormal numbers is a hundred times as slow on some processors.
    values = bytes(byte for i in range(64) for byte in (i * (7 + number) % 256, 0x38 + i % 5))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _ in range(0, size, min(size, WRITTEN)):
            file.write(values * (min(size, WRITTEN) // 128))
    return str(folder)


def started(recipe: Path, out: Path) -> float:
    """The median of some runs: the first may read the programs from the disk."""
    command = [sys.executable, "-m", "pymerge", "merge", "-q", "--overwrite", "--threads", "1", str(recipe), str(out)]

    def of_children() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    return typical(lambda: subprocess.run(command, check=True), STARTS, of_children)
