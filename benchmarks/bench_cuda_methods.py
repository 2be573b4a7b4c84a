"""Methods for matrices on a CUDA device against the papers' formulas in plain PyTorch on the same device.

    python benchmarks/bench_cuda_methods.py --out cuda_methods.json [--seconds 400]
    python benchmarks/bench_cuda_methods.py --out x.json --device cpu --shrink 64      the same calls, small: a dry run

One weight matrix of each shape, inputs and results on the device; formulas as the authors' code states them, their SVDs
by cuSOLVER (torch.linalg.svd), for TSV-M also by torch.svd_lowrank and, where installed, CuPy. Milliseconds are between
CUDA events, the median of up to five runs, one where a run takes over two seconds; a small run of each comes first, for
the libraries. Memory is the peak of torch's allocator above the inputs (CuPy has its own). `distance` is between the
results, ||ours - theirs|| / ||theirs||. No row begins after --seconds, and what is measured is written at once. Exit
code 1: pymerge failed in a row.
Element-wise methods are timed by bench_cuda.py, X^T X against cuBLAS by bench_cuda_linalg.py.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import bench_ace
import bench_esm
import bench_pave
import bench_svc
import torch
from torch import Tensor

from pymerge.methods._esm import merged_update
from pymerge.methods.ace import Ace
from pymerge.methods.base import TaskGroup, TensorInfo
from pymerge.methods.pave import Pave
from pymerge.methods.svc import SVC
from pymerge.methods.tsv_m import TsvM

SHAPES = ((2048, 2048), (2048, 8192), (4096, 4096), (4096, 11008))  # of 1B and 7B models
TASKS, ROWS = 4, 4096
RUNS, LONG = 5, 2.0  # seconds of a run that is not repeated
Run = Callable[[], Tensor]
Svd = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The input of a layer, on the device: pymerge's LayerInput by its second moment."""

    x: Tensor
    moment: Tensor
    samples: None = None
    triangle: None = None

    @classmethod
    def of(cls, x: Tensor) -> Seen:
        return cls(x=x, moment=x.double().mT @ x.double())

    @property
    def rows(self) -> int:
        return len(self.x)

    @property
    def mean(self) -> Tensor:
        return self.x.mean(0)

    def second_moment(self, dtype: torch.dtype) -> Tensor:
        return self.moment.to(dtype, copy=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    method: str
    ours: Run
    others: dict[str, Run] = field(default_factory=dict)


def thin(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(a, full_matrices=False)


def cupy_svd() -> Svd | None:
    if importlib.util.find_spec("cupy") is None:
        return None
    cupy: Any = importlib.import_module("cupy")

    def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = (torch.from_dlpack(x) for x in cupy.linalg.svd(cupy.from_dlpack(a.contiguous()), False))
        return u, s, vh

    return svd


def plain_tsv_m(base: Tensor, tuned: list[Tensor], svd: Svd, leading: Svd) -> Tensor:
    """The k leading triplets of each task vector, polar factors of both stacks by SVD."""
    parts = [leading(w.float() - base.float()) for w in tuned]
    k = min(base.shape) // len(tuned)
    left = torch.cat([u[:, :k] for u, _, _ in parts], dim=1)
    right = torch.cat([vh[:k] for _, _, vh in parts])
    (p, _, q), (x, _, y) = svd(left), svd(right)
    return (p @ q * torch.cat([s[:k] for _, s, _ in parts])) @ (x @ y)


def low_rank(k: int) -> Svd:
    """As many steps as let the directions, not only the residual, settle a little."""

    def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = torch.svd_lowrank(a, q=min(k + k // 8, *a.shape), niter=4)
        return u, s, v.mT

    return svd


class Problem:
    """One weight matrix of TASKS models, made on the CPU, and its cases. What a case needs is freed with it."""

    def __init__(self, m: int, n: int, device: str) -> None:
        self.shape, self.device = (m, n), device
        base, tuned = bench_svc.weights(m, n, TASKS)
        self.base, self.tuned = base.to(device), [w.to(device) for w in tuned]
        self.info = TensorInfo(name="w", shape=(m, n), tasks=TASKS)
        self.group = TaskGroup(info=self.info, base=self.base, tuned=tuple(self.tuned))

    def svc(self) -> Case:
        update = 0.3 * torch.stack([t.float() - self.base.float() for t in self.tuned]).sum(0)
        return Case(
            method="svc",
            ours=lambda: SVC().calibrate(update.clone(), self.group),
            others={"cuSOLVER SVD": lambda: bench_svc.materialised(update, self.base, self.tuned, torch.float32)},
        )

    def tsv_m(self) -> Case:
        leading = low_rank(min(self.shape) // TASKS)
        others: dict[str, Run] = {
            "cuSOLVER SVD": lambda: plain_tsv_m(self.base, self.tuned, thin, thin),
            "svd_lowrank": lambda: plain_tsv_m(self.base, self.tuned, thin, leading),
        }
        svd = cupy_svd() if self.device.startswith("cuda") else None
        if svd is not None:
            others["CuPy SVD"] = lambda: plain_tsv_m(self.base, self.tuned, svd, svd)
        return Case(method="tsv_m", ours=lambda: TsvM().combine(self.group), others=others)

    def samples(self, tasks: int) -> list[Tensor]:
        n = self.shape[1]
        return [x.to(self.device) for x in bench_esm.inputs(n, tasks, min(ROWS, 2 * n))]

    def esm(self) -> Case:
        samples = self.samples(TASKS)
        group = replace(self.group, inputs=tuple(Seen.of(x) for x in samples))
        return Case(
            method="esm",
            ours=lambda: merged_update(group, bench_esm.SETTINGS),
            others={"cuSOLVER SVD": lambda: bench_esm.released_update(self.base, self.tuned, samples, torch.float32)},
        )

    def pave(self) -> Case:
        group = TaskGroup(
            info=replace(self.info, tasks=1),
            base=self.base.float(),
            tuned=(self.tuned[0].float(),),
            inputs=(Seen.of(self.samples(1)[0]),),
        )
        step = Pave(rank_ratio=bench_pave.RATIO, allocation="none", eps=bench_pave.EPS)
        return Case(
            method="pave",
            ours=lambda: step.purify(group)[0],
            others={"cuSOLVER SVD, inverse": lambda: bench_pave.released_pave(group, torch.float32)},
        )

    def ace(self) -> Case:
        deltas = [d.to(self.device) for d in bench_ace.updates(*self.shape, TASKS, True)]
        group = TaskGroup(info=self.info, base=None, tuned=tuple(deltas))
        method = Ace(eps=1e-5, gate="heterogeneous")
        return Case(
            method="ace",
            ours=lambda: method.combine(group),
            others={"cuSOLVER SVD, inverse": lambda: bench_ace.released(deltas, 1e-5, True)},
        )

    def cases(self) -> dict[str, Callable[[], Case]]:
        return {name: getattr(self, name) for name in ("svc", "tsv_m", "esm", "pave", "ace")}


def timed(run: Run, device: str) -> tuple[Tensor, float]:
    """The result, and milliseconds on the device."""
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        return run(), (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end)


def measured(run: Run, device: str) -> tuple[Tensor, dict[str, Any]]:
    """The result, milliseconds, bytes of device memory above those in use before."""
    held = 0
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    result, first = timed(run, device)
    peak = torch.cuda.max_memory_allocated() - held if device.startswith("cuda") else None
    times = [first]
    while len(times) < RUNS and first < 1e3 * LONG:
        times.append(timed(run, device)[1])
    return result, {"ms": round(statistics.median(times), 3), "peak_bytes": peak, "runs": len(times)}


def row(case: Case, shape: tuple[int, int], device: str) -> dict[str, Any]:
    ours, found = measured(case.ours, device)
    found = {"method": case.method, "shape": list(shape), "tasks": TASKS, **found, "others": {}}
    for name, run in case.others.items():
        try:
            theirs, cost = measured(run, device)
        except (RuntimeError, NotImplementedError) as error:  # out of memory, or not there
            found["others"][name] = {"error": f"{type(error).__name__}: {error}"[:200]}
            continue
        cost["distance"] = float((ours - theirs).norm() / theirs.norm())
        cost["speedup"] = round(cost["ms"] / found["ms"], 2)
        found["others"][name] = cost
    return found


def benchmarks(device: str, shrink: int, until: float) -> Iterator[dict[str, Any]]:
    for make in Problem(64, 96, device).cases().values():
        with suppress(Exception):  # a row of the same case says what is wrong
            case = make()
            for run in (case.ours, *case.others.values()):
                run()
    for m, n in SHAPES:
        problem = Problem(m // shrink, n // shrink, device)
        for name, make in problem.cases().items():
            named = {"method": name, "shape": list(problem.shape)}
            if time.monotonic() > until:
                yield named | {"error": "left out: no time"}
                continue
            try:
                yield row(make(), problem.shape, device)
            except Exception as error:
                yield named | {"error": f"{type(error).__name__}: {error}"[:300], "failed": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide all sizes")
    parser.add_argument("--seconds", type=float, default=400.0, help="begin no row after so long")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device.startswith("cuda"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the bench modules ask for one, inputs are made by all
    until = time.monotonic() + args.seconds
    rows: list[dict[str, Any]] = []
    report = {
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device,
        "torch": torch.__version__,
        "methods": rows,
    }
    for found in benchmarks(args.device, args.shrink, until):
        rows.append(found)
        print(json.dumps(found), flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any("failed" in found for found in rows))


if __name__ == "__main__":
    sys.exit(main())
