"""project_delta and projection_stats: float64 truth, layouts, CPU levels, threads, memory, bad arguments."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pymerge import _C
from pymerge.ops.project_delta import project_delta, project_delta_reference
from pymerge.ops.projection_stats import projection_stats, projection_stats_reference
from tests.ops.cases import DTYPES

OPS = torch.ops.pymerge
UNIT = 2.0**-24  # half the spacing of float32 at 1
# m, n, r: empty, one, odd, more than a slab, more than a strip, more directions than one job takes
SHAPES = [
    *((0, 5, 3), (5, 0, 3), (5, 3, 0), (1, 1, 1), (3, 5, 2), (65, 33, 9), (130, 2070, 7), (64, 96, 128)),
    *((70, 130, 131), (33, 1050, 260)),
]


def case(m: int, n: int, r: int, dtype=torch.bfloat16, tasks: int = 2) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """basis [T, m, r], base, tuned and rows [T, r, n]."""
    g = torch.Generator().manual_seed(m + 31 * n + r)
    base = torch.randn(m, n, generator=g) * 0.02
    tuned = [(base + torch.randn(m, n, generator=g) * 0.001).to(dtype) for _ in range(tasks)]
    basis, rows = torch.randn(tasks, m, r, generator=g), torch.randn(tasks, r, n, generator=g)
    return basis, base.to(dtype), tuned, rows


def truth(basis: Tensor, base: Tensor | None, tuned: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Q^T D in float64 of the float32 values of the inputs, and |Q|^T |D|."""
    d = torch.stack([t.float().double() - (0.0 if base is None else base.float().double()) for t in tuned])
    q = basis.float().double().mT
    return q @ d, q.abs() @ d.abs()


def assert_right(basis: Tensor, base: Tensor | None, tuned: list[Tensor]) -> None:
    exact, size = truth(basis, base, tuned)
    y = project_delta(basis, base, tuned)
    assert y.dtype == torch.float32 and y.is_contiguous() and y.shape == exact.shape
    # a rounded difference, then a chain of m multiply-adds
    assert ((y.double() - exact).abs() <= (basis.shape[-2] + 2) * UNIT * size).all()


def assert_right_sums(basis: Tensor, rows: Tensor, base: Tensor | None, tuned: list[Tensor]) -> None:
    exact, size = truth(basis, base, tuned)
    inner, square = projection_stats(basis, rows, base, tuned)
    p, error = rows.float().double(), (basis.shape[-2] + 2) * UNIT * size
    assert inner.dtype == square.dtype == torch.float64 and inner.shape == square.shape == exact.shape[:2]
    slack = 2.0**-40  # float64 sums
    assert ((inner - (exact * p).sum(2)).abs() <= (error * p.abs()).sum(2) + slack * (exact * p).abs().sum(2)).all()
    bound = (error * (2 * exact.abs() + error)).sum(2) + slack * exact.square().sum(2)
    assert ((square - exact.square().sum(2)).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(shape, dtype):
    basis, base, tuned, rows = case(*shape, dtype)
    for q, p in ((basis, rows), (basis[0], rows[0])):
        assert_right(q, base, tuned)
        assert_right_sums(q, p, base, tuned)
    assert_right(basis.to(dtype), None, tuned)
    assert_right_sums(basis, rows.to(dtype), None, tuned)


def test_error_at_a_real_size():
    basis, base, tuned, _ = case(4096, 200, 32)
    basis = torch.linalg.qr(basis).Q
    for precision in ("fp32", "bf16x3"):
        y, (exact, _) = project_delta(basis, base, tuned, precision=precision), truth(basis, base, tuned)
        assert (y.double() - exact).norm() <= 5e-6 * exact.norm()


def test_agrees_with_the_reference():
    basis, base, tuned, rows = case(65, 130, 9)
    y, want = project_delta(basis, base, tuned), project_delta_reference(basis, base, tuned, "fp32")
    assert (y - want).norm() <= 1e-6 * want.norm()
    for ours, theirs in zip(
        projection_stats(basis, rows, base, tuned),
        projection_stats_reference(basis, rows, base, tuned, "fp32"),
        strict=True,
    ):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_layouts_give_the_bits_of_contiguous_inputs():
    basis, base, tuned, rows = case(70, 300, 20)
    want = project_delta(basis, base, tuned), *projection_stats(basis, rows, base, tuned)
    wide = [torch.randn(70, 310).to(x.dtype) for x in tuned]
    for view, x in zip(wide, tuned, strict=True):
        view[:, 7:307] = x
    parts = [x[:, 7:307] for x in wide]
    turned = [x.t().contiguous().t() for x in (base, *tuned)]
    spread = [torch.stack([x, x], dim=2)[:, :, 0] for x in (base, *tuned)]
    layouts = [(base, parts), (turned[0], turned[1:]), (spread[0], spread[1:]), (base, [turned[1], spread[2]])]
    for q in (basis, basis.mT.contiguous().mT, torch.stack([basis, basis], dim=3)[..., 0]):
        for first, others in layouts:
            got = project_delta(q, first, others), *projection_stats(q, rows.mT.contiguous().mT, first, others)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(project_delta(basis, base.expand(70, 300), tuned), want[0])


def test_mixed_dtypes():
    basis, base, tuned, rows = case(65, 130, 9, torch.float32, 3)
    mixed = [tuned[0].bfloat16(), tuned[1].double(), tuned[2].half()]
    assert_right(basis.half(), base, mixed)
    assert_right_sums(basis, rows, base.bfloat16(), mixed)


def test_what_is_not_finite_stays_in_its_column():
    basis, base, tuned, _ = case(70, 90, 5)
    clean = project_delta(basis, base, tuned)
    tuned[1][33, 40] = torch.nan
    y = project_delta(basis, base, tuned)
    assert y[1, :, 40].isnan().all()
    y[1, :, 40] = clean[1, :, 40]
    assert torch.equal(y, clean)


def test_threads_do_not_change_the_bits():
    basis, base, tuned, rows = case(128, 4200, 40, tasks=3)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((project_delta(basis, base, tuned), *projection_stats(basis, rows, base, tuned)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


LEVEL_RUN = """
import torch
from pymerge import _C
from tests.ops.test_projection import SHAPES, assert_right, assert_right_sums, case
from pymerge.ops.project_delta import project_delta
from pymerge.ops.projection_stats import projection_stats
crc = 0
for shape in SHAPES:
    for dtype in (torch.bfloat16, torch.float16):
        basis, base, tuned, rows = case(*shape, dtype)
        assert_right(basis, base, tuned)
        assert_right_sums(basis, rows, base, tuned)
        for x in (project_delta(basis, base, tuned), *projection_stats(basis, rows, base, tuned)):
            crc = _C.crc32c(x.view(torch.uint8).numpy(), crc)
print(_C.cpu_level(), crc)
"""


def test_every_cpu_level_is_right_and_fused_ones_agree():
    features, found = _C.cpu_features(), {}
    for level in ("baseline", "avx2", "avx512"):
        if level != "baseline" and not features[level]:
            continue
        paths = os.pathsep.join([str(Path.cwd()), *sys.path])
        run = subprocess.run(
            [sys.executable, "-c", LEVEL_RUN],
            env={**os.environ, "PYMERGE_CPU": level, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        name, found[level] = run.stdout.split()
        assert name == level
    assert len({crc for level, crc in found.items() if level != "baseline"}) <= 1, found


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset")
def test_statistics_hold_neither_deltas_nor_product():
    basis, base, tuned, rows = case(256, 4096, 512, tasks=8)

    def kilobytes(field: str) -> int:
        return next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if field in x)

    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    projection_stats(basis, rows, base, tuned)
    assert kilobytes("VmHWM") - before < 32 << 10  # the product is 64 MiB, the deltas 32 MiB


def test_opcheck():
    basis, base, tuned, rows = case(9, 17, 4)
    for q, b in ((basis, base), (basis[1], None)):
        torch.library.opcheck(OPS.project_delta.default, (q, b, tuned, "fp32"))
        torch.library.opcheck(OPS.projection_stats.default, (q, rows[0], b, tuned, "bf16x3"))
    basis, base, tuned, rows = case(4, 0, 3)
    torch.library.opcheck(OPS.project_delta.default, (basis, base, tuned, "fp32"))
    torch.library.opcheck(OPS.projection_stats.default, (basis, rows, base, tuned, "fp32"))


def test_compiles_in_one_graph():
    basis, base, tuned, rows = case(33, 70, 5)

    def calibrated(q, p, w0, w1, w2):
        inner, square = projection_stats(q, p, w0, [w1, w2])
        return project_delta(q, w0, [w1, w2]) * (inner / square)[:, :, None]

    want = calibrated(basis, rows, base, *tuned)
    got = torch.compile(calibrated, fullgraph=True, backend="aot_eager")(basis, rows, base, *tuned)
    torch.testing.assert_close(got, want)


def test_messages_name_the_values():
    basis, base, tuned, rows = case(6, 8, 3)
    with pytest.raises(RuntimeError, match=r"basis must be \[6, r\] or \[2, 6, r\], got \[2, 5, 3\]"):
        project_delta(basis[:, :5], base, tuned)
    with pytest.raises(RuntimeError, match=r"base is \[6, 7\], tuned\[0\] is \[6, 8\]"):
        project_delta(basis, base[:, :7], tuned)
    with pytest.raises(RuntimeError, match=r"tuned must be \[m, n\], got \[48\]"):
        project_delta(basis, None, [x.reshape(-1) for x in tuned])
    with pytest.raises(RuntimeError, match="precision must be fp32 or bf16x3, got 'tf32'"):
        OPS.project_delta(basis, base, tuned, "tf32")
    with pytest.raises(RuntimeError, match=r"reference must be \[3, 8\] or \[2, 3, 8\], got \[3, 7\]"):
        projection_stats(basis, rows[0, :, :7], base, tuned)
    with pytest.raises(RuntimeError, match="basis must be bfloat16, float16, float32 or float64, got Long"):
        project_delta(basis.long(), base, tuned)
    with pytest.raises(RuntimeError, match="at least one tensor"):
        project_delta(basis, base, [])


@pytest.mark.filterwarnings("ignore")
def test_malformed_calls_raise_and_nothing_worse():
    rng, made = random.Random(0), 0

    def tensor() -> object:
        if rng.random() < 0.1:
            return rng.choice([None, 3, "x", [1.0], torch.zeros(3, 4).to_sparse()])
        dtype = rng.choice([torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.bool])
        x = torch.zeros([rng.choice([0, 1, 2, 3]) for _ in range(rng.choice([0, 1, 2, 2, 3, 3, 4]))], dtype=dtype)
        return x.to("meta") if rng.random() < 0.05 else x.mT if x.dim() >= 2 and rng.random() < 0.3 else x

    for trial in range(1000):
        lists = [tensor()] * rng.choice([1, 2]) if trial % 2 else [tensor() for _ in range(rng.choice([0, 1, 2]))]
        arguments = [rng.choice([None, tensor()]), lists, rng.choice(["fp32", "bf16x3", "", 7])]
        for op, leading in ((OPS.project_delta, [tensor()]), (OPS.projection_stats, [tensor(), tensor()])):
            try:
                op(*leading, *arguments)
                made += 1
            except Exception as error:
                assert not isinstance(error, MemoryError)
    assert made < 500
