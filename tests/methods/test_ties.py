from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.base import TensorInfo
from pymerge.methods.ties import Ties
from tests.methods.conftest import Merge

INFO = TensorInfo(name="w", shape=(10, 10), tasks=2)
ROWS = Tensor([[4, -3, 2, 1, 0, -5], [-1, -2, 3, 1, 0, 6], [0, 1, 0, -4, 2, -1]])


def test_counts_of_the_two_styles() -> None:
    assert Ties(density=(0.2, 0.5)).rule(INFO).top == (21, 51) and Ties().rule(INFO).keep_ties
    mergekit = Ties(style="mergekit", weight=1.0, density=(0.299, 0.001)).rule(INFO)
    assert mergekit.top == (29, 1) and not mergekit.keep_ties
    assert Ties(style="mergekit", weight=1.0, density=0).rule(INFO).top == (0, 0)
    assert Ties(density=1).rule(INFO).top is None


@pytest.mark.parametrize(
    ("merge_func", "expected"),
    [("mean", [4, -2.5, 2.5, -4, 2, 6]), ("sum", [4, -5, 5, -4, 2, 6]), ("max", [4, -3, 3, -4, 2, 6])],
)
def test_authors_merge_functions(merge_func: Any, expected: list[float], merge: Merge) -> None:
    method = Ties(density=1, merge_func=merge_func, scope="tensor")
    # Column sums 3, -4, 5, -2, 2, 0; the majority of signs is positive, so the last column keeps its 6.
    assert merge(method, torch.zeros(6), list(ROWS)).tolist() == expected


def test_authors_keep_ties_at_the_threshold_and_mergekit_the_first(merge: Merge) -> None:
    tuned = [Tensor([1, -2, 2, 2, 1])]
    zero = torch.zeros(5)
    assert merge(Ties(density=0.2, scope="tensor"), zero, tuned).tolist() == [0, -2, 2, 2, 0]
    assert merge(Ties(style="mergekit", weight=1.0, density=0.4), zero, tuned).tolist() == [0, -2, 2, 0, 0]


def test_mergekit_divides_by_the_weights_that_agree(merge: Merge) -> None:
    method = Ties(style="mergekit", weight=(1.0, 0.5, 2.0), density=1)
    # Weighted columns: (4, -.5, 0), (-3, -1, 2), (2, 1.5, 0), (1, .5, -8), (0, 0, 4), (-5, 3, -2).
    expected = [4 / 1, -4 / 1.5, 3.5 / 1.5, -8 / 2, 4 / 2, -7 / 3]
    merged = merge(method, torch.zeros(6), list(ROWS))
    assert merged.tolist() == pytest.approx(expected, abs=1e-6)
    plain = Ties(style="mergekit", weight=(1.0, 0.5, 2.0), density=1, normalize=False, scale=0.5)
    assert merge(plain, torch.zeros(6), list(ROWS)).tolist() == [2, -2, 1.75, -4, 2, -3.5]


def test_mergekit_elects_plus_where_the_sum_cancels(merge: Merge) -> None:
    tuned = [Tensor([1.0, -2.0]), Tensor([-1.0, 2.0])]
    method = Ties(style="mergekit", weight=1.0)
    assert merge(method, torch.zeros(2), tuned).tolist() == [1, 2]


def test_rescale_restores_the_l1_norm(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    method = Ties(style="mergekit", weight=1.0, density=0.3, rescale=True)
    update = merge(method, base, tuned[:1]) - base
    torch.testing.assert_close(update.abs().sum(), (tuned[0] - base).abs().sum(), rtol=1e-5, atol=0)


def test_scope_decides_what_is_surveyed() -> None:
    assert Ties().survey_scope == "model" and Ties(scope="tensor").survey_scope == "tensor"
    assert Ties(style="mergekit", weight=1.0).survey_scope == "tensor"
    assert Ties(style="mergekit", weight=1.0, scope="global", density=0.5).rule(INFO).keep_ties
