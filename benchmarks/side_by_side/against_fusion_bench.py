"""pymerge and FusionBench 0.2.33 on the same tensors: CPU and wall seconds, memory, agreement.

    python benchmarks/side_by_side/against_fusion_bench.py --blocks 1 --tasks 8 --reps 3 --threads 1

Blocks of ViT-B/32 in float32 (structured.py), a base and T fine-tuned models, in memory on both sides; the same
formula and constants on both. For each method one process a program, asked in turns; a small merge before each measured
one pays for imports. Memory is growth above the loaded models, the result included. WUDI runs two small counts of
steps; its time at 300 steps is on the straight line through them, its agreement that of the larger count. RegMean has
the same second moments on both sides (layer_inputs.py), in memory like the models; only the merge is timed.
Agreement: ||ours - theirs|| / ||theirs|| of the merged update, all tensors. The exit status is 1 if it is above 1e-3.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import rows
import tools
from rows import REPOSITORY, Row, Runs
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import layer_inputs  # noqa: E402
from structured import vit_blocks, write_models  # noqa: E402
from workers import Failed, Worker  # noqa: E402

SIDES = ("pymerge", "fusion_bench")
THEIRS = "FusionBench 0.2.33"
AGREE = 1e-3
RESOLUTION = 1e-6  # singular values below this share of the largest are lost in float32
STEPS, FULL_STEPS = (2, 6), 300


@dataclass(frozen=True, kw_only=True)
class Case:
    """The same formula in the words of both programs.

    steps      each program's name for the count of iterations
    inputs     takes what the models' layers see
    full_rank  the result takes every singular direction of the sum: FusionBench also those of rounding errors, pymerge
               not, so that matrices with any are excepted from the comparison"""

    ours: dict[str, Any]
    theirs: dict[str, Any]
    steps: dict[str, str] = field(default_factory=dict)
    inputs: bool = False
    full_rank: bool = False


def cases(tasks: int) -> dict[str, Case]:
    floor = 1 / tasks
    return {
        "task_arithmetic": Case(
            ours={"method": "task_arithmetic", "parameters": {"scale": 0.3}},
            theirs={"method": "TaskArithmeticAlgorithm", "parameters": {"scaling_factor": 0.3}},
        ),
        "tsv_m": Case(
            ours={"method": "tsv_m", "parameters": {"scale": 1.0}},
            theirs={"method": "TaskSingularVectorMerging", "parameters": {"alpha": 1.0}},
        ),
        "task_arithmetic + svc": Case(
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
        "regmean": Case(
            ours={"method": "regmean", "parameters": {"alpha": 0.95}},
            theirs={"method": "RegMeanAlgorithm", "parameters": {"reduce_non_diagonal_ratio": 0.95}},
            inputs=True,
        ),
    }


def arguments() -> Namespace:
    names = list(cases(1))
    parser = rows.arguments(__doc__, "fusion_bench")
    parser.set_defaults(threads=1)
    parser.add_argument("--methods", default=",".join(names))
    parser.add_argument("--blocks", type=int, default=1, help="transformer blocks, 1 to 12; 7.09 M entries each")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "fusion_bench", help="models and results")
    parser.add_argument("--fusion-bench-venv", type=Path, default=REPOSITORY / ".venv-fusion-bench")
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    if unknown := [name for name in args.methods if name not in names]:
        parser.error(f"unknown: {', '.join(unknown)}; methods: {', '.join(names)}")
    if args.quick:
        args.reps, args.width, args.tasks = 1, 64, 3
    return args


def requests(case: Case, side: str) -> list[dict[str, Any]]:
    """What a worker is asked each round: one merge, or one for each count of steps."""
    request: dict[str, Any] = {"inputs": case.inputs, **(case.ours if side == "pymerge" else case.theirs)}
    if not case.steps:
        return [request]
    name = case.steps[side]
    return [request | {"parameters": request["parameters"] | {name: count}} for count in STEPS]


def measure(name: str, args: Namespace, root: Path) -> Row:
    """Costs of each program and the distance between their updates."""
    case = cases(args.tasks)[name]
    python = {"pymerge": sys.executable, "fusion_bench": str(args.fusion_bench_venv / "bin" / "python")}
    costs: dict[str, list[list[dict[str, float]]]] = {side: [] for side in SIDES}
    saved = {side: args.work / f"{name}.{side}.safetensors" for side in SIDES}
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(Worker(side, root, args.threads, args.work / f"{name}.{side}.log", python[side]))
            for side in SIDES
        }
        for round_ in range(args.reps):
            for side in SIDES:
                asked = requests(case, side)
                if round_ == 0:
                    asked[-1] = asked[-1] | {"save": str(saved[side])}
                costs[side].append([workers[side].ask(request) for request in asked])
    difference, excepted = compare(case, root, saved["pymerge"], saved["fusion_bench"], args.tasks)
    for path in saved.values():
        path.unlink()
    shape = f"{args.blocks} block{'s' * (args.blocks > 1)} of a ViT, width {args.width}"
    return Row(
        peer="fusion_bench",
        method=name,
        setting=f"{shape}, {args.tasks} tasks, float32, in memory, {args.threads} thread{'s' * (args.threads > 1)}",
        measure="cpu",
        pymerge=runs(costs["pymerge"]),
        opponents={THEIRS: runs(costs["fusion_bench"])},
        difference=difference,
        agrees=difference <= AGREE,
        compared="merged update"
        + (f", without {len(excepted)} matrices that are not of full rank" if excepted else ""),
        note=f"{FULL_STEPS} steps, by the line through {STEPS[0]} and {STEPS[1]}" if case.steps else "",
    )


def runs(rounds: list[list[dict[str, float]]]) -> Runs:
    """Iterative methods (two requests a round) at FULL_STEPS by a line."""

    def seconds(key: str, round_: list[dict[str, float]]) -> float:
        slope = (round_[-1][key] - round_[0][key]) / (STEPS[1] - STEPS[0])
        return round_[-1][key] + (slope * (FULL_STEPS - STEPS[1]) if len(round_) > 1 else 0.0)

    return Runs(
        wall=[seconds("wall", round_) for round_ in rounds],
        cpu=[seconds("cpu", round_) for round_ in rounds],
        rss=int(max(cost["rss"] for round_ in rounds for cost in round_)),
        growth=int(max(cost["growth"] for round_ in rounds for cost in round_)),
    )


def compare(case: Case, root: Path, ours: Path, theirs: Path, tasks: int) -> tuple[float, list[str]]:
    """Relative Frobenius distance of the merged updates in float64, over all tensors but the excepted ones; those."""
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
    return float((above / below) ** 0.5), excepted


def unresolved(root: Path, name: str, base: np.ndarray, tasks: int) -> bool:
    """Does the sum of a matrix's task vectors have singular values that float32 cannot tell from zero?"""
    total = np.zeros_like(base)
    for task in range(1, tasks + 1):
        with safe_open(root / f"t{task}" / "model.safetensors", "np") as file:
            total += file.get_tensor(name) - base
    values = np.linalg.svd(total, compute_uv=False) if total.ndim == 2 else np.ones(1)
    return bool(values[-1] < RESOLUTION * values[0])


def main() -> int:
    args = arguments()
    tools.make_fusion_bench(args.fusion_bench_venv)
    rows.pin(args.threads)
    root = args.work / f"{args.blocks}x{args.width}x{args.tasks}"
    root.mkdir(parents=True, exist_ok=True)
    entries = vit_blocks(args.blocks, args.width)
    write_models(root, entries, args.tasks, "F32")
    layer_inputs.write(root, entries, args.tasks)
    found, failures = [], 0
    for name in args.methods:
        try:
            found.append(measure(name, args, root))
        except Failed as failure:
            failures += 1
            print(f"{name}: {failure}", flush=True)
            continue
        row = found[-1]
        ours, theirs = (row.seconds(one) for one in (row.pymerge, row.opponents[THEIRS]))
        print(
            f"{name}: {ours:.2f} and {theirs:.2f} CPU s, {row.ratio():.1f} x; differ by {row.difference:.1e}",
            flush=True,
        )
    rows.save(args.json, found)
    return 1 if failures or not all(row.agrees for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
