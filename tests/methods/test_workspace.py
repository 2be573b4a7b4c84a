"""What spectral methods take, as resident memory, against the workspace that plans are made with."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MEASURE = """
import ctypes, sys
from pathlib import Path
import torch
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods import get

def kilobytes(field):
    return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)).split()[1])

name, m, n, tasks = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
random = torch.Generator().manual_seed(0)
base = torch.randn(m, n, generator=random).bfloat16()
tuned = tuple((base + 0.1 * torch.randn(m, n, generator=random)).bfloat16() for _ in range(tasks))
group = TaskGroup(info=TensorInfo(name="w", shape=(m, n), tasks=tasks), base=base, tuned=tuned)
step = get(name)()
update = sum(t.float() - base.float() for t in tuned)
run = (lambda: step.calibrate(update.clone(), group)) if step.step == "calibrate" else (lambda: step.combine(group))
run()  # what libraries keep for themselves
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
run()
update_bytes = 4 * m * n  # counted by the plan
print(1024 * (kilobytes("VmHWM") - before) - update_bytes, step.workspace(group.info))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset")
@pytest.mark.parametrize(("m", "n"), [(1024, 1024), (2560, 640), (640, 2560)])
@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "svc", "tsv_m"])
def test_peak_is_within_workspace(name: str, m: int, n: int) -> None:
    """With two tasks, of which each has half of the directions. Freed memory goes back at once, so as not to count."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", MEASURE, name, str(m), str(n), "2"]
    done = subprocess.run(command, env=os.environ | at_once, capture_output=True, text=True, check=True)
    taken, workspace = map(int, done.stdout.split())
    assert taken <= workspace, f"{taken / 2**20:.0f} MB, {workspace / 2**20:.0f} MB stated"
    assert workspace <= 4 * taken, f"{workspace / 2**20:.0f} MB stated, {taken / 2**20:.0f} MB taken"
