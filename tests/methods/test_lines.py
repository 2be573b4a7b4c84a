from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.lines import Lines

GENERATOR = torch.Generator().manual_seed(0)
UPDATE = torch.randn(7, 5, generator=GENERATOR)


def calibrated(method: Lines, depth: float | None, tasks: int = 4) -> Tensor:
    zero = torch.zeros_like(UPDATE)
    info = TensorInfo(name="w", shape=(7, 5), tasks=tasks, depth=depth)
    return method.calibrate(UPDATE.clone(), TaskGroup(info=info, base=zero, tuned=(zero,) * tasks))


@pytest.mark.parametrize(("a", "b", "scale"), [(0.2, 0.9, 1.0), (0.0, 1.5, 0.5), (0.7, -0.2, 2.0)])
def test_factor_is_linear_in_the_layer(a: float, b: float, scale: float) -> None:
    layers = 12
    for layer in range(layers):
        expected = UPDATE.double() * scale * (a + b * layer / (layers - 1))
        merged = calibrated(Lines(a=a, b=b, scale=scale), layer / (layers - 1))
        torch.testing.assert_close(merged.double(), expected, rtol=2**-23, atol=0)


def test_outside_of_the_layers_everything_gets_a() -> None:
    assert torch.equal(calibrated(Lines(a=0.25, b=3.0), None), UPDATE * 0.25)


@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_defaults_go_from_the_mean_to_the_sum(tasks: int) -> None:
    assert torch.equal(calibrated(Lines(), None, tasks), UPDATE * (1 / tasks))
    assert torch.equal(calibrated(Lines(), 0.0, tasks), UPDATE * (1 / tasks))
    assert torch.equal(calibrated(Lines(), 1.0, tasks), UPDATE)


def test_one_task_has_one_free_number() -> None:
    assert torch.equal(calibrated(Lines(a=0.3), 0.5, tasks=1), UPDATE * 0.65)


def test_the_factor_is_noted() -> None:
    group = TaskGroup(info=TensorInfo(name="w", shape=(1,), tasks=2, depth=0.5), base=None, tuned=(torch.ones(1),) * 2)
    Lines().calibrate(torch.ones(1), group)
    assert group.notes.facts == {"lines": 0.75}
