"""The demo from start to end: train, merge, evaluate, table."""

from __future__ import annotations

import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import pymerge

BUDGET = 60.0  # seconds of merging and evaluating in the default set; methods that come later are left to --all


def show(out: Path, *, all_methods: bool) -> dict[str, Any]:
    """See pymerge.demo.run."""
    absent = [name for name in ("sklearn", "transformers") if find_spec(name) is None]
    if absent:
        raise pymerge.MergeError(f'demo: {" and ".join(absent)} missing; install with: pip install "pymerge[demo]"')
    from pymerge.demo import train

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with train.quiet_and_alone():
        trained = train.train_all(out, lambda line: console.print("  " + line))
        seconds = time.perf_counter() - start
        console.print(f"models in {out}: {f'trained in {seconds:.0f} s' if trained else 'from an earlier run'}")
        rows = evaluate_merges(out, all_methods, console)
    results = {"version": pymerge.__version__, "tasks": titles(), "training_seconds": seconds, "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(table(rows))
    for row in rows:
        if row["skipped"]:
            console.print(f"  {row['name']}: not run, {row['skipped']}")
    console.print(f"checkpoints: {out / 'merged'}; figures: {out / 'results.json'}")
    return results


def titles() -> dict[str, str]:
    from pymerge.demo.data import TASKS

    return {task.name: task.title for task in TASKS}


def evaluate_merges(out: Path, all_methods: bool, console: Console) -> list[dict[str, Any]]:
    """One row a model: the individual models, the base, then every merge."""
    from pymerge.demo import merges, train

    names = list(titles())
    folders = [out / "tasks" / name for name in names]
    individual = {
        name: train.accuracies(folder, out / "tasks")[name] for name, folder in zip(names, folders, strict=True)
    }
    rows = [
        row("(individual models)", individual, individual),
        row("(base)", train.accuracies(out / "base", out / "tasks"), individual),
    ]
    start = time.perf_counter()
    for job in merges.jobs(len(names)):
        late = "" if all_methods or time.perf_counter() - start < BUDGET else "left to --all"
        if job.skipped or late:
            rows.append({"name": job.name, "skipped": job.skipped or late})
            continue
        target = out / "merged" / job.name.replace(" ", "")
        target.parent.mkdir(exist_ok=True)
        cost = merges.run(job, out / "base", folders, target)
        rows.append(row(job.name, train.accuracies(target, out / "tasks"), individual) | cost)
        console.print(f"  merged: {job.name}")
    return rows


def row(name: str, accuracy: dict[str, float], individual: dict[str, float]) -> dict[str, Any]:
    """normalised: mean over tasks of the accuracy relative to the individual model's."""
    mean = sum(accuracy.values()) / len(accuracy)
    normalised = sum(accuracy[task] / individual[task] for task in accuracy) / len(accuracy)
    return {"name": name, "skipped": "", "accuracy": accuracy, "mean": mean, "normalised": normalised}


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title="accuracy on 500 test images (%)")
    out.add_column("merged by", no_wrap=True)
    for title in (*titles(), "mean", "of individual", "seconds", "peak MB"):
        out.add_column(title, justify="right", no_wrap=True)
    for entry in rows:
        if entry["skipped"]:
            continue
        cells = [f"{100 * value:.1f}" for value in entry["accuracy"].values()]
        cells += [f"{100 * entry['mean']:.1f}", f"{100 * entry['normalised']:.1f}"]
        cells += [f"{entry['seconds']:.2f}", f"{entry['memory'] / 1e6:.0f}"] if "seconds" in entry else ["", ""]
        out.add_row(entry["name"], *cells, end_section=entry["name"] == "(base)")
    return out
