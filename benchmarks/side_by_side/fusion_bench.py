"""pymerge and FusionBench 0.2.33 on the same tensors: CPU and wall seconds, memory, agreement.

    python benchmarks/side_by_side/fusion_bench.py --blocks 1 --tasks 8 --reps 3 --threads 1

Blocks of ViT-B/32 in float32 (structured.py), a base and T fine-tuned models, in memory on both sides; the same
formula and constants on both. For each method one process a program, asked in turns; a small merge before each measured
one pays for imports. Memory is growth above the loaded models, the result included. WUDI runs two small counts of
steps; its time at 300 steps is on the straight line through them, its agreement that of the larger count.
Agreement: ||ours - theirs|| / ||theirs|| of the merged update, all tensors. The exit status is 1 if it is above 1e-3.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from side_by_side import tools  # noqa: E402
from structured import vit_blocks, write_models  # noqa: E402
from workers import Failed, Worker  # noqa: E402

REPOSITORY = HERE.parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "side_by_side_fusion_bench.json"
SIDES = ("pymerge", "fusion_bench")
AGREE = 1e-3
RESOLUTION = 1e-6  # singular values below this share of the largest are lost in float32
STEPS, FULL_STEPS = (2, 6), 300


@dataclass(frozen=True, kw_only=True)
class Case:
    """The same formula in the words of both programs.

    steps      each program's name for the count of iterations
    full_rank  the result takes every singular direction of the sum: FusionBench also those of rounding errors, pymerge
               not, so that matrices with any are excepted from the comparison"""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    steps: dict[str, str] = field(default_factory=dict)
    full_rank: bool = False


def cases(tasks: int) -> dict[str, Case]:
    floor = 1 / tasks
    return {
        "tsv_m": Case(
            ours={"method": "tsv_m", "parameters": {"scale": 1.0}},
            theirs={"method": "TaskSingularVectorMerging", "parameters": {"alpha": 1.0}},
        ),
        "svc": Case(
            ours={
                "method": "task_arithmetic",
                "parameters": {"scale": 0.3, "calibrate": {"method": "svc", "alpha": floor}},
            },
            theirs={
                "method": "SingularValueCalibrationArithmeticTask",
                "parameters": {"scaling_factor": 0.3, "alpha": floor},
            },
        ),
        "iso_cts": Case(
            ours={"method": "iso_cts", "parameters": {"scale": 1.0}},
            theirs={
                "method": "IsotropicMergingInCommonAndTaskSubspace",
                "parameters": {"scaling_factor": 1.0, "common_space_fraction": 0.8},
            },
        ),
        "iso_c": Case(
            ours={"method": "iso_c", "parameters": {"scale": 1.0}},
            theirs={"method": "IsotropicMergingInCommonSubspace", "parameters": {"scaling_factor": 1.0}},
            full_rank=True,
        ),
        "wudi": Case(
            ours={"method": "wudi", "parameters": {}},
            theirs={"method": "WUDIMerging", "parameters": {}},
            steps={"pymerge": "steps", "fusion_bench": "iter_num"},
        ),
        "ties": Case(
            ours={"method": "ties", "parameters": {"density": 0.2, "scale": 1.0}},
            theirs={
                "method": "TiesMergingAlgorithm",
                "parameters": {"scaling_factor": 1.0, "threshold": 20, "remove_keys": [], "merge_func": "mean"},
            },
        ),
    }


def arguments() -> argparse.Namespace:
    names = list(cases(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(names))
    parser.add_argument("--blocks", type=int, default=1, help="transformer blocks, 1 to 12; 7.09 M entries each")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "fusion_bench", help="models and results")
    parser.add_argument(
        "--fusion-bench-python",
        type=Path,
        default=REPOSITORY / ".venv-fusionbench" / "bin" / "python",
        help="interpreter of an environment with FusionBench; the default one is made if there is none",
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    if unknown := [name for name in args.methods if name not in names]:
        parser.error(f"unknown: {', '.join(unknown)}; methods: {', '.join(names)}")
    if not args.fusion_bench_python.exists():
        if args.fusion_bench_python != parser.get_default("fusion_bench_python"):
            parser.error(f"--fusion-bench-python: {args.fusion_bench_python} does not exist")
        tools.make_environment(args.fusion_bench_python.parents[1], tools.FUSION_BENCH)
    return args


def requests(case: Case, side: str) -> list[dict[str, Any]]:
    """What a worker is asked each round: one merge, or one for each count of steps."""
    request = case.ours if side == "pymerge" else case.theirs
    if not case.steps:
        return [request]
    name = case.steps[side]
    return [request | {"parameters": request["parameters"] | {name: count}} for count in STEPS]


def measure(name: str, args: argparse.Namespace, root: Path, versions: dict[str, Any]) -> dict[str, Any]:
    """Costs of each program, medians over the rounds, and the distance between their updates."""
    case = cases(args.tasks)[name]
    python = {"pymerge": sys.executable, "fusion_bench": str(args.fusion_bench_python)}
    runs: dict[str, list[list[dict[str, float]]]] = {side: [] for side in SIDES}
    saved = {side: args.work / f"{name}.{side}.safetensors" for side in SIDES}
    workers = {}
    try:
        for side in SIDES:
            workers[side] = Worker(side, root, args.threads, args.work / f"{name}.{side}.log", python[side])
            versions[side] = workers[side].versions
        for round_ in range(args.reps):
            for side in SIDES:
                asked = requests(case, side)
                if round_ == 0:
                    asked[-1] = asked[-1] | {"save": str(saved[side])}
                runs[side].append([workers[side].ask(request) for request in asked])
    finally:
        for worker in workers.values():
            worker.close()
    result: dict[str, Any] = {side: summarise(case, runs[side]) for side in SIDES}
    result["ours"], result["theirs"] = case.ours, case.theirs
    result |= compare(case, root, saved["pymerge"], saved["fusion_bench"], args.tasks)
    for path in saved.values():
        path.unlink()
    return result


def summarise(case: Case, rounds: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of one program: cpu and wall seconds, growth in bytes; iterative methods at FULL_STEPS by a line."""

    def median(key: str, position: int) -> float:
        return statistics.median(costs[position][key] for costs in rounds)

    last = len(rounds[0]) - 1
    out: dict[str, Any] = {"cpu": median("cpu", last), "wall": median("wall", last), "growth": median("growth", last)}
    if case.steps:
        out["counts"] = [
            {"steps": count, "cpu": median("cpu", i), "wall": median("wall", i)} for i, count in enumerate(STEPS)
        ]
        for key in ("cpu", "wall"):
            slope = (out[key] - median(key, 0)) / (STEPS[1] - STEPS[0])
            out[key] += slope * (FULL_STEPS - STEPS[1])
    return out | {"runs": rounds}


def compare(case: Case, root: Path, ours: Path, theirs: Path, tasks: int) -> dict[str, Any]:
    """Relative Frobenius distance of the merged updates in float64, over all tensors but the excepted ones."""
    above = below = 0.0
    excepted = []
    with ExitStack() as stack:
        base, left, right = (
            stack.enter_context(safe_open(path, "np")) for path in (root / "base" / "model.safetensors", ours, theirs)
        )
        for name in base.keys():
            start, a, b = (file.get_tensor(name).astype(np.float64) for file in (base, left, right))
            apart, size = np.square(a - b).sum(), np.square(b - start).sum()
            if case.full_rank and not apart <= AGREE**2 * size and unresolved(root, name, start, tasks):
                excepted.append(name)
                continue
            above, below = above + apart, below + size
    return {"difference": float((above / below) ** 0.5), "excepted": excepted}


def unresolved(root: Path, name: str, base: np.ndarray, tasks: int) -> bool:
    """Does the sum of a matrix's task vectors have singular values that float32 cannot tell from zero?"""
    total = np.zeros_like(base)
    for task in range(1, tasks + 1):
        with safe_open(root / f"t{task}" / "model.safetensors", "np") as file:
            total += file.get_tensor(name) - base
    values = np.linalg.svd(total, compute_uv=False) if total.ndim == 2 else np.ones(1)
    return bool(values[-1] < RESOLUTION * values[0])


def show(name: str, result: dict[str, Any]) -> None:
    ours, theirs = result["pymerge"], result["fusion_bench"]
    for side in SIDES:
        cost = result[side]
        line = f"{name:8s} {side:12s} {cost['cpu']:9.2f} CPU s {cost['wall']:9.2f} s {cost['growth'] / 1e6:+8.0f} MB"
        if side == "fusion_bench":
            line += f"   {theirs['cpu'] / ours['cpu']:6.1f} x CPU {theirs['wall'] / ours['wall']:6.1f} x wall"
            line += f" {theirs['growth'] / max(ours['growth'], 1):6.1f} x memory"
            line += f"   difference {result['difference']:.1e}"
            line += "" if result["difference"] <= AGREE else f" > {AGREE:g}: DISAGREES"
            line += f" ({len(result['excepted'])} matrices excepted)" if result["excepted"] else ""
        if "counts" in cost:
            measured = ", ".join(f"{c['steps']} steps {c['cpu']:.2f} CPU s" for c in cost["counts"])
            line += f"   (at {FULL_STEPS} steps, by the line through {measured})"
        print(line, flush=True)


def main() -> int:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    root = args.work / f"{args.blocks}x{args.tasks}"
    write_models(root, vit_blocks(args.blocks), args.tasks, "F32")
    versions: dict[str, Any] = {}
    results = {}
    for name in args.methods:
        try:
            results[name] = measure(name, args, root, versions)
            show(name, results[name])
        except Failed as failure:
            results[name] = {"failed": str(failure)}
            print(f"{name:8s} {failure}", flush=True)
    report = {
        "blocks": args.blocks,
        "tasks": args.tasks,
        "threads": args.threads,
        "reps": args.reps,
        **tools.provenance(REPOSITORY),
        "versions": versions,
        "methods": results,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(result.get("difference", math.inf) <= AGREE for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
