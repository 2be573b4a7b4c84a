"""delta_merge (linear) against eager PyTorch and a copy.  python benchmarks/bench_delta_merge.py [--entries N]"""

from __future__ import annotations

import argparse

import torch
from timing import best_seconds, copy_gb_per_second, merger, models, report

from pymerge.ops.delta_rule import DeltaRule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=1 << 24)
    n = parser.parse_args().entries
    torch.set_num_threads(1)
    copy = copy_gb_per_second()
    print(f"copy {copy:.1f} GB/s, n = {n}, bfloat16")
    for tasks in (2, 3, 8, 20):
        base, tuned = models(n, tasks)
        weights = [1.0 / tasks] * tasks
        rule = DeltaRule(weights=tuple(weights))

        def eager(base=base, tuned=tuned, weights=weights):
            update = sum(w * (t.float() - base.float()) for w, t in zip(weights, tuned, strict=True))
            return (base.float() + update).bfloat16()

        seconds = best_seconds(
            {"linear": merger(rule, None, tuned), "with base": merger(rule, base, tuned), "eager": eager}, rounds=7
        )
        report(f"linear T={tasks}", seconds["linear"], (tasks + 1) * 2 * n, copy)
        report(f"linear with base T={tasks}", seconds["with base"], (tasks + 2) * 2 * n, copy, seconds["eager"])


if __name__ == "__main__":
    main()
