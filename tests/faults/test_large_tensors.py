"""More than 2^31 entries in a tensor: counts, offsets and the last entries are right. The files are holes."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge.checkpoint import open_checkpoint
from pymerge.engine.local import plan_merge
from pymerge.engine.process import resident_memory
from pymerge.recipe import Recipe

OVER = 2**31 + 3 * 2**20 + 5


def sparse_model(folder: Path, shape: list[int], last: list[float]) -> Path:
    """One bfloat16 tensor of zeros that ends with `last`; only that is on disk."""
    folder.mkdir()
    size = 2 * torch.Size(shape).numel()
    header = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    ending = torch.tensor(last, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
        file.seek(-len(ending), os.SEEK_END)
        file.write(ending)
    return folder


def test_sizes_beyond_32_bits_are_planned_without_memory(tmp_path):
    shape = [2**33 + 7, 9]  # 144 GB
    models = [sparse_model(tmp_path / name, shape, [0.0]) for name in ("base", "a", "b")]
    before = resident_memory()
    for method in ("task_arithmetic", "ties", "breadcrumbs"):
        plan = plan_merge(Recipe.from_kwargs(models[0], models[1:], method))
        assert sum(item.count for item in plan.items) == 9 * (2**33 + 7)
        assert plan.write_bytes == 2 * 9 * (2**33 + 7)
        assert plan.layout.slots["w"].nbytes == plan.write_bytes
    assert resident_memory() - before < 50e6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parameters", "wanted"),
    [
        ("linear", {"weight": 0.5}, [2.0, 0.0, 4.0]),
        # two entries of each model are kept: 2 and 3, 3 and 5
        ("ties", {"density": 1e-9, "scale": 1.0, "style": "mergekit", "weight": 1.0}, [3.0, 2.0, 4.0]),
    ],
)
def test_the_last_entries_of_a_tensor_beyond_32_bits(tmp_path, method, parameters, wanted):
    base = sparse_model(tmp_path / "base", [OVER], [0.0]) if method == "ties" else None
    models = [
        sparse_model(tmp_path / f"m{i}", [OVER], end) for i, end in enumerate(([1.0, 2.0, 3.0], [3.0, -2.0, 5.0]))
    ]
    options = pymerge.Options(memory=400_000_000, threads=2, progress=False)
    pymerge.merge(base, models, method=method, out=tmp_path / "out", options=options, **parameters)
    raw = bytearray(6)
    with open_checkpoint(tmp_path / "out") as merged:
        merged["w"].read_into(memoryview(raw), 2 * (OVER - 3))
    shutil.rmtree(tmp_path / "out")  # 4 GB that are no holes
    assert torch.frombuffer(raw, dtype=torch.bfloat16).tolist() == wanted
