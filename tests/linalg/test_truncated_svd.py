from __future__ import annotations

import math

import pytest
import torch

from pymerge.errors import NonFinite
from pymerge.linalg import truncated_svd
from pymerge.linalg._dense import cholesky_orth
from tests.linalg.known_svd import matrix, sine, spectrum

WAYS: dict[str, dict] = {
    "auto": {},
    "gram": {"route": "gram"},
    "iteration": {"route": "iteration"},
    "full": {"route": "full"},
    "fast": {"mode": "fast"},
}
EXACT = [way for way in WAYS if way != "fast"]
DTYPES = [torch.float32, torch.float64]
SHAPES = [(60, 90), (90, 60), (64, 64)]


def assert_well_formed(result, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Shapes, order, signs; both bases orthonormal to rounding."""
    u, s, vh, _ = result
    assert u.shape == (m, k) and s.shape == (k,) and vh.shape == (k, n)
    assert u.dtype == s.dtype == vh.dtype == dtype
    assert (s >= 0).all() and (s[1:] <= s[:-1]).all()
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    bound = 10 * max(m, n) * torch.finfo(dtype).eps
    for x in (u.mT @ u, vh @ vh.mT):
        assert (x - torch.eye(k, dtype=dtype)).abs().max() <= bound


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["heavy", "fast", "clustered", "equal", "gap"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, name, dtype, way):
    """Values within eps sqrt(r) ||a||, the error as small as the best one's, certified spaces the true ones."""
    (m, n), k = shape, 8
    truth = spectrum(name, min(m, n))
    a = matrix(m, n, truth)[0].to(dtype)
    result = truncated_svd(a, k, **WAYS[way])
    assert_well_formed(result, m, n, k, dtype)
    eps, norm = torch.finfo(dtype).eps, float(truth.norm())
    approximation = (result.U.double() * result.S.double()) @ result.Vh.double()
    error, best = float((a.double() - approximation).norm()), float(truth[k:].norm())
    rounding = 0.0  # of the values, from which the residual is derived, as it comes through to that
    if way != "fast":
        off = result.S.double() - truth[:k]
        assert off.abs().max() <= max(8 * math.sqrt(min(m, n)) * eps, 1e-9) * norm
        assert error <= best * (1 + 1e-6) + 40 * eps * norm
        rounding = norm * float(off.norm()) / max(error, 1e-3 * norm)
    else:
        assert error <= best * math.sqrt(1 + float(result.info.excess)) + 40 * eps * norm
    small = math.sqrt(40 * eps) * norm * (best < 1e-3 * norm)
    assert abs(float(result.info.residual) * norm - error) <= 1e-6 * norm + rounding + small
    j = int(result.info.certified_rank)
    u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)  # of the rounded matrix: rounding parts equal values
    assert sine(result.U[:, :j], u[:, :j]) <= 0.1 and sine(result.Vh[:j].mT, vh[:j].mT) <= 0.1


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_subspaces(dtype, way):
    """Where the gap is wide all of the rank is certified, and the angle is at rounding level (or the iteration's)."""
    truth = spectrum("gap", 80)
    a, u, v = matrix(80, 120, truth, seed=3)
    result = truncated_svd(a.to(dtype), 20, **WAYS[way])
    assert int(result.info.certified_rank) == 20
    bound = max(1e-5, 100 * torch.finfo(dtype).eps) if way == "iteration" else 1e3 * torch.finfo(dtype).eps
    assert sine(result.U, u[:, :20]) <= bound and sine(result.Vh.mT, v[:, :20]) <= bound


def test_clusters_are_certified_as_wholes():
    truth = spectrum("clustered", 64)
    a, _, _ = matrix(64, 64, truth)
    for k, way in ((12, "gram"), (20, "iteration"), (12, "full")):
        info = truncated_svd(a.float() if way != "full" else a, k, **WAYS[way]).info
        assert int(info.certified_rank) >= k // 8 * 8


def wrong_certificates(trials: range, ways: list[str]) -> list[tuple]:
    found = []
    for seed in trials:
        g = torch.Generator().manual_seed(seed)
        m, n = (int(x) for x in torch.randint(2, 60, (2,), generator=g))
        r = min(m, n)
        kind = seed % 5
        if kind == 0:
            truth = torch.rand(r, dtype=torch.float64, generator=g)
        elif kind == 1:
            truth = (1 + torch.arange(r, dtype=torch.float64)) ** -float(torch.rand((), generator=g) * 2)
        elif kind == 2:
            truth = 10 ** (-8 * torch.rand(r, dtype=torch.float64, generator=g))
        elif kind == 3:
            truth = torch.randint(1, 4, (r,), generator=g).double() * (1 + 1e-5 * torch.rand(r, generator=g))
        else:
            truth = torch.rand(r, dtype=torch.float64, generator=g) * (torch.rand(r, generator=g) < 0.5)
        a = matrix(m, n, truth.sort(descending=True).values, seed)[0]
        a = a.to(DTYPES[seed % 2])
        k = int(torch.randint(1, r + 1, (), generator=g))
        result = truncated_svd(a, k, **WAYS[ways[seed % len(ways)]], seed=seed)
        j = int(result.info.certified_rank)
        u, _, vh = torch.linalg.svd(a.double(), full_matrices=False)
        if max(sine(result.U[:, :j], u[:, :j]), sine(result.Vh[:j].mT, vh[:j].mT)) > 0.1:
            found.append((seed, m, n, k, j))
    return found


def test_certificate_is_never_wrong():
    """1000 random spectra (uniform, power laws, eight decades, near ties, rank-deficient), every route and dtype."""
    assert not wrong_certificates(range(1000), ["gram", "iteration", "full", "fast", "fast", "fast", "auto"])


@pytest.mark.parametrize("way", ["auto", "gram", "iteration", "full"])
@pytest.mark.parametrize("name", ["heavy", "fast"])
def test_merged_update(name, way):
    """Leading triplets of eight tasks side by side, both bases replaced by their polar factors (TSV-M): orthogonalising
    amplifies wrong directions that the residual hides, and still the result is float64's."""

    def polar_in_float64(x: torch.Tensor) -> torch.Tensor:
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        return u @ vh

    def merged(triplets: list) -> torch.Tensor:
        u, s, v = (torch.cat(x, dim=-1).double() for x in zip(*((u, s, vh.mT) for u, s, vh in triplets), strict=True))
        return (polar_in_float64(u) * s) @ polar_in_float64(v).mT

    tasks, k = [matrix(96, 160, spectrum(name, 96), seed)[0].float() for seed in range(8)], 12
    full = [torch.linalg.svd(a.double(), full_matrices=False) for a in tasks]
    truth = merged([(u[:, :k], s[:k], vh[:k]) for u, s, vh in full])
    ours = merged([truncated_svd(a, k, **WAYS[way])[:3] for a in tasks])
    assert float((ours - truth).norm() / truth.norm()) <= 2e-5


@pytest.mark.parametrize("way", WAYS)
def test_rank_deficient(way):
    """Bases stay orthonormal, and the values beyond the rank are rounding."""
    truth = torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(37)]).double()
    a, u, v = matrix(40, 70, truth)
    result = truncated_svd(a.float(), 10, **WAYS[way])
    assert_well_formed(result, 40, 70, 10, torch.float32)
    assert (result.S.double() - truth[:10]).abs().max() < 1e-5
    assert int(result.info.certified_rank) >= 3
    assert sine(result.U[:, :3], u[:, :3]) < 1e-5 and sine(result.Vh[:3].mT, v[:, :3]) < 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 9), (0, 1)], ids=str)
def test_zero_and_thin(shape, way):
    m, n = shape
    if m == 0:
        with pytest.raises(ValueError, match="rank must be an integer in 1..0"):
            truncated_svd(torch.empty(shape), 1, **WAYS[way])
        return
    zero = truncated_svd(torch.zeros(shape), 1, **WAYS[way])
    assert zero.S.item() == 0 and zero.info.residual == 0 and zero.info.captured == 1 and zero.info.routes == ("zero",)
    assert torch.equal(zero.U, torch.eye(m, 1)) and torch.equal(zero.Vh, torch.eye(1, n))
    a = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = truncated_svd(a, 1, **WAYS[way])
    assert_well_formed(result, m, n, 1, torch.float32)
    assert abs(float(result.S) - float(torch.linalg.matrix_norm(a.double(), ord=2))) < 1e-6 * float(a.norm())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e18, 1e30])
@pytest.mark.parametrize("way", WAYS)
def test_scaling(way, scale):
    """Squares of the entries would vanish or overflow in float32; a power of two would change no bit of the vectors."""
    a, _, _ = matrix(40, 50, spectrum("heavy", 40))
    base = truncated_svd(a.float(), 6, **WAYS[way])
    other = truncated_svd((a * scale).float(), 6, **WAYS[way])
    assert (other.S / scale - base.S).abs().max() < 1e-5
    assert int(other.info.certified_rank) == int(base.info.certified_rank)
    assert sine(other.U, base.U.double()) < (0.2 if way == "fast" else 1e-4)


def test_float64_extremes():
    a, _, _ = matrix(20, 30, spectrum("heavy", 20))
    for scale in (1e-200, 1e200):
        s = truncated_svd(a * scale, 5).S / scale
        assert (s - spectrum("heavy", 20)[:5]).abs().max() < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_batch_strides_and_repeats(way):
    """A batch has the bits of its matrices one by one; so have repeated calls, and non-contiguous input."""
    g = torch.Generator().manual_seed(5)
    a = torch.randn(2, 3, 30, 40, generator=g)
    whole = truncated_svd(a, 4, **WAYS[way])
    assert whole.U.shape == (2, 3, 30, 4) and whole.info.residual.shape == (2, 3) and len(whole.info.routes) == 6
    for i in range(2):
        for j in range(3):
            one = truncated_svd(a[i, j], 4, **WAYS[way])
            assert all(torch.equal(x, y[i, j]) for x, y in zip(one[:3], whole[:3], strict=True))
            assert one.info.certified_rank == whole.info.certified_rank[i, j]
    strided = truncated_svd(a[0, 0].mT.contiguous().mT, 4, **WAYS[way])
    assert sine(strided.U, whole.U[0, 0].double()) < (0.3 if way == "fast" else 1e-4)
    empty = truncated_svd(a[:0], 4, **WAYS[way])
    assert empty.U.shape == (0, 3, 30, 4) and empty.info.residual.shape == (0, 3)


def test_fast_is_reproducible_by_seed():
    a, _, _ = matrix(60, 80, spectrum("heavy", 60))
    one, two, other = (truncated_svd(a.float(), 8, mode="fast", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.U, two.U) and not torch.equal(one.U, other.U)


def test_fast_excess_is_no_worse_than_svd_lowrank():
    for name in ("heavy", "fast", "clustered"):
        truth = spectrum(name, 200)
        a, _, _ = matrix(200, 240, truth)
        best = float(truth[16:].square().sum())
        ours = (a - (lambda x: (x.U * x.S) @ x.Vh)(truncated_svd(a, 16, mode="fast"))).square().sum()
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(a, q=32, niter=2)
        theirs = (a - (u[:, :16] * s[:16]) @ v[:, :16].mT).square().sum()
        assert float(ours) - best <= float(theirs) - best + 1e-9 * best


def test_cholesky_orth():
    """The basis of other devices than the CPU: well- and ill-conditioned columns, a repeated and a zero one."""
    y = torch.randn(90, 12, generator=torch.Generator().manual_seed(0))
    steep = y * 10.0 ** -torch.arange(12)
    tilted = y[:, :1] + 1e-5 * y
    broken = torch.cat([y, y[:, :1], 0 * y[:, :1]], dim=1)
    for columns in (y, steep, tilted, broken, y.double()):
        q = cholesky_orth(columns)
        eye = torch.eye(q.shape[1], dtype=q.dtype)
        assert (q.mT @ q - eye).abs().max() < 20 * torch.finfo(q.dtype).eps
    assert sine(cholesky_orth(steep), torch.linalg.qr(y.double()).Q) < 1e-5


def test_tol_is_met_or_falls_through():
    a, u, _ = matrix(200, 240, spectrum("heavy", 200))
    loose = truncated_svd(a.float(), 16, mode="fast", tol=0.5)
    assert loose.info.routes == ("fast",) and float(loose.info.excess) <= 0.5
    for mode in ("fast", "exact"):
        tight = truncated_svd(a.float(), 16, mode=mode, tol=0.0)
        assert float(tight.info.excess) <= 0.0
    fell = truncated_svd(a.float(), 16, mode="fast", tol=1e-9)
    assert fell.info.routes == ("full",) and "> tol 1e-09: full" in fell.info.reasons[0]
    assert sine(fell.U, u[:, :16]) < 1e-4


def test_excess_bounds_the_excess():
    for name in ("heavy", "clustered", "gap"):
        truth = spectrum(name, 120)
        a, _, _ = matrix(120, 150, truth)
        best = float(truth[10:].square().sum())
        result = truncated_svd(a, 10, mode="fast")
        error = float((a - (result.U * result.S) @ result.Vh).square().sum())
        assert error / best - 1 <= float(result.info.excess) + 1e-9


def test_unsettled_iteration_falls_through():
    """A spectrum without any gap: the iteration gives up, says so, and the Gram matrix answers."""
    a = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(0)))[0]
    noise = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    result = truncated_svd(a + 1e-4 * noise, 8, route="iteration")
    assert result.info.routes == ("gram",) and "too close together beyond the rank: gram" in result.info.reasons[0]


def test_routes_and_reasons():
    g = torch.Generator().manual_seed(0)
    small = truncated_svd(torch.randn(30, 40, generator=g), 3).info
    assert small.routes == ("gram",) and "smaller side 30 <= 1024" in small.reasons[0]
    steep, _, _ = matrix(30, 40, 10 ** -torch.arange(0, 15, 0.5, dtype=torch.float64))
    full = truncated_svd(steep, 20).info
    assert full.routes == ("full",) and "too much for a float64 Gram matrix" in full.reasons[0]
    assert truncated_svd(steep.float(), 20).info.routes == ("gram",)


def test_large_matrix_iterates():
    truth = spectrum("heavy", 1100)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(1100, 1100, generator=generator)).Q for _ in range(2))
    result = truncated_svd(u * truth.float() @ v.mT, 24)
    assert result.info.routes == ("iteration",) and "rank 24 <= 1100 / 16" in result.info.reasons[0]
    assert sine(result.U, u[:, :24].double()) < 1e-4 and sine(result.Vh.mT, v[:, :24].double()) < 1e-4
    assert (result.S - truth[:24]).abs().max() < 1e-5


def test_bad_arguments():
    a = torch.randn(2, 5, 4)
    for bad, arguments, message in (
        (a.half(), {}, "a must be float32 or float64, got torch.float16: widen it first"),
        (a.int(), {}, "got torch.int32"),
        (a[0].tolist(), {}, "a must be a tensor or an array with __dlpack__, got list"),
        (a[0, 0], {}, r"a matrix or a batch of matrices, got shape \[4\]"),
        (a, {"rank": 0}, r"rank must be an integer in 1..4 for a matrix \[5, 4\], got 0"),
        (a, {"rank": 5}, "got 5"),
        (a, {"rank": 1.0}, "got 1.0"),
        (a, {"rank": True}, "got True"),
        (a, {"mode": "quick"}, "mode must be one of exact, fast, got 'quick'"),
        (a, {"tol": -1.0}, "tol must be >= 0 or None, got -1.0"),
        (a, {"tol": float("nan")}, "tol must be >= 0"),
        (a, {"route": "qr"}, "route must be one of gram, iteration, full, got 'qr'"),
        (a, {"route": "gram", "mode": "fast"}, "route='gram' goes with mode='exact'"),
    ):
        with pytest.raises(ValueError, match=message):
            truncated_svd(bad, **{"rank": 2, **arguments})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite(way, value):
    a = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    a[1, 2, 3, 4] = value
    with pytest.raises(
        NonFinite, match=r"a has 1 NaN or infinite entries of 30 in matrix \[1, 2\] of the batch \[2, 3\]"
    ):
        truncated_svd(a, 2, **WAYS[way])
    with pytest.raises(NonFinite, match="a has 1 NaN or infinite entries of 30: find out"):
        truncated_svd(a[1, 2], 2, **WAYS[way])
