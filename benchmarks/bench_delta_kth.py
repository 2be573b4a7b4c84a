"""TIES (20 %, election, mean) against its kthvalue form in PyTorch.  python benchmarks/bench_delta_kth.py"""

from __future__ import annotations

import argparse

import torch
from timing import best_seconds, copy_gb_per_second, merger, models, report

from pymerge.ops.delta import TensorSurvey
from pymerge.ops.delta_kth import delta_kth
from pymerge.ops.delta_rule import DeltaRule, resolve


def ties_eager(base: torch.Tensor, tuned: list[torch.Tensor], k: int) -> torch.Tensor:
    deltas = torch.stack([t.float() - base.float() for t in tuned])
    size = deltas.abs()
    theta = size.kthvalue(size.shape[1] - k + 1, dim=1, keepdim=True).values
    deltas = torch.where(size >= theta, deltas, 0.0)
    agree = torch.where(torch.sign(deltas.sum(0)) > 0, deltas > 0, deltas < 0)
    return (base + (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)).bfloat16()


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
    ranks = (n // 5,) * tasks
    rule = DeltaRule(weights=(1.0,) * tasks, top=ranks, elect="mergekit", norm="count")
    answered = resolve(rule, TensorSurvey(base, tuned))

    out = torch.empty_like(base)

    def ties() -> None:
        merger(resolve(rule, TensorSurvey(base, tuned)), base, tuned, out)()

    seconds = best_seconds(
        {
            "kth": lambda: delta_kth(base, tuned, ranks),
            "kth of rows of 4096": lambda: delta_kth(base, tuned, (819,) * tasks, row_length=4096),
            "merge": merger(answered, base, tuned),
            "ties": ties,
        },
        rounds=7,
    )
    eager = best_seconds({"eager": lambda: ties_eager(base, tuned, ranks[0])}, rounds=2)["eager"]
    for name in ("kth", "kth of rows of 4096"):
        report(name, seconds[name], tasks * 2 * 2 * n, copy)
    report("elect and merge", seconds["merge"], (tasks + 2) * 2 * n, copy)
    report("ties", seconds["ties"], (3 * tasks + 2) * 2 * n, copy, eager)


if __name__ == "__main__":
    main()
