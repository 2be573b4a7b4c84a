from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymerge.errors import RecipeError
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.dare import Dare
from pymerge.methods.della_linear import PART, DellaLinear
from pymerge.ops._random import draws, philox4x32
from pymerge.ops._reference import random_mask
from pymerge.ops.delta_rule import mask_key
from tests.methods.conftest import Merge

ZERO = torch.zeros(40, 300)


def noise(shape: tuple[int, ...] = (40, 300), seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Keep probability of each entry of a matrix, float64, by counting what is smaller in its row."""
    magnitude, n = delta.abs(), delta.shape[1]
    index = torch.arange(n)
    below = (magnitude.unsqueeze(1) < magnitude.unsqueeze(2)).sum(2)
    later = ((magnitude.unsqueeze(1) == magnitude.unsqueeze(2)) & (index > index.unsqueeze(1))).sum(2)
    return density - epsilon + 2 * epsilon * (below + later).double() / (n - 1)


def uniform(key: int, entries: int) -> Tensor:
    """The 32 random bits of each entry: the words of planes 4 (high half) and 5 (low half), eight entries a counter."""
    halves = []
    for plane in (4, 5):
        words = torch.stack(philox4x32(key, torch.arange((entries + 7) // 8), plane), dim=1)
        halves.append(torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()[:entries])
    return halves[0] << 16 | halves[1]


def reference(delta: Tensor, density: float, epsilon: float, key: int) -> tuple[Tensor, Tensor]:
    """(the task vector with its dropped entries zero, the probabilities)"""
    p = probabilities(delta, density, epsilon)
    kept = uniform(key, delta.numel()).view_as(delta) < (p * 2**32).floor()
    return torch.where(kept, delta.double(), 0.0), p


@pytest.mark.parametrize("style", ["authors", "mergekit"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_sum_of_what_is_kept(style: Any, rescale: bool, normalize: bool, merge: Merge) -> None:
    g = torch.Generator().manual_seed(5)
    base = torch.randn(40, 300, generator=g)
    tuned = [base + 0.1 * torch.randn(40, 300, generator=g) for _ in range(3)]
    weight, density, epsilon = (0.5, -1.0, 2.0), (0.4, 0.7, 0.5), (0.3, 0.1, 0.0)
    method = DellaLinear(
        style=style, weight=weight, density=density, epsilon=epsilon, rescale=rescale, normalize=normalize, scale=0.7
    )
    update = torch.zeros(40, 300, dtype=torch.float64)
    for t in range(3):
        delta = tuned[t] - base
        kept, p = reference(delta, density[t], epsilon[t], mask_key(11, "w", t))
        factor = delta.double().abs().sum() / kept.abs().sum() if style == "mergekit" else 1 / p
        update += weight[t] * kept * (factor if rescale else 1.0)
    expected = base + 0.7 * update / (sum(weight) if normalize else 1.0)
    merged = merge(method, base, tuned, seed=11).double()
    torch.testing.assert_close(merged, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("density, epsilon", [(0.4, 0.2), (0.85, 0.1)])
def test_share_kept_of_each_decile(density: float, epsilon: float, merge: Merge) -> None:
    delta = noise((200, 500))
    kept = merge(DellaLinear(density=density, epsilon=epsilon, rescale=False), torch.zeros_like(delta), [delta]) != 0
    rank = delta.abs().argsort(dim=1).argsort(dim=1)
    for decile in range(10):
        inside = (rank >= 50 * decile) & (rank < 50 * (decile + 1))
        p = density - epsilon + 2 * epsilon * (50 * decile + 24.5) / 499
        assert abs(float(kept[inside].double().mean()) - p) <= 5 * (p * (1 - p) / 10_000) ** 0.5


def test_own_probability_keeps_the_mean_and_l1_keeps_the_norm(merge: Merge) -> None:
    delta = noise((200, 500))
    own, norm = (
        merge(DellaLinear(style=style, weight=1.0, density=0.4, epsilon=0.3), torch.zeros_like(delta), [delta])
        for style in ("authors", "mergekit")  # type: ignore[arg-type]
    )
    assert abs(float((own - delta).double().sum())) <= 5 * float((own - delta).double().norm())
    torch.testing.assert_close(norm.abs().sum(), delta.abs().sum(), rtol=1e-6, atol=0)


def test_equal_magnitudes_are_ranked_by_index() -> None:
    method = DellaLinear(density=0.5, epsilon=0.4)
    ones = torch.ones(4000, 5)
    info = TensorInfo(name="w", shape=(4000, 5), tasks=1)
    merged = method.combine(TaskGroup(info=info, base=None, tuned=(ones,)))
    share = (merged != 0).double().mean(0)
    assert bool(((share - torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1])).abs() < 5 * (0.25 / 4000) ** 0.5).all())


@pytest.mark.parametrize("style", ["authors", "mergekit"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (4, 0), (30, 1), (1, 30), (5, 6, 3, 2)], ids=str)
def test_odd_shapes(style: Any, shape: tuple[int, ...], merge: Merge) -> None:
    method = DellaLinear(style=style, weight=1.0, density=0.6, epsilon=0.3)
    merged = merge(method, torch.ones(shape), [noise(shape), noise(shape, 4)])
    assert merged.shape == shape and bool(torch.isfinite(merged).all())


def test_rows_of_one_entry_are_kept_with_the_density(merge: Merge) -> None:
    delta = noise((5000, 1))
    merged = merge(DellaLinear(density=0.3, epsilon=0.2), torch.zeros_like(delta), [delta])
    kept = merged != 0
    assert abs(float(kept.double().mean()) - 0.3) <= 5 * (0.21 / 5000) ** 0.5
    torch.testing.assert_close(merged[kept], delta[kept] / 0.3)


def test_a_vector_is_one_row_and_kernels_are_ranked_along_dimension_one(merge: Merge) -> None:
    method = DellaLinear(density=0.5, epsilon=0.3)
    delta = noise((1, 400))
    vector = merge(method, torch.zeros(400), [delta[0]])
    assert torch.equal(vector, merge(method, torch.zeros(1, 400), [delta])[0])
    kernels = noise((3, 200, 2, 2))
    kept = merge(method, torch.zeros_like(kernels), [kernels])
    matrix = kernels.movedim(1, -1).reshape(12, 200)
    p = probabilities(matrix, 0.5, 0.3).view(3, 2, 2, 200).movedim(-1, 1)
    bits = uniform(mask_key(0, "w", 0), kernels.numel()).view_as(kernels)
    expected = torch.where(bits < (p * 2**32).floor(), kernels / p, 0.0)
    torch.testing.assert_close(kept.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("style", ["authors", "mergekit"])
def test_nothing_depends_on_blocks(style: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, delta = noise(seed=1), noise(seed=2)
    method = DellaLinear(style=style, weight=0.3, density=0.4, epsilon=0.2)
    info = TensorInfo(name="w", shape=(40, 300), tasks=2)
    tuned = (base + delta, base - 2 * delta)
    whole = method.combine(TaskGroup(info=info, base=base, tuned=tuned))
    assert 40 * 300 < PART
    monkeypatch.setattr("pymerge.methods._della_mask.PART", 900)  # three rows at a time
    torch.testing.assert_close(method.combine(TaskGroup(info=info, base=base, tuned=tuned)), whole, rtol=1e-6, atol=0)
    if method.unit == "rows":
        parts = [
            method.combine(
                TaskGroup(info=info, base=base[i : i + 7], tuned=tuple(t[i : i + 7] for t in tuned), first=300 * i)
            )
            for i in range(0, 40, 7)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_draws_are_those_of_seed_name_and_task(merge: Merge) -> None:
    delta, method = noise(), DellaLinear(density=0.5, epsilon=0.2)
    masks = [merge(method, ZERO, [delta], name=name, seed=seed) != 0 for name, seed in (("w", 0), ("w", 1), ("v", 0))]
    assert torch.equal(masks[0], merge(method, ZERO, [delta]) != 0)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = float((masks[i] & masks[j]).double().mean())
        assert abs(both - (0.25 + 0.2**2 / 3)) <= 5 * (0.2 / 12_000) ** 0.5  # independent, given the rank
    dare = random_mask(0.5, mask_key(0, "w", 0), torch.arange(12_000)).view(40, 300)
    assert abs(float((masks[0] & dare).double().mean()) - 0.25) <= 5 * (0.19 / 12_000) ** 0.5


def test_dare_in_front_is_an_independent_draw(merge: Merge) -> None:
    delta = noise((100, 300)).abs()
    merged = merge(DellaLinear(density=0.5, epsilon=0.2), torch.zeros(100, 300), [delta], purify=[Dare(density=0.5)])
    assert abs(float((merged - delta).double().mean())) <= 5 * float((merged - delta).double().std()) / 30_000**0.5


def test_runs_of_draws_are_the_draws() -> None:
    from pymerge.ops._random import run_of_draws

    for first, count in ((0, 16), (3, 1), (5, 40), (8, 0)):
        run = run_of_draws(2**63 + 5, first, count, 4, torch.device("cpu"))
        assert torch.equal(run, draws(2**63 + 5, torch.arange(first, first + count), 4))


@pytest.mark.parametrize("density, expected", [(1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("style", ["authors", "mergekit"])
def test_ends_of_the_density(style: Any, density: float, expected: float, merge: Merge) -> None:
    delta = noise()
    merged = merge(DellaLinear(style=style, weight=1.0, density=density), ZERO, [delta])
    assert torch.equal(merged, expected * delta)


def test_inputs_of_mixed_dtypes_are_widened(merge: Merge) -> None:
    method, stored = DellaLinear(), [noise(seed=1).bfloat16(), noise(seed=2).half(), noise(seed=3)]
    wide = [x.float() for x in stored]
    assert torch.equal(merge(method, stored[0], stored[1:]), merge(method, wide[0], wide[1:]))


@pytest.mark.parametrize("given", [{"density": 0.1}, {"density": 0.9}, {"density": (1.0, 0.5), "epsilon": (0.1, 0.5)}])
def test_probabilities_lie_between_zero_and_one(given: Any) -> None:
    with pytest.raises(RecipeError, match=r"epsilon: density 0\.\d \+- epsilon 0\.\d+ must lie between 0 and 1"):
        DellaLinear(**given)
    DellaLinear(**given | {"epsilon": 0.05})


def test_memory() -> None:
    info = TensorInfo(name="w", shape=(4096, 4096), tasks=3)
    authors, mergekit = (DellaLinear(style=s, weight=1.0).workspace(info) for s in ("authors", "mergekit"))  # type: ignore[arg-type]
    assert authors < 30e6 and mergekit - authors == 3 * 4096**2
