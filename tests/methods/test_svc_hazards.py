"""Inputs at the edge: zeros, few rows, low rank, equal singular values, tiny updates, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pymerge.errors import NonFinite, RecipeError
from pymerge.methods.svc import SVC
from tests.methods.svc_reference import calibrated, distance, every_shape, group_of, tasks_of, truth


@every_shape
def test_an_update_of_zero_stays_zero(shape: Any) -> None:
    group = group_of([torch.zeros(shape)] * 3)
    assert torch.equal(SVC().calibrate(torch.zeros(shape), group), torch.zeros(shape))
    assert group.notes.facts == {"svc_alpha": 1 / 3, "svc_route": "zero", "svc_rank": 0}


@every_shape
def test_tasks_of_zero_count_as_alpha(shape: Any) -> None:
    tasks = tasks_of(shape, 2)
    tasks.append(torch.zeros(shape))
    update = sum(tasks)
    expected, _ = truth(update, tasks, 0.25)
    assert distance(calibrated(update, tasks, alpha=0.25), expected) < 3e-6
    nothing = [torch.zeros(shape)] * 2
    assert distance(calibrated(update, nothing, alpha=0.25), update / 0.25) < 1e-6
    assert torch.equal(calibrated(update, nothing, alpha=0.25, target=1), update)
    assert torch.equal(calibrated(update, nothing, alpha=0.25, rule="mean_then_clip"), update)


@every_shape
def test_one_task(shape: Any) -> None:
    task = tasks_of(shape, 1)[0]
    assert distance(calibrated(0.3 * task, [task]), 0.3 * task) < 1e-6  # alpha = 1/T = 1
    assert distance(calibrated(0.3 * task, [task], alpha=0.1), task) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 5), (5, 2)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_fewer_rows_than_tasks(shape: Any, side: str) -> None:
    tasks = tasks_of(shape, 6)
    update = 0.3 * sum(tasks)
    expected, _ = truth(update, tasks, 1 / 6, right=side == "right")
    assert distance(calibrated(update, tasks, side=side), expected) < 3e-6


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_empty(shape: Any) -> None:
    assert calibrated(torch.zeros(shape), [torch.zeros(shape)] * 2).shape == shape


@pytest.mark.parametrize("shape", [(48, 90), (90, 48)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_low_rank_tasks(shape: Any, side: str) -> None:
    """Rank 9 of 48: where s = 0 the directions are arbitrary and do not matter."""
    m, n = shape
    g = torch.Generator().manual_seed(5)
    tasks = [torch.randn(m, 3, generator=g) @ torch.randn(3, n, generator=g) for _ in range(3)]
    update = 0.3 * sum(tasks)
    expected, _ = truth(update, tasks, 1 / 3, right=side == "right")
    assert distance(calibrated(update, tasks, side=side), expected) < 1e-5


@every_shape
def test_released_floor_is_absolute(shape: Any) -> None:
    tasks = [1e-8 * t for t in tasks_of(shape)]
    update = sum(tasks)
    released = calibrated(update, tasks, alpha=0.25, floor="absolute")
    assert distance(released, update / 0.25) < 1e-6  # every response is below 1e-12, so every coefficient is alpha
    assert distance(calibrated(update, tasks, alpha=0.25, preset="released"), released) < 1e-6
    assert distance(calibrated(update, tasks, alpha=0.25), truth(update, tasks, 0.25)[0]) < 3e-6


def test_equal_singular_values_without_given_directions_are_finite() -> None:
    tasks = tasks_of((20, 56))
    u, _, vh = torch.linalg.svd(sum(tasks), full_matrices=False)
    result = calibrated(2 * u @ vh, tasks)
    assert bool(torch.isfinite(result).all())
    assert 2 * math.sqrt(20) / 3 < float(result.norm()) < 6 * math.sqrt(20) + 1e-3  # factors within 1/3..3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_an_update_that_is_not_finite(bad: float) -> None:
    tasks = tasks_of((4, 6))
    update = sum(tasks)
    update[1, 2] = bad
    with pytest.raises(NonFinite, match=r"svc: layer\.weight: the update"):
        calibrated(update, tasks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 0}, r"alpha: must be in \(0, 1\]"),
        ({"alpha": 1.5}, r"alpha: must be in \(0, 1\]"),
        ({"rank": 4}, "rank: .* alpha: 1"),
        ({"rank": 4, "alpha": 0.5}, "rank: .* alpha: 1"),
        ({"target": 0, "rule": "mean_then_clip"}, "rule: has no meaning with a target"),
        ({"side": "both"}, "side: must be one of left, right"),
    ],
    ids=str,
)
def test_refuses_what_has_no_meaning(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SVC(**given)


def test_refuses_a_target_that_is_not_there() -> None:
    tasks = tasks_of((4, 6))
    with pytest.raises(RecipeError, match="target: 3 of 3 models"):
        calibrated(sum(tasks), tasks, target=3)
