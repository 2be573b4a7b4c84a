from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pymerge.methods.wudi import Wudi
from tests.methods.spectral import base_weights, off, run, updates

SIZE = 2.0**-6  # of the updates: steps of 1e-5 are then neither lost nor jumps
SHAPES = [(40, 64), (64, 40), (48, 48), (6, 64)]  # the last: less work by factors than by the Gram matrix


def interference(merged: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """sum_t ||(M - D_t) D_t^T||^2 / ||D_t||^2"""
    return torch.stack([((merged - d) @ d.mT).square().sum() / d.square().sum() for d in deltas]).sum()


def reference(deltas: Sequence[Tensor], lr: float = 1e-5, steps: int = 300) -> Tensor:
    """Adam on the definition, gradients by autograd."""
    merged = torch.stack(list(deltas)).sum(0).requires_grad_(True)
    optimizer = torch.optim.Adam([merged], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        interference(merged, deltas).backward()
        optimizer.step()
    return merged.detach()


def small(*args: int, **kwargs: int) -> list[Tensor]:
    return [SIZE * d for d in updates(*args, **kwargs)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_autograd(shape: tuple[int, int]) -> None:
    """Where the gradient nearly vanishes Adam enlarges rounding: the definition in float32 is then off as well."""
    deltas = small(*shape, 4)
    merged, notes = run("wudi", deltas)
    truth = reference(deltas)
    own = off(reference([d.float() for d in deltas]).double(), truth)
    assert off(merged, truth) <= max(2e-6, 2 * own)
    assert off(sum(deltas), truth) > 0.05  # 300 steps do something
    start, end = interference(sum(deltas), deltas), interference(truth, deltas)
    assert notes.facts["loss"] == pytest.approx([float(start), float(end)], rel=2e-3) and end < start / 2
    assert notes.facts["products"] == ("factors" if shape == (6, 64) else "gram")


def test_steps_lr_and_scale() -> None:
    deltas = small(40, 64, 3)
    merged = run("wudi", deltas, lr=1e-4, steps=7, scale=0.5)[0]
    assert off(merged, 0.5 * reference(deltas, 1e-4, 7)) <= 1e-6
    still = run("wudi", deltas, lr=0.0, steps=3)[0]
    assert off(still, torch.stack(deltas).sum(0)) <= 1e-7


def test_bfloat16_weights() -> None:
    base = base_weights(48, 64, size=2.0) * SIZE
    stored = [(base + d).bfloat16().double() - base for d in small(48, 64, 3)]
    assert off(run("wudi", stored, base, torch.bfloat16)[0], reference(stored)) <= 4e-6


def test_task_order() -> None:
    deltas = small(48, 64, 4)
    assert off(run("wudi", deltas[::-1])[0], run("wudi", deltas)[0]) <= 4e-6


def test_one_task_stays() -> None:
    """The gradient is zero but for rounding, which Adam scales up to steps of lr: 300 of them at most."""
    (delta,) = small(48, 48, 1)
    merged, notes = run("wudi", [delta])
    assert (merged - delta).abs().max() <= 300 * 1e-5 and notes.facts["loss"][0] <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_updates_are_skipped(dtype: torch.dtype) -> None:
    deltas = small(48, 64, 3)
    with_zero = [deltas[0], torch.zeros_like(deltas[0]), *deltas[1:]]
    base = base_weights(48, 64) * SIZE
    merged, notes = run("wudi", with_zero, base, dtype)
    assert notes.facts["skipped_tasks"] == [1] and torch.equal(merged, run("wudi", deltas, base, dtype)[0])
    nothing, notes = run("wudi", [torch.zeros(6, 8, dtype=torch.float64)] * 2)
    assert not nothing.any() and notes.facts["loss"] == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24)], ids=str)
def test_low_rank_and_identical_updates(shape: tuple[int, int]) -> None:
    for deltas in (small(*shape, 3, rank=4), small(*shape, 1) * 3):
        assert off(run("wudi", deltas)[0], reference(deltas)) <= 1e-4


@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (0, 20), (20, 0)], ids=str)
def test_narrow_matrices(shape: tuple[int, int]) -> None:
    deltas = small(*shape, 2) if min(shape) else [torch.zeros(shape, dtype=torch.float64)] * 2
    truth = reference(deltas) if min(shape) else deltas[0]
    assert off(run("wudi", deltas)[0], truth) <= 1e-4


def test_the_rest_of_the_model() -> None:
    assert Wudi().rest == "mean" and Wudi(preset="released").rest == "base"
