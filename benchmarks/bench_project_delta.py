"""project_delta and projection_stats against materialised deltas.  python benchmarks/bench_project_delta.py

One thread, CPU seconds, interleaved. `stack + bmm`: all deltas, then one product; `loop`: one float32 delta at a
time, the leanest form in plain PyTorch. Memory: peak resident set above what was resident before the call.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from timing import best_seconds, models
from torch import Tensor

from pymerge import _C
from pymerge.ops.project_delta import project_delta
from pymerge.ops.projection_stats import projection_stats


def stacked(basis: Tensor, base: Tensor, tuned: list[Tensor]) -> Tensor:
    deltas = torch.stack([t.float() for t in tuned]) - base.float()  # [T, m, n]
    return torch.bmm(basis.mT, deltas)


def looped(basis: Tensor, base: Tensor, tuned: list[Tensor]) -> Tensor:
    out, wide = torch.empty(len(tuned), basis.shape[2], base.shape[1]), base.float()
    for q, w, y in zip(basis, tuned, out, strict=True):
        torch.mm(q.mT, w.float().sub_(wide), out=y)
    return out


def materialised_stats(basis: Tensor, p: Tensor, base: Tensor, tuned: list[Tensor]) -> tuple[Tensor, Tensor]:
    a = stacked(basis.expand(len(tuned), -1, -1), base, tuned)
    return (a * p).sum(2), a.square().sum(2)


def peak_megabytes(run: Callable[[], object]) -> float:
    def resident(field: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
        return int(line.split()[1])

    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls gave back is not to be reused unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1024


def gemm_rate(n: int = 2048) -> float:
    """GFLOP/s of a float32 product."""
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return 2 * n**3 / best_seconds({"mm": lambda: torch.mm(a, b, out=out)})["mm"] / 1e9


def relative_error(y: Tensor, basis: Tensor, base: Tensor, tuned: list[Tensor]) -> float:
    """Of the last task, against float64."""
    truth = basis[-1].double().mT @ (tuned[-1].double() - base.double())
    return float((y[-1].double() - truth).norm() / truth.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    n, tasks, rate = args.size, args.tasks, gemm_rate()
    print(f"{_C.cpu_level()}, float32 product {rate:.0f} GFLOP/s, W {n} x {n} bfloat16, T = {tasks}")
    base, flat = models(n * n, tasks)
    base, tuned = base.view(n, n), [x.view(n, n) for x in flat]
    for rank in args.ranks:
        basis = torch.linalg.qr(torch.randn(tasks, n, rank)).Q.contiguous()
        reference = basis[0].mT @ (tuned[0].float() - base.float())
        runs: dict[str, Callable[[], object]] = {
            "project_delta": lambda q=basis: project_delta(q, base, tuned),
            "projection_stats": lambda q=basis[0], p=reference: projection_stats(q, p, base, tuned),
            "loop": lambda q=basis: looped(q, base, tuned),
            "stack + bmm": lambda q=basis: stacked(q, base, tuned),
            "materialised stats": lambda q=basis[:1], p=reference: materialised_stats(q, p, base, tuned),
        }
        memory = {name: peak_megabytes(run) for name, run in runs.items()}
        seconds = best_seconds(runs, args.rounds)
        flops = 2 * tasks * rank * n * n
        print(f"l = {rank}, error {relative_error(project_delta(basis, base, tuned), basis, base, tuned):.1e}")
        for name, took in seconds.items():
            against = "materialised stats" if "stats" in name else "stack + bmm"
            print(
                f"  {name:20s} {took * 1e3:8.1f} ms {flops / took / 1e9:6.1f} GFLOP/s {flops / took / 1e9 / rate:5.2f} "
                f"of mm {seconds[against] / took:5.2f}x {against}, {memory[name]:6.0f} MB"
            )


if __name__ == "__main__":
    main()
