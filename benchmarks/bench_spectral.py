"""The spectral methods against plain PyTorch forms of what the authors released, on the matrices of a ViT-B/32 block.

python benchmarks/bench_spectral.py [--methods tsv_m,iso_c,iso_cts,wudi] [--tasks 8] [--rounds 3] [--steps 4] [--parts]
One thread, CPU seconds, candidates interleaved. A block has four 768x768 matrices (q, k, v, out), one 3072x768 and one
768x3072 (MLP). error: of the merged update against the released form. `--parts` says where the time goes. WUDI: a step,
from the difference of two runs of `--steps` and twice as many; the error is that of the way gone after the longer.
"""

from __future__ import annotations

import os

for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse  # noqa: E402
import contextlib  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from spectra import known_matrix  # noqa: E402
from timing import best_seconds  # noqa: E402
from torch import Tensor  # noqa: E402

from pymerge import linalg, methods  # noqa: E402
from pymerge.methods import _common_space, _spectral  # noqa: E402
from pymerge.methods.base import MatrixCombine, TaskGroup, TensorInfo  # noqa: E402

SHAPES = {(768, 768): 4, (3072, 768): 1, (768, 3072): 1}  # and how many of each a block has
CHEAP = 8  # times as many steps of WUDI are timed as of its released form
SHARED = 0.3  # of the update's size, common to all tasks


def models(m: int, n: int, tasks: int) -> tuple[Tensor, list[Tensor]]:
    """Weights of standard deviation 0.02, updates of a fiftieth of their norm with power-law spectra."""
    base = 0.02 * torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    common = SHARED * known_matrix(m, n, seed=100)[0]
    updates = [common + known_matrix(m, n, seed=t)[0] for t in range(tasks)]
    return base, [base + u * (0.02 * base.norm() / u.norm()) for u in updates]


def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(a, full_matrices=False)


def unitary(a: Tensor) -> Tensor:
    u, _, vh = svd(a)
    return u @ vh


def released_tsv_m(deltas: list[Tensor]) -> Tensor:
    k = int(min(deltas[0].shape) / len(deltas))
    found = [svd(d) for d in deltas]
    left = torch.cat([u[:, :k] for u, _, _ in found], dim=1)
    right = torch.cat([vh[:k] for _, _, vh in found])
    values = torch.cat([s[:k] for _, s, _ in found])
    return unitary(left) @ torch.diag(values) @ unitary(right)


def released_iso_c(deltas: list[Tensor]) -> Tensor:
    u, s, vh = svd(torch.stack(deltas).sum(0))
    return s.mean() * (u @ vh)


def released_iso_cts(deltas: list[Tensor], fraction: float = 0.8) -> Tensor:
    tasks, r = len(deltas), min(deltas[0].shape)
    each = round((r - int(r * fraction)) / tasks)
    common = r - each * tasks
    u, s, vh = svd(torch.stack(deltas).sum(0))
    u, s, vh = u[:, :common], s[:common], vh[:common]
    lefts, values, rights = [], [], []
    for d in deltas:
        a, b, c = svd(d - u @ (u.mT @ d))
        lefts.append(a[:, :each]), values.append(b[:each]), rights.append(c[:each])
    mean = torch.cat([*values, s]).mean()
    return mean * unitary(torch.cat([*lefts, u], dim=1)) @ unitary(torch.cat([*rights, vh]))


def released_wudi(deltas: list[Tensor], steps: int) -> Tensor:
    stacked = torch.stack(deltas)
    norms = stacked.square().sum((1, 2))
    merged = stacked.sum(0).requires_grad_(True)
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        inner = (merged - stacked) @ stacked.mT
        (inner.square().sum((1, 2)) / norms).sum().backward()
        optimizer.step()
    return merged.detach()


RELEASED: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "tsv_m": released_tsv_m,
    "iso_c": released_iso_c,
    "iso_cts": released_iso_cts,
}


def error(mine: Tensor, other: Tensor) -> float:
    return float((mine.double() - other.double()).norm() / other.double().norm())


def parts(run: Callable[[], object]) -> str:
    """Share of a run's CPU time in each linear algebra function that the methods call."""
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            start = time.process_time()
            result = function(*args, **kwargs)
            spent[name] += time.process_time() - start
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name in ("polar", "truncated_svd", "tail_subspace"):
            replacement = timed(name, getattr(linalg, name))
            for module in (linalg, _spectral, _common_space):  # where methods have it from
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, replacement))
        start = time.process_time()
        run()
        total = time.process_time() - start
    return ", ".join(f"{k} {v / total:.0%}" for k, v in spent.most_common())


def merged(name: str, group: TaskGroup, **settings: int) -> Tensor:
    method = methods.get(name)(**settings)
    assert isinstance(method, MatrixCombine)
    return method.combine(group)


def bench(name: str, group: TaskGroup, rounds: int, steps: int) -> tuple[float, float, float]:
    """CPU seconds of the released form and of pymerge (WUDI: of a step), and the difference of their results."""

    def deltas() -> list[Tensor]:
        assert group.base is not None
        return [t - group.base for t in group.tuned]

    if name != "wudi":
        found = {"released": lambda: RELEASED[name](deltas()), "mine": lambda: merged(name, group)}
        off = error(found["mine"](), found["released"]())
        seconds = best_seconds(found, rounds)
        return seconds["released"], seconds["mine"], off
    start = sum(deltas())
    off = error(merged(name, group, steps=2 * steps) - start, released_wudi(deltas(), 2 * steps) - start)
    mine = CHEAP * steps  # a step is a fraction of the set-up
    found = {f"released {s}": lambda s=s: released_wudi(deltas(), s) for s in (steps, 2 * steps)}
    found |= {f"mine {s}": lambda s=s: merged(name, group, steps=s) for s in (mine, 2 * mine)}
    seconds = best_seconds(found, rounds)
    per_step = [
        (seconds[f"{who} {2 * count}"] - seconds[f"{who} {count}"]) / count
        for who, count in (("released", steps), ("mine", mine))
    ]
    return per_step[0], per_step[1], off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="tsv_m,iso_c,iso_cts,wudi")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--shapes", default="", help="only those that contain this, as 768x3072")
    parser.add_argument("--parts", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / best_seconds({"sgemm": lambda: x @ x})["sgemm"] / 1e9
    print(f"sgemm {rate:.0f} GFLOP/s, T = {args.tasks}, float32")
    for name in args.methods.split(","):
        total = [0.0, 0.0]
        for (m, n), count in SHAPES.items():
            if args.shapes not in f"{m}x{n}":
                continue
            base, tuned = models(m, n, args.tasks)
            info = TensorInfo(name="w", shape=(m, n), tasks=args.tasks)
            group = TaskGroup(info=info, base=base, tuned=tuple(tuned))
            released, mine, off = bench(name, group, args.rounds, args.steps)
            total[0] += count * released
            total[1] += count * mine
            line = f"{name:8s} {m}x{n:<5d} released {released * 1e3:9.1f} ms  pymerge {mine * 1e3:8.1f} ms"
            print(f"{line}  {released / mine:6.2f}x  error {off:.1e}", flush=True)
            if args.parts and name != "wudi":
                print(f"         {parts(lambda g=group, name=name: merged(name, g))}", flush=True)
        line = f"{name:8s} block      released {total[0] * 1e3:9.1f} ms  pymerge {total[1] * 1e3:8.1f} ms"
        print(f"{line}  {total[0] / total[1]:6.2f}x", flush=True)


if __name__ == "__main__":
    main()
