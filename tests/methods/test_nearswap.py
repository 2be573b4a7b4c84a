from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.errors import RecipeError
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.blocks import BLOCK
from pymerge.methods.nearswap import NearSwap


def truth(base: Tensor, other: Tensor, t: float) -> Tensor:
    base, other = base.double(), other.double()
    weight = (t / (base - other).abs().clamp(min=1e-6)).clamp(0, 1)
    return weight * other + (1 - weight) * base


@pytest.mark.parametrize("t", [0.0, 1e-8, 1e-3, 0.05, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formula(t: float, dtype: torch.dtype, tensors: Any) -> None:
    base, other = tensors[0].to(dtype), tensors[1][0].to(dtype)
    merged = NearSwap(t=t).combine(group_of(base, other))
    torch.testing.assert_close(merged.double(), truth(base, other, t), rtol=0, atol=5e-7)


def test_entries_move_by_at_most_t() -> None:
    base = torch.zeros(6)
    other = torch.tensor([0.0, 0.25, -0.25, 0.5, -2.0, 1e30])
    merged = NearSwap(t=0.25).combine(group_of(base, other))
    assert torch.equal(merged[:3], other[:3])
    torch.testing.assert_close(merged, torch.tensor([0.0, 0.25, -0.25, 0.25, -0.25, 0.25]), rtol=1e-6, atol=0)


def test_t_below_the_floor_moves_near_entries_by_a_share() -> None:
    other = torch.tensor([0.0, 2e-7, -8e-7, 4e-6])
    merged = NearSwap(t=5e-7).combine(group_of(torch.zeros(4), other))
    torch.testing.assert_close(merged, torch.tensor([0.0, 1e-7, -4e-7, 5e-7]), rtol=1e-6, atol=0)


def group_of(base: Tensor, other: Tensor, first: int = 0) -> TaskGroup:
    info = TensorInfo(name="w", shape=tuple(base.shape), tasks=2)
    return TaskGroup(info=info, base=None, tuned=(base, other), first=first)


def test_parts_have_the_bits_of_the_whole() -> None:
    g = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, BLOCK + 999, generator=g)
    whole = NearSwap(t=0.5).combine(group_of(base, other))
    cuts = [0, 7, BLOCK - 1, len(base)]
    parts = [NearSwap(t=0.5).combine(group_of(base[a:b], other[a:b], a)) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("shape", [(), (1,), (0, 4), (3, 1), (2, 3, 3, 3)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    merged = NearSwap(t=0.25).combine(group_of(torch.zeros(shape), torch.full(shape, 0.5)))
    assert torch.equal(merged, torch.full(shape, 0.25))


def test_near_entries_have_the_bits_of_the_other_model() -> None:
    g = torch.Generator().manual_seed(1)
    base, other = torch.randn(2, 999, generator=g)
    assert torch.equal(NearSwap(t=10.0).combine(group_of(base, other)), other)
    assert torch.equal(NearSwap(t=0.0).combine(group_of(base, other)), base)


def test_t_must_be_given_and_not_negative() -> None:
    with pytest.raises(RecipeError, match="t: must be given"):
        NearSwap()
    with pytest.raises(RecipeError, match="t: must be >= 0"):
        NearSwap(t=-0.1)
