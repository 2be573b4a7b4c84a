from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.cases import read_golden
from tests.methods.spectral import SHAPES, base_weights, golden_errors, golden_files, off, rotations, run, updates


def reference(deltas: Sequence[Tensor], eta: float) -> Tensor:
    """The mean of the task vectors cut at eta percent of the nuclear norm, which is then restored."""
    total = torch.zeros_like(deltas[0])
    for d in deltas:
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        if s.sum() > 0:
            q = 1 + int((s.cumsum(0) < eta / 100 * s.sum()).sum())
            total += (u[:, :q] * (s[:q] * s.sum() / s[:q].sum())) @ vh[:q]
    return total / len(deltas)


@pytest.mark.parametrize("eta", [0.0, 40.0, 85.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, int], eta: float) -> None:
    deltas = updates(*shape, 3)
    merged, notes = run("star", deltas, base_weights(*shape), torch.float32, eta=eta, scale=2.0)
    assert off(merged, 2 * reference(deltas, eta)) <= 2e-5
    s = torch.linalg.svdvals(deltas[0])
    q = notes.facts["ranks"][0]
    assert q in (1, min(shape)) if eta in (0.0, 100.0) else 1 < q < min(shape)
    assert notes.facts["nuclear_shares"][0] == pytest.approx(float(s[:q].sum() / s.sum()), rel=1e-5)
    assert float(s[: q - 1].sum() / s.sum()) <= eta / 100 <= notes.facts["nuclear_shares"][0] + 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_weights(shape: tuple[int, int]) -> None:
    base = base_weights(*shape, size=2.0)
    stored = [(base + d).bfloat16().double() - base for d in updates(*shape, 3)]
    assert off(run("star", stored, base, torch.bfloat16)[0], reference(stored, 40.0)) <= 2e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_invariants(shape: tuple[int, int]) -> None:
    deltas = updates(*shape, 4)
    merged = run("star", deltas)[0]
    left, right = rotations(*shape)
    assert off(run("star", deltas[::-1])[0], merged) <= 1e-5
    assert off(run("star", [left @ d @ right for d in deltas])[0], left @ merged @ right) <= 2e-5
    assert off(run("star", [d.mT for d in deltas])[0].mT, merged) <= 2e-5
    assert off(run("star", [deltas[0]] * 3)[0], run("star", deltas[:1])[0]) <= 1e-5
    for size in (2.0**-60, 2.0**40):
        assert off(run("star", [size * d for d in deltas])[0], size * merged) <= 1e-5


def test_all_of_the_norm_is_the_mean() -> None:
    deltas = updates(40, 72, 3)
    assert off(run("star", deltas, eta=100)[0], torch.stack(deltas).mean(0)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_low_rank_and_zero_updates(dtype: torch.dtype) -> None:
    """The authors' 0 / 0 is zero here."""
    deltas = [*updates(64, 64, 2, rank=4), torch.zeros(64, 64, dtype=torch.float64)]
    merged, notes = run("star", deltas, base_weights(64, 64), dtype)
    assert off(merged, reference(deltas, 40.0)) <= 1e-4
    assert notes.facts["ranks"][2] == 0 and notes.facts["skipped_tasks"] == [2]
    none = run("star", deltas[2:])[0]
    assert not none.any()


@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (0, 20), (20, 0)], ids=str)
def test_narrow_matrices(shape: tuple[int, int]) -> None:
    deltas = [torch.arange(1.0, 1 + 20 * bool(min(shape)), dtype=torch.float64).reshape(shape)] * 2
    assert off(run("star", deltas)[0], deltas[0]) <= 1e-6


# case05's convolution [12, 4, 3, 3]: SVC's port of STAR flattens it to [12, 36]; here, as in the authors' code, tensors
# that are no matrices are not the method's. Its matrix is compared.
@pytest.mark.parametrize("path", golden_files("star"), ids=lambda p: p.stem)
def test_golden(path: Any) -> None:
    given = read_golden(path).params
    errors = golden_errors(path, "star", scale=given["alpha"], eta=given["eta"])
    assert max(errors.values()) <= 5e-5, errors
