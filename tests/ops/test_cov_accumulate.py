from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pymerge import _C
from pymerge.ops.cov_accumulate import cov_accumulate, cov_accumulate_reference, cov_mirror_
from tests.ops.cases import DTYPES

OP = torch.ops.pymerge.cov_accumulate
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = [(0, 3), (3, 0), (1, 1), (2, 1), (5, 7), (130, 77), (1100, 145)]
LEVELS = [level for level in ("baseline", "avx2", "avx512") if level == "baseline" or _C.cpu_features()[level]]


def sample(shape, dtype, seed=0):
    """Rows whose columns have means and scales of their own, so that the moments are neither centred nor alike."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.logspace(-2, 2, max(shape[-1], 1))[: shape[-1]]
    return (x + torch.randn(shape[-1], generator=g)).to(dtype)


def assert_accumulated(cov, start, x, *, alpha=1.0, mask=None, small=False, precision="float32"):
    """Against float64: at most N roundings a sum, relative to |x|^T |x|, and those of the totals."""
    used = x.double() if mask is None else torch.where(mask.unsqueeze(-1), x.double(), 0.0)
    used = used.mT if small else used  # [..., N, n]
    exact, size = used.mT @ used, used.abs().mT @ used.abs()
    unit = 2.0**-53 if precision == "float64" or x.dtype == F64 else 2.0**-24
    runs = used.shape[-2] // 1024 + 3
    stored = runs * (2.0**-24 if cov.dtype == F32 else 2.0**-53) * (start.double().abs() + abs(alpha) * size)
    bound = abs(alpha) * used.shape[-2] * unit * size + stored
    error = (cov.double() - start.double() - alpha * exact).abs()
    upper = torch.ones_like(cov, dtype=torch.bool).triu()
    assert (error <= bound)[upper].all(), (error / bound)[upper].max()
    assert torch.equal(cov.tril(-1), start.tril(-1)), "the lower triangle was written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["columns", "small"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_against_float64(dtype, shape, small, precision):
    if small and shape[0] > 200:
        shape = (145, 1100)
    x, size = sample(shape, dtype), shape[0 if small else 1]
    for totals in (F32, F64):
        start = torch.randn(size, size, generator=torch.Generator().manual_seed(1)).to(totals)
        cov = start.clone()
        cov_accumulate(cov, x, alpha=0.3, small=small, precision=precision)
        assert_accumulated(cov, start, x, alpha=0.3, small=small, precision=precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_the_same_formula(dtype):
    x, mask = sample((40, 30), dtype), torch.arange(40) % 3 > 0
    for small in (False, True):
        start = torch.zeros(40, 40) if small else torch.zeros(30, 30)
        cov = start.clone()
        cov_accumulate_reference(cov, x, 0.3, mask, small, "float32")
        assert_accumulated(cov, start, x, alpha=0.3, mask=mask, small=small)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["columns", "small"])
def test_masked_rows_are_not_numbers(dtype, small):
    x = sample((4, 33, 21), dtype)
    mask = torch.rand(4, 33, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[1] = False
    x[~mask] = torch.nan
    start = torch.zeros(4, 33, 33) if small else torch.zeros(4, 21, 21)
    cov = start.clone()
    cov_accumulate(cov, x, mask=mask, small=small)
    assert_accumulated(cov, start, x, mask=mask, small=small)
    assert (cov[1] == 0).all()


def test_leading_dimensions_are_rows():
    x, mask = sample((2, 3, 17, 12), BF16), torch.rand(2, 3, 17) < 0.5
    cov, flat = torch.zeros(12, 12), torch.zeros(12, 12)
    cov_accumulate(cov, x, mask=mask)
    cov_accumulate(flat, x[mask])
    assert torch.equal(cov, flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    wide = sample((90, 80), dtype)
    for x in (wide[::2], wide[:, ::3], wide[1:, 1:], wide.mT, wide[::2, ::2].mT, wide[:, :1].expand(90, 5)):
        cov, plain = torch.zeros(x.shape[1], x.shape[1]), torch.zeros(x.shape[1], x.shape[1])
        cov_accumulate(cov, x)
        cov_accumulate(plain, x.contiguous())
        assert torch.equal(cov, plain)
        small = torch.zeros(x.shape[1], x.shape[1])
        cov_accumulate(small, x.mT, small=True)
        assert torch.equal(small, plain)
    rows = torch.zeros(80, 100)
    cov_accumulate(rows[:, :80], wide)
    plain = torch.zeros(80, 80)
    cov_accumulate(plain, wide)
    assert torch.equal(rows[:, :80], plain) and (rows[:, 80:] == 0).all()


def test_streamed_batches_and_totals_in_float64():
    """Many batches: float32 totals lose what float64 totals keep."""
    x = sample((64, 20), F32) + 30.0
    wide, narrow = torch.zeros(20, 20, dtype=F64), torch.zeros(20, 20)
    for _ in range(2000):
        cov_accumulate(wide, x)
        cov_accumulate(narrow, x)
    exact = torch.triu(2000 * (x.double().mT @ x.double()))
    errors = [((total - exact).norm() / exact.norm()).item() for total in (wide, narrow)]
    assert errors[0] <= 64 * 2.0**-24 and errors[0] < errors[1] <= 2064 * 2.0**-24


def test_error_of_long_bfloat16_sums():
    """Squares of bfloat16 numbers round down more often than up; one float32 sum over 8192 rows is off by 1e-5."""
    x = torch.randn(8192, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    cov, exact = torch.zeros(200, 200), torch.triu(x.double().mT @ x.double())
    cov_accumulate(cov, x)
    assert (cov - exact).norm() <= 1e-6 * exact.norm()


def test_threads_do_not_change_the_bits():
    x, threads = sample((700, 400), BF16), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        cov = torch.zeros(400, 400)
        cov_accumulate(cov, x)
        results.append(cov)
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_non_finite_entries_stay_visible():
    x = torch.ones(10, 3)
    x[4, 1] = torch.inf
    x[5, 2] = torch.nan
    cov = torch.zeros(3, 3)
    cov_accumulate(cov, x)
    assert cov[0, 0] == 10 and not cov[0, 1:].isfinite().any() and not cov[1, 1:].isfinite().any()


@pytest.mark.parametrize("n", [0, 1, 5, 1024, 1025, 2500])
def test_mirror(n):
    cov = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    expected = torch.triu(cov) + torch.triu(cov, 1).mT
    result = cov_mirror_(cov)
    assert result is cov and torch.equal(cov, expected)
    batch = torch.randn(2, 3, 7, 7)
    expected = torch.triu(batch) + torch.triu(batch, 1).mT
    assert torch.equal(cov_mirror_(batch), expected)
    with pytest.raises(ValueError, match=r"square matrices are needed, got \[2, 3\]"):
        cov_mirror_(torch.zeros(2, 3))


def test_opcheck():
    mask = torch.tensor([True, False, True, True, False])
    for dtype in DTYPES:
        torch.library.opcheck(OP.default, (torch.zeros(4, 4), sample((5, 4), dtype), 0.5, mask))
        torch.library.opcheck(OP.default, (torch.zeros(2, 5, 5), sample((2, 5, 4), dtype)), {"small": True})
    torch.library.opcheck(OP.default, (torch.zeros(0, 0), torch.zeros(5, 0)))


def test_compiles_to_one_graph():
    def moments(x, mask):
        cov = torch.zeros(x.shape[1], x.shape[1], dtype=F64)
        cov_accumulate(cov, x, mask=mask)
        return cov_mirror_(cov) * 2

    x, mask = sample((50, 12), BF16), torch.arange(50) % 2 == 0
    compiled = torch.compile(moments, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, mask), moments(x, mask))


BAD = [
    ((torch.zeros(3, 3), torch.zeros(4, 2)), r"cov must be \[2, 2\] for x \[4, 2\], got \[3, 3\]"),
    ((torch.zeros(2, 2), torch.zeros(4, 2, dtype=torch.int32)), "x must be bfloat16"),
    ((torch.zeros(2, 2, dtype=BF16), torch.zeros(4, 2)), "cov must be float32 or float64, got BFloat16"),
    ((torch.zeros(2, 2), torch.zeros(4, 2), 1.0, torch.ones(3, dtype=torch.bool)), r"mask must be \[4\]"),
    ((torch.zeros(2, 2), torch.zeros(4, 2), 1.0, torch.ones(4)), "mask must be bool, got Float"),
    ((torch.zeros(2, 4)[:, ::2], torch.zeros(4, 2)), "cov must have contiguous rows"),
    ((torch.zeros(1, 2).expand(2, 2), torch.zeros(4, 2)), "that do not overlap"),
    ((torch.zeros(1, 2, 2).expand(3, 2, 2), torch.zeros(3, 4, 2)), "that do not overlap"),
    ((torch.zeros(2, 2), torch.zeros(4, 2), 1.0, None, False, "half"), "precision must be float32 or float64, got"),
    ((torch.zeros(2, 2), torch.zeros(2)), r"x must be \[N, n\] or \[B, N, n\], got \[2\]"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[message[:24] for _, message in BAD])
def test_bad_arguments(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        OP(*arguments)


def test_fuzzed_arguments_raise_or_add():
    """1000 calls with up to three arguments spoilt: an exception, or an addition; never a crash."""
    draw, done = random.Random(0), 0
    dtypes = [BF16, torch.float16, F32, F64, torch.int64, torch.bool, torch.complex64]

    def spoilt(x):
        shape = list(x.shape)
        shape[draw.randrange(x.dim())] = draw.choice((0, 1, 2, 5))
        changes = (
            lambda: x.to(draw.choice(dtypes)),
            lambda: torch.zeros(shape, dtype=x.dtype),
            lambda: x.mT if x.dim() > 1 else x[::2],
            lambda: x[..., ::2],
            lambda: x[..., :1].expand(x.shape),
            lambda: x.reshape(-1),
            lambda: x[None],
        )
        return draw.choice(changes)()

    for _ in range(1000):
        batch, small = draw.choice(((), (2,), (0,))), draw.random() < 0.5
        x = torch.zeros(*batch, 4, 3, dtype=draw.choice(dtypes[:4]))
        arguments = [torch.zeros(*batch, 4, 4) if small else torch.zeros(*batch, 3, 3), x]
        arguments.append(torch.zeros(*batch, 4, dtype=torch.bool))
        for _ in range(draw.randrange(4)):
            which = draw.randrange(3)
            if arguments[which].dim() > 0:
                arguments[which] = spoilt(arguments[which])
        cov, x, mask = arguments
        alpha = draw.choice((1.0, float("nan"), float("inf"), 1e300))
        try:
            OP(cov, x, alpha, mask, small, draw.choice(("float32", "float64", "float32", "")))
            done += 1
        except RuntimeError:
            continue
    assert 100 < done < 600


OTHER_LEVEL = """
from pymerge import _C
from tests.ops.test_cov_accumulate import *
assert _C.cpu_level() == {level!r}, _C.cpu_level()
for dtype in DTYPES:
    for shape in ((5, 7), (1100, 145)):
        for precision in ("float32", "float64"):
            test_against_float64(dtype, shape, False, precision)
    test_strides(dtype)
    test_masked_rows_are_not_numbers(dtype, True)
test_error_of_long_bfloat16_sums()
"""


@pytest.mark.parametrize("level", [level for level in LEVELS if level != _C.cpu_level()])
def test_other_cpu_levels(level):
    environment = {**os.environ, "PYMERGE_CPU": level, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-c", OTHER_LEVEL.format(level=level)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
