"""One group's best permutation against all that there are, and as its group allows."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from torch import Tensor

from pymerge.align import Heads, Permutations, Spec, Units
from pymerge.align.match import match
from pymerge.align.random_permutations import draw


def best_in_blocks(scores: Tensor, blocks: int) -> float:
    """The largest mean over all permutations of blocks and of units within them."""
    n = len(scores)
    width = n // blocks
    inner = list(permutations(range(width)))
    best = -float("inf")
    for order in permutations(range(blocks)):
        total = 0.0
        for j, k in enumerate(order):
            block = scores[j * width : (j + 1) * width, k * width : (k + 1) * width]
            total += max(float(block[range(width), list(p)].double().sum()) for p in inner)
        best = max(best, total / n)
    return best


@pytest.mark.parametrize(("n", "blocks"), [(5, 1), (6, 3), (6, 2), (4, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_units_reach_the_best_of_all(n, blocks, seed):
    scores = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    found = match(Units(name="g", size=n, entries=(), blocks=blocks), {"units": scores}, threshold=0)
    assert found.values[0] == pytest.approx(best_in_blocks(scores, blocks), abs=1e-6)
    assert found.values[0] == pytest.approx(float(scores[torch.arange(n), found.index["units"]].mean()), abs=1e-6)
    assert found.gain == pytest.approx(found.values[0] - float(scores.diagonal().mean()), abs=1e-6)
    assert found.gap == pytest.approx(0, abs=1e-6)


def heads(heads: int, kv_heads: int, width: int, rotary: int) -> Heads:
    return Heads(name="attention", heads=heads, kv_heads=kv_heads, width=width, rotary=rotary, entries=())


def drawn(group: Heads, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shared = ("q", "o") if group.heads > group.kv_heads else ()
    return {v: torch.randn(n, n, generator=generator) for v, n in group.views().items() if v in ("k", "v", *shared)}


def value(group: Heads, scores: dict, index: dict) -> float:
    """Mean similarity of q and k, plus that of v and o."""
    total = sum(
        float(scores[view][torch.arange(n := len(i)), i].double().sum()) for view, i in index.items() if view in scores
    )
    del n
    return total / (group.kv_heads * group.width) / 2


def valid(group: Heads, index: dict) -> None:
    both = {view: torch.stack([torch.arange(len(i)), i]) for view, i in index.items()}
    Permutations(spec=Spec(groups=(group,)), index={group.name: both}, models=("a", "b")).check()


def all_of(group: Heads):
    """Every permutation of heads without grouped queries, as (k, v) index vectors."""
    k, d, fixed = group.kv_heads, group.width, group.rotary
    moving = [tuple(range(fixed)) + tuple(fixed + i for i in p) for p in permutations(range(d - fixed))]
    values = list(permutations(range(d)))
    for order in permutations(range(k)):
        for of_k in product(moving, repeat=k):
            for of_v in product(values, repeat=k):
                yield tuple(
                    torch.tensor([order[j] * d + c for j in range(k) for c in inner[j]]) for inner in (of_k, of_v)
                )


@pytest.mark.parametrize("rotary", [0, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_tied_heads_reach_the_best_of_all(rotary, seed):
    group = heads(2, 2, 3, rotary)
    scores = drawn(group, seed)
    found = match(group, scores, threshold=0)
    valid(group, dict(found.index))
    best = max(value(group, scores, {"k": k, "v": v}) for k, v in all_of(group))
    assert sum(found.values) / 2 == pytest.approx(best, abs=1e-6)
    assert value(group, scores, dict(found.index)) == pytest.approx(best, abs=1e-6)
    assert torch.equal(found.index["q"], found.index["k"]) and torch.equal(found.index["o"], found.index["v"])


@pytest.mark.parametrize("rotary", [0, 2, 6])
@pytest.mark.parametrize("seed", range(4))
def test_grouped_queries_are_found_again(rotary, seed):
    """Similarities of a hidden permutation under noise: key-value heads, query heads and channels all come back."""
    group = heads(6, 2, 6, rotary)
    hidden = draw(group, torch.Generator().manual_seed(seed))
    scores = {view: 0.1 * noise for view, noise in drawn(group, seed).items()}
    for view, index in hidden.items():
        scores[view][torch.arange(len(index)), index] += 0.5
    found = match(group, scores, threshold=0)
    valid(group, dict(found.index))
    for view, index in hidden.items():
        assert torch.equal(found.index[view], index), view
    assert sum(found.values) / 2 == pytest.approx(value(group, scores, hidden), abs=1e-6)
    assert found.gap is None and match(group, scores, threshold=10).gap is None


@pytest.mark.parametrize("seed", range(4))
def test_grouped_queries_are_valid_and_no_worse_than_nothing(seed):
    group = heads(6, 2, 4, 0)
    scores = drawn(group, seed)
    found = match(group, scores, threshold=0)
    valid(group, dict(found.index))
    assert sum(found.values) / 2 == pytest.approx(value(group, scores, dict(found.index)), abs=1e-6)
    identity = {view: torch.arange(n) for view, n in group.views().items()}
    assert found.gain == pytest.approx(sum(found.values) / 2 - value(group, scores, identity), abs=1e-6)
    assert found.gain >= 0


def test_equal_similarities_move_nothing():
    for group in (Units(name="g", size=12, entries=(), blocks=3), heads(4, 4, 3, 0), heads(4, 2, 3, 0)):
        found = match(group, {view: torch.ones(n, n) for view, n in group.views().items()}, threshold=1e-6)
        assert all(torch.equal(index, torch.arange(len(index))) for index in found.index.values())
