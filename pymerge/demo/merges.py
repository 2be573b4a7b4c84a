"""Which merges the demo makes, and each of them in a process of its own, so that its time and memory are its own.

python -m pymerge.demo.merges REQUEST     (JSON: base, models, out, and the keywords of pymerge.merge)
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pymerge

# The head is what differs in shape between the tasks: it stays out of the merge, each task keeps its own.
HEADS = ["classifier.*"]
# Where a method has no default, or one that is meant for another number of models than four.
SETTINGS: dict[str, dict[str, Any]] = {"slerp": {"t": 0.5}, "nearswap": {"t": 0.02}, "breadcrumbs_ties": {"scale": 0.3}}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the table: a combine method with its keywords, or why it is not run."""

    name: str
    method: str
    keywords: dict[str, Any] = field(default_factory=dict)
    pairwise: bool = False  # the method takes two models: halves are merged, then merged with each other
    observed: str = ""  # a step needs to know what each model's layers see: by "statistics", or by samples, "data"
    skipped: str = ""


def jobs(tasks: int) -> Iterator[Job]:
    """Every combine method there is, then each purify and calibrate step on task arithmetic; purify steps that need
    statistics on TIES too (selections of entries are methods of their own there)."""
    for name in pymerge.methods.list("combine"):
        yield job(name, tasks)
    for name in pymerge.methods.list("purify"):
        for method in ("task_arithmetic", "ties") if pymerge.methods.describe(name).needs else ("task_arithmetic",):
            yield with_step(f"{name} + {method}", method, "purify", name)
    for name in pymerge.methods.list("calibrate"):
        yield with_step(f"task_arithmetic + {name}", "task_arithmetic", "calibrate", name)


def job(name: str, tasks: int) -> Job:
    info = pymerge.methods.describe(name)
    fewest, most = info.models
    pairwise = most is not None and most + (info.base == "first") == 2
    observed, skipped = needed(name)
    if not pairwise and (tasks < fewest or (most is not None and tasks > most)):
        skipped = "takes one model" if most == 1 else f"takes {fewest} to {most} models"
    keywords = SETTINGS.get(name, {})
    return Job(name=name, method=name, keywords=keywords, pairwise=pairwise, observed=observed, skipped=skipped)


def with_step(label: str, method: str, step: str, name: str) -> Job:
    observed, skipped = needed(name)
    return Job(name=label, method=method, keywords={step: name}, observed=observed, skipped=skipped)


def needed(name: str) -> tuple[str, str]:
    """What a method must be given of the samples ("": nothing), and what it needs that the demo does not have."""
    needs = pymerge.methods.describe(name).needs
    absent = [need for need in needs if need != "covariance"]
    given = "data" if pymerge.methods.get(name).sequential else "statistics"
    return given if "covariance" in needs else "", f"needs {', '.join(absent)}" if absent else ""


def run(job: Job, base: Path, models: list[Path], statistics: list[Path], out: Path) -> dict[str, float]:
    """Merges into `out`. Returns seconds (without the start of Python) and the peak memory of the process in bytes.

    statistics  one file a model; only methods that need them get them"""
    role = pymerge.methods.describe(job.method).base
    if not job.pairwise:
        request = {"base": str(base) if role != "none" else None, "models": [str(m) for m in models], "out": str(out)}
        if job.observed == "statistics":
            request["statistics"] = [str(file) for file in statistics]
        return in_process(request, job)
    costs = []
    while len(models) > 1:
        pairs, odd = list(zip(models[::2], models[1::2], strict=False)), models[len(models) // 2 * 2 :]
        halves = (
            [out] if len(models) == 2 else [out.with_name(f"{out.name}-{len(models)}-{n}") for n in range(len(pairs))]
        )
        for (first, second), half in zip(pairs, halves, strict=True):
            ends = [str(first), str(second)]
            request = {"base": ends.pop(0) if role == "first" else str(base), "models": ends}
            costs.append(in_process(request | {"out": str(half)}, job))
        models = halves + odd
    return {"seconds": sum(c["seconds"] for c in costs), "memory": max(c["memory"] for c in costs)}


def in_process(request: dict[str, Any], job: Job) -> dict[str, float]:
    request |= {"method": job.method, "exclude": HEADS, "observed": job.observed} | job.keywords
    command = [sys.executable, "-m", "pymerge.demo.merges", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise pymerge.MergeError(f"demo, {job.name}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory() -> int:
    """Largest resident memory of this process in bytes (not of what it was started from, as getrusage has it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main(request: dict[str, Any]) -> None:
    base, models = request.pop("base"), request.pop("models")
    if request.pop("observed") == "data":
        from pymerge.demo import train  # imports transformers
        from pymerge.demo.data import TASKS

        request["data"] = [train.samples(task) for task in TASKS]
    start = time.perf_counter()
    try:
        pymerge.merge(base, models, options=pymerge.Options(overwrite=True, progress=False), **request)
    except pymerge.MergeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(json.dumps({"seconds": time.perf_counter() - start, "memory": peak_memory()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
