"""pymerge's methods against plain PyTorch: the formulas as the papers' code states them, on the same tensors.

    python benchmarks/side_by_side/against_pytorch.py --cases esm,pave --reps 3

One thread on one core, CPU seconds, both in this process, inputs in memory. The formulations are those of the
benchmarks of the single methods (benchmarks/bench_*.py), and of pieces that methods are made of: randomised SVD,
second moments, projections of task vectors. Floors: what a method computes, at the speed of this core's products.
`difference` is between pymerge and the float32 formulation, whose own error is most of it.
"""

from __future__ import annotations

import os

for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmarks of the single methods

import bench_ace  # noqa: E402
import bench_align  # noqa: E402
import bench_esm  # noqa: E402
import bench_pave  # noqa: E402
import bench_svc  # noqa: E402
import peer_tools  # noqa: E402
import rows  # noqa: E402
import torch  # noqa: E402
from bench_cov_accumulate import cast_addmm  # noqa: E402
from bench_project_delta import looped, materialised_stats, stacked  # noqa: E402
from formulation import QUICK, Case, Sizes, by_work, frugal  # noqa: E402
from peer_tools import relative  # noqa: E402
from rows import Row  # noqa: E402
from spectra import known_matrix  # noqa: E402
from torch import Tensor  # noqa: E402

from pymerge.linalg import truncated_svd  # noqa: E402
from pymerge.methods._esm import merged_update  # noqa: E402
from pymerge.methods.ace import Ace  # noqa: E402
from pymerge.methods.base import TaskGroup, TensorInfo  # noqa: E402
from pymerge.methods.esm import Esm  # noqa: E402
from pymerge.methods.pave import Pave  # noqa: E402
from pymerge.methods.regmean import RegMean  # noqa: E402
from pymerge.methods.svc import SVC  # noqa: E402
from pymerge.methods.tsv_m import TsvM  # noqa: E402
from pymerge.ops.cov_accumulate import cov_accumulate  # noqa: E402
from pymerge.ops.project_delta import project_delta  # noqa: E402
from pymerge.ops.projection_stats import projection_stats  # noqa: E402
from pymerge.statistics.moments import Accumulator  # noqa: E402


def esm_problem(m: int, n: int, tasks: int, count: int) -> tuple[Tensor, list[Tensor], list[Tensor], TaskGroup, str]:
    """base, fine-tuned weights, inputs, and the group with these as pymerge collects them; what that is."""
    base, tuned = bench_svc.weights(m, n, tasks)
    samples = bench_esm.inputs(n, tasks, count)
    seen = []
    for x in samples:
        accumulator = Accumulator("w", torch.float32)
        accumulator.add(x)
        seen.append(accumulator.finish())
    info = TensorInfo(name="w", shape=(m, n), tasks=tasks)
    kind = f"{count} rows, {'second moments' if seen[0].samples is None else 'the rows themselves'}"
    return base, tuned, samples, TaskGroup(info=info, base=base, tuned=tuple(tuned), inputs=tuple(seen)), kind


def esm(sizes: Sizes) -> Iterator[Case]:
    """As many rows as 32 images of ViT-B/32 have; T = 4 for the tall shape, whose released SVDs take minutes with 8."""
    for m, n in sizes.shapes:
        tasks = sizes.tasks if m <= n else max(2, sizes.tasks // 2)
        base, tuned, samples, group, kind = esm_problem(m, n, tasks, sizes.rows)
        yield Case(
            method="esm",
            setting=f"{m} x {n}, T = {tasks}, {kind}",
            candidates={
                "pymerge": lambda g=group: merged_update(g, bench_esm.SETTINGS),
                "as released": lambda b=base, w=tuned, x=samples: bench_esm.released_update(b, w, x, torch.float32),
            },
            bound=1e-3,
            floor=by_work(Esm(preset="vit"), group.info) if group.inputs[0].samples is None else lambda _: {},
        )


def esm_directions(sizes: Sizes) -> Iterator[Case]:
    """The second with four times the rows, as 32 images of ViT-B/16 have them."""
    (m, n), tasks = sizes.shapes[1], sizes.tasks
    for count in (sizes.rows, 4 * sizes.rows):
        base, tuned, samples, group, kind = esm_problem(m, n, tasks, count)
        yield Case(
            method="esm: directions alone",
            setting=f"{m} x {n}, T = {tasks}, {kind}",
            candidates={
                "pymerge": lambda g=group: bench_esm.our_parts(g),
                "as released": lambda b=base, w=tuned, x=samples: bench_esm.released_parts(b, w, x, torch.float32),
            },
            bound=1e-3,
            distance=lambda ours, theirs: max(subspaces_apart(a.left, b[0]) for a, b in zip(ours, theirs, strict=True)),
            compared="energy of either basis outside the other",
        )


def subspaces_apart(basis: Tensor, other: Tensor) -> float:
    """Share of the first basis' energy outside the span of as many columns of the other; both have orthogonal ones."""
    q = basis.double() / basis.double().norm(dim=0)
    return 1.0 - float((other[:, : q.shape[1]].double().mT @ q).square().sum()) / q.shape[1]


def pave(sizes: Sizes) -> Iterator[Case]:
    step = Pave(rank_ratio=bench_pave.RATIO, allocation="none", eps=bench_pave.EPS)
    for m, n in sizes.shapes:
        group = bench_pave.problem(m, n, 1, 4 * sizes.rows)
        yield Case(
            method="pave",
            setting=f"{m} x {n}, 1 task, covariance",
            candidates={
                "pymerge": lambda g=group: step.purify(g)[0],
                "as released": lambda g=group: bench_pave.released_pave(g, torch.float32),
            },
            bound=1e-2,
            floor=by_work(step, group.info),
        )


def regmean(sizes: Sizes) -> Iterator[Case]:
    method = RegMean(alpha=bench_pave.ALPHA)
    group = bench_pave.problem(*sizes.shapes[1], 4, 4 * sizes.rows)
    yield Case(
        method="regmean",
        setting="{} x {}, T = 4, covariance".format(*sizes.shapes[1]),
        candidates={
            "pymerge": lambda: method.combine(group),
            "as released": lambda: bench_pave.released_regmean(group, torch.float32),
        },
        bound=1e-2,
        floor=by_work(method, group.info),
    )


def ace(sizes: Sizes) -> Iterator[Case]:
    square, wide, _ = sizes.shapes
    for (m, n), tasks, unequal in ((square, sizes.tasks, True), (square, sizes.tasks, False), (wide, 4, False)):
        deltas = bench_ace.updates(m, n, tasks, unequal)
        method = Ace(eps=1e-5, gate="heterogeneous" if unequal else "homogeneous")
        info = TensorInfo(name="w", shape=(m, n), tasks=tasks)
        yield Case(
            method="ace",
            setting=f"{m} x {n}, T = {tasks}, {method.gate}",
            candidates={
                "pymerge": lambda i=info, d=deltas, f=method: f.combine(TaskGroup(info=i, base=None, tuned=tuple(d))),
                "as released": lambda d=deltas, u=unequal: bench_ace.released(d, 1e-5, u),
            },
            bound=1e-2,
            floor=frugal("ace", m, n, tasks),
        )


def svc(sizes: Sizes) -> Iterator[Case]:
    for m, n in sizes.shapes:
        base, tuned = bench_svc.weights(m, n, sizes.tasks)
        update = 0.3 * sum(t.float() - base.float() for t in tuned)
        info = TensorInfo(name="w", shape=(m, n), tasks=sizes.tasks)
        group = TaskGroup(info=info, base=base, tuned=tuple(tuned))
        yield Case(
            method="svc",
            setting=f"{m} x {n}, T = {sizes.tasks}",
            candidates={
                "pymerge": lambda u=update, g=group: SVC().calibrate(u.clone(), g),
                "as released": lambda u=update, b=base, w=tuned: bench_svc.materialised(u, b, w, torch.float32),
            },
            bound=1e-3,
            floor=frugal("svc", m, n, sizes.tasks),
        )


def full_svd_tsv_m(base: Tensor, tuned: list[Tensor]) -> Tensor:
    """Thin SVD of each task vector, the leading k of each, polar factors of both stacks by SVD."""
    parts = [torch.linalg.svd(w.float() - base.float(), full_matrices=False) for w in tuned]
    k = min(base.shape) // len(tuned)
    left = torch.cat([u[:, :k] for u, _, _ in parts], dim=1)
    right = torch.cat([vh[:k] for _, _, vh in parts])
    values = torch.cat([s[:k] for _, s, _ in parts])
    (p, _, q), (x, _, y) = (torch.linalg.svd(stack, full_matrices=False) for stack in (left, right))
    return (p @ q * values) @ (x @ y)


def tsv_m(sizes: Sizes) -> Iterator[Case]:
    for m, n in sizes.shapes[:2]:
        base, tuned = bench_svc.weights(m, n, sizes.tasks)
        info = TensorInfo(name="w", shape=(m, n), tasks=sizes.tasks)
        group = TaskGroup(info=info, base=base, tuned=tuple(tuned))
        yield Case(
            method="tsv_m",
            setting=f"{m} x {n}, T = {sizes.tasks}",
            candidates={
                "pymerge": lambda g=group: TsvM().combine(g),
                "full SVDs": lambda b=base, w=tuned: full_svd_tsv_m(b, w),
            },
            bound=1e-3,
            floor=frugal("tsv_m", m, n, sizes.tasks),
        )


def mudsc(sizes: Sizes) -> Iterator[Case]:
    for kind in ("planted", "unrelated"):
        found = bench_align.searches(kind, sizes.layers)
        yield Case(
            method="mudsc",
            setting=f"ViT-S, {sizes.layers} layers, {kind}: start and one sweep",
            candidates={"pymerge": found["pymerge"], "dense, scipy": found["dense"]},
            bound=0.0,
            distance=lambda ours, theirs: float(any(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))),
            compared="permutations, equal",
        )


def randomised_svd(sizes: Sizes) -> Iterator[Case]:
    """A step more of either is another compromise: what counts beside the time is what the triplets lack."""
    m, n = sizes.shapes[1]
    k = m // 8
    a, u, _, _ = known_matrix(m, n, "heavy", k=k)
    width = k + max(4, k // 8)
    best = float((u.mT @ a.double()).square().sum())

    def lost(found: Any) -> float:
        return 1.0 - float((found[0][:, :k].double().mT @ a.double()).square().sum()) / best

    yield Case(
        method="randomised SVD",
        setting=f"{m} x {n}, {k} triplets, power-law spectrum",
        candidates={
            "pymerge": lambda: truncated_svd(a, k, mode="fast"),
            "torch.svd_lowrank, 2 steps": lambda: torch.svd_lowrank(a, q=width, niter=2),
        },
        bound=1e-5,
        distance=lambda ours, theirs: max(lost(ours) - lost(theirs), 0.0),
        compared="energy that pymerge's triplets lack of the best, beyond what svd_lowrank's do",
    )


def second_moments(sizes: Sizes) -> Iterator[Case]:
    for kind, dtype in (("half", torch.bfloat16), ("single", torch.float32)):
        n = sizes.wide
        x = torch.randn(sizes.rows, n, generator=torch.Generator().manual_seed(0)).to(dtype)
        totals = [torch.zeros(n, n) for _ in range(2)]

        def ours(x: Tensor = x, total: Tensor = totals[0]) -> Tensor:
            cov_accumulate(total.zero_(), x)
            return total

        def theirs(x: Tensor = x, total: Tensor = totals[1]) -> Tensor:
            cast_addmm(total.zero_(), x)
            return total

        yield Case(
            method="second moments",
            setting=f"X^T X of {sizes.rows} x {n}, {str(dtype).removeprefix('torch.')}",
            candidates={"pymerge": ours, "X.T @ X in float32": theirs},
            bound=1e-5,
            floor=lambda peaks, flops=sizes.rows * n * (n + 1.0), kind=kind: {
                "its products at GEMM speed": peaks.floor(**{kind: flops})
            },
            distance=lambda ours, theirs: relative(ours.triu(), theirs.triu()),
            compared="upper triangle",
        )


def projections(sizes: Sizes) -> Iterator[Case]:
    (m, n), tasks = sizes.shapes[1], sizes.tasks
    base, tuned = bench_svc.weights(m, n, tasks)
    basis = torch.linalg.qr(torch.randn(m, m // 8, generator=torch.Generator().manual_seed(0))).Q[None]
    several = basis.expand(tasks, -1, -1).contiguous()
    p = basis[0].mT @ (tuned[0].float() - base.float())
    flops = 2.0 * tasks * basis.shape[2] * m * n
    setting = f"{m} x {n}, T = {tasks}, {basis.shape[2]} directions, bfloat16"
    yield Case(
        method="projection of task vectors",
        setting=setting,
        candidates={
            "pymerge": lambda: project_delta(several, base, tuned),
            "a task at a time": lambda: looped(several, base, tuned),
            "stacked": lambda: stacked(several, base, tuned),
        },
        bound=1e-5,
        floor=lambda peaks: {"its products at GEMM speed": peaks.floor(single=flops)},
    )
    yield Case(
        method="projection statistics",
        setting=setting,
        candidates={
            "pymerge": lambda: torch.cat([x.float() for x in projection_stats(basis[0], p, base, tuned)]),
            "stacked": lambda: torch.cat(materialised_stats(basis, p, base, tuned)),
        },
        bound=1e-4,
        floor=lambda peaks: {"its products at GEMM speed": peaks.floor(single=flops)},
    )


CASES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "esm": esm,
    "esm_directions": esm_directions,
    "pave": pave,
    "regmean": regmean,
    "ace": ace,
    "svc": svc,
    "tsv_m": tsv_m,
    "mudsc": mudsc,
    "randomised_svd": randomised_svd,
    "second_moments": second_moments,
    "projections": projections,
}


def row(case: Case, peaks: peer_tools.Peaks, reps: int) -> Row:
    runs, results = peer_tools.take_turns(case.candidates, reps)
    ours, *others = case.candidates
    apart = max(case.distance(results[ours], results[other]) for other in others)
    return Row(
        peer="pytorch",
        method=case.method,
        setting=f"{case.setting}, 1 thread",
        measure="cpu",
        pymerge=runs[ours],
        opponents={other: runs[other] for other in others},
        floors=case.floor(peaks),
        difference=apart,
        agrees=apart <= case.bound,
        compared=f"{case.compared}, to {case.bound:g}",
        note=case.note,
    )


def main() -> int:
    parser = rows.arguments(__doc__, "pytorch")
    parser.add_argument("--cases", default=",".join(CASES))
    args = parser.parse_args()
    chosen = args.cases.split(",")
    if unknown := [name for name in chosen if name not in CASES]:
        parser.error(f"unknown: {', '.join(unknown)}; cases: {', '.join(CASES)}")
    peer_tools.one_core()
    peaks = peer_tools.peaks(256, 1 << 20, 1) if args.quick else peer_tools.peaks()
    print(f"one core: {peaks}", flush=True)
    found = []
    for name in chosen:
        for case in CASES[name](QUICK if args.quick else Sizes()):
            found.append(row(case, peaks, 1 if args.quick else args.reps))
            peer_tools.show(found[-1:])
    rows.save(args.json, found)
    return 0 if all(entry.agrees for entry in found) else 1


if __name__ == "__main__":
    sys.exit(main())
