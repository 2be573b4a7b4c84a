"""Singular value calibration against the released formulation and the float64 form.  python benchmarks/bench_svc.py

One thread, CPU seconds, interleaved. `released`: float32 SVD, responses of all tasks as one tensor [k, T, n];
`float64`: the same in double precision, as FusionBench's default does it. Updates: 0.3 times the sum, weights bfloat16.
Error: against `float64`. Memory: peak resident set above what was resident before the call.
"""

from __future__ import annotations

import os

for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse  # noqa: E402
from collections.abc import Callable  # noqa: E402

import torch  # noqa: E402
from bench_project_delta import peak_megabytes  # noqa: E402
from timing import best_seconds  # noqa: E402
from torch import Tensor  # noqa: E402

from pymerge.methods._svc_directions import all_directions  # noqa: E402
from pymerge.methods.base import TaskGroup, TensorInfo  # noqa: E402
from pymerge.methods.svc import SVC  # noqa: E402
from pymerge.ops.projection_stats import projection_stats  # noqa: E402

BLOCK = ((768, 768, 4), (768, 3072, 1), (3072, 768, 1))  # of ViT-B/32, with how many there are
LARGE = ((2048, 8192, 1),)


def weights(m: int, n: int, tasks: int) -> tuple[Tensor, list[Tensor]]:
    """A base and fine-tuned weights, bfloat16: each task's update has a power-law spectrum and some shared part."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(m, n, generator=g) * 0.02
    rank = min(m, n) // 4
    decay = torch.arange(1, rank + 1) ** -0.5
    shared = torch.randn(m, 16, generator=g) @ torch.randn(16, n, generator=g)

    def tuned() -> Tensor:
        own = (torch.randn(m, rank, generator=g) * decay) @ torch.randn(rank, n, generator=g)
        return (base + 1e-4 * (own + 0.5 * shared + torch.randn(m, n, generator=g))).bfloat16()

    return base.bfloat16(), [tuned() for _ in range(tasks)]


def materialised(update: Tensor, base: Tensor, tuned: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All deltas, the SVD, and responses [k, T, n], in one precision; alpha = 1/T."""
    deltas = torch.stack([t.to(dtype) - base.to(dtype) for t in tuned])
    u, s, vh = torch.linalg.svd(update.to(dtype), full_matrices=False)
    responses = torch.einsum("mk,tmn->ktn", u, deltas)
    merged = s[:, None] * vh
    coefficients = (responses * merged[:, None]).sum(2) / responses.square().sum(2).clamp(min=1e-12)
    eta = coefficients.clamp(min=1 / len(tuned)).mean(1)
    return (u * (s / eta)) @ vh


def candidates(m: int, n: int, tasks: int, args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    base, tuned = weights(m, n, tasks)
    update = 0.3 * sum(t.float() - base.float() for t in tuned)
    group = TaskGroup(info=TensorInfo(name="w", shape=(m, n), tasks=tasks), base=base, tuned=tuple(tuned))
    runs: dict[str, Callable[[], Tensor]] = {
        "svc": lambda: SVC().calibrate(update.clone(), group),
        "released": lambda: materialised(update, base, tuned, torch.float32),
    }
    if not args.skip_float64:
        runs["float64"] = lambda: materialised(update, base, tuned, torch.float64)
    if args.parts:
        d = all_directions(update)
        runs |= {
            "  directions": lambda: all_directions(update).q,
            "  statistics": lambda: projection_stats(d.q, d.p, base, tuned)[0],
            "  float32 SVD": lambda: torch.linalg.svd(update if m > n else update.mT, full_matrices=False)[1],
        }
    return runs


def first_run(runs: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Results, and peak memory of each in MB."""
    results: dict[str, Tensor] = {}
    memory = {name: peak_megabytes(lambda x=name: results.update({x: runs[x]()})) for name in runs}
    return results, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[8])
    parser.add_argument("--large", action="store_true", help="2048 x 8192 in place of a ViT-B/32 block")
    parser.add_argument("--parts", action="store_true", help="time the decomposition and the statistics alone, too")
    parser.add_argument("--skip-float64", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for tasks in args.tasks:
        total: dict[str, float] = {}
        for m, n, count in LARGE if args.large else BLOCK:
            runs = candidates(m, n, tasks, args)
            results, memory = first_run(runs)
            seconds = best_seconds(runs, args.rounds)
            for name, took in seconds.items():
                total[name] = total.get(name, 0.0) + count * took
                line = f"{m}x{n} T={tasks} {name:14s} {took * 1e3:9.1f} ms {took / seconds['svc']:6.2f} of svc"
                line += f" {memory[name]:7.1f} MB"
                if "float64" in results and not name.startswith(" "):
                    error = (results[name] - results["float64"]).norm() / results["float64"].norm()
                    line += f"  error {float(error):.1e}"
                print(line, flush=True)
        if not args.large:
            print(f"block T={tasks}: " + ", ".join(f"{name.strip()} {t * 1e3:.0f} ms" for name, t in total.items()))


if __name__ == "__main__":
    main()
