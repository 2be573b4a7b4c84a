"""breadcrumbs and breadcrumbs_ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.methods.base import TensorInfo
from pymerge.methods.breadcrumbs import Breadcrumbs
from pymerge.methods.breadcrumbs_ties import BreadcrumbsTies
from tests.methods.conftest import Merge

TUNED = [Tensor([[9, -8, 7, 6, 5], [1, 2, -3, 4, 0]])]


def info(*shape: int) -> TensorInfo:
    return TensorInfo(name="w", shape=shape, tasks=1)


def test_authors_select_in_each_row(merge: Merge) -> None:
    merged = merge(Breadcrumbs(density=0.4, gamma=0.2, scale=1), torch.zeros(2, 5), TUNED)
    assert merged.tolist() == [[0, -8, 7, 0, 0], [0, 2, -3, 0, 0]]


def test_mergekit_selects_in_the_whole_tensor(merge: Merge) -> None:
    method = Breadcrumbs(style="mergekit", weight=1.0, density=0.5, gamma=0.2)
    assert merge(method, torch.zeros(2, 5), TUNED).tolist() == [[0, 0, 7, 6, 5], [0, 0, -3, 4, 0]]


@pytest.mark.parametrize(
    ("density", "gamma", "skip", "top"),
    [(0.5, 0.2, 20, 70), (0.85, 0.3, 15, 100), (0.9, 0.001, 0, 90), (0.001, 0.1, 10, 10)],
)
def test_mergekit_counts(density: float, gamma: float, skip: int, top: int) -> None:
    rule = Breadcrumbs(style="mergekit", weight=1.0, density=density, gamma=gamma).rule(info(10, 10))
    assert (rule.skip, rule.top, rule.row_length) == ((skip,), (top,), None)


def test_density_one_keeps_everything_in_mergekit() -> None:
    rule = Breadcrumbs(style="mergekit", weight=1.0).rule(info(10, 10))
    assert rule.skip is None and rule.top is None


@pytest.mark.parametrize(("gamma", "top"), [(0.01, 0), (0.02, 81)])
def test_version_0_1_4_keeps_nothing_where_no_entry_is_dropped(gamma: float, top: int) -> None:
    rule = Breadcrumbs(style="mergekit-0.1.4", weight=1.0, density=0.8, gamma=gamma).rule(info(99))
    assert rule.top is not None and (rule.top[0] - (rule.skip or (0,))[0] == 0) is (top == 0)


def test_scalar_is_kept_whole_by_the_authors(merge: Merge) -> None:
    assert merge(Breadcrumbs(scale=1), torch.tensor(0.0), [torch.tensor(3.0)]).item() == 3.0


def test_rows_too_short_for_one_entry_keep_nothing(merge: Merge) -> None:
    assert merge(Breadcrumbs(scale=1), torch.zeros(2, 3), [torch.ones(2, 3)]).tolist() == [[0] * 3] * 2


def test_ties_variant_elects_among_the_middle_entries(merge: Merge) -> None:
    tuned = [Tensor([9, 3, -2, 1]), Tensor([1, -4, -3, 9])]
    method = BreadcrumbsTies(density=0.5, gamma=0.25)
    # The middle entries are (., 3, -2, .) and (., -4, -3, .): the first column of them cancels to -1.
    assert merge(method, torch.zeros(4), tuned).tolist() == [0, -4, -5, 0]
    weighted = BreadcrumbsTies(density=0.5, gamma=0.25, weight=(2.0, 1.0), normalize=True)
    assert merge(weighted, torch.zeros(4), tuned).tolist() == pytest.approx([0, 3, -7 / 3, 0])


def test_rescale_restores_the_l1_norm(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    method = BreadcrumbsTies(density=0.5, gamma=0.1, rescale=True)
    update = merge(method, base, tuned[:1]) - base
    torch.testing.assert_close(update.abs().sum(), (tuned[0] - base).abs().sum(), rtol=1e-5, atol=0)
