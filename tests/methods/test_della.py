from __future__ import annotations

from typing import Any

import pytest
import torch

from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.della import Della
from pymerge.methods.della_linear import DellaLinear
from tests.methods.conftest import Merge


@pytest.mark.parametrize("style", ["authors", "mergekit"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_entries_with_the_elected_sign(style: Any, normalize: bool, rescale: bool, merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    weight, given = (0.5, 1.0, 0.25), {"style": style, "density": 0.6, "epsilon": 0.2, "rescale": rescale}
    method = Della(weight=weight, normalize=normalize, scale=0.9, **given)
    info = TensorInfo(name="w", shape=(33, 65), tasks=3)
    x = []
    for t in range(3):  # one task's thinned vector: the others weigh nothing
        alone = DellaLinear(weight=tuple(w if s == t else 0.0 for s, w in enumerate(weight)), **given)
        x.append(alone.combine(TaskGroup(info=info, base=base, tuned=tuple(tuned))).double())
    stack, w = torch.stack(x), torch.tensor(weight, dtype=torch.float64).view(3, 1, 1)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack * sign > 0
    divisor = (w * agree).sum(0) if normalize else torch.ones(33, 65)
    update = (stack * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    torch.testing.assert_close(merge(method, base, tuned).double(), base + 0.9 * update, rtol=0, atol=1e-6)


def test_style_has_mergekits_defaults() -> None:
    authors, mergekit = Della(), Della(style="mergekit", weight=1.0)
    assert (authors.density, authors.epsilon, authors.normalize, authors.rescale) == (0.5, 0.15, True, True)
    assert (mergekit.density, mergekit.epsilon, mergekit.normalize, mergekit.rescale) == (1.0, 0.15, True, True)
    assert mergekit.scale == 1.0 and DellaLinear(style="mergekit", weight=1.0).normalize is False


def test_weights_that_cancel_are_no_problem_of_an_election() -> None:
    Della(weight=(1.0, -1.0))


def test_zero_deltas_return_the_base(merge: Merge, tensors: Any) -> None:
    base = tensors[0]
    assert torch.equal(merge(Della(), base, [base, base.clone()]), base)
