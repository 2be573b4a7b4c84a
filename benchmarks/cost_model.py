"""The cost model of `pymerge plan` against merges: what it predicts for this machine, and what they take.

    python benchmarks/cost_model.py [--sizes 0.3,1.2] [--methods linear,ties,ace,tsv_m] [--threads 2] [--reps 3]

Makes Llama-shaped checkpoints (a base and two fine-tuned, bfloat16, decaying spectra: structured.py) of about so many
GB each. Every repetition measures the machine's rates anew (`engine.calibrate`) and then runs each method once by the
command line, start-up and putting the output on disk included, inputs in the page cache. Reported: medians of predicted
and measured processor seconds and wall time, their errors, and how busy other programs kept the processors. Processor
seconds hold on a busy machine too; wall times are judged only where others took less than a tenth of the processors.
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from side_by_side import tools

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
RESULTS = HERE / "results" / "cost_model.json"
TASKS = 2
WANTED = 0.3  # largest relative error
QUIET = 0.1  # share of the processors that other programs may take where wall times are judged
LONG = 60.0  # processor seconds from which a merge is run once
MERGES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "parameters": {"weight": 1.0}},
    "ties": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.2}},
    "ace": {"merge_method": "ace"},
    "tsv_m": {"merge_method": "tsv_m"},
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.3,1.2", help="GB of one checkpoint")
    parser.add_argument("--methods", default=",".join(MERGES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "cost_model", help="checkpoints, outputs")
    parser.add_argument("--json", type=Path, default=RESULTS, help="and the same name with .md")
    args = parser.parse_args()
    args.sizes, args.methods = [float(size) for size in args.sizes.split(",")], args.methods.split(",")
    if unknown := [name for name in args.methods if name not in MERGES]:
        parser.error(f"unknown: {', '.join(unknown)}; methods: {', '.join(MERGES)}")
    return args


def make_checkpoints(root: Path, gb: float) -> None:
    """In a process of its own, as the other benchmarks do."""
    layer = 4 * CONFIG["hidden_size"] ** 2 + 3 * CONFIG["hidden_size"] * CONFIG["intermediate_size"]
    layers = max(1, round((gb * 5e8 - 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]) / layer))
    config = CONFIG | {"num_hidden_layers": layers}
    script = (
        "import json, sys; from pathlib import Path; from side_by_side.checkpoints import tensors\n"
        "from structured import write_models; config = json.loads(sys.argv[2])\n"
        f"write_models(Path(sys.argv[1]), list(tensors(config)), {TASKS}, 'BF16', config)"
    )
    subprocess.run([sys.executable, "-c", script, str(root), json.dumps(config)], check=True, cwd=HERE)


def write_recipe(root: Path, method: str) -> Path:
    """JSON is YAML."""
    models = [{"model": str(root / f"t{task}")} for task in range(1, TASKS + 1)]
    path = root / f"{method}.yaml"
    path.write_text(json.dumps(MERGES[method] | {"base_model": str(root / "base"), "models": models}) + "\n")
    return path


def predicted(recipe: Path, rates: dict[str, Any], threads: int) -> dict[str, Any]:
    """Of a run from the page cache."""
    from dataclasses import replace

    from pymerge.engine.cluster import Cluster
    from pymerge.engine.local import plan_merge
    from pymerge.engine.plan import Options
    from pymerge.engine.rates import Rates
    from pymerge.engine.simulate import Simulation, job_of, processor_seconds
    from pymerge.recipe import Recipe

    plan, known = plan_merge(Recipe.from_yaml(recipe), Options(threads=threads)), Rates(**rates)
    job = replace(job_of(plan, look=False), cached=1.0)
    found = Simulation(job, Cluster(rates=known, cores=threads)).at(1)
    return {
        "wall": found.seconds["total"],
        "cpu": processor_seconds(job, known),
        "bottleneck": found.bottleneck,
        "seconds": found.seconds,
    }


def calibrated() -> dict[str, Any]:
    """Rates, measured in a process of its own."""
    script = "import json; from dataclasses import asdict; from pymerge.engine.calibrate import calibrate\n"
    script += "print(json.dumps(asdict(calibrate())))"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


@contextmanager
def watched(cost: dict[str, float]) -> Iterator[None]:
    """Share of the processors that other programs took meanwhile, once `cost` has the processor seconds of ours."""

    def busy() -> float:
        fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    before, began = busy(), time.perf_counter()
    yield
    elapsed = time.perf_counter() - began
    others = busy() - before - cost["cpu"]
    cost["others"] = max(0.0, others / elapsed / (os.cpu_count() or 1))


def measured(recipe: Path, root: Path, threads: int) -> dict[str, float]:
    """One run of the command line."""
    tools.warm([root / "base", *(root / f"t{task}" for task in range(1, TASKS + 1))])
    cost: dict[str, float] = {}
    with watched(cost):
        found = tools.run(tools.pymerge_command(recipe, root / "out", threads), root / "out", threads)
        cost |= {"wall": found.wall, "cpu": found.cpu}
    shutil.rmtree(root / "out")
    return cost


def compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repetitions, and errors relative to what was measured."""
    out: dict[str, Any] = {"runs": runs, "others": statistics.median(run["measured"]["others"] for run in runs)}
    for key in ("wall", "cpu"):
        guess, found = (statistics.median(run[side][key] for run in runs) for side in ("predicted", "measured"))
        out[key] = {"predicted": guess, "measured": found, "error": guess / found - 1}
    return out


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    before, after = report["load"]
    lines = [
        "# What `pymerge plan` predicts, and what merges take",
        "",
        f"{report['processor']}, {report['date']}, commit {report['commit']}, {report['threads']} threads; a base and "
        f"{TASKS} fine-tuned models, inputs in the page cache. Load average {before:.1f} before, {after:.1f} after. "
        "Medians of the runs; the rates were measured before each round of runs. Error: predicted over measured, less "
        "one. On a busy machine the wall time is not that of the merge alone: it is judged where other programs took "
        f"less than {QUIET:.0%} of the processors.",
        "",
        "| GB | method | runs | CPU s predicted | measured | error | wall s predicted | measured | error | others |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["merges"]:
        cpu, wall = row["cpu"], row["wall"]
        cells = [f"{row['gb']:g}", row["method"], str(len(row["runs"]))]
        cells += [f"{cpu['predicted']:.1f}", f"{cpu['measured']:.1f}", f"{cpu['error']:+.0%}"]
        judged = f"{wall['error']:+.0%}" if row["others"] <= QUIET else "not judged"
        cells += [f"{wall['predicted']:.1f}", f"{wall['measured']:.1f}", judged, f"{row['others']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def saved(report: dict[str, Any], found: Mapping[tuple[float, str], list[dict[str, Any]]], path: Path) -> None:
    """After every run: a later one may take long, and is missed less."""
    report["load"][1] = os.getloadavg()[0]
    report["merges"] = [{"gb": gb, "method": method} | compared(runs) for (gb, method), runs in sorted(found.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(report))


def main() -> int:
    args = arguments()
    report: dict[str, Any] = tools.provenance(REPOSITORY) | {"threads": args.threads, "load": [os.getloadavg()[0], 0.0]}
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    roots = {gb: args.work.resolve() / f"{gb:g}" for gb in args.sizes}
    for gb, root in roots.items():
        make_checkpoints(root, gb)
    for _ in range(args.reps):
        rates = calibrated()
        asked = [(gb, method, write_recipe(roots[gb], method)) for gb in args.sizes for method in args.methods]
        guesses = [(predicted(recipe, rates, args.threads), gb, method, recipe) for gb, method, recipe in asked]
        for guess, gb, method, recipe in sorted(guesses, key=lambda known: known[0]["cpu"]):
            if guess["cpu"] > LONG and (gb, method) in found:
                continue
            cost = measured(recipe, roots[gb], args.threads)
            found.setdefault((gb, method), []).append({"predicted": guess, "measured": cost, "rates": rates})
            print(f"{gb:g} GB {method}: {guess['cpu']:.1f} CPU s predicted, {cost}", flush=True)
            saved(report, found, args.json)
    print(table(report))
    judged = [abs(row["cpu"]["error"]) for row in report["merges"]]
    judged += [abs(row["wall"]["error"]) for row in report["merges"] if row["others"] <= QUIET]
    return 0 if max(judged) <= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
