"""Polar factors against a float64 SVD, and what defines them: P^T P is a projector, P^T A is positive semidefinite."""

from __future__ import annotations

import math

import pytest
import torch

from pymerge.errors import NonFinite
from pymerge.linalg import mean_singular_value, polar, polar_product
from pymerge.linalg._polar_single import HALLEY_CONDITION, LOW, MARGIN, gram32, halley, halley_step, rotated
from tests.linalg.spectra import concatenated_bases, distance, geometric, orthonormal, true_polar, with_values


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small matrices: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


EPS32, EPS64 = 2.0**-24, 2.0**-53
METHODS = ["auto", "gram", "newton_schulz", "qdwh", "svd"]
SHAPES = [(60, 60), (97, 41), (41, 97), (300, 20), (2, 2), (5, 1), (1, 5), (1, 1)]


def bound(x: torch.Tensor, condition: float, method: str) -> float:
    """Rounding of the result, and of float32 products with the inverse root where the condition is low enough for them;
    float64 products lose condition * eps, the Newton step leaves the square of condition^2 * eps."""
    n = min(x.shape[-2:])
    if x.dtype == torch.float64:
        return 8 * math.sqrt(n) * EPS64 * condition + (condition**2 * 16 * EPS64) ** 2
    own = {"svd": 1.0}.get(method, 16.0)
    return own * EPS32 + (condition**2 * 16 * EPS64) ** 2 + 8 * math.sqrt(n) * EPS64 * condition


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("condition", [1.0, 3.0, 30.0, 1e3, 3e4, 5e5])
def test_against_svd(method, dtype, condition):
    for shape in SHAPES:
        x = with_values(*shape, geometric(min(shape), condition)).to(dtype)
        found = polar(x, method=method)
        assert found.factor.dtype == dtype and found.factor.shape == x.shape
        assert found.rank == min(shape)
        assert distance(found.factor, true_polar(x)) <= bound(x, condition, method), (shape, found.methods)
        true = torch.linalg.cond(x.double())
        assert true * (1 - 1e-3) <= found.condition <= true * (1 + 1e-3 if method in ("gram", "svd", "auto") else 61)


@pytest.mark.parametrize("condition", [3e6, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_conditions_beyond_the_default_tol(condition, dtype):
    x = with_values(80, 50, geometric(50, condition)).to(dtype)
    cut = polar(x, tol=1e-5)
    assert cut.methods == ("gram",) and cut.rank == int((geometric(50, condition) > 1e-5).sum())
    assert distance(cut.factor, true_polar(x, 1e-5)) <= bound(x, 1e5, "gram")
    whole = polar(x, tol=1e-10)
    assert whole.methods == ("svd",) and whole.rank == 50
    assert distance(whole.factor, true_polar(x)) <= EPS32 + 8 * math.sqrt(50) * EPS64 * condition


def test_concatenated_bases():
    """Square and ill-conditioned: a float32 Gram matrix would be wrong by 1e-2 here."""
    for n, tasks, seed in ((240, 8, 0), (250, 2, 1), (240, 20, 2)):
        x = concatenated_bases(n, tasks, seed)
        true = true_polar(x)
        for method in METHODS:
            found = polar(x, method=method)
            assert found.rank == n and distance(found.factor, true) <= 16 * EPS32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rank_rule(method, dtype):
    """A partial isometry: the directions that are there, and nothing for those that are not."""
    left, right = orthonormal(70, 40, 1), orthonormal(40, 40, 2)
    x = left[:, :11] * torch.linspace(2, 1, 11, dtype=torch.float64) @ right[:, :11].T
    x = x.to(dtype)
    tol = 3e-6 if dtype in (torch.float32, torch.float64) else 0.05  # rounding to half precision has full rank
    for a in (x, x.mT):
        found = polar(a, tol, method)
        assert found.rank == 11 and (found.methods == ("svd",) if method == "svd" else ("gram",))
        p = found.factor.double()
        assert distance(p, true_polar(a, tol)) <= 32 * EPS32
        projector = p.T @ p
        assert (projector @ projector - projector).abs().max() <= 32 * EPS32
        assert abs(float(projector.trace()) - 11) <= 11 * 32 * EPS32


def test_values_at_tol_are_dropped_and_above_kept():
    values = torch.tensor([1.0, 0.5, 2.0**-10, 2.0**-11])
    x = torch.diag(values)
    for method in METHODS:
        assert polar(x, 2.0**-10.5, method).rank == 3
        assert torch.equal(polar(x, 2.0**-10.5, method).factor.round(), torch.diag(torch.tensor([1.0, 1, 1, 0])))


@pytest.mark.parametrize("method", METHODS)
def test_defining_properties(method):
    a = with_values(90, 50, geometric(50, 1e3), seed=3).float()
    p = polar(a, method=method).factor.double()
    h = p.T @ a.double()
    assert (p.T @ p - torch.eye(50, dtype=torch.float64)).abs().max() <= 32 * EPS32
    assert (h - h.T).abs().max() <= 32 * EPS32
    assert torch.linalg.eigvalsh((h + h.T) / 2).min() >= -32 * EPS32
    assert distance(p @ h, a.double()) <= 32 * EPS32


@pytest.mark.parametrize("method", METHODS)
def test_identical_tasks_zero_tasks_and_one_task(method):
    u = orthonormal(60, 12, 5).float()
    one = polar(u, method=method)
    assert distance(one.factor, u.double()) <= 32 * EPS32  # T = 1: the basis itself
    same = polar(torch.cat([u, u, u], 1), method=method)
    assert same.rank == 12  # T identical tasks: each carries its share of the one projector
    assert distance(same.factor, torch.cat([u, u, u], 1).double() / math.sqrt(3)) <= 32 * EPS32
    projector = same.factor.double() @ same.factor.double().T
    assert distance(projector, u.double() @ u.double().T) <= 32 * EPS32
    padded = polar(torch.cat([u, torch.zeros(60, 12)], 1), method=method)
    assert padded.rank == 12 and torch.equal(padded.factor[:, 12:], torch.zeros(60, 12))
    assert distance(padded.factor[:, :12], u.double()) <= 32 * EPS32
    nothing = polar(torch.zeros(60, 12), method=method)
    assert nothing.rank == 0 and nothing.condition == 0 and torch.equal(nothing.factor, torch.zeros(60, 12))


@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(method):
    a = with_values(40, 30, geometric(30, 100.0)).float()
    p = polar(a, method=method).factor
    for scale in (2.0**-110, 2.0**100):
        assert distance(polar(a * scale, method=method).factor, p.double()) <= 4 * EPS32
    wide = a.double() * 2.0**-600
    assert distance(polar(wide, method=method).factor, true_polar(a)) <= bound(wide, 100.0, method)


@pytest.mark.parametrize("method", METHODS)
def test_batches_are_the_single_results(method):
    parts = [with_values(30, 20, geometric(20, k), seed=i) for i, k in enumerate((2.0, 1e2, 1e4))]
    parts.append(with_values(30, 20, geometric(4, 2.0), seed=9))
    x = torch.stack([*parts, parts[0]]).float()
    for a in (x, x.mT, x[None].expand(2, -1, -1, -1), x[:, ::2]):
        found = polar(a, method=method)
        assert found.rank.shape == a.shape[:-2]
        flat = found.factor.reshape(-1, *a.shape[-2:])
        for i, one in enumerate(a.reshape(-1, *a.shape[-2:])):
            alone = polar(one, method=method)
            assert torch.equal(alone.factor, flat[i])
            assert alone.rank == found.rank.flatten()[i] and alone.methods == found.methods[i : i + 1]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0, 4, 3), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty(shape):
    for method in METHODS:
        found = polar(torch.zeros(shape), method=method)
        assert found.factor.shape == shape and found.rank.shape == shape[:-2]
        assert not found.rank.any() and len(found.methods) == math.prod(shape[:-2])


def test_half_precision_is_widened():
    x = with_values(30, 20, geometric(20, 10.0))
    for dtype in (torch.bfloat16, torch.float16):
        found = polar(x.to(dtype))
        assert found.factor.dtype == torch.float32
        assert torch.equal(found.factor, polar(x.to(dtype).float()).factor)


@pytest.mark.parametrize(
    "shapes", [((60, 40), (40, 7)), ((60, 40), (40, 200)), ((40, 60), (60, 30)), ((50, 50), (50, 0))], ids=str
)
@pytest.mark.parametrize("condition", [3.0, 1e3, 1e5])
def test_product(shapes, condition):
    first, second = shapes
    a = with_values(*first, geometric(min(first), condition)).float()
    b = torch.randn(second, generator=torch.Generator().manual_seed(0))
    got, true = polar_product(a, b), true_polar(a) @ b.double()
    assert got.dtype == torch.float32 and got.shape == true.shape
    assert (got.double() - true).norm() <= 32 * EPS32 * b.double().norm()
    assert (polar_product(a.double(), b).double() - true_polar(a) @ b.double()).norm() <= (
        8 * math.sqrt(50) * EPS64 * condition * max(1.0, float(b.norm()))
    )
    rank_deficient = with_values(*first, geometric(9, 3.0)).float()
    assert (polar_product(rank_deficient, b, 1e-5).double() - true_polar(rank_deficient, 1e-5) @ b.double()).norm() <= (
        32 * EPS32 * b.double().norm()
    )


@pytest.mark.parametrize("low", [0.9, 0.3, 1e-2, 3e-5])
def test_halley_steps_stay_in_their_range(low):
    (p, q, c), after = halley_step(low)
    x = torch.logspace(math.log10(low), 0, 10_001, dtype=torch.float64)
    values = x * (p + q / (1 + c * x * x))
    assert values.max() <= 1 + 1e-6 and values.min() >= after - 1e-6 and after > low


def test_two_halley_steps_are_enough():
    low = halley_step(halley_step(LOW)[1])[1]
    assert (1 - low) / 2 <= 8 * EPS32
    assert LOW <= 1 / (HALLEY_CONDITION * math.sqrt(MARGIN)) * 0.9  # room for estimates from below


@pytest.mark.parametrize("shape", [(500, 90), (180, 90)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1.5, 2.7])
def test_halley(shape, condition):
    for values in (geometric(90, condition), torch.where(torch.arange(90) < 89, 1.0, 1 / condition).double()):
        x = with_values(*shape, values).float()
        found = halley(x, gram32(x), 1e-6)
        assert found is not None and 0.75 * condition <= found[1] <= 1.01 * condition + 1e-2
        assert distance(found[0], true_polar(x)) <= 16 * EPS32


@pytest.mark.parametrize("shape", [(500, 90), (90, 90), (130, 90)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 3.5, 30.0, 1e3, 1.5e4, 1.5e5])
def test_rotated(shape, condition):
    half = torch.where(torch.arange(90) < 45, 1.0, 1 / condition).double()
    one = torch.where(torch.arange(90) < 89, 1.0, 1 / condition).double()
    for values in (geometric(90, condition), half, one, torch.linspace(1, 1 / condition, 90).double()):
        x = with_values(*shape, values).float()
        found = rotated(x, gram32(x), 1e-7)
        if found is None:  # more than half of the values are small
            assert condition > 1e4 and values is not half and values is not one
            continue
        assert found[1] == pytest.approx(float(torch.linalg.cond(x.double())), rel=1e-4)
        assert distance(found[0], true_polar(x)) <= 2e-6  # what the docstring says


def test_single_routes_decline_what_is_not_for_them():
    low_rank, zero = with_values(200, 60, geometric(30, 3.0)).float(), torch.zeros(200, 60)
    for x in (low_rank, zero):
        assert halley(x, gram32(x), 1e-6) is None and rotated(x, gram32(x), 1e-6) is None
    x = with_values(200, 60, geometric(60, 30.0)).float()
    assert halley(x, gram32(x), 1e-6) is None  # condition
    assert rotated(x, gram32(x), 1e-6) is not None and rotated(x, gram32(x), 1e-2) is None  # tol may drop some
    x = with_values(200, 60, geometric(60, 2.0)).float()
    assert halley(x, gram32(x), 0.1) is not None and halley(x, gram32(x), 0.2) is None


def test_auto_runs_them_for_large_matrices():
    tall = with_values(1100, 520, geometric(520, 2.5)).float()
    for x, method in ((concatenated_bases(560, 8), "rotated"), (tall, "halley"), (tall.mT, "halley")):
        found = polar(x)
        assert found.methods == (method,) and found.rank == min(x.shape)
        assert distance(found.factor, true_polar(x)) <= 24 * EPS32
    decaying = with_values(540, 520, torch.arange(1, 521).double() ** -0.7).float()
    found = polar(decaying)
    assert found.methods == ("gram",) and found.rank == 520
    assert distance(found.factor, true_polar(decaying)) <= 16 * EPS32
    low = with_values(530, 520, geometric(300, 10.0)).float()
    found = polar(low)
    assert found.methods == ("gram",) and found.rank == 300
    assert distance(found.factor, true_polar(low, 1e-6)) <= 16 * EPS32


def test_mean_singular_value():
    x = torch.stack([with_values(700, 40, geometric(40, k), seed=i) for i, k in enumerate((2.0, 1e3))])
    true = torch.linalg.svdvals(x).mean(-1)
    assert ((mean_singular_value(polar(x).factor, x) - true).abs() <= 1e-12 * true).all()
    single = x.float()
    assert ((mean_singular_value(polar(single).factor, single) - true).abs() <= 16 * EPS32 * true).all()
    low = with_values(30, 20, geometric(5, 2.0)).float()  # dropped values count as zeros
    mean = mean_singular_value(polar(low).factor, low)
    assert abs(mean - torch.linalg.svdvals(low.double()).sum() / 20) <= 16 * EPS32 * mean


def test_bad_arguments():
    x = torch.eye(3)
    for call, message in [
        (lambda: polar(torch.ones(3)), r"expected \[..., m, n\], got \[3\]"),
        (lambda: polar(torch.eye(3, dtype=torch.int64)), "got torch.int64"),
        (lambda: polar(x, tol=1.0), "expected 0 <= tol < 1, got 1.0"),
        (lambda: polar(x, tol=math.nan), "got nan"),
        (lambda: polar(x, method="svds"), "got 'svds'"),  # type: ignore[arg-type]
        (lambda: polar(x, tol=1e-9, method="gram"), "gram resolves tol down to 4e-07, got 1e-09"),
        (lambda: polar_product(x, torch.ones(4, 2)), r"got \[3, 3\] and \[4, 2\]"),
        (lambda: mean_singular_value(x, torch.ones(4, 2)), r"got \[3, 3\], \[4, 2\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    batch = torch.ones(4, 3, 3)
    batch[2, 1, 1], batch[2, 0, 0] = math.inf, math.nan
    for method in METHODS:
        with pytest.raises(NonFinite, match="matrix 2 of 4 has 2 NaN or infinite entries"):
            polar(batch, method=method)
