from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.errors import InputError, RecipeError
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.blocks import BLOCK
from pymerge.methods.fisher import Fisher
from pymerge.methods.surveyed import SUM_BLOCK


def group_of(tuned: Sequence[Tensor], weights: Sequence[Tensor] | None) -> TaskGroup:
    info = TensorInfo(name="w", shape=tuple(tuned[0].shape), tasks=len(tuned))
    return TaskGroup(info=info, base=None, tuned=tuple(tuned), weights=None if weights is None else tuple(weights))


def fisher_truth(
    tuned: Sequence[Tensor], fisher: Sequence[Tensor], norms: Sequence[float] | None, weight: Sequence[float]
) -> Tensor:
    c = torch.tensor(weight, dtype=torch.float64) / len(tuned)
    if norms is not None:
        a = torch.tensor([1 / (norm + 1e-6) for norm in norms], dtype=torch.float64)
        c = c * a / a.sum()
    shares = [ct * (f.double() + 1e-6) for ct, f in zip(c, fisher, strict=True)]
    return sum(s * w.double() for s, w in zip(shares, tuned, strict=True)) / sum(shares)  # type: ignore[return-value]


def importances(tasks: int, *shape: int, scale: float = 1e-3) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [scale * 10.0**-t * torch.randn(shape, generator=g) ** 2 for t in range(tasks)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [(1.0, 1.0, 1.0), (0.2, 3.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_formula(normalize: bool, weight: tuple[float, ...], dtype: torch.dtype, tensors: Any) -> None:
    tuned, fisher = [t.to(dtype) for t in tensors[1]], importances(3, 33, 65)
    norms = [float(torch.linalg.vector_norm(f.double())) for f in fisher] if normalize else None
    merged = Fisher(normalize=normalize, weight=weight).combine(group_of(tuned, fisher))
    torch.testing.assert_close(merged.double(), fisher_truth(tuned, fisher, norms, weight), rtol=0, atol=2e-6)


def test_norm_is_of_all_tensors_together() -> None:
    tuned = [torch.full((4,), 1.0), torch.full((4,), 3.0)]
    fisher = [torch.full((4,), 2.0), torch.full((4,), 1.0)]
    elsewhere = [torch.zeros(9), torch.full((9,), 1.0)]
    method = Fisher()
    one, other = method.survey(group_of(tuned, fisher)), method.survey(group_of(elsewhere, elsewhere))
    step = method.decide(method.join(one, other))
    expected = fisher_truth(tuned, fisher, [4.0, 13**0.5], (1.0, 1.0))
    torch.testing.assert_close(step.combine(group_of(tuned, fisher)).double(), expected, rtol=2**-22, atol=0)


def test_the_norm_does_not_depend_on_the_blocks() -> None:
    values = importances(1, BLOCK + 3 * SUM_BLOCK + 17, scale=1.0)
    method = Fisher()
    whole = method.survey(group_of(values, values))
    cut = 5 * SUM_BLOCK
    parts = [
        method.survey(group_of([v[a] for v in values], [v[a] for v in values])) for a in (slice(cut), slice(cut, None))
    ]
    assert method.decide(method.join(parts[1], parts[0])).norms == method.decide(whole).norms  # type: ignore[attr-defined]


def test_zero_fisher_is_the_average(tensors: Any) -> None:
    tuned = tensors[1]
    zero = [torch.zeros_like(t) for t in tuned]
    average = torch.stack([t.double() for t in tuned]).mean(0)
    for normalize in (True, False):
        merged = Fisher(normalize=normalize).combine(group_of(tuned, zero))
        torch.testing.assert_close(merged.double(), average, rtol=0, atol=1e-6)


def test_equal_models_and_one_model_come_back(tensors: Any) -> None:
    tuned = tensors[1]
    same = Fisher().combine(group_of([tuned[0]] * 3, importances(3, 33, 65)))
    torch.testing.assert_close(same, tuned[0], rtol=3 * 2**-23, atol=0)
    alone = Fisher().combine(group_of(tuned[:1], importances(1, 33, 65)))
    torch.testing.assert_close(alone, tuned[0], rtol=2**-22, atol=0)


def test_the_model_that_matters_wins() -> None:
    tuned, fisher = [torch.ones(3), -torch.ones(3)], [Tensor([1.0, 0, 0.5]), Tensor([0, 1.0, 0.5])]
    merged = Fisher().combine(group_of(tuned, fisher))
    torch.testing.assert_close(merged, Tensor([1, -1, 0]), rtol=0, atol=3e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_tiny_and_huge_importances_stay_finite(scale: float, tensors: Any) -> None:
    tuned = tensors[1]
    for normalize in (True, False):
        merged = Fisher(normalize=normalize).combine(group_of(tuned, importances(3, 33, 65, scale=scale)))
        assert torch.isfinite(merged).all() and merged.abs().max() <= max(t.abs().max() for t in tuned) * 1.001


def test_refuses_what_is_no_fisher_information(tensors: Any) -> None:
    with pytest.raises(InputError, match="w: Fisher information is never negative"):
        Fisher().combine(group_of(tensors[1], [-torch.ones(33, 65)] * 3))
    with pytest.raises(InputError, match="w: fisher needs the Fisher information of each model"):
        Fisher().combine(group_of(tensors[1], None))
    with pytest.raises(RecipeError, match="weight: one of the weights must be above 0"):
        Fisher(weight=(0.0, 0.0))
