"""500 merges in one process, of random methods and settings: no memory, thread or descriptor stays behind."""

from __future__ import annotations

import gc
import os
import random
import shutil
import threading

import pytest

import pymerge
from pymerge.engine.process import resident_memory
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


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
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
            found.append((resident_memory(), threads(), descriptors()))
    memory, running, opened = zip(*found[WARM // 10 :], strict=True)
    first, last = min(memory[:10]), min(memory[-10:])
    assert last <= 1.01 * first, f"{first / 1e6:.1f} MB after {WARM} merges, {last / 1e6:.1f} MB after {MERGES}"
    assert running[-1] <= running[0] and opened[-1] <= opened[0]
    assert threading.active_count() == 1
