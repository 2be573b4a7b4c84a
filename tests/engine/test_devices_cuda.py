"""Whole merges on a CUDA device: the CPU's bytes where the kernels promise them, and memory as planned."""

from __future__ import annotations

import pytest
import torch

import pymerge
from pymerge.engine.devices import DEVICE_SLACK
from tests.models import family, read_model, same

pytestmark = pytest.mark.device
if not torch.cuda.is_available():
    pytest.skip("no CUDA device: torch.cuda.is_available() is False", allow_module_level=True)

SHAPES = {
    "model.embed_tokens.weight": (5000, 256),
    **{f"layers.{i}.up.weight": (512, 256) for i in range(6)},
    **{f"layers.{i}.norm": (256,) for i in range(6)},
}
TIGHT = DEVICE_SLACK + (32 << 20)


@pytest.mark.parametrize("memory", [None, TIGHT])
@pytest.mark.parametrize("device", ["cuda", "auto", ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear", "tsv_m"])
def test_merges_on_a_device(tmp_path, device, method, memory):
    base, tuned = family(tmp_path, 3, SHAPES, torch.bfloat16)
    pymerge.merge(base, tuned, method=method, out=tmp_path / "cpu")
    options = pymerge.Options(device=device, device_memory=memory)
    summary = pymerge.merge(base, tuned, method=method, out=tmp_path / "out", options=options)
    expected, found = read_model(tmp_path / "cpu"), read_model(tmp_path / "out")
    if method == "tsv_m":
        for name, x in expected.items():
            assert torch.allclose(found[name].float(), x.float(), rtol=1e-2, atol=1e-3), name
    else:
        assert same(expected, found)
    assert all(row["taken_bytes"] <= row["peak_bytes"] for row in summary.get("devices", []))
    again = pymerge.merge(base, tuned, method=method, out=tmp_path / "again", options=options)
    assert again["checksums"] == summary["checksums"]
