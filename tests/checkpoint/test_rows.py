"""Tensors whose rows come from several tensors: equal to what indexing and averaging whole tensors gives."""

import numpy as np
import pytest
import torch

from pymerge.checkpoint import MemoryTensor, rows
from pymerge.checkpoint.moved import MovedTensor
from pymerge.checkpoint.rows import Rows, RowsTensor


@pytest.fixture(autouse=True)
def small_scratch(monkeypatch):
    """Rows are put together in several pieces."""
    monkeypatch.setattr(rows, "SCRATCH", 100)


def source(seed, shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def part(tensor, places, index):
    return Rows(MemoryTensor("t", tensor), np.array(places), np.array(index))


def assert_ranges(tensor, expected):
    """All of it, and ranges that begin and end anywhere between entries."""
    assert torch.equal(tensor.load(), expected) and tensor.shape == tuple(expected.shape)
    raw = expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert tensor.nbytes == len(raw)
    width = expected.element_size()
    for first, last in ((0, 1), (1, 7), (5, 5), (3, expected.numel() - 2), (expected.numel() - 1, expected.numel())):
        view = bytearray((last - first) * width)
        tensor.read_into(memoryview(view), first * width)
        assert view == raw[first * width : last * width]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", [(), (5,), (3, 4)], ids=str)
def test_rows_of_two_tensors(row, dtype):
    a, b = source(0, (40, *row), dtype), source(1, (30, *row), dtype)
    a[7] = -0.0
    places_a, places_b = [0, 2, 3, 11, 12], [1, 4, 9, 10]
    made = RowsTensor(MemoryTensor("t", a), [part(a, places_a, [39, 7, 7, 0, 1]), part(b, places_b, [0, 29, 2, 1])], 14)
    expected = torch.zeros((14, *row), dtype=dtype)
    expected[places_a], expected[places_b] = a[[39, 7, 7, 0, 1]], b[[0, 29, 2, 1]]
    assert made.exact and made.dtype == made.stored == MemoryTensor("t", a).dtype
    assert_ranges(made, expected)
    assert torch.signbit(made.load()[2]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_that_several_give_are_their_mean(dtype):
    a, b = source(0, (8, 5), dtype), source(1, (6, 5), dtype)
    made = RowsTensor(MemoryTensor("t", a), [part(a, [0, 1, 2], [3, 4, 5]), part(b, [1, 2], [0, 5])], 4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.stack([a[3].to(wide), (a[4].to(wide) + b[0].to(wide)) / 2, (a[5].to(wide) + b[5].to(wide)) / 2])
    assert_ranges(made, torch.cat([expected, torch.zeros(1, 5, dtype=wide)]))
    assert (made.dtype, made.stored) == ("F64" if wide == torch.float64 else "F32", MemoryTensor("t", a).dtype)


def test_other_dtypes_are_not_rounded():
    a, b = source(0, (8, 5), torch.bfloat16), source(1, (6, 5), torch.float32)
    made = RowsTensor(MemoryTensor("t", a), [part(a, [0], [3]), part(b, [1], [2])], 2)
    assert_ranges(made, torch.stack([a[3].float(), b[2]]))
    assert (made.dtype, made.stored) == ("F32", "BF16")


def test_padding_is_the_mean_of_all_rows():
    a = source(0, (64, 5), torch.bfloat16)
    made = RowsTensor(MemoryTensor("t", a), [part(a, range(64), range(64))], 64, pad=3)
    got = made.load()
    assert torch.equal(got[:64], a.float())
    torch.testing.assert_close(got[64:], a.double().mean(0).float().expand(3, 5), rtol=1e-7, atol=1e-9)
    assert_ranges(made, got)


def test_some_rows_of_one_tensor():
    a = source(0, (50, 4), torch.float32)
    for index in (torch.arange(20), torch.tensor([49, 3, 3, 0]), torch.tensor([], dtype=torch.int64)):
        moved = MovedTensor("t", MemoryTensor("t", a), {0: index})
        assert torch.equal(moved.load(), a[index]) and moved.nbytes == index.numel() * 16


def test_bytes_outside_are_refused():
    a = source(0, (8, 5), torch.float32)
    made = RowsTensor(MemoryTensor("t", a), [part(a, [0], [3])], 2)
    with pytest.raises(ValueError, match=r"bytes 0..44 asked for, the tensor has 40"):
        made.read_into(memoryview(bytearray(44)))
