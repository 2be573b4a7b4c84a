"""Positive definite solves against torch.linalg.inv, solve and cholesky_solve.  python benchmarks/bench_solve.py"""

from __future__ import annotations

import argparse

import torch
from timing import best_seconds
from torch import Tensor

from pymerge.linalg import solve_psd, solve_ridge


def problem(rows: int, n: int, outputs: int, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g [outputs, rows], z [rows, n], M = z^T z + ridge, B = g z."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, n, generator=generator) / rows**0.5
    g = torch.randn(outputs, rows, generator=generator)
    return g, z, z.T @ z + ridge * torch.eye(n), g @ z


def report(name: str, candidates: dict, true: Tensor, rounds: int) -> None:
    seconds = best_seconds(candidates, rounds)
    print(name)
    for label, run in candidates.items():
        error = float((run().double() - true).norm() / true.norm())
        ratio = seconds["inv"] / seconds[label]
        print(f"  {label:16s} {seconds[label] * 1e3:9.1f} ms {ratio:6.2f}x inv  error {error:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for rows, n, outputs, ridge in ((6144, 1024, 1024, 1e-1), (6144, 1024, 1024, 1e-5), (768, 2048, 768, 1e-3)):
        g, z, m, b = problem(rows, n, outputs, ridge)
        wide_m = z.double().T @ z.double() + ridge * torch.eye(n).double()
        true = torch.linalg.solve(wide_m, g.double() @ z.double(), left=False)
        found = solve_psd(m, b)
        candidates = {
            "inv": lambda m=m, b=b: b @ torch.linalg.inv(m),
            "solve": lambda m=m, b=b: torch.linalg.solve(m, b, left=False),
            "cholesky_solve": lambda m=m, b=b: torch.cholesky_solve(b.mT, torch.linalg.cholesky(m)).mT,
            "solve_psd": lambda m=m, b=b: solve_psd(m, b).x,
        }
        if rows <= n:
            candidates["solve_ridge"] = lambda g=g, z=z, ridge=ridge: solve_ridge(g, z, ridge).x
        precision = "float64" if bool(found.wide) else "float32"
        title = f"n {n}, {outputs} right-hand sides, rank {min(rows, n)}, condition {float(found.condition):.0f}"
        report(f"{title}: {precision}", candidates, true, args.rounds)


if __name__ == "__main__":
    main()
