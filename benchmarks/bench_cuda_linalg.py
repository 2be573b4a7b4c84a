"""Dense operators and linear algebra on a CUDA device against torch, cuBLAS, cuSOLVER and, where installed, CuPy.

    python benchmarks/bench_cuda_linalg.py --out cuda_linalg.json
    python benchmarks/bench_cuda_linalg.py --out x.json --device cpu --shrink 16      the same calls, small: a dry run

A row: median time, GFLOP/s of the operation as defined (not as computed), its share of this device's own float32 and
bfloat16 matrix products, and each alternative with the factor by which ours is faster.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pymerge.ops import OPERATORS

OPS = torch.ops.pymerge
Run = Callable[[], object]


@dataclass
class Row:
    name: str
    needs: str  # operator, or function of pymerge.linalg
    gflop: float
    ours: Run
    others: dict[str, Run] = field(default_factory=dict)


@dataclass
class Maker:
    device: str
    shrink: int

    def size(self, n: int) -> int:
        return max(8, n // self.shrink)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(dtype)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def milliseconds(run: Run, device: str, seconds: float = 1.0) -> float:
    """Median wall time of up to 20 runs in `seconds` (one at least), after a warm-up; launches of small calls count."""
    run()
    synchronize(device)
    times, begin = [], time.perf_counter()
    while not times or (len(times) < 20 and time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def projections(make: Maker) -> Iterator[Row]:
    m, tasks = make.size(4096), 8
    base = make.random(m, m, dtype=torch.bfloat16, scale=0.02)
    tuned = [(base.float() + make.random(m, m, scale=0.001)).bfloat16() for _ in range(tasks)]

    def stacked(basis: Tensor) -> Tensor:
        return torch.bmm(basis.mT, torch.stack([x.float() - base.float() for x in tuned]))

    def summed(basis: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        a = stacked(basis)
        return (reference * a).sum(-1), a.square().sum(-1)

    for rank in (32, 128, 512):
        r = make.size(rank)
        basis, gflop = torch.linalg.qr(make.random(tasks, m, r))[0], 2e-9 * tasks * m * m * r
        reference = make.random(tasks, r, m)
        for precision in ("fp32", "bf16x3"):
            name = f"T={tasks} {m}x{m} r={r} {precision}"
            yield Row(
                f"project_delta {name}",
                "project_delta",
                gflop,
                lambda b=basis, p=precision: OPS.project_delta(b, base, tuned, p),
                {"torch stack, bmm": lambda b=basis: stacked(b)},
            )
            yield Row(
                f"projection_stats {name}",
                "projection_stats",
                gflop,
                lambda b=basis, q=reference, p=precision: OPS.projection_stats(b, q, base, tuned, p),
                {"torch stack, bmm, sums": lambda b=basis, q=reference: summed(b, q)},
            )


def covariances(make: Maker) -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float32):
        for rows, n in ((8192, 4096), (8192, 1024)):
            rows, n = make.size(rows), make.size(n)
            x, cov = make.random(rows, n, dtype=dtype), make.random(n, n)
            others: dict[str, Run] = {"addmm_ float32": lambda c=cov, x=x: c.addmm_(x.float().mT, x.float())}
            if dtype == torch.bfloat16 and make.device != "cpu":
                others["cuBLAS mm, float32 out"] = lambda x=x: torch.mm(x.mT, x, out_dtype=torch.float32)
            yield Row(
                f"cov_accumulate {rows}x{n} {dtype}",
                "cov_accumulate",
                1e-9 * rows * n * (n + 1),
                lambda c=cov, x=x: OPS.cov_accumulate(c, x, 1.0, None, False, "float32"),
                others,
            )
    m, n = make.size(4096), make.size(1024)
    x = make.random(m, n)
    double: dict[str, Run] = {"cuBLAS float64": lambda: x.double().mT @ x.double()}
    yield Row(f"gram64 {m}x{n}", "gram64", 1e-9 * m * n * (n + 1), lambda: OPS.gram64(x), double)


def sketches(make: Maker) -> Iterator[Row]:
    m, width = make.size(4096), make.size(144)
    a = make.random(m, m)
    for kind in ("gaussian", "sparse_sign"):
        yield Row(
            f"sketch {m}x{m} -> {width} {kind}",
            "sketch",
            2e-9 * m * m * width,
            lambda k=kind: OPS.sketch(a, width, k, 7),
            {"torch randn, mm": lambda: a @ torch.randn(m, width, device=a.device)},
        )


def decompositions(make: Maker) -> Iterator[Row]:
    linalg = importlib.import_module("pymerge.linalg")
    for m, n, k in ((768, 3072, 96), (2048, 2048, 64), (2048, 2048, 256), (4096, 4096, 128)):
        m, n, k = make.size(m), make.size(n), max(2, k // make.shrink)
        a = make.random(m, n) * torch.logspace(0, -3, n, device=make.device)
        others: dict[str, Run] = {
            "torch.linalg.svd": lambda a=a: torch.linalg.svd(a, full_matrices=False),
            "torch.svd_lowrank": lambda a=a, k=k: torch.svd_lowrank(a, k, niter=4),
        }
        if make.device != "cpu" and importlib.util.find_spec("cupy") is not None:
            cupy = importlib.import_module("cupy")
            there = cupy.from_dlpack(a)
            others["cupy.linalg.svd"] = lambda x=there, c=cupy: c.linalg.svd(x, full_matrices=False)
        work = 2e-9 * m * n * k
        for mode in ("exact", "fast"):
            ours: Run = lambda a=a, k=k, s=mode: linalg.truncated_svd(a, k, mode=s)  # noqa: E731
            yield Row(f"truncated_svd {m}x{n} k={k} {mode}", "truncated_svd", work, ours, others)
            others = {}
    for m, n in ((4096, 1024), (1024, 1024)):
        m, n = make.size(m), make.size(n)
        x = make.random(m, n)

        def by_svd(x: Tensor = x) -> Tensor:
            u, _, vh = torch.linalg.svd(x, full_matrices=False)
            return u @ vh

        yield Row(
            f"polar {m}x{n}", "polar", 2e-9 * m * n * n, lambda x=x: linalg.polar(x), {"torch.linalg.svd": by_svd}
        )


def solves(make: Maker) -> Iterator[Row]:
    linalg = importlib.import_module("pymerge.linalg")
    n, k = make.size(4096), make.size(1024)
    x = make.random(2 * n, n)
    matrix, right = x.mT @ x, make.random(k, n)
    yield Row(
        f"solve_psd {n}, {k} right-hand sides",
        "solve_psd",
        1e-9 * (n**3 / 3 + 2 * k * n * n),
        lambda: linalg.solve_psd(matrix, right),
        {"torch.linalg.solve": lambda: torch.linalg.solve(matrix, right.mT).mT},
    )
    optimize = importlib.import_module("scipy.optimize")
    for batch, n in ((512, 64), (1, 4096)):
        batch, n = max(1, batch // make.shrink), make.size(n)
        score = make.random(batch, n, n)
        yield Row(
            f"assign {batch} x {n}",
            "assign",
            0.0,
            lambda s=score: OPS.assign(s, True, None, None),
            {"scipy, copies": lambda s=score: [optimize.linear_sum_assignment(one, True) for one in s.cpu().numpy()]},
        )


FAMILIES = (projections, covariances, sketches, decompositions, solves)


def available(name: str, device: str) -> bool:
    if name in OPERATORS:
        importlib.import_module(f"pymerge.ops.{name}")
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"pymerge::{name}", device.upper()))
    return importlib.util.find_spec("pymerge.linalg") is not None and hasattr(
        importlib.import_module("pymerge.linalg"), name
    )


def peaks(make: Maker) -> dict[str, float]:
    """GFLOP/s of square matrix products in this process."""
    n = make.size(8192)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = make.random(n, n, dtype=dtype)
        found[str(dtype).removeprefix("torch.")] = 2e-9 * n**3 / milliseconds(lambda x=x: x @ x, make.device) * 1e3
    return found


def measured(row: Row, device: str, peak: dict[str, float]) -> dict:
    ms = milliseconds(row.ours, device)
    rate = row.gflop / ms * 1e3
    result: dict = {"name": row.name, "ms": round(ms, 4), "gflop_per_s": round(rate, 1)}
    result["of_peak"] = {name: round(rate / value, 3) for name, value in peak.items()}
    result["others"] = {}
    for name, run in row.others.items():
        try:
            other = milliseconds(run, device)
            result["others"][name] = {"ms": round(other, 4), "speedup": round(other / ms, 2)}
        except (RuntimeError, TypeError, NotImplementedError) as error:
            result["others"][name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    return result


def report(result: dict) -> None:
    if "error" in result:
        return print(f"{result['name']:44s} {result['error']}", flush=True)
    line = f"{result['name']:44s} {result['ms']:9.3f} ms {result['gflop_per_s']:10.1f} GFLOP/s"
    for name, other in result["others"].items():
        line += f"  {other['speedup']:.1f}x {name}" if "speedup" in other else f"  {name}: error"
    print(line, flush=True)


def benchmarks(make: Maker, peak: dict[str, float], until: float) -> Iterator[dict]:
    """Every row that is available; those that would begin after `until` are named as left out."""
    for family in FAMILIES:
        try:
            for row in family(make):
                if not available(row.needs, make.device):
                    continue
                if time.monotonic() > until:
                    yield {"name": row.name, "error": "left out: no time"}
                    continue
                try:
                    yield measured(row, make.device, peak)
                except Exception as error:
                    yield {"name": row.name, "error": f"{type(error).__name__}: {error}"[:300], "failed": True}
        except ModuleNotFoundError as error:
            yield {"name": family.__name__, "error": f"left out: {error}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes")
    parser.add_argument("--seconds", type=float, default=90.0, help="begin no row after so long")
    args = parser.parse_args()
    torch.manual_seed(0)
    make, until = Maker(args.device, args.shrink), time.monotonic() + args.seconds
    result: dict = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    result["matmul_gflop_per_s"] = peak = peaks(make)
    rows: list[dict] = []
    result["benchmarks"] = rows
    try:
        for row in benchmarks(make, peak, until):
            rows.append(row)
            report(row)
    finally:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
