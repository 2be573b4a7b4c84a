"""Tensors whose entries are put in another order as they are read: equal to index_select, byte by byte."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pymerge import _C
from pymerge.checkpoint import LazyTensor, moved, open_checkpoint
from pymerge.checkpoint.moved import MovedTensor

SHAPES = {
    "matrix": (40, 300),
    "narrow": (96, 5),
    "vector": (50,),
    "conv": (8, 6, 3, 3),
    "position": (1, 17, 24),
}
CASES = [
    *(("matrix", axes) for axes in ((), (0,), (1,), (0, 1))),
    *(("narrow", axes) for axes in ((0,), (0, 1))),
    *(("conv", axes) for axes in ((0,), (1,), (0, 1))),
    *(("position", axes) for axes in ((2,), (1, 2))),
    ("vector", (0,)),
]


def numbered(shape, dtype):
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


def orders(shape, axes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {axis: torch.randperm(shape[axis], generator=generator) for axis in axes}


def selected(tensor, moves):
    for axis, index in moves.items():
        tensor = tensor.index_select(axis, index)
    return tensor


@pytest.fixture
def small_scratch(monkeypatch):
    """Rows are put in order in several pieces."""
    monkeypatch.setattr(moved, "SCRATCH", 2000)


@pytest.mark.parametrize("stored", [True, False], ids=["file", "memory"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8], ids=str)
@pytest.mark.parametrize(("name", "axes"), CASES)
def test_whole_tensors_and_ranges(name, axes, dtype, stored, tmp_path, small_scratch):
    tensors = {key: numbered(shape, dtype) for key, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path if stored else tensors) as checkpoint:
        moves = orders(SHAPES[name], axes)
        tensor = MovedTensor(name, checkpoint[name], moves)
        expected = selected(tensors[name], moves)
        assert torch.equal(tensor.load(), expected)
        assert (tensor.name, tensor.dtype, tensor.shape) == (name, checkpoint[name].dtype, SHAPES[name])
        raw = expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for start, end in ((0, 1), (3, 47), (len(raw) // 3, len(raw) // 3), (len(raw) // 3 + 1, len(raw) - 3)):
            view = bytearray(end - start)
            tensor.read_into(memoryview(view), start)
            assert view == raw[start:end]


@pytest.mark.parametrize(
    ("wanted", "reads"),
    [
        (slice(0, 48), [(0, 64)]),  # most rows between the first and the last are wanted: one read, in the file's order
        (slice(16, 17), [(0, 1)]),
        (slice(15, 18), [(0, 2), (63, 1)]),  # few are: only they, and those that lie together at once
    ],
)
def test_how_rows_are_read(wanted, reads, tmp_path, monkeypatch):
    weight = numbered((64, 400), torch.float32)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        heads = torch.tensor([3, 0, 2, 1])
        order = (heads[:, None] * 16 + torch.arange(16)).flatten()
        seen = []
        read = LazyTensor.read_into

        def counted(self, view, start=0):
            seen.append((start // 1600, view.nbytes // 1600))
            read(self, view, start)

        monkeypatch.setattr(LazyTensor, "read_into", counted)
        expected = weight[order[wanted]]
        view = bytearray(expected.nbytes)
        MovedTensor("w", checkpoint["w"], {0: order}).read_into(memoryview(view), wanted.start * 1600)
        assert seen == reads
        assert bytes(view) == expected.numpy().tobytes()


def test_ranges_outside_are_refused(tmp_path):
    with open_checkpoint({"w": torch.zeros(4, 4)}) as checkpoint:
        tensor = MovedTensor("w", checkpoint["w"], {0: torch.tensor([1, 0, 3, 2])})
        with pytest.raises(ValueError, match=r"bytes 60\.\.68 asked for, the tensor has 64"):
            tensor.read_into(memoryview(bytearray(8)), 60)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [0, 4]}, r"rows\[1\] is 4, must be from 0 to 3"),
        ({"places": [-1, 0]}, r"places\[0\] is -1, must be from 0 to 1"),
        ({"columns": [0, 3, 1]}, r"columns\[1\] is 3, must be from 0 to 2"),
        ({"columns": [0, 1]}, "2 rows of 12 bytes to 2 places, in 2 blocks of 4: these do not go together"),
        ({"places": [0]}, "2 rows of 12 bytes to 1 places"),
        ({"unit": 0}, "blocks of 0: these do not go together"),
    ],
)
def test_the_native_gather_stays_within_its_buffers(change, message):
    arguments = {"rows": [2, 0], "places": [1, 0], "columns": [2, 0, 1], "unit": 4} | change
    lists = {key: np.array(value) if isinstance(value, list) else value for key, value in arguments.items()}
    source, out = np.arange(12, dtype=np.float32), np.zeros(6, np.float32)
    with pytest.raises(ValueError, match=message):
        _C.gather_rows(source.data, out.data, 12, **lists)
    assert not out.any()
