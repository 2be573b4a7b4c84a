"""A merge of a set that no memory would hold: base and two fine-tuned models, 21 GB in bfloat16, with --memory 1GB.

    python benchmarks/large_merge.py [--gb 7] [--methods ties,linear] [--keep]

Needs 4 times --gb on disk. Each merge is a run of the command line, start-up included; reported: wall and CPU seconds,
peak RSS against the budget.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side import tools

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
BUDGET = "1GB"
WANTED_RSS = 1.3e9
METHODS: dict[str, dict[str, Any]] = {"ties": {"weight": 0.5, "density": 0.2}, "task_arithmetic": {"weight": 0.5}}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=7.0, help="of one model")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "large_merge")
    parser.add_argument("--keep", action="store_true", help="leave the models for a later run")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "large_merge.json")
    return parser.parse_args()


def merge(method: str, root: Path, threads: int) -> dict[str, Any]:
    models = [{"model": str(root / name), "parameters": METHODS[method]} for name in ("m1", "m2")]
    recipe = root / f"{method}.yaml"
    recipe.write_text(json.dumps({"merge_method": method, "base_model": str(root / "base"), "models": models}))
    out = root / "out"
    cost = tools.run([*tools.pymerge_command(recipe, out, threads), "--memory", BUDGET], out, threads)
    written = tools.weight_bytes(out)
    shutil.rmtree(out)
    return {"wall": cost.wall, "cpu": cost.cpu, "rss": cost.rss, "written": written, "kept": cost.rss <= WANTED_RSS}


def main() -> int:
    args = arguments()
    root = args.work.resolve()
    root.mkdir(parents=True, exist_ok=True)
    needed, free = 4.1e9 * args.gb, shutil.disk_usage(root).free
    if free < needed:
        print(f"{root}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free", file=sys.stderr)
        return 1
    make = [sys.executable, str(HERE / "side_by_side" / "checkpoints.py"), str(root), "--gb", str(args.gb)]
    subprocess.run([*make, "--models", "2", "--shard-gb", "5"], check=True)
    read = sum(tools.weight_bytes(root / name) for name in ("base", "m1", "m2"))
    report: dict[str, Any] = {"input_bytes": read, "memory": BUDGET, "threads": args.threads}
    report |= tools.provenance(REPOSITORY) | {"merges": {}}
    for method in args.methods.split(","):
        found = report["merges"][method] = merge(method, root, args.threads)
        print(
            f"{method:16s} {read / 1e9:.1f} GB read, {found['written'] / 1e9:.1f} GB written: {found['wall']:.0f} s, "
            f"{found['cpu']:.0f} CPU s, {found['rss'] / 1e9:.2f} GB peak RSS",
            flush=True,
        )
    if not args.keep:
        shutil.rmtree(root)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(found["kept"] for found in report["merges"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
