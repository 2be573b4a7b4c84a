"""500 merges in one process, of random methods and settings: no memory, thread or descriptor stays behind."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import shutil
import sys
import threading

import pytest

import pymerge
from tests.models import family

SHAPES = {f"layers.{i}.up.weight": (64, 48) for i in range(4)} | {"norm": (48,)}
METHODS = {
    "linear": {"weight": [0.5, 0.5]},
    "task_arithmetic": {"scale": 0.3},
    "ties": {"density": [0.2, 0.7]},
    "dare_ties": {"density": 0.5},
    "breadcrumbs": {},
    "della": {},
    "model_stock": {},
    "karcher": {},
    "consensus": {},
    "pcb": {},
    "emr": {},
    "tsv_m": {"calibrate": "svc"},
    "iso_c": {},
    "ace": {},
}
WARM, MERGES = 100, 500


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: uordblks are bytes in use, hblkhd those in mappings of their own."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> int:
    """Bytes that someone still holds. Resident memory also counts pages that malloc keeps for the next call: they come
    and go by several per cent, the more so behind tests that held gigabytes."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def mappings() -> int:
    with open("/proc/self/maps") as lines:
        return sum(1 for _ in lines)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33: bytes in use are its count")
def test_500_merges_leave_nothing_behind(tmp_path):
    base, children = family(tmp_path, 2, SHAPES)
    generator = random.Random(0)
    found = []
    for number in range(MERGES):
        method = generator.choice(list(METHODS))
        options = pymerge.Options(
            memory=200_000_000,
            threads=generator.choice((1, 2)),
            shard_bytes=generator.choice((10_000, 5_000_000)),
            progress=False,
        )
        root = None if method in ("linear", "karcher") else base
        try:
            pymerge.merge(root, children, method=method, out=tmp_path / "out", options=options, **METHODS[method])
        finally:
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        if number % 10 == 9:
            gc.collect()
            found.append((allocated(), sys.getallocatedblocks(), mappings(), threads(), descriptors()))
    memory, blocks, mapped, running, opened = zip(*found[WARM // 10 :], strict=True)
    for what, kept in (("bytes of malloc", memory), ("blocks of Python", blocks)):
        first, last = min(kept[:10]), min(kept[-10:])
        assert last <= 1.01 * first, f"{first} {what} after {WARM} merges, {last} after {MERGES}"
    assert min(mapped[-10:]) <= 1.01 * min(mapped[:10])
    assert running[-1] <= running[0] and opened[-1] <= opened[0]
    assert threading.active_count() == 1
