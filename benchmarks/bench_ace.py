"""ACE on one weight matrix against the released formulation in plain PyTorch (T Gram matrices, inverse, full SVD).

python benchmarks/bench_ace.py [--only 768x3072] [--tasks 8] [--branch heterogeneous] [--rounds 3]
One thread, CPU seconds, candidates interleaved; memory: growth of the peak resident set during the first round.
"""

from __future__ import annotations

import os

for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse  # noqa: E402
import ctypes  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from spectra import known_matrix  # noqa: E402
from torch import Tensor  # noqa: E402

from pymerge.methods.ace import Ace  # noqa: E402
from pymerge.methods.base import TaskGroup, TensorInfo  # noqa: E402

SHAPES = ((768, 768), (768, 3072), (3072, 768), (2048, 8192))
NOISE = 0.5  # of an update's norm, beside a power law: keeps the sums as well conditioned as rounding to bfloat16 does


def updates(m: int, n: int, tasks: int, unequal: bool) -> list[Tensor]:
    """Heavy-tailed spectra and noise, float32; norms near 0.5, or spread over a factor of eight."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for t in range(tasks):
        a = known_matrix(m, n, seed=t)[0]
        noise = torch.randn(m, n, generator=generator)
        d = a / a.norm() + NOISE * noise / noise.norm()
        size = 0.25 * 8.0 ** (t / (tasks - 1)) if unequal else 0.5
        found.append(d * (size / d.norm()))
    return found


def released(deltas: list[Tensor], eps: float, unequal: bool) -> Tensor:
    """The released formulas as they stand, float32."""
    d = torch.stack(deltas)
    tasks, m, n = d.shape
    energy = torch.stack([torch.trace(x.mT @ x) for x in d])
    grams = []
    for x in d:
        c = x - x.mean(0)
        grams.append(c.mT @ c)
    trace = torch.stack([torch.trace(g) for g in grams]) + 1e-12
    ridge = [eps / float(x) if unequal else eps for x in trace]
    if unequal:
        grams = [g / x for g, x in zip(grams, trace, strict=True)]
    eye = torch.eye(n, device=d.device)
    total = sum((g + r * eye for g, r in zip(grams, ridge, strict=True)), torch.zeros_like(eye))
    averaged = torch.zeros_like(d[0])
    for x, g, r in zip(d, grams, ridge, strict=True):
        averaged += (x - x.mean(0)) @ (g + r * eye)
    row = sum(grams, torch.zeros_like(eye)).mean(0, keepdim=True)
    x0 = averaged @ torch.linalg.inv(total + (row / (energy.mean() + 1e-12) if unequal else row))
    if not unequal:
        return x0
    mean = total / tasks
    f = sum((x @ (g - mean) for x, g in zip(d, grams, strict=True)), torch.zeros_like(x0)) + x0
    u, s, vh = torch.linalg.svd(f, full_matrices=False)
    k = int(0.3 * min(m, n))
    return x0 + s[:k].mean() * (u[:, :k] @ vh[:k])


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def allocator_returns(at_once: bool) -> None:
    """Whether freed memory stops being resident, which the figures of memory need and those of time do not want."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 1 << 18 if at_once else 1 << 25)  # M_MMAP_THRESHOLD
    libc.mallopt(-1, 1 << 18 if at_once else 1 << 30)  # M_TRIM_THRESHOLD
    libc.malloc_trim(0)


@dataclass
class Measured:
    """The result of a run, its least CPU seconds, and by how many bytes it raised the peak resident set."""

    result: Any = None
    seconds: float = float("inf")
    memory: int = 0

    def run(self, work: Callable[[], object]) -> None:
        self.result = None
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here
        before, start = resident("VmRSS"), time.process_time()
        self.result = work()
        self.seconds = min(self.seconds, time.process_time() - start)
        self.memory = self.memory or resident("VmHWM") - before


def compare(m: int, n: int, tasks: int, unequal: bool, eps: float, rounds: int) -> None:
    deltas = updates(m, n, tasks, unequal)
    info = TensorInfo(name="w", shape=(m, n), tasks=tasks)
    method = Ace(eps=eps, gate="heterogeneous" if unequal else "homogeneous")

    def mine() -> tuple[Tensor, dict]:
        group = TaskGroup(info=info, base=None, tuned=tuple(deltas))
        return method.combine(group), group.notes.facts

    def theirs() -> Tensor:
        return released(deltas, eps, unequal)

    ours, authors = Measured(), Measured()
    for i in range(rounds):
        allocator_returns(i == 0)
        ours.run(mine)
        authors.run(theirs)
    (update, facts), expected = ours.result, authors.result
    difference = float((update - expected).norm() / expected.norm())
    print(
        f"{m}x{n} T={tasks} {facts['branch']:13s} {facts['route']:12s} {facts['precision']} "
        f"condition {facts['condition']:8.1e}: {ours.seconds * 1e3:8.0f} ms, "
        f"{authors.seconds / ours.seconds:5.2f}x released ({authors.seconds * 1e3:.0f} ms); memory "
        f"{ours.memory / 1e6:.0f} MB (workspace {method.workspace(info) / 1e6:.0f}) against "
        f"{authors.memory / 1e6:.0f} MB; difference {difference:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--tasks", type=int, nargs="*", default=(4, 8))
    parser.add_argument("--branch", default="", choices=("", "homogeneous", "heterogeneous"))
    parser.add_argument("--eps", type=float, default=1e-5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for m, n in SHAPES:
        for tasks in args.tasks:
            for branch in ("homogeneous", "heterogeneous"):
                if args.only in f"{m}x{n}" and args.branch in branch:
                    compare(m, n, tasks, branch == "heterogeneous", args.eps, args.rounds)


if __name__ == "__main__":
    main()
