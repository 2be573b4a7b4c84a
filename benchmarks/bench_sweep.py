"""`pymerge sweep` over eight settings and eight times `pymerge merge`: wall and CPU seconds, bytes read, equal bytes.

    python benchmarks/bench_sweep.py --gb 0.3 --models 8 --spectral-gb 0.06 --reps 3

Both are the command line, start-up included, inputs in the page cache, outputs put on disk; they take turns. Wall
seconds are medians; CPU seconds are of all threads, and matter where other work runs beside. Bytes read are those of
all read calls of the process (/proc/self/io). Figures go to benchmarks/results/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TIES = {"density": 0.5, "weight": 1.0}
SCALES = "0.3,0.5,0.7,0.9,1.0,1.1,1.3,1.5"
GRIDS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "ties, 2 densities x 4 scales": ("ties", TIES, {"density": "0.1,0.2", "lambda": "0.5,0.8,1.0,1.5"}),
    "ties, 8 densities": ("ties", TIES, {"density": "0.05,0.1,0.15,0.2,0.3,0.4,0.6,0.8"}),
    "task_arithmetic, 8 scales": ("task_arithmetic", {"weight": 1.0}, {"lambda": SCALES}),
    "tsv_m, 8 scales": ("tsv_m", {}, {"lambda": SCALES}),
    "iso_c, 8 scales": ("iso_c", {}, {"lambda": SCALES}),
    "iso_cts, 8 shares": ("iso_cts", {}, {"common_space_fraction": "0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"}),
}
SPECTRAL = ("tsv_m", "iso_c", "iso_cts")


def child(report: Path, arguments: list[str]) -> None:
    """One command in this process; what it cost."""
    started = time.monotonic()
    from pymerge.cli import app

    app(arguments, standalone_mode=False)
    used = resource.getrusage(resource.RUSAGE_SELF)
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    found = {
        "wall": time.monotonic() - started,
        "cpu": used.ru_utime + used.ru_stime,
        "read": int(counted["rchar"]),
        "peak_rss": used.ru_maxrss * 1024,
    }
    report.write_text(json.dumps(found))


def run(work: Path, *arguments: str) -> dict[str, float]:
    report = work / "report.json"
    started = time.monotonic()
    subprocess.run([sys.executable, __file__, "--child", str(report), *arguments], check=True)
    return json.loads(report.read_text()) | {"wall": time.monotonic() - started}


def recipe(work: Path, models: list[Path], method: str, parameters: dict[str, Any]) -> Path:
    plain = {
        "merge_method": method,
        "base_model": str(models[0]),
        "models": [{"model": str(path)} for path in models[1:]],
        "parameters": parameters,
    }
    path = work / "recipe.yaml"
    path.write_text(json.dumps(plain))
    return path


def once(work: Path, models: list[Path], name: str, threads: int) -> dict[str, Any]:
    """A sweep, then the merges of its settings; the folders must hold the same weights."""
    method, parameters, grid = GRIDS[name]
    how = ("--threads", str(threads), "--quiet")
    path = recipe(work, models, method, parameters)
    options = [part for key, values in grid.items() for part in ("--grid", f"{key}={values}")]
    swept = run(work, "sweep", str(path), *options, "--out", str(work / "swept"), *how)
    table = json.loads((work / "swept" / "sweep.json").read_text())
    total = {"wall": 0.0, "cpu": 0.0, "read": 0, "peak_rss": 0}
    for row in table["settings"]:
        path = recipe(work, models, method, parameters | row["values"])
        found = run(work, "merge", str(path), str(work / "merged"), *how)
        total = {key: max(total[key], found[key]) if key == "peak_rss" else total[key] + found[key] for key in total}
        for file in (work / "merged").glob("*.safetensors"):
            if subprocess.run(["cmp", file, work / "swept" / row["folder"] / file.name], check=False).returncode:
                raise SystemExit(f"{name}: {row['folder']} differs from the merge")
        shutil.rmtree(work / "merged")
    shutil.rmtree(work / "swept")
    return {"settings": len(table["settings"]), "sweep": swept, "merges": total}


def median(found: list[dict[str, Any]], which: str) -> dict[str, float]:
    return {key: round(statistics.median(one[which][key] for one in found), 2) for key in found[0][which]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.3, help="size of one checkpoint")
    parser.add_argument("--spectral-gb", type=float, default=0.06, help="likewise, for methods that decompose")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--only", default="", help="part of the names of the grids to run")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "bench_sweep")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "sweep.json")
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in (name for name in GRIDS if args.only in name):
        gb = args.spectral_gb if GRIDS[name][0] in SPECTRAL else args.gb
        root = args.work / f"{gb}"
        make = [sys.executable, str(HERE / "side_by_side" / "checkpoints.py"), str(root)]
        subprocess.run([*make, "--gb", str(gb), "--models", str(args.models)], check=True)
        models = [root / "base", *(root / f"m{n + 1}" for n in range(args.models))]
        inputs = sum(file.stat().st_size for path in models for file in path.glob("*.safetensors"))
        found = [once(args.work, models, name, args.threads) for _ in range(args.reps)]
        sweep, merges = median(found, "sweep"), median(found, "merges")
        ratios = {
            key: round(statistics.median(o["merges"][key] / o["sweep"][key] for o in found), 2)
            for key in ("wall", "cpu", "read")
        }
        results[name] = {
            "gb_of_a_model": gb, "models": args.models, "input_bytes": inputs, "settings": found[0]["settings"],
            "threads": args.threads, "reps": args.reps, "cpu": platform.processor() or platform.machine(),
            "load": os.getloadavg()[0], "sweep": sweep, "merges": merges, "merges_over_sweep": ratios,
        }  # fmt: skip
        print(name, json.dumps(ratios), f"read {sweep['read'] / inputs:.2f} x the inputs", flush=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
