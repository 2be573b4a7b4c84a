"""pymerge and mergekit on the same YAML files, side by side: wall time, CPU time, peak memory, agreement of results.

    python benchmarks/side_by_side/merge.py --gb 1.2 --reps 3 --threads 2 [--readme]

Makes LLaMA-shaped bf16 checkpoints (a base and three fine-tuned ones), then for each method runs, start-up included and
with the inputs in the page cache: pymerge, mergekit 0.1.5 in an environment of its own, pymerge's reader and writer
with no arithmetic ("floor"), and `cp` of the output's bytes. pymerge, floor and "cp+sync" end with the bytes on disk;
mergekit and "cp" leave them to the page cache. Afterwards both run at dtype float32 on a smaller size and the results
are compared (agreement.py). Figures go to benchmarks/results/ as JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import tools

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "side_by_side_merge.json"
BEGIN, END = "<!-- side_by_side:begin -->", "<!-- side_by_side:end -->"
PROGRAMS = ("pymerge", "mergekit", "floor", "cp", "cp+sync")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.2, help="size of one checkpoint")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of one input shard")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--mergekit-reps", type=int, help="as --reps unless given: mergekit's runs take minutes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--methods", default=",".join(tools.METHODS))
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument(
        "--work", type=Path, default=REPOSITORY / "build" / "side_by_side", help="checkpoints and outputs"
    )
    parser.add_argument("--mergekit-venv", type=Path, default=REPOSITORY / ".venv-mergekit")
    parser.add_argument(
        "--agree-gb", type=float, default=0.12, help="size for the comparison of results; 0: no comparison"
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--readme", action="store_true", help="also rewrite the table in README.md")
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    args.programs = args.programs.split(",")
    unknown = [m for m in args.methods if m not in tools.METHODS] + [p for p in args.programs if p not in PROGRAMS]
    if unknown:
        parser.error(
            f"unknown: {', '.join(unknown)}; methods: {', '.join(tools.METHODS)}; programs: {', '.join(PROGRAMS)}"
        )
    if "floor" in args.programs and importlib.util.find_spec("pymerge.engine.floor") is None:
        args.programs.remove("floor")
    return args


def checkpoints(root: Path, gb: float, shard_gb: float) -> None:
    """In a process of its own: what this one holds would be the floor of every child's peak RSS."""
    script = [sys.executable, str(HERE / "checkpoints.py"), str(root)]
    subprocess.run(
        [*script, "--gb", str(gb), "--models", str(len(tools.TASKS)), "--shard-gb", str(shard_gb)], check=True
    )


def command(program: str, args: argparse.Namespace, recipe: Path, root: Path, out: Path) -> list[str]:
    match program:
        case "pymerge":
            return tools.pymerge_command(recipe, out, args.threads)
        case "mergekit":
            return tools.mergekit_command(args.mergekit_venv, recipe, out)
        case "floor":
            return tools.floor_command(recipe, out, args.threads)
        case "cp":
            return tools.copy_command(root / "base", out)
        case _:
            return tools.synced_copy_command(root / "base", out)


def measure(args: argparse.Namespace, root: Path) -> dict[str, dict]:
    """method -> program -> costs; programs take turns, so that a slow minute of the machine meets them all."""
    results = {}
    out = root / "out"
    for method in args.methods:
        recipe = tools.write_recipe(root, method, "bfloat16")
        folders = [root / name for name in tools.recipe_models(method)]
        read = sum(tools.weight_bytes(folder) for folder in folders)
        costs: dict[str, list[tools.Cost]] = {program: [] for program in args.programs}
        written = 0
        for rep in range(args.reps):
            for program in args.programs:
                if program == "mergekit" and args.mergekit_reps is not None and rep >= args.mergekit_reps:
                    continue
                tools.warm(folders)
                costs[program].append(tools.run(command(program, args, recipe, root, out), out, args.threads))
                written = tools.weight_bytes(out)
                shutil.rmtree(out)
        runs = {program: tools.as_json(c) for program, c in costs.items()}
        results[method] = {"bytes": read + written, "runs": runs}
        print_method(method, results[method])
    return results


def medians(result: dict, program: str) -> dict[str, float] | None:
    """wall, cpu, rss: each the median over the runs; None where the program did not run."""
    runs = result["runs"].get(program)
    return {key: statistics.median(run[key] for run in runs) for key in ("wall", "cpu", "rss")} if runs else None


def print_method(method: str, result: dict) -> None:
    ours = medians(result, "pymerge")
    for program in PROGRAMS:
        cost = medians(result, program)
        if cost is None:
            continue
        ratio = f"{cost['wall'] / ours['wall']:7.2f} x pymerge" if ours else ""
        speed = "" if program.startswith("cp") else f"{result['bytes'] / cost['wall'] / 1e9:6.2f} GB/s"
        time = f"{cost['wall']:8.2f} s  {cost['cpu']:8.2f} CPU s"
        print(f"{method:16s} {program:8s} {time}  {cost['rss'] / 1e9:6.2f} GB RSS  {speed:11s} {ratio}", flush=True)


def readme_table(report: dict) -> str:
    """The block of README.md; every figure is the median of the report's runs."""
    lines = [
        "| method | pymerge | mergekit 0.1.5 | ratio | peak memory | mergekit's | over reading and writing alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, result in report["methods"].items():
        ours, theirs, floor = (medians(result, program) for program in ("pymerge", "mergekit", "floor"))
        if ours is None:
            continue
        cells = [method, f"{ours['wall']:.1f} s"]
        cells += [f"{theirs['wall']:.1f} s", f"{theirs['wall'] / ours['wall']:.1f} x"] if theirs else ["", ""]
        cells += [f"{ours['rss'] / 1e9:.2f} GB", f"{theirs['rss'] / 1e9:.2f} GB" if theirs else ""]
        cells += [f"{ours['wall'] / floor['wall']:.2f} x" if floor else ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"`benchmarks/side_by_side/merge.py --gb {report['gb']} --threads {report['threads']} --reps {report['reps']}` "
        f"(medians), {report['processor']}, commit {report['commit']}. One checkpoint is {report['gb']} GB in "
        "bfloat16, read from the page cache; start-up is included; pymerge's time includes putting the output on disk.",
    ]
    return "\n".join(lines)


def write_readme(report: dict) -> None:
    path = REPOSITORY / "README.md"
    before, rest = path.read_text().split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{readme_table(report)}\n{END}{after}")


def main() -> int:
    args = arguments()
    if "mergekit" in args.programs or args.agree_gb:
        tools.make_mergekit(args.mergekit_venv)
    root = args.work.resolve() / f"{args.gb:g}"
    checkpoints(root, args.gb, args.shard_gb)
    report = {
        "gb": args.gb,
        "threads": args.threads,
        "reps": args.reps,
        "processor": tools.processor(),
        "commit": tools.commit(REPOSITORY),
        "methods": measure(args, root),
    }
    agreed = True
    if args.agree_gb:
        from agreement import compare_methods  # numpy is loaded only after the timed runs

        small = args.work.resolve() / f"{args.agree_gb:g}"
        checkpoints(small, args.agree_gb, args.shard_gb)
        report["agreement"] = compare_methods(small, args.methods, args.mergekit_venv, args.threads)
        agreed = all(result["agrees"] for result in report["agreement"].values())
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.readme:
        write_readme(report)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
