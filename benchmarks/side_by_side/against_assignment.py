"""pymerge's assignment against scipy, lap and lapx: one square problem, scores in float32, CPU seconds of one thread.

    python benchmarks/side_by_side/against_assignment.py --sizes 384,768,1536,3072 --reps 3

lap and lapx want costs in float64 (largest score - score): these are made before the clock starts. All functions for
dense problems of either package take part. What is short is called in a row (peer_tools.take_turns), so that everyone
finds inputs and code in the caches. With the caches emptied before each call, problems of 384 rows with an obvious
matching take pymerge's Python front about as long as lap, whose float64 costs are there already (0.9x to 1.1x).
"""

from __future__ import annotations

import os

for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import functools  # noqa: E402
import importlib  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench_assign

import numpy as np  # noqa: E402
import peer_tools  # noqa: E402
import rows  # noqa: E402
import scipy  # noqa: E402
import torch  # noqa: E402
from bench_assign import KINDS, matrix  # noqa: E402
from rows import Row  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

from pymerge.linalg import assign  # noqa: E402

SOLVERS = ("lapjv", "lapjvx", "lapjvc", "lapjvs")
HARD = ("product",)  # every row ranks the columns alike: minutes from this size on
HARD_SIZE = 1024
SMALL = 1024  # rows up to which more repetitions are made
BOUND = 1e-6  # of the total score


def module_of(folder: Path) -> ModuleType | None:
    """The module `lap` of that folder, beside the other package's module of the same name."""
    if not folder.is_dir():
        return None
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("lap")
        for solver in SOLVERS:  # some import their parts when they are first called
            getattr(module, solver, lambda _: None)(np.eye(4))
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "lap"]:
            del sys.modules[name]
    return module


def packages() -> dict[str, ModuleType]:
    found = {name: module_of(peer_tools.PEERS / name) for name in peer_tools.LAPS}
    return {f"{name} {module.__version__}": module for name, module in found.items() if module}


def candidates(score: torch.Tensor, laps: dict[str, ModuleType]) -> dict[str, Callable[[], Any]]:
    array, cost = score.numpy(), (score.max() - score).double().numpy()
    runs: dict[str, Callable[[], Any]] = {
        "pymerge": lambda: assign(score, True),
        f"scipy {scipy.__version__}": lambda: linear_sum_assignment(array, maximize=True),
    }
    for name, module in laps.items():
        runs |= {f"{name} {s}": functools.partial(getattr(module, s), cost) for s in SOLVERS if hasattr(module, s)}
    return runs


def total(score: torch.Tensor, columns: Iterable[int]) -> float:
    return float(score[torch.arange(len(score)), torch.as_tensor(np.asarray(columns)).long()].double().sum())


def row(kind: str, n: int, laps: dict[str, ModuleType], peaks: peer_tools.Peaks, reps: int) -> Row:
    score = matrix(kind, n)
    runs = candidates(score, laps)
    found, results = peer_tools.take_turns(runs, reps)
    best = total(score, results[next(name for name in runs if name.startswith("scipy"))][1])
    apart = abs(total(score, results["pymerge"].columns) - best) / max(abs(best), 1e-30)
    return Row(
        peer="assignment",
        method=f"assignment: {kind}",
        setting=f"{n} x {n}, float32, 1 thread",
        measure="cpu",
        pymerge=found.pop("pymerge"),
        opponents=found,
        floors={"one reading of the scores": peaks.copied(4.0 * n * n)},
        difference=apart,
        agrees=apart <= BOUND,
        compared=f"total score, to scipy's, to {BOUND:g}",
    )


def main() -> int:
    parser = rows.arguments(__doc__, "assignment")
    parser.add_argument("--sizes", default="384,768,1536,3072")
    parser.add_argument("--kinds", default=",".join(KINDS))
    args = parser.parse_args()
    chosen, sizes = args.kinds.split(","), [int(size) for size in args.sizes.split(",")]
    if unknown := [name for name in chosen if name not in KINDS]:
        parser.error(f"unknown: {', '.join(unknown)}; kinds: {', '.join(KINDS)}")
    peer_tools.make_peers()
    peer_tools.one_core()
    laps = packages()
    peaks = peer_tools.peaks(256, 1 << 20, 1) if args.quick else peer_tools.peaks()
    found = []
    for n in [48] if args.quick else sizes:
        for kind in chosen:
            if kind not in HARD or n < HARD_SIZE:
                # Medians of few turns of less than a second are at the mercy of what else runs.
                found.append(row(kind, n, laps, peaks, 1 if args.quick else args.reps if n > SMALL else 5 * args.reps))
                peer_tools.show(found[-1:])
    rows.save(args.json, found)
    return 0 if all(entry.agrees for entry in found) else 1


if __name__ == "__main__":
    sys.exit(main())
