from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.errors import RecipeError
from pymerge.methods.base import TensorInfo, chain_rule
from pymerge.methods.task_arithmetic import TaskArithmetic
from pymerge.methods.ties import Ties
from pymerge.methods.trim import Trim
from tests.methods.conftest import Merge


def test_exactly_k_entries_lowest_index_first(merge: Merge) -> None:
    tuned = [Tensor([1, -2, 2, 2, 1, 3]), Tensor([1, 1, 1, 1, 1, 1])]
    merged = merge(TaskArithmetic(scale=1), torch.zeros(6), tuned, purify=[Trim(density=(0.5, 0.01))])
    assert merged.tolist() == [1, -2, 2, 0, 0, 3]


def test_rescale_restores_the_l1_norm(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    update = merge(TaskArithmetic(scale=1), base, tuned[:1], purify=[Trim(density=0.3, rescale=True)]) - base
    torch.testing.assert_close(update.abs().sum(), (tuned[0] - base).abs().sum(), rtol=1e-5, atol=0)


def test_trim_then_elect_is_mergekits_ties(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    whole = Ties(style="mergekit", weight=1.0, density=0.3)
    elect = Ties(style="mergekit", weight=1.0, density=1)
    assert torch.equal(merge(whole, base, tuned), merge(elect, base, tuned, purify=[Trim(density=0.3)]))


def test_two_magnitude_selections_are_refused() -> None:
    info = TensorInfo(name="w", shape=(10,), tasks=2)
    for purify, combine in (([Trim()], Ties()), ([Trim(), Trim()], TaskArithmetic())):
        with pytest.raises(RecipeError, match="purify trim: two magnitude selections"):
            chain_rule(purify, combine, info)
    assert chain_rule([Trim(density=1)], Ties(), info).top == (3, 3)
