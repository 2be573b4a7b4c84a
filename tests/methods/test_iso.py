"""Iso-C and Iso-CTS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.iso_cts import IsoCTS
from tests.golden.cases import read_golden
from tests.methods.spectral import (
    SHAPES,
    base_weights,
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
METHODS = ["iso_c", "iso_cts"]


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    """mean(s) polar(sum D_t), the mean over all values."""
    total = sum(deltas)
    assert isinstance(total, Tensor)
    return torch.linalg.svdvals(total).mean() * isometry(total)


def iso_cts(deltas: Sequence[Tensor], fraction: float = 0.8, floor: float = 1e-9) -> Tensor:
    """Section 12 of the paper's appendix, stacks and all; values below `floor` are zeros."""
    total = sum(deltas)
    assert isinstance(total, Tensor)
    r, tasks = min(total.shape), len(deltas)
    q = min(round((r - int(r * fraction)) / tasks), r // tasks) * tasks
    common = leading(total, r - q)
    rest = [d - common[0] @ (common[0].mT @ d) for d in deltas]
    parts = [leading(e, q // tasks) for e in rest if e.norm() > floor] if q else []
    u, s, v = (torch.cat([*(p[i] for p in parts), common[i]], dim=-1) for i in range(3))
    return s.sum() / max(1, r) * isometry(u) @ isometry(v).mT


REFERENCE = {"iso_c": iso_c, "iso_cts": iso_cts}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tasks", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_against_float64(name: str, shape: tuple[int, int], tasks: int, preset: Any) -> None:
    deltas = updates(*shape, tasks)
    truth = REFERENCE[name](deltas)
    merged, notes = run(name, deltas, base_weights(*shape), torch.float32, preset=preset, scale=1.5)
    assert off(merged, 1.5 * truth) <= 1e-4
    mean = float(truth.norm()) / min(shape) ** 0.5  # all singular values of the update are equal
    assert notes.facts["mean_singular_value"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_weights(name: str, shape: tuple[int, int]) -> None:
    base = base_weights(*shape, size=2.0)
    stored = [(base + d).bfloat16().double() - base for d in updates(*shape, 3)]
    assert off(run(name, stored, base, torch.bfloat16, preset="released")[0], REFERENCE[name](stored)) <= 1e-4


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(50, 60), (60, 50), (50, 50)], ids=str)
def test_common_fractions(shape: tuple[int, int], fraction: float) -> None:
    """50 and T = 3 at 0: the released rounding asks for 51 task-specific directions and fails."""
    deltas = updates(*shape, 3)
    merged, notes = run("iso_cts", deltas, common_space_fraction=fraction)
    assert off(merged, iso_cts(deltas, fraction)) <= 1e-4
    assert notes.facts["common_rank"] == {0.0: 2, 0.3: 14, 0.5: 26, 1.0: 50}[fraction]


def test_rounding_of_the_split() -> None:
    assert IsoCTS().split(768, 8) == (616, 19) and IsoCTS(common_space_fraction=0.0).split(50, 3) == (2, 16)
    assert IsoCTS(common_space_fraction=0.5).split(10, 2) == (6, 2)  # 2.5 to even
    assert IsoCTS(common_space_fraction=1.0).split(768, 8) == (768, 0) and IsoCTS().split(3, 8) == (3, 0)


def test_all_common_is_iso_c() -> None:
    deltas = updates(40, 72, 3)
    assert off(run("iso_cts", deltas, common_space_fraction=1.0)[0], run("iso_c", deltas)[0]) <= 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_invariants(name: str, shape: tuple[int, int]) -> None:
    deltas = updates(*shape, 4)
    merged = run(name, deltas)[0]
    left, right = rotations(*shape)
    assert off(run(name, deltas[::-1])[0], merged) <= 1e-4
    assert off(run(name, [left @ d @ right for d in deltas])[0], left @ merged @ right) <= 1e-4
    for size in (2.0**-60, 2.0**40):
        assert off(run(name, [size * d for d in deltas])[0], size * merged) <= 1e-5
    if name == "iso_c":
        assert off(run(name, [d.mT for d in deltas])[0].mT, merged) <= 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_identical_tasks_are_their_sum(name: str, shape: tuple[int, int]) -> None:
    (delta,) = updates(*shape, 1)
    merged = run(name, [delta] * 4, base_weights(*shape), torch.float32)[0]
    assert off(merged, REFERENCE[name]([delta] * 4)) <= 1e-4
    if name == "iso_c":
        assert off(merged, 4 * run(name, [delta])[0]) <= 1e-4


HAZARDS = {
    "rank 4": lambda: updates(64, 64, 4, rank=4),
    "rank 4, wide": lambda: updates(48, 96, 4, rank=4),
    "rank 4, tall": lambda: updates(96, 48, 4, rank=4),
    "a zero update": lambda: [*updates(64, 64, 3), torch.zeros(64, 64, dtype=torch.float64)],
    "identical, rank 4": lambda: updates(64, 64, 1, rank=4) * 4,
    "two of four identical": lambda: [*updates(64, 64, 3), updates(64, 64, 3)[0]],
    "opposite": lambda: [updates(64, 64, 1)[0], -updates(64, 64, 1)[0]],
    "nothing but zeros": lambda: [torch.zeros(48, 96, dtype=torch.float64)] * 4,
}


@pytest.mark.parametrize("hazard", HAZARDS)
@pytest.mark.parametrize("name", METHODS)
def test_float32_and_float64_weights_agree(name: str, hazard: str) -> None:
    deltas = HAZARDS[hazard]()
    base = base_weights(*deltas[0].shape)
    truth = REFERENCE[name](deltas)
    for dtype in (torch.float32, torch.float64):
        merged = run(name, deltas, base, dtype)[0]
        assert (merged - truth).norm() <= 1e-4 * float(truth.norm()) + 1e-6, dtype  # the updates' norms are 1


@pytest.mark.parametrize("name", METHODS)
def test_rounding_to_bfloat16_is_told_from_an_update_of_low_rank(name: str) -> None:
    deltas, base = updates(96, 96, 4, rank=4), base_weights(96, 96)
    truth = REFERENCE[name](deltas)
    merged, notes = run(name, deltas, base, torch.bfloat16)
    assert notes.facts["rank" if name == "iso_c" else "common_rank"] == 16
    assert off(merged, truth) <= 0.15
    assert off(run(name, deltas, base, torch.bfloat16, preset="released")[0], truth) > 0.5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(1, 20), (20, 1), (3, 20), (20, 3)], ids=str)
def test_narrow_matrices(shape: tuple[int, int], name: str) -> None:
    deltas = updates(*shape, 4)
    assert off(run(name, deltas)[0], REFERENCE[name](deltas)) <= 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_matrices_without_entries(name: str) -> None:
    for shape in ((0, 5), (5, 0)):
        run(name, [torch.zeros(shape, dtype=torch.float64)] * 2, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_basis_is_what_the_update_was_built_from(name: str, shape: tuple[int, int], rank: int | None) -> None:
    deltas = updates(*shape, 4, rank=rank)
    merged, notes = run(name, deltas)
    assert notes.basis is not None
    u, v = (x.double() for x in notes.basis())
    mean = notes.facts["mean_singular_value"]
    assert off(mean * u @ v.mT, merged) <= 1e-5
    assert (u.mT @ u - torch.eye(u.shape[1])).abs().max() <= 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_basis_of_zeros_is_empty(name: str) -> None:
    notes = run(name, [torch.zeros(6, 8, dtype=torch.float64)] * 2)[1]
    assert notes.basis is not None and [x.shape for x in notes.basis()] == [(6, 0), (8, 0)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "path", [*golden_files("iso_c"), *golden_files("iso_cts")], ids=lambda p: p.parent.name + p.stem
)
def test_golden(path: Any, preset: Any) -> None:
    given = read_golden(path).params
    settings = {k: v for k, v in given.items() if k == "common_space_fraction"}
    name = path.parent.name
    errors = golden_errors(path, name, ["text_projection"], scale=given["alpha"], preset=preset, **settings)
    assert max(errors.values()) <= {"iso_c": 5e-5, "iso_cts": 2e-4}[name], errors
