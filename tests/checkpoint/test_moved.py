"""Tensors whose entries move as they are read: every range of bytes is that of the moved tensor."""

from __future__ import annotations

import pytest
import torch

from pymerge.checkpoint import moved, open_checkpoint
from pymerge.checkpoint.made import MadeTensor
from pymerge.checkpoint.moved import MovedTensor
from tests.models import write_model

SHAPES = {(7,): (0,), (12, 5): (0, 1), (6, 4, 3): (1,), (3, 2, 2, 5): (0, 3), (1, 1, 9): (2,)}


@pytest.fixture(params=[1, 1 << 20], ids=["by rows", "whole"])
def limit(request, monkeypatch):
    """Which of the two ways of reading is taken."""
    monkeypatch.setattr(moved, "WHOLE", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", list(SHAPES), ids=str)
@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_every_range_of_bytes(tmp_path, limit, shape, dtype, on_disk):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    moves = {axis: torch.randperm(shape[axis], generator=generator) for axis in SHAPES[shape]}
    expected = tensor
    for axis, index in moves.items():
        expected = expected.index_select(axis, index)
    source = write_model(tmp_path / "m", {"w": tensor}) if on_disk else {"w": tensor}
    with open_checkpoint(source) as checkpoint:
        found = MovedTensor("w", checkpoint["w"], moves)
        assert torch.equal(found.load(), expected) and found.load().dtype == dtype
        wanted = expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        width = tensor.element_size()
        for start in range(0, len(wanted), width):
            for end in range(start, len(wanted) + 1, width):
                view = memoryview(bytearray(end - start))
                found.read_into(view, start)
                assert bytes(view) == wanted[start:end]


def test_rows_that_lie_together_are_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(moved, "WHOLE", 1)
    with open_checkpoint(write_model(tmp_path / "m", {"w": torch.arange(12.0).reshape(6, 2)})) as checkpoint:
        source = checkpoint["w"]
        reads = []
        monkeypatch.setattr(
            type(source), "read_into", lambda self, view, start=0: reads.append((start // 8, view.nbytes // 8))
        )
        MovedTensor("w", source, {0: torch.tensor([3, 4, 5, 0, 2, 1])}).load()
    assert reads == [(3, 3), (0, 1), (2, 1), (1, 1)]


def test_bytes_outside_are_refused():
    with open_checkpoint({"w": torch.zeros(3)}) as checkpoint:
        found = MovedTensor("w", checkpoint["w"], {0: torch.tensor([2, 1, 0])})
        with pytest.raises(ValueError, match="8..16 asked for, the tensor has 12"):
            found.read_into(memoryview(bytearray(8)), 8)


def test_a_made_tensor_is_made_once_for_all_its_ranges():
    made = []

    def double(tensor):
        made.append(tensor)
        return 2 * tensor.float()

    with open_checkpoint({"w": torch.arange(6, dtype=torch.bfloat16)}) as checkpoint:
        found = MadeTensor(checkpoint["w"], double)
        assert (found.dtype, found.nbytes, found.shape) == ("F32", 24, (6,))
        parts = [memoryview(bytearray(8)) for _ in range(3)]
        for n, part in enumerate(parts):
            found.read_into(part, 8 * n)
        values = torch.cat([torch.frombuffer(part, dtype=torch.float32) for part in parts])
    assert values.tolist() == [0, 2, 4, 6, 8, 10] and len(made) == 1
