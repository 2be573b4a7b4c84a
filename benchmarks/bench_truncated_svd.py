"""truncated_svd against torch.linalg.svd, svd_lowrank, torch.linalg.eigh of the float64 Gram matrix.

python benchmarks/bench_truncated_svd.py [--only 768x3072] [--spectrum heavy] [--rounds 3]
One thread, CPU seconds, candidates interleaved. overlap: ||U^T U_true||^2 / k; excess: residual^2 over the best - 1.
--merged adds how far a merge of the decompositions of 8 tasks is from float64's (k = side / 8).
"""

from __future__ import annotations

import os

for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse  # noqa: E402

import torch  # noqa: E402
from merged_difference import differences  # noqa: E402
from spectra import known_matrix, overlap  # noqa: E402
from timing import best_seconds  # noqa: E402

from pymerge.linalg import truncated_svd  # noqa: E402

CASES = ((768, 3072, 96), (768, 768, 96), (2048, 2048, 256), (2048, 2048, 64), (4096, 4096, 128))
TASKS = 8  # of a merge


def by_eigh(a: torch.Tensor, k: int):
    """What a careful user writes: float64 Gram matrix, all eigenpairs, the other side by a product."""
    wide = a.double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    u, s = vectors[:, -k:].flip(1), values[-k:].flip(0).sqrt()
    return u, s, (wide.mT @ u / s).mT


def print_merged(shapes: list[tuple[int, int]], spectrum: str) -> None:
    for m, n in dict.fromkeys(shapes):
        updates = [known_matrix(m, n, spectrum, seed=t)[0] for t in range(TASKS)]
        k = min(m, n) // TASKS
        for name, difference in differences(updates, k).items():
            print(
                f"{m}x{n} k={k:<4d} {name:12s} {TASKS} tasks, {spectrum}: merged difference {difference:.1e}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--spectrum", default="heavy", choices=("heavy", "fast", "clustered", "flat"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--routes", action="store_true", help="time each route of the exact mode, whatever is chosen")
    parser.add_argument("--skip-svd", action="store_true", help="leave out torch.linalg.svd (minutes at 4096)")
    parser.add_argument("--merged", action="store_true", help="differences of merges instead of times (minutes)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.merged:
        return print_merged([(m, n) for m, n, k in CASES if args.only in f"{m}x{n}-{k}"], args.spectrum)
    x = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / best_seconds({"sgemm": lambda: x @ x})["sgemm"] / 1e9
    print(f"sgemm {rate:.0f} GFLOP/s, spectrum {args.spectrum}")
    for m, n, k in CASES:
        if args.only and args.only not in f"{m}x{n}-{k}":
            continue
        a, u, s, _ = known_matrix(m, n, args.spectrum, k=k)
        width = k + max(16, k // 8)
        candidates = {
            "exact": lambda a=a, k=k: truncated_svd(a, k),
            "fast": lambda a=a, k=k: truncated_svd(a, k, mode="fast"),
            "svd_lowrank": lambda a=a, width=width: torch.svd_lowrank(a, q=width, niter=2),
            "eigh": lambda a=a, k=k: by_eigh(a, k),
        }
        if not args.skip_svd:
            candidates["svd"] = lambda a=a: torch.linalg.svd(a, full_matrices=False)
        if args.routes:
            for route in ("gram", "iteration"):
                candidates[route] = lambda a=a, k=k, route=route: truncated_svd(a, k, route=route)
        results = {name: run() for name, run in candidates.items()}
        seconds = best_seconds(candidates, args.rounds)
        best = float(s[k:].square().sum())
        for name, time in seconds.items():
            left = results[name][0][:, :k]
            left_values = (left.double().mT @ a.double()).square().sum()
            excess = (float(a.double().square().sum()) - float(left_values)) / best - 1
            ratio = seconds["svd"] / time if "svd" in seconds else float("nan")
            line = f"{m}x{n} k={k:<4d} {name:12s} {time * 1e3:9.1f} ms  {ratio:6.2f}x svd"
            line += f"  1 - overlap {1 - overlap(left, u):8.1e}  excess {excess:8.1e}"
            if hasattr(results[name], "info"):
                info = results[name].info
                line += f"  certified {int(info.certified_rank)} rounds {int(info.rounds)}"
                line += f" {info.routes[0]}: {info.reasons[0]}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
