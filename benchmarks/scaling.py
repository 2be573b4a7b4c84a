"""How time and memory of merges grow: with the model's size, T, the width, the rank, threads, units to assign.

    python benchmarks/scaling.py [--quick] [--methods ties,tsv_m] [--reps 3] [--core 1] [--json FILE]

Each point (scaling_points.py) is a run of the command line, disk to disk, in a process of its own, with --memory 1GB:
wall and CPU seconds, peak RSS (VmHWM), and what other programs took of the processors meanwhile. Runs of one thread are
pinned to one processor, models lie in the page cache. Points shorter than 3 s are run --reps times (medians). Every
point is kept in the report as it comes: an interrupted run continues, points that are there are not measured again
(--fresh: they are). At most 13 GB lie under --work at a time, deleted as soon as their points are measured.

Exponents are fitted to the CPU seconds less those of the same program on next to nothing, by least squares of the
logarithms (scaling_report.py); beside them stands what the cost columns of the specifications predict.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from cost_model import watched
from scaling_models import model_bytes
from scaling_points import ADAPTERS, FULL, METHODS, QUICK, Point, all_series, cost, needs, parameters, start_up
from scaling_report import write_report
from side_by_side import tools

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
RESULTS = HERE / "results" / "scaling.json"
BUDGET = "1GB"
SHORT = 3.0  # CPU seconds
ASSIGN = """
import sys, time, torch
sys.path.insert(0, sys.argv[2])
from bench_assign import matrix
from pymerge.linalg import assign
torch.set_num_threads(1)
score, most = matrix("correlated", int(sys.argv[1])), max(1, 2048 // int(sys.argv[1]))
began = time.process_time(), time.perf_counter()
for _ in range(most):
    assign(score, True)
print((time.process_time() - began[0]) / most, (time.perf_counter() - began[1]) / most)
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, into --work: does everything work?")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="that runs of one thread are on")
    parser.add_argument("--fresh", action="store_true", help="measure points that are in the report too")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "scaling", help="models, outputs")
    parser.add_argument("--json", type=Path, default=None, help="and the same name with .md and _*.png")
    args = parser.parse_args()
    args.methods, args.work = args.methods.split(","), args.work.resolve()
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"unknown: {', '.join(unknown)}; methods: {', '.join(METHODS)}")
    args.json = args.json or (args.work / "quick.json" if args.quick else RESULTS)
    return args


def make_models(root: Path, hidden: int, layers: int, points: list[Point]) -> None:
    """In a process of its own: what this one holds would be the floor of every run's peak RSS."""
    options = [f"--{name}={value}" for name, value in needs(points).items()]
    made = [sys.executable, str(HERE / "scaling_models.py"), str(root), f"--hidden={hidden}", f"--layers={layers}"]
    subprocess.run([*made, *options], check=True)


def command(point: Point, root: Path, out: Path) -> list[str]:
    limits = ["--memory", BUDGET, "--quiet"]
    program = [sys.executable, "-m", "pymerge"]
    if point.method == "align":
        return [*program, "align", str(root / "base"), str(root / "t1"), "-o", str(out), *limits]
    limits += ["--threads", str(point.threads)]
    if point.method == "extract_lora":
        models = [str(root / "t1"), str(root / "base")]
        return [*program, "extract-lora", *models, "-r", str(point.rank), "-o", str(out), *limits]
    recipe = root / "recipe.yaml"  # JSON is YAML
    recipe.write_text(json.dumps(parameters(point, str(root)), indent=1) + "\n")
    return [*program, "merge", str(recipe), str(out), *limits, *(["--as-adapter"] if point.method in ADAPTERS else [])]


def measured(point: Point, root: Path, core: int) -> dict[str, float]:
    """One run."""
    cores = str(core) if point.threads == 1 else f"0-{min(point.threads, os.cpu_count() or 1) - 1}"
    pin = ["taskset", "-c", cores]
    out = root / ("out.safetensors" if point.method == "align" else "out")
    found: dict[str, float] = {"load": os.getloadavg()[0]}
    with watched(found):
        if point.method == "assign":
            cost_of = tools.run([*pin, sys.executable, "-c", ASSIGN, str(point.hidden), str(HERE)], out, 1)
        else:
            cost_of = tools.run([*pin, *command(point, root, out)], out, point.threads)
        found |= {"cpu": cost_of.cpu, "wall": cost_of.wall, "rss": cost_of.rss}
    if point.method == "assign":
        found["cpu"], found["wall"] = map(float, out.with_suffix(".log").read_text().split())
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
    return found


def groups(points: list[Point]) -> list[tuple[tuple[int, int], list[Point]]]:
    """Points that share models, the smallest models first; their points by their cost."""
    found: dict[tuple[int, int], list[Point]] = defaultdict(list)
    for point in points:
        found[point.hidden, point.layers].append(point)
    of_group = sorted(found.items(), key=lambda g: model_bytes(*g[0]) * max(p.tasks for p in g[1]) if g[0][1] else 0)
    return [(shape, sorted(some, key=cost)) for shape, some in of_group]


def run_group(shape: tuple[int, int], points: list[Point], report: dict[str, Any], args: argparse.Namespace) -> None:
    """Measures and saves; the models are gone afterwards."""
    root = args.work / f"{shape[0]}x{shape[1]}"
    root.mkdir(parents=True, exist_ok=True)
    if shape[1]:
        make_models(root, *shape, points)
        tools.warm([path for path in root.iterdir() if path.is_dir()])
    for point in points:
        runs: list[dict[str, float]] = []
        while len(runs) < args.reps and (not runs or runs[0]["cpu"] < SHORT):
            runs.append(measured(point, root, args.core))
        cost_of = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        when = {"commit": tools.commit(REPOSITORY), "time": time.strftime("%F %H:%M", time.gmtime())}
        report["points"][point.key] = cost_of | {"runs": len(runs)} | when
        line = f"{cost_of['cpu']:8.2f} CPU s {cost_of['wall']:8.2f} s {cost_of['rss'] / 1e9:6.2f} GB"
        print(f"{point.key:45s} {line}, others {cost_of['others']:.0%}", flush=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    shutil.rmtree(root)


def main() -> int:
    args = arguments()
    series = all_series(QUICK if args.quick else FULL)
    points = dict.fromkeys(point for one in series for point in one.points if one.method in args.methods)
    points |= dict.fromkeys([start_up(point) for point in points if point.method != "assign"])
    report: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {"points": {}}
    report |= tools.provenance(REPOSITORY) | {"memory": BUDGET}
    asked = groups([point for point in points if args.fresh or point.key not in report["points"]])
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    needed = max((model_bytes(*shape) * (needs(some)["tasks"] + 2.5) for shape, some in asked if shape[1]), default=0)
    if (free := shutil.disk_usage(args.work).free) < needed:
        print(f"{args.work}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", file=sys.stderr)
        return 1
    for shape, some in asked:
        run_group(shape, some, report, args)
    write_report(report, series, args.json)
    print(args.json.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
