"""DARE (random mask, rescale, merge) against torch.bernoulli.  python benchmarks/bench_dare.py [--entries N]"""

from __future__ import annotations

import argparse

import torch
from timing import best_seconds, copy_gb_per_second, merger, models, report

from pymerge.ops.delta_rule import DeltaRule


def dare_eager(base: torch.Tensor, tuned: list[torch.Tensor], keep: float) -> torch.Tensor:
    update = torch.zeros(base.shape)
    for t in tuned:
        delta = t.float() - base.float()
        update += delta * torch.bernoulli(torch.full_like(delta, keep)) / keep
    return (base + update / len(tuned)).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1 << 24)
    parser.add_argument("--tasks", type=int, default=3)
    args = parser.parse_args()
    n, tasks = args.entries, args.tasks
    torch.set_num_threads(1)
    copy = copy_gb_per_second()
    print(f"copy {copy:.1f} GB/s, n = {n}, T = {tasks}, bfloat16")
    base, tuned = models(n, tasks)
    rule = DeltaRule(
        weights=(1.0 / tasks,) * tasks, keep=(0.5,) * tasks, keys=tuple(range(tasks)), rescales=(2.0,) * tasks
    )
    seconds = best_seconds({"dare": merger(rule, base, tuned)}, rounds=9)
    eager = best_seconds({"eager": lambda: dare_eager(base, tuned, 0.5)}, rounds=2)["eager"]
    report("dare", seconds["dare"], (tasks + 2) * 2 * n, copy, eager)


if __name__ == "__main__":
    main()
