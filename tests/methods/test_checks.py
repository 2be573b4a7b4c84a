"""pymerge.testing.check_method: passes for pymerge's own methods, and says what another one does wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pymerge import methods
from pymerge.errors import MergeError, RecipeError
from pymerge.methods import REGISTRY, Combine, ElementWiseCombine, TaskGroup, TensorInfo, param, register
from pymerge.testing import check_method

GIVEN = {"slerp": {"t": 0.4}, "nearswap": {"t": 0.1}, "nuslerp": {"weight": [0.3, 0.7]}, "wudi": {"steps": 5}}
PLAIN = [
    name for name in methods.list() if not methods.get(name).needs and not getattr(methods.get(name), "beside", "")
]


@pytest.mark.parametrize("name", PLAIN)
def test_pymerges_own_methods_pass(name: str) -> None:
    check_method(name, **GIVEN.get(name, {}))


@pytest.mark.parametrize("name", ["regmean", "knots", "emr"])
def test_methods_with_needs_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="check_method merges plain models"):
        check_method(name)


Function = Callable[[TaskGroup, float], Tensor]


def mean(group: TaskGroup) -> Tensor:
    return sum((group.delta(t) for t in range(1, len(group.tuned))), group.delta(0)) / len(group.tuned)


def writes_over_inputs(group: TaskGroup, scale: float) -> Tensor:
    group.tuned[0].mul_(2)
    return mean(group) * scale


def is_random(group: TaskGroup, scale: float) -> Tensor:
    return mean(group) * scale * torch.rand(())


def is_not_finite(group: TaskGroup, scale: float) -> Tensor:
    return mean(group) * scale / 0


def adds_one(group: TaskGroup, scale: float) -> Tensor:
    return mean(group) * scale + 1


def scales_first(group: TaskGroup, scale: float) -> Tensor:
    return torch.tanh(mean(group) * scale)


def ranks_columns(group: TaskGroup, scale: float) -> Tensor:
    found = mean(group)
    return found / found.norm(dim=0).clamp(min=1e-20) * scale if found.dim() == 2 else found * scale


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (writes_over_inputs, "writes over its inputs: .*layers.0.up.weight"),
        (is_random, "two runs differ in"),
        (is_not_finite, "the largest magnitude is inf"),
        (adds_one, "models that equal the base do not give the base"),
        (scales_first, "scale is not what the update is multiplied by, last of all"),
        (ranks_columns, "unit is 'rows', yet rows 0..5 alone come out otherwise"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_said(function: Function, says: str) -> None:
    @register("own")
    @dataclass(frozen=True, kw_only=True)
    class Own(Combine):
        """A method with a fault."""

        scale: float = param(1.0, "lambda")
        unit = "rows"

        def combine(self, group: TaskGroup) -> Tensor:
            return function(group, self.scale)

    try:
        with pytest.raises((AssertionError, MergeError), match=says):
            check_method("own")
    finally:
        del REGISTRY["own"]


def test_undocumented_methods_are_said() -> None:
    @register("own")
    @dataclass(frozen=True, kw_only=True)
    class Own(ElementWiseCombine):
        """One line."""

        scale: float = param(1.0, "")

        def rule(self, info: TensorInfo) -> methods.DeltaRule:
            return methods.DeltaRule(weights=(1.0,) * info.tasks, scale=self.scale)

    try:
        with pytest.raises(AssertionError, match=r"without a word of explanation: \['scale'\]"):
            check_method("own")
    finally:
        del REGISTRY["own"]
