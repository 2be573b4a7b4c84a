"""assign against scipy and the `lap` module (packages lap and lapx).  python benchmarks/bench_assign.py --sizes 1024

lap and lapx install the same module: run once with each, for example PYTHONPATH=folder-of-one. Every function of it
that solves dense square problems is timed; its costs (float64, max - score) are made outside the clock.
Passes: time in units of one reading of the scores at copy bandwidth.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from timing import best_seconds, copy_gb_per_second

from pymerge.ops.assign import assign

KINDS = ("uniform", "planted", "noise", "identity", "correlated", "integers", "product")


def matrix(kind: str, n: int) -> torch.Tensor:
    """Similarities to be maximised. planted, noise, identity: specification of MuDSC, section 8.2."""
    g = torch.Generator().manual_seed(n)
    if kind == "uniform":
        return torch.rand(n, n, generator=g)
    if kind == "integers":
        return torch.randint(100, (n, n), generator=g).float()
    if kind == "product":  # hard for shortest paths: every row ranks the columns alike
        side = torch.rand(2, n, generator=g)
        return side[0, :, None] * side[1]
    if kind == "correlated":  # units of two models over 256 samples, one model a noisy permutation of the other
        one = torch.randn(n, 256, generator=g)
        other = one[torch.randperm(n, generator=g)] + 2 * torch.randn(n, 256, generator=g)
        return torch.corrcoef(torch.cat([one, other]))[:n, n:].contiguous()
    x = torch.randn(n, n, generator=g) / (64 if kind == "noise" else 16)
    if kind == "planted":
        rows = torch.randperm(n, generator=g)[: 4 * n // 5]
        x[rows, torch.randperm(n, generator=g)[: len(rows)]] += 0.35
    if kind == "identity":
        x.diagonal().add_(0.8)
    return x


def lap_functions(score: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Of the installed package: (name, solver of the same problem)."""
    try:
        import lap
    except ImportError:
        return {}
    packages = importlib.metadata.packages_distributions().get("lap", ["lap"])
    cost = (score.max() - score).double().numpy()
    solvers = {f"{packages[0]}.lapjv": lambda: lap.lapjv(cost)}
    for name in ("lapjvx", "lapjvc", "lapjvs"):
        if hasattr(lap, name):
            solvers[f"{packages[0]}.{name}"] = functools.partial(getattr(lap, name), cost)
    return solvers


def compare(kind: str, n: int, copy: float, rounds: int) -> None:
    score = matrix(kind, n)
    array = score.numpy()
    seconds = best_seconds(
        {
            "assign": lambda: assign(score[None], True),
            "scipy": lambda: linear_sum_assignment(array, maximize=True),
            **lap_functions(score),
        },
        rounds,
    )
    value = assign(score[None], True)[3][0].tolist()
    rows, columns = linear_sum_assignment(array, maximize=True)
    off = abs(value[0] - float(array[rows, columns].astype(np.float64).sum()))
    ours = seconds.pop("assign")
    passes = ours / (4 * n * n / 1e9 / copy)
    others = "  ".join(f"{name} {t / ours:5.1f}x ({t * 1e3:.1f} ms)" for name, t in seconds.items())
    print(f"{kind:10s} n = {n:5d} {ours * 1e3:9.2f} ms {passes:6.1f} passes  {others}", end="")
    print(f"  gap {value[2]:.1e}, off scipy's score by {off:.1e}", flush=True)


def compare_batch(batch: int, n: int, rounds: int) -> None:
    score = torch.stack([matrix("correlated", n) for _ in range(2)]).repeat(batch // 2, 1, 1)
    score += torch.randn(batch, n, n, generator=torch.Generator().manual_seed(0)) / 16
    array = score.numpy()
    costs = [(1 - x).astype(np.float64) for x in array]
    candidates = {
        "assign": lambda: assign(score, True),
        "scipy loop": lambda: [linear_sum_assignment(x, maximize=True) for x in array],
    }
    try:
        import lap

        candidates["lap loop"] = lambda: [lap.lapjv(x) for x in costs]
    except ImportError:
        pass
    seconds = best_seconds(candidates, rounds)
    ours = seconds.pop("assign")
    others = "  ".join(f"{name} {t / ours:5.1f}x ({t * 1e3:.1f} ms)" for name, t in seconds.items())
    print(f"batch {batch} x {n}: {ours * 1e3:.2f} ms  {others}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS[:-1]))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    copy = copy_gb_per_second()
    print(f"copy {copy:.1f} GB/s, float32, maximise, one thread, CPU seconds, best of {args.rounds}")
    compare_batch(512, 64, args.rounds)
    compare_batch(1024, 128, args.rounds)
    for n in args.sizes:
        for kind in args.kinds:
            compare(kind, n, copy, args.rounds)


if __name__ == "__main__":
    main()
