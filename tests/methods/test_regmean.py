"""RegMean against its formula in float64, the released results, and its edges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pymerge.errors import RecipeError
from pymerge.methods.regmean import RegMean
from tests.golden.cases import FOLDER, Golden, read_golden
from tests.methods.moments import group_of, read_acts, read_tensor, relative

FILES = sorted((FOLDER / "regmean").glob("*.safetensors"))


def problem(m: int, n: int, counts: Sequence[int], seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Base, tuned weights, and inputs with features of different size that are correlated."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(m, n, generator=g)
    tuned = [base + 0.1 * torch.randn(m, n, generator=g) for _ in counts]
    mix = torch.randn(n, n, generator=g) * torch.logspace(0, -1, n)
    return base, tuned, [torch.randn(count, n, generator=g) @ mix for count in counts]


def formula(tuned: Sequence[Tensor], rows: Sequence[Tensor], a: float) -> Tensor:
    """(sum W_t G~_t)(sum G~_t)^-1 by an explicit inverse, float64."""
    total, weighted = torch.tensor(0.0), torch.tensor(0.0)
    for w, x in zip(tuned, rows, strict=True):
        gram = x.double().mT @ x.double() / len(x)
        gram = a * gram + (1 - a) * torch.diag(gram.diagonal())
        total, weighted = total + gram, weighted + w.double() @ gram
    return weighted @ torch.linalg.inv(total)


@pytest.mark.parametrize("a", [0.0, 0.1, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (1, 16), (16, 1)], ids=str)
def test_is_the_formula(shape: tuple[int, int], a: float) -> None:
    base, tuned, rows = problem(*shape, [40, 64, 90])
    group = group_of(base, tuned, rows)
    update = RegMean(alpha=a, scale=0.7).combine(group)
    expected = formula(tuned, rows, a) - base.double()
    assert update.dtype == torch.float32 and relative(update, 0.7 * expected) < 1e-6
    assert group.notes.facts["regmean_ridge"] == 0.0 and group.notes.facts["regmean_condition"] >= 1.0


def test_inputs_in_half_precision() -> None:
    base, tuned, rows = problem(12, 20, [40, 64])
    half = [w.bfloat16() for w in tuned]
    update = RegMean().combine(group_of(base.bfloat16(), half, rows))
    assert relative(update, formula(half, rows, 0.95) - base.bfloat16().double()) < 1e-6


def test_minimises_the_output_error() -> None:
    base, tuned, rows = problem(6, 10, [30, 50])
    merged = base.double() + RegMean(alpha=1.0).combine(group_of(base, tuned, rows)).double()

    def error(w: Tensor) -> float:
        pairs = zip(tuned, rows, strict=True)
        return sum(float((x.double() @ (w - t.double()).mT).square().sum()) / len(x) for t, x in pairs)

    g = torch.Generator().manual_seed(1)
    for _ in range(20):
        assert error(merged) < error(merged + 1e-3 * torch.randn(6, 10, generator=g, dtype=torch.float64))


def test_same_weights_come_back_and_order_does_not_matter() -> None:
    base, tuned, rows = problem(8, 12, [30, 40, 50])
    same = RegMean(alpha=1.0).combine(group_of(base, [tuned[0]] * 3, rows))
    assert relative(same, tuned[0] - base) < 1e-6
    one = RegMean().combine(group_of(base, tuned[:1], rows[:1]))
    assert relative(one, tuned[0] - base) < 1e-6
    forward = RegMean().combine(group_of(base, tuned, rows))
    backward = RegMean().combine(group_of(base, tuned[::-1], rows[::-1]))
    assert relative(forward, backward) < 1e-6


def test_models_weigh_equally_however_many_rows_they_have() -> None:
    base, tuned, rows = problem(8, 12, [30, 40])
    more = RegMean().combine(group_of(base, tuned, [rows[0].repeat(5, 1), rows[1]]))
    assert relative(more, RegMean().combine(group_of(base, tuned, rows))) < 1e-6


def test_task_vectors_as_given() -> None:
    base, tuned, rows = problem(8, 12, [30, 40])
    found = RegMean().combine(group_of(None, [w - base for w in tuned], rows))
    assert relative(found, RegMean().combine(group_of(base, tuned, rows))) < 1e-6


def test_equal_moments_or_none_give_the_mean() -> None:
    base, tuned, rows = problem(8, 12, [30, 30])
    mean = sum(w - base for w in tuned) / 2
    assert isinstance(mean, Tensor)
    assert relative(RegMean().combine(group_of(base, tuned, [rows[0]] * 2)), mean) < 1e-6
    group = group_of(base, tuned, None)
    assert relative(RegMean(scale=2.0).combine(group), 2 * mean) < 1e-6
    assert group.notes.facts == {"regmean": "mean: no statistics"}


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_the_size_of_inputs_does_not_matter(size: float) -> None:
    base, tuned, rows = problem(8, 12, [30, 40])
    update = RegMean().combine(group_of(base, tuned, [x * size for x in rows]))
    assert relative(update, RegMean().combine(group_of(base, tuned, rows))) < 1e-5


def test_features_that_are_always_zero_get_the_mean() -> None:
    base, tuned, rows = problem(8, 12, [30, 40])
    for x in rows:
        x[:, [3, 7]] = 0
    group = group_of(base, tuned, rows)
    update = RegMean(alpha=1.0).combine(group)
    mean = sum(w - base for w in tuned) / 2
    assert isinstance(mean, Tensor)
    torch.testing.assert_close(update[:, [3, 7]], mean[:, [3, 7]], rtol=1e-6, atol=1e-7)
    seen = [i for i in range(12) if i not in (3, 7)]
    expected = formula([w[:, seen] for w in tuned], [x[:, seen] for x in rows], 1.0) - base[:, seen].double()
    assert relative(update[:, seen], expected) < 1e-6
    assert group.notes.facts["regmean_silent"] == 2
    nothing = RegMean().combine(group_of(base, tuned, [torch.zeros(4, 12)] * 2))
    assert relative(nothing, mean) < 1e-6


def test_fewer_rows_than_features() -> None:
    """On the features' seen subspace the least squares solution, near the mean elsewhere."""
    base, tuned, rows = problem(8, 24, [5, 6])
    group = group_of(base, tuned, rows)
    update = RegMean(alpha=1.0).combine(group).double()
    assert bool(torch.isfinite(update).all()) and 0 < group.notes.facts["regmean_ridge"] < 1e-4
    mean = sum((w - base).double() for w in tuned) / 2
    assert isinstance(mean, Tensor)
    seen = torch.linalg.svd(torch.cat(rows).double())[2]
    unseen = seen[11:]
    assert relative(update @ unseen.mT, mean @ unseen.mT) < 1e-6
    total = sum(x.double().mT @ x.double() / len(x) for x in rows)
    weighted = sum(
        (w - base).double() @ (x.double().mT @ x.double()) / len(x) for w, x in zip(tuned, rows, strict=True)
    )
    assert relative(update @ total, weighted) < 1e-3
    shrunk = RegMean(alpha=0.9).combine(group_of(base, tuned, rows))
    assert relative(shrunk, formula(tuned, rows, 0.9) - base.double()) < 1e-5


def test_zero_updates_stay_zero() -> None:
    base, _, rows = problem(8, 12, [30, 40])
    assert not RegMean().combine(group_of(base, [base, base], rows)).any()


def test_ranges() -> None:
    with pytest.raises(RecipeError, match="alpha"):
        RegMean(alpha=1.5)


@pytest.mark.skipif(not FILES, reason="no golden files: set PYMERGE_GOLDEN_DIR")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    """Layers with activations; against the released float32 result, and the same in float64."""
    golden: Golden = read_golden(path)
    acts = read_acts(path)
    modules = [name for name in golden.base if name.removesuffix(".weight") in acts[0]]
    assert modules
    for name in modules:
        base, tuned = golden.base[name], [task[name] for task in golden.tasks]
        rows = [act[name.removesuffix(".weight")] for act in acts]
        update = RegMean(alpha=golden.params["reduce_non_diagonal_ratio"]).combine(group_of(base, tuned, rows))
        assert relative(update, golden.merged[name] - base) < 3e-4
        assert relative(update, read_tensor(path, f"intermediate/merged_fp64/{name}") - base) < 1e-4
