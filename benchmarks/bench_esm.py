"""ESM against the released formulation.  python benchmarks/bench_esm.py

One thread, CPU seconds, interleaved. `released`: float32, thin SVD of X D^T, eigenvectors completed to m columns,
coordinates of all of them, SVDs of both stacks. `covariance`: pymerge from X^T X; `rows`: from X. First the
decomposition of all tasks of a layer, then the whole merged update; errors against `released` in float64. Updates:
power-law spectrum, weights bfloat16. Memory: peak resident set above what was resident before the call, and what is
kept of the tasks' directions until the layer is merged.
"""

from __future__ import annotations

import os

for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from bench_project_delta import peak_megabytes  # noqa: E402
from bench_svc import weights  # noqa: E402
from timing import best_seconds  # noqa: E402
from torch import Tensor  # noqa: E402

from pymerge.linalg.packed import pack  # noqa: E402
from pymerge.methods._esm import merged_update, task_part  # noqa: E402
from pymerge.methods.base import TaskGroup, TensorInfo  # noqa: E402
from pymerge.methods.esm import Esm  # noqa: E402
from pymerge.statistics.moments import Moments  # noqa: E402

SETTINGS = Esm(preset="vit").settings("w")


def inputs(n: int, tasks: int, rows: int) -> list[Tensor]:
    """float32 [rows, n] with a power-law spectrum and a mean."""
    g = torch.Generator().manual_seed(1)
    decay = torch.arange(1, n + 1) ** -0.4
    mix = torch.linalg.qr(torch.randn(n, n, generator=g)).Q
    return [torch.randn(rows, n, generator=g) * decay @ mix + 0.1 * torch.randn(n, generator=g) for _ in range(tasks)]


def released_parts(base: Tensor, tuned: list[Tensor], samples: list[Tensor], dtype: torch.dtype) -> list[Any]:
    """Eigenvectors [m, m], eigenvalues and all coordinates of each task."""
    m, parts = base.shape[0], []
    for w, x in zip(tuned, samples, strict=True):
        d = w.to(dtype) - base.to(dtype)
        _, s, vh = torch.linalg.svd(x.to(dtype) @ d.mT, full_matrices=False)
        e = torch.cat([vh.mT, torch.eye(m, dtype=dtype, device=d.device)[:, len(s) :]], dim=1)
        parts.append((e, s.square(), e.mT @ d, d.norm()))
    return parts


def released_update(base: Tensor, tuned: list[Tensor], samples: list[Tensor], dtype: torch.dtype) -> Tensor:
    k = base.shape[0] // len(tuned)
    parts = released_parts(base, tuned, samples, dtype)
    norms = torch.stack([p[3] for p in parts])
    left, right = [], []
    for (e, lam, coordinates, _), norm in zip(parts, norms, strict=True):
        w = (lam[:k] / lam[:k].mean()) ** 0.15
        w = w / w.mean()
        left.append(e[:, :k] * w)
        right.append(w[:, None] * coordinates[:k] * (norm / norms.mean()) ** 2)
    u, v = torch.cat(left, 1), torch.cat(right)
    columns = v.norm(dim=0)
    v = v * (columns / columns.mean()) ** 2
    (p, s, q), (x, y, z) = (torch.linalg.svd(a, full_matrices=False) for a in (u, v))
    return 2 * s.mean() * y.mean() * ((p @ q) @ (x @ z))


def our_parts(group: TaskGroup) -> list[Any]:
    m, tasks = group.tuned[0].shape[0], len(group.tuned)
    assert group.inputs is not None
    return [task_part(group.delta(t), x, x.rows, m // tasks, SETTINGS) for t, x in enumerate(group.inputs)]


def kept_megabytes(parts: list[Any]) -> float:
    """Directions and coordinates: the first and the largest of the other matrices."""
    return sum(x.nbytes for part in parts for x in part if isinstance(x, Tensor) and x.dim() == 2) / 2**20


def report(title: str, runs: dict[str, Callable[[], Any]], rounds: int, truth: Tensor | None = None) -> None:
    results: dict[str, Any] = {}
    memory = {name: peak_megabytes(lambda x=name: results.update({x: runs[x]()})) for name in runs}
    seconds = best_seconds(runs, rounds)
    for name, took in seconds.items():
        line = (
            f"{title} {name:12s} {took:7.2f} s {seconds['released'] / took:6.2f}x released, peak {memory[name]:6.0f} MB"
        )
        if truth is None:
            line += f", kept {kept_megabytes(results[name]):6.1f} MB"
        else:
            line += f", error {float((results[name] - truth).norm() / truth.norm()):.1e}"
        print(line, flush=True)


def groups_of(base: Tensor, tuned: list[Tensor], samples: list[Tensor]) -> dict[str, TaskGroup]:
    """With either kind of statistics."""
    info = TensorInfo(name="w", shape=tuple(base.shape), tasks=len(tuned))
    rows = tuple(Moments(rows=len(x), mean=x.mean(0), samples=x) for x in samples)
    sums = tuple(Moments(rows=len(x), mean=x.mean(0), triangle=pack(x.mT @ x)) for x in samples)
    return {
        name: TaskGroup(info=info, base=base, tuned=tuple(tuned), inputs=seen)
        for name, seen in (("covariance", sums), ("rows", rows))
    }


def compare(m: int, n: int, args: argparse.Namespace) -> None:
    base, tuned = weights(m, n, args.tasks)
    samples = inputs(n, args.tasks, args.tokens)
    groups = groups_of(base, tuned, samples)
    title = f"{m}x{n} T={args.tasks}"
    runs: dict[str, Callable[[], Any]] = {name: lambda g=group: our_parts(g) for name, group in groups.items()}
    runs["released"] = lambda: released_parts(base, tuned, samples, torch.float32)
    report(f"{title} decomposition", runs, args.rounds)
    runs = {name: lambda g=group: merged_update(g, SETTINGS) for name, group in groups.items()}
    runs["released"] = lambda: released_update(base, tuned, samples, torch.float32)
    report(f"{title} merge        ", runs, args.rounds, released_update(base, tuned, samples, torch.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["768x3072", "3072x768", "768x768"], help="out x in")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1600, help="rows of X: 32 images of ViT-B/32")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for shape in args.shapes:
        m, n = map(int, shape.split("x"))
        compare(m, n, args)


if __name__ == "__main__":
    main()
