"""KnOTS of LoRA adapters by their factors, against task vectors multiplied out and a full float64 SVD of [D_1 ... D_T].

    python benchmarks/lora.py [--tasks 8] [--rank 16] [--reps 3] [--shapes 2048x2048,2048x8192] [--out FILE]

Matrices of a model of 1B shape (hidden 2048, intermediate 8192): q (and o), k (and v), down. The default leaves out
gate and up, [8192, 2048], whose full SVD takes a quarter of an hour each. Both ways start from factors in memory, end
with the update [m, n] and use the same TIES; CPU seconds of one thread, in one run, the factored way before and behind
the other. Writes results/lora.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pymerge.methods.base import Factors, TaskGroup, TensorInfo
from pymerge.methods.knots import SMALLEST, Knots
from pymerge.methods.ties import Ties
from pymerge.ops.delta import merge_by_rule

METHOD = Knots(scope="tensor")


def adapters(m: int, n: int, tasks: int, rank: int) -> tuple[Factors, ...]:
    generator = torch.Generator().manual_seed(m + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return tuple(Factors(normal(m, rank) * 0.02, normal(rank, n) / n**0.5) for _ in range(tasks))


def factored(parts: tuple[Factors, ...]) -> Tensor:
    shape = (parts[0].left.shape[0], parts[0].right.shape[1])
    info = TensorInfo(name="matrix", shape=shape, tasks=len(parts))
    update = METHOD.combine_factors(TaskGroup(info=info, base=None, tuned=(), factors=parts))
    return update.left @ update.right


def materialised(parts: tuple[Factors, ...]) -> Tensor:
    deltas = [part.left.double() @ part.right.double() for part in parts]
    u, s, vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    kept = int((s > SMALLEST).sum())
    inside = s[:kept, None] * vh[:kept]
    blocks = [block.float().contiguous() for block in inside.split(deltas[0].shape[1], dim=1)]
    info = TensorInfo(name="matrix", shape=tuple(blocks[0].shape), tasks=len(parts))
    rule = Ties(density=METHOD.density, merge_func=METHOD.merge_func, scope="tensor").rule(info)
    return (u[:, :kept] @ merge_by_rule(rule, None, blocks).double()).float()


def seconds(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--shapes", default="2048x2048,512x2048,2048x8192")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "lora.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for text in given.shapes.split(","):
        m, n = map(int, text.split("x"))
        parts = adapters(m, n, given.tasks, given.rank)
        times = [seconds(lambda parts=parts: factored(parts)) for _ in range(given.reps)]
        slow, expected = seconds(lambda parts=parts: materialised(parts))
        times += [seconds(lambda parts=parts: factored(parts)) for _ in range(given.reps)]
        fast, found = statistics.median(t for t, _ in times), times[0][1]
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        rows.append(
            {"shape": [m, n], "factored": fast, "materialised": slow, "ratio": slow / fast, "difference": error}
        )
        print(f"{text}: {fast:.3f} s against {slow:.1f} s: {slow / fast:.0f} x, differ by {error:.1e}", flush=True)
    result = {
        "method": "knots",
        "tasks": given.tasks,
        "rank": given.rank,
        "threads": 1,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "matrices": rows,
        "ratio": sum(row["materialised"] for row in rows) / sum(row["factored"] for row in rows),
        "largest_difference": max(row["difference"] for row in rows),
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
