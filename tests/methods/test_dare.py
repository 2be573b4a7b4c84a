"""The purify step dare and the methods dare_linear and dare_ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pymerge.errors import RecipeError
from pymerge.methods.base import TensorInfo, chain_rule
from pymerge.methods.dare import Dare
from pymerge.methods.dare_linear import DareLinear
from pymerge.methods.dare_ties import DareTies
from pymerge.methods.task_arithmetic import TaskArithmetic
from pymerge.methods.ties import Ties
from pymerge.methods.trim import Trim
from pymerge.ops.delta_rule import mask_key
from tests.methods.conftest import Merge

INFO = TensorInfo(name="w", shape=(10, 10), tasks=2, seed=3)


def test_mask_is_keyed_by_seed_name_and_task() -> None:
    rule = DareLinear().rule(INFO)
    assert rule.keep == (0.5, 0.5) and rule.keys == (mask_key(3, "w", 0), mask_key(3, "w", 1))
    assert DareLinear(density=1).rule(INFO).keep is None


def test_authors_divide_by_density_so_the_mean_is_kept(merge: Merge) -> None:
    ones = torch.ones(200, 200)
    merged = merge(DareLinear(density=0.25, scale=1), torch.zeros(200, 200), [ones])
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    kept = float((merged != 0).float().mean())
    assert abs(kept - 0.25) < 5 * (0.25 * 0.75 / 40000) ** 0.5


def test_mergekit_restores_the_l1_norm(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    method = DareLinear(style="mergekit", weight=1.0, density=0.4)
    update = merge(method, base, tuned[:1]) - base
    torch.testing.assert_close(update.abs().sum(), (tuned[0] - base).abs().sum(), rtol=1e-5, atol=0)


def test_without_rescale_entries_are_kept_as_they_are(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    merged = merge(DareLinear(density=0.5, rescale=False, scale=1), base, tuned[:1])
    kept = merged != base
    torch.testing.assert_close(merged[kept], tuned[0][kept], rtol=0, atol=5e-7)
    assert 0.4 < float(kept.float().mean()) < 0.6


def test_seed_and_name_change_the_mask_and_nothing_else_does(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    method = DareLinear(scale=1)
    first = merge(method, base, tuned)
    assert torch.equal(first, merge(method, base, tuned))
    assert not torch.equal(first, merge(method, base, tuned, seed=1))
    assert not torch.equal(first, merge(method, base, tuned, name="v"))


@pytest.mark.parametrize("style", ["authors", "mergekit"])
def test_purify_dare_then_sum_is_dare_linear(style: Any, merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    whole = merge(DareLinear(style=style, weight=1.0, density=0.4, scale=0.5), base, tuned)
    steps = merge(TaskArithmetic(scale=0.5), base, tuned, purify=[Dare(style=style, density=0.4)])
    assert torch.equal(whole, steps)


def test_purify_dare_then_ties_is_the_authors_dare_ties(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    whole = merge(DareTies(density=0.6, trim=0.3, scale=1), base, tuned)
    steps = merge(Ties(density=0.3, merge_func="sum"), base, tuned, purify=[Dare(density=0.6)])
    assert torch.equal(whole, steps)


def test_mergekit_dare_ties_elects_without_trimming(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    whole = merge(DareTies(style="mergekit", weight=1.0, density=0.6), base, tuned)
    elect = Ties(style="mergekit", weight=1.0, density=1, normalize=False)
    assert torch.equal(whole, merge(elect, base, tuned, purify=[Dare(style="mergekit", density=0.6)]))


def test_purify_gives_the_masked_task_vectors(tensors: Any) -> None:
    from pymerge.methods.base import TaskGroup

    base, tuned = tensors
    info = TensorInfo(name="w", shape=tuple(base.shape), tasks=3)
    vectors = Dare(density=0.5).purify(TaskGroup(info=info, base=base, tuned=tuple(tuned)))
    for vector, t in zip(vectors, tuned, strict=True):
        kept = vector != 0
        assert torch.equal(vector[kept], 2 * (t - base)[kept]) and 0.4 < float(kept.float().mean()) < 0.6


def test_order_of_mask_and_trim() -> None:
    plain = TaskArithmetic()
    masked_first = chain_rule([Dare(), Trim(density=0.5)], plain, INFO)
    trimmed_first = chain_rule([Trim(density=0.5), Dare()], plain, INFO)
    assert masked_first.mask_first and not trimmed_first.mask_first
    assert masked_first.top == trimmed_first.top == (50, 50) and masked_first.rescale == trimmed_first.rescale == "keep"


@pytest.mark.parametrize(
    ("purify", "combine", "message"),
    [
        ([Dare(), Dare()], TaskArithmetic(), "two random masks"),
        ([Dare()], DareLinear(), "two random masks"),
        ([Dare()], Ties(style="mergekit", weight=1.0, density=0.5, rescale=True), "two rescalings"),
        ([Dare(rescale=False)], Ties(style="mergekit", weight=1.0, density=0.5, rescale=True), "would undo"),
        ([Dare(style="mergekit")], Ties(), "L1 rescale of style mergekit"),
        ([Trim()], DareLinear(style="mergekit", weight=1.0, density=0.5), "L1 rescale of the random mask"),
    ],
)
def test_chains_that_have_no_meaning(purify: Any, combine: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        chain_rule(purify, combine, INFO)


def test_a_mask_that_keeps_all_is_no_mask(merge: Merge, tensors: Any) -> None:
    base, tuned = tensors
    assert torch.equal(merge(Ties(), base, tuned, purify=[Dare(density=1)]), merge(Ties(), base, tuned))
