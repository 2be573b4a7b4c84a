"""PAVE's purification and RegMean's solve against the released formulation.  python benchmarks/bench_pave.py

One thread, CPU seconds, interleaved; one task (PAVE) or `--tasks` of them (RegMean). From stored moments (X^T X,
float32) on both sides. `released`: C, one check of the ridge by an explicit inverse, float32 SVD of W C, times the
inverse; RegMean: explicit inverse in float32. Error: of the task vector (the update) against float64. Memory: peak
resident set above what was resident before the call.
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

from pymerge.methods.base import TaskGroup, TensorInfo  # noqa: E402
from pymerge.methods.pave import Pave  # noqa: E402
from pymerge.methods.regmean import RegMean  # noqa: E402
from pymerge.statistics.moments import Accumulator  # noqa: E402

SHAPES = ((768, 768), (768, 3072), (3072, 768))  # of ViT-B/32
RATIO, EPS, ALPHA = 0.984375, 0.1, 0.95


def problem(m: int, n: int, tasks: int, rows: int) -> TaskGroup:
    """Weights with small updates, inputs whose features differ in size and are correlated."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(m, n, generator=g) / n**0.5
    tuned = tuple(base + 0.05 * torch.randn(m, n, generator=g) / n**0.5 for _ in range(tasks))
    inputs = []
    for _ in range(tasks):
        accumulator = Accumulator("x", torch.float32)
        shared = torch.randn(rows, 16, generator=g) @ torch.randn(16, n, generator=g) * 0.3
        accumulator.add(shared + torch.randn(rows, n, generator=g) * torch.logspace(0.3, -0.7, n))
        inputs.append(accumulator.finish())
    info = TensorInfo(name="w", shape=(m, n), tasks=tasks)
    return TaskGroup(info=info, base=base, tuned=tuned, inputs=tuple(inputs))


def released_pave(group: TaskGroup, dtype: torch.dtype) -> Tensor:
    assert group.inputs is not None and group.base is not None
    seen, w = group.inputs[0], group.tuned[0].to(dtype)
    c = seen.second_moment(torch.float64).to(dtype) / seen.rows
    eye = torch.eye(len(c), dtype=dtype, device=c.device)
    c += EPS * eye
    inverse = torch.linalg.inv(c)
    (inverse @ c - eye).norm()  # the loop's criterion
    u, s, vh = torch.linalg.svd(w @ c, full_matrices=False)
    rank = round(RATIO * min(w.shape))
    return (u[:, :rank] * s[:rank]) @ vh[:rank] @ inverse - group.base.to(dtype)


def released_regmean(group: TaskGroup, dtype: torch.dtype) -> Tensor:
    assert group.inputs is not None and group.base is not None
    grams = []
    for seen in group.inputs:
        gram = seen.second_moment(torch.float64).to(dtype) / seen.rows
        grams.append(ALPHA * gram + (1 - ALPHA) * torch.diag(gram.diagonal()))
    weighted = torch.stack([w.to(dtype) @ gram for w, gram in zip(group.tuned, grams, strict=True)]).sum(0)
    return weighted @ torch.linalg.inv(torch.stack(grams).sum(0)) - group.base.to(dtype)


def show(title: str, runs: dict[str, Callable[[], Tensor]], truth: Tensor, rounds: int) -> None:
    results: dict[str, Tensor] = {}
    memory = {name: peak_megabytes(lambda x=name: results.update({x: runs[x]()})) for name in runs}
    seconds = best_seconds(runs, rounds)
    ours = next(iter(seconds.values()))
    for name, took in seconds.items():
        error = float((results[name].double() - truth).norm() / truth.norm())
        line = f"{title} {name:10s} {took * 1e3:9.1f} ms {took / ours:6.2f} of ours {memory[name]:7.1f} MB"
        print(f"{line}  error {error:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=4, help="of RegMean")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    step = Pave(rank_ratio=RATIO, allocation="none", eps=EPS)
    for m, n in SHAPES:
        one, several = problem(m, n, 1, args.rows), problem(m, n, args.tasks, args.rows)
        runs: dict[str, Callable[[], Tensor]] = {
            "pave": lambda group=one: step.purify(group)[0],
            "released": lambda group=one: released_pave(group, torch.float32),
        }
        show(f"{m}x{n}", runs, released_pave(one, torch.float64), args.rounds)
        runs = {
            "regmean": lambda group=several: RegMean(alpha=ALPHA).combine(group),
            "released": lambda group=several: released_regmean(group, torch.float32),
        }
        show(f"{m}x{n} T={args.tasks}", runs, released_regmean(several, torch.float64), args.rounds)


if __name__ == "__main__":
    main()
