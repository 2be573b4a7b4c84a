"""The demo from start to end: train, merge, evaluate, table."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import pymerge

BUDGET = 165.0  # seconds from the start of the default set; methods that come later are left to --all


def show(out: Path, *, all_methods: bool) -> dict[str, Any]:
    """See pymerge.demo.run."""
    absent = [name for name in ("sklearn", "transformers") if find_spec(name) is None]
    if absent:
        raise pymerge.MergeError(f'demo: {" and ".join(absent)} missing; install with: pip install "pymerge[demo]"')
    from pymerge.demo import picture, train

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 110
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with train.quiet_and_alone():
        trained = train.train_all(out, lambda line: console.print("  " + line))
        seconds = time.perf_counter() - start
        console.print(f"models in {out}: {f'trained in {seconds:.0f} s' if trained else 'from an earlier run'}")
        statistics = train.observe_all(out)
        rows = evaluate_merges(out, statistics, console, None if all_methods else start + BUDGET)
    results = {"version": pymerge.__version__, "tasks": titles(), "training_seconds": seconds, "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(table(rows))
    for row in rows:
        if row["skipped"]:
            console.print(f"  {row['name']}: not run, {row['skipped']}")
    console.print(
        "  (s): the merged update times s, the best of a few on 500 of the training images, the same for every "
        "method;\n  esmpp: with its experts, (s) without"
    )
    console.print(f"checkpoints: {out / 'merged'}; figures: {out / 'results.json'}")
    console.print(f"what a merge did to the model: pymerge report {folder_of(out, 'ace')}")
    if find_spec("matplotlib") is not None:
        console.print(f"picture: {picture.draw(rows, out / 'accuracy.png')}")
    return results


def titles() -> dict[str, str]:
    from pymerge.demo.data import TASKS

    return {task.name: task.title for task in TASKS}


def evaluate_merges(
    out: Path, statistics: list[Path], console: Console, deadline: float | None = None
) -> list[dict[str, Any]]:
    """One row a model: the individual models, the base, then every merge that starts before `deadline`."""
    from pymerge.demo import merges, train
    from pymerge.demo.data import digits
    from pymerge.runtime import esmpp

    names, test = list(titles()), digits().test
    (out / "merged").mkdir(exist_ok=True)
    folders = [out / "tasks" / name for name in names]
    base, heads = train.load(out / "base"), train.load_heads(out / "tasks")
    individual = {
        name: train.accuracies_on(test, train.load(folder), heads)[name]
        for name, folder in zip(names, folders, strict=True)
    }
    rows = [
        row("(individual models)", individual, individual),
        row("(base)", train.accuracies_on(test, base, heads), individual),
    ]

    def merge(job: merges.Job) -> dict[str, float] | None:
        """None: too late."""
        late = deadline is not None and time.perf_counter() > deadline
        return None if late else merges.run(job, out / "base", folders, statistics, folder_of(out, job.name))

    with ThreadPoolExecutor(1) as pool:  # the next model is merged while the last one is evaluated
        jobs = list(merges.jobs(len(names)))
        costs = [None if job.skipped else pool.submit(merge, job) for job in jobs]
        try:
            for job, pending in zip(jobs, costs, strict=True):
                cost = pending.result() if pending else None
                if cost is None:
                    rows.append({"name": job.name, "skipped": job.skipped or "left to --all"})
                    continue
                model = train.load(folder_of(out, job.name))
                scale, best = train.rescaled(base, model, heads)
                if job.method == "esmpp":
                    esmpp.attach(model, folder_of(out, job.name))
                found = row(job.name, train.accuracies_on(test, model, heads), individual) | cost
                rows.append(found | {"scale": scale, "rescaled": best, "rescaled_mean": mean_of(best)})
                console.print(f"  merged: {job.name}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return rows


def folder_of(out: Path, name: str) -> Path:
    return out / "merged" / name.replace(" ", "")


def mean_of(accuracy: dict[str, float]) -> float:
    return sum(accuracy.values()) / len(accuracy)


def row(name: str, accuracy: dict[str, float], individual: dict[str, float]) -> dict[str, Any]:
    """normalised: mean over tasks of the accuracy relative to the individual model's."""
    normalised = sum(accuracy[task] / individual[task] for task in accuracy) / len(accuracy)
    return {"name": name, "skipped": "", "accuracy": accuracy, "mean": mean_of(accuracy), "normalised": normalised}


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table(title="accuracy on 500 test images (%)")
    out.add_column("merged by", no_wrap=True)
    for title in (*titles(), "mean", "rescaled (s)", "seconds", "MB"):
        out.add_column(title, justify="right", no_wrap=True)
    for entry in rows:
        if entry["skipped"]:
            continue
        cells = [f"{100 * value:.1f}" for value in entry["accuracy"].values()]
        cells.append(f"{100 * entry['mean']:.1f}")
        if "seconds" in entry:
            cells.append(f"{100 * entry['rescaled_mean']:.1f} ({entry['scale']:.1f})")
            cells += [f"{entry['seconds']:.2f}", f"{entry['memory'] / 1e6:.0f}"]
        out.add_row(entry["name"], *cells, end_section=entry["name"] == "(base)")
    return out
