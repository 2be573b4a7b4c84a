"""PAVE against its specification in float64: formula, search, invariants, edges."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pymerge.errors import NonFinite, RecipeError
from pymerge.methods._pave_subspace import Ridge, activated, largest_at_most, purified, ranks, spectrum
from pymerge.methods.base import TaskGroup
from pymerge.methods.pave import Pave
from tests.methods.moments import group_of, moments_of, relative
from tests.methods.pave_reference import covariance, greedy, normalised, truncated

SHAPES = [(20, 32), (32, 20), (24, 24)]
FIXED = Ridge(start=0.1, relative=False, max_condition=0.0)


def problem(m: int, n: int, counts: Sequence[int], seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Base, tuned weights, inputs of different spectra."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(m, n, generator=g) / n**0.5
    tuned = [base + 0.1 * torch.randn(m, n, generator=g) / n**0.5 for _ in counts]
    rows = []
    for t, count in enumerate(counts):
        mix = torch.linalg.qr(torch.randn(n, n, generator=g))[0] * torch.logspace(0.5, -0.5 - 0.2 * t, n)
        rows.append(torch.randn(count, n, generator=g) @ mix)
    return base, tuned, rows


def formula(base: Tensor, w: Tensor, x: Tensor, rank: int, eps: float = 0.1) -> Tensor:
    return truncated(w, covariance(x, eps), rank) - base.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [7, 60])  # the rows are kept, or their sum
def test_is_the_formula(shape: tuple[int, int], count: int) -> None:
    base, tuned, rows = problem(*shape, [count, count + 1])
    group = group_of(base, tuned, rows)
    found = Pave(rank_ratio=0.85, allocation="none").purify(group)
    rank = round(0.85 * min(shape))
    for tau, w, x in zip(found, tuned, rows, strict=True):
        assert tau.dtype == torch.float32 and relative(tau, formula(base, w, x, rank)) < 1e-6
    assert group.notes.facts == {"pave_ranks": [rank, rank], "pave_eps": [0.1, 0.1]}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_metrics(shape: tuple[int, int]) -> None:
    base, tuned, rows = problem(*shape, [60])
    c = covariance(rows[0], 0.1)
    eye = torch.eye(len(c), dtype=torch.float64)
    factors = {"none": eye, "chol": torch.linalg.cholesky(c), "diag": torch.diag(c.abs().mean(1)), "cov": c}
    for metric, factor in factors.items():
        (tau,) = Pave(rank_ratio=0.7, allocation="none", metric=metric).purify(group_of(base, tuned, rows))  # type: ignore[arg-type]
        expected = truncated(tuned[0], factor, round(0.7 * min(shape))) - base.double()
        assert relative(tau, expected) < 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_search_is_the_greedy_one(seed: int) -> None:
    """With exact ties, models of zeros, from one direction up."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(40):
        tasks, k = rng.randint(1, 6), rng.randint(1, 24)
        z = torch.rand(tasks, k, generator=g, dtype=torch.float64).sort(dim=1, descending=True).values
        if rng.random() < 0.5:
            z = (z * 5).round() / 5
        z[:, 0] = 1.0
        if rng.random() < 0.2:
            z[rng.randrange(tasks)] = torch.nan
        ratio = rng.choice([0.0, 1.0, 0.5, 0.875, 0.984375, rng.random()])
        assert ranks(list(z), ratio) == greedy(list(z), ratio)


def test_search_examples() -> None:
    one = torch.linspace(1, 0.1, 16, dtype=torch.float64)
    assert ranks([one], 0.875) == [13]  # one below what rounding would give
    same = torch.linspace(1, 0.1, 17, dtype=torch.float64)
    assert ranks([same] * 3, 0.8) == [13, 13, 14]  # ties: the first model loses first
    assert ranks([same] * 3, 1.0) == [17] * 3


@pytest.mark.parametrize("allocation", ["model_mean", "per_layer"])
def test_allocations(allocation: str) -> None:
    layers = [problem(20, 32, [60] * 3, seed=1), problem(32, 20, [60] * 3, seed=2), problem(16, 16, [60] * 3, seed=3)]
    groups = [group_of(*layer, name=f"l{i}") for i, layer in enumerate(layers)]
    z = [[normalised(w, covariance(x, 0.1)) for w, x in zip(ws, xs, strict=True)] for _, ws, xs in layers]
    searched = [greedy(one, 0.75) for one in z]
    step = Pave(rank_ratio=0.75, allocation=allocation)  # type: ignore[arg-type]
    assert step.asks == (allocation == "model_mean")
    if step.asks:
        answers = [step.survey(group) for group in groups]
        assert [list(found) for answer in answers for _, found in answer.values()] == searched
        step = step.decide(step.join(step.join(answers[2], answers[0]), answers[1]))
        share = [sum(column) / 56 for column in zip(*searched, strict=True)]
        kept = [[max(1, round(k * s)) for s in share] for k in (20, 20, 16)]
    else:
        kept = searched
    assert kept != [[round(0.75 * k)] * 3 for k in (20, 20, 16)]
    for group, (base, tuned, rows), expected in zip(groups, layers, kept, strict=True):
        for tau, w, x, rank in zip(step.purify(group), tuned, rows, expected, strict=True):
            assert relative(tau, formula(base, w, x, rank)) < 1e-6
        assert group.notes.facts["pave_ranks"] == expected


def test_a_step_that_still_asks_takes_its_matrix_alone() -> None:
    group = group_of(*problem(20, 32, [60] * 3))
    alone = Pave(rank_ratio=0.7).purify(group)
    layer = Pave(rank_ratio=0.7, allocation="per_layer").purify(group)
    assert all(torch.equal(a, b) for a, b in zip(alone, layer, strict=True))


def wide(w: Tensor, x: Tensor, rank: int, ridge: Ridge = FIXED) -> Tensor:
    """W_pur in float64, by the path of the method."""
    p, _ = activated(w.double(), moments_of(x.double()), "cov", None, ridge)
    u = w.double() - purified(w.double(), w.double().clone(), p, rank).double()
    return w.double() - u


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [7, 60])
def test_invariants(shape: tuple[int, int], count: int) -> None:
    """Orthogonal maps of outputs and inputs, scalings of C and W, order of rows; projection of rank r, nearest in C."""
    m, n = shape
    _, (w,), (x,) = problem(m, n, [count])
    w, x, k = w.double(), x.double(), min(shape)
    rank, g = k - 4, torch.Generator().manual_seed(5)
    pure = wide(w, x, rank)
    q = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0]
    o = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    bound = 3e-7  # the removed part is rounded to float32 once
    assert relative(wide(q @ w, x, rank), q @ pure) < bound
    assert relative(wide(w @ o.mT, x @ o.mT, rank), pure @ o.mT) < bound
    order = torch.randperm(n, generator=g)
    assert relative(wide(w[:, order], x[:, order], rank), pure[:, order]) < bound
    assert relative(wide(w, x * 30, rank, replace(FIXED, start=90.0)), pure) < bound
    assert relative(wide(w * 1e-3, x, rank), pure * 1e-3) < bound
    assert relative(wide(w, x[torch.randperm(count, generator=g)], rank), pure) < bound
    assert torch.equal(wide(w, x, k), w)
    s = torch.linalg.svdvals(pure)
    assert s[rank:].max() < 1e-6 * s[0] and pure.norm() <= w.norm()
    c = covariance(x, 0.1)
    lost = torch.linalg.svdvals(w @ c)[rank:].norm()
    assert abs(((w - pure) @ c).norm() / lost - 1) < 1e-5


def test_a_part_of_the_base_goes() -> None:
    base, _, rows = problem(20, 32, [60])
    (tau,) = Pave(rank_ratio=0.8, allocation="none").purify(group_of(base, [base], rows))
    assert relative(tau, formula(base, base, rows[0], 16)) < 1e-5 and tau.norm() > 0


def test_ridge() -> None:
    base, tuned, rows = problem(20, 32, [60])
    x = rows[0] * torch.logspace(0, -6, 32)
    group = group_of(base, tuned, [x])
    (tau,) = Pave(rank_ratio=0.8, allocation="none", eps=1e-6).purify(group)
    eps = group.notes.facts["pave_eps"][0]
    values = torch.linalg.eigvalsh(covariance(x, 0.0))
    assert (values[-1] + eps) / (values[0] + eps) <= 1e4 < (values[-1] + eps / 2) / (values[0] + eps / 2)
    assert relative(tau, formula(base, tuned[0], x, 16, eps)) < 1e-5
    fixed = group_of(base, tuned, [x])
    Pave(rank_ratio=0.8, allocation="none", eps=1e-6, max_condition=0).purify(fixed)
    assert fixed.notes.facts["pave_eps"] == [1e-6]
    for count in (7, 60):
        part = group_of(base, tuned, [rows[0][:count]])
        Pave(rank_ratio=0.8, allocation="none", eps=0.01, eps_mode="relative").purify(part)
        mean = float(covariance(rows[0][:count], 0.0).diagonal().mean())
        assert part.notes.facts["pave_eps"][0] / (0.01 * mean) in (pytest.approx(2.0**i, rel=1e-6) for i in range(12))


@pytest.mark.parametrize("decay, most", [(0.0, 1.0 + 300**0.5), (0.5, 3.0), (1.0, 1.5), (4.0, 1.0 + 1e-4)])
def test_bound_on_the_largest_eigenvalue(decay: float, most: float) -> None:
    """Never below, never above what the entries outside of 16 directions add, near where few directions carry most."""
    g = torch.Generator().manual_seed(7)
    q = torch.linalg.qr(torch.randn(300, 300, generator=g, dtype=torch.float64))[0]
    values = torch.arange(1, 301, dtype=torch.float64) ** -decay
    c = (q * values) @ q.mT
    assert 1.0 <= largest_at_most(c) <= most
    for limit in (5.0, 50.0):  # of the condition, with eps = 0.1: a loose bound leaves the question to a factorisation
        found = Ridge(start=0.1, relative=False, max_condition=limit).of(c, 1.0)
        assert found == next(e for e in (0.1 * 2**i for i in range(9)) if (1 + e) / (values[-1] + e) <= limit)
    assert largest_at_most(torch.zeros(4, 4, dtype=torch.float64)) == 0.0


def test_divisor_and_search_eps() -> None:
    base, tuned, rows = problem(20, 32, [60, 60])
    (tau, _) = Pave(rank_ratio=0.8, allocation="none", divisor=500).purify(group_of(base, tuned, rows))
    assert relative(tau, truncated(tuned[0], covariance(rows[0], 0.1, 500), 16) - base.double()) < 1e-6
    group = group_of(base, tuned, rows)
    found = Pave(rank_ratio=0.8, allocation="per_layer", search_eps=3.0)._searched(group)
    assert found == greedy([normalised(w, covariance(x, 3.0)) for w, x in zip(tuned, rows, strict=True)], 0.8)


def test_half_precision_is_widened() -> None:
    base, tuned, rows = problem(20, 32, [60])
    group = group_of(base.bfloat16(), [tuned[0].bfloat16()], rows)
    (tau,) = Pave(rank_ratio=0.8, allocation="none").purify(group)
    assert relative(tau, formula(base.bfloat16(), tuned[0].bfloat16(), rows[0], 16)) < 1e-6


def test_badly_conditioned_inputs_take_the_svd() -> None:
    base, tuned, rows = problem(20, 32, [400])
    x = rows[0].double() * torch.logspace(0, -4, 32)
    (tau,) = Pave(rank_ratio=0.8, allocation="none", eps=1e-12, max_condition=0).purify(group_of(base, tuned, [x]))
    assert relative(tau, formula(base, tuned[0], x, 16, 1e-12)) < 1e-4


@pytest.mark.parametrize("allocation", ["model_mean", "per_layer", "none"])
def test_edges(allocation: str) -> None:
    """No inputs to speak of, zero weights, identical models, one row or column: finite, and what the limit is."""
    base, tuned, rows = problem(12, 20, [60, 60])
    step = Pave(rank_ratio=0.75, allocation=allocation)  # type: ignore[arg-type]

    def run(group: TaskGroup) -> tuple[Tensor, ...]:
        found = step.purify(group)
        assert all(bool(torch.isfinite(tau).all()) for tau in found)
        return found

    silent = group_of(base, tuned, [torch.zeros(30, 20)] * 2)
    for tau, w, rank in zip(run(silent), tuned, silent.notes.facts["pave_ranks"], strict=True):
        assert relative(tau, truncated(w, torch.eye(20, dtype=torch.float64), rank) - base.double()) < 1e-6
    zero = run(group_of(base, [torch.zeros(12, 20), tuned[1]], rows))
    assert torch.equal(zero[0], -base)
    same = group_of(base, [tuned[0]] * 3, [rows[0]] * 3)
    run(same)
    if allocation != "none":
        assert same.notes.facts["pave_ranks"] == sorted(same.notes.facts["pave_ranks"])
    for shape in [(1, 20), (20, 1), (1, 1)]:
        run(group_of(*problem(*shape, [30, 40])))
    for size in (1e-18, 1e18):
        run(group_of(base * size, [w * size for w in tuned], rows))
    plain = group_of(base, tuned, None)
    assert all(torch.equal(tau, w - base) for tau, w in zip(run(plain), tuned, strict=True))
    assert plain.notes.facts == {"pave": "plain difference: no statistics"}
    whole = group_of(base, tuned, rows)
    assert all(torch.equal(tau, w - base) for tau, w in zip(Pave(rank_ratio=1.0).purify(whole), tuned, strict=True))


def test_wrong_values() -> None:
    with pytest.raises(RecipeError, match="the search shares one ratio"):
        Pave(rank_ratio=(0.9, 0.8))
    with pytest.raises(RecipeError, match="max_condition: must be above 1"):
        Pave(max_condition=0.5)
    base, tuned, rows = problem(12, 20, [60])
    with pytest.raises(RecipeError, match="make it the first purify step"):
        Pave().purify(group_of(None, [tuned[0] - base], rows))
    with pytest.raises(NonFinite):
        spectrum(torch.full((2, 2), torch.nan, dtype=torch.float64))
