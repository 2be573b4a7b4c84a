from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.cases import read_golden
from tests.methods.spectral import (
    SHAPES,
    base_weights,
    generator,
    golden_errors,
    golden_files,
    isometry,
    leading,
    off,
    rotations,
    run,
    updates,
)

PRESETS = ["default", "released"]


def reference(deltas: Sequence[Tensor]) -> Tensor:
    """polar(U) diag(S) polar(V)^T of the stacked top int(r / T) triplets, over what is not zero."""
    k = int(min(deltas[0].shape) * (1 / len(deltas)))
    parts = [leading(d, k) for d in deltas]
    u, s, v = (torch.cat([p[i] for p in parts], dim=-1) for i in range(3))
    return isometry(u) @ torch.diag(s) @ isometry(v).mT


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tasks", [2, 5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, int], tasks: int, preset: Any) -> None:
    deltas = updates(*shape, tasks)
    merged, notes = run("tsv_m", deltas, base_weights(*shape), torch.float32, preset=preset, scale=0.7)
    assert off(merged, 0.7 * reference(deltas)) <= 1e-4
    k = min(shape) // tasks
    assert notes.facts["ranks"] == [k] * tasks and "skipped_tasks" not in notes.facts
    values = torch.cat([leading(d, k)[1] for d in deltas])
    assert notes.facts["mean_singular_value"] == pytest.approx(float(values.mean()), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_weights(shape: tuple[int, int]) -> None:
    base = base_weights(*shape, size=2.0)
    tuned = [(base + d).bfloat16() for d in updates(*shape, 3)]
    stored = [t.double() - base for t in tuned]
    assert off(run("tsv_m", stored, base, torch.bfloat16)[0], reference(stored)) <= 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_invariants(shape: tuple[int, int]) -> None:
    deltas = updates(*shape, 4)
    merged = run("tsv_m", deltas)[0]
    left, right = rotations(*shape)
    assert off(run("tsv_m", deltas[::-1])[0], merged) <= 1e-5
    assert off(run("tsv_m", [left @ d @ right for d in deltas])[0], left @ merged @ right) <= 1e-4
    assert off(run("tsv_m", [d.mT for d in deltas])[0].mT, merged) <= 1e-4
    for size in (2.0**-60, 2.0**40):
        assert off(run("tsv_m", [size * d for d in deltas])[0], size * merged) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_task_is_itself(shape: tuple[int, int]) -> None:
    (delta,) = updates(*shape, 1)
    assert off(run("tsv_m", [delta])[0], delta) <= 1e-5


def test_identical_tasks_give_one_truncated() -> None:
    (delta,) = updates(48, 60, 1)
    u, s, v = leading(delta, 12)
    merged, notes = run("tsv_m", [delta] * 4, base_weights(48, 60), torch.float32)
    assert off(merged, (u * s) @ v.mT) <= 1e-4
    assert notes.facts["condition"] == pytest.approx([1.0, 1.0], abs=1e-4)


HAZARDS = {
    "rank 4": lambda: updates(64, 64, 4, rank=4),
    "a zero update": lambda: [*updates(64, 64, 3), torch.zeros(64, 64, dtype=torch.float64)],
    "identical, rank 4": lambda: updates(64, 64, 1, rank=4) * 4,
    "two of four identical": lambda: [*updates(64, 64, 3), updates(64, 64, 3)[0]],
    "rank 4, wide": lambda: updates(48, 96, 4, rank=4),
    "nothing but zeros": lambda: [torch.zeros(48, 96, dtype=torch.float64)] * 4,
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_float32_and_float64_weights_agree(hazard: str) -> None:
    """Where the released rule gives rounding errors full weight: 0.5 and more apart."""
    deltas = HAZARDS[hazard]()
    base = base_weights(*deltas[0].shape)
    truth = reference(deltas)
    for dtype in (torch.float32, torch.float64):
        assert off(run("tsv_m", deltas, base, dtype)[0], truth) <= 5e-5, dtype


def test_facts_of_tasks_without_an_update() -> None:
    deltas = [*updates(64, 64, 3, rank=5), torch.zeros(64, 64, dtype=torch.float64)]
    facts = run("tsv_m", deltas, base_weights(64, 64), torch.float32)[1].facts
    assert facts["ranks"] == [5, 5, 5, 0] and facts["skipped_tasks"] == [3]
    s = [torch.linalg.svdvals(d) for d in deltas[:3]]
    assert facts["smallest_ratio"] == pytest.approx(min(float(x[4] / x[0]) for x in s), rel=1e-3)


def test_rounding_to_bfloat16_is_told_from_an_update_of_low_rank() -> None:
    """Rounding moves singular values of 0.3 by 0.02; what it adds beside them is left out, not given full weight."""
    deltas, base = updates(96, 96, 4, rank=4), base_weights(96, 96, size=20.0)
    truth = reference(deltas)
    merged, notes = run("tsv_m", deltas, base, torch.bfloat16)
    assert notes.facts["ranks"] == [4] * 4 and off(merged, truth) <= 0.1
    released = run("tsv_m", deltas, base, torch.bfloat16, preset="released")[0]
    assert off(released, truth) > 0.5


def test_tasks_that_share_their_rows_space_in_bfloat16() -> None:
    """Adapters with one frozen A: the stack of right vectors has rank 4, and rounding must not raise it to 16."""
    g = generator(5)
    a = torch.linalg.qr(torch.randn(96, 4, generator=g, dtype=torch.float64)).Q.mT
    deltas = [torch.linalg.qr(torch.randn(96, 4, generator=g, dtype=torch.float64)).Q @ a / 2 for _ in range(4)]
    base = base_weights(96, 96, size=2.0)
    assert off(run("tsv_m", deltas, base, torch.bfloat16)[0], reference(deltas)) <= 0.05
    assert off(run("tsv_m", deltas, base, torch.float32)[0], reference(deltas)) <= 1e-4


@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (3, 20), (0, 20), (20, 0)], ids=str)
def test_fewer_rows_or_columns_than_tasks_give_zero(shape: tuple[int, int]) -> None:
    deltas = [torch.ones(shape, dtype=torch.float64) for _ in range(4)]
    merged, notes = run("tsv_m", deltas, torch.zeros(shape, dtype=torch.float64))
    assert not merged.any() and notes.facts == {"rank": 0}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("path", golden_files("tsv_m"), ids=lambda p: p.stem)
def test_golden(path: Any, preset: Any) -> None:
    scale = read_golden(path).params["alpha"]
    errors = golden_errors(path, "tsv_m", ["text_projection"], scale=scale, preset=preset)
    assert max(errors.values()) <= 2e-4, errors
