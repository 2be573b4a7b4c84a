"""cov_accumulate against what computes x^T x otherwise.  python benchmarks/bench_cov_accumulate.py [--device cuda]

GFLOP/s counts N n (n + 1), what the triangle needs; `of_mm` is its share of the rate of a square torch.mm in the same
run (2 n^3 operations; of x's dtype, but float32 for float16 on the CPU, which has no fast path), the measured peak.
Error: of the upper triangle of 64 columns against float64, Frobenius.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.linalg.blas import ssyrk
from timing import best_seconds
from torch import Tensor

from pymerge import _C
from pymerge.ops.cov_accumulate import cov_accumulate

CHECKED = 64


def device_seconds(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds on a CUDA device, candidates interleaved, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, run in candidates.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(all_times[1:]) for name, all_times in times.items()}


def cast_addmm(cov: Tensor, x: Tensor) -> None:
    wide = x.float()
    cov.addmm_(wide.mT, wide)


def candidates_for(x: Tensor, totals: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Each adds to a total of its own, or returns the product."""
    n, cuda = x.shape[1], x.is_cuda
    runs: dict[str, Callable[[], object]] = {"cov_accumulate": lambda: cov_accumulate(totals["cov_accumulate"], x)}
    runs["cast + addmm_"] = lambda: cast_addmm(totals["cast + addmm_"], x)
    if x.dtype != torch.float32 and cuda:
        runs["mm, float32 out"] = lambda: torch.mm(x.mT, x, out_dtype=torch.float32)
    if x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and cuda):
        runs["mm in its dtype"] = lambda: torch.mm(x.mT, x)
    if x.dtype == torch.float32 and not cuda:
        columns, total = x.numpy().T, torch.zeros(n, n).numpy().T  # the layout of Fortran, no copies
        runs["ssyrk"] = lambda: ssyrk(1.0, columns, beta=1.0, c=total, overwrite_c=1)
    return runs


def error_of(result: Tensor, x: Tensor) -> float:
    some = x[:, :CHECKED].double()
    exact = torch.triu(some.mT @ some)
    return ((torch.triu(result[:CHECKED, :CHECKED]).double() - exact).norm() / exact.norm()).item()


def errors(x: Tensor, names: list[str]) -> dict[str, float]:
    """Of one call into zeros; ssyrk computes in float32 as addmm_ does and is not read."""
    totals = {name: torch.zeros(x.shape[1], x.shape[1], device=x.device) for name in names}
    found = {}
    for name, run in candidates_for(x, totals).items():
        if name == "ssyrk":
            continue
        result = run()
        found[name] = error_of(result if isinstance(result, Tensor) else totals[name], x)
    return found


def mm_rate(x: Tensor, rounds: int) -> float:
    square = x[:2048, :2048].contiguous() if min(x.shape) >= 2048 else torch.randn(2048, 2048).to(x)
    square = square.float() if x.dtype == torch.float16 and not x.is_cuda else square
    timer = device_seconds if x.is_cuda else best_seconds
    return 2 * square.shape[0] ** 3 / timer({"mm": lambda: torch.mm(square, square)}, rounds)["mm"] / 1e9


def measure(rows: int, n: int, dtype: torch.dtype, device: str, rounds: int) -> list[dict]:
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    names = ["cov_accumulate", "cast + addmm_"]
    totals = {name: torch.zeros(n, n, device=device) for name in names}
    runs = candidates_for(x, totals)
    seconds = (device_seconds if device == "cuda" else best_seconds)(runs, rounds)
    rate, wrong, report = mm_rate(x, rounds), errors(x, names), []
    for name, took in seconds.items():
        gflops = rows * n * (n + 1) / took / 1e9
        row = {"name": name, "dtype": str(dtype).removeprefix("torch."), "N": rows, "n": n, "ms": took * 1e3}
        row |= {"gflop_per_s": gflops, "of_mm": gflops / rate, "error": wrong.get(name)}
        row["times_addmm"] = seconds["cast + addmm_"] / took
        report.append(row)
        shown = "" if row["error"] is None else f"  error {row['error']:.1e}"
        print(
            f"{row['dtype']:9s} N={rows} n={n:5d} {name:16s} {row['ms']:9.1f} ms {gflops:8.1f} GFLOP/s "
            f"{row['of_mm']:5.2f} of mm {row['times_addmm']:6.2f}x addmm_{shown}",
            flush=True,
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, nargs="+", default=[768, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(torch.cuda.get_device_name() if args.device == "cuda" else f"one thread, level {_C.cpu_level()}")
    report = []
    for n in args.columns:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            report += measure(args.rows, n, dtype, args.device, args.rounds)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
